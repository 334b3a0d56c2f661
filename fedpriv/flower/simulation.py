"""Detection of simulated clients, decided on the client's side and never by a message.

Instructions in simulations contain seeds and ask for diagnostics, and only simulated clients follow those. A process
simulates clients if one of these holds:

* `fedpriv flower` runs clients in it, also in Ray's workers: it is inside `playing_clients`.
* It is an actor of Flower's simulation (`flwr run`, `run_simulation`, `fedpriv run --engine flower`), according to Ray.
* Its environment has FEDPRIV_SIMULATION=1, for programs such as tests that call a ClientApp directly.

Neither a message nor a run config can change any of these. A node with a home (`fedpriv-home`) is never a simulation.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["SIMULATION", "playing_clients", "simulated"]

SIMULATION = "FEDPRIV_SIMULATION"
"""Environment variable with which a program declares that it simulates clients."""

_FLOWERS_ACTORS = "flwr.simulation."

_playing: ContextVar[bool] = ContextVar("playing_clients", default=False)


@contextmanager
def playing_clients() -> Iterator[None]:
    """Mark the block, in this thread, as a simulation."""
    before = _playing.set(True)
    try:
        yield
    finally:
        _playing.reset(before)


def simulated() -> bool:
    """Return whether this process simulates clients; see the module."""
    return _playing.get() or os.environ.get(SIMULATION) == "1" or _in_flowers_simulation()


def _in_flowers_simulation() -> bool:
    """Return whether Ray runs a task of Flower's simulation here; false if Ray is not imported."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    return context.get_actor_id() is not None and context.get_task_function_name().startswith(_FLOWERS_ACTORS)
