"""Epsilon compared with closed forms, numerical integrals and attacks that are independent of the accountant."""

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import dp_accounting as dpa
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from support.helpers import brief

from fedpriv.errors import UserError
from fedpriv.privacy import Everyone, FixedSize, Poisson, Sampling, trust_of
from fedpriv.privacy.accounting import Releases

CLIENTS, DELTA = 1000, 1e-5
TRUSTS, ADJACENCIES = ("central", "local"), ("add-or-remove", "replace")
SAMPLINGS: dict[str, Sampling] = {
    "everyone": Everyone(CLIENTS),
    "poisson": Poisson(CLIENTS, 0.05),
    "fixed": FixedSize(CLIENTS, 50),
}
COMBINATIONS = list(itertools.product(TRUSTS, ADJACENCIES, SAMPLINGS))
UNSAMPLED = [
    (trust, adjacency, name) for trust, adjacency, name in COMBINATIONS if name == "everyone" or trust == "local"
]
GRID = 1e-3
few = settings(brief, max_examples=12)


def releases(*, trust: str = "central", **plan: Any) -> Releases:
    """Return releases of clients without memory, by default central, add-or-remove and everyone; `plan` overrides."""
    known = {"adjacency": "add-or-remove", "sampling": Everyone(CLIENTS), "delta": DELTA, "client_memory": False}
    return Releases(**{**known, "trust": trust_of(trust), **plan})


def spent(noise: float, rounds: int = 1, **plan: Any) -> float:
    """Return the epsilon of `releases`."""
    return releases(**plan).epsilon(noise, rounds)


def exact_delta(epsilon: float, shift: float) -> float:
    """Return delta by Balle & Wang 2018, Theorem 8, for std 1 and sensitivity `shift`."""
    low, high = stats.norm.logcdf([shift / 2 - epsilon / shift, -shift / 2 - epsilon / shift])
    return math.exp(low) - math.exp(min(epsilon + high, low))


def root(function: Callable[[float], float], most: float) -> float:
    """Return the root of a falling function."""
    return cast(float, optimize.brentq(function, 0.0, most, xtol=1e-12))


def exact_epsilon(shift: float, delta: float = DELTA) -> float:
    return root(lambda epsilon: exact_delta(epsilon, shift) - delta, shift**2 + 40.0 * shift)


def mixture_epsilon(prob: float, noise: float, shifts: tuple[float, float], delta: float = DELTA) -> float:
    """Return the exact epsilon of one round that shows the client with probability `prob`, with one of two shifts.

    Integrates the hockey-stick divergence numerically, in both directions.
    """
    grid = np.linspace(-3.0 - 12.0 * noise, 3.0 + 12.0 * noise, 400_001)
    weight = grid[1] - grid[0]
    first, second = (
        (1 - prob) * stats.norm.pdf(grid, 0.0, noise) + prob * stats.norm.pdf(grid, shift, noise) for shift in shifts
    )

    def excess(epsilon: float) -> float:
        both = ((a - math.exp(epsilon) * b).clip(0.0).sum() * weight for a, b in ((first, second), (second, first)))
        return max(both) - delta

    return root(excess, 50.0)


@pytest.mark.parametrize(("trust", "adjacency", "name"), UNSAMPLED)
@pytest.mark.parametrize(("noise", "rounds"), [(100.0, 1), (4.0, 1), (1.0, 1), (6.0, 100), (0.5, 20), (3.0, 10_000)])
def test_without_amplification_epsilon_is_that_of_one_gaussian_and_never_below(
    trust: str, adjacency: str, name: str, noise: float, rounds: int
) -> None:
    exact = exact_epsilon(math.sqrt(rounds) / noise)
    found = spent(noise, rounds, trust=trust, adjacency=adjacency, sampling=SAMPLINGS[name])
    assert exact * (1.0 - 1e-12) <= found <= (1.0 + 1e-8) * exact


@pytest.mark.parametrize("delta", [1e-15, 1e-9, 1e-3, 0.1])
@pytest.mark.parametrize("shift", [1e-2, 0.3, 3.0, 33.9, 34.1, 34.3, 34.6, 500.0])
def test_the_closed_form_is_met_for_every_delta_and_beyond_the_range_of_exp(shift: float, delta: float) -> None:
    if exact_delta(0.0, shift) <= delta:
        assert spent(1.0 / shift, delta=delta) == 0.0
    else:
        exact = exact_epsilon(shift, delta)
        assert exact * (1.0 - 1e-9) <= spent(1.0 / shift, delta=delta) <= (1.0 + 1e-7) * exact


