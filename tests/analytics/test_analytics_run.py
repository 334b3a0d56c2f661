"""Analyses as experiments: configs, runs on every engine, the command, and constants for a training."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpriv import load_config
from fedpriv.cli import main
from fedpriv.cli.analyses.print_answers import print_answers
from fedpriv.cli.print_run import print_summary
from fedpriv.errors import UserError
from fedpriv.experiment.analyses.clients import clients_of, refuse_other_clients
from fedpriv.experiment.build import make_federation
from fedpriv.experiment.run import run_experiment
from fedpriv.privacy import Everyone, Poisson, PrivacyPlan, make_plan, rounded_up
from fedpriv.privacy.gaussian import gaussian_epsilon
from fedpriv.report.spent import spent_below

CLIENTS = 12
RANGE = {"low": 0.0, "high": 10.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two columns of 12 clients with different numbers of records."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(2)
    owners = np.repeat(np.arange(CLIENTS), 2 + np.arange(CLIENTS))
    rows = [f"{o},{draw.normal(4, 1):.3f},{draw.normal(6, 2):.3f},{draw.choice(['u', 'v'])},{o % 3}" for o in owners]
    (folder / "table.csv").write_text("\n".join(["who,a,b,c,y", *rows]) + "\n")
    return folder


def tables(**change: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": "asked",
        "seed": 4,
        "data": {
            "name": "csv",
            "file": "table.csv",
            "target": "y",
            "client": "who",
            "partition": "natural",
            "test": "within",
            "numeric": {"a": [5.0, 2.0], "b": [0.0, 1.0]},
            "categories": {"c": ["u", "v"]},
        },
        "analysis": {
            "scale": {"kind": "moments", "columns": ["a", "b"], **RANGE},
            "middle": {"kind": "quantiles", "column": "b", "levels": 4, **RANGE},
            "kinds": {"kind": "categories", "column": "c"},
            "labels": {"kind": "labels"},
        },
        "privacy": {"noise_multiplier": 1.0},
    }
    for key, value in change.items():
        made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
    return made


def answers(config: dict[str, Any], data: Path, out: Path, engine: Any = "loop") -> dict[str, Any]:
    run_experiment(load_config(config), out, engine=engine, data_root=data)
    return json.loads((out / "analysis.json").read_text())


def training(folder: Path, **privacy: Any) -> dict[str, Any]:
    rest = {"model": {"name": "softmax"}, "method": {"name": "dp-fedavg", "clip_norm": 1.0}}
    rest |= {"training": {"rounds": 3}, "privacy": {"noise_multiplier": 2.0, **privacy}}
    return {**tables(data={"standardize": str(folder)}), **rest, "name": "trained"} | {"analysis": None}


def without_none(made: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in made.items() if value is not None}


def test_a_resolved_analysis_is_an_ordinary_experiment() -> None:
    config = load_config(tables())
    assert load_config(config.tables).digest == config.digest
    assert config.method_name == "dp-gd"
    assert config.training.rounds == 1
    assert not config.learns
    example = load_config(tables(privacy={"unit": "example"}, analysis={"records": 9}))
    assert example.privacy is not None
    assert (example.privacy.example_clip, example.privacy.examples) == (1.0, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"analysis": {"x": {"kind": "moments", "columns": ["a"]}}}, r"analysis\.x\.low: expected the range"),
        ({"analysis": {"x": {"kind": "quantiles", "column": "a", "low": 1.0}}}, r"analysis\.x\.high"),
        ({"analysis": {"x": {"kind": "moments", "columns": ["aa"], **RANGE}}}, r"analysis\.x\.columns: .*Did you mean"),
        ({"analysis": {"x": {"kind": "moment"}}}, r"analysis\.x\.kind: expected one of count"),
        ({"analysis": {"x": {"kind": "count"}}}, r"analysis\.x\.kind: expected analysis\.records"),
        ({"analysis": {"x": {"kind": "labels", "bins": 3}}}, r"analysis\.x\.bins: expected a known key"),
        (
            {"analysis": {"x": {"kind": "moments", "columns": [5, 6], **RANGE}}},
            r"x\.columns: expected a column from 0 to 3",
        ),
        ({"analysis": {"x": {"kind": "moments", "columns": ["a", "a"], **RANGE}}}, r"different columns, got 'a' twice"),
        ({"analysis": {"x": {"kind": "moments", "columns": ["a", 0], **RANGE}}}, r"different columns, got 0 twice"),
        ({"analysis": {"x": {"kind": "quantiles", "column": 4, **RANGE}}}, r"x\.column: expected a column from 0 to 3"),
        (
            {"analysis": {"x": {"kind": "categories", "column": 3, "categories": 2}}},
            r"x\.column: expected a column from 0 to 3, got 4",
        ),
        ({"analysis": {"x": {"kind": "categories"}}}, r"x\.column: expected the name of .*, got a missing key"),
        (
            {"analysis": {"x": {"kind": "moments", "colums": ["a"], **RANGE}}},
            r"Did you mean 'columns'\? Known: columns, high, low, share\.$",
        ),
        (
            {"analysis": {"x": {"kind": "moments", "columns": ["a"], "low": [0.0, 1.0], "high": 9.0}}},
            r"for each of 1 column, got 2 numbers",
        ),
        (
            {"analysis": {"x": {"kind": "moments", "columns": ["a", "b"], "low": [0.0], "high": 9.0}}},
            r"for each of 2 columns, got 1 number\.",
        ),
        (
            {"data": {"standardise": "runs/a"}},
            r"data\.standardise: .*Did you mean 'standardize'\? Known: .*standardize",
        ),
        ({"analysis": {"x": 3}}, r"analysis\.x: expected a table with a query"),
        ({"model": {"name": "softmax"}}, r"\[model\]: expected no such table beside \[analysis\]"),
        ({"privacy": {"examples": 3}}, r"privacy\.examples: expected no such key"),
        ({"analysis": {"records": 0}}, r"analysis\.records"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(tables(**change))


def test_one_round_and_one_column_are_singular(data: Path, tmp_path: Path) -> None:
    for unit in ("client", "example"):
        asked = tables(privacy={"unit": unit})
        asked["analysis"] = {"scale": {"kind": "moments", "columns": ["a"], **RANGE}}
        answers(asked, data, tmp_path / unit)
        statement = " ".join((tmp_path / unit / "privacy.txt").read_text().split())
        assert "mean and variance of 1 column)" in statement
        assert "in 1 round." in statement
        assert "only round." in statement
        assert "1 rounds" not in statement


def test_engines_agree_and_answers_are_those_of_the_training_examples(data: Path, tmp_path: Path) -> None:
    config = tables(privacy={"noise_multiplier": 1e-3})
    found = answers(config, data, tmp_path / "loop")
    assert found == answers(config, data, tmp_path / "vectorized", "vectorized")
    population = load_config(config)
    assert found["clients"] == CLIENTS
    assert found["answers"]["scale"]["mean"] == pytest.approx([4.0, 6.0], abs=0.5)  # raw units
    assert sum(found["answers"]["kinds"]["value"]) == pytest.approx(1.0, abs=1e-2)
    assert found["mu"] == pytest.approx(1e3)
    assert found["answers"]["kinds"]["names"] == ["u", "v"]
    assert "names" not in found["answers"]["labels"]  # the data set declares none
    statement = (tmp_path / "loop" / "privacy.txt").read_text()
    assert "Privacy statement for an analysis" in statement
    assert "scale (mean and variance of 2 columns)" in " ".join(statement.split())
    assert "test_loss" not in (tmp_path / "loop" / "rounds.jsonl").read_text()  # nothing without noise is released
    assert population.not_covered == ()


@pytest.mark.parametrize(
    "privacy",
    [
        {"trust": "local"},
        {"trust": "aggregator"},
        {"trust": "local", "unit": "example"},
        {"unit": "example"},
        {},
    ],
    ids=str,
)
def test_counts_of_records_add_up_under_every_trust_and_unit(
    privacy: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    asked = {"analysis": {"records": 40, "number": {"kind": "count"}}}
    found = answers(tables(**asked, privacy={**privacy, "noise_multiplier": 1e-4}), data, tmp_path)
    train = sum(math.ceil(size * 0.8) for size in range(2, 2 + CLIENTS))
    number = found["answers"]["number"]
    assert number["value"] == pytest.approx(sum(found["answers"]["labels"]["value"]), abs=2.0)
    assert abs(number["value"] - train) <= 0.1 * train
    assert 0.0 < number["standard_error"] < 2.0


def test_a_client_with_more_records_than_the_bound_counts_as_the_bound(data: Path, tmp_path: Path) -> None:
    config = tables(privacy={"noise_multiplier": 1e-4})
    config["analysis"] = {"records": 1, "number": {"kind": "count"}}
    found = answers(config, data, tmp_path)
    assert found["answers"]["number"]["value"] == pytest.approx(CLIENTS, abs=0.01)


def test_the_costs_of_single_answers_compose_to_that_of_all(data: Path, tmp_path: Path) -> None:
    found = answers(tables(), data, tmp_path)
    costs = [answer["epsilon_alone"] for answer in found["answers"].values()]
    shares = [answer["share"] for answer in found["answers"].values()]
    assert math.fsum(shares) == pytest.approx(1.0)
    assert costs == pytest.approx([gaussian_epsilon(math.sqrt(share), 1e-5) for share in shares])
    assert max(costs) < found["epsilon"] < math.fsum(costs)
    assert found["epsilon"] == pytest.approx(gaussian_epsilon(1.0, 1e-5))


def test_a_training_takes_its_constants_and_adds_up_both_costs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answers(tables(), data, tmp_path / "runs" / "asked")
    config = load_config(without_none(training(tmp_path / "runs" / "asked")))
    assert config.tables["data"]["numeric"] == {
        name: (mean, std)
        for name, mean, std in zip(*(found["answers"]["scale"][key] for key in ("columns", "mean", "std")), strict=True)
    }
    assert load_config(config.tables).digest == config.digest  # the folder is not needed again
    run_experiment(config, tmp_path / "runs" / "trained", engine="loop", data_root=data)
    record = json.loads((tmp_path / "runs" / "trained" / "privacy.json").read_text())
    together = math.sqrt(1.0 + 3.0 / 4.0)
    assert record["with_analyses"]["epsilon"] == pytest.approx(gaussian_epsilon(together, 1e-5))
    assert record["with_analyses"]["adversary"] == record["adversary"]
    first = " ".join(record["statement"].partition("Adversary:")[0].split())  # not after the list of files
    assert "before this run, the same clients answered the analysis asked" in first
    capsys.readouterr()
    print_summary(
        json.loads((tmp_path / "runs" / "trained" / "summary.json").read_text()), tmp_path / "runs" / "trained"
    )
    quote = rounded_up(gaussian_epsilon(together, 1e-5))
    assert f"quote       {quote}, which includes the analysis asked" in capsys.readouterr().out
    (group,) = spent_below(tmp_path / "runs")  # the same clients, although the constants differ
    assert group.total.epsilon == pytest.approx(record["with_analyses"]["epsilon"])


@pytest.mark.parametrize(
    ("asked", "trained", "factor"),
    [
        ({}, {}, 1.0),
        ({"adjacency": "replace"}, {}, 1.0),
        ({}, {"adjacency": "replace"}, 2.0),
        ({"trust": "local"}, {}, 1.0),
        ({}, {"trust": "local"}, None),
        ({"unit": "example"}, {}, None),
        ({}, {"unit": "example", "example_clip": 1.0}, 2.0),
    ],
    ids=str,
)
def test_the_cost_is_counted_in_the_units_of_the_training_or_refused(
    asked: dict[str, Any], trained: dict[str, Any], factor: float | None, tmp_path: Path
) -> None:
    config = load_config(tables(privacy=asked))
    plan = {"unit": "client", "trust": "central", "adjacency": "add-or-remove", **asked}
    moments = {"kind": "moments", "columns": ["a"], "mean": [4.0], "std": [1.0]}
    clients = clients_of(config.tables)
    content = {"name": config.name, "mu": 0.5, **plan, "clients_of": clients, "answers": {"scale": moments}}
    (tmp_path / "analysis.json").write_text(json.dumps(content))
    made = without_none(training(tmp_path, **trained))
    if trained.get("unit") == "example":
        made["method"] = {"name": "dp-gd"}
    if factor is None:
        with pytest.raises(UserError, match=r"data\.standardize"):
            load_config(made)
        return
    read = load_config(made).privacy
    assert read is not None
    assert read.analyses_mu == 0.5 * factor


def write_answers(folder: Path, **change: Any) -> Path:
    moments = {"kind": "moments", "columns": ["a"], "mean": [4.0], "std": [1.0]}
    plan = {"unit": "client", "trust": "central", "adjacency": "add-or-remove", "mu": 0.5}
    plan["clients_of"] = clients_of(load_config(tables()).tables)
    (folder / "analysis.json").write_text(json.dumps({"name": "asked", **plan, "answers": {"s": moments}, **change}))
    return folder


@pytest.mark.parametrize(("kind", "factor"), [("fedbuff", 2.0), ("synchronous", 1.0)])
def test_a_timeline_is_accounted_under_replace_and_so_is_the_analysis(kind: str, factor: float, tmp_path: Path) -> None:
    made = without_none(training(write_answers(tmp_path)))
    made["devices"] = {"kind": "log-normal", "speed": 20.0, "download": 4e4, "upload": 1e4}
    made["schedule"] = {"kind": kind, **({"buffer_size": 3, "concurrency": 6} if kind == "fedbuff" else {})}
    read = load_config(made).privacy
    assert read is not None
    assert read.analyses_mu == 0.5 * factor


def test_an_earlier_cost_that_is_a_whole_number_is_kept(tmp_path: Path) -> None:
    read = load_config(without_none(training(write_answers(tmp_path), analyses=["first"], analyses_mu=2))).privacy
    assert read is not None
    assert read.analyses_mu == math.hypot(2.0, 0.5)


def test_an_analysis_that_used_another_passes_both_costs_on(data: Path, tmp_path: Path) -> None:
    config = {**tables(data={"standardize": str(write_answers(tmp_path, mu=5.0))}), "name": "second"}
    assert answers(config, data, tmp_path / "second")["mu"] == pytest.approx(math.hypot(5.0, 1.0))
    read = load_config(without_none(training(tmp_path / "second"))).privacy
    assert read is not None
    assert (read.analyses, read.analyses_mu) == (
        ["the analysis asked", "the analysis second"],
        pytest.approx(math.hypot(5.0, 1.0)),
    )


@pytest.mark.parametrize(
    "change",
    [
        {"adjacency": "swap"},
        {"unit": "record"},
        {"trust": "nobody"},
        {"mu": "1"},
        {"mu": math.nan},
        {"mu": -1.0},
        {"answers": {"s": {"kind": "moments"}}},
    ],
    ids=str,
)
def test_answers_with_an_unknown_promise_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.standardize"):
        load_config(without_none(training(write_answers(tmp_path, **change))))


@pytest.mark.parametrize("change", [{"file": "others.csv"}, {"client": "b"}], ids=str)
def test_an_analysis_of_other_clients_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    made = without_none(training(write_answers(tmp_path)))
    made["data"] |= change
    with pytest.raises(UserError, match=r"data\.standardize: expected an analysis of the same clients"):
        load_config(made)
    del made["privacy"]
    load_config(made)


@pytest.mark.parametrize("change", ["seed=2", "data.clients=30", "data.partition=dirichlet"])
def test_another_division_among_clients_is_refused(change: str, tmp_path: Path) -> None:
    tables = {"name": "a", "seed": 1, "model": {"name": "softmax"}}
    tables |= {"data": {"name": "digits", "clients": 20, "partition": "iid"}}
    tables |= {"method": {"name": "dp-fedavg"}, "training": {"rounds": 1}}
    asked = clients_of(load_config(tables).tables)
    refuse_other_clients(asked, load_config(tables, ["training.rounds=2"]).tables, tmp_path)
    with pytest.raises(UserError, match=r"data\.standardize: expected an analysis of the same clients"):
        refuse_other_clients(asked, load_config(tables, [change]).tables, tmp_path)


def test_natural_clients_are_the_same_for_every_seed_and_number(tmp_path: Path) -> None:
    made = without_none(training(write_answers(tmp_path)))
    made["data"] |= {"clients": 3}
    load_config({**made, "seed": 8})


def test_more_colluders_than_in_the_analysis_are_refused(tmp_path: Path) -> None:
    folder = write_answers(tmp_path, trust="aggregator", adjacency="replace", colluders=2)
    made = without_none(training(folder, trust="aggregator"))
    load_config({**made, "aggregation": {"colluders": 2}})
    with pytest.raises(UserError, match="expected an analysis that allows 3 colluders"):
        load_config({**made, "aggregation": {"colluders": 3}})
    with pytest.raises(UserError, match="expected an analysis with the same helpers, got 1"):
        load_config({**made, "aggregation": {"colluders": 2, "helpers": 3}})


def test_the_sum_of_a_client_may_give_one_answer_the_whole_length(data: Path, tmp_path: Path) -> None:
    """Records without a category are zero in one query, so that clipping leaves the other all of the length."""
    found = answers(tables(analysis={"records": 4}), data, tmp_path)
    assert {answer["epsilon_alone"] for answer in found["answers"].values()} == {found["epsilon"]}
    of_records = answers(tables(analysis={"records": 4}, privacy={"unit": "example"}), data, tmp_path / "e")
    assert all(answer["epsilon_alone"] < of_records["epsilon"] for answer in of_records["answers"].values())


def test_large_costs_of_analyses_are_never_rounded_down() -> None:
    plan = make_plan(
        trust="central", sampling=Poisson(1000, 0.1), rounds=3, delta=1e-5, l2_bound=1.0, noise_multiplier=1.2
    )
    assert plan.with_analyses(500.0).epsilon > gaussian_epsilon(500.0, 1e-5)
    assert math.isinf(plan.with_analyses(2000.0).epsilon)


def test_a_folder_without_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No such file or directory\. Run fedpriv analyze first"):
        load_config(without_none(training(tmp_path)))


@pytest.mark.parametrize("adjacency", ["add-or-remove", "replace"])
def test_sampled_rounds_after_an_analysis_cost_what_dp_accounting_composes(adjacency: Any) -> None:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    mu, rounds = 0.4, 30
    plan = make_plan(
        trust="central",
        adjacency=adjacency,
        sampling=Poisson(1000, 0.1),
        rounds=rounds,
        delta=1e-5,
        l2_bound=1.0,
        noise_multiplier=1.2,
    )
    event, relation = plan.releases.event(plan.noise_multiplier)  # type: ignore[union-attr]
    by_hand = PLDAccountant(relation, value_discretization_interval=1e-3)
    by_hand.compose(event, rounds)
    # Under replace, dp-accounting's unit of noise is the bound, and a replaced message moves a sum by 2.
    unit = dp_accounting.GaussianDpEvent((2.0 if adjacency == "replace" else 1.0) / mu)
    if adjacency == "replace":
        unit = dp_accounting.PoissonSampledDpEvent(1.0, unit)
    by_hand.compose(unit)
    found = plan.with_analyses(mu)
    assert found.epsilon == pytest.approx(by_hand.get_epsilon(1e-5), rel=2e-3)
    assert max(plan.epsilon, gaussian_epsilon(mu, 1e-5)) < found.epsilon
    assert found.epsilon < plan.epsilon + gaussian_epsilon(mu, 1e-5)


def test_rounds_without_sampling_after_an_analysis_are_one_gaussian() -> None:
    plan: PrivacyPlan = make_plan(
        trust="local", sampling=Everyone(9), rounds=4, delta=1e-6, l2_bound=1.0, noise_multiplier=4.0
    )
    assert plan.with_analyses(1.5).epsilon == pytest.approx(gaussian_epsilon(math.hypot(0.5, 1.5), 1e-6))


def test_the_command_prints_answers_and_refuses_a_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tomli_w

    monkeypatch.chdir(tmp_path)
    (tmp_path / "ask.toml").write_text(tomli_w.dumps(tables()))
    common = ["--data-root", str(data), "--engine", "loop"]
    with pytest.raises(SystemExit) as ended:
        main(["analyze", "ask.toml", *common])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "quantile 0.5" in printed
    assert "adversary" in printed
    with pytest.raises(SystemExit):
        main(["analyze", "ask.toml", *common, "--resume", "--json"])
    assert json.loads(capsys.readouterr().out)["answers"]["scale"]["kind"] == "moments"
    with pytest.raises(SystemExit) as again:
        main(["analyze", "ask.toml", *common])
    assert again.value.code == 2
    finished = "expected a folder without a run, got this experiment, started or finished. Add --resume"
    assert finished in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        main(["check", "ask.toml", "--data-root", str(data)])
    assert "fedpriv analyze ask.toml" in capsys.readouterr().out
    with pytest.raises(SystemExit) as unreported:
        main(["report", "runs/asked"])
    assert unreported.value.code == 2
    assert "analyses alone" in capsys.readouterr().err
    trained = {**tables(), "model": {"name": "softmax"}, "method": {"name": "dp-gd"}, "training": {"rounds": 1}}
    del trained["analysis"]
    (tmp_path / "train.toml").write_text(tomli_w.dumps(trained))
    for code in (0, 2):
        with pytest.raises(SystemExit) as again:
            main(["run", "train.toml", *common, "--out", "runs/trained"])
        assert again.value.code == code
    assert finished in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as refused:
        main(["analyze", "train.toml", *common])
    assert refused.value.code == 2
    assert "train with fedpriv run" in capsys.readouterr().err


def test_rows_of_labels_and_categories_have_the_declared_names(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tables(data={"labels": ["0", "1", "2"]}, analysis={"others": {"kind": "categories", "column": "c"}})
    found = answers(asked, data, tmp_path / "asked")
    assert found["answers"]["labels"]["names"] == ["0", "1", "2"]
    assert found["answers"]["others"]["names"] == ["u", "v"]
    print_answers(found, tmp_path)
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["kinds", "u"] in rows
    assert rows[rows.index(["kinds", "u"]) + 1][0] == "v"


@pytest.mark.parametrize("engine", ["loop", "vectorized"])
@pytest.mark.parametrize("records", [None, 20])
def test_labels_that_are_numbers_are_asked_about(engine: str, records: int | None, data: Path, tmp_path: Path) -> None:
    """Without noise, the mean, variance and median of the clients' numbers."""
    made = tables(privacy=None, data={"target": "b", "numeric": {"a": [5.0, 2.0]}, "categories": {"c": ["u", "v"]}})
    asked = {"scale": {"kind": "moments", "columns": ["label"], **RANGE}}
    asked |= {"middle": {"kind": "quantiles", "column": "label", "at": [0.5], **RANGE}}
    asked |= {
        "bars": {"kind": "histogram", "column": "label", "bins": 5, **RANGE},
        "a": {**asked["scale"], "columns": ["a"]},
    }
    made["analysis"] = {"label_kind": "numbers", **asked, **({} if records is None else {"records": records})}
    made = without_none(made)
    config = load_config(made)
    found = answers(made, data, tmp_path, engine)["answers"]
    federation = make_federation(config, data)
    own = [federation.dataset.train_labels[federation.rows_of(client)].numpy().ravel() for client in range(CLIENTS)]
    own = [np.clip(values, 0.0, 10.0) for values in own]
    weights = np.concatenate([np.full(len(one), 1.0 if records else 1.0 / len(one)) for one in own])
    values, weights = np.concatenate(own), weights / weights.sum()
    mean = float(weights @ values)
    assert found["scale"]["columns"] == ["label"]
    assert found["scale"]["mean"][0] == pytest.approx(mean, abs=1e-4)
    assert found["scale"]["variance"][0] == pytest.approx(float(weights @ (values - mean) ** 2), abs=1e-3)
    order = np.argsort(values)
    median = values[order][np.searchsorted(np.cumsum(weights[order]), 0.5)]
    assert found["middle"]["value"][0] == pytest.approx(median, abs=2 * found["middle"]["interval"])
    shares = np.array(found["bars"]["value"]) / np.sum(found["bars"]["value"])
    assert shares == pytest.approx(np.histogram(values, np.linspace(0, 10, 6), weights=weights)[0], abs=1e-5)


