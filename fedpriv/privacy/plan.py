"""The privacy plan: one frozen object that turns what is promised into noise, and noise into what is reported.

No other code multiplies a bound, a noise multiplier and an epsilon.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedpriv.checks import is_real, is_whole
from fedpriv.errors import UserError, nearest
from fedpriv.mechanisms.gaussian import release_grid
from fedpriv.mechanisms.noise import Gaussian
from fedpriv.privacy.gaussian import MAX_NOISE
from fedpriv.privacy.sampling import Everyone, Sampling
from fedpriv.privacy.trust import Trust, trust_of
from fedpriv.privacy.unit import ADJACENCIES, unit_of

# The accountant takes a while to import, and clients and `--help` never ask for an epsilon: see the late import.
if TYPE_CHECKING:
    from fedpriv.privacy.accounting import Bound, Releases

__all__ = ["ADJACENCIES", "DELTAS", "NOT_PROMISED", "REPLACE_FACTOR", "PrivacyPlan", "make_plan"]

# Replacing a message moves a sum by up to the diameter of the ball that holds it.
REPLACE_FACTOR = 2.0

MAX_ROUNDS = 10**12

MIN_EPSILON = 1e-6
"""Below that, delta is all that is promised."""

DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-10, 1e-12)
"""The deltas at which an epsilon is reported beside the plan's own."""

