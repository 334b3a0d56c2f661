import datetime
import http.server
import shutil
import ssl
import threading
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
from deploy_names import HOST

from fedpriv.cli import main
from fedpriv.deploy.checks import MANIFEST, check_server, split_address
from fedpriv.deploy.device.ledger import account_of
from fedpriv.deploy.setup.certificates import Authority, Pair, make_node_key
from fedpriv.deploy.setup.provision import Deployment, init_deployment
from fedpriv.errors import UserError

DAY = datetime.timedelta(days=1)


def now():
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def check(capsys, folder, *options):
    """Return the exit code and the output as one line of words."""
    with pytest.raises(SystemExit) as end:
        main(["deploy", "check", str(folder), *(options or ["--no-connect"])])
    printed = capsys.readouterr()
    return end.value.code, " ".join((printed.out + printed.err).split())


def authority(folder: Path) -> Authority:
    return Authority.read(Pair((folder / "ca" / "ca.key").read_bytes(), (folder / "ca" / "ca.crt").read_bytes()))


def put_certificate(folder: Path, begin: datetime.datetime, days: int, host: str = HOST) -> None:
    pair = authority(folder).server_pair(host, days, begin)
    (folder / "server" / "server.pem").write_bytes(pair.public)
    (folder / "server" / "server.key").write_bytes(pair.private)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("folder", ["", "server", "admin", "node-0", "node-1"])
def test_what_was_made_passes(deployment, capsys, folder):
    code, printed = check(capsys, deployment / folder)
    assert code == 0
    assert "wrong" not in printed


@pytest.mark.parametrize("folder", ["server", "admin", "node-0"])
def test_a_folder_that_has_moved_passes(deployment, capsys, tmp_path, folder):
    shutil.move(deployment / folder, tmp_path / "here")
    if folder == "admin":
        change(tmp_path / "here" / "config.toml", str(deployment / "admin"), str(tmp_path / "here"))
    assert check(capsys, tmp_path / "here")[0] == 0


def other_ca(folder):
    pair = Authority.make().pair
    (folder / "node-0" / "ca.crt").write_bytes(pair.public)
    (folder / "server" / "ca.crt").write_bytes(pair.public)


def other_key(folder):
    (folder / "node-0" / "node.key").write_bytes(make_node_key().private)


def key_of_another_kind(folder):
    (folder / "node-0" / "node.key").write_bytes((folder / "server" / "server.key").read_bytes())


def key_of_another_certificate(folder):
    (folder / "server" / "server.key").write_bytes((folder / "ca" / "ca.key").read_bytes())


def own_file_without_labels(folder):
    np.savez(folder / "node-0" / "me.npz", inputs=np.zeros((2, 3)))
    change(folder / "node-0" / "fedpriv-client.toml", 'own = ""', 'own = "me.npz"')


