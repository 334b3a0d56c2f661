"""Sweeps: the trials, each run exactly once, and failures, kills and resumption that change nothing."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
from support.sweep_files import BASE, in_process, sweep_file

from fedpriv import load_results
from fedpriv.cli import main
from fedpriv.engines.ray.cluster import connect, remove_abandoned
from fedpriv.errors import UserError
from fedpriv.experiment.results import compare_runs
from fedpriv.files import write_pieces_atomically
from fedpriv.sweeps import local_jobs, ray_jobs
from fedpriv.sweeps.config import Axis, Trial, load_sweep
from fedpriv.sweeps.jobs import Ended, Job, JobDied
from fedpriv.sweeps.live import SweepTable
from fedpriv.sweeps.run import SweepState, run_sweep
from fedpriv.sweeps.table import Best, best_settings, labels
from fedpriv.sweeps.trial import Tracking, TrialExecution

SWEEPS = Path(__file__).parents[2] / "sim_configs" / "sweeps"
pytestmark = pytest.mark.xdist_group("ray")
__all__ = ["in_process"]


@pytest.fixture(scope="module")
def some_ray() -> Iterator[str]:
    """Return the address of one Ray for all tests that need it; a sweep uses it unchanged."""
    connection = connect(None, 2**27)
    yield ray.get_runtime_context().gcs_address
    connection.close()


def changes(folder: Path, text: str) -> list[dict[str, Any]]:
    return [trial.changes for trial in load_sweep(sweep_file(folder, text)).trials()]


def test_axes_multiply_and_the_last_is_fastest(tmp_path: Path) -> None:
    text = '[[axis]]\nkey = "seed"\nvalues = [1, 2]\n[[axis]]\nkey = "method.server_lr"\nvalues = [0.1, 0.2]\n'
    found = [(c["seed"], c["method.server_lr"]) for c in changes(tmp_path, text)]
    assert found == [(1, 0.1), (1, 0.2), (2, 0.1), (2, 0.2)]


def test_ranges_are_linear_or_logarithmic() -> None:
    assert Axis(key="a.b", first=0.0, to=1.0, count=5).changes() == [{"a.b": x} for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    log = Axis(key="a.b", first=0.01, to=10.0, count=4, scale="log")
    assert log.changes() == [{"a.b": x} for x in (0.01, 0.1, 1.0, 10.0)]


def test_a_range_between_whole_numbers_is_whole_where_it_can_be(tmp_path: Path) -> None:
    text = '[[axis]]\nkey = "training.rounds"\nfrom = 1\nto = 100\ncount = 3\nscale = "log"\n'
    trials = load_sweep(sweep_file(tmp_path, text)).trials()
    assert [trial.config.training.rounds for trial in trials] == [1, 10, 100]
    assert Axis(key="a", first=0, to=1, count=3).changes() == [{"a": 0.0}, {"a": 0.5}, {"a": 1.0}]


def test_seeds_are_the_last_axis(tmp_path: Path) -> None:
    text = '[[axis]]\nkey = "method.server_lr"\nvalues = [0.1, 0.2]\n'
    found = changes(tmp_path, f"seeds = 2\n[set]\nseed = 7\n{text}")
    assert [(c["method.server_lr"], c["seed"]) for c in found] == [(0.1, 7), (0.1, 8), (0.2, 7), (0.2, 8)]
    assert [c["seed"] for c in changes(tmp_path, "seeds = [3, 9]\n")] == [3, 9]


def test_keys_may_be_nested_and_no_trial_shares_a_table_with_another(tmp_path: Path) -> None:
    text = """
