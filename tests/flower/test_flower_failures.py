"""Failing clients, unusable messages and lost memories do not end a run and do not change its privacy guarantee."""

import copy
import logging
import math

import numpy as np
import pytest
import torch
from flower_existing_app import CLIENTS, ROUNDS, app, initial_net, train, train_locally
from flower_in_process import InProcessGrid, NodeError, inside_a_run
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from clients import private_mod
from fedpriv.errors import UserError
from fedpriv.flower.apps.grid import AppGrid
from fedpriv.flower.apps.virtual_clients import ClientSeeds, InProcessClients, Population, VirtualClients
from fedpriv.flower.internals.app import empty_run
from fedpriv.flower.messages import ARRAYS, FEDPRIV, asks_node_info
from fedpriv.flower.server.attendance import Attendance
from fedpriv.flower.server.faults import message_fault, norm_limit
from fedpriv.flower.server.nodes import in_words
from fedpriv.privacy import Poisson
from fedpriv.rounds import begin_round, client_round, finish_round, make_agreement
from fedpriv.vectors import Layout
from strategies import AlphaNormEC, Clip21, DPFedAvg, Privacy

CENTRAL, LOCAL = Privacy(noise_multiplier=1.0), Privacy(noise_multiplier=1.0, trust="local")
PRIVACY = pytest.mark.parametrize("privacy", [CENTRAL, LOCAL, None], ids=["central", "local", "none"])
LR = ConfigRecord({"lr": 0.1})


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(strategy, grid, rounds=ROUNDS, **given):
    arrays = ArrayRecord(initial_net().state_dict())
    with inside_a_run():
        return strategy.start(grid, arrays, num_rounds=rounds, timeout=60.0, train_config=LR, **given)


def reference(strategy, absent, rounds=ROUNDS):
    """Return the result of the same run in plain code: clients in `absent[k]` miss round k and keep their memory."""
    method, plan = strategy.method, strategy.plan
    server, client, _ = make_agreement(method, strategy.agreement.server.sampling, plan, strategy.streams)
    net = initial_net()
    layout = Layout.of(net.state_dict())
    state = method.init_server(layout.flatten(net.state_dict()))
    memories = {i: method.init_client(layout.size) for i in range(CLIENTS)}
    for k in range(1, rounds + 1):
        broadcast = begin_round(server, state, k)
        summed = broadcast.empty_sum(client)
        for i in set(broadcast.cohort.tolist()) - absent.get(k, set()):
            net.load_state_dict(layout.unflatten(state.model))
            train_locally(net, i, 0.1)
            signal = state.model - layout.flatten(net.state_dict())
            message, memories[i] = client_round(client, i, memories[i], signal, k)
            summed.add(message)
        state = finish_round(server, state, k, summed.value)
    return state


def absent_always(clients, rounds):
    return dict.fromkeys(range(1, rounds + 1), clients)


def assert_same(strategy, state):
    for ours, theirs in zip(strategy.state, state, strict=True):
        assert torch.equal(ours, theirs)


class LossyGrid(InProcessGrid):
    """Grid that loses answers on their way back: the client has answered but does not know of the loss."""

    def __init__(self, *arguments, lose, **given):
        super().__init__(*arguments, **given)
        self.lose = lose

    def _play(self, message):
        answer, partition = super()._play(message), self.order.index(message.metadata.dst_node_id)
        return None if self.lose.get(message.metadata.group_id) == partition else answer


def failing(partition, error, rounds=None):
    def hook(asked, message):
        if (
            asked != partition
            or asks_node_info(message.content)
            or (rounds and message.metadata.group_id not in rounds)
        ):
            return True
        if error is None:
            return False
        raise error

    return hook


# ---------------------------------------------------------------- clients that fail


