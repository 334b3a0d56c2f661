"""Deployments under secure aggregation: the loop's bits, void turns, restarts, and refusals by clients."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_in_process import DeploymentGrid, run_server
from flower_in_process import NodeError
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedpriv.deploy import server as deployment
from fedpriv.deploy import sums
from fedpriv.deploy.device.ledger import Ledger, account_of, spent
from fedpriv.deploy.device.memory import MemoryFile
from fedpriv.deploy.device.policy import POLICY_FILE, AggregationLimits, load_policy
from fedpriv.deploy.helper.folder import (
    CLIENTS_TOML,
    IDENTITY_FILE,
    SIGNING_FILE,
    make_signing_key,
    read_clients,
    read_signing_key,
)
from fedpriv.deploy.helper.messages import question_of
from fedpriv.deploy.parties import helper_list, parties_config
from fedpriv.deploy.setup.provision import add_nodes, init_deployment, make_deployment
from fedpriv.errors import UserError
from fedpriv.experiment.config import load_config
from fedpriv.experiment.execution import Execution
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.flower.bundle import app_files
from fedpriv.flower.messages import ARRAYS, FEDPRIV, TERMS, masked_of, refused
from fedpriv.privacy import Aggregation, Everyone, make_plan
from fedpriv.secure import HelperKey, Masked, Query

CLIENTS = 4
CONFIG = """
name = "devices"
seed = 3
[data]
name = "digits"
partition = "dirichlet"
concentration = 0.5
clients = 4
[model]
name = "softmax"
[local]
work = "minibatch-gradient"
batch_size = 20
[cohort]
{cohort}
[method]
{method}
[privacy]
trust = "aggregator"
noise_multiplier = 0.5
[aggregation]
helpers = {helpers}
least_survivors = {least}
colluders = 1
[training]
rounds = {rounds}
[deployment]
deadline = 20.0
join_timeout = 30.0
{rules}
"""
METHODS = {
    "alpha-normec": 'name = "alpha-normec"\nalpha = 1.0\nbeta = 0.2',
    "damped": 'name = "alpha-normec"\nalpha = 1.0\nbeta = 0.2\ndamping = 0.1',
    "clip21": 'name = "clip21"\nclip_norm = 0.5',
    "dp-fedavg": 'name = "dp-fedavg"\nclip_norm = 0.5',
    "adaptive": 'name = "clip21"\nclip_norm = 0.5\n[adaptive]\nrate = 0.5',
}


def config(method: str = "damped", **changes: Any) -> str:
    given = {"cohort": 'sampling = "everyone"', "helpers": 1, "least": 3, "rounds": 3, "rules": ""}
    return CONFIG.format(method=METHODS[method], **given | changes)


class Clock:
    """Clock that advances only while the server sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "time", Clock())
    monkeypatch.setattr(deployment, "_RETRY_SECONDS", 0.01)
    monkeypatch.setenv("FEDPRIV_TEST_SEEDED", "1")


def bits_of_loop(toml: str, folder: Path) -> bytes:
    path = folder / "loop.toml"
    path.write_text(toml)
    run_experiment(load_config(path), folder / "loop", engine="loop", execution=Execution(client_noise="faithful"))
    return (folder / "loop" / "model.safetensors").read_bytes()


def bits_of(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def rows(out: Path) -> list[dict[str, Any]]:
    return RunDirectory(out).rows("participation.jsonl")


def turn_of(message: Message) -> int:
    """Return the turn of a message to a client; 0 for others."""
    return int(str(message.content.config_records.get(TERMS, {}).get("turn", 0)))


def keys_of(message: Message) -> list[str]:
    """Return the helpers' keys in a message to a client."""
    shown = message.content.config_records[TERMS]["helpers"]
    assert isinstance(shown, list)
    return [str(key) for key in shown]


def asks_sum(message: Message) -> bool:
    return message.metadata.message_type == "query.secure" and question_of(message.content)[0] == "sum"


def run_seeded(grid: DeploymentGrid, toml: str, out: Path, **more: Any) -> None:
    run_server(grid, toml, out, test_seeded=True, **more)


def ledger_of(folder: Path, client: int) -> list[Any]:
    return Ledger(folder / f"node-{client}" / "state").entries()


@pytest.mark.parametrize("cohort", ['sampling = "everyone"', 'sampling = "poisson"\nprobability = 0.6'])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sampled
def test_a_deployment_is_the_loop_to_the_bit(method: str, cohort: str, tmp_path: Path) -> None:
    """Turns with too few clients are void on both sides, and address noise alike."""
    toml = config(method, cohort=cohort, rounds=6, helpers=2)
    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=2)
    run_seeded(grid, toml, tmp_path / "out")
    assert bits_of(tmp_path / "out") == bits_of_loop(toml, tmp_path)
    happened = [row["happened"] for row in rows(tmp_path / "out")]
    assert set(happened) == ({"applied"} if "everyone" in cohort else {"applied", "too few"})
    assert "everyone" in cohort or happened.index("too few") < len(happened) - 1
    released = [RunDirectory(tmp_path / name).rows("rounds.jsonl") for name in ("out", "loop")]
    assert [row.get("void") for row in released[0]] == [row.get("void") for row in released[1]]
    assert not any((home / "state").exists() and list((home / "state").glob("*/run.log")) for home in grid.helpers)
    statement = (tmp_path / "out" / "privacy.txt").read_text()
    assert "Simulated:" not in statement
    assert "server together with all 2 helpers" in statement.replace("\n", " ")


