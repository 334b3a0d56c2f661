"""Cost of a client without its gradient, beside the machine's memory bandwidth.

    python results/benchmarks/noop.py [--repeats 3]

A cohort of 1,000, all of 1,000 clients, with 61,794 parameters, on the vectorized engine in one thread. Rounds of each
method alternate with `a += b` over arrays that fit no cache, in the same process; medians over its rounds, and over
fresh processes. alpha-NormEC has to move the bytes of one `a += b` for each client: its memory is read and written, and
its signal read. `given`: the engine is handed one prepared signal. `chosen`: the client's examples are looked up first.
Fills `noop.csv` and the page.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ours import ConstantTask, build
from page import fill, table
from scale import HERE, TRIAD_BYTES, TRIAD_FLOATS, Vector, in_fresh_process
from torch import Tensor
from workloads import CONSTANT, median

from fedpriv.data.dataset import Dataset
from fedpriv.data.federation import Federation
from fedpriv.engines import Population
from fedpriv.methods import AlphaNormEC, Clip21, DPFedAvg

COHORT = 1000
PARAMETERS = 61_794
ROUNDS = 30
METHODS = {
    "dp-fedavg": DPFedAvg(clip_norm=0.1),
    "alpha-normec": AlphaNormEC(alpha=0.1, beta=0.1),
    "alpha-normec, damped": AlphaNormEC(alpha=0.1, beta=0.1, damping=0.1),
    "clip21": Clip21(clip_norm=0.1),
}


class PreparedTask(ConstantTask):
    """A task with one vector as every gradient; only for engines that do not change it, such as the C step."""

    def gradient(self, model: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Task.gradient`."""
        if not hasattr(self, "prepared"):
            self.prepared = torch.full_like(model, CONSTANT)
        return self.prepared


class GivenPopulation(Population):
    """Clients with a prepared signal."""

    def signal(self, client: int, model: Tensor, round: int) -> Tensor:
        """See `Population.signal`."""
        return self.task.gradient(model, self.inputs, self.labels)


def one_example_each() -> Federation:
    """Return a client for each of a thousand numbers."""
    inputs, labels = torch.zeros(COHORT, 1), torch.arange(COHORT) % 2
    dataset = Dataset(
        name="none", train_inputs=inputs, train_labels=labels, test_inputs=inputs, test_labels=labels, classes=2
    )
    return Federation(dataset=dataset, offsets=np.arange(COHORT + 1), rows=np.arange(COHORT))


def measure() -> dict[str, Any]:
    """Return seconds per client of each kind, and of the triad, in this process."""
    torch.set_num_threads(1)
    rounds: dict[str, Callable[[], object]] = {}
    for name, method in METHODS.items():
        for signals in ("given", "chosen"):
            rounds[f"{name}/{signals}"] = _rounds_of(method, signals).round
    a, b = torch.zeros(TRIAD_FLOATS), torch.ones(TRIAD_FLOATS)
    rounds["triad"] = partial(torch.add, a, b, out=a)
    times: dict[str, list[float]] = {name: [] for name in rounds}
    for number in range(ROUNDS + 2):
        for name, one in rounds.items():
            start = time.perf_counter()
            one()
            if number >= 2:  # the first make the states and warm up
                times[name].append(time.perf_counter() - start)
    middle = {name: median(values) for name, values in times.items()}
    bandwidth = TRIAD_BYTES * TRIAD_FLOATS / middle.pop("triad")
    return {"bandwidth": bandwidth, "seconds": {name: value / COHORT for name, value in middle.items()}}


def _rounds_of(method: Any, signals: str) -> Any:
    return build(
        kind=PreparedTask,
        kind_of_population=GivenPopulation if signals == "given" else Population,
        module=Vector(PARAMETERS),
        federation=one_example_each(),
        method=method,
        cohort=COHORT,
        noise_multiplier=0.01,
        engine="vectorized",
        options={},
    )


def run(repeats: int) -> pd.DataFrame:
    """Measure all kinds in fresh processes."""
    rows = []
    for repeat in range(repeats):
        answer = in_fresh_process("--measure", script=__file__)
        needed = TRIAD_BYTES * PARAMETERS / answer["bandwidth"]
        for name, seconds in answer["seconds"].items():
            method, signals = name.split("/")
            row = {"method": method, "signals": signals, "repeat": repeat, "seconds": seconds}
            rows.append({**row, "bandwidth": answer["bandwidth"], "x_bytes": seconds / needed})
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame) -> str:
    """Return microseconds per client, and multiples of the time that the bytes need: median and range."""
    lines = []
    for (method, signals), part in frame.groupby(["method", "signals"], sort=False):
        x = part["x_bytes"]
        spread = f"{x.median():.2f} ({x.min():.2f} to {x.max():.2f})"
        lines.append([method, signals, f"{1e6 * part['seconds'].median():.1f}", spread])
    needed = 1e6 * TRIAD_BYTES * PARAMETERS / frame["bandwidth"].median()
    note = f"`a += b` of {PARAMETERS:,} floats at the bandwidth of the same processes: {needed:.1f} µs.\n"
    return f"{table(('method', 'signal', 'µs/client', 'times a += b'), lines)}\n{note}"


def main() -> None:
    """Measure and write, or do one process's part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    found = parser.parse_args()
    if found.measure:
        print(json.dumps(measure()))
        return
    frame = run(found.repeats)
    frame.to_csv(found.out / "noop.csv", index=False, float_format="%.5g")
    text = markdown(frame)
    print(text)
    if found.out == HERE:
        fill("noop", text)


if __name__ == "__main__":
    main()
