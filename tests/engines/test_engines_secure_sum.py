"""Simulated secure aggregation: integers in memories and sums, void rounds, and every engine to the bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.federations import Setting, setting
from support.helpers import EXAMPLES, same
from support.noise_faults import Share, replace_shares
from torch import Tensor

from fedpriv.engines import Engine, LoopEngine, Population, VectorizedEngine
from fedpriv.engines.fused_noise import can_fuse
from fedpriv.engines.secure_sum import SecureSum
from fedpriv.errors import UserError
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.run import run_experiment
from fedpriv.feedback import Release, bounded_residual, decayed, on_grid, remember, sent_message
from fedpriv.flower.launch import run_with_flower
from fedpriv.mechanisms.gaussian import rounded_noise
from fedpriv.mechanisms.shares import IntegerSums, centered
from fedpriv.methods import AlphaNormEC, Clip21, ServerState
from fedpriv.methods.clip21 import ClientMemory
from fedpriv.privacy import AggregationChoice, Poisson
from fedpriv.rounds import Broadcast, Total, begin_round, client_round, finish_round, skip_round
from fedpriv.streams import Purpose

CLIENTS = 12
CHOICE = AggregationChoice(least_survivors=8, colluders=1)
METHODS = ["alpha-normec", "alpha-normec damped", "fed-alpha-normec", "clip21 with server momentum", "dp-fedavg"]
ENGINES: dict[str, Callable[[Population], Any]] = {
    "loop": LoopEngine,
    "vectorized": partial(VectorizedEngine, batched=False),
}
every_engine = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES.keys())


def made(name: str = "alpha-normec damped", choice: AggregationChoice = CHOICE, **facts: Any) -> Setting:
    return setting(EXAMPLES[name], trust="aggregator", aggregation=choice, noise_multiplier=0.05, **facts)


def sums_of(of: Setting) -> IntegerSums:
    found = of.population.rules.sums
    assert found is not None
    return found


def secured(engine: Any, of: Setting) -> SecureSum:
    return SecureSum(engine, sums_of(of), of.population.rules)


def steps(vector: Tensor, grid: float) -> Tensor:
    """Return a vector in grid steps, int64; fail unless it is a multiple of the grid."""
    found = vector.double() / grid
    assert bool((found == found.round()).all())
    return found.to(torch.int64)


def noise_of(of: Setting, round: int, client: int, size: int) -> Tensor:
    """Return a client's share in grid steps, drawn again."""
    rules, grid = of.population.rules, sums_of(of).grid
    source = rules.streams.source(Purpose.CLIENT_NOISE, round, client)
    return torch.from_numpy(rounded_noise(np.zeros(size), rules.noise_stddev, source, grid))


def advanced(engine: Engine, of: Setting, rounds: int) -> tuple[ServerState, list[Total]]:
    state, totals = of.server.init(of.initial_model), []
    for number in range(1, rounds + 1):
        totals.append(engine.sum_messages(begin_round(of.server, state, number)))
        void = totals[-1].void
        state = skip_round(of.server, state) if void else finish_round(of.server, state, number, totals[-1].sum)
    return state, totals


@every_engine
@pytest.mark.parametrize("name", METHODS)
def test_the_sum_without_its_noise_is_that_of_the_integers_in_the_memories(
    name: str, make: Callable[[Population], Any]
) -> None:
    """On integers: sum = q_1 + ... + q_n + noise; and q_i times the grid is the memory of each client, to the bit."""
    of = made(name)
    rules, grid, engine = of.population.rules, sums_of(of).grid, make(of.population)
    size = len(of.initial_model)
    total = secured(engine, of).sum_messages(begin_round(of.server, of.server.init(of.initial_model), 1))
    noise = sum((noise_of(of, 1, client, size) for client in range(CLIENTS)), torch.zeros(size, dtype=torch.int64))
    kept, whole = engine.save(), torch.zeros(size, dtype=torch.int64)
    for client in range(CLIENTS):
        signal = of.population.signal(client, of.initial_model, 1)
        message, state = client_round(rules, client, rules.init_client(size), signal, 1)
        own = steps(message, grid) - noise_of(of, 1, client, size)
        whole += own
        if "memory" in kept:
            beta = getattr(rules.method, "beta", 1.0)
            wanted = remember(torch.zeros(size), (own.double() * grid).float(), beta)
            assert same(kept["memory"][client], wanted)
            assert same(state._asdict()["memory"], wanted)
    assert torch.equal(steps(total.sum, grid) - noise, whole)
    assert int(whole.abs().max()) > 1000


