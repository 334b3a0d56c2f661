"""Cost of noise at every client, of the sampler, and of the start of a command, in processor time of one thread.

    python results/benchmarks/noise.py          # fills noise.csv and the table of README.md

Everything alternates in pairs within one process; commands are processes of their own. The machine may have
other work: medians and ranges are over the pairs.
"""

import csv
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from ours import make_ours
from workloads import WORKLOADS, Job, one_thread

from fedpriv import philox
from fedpriv.mechanisms import gaussian
from fedpriv.streams import Purpose, SeededStreams, Streams, SystemStreams

FOLDER, PAIRS, STDDEV = Path(__file__).parent, 5, 0.001
SIZES = (650, 4_810, 61_794, 973_674)
ROUNDS = {"mlp-local": 10, "cnn62k-local": 1}
Row = tuple[str, str, float, float, float]


def seconds(work: Callable[[], object], times: int) -> float:
    """Return the processor time of one call."""
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times


def use_c(native: str) -> None:
    """Use compiled code from now on ("1"), or numpy alone ("0")."""
    os.environ["FEDPRIV_NATIVE"] = native
    gaussian._rounding.cache_clear()
    philox.philox_in_c.cache_clear()


def of_numbers() -> Iterator[Row]:
    """Return nanoseconds a number of a client's message, with C and in numpy."""
    kinds: dict[str, Streams] = {"seeded": SeededStreams(0), "system": SystemStreams()}
    for size in SIZES:
        message, times = np.zeros((1, size), dtype=np.float32), max(1_000_000 // size, 1)
        for kind, streams in kinds.items():
            found: dict[str, list[float]] = {"1": [], "0": []}
            for _ in range(PAIRS):
                for native, values in found.items():
                    use_c(native)

                    def draw(streams: Streams = streams, message: np.ndarray = message) -> object:
                        sources = [streams.source(Purpose.CLIENT_NOISE, 1, 1)]
                        return gaussian.noised_rows(message, STDDEV, sources, level=100_000)

                    draw()
                    values.append(1e9 * seconds(draw, times) / size)
            use_c("1")
            for native, name in (("1", "C"), ("0", "numpy")):
                yield row(f"ns a number, {kind}, {name}", f"{size:,}", found[native])


def of_rounds() -> Iterator[Row]:
    """Return the time of a round with noise at each client over that of a round without noise."""
    for name, times in ROUNDS.items():
        job = Job(workload=WORKLOADS[name], workers=1, rounds=None, seed=0, check=False)
        noisy, silent = (make_ours(job, "vectorized", {"noise": noise}) for noise in ("faithful", "none"))
        for one in (noisy, silent):
            one.round()
        ratios = [seconds(noisy.round, times) / seconds(silent.round, times) for _ in range(PAIRS)]
        yield row("round, times one without noise", name.removesuffix("-local"), ratios)


def of_commands() -> Iterator[Row]:
    """Return the seconds of a command's start."""
    for name, code in (
        ("import fedpriv", "import fedpriv"),
        ("fedpriv --help", "from fedpriv.cli import main; main()"),
    ):
        found: list[float] = []
        for _ in range(PAIRS):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code, "--help"], check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        yield row("start, s", name, found)


def row(what: str, of: str, values: list[float]) -> Row:
    """Return a row of the table: median, minimum and maximum."""
    return what, of, statistics.median(values), min(values), max(values)


def main() -> None:
    """Measure, and write the results."""
    one_thread()
    rows = [*of_numbers(), *of_rounds(), *of_commands()]
    with (FOLDER / "noise.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "of", "median", "min", "max"])
        writer.writerows([what, of, *(f"{value:.3g}" for value in values)] for what, of, *values in rows)
    table = "| what | of | median | range |\n| --- | --- | --- | --- |\n" + "".join(
        f"| {what} | {of} | {median:.3g} | {low:.3g} to {high:.3g} |\n" for what, of, median, low, high in rows
    )
    page = FOLDER / "README.md"
    text = page.read_text(encoding="utf-8")
    before, after = text.split("<!-- noise -->")[0], text.split("<!-- /noise -->")[1]
    page.write_text(f"{before}<!-- noise -->\n\n{table}\n<!-- /noise -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