@PRIVACY
@pytest.mark.parametrize("error", [ValueError("no disk"), NodeError("the node is gone"), None], ids=repr)
def test_a_client_that_fails_is_a_client_whose_message_is_zero(privacy, error, caplog):
    strategy = DPFedAvg(clip_norm=0.3, privacy=privacy, num_clients=CLIENTS, seed=3)
    with caplog.at_level(logging.WARNING, "flwr"):
        start(strategy, InProcessGrid(app, CLIENTS, hook=failing(3, error)))
    assert_same(strategy, reference(strategy, absent_always({3}, ROUNDS)))
    assert f"round {ROUNDS}: 1 of 5 clients fail: client 3: " in caplog.text


@PRIVACY
@pytest.mark.parametrize(
    "make",
    [
        lambda **given: AlphaNormEC(alpha=0.5, beta=0.2, server_lr=0.3, damping=0.1, **given),
        lambda **given: AlphaNormEC(alpha=0.5, beta=0.2, server_lr=0.3, **given),
        lambda **given: Clip21(clip_norm=0.3, **given),
    ],
    ids=["damped", "alpha-normec", "clip21"],
)
def test_a_client_whose_answer_was_lost_drops_the_memory_of_it(make, privacy):
    strategy = make(privacy=privacy, num_clients=CLIENTS, seed=3)
    start(strategy, LossyGrid(app, CLIENTS, lose={"1": 4, "2": 2, "3": 2}), rounds=5)
    assert_same(strategy, reference(strategy, {1: {4}, 2: {2}, 3: {2}}, rounds=5))
    assert strategy.attendance.last_round == dict.fromkeys(range(CLIENTS), 5)
    assert strategy.attendance.resets == 0


def test_a_client_that_fails_in_evaluation_ends_no_run_and_the_others_metrics_are_averaged(caplog):
    def hook(partition, message):
        if message.metadata.message_type == "evaluate" and partition == 1:
            raise ValueError("no disk")
        return True

    strategy = DPFedAvg(num_clients=CLIENTS, evaluate=True, privacy=CENTRAL)
    with caplog.at_level(logging.WARNING, "flwr"):
        result = start(strategy, InProcessGrid(app, CLIENTS, hook=hook), rounds=2)
    assert set(result.evaluate_metrics_clientapp) == {1, 2}
    assert strategy.result is result
    assert "evaluation after round 1: 1 of 5 clients fail: client 1: no disk" in caplog.text


def test_more_failures_than_the_stated_share_end_the_run_by_name():
    hook = failing(3, ValueError("no disk"), ("2",))
    for tolerated, ends in ((0.0, True), (0.19, True), (0.2, False), (1.0, False), (None, False)):
        strategy = DPFedAvg(num_clients=CLIENTS, max_failures=tolerated)
        if not ends:
            start(strategy, InProcessGrid(app, CLIENTS, hook=hook), rounds=2)
            continue
        expected = r"round 2: expected an answer from each of 5 clients, got client 3: no disk\."
        with pytest.raises(UserError, match=expected):
            start(strategy, InProcessGrid(app, CLIENTS, hook=hook), rounds=2)


def test_half_of_a_rounds_clients_may_fail_unless_somebody_says_otherwise():
    """Two of five fail in round 1, and three in round 2."""

    def hook(partition, message):
        return asks_node_info(message.content) or partition > int(message.metadata.group_id)

    strategy = DPFedAvg(num_clients=CLIENTS)
    expected = (
        r"round 2: expected answers from at least 3 of 5 clients, got client 0: no answer .* \(also client 1, 2\)"
    )
    with pytest.raises(UserError, match=expected):
        start(strategy, InProcessGrid(app, CLIENTS, hook=hook))
    assert strategy.attendance.last_round == {2: 1, 3: 1, 4: 1}


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_of_failures_is_a_share(share):
    with pytest.raises(UserError, match="max_failures: expected a share from 0 to 1"):
        DPFedAvg(max_failures=share)


def test_equal_reasons_are_told_once():
    lines = {3: "client 3: no disk", 5: "client 5: no disk", 6: "client 6: no net", 9: "no more", 11: "at all", 12: "x"}
    assert in_words(lines) == "client 3: no disk (also client 5); client 6: no net; no more (and 2 more)"


# ---------------------------------------------------------------- unusable messages


