"""A client that protects single examples: the policy, the budgets of both units, and the ledger."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.ledger import Ledger, account_of, spent, surely_within
from fedpriv.deploy.device.own_data import own_signal
from fedpriv.deploy.device.policy import Accepts, Limits, OwnData, Policy, load_policy
from fedpriv.engines import one_thread
from fedpriv.errors import UserError
from fedpriv.flower.messages import ClientInstructions, RunTerms
from fedpriv.flower.privacy_terms import promised
from fedpriv.flower.refusals import Refusal
from fedpriv.flower.run_config import RunConfig
from fedpriv.methods import (
    DPGD,
    AdaptiveBound,
    AlphaNormEC,
    Clip21,
    DPFedAvg,
    DPScaffold,
    FedSpeed,
    Method,
    PrivateMetrics,
    SideValues,
)
from fedpriv.privacy import Everyone, ExampleTerms, PrivacyPlan, TrustName, UnitName, make_plan
from fedpriv.rounds import record_bound
from fedpriv.tasks.local_work import make_signal
from fedpriv.tasks.models import Softmax
from fedpriv.tasks.task import Task

SIZE, ROUNDS = 5, 9
EVERYONE = Everyone(4)


def plan_of(method: Method[Any, Any], trust: TrustName = "local", **change: Any) -> PrivacyPlan:
    terms = ExampleTerms(**{"clip": 1.0, "examples": 200, "declared": True, **change})
    return make_plan(
        trust=trust,
        sampling=EVERYONE,
        rounds=ROUNDS,
        delta=1e-5,
        l2_bound=method.bounded.l2_bound,
        noise_multiplier=4.0,
        record=record_bound(method, terms),
    )


def asked(method: Method[Any, Any], plan: PrivacyPlan, turn: int = 1) -> tuple[ClientInstructions, RunTerms]:
    assert plan.record is not None
    noise = plan.message_stddev if plan.trust == "local" else 0.0
    instructions = ClientInstructions(
        method=method,
        round=turn,
        client=0,
        noise_stddev=noise,
        examples=plan.record.terms.as_text(),
        step_stddev=plan.noise_stddev if plan.record.terms.steps else 0.0,
    )
    told = {"run": "r1", "turn": turn, "last_turn": turn - 1, "epoch": 0, "digest": "d"}
    return instructions, RunTerms(**told, **promised(plan, EVERYONE, ROUNDS))


def device_of(tmp_path: Path, unit: UnitName = "example", trust: TrustName = "local", **limits: Any) -> Device:
    accepts = Accepts(unit=unit, trust=trust)
    policy = Policy(accepts=accepts, limits=Limits(**{"epsilon": 5.0, "delta": 1e-5, **limits}))
    return Device(policy, tmp_path / "home" / "state")


def send(device: Device, instructions: ClientInstructions, terms: RunTerms) -> torch.Tensor:
    return device.answer(instructions, terms, torch.zeros(SIZE), lambda: torch.full((SIZE,), 1e-3).double())


METHODS_AND_WORK = [
    pytest.param(Clip21(), {}, id="memory"),
    pytest.param(DPGD(), {"rate": 0.1}, id="batches"),
    pytest.param(DPGD(), {"rate": 0.1, "steps": 3}, id="steps"),
]


@pytest.mark.parametrize(("method", "work"), METHODS_AND_WORK)
def test_the_ledger_counts_up_to_the_plans_epsilon(
    method: Method[Any, Any], work: dict[str, Any], tmp_path: Path
) -> None:
    device, plan = device_of(tmp_path, epsilon=100.0), plan_of(method, **work)
    for turn in range(1, ROUNDS + 1):
        send(device, *asked(method, plan, turn))
    entries = Ledger(device.folder).entries()
    total = spent(entries, 1e-5, "replace", "example")
    assert total == pytest.approx(plan.epsilon, rel=1e-3)
    assert surely_within(entries, 100.0, 1e-5, "replace", "example")
    assert not surely_within(entries, 0.9 * total, 1e-5, "replace", "example")
    assert spent(entries, 1e-5, "replace", "client") > 10.0 * total
    assert "for one example" in account_of(device.folder, 100.0, 1e-5, "replace", "example")
    row = json.loads((device.folder / "ledger.jsonl").read_text().splitlines()[0])
    assert row["noise_stddev"] == plan.noise_stddev
    assert row["unit"] == "example"


@pytest.mark.parametrize("trust", ["local", "central"])
def test_a_client_protects_all_its_examples_together_unless_its_operator_says_otherwise(
    trust: TrustName, tmp_path: Path
) -> None:
    method = Clip21()
    device = device_of(tmp_path, unit="client", trust="central")
    with pytest.raises(Refusal, match=r"accepts\.unit: expected runs that protect clients"):
        send(device, *asked(method, plan_of(method, trust)))


def test_both_budgets_hold(tmp_path: Path) -> None:
    method, plan = Clip21(), plan_of(Clip21())
    with pytest.raises(Refusal, match="for one example, over all runs"):
        send(device_of(tmp_path / "one", epsilon=0.01), *asked(method, plan))
    with pytest.raises(Refusal, match="for one client, over all runs"):
        send(device_of(tmp_path / "all", client_epsilon=8.0), *asked(method, plan))
    send(device_of(tmp_path / "both", client_epsilon=1e5), *asked(method, plan))


def test_a_run_for_clients_counts_in_the_budget_of_examples(tmp_path: Path) -> None:
    method = Clip21()
    plan = replace(plan_of(method), unit="client", record=None)
    instructions = ClientInstructions(method=method, round=1, client=0, noise_stddev=plan.noise_stddev)
    told = {"run": "r2", "turn": 1, "last_turn": 0, "epoch": 0, "digest": "d"}
    device = device_of(tmp_path)
    send(device, instructions, RunTerms(**told, **promised(plan, EVERYONE, ROUNDS)))
    entries = Ledger(device.folder).entries()
    assert spent(entries, 1e-5, "replace", "example") == spent(entries, 1e-5, "replace", "client") > 0.0


@pytest.mark.parametrize(
    ("line", "change"),
    [
        ("examples: expected gradients bounded as in the terms", {"examples": ""}),
        ("examples: expected gradients bounded as in the terms", {"examples": '{"clip": 9.0, "examples": 200}'}),
        ("noise: expected a standard deviation", {"noise_stddev": 1.0}),
        ("step_stddev|noise: expected a deviation", {"step_stddev": 1.0}),
        ("record: expected the sensitivity of this method", {"method": Clip21(clip_norm=1.0), "swap": DPGD()}),
    ],
)
def test_instructions_that_promise_more_than_they_do_are_refused(
    line: str, change: dict[str, Any], tmp_path: Path
) -> None:
    method = change.pop("method", None) or Clip21()
    plan = plan_of(change.pop("swap", None) or method)
    instructions, terms = asked(method, plan)
    with pytest.raises(Refusal, match=line):
        send(device_of(tmp_path), replace(instructions, **change), terms)


@pytest.mark.parametrize("work", [{}, {"rate": 0.1, "steps": 3}], ids=["message", "steps"])
@pytest.mark.parametrize(
    "method",
    [
        SideValues(method=DPFedAvg(), metrics=PrivateMetrics(share=0.1, max_loss=4.0)),
        SideValues(method=DPFedAvg(), adaptive=AdaptiveBound()),
    ],
    ids=["metrics", "adaptive"],
)
def test_side_values_of_single_examples_are_refused(method: SideValues, work: dict[str, Any], tmp_path: Path) -> None:
    """With noise on local steps, messages get none: a client's loss would leave it as it is."""
    plan = plan_of(DPFedAvg(), **work)
    instructions, terms = asked(DPFedAvg(), plan)
    device = device_of(tmp_path, epsilon=100.0)
    shared = torch.ones(1) if method.needs_shared else None
    signal = torch.cat([torch.zeros(SIZE), torch.tensor([1.7, 0.3])[: method.given]]).double()
    with pytest.raises(Refusal, match="client"):
        device.answer(replace(instructions, method=method), terms, torch.zeros(SIZE), lambda: signal, shared=shared)
    with pytest.raises(UserError, match=r'unit = "client"'):
        record_bound(method, ExampleTerms(clip=1.0, examples=200, **work))


