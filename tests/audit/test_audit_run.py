"""The attacked run is the original experiment, and the command writes a record for other programs."""

import dataclasses
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit_cases import CLIENTS, PRIVACY, Changes, quick_audit, quick_config, quick_experiment
from support.helpers import EXAMPLES, same
from torch import Tensor

from fedpriv.audit import AuditChoice, run_audit
from fedpriv.audit.attack import CANARY_ENGINES, Attack, start_attack
from fedpriv.audit.canaries import Canaries, CanaryPopulation, draw_canaries, signal_scale
from fedpriv.cli import main
from fedpriv.engines import Engine
from fedpriv.experiment.build import Experiment
from fedpriv.experiment.execution import LocalEngine, make_engine
from fedpriv.methods import DPFedAvg, own_signal_of
from fedpriv.methods.memoryless import ModelOnly
from fedpriv.rounds import Broadcast, ClientRules, ServerRules, Total, begin_round, capacity_of, finish_round
from fedpriv.streams import Purpose, SeededStreams

PLANS: dict[str, Changes] = {
    "central": {},
    "poisson": {"cohort": {"sampling": "poisson", "probability": 0.4}},
    "fixed": {"cohort": {"sampling": "fixed", "size": 4}},
    "local": {"privacy": {**PRIVACY, "trust": "local"}},
}
FEW: Changes = {"training": {"rounds": 6}}
SIZE = 650


def canaries_for(experiment: Experiment, count: int = 40, seed: int = 0) -> Canaries:
    plan = experiment.plan
    assert plan is not None
    return draw_canaries(
        seed=seed,
        count=count,
        size=len(experiment.initial_model),
        rounds=experiment.config.training.rounds,
        sampling_prob=experiment.server.sampling.sampling_prob,
        replace=plan.adjacency == "replace",
        local=plan.trust == "local",
    )


@dataclasses.dataclass
class Watched:
    """An engine that records its requests and answers."""

    engine: Engine
    asked: list[Broadcast] = dataclasses.field(default_factory=list)
    answers: list[Total] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        return self.engine.name

    def sum_messages(self, broadcast: Broadcast) -> Total:
        self.asked.append(broadcast)
        self.answers.append(self.engine.sum_messages(broadcast))
        return self.answers[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[Purpose, int, int]]:
    """Count the requests for each address of the experiment's streams."""
    counted: Counter[tuple[Purpose, int, int]] = Counter()
    source = SeededStreams.source

    def counting(self: SeededStreams, purpose: Purpose, round: int = 0, client: int = 0) -> Any:
        counted[purpose, int(round), int(client)] += 1
        return source(self, purpose, round, client)

    monkeypatch.setattr(SeededStreams, "source", counting)
    return counted


def plain_run(experiment: Experiment) -> tuple[Watched, list[Tensor]]:
    """Return the run without an audit: its engine, and the models after each round."""
    engine = Watched(make_engine("loop", experiment))
    state, models = experiment.config.method.init_server(experiment.initial_model), []
    for number in range(1, experiment.config.training.rounds + 1):
        total = engine.sum_messages(begin_round(experiment.server, state, number))
        state = finish_round(experiment.server, state, number, total.sum)
        models.append(state.model)
    return engine, models


