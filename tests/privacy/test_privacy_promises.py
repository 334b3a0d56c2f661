"""All guarantees of a plan: both adjacencies, Gaussian DP, zCDP, epsilon at several deltas; and reading a plan."""

import itertools
import json
import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest

from fedpriv.errors import UserError
from fedpriv.privacy import Everyone, FixedSize, Poisson, PrivacyPlan, Sampling, Scheduled, read_plan
from fedpriv.privacy.plan import DELTAS

SAMPLINGS: dict[str, Sampling] = {
    "everyone": Everyone(50),
    "poisson": Poisson(50, 0.2),
    "all by coins": Poisson(50, 1.0),
    "fixed": FixedSize(50, 10),
}
PLANS = [
    (trust, adjacency, name, memory)
    for trust, adjacency, name, memory in itertools.product(
        ("central", "local"), ("add-or-remove", "replace"), SAMPLINGS, (True, False)
    )
]
every_plan = pytest.mark.parametrize(("trust", "adjacency", "name", "memory"), PLANS)


def plan(**change: Any) -> PrivacyPlan:
    given: dict[str, Any] = {
        "trust": "central",
        "adjacency": "add-or-remove",
        "sampling": SAMPLINGS["everyone"],
        "rounds": 16,
        "delta": 1e-5,
        "l2_bound": 1.5,
        "noise_multiplier": 4.0,
    }
    return PrivacyPlan(**{**given, **change})


