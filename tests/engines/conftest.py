"""Set one thread, which is fastest for these small engines."""

from collections.abc import Iterator

import pytest

from fedpriv.engines import one_thread


@pytest.fixture(autouse=True)
def single_threaded() -> Iterator[None]:
    """Run each test on one thread, for any number of cores."""
    with one_thread():
        yield
