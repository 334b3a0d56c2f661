"""The files of a run: one list, as in the privacy statement; their permissions; scores not covered."""

import contextlib
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from support.natural_clients import KINDS, write_hospitals
from support.sweep_files import BASE, in_process, sweep_file

import fedpriv
from fedpriv.cli import main
from fedpriv.engines.ray.snapshots import KeepSnapshots, Snapshots
from fedpriv.engines.states import StateStore
from fedpriv.errors import UserError
from fedpriv.experiment.config import Config, load_config, parse_config
from fedpriv.experiment.execution import Execution
from fedpriv.experiment.pictures.curves import plot_curves
from fedpriv.experiment.progress import RoundProgress
from fedpriv.experiment.results import compare_runs
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.experiment.watching import StopRun
from fedpriv.files import write_atomically
from fedpriv.methods import Clip21
from fedpriv.privacy import Everyone, privacy_statement
from fedpriv.privacy.released import OUTPUTS, OWNER_ONLY, VALUES, Kind, mode_of
from fedpriv.sweeps.config import load_sweep
from fedpriv.sweeps.run import run_sweep
from fedpriv.tasks.kinds import Classification, NextToken, Regression, TaskKind
from fedpriv.tracking.trackers import track

__all__ = ["in_process"]

QUICKSTART = Path(__file__).parents[2] / "sim_configs" / "quickstart.toml"
OWNERS = {output.name for output in OUTPUTS if output.kind is Kind.OWNER}
LISTED = {output.name for output in OUTPUTS}

pytestmark = pytest.mark.usefixtures("_open_umask")


@pytest.fixture
def _open_umask(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By default, everyone could read new files."""
    monkeypatch.setattr("fedpriv.experiment.recorder.plot_curves", lambda rows, path, **_: path.write_text(str(rows)))
    before = os.umask(0)
    yield
    os.umask(before)


def small(*settings: str) -> Config:
    return load_config(QUICKSTART, ["data.clients=12", "training.rounds=3", *settings])


def stop_after(last: int) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def watch(released: dict[str, Any], _: dict[str, Any]) -> None:
        if released["round"] == last:
            raise StopRun("enough")

    return watch


def stopped(config: Config, out: Path, after: int = 1, **options: Any) -> None:
    with pytest.raises(StopRun):
        run_experiment(config, out, engine="loop", watch=stop_after(after), **options)


def modes(folder: Path) -> dict[str, int]:
    """Return all files and folders of a run, except those in trackers' folders."""
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def check(folder: Path) -> set[str]:
    """Check that all files are in the list, and that owner-only files are unreadable for others."""
    found = modes(folder)
    assert set(found) <= LISTED
    for name, mode in found.items():
        assert mode & 0o077 == 0 if name in OWNERS else mode & 0o444 == 0o444, (name, oct(mode))
    return set(found)


# The list


@pytest.mark.parametrize("settings", [[], ["privacy="], ["privacy.trust=local", "privacy.adjacency="]])
def test_every_file_that_a_run_writes_is_in_the_list_and_has_its_mode(settings: list[str], tmp_path: Path) -> None:
    stopped(small(*settings), tmp_path / "run")
    assert "checkpoint.safetensors" in check(tmp_path / "run")
    run_experiment(small(*settings), tmp_path / "run", resume=True)
    left = check(tmp_path / "run")
    assert {output.name for output in OUTPUTS if output.left} <= left
    assert "checkpoint.safetensors" not in left
    assert {"diagnostics.json", "diagnostics.jsonl", "heterogeneity.json"} <= left & OWNERS


@pytest.mark.parametrize("diagnostics", [False, True])
def test_every_file_of_a_tracked_run_is_in_the_list(diagnostics: bool, tmp_path: Path) -> None:
    with track(["tensorboard"], small(), tmp_path, diagnostics=diagnostics) as log:
        run_experiment(small(), tmp_path, watch=log)
    found = modes(tmp_path)
    assert set(found) <= LISTED
    assert (found["tensorboard"] & 0o077 == 0) == diagnostics


@pytest.mark.usefixtures("in_process")
def test_every_file_of_a_sweep_is_in_the_list(tmp_path: Path) -> None:
    stop = '[stop]\nrule = "median"\ngrace = 2\nleast = 2\n'
    axes = '[[axis]]\nkey = "method.server_lr"\nvalues = [0.5, 0.4, 1e-9]\n'
    axes += '[[axis]]\nkey = "data.clients"\nvalues = [6, 1000000]\n'
    plan = load_sweep(sweep_file(tmp_path, axes + stop, BASE))
    table = run_sweep(plan, tmp_path / "out")
    assert sorted(table["status"]) == ["done"] * 2 + ["failed"] * 3 + ["stopped"]
    assert set(modes(tmp_path / "out")) - {"trials"} <= LISTED
    found = [check(folder) for folder in (tmp_path / "out" / "trials").iterdir()]
    assert set().union(*found) >= {"failure.json", "stopped.json", "checkpoint.safetensors", "summary.json"}


def test_every_file_of_an_analysis_is_in_the_list_and_has_its_mode(tmp_path: Path) -> None:
    tables = {"name": "asked", "seed": 1, "data": small().tables["data"], "privacy": {"noise_multiplier": 1.0}}
    run_experiment(load_config({**tables, "analysis": {"labels": {"kind": "labels"}}}), tmp_path)
    found = check(tmp_path)
    assert {"analysis.json", "rounds.jsonl", "summary.json", "diagnostics.json"} <= found
    assert "analysis.json" not in OWNERS
    assert "released: analysis.json" in (tmp_path / "privacy.txt").read_text()


def test_answers_that_no_run_wrote_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "analysis.json").write_text("{}")
    with pytest.raises(UserError, match=r"expected a folder without a run's files, got analysis\.json"):
        RunDirectory(tmp_path).claim("", "digest", resume=False)


