"""Wrong arguments of the Python API are one line that names the argument, whatever is given."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import fedpriv
from fedpriv.audit.run import AuditChoice, run_audit
from fedpriv.clock import SCHEDULES
from fedpriv.clock.profiles import DEVICES, Uniform
from fedpriv.data.dataset import DATASETS
from fedpriv.data.partitions import PARTITIONS
from fedpriv.data.shifts import SHIFTS
from fedpriv.errors import UserError
from fedpriv.experiment.build import check_device_name
from fedpriv.experiment.results import compare_runs
from fedpriv.mechanisms.controllers import CONTROLLERS
from fedpriv.methods import METHODS, SERVER_OPTIMIZERS, AdaptiveBound, DPFedAvg
from fedpriv.privacy import (
    Aggregation,
    AggregationChoice,
    Everyone,
    FixedSize,
    NoiseChoice,
    Poisson,
    Separated,
    make_plan,
    privacy_statement,
)
from fedpriv.privacy.correlation import Banded
from fedpriv.sweeps.stopping import RULES
from fedpriv.tasks.kinds import TASKS
from fedpriv.tasks.local_work import LOCAL_WORKS
from fedpriv.tasks.models import MODELS
from fedpriv.tasks.per_client import PerClient

WRONG = (None, "x", "", 0, -1, 1.5, math.nan, math.inf, True, [], {}, (), object(), b"x", 10**30, [None], {"a": 1}, int)
PLAN: dict[str, Any] = {
    "trust": "central",
    "adjacency": None,
    "sampling": Everyone(100),
    "rounds": 3,
    "delta": 1e-5,
    "l2_bound": 1.0,
    "epsilon": 8.0,
    "noise_multiplier": None,
    "client_memory": True,
    "record": None,
}
SAID: dict[str, Any] = {
    "plan": make_plan(**PLAN),
    "method": "dp-fedavg",
    "randomness": "seeded",
    "deployed": False,
    "simulated": None,
    "data": None,
    "recorded": False,
    "evaluated": False,
    "app": None,
    "size": None,
}
TABLE: dict[str, Any] = {"file": "a.csv", "target": "y", "numeric": {"a": (0.0, 1.0)}}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "libsvm": {"file": "a"},
    "csv": TABLE,
    "parquet": TABLE,
    "npz": {"file": "a"},
    "leaf": {"file": "a"},
    "image-folder": {"file": "a"},
}


def refused(call: Callable[..., object], given: Mapping[str, Any]) -> None:
    """Check that a call accepts its arguments, and that each wrong one in their place is accepted or one line."""
    call(**given)
    for name in given:
        for value in WRONG:
            error = fault_of(call, {**given, name: value})
            assert error is None or is_one_line(error), f"{name}={value!r}: {error!r}"


def fault_of(call: Callable[..., object], given: Mapping[str, Any]) -> Exception | None:
    try:
        call(**given)
    except Exception as error:
        return error
    return None


def is_one_line(error: Exception) -> bool:
    return isinstance(error, UserError) and "\n" not in str(error)


def settings(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a dataclass, with its defaults."""
    defaults = {part.name: part.default for part in fields(kind) if part.init and part.default is not MISSING}
    made = {part.name: part.default_factory() for part in fields(kind) if part.default_factory is not MISSING}
    return {**defaults, **made, **given}


def classes() -> Iterator[tuple[str, type, Mapping[str, Any]]]:
    registries: tuple[Any, ...]
    registries = (METHODS, SERVER_OPTIMIZERS, MODELS, TASKS, LOCAL_WORKS, PARTITIONS, SHIFTS, SCHEDULES, CONTROLLERS)
    registries = (*registries, DATASETS, DEVICES, RULES)
    for registry in registries:
        for name, kind in registry.items():
            needed = [part for part in fields(kind) if part.default is MISSING and part.default_factory is MISSING]
            given = {part.name: 3 if "int" in str(part.type) else 0.5 for part in needed if part.init}
            yield f"{registry.kind} {name}", kind, ARGUMENTS.get(name, given)


KINDS = {name: (kind, given) for name, kind, given in classes()}
PAIR = (1.0, 2.0)
KINDS |= {
    "kind of devices uniform": (Uniform, {"speed": PAIR, "download": PAIR, "upload": PAIR}),
    "adaptive": (AdaptiveBound, {}),
    "evaluation": (PerClient, {}),
    "audit": (AuditChoice, {}),
    "everyone": (Everyone, {"population": 5}),
    "poisson": (Poisson, {"population": 5, "probability": 0.5}),
    "fixed": (FixedSize, {"population": 5, "size": 2}),
    "separated": (Separated, {"population": 50, "min_separation": 2, "probability": 0.5}),
    "noise": (NoiseChoice, {"kind": "banded", "bands": 2}),
    "privacy": (fedpriv.Privacy, {"epsilon": 8.0}),
    "privacy of examples": (fedpriv.Privacy, {"epsilon": 8.0, "unit": "example", "example_clip": 1.0, "examples": 9}),
    "aggregation": (AggregationChoice, {}),
    "sums": (Aggregation, {"helpers": 1, "least_survivors": 3, "colluders": 1, "most": 5, "size": 3}),
    "execution": (fedpriv.Execution, {}),
}
for _name in ("kind of devices trace", "data set own"):
    KINDS.pop(_name, None)


@pytest.mark.parametrize("name", KINDS)
def test_wrong_settings_are_one_line(name: str) -> None:
    kind, given = KINDS[name]
    refused(kind, settings(kind, given))


@pytest.mark.parametrize("sampling", [Everyone(100), Poisson(100, 0.1), FixedSize(100, 10)])
def test_wrong_arguments_of_a_plan_are_one_line(sampling: Any) -> None:
    refused(make_plan, {**PLAN, "sampling": sampling, "client_memory": sampling.name == "everyone"})


