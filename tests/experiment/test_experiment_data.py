"""The data of a config: shifted inputs, held-out examples, and the recorded differences between clients."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support.helpers import same

import fedpriv
from fedpriv.cli import main
from fedpriv.engines import LoopEngine, VectorizedEngine
from fedpriv.errors import UserError
from fedpriv.experiment import heterogeneity
from fedpriv.experiment.build import Experiment, assemble, assemble_clients
from fedpriv.experiment.config import Config, load_config, parse_config
from fedpriv.experiment.heterogeneity import measure_heterogeneity
from fedpriv.experiment.results import compare_runs
from fedpriv.experiment.run import run_experiment
from fedpriv.rounds import begin_round

FOLDER = Path(__file__).parents[2] / "sim_configs"
QUICKSTART = FOLDER / "quickstart.toml"
SHIFTS = ["rotation", "noise", "style"]

# Digests from before shifts and held-out examples existed. Runs started then must still resume.
DIGESTS = {
    "cifar10-resnet20": "fcf340eff8b11f221826cc5111f44c713835f74fb54b294dc73766355fd35932",
    "devices": "162be8b7f434cb55f12edbb04ca67eb1759563c568e72095fad40f3f6864afff",
    "federated-averaging": "4065224c3b5fdb46654fe4073d7bbf177ec60b096c5b04bb24b735360b9ac00b",
    "local-trust": "ed6dbc29a09ab587461db8d0ffa911921c4565ae4007a9072d13c6e4a7c7afb0",
    "million-clients": "51d641adb444581d6452b52af84f0b9d6818a038d55406f627d6532cc8ab0f58",
    "mnist-by-writer": "c583f5d978016fef7b305ba6537e04bee7e0567f2271f5ec46e7341d340f142e",
    "quickstart": "c6be5563fe98f125b46d6a4b56f4d77901f12e04a35f4a999b2fb3358ff5cd86",
}


def small(*settings: str) -> Config:
    return load_config(QUICKSTART, ["data.clients=12", "training.rounds=3", *settings])


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


# The config


@pytest.mark.parametrize("name", DIGESTS)
def test_experiments_without_the_new_keys_are_what_they_were(name: str):
    assert load_config(FOLDER / f"{name}.toml").digest == DIGESTS[name]


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shift_and_a_share_are_part_of_the_experiment_with_every_default_spelled_out(shift: str):
    config = small(f"data.shift={shift}", "data.validation=0.1")
    assert parse_config(config.tables) == config
    assert len({config.digest, small(f"data.shift={shift}").digest, small("data.validation=0.1").digest}) == 3
    assert small().digest not in (config.digest, small("data.validation=0.1").digest)
    assert any(key.startswith("shift_") for key in config.tables["data"])


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (["data.shift=turn"], "data.shift"),
        (["data.shift_angle=30"], "data.shift_angle"),
        (["data.shift=noise", "data.shift_angle=30"], "data.shift_angle"),
        (["data.shift=rotation", "data.shift_angle=190"], "data.shift_angle"),
        (["data.shift=rotation", "data.shift_angle=true"], "data.shift_angle"),
        (["data.validation=0"], "data.validation"),
        (["data.validation=1.0"], "data.validation"),
        (["data.validation=nan"], "data.validation"),
        (["data.validation=true"], "data.validation"),
        (["data.validation=x"], "data.validation"),
    ],
)
def test_a_mistake_names_the_key(settings: list[str], where: str):
    with pytest.raises(UserError) as caught:
        small(*settings)
    assert caught.value.where == where


def test_a_population_that_shares_examples_is_not_shifted(capsys: pytest.CaptureFixture, tmp_path: Path):
    settings = ["data.partition=resampled", "data.concentration=", "data.shift=noise"]
    arguments = [word for setting in settings for word in ("-s", setting)]
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(QUICKSTART), "--out", str(tmp_path / "run"), *arguments])
    assert stopped.value.code == 2
    assert "data.shift: expected a partition that assigns each example to one client" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["data.validation=0.1", "data.shift=style"])
def test_a_deployment_has_the_data_that_it_has(setting: str):
    from fedpriv.deploy.run import run_deployed

    with pytest.raises(UserError, match=r"^data\.(validation|shift): expected no value in a deployment"):
        run_deployed(small(setting), Path("nowhere"), "nothing")


# Visibility of data


def first_total(experiment: Experiment, engine: type) -> torch.Tensor:
    state = experiment.config.method.init_server(experiment.initial_model)
    return engine(experiment.population).sum_messages(begin_round(experiment.server, state, 1)).sum


@pytest.mark.parametrize("shift", SHIFTS)
def test_all_who_run_clients_see_the_same_shifted_inputs(shift: str):
    """Loop, batches, and processes that build only the clients, as Flower and Ray do."""
    config = small(f"data.shift={shift}", "privacy=")
    experiment, clients = assemble(config), assemble_clients(config)
    assert same(clients.federation.dataset.train_inputs, experiment.population.federation.dataset.train_inputs)
    loop = first_total(experiment, LoopEngine)
    assert same(first_total(dataclasses.replace(experiment, population=clients), LoopEngine), loop)
    assert same(first_total(dataclasses.replace(experiment, population=clients.in_client_order()), LoopEngine), loop)
    assert torch.allclose(first_total(experiment, VectorizedEngine), loop, atol=1e-5)
    plain = assemble(small("privacy="))
    assert not torch.allclose(first_total(plain, LoopEngine), loop, atol=1e-3)
    assert same(experiment.population.federation.dataset.test_inputs, plain.population.federation.dataset.test_inputs)


def test_examples_held_out_are_nobodys_and_the_same_for_every_seed():
    splits = [assemble(small("data.validation=0.2", f"seed={seed}")).population.federation for seed in (1, 2)]
    one, two = (federation.dataset for federation in splits)
    assert one.validation_inputs is not None
    assert two.validation_inputs is not None
    assert same(one.validation_inputs, two.validation_inputs)
    whole = assemble(small()).population.federation
    assert splits[0].sizes.sum() + len(one.validation_inputs) == whole.sizes.sum()
    held = {bytes(x.numpy().tobytes()) for x in one.validation_inputs}
    kept = {bytes(x.numpy().tobytes()) for x in one.train_inputs}
    assert len(held & kept) <= 1  # digits are 8 by 8 pixels: twins are possible


# Records


def facts(*settings: str) -> tuple[str, str, str | None]:
    found = small(*settings).data.facts
    return found.clients, found.test, found.validation


def test_the_statement_is_told_whose_examples_are_scored():
    natural = ["data.name=tiny-shakespeare", "data.partition=natural", "data.concentration=", "data.clients="]
    assert facts() == ("simulated", "public", None)
    assert facts("data.validation=0.2") == ("simulated", "public", "public")
    assert facts("data.partition=resampled", "data.concentration=") == ("resampled", "public", None)
    assert facts(*natural) == ("natural", "clients", None)
    assert facts("data.validation=0.2", *natural) == ("natural", "clients", "clients")
    assert facts("data.validation=0.2", "data.test=within", *natural) == ("natural", "within", "within")
    assert facts("data.validation=0.2", *natural, "data.name=mnist-by-writer") == ("natural", "public", "within")


def test_scores_that_no_promise_covers_are_named_by_the_config():
    within = ["data.name=heart-disease", "data.partition=natural", "data.concentration=", "data.clients="]
    assert small(*within).not_covered == ("test_accuracy", "test_loss")
    assert small("privacy=", *within).not_covered == ()
    assert small("data.test=clients", "data.validation=0.2", *within).not_covered == ()
    assert small("data.validation=0.2").not_covered == ()
    public = [*within, "data.name=mnist-by-writer", "data.validation=0.2"]
    assert small(*public).not_covered == ("validation_accuracy", "validation_loss")


def test_whose_examples_are_tested_on_is_a_part_of_the_experiment():
    natural = ["data.name=mnist-by-writer", "data.partition=natural", "data.concentration=", "data.clients="]
    public, clients, within = (small(*natural, f"data.test={test}") for test in ("public", "clients", "within"))
    assert small(*natural) == public
    assert "test" not in public.tables["data"]  # as before the key existed
    assert len({config.digest for config in (public, clients, within)}) == 3
    for config in (public, clients, within, small(*natural, "data.validation=0.1")):
        assert parse_config(config.tables) == config


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["data.test=client"], "Did you mean 'clients'"),
        (["data.test=1"], r'^data\.test: expected "public" or "clients" or "within", got 1'),
        (["data.test=within"], "natural clients for 'within', got partition 'dirichlet'"),
        (["data.test=clients", "data.partition=iid", "data.concentration="], "natural clients for 'clients'"),
    ],
)
def test_examples_that_cannot_be_tested_on_are_one_line(settings: list[str], line: str):
    with pytest.raises(UserError, match=line) as caught:
        small(*settings)
    assert caught.value.where == "data.test"
    assert small("data.test=public") == small()


def test_validation_figures_stand_beside_the_test_figures(tmp_path: Path):
    config = small("data.validation=0.2", "training.evaluate_every=2", "training.rounds=5")
    summary = run_experiment(config, tmp_path / "run", engine="loop")
    recorded = rows(tmp_path / "run")
    assert all(
        set(row) == {"round", "epsilon", "test_accuracy", "test_loss", "validation_accuracy", "validation_loss"}
        for row in recorded
    )
    for row in recorded:
        assert (row["validation_loss"] is None) == (row["test_loss"] is None) == (row["round"] in (1, 3))
    experiment = assemble(config)
    found = experiment.validate(experiment.initial_model) or {}
    assert (recorded[0]["validation_loss"], recorded[0]["validation_accuracy"]) == (found["loss"], found["accuracy"])
    assert summary["validation_accuracy"] == recorded[-1]["validation_accuracy"] != summary["test_accuracy"]
    assert "validation_loss" in summary
    statement = " ".join((tmp_path / "run" / "privacy.txt").read_text().split())
    assert "Validation: the examples held out" in statement
    assert "clients' own examples" not in statement
    [shown] = compare_runs([tmp_path / "run"]).loc[["validation_accuracy"]].to_numpy().ravel()
    assert shown == pytest.approx(summary["validation_accuracy"], rel=1e-5)


def test_heterogeneity_is_in_the_folder_the_diagnostics_and_the_table(tmp_path: Path):
    summary = run_experiment(small(), tmp_path / "run")
    measured = read(tmp_path / "run", "heterogeneity.json")
    assert "not private" in measured["note"].lower()
    assert read(tmp_path / "run", "diagnostics.json")["heterogeneity"] == measured
    assert "diagnostics" not in summary
    table = fedpriv.load_results(tmp_path)
    for key in ("label_tv", "size_min", "size_variation", "size_gini", "gradient_dissimilarity", "gradient_clients"):
        assert (table[f"heterogeneity.{key}"] == measured[key]).all()
    assert measured["gradient_clients"] == measured["label_clients"] == 12
    assert all("label_tv" not in row for row in rows(tmp_path / "run"))


def test_heterogeneity_is_the_same_whoever_runs_the_clients_and_what_a_resumed_run_began_with(tmp_path: Path):
    for engine in ("loop", "vectorized"):
        run_experiment(small(), tmp_path / engine, engine=engine)
    assert read(tmp_path / "loop", "heterogeneity.json") == read(tmp_path / "vectorized", "heterogeneity.json")

    def stop(released: dict, _: dict) -> None:
        if released["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(small(), tmp_path / "part", watch=stop, checkpoint_every=1)
    (tmp_path / "part" / "heterogeneity.json").write_text('{"label_tv": 0.25}')
    run_experiment(small(), tmp_path / "part", resume=True)
    assert read(tmp_path / "part", "diagnostics.json")["heterogeneity"] == {"label_tv": 0.25}


def measured(*settings: str, bounded: bool = True) -> dict:
    config = small(*settings)
    return measure_heterogeneity(config, assemble_clients(config), bounded=bounded)


def test_skew_shows_in_its_figure():
    iid = measured("data.partition=iid", "data.concentration=")
    labels = measured("data.concentration=0.1")
    sizes = measured("data.partition=quantity", "data.concentration=", "data.size_spread=1.5")
    inputs = measured("data.partition=iid", "data.concentration=", "data.shift=style", "data.shift_contrast=1.0")
    assert labels["label_tv"] > 3 * iid["label_tv"]
    assert sizes["size_gini"] > 0.3 > 0.01 > iid["size_gini"]
    assert inputs["label_tv"] == iid["label_tv"]
    for skewed in (labels, inputs):
        assert skewed["gradient_dissimilarity"] > 1.5 * iid["gradient_dissimilarity"]


def test_gradients_cost_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch):
    """With 60 clients per round, small batches, and then no free operations."""
    settings = ["data.clients=60", "data.partition=iid", "data.concentration=", "training.rounds=100"]
    settings += ["local.work=minibatch-gradient", "local.batch_size=6"]
    whole = measured(*settings)
    assert (whole["gradient_clients"], whole["label_clients"]) == (60, 60)
    monkeypatch.setattr(heterogeneity, "_FREE_OPERATIONS", 0)
    some = measured(*settings)
    assert 10 <= some["gradient_clients"] <= 360 // 24
    none = measured(*settings, "local.batch_size=1")
    assert none["gradient_clients"] == 0
    assert "gradients of 10 clients" in none["gradients_skipped"]
    assert "gradient_norm" not in none
    hurried = measured(*settings, "training.rounds=1")
    assert hurried["gradient_clients"] == 0
    assert measured(*settings, "training.rounds=1", bounded=False) == whole


def test_a_million_clients_are_measured_by_some():
    settings = ["data.clients=1000000", "data.partition=resampled", "data.concentration="]
    found = measured(*settings, "cohort.sampling=poisson", "cohort.probability=0.001")
    assert (found["population"], found["label_clients"], found["gradient_clients"]) == (1_000_000, 2_000, 200)
    assert found["size_variation"] == found["size_gini"] == 0


# The command line


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_several_experiments_are_compared_by_how_much_their_clients_differ(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "iid.toml").write_text(small("data.partition=iid", "data.concentration=").to_toml())
    (tmp_path / "skewed.toml").write_text(small().to_toml())
    assert call("data", "iid.toml", "skewed.toml") == 0
    lines = {words[0]: words[1:] for line in capsys.readouterr().out.splitlines() if (words := line.split())}
    assert lines["iid"] == ["skewed"]
    iid, skewed = map(float, lines["label_tv"])
    assert iid < skewed
    assert {"size_gini", "gradient_dissimilarity"} <= set(lines)
    assert not (tmp_path / "runs").exists()


def test_one_experiment_is_shown_with_its_clients_and_a_run_with_its_validation(tmp_path: Path, capsys):
    assert call("data", str(QUICKSTART), "--out", str(tmp_path / "who"), "--all-gradients") == 0
    assert "gradient_dissimilarity" in capsys.readouterr().out
    settings = ["-s", "training.rounds=1", "-s", "data.validation=0.1"]
    assert call("run", str(QUICKSTART), "--out", str(tmp_path / "run"), *settings) == 0
    assert "on the held-out examples" in capsys.readouterr().out


def test_the_list_names_shifts_and_natural_clients(capsys):
    assert call("list", "--json") == 0
    names = json.loads(capsys.readouterr().out)
    assert {"rotation", "noise", "style"} == set(names["shifts"])
    assert {"heart-disease", "tiny-shakespeare"} <= set(names["data"])
    assert "quantity" in names["partitions"]