def altering(alter, *partitions):
    """Return the app with a mod before the private one that changes the messages of the named clients."""

    def outermost(message, context, call_next):
        answer = call_next(message, context)
        if not asks_node_info(message.content) and context.node_config["partition-id"] in partitions:
            alter(answer)
        return answer

    changed = ClientApp(mods=[outermost, private_mod])
    changed.train()(train)
    return changed


def each(change):
    def alter(answer):
        record = answer.content.array_records[ARRAYS]
        answer.content.array_records[ARRAYS] = ArrayRecord({k: Array(change(v.numpy())) for k, v in record.items()})

    return alter


def garbage(answer):
    answer.content.array_records[ARRAYS]["scale"].data = b"no array"


def without_arrays(answer):
    del answer.content[ARRAYS]


def of_another_kind(answer):
    answer.content[ARRAYS] = MetricRecord({"scale": 1.0})


BAD_MESSAGES = {
    "nan": each(lambda x: np.full_like(x, math.nan)),
    "infinity": each(lambda x: np.full_like(x, math.inf)),
    "huge": each(lambda x: np.full_like(x, 1e29)),
    "beyond its bound": each(lambda x: np.full_like(x, 50.0)),
    "float64": each(lambda x: x.astype(np.float64)),
    "other shapes": each(lambda x: x.reshape(1, -1)),
    "garbage": garbage,
    "no arrays": without_arrays,
    "no such record": of_another_kind,
}


@PRIVACY
@pytest.mark.parametrize("bad", BAD_MESSAGES)
def test_a_message_that_cannot_be_used_is_no_answer(bad, privacy, caplog):
    strategy = AlphaNormEC(alpha=0.5, beta=0.2, privacy=privacy, num_clients=CLIENTS, seed=3)
    with caplog.at_level(logging.WARNING, "flwr"):
        start(strategy, InProcessGrid(altering(BAD_MESSAGES[bad], 1), CLIENTS), rounds=2)
    assert_same(strategy, reference(strategy, {1: {1}, 2: {1}}, rounds=2))
    assert "round 2: 1 of 5 clients fail: " in caplog.text
    assert torch.isfinite(strategy.state.model).all()


@PRIVACY
def test_an_honest_message_is_never_at_fault(privacy):
    strategy = DPFedAvg(clip_norm=0.1, privacy=privacy, num_clients=CLIENTS)
    start(strategy, InProcessGrid(app, CLIENTS), rounds=1)
    rules = strategy.agreement.client
    for seed in range(50):
        signal = 1e6 * torch.randn(20_000, generator=torch.Generator().manual_seed(seed))
        message, _ = client_round(rules, seed, rules.method.init_client(20_000), signal, 1)
        assert message_fault(message, rules, 20_000) == ""
    limit = norm_limit(rules, 20_000)
    assert limit <= 1.01 * (0.1 + rules.noise_stddev * (math.sqrt(20_000) + 12.0))
    longer = torch.full((20_000,), 1.001 * limit / math.sqrt(20_000))
    assert "expected at most" in message_fault(longer, rules, 20_000)


def test_what_another_node_answers_does_not_count():
    """Node 0 answers the other nodes' messages before they do, with a message or with an error."""

    class Forging(InProcessGrid):
        def send_and_receive(self, messages, *, timeout=None):
            answers = list(super().send_and_receive(messages, timeout=timeout))
            forged = []
            for answer in answers if not asks_node_info(self.seen[-1].content) else []:
                error = Message(Error(code=2, reason="forged"), reply_to=self.seen[-1])
                for made in (copy.copy(answer), error):
                    made.__dict__["_metadata"] = copy.copy(answer.metadata)
                    made.metadata.__dict__["_src_node_id"] = self.order[0]
                    forged += [made] if answer.metadata.src_node_id != self.order[0] else []
            return [*forged, *answers]

    strategy = DPFedAvg(num_clients=CLIENTS, max_failures=0.0, seed=3)
    start(strategy, Forging(app, CLIENTS))
    assert_same(strategy, reference(strategy, {}))


