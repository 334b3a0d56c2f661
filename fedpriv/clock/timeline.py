"""The server's steps, known before training: the clients that count in each, their start models and weights."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fedpriv.privacy import Scheduled

__all__ = ["Group", "Ledger", "Step", "Timeline"]


class Group(NamedTuple):
    """Clients that count in a step with the same start model and weight.

    `start` is the number of steps done when they took the model: it is the model after step `start`. `weight`
    multiplies their messages in the sum. `clients` are ascending int64 `[clients]`.
    """

    start: int
    weight: float
    clients: np.ndarray


class Step(NamedTuple):
    """One step of the server, numbered from 1. Clients are ascending int64; `asked` and `dropped` may repeat a client.

    `seconds` is the simulated time from the start of the run to the end of the step. `dropped` clients never answered.
    `late` clients sent a message that was not used; in the last step, they include clients with messages still on the
    way. Other clients that were asked and do not count (yet) were unavailable or are still at work. `bytes_down` and
    `bytes_up` count from the start of the run.
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
        """The senders of the messages that the step uses, ascending int64."""
        return np.sort(np.concatenate([group.clients for group in self.groups]))

    @property
    def sent(self) -> np.ndarray:
        """The senders of messages that the step uses or discards (`late`), ascending int64; every message once."""
        return np.sort(np.concatenate([self.counted, self.late]))

    @property
    def staleness(self) -> float | None:
        """Mean number of steps between the model that a counted client took and the model that its message updates."""
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
        scheme: The rule that produced the timeline, in one word.
        population: Number of clients.
        expected_size: The divisor of a step's weighted sum.
        steps: The steps in order, numbered from 1.

    Raises:
        ValueError: If a client counts twice in one step. Its weights would add up before they are squared, and it would
            use the same batches and noise twice, so the accounting would be wrong.
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
        """Return step `number`, from 1."""
        return self.steps[number - 1]

    @cached_property
    def last_use(self) -> dict[int, int]:
        """For each start model, by its number: the last step in which a message from it counts."""
        return {group.start: step.number for step in self.steps for group in step.groups}

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the clients that count in each step, their weights, and the late clients.

        It ignores seconds, because their last digits may differ between machines.
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
        """Return the sampling that accounting uses."""
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
    """The charges of each client, and the maximum over clients after each step."""

    def __init__(self) -> None:
        self.most: list[float] = []
        self._spent: dict[int, float] = {}
        self._worst = 0.0

    def charge(self, clients: Iterable[int], amount: float) -> None:
        """Charge each client."""
        for client in clients:
            self._spent[client] = self._spent.get(client, 0.0) + amount
            self._worst = max(self._worst, self._spent[client])

    def close(self) -> None:
        """End a step."""
        self.most.append(self._worst)
