"""Devices with methods that compute their own signal: diff2, private-spiderboost and dice-sgd."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_in_process import DeploymentGrid, run_server
from torch import Tensor

from fedpriv.deploy import server as deployment
from fedpriv.deploy.coordinator import Coordinator
from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.ledger import Entry, Ledger, spent, surely_within
from fedpriv.deploy.device.own_data import own_signal
from fedpriv.deploy.device.policy import Accepts, Limits, OwnData, Policy
from fedpriv.engines import one_thread
from fedpriv.errors import UserError
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import Config, load_config, parse_config
from fedpriv.experiment.deployment import DeploymentChoice
from fedpriv.experiment.execution import Execution
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.flower.messages import ClientInstructions, RunTerms
from fedpriv.flower.privacy_terms import promised
from fedpriv.flower.refusals import Refusal
from fedpriv.flower.run_config import RunConfig
from fedpriv.methods import DIFF2, DiceSGD, Method
from fedpriv.privacy import Everyone, ExampleTerms, PrivacyPlan, TrustName, make_plan
from fedpriv.rounds import make_agreement, record_bound
from fedpriv.streams import SeededStreams

SIZE, ROUNDS, EVERYONE = 5, 9, Everyone(4)
DIFF = 'name = "diff2"\nclip_norm = 0.7\nsmoothness = 0.4\nperiod = 3\nserver_lr = 1.0'
BOOST = 'name = "private-spiderboost"\nclip_norm = 0.7\nsmoothness = 50.0\nperiod = 3\nserver_lr = 1.0'
DICE = 'name = "dice-sgd"\nclip_norm = 0.2\nfeedback_clip = 0.05\ngradient_cap = 0.7\nserver_lr = 1.0'
FULL, BATCHES = 'work = "full-gradient"', 'work = "poisson-gradient"\nrate = 0.3'


def config(method: str, trust: str = "local", local: str = FULL, rules: str = "", rounds: int = 4) -> str:
    example = 'unit = "example"\nexample_clip = 0.7\nexamples = 300\nnoise_multiplier = 0.8'
    privacy = "" if trust == "none" else f'[privacy]\ntrust = "{trust}"\n{example}'
    data = 'name = "digits"\npartition = "dirichlet"\nconcentration = 0.5\nclients = 4'
    return (
        f'name = "devices"\nseed = 3\n[data]\n{data}\n[model]\nname = "softmax"\n[local]\n{local}\n[method]\n{method}\n'
        f"{privacy}\n[training]\nrounds = {rounds}\n[deployment]\n{rules or 'deadline = 1.0'}\n"
    )


class Clock:
    """Clock that advances only while the server sleeps."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "time", Clock())
    monkeypatch.setenv("FEDPRIV_TEST_SEEDED", "1")


def deployed(toml: str, folder: Path, trust: str, **more: Any) -> Path:
    grid = DeploymentGrid(folder / "nodes", 4, {}, trust=trust, **more)
    for home in (folder / "nodes").iterdir():
        path = home / "fedpriv-client.toml"
        path.write_text(path.read_text().replace("[accepts]", '[accepts]\nunit = "example"'))
    run_server(grid, toml, folder / "out", test_seeded=True)
    return folder / "out"


def bits_of_loop(toml: str, folder: Path) -> bytes:
    path = folder / "loop.toml"
    path.write_text(toml)
    run_experiment(load_config(path), folder / "loop", engine="loop", execution=Execution(client_noise="faithful"))
    return (folder / "loop" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("method", "trust", "local"),
    [
        (DIFF, "local", FULL),
        (DIFF, "central", BATCHES),
        (BOOST, "local", BATCHES),
        (DICE, "local", FULL),
        (DICE, "central", FULL),
        (DICE, "none", FULL),
    ],
)
@pytest.mark.sampled
def test_a_deployment_is_the_loop_to_the_bit(method: str, trust: str, local: str, tmp_path: Path) -> None:
    toml = config(method, trust, local)
    out = deployed(toml, tmp_path, trust)
    assert (out / "model.safetensors").read_bytes() == bits_of_loop(toml, tmp_path)
    assert [row["happened"] for row in RunDirectory(out).rows("participation.jsonl")] == ["applied"] * 4


