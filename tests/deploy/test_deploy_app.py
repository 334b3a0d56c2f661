"""Server and client apps together, message by message: exact results, counting, resumption, foreign answers."""

import json
import logging
import os
import shutil
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_in_process import DeploymentGrid, run_server
from flower_in_process import NodeError
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedpriv.data.datasets import Digits
from fedpriv.deploy import server as deployment
from fedpriv.errors import UserError
from fedpriv.experiment.config import load_config, parse_config
from fedpriv.experiment.execution import Execution
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import Checkpoint, RunDirectory
from fedpriv.flower.messages import ARRAYS, FEDPRIV, TERMS
from fedpriv.privacy.released import OUTPUTS, Kind
from fedpriv.tasks.models import Mlp

CONFIG = """
name = "devices"
seed = 3
[data]
name = "digits"
partition = "dirichlet"
concentration = 0.5
clients = {clients}
[model]
name = "softmax"
[local]
work = "{work}"
{batch}
[cohort]
{cohort}
[method]
{method}
{privacy}
[training]
rounds = {rounds}
[deployment]
deadline = {deadline}
{rules}
"""
METHODS = {
    "alpha-normec": 'name = "alpha-normec"\nalpha = 1.0\nbeta = 0.2',
    "damped": 'name = "alpha-normec"\nalpha = 1.0\nbeta = 0.2\ndamping = 0.1',
    "clip21": 'name = "clip21"\nclip_norm = 0.5',
    "dp-fedavg": 'name = "dp-fedavg"\nclip_norm = 0.5',
    "centered-clip": 'name = "centered-clip"\nclip_norm = 0.2',
    "adaptive": 'name = "clip21"\nclip_norm = 0.5\n[adaptive]\nrate = 0.5',
}


def config(method: str = "damped", trust: str = "local", **changes: Any) -> str:
    privacy = "" if trust == "none" else f'[privacy]\ntrust = "{trust}"\nnoise_multiplier = 0.5'
    given = {"clients": 4, "work": "minibatch-gradient", "batch": "batch_size = 20", "cohort": 'sampling = "everyone"'}
    given |= {"method": METHODS[method], "privacy": privacy, "rounds": 4, "deadline": 20.0, "rules": ""}
    return CONFIG.format(**given | changes)


class Clock:
    """Clock that advances only while the server sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(deployment, "time", made)
    monkeypatch.setattr(deployment, "_RETRY_SECONDS", 0.01)
    return made


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("FEDPRIV_TEST_SEEDED", "1")
    return {"test_seeded": True}


def rows(out: Path) -> list[dict[str, Any]]:
    return RunDirectory(out).rows("participation.jsonl")


def bits_of_loop(toml: str, folder: Path) -> bytes:
    path = folder / "loop.toml"
    path.write_text(toml)
    run_experiment(load_config(path), folder / "loop", engine="loop", execution=Execution(client_noise="faithful"))
    return (folder / "loop" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("cohort", ['sampling = "everyone"', 'sampling = "poisson"\nprobability = 0.6'])
@pytest.mark.parametrize("trust", ["none", "central", "local"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sampled
def test_a_deployment_is_the_loop_to_the_bit(
    method: str, trust: str, cohort: str, seeded: dict[str, Any], tmp_path: Path
) -> None:
    toml = config(method, trust, cohort=cohort, rounds=6)
    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust=trust, epsilon=1e6)
    run_server(grid, toml, tmp_path / "out", **seeded)
    happened = [row["happened"] for row in rows(tmp_path / "out")]
    if "too few" in happened:
        pytest.fail("an empty cohort spends a turn: choose another seed")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == bits_of_loop(toml, tmp_path)


@pytest.mark.parametrize(
    ("method", "work", "keys"),
    [
        ("dp-scaffold", "local-steps", 'steps = 3\nbatch_size = 20\nsignal = "gradient-mean"'),
        ("fedspeed", "local-epochs", 'epochs = 1\nbatch_size = 100\norder = "by-loss"\nascent = 0.1'),
    ],
)
def test_a_deployment_that_corrects_local_steps_is_the_loop_to_the_bit(
    method: str, work: str, keys: str, seeded: dict[str, Any], tmp_path: Path
) -> None:
    steps = f"client_lr = 0.1\n{keys}"
    toml = config("clip21", work=work, batch=steps, rounds=3).replace('"clip21"', f'"{method}"')
    run_server(DeploymentGrid(tmp_path / "nodes", 4, {}, trust="local", epsilon=1e6), toml, tmp_path / "out", **seeded)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == bits_of_loop(toml, tmp_path)


@pytest.mark.parametrize("secret", [True, False])
def test_how_long_a_turn_lasts_shows_nothing_of_a_secret_cohort(
    secret: bool, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cohorts have all sizes, including 0; client 3 never answers. Without secrecy, a turn ends with its answers."""
    told: list[tuple[float, int]] = []

    def append(self: RunDirectory, name: str, row: dict[str, Any]) -> None:
        if name == "participation.jsonl":
            told.append((clock.now, len(row["asked"])))
        real(self, name, row)

    real = RunDirectory.append
    monkeypatch.setattr(RunDirectory, "append", append)
    trust = "central" if secret else "none"
    toml = config(trust=trust, cohort='sampling = "poisson"\nprobability = 0.3', rounds=20, deadline=50.0)
    silent = DeploymentGrid(tmp_path / "nodes", 4, {}, trust=trust, hook=lambda i, m: i != 3 or TERMS not in m.content)
    run_server(silent, toml, tmp_path / "out")
    lengths = {round(later - earlier, 6) for (earlier, _), (later, _) in pairwise(told)}
    assert len({asked for _, asked in told}) > 2
    if secret:
        assert lengths == {50.0 * 1.05 + 1.0}
    else:
        assert min(lengths) < 1.0
        assert max(lengths) < 51.0


