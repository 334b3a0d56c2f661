"""Runs as a study reads them: actual values rather than configured ones, one row per run, equal data."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.report_runs import CENTRAL, DEVICES, fedavg, normec, run_trial

from fedpriv.cli import main
from fedpriv.errors import UserError
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.progress import RoundProgress, pace
from fedpriv.experiment.results import compare_runs
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.privacy import rounded_up
from fedpriv.report.analysis import QUANTITIES, against, held, settings_table
from fedpriv.report.study import load_study
from fedpriv.report.write import write_report

BASE: dict[str, Any] = {
    "name": "n",
    "seed": 1,
    "data": {"name": "digits", "clients": 20},
    "model": {"name": "softmax"},
    "training": {"rounds": 1},
}


def record(
    folder: Path, *, plan: dict[str, Any] | None = None, summary: dict[str, Any] | None = None, **tables: Any
) -> Path:
    """Write a finished run's records, as far as a study reads them; plan and summary keys can be set."""
    config = parse_config({**BASE, "method": fedavg(1.0), **tables})
    directory = RunDirectory(folder)
    folder.mkdir(parents=True)
    directory.file("config.toml").write_text(_toml(config.tables))
    promise = {"private": True, "epsilon": 7.99, "delta": 1e-5, "trust": "central", "adjacency": "add-or-remove"}
    promise = {**promise, "unit": "client", "adversary": "anyone", "accountant": "PLD", **(plan or {})}
    told = {"method": "dp-fedavg", "population": 20, "rounds": 1, "test_accuracy": 0.5, "test_loss": 1.0}
    directory.write_json("privacy.json", promise)
    directory.write_json("summary.json", {**told, **promise, **(summary or {})})
    directory.append("rounds.jsonl", {"round": 0, "test_accuracy": 0.1, "test_loss": 2.0, "epsilon": 0.0})
    directory.append("rounds.jsonl", {"round": 1, "test_accuracy": 0.5, "test_loss": 1.0, "epsilon": 7.99})
    return folder


def _toml(tables: dict[str, Any]) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in tables.items() if not isinstance(value, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def test_promises_differ_where_an_adjacency_that_nobody_wrote_does(tmp_path: Path) -> None:
    privacy = {"epsilon": 8.0, "delta": 1e-5, "trust": "central"}
    record(tmp_path / "a", privacy=privacy)
    record(tmp_path / "b", privacy={**privacy, "adjacency": "add-or-remove"}, method=fedavg(0.5))
    record(tmp_path / "c", privacy=privacy, plan={"adjacency": "replace"}, method=fedavg(0.1))
    record(tmp_path / "d", privacy={**privacy, "epsilon": 2.0}, plan={"epsilon": 1.99}, method=fedavg(0.2))
    study = load_study(tmp_path)
    promise = study.runs.set_index("run")["privacy"]
    assert promise["a"] == promise["b"] == "central trust, ε ≤ 8, adjacency=add-or-remove"
    assert promise["c"] == "central trust, ε ≤ 8, adjacency=replace"
    epsilon = next(quantity for quantity in QUANTITIES if quantity.name == "epsilon")
    settings = settings_table(study, "test")
    table = against(settings, epsilon, "test")
    assert set(table["setting"]) < set(settings["setting"]), "there is one value of epsilon under replace"
    assert held(settings, table, epsilon) == "adjacency=add-or-remove"
    record(tmp_path / "e", privacy=privacy, plan={"adjacency": "replace", "epsilon": 1.99}, method=fedavg(0.3))
    table = against(settings_table(load_study(tmp_path), "test"), epsilon, "test")
    assert set(table["series"]) == {"dp-fedavg · adjacency=add-or-remove", "dp-fedavg · adjacency=replace"}
    assert list(compare_runs([tmp_path / "a", tmp_path / "c"]).loc["adjacency"]) == ["add-or-remove", "replace"]


def test_parameters_are_shown_with_few_digits_and_kept_with_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alphas, betas = (0.0464158883361, 1.0), (0.2154434690032, 0.00100001, 0.00100002)
    settings = [(a, b) for a in alphas for b in betas]
    runs = [record(tmp_path / f"run {n}", method=normec(*s)) for n, s in enumerate(settings)]
    for run, epsilon in zip(runs, (0.4641288833613, *(2.0 for _ in runs)), strict=False):
        plain = run / "config.toml"
        plain.write_text(plain.read_text() + f'[privacy]\nepsilon = {epsilon}\ndelta = 1e-5\ntrust = "central"\n')
    (tmp_path / "trials.csv").write_text("trial,status,method.alpha,reason\nleft,left,0.0464158883361,\n")
    study = load_study(tmp_path)
    assert set(study.runs["privacy"]) == {"central trust, ε ≤ 0.4642", "central trust, ε ≤ 2"}
    assert {type(value) for value in study.trials["method.alpha"]} == {float}
    page = write_report(tmp_path, tmp_path / "report")
    before, _, embedded = page.read_text().partition('<script type="application/json" id="data">')
    data = json.loads(embedded.partition("</script>")[0])
    assert "0.046415888" in json.dumps(data.pop("tables"))
    figures = [file.read_text() for file in (page.parent / "figures").glob("*.svg")]
    shown = " ".join([before, json.dumps(data), *figures])
    assert "0.0464158" not in shown
    assert "0.46412" not in shown
    assert all(text in shown for text in ("0.04642", "0.2154", "0.00100001", "0.00100002"))
    assert "0.04641588834" in (page.parent / "tables" / "heat_maps.csv").read_text()
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, runs)])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "0.0464158" not in printed
    assert all(text in printed for text in ("0.04642", "0.00100001", "0.00100002", "0.4642"))
    assert "0.0464158883361" in compare_runs(runs).to_csv()


