"""Trackers, read back from their stores: every row once, despite interruptions, and nothing lost."""

import dataclasses
import json
import stat
import struct
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.sweep_files import BASE, in_process, sweep_file

import fedpriv
from fedpriv.cli import main
from fedpriv.errors import UserError
from fedpriv.experiment.config import Config, load_config
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.privacy import DataFacts
from fedpriv.sweeps.config import load_sweep
from fedpriv.sweeps.run import run_sweep
from fedpriv.sweeps.trial import Tracking
from fedpriv.tracking.trackers import check_trackers, track, watched_by

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

__all__ = ["in_process"]

pytestmark = [
    pytest.mark.xdist_group("trackers"),  # imported by one worker alone, since that takes seconds
    # MLflow, of SQLAlchemy 2.1.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    # Its engines are closed by the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]
ROUNDS = 6


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Run six private rounds, with all stores in the test's folder."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedpriv.experiment.recorder.plot_curves", lambda *_, **__: None)
    (tmp_path / "base.toml").write_text(BASE.replace("rounds = 3", f"rounds = {ROUNDS}") + "[privacy]\nepsilon = 8.0\n")
    return load_config(tmp_path / "base.toml")


class Killed(BaseException):
    """Simulates a signal."""


def interrupted(config: Config, out: Path, tracker: str, after: int, **options: Any) -> None:
    """Run an experiment that ends right after a round; its last checkpoint may be older."""

    def kill(released: dict[str, Any], _: dict[str, Any]) -> None:
        if released["round"] == after:
            raise Killed

    with pytest.raises(Killed), track([tracker], config, out, **options) as log:
        fedpriv.run_experiment(config, out, engine="loop", resume=True, checkpoint_every=3, watch=watched_by(log, kill))


def finished(config: Config, out: Path, tracker: str, *, breaks: bool = False, **options: Any) -> dict[str, Any]:
    with track([tracker], config, out, **options) as log:
        summary = fedpriv.run_experiment(config, out, engine="loop", resume=True, checkpoint_every=3, watch=log)
    assert bool(log.complaints) == breaks
    assert summary is not None
    return summary


def expected(out: Path) -> dict[str, dict[int, float]]:
    """Return every number in the run directory's rows, by metric and round."""
    found: dict[str, dict[int, float]] = {}
    for file, prefix in (("rounds.jsonl", ""), ("diagnostics.jsonl", "diagnostics/")):
        for row in RunDirectory(out).rows(file):
            for key, value in row.items():
                if key != "round" and isinstance(value, int | float):
                    found.setdefault(prefix + key, {})[row["round"]] = float(value)
    return found


def check(sent: dict[str, list[tuple[int, float]]], out: Path, *, diagnostics: bool = False) -> None:
    """Every metric of every round appears once, as in the run directory, except durations."""
    wanted = {key: steps for key, steps in expected(out).items() if diagnostics or "/" not in key}
    assert "test_accuracy" in wanted
    assert "epsilon" in wanted
    assert ("diagnostics/signal_norm" in wanted) is diagnostics
    assert sent.keys() == wanted.keys()
    for key, steps in wanted.items():
        assert [step for step, _ in sent[key]] == sorted(steps), key
        if "second" not in key:
            assert [value for _, value in sent[key]] == pytest.approx([steps[n] for n in sorted(steps)], rel=1e-6), key


def tensorboard_of(out: Path, **options: Any) -> "EventAccumulator":
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(out / "tensorboard"), **options).Reload()


def tensorboard_rows(out: Path) -> dict[str, list[tuple[int, float]]]:
    # Keeps repetitions in later files.
    found = tensorboard_of(out, size_guidance={"scalars": 0}, purge_orphaned_data=False)
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def mlflow_run(out: Path) -> tuple["MlflowClient", str]:
    from mlflow.tracking import MlflowClient

    known = json.loads((out / "mlflow.json").read_text())
    return MlflowClient(known["store"]), known["run"]


def mlflow_rows(out: Path) -> dict[str, list[tuple[int, float]]]:
    client, run = mlflow_run(out)
    keys = client.get_run(run).data.metrics
    found = {key: [(m.step, m.value) for m in client.get_metric_history(run, key)] for key in keys}
    return {key: sorted(rows) for key, rows in found.items()}


def wandb_records(out: Path) -> "list[Record]":
    """Read all sessions' files, each when it is complete: W&B's own process closes it after `finish` has returned."""
    return [record for file in sorted(out.glob("wandb/offline-run-*/run-*.wandb")) for record in wandb_session(file)]


def wandb_session(file: Path) -> "list[Record]":
    records, ends = [], time.monotonic() + 60.0
    while not records or not records[-1].HasField("exit"):
        assert time.monotonic() < ends, f"{file} has no end after a minute"
        time.sleep(0.05)
        records = wandb_written(file.read_bytes())
    return records


