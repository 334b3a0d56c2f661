"""The plan converts a guarantee into noise and into reports; the statement explains it to people."""

import itertools
import json
import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import brief

import fedpriv
import fedpriv.privacy as privacy
from fedpriv.errors import UserError
from fedpriv.privacy import (
    DataFacts,
    Everyone,
    FixedSize,
    Poisson,
    PrivacyPlan,
    Sampling,
    Simulated,
    make_plan,
    privacy_statement,
)
from fedpriv.privacy.accounting import _losses
from fedpriv.privacy.released import Whose

CLIENTS = 500
SAMPLINGS: dict[str, Sampling] = {
    "everyone": Everyone(CLIENTS),
    "poisson": Poisson(CLIENTS, 0.1),
    "fixed": FixedSize(CLIENTS, 50),
}
COMBINATIONS = list(itertools.product(("central", "local"), ("add-or-remove", "replace"), SAMPLINGS))
every_combination = pytest.mark.parametrize(("trust", "adjacency", "name"), COMBINATIONS)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("sampled", [False, True])
def test_coarse_numbers_of_numpy_do_not_make_epsilon_coarse(kind: type[np.floating], sampled: bool) -> None:
    q, noise, delta = kind(0.01), kind(0.7), kind(1e-4)
    found = []
    kinds: list[Any] = [kind, float]
    for number in kinds:  # coarse ones first: `_losses` keeps results by value
        sampling = Poisson(1000, number(q)) if sampled else Everyone(1000)
        made = plan(trust="central", adjacency="add-or-remove", sampling=sampling, rounds=100, delta=number(delta))
        found.append(replace(made, noise_multiplier=number(noise), l2_bound=number(kind(0.3))))
    assert found[0] == found[1]
    assert found[0].epsilon == found[1].epsilon
    assert all(type(value) is float for value in (found[0].epsilon, found[0].noise_stddev, found[0].delta))


def plan(**change: Any) -> PrivacyPlan:
    given_: dict[str, Any] = {
        "trust": "central",
        "sampling": SAMPLINGS["poisson"],
        "rounds": 40,
        "delta": 1e-5,
        "l2_bound": 1.0,
        "noise_multiplier": 1.2,
        "client_memory": False,
    }
    return make_plan(**{**given_, **change})


def words(text: str) -> str:
    """Return a text in lower case without its line breaks."""
    return " ".join(text.lower().split())


@pytest.mark.parametrize(("adjacency", "factor"), [("add-or-remove", 1.0), ("replace", 2.0)])
@pytest.mark.parametrize("trust", ["central", "local"])
def test_noise_is_its_multiplier_times_the_sensitivity(trust: str, adjacency: str, factor: float) -> None:
    made = plan(trust=trust, adjacency=adjacency, l2_bound=3.0, noise_multiplier=1.5)
    assert made.l2_sensitivity == factor * 3.0
    assert made.noise_stddev == 1.5 * factor * 3.0


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_target_under_replace_costs_at_least_twice_the_noise_of_add_or_remove_without_sampling(name: str) -> None:
    """Compares the calibrated noise itself, which detects a plan that treats replace as add-or-remove."""
    removed, replaced = (
        plan(trust="local", sampling=SAMPLINGS[name], adjacency=kind, epsilon=4.0, noise_multiplier=None)
        for kind in ("add-or-remove", "replace")
    )
    assert replaced.noise_stddev == pytest.approx(2.0 * removed.noise_stddev)
    assert replaced.noise_stddev == pytest.approx(2.0 * removed.l2_bound * removed.noise_multiplier)


@every_combination
def test_the_plan_of_a_target_spends_it_within_1_percent_and_never_more(trust: str, adjacency: str, name: str) -> None:
    made = plan(
        trust=trust, adjacency=adjacency, sampling=SAMPLINGS[name], epsilon=3.0, noise_multiplier=None, rounds=20
    )
    assert 0.99 * 3.0 <= made.epsilon <= 3.0
    assert made.epsilon == made.epsilon_after(20)


@brief
@given(bound=st.floats(1e-6, 1e6), combination=st.sampled_from(COMBINATIONS))
def test_epsilon_depends_on_the_bound_only_through_the_noise_over_it(
    bound: float, combination: tuple[str, str, str]
) -> None:
    trust, adjacency, name = combination
    change = {"trust": trust, "adjacency": adjacency, "sampling": SAMPLINGS[name]}
    scaled, one = plan(l2_bound=bound, **change), plan(l2_bound=1.0, **change)
    assert scaled.epsilon == one.epsilon
    assert scaled.noise_stddev == pytest.approx(bound * one.noise_stddev, rel=1e-12)


