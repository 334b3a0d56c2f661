"""Cost of a round as cohort, population and model grow, beside the machine's own memory bandwidth.

    python results/benchmarks/scale.py [--quick] [--draw]

Clients compute nothing, so that every second and byte is the framework's. Each point is a fresh process that reports
the median of its rounds and the largest memory that it and its children ever held; `a += b` over arrays that fit no
cache gives the bandwidth in the same run. Fills `scale.csv`, `scale.png` and the page; `--draw` draws again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from ours import ConstantTask, build
from page import fill, table
from torch import nn
from workloads import median

from fedpriv.data.dataset import Dataset
from fedpriv.data.federation import ResampledFederation
from fedpriv.data.partitions import Resampled
from fedpriv.methods import AlphaNormEC, DPFedAvg

HERE = Path(__file__).parent
METHODS = {"dp-fedavg": DPFedAvg(clip_norm=0.1), "alpha-normec": AlphaNormEC(alpha=0.1, beta=0.1)}
MAX_SECONDS = 10.0
ROUNDS = 5
TRIAD_FLOATS = 2**25
TRIAD_BYTES = 12
"""Of `a += b` for each float32: two are read and one is written."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve: an engine with a number of workers, which are threads in one process, and processes of Ray."""

    engine: str
    workers: int
    options: str = "{}"


# The engines to draw. One more is one line.
LINES = (Line(engine="loop", workers=1), Line(engine="vectorized", workers=1), Line(engine="ray", workers=2))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement."""

    sweep: str
    method: str
    engine: str
    workers: int
    options: str
    cohort: int
    population: int
    parameters: int

    @property
    def bytes_needed(self) -> float:
        """Return an estimate of the memory: the states of all clients that may be seen, and the copies beside them."""
        seen = min(self.population, self.cohort * (ROUNDS + 1)) if self.method == "alpha-normec" else 0
        return 4.0 * self.parameters * (2 * seen + 40)


def sweeps(quick: bool) -> list[Point]:
    """Return all points: cohort, population and parameters, one after the other."""
    cohorts = (10, 100, 1000) if quick else (10, 31, 100, 316, 1000, 3162, 10_000)
    populations = (100, 10_000, 1_000_000) if quick else (100, 1000, 10_000, 100_000, 1_000_000)
    sizes = (
        (10_000, 100_000, 1_000_000) if quick else (10_000, 31_623, 100_000, 316_228, 1_000_000, 3_162_278, 10_000_000)
    )
    base = {"cohort": 100, "population": 100, "parameters": 100_000}
    grid = [{**base, "sweep": "cohort", "parameters": 10_000, "population": 10_000, "cohort": n} for n in cohorts]
    grid += [{**base, "sweep": "population", "population": n} for n in populations]
    grid += [{**base, "sweep": "parameters", "parameters": n} for n in sizes]
    return [Point(method=method, **asdict(line), **at) for at in grid for method in METHODS for line in LINES]


class Vector(nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size))


def federation_of(population: int) -> ResampledFederation:
    """Any number of clients over a hundred tiny examples; nothing is stored by client."""
    inputs, labels = torch.zeros(100, 1), torch.arange(100) % 2
    dataset = Dataset(
        name="none", train_inputs=inputs, train_labels=labels, test_inputs=inputs, test_labels=labels, classes=2
    )
    return ResampledFederation(dataset=dataset, population=population, partition=Resampled(examples=1), seed=0)


def measure(point: Point) -> dict[str, Any]:
    """Return seconds of a round and the peak of the memory, in this process."""
    torch.set_num_threads(1)
    before = peak_bytes()
    ours = build(
        kind=ConstantTask,
        module=Vector(point.parameters),
        federation=federation_of(point.population),
        method=METHODS[point.method],
        cohort=point.cohort,
        noise_multiplier=0.01,
        engine=point.engine,
        workers=point.workers,
        options=json.loads(point.options),
    )
    ours.round()
    seconds, began = [], time.perf_counter()
    while len(seconds) < ROUNDS and time.perf_counter() - began < MAX_SECONDS:
        start = time.perf_counter()
        ours.round()
        seconds.append(time.perf_counter() - start)
    answer = {"seconds": median(seconds), "rounds": len(seconds), "peak_bytes": peak_bytes(), "start_bytes": before}
    ours.close()
    return answer


def peak_bytes() -> int:
    """Return the largest memory that this process ever held, and those of its descendants that still live; Linux."""
    found, parents = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        pid = int(status.parent.name)
        parents[pid] = int(fields["PPid"])
        found[pid] = 1024 * int(fields.get("VmHWM", "0 kB").split()[0])
    return sum(size for pid, size in found.items() if _descends(pid, parents))


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid and pid != os.getpid():
        pid = parents.get(pid, 0)
    return pid == os.getpid()


def triad(threads: int) -> float:
    """Return bytes per second of `a += b` over arrays that fit no cache: the best of ten."""
    torch.set_num_threads(threads)
    a, b = torch.zeros(TRIAD_FLOATS), torch.ones(TRIAD_FLOATS)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a += b
        times.append(time.perf_counter() - start)
    return TRIAD_BYTES * TRIAD_FLOATS / min(times)


def available_bytes() -> int:
    """Memory that is free."""
    text = Path("/proc/meminfo").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith("MemAvailable")).split()[1])


def in_fresh_process(*arguments: str, script: str = __file__) -> Any:
    """Return the output of a script with `arguments`; None if it dies."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, script, *arguments], env=environment, stdout=subprocess.PIPE, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(answers[-1]) if done.returncode == 0 and answers else None


