"""Accounting for single records: sensitivities against attacks, epsilons against dp-accounting, refusals."""

import dataclasses
import itertools
import math
from typing import Any

import dp_accounting as dpa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpriv.errors import UserError
from fedpriv.privacy import Everyone, ExampleTerms, FixedSize, Poisson, PrivacyPlan, RecordBound, make_plan, read_plan
from fedpriv.privacy.gaussian import gaussian_delta, gaussian_epsilon
from fedpriv.privacy.records import ROUNDING
from fedpriv.privacy.released import DataFacts
from fedpriv.privacy.statement import privacy_statement

DELTA = 1e-5


def terms(**change: Any) -> ExampleTerms:
    return ExampleTerms(**{"clip": 1.0, "examples": 500, "declared": True, **change})


def remembered(**change: Any) -> RecordBound:
    given_ = {"l2_bound": 1.0, "lipschitz": 1.0, "cocoercive": 1.0, "beta": 0.1}
    return RecordBound(**{"terms": terms(), **given_, **change})


def forgotten(rate: float = 0.1, **change: Any) -> RecordBound:
    return RecordBound(**{"terms": terms(rate=rate), "l2_bound": 1.0, **change})


def plan(record: RecordBound, **change: Any) -> PrivacyPlan:
    given_: dict[str, Any] = {"trust": "local", "sampling": Everyone(10), "rounds": 50, "delta": DELTA}
    if "epsilon" not in change:
        given_["noise_multiplier"] = 1.5
    return make_plan(**{**given_, "l2_bound": record.l2_bound, **change}, record=record)


def composed(events: list[tuple[dpa.DpEvent, int]], relation: dpa.NeighboringRelation) -> float:
    accountant = dpa.pld.PLDAccountant(relation)
    for event, count in events:
        accountant.compose(event, count)
    return accountant.get_epsilon(DELTA)


# The routes against dp-accounting, composed by hand.


@pytest.mark.parametrize("rounds", [1, 40])
@pytest.mark.parametrize("stddev", [0.05, 0.4])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_a_noiseless_memory_costs_one_gaussian_of_the_stated_sensitivity(
    rounds: int, stddev: float, beta: float
) -> None:
    record = remembered(beta=beta)
    by_hand = min(2.0 * (2.0 / 500) * math.sqrt(rounds) / (2.0 - beta), 2.0 * math.sqrt(rounds))
    sensitivity = record.sensitivity("replace", rounds)
    assert by_hand <= sensitivity <= by_hand * (1.0 + 1.01 * ROUNDING)
    made = plan(record, rounds=rounds, noise_multiplier=stddev / sensitivity)
    expected = composed([(dpa.GaussianDpEvent(stddev / sensitivity), 1)], dpa.NeighboringRelation.ADD_OR_REMOVE_ONE)
    assert made.epsilon == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("rate", [0.02, 0.3, 1.0])
@pytest.mark.parametrize(("adjacency", "unit"), [("add-or-remove", 1.0), ("replace", 2.0)])
@pytest.mark.parametrize("rounds", [5, 60])
@pytest.mark.sampled
def test_fresh_messages_cost_one_sampled_gaussian_a_round(
    rate: float, adjacency: str, unit: float, rounds: int
) -> None:
    record = forgotten(rate, lipschitz=2.0, l2_bound=5.0)
    alone = 2.0 / (rate * 500)
    made = plan(record, adjacency=adjacency, rounds=rounds)
    assert made.l2_sensitivity == pytest.approx(unit * alone, rel=2 * ROUNDING)
    one = dpa.GaussianDpEvent(made.noise_stddev / (alone if rate < 1.0 else unit * alone))
    replaced = unit == 2.0 and rate < 1.0
    relation = dpa.NeighboringRelation.REPLACE_ONE if replaced else dpa.NeighboringRelation.ADD_OR_REMOVE_ONE
    event = dpa.PoissonSampledDpEvent(rate, one) if rate < 1.0 else one
    assert made.epsilon == pytest.approx(composed([(event, rounds)], relation), rel=2e-3)


