"""Helpers as nodes of a deployment, asked over Flower's messages in one process."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from deploy_in_process import DeploymentGrid
from flower_in_process import NodeError, inside_a_run
from flwr.app import Message, RecordDict
from support.secure_round import MAX_TOTAL, World, public_key, signing_key, some_values

import fedpriv.deploy.helper.answers as answers_module
import fedpriv.deploy.server as server_module
from fedpriv.deploy.helper.folder import (
    CLIENTS_TOML,
    HELPER_TOML,
    IDENTITY_FILE,
    SIGNING_FILE,
    HelperSettings,
    load_helper,
    make_signing_key,
    read_clients,
    read_signing_key,
)
from fedpriv.deploy.helper.messages import HELPER_HOME, Question, helper_content, question_of
from fedpriv.deploy.helpers import end_run, helper_answers, helper_keys
from fedpriv.deploy.server import Network
from fedpriv.deploy.setup.check import check_folder
from fedpriv.deploy.setup.provision import Deployment as ByInit
from fedpriv.deploy.setup.provision import add_nodes, init_deployment
from fedpriv.errors import UserError
from fedpriv.secure import Answer, Closed, Collector, HelperKey, Query, mask_message

CLIENTS = 5


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(server_module, "_RETRY_SECONDS", 0.02)


class Deployment:
    """Five clients that compute nothing, and helpers with folders on the disk."""

    def __init__(self, folder: Path, helpers: int = 1, liars: int = 0) -> None:
        self.world = World(folder, helpers=helpers)
        self.silent: set[int] = set()
        self.dead: set[int] = set()
        self.lost = 0  # questions to the first helper that are lost from now on
        self.asked: list[int] = []
        self.grid = DeploymentGrid(folder, CLIENTS + helpers + liars, {}, hook=self.reaches)
        self.folders: list[Path] = []
        self.identities: list[bytes] = []
        for j, node in enumerate(self.grid.order[CLIENTS:]):
            config = self.grid.contexts[node].node_config
            config.clear()
            home = folder / f"helper-{j}"
            home.mkdir()
            identity = make_signing_key(home / IDENTITY_FILE)
            (home / HELPER_TOML).write_text('superlink = "localhost:9092"\nmin-clients = 3\n')
            rows = [f'{client} = "{public_key(f"client {client}").hex()}"' for client in range(CLIENTS)]
            (home / CLIENTS_TOML).write_text("\n".join(["[clients]", *rows]))
            self.folders.append(home)
            if j < helpers:
                self.identities.append(identity.public_key().public_bytes_raw())
            named = self.identities[j if j < helpers else 0]  # a liar says that it is the first helper
            config.update({HELPER_HOME: str(home), "fedpriv-helper": named.hex()})
        self.network = Network(self.grid, CLIENTS)

    def reaches(self, place: int, message: Message) -> bool:
        if message.metadata.message_type == "query.secure":
            self.asked.append(place - CLIENTS)
            if place - CLIENTS in self.dead:
                raise NodeError("gone")
            self.lost -= place == CLIENTS
            return place - CLIENTS not in self.silent and not (place == CLIENTS and self.lost >= 0)
        return True

    def keys(self, seconds: float = 5.0) -> list[HelperKey]:
        return helper_keys(self.network, "run-1", self.identities, seconds)

    def closed(self, keys: list[HelperKey], clients: range = range(CLIENTS), round: int = 1) -> Closed:
        facts = self.world.at(round=round)
        collector = Collector(facts, keys, self.identities)
        for client in clients:
            signer = signing_key(f"client {client}")
            collector.add(mask_message(some_values(7, client), facts, client, signer, keys, self.identities))
        return Closed.from_bytes(collector.close())

    def total(self, closed: Closed, seconds: float = 5.0) -> np.ndarray:
        return closed.total(helper_answers(self.network, closed, seconds), MAX_TOTAL)


TOTAL = sum(some_values(7, client) for client in range(CLIENTS))


@pytest.mark.parametrize("helpers", [1, 2])
def test_a_round_over_flowers_messages_is_exact(tmp_path: Path, helpers: int) -> None:
    with inside_a_run():
        made = Deployment(tmp_path, helpers)
        np.testing.assert_array_equal(made.total(made.closed(made.keys())), TOTAL)
        assert len(made.network.nodes) <= CLIENTS
        assert sorted(made.network.helpers.values()) == sorted(one.hex() for one in made.identities)


def test_a_lost_question_is_asked_again_and_answered_alike(tmp_path: Path) -> None:
    with inside_a_run():
        made = Deployment(tmp_path)
        closed = made.closed(made.keys())
        first = helper_answers(made.network, closed, 5.0)[0].to_bytes()
        made.asked.clear()
        made.silent = {0}
        with pytest.raises(UserError, match="expected an answer in time, got silence"):
            made.total(closed, 0.2)
        assert len(made.asked) > 1
        made.silent = set()
        assert helper_answers(made.network, closed, 5.0)[0].to_bytes() == first


def test_one_dead_helper_of_two_voids_the_round(tmp_path: Path) -> None:
    with inside_a_run():
        made = Deployment(tmp_path, 2)
        closed = made.closed(made.keys())
        made.dead = {1}
        with pytest.raises(UserError, match=f"helper {made.identities[1].hex()[:16]}: expected an answer in time"):
            made.total(closed, 0.2)
        made.dead = set()
        np.testing.assert_array_equal(made.total(closed), TOTAL)


def test_a_helper_that_refuses_says_why_at_once(tmp_path: Path) -> None:
    with inside_a_run():
        made = Deployment(tmp_path)
        keys = made.keys()
        made.total(made.closed(keys))
        again, began = made.closed(keys, range(4)), time.monotonic()
        with pytest.raises(UserError, match=r"a refusal .*expected the query that was answered, got a different query"):
            made.total(again, 60.0)
        assert time.monotonic() - began < 30.0


def test_a_node_that_names_itself_a_helper_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other nodes have folders and keys of helpers, and answer any query with a sum of zero."""
    answered = answers_module._answered

    def with_zeros(message: Message, home: Path) -> tuple[Question, bytes]:
        question, content = question_of(message.content)
        if home.name == "helper-0" or question != "sum":
            return answered(message, home)
        zeros = np.zeros(7, dtype=np.uint32)
        return question, Answer.signed(Query.from_bytes(content), zeros, load_helper(home).identity).to_bytes()

    monkeypatch.setattr(answers_module, "_answered", with_zeros)
    with inside_a_run():
        made = Deployment(tmp_path, helpers=1, liars=2)
        closed = made.closed(made.keys())
        made.lost = 1
        np.testing.assert_array_equal(made.total(closed), TOTAL)
        made.silent = {0}
        with pytest.raises(UserError, match="expected an answer in time"):
            made.keys(0.2)


