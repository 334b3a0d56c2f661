import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
import tomllib
from types import SimpleNamespace

import httpx
import pytest
from deploy_names import HOST
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.exit.exit_handler import trigger_exit_handlers
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode import start_client_internal as supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate import NodeStateFactory

from fedpriv import __version__
from fedpriv.cli import main
from fedpriv.deploy.checks import WrongServerError
from fedpriv.deploy.setup import supernode as node
from fedpriv.deploy.setup import texts as deploy_texts
from fedpriv.deploy.setup.provision import Deployment, init_deployment
from fedpriv.errors import UserError
from fedpriv.flower import companion
from fedpriv.flower.bundle import app_files, app_hash
from fedpriv.flower.internals import supernode as supernode_internals
from fedpriv.flower.internals.app import inside_a_run
from fedpriv.flower.internals.supernode import accepting_only, own_bundle, run_flower, why_refused

RUN = 7
NODE = 42
GOOD = build_fab_from_files(dict(app_files()))[0]
OTHER = build_fab_from_files({**app_files(), "fedpriv_client.py": b"app = 'mine'\n"})[0]


def digest(content):
    return hashlib.sha256(content).hexdigest()


def make_run(content=GOOD, **changes):
    run = Run.create_empty(RUN)
    values = {"fab_hash": digest(content), "fab_id": "fedpriv/fedpriv-run", "fab_version": __version__, **changes}
    for name, value in values.items():
        setattr(run, name, value)
    return run


def ask():
    with inside_a_run(RUN):
        message = Message(RecordDict({"config": ConfigRecord({"a": 1})}), dst_node_id=NODE, message_type="query")
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def pull(fab, run, accepted, own=None):
    """Return the state after one message of a run with bundle `fab`, and the error replies."""
    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    state, store, message = factory.state(), factory.objectstore_factory.store(), ask()
    state.set_node_id(NODE)
    objects = get_all_nested_objects(message)
    tree = get_object_tree(message)
    confirmed = []

    def get_fab(*_):
        assert fab is not None, "the run's own bundle was requested"
        return fab

    with accepting_only(accepted, own):
        # Called as `start_client_internal` does: by the module's name, with keywords only.
        supernode._pull_and_store_message(
            state=state,
            object_store=store,
            node_config={},
            receive=lambda: (message, tree),
            get_run=lambda _: run,
            get_fab=get_fab,
            pull_object=lambda _, object_id: objects[object_id].deflate(),
            confirm_message_received=lambda _, message_id: confirmed.append(message_id),
            trusted_entities=None,
        )
    replies = state.get_messages_legacy(is_reply=True)
    return state, [reply.error.code for reply in replies if reply.has_error()], confirmed


def test_the_deployments_own_app_is_run():
    state, errors, confirmed = pull(Fab(digest(GOOD), GOOD, {}), make_run(), {app_hash()})
    assert (errors, len(confirmed)) == ([], 1)
    fab = state.get_fab(digest(GOOD))
    assert fab is not None
    assert fab.content == GOOD


LIES = {
    "another app": (Fab(digest(OTHER), OTHER, {}), make_run(OTHER)),
    "another app under the right hash": (Fab(digest(GOOD), OTHER, {}), make_run()),
    "another app that a signature vouches for": (
        Fab(digest(OTHER), OTHER, {"valid_license": "Valid"}),
        make_run(OTHER),
    ),
    "the right app under another hash": (Fab(digest(OTHER), GOOD, {}), make_run(OTHER)),
    "the right app under another name": (Fab(digest(GOOD), GOOD, {}), make_run(fab_id="../fedpriv-run")),
    "the right app under another version": (Fab(digest(GOOD), GOOD, {}), make_run(fab_version="../../state")),
    "the right app as an agent": (Fab(digest(GOOD), GOOD, {}), make_run(primary_task_type=TaskType.AGENT_APP)),
    "no app": (Fab(digest(b""), b"", {}), make_run(b"")),
}


