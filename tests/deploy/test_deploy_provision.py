import hashlib
import os
import re
import shlex
import shutil
import ssl
import stat
import subprocess
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from deploy_names import HOST
from flwr.cli.build import build_fab_from_disk
from flwr.cli.supernode.register import try_load_public_key

from fedpriv.cli import main
from fedpriv.deploy.device.folder import NodeSettings
from fedpriv.deploy.device.policy import load_policy
from fedpriv.deploy.run import Connection
from fedpriv.deploy.setup.certificates import Authority, Pair
from fedpriv.deploy.setup.check import check_folder
from fedpriv.deploy.setup.provision import Deployment, add_nodes, init_deployment, renew_certificate
from fedpriv.errors import UserError
from fedpriv.flower.bundle import app_hash, write_app

PRIVATE = {"ca.key", "server.key", "node.key"}


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def greets(context, certificate, key, name):
    """Perform a TLS handshake in memory; raise the client's exception."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    wires = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        context.wrap_bio(wires[0], wires[1], server_hostname=name),
        server.wrap_bio(wires[1], wires[0], server_side=True),
    ]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                pass


def strict(ca):
    context = ssl.create_default_context(cafile=ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


def test_private_files_are_their_owners_alone(made):
    files = [path for path in made.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= PRIVATE
    for path in files:
        assert mode(path) == (0o600 if path.name in PRIVATE else 0o755 if path.suffix == ".sh" else 0o644), path
    assert {mode(path) for path in [made, *made.rglob("*")] if path.is_dir()} == {0o700}


def test_no_folder_holds_a_private_key_that_is_not_its_own(made):
    held = {path.name for path in made.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()}
    assert held == PRIVATE
    keys = [(made / f"node-{node}" / "node.key").read_bytes() for node in range(2)]
    assert keys[0] != keys[1]


def test_nothing_that_is_made_is_insecure(made):
    for path in made.rglob("*"):
        assert not path.is_file() or b"insecure" not in path.read_bytes(), path


@pytest.mark.parametrize("name", [HOST, HOST.upper(), "localhost", "127.0.0.1", "::1"])
def test_the_servers_certificate_is_for_the_host_and_this_machine(made, name):
    greets(strict(made / "node-0" / "ca.crt"), made / "server" / "server.pem", made / "server" / "server.key", name)


@pytest.mark.parametrize("name", ["other.example.org", "example.org", "10.0.0.1"])
def test_the_servers_certificate_is_for_nobody_else(made, name):
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        greets(strict(made / "node-0" / "ca.crt"), made / "server" / "server.pem", made / "server" / "server.key", name)


def test_the_server_key_cannot_sign_certificates(made, tmp_path):
    pair = Pair((made / "server" / "server.key").read_bytes(), (made / "server" / "server.pem").read_bytes())
    forged = Authority.read(pair).server_pair(HOST, 1)
    (tmp_path / "key").write_bytes(forged.private)
    (tmp_path / "pem").write_bytes(forged.public + pair.public)
    with pytest.raises(ssl.SSLCertVerificationError):
        greets(strict(made / "ca" / "ca.crt"), tmp_path / "pem", tmp_path / "key", HOST)


@pytest.mark.parametrize(("host", "address"), [("10.1.2.3", "10.1.2.3:9092"), ("2001:db8::1", "[2001:db8::1]:9092")])
def test_a_host_may_be_an_address(tmp_path, host, address):
    folder = tmp_path / "d"
    init_deployment(folder, Deployment(host=host, nodes=1))
    greets(strict(folder / "ca" / "ca.crt"), folder / "server" / "server.pem", folder / "server" / "server.key", host)
    assert NodeSettings.read(folder / "node-0" / "node.toml").superlink == address
    assert all(finding.state == "ok" for found in check_folder(folder, connect=False).values() for finding in found)


def test_a_run_takes_the_folder_that_check_takes(made, tmp_path):
    assert Connection.of(str(made)) == Connection.of(str(made / "admin"))
    assert Connection.of(str(made)).home == (made / "admin").resolve()
    with pytest.raises(UserError, match=r"--deploy: expected the folder of a deployment, got .*Give the folder that"):
        Connection.of(str(tmp_path))


def test_node_keys_are_those_that_flower_takes(made):
    for node in range(2):
        key = load_ssh_private_key((made / f"node-{node}" / "node.key").read_bytes(), None)
        public = made / "admin" / "nodes" / f"node-{node}.pub"
        assert load_ssh_public_key(public.read_bytes()) == key.public_key()
        assert try_load_public_key(public).startswith(b"-----BEGIN PUBLIC KEY-----")


def test_every_node_has_a_number_of_its_own_and_the_policy_that_was_asked_for(tmp_path):
    init_deployment(tmp_path / "d", Deployment(host=HOST, nodes=3, trust="central", epsilon=0.5, delta=1e-7))
    for node in range(3):
        settings = NodeSettings.read(tmp_path / "d" / f"node-{node}" / "node.toml")
        assert (settings.partition_id, settings.num_partitions, settings.accepted_apps) == (node, 3, ())
        policy = load_policy(tmp_path / "d" / f"node-{node}" / "fedpriv-client.toml")
        assert (policy.accepts.trust, policy.limits.epsilon, policy.limits.delta) == ("central", 0.5, 1e-7)


def test_shell_scripts_are_shell_scripts(made):
    scripts = sorted(made.rglob("*.sh"))
    assert len(scripts) == 4
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


def test_a_start_script_without_fedpriv_says_so(made):
    environment = {"PATH": "/usr/bin:/bin", "FEDPRIV": "no-such-fedpriv"}
    ended = subprocess.run([made / "node-0" / "start-node.sh"], env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "fedpriv is not on the PATH" in ended.stderr


@pytest.mark.parametrize("name", ["server", "node-0"])
def test_the_image_holds_the_versions_that_the_folder_asks_for(made, name):
    """Otherwise the container's own check of versions would refuse to start it."""
    text = (made / name / "Dockerfile").read_text()
    wanted = tomllib.loads((made / name / "versions.toml").read_text())
    assert re.findall(r"^FROM python:(\S+)-slim$", text, re.MULTILINE) == [wanted["python"]]
    first, second = re.findall(r"pip install (.*)", text)
    assert first.split()[-2:] == [f"torch=={wanted['torch']}", "\\"]
    assert "download.pytorch.org/whl/cpu" in first
    wheel = f"fedpriv-{wanted['fedpriv']}-py3-none-any.whl"
    assert f"COPY {wheel} /tmp/\n" in text
    _, installed, *pins = second.split()
    assert shlex.split(installed) == [f"/tmp/{wheel}[deploy,data,report,metrics]"]
    assert pins == [f"flwr=={wanted['flwr']}", f"torch=={wanted['torch']}"]
    assert not re.search(r"\$(?!PWD|\(id)", text)