def test_messages_of_protected_examples_are_added_with_all_their_bits() -> None:
    """Rounding a message to float32 would move a sum by more than one example of a large client does."""
    method = DiceSGD()
    agreement = make_agreement(method, EVERYONE, plan_of(method, "central"), SeededStreams(0))
    state = agreement.server.init(torch.zeros(SIZE))
    made = Coordinator(*agreement, choice=DeploymentChoice(), turns=ROUNDS, digest="d", state=state)
    message = torch.full((SIZE,), 0.5 + 2.0**-35, dtype=torch.float64)
    made.begin()
    assert torch.equal(made.finish({0: message, 3: message}, {}).total.sum, 2.0 * message)


def test_a_turn_that_does_not_count_repeats_its_round(tmp_path: Path) -> None:
    """Client 2 misses a turn, which the others cannot save: the same round, restart or difference, is tried again."""
    missed: list[int] = []

    def hook(client: int, message: Any) -> bool:
        turn = int(message.content.config_records["terms"]["turn"]) if "terms" in message.content else 0
        if client == 2 and turn == 3:
            missed.append(turn)
            return False
        return True

    toml = config(DIFF, "central", rules="deadline = 1.0\nmin_participants = 4", rounds=5)
    out = deployed(toml, tmp_path, "central", hook=hook)
    assert missed
    happened = [row["happened"] for row in RunDirectory(out).rows("participation.jsonl")]
    assert happened == ["applied", "applied", "too few", "applied", "applied"]


def plan_of(method: Method[Any, Any], trust: TrustName = "local") -> PrivacyPlan:
    rule = method.example_rule  # type: ignore[attr-defined]
    return make_plan(
        trust=trust,
        sampling=EVERYONE,
        rounds=ROUNDS,
        delta=1e-5,
        l2_bound=method.bounded.l2_bound,
        noise_multiplier=4.0,
        record=record_bound(method, ExampleTerms(clip=rule.example_clip, examples=200, declared=True)),
    )


def asked(
    method: Method[Any, Any], turn: int = 1, round: int = 0, last: int = -1
) -> tuple[ClientInstructions, RunTerms]:
    plan = plan_of(method)
    assert plan.record is not None
    instructions = ClientInstructions(
        method=method,
        round=round or turn,
        client=0,
        noise_stddev=plan.message_stddev,
        examples=plan.record.terms.as_text(),
    )
    told = {"run": "r1", "turn": turn, "last_turn": turn - 1 if last < 0 else last, "epoch": 0, "digest": "d"}
    return instructions, RunTerms(**told, **promised(plan, EVERYONE, ROUNDS))


class Steep:
    """Gradients that differ at every model, so that a difference is never zero."""

    def mean(self, at: Tensor, clip_norm: float) -> Tensor:
        return torch.full((SIZE,), 0.1).double()

    def change(self, at: Tensor, before: Tensor, radius: float) -> Tensor:
        return (at.double() - before.double()) / radius / 200.0


def device_of(folder: Path, **limits: Any) -> Device:
    policy = Policy(accepts=Accepts(unit="example"), limits=Limits(**{"epsilon": 1e4, "delta": 1e-5, **limits}))
    return Device(policy, folder / "home" / "state")


def send(device: Device, method: Any, model: Tensor, *turns: int) -> Tensor:
    """Return the device's signal, without the vectors behind the message."""
    seen: list[Tensor] = []
    instructions, terms = asked(method, *turns)

    def signal(state: Any) -> Tensor:
        seen.append(method.own_signal(state, model, Steep(), instructions.round))
        return seen[-1]

    device.answer(instructions, terms, model, signal)
    return seen[0][:SIZE]


def test_a_missed_round_costs_a_client_one_difference_and_the_restart_brings_all_back(tmp_path: Path) -> None:
    device, method = device_of(tmp_path), DIFF2(period=5)
    models = [torch.full((SIZE,), float(k)) for k in range(ROUNDS)]
    assert send(device, method, models[0], 1).any()
    assert send(device, method, models[1], 2).any()
    # It misses turn 3, which counts: in round 4 it lacks the model of round 3.
    assert not send(device, method, models[3], 4, 4, 2).any()
    assert send(device, method, models[4], 5, 5, 4).any()
    # Turn 5 did not count: round 5 again, from the model of round 4.
    assert send(device, method, models[4], 6, 5, 4).any()
    assert send(device, method, models[5], 7, 6, 6).any()