@pytest.mark.parametrize("name", METHODS)
def test_the_engines_add_the_same_integers(name: str) -> None:
    of = made(name)
    found = [advanced(secured(make(of.population), of), of, 4) for make in ENGINES.values()]
    assert same(found[0][0].model, found[1][0].model)
    assert all(same(one.sum, other.sum) for one, other in zip(found[0][1], found[1][1], strict=True))
    assert not can_fuse(of.population.rules)
    apart = advanced(secured(VectorizedEngine(of.population, chunk=5), of), of, 4)[0]
    assert float((apart.model - found[0][0].model).abs().max()) < 1e-5


def test_sums_wrap_around_and_any_part_of_the_clients_adds_up() -> None:
    """Integers of 32 bits: the order, the grouping and multiples of 2^32 on the way change nothing."""
    rng = np.random.default_rng(3)
    honest = torch.from_numpy(rng.integers(-(2**28), 2**28, size=(5, 40)))
    masks = torch.from_numpy(rng.integers(-(2**31), 2**31, size=(5, 40)))
    sums = IntegerSums(grid=2.0**-9, limit=2**31 - 1, least=1)
    for pattern in range(1, 32):
        chosen = [client for client in range(5) if pattern >> client & 1]
        wanted = honest[chosen].sum(dim=0)
        assert torch.equal(centered((honest + masks)[chosen].sum(dim=0) - masks[chosen].sum(dim=0) + 2**34), wanted)
        found = sums.total((honest[chosen].double() * 2.0**-9).sum(dim=0))
        assert found is not None
        assert torch.equal(steps(found, 2.0**-9), wanted)
    edge = torch.tensor([2**31, -(2**31), 2**31 - 1, -(2**31) - 1])
    assert centered(edge).tolist() == [-(2**31), -(2**31), 2**31 - 1, 2**31 - 1]


