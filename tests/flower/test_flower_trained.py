"""Noise is added to the trained arrays, once; all other arrays stay unchanged, or the run is refused."""

import logging
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from flower_in_process import InProcessGrid, inside_a_run
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from clients import private_mod
from fedpriv.errors import UserError
from fedpriv.flower.messages import ARRAYS, FEDPRIV, TERMS, asks_node_info
from fedpriv.flower.trained import TRAINED, TrainedArrays
from fedpriv.privacy import Poisson
from fedpriv.streams import SystemStreams
from strategies import AlphaNormEC, DPFedAvg, Privacy, frozen_arrays, named
from strategies.named import NamedStrategy

CLIENTS = 4
CENTRAL, LOCAL = Privacy(noise_multiplier=1.0), Privacy(noise_multiplier=1.0, trust="local")
PRIVATE = pytest.mark.parametrize("privacy", [CENTRAL, LOCAL], ids=["central", "local"])


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Net(nn.Module):
    """Network with a frozen layer, fixed tables, a mask and positions between the trained arrays."""

    table: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(3, 4).requires_grad_(False)
        self.head = nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("table", torch.linspace(-1.0, 1.0, 4))
        self.register_buffer("fine", torch.tensor([1.0 / 3.0], dtype=torch.float64))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("positions", torch.arange(5))

    def forward(self, x):
        return self.scale * self.head(torch.tanh(self.backbone(x) + self.table) * self.mask)


FROZEN = ["backbone.*", "table", "fine"]
FIXED = ["table", "fine", "mask", "positions", "backbone.weight", "backbone.bias"]
TRAINED_ONES = ["scale", "head.weight", "head.bias"]


def initial() -> ArrayRecord:
    return ArrayRecord(Net().state_dict())


def train_locally(net: nn.Module, context: Context) -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(int(context.node_config["partition-id"])))
    nn.functional.mse_loss(net(x), x.sum(dim=1, keepdim=True)).backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1).step()


def app_of(change=lambda arrays: arrays, returned=None) -> ClientApp:
    """Return an app that trains all arrays with a gradient, changes its answer by `change`, and returns some arrays."""
    app = ClientApp(mods=[private_mod])

    @app.train()
    def _train(message, context):
        net = Net()
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict(), strict=False)
        train_locally(net, context)
        arrays = {k: v for k, v in change(net.state_dict()).items() if returned is None or k in returned}
        content = {"arrays": ArrayRecord(arrays), "m": MetricRecord({"num-examples": 20})}
        return Message(RecordDict(content), reply_to=message)

    return app


def start(strategy, app=None, rounds=3, arrays=None, grid=None):
    with inside_a_run():
        grid = grid or InProcessGrid(app or app_of(), CLIENTS)
        return strategy.start(grid, arrays or initial(), num_rounds=rounds, timeout=5.0)


def make(
    privacy: Privacy | None = CENTRAL, kind: type[NamedStrategy] = DPFedAvg, seed: int | None = 3, **given: Any
) -> NamedStrategy:
    return kind(privacy=privacy, num_clients=CLIENTS, seed=seed, **given)


# ---------------------------------------------------------------- declared arrays


@pytest.mark.parametrize("kind", [DPFedAvg, AlphaNormEC])
@PRIVATE
def test_fixed_arrays_arrive_to_the_bit_and_trained_ones_are_noised(privacy, kind):
    grid, before = InProcessGrid(app_of(), CLIENTS), initial()
    strategy = make(privacy, kind, frozen=FROZEN)
    result = start(strategy, grid=grid)
    assert list(result.arrays) == list(before)
    for name, array in result.arrays.items():
        kept = (array.data, array.dtype) == (before[name].data, before[name].dtype)
        assert kept == (name in FIXED), name
    for message in grid.seen[CLIENTS:]:
        assert all(message.content.array_records[ARRAYS][name].data == before[name].data for name in FIXED)
    for answer in grid.answers[CLIENTS:]:
        assert list(answer.content.array_records[ARRAYS]) == ["scale", "head.weight", "head.bias"]


def test_the_vector_that_is_bounded_noised_and_summed_holds_the_trained_arrays_alone():
    strategy = make(frozen=FROZEN)
    start(strategy)
    assert strategy.state.model.shape == strategy.total.sum.shape == (1 + 4 + 1,)