def test_the_ledger_charges_a_residual_for_all_its_messages_together(tmp_path: Path) -> None:
    device, method = device_of(tmp_path), DiceSGD(clip_norm=1.0, gradient_cap=3.0)
    plan = plan_of(method)
    entries: list[Entry] = []
    for turn in range(1, ROUNDS + 1):
        send(device, method, torch.zeros(SIZE), turn)
        entries = Ledger(device.folder).entries()
        assert spent(entries, 1e-5, "replace", "example") == pytest.approx(
            plan.epsilon_of_participations(turn), rel=1e-6
        )
    assert spent(entries, 1e-5, "replace", "example") == pytest.approx(plan.epsilon, rel=1e-6)
    assert not surely_within(entries, 0.99 * plan.epsilon, 1e-5, "replace", "example")
    alone = [plan_of(method).record.sensitivity("replace", 1) / plan.noise_stddev] * ROUNDS  # type: ignore[union-attr]
    assert float(np.linalg.norm(alone)) < 0.5 * plan.l2_sensitivity / plan.noise_stddev
    others = [replace(entry, run="r2") for entry in entries]
    assert spent([*entries, *others], 1e-5, "replace", "example") < 2.0 * plan.epsilon


def test_a_residual_that_lacks_a_sent_message_is_refused(tmp_path: Path) -> None:
    """The server could ask for the same part again and again."""
    device, method = device_of(tmp_path), DiceSGD()
    send(device, method, torch.zeros(SIZE), 1)
    send(device, method, torch.zeros(SIZE), 2)
    with pytest.raises(Refusal, match="expected that turn 2 counted"):
        send(device, method, torch.zeros(SIZE), 3, 3, 1)
    send(device, method, torch.zeros(SIZE), 3, 3, 0)


def test_all_messages_of_differences_cost_the_same(tmp_path: Path) -> None:
    device, method = device_of(tmp_path), DIFF2(period=3)
    for turn in range(1, ROUNDS + 1):
        send(device, method, torch.full((SIZE,), float(turn)), turn)
    entries = Ledger(device.folder).entries()
    assert spent(entries, 1e-5, "replace", "example") == pytest.approx(plan_of(method).epsilon, rel=1e-6)


def test_what_a_device_cannot_charge_is_refused_on_both_sides(tmp_path: Path) -> None:
    heavy = DIFF2(restart_weight=2.0)
    with pytest.raises(Refusal, match=r"method\.restart_weight: expected 1, so that all messages cost the same"):
        send(device_of(tmp_path), heavy, torch.zeros(SIZE), 1)
    with pytest.raises(Refusal, match=r"limits\.adjacency: expected a method with a proof for add-or-remove"):
        send(device_of(tmp_path, adjacency="add-or-remove"), DIFF2(), torch.zeros(SIZE), 1)
    for trust, works in (("local", False), ("central", True)):
        made = load(config(f"{DIFF}\nrestart_weight = 2.0", trust))
        if works:
            made.check_deployable()
            continue
        with pytest.raises(UserError, match=r"method\.restart_weight: expected 1 in a deployment"):
            made.check_deployable()
    with pytest.raises(UserError, match=r"deployment\.lost_memory: expected another rule, because every client counts"):
        load(config(DIFF, rules='lost_memory = "reset-all"'))


@pytest.mark.parametrize(
    ("method", "toml"), [(DIFF2(clip_norm=0.7), DIFF), (DiceSGD(gradient_cap=0.7, clip_norm=0.2), DICE)]
)
def test_a_devices_own_file_gives_the_signal_of_its_part_of_the_data_set(
    method: Any, toml: str, tmp_path: Path
) -> None:
    run = RunConfig(config_toml=config(toml))
    made = run.load()
    people = assemble(made).population
    inputs, labels = people.examples(1)
    device = device_of(tmp_path)
    device = replace(device, policy=replace(device.policy, data=OwnData(own="own.npz")))
    (tmp_path / "home").mkdir()
    np.savez(tmp_path / "home" / "own.npz", inputs=inputs.numpy(), labels=labels.numpy(), classes=10)
    assert made.example_terms is not None
    instructions = ClientInstructions(method=made.method, round=2, client=1, examples=made.example_terms.as_text())
    terms = replace(asked(method)[1], digest=made.digest, turn=7)
    model, state = torch.linspace(-1.0, 1.0, 650), people.rules.init_client(650)
    if isinstance(method, DIFF2):
        state = type(state)(0.5 * model.double(), torch.ones(1).double())
    found = own_signal(device, run, instructions, terms, model, None, state)
    with one_thread():
        assert torch.equal(found, people.signal(1, model, 2, state=state))
    assert found[:650].any()


def load(toml: str) -> Config:
    return parse_config(tomllib.loads(toml))