def test_turns_with_secret_cohorts_last_a_minute_unless_a_config_says_otherwise(clock: Clock, tmp_path: Path) -> None:
    toml = config(trust="central", cohort='sampling = "poisson"\nprobability = 0.9', rounds=2)
    toml = toml.replace("deadline = 20.0", "")
    before = clock.now
    run_server(DeploymentGrid(tmp_path / "nodes", 4, {}, trust="central"), toml, tmp_path / "out")
    assert 2 * 60.0 < clock.now - before < 2 * 70.0


def test_nothing_is_measured_of_what_devices_hold(tmp_path: Path) -> None:
    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="none")
    run_server(grid, config(trust="none", rounds=1), tmp_path / "out")
    assert not (tmp_path / "out" / "heterogeneity.json").exists()
    assert "heterogeneity" not in RunDirectory(tmp_path / "out").read_json("diagnostics.json")


def test_who_took_part_in_a_deployment_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run_server(DeploymentGrid(tmp_path / "nodes", 4, {}), config(rounds=2), tmp_path / "out")
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    owners = {output.name for output in OUTPUTS if output.kind is Kind.OWNER}
    assert set(found) <= {output.name for output in OUTPUTS}
    assert {name for name, mode in found.items() if not mode & 0o077} == owners & set(found)
    assert {"participation.jsonl", "diagnostics.jsonl", "diagnostics.json"} <= owners & set(found)
    assert "participation.jsonl" in (tmp_path / "out" / "privacy.txt").read_text().split("file by file")[1]


