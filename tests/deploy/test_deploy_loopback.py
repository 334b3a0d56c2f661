"""Real processes: a deployment computes the loop's model to the bit, even if its node and its server are killed."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Loopback, wait_until
from support.own_folder import own_folder

from fedpriv.deploy.device.policy import POLICY_FILE
from fedpriv.deploy.heads import HEADS_FILE, HeadBook
from fedpriv.experiment.config import load_config
from fedpriv.experiment.execution import Execution
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import RunDirectory

pytestmark = pytest.mark.xdist_group("loopback")

CONFIG = """
name = "devices"
seed = 7
[data]
name = "digits"
partition = "dirichlet"
concentration = 0.5
clients = 2
[model]
name = "softmax"
[local]
work = "minibatch-gradient"
batch_size = 32
[cohort]
sampling = "everyone"
[method]
name = "alpha-normec"
alpha = 1.0
beta = 0.2
server_lr = 1.0
damping = 0.1
[privacy]
trust = "local"
noise_multiplier = 0.5
[training]
rounds = {rounds}
[deployment]
deadline = 90
min_participants = 2
"""


ACCEPTED = {
    "methods": ["alpha-normec", "./method.py:Shifted"],
    "models": ["softmax", "./net.py:Net"],
    "data": ["digits", "./data.py:load"],
}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    made = Loopback(tmp_path_factory.mktemp("deployment") / "d", nodes=2)
    made.make()
    made.start_all()
    yield made
    made.close()


def _config(folder: Path, rounds: int) -> Path:
    path = folder / "devices.toml"
    path.write_text(CONFIG.format(rounds=rounds))
    return path


def _by_loop(config: Path, out: Path) -> bytes:
    run_experiment(load_config(config), out, engine="loop", execution=Execution(client_noise="faithful"))
    return (out / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_deployment_gives_the_model_of_the_loop_to_the_bit(deployment: Loopback, tmp_path: Path) -> None:
    config = _config(tmp_path, rounds=2)
    run = deployment.run(config, tmp_path / "devices", "--test-seeded")
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 0, printed
    assert (tmp_path / "devices" / "model.safetensors").read_bytes() == _by_loop(config, tmp_path / "loop")
    heads = HeadBook(deployment.folder / "server" / "flower" / HEADS_FILE).heads
    assert {client: head.lines for client, head in heads.items()} == dict.fromkeys(range(2), 2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, processes are not forked")
def test_flowers_processes_are_forks_of_their_node_or_server(deployment: Loopback) -> None:
    """Each of them would otherwise import PyTorch and Flower again, in the minutes before a first round."""
    for name in ("server", "node-0", "node-1"):
        wait_until(lambda name=name: "fork-apps" in deployment.processes(name), 240.0, deployment.log(name))
        found = deployment.processes(name)
        assert len(found) == 3
        assert "flower-superexe" in found


@pytest.mark.slow
def test_a_users_own_folder_runs_on_nodes_that_name_its_files_in_their_policies(
    deployment: Loopback, tmp_path: Path
) -> None:
    """Each node has a copy of the files; none of them comes from the server."""
    config = own_folder(tmp_path, people=2)
    for i in range(deployment.nodes):
        home = deployment.folder / f"node-{i}"
        own_folder(home, people=2)
        policy = home / POLICY_FILE
        text = policy.read_text()
        for key, names in ACCEPTED.items():
            text = re.sub(rf"^{key} = \[.*?\]", f"{key} = {names}", text, flags=re.MULTILINE | re.DOTALL)
        policy.write_text(text)
    run = deployment.run(config, tmp_path / "devices", "--test-seeded")
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 0, printed
    assert (tmp_path / "devices" / "model.safetensors").read_bytes() == _by_loop(config, tmp_path / "loop")


@pytest.mark.slow
def test_a_killed_node_and_a_killed_server_change_nothing(deployment: Loopback, tmp_path: Path) -> None:
    config, out = _config(tmp_path, rounds=3), tmp_path / "devices"
    directory = RunDirectory(out)

    def finished(rounds: int) -> bool:
        return len(directory.rows("rounds.jsonl")) > rounds

    run = deployment.run(config, out, "--test-seeded")
    wait_until(lambda: finished(1), 240.0, deployment.log("server"))
    deployment.kill("node-1")
    deployment.start("node-1")
    wait_until(lambda: finished(2), 240.0, deployment.log("server"))
    deployment.kill("server")
    printed, _ = run.communicate(timeout=240)
    assert not directory.file("summary.json").exists(), printed
    deployment.start("server")
    again = deployment.run(config, out, "--test-seeded", "--resume")
    printed, _ = again.communicate(timeout=400)
    assert again.returncode == 0, printed
    assert (out / "model.safetensors").read_bytes() == _by_loop(config, tmp_path / "loop")
    asked = [row["asked"] for row in directory.rows("participation.jsonl")]
    assert asked == [[0, 1]] * 3


@pytest.mark.slow
def test_a_removed_node_ends_with_one_line_and_leaves_nothing_behind(deployment: Loopback) -> None:
    """This is the last of these tests, because node-1 does not come back."""
    ended = deployment.deploy("remove", "node-1", str(deployment.folder))
    assert (ended.returncode, ended.stdout.splitlines()[:1]) == (0, ["node-1: removed"])
    assert deployment.ends("node-1", 180.0) == 2
    log = deployment.log("node-1")
    assert "Traceback" not in log
    assert log.splitlines()[-1].startswith("fedpriv: node.key: expected a registered key, got a key that")
    wait_until(lambda: not deployment.processes("node-1"), 10.0, log)
    checked = deployment.deploy("check", str(deployment.folder / "admin"))
    assert checked.returncode == 0, checked.stdout
    assert "all 1 registered" in checked.stdout
