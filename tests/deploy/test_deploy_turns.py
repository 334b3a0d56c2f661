"""Deployments with correlated noise: the loop's bits, turns without a release, and gaps that each device enforces."""

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_in_process import DeploymentGrid, run_server
from flwr.app import Message
from safetensors import safe_open
from test_deploy_app import Clock, ServerDied, bits_of_loop, config, rows
from test_deploy_member import SIZE, policy

from fedpriv.deploy import server as deployment
from fedpriv.deploy.coordinator import Coordinator
from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.ledger import Ledger, spent
from fedpriv.deploy.device.memory import MemoryFile
from fedpriv.experiment.deployment import DeploymentChoice
from fedpriv.flower.messages import TERMS, ClientInstructions, RunTerms
from fedpriv.flower.privacy_terms import promised
from fedpriv.flower.refusals import Refusal
from fedpriv.mechanisms.noise import release_sum
from fedpriv.methods import Clip21, DPFedAvg
from fedpriv.privacy import NoiseChoice, PrivacyPlan, Sampling, Separated, correlated, make_plan
from fedpriv.rounds import make_agreement
from fedpriv.streams import SeededStreams

CLIENTS, TURNS, APART = 12, 12, 3
METHOD = DPFedAvg(clip_norm=1.0, server_lr=1.0)
TOML: dict[str, tuple[str, str]] = {
    "banded": ('sampling = "separated"\nmin_separation = 2', 'kind = "banded"'),
    "cyclic-banded": ('sampling = "separated"\nmin_separation = 2\nprobability = 0.4', 'kind = "cyclic-banded"'),
    "geometric": ('sampling = "everyone"', 'kind = "geometric-schedule"'),
    "in turns": ('sampling = "separated"\nmin_separation = 2', 'kind = "independent"'),
}


@pytest.fixture(autouse=True)
def _seeded_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPRIV_TEST_SEEDED", "1")
    monkeypatch.setattr(deployment, "time", Clock())
    monkeypatch.setattr(deployment, "_RETRY_SECONDS", 0.01)


def toml_of(kind: str, **changes: Any) -> str:
    cohort, noise = TOML[kind]
    privacy = f"[privacy]\nnoise_multiplier = 0.5\n[noise]\n{noise}"
    text = config(**{"cohort": cohort, "privacy": privacy, "rounds": 6} | changes)
    return text.replace("damping = 0.1", "damping = 0.1\nserver_normalization = false")


@pytest.mark.parametrize("kind", TOML)
@pytest.mark.sampled
def test_a_deployment_that_restarts_is_the_loop_to_the_bit(kind: str, tmp_path: Path) -> None:
    """The checkpoint has the noise of earlier turns, for its owner alone; nothing that stays has it."""
    out, living, found = tmp_path / "out", [False], []

    def hook(_: int, message: Message) -> bool:
        terms = message.content.config_records.get(TERMS)
        if terms is not None and terms["turn"] == 5 and not living[0]:
            raise ServerDied
        return True

    toml = toml_of(kind)
    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="central", epsilon=1e6, hook=hook)
    with pytest.raises(ServerDied):
        run_server(grid, toml, out, test_seeded=True)
    kept = out / "checkpoint.safetensors"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    with safe_open(str(kept), framework="pt") as file:
        found = [file.get_tensor(name) for name in file.keys() if name == "server.noise_earlier"]  # noqa: SIM118
    assert len(found) == ("banded" in kind)
    assert all(past.dtype == torch.float64 and float(past.abs().mean()) > 0.01 for past in found)
    living[0] = True
    run_server(grid, toml, out, test_seeded=True, resume=True)
    assert [row["happened"] for row in rows(out)] == ["applied"] * 6
    assert (out / "model.safetensors").read_bytes() == bits_of_loop(toml, tmp_path)
    assert not kept.exists()
    assert not any(b"noise_earlier" in file.read_bytes() for file in out.iterdir() if file.is_file())
    for node in range(4):
        turns = [entry.turn for entry in Ledger(tmp_path / "nodes" / f"node-{node}" / "state").entries()]
        assert all(later - sooner >= (1 if kind == "geometric" else 2) for sooner, later in pairwise(turns))


