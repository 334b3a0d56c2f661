"""Execution: options, the measured choice, records, and the options that may not change during a run."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open
from support.helpers import EXAMPLES, same
from torch import Tensor

from fedpriv.engines import LoopEngine, VectorizedEngine
from fedpriv.engines.fused_noise import FusedNoise, can_fuse, without_noise
from fedpriv.errors import EngineStartError, UserError
from fedpriv.experiment import execution as engines
from fedpriv.experiment.build import Experiment, assemble
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.execution import Execution, bytes_of, choose_compute, start_engine
from fedpriv.experiment.results import load_model
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import safetensors_pieces
from fedpriv.files import write_pieces_atomically
from fedpriv.methods import AlphaNormEC, Clip21, DPFedAvg, feedback_of
from fedpriv.rounds import ClientRules, begin_round, client_round
from fedpriv.streams import SeededStreams

TABLES: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "data": {"name": "digits", "clients": 20, "partition": "dirichlet"},
    "model": {"name": "softmax"},
    "method": {"name": "alpha-normec"},
    "privacy": {"trust": "local", "noise_multiplier": 2.0},
    "training": {"rounds": 6, "evaluate_every": 6},
}


class StopHere(Exception):  # noqa: N818
    """Simulates a kill."""


def config_of(**changes: Any):
    return parse_config({**TABLES, **changes})


def experiment_of(**changes: Any) -> Experiment:
    return assemble(config_of(**changes))


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("512 MiB", 2**29), ("1000", 1000), ("1.5k", 1500), ("2gib", 2**31), ("0B", 0)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8 bananas", "-1GB", "1e9", "8GBs"])
def test_other_sizes_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"--state-memory: expected a size such as 8GB"):
        bytes_of(text)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"engine": "vectorised"}, r"--engine.*vectorized"),
        ({"compute": "lop"}, r"--compute.*loop"),
        ({"client_noise": "fuse"}, r"--client-noise.*fused"),
        ({"workers": 0}, r"--workers: expected at least 1, got 0"),
        ({"engine": "loop", "workers": 2}, r"--workers: expected --engine ray, got --engine loop"),
        ({"engine": "vectorized", "ray_address": "a:1"}, r"--ray-address: expected --engine ray"),
        ({"gpus_per_worker": -1.0}, r"--gpus-per-worker"),
    ],
)
def test_what_cannot_be_run_is_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        Execution(**given)


@pytest.mark.parametrize(("loop", "vectorized", "chosen"), [(1e-5, 3e-5, "loop"), (3e-5, 1e-5, "vectorized")])
def test_auto_takes_what_was_measured_to_be_faster(
    loop: float, vectorized: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {LoopEngine: loop, VectorizedEngine: vectorized}
    monkeypatch.setattr(engines, "_seconds_per_client", lambda engine, *_: figures[type(engine)])
    experiment = experiment_of()
    found = choose_compute(experiment.population, experiment.server, experiment.initial_model)
    assert found == (chosen, {"loop": loop, "vectorized": vectorized})
    runner, ran = start_engine(experiment, Execution(client_noise="faithful"))
    assert runner.name == ran.engine == chosen


def test_measuring_measures_and_touches_nothing(tmp_path: Path) -> None:
    """A run with auto is bit-identical to a run with the engine that auto chose."""
    config = config_of()
    summary = run_experiment(config, tmp_path / "auto")
    ran = summary["execution"]
    assert set(ran["seconds_per_client"]) == {"loop", "vectorized"}
    assert all(0.0 < seconds < 1.0 for seconds in ran["seconds_per_client"].values())
    run_experiment(config, tmp_path / "named", engine=ran["engine"])
    one, other = load_model(tmp_path / "auto"), load_model(tmp_path / "named")
    assert all(same(one[key], other[key]) for key in one)


def test_a_resumed_run_keeps_the_engine_that_began_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(released: dict[str, Any], _: dict[str, Any]) -> None:
        if released["round"] == 3:
            raise StopHere

    with pytest.raises(StopHere):
        run_experiment(config_of(), tmp_path, engine="vectorized", watch=stop, checkpoint_every=1)
    monkeypatch.setattr(engines, "choose_compute", lambda *_: pytest.fail("measured again"))
    assert run_experiment(config_of(), tmp_path, resume=True)["engine"] == "vectorized"


def test_few_clients_do_not_start_workers_and_long_runs_do() -> None:
    pay = engines._workers_pay
    assert not pay(experiment_of(), 2, 1e-3)
    assert pay(experiment_of(training={"rounds": 10_000}), 2, 1e-2)
    assert not pay(experiment_of(training={"rounds": 10_000}), 1, 1e-2)
    assert not pay(experiment_of(training={"rounds": 10_000}), 2, None)


def test_auto_does_without_ray_if_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> None:
        raise EngineStartError("--engine", "Ray to start within 30 seconds", "a computer that takes longer", "Wait")

    monkeypatch.setattr(engines, "_workers_pay", lambda *_: True)
    monkeypatch.setattr(engines, "_ray", slow)
    runner, ran = start_engine(experiment_of(), Execution())
    assert runner.name == ran.engine == ran.compute
    assert ran.workers == 1
    with pytest.raises(UserError, match="Ray to start"):
        start_engine(experiment_of(), Execution(engine="ray"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_noise_is_fused_only_where_no_memory_keeps_it(name: str) -> None:
    """The state is the same with and without noise for every method with fused noise, and not for the others.

    A memory that is no error feedback is not trusted, also if it is the same.
    """
    method = EXAMPLES[name]
    signal = torch.linspace(-1, 1, 50)
    found = [
        client_round(
            ClientRules(method=method, noise_stddev=stddev, streams=SeededStreams(1)),
            0,
            method.init_client(50),
            signal,
            1,
        )[1]
        for stddev in (0.0, 0.7)
    ]
    alike = all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    rules = ClientRules(method=method, noise_stddev=0.7, streams=SeededStreams(1))
    assert can_fuse(rules) == (alike and feedback_of(method) is not None)
    assert not can_fuse(ClientRules(method=method, noise_stddev=0.0, streams=SeededStreams(1)))


def fused_noise_of(experiment: Experiment, rounds: range) -> torch.Tensor:
    """Return only the noise, `[rounds, params]`: the difference between fused rounds with and without noise."""
    population = experiment.population
    fused = FusedNoise(LoopEngine(without_noise(population)), population.rules)
    plain = LoopEngine(without_noise(population))
    state = experiment.config.method.init_server(experiment.initial_model)
    cast = [begin_round(experiment.server, state, k) for k in rounds]
    return torch.stack([fused.sum_messages(b).sum - plain.sum_messages(b).sum for b in cast])


@pytest.mark.parametrize("cohort", [{"sampling": "everyone"}, {"sampling": "fixed", "size": 5}])
def test_fused_noise_has_the_law_of_the_sum_of_all_clients_noises(cohort: dict[str, Any]) -> None:
    """Mean, variance and independence, each two-sided at 1e-9; the variance is n times one client's."""
    experiment = experiment_of(cohort=cohort, method={"name": "dp-fedavg"})
    clients = 20 if cohort["sampling"] == "everyone" else 5
    noise = fused_noise_of(experiment, range(1, 31)).flatten()
    stddev = experiment.population.rules.noise_stddev * math.sqrt(clients)
    count, z = noise.numel(), 6.2
    assert stddev > 0.0
    assert abs(float(noise.mean())) < z * stddev / math.sqrt(count)
    assert abs(float((noise / stddev).square().mean()) - 1.0) < z * math.sqrt(2.0 / count)
    rounds = noise.reshape(30, -1) / stddev
    products = (rounds[:-1] * rounds[1:]).sum() / math.sqrt(rounds[1:].numel())
    assert abs(float(products)) < z


