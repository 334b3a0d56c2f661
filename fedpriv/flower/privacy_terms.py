"""Privacy terms of a deployment, as sent to a client and stored in the client's ledger."""

import json
from dataclasses import dataclass, field
from typing import Any

from fedpriv.checks import is_real, is_whole
from fedpriv.errors import UserError, nearest
from fedpriv.privacy import (
    SAMPLINGS,
    TRUSTS,
    Aggregation,
    NoiseMatrix,
    PrivacyPlan,
    Sampling,
    Trust,
    adjacency_of,
    trust_name,
    trust_of,
    unit_name,
)
from fedpriv.privacy.correlation import read_matrix
from fedpriv.privacy.records import RecordBound

__all__ = ["NO_PROMISE", "PrivacyTerms", "promised"]

NO_PROMISE = "none"
"""Trust of a run without a privacy guarantee."""

_MAX_BANDS = 10_000


@dataclass(frozen=True, kw_only=True)
class PrivacyTerms:
    """Privacy plan without the method's bound: every value that its epsilon depends on.

    Args:
        trust: See `PrivacyPlan`; "none" for no privacy guarantee.
        adjacency: See `PrivacyPlan`.
        delta: See `PrivacyPlan`.
        noise_multiplier: See `PrivacyPlan`.
        rounds: Number of turns.
        sampling: Name of the sampling.
        population: Number of clients.
        probability: Probability that a client is asked in a turn.
        cohort_size: Number of clients asked, if it is fixed; otherwise 0.
        client_memory: See `PrivacyPlan`. Older terms without this field count as with memory, which never
            underestimates epsilon.
        unit: See `PrivacyPlan`.
        record: How far one record moves the releases, as text (`RecordBound.as_text`); empty for the unit `client`.
        aggregation: The numbers of secure aggregation, as text (`Aggregation.as_text`); empty for other trusts.
        separation: The fewest turns from one message of a client to its next, which the client enforces.
        noise: The matrix of noise that is correlated over turns, as text (JSON); empty for independent turns.
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
    record: str = ""
    aggregation: str = ""
    separation: int = field(default=1, metadata={"absent_by_default": True})
    noise: str = field(default="", metadata={"absent_by_default": True})

    @property
    def record_bound(self) -> RecordBound | None:
        """How far one record moves the releases; None for the unit `client`.

        Raises:
            UserError: If the text is not a record of that.
        """
        return RecordBound.read(self.record) if self.record else None

    @property
    def sums(self) -> Aggregation | None:
        """The numbers of secure aggregation; None for other trusts.

        Raises:
            UserError: If the text is not a record of them.
        """
        return Aggregation.of_text(self.aggregation) if self.aggregation else None

    @property
    def matrix(self) -> NoiseMatrix | None:
        """The matrix of correlated noise; None for independent turns.

        Raises:
            UserError: If the text is not a matrix for all turns.
        """
        return _matrix(self.noise, self.rounds) if self.noise else None

    @property
    def in_turns(self) -> bool:
        """True if the guarantee relies on the turns in which a client answers, or on noise of earlier turns."""
        return self.separation > 1 or bool(self.noise)

    @property
    def trust_rules(self) -> Trust | None:
        """Rules of the trust; None without a privacy guarantee, and for an unknown trust."""
        return trust_of(self.trust) if self.trust in TRUSTS else None

    @property
    def against_server(self) -> bool:
        """True if the guarantee holds against the server itself."""
        return self.trust_rules is not None and not self.trust_rules.trusts_server

    @property
    def charges_participations(self) -> bool:
        """True if a client pays for its own messages, because its own noise protects it."""
        return self.trust_rules is not None and self.trust_rules.charges_participations

    def plan(self, l2_bound: float) -> PrivacyPlan:
        """Return the plan for messages of norm at most `l2_bound`.

        Raises:
            UserError: If there is no such plan.
        """
        if self.sampling not in SAMPLINGS:
            raise UserError("sampling", "a known name", repr(self.sampling), nearest(self.sampling, SAMPLINGS))
        cohorts = {"population": self.population, "sampling_prob": self.probability, "size": self.cohort_size}
        whole = self.separation > 0 and self.probability == 1.0 / self.separation
        cohorts |= {"min_separation": self.separation, "probability": None if whole else self.probability}
        sampling = SAMPLINGS[self.sampling].recorded(cohorts)
        if sampling.separation != self.separation:
            expected = f"{sampling.separation} with {self.sampling}"
            raise UserError("separation", expected, self.separation, "Ask the server's operator")
        return PrivacyPlan(
            trust=trust_name(self.trust),
            adjacency=adjacency_of(self.adjacency),
            sampling=sampling,
            rounds=self.rounds,
            delta=self.delta,
            l2_bound=l2_bound,
            noise_multiplier=self.noise_multiplier,
            client_memory=self.client_memory,
            unit=unit_name(self.unit),
            record=self.record_bound,
            aggregation=self.sums,
            noise=self.matrix,
        )


def promised(plan: PrivacyPlan | None, sampling: Sampling, rounds: int) -> dict[str, Any]:
    """Return the fields of a server's `PrivacyTerms`.

    Args:
        plan: The server's plan; None without a privacy guarantee.
        sampling: Sampling of the cohorts.
        rounds: Number of turns.

    Raises:
        UserError: If the plan relies on answers of clients that are not sampled, for which no server of Flower asks.
    """
    if plan is not None and plan.aggregation is not None and plan.aggregation.everyone_answers:
        expected, remedy = "false with Flower, for now: its servers ask the sampled clients", "Remove it"
        raise UserError("aggregation.everyone_answers", expected, "true", remedy)
    facts: dict[str, Any] = {"trust": NO_PROMISE, "adjacency": "add-or-remove", "delta": 0.0, "noise_multiplier": 0.0}
    if plan is not None:
        facts = {name: getattr(plan, name) for name in (*facts, "client_memory", "unit")}
        facts["trust"] = plan.trust if plan.private else NO_PROMISE
        facts["record"] = "" if plan.record is None else plan.record.as_text()
        facts["aggregation"] = "" if plan.aggregation is None else plan.aggregation.as_text()
        facts["noise"] = "" if plan.noise is None else json.dumps(plan.noise.as_dict())
    return {
        **facts,
        "rounds": rounds,
        "sampling": sampling.name,
        "population": sampling.population,
        "probability": sampling.sampling_prob,
        "cohort_size": sampling.cohort_size,
        "separation": sampling.separation,
    }


def _matrix(text: str, rounds: int) -> NoiseMatrix:
    """Return the matrix in an untrusted text; raise UserError unless it is one for `rounds` turns."""
    expected, remedy = f"a matrix of noise for {rounds:,} turns", "Use one version of fedpriv on both sides"
    try:
        record = json.loads(text)
        bands = record.get("coefficients", [])
        numbers = isinstance(bands, list) and len(bands) <= _MAX_BANDS and all(map(is_real, bands))
        if numbers and is_whole(record["rounds"], rounds, rounds) and is_real(record["damping"], 0.0, 1.0):
            return read_matrix(record)
        got = "numbers that are not of such a matrix"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        got = type(error).__name__
    raise UserError("noise", expected, got, remedy)
