"""For all tests."""

import gc
import os
import signal
import threading

# Ray's workers have a low priority otherwise, and each start of Ray starts some that no test asked for.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_enable_worker_prestart", "0")


def pytest_configure() -> None:
    """Ctrl-C works in what tests start, also where the suite itself was started with it ignored (`nohup`, `&`)."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through all modules and tests again and again."""
    gc.set_threshold(100_000, 50, 50)
