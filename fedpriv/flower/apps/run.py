"""`fedpriv flower APP_DIR`: run an unmodified Flower app on fedpriv's grid."""

import logging
import secrets
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp

from fedpriv.checks import at_least_one
from fedpriv.errors import UserError
from fedpriv.flower.apps.folder import AppFolder, import_component, imports_from, last_line_in
from fedpriv.flower.apps.grid import AppGrid, Backend
from fedpriv.flower.apps.ray_nodes import RayClients, Workers
from fedpriv.flower.apps.virtual_clients import (
    ClientSeeds,
    InProcessClients,
    Population,
    VirtualClients,
    generators_kept,
)
from fedpriv.flower.client_errors import place_of
from fedpriv.flower.internals.app import SERVER_NODE, empty_run, inside_a_run

__all__ = ["AppRun", "Workers", "run_app"]

_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class AppRun:
    """Result of a run.

    Args:
        messages: Number of messages that were answered.
        failed: Number of errors among the answers.
        reason: First of these errors.
        seconds: Duration of the ServerApp.
        workers: Number of processes that ran clients.
    """

    messages: int
    failed: int
    reason: str
    seconds: float
    workers: int

    @classmethod
    def of(cls, grid: AppGrid, seconds: float, workers: int) -> "AppRun":
        """Return the result of a run on a grid."""
        answers = grid.answers.values()
        reason = next((f"client {a.client}: {a.reason}" for a in answers if a.failed), "")
        return cls(sum(a.messages for a in answers), sum(a.failed for a in answers), reason, seconds, workers)

    def __str__(self) -> str:
        failed = f", {self.failed} of them errors (the first: {self.reason})" if self.failed else ""
        speed = self.messages / self.seconds if self.seconds > 0 else 0.0
        processes = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        return f"{self.messages} messages in {self.seconds:.2f} s, {speed:.0f} messages/s, {processes}{failed}"


def run_app(folder: Path, clients: int, overrides: Sequence[str] = (), workers: Workers | None = None) -> AppRun:
    """Run a Flower app to its end.

    The ServerApp runs in this thread and resolves relative paths against the current directory. Clients have the
    partition ids 0 to `clients` - 1.

    Args:
        folder: Folder of the app.
        clients: Number of clients.
        overrides: Overrides of the app's config, in the format of `flwr run --run-config`.
        workers: Workers that run the clients; None for this process.

    Raises:
        UserError: If the app cannot be loaded, raises an exception or has no client that answers, or if the workers are
            not available.
    """
    workers = workers or Workers()
    at_least_one("--clients", clients, "Give the number of clients")
    workers.check()
    app = AppFolder.read(folder, overrides)
    run_id = secrets.randbits(62)
    with imports_from(app.path), inside_a_run(run_id):
        server = import_component(app.path, app.serverapp, "serverapp")
        with _clients_of(app, clients, run_id, workers) as (population, backend):
            grid = AppGrid(empty_run(run_id), population.nodes, backend)
            seconds = _serve(server, grid, app)
            return AppRun.of(grid, seconds, backend.workers)


@contextmanager
def _clients_of(app: AppFolder, size: int, run_id: int, workers: Workers) -> Iterator[tuple[Population, Backend]]:
    """Prepare the clients of an app, without a change to the server's random generators."""
    with generators_kept():
        client_app = import_component(app.path, app.clientapp, "clientapp")
        population = Population(run_id, size, app.run_config, ClientSeeds.drawn())
    backend = (
        RayClients(app.path, app.clientapp, population, workers)
        if workers.need_ray
        else InProcessClients(VirtualClients(client_app, population))
    )
    try:
        yield population, backend
    finally:
        backend.close()


def _serve(server: ServerApp, grid: AppGrid, app: AppFolder) -> float:
    """Run the ServerApp and return its duration in seconds.

    Raises:
        UserError: If it raised an exception, or all messages of one type failed.
    """
    config = dict(app.run_config)
    context = Context(grid.run.run_id, SERVER_NODE, node_config={}, state=RecordDict(), run_config=config)
    began = time.monotonic()
    try:
        server(grid, context)
    except UserError:
        raise
    except Exception as error:
        _log.debug("the ServerApp raised", exc_info=error)
        _refuse_all_failed(grid, app.path)
        place = last_line_in(app.path, error) or _last_line(error)
        raise UserError(
            f"ServerApp {app.serverapp!r}",
            "it to complete",
            f"{type(error).__name__}: {str(error).rstrip('.')}{place}",
            "Fix the app; FLWR_LOG_LEVEL=DEBUG shows the traceback",
        ) from error
    _refuse_all_failed(grid, app.path)
    return time.monotonic() - began


def _last_line(error: BaseException) -> str:
    """Return the place of an exception that was not raised in the app's own files."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename.rpartition('site-packages/')[2]}, line {frames[-1].lineno})" if frames else ""


def _refuse_all_failed(grid: AppGrid, folder: Path) -> None:
    for message_type, answers in grid.answers.items():
        if answers.failed == answers.messages and answers.error is not None:
            place = place_of(answers.error, folder)
            where = f"client {answers.client}; {place}" if place else f"client {answers.client}"
            raise UserError(
                f"ClientApp, {message_type}",
                "a client that answers",
                f"{answers.failed} errors, the first: {answers.reason} ({where})",
                "Fix the app; the log above shows the traceback",
            )
