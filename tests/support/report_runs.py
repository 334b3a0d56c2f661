"""Small experiments for the tests of reports."""

from pathlib import Path
from typing import Any

from fedpriv.experiment.config import parse_config
from fedpriv.experiment.run import run_experiment

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
