"""Analyses on devices: the answers of the loop to the bit, charged in ledgers, refused by policies."""

import json
from pathlib import Path

import pytest
from deploy_in_process import DeploymentGrid, run_server

from fedpriv.experiment.config import load_config, read_config_text
from fedpriv.experiment.execution import Execution
from fedpriv.experiment.run import run_experiment

ASKED = """
name = "asked"
seed = 3
[data]
name = "digits"
clients = 4
[analysis]
{records}
[analysis.digits]
kind = "labels"
[analysis.pixels]
kind = "moments"
columns = [0]
low = 0.0
high = 1.0
[privacy]
noise_multiplier = 2.0
trust = "{trust}"
"""


@pytest.mark.parametrize(("trust", "records"), [("central", ""), ("local", "records = 400")])
def test_an_analysis_of_devices_is_that_of_the_loop_and_is_charged(trust: str, records: str, tmp_path: Path) -> None:
    toml, out = ASKED.format(trust=trust, records=records), tmp_path / "out"
    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust=trust)
    resolved = load_config(read_config_text(toml, "here"))
    run_server(grid, resolved.to_toml(), out, test_seeded=True)
    loop = tmp_path / "loop"
    run_experiment(resolved, loop, engine="loop", execution=Execution(client_noise="faithful"))
    found, here = (json.loads((folder / "analysis.json").read_text()) for folder in (out, loop))
    assert found == here
    assert found["answers"]["digits"]["standard_error"] > 0.0
    ledgers = list((tmp_path / "nodes" / "node-0").rglob("ledger*"))
    assert ledgers
    assert any("statistics" in file.read_text() or file.stat().st_size > 0 for file in ledgers if file.is_file())