def test_the_law_is_that_of_faithful_draws() -> None:
    """The same statistics from one draw per client, so the test above checks the right distribution."""
    experiment = experiment_of(method={"name": "dp-fedavg"})
    population = experiment.population
    loud, quiet = LoopEngine(population), LoopEngine(without_noise(population))
    state = experiment.config.method.init_server(experiment.initial_model)
    cast = [begin_round(experiment.server, state, k) for k in range(1, 11)]
    noise = torch.cat([loud.sum_messages(b).sum - quiet.sum_messages(b).sum for b in cast])
    stddev = population.rules.noise_stddev * math.sqrt(20)
    assert abs(float((noise / stddev).square().mean()) - 1.0) < 6.2 * math.sqrt(2.0 / noise.numel())


def test_fused_noise_is_of_those_who_came() -> None:
    """A round without clients has no noise: no client would have added any."""
    experiment = experiment_of(
        cohort={"sampling": "poisson", "probability": 1e-9}, privacy={"trust": "local", "noise_multiplier": 2.0}
    )
    assert float(fused_noise_of(experiment, range(1, 3)).abs().max()) == 0.0


def test_memories_that_keep_noise_are_not_fused() -> None:
    rules = ClientRules(method=AlphaNormEC(memory="sent"), noise_stddev=1.0, streams=SeededStreams(0))
    with pytest.raises(ValueError, match="cannot be drawn at once"):
        FusedNoise(LoopEngine(experiment_of().population), rules)
    sent = experiment_of(method={"name": "alpha-normec", "memory": "sent"})
    assert start_engine(sent, Execution(engine="loop"))[1].client_noise == "faithful"


