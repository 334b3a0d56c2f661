"""fedpriv on a GPU: batches of clients against one after the other, and how far each is from the card's limits.

    python results/benchmarks/gpu.py [--device cuda] [--small] [--rounds N]

A round of each case on each engine, timed to the end of its work on the card; the same run measures the card's limits
(matrix products, `a += b`). A case's work is counted from one client's gradient: floating-point operations, and the
bytes that its operations read and write one after the other. Needs torch and numpy alone. Writes `gpu.csv` beside
itself on a GPU, and only prints on other devices (`--device cpu --small` tries it out).
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ours import Ours, build, federation_of
from page import fill, table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from workloads import CLASSES, Workload, median

from fedpriv.methods import DPFedAvg
from fedpriv.tasks.models import Cnn, Mlp, ResNet20
from fedpriv.tasks.task import Task

HERE = Path(__file__).parent
PAPER_ROUNDS = 300
TRIAD_BYTES = 12
BF16 = {"precision": "bfloat16"}

# Cases: from many small clients to the paper's ten large ones (ResNet20, CIFAR-10, full gradients).
CASES = (
    Workload(name="cnn62k, 50 images", source=Cnn(width=8), clients=100, cohort=50),
    Workload(name="cnn62k, 5 images", source=Cnn(width=8), examples=5, clients=1000, cohort=500),
    Workload(name="cnn62k, 500 images", source=Cnn(width=8), examples=500, clients=50, cohort=50),
    Workload(name="cnn1m, 50 images", source=Cnn(width=32), clients=100, cohort=50),
    Workload(
        name="mlp, 15 digits", source=Mlp(hidden=(64,)), input_shape=(1, 8, 8), examples=15, clients=1000, cohort=500
    ),
    Workload(name="resnet20, 50 images", source=ResNet20(), clients=100, cohort=50),
    Workload(name="resnet20, 5000 images (paper)", source=ResNet20(), examples=5000, clients=10, cohort=10),
)

# Engines and options. One more is one line.
ENGINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("loop", "loop", {}),
    ("vectorized", "vectorized", {}),
    ("loop, channels last", "loop", {"channels_last": True}),
    ("loop, bfloat16", "loop", {"channels_last": True, **BF16}),
    ("vectorized, bfloat16", "vectorized", BF16),
)

COLUMNS = (
    *("case", "engine", "clients", "examples", "parameters", "seconds", "least", "most", "ms_per_client", "x_loop"),
    *(
        "tflops_per_s",
        "of_matmul",
        "gbytes_per_s",
        "of_bandwidth",
        "peak_mb",
        "step_error",
        "seconds_300_rounds",
        "note",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """Measured limits of a device.

    Args:
        name: Name that the device reports.
        matmul: Operations per second of a large matrix product, by precision.
        bandwidth: Bytes per second of `a += b`.
    """

    name: str
    matmul: dict[str, float]
    bandwidth: float


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            found = tree_leaves((args, kwargs, out))
            self.bytes += sum(x.numel() * x.element_size() for x in found if isinstance(x, Tensor))
        return out


def wait(device: str) -> None:
    """Wait until the device has finished all its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def best(work: Callable[[], object], device: str, times: int = 5) -> float:
    """Return seconds of the fastest of some runs."""
    work()
    found = []
    for _ in range(times):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - start)
    return min(found)


def card_of(device: str, small: bool) -> Card:
    """Measure the device."""
    size = 512 if small else 8192
    floats = 2**22 if small else 2**28
    matmul = {}
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.randn(size, size, device=device, dtype=dtype)
        matmul[precision] = 2.0 * size**3 / best(lambda a=a: a @ a, device)
    x, y = torch.zeros(floats, device=device), torch.ones(floats, device=device)
    bandwidth = TRIAD_BYTES * floats / best(lambda: x.add_(y), device)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    return Card(name=name, matmul=matmul, bandwidth=bandwidth)


def work_of(case: Workload, options: dict[str, Any]) -> tuple[float, float]:
    """Return operations and bytes of a round, from one client's gradient on the CPU, in pieces of examples."""
    few = min(case.examples, 50)
    task = Task(case.module(), **options)
    inputs, labels = torch.randn(few, *case.input_shape), torch.arange(few) % CLASSES
    model = task.initial_model()
    with FlopCounterMode(display=False) as flops:
        task.gradient(model, inputs, labels)
    with Traffic() as traffic:
        task.gradient(model, inputs, labels)
    times = case.cohort * case.examples / few
    return flops.get_total_flops() * times, traffic.bytes * times


