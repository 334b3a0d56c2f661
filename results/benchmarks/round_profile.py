"""The parts of a round's time, against the processor's limits; writes `profile.md`.

    python results/benchmarks/round_profile.py [--only WORKLOAD] [--rounds 5]

Parts of a round are timed by `time.process_time`, in one thread. The limits are measured in the same run: float32
operations of a matrix product, and bytes of `a += b` over arrays that no cache holds. The floating-point operations of
a round are those of its gradients (`FlopCounterMode`); its bytes are those that a round cannot avoid: the examples are
read once in each step, and every client's signal is written once and read once.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import ours
import torch
from ours import make_ours
from page import table
from torch.utils.flop_counter import FlopCounterMode
from workloads import WORKLOADS, Job, Workload, median, one_thread

from fedpriv.engines import vectorized
from fedpriv.engines.base import Population
from fedpriv.engines.in_place import ClientStep
from fedpriv.tasks.task import Task

HERE = Path(__file__).parent
NAMES = ("cnn62k", "mlp", "softmax", "softmax60k", "cnn62k-epochs")
TRIAD_BYTES, TRIAD_FLOATS, MATRIX = 12, 2**25, 768

# Functions whose own time, without that of the others in this list, is a part of a round.
PARTS: tuple[tuple[str, object, str], ...] = (
    ("gradients", Task, "gradient"),
    ("gradients", Task, "gradients"),
    ("other local work", Population, "signal"),
    ("draws of batches", vectorized.VectorizedEngine, "_plans"),
    ("examples", vectorized.VectorizedEngine, "_gather"),
    ("bound and sum", ClientStep, "take_many"),
    ("bound and sum", ClientStep, "take_alone"),
    ("cohort, noise, server step", ours, "begin_round"),
    ("cohort, noise, server step", ours, "finish_round"),
)


class Stopwatch:
    """Adds up the own processor time of functions."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._stack: list[str] = ["other"]
        self._since = time.process_time()

    def _turn(self) -> None:
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., object]) -> Callable[..., object]:
        """Return the function with its time counted as `part`."""

        @wraps(function)
        def call(*args: object, **kwargs: object) -> object:
            self._turn()
            self._stack.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._stack.pop()

        return call

    def start(self) -> None:
        """Forget everything before."""
        self._turn()
        self.seconds.clear()


def limits() -> tuple[float, float]:
    """Return operations per second of a matrix product, and bytes per second of `a += b`."""
    a = torch.randn(MATRIX, MATRIX)
    x, y = torch.zeros(TRIAD_FLOATS), torch.ones(TRIAD_FLOATS)
    return 2.0 * MATRIX**3 / _least(lambda: a @ a), TRIAD_BYTES * TRIAD_FLOATS / _least(lambda: x.add_(y))


def _least(work: Callable[[], object]) -> float:
    found = []
    for _ in range(6):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def needs_of(work: Workload) -> tuple[float, float]:
    """Return the floating-point operations and the bytes that a round needs at least."""
    task, steps = Task(work.module()), work.steps or 1
    examples = work.batch or work.examples
    inputs, labels = torch.randn(examples, *work.input_shape), torch.zeros(examples, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        task.gradient(task.initial_model(), inputs, labels)
    read = 4 * inputs.numel() * steps
    return counter.get_total_flops() * steps * work.cohort, work.cohort * (read + 8.0 * work.parameters)


def profile(name: str, rounds: int, watch: Stopwatch) -> dict[str, float]:
    """Return the milliseconds of each part of a round."""
    made = make_ours(Job(workload=WORKLOADS[name], workers=1, rounds=None, seed=0, check=False), "vectorized", {})
    for _ in range(3):
        made.round()
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        watch.start()
        made.round()
        watch.timed("other", lambda: None)()
        found.append({part: 1e3 * value for part, value in watch.seconds.items()})
    parts = dict.fromkeys(part for row in found for part in row)
    return {part: median([row.get(part, 0.0) for row in found]) for part in parts}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5)
    found = parser.parse_args()
    one_thread()
    watch = Stopwatch()
    for part, owner, name in PARTS:
        setattr(owner, name, watch.timed(part, getattr(owner, name)))
    parts = [*dict.fromkeys(part for part, _, _ in PARTS), "other"]
    flops, bandwidth = limits()
    lines = []
    for name in found.only or NAMES:
        times, (operations, moved) = profile(name, found.rounds, watch), needs_of(WORKLOADS[name])
        whole, least = sum(times.values()), 1e3 * operations / flops
        cells = [f"{times.get(part, 0.0):.3g}" for part in parts]
        gradients = times.get("gradients", 0.0) / least
        memory = f"{1e3 * moved / bandwidth:.3g}"
        lines.append([name, f"{whole:.3g}", *cells, f"{least:.3g}", f"{gradients:.1f}", memory])
        print(lines[-1], flush=True)
    if not found.only:
        text = table(
            ("workload", "round", *parts, "operations at the limit", "gradients over it", "bytes at it"), lines
        )
        measured = f"{flops / 1e9:.0f} GFLOP/s, `a += b` {bandwidth / 1e9:.1f} GB/s"
        (HERE / "profile.md").write_text(
            PAGE.format(limits=measured, table=text, rounds=found.rounds), encoding="utf-8"
        )


PAGE = """# The parts of a round's time

Made by `python results/benchmarks/round_profile.py --rounds {rounds}`: milliseconds of processor time in one
thread, medians of rounds of `fedpriv` with engine `vectorized`. Limits in the same run: {limits}.

{table}
`operations at the limit` is the time of the gradients' floating-point operations at the rate of a large matrix product,
and `gradients over it` says how many times as long the gradients take. `bytes at it` is the time of the bytes that a
round has to move at the bandwidth of `a += b`: examples read once in each step, signals written and read once.
`other local work` is slices of examples, steps of local models and, for convolutions, draws of batches.
"""


if __name__ == "__main__":
    main()