def wandb_written(content: bytes) -> "list[Record]":
    """Return the whole records in LevelDB's log format: blocks of 32 KiB after 7 bytes, headers of CRC, size, type."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    records, at, whole = [], 7, b""
    while at < len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        if len(content) < at + 7:
            break
        length, kind = struct.unpack("<xxxxHB", content[at : at + 7])
        if len(content) < at + 7 + length:
            break
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole, or its last piece
            records.append(Record.FromString(whole))
            whole = b""
    return records


def wandb_rows(out: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for record in wandb_records(out):
        items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
        for key, value in items.items():
            if not key.startswith("_"):
                found.setdefault(key, []).append((items["_step"], value))
    return found


READERS = {"tensorboard": tensorboard_rows, "mlflow": mlflow_rows, "wandb": wandb_rows}


@pytest.mark.parametrize("tracker", READERS)
def test_every_row_arrives_once_however_often_a_run_is_interrupted(
    tracker: str, config: Config, tmp_path: Path
) -> None:
    """After round 2 the run restarts, after round 4 it returns to round 3. Unreleased values are requested."""
    out = tmp_path / "run"
    interrupted(config, out, tracker, after=2, diagnostics=True)
    interrupted(config, out, tracker, after=4, diagnostics=True)
    finished(config, out, tracker, diagnostics=True)
    check(READERS[tracker](out), out, diagnostics=True)
    before = Counter(path.name for path in out.rglob("*.tfevents.*"))
    finished(config, out, tracker, diagnostics=True)  # nothing is left to send
    check(READERS[tracker](out), out, diagnostics=True)
    assert Counter(path.name for path in out.rglob("*.tfevents.*")) == before


@pytest.mark.parametrize("tracker", READERS)
def test_a_run_that_was_made_without_a_tracker_is_sent_later_without_what_is_not_private(
    tracker: str, config: Config, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    fedpriv.run_experiment(config, out, engine="loop")
    finished(config, out, tracker)
    check(READERS[tracker](out), out)


@pytest.mark.parametrize("tracker", READERS)
def test_a_run_without_privacy_is_sent_whole_unless_that_is_switched_off(
    tracker: str, config: Config, tmp_path: Path
) -> None:
    bare = dataclasses.replace(config, privacy=None)
    for name, options in (("whole", {}), ("less", {"diagnostics": False})):
        finished(bare, tmp_path / name, tracker, **options)
        sent = READERS[tracker](tmp_path / name)
        assert any(key.startswith("diagnostics/") for key in sent) == (name == "whole")


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_files_for_a_tracker_that_hold_what_is_not_released_are_their_owners_alone(
    tracker: str, config: Config, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    interrupted(config, out, tracker, after=2)
    assert (out / tracker).stat().st_mode & 0o055 == 0o055
    finished(config, out, tracker, diagnostics=True)
    assert stat.S_IMODE((out / tracker).stat().st_mode) == 0o700


@pytest.mark.parametrize("tracker", READERS)
def test_scores_that_no_promise_covers_are_named_so_in_a_tracker(
    tracker: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = DataFacts(clients="natural", test="within")
    monkeypatch.setattr("fedpriv.experiment.config.DataChoice.facts", facts)
    finished(config, tmp_path / "run", tracker)
    sent = READERS[tracker](tmp_path / "run")
    assert set(sent) == {"epsilon", "not_covered/test_accuracy", "not_covered/test_loss"}
    if tracker == "wandb":
        summary = {i.key for r in wandb_records(tmp_path / "run") for i in r.summary.update if i.key}
        assert {"not_covered/test_accuracy", "not_covered"} <= summary
        assert "test_accuracy" not in summary


def test_tensorboard_has_the_config_the_texts_and_the_statement(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    from tensorboard.plugins.hparams.plugin_data_pb2 import (
        HParamsPluginData,  # pyright: ignore[reportAttributeAccessIssue]
    )

    finished(config, out, "tensorboard")
    found = tensorboard_of(out)
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    statement = (out / "privacy.txt").read_text().split("\n")[0]
    assert statement in texts["privacy.txt/text_summary"]
    assert '"epsilon"' in texts["summary.json/text_summary"]
    start = HParamsPluginData.FromString(found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    given = start.session_start_info.hparams
    assert given["method.name"].string_value == "dp-fedavg"
    assert given["method.server_lr"].number_value == 0.5
    assert given["training.rounds"].number_value == ROUNDS


def test_mlflow_has_one_run_with_parameters_artifacts_and_status(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    interrupted(config, out, "mlflow", after=4)
    client, run = mlflow_run(out)
    assert client.get_run(run).info.status == "KILLED"
    with pytest.raises(SystemExit) as caught:
        main(["run", str(tmp_path / "base.toml"), "--out", str(out), "--engine", "loop", "--resume", "--log", "mlflow"])
    assert caught.value.code == 0
    assert "accuracy" in capsys.readouterr().out
    info = client.get_run(run)
    assert info.info.status == "FINISHED"
    assert info.data.params["method.server_lr"] == "0.5"
    assert info.data.params["training.rounds"] == str(ROUNDS)
    assert info.data.tags["fedpriv.digest"] == config.digest
    assert len(client.search_runs([info.info.experiment_id])) == 1
    for name in ("privacy.txt", "config.toml", "summary.json"):
        saved = Path(client.download_artifacts(run, name, str(tmp_path))).read_text()
        if name == "summary.json":
            kept = json.loads((out / name).read_text())
            assert json.loads(saved).keys() == kept.keys() - {"seconds", "clients_per_second"}
        else:
            assert saved == (out / name).read_text()


def test_wandb_has_the_config_the_summary_and_the_statement_and_nothing_of_the_machine(
    config: Config, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    finished(config, out, "wandb")
    records = wandb_records(out)
    begun = next(record.run for record in records if record.HasField("run"))
    assert begun.run_id == json.loads((out / "wandb.json").read_text())["id"]
    assert begun.project == "fedpriv"
    given = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert given["method.server_lr"] == 0.5
    assert not begun.git.remote_url
    summary = {i.key: json.loads(i.value_json) for r in records for i in r.summary.update if i.key}
    assert summary["privacy"] == (out / "privacy.txt").read_text()
    assert summary["status"] == "finished"
    assert summary["digest"] == config.digest


@pytest.mark.parametrize("begun", [0, 3, 7, 9, 500])
def test_a_session_is_read_when_its_file_is_complete(begun: int, config: Config, tmp_path: Path) -> None:
    """W&B's own process may still write it after `finish` has returned, under load seconds later."""
    finished(config, tmp_path / "run", "wandb")
    whole = wandb_records(tmp_path / "run")
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    file.write_bytes(content[:begun])
    later = threading.Timer(0.3, file.write_bytes, [content])
    later.start()
    assert wandb_records(tmp_path / "run") == whole
    later.join()