def timeline(rounds: int = 6) -> Scheduled:
    squares = tuple(0.5 * (step + 1) for step in range(rounds))
    return Scheduled(9, 3.0, scheme="fedbuff", squares=squares, sent=tuple(range(1, rounds + 1)))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return delta by Balle and Wang 2018, Theorem 8, implemented independently."""
    normal = NormalDist()
    return normal.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal.cdf(-mu / 2 - epsilon / mu)


@every_plan
def test_the_plan_at_the_top_is_the_first_of_its_promises(trust: str, adjacency: str, name: str, memory: bool):
    made = plan(trust=trust, adjacency=adjacency, sampling=SAMPLINGS[name], client_memory=memory)
    for thorough in (False, True):
        table = made.as_dict(thorough=thorough)
        first = table["promises"][0]
        assert first == {key: table[key] for key in first}
        assert set(first) == {"unit", "adversary", "adjacency", "epsilon", "delta", "accountant"}
        assert table["epsilons"]["1e-05"] == table["epsilon"] == made.epsilon


@pytest.mark.parametrize("name", SAMPLINGS)
def test_an_add_or_remove_plan_also_promises_replace_for_the_same_noise(name: str) -> None:
    made = plan(sampling=SAMPLINGS[name])
    other = made.under_replace()
    assert other.noise_stddev == made.noise_stddev
    assert other.l2_sensitivity == 2.0 * made.l2_sensitivity
    removed, replaced = made.promises()
    assert (removed["adjacency"], replaced["adjacency"]) == ("add-or-remove", "replace")
    assert replaced["epsilon"] == other.epsilon > removed["epsilon"] == made.epsilon
    assert replaced["delta"] == made.delta


def test_a_replace_plan_promises_replace_alone() -> None:
    made = plan(adjacency="replace")
    assert made.under_replace() is made
    assert [promise["adjacency"] for promise in made.promises()] == ["replace"]


def test_mu_is_the_root_of_the_rounds_over_the_noise_and_epsilon_follows_from_it_exactly() -> None:
    made = plan()
    assert made.gaussian_dp_mu == math.sqrt(16) / 4.0 == 1.0
    assert made.mu_after(4) == 0.5
    assert made.mu_after(0) == 0.0
    assert made.zcdp_rho == 0.5
    for delta, epsilon in made.epsilons().items():
        if delta >= 1e-8:  # below, the formula as written here drowns in rounding
            assert gaussian_delta(1.0, epsilon) <= delta * (1.0 + 1e-5) < gaussian_delta(1.0, 0.99 * epsilon)


@every_plan
def test_mu_is_given_exactly_where_no_sampling_is_credited(trust: str, adjacency: str, name: str, memory: bool):
    made = plan(trust=trust, adjacency=adjacency, sampling=SAMPLINGS[name], client_memory=memory)
    hidden = trust == "central" and (name == "poisson" or (name == "fixed" and not memory))
    assert (made.gaussian_dp_mu is None) == hidden
    assert (made.zcdp_rho is None) == hidden
    assert not made.amplification or hidden
    if not hidden:
        assert made.epsilon == pytest.approx(plan().epsilon, rel=0.01)


def test_under_replace_mu_doubles_with_the_sensitivity() -> None:
    assert plan().under_replace().gaussian_dp_mu == 2.0 * 1.0


@pytest.mark.parametrize(("trust", "releases"), [("central", 3.0), ("local", 6.0)])
def test_mu_of_a_timeline_counts_weights_or_messages(trust: str, releases: float) -> None:
    made = plan(trust=trust, adjacency="replace", sampling=timeline(), rounds=6)
    assert made.gaussian_dp_mu == pytest.approx(math.sqrt(releases) / 4.0)


@pytest.mark.parametrize("name", ["everyone", "poisson", "fixed"])
@pytest.mark.parametrize("delta", [1e-5, 3e-7])
def test_epsilon_never_falls_as_delta_falls(name: str, delta: float) -> None:
    made = plan(sampling=SAMPLINGS[name], client_memory=False, delta=delta)
    found = made.epsilons()
    assert list(found) == sorted({*DELTAS, delta}, reverse=True)
    assert all(earlier <= later for earlier, later in itertools.pairwise(found.values()))
    assert found[delta] == made.epsilon
    for other, epsilon in found.items():
        assert epsilon == pytest.approx(replace(made, delta=other).epsilon, rel=0.02)


def test_a_run_asks_no_accountant_of_sampled_rounds_for_more_than_its_epsilon(monkeypatch) -> None:
    made = plan(sampling=SAMPLINGS["poisson"])
    asked = []
    real = PrivacyPlan._bound
    monkeypatch.setattr(
        PrivacyPlan, "_bound", lambda self, *a: asked.append((self.delta, self.adjacency)) or real(self, *a)
    )
    quick = made.as_dict()
    assert set(asked) == {(1e-5, "add-or-remove")}
    assert list(quick["epsilons"]) == ["1e-05"]
    assert len(made.as_dict(thorough=True)["epsilons"]) == len(DELTAS)


@pytest.mark.parametrize("noise", [0.0, 1e-100, 1e-5, 1e12])
def test_all_promises_are_json_without_infinities(noise: float) -> None:
    table = json.loads(json.dumps(plan(noise_multiplier=noise).as_dict(), allow_nan=False))
    if noise < 1.0:
        assert table["epsilons"]["1e-05"] is None
        assert table["promises"][0]["epsilon"] is None
    if noise == 0.0:
        assert table["gaussian_dp_mu"] is None
        assert table["zcdp_rho"] is None


@every_plan
def test_a_plan_is_read_back_from_its_record(trust: str, adjacency: str, name: str, memory: bool) -> None:
    made = plan(trust=trust, adjacency=adjacency, sampling=SAMPLINGS[name], client_memory=memory)
    assert read_plan(json.loads(json.dumps(made.as_dict())), "privacy.json") == made


@pytest.mark.parametrize("trust", ["central", "local"])
def test_a_timeline_read_back_is_charged_as_a_whole_whenever_it_ends(trust: str) -> None:
    made = plan(trust=trust, adjacency="replace", sampling=timeline(), rounds=6)
    read = read_plan(json.loads(json.dumps(made.as_dict())), "privacy.json")
    assert read is not None
    assert read.epsilon == made.epsilon
    assert read.epsilon_after(2) == made.epsilon > made.epsilon_after(2)


@pytest.mark.parametrize(
    "damage",
    [
        {"sampling": None},
        {"rounds": "x"},
        {"trust": "nobody"},
        {"sampling": {"name": "moon", "population": 3}},
        {"delta": 7},
    ],
)
def test_a_record_that_is_no_plan_is_one_clear_line(damage: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^here/privacy\.json: expected the record of a privacy plan"):
        read_plan({**plan().as_dict(), **damage}, "here/privacy.json")
    with pytest.raises(UserError, match="privacy plan"):
        read_plan({}, "here/privacy.json")