def run_attack(attack: Attack) -> tuple[Watched, Watched, Tensor]:
    """Return both engines of an attacked run, and the noisy sums."""
    clients, planted = Watched(attack.clients), Watched(attack.planted)
    watched = dataclasses.replace(attack, clients=clients, planted=planted)
    apart = None
    if attack.canaries.absent_send:
        apart = torch.zeros(attack.experiment.config.training.rounds, SIZE, dtype=torch.float64)
        for position in range(len(attack.canaries.planted)):
            apart += watched.messages(position)
    return clients, planted, watched.run(apart).sums


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_not_one_draw_of_the_experiment_changes(plan: Changes, drawn: Counter[tuple[Purpose, int, int]]) -> None:
    """Data, first model, cohorts, batches and noise keep their addresses; canaries add separate noise."""
    experiment = quick_experiment(FEW | plan)
    drawn.clear()
    plain, _ = plain_run(experiment)
    without = Counter(drawn)
    drawn.clear()
    again = quick_experiment(FEW | plan)
    assert same(again.initial_model, experiment.initial_model)
    drawn.clear()
    with start_attack(again, canaries_for(again), "loop") as attack:
        clients, _, _ = run_attack(attack)
    clients_own = Counter({address: n for address, n in drawn.items() if address[2] < CLIENTS})
    assert clients_own == without
    assert {address[0] for address in drawn - clients_own} <= {Purpose.CLIENT_NOISE}
    for before, after in zip(plain.asked, clients.asked, strict=True):
        assert np.array_equal(before.cohort, after.cohort)
        assert before.round == after.round
    assert same(plain.asked[0].model, clients.asked[0].model)
    assert torch.allclose(plain.answers[0].sum, clients.answers[0].sum, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_the_noise_on_the_sum_is_the_noise_of_the_run_without_an_audit(plan: Changes) -> None:
    experiment = quick_experiment(FEW | plan)
    rounds = range(1, FEW["training"]["rounds"] + 1)
    with start_attack(experiment, canaries_for(experiment), "loop") as attack:
        clients, planted, sums = run_attack(attack)
    if attack.canaries.absent_send:  # noise is in the messages
        bare = torch.zeros(len(rounds), SIZE, dtype=torch.float64)
        for broadcast, total in zip(planted.asked, planted.answers, strict=True):
            bare[broadcast.round - 1] += total.sum
    else:
        bare = torch.stack([total.sum for total in planted.answers])
    bare += torch.stack([total.sum for total in clients.answers])
    for number, released, total in zip(rounds, sums, bare, strict=True):
        noise = noise_of(experiment.server, number, total)
        assert torch.allclose(released.double() - total, noise, atol=1e-4)


def noise_of(rules: ServerRules, number: int, total: Tensor) -> Tensor:
    """The noise of a round on a sum, by the rules of the run without an audit, from a step of plain descent."""
    state = experiment_state()
    bare = dataclasses.replace(rules, method=DPFedAvg(server_lr=1.0))
    step = finish_round(bare, ModelOnly(torch.zeros_like(state.model)), number, total).model
    return -step.double() * rules.sampling.expected_size - total


def experiment_state() -> Any:
    experiment = quick_experiment(FEW)
    return experiment.config.method.init_server(experiment.initial_model)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_population_capacity_and_divisor_take_the_canaries_in_and_the_plan_does_not(plan: Changes) -> None:
    experiment = quick_experiment(FEW | plan)
    canaries, q = canaries_for(experiment), experiment.server.sampling.sampling_prob
    with start_attack(experiment, canaries, "loop") as attack:
        wider = attack.server.sampling
        assert wider.population == CLIENTS + len(canaries.planted)
        assert wider.expected_size == pytest.approx(q * wider.population)
        assert wider.sampling_prob == q
        assert attack.server.noise_stddev == experiment.server.noise_stddev
        clients, planted, _ = run_attack(attack)
        assert {broadcast.capacity for broadcast in clients.asked + planted.asked} == {capacity_of(wider)}
        assert all((broadcast.cohort >= CLIENTS).all() for broadcast in planted.asked)


@pytest.mark.parametrize("plan", ["central", "poisson"])
def test_candidates_that_take_no_part_enter_nothing(plan: str) -> None:
    experiment = quick_experiment(FEW | PLANS[plan])
    canaries = canaries_for(experiment)
    absent = canaries.coins[: canaries.isotropic] == 0
    assert 10 < absent.sum() < canaries.isotropic - 10
    others = canaries.directions.clone()
    others[torch.from_numpy(absent)] = torch.randn(int(absent.sum()), SIZE)
    released = []
    for chosen in (canaries, dataclasses.replace(canaries, directions=others)):
        with start_attack(experiment, chosen, "loop") as attack:
            released.append(attack.run().sums)
    assert same(*released)


@pytest.mark.parametrize("engine", CANARY_ENGINES)
@pytest.mark.parametrize("name", [name for name, method in EXAMPLES.items() if own_signal_of(method) is None])
def test_a_canary_is_as_long_as_its_bound_and_keeps_its_direction(name: str, engine: LocalEngine) -> None:
    experiment, rounds = quick_experiment(FEW), 20
    method = EXAMPLES[name]
    rules = ClientRules(method=method.client_part, noise_stddev=0.0, streams=SeededStreams(0))
    canaries = draw_canaries(seed=1, count=20, size=SIZE, rounds=rounds, sampling_prob=0.7, replace=False, local=True)
    with start_attack(experiment, canaries, engine) as attack:
        federation = attack.planted._population.federation  # type: ignore[attr-defined]
    people = experiment.population
    population = CanaryPopulation(
        rules=rules, task=people.task, federation=federation, work=people.work, streams=people.streams,
        canaries=canaries, first=CLIENTS, scale=signal_scale(rules, SIZE, rounds),
    )  # fmt: skip
    made = CANARY_ENGINES[engine](population)
    for number in range(1, rounds + 1):
        cohort = canaries.cohort(number)
        sent = made.sum_messages(Broadcast(number, experiment.initial_model, CLIENTS + cohort, 100)).sum
        pushes = torch.stack([canaries.push(int(canaries.planted[i]), number) for i in cohort])
        assert torch.allclose(sent, method.bounded.l2_bound * pushes.double().sum(dim=0), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_engines_find_the_same(plan: Changes) -> None:
    loop = quick_audit(FEW | plan, canaries=30, engine="loop")[0]
    vectorized = quick_audit(FEW | plan, canaries=30, engine="vectorized")[0]
    assert np.allclose(loop.whitened, vectorized.whitened, atol=0.02)
    for one, other in zip(loop.scores, vectorized.scores, strict=True):
        assert one.lower == pytest.approx(other.lower, abs=0.1)


def test_coins_are_fair_and_independent_and_signs_are_the_auditors_alone() -> None:
    made = draw_canaries(seed=5, count=500, size=50, rounds=60, sampling_prob=1.0, replace=False, local=False)
    again = draw_canaries(seed=6, count=500, size=50, rounds=60, sampling_prob=1.0, replace=False, local=False)
    coins = made.coins[: made.isotropic].astype(float)
    assert made.isotropic == 800
    assert abs(coins.mean() - 0.5) < 6 * 0.5 / 30
    random, steady = made.signs[: made.along.stop], made.signs[made.along.stop :]
    assert abs(random.mean()) < 6 / np.sqrt(random.size)
    assert steady.shape == (50, 60)
    assert (steady == 1).all()
    assert 310 < (made.coins[: made.isotropic] != again.coins[: made.isotropic]).sum() < 490
    assert len(set(made.coordinates)) == len(made.coordinates) == 50
    replaced = draw_canaries(seed=5, count=500, size=50, rounds=60, sampling_prob=1.0, replace=True, local=False)
    assert set(replaced.coins[: replaced.isotropic]) == {-1, 1}
    assert len(replaced.planted) == 500


def test_a_sampled_plan_is_compared_without_amplification_and_says_so() -> None:
    experiment = quick_experiment(PLANS["poisson"])
    _, record = quick_audit(PLANS["poisson"])
    assert experiment.plan is not None
    assert record["epsilon_promised"] == pytest.approx(experiment.plan.epsilon)
    assert record["epsilon_claimed"] > 1.2 * record["epsilon_promised"]
    assert "without amplification" in record["claim"]
    assert record["without_cohorts"]["epsilon_estimate"] < record["epsilon_claimed"]
    assert quick_audit(FEW)[1]["without_cohorts"] is None


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    code = stopped.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def quick_file(tmp_path: Path) -> str:
    path = tmp_path / "quick.toml"
    path.write_text(quick_config(FEW).to_toml())
    return str(path)


def test_the_command_writes_what_others_build_on(quick_file: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "audit"
    assert call("audit", quick_file, "--canaries", "30", "--out", str(out), "--confidence", "0.9") == 0
    record = json.loads((out / "audit.json").read_text())
    assert record["verdict"] == "not guilty"
    assert 7.9 < record["epsilon_claimed"] <= 8.0
    assert 0.0 <= record["epsilon_lower"] <= record["epsilon_estimate"]
    assert record["confidence"] == 0.9
    assert record["verdict_confidence"] == 0.999
    assert record["canaries"] == 30
    assert "server is trusted" in record["adversary"]
    assert {score["name"] for score in record["scores"]} >= {"whitened", "matched", "one-run", "one-run f-DP"}
    assert sum(score["certified"] for score in record["scores"]) == 2
    assert "not a proof" in record["words"]
    assert (out / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert {oct((out / name).stat().st_mode & 0o777) for name in ("audit.png", "audit.json")} == {"0o600"}
    shown = capsys.readouterr().out
    assert "not guilty" in shown
    assert record["adversary"] in shown
    assert call("audit", quick_file, "--out", str(out)) == 2


def test_an_audit_without_matplotlib_leaves_the_picture_out(
    quick_file: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else known(name))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fedpriv.audit.picture", raising=False)
    out = tmp_path / "audit"
    assert call("audit", quick_file, "--canaries", "20", "--out", str(out)) == 0
    assert "picture     none: install 'fedpriv[report]' to draw it" in capsys.readouterr().out
    assert json.loads((out / "audit.json").read_text())["canaries"] == 20
    assert not (out / "audit.png").exists()


def test_a_guilty_mechanism_is_exit_code_1(quick_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpriv.privacy.plan.PrivacyPlan.noise_stddev", property(lambda _: 0.01))
    assert call("audit", quick_file, "--canaries", "30", "--out", str(tmp_path / "audit")) == 1
    record = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert record["verdict"] == "guilty"
    assert "does not hold" in record["words"]


_BATCHES = ("-s", "local=", "-s", "local.work=poisson-gradient", "-s", "local.rate=0.5")
_BATCHES += ("-s", "privacy.unit=example", "-s", "privacy.example_clip=1.0")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--canaries", "5"), "--canaries"),
        (("--canaries", "many"), "canaries"),
        (("--confidence", "1"), "--confidence"),
        (("--confidence", "nan"), "--confidence"),
        (("--audit-seed", "-1"), "--audit-seed"),
        (("--engine", "ray"), "loop"),
        (("--engine", "flower"), "loop"),
        (("--device", "warp"), "--device"),
        (("-s", "privacy="), "[privacy]"),
        (("-s", "privacy.epsilon=", "-s", "privacy.noise_multiplier=0"), "noise"),
        (("-s", "training.rounds=0"), "training.rounds"),
        (("-s", "devices.kind=uniform"), "devices"),
        (_BATCHES, "full-gradient"),
        (("--canaries", "100000", "-s", "training.rounds=1000000"), "GB"),
    ],
)
def test_a_mistake_is_exit_2_and_one_line(
    arguments: tuple[str, ...], says: str, quick_file: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("audit", quick_file, *arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1, captured.err
    assert says in lines[0]
    assert not list(tmp_path.rglob("audit.json"))


def test_an_audit_of_a_config_alone_takes_the_defaults(tmp_path: Path) -> None:
    record = run_audit(quick_config({"training": {"rounds": 2}}), tmp_path, AuditChoice(canaries=20))
    assert record["engine"] in CANARY_ENGINES
    assert record["digest"] == quick_config({"training": {"rounds": 2}}).digest
