"""Analyses on devices: the answers of the loop to the bit, charged in ledgers, and refused by policies."""

import json
from pathlib import Path
from typing import Any

import pytest
from deploy_in_process import DeploymentGrid, run_server

from fedpriv.deploy.device.ledger import Ledger, spent
from fedpriv.experiment.config import Config, load_config, read_config_text
from fedpriv.experiment.execution import Execution
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import RunDirectory

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


def asked(trust: str, records: str = "") -> Config:
    return load_config(read_config_text(ASKED.format(trust=trust, records=records), "here"))


def ask_devices(config: Config, folder: Path, *first: tuple[str, str]) -> tuple[dict[str, Any], list[Ledger]]:
    """Run an analysis on devices; return its answers, and their ledgers.

    Args:
        config: The analysis.
        folder: Folder of the run and of the nodes.
        first: Heads of tables in the first device's policy, each with a line for it.
    """
    assert config.privacy is not None
    grid = DeploymentGrid(folder / "nodes", 4, {}, trust=config.privacy.trust)
    homes = [folder / "nodes" / f"node-{client}" for client in range(4)]
    policy = homes[0] / "fedpriv-client.toml"
    for head, line in first:
        policy.write_text(policy.read_text().replace(head, f"{head}\n{line}"))
    run_server(grid, config.to_toml(), folder / "out", test_seeded=True)
    return RunDirectory(folder / "out").read_json("analysis.json"), [Ledger(home / "state") for home in homes]


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPRIV_TEST_SEEDED", "1")


@pytest.mark.parametrize(("trust", "records"), [("central", ""), ("local", "records = 400")])
def test_an_analysis_of_devices_is_that_of_the_loop_and_is_charged(trust: str, records: str, tmp_path: Path) -> None:
    config = asked(trust, records)
    accepted = (("[accepts]", 'tasks = ["statistics"]'), ("[limits]", "min_noise_multiplier = 0.5"))
    found, ledgers = ask_devices(config, tmp_path, *accepted)
    run_experiment(config, tmp_path / "loop", engine="loop", execution=Execution(client_noise="faithful"))
    assert found == json.loads((tmp_path / "loop" / "analysis.json").read_text())
    for ledger in ledgers:
        (entry,) = ledger.entries()
        assert entry.method == "dp-gd"
        assert spent([entry], found["delta"], found["adjacency"]) == pytest.approx(found["epsilon"], rel=1e-6)


@pytest.mark.parametrize(
    ("head", "line", "says"),
    [
        ("[accepts]", 'tasks = ["classification"]', "accepts.tasks"),
        ("[limits]", "min_noise_multiplier = 5.0", "limits.min_noise_multiplier"),
    ],
)
def test_a_device_whose_policy_refuses_an_analysis_is_not_charged(
    head: str, line: str, says: str, tmp_path: Path
) -> None:
    _, ledgers = ask_devices(asked("local"), tmp_path, (head, line))
    (row,) = RunDirectory(tmp_path / "out").rows("participation.jsonl")
    assert {client: refusal["kind"] for client, refusal in row["refused"].items()} == {"0": "policy"}
    assert says in row["refused"]["0"]["reason"]
    assert [len(ledger.entries()) for ledger in ledgers] == [0, 1, 1, 1]
