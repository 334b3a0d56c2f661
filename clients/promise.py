"""What a deployment promises to a client, as it travels and as the client's ledger keeps it."""

from dataclasses import dataclass
from typing import Any

from fedpriv.errors import UserError, nearest
from fedpriv.privacy import SAMPLINGS, PrivacyPlan

__all__ = ["Promise"]


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A privacy plan but for the method's bound.

    Args:
        trust: See `PrivacyPlan`; "none" promises nothing.
        adjacency: See `PrivacyPlan`.
        delta: See `PrivacyPlan`.
        noise_multiplier: See `PrivacyPlan`.
        rounds: How many turns there will be.
        sampling: The cohorts' name.
        population: Number of clients.
        probability: Chance that a client is asked in a turn.
        cohort_size: Clients asked, where that is fixed; else 0.
    """

    trust: str
    adjacency: str
    delta: float
    noise_multiplier: float
    rounds: int
    sampling: str
    population: int
    probability: float
    cohort_size: int

    def plan(self, l2_bound: float) -> PrivacyPlan:
        """The plan for messages of at most that norm; a `UserError` if there is none."""
        options: dict[str, dict[str, Any]] = {
            "everyone": {},
            "poisson": {"probability": self.probability},
            "fixed": {"size": self.cohort_size},
        }
        if self.sampling not in options:
            raise UserError("sampling", "a known name", repr(self.sampling), nearest(self.sampling, options))
        return PrivacyPlan(
            trust=self.trust,
            adjacency=self.adjacency,
            sampling=SAMPLINGS[self.sampling](self.population, **options[self.sampling]),
            rounds=self.rounds,
            delta=self.delta,
            l2_bound=l2_bound,
            noise_multiplier=self.noise_multiplier,
        )