@pytest.mark.parametrize("lie", LIES)
def test_any_other_is_answered_with_an_error_and_nothing_of_it_is_kept(lie):
    fab, run = LIES[lie]
    with inside_a_run(RUN, NODE):
        state, errors, confirmed = pull(fab, run, {app_hash()})
    assert errors == [ErrorCode.INVALID_FAB]
    assert not confirmed
    assert state.get_run(RUN) is None
    assert state.get_fab(fab.hash_str) is None
    assert state.get_run_series_context(run.series_id) is None


def test_an_app_that_the_operator_lists_is_run():
    run = make_run(OTHER)
    assert not why_refused(Fab(digest(OTHER), OTHER, {}), run, {app_hash(), digest(OTHER)})
    _, errors, _ = pull(Fab(digest(OTHER), OTHER, {}), run, {app_hash(), digest(OTHER)})
    assert not errors


def test_a_helper_takes_part_in_the_run_of_any_app_and_never_asks_for_its_bundle():
    run = make_run(OTHER, fab_id="me/app", fab_version="3.0", override_config={"helpers": "mine"})
    state, errors, confirmed = pull(None, run, {app_hash()}, own_bundle(app_files()))
    assert (errors, len(confirmed)) == ([], 1)
    kept = state.get_run(RUN)
    assert kept is not None
    assert (kept.fab_hash, kept.fab_id, kept.fab_version) == (app_hash(), "fedpriv/fedpriv-run", __version__)
    fab, context = state.get_fab(app_hash()), state.get_run_series_context(run.series_id)
    assert fab is not None
    assert fab.content == GOOD
    assert context is not None
    assert not context.run_config["helpers"]


def test_a_helper_is_no_agent():
    with inside_a_run(RUN, NODE):
        run = make_run(OTHER, primary_task_type=TaskType.AGENT_APP)
        _, errors, _ = pull(None, run, {app_hash()}, own_bundle(app_files()))
    assert errors == [ErrorCode.INVALID_FAB]


def test_a_refused_app_reaches_flower_empty(monkeypatch):
    seen = []
    monkeypatch.setattr(supernode, "_pull_and_store_message", lambda **given: seen.append(given["get_fab"]("", RUN)))
    with accepting_only({app_hash()}):
        supernode._pull_and_store_message(get_run=None, get_fab=lambda *_: Fab(digest(OTHER), OTHER, {}))  # pyright: ignore
    assert (seen[0].content, seen[0].verifications) == (b"", {})


def test_flower_is_left_as_it_was():
    before = supernode._pull_and_store_message, supernode._verify_fab
    with pytest.raises(KeyError), accepting_only(set()):
        raise KeyError
    assert (supernode._pull_and_store_message, supernode._verify_fab) == before


def test_flowers_node_pulls_messages_through_what_is_replaced(monkeypatch):
    """This fails if `start_client_internal` does not look the function up by name, or calls it without keywords."""
    seen = {}

    class Stopped(BaseException):
        pass

    def stop(**given):
        seen.update(given)
        given["get_fab"]("", RUN)

    def get_fab(*_):
        raise Stopped

    class Connection:
        def __enter__(self):
            return (NODE, None, None, None, get_fab, None, None, None)

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(supernode, "_pull_and_store_message", stop)
    monkeypatch.setattr(supernode, "_init_connection", lambda **_: Connection())
    monkeypatch.setattr(supernode, "register_signal_handlers", lambda **_: None)
    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    with pytest.raises(Stopped), accepting_only(set()):
        supernode.start_client_internal(
            state_factory=factory, server_address="x:1", node_config={}, insecure=True, isolation="process"
        )
    assert seen["trusted_entities"]
    assert {"get_run", "get_fab"} <= set(seen)


def refusal(code, status=400):
    request = httpx.Request("POST", "https://x/v1/fleet/activate-node")
    answer = httpx.Response(status, json={"code": code, "detail": "no"}, request=request)
    return httpx.HTTPStatusError("no", request=request, response=answer)


