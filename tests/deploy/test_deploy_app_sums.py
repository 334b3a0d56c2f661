"""A user's app on nodes with policies and keys, under secure aggregation with helpers: sums, faults and refusals."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_in_process import DeploymentGrid
from flower_existing_app import CLIENTS, app, initial_net
from flower_in_process import InProcessGrid, NodeError, inside_a_run
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from clients.client_app import app as helper_app
from fedpriv.deploy import server as deployment
from fedpriv.deploy.device import guard as guard_module
from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.ledger import Ledger
from fedpriv.deploy.device.policy import POLICY_FILE
from fedpriv.deploy.helper.folder import SIGNING_FILE, make_signing_key
from fedpriv.deploy.helper.messages import HELPER_HOME, question_of
from fedpriv.errors import UserError
from fedpriv.flower.messages import ARRAYS, CONFIG, FEDPRIV, TERMS, masked_of, refused
from fedpriv.flower.server.attendance import Attendance
from fedpriv.methods import AdaptiveBound
from fedpriv.privacy import Poisson
from fedpriv.secure import Masked
from fedpriv.streams import Streams
from strategies import AlphaNormEC, CenteredClip, Clip21, DPFedAvg, MethodStrategy, Privacy

SUMS = Privacy(epsilon=50.0, trust="aggregator", colluders=1)
METHODS = {
    "alpha-normec": lambda **given: AlphaNormEC(alpha=0.5, beta=0.2, server_lr=0.3, damping=0.1, **given),
    "clip21": lambda **given: Clip21(clip_norm=0.3, **given),
    "centered-clip": lambda **given: CenteredClip(clip_norm=0.1, **given),
    "adaptive": lambda **given: Clip21(adaptive=AdaptiveBound(rate=0.5), **given),
    "dp-fedavg": lambda **given: DPFedAvg(clip_norm=0.3, **given),
}


class Clock:
    """Clock that advances only while the server sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(deployment, "time", Clock())
    monkeypatch.setattr(deployment, "_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(MethodStrategy, "rescue_folder", tmp_path)


class Nodes(DeploymentGrid):
    """Nodes that have fixed the user's app, each with a policy and keys, and helpers with fedpriv's own app."""

    def __init__(self, folder: Path, helpers: int = 1, trust: str = "aggregator", **more: Any) -> None:
        super().__init__(folder, CLIENTS, {}, trust=trust, helpers=helpers, **more)
        self.masked: list[Masked] = []
        self.keys = self.parties["helpers"]

    def get_node_ids(self) -> list[int]:
        return list(self.order)

    def _play(self, message: Message) -> Message | None:
        node = self.contexts[message.metadata.dst_node_id]
        self.app = helper_app if HELPER_HOME in node.node_config else app
        answer = super()._play(message)
        if answer is not None and TERMS in message.content.config_records and answer.has_content():
            assert ARRAYS not in answer.content
            if refused(answer.content) is None:
                assert set(answer.content) == {"masked", "head"}
                self.masked.append(Masked.from_bytes(masked_of(answer.content)))
        return answer


def start(strategy: MethodStrategy, grid: InProcessGrid, rounds: int = 5, net: Any = None, **more: Any) -> Any:
    arrays = ArrayRecord(initial_net().state_dict()) if net is None else net
    with inside_a_run():
        return strategy.start(
            grid, arrays, num_rounds=rounds, timeout=5.0, train_config=ConfigRecord({"lr": 0.1}), **more
        )


def round_of(message: Message) -> int:
    """Return the round of a message to a client; 0 for others."""
    return int(str(message.content.config_records.get(TERMS, {}).get("turn", 0)))


def asks_sum(message: Message) -> bool:
    return message.metadata.message_type == "query.secure" and question_of(message.content)[0] == "sum"


def with_noise_of(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let devices draw the noise of a simulation, so that both can be compared."""
    real = Device.at
    monkeypatch.setattr(guard_module.Device, "at", lambda home: real(home, streams))


def erased(grid: Nodes) -> bool:
    return not any((home / "state").exists() and list((home / "state").glob("*/run.log")) for home in grid.helpers)


@pytest.mark.parametrize("helpers", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sampled
def test_masked_sums_are_those_of_a_simulation_to_the_bit(
    method: str, helpers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients drop out, and too many in round 3, which is void on both sides."""
    missing = {2: {0}, 3: {1, 2}, 5: {4}}

    def hook(place: int, message: Message) -> bool:
        return place not in missing.get(round_of(message), set())

    simulated = METHODS[method](privacy=SUMS, num_clients=CLIENTS, seed=4)
    made = InProcessGrid(app, CLIENTS)
    made.hook = hook
    start(simulated, made)
    with_noise_of(simulated.streams, monkeypatch)
    grid = Nodes(tmp_path, helpers, hook=hook)
    strategy = METHODS[method](privacy=SUMS, num_clients=CLIENTS, helpers=grid.keys.split(","))
    start(strategy, grid)
    assert len(grid.masked) == 5 * CLIENTS - 4
    assert strategy.plan is not None
    assert strategy.plan.epsilon == simulated.plan.epsilon
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(strategy.state, simulated.state, strict=True))
    assert strategy.attendance.voids == simulated.attendance.voids == 1
    assert erased(grid)


def test_the_server_sees_masks_and_the_statement_says_what_protects(tmp_path: Path) -> None:
    grid = Nodes(tmp_path, helpers=2)
    strategy = AlphaNormEC(privacy=SUMS, num_clients=CLIENTS, helpers=grid.keys)
    start(strategy, grid, rounds=3)
    assert [m.facts.digest for m in grid.masked[:CLIENTS]] == [grid.masked[0].facts.digest] * CLIENTS
    assert grid.masked[CLIENTS].facts.digest != grid.masked[0].facts.digest
    words = np.concatenate([m.words for m in grid.masked])
    assert 0.4 < float(np.mean(words < 2**31)) < 0.6
    said = " ".join(strategy.statement.split())
    assert "Simulated:" not in said
    assert "Masks: every message was masked on its client, for 2 helpers" in said
    assert "The server together with all 2 helpers, or with 3 of the clients that answer" in said
    assert "if Flower's nodes run the app that comes with a run, the promise does not hold against a server" in said
    plan = strategy.plan
    assert plan is not None
    for client in range(CLIENTS):
        entries = Ledger(tmp_path / f"node-{client}" / "state").entries()
        assert [entry.turn for entry in entries] == [1, 2, 3]
        assert {entry.trust for entry in entries} == {"aggregator"}
        assert {entry.noise_stddev for entry in entries} == {plan.shares.client}


def test_clients_sign_all_that_their_app_may_read(tmp_path: Path) -> None:
    """A server that sends one client another learning rate, or other frozen arrays, gets no sum with that client."""

    def other_rate(message: Message) -> None:
        message.content.config_records[CONFIG]["lr"] = 0.5

    def other_arrays(message: Message) -> None:
        record = message.content.array_records[ARRAYS]
        record["out.bias"] = Array(record["out.bias"].numpy() + 1.0)

    for number, changed in enumerate((other_rate, other_arrays)):
        copies = []

        def hook(place: int, message: Message, changed: Any = changed, copies: list[int] = copies) -> bool:
            if place == 1 and round_of(message):
                other = message.content
                message.__dict__["_content"] = type(other)({**other})
                copies.append(1)
                for name in (CONFIG, ARRAYS):
                    message.content[name] = type(other[name])({**other[name]})  # type: ignore[arg-type]
                changed(message)
            return True

        grid = Nodes(tmp_path / str(number), hook=hook)
        strategy = DPFedAvg(privacy=SUMS, num_clients=CLIENTS, helpers=grid.keys, frozen=["out.bias"])
        start(strategy, grid, rounds=1)
        assert copies
        assert len({m.facts.digest for m in grid.masked}) == 2
        assert set(strategy.attendance.failed) == {1}
        assert "expected the facts of this round" in strategy.attendance.failed[1]
        assert strategy.attendance.last_round == dict.fromkeys([0, 2, 3, 4], 1)


def test_a_model_in_half_precision_is_signed_as_it_is_sent(tmp_path: Path) -> None:
    grid = Nodes(tmp_path)
    net = initial_net().half()
    strategy = DPFedAvg(privacy=SUMS, num_clients=CLIENTS, helpers=grid.keys)
    result = start(strategy, grid, rounds=3, net=ArrayRecord(net.state_dict()))
    assert strategy.attendance.counted == 3 * CLIENTS
    assert {str(array.dtype) for array in result.arrays.values()} == {"float16"}


def test_a_helper_that_loses_its_memory_or_answers_nothing_voids_its_round_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In round 2 the helper's records are lost, in round 4 it dies. Memories move in the other rounds alone."""
    lost: list[int] = []

    def hook(place: int, message: Message) -> bool:
        if asks_sum(message):
            lost.append(place)
            if len(lost) == 2:
                shutil.rmtree(grid.helpers[0] / "state")
            if message.metadata.group_id == "4":
                raise NodeError("gone")
        return True

    def drop(place: int, message: Message) -> bool:
        return not (round_of(message) in (2, 4) and place < 2)

    simulated = AlphaNormEC(alpha=0.5, beta=0.2, damping=0.1, privacy=SUMS, num_clients=CLIENTS, seed=4)
    made = InProcessGrid(app, CLIENTS)
    made.hook = drop
    start(simulated, made)
    with_noise_of(simulated.streams, monkeypatch)
    grid = Nodes(tmp_path, hook=hook)
    strategy = AlphaNormEC(alpha=0.5, beta=0.2, damping=0.1, privacy=SUMS, num_clients=CLIENTS, helpers=grid.keys)
    with caplog.at_level(logging.WARNING, "flwr"):
        start(strategy, grid)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(strategy.state, simulated.state, strict=True))
    assert strategy.attendance.voids == 2
    assert "round 2 is void: helper" in caplog.text
    assert "round 4 is void: helper" in caplog.text
    for client in range(CLIENTS):  # a void round is charged
        assert len(Ledger(tmp_path / f"node-{client}" / "state").entries()) == 5
    assert erased(grid)