def test_every_engine_here_draws_the_same_fused_noise(tmp_path: Path) -> None:
    for engine in ("loop", "vectorized"):
        assert run_experiment(config_of(), tmp_path / engine, engine=engine)["execution"]["client_noise"] == "fused"
    one, other = load_model(tmp_path / "loop"), load_model(tmp_path / "vectorized")
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
    run_experiment(config_of(), tmp_path / "f", engine="loop", execution=Execution(client_noise="faithful"))
    said = {name: "Simulated noise:" in (tmp_path / name / "privacy.txt").read_text() for name in ("loop", "f")}
    assert said == {"loop": True, "f": False}
    faithful = load_model(tmp_path / "f")
    assert not any(torch.allclose(one[key], faithful[key], atol=1e-3) for key in one)


def test_a_run_is_not_gone_on_with_under_other_noise(tmp_path: Path) -> None:
    def stop(released: dict[str, Any], _: dict[str, Any]) -> None:
        if released["round"] == 3:
            raise StopHere

    with pytest.raises(StopHere):
        run_experiment(config_of(), tmp_path, engine="loop", watch=stop, checkpoint_every=1)
    with pytest.raises(UserError, match="one draw of clients' noise a round"):
        run_experiment(config_of(), tmp_path, resume=True, execution=Execution(client_noise="faithful"))
    assert run_experiment(config_of(), tmp_path, resume=True)["rounds"] == 6


def test_a_bound_on_state_memory_changes_no_bit(tmp_path: Path) -> None:
    bounded = Execution(state_memory=8 * 4 * 651, state_folder=tmp_path / "spill")
    run_experiment(config_of(), tmp_path / "bounded", engine="loop", execution=bounded, checkpoint_every=2)
    run_experiment(config_of(), tmp_path / "free", engine="loop")
    one, other = load_model(tmp_path / "bounded"), load_model(tmp_path / "free")
    assert all(same(one[key], other[key]) for key in one)
    assert list((tmp_path / "spill").iterdir()) == []


def test_how_a_run_was_run_is_beside_it_and_in_its_summary(tmp_path: Path) -> None:
    fast = Execution(channels_last=True)
    summary = run_experiment(config_of(), tmp_path, engine="loop", execution=fast)
    recorded = json.loads((tmp_path / "engine.json").read_text())
    assert recorded == summary["execution"]
    assert (recorded["engine"], recorded["channels_last"], recorded["precision"]) == ("loop", True, "float32")


CNN = {
    "model": {"name": "cnn", "width": 4},
    "data": {"name": "digits", "clients": 5},
    "method": {"name": "dp-fedavg", "server_lr": 0.5},
}


