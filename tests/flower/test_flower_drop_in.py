"""An existing app becomes private with the mod in its ClientApp and the strategy in its ServerApp."""

import logging
import math

import pytest
import torch
from flower_existing_app import CLIENTS, ROUNDS, app, initial_net, load_data, main, train, train_locally
from flower_in_process import InProcessGrid, NodeError, inside_a_run
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from clients import private_mod
from fedpriv.errors import UserError
from fedpriv.flower.messages import ARRAYS, FEDPRIV, asks_node_info
from fedpriv.methods import DIFF2, AdaptiveBound, DPScaffold, FedSpeed
from fedpriv.methods import AlphaNormEC as AlphaNormECRules
from fedpriv.methods import DPFedAvg as DPFedAvgRules
from fedpriv.methods.server_optimizers import Adam
from fedpriv.privacy import Everyone, ExampleTerms, FixedSize, Poisson, make_plan
from fedpriv.rounds import begin_round, client_round, finish_round, make_agreement, record_bound
from fedpriv.streams import SeededStreams, SystemStreams
from fedpriv.vectors import Layout
from strategies import (
    AlphaNormEC,
    CenteredClip,
    Clip21,
    DPFedAvg,
    FedAlphaNormEC,
    MethodStrategy,
    NormalizedSGD,
    Privacy,
)

LOCAL = Privacy(epsilon=20.0, trust="local")
LR = ConfigRecord({"lr": 0.1})


def start(strategy, grid, rounds=ROUNDS, timeout=5.0, arrays=None):
    arrays = ArrayRecord(initial_net().state_dict()) if arrays is None else arrays
    with inside_a_run():
        return strategy.start(grid, arrays, num_rounds=rounds, timeout=timeout, train_config=LR)


def reference(strategy, rounds=ROUNDS):
    """Return the result of the same run in plain code: memories in a dictionary, signals x - x_local."""
    method, plan = strategy.method, strategy.plan
    server, client, _ = make_agreement(method, strategy.agreement.server.sampling, plan, strategy.streams)
    net = initial_net()
    layout = Layout.of(net.state_dict())
    state = method.init_server(layout.flatten(net.state_dict()))
    memories = {i: method.init_client(layout.size) for i in range(CLIENTS)}
    for k in range(1, rounds + 1):
        broadcast = begin_round(server, state, k)
        summed = broadcast.empty_sum(client)
        for i in broadcast.cohort.tolist():
            net.load_state_dict(layout.unflatten(state.model))
            train_locally(net, i, 0.1)
            signal = state.model - layout.flatten(net.state_dict())
            message, memories[i] = client_round(client, i, memories[i], signal, k, shared=broadcast.shared)
            summed.add(message)
        state = finish_round(server, state, k, summed.value)
    return state


@pytest.mark.parametrize("cohort", [Everyone(CLIENTS), Poisson(CLIENTS, 0.5)], ids=lambda c: c.name)
@pytest.mark.parametrize(
    "make",
    [
        lambda **given: AlphaNormEC(alpha=0.5, beta=0.2, server_lr=0.3, damping=0.1, **given),
        lambda **given: AlphaNormEC(memory="sent", **{**given, "privacy": LOCAL}),
        lambda **given: NormalizedSGD(alpha=0.5, **given),
        lambda **given: Clip21(clip_norm=0.3, **given),
        lambda **given: DPFedAvg(clip_norm=0.3, **given),
        lambda **given: CenteredClip(clip_norm=0.1, **given),
        lambda **given: Clip21(adaptive=AdaptiveBound(rate=0.5), **given),
        lambda **given: FedAlphaNormEC(alpha=0.05, beta=0.02, server_optimizer=Adam(tau=0.1), **given),
    ],
    ids=[
        "alpha-normec",
        "sent-memory",
        "normalized-sgd",
        "clip21",
        "dp-fedavg",
        "centered-clip",
        "adaptive",
        "fed-alpha-normec with adam",
    ],
)
@pytest.mark.parametrize("privacy", [Privacy(epsilon=8.0), LOCAL, None], ids=["central", "local", "none"])
@pytest.mark.sampled
def test_an_apps_run_is_the_method_on_its_updates_with_memories_kept(make, privacy, cohort):
    strategy = make(privacy=privacy, cohort=cohort, seed=3)
    result = start(strategy, InProcessGrid(app, CLIENTS))
    for ours, theirs in zip(strategy.state, reference(strategy), strict=True):
        assert torch.equal(ours, theirs)
    state = strategy.state.model
    arrays = result.arrays.to_torch_state_dict()
    assert torch.equal(torch.cat([t.reshape(-1) for t in arrays.values()]), state)
    assert arrays["scale"].shape == ()