@pytest.mark.parametrize(("rate", "steps", "multiplier"), [(0.05, 1, 1.0), (0.05, 20, 2.0), (1.0, 3, 8.0)])
def test_local_steps_with_noise_cost_one_release_each(rate: float, steps: int, multiplier: float) -> None:
    record = RecordBound(terms=terms(rate=rate, steps=steps, clip=0.5), l2_bound=1.0)
    made = plan(record, adjacency="add-or-remove", rounds=30, noise_multiplier=multiplier)
    assert made.noise_stddev == pytest.approx(0.5 * multiplier, rel=2 * ROUNDING)
    assert made.message_stddev == 0.0
    one = dpa.GaussianDpEvent(multiplier)
    event = dpa.PoissonSampledDpEvent(rate, one) if rate < 1.0 else one
    by_hand = composed([(event, 30 * steps)], dpa.NeighboringRelation.ADD_OR_REMOVE_ONE)
    assert made.epsilon == pytest.approx(by_hand, rel=2e-3)


def test_dp_sgd_costs_no_more_than_its_authors_published() -> None:
    """Abadi et al. 2016, section 4: q = 0.01, sigma = 4, 10,000 steps: epsilon 1.26 at delta 1e-5 by moments."""
    record = RecordBound(terms=terms(rate=0.01, steps=100), l2_bound=1.0)
    made = plan(record, adjacency="add-or-remove", rounds=100, noise_multiplier=4.0)
    assert 0.7 * 1.26 < made.epsilon < 1.26


# The influence of a record, attacked.


@pytest.mark.parametrize("kind", ["clip", "normalize"])
@given(seed=st.integers(0, 10**6), beta=st.floats(0.02, 1.9), damping=st.sampled_from([0.0, 0.1, 0.4]))
def test_no_two_neighbors_differ_by_more_than_the_sensitivity_of_the_memory(
    kind: str, seed: int, beta: float, damping: float
) -> None:
    """Hill climbing on the signals of two data sets that differ in one record."""
    rng = np.random.default_rng(seed)
    alpha, rounds, size, moved = (1.0 if kind == "clip" else 0.7), 6, 2, 0.5
    record = remembered(
        terms=terms(examples=2, clip=moved),
        l2_bound=1.0,
        cocoercive=alpha,
        lipschitz=1.0 / alpha,
        beta=beta,
        damping=damping,
    )
    limit = record.sensitivity("replace", rounds)

    def change(signals: np.ndarray, moves: np.ndarray) -> float:
        first, second, total = np.zeros(size), np.zeros(size), 0.0
        for signal, move in zip(signals, moves, strict=True):
            sent = [bounded(u - v, kind, alpha) for u, v in ((signal, first), (signal + move, second))]
            first, second = ((1.0 - damping) * v + beta * s for v, s in zip((first, second), sent, strict=True))
            total += float(np.square(sent[0] - sent[1]).sum())
        return math.sqrt(total)

    signals, moves = rng.normal(size=(rounds, size)), rng.normal(size=(rounds, size))
    best = 0.0
    for _ in range(60):
        tried = signals + 0.3 * rng.normal(size=signals.shape), moves + 0.3 * rng.normal(size=moves.shape)
        scaled = tried[1] * moved / np.linalg.norm(tried[1], axis=1, keepdims=True)
        found = change(tried[0], scaled)
        if found > best:
            best, (signals, moves) = found, (tried[0], scaled)
    assert 0.0 < best <= limit


def bounded(vector: np.ndarray, kind: str, alpha: float) -> np.ndarray:
    length = float(np.linalg.norm(vector))
    return vector * (min(1.0, 1.0 / length) if kind == "clip" else 1.0 / (alpha + length))


def test_the_sensitivity_of_a_memory_is_nearly_reached() -> None:
    """Unclipped residuals that move alike in every round: the difference of memories is a geometric series."""
    beta, rounds, moved = 0.1, 8, 2.0 / 500
    first = second = 0.0
    total = 0.0
    for k in range(rounds):
        sign = 1.0 if k % 2 == 0 else -1.0
        sent = 0.5 * sign - first, (0.5 + moved) * sign - second
        first, second = first + beta * sent[0], second + beta * sent[1]
        total += (sent[0] - sent[1]) ** 2
    assert 0.9 < math.sqrt(total) / remembered().sensitivity("replace", rounds) <= 1.0


def test_a_record_of_one_round_is_charged_for_the_rounds_after_it() -> None:
    """The releases after the only round with the record still reveal it: a charge of one release would be exceeded."""
    beta, rounds, moved, wide = 0.9, 40, 1.0, 10.0
    record = remembered(terms=terms(examples=2, clip=moved), l2_bound=wide, beta=beta)
    difference, total = 0.0, 0.0
    for k in range(rounds):
        sent = (moved if k == 0 else 0.0) - difference
        difference, total = difference + beta * sent, total + sent**2
    assert total > moved**2 * 1.2
    assert math.sqrt(total) <= record.sensitivity("replace", 1)


