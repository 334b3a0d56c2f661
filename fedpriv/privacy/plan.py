"""The privacy plan: one frozen object that converts a guarantee into noise, and noise into the reported guarantee.

No other code combines a bound, a noise multiplier and an epsilon.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from fedpriv.checks import an_object, is_real, is_whole, plain_numbers, shown, true_or_false
from fedpriv.errors import UserError
from fedpriv.mechanisms.gaussian import release_grid
from fedpriv.mechanisms.noise import Gaussian
from fedpriv.mechanisms.shares import HALF_MODULUS
from fedpriv.privacy.aggregation import Aggregation, SumGrid
from fedpriv.privacy.correlation import NoiseMatrix
from fedpriv.privacy.gaussian import MAX_NOISE, gaussian_epsilon
from fedpriv.privacy.sampling import Everyone, Sampling
from fedpriv.privacy.trust import HiddenAggregator, Shares, Trust, TrustName, trust_of
from fedpriv.privacy.unit import ADJACENCIES, Adjacency, UnitName, adjacency_of, unit_of

# The accountant is slow to import, and neither clients nor `--help` need an epsilon: see the late import.
if TYPE_CHECKING:
    from fedpriv.privacy.accounting import Bound, Releases
    from fedpriv.privacy.records import RecordBound, RecordReleases

__all__ = ["ADJACENCIES", "DELTAS", "NOT_PROMISED", "REPLACE_FACTOR", "PrivacyPlan", "correlated", "make_plan"]

# Replacing a message moves a sum by at most the diameter of the ball that contains it.
REPLACE_FACTOR = 2.0

MAX_ROUNDS = 10**12

MIN_EPSILON = 1e-6
"""Below this, delta dominates the guarantee."""

DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-10, 1e-12)
"""The deltas at which an epsilon is reported, besides the plan's delta."""

NOT_PROMISED: dict[str, Any] = {"promises": [], "gaussian_dp_mu": None, "zcdp_rho": None, "epsilons": {}}
"""The entries of `PrivacyPlan.as_dict` that list guarantees, for a run without any."""


