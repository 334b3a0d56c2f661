"""Everything that a node needs of Flower and that Flower does not publish: the only place that touches it.

A SuperNode runs whatever bundle of code the server sends. Here it is made to accept some bundles only, by their hash,
at the place where Flower would check signatures: `_pull_and_store_message` answers a bundle that is not accepted with
the error INVALID_FAB before anything of it is stored. A bundle that is refused reaches Flower empty, so that there is
nothing to run even if Flower no longer asked. `tests/deploy/test_deploy_node.py` fails when Flower moves any of it.
"""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from fedpriv.flower.companion import LOCK, starting_companions

__all__ = ["QUIET", "accepting_only", "accompanied", "bundle_hash", "run_flower", "run_supernode", "why_refused"]

QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What Flower's processes find in their environment so that they call nobody and install nothing."""

# Flower's servers wait for two heartbeats, of 30 s, before they believe that a node is gone.
_PATIENCE_SECONDS = 75.0
_PAUSE_SECONDS = 5.0

# Who ends a node may end what it has started a moment before. Flower ends a node that does not end after 5 s, with 0.
_ENDING_SECONDS = 3.0

_Started = Callable[[str, subprocess.Popen[bytes]], None]

_MARK = "valid_license"
_TRUSTED = {"fedpriv": "bundles by their hash"}


def bundle_hash(files: Mapping[str, bytes]) -> str:
    """The SHA-256 of the bundle that `flwr run` makes of an app.

    Args:
        files: The app's files, by name.
    """
    return hashlib.sha256(build_fab_from_files(dict(files))[0]).hexdigest()


def why_refused(fab: Fab, run: Run | None, accepted: Collection[str]) -> str:
    """Why a bundle must not run on this node; empty if it may.

    Args:
        fab: The bundle, as the server sent it.
        run: The run that it is for, as the server described it.
        accepted: SHA-256 hashes of the bundles that may run.
    """
    digest = hashlib.sha256(fab.content).hexdigest()
    if digest not in accepted:
        return f"its hash is {digest}, which this node does not accept"
    if run is None or run.fab_hash != digest or fab.hash_str != digest:
        return "the server names another bundle than it sends"
    if (run.fab_id, run.fab_version) != get_metadata_from_config(get_fab_config(fab.content)):
        return "the server gives it another name or version than it has"
    if run.primary_task_type == TaskType.AGENT_APP:
        return "the run is an agent's"
    return ""


@contextmanager
def accepting_only(accepted: Collection[str]) -> Iterator[None]:
    """Makes this process's SuperNode refuse every bundle but some.

    Args:
        accepted: Their SHA-256 hashes.
    """
    pull, verify = supernode._pull_and_store_message, supernode._verify_fab
    supernode._pull_and_store_message = _judging(pull, accepted)
    supernode._verify_fab = lambda fab, _: hashlib.sha256(fab.content).hexdigest() in accepted
    try:
        yield
    finally:
        supernode._pull_and_store_message, supernode._verify_fab = pull, verify


def _judging(pull: Callable[..., int | None], accepted: Collection[str]) -> Callable[..., int | None]:
    """`_pull_and_store_message`, which sees bundles only once they have been judged."""

    def pull_and_judge(**arguments: Any) -> int | None:
        get_run, get_fab = arguments["get_run"], arguments["get_fab"]
        runs: dict[int, Run] = {}

        def remembered(run_id: int) -> Run:
            runs[run_id] = get_run(run_id)
            return runs[run_id]

        def judged(fab_hash: str, run_id: int) -> Fab:
            fab = get_fab(fab_hash, run_id)
            reason = why_refused(fab, runs.get(run_id), accepted)
            if reason:
                log(ERROR, "This node refuses the app of run %s: %s.", run_id, reason)
                return Fab(fab.hash_str, b"", {})
            return Fab(fab.hash_str, fab.content, {_MARK: "accepted"})

        return pull(**{**arguments, "get_run": remembered, "get_fab": judged, "trusted_entities": _TRUSTED})

    return pull_and_judge


def run_supernode(options: Sequence[str], accepted: Collection[str]) -> int:
    """Runs Flower's SuperNode in this process until it ends.

    Args:
        options: Those of `flower-supernode`.
        accepted: SHA-256 hashes of the bundles that may run.

    Returns:
        Its exit code.

    Raises:
        UserError: If the server answers that it does not take this node, or takes it no more.
    """
    watch = _Watch()
    with accepting_only(accepted), accompanied(supernode, watch.started), watch, _patient(), _listening() as heard:
        try:
            code = run_flower("flower-supernode", _supernode, options)
        except httpx.HTTPStatusError as error:
            raise _explained(error.response) from None
    if heard.removed:
        remedy = "Ask the server's operator; a removed key is never taken back, and a new one has to be registered"
        raise UserError("node.key", "a key that the server knows", "one that it has removed", remedy)
    if heard.refused is not None:
        if not heard.taken:
            raise _explained(heard.refused)
        print(f"fedpriv: {_explained(heard.refused)}", file=sys.stderr)
        return 1  # it may be right again, and the node started again
    return code if watch.fallen is None else watch.say()


