"""Flower's strategy and ClientApp equal the loop engine to the bit."""

import itertools
from pathlib import Path

import pytest
import torch
from flower_in_process import InProcessGrid, inside_a_run
from flwr.app import ArrayRecord, ConfigRecord

from clients.client_app import app
from fedpriv.engines import LoopEngine
from fedpriv.engines.secure_sum import SecureSum
from fedpriv.errors import UserError
from fedpriv.experiment.build import Experiment, assemble
from fedpriv.experiment.config import parse_config
from fedpriv.flower.messages import ARRAYS, asks_node_info
from fedpriv.mechanisms.shares import IntegerSums
from fedpriv.methods import METHODS, SERVER_OPTIMIZERS, ServerState
from fedpriv.rounds import Total, begin_round, finish_round, skip_round
from strategies.server_app import make_strategy

ROUNDS = 3
METHOD_TABLES = [{"name": name} for name in METHODS if name != "fedspeed"] + [
    {"name": "alpha-normec", "damping": 0.2, "alpha": 0.1},
    {"name": "alpha-normec", "memory": "sent"},
    {"name": "alpha-normec", "memory": "sent", "damping": 0.2, "server_normalization": False},
]
NEED_EVERYONE = ("diff2", "private-spiderboost")
COHORTS = [{"sampling": "everyone"}, {"sampling": "poisson", "probability": 0.4}]
PROMISES = [{"trust": "central", "epsilon": 8.0}, {"trust": "local", "epsilon": 50.0}, None]


def make_experiment(
    method: dict,
    cohort: dict,
    privacy: dict | None,
    local: dict | None = None,
    server: dict | None = None,
    noise: dict | None = None,
) -> Experiment:
    tables = {
        "name": "small",
        "seed": 11,
        "data": {"name": "digits", "clients": 7, "partition": "dirichlet", "concentration": 0.5},
        "model": {"name": "softmax"},
        "local": local or {"work": "full-gradient"},
        "cohort": cohort,
        "method": method,
        "training": {"rounds": ROUNDS},
        **({} if server is None else {"server": server}),
        **({} if noise is None else {"noise": noise}),
    }
    return assemble(parse_config(tables if privacy is None else {**tables, "privacy": privacy}))


def run_loop(experiment: Experiment) -> tuple[ServerState, Total]:
    engine = LoopEngine(experiment.population)
    state, total = experiment.server.init(experiment.initial_model), None
    for k in range(1, ROUNDS + 1):
        total = engine.sum_messages(begin_round(experiment.server, state, k))
        state = finish_round(experiment.server, state, k, total.sum)
    assert total is not None
    return state, total


SUMS: dict = {"trust": "aggregator", "epsilon": 50.0}
BATCHES: dict = {"work": "minibatch-gradient", "batch_size": 8}
SUMMED = [
    {"name": "alpha-normec", "damping": 0.2},
    {"name": "clip21"},
    {"name": "dp-fedavg"},
    {"name": "centered-clip"},
]


@pytest.mark.parametrize("side", [False, True], ids=["plain", "side values"])
@pytest.mark.parametrize("method", SUMMED)
@pytest.mark.sampled
def test_simulated_secure_aggregation_is_the_loops_to_the_bit(method: dict, side: bool, tmp_path: Path) -> None:
    """Rounds with too few clients are void: no client is asked, and the next round has the same batches."""
    experiment = make_experiment(method, {"sampling": "poisson", "probability": 0.5}, SUMS, BATCHES)
    if side:
        tables = {**experiment.config.tables, "adaptive": {}, "privacy": {**SUMS, "metrics_share": 0.1}}
        experiment = assemble(parse_config(tables))
    state, voids = run_summed(experiment)
    assert False in voids[voids.index(True) :]
    found, _ = run_flower(experiment, tmp_path, rounds=10)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(state, found, strict=True))


@pytest.mark.parametrize("method", SUMMED)
def test_a_sum_in_the_guard_band_moves_no_memory(method: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = itertools.count(), IntegerSums.total
    monkeypatch.setattr(IntegerSums, "total", lambda sums, sum_: None if next(calls) % 10 == 1 else real(sums, sum_))
    experiment = make_experiment(method, {"sampling": "everyone"}, SUMS, BATCHES)
    state, voids = run_summed(experiment)
    assert voids == [False, True, *[False] * 8]
    found, _ = run_flower(experiment, tmp_path, rounds=10)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(state, found, strict=True))


def run_summed(experiment: Experiment) -> tuple[ServerState, list[bool]]:
    """Run ten rounds of the loop; return the state, and the rounds that were void."""
    server, sums, voids = experiment.server, experiment.population.rules.sums, []
    assert sums is not None
    people = experiment.population
    engine, state = SecureSum(LoopEngine(people), sums, people.rules), server.init(experiment.initial_model)
    for k in range(1, 11):
        total = engine.sum_messages(begin_round(server, state, k))
        state = skip_round(server, state) if total.void else finish_round(server, state, k, total.sum)
        voids.append(total.void)
    return state, voids