def test_a_map_that_is_lipschitz_but_not_cocoercive_gets_the_trivial_bound() -> None:
    """B = sin: memories of neighbors can part, and the bound for cocoercive maps does not hold."""
    moved, beta, rounds = 1e-3, 1.9, 60
    best = 0.0
    for signal in np.linspace(1.6, 4.6, 40):
        first, second, total = 0.0, 0.0, 0.0
        for _ in range(rounds):
            sent = math.sin(signal - first), math.sin(signal + moved - second)
            first, second, total = first + beta * sent[0], second + beta * sent[1], total + (sent[0] - sent[1]) ** 2
        best = max(best, math.sqrt(total))
    record = remembered(terms=terms(examples=1, clip=moved / 2.0), beta=beta)
    assert best > record.sensitivity("replace", rounds)
    unknown = dataclasses.replace(record, cocoercive=None)
    assert best <= unknown.sensitivity("replace", rounds) == 2.0 * math.sqrt(rounds)


@pytest.mark.parametrize(("beta", "damping"), [(2.0, 0.0), (1.9, 0.1)])
def test_a_feedback_step_that_is_too_long_gets_the_trivial_bound(beta: float, damping: float) -> None:
    assert remembered(beta=beta, damping=damping).sensitivity("replace", 9) == 2.0 * math.sqrt(9)


# Sampling of clients.


def test_sampling_of_clients_is_credited_as_a_count_and_never_as_a_rate() -> None:
    """fl4health's formula, the product of the rates, states 0.58, and a mixture of counts is 4.26 (one round)."""
    record = RecordBound(terms=terms(rate=0.1, steps=50), l2_bound=1.0)
    one = plan(record, adjacency="add-or-remove", rounds=1, noise_multiplier=1.0)
    event = dpa.PoissonSampledDpEvent(0.1 * 0.1, dpa.GaussianDpEvent(1.0))
    wrong = composed([(event, 50)], dpa.NeighboringRelation.ADD_OR_REMOVE_ONE)
    assert wrong == pytest.approx(0.583, abs=0.01)
    assert one.epsilon == pytest.approx(5.148, abs=0.01)  # the client is known to take part


@pytest.mark.parametrize("sampling", [Poisson(40, 0.1), FixedSize(40, 4)])
def test_hidden_cohorts_cost_a_record_the_mixture_of_counts(sampling: Any) -> None:
    record = remembered()
    hidden = plan(record, trust="central", sampling=sampling, rounds=30, noise_multiplier=0.8)
    known = plan(record, trust="central", rounds=30, noise_multiplier=0.8)
    shift = 1.0 / (0.8 * math.sqrt(30))
    masses = [math.comb(30, j) * 0.1**j * 0.9 ** (30 - j) for j in range(31)]
    mixed = sum(mass * gaussian_delta(hidden.epsilon, shift * math.sqrt(j)) for j, mass in enumerate(masses) if j)
    assert mixed == pytest.approx(DELTA, rel=1e-3)
    assert gaussian_epsilon(shift, DELTA) < hidden.epsilon < known.epsilon
    assert hidden.amplification
    assert not known.amplification


def test_a_record_is_never_promised_less_than_its_client() -> None:
    record = remembered(terms=terms(examples=1), beta=1.0)
    sampling = Poisson(10_000, 0.001)
    made = plan(record, trust="central", sampling=sampling, rounds=100, noise_multiplier=3.0)
    of_client = made.of_clients()
    assert of_client is not None
    assert made.epsilon <= of_client.under_replace().epsilon


def test_batches_and_hidden_cohorts_together_cost_less_than_a_known_cohort() -> None:
    record = forgotten(0.1)
    hidden = plan(record, trust="central", sampling=Poisson(40, 0.1), rounds=100)
    known, local = plan(record, trust="central", rounds=100), plan(record, sampling=Poisson(40, 0.1), rounds=100)
    few = dataclasses.replace(known, rounds=10)
    assert few.epsilon < hidden.epsilon < known.epsilon == local.epsilon


# The plan.