@every_engine
def test_a_round_in_the_guard_band_changes_nothing_but_the_count(
    make: Callable[[Population], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit that the second round's sum exceeds: models and memories stay, the next round has fresh noise."""
    of, addresses = made(), []

    def watched(drawn: Share, *which: Any) -> Tensor:
        addresses.append(which[-2:])
        return drawn(*which)

    replace_shares(monkeypatch, watched)
    engine, limits = make(of.population), [10**9, 1, 10**9, 10**9]
    state, models, voids, saved = of.server.init(of.initial_model), [], [], []
    for number, limit in enumerate(limits, start=1):
        guarded = SecureSum(engine, IntegerSums(grid=sums_of(of).grid, limit=limit, least=8), of.population.rules)
        broadcast = begin_round(of.server, state, number)
        assert (broadcast.turn, broadcast.round) == (number, number if number < 3 else number - 1)
        total = guarded.sum_messages(broadcast)
        voids.append(total.void)
        state = skip_round(of.server, state) if total.void else finish_round(of.server, state, number, total.sum)
        models.append(state.model)
        saved.append(engine.save())
    assert voids == [False, True, False, False]
    assert sorted(addresses) == [(turn, client) for turn in range(1, 5) for client in range(CLIENTS)]
    assert same(models[0], models[1])
    assert not same(models[1], models[2])
    assert all(same(saved[0][key], saved[1][key]) for key in saved[0])
    assert saved[3]["updated"].tolist() == [[3.0]] * CLIENTS
    assert of.server.voids(state) == 1


def test_the_memories_of_clients_and_server_agree_after_void_rounds() -> None:
    """Without noise, v is the mean of the v_i, damped on both sides as often, also after void rounds."""
    of = setting(
        EXAMPLES["alpha-normec damped"],
        trust="aggregator",
        aggregation=AggregationChoice(least_survivors=4),
        sampling=Poisson(CLIENTS, 0.4),
        noise_multiplier=0.0,
    )
    engine = LoopEngine(of.population)
    state, totals = advanced(secured(engine, of), of, 12)
    void = [total.void for total in totals]
    assert void == [total.messages < 4 for total in totals]
    assert 1 < sum(void) < 11
    rounds, kept = 12 - sum(void), engine.save()
    late = decayed(kept["memory"], 0.1, rounds - kept["updated"])
    mean = late.sum(dim=0) / CLIENTS
    assert float((mean - state._asdict()["memory"]).abs().max()) < 1e-6


def test_too_few_answers_ask_no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    of = made()
    engine = LoopEngine(of.population)
    monkeypatch.setattr(engine, "sum_messages", lambda _: pytest.fail("a client was asked"))
    total = secured(engine, of).sum_messages(Broadcast(1, of.initial_model, np.arange(7)))
    assert (total.void, total.messages, float(total.sum.abs().max())) == (True, 7, 0.0)


TABLES: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "data": {"name": "digits", "clients": 20},
    "model": {"name": "softmax"},
    "cohort": {"sampling": "poisson", "probability": 0.5},
    "method": {"name": "alpha-normec", "damping": 0.1},
    "privacy": {"trust": "aggregator", "noise_multiplier": 2.0},
    "aggregation": {"least_survivors": 10, "colluders": 1},
    "training": {"rounds": 8, "evaluate_every": 8},
}


class StopHere(Exception):  # noqa: N818
    """Simulates a kill."""


def test_a_run_with_void_rounds_is_resumed_to_the_bit_and_charged_in_full(tmp_path: Path) -> None:
    config = parse_config(TABLES)
    run_experiment(config, tmp_path / "whole", engine="loop")

    def stop(released: dict[str, Any], _: dict[str, Any]) -> None:
        if released["round"] == 5:
            raise StopHere

    with pytest.raises(StopHere):
        run_experiment(config, tmp_path / "parts", engine="loop", watch=stop, checkpoint_every=1)
    run_experiment(config, tmp_path / "parts", resume=True)
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    rows = [json.loads(line) for line in (tmp_path / "whole" / "rounds.jsonl").read_text().splitlines()][1:]
    counts = [json.loads(line) for line in (tmp_path / "whole" / "diagnostics.jsonl").read_text().splitlines()]
    sizes = [row["cohort_size"] for row in counts if row["round"]]
    assert [row["void"] for row in rows] == [size < 10 for size in sizes]
    assert any(row["void"] for row in rows[:4])
    assert all(row["epsilon"] < later["epsilon"] for row, later in pairwise(rows))
    promise = json.loads((tmp_path / "whole" / "privacy.json").read_text())
    assert promise["epsilon"] == rows[-1]["epsilon"]
    assert "Simulated:" in promise["statement"]


class Forgetful(Clip21):
    """A method from outside fedpriv that remembers an unrounded message."""

    def client_rule(
        self, state: ClientMemory, signal: Tensor, release: Release | None, round: int
    ) -> tuple[Tensor, ClientMemory]:
        message = bounded_residual(self.bounded, state.memory, signal)
        return sent_message(message, release), ClientMemory(remember(state.memory, message, 1.0))


class Careful(Clip21):
    """One that rounds."""

    def client_rule(
        self, state: ClientMemory, signal: Tensor, release: Release | None, round: int
    ) -> tuple[Tensor, ClientMemory]:
        message = on_grid(bounded_residual(self.bounded, state.memory, signal), release)
        return sent_message(message, release), ClientMemory(remember(state.memory, message, 1.0))


def test_own_methods_with_a_memory_have_to_round_what_they_remember() -> None:
    facts: dict[str, Any] = {"trust": "aggregator", "aggregation": CHOICE}
    careful, shipped = (setting(kind(clip_norm=0.5, server_lr=0.2), **facts) for kind in (Careful, Clip21))
    models = [advanced(secured(LoopEngine(of.population), of), of, 2)[0].model for of in (careful, shipped)]
    assert same(*models)
    forgetful = setting(Forgetful(clip_norm=0.5, server_lr=0.2), **facts)
    with pytest.raises(UserError, match=r"method\.name: expected a client rule that remembers its rounded message"):
        LoopEngine(forgetful.population).sum_messages(Broadcast(1, forgetful.initial_model, np.arange(CLIENTS)))


class Remembering(Clip21):
    """One that rounds, and remembers its share of the noise all the same."""

    def client_rule(
        self, state: ClientMemory, signal: Tensor, release: Release | None, round: int
    ) -> tuple[Tensor, ClientMemory]:
        message = sent_message(on_grid(bounded_residual(self.bounded, state.memory, signal), release), release)
        return message, ClientMemory(remember(state.memory, message.float(), 1.0))


@every_engine
def test_own_methods_must_not_remember_their_share_of_the_noise(make: Callable[[Population], Any]) -> None:
    """Sums of later rounds would depend on shares of earlier ones, as with sent memories."""
    of = setting(Remembering(clip_norm=0.5, server_lr=0.2), trust="aggregator", aggregation=CHOICE)
    with pytest.raises(UserError, match=r"method\.name: expected a client rule that remembers no noise"):
        make(of.population).sum_messages(Broadcast(1, of.initial_model, np.arange(CLIENTS)))


class Undeclared(AlphaNormEC):
    """One with a sent memory that does not say that it needs noise at the client."""

    @property
    def needs_client_noise(self) -> bool:
        return False


def test_sent_memories_are_refused_by_their_rule_too() -> None:
    with pytest.raises(UserError, match=r'method\.memory: expected "noiseless" with secure aggregation'):
        setting(Undeclared(memory="sent"), trust="aggregator", aggregation=CHOICE)


EVERYONE = AggregationChoice(least_survivors=10, colluders=1, everyone_answers=True)


@pytest.mark.parametrize("name", ["alpha-normec damped", "dp-fedavg"])
def test_clients_that_are_not_sampled_answer_with_their_share_alone(name: str) -> None:
    """On integers: sampled clients' messages and everyone's shares, also if nobody is sampled."""
    of = made(name, EVERYONE, sampling=Poisson(CLIENTS, 0.3))
    size, grid, state = len(of.initial_model), sums_of(of).grid, of.server.init(of.initial_model)
    for cohort in (np.array([2, 3, 7]), np.array([], dtype=np.int64)):
        broadcast = Broadcast(1, state.model, cohort, capacity=CLIENTS)
        totals = [secured(make(of.population), of).sum_messages(broadcast) for make in ENGINES.values()]
        assert not any(total.void for total in totals)
        assert same(totals[0].sum, totals[1].sum)
        rest = steps(totals[0].sum, grid)
        for client in range(CLIENTS):
            rest -= noise_of(of, 1, client, size)
        for client in cohort.tolist():
            signal = of.population.signal(client, state.model, 1)
            own = client_round(of.population.rules, client, of.population.rules.init_client(size), signal, 1)[0]
            rest -= steps(own, grid) - noise_of(of, 1, client, size)
        assert not bool(rest.any())


def test_a_plan_for_another_model_is_refused() -> None:
    """The plan charges the rounding of as many numbers as it knows of."""
    of = made()
    rules = replace(of.population.rules, sums=replace(sums_of(of), size=len(of.initial_model) - 1))
    with pytest.raises(ValueError, match="the plan was made for"):
        LoopEngine(replace(of.population, rules=rules)).sum_messages(Broadcast(1, of.initial_model, np.arange(CLIENTS)))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": {"name": "alpha-normec", "memory": "sent"}}, r'method\.memory: expected "noiseless" with'),
    ({"privacy": {"trust": "aggregator", "epsilon": 8.0, "unit": "example", "example_clip": 1.0}}, r"privacy\.unit"),
    ({"devices": {"kind": "same", "speed": 10.0, "download": 1e6, "upload": 1e6}}, r"\[devices\]"),
    ({"privacy": {"trust": "local", "epsilon": 8.0}}, r"\[aggregation\]: expected no such table unless"),
    (
        {"aggregation": {"everyone_answers": True}, "cohort": {"sampling": "everyone"}},
        r"aggregation\.everyone_answers: expected false unless",
    ),
    ({"aggregation": {"survivors": 3}}, r"aggregation\.survivors"),
]