def test_an_expected_cohort_is_that_of_the_account_and_of_the_schedule(tmp_path: Path) -> None:
    devices: dict[str, Any] = {"devices": DEVICES["devices"], "schedule": {"kind": "fedbuff", "buffer_size": 4}}
    devices["schedule"]["concurrency"] = 8
    run_trial(tmp_path / "free", fedavg(1.0), rounds=1, **devices)
    run_trial(tmp_path / "private", fedavg(1.0), rounds=1, privacy={"epsilon": 8.0, "trust": "central"}, **devices)
    assert load_study(tmp_path).runs["cohort_size"].tolist() == [4.0, 4.0]
    (tmp_path / "private" / "privacy.json").unlink()
    for run in ("free", "private"):
        directory = RunDirectory(tmp_path / run)
        older = directory.read_json("summary.json")
        assert older.pop("expected_cohort") == 4.0
        directory.write_json("summary.json", older)
    assert load_study(tmp_path).runs["cohort_size"].tolist() == [4.0, 4.0], "from the config"


def test_costs_of_hidden_cohorts_are_read_beside_those_that_are_released(tmp_path: Path) -> None:
    hidden = {"cohort": {"sampling": "poisson", "probability": 0.5}, "privacy": {**CENTRAL, "epsilon": 8.0}}
    run_trial(tmp_path / "hidden", fedavg(1.0), rounds=1, **hidden, **DEVICES)
    run_trial(tmp_path / "public", fedavg(1.0), rounds=1, **DEVICES)
    run_trial(tmp_path / "without", fedavg(1.0), rounds=1)
    runs = load_study(tmp_path).runs.set_index("run")
    wanted = {run: RunDirectory(tmp_path / run).rows(f"{file}.jsonl")[-1]["bytes_up"]
              for run, file in (("hidden", "diagnostics"), ("public", "rounds"))}  # fmt: skip
    assert runs.loc[["hidden", "public"], "bytes_up"].to_dict() == wanted
    assert runs["simulated_seconds"].notna().to_dict() == {"hidden": True, "public": True, "without": False}
    assert runs["hidden"].to_dict() == {"hidden": True, "public": False, "without": False}


def test_a_checksum_of_the_data_is_read_where_it_lies(tmp_path: Path) -> None:
    for name, data in (("a", "1"), ("b", "2")):
        RunDirectory(record(tmp_path / name)).write_json("diagnostics.json", {"data_fingerprint": data})
    with pytest.raises(UserError, match="different data"):
        load_study(tmp_path)


def test_scores_that_no_epsilon_covers_are_marked_on_the_page_and_in_its_tables(tmp_path: Path) -> None:
    privacy = {"epsilon": 8.0, "trust": "central"}
    record(tmp_path / "runs" / "covered", privacy=privacy)
    page = write_report(tmp_path / "runs", tmp_path / "one").read_text()
    assert "not covered" not in page
    assert "not_covered" not in (tmp_path / "one" / "tables" / "best.csv").read_text()
    marks = {"not_covered": ["test_accuracy", "test_loss"]}
    record(tmp_path / "runs" / "within", privacy=privacy, summary=marks, method=fedavg(0.5))
    page = write_report(tmp_path / "runs", tmp_path / "two").read_text()
    for text in ("test accuracy (not covered), %", "test loss (nats) (not covered)", "No epsilon covers these scores"):
        assert text in page, text
    assert "validation accuracy (not covered)" not in page
    for name in ("best", "settings", "trials", "privacy"):
        table = pd.read_csv(tmp_path / "two" / "tables" / f"{name}.csv")
        assert "test_accuracy, test_loss" in set(table["not_covered"]), name


