"""Contenders by turns in one process, on a busy machine: processor time of rounds against the bare loop's.

    python results/benchmarks/ratios.py [--only WORKLOAD] [--turns 5]     # fills the page's rows of what it measures

Each turn runs every contender for a few rounds, in one thread, and the ratio of a turn compares neighbors in time. So
the numbers hold while other programs use the machine: they are those of `time.process_time`, not of a clock.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable

import torch
from expert import Expert
from ideal import Ideal
from ours import make_ours
from page import fill, rows, table
from workloads import WORKLOADS, Job, median, one_thread

NAMES = ("cnn62k", "mlp", "softmax", "softmax60k", "cnn62k-epochs", "mlp-epochs", "mlp-steps")
HEAD = ("workload", "contender", "ms/round", "x bare loop", "x expert")
TURN_SECONDS = 0.15


def contenders_of(job: Job) -> dict[str, Callable[[], None]]:
    """Return one round of each contender, by name."""
    found = {
        "bare loop": Ideal(job).round,
        "expert": Expert(job).round,
        "fedpriv": make_ours(job, "vectorized", {}).round,
    }
    if not job.workload.source.dense:
        found["fedpriv, channels last"] = make_ours(job, "vectorized", {"channels_last": True}).round
    return found


def measured(name: str, turns: int) -> dict[str, list[float]]:
    """Return the seconds of a round of each contender in each turn."""
    job = Job(workload=WORKLOADS[name], workers=1, rounds=None, seed=0, check=False)
    contenders = contenders_of(job)
    rounds = {who: _rounds_in(one, TURN_SECONDS) for who, one in contenders.items()}
    times: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in range(turns):
        for who, one in contenders.items():
            times[who].append(_seconds(one, rounds[who]))
    return times


def _rounds_in(one: Callable[[], None], seconds: float) -> int:
    _seconds(one, 2)  # warms up
    return max(int(seconds / max(_seconds(one, 2), 1e-6)), 1)


def _seconds(one: Callable[[], None], rounds: int) -> float:
    start = time.process_time()
    for _ in itertools.repeat(None, rounds):
        one()
    return (time.process_time() - start) / rounds


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
