"""Measure the cost of a sweep beside its trials' own work, and after it was killed twice.

    python results/sweep-overhead/make.py [--trials 200] [--rounds 250] [--jobs 2] [--repeats 3] [--runs FOLDER]

The same trials, the quickstart's experiment under other seeds, are run three ways on as many processes, each with one
thread:

* plain: each process imports the library once and runs its share with `run_experiment` in a loop; nothing else;
* sweep: `fedpriv sweep`, from starting the command to its end;
* killed: the same command, killed by SIGKILL when a third and two thirds of the trials are done, and resumed.

Writes overhead.csv (a row a repeat: wall seconds of each way, and the sweep's overhead over plain) and checks that the
three tables of trials are equal but for seconds. Nothing else should run on the machine.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BASE = ROOT / "sim_configs" / "quickstart.toml"
TIMES = ("seconds", "clients_per_second")


def main() -> None:
    """Run all ways in turn, several times, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=250)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=None, help="folder of the runs; a temporary one by default")
    parser.add_argument("--plain", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain is not None:
        run_share(options.runs, options.plain, options.jobs)
        return
    with tempfile.TemporaryDirectory(prefix="sweep-overhead-") as made:
        measure(options, (options.runs or Path(made)).resolve())


def measure(options: argparse.Namespace, runs: Path) -> None:
    """Write overhead.csv."""
    rows = []
    for repeat in range(1, options.repeats + 1):
        place = runs / str(repeat)
        place.mkdir(parents=True)
        sweep = place / "sweep.toml"
        sweep.write_text(
            f'name = "overhead"\nbase = "{BASE}"\nseeds = {options.trials}\n[set]\ntraining.rounds = {options.rounds}\n'
        )
        ways: dict[str, Callable[[], float]] = {
            "plain": lambda place=place: plain(place, options.jobs),
            "sweep": lambda place=place, sweep=sweep: whole(sweep, place / "sweep", options.jobs),
        }
        # Every other time the other way round, so that neither is always the first.
        order = list(ways) if repeat % 2 else list(reversed(ways))
        seconds = {name: ways[name]() for name in order}
        seconds["killed"] = killed(sweep, place / "killed", options.jobs, options.trials)
        check(place, options.trials)
        overhead = seconds["sweep"] / seconds["plain"] - 1.0
        each = seconds["plain"] * options.jobs / options.trials
        row = {"repeat": repeat, "trials": options.trials, "jobs": options.jobs, "seconds_per_trial": each}
        rows.append({**row, **{f"{name}_seconds": value for name, value in seconds.items()}, "overhead": overhead})
        print(pd.DataFrame(rows[-1:]).to_string(index=False), flush=True)
    pd.DataFrame(rows).round(4).to_csv(HERE / "overhead.csv", index=False)


def plain(place: Path, jobs: int) -> float:
    """Return seconds of processes that run their shares in a loop."""
    began = time.monotonic()
    command = [sys.executable, __file__, "--runs", str(place), "--jobs", str(jobs), "--plain"]
    running = [subprocess.Popen([*command, str(share)], env=environment()) for share in range(jobs)]
    if any([process.wait() for process in running]):  # noqa: C419 - all are waited for
        raise SystemExit("a plain loop failed")
    return time.monotonic() - began


def run_share(place: Path, share: int, jobs: int) -> None:
    """Run every `jobs`-th trial, one after the other: the leanest way."""
    import torch

    from fedpriv.experiment.run import run_experiment
    from fedpriv.sweeps.config import load_sweep

    torch.set_num_threads(1)
    for trial in load_sweep(place / "sweep.toml").trials()[share::jobs]:
        run_experiment(trial.config, place / "plain" / trial.name, engine="vectorized")


def start(sweep: Path, out: Path, jobs: int) -> "subprocess.Popen[bytes]":
    """Return the command, as a user gives it."""
    command = [sys.executable, "-m", "fedpriv.cli", "sweep", str(sweep), "--out", str(out), "--jobs", str(jobs)]
    return subprocess.Popen([*command, "--resume"], stdout=subprocess.DEVNULL, env=environment())


def whole(sweep: Path, out: Path, jobs: int) -> float:
    """Return seconds of a sweep."""
    began = time.monotonic()
    if start(sweep, out, jobs).wait():
        raise SystemExit("the sweep failed")
    return time.monotonic() - began


def killed(sweep: Path, out: Path, jobs: int, trials: int) -> float:
    """Return the seconds of a sweep that is killed twice and resumed; no finished trial may run again."""
    began = time.monotonic()
    done: dict[Path, int] = {}
    for part in (1, 2):
        process = start(sweep, out, jobs)
        while len(list(out.glob("trials/*/summary.json"))) < part * trials // 3:
            if process.poll() is not None:
                raise SystemExit("the sweep ended before it was killed")
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done |= {file: file.stat().st_mtime_ns for file in out.glob("trials/*/summary.json")}
    whole(sweep, out, jobs)
    if any(file.stat().st_mtime_ns != at for file, at in done.items()):
        raise SystemExit("a trial was run twice")
    return time.monotonic() - began


def check(place: Path, trials: int) -> None:
    """Check that the three tables, and every run's rows, are equal except for seconds."""
    from fedpriv.sweeps.config import load_sweep
    from fedpriv.sweeps.table import TrialsTable

    named = {trial.name: trial for trial in load_sweep(place / "sweep.toml").trials()}
    tables = [TrialsTable(place, place / "plain", named, []).write()]
    tables += [pd.read_csv(place / way / "trials.csv") for way in ("sweep", "killed")]
    tables = [table.drop(columns=[name for name in TIMES if name in table]) for table in tables]
    tables = [table.astype(object).where(table.notna() & (table != ""), None) for table in tables]
    assert len(named) == trials
    assert all(set(table["status"]) == {"done"} and len(table) == trials for table in tables)
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], check_dtype=False)
    for name in named:
        files = [folder / name / "rounds.jsonl" for folder in (place / "plain", *trial_folders(place))]
        models = [file.with_name("model.safetensors").read_bytes() for file in files]
        assert len({file.read_bytes() for file in files}) == len(set(models)) == 1, name


def trial_folders(place: Path) -> list[Path]:
    """Return the trials of both sweeps."""
    return [place / way / "trials" for way in ("sweep", "killed")]


def environment() -> dict[str, str]:
    """Return the environment of all ways: one thread per process."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