def activation(monkeypatch, outcomes, patience=60.0):
    """Request activation; the server answers with `outcomes`, one after the other."""
    tried = []

    def activate(_, request):
        tried.append(request)
        outcome = outcomes[min(len(tried), len(outcomes)) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(FleetHttpClient, "ActivateNode", activate)
    monkeypatch.setattr(supernode_internals, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(supernode_internals, "_PATIENCE_SECONDS", patience)

    def program():
        try:
            assert FleetHttpClient.ActivateNode(None, "request") == "welcome"  # pyright: ignore
        except httpx.HTTPStatusError:
            raise SystemExit(1)  # noqa: B904  (as Flower does)
        raise SystemExit(0)

    monkeypatch.setattr(supernode_internals, "flower_supernode", program)
    return supernode_internals.run_supernode([], set()), len(tried)


def test_a_node_that_was_killed_waits_until_the_server_takes_it_back(monkeypatch):
    assert activation(monkeypatch, [refusal(2004), refusal(2004), "welcome"]) == (0, 3)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (refusal(2004), "node.key: expected a key that is registered"),
        (refusal(0, 401), "Set this machine's clock"),
        (refusal(1, 500), "HTTP status 500"),
    ],
)
def test_a_node_that_the_server_refuses_says_what_to_do(monkeypatch, error, line):
    with pytest.raises(UserError, match=line):
        activation(monkeypatch, [error], patience=0.0)


def taken(monkeypatch, when_registering, beats=False):
    """Run a node that the server accepts and then rejects; the server answers registrations with `when_registering`."""
    asked = []

    def ask(_, *, request, **__):
        asked.append(type(request).__name__)
        if isinstance(request, ActivateNodeRequest):
            return ActivateNodeResponse(node_id=NODE)
        raise when_registering if isinstance(request, RegisterNodeFleetRequest) else refusal(0, 401)

    def program():
        client = FleetHttpClient("https://x")
        client.ActivateNode(ActivateNodeRequest(public_key=b"key"))
        if beats:
            assert client.SendNodeHeartbeat(SendNodeHeartbeatRequest()).success
        with pytest.raises(httpx.HTTPStatusError):
            client.PullMessages(PullMessagesRequest())
        raise SystemExit(0)  # as Flower does, once it has logged that it ended gracefully

    monkeypatch.setattr(FleetHttpClient, "_unary_unary", ask)
    monkeypatch.setattr(supernode_internals.os, "kill", lambda *_: pytest.fail("ended a second time"))
    monkeypatch.setattr(supernode_internals, "flower_supernode", program)
    try:
        return supernode_internals.run_supernode([], set())
    finally:
        assert asked.count("RegisterNodeFleetRequest") == 1


@pytest.mark.parametrize("beats", [False, True])
def test_a_node_that_was_removed_says_so_in_one_line_and_is_not_started_again(monkeypatch, beats):
    """Its heartbeat, in a separate thread, neither prints the line nor ends the node; the main thread does."""
    line = r"^node\.key: expected a registered key, got a key that the server has removed\."
    with pytest.raises(UserError, match=line):
        taken(monkeypatch, refusal(2001), beats)


def test_a_node_whose_clock_went_wrong_is_not_taken_for_a_removed_one(monkeypatch, capsys):
    """The server's answer is the same; with this exit code, systemd restarts the node."""
    assert taken(monkeypatch, refusal(0, 401)) == 1
    assert "fedpriv: the server: expected a valid and recent signature" in capsys.readouterr().err


def test_a_node_that_the_server_never_took_was_not_removed(monkeypatch):
    def ask(_, *, request, **__):
        raise refusal(2001) if isinstance(request, RegisterNodeFleetRequest) else refusal(0, 401)

    def program():
        with pytest.raises(httpx.HTTPStatusError):
            FleetHttpClient("https://x").ActivateNode(ActivateNodeRequest(public_key=b"key"))
        raise SystemExit(0)

    monkeypatch.setattr(FleetHttpClient, "_unary_unary", ask)
    monkeypatch.setattr(supernode_internals, "flower_supernode", program)
    with pytest.raises(UserError, match="Set this machine's clock"):
        supernode_internals.run_supernode([], set())