def test_with_secret_noise_groups_are_those_of_the_seed_after_a_restart(tmp_path: Path) -> None:
    asked: list[dict[int, set[int]]] = [{}, {}]
    living = [False]

    def hook(partition: int, message: Message) -> bool:
        terms = message.content.config_records.get(TERMS)
        if terms is not None:
            asked[living[0]].setdefault(int(str(terms["turn"])), set()).add(partition)
            if terms["turn"] == 3 and not living[0]:
                deployment_groups_forgotten()
                raise ServerDied
        return True

    toml = toml_of("banded", clients=6)
    grid = DeploymentGrid(tmp_path / "nodes", 6, {}, trust="central", epsilon=1e6, hook=hook)
    with pytest.raises(ServerDied):
        run_server(grid, toml, tmp_path / "out")
    living[0] = True
    run_server(grid, toml, tmp_path / "out", resume=True)
    assert asked[1][4] == asked[1][6] == asked[0][2]
    assert asked[1][3] == asked[1][5] == asked[0][1]


def deployment_groups_forgotten() -> None:
    from fedpriv.privacy import sampling

    sampling._groups.cache_clear()


# ---------------------------------------------------------------- turns without a release


def plan_of(
    sampling: Sampling, turns: int = TURNS, multiplier: float = 1.0, kind: Any = "banded", bands: int | None = None
) -> PrivacyPlan:
    plan = make_plan(
        trust="central", sampling=sampling, rounds=turns, delta=1e-5, l2_bound=1.0, noise_multiplier=multiplier
    )
    matrix = NoiseChoice(kind=kind, bands=bands).of(sampling, turns, 0.0)
    return plan if matrix is None else correlated(plan, matrix, None)


def test_a_turn_without_a_release_keeps_its_row() -> None:
    """Sums and noise again from the definition: turns whose messages are not used take back nothing, and leave none."""
    sampling, streams = Separated(CLIENTS, APART), SeededStreams(2)
    plan = plan_of(sampling)
    server, client, _ = make_agreement(METHOD, sampling, plan, streams)
    assert plan.noise is not None
    c: Any = plan.noise.as_dict()["coefficients"]
    coordinator = Coordinator(
        server=server,
        client=client,
        plan=plan,
        choice=DeploymentChoice(min_participants=2),
        turns=TURNS,
        digest="d",
        state=server.init(torch.zeros(SIZE)),
    )
    model, past, silent = torch.zeros(SIZE), {}, {2, 3, 7, 11}
    for turn in range(1, TURNS + 1):
        coordinator.begin()
        asked = coordinator.asked()
        assert len(asked) >= 2
        used = asked[:1] if turn in silent else asked
        messages = {i: torch.full((SIZE,), 0.01 * (i + turn)) for i in used}
        outcome = coordinator.finish(messages, {})
        assert outcome.happened == ("too few" if turn in silent else "applied")
        if turn not in silent:
            total = torch.stack([messages[i].double() for i in used]).sum(0)
            back = [c[j] * past[turn - j] for j in range(1, len(c)) if turn - j in past]
            taken = torch.stack([torch.zeros(SIZE).double(), *back]).sum(0)
            released = release_sum(streams, plan.noise_stddev, total - taken, turn)
            past[turn] = released - total
            model = model - released.float() / sampling.expected_size
        assert torch.allclose(coordinator.state.model, model, atol=1e-5)
        newest = coordinator.state._asdict()["noise_earlier"][0]
        assert torch.allclose(newest, past.get(turn, torch.zeros(SIZE)).double(), atol=1e-5)
    assert coordinator.applied == TURNS - len(silent)


def test_no_choice_of_turns_without_a_release_costs_more_than_the_plan() -> None:
    """All sets of released turns, and a client's worst messages; if turns without a release had no rows, some would."""
    turns, apart, c = 7, 3, np.array([1.0, 0.6, 0.5])
    matrix = np.sum([np.diag(np.full(turns - j, c[j]), -j) for j in range(3)], axis=0)
    pulses = np.zeros((apart, turns))
    for first in range(apart):
        pulses[first, first::apart] = 1.0
    most = max(np.linalg.norm(matrix @ pulse) for pulse in pulses)
    closer = 0.0
    for chosen in range(1, 2**turns):
        kept = np.array([chosen >> k & 1 for k in range(turns)], dtype=bool)
        for pulse in pulses:
            assert np.linalg.norm((matrix @ (pulse * kept))[kept]) <= most + 1e-12
            packed = pulse[kept]
            closer = max(closer, np.linalg.norm(matrix[: len(packed), : len(packed)] @ packed))
    assert closer > 1.1 * most


# ---------------------------------------------------------------- devices

PLAN = plan_of(Separated(CLIENTS, APART))


