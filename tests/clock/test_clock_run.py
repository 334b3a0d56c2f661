"""Runs on the virtual clock: equal engines, consistent memories, resumption, records, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.clocks import FREE, SCHEDULES, STEADY, UNEQUAL, timeline
from support.federations import ragged_digits, setting
from support.helpers import WITH_MEMORY, memories_after

from fedpriv import load_results
from fedpriv.cli import main
from fedpriv.engines import LoopEngine, VectorizedEngine
from fedpriv.errors import UserError
from fedpriv.experiment.build import assemble, sampling_of
from fedpriv.experiment.config import Config, load_config, parse_config
from fedpriv.experiment.execution import EngineName
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import Checkpoint
from fedpriv.experiment.timing import Versions, gradient_examples, make_timeline
from fedpriv.flower.run_config import RunConfig
from fedpriv.mechanisms.noise import Gaussian
from fedpriv.methods import DPFedAvg
from fedpriv.privacy import Scheduled
from fedpriv.rounds import finish_round
from fedpriv.tasks.local_work import FullGradient, LocalSteps, MinibatchGradient

CONFIGS = Path(__file__).parents[2] / "sim_configs"
QUICKSTART = CONFIGS / "quickstart.toml"
SMALL = ["data.clients=12", "training.rounds=10", "training.evaluate_every=5"]
PHONES = ["devices.kind=log-normal", "devices.speed=5.0", "devices.download=1e4", "devices.upload=4e3"]
AWAY = ["devices.dropout=0.1", "devices.available=0.6", "devices.day=40.0"]
FEDBUFF = ["schedule.kind=fedbuff", "schedule.buffer_size=3", "schedule.concurrency=7", "privacy.adjacency="]
FEDFIX = ["schedule.kind=fedfix", "schedule.window=4.0", "privacy.adjacency="]
LOCAL = ["privacy.trust=local", "privacy.adjacency="]
PLAIN = ["method=", "method.name=dp-fedavg"]
FIRST = ["cohort.sampling=fixed", "cohort.size=5", "schedule.kind=synchronous", "schedule.over_select=1.6"]
POISSON = ["cohort.sampling=poisson", "cohort.probability=0.5"]


def small(*settings: str, start: Path = QUICKSTART) -> Config:
    tables = load_config(start).tables
    if "method=" in settings:
        tables = {key: value for key, value in tables.items() if key != "method"}
    return load_config_from(tables, [*SMALL, *(s for s in settings if s != "method=")])


def load_config_from(tables: dict, settings: list[str]) -> Config:
    from fedpriv.experiment.config import apply_settings

    return parse_config(apply_settings(tables, settings))


def final_model(directory: Path) -> torch.Tensor:
    return load_file(directory / "model.safetensors")["model"]


def rows(directory: Path, name: str = "rounds") -> list[dict]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


# Steps and engines.


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.sampled
def test_the_servers_memory_stays_the_mean_of_the_clients_whoever_drops_out_or_comes_late(name: str, seed: int) -> None:
    people = ragged_digits()
    made = timeline(name.replace("fedbuff that weighs little", "fedbuff"), clients=12, seed=seed, steps=12, memory=True)
    for method in WITH_MEMORY.values():
        sampling = replace(made.scheduled(), population=12)
        prepared = setting(method, federation=people, sampling=sampling)
        engine, versions = VectorizedEngine(prepared.population), Versions(made)
        state = method.init_server(prepared.initial_model)
        versions.moved(0, state.model)
        seen: set[int] = set()
        for step in made.steps:
            total = versions.total(engine, prepared.server, step.number)
            state = finish_round(prepared.server, state, step.number, total.sum)
            versions.moved(step.number, state.model)
            saved, kind = engine.save(), method.init_client(len(state.model))
            seen.update(step.counted.tolist())
            assert saved["clients"].tolist() == sorted(seen)
            memory = state._asdict()["memory"]
            memories = type(kind)(*(saved[field] for field in kind._fields)) if seen else None
            mean = memories_after(method, memories, step.number).double().sum(dim=0) / 12 if seen else 0.0 * memory
            scale = float(memory.norm()) + 1e-6
            assert float((memory - mean).norm()) < 2e-5 * scale
    if name == "rounds with a deadline":
        assert sum(len(step.late) for step in made.steps) > 0


@pytest.mark.parametrize("trust", [None, "central", "local"])
@pytest.mark.parametrize("name", FREE)
def test_engines_agree_on_every_schedule(name: str, trust: str | None) -> None:
    method = DPFedAvg(clip_norm=0.5, server_lr=0.5)
    made = timeline(name, clients=12, steps=10)
    prepared = setting(method, sampling=made.scheduled(), work=MinibatchGradient(batch_size=5))
    if trust == "local":
        rules = replace(prepared.population.rules, noise_stddev=0.1)
        prepared = replace(prepared, population=replace(prepared.population, rules=rules))
    if trust == "central":
        prepared = replace(prepared, server=replace(prepared.server, mechanism=Gaussian(0.1)))
    models = []
    for make in (LoopEngine, VectorizedEngine):
        engine, versions, state = make(prepared.population), Versions(made), method.init_server(prepared.initial_model)
        versions.moved(0, state.model)
        for step in made.steps:
            total = versions.total(engine, prepared.server, step.number)
            assert total.messages == len(step.counted)
            state = finish_round(prepared.server, state, step.number, total.sum)
            versions.moved(step.number, state.model)
        models.append(state.model)
    assert torch.allclose(models[0], models[1], rtol=0.0, atol=1e-6)
    assert not torch.equal(models[0], prepared.initial_model)


def test_a_message_is_made_from_the_model_that_its_client_took() -> None:
    method = DPFedAvg(clip_norm=1e3, server_lr=1.0)
    made = timeline("fedbuff", clients=12, steps=8, devices=STEADY)
    prepared = setting(method, sampling=made.scheduled())
    engine, versions, state = (
        LoopEngine(prepared.population),
        Versions(made),
        method.init_server(prepared.initial_model),
    )
    models = [state.model]
    versions.moved(0, state.model)
    for step in made.steps:
        expected = torch.zeros_like(state.model, dtype=torch.float64)
        for group in step.groups:
            for client in group.clients.tolist():
                expected += group.weight * prepared.population.signal(client, models[group.start], step.number).double()
        total = versions.total(engine, prepared.server, step.number)
        assert torch.allclose(total.sum, expected, rtol=1e-6, atol=1e-7)
        state = finish_round(prepared.server, state, step.number, total.sum)
        assert torch.allclose(models[-1] - (expected / 4.0).float(), state.model, atol=1e-6)
        models.append(state.model)
        versions.moved(step.number, state.model)
    assert max(step.number - 1 - group.start for step in made.steps for group in step.groups) > 1


def test_the_work_of_a_participation_is_that_of_its_batches() -> None:
    assert gradient_examples(FullGradient(), 7) == 7
    assert gradient_examples(MinibatchGradient(batch_size=5), 7) == 5
    assert gradient_examples(MinibatchGradient(batch_size=5), 3) == 3
    assert gradient_examples(LocalSteps(steps=4, client_lr=0.1, batch_size=5), 7) == 20
    assert gradient_examples(LocalSteps(steps=4, client_lr=0.1), 7) == 28


def test_a_timeline_does_not_depend_on_the_values_of_data() -> None:
    for settings in (FEDBUFF, FEDFIX, FIRST):
        config = small(*PHONES, *AWAY, *settings, "privacy.adjacency=replace")
        people = assemble(config).population.federation
        other = replace(people.dataset, train_inputs=torch.zeros_like(people.dataset.train_inputs))
        changed = replace(people, dataset=other)  # pyright: ignore[reportArgumentType]
        first, second = (make_timeline(config, data, 650) for data in (people, changed))
        assert first is not None
        assert second is not None
        assert first.fingerprint == second.fingerprint


# Whole runs.


@pytest.mark.parametrize(
    ("settings", "engine"),
    [
        ([], "loop"),
        (LOCAL, "vectorized"),
        (POISSON, "vectorized"),
        ([*POISSON, *LOCAL, "local.work=minibatch-gradient", "local.batch_size=4"], "loop"),
    ],
    ids=["everyone", "local", "poisson", "poisson, local, minibatch"],
)
def test_rounds_without_lateness_are_the_run_without_a_clock_to_the_bit(
    tmp_path: Path, settings: list[str], engine: EngineName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Config, "noise_id", "one")  # otherwise the two experiments' noise is independent
    before, after = small(*settings), small(*settings, *PHONES, "devices.available=0.5")
    summaries = [
        run_experiment(config, tmp_path / name, engine=engine)
        for config, name in ((before, "before"), (after, "after"))
    ]
    assert torch.equal(final_model(tmp_path / "before"), final_model(tmp_path / "after"))
    for old, new in zip(rows(tmp_path / "before"), rows(tmp_path / "after"), strict=True):
        assert old.items() <= new.items()
    assert summaries[0].get("ledger") == summaries[1].get("ledger")


def test_rows_and_the_summary_say_what_the_clock_says(tmp_path: Path) -> None:
    summary = run_experiment(small(*PHONES, *AWAY, *FEDBUFF), tmp_path)
    found, made = rows(tmp_path), assemble(small(*PHONES, *AWAY, *FEDBUFF)).timeline
    assert made is not None
    assert [row["simulated_seconds"] for row in found] == [0.0, *(step.seconds for step in made.steps)]
    assert [row["counted"] for row in found] == [0, *[3] * 10]
    assert [row["bytes_up"] for row in found] == [0, *(step.bytes_up for step in made.steps)]
    beside = rows(tmp_path, "diagnostics")
    assert [row["asked"] for row in beside] == [len(step.asked) for step in made.steps]
    assert all({"late", "dropped", "staleness"} <= set(row) for row in beside)
    assert summary["simulated_seconds"] == made.steps[-1].seconds
    assert summary["bytes_down"] == made.steps[-1].bytes_down > summary["bytes_up"] > 0
    table = load_results(tmp_path)
    assert table["simulated_seconds"].is_monotonic_increasing
    assert {"bytes_up", "staleness", "devices.kind", "schedule.kind"} <= set(table)
    assert 7.9 < summary["epsilon"] <= 8.0


def test_where_epsilon_relies_on_hidden_cohorts_the_clock_is_not_released(tmp_path: Path) -> None:
    summary = run_experiment(small(*POISSON, *PHONES, "schedule.kind=synchronous", "schedule.deadline=6.0"), tmp_path)
    assert all(not {"simulated_seconds", "counted", "bytes_up"} & set(row) for row in rows(tmp_path))
    assert {"simulated_seconds", "counted", "bytes_up"} <= set(rows(tmp_path, "diagnostics")[0])
    assert "simulated_seconds" not in summary
    assert json.loads((tmp_path / "diagnostics.json").read_text())["simulated_seconds"] == 60.0
    assert json.loads((tmp_path / "privacy.json").read_text())["amplification"]


class StoppedError(Exception):
    """Simulates a kill between two rounds."""


def stop_after(last: int):
    def watch(released: dict, diagnostics: dict) -> None:  # noqa: ARG001
        if released["round"] == last:
            raise StoppedError

    return watch


@pytest.mark.parametrize(
    ("settings", "engine"),
    [
        (FEDBUFF, "loop"),
        ([*FEDBUFF, *LOCAL, *PLAIN], "vectorized"),
        ([*FEDFIX, *PLAIN], "vectorized"),
        ([*FIRST, *LOCAL, "method.memory=sent"], "loop"),
    ],
    ids=["fedbuff", "fedbuff, local, weights", "fedfix, weights", "over-selection, local, sent"],
)
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(
    tmp_path: Path, settings: list[str], engine: EngineName
) -> None:
    config = small(*PHONES, *AWAY, *settings)
    run_experiment(config, tmp_path / "whole", engine=engine)
    part = tmp_path / "part"
    with pytest.raises(StoppedError):
        run_experiment(config, part, engine=engine, resume=True, watch=stop_after(8), checkpoint_every=3)
    if "fedbuff" in settings[0]:
        with_models = load_file(Checkpoint(part / "checkpoint.safetensors").path)
        assert any(name.startswith("server.model-after-") for name in with_models)
    run_experiment(config, part, engine=engine, resume=True)
    assert torch.equal(final_model(part), final_model(tmp_path / "whole"))
    assert (part / "rounds.jsonl").read_bytes() == (tmp_path / "whole" / "rounds.jsonl").read_bytes()
    ledgers = [json.loads((d / "summary.json").read_text()).get("ledger") for d in (part, tmp_path / "whole")]
    assert ledgers[0] == ledgers[1]


def test_the_ledger_counts_messages_that_came_too_late_and_the_plan_is_its_worst_client(tmp_path: Path) -> None:
    config = small(*PHONES, *FIRST, *LOCAL)
    summary = run_experiment(config, tmp_path)
    made = assemble(config).timeline
    assert made is not None
    assert isinstance(assemble(config).server.sampling, Scheduled)
    assert summary["ledger"]["most"]["participations"] == made.scheduled().sent[-1] > 0
    assert summary["ledger"]["most"]["epsilon"] == summary["epsilon"]
    assert sum(len(step.sent) for step in made.steps) > sum(len(step.counted) for step in made.steps)


def test_devices_of_another_trace_are_not_mixed_into_a_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("speed,download,upload\n5,1e4,4e3\n1,1e4,4e3\n9,1e4,4e3\n")
    config = small("devices.kind=trace", f"devices.file={trace}", *FEDBUFF)
    with pytest.raises(StoppedError):
        run_experiment(config, tmp_path / "begun", watch=stop_after(5), checkpoint_every=1)
    run_experiment(config, tmp_path / "done")
    trace.write_text("speed,download,upload\n5,1e4,4e3\n2,1e4,4e3\n9,1e4,4e3\n")
    changed = small("devices.kind=trace", f"devices.file={trace}", *FEDBUFF)
    for folder in ("begun", "done"):
        with pytest.raises(UserError, match=r"a different experiment \(.*checksum"):
            run_experiment(changed, tmp_path / folder, resume=True)


def test_the_rows_of_a_trace_are_part_of_the_experiment_and_its_writing_is_not(tmp_path: Path) -> None:
    trace, found = tmp_path / "trace.csv", []
    texts = ("5,1e4,4e3\n1,1e4,4e3\n", "5.0, 10000,4000\n1,1e4,4e3\n", "5,1e4,4e3\n2,1e4,4e3\n")
    for text in texts:
        trace.write_text("speed,download,upload\n" + text)
        found.append(small("devices.kind=trace", f"devices.file={trace}", *FEDBUFF))
        assert parse_config(found[-1].tables) == found[-1]
    assert found[0].digest == found[1].digest != found[2].digest
    assert found[0].tables["devices"]["checksum"] != found[2].tables["devices"]["checksum"]
    with pytest.raises(UserError, match=r"^devices\.file: expected rows of checksum") as caught:
        parse_config(found[0].tables)
    assert "\n" not in str(caught.value)


# The config.


DIGESTS = {
    "quickstart": "c6be5563fe98f125b46d6a4b56f4d77901f12e04a35f4a999b2fb3358ff5cd86",
    "federated-averaging": "4065224c3b5fdb46654fe4073d7bbf177ec60b096c5b04bb24b735360b9ac00b",
    "local-trust": "ed6dbc29a09ab587461db8d0ffa911921c4565ae4007a9072d13c6e4a7c7afb0",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_digests_of_experiments_without_a_clock_are_what_they_were(name: str) -> None:
    assert load_config(CONFIGS / f"{name}.toml").digest == DIGESTS[name]


@pytest.mark.parametrize(
    "setting",
    ["devices.speed=6.0", "devices.dropout=0.2", "schedule.buffer_size=4", "schedule.staleness_exponent=0.0"],
)
def test_devices_and_schedule_are_part_of_the_digest(setting: str) -> None:
    config = small(*PHONES, *FEDBUFF)
    assert small(*PHONES, *FEDBUFF, setting).digest != config.digest != small().digest
    assert parse_config(config.tables) == config


MISTAKES = [
    ([*PHONES, "devices.sped=1"], "devices.sped", "speed"),
    ([*PHONES, "devices.speed=0"], "devices.speed", "0"),
    ([*PHONES, "devices.speed=fast"], "devices.speed", "a number"),
    ([*PHONES, "devices.dropout=1.0"], "devices.dropout", "1.0"),
    ([*PHONES, "devices.available=0"], "devices.available", "0"),
    ([*PHONES, "devices.day=0"], "devices.day", "0"),
    ([*PHONES, "devices.speed_spread=9"], "devices.speed_spread", "9"),
    (["devices.kind=phones"], "devices.kind", "log-normal"),
    (["devices.speed=5"], "devices.kind", "Add kind"),
    (
        ["devices.kind=uniform", "devices.speed=[2,1]", "devices.download=[1,1]", "devices.upload=[1,1]"],
        "speed",
        "min, max",
    ),
    (["devices.kind=trace", "devices.file=/nowhere.csv"], "devices.file", "nowhere"),
    (["devices=3"], "devices", "table"),
    (FEDBUFF, "[devices]", "a missing table"),
    ([*PHONES, "schedule.kind=fedbuf"], "schedule.kind", "fedbuff"),
    ([*PHONES, "schedule.kind=fedbuff", "schedule.concurrency=3"], "schedule.buffer_size", "Add"),
    ([*PHONES, *FEDBUFF, "schedule.buffer_size=13"], "schedule.buffer_size", "12"),
    ([*PHONES, *FEDBUFF, "schedule.staleness_exponent=0.5"], "schedule.staleness_exponent", "memory"),
    ([*PHONES, *FEDBUFF, *POISSON], "cohort.sampling", "fedbuff"),
    ([*PHONES, "schedule.kind=fedfix", "schedule.window=0"], "schedule.window", "0"),
    ([*PHONES, "schedule.kind=synchronous", "schedule.deadline=-1"], "schedule.deadline", "-1"),
    ([*PHONES, "schedule.kind=synchronous", "schedule.over_select=1.5"], "schedule.over_select", "fixed"),
    ([*PHONES, *FEDFIX, "privacy.adjacency=add-or-remove"], "privacy.adjacency", "replace"),
    ([*PHONES, "schedule.kind=synchronous", "schedule.deadline=1e-5"], "[schedule]", "0 in"),
    ([*PHONES, "schedule.kind=fedfix", "schedule.window=1e-5", "privacy.adjacency="], "[schedule]", "0 in"),
]


@pytest.mark.parametrize(("settings", "where", "says"), MISTAKES)
def test_a_mistake_is_one_line_that_names_the_key(settings: list[str], where: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        assemble(small(*settings))
    line = str(caught.value)
    assert where in line
    assert says in line
    assert "\n" not in line


def test_a_plan_that_forgets_the_schedule_is_not_made() -> None:
    config = small(*PHONES, *FEDBUFF)
    with pytest.raises(ValueError, match="not accounted"):
        config.plan(config.cohort.of(12))
    assert config.plan(sampling_of(config)) == assemble(config).plan


def test_flower_refuses_a_virtual_clock() -> None:
    config = small(*PHONES)
    with pytest.raises(UserError, match=r"\[devices\]"):
        RunConfig().assemble(config)


def test_another_method_has_a_timeline_of_its_own_weights() -> None:
    experiment = assemble(small(*PHONES, *FEDFIX))
    other = experiment.with_method(small(*PHONES, *FEDFIX, *PLAIN))
    assert other.timeline is not None
    assert {g.weight for step in other.timeline.steps for g in step.groups} != {1.0}
    assert other.server.sampling == other.timeline.scheduled() != experiment.server.sampling


@pytest.mark.parametrize("name", ["sync", "fedbuff", "fedfix"])
def test_shipped_configs_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    command = ["run", str(CONFIGS / f"devices-{name}.toml"), "--out", str(tmp_path / "run"), "--engine", "vectorized"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "-s", "training.rounds=4"])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert "simulated" in printed.out
    assert "clock" in printed.err
    assert rows(tmp_path / "run")[-1]["simulated_seconds"] > 0.0


def test_unequal_devices_are_late_and_drop_out() -> None:
    made = timeline("rounds with a deadline", devices=UNEQUAL)
    assert sum(len(step.late) for step in made.steps) > 0
    assert sum(len(step.dropped) for step in made.steps) > 0
