"""A small study, run for real, and its report."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpriv.experiment import journal
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.report import write_report
from fedpriv.experiment.run import run_experiment

HOSTILE = "<script>alert(1)<img src=x onerror=alert(2)>"
"""A run's name; a folder may be called so."""

CENTRAL = {"trust": "central", "adjacency": "add-or-remove", "delta": 1e-5}
DEVICES = {
    "devices": {"kind": "log-normal", "speed": 20.0, "speed_spread": 0.5, "download": 1e5, "upload": 1e5},
    "schedule": {"kind": "synchronous"},
}


def run_trial(out: Path, method: dict[str, Any], *, seed: int = 1, rounds: int = 3, **tables: Any) -> Path:
    """Runs a small experiment into `out`, or into a folder of its own below `out/trials` if `out` is there."""
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


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder: two methods on grids, three promises, two seeds; other data, cohorts, devices; failures."""
    root = tmp_path_factory.mktemp("study") / "small & <b>bold"
    root.mkdir()
    methods = [fedavg(0.3), fedavg(1.0), *(normec(alpha, beta) for alpha in (0.1, 1.0) for beta in (0.1, 1.0))]
    private = {"privacy": {**CENTRAL, "epsilon": 8.0}}
    with pytest.MonkeyPatch.context() as patch:
        # A run's own picture takes longer than the run.
        patch.setattr(journal, "plot_curves", lambda *_, **__: None)
        for method in methods:
            for promise in ({}, private, {"privacy": {**CENTRAL, "epsilon": 2.0}}):
                for seed in (1, 2):
                    run_trial(root, method, seed=seed, **promise)
        for concentration in (0.1, 10.0):
            run_trial(root, fedavg(1.0), data={"concentration": concentration}, **private)
        run_trial(root, fedavg(1.0), data={"clients": 40}, **private)
        run_trial(root, fedavg(1.0), cohort={"sampling": "poisson", "probability": 0.5}, **private)
        for rounds in (1, 3):
            run_trial(root, fedavg(1.0), rounds=rounds, **DEVICES)
        run_trial(root / HOSTILE, fedavg(0.1), **private)
    failed = root / "trials" / "0badc0ffee00"
    failed.mkdir()
    (failed / "failure.json").write_text(
        json.dumps({"reason": "data.clients: expected <i>fewer</i>, got 1e9. Mend it."})
    )
    (root / "trials.csv").write_text(
        "trial,status,method.server_lr,reason\n0badc0ffee00,failed,0.7,\n"
        ",failed,-1,method.server_lr: expected above 0\nabcabcabcabc,left,0.9,\n"
    )
    return root


@pytest.fixture(scope="session")
def page(study_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's page."""
    return write_report(study_folder, tmp_path_factory.mktemp("out") / "report")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium that keeps its console and its requests; skipped where there is none, but never in CI."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        reason = "Chromium and chromedriver are not installed: run `make browser`"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        switches += " disable-component-update disable-sync disable-dev-shm-usage hide-scrollbars"
        for switch in (*switches.split(), f"user-data-dir={profile}"):
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        yield started
        started.quit()
