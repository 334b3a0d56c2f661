"""Small experiments for the tests of reports."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedpriv.experiment.config import parse_config
from fedpriv.experiment.run import run_experiment
from fedpriv.report.study import Study

HOSTILE = "<script>alert(1)<img src=x onerror=alert(2)>"
"""A run's name; a folder may be called so."""

CENTRAL = {"trust": "central", "adjacency": "add-or-remove", "delta": 1e-5}
DEVICES: dict[str, Any] = {
    "devices": {"kind": "log-normal", "speed": 20.0, "speed_spread": 0.5, "download": 1e5, "upload": 1e5},
    "schedule": {"kind": "synchronous"},
}


def run_trial(out: Path, method: dict[str, Any], *, seed: int = 1, rounds: int = 3, **tables: Any) -> Path:
    """Runs a small experiment into `out`, or into a separate folder below `out/trials` if `out` is there."""
    data = {"name": "digits", "clients": 20, "partition": "dirichlet", "concentration": 0.3, **tables.pop("data", {})}
    config = parse_config(
        {
            "name": "small <b>",
            "seed": seed,
            "data": data,
            "model": {"name": "softmax"},
            "method": method,
            "training": {"rounds": rounds},
            **tables,
        }
    )
    folder = out / "trials" / config.digest[:12] if out.exists() else out
    run_experiment(config, folder, engine="vectorized")
    return folder


def fedavg(server_lr: float) -> dict[str, Any]:
    return {"name": "dp-fedavg", "clip_norm": 0.5, "server_lr": server_lr}


def normec(alpha: float, beta: float) -> dict[str, Any]:
    return {"name": "alpha-normec", "alpha": alpha, "beta": beta, "server_lr": 1.0, "server_normalization": False}


def large_study(trials: int, rounds: int) -> Study:
    """Return a study like that of a sweep over three hyperparameters, five seeds and two guarantees."""
    rng = np.random.default_rng(0)
    number = np.arange(trials)
    setting = number // 5
    runs = pd.DataFrame({"run": [f"{n:012x}" for n in number], "setting": setting + 1, "seed": number % 5, "name": "n"})
    runs["method"] = runs["method.name"] = np.where(setting % 2, "alpha-normec", "dp-fedavg")
    for key, size, skip in (("method.alpha", 10, 2), ("method.beta", 10, 20), ("method.server_lr", 4, 200)):
        runs[key] = 0.1 * (setting // skip % size + 1)
    runs["private"], runs["problem"], runs["delta"], runs["trust"] = setting % 4 > 1, "", 1e-5, "central"
    runs["privacy.epsilon"] = runs["epsilon"] = np.where(runs["private"], 8.0, np.nan)
    runs["privacy"] = np.where(runs["private"], "central trust, ε ≤ 8", "not private")
    runs["adjacency"], runs["adversary"], runs["accountant"] = "replace", "anyone", "PLD"
    runs["data.name"], runs["model.name"], runs["population"], runs["rounds"] = "digits", "cnn", 100, rounds
    runs["cohort_size"] = 100.0
    absent = ("validation_accuracy", "validation_loss", "simulated_seconds", "bytes_up", "bytes_down", "bytes")
    frame = pd.DataFrame(
        {"run": np.repeat(runs["run"], rounds), "setting": np.repeat(runs["setting"], rounds)}
        | {"round": np.tile(np.arange(1, rounds + 1), trials), "epsilon": np.repeat(runs["epsilon"], rounds)}
    )
    frame["test_accuracy"], frame["test_loss"] = rng.random(len(frame)), rng.random(len(frame))
    runs["test_accuracy"], runs["test_loss"] = rng.random(trials), rng.random(trials)
    for key in absent:
        runs[key] = frame[key] = np.nan
    told = runs.filter(regex=r"\.|^seed$").assign(trial=runs["run"], status="done", reason="")
    statements = {"Privacy statement for all\n": tuple(runs["run"])}
    return Study(name="large", trials=told, runs=runs, rounds=frame.reset_index(drop=True), statements=statements)


LONG = (
    "differences-of-private-gradients",
    "fed-alpha-normec-with-damping",
    "clipping-around-a-public-memory",
    "averages-of-clipped-signals",
)
"""Names of methods, the worst first: in `wide_study` the accuracy of the n-th is around 0.6 + n / 10."""


def wide_study(seed: int = 0) -> Study:
    """Return a study of 48 trials: 4 methods with long names, 2 settings, 2 guarantees, 3 seeds, 12 rounds each."""
    study, number, rng = large_study(48, 12), np.arange(48), np.random.default_rng(seed)
    setting, method = number // 3, number // 3 % 4
    runs = study.runs.assign(setting=setting + 1, seed=number % 3, private=setting > 7)
    runs["method"] = runs["method.name"] = [LONG[m] for m in method]
    runs["method.server_lr"], runs["method.alpha"], runs["method.beta"] = 0.3 + 0.7 * (setting // 4 % 2), 1.0, 0.1
    runs["privacy.epsilon"] = runs["epsilon"] = np.where(runs["private"], 8.0, np.nan)
    runs["privacy"] = np.where(runs["private"], "central trust, ε ≤ 8", "not private")
    runs["test_accuracy"] = 0.6 + 0.1 * method - 0.2 * runs["private"] + 0.004 * rng.random(48)
    rounds = study.rounds.assign(setting=np.repeat(runs["setting"].to_numpy(), 12))
    last = np.repeat(runs["test_accuracy"].to_numpy(), 12)
    rounds["test_accuracy"] = last - (last - 0.1) * 0.5 ** rounds["round"]
    trials = runs.filter(regex=r"\.|^seed$").assign(trial=runs["run"], status="done", reason="")
    name = "error-feedback-against-clipping-for-strongly-heterogeneous-clients-with-partial-participation"
    return replace(study, name=name, runs=runs, rounds=rounds, trials=trials)
