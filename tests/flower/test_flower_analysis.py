"""Frequent words on every engine: the levels of Flower's apps, Ray's workers and the loop have the same answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flower_in_process import InProcessGrid, inside_a_run
from flwr.app import ArrayRecord, ConfigRecord
from support.said import said_tables, write_said

from clients.client_app import app
from fedpriv.experiment.analyses.heavy import HeavyAnalysis
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import Config
from fedpriv.experiment.execution import EngineName, Execution
from fedpriv.experiment.results import load_model
from fedpriv.experiment.run import run_experiment
from fedpriv.flower.messages import ARRAYS
from fedpriv.runners import run_experiment as run_on_any_engine
from strategies.server_app import make_strategy

CLIENTS = 12
TRUSTS = ["central", "aggregator"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_said(tmp_path_factory.mktemp("words"), CLIENTS)


def words(trust: str) -> HeavyAnalysis:
    return HeavyAnalysis(said_tables(3, trust=trust, epsilon=50.0, delta=1e-5))


@pytest.mark.parametrize("trust", TRUSTS)
def test_every_level_is_flowers_to_the_bit(trust: str, data: Path, tmp_path: Path) -> None:
    """The model of a level is its vector of answers."""
    levels = []

    def ask(config: Config, directory: Path) -> dict[str, Any]:
        run_experiment(config, directory, engine="loop", data_root=data)
        path = directory / "asked.toml"
        path.write_text(config.to_toml(), encoding="utf-8")
        experiment = assemble(config, data_root=data)
        strategy = make_strategy(experiment)
        with inside_a_run():
            strategy.start(
                InProcessGrid(app, CLIENTS, {"config": str(path), "data-root": str(data)}),
                ArrayRecord({ARRAYS: experiment.initial_model}),
                num_rounds=1,
                train_config=ConfigRecord({"experiment": config.digest}),
            )
        (ours,) = load_model(directory).values()
        levels.append((ours.flatten(), strategy.state.model))
        return json.loads((directory / "analysis.json").read_text())

    found = words(trust).run(tmp_path / "out", ask, data_root=data)
    assert len(levels) == 2
    for ours, flowers in levels:
        assert torch.equal(ours, flowers)
        assert bool(ours.any())
    assert "the" in found["answers"]["frequent"]["items"]  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "workers"), [("ray", 2), ("flower", None)])
@pytest.mark.parametrize("trust", TRUSTS)
def test_an_engine_has_the_loops_answers(
    trust: str, engine: EngineName, workers: int | None, data: Path, tmp_path: Path
) -> None:
    def answers(name: EngineName, workers: int | None = None) -> dict[str, Any]:
        def ask(config: Config, directory: Path) -> dict[str, Any]:
            execution = Execution(engine=name, workers=workers)
            run_on_any_engine(config, directory, engine=name, data_root=data, execution=execution)
            return json.loads((directory / "analysis.json").read_text())

        return words(trust).run(tmp_path / name, ask, data_root=data)

    assert answers(engine, workers) == answers("loop")
