"""The report's page: built only from the runs, reproducible, and safe for any run names."""

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.report_runs import CENTRAL, HOSTILE, LONG, fedavg, large_study, run_trial, wide_study

from fedpriv import load_results, write_report
from fedpriv.cli import main
from fedpriv.errors import UserError
from fedpriv.report.figures import COLORS
from fedpriv.report.study import load_study
from fedpriv.report.write import MAX_CURVES, MAX_POINTS, report_on

pytestmark = pytest.mark.xdist_group("report")


class Elements(HTMLParser):
    """Counts a page's elements, and collects its scripts and the targets of its attributes."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.named: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.named += [(key, value or "") for key, value in attrs if key in ("src", "href", "xlink:href", "srcset")]
        self.named += [(key, value or "") for key, value in attrs if key.startswith("on")]
        self.ids += [value or "" for key, value in attrs if key == "id"]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and data.strip():
            self.scripts.append(data)


def data_of(page: Path) -> dict[str, Any]:
    return json.loads(Elements(page).scripts[0])


def test_the_same_runs_give_the_same_bytes(study_folder: Path, page: Path, tmp_path: Path) -> None:
    again = write_report(study_folder, tmp_path / "again").parent
    files = sorted(file.relative_to(again) for file in again.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(page.parent) for file in page.parent.rglob("*") if file.is_file())
    assert len(files) > 15
    for file in files:
        assert (again / file).read_bytes() == (page.parent / file).read_bytes(), file


def test_the_page_names_nothing_outside_itself(page: Path) -> None:
    elements = Elements(page)
    assert {key for key, _ in elements.named} <= {"href", "xlink:href"}
    assert all(value.startswith("#") or value == "data:," for _, value in elements.named)
    assert not {"img", "iframe", "object", "embed", "base", "form"} & set(elements.tags)
    assert len(elements.ids) == len(set(elements.ids))
    inside = {value[1:] for key, value in elements.named if value.startswith("#")}
    assert inside <= set(elements.ids)
    text = page.read_text(encoding="utf-8")
    assert "@import" not in text
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", text))
    digest = base64.b64encode(hashlib.sha256(elements.scripts[-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


def test_names_and_reasons_are_text_and_never_markup(page: Path) -> None:
    elements = Elements(page)
    assert elements.tags.count("script") == 2
    assert not {"img", "b", "i"} & set(elements.tags)
    text = page.read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;") in text
    assert "expected &lt;i&gt;fewer&lt;/i&gt;&lt;/script&gt;&lt;b&gt;, got 1e9" in text


def test_every_trial_is_told_and_failed_ones_with_their_reason(study_folder: Path, page: Path) -> None:
    trials = pd.read_csv(page.parent / "tables" / "trials.csv")
    done = load_results(study_folder)["run"].nunique()
    assert trials["status"].value_counts().to_dict() == {"done": done, "failed": 2, "left": 1}
    failed = pd.read_csv(page.parent / "tables" / "failed.csv", keep_default_na=False)
    assert failed["trial"].tolist() == ["0badc0ffee00", ""]
    assert [reason.partition(":")[0] for reason in failed["reason"]] == ["data.clients", "method.server_lr"]
    assert f"{done + 3} trials: {done} done, 2 failed, 1 not finished." in page.read_text(encoding="utf-8")


def test_means_on_the_page_are_those_of_the_records(study_folder: Path, page: Path) -> None:
    rounds = load_results(study_folder)
    last = rounds[rounds["round"] == rounds["training.rounds"]]
    plain = last[last["privacy.epsilon"].isna() & last["devices.kind"].isna() & (last["method.name"] == "alpha-normec")]
    means = plain.groupby(["method.alpha", "method.beta"])["test_accuracy"].mean()
    best = pd.read_csv(page.parent / "tables" / "best.csv")
    mine = best[(best["privacy"] == "not private") & (best["method"] == "alpha-normec")].iloc[0]
    assert mine["test_accuracy_mean"] == pytest.approx(means.max(), abs=1e-7)
    assert (mine["method.alpha"], mine["method.beta"]) == means.idxmax()
    assert f"{100 * means.max():.2f} ±" in page.read_text(encoding="utf-8")


def test_epsilon_is_never_shown_smaller_than_it_is(study_folder: Path, page: Path) -> None:
    truth = load_study(study_folder).runs.groupby("setting")["epsilon"].max()
    for name in ("best", "settings"):
        shown = pd.read_csv(page.parent / "tables" / f"{name}.csv").set_index("setting")["epsilon"].dropna()
        assert len(shown) > 3
        assert (shown >= truth.loc[shown.index] - 1e-9).all()
        assert (shown <= truth.loc[shown.index] * 1.001).all()


def test_each_statement_stands_there_once_with_its_trials(study_folder: Path, page: Path) -> None:
    study, text = load_study(study_folder), page.read_text(encoding="utf-8")
    assert sorted(run for runs in study.statements.values() for run in runs) == sorted(study.runs["run"])
    assert len(study.statements) < len(study.runs) / 2
    assert text.count("Privacy statement for ") == len(study.statements)


def test_the_page_says_what_came_out_and_how_sure_it_is(tmp_path: Path) -> None:
    study = wide_study()
    text = report_on(study, tmp_path / "apart").read_text(encoding="utf-8")
    assert "<h1>4 methods on digits</h1>" in text
    first, second = re.findall(r'<p class="finding">(.*?)</p>', text)
    best = f"{LONG[3]} (server_lr="
    assert first.startswith(f"Not private: {best}")
    assert second.startswith(f"Central trust, ε ≤ 8: {best}")
    assert re.search(rf"next is {LONG[2]} with 80\.\d\d ± 0\.\d\d % \(means of 3 seeds\)", first)
    assert first.endswith("Their ranges over seeds do not overlap.")
    study.runs["test_accuracy"] = 0.5 + 0.1 * (study.runs["seed"] + 0.01 * study.runs["setting"])
    text = report_on(study, tmp_path / "alike").read_text(encoding="utf-8")
    assert "overlap: the order may be chance." in re.findall(r'<p class="finding">(.*?)</p>', text)[0]


def test_the_first_colors_differ_on_both_grounds() -> None:
    """Distances in CIELAB; 2.3 is just noticeable."""
    css = (files("fedpriv.report") / "page" / "report.css").read_text(encoding="utf-8")
    found = re.findall(r"--c(\d): (#\w{6});", css)
    light, dark = ([color for _, color in found[i : i + 10]] for i in (0, 10))
    assert tuple(light) == COLORS
    for colors in (light, dark):
        for count, least in ((4, 45.0), (8, 30.0)):
            pairs = itertools.combinations([lab(color) for color in colors[:count]], 2)
            assert min(float(np.linalg.norm(one - other)) for one, other in pairs) > least


def lab(color: str) -> np.ndarray:
    """Return a color in CIELAB, under daylight."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(matrix @ linear / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_a_figure_is_there_where_its_quantity_varies(page: Path, tmp_path: Path) -> None:
    made = {file.stem for file in (page.parent / "figures").iterdir()}
    assert {file.suffix for file in (page.parent / "figures").iterdir()} == {".png", ".svg"}
    varied = {"epsilon", "label_distance", "cohort_size", "population", "simulated_time", "bytes"}
    assert varied | {"best", "curves", "heat_map_1"} <= made
    run = run_trial(tmp_path / "run", fedavg(1.0), rounds=1)
    alone = write_report(run).parent
    assert alone == run / "report"
    assert {file.stem for file in (alone / "figures").iterdir()} == {"best", "curves"}
    assert "nothing was selected here" in (alone / "report.html").read_text(encoding="utf-8")
    # The report is inside the run directory, and the next report does not mistake it for a run.
    before = (alone / "report.html").read_bytes()
    assert write_report(run).read_bytes() == before


