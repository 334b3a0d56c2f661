"""Measures fedpriv, a bare PyTorch loop and other frameworks on the same work; fills `speed.csv` and `speed.md`.

    python results/benchmarks/make.py [--quick] [--only NAME] [--without-rivals] [--minutes N] [--check]

Each number is a ratio: a contender's seconds per round over those of the bare loop on one process, which runs before
and after it, all in fresh processes of one thread each. `--check` only verifies that all contenders take the same step.
The rivals are installed by `results/benchmarks/rivals/setup.py`; one that is missing is a row that says so.
"""

import argparse
import csv
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from page import fill, table
from workloads import WORKLOADS, Workload, median

sys.path.insert(0, str(Path(__file__).parent / "rivals"))

from setup import RIVALS, interpreter, is_installed

HERE = Path(__file__).parent
CENTRAL = ("cnn62k", "cnn1m", "mlp", "softmax", "noop62k", "noop1m")
WALKS = ("cnn62k-epochs", "mlp-epochs", "mlp-steps")
EXPERT = ("cnn62k", "cnn1m", "mlp", "softmax", "softmax60k", *WALKS)
OWN = ("softmax60k", *WALKS)
LOCAL = ("cnn62k-local", "cnn1m-local", "mlp-local", "noop1m-local")
CNN = ("cnn62k", "cnn1m")
QUICK = ("cnn62k", "mlp", "noop62k")
PAIRS = 3
TIMEOUT = 900.0
TOLERANCE = 5e-3
"""Largest relative error of a step: rounding can turn pooling windows of a network the other way, which was seen to
move a step by 4e-3; a float32 norm of a million equal numbers is off by 4e-4."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A contender: a program that does the work.

    Args:
        name: In the tables.
        command: Program and first arguments.
        workers: Numbers of workers that it can have.
        workloads: Workloads that it can run.
        reason: Why it is absent, if it is.
        same_step: True if it has to take the same step as the bare loop.
    """

    name: str
    command: tuple[str, ...]
    workers: tuple[int, ...] = (1, 2)
    workloads: tuple[str, ...] = CENTRAL
    reason: str = ""
    same_step: bool = True


def ours(
    name: str, engine: str, workloads: tuple[str, ...], workers: tuple[int, ...] = (1,), **options: Any
) -> Contender:
    """Return one of the engines of fedpriv, with options."""
    command = (sys.executable, str(HERE / "ours.py"), "--engine", engine, "--options", json.dumps(options))
    same_step = options.get("precision", "float32") == "float32"
    slow = not same_step and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    reason = "this processor does not multiply bfloat16" if slow else ""
    return Contender(
        name=name, command=command, workers=workers, workloads=workloads, reason=reason, same_step=same_step
    )


def rival(name: str, workers: Sequence[int], workloads: tuple[str, ...] = CENTRAL) -> Contender:
    """Return a rival in its own environment."""
    reason = "" if is_installed(name) else "not installed: run rivals/setup.py"
    command = (str(interpreter(name)), str(HERE / "rivals" / f"run_{name}.py"))
    return Contender(name=name, command=command, workers=tuple(workers), workloads=workloads, reason=reason)


IDEAL = Contender(name="ideal", command=(sys.executable, str(HERE / "ideal.py")), workloads=CENTRAL + LOCAL + EXPERT)

# An engine or an option of fedpriv is one line.
OURS = (
    Contender(name="expert", command=(sys.executable, str(HERE / "expert.py")), workers=(1,), workloads=EXPERT),
    ours("fedpriv loop", "loop", CENTRAL),
    ours("fedpriv vectorized", "vectorized", (*CENTRAL, "softmax60k", *WALKS)),
    ours("fedpriv auto", "auto", CENTRAL),
    ours("fedpriv auto, channels last", "auto", CNN, channels_last=True),
    ours("fedpriv auto, bfloat16", "auto", CNN, channels_last=True, precision="bfloat16"),
    ours("fedpriv ray", "ray", (*CNN, "noop62k"), (1, 2), local="vectorized"),
    ours("fedpriv ray, channels last", "ray", CNN, (2,), local="vectorized", channels_last=True),
    *(
        ours(f"fedpriv {engine}, {noise} noise".replace("none noise", "no noise"), engine, LOCAL, noise=noise)
        for engine in ("loop", "vectorized")
        for noise in ("faithful", "fused", "none")
    ),
)
FLOWER = Contender(name="flower", command=(sys.executable, str(HERE / "rivals" / "run_flower.py")))
OTHERS = (
    rival("jax", (1,), EXPERT),
    *(rival("pfl", (1, 2)), rival("blazefl", (1, 2)), rival("fluke", (1,)), rival("flsim", (1,)), FLOWER),
)
assert set(RIVALS) <= {contender.name for contender in OTHERS}