@pytest.mark.parametrize(("change", "line"), REFUSED)
def test_what_cannot_be_aggregated_is_one_line(change: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        parse_config({**TABLES, **change})


def test_deployments_and_flower_run_it_if_only_sampled_clients_answer(tmp_path: Path) -> None:
    parse_config(TABLES).check_deployable()
    hidden = {"aggregation": {"everyone_answers": True}, "cohort": {"sampling": "poisson", "probability": 0.5}}
    config = parse_config({**TABLES, **hidden})
    for check in (config.check_deployable, config.check_only_sampled_answer):
        with pytest.raises(UserError, match=r"aggregation\.everyone_answers: expected false with Flower, for now"):
            check()
    with pytest.raises(UserError, match=r"aggregation\.everyone_answers: expected false with Flower"):
        run_with_flower(config, tmp_path / "out")
    method = AlphaNormEC(memory="sent")
    with pytest.raises(UserError, match=r"method\.memory"):
        setting(method, trust="aggregator", aggregation=CHOICE)


def test_the_table_is_part_of_the_experiment_and_of_its_noise() -> None:
    config = parse_config(TABLES)
    assert parse_config(config.tables) == config
    other = parse_config({**TABLES, "aggregation": {"least_survivors": 9}})
    assert config.noise_id != other.noise_id
    plain = {key: table for key, table in TABLES.items() if key != "aggregation"}
    assert parse_config(plain).aggregation == AggregationChoice()
    assert "aggregation" not in parse_config({**plain, "privacy": {"epsilon": 8.0}}).tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-145, -20, 0, 90])
def test_rounding_is_exact_in_every_format_and_changes_no_argument(dtype: torch.dtype, exponent: int) -> None:
    """Grids far outside of the numbers of float32 as well: their inverse may be too large for it."""
    sums = IntegerSums(grid=2.0**exponent, limit=1, least=1)
    message = (torch.linspace(-900.0, 900.0, 1001, dtype=torch.float64) * 2.0**exponent).to(dtype)
    before = message.clone()
    found = sums.rounded(message)
    assert same(message, before)
    assert found.dtype == dtype
    assert torch.equal(steps(found, sums.grid), (before.double() / sums.grid).round().to(torch.int64))
    assert same(sums.rounded(found), found)