def test_a_server_must_name_the_number_that_sums_are_divided_by(tmp_path: Path) -> None:
    method = Clip21()
    with pytest.raises(Refusal, match=r"a public number of examples in the terms"):
        send(device_of(tmp_path), *asked(method, plan_of(method, declared=False)))


def test_the_unit_is_read_from_the_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[accepts]\nunit = "example"\n[limits]\nepsilon = 3.0\ndelta = 1e-5\nclient_epsilon = 50.0\n')
    assert load_policy(path).budgets == {"example": 3.0, "client": 50.0}
    path.write_text('[accepts]\nunit = "person"\n[limits]\nepsilon = 3.0\ndelta = 1e-5\n')
    with pytest.raises(UserError, match=r"accepts\.unit"):
        load_policy(path)


RUN = """
name = "run"
seed = 1
[data]
name = "digits"
clients = 4
[model]
name = "softmax"
[method]
name = "{method}"
[training]
rounds = 9
"""
PRIVATE = """
[privacy]
trust = "local"
noise_multiplier = 4.0
unit = "example"
example_clip = 1.0
examples = 200
"""


@pytest.mark.parametrize(
    ("method", "told", "does"),
    [
        pytest.param(DPGD(), {"rate": 0.01}, PRIVATE, id="all examples for a batch"),
        pytest.param(DPGD(), {"rate": 0.01}, f'{PRIVATE}[local]\nwork = "poisson-gradient"\nrate = 0.5', id="rate"),
        pytest.param(
            DPGD(),
            {"rate": 0.1, "steps": 1},
            f'{PRIVATE}[local]\nwork = "dp-sgd"\nrate = 0.1\nsteps = 50\nclient_lr = 0.1',
            id="more steps than charged",
        ),
        pytest.param(DPGD(), {}, '[local]\nwork = "local-steps"\nsteps = 9\nclient_lr = 0.1', id="steps without noise"),
    ],
)
def test_an_experiment_with_other_work_than_the_ledger_charges_is_refused(
    method: Method[Any, Any], told: dict[str, Any], does: str, tmp_path: Path
) -> None:
    run = RunConfig(config_toml=RUN.format(method="dp-gd") + does)
    instructions, terms = asked(method, plan_of(method, **told))
    terms = replace(terms, digest=run.load().digest)
    device = device_of(tmp_path, epsilon=100.0)
    with pytest.raises(Refusal, match="experiment: expected the work in the instructions"):
        own_signal(device, run, instructions, terms, torch.zeros(650))


