"""A warning before training if the noise will drown what is learned."""

import math
from dataclasses import dataclass, replace
from typing import Any

from fedpriv.privacy.plan import PrivacyPlan

__all__ = ["MAX_RATIO", "NoiseAgainstSignal", "noise_against_signal", "signal_warning"]

MAX_RATIO = 3.0
"""Largest ratio of noise and bound that is not warned of. Rounds average noise out, so a ratio of 1 or 2 still learns:
the shipped quickstart, at 1.5, reaches 0.9 on digits. At some ten, nothing but noise is left."""


@dataclass(frozen=True, kw_only=True)
class NoiseAgainstSignal:
    """Noise on a round's mean message, beside the longest message that a client may send.

    Args:
        ratio: Expected l2 norm of the noise on the mean message, over the bound of one message.
        clients: About how many clients a ratio of `MAX_RATIO` needs, with the same sampling probability and epsilon;
            None if the ratio is no larger.
        epsilon: The epsilon that it needs with the same clients; None likewise, or if no finite epsilon will do.
    """

    ratio: float
    clients: int | None
    epsilon: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {"noise_to_bound": self.ratio, "clients_needed": self.clients, "epsilon_needed": self.epsilon}


def noise_against_signal(plan: PrivacyPlan, size: int) -> NoiseAgainstSignal:
    """Return how the noise of a plan compares with its messages.

    Args:
        plan: The promise.
        size: Number of parameters that are trained.
    """
    expected, population = plan.sampling.expected_size, plan.sampling.population
    trust = plan.trust_rules
    ratio = plan.noise_stddev * math.sqrt(size * trust.noises(expected)) / expected / plan.l2_bound
    if ratio <= MAX_RATIO:
        return NoiseAgainstSignal(ratio=ratio, clients=None, epsilon=None)
    excess = ratio / MAX_RATIO
    clients = math.ceil(population * trust.more_clients(excess))
    epsilon = replace(plan, noise_multiplier=plan.noise_multiplier / excess).epsilon
    return NoiseAgainstSignal(ratio=ratio, clients=clients, epsilon=epsilon if math.isfinite(epsilon) else None)


def signal_warning(plan: PrivacyPlan, size: int) -> str | None:
    """Return one or two sentences to read before training; None if the noise is no trouble, or there is none.

    Args:
        plan: The promise.
        size: Number of parameters that are trained.
    """
    if not plan.private:
        return None
    found = noise_against_signal(plan, size)
    if found.clients is None:
        return None
    more = plan.sampling.more_clients(found.clients)
    other = f", or an epsilon of {found.epsilon:.3g}" if found.epsilon is not None else ""
    return (
        f"The noise of the mean message is {found.ratio:.2g} times its bound: next to nothing will be learned. About "
        f"{more} would be needed{other}, or a smaller model."
    )