def test_the_server_does_not_choose_the_adjacency_that_a_ledger_charges(tmp_path: Path) -> None:
    """It is the adversary: under add-or-remove it could state half of the true epsilon under replacement."""
    toml = config("clip21", rounds=1).replace(
        "noise_multiplier = 0.5", 'noise_multiplier = 2.0\nadjacency = "add-or-remove"'
    )
    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=1)
    run_seeded(grid, toml, tmp_path / "out")
    entries = ledger_of(tmp_path / "nodes", 0)
    plan = entries[0].plan(entries[0].l2_bound)
    assert plan.adjacency == "add-or-remove"
    assert spent(entries, plan.delta, "replace") == pytest.approx(plan.under_replace().epsilon, rel=1e-12)
    assert spent(entries, plan.delta, "replace") > 1.5 * plan.epsilon
    assert spent(entries, plan.delta, "add-or-remove") == plan.epsilon


def test_the_server_sees_masks_and_the_ledger_says_what_protects(tmp_path: Path) -> None:
    toml, masked = config("clip21", rounds=2), []
    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=1)
    play = grid._play

    def watched(message: Message) -> Message | None:
        answer = play(message)
        if answer is not None and turn_of(message):
            assert set(answer.content) == {"masked", "head"}
            masked.append(Masked.from_bytes(masked_of(answer.content)))
        return answer

    grid._play = watched  # type: ignore[method-assign]
    run_seeded(grid, toml, tmp_path / "out")
    assert [m.facts.digest for m in masked[:4]] == [masked[0].facts.digest] * 4
    assert masked[4].facts.digest != masked[0].facts.digest
    words = [int(w) for m in masked for w in m.words]
    assert 0.45 < sum(w < 2**31 for w in words) / len(words) < 0.55
    promised = json.loads((tmp_path / "out" / "privacy.json").read_text())
    for client in range(CLIENTS):
        for entry in ledger_of(tmp_path / "nodes", client):
            assert entry.trust == "aggregator"
            assert entry.noise_stddev == promised["share_stddev"]
            numbers = json.loads(entry.aggregation)
            assert (numbers["least_survivors"], numbers["colluders"]) == (3, 1)
    account = account_of(tmp_path / "nodes" / "node-0" / "state", 8.0, 1e-5, "replace")
    assert "in sums of at least 3 clients, up to 1 of them against it" in account
    (record,) = (tmp_path / "nodes" / "node-0" / "state").glob("*/memory")
    stored = MemoryFile(record.parent.parent, record.parent.name.removesuffix("-0"), 0).read()
    assert stored is not None
    assert stored.reply is not None
    assert Masked.from_bytes(stored.reply.numpy().tobytes()).facts.round == 2
    steps = stored.pending["memory"].double() / promised["release_grid"]
    assert bool((steps == steps.round()).all())
    assert float(steps.abs().max()) > 0.0


