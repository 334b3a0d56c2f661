"""Wrong inputs to `fedpriv deploy`: one line that names the value and the remedy, exit code 2, and nothing changes."""

import json
import re
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from loopback import free_port

from fedpriv.cli import main
from fedpriv.deploy.operate.backup import back_up
from fedpriv.deploy.operate.rotation import begin_rotation
from fedpriv.deploy.setup.certificates import Authority
from fedpriv.deploy.setup.provision import Deployment, init_deployment

DAMAGED = b"\x00\xff\xfe no text \x80"
Preparation = Callable[[Path], object]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong") / "d"
    facts = Deployment(host="127.0.0.1", port=free_port(), nodes=2, trust="aggregator", helpers=1)
    init_deployment(folder, facts)
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    made = tmp_path / "d"
    shutil.copytree(template, made)
    config = made / "admin" / "config.toml"
    config.write_text(config.read_text().replace(str(template), str(made)))
    return made


def damaged(name: str, content: bytes = DAMAGED) -> Preparation:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def gone(name: str) -> Preparation:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return change


def foreign_ca(folder: Path) -> None:
    (folder / "ca" / "ca.key").write_bytes(Authority.make().pair.private)


def copied(folder: Path) -> None:
    back_up(folder / "node-0", folder / "copy.tar")


def foreign_tar(folder: Path) -> None:
    tarfile.open(folder / "copy.tar", "w").close()


def rotating(then: Preparation = lambda _: None) -> Preparation:
    def change(folder: Path) -> None:
        begin_rotation(folder / "node-0")
        then(folder)

    return change


def nothing(_: Path) -> None: ...


