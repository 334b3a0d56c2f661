"""Private interfaces of Flower that a node uses; no other module uses them.

A SuperNode runs any bundle of code that the server sends. Here it accepts only some bundles, by their hash. The check
takes the place of Flower's check of signatures: `_pull_and_store_message` answers any other bundle with the error
INVALID_FAB before storing any of it. A refused bundle reaches Flower empty, so that there is no code to run even if
Flower omits the check. `tests/deploy/test_deploy_node.py` fails if Flower changes any of this.

A helper of secure aggregation takes part in runs of any app, and never asks for their bundles: it runs one of its
own making.
"""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from logging import ERROR, WARN
from pathlib import Path
from typing import Any

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.config import get_fab_config, get_metadata_from_config
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, RegisterNodeFleetRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.supercore import log, telemetry
from flwr.supercore.constant import TaskType
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.exit import ExitCode, add_exit_handler, flwr_exit
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supernode import start_client_internal as supernode
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedpriv.errors import UserError
from fedpriv.flower.companion import ALIVE, LOCK, QUIET, starting_companions

__all__ = [
    "accepting_only",
    "accompanied",
    "bundle_hash",
    "own_bundle",
    "run_flower",
    "run_supernode",
    "why_refused",
]

# Flower's servers wait for two heartbeats, of 30 s, before they consider a node gone.
_PATIENCE_SECONDS = 75.0
_PAUSE_SECONDS = 5.0

# A signal may end the node's processes a moment before the node. Flower ends a node after 5 s, with exit code 0.
_ENDING_SECONDS = 3.0

_Started = Callable[[str, subprocess.Popen[bytes]], None]

_MARK = "valid_license"
_TRUSTED = {"fedpriv": "bundles by their hash"}


def bundle_hash(files: Mapping[str, bytes]) -> str:
    """Return the SHA-256 of the bundle that `flwr run` builds from an app.

    Args:
        files: Files of the app by name.
    """
    return hashlib.sha256(build_fab_from_files(dict(files))[0]).hexdigest()


def own_bundle(files: Mapping[str, bytes]) -> Fab:
    """Return the bundle that `flwr run` builds from an app; see `bundle_hash`."""
    content = build_fab_from_files(dict(files))[0]
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def why_refused(fab: Fab, run: Run | None, accepted: Collection[str]) -> str:
    """Return the reason why a bundle must not run on this node; empty if it may.

    Args:
        fab: Bundle, as sent by the server.
        run: Run of the bundle, as described by the server.
        accepted: SHA-256 hashes of the bundles that may run.
    """
    digest = hashlib.sha256(fab.content).hexdigest()
    if digest not in accepted:
        return f"its hash is {digest}, which this node does not accept"
    if run is None or run.fab_hash != digest or fab.hash_str != digest:
        return "the server sends another bundle than it names"
    if (run.fab_id, run.fab_version) != get_metadata_from_config(get_fab_config(fab.content)):
        return "the server gives it a wrong name or version"
    if run.primary_task_type == TaskType.AGENT_APP:
        return "the run is an agent's"
    return ""


@contextmanager
def accepting_only(accepted: Collection[str], own: Fab | None = None) -> Iterator[None]:
    """Make this process's SuperNode refuse all bundles except the accepted ones.

    Args:
        accepted: SHA-256 hashes of the accepted bundles.
        own: Bundle to run in every run, in place of the run's bundle; None to run accepted ones.
    """
    pull, verify = supernode._pull_and_store_message, supernode._verify_fab
    supernode._pull_and_store_message = _judging(pull, accepted, own)
    supernode._verify_fab = lambda fab, _: hashlib.sha256(fab.content).hexdigest() in accepted
    try:
        yield
    finally:
        supernode._pull_and_store_message, supernode._verify_fab = pull, verify


def _judging(pull: Callable[..., int | None], accepted: Collection[str], own: Fab | None) -> Callable[..., int | None]:
    """Return a `_pull_and_store_message` that receives bundles only after they were checked; see `accepting_only`."""

    def pull_and_judge(**arguments: Any) -> int | None:
        get_run, get_fab = arguments["get_run"], arguments["get_fab"]
        runs: dict[int, Run] = {}

        def remembered(run_id: int) -> Run:
            run = get_run(run_id)
            runs[run_id] = run if own is None else _renamed(run, own)
            return runs[run_id]

        def judged(fab_hash: str, run_id: int) -> Fab:
            fab = get_fab(fab_hash, run_id) if own is None else own
            reason = why_refused(fab, runs.get(run_id), accepted)
            if reason:
                log(ERROR, "This node refuses the app of run %s: %s.", run_id, reason)
                return Fab(fab.hash_str, b"", {})
            return Fab(fab.hash_str, fab.content, {_MARK: "accepted"})

        return pull(**{**arguments, "get_run": remembered, "get_fab": judged, "trusted_entities": _TRUSTED})

    return pull_and_judge