def make(case: Workload, engine: str, options: dict[str, Any], device: str) -> Ours:
    """Return a case on an engine."""
    method = DPFedAvg(clip_norm=0.1)
    return build(
        module=case.module(),
        device=device,
        federation=federation_of(case, 0),
        method=method,
        cohort=case.cohort,
        noise_multiplier=case.noise_multiplier,
        engine=engine,
        workers=torch.get_num_threads(),
        options=options,
    )


def timed(ours: Ours, device: str, rounds: int) -> list[float]:
    """Return seconds of each round, after two that warm up."""
    found = []
    for number in range(rounds + 2):
        wait(device)
        start = time.perf_counter()
        ours.round()
        wait(device)
        if number >= 2:
            found.append(time.perf_counter() - start)
    return found


def step_of(case: Workload, engine: str, options: dict[str, Any], device: str) -> Tensor:
    """Return the change of the model by one round of everyone without noise."""
    ours = make(case.checked(), engine, options, device)
    before = ours.state.model.clone()
    ours.round()
    return (ours.state.model - before).double().cpu()


def measure(case: Workload, device: str, rounds: int, card: Card) -> list[dict[str, Any]]:
    """Return a row for each engine."""
    rows, reference, loop = [], step_of(case, "loop", {}, device), float("nan")
    for name, engine, options in ENGINES:
        row: dict[str, Any] = {"case": case.name, "engine": name, "clients": case.cohort, "examples": case.examples}
        try:
            row |= _figures(case, engine, options, device, rounds, card)
            row["step_error"] = _relative(step_of(case, engine, options, device), reference)
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
        loop = row.get("seconds", loop) if name == "loop" else loop
        row["x_loop"] = row.get("seconds", float("nan")) / loop
        rows.append(row)
        print({key: _short(value) for key, value in row.items()}, flush=True)
    return rows


def _figures(
    case: Workload, engine: str, options: dict[str, Any], device: str, rounds: int, card: Card
) -> dict[str, Any]:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(make(case, engine, options, device), device, rounds)
    middle = median(seconds)
    flops, moved = work_of(case, options)
    peak = torch.cuda.max_memory_allocated() / 1e6 if device.startswith("cuda") else float("nan")
    return {
        "parameters": case.parameters,
        "seconds": middle,
        "least": min(seconds),
        "most": max(seconds),
        "ms_per_client": 1e3 * middle / case.cohort,
        "tflops_per_s": flops / middle / 1e12,
        "of_matmul": flops / middle / card.matmul[options.get("precision", "float32")],
        "gbytes_per_s": moved / middle / 1e9,
        "of_bandwidth": moved / middle / card.bandwidth,
        "peak_mb": peak,
        "seconds_300_rounds": PAPER_ROUNDS * middle,
    }


def _relative(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def _short(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def shrunk(case: Workload) -> Workload:
    """Return a case that takes a CPU a moment."""
    return replace(case, examples=min(case.examples, 5), clients=4, cohort=2)


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny cases, to try the script")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="only cases with this in their name")
    parser.add_argument("--page", action="store_true", help="measure nothing; put gpu.csv into the README")
    parser.add_argument("--out", type=Path, default=HERE / "gpu.csv")
    found = parser.parse_args()
    if found.page:
        fill("gpu", markdown(found.out))
        return
    if found.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no GPU here: --device cpu --small tries the script out")
    card = card_of(found.device, found.small)
    print(card, flush=True)
    cases = [shrunk(case) if found.small else case for case in CASES if found.only in case.name]
    rows = [row for case in cases for row in measure(case, found.device, found.rounds, card)]
    if found.device.startswith("cuda"):
        write(found.out, rows, card)


def write(path: Path, rows: list[dict[str, Any]], card: Card) -> None:
    """Write the table; the card's limits are its first row."""
    limits = ", ".join(f"{name} {rate / 1e12:.1f} TFLOP/s" for name, rate in card.matmul.items())
    first = {"case": "the card", "engine": card.name, "gbytes_per_s": card.bandwidth / 1e9, "note": limits}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _short(value) for key, value in row.items()} for row in [first, *rows])


def markdown(path: Path) -> str:
    """Return the table for the page."""
    with path.open(newline="", encoding="utf-8") as file:
        card, *rows = csv.DictReader(file)
    keys = ("case", "engine", "seconds", "x_loop", "of_matmul", "of_bandwidth", "peak_mb", "seconds_300_rounds")
    head = ("case", "engine", "s/round", "x loop", "of matmul", "of bandwidth", "peak MB", "s/300 rounds")
    limits = f"{card['engine']}: {card['note']}, `a += b` {card['gbytes_per_s']} GB/s."
    return f"{limits}\n\n{table(head, [[row[key] or row['note'] for key in keys] for row in rows])}"


if __name__ == "__main__":
    main()