def test_an_experiment_with_the_work_that_the_ledger_charges_is_followed(tmp_path: Path) -> None:
    run = RunConfig(config_toml=f'{RUN.format(method="dp-gd")}{PRIVATE}[local]\nwork = "poisson-gradient"\nrate = 0.5')
    instructions, terms = asked(DPGD(), plan_of(DPGD(), rate=0.5))
    signal = own_signal(
        device_of(tmp_path), run, instructions, replace(terms, digest=run.load().digest), torch.zeros(650)
    )
    assert signal.dtype == torch.float64
    assert 0.0 < float(signal.norm()) < 4.0


def test_a_device_that_counts_one_example_more_or_less_refuses_what_depends_on_the_number(tmp_path: Path) -> None:
    text = f'{RUN.format(method="dp-gd")}{PRIVATE}[augment]\nname = "images"\nflip = true'
    run = RunConfig(config_toml=text)
    instructions, terms = asked(DPGD(), plan_of(DPGD()))
    device = device_of(tmp_path, adjacency="add-or-remove")
    with pytest.raises(UserError, match=r"\[augment\]: expected no"):
        own_signal(device, run, instructions, replace(terms, digest=run.load().digest), torch.zeros(650))


@pytest.mark.parametrize(
    ("first", "then", "what"),
    [
        pytest.param(plan_of(Clip21(), clip=1e4), plan_of(Clip21()), "record", id="a larger bound before"),
        pytest.param(
            replace(plan_of(Clip21()), noise_multiplier=1e6), plan_of(Clip21()), "noise", id="more noise before"
        ),
        pytest.param(
            replace(plan_of(Clip21()), unit="client", record=None), plan_of(Clip21()), "unit", id="other unit"
        ),
    ],
)
def test_the_terms_of_a_run_with_memory_never_change(
    first: PrivacyPlan, then: PrivacyPlan, what: str, tmp_path: Path
) -> None:
    device = device_of(tmp_path, epsilon=100.0)
    instructions, terms = asked(Clip21(), plan_of(Clip21()))
    old = replace(
        instructions,
        noise_stddev=first.message_stddev,
        examples="" if first.record is None else first.record.terms.as_text(),
    )
    send(device, old, replace(terms, **promised(first, EVERYONE, ROUNDS)))
    with pytest.raises(Refusal, match=f"terms: expected the terms of turn 1 of this run, got a different {what}"):
        send(device, *asked(Clip21(), then, 2))