def test_a_dropout_costs_nothing_and_below_t_a_turn_is_charged_and_moves_no_memory(tmp_path: Path) -> None:
    """Client 3 is away in turns 2 and 3, client 2 in turn 3; in turn 4 all are back, with the memories of before."""
    away = {2: {3}, 3: {2, 3}}
    folder, memories = tmp_path / "nodes", {}

    def hook(place: int, message: Message) -> bool:
        if turn_of(message) == 4:
            (path,) = (folder / f"node-{place}" / "state").glob("*/memory")
            memories[place] = MemoryFile(path.parent.parent, path.parent.name.rpartition("-")[0], place).read()
        return place not in away.get(turn_of(message), ())

    grid = DeploymentGrid(folder, CLIENTS, {}, trust="aggregator", helpers=1, hook=hook)
    run_seeded(grid, config(rounds=4), tmp_path / "out")
    happened = [(row["happened"], row["counted"]) for row in rows(tmp_path / "out")]
    assert happened == [
        ("applied", [0, 1, 2, 3]),
        ("applied", [0, 1, 2]),
        ("too few", []),
        ("applied", [0, 1, 2, 3]),
    ]
    assert [row["void"] for row in RunDirectory(tmp_path / "out").rows("rounds.jsonl")[1:]] == [
        False,
        False,
        True,
        False,
    ]
    assert [[e.turn for e in ledger_of(folder, client)] for client in (0, 3)] == [[1, 2, 3, 4], [1, 4]]
    assert {place: record.pending_turn for place, record in memories.items()} == {0: 3, 1: 3, 2: 2, 3: 1}
    terms = [m.content.config_records[TERMS] for m in grid.seen if turn_of(m) == 4]
    assert sorted(one["last_turn"] for one in terms) == [1, 2, 2, 2]
    orders = [m.content.config_records[FEDPRIV] for m in grid.seen if turn_of(m) == 4]
    assert [one["round"] for one in orders] == [3] * CLIENTS


def test_a_helper_that_loses_its_records_voids_a_turn_and_makes_a_new_key(tmp_path: Path) -> None:
    folder, lost = tmp_path / "nodes", []

    def hook(place: int, message: Message) -> bool:
        if place == CLIENTS and asks_sum(message):
            number = Query.from_bytes(question_of(message.content)[1]).facts.round
            if number == 2 and not lost:
                lost.append(number)
                shutil.rmtree(folder / "helper-0" / "state")
        return True

    grid = DeploymentGrid(folder, CLIENTS, {}, trust="aggregator", helpers=1, hook=hook)
    run_seeded(grid, config(rounds=3), tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [row["happened"] for row in found] == ["applied", "void", "applied"]
    assert "unknown, lost or erased" in found[1]["reason"]
    assert (found[1]["counted"], found[1]["late"], found[2]["counted"]) == ([], [], [0, 1, 2, 3])
    keys = [keys_of(m)[0] for m in grid.seen if turn_of(m)]
    assert (len(set(keys[:8])), len(set(keys))) == (1, 2)
    assert [e.turn for e in ledger_of(folder, 0)] == [1, 2, 3]


def test_a_silent_helper_voids_its_turn_and_a_restarted_one_goes_on_with_the_same_key(tmp_path: Path) -> None:
    def hook(place: int, message: Message) -> bool:
        silent = place == CLIENTS and asks_sum(message)
        if silent and Query.from_bytes(question_of(message.content)[1]).facts.round == 2:
            raise NodeError("gone")
        return True

    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=2, hook=hook)
    run_seeded(grid, config(rounds=3, helpers=2), tmp_path / "out")
    assert [row["happened"] for row in rows(tmp_path / "out")] == ["applied", "void", "applied"]
    assert len({keys_of(m)[0] for m in grid.seen if turn_of(m)}) == 1


def test_no_client_is_asked_while_a_helper_is_missing(tmp_path: Path) -> None:
    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=2)
    absent = grid.order.pop()
    with pytest.raises(UserError, match=r"helpers: expected a node of each helper within 30 s, got silence of"):
        run_seeded(grid, config(helpers=2), tmp_path / "out")
    assert not any(turn_of(message) for message in grid.seen)
    grid.order.append(absent)
    run_seeded(grid, config(helpers=2), tmp_path / "out", resume=True)
    assert bits_of(tmp_path / "out") == bits_of_loop(config(helpers=2), tmp_path)


