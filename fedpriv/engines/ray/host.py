"""The code inside a worker process, and the transport of a population to it.

Tensors travel as numpy arrays. Large arrays are in shared memory, once on each machine, and the workers' tensors are
views of it: never write to them.
"""

import errno
import io
import math
import pickle
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from ray import cloudpickle
from torch import Tensor

from fedpriv.engines.base import Engine, Population
from fedpriv.errors import UserError
from fedpriv.plugins import modules_of_files
from fedpriv.rounds import Broadcast
from fedpriv.tasks.task import Task

__all__ = ["Failure", "Host", "MakeLocal", "Partial", "Shipment", "Versions", "merged", "pack", "unpack"]

# Makes the engine inside a worker, from the population (on the CPU) and the worker's device.
MakeLocal = Callable[[Population, torch.device], Engine]

# Smallest array that the processes of a machine share; smaller ones are copied.
_MIN_SHARED_BYTES = 2**16
_NUMPY_TYPES = {torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float16}

T = TypeVar("T")


class Shipment(NamedTuple):
    """Any object, with its large arrays kept separate, so that a store can share them between processes."""

    content: bytes
    arrays: list[np.ndarray]


class Partial(NamedTuple):
    """The partial sum of one worker's clients in a round.

    `sum` is float64 `[params]`; `signal_norms` is the sum of all finite norms; `seconds` is the time that the round
    took, NaN in the first round, which does not predict later ones.
    """

    sum: np.ndarray
    messages: int
    non_finite: int
    signal_norms: float
    seconds: float


class Versions(NamedTuple):
    """The versions that all processes with clients must share."""

    fedpriv: str
    torch: str

    @classmethod
    def here(cls) -> "Versions":
        """Return the versions of this process; builds of one torch version for different devices count as equal."""
        try:
            own = version("fedpriv")
        except PackageNotFoundError:
            own = "unknown"
        return cls(own, torch.__version__.partition("+")[0])


class Failure(NamedTuple):
    """An exception of a worker, in a form that every process can read.

    `kind` is `user` (with its line in `text` and its key in `where`), `memory`, `disk` or `other`.
    """

    kind: str
    where: str
    text: str
    error: bytes


class Host:
    """One worker: a local engine with the memories of the clients that the worker owns.

    Methods return a `Failure` instead of raising an exception.
    """

    _local: Engine
    _task: Task
    _warm = False

    def ready(self) -> Versions:
        """Return the versions of this process, which also shows that it runs."""
        return Versions.here()

    def start(self, population: Shipment, threads: int, gpu: bool, path: list[str]) -> Failure | None:
        """Make the local engine.

        Args:
            population: A pair (`Population`, `MakeLocal`).
            threads: Number of torch threads.
            gpu: Compute on the process's first GPU.
            path: More folders to import modules from.
        """
        return _caught(lambda: self._start(population, threads, gpu, path))

    def run(
        self,
        round: int,
        turn: int | None,
        model: np.ndarray,
        capacity: int,
        groups: list[np.ndarray],
        shared: np.ndarray | None = None,
    ) -> Partial | Failure:
        """Run groups of clients on the model `[params]`, each group as a separate cohort; see `Broadcast`."""
        beside = None if shared is None else _view(shared)
        whole = Broadcast(round, _view(model), np.zeros(0, dtype=np.int64), capacity, turn=turn, shared=beside)
        return _caught(lambda: self._run(whole, groups))

    def outputs(
        self, model: np.ndarray, inputs: np.ndarray, pieces: list[tuple[int, int]]
    ) -> list[np.ndarray] | Failure:
        """Return the outputs of pieces of `inputs`, each from a start up to an end; see `Task.outputs`."""
        return _caught(lambda: self._outputs(_view(model), _view(inputs), pieces))

    def save(self) -> Shipment | Failure:
        """Return the states that `Engine.save` of the local engine returns."""
        return _caught(lambda: pack(self._local.save()))

    def restore(self, *parts: Shipment) -> Failure | None:
        """Replace all states by those of `parts`, each in the form of `Engine.save`."""
        return _caught(lambda: self._local.restore(merged([unpack(part) for part in parts])))

    def _start(self, population: Shipment, threads: int, gpu: bool, path: list[str]) -> None:
        sys.path.extend(folder for folder in path if folder not in sys.path)
        torch.set_num_threads(threads)
        if gpu and not torch.cuda.is_available():
            got = f"torch {torch.__version__} on {platform.node()} without a GPU"
            raise UserError("workers", "a GPU that torch can use", got, "Install torch for GPUs there, or use the CPU")
        people, make_local = unpack(population)
        device = torch.device("cuda" if gpu else "cpu")
        self._local = make_local(people, device)
        self._task = people.task.on(device)

    def _outputs(self, model: Tensor, inputs: Tensor, pieces: list[tuple[int, int]]) -> list[np.ndarray]:
        found = (self._task.outputs(model, inputs[start:end], end - start) for start, end in pieces)
        return [piece.cpu().numpy() for outputs in found for piece in outputs]

    def _run(self, whole: Broadcast, groups: list[np.ndarray]) -> Partial:
        began = time.perf_counter()
        totals = [self._local.sum_messages(whole._replace(cohort=np.array(group))) for group in groups]
        sum_ = totals[0].sum.numpy()
        for total in totals[1:]:
            sum_ = sum_ + total.sum.numpy()
        finite = [total.messages - total.non_finite for total in totals]
        norms = math.fsum(t.signal_norm * count for t, count in zip(totals, finite, strict=True) if count)
        seconds = time.perf_counter() - began if self._warm else math.nan
        self._warm = True
        messages, non_finite = sum(t.messages for t in totals), sum(t.non_finite for t in totals)
        return Partial(sum_, messages, non_finite, norms, seconds)