@pytest.mark.parametrize("tracker", READERS)
def test_what_is_not_released_is_in_no_summary_either_where_diagnostics_are_not_sent(
    tracker: str, config: Config, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    finished(config, out, tracker)
    assert {"seconds", "clients_per_second"} <= json.loads((out / "summary.json").read_text()).keys()
    if tracker == "wandb":
        sent = {item.key for record in wandb_records(out) for item in record.summary.update if item.key}
    elif tracker == "mlflow":
        client, run = mlflow_run(out)
        names = [artifact.path for artifact in client.list_artifacts(run)]
        sent = set(json.loads(Path(client.download_artifacts(run, "summary.json", str(tmp_path))).read_text()))
        assert sorted(names) == ["config.toml", "privacy.txt", "summary.json"]
    else:
        found = tensorboard_of(out)
        text = found.Tensors("summary.json/text_summary")[0].tensor_proto.string_val[0].decode()
        sent = set(json.loads(text))
    assert {"digest", "epsilon", "test_accuracy"} <= sent
    assert not {key for key in sent if key.startswith(("diagnostics", "seconds", "clients_per_second"))}


def test_a_tracker_that_breaks_is_said_and_ends_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, calls = tmp_path / "run", []

    def broken(*arguments: Any) -> None:
        calls.append(arguments[1])
        raise ConnectionError("no way to the store.\nat all")

    with monkeypatch.context() as patched:
        patched.setattr("fedpriv.tracking.tensorboard.Tracker.row", broken)
        assert finished(config, out, "tensorboard", breaks=True)["rounds"] == ROUNDS
    said = [line for line in capsys.readouterr().err.splitlines() if "The noise on the mean message" not in line]
    assert calls == [0, 0], "one more try, at the end"
    assert len(said) == 2
    assert all(line.startswith("fedpriv: --log tensorboard: no way to the store. Rows are kept") for line in said)
    finished(config, out, "tensorboard")
    check(tensorboard_rows(out), out)


@pytest.mark.usefixtures("config")
def test_a_tracker_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="Did you mean 'mlflow'"):
        check_trackers(["mlfow"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SystemExit) as caught:
        main(["run", str(tmp_path / "base.toml"), "--out", str(tmp_path / "run"), "--log", "wandb"])
    assert caught.value.code == 2
    remedy = "Install it with pip install 'fedpriv[wandb]'"
    line = f"fedpriv: --log wandb: expected an installed package wandb, got a missing one. {remedy}.\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("config", "in_process")
def test_a_sweep_sends_each_trial_to_a_run_of_its_own(tmp_path: Path) -> None:
    text = '[[axis]]\nkey = "method.server_lr"\nvalues = [0.1, 0.5]\n'
    plan = load_sweep(sweep_file(tmp_path, text, (tmp_path / "base.toml").read_text()))
    run_sweep(plan, tmp_path / "out", tracking=Tracking(["mlflow", "tensorboard"]))
    for folder in (tmp_path / "out" / "trials").iterdir():
        check(mlflow_rows(folder), folder)
        check(tensorboard_rows(folder), folder)
        client, run = mlflow_run(folder)
        info = client.get_run(run)
        assert info.info.run_name == f"server_lr={info.data.params['method.server_lr']}"
        assert info.data.tags["fedpriv.sweep"] == "s"