def test_a_file_that_is_not_in_the_list_cannot_be_written(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for write in (directory.write_json, directory.append):
        with pytest.raises(ValueError, match="not in OUTPUTS"):
            write("secrets.json", {"round": 1})
    assert not list(tmp_path.iterdir())


def test_the_statement_lists_every_file_of_its_kind_of_run_with_what_it_is(tmp_path: Path) -> None:
    plan = small("privacy.epsilon=", "privacy.noise_multiplier=1.0").plan(Everyone(population=12))
    for deployed, other in ((False, "deployment"), (True, "simulation")):
        text = privacy_statement(plan, method="m", randomness="system", deployed=deployed, recorded=True)
        listed = " ".join(text.split("file by file")[1].split())
        for output in OUTPUTS:
            line = f"* {output.kind.value}: {output.name}, {output.about}"
            assert (line in listed) == (output.by != other), output.name
        assert "seconds, clients_per_second and execution" in listed
    assert "file by file" not in privacy_statement(plan, method="m", randomness="system")
    (table,) = (output for output in OUTPUTS if output.name == "trials.csv")  # holds the words of failure.json
    assert "not covered: timings, and error messages of failed trials" in table.about
    run_experiment(small(), tmp_path)
    assert "file by file" in (tmp_path / "privacy.txt").read_text()
    assert json.loads((tmp_path / "privacy.json").read_text())["statement"] == (tmp_path / "privacy.txt").read_text()


def test_fedpriv_privacy_shows_the_statement_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.toml").write_text(small().to_toml())
    with pytest.raises(SystemExit):
        main(["privacy", str(tmp_path / "base.toml")])
    run_experiment(small(), tmp_path / "run")
    assert capsys.readouterr().out.strip() == (tmp_path / "run" / "privacy.txt").read_text().strip()


DEVICES = ["devices.kind=log-normal", "devices.speed=20.0", "devices.download=1e5", "devices.upload=1e5"]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["data.validation=0.1"],
        ["privacy.trust=local", "privacy.adjacency="],
        DEVICES,
        [*DEVICES, "cohort.sampling=poisson", "cohort.probability=0.5"],
    ],
)
def test_every_value_that_is_released_is_known(settings: list[str], tmp_path: Path) -> None:
    summary = run_experiment(small(*settings), tmp_path)
    rows = RunDirectory(tmp_path).rows("rounds.jsonl")
    assert {*summary, *rows[-1]} <= set(VALUES)
    assert "diagnostics" not in summary


