"""Import torchvision lazily, only to download; see `fedpriv.torchvision_import` for builds that do not match torch."""

import contextlib
import importlib
import io
import logging
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

__all__ = ["CONNECTION_TIMEOUT", "download", "torchvision_datasets"]

CONNECTION_TIMEOUT = 10.0
"""Seconds without an answer after which a download is abandoned."""

DOWNLOADS = {
    "MNIST": {"train": True},
    "FashionMNIST": {"train": True},
    "CIFAR10": {"train": True},
    "QMNIST": {"what": "train"},
}
"""Download arguments of each torchvision class; all but QMNIST fetch training and test files at once."""


def download(source: str, data_root: Path) -> None:
    """Download a data set into `data_root` with torchvision, without output. Gives up on unresponsive servers.

    Args:
        source: The torchvision class, a key of `DOWNLOADS`.
        data_root: The folder in which torchvision creates its usual folders; created if missing.

    Raises:
        OSError, RuntimeError: If the download fails, or torchvision cannot be imported.
    """
    logging.getLogger(__name__).info("downloading %s into %s", source, data_root)
    with _silence(), _timeout(CONNECTION_TIMEOUT):
        getattr(torchvision_datasets(), source)(str(data_root), download=True, **DOWNLOADS[source])


def torchvision_datasets() -> ModuleType:
    """Return the module `torchvision.datasets`, with or without torchvision's compiled operators.

    Raises:
        ImportError, RuntimeError: If torchvision is missing, or fails for another reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("torchvision.datasets")


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
