"""The promise of a deployment to a client, as it travels and as the client's ledger keeps it."""

from dataclasses import dataclass
from typing import Any

from fedpriv.errors import UserError, nearest
from fedpriv.privacy import SAMPLINGS, TRUSTS, PrivacyPlan, Sampling, Trust, trust_of

__all__ = ["NO_PROMISE", "PrivacyTerms", "promised"]

NO_PROMISE = "none"
"""The trust of a run that promises nothing."""


@dataclass(frozen=True, kw_only=True)
class PrivacyTerms:
    """A privacy plan but for the method's bound: every fact that its epsilon depends on.

    Args:
        trust: See `PrivacyPlan`; "none" promises nothing.
        adjacency: See `PrivacyPlan`.
        delta: See `PrivacyPlan`.
        noise_multiplier: See `PrivacyPlan`.
        rounds: How many turns there will be.
        sampling: The cohorts' name.
        population: Number of clients.
        probability: Chance that a client is asked in a turn.
        cohort_size: Clients asked if that number is fixed; otherwise 0.
        client_memory: See `PrivacyPlan`. Promises from before it was written down are counted as with memory, which is
            never too low.
        unit: See `PrivacyPlan`.
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
    client_memory: bool = True
    unit: str = "client"

    @property
    def trust_rules(self) -> Trust | None:
        """What follows from who adds the noise; None if nothing is promised, or nothing that is known."""
        return trust_of(self.trust) if self.trust in TRUSTS else None

    @property
    def against_server(self) -> bool:
        """Whether something is promised against the server itself."""
        return self.trust_rules is not None and not self.trust_rules.trusts_server

    @property
    def charges_participations(self) -> bool:
        """Whether a client pays for its own messages: its own noise protects it."""
        return self.trust_rules is not None and self.trust_rules.charges_participations

    def plan(self, l2_bound: float) -> PrivacyPlan:
        """The plan for messages of at most that norm; a `UserError` if there is none."""
        if self.sampling not in SAMPLINGS:
            raise UserError("sampling", "a known name", repr(self.sampling), nearest(self.sampling, SAMPLINGS))
        cohorts = {"population": self.population, "sampling_prob": self.probability, "size": self.cohort_size}
        return PrivacyPlan(
            trust=self.trust,
            adjacency=self.adjacency,
            sampling=SAMPLINGS[self.sampling].recorded(cohorts),
            rounds=self.rounds,
            delta=self.delta,
            l2_bound=l2_bound,
            noise_multiplier=self.noise_multiplier,
            client_memory=self.client_memory,
            unit=self.unit,
        )


def promised(plan: PrivacyPlan | None, sampling: Sampling, rounds: int) -> dict[str, Any]:
    """Return the fields of the `PrivacyTerms` that a server makes.

    Args:
        plan: Its plan; None if it promises nothing.
        sampling: The cohorts.
        rounds: Number of turns.
    """
    facts: dict[str, Any] = {"trust": NO_PROMISE, "adjacency": "add-or-remove", "delta": 0.0, "noise_multiplier": 0.0}
    if plan is not None:
        facts = {name: getattr(plan, name) for name in (*facts, "client_memory", "unit")}
        facts["trust"] = plan.trust if plan.private else NO_PROMISE
    return {
        **facts,
        "rounds": rounds,
        "sampling": sampling.name,
        "population": sampling.population,
        "probability": sampling.sampling_prob,
        "cohort_size": sampling.cohort_size,
    }