# From the first byte


def test_what_is_its_owners_alone_is_created_so_and_never_changed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: dict[str, list[int]] = {}
    real = os.open

    def seen(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        if flags & os.O_CREAT:
            created.setdefault(Path(path).name.removesuffix(".part"), []).append(mode)
        return real(path, flags, mode, **options)

    def never(path: Any, *_: Any, **__: Any) -> None:
        raise AssertionError(f"chmod {path}")

    monkeypatch.setattr(os, "open", seen)
    for place in (os, Path):
        monkeypatch.setattr(place, "chmod", never)
    stopped(small(), tmp_path, checkpoint_every=1)
    run_experiment(small(), tmp_path, engine="loop", resume=True, checkpoint_every=1)
    written = {"checkpoint.safetensors", "diagnostics.json", "diagnostics.jsonl", "heterogeneity.json"}
    assert written == OWNERS & set(created)
    assert all(set(created[name]) == {OWNER_ONLY} for name in written)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "diagnostics.json"])
def test_a_part_that_a_crash_left_open_to_all_does_not_open_what_comes_after(name: str, tmp_path: Path) -> None:
    part = tmp_path / f"{name}.part"
    part.write_bytes(b"torn")
    assert part.stat().st_mode & 0o077
    descriptor = os.open(part, os.O_RDONLY)
    write_atomically(tmp_path / name, b"secret", mode_of(name))
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == OWNER_ONLY
    assert os.pread(descriptor, 100, 0) == b"torn", "who had opened the part reads nothing new"
    os.close(descriptor)


def test_what_an_older_version_left_open_is_closed_when_the_run_is_resumed(tmp_path: Path) -> None:
    stopped(small(), tmp_path)
    for name in OWNERS & set(modes(tmp_path)):
        (tmp_path / name).chmod(0o644)
    stopped(small(), tmp_path, after=2, resume=True)
    check(tmp_path)
    assert OWNERS & set(modes(tmp_path)) == {"checkpoint.safetensors", "diagnostics.jsonl", "heterogeneity.json"}


def test_states_of_clients_that_do_not_fit_in_memory_are_their_owners_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(Path, "unlink", lambda path, **_: made.append(stat.S_IMODE(path.stat().st_mode)))
    store = StateStore(Clip21(clip_norm=1.0, server_lr=1.0), 4, memory=64, folder=tmp_path / "states")
    for client in range(9):
        with store.borrowed([client]):
            pass
    assert set(made) == {OWNER_ONLY}
    assert stat.S_IMODE((tmp_path / "states").stat().st_mode) == 0o700


def test_snapshots_of_clients_states_are_their_owners_alone(tmp_path: Path) -> None:
    snapshots = Snapshots(KeepSnapshots(every=1, share=1.0, folder=tmp_path / "states"))
    snapshots.keep([{"clients": torch.arange(2), "memory": torch.ones(2, 3)}])
    [file] = (tmp_path / "states").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == OWNER_ONLY
    assert stat.S_IMODE((tmp_path / "states").stat().st_mode) == 0o700
    assert next(snapshots.parts())["memory"].sum() == 6.0
    snapshots.clear()


def test_who_holds_what_is_written_for_the_owner_alone(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["data", str(QUICKSTART), "--out", str(tmp_path / "who")])
    assert modes(tmp_path / "who") == {"clients.csv": OWNER_ONLY, "clients.png": OWNER_ONLY}
    assert (tmp_path / "who" / "clients.png").read_bytes().startswith(b"\x89PNG")