def pack(value: object) -> Shipment:
    """Pack an object that cloudpickle accepts; tensors of any device become arrays and are unpacked on the CPU."""
    arrays: list[np.ndarray] = []

    def small(buffer: pickle.PickleBuffer) -> bool:
        flat = np.frombuffer(buffer.raw(), dtype=np.uint8)
        if len(flat) >= _MIN_SHARED_BYTES:
            arrays.append(flat)
        return len(flat) < _MIN_SHARED_BYTES

    return Shipment(_pickled(value, small), arrays)


def unpack(shipment: Shipment) -> Any:
    """Return the object. Its large arrays and tensors are views of possibly shared memory: do not write to them."""
    return pickle.loads(shipment.content, buffers=shipment.arrays)


def merged(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merge saved states of disjoint sets of clients, clients ascending; the result shares no memory with the parts."""
    some = [part for part in parts if len(part["clients"])]
    if not some:
        return {"clients": torch.zeros(0, dtype=torch.int64)}
    order = torch.argsort(torch.cat([part["clients"] for part in some]))
    return {name: torch.cat([part[name] for part in some])[order] for name in some[0]}


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, obj: Any) -> object:
        if type(obj) in (Tensor, torch.nn.Parameter) and obj.layout is torch.strided and obj.dtype in _NUMPY_TYPES:
            array = obj.detach().cpu().resolve_conj().resolve_neg().numpy()
            return (_tensor, (array,)) if type(obj) is Tensor else (_parameter, (array, obj.requires_grad))
        return super().reducer_override(obj)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy()) if array.nbytes < _MIN_SHARED_BYTES else _view(array)


def _parameter(array: np.ndarray, requires_grad: bool) -> torch.nn.Parameter:
    return torch.nn.Parameter(_tensor(array), requires_grad)


def _view(array: np.ndarray) -> Tensor:
    """Return a tensor on an array that may be read-only, without torch's warning: fedpriv never writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _caught(work: Callable[[], T]) -> T | Failure:
    try:
        return work()
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> Failure:
    place = f" on {platform.node()}"
    if isinstance(error, UserError):
        return Failure("user", error.where, str(error), b"")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return Failure("memory", "workers", _first_line(error) + place, b"")
    full, file = "No space left" in str(error), None
    if isinstance(error, OSError):
        full, file = full or error.errno in (errno.ENOSPC, errno.EDQUOT), error.filename
    if full:
        return Failure("disk", str(file or "disk"), _first_line(error) + place, b"")
    return Failure("other", "", "".join(traceback.format_exception(error)), _survivor(error))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _survivor(error: Exception) -> bytes:
    """Return the pickled exception; if it cannot be unpickled, a RuntimeError with its message."""
    try:
        content = _pickled(error)
        pickle.loads(content)
    except Exception:
        return _pickled(RuntimeError(f"{type(error).__name__}: {error}"))
    return content


def _pickled(value: object, buffer_callback: Callable[[pickle.PickleBuffer], bool] | None = None) -> bytes:
    for module in modules_of_files():
        cloudpickle.register_pickle_by_value(module)
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffer_callback).dump(value)
    return file.getvalue()