def test_nobody_is_asked_while_a_helper_is_missing_and_the_model_is_kept(tmp_path: Path) -> None:
    grid = Nodes(tmp_path)
    gone: list[int] = []

    def hook(_: int, message: Message) -> bool:
        if asks_sum(message):
            gone.append(grid.order[CLIENTS])
        return True

    grid.hook = hook
    grid.get_node_ids = lambda: [node for node in grid.order if node not in gone]  # type: ignore[method-assign]
    strategy = DPFedAvg(privacy=SUMS, num_clients=CLIENTS, helpers=grid.keys)
    with pytest.raises(UserError, match=r"helpers: expected a node of each helper within 5 s, got silence of"):
        start(strategy, grid)
    assert len(grid.masked) == CLIENTS
    assert len(list(tmp_path.glob("fedpriv-model-after-round-1*"))) == 1


def test_a_helper_that_comes_back_goes_on(tmp_path: Path) -> None:
    """It restarts between its answers, with another node id."""
    grid = Nodes(tmp_path)

    def hook(place: int, message: Message) -> bool:
        if round_of(message) == 2 and place == 0:
            old = grid.order[CLIENTS]
            grid.order[CLIENTS] = new = old + 1
            grid.contexts[new] = grid.contexts.pop(old)
        return True

    grid.hook = hook
    strategy = DPFedAvg(privacy=SUMS, num_clients=CLIENTS, helpers=grid.keys)
    start(strategy, grid, rounds=3)
    assert strategy.attendance.voids == 0
    assert strategy.attendance.counted == 3 * CLIENTS


