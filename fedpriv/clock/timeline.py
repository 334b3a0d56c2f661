"""The server's steps: who counts in which, from which model, with what weight; known before anything is trained."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fedpriv.privacy import Scheduled

__all__ = ["Group", "Ledger", "Step", "Timeline"]


class Group(NamedTuple):
    """Clients that count in one step alike.

    `start` is how many steps were done when they took their model, so that it is the model after step `start`; a
    message's `weight` multiplies it in the sum; `clients` are ascending int64 `[clients]`.
    """

    start: int
    weight: float
    clients: np.ndarray


class Step(NamedTuple):
    """One step of the server, from 1. Clients are int64, ascending; in `asked` and `dropped` one may stand twice.

    `seconds` is the simulated time since the run began at which the step ends. `dropped` never answered. `late` sent
    their message, and it was not used; in the last step they are also those whose message is then still on its way.
    Others that were asked and do not count (yet) were not available, or are still at work. `bytes_down` and `bytes_up`
    count from the beginning of the run.
    """

    number: int
    seconds: float
    groups: tuple[Group, ...]
    asked: np.ndarray
    dropped: np.ndarray
    late: np.ndarray
    bytes_down: int
    bytes_up: int

    @property
    def counted(self) -> np.ndarray:
        """Whose messages the step uses, ascending int64."""
        return np.sort(np.concatenate([group.clients for group in self.groups]))

    @property
    def sent(self) -> np.ndarray:
        """Whose messages it uses, or are lost on it (`late`), ascending int64; every message is in one step's."""
        return np.sort(np.concatenate([self.counted, self.late]))

    @property
    def staleness(self) -> float | None:
        """Mean number of steps between the model a counted client took and the one its message moves."""
        counted = sum(len(group.clients) for group in self.groups)
        behind = sum(len(group.clients) * (self.number - 1 - group.start) for group in self.groups)
        return behind / counted if counted else None

    @property
    def squared_weights(self) -> float:
        """Sum of the squared weights of the messages that count."""
        return sum(group.weight**2 * len(group.clients) for group in self.groups)


@dataclass(frozen=True, kw_only=True, eq=False)
class Timeline:
    """All steps of a run.

    Args:
        scheme: Which rule made it, in one word.
        population: Number of clients.
        expected_size: By which a step's weighted sum is divided.
        steps: In order, numbered from 1.

    Raises:
        ValueError: If a client counts twice in one step. Its weights would add up before they are squared, its batches
            and its noise would be the same twice, and the account would be wrong.
    """

    scheme: str
    population: int
    expected_size: float
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        for step in self.steps:
            counted = step.counted
            if (counted[1:] == counted[:-1]).any():
                raise ValueError(f"a client counts twice in step {step.number}")

    def step(self, number: int) -> Step:
        """The step of that number, from 1."""
        return self.steps[number - 1]

    @cached_property
    def last_use(self) -> dict[int, int]:
        """Of each model that somebody starts from, by its number: the last step in which such a message counts."""
        return {group.start: step.number for step in self.steps for group in step.groups}

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of who counts when and how much, and of who sends in vain; not of seconds, whose last digit may be
        another machine's.
        """
        found = 0
        for step in self.steps:
            found = zlib.crc32(repr((step.number, len(step.groups))).encode(), found)
            found = zlib.crc32(np.ascontiguousarray(step.late).tobytes(), found)
            for group in step.groups:
                found = zlib.crc32(repr((group.start, group.weight)).encode(), found)
                found = zlib.crc32(np.ascontiguousarray(group.clients).tobytes(), found)
        return f"{found:08x}"

    def scheduled(self) -> Scheduled:
        """What accounting needs of it."""
        squares, sent = Ledger(), Ledger()
        for step in self.steps:
            for group in step.groups:
                squares.charge(group.clients.tolist(), group.weight**2)
            sent.charge(step.sent.tolist(), 1)
            squares.close()
            sent.close()
        most = tuple(squares.most), tuple(int(count) for count in sent.most)
        return Scheduled(self.population, self.expected_size, self.scheme, *most)


class Ledger:
    """What each client has been charged, and after each step the most that anyone has."""

    def __init__(self) -> None:
        self.most: list[float] = []
        self._spent: dict[int, float] = {}
        self._worst = 0.0

    def charge(self, clients: Iterable[int], amount: float) -> None:
        """Charges each client."""
        for client in clients:
            self._spent[client] = self._spent.get(client, 0.0) + amount
            self._worst = max(self._worst, self._spent[client])

    def close(self) -> None:
        """Ends a step."""
        self.most.append(self._worst)
