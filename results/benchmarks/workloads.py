"""The work of every contender, and the form of a contender's command line and answer.

Imported by every adapter, also in the environments of the rivals: it needs torch and nothing of fedpriv but its models.
A contender is a script that takes `--workload cnn62k --workers 1 --rounds 5 --seed 0` and prints one line of JSON:
`{"seconds": [...]}`, or with `--check` `{"probe": [...]}`, a summary of the model's change by one round without noise.
"""

import argparse
import ctypes
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

from fedpriv.tasks.models import Cnn, Mlp, ModelSource, Softmax
from fedpriv.tasks.pooling import MaxPoolReLU

CLASSES = 10
CLIP_NORM = 0.1
SERVER_LR = 1.0
NOISE_MULTIPLIER = 0.01
CONSTANT = 0.01
"""Every coordinate of the update of a client that computes nothing; long enough to be clipped."""

MIN_SECONDS = 1.0
MAX_ROUNDS = 400


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One round's work: a full-batch gradient of each client of the cohort, clip, sum, noise, step.

    Args:
        name: As in `--workload`.
        source: The model.
        input_shape: Shape of one input.
        examples: Of each client.
        rounds: Measured at least, after `warmup`; short rounds are repeated until they fill a second.
        computes: True if a client computes its gradient; otherwise its update is constant and only the framework works.
        passes: Passes over a client's data in local steps; 0 for one gradient.
        batch: Examples of each local step; None for all.
        client_lr: Length of a local step.
        shuffled: True to draw an order for every pass.
        local: True if each client adds the noise to its message, instead of the server to the sum.
        clients: Size of the population.
        cohort: Clients in a round.
        noise_multiplier: Standard deviation of the noise over the clip norm, on the sum or on each message.
    """

    name: str
    source: ModelSource
    input_shape: tuple[int, ...] = (3, 32, 32)
    examples: int = 50
    rounds: int = 5
    warmup: int = 2
    computes: bool = True
    passes: int = 0
    batch: int | None = None
    client_lr: float = 0.05
    shuffled: bool = True
    local: bool = False
    clients: int = 100
    cohort: int = 50
    noise_multiplier: float = NOISE_MULTIPLIER

    def checked(self) -> "Workload":
        """Return the same work for everyone and without noise: after one round, all must hold the same model."""
        return replace(self, clients=self.cohort, noise_multiplier=0.0, warmup=0, rounds=1, shuffled=False)

    @property
    def steps(self) -> int:
        """Number of local steps of a client; 0 for one gradient."""
        return self.passes * -(-self.examples // (self.batch or self.examples))

    def batches(self) -> list[Tensor]:
        """Draw the examples of each of a client's steps, in torch's global generator."""
        orders = (
            torch.randperm(self.examples) if self.shuffled else torch.arange(self.examples) for _ in range(self.passes)
        )
        return [batch for order in orders for batch in order.split(self.batch or self.examples)]

    def module(self, *, ours: bool = False) -> nn.Module:
        """Return the model at its start; with torch's own layers, unless it is `ours`."""
        made = self.source.build(self.input_shape, CLASSES, 0)
        if ours or not isinstance(made, nn.Sequential):
            return made
        usual = ([nn.MaxPool2d(2), nn.ReLU()] if isinstance(layer, MaxPoolReLU) else [layer] for layer in made)
        return nn.Sequential(*itertools.chain.from_iterable(usual))

    def data(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return synthetic inputs `[clients, examples, *input_shape]` and labels `[clients, examples]`."""
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(self.clients, self.examples, *self.input_shape, generator=generator)
        return inputs, torch.randint(CLASSES, (self.clients, self.examples), generator=generator)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.module().parameters())

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise in each coordinate."""
        return self.noise_multiplier * CLIP_NORM


_CNN62K, _CNN1M, _MLP, _SOFTMAX = Cnn(width=8), Cnn(width=32), Mlp(hidden=(64,)), Softmax()
_DIGITS = {"input_shape": (1, 8, 8), "examples": 15, "rounds": 20}
_NOOP = {"examples": 1, "computes": False, "rounds": 10}

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(name="cnn62k", source=_CNN62K),
        Workload(name="cnn1m", source=_CNN1M, rounds=3),
        Workload(name="mlp", source=_MLP, **_DIGITS),
        Workload(name="softmax", source=_SOFTMAX, **_DIGITS),
        Workload(name="cnn62k-epochs", source=_CNN62K, passes=2, batch=10, cohort=10, rounds=3),
        Workload(name="mlp-epochs", source=_MLP, passes=4, batch=5, **_DIGITS),
        Workload(name="mlp-steps", source=_MLP, passes=10, **_DIGITS),
        Workload(
            name="softmax60k", source=_SOFTMAX, input_shape=(1, 28, 28), examples=111, clients=539, cohort=539, rounds=5
        ),
        Workload(name="noop62k", source=_CNN62K, **_NOOP),
        Workload(name="noop1m", source=_CNN1M, **_NOOP),
        Workload(name="cnn62k-local", source=_CNN62K, local=True),
        Workload(name="cnn1m-local", source=_CNN1M, local=True, rounds=3),
        Workload(name="mlp-local", source=_MLP, local=True, **_DIGITS),
        Workload(name="noop1m-local", source=_CNN1M, local=True, **_NOOP),
    )
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A contender's task, from the command line."""

    workload: Workload
    workers: int
    rounds: int | None
    seed: int
    check: bool