def test_the_popular_noise_scale_is_not_private_enough() -> None:
    """sigma = Delta sqrt(K log(1 / delta)) / epsilon, nominally (8, 1e-5), is really 12.3, and 30.5 if replaced."""
    rounds = 1000
    popular = math.sqrt(rounds * math.log(1.0 / DELTA)) / 8.0
    assert spent(popular, rounds) == pytest.approx(12.3, abs=0.05)
    assert spent(popular / 2.0, rounds, adjacency="replace") == pytest.approx(30.5, abs=0.05)
    assert spent(0.600 * math.sqrt(rounds), rounds) == pytest.approx(8.0, rel=0.01)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("name", ["poisson", "fixed"])
def test_a_sampling_event_states_the_noise_in_the_units_of_its_relation(adjacency: str, name: str) -> None:
    """Poisson events expect std / B under either relation, events without replacement std / (2 B)."""
    stddev, bound = 1.7, 1.0
    sensitivity = 2.0 * bound if adjacency == "replace" else bound
    event, relation = releases(adjacency=adjacency, sampling=SAMPLINGS[name]).event(stddev / sensitivity)
    assert isinstance(event, dpa.PoissonSampledDpEvent | dpa.SampledWithoutReplacementDpEvent)
    assert isinstance(event.event, dpa.GaussianDpEvent)
    assert event.event.noise_multiplier == pytest.approx(stddev / (bound if name == "poisson" else 2.0 * bound))
    assert (relation is dpa.NeighboringRelation.REPLACE_ONE) == (adjacency == "replace" or name == "fixed")


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_dp_accountings_own_units_are_as_the_table_says(adjacency: str) -> None:
    """With everyone sampled, each event alone is the Gaussian mechanism of our noise multiplier."""
    exact = exact_epsilon(math.sqrt(10) / 3.0)
    event, relation = releases(adjacency=adjacency, sampling=Poisson(CLIENTS, 1.0)).event(3.0)
    accountant = dpa.pld.PLDAccountant(relation, value_discretization_interval=1e-3)
    assert exact <= accountant.compose(event, 10).get_epsilon(DELTA) <= 1.01 * exact
    event, relation = releases(adjacency=adjacency, sampling=FixedSize(CLIENTS, CLIENTS)).event(3.0)
    twice = exact_epsilon(2.0 * math.sqrt(10) / 3.0) if adjacency == "add-or-remove" else exact
    assert twice <= dpa.rdp.RdpAccountant(neighboring_relation=relation).compose(event, 10).get_epsilon(DELTA)
    assert dpa.rdp.RdpAccountant(neighboring_relation=relation).compose(event, 10).get_epsilon(DELTA) <= 1.2 * twice


