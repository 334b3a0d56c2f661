"""A warning before training if the noise will drown the signal."""

import math
from dataclasses import dataclass, replace
from typing import Any

from fedpriv.privacy.plan import PrivacyPlan
from fedpriv.privacy.unit import unit_of

__all__ = ["MAX_RATIO", "NoiseAgainstSignal", "delta_warning", "noise_against_signal", "signal_warning"]

MAX_RATIO = 3.0
"""Largest ratio of noise to bound without a warning. Noise averages out over rounds, so models still learn at a ratio
of 1 or 2: the shipped quickstart, at 1.5, reaches 0.9 on digits. At about 10, only noise is left."""


@dataclass(frozen=True, kw_only=True)
class NoiseAgainstSignal:
    """Noise on a round's mean message, compared with the longest message that a client may send.

    Args:
        ratio: Expected l2 norm of the noise on the mean message, over the bound of one message.
        clients: Approximate number of clients that a ratio of `MAX_RATIO` requires at the same sampling probability
            and epsilon; None if the ratio is not above it.
        epsilon: The epsilon that `MAX_RATIO` requires with the same clients; None if the ratio is not above it, or if
            no finite epsilon suffices.
    """

    ratio: float
    clients: int | None
    epsilon: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {"noise_to_bound": self.ratio, "clients_needed": self.clients, "epsilon_needed": self.epsilon}


def noise_against_signal(plan: PrivacyPlan, size: int) -> NoiseAgainstSignal:
    """Return the size of a plan's noise compared with its messages.

    Args:
        plan: The plan.
        size: Number of trained parameters.
    """
    expected, population = plan.sampling.expected_size, plan.sampling.population
    trust = plan.trust_rules
    longest = plan.l2_bound if plan.record is None else min(plan.l2_bound, plan.record.terms.bound)
    stddev = plan.message_stddev
    if stddev == 0.0 and plan.record is not None:  # of the mean gradient of a step
        stddev = plan.noise_stddev * plan.record.terms.alone / plan.record.terms.bound
    if plan.sums is not None:  # all shares, also those beyond the fewest that the plan needs
        stddev = plan.shares.client * math.sqrt(expected)
    ratio = stddev * math.sqrt(size * trust.noises(expected)) / expected / longest
    if ratio <= MAX_RATIO:
        return NoiseAgainstSignal(ratio=ratio, clients=None, epsilon=None)
    excess = ratio / MAX_RATIO
    clients = math.ceil(population * trust.more_clients(excess))
    epsilon = replace(plan, noise_multiplier=plan.noise_multiplier / excess).epsilon
    return NoiseAgainstSignal(ratio=ratio, clients=clients, epsilon=epsilon if math.isfinite(epsilon) else None)


def delta_warning(plan: PrivacyPlan) -> str | None:
    """Return a warning of one sentence if delta is at least one over the number of protected units; otherwise None."""
    units = plan.sampling.population * (1 if plan.record is None else plan.record.terms.examples)
    if not plan.private or plan.delta < 1.0 / units:
        return None
    one = unit_of(plan.unit).one
    return (
        f"delta is at least 1 / {one}s ({1.0 / units:.2g}): such a delta would also allow one {one}'s data to be "
        "released outright."
    )


def signal_warning(plan: PrivacyPlan, size: int) -> str | None:
    """Return a warning of two sentences; None if the noise is small enough, or if there is none.

    Args:
        plan: The plan.
        size: Number of trained parameters.
    """
    if not plan.private:
        return None
    found = noise_against_signal(plan, size)
    if found.clients is None:
        return None
    more = plan.sampling.more_clients(found.clients)
    other = f", an epsilon of {found.epsilon:.3g}" if found.epsilon is not None else ""
    return (
        f"The noise on the mean message is {found.ratio:.2g} times its bound, so the model will learn almost nothing. "
        f"Use {more}{other} or a smaller model."
    )
