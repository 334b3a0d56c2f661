"""Server's half of a deployment: counting, noise with few answers, and recovery from crashes."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpriv.deploy.coordinator import Coordinator
from fedpriv.errors import UserError
from fedpriv.experiment.deployment import DeploymentChoice
from fedpriv.flower.messages import ClientInstructions, RunTerms
from fedpriv.methods import AlphaNormEC, Clip21, DPFedAvg, DPScaffold, has_memory, optimized
from fedpriv.methods.server_optimizers import Adam
from fedpriv.privacy import Everyone, FixedSize, Poisson, TrustName, make_plan
from fedpriv.rounds import make_agreement
from fedpriv.streams import SeededStreams, SystemStreams

SIZE, CLIENTS = 4, 5
UNDAMPED, DAMPED = AlphaNormEC(alpha=1.0, beta=0.5), AlphaNormEC(alpha=1.0, beta=0.5, damping=0.2)


def coordinator(method: Any = UNDAMPED, trust: TrustName | None = None, size: int = SIZE, **rules: Any) -> Coordinator:
    sampling, plan = Everyone(CLIENTS), None
    if trust is not None:
        plan = make_plan(
            trust=trust,
            sampling=sampling,
            rounds=20,
            delta=1e-5,
            l2_bound=method.bounded.l2_bound,
            noise_multiplier=1.5,
            client_memory=has_memory(method),
        )
    server, client, _ = make_agreement(method, sampling, plan, SystemStreams())
    return Coordinator(
        server=server,
        client=client,
        plan=plan,
        choice=DeploymentChoice(**rules),
        turns=20,
        digest="d",
        state=method.init_server(torch.zeros(size)),
    )


def messages(*clients: int, size: int = SIZE) -> dict[int, Tensor]:
    return {client: torch.full((size,), 0.001 * (client + 1)) for client in clients}


def lost(*clients: int) -> dict[int, tuple[str, str]]:
    return dict.fromkeys(clients, ("lost", "its memory"))


@pytest.mark.parametrize("answering", [0, 1, CLIENTS])
def test_central_noise_is_the_plan_s_however_few_answer(answering: int) -> None:
    """The standard deviation on the sum, measured with a memoryless server that adds the sum to its model."""
    server = coordinator(DPFedAvg(clip_norm=1.0, server_lr=1.0), "central", size=20_000)
    server.begin()
    outcome = server.finish(messages(*range(answering), size=20_000), {})
    assert outcome.happened == ("applied" if answering else "too few")
    if not answering:
        assert torch.count_nonzero(server.state.model) == 0
        return
    sum_seen = -server.state.model.double() * CLIENTS - outcome.total.sum
    expected = server.plan.noise_stddev  # type: ignore[union-attr]
    assert float(sum_seen.std()) == pytest.approx(expected, rel=0.03)
    assert expected == pytest.approx(1.5 * 1.0)


def test_where_trust_is_local_the_server_adds_nothing_and_each_message_has_its_own() -> None:
    server = coordinator(DPFedAvg(clip_norm=1.0, server_lr=1.0), "local")
    server.begin()
    instructions, terms = server.instructions(0)
    assert instructions.noise_stddev == pytest.approx(1.5 * 2.0)
    assert instructions.seed is None
    assert (terms.trust, terms.rounds, terms.population) == ("local", 20, CLIENTS)
    outcome = server.finish(messages(1, 2), {})
    assert torch.allclose(-server.state.model.double() * CLIENTS, outcome.total.sum)


def test_the_sum_is_divided_by_the_expected_size() -> None:
    server = coordinator(DPFedAvg(clip_norm=1.0, server_lr=1.0))
    server.begin()
    server.finish(messages(0), {})
    assert torch.allclose(server.state.model, torch.full((SIZE,), -0.001 / CLIENTS))


def test_below_the_minimum_nothing_is_used_and_the_turn_is_spent() -> None:
    server = coordinator(min_participants=3)
    server.begin()
    outcome = server.finish(messages(0, 1), {})
    assert (outcome.happened, outcome.counted, outcome.silent) == ("too few", [], [2, 3, 4])
    assert (server.turn, server.applied, server.last_turn) == (1, 0, {})
    server.begin()
    instructions, terms = server.instructions(0)
    assert (instructions.round, terms.turn, terms.last_turn) == (1, 2, 0)


def test_below_the_minimum_a_run_can_stop() -> None:
    server = coordinator(min_participants=3, too_few="stop")
    server.begin()
    with pytest.raises(UserError, match=r"turn 1: expected at least 3 valid messages, got 2"):
        server.finish(messages(0, 1), {})


def test_a_run_that_budgets_end_does_not_ask_for_a_repair() -> None:
    server = coordinator(min_participants=3, too_few="stop")
    server.begin()
    refusal = "budget", "its privacy budget does not allow another message"
    refusals: dict[int, tuple[str, str]] = {2: refusal, 3: refusal}
    with pytest.raises(UserError, match=r"got 2 \(.*\)\. A used budget never refills: ask these clients' operators"):
        server.finish(messages(0, 1), refusals)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (torch.full((SIZE,), torch.nan), "NaN or infinity"),
        (torch.full((SIZE,), torch.inf), "NaN or infinity"),
        (torch.zeros(SIZE + 1), r"shape \[5\], expected \[4\]"),
        (torch.zeros(2, SIZE), "shape"),
        (torch.full((SIZE,), 0.9), "l2 norm 1.8, expected at most 1"),
        (torch.full((SIZE,), 40.0), "a coordinate above 1"),
    ],
)
def test_a_message_that_cannot_be_is_left_out(message: Tensor, why: str) -> None:
    server = coordinator()
    server.begin()
    outcome = server.finish({**messages(0), 1: message}, {})
    assert outcome.counted == [0]
    assert list(outcome.invalid) == [1]
    assert re.search(why, outcome.invalid[1])
    assert server.last_turn == {0: 1}


def test_a_loud_message_under_local_trust_is_left_out() -> None:
    server = coordinator(trust="local")
    server.begin()
    stddev = server.client.noise_stddev
    loud = torch.full((SIZE,), 17.0 * stddev)
    long = torch.full((SIZE,), 1.01 * (1.0 + stddev * (SIZE**0.5 + 12.0)) / SIZE**0.5)
    assert server.finish({**messages(0), 1: loud, 2: long}, {}).counted == [0]


def test_who_was_not_asked_is_not_heard() -> None:
    server = coordinator()
    server.left_out = {3}
    server.begin()
    assert server.asked() == [0, 1, 2, 4]
    assert server.finish(messages(0, 3), {}).counted == [0]


@pytest.mark.parametrize("method", [UNDAMPED, Clip21(clip_norm=1.0)])
def test_a_lost_memory_that_would_stay_resets_all(method: Any) -> None:
    server = coordinator(method)
    for _ in range(3):
        server.begin()
        server.finish(messages(*range(CLIENTS)), {})
    model = server.state.model.clone()
    assert torch.count_nonzero(server.state._asdict()["memory"])
    server.begin()
    outcome = server.finish(messages(0, 1, 2, 3), lost(4))
    assert (outcome.happened, outcome.counted, server.epoch, server.last_turn) == ("reset", [], 1, {})
    assert torch.equal(server.state.model, model)
    assert not torch.count_nonzero(server.state._asdict()["memory"])
    server.begin()
    assert [server.instructions(i)[1].epoch for i in range(CLIENTS)] == [1] * CLIENTS


def test_a_reset_of_all_is_one_of_the_server_optimizer_and_clients_hear_nothing_of_it() -> None:
    server = coordinator(optimized(UNDAMPED, Adam()))
    for number in (1, 2):
        server.begin()
        assert server.instructions(0)[0].method == UNDAMPED
        server.finish(messages(*range(CLIENTS)), {})
        assert float(server.state._asdict()["optimizer_rounds"]) == number
    model, again = server.state.model.clone(), coordinator(optimized(UNDAMPED, Adam()))
    again.restore(type(server.state)(**server.state._asdict()), server.save())
    for one in (server, again):
        one.begin()
        assert one.finish(messages(0, 1, 2, 3), lost(4)).happened == "reset"
        assert torch.equal(one.state.model, model)
        assert all(not field.any() for field in tuple(one.state)[1:])
        one.begin()
        assert one.finish(messages(*range(CLIENTS)), {}).happened == "applied"
    assert all(torch.equal(a, b) for a, b in zip(server.state, again.state, strict=True))


def test_a_lost_memory_that_fades_resets_one_client() -> None:
    server = coordinator(DAMPED)
    server.begin()
    server.finish(messages(*range(CLIENTS)), {})
    server.begin()
    outcome = server.finish(messages(0, 1, 2, 3), lost(4))
    assert (outcome.happened, server.epoch, server.last_turn[4], server.last_turn[0]) == ("applied", 0, 0, 2)


@pytest.mark.parametrize("method", [UNDAMPED, Clip21(clip_norm=1.0), AlphaNormEC(alpha=1.0, beta=0.5, damping=1e-9)])
def test_a_reset_of_one_client_is_refused_if_the_server_would_keep_its_lost_memory_forever(method: Any) -> None:
    line = r"^deployment\.lost_memory: expected another rule, because this method's memory does not fade"
    with pytest.raises(UserError, match=line):
        coordinator(method, lost_memory="reset-one")
    with pytest.raises(UserError, match=line):
        coordinator(optimized(method, Adam()), lost_memory="reset-one")


@pytest.mark.parametrize("method", [DAMPED, DPFedAvg(clip_norm=1.0)])
def test_a_reset_of_one_client_is_allowed_where_it_does_no_harm(method: Any) -> None:
    assert coordinator(method, lost_memory="reset-one").lost_memory == "reset-one"


def test_what_the_server_holds_of_a_lost_memory_fades() -> None:
    """The server's memory minus the mean of the clients' is the lost memory, times (1 - lambda) per round."""
    server = coordinator(DAMPED)
    states = {i: DAMPED.init_client(SIZE) for i in range(CLIENTS)}
    gone = torch.zeros(SIZE)
    for number in range(1, 31):
        server.begin()
        if number == 11:
            gone = states[4].memory.clone()
            states[4] = DAMPED.init_client(SIZE)
        replies = {}
        for i in states:
            replies[i], states[i] = DAMPED.client_rule(states[i], torch.ones(SIZE) * (i + 1), None, number)
        server.finish(replies, {})
        if server.turn == 20:
            break
    mean = torch.stack([state.memory for state in states.values()]).mean(dim=0)
    assert torch.allclose(server.state._asdict()["memory"] - mean, gone / CLIENTS * 0.8**10, atol=1e-6)


def test_lost_clients_can_be_left_out_or_stop_the_run() -> None:
    server = coordinator(lost_memory="leave-out")
    server.begin()
    server.finish(messages(*range(CLIENTS)), {})
    server.begin()
    assert server.finish(messages(0, 1), lost(4)).happened == "applied"
    server.begin()
    assert server.asked() == [0, 1, 2, 3]
    server = coordinator(lost_memory="stop")
    server.begin()
    server.finish(messages(*range(CLIENTS)), {})
    server.begin()
    with pytest.raises(
        UserError, match=r"client 4 \(node-4\): expected its memory of earlier turns, got a lost memory"
    ):
        server.finish(messages(0, 1), lost(4))


def test_a_lost_memory_does_not_stop_a_run_for_ever() -> None:
    """All clients must answer, and one cannot: after a reset of all memories it can."""
    server = coordinator(min_participants=CLIENTS, too_few="stop")
    server.begin()
    server.finish(messages(*range(CLIENTS)), {})
    server.begin()
    assert server.finish(messages(0, 1, 2, 3), lost(4)).happened == "reset"
    server.begin()
    assert server.finish(messages(*range(CLIENTS)), {}).happened == "applied"


def test_nobody_can_have_all_reset_forever() -> None:
    """A client without a memory is not believed, and after a second loss it is no longer asked."""
    server = coordinator()
    server.turns = 100
    for _ in range(12):
        server.begin()
        server.finish(messages(0, 1, 2, 3), lost(4))
    assert (server.applied, server.epoch) == (12, 0)
    for number in range(1, 30):
        server.begin()
        lies = number % 2 == 0
        server.finish(messages(*((0, 1, 2, 3) if lies else range(CLIENTS))), lost(4) if lies else {})
    assert server.epoch == 1
    assert 4 in server.left_out
    assert server.applied >= 12 + 27


def test_memories_are_reset_in_a_tenth_of_the_turns_at_most() -> None:
    server = coordinator()
    server.turns = 20
    for client in range(4):
        server.begin()
        server.finish(messages(*range(CLIENTS)), {})
        server.begin()
        server.finish(messages(*(i for i in range(CLIENTS) if i != client)), lost(client))
    assert server.epoch == 2
    assert server.left_out == {2, 3}


def test_a_turn_with_secret_cohorts_counts_whoever_answers() -> None:
    """A turn that does not count would reveal who was in it: with a minimum, or without any answer."""
    method, sampling = DPFedAvg(clip_norm=1.0), Poisson(1000, 0.01)
    plan = make_plan(
        trust="central",
        sampling=sampling,
        rounds=9,
        delta=1e-5,
        l2_bound=1.0,
        noise_multiplier=1.0,
        client_memory=False,
    )
    assert plan.amplification
    server, client, _ = make_agreement(method, sampling, plan, SeededStreams(1))

    def made(least: int) -> Coordinator:
        return Coordinator(
            server=server,
            client=client,
            plan=plan,
            choice=DeploymentChoice(min_participants=least),
            turns=9,
            digest="d",
            state=method.init_server(torch.zeros(SIZE)),
        )

    with pytest.raises(UserError, match=r"deployment.min_participants: expected 1 if epsilon requires secret cohorts"):
        made(2)
    one = made(1)
    one.begin()
    assert one.finish({}, {}).happened == "applied"
    assert torch.count_nonzero(one.state.model) > SIZE / 2  # with this seed: the grid has a zero, too


def secretly(method: Any, **rules: Any) -> Coordinator:
    sampling = Poisson(CLIENTS, 0.999)
    plan = make_plan(
        trust="central",
        sampling=sampling,
        rounds=20,
        delta=1e-5,
        l2_bound=method.bounded.l2_bound,
        noise_multiplier=1.0,
        client_memory=has_memory(method),
    )
    assert plan.amplification
    server, client, _ = make_agreement(method, sampling, plan, SeededStreams(7))
    choice = DeploymentChoice(**rules)
    state = method.init_server(torch.zeros(SIZE))
    return Coordinator(server=server, client=client, plan=plan, choice=choice, turns=20, digest="d", state=state)


@pytest.mark.parametrize("method", [UNDAMPED, Clip21(clip_norm=1.0)])
@pytest.mark.parametrize("rules", [{}, {"lost_memory": "leave-out"}], ids=["method", "leave-out"])
def test_a_lost_memory_in_a_secret_cohort_does_not_show(method: Any, rules: dict[str, Any]) -> None:
    """The server continues as if that client had sent zeros from the turn of the loss on."""
    with_loss, absent = secretly(method, **rules), secretly(method, **rules)
    for turn in range(1, 6):
        loses = turn in (2, 4)
        for one in (with_loss, absent):
            one.begin()
            assert 2 in one.asked() or one.left_out
            answers = messages(*(range(CLIENTS) if turn == 1 else (0, 1, 3, 4)))
            refusals = lost(2) if loses and one is with_loss and 2 in one.asked() else {}
            assert one.finish(answers, refusals).happened == "applied"
        assert all(torch.equal(a, b) for a, b in zip(with_loss.state, absent.state, strict=True))
    assert (with_loss.left_out, with_loss.epoch, absent.left_out) == ({2}, 0, set())
    assert with_loss.last_turn == absent.last_turn
    again = secretly(method, **rules)
    again.restore(type(with_loss.state)(**with_loss.state._asdict()), with_loss.save())
    again.begin()
    assert 2 not in again.asked()


def test_a_lost_memory_that_fades_resets_one_client_in_a_secret_cohort_too() -> None:
    server = secretly(DAMPED)
    server.begin()
    server.finish(messages(*range(CLIENTS)), {})
    server.begin()
    assert server.finish(messages(0, 1, 3, 4), lost(2)).happened == "applied"
    assert (server.left_out, server.last_turn[2], server.last_turn[0]) == (set(), 0, 2)


@pytest.mark.parametrize("rule", ["reset-all", "stop"])
def test_what_would_show_a_lost_memory_is_refused_where_cohorts_are_secret(rule: str) -> None:
    with pytest.raises(
        UserError, match=r"^deployment\.lost_memory: expected another rule if epsilon requires secret cohorts"
    ):
        secretly(UNDAMPED, lost_memory=rule)
    assert coordinator(UNDAMPED, "central", lost_memory=rule).lost_memory == rule


def test_a_run_of_secret_cohorts_all_of_whose_clients_are_left_out_ends() -> None:
    server = secretly(UNDAMPED)
    server.begin()
    server.finish(messages(*range(CLIENTS)), {})
    server.begin()
    with pytest.raises(UserError, match="its memory of earlier turns, got a lost memory"):
        server.finish({}, lost(*range(CLIENTS)))


def test_a_turn_with_a_secret_cohort_has_a_length_of_its_own() -> None:
    choice = DeploymentChoice()
    assert choice.seconds(secret_cohorts=True) < choice.seconds(secret_cohorts=False)
    assert DeploymentChoice(deadline=7.0).seconds(secret_cohorts=True) == 7.0


def test_an_open_turn_is_begun_again_with_the_same_cohort_model_and_order() -> None:
    """Cohorts come from the operating system, so that only the saved state can restore them."""
    method = DPFedAvg(clip_norm=1.0)
    sampling = FixedSize(10**6, 3)
    server_rules, client_rules, _ = make_agreement(method, sampling, None, SystemStreams())

    def fresh() -> Coordinator:
        return Coordinator(
            server=server_rules,
            client=client_rules,
            plan=None,
            choice=DeploymentChoice(),
            turns=5,
            digest="d",
            state=method.init_server(torch.zeros(SIZE)),
        )

    one, other = fresh(), fresh()
    first = one.begin()
    one.finish(messages(*first.cohort.tolist()), {})
    before = one.begin()
    orders: list[tuple[ClientInstructions, RunTerms]] = [one.instructions(int(i)) for i in before.cohort]
    other.restore(one.state, one.save())
    after = other.begin()
    assert np.array_equal(before.cohort, after.cohort)
    assert torch.equal(before.model, after.model)
    assert before.capacity == after.capacity
    assert [other.instructions(int(i)) for i in after.cohort] == orders
    assert other.asked_times == one.asked_times


def test_what_the_server_claims_counts_everyone_who_was_asked() -> None:
    server = coordinator(trust="local")
    for _ in range(3):
        server.begin()
        server.begin()
        server.finish(messages(0), {})
    assert server.asked_times == dict.fromkeys(range(CLIENTS), 3)


def test_terms_carry_what_the_promise_rests_on() -> None:
    method = DPFedAvg(clip_norm=1.0)
    for sampling, told in ((Poisson(50, 0.1), (0.1, 0)), (FixedSize(50, 5), (0.1, 5)), (Everyone(50), (1.0, 0))):
        plan = make_plan(
            trust="central",
            sampling=sampling,
            rounds=9,
            delta=1e-5,
            l2_bound=1.0,
            noise_multiplier=1.0,
            client_memory=False,
        )
        server, client, _ = make_agreement(method, sampling, plan, SystemStreams())
        made = Coordinator(
            server=server,
            client=client,
            plan=plan,
            choice=DeploymentChoice(),
            turns=9,
            digest="d",
            state=method.init_server(torch.zeros(SIZE)),
        )
        made.begin()
        _, terms = made.instructions(0)
        assert (terms.probability, terms.cohort_size) == pytest.approx(told)


@pytest.mark.parametrize(
    "wrong", [{"deadline": 0.0}, {"deadline": float("nan")}, {"min_participants": 0}, {"join_timeout": -1.0}]
)
def test_choices_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"deployment.{next(iter(wrong))}"):
        DeploymentChoice(**wrong)


def test_a_restarted_turn_sends_the_same_second_vector() -> None:
    server = coordinator(optimized(DPScaffold(clip_norm=1.0, server_lr=1.0), Adam()))
    server.begin()
    server.finish(messages(*range(CLIENTS)), {})
    sent = server.begin().shared
    assert sent is not None
    assert torch.equal(sent, torch.full((SIZE,), 0.003))
    again = coordinator(optimized(DPScaffold(clip_norm=1.0, server_lr=1.0), Adam()))
    again.restore(server.state, server.save())
    found = again.begin().shared
    assert found is not None
    assert torch.equal(found, sent)
    assert coordinator(UNDAMPED).begin().shared is None