def test_the_page_says_what_chose_and_what_tuning_costs(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "because no run has a validation accuracy. The selection looked at the test data" in text
    assert "Tuning is not free under privacy" in text
    assert "does not include the selection of hyperparameters" in text
    (tmp_path / "trials").mkdir()
    for server_lr in (0.5, 1.0):
        run_trial(tmp_path, fedavg(server_lr), rounds=1, data={"validation": 0.2})
    validated = write_report(tmp_path)
    text = validated.read_text(encoding="utf-8")
    links = [value for key, value in Elements(validated).named if key == "href" and value[0] not in "#d"]
    found = {(validated.parent / link).resolve() for link in links}
    assert found == {folder.resolve() for folder in (tmp_path / "trials").iterdir()}
    assert "<h1>dp-fedavg on digits</h1>" in text
    assert re.search(
        r'<p class="finding">dp-fedavg \(server_lr=\S+\) has a test accuracy of \d+\.\d\d % \(one seed\)', text
    )
    assert "highest validation accuracy after the last round" in text
    assert "Tuning is not free" not in text
    assert "No run here is private" in text
    table = pd.read_csv(validated.parent / "tables" / "settings.csv")
    best = pd.read_csv(validated.parent / "tables" / "best.csv")
    assert best["validation_accuracy_mean"].tolist() == [table["validation_accuracy_mean"].max()]
    asked = write_report(tmp_path, select="test").read_text(encoding="utf-8")
    assert "because that was requested. The selection looked at the test data" in asked


@pytest.mark.slow
def test_a_large_sweep_makes_a_page_of_a_few_megabytes_that_says_what_it_left_out(tmp_path: Path) -> None:
    study = large_study(2000, 90)
    page = report_on(study, tmp_path)
    assert page.stat().st_size < 4e6
    data, text = data_of(page), page.read_text(encoding="utf-8")
    assert len(data["curves"]) == MAX_CURVES
    assert {len(curve["values"]["test_accuracy"]) for curve in data["curves"]} == {MAX_POINTS}
    assert {(curve["values"]["round"][0], curve["values"]["round"][-1]) for curve in data["curves"]} == {(1, 90)}
    assert f"Of 400 settings the page has the curves of {MAX_CURVES}" in text
    assert f"Of up to 90 recorded rounds a curve shows {MAX_POINTS}" in text
    # The best of each is among them, and its points are the means over seeds.
    best = pd.read_csv(tmp_path / "tables" / "best.csv")["setting"]
    kept = {curve["setting"]: curve for curve in data["curves"] if curve["best"]}
    assert sorted(kept) == sorted(best)
    curve = kept[best[0]]
    rows = study.rounds[study.rounds["setting"] == best[0]].groupby("round")["test_accuracy"].mean()
    wanted = rows.loc[curve["values"]["round"]].tolist()
    assert curve["values"]["test_accuracy"] == pytest.approx(wanted, abs=1e-4)
    whole = pd.read_csv(tmp_path / "tables" / "curves.csv")
    assert len(whole) == 400 * 90


def test_what_an_earlier_report_left_goes_and_what_is_others_stays(tmp_path: Path) -> None:
    run = run_trial(tmp_path / "run", fedavg(1.0), rounds=1)
    out = tmp_path / "out"
    for name in ("figures/epsilon.png", "tables/failed.csv", "tables/mine.csv", "notes.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("old")
    write_report(run, out)
    assert not (out / "figures" / "epsilon.png").exists()
    assert not (out / "tables" / "failed.csv").exists()
    assert (out / "tables" / "mine.csv").read_text() == (out / "notes.txt").read_text() == "old"
    with pytest.raises(UserError, match="expected a folder only for the report, got a run directory"):
        write_report(run, run)


@pytest.mark.parametrize(
    "what", ["nothing", "absent", "unfinished", "damaged table", "damaged summary", "select", "file"]
)
def test_a_mistake_is_exit_2_and_one_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, options = tmp_path / "in", []
    folder.mkdir()
    if what not in ("nothing", "absent"):
        run = run_trial(folder, fedavg(1.0), rounds=1, privacy={**CENTRAL, "epsilon": 8.0})
        if what == "unfinished":
            (run / "summary.json").unlink()
        elif what == "damaged table":
            (folder / "trials.csv").write_text("a,b\n1,2\n")
        elif what == "damaged summary":
            (run / "summary.json").write_text("{")
        elif what == "file":
            (tmp_path / "taken").write_text("")
            options = ["--out", str(tmp_path / "taken")]
        else:
            options = ["--select", "best"]
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(folder / "absent" if what == "absent" else folder), *options])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.rglob("report.html"))


def test_the_command_says_where_things_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_trial(tmp_path / "run", fedavg(1.0), rounds=1)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run), "--out", str(tmp_path / "out"), "--select", "test"])
    assert ended.value.code == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert all(Path(lines[name]).exists() for name in ("page", "figures", "tables"))
