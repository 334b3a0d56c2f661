"""Durations of participations, in simulated seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from fedpriv.clock.profiles import Fleet
from fedpriv.streams import Purpose, SeededStreams

__all__ = ["Clock", "Participation"]


class Participation(NamedTuple):
    """One client's participation, from the request to its answer.

    `begins` and `ends` are simulated seconds since the run began: the client takes the model at `begins`, and its
    message arrives at `ends`. A client that `drops` never answers; the server notices at `ends`.
    """

    client: int
    begins: float
    ends: float
    drops: bool


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Everything that decides when clients answer: devices, numbers of examples, the model's size, a seed. No data.

    Args:
        fleet: The devices.
        examples: Number of example gradients that a client computes in one participation, by client id; public.
        model_bytes: Bytes of the model, and of a message.
        streams: Random streams that decide dropouts and requests.
    """

    fleet: Fleet
    examples: Callable[[int], int]
    model_bytes: int
    streams: SeededStreams

    @property
    def population(self) -> int:
        """Number of clients."""
        return self.fleet.population

    def participation(self, client: int, asked: float, attempt: int) -> Participation:
        """Return the participation that follows from asking a client.

        The client waits until it is available, downloads the model, works and sends. It completes work that it has
        started, even beyond its hours.

        Args:
            client: The client's id.
            asked: The time of the request, in seconds.
            attempt: Number of the request, counted in any way that is unique per client; it addresses the dropout.
        """
        device, begins = self.fleet.profile(client), self.fleet.begins(client, asked)
        seconds = self.model_bytes / device.download + self.examples(client) / device.speed
        seconds += self.model_bytes / device.upload
        return Participation(client, begins, begins + seconds, self._drops(device.dropout, client, attempt))

    def _drops(self, dropout: float, client: int, attempt: int) -> bool:
        return dropout > 0.0 and float(self.streams.source(Purpose.DROPOUT, attempt, client).uniform(1)[0]) < dropout
