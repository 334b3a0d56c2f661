"""For all tests."""

import gc
import os
import signal
import threading
from collections import Counter

import pytest

# Ray's workers have a low priority otherwise, and each start of Ray starts some that no test asked for.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_enable_worker_prestart", "0")


def pytest_configure() -> None:
    """Ctrl-C works in processes that tests start, also if the suite was started with it ignored (`nohup`, `&`)."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark three quarters of the cases of a `sampled` test as slow, in a pattern that keeps each parameter varied."""
    seen: Counter[str] = Counter()
    for item in items:
        if item.get_closest_marker("sampled"):
            test = item.nodeid.partition("[")[0]
            i = seen[test]
            seen[test] += 1
            if (i + i // 4 + i // 16) % 4:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through all modules and tests again and again."""
    gc.set_threshold(100_000, 50, 50)