def test_a_wrong_signature_voids_a_round_unless_the_server_knows_the_keys(tmp_path: Path) -> None:
    for known in (False, True):
        folder = tmp_path / str(known)
        grid = Nodes(folder)
        (folder / "node-2" / SIGNING_FILE).unlink()
        make_signing_key(folder / "node-2" / SIGNING_FILE)
        admin = folder / "admin"
        (admin / "helpers").mkdir(parents=True)
        (admin / "helpers" / "helper-0.pub").write_text(f"{grid.keys}\n")
        (admin / "clients.toml").write_text((grid.helpers[0] / "clients.toml").read_text())
        strategy = DPFedAvg(privacy=SUMS, num_clients=CLIENTS, helpers=admin if known else grid.keys)
        if known:
            start(strategy, grid, rounds=1)
            assert set(strategy.attendance.failed) == {2}
            assert strategy.total.messages == CLIENTS - 1
        else:
            with pytest.raises(UserError, match="0 messages in 1 round; 1 round void"):
                start(strategy, grid, rounds=1)


REFUSALS = {
    "no helpers are named": (
        {"helpers": None},
        "helpers: expected the identity keys of the helpers, got an empty list, although clients 0, 1, 2, 3 and 1",
    ),
    "a seed": ({"seed": 3}, "seed: expected None with helpers, got 3"),
    "another trust": (
        {"privacy": Privacy(epsilon=8.0, trust="local")},
        'helpers: expected none unless privacy.trust = "aggregator", got privacy.trust = "local"',
    ),
    "no privacy": (
        {"privacy": None},
        'helpers: expected none unless privacy.trust = "aggregator", got a run without privacy',
    ),
    "no noise": (
        {"privacy": Privacy(noise_multiplier=0.0, trust="aggregator")},
        "privacy.noise_multiplier: expected noise with secure aggregation",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_nodes_cannot_do_is_refused_before_any_round(name: str, tmp_path: Path) -> None:
    changes, line = REFUSALS[name]
    grid = Nodes(tmp_path, helpers=0 if "helpers" in changes else 1)
    given = {"privacy": SUMS, "helpers": grid.keys, "num_clients": CLIENTS, **changes}
    with pytest.raises(UserError) as no:
        start(DPFedAvg(**given), grid)
    assert line in str(no.value)
    assert "\n" not in str(no.value)
    assert not any(round_of(message) for message in grid.seen)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (('trust = "aggregator"', 'trust = "local"'), "accepts.trust: expected local, got 'aggregator'"),
        (("helpers = [", "helpers = []\n# ["), "aggregation.helpers: expected a run without secure aggregation"),
        (("helpers = [", f"helpers = ['{'ab' * 32}']\n# ["), "helpers: expected one signed key from each helper"),
        (("helpers = [", "least_survivors = 5\nhelpers = ["), "aggregation.least_survivors: expected at least 5"),
        (("helpers = [", "colluders = 2\nhelpers = ["), "aggregation.colluders: expected noise for at least 2, got 1"),
        (("helpers = [", "min_share_multiplier = 9.0\nhelpers = ["), "aggregation.min_share_multiplier: expected at"),
    ],
)
def test_a_client_keeps_its_own_policy(change: tuple[str, str], line: str, tmp_path: Path) -> None:
    grid = Nodes(tmp_path)
    policy = tmp_path / "node-3" / POLICY_FILE
    assert change[0] in policy.read_text()
    policy.write_text(policy.read_text().replace(*change))
    strategy = DPFedAvg(privacy=SUMS, num_clients=CLIENTS, helpers=grid.keys)
    start(strategy, grid, rounds=1)
    assert set(strategy.attendance.failed) == {3}
    assert line in strategy.attendance.failed[3]
    assert strategy.total.messages == CLIENTS - 1
    assert not Ledger(tmp_path / "node-3" / "state").entries()


