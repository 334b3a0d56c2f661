"""Execution options, which are not part of an experiment: engine, workers, memory, noise; and the measured choice."""

import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fedpriv.checks import at_least_one, one_of, real_from
from fedpriv.engines import Engine, LoopEngine, Population, VectorizedEngine
from fedpriv.engines.base import UndoingEngine
from fedpriv.engines.fused_noise import FusedNoise, can_fuse, without_noise
from fedpriv.engines.secure_sum import SecureSum
from fedpriv.errors import EngineStartError, UserError, has_extra, require_extra
from fedpriv.experiment.build import Experiment
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.privacy import FixedSize
from fedpriv.rounds import Broadcast, ServerRules, begin_round
from fedpriv.tasks.task import PRECISIONS, Precision

__all__ = [
    "CLIENT_NOISES",
    "ENGINES",
    "ENGINE_FILE",
    "ENGINE_NAMES",
    "LOCAL_ENGINES",
    "ClientNoise",
    "EngineName",
    "Execution",
    "LocalEngine",
    "Ran",
    "bytes_of",
    "choose_compute",
    "cores",
    "make_engine",
    "read_record",
    "start_engine",
]

ENGINE_FILE = "engine.json"

ENGINES: dict[str, str] = {
    "loop": "One client at a time on one thread; the reference for every other engine.",
    "vectorized": "Chunks of clients of similar size on one device; equal to the loop engine up to rounding.",
    "ray": "Workers that each own clients, on the CPUs and GPUs of one or more machines.",
    "flower": "Flower's simulation: the same rules as messages between a ServerApp and ClientApps.",
}

EngineName = Literal["auto", "loop", "vectorized", "ray", "flower"]
"""An engine; `auto` measures and chooses."""

LocalEngine = Literal["auto", "loop", "vectorized"]
"""An engine within one process; `auto` measures and chooses."""

ENGINE_NAMES: tuple[EngineName, ...] = get_args(EngineName)

LOCAL_ENGINES: tuple[LocalEngine, ...] = get_args(LocalEngine)

ClientNoise = Literal["fused", "faithful"]
"""How noise is drawn for the sum of all clients; see `Execution`."""

CLIENT_NOISES: tuple[ClientNoise, ...] = get_args(ClientNoise)

