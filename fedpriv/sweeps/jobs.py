"""Jobs that `local_jobs` or `ray_jobs` run in other processes, and the events that report on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from fedpriv.errors import UserError

__all__ = ["Began", "Ended", "Job", "JobDied", "call"]


class JobDied(Exception):  # noqa: N818
    """The error of a job with a process that ended before the job did, for example because memory ran out."""


class Job(NamedTuple):
    """A function of a module with its arguments."""

    name: str
    function: Callable[..., object]
    arguments: tuple[object, ...]


@dataclass(frozen=True)
class Began:
    """A job was handed to a process."""

    name: str


@dataclass(frozen=True)
class Ended:
    """A job ended, with its return value or its error."""

    name: str
    result: object


def call(function: Callable[..., object], arguments: tuple[object, ...]) -> object:
    """Run a job. Return its errors as values with their texts: an exception might not survive pickling."""
    try:
        return function(*arguments)
    except UserError as error:
        return RuntimeError(str(error))
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}")
