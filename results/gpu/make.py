"""Checks and times of fedpriv on a GPU, in at most 8 minutes; writes `gpu.json` beside itself.

    python results/gpu/make.py [--device cuda] [--small] [--minutes 8]

In order: one client after the other against batches of clients (CNN of 62k parameters, 50 images); Ray's workers on
quarters of a GPU, and one on the GPU beside one on a core; noise at every client, in a loop and in batches; sums of
bounded gradients of examples, against the CPU's; and rounds of ResNet20 in the paper's setting (ten clients of 5,000
images, 300 rounds). A part that fails, or for which no time is left, is written as such. `--device cpu --small` tries
the script without a GPU.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from gpu import CASES, card_of, make, shrunk, step_of, timed, wait
from ours import LocalEngine, Ours, build, federation_of
from workloads import Workload, median

from fedpriv.bounding import Clip
from fedpriv.methods import DPFedAvg
from fedpriv.tasks.task import Task

HERE = Path(__file__).parent
CLIP_NORM, PAPER_ROUNDS = 0.1, 300
QUARTERS, MIXED = (0.25, 0.25, 0.25, 0.25), (1.0, 0.0)

Found = dict[str, object]


def case_of(name: str, small: bool) -> Workload:
    """Return a case of `results/benchmarks/gpu.py`, tiny for a trial."""
    (case,) = (case for case in CASES if case.name == name)
    return shrunk(case) if small else case


def loop_and_batches(device: str, small: bool) -> Found:
    """Time both engines, and compare their steps."""
    case = case_of("cnn62k, 50 images", small)
    times = {engine: median(timed(make(case, engine, {}, device), device, 5)) for engine in ("loop", "vectorized")}
    error = relative(step_of(case, "vectorized", {}, device), step_of(case, "loop", {}, device))
    return {"seconds": times, "times faster": times["loop"] / times["vectorized"], "step error": error}


def on_ray(case: Workload, device: str, shares: tuple[float, ...], noise: bool) -> Ours:
    """Return a case on Ray's workers with these shares of a GPU; 0 is a core."""
    from fedpriv.engines.ray.engine import RayEngine

    made = make(case if noise else case.checked(), "loop", {}, "cpu")
    local = LocalEngine("vectorized", {})
    given = shares if device.startswith("cuda") else tuple(0.0 for _ in shares)
    made.engine = RayEngine(made.engine._population, local, workers=len(shares), gpus_per_worker=given)
    return made


def workers(device: str, small: bool) -> Found:
    """Time Ray's workers on parts of a GPU, and compare the step of a round with the loop's."""
    case, found = case_of("cnn62k, 50 images", small), dict[str, object]()
    expected = step_of(case, "loop", {}, "cpu")
    for name, shares in (("quarters", QUARTERS), ("mixed", MIXED)):
        ray = on_ray(case, device, shares, noise=False)
        try:
            before = ray.state.model.clone()
            ray.round()
            error = relative((ray.state.model - before).double().cpu(), expected)
            found[name] = {"seconds": median(timed(ray, device, 5)), "step error": error}
        finally:
            ray.close()
    return found


def noise(device: str, small: bool) -> Found:
    """Compare rounds with noise at every client: the same address gives the same noise on every device and engine."""
    case, steps, times = case_of("cnn62k, 50 images", small), {}, {}
    for name, engine, where in (("cpu", "loop", "cpu"), ("loop", "loop", device), ("batches", "vectorized", device)):
        made = build(
            module=case.module(),
            device=where,
            federation=federation_of(case, 0),
            method=DPFedAvg(clip_norm=CLIP_NORM),
            cohort=case.cohort,
            noise_multiplier=1.0,
            trust="local",
            engine=engine,
            options={},
        )
        before = made.state.model.clone()
        made.round()
        steps[name] = (made.state.model - before).double().cpu()
        times[name] = median(timed(made, where, 3))
    return {"seconds": times, "step error": {name: relative(step, steps["cpu"]) for name, step in steps.items()}}


def example_sums(device: str, small: bool) -> Found:
    """Compare and time sums of bounded gradients of examples."""
    case, found = replace(case_of("cnn62k, 50 images", small), examples=16 if small else 256), dict[str, object]()
    inputs, labels = (part.flatten(0, 1)[: case.examples] for part in case.data(0))
    sums, bound = {}, Clip(clip_norm=0.5)
    for where in ("cpu", device):
        task = Task(case.module(), where)
        model, x, y = task.initial_model().to(where), inputs.to(where), labels.to(where)
        for _ in range(3):
            wait(where)
            start = time.perf_counter()
            sums[where] = task.clipped_sum(model, x, y, bound).cpu()
            wait(where)
            found[f"seconds on {where}"] = time.perf_counter() - start
    return found | {"error": relative(sums[device], sums["cpu"])}


def paper(device: str, small: bool) -> Found:
    """Time rounds of the paper's setting."""
    seconds = median(timed(make(case_of("resnet20, 5000 images (paper)", small), "loop", {}, device), device, 3))
    return {"seconds a round": seconds, "minutes for 300 rounds": PAPER_ROUNDS * seconds / 60.0}


PARTS: dict[str, Callable[[str, bool], Found]] = {
    "loop and batches": loop_and_batches,
    "ResNet20, the paper's setting": paper,
    "sums over examples": example_sums,
    "noise at every client": noise,
    "Ray's workers": workers,
}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the error of a vector, relative to its length."""
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny cases, to try the script")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no part after that")
    found = parser.parse_args()
    if found.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no GPU here: --device cpu --small tries the script out")
    until = time.monotonic() + 60.0 * found.minutes
    card = card_of(found.device, found.small)
    results: dict[str, object] = {"card": card.name, "torch": torch.__version__, "limits": vars(card)}
    for name, part in PARTS.items():
        start = time.monotonic()
        if start > until:
            results[name] = "not run: the time was up"
            continue
        try:
            results[name] = part(found.device, found.small) | {"wall seconds": time.monotonic() - start}
        except Exception:
            results[name] = traceback.format_exc(limit=-3)
        print(name, json.dumps(results[name]), flush=True)
        if found.device.startswith("cuda"):
            torch.cuda.empty_cache()
            (HERE / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