def test_a_sum_in_the_guard_band_voids_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpriv.deploy.sums import SecureSums

    real, limits = SecureSums.total, iter([1, 2**31 - 1, 2**31 - 1])

    def total(self: SecureSums, closed: Any, answers: Any) -> Any:
        monkeypatch.setattr(closed.__class__, "total", lambda c, a, _: band(c, a, next(limits)))
        return real(self, closed, answers)

    from fedpriv.secure import Closed

    band = Closed.total
    monkeypatch.setattr(SecureSums, "total", total)
    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=1)
    run_seeded(grid, config(rounds=3), tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [row["happened"] for row in found] == ["void", "applied", "applied"]
    assert "beyond it" in found[0]["reason"]


class ServerDied(BaseException):
    """Error for the end of the ServerApp's process."""


@pytest.mark.parametrize("answered", [False, True])
def test_a_server_that_dies_after_it_fixed_u_asks_about_the_same_u(answered: bool, tmp_path: Path) -> None:
    """It dies in turn 2, before or after the helper has answered; client 3 was late and is back when it returns."""
    dead: list[Message] = []
    asked: list[bytes] = []

    def hook(place: int, message: Message) -> bool:
        return not (place == 3 and turn_of(message) == 2 and not dead)

    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=1, hook=hook)
    play = grid._play

    def watched(message: Message) -> Message | None:
        sums = asks_sum(message) and Query.from_bytes(question_of(message.content)[1]).facts.round == 2
        if sums:
            asked.append(question_of(message.content)[1])
        if sums and not dead:
            dead.append(message)
            if answered:
                play(message)
            raise ServerDied
        return play(message)

    grid._play = watched  # type: ignore[method-assign]
    with pytest.raises(ServerDied):
        run_seeded(grid, config(), tmp_path / "out")
    before = len([m for m in grid.seen if turn_of(m) == 2])
    run_seeded(grid, config(), tmp_path / "out", resume=True)
    assert len(set(asked)) == 1
    assert len(asked) == 2
    assert len([m for m in grid.seen if turn_of(m) == 2]) == before
    assert [(row["happened"], row["counted"]) for row in rows(tmp_path / "out")] == [
        ("applied", [0, 1, 2, 3]),
        ("applied", [0, 1, 2]),
        ("applied", [0, 1, 2, 3]),
    ]


def test_a_server_that_dies_before_it_fixed_u_gets_the_same_bytes_again(tmp_path: Path) -> None:
    sent: dict[int, list[bytes]] = {client: [] for client in range(CLIENTS)}
    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=1)
    play, living = grid._play, [False]

    def watched(message: Message) -> Message | None:
        answer = play(message)
        if turn_of(message) == 2 and answer is not None:
            client = int(str(message.content.config_records[FEDPRIV]["client"]))
            sent[client].append(masked_of(answer.content))
            if not living[0] and sum(map(len, sent.values())) == 3:
                raise ServerDied
        return answer

    grid._play = watched  # type: ignore[method-assign]
    with pytest.raises(ServerDied):
        run_seeded(grid, config(), tmp_path / "out")
    living[0] = True
    run_seeded(grid, config(), tmp_path / "out", resume=True)
    assert sorted(len(messages) for messages in sent.values()) == [1, 2, 2, 2]
    assert all(len(set(messages)) == 1 for messages in sent.values())
    assert bits_of(tmp_path / "out") == bits_of_loop(config(), tmp_path)


def _second_model(content: RecordDict) -> None:
    content.config_records[FEDPRIV]["round"] = 2


def test_a_second_order_for_one_turn_is_refused(tmp_path: Path) -> None:
    """A server that wants two masked messages of one turn, about different orders, gets one."""
    found: list[Any] = []
    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=1)
    play = grid._play

    def watched(message: Message) -> Message | None:
        answer = play(message)
        if turn_of(message) == 1:
            before = message.content.config_records[FEDPRIV]["round"]
            _second_model(message.content)
            second = play(message)
            assert second is not None
            found.append(refused(second.content))
            message.content.config_records[FEDPRIV]["round"] = before
        return answer

    grid._play = watched  # type: ignore[method-assign]
    run_seeded(grid, config("clip21", rounds=1), tmp_path / "out")
    assert len(found) == CLIENTS
    assert {no and no[0] for no in found} == {"stale"}


def _policy(line: str, value: str = "") -> Callable[[Path], None]:
    def change(home: Path) -> None:
        path = home / "fedpriv-client.toml"
        text = path.read_text()
        key = line.partition(" =")[0]
        kept = [row for row in text.splitlines() if not row.startswith(f"{key} =")]
        path.write_text("\n".join([*kept, line + value]))

    return change


