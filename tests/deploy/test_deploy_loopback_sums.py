"""Real processes: secure aggregation with a helper computes the loop's model, also if the helper is killed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Loopback, wait_until

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
trust = "aggregator"
noise_multiplier = 0.5
[aggregation]
helpers = 1
least_survivors = 2
[training]
rounds = 3
[deployment]
deadline = 180
"""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    made = Loopback(tmp_path_factory.mktemp("deployment") / "d", nodes=2, helpers=1)
    made.make()
    made.start_all()
    yield made
    made.close()


@pytest.mark.slow
def test_sums_of_real_processes_are_the_loops_to_the_bit(deployment: Loopback, tmp_path: Path) -> None:
    """The helper is killed after the first turn, and started again."""
    config, out = tmp_path / "devices.toml", tmp_path / "devices"
    config.write_text(CONFIG)
    checked = deployment.deploy("check", str(deployment.folder / "helper-0"))
    assert checked.returncode == 0, checked.stdout
    run = deployment.run(config, out, "--test-seeded")
    directory = RunDirectory(out)
    wait_until(lambda: len(directory.rows("rounds.jsonl")) > 1 or run.poll() is not None, 400.0)
    assert run.poll() is None, run.communicate()[0]
    deployment.kill("helper-0")
    deployment.start("helper-0")
    printed, _ = run.communicate(timeout=500)
    assert run.returncode == 0, printed
    rows = directory.rows("participation.jsonl")
    assert [row["happened"] for row in rows] == ["applied"] * 3
    run_experiment(load_config(config), tmp_path / "loop", engine="loop", execution=Execution(client_noise="faithful"))
    model = "model.safetensors"
    assert (out / model).read_bytes() == (tmp_path / "loop" / model).read_bytes()
    assert not list((deployment.folder / "helper-0" / "state").glob("*/run.log"))