def test_an_order_for_bare_shares_gets_nothing_from_a_node_with_a_policy(tmp_path: Path) -> None:
    """A hostile server asks for the integers of a simulation, without masks."""

    def hook(place: int, message: Message) -> bool:
        if round_of(message) and place == 0:
            told = dict(message.content.config_records[FEDPRIV])
            message.content = type(message.content)({**message.content, FEDPRIV: ConfigRecord({**told, **bare})})
        return True

    grid = Nodes(tmp_path, hook=hook)
    strategy = DPFedAvg(privacy=SUMS, num_clients=CLIENTS, helpers=grid.keys)
    bare = {"grid": 2.0**-20, "turn": 1}
    start(strategy, grid, rounds=1)
    assert "grid: expected the grid and the turn of the terms" in strategy.attendance.failed[0]


def test_cohorts_by_coins_void_rounds_of_too_few_clients(tmp_path: Path) -> None:
    grid = Nodes(tmp_path)
    strategy = DPFedAvg(
        privacy=Privacy(epsilon=50.0, trust="aggregator"), cohort=Poisson(CLIENTS, 0.4), helpers=grid.keys
    )
    start(strategy, grid, rounds=8)
    asked = [sum(round_of(m) == k for m in grid.seen) for k in range(1, 9)]
    assert 1 not in asked
    assert strategy.attendance.voids == asked.count(0)