def run(quick: bool) -> pd.DataFrame:
    """Measure all points."""
    bandwidth = {n: in_fresh_process("--triad", str(n))["bandwidth"] for n in sorted({x.workers for x in LINES})}
    rows = []
    for point in sweeps(quick):
        row = {**asdict(point), "bandwidth": bandwidth[point.workers], "absent": ""}
        if point.bytes_needed > 0.5 * available_bytes():
            row["absent"] = "more memory than there is"
        else:
            answer = in_fresh_process("--point", json.dumps(asdict(point)))
            row |= answer or {"absent": "it died"}
        rows.append(row)
        print({key: row.get(key) for key in ("sweep", "method", "engine", "workers", "cohort", "seconds", "absent")})
    frame = pd.DataFrame(rows)
    messages = frame["cohort"] * frame["parameters"]
    frame["passes"] = frame["seconds"] * frame["bandwidth"] / (TRIAD_BYTES * messages)
    return frame


def slope(frame: pd.DataFrame, column: str, y: str) -> float:
    """Return the exponent of a curve over its upper half: d log y / d log x."""
    part = frame.dropna(subset=[y]).sort_values(column)
    part = part[part[column] ** 2 >= part[column].max() * part[column].min()]
    if len(part) < 2:
        return float("nan")
    return float(np.polyfit(np.log(part[column]), np.log(part[y]), 1)[0])


def markdown(frame: pd.DataFrame) -> str:
    """Return a table of the curves: their ends and their slopes."""
    head = ("what grows", "method", "engine, workers", "to", "ms/client there", "slope of time", "peak MB", "passes")
    lines = []
    for (sweep, method, engine, workers), part in frame.groupby(["sweep", "method", "engine", "workers"], sort=False):
        known = part.dropna(subset=["seconds"]).sort_values(sweep)
        if known.empty:
            continue
        last = known.iloc[-1]
        time_there, exponent = f"{1e3 * last['seconds'] / last['cohort']:.3g}", f"{slope(part, sweep, 'seconds'):.2f}"
        ends = [
            time_there,
            exponent,
            f"{last['peak_bytes'] / 1e6:,.0f}",
            f"{last['passes']:.1f}" if sweep == "parameters" else "",
        ]
        lines.append([sweep, method, f"{engine}, {workers}", f"{int(last[sweep]):,}", *ends])
    rates = frame.drop_duplicates("workers")[["workers", "bandwidth"]].to_numpy().tolist()
    triads = ", ".join(f"{rate / 1e9:.1f} GB/s on {int(n)} thread{'s' if n > 1 else ''}" for n, rate in rates)
    return f"{table(head, lines)}\n`a += b` in the same run: {triads}.\n"