class Composed(NamedTuple):
    """A guarantee of a run and the analyses before it, taken together: epsilon, delta and how they were composed."""

    epsilon: float
    delta: float
    composition: str


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """A run's privacy guarantee, and the noise that provides it.

    Args:
        trust: central: the server adds the noise to the sum, and only models are released. local: each client adds
            noise to its message, and the server sees every message. aggregator: each client adds a share of the noise,
            and the server sees only the sum.
        adjacency: add-or-remove: a client's message is present or zero. replace: it is any other bounded message.
        sampling: The sampling of clients; draws the cohorts and is accounted for.
        rounds: Number of rounds, from 0.
        delta: In (0, 1).
        l2_bound: Bound B on the l2 norm of one message.
        noise_multiplier: Standard deviation of the noise over `l2_sensitivity`; 0 guarantees nothing.
        client_memory: True if clients keep a state from round to round; see `accounting.Releases`.
        unit: The unit of protection: `client`, or `example` for a single record of a client.
        record: How far one record moves the releases; None unless `unit` is `example`.
        aggregation: The numbers of secure aggregation; None unless `trust` is `aggregator`.
        noise: The matrix of noise that is correlated over rounds; None for independent rounds. Its fresh noise then has
            the deviation `noise_stddev`.
        filtered: True if a controller chooses the noise of each round, within the budget of `rounds` rounds with
            `noise_multiplier` (`fedpriv.mechanisms.filtered`). Sampling is then not credited.

    Formal guarantee: let every message have norm at most `l2_bound`, and let noise of `noise_stddev` per coordinate be
    added to the sum (trust central), to every message (trust local), or to the sum in shares (trust aggregator, see
    `fedpriv.privacy.aggregation`). Then the adversary's view of all rounds is
    (`epsilon`, `delta`)-differentially private under `adjacency`, for any state that clients and server keep.
    """

    trust: TrustName
    adjacency: Adjacency
    sampling: Sampling
    rounds: int
    delta: float
    l2_bound: float
    noise_multiplier: float
    client_memory: bool = True
    unit: UnitName = "client"
    record: "RecordBound | None" = None
    aggregation: Aggregation | None = None
    noise: NoiseMatrix | None = None
    filtered: bool = False

    def __post_init__(self) -> None:
        plain_numbers(self)
        _check_names(self.trust, self.adjacency, self.unit)
        self._check_kinds()
        self._check_aggregation()
        self._check_turns()
        self._check_filter()
        if (self.unit == "example") != (self.record is not None):
            got, remedy = f"{self.unit!r} and {shown(self.record)}", "Set unit to example with a record bound"
            raise UserError("unit", "example with a record bound, or client without", got, remedy)
        if self.record is None:
            self.sampling.check_neighbors(self.adjacency)
        else:
            self.record.check_rounds(self.rounds)
            self.record.check_neighbors(self.adjacency, self.sampling)
        _check_numbers(self.rounds, self.delta, self.l2_bound)
        if not is_real(self.noise_multiplier, 0.0, MAX_NOISE):
            expected = f"a number from 0 to {MAX_NOISE:g}"
            raise UserError("privacy.noise_multiplier", expected, self.noise_multiplier, "Set it or privacy.epsilon")
        if self.aggregation is not None and (sums := self.sums) is not None:
            self.aggregation.check(sums, self.rounds)

    @property
    def trust_rules(self) -> Trust:
        """The rules that follow from `trust`, and from whether everyone answers under secure aggregation."""
        hidden = self.aggregation is not None and self.aggregation.everyone_answers
        return HiddenAggregator() if hidden else trust_of(self.trust)

    @property
    def releases(self) -> "Releases | RecordReleases":
        """The plan's releases, for the accountant."""
        if self.record is not None:
            from fedpriv.privacy.records import RecordReleases

            return RecordReleases(
                trust=self.trust_rules,
                adjacency=self.adjacency,
                sampling=self.sampling,
                delta=self.delta,
                record=self.record,
                rounds=self.rounds,
                client_memory=self.client_memory,
            )
        from fedpriv.privacy.accounting import Releases

        return Releases(
            trust=self.trust_rules,
            adjacency=self.adjacency,
            sampling=Everyone(self.sampling.population) if self.filtered else self.sampling,
            delta=self.delta,
            client_memory=self.client_memory,
            noise=self.noise,
        )

    @property
    def l2_sensitivity(self) -> float:
        """Maximum change of a sum of messages due to one client: B for add-or-remove, 2 B for replace.

        Under secure aggregation, B is the bound of a rounded message. For the unit `example`, it may be that of all
        rounds, or of a local step: see `RecordBound.sensitivity`.
        """
        if self.record is not None:
            return self.record.sensitivity(self.adjacency, max(self.rounds, 1))
        return (self.l2_bound if self.sums is None else self.sums.l2_bound) * self._factor

    @property
    def sums(self) -> SumGrid | None:
        """The grid of the sums under secure aggregation; otherwise None."""
        if self.aggregation is None:
            return None
        return self.aggregation.grid(self.l2_bound, self.noise_multiplier * self._factor)

    @property
    def shares(self) -> Shares:
        """Standard deviations of the noise that the server and each client add."""
        if self.sums is not None:
            return Shares(server=0.0, client=self.sums.share_stddev)
        return self.trust_rules.split(self.message_stddev, self.sampling.expected_size)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation per coordinate: on the sum (trust central or aggregator), a message (local) or a step."""
        return self.noise_multiplier * self.l2_sensitivity

    @property
    def message_stddev(self) -> float:
        """Standard deviation of the noise on the sum, or on each message; 0 if local steps have the noise."""
        return 0.0 if self.record is not None and self.record.route == "steps" else self.noise_stddev

    @property
    def release_grid(self) -> float | None:
        """G: all releases are multiples of it (`fedpriv.mechanisms.noise`); None without noise, or if it changes.

        The noise is sampled exactly, so the sampler adds nothing to epsilon or delta.
        """
        if self.sums is not None:
            return self.sums.step
        if self.filtered:
            return None
        return release_grid(self.noise_stddev) if self.noise_stddev > 0.0 else None

    @property
    def epsilon(self) -> float:
        """Epsilon after all rounds; infinite without noise."""
        return self.epsilon_after(self.rounds)

    @property
    def accountant(self) -> str:
        """Name of the accountant that proved `epsilon`."""
        return self._bound(self.rounds).accountant

    @property
    def amplification(self) -> bool:
        """True if `epsilon` relies on the sampling of clients."""
        return self._bound(self.rounds).amplified

    @property
    def adversary(self) -> str:
        """The adversary that the guarantee holds against; one clause."""
        return self.trust_rules.adversary

    @property
    def private(self) -> bool:
        """True if the plan guarantees anything: there is enough noise for a finite epsilon."""
        return self.noise_multiplier > 0.0 and math.isfinite(self.epsilon)

    def epsilon_after(self, rounds: int) -> float:
        """Return the epsilon spent in the first `rounds` rounds.

        With central trust, every client has spent it; with local trust, a client that took part in all rounds has. If
        a timeline decides who counts, it is the epsilon of the client that has spent the most so far; with local
        trust, that is the client that has sent the most messages. Messages in transit count when they arrive, and at
        the end of the last round. With a filter, the whole budget may be spent in any round, and is charged in the
        first.
        """
        _check_numbers(rounds, self.delta, self.l2_bound)
        return self._bound(rounds).epsilon

    def epsilon_of_share(self, share: float) -> float:
        """Return the epsilon of a share of the budget, from 0 to 1; with a filter.

        It says what a run has used so far. The promise is the whole budget, because releases decide what is used.
        """
        if share == 0.0:
            return 0.0
        return self.releases.bound(self.noise_multiplier / math.sqrt(share), self.rounds).epsilon

    def epsilon_of_participations(self, count: int) -> float:
        """Return the epsilon spent by a client that sent `count` messages; for local trust.

        Raises:
            ValueError: If trust is central: secret participation is then part of the protection.
        """
        if not self.trust_rules.charges_participations:
            raise ValueError("a client is charged for its own participations only if trust is local")
        return self._bound(count, Everyone(self.sampling.population)).epsilon

    def mu_after(self, rounds: int) -> float | None:
        """Return mu for which the first `rounds` rounds are mu-Gaussian-DP (Dong, Roth, Su 2022), or None.

        Unsampled Gaussian rounds compose to exactly one Gaussian mechanism; mu is its sensitivity over its standard
        deviation. It is infinite without noise. If the plan credits sampling, no mu is exact, and None is returned.
        """
        _check_numbers(rounds, self.delta, self.l2_bound)
        if self._credits_sampling:
            return None
        releases = self.releases.charged(self._charged(rounds))
        return Gaussian(self.noise_multiplier).event(moved=1.0, rounds=releases)

    @property
    def gaussian_dp_mu(self) -> float | None:
        """`mu` for which the whole run is mu-Gaussian-DP; see `mu_after`."""
        return self.mu_after(self.rounds)

    @property
    def zcdp_rho(self) -> float | None:
        """`rho` = mu^2 / 2 for which the run is rho-zCDP (Bun, Steinke 2016); None if there is no exact mu."""
        mu = self.gaussian_dp_mu
        return None if mu is None else 0.5 * mu * mu

    def epsilons(self, deltas: Iterable[float] = DELTAS) -> dict[float, float]:
        """Return an epsilon for each of `deltas` and the plan's own delta, from the largest delta to the smallest.

        All of them hold together. Epsilon never decreases as delta decreases; at the plan's delta it is the plan's.
        """
        found: dict[float, float] = {}
        least = math.inf
        for delta in sorted({*deltas, self.delta}):
            at_delta = replace(self, delta=delta).epsilon
            least = min(least, max(at_delta, self.epsilon) if delta <= self.delta else at_delta)
            found[delta] = least
        return dict(reversed(found.items()))

    def with_analyses(self, mu: float) -> "Composed":
        """Return the guarantee of all rounds together with analyses before them; see `Composed`.

        Args:
            mu: The analyses are together one Gaussian mechanism with this mu, under the plan's adjacency.
        """
        from fedpriv.privacy.accounting import Releases

        own = self.gaussian_dp_mu
        if own is not None:
            return Composed(gaussian_epsilon(math.hypot(own, mu), self.delta), self.delta, "exact, as one Gaussian")
        if isinstance(self.releases, Releases):
            found = self.releases.epsilon_after(mu, self.noise_multiplier, self._charged(self.rounds))
            return Composed(found, self.delta, "privacy losses of the rounds and of one Gaussian, added up")
        half = replace(self, delta=self.delta / 2.0)
        basic = half.epsilon + gaussian_epsilon(mu, half.delta)
        return Composed(basic, self.delta, "basic composition, half of delta each")

    def under_replace(self) -> "PrivacyPlan":
        """Return the same mechanism as a plan for `replace`: the same noise over twice the sensitivity."""
        if self.adjacency == "replace":
            return self
        found = replace(self, adjacency="replace", noise_multiplier=self.noise_multiplier / REPLACE_FACTOR)
        if self.record is None:
            return found
        return replace(found, noise_multiplier=self.noise_stddev / found.l2_sensitivity)

    def of_clients(self) -> "PrivacyPlan | None":
        """Return the promise of the same noise to whole clients; None if messages have no noise.

        For the unit `client`, it is the plan itself. Otherwise it is a plan with the default adjacency of the trust.
        """
        if self.record is None:
            return self
        if self.message_stddev == 0.0:
            return None
        adjacency = _default_adjacency(self.trust_rules, self.sampling)
        found = replace(self, unit="client", record=None, adjacency=adjacency)
        return replace(found, noise_multiplier=self.noise_stddev / found.l2_sensitivity)

    def promises(self, *, thorough: bool = True) -> list[dict[str, Any]]:
        """Return all guarantees of the mechanism, the plan's first; an infinite epsilon is None.

        Args:
            thorough: Include guarantees that need the accountant for sampled rounds, which may take seconds.
        """
        plans: list[PrivacyPlan] = [self]
        if self.adjacency != "replace" and (thorough or not self._credits_sampling):
            plans.append(self.under_replace())
        whole = None if self.record is None else self.of_clients()
        if whole is not None and (thorough or not whole._credits_sampling) and whole.private:
            plans.append(whole)
        return [plan._promise() for plan in plans]

    def as_dict(self, *, thorough: bool = False) -> dict[str, Any]:
        """Return the plan and its guarantees, ready for JSON; an infinite epsilon is None.

        Args:
            thorough: If the plan credits sampling, also report epsilon at `DELTAS` and under `replace`, which may take
                seconds. Other plans always report them.
        """
        epsilons = self.epsilons(DELTAS if thorough or not self._credits_sampling else ())
        return {
            "private": self.private,
            "epsilon": _finite(self.epsilon),
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "noise_stddev": self.noise_stddev,
            "release_grid": self.release_grid,
            "epsilon_of_sampling": self._closeness,
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
            **({} if self.record is None else {"record": self.record.as_dict()}),
            **self._of_aggregation(),
            **({} if self.noise is None else {"noise": self.noise.as_dict()}),
            **({"filtered": True} if self.filtered else {}),
            "promises": self.promises(thorough=thorough),
            "gaussian_dp_mu": _finite(self.gaussian_dp_mu),
            "zcdp_rho": _finite(self.zcdp_rho),
            "epsilons": {repr(delta): _finite(epsilon) for delta, epsilon in epsilons.items()},
        }

    @property
    def _credits_sampling(self) -> bool:
        """True if the accountant may credit sampling. Otherwise epsilon follows from one exact mu."""
        return self.releases.credits_sampling

    def adversaries(self) -> list[dict[str, Any]]:
        """Return the epsilon against each adversary of secure aggregation; an infinite one is None.

        `sums`: sees the noised sums. `colluders`: also has c of the clients, or their noise is missing; the plan's
        epsilon. `all-helpers`: has the server and all helpers, or t - 1 of the clients; only the client's own share
        protects it, and neighbors differ by `replace`. Empty for other trusts.
        """
        if self.aggregation is None or self.sums is None:
            return []
        terms = self.aggregation
        more = math.sqrt(terms.least_survivors / terms.honest)
        alone = self.against_all_helpers().epsilon
        seen = self.releases.bound(self.noise_multiplier * more, self.rounds).epsilon
        return [
            self._against("sums", seen, self.adjacency, self.noise_stddev * more),
            {
                **self._against("colluders", self.epsilon, self.adjacency, self.noise_stddev),
                "colluders": terms.colluders,
            },
            self._against("all-helpers", alone, "replace", self.sums.share_stddev),
        ]

    def against_all_helpers(self) -> "PrivacyPlan":
        """Return the promise of secure aggregation against the server together with all helpers.

        They see each client's message with its own share of the noise, as a server sees messages under local trust.

        Raises:
            ValueError: If messages are not aggregated securely.
        """
        if self.sums is None:
            raise ValueError(f"no secure aggregation with trust {self.trust}")
        bound, share = self.sums.l2_bound, self.sums.share_stddev
        alone = {"trust": "local", "adjacency": "replace", "aggregation": None, "l2_bound": bound}
        return replace(self, **alone, noise_multiplier=share / (REPLACE_FACTOR * bound))

    def _against(self, name: str, epsilon: float, adjacency: str, stddev: float) -> dict[str, Any]:
        facts = {"name": name, "epsilon": _finite(epsilon), "delta": self.delta}
        return {**facts, "adjacency": adjacency, "noise_stddev": stddev}

    def _of_aggregation(self) -> dict[str, Any]:
        """Return the entries of `as_dict` on secure aggregation."""
        if self.aggregation is None or self.sums is None:
            return {}
        own = {"share_stddev": self.sums.share_stddev, "rounded_l2_bound": self.sums.l2_bound}
        own |= {"sum_limit": self.sums.limit, "modulus": 2 * HALF_MODULUS}
        return {**own, "aggregation": self.aggregation.as_dict(), "adversaries": self.adversaries()}

    @property
    def _closeness(self) -> float:
        if self.aggregation is None or self.sums is None or self.sums.share_stddev == 0.0:
            return 0.0
        return self.aggregation.closeness(self.sums, self.rounds)

    @property
    def _factor(self) -> float:
        return REPLACE_FACTOR if self.adjacency == "replace" else 1.0

    def _check_kinds(self) -> None:
        """Raise UserError for a part of another kind, such as a name in place of an object."""
        an_object("sampling", self.sampling, "adjacencies", _EXAMPLE_OF_SAMPLING)
        for name, member, example in (
            ("record", "check_rounds", "fedpriv.privacy.RecordBound(...)"),
            ("aggregation", "least_survivors", "fedpriv.privacy.Aggregation(...)"),
            ("noise", "check", "fedpriv.privacy.correlation.NoiseMatrix(...)"),
        ):
            if getattr(self, name) is not None:
                an_object(name, getattr(self, name), member, example)
        true_or_false("client_memory", self.client_memory)  # another value could count as False, which claims more
        true_or_false("filtered", self.filtered)

    def _check_aggregation(self) -> None:
        secure = trust_of(self.trust).secure_sums
        if secure and self.aggregation is None:
            remedy = 'Use `fedpriv run`, in process or with --deploy, or set it to "local" or "central"'
            raise UserError("privacy.trust", "a trust that is offered here", f'"{self.trust}"', remedy)
        if self.aggregation is not None and not secure:
            remedy = 'Remove [aggregation], or set privacy.trust = "aggregator"'
            raise UserError("[aggregation]", f'no such table with privacy.trust = "{self.trust}"', "a table", remedy)
        if self.aggregation is None:
            return
        if self.record is not None:
            remedy = 'Set privacy.unit = "client", or privacy.trust to local or central'
            expected = '"client" with secure aggregation: rounding to its grid could hide or reveal single records'
            raise UserError("privacy.unit", expected, f'"{self.unit}"', remedy)
        if self.aggregation.everyone_answers and not self.sampling.by_coins:
            remedy = "Choose Poisson, or set everyone_answers to False"
            raise UserError("sampling", "clients sampled by coins, as all of them answer", self.sampling.name, remedy)
        if not self.sampling.draws_cohorts:
            remedy = "Remove [schedule]: weights would change integers, and no round could be declared void"
            raise UserError("[schedule]", "no such table with secure aggregation", "a schedule", remedy)

    def _check_turns(self) -> None:
        """Raise UserError if correlated noise, or clients that take turns, do not fit the plan."""
        apart = self.sampling.separation > 1
        if self.noise is None and not apart:
            return
        key, got = ("[noise]", "a table") if self.noise is not None else ("cohort.sampling", f'"{self.sampling.name}"')
        trust = trust_of(self.trust)
        if not trust.trusts_server and not (self.noise is None and trust.shows_messages):
            remedy = 'Set privacy.trust = "central", or remove the table or the sampling'
            expected = f'no such value with privacy.trust = "{self.trust}"'
            if self.noise is not None:
                expected += ": the noise of one round would have to return in the next, and clients change"
            raise UserError(key, expected, got, remedy)
        if self.unit == "example":
            remedy = 'Set privacy.unit = "client", or remove the table or the sampling'
            raise UserError(key, 'no such value with privacy.unit = "example", for now', got, remedy)
        if self.noise is not None:
            self.noise.check(self.sampling)
            if self.rounds > self.noise.rounds:
                expected = f"at most {self.noise.rounds}, for which the noise is accounted"
                raise UserError("training.rounds", expected, self.rounds, "Make a plan for all rounds")

    def _check_filter(self) -> None:
        offered = self.trust_rules.trusts_server and self.record is None and self.sampling.draws_cohorts
        offered = offered and self.noise is None and self.sampling.separation == 1
        if self.filtered and not offered:
            got = f"trust {self.trust}, unit {self.unit}, sampling {self.sampling.name}"
            expected = "trust central, unit client and independent noise"
            raise UserError("filtered", expected, got, "Set filtered to False")

    def _charged(self, rounds: int) -> int:
        return self.rounds if self.filtered and rounds > 0 else rounds

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
        return releases.bound(self.noise_multiplier, self._charged(rounds), max(self.rounds, rounds))

    def under_filter(self, epsilon: float | None) -> "PrivacyPlan":
        """Return the plan of a run with a controller. Its budget is this plan's noise in each of the rounds.

        Args:
            epsilon: The budget, to which the noise is calibrated; None keeps the noise multiplier.

        Raises:
            UserError: If no filter is offered for such a plan, or there is no noise.
        """
        found = replace(self, filtered=True)
        if epsilon is not None:
            found = replace(found, noise_multiplier=found.releases.calibrate(_check_epsilon(epsilon), self.rounds))
        if found.noise_multiplier == 0.0:
            remedy = "Set privacy.epsilon, the budget, or remove [controller]"
            raise UserError("privacy.noise_multiplier", "above 0 with [controller]", 0.0, remedy)
        return found


def correlated(plan: PrivacyPlan, noise: NoiseMatrix, epsilon: float | None) -> PrivacyPlan:
    """Return a plan with correlated noise, calibrated to `epsilon`; None keeps the noise multiplier.

    Raises:
        UserError: If the noise does not suit the plan, or epsilon is out of range.
    """
    found = replace(plan, noise=noise)
    if epsilon is None:
        return found
    return replace(found, noise_multiplier=found.releases.calibrate(_check_epsilon(epsilon), plan.rounds))


def make_plan(
    *,
    trust: TrustName | Aggregation,
    adjacency: Adjacency | None = None,
    sampling: Sampling,
    rounds: int,
    delta: float,
    l2_bound: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    client_memory: bool = True,
    record: "RecordBound | None" = None,
) -> PrivacyPlan:
    """Return a plan for a target epsilon or a noise multiplier.

    Args:
        trust: See `PrivacyPlan`; the trust is `aggregator` if its numbers are given.
        adjacency: See `PrivacyPlan`; None stands for `replace` if trust is local or aggregator, if the unit is
            `example` or if a timeline decides who counts (`Scheduled`), and otherwise for `add-or-remove`.
        sampling: See `PrivacyPlan`.
        rounds: See `PrivacyPlan`.
        delta: See `PrivacyPlan`.
        l2_bound: See `PrivacyPlan`.
        epsilon: Target after all rounds, finite and above 0; met within 1 % and never exceeded.
        noise_multiplier: See `PrivacyPlan`; set exactly one of `noise_multiplier` and `epsilon`.
        client_memory: See `PrivacyPlan`; True is always safe.
        record: See `PrivacyPlan`; the unit is `example` if it is given.

    Raises:
        UserError: If the plan is not valid, or uses an option that is not offered yet.
    """
    if (epsilon is None) == (noise_multiplier is None):
        got = "a table without them" if epsilon is None else "both"
        remedy = "Set epsilon for a fixed guarantee, or noise_multiplier for a fixed noise; the other follows"
        raise UserError("[privacy]", "exactly one of epsilon and noise_multiplier", got, remedy)
    an_object("sampling", sampling, "adjacencies", _EXAMPLE_OF_SAMPLING)
    aggregation = trust if isinstance(trust, Aggregation) else None
    name: TrustName = "aggregator" if isinstance(trust, Aggregation) else trust
    given = adjacency
    if given is None:
        given = "replace" if record is not None else _default_adjacency(trust_of(name), sampling)
    plan = PrivacyPlan(
        trust=name,
        adjacency=given,
        sampling=sampling,
        rounds=rounds,
        delta=delta,
        l2_bound=l2_bound,
        noise_multiplier=0.0 if noise_multiplier is None else noise_multiplier,
        client_memory=client_memory,
        unit="client" if record is None else "example",
        record=record,
        aggregation=aggregation,
    )
    if noise_multiplier is not None:
        return plan
    return replace(plan, noise_multiplier=plan.releases.calibrate(_check_epsilon(epsilon), rounds))


_EXAMPLE_OF_SAMPLING = "fedpriv.privacy.Everyone(population=100)"


def _check_names(trust: str, adjacency: str, unit: str) -> None:
    unit_of(unit)
    trust_of(trust)
    adjacency_of(adjacency)


def _default_adjacency(trust: Trust, sampling: Sampling) -> Adjacency:
    """Return the trust's default if the sampling can be accounted under it, otherwise the sampling's first."""
    default = trust.default_adjacency
    return default if default in sampling.adjacencies else sampling.adjacencies[0]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _check_numbers(rounds: int, delta: float, l2_bound: float) -> None:
    if not is_whole(rounds, 0, MAX_ROUNDS):
        expected = f"a whole number from 0 to {MAX_ROUNDS:,}"
        raise UserError("training.rounds", expected, rounds, "Set the number of rounds")
    if not (is_real(delta, 1e-100) and delta < 1.0):
        raise UserError("privacy.delta", "a number from 1e-100, below 1", repr(delta), "Set it well below 1 / clients")
    if not (is_real(l2_bound) and l2_bound > 0.0):
        remedy = "Correct the bound of the method's messages"
        raise UserError("l2_bound", "a finite number above 0", shown(l2_bound), remedy)


def _check_epsilon(epsilon: float | None) -> float:
    if epsilon is None or not is_real(epsilon, MIN_EPSILON):
        expected = f"a finite number above 0 (from {MIN_EPSILON:g})"
        remedy = "For a non-private run, remove the [privacy] table"
        raise UserError("privacy.epsilon", expected, repr(epsilon), remedy)
    return float(epsilon)