@PRIVATE
def test_a_run_with_fixed_arrays_is_the_run_of_the_trained_ones_alone(privacy, monkeypatch):
    """The run equals, to the bit, that of an app with only the trained part as its model and the same noise."""
    monkeypatch.setattr(named, "digest_of", lambda _: "the same")

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            net = Net()
            self.scale, self.head = net.scale, net.head

    one, other = make(privacy, frozen=FROZEN), make(privacy)
    start(one)
    start(other, app_of(returned=TRAINED_ONES), arrays=ArrayRecord(Part().state_dict()))
    assert torch.equal(one.state.model, other.state.model)


@pytest.mark.parametrize(
    "declared",
    [{"frozen": FROZEN}, {"trainable": ["head.*", "scale"]}, {"trainable": TRAINED_ONES}, {"frozen": FIXED}],
    ids=str,
)
def test_one_declaration_says_both(declared):
    arrays = TrainedArrays.of_model(initial(), **declared)
    assert list(arrays.trained) == TRAINED_ONES
    assert sorted(arrays.fixed) == sorted(FIXED)
    assert arrays.declared
    received = pickle.loads(pickle.dumps(RecordDict({TRAINED: arrays.to_record()})))
    assert TrainedArrays.of_message(received, initial()) == arrays


def test_a_module_says_itself_what_it_does_not_train():
    assert sorted(frozen_arrays(Net())) == sorted(FIXED)
    assert frozen_arrays(nn.Linear(2, 2)) == []
    tied = nn.Module()
    tied.one = tied.other = nn.Linear(2, 2)
    assert frozen_arrays(tied) == []
    start(make(frozen=frozen_arrays(Net())))


def test_one_pattern_may_stand_alone():
    record = ArrayRecord({n: Array(np.zeros(2, np.float32)) for n in ("a", "b[0]")})
    assert TrainedArrays.of_model(record, trainable="*").trained == ("a", "b[0]")
    assert TrainedArrays.of_model(record, frozen="b[0]").trained == ("a",)


def test_an_answer_may_leave_fixed_arrays_out():
    one, other = make(frozen=FROZEN), make(frozen=FROZEN)
    start(one)
    start(other, app_of(returned=TRAINED_ONES))
    assert torch.equal(one.state.model, other.state.model)


def spoiled(name, value):
    return lambda arrays: {**arrays, name: value(arrays[name])}


CHANGES = {
    "float": ("table", lambda t: t + 1e-6),
    "frozen layer": ("backbone.weight", lambda t: t * 1.001),
    "integers": ("positions", lambda t: t + 1),
    "booleans": ("mask", lambda t: ~t),
    "shape": ("table", lambda t: t.reshape(2, 2)),
    "kind": ("positions", lambda t: t.float() + 0.5),
    "not a number": ("table", lambda t: t * math.nan),
}


@PRIVATE
@pytest.mark.parametrize("change", CHANGES)
def test_an_app_that_changes_a_fixed_array_is_refused(change, privacy):
    name, value = CHANGES[change]
    with pytest.raises(UserError, match=rf"client 0: .*private_mod: array {name}: expected the values that were sent"):
        start(make(privacy, frozen=FROZEN), app_of(spoiled(name, value)))


@pytest.mark.parametrize(("name", "value"), [("fine", lambda t: t.float()), ("table", lambda t: t.double())])
def test_a_number_format_of_the_apps_own_is_no_change(name, value):
    before = initial()
    result = start(make(frozen=FROZEN), app_of(spoiled(name, value)))
    assert result.arrays[name].data == before[name].data


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"trainable": "head.*", "frozen": "table"}, "trainable, frozen: expected at most one of the two, got both"),
        ({"frozen": ["tabel"]}, r"frozen: expected names of arrays.* got 'tabel'. Did you mean 'table'"),
        ({"trainable": ["heads.*"]}, r"trainable: expected names of arrays, or patterns .* got 'heads.\*'"),
        ({"trainable": ["scale", "positions"]}, "array positions: expected floating point numbers, got int64"),
        ({"frozen": "*"}, "frozen: expected an array to train, got 0 arrays. The model has: "),
        ({"trainable": []}, "trainable: expected an array to train, got 0 arrays. The model has: "),
    ],
)
def test_a_declaration_that_cannot_be_meant_is_one_line(declared, words):
    with pytest.raises(UserError, match=words):
        start(make(**declared))


