"""Users who bring Flower's strategies, their arguments, and apps of its older interface."""

import logging
from typing import Any

import numpy as np
import pytest
from flower_in_process import InProcessGrid, inside_a_run
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.superlink.grid import InMemoryGrid

from fedpriv.errors import UserError
from fedpriv.flower import DPFedAvg, Privacy, PrivateServer, legacy_mod, private_mod
from fedpriv.flower.apps.grid import AppGrid
from fedpriv.flower.apps.virtual_clients import ClientSeeds, InProcessClients, Population, VirtualClients
from fedpriv.flower.internals.app import empty_run, joins_at_once
from fedpriv.methods.server_optimizers import Adam

CLIENTS = 4
START = [np.array([1.0, 2.0], np.float32), np.array([[3.0]], np.float32)]


class Older(NumPyClient):
    """A client that moves every array by its own step."""

    def __init__(self, step: float, drop: bool = False) -> None:
        self.step, self.drop = step, drop

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        moved = [part - self.step * config.get("lr", 1.0) for part in parameters]
        return moved[: 1 if self.drop else None], 7, {"seen": 0.5, "name": "a"}

    def evaluate(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[float, int, dict[str, Any]]:
        return float(parameters[0][0]), 7, {"accuracy": 0.25}


def older_app(*mods: Any, drop: bool = False) -> ClientApp:
    def client_fn(context: Any) -> Any:
        return Older(0.1 * (1 + int(context.node_config["partition-id"])), drop).to_client()

    return ClientApp(client_fn, mods=list(mods))


def started(app: ClientApp, rounds: int = 1, **options: Any) -> Any:
    strategy = DPFedAvg(clip_norm=100.0, server_lr=1.0, num_clients=CLIENTS, seed=1, join_timeout=0.2, **options)
    grid = InProcessGrid(app, CLIENTS)
    arrays = ArrayRecord({name: Array(array) for name, array in zip(("w", "b"), START, strict=True)})
    with inside_a_run():
        return strategy.start(grid, arrays, num_rounds=rounds, train_config=ConfigRecord({"lr": 2.0}))


def test_an_older_client_behind_the_mod_is_its_update_of_named_arrays() -> None:
    result = started(older_app(private_mod, legacy_mod), evaluate=True)
    assert list(result.arrays) == ["w", "b"]
    for name, array in zip(("w", "b"), START, strict=True):
        np.testing.assert_allclose(result.arrays[name].numpy(), array - 0.25 * 2.0, atol=1e-4)
    assert dict(result.train_metrics_clientapp[1])["seen"] == 0.5
    evaluated = dict(result.evaluate_metrics_clientapp[1])
    assert evaluated["accuracy"] == 0.25
    assert evaluated["loss"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("app", "line"),
    [
        (older_app(private_mod), "ClientApp: expected a train function, or legacy_mod, got a NumPyClient alone"),
        (older_app(private_mod, legacy_mod, drop=True), "answer of fit: expected 2 arrays, as the model has, got 1"),
    ],
)
def test_an_older_client_that_cannot_take_part_gets_a_line(
    app: ClientApp, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("flwr").propagate = True
    with pytest.raises(UserError):
        started(app, privacy=Privacy(epsilon=8.0))
    assert line in caplog.text
    assert "fitins" not in caplog.text.replace("fitins.parameters'", "")


def test_an_older_server_runs_a_strategy_and_has_its_history() -> None:
    strategy = DPFedAvg(clip_norm=100.0, server_lr=1.0, num_clients=CLIENTS, seed=1, evaluate=True)
    found: list[Any] = []

    class Watched(PrivateServer):
        def fit(self, num_rounds: int, timeout: float | None) -> Any:
            found.append(super().fit(num_rounds, timeout))
            return found[0]

    server = Watched(
        strategy,
        initial_parameters=ndarrays_to_parameters(START),
        evaluate_fn=lambda number, arrays, _: (float(arrays[0][0]), {"round": number}),
    )
    app = ServerApp(server_fn=lambda _: ServerAppComponents(server=server, config=ServerConfig(num_rounds=2)))
    population = Population(1, CLIENTS, {}, ClientSeeds(1, 2, 3))
    clients = InProcessClients(VirtualClients(older_app(private_mod, legacy_mod), population))
    with inside_a_run():
        app(AppGrid(empty_run(1), population.nodes, clients), Context(1, 0, {}, RecordDict(), {}))
    ((history, _),) = found
    assert [round for round, _ in history.losses_centralized] == [0, 1, 2]
    assert history.losses_centralized[2][1] == pytest.approx(0.5, abs=1e-3)
    assert history.metrics_distributed["accuracy"] == [(1, 0.25), (2, 0.25)]
    assert len(server.parameters.tensors) == 2


def test_what_an_older_server_cannot_run_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"strategy: expected PrivateServer around it.*server=PrivateServer\("):
        DPFedAvg().initialize_parameters(SimpleClientManager())
    with pytest.raises(UserError, match=r"initial_parameters: expected the first model, got an argument left out"):
        PrivateServer(DPFedAvg())
    with pytest.raises(UserError, match=r"strategy: expected a strategy of fedpriv\.flower, got str"):
        PrivateServer("FedAvg", initial_parameters=START)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fraction_train": 0.5}, r"DPFedAvg\(fraction_train=...\): .* Give cohort=FixedSize"),
        ({"min_available_nodes": 2}, "num_clients"),
        ({"min_available_clients": 2}, "num_clients"),
        ({"min_train_nodes": 2}, "max_failures"),
        ({"weighted_by_key": "n"}, "all clients have one weight"),
        ({"eta": 0.1}, r"server_lr.*server_optimizer=Adam"),
        ({"proximal_mu": 0.1}, "proximal term to the loss"),
        ({"initial_parameters": None}, "PrivateServer"),
        ({"fraction_of": 1}, "Known: "),
    ],
)
def test_an_argument_of_flowers_strategies_is_named_with_ours(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        DPFedAvg(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"privacy": 8.0}, r"privacy: .* got 8\.0\. Give Privacy\(epsilon=\.\.\.\)"),
        ({"server_optimizer": "adam"}, r"server_optimizer: .* got 'adam'\. Give Adam\(\)"),
        ({"server_optimizer": Adam}, r"server_optimizer: .* got the class Adam\. Give Adam\(\)"),
        ({"cohort": 5}, r"cohort: .* got 5\. Give FixedSize\(population=100, size=10\)"),
        ({"adaptive": True}, r"adaptive: .* got True\. Give AdaptiveBound\(\)"),
        ({"noise": "banded"}, r"noise: .* got 'banded'\. Give NoiseChoice"),
        ({"out": 3}, r"out: expected a path, a RunFolder or None, got 3"),
        ({"seed": "a"}, r"seed: expected a whole number from 0, got 'a'"),
    ],
)
def test_a_value_of_another_type_is_refused_when_the_strategy_is_made(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        DPFedAvg(**options)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"initial_arrays": None}, "initial_arrays: expected an ArrayRecord, got NoneType"),
        ({"initial_arrays": {"w": 1}}, "initial_arrays: expected an ArrayRecord, got dict"),
        ({"initial_arrays": ArrayRecord()}, "initial_arrays: expected the arrays of a model, got an empty record"),
        ({"num_rounds": 0}, "num_rounds: expected a whole number from 1, got 0"),
        ({"num_rounds": "3"}, "num_rounds: expected a whole number from 1, got '3'"),
        ({"timeout": -1}, "timeout: expected seconds above 0, got -1"),
    ],
)
def test_a_start_without_a_first_round_is_refused_before_nodes_are_asked(given: dict[str, Any], says: str) -> None:
    grid: Any = None
    with pytest.raises(UserError, match=says):
        DPFedAvg().start(grid, **{"initial_arrays": ArrayRecord({"w": Array(START[0])}), **given})