def test_two_lines_make_an_app_private(caplog):
    grid = InProcessGrid(app, CLIENTS)
    with inside_a_run(), caplog.at_level(logging.INFO, "flwr"):
        strategy = main(grid)
    assert strategy.plan is not None
    assert strategy.plan.epsilon <= 8.0
    assert strategy.plan.rounds == ROUNDS
    assert strategy.statement
    assert strategy.streams == SystemStreams()
    trained = [message for message in grid.seen if not asks_node_info(message.content)]
    assert len(trained) == CLIENTS * ROUNDS
    assert all("seed" not in message.content[FEDPRIV] for message in trained)


def test_nothing_but_the_bounded_message_leaves_a_client_in_a_private_run():
    grid = InProcessGrid(app, CLIENTS)
    start(AlphaNormEC(privacy=Privacy(epsilon=8.0), num_clients=CLIENTS), grid)
    for answer in grid.answers[CLIENTS:]:
        assert list(answer.content) == [ARRAYS]
        values = answer.content.array_records[ARRAYS].to_torch_state_dict().values()
        assert math.sqrt(sum(float(v.double().square().sum()) for v in values)) <= 1.0


def test_a_run_without_privacy_passes_the_apps_metrics_on_and_averages_them():
    result = start(DPFedAvg(clip_norm=100.0, num_clients=CLIENTS), InProcessGrid(app, CLIENTS), rounds=1)
    losses = [train_locally(initial_net(), i, 0.1) for i in range(CLIENTS)]
    assert result.train_metrics_clientapp[1]["train_loss"] == pytest.approx(sum(losses) / CLIENTS)


def test_federated_evaluation_is_off_until_asked_for():
    off, on = InProcessGrid(app, CLIENTS), InProcessGrid(app, CLIENTS)
    assert not start(DPFedAvg(num_clients=CLIENTS), off, rounds=1).evaluate_metrics_clientapp
    strategy = DPFedAvg(num_clients=CLIENTS, evaluate=True)
    metrics = start(strategy, on, rounds=1).evaluate_metrics_clientapp[1]
    net = initial_net()
    net.load_state_dict(Layout.of(net.state_dict()).unflatten(strategy.state.model))
    losses = [nn.functional.mse_loss(net(x), y).item() for x, y in map(load_data, range(CLIENTS))]
    assert metrics["loss"] == pytest.approx(sum(losses) / CLIENTS)


def spoiled(*partitions):
    """Return the app with diverging training on the named clients."""
    broken = ClientApp(mods=[private_mod])

    @broken.train()
    def _train(message, context):
        answer = train(message, context)
        if context.node_config["partition-id"] in partitions:
            arrays = answer.content.array_records["arrays"].to_torch_state_dict()
            arrays["out.bias"] = torch.full_like(arrays["out.bias"], math.nan)
            answer.content["arrays"] = ArrayRecord(arrays)
        return answer

    return broken


