"""Contenders by turns in one process, on a busy machine: processor time of rounds against the bare loop's.

    python results/benchmarks/ratios.py [--only WORKLOAD] [--turns 5]     # fills the page's rows of what it measures

Each turn runs every contender for a few rounds, in one thread, and the ratio of a turn compares neighbors in time. So
the numbers hold while other programs use the machine: they are those of `time.process_time`, not of a clock. JAX has
its own process in its own environment (`rivals/setup.py jax`), which waits while the others run.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from expert import Expert
from ideal import Ideal
from ours import make_ours
from page import fill, rows, table
from workloads import WORKLOADS, Job, median, one_thread

sys.path.insert(0, str(Path(__file__).parent / "rivals"))

from setup import interpreter, is_installed

NAMES = ("cnn62k", "mlp", "softmax", "softmax60k", "cnn62k-epochs", "mlp-epochs", "mlp-steps")
HEAD = ("workload", "contender", "ms/round", "x bare loop", "x expert")
TURN_SECONDS = 0.15


Timed = Callable[[int], float]


class Jax:
    """A process with the rounds of `rivals/run_jax.py`.

    Args:
        workload: Its name.
    """

    def __init__(self, workload: str) -> None:
        command = [
            str(interpreter("jax")),
            str(Path(__file__).parent / "rivals" / "run_jax.py"),
            "--workload",
            workload,
            "--turns",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def __call__(self, rounds: int) -> float:
        """Return the seconds of one of a number of rounds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{rounds}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def measured(name: str, turns: int) -> dict[str, list[float]]:
    """Return the seconds of a round of each contender in each turn."""
    job = Job(workload=WORKLOADS[name], workers=1, rounds=None, seed=0, check=False)
    contenders: dict[str, Timed] = {
        "bare loop": _timed(Ideal(job).round),
        "expert": _timed(Expert(job).round),
        "fedpriv": _timed(make_ours(job, "vectorized", {}).round),
    }
    if not job.workload.source.dense:
        contenders["fedpriv, channels last"] = _timed(make_ours(job, "vectorized", {"channels_last": True}).round)
    jax = Jax(name) if is_installed("jax") else None
    if jax is not None:
        contenders["JAX"] = jax
    rounds = {who: _rounds_in(one, TURN_SECONDS) for who, one in contenders.items()}
    times: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in range(turns):
        for who, one in contenders.items():
            times[who].append(one(rounds[who]))
    if jax is not None:
        jax.close()
    return times


def _timed(one_round: Callable[[], None]) -> Timed:
    def timed(rounds: int) -> float:
        start = time.process_time()
        for _ in itertools.repeat(None, rounds):
            one_round()
        return (time.process_time() - start) / rounds

    return timed


def _rounds_in(one: Timed, seconds: float) -> int:
    one(2)  # warms up
    return max(int(seconds / max(one(2), 1e-6)), 1)


def lines_of(name: str, times: dict[str, list[float]]) -> list[list[str]]:
    """Return a row for each contender: milliseconds, and ratios to the bare loop and to the expert."""
    lines = []
    for who, own in times.items():
        cells = [name, who, f"{1e3 * median(own):.3g}"]
        for other in ("bare loop", "expert"):
            ratios = [a / b for a, b in zip(own, times[other], strict=True)]
            cells.append("" if who == other else f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(cells)
    return lines


def main() -> None:
    """Measure, and fill the page; rows of workloads that were not measured stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(WORKLOADS))
    parser.add_argument("--turns", type=int, default=5)
    found = parser.parse_args()
    one_thread()
    torch.manual_seed(0)
    made: dict[str, list[list[str]]] = {}
    for name in found.only or NAMES:
        made[name] = lines_of(name, measured(name, found.turns))
        print(table(HEAD, made[name]), flush=True)
    lines = [made[name] if name in made else [row for row in rows("ratios") if row[0] == name] for name in NAMES]
    fill("ratios", table(HEAD, itertools.chain.from_iterable(lines)))
    sys.exit(0)


if __name__ == "__main__":
    main()
