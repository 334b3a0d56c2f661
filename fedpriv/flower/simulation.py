"""Whether this process plays clients, rather than being one: decided on the client's side, never by a message.

Orders of simulations carry seeds and ask for diagnostics, and are followed only here. A process plays clients if

* `fedpriv flower` runs clients in it, as it does in Ray's workers: it is inside `playing_clients`;
* it is an actor of Flower's simulation (`flwr run`, `run_simulation`, `fedpriv run --engine flower`): Ray says so;
* its environment has FEDPRIV_SIMULATION=1: for programs, such as tests, that call a ClientApp themselves.

Neither a message nor a run config reaches any of these. A node with a home (`fedpriv-home`) is never a simulation.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["SIMULATION", "playing_clients", "simulated"]

SIMULATION = "FEDPRIV_SIMULATION"
"""The environment variable by which a program says that it plays clients."""

_FLOWERS_ACTORS = "flwr.simulation."

_playing: ContextVar[bool] = ContextVar("playing_clients", default=False)


@contextmanager
def playing_clients() -> Iterator[None]:
    """Marks what runs meanwhile, in this thread, as a simulation."""
    before = _playing.set(True)
    try:
        yield
    finally:
        _playing.reset(before)


def simulated() -> bool:
    """Return whether this process plays clients; see the module."""
    return _playing.get() or os.environ.get(SIMULATION) == "1" or _in_flowers_simulation()


def _in_flowers_simulation() -> bool:
    """Return whether Ray runs a task of Flower's simulation here. Ray is there already, or it is none."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    return context.get_actor_id() is not None and context.get_task_function_name().startswith(_FLOWERS_ACTORS)