def run_flower(experiment: Experiment, folder: Path, rounds: int = ROUNDS) -> tuple[ServerState, Total]:
    path = folder / f"{experiment.config.digest}.toml"
    path.write_text(experiment.config.to_toml(), encoding="utf-8")
    strategy = make_strategy(experiment)
    with inside_a_run():
        strategy.start(
            InProcessGrid(app, experiment.population.federation.population, {"config": str(path)}),
            ArrayRecord({ARRAYS: experiment.initial_model}),
            num_rounds=rounds,
            train_config=ConfigRecord({"experiment": experiment.config.digest}),
        )
    return strategy.state, strategy.total


def assert_same(experiment: Experiment, folder: Path) -> None:
    state, total = run_loop(experiment)
    flower_state, flower_total = run_flower(experiment, folder)
    for ours, theirs in zip(state, flower_state, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(total.sum, flower_total.sum)
    assert total[1:3] == flower_total[1:3]
    assert total.signal_norm == pytest.approx(flower_total.signal_norm, rel=1e-6, nan_ok=True)
    assert not torch.equal(state.model, experiment.initial_model)


# Sent memory needs noise at the client.
COMBINATIONS = [
    (method, cohort, privacy)
    for method, cohort, privacy in itertools.product(METHOD_TABLES, COHORTS, PROMISES)
    if not (method.get("memory") == "sent" and privacy and privacy["trust"] == "central")
    and not (method["name"] in NEED_EVERYONE and cohort["sampling"] != "everyone")
]


@pytest.mark.parametrize(("method", "cohort", "privacy"), COMBINATIONS)
@pytest.mark.sampled
def test_flower_gives_the_loops_model_to_the_bit(method, cohort, privacy, tmp_path):
    assert_same(make_experiment(method, cohort, privacy), tmp_path)


@pytest.mark.parametrize(
    "local",
    [
        {"work": "minibatch-gradient", "batch_size": 8},
        {"work": "local-steps", "steps": 3, "client_lr": 0.1, "batch_size": 8},
        {"work": "local-epochs", "epochs": 2, "client_lr": 0.1, "batch_size": 8, "signal": "gradient-mean"},
        {"work": "local-epochs", "epochs": 1, "client_lr": 0.1, "batch_size": 8, "order": "by-loss", "ascent": 0.1},
    ],
    ids=lambda table: table.get("order", table["work"]),
)
def test_flower_gives_the_loops_model_whatever_the_local_work(local, tmp_path):
    assert_same(make_experiment({"name": "clip21"}, COHORTS[1], PROMISES[1], local), tmp_path)


def test_flower_gives_the_loops_model_if_memories_change_local_steps(tmp_path):
    local = {"work": "local-steps", "steps": 2, "client_lr": 0.1, "batch_size": 8}
    assert_same(make_experiment({"name": "fedspeed"}, COHORTS[1], PROMISES[1], local), tmp_path)


@pytest.mark.parametrize("trust", ["central", "local"])
@pytest.mark.parametrize(
    ("method", "local"),
    [
        ({"name": "clip21"}, {"work": "full-gradient"}),
        ({"name": "dp-gd"}, {"work": "poisson-gradient", "rate": 0.2}),
        ({"name": "dp-gd"}, {"work": "dp-sgd", "rate": 0.2, "steps": 2, "client_lr": 0.1}),
        (
            {"name": "dp-scaffold"},
            {"work": "dp-sgd", "rate": 0.2, "steps": 2, "client_lr": 0.1, "signal": "gradient-mean"},
        ),
        ({"name": "dice-sgd", "clip_norm": 0.5, "gradient_cap": 1.0}, {"work": "full-gradient"}),
    ],
    ids=["full", "poisson", "dp-sgd", "dp-scaffold", "feedback"],
)
def test_flower_gives_the_loops_model_if_single_examples_are_protected(method, local, trust, tmp_path):
    if local["work"] == "dp-sgd":
        trust = "local"
    privacy = {"unit": "example", "example_clip": 1.0, "noise_multiplier": 1.0, "trust": trust}
    assert_same(make_experiment(method, COHORTS[1], privacy, local), tmp_path)


SIDE_VALUES = [{"name": "alpha-normec", "memory": "sent"}, {"name": "centered-clip"}, {"name": "clip21"}]


@pytest.mark.parametrize("privacy", [{"trust": "local", "epsilon": 50.0}, {"epsilon": 8.0}, None])
@pytest.mark.parametrize("method", SIDE_VALUES)
@pytest.mark.sampled
def test_flower_gives_the_loops_model_and_side_values(method: dict, privacy: dict | None, tmp_path: Path) -> None:
    """The bound goes to clients beside the model, or beside the memory, and metrics come back with the messages."""
    if method.get("memory") == "sent" and (privacy is None or "trust" not in privacy):
        method = {"name": "alpha-normec"}
    asked = None if privacy is None else {**privacy, "metrics_share": 0.1}
    plain = make_experiment(method, COHORTS[1], asked, BATCHES)
    experiment = assemble(parse_config({**plain.config.tables, "adaptive": {"rate": 0.5}}))
    state, total = run_loop(experiment)
    assert_same(experiment, tmp_path)
    assert len(total.sum) == len(state.model) + (1 if privacy is None else 3)
    assert float(state._asdict()["side_bound"]) != 1.0


@pytest.mark.parametrize("shift", ["rotation", "noise", "style"])
def test_flowers_clients_see_the_shifted_inputs_of_the_loops(shift, tmp_path):
    plain = make_experiment({"name": "clip21"}, COHORTS[0], None)
    data = {**plain.config.tables["data"], "shift": shift, "validation": 0.1}
    experiment = assemble(parse_config({**plain.config.tables, "data": data}))
    assert_same(experiment, tmp_path)
    assert not torch.equal(run_loop(experiment)[0].model, run_loop(plain)[0].model)


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_flower_gives_the_loops_model_whatever_the_server_makes_of_the_direction(optimizer, tmp_path):
    server = {"optimizer": optimizer}
    assert_same(make_experiment({"name": "clip21"}, COHORTS[1], PROMISES[0], server=server), tmp_path)


TURNS: dict = {"sampling": "separated", "min_separation": 2}
CORRELATED: dict[str, tuple[dict, dict | None]] = {
    "banded": (TURNS, {"kind": "banded"}),
    "side values": (TURNS, {"kind": "banded"}),
    "cyclic-banded": ({**TURNS, "probability": 0.3}, {"kind": "cyclic-banded", "bands": 2}),
    "geometric": (COHORTS[0], {"kind": "geometric-schedule"}),
    "in turns": (TURNS, None),
}


@pytest.mark.parametrize("kind", CORRELATED)
def test_flower_gives_the_loops_model_with_noise_that_returns(kind: str, tmp_path: Path) -> None:
    method, (cohort, noise) = {"name": "alpha-normec", "server_normalization": False, "damping": 0.2}, CORRELATED[kind]
    experiment = make_experiment(method, cohort, {"epsilon": 8.0}, BATCHES, noise=noise)
    if kind == "side values":
        experiment = assemble(parse_config({**experiment.config.tables, "adaptive": {"rate": 0.5}}))
    assert_same(experiment, tmp_path)
    past = run_loop(experiment)[0]._asdict().get("noise_earlier")
    assert (past is not None) == (noise is not None and "banded" in noise["kind"])
    assert past is None or float(past.abs().mean()) > 0.01


def test_a_client_of_another_experiment_is_told_apart(tmp_path):
    experiment = make_experiment({"name": "clip21"}, COHORTS[0], None)
    other = make_experiment({"name": "clip21", "clip_norm": 2.0}, COHORTS[0], None)
    (tmp_path / "other.toml").write_text(other.config.to_toml())
    strategy = make_strategy(experiment)
    with inside_a_run(), pytest.raises(ValueError, match=r"round 1: .* client 0: .* Give clients and server the same"):
        strategy.start(
            InProcessGrid(app, 7, {"config": str(tmp_path / "other.toml")}),
            ArrayRecord({ARRAYS: experiment.initial_model}),
            train_config=ConfigRecord({"experiment": experiment.config.digest}),
        )


def test_a_client_that_fails_ends_an_experiments_run_with_what_can_be_done_there(tmp_path, monkeypatch):
    """`max_failures` is a keyword of drop-in strategies; an experiment has no such key."""
    monkeypatch.chdir(tmp_path)
    experiment = make_experiment({"name": "clip21"}, COHORTS[0], None)
    (tmp_path / "config.toml").write_text(experiment.config.to_toml())
    grid = InProcessGrid(
        app, 7, {"config": str(tmp_path / "config.toml")}, hook=lambda who, m: who != 3 or asks_node_info(m.content)
    )
    with inside_a_run(), pytest.raises(UserError) as caught:
        make_strategy(experiment).start(
            grid,
            ArrayRecord({ARRAYS: experiment.initial_model}),
            train_config=ConfigRecord({"experiment": experiment.config.digest}),
        )
    expected = "round 1: expected an answer from each of 7 clients, got client 3: no answer within 3600 s. Fix it and "
    assert str(caught.value).startswith(expected + "start again with another --out, or with --engine loop")
    assert "max_failures" not in str(caught.value)