def told(plan: PrivacyPlan = PLAN, **changes: Any) -> RunTerms:
    state = {"run": "r1", "turn": 1, "last_turn": 0, "epoch": 0, "digest": "d"}
    return RunTerms(**{**state, **promised(plan, plan.sampling, plan.rounds), **changes})


def ask(device: Device, terms: RunTerms, **changes: Any) -> torch.Tensor:
    given = {"method": METHOD, "round": terms.turn, "client": 0} | changes
    return device.answer(ClientInstructions(**given), terms, torch.zeros(SIZE), lambda: torch.ones(SIZE))


def turns_of(device: Device) -> list[int]:
    return [entry.turn for entry in Ledger(device.folder).entries()]


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(policy(trust="central"), tmp_path / "home" / "state")


def test_a_device_answers_in_turns_that_are_far_enough_apart_and_no_more(device: Device) -> None:
    for turn in range(2, TURNS + 1):
        if (turn - 2) % APART == 0:
            first = ask(device, told(turn=turn))
            assert torch.equal(first, ask(device, told(turn=turn)))  # the same request, the same bytes
        else:
            with pytest.raises(Refusal, match=r"turn: expected a turn from \d+: answers are 3 turns apart") as no:
                ask(device, told(turn=turn))
            assert no.value.kind == "policy"
    assert turns_of(device) == [2, 5, 8, 11]
    with pytest.raises(Refusal, match="consecutive turns"):
        ask(device, told(turn=TURNS + 2))


OTHER, LARGER = Separated(CLIENTS, 2), Separated(CLIENTS, 4)
ATTACKS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a smaller gap": (promised(plan_of(OTHER), OTHER, TURNS), {}, "a different"),
    "a larger gap": (
        promised(plan_of(Separated(CLIENTS, 4), bands=2), Separated(CLIENTS, 4), TURNS),
        {},
        "a different",
    ),
    "no gap": ({"sampling": "everyone", "probability": 1.0, "separation": 1, "noise": ""}, {}, "a different"),
    "independent noise": ({"noise": ""}, {}, "a different noise"),
    "another matrix": (promised(plan_of(PLAN.sampling, bands=2), PLAN.sampling, TURNS), {}, "a different noise"),
    "coins": (
        promised(plan_of(Separated(CLIENTS, 3, 0.1), kind="cyclic-banded"), Separated(CLIENTS, 3, 0.1), TURNS),
        {},
        "a different",
    ),
    "more noise": ({"noise_multiplier": 2.0}, {}, "a different noise_multiplier"),
    "a higher bound": ({}, {"method": DPFedAvg(clip_norm=2.0)}, "a different l2_bound"),
    "another method": ({}, {"method": Clip21(clip_norm=1.0)}, "a different method"),
    "more turns": (promised(plan_of(PLAN.sampling, 2 * TURNS), PLAN.sampling, 2 * TURNS), {}, "a different"),
    "no promise": ({"trust": "none"}, {"private": False}, "accepts.trust"),
    "another delta": ({"delta": 1e-6}, {}, "a different delta"),
    "another client": ({}, {"client": 1}, "a different client|expected client 0, as in turn 1"),
    "a reset of all memories": ({"turn": 3, "epoch": 5}, {}, "expected a turn from 4"),
    "a turn that did not count": ({"turn": 3, "last_turn": 0}, {}, "expected a turn from 4"),
    "a turn that counted": ({"turn": 3, "last_turn": 1}, {}, "expected a turn from 4"),
    "the same turn again": ({"turn": 1, "digest": "e"}, {}, "same request again"),
}


@pytest.mark.parametrize("case", ATTACKS)
def test_no_statement_of_a_server_makes_a_device_answer_too_early_or_charge_too_little(
    case: str, device: Device
) -> None:
    changes, asked, words = ATTACKS[case]
    ask(device, told())
    with pytest.raises(Refusal, match=words):
        ask(device, told(**{"turn": 7, **changes}), **asked)
    assert turns_of(device) == [1]


@pytest.mark.parametrize("changes", [{"turn": 1}, {"turn": 2}, {"turn": 3}, {"turn": 3, "epoch": 2}])
def test_a_device_that_lost_its_memory_still_counts_by_its_ledger(changes: dict[str, Any], device: Device) -> None:
    ask(device, told())
    MemoryFile(device.folder, "r1", 0).path.unlink()
    with pytest.raises(Refusal, match=r"expected a turn (from 4|after 1)"):
        ask(device, told(**changes))
    ask(device, told(turn=4))
    assert turns_of(device) == [1, 4]


