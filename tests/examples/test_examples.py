"""Every example runs as its docstring says, as a user would run it."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FEDPRIV = ("-m", "fedpriv.cli")


def run(*command: str | Path, cwd: Path, seconds: float = 120.0) -> str:
    """Run Python in `cwd`, on one thread, and return the output."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_private_round(tmp_path: Path) -> None:
    output = run(EXAMPLES / "private_round.py", cwd=tmp_path)
    assert "found [" in output
    assert "epsilon = 8 at delta = 1e-05" in output
    code = (EXAMPLES / "private_round.py").read_text(encoding="utf-8").split('"""')[2]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 40


def test_an_own_method(tmp_path: Path) -> None:
    output = run(*FEDPRIV, "run", EXAMPLES / "clipped_diana.toml", "--out", tmp_path / "out", cwd=tmp_path)
    assert "epsilon     8 at delta = 1e-05" in output
    accuracy = float(output.split("accuracy")[1].split()[0])
    assert accuracy > 0.6


def test_an_own_flower_app(tmp_path: Path) -> None:
    settings = "rounds=3 out='model.pt'"
    output = run(*FEDPRIV, "flower", EXAMPLES / "flower_app", "--clients", "100", "-c", settings, cwd=tmp_path)
    assert "at epsilon 8.000, delta 1e-05" in output
    assert (tmp_path / "model.pt").is_file()


def test_the_first_try_of_the_page(tmp_path: Path) -> None:
    (line,) = re.findall(r"fedpriv (flower .*--clients 10 -c .*?) +#", (ROOT / "docs/examples.md").read_text())
    output = run(*FEDPRIV, *shlex.split(line.replace("examples/", f"{EXAMPLES}/")), cwd=tmp_path)
    assert "40 messages in" in output


def test_a_client_of_the_flower_app_reads_the_data_once_in_a_process() -> None:
    """Read for every message, they took five times as long as the training."""
    count = (
        "import sklearn.datasets as kept; load, calls = kept.load_digits, []; "
        "kept.load_digits = lambda: calls.append(1) or load(); "
        "from private_app import task; [task.load_partition(client, 10) for client in range(10)]; print(len(calls))"
    )
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES / "flower_app")}
    command = [sys.executable, "-c", count]
    assert subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout == "1\n"


def test_an_audit(tmp_path: Path) -> None:
    output = run(EXAMPLES / "audit.py", tmp_path / "audit", cwd=tmp_path)
    assert "verdict   not guilty" in output
    assert (tmp_path / "audit" / "audit.json").is_file()


@pytest.mark.xdist_group("loopback")
def test_a_deployment_in_one_script(tmp_path: Path) -> None:
    output = run(EXAMPLES / "deployment.py", tmp_path, cwd=tmp_path, seconds=400.0)
    assert (tmp_path / "run" / "summary.json").is_file()
    assert "epsilon" in output


def test_a_notebook(tmp_path: Path) -> None:
    if find_spec("nbclient") is None and "CI" not in os.environ:
        pytest.skip("nbclient is not installed: make setup")
    execute = (
        "import sys, nbformat, nbclient; book = nbformat.read(sys.argv[1], as_version=4); "
        "nbclient.NotebookClient(book, timeout=120, kernel_name='python3').execute(); "
        "print([o.get('text', '') for c in book.cells if c.cell_type == 'code' for o in c.outputs])"
    )
    assert "accuracy 0." in run("-c", execute, EXAMPLES / "notebook.ipynb", cwd=tmp_path)


def test_every_example_is_run_here_and_named_in_the_docs() -> None:
    ours = Path(__file__).read_text(encoding="utf-8")
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        if path.suffix != ".toml" and not path.name.startswith((".", "__")):
            assert path.name in page
            assert path.name in ours or path.with_suffix(".toml").name in ours