NOT_PROMISED: dict[str, Any] = {"promises": [], "gaussian_dp_mu": None, "zcdp_rho": None, "epsilons": {}}
"""The entries of `PrivacyPlan.as_dict` that list promises, for a run that promises nothing."""


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What is promised, to whom, and the noise that keeps the promise.

    Args:
        trust: central: the server adds the noise to the sum and only models are released. local: each client adds
            noise to its message, and the server sees every message.
        adjacency: add-or-remove: a client's message is there or is zero. replace: it is any other bounded message.
        sampling: Who takes part; draws the cohorts and is accounted.
        rounds: Number of rounds, from 0.
        delta: In (0, 1).
        l2_bound: Bound B on the l2 norm of one message.
        noise_multiplier: Standard deviation of the noise over `l2_sensitivity`; 0 promises nothing.
        client_memory: Whether clients keep a state from round to round; see `accounting.Releases`.
        unit: Whose data may change; only `client` for now.

    Formal guarantee: with noise of `noise_stddev` in each coordinate, on the sum where trust is central and on every
    message where it is local, and messages of norm at most `l2_bound`, what the adversary sees over all rounds is
    (`epsilon`, `delta`)-differentially private under `adjacency`, whatever state clients and server keep.
    """

    trust: str
    adjacency: str
    sampling: Sampling
    rounds: int
    delta: float
    l2_bound: float
    noise_multiplier: float
    client_memory: bool = True
    unit: str = "client"

    def __post_init__(self) -> None:
        _check_names(self.trust, self.adjacency, self.unit)
        self.sampling.check_neighbors(self.adjacency)
        _check_numbers(self.rounds, self.delta, self.l2_bound)
        if not is_real(self.noise_multiplier, 0.0, MAX_NOISE):
            expected = f"a number from 0 to {MAX_NOISE:g}"
            raise UserError("privacy.noise_multiplier", expected, self.noise_multiplier, "Give it, or privacy.epsilon")

    @property
    def trust_rules(self) -> Trust:
        """What follows from who adds the noise."""
        return trust_of(self.trust)

    @property
    def releases(self) -> "Releases":
        """What accounting needs to know of it."""
        from fedpriv.privacy.accounting import Releases

        return Releases(
            trust=self.trust_rules,
            adjacency=self.adjacency,
            sampling=self.sampling,
            delta=self.delta,
            client_memory=self.client_memory,
        )

    @property
    def l2_sensitivity(self) -> float:
        """Most that one client can move a sum of messages: B for add-or-remove, 2 B for replace."""
        return self.l2_bound * (REPLACE_FACTOR if self.adjacency == "replace" else 1.0)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation per coordinate, on the sum (trust central) or on each message (trust local)."""
        return self.noise_multiplier * self.l2_sensitivity

    @property
    def release_grid(self) -> float | None:
        """G: all that is released is a multiple of it (`fedpriv.mechanisms.noise`); None without noise.

        The noise is sampled exactly, so that nothing is added to epsilon or delta for the sampler.
        """
        return release_grid(self.noise_stddev) if self.noise_stddev > 0.0 else None

    @property
    def epsilon(self) -> float:
        """Spent after all rounds; infinite without noise."""
        return self.epsilon_after(self.rounds)

    @property
    def accountant(self) -> str:
        """Who proved `epsilon`."""
        return self._bound(self.rounds).accountant

    @property
    def amplification(self) -> bool:
        """Whether `epsilon` is owed to the sampling of clients."""
        return self._bound(self.rounds).amplified

    @property
    def adversary(self) -> str:
        """Against whom; one clause."""
        return self.trust_rules.adversary

    @property
    def private(self) -> bool:
        """Whether anything is promised at all: there is noise, and enough of it for a finite epsilon."""
        return self.noise_multiplier > 0.0 and math.isfinite(self.epsilon)

    def epsilon_after(self, rounds: int) -> float:
        """Spent after the first `rounds` rounds: by any client where trust is central, else by one in all of them.

        Where a timeline says who counts, by whoever has spent most until then; where trust is local, that is who has
        sent most messages. Those on their way count when they arrive, and at the end of the last round.
        """
        _check_numbers(rounds, self.delta, self.l2_bound)
        return self._bound(rounds).epsilon

    def epsilon_of_participations(self, count: int) -> float:
        """Spent by a client that sent `count` messages, where trust is local.

        Raises:
            ValueError: Where trust is central: who takes part is then part of what protects.
        """
        if not self.trust_rules.charges_participations:
            raise ValueError("only where trust is local is a client charged for its own participations")
        return self._bound(count, Everyone(self.sampling.population)).epsilon

    def mu_after(self, rounds: int) -> float | None:
        """Return mu for which the first `rounds` rounds are mu-Gaussian-DP (Dong, Roth, Su 2022), or None.

        Unsampled Gaussian rounds compose to exactly one Gaussian mechanism, whose sensitivity over its deviation is mu.
        It is infinite without noise. If the plan credits sampling, no mu is exact and none is given.
        """
        _check_numbers(rounds, self.delta, self.l2_bound)
        if self._credits_sampling:
            return None
        releases = self.sampling.charge(rounds, each_message=self.trust_rules.shows_messages)
        return Gaussian(self.noise_multiplier).event(moved=1.0, rounds=releases)

    @property
    def gaussian_dp_mu(self) -> float | None:
        """mu for which the whole run is mu-Gaussian-DP; see `mu_after`."""
        return self.mu_after(self.rounds)

    @property
    def zcdp_rho(self) -> float | None:
        """rho = mu^2 / 2 for which the run is rho-zCDP (Bun, Steinke 2016); None if there is no exact mu."""
        mu = self.gaussian_dp_mu
        return None if mu is None else 0.5 * mu * mu

    def epsilons(self, deltas: Iterable[float] = DELTAS) -> dict[float, float]:
        """Return an epsilon for each of `deltas` and the plan's own delta, from the largest delta to the smallest.

        All of them hold at once. Epsilon never falls as delta falls; at the plan's delta it is the plan's epsilon.
        """
        found: dict[float, float] = {}
        least = math.inf
        for delta in sorted({*deltas, self.delta}):
            at_delta = replace(self, delta=delta).epsilon
            least = min(least, max(at_delta, self.epsilon) if delta <= self.delta else at_delta)
            found[delta] = least
        return dict(reversed(found.items()))

    def under_replace(self) -> "PrivacyPlan":
        """Return the same mechanism as a plan for `replace`: the same noise over twice the sensitivity."""
        if self.adjacency == "replace":
            return self
        return replace(self, adjacency="replace", noise_multiplier=self.noise_multiplier / REPLACE_FACTOR)

    def promises(self, *, thorough: bool = True) -> list[dict[str, Any]]:
        """Return all that the mechanism promises, the plan's own promise first; an infinite epsilon is None.

        Args:
            thorough: Include promises that need an accountant for sampled rounds, which takes up to seconds.
        """
        plans: list[PrivacyPlan] = [self]
        if self.adjacency != "replace" and (thorough or not self._credits_sampling):
            plans.append(self.under_replace())
        return [plan._promise() for plan in plans]

    def as_dict(self, *, thorough: bool = False) -> dict[str, Any]:
        """Return the plan and what follows from it, ready for JSON; an infinite epsilon is None.

        Args:
            thorough: If the plan credits sampling, report epsilon at `DELTAS` and under `replace` too, which takes up
                to seconds. Other plans always report them.
        """
        epsilons = self.epsilons(DELTAS if thorough or not self._credits_sampling else ())
        return {
            "private": self.private,
            "epsilon": _finite(self.epsilon),
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "noise_stddev": self.noise_stddev,
            "release_grid": self.release_grid,
            "epsilon_of_sampling": 0.0,
            "delta_of_sampling": 0.0,
            "l2_bound": self.l2_bound,
            "l2_sensitivity": self.l2_sensitivity,
            "unit": self.unit,
            "trust": self.trust,
            "adversary": self.adversary,
            "adjacency": self.adjacency,
            "sampling": self.sampling.as_dict(),
            "rounds": self.rounds,
            "accountant": self.accountant,
            "amplification": self.amplification,
            "client_memory": self.client_memory,
            "promises": self.promises(thorough=thorough),
            "gaussian_dp_mu": _finite(self.gaussian_dp_mu),
            "zcdp_rho": _finite(self.zcdp_rho),
            "epsilons": {repr(delta): _finite(epsilon) for delta, epsilon in epsilons.items()},
        }

    @property
    def _credits_sampling(self) -> bool:
        """Whether the accountant may credit sampling: only then does epsilon not follow from one exact mu."""
        return self.trust_rules.hides_cohorts and self.sampling.amplifies(client_memory=self.client_memory)

    def _promise(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "adversary": self.adversary,
            "adjacency": self.adjacency,
            "epsilon": _finite(self.epsilon),
            "delta": self.delta,
            "accountant": self.accountant,
        }

    def _bound(self, rounds: int, sampling: Sampling | None = None) -> "Bound":
        releases = self.releases if sampling is None else replace(self.releases, sampling=sampling)
        return releases.bound(self.noise_multiplier, rounds, max(self.rounds, rounds))


