"""An app under simulated secure aggregation: the method's own rounds to the bit, void rounds, words and refusals."""

import logging
import math
from typing import Any

import pytest
import torch
from flower_existing_app import CLIENTS, app, initial_net, train_locally
from flower_in_process import InProcessGrid, inside_a_run
from flwr.app import ArrayRecord, ConfigRecord

from fedpriv.errors import UserError
from fedpriv.flower.messages import ARRAYS, FEDPRIV, TERMS, asks_node_info
from fedpriv.flower.server import nodes
from fedpriv.mechanisms.shares import IntegerSums
from fedpriv.methods import AdaptiveBound, ServerState
from fedpriv.privacy import Everyone, Poisson, Sampling
from fedpriv.rounds import (
    Total,
    begin_round,
    client_round,
    counted_total,
    finish_round,
    make_agreement,
    skip_round,
)
from fedpriv.vectors import Layout
from strategies import AlphaNormEC, CenteredClip, Clip21, Clip21SGD2M, DPFedAvg, MethodStrategy, Privacy
from strategies.named import NamedStrategy

SUMS = Privacy(epsilon=50.0, trust="aggregator")
KEY = "ab" * 32
METHODS = {
    "alpha-normec": lambda **given: AlphaNormEC(alpha=0.5, beta=0.2, server_lr=0.3, damping=0.1, **given),
    "clip21": lambda **given: Clip21(clip_norm=0.3, **given),
    "centered-clip": lambda **given: CenteredClip(clip_norm=0.1, **given),
    "adaptive": lambda **given: Clip21(adaptive=AdaptiveBound(rate=0.5), **given),
    "clip21-sgd2m": lambda **given: Clip21SGD2M(clip_norm=0.3, **given),
    "dp-fedavg": lambda **given: DPFedAvg(clip_norm=0.3, **given),
}


def start(strategy: MethodStrategy, grid: InProcessGrid, rounds: int = 6, **more: Any) -> Any:
    arrays = ArrayRecord(initial_net().state_dict())
    with inside_a_run():
        return strategy.start(
            grid, arrays, num_rounds=rounds, timeout=5.0, train_config=ConfigRecord({"lr": 0.1}), **more
        )


def reference(
    strategy: NamedStrategy, rounds: int, missing: dict[int, set[int]], band: int
) -> tuple[ServerState, list[bool]]:
    """Return the state after the same run in plain code, and whether each round is void: `band` is."""
    server, client, _ = make_agreement(
        strategy.method, strategy.agreement.server.sampling, strategy.plan, strategy.streams
    )
    net = initial_net()
    layout = Layout.of(net.state_dict())
    state = server.init(layout.flatten(net.state_dict()))
    memories = {i: strategy.method.init_client(layout.size) for i in range(CLIENTS)}
    voids = []
    for k in range(1, rounds + 1):
        broadcast = begin_round(server, state, k)
        summed, after, answered = broadcast.empty_sum(client), dict(memories), []
        for i in broadcast.cohort.tolist():
            if i in missing.get(k, set()):
                continue
            net.load_state_dict(layout.unflatten(state.model))
            train_locally(net, i, 0.1)
            signal = state.model - layout.flatten(net.state_dict())
            message, after[i] = client_round(client, i, memories[i], signal, broadcast.round, k, broadcast.shared)
            summed.add(message)
            answered.append(i)
        total = counted_total(Total(summed.value, len(answered), 0, math.nan), client.sums, len(answered))
        voids.append(total.void or k == band)
        if voids[-1]:
            state = skip_round(server, state)
        else:
            state, memories = finish_round(server, state, k, total.sum), after
    return state, voids


def without(missing: dict[int, set[int]], grid: InProcessGrid) -> InProcessGrid:
    """Return the grid with clients that do not answer in some rounds."""
    grid.hook = lambda i, message: i not in missing.get(int(message.metadata.group_id or 0), set())
    return grid