def seen(folder: Path) -> dict[str, bytes]:
    """Return all files; locks come and go, and hold nothing."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["deploy", *arguments])
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


# Command, what is done to the deployment D before, and a pattern of the line.
CASES: dict[str, tuple[str, Preparation, str]] = {
    "init over a file": ("init D/README.md --nodes 2 --host a.b", nothing, "new one, got a file"),
    "init below a file": ("init D/README.md/x --nodes 2 --host a.b", nothing, "README.md: .* Correct the path"),
    "init, trust": ("init D/../n --nodes 2 --host a.b --trust locl", nothing, "^fedpriv: --trust: "),
    "init, no number": ("init D/../n --nodes two --host a.b", nothing, "--nodes"),
    "init, days": ("init D/../n --nodes 2 --host a.b --days 0", nothing, "--days: expected a whole number"),
    "add to a node": ("add D/node-0", nothing, "got the folder of a node"),
    "add, no admin": ("add D", gone("admin"), "without it. Move admin/ back"),
    "add, no ca": ("add D", gone("ca"), "ca.key: expected the CA's file"),
    "add, another ca": ("add D", foreign_ca, "the key of another certificate"),
    "add, damaged settings": ("add D", damaged("deployment.toml"), "deployment.toml: .* not text"),
    "add, wrong settings": ("add D", damaged("deployment.toml", b"nodes = 2"), "deployment.toml: host: "),
    "add, a folder exists": ("add D", damaged("node-2/state/ledger.jsonl"), "node-2: .* Move it away"),
    "add, damaged identity": ("add D", damaged("admin/helpers/helper-0.pub"), "helper-0.pub: expected an identity"),
    "add, damaged clients": ("add D", damaged("admin/clients.toml"), "clients.toml: "),
    "add, damaged removed keys": ("add D", damaged("admin/removed-keys"), "removed-keys: "),
    "add, half a removed key": ("add D", damaged("admin/removed-keys", b"ssh x"), "removed-keys, line 1: "),
    "add, damaged certificate": ("add D", damaged("server/server.pem"), "server.pem: "),
    "add, damaged manifests": ("add D", damaged("bundles.sha256"), "bundles.sha256: "),
    "register a node": ("register D/node-0", nothing, "got the folder of a node"),
    "register, no connection": ("register D", gone("admin/config.toml"), "config.toml: .* Restore"),
    "register, damaged connection": ("register D", damaged("admin/config.toml"), "config.toml: .* not text"),
    "register, no TOML": ("register D", damaged("admin/config.toml", b"[[["), "config.toml: expected a TOML file"),
    "register, no table": ("register D", damaged("admin/config.toml", b"[superlink]\ndeployment = 3"), "config.toml: "),
    "register, damaged CA": ("register D", damaged("admin/ca.crt"), "ca.crt: expected a certificate"),
    "register, no server": ("register D", nothing, r"the server at 127.0.0.1:\d+: .* got silence. Start it with"),
    "remove nobody": ("remove '' D", nothing, "^fedpriv: NAME: .* got ''. Known: "),
    "remove another": ("remove nod-1 D", nothing, "got 'nod-1'. Did you mean 'node-1'"),
    "remove, no server": ("remove node-1 D", nothing, r"the server at 127.0.0.1:\d+: "),
    "remove, damaged connection": ("remove node-1 D", damaged("admin/config.toml"), "config.toml: .* not text"),
    "renew a server": ("renew D/server", nothing, "got the folder of a server"),
    "renew, a date": ("renew D --days 2030-01-01", nothing, "--days"),
    "renew, another ca": ("renew D", foreign_ca, "the key of another certificate. Restore"),
    "renew, damaged settings": ("renew D --host x.y", damaged("server/server.toml"), "server.toml: "),
    "status of a node": ("status D/node-0", nothing, "got the folder of a node"),
    "status, damaged keys": ("status D", damaged("admin/removed-keys"), "removed-keys: "),
    "list of runs": ("list D", damaged("server/flower/run-directories"), "run-directories: .* not text"),
    "node of a deployment": ("node D/ca", nothing, "a node or a helper, got the folder ca .* Give node-I or helper-J"),
    "node, damaged settings": ("node D/node-0", damaged("node-0/node.toml"), "node.toml: "),
    "node, wrong settings": ("node D/node-0", damaged("node-0/node.toml", b""), "node.toml: superlink: "),
    "node, wrong policy": ("node D/node-0", damaged("node-0/fedpriv-client.toml", b"[limits]"), "client.toml: limits"),
    "node, damaged manifest": ("node D/node-0", damaged("node-0/MANIFEST.sha256"), "MANIFEST.sha256 cannot be read"),
    "ledger of a server": ("ledger D/server", nothing, "a node, got the folder of a server. Give node-I in"),
    "ledger of nothing": ("ledger D/none", nothing, "got a missing folder"),
    "ledger, damaged head": ("ledger D/node-0", damaged("node-0/state/ledger.head"), "ledger.head: .* damaged"),
    "server of a deployment": ("server D", nothing, "got the folder of a whole deployment. Give .*/server"),
    "server, wrong settings": ("server D/server", damaged("server/server.toml", b""), "server.toml: address: "),
    "backup of admin": ("backup D/admin D/../b.tar", nothing, "a server, a node or a helper, got the folder admin"),
    "backup to nowhere": ("backup D/node-0 D/none/b.tar", nothing, "b.tar: .* Create "),
    "backup, damaged head": ("backup D/node-0 D/../b.tar", damaged("node-0/state/ledger.head"), "ledger.head: "),
    "backup, damaged database": ("backup D/server D/../b.tar", damaged("server/flower/superlink.db"), "superlink.db: "),
    "restore over a file": ("restore D/copy.tar D/README.md --charge all", copied, "got a file. Give FILE, then DIR"),
    "restore over a deployment": ("restore D/copy.tar D", copied, "a node, .* got the folder of a whole deployment"),
    "restore another tar": ("restore D/copy.tar D/node-0", foreign_tar, "copy.tar: .* different file"),
    "restore, charge": ("restore D/copy.tar D/node-0 --charge much", copied, "--charge: .* got 'much'"),
    "rotate of a server": ("rotate key D/server", nothing, "a node or a helper, got the folder of a server"),
    "rotate of nothing": ("rotate key D/none", nothing, "got a missing folder"),
    "accept a number": ("rotate accept D/h D", damaged("h", b"1"), "h: expected a handover"),
    "finish a server": ("rotate finish D/server", nothing, "a node or a helper, got the folder of a server"),
    "finish, damaged new key": (
        "rotate finish D/node-0",
        rotating(damaged("node-0/rotation/node.key")),
        "rotation/node.key: ",
    ),
    "finish, no old key": ("rotate finish D/node-0", rotating(gone("node-0/node.key")), "node-0/node.key: "),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_input_is_one_line_and_changes_nothing(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, prepare, pattern = CASES[case]
    monkeypatch.setenv("FLWR_HOME", str(folder / "none"))
    prepare(folder)
    before = seen(folder)
    words = ["" if word == "''" else re.sub(r"^D(?=/|$)", str(folder), word) for word in command.split()]
    code, out, error = said(capsys, *words)
    assert (code, out, error.count("\n")) == (2, "", 1), (out, error)
    assert re.search(pattern, error), error
    assert seen(folder) == before
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}


DAMAGES = {
    "node-0": ["state/ledger.jsonl", "state/ledger.head", "ledger.key", "signing.key", "MANIFEST.sha256"],
    "": ["deployment.toml", "bundles.sha256", "admin/removed-keys", "admin/nodes/node-0.pub"],
}


def test_check_finds_every_damaged_file_of_a_node_and_of_a_deployment(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert said(capsys, "check", str(folder), "--no-connect")[0] == 0
    for place, names in DAMAGES.items():
        for name in names:
            path = folder / place / name
            whole = path.read_bytes() if path.exists() else None
            damaged(f"{place}/{name}" if place else name, DAMAGED + b"\n")(folder)
            code, out, _ = said(capsys, "check", str(folder / place), "--no-connect")
            assert code == 2, name
            assert any(path.name in line and " wrong " in line for line in out.splitlines()), out
            path.unlink() if whole is None else path.write_bytes(whole)


def test_a_port_that_is_used_is_named_before_the_server_starts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = int(re.search(r":(\d+)", (folder / "server" / "server.toml").read_text())[1])  # type: ignore[index]
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        code, _, error = said(capsys, "server", str(folder / "server"))
    assert (code, error.count("\n")) == (2, 1)
    assert f":{port}: expected a free port of this machine" in error


def test_a_new_address_keeps_what_the_administrator_wrote(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = folder / "server" / "server.toml"
    settings.write_text(settings.read_text().replace('"::1"]', '"::1", "10.0.0.7"]'))
    before = settings.read_text()
    assert said(capsys, "renew", str(folder), "--host", "fl.example.org")[0] == 0
    after = settings.read_text()
    assert 'address = "fl.example.org:' in after
    assert after.replace("fl.example.org", "127.0.0.1") == before


def test_an_interrupted_add_can_be_repeated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command stopped after the list of clients was written: the new key takes the place of the old one."""
    text = (folder / "deployment.toml").read_text()
    assert said(capsys, "add", str(folder), "--no-register")[0] == 0
    (folder / "deployment.toml").write_text(text)
    shutil.move(folder / "node-2", folder.parent / "away")
    assert said(capsys, "add", str(folder), "--no-register")[0] == 0
    assert said(capsys, "add", str(folder), "--no-register")[0] == 0
    lines = (folder / "admin" / "clients.toml").read_text().splitlines()
    assert [line.split(" = ")[0] for line in lines[2:]] == ["0", "1", "2", "3"]


def test_nodes_that_a_silent_server_did_not_register_are_named_with_one_next_step(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = said(capsys, "add", str(folder), "--nodes", "2")
    assert code == 2
    assert out.splitlines() == [f"made        node-2, node-3 in {folder}"]
    assert error.count("\n") == 1
    assert "node-2, node-3: not registered, because the server at 127.0.0.1:" in error
    assert error.rstrip().endswith(f"then run: fedpriv deploy register {folder}")


def test_a_key_that_is_damaged_is_named_by_its_file(folder: Path) -> None:
    from fedpriv.deploy.setup.roster import Roster

    damaged("admin/nodes/node-1.pub")(folder)
    assert Roster.read(folder).damaged == ["node-1"]


def test_a_status_before_any_run_has_no_columns_of_rounds(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = said(capsys, "status", str(folder))
    assert "run         none yet" in out
    assert "0/0" not in out
    assert "counted" not in out
    assert json.loads(said(capsys, "status", str(folder), "--json")[1])["now"].endswith("Z")