def with_a_child(monkeypatch, code, meanwhile):
    """Run a node that starts a process with Python `code`, then call `meanwhile`; return the node's exit code."""
    started = []

    def stop(*_):
        raise SystemExit(0)  # as Flower's handler does, once it has logged that the node ended gracefully

    def start(_):
        started.append(subprocess.Popen([sys.executable, "-c", code]))
        return started[-1]

    def program():
        supernode.subprocess.Popen(  # pyright: ignore[reportPrivateImportUsage]
            ["flower-superexec", "--insecure"]
        )
        meanwhile(started[0])
        raise SystemExit(0)

    monkeypatch.setattr(companion, "subprocess", SimpleNamespace(Popen=start))
    monkeypatch.setattr(supernode_internals, "_ENDING_SECONDS", 0.3)
    monkeypatch.setattr(supernode_internals, "flower_supernode", program)
    before = signal.signal(signal.SIGINT, stop)
    try:
        return supernode_internals.run_supernode([], set())
    finally:
        signal.signal(signal.SIGINT, before)
        started[0].kill()
        started[0].wait()


WAITING = "import time; time.sleep(60)"


def kill_and_wait(child):
    child.kill()
    time.sleep(30.0)


@pytest.mark.parametrize(
    ("code", "meanwhile", "how"),
    [
        (WAITING, kill_and_wait, "an end by signal 9"),
        ("raise SystemExit(3)", lambda _: time.sleep(30.0), "an end with exit code 3"),
    ],
    ids=["killed", "ended"],
)
def test_a_node_whose_superexec_ends_says_so_in_one_line_and_ends(monkeypatch, capsys, code, meanwhile, how):
    """With its exit code, systemd restarts it; with 2 it would not."""
    assert "RestartPreventExitStatus=2" in deploy_texts.SERVICE.template
    began = time.monotonic()
    assert with_a_child(monkeypatch, code, meanwhile) == 1
    assert time.monotonic() - began < 20.0
    said = capsys.readouterr().err
    line = "fedpriv: this node: expected flower-superexec to run as long as the node does, got "
    assert said.startswith(f"{line}{how}. Read the node's log")
    assert said.count("\n") == 1


def test_a_node_that_hangs_as_it_ends_is_ended_with_the_same_line_and_code(monkeypatch, capsys):
    codes = []

    def hang(child):
        try:
            kill_and_wait(child)
        finally:
            time.sleep(1.5)

    monkeypatch.setattr(supernode_internals.os, "_exit", codes.append)
    with_a_child(monkeypatch, WAITING, hang)
    assert codes == [1]
    assert "an end by signal 9" in capsys.readouterr().err


def test_a_node_that_is_ended_does_not_complain_of_what_ends_with_it(monkeypatch, capsys):
    def end(child):
        child.kill()
        trigger_exit_handlers(run_before_force_exit=True)  # as Flower does when a signal comes
        time.sleep(1.0)

    assert with_a_child(monkeypatch, WAITING, end) == 0
    assert capsys.readouterr().err == ""


def test_flowers_client_asks_through_what_is_replaced_and_gets_it_back(monkeypatch):
    """This fails if Flower's client does not call servers by `_unary_unary` with a `request`."""
    calls = []
    monkeypatch.setattr(FleetHttpClient, "_unary_unary", lambda *_, **given: calls.append(given))
    before = FleetHttpClient._unary_unary, FleetHttpClient.SendNodeHeartbeat
    with supernode_internals._listening():
        FleetHttpClient("https://x").PullMessages(PullMessagesRequest())
        FleetHttpClient("https://x").SendNodeHeartbeat(SendNodeHeartbeatRequest())
    assert [type(given["request"]) for given in calls] == [PullMessagesRequest, SendNodeHeartbeatRequest]
    assert (FleetHttpClient._unary_unary, FleetHttpClient.SendNodeHeartbeat) == before


def test_a_node_calls_nobody_else(monkeypatch):
    from flwr.supercore import telemetry

    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "1")
    for name in supernode_internals.QUIET:
        monkeypatch.delenv(name, raising=False)
    assert run_flower("flower-supernode", lambda: None, []) == 0
    assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"