@contextmanager
def accompanied(starter: Any, started: _Started = lambda *_: None) -> Iterator[None]:
    """Makes the processes that a module of Flower's starts end with this one, which holds the lock in FLWR_HOME.

    Args:
        starter: The module; it calls `subprocess.Popen`.
        started: Called with each program's name and its process.
    """
    before = starter.subprocess
    starter.subprocess = starting_companions(str(Path(os.environ.get("FLWR_HOME", ""), LOCK)), started)
    try:
        yield
    finally:
        starter.subprocess = before


class _Watch:
    """Ends this process, a node, as Ctrl-C does, if a process that it has started ends before it.

    A node without its SuperExec would stay with its server and answer nothing.

    Attributes:
        fallen: What to say about the process that ended before its time; None if none did.
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
        """Say in one line what ended, and return the exit code with which systemd starts the node again."""
        print(f"fedpriv: {self.fallen}", file=sys.stderr, flush=True)
        return 1

    def started(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Watches a process from now on."""
        threading.Thread(target=self._wait, args=(name, process), daemon=True).start()

    def _wait(self, name: str, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if self._ending.wait(_ENDING_SECONDS):
            return
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        remedy = "Start the node again, if systemd does not; its log may say more"
        self.fallen = UserError("this node", f"{name} to run as long as the node does", f"one that {how}", remedy)
        os.kill(os.getpid(), signal.SIGINT)
        if not self._over.wait(_ENDING_SECONDS):
            os._exit(self.say())


def _supernode() -> None:
    """Flower's, but a node whose connection has failed ends, and can be started again."""
    flower_supernode()
    flwr_exit(ExitCode.SUPERNODE_CONNECTION_ERROR, "The connection to the SuperLink has ended.")


@contextmanager
def _patient() -> Iterator[None]:
    """Lets a node ask again if the server does not take it.

    A server believes for a minute that a node is there which was killed, and refuses it meanwhile.
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
                log(WARN, "The server does not know this node's key, or believes that the node is there already.")
                time.sleep(_PAUSE_SECONDS)

    FleetHttpClient.ActivateNode = activate_patiently
    try:
        yield
    finally:
        FleetHttpClient.ActivateNode = activate


@dataclass
class _Heard:
    """What a server has said to a node that shows who it is.

    Args:
        key: The node's public key, once it was sent.
        taken: Whether the server took the node.
        refused: The answer that did not believe the node to be who it says; None: none.
        removed: Whether that is because the server takes its key no more.
    """

    key: bytes = b""
    taken: bool = False
    refused: httpx.Response | None = None
    removed: bool = False
    _one_by_one: Any = field(default_factory=threading.RLock, repr=False)

    def note(self, client: FleetHttpClient, answer: httpx.Response) -> None:
        """Takes note of the first refusal, and finds out what it means.

        A server answers a removed node as it answers one whose clock is wrong. But it looks at the clock first: a node
        that is told that nodes do not register themselves has the right time.
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
    """Keeps why a server does not take a node any more; the node then ends, as Flower's do."""
    heard, ask, beat = _Heard(), FleetHttpClient._unary_unary, FleetHttpClient.SendNodeHeartbeat

    def ask_and_listen(self: FleetHttpClient, **arguments: Any) -> Any:
        request = arguments["request"]
        heard.key = getattr(request, "public_key", b"") or heard.key
        try:
            answer = ask(self, **arguments)
            heard.taken = heard.taken or isinstance(request, ActivateNodeRequest)
            return answer
        except httpx.HTTPStatusError as error:
            refused = error.response.status_code == httpx.codes.UNAUTHORIZED
            if refused and not isinstance(request, SendNodeHeartbeatRequest):
                heard.note(self, error.response)
            raise

    def beat_quietly(self: FleetHttpClient, request: SendNodeHeartbeatRequest) -> SendNodeHeartbeatResponse:
        """Leaves it to the main thread to hear of a refusal, which asks every few seconds, and then ends the node.

        A second end, from the heartbeat's thread, would come like a second Ctrl-C, which stops the first one halfway.
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


def _code(answer: httpx.Response) -> int | None:
    said = FlowerError.from_json(answer.text)
    return None if said is None else said.code


def _explained(answer: httpx.Response) -> UserError:
    """What a server's refusal of this node means."""
    if _code(answer) == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        remedy = "Send node.pub to whoever runs admin/register.sh; if it is registered, stop the node that runs with it"
        got = "one that the server does not know, has removed, or sees in use"
        return UserError("node.key", "a key that is registered and not in use", got, remedy)
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        remedy = "Set this machine's clock and the server's by NTP; they must agree to a few seconds"
        return UserError("the server", "a node whose signature is right and fresh", "one that it refuses", remedy)
    return UserError("the server", "an answer to this node", f"HTTP status {answer.status_code}", "See its log")


def run_flower(name: str, program: Callable[[], None], options: Sequence[str]) -> int:
    """Runs one of Flower's programs in this process, silent towards the outside; returns its exit code.

    Raises:
        httpx.HTTPStatusError: If it ended because a server refused what it asked.
    """
    os.environ.update(QUIET)
    telemetry.FLWR_TELEMETRY_ENABLED = "0"  # read when Flower was imported, before the line above
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