@pytest.mark.parametrize("cohort", [Everyone(CLIENTS), Poisson(CLIENTS, 0.6)], ids=lambda c: c.name)
@pytest.mark.parametrize("method", METHODS)
def test_an_apps_simulated_sums_are_the_methods_own_rounds_to_the_bit(
    method: str, cohort: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients drop out; one sum is in the guard band; some have too few clients. Void rounds move no memory."""
    missing, band = {2: {0}, 4: {1, 2}, 5: {3}}, 3
    real = IntegerSums.total
    seen: list[int] = []

    def total(sums: IntegerSums, sum_: torch.Tensor) -> torch.Tensor | None:
        seen.append(1)
        return None if strategy._broadcast.address == band else real(sums, sum_)

    strategy = METHODS[method](privacy=SUMS, cohort=cohort, seed=4, max_failures=1.0)
    with monkeypatch.context() as patched:
        patched.setattr(IntegerSums, "total", total)
        start(strategy, without(missing, InProcessGrid(app, CLIENTS)), rounds=7)
    state, voids = reference(strategy, 7, missing, band)
    assert seen
    assert voids[band - 1]
    assert voids[3] or cohort.by_coins  # three of five clients answered, and a sum needs four
    assert not all(voids)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(strategy.state, state, strict=True))
    assert strategy.attendance.voids == sum(voids)


def test_two_lines_simulate_secure_aggregation_and_the_statement_says_simulated(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grid = InProcessGrid(app, CLIENTS)
    strategy = AlphaNormEC(privacy=Privacy(epsilon=8.0, trust="aggregator", colluders=1), num_clients=CLIENTS)
    with caplog.at_level(logging.INFO, "flwr"):
        start(strategy, grid, rounds=2)
    words = " ".join(strategy.statement.split())
    assert "Simulated: one process computed all messages" in words
    assert "Masks:" not in words
    assert "The app:" not in words
    assert "with up to 1 clients on its side" in words
    plan = strategy.plan
    assert plan is not None
    assert plan.aggregation is not None
    assert (plan.adjacency, plan.aggregation.least_survivors, plan.aggregation.colluders) == ("replace", 4, 1)
    assert plan.aggregation.most == CLIENTS
    assert plan.epsilon <= 8.0
    assert plan.shares.client == pytest.approx(plan.noise_stddev / math.sqrt(3.0))
    trained = [message for message in grid.seen if not asks_node_info(message.content)]
    assert all("seed" not in message.content.config_records[FEDPRIV] for message in trained)
    grid_step = strategy.agreement.client.release_grid
    assert grid_step is not None
    for answer in grid.answers[CLIENTS:]:
        assert list(answer.content) == [ARRAYS]
        values = torch.cat([v.reshape(-1) for v in answer.content.array_records[ARRAYS].to_torch_state_dict().values()])
        assert torch.equal(values / grid_step, torch.round(values / grid_step))


def test_a_run_whose_rounds_are_all_void_says_so() -> None:
    strategy = DPFedAvg(privacy=SUMS, num_clients=CLIENTS, seed=1)
    missing = {k: {0, 1} for k in (1, 2)}
    with pytest.raises(UserError, match="the run: expected messages that count, got 0 messages in 2 rounds"):
        start(strategy, without(missing, InProcessGrid(app, CLIENTS)), rounds=2)
    strategy = DPFedAvg(privacy=SUMS, cohort=Poisson(CLIENTS, 0.001), seed=1)
    with pytest.raises(UserError, match="0 messages in 2 rounds; 2 rounds void"):
        start(strategy, InProcessGrid(app, CLIENTS), rounds=2)


def test_a_client_that_fails_in_a_void_round_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    strategy = DPFedAvg(privacy=SUMS, num_clients=CLIENTS, seed=1)
    start(strategy, without({1: {0, 1}}, InProcessGrid(app, CLIENTS)), rounds=2)
    assert strategy.attendance.voids == 1
    assert "round 1 is void" in caplog.text


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"privacy": Privacy(epsilon=8.0, colluders=1)}, "Privacy colluders: expected no value unless trust"),
        ({"privacy": Privacy(epsilon=8.0, least_survivors=3)}, "Privacy least_survivors: expected no value unless"),
        (
            {"privacy": Privacy(epsilon=8.0, trust="aggregator", least_survivors=CLIENTS + 1)},
            "aggregation.least_survivors: expected more than the 0 colluders, and at most the 5 clients",
        ),
        ({"privacy": SUMS, "memory": "sent"}, 'method.memory: expected "noiseless" with secure aggregation'),
        (
            {"privacy": SUMS, "helpers": [KEY]},
            "helpers: expected clients with a home, a policy and keys, got clients",
        ),
        ({"privacy": Privacy(epsilon=8.0), "helpers": [KEY]}, "helpers: expected clients with a home"),
        ({"privacy": SUMS, "helpers": []}, "helpers: expected the identity key of each helper, got an empty list"),
        ({"privacy": SUMS, "helpers": [KEY, KEY]}, "got one of them twice"),
        ({"privacy": SUMS, "helpers": "ab"}, "helpers: expected an identity key, 64 digits of 0-9a-f, got 'ab'"),
        ({"privacy": SUMS, "helpers": "/nowhere/admin"}, "/nowhere/admin/helpers: expected the identity key of each"),
    ],
)
def test_what_cannot_hold_is_refused_in_one_line_before_any_round(
    given: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_SETTLED_SECONDS", 0.0)
    grid = InProcessGrid(app, CLIENTS)
    grid.get_node_ids = lambda: list(grid.order)
    with pytest.raises(UserError) as refused:
        start(AlphaNormEC(join_timeout=1.0, **given), grid)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not any(TERMS in message.content.config_records for message in grid.seen)


def test_a_simulation_with_helpers_is_told_to_remove_them() -> None:
    with pytest.raises(UserError, match=r"expected 6, one for each client and helper, got 5 .* remove helpers"):
        start(
            AlphaNormEC(privacy=SUMS, helpers=KEY, num_clients=CLIENTS, join_timeout=0.5), InProcessGrid(app, CLIENTS)
        )