# A checksum of the data


def test_no_checksum_of_the_data_is_released(tmp_path: Path) -> None:
    config = small()
    stopped(config, tmp_path)
    with safe_open(str(tmp_path / "checkpoint.safetensors"), framework="pt") as file:
        found = re.match(r"data ([0-9a-f]{64}), ", file.metadata()["promise"])
    assert found is not None
    run_experiment(config, tmp_path, resume=True)
    holding = {path.name for path in tmp_path.iterdir() if found[1].encode() in path.read_bytes()}
    assert holding == {"diagnostics.json"}
    assert json.loads((tmp_path / "diagnostics.json").read_text())["data_fingerprint"] == found[1]


def test_a_run_that_is_resumed_with_other_data_is_refused_without_a_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(small(), tmp_path)
    monkeypatch.setattr("fedpriv.data.federation.Federation.fingerprint", 8 * "0badc0de")
    with pytest.raises(UserError, match=r"the same privacy terms and data.*got different data") as caught:
        run_experiment(small(), tmp_path, engine="loop", resume=True)
    assert not re.search(r"\b[0-9a-f]{64}\b", str(caught.value))
    monkeypatch.undo()
    with pytest.raises(UserError, match="bfloat16") as caught:
        run_experiment(small(), tmp_path, engine="loop", resume=True, execution=Execution(precision="bfloat16"))
    assert not re.search(r"\b[0-9a-f]{64}\b", str(caught.value))


# Scores that no guarantee covers

WITHIN = """
name = "within"
seed = 1
[data]
name = "heart-disease"
partition = "natural"
{data}
[model]
name = "softmax"
[method]
name = "dp-fedavg"
clip_norm = 1.0
{privacy}
[training]
rounds = 2
"""
PRIVATE = "[privacy]\nepsilon = 8.0\ndelta = 1e-5"


@pytest.fixture
def hospitals(tmp_path: Path) -> Path:
    write_hospitals(tmp_path / "data", KINDS["heart-disease"].held())
    return tmp_path / "data"


def natural(data: str = "validation = 0.3", privacy: str = PRIVATE) -> Config:
    return parse_config(tomllib.loads(WITHIN.format(data=data, privacy=privacy)))


SCORES = ["test_accuracy", "test_loss", "validation_accuracy", "validation_loss"]


