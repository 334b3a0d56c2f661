"""Secure aggregation in plans: the grid, the shares, the proof about their sums, and the promises to each adversary."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from fedpriv.deploy.setup.provision import make_deployment
from fedpriv.errors import UserError
from fedpriv.flower.privacy_terms import PrivacyTerms, promised
from fedpriv.mechanisms.shares import IntegerSums
from fedpriv.privacy import (
    Aggregation,
    AggregationChoice,
    Everyone,
    FixedSize,
    Poisson,
    PrivacyPlan,
    Sampling,
    make_plan,
    noise_against_signal,
    privacy_statement,
    read_plan,
)
from fedpriv.privacy.aggregation import MAX_CLOSENESS, closeness
from fedpriv.privacy.gaussian import gaussian_delta, gaussian_epsilon
from fedpriv.streams import SeededStreams

TERMS = Aggregation(helpers=2, least_survivors=80, colluders=5, most=100, size=62_000)


def plan_of(terms: Aggregation = TERMS, **facts: Any) -> PrivacyPlan:
    known: dict[str, Any] = {"rounds": 20, "delta": 1e-6, "l2_bound": 0.7, "noise_multiplier": 3.0}
    known |= {"trust": terms, "sampling": Everyone(terms.most)}
    return make_plan(**{**known, **facts})


NUMBERS = [
    (TERMS, 0.7, 3.0, "replace"),
    (TERMS, 0.7, 3.0, "add-or-remove"),
    (Aggregation(helpers=1, least_survivors=1, colluders=0, most=1, size=1), 1.0, 0.5, "replace"),
    (Aggregation(helpers=1, least_survivors=3, colluders=1, most=7, size=10**7), 1e-3, 20.0, "replace"),
    (Aggregation(helpers=1, least_survivors=800, colluders=0, most=1000, size=10**6), 100.0, 6.0, "add-or-remove"),
    (Aggregation(helpers=1, least_survivors=70_000, colluders=9, most=100_000, size=10**5), 1.0, 6.0, "replace"),
]


@pytest.mark.parametrize(("terms", "bound", "multiplier", "adjacency"), NUMBERS)
def test_the_plans_numbers_are_those_of_the_formulas(
    terms: Aggregation, bound: float, multiplier: float, adjacency: str
) -> None:
    """The grid is the finest power of two with a guard band and a share of at most 2^20 steps, found by trying."""
    plan = plan_of(terms, l2_bound=bound, noise_multiplier=multiplier, adjacency=adjacency)
    certain, factor = terms.least_survivors - terms.colluders, 2.0 if adjacency == "replace" else 1.0

    def numbers(grid: float) -> tuple[float, float, float, float]:
        rounded = bound + grid * math.sqrt(terms.size) / 2.0
        sigma = multiplier * factor * rounded
        reach = terms.most * (rounded + grid) + 10.0 * sigma * math.sqrt(terms.most / certain)
        return rounded, sigma, sigma / math.sqrt(certain), reach / grid

    def fits(grid: float) -> bool:
        _, _, share, reach = numbers(grid)
        return reach < 2.0**31 and share < 2.0**20 * grid

    grid = next(2.0**exponent for exponent in range(-80, 80) if fits(2.0**exponent))
    rounded, sigma, share, reach = numbers(grid)
    found = plan.as_dict()
    assert found["release_grid"] == grid
    assert found["rounded_l2_bound"] == pytest.approx(rounded, rel=1e-14)
    assert found["noise_stddev"] == pytest.approx(sigma, rel=1e-14)
    assert found["share_stddev"] == pytest.approx(share, rel=1e-14)
    assert found["sum_limit"] == pytest.approx(reach, abs=1.0)
    assert found["sum_limit"] < 2**31 == found["modulus"] // 2
    shift = math.sqrt(plan.rounds) * factor * rounded / sigma
    assert plan.epsilon == pytest.approx(gaussian_epsilon(shift, plan.delta), rel=1e-9)


@pytest.mark.parametrize(("terms", "bound", "multiplier", "adjacency"), NUMBERS)
def test_any_number_of_survivors_has_the_noise_of_the_plan(
    terms: Aggregation, bound: float, multiplier: float, adjacency: str
) -> None:
    plan = plan_of(terms, l2_bound=bound, noise_multiplier=multiplier, adjacency=adjacency)
    for survivors in (terms.least_survivors, (terms.least_survivors + terms.most) // 2, terms.most):
        for silent in range(terms.colluders + 1):
            together = math.sqrt(survivors - silent) * plan.shares.client
            assert together >= plan.noise_stddev * (1.0 - 1e-12)
    fewest = math.sqrt(terms.least_survivors - terms.colluders) * plan.shares.client
    assert fewest == pytest.approx(plan.noise_stddev)
    assert plan.shares.server == 0.0


def test_drawn_shares_of_the_fewest_honest_clients_have_the_noise_of_the_plan() -> None:
    """The deviation of 4,000 numbers is within 6 %, five standard errors; without `- c` it would be 22 % less."""
    terms = Aggregation(helpers=1, least_survivors=10, colluders=4, most=12, size=4_000)
    plan = plan_of(terms)
    sums = IntegerSums(grid=plan.sums.step, limit=plan.sums.limit, least=10) if plan.sums else None
    assert sums is not None
    message, streams = np.zeros(4_000), SeededStreams(1, "x")
    shares = [sums.noised(streams, plan.shares.client, torch.from_numpy(message), 1, client) for client in range(6)]
    found = float(torch.stack(shares).sum(dim=0).std())
    assert found == pytest.approx(plan.noise_stddev, rel=0.06)
    assert all(bool((share == sums.rounded(share)).all()) for share in shares)


def share_probs(steps: float, width: int) -> np.ndarray:
    """Return the probabilities of rint(s z), from -width to width."""
    away = np.abs(np.arange(-width, width + 1))
    return ndtr((0.5 - away) / steps) - ndtr((-0.5 - away) / steps)


def processed_probs(steps: float, shares: int, points: np.ndarray) -> np.ndarray:
    """Return the probabilities of rint(sqrt(m) s z + u_1 + ... + u_(m-1)), from their characteristic function."""
    at = np.linspace(-math.pi * 8.0, math.pi * 8.0, 200_001)
    transform = np.exp(-0.5 * shares * (steps * at) ** 2) * np.sinc(at / (2.0 * math.pi)) ** shares
    step = at[1] - at[0]
    return np.array([np.sum(np.cos(k * at) * transform) * step / (2.0 * math.pi) for k in points])


@pytest.mark.parametrize(("steps", "shares"), [(1.0, 2), (1.0, 5), (1.1, 9), (1.3, 2), (1.3, 3), (2.0, 4)])
def test_sums_of_shares_are_a_gaussian_and_processing_up_to_tau(steps: float, shares: int) -> None:
    """Brute force in one dimension: convolved shares against the post-processed Gaussian, and both against its delta.

    With one or two grid steps tau is large enough to be seen. Plans have thousands.
    """
    width = math.ceil(9.0 * steps)
    one = share_probs(steps, width)
    assert one.sum() == pytest.approx(1.0, abs=1e-13)
    probs = one
    for _ in range(shares - 1):
        probs = np.convolve(probs, one)
    middle, spread = len(probs) // 2, math.sqrt(shares) * steps
    points = np.arange(-math.floor(4.0 * spread), math.floor(4.0 * spread) + 1)
    apart = np.abs(np.log(probs[middle + points] / processed_probs(steps, shares, points))).max()
    tau = closeness(steps, shares)
    assert apart <= tau + 1e-10
    assert apart >= tau / 100.0 or shares > 2
    for moved in (1, 2):
        for epsilon in (0.1, 0.5, 1.0):
            exceeds = np.maximum(probs[moved:] - math.exp(epsilon) * probs[:-moved], 0.0).sum()
            assert exceeds <= math.exp(tau) * gaussian_delta(max(epsilon - 2.0 * tau, 0.0), moved / spread) + 1e-12


def test_the_difference_to_a_gaussian_is_charged_and_refused_where_it_could_be_seen() -> None:
    plan = plan_of()
    assert plan.as_dict()["epsilon_of_sampling"] == 0.0
    assert closeness(3.0, 10) < closeness(2.0, 10) < closeness(2.0, 11)
    assert closeness(0.9, 2) == math.inf
    assert closeness(0.1, 1) == 0.0
    many = Aggregation(helpers=1, least_survivors=10**7, colluders=0, most=10**8, size=1_000)
    for terms in (many, replace(TERMS, size=10**13)):
        with pytest.raises(UserError, match=r"\[aggregation\]: expected sums that fit in 32 bits"):
            plan_of(terms)
    assert TERMS.closeness(plan.sums, 10**6) < MAX_CLOSENESS if plan.sums else False


@pytest.mark.parametrize("adjacency", ["replace", "add-or-remove"])
def test_three_adversaries_have_their_own_epsilon(adjacency: str) -> None:
    """All helpers together see as much as a server under local trust; more honest shares promise more."""
    plan = plan_of(adjacency=adjacency)
    sums, colluders, alone = plan.adversaries()
    assert [one["name"] for one in (sums, colluders, alone)] == ["sums", "colluders", "all-helpers"]
    assert colluders["epsilon"] == plan.epsilon
    assert colluders["colluders"] == 5
    assert sums["epsilon"] < colluders["epsilon"] < alone["epsilon"]
    bound = plan.as_dict()["rounded_l2_bound"]
    local = make_plan(
        trust="local",
        adjacency="replace",
        sampling=Everyone(100),
        rounds=20,
        delta=1e-6,
        l2_bound=bound,
        noise_multiplier=plan.shares.client / (2.0 * bound),
    )
    assert alone["epsilon"] == pytest.approx(local.epsilon)
    assert (alone["adjacency"], alone["noise_stddev"]) == ("replace", plan.shares.client)
    nobody = plan_of(replace(TERMS, least_survivors=75, colluders=0), adjacency=adjacency)
    assert [one["epsilon"] for one in nobody.adversaries()[:2]] == [nobody.epsilon] * 2
    assert sums["epsilon"] == pytest.approx(
        plan_of(adjacency=adjacency, noise_multiplier=3.0 * math.sqrt(80 / 75)).epsilon, rel=1e-6
    )
    assert plan_of(noise_multiplier=1e-4).adversaries()[2]["epsilon"] is None


def test_a_target_is_met_with_the_rounding_charged() -> None:
    plan = plan_of(noise_multiplier=None, epsilon=2.0)
    assert 1.999 < plan.epsilon <= 2.0
    assert plan.l2_sensitivity > 2.0 * 0.7
    assert plan.noise_stddev == plan.noise_multiplier * plan.l2_sensitivity


@pytest.mark.parametrize("sampling", [Poisson(1000, 0.1), FixedSize(1000, 100)], ids=repr)
def test_no_amplification_by_sampling_is_claimed(sampling: Sampling) -> None:
    """The server sees who answers, so a sampled client pays for every round."""
    plan = plan_of(sampling=sampling, client_memory=False)
    assert not plan.amplification
    assert plan.epsilon == plan_of().epsilon
    assert plan.adjacency == "replace"


def test_a_plan_is_read_back_from_its_record() -> None:
    plan = plan_of()
    assert read_plan(json.loads(json.dumps(plan.as_dict())), "privacy.json") == plan


@pytest.mark.parametrize(
    ("sampling", "least"),
    [(Everyone(100), 80), (Everyone(1), 2), (FixedSize(1000, 30), 24), (Poisson(1000, 0.1), 72), (Poisson(50, 0.1), 3)],
    ids=repr,
)
def test_four_fifths_answer_by_default_or_fewer_if_coins_decide(sampling: Sampling, least: int) -> None:
    found = AggregationChoice(colluders=min(least - 1, 2)).of(sampling, 100, 10)
    assert found.least_survivors == max(least, found.colluders + 1)
    assert AggregationChoice(least_survivors=7).of(sampling, 100, 10).least_survivors == 7


REFUSED = [
    ({"least_survivors": 5}, "aggregation.least_survivors", "more than the 5 colluders"),
    ({"least_survivors": 101}, "aggregation.least_survivors", "at most the 100 clients"),
    ({"helpers": 0}, "aggregation.helpers", "at least 1"),
    ({"colluders": -1}, "aggregation.colluders", "at least 0"),
]


@pytest.mark.parametrize(("change", "where", "says"), REFUSED)
def test_numbers_that_protect_nobody_are_one_line(change: dict[str, int], where: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as refusal:
        replace(TERMS, **change)
    assert refusal.value.where == where


def test_where_everyone_answers_sampling_is_credited_as_with_a_trusted_server() -> None:
    cohorts, choice = Poisson(200, 0.1), AggregationChoice(colluders=4, everyone_answers=True)
    terms = choice.of(cohorts, most=50, size=100)
    assert (terms.most, terms.least_survivors) == (200, 160)
    plan = plan_of(terms, sampling=cohorts, noise_multiplier=1.0)
    trusted = make_plan(
        trust="central",
        adjacency="replace",
        sampling=cohorts,
        rounds=plan.rounds,
        delta=plan.delta,
        l2_bound=plan.l2_bound,
        noise_multiplier=1.0,
    )
    seen = plan_of(replace(terms, everyone_answers=False), sampling=cohorts, noise_multiplier=1.0)
    assert plan.epsilon == trusted.epsilon
    assert plan.amplification
    assert not seen.amplification
    assert plan.epsilon < 0.5 * seen.epsilon
    (_, _, alone), (_, _, without) = plan.adversaries(), seen.adversaries()
    assert alone == without
    assert plan.sums is not None
    moved = 2.0 * plan.sums.l2_bound * math.sqrt(plan.rounds) / plan.sums.share_stddev
    assert alone["epsilon"] == pytest.approx(gaussian_epsilon(moved, plan.delta), rel=1e-9)  # nothing is amplified
    assert "who took part" not in plan.adversary
    said = " ".join(privacy_statement(plan, method="dp-fedavg", randomness="system").split())
    assert "a client that is not sampled answers with a message of zero and its share" in said
    assert read_plan(plan.as_dict(), "privacy.json") == plan
    with pytest.raises(UserError, match=r"aggregation\.everyone_answers: expected false with Flower"):
        promised(plan, cohorts, plan.rounds)
    for others in (Everyone(200), FixedSize(200, 20)):
        with pytest.raises(UserError, match=r'everyone_answers: expected false unless cohort\.sampling = "poisson"'):
            choice.of(others, most=50, size=100)
        with pytest.raises(ValueError, match="sampled by coins"):
            plan_of(terms, sampling=others)


def test_other_trusts_have_no_aggregation_and_this_one_needs_it() -> None:
    hidden = replace(TERMS, most=200, everyone_answers=True)
    for plan in (plan_of(), plan_of(hidden, sampling=Poisson(200, 0.1))):
        with pytest.raises(UserError, match=r"\[aggregation\]: expected no such table"):
            replace(plan, trust="local")
    with pytest.raises(UserError, match=r"privacy\.trust: expected a trust that is offered here"):
        plan_of(trust="aggregator")


def test_terms_of_a_deployment_have_its_numbers_and_are_the_plan() -> None:
    """A device cannot check terms without the numbers of the aggregation, so it refuses them in one line."""
    plan = plan_of()
    terms = PrivacyTerms(**promised(plan, plan.sampling, plan.rounds))
    assert terms.against_server
    assert terms.plan(plan.l2_bound) == plan
    with pytest.raises(UserError, match="aggregation: expected the numbers of secure aggregation"):
        replace(terms, aggregation="[]").plan(plan.l2_bound)
    terms = replace(terms, aggregation="")
    with pytest.raises(UserError, match=r"privacy\.trust: expected a trust that is offered here"):
        terms.plan(0.7)
    with pytest.raises(UserError, match='trust: expected "local" or "central", got'):
        make_deployment(host="localhost", nodes=2, trust="aggregator")
    assert make_deployment(host="localhost", nodes=2, trust="aggregator", helpers=1).helpers == 1


def test_a_statement_names_the_three_adversaries_and_that_it_is_simulated() -> None:
    plan = plan_of()
    text = " ".join(privacy_statement(plan, method="m", randomness="seeded").split())
    for one in plan.adversaries():
        digits = f"{math.ceil(one['epsilon'] * 1e4) / 1e4:.4g}"[:4]
        assert f"epsilon = {digits}" in text
    assert "with up to 5 clients on its side" in text
    assert "together with all 2 helpers, or with 79 of the clients that answer" in text
    assert f"{plan.shares.client:.6g}" in text
    assert "fewer than 80 answers" in text
    assert "no amplification by sampling is claimed" in text
    assert "Simulated: one process computed all messages" in text
    deployed = privacy_statement(plan, method="m", randomness="system", deployed=True)
    assert "Simulated" not in deployed


def test_every_plan_has_its_other_promises() -> None:
    """Twice the noise would need a coarser grid than shares allow: `replace` is the same noise, on the same grid."""
    terms = Aggregation(helpers=1, least_survivors=20, colluders=0, most=25, size=10**7)
    plan = plan_of(terms, adjacency="add-or-remove", noise_multiplier=2500.0, l2_bound=1.0)
    other = plan.under_replace()
    assert (other.sums, other.noise_stddev) == (plan.sums, plan.noise_stddev)
    assert [one["adjacency"] for one in plan.promises()] == ["add-or-remove", "replace"]


@pytest.mark.parametrize("least", [3, 50, 100])
def test_the_noise_that_is_warned_of_is_that_of_all_shares(least: int) -> None:
    """If few answers suffice, shares are large, and all of them are in the sum."""
    terms = Aggregation(helpers=1, least_survivors=least, colluders=1, most=100, size=400)
    plan = plan_of(terms, adjacency="add-or-remove", noise_multiplier=5.0, l2_bound=0.7)
    found = noise_against_signal(plan, 400).ratio
    assert found == pytest.approx(5.0 * math.sqrt(100 / (least - 1)) * math.sqrt(400) / 100, rel=1e-4)


def test_a_sum_of_one_message_is_not_offered() -> None:
    assert AggregationChoice().of(Poisson(12, 0.25), 12, 650).least_survivors == 2
    with pytest.raises(UserError, match=r"aggregation\.least_survivors"):
        AggregationChoice(least_survivors=1)
    with pytest.raises(UserError, match=r"aggregation\.least_survivors: .* at most the 1 clients"):
        AggregationChoice().of(Everyone(1), 1, 650)
