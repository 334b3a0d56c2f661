"""Correlated noise and clients that take turns, for existing apps: the bits, failures, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flower_existing_app import CLIENTS, app, initial_net, train_locally
from flower_in_process import InProcessGrid, inside_a_run
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from test_flower_guard import Homes, ledger
from test_flower_guard import start as start_guarded

from fedpriv.deploy.device.ledger import spent
from fedpriv.deploy.device.policy import POLICY_FILE
from fedpriv.errors import UserError
from fedpriv.flower.messages import asks_node_info
from fedpriv.methods import AdaptiveBound
from fedpriv.privacy import NoiseChoice, Separated
from fedpriv.rounds import begin_round, client_round, finish_round, make_agreement
from fedpriv.streams import Purpose, SystemStreams
from fedpriv.vectors import Layout
from strategies import AlphaNormEC, Clip21, DPFedAvg, Privacy
from strategies.named import NamedStrategy

ROUNDS = 7
LR = ConfigRecord({"lr": 0.1})
CENTRAL, BANDED = Privacy(noise_multiplier=1.0), NoiseChoice(kind="banded")
TURNS = Separated(CLIENTS, 2)


def start(strategy: NamedStrategy, grid: InProcessGrid, rounds: int = ROUNDS) -> None:
    arrays = ArrayRecord(initial_net().state_dict())
    with inside_a_run():
        strategy.start(grid, arrays, num_rounds=rounds, timeout=60.0, train_config=LR)


def reference(strategy: NamedStrategy, absent: tuple[int, ...] = (), rounds: int = ROUNDS) -> Any:
    """Return the state after the same run in plain code, in which the clients `absent` never answer."""
    method, plan = strategy.method, strategy.plan
    server, client, _ = make_agreement(method, strategy.agreement.server.sampling, plan, strategy.streams)
    net = initial_net()
    layout = Layout.of(net.state_dict())
    state = server.init(layout.flatten(net.state_dict()))
    memories = {i: method.init_client(layout.size) for i in range(CLIENTS)}
    for k in range(1, rounds + 1):
        broadcast = begin_round(server, state, k)
        summed = broadcast.empty_sum(client)
        for i in set(broadcast.cohort.tolist()) - set(absent):
            net.load_state_dict(layout.unflatten(state.model))
            train_locally(net, i, 0.1)
            signal = state.model - layout.flatten(net.state_dict())
            message, memories[i] = client_round(client, i, memories[i], signal, k, shared=broadcast.shared)
            summed.add(message)
        state = finish_round(server, state, k, summed.value)
    return state


def silent(client: int) -> Any:
    return lambda partition, message: partition != client or asks_node_info(message.content)


MADE: dict[str, Any] = {
    "banded": lambda: DPFedAvg(clip_norm=0.3, noise=BANDED, cohort=TURNS, privacy=CENTRAL, seed=3),
    "feedback": lambda: Clip21(clip_norm=0.3, noise=BANDED, cohort=TURNS, privacy=Privacy(epsilon=8.0), seed=3),
    "side values": lambda: DPFedAvg(
        noise=BANDED, cohort=TURNS, privacy=CENTRAL, adaptive=AdaptiveBound(rate=0.5), seed=3
    ),
    "cyclic-banded": lambda: DPFedAvg(
        noise=NoiseChoice(kind="cyclic-banded"), cohort=Separated(CLIENTS, 2, 0.4), privacy=CENTRAL, seed=3
    ),
    "geometric": lambda: AlphaNormEC(
        damping=0.2, noise=NoiseChoice(kind="geometric-schedule"), num_clients=CLIENTS, privacy=CENTRAL, seed=3
    ),
    "in turns": lambda: DPFedAvg(cohort=TURNS, privacy=CENTRAL, seed=3),
}


@pytest.mark.parametrize("absent", [(), (3,)], ids=["all answer", "one is silent"])
@pytest.mark.parametrize("kind", MADE)
def test_an_apps_run_is_the_method_with_noise_that_returns(kind: str, absent: tuple[int, ...]) -> None:
    """A client that fails counts as one with a zero message; its round keeps its row, and its noise."""
    strategy = MADE[kind]()
    start(strategy, InProcessGrid(app, CLIENTS, hook=silent(3) if absent else lambda *_: True))
    state = reference(strategy, absent)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(strategy.state, state, strict=True))
    assert "noise_earlier" in state._fields or kind in ("geometric", "in turns")
    assert ("banded matrix factorization" in strategy.statement) == ("noise_earlier" in state._fields)


def test_the_noise_follows_the_methods_memory_and_epsilon_is_met() -> None:
    privacy = Privacy(epsilon=4.0)
    found = {}
    for damping in (0.0, 0.3):
        method = AlphaNormEC(damping=damping, server_normalization=False).method
        plan = privacy.plan(method, TURNS, 20, noise=BANDED)
        assert plan.noise is not None
        assert plan.epsilon == pytest.approx(4.0, rel=0.01)
        found[damping] = plan.noise.as_dict()
    assert found[0.3]["damping"] == 0.3
    assert found[0.0]["coefficients"] != found[0.3]["coefficients"]
    assert privacy.plan(method, TURNS, 20, noise=NoiseChoice(kind="independent")).noise is None


def test_a_round_in_which_memories_are_reset_keeps_its_row() -> None:
    """Otherwise a client's turns would be one row closer than the plan says."""
    grid = InProcessGrid(app, CLIENTS)

    def restart(_: int, message: Message) -> bool:
        if message.metadata.group_id == "5":
            grid.contexts[message.metadata.dst_node_id].state = RecordDict()
        return True

    grid.hook = restart
    strategy = Clip21(clip_norm=0.3, noise=BANDED, cohort=Separated(CLIENTS, 3), privacy=CENTRAL, seed=3)
    start(strategy, grid, rounds=5)
    state, before = strategy.state._asdict(), reference(strategy, rounds=4)
    assert strategy.attendance.resets == 1
    assert torch.equal(state["model"], before.model)
    assert not state["memory"].any()
    assert not state["noise_earlier"][0].any()
    assert torch.equal(state["noise_earlier"][1], before.noise_earlier[0])


