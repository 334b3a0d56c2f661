"""A small study with real runs, and its report."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.report_runs import CENTRAL, DEVICES, HOSTILE, fedavg, normec, run_trial

from fedpriv.experiment import recorder
from fedpriv.report.write import write_report


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip plots of single runs, which take longer than the runs."""
    monkeypatch.setattr(recorder, "plot_curves", lambda *_, **__: None)


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sweep's folder: two methods, three guarantees, two seeds; other data, cohorts, devices; failures."""
    root = tmp_path_factory.mktemp("study") / "small & <b>bold"
    root.mkdir()
    methods = [fedavg(0.3), fedavg(1.0), *(normec(alpha, beta) for alpha in (0.1, 1.0) for beta in (0.1, 1.0))]
    private: dict[str, Any] = {"privacy": {**CENTRAL, "epsilon": 8.0}}
    promises: list[dict[str, Any]] = [{}, private, {"privacy": {**CENTRAL, "epsilon": 2.0}}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "plot_curves", lambda *_, **__: None)
        for method in methods:
            for promise in promises:
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
        json.dumps({"reason": "data.clients: expected <i>fewer</i></script><b>, got 1e9. Fix it."})
    )
    (root / "trials.csv").write_text(
        "trial,status,method.server_lr,reason\n0badc0ffee00,failed,0.7,\n"
        ",failed,-1,method.server_lr: expected above 0\nabcabcabcabc,left,0.9,\n"
    )
    return root


@pytest.fixture(scope="session")
def page(study_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the study's page."""
    return write_report(study_folder, tmp_path_factory.mktemp("out") / "report")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Start a headless Chromium that records console and requests; skip without one, but never in CI."""
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