def _renamed(run: Run, own: Fab) -> Run:
    """Return a run as one of another bundle, without settings."""
    fab_id, version = get_metadata_from_config(get_fab_config(own.content))
    return replace(run, fab_id=fab_id, fab_version=version, fab_hash=own.hash_str, override_config={})


def run_supernode(options: Sequence[str], accepted: Collection[str], own: Fab | None = None) -> int:
    """Run Flower's SuperNode in this process until it ends.

    Args:
        options: Command-line options of `flower-supernode`.
        accepted: SHA-256 hashes of the bundles that may run.
        own: See `accepting_only`.

    Returns:
        Exit code of the SuperNode.

    Raises:
        UserError: If the server rejects this node, from the start or later.
    """
    watch = _Watch()
    with accepting_only(accepted, own), accompanied(supernode, watch.started), watch, _patient(), _listening() as heard:
        try:
            code = run_flower("flower-supernode", _supernode, options)
        except httpx.HTTPStatusError as error:
            raise _explained(error.response) from None
    if heard.removed:
        remedy = "Ask the server's operator to register a new key; a removed key is never accepted again"
        raise UserError("node.key", "a registered key", "a key that the server has removed", remedy)
    if heard.refused is not None:
        if not heard.taken:
            raise _explained(heard.refused)
        print(f"fedpriv: {_explained(heard.refused)}", file=sys.stderr)
        return 1  # systemd then restarts the node, since this may be temporary
    return code if watch.fallen is None else watch.say()


@contextmanager
def accompanied(starter: Any, started: _Started = lambda *_: None) -> Iterator[None]:
    """Tie the processes that a Flower module starts to this process, which holds the lock in FLWR_HOME.

    Args:
        starter: The module, which calls `subprocess.Popen`.
        started: Called with the name and the process of each program.
    """
    before = starter.subprocess
    starter.subprocess = starting_companions(str(Path(os.environ.get("FLWR_HOME", ""), LOCK)), started)
    try:
        yield
    finally:
        starter.subprocess = before


