"""What runs inside a worker process, and how a population gets there.

Tensors travel as numpy arrays. Those that are large lie in shared memory, once on each machine, and the workers'
tensors are views of it: nobody may write to them.
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
from typing import Any, NamedTuple

import numpy as np
import torch
from ray import cloudpickle
from torch import Tensor

from fedpriv.engines.base import Engine, Population
from fedpriv.errors import UserError
from fedpriv.plugins import modules_of_files
from fedpriv.rounds import Broadcast

__all__ = ["Failure", "Host", "MakeLocal", "Partial", "Shipment", "Versions", "merged", "pack", "unpack"]

# Makes the engine that a worker runs inside, from the population (on the CPU) and the worker's device.
MakeLocal = Callable[[Population, torch.device], Engine]

# Arrays from here on are shared between the processes of a machine; smaller ones are copied.
_LARGE_BYTES = 2**16
_NUMPY_TYPES = {torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float16}


class Shipment(NamedTuple):
    """Any object, with its large arrays beside it, where a store can share them between processes."""

    content: bytes
    arrays: list[np.ndarray]


class Partial(NamedTuple):
    """What one worker's clients sent in a round.

    `sum` is float64 `[params]`; `signal_norms` the sum of the `finite` finite norms; `seconds` what it took, NaN in
    the first round, which says nothing about the next.
    """

    sum: np.ndarray
    messages: int
    non_finite: int
    signal_norms: float
    seconds: float


class Versions(NamedTuple):
    """What must be the same wherever clients run."""

    fedpriv: str
    torch: str

    @classmethod
    def here(cls) -> "Versions":
        """Of this process; builds of one torch for several devices count as the same."""
        try:
            own = version("fedpriv")
        except PackageNotFoundError:
            own = "unknown"
        return cls(own, torch.__version__.partition("+")[0])


class Failure(NamedTuple):
    """An exception of a worker, in a form that every process can read.

    `kind`: `user` (its line is in `text`, its place in `where`), `memory`, `disk` or `other`.
    """

    kind: str
    where: str
    text: str
    error: bytes


class Host:
    """One worker: a local engine, and in it the memories of the clients that the worker owns.

    Methods return a `Failure` where they would raise.
    """

    _local: Engine
    _warm = False

    def ready(self) -> Versions:
        """That the process is there, and with what."""
        return Versions.here()

    def start(self, population: Shipment, threads: int, gpu: bool, path: list[str]) -> Failure | None:
        """Makes the local engine.

        Args:
            population: A pair (`Population`, `MakeLocal`).
            threads: How many torch may use.
            gpu: Whether to work on the process's first GPU.
            path: Where else to look for modules.
        """
        return _caught(lambda: self._start(population, threads, gpu, path))

    def run(self, round: int, model: np.ndarray, capacity: int, groups: list[np.ndarray]) -> Partial | Failure:
        """Runs groups of clients on the model `[params]`, each group as a cohort of its own."""
        return _caught(lambda: self._run(round, model, capacity, groups))

    def save(self) -> Shipment | Failure:
        """What `Engine.save` of the local engine gives."""
        return _caught(lambda: pack(self._local.save()))

    def restore(self, *parts: Shipment) -> Failure | None:
        """Replaces all states by those of `parts`, each as `Engine.save` gives it."""
        return _caught(lambda: self._local.restore(merged([unpack(part) for part in parts])))

    def _start(self, population: Shipment, threads: int, gpu: bool, path: list[str]) -> None:
        sys.path.extend(folder for folder in path if folder not in sys.path)
        torch.set_num_threads(threads)
        if gpu and not torch.cuda.is_available():
            got = f"torch {torch.__version__} on {platform.node()}, which sees none"
            raise UserError("workers", "a GPU that torch can use", got, "Install torch for GPUs there, or ask for none")
        people, make_local = unpack(population)
        self._local = make_local(people, torch.device("cuda" if gpu else "cpu"))

    def _run(self, round: int, model: np.ndarray, capacity: int, groups: list[np.ndarray]) -> Partial:
        began = time.perf_counter()
        vector = _view(model)
        totals = [self._local.sum_messages(Broadcast(round, vector, np.array(g), capacity)) for g in groups]
        whole = totals[0].sum.numpy()
        for total in totals[1:]:
            whole = whole + total.sum.numpy()
        finite = [total.messages - total.non_finite for total in totals]
        norms = math.fsum(t.signal_norm * count for t, count in zip(totals, finite, strict=True) if count)
        seconds = time.perf_counter() - began if self._warm else math.nan
        self._warm = True
        messages, non_finite = sum(t.messages for t in totals), sum(t.non_finite for t in totals)
        return Partial(whole, messages, non_finite, norms, seconds)


def pack(value: Any) -> Shipment:
    """Any object that cloudpickle takes; tensors of any device go as arrays and come back on the CPU."""
    arrays: list[np.ndarray] = []

    def small(buffer: pickle.PickleBuffer) -> bool:
        flat = np.frombuffer(buffer.raw(), dtype=np.uint8)
        if len(flat) >= _LARGE_BYTES:
            arrays.append(flat)
        return len(flat) < _LARGE_BYTES

    return Shipment(_pickled(value, small), arrays)


def unpack(shipment: Shipment) -> Any:
    """The object; its large arrays and tensors are views of the shipment's, which may be shared: do not write there."""
    return pickle.loads(shipment.content, buffers=shipment.arrays)


def merged(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One saved state from those of parts of the clients, clients ascending; nothing is shared with the parts."""
    some = [part for part in parts if len(part["clients"])]
    if not some:
        return {"clients": torch.zeros(0, dtype=torch.int64)}
    order = torch.argsort(torch.cat([part["clients"] for part in some]))
    return {name: torch.cat([part[name] for part in some])[order] for name in some[0]}


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) in (Tensor, torch.nn.Parameter) and obj.layout is torch.strided and obj.dtype in _NUMPY_TYPES:
            array = obj.detach().cpu().resolve_conj().resolve_neg().numpy()
            return (_tensor, (array,)) if type(obj) is Tensor else (_parameter, (array, obj.requires_grad))
        return super().reducer_override(obj)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy()) if array.nbytes < _LARGE_BYTES else _view(array)


def _parameter(array: np.ndarray, requires_grad: bool) -> torch.nn.Parameter:
    return torch.nn.Parameter(_tensor(array), requires_grad)


def _view(array: np.ndarray) -> Tensor:
    """A tensor on an array that may be read-only: torch cannot know that nobody writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _caught(what: Callable[[], Any]) -> Any:
    try:
        return what()
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
    """The exception, pickled, if it survives the way; else one with its words."""
    try:
        content = _pickled(error)
        pickle.loads(content)
    except Exception:
        return _pickled(RuntimeError(f"{type(error).__name__}: {error}"))
    return content


def _pickled(value: Any, buffer_callback: Callable[[pickle.PickleBuffer], bool] | None = None) -> bytes:
    for module in modules_of_files():
        cloudpickle.register_pickle_by_value(module)
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffer_callback).dump(value)
    return file.getvalue()