class Absent(Exception):  # noqa: N818
    """No answer of a contender, with the reason."""


def answer_of(contender: Contender, workload: str, workers: int, *more: str) -> dict[str, Any]:
    """Return the answer of a contender, in a fresh process.

    Raises:
        Absent: If there is no answer.
    """
    if contender.reason:
        raise Absent(contender.reason)
    command = [*contender.command, "--workload", workload, "--workers", str(workers), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, complained = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        raise Absent(f"no answer within {TIMEOUT:.0f} s") from None
    answers = [line for line in printed.splitlines() if line.startswith("{")]
    if not answers:
        raise Absent(reason_in(complained))
    return json.loads(answers[-1])


def reason_in(complained: str) -> str:
    """Return the line that says why a process failed."""
    lines = [line.strip() for line in complained.splitlines() if line.strip(" =-~")]
    errors = [line for line in lines if re.match(r"(absent: |[\w.]*(Error|Exception)\b)", line)]
    return (errors or lines or ["it ended without an answer"])[-1].removeprefix("absent: ")[:200]


@dataclass
class Row:
    """A line of the table."""

    workload: str
    workers: int
    contender: str
    ratios: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    absent: str = ""
    command: str = ""
    kept: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_earlier_run(cls, cells: dict[str, Any]) -> "Row":
        """Return a line of `speed.csv`, as it was."""
        ratios = [float(cells["x_ideal"])] if cells["x_ideal"] else []
        named = {"workload": cells["workload"], "workers": int(cells["workers"]), "contender": cells["contender"]}
        return cls(**named, ratios=ratios, absent=cells["absent"], command=cells.get("command") or "", kept=cells)

    @property
    def cells(self) -> dict[str, Any]:
        """As in `speed.csv`."""
        if self.kept:
            return self.kept
        cells: dict[str, Any] = {"workload": self.workload, "workers": self.workers, "contender": self.contender}
        if self.ratios:
            per_client = 1e3 * median(self.seconds) / WORKLOADS[self.workload].cohort
            cells |= {"x_ideal": f"{median(self.ratios):.3f}", "least": f"{min(self.ratios):.3f}"}
            cells |= {
                "most": f"{max(self.ratios):.3f}",
                "pairs": len(self.ratios),
                "ms_per_client": f"{per_client:.4g}",
            }
        return cells | {"absent": self.absent, "command": self.command}


COLUMNS = (
    "workload",
    "workers",
    "contender",
    "x_ideal",
    "least",
    "most",
    "pairs",
    "ms_per_client",
    "absent",
    "command",
)


@dataclass
class Chain:
    """ideal, contender, ideal, contender, ..., ideal: every contender stands between two ideals.

    Args:
        workload: The work.
        rows: Contenders to measure, each with its row.
        pairs: How often.
        until: When to stop starting processes, in seconds of the monotonic clock.
        options: Further arguments of every contender.
    """

    workload: Workload
    rows: list[tuple[Contender, Row]]
    pairs: int
    until: float
    options: tuple[str, ...] = ()
    ideals: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """Fill the rows."""
        for _ in range(self.pairs):
            before = self._ideal()
            for contender, row in self.rows:
                if row.absent or time.monotonic() > self.until:
                    continue
                before = self._pair(contender, row, before)
                print(f"  {row.contender}, {row.workers}: {row.cells.get('x_ideal', row.absent)}", flush=True)
        for _, row in self.rows:
            if not row.ratios and not row.absent:
                row.absent = "not measured: the time was up"

    def _pair(self, contender: Contender, row: Row, before: float) -> float:
        try:
            taken = self._seconds(contender, row.workers)
        except Absent as absence:
            row.absent = str(absence)
            return before
        after = self._ideal()
        row.seconds.append(taken)
        row.ratios.append(taken / (0.5 * (before + after)))
        return after

    def drift(self) -> Row:
        """Compare the bare loop with the two beside it: the part of a ratio that is variation of the machine."""
        triples = zip(self.ideals, self.ideals[1:], self.ideals[2:], strict=False)
        ratios = [here / (0.5 * (before + after)) for before, here, after in triples] or [1.0]
        return Row(self.workload.name, 1, IDEAL.name, ratios=ratios, seconds=self.ideals or [0.0])

    def _ideal(self) -> float:
        self.ideals.append(self._seconds(IDEAL, 1))
        return self.ideals[-1]

    def _seconds(self, contender: Contender, workers: int) -> float:
        return median(answer_of(contender, self.workload.name, workers, *self.options)["seconds"])


def rows_of(workload: str, contenders: Sequence[Contender]) -> list[tuple[Contender, Row]]:
    """Return the contenders of a workload; a number of workers that a contender cannot have is an absence."""
    found = []
    for workers in (1, 2):
        for contender in contenders:
            if workload not in contender.workloads or (contender is IDEAL and workers == 1):
                continue
            row = Row(workload, workers, contender.name, absent=contender.reason)
            if workers not in contender.workers:
                row.absent = "one process only" if contender.workers == (1,) else f"not measured with {workers}"
            found.append((contender, row))
    return found


def check(workloads: Sequence[str], contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Return how far one round without noise moves each contender's model from that of the bare loop."""
    table = []
    for name in workloads:
        expected = answer_of(IDEAL, name, 1, "--check")["probe"]
        for contender, row in rows_of(name, contenders):
            error = "" if row.absent else _error_of(contender, row, expected)
            table.append({"workload": name, "workers": row.workers, "contender": row.contender, "error": error})
            table[-1]["absent"] = row.absent
            print(table[-1], flush=True)
    return table


def _error_of(contender: Contender, row: Row, expected: Sequence[float]) -> str:
    """Return the largest deviation of a step, relative to its length."""
    try:
        found = answer_of(contender, row.workload, row.workers, "--check")["probe"]
    except Absent as absence:
        row.absent = str(absence)
        return ""
    error = max(abs(a - b) for a, b in zip(found, expected, strict=True)) / expected[0]
    if error > TOLERANCE and contender.same_step:
        row.absent = f"it does other work: its step is off by {error:.1e}"
    return f"{error:.1e}"


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write a table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def made_by(rows: Sequence[Row]) -> str:
    """Return the commands that made the rows, and the machine."""
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(row.command for row in rows) if command)
    return f"Made by {commands} on {machine()}."


def markdown(rows: Sequence[Row]) -> str:
    """Return the tables as a page: a table for each workload."""
    lines = [made_by(rows), ""]
    lines += ["Seconds per round over those of the bare loop on one process: median (least to most) of the pairs.", ""]
    for name in dict.fromkeys(row.workload for row in rows):
        lines += [f"**{describe(WORKLOADS[name])}**", "", "| contender | 1 worker | 2 workers | ms/client |"]
        lines += ["|---|---|---|---|", *_lines_of([row for row in rows if row.workload == name]), ""]
    return "\n".join(lines)


def _lines_of(rows: Sequence[Row]) -> Iterator[str]:
    for name in dict.fromkeys(row.contender for row in rows):
        by_workers = {row.workers: row for row in rows if row.contender == name}
        times = " / ".join(str(row.cells.get("ms_per_client", "-")) for row in by_workers.values())
        yield f"| {name} | {_cell(by_workers.get(1))} | {_cell(by_workers.get(2))} | {times} |"


def _cell(row: Row | None) -> str:
    if row is None or not row.ratios:
        return f"absent: {row.absent}" if row else ""
    cells = row.cells
    return f"{cells['x_ideal']} ({cells['least']} to {cells['most']})"


def summary(rows: Sequence[Row]) -> str:
    """Return the medians side by side, for the page: a table for each number of workers, then why cells are empty."""
    parts = [f"{made_by(rows)} Ranges and milliseconds: `speed.md`, `speed.csv`.\n"]
    for workers, group in ((1, CENTRAL), (2, CENTRAL), (1, OWN), (1, LOCAL), (2, LOCAL)):
        found = [row for row in rows if row.workers == workers and row.workload in group]
        names = [name for name in group if any(row.workload == name and row.ratios for row in found)]
        if names:
            where = ", noise at every client" if group is LOCAL else ""
            parts.append(f"{'One worker' if workers == 1 else 'Two workers'}{where}; times ideal on one process:\n")
            parts.append(table(("contender", *names), list(_summary_rows(found, names))))
    absent = {f"{row.contender} ({row.workers})": row.absent for row in rows if row.absent and not row.ratios}
    parts.append("Absent: " + "; ".join(f"{who}: {why}" for who, why in absent.items()) + "." if absent else "")
    return "\n".join(parts)


def _summary_rows(rows: Sequence[Row], names: Sequence[str]) -> Iterator[list[str]]:
    for contender in dict.fromkeys(row.contender for row in rows):
        mine = {row.workload: row for row in rows if row.contender == contender}
        cells = [f"{median(mine[name].ratios):.2f}" if name in mine and mine[name].ratios else "" for name in names]
        if any(cells):
            yield [contender, *cells]


def describe(work: Workload) -> str:
    """Return a workload in words."""
    what = f"{work.examples} examples {list(work.input_shape)}" if work.computes else "no computation"
    noise = ", noise at every client" if work.local else ""
    return (
        f"{work.name}: {work.parameters:,} parameters, {what} a client, {work.cohort} of {work.clients} clients{noise}"
    )


def machine() -> str:
    """Return the machine and the versions that matter for speed."""
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpus} CPUs ({platform.machine()}), torch {torch.__version__}, Python {platform.python_version()}"