DAMAGE = {
    "tampered": (
        "node-0",
        lambda d: change(d / "node-0" / "start-node.sh", "exec", "evil; exec"),
        "start-node.sh changed since creation: find out who changed it",
    ),
    "tampered manifest": (
        "",
        lambda d: change(d / "node-0" / MANIFEST, "  ca.crt", "  ca.crt "),
        f"node-0/{MANIFEST} changed since creation",
    ),
    "other CA": ("node-0", other_ca, "ca.crt changed since creation"),
    "certificate of another CA": (
        "server",
        other_ca,
        "expected a certificate signed by ca.crt, got a certificate of another CA",
    ),
    "readable key": (
        "node-0",
        lambda d: (d / "node-0" / "node.key").chmod(0o640),
        "other users can read private files: chmod 600",
    ),
    "readable folder": (
        "server",
        lambda d: (d / "server").chmod(0o755),
        "other users can read private files: chmod 700",
    ),
    "readable CA": ("", lambda d: (d / "ca" / "ca.key").chmod(0o644), "other users can read private files: chmod 600"),
    "other node key": ("node-0", other_key, "expected the private half of node.pub, got a different key"),
    "node key of another kind": ("node-0", key_of_another_kind, "expected OpenSSH keys without a passphrase"),
    "other server key": ("server", key_of_another_certificate, "expected the key of server.pem, got a different key"),
    "no node key": (
        "node-0",
        lambda d: (d / "node-0" / "node.key").unlink(),
        "node.key missing: copy the whole folder",
    ),
    "no CA": ("node-0", lambda d: (d / "node-0" / "ca.crt").unlink(), "ca.crt missing: copy the whole folder"),
    "no manifest": ("server", lambda d: (d / "server" / MANIFEST).unlink(), f"{MANIFEST} missing"),
    "expired": (
        "server",
        lambda d: put_certificate(d, now() - 9 * DAY, 5),
        "a valid certificate, got a certificate that expired",
    ),
    "not yet valid": ("server", lambda d: put_certificate(d, now() + 2 * DAY, 5), "Set this machine's clock"),
    "other name": (
        "server",
        lambda d: put_certificate(d, now(), 5, "other.example.org"),
        f"expected a certificate for {HOST}, got one for other.example.org, localhost",
    ),
    "node that calls another name": (
        "",
        lambda d: change(d / "node-1" / "node.toml", HOST, "fl2.example.org"),
        "expected a certificate for fl2.example.org",
    ),
    "other version": (
        "node-0",
        lambda d: change(d / "node-0" / "versions.toml", 'flwr = "', 'flwr = "9.'),
        "install the same versions on all machines",
    ),
    "unknown key": (
        "node-0",
        lambda d: change(d / "node-0" / "node.toml", "superlink", "superlnk"),
        "superlnk: expected a known key",
    ),
    "no address": ("node-0", lambda d: change(d / "node-0" / "node.toml", HOST, "https://x"), "expected HOST:PORT"),
    "too large a number": (
        "node-1",
        lambda d: change(d / "node-1" / "node.toml", "partition-id = 1", "partition-id = 2"),
        "below num-partitions (2), got 2",
    ),
    "app that is no hash": (
        "node-0",
        lambda d: change(d / "node-0" / "node.toml", '# accepted-apps = ["..."]', 'accepted-apps = ["any"]'),
        "expected SHA-256 hashes",
    ),
    "policy": (
        "node-0",
        lambda d: change(d / "node-0" / "fedpriv-client.toml", "epsilon = 8.0", "epsilon = -1"),
        "limits.epsilon: expected a finite number above 0",
    ),
    "device": (
        "node-0",
        lambda d: change(d / "node-0" / "node.toml", '# device = "cuda"', 'device = "gpu"  #'),
        "device: expected cpu, cuda, cuda:0, mps, ..., got 'gpu'. Write cuda.",
    ),
    "data folder": (
        "node-0",
        lambda d: change(d / "node-0" / "node.toml", '# data-root = "/path/to/data"', 'data-root = "/none/data"'),
        "data-root: expected an existing folder, got /none/data",
    ),
    "own data": (
        "node-0",
        lambda d: change(d / "node-0" / "fedpriv-client.toml", 'own = ""', 'own = "me.npz"'),
        "me.npz: expected this client's own data, got a missing file",
    ),
    "own data of another kind": (
        "node-0",
        own_file_without_labels,
        "expected inputs, labels and classes, got a file without classes, labels",
    ),
    "own data that are no archive": (
        "node-0",
        lambda d: change(d / "node-0" / "fedpriv-client.toml", 'own = ""', 'own = "node.toml"'),
        "expected an .npz file, got a file of a different format",
    ),
    "insecure": (
        "admin",
        lambda d: change(d / "admin" / "config.toml", "address", "insecure = true\naddress"),
        "it disables TLS",
    ),
    "moved admin": (
        "admin",
        lambda d: change(d / "admin" / "config.toml", "admin/ca.crt", "gone/ca.crt"),
        "Run ./register.sh, which writes it",
    ),
    "administrators": (
        "server",
        lambda d: change(d / "server" / "server.toml", '"::1"', '"everywhere"'),
        "admin-from: expected an IP address, or for admin-from a network",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_each_damage_has_its_line_and_exit_code_2(deployment, capsys, damage):
    folder, do, line = DAMAGE[damage]
    do(deployment)
    code, printed = check(capsys, deployment / folder)
    assert code == 2
    assert line in printed
    assert "wrong" in printed


def test_another_torch_or_python_is_worth_a_note_only(deployment, capsys):
    change(deployment / "node-0" / "versions.toml", 'torch = "', 'torch = "9.')
    code, printed = check(capsys, deployment / "node-0")
    assert code == 0
    assert "note torch" in printed


MIB = 2**20


def leave(monkeypatch, free):
    """Make every disk report this number of free bytes."""
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr("fedpriv.deploy.checks.shutil.disk_usage", lambda _: usage)


@pytest.mark.parametrize("folder", ["node-0", "server"])
@pytest.mark.parametrize(("free", "state", "code"), [(3 * MIB, "wrong", 2), (90 * MIB, "note", 0), (2**40, "ok", 0)])
def test_a_disk_without_room_for_what_is_written_is_said_in_one_line(
    deployment, capsys, monkeypatch, folder, free, state, code
):
    leave(monkeypatch, free)
    found = check(capsys, deployment / folder)
    assert found[0] == code
    taken = (
        "a run as large as the policy accepts (10,000,000" if folder == "node-0" else "a turn of 2 nodes with a model"
    )
    assert f"space {state}" in found[1]
    assert taken in found[1]


def test_a_node_has_room_to_write_its_largest_memory_once_more(deployment, capsys, monkeypatch):
    """The previous one stays until the new one is complete."""
    memory = deployment / "node-0" / "state" / "run-0" / "memory"
    memory.parent.mkdir(parents=True)
    with memory.open("wb") as file:
        file.truncate(200 * MIB)
    leave(monkeypatch, 150 * MIB)
    code, printed = check(capsys, deployment / "node-0")
    assert (code, "space wrong 150 MiB free" in printed) == (2, True)


def test_a_node_shows_the_rest_of_its_budget_and_names_no_adversary_yet(deployment, capsys):
    assert "complete, with 0 lines; epsilon left: 8 of 8" in check(capsys, deployment / "node-0")[1]
    assert account_of(deployment / "node-0" / "state", 8.0, 1e-5, "replace").startswith("spent       epsilon 0 of 8")
    assert "adversary" not in account_of(deployment / "node-0" / "state", 8.0, 1e-5, "replace")


def test_a_policy_for_smaller_models_needs_less_room(deployment, capsys, monkeypatch):
    leave(monkeypatch, 130 * MIB)
    change(deployment / "node-0" / "fedpriv-client.toml", "max_parameters = 10000000", "max_parameters = 1000000")
    assert "space ok" in check(capsys, deployment / "node-0")[1]


@pytest.mark.parametrize("folder", ["nowhere", "ca"])
def test_a_folder_of_another_kind_is_one_line(deployment, capsys, folder):
    code, printed = check(capsys, deployment / folder)
    assert code == 2
    assert printed.startswith(f"fedpriv: {deployment / folder}: expected a folder of a deployment")


@pytest.mark.parametrize(
    "text", ["fl.example.org", "fl.example.org:", ":9092", "https://x:1", "x:0", "x:65536", "x:1e3"]
)
def test_an_address_has_a_host_and_a_port(text):
    with pytest.raises(UserError, match="expected HOST:PORT"):
        split_address(text, "superlink")


class Health(http.server.BaseHTTPRequestHandler):
    offset = 0.0

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def date_time_string(self, timestamp=None):
        when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self.offset)
        return format_datetime(when, usegmt=True) if timestamp is None else super().date_time_string(timestamp)

    def log_message(self, format, *args):  # noqa: A002
        pass


class Quiet(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass


@pytest.fixture
def serve():
    """Start a server with a health page on a free port; return the port."""
    servers = []

    def start(folder=None, offset=0.0, host="127.0.0.1"):
        server = Quiet((host, 0), type("Shifted", (Health,), {"offset": offset}))
        if folder is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(folder / "server" / "server.pem", folder / "server" / "server.key")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server.server_address[1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def found(port, folder, host="127.0.0.1"):
    return [
        (finding.what, finding.state, finding.line)
        for finding in check_server(f"{host}:{port}", folder / "ca" / "ca.crt")
    ]


def test_a_server_with_its_certificate_and_the_right_time_passes(deployment, serve):
    assert [state for _, state, _ in found(serve(deployment), deployment)] == ["ok", "ok"]


def test_a_server_of_another_deployment_is_refused(deployment, serve, tmp_path):
    init_deployment(tmp_path / "other", Deployment(host=HOST, nodes=1))
    ((_, state, line),) = found(serve(tmp_path / "other"), deployment)
    assert state == "wrong"
    assert "ca.crt and the server belong to different deployments" in line


def test_a_server_with_an_expired_certificate_is_refused(deployment, serve):
    put_certificate(deployment, now() - 9 * DAY, 5)
    ((_, state, line),) = found(serve(deployment), deployment)
    assert state == "wrong"
    assert "fedpriv deploy renew" in line


def test_a_server_that_is_called_by_another_name_is_refused(deployment, serve):
    ((_, state, line),) = found(serve(deployment, host="127.0.0.2"), deployment, "127.0.0.2")
    assert state == "wrong"
    assert "Use a name in the server's certificate" in line


def test_a_server_without_tls_is_refused(deployment, serve):
    ((_, state, line),) = found(serve(), deployment)
    assert state == "wrong"
    assert "expected a SuperLink with TLS" in line


def test_a_port_where_nobody_listens_is_wrong(deployment):
    ((_, state, line),) = found(1, deployment)
    assert state == "wrong"
    assert "Start server/start-superlink.sh" in line


@pytest.mark.parametrize(("offset", "state"), [(-20, "wrong"), (-2, "ok"), (30, "ok"), (400, "wrong")])
def test_a_clock_that_the_server_would_refuse_is_wrong(deployment, serve, offset, state):
    findings = found(serve(deployment, offset), deployment)
    assert findings[-1][:2] == ("clock", state)
    assert state == "ok" or ("ahead of" if offset < 0 else "behind") in findings[-1][2]