class Chaos(Nodes):
    """Nodes on a network that loses and repeats messages, with helpers that die and lose their records."""

    def __init__(self, folder: Path, seed: int, helpers: int) -> None:
        super().__init__(folder, helpers)
        self.rng = np.random.default_rng(seed)
        self.sums_asked = 0

    def happens(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def _play(self, message: Message) -> Message | None:
        if asks_sum(message):
            self.sums_asked += 1
            if self.happens(0.05):
                shutil.rmtree(self.helpers[self.order.index(message.metadata.dst_node_id) - CLIENTS] / "state")
        if not (round_of(message) or asks_sum(message)):
            return super()._play(message)
        if self.happens(0.15 if round_of(message) else 0.3):
            return None
        answer = super()._play(message)
        if self.happens(0.1):
            answer = super()._play(message)  # the same question again
        return None if self.happens(0.15 if round_of(message) else 0.2) else answer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sampled
def test_memories_agree_on_a_network_that_fails(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that did not count, and all clients of a void round, are as if they had never been asked."""
    privacy, rounds = Privacy(epsilon=50.0, trust="aggregator", least_survivors=3), 8
    voids = 0
    for seed in range(int(os.environ.get("FEDPRIV_CHAOS", "1"))):
        given = {"privacy": privacy, "num_clients": CLIENTS, "max_failures": 1.0}
        counted: dict[int, set[int]] = {}
        noise = METHODS[method](**given, seed=seed)
        start(noise, InProcessGrid(app, CLIENTS), rounds=rounds)
        with monkeypatch.context() as patched:
            with_noise_of(noise.streams, patched)
            grid = Chaos(tmp_path / str(seed), seed, helpers=1 + seed % 2)
            strategy = METHODS[method](**given, helpers=grid.keys)

            patched.setattr(Attendance, "count", noted(counted))
            start(strategy, grid, rounds=rounds)
        assert set(counted) == set(range(1, rounds + 1))
        assert any(counted.values())
        voids += sum(not clients for clients in counted.values())
        again = METHODS[method](**given, seed=seed)
        made = InProcessGrid(app, CLIENTS)
        made.hook = lambda i, m, counted=counted: not round_of(m) or i in counted[round_of(m)]
        start(again, made, rounds=rounds)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(strategy.state, again.state, strict=True))
        assert strategy.attendance.last_round == again.attendance.last_round
        for client in range(CLIENTS):
            turns = [entry.turn for entry in Ledger(tmp_path / str(seed) / f"node-{client}" / "state").entries()]
            assert turns == sorted(set(turns))
            assert all(client not in clients or k in turns for k, clients in counted.items())
        sent: dict[tuple[int, int], set[bytes]] = {}
        for message in grid.masked:
            sent.setdefault((message.client, message.facts.round), set()).add(message.to_bytes())
        assert {len(one) for one in sent.values()} == {1}
    assert voids


def noted(counted: dict[int, set[int]]) -> Any:
    """Return `Attendance.count` that notes who counted in each round."""
    real = Attendance.count

    def count(attendance: Attendance, number: int, clients: Any, *, void: bool = False) -> None:
        counted[number] = set() if void else set(clients)
        real(attendance, number, clients, void=void)

    return count