@pytest.fixture
def started(monkeypatch):
    """Return the arguments of the SuperNode instead of starting it; the environment is restored."""
    for name in ("FLWR_HOME", "PATH", "FEDPRIV_PREPARED", *supernode_internals.QUIET):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    calls = []
    monkeypatch.setattr(supernode_internals, "run_supernode", lambda *given: calls.append(given) or 0)
    monkeypatch.setattr(node, "call_server", lambda *_: 0.0)
    return calls


def test_a_node_is_started_with_its_certificate_key_and_settings(deployment, started, monkeypatch):
    used = []
    monkeypatch.setattr("fedpriv.experiment.build.check_device", lambda *given: used.append(given))
    folder = deployment / "node-1"
    app = "0" * 64
    with (folder / "node.toml").open("a") as file:
        file.write(f'accepted-apps = ["{app}"]\ndevice = "cuda:0"\nruntime-port = 4567\n')
    with pytest.raises(SystemExit) as end:
        main(["deploy", "node", str(folder)])
    assert end.value.code == 0
    assert not used  # a node forks, and CUDA may not have started before
    ((options, accepted, own),) = started
    assert accepted == {app_hash(), app}
    assert own is None
    assert os.environ["FEDPRIV_PREPARED"] == "flwr-clientapp"  # the accepted app may have packages of fedpriv's names
    given = dict(zip(options[::2], options[1::2], strict=True))
    config = tomllib.loads((folder / "flower" / "node-config.toml").read_text())
    assert config == {"partition-id": 1, "num-partitions": 2, "fedpriv-home": str(folder), "device": "cuda:0"}
    assert given == {
        "--superlink": "fl.example.org:9092",
        "--root-certificates": str(folder / "ca.crt"),
        "--auth-supernode-private-key": str(folder / "node.key"),
        "--node-config": str(folder / "flower" / "node-config.toml"),
        "--host": "127.0.0.1",
        "--port": "4567",
    }
    assert os.environ["FLWR_HOME"] == str(folder / "flower")
    assert (folder / "flower").stat().st_mode & 0o777 == 0o700


def test_a_helper_is_started_with_a_bundle_that_it_made_itself(tmp_path, started):
    init_deployment(tmp_path / "d", Deployment(host=HOST, nodes=2, helpers=1, trust="aggregator"))
    with pytest.raises(SystemExit) as end:
        main(["deploy", "node", str(tmp_path / "d" / "helper-0")])
    assert end.value.code == 0
    ((_, accepted, own),) = started
    assert accepted == {app_hash()} == {own.hash_str}
    assert own.content == GOOD


def refused(folder, capsys):
    with pytest.raises(SystemExit) as end:
        main(["deploy", "node", str(folder)])
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_a_folder_that_fails_a_check_is_not_run(deployment, started, capsys):
    (deployment / "node-0" / "node.key").chmod(0o644)
    (deployment / "node-0" / "start-node.sh").write_text("evil")
    line = refused(deployment / "node-0", capsys)
    assert "start-node.sh changed since creation" in line
    assert "other users can read private files" in line
    assert not started


def test_a_node_is_run_once(deployment, started, capsys):
    (deployment / "node-0" / "flower").mkdir()
    with (deployment / "node-0" / "flower" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "got a folder in use" in refused(deployment / "node-0", capsys)
    assert not started


def test_a_node_does_not_talk_to_another_server(deployment, started, capsys, monkeypatch):
    def call(*_):
        raise WrongServerError("x:1", "a certificate for it", "one for x:2", "Find out")

    monkeypatch.setattr(node, "call_server", call)
    assert "expected a certificate for it" in refused(deployment / "node-0", capsys)
    assert not started


def test_a_node_waits_for_a_server_that_is_not_up(deployment, started, monkeypatch):
    def call(*_):
        raise UserError("x:1", "a SuperLink that answers", "silence", "Start it")

    monkeypatch.setattr(node, "call_server", call)
    assert node.run_node(deployment / "node-0") == 0
    assert len(started) == 1


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    assert "expected the folder of a node or a helper, got a missing folder" in refused(tmp_path / "none", capsys)