WRONG: dict[str, tuple[Any, str]] = {
    "no privacy": (lambda: DPFedAvg(noise=BANDED, cohort=TURNS), "noise: expected None without privacy, got banded"),
    "everyone": (lambda: DPFedAvg(noise=BANDED, privacy=CENTRAL, num_clients=CLIENTS), r"cohort\.sampling: .*1\.225"),
    "local": (
        lambda: DPFedAvg(noise=BANDED, cohort=TURNS, privacy=Privacy(epsilon=8.0, trust="local")),
        r"\[noise\]: expected no such value with privacy\.trust",
    ),
    "local without noise over rounds": (
        lambda: DPFedAvg(cohort=TURNS, privacy=Privacy(epsilon=8.0, trust="local")),
        r'cohort: expected no separated turns with trust="local", got min_separation=2',
    ),
    "aggregator": (
        lambda: DPFedAvg(noise=BANDED, cohort=TURNS, privacy=Privacy(epsilon=8.0, trust="aggregator")),
        r"cohort\.sampling: expected no such value with privacy\.trust",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_promised_is_refused_before_anyone_is_asked(case: str) -> None:
    make, words = WRONG[case]
    grid = InProcessGrid(app, CLIENTS)
    with pytest.raises(UserError, match=words):
        start(make(), grid)
    assert all(asks_node_info(message.content) for message in grid.seen)


def test_real_nodes_answer_in_turns_that_no_restart_changes(tmp_path: Path) -> None:
    """Noise and coins are secret, groups are not: they stay for the whole run. Each node charges all of its turns."""
    grid = Homes(tmp_path)
    for client in range(CLIENTS):
        (tmp_path / str(client)).mkdir()
        limits = '[accepts]\ntrust = "central"\n[limits]\nepsilon = 100.0\ndelta = 1e-5\n'
        (tmp_path / str(client) / POLICY_FILE).write_text(limits)
    strategy = DPFedAvg(noise=BANDED, cohort=TURNS, privacy=Privacy(epsilon=3.0))
    start_guarded(strategy, grid, ROUNDS)
    assert strategy.plan is not None
    groups = np.floor(SystemStreams().source(Purpose.GROUP).uniform(CLIENTS) * 2)
    assert 0 < groups.sum() < CLIENTS
    for client, group in enumerate(groups.tolist()):
        entries = ledger(tmp_path / str(client))
        assert [entry.turn for entry in entries] == list(range(1 + int(group), ROUNDS + 1, 2))
        assert spent(entries, 1e-5, "add-or-remove") == pytest.approx(strategy.plan.epsilon)
        assert spent(entries, 1e-5, "replace") == pytest.approx(strategy.plan.under_replace().epsilon)
        assert spent(entries, 1e-5, "replace") > 1.5 * strategy.plan.epsilon