@every_combination
def test_epsilon_starts_at_zero_and_never_falls_from_round_to_round(trust: str, adjacency: str, name: str) -> None:
    made = plan(trust=trust, adjacency=adjacency, sampling=SAMPLINGS[name])
    after = [made.epsilon_after(rounds) for rounds in range(made.rounds + 1)]
    assert after[0] == 0.0
    assert all(earlier <= later for earlier, later in itertools.pairwise(after))
    assert after[-1] == made.epsilon > after[1] > 0.0


def test_asking_for_epsilon_after_every_round_lays_out_one_grid_for_all() -> None:
    made = plan(sampling=Poisson(10**5, 0.01), rounds=1000, epsilon=2.0, noise_multiplier=None)
    made.epsilon_after(1000)
    grids = _losses.cache_info().misses
    for rounds in (1, 10, 100, 300, 999):
        made.epsilon_after(rounds)
    assert _losses.cache_info().misses == grids


def test_a_plan_of_no_rounds_spends_nothing_and_has_the_noise_of_one() -> None:
    none, one = (plan(rounds=rounds, epsilon=2.0, noise_multiplier=None) for rounds in (0, 1))
    assert none.epsilon == 0.0
    assert none.noise_multiplier == one.noise_multiplier


def test_a_local_client_is_charged_for_its_own_participations() -> None:
    made = plan(trust="local", sampling=SAMPLINGS["fixed"])
    assert made.epsilon_of_participations(made.rounds) == made.epsilon
    assert 0.0 == made.epsilon_of_participations(0) < made.epsilon_of_participations(3) < made.epsilon
    with pytest.raises(ValueError, match="local"):
        plan(trust="central").epsilon_of_participations(3)


def test_the_default_adjacency_follows_trust() -> None:
    assert plan(trust="central").adjacency == "add-or-remove"
    assert plan(trust="local").adjacency == "replace"


@pytest.mark.parametrize("name", ["poisson", "fixed"])
def test_amplification_is_claimed_where_the_server_is_trusted_and_nowhere_else(name: str) -> None:
    assert plan(trust="central", sampling=SAMPLINGS[name]).amplification
    local = plan(trust="local", sampling=SAMPLINGS[name])
    assert not local.amplification
    assert local.epsilon == plan(trust="local", sampling=Everyone(CLIENTS)).epsilon
    assert not plan(trust="central", sampling=Everyone(CLIENTS)).amplification


def test_the_accountant_is_named_with_its_version() -> None:
    assert plan().accountant == plan(sampling=SAMPLINGS["fixed"]).accountant == f"PLD (fedpriv {fedpriv.__version__})"
    assert plan(trust="local").accountant == f"one Gaussian, exactly (fedpriv {fedpriv.__version__})"


@every_combination
@pytest.mark.parametrize("noise", [0.0, 1.2])
def test_the_dictionary_is_json_without_infinities(trust: str, adjacency: str, name: str, noise: float) -> None:
    made = plan(trust=trust, adjacency=adjacency, sampling=SAMPLINGS[name], noise_multiplier=noise)
    read = json.loads(json.dumps(made.as_dict(), allow_nan=False))
    assert read["epsilon"] == (made.epsilon if noise else None)
    assert read["private"] == (noise > 0.0)
    assert read["noise_stddev"] == made.noise_stddev
    assert read["sampling"]["name"] == name
    assert read["sampling"].get("size") == (50 if name == "fixed" else None)
    assert (read["trust"], read["adjacency"], read["unit"]) == (trust, adjacency, "client")


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("privacy.trust", {"trust": "aggregator"}),
        ("privacy.trust", {"trust": "centrall"}),
        ("privacy.adjacency", {"adjacency": "replce"}),
        ("privacy.delta", {"delta": 0.0}),
        ("privacy.delta", {"delta": 1.0}),
        ("privacy.delta", {"delta": math.nan}),
        ("privacy.noise_multiplier", {"noise_multiplier": -1.0}),
        ("privacy.noise_multiplier", {"noise_multiplier": math.nan}),
        ("privacy.noise_multiplier", {"noise_multiplier": math.inf}),
        ("privacy.epsilon", {"noise_multiplier": None, "epsilon": 0.0}),
        ("privacy.epsilon", {"noise_multiplier": None, "epsilon": -1.0}),
        ("privacy.epsilon", {"noise_multiplier": None, "epsilon": math.nan}),
        ("privacy.epsilon", {"noise_multiplier": None, "epsilon": math.inf}),
    ],
)
def test_a_refused_plan_names_its_key_in_one_line(key: str, change: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refusal:
        plan(**change)
    assert refusal.value.where == key
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_bounds_nothing_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="bound"):
        plan(l2_bound=bound)


