"""Runs: their directory, bit-identical resumption, equal engines, refusals that lose nothing."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedpriv
from fedpriv.data.dataset import Dataset
from fedpriv.data.datasets import Digits
from fedpriv.engines import LoopEngine
from fedpriv.errors import UserError
from fedpriv.experiment import run_directory as records
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import Config, load_config
from fedpriv.experiment.execution import EngineName
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import FILES, Checkpoint, RunDirectory
from fedpriv.files import write_atomically
from fedpriv.privacy.accounting import Releases
from fedpriv.rounds import begin_round, finish_round
from fedpriv.streams import Purpose, SeededStreams

QUICKSTART = Path(__file__).parents[2] / "sim_configs" / "quickstart.toml"
SMALL = ["data.clients=12", "training.rounds=12"]
POISSON_LOCAL = [
    *SMALL,
    "cohort.sampling=poisson",
    "cohort.probability=0.4",
    "privacy.trust=local",
    "privacy.adjacency=",
]
VARIANTS = {
    "everyone, central": SMALL,
    "poisson, local, sent": [*POISSON_LOCAL, "method.memory=sent"],
    "poisson, local, minibatch": [*POISSON_LOCAL, "local.work=minibatch-gradient", "local.batch_size=4"],
    "fixed, not private": [*SMALL, "cohort.sampling=fixed", "cohort.size=5", "privacy="],
    "server optimizer, epochs": [
        *SMALL,
        "server.optimizer=adam",
        *("local.work=local-epochs", "local.epochs=2", "local.client_lr=0.1", "local.batch_size=4"),
    ],
}


def small(*settings: str) -> Config:
    return load_config(QUICKSTART, [*SMALL, *settings])


def final_model(directory: Path) -> torch.Tensor:
    return load_file(directory / "model.safetensors")["model"]


class StoppedError(Exception):
    """Simulates a kill between two rounds."""


def stop_after(last: int):
    def watch(released: dict, diagnostics: dict) -> None:  # noqa: ARG001
        if released["round"] == last:
            raise StoppedError

    return watch


def test_a_run_fills_its_directory_and_says_what_was_asked_for(tmp_path: Path):
    summary = run_experiment(small(), tmp_path / "run")
    assert all((tmp_path / "run" / name).exists() for name in FILES if name != "analysis.json")
    wanted = "method engine digest rounds test_accuracy test_loss epsilon delta noise_multiplier noise_stddev seconds"
    assert set(wanted.split()) | {"clients_per_second"} <= set(summary)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert summary["epsilon"] <= 8.0
    assert list(load_file(tmp_path / "run" / "model.safetensors")) == ["model"]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_released_rows_hold_nothing_that_a_client_reported_and_epsilon_only_grows(tmp_path: Path):
    run_experiment(small(), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(13))
    assert all(set(row) == {"round", "epsilon", "test_accuracy", "test_loss"} for row in rows)
    spent = [row["epsilon"] for row in rows]
    assert spent[0] == 0.0
    assert all(a < b for a, b in itertools.pairwise(spent))
    assert 7.9 < spent[-1] <= 8.0


def test_no_rounds_leave_the_initial_model(tmp_path: Path):
    summary = run_experiment(small("training.rounds=0"), tmp_path)
    assert torch.equal(final_model(tmp_path), load_file(tmp_path / "initial.safetensors")["model"])
    assert summary["epsilon"] == 0.0
    assert summary["clients_per_second"] == 0.0


def test_a_run_without_privacy_says_so_everywhere(tmp_path: Path):
    summary = run_experiment(small("privacy="), tmp_path)
    assert summary["private"] is False
    assert summary["epsilon"] is None
    assert json.loads((tmp_path / "privacy.json").read_text())["private"] is False
    assert "not private" in (tmp_path / "privacy.txt").read_text().lower()


def test_a_run_without_noise_is_not_called_private(tmp_path: Path):
    summary = run_experiment(small("privacy.epsilon=", "privacy.noise_multiplier=0.0"), tmp_path)
    assert summary["private"] is False
    assert summary["epsilon"] is None


def test_noise_zero_and_everyone_is_the_run_without_privacy_to_the_bit(tmp_path: Path):
    run_experiment(small("privacy.epsilon=", "privacy.noise_multiplier=0.0"), tmp_path / "zero")
    run_experiment(small("privacy="), tmp_path / "none")
    assert torch.equal(final_model(tmp_path / "zero"), final_model(tmp_path / "none"))


@pytest.mark.parametrize("engine", ["loop", "vectorized"])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.sampled
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path, settings: list[str], engine: EngineName):
    config = load_config(QUICKSTART, settings)
    run_experiment(config, tmp_path / "whole", engine=engine)
    part = tmp_path / "part"
    for last in (2, 7, 7, 11):
        with pytest.raises(StoppedError):
            run_experiment(config, part, engine=engine, resume=True, watch=stop_after(last), checkpoint_every=3)
    run_experiment(config, part, engine=engine, resume=True)
    assert torch.equal(final_model(part), final_model(tmp_path / "whole"))
    assert (part / "rounds.jsonl").read_bytes() == (tmp_path / "whole" / "rounds.jsonl").read_bytes()
    ledgers = [json.loads((d / "summary.json").read_text()).get("ledger") for d in (part, tmp_path / "whole")]
    assert ledgers[0] == ledgers[1]


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path):
    settings = [*VARIANTS["poisson, local, sent"], "training.rounds=120", "data.clients=30"]
    config = load_config(QUICKSTART, settings)
    run_experiment(config, tmp_path / "whole")
    part = tmp_path / "part"
    command = [sys.executable, "-m", "fedpriv.cli", "run", str(QUICKSTART), "--out", str(part), "--resume"]
    command += ["--checkpoint-every", "1", *(word for s in settings for word in ("-s", s))]
    for rounds_more in (5, 40):
        kill_after_rows(command, part / "rounds.jsonl", rounds_more)
    assert not (part / "summary.json").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert torch.equal(final_model(part), final_model(tmp_path / "whole"))
    assert (part / "rounds.jsonl").read_bytes() == (tmp_path / "whole" / "rounds.jsonl").read_bytes()


def kill_after_rows(command: list[str], file: Path, more: int) -> None:
    def rows() -> int:
        return file.read_bytes().count(b"\n") if file.exists() else 0

    begun, process = rows(), subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while rows() < begun + more and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL


def test_a_checkpoint_of_one_engine_serves_the_other(tmp_path: Path):
    config = load_config(QUICKSTART, VARIANTS["poisson, local, sent"])
    with pytest.raises(StoppedError):
        run_experiment(config, tmp_path / "a", engine="loop", watch=stop_after(6), checkpoint_every=5)
    run_experiment(config, tmp_path / "a", engine="vectorized", resume=True)
    run_experiment(config, tmp_path / "b", engine="loop")
    assert torch.allclose(final_model(tmp_path / "a"), final_model(tmp_path / "b"), atol=1e-5)


def test_a_directory_of_another_experiment_is_refused_and_untouched(tmp_path: Path):
    run_experiment(small(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match="a different experiment"):
        run_experiment(small("seed=8"), tmp_path, resume=True)
    with pytest.raises(UserError, match="--resume"):
        run_experiment(small(), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_somebody_elses_files_are_not_overwritten(tmp_path: Path):
    (tmp_path / "config.toml").write_text("mine")
    with pytest.raises(UserError):
        run_experiment(small(), tmp_path)
    assert (tmp_path / "config.toml").read_text() == "mine"


def test_a_finished_run_resumed_returns_its_summary_and_changes_nothing(tmp_path: Path):
    summary = run_experiment(small(), tmp_path)
    before = (tmp_path / "rounds.jsonl").stat().st_mtime_ns
    assert run_experiment(small(), tmp_path, resume=True) == summary
    assert (tmp_path / "rounds.jsonl").stat().st_mtime_ns == before


def test_a_damaged_checkpoint_is_a_clear_error(tmp_path: Path):
    with pytest.raises(StoppedError):
        run_experiment(small(), tmp_path, watch=stop_after(6), checkpoint_every=2)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"checkpoint\.safetensors"):
        run_experiment(small(), tmp_path, resume=True)


def flip_a_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("place", [-1, -40, 100])
def test_a_byte_of_a_checkpoint_that_changed_is_noticed(tmp_path: Path, place: int):
    path = tmp_path / "checkpoint.safetensors"
    states = {"a": torch.arange(12.0)}
    Checkpoint(path).write("digest", "promise", 3, states, states)
    assert Checkpoint(path).read("digest", "promise") is not None
    flip_a_byte(path, place)
    with pytest.raises(UserError, match="expected an undamaged checkpoint"):
        Checkpoint(path).read("digest", "promise")


@pytest.mark.parametrize("name", ["rounds.jsonl", "diagnostics.jsonl"])
@pytest.mark.parametrize("damage", ["file", "row", "digit"])
def test_rows_that_a_run_lost_are_noticed_when_it_is_resumed(tmp_path: Path, name: str, damage: str):
    directory = RunDirectory(tmp_path)
    for number in range(3):
        directory.append(name, {"round": number, "seconds": 1.5})
    directory.save("digest", "promise", 2, {}, {})
    directory.append(name, {"round": 3, "seconds": 1.5})
    again = RunDirectory(tmp_path)
    assert again.saved("digest", "promise") is not None
    again.keep_rows(name, 2)
    assert again.saved("digest", "promise") is not None
    path, lines = tmp_path / name, (tmp_path / name).read_text().splitlines(keepends=True)
    changed = {"row": lines[0] + lines[2], "digit": "".join(lines).replace("1.5", "7.5")}
    path.unlink() if damage == "file" else path.write_text(changed[damage])
    with pytest.raises(UserError, match=rf"{name}: expected the rows before the checkpoint"):
        again.saved("digest", "promise")


@pytest.mark.parametrize("lost", [0, 3, 12])
def test_a_finished_run_that_lost_a_row_is_not_read(tmp_path: Path, lost: int):
    run_experiment(small(), tmp_path)
    rows = (tmp_path / "rounds.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rounds.jsonl").write_text("".join(rows[:lost] + rows[lost + 1 :]))
    with pytest.raises(UserError, match=f"for each round from 0 to 12, in order, got rows without round {lost}"):
        fedpriv.load_results(tmp_path)


def test_numbers_of_results_are_numbers_and_cells_can_be_grouped(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("fedpriv.experiment.recorder.plot_curves", lambda *_, **__: None)
    private = small("training.rounds=2", "training.evaluate_every=2", 'task.metrics=["accuracy", "f1"]')
    run_experiment(private, tmp_path / "private")
    run_experiment(small("training.rounds=1", "privacy="), tmp_path / "plain")
    table = fedpriv.load_results(tmp_path)
    for key in ("epsilon", "signal_to_noise", "test_f1", "test_loss", "privacy.epsilon"):
        assert table[key].dtype == np.float64, key
    assert table["round"].dtype == np.int64
    assert np.isfinite(table["epsilon"]).tolist() == [False, False, True, True, True]
    assert table.groupby("task.metrics")["epsilon"].max().to_dict() == {"accuracy, f1": table["epsilon"].max()}
    for name in table.columns.tolist():
        table.groupby(name).size()
    plain = fedpriv.load_results(tmp_path / "plain")
    assert plain["epsilon"].dtype == np.float64
    assert plain["epsilon"].isna().all()


def test_the_same_experiment_twice_gives_the_same_bits(tmp_path: Path):
    for name in ("a", "b"):
        run_experiment(small(), tmp_path / name)
    assert torch.equal(final_model(tmp_path / "a"), final_model(tmp_path / "b"))


def test_the_ledger_counts_what_each_client_took_part_in(tmp_path: Path):
    summary = run_experiment(load_config(QUICKSTART, POISSON_LOCAL), tmp_path)
    ledger = summary["ledger"]
    config = load_config(QUICKSTART, POISSON_LOCAL)
    streams = SeededStreams(config.seed)
    cohorts = [config.cohort.of(12).cohort(streams.source(Purpose.COHORT, k)) for k in range(1, 13)]
    counts = np.bincount(np.concatenate(cohorts), minlength=12)
    found = [ledger[who]["participations"] for who in ("most", "median", "least")]
    assert found == [counts.max(), math.ceil(np.median(counts)), counts.min()]
    assert ledger["least"]["epsilon"] < ledger["most"]["epsilon"] < summary["epsilon"]


def test_signal_to_noise_falls_with_the_noise(tmp_path: Path):
    ratios = []
    for multiplier in (1.0, 10.0):
        directory = tmp_path / str(multiplier)
        run_experiment(small("privacy.epsilon=", f"privacy.noise_multiplier={multiplier}"), directory)
        rows = [json.loads(line) for line in (directory / "diagnostics.jsonl").read_text().splitlines()]
        ratios.append(rows[0]["signal_to_noise"])
    assert math.isclose(ratios[0], 10.0 * ratios[1], rel_tol=1e-3)


def test_results_read_back_as_one_tidy_table(tmp_path: Path):
    run_experiment(small(), tmp_path / "a")
    run_experiment(small("privacy="), tmp_path / "b")
    table = fedpriv.load_results(tmp_path)
    assert set(table["run"]) == {"a", "b"}
    assert len(table) == 26
    assert {"method.alpha", "training.rounds", "test_accuracy", "epsilon", "signal_to_noise"} <= set(table.columns)
    with pytest.raises(UserError):
        fedpriv.load_results(tmp_path / "nothing")


def test_the_quickstart_learns_digits_under_its_promise(tmp_path: Path):
    summary = run_experiment(load_config(QUICKSTART), tmp_path)
    assert summary["test_accuracy"] >= 0.80
    assert summary["epsilon"] <= 8.0
    assert summary["delta"] == 1e-5


def test_a_method_with_memory_is_not_credited_with_cohorts_of_a_fixed_size():
    fixed = ["cohort.sampling=fixed", "cohort.size=3"]
    without = ["method.name=dp-fedavg", *(f"method.{k}=" for k in ["alpha", "beta", "damping", "server_normalization"])]
    plans = {}
    for name, more in (("memory", []), ("none", without)):
        config = small(*fixed, *more)
        plans[name] = config.plan(config.cohort.of(12))
    assert plans["memory"].client_memory
    assert not plans["none"].client_memory


def test_rounds_are_not_gone_on_with_under_another_noise(tmp_path: Path, monkeypatch):
    """As if a newer version calibrated the accountant differently."""
    with pytest.raises(StoppedError):
        run_experiment(small(), tmp_path, watch=stop_after(6), checkpoint_every=2)
    before = (tmp_path / "privacy.json").read_bytes()
    calibrate = Releases.calibrate
    monkeypatch.setattr(Releases, "calibrate", lambda *known: 0.1 * calibrate(*known))
    with pytest.raises(UserError, match="privacy terms"):
        run_experiment(small(), tmp_path, resume=True)
    assert (tmp_path / "privacy.json").read_bytes() == before


def test_a_summary_of_another_experiment_is_never_returned(tmp_path: Path):
    run_experiment(small(), tmp_path)
    (tmp_path / "config.toml").unlink()
    with pytest.raises(UserError, match="a folder without a run's files"):
        run_experiment(small("seed=8"), tmp_path)
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "digest.txt").write_text(small("seed=8").digest)
    with pytest.raises(UserError, match="that of a different experiment"):
        run_experiment(small("seed=8"), tmp_path, resume=True)


def test_two_runs_cannot_have_one_directory_at_once(tmp_path: Path):
    with RunDirectory(tmp_path).locked(), pytest.raises(UserError, match="a folder that a run is using"):
        run_experiment(small(), tmp_path)


@pytest.mark.parametrize("file", ["summary.json", "rounds.jsonl", "digest.txt"])
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, file: str):
    if file == "summary.json":
        run_experiment(small(), tmp_path)
    else:
        with pytest.raises(StoppedError):
            run_experiment(small(), tmp_path, watch=stop_after(6), checkpoint_every=2)
    (tmp_path / file).write_bytes(b"\xff{torn\n")
    with pytest.raises(UserError) as caught:
        run_experiment(small(), tmp_path, resume=True)
    assert "\n" not in str(caught.value)


class KilledError(BaseException):
    """Simulates a kill in the middle of a write."""


@pytest.mark.parametrize("after", range(1, 13))
@pytest.mark.sampled
def test_killed_at_any_write_and_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path, monkeypatch, after: int):
    """The first writes claim the directory and begin the run; the last ones finish it."""
    config = small("training.rounds=4")
    writes = itertools.count(1)

    def write_or_die(path: Path, content: bytes | str, mode: int | None = None) -> None:
        if next(writes) == after:
            path.with_name(path.name + ".part").write_bytes(b"torn")
            raise KilledError
        write_atomically(path, content, mode)

    monkeypatch.setattr(records, "write_atomically", write_or_die)
    with pytest.raises(KilledError):
        run_experiment(config, tmp_path / "part", engine="loop", checkpoint_every=2)
    monkeypatch.undo()
    run_experiment(config, tmp_path / "part", engine="loop", resume=True)
    run_experiment(config, tmp_path / "whole", engine="loop")
    for name in ("model.safetensors", "rounds.jsonl", "privacy.json", "initial.safetensors"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("name", ["cost $x_$ y", "\u5b9e\u9a8c", "a: b, c"])
def test_any_name_can_be_drawn(tmp_path: Path, name: str):
    config = dataclasses.replace(small("training.rounds=1"), name=name)
    assert run_experiment(config, tmp_path)["name"] == name


def test_the_directory_may_be_given_as_text(tmp_path: Path):
    assert run_experiment(small("training.rounds=1"), str(tmp_path / "text"))["rounds"] == 1


def test_the_model_of_a_run_goes_back_into_a_module(tmp_path: Path):
    config = small("training.rounds=2", "model.name=mlp")
    run_experiment(config, tmp_path)
    module = config.model.build((1, 8, 8), 10, seed=0)
    module.load_state_dict(fedpriv.load_model(tmp_path))
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
    assert torch.equal(flat, final_model(tmp_path))
    with pytest.raises(UserError, match=r"nothing: expected the folder of a finished run"):
        fedpriv.load_model(tmp_path / "nothing")


def test_a_refusal_says_in_what_the_experiments_differ(tmp_path: Path):
    run_experiment(small("training.rounds=2"), tmp_path)
    with pytest.raises(UserError, match=r"training\.rounds is 2 there and 3 here"):
        run_experiment(small("training.rounds=3"), tmp_path, resume=True)


def test_a_run_divides_by_the_expected_cohort_and_does_nothing_beside_the_three_functions_of_a_round(tmp_path: Path):
    config = small("cohort.sampling=poisson", "cohort.probability=0.4", "method.server_normalization=false")
    run_experiment(config, tmp_path, engine="loop")
    experiment = assemble(config)
    engine, state = LoopEngine(experiment.population), config.method.init_server(experiment.initial_model)
    sizes = set()
    for number in range(1, config.training.rounds + 1):
        total = engine.sum_messages(begin_round(experiment.server, state, number))
        state = finish_round(experiment.server, state, number, total.sum)
        sizes.add(total.messages)
    assert len(sizes) > 1
    assert torch.equal(final_model(tmp_path), state.model)


def test_rounds_are_not_gone_on_with_on_other_data(tmp_path: Path, monkeypatch):
    with pytest.raises(StoppedError):
        run_experiment(small(), tmp_path, watch=stop_after(6), checkpoint_every=2)
    load = Digits.load

    def changed(self: Digits, data_root: Path | None) -> Dataset:
        dataset = load(self, data_root)
        return dataclasses.replace(dataset, train_inputs=dataset.train_inputs + 1.0)

    monkeypatch.setattr(Digits, "load", changed)
    with pytest.raises(UserError, match="data"):
        run_experiment(small(), tmp_path, resume=True)