def chosen(found: argparse.Namespace) -> tuple[list[str], list[Contender]]:
    """Return workloads and contenders that the command line asks for."""
    names = list(QUICK) if found.quick else list(CENTRAL + OWN + LOCAL)
    contenders = [IDEAL, *OURS, *(() if found.without_rivals else OTHERS)]
    if found.only:
        exact = [name for name in WORKLOADS if name in found.only]
        names = exact or names
        wanted = [only for only in found.only if only not in WORKLOADS]
        if wanted:
            contenders = [c for c in contenders if any(w in c.name for w in wanted)]
    return names, contenders


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"one pair of {', '.join(QUICK)}")
    parser.add_argument("--only", action="append", metavar="NAME", help="a workload, or a part of a contender's name")
    parser.add_argument("--without-rivals", action="store_true", help="the bare loop and fedpriv")
    parser.add_argument("--pairs", type=int, help=f"default {PAIRS}")
    parser.add_argument("--minutes", type=float, default=120.0, help="start no process after that; default 120")
    parser.add_argument("--add", action="store_true", help="keep the numbers of other workloads from an earlier run")
    parser.add_argument("--check", action="store_true", help="verify that all take the same step; no timing")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the tables")
    return parser.parse_args()


def main() -> None:
    """Run the work that the command line asks for."""
    found = parse()
    names, contenders = chosen(found)
    found.out.mkdir(parents=True, exist_ok=True)
    if found.check:
        table = check(names, contenders)
        write_csv(found.out / "check.csv", ("workload", "workers", "contender", "error", "absent"), table)
        return
    until, rows = time.monotonic() + 60.0 * found.minutes, []
    command = " ".join(["python results/benchmarks/make.py", *sys.argv[1:]])
    earlier = read_rows(found.out / "speed.csv") if found.add else []
    for name in names:
        print(describe(WORKLOADS[name]), flush=True)
        chain = Chain(WORKLOADS[name], rows_of(name, contenders), found.pairs or (1 if found.quick else PAIRS), until)
        chain.measure()
        rows += [chain.drift(), *(row for _, row in chain.rows)]
        for row in rows:
            row.command = command
        write(found.out, [*(row for row in earlier if row.workload not in {new.workload for new in rows}), *rows])


def read_rows(path: Path) -> list[Row]:
    """Return the rows of an earlier run; none if there was none."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [Row.of_earlier_run(cells) for cells in csv.DictReader(file)]


def write(out: Path, rows: list[Row]) -> None:
    """Write the tables and, beside this script, the page; workloads in their order."""
    order = [*CENTRAL, *OWN, *LOCAL]
    rows = sorted(rows, key=lambda row: order.index(row.workload))
    write_csv(out / "speed.csv", COLUMNS, [row.cells for row in rows])
    (out / "speed.md").write_text(markdown(rows), encoding="utf-8")
    if out == HERE:
        fill("speed", summary(rows))


if __name__ == "__main__":
    main()
