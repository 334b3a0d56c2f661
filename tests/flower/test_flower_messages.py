"""Messages arrive unchanged, and Flower still has the interfaces that the tests' grid needs."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from flower_in_process import RUN_ID, InProcessGrid, inside_a_run
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from support.helpers import WITH_SIDE_VALUES

from fedpriv.errors import UserError
from fedpriv.flower.answers import send_message
from fedpriv.flower.messages import (
    ARRAYS,
    DIAGNOSTICS,
    FEDPRIV,
    ClientInstructions,
    MessageFormat,
    ModelArrays,
    NodeInfo,
    ask_node_info,
    asks_node_info,
)
from fedpriv.flower.refusals import Refusal
from fedpriv.flower.state import keep_state, load_state
from fedpriv.mechanisms.gaussian import release_grid
from fedpriv.methods import (
    METHODS,
    AdaptiveBound,
    AlphaNormEC,
    Clip21,
    DPFedAvg,
    PrivateMetrics,
    bare,
    with_side_values,
)
from fedpriv.rounds import ClientRules, client_round
from fedpriv.streams import SeededStreams, SystemStreams

SPECIAL = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, float("inf"), float("nan"), 0.1])


def sent(content: RecordDict) -> RecordDict:
    return pickle.loads(pickle.dumps(content))


def new_context() -> Context:
    return Context(run_id=RUN_ID, node_id=5, node_config={}, state=RecordDict(), run_config={})


@pytest.mark.parametrize("method", [kind() for kind in METHODS.values()], ids=list(METHODS))
@pytest.mark.parametrize("seed", [None, 5])
def test_an_order_arrives_as_it_was_sent(method, seed):
    instructions = ClientInstructions(
        method=method, round=3, client=2, last_round=1, noise_stddev=0.1 + 0.2, seed=seed, private=False
    )
    record = instructions.to_record()
    assert ClientInstructions.of(sent(RecordDict({FEDPRIV: record}))) == instructions
    assert instructions.rules.streams == (SystemStreams() if seed is None else SeededStreams(5))
    assert ("seed" in record) == (seed is not None)


def test_an_order_of_another_version_is_refused():
    record = ClientInstructions(method=AlphaNormEC(), round=1, client=0).to_record()
    record["method.momentum"] = 0.9
    with pytest.raises(ValueError, match=r"method.momentum: expected a known key"):
        ClientInstructions.of(RecordDict({FEDPRIV: record}))
    record = ClientInstructions(method=AlphaNormEC(), round=1, client=0).to_record()
    record["learning-rate"] = 0.9  # an app may read it, and clients under secure aggregation would not sign it
    with pytest.raises(
        ValueError, match=r"message: expected instructions of this version, got the key 'learning-rate'"
    ):
        ClientInstructions.of(RecordDict({FEDPRIV: record}))


@pytest.mark.parametrize("name", WITH_SIDE_VALUES)
def test_an_order_with_side_values_arrives_as_it_was_sent(name):
    method = with_side_values(
        bare(WITH_SIDE_VALUES[name]), AdaptiveBound(share=0.1), PrivateMetrics(share=0.1, max_loss=3.0)
    )
    instructions = ClientInstructions(method=method, round=3, client=2)
    assert ClientInstructions.of(sent(RecordDict({FEDPRIV: instructions.to_record()}))) == instructions


def test_a_model_arrives_to_the_bit_in_its_own_number_formats():
    record = ArrayRecord({"a": Array(SPECIAL.numpy()), "b": Array(torch.tensor(2.5).double().numpy())})
    arrays = ModelArrays.of(record)
    vector = arrays.vector(sent(RecordDict({"m": record})).array_records["m"])
    assert vector.view(torch.int32).tolist() == torch.cat([SPECIAL, torch.tensor([2.5])]).view(torch.int32).tolist()
    assert [array.dtype for array in arrays.model(vector).values()] == ["float32", "float64"]
    message = arrays.message(vector, MessageFormat())
    assert list(message) == [ARRAYS]
    assert [array.dtype for array in message[ARRAYS].values()] == ["float32", "float32"]  # type: ignore[union-attr]
    assert arrays.model(vector)["b"].numpy().shape == ()


@pytest.mark.parametrize(
    ("bound", "stddev", "dtype"),
    [(1.0, 0.0, "float32"), (1.0, 1.0, "int8"), (1.0, 0.1, "int16"), (5.0, 1e-4, "int32"), (1.0, 1e-9, "float32")],
)
def test_a_noised_message_travels_as_the_smallest_integers_that_hold_it(bound, stddev, dtype):
    form = MessageFormat.of(ClientRules(method=Clip21(clip_norm=bound), noise_stddev=stddev, streams=SystemStreams()))
    assert form == MessageFormat(dtype=dtype, scale=release_grid(stddev) if dtype != "float32" else None)


def test_a_noised_message_arrives_to_the_bit_in_half_the_bytes():
    rules = ClientRules(method=Clip21(clip_norm=1.0), noise_stddev=0.7, streams=SystemStreams())
    form, size = MessageFormat.of(rules), 5000
    arrays = ModelArrays.of(ArrayRecord({"a": Array(np.zeros((50, 100), np.float32))}))
    message, _ = client_round(rules, 0, rules.method.init_client(size), torch.randn(size), 1)
    bare, small = arrays.message(message, MessageFormat()), arrays.message(message, form)
    assert torch.equal(arrays.received(sent(RecordDict({**small})), form), message)
    assert len(small[ARRAYS]["a"].data) <= len(bare[ARRAYS]["a"].data) / 2 + 100  # type: ignore[union-attr]


def test_a_message_in_other_units_than_the_plans_is_refused():
    """The client has another version or is dishonest: the server multiplies by the scale of its plan alone."""
    form = MessageFormat(dtype="int16", scale=0.25)
    arrays = ModelArrays.of(ArrayRecord({"a": Array(np.zeros(3, np.float32))}))
    good = arrays.message(torch.tensor([0.25, -1.0, 2.0]), form)
    assert arrays.received(RecordDict({**good}), form).tolist() == [0.25, -1.0, 2.0]
    for other in (MessageFormat(dtype="int16", scale=0.5), MessageFormat(), MessageFormat(dtype="int8", scale=0.25)):
        with pytest.raises(UserError, match="message"):
            arrays.received(RecordDict({**good}), other)
        with pytest.raises(UserError, match="message"):
            arrays.received(RecordDict({**arrays.message(torch.ones(3), other)}), form)


def test_a_clients_state_is_kept_to_the_bit():
    instructions, context = ClientInstructions(method=AlphaNormEC(), round=4, client=1), new_context()
    state = instructions.method.init_client(7)._replace(memory=SPECIAL)
    keep_state(context, instructions, state)
    context = pickle.loads(pickle.dumps(context))
    later = ClientInstructions(method=AlphaNormEC(), round=6, client=1, last_round=4)
    loaded: Any = load_state(context, later, 7)
    assert loaded.memory.view(torch.int32).tolist() == SPECIAL.view(torch.int32).tolist()
    assert torch.equal(loaded.updated, state.updated)


def answered(context, round, last_round, value):
    """Act as a client: load its state, and store another one as the state after the round."""
    instructions = ClientInstructions(method=AlphaNormEC(), round=round, client=1, last_round=last_round)
    before: Any = load_state(context, instructions, 2)
    keep_state(context, instructions, before._replace(memory=torch.full((2,), value)))
    return before.memory[0].item()


@pytest.mark.parametrize(
    ("orders", "befores"),
    [
        ([(1, 0), (2, 1), (3, 2)], [0.0, 1.0, 2.0]),
        ([(1, 0), (2, 0), (3, 0)], [0.0, 0.0, 0.0]),
        ([(1, 0), (2, 1), (3, 1), (4, 1), (5, 4)], [0.0, 1.0, 1.0, 1.0, 4.0]),
        ([(1, 0), (4, 1), (9, 4), (12, 0), (13, 12)], [0.0, 1.0, 4.0, 0.0, 12.0]),
    ],
    ids=["all count", "none counts", "some are lost", "the server began again"],
)
def test_what_a_client_remembers_is_what_counted(orders, befores):
    context = new_context()
    assert [answered(context, now, last, float(now)) for now, last in orders] == befores


@pytest.mark.parametrize("last_round", [1, 3, 7])
def test_a_state_that_is_of_no_round_that_counted_is_lost(last_round):
    context = new_context()
    if last_round != 1:
        for now, last in [(1, 0), (2, 1), (4, 2)]:
            answered(context, now, last, 1.0)
    with pytest.raises(
        Refusal, match=f"memory of client 1: expected its state after round {last_round}, got"
    ) as caught:
        answered(context, 8, last_round, 1.0)
    assert caught.value.kind == "lost"


def test_a_method_without_memory_keeps_nothing():
    context = new_context()
    instructions = ClientInstructions(method=DPFedAvg(), round=5, client=1, last_round=3)
    keep_state(context, instructions, load_state(context, instructions, 3))
    assert not context.state


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_client_whose_memory_is_not_finite_reports_no_norm_that_is(poison):
    """Its message is zero from then on; the server counts it by its report."""
    model = ModelArrays.of(ArrayRecord({"w": Array(np.zeros(3, dtype=np.float32))}))
    context = Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config={})
    method = Clip21(clip_norm=1.0)
    kept = type(method.init_client(3))(torch.tensor([0.0, poison, 0.0]))
    keep_state(context, ClientInstructions(method=method, round=1, client=0), kept)
    instructions = ClientInstructions(method=method, round=2, client=0, last_round=1, diagnostics=True)
    content = send_message(instructions, torch.ones(3), model, context)
    assert not content.array_records[ARRAYS]["w"].numpy().any()
    assert content.metric_records[DIAGNOSTICS]["signal-norm"] == np.inf


def test_a_first_round_starts_with_a_fresh_state():
    fresh: Any = load_state(new_context(), ClientInstructions(method=AlphaNormEC(), round=9, client=1), 3)
    assert torch.equal(fresh.memory, torch.zeros(3))


def test_nodes_introduce_themselves():
    assert asks_node_info(ask_node_info())
    for config, client in (({"partition-id": 3}, 3), ({"partition-id": "3"}, 3), ({}, None)):
        assert NodeInfo.of_answer(sent(NodeInfo.of_node(config).to_content())) == NodeInfo(client)
    helper = NodeInfo.of_node({"fedpriv-helper": "ab"})
    assert NodeInfo.of_answer(sent(helper.to_content())) == helper == NodeInfo(None, "ab")
    assert NodeInfo.of_answer(ask_node_info()) is None
    assert NodeInfo.of_answer(RecordDict({"config": ConfigRecord()})) is None
    with pytest.raises(ValueError, match="partition-id: expected a whole number, got 'x'"):
        NodeInfo.of_node({"partition-id": "x"})


def test_flower_moved_nothing_that_the_grid_needs():
    echo = ClientApp()
    echo.train()(lambda message, context: Message(message.content, reply_to=message))  # noqa: ARG005
    grid = InProcessGrid(echo, 1)
    with inside_a_run():
        message = Message(ask_node_info(), grid.order[0], "train")
        (answer,) = grid.send_and_receive([message])
    assert answer.metadata.reply_to_message_id == message.metadata.message_id
    assert grid.run.run_id == RUN_ID
    with pytest.raises(RuntimeError, match="not set"):
        Message(ask_node_info(), 1, "train")