@pytest.mark.parametrize("change", [{"epsilon": 1.0}, {"noise_multiplier": None}])
def test_exactly_one_of_epsilon_and_noise_is_wanted(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"exactly one of .*epsilon and .*noise_multiplier"):
        plan(**change)


@pytest.mark.parametrize(
    ("change", "near"),
    [({"trust": "centrall"}, "central"), ({"adjacency": "replce"}, "replace")],
)
def test_an_unknown_name_is_answered_with_the_nearest(change: dict[str, Any], near: str) -> None:
    with pytest.raises(UserError, match=f"Did you mean '{near}'"):
        plan(**change)


@every_combination
def test_a_statement_never_gives_a_number_without_its_adversary(trust: str, adjacency: str, name: str) -> None:
    made = plan(trust=trust, adjacency=adjacency, sampling=SAMPLINGS[name])
    text = words(privacy_statement(made, method="a method", randomness="system"))
    assert "epsilon" in text
    assert words(made.adversary) in text
    assert all(part in text for part in (adjacency, "client", f"{made.delta:g}", words(made.accountant)))
    assert all(part in text for part in (str(made.rounds), f"{made.noise_stddev:.6g}", f"{made.l2_bound:g}"))
    assert ("amplification" in text) == (trust == "local")


def test_a_statement_never_understates_epsilon() -> None:
    for noise in (0.7, 0.9, 1.1, 1.3, 1.9, 2.7):
        made = plan(noise_multiplier=noise, sampling=SAMPLINGS["everyone"])
        text = privacy_statement(made, method="a method", randomness="system")
        stated = float(words(text).split("epsilon = ")[1].split()[0])
        assert made.epsilon * (1.0 - 1e-9) <= stated <= 1.001 * made.epsilon


def test_a_statement_lists_what_is_not_covered() -> None:
    text = words(privacy_statement(plan(), method="a method", randomness="seeded"))
    for item in ("loss", "norm", "hyperparameter", "batchnorm", "time", "share their noise", "simulation", "seed"):
        assert item in text
    assert "this is a simulation" not in words(privacy_statement(plan(), method="a method", randomness="system"))


def test_a_statement_says_on_which_grid_noise_is_released() -> None:
    made = plan()
    text = words(privacy_statement(made, method="a method", randomness="system"))
    assert f"a multiple of {made.release_grid:g}" in text
    assert "floating point" not in text


def told(facts: DataFacts | None, **options: Any) -> str:
    return words(privacy_statement(plan(**options), method="a method", randomness="system", data=facts))


@pytest.mark.parametrize("trust", ["central", "local"])
def test_a_statement_says_that_examples_held_out_are_not_protected(trust: str) -> None:
    none = told(DataFacts(clients="natural", test="clients"), trust=trust)
    assert "validation" not in none
    for whose in get_args(Whose):
        own = whose == "within"
        text = told(DataFacts(clients="natural", test="clients", validation=whose), trust=trust)
        assert "validation: the examples held out" in text
        assert "not protected" in text
        assert "* the examples held out for validation" in text.split("not covered:")[1]
        assert ("does not cover the validation scores" in text) == own == ("clients' own examples" in text)


@pytest.mark.parametrize("trust", ["central", "local"])
def test_a_statement_says_whose_examples_models_are_tested_on(trust: str) -> None:
    public, clients, within = (told(DataFacts(clients="natural", test=test), trust=trust) for test in get_args(Whose))
    assert "belong to no client" in public
    assert "who take no part" in clients
    assert "not protected" in clients
    assert "does not cover the test scores" in within
    assert "* the test scores" in within.split("not covered:")[1]
    assert all("test scores" not in text for text in (public, clients, told(None, trust=trust)))


