"""A client is guarded behind the mod: under local trust, everything from the server may be hostile."""

import logging
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flower_existing_app import CLIENTS, app, initial_net, train
from flower_in_process import InProcessGrid, inside_a_run
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients import private_mod
from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.heads import HEAD
from fedpriv.deploy.device.ledger import Ledger, spent
from fedpriv.deploy.device.policy import POLICY_FILE
from fedpriv.errors import UserError
from fedpriv.flower.messages import (
    ARRAYS,
    CONFIG,
    FEDPRIV,
    TERMS,
    ClientInstructions,
    NodeInfo,
    RunTerms,
    ask_node_info,
    refused,
)
from fedpriv.flower.privacy_terms import promised
from fedpriv.flower.simulation import SIMULATION, playing_clients, simulated
from fedpriv.methods import AlphaNormEC as AlphaNormECRules
from fedpriv.methods import DPFedAvg as DPFedAvgRules
from fedpriv.privacy import Everyone, TrustName, make_plan
from strategies import AlphaNormEC, DPFedAvg, Privacy

SECRET = "row 17: Alice Smith"
METHOD = AlphaNormECRules(alpha=1.0, beta=0.5)
PLAN = make_plan(trust="local", sampling=Everyone(CLIENTS), rounds=9, delta=1e-5, l2_bound=1.0, noise_multiplier=2.0)
LR = ConfigRecord({"lr": 0.1})


def context(home: Path | None, **run_config: Any) -> Context:
    node: dict[str, Any] = {"partition-id": 0, "num-partitions": CLIENTS}
    if home is not None:
        node["fedpriv-home"] = str(home)
    return Context(run_id=1, node_id=7, node_config=node, state=RecordDict(), run_config=run_config)


def instructions(**changes: Any) -> ClientInstructions:
    return ClientInstructions(
        **{"method": METHOD, "round": 1, "client": 0, "noise_stddev": PLAN.noise_stddev} | changes
    )


def terms(**changes: Any) -> RunTerms:
    told: dict[str, Any] = {"run": "r1", "turn": 1, "last_turn": 0, "epoch": 0, "digest": ""}
    return RunTerms(**told | promised(PLAN, PLAN.sampling, PLAN.rounds) | changes)


def ask(
    node: Context, o: ClientInstructions, t: RunTerms | None, kind: str = "train", played: Any = app, lr: float = 0.1
) -> Message:
    content = {
        ARRAYS: ArrayRecord(initial_net().state_dict()),
        CONFIG: ConfigRecord({"lr": lr}),
        FEDPRIV: o.to_record(),
    }
    if t is not None:
        content[TERMS] = t.to_record()
    with inside_a_run():
        return played(Message(RecordDict(content), node.node_id, kind), node)


def said(answer: Message) -> str:
    """Return the reason why a client does not answer: an error of the node, or a refusal."""
    if answer.has_error():
        return answer.error.reason or ""
    no = refused(answer.content)
    assert no is not None
    return no[1]


def ledger(home: Path) -> list[Any]:
    return Ledger(home / "state").entries()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def untouched() -> ClientApp:
    """Return an app that must not even see the instructions."""
    made = ClientApp(mods=[private_mod])

    def fails(message: Message, _: Context) -> Message:
        raise AssertionError(f"the app saw a {message.metadata.message_type}")

    for kind in (made.train, made.evaluate, made.query):
        kind()(fails)
    made.train("more")(fails)
    return made


@pytest.mark.parametrize("kind", ["train", "train.more", "evaluate", "query"])
@pytest.mark.parametrize("changes", [{}, {"seed": 3, "noise_stddev": 0.0}, {"private": False, "diagnostics": True}])
def test_a_node_without_a_home_answers_nothing_but_in_simulations(
    kind: str, changes: dict[str, Any], untouched: ClientApp
) -> None:
    node = context(None, simulation=True, **{"fedpriv-home": "/tmp", SIMULATION: "1"})
    reason = said(ask(node, instructions(**changes), terms(), kind, untouched))
    assert "node: expected a home with a policy" in reason
    assert "fedpriv-home=" in reason


def test_a_node_without_a_home_is_found_out_before_training() -> None:
    grid = InProcessGrid(app, 2, simulated=False)
    with inside_a_run(), pytest.raises(UserError, match=r"node \d+: private_mod: node: expected a home"):
        DPFedAvg(num_clients=2).start(grid, ArrayRecord(initial_net().state_dict()), num_rounds=1, timeout=5.0)


def test_only_the_process_itself_says_that_it_plays_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SIMULATION, raising=False)
    assert not simulated()
    with playing_clients():
        with playing_clients():
            assert simulated()
        assert simulated()
    assert not simulated()
    monkeypatch.setenv(SIMULATION, "1")
    assert simulated()


