"""Metrics are averaged over the clients that measured them, and every omission is reported."""

import logging
import math

import pytest
from flower_existing_app import CLIENTS, initial_net, train
from flower_in_process import InProcessGrid, inside_a_run
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as some

from clients import private_mod
from fedpriv.flower.server.metrics import average_metrics
from strategies import DPFedAvg, Privacy


def averaged(*reports):
    """Return the average and the omissions by client; None stands for an answer without metrics."""
    contents = {i: RecordDict({} if r is None else {"m": MetricRecord(r)}) for i, r in enumerate(reports)}
    average, left_out = average_metrics(contents)
    return None if average is None else dict(average), left_out


def test_metrics_are_averaged_by_number_of_examples():
    average, left_out = averaged({"acc": 1.0, "num-examples": 30}, {"acc": 0.0, "num-examples": 10})
    assert average == {"acc": pytest.approx(0.75)}
    assert left_out == {}


@pytest.mark.parametrize("examples", [0, 0.0, -5, math.nan, math.inf, [10], 10**400])
def test_a_client_without_examples_leaves_the_others_average_alone(examples):
    average, left_out = averaged(
        {"acc": 1.0, "num-examples": 30}, {"acc": 0.2, "num-examples": examples}, {"acc": 0.0, "num-examples": 10}
    )
    assert average == {"acc": pytest.approx(0.75)}
    assert list(left_out) == [1]
    assert left_out[1].startswith("num-examples ")


def test_a_client_without_a_number_of_examples_or_without_metrics_does_not_count():
    average, left_out = averaged({"acc": 1.0, "num-examples": 30}, {"acc": 0.0}, None)
    assert average == {"acc": 1.0}
    assert left_out == dict.fromkeys((1, 2), "no num-examples: its metrics do not count")


def test_a_metric_that_some_lack_is_averaged_over_those_that_have_it():
    """Flower divides by the examples of all clients, so that its average is too small."""
    average, left_out = averaged(
        {"acc": 0.5, "loss": 2.0, "num-examples": 10}, {"loss": 4.0, "num-examples": 10}, {"num-examples": 80}
    )
    assert average == {"acc": 0.5, "loss": 3.0}
    assert left_out == {}


def test_a_metric_that_is_not_finite_costs_only_itself():
    average, left_out = averaged(
        {"acc": math.nan, "loss": 1.0, "num-examples": 10}, {"acc": 0.5, "loss": math.inf, "num-examples": 10}
    )
    assert average == {"acc": 0.5, "loss": 1.0}
    assert left_out == {0: "acc is not finite and does not count", 1: "loss is not finite and does not count"}


def test_lists_are_averaged_place_by_place_and_one_of_another_length_does_not_count():
    one, other, third = ({"by-class": row, "num-examples": 10} for row in ([1.0, 0.0], [0.0, 1.0], [1.0]))
    average, left_out = averaged(one, other, third, {"by-class": 0.7, "num-examples": 10})
    assert average == {"by-class": [0.5, 0.5]}
    assert list(left_out) == [2, 3]


def test_a_metric_in_two_records_counts_once():
    content = RecordDict({"a": MetricRecord({"acc": 1.0}), "b": MetricRecord({"acc": 0.0, "num-examples": 3})})
    assert average_metrics({0: content}) == (MetricRecord({"acc": 1.0}), {})


def test_no_metrics_at_all_are_no_trouble():
    assert averaged(None, None) == (None, {})
    assert averaged() == (None, {})
    assert averaged({"acc": 1.0, "num-examples": 0}) == (None, {0: "num-examples 0: its metrics do not count"})


@given(
    some.lists(
        some.tuples(some.floats(0.0, 1.0), some.integers(0, 2**62) | some.floats(allow_nan=True, allow_infinity=True)),
        min_size=1,
        max_size=6,
    )
)
def test_an_average_lies_between_what_was_averaged(reports):
    average, left_out = averaged(*({"acc": value, "num-examples": examples} for value, examples in reports))
    counted = [value for i, (value, _) in enumerate(reports) if i not in left_out]
    if counted:
        assert average is not None
        assert min(counted) - 1e-9 <= average["acc"] <= max(counted) + 1e-9
    else:
        assert average is None


def test_evaluation_survives_a_client_without_examples(caplog):
    app = ClientApp(mods=[private_mod])
    app.train()(train)

    @app.evaluate()
    def _evaluate(message, context):
        partition = context.node_config["partition-id"]
        metrics = MetricRecord({"acc": 0.25 * partition, "num-examples": 0 if partition == 1 else 20})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    strategy = DPFedAvg(num_clients=CLIENTS, evaluate=True, privacy=Privacy(noise_multiplier=1.0))
    with inside_a_run(), caplog.at_level(logging.WARNING, "flwr"):
        result = strategy.start(
            InProcessGrid(app, CLIENTS),
            ArrayRecord(initial_net().state_dict()),
            num_rounds=1,
            train_config=ConfigRecord({"lr": 0.1}),
        )
    assert dict(result.evaluate_metrics_clientapp[1]) == {"acc": pytest.approx(0.25 * (0 + 2 + 3 + 4) / 4)}
    assert "evaluation after round 1: client 1: num-examples 0: its metrics do not count" in caplog.text