@pytest.mark.parametrize("prob", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("stddev", [0.6, 1.0, 3.0])
def test_one_poisson_round_is_the_integral_of_its_mixture_within_a_thousandth_and_never_below(
    prob: float, stddev: float
) -> None:
    sampling = Poisson(CLIENTS, prob)
    removed = mixture_epsilon(prob, stddev, (1.0, 0.0))
    replaced = mixture_epsilon(prob, stddev, (1.0, -1.0))
    assert removed * (1 - 1e-6) <= spent(stddev, sampling=sampling) <= 1.001 * removed
    assert replaced * (1 - 1e-6) <= spent(stddev / 2, sampling=sampling, adjacency="replace") <= 1.001 * replaced


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("stddev", [0.6, 1.0, 3.0])
def test_no_attack_on_one_round_of_fixed_size_beats_its_epsilon(share: float, stddev: float) -> None:
    """Other clients all send c: the sum moves by x - c if the client is sampled, for its message x; all norms 1."""
    sampling = FixedSize(CLIENTS, int(share * CLIENTS))
    zeroed = max(mixture_epsilon(share, stddev, (1.0 - c, 0.0 - c)) for c in (-1.0, 0.0, 1.0))
    replaced = max(mixture_epsilon(share, stddev, (1.0 - c, -1.0 - c)) for c in (-1.0, 0.0, 1.0))
    assert zeroed <= spent(stddev, sampling=sampling)
    assert replaced <= spent(stddev / 2, sampling=sampling, adjacency="replace")


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_poisson_over_many_rounds_is_dp_accountings_own_epsilon(adjacency: str) -> None:
    event, relation = releases(adjacency=adjacency, sampling=SAMPLINGS["poisson"]).event(0.8)
    accountant = dpa.pld.PLDAccountant(relation, value_discretization_interval=1e-3)
    theirs = accountant.compose(dpa.SelfComposedDpEvent(event, 200)).get_epsilon(DELTA)
    ours = spent(0.8, 200, adjacency=adjacency, sampling=SAMPLINGS["poisson"])
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 300), (3.0, 10), (8.0, 500)])
def test_fixed_size_is_cheaper_than_by_renyi_divergence_and_dearer_than_by_the_pair_that_can_be_met(
    noise: float, rounds: int
) -> None:
    """All others send -B, and the client B or -B: the sum reveals as much as Poisson cohorts at sensitivity 2 B."""
    fixed = releases(adjacency="replace", sampling=SAMPLINGS["fixed"])
    event, relation = fixed.event(noise)
    renyi = dpa.rdp.RdpAccountant(neighboring_relation=relation).compose(event, rounds).get_epsilon(DELTA)
    met = spent(noise, rounds, sampling=SAMPLINGS["poisson"])
    ours = fixed.bound(noise, rounds)
    assert met * (1.0 - 1e-6) <= ours.epsilon <= min(1.2 * met, 0.8 * renyi)
    assert ours.amplified


@pytest.mark.parametrize("rounds", [1, 100])
@pytest.mark.parametrize(("trust", "adjacency", "name"), COMBINATIONS)
@pytest.mark.parametrize("target", [0.5, 8.0])
def test_calibrated_noise_spends_the_target_within_a_thousandth_and_never_more(
    trust: str, adjacency: str, name: str, rounds: int, target: float
) -> None:
    plan = {"trust": trust, "adjacency": adjacency, "sampling": SAMPLINGS[name]}
    noise = releases(**plan).calibrate(target, rounds)
    assert 0.999 * target <= spent(noise, rounds, **plan) <= target


@pytest.mark.parametrize(
    ("target", "rounds", "sampling"),
    [
        (0.01, 10_000, Everyone(CLIENTS)),
        (3000.0, 10_000, Everyone(CLIENTS)),
        (720.0, 1, Everyone(CLIENTS)),
        (0.01, 10_000, Poisson(10**6, 1e-4)),
        (1.0, 10_000, Poisson(10**6, 1e-4)),
        (2000.0, 100, Poisson(10**6, 1e-2)),
        (1000.0, 100, FixedSize(10**6, 10**4)),
    ],
)
def test_calibration_reaches_the_ends_of_its_range(target: float, rounds: int, sampling: Sampling) -> None:
    plan = {"trust": "central", "adjacency": "add-or-remove", "sampling": sampling}
    noise = releases(**plan).calibrate(target, rounds)
    assert 0.999 * target <= spent(noise, rounds, **plan) <= target


def test_no_rounds_are_calibrated_as_one() -> None:
    sampled = releases(adjacency="replace", sampling=SAMPLINGS["poisson"])
    assert sampled.calibrate(2.0, rounds=0) == sampled.calibrate(2.0, rounds=1)


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("trust", TRUSTS)
def test_replace_is_never_cheaper_than_add_or_remove_at_the_same_noise(trust: str, name: str) -> None:
    for stddev, rounds in ((0.7, 1), (2.0, 50), (20.0, 300)):
        plan = {"trust": trust, "sampling": SAMPLINGS[name]}
        removed = spent(stddev, rounds, adjacency="add-or-remove", **plan)
        assert spent(stddev / 2.0, rounds, adjacency="replace", **plan) >= removed * (1.0 - GRID)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("sampling", [Poisson(CLIENTS, 0.01), FixedSize(CLIENTS, 10)])
def test_the_local_model_claims_no_amplification(adjacency: str, sampling: Sampling) -> None:
    plan: dict[str, Any] = {"trust": "local", "adjacency": adjacency}
    assert spent(5.0, 50, sampling=sampling, **plan) == spent(5.0, 50, sampling=Everyone(CLIENTS), **plan)
    central = spent(5.0, 50, sampling=sampling, adjacency=adjacency)
    assert central < 0.5 * spent(5.0, 50, sampling=Everyone(CLIENTS), adjacency=adjacency)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("sampling", [Poisson(CLIENTS, 1.0), FixedSize(CLIENTS, CLIENTS)])