def test_a_sent_message_that_the_memory_would_lack_resets_the_client(tmp_path: Path) -> None:
    device, plan = device_of(tmp_path, epsilon=100.0), plan_of(Clip21())
    for turn in (1, 2):
        send(device, *asked(Clip21(), plan, turn))
    instructions, terms = asked(Clip21(), plan, 3)
    with pytest.raises(Refusal, match="expected that turn 2 counted") as refused:
        send(device, instructions, replace(terms, last_turn=1))
    assert refused.value.kind == "lost"
    send(device, replace(instructions, round=1), replace(terms, last_turn=0))


@pytest.mark.parametrize(
    ("method", "trust"), [(DPGD(), "local"), (AlphaNormEC(memory="sent"), "local"), (Clip21(), "central")]
)
def test_other_memories_may_lack_a_message(method: Method[Any, Any], trust: TrustName, tmp_path: Path) -> None:
    device, plan = device_of(tmp_path, trust="central", epsilon=100.0), plan_of(method, trust)
    for turn, last in ((1, 0), (2, 1), (3, 1)):
        instructions, terms = asked(method, plan, turn)
        send(device, replace(instructions, round=min(turn, 2)), replace(terms, last_turn=last))


def test_a_memory_with_damping_is_not_taken_back_in_time(tmp_path: Path) -> None:
    method = AlphaNormEC(damping=0.5)
    device, plan = device_of(tmp_path, epsilon=100.0), plan_of(method)
    for turn in (1, 2):
        instructions, terms = asked(method, plan, turn)
        send(device, replace(instructions, round=100 * turn), terms)
    instructions, terms = asked(method, plan, 3)
    with pytest.raises(Refusal, match="round: expected a round after 200"):
        send(device, replace(instructions, round=1), terms)


@pytest.mark.parametrize("trust", ["local", "central"])
def test_one_example_more_costs_as_much_as_another_client_in_a_run_for_clients(
    trust: TrustName, tmp_path: Path
) -> None:
    method = Clip21()
    plan = replace(plan_of(method, trust), unit="client", record=None, adjacency="add-or-remove")
    noise = plan.message_stddev if trust == "local" else 0.0
    instructions = ClientInstructions(method=method, round=1, client=0, noise_stddev=noise)
    told = {"run": "r2", "turn": 1, "last_turn": 0, "epoch": 0, "digest": "d"}
    device = device_of(tmp_path, trust="central", epsilon=100.0)
    send(device, instructions, RunTerms(**told, **promised(plan, EVERYONE, ROUNDS)))
    entries = Ledger(device.folder).entries()
    replaced = plan.under_replace()
    expected = replaced.epsilon if trust == "central" else replaced.epsilon_of_participations(1)
    assert spent(entries, 1e-5, "add-or-remove", "example") == pytest.approx(expected)
    assert spent(entries, 1e-5, "add-or-remove", "client") < expected


@pytest.mark.parametrize(
    "change", [{"rate": float("nan")}, {"rate": -0.5}, {"rate": 2.0}, {"steps": -1}, {"steps": 0.5}]
)
def test_numbers_of_terms_that_mean_nothing_are_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ExampleTerms(**{"clip": 1.0, "examples": 200, **change})