def make_plan(
    *,
    trust: str,
    adjacency: str | None = None,
    sampling: Sampling,
    rounds: int,
    delta: float,
    l2_bound: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    client_memory: bool = True,
    unit: str = "client",
) -> PrivacyPlan:
    """A plan from a target epsilon or from a noise multiplier.

    Args:
        trust: See `PrivacyPlan`.
        adjacency: See `PrivacyPlan`; None is `replace` where trust is local or a timeline says who counts
            (`Scheduled`), and else `add-or-remove`.
        sampling: See `PrivacyPlan`.
        rounds: See `PrivacyPlan`.
        delta: See `PrivacyPlan`.
        l2_bound: See `PrivacyPlan`.
        epsilon: Target after all rounds, finite and above 0; met within 1 % and never exceeded.
        noise_multiplier: See `PrivacyPlan`; exactly one of it and `epsilon`.
        client_memory: See `PrivacyPlan`; True is always safe.
        unit: See `PrivacyPlan`.

    Raises:
        UserError: On anything that is not a valid plan, or is not offered yet.
    """
    if (epsilon is None) == (noise_multiplier is None):
        got = "neither" if epsilon is None else "both"
        remedy = "The one follows from the other: set what you must promise, or what you can afford"
        raise UserError("[privacy]", "exactly one of epsilon and noise_multiplier", got, remedy)
    plan = PrivacyPlan(
        trust=trust,
        adjacency=adjacency or _default_adjacency(trust_of(trust), sampling),
        sampling=sampling,
        rounds=rounds,
        delta=delta,
        l2_bound=l2_bound,
        noise_multiplier=0.0 if noise_multiplier is None else noise_multiplier,
        client_memory=client_memory,
        unit=unit,
    )
    if noise_multiplier is not None:
        return plan
    return replace(plan, noise_multiplier=plan.releases.calibrate(_check_epsilon(epsilon), rounds))


def _check_names(trust: str, adjacency: str, unit: str) -> None:
    unit_of(unit)
    trust_of(trust)
    if adjacency not in ADJACENCIES:
        raise UserError("privacy.adjacency", "a known name", repr(adjacency), nearest(str(adjacency), ADJACENCIES))


def _default_adjacency(trust: Trust, sampling: Sampling) -> str:
    """The trust's, where the sampling can be accounted under it."""
    default = trust.default_adjacency
    return default if default in sampling.adjacencies else sampling.adjacencies[0]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _check_numbers(rounds: int, delta: float, l2_bound: float) -> None:
    if not is_whole(rounds, 0, MAX_ROUNDS):
        expected = f"a whole number from 0 to {MAX_ROUNDS:,}"
        raise UserError("training.rounds", expected, rounds, "Give the number of rounds")
    if not (is_real(delta, 1e-100) and delta < 1.0):
        raise UserError("privacy.delta", "a number from 1e-100, below 1", delta, "Well below 1 / clients is usual")
    if not (is_real(l2_bound) and l2_bound > 0.0):
        raise ValueError(f"a method's bound is positive and finite, not {l2_bound}")


def _check_epsilon(epsilon: float | None) -> float:
    if epsilon is None or not is_real(epsilon, MIN_EPSILON):
        expected = f"a finite number above 0 (from {MIN_EPSILON:g})"
        raise UserError("privacy.epsilon", expected, epsilon, "Remove [privacy] for a run without")
    return float(epsilon)