[[axis]]
key = "data.shift"
values = [{name = "a", by = {x = 1}}, {name = "b", by = {x = 1}}]
[[axis]]
key = "data.shift.by.x"
values = [2, 3]
[[axis]]
key = "data.shift.late"
values = [4]
when = {"data.shift.name" = "b"}
"""
    trials = load_sweep(sweep_file(tmp_path, text)).trials()
    data: list[Any] = [t.tables["data"] for t in trials]
    found = [(one["shift"]["name"], one["shift"]["by"]["x"]) for one in data]
    assert found == [("a", 2), ("a", 3), ("b", 2), ("b", 3)]
    assert [one["shift"].get("late") for one in data] == [None, None, 4, 4]


def test_paired_values_go_together(tmp_path: Path) -> None:
    text = '[[axis]]\nkey = ["seed", "method.server_lr"]\nvalues = [[1, 0.1], [2, 0.2]]\n'
    assert changes(tmp_path, text) == [{"seed": 1, "method.server_lr": 0.1}, {"seed": 2, "method.server_lr": 0.2}]


@pytest.mark.usefixtures("in_process")
def test_an_empty_value_removes_a_table_or_a_key(tmp_path: Path) -> None:
    """So one sweep compares private and non-private runs."""
    text = """
[[axis]]
key = "privacy"
values = ["", {epsilon = 8.0}, {noise_multiplier = 0.0}]
[[axis]]
key = "privacy.epsilon"
values = [2.0, 8.0]
when = {"privacy.epsilon" = 8.0}
[[axis]]
key = "training.evaluate_every"
values = [""]
"""
    plan = load_sweep(sweep_file(tmp_path, text, BASE + "evaluate_every = 2\n[privacy]\nepsilon = 1.0\n"))
    trials = [trial.config for trial in plan.trials()]
    assert [trial.privacy and trial.privacy.epsilon for trial in trials] == [None, 2.0, 8.0, None]
    assert {trial.training.evaluate_every for trial in trials} == {1}
    table = run_sweep(plan, tmp_path / "out")
    assert set(table["status"]) == {"done"}
    assert sorted(table["epsilon"].fillna(-1.0).round(3)) == [-1.0, -1.0, 2.0, 8.0]


def test_files_that_axes_name_are_looked_for_from_the_sweeps_folder(tmp_path: Path) -> None:
    text = """
[[axis]]
key = "method"
values = [{name = "./own/method.py:Mine"}, {name = "dp-fedavg"}]
[[axis]]
key = "model.name"
values = ["./net.py:Net"]
when = {"method.name" = "./own/method.py:Mine"}
"""
    found = changes(tmp_path, text)
    assert found[0] == {
        "method": {"name": f"{tmp_path / 'own' / 'method.py'}:Mine"},
        "model.name": f"{tmp_path / 'net.py'}:Net",
    }
    assert found[1] == {"method": {"name": "dp-fedavg"}}


def test_an_axis_may_be_there_for_some_methods_only(tmp_path: Path) -> None:
    text = """
[[axis]]
key = "method"
values = [{name = "dp-fedavg"}, {name = "alpha-normec"}]
[[axis]]
key = "method.beta"
values = [0.1, 0.2]
when = {"method.name" = ["alpha-normec"]}
"""
    found = changes(tmp_path, text)
    assert [c.get("method.beta") for c in found] == [None, 0.1, 0.2]
    names = [trial.config.method_name for trial in load_sweep(sweep_file(tmp_path, text)).trials()]
    assert names == ["dp-fedavg", "alpha-normec", "alpha-normec"]


def test_an_axis_may_be_there_for_trials_without_a_key_only(tmp_path: Path) -> None:
    text = """