COLOURS = {"dp-fedavg": "#0072B2", "alpha-normec": "#D55E00"}
STYLES = ("-", "--", ":", "-.")


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Draw seconds and memory over cohort, population and parameters."""
    figure = Figure(figsize=(12.5, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 3, sharex="col", sharey="row")
    titles = {
        "cohort": "cohort (10,000 clients, 10,000 parameters)",
        "population": "population (cohort 100, 100,000 parameters)",
        "parameters": "parameters (100 clients, all of them)",
    }
    for column, (sweep, title) in enumerate(titles.items()):
        part = frame[frame["sweep"] == sweep]
        _curves(grid[0][column], part, sweep, "seconds", 1.0)
        _curves(grid[1][column], part, sweep, "peak_bytes", 1e-6)
        grid[1][column].set_xlabel(title)
    _floor(grid[0][2], frame[frame["sweep"] == "parameters"])
    _legend(figure, frame)
    grid[0][0].set_ylabel("seconds per round")
    grid[1][0].set_ylabel("peak memory (MB)")
    grid[1][0].yaxis.set_major_locator(LogLocator(10.0, subs=(1.0, 2.0, 5.0)))
    grid[1][0].yaxis.set_major_formatter("{x:,.0f}")
    figure.suptitle(f"Cost of a round if clients compute nothing: the median of {ROUNDS} rounds, and peak memory")
    figure.savefig(path, dpi=120)


def _curves(axes: Axes, frame: pd.DataFrame, x: str, y: str, unit: float) -> None:
    for (method, engine, workers), part in frame.groupby(["method", "engine", "workers"], sort=False):
        part = part.dropna(subset=[y]).sort_values(x)
        style = _styles(frame)[engine, workers]
        axes.plot(part[x], unit * part[y], color=COLOURS[method], linestyle=style, marker="o", markersize=3)
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _styles(frame: pd.DataFrame) -> dict[tuple[str, int], str]:
    lines = dict.fromkeys(zip(frame["engine"], frame["workers"], strict=True))
    return {line: STYLES[number % len(STYLES)] for number, line in enumerate(lines)}


def _floor(axes: Axes, frame: pd.DataFrame) -> None:
    """Draw the time of one `a += b` for every message."""
    sizes = np.array(sorted(frame["parameters"].unique()), dtype=float)
    seconds = 100 * TRIAD_BYTES * sizes / frame["bandwidth"].iloc[0]
    axes.plot(sizes, seconds, color="#888888", linewidth=1)


def _legend(figure: Figure, frame: pd.DataFrame) -> None:
    """Name the colors of methods and the dashes of engines, once for all panels."""
    keys = [Line2D([], [], color=color, linewidth=3, label=method) for method, color in COLOURS.items()]
    for (engine, workers), style in _styles(frame).items():
        name = f"{engine}, {workers} worker{'s' if workers > 1 else ''}"
        keys.append(Line2D([], [], color="#444444", linestyle=style, marker="o", markersize=3, label=name))
    keys.append(Line2D([], [], color="#888888", linewidth=1, label="one a += b for each message"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)


def main() -> None:
    """Measure and draw, or do one part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few points")
    parser.add_argument("--draw", action="store_true", help="draw from scale.csv")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--triad", type=int, help=argparse.SUPPRESS)
    found = parser.parse_args()
    if found.point:
        print(json.dumps(measure(Point(**json.loads(found.point)))))
    elif found.triad:
        print(json.dumps({"bandwidth": triad(found.triad)}))
    else:
        write(pd.read_csv(found.out / "scale.csv") if found.draw else run(found.quick), found.out)


def write(frame: pd.DataFrame, out: Path) -> None:
    """Write the table, the plot and the page's part."""
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "scale.csv", index=False, float_format="%.5g")
    if out == HERE:
        fill("scale", markdown(frame))
    draw(frame, out / "scale.png")


if __name__ == "__main__":
    main()