def test_runs_of_one_setting_and_seed_with_other_data_are_refused(tmp_path: Path) -> None:
    for name, data in (("a", "1"), ("b", "1"), ("c", None)):
        record(tmp_path / name, summary={"data_fingerprint": data})
    assert len(load_study(tmp_path).runs) == 3
    record(tmp_path / "another seed", summary={"data_fingerprint": "2"}, seed=2)
    record(tmp_path / "another method", summary={"data_fingerprint": "2"}, method=fedavg(0.5))
    assert len(load_study(tmp_path).runs) == 5
    record(tmp_path / "d", summary={"data_fingerprint": "2"})
    with pytest.raises(UserError, match="a and d: expected one setting and seed with the same data"):
        load_study(tmp_path)


def test_checksums_of_two_versions_are_not_compared(tmp_path: Path) -> None:
    for name, data in (("old", "0badc0de"), ("new", 64 * "0")):
        record(tmp_path / name, summary={"data_fingerprint": data})
    assert len(load_study(tmp_path).runs) == 2


def test_people_are_never_shown_a_smaller_epsilon(tmp_path: Path) -> None:
    run = record(tmp_path / "a", plan={"epsilon": 1.00001})
    assert list(compare_runs([run]).loc["epsilon"]) == [1.001]
    shown = RoundProgress(3)
    for epsilon, words in ((1.00001, "eps 1.001"), (0.0, "eps 0"), (float("inf"), "eps inf")):
        shown({"round": 1, "epsilon": epsilon}, {})
        assert shown._description() == words
    shown.__exit__(None, None, None)
    without = RoundProgress(3)
    without({"round": 1, "epsilon": None}, {"clients_per_second": 0.0})
    assert without._description() == ""
    without.__exit__(None, None, None)
    assert list(compare_runs([record(tmp_path / "b", plan={"epsilon": None})]).loc["epsilon"]) == [None]


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (0.0, ""),
        (0.003, "333 s/client"),
        (1 / 30.33, "30 s/client"),
        (0.4, "2.5 s/client"),
        (1.0, "1.0 clients/s"),
        (12345.6, "12346 clients/s"),
    ],
)
def test_a_slow_run_has_a_speed_and_none_has_no_zero(rate: float, words: str) -> None:
    assert pace(rate) == words


def test_the_report_marks_every_figure_that_only_a_simulation_has(tmp_path: Path) -> None:
    """Costs of hidden cohorts, and client heterogeneity; the same costs of public cohorts are not marked."""
    differ = {"label_distance", "gradient_distance"}
    words = "not released: seen in simulation only, computed from data that are not private"
    hidden = {"cohort": {"sampling": "poisson", "probability": 0.5}, "privacy": {**CENTRAL, "epsilon": 8.0}}
    for name, tables in (("hidden", hidden), ("public", {})):
        for rounds, concentration in ((1, 0.1), (3, 0.1), (1, 10.0)):
            out = tmp_path / name / f"{rounds} {concentration}"
            out.parent.mkdir(exist_ok=True)
            run_trial(out, fedavg(1.0), rounds=rounds, data={"concentration": concentration}, **tables, **DEVICES)
        page = write_report(tmp_path / name, tmp_path / f"{name} report")
        text, files = page.read_text(encoding="utf-8"), page.parent / "tables"
        figure = {part.split('"')[0]: part.split("</figure>")[0] for part in text.split('<figure data-figure="')[1:]}
        marked = {key for key, part in figure.items() if words in part}
        assert differ | {"simulated_time", "bytes"} <= figure.keys()
        assert marked == (differ | {"simulated_time", "bytes"} if name == "hidden" else differ)
        for key, part in figure.items():
            axis = (page.parent / "figures" / f"{key}.svg").read_text()
            assert ("(not released)" in axis) == (part.count("(not released)</th>") == 1) == (key in marked), key
        options = [part.split("<")[0] for part in text.split('<option value="simulated_seconds"')[1:]]
        assert ["(not released)" in option for option in options] == [name == "hidden"]
        for table in ("settings", "best", "trials", "curves"):
            columns = set(pd.read_csv(files / f"{table}.csv").columns)
            costs = {"simulated_seconds", "bytes"} & {c.removeprefix("not_released.") for c in columns}
            assert costs
            assert {c in columns for c in costs} == {name == "public"}
            assert not any(c.startswith("heterogeneity.") for c in columns)


def test_curves_round_epsilon_up(tmp_path: Path) -> None:
    run_trial(tmp_path / "a", fedavg(1.0), rounds=3, privacy={**CENTRAL, "epsilon": 8.0})
    page = write_report(tmp_path, tmp_path / "report").read_text(encoding="utf-8")
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    shown = data["curves"][0]["values"]["epsilon"]
    spent = [row["epsilon"] for row in RunDirectory(tmp_path / "a").rows("rounds.jsonl")]
    assert shown == [float(rounded_up(epsilon)) for epsilon in spent]
    assert all(a >= b - 1e-9 for a, b in zip(shown, spent, strict=True))