[[axis]]
key = "privacy"
values = ["", {epsilon = 8.0}]
[[axis]]
key = "method.server_lr"
values = [1.0, 3.0]
when = {"privacy.epsilon" = ""}
[[axis]]
key = "training.rounds"
values = [4]
when = {"privacy.epsilon" = ["", 8.0]}
"""
    found = changes(tmp_path, text)
    assert [c.get("method.server_lr") for c in found] == [1.0, 3.0, None]
    assert [c["training.rounds"] for c in found] == [4, 4, 4]


@pytest.mark.parametrize("path", sorted(SWEEPS.rglob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_is_experiments_alone(path: Path) -> None:
    trials = load_sweep(path).trials()
    assert len({trial.name for trial in trials}) == len(trials) > 1


def test_set_changes_all_trials(tmp_path: Path) -> None:
    """Also if TOML reads a table: keys that it does not name stay as they are."""
    text = '[set]\n"training.rounds" = 9\ntraining.evaluate_every = 3\nmethod.server_lr = 0.25\n'
    text += '[[axis]]\nkey = "seed"\nvalues = [1, 2]\n'
    trials = load_sweep(sweep_file(tmp_path, text)).trials()
    assert [trial.config.training.rounds for trial in trials] == [9, 9]
    assert [trial.config.training.evaluate_every for trial in trials] == [3, 3]
    assert [trial.tables["method"] for trial in trials] == [
        {"name": "dp-fedavg", "clip_norm": 1.0, "server_lr": 0.25}
    ] * 2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[[axis]]\nvalues = [1]\n", r"axis 1.key: expected"),
        ('[[axis]]\nkey = "seed"\n', "axis seed: expected values, or from, to and count"),
        ('[[axis]]\nkey = "seed"\nvalues = [1]\ncount = 2\n', "axis seed: expected values, or from, to and count"),
        ('[[axis]]\nkey = "seed"\nfrom = 1\nto = 2\n', "axis seed: expected values, or from, to and count"),
        ('[[axis]]\nkey = "a.b"\nfrom = 0\nto = 2\ncount = 3\nscale = "log"\n', "ends above 0 on a log scale"),
        ('[[axis]]\nkey = "a.b"\nfrom = 1\nto = inf\ncount = 3\n', "finite ends"),
        ('[[axis]]\nkey = "a.b"\nfrom = 1\nto = 2\ncount = 0\n', "a count from 1"),
        ('[[axis]]\nkey = ["seed", "a.b"]\nvalues = [1, 2]\n', "lists of 2 values"),
        ('[[axis]]\nkey = "seed"\nvalue = [1]\n', "axis 1.value: expected a known key"),
        ('[[axis]]\nkey = "seed.x"\nvalues = [1]\n', "seed.x: expected a table"),
        (
            '[[axis]]\nkey = "data.clients"\nvalues = [2]\n[[axis]]\nkey = "data"\nvalues = [{name = "digits"}]\n',
            "overwrites",
        ),
        ('seeds = 2\n[[axis]]\nkey = "seed"\nvalues = [1]\n', "axis seed: expected keys that leave seed as it is"),
        (
            '[[axis]]\nkey = "seed"\nvalues = [1]\nwhen = {"method.nam" = "x"}\n',
            "axis seed.when: expected a key of some",
        ),
        ("seeds = 0\n", "seeds: expected a number of seeds"),
        ("seeds = []\n", "seeds: expected a number of seeds"),
        ("stop = 3\n", "stop: expected a table"),
        ("[stop]\ngrace = 3\n", "stop.rule: expected a known name"),
        ('[stop]\nrule = "medium"\n', "Did you mean 'median'"),
        ('[stop]\nrule = "median"\nfactor = 2\n', "stop.factor: expected a known key"),
        ('[stop]\nrule = "halving"\nfactor = 1\n', "stop.factor: expected at least 2"),
        ('[stop]\nrule = "median"\ngrace = 0\n', "stop.grace: expected at least 1"),
        ("axis = 3\n", r"axis: expected tables \[\[axis\]\]"),
        ('[[axes]]\nkey = "seed"\n', "axes: expected a known key"),
    ],
)
def test_a_file_that_is_no_sweep_is_one_line(
    text: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(tmp_path, text)
    with pytest.raises(UserError, match=line):
        load_sweep(path).trials()
    with pytest.raises(SystemExit) as caught:
        main(["sweep", str(path), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


GRID = """
[[axis]]
key = "method.server_lr"
values = [0.1, 0.5]
[[axis]]
key = "seed"
values = [1, 2, 1]
[[axis]]
key = "cohort"
values = [{sampling = "everyone"}, {sampling = "fixed", size = 99}]
"""


@pytest.mark.slow
def test_each_experiment_runs_once_and_failures_stop_nothing(tmp_path: Path, some_ray: str) -> None:
    """Twelve combinations: four experiments; the rest are duplicates or have too many clients."""
    states: list[tuple[int, int]] = []
    plan = load_sweep(sweep_file(tmp_path, GRID))
    needs: dict[str, Any] = {"jobs": 2, "execution": TrialExecution(cpus=0.5, ray_address=some_ray)}
    table = run_sweep(plan, tmp_path / "out", watch=lambda s: states.append((s.done, s.failed)), **needs)
    assert list(table["status"]).count("done") == 4
    reasons = [row["reason"] for row in table.to_dict(orient="records") if row["status"] == "failed"]
    assert len(reasons) == 6
    assert all("cohort.size" in str(why) for why in reasons)
    assert states[-1][0] == 4
    assert len(list((tmp_path / "out" / "trials").iterdir())) == 4
    frame = load_results(tmp_path / "out")
    assert len(set(frame["run"])) == 4
    assert set(frame["method.server_lr"]) == {0.1, 0.5}
    assert len((tmp_path / "out" / "trials.csv").read_text().splitlines()) == 1 + len(table)
    summaries = sorted((tmp_path / "out" / "trials").rglob("summary.json"))
    before = [path.stat().st_mtime_ns for path in summaries]
    with pytest.raises(UserError, match="Add --resume"):
        run_sweep(plan, tmp_path / "out")
    run_sweep(plan, tmp_path / "out", resume=True)
    assert [path.stat().st_mtime_ns for path in summaries] == before


def test_ray_deals_out_cores_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def no_jobs(_jobs: object, _at_once: object, **needs: Any) -> Iterator[None]:
        asked.append(needs)
        yield None

    monkeypatch.setattr("fedpriv.sweeps.ray_jobs.side_by_side", no_jobs)
    run_sweep(load_sweep(sweep_file(tmp_path, GRID)), tmp_path / "out", execution=TrialExecution(ray=True, cpus=0.5))
    assert asked == [{"cpus": 0.5, "gpus": 0.0, "address": None}]


SLOW = """
[set]
"training.rounds" = 300
[[axis]]
key = "seed"
values = [1, 2, 3, 4, 5, 6]
"""


@pytest.mark.slow
def test_a_sweep_that_is_stopped_or_killed_goes_on_to_the_same_table(tmp_path: Path) -> None:
    """First by Ctrl-C, with one line; then by an uncatchable signal, to the driver alone."""
    path = sweep_file(tmp_path, SLOW)
    whole = run_sweep(load_sweep(path), tmp_path / "whole", jobs=2)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fedpriv.cli", "sweep", str(path), "--out", str(out), "--jobs", "2", "--resume"]
    for how, wanted in ((signal.SIGINT, 1), (signal.SIGKILL, 3)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        end = time.monotonic() + 120.0
        while len(list(out.glob("trials/*/summary.json"))) < wanted and time.monotonic() < end:
            time.sleep(0.02)
        assert process.poll() is None, "the sweep ended before it was stopped"
        process.send_signal(how)
        said = process.communicate(timeout=120.0)[1].splitlines()
        if how is signal.SIGINT:
            assert process.returncode == 130
            assert [line for line in said if line.startswith("fedpriv:")] == [said[-1]]
            assert "Traceback" not in "".join(said)
            assert (out / "trials.csv").read_text().count("done") >= 1
    done = {file: file.stat().st_mtime_ns for file in out.glob("trials/*/summary.json")}
    assert 3 <= len(done) < 6
    again = run_sweep(load_sweep(path), out, jobs=2, resume=True)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), whole.drop(columns="seconds"))
    assert all(file.stat().st_mtime_ns == at for file, at in done.items())


@pytest.mark.usefixtures("in_process")
def test_a_trial_that_fails_while_it_runs_is_tried_again_only_when_asked(tmp_path: Path) -> None:
    base = BASE.replace('name = "digits"', 'name = "libsvm"\nfile = "a.svm"')
    path = sweep_file(tmp_path, '[[axis]]\nkey = "seed"\nvalues = [1, 2]\n', base)
    table = run_sweep(load_sweep(path), tmp_path / "out", data_root=tmp_path)
    assert list(table["status"]) == ["failed", "failed"]
    assert all("a.svm" in why for why in table["reason"])
    rows = [f"{i % 2} 1:{i % 7}.5 2:{i % 3}.0\n" for i in range(60)]
    (tmp_path / "a.svm").write_text("".join(rows))
    table = run_sweep(load_sweep(path), tmp_path / "out", data_root=tmp_path, resume=True)
    assert list(table["status"]) == ["failed", "failed"]
    table = run_sweep(load_sweep(path), tmp_path / "out", data_root=tmp_path, resume=True, retry=True)
    assert list(table["status"]) == ["done", "done"], table["reason"].tolist()


@pytest.mark.usefixtures("in_process")
def test_runs_are_compared_by_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sweep_file(tmp_path, '[[axis]]\nkey = "method.server_lr"\nvalues = [0.1, 0.5]\n')
    run_sweep(load_sweep(path), tmp_path / "out")
    runs = sorted((tmp_path / "out" / "trials").iterdir())
    table = compare_runs(runs)
    assert next(iter(table.index)) == "method.server_lr"
    assert set(table.loc["method.server_lr"]) == {0.1, 0.5}
    assert "seed" not in table.index
    main_code = None
    try:
        main(["compare", *map(str, runs), "--csv"])
    except SystemExit as ended:
        main_code = ended.code
    assert main_code in (None, 0)
    assert "test_accuracy" in capsys.readouterr().out
    with pytest.raises(UserError, match="expected the folder of a finished run, got a folder of runs"):
        compare_runs([tmp_path])


def test_a_gpu_or_a_core_that_nobody_has_is_one_line_and_no_wait(tmp_path: Path, some_ray: str) -> None:
    path = sweep_file(tmp_path, '[[axis]]\nkey = "seed"\nvalues = [1]\n')
    execution = TrialExecution(cpus=4000.0, ray_address=some_ray)
    with pytest.raises(UserError, match="--cpus-per-trial: expected a machine with 4000 CPU, got smaller machines"):
        run_sweep(load_sweep(path), tmp_path / "out", resume=True, execution=execution)
    with pytest.raises(UserError, match=r"--cpus-per-trial: expected a machine with 4000 CPU, got [0-9]"):
        run_sweep(load_sweep(path), tmp_path / "out", resume=True, execution=TrialExecution(cpus=4000.0))
    with pytest.raises(UserError, match="--gpus-per-trial: expected a machine with 64 GPU, got smaller machines"):
        run_sweep(load_sweep(path), tmp_path / "out", resume=True, execution=TrialExecution(gpus=64.0))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: {"jobs": 0},
        lambda: {"execution": TrialExecution(cpus=0.0)},
        lambda: {"execution": TrialExecution(gpus=-1.0)},
        lambda: {"tracking": Tracking(["tensorbored"])},
    ],
)
def test_options_that_make_no_sense_are_one_line(wrong: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    path = sweep_file(tmp_path, '[[axis]]\nkey = "seed"\nvalues = [1]\n')
    with pytest.raises(UserError, match=r"--jobs|--cpus-per-trial|--gpus-per-trial|--log.*'tensorboard'"):
        run_sweep(load_sweep(path), tmp_path / "out", **wrong())


@pytest.mark.parametrize("where", ["local", "ray"])
def test_a_worker_does_many_jobs_and_one_that_dies_takes_its_job_alone(
    where: str, request: pytest.FixtureRequest
) -> None:
    if where == "ray":
        request.getfixturevalue("some_ray")
    run: Any = local_jobs.side_by_side if where == "local" else partial(ray_jobs.side_by_side, cpus=0.5)
    jobs = [Job(f"job {number}", os.getpid, ()) for number in range(6)]
    jobs.insert(2, Job("dies", os._exit, (1,)))
    jobs.insert(4, Job("fails", int, ("x",)))
    ended = {e.name: e.result for e in run(jobs, 1) if isinstance(e, Ended)}
    assert list(ended) == [job.name for job in jobs]
    assert isinstance(ended["dies"], JobDied)
    assert "its process ended" in str(ended["dies"])
    assert "ValueError" in str(ended["fails"])
    processes = [ended[f"job {number}"] for number in range(6)]
    assert len(set(processes[:2])) == len(set(processes[2:])) == 1
    assert processes[0] != processes[2]


def test_folders_of_rays_whose_process_was_killed_are_removed(tmp_path: Path) -> None:
    for name in ("killed", "used", "new", "other"):
        (tmp_path / f"fedpriv-ray-{name}").mkdir()
        (tmp_path / f"fedpriv-ray-{name}" / ("alive" if name != "other" else "x")).touch()
    for name in ("killed", "used"):
        os.utime(tmp_path / f"fedpriv-ray-{name}" / "alive", (1.0, 1.0))
    with (tmp_path / "fedpriv-ray-used" / "alive").open() as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        remove_abandoned(tmp_path)
    assert sorted(path.name[12:] for path in tmp_path.iterdir()) == ["new", "other", "used"]


@pytest.mark.usefixtures("in_process")
def test_a_full_disk_ends_the_sweep_in_one_line_and_blames_no_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sweep_file(tmp_path, "seeds = 3\n")
    second = load_sweep(path).trials()[1].name
    out = tmp_path / "out"
    full, write = out / "trials" / second / "digest.txt", write_pieces_atomically

    def written(file: Path, *more: Any) -> None:
        if file == full:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        write(file, *more)

    with monkeypatch.context() as patched:
        patched.setattr("fedpriv.files.write_pieces_atomically", written)
        with pytest.raises(SystemExit) as caught:
            main(["sweep", str(path), "--out", str(out)])
    assert caught.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedpriv:")]
    assert len(errors) == 1
    assert "No space left" in errors[0]
    assert [row["status"] for row in pd.read_csv(out / "trials.csv").to_dict("records")] == ["done", "left", "left"]
    assert list(run_sweep(load_sweep(path), out, resume=True)["status"]) == ["done"] * 3


@pytest.mark.usefixtures("in_process")
def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, "seeds = 1\n")
    with pytest.raises(UserError, match="a writable folder"):
        run_sweep(load_sweep(path), path / "out")


@pytest.mark.usefixtures("in_process")
def test_a_sweep_whose_file_has_changed_keeps_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    first = run_sweep(load_sweep(sweep_file(tmp_path, "seeds = [1, 2]\n")), out)
    kept = {file: file.stat().st_mtime_ns for file in out.glob("trials/*/summary.json")}
    path = sweep_file(tmp_path, "seeds = [2, 3, 4]\n")
    with pytest.raises(SystemExit) as caught:
        main(["sweep", str(path), "--out", str(out), "--resume"])
    assert caught.value.code == 0
    assert "others      1 trial not in" in capsys.readouterr().out
    second = pd.read_csv(out / "trials.csv")
    assert list(second["seed"]) == [2, 3, 4]
    assert second["trial"][0] == first["trial"][1]
    assert all(file.stat().st_mtime_ns == at for file, at in kept.items())


def test_a_worker_that_writes_elsewhere_is_not_taken_for_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fedpriv.sweeps.local_jobs.side_by_side", lambda jobs, *_, **__: (Ended(job.name, 1.0) for job in jobs)
    )
    with pytest.raises(UserError, match="--out: expected a folder that every trial can write to"):
        run_sweep(load_sweep(sweep_file(tmp_path, "seeds = 1\n")), tmp_path / "out")


def test_the_live_table_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with SweepTable() as table:
        state = SweepState(total=10, done=2, failed=1, stopped=1, before=0, began=time.monotonic() - 40.0)
        state.running["abc"] = "seed=1 beta=0.1"
        state.best = [Best("", "beta=0.1", "test_accuracy", 0.5, 3, covered=True)]
        table(state)
    shown = capsys.readouterr().err
    assert "4 of 10 trials: 2 done, 1 failed, 1 stopped early, 1 min 00 s left" in shown
    assert "best so far: beta=0.1: test_accuracy 0.5, mean of 3 seeds" in shown
    assert "beta=0.1" in shown


def trial_row(score: float | None, status: str = "done", **changes: Any) -> tuple[Trial, dict[str, Any]]:
    tables = {"data": {"name": "digits", "clients": 12}, "model": {"name": "softmax"}, "training": {"rounds": 1}}
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    seed = flat.get("seed", 1)
    trial = Trial(changes=flat, tables={**tables, "name": "x", "seed": seed, "method": {"name": "dp-fedavg"}})
    return trial, {"status": status, "test_accuracy": score}


def test_labels_have_few_digits_but_enough_to_tell_trials_apart() -> None:
    pairs = [
        trial_row(0.5, method__beta=0.0464158883361, method__clip_norm=0.50001),
        trial_row(0.4, method__beta=0.1, method__clip_norm=0.50002),
    ]
    trials = {str(i): trial for i, (trial, _) in enumerate(pairs)}
    assert list(labels(trials).values()) == ["beta=0.04642 clip_norm=0.50001", "beta=0.1 clip_norm=0.50002"]
    (best,) = best_settings({str(i): row for i, (_, row) in enumerate(pairs)}, trials)
    assert best.setting == "beta=0.04642 clip_norm=0.50001"


def test_the_best_setting_has_the_best_mean_within_its_promise() -> None:
    pairs = [
        trial_row(0.9, method__server_lr=0.1, privacy__epsilon=8.0, seed=1),
        trial_row(0.1, method__server_lr=0.1, privacy__epsilon=8.0, seed=2),
        trial_row(0.6, method__server_lr=0.5, privacy__epsilon=8.0, seed=1),
        trial_row(0.7, method__server_lr=0.5, privacy__epsilon=8.0, seed=2),
        trial_row(0.95, method__server_lr=0.1, privacy__epsilon=100.0, seed=1),
        trial_row(0.99, "stopped", method__server_lr=0.9, privacy__epsilon=8.0, seed=1),
        trial_row(None, method__server_lr=0.7, privacy__epsilon=8.0, seed=1),
    ]
    trials = {str(i): trial for i, (trial, _) in enumerate(pairs)}
    rows = {str(i): row for i, (_, row) in enumerate(pairs)}
    assert [str(best) for best in best_settings(rows, trials)] == [
        "server_lr=0.5 (epsilon=8): test_accuracy 0.65, mean of 2 seeds",
        "server_lr=0.1 (epsilon=100): test_accuracy 0.95",
    ]
    marked = [{**row, "not_covered": "test_loss, test_accuracy"} for _, row in pairs]
    best = best_settings({str(i): row for i, row in enumerate(marked)}, trials)[0]
    assert str(best).endswith("mean of 2 seeds; NOT covered by epsilon")


def test_a_sweep_whose_output_is_a_file_writes_a_line_from_time_to_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with SweepTable() as table:
        state = SweepState(total=10, done=2)
        table(state)
        assert capsys.readouterr().err == ""
        later = time.monotonic() + 31.0
        monkeypatch.setattr("fedpriv.sweeps.live.time.monotonic", lambda: later)
        table(state)
        table(state)
        shown = capsys.readouterr().err
    assert shown.count("2 of 10 trials: 2 done, 0 failed") == 1


def test_an_engine_that_trials_cannot_use_is_refused_before_any_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(tmp_path, GRID)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(path), "--out", str(tmp_path / "out"), "--engine", "ray"])
    assert ended.value.code == 2
    assert "--engine: expected auto or loop or vectorized, got 'ray'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