@pytest.mark.parametrize(
    ("analysis", "message"),
    [
        ({"x": {"kind": "moments", "columns": ["label"], **RANGE}}, r"analysis\.label_kind: expected \"numbers\""),
        ({"label_kind": "numbers", "x": {"kind": "moments", "columns": ["label"]}}, r"x\.low: expected the range"),
        ({"label_kind": "numbers", "x": {"kind": "moments", "columns": ["a", "label"], **RANGE}}, r"x\.columns"),
        (
            {"label_kind": "numbers", "x": {"kind": "quantiles", "of_label": True, **RANGE}},
            r"x\.of_label: .*no such key",
        ),
    ],
    ids=str,
)
def test_a_label_is_asked_about_alone_with_a_range_and_as_a_number(analysis: dict[str, Any], message: str) -> None:
    made = tables()
    made["analysis"] = analysis
    with pytest.raises(UserError, match=message):
        load_config(made)


def test_a_replaced_label_moves_the_vector_no_further_than_a_column_would() -> None:
    """Without this bound, the noise would not suit a label far beyond the range."""
    from fedpriv.analytics.statistics import Statistics, StatisticsTask
    from fedpriv.tasks.task import Task

    asked = [
        {"kind": "moments", "name": "m", "columns": [0], "shifts": [0.0], "scales": [1.0], "of_label": True, **RANGE}
    ]
    asked += [{"kind": "quantiles", "name": "q", "levels": 3, "of_label": True, **RANGE}]
    kind = StatisticsTask(labels="numbers", queries=asked)
    task = Task(Statistics(queries=asked).build((2,), kind.width(1), 0), "cpu", kind=kind)
    labels = torch.tensor([0.0, 10.0, 1e30, -1e30, 4.9])
    found = torch.stack([task.gradient(task.initial_model(), torch.zeros(1, 2), one.reshape(1)) for one in labels])
    assert torch.isfinite(found).all()
    assert 0.9 < float(found.norm(dim=1).max()) <= 1.0 + 1e-6