# Workers are worthwhile if they reduce the time to this share, including startup and communication.
_WORTH_WORKERS = 0.9
_RAY_START_SECONDS = 10.0
_RAY_ROUND_SECONDS = 0.01
# The vectorized engine must beat the loop by this factor: measurements are noisy, and the loop is simpler.
_WORTH_BATCHES = 0.95
# Stop measuring after this time.
_MEASURE_SECONDS = 0.25
# On Ray, clients are grouped into classes of about this many, each computed as one batch. The number of classes does
# not depend on the number of workers.
_CLASS_CLIENTS = 64
_MIN_CLASSES, _MAX_CLASSES = 8, 32


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The user's choices for running clients. None of them changes a result beyond the stated tolerance.

    On resume, options left at None or `auto` keep the values recorded in `engine.json`; otherwise they are chosen
    automatically.

    Args:
        engine: `auto`, `loop`, `vectorized` or `ray`. With workers or an address, `auto` means `ray`.
        compute: The engine inside each Ray worker: `auto`, `loop` or `vectorized`.
        client_noise: `fused` draws once per round, from the distribution of the sum of all clients' noise, if only the
            sum is used. `faithful` draws for each client, as devices do. None starts runs with `fused`.
        workers: Number of Ray workers; None for one per core or GPU.
        gpus_per_worker: GPU share of each Ray worker; None for 0 with `--device cpu`, otherwise 1.
        ray_address: HOST:PORT of a running Ray, or auto; None starts Ray.
        state_memory: Maximum bytes of client states in memory, over all workers; None for no limit. A checkpoint of a
            run on Ray gathers all states in this process.
        state_folder: Folder for the states beyond that limit; None for the system's temporary folder.
        channels_last: See `Task`; None is False.
        precision: See `Task`; None is `float32`.
    """

    engine: EngineName = "auto"
    compute: LocalEngine = "auto"
    client_noise: ClientNoise | None = None
    workers: int | None = None
    gpus_per_worker: float | None = None
    ray_address: str | None = None
    state_memory: int | None = None
    state_folder: Path | None = None
    channels_last: bool | None = None
    precision: Precision | None = None

    def __post_init__(self) -> None:
        one_of("--engine", self.engine, ENGINE_NAMES)
        one_of("--compute", self.compute, LOCAL_ENGINES)
        one_of("--client-noise", self.client_noise or "fused", CLIENT_NOISES)
        one_of("--precision", self.precision or "float32", PRECISIONS)
        if self.workers is not None:
            at_least_one("--workers", self.workers, "Set --workers to 1 or more")
        if self.gpus_per_worker is not None:
            real_from("--gpus-per-worker", self.gpus_per_worker, 0, "Set it to 0.25 to place four on a GPU", high=64.0)
        if self.engine in ("loop", "vectorized", "flower"):
            self._refuse("ray", "workers", "gpus_per_worker", "ray_address")
        if self.engine == "flower":
            in_process = ("client_noise", "state_memory", "state_folder", "channels_last", "precision")
            self._refuse("auto, loop, vectorized or ray", *in_process)
        if self.engine in ("ray", "flower"):
            require_extra(f"--engine {self.engine}", self.engine)

    def _refuse(self, engine: str, *options: str) -> None:
        for option in options:
            if getattr(self, option) is not None:
                where = "--" + option.replace("_", "-")
                raise UserError(where, f"--engine {engine}", f"--engine {self.engine}", f"Drop {where}")

    def completed(self, recorded: dict[str, object] | None, *, begun: bool) -> "Execution":
        """Return these options, completed by those of the run to resume and by the defaults.

        Args:
            recorded: The contents of `engine.json`, see `read_record`; None if there is no such file.
            begun: True if there is a run to resume. A run without a record drew noise for each client.
        """
        if self.engine == "flower":
            remedy = "Run it with fedpriv run --engine flower, or fedpriv.run_experiment"
            raise UserError("--engine", "an in-process engine", "'flower'", remedy)
        before = recorded or ({"client_noise": "faithful"} if begun else {})
        changes: dict[str, object] = {
            "client_noise": self.client_noise or before.get("client_noise", "fused"),
            "precision": self.precision or before.get("precision", "float32"),
            "channels_last": before.get("channels_last", False) if self.channels_last is None else self.channels_last,
        }
        if self.engine == "auto" and (self.ray_address is not None or (self.workers or 1) > 1):
            changes["engine"] = "ray"
        elif self.engine == "auto":
            changes["engine"] = before.get("engine", "auto")
        if changes.get("engine", self.engine) == "ray" and before.get("engine") == "ray":
            changes["workers"] = self.workers or before["workers"]
        if self.compute == "auto":
            changes["compute"] = before.get("compute", "auto")
        return replace(self, **changes)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_record(directory: RunDirectory) -> dict[str, object] | None:
    """Return the contents of a run's `engine.json`; None if there is no such file.

    Raises:
        UserError: If the file is damaged.
    """
    found = directory.read_json(ENGINE_FILE)
    if found is None:
        return None
    kinds = {
        "engine": str,
        "compute": str,
        "workers": int,
        "client_noise": str,
        "precision": str,
        "channels_last": bool,
    }
    if not isinstance(found, dict) or not all(type(found.get(key)) is kind for key, kind in kinds.items()):
        where = str(directory.file(ENGINE_FILE))
        raise UserError(
            where, "the options of a run", "a file with missing or wrong keys", "Start again with a new --out"
        )
    return {key: found[key] for key in kinds}


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"K": 10**3, "M": 10**6, "G": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def bytes_of(text: str) -> int:
    """Parse a number of bytes such as 8GB, 512 MiB or 1000000.

    Raises:
        UserError: If the text is not a size.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{0,15})?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise UserError("--state-memory", "a size such as 8GB", repr(text[:40]), "Write a number and KB, MB, GB or TB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


class Ran(NamedTuple):
    """The execution of a run as recorded: engine, compute, number of workers, and how noise is drawn."""

    engine: str
    compute: str
    workers: int
    client_noise: ClientNoise
    seconds_per_client: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """Return a dict for JSON."""
        return self._asdict()


def _loop(population: Population, memory: int | None, folder: Path | None) -> UndoingEngine:
    return LoopEngine(population, states=population.state_store(memory, folder))


def _vectorized(population: Population, memory: int | None, folder: Path | None) -> UndoingEngine:
    return VectorizedEngine(population, states=population.state_store(memory, folder))


_COMPUTES: dict[str, Callable[[Population, int | None, Path | None], UndoingEngine]] = {
    "loop": _loop,
    "vectorized": _vectorized,
}


@dataclass(frozen=True)
class _Local:
    """A picklable function that builds the engine inside a Ray worker."""

    compute: str
    memory: int | None
    folder: Path | None

    def __call__(self, population: Population, device: torch.device) -> Engine:
        return _COMPUTES[self.compute](population.on(device), self.memory, self.folder)


def make_engine(name: LocalEngine, experiment: Experiment) -> Engine:
    """Return the engine `name` in this process, with a noise draw for each client; `auto` measures."""
    execution = Execution(engine=name, client_noise="faithful")
    if name == "auto":
        execution = replace(execution, engine=_chosen(experiment)[0])
    return start_engine(experiment, execution)[0]


def start_engine(experiment: Experiment, execution: Execution) -> tuple[Engine, Ran]:
    """Return the engine for an execution, and the options that were chosen.

    Raises:
        UserError: If the engine is unavailable here, or does not fit in memory.
    """
    seconds: dict[str, float] = {}
    compute = execution.engine if execution.engine in _COMPUTES else execution.compute
    if compute not in _COMPUTES:
        compute, seconds = _chosen(experiment)
    engine, workers = _engine_and_workers(experiment, execution, seconds.get(compute))
    fused = execution.client_noise != "faithful" and can_fuse(experiment.population.rules)
    population = without_noise(experiment.population) if fused else experiment.population
    try:
        clients = _ray(experiment, population, execution, compute, workers) if engine == "ray" else None
    except EngineStartError:
        if execution.engine == "ray" or execution.ray_address is not None:
            raise
        engine, workers, clients = "here", 1, None  # auto chose Ray, which does not start on a busy computer
    if clients is None:
        clients = _COMPUTES[compute](population, execution.state_memory, execution.state_folder)
    rules = population.rules
    runner: Engine = clients if rules.sums is None else SecureSum(clients, rules.sums, rules)
    if fused:
        runner = FusedNoise(clients, experiment.population.rules)
    noise = "fused" if fused else "faithful"
    return runner, Ran(engine if engine == "ray" else compute, compute, workers, noise, seconds)


def _engine_and_workers(
    experiment: Experiment, execution: Execution, seconds_per_client: float | None
) -> tuple[str, int]:
    """Return `ray` and its number of workers, or `here` and 1."""
    if execution.engine in _COMPUTES:
        return "here", 1
    room = execution.workers or _room_for_workers(experiment, execution)
    if execution.engine == "ray":
        return "ray", room
    if execution.workers is None and has_extra("ray") and _workers_pay(experiment, room, seconds_per_client):
        return "ray", room
    return "here", 1


def _room_for_workers(experiment: Experiment, execution: Execution) -> int:
    """Return the number of cores or GPUs, but at most the expected number of clients in a round."""
    if execution.gpus_per_worker or experiment.population.task.device.type == "cuda":
        room = max(int(torch.cuda.device_count() / (execution.gpus_per_worker or 1.0)), 1)
    else:
        room = cores()
    return max(min(room, round(experiment.server.sampling.expected_size)), 1)


def _workers_pay(experiment: Experiment, workers: int, seconds_per_client: float | None) -> bool:
    """Return True if workers would finish the run earlier, given the measured time per client."""
    if seconds_per_client is None or workers < 2 or experiment.population.task.device.type != "cpu":
        return False
    rounds = experiment.config.training.rounds
    alone = seconds_per_client * experiment.server.sampling.expected_size * rounds
    return alone / workers + _RAY_START_SECONDS + _RAY_ROUND_SECONDS * rounds < _WORTH_WORKERS * alone


def _ray(
    experiment: Experiment, population: Population, execution: Execution, compute: str, workers: int
) -> UndoingEngine:
    from fedpriv.engines.ray.engine import RayEngine
    from fedpriv.engines.ray.snapshots import KeepSnapshots

    gpus = execution.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if population.task.device.type == "cuda" else 0.0
    expected = experiment.server.sampling.expected_size
    batches = compute == "vectorized" and (gpus > 0.0 or population.task.dense is not None)
    unit = min(max(int(expected / _CLASS_CLIENTS), _MIN_CLASSES), _MAX_CLASSES) if batches else "client"
    memory = None if execution.state_memory is None else execution.state_memory // workers
    folder = None if memory is None else execution.state_folder or Path(tempfile.gettempdir())
    return RayEngine(
        population.on(torch.device("cpu")).in_client_order(),
        _Local(compute, memory, execution.state_folder),
        workers=workers,
        gpus_per_worker=gpus,
        unit=unit,
        address=execution.ray_address,
        snapshots=KeepSnapshots(folder=folder),
    )


def choose_compute(population: Population, server: ServerRules, initial_model: Tensor) -> tuple[str, dict[str, float]]:
    """Return the faster of loop and batches on a first chunk of clients, and the seconds per client of each.

    Both run part of the first round on temporary engines, so no state and no result changes.

    Args:
        population: The clients.
        server: Determines the cohort.
        initial_model: The broadcast model, `[params]`.
    """
    population = without_noise(population)
    broadcast = begin_round(server, server.init(initial_model), 1)
    clients = broadcast.cohort if len(broadcast.cohort) else np.zeros(1, dtype=np.int64)
    loop, vectorized = LoopEngine(population), VectorizedEngine(population)
    chunk = np.sort(vectorized.first_chunk(clients))
    few = _few(loop, broadcast.model, chunk)
    seconds = {
        "loop": _seconds_per_client(loop, broadcast.model, few),
        "vectorized": _seconds_per_client(vectorized, broadcast.model, chunk if len(few) > 1 else chunk[:2]),
    }
    return "vectorized" if seconds["vectorized"] < _WORTH_BATCHES * seconds["loop"] else "loop", seconds


def _chosen(experiment: Experiment) -> tuple[str, dict[str, float]]:
    server = experiment.server
    if not server.sampling.draws_cohorts:  # any clients serve for measuring
        several = FixedSize(server.sampling.population, math.ceil(server.sampling.expected_size))
        server = replace(server, sampling=several)
    return choose_compute(experiment.population, server, experiment.initial_model)


def _few(loop: Engine, model: Tensor, chunk: np.ndarray) -> np.ndarray:
    """Return as many of the clients as the loop engine runs in a short time."""
    began = time.perf_counter()
    loop.sum_messages(Broadcast(1, model, chunk[:1]))
    once = max(time.perf_counter() - began, 1e-6)
    return chunk[: max(int(_MEASURE_SECONDS / once), 1)]


def _seconds_per_client(engine: Engine, model: Tensor, clients: np.ndarray) -> float:
    """Return the best of up to three runs after a warm-up run."""
    best, began = float("inf"), time.perf_counter()
    engine.sum_messages(Broadcast(1, model, clients))
    for _ in range(3):
        start = time.perf_counter()
        engine.sum_messages(Broadcast(1, model, clients))
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - began > _MEASURE_SECONDS:
            break
    return best / len(clients)