def test_a_statement_says_who_the_clients_are_and_between_which_data_the_promise_holds() -> None:
    natural, simulated, resampled = (
        told(DataFacts(clients=clients)) for clients in ("natural", "simulated", "resampled")
    )
    assert "never from the data of another client" in natural
    assert all("after that division" in text and "simulated" in text for text in (simulated, resampled))
    assert ("not an example" in simulated, "not an example" in resampled) == (False, True)
    deployed = privacy_statement(
        plan(), method="a method", randomness="system", deployed=True, data=DataFacts(clients="simulated")
    )
    assert "clients: " not in words(deployed).replace("over clients: ", "")


def test_a_statement_says_that_metrics_of_the_clients_own_evaluation_are_not_covered() -> None:
    with_, without = (
        words(privacy_statement(plan(), method="a method", randomness="system", evaluated=evaluated))
        for evaluated in (True, False)
    )
    assert "clients' own evaluation" in with_.split("not covered:")[1]
    assert "evaluation" not in without


def test_a_run_without_noise_is_said_to_promise_nothing() -> None:
    bare = privacy_statement(None, method="a method", randomness="seeded")
    quiet = privacy_statement(plan(noise_multiplier=0.0), method="a method", randomness="seeded")
    assert "not private" in words(bare)
    assert "no privacy guarantee" in words(quiet)
    assert "epsilon" not in words(bare) + words(quiet)


def test_a_local_statement_says_what_the_server_sees_and_who_is_charged() -> None:
    text = words(privacy_statement(plan(trust="local"), method="a method", randomness="system"))
    for part in ("server", "every message", "no amplification", "every round", "worst case"):
        assert part in text


def test_a_statement_says_if_one_noise_was_drawn_for_the_sum_of_messages_that_devices_would_noise_each() -> None:
    said = "this run drew one noise vector per round for the sum of its clients' messages"
    for trust, fused, expected in (("local", True, True), ("local", False, False), ("central", True, False)):
        text = words(
            privacy_statement(
                plan(trust=trust), method="a method", randomness="seeded", simulated=Simulated(fused=fused)
            )
        )
        assert (said in text) is expected
    assert said not in words(privacy_statement(plan(trust="local"), method="a method", randomness="system"))


def test_the_package_offers_what_it_names() -> None:
    assert all(hasattr(privacy, name) for name in privacy.__all__)


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_a_plan_with_next_to_no_noise_is_not_called_private_and_its_statement_promises_nothing(noise: float):
    plan = make_plan(trust="central", sampling=Everyone(10), rounds=5, delta=1e-5, l2_bound=1.0, noise_multiplier=noise)
    assert plan.private is False
    assert plan.as_dict()["epsilon"] is None
    text = privacy_statement(plan, method="clip21", randomness="seeded")
    assert "NO privacy guarantee" in text
    assert "infinite" not in text


def test_a_delta_of_one_client_in_the_population_is_warned_about():
    def statement(clients: int) -> str:
        plan = make_plan(
            trust="central", sampling=Everyone(clients), rounds=5, delta=1e-3, l2_bound=1.0, noise_multiplier=5.0
        )
        return privacy_statement(plan, method="clip21", randomness="system")

    assert "WARNING" in statement(1000)
    assert "WARNING" not in statement(900)


@pytest.mark.parametrize("rounds", [1.5, True, -1, "3"])
def test_rounds_that_are_no_count_are_refused(rounds):
    with pytest.raises(UserError, match=r"training\.rounds"):
        make_plan(trust="central", sampling=Everyone(10), rounds=rounds, delta=1e-5, l2_bound=1.0, noise_multiplier=1)


def test_clients_that_remember_get_no_amplification_from_cohorts_of_a_fixed_size() -> None:
    made = plan(sampling=SAMPLINGS["fixed"], client_memory=True)
    assert not made.amplification
    assert made.epsilon == plan(sampling=Everyone(CLIENTS)).epsilon > plan(sampling=SAMPLINGS["fixed"]).epsilon
    assert plan(sampling=SAMPLINGS["poisson"], client_memory=True).amplification
    assert "clients may remember" in words(privacy_statement(made, method="clip21", randomness="system"))


def test_the_safe_assumption_about_memory_is_the_default() -> None:
    made = make_plan(
        trust="central", sampling=SAMPLINGS["fixed"], rounds=40, delta=1e-5, l2_bound=1.0, noise_multiplier=1.2
    )
    assert made.client_memory


def test_a_noise_that_no_number_format_holds_is_refused() -> None:
    with pytest.raises(UserError, match=r"privacy\.noise_multiplier"):
        plan(noise_multiplier=1e300)
    with pytest.raises(UserError, match=r"privacy\.delta"):
        plan(delta=1e-320)