@pytest.mark.parametrize("record", [remembered(), forgotten(), forgotten(1.0)])
@pytest.mark.parametrize(("trust", "sampling"), [("local", Everyone(10)), ("central", Poisson(10, 0.3))])
def test_calibrated_noise_spends_the_target_and_no_more(record: RecordBound, trust: str, sampling: Any) -> None:
    made = plan(record, trust=trust, sampling=sampling, epsilon=2.0, noise_multiplier=None)
    assert 0.99 * 2.0 < made.epsilon <= 2.0


@pytest.mark.parametrize("record", [remembered(), forgotten()])
def test_epsilon_grows_from_round_to_round(record: RecordBound) -> None:
    made = plan(record)
    after = [made.epsilon_after(rounds) for rounds in range(0, 51, 10)]
    assert after[0] == 0.0
    assert all(one < two for one, two in itertools.pairwise(after))
    assert after[-1] == made.epsilon == made.epsilon_of_participations(50)


def test_one_noise_makes_two_promises() -> None:
    """Epsilon 8 for a client leaves next to nothing for one of its 500 examples."""
    record = remembered()
    made = plan(record, rounds=100, noise_multiplier=12.0 / remembered().sensitivity("replace", 100))
    example, client = made.promises()
    assert (example["unit"], client["unit"]) == ("example", "client")
    assert example["epsilon"] < 0.01
    assert client["epsilon"] == pytest.approx(8.0, rel=1e-3)
    steps = plan(RecordBound(terms=terms(steps=2), l2_bound=1.0))
    assert [promise["unit"] for promise in steps.promises()] == ["example"]
    assert steps.of_clients() is None


def test_add_or_remove_is_also_stated_under_replace() -> None:
    made = plan(remembered(), adjacency="add-or-remove")
    one, both, _ = made.promises()
    assert (one["adjacency"], both["adjacency"]) == ("add-or-remove", "replace")
    assert both["epsilon"] > 2.0 * one["epsilon"]
    assert made.under_replace().noise_stddev == pytest.approx(made.noise_stddev, rel=1e-12)


@pytest.mark.parametrize("record", [remembered(), forgotten(), RecordBound(terms=terms(steps=3), l2_bound=2.0)])
def test_a_plan_is_read_from_its_record(record: RecordBound) -> None:
    made = plan(record)
    assert read_plan(made.as_dict(), "privacy.json") == made
    assert RecordBound.read(record.as_text()) == record
    assert ExampleTerms.of_text(record.terms.as_text()) == record.terms


@pytest.mark.parametrize("text", ["", "{}", '{"route": "memory"}', "[1]"])
def test_other_records_are_refused_in_one_line(text: str) -> None:
    for read in (RecordBound.read, ExampleTerms.of_text):
        with pytest.raises(UserError) as caught:
            read(text)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("[privacy]", {"clip": None}),
        ("[privacy]", {"normalization": 0.1}),
        ("privacy.example_clip", {"clip": 0.0}),
        ("privacy.example_clip", {"clip": math.nan}),
        ("privacy.example_normalization", {"clip": None, "normalization": -1.0}),
        ("privacy.examples", {"examples": 0}),
    ],
)
def test_wrong_numbers_of_examples_are_refused_by_their_key(key: str, change: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        terms(**change)
    assert str(caught.value).startswith(key)


def test_batches_with_a_noiseless_memory_are_refused() -> None:
    with pytest.raises(UserError, match="full-gradient"):
        remembered(terms=terms(rate=0.5))


def test_a_federation_in_which_float64_rounds_a_record_away_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.rounds"):
        plan(remembered(terms=terms(examples=10**9)), rounds=100)


def said(record: RecordBound, clients: Any = "simulated", **change: Any) -> str:
    facts = DataFacts(clients=clients, test="within", validation="within")
    made = plan(record, **{"noise_multiplier": 20.0, **change})
    return " ".join(privacy_statement(made, method="m", randomness="seeded", data=facts).split())


def test_a_statement_says_what_holds_for_single_examples() -> None:
    text = said(forgotten())
    assert "differ in one example of one client after that division" in text
    assert "one client's data after that division" not in text
    assert "a client's other examples are protected one by one" in text
    assert "every noised number is released as a multiple" in text
    assert "the promise protects one copy in one client, not all copies" in said(forgotten(), "resampled")
    assert "protects a client, not an example" not in said(forgotten(), "resampled")
    steps = said(forgotten(terms=terms(rate=0.1, steps=3)))
    assert "every noised number is released" not in steps
    assert "every noised sum is a multiple of" in steps
    assert "credited only as the number of rounds" in said(forgotten(), trust="central", sampling=Poisson(10, 0.1))