def test_scores_on_protected_clients_own_examples_are_marked_wherever_they_stand(
    tmp_path: Path, hospitals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run_experiment(natural(), tmp_path / "run", data_root=hospitals)
    assert summary["not_covered"] == SCORES
    assert all(row["not_covered"] == SCORES for row in RunDirectory(tmp_path / "run").rows("rounds.jsonl"))
    assert "not_covered" in (tmp_path / "run" / "curves.png").read_text()
    statement = " ".join((tmp_path / "run" / "privacy.txt").read_text().split())
    assert "does NOT cover the test scores" in statement
    assert f"* released, not covered: {', '.join(SCORES)} in rounds.jsonl" in statement
    assert set(fedpriv.load_results(tmp_path)["not_covered"]) == {", ".join(SCORES)}
    assert list(compare_runs([tmp_path / "run"]).loc["not_covered"]) == [", ".join(SCORES)]
    (tmp_path / "within.toml").write_text(natural().to_toml())
    arguments = ["--out", str(tmp_path / "run"), "--data-root", str(hospitals), "--resume"]
    with pytest.raises(SystemExit):
        main(["run", str(tmp_path / "within.toml"), *arguments])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert all("NOT covered by epsilon" in lines[word] for word in ("accuracy", "validation"))


def test_progress_marks_a_score_that_no_promise_covers() -> None:
    row = {"round": 1, "test_loss": 1.0, "test_accuracy": 0.5, "epsilon": 1.0}
    for marks, told in (({}, "accuracy 0.500 eps"), ({"not_covered": SCORES}, "accuracy 0.500 (not covered) eps")):
        progress = RoundProgress(3)
        with contextlib.redirect_stderr(None), progress:
            progress({**row, **marks}, {})
        assert told in progress._description()


def test_a_picture_marks_a_score_that_no_promise_covers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[list[str]] = []

    def keep(figure: Figure, path: Path, **_: Any) -> None:  # noqa: ARG001
        titles.append([axes.get_title() for axes in figure.axes])

    monkeypatch.setattr(Figure, "savefig", keep)
    row = {"round": 1, "test_loss": 1.0, "test_accuracy": 0.5, "epsilon": 1.0}
    plot_curves([row], tmp_path / "a.png", title="")
    plot_curves([{**row, "not_covered": ["test_accuracy", "test_loss"]}], tmp_path / "b.png", title="")
    assert not any("not covered" in title for title in titles[0])
    assert ["not covered" in title for title in titles[1]] == [True, True, False]


@pytest.mark.parametrize(
    ("task", "chance"),
    [(Classification(), 0.25), (Classification(metrics=("auroc",)), None), (Regression(), None), (NextToken(), None)],
)
def test_a_picture_shows_the_accuracy_of_guesses_where_accuracy_is_drawn(
    task: TaskKind, chance: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    row = {"round": 1, "test_loss": 1.0, f"test_{task.selects.name}": 0.5, "epsilon": 1.0}
    plot_curves([row], tmp_path / "a.png", title="", task=task, classes=4)
    first, *others = drawn[0].axes
    levels = [float(np.atleast_1d(line.get_ydata())[0]) for line in first.lines if line.get_linestyle() == ":"]
    assert levels == ([] if chance is None else [chance])
    assert [text.get_text() for text in first.texts] == ([] if chance is None else ["uniform guess: 0.25"])
    assert not any(axes.texts for axes in others)


@pytest.mark.parametrize(
    ("data", "privacy"), [('test = "clients"\nvalidation = 0.3', PRIVATE), ("validation = 0.3", "")]
)
def test_scores_on_nobodys_protected_examples_have_no_mark(
    data: str, privacy: str, tmp_path: Path, hospitals: Path
) -> None:
    summary = run_experiment(natural(data, privacy), tmp_path / "run", data_root=hospitals)
    assert "not_covered" not in summary
    assert all("not_covered" not in row for row in RunDirectory(tmp_path / "run").rows("rounds.jsonl"))
    assert "not_covered" not in compare_runs([tmp_path / "run"]).index
    if privacy:
        assert "who take no part" in (tmp_path / "run" / "privacy.txt").read_text()


@pytest.mark.usefixtures("in_process")
def test_a_sweeps_table_marks_scores_that_no_promise_covers(tmp_path: Path, hospitals: Path) -> None:
    axis = '[[axis]]\nkey = "method.server_lr"\nvalues = [0.1, 0.5]\n'
    table = run_sweep(
        load_sweep(sweep_file(tmp_path, axis, natural().to_toml())), tmp_path / "out", data_root=hospitals
    )
    assert set(table["not_covered"]) == {", ".join(SCORES)}


def test_a_private_run_counts_the_messages_that_it_expected(tmp_path: Path) -> None:
    """Their number times the duration would reveal how many took part."""
    poisson = ["cohort.sampling=poisson", "cohort.probability=0.5"]
    summary = run_experiment(small(*poisson), tmp_path / "private")
    assert summary["clients_per_second"] * summary["seconds"] == pytest.approx(3 * 12 * 0.5)
    bare = run_experiment(small(*poisson, "privacy="), tmp_path / "bare")
    sent = json.loads((tmp_path / "bare" / "diagnostics.json").read_text())["messages"]
    assert bare["clients_per_second"] * bare["seconds"] == pytest.approx(sent)
