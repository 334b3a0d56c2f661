"""Functions side by side in other processes, run by `local_jobs` or `ray_jobs`: what goes in, what is said of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedpriv.errors import UserError

__all__ = ["Began", "Ended", "Job", "JobDied", "call"]


class JobDied(Exception):  # noqa: N818
    """A job's process ended before the job did, as by the memory of the machine running out."""


class Job(NamedTuple):
    """What is done: a function of a module, and what it is called with."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Began:
    """A job was handed to a process."""

    name: str


@dataclass(frozen=True)
class Ended:
    """A job ended, with what it returned or the exception that ended it."""

    name: str
    result: Any


def call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Does a job. Its own mistakes come back as values, in words: an exception may not survive the way."""
    try:
        return function(*arguments)
    except UserError as error:
        return RuntimeError(str(error))
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}")