def test_every_argument_of_flowers_strategies_has_a_line() -> None:
    from inspect import signature

    from flwr.server.strategy import FedAvg as Legacy
    from flwr.serverapp.strategy import FedAdam, FedAvgM, FedProx

    from fedpriv.flower.server.arguments import _INSTEAD

    found = {name for kind in (FedAdam, FedAvgM, FedProx) for name in signature(kind).parameters}
    older = set(signature(Legacy.__init__).parameters) - {"self", "inplace"}
    assert set(_INSTEAD) >= found | older


def test_a_server_optimizer_takes_the_place_of_fedadam() -> None:
    result = started(older_app(private_mod, legacy_mod), server_optimizer=Adam())
    assert np.isfinite(result.arrays["w"].numpy()).all()


def test_nodes_of_a_simulation_that_cannot_come_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert joins_at_once(InMemoryGrid.__new__(InMemoryGrid))
    grid = InProcessGrid(older_app(private_mod, legacy_mod), CLIENTS)
    monkeypatch.setattr("fedpriv.flower.server.nodes._SETTLED_SECONDS", 0.1)
    monkeypatch.setattr("fedpriv.flower.server.nodes.joins_at_once", lambda _: True)
    strategy = DPFedAvg(num_clients=CLIENTS + 1, join_timeout=60.0)
    arrays = ArrayRecord({"w": Array(START[0])})
    with inside_a_run(), pytest.raises(UserError, match=r"Flower nodes: expected 5, .* got 4 after [0-3] s"):
        strategy.start(grid, arrays)