REFUSED = {
    "no pinned helper": (_policy("helpers = []"), "aggregation.helpers"),
    "another helper": (_policy("helpers = ", f'["{"ab" * 32}"]'), "helpers: expected one signed key from each helper"),
    "t below the floor": (_policy("least_survivors = 4"), "aggregation.least_survivors: expected at least 4"),
    "c below the floor": (_policy("colluders = 2"), "aggregation.colluders"),
    "too small a share": (_policy("min_share_multiplier = 0.5"), "aggregation.min_share_multiplier"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_client_refuses_what_its_policy_does_not_accept(name: str, tmp_path: Path) -> None:
    change, line = REFUSED[name]
    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=1)
    change(tmp_path / "nodes" / "node-0")
    run_seeded(grid, config(rounds=1), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert row["refused"]["0"]["kind"] == "policy"
    assert line in row["refused"]["0"]["reason"]
    assert (row["happened"], row["counted"]) == ("applied", [1, 2, 3])
    assert not ledger_of(tmp_path / "nodes", 0)


def _less_noise(content: RecordDict) -> None:
    content.config_records[FEDPRIV]["noise_stddev"] = 0.9 * float(str(content.config_records[FEDPRIV]["noise_stddev"]))


def _other_size(content: RecordDict) -> None:
    numbers = json.loads(str(content.config_records[TERMS]["aggregation"]))
    content.config_records[TERMS]["aggregation"] = json.dumps({**numbers, "size": 10})


def _no_numbers(content: RecordDict) -> None:
    content.config_records[TERMS]["aggregation"] = ""


def _central(content: RecordDict) -> None:
    content.config_records[TERMS]["trust"] = "central"


def _forged_key(content: RecordDict) -> None:
    (shown,) = content.config_records[TERMS]["helpers"]  # type: ignore[misc]
    key = HelperKey.from_bytes(bytes.fromhex(str(shown)))
    forged = HelperKey(run=key.run, key=bytes(32), identity=key.identity, signature=key.signature)
    content.config_records[TERMS]["helpers"] = [forged.to_bytes().hex()]


def _credited_sampling(content: RecordDict) -> None:
    terms = content.config_records[TERMS]
    terms["aggregation"] = json.dumps({**json.loads(str(terms["aggregation"])), "everyone_answers": True})
    terms["sampling"], terms["probability"] = "poisson", 0.1


def _no_keys(content: RecordDict) -> None:
    del content.config_records[TERMS]["helpers"]


TAMPERED = {
    "less noise": (_less_noise, "noise: expected a standard deviation"),
    "a plan for another model": (_other_size, "aggregation: expected a plan for 650 parameters"),
    "no numbers": (_no_numbers, "terms"),
    "another trust": (_central, "accepts.trust"),
    "a key of the server": (_forged_key, "helpers: expected one signed key"),
    "sampling that the server sees": (_credited_sampling, "aggregation: expected a plan that credits no sampling"),
    "no keys": (_no_keys, "helpers: expected one signed key"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_an_order_that_was_tampered_with_is_refused(name: str, tmp_path: Path) -> None:
    change, line = TAMPERED[name]

    def hook(place: int, message: Message) -> bool:
        if place == 0 and turn_of(message):
            change(message.content)
        return True

    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=1, hook=hook)
    run_seeded(grid, config(rounds=1), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert line in row["refused"]["0"]["reason"]
    assert row["counted"] == [1, 2, 3]
    assert not ledger_of(tmp_path / "nodes", 0)


def _later_epoch(content: RecordDict) -> None:
    content.config_records[TERMS]["epoch"] = 1


def _other_model(content: RecordDict) -> None:
    """Messages to other clients share the record, so it is replaced."""
    ((name, array),) = content.array_records[ARRAYS].items()
    content[ARRAYS] = ArrayRecord({name: Array(array.numpy() + np.float32(1.0))})


@pytest.mark.parametrize("change", [_later_epoch, _other_model])
def test_a_client_that_is_shown_another_order_is_left_out(change: Callable[[RecordDict], None], tmp_path: Path) -> None:
    """It signs the facts that it has seen, and those of the turn are those of all others."""

    def hook(place: int, message: Message) -> bool:
        if place == 0 and turn_of(message):
            change(message.content)
        return True

    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=1, hook=hook)
    run_seeded(grid, config(rounds=1), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert "expected the facts of this round, got different facts" in row["invalid"]["0"]
    assert row["counted"] == [1, 2, 3]


@pytest.mark.parametrize("checked", [True, False])
def test_a_client_that_is_not_enrolled_is_left_out_here_or_voids_the_turn_at_the_helper(
    checked: bool, tmp_path: Path
) -> None:
    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=1)
    path = tmp_path / "nodes" / "node-0" / SIGNING_FILE
    path.unlink()
    make_signing_key(path)
    more = {} if checked else {"enrolled": ""}
    run_seeded(grid, config(rounds=1), tmp_path / "out", **more)
    (row,) = rows(tmp_path / "out")
    if checked:
        assert "expected the signature of an enrolled client" in row["invalid"]["0"]
        assert row["counted"] == [1, 2, 3]
    else:
        assert row["happened"] == "void"
        assert "each client's signature" in row["reason"]


def test_another_number_of_helpers_or_no_noise_is_refused_before_anyone_is_asked(tmp_path: Path) -> None:
    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=1)
    with pytest.raises(UserError, match=r"helpers: expected aggregation\.helpers = 2 helpers, got 1 in"):
        run_seeded(grid, config(helpers=2), tmp_path / "two")
    with pytest.raises(UserError, match=r"privacy\.noise_multiplier: expected noise with secure aggregation"):
        run_seeded(grid, config().replace("noise_multiplier = 0.5", "noise_multiplier = 0.0"), tmp_path / "none")
    assert not grid.seen


def test_a_lost_signing_key_is_an_error_of_the_client(tmp_path: Path) -> None:
    grid = DeploymentGrid(tmp_path / "nodes", CLIENTS, {}, trust="aggregator", helpers=1)
    (tmp_path / "nodes" / "node-0" / SIGNING_FILE).unlink()
    run_seeded(grid, config(rounds=1), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert row["refused"]["0"]["kind"] == "trouble"
    assert SIGNING_FILE not in row["refused"]["0"]["reason"]


def test_a_new_deployment_pins_its_helpers_and_tells_a_run_who_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    init_deployment(folder, make_deployment(host="fl.example.org", nodes=2, helpers=2, trust="aggregator"))
    keys = [read_signing_key(folder / f"helper-{j}" / IDENTITY_FILE).public_key().public_bytes_raw() for j in range(2)]
    for node in range(2):
        policy = load_policy(folder / f"node-{node}" / POLICY_FILE)
        assert (policy.accepts.trust, policy.aggregation.identities) == ("aggregator", frozenset(keys))
    told = parties_config(folder / "admin")
    parties = helper_list(told)
    assert parties.pinned == tuple(keys)
    assert parties.enrolled == read_clients(folder / "helper-0" / CLIENTS_TOML)
    assert set(told) <= set(tomllib.loads(app_files()["pyproject.toml"].decode())["tool"]["flwr"]["app"]["config"])
    (folder / "admin" / "helpers" / "helper-1.pub").write_text("no key\n")
    with pytest.raises(UserError, match="an identity key, 64 digits"):
        parties_config(folder / "admin")
    assert parties_config(tmp_path) == {}
    assert helper_list({}).pinned == ()


@pytest.mark.parametrize(
    "change",
    [{"helpers": ("ab",)}, {"least_survivors": 1}, {"colluders": -1}, {"min_share_multiplier": -1.0}],
)
def test_limits_with_mistakes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"aggregation\.{next(iter(change))}"):
        AggregationLimits(**change)


def test_a_client_that_is_enrolled_during_a_run_counts_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that is being edited keeps the clients of the start."""
    folder = tmp_path / "d"
    init_deployment(folder, make_deployment(host="127.0.0.1", nodes=2, trust="aggregator", helpers=1))
    parties = helper_list(parties_config(folder / "admin"))
    found: list[set[int]] = []
    plan = make_plan(
        trust=Aggregation(helpers=1, least_survivors=2, colluders=0, most=3, size=4),
        sampling=Everyone(3),
        rounds=2,
        delta=1e-5,
        l2_bound=1.0,
        noise_multiplier=1.0,
    )
    monkeypatch.setattr(sums, "Collector", lambda *given: found.append(set(given[-1])))
    for step in (lambda: add_nodes(folder, 1), lambda: (folder / "admin" / CLIENTS_TOML).write_text("[clie")):
        sums.SecureSums(plan, parties).collected(None, {})  # type: ignore[arg-type]
        step()
    sums.SecureSums(plan, parties).collected(None, {})  # type: ignore[arg-type]
    assert found == [{0, 1}, {0, 1, 2}, {0, 1}]