def test_an_update_that_is_not_finite_counts_as_nothing_and_is_counted(caplog):
    strategy = DPFedAvg(clip_norm=0.3, num_clients=CLIENTS, seed=1)
    with caplog.at_level(logging.WARNING, "flwr"):
        start(strategy, InProcessGrid(spoiled(1, 3), CLIENTS), rounds=1)
    assert strategy.total.non_finite == 2
    assert strategy.total.messages == CLIENTS
    assert "2 updates were not finite" in caplog.text
    others = DPFedAvg(clip_norm=0.3, num_clients=CLIENTS, seed=1)
    start(others, InProcessGrid(app, CLIENTS), rounds=1)
    assert torch.isfinite(strategy.state.model).all()
    assert not torch.equal(strategy.total.sum, others.total.sum)


def test_the_mod_lets_messages_pass_that_are_not_training():
    grid = InProcessGrid(app, 1)
    with inside_a_run():
        node = next(iter(grid.contexts))
        content = RecordDict({"arrays": ArrayRecord(initial_net().state_dict())})
        (answer,) = grid.send_and_receive([Message(content, node, "evaluate")])
    assert "loss" in answer.content["metrics"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (RecordDict({"arrays": ArrayRecord(initial_net().state_dict())}), "Use a strategy of fedpriv"),
        (RecordDict({}), "expected a record 'fedpriv'"),
    ],
)
def test_the_mod_refuses_messages_of_other_strategies(content, reason):
    grid = InProcessGrid(app, 1)
    with inside_a_run():
        node = next(iter(grid.contexts))
        (answer,) = grid.send_and_receive([Message(content, node, "train")])
    assert answer.has_error()
    assert reason in answer.error.reason


def answering(content_of):
    other = ClientApp(mods=[private_mod])

    @other.train()
    def _train(message, context):  # noqa: ARG001
        return Message(content_of(message), reply_to=message)

    return other


@pytest.mark.parametrize(
    ("content_of", "reason"),
    [
        (lambda _: RecordDict({"metrics": MetricRecord({"loss": 1.0})}), "expected one ArrayRecord, got 0 records"),
        (lambda m: RecordDict({"a": m.content["arrays"], "b": m.content["arrays"]}), "one ArrayRecord, got a, b"),
        (lambda _: RecordDict({"arrays": ArrayRecord(nn.Linear(2, 2).state_dict())}), "the same model"),
    ],
)
def test_the_mod_refuses_answers_that_are_no_update_of_the_model(content_of, reason):
    with pytest.raises(ValueError, match=f"round 1: .*client 0: private_mod: .*{reason}"):
        start(DPFedAvg(num_clients=2), InProcessGrid(answering(content_of), 2))


def test_an_app_whose_updates_bound_no_examples_takes_part_in_no_run_that_protects_them():
    terms = ExampleTerms(clip=1.0, examples=100, declared=True)

    def agreed(population, rounds):
        method, cohort = DPFedAvgRules(), Everyone(population)
        known = {"trust": "local", "sampling": cohort, "rounds": rounds, "delta": 1e-5, "noise_multiplier": 1.0}
        plan = make_plan(**known, l2_bound=1.0, record=record_bound(method, terms))
        return make_agreement(method, cohort, plan, SeededStreams(1))

    with pytest.raises(ValueError, match="an app that bounds no examples"):
        start(MethodStrategy(agreed, num_clients=2), InProcessGrid(app, 2))


def test_an_app_takes_part_in_no_run_whose_method_chooses_its_own_models():
    def agreed(population, _):
        return make_agreement(DIFF2(), Everyone(population), None, SeededStreams(1))

    with pytest.raises(ValueError, match=r"a method that bounds an app's update, got diff2"):
        start(MethodStrategy(agreed, num_clients=2), InProcessGrid(app, 2))


def test_a_client_app_without_the_mod_is_found_out_before_training():
    bare = ClientApp()
    bare.train()(lambda message, context: Message(message.content, reply_to=message))  # noqa: ARG005
    with pytest.raises(ValueError, match=r"node \d+: expected a ClientApp with private_mod"):
        start(DPFedAvg(num_clients=2), InProcessGrid(bare, 2))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False)])