@pytest.mark.parametrize("line", ["validation = 0.1", 'shift = "noise"'])
def test_a_server_holds_nothing_out_and_shifts_nothing(line: str, tmp_path: Path) -> None:
    toml = config(trust="none").replace("[data]\n", f"[data]\n{line}\n")
    with pytest.raises(UserError, match=r"^data\.\w+: expected no value in a deployment"):
        run_server(DeploymentGrid(tmp_path / "nodes", 4, {}), toml, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_switch_noise_is_secret_and_the_statement_says_so(tmp_path: Path) -> None:
    models = []
    for number in (1, 2):
        grid = DeploymentGrid(tmp_path / f"nodes{number}", 4, {}, trust="local")
        out = tmp_path / f"out{number}"
        run_server(grid, config(rounds=1), out, test_seeded=True)
        models.append((out / "model.safetensors").read_bytes())
        assert "come from a seed" not in (out / "privacy.txt").read_text()
        orders = [m.content.config_records[FEDPRIV] for m in grid.seen if TERMS in m.content.config_records]
        assert len(orders) == 4
        assert not any("seed" in order for order in orders)
    assert models[0] != models[1]


def test_refusals_failures_and_silence_are_counted_by_client(tmp_path: Path) -> None:
    """Client 0 has no budget, 1 is dead, 2 raises, 3 never answers, 4 and 5 work."""

    def hook(partition: int, message: Message) -> bool:
        if TERMS not in message.content.config_records:
            return True
        if partition == 1:
            raise NodeError("gone")
        if partition == 2:
            raise RuntimeError("out of memory")
        return partition != 3

    grid = DeploymentGrid(tmp_path / "nodes", 6, {}, trust="local", hook=hook)
    policy = tmp_path / "nodes" / "node-0" / "fedpriv-client.toml"
    policy.write_text(policy.read_text().replace("epsilon = 1000000.0", "epsilon = 0.1"))
    run_server(grid, config(rounds=2, clients=6, deadline=1.0, rules="min_participants = 2"), tmp_path / "out")
    for row in rows(tmp_path / "out"):
        assert (row["happened"], row["asked"], row["counted"]) == ("applied", [0, 1, 2, 3, 4, 5], [4, 5])
        assert row["refused"]["0"]["kind"] == "budget"
        assert "out of memory" in row["failed"]["2"]
        assert (row["late"], row["gone"]) == ([1, 3], [])
    summary = RunDirectory(tmp_path / "out").read_json("summary.json")
    assert summary["ledger"]["most"]["participations"] == 2
    assert RunDirectory(tmp_path / "out").read_json("diagnostics.json")["messages"] == 4


def test_a_stopped_run_says_why_and_goes_on_with_the_same_turn(seeded: dict[str, Any], tmp_path: Path) -> None:
    """Client 2 is absent in turn 3. The other messages are not noised again, and the result is the loop's."""
    away = [True]
    toml = config(rules='min_participants = 4\ntoo_few = "stop"', deadline=1.0)

    def hook(partition: int, message: Message) -> bool:
        terms = message.content.config_records.get(TERMS)
        return not (partition == 2 and terms is not None and terms["turn"] == 3 and away[0])

    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="local", hook=hook)
    with pytest.raises(UserError, match="turn 3: expected at least 4 valid messages, got 3"):
        run_server(grid, toml, tmp_path / "out", **seeded)
    stopped = rows(tmp_path / "out")[-1]
    assert (stopped["round"], stopped["happened"], stopped["late"], stopped["counted"]) == (3, "stopped", [2], [])
    assert "client 2 (node-2): no usable answer" in stopped["reason"]
    away[0] = False
    with pytest.raises(UserError, match="Add --resume"):
        run_server(grid, toml, tmp_path / "out", **seeded)
    run_server(grid, toml, tmp_path / "out", resume=True, **seeded)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == bits_of_loop(toml, tmp_path)
    assert [row["round"] for row in rows(tmp_path / "out")] == [1, 2, 3, 4]
    assert [row["round"] for row in RunDirectory(tmp_path / "out").rows("rounds.jsonl")] == [0, 1, 2, 3, 4]
    for node in range(4):
        lines = (tmp_path / "nodes" / f"node-{node}" / "state" / "ledger.jsonl").read_text().splitlines()
        assert [json.loads(line)["turn"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("absent", ["wait", "leave-out"])
def test_clients_that_never_connected_are_named_and_left_out_on_demand(
    absent: str, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="local")
    away, ids = grid.order[2], grid.get_node_ids
    monkeypatch.setattr(grid, "get_node_ids", lambda: [node for node in ids() if node != away])
    began = clock.now
    rules = "" if absent == "wait" else f'absent = "{absent}"'
    run_server(grid, config(rounds=2, deadline=500.0, rules=rules), tmp_path / "out")
    assert "not connected: client 2 (node-2); " in caplog.text
    if absent == "wait":
        assert 'set deployment.absent = "leave-out" to go on without them' in caplog.text
        assert clock.now - began >= 1000.0
    else:
        assert "turns do not wait for them" in caplog.text
        assert clock.now - began < 100.0
    assert [row["counted"] for row in rows(tmp_path / "out")] == [[0, 1, 3]] * 2
    assert [row["gone"] for row in rows(tmp_path / "out")] == [[2]] * 2


def test_turns_of_secret_cohorts_leave_nobody_out(tmp_path: Path) -> None:
    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="central")
    toml = config(trust="central", cohort='sampling = "poisson"\nprobability = 0.6', rules='absent = "leave-out"')
    with pytest.raises(UserError, match=r'deployment\.absent: expected "wait" if epsilon requires secret cohorts'):
        run_server(grid, toml, tmp_path / "out")


class ServerDied(BaseException):
    """Error for the end of the ServerApp's process."""


def test_a_server_that_dies_in_a_turn_asks_the_same_clients_for_the_same(tmp_path: Path) -> None:
    """Cohorts come from the operating system; the second answers equal the first to the byte."""
    asked: list[dict[int, str]] = [{}, {}]
    living = [False]

    def hook(partition: int, message: Message) -> bool:
        terms = message.content.config_records.get(TERMS)
        if terms is not None and terms["turn"] == 3:
            (name,) = message.content.array_records[ARRAYS]
            asked[living[0]][partition] = message.content.array_records[ARRAYS][name].data.hex()
            if not living[0] and len(asked[0]) == 3:
                raise ServerDied
        return True

    toml = config(clients=40, cohort='sampling = "fixed"\nsize = 4', batch="batch_size = 5")
    grid = DeploymentGrid(tmp_path / "nodes", 40, {}, trust="local", hook=hook)
    with pytest.raises(ServerDied):
        run_server(grid, toml, tmp_path / "out")
    living[0] = True
    run_server(grid, toml, tmp_path / "out", resume=True)
    assert asked[0].items() <= asked[1].items()
    assert len(asked[1]) == 4
    for partition in asked[0]:
        ledger = tmp_path / "nodes" / f"node-{partition}" / "state" / "ledger.jsonl"
        assert [json.loads(line)["turn"] for line in ledger.read_text().splitlines()].count(3) == 1


def test_a_seed_in_an_order_is_refused_where_no_test_allows_it(
    seeded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hook(partition: int, message: Message) -> bool:  # noqa: ARG001
        monkeypatch.delenv("FEDPRIV_TEST_SEEDED", raising=False)
        return True

    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="local", hook=hook)
    run_server(grid, config(rounds=1), tmp_path / "out", **seeded)
    (row,) = rows(tmp_path / "out")
    assert {refusal["kind"] for refusal in row["refused"].values()} == {"policy"}
    assert "operating system" in row["refused"]["0"]["reason"]
    assert row["happened"] == "too few"


def _other_client(content: RecordDict) -> None:
    content.config_records[FEDPRIV]["client"] = 1


def _nan_model(content: RecordDict) -> None:
    (name,) = content.array_records[ARRAYS]
    values = content.array_records[ARRAYS][name].numpy().copy()
    values[0] = np.nan
    content.array_records[ARRAYS][name] = Array(values)


def _larger_model(content: RecordDict) -> None:
    (name,) = content.array_records[ARRAYS]
    content.array_records[ARRAYS][name] = Array(np.zeros(651, dtype=np.float32))


def _integers(content: RecordDict) -> None:
    (name,) = content.array_records[ARRAYS]
    content.array_records[ARRAYS][name] = Array(np.zeros(650, dtype=np.int64))


def _digest(content: RecordDict) -> None:
    content.config_records[TERMS]["digest"] = "f" * 64


def _run_name(content: RecordDict) -> None:
    content.config_records[TERMS]["run"] = "../../elsewhere"


def _huge_turn(content: RecordDict) -> None:
    content.config_records[TERMS]["turn"] = 10**18


def _text_for_number(content: RecordDict) -> None:
    content.config_records[TERMS]["noise_multiplier"] = "much"


def _no_terms(content: RecordDict) -> None:
    del content[TERMS]


def _no_model(content: RecordDict) -> None:
    del content[ARRAYS]


TAMPERED = {
    "another client's order": (_other_client, "expected client 0"),
    "NaN in the model": (_nan_model, "finite numbers"),
    "another model's size": (_larger_model, "as many parameters"),
    "a model of whole numbers": (_integers, "expected floating point numbers"),
    "another experiment": (_digest, "of the terms"),
    "a run that is a path": (_run_name, "a name of at most 64"),
    "a turn beyond the plan": (_huge_turn, "consecutive turns"),
    "a text for a number": (_text_for_number, "terms.noise_multiplier"),
    "no terms": (_no_terms, "terms of a deployment"),
    "no model": (_no_model, "arrays"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_an_order_that_was_tampered_with_is_refused(name: str, tmp_path: Path) -> None:
    change, line = TAMPERED[name]

    def hook(partition: int, message: Message) -> bool:
        if partition == 0 and TERMS in message.content.config_records:
            change(message.content)
        return True

    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="local", hook=hook)
    run_server(grid, config(rounds=1), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    said = str(row["refused"].get("0", {}).get("reason", "")) + row["failed"].get("0", "")
    assert line in said
    assert "Traceback" not in said
    assert 0 not in row["counted"]
    ledger = tmp_path / "nodes" / "node-0" / "state" / "ledger.jsonl"
    assert not ledger.exists()


def _answer_nan(content: RecordDict) -> RecordDict:
    (name,) = content.array_records[ARRAYS]
    return RecordDict({ARRAYS: ArrayRecord({name: Array(np.full(650, np.nan, dtype=np.float32))})})


def _answer_longer(content: RecordDict) -> RecordDict:
    (name,) = content.array_records[ARRAYS]
    return RecordDict({ARRAYS: ArrayRecord({name: Array(np.zeros(10**6, dtype=np.float32))})})


def _answer_other_name(content: RecordDict) -> RecordDict:  # noqa: ARG001
    return RecordDict({ARRAYS: ArrayRecord({"x": Array(np.zeros(650, dtype=np.float32))})})


def _answer_text(content: RecordDict) -> RecordDict:
    (name,) = content.array_records[ARRAYS]
    return RecordDict({ARRAYS: ArrayRecord({name: Array("object", (650,), "numpy.ndarray", b"\x80\x04not numpy")})})


def _answer_nothing(content: RecordDict) -> RecordDict:  # noqa: ARG001
    return RecordDict({"m": MetricRecord({"loss": 1.0})})


def _raw(data: bytes, shape: tuple[int, ...] = (650,), dtype: str = "float32") -> Any:
    def change(content: RecordDict) -> RecordDict:
        (name,) = content.array_records[ARRAYS]
        return RecordDict({ARRAYS: ArrayRecord({name: Array(dtype, shape, "numpy.ndarray", data)})})

    return change


def _npy(shape: str, dtype: str = "<f4") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def _complex(content: RecordDict) -> RecordDict:
    (name,) = content.array_records[ARRAYS]
    return RecordDict({ARRAYS: ArrayRecord({name: Array(np.zeros(650, dtype=np.complex64))})})


def _bare_refusal(content: RecordDict) -> RecordDict:  # noqa: ARG001
    return RecordDict({FEDPRIV: ConfigRecord({"refused": "policy"})})


def _answer_strange_refusal(content: RecordDict) -> RecordDict:  # noqa: ARG001
    return RecordDict({FEDPRIV: ConfigRecord({"refused": "x" * 10, "reason": "y\n" * 10})})


@pytest.mark.parametrize(
    "change",
    [
        *(_answer_nan, _answer_longer, _answer_other_name, _answer_text, _answer_nothing, _answer_strange_refusal),
        *(_complex, _bare_refusal, _raw(b""), _raw(b"PK\x03\x04"), _raw(_npy("(650,)") + b"\0" * 4000)),
        *(_raw(_npy("(10000000000000,)")), _raw(_npy(f"({10**30},)")), _raw(_npy("(("))),
        *(_raw(_npy("(650,)", "O")), _raw(_npy("(650,)"), (10**13,)), _raw(_npy("(650,)"), dtype="object")),
    ],
)
@pytest.mark.sampled
def test_an_answer_that_cannot_be_is_left_out_and_the_run_goes_on(change: Any, tmp_path: Path) -> None:
    class Tampered(DeploymentGrid):
        def _play(self, message: Message) -> Message | None:
            answer = super()._play(message)
            if answer is not None and self.order.index(message.metadata.dst_node_id) == 1 and TERMS in message.content:
                return Message(change(answer.content), reply_to=message)
            return answer

    grid = Tampered(tmp_path / "nodes", 4, {}, trust="local")
    run_server(grid, config(rounds=2), tmp_path / "out")
    for row in rows(tmp_path / "out"):
        assert row["counted"] == [0, 2, 3]
        assert "1" in {**row["refused"], **row["invalid"], **row["failed"]}


@pytest.mark.parametrize("claimed", ["1", 0.5, True, -1, 4, 10**30, b"1"])
def test_a_node_that_gives_a_strange_number_is_not_used(claimed: Any, tmp_path: Path) -> None:
    class Strange(DeploymentGrid):
        def _play(self, message: Message) -> Message | None:
            answer = super()._play(message)
            if answer is not None and self.order.index(message.metadata.dst_node_id) == 4:
                content = RecordDict({FEDPRIV: ConfigRecord({"client": 0})})
                content.config_records[FEDPRIV].__dict__["_data"]["client"] = claimed
                return Message(content, reply_to=message)
            return answer

    grid = Strange(tmp_path / "nodes", 5, {}, trust="local")
    run_server(grid, config(rounds=1), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert row["counted"] == [0, 1, 2, 3]


def test_answers_to_what_was_not_asked_or_by_others_are_not_used(tmp_path: Path) -> None:
    """Client 1 answers in client 0's name, client 2 answers a message that does not exist."""
    ids: dict[int, str] = {}

    class Forging(DeploymentGrid):
        def _play(self, message: Message) -> Message | None:
            answer = super()._play(message)
            partition = self.order.index(message.metadata.dst_node_id)
            if answer is None or TERMS not in message.content:
                return answer
            ids[partition] = message.metadata.message_id
            if partition == 1:
                answer.metadata.__dict__["_reply_to_message_id"] = ids.get(0, "none")
            if partition == 2:
                answer.metadata.__dict__["_reply_to_message_id"] = "never"
            return answer

    grid = Forging(tmp_path / "nodes", 4, {}, trust="local")
    run_server(grid, config(rounds=1, deadline=1.0), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert row["counted"] in ([0, 3], [3])
    assert 1 not in row["counted"]
    assert 2 not in row["counted"]


def test_a_question_who_a_node_is_that_was_lost_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "_QUESTION_SECONDS", 0.1)
    asked: list[int] = []

    def hook(partition: int, message: Message) -> bool:  # noqa: ARG001
        asked.append(partition)
        return asked.count(partition) > 1

    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="local", hook=hook)
    run_server(grid, config(rounds=1, rules="min_participants = 4"), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert row["counted"] == [0, 1, 2, 3]


def test_a_run_whose_checkpoint_is_lost_does_not_begin_again(tmp_path: Path) -> None:
    toml = config(rules='min_participants = 4\ntoo_few = "stop"', deadline=0.5)

    def hook(partition: int, message: Message) -> bool:
        terms = message.content.config_records.get(TERMS)
        return not (partition == 2 and terms is not None and terms["turn"] == 2)

    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="local", hook=hook)
    with pytest.raises(UserError, match="turn 2"):
        run_server(grid, toml, tmp_path / "out")
    (tmp_path / "out" / "checkpoint.safetensors").unlink()
    with pytest.raises(UserError, match="expected the checkpoint of the recorded rounds, got a missing file"):
        run_server(grid, toml, tmp_path / "out", resume=True)


def test_what_is_said_about_devices_stands_in_the_statement(tmp_path: Path) -> None:
    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="central")
    run_server(grid, config(trust="central", rounds=1), tmp_path / "out")
    statement = " ".join((tmp_path / "out" / "privacy.txt").read_text().split())
    assert "Noise and cohorts come from the operating systems" in statement
    assert "participation.jsonl names them" in statement
    (row,) = [row for row in RunDirectory(tmp_path / "out").rows("diagnostics.jsonl") if row["round"]]
    assert not {"sum_norm", "signal_to_noise", "signal_norm"} & row.keys()


def test_a_file_elsewhere_on_the_client_is_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("Alice_Smith;HIV+\n")
    toml = config(rounds=1).replace('name = "digits"', f'name = "libsvm"\nfile = "{secret}"\nfeatures = 3')

    digest = parse_config(tomllib.loads(toml)).digest

    class Lying(DeploymentGrid):
        """Server that sends devices another config than it uses."""

        def _play(self, message: Message) -> Message | None:
            for context in self.contexts.values():
                context.run_config = {**context.run_config, "config-toml": toml, "data-root": str(tmp_path)}
            if TERMS in message.content:
                message.content.config_records[TERMS]["digest"] = digest
            return super()._play(message)

    grid = Lying(tmp_path / "nodes", 4, {}, trust="local")
    run_server(grid, config(rounds=1), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert set(row["refused"]) == {"0", "1", "2", "3"}
    assert "Alice" not in str(row)
    assert "files below this client's data folder" in row["refused"]["0"]["reason"]


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("model", 'name = "softmax"'),
        ("data", 'name = "digits"'),
        ("method", 'name = "alpha-normec"'),
        ("local", 'work = "minibatch-gradient"'),
    ],
)
def test_a_servers_config_makes_no_device_import_what_it_names(table: str, line: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "theirs.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    toml = config(rounds=1)
    assert line in toml, table
    toml = toml.replace(line, f'{line.split()[0]} = "{tmp_path / "theirs.py"}:Anything"')

    class Lying(DeploymentGrid):
        """Server that sends devices another config than it uses."""

        def _play(self, message: Message) -> Message | None:
            for context in self.contexts.values():
                context.run_config = {**context.run_config, "config-toml": toml}
            return super()._play(message)

    run_server(Lying(tmp_path / "nodes", 4, {}, trust="local"), config(rounds=1), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert set(row["refused"]) == {"0", "1", "2", "3"}
    assert not ran.exists()


def test_a_node_without_a_home_does_not_take_part_in_deployments(tmp_path: Path) -> None:
    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="local")
    for context in grid.contexts.values():
        del context.node_config["fedpriv-home"]
    run_server(grid, config(rounds=1), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert "a home with a policy" in row["failed"]["0"]


def test_clients_train_on_files_of_their_own(tmp_path: Path) -> None:
    digits = Digits().load(None)
    for i in range(4):
        part = slice(i, None, 4)
        arrays = {"inputs": digits.train_inputs[part].numpy(), "labels": digits.train_labels[part].numpy()}
        (tmp_path / "nodes" / f"node-{i}").mkdir(parents=True)
        path = tmp_path / "nodes" / f"node-{i}" / f"mine-{i}.npz"
        np.savez(path, classes=10, inputs=arrays["inputs"], labels=arrays["labels"])
    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="none", own="mine")
    toml = config("dp-fedavg", "none", work="full-gradient", batch="", rounds=8)
    run_server(grid, toml, tmp_path / "out")
    summary = RunDirectory(tmp_path / "out").read_json("summary.json")
    assert summary["test_accuracy"] > 0.5


@pytest.mark.parametrize("wrong", ["no file", "labels", "shape"])
def test_a_file_that_is_not_right_is_a_refusal(wrong: str, tmp_path: Path) -> None:
    home = tmp_path / "nodes" / "node-0"
    home.mkdir(parents=True)
    inputs, labels = np.zeros((5, 1, 8, 8), dtype=np.float32), np.zeros(5, dtype=np.int64)
    if wrong == "labels":
        labels[0] = 10
    if wrong == "shape":
        inputs = inputs[:, :, :4]
    if wrong != "no file":
        np.savez(home / "mine-0.npz", inputs=inputs, labels=labels, classes=10)
    grid = DeploymentGrid(tmp_path / "nodes", 1, {}, trust="none", own="mine")
    run_server(grid, config("dp-fedavg", "none", clients=1, work="full-gradient", batch="", rounds=1), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    expected = "as many parameters" if wrong == "shape" else "see its operator's log"
    assert expected in row["refused"]["0"]["reason"]
    assert str(tmp_path) not in str(row)


@pytest.mark.parametrize("own", ["", "mine"])
def test_a_huge_model_in_a_servers_config_is_refused_before_anything_of_it_is_built(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server sends a config for a model of ten billion parameters, but small arrays."""
    toml = config(rounds=1).replace('name = "softmax"', 'name = "mlp"\nhidden = [100000, 100000]')
    digest = parse_config(tomllib.loads(toml)).digest
    for node in range(4):
        home = tmp_path / "nodes" / f"node-{node}"
        home.mkdir(parents=True)
        arrays = {"inputs": np.zeros((5, 1, 8, 8), dtype=np.float32), "labels": np.zeros(5, dtype=np.int64)}
        np.savez(home / f"mine-{node}.npz", classes=10, **arrays)

    def build(*_: Any) -> None:
        raise AssertionError("it was built")

    class Lying(DeploymentGrid):
        def _play(self, message: Message) -> Message | None:
            for context in self.contexts.values():
                context.run_config = {**context.run_config, "config-toml": toml}
            if TERMS in message.content:
                message.content.config_records[TERMS]["digest"] = digest
            return super()._play(message)

    monkeypatch.setattr(Mlp, "build", build)
    run_server(Lying(tmp_path / "nodes", 4, {}, trust="local", own=own), config(rounds=1), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert set(row["refused"]) == {"0", "1", "2", "3"}
    assert all("as many parameters" in refused["reason"] for refused in row["refused"].values())


def test_a_run_whose_checkpoints_have_no_room_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr("fedpriv.deploy.checks.shutil.disk_usage", lambda _: usage)
    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="none")
    with pytest.raises(UserError, match="expected room for checkpoints and models, 15,600 bytes, got 1 MiB free"):
        run_server(grid, config(trust="none", rounds=1), tmp_path / "out")
    assert not grid.seen
    assert not (tmp_path / "out").exists()


def test_a_servers_disk_that_fills_up_ends_the_run_in_one_line_and_it_goes_on_later(
    tmp_path: Path, seeded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server asks clients only after it has saved the turn."""
    full, toml, real = [False], config(trust="local"), Checkpoint.write

    def write(self: Checkpoint, digest: str, promise: str, number: int, *more: Any) -> None:
        full[0] = full[0] or number == 1
        if full[0]:
            raise OSError(28, "No space left on device", str(self.path))
        real(self, digest, promise, number, *more)

    grid, report = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="local"), tmp_path / "report"
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "write", write)
        with pytest.raises(OSError, match="No space left"):
            run_server(grid, toml, tmp_path / "out", failure_report=str(report), **seeded)
    assert report.read_text().startswith(f"{tmp_path / 'out' / 'checkpoint.safetensors'}: No space left on device.")
    assert "\n" not in report.read_text()
    run_server(grid, toml, tmp_path / "out", resume=True, **seeded)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == bits_of_loop(toml, tmp_path)
    for node in range(4):
        lines = (tmp_path / "nodes" / f"node-{node}" / "state" / "ledger.jsonl").read_text().splitlines()
        assert [json.loads(line)["turn"] for line in lines] == [1, 2, 3, 4]


def test_two_nodes_cannot_be_the_same_client(tmp_path: Path) -> None:
    grid = DeploymentGrid(tmp_path / "nodes", 5, {}, trust="local")
    grid.contexts[grid.order[4]].node_config["partition-id"] = 0
    run_server(grid, config(rounds=1), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert row["counted"] == [0, 1, 2, 3]
    assert sum(TERMS in m.content for m in grid.seen) == 4