def test_a_device_corrects_its_steps_by_the_vector_that_it_was_sent(tmp_path: Path) -> None:
    """The vector is a part of the question: it is checked, and another one for the same turn gets no answer."""
    method, given = DPScaffold(clip_norm=100.0), list[torch.Tensor]()
    device, plan = device_of(tmp_path, epsilon=100.0), plan_of(method, rate=0.1, steps=3)

    def send_beside(turn: int, shared: torch.Tensor | None) -> torch.Tensor:
        def signal(offset: torch.Tensor) -> torch.Tensor:
            given.append(offset)
            return torch.full((SIZE,), float(turn)).double()

        return device.answer(*asked(method, plan, turn), torch.zeros(SIZE), signal, shared=shared)

    first = send_beside(1, torch.zeros(SIZE))
    assert torch.equal(first, torch.ones(SIZE).double())
    assert torch.equal(send_beside(1, torch.zeros(SIZE)), first)
    with pytest.raises(Refusal, match="turn: expected a turn after 1, or the same request again"):
        send_beside(1, torch.ones(SIZE))
    send_beside(2, torch.full((SIZE,), 0.25))
    assert [float(offset[0]) for offset in given] == [0.0, 0.25 - 1.0]
    for wrong, said in ((None, "a second vector"), (torch.full((SIZE,), torch.nan), "finite numbers")):
        with pytest.raises(Refusal, match=f"model: expected {said}"):
            send_beside(3, wrong)
    other = plan_of(DPGD(), rate=0.1, steps=3)
    with pytest.raises(Refusal, match="model: expected no second vector"):
        device.answer(*asked(DPGD(), other), torch.zeros(SIZE), torch.zeros, shared=torch.zeros(SIZE))


@pytest.mark.parametrize("own", [False, True])
def test_a_devices_local_steps_take_the_offset(own: bool, tmp_path: Path) -> None:
    work = '[local]\nwork = "dp-sgd"\nrate = 1.0\nsteps = 2\nclient_lr = 0.5\nsignal = "gradient-mean"'
    run = RunConfig(config_toml=f"{RUN.format(method='dp-scaffold')}{PRIVATE}{work}")
    instructions, terms = asked(DPScaffold(), plan_of(DPScaffold(), rate=1.0, steps=2))
    device = device_of(tmp_path, epsilon=100.0)
    if own:
        device = replace(device, policy=replace(device.policy, data=OwnData(own="own.npz")))
        rng = np.random.default_rng(0)
        inputs, labels = rng.random((20, 1, 8, 8), dtype=np.float32), rng.integers(10, size=20)
        (tmp_path / "home").mkdir()
        np.savez(tmp_path / "home" / "own.npz", inputs=inputs, labels=labels, classes=10)
    terms, instructions = replace(terms, digest=run.load().digest), replace(instructions, step_stddev=0.0)
    plain, zero, far = (
        own_signal(device, run, instructions, terms, torch.zeros(650), offset)
        for offset in (None, torch.zeros(650).double(), torch.linspace(-1.0, 1.0, 650).double())
    )
    assert torch.equal(plain, zero)
    assert float((far - plain).norm()) > 1e-3


def test_a_device_with_its_own_file_draws_its_steps_back_and_orders_them_by_loss(tmp_path: Path) -> None:
    method, device = FedSpeed(prox=2.0), device_of(tmp_path, epsilon=100.0)
    keys = "work = 'local-epochs'\nepochs = 2\nclient_lr = 0.5\nbatch_size = 6\norder = 'by-loss'"
    toml = RUN.replace('"{method}"', '"fedspeed"\nprox = 2.0')
    run = RunConfig(config_toml=f"{toml}[local]\n{keys}")
    device = replace(device, policy=replace(device.policy, data=OwnData(own="own.npz")))
    rng = np.random.default_rng(0)
    inputs, labels = rng.random((20, 1, 8, 8), dtype=np.float32), rng.integers(10, size=20)
    (tmp_path / "home").mkdir()
    np.savez(tmp_path / "home" / "own.npz", inputs=inputs, labels=labels, classes=10)
    model, offset = torch.linspace(-1.0, 1.0, 650), torch.linspace(1.0, -1.0, 650)
    config = run.load()
    instructions = ClientInstructions(method=method, round=1, client=0, noise_stddev=0.0)
    terms = replace(asked(DPGD(), plan_of(DPGD()))[1], digest=config.digest)
    found = own_signal(device, run, instructions, terms, model, offset)
    task = Task(Softmax().build((1, 8, 8), 10, 0))
    given = torch.from_numpy(inputs), torch.from_numpy(labels)
    losses = torch.nn.functional.cross_entropy(task.logits(model, given[0]), given[1], reduction="none")
    order = torch.argsort(losses, stable=True).numpy()
    batches: list[np.ndarray | None] = [np.sort(order[start : start + 6]) for start in range(0, 20, 6)] * 2
    with one_thread():
        wanted = make_signal(task, model, *given, config.local, batches, offset=offset, prox=2.0)
    assert torch.equal(found, wanted)