def test_a_model_with_batch_statistics_is_refused_with_what_to_do(layer):
    arrays = ArrayRecord(nn.Sequential(nn.Linear(3, 3), layer).state_dict())
    with pytest.raises(ValueError, match=r"got the buffers 1.running_mean.*Replace BatchNorm by GroupNorm"):
        start(DPFedAvg(num_clients=2), InProcessGrid(app, 2), arrays=arrays)


def test_a_model_without_real_numbers_is_refused():
    arrays = ArrayRecord({"steps": torch.tensor([3])})
    with pytest.raises(ValueError, match="array steps: expected floating point numbers, got int64"):
        start(DPFedAvg(num_clients=2), InProcessGrid(app, 2), arrays=arrays)


def test_a_node_that_lost_its_memory_ends_a_run_that_tolerates_nothing():
    grid = InProcessGrid(app, CLIENTS)

    def restart(partition, message):
        if partition == 2 and message.metadata.group_id == "3":
            grid.contexts[message.metadata.dst_node_id].state = RecordDict()
        return True

    grid.hook = restart
    with pytest.raises(
        ValueError, match=r"round 3: .*client 2: .*memory of client 2: expected .* round 2, got a lost memory"
    ):
        start(AlphaNormEC(num_clients=CLIENTS, max_failures=0.0), grid)


def test_a_lost_memory_is_no_matter_to_a_method_without_one():
    grid = InProcessGrid(app, CLIENTS)

    def restart(_, message):
        grid.contexts[message.metadata.dst_node_id].state = RecordDict()
        return True

    grid.hook = restart
    start(DPFedAvg(num_clients=CLIENTS), grid)


def failing(partition, error):
    def hook(asked, message):
        if asked == partition and not asks_node_info(message.content):
            if error is None:
                return False
            raise error
        return True

    return hook


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("no disk"), "client 3: no disk"),
        (NodeError("the node is gone"), "client 3: the node is gone"),
        (None, "client 3: no answer within 5 s"),
    ],
)
def test_a_client_that_fails_ends_a_run_that_tolerates_nothing_by_name(error, reason):
    strategy = AlphaNormEC(num_clients=CLIENTS, max_failures=0.0)
    with pytest.raises(ValueError, match=f"round 1: expected an answer from each of 5 clients, got {reason}"):
        start(strategy, InProcessGrid(app, CLIENTS, hook=failing(3, error)))


def test_nodes_that_do_not_join_are_waited_for_and_then_missed():
    with pytest.raises(ValueError, match=r"Flower nodes: expected 9, .* got 5 after 1 s.*num-supernodes=9"):
        start(DPFedAvg(num_clients=9, join_timeout=0.6), InProcessGrid(app, CLIENTS))


def test_without_a_number_all_nodes_that_join_take_part(monkeypatch):
    monkeypatch.setattr("fedpriv.flower.server.nodes._SETTLED_SECONDS", 0.3)
    strategy = DPFedAvg()
    start(strategy, InProcessGrid(app, CLIENTS), rounds=1)
    assert strategy.agreement.server.sampling == Everyone(CLIENTS)


def test_nodes_without_partition_ids_are_numbered_by_node_id():
    grid = InProcessGrid(answering(lambda m: RecordDict({"arrays": m.content["arrays"]})), 4, partition_ids=False)
    start(DPFedAvg(num_clients=4), grid, rounds=1)
    trained = [message.metadata.dst_node_id for message in grid.seen if not asks_node_info(message.content)]
    assert trained == sorted(grid.contexts)


def test_partition_ids_that_are_not_one_for_each_client_are_refused():
    grid = InProcessGrid(app, 3)
    grid.contexts[grid.order[2]].node_config["partition-id"] = 1
    with pytest.raises(ValueError, match="partition-id of the nodes: expected each of 0 to 2 once"):
        start(DPFedAvg(num_clients=3), grid)


