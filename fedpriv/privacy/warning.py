"""What is said before training if noise will drown what is learned."""

import math

from fedpriv.privacy.plan import PrivacyPlan

__all__ = ["signal_warning"]

# The noise of a round's mean message may be this many times as long as the longest message before it is said.
_MAX_RATIO = 3.0


def signal_warning(plan: PrivacyPlan, size: int) -> str | None:
    """Return what to know before training under a plan; None if the noise is no trouble.

    Args:
        plan: The promise.
        size: Number of parameters that are trained.
    """
    expected = plan.sampling.expected_size
    added = 1.0 if plan.trust == "central" else expected
    ratio = plan.noise_stddev * math.sqrt(size * added) / expected / plan.l2_bound
    if ratio <= _MAX_RATIO:
        return None
    more = ratio / _MAX_RATIO if plan.trust == "central" else (ratio / _MAX_RATIO) ** 2
    return (
        f"The noise of the mean message is about {ratio:.2g} times as long as a message may be, so that next to "
        f"nothing may be learned. About {math.ceil(more * expected):,} clients a round, or about "
        f"{ratio / _MAX_RATIO:.2g} times epsilon, would be needed."
    )