def test_a_helper_forgets_a_run_that_has_ended(tmp_path: Path) -> None:
    with inside_a_run():
        made = Deployment(tmp_path, 2)
        closed = made.closed(made.keys())
        assert end_run(made.network, "run-1", made.identities, 5.0) == {}
        with pytest.raises(UserError, match="expected a run with a key at this helper"):
            made.total(closed)


def test_a_helper_killed_mid_round_answers_once_with_its_memory_and_never_without(tmp_path: Path) -> None:
    with inside_a_run():
        made = Deployment(tmp_path)
        keys = made.keys()
        closed, later = made.closed(keys), made.closed(keys, round=2)
        made.dead = {0}
        with pytest.raises(UserError, match="expected an answer in time"):
            made.total(closed, 0.1)
        made.dead = set()
        np.testing.assert_array_equal(made.total(closed), TOTAL)
        shutil.rmtree(made.folders[0] / "state")
        for lost in (closed, later):
            with pytest.raises(UserError, match="a run that is unknown, lost or erased"):
                made.total(lost)
        np.testing.assert_array_equal(made.total(made.closed(made.keys(), round=3)), TOTAL)


def test_a_helper_reads_its_list_at_each_question(tmp_path: Path) -> None:
    with inside_a_run():
        made = Deployment(tmp_path)
        keys = made.keys()
        path = made.folders[0] / CLIENTS_TOML
        path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("3 ")))
        with pytest.raises(UserError, match="expected enrolled clients, got client 3"):
            made.total(made.closed(keys))


@pytest.mark.parametrize("kind", ["query.secure", "train"])
def test_clients_answer_no_questions_to_helpers_and_helpers_train_nothing(tmp_path: Path, kind: str) -> None:
    with inside_a_run():
        made = Deployment(tmp_path)
        node = made.grid.order[0 if kind == "query.secure" else CLIENTS]
        asked = Message(helper_content("key", b"run-1"), node, kind)
        (answer,) = made.grid.send_and_receive([asked])
        assert answer.has_error() or "helper" in str(answer.content.config_records["fedpriv"]["reason"])


def test_other_contents_are_refused_in_one_line(tmp_path: Path) -> None:
    with inside_a_run():
        made = Deployment(tmp_path)
        node = made.grid.order[CLIENTS]
        for content in (RecordDict(), helper_content("sum", b"x"), helper_content("key", b"\xff")):
            list(made.grid.get_node_ids())
            (answer,) = made.grid.send_and_receive([Message(content, node, "query.secure")])
            line = str(answer.content.config_records["fedpriv"]["reason"])
            assert "expected" in line
            assert "\n" not in line
    with pytest.raises(UserError, match="a question to a helper"):
        question_of(RecordDict())