def test_the_seed_goes_to_clients_only_where_they_draw_noise():
    for privacy, seeded in ((Privacy(epsilon=8.0), False), (LOCAL, True)):
        grid = InProcessGrid(app, CLIENTS)
        start(AlphaNormEC(privacy=privacy, num_clients=CLIENTS, seed=3), grid, rounds=1)
        assert all(("seed" in m.content[FEDPRIV]) == seeded for m in grid.seen if not asks_node_info(m.content))


def test_runs_without_a_seed_differ():
    models = []
    for _ in range(2):
        strategy = DPFedAvg(privacy=Privacy(epsilon=8.0), num_clients=CLIENTS)
        start(strategy, InProcessGrid(app, CLIENTS), rounds=1)
        models.append(strategy.state.model)
    assert not torch.equal(*models)


def test_double_precision_arrays_come_back_in_double_precision():
    doubled = answering(lambda m: RecordDict({"arrays": m.content["arrays"]}))
    arrays = ArrayRecord({k: v.double() for k, v in initial_net().state_dict().items()})
    result = start(DPFedAvg(num_clients=2), InProcessGrid(doubled, 2), rounds=1, arrays=arrays)
    assert {array.dtype for array in result.arrays.values()} == {"float64"}


def test_hyperparameters_are_checked_when_the_strategy_is_made():
    with pytest.raises(ValueError, match=r"AlphaNormEC.alhpa: .*Did you mean 'alpha'"):
        AlphaNormEC(alhpa=1.0)
    with pytest.raises(ValueError, match=r"method.alpha: expected a positive number"):
        AlphaNormEC(alpha=-1.0)
    with pytest.raises(ValueError, match="num_clients: expected the cohort's population 10"):
        AlphaNormEC(cohort=Poisson(10, 0.5), num_clients=5)
    assert AlphaNormEC(alpha=2, memory="sent").method == AlphaNormECRules(alpha=2.0, memory="sent")


def test_sent_memory_needs_noise_at_the_clients():
    with pytest.raises(ValueError, match=r"method.memory: expected privacy.trust = \"local\""):
        start(AlphaNormEC(memory="sent", privacy=Privacy(epsilon=8.0), num_clients=2), InProcessGrid(app, 2))


def test_streams_follow_the_seed():
    assert AlphaNormEC(seed=4).streams == SeededStreams(4)
    assert AlphaNormEC().streams == SystemStreams()


@pytest.mark.parametrize("changed", ["settings", "first model", "nothing"])
def test_two_runs_with_one_seed_share_no_noise_if_settings_or_the_first_model_differ(changed):
    def end(lr, net):
        strategy = DPFedAvg(privacy=Privacy(noise_multiplier=1e4), num_clients=CLIENTS, seed=1)
        with inside_a_run():
            strategy.start(
                InProcessGrid(app, CLIENTS),
                ArrayRecord(net.state_dict()),
                num_rounds=1,
                timeout=5.0,
                train_config=settings.setdefault(lr, ConfigRecord({"lr": lr})),
            )
        return strategy.state.model

    settings = {}  # Flower writes the number of the round into its argument
    other = initial_net()
    if changed == "first model":
        torch.nn.init.zeros_(other.scale)
    apart = end(0.1, initial_net()) - end(0.2 if changed == "settings" else 0.1, other)
    noise = 1e4 / CLIENTS * math.sqrt(len(apart))
    assert (float(apart.norm()) > 0.3 * noise) == (changed != "nothing")


def test_a_strategy_starts_once_because_two_runs_cost_twice():
    strategy = DPFedAvg(privacy=Privacy(epsilon=8.0), num_clients=CLIENTS, seed=1)
    start(strategy, InProcessGrid(app, CLIENTS), rounds=1)
    before = strategy.state.model.clone()
    with pytest.raises(UserError, match="a second"):
        start(strategy, InProcessGrid(app, CLIENTS), rounds=1)
    assert torch.equal(strategy.state.model, before)