def test_a_home_is_guarded_in_a_simulation_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIMULATION, "1")
    with playing_clients():
        assert "seed: expected noise from this client's" in said(ask(context(home), instructions(seed=3), terms()))


HOSTILE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no noise": ({"noise_stddev": 0.0}, {}, "limits.min_noise_multiplier: expected at least 0.3, got 0"),
    "less noise than promised": ({"noise_stddev": 3.0}, {}, "noise: expected a standard deviation of 4"),
    "little noise, promised as little": ({"noise_stddev": 0.2}, {"noise_multiplier": 0.1}, "at least 0.3, got 0.1"),
    "a seed": ({"seed": 3}, {}, "seed: expected noise from this client's operating system"),
    "norms of bare signals": ({"diagnostics": True}, {}, "diagnostics: expected requests for messages only"),
    "not private": ({"private": False}, {}, "private: expected requests for messages only"),
    "not private, and nothing promised": (
        {"private": False, "diagnostics": False, "noise_stddev": 0.0},
        {"trust": "none"},
        "accepts.trust: expected local, got 'none'",
    ),
    "bare messages to a trusted server": ({"noise_stddev": 0.0}, {"trust": "central"}, "accepts.trust: expected local"),
    "a huge bound": (
        {"method": DPFedAvgRules(clip_norm=1e4), "noise_stddev": 4e4},
        {"client_memory": False},
        "limits.max_l2_bound: expected at most 100",
    ),
    "no memory, it says": ({}, {"client_memory": False}, "client_memory: expected true"),
    "another client's part": ({"client": 1}, {}, "instructions: expected client 0, got 1"),
    "no terms": ({}, {"none": True}, "instructions: expected the terms of a deployment, got a message without terms"),
    "a run that is a path": ({}, {"run": "../../elsewhere"}, "run: expected a name"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_the_default_policy_does_not_allow_is_refused_and_nothing_is_released(
    name: str, home: Path, untouched: ClientApp
) -> None:
    asked, told, line = HOSTILE[name]
    reason = said(
        ask(context(home), instructions(**asked), None if "none" in told else terms(**told), played=untouched)
    )
    assert reason.startswith("private_mod: ")
    assert line in reason
    assert ledger(home) == []


def test_the_same_order_again_and_again_gets_the_same_bytes_and_is_paid_for_once(home: Path) -> None:
    def sent(lr: float = 0.1) -> bytes:
        """Send from a new process each time, so that only the disk keeps state."""
        answer = ask(context(home), instructions(), terms(), lr=lr)
        return b"".join(array.data for array in answer.content.array_records[ARRAYS].values())

    assert len({sent() for _ in range(5)}) == 1
    assert len(ledger(home)) == 1
    assert "turn: expected a turn after 1, or the same request again" in said(
        ask(context(home), instructions(), terms(), lr=0.2)
    )


def test_the_same_order_under_other_names_ends_with_the_budget(home: Path) -> None:
    answers = []
    while not answers or refused(answers[-1].content) is None:
        answers.append(ask(context(home), instructions(), terms(run=f"run{len(answers)}")))
        assert len(answers) < 100
    assert "its privacy budget does not allow another message" in said(answers[-1])
    entries = ledger(home)
    assert len(entries) == len(answers) - 1
    assert spent(entries, 1e-5, "replace") <= 8.0 < spent([*entries, entries[0]], 1e-5, "replace")


@pytest.mark.parametrize("kind", ["evaluate", "query"])
def test_a_guarded_client_answers_nothing_but_training(kind: str, home: Path, untouched: ClientApp) -> None:
    reason = said(ask(context(home), instructions(), terms(), kind, untouched))
    assert "messages for training only" in reason or "a message for training" in reason


def accept(home: Path, **keys: str) -> None:
    """Write the default policy with other values of keys in [accepts]."""
    ask(context(home), instructions(seed=1), terms())
    path = home / POLICY_FILE
    text = path.read_text()
    for key, value in keys.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{key} = ")]
        text = text.replace(line, f"{key} = {value}")
    path.write_text(text)


def test_an_evaluation_that_the_policy_accepts_releases_metrics_alone(home: Path) -> None:
    @(talkative := ClientApp(mods=[private_mod])).evaluate()
    def _(message: Message, _: Context) -> Message:
        arrays = ArrayRecord({"rows": torch.ones(2)})
        content = {"metrics": MetricRecord({"loss": 1.0}), "rows": arrays, "note": ConfigRecord({"text": SECRET})}
        return Message(RecordDict(content), reply_to=message)

    accept(home, evaluation="true")
    answer = ask(context(home), instructions(), terms(), "evaluate", talkative)
    assert list(answer.content) == ["metrics"]


def test_metrics_leave_only_where_nothing_is_promised_and_the_policy_accepts_that(home: Path) -> None:
    accept(home, trust='"none"')
    nothing = {"trust": "none", "noise_multiplier": 0.0}
    public = ask(context(home), instructions(noise_stddev=0.0, private=False), terms(**nothing))
    assert "metrics" in public.content
    private = ask(context(home), instructions(), terms(run="r2"))
    assert list(private.content) == [ARRAYS, FEDPRIV, HEAD]
    assert "private: expected" in said(ask(context(home), instructions(private=False), terms(run="r3")))


def failing(how: str) -> ClientApp:
    made = ClientApp(mods=[private_mod])

    def fail(message: Message, node: Context) -> Message:
        if how == "raises":
            raise KeyError(SECRET)
        if how == "exits":
            raise SystemExit(SECRET)
        if how == "says so":
            return Message(Error(code=0, reason=SECRET), reply_to=message)
        answer = train(message, node)
        content: dict[str, Any] = {SECRET: answer.content[ARRAYS]}
        if how == "two models":
            content[ARRAYS] = answer.content[ARRAYS]
        if how == "another model":
            content = {ARRAYS: ArrayRecord({SECRET: torch.ones(2)})}
        return Message(RecordDict(content), reply_to=message)

    made.train()(fail)
    made.evaluate()(fail)
    return made


FAILURES = ["raises", "exits", "says so", "two models", "another model"]


@pytest.mark.parametrize("how", FAILURES)
def test_nothing_that_an_app_says_when_it_fails_leaves_a_guarded_client(
    how: str, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accept(home, trust='"central"')
    told = terms(trust="central", adjacency="add-or-remove")
    with caplog.at_level(logging.WARNING, "flwr"):
        reason = said(ask(context(home), instructions(noise_stddev=0.0), told, played=failing(how)))
    assert reason == "private_mod: its app failed; see its operator's log"
    assert SECRET in caplog.text
    assert ledger(home) == []
    accept(home, evaluation="true")
    if how in ("raises", "says so"):
        assert SECRET not in said(ask(context(home), instructions(), terms(), "evaluate", failing(how)))


@pytest.mark.parametrize("how", FAILURES)
def test_under_local_trust_a_server_does_not_even_learn_that_an_app_failed(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure can depend on the data, and would leak a free bit of them for each set of instructions."""
    sound = ask(context(tmp_path / "sound"), instructions(), terms())
    with caplog.at_level(logging.WARNING, "flwr"):
        failed = ask(context(tmp_path / "failed"), instructions(), terms(), played=failing(how))
    assert list(failed.content) == list(sound.content)
    assert failed.content[FEDPRIV] == sound.content[FEDPRIV]
    arrays = failed.content.array_records[ARRAYS], sound.content.array_records[ARRAYS]
    assert len({tuple((name, a.dtype, tuple(a.shape)) for name, a in of.items()) for of in arrays}) == 1
    assert arrays[0] != arrays[1]
    assert any(np.any(array.numpy()) for array in arrays[0].values())
    assert [entry.turn for entry in ledger(tmp_path / "failed")] == [1]
    assert SECRET in caplog.text


@pytest.mark.parametrize("how", FAILURES)
def test_nor_a_private_simulation_which_a_deployment_follows(how: str, caplog: pytest.LogCaptureFixture) -> None:
    with playing_clients():
        private = said(ask(context(None), instructions(seed=1), None, played=failing(how)))
        assert private == "private_mod: its app failed; see its operator's log"
        assert SECRET in caplog.text
        assert how != "raises" or "Traceback" in caplog.text
        if how == "raises":
            with pytest.raises(KeyError, match="Alice"):
                ask(context(None), instructions(private=False, noise_stddev=0.0), None, played=failing(how))


def test_what_a_client_s_disk_holds_is_not_told(home: Path) -> None:
    ask(context(home), instructions(), terms())
    (home / "state" / "ledger.jsonl").unlink()
    reason = said(ask(context(home), instructions(), terms(run="r2")))
    assert str(home) not in reason
    (home / POLICY_FILE).write_text("[limits]\nepsilon = 'much'\n")
    assert str(home) not in (reason := said(ask(context(home), instructions(), terms(run="r3"))))
    assert "operator's log" in reason


def test_a_home_that_cannot_be_entered_is_not_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fedpriv.deploy.device.guard.write_default_policy", closed)
    assert said(ask(context(home), instructions(), terms())).endswith("see its operator's log")
    assert f"Permission denied: '{home}'" in caplog.text


def test_a_home_is_an_absolute_path(untouched: ClientApp, caplog: pytest.LogCaptureFixture) -> None:
    said(ask(context(Path("somewhere")), instructions(), terms(), played=untouched))
    assert "--node-config fedpriv-home: expected an absolute path" in caplog.text


def test_the_default_policy_is_written_once_for_the_operator_to_read(home: Path) -> None:
    with inside_a_run():
        answer = app(Message(ask_node_info(), 7, "train"), context(home))
    assert NodeInfo.of_answer(answer.content) == NodeInfo(0, guarded=True)
    path = home / POLICY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    policy = Device.at(home).policy
    assert (policy.accepts.trust, policy.accepts.evaluation, policy.limits.epsilon) == ("local", False, 8.0)
    path.write_text(path.read_text().replace("epsilon = 8.0", "epsilon = 0.01"))
    assert "budget" in said(ask(context(home), instructions(), terms()))


def test_a_policy_that_names_models_is_not_met_by_an_app_whose_model_has_no_name(home: Path) -> None:
    accept(home, models='["softmax"]')
    assert "accepts.models: expected softmax" in said(ask(context(home), instructions(), terms()))


class Homes(InProcessGrid):
    """Nodes of real clients with separate homes."""

    def __init__(self, folder: Path, played: ClientApp = app, **more: Any) -> None:
        super().__init__(played, CLIENTS, simulated=False, **more)
        for partition, node in enumerate(self.order):
            self.contexts[node].node_config["fedpriv-home"] = str(folder / str(partition))


def start(strategy: Any, grid: InProcessGrid, rounds: int) -> None:
    with inside_a_run():
        strategy.start(grid, ArrayRecord(initial_net().state_dict()), num_rounds=rounds, timeout=5.0, train_config=LR)


def restarting(grid: InProcessGrid) -> Any:
    """Clear a node's state before every message, as Flower does when the node restarts."""

    def hook(_: int, message: Message) -> bool:
        grid.contexts[message.metadata.dst_node_id].state = RecordDict()
        return True

    return hook


def test_guarded_clients_keep_their_memories_over_restarts_and_charge_what_the_strategy_states(tmp_path: Path) -> None:
    grid = Homes(tmp_path)
    grid.hook = restarting(grid)
    strategy = AlphaNormEC(privacy=Privacy(epsilon=7.9, trust="local"), num_clients=CLIENTS)
    start(strategy, grid, 3)
    assert strategy.plan is not None
    for partition in range(CLIENTS):
        entries = ledger(tmp_path / str(partition))
        assert [entry.turn for entry in entries] == [1, 2, 3]
        assert spent(entries, 1e-5, "replace") == pytest.approx(strategy.plan.epsilon, rel=1e-9)
    assert all(list(answer.content) == [ARRAYS, FEDPRIV, HEAD] for answer in grid.answers[CLIENTS:])


def test_a_strategy_that_shows_heads_finds_out_clients_that_lost_their_records(tmp_path: Path) -> None:
    def strategy() -> DPFedAvg:
        return DPFedAvg(privacy=Privacy(epsilon=3.0, trust="local"), num_clients=CLIENTS, heads=tmp_path / "heads.json")

    start(strategy(), Homes(tmp_path), 2)
    for client in range(CLIENTS):
        (tmp_path / str(client) / "state").rename(tmp_path / f"lost-{client}")
    with pytest.raises(UserError, match=r"client 0: refuses \(trouble\): private_mod: its records cannot be read"):
        start(strategy(), Homes(tmp_path), 2)


def test_a_seeded_strategy_is_a_simulation_s_and_gets_nothing_from_guarded_clients(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed: expected noise from this client's operating system"):
        start(DPFedAvg(privacy=Privacy(epsilon=3.0, trust="local"), num_clients=CLIENTS, seed=3), Homes(tmp_path), 1)
    for node in range(CLIENTS):
        assert ledger(tmp_path / str(node)) == []


def test_the_statement_says_against_whom_a_plain_flower_app_is_no_protection() -> None:
    expected: dict[TrustName, bool] = {"local": True, "central": False}
    for trust, says in expected.items():
        strategy = DPFedAvg(privacy=Privacy(epsilon=3.0, trust=trust), num_clients=CLIENTS)
        start(strategy, InProcessGrid(app, CLIENTS), 1)
        statement = " ".join(strategy.statement.split())
        assert ("not hold against a server that supplies the app" in statement) == says
        assert "a server cannot forge it, but can withhold it" in statement