# ---------------------------------------------------------------- nothing is lost


def test_a_run_that_ends_with_an_error_keeps_the_model_of_the_last_good_round(tmp_path, caplog):
    def hook(partition, message):
        return message.metadata.group_id != "3" or partition == 0

    (tmp_path / "fedpriv-model-after-round-2.safetensors").write_text("somebody's")
    strategy = DPFedAvg(privacy=CENTRAL, num_clients=CLIENTS, seed=3)
    with caplog.at_level(logging.ERROR, "flwr"), pytest.raises(UserError, match="round 3: "):
        start(strategy, InProcessGrid(app, CLIENTS, hook=hook))
    layout = Layout.of(initial_net().state_dict())
    model = layout.unflatten(reference(strategy, {}, rounds=2).model)
    stored = load_file(tmp_path / "fedpriv-model-after-round-2-2.safetensors")
    kept = strategy.result.arrays.to_torch_state_dict()
    assert stored.keys() == kept.keys() == model.keys()
    for name, value in model.items():
        assert torch.equal(stored[name], value)
        assert torch.equal(kept[name], value)
    assert f"is in {tmp_path / 'fedpriv-model-after-round-2-2.safetensors'}" in caplog.text
    assert (tmp_path / "fedpriv-model-after-round-2.safetensors").read_text() == "somebody's"


@pytest.mark.parametrize("error", [KeyError("accuracy"), KeyboardInterrupt()], ids=repr)
def test_whatever_ends_a_run_the_model_is_kept(error, tmp_path):
    def evaluate(server_round, arrays):  # noqa: ARG001
        if server_round == 2:
            raise error

    strategy = DPFedAvg(num_clients=CLIENTS)
    strategy.rescue_folder = tmp_path / "here"
    strategy.rescue_folder.mkdir()
    with pytest.raises(type(error)):
        start(strategy, InProcessGrid(app, CLIENTS), evaluate_fn=evaluate)
    (file,) = strategy.rescue_folder.iterdir()
    assert file.name == "fedpriv-model-after-round-2.safetensors"
    assert set(strategy.result.train_metrics_clientapp) == {1, 2}


def test_a_run_without_a_finished_round_leaves_nothing(tmp_path):
    with pytest.raises(UserError):
        start(DPFedAvg(num_clients=CLIENTS, max_failures=0.0), InProcessGrid(app, CLIENTS, hook=failing(3, None)))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_hide_why_the_run_ended(tmp_path):
    strategy = DPFedAvg(num_clients=CLIENTS, max_failures=0.0)
    strategy.rescue_folder = tmp_path / "none"
    with pytest.raises(UserError, match="round 2: "):
        start(strategy, InProcessGrid(app, CLIENTS, hook=failing(3, None, ("2",))))


def diverging(*partitions):
    diverged = ClientApp(mods=[private_mod])

    @diverged.train()
    def _train(message, context):
        answer = train(message, context)
        if context.node_config["partition-id"] in partitions:
            arrays = {k: t * math.nan for k, t in answer.content.array_records["arrays"].to_torch_state_dict().items()}
            answer.content["arrays"] = ArrayRecord(arrays)
        return answer

    return diverged


@PRIVACY
def test_a_run_whose_updates_were_all_not_finite_ends_as_an_error_and_keeps_its_model(privacy, tmp_path, caplog):
    strategy = DPFedAvg(privacy=privacy, num_clients=CLIENTS, seed=1)
    with pytest.raises(
        UserError, match=r"the run: expected updates of finite numbers, got 10 updates with values that are not"
    ):
        start(strategy, InProcessGrid(diverging(*range(CLIENTS)), CLIENTS), rounds=2)
    assert "round 1: 5 updates were not finite" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["fedpriv-model-after-round-2.safetensors"]
    start(
        DPFedAvg(privacy=privacy, num_clients=CLIENTS, seed=1), InProcessGrid(diverging(0, 1, 2, 3), CLIENTS), rounds=2
    )