def parse_job(add: Callable[[argparse.ArgumentParser], None] | None = None) -> tuple[Job, argparse.Namespace]:
    """Return the job of the command line, and all its arguments; `add` declares a contender's own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=list(WORKLOADS), required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="measured rounds; default: the workload's, for a second at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="one round of everyone without noise, not timed")
    if add:
        add(parser)
    found = parser.parse_args()
    workload = WORKLOADS[found.workload]
    workload = workload.checked() if found.check else workload
    rounds = 1 if found.check else found.rounds
    return Job(workload=workload, workers=found.workers, rounds=rounds, seed=found.seed, check=found.check), found


class Clock:
    """Counts the rounds of any loop: call `tick` once before the first round and once after each.

    Args:
        job: Says how many rounds are measured; the warm-up rounds before them are left out.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._times: list[float] = []

    @property
    def planned(self) -> int:
        """Number of rounds, for loops that must know it in advance."""
        return self._job.workload.warmup + (self._job.rounds or self._job.workload.rounds)

    @property
    def seconds(self) -> list[float]:
        """Seconds of each measured round."""
        times = self._times[self._job.workload.warmup :]
        return [after - before for before, after in itertools.pairwise(times)]

    def tick(self) -> None:
        """Mark the end of a round, or the start of the first."""
        self._times.append(time.perf_counter())

    def done(self) -> bool:
        """Return True if enough was measured."""
        measured = self.seconds
        if self._job.rounds is not None:
            return len(measured) >= self._job.rounds
        if len(measured) < self._job.workload.rounds:
            return False
        return sum(measured) >= MIN_SECONDS or len(measured) >= MAX_ROUNDS


def run_rounds(job: Job, one_round: Callable[[], None], model: Callable[[], Tensor]) -> None:
    """Run and report a contender that gives us one round at a time.

    Args:
        job: The contender's task.
        one_round: Runs the next round.
        model: The model now, `[params]`.
    """
    start, clock = model().clone(), Clock(job)
    clock.tick()
    while not clock.done():
        one_round()
        clock.tick()
    report(job, clock.seconds, model() - start)


def report(job: Job, seconds: Sequence[float], step: Tensor) -> None:
    """Print the answer, and make it the last line even if something prints on leaving."""
    answer = {"probe": probe(step)} if job.check else {"seconds": list(seconds), "workload": asdict_of(job.workload)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    sys.stdout.flush()


def asdict_of(workload: Workload) -> dict[str, object]:
    """Return the facts that a reader of the raw output needs."""
    fields = asdict(workload)
    return {key: fields[key] for key in ("name", "clients", "cohort", "examples")}


def probe(step: Tensor) -> list[float]:
    """Return the norm of a model's step `[params]` and four random projections of it, which differ for another step."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(4, len(step), generator=generator, dtype=torch.float64)
    exact = step.detach().double().cpu()
    return [float(torch.linalg.vector_norm(exact)), *(directions @ exact).tolist()]


def flat(module: nn.Module) -> Tensor:
    """Return a copy of a module's parameters as one vector `[params]`."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def one_thread() -> None:
    """Use one thread in every process, because workers are processes here, and the same settings of the allocator."""
    set_allocator()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def set_allocator() -> None:
    """Ask the C library to keep up to 2 GiB of freed memory, as fedpriv does, so that nobody gains by it alone."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)