# ---------------------------------------------------------------- no declaration


@pytest.mark.parametrize("seed", [3, None], ids=["simulation", "system"])
def test_an_array_that_training_leaves_alone_is_refused_before_it_is_noised(seed):
    strategy = make(seed=seed)
    expected = (
        r"round 1: .* client 0: .*private_mod: arrays table, fine, backbone.weight, backbone.bias: expected arrays "
    )
    with pytest.raises(UserError, match=expected + r"that training changes.* frozen=\['table', \.\.\.\]"):
        start(strategy)
    assert strategy.attendance.counted == 0
    assert strategy.result.arrays == ArrayRecord()


def test_it_is_refused_in_a_simulation_of_local_trust_and_of_secret_cohorts_too():
    for strategy in (make(LOCAL), DPFedAvg(privacy=CENTRAL, cohort=Poisson(CLIENTS, 0.5), seed=3)):
        with pytest.raises(UserError, match="expected arrays that training changes"):
            start(strategy, rounds=50)


def test_a_server_that_is_the_adversary_is_not_told_and_the_client_and_the_developer_are(caplog):
    """A change of an array can depend on the data: a server could send models made to test for it."""
    grid = InProcessGrid(app_of(), CLIENTS)
    strategy = make(LOCAL, seed=None)
    assert strategy.streams == SystemStreams()
    start(strategy, grid=grid, rounds=1)
    assert not any(answer.has_error() for answer in grid.answers)
    assert "client 1: arrays table, fine, backbone.weight, backbone.bias: expected arrays that" in caplog.text
    assert "(This is not reported to the server.)" in caplog.text
    assert "No array is declared frozen or trainable" in caplog.text


def test_a_server_that_is_the_adversary_learns_of_no_changed_array_and_gets_none(caplog):
    grid = InProcessGrid(app_of(spoiled("table", lambda t: t + 1.0)), CLIENTS)
    result = start(make(LOCAL, seed=None, frozen=FROZEN), grid=grid, rounds=1)
    assert result.arrays["table"].data == initial()["table"].data
    assert not any(answer.has_error() for answer in grid.answers)
    assert "client 2: array table: expected the values that were sent" in caplog.text


def test_arrays_that_are_declared_trained_may_stay_as_they_are():
    strategy = make(trainable="*")
    start(strategy)
    assert strategy.attendance.counted == 3 * CLIENTS


@pytest.mark.parametrize("privacy", [None, Privacy(noise_multiplier=0.0)], ids=["none", "no noise"])
def test_a_run_without_noise_needs_no_declaration(privacy):
    before, result = initial(), start(make(privacy))
    assert result.arrays["backbone.weight"].data == before["backbone.weight"].data


def test_a_client_that_trained_nothing_at_all_is_no_sign_of_a_fixed_array():
    lazy = ClientApp(mods=[private_mod])
    lazy.train()(lambda message, _: Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message))
    start(make(), lazy)


def test_only_a_clients_first_message_is_looked_at():
    """Later, an update of zero is meaningful: error feedback sends the rest of its memory."""

    app, calls = ClientApp(mods=[private_mod]), []

    @app.train()
    def _train(message, context):  # noqa: ARG001
        calls.append(message)
        moved = ["scale", "other"] if len(calls) <= CLIENTS else ["other"]
        arrays = message.content.array_records["arrays"].to_torch_state_dict()
        arrays |= {name: arrays[name] + 0.1 for name in moved}
        return Message(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=message)

    model = ArrayRecord({"scale": Array(np.ones(2, np.float32)), "other": Array(np.ones(2, np.float32))})
    strategy = make(kind=AlphaNormEC)
    start(strategy, app, arrays=model)
    assert strategy.attendance.counted == 3 * CLIENTS