def test_updates_that_are_all_zero_are_said(caplog):
    lazy = ClientApp(mods=[private_mod])
    lazy.train()(lambda message, _: Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message))
    start(DPFedAvg(num_clients=CLIENTS), InProcessGrid(lazy, CLIENTS), rounds=2)
    assert caplog.text.count("all updates are zero") == 1


# ---------------------------------------------------------------- secret cohorts


def amplified(**given):
    return AlphaNormEC(privacy=CENTRAL, cohort=Poisson(CLIENTS, 0.5), **given)


def test_failures_in_secret_cohorts_end_no_run_and_show_in_no_model():
    strategy = amplified(seed=4)
    start(strategy, InProcessGrid(app, CLIENTS, hook=lambda p, m: asks_node_info(m.content) or p == 0), rounds=8)
    others = set(range(1, CLIENTS))
    assert strategy.plan is not None and strategy.plan.amplification  # noqa: PT018
    assert_same(strategy, reference(strategy, absent_always(others, 8), rounds=8))


def test_a_share_of_failures_is_refused_where_it_would_show_who_was_away():
    with pytest.raises(UserError, match=r"max_failures: expected None .*a run that ends for lack of answers shows"):
        start(amplified(max_failures=0.5), InProcessGrid(app, CLIENTS))
    start(amplified(max_failures=0.5, seed=4), InProcessGrid(app, CLIENTS), rounds=1)


def test_an_app_that_fails_everywhere_ends_even_a_run_of_secret_cohorts():
    grid = InProcessGrid(app, CLIENTS, hook=lambda _, message: asks_node_info(message.content))
    with pytest.raises(UserError, match=r"round \d+: expected an answer from any client, got client \d: no answer"):
        start(amplified(seed=4), grid, rounds=50)
    assert len({m.metadata.dst_node_id for m in grid.seen if not asks_node_info(m.content)}) == CLIENTS


def test_a_run_in_which_no_message_counted_is_an_error():
    promise = Privacy(noise_multiplier=1.0, delta=1e-12)
    strategy = AlphaNormEC(privacy=promise, cohort=Poisson(CLIENTS, 1e-9), seed=4)
    with pytest.raises(
        UserError, match=r"the run: expected messages that count, got 0 messages in 3 rounds; no client was"
    ):
        start(strategy, InProcessGrid(app, CLIENTS), rounds=3)


# ---------------------------------------------------------------- lost memories


def restarting(*lost):
    """Return a hook that drops the state of some nodes before some rounds."""
    grid = InProcessGrid(app, CLIENTS)

    def restart(partition, message):
        if (partition, message.metadata.group_id) in lost:
            grid.contexts[message.metadata.dst_node_id].state = RecordDict()
        return True

    grid.hook = restart
    return grid


def test_a_lost_memory_makes_all_memories_begin_again_where_the_method_says_so(caplog):
    strategy = AlphaNormEC(num_clients=CLIENTS, privacy=CENTRAL, seed=3)
    start(strategy, restarting((2, "3")), rounds=3)
    before = reference(strategy, {}, rounds=2)
    assert torch.equal(strategy.state.model, before.model)
    assert not strategy.state._asdict()["memory"].any()
    assert strategy.attendance.last_round == {}
    assert "round 3: memories are lost" in caplog.text
    strategy = AlphaNormEC(num_clients=CLIENTS, privacy=CENTRAL, seed=3)
    start(strategy, restarting((2, "3")), rounds=5)
    assert strategy.attendance.last_round == dict.fromkeys(range(CLIENTS), 5)
    assert not torch.equal(strategy.state.model, before.model)


def test_a_client_that_loses_its_memory_again_is_left_out():
    strategy = Clip21(num_clients=CLIENTS)
    grid = restarting((2, "2"), (2, "4"))
    start(strategy, grid, rounds=5)
    assert strategy.attendance.left_out == {2}
    asked = [m.metadata.group_id for m in grid.seen if m.metadata.dst_node_id == grid.order[2]]
    assert asked[1:] == ["1", "2", "3", "4"]


