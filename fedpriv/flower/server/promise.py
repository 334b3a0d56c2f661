"""The privacy guarantee of a strategy, in the words of its user."""

from dataclasses import dataclass

from fedpriv.errors import UserError
from fedpriv.methods import Method, damping_of, has_memory, message_size
from fedpriv.privacy import (
    Adjacency,
    Aggregation,
    AggregationChoice,
    NoiseChoice,
    PrivacyPlan,
    Sampling,
    TrustName,
    correlated,
    make_plan,
    trust_of,
)
from fedpriv.rounds import most_messages

__all__ = ["Privacy", "refuse_unused"]


def refuse_unused(noise: NoiseChoice | None, privacy: "Privacy | None") -> None:
    """Raise UserError for a kind of noise in a run without privacy, which has no noise."""
    if noise is not None and privacy is None:
        raise UserError("noise", "None without privacy", noise.kind, "Remove it, or give the strategy privacy")


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The privacy guarantee of each client. Give exactly one of `epsilon` and `noise_multiplier`.

    Args:
        epsilon: Target epsilon; the noise is calibrated to it.
        noise_multiplier: Noise std over l2_sensitivity; epsilon follows from it.
        delta: Probability of failure, in (0, 1).
        trust: The party that adds noise: `central`, the server; `local`, every client; `aggregator`, every client a
            share, and the server sees only sums. Without `helpers` of the strategy, such a run is a simulation.
        adjacency: `add-or-remove` or `replace`; None for the default of the trust.
        app_memory: True if a client of the app may remember earlier rounds: in `context.state`, in files or in local
            layers. Cohorts of a fixed size improve epsilon only if this is False and the method has no memory; see
            `fedpriv.privacy.PrivacyPlan`.
        least_survivors: With `aggregator`: the fewest answers for which a round counts; None for four fifths of a
            round's clients.
        colluders: With `aggregator`: the number of clients that may collude with the server, be invented by it, or
            leave out their noise.
    """

    epsilon: float | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5
    trust: TrustName = "central"
    adjacency: Adjacency | None = None
    app_memory: bool = True
    least_survivors: int | None = None
    colluders: int = 0

    def plan(
        self,
        method: Method,
        sampling: Sampling,
        rounds: int,
        size: int | None = None,
        helpers: int = 1,
        noise: NoiseChoice | None = None,
    ) -> PrivacyPlan:
        """Return the plan for `rounds` rounds of `method`.

        Args:
            method: The method.
            sampling: The sampling of clients.
            rounds: Number of rounds.
            size: Number of trained parameters; needed for `aggregator` only.
            helpers: Number of helpers of secure aggregation.
            noise: The noise over rounds; None for independent rounds.

        Raises:
            UserError: If there is no such plan.
        """
        if noise is None and sampling.separation > 1 and trust_of(self.trust).shows_messages:
            expected, remedy = f'no separated turns with trust="{self.trust}"', "Use Everyone, or run a simulation"
            raise UserError("cohort", expected, f"min_separation={sampling.separation}", remedy)
        plan = make_plan(
            epsilon=self.epsilon,
            noise_multiplier=self.noise_multiplier,
            delta=self.delta,
            trust=self._aggregation(method, sampling, size, helpers) or self.trust,
            adjacency=self.adjacency,
            sampling=sampling,
            rounds=rounds,
            l2_bound=method.bounded.l2_bound,
            client_memory=self.app_memory or has_memory(method),
        )
        matrix = None if noise is None else noise.of(sampling, rounds, damping_of(method))
        return plan if matrix is None else correlated(plan, matrix, self.epsilon)

    def _aggregation(self, method: Method, sampling: Sampling, size: int | None, helpers: int) -> Aggregation | None:
        secure = trust_of(self.trust).secure_sums
        if not secure and (self.least_survivors is not None or self.colluders):
            given = "colluders" if self.least_survivors is None else "least_survivors"
            remedy = f'Remove {given}, or set trust="aggregator"'
            raise UserError(f"Privacy {given}", 'no value unless trust = "aggregator"', f'trust "{self.trust}"', remedy)
        if not secure or size is None:
            return None
        choice = AggregationChoice(helpers=helpers, least_survivors=self.least_survivors, colluders=self.colluders)
        return choice.of(sampling, most_messages(sampling), message_size(method, size))
