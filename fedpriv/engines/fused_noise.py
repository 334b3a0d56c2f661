"""Clients' noise as one draw for the whole round, where nothing but its sum is used."""

from dataclasses import replace

from torch import Tensor

from fedpriv.engines.base import Engine, Population
from fedpriv.mechanisms.noise import release_clients_sum
from fedpriv.methods import feedback_of, has_memory
from fedpriv.rounds import Broadcast, ClientRules, Total

__all__ = ["FusedNoise", "can_fuse", "without_noise"]


def can_fuse(rules: ClientRules) -> bool:
    """Whether clients add noise that no memory keeps: then only the sum of all noises is ever seen.

    A method with a memory and a rule of its own form is not trusted to keep it free of noise.
    """
    if rules.noise_stddev == 0.0 or rules.method.needs_client_noise:
        return False
    rule = feedback_of(rules.method)
    return not has_memory(rules.method) if rule is None else not rule.sent


def without_noise(population: Population) -> Population:
    """The same clients, who add no noise: what the engine inside a `FusedNoise` runs."""
    return replace(population, rules=replace(population.rules, noise_stddev=0.0))


class FusedNoise:
    """An engine of clients without noise, and one draw a round with the law of the sum of theirs.

    The models have the same law as with a draw for each client, and other values: n independent normal noises of
    deviation s add up to one of deviation s sqrt(n). A simulation of n clients then pays for one draw and not for n.

    Args:
        inner: Runs the clients of `without_noise`.
        rules: Their rules with the noise.

    Raises:
        ValueError: If clients remember their noise.
    """

    def __init__(self, inner: Engine, rules: ClientRules) -> None:
        if not can_fuse(rules):
            raise ValueError(f"the noise of {rules.method} cannot be drawn at once")
        self._inner = inner
        self._rules = rules

    @property
    def name(self) -> str:
        """The inner engine's."""
        return self._inner.name

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
