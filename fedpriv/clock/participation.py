"""How long a participation takes, in seconds that nobody waits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from fedpriv.clock.profiles import Fleet
from fedpriv.streams import Purpose, SeededStreams

__all__ = ["Clock", "Participation"]


class Participation(NamedTuple):
    """One client from being asked to its answer.

    `begins` and `ends` are simulated seconds since the run began: when it takes the model, and when its message is
    there. One that `drops` never answers; the server notices at `ends`.
    """

    client: int
    begins: float
    ends: float
    drops: bool


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What decides when clients answer: devices, numbers of examples, the model's size, a seed. No data, no model.

    Args:
        fleet: The devices.
        examples: How many examples of gradient work a client does in one participation, by its id; public.
        model_bytes: Bytes of the model, and of a message.
        streams: Where it comes from who drops out, and who is asked.
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
        """What comes of asking a client.

        It waits until it is available, takes the model, works and sends. What it has begun it ends, also beyond its
        hours.

        Args:
            client: Who.
            asked: When, in seconds.
            attempt: Which time it is that this client is asked, whatever counts them: addresses the dropout.
        """
        device, begins = self.fleet.profile(client), self.fleet.begins(client, asked)
        seconds = self.model_bytes / device.download + self.examples(client) / device.speed
        seconds += self.model_bytes / device.upload
        return Participation(client, begins, begins + seconds, self._drops(device.dropout, client, attempt))

    def _drops(self, dropout: float, client: int, attempt: int) -> bool:
        return dropout > 0.0 and float(self.streams.source(Purpose.DROPOUT, attempt, client).uniform(1)[0]) < dropout