def test_the_apps_hash_depends_on_nothing_but_the_app(tmp_path):
    expected = app_hash()
    for folder, when in ((tmp_path / "a", 1_000_000_000), (tmp_path / "far" / "b", 1_700_000_000)):
        write_app(folder)
        for path in folder.iterdir():
            os.utime(path, (when, when))
            path.chmod(0o600 if when > 1_500_000_000 else 0o644)
        assert hashlib.sha256(build_fab_from_disk(folder)).hexdigest() == expected
    with (tmp_path / "a" / "fedpriv_client.py").open("a") as file:
        file.write("# more\n")
    assert hashlib.sha256(build_fab_from_disk(tmp_path / "a")).hexdigest() != expected


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="expected an empty folder"):
        init_deployment(tmp_path, Deployment(host=HOST, nodes=1))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "d").mkdir()
    init_deployment(tmp_path / "d", Deployment(host=HOST, nodes=1))
    assert (tmp_path / "d" / "README.md").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(
    "options",
    [
        ["--host", "https://fl.example.org"],
        ["--host", "fl.example.org:9092"],
        ["--host", "*.example.org"],
        ["--host", "0.0.0.0"],
        ["--host", "10.0.0"],
        ["--host", ""],
        ["--nodes", "0"],
        ["--port", "70000"],
        ["--days", "0"],
        ["--epsilon", "0"],
        ["--epsilon", "nan"],
        ["--delta", "1"],
        ["--trust", "nobody"],
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as end:
        main(["deploy", "init", str(tmp_path / "d"), "--host", HOST, "--nodes", "1", *options])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_added_nodes_leave_the_others_as_they_are(deployment):
    before = {path: path.read_bytes() for path in deployment.glob("node-*/*")}
    shutil.rmtree(deployment / "server")
    shutil.rmtree(deployment / "node-1")  # handed out
    assert add_nodes(deployment, 2) == ["node-2", "node-3"]
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists())
    assert NodeSettings.read(deployment / "node-3" / "node.toml").num_partitions == 4
    assert sorted(path.name for path in (deployment / "admin" / "nodes").iterdir()) == [
        f"node-{n}.pub" for n in range(4)
    ]
    lines = (deployment / "bundles.sha256").read_text().splitlines()
    assert [line.split("  ")[1].split("/")[0] for line in lines] == [
        "server",
        "admin",
        *(f"node-{n}" for n in range(4)),
    ]
    with pytest.raises(SystemExit) as end:
        main(["deploy", "check", str(deployment), "--no-connect"])
    assert end.value.code == 0


def test_a_renewed_certificate_is_of_the_same_ca_and_all_else_stays(deployment):
    before = {path: path.read_bytes() for path in deployment.glob("node-*/*")}
    old = (deployment / "server" / "server.pem").read_bytes()
    renew_certificate(deployment, 30, "new.example.org")
    assert (deployment / "server" / "server.pem").read_bytes() != old
    assert mode(deployment / "server" / "server.key") == 0o600
    assert all(path.read_bytes() == content for path, content in before.items())
    pair = deployment / "server" / "server.pem", deployment / "server" / "server.key"
    greets(strict(deployment / "node-0" / "ca.crt"), *pair, "new.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        greets(strict(deployment / "node-0" / "ca.crt"), *pair, HOST)


def test_without_the_cas_key_nothing_is_renewed_or_added(deployment):
    (deployment / "ca" / "ca.key").unlink()
    for change in (lambda: renew_certificate(deployment, 1), lambda: add_nodes(deployment, 1)):
        with pytest.raises(UserError, match="Move the folder ca/ back"):
            change()
    assert not (deployment / "node-2").exists()


def test_every_template_is_a_file_of_the_package_and_filled_in(made):
    written = {
        "config.toml": "admin/config.toml",
        "Dockerfile": "server/Dockerfile",
        "compose.yaml": "node-0/compose.yaml",
        "dockerignore": "node-1/.dockerignore",
        "node.toml": "node-0/node.toml",
        "README.md": "README.md",
        "register.sh": "admin/register.sh",
        "server.toml": "server/server.toml",
        "fedpriv.service": "node-1/fedpriv-node.service",
        "start.sh": "node-1/start-node.sh",
    }
    templates = files("fedpriv.deploy.setup") / "templates"
    assert {file.name for file in templates.iterdir()} == {*written, "helper.toml"}
    shipped = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert shipped["tool"]["setuptools"]["package-data"]["fedpriv.deploy.setup"] == ["templates/*"]
    for name, place in written.items():
        fixed = re.split(r"\$(?:[a-z_]+|\$)", (templates / name).read_text(encoding="utf-8"))
        left = (made / place).read_text(encoding="utf-8")
        for part in fixed:
            before, found, left = left.partition(part)
            assert found == part, (name, part)
            assert "\n" not in before, (name, before)
        assert left == ""
    start = (made / "node-1" / "start-node.sh").read_text(encoding="utf-8")
    assert 'cd "$(dirname "$0")"\n: "${FEDPRIV:=fedpriv}"\n' in start
    assert start.endswith('exec "$FEDPRIV" deploy node .\n')