def test_a_lost_memory_that_fades_is_only_its_clients_matter():
    strategy = AlphaNormEC(damping=0.2, num_clients=CLIENTS, seed=3)
    start(strategy, restarting((2, "3")), rounds=4)
    assert strategy.attendance.resets == 0
    assert strategy.attendance.last_round == dict.fromkeys(range(CLIENTS), 4)


def test_a_lost_memory_in_a_secret_cohort_does_not_show():
    """A reset of all memories would reveal in the model that this client was asked in this round."""
    strategy = amplified(seed=4)
    lost = [(2, str(k)) for k in range(1, 9)]
    start(strategy, restarting(*lost), rounds=8)
    cohorts = [begin_round(strategy.agreement.server, strategy.state, k).cohort.tolist() for k in range(1, 9)]
    mine = [k for k, cohort in enumerate(cohorts, 1) if 2 in cohort]
    assert len(mine) > 2
    assert strategy.attendance.left_out == {2}
    assert strategy.attendance.resets == 0
    assert_same(strategy, reference(strategy, {k: {2} for k in mine[1:]}, rounds=8))


def test_a_run_all_of_whose_clients_are_left_out_ends():
    attendance = Attendance(population=1, rounds=5, max_failures=None, secret=True, lost_memory="reset-all")
    assert attendance.judge(1, [0], {})
    attendance.count(1, [0])
    with pytest.raises(UserError, match="clients: expected memories of earlier rounds, got lost memories on all"):
        attendance.judge(2, [], {0: "client 0: lost"}, [0])


def test_a_node_that_comes_back_under_another_id_is_recognized():
    grid = InProcessGrid(app, CLIENTS)
    strategy = DPFedAvg(num_clients=CLIENTS, seed=3, privacy=CENTRAL)

    def restart(partition, message):
        if partition == 0 and message.metadata.group_id == "1":
            old = grid.order[3]
            grid.order[3] = new = old + 1
            grid.contexts[new] = grid.contexts.pop(old)
        return True

    grid.hook = restart
    grid.get_node_ids = lambda: list(grid.order)
    missing = {1: {3}}
    play = grid._play
    grid._play = lambda message: play(message) if message.metadata.dst_node_id in grid.contexts else None
    start(strategy, grid, rounds=3)
    assert_same(strategy, reference(strategy, missing, rounds=3))
    assert asks_node_info(grid.seen[-2 * CLIENTS - 1].content)


# ---------------------------------------------------------------- waits and hints


def app_grid(size):
    population = Population(1, size, {}, ClientSeeds(1, 2, 3))
    return AppGrid(empty_run(1), population.nodes, InProcessClients(VirtualClients(app, population)))


@pytest.mark.parametrize("clients", [3, 7])
def test_a_grid_whose_nodes_are_all_there_is_not_waited_for(clients, monkeypatch):
    monkeypatch.setattr("fedpriv.flower.server.nodes._POLL_SECONDS", "no time to wait")
    expected = rf"Flower nodes: expected {clients}, .* got 5\. Start it with --clients {clients}, .*num_clients=5"
    with pytest.raises(UserError, match=expected):
        start(DPFedAvg(num_clients=clients), app_grid(5))
    start(DPFedAvg(), app_grid(2), rounds=1)


@pytest.mark.parametrize("clients", [0, -1, 2.5, True])
def test_a_number_of_clients_is_one(clients):
    with pytest.raises(UserError, match="num_clients: expected a whole number from 1, got"):
        DPFedAvg(num_clients=clients)
    DPFedAvg(num_clients=np.int64(3))  # type: ignore[arg-type]


def test_the_order_names_the_last_round_that_counted():
    grid = LossyGrid(app, CLIENTS, lose={"2": 1})
    start(AlphaNormEC(num_clients=CLIENTS), grid, rounds=3)
    told = {
        (m.content[FEDPRIV]["client"], m.content[FEDPRIV]["round"]): m.content[FEDPRIV]["last_round"]
        for m in grid.seen
        if not asks_node_info(m.content)
    }
    assert told[1, 3] == 1
    assert told[0, 3] == 2