def test_sampling_everyone_costs_what_everyone_costs(adjacency: str, sampling: Sampling) -> None:
    assert spent(2.0, 30, sampling=sampling, adjacency=adjacency) == spent(2.0, 30, adjacency=adjacency)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("noise", [0.05, 1.0, 30.0])
def test_sampling_never_costs_more_than_everyone(adjacency: str, noise: float) -> None:
    for sampling in (Poisson(CLIENTS, 0.999), Poisson(CLIENTS, 0.2), FixedSize(CLIENTS, 999), FixedSize(CLIENTS, 200)):
        assert spent(noise, 40, sampling=sampling, adjacency=adjacency) <= spent(noise, 40, adjacency=adjacency)


def grid_error(values: list[float]) -> bool:
    """Return True if a list falls, up to the difference between grids."""
    return all(later <= earlier * (1.0 + GRID) for earlier, later in itertools.pairwise(values))


@few
@given(
    combination=st.sampled_from(COMBINATIONS),
    noise=st.floats(0.3, 30.0),
    factor=st.floats(1.01, 3.0),
    rounds=st.integers(1, 300),
    delta=st.floats(1e-8, 1e-2),
)
def test_epsilon_falls_with_noise_and_delta_and_grows_with_rounds(
    combination: tuple[str, str, str], noise: float, factor: float, rounds: int, delta: float
) -> None:
    trust, adjacency, name = combination
    plan = {"trust": trust, "adjacency": adjacency, "sampling": SAMPLINGS[name]}
    base = spent(noise, rounds, delta=delta, **plan)
    assert grid_error([base, spent(factor * noise, rounds, delta=delta, **plan)])
    assert grid_error([base, spent(noise, rounds, delta=min(0.5, factor * delta), **plan)])
    assert grid_error([spent(noise, 2 * rounds, delta=delta, **plan), base])


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("kind", ["poisson", "fixed"])
def test_epsilon_grows_with_the_sampling_probability(adjacency: str, kind: str) -> None:
    shares = [1.0, 0.5, 0.2, 0.1, 0.02, 0.01, 0.001]
    samplings = [Poisson(CLIENTS, q) if kind == "poisson" else FixedSize(CLIENTS, int(q * CLIENTS)) for q in shares]
    found = [spent(2.0, 50, adjacency=adjacency, sampling=sampling) for sampling in samplings]
    assert grid_error(found)
    assert found[-1] < 0.1 * found[0]


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_absurd_noise_gives_a_bound_and_no_warning(adjacency: str, name: str) -> None:
    noises = [0.0, 5e-324, 1e-9, 1e-3, 0.1, 1e3, 1e9, 1e300]
    plan = {"adjacency": adjacency, "sampling": SAMPLINGS[name]}
    found = [spent(noise, 7, **plan) for noise in noises]
    assert found[0] == found[1] == math.inf
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))
    assert found[-1] < 0.05


def test_no_rounds_cost_nothing_and_no_noise_promises_nothing() -> None:
    assert spent(0.0, 0) == 0.0
    assert spent(0.0, 1) == math.inf


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("privacy.delta", {"sampling": Poisson(10**6, 1e-6), "delta": 1e-5}),
        ("privacy.delta", {"sampling": FixedSize(10**6, 1), "delta": 1e-5}),
        ("privacy.epsilon", {"epsilon": 1e6}),
        ("privacy.epsilon", {"epsilon": math.nan}),
        ("privacy.epsilon", {"epsilon": math.inf}),
        ("privacy.epsilon", {"epsilon": 1e-12, "delta": 1e-12, "rounds": 10_000}),
    ],
)
def test_a_target_that_means_nothing_is_refused_in_one_line(key: str, change: dict) -> None:
    plan = {"epsilon": 1.0, "rounds": 1, **change}
    target = {name: plan.pop(name) for name in ("epsilon", "rounds")}
    with pytest.raises(UserError) as refusal:
        releases(**plan).calibrate(**target)
    assert refusal.value.where == key
    assert "\n" not in str(refusal.value)