class TestFolders:
    """`fedpriv deploy init` with helpers."""

    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("made") / "d"
        init_deployment(folder, ByInit(host="server.example.org", nodes=3, helpers=2))
        return folder

    def test_helpers_have_the_keys_of_all_clients_and_keys_of_their_own(self, made: Path) -> None:
        helpers = [load_helper(made / f"helper-{j}") for j in range(2)]
        clients = {i: read_signing_key(made / f"node-{i}" / SIGNING_FILE).public_key() for i in range(3)}
        for j, helper in enumerate(helpers):
            assert helper.enrolled == {i: key.public_bytes_raw() for i, key in clients.items()}
            assert helper.min_clients == 2
            identity = helper.identity.public_key().public_bytes_raw().hex()
            assert (made / "admin" / "helpers" / f"helper-{j}.pub").read_text().strip() == identity
            config = HelperSettings.read(made / f"helper-{j}" / HELPER_TOML).node_config(made / f"helper-{j}")
            assert config == {HELPER_HOME: str(made / f"helper-{j}"), "fedpriv-helper": identity}
        assert len({helper.identity.private_bytes_raw() for helper in helpers}) == 2

    def test_secret_keys_are_in_their_folders_alone(self, made: Path) -> None:
        held = [path for path in made.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
        assert sum(path.name == SIGNING_FILE for path in held) == 3
        assert sum(path.name == IDENTITY_FILE for path in held) == 2
        for path in held:
            assert path.stat().st_mode & 0o077 == 0
            assert path.parent.name.split("-")[0] in ("ca", "server", "node", "helper")

    def test_all_checks_pass_and_a_helpers_mistakes_are_found(self, made: Path, tmp_path: Path) -> None:
        found = check_folder(made, connect=False)
        assert {"helper-0", "helper-1", "node-2"} <= set(found)
        assert all(finding.state == "ok" for one in found.values() for finding in one)
        names = {path.stem for path in (made / "admin" / "nodes").glob("*.pub")}
        assert names == {"node-0", "node-1", "node-2", "helper-0", "helper-1"}
        copied = tmp_path / "helper-0"
        shutil.copytree(made / "helper-0", copied)
        path = copied / CLIENTS_TOML
        path.write_text("\n".join(path.read_text().splitlines()[:3]))
        (wrong,) = [finding for finding in check_folder(copied, connect=False)["helper-0"] if finding.state == "wrong"]
        assert "at least min-clients = 2 clients, got 1" in wrong.line

    def test_added_clients_are_in_the_list_for_helpers(self, made: Path, tmp_path: Path) -> None:
        folder = tmp_path / "d"
        shutil.copytree(made, folder)
        add_nodes(folder, 1)
        public = read_signing_key(folder / "node-3" / SIGNING_FILE).public_key().public_bytes_raw()
        assert read_clients(folder / "admin" / CLIENTS_TOML)[3] == public
        assert 3 not in load_helper(folder / "helper-0").enrolled  # its operator decides

    def test_without_helpers_nothing_of_them_is_made(self, tmp_path: Path) -> None:
        init_deployment(tmp_path / "d", ByInit(host="server.example.org", nodes=1))
        assert not [
            p for p in (tmp_path / "d").rglob("*") if "helper" in p.name or p.name in (SIGNING_FILE, CLIENTS_TOML)
        ]

    @pytest.mark.parametrize("options", [{"nodes": 1, "helpers": 1}, {"nodes": 2, "helpers": 101}])
    def test_impossible_numbers_are_refused(self, options: dict[str, int]) -> None:
        with pytest.raises(UserError, match=r"--nodes|--helpers"):
            ByInit(host="server.example.org", **options)  # type: ignore[arg-type]


class TestFolder:
    def test_a_folder_is_a_helper(self, tmp_path: Path) -> None:
        with inside_a_run():
            made = Deployment(tmp_path)
        helper = load_helper(made.folders[0])
        assert helper.min_clients == 3
        assert helper.enrolled == made.world.enrolled
        assert (made.folders[0] / IDENTITY_FILE).stat().st_mode & 0o077 == 0

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "one table"),
            ("[clients]\n[more]", "one table"),
            ("clients = 3", "one table"),
            ('[clients]\n01 = "' + "a" * 64 + '"', "the number of a client"),
            ('[clients]\nx = "' + "a" * 64 + '"', "the number of a client"),
            ('[clients]\n1 = "' + "A" * 64 + '"', "a public key, 64 digits"),
            ('[clients]\n1 = "abc"', "a public key, 64 digits"),
            ("[clients]\n1 = 3", "a public key, 64 digits"),
        ],
    )
    def test_a_list_with_mistakes_is_refused(self, tmp_path: Path, text: str, expected: str) -> None:
        path = tmp_path / CLIENTS_TOML
        path.write_text(text)
        with pytest.raises(UserError, match=expected):
            read_clients(path)

    @pytest.mark.parametrize(
        "change", [{"min_clients": 1}, {"min_clients": True}, {"superlink": "x"}, {"runtime_port": -1}]
    )
    def test_settings_with_mistakes_are_refused(self, change: dict[str, object]) -> None:
        with pytest.raises(UserError, match="expected"):
            replace(HelperSettings(superlink="localhost:9092", min_clients=3), **change)  # type: ignore[arg-type]

    def test_a_key_is_made_once_and_read_back(self, tmp_path: Path) -> None:
        path = tmp_path / "a.key"
        made = make_signing_key(path)
        assert read_signing_key(path).private_bytes_raw() == made.private_bytes_raw()
        with pytest.raises(UserError, match="expected a new file"):
            make_signing_key(path)
        path.write_text("other")
        with pytest.raises(UserError, match="an Ed25519 key in PEM format"):
            read_signing_key(path)
        path.unlink()
        with pytest.raises(UserError, match="expected a readable key"):
            read_signing_key(path)
