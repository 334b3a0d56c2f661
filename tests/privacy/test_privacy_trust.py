"""Trust and unit: objects with all rules that follow from them, and plain names in files."""

import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from support.trusts import Pooled

from fedpriv.audit.words import knowledge_of
from fedpriv.deploy.device.policy import Accepts
from fedpriv.errors import UserError
from fedpriv.flower.privacy_terms import PrivacyTerms, promised
from fedpriv.methods import AlphaNormEC, NormalizedSGD
from fedpriv.privacy import (
    ADJACENCIES,
    TRUSTS,
    UNITS,
    Central,
    Everyone,
    FixedSize,
    Local,
    Poisson,
    PrivacyPlan,
    Sampling,
    Scheduled,
    Trust,
    TrustName,
    UnitName,
    by_reliance,
    make_plan,
    noise_against_signal,
    privacy_statement,
    trust_name,
    trust_of,
    unit_of,
)
from fedpriv.privacy.sampling import read_sampling
from fedpriv.rounds import make_agreement
from fedpriv.streams import SystemStreams

BOUND = NormalizedSGD().bounded.l2_bound
every_trust = pytest.mark.parametrize("trust", [Central(), Local(), Pooled()], ids=lambda trust: trust.name)


@pytest.fixture(autouse=True)
def a_third_trust() -> Iterator[None]:
    """A third trust, given by one class and a name, behaves like the two shipped ones."""
    TRUSTS.add(Pooled.name, Pooled)
    yield
    TRUSTS.remove(Pooled.name)


def plan_of(trust: str, **facts: Any) -> PrivacyPlan:
    known: dict[str, Any] = {"rounds": 20, "delta": 1e-6, "l2_bound": BOUND, "noise_multiplier": 3.0}
    return make_plan(**{**known, "trust": trust, "sampling": Everyone(100), **facts})


def test_every_name_is_that_of_its_object() -> None:
    assert [trust_of(name).name for name in TRUSTS] == list(TRUSTS) == [*get_args(TrustName), "pooled"]
    assert [unit_of(name).name for name in UNITS] == list(UNITS) == list(get_args(UnitName))
    assert trust_of("local") == trust_of("local") != trust_of("central")
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        trust_of("local").name = "central"  # type: ignore[misc]


@every_trust
def test_the_shares_of_the_noise_add_up_to_the_plans_on_whatever_is_noised(trust: Trust) -> None:
    server, client = trust.split(2.0, 10.0)
    assert server**2 + 10.0 * client**2 == pytest.approx(4.0 * trust.noises(10.0))
    assert (client > 0.0) == trust.clients_add_noise
    method = NormalizedSGD()
    rules = make_agreement(method, Everyone(100), plan_of(trust.name), SystemStreams())
    assert (rules[0].noise_stddev, rules[1].noise_stddev) == trust.split(plan_of(trust.name).noise_stddev, 100.0)


@every_trust
def test_what_an_adversary_sees_of_single_messages_tells_it_who_took_part(trust: Trust) -> None:
    assert not (trust.shows_messages and trust.hides_cohorts)
    assert trust.trusts_server or trust.clients_add_noise
    assert trust.clients_add_noise or not trust.charges_participations
    sampled = Poisson(1000, 0.01)
    assert plan_of(trust.name, sampling=sampled, adjacency="replace").amplification == trust.hides_cohorts


@every_trust
def test_a_client_is_charged_for_its_own_messages_where_its_own_noise_protects_it(trust: Trust) -> None:
    plan = plan_of(trust.name)
    if trust.charges_participations:
        assert plan.epsilon_of_participations(20) == plan.epsilon
    else:
        with pytest.raises(ValueError, match="own participations"):
            plan.epsilon_of_participations(20)


@every_trust
def test_so_many_more_clients_bring_the_noise_down_to_what_is_wanted(trust: Trust) -> None:
    plan, size = plan_of(trust.name), 10**6
    found = noise_against_signal(plan, size)
    assert found.clients is not None
    more = replace(plan, sampling=Everyone(found.clients))
    assert noise_against_signal(more, size).ratio == pytest.approx(3.0, rel=0.02)


@every_trust
def test_a_statement_names_the_trusts_adversary_and_the_units_neighbors(trust: Trust) -> None:
    for adjacency in ADJACENCIES:
        text = " ".join(
            privacy_statement(plan_of(trust.name, adjacency=adjacency), method="m", randomness="system").split()
        )
        assert f"Adversary: {trust.adversary}." in text
        assert f"is added to {trust.noised} (" in text
        assert unit_of("client").neighbors[adjacency] in text
        assert unit_of("client").over(20) in text