class _Watch:
    """Watcher that ends this process, a node, like Ctrl-C if one of its processes ends first.

    Without its SuperExec, a node would stay connected to the server and never answer.

    Attributes:
        fallen: Error about the process that ended too early; None if there is none.
    """

    def __init__(self) -> None:
        self.fallen: UserError | None = None
        self._ending, self._over = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        add_exit_handler(self._ending.set, run_before_force_exit=True)

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._over.set()

    def say(self) -> int:
        """Print the error in one line, and return the exit code with which systemd restarts the node."""
        print(f"fedpriv: {self.fallen}", file=sys.stderr, flush=True)
        return 1

    def started(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Watch a process from now on."""
        threading.Thread(target=self._wait, args=(name, process), daemon=True).start()

    def _wait(self, name: str, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if self._ending.wait(_ENDING_SECONDS):
            return
        how = f"an end by signal {-code}" if code < 0 else f"an end with exit code {code}"
        remedy = "Read the node's log, and restart the node if systemd does not"
        self.fallen = UserError("this node", f"{name} to run as long as the node does", how, remedy)
        os.kill(os.getpid(), signal.SIGINT)
        if not self._over.wait(_ENDING_SECONDS):
            os._exit(self.say())


def _supernode() -> None:
    """Run Flower's SuperNode, and exit with an error after a failed connection, so that the node can be restarted."""
    flower_supernode()
    flwr_exit(ExitCode.SUPERNODE_CONNECTION_ERROR, "The connection to the SuperLink has ended.")


@contextmanager
def _patient() -> Iterator[None]:
    """Let a node ask again if the server rejects it.

    For a minute after a node was killed, the server considers it connected and rejects it.
    """
    activate = FleetHttpClient.ActivateNode

    def activate_patiently(self: FleetHttpClient, request: ActivateNodeRequest) -> ActivateNodeResponse:
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return activate(self, request)
            except httpx.HTTPStatusError as error:
                if _code(error.response) != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED or time.monotonic() > until:
                    raise
                log(WARN, "The server does not know this node's key, or considers the node connected already.")
                time.sleep(_PAUSE_SECONDS)

    FleetHttpClient.ActivateNode = activate_patiently
    try:
        yield
    finally:
        FleetHttpClient.ActivateNode = activate


@dataclass
class _Heard:
    """Answers of a server about the identity of a node.

    Args:
        key: Public key of the node, once it was sent.
        taken: True after the server has accepted the node.
        refused: Answer that rejected the node's identity; None if there is none.
        removed: True if the reason is that the server has removed the key.
    """

    key: bytes = b""
    taken: bool = False
    refused: httpx.Response | None = None
    removed: bool = False
    _one_by_one: Any = field(default_factory=threading.RLock, repr=False)

    def note(self, client: FleetHttpClient, answer: httpx.Response) -> None:
        """Record the first refusal, and determine its cause.

        A server gives the same answer to a removed node and to a node with a wrong clock. It checks the clock first,
        however: if it answers that nodes cannot register themselves, the clock is right.
        """
        with self._one_by_one:
            if self.refused is not None:
                return
            self.refused = answer
            try:
                client.RegisterNode(RegisterNodeFleetRequest(public_key=self.key))
            except httpx.HTTPStatusError as error:
                known = _code(error.response) != ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED
                self.removed = self.taken and not known
            except httpx.HTTPError:
                pass


@contextmanager
def _listening() -> Iterator[_Heard]:
    """Record why a server no longer accepts a node; the node then ends, as Flower's nodes do."""
    heard, ask, beat = _Heard(), FleetHttpClient._unary_unary, FleetHttpClient.SendNodeHeartbeat

    def ask_and_listen(self: FleetHttpClient, **arguments: Any) -> Any:
        request = arguments["request"]
        heard.key = getattr(request, "public_key", b"") or heard.key
        try:
            answer = ask(self, **arguments)
            heard.taken = heard.taken or isinstance(request, ActivateNodeRequest)
            _touch_alive()
            return answer
        except httpx.HTTPStatusError as error:
            refused = error.response.status_code == httpx.codes.UNAUTHORIZED
            if refused and not isinstance(request, SendNodeHeartbeatRequest):
                heard.note(self, error.response)
            raise

    def beat_quietly(self: FleetHttpClient, request: SendNodeHeartbeatRequest) -> SendNodeHeartbeatResponse:
        """Ignore refusals: the main thread sends a request every few seconds, sees them too, and then ends the node.

        Ending the node from the heartbeat's thread as well would act like a second Ctrl-C and interrupt the first.
        """
        try:
            return beat(self, request)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.UNAUTHORIZED:
                raise
            return SendNodeHeartbeatResponse(success=True)

    FleetHttpClient._unary_unary, FleetHttpClient.SendNodeHeartbeat = ask_and_listen, beat_quietly
    try:
        yield heard
    finally:
        FleetHttpClient._unary_unary, FleetHttpClient.SendNodeHeartbeat = ask, beat


def _touch_alive() -> None:
    """Record, for health checks, that the server has answered this node."""
    home = os.environ.get("FLWR_HOME")
    if home:
        with suppress(OSError):  # a full disk must not end the node
            Path(home, ALIVE).touch()


def _code(answer: httpx.Response) -> int | None:
    said = FlowerError.from_json(answer.text)
    return None if said is None else said.code


def _explained(answer: httpx.Response) -> UserError:
    """Return the error for a server's refusal of this node."""
    if _code(answer) == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        remedy = "Send node.pub to the administrator for admin/register.sh, or stop the other node that uses this key"
        got = "a key that the server does not know, has removed, or considers in use"
        return UserError("node.key", "a key that is registered and not in use", got, remedy)
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        remedy = "Set this machine's clock and the server's by NTP, so that they agree to a few seconds"
        return UserError("the server", "a valid and recent signature of the node", "a rejected signature", remedy)
    return UserError("the server", "an answer to this node", f"HTTP status {answer.status_code}", "See its log")


def run_flower(name: str, program: Callable[[], None], options: Sequence[str]) -> int:
    """Run one of Flower's programs in this process, without telemetry or update checks; return its exit code.

    Raises:
        httpx.HTTPStatusError: If it ended because a server refused a request.
    """
    os.environ.update(QUIET)
    telemetry.FLWR_TELEMETRY_ENABLED = "0"  # Flower read the variable at import, before the line above
    before = sys.argv
    sys.argv = [name, *options]
    try:
        program()
    except SystemExit as end:
        if end.code and isinstance(end.__context__, httpx.HTTPStatusError):
            raise end.__context__ from None
        if isinstance(end.code, str):
            print(f"{name}: {end.code}", file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0