def test_integers_and_booleans_are_fixed_without_a_word():
    model = ArrayRecord(
        {
            "w": Array(np.ones(3, np.float32)),
            "ids": Array(np.arange(4)),
            "mask": Array(np.array([True, False])),
            "empty": Array(np.zeros((0, 2), np.float32)),
        }
    )
    app = ClientApp(mods=[private_mod])

    @app.train()
    def _train(message, context):  # noqa: ARG001
        arrays = message.content.array_records["arrays"].to_torch_state_dict()
        return Message(RecordDict({"arrays": ArrayRecord({**arrays, "w": arrays["w"] + 1.0})}), reply_to=message)

    result = start(make(), app, arrays=model)
    assert [result.arrays[name].data == model[name].data for name in model] == [False, True, True, True]


@pytest.mark.parametrize("frozen", [None, ["*.running_*"]])
def test_statistics_of_batches_are_refused_unless_they_are_fixed(frozen):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    app = ClientApp(mods=[private_mod])

    @app.train()
    def _train(message, context):  # noqa: ARG001
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        moved = {k: v + 0.1 if k.endswith(("weight", "bias")) else v for k, v in net.state_dict().items()}
        return Message(RecordDict({"arrays": ArrayRecord(moved)}), reply_to=message)

    model = ArrayRecord(net.state_dict())
    if frozen is None:
        with pytest.raises(UserError, match=r"got the buffers 1.running_mean.*Replace BatchNorm"):
            start(make(), app, arrays=model)
    else:
        result = start(make(frozen=frozen), app, arrays=model)
        assert result.arrays["1.running_mean"].data == model["1.running_mean"].data


def test_complex_numbers_are_refused_unless_they_are_fixed():
    model = ArrayRecord({"w": Array(np.ones(2, np.float32)), "c": Array(np.ones(2, np.complex64))})
    with pytest.raises(UserError, match="array c: expected floating point numbers, got complex64"):
        start(make(), arrays=model)
    assert TrainedArrays.of_model(model, frozen="c").trained == ("w",)


def test_a_message_that_names_arrays_of_another_model_is_refused():
    model = initial()
    for names in (["nothing"], [], ["scale", "nothing"]):
        arrays = TrainedArrays(names=tuple(model), trained=tuple(names), declared=True)
        with pytest.raises(UserError, match="message: expected names of arrays of its model"):
            TrainedArrays.of_message(RecordDict({TRAINED: arrays.to_record()}), model)


# ---------------------------------------------------------------- statement


def test_the_statement_says_which_arrays_are_covered(caplog):
    strategy = make(frozen=FROZEN)
    with caplog.at_level(logging.INFO, "flwr"):
        start(strategy, rounds=1)
    said = " ".join(strategy.statement.split())
    assert (
        "a client's message is its update of scale, head.weight, head.bias. Noise is added to these numbers (6)" in said
    )
    assert f"sent to all clients unchanged: {', '.join(FIXED)}." in said
    assert "Failures: a client that does not answer" in said
    assert "Trained: scale, head.weight, head.bias. Fixed, and not covered: " in caplog.text
    everything = make(trainable=["scale", "head.*"])
    start(everything, app_of(returned=TRAINED_ONES), arrays=ArrayRecord({n: initial()[n] for n in TRAINED_ONES}))
    assert "its update of all 3 arrays of the model" in " ".join(everything.statement.split())


def test_noise_that_drowns_the_signal_is_said_before_training(caplog):
    caplog.set_level(logging.INFO, "flwr")
    promise = Privacy(noise_multiplier=50.0)
    start(make(promise, frozen=FROZEN), rounds=1)
    said = [record.getMessage() for record in caplog.records]
    (warning,) = [i for i, line in enumerate(said) if line.startswith("The noise on the mean message is")]
    assert warning < said.index("[ROUND 1/1]")
    caplog.clear()
    start(make(Privacy(noise_multiplier=0.01), frozen=FROZEN), rounds=1)
    assert "The noise on the mean message is" not in caplog.text


def test_the_order_of_a_client_names_what_is_trained():
    grid = InProcessGrid(app_of(), CLIENTS)
    start(make(frozen=FROZEN), grid=grid, rounds=1)
    (message, *_) = [m for m in grid.seen if not asks_node_info(m.content)]
    assert message.content[TRAINED]["names"] == TRAINED_ONES
    assert list(message.content) == [ARRAYS, "config", TRAINED, FEDPRIV, TERMS]
