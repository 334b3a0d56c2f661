"""One draw of the clients' noise for the whole round, if only the sum of the noise is used."""

from dataclasses import replace

from torch import Tensor

from fedpriv.engines.base import Engine, Population
from fedpriv.mechanisms.noise import release_clients_sum
from fedpriv.methods import feedback_of, has_memory
from fedpriv.rounds import Broadcast, ClientRules, Total
from fedpriv.tasks.task import Forward

__all__ = ["FusedNoise", "can_fuse", "without_noise"]


def can_fuse(rules: ClientRules) -> bool:
    """Return True if clients add noise that no memory stores, so that only the sum of the noise is ever used.

    Shares under secure aggregation are integers of single clients, as in a deployment, and are not fused.
    A method with memory and a rule that is not `Feedback` may store noise: its noise is not fused.
    """
    if rules.noise_stddev == 0.0 or rules.method.needs_client_noise or rules.sums is not None:
        return False
    rule = feedback_of(rules.method)
    return not has_memory(rules.method) if rule is None else not rule.sent


def without_noise(population: Population) -> Population:
    """Return the same clients without noise, for the engine inside a `FusedNoise`."""
    return replace(population, rules=replace(population.rules, noise_stddev=0.0, sums=None))


class FusedNoise:
    """An engine of clients without noise, and one draw per round with the distribution of their summed noise.

    The distribution of the models is that of one draw per client; the individual draws differ. The sum of n independent
    normal noises of deviation s has deviation s sqrt(n). So a simulation of n clients pays for one draw, not for n.

    Args:
        inner: Runs the clients of `without_noise`.
        rules: The clients' rules, with the noise.

    Raises:
        ValueError: If clients store their noise.
    """

    def __init__(self, inner: Engine, rules: ClientRules) -> None:
        if not can_fuse(rules):
            raise ValueError(f"the noise of {rules.method} cannot be drawn at once")
        self._inner = inner
        self._rules = rules

    @property
    def name(self) -> str:
        """The name of the inner engine."""
        return self._inner.name

    @property
    def forward(self) -> Forward | None:
        """See `Engine.forward`."""
        return self._inner.forward

    def sum_messages(self, broadcast: Broadcast) -> Total:
        """See `Engine.sum_messages`."""
        total = self._inner.sum_messages(broadcast)
        streams, stddev = self._rules.streams, self._rules.noise_stddev
        noisy = release_clients_sum(streams, stddev, total.sum, broadcast.round, total.messages, broadcast.part)
        return total._replace(sum=noisy)

    def save(self) -> dict[str, Tensor]:
        """See `Engine.save`."""
        return self._inner.save()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine.restore`."""
        self._inner.restore(tensors)

    def close(self) -> None:
        """See `Engine.close`."""
        self._inner.close()