@every_trust
def test_a_memory_of_noise_asks_for_noise_at_the_client(trust: Trust) -> None:
    method = AlphaNormEC(memory="sent")
    plan = plan_of(trust.name, l2_bound=method.bounded.l2_bound)
    if trust.clients_add_noise:
        make_agreement(method, Everyone(100), plan, SystemStreams())
    else:
        with pytest.raises(UserError, match=rf'got privacy\.trust = "{trust.name}"'):
            make_agreement(method, Everyone(100), plan, SystemStreams())


@pytest.mark.parametrize(
    ("make", "where", "words"),
    [
        (trust_of, "privacy.trust", {"locl": "Did you mean 'local'", "none": "Known"}),
        (unit_of, "privacy.unit", {"exemple": "Did you mean 'example'", "clients": "Did you mean 'client'"}),
    ],
)
def test_other_words_are_refused_in_one_line(make: Any, where: str, words: dict[str, str]) -> None:
    for name, expected in words.items():
        with pytest.raises(UserError, match=expected) as refusal:
            make(name)
        assert refusal.value.where == where


TIMELINE = Scheduled(16, 4.0, "fedbuff", (1.0, 1.5, 2.25), (1, 2, 4))
every_sampling = pytest.mark.parametrize(
    "sampling",
    [Everyone(9), Poisson(100, 0.05), Poisson(9, 1.0), FixedSize(100, 7), FixedSize(9, 9), TIMELINE],
    ids=repr,
)


@every_sampling
def test_a_sampling_is_read_back_from_its_record(sampling: Sampling) -> None:
    record = sampling.as_dict()
    again = read_sampling(record, 3)
    assert again.as_dict() == record
    assert (again == sampling) == sampling.draws_cohorts
    assert all(again.charge(3, each_message=seen) == sampling.charge(3, each_message=seen) for seen in (True, False))


@every_sampling
@every_trust
def test_only_a_hidden_cohort_that_leaves_somebody_out_earns_credit(sampling: Sampling, trust: Trust) -> None:
    for memory in (True, False):
        plan = plan_of(trust.name, sampling=sampling, rounds=3, adjacency="replace", client_memory=memory)
        assert plan.amplification == (trust.hides_cohorts and sampling.amplifies(client_memory=memory))
        assert not plan.amplification or sampling.sampling_prob < 1.0
        if not plan.amplification:
            releases = sampling.charge(3, each_message=trust.shows_messages)
            assert plan.mu_after(3) == pytest.approx(releases**0.5 / 3.0)


@every_sampling
def test_a_trusts_neighbors_are_the_default_wherever_the_sampling_can_be_accounted_under_them(
    sampling: Sampling,
) -> None:
    for trust in (Central(), Local(), Pooled()):
        default = plan_of(trust.name, sampling=sampling, rounds=3).adjacency
        assert default == trust.default_adjacency or trust.default_adjacency not in sampling.adjacencies
        assert default in sampling.adjacencies
    for adjacency in ADJACENCIES:
        if adjacency not in sampling.adjacencies:
            with pytest.raises(UserError, match=r"privacy\.adjacency"):
                plan_of("central", sampling=sampling, rounds=3, adjacency=adjacency)


def test_no_part_of_the_code_asks_for_the_class_of_a_sampling_or_the_name_of_a_trust() -> None:
    """All rules that follow from a trust or sampling are its members, so a third trust is one class."""
    root = Path(__file__).parents[2]
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for folder in ("fedpriv", "strategies", "clients")
        for path in sorted((root / folder).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"isinstance\(.*\b(Everyone|Poisson|FixedSize|Scheduled)\b", line)
        or re.search(r"\btrust *(==|!=) *[\"']", line)
    ]
    assert not found


def test_who_accepts_a_trust_accepts_those_that_rely_on_less() -> None:
    assert by_reliance() == ("local", "aggregator", "pooled", "central")
    accepted = {trust: Accepts(trust=trust_name(trust)).trusts for trust in by_reliance()}
    accepted["none"] = Accepts(trust="none").trusts
    assert accepted["local"] == ("local",)
    assert accepted["pooled"] == ("local", "aggregator", "pooled")
    assert accepted["none"] == (*by_reliance(), "none")
    words = " or ".join(f'"{name}"' for name in (*by_reliance(), "none"))
    with pytest.raises(UserError, match=rf"accepts\.trust: expected {words}"):
        Accepts(trust="nobody")  # pyright: ignore[reportArgumentType]


def test_a_promise_of_a_third_trust_is_one_on_the_wire() -> None:
    made = plan_of("pooled")
    promise = PrivacyTerms(**promised(made, made.sampling, made.rounds))
    assert promise.plan(BOUND) == made
    assert promise.trust_rules == Pooled()
    assert promise.against_server
    assert not promise.charges_participations
    unknown = replace(promise, trust="nobody")
    assert unknown.trust_rules is None
    assert not unknown.against_server


@every_trust
def test_what_an_auditor_sees_is_the_trusts_own_clause(trust: Trust) -> None:
    assert trust.seen in knowledge_of(plan_of(trust.name), hidden=False)