def swelling(factor):
    """Return an app with an outermost mod that changes the bounded message."""

    def swell(message, context, call_next):
        answer = call_next(message, context)
        if ARRAYS in answer.content.array_records:
            record = answer.content.array_records[ARRAYS]
            tensors = {name: torch.from_numpy(array.numpy()) * factor for name, array in record.items()}
            answer.content.array_records[ARRAYS] = ArrayRecord(tensors)
        return answer

    changed = ClientApp(mods=[swell, private_mod])
    changed.train()(train)
    return changed


@pytest.mark.parametrize("factor", [1000.0, math.nan, math.inf])
def test_messages_beyond_their_bound_of_all_clients_end_the_run(factor):
    strategy = DPFedAvg(clip_norm=0.1, privacy=Privacy(epsilon=8.0), num_clients=CLIENTS)
    with pytest.raises(UserError, match=r"message of client 0: expected l2 norm of at most 0\.1"):
        start(strategy, InProcessGrid(swelling(factor), CLIENTS), rounds=1)


def test_a_half_precision_model_still_gets_messages_within_their_bound():
    """Rounding to float16 would lengthen some messages beyond the bound."""
    arrays = ArrayRecord({name: tensor.half() for name, tensor in initial_net().state_dict().items()})

    @(half := ClientApp(mods=[private_mod])).train()
    def _(message, context):
        partition = int(context.node_config["partition-id"])
        generator = torch.Generator().manual_seed(partition)
        tensors = message.content[ARRAYS].to_torch_state_dict()
        moved = {n: t + torch.randn(t.shape, generator=generator).half() for n, t in tensors.items()}
        return Message(RecordDict({ARRAYS: ArrayRecord(moved)}), reply_to=message)

    strategy = DPFedAvg(clip_norm=0.1, privacy=Privacy(epsilon=8.0), num_clients=CLIENTS)
    result = start(strategy, InProcessGrid(half, CLIENTS), rounds=3, arrays=arrays)
    assert {array.dtype for array in result.arrays.values()} == {"float16"}


def test_cohorts_of_a_fixed_size_count_only_for_apps_that_are_known_to_remember_nothing():
    """An app's own state can reveal how often each client took part, and thus how often an absent client did."""
    cohort, rules = FixedSize(1000, 20), DPFedAvgRules()
    charged, without, whole = (
        privacy.plan(rules, of, 50)
        for privacy, of in (
            (Privacy(noise_multiplier=2.0), cohort),
            (Privacy(noise_multiplier=2.0, app_memory=False), cohort),
            (Privacy(noise_multiplier=2.0), Everyone(1000)),
        )
    )
    assert charged.epsilon == whole.epsilon
    assert not charged.amplification
    assert without.amplification
    assert without.epsilon < 0.1 * charged.epsilon
    with_memory = Privacy(noise_multiplier=2.0, app_memory=False).plan(AlphaNormECRules(), cohort, 50)
    assert with_memory.epsilon == whole.epsilon
    drawn = [
        Privacy(noise_multiplier=2.0, app_memory=known).plan(rules, Poisson(1000, 0.02), 50) for known in (False, True)
    ]
    assert drawn[0].epsilon == drawn[1].epsilon < charged.epsilon


@pytest.mark.parametrize(("method", "name"), [(DPScaffold(), "dp-scaffold"), (FedSpeed(), "fedspeed")])
def test_an_app_whose_local_steps_nobody_can_correct_takes_part_in_no_run_that_corrects_them(method, name):
    def agreed(population, rounds):  # noqa: ARG001
        return make_agreement(method, Everyone(population), None, SeededStreams(1))

    with pytest.raises(ValueError, match=f"a method that leaves local steps alone, got {name}"):
        start(MethodStrategy(agreed, num_clients=2), InProcessGrid(app, 2))