@pytest.mark.parametrize("memory", [None, 0, "", "False"])
def test_a_plan_takes_only_true_and_false_for_memory(memory: Any) -> None:
    """None counted as False, and with fixed-size cohorts a plan without memory claims amplification by sampling."""
    with pytest.raises(UserError, match=r"^client_memory: expected True or False"):
        make_plan(**{**PLAN, "sampling": FixedSize(100, 10), "client_memory": memory})


@pytest.mark.parametrize("value", ["no", 1, None, [0]])
def test_only_true_and_false_say_that_everyone_answers(value: Any) -> None:
    """A text counted as True, which credits sampling under secure aggregation."""
    for kind, given in (KINDS["sums"], KINDS["aggregation"]):
        with pytest.raises(UserError, match=r"^aggregation.everyone_answers: expected True or False"):
            kind(**{**given, "everyone_answers": value})
    with pytest.raises(UserError, match=r"^hidden: expected True or False"):
        Banded(coefficients=(1.0, 0.5), rounds=2, hidden=value)


def test_wrong_arguments_of_a_statement_are_one_line() -> None:
    refused(privacy_statement, SAID)
    with pytest.raises(UserError, match=r"^randomness: expected seeded or system, got 'seed'"):
        privacy_statement(**{**SAID, "randomness": "seed"})


def experiment(**changes: Any) -> fedpriv.Experiment:
    rng = np.random.default_rng(0)
    clients = [(rng.normal(size=(6, 4)).astype("f4"), rng.integers(0, 3, 6)) for _ in range(4)]
    given: dict[str, Any] = {"model": torch.nn.Linear(4, 3), "data": {"train": clients, "test": clients[0]}}
    return fedpriv.Experiment(**{**given, "method": DPFedAvg(), "rounds": 1, **changes})


def test_wrong_parts_of_an_experiment_are_one_line() -> None:
    given = experiment(privacy=fedpriv.Privacy(epsilon=8.0))
    whole = {part.name: getattr(given, part.name) for part in fields(given)}
    refused(lambda **parts: fedpriv.Experiment(**parts).plan(), whole)


def test_wrong_columns_are_one_line() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=40), "y": np.arange(40) % 2, "who": np.arange(40) % 4})
    made = {"model": torch.nn.Linear(1, 2), "data": frame}
    refused(lambda **names: experiment(**made, **names).config, {"label": "y", "client": "who", "inputs": ["a"]})


@pytest.mark.parametrize("name", ["out", "device", "resume", "watch", "checkpoint_every", "engine"])
@pytest.mark.parametrize("value", [None, 0, -1, math.nan, "", object(), b"x", [], "meta"])
def test_wrong_options_of_a_run_are_one_line(name: str, value: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    error = fault_of(experiment().run, {"out": "run", "engine": "loop", name: value})
    if (name, value) in [("watch", None), ("checkpoint_every", None), ("out", "meta")]:
        assert error is None
    else:
        assert error is not None
        assert is_one_line(error)


@pytest.mark.parametrize("name", ["execution", "data_root", "deploy"])
@pytest.mark.parametrize("value", [0, -1, math.nan, object(), b"x", [None], int])
def test_wrong_options_of_run_experiment_are_one_line(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        fedpriv.run_experiment(experiment().config, tmp_path / "run", engine="loop", **{name: value})


CALLS: dict[str, Callable[[Any], object]] = {
    "load_config": fedpriv.load_config,
    "settings": lambda value: fedpriv.load_config({}, value),
    "load_results": fedpriv.load_results,
    "load_model": fedpriv.load_model,
    "load_module": fedpriv.load_module,
    "export_model": lambda value: fedpriv.export_model(value, "state-dict"),
    "write_report": fedpriv.write_report,
    "select": lambda value: fedpriv.write_report("none", select=value),
    "compare_runs": compare_runs,
    "run_experiment": lambda value: fedpriv.run_experiment(value, "none"),
    "run_audit": lambda value: run_audit(value, "none"),
    "track": lambda value: fedpriv.track(value, experiment().config, "none"),
    "track out": lambda value: fedpriv.track([], experiment().config, value),
    "track config": lambda value: fedpriv.track([], value, "none"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", [None, 3, math.nan, object(), b"x", "", [None], {"a": 1}, int])
def test_wrong_paths_are_one_line(name: str, value: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        CALLS[name](value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["meta", "meta:0", None, 0, b"cpu"])
def test_what_is_no_device_is_refused_without_a_look_at_the_machine(device: Any) -> None:
    """Sweeps and deployments check the name alone before they start."""
    with pytest.raises(UserError, match=r"^--device: expected"):
        check_device_name(device, "--device")


def test_a_device_may_be_one_of_torch(tmp_path: Path) -> None:
    device: Any = torch.device("cpu")
    assert experiment().run(tmp_path / "a", engine="loop", device=device)
    assert fedpriv.run_experiment(experiment().config, tmp_path / "b", engine="loop", device=device)


def test_a_data_root_may_be_a_text(tmp_path: Path) -> None:
    tables: dict[str, Any] = {
        "name": "own",
        "seed": 1,
        "data": {"name": "npz", "file": "a.npz", "clients": 2, "partition": "iid"},
    }
    np.savez(tmp_path / "a.npz", inputs=np.ones((20, 2), dtype="f4"), labels=np.arange(20) % 2)
    tables |= {"model": {"name": "softmax"}, "method": {"name": "dp-fedavg"}, "training": {"rounds": 1}}
    root: Any = str(tmp_path)
    assert fedpriv.run_experiment(fedpriv.load_config(tables), tmp_path / "run", engine="loop", data_root=root)
