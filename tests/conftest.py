"""For all tests."""

import signal
import threading


def pytest_configure() -> None:
    """Ctrl-C works in what tests start, also where the suite itself was started with it ignored (`nohup`, `&`)."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
