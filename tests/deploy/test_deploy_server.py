import asyncio
import os

import pytest
from fastapi.routing import iter_route_contexts
from flwr.superlink import main as superlink
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

from fedpriv.cli import main
from fedpriv.flower.internals import superlink as superlink_internals
from fedpriv.flower.internals.superlink import OnlyFor, guarded


def status(app, path, caller):
    """Return the HTTP status of a POST from an address."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "https",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"x")],
        "client": None if caller is None else (caller, 1234),
        "server": ("x", 9092),
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"]


@pytest.fixture(scope="module")
def app():
    """Return Flower's own server, behind the guard."""
    with guarded(["127.0.0.1", "::1", "10.0.0.0/24"]):
        return superlink.create_app()


def test_strangers_reach_what_nodes_need_and_nothing_else(app):
    """This fails if Flower moves its APIs: then the nodes' API is forbidden, or a kind of path is missing."""
    paths = {str(context.path) for context in iter_route_contexts(app.routes)}
    public = {path for path in paths if status(app, path, "203.0.113.9") != 403}
    assert public == {path for path in paths if path.startswith("/v1/fleet/")} | {"/health"}
    for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/v1/fleet/get-fab"):
        assert path in paths


@pytest.mark.parametrize(
    ("caller", "may"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.77", True),
        ("::ffff:10.0.0.77", True),
        ("10.0.1.77", False),
        ("::ffff:203.0.113.9", False),
        ("2001:db8::1", False),
        ("not an address", False),
        (None, False),
    ],
)
def test_only_listed_networks_administer(app, caller, may):
    assert (status(app, "/v1/control/start-run", caller) != 403) == may


@pytest.mark.parametrize("path", ["/v1/fleet/../control/start-run", "/v1/fleet", "/healthy", "//v1/fleet/get-fab", ""])
def test_a_path_that_only_looks_like_a_nodes_is_nothing_to_strangers(app, path):
    assert status(app, path, "203.0.113.9") in (403, 404)
    assert status(OnlyFor(app, []), path, "203.0.113.9") in (403, 404)


def test_flower_is_left_as_it_was():
    before = superlink.create_app
    with guarded([]):
        assert superlink.create_app is not before
    assert superlink.create_app is before


@pytest.fixture
def started(monkeypatch):
    for name in ("FLWR_HOME", "PATH", "FEDPRIV_PREPARED"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    calls = []
    monkeypatch.setattr(superlink_internals, "run_superlink", lambda *given: calls.append(given) or 0)
    return calls


def test_the_server_is_started_with_tls_and_node_keys(deployment, started):
    with pytest.raises(SystemExit) as end:
        main(["deploy", "server", str(deployment / "server")])
    assert end.value.code == 0
    ((options, networks),) = started
    given = _parse_args_run_superlink().parse_args(options)
    assert given.enable_supernode_auth
    assert not given.insecure
    assert not given.runtime_dependency_install
    assert (given.host, given.port, given.isolation) == ("0.0.0.0", 9092, "subprocess")
    assert (given.ssl_certfile, given.ssl_keyfile) == tuple(
        str(deployment / "server" / name) for name in ("server.pem", "server.key")
    )
    assert given.database == str(deployment / "server" / "flower" / "superlink.db")
    assert set(networks) == {"127.0.0.1", "::1", "0.0.0.0"}
    assert os.environ["FEDPRIV_PREPARED"] == "flwr-serverapp"  # an app of a user may have packages of fedpriv's names


def test_a_server_folder_that_fails_a_check_is_not_run(deployment, started, capsys):
    (deployment / "server" / "server.key").chmod(0o644)
    with pytest.raises(SystemExit) as end:
        main(["deploy", "server", str(deployment / "server")])
    assert end.value.code == 2
    assert "other users can read private files" in capsys.readouterr().err
    assert not started
