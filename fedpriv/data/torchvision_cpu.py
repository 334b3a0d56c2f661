"""The one door to torchvision: imported late, only to download, also beside a torch without its operators.

A torchvision built for CUDA cannot be imported beside a CPU build of torch, because it describes operators
(`nms`) that it could not load. Data sets need none of them: declaring the missing ones by name is enough.
"""

import contextlib
import functools
import importlib
import io
import logging
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

__all__ = ["CONNECTION_TIMEOUT", "download", "torchvision_datasets"]

CONNECTION_TIMEOUT = 10.0
"""Seconds without an answer after which a download is given up."""

OPERATORS = ("nms", "qnms")
DOWNLOADS = {
    "MNIST": {"train": True},
    "FashionMNIST": {"train": True},
    "CIFAR10": {"train": True},
    "QMNIST": {"what": "train"},
}
"""What to ask of torchvision for each of its classes; all but QMNIST fetch train and test files at once."""


def download(source: str, data_root: Path) -> None:
    """Fetches a data set into `data_root` with torchvision, silently; a server that is silent is given up.

    Args:
        source: The torchvision class, a key of `DOWNLOADS`.
        data_root: Where torchvision makes its usual folders; made if it does not exist.

    Raises:
        OSError, RuntimeError: If the files could not be fetched, or torchvision not imported.
    """
    logging.getLogger(__name__).info("downloading %s into %s", source, data_root)
    with _silence(), _timeout(CONNECTION_TIMEOUT):
        getattr(torchvision_datasets(), source)(str(data_root), download=True, **DOWNLOADS[source])


def torchvision_datasets() -> ModuleType:
    """The module `torchvision.datasets`, with or without torchvision's compiled operators.

    Raises:
        ImportError, RuntimeError: If torchvision is missing, or broken in another way.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("torchvision.datasets")
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
        _forget_torchvision()
        _declare_operators()
        return importlib.import_module("torchvision.datasets")


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


@functools.cache
def _declare_operators() -> torch.library.Library:
    """The declarations, which live as long as this object: the cache keeps it."""
    library = torch.library.Library("torchvision", "DEF")
    for operator in OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


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