def test_independent_turns_do_not_become_correlated_ones(device: Device) -> None:
    """The reverse is among the attacks: terms of one run are charged together."""
    plain = {"sampling": "everyone", "probability": 1.0, "separation": 1, "noise": ""}
    ask(device, told(**plain))
    with pytest.raises(Refusal, match="a different"):
        ask(device, told(turn=9))
    ask(device, told(**plain, turn=2))
    assert turns_of(device) == [1, 2]


def test_a_run_of_another_name_is_charged_in_full(device: Device) -> None:
    device = replace(device, policy=policy(trust="central", delta=3e-5))
    ask(device, told())
    one = spent(Ledger(device.folder).entries(), 1e-5, "replace")
    assert one == pytest.approx(PLAN.under_replace().epsilon)
    ask(device, told(run="r2"))
    assert spent(Ledger(device.folder).entries(), 3e-5, "replace") == pytest.approx(2 * one)


def test_a_run_for_which_no_delta_is_left_is_refused_by_its_delta(device: Device) -> None:
    """The sum of epsilons is far below the budget: only delta is used up, and the line has to say so."""
    ask(device, told())
    with pytest.raises(Refusal, match=r"delta of this client's runs: expected at most 1e-05 .*, got 2e-05") as no:
        ask(device, told(run="r2"))
    assert (no.value.kind, "smaller privacy.delta" in str(no.value)) == ("budget", True)


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_a_device_charges_the_matrix_under_its_own_adjacency(share: float, tmp_path: Path) -> None:
    """The server says add-or-remove; at the first message, all turns of the run are charged."""
    budget = share * PLAN.under_replace().epsilon
    assert budget > 1.5 * PLAN.epsilon
    device = Device(policy(trust="central", epsilon=budget), tmp_path / "state")
    if share > 1.0:
        ask(device, told())
        ask(device, told(turn=4))
        return
    with pytest.raises(Refusal, match="epsilon after another message") as no:
        ask(device, told())
    assert no.value.kind == "budget"
    assert turns_of(device) == []


def test_the_floor_of_the_noise_counts_the_whole_column(tmp_path: Path) -> None:
    """One message moves the values under the noise by the norm of a column, not by its own."""
    assert PLAN.noise is not None
    assert PLAN.noise.column > 1.1
    for floor, fits in ((0.99 / PLAN.noise.column / 2, True), (1.01 / PLAN.noise.column / 2, False)):
        device = Device(policy(trust="central", min_noise_multiplier=2 * floor), tmp_path / str(fits))
        if fits:
            ask(device, told())
        else:
            with pytest.raises(Refusal, match=r"limits\.min_noise_multiplier"):
                ask(device, told())


@pytest.mark.parametrize("seed", range(4))
def test_no_random_server_gets_more_answers_than_a_run_has(seed: int, device: Device) -> None:
    """Turns, epochs, resets, gaps, client ids and lost memories at random, in runs of one name."""
    rng = np.random.default_rng(seed)
    plans: list[Callable[[], PrivacyPlan]] = [lambda: PLAN, lambda: plan_of(OTHER)]
    told_by = [told(made()) for made in plans]
    for _ in range(120):
        terms = told_by[int(rng.random() < 0.2)]
        turn = int(rng.integers(1, TURNS + 2))
        changes = {"turn": turn, "last_turn": int(rng.integers(0, turn)), "epoch": int(rng.integers(0, 3))}
        if rng.random() < 0.1:
            MemoryFile(device.folder, "r1", 0).path.unlink(missing_ok=True)
        try:
            ask(device, replace(terms, **changes), client=int(rng.random() < 0.1), round=int(rng.integers(1, 9)))
        except Refusal:
            continue
    entries = Ledger(device.folder).entries()
    assert len({(entry.client, entry.separation, entry.noise) for entry in entries}) == 1
    apart = entries[0].separation
    assert all(later.turn - sooner.turn >= apart for sooner, later in pairwise(entries))
    assert 1 <= len(entries) <= ceil(TURNS / apart)


def test_terms_without_a_gap_and_noise_are_written_as_before() -> None:
    """A device of an earlier version still follows them, and refuses others: it would not count the turns."""
    plain = told(**{"sampling": "everyone", "probability": 1.0, "separation": 1, "noise": ""})
    assert {"separation", "noise"}.isdisjoint(plain.to_record())
    assert {"separation", "noise"} <= set(told().to_record())
    assert json.loads(str(told().to_record()["noise"]))["kind"] == "banded"