@pytest.mark.parametrize(("options", "tolerance"), [({"channels_last": True}, 1e-5), ({"precision": "bfloat16"}, 0.1)])
def test_performance_options_keep_gradients_within_their_tolerance(options: dict[str, Any], tolerance: float) -> None:
    """Relative to the gradient's length, on a moved model: channels last 1e-5, bfloat16 a tenth; alone, in batches."""
    plain, fast = assemble(config_of(**CNN)), assemble(config_of(**CNN), **options)
    model = plain.initial_model + 0.05 * torch.randn(
        len(plain.initial_model), generator=torch.Generator().manual_seed(1)
    )
    for client in range(5):
        wanted, found = (made.population.signal(client, model, 1) for made in (plain, fast))
        error = float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted))
        assert error < tolerance
        assert error > 0.0 or "precision" not in options
        inputs, labels = plain.population.examples(client)
        weights = torch.full((1, len(labels)), 1.0 / len(labels))
        batch = fast.population.task.gradients(model, inputs.unsqueeze(0), labels.unsqueeze(0), weights)[0]
        error = float(torch.linalg.vector_norm(batch - wanted) / torch.linalg.vector_norm(wanted))
        assert error < tolerance
        assert error > 1e-3 or "precision" not in options


@pytest.mark.parametrize("supported", [True, False])
def test_a_processor_without_bfloat16_is_named_in_a_warning(
    supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rounds of a CNN took nine times as long there."""
    monkeypatch.setattr("fedpriv.experiment.run._multiplies_bfloat16", lambda: supported)
    for precision in ("float32", "bfloat16"):
        run_experiment(config_of(), tmp_path / precision, execution=Execution(precision=precision), engine="loop")
    assert sum("bfloat16" in line for line in caplog.messages) == (not supported)


def test_another_precision_is_one_line() -> None:
    with pytest.raises(UserError, match=r"--precision: expected float32 or bfloat16.*bfloat16"):
        assemble(config_of(), precision="bfloat")  # pyright: ignore[reportArgumentType]


def test_a_task_elsewhere_is_the_same_task_with_parameters_of_its_own() -> None:
    experiment = experiment_of(**CNN)
    task = experiment.population.task
    twin = task.on(torch.device("cpu"))
    assert twin is task
    other = task.on(torch.device("cpu", 0))
    assert other is not task
    assert same(other.initial_model(), experiment.initial_model)
    inputs, labels = experiment.population.examples(0)
    models = [experiment.initial_model + shift for shift in (0.1, 0.2)]
    found = [t.gradient(m, inputs, labels) for t, m in zip((task, other), models, strict=True)]
    assert same(other.gradient(models[0], inputs, labels), found[0])
    assert same(task.gradient(models[1], inputs, labels), found[1])


def test_methods_with_bounds_of_their_own_limit_the_grid() -> None:
    rules = ClientRules(method=DPFedAvg(clip_norm=3.0), noise_stddev=0.5, streams=SeededStreams(0))
    assert rules.release_grid == 0.125
    assert rules.message_limit == 11.0 + 0.125


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_checkpoint_in_pieces_is_what_the_library_reads(count: int, tmp_path: Path) -> None:
    """Tensors of several types, including empty ones, and metadata, for any header order of the library."""
    tensors = {
        "a": torch.randn(count, 3),
        "b": torch.arange(count),
        "c": torch.randn(2, 2, dtype=torch.float64),
        "client.long name": torch.zeros(0, 4),
        "half": torch.randn(count, 2).bfloat16(),
        "bits": torch.ones(3, dtype=torch.bool),
        "turned": torch.randn(3, 2).T.contiguous(),
    }
    path = tmp_path / "x.safetensors"
    write_pieces_atomically(path, safetensors_pieces(tensors, {"round": "3", "quote": 'a "b" ü'}))
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {"round": "3", "quote": 'a "b" ü'}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


BEGAN = {
    "engine": "ray",
    "compute": "loop",
    "workers": 8,
    "client_noise": "faithful",
    "precision": "bfloat16",
    "channels_last": True,
}


@pytest.mark.parametrize(
    ("said", "recorded", "begun", "found"),
    [
        ({}, None, False, {"engine": "auto", "client_noise": "fused", "precision": "float32", "channels_last": False}),
        ({}, None, True, {"engine": "auto", "client_noise": "faithful"}),
        ({}, BEGAN, True, BEGAN),
        ({"workers": 2}, BEGAN, True, {**BEGAN, "workers": 2}),
        ({"workers": 4}, {**BEGAN, "engine": "loop", "workers": 1}, True, {"engine": "ray", "workers": 4}),
        ({"ray_address": "h:1"}, None, False, {"engine": "ray", "workers": None}),
        ({"workers": 1}, None, False, {"engine": "auto", "workers": 1}),
        ({"engine": "loop", "client_noise": "fused"}, BEGAN, True, {"engine": "loop", "client_noise": "fused"}),
        ({"precision": "float32"}, BEGAN, True, {"precision": "float32", "channels_last": True}),
    ],
)
def test_what_was_not_said_is_as_it_was(
    said: dict[str, Any], recorded: dict[str, Any] | None, begun: bool, found: dict[str, Any]
) -> None:
    completed = Execution(**said).completed(recorded, begun=begun)
    assert {key: getattr(completed, key) for key in found} == found


@pytest.mark.parametrize("content", ["[1]", '{"engine": "ray"}', '{"compute": []}', "no json", '"x"'])
def test_a_damaged_record_is_one_line(content: str, tmp_path: Path) -> None:
    with pytest.raises(StopHere):
        run_experiment(config_of(), tmp_path, engine="loop", watch=stop_after_three, checkpoint_every=1)
    (tmp_path / "engine.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"engine\.json"):
        run_experiment(config_of(), tmp_path, resume=True)


def stop_after_three(released: dict[str, Any], _: dict[str, Any]) -> None:
    if released["round"] == 3:
        raise StopHere


def test_a_resumed_run_keeps_its_noise_and_its_precision(tmp_path: Path) -> None:
    """Faithful noise and bfloat16 resume silently; a change to float32 is refused, and no file is rewritten."""
    begun = Execution(client_noise="faithful", precision="bfloat16")
    with pytest.raises(StopHere):
        run_experiment(
            config_of(), tmp_path, engine="loop", execution=begun, watch=stop_after_three, checkpoint_every=1
        )
    before = (tmp_path / "engine.json").read_bytes()
    with pytest.raises(UserError, match="original versions, data and options"):
        run_experiment(config_of(), tmp_path, resume=True, execution=Execution(precision="float32"))
    assert (tmp_path / "engine.json").read_bytes() == before
    ran = run_experiment(config_of(), tmp_path, resume=True)["execution"]
    assert (ran["client_noise"], ran["precision"]) == ("faithful", "bfloat16")


@pytest.mark.parametrize("noise", ["fused", "faithful"])
def test_an_engine_that_computes_outputs_is_asked_for_evaluations(
    noise: Literal["fused", "faithful"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(data={**TABLES["data"], "validation": 0.2})
    expected = run_experiment(config, tmp_path / "here", engine="loop")
    asked: list[int] = []
    task = assemble(config).population.task

    def forward(model: Tensor, inputs: Tensor, size: int) -> Iterable[Tensor]:
        asked.append(len(inputs))
        return task.outputs(model, inputs, size)

    monkeypatch.setattr(LoopEngine, "forward", staticmethod(forward))
    execution = Execution(client_noise=noise)
    found = run_experiment(config, tmp_path / "there", engine="loop", execution=execution)
    data = assemble(config).population.federation.dataset
    assert data.validation_inputs is not None
    assert asked == 2 * [len(data.test_inputs), len(data.validation_inputs)]  # the first and the last model
    if noise == "fused":
        assert found["test_loss"] == expected["test_loss"]


def test_flower_is_no_engine_in_process(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--engine: expected an in-process engine"):
        run_experiment(config_of(), tmp_path, engine="flower")
    with pytest.raises(UserError, match="--state-memory: expected --engine auto, loop, vectorized or ray"):
        Execution(engine="flower", state_memory=5)


def test_a_rule_of_its_own_form_with_a_memory_is_not_trusted_to_forget_noise() -> None:
    class Remembers(Clip21):
        def client_rule(self, state, signal, release, round):
            sent, _ = super().client_rule(state, signal, release, round)
            return sent, type(state)(sent)

    assert not can_fuse(ClientRules(method=Remembers(), noise_stddev=1.0, streams=SeededStreams(0)))
    assert can_fuse(ClientRules(method=Clip21(), noise_stddev=1.0, streams=SeededStreams(0)))


def test_every_engine_has_a_name_for_type_checkers() -> None:
    assert set(engines.ENGINE_NAMES) == {"auto", *engines.ENGINES}
    assert set(engines.LOCAL_ENGINES) < set(engines.ENGINE_NAMES)
