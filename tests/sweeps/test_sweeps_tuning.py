"""Tuning sweeps: draws, secrecy, selection and privacy cost."""

import hashlib
import json
from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from support.helpers import FALSE_ALARM
from support.natural_clients import KINDS, write_hospitals

from fedpriv.cli import main
from fedpriv.errors import UserError
from fedpriv.experiment.build import assemble, make_federation, task_of
from fedpriv.experiment.config import load_config
from fedpriv.experiment.results import load_model
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.mechanisms.gaussian import release_grid
from fedpriv.privacy.tuning import PoissonTrials, ScoreNoise, tuning_epsilon
from fedpriv.report.spent import spent_below
from fedpriv.report.study import load_study
from fedpriv.report.words import about_choice, about_cost
from fedpriv.streams import Purpose, SeededStreams, SystemStreams
from fedpriv.sweeps.config import load_sweep
from fedpriv.sweeps.jobs import Began, Ended, Job, call
from fedpriv.sweeps.run import run_sweep
from fedpriv.sweeps.trial import Tracking
from fedpriv.sweeps.tuning import Tuning, about_tuning, choose_best, common_plan, draw_trials
from fedpriv.sweeps.tuning_score import UNITS, streams_of, sum_of_scores, with_noise

BASE = """
name = "base"
seed = 1
[data]
name = "digits"
clients = 6
validation = 0.2
[model]
name = "softmax"
[cohort]
sampling = "poisson"
probability = 0.5
[method]
name = "dp-fedavg"
clip_norm = 1.0
server_lr = 0.5
[privacy]
epsilon = 5.0
[training]
rounds = 2
"""
AXIS = '[[axis]]\nkey = "method.server_lr"\nvalues = [0.1, 1.0]\n'
TUNING = '[tuning]\ndistribution = "geometric"\nexpected_trials = 4\nseed = 6\n'
SHIPPED = Path(__file__).parents[2] / "sim_configs" / "sweeps" / "tuning.toml"


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_by_one(jobs: Iterable[Job], at_once: int, *, threads: int) -> Generator[Began | Ended | None]:
        del at_once, threads
        for job in jobs:
            yield Began(job.name)
            yield Ended(job.name, call(job.function, job.arguments))

    monkeypatch.setattr("fedpriv.sweeps.local_jobs.side_by_side", one_by_one)
    monkeypatch.setattr("fedpriv.experiment.recorder.plot_curves", lambda *_, **__: None)


def sweep_file(folder: Path, text: str = AXIS + TUNING, base: str = BASE) -> Path:
    (folder / "base.toml").write_text(base)
    path = folder / "sweep.toml"
    path.write_text(f'name = "s"\nbase = "base.toml"\n{text}')
    return path


def cohorts(experiment: Any) -> list[bytes]:
    server = experiment.server
    return [server.sampling.cohort(server.streams.source(Purpose.COHORT, n)).tobytes() for n in range(1, 40)]


def noise(experiment: Any) -> bytes:
    return experiment.server.streams.source(Purpose.SERVER_NOISE, 1).words(4).tobytes()


def test_a_setting_that_is_drawn_twice_has_the_same_data_and_neither_noise_nor_cohorts(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path))
    grid = sweep.trials()
    first, other, again = (assemble(sweep.drawn(0, draw, grid).config) for draw in (3, 4, 3))
    assert noise(first) == noise(again) != noise(other)
    assert cohorts(first) == cohorts(again) != cohorts(other)
    assert np.array_equal(first.initial_model, other.initial_model)
    assert first.population.federation.fingerprint == other.population.federation.fingerprint


def test_an_experiment_outside_a_tuning_keeps_its_digest_and_its_cohorts(tmp_path: Path) -> None:
    trial = load_sweep(sweep_file(tmp_path, AXIS)).trials()[0]
    assert "draw" not in trial.config.tables["privacy"]
    experiment = assemble(trial.config)
    plain = SeededStreams(trial.config.seed, "another")
    assert cohorts(experiment)[0] == experiment.server.sampling.cohort(plain.source(Purpose.COHORT, 1)).tobytes()


def test_trials_are_drawn_uniformly_with_replacement_under_numbers_without_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, draws, first = [], [], load_sweep(sweep_file(tmp_path))
    grid, tuning = first.trials(), first.tuning
    assert tuning is not None
    for seed in range(300):
        sweep = replace(first, tuning=replace(tuning, seed=seed))
        monkeypatch.setattr(RunDirectory, "write_json", lambda *_: None)
        rows = draw_trials(sweep, grid, RunDirectory(tmp_path), begun=False)
        places += [row["place"] for row in rows]
        draws += [[row["draw"] for row in rows]]
    assert len(places) / 300 == pytest.approx(4.0, rel=0.15)
    assert np.mean(places) == pytest.approx(0.5, abs=0.06)
    everything = [draw for row in draws for draw in row]
    assert len(set(everything)) == len(everything)
    ends = np.array([(row[0], row[-1]) for row in draws if len(row) > 1])
    assert np.mean(ends[:, 0] < ends[:, 1]) == pytest.approx(0.5, abs=0.12)


def test_without_a_seed_the_operating_system_draws(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path, AXIS + TUNING.replace("seed = 6\n", "")))
    rows = []
    for name in "ab":
        (tmp_path / name).mkdir()
        rows.append(draw_trials(sweep, sweep.trials(), RunDirectory(tmp_path / name), begun=False))
    assert rows[0] != rows[1]


def test_a_tuning_keeps_its_trials_secret_and_says_what_the_selection_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, path = tmp_path / "out", sweep_file(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(path), "--out", str(out), "--jobs", "1"])
    assert not ended.value.code
    modes = {name: (out / name).stat().st_mode & 0o777 for name in ("trials", "drawn.json", "trials.csv")}
    assert modes == {"trials": 0o700, "drawn.json": 0o600, "trials.csv": 0o600}
    chosen, table = json.loads((out / "tuning.json").read_text()), pd.read_csv(out / "trials.csv")
    assert len(table) == len(json.loads((out / "drawn.json").read_text())["trials"]) > 2
    scores = dict(zip(table["trial"], table["validation_accuracy"], strict=True))
    assert scores[chosen["selected"]] == max(scores.values()) == chosen["score"]
    assert 4.99 < chosen["epsilon_of_one_trial"] <= 5.0 < chosen["epsilon"] < 15.0
    assert "(epsilon, delta) of the tuning: (" in capsys.readouterr().out
    assert "tuning.json" in (out / "trials" / chosen["selected"] / "privacy.txt").read_text()
    assert "expected_trials" in chosen
    assert str(len(table)) not in {str(value) for key, value in chosen.items() if key != "expected_trials"}

    (group,) = spent_below(out)
    assert [run.state for run in group.runs] == ["tuning"]
    assert group.total.epsilon == chosen["epsilon"]

    study = load_study(out)
    assert study.runs["privacy"].nunique() == 1
    settings = pd.DataFrame({"privacy": ["p"], "seeds": [1]})
    words = " ".join(about_choice(study, settings, settings, "validation"))
    assert chosen["selected"] in words
    assert "of the tuning: (" in words
    assert "Tuning is not free" not in words
    assert about_cost(study)

    before = (out / "drawn.json").read_bytes()
    monkeypatch.setattr("fedpriv.sweeps.run.run_trial", None)
    run_sweep(load_sweep(path), out, resume=True)
    assert (out / "drawn.json").read_bytes() == before
    for text in (AXIS.replace("1.0", "2.0") + TUNING, AXIS + TUNING.replace("6", "7"), AXIS):
        with pytest.raises(UserError, match="another"):
            run_sweep(load_sweep(sweep_file(tmp_path, text)), out, resume=True)


def test_trials_are_written_down_before_the_first_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        assert len(json.loads((tmp_path / "out" / "drawn.json").read_text())["trials"]) > 2
        raise KeyboardInterrupt

    monkeypatch.setattr("fedpriv.sweeps.local_jobs.side_by_side", killed)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(load_sweep(sweep_file(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out" / "tuning.json").exists()


def test_trials_that_were_not_drawn_are_no_part_of_a_tuning(tmp_path: Path) -> None:
    (tmp_path / "out" / "trials" / "one").mkdir(parents=True)
    with pytest.raises(UserError, match=r"drawn\.json"):
        run_sweep(load_sweep(sweep_file(tmp_path)), tmp_path / "out", resume=True)


def test_a_failed_trial_is_the_worst_and_equal_ones_are_taken_in_the_order_drawn(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path))
    grid, tuning = sweep.trials(), sweep.tuning
    assert tuning is not None
    plan, trials = common_plan(sweep, grid, None), {name: sweep.drawn(0, n, grid) for n, name in enumerate("abc")}
    table = pd.DataFrame({"trial": list("abc"), "status": ["failed", "done", "done"], "s": [None, 0.5, 0.5]})
    assert choose_best(tuning, plan, "s", trials, table)["selected"] == "b"
    table["s"] = [None, 0.0, 0.1]
    assert choose_best(tuning, plan, "s", trials, table)["selected"] == "c"
    table["status"] = "failed"
    nothing = choose_best(tuning, plan, "s", trials, table)
    assert nothing["selected"] is None
    assert nothing["epsilon"] > plan.epsilon


@pytest.mark.parametrize(
    ("text", "base", "what"),
    [
        ('[stop]\nrule = "median"\n', {}, r"\[stop\]"),
        ("[[axis]]\nkey = 'privacy.epsilon'\nvalues = [1.0]\n", {}, r"privacy\.epsilon"),
        ("[[axis]]\nkey = 'training.rounds'\nvalues = [1]\n", {}, r"training\.rounds"),
        ("[[axis]]\nkey = 'cohort.probability'\nvalues = [0.1]\n", {}, r"cohort\.probability"),
        ("[[axis]]\nkey = 'data.clients'\nvalues = [5]\n", {}, r"data\.clients"),
        ("[[axis]]\nkey = 'seed'\nvalues = [5]\n", {}, "seed"),
        ("", {"epsilon = 5.0": 'epsilon = 5.0\ntrust = "local"'}, "local"),
        ("", {"epsilon = 5.0": "noise_multiplier = 0.0"}, "expected private trials"),
        ("", {"[privacy]\nepsilon = 5.0": ""}, r"\[privacy\]"),
        ("", {"epsilon = 5.0": "epsilon = 5.0\ndraw = 3"}, r"privacy\.draw"),
        ("", {"epsilon = 5.0": 'epsilon = 5.0\nanalyses = ["the analysis a"]\nanalyses_mu = 0.5'}, "without analyses"),
    ],
)
def test_what_would_break_the_promise_of_a_tuning_is_refused(
    tmp_path: Path, text: str, base: dict[str, str], what: str
) -> None:
    changed = BASE
    for old, new in base.items():
        changed = changed.replace(old, new)
    sweep = load_sweep(sweep_file(tmp_path, AXIS + text + TUNING, changed))
    with pytest.raises(UserError, match=what):
        run_sweep(sweep, tmp_path / "out")
    assert not (tmp_path / "out" / "drawn.json").exists()


@pytest.mark.parametrize("options", [{"retry": True, "resume": True}, {"tracking": Tracking(["tensorboard"])}])
def test_options_that_would_show_or_repeat_trials_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="tuning"):
        run_sweep(load_sweep(sweep_file(tmp_path)), tmp_path / "out", **options)


def test_a_score_on_clients_examples_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fedpriv.experiment.config import DataChoice
    from fedpriv.privacy import DataFacts

    for facts in (DataFacts(clients="natural", test="within"), DataFacts(clients="natural", validation="clients")):
        monkeypatch.setattr(DataChoice, "facts", facts)
        with pytest.raises(UserError, match="public examples"):
            run_sweep(load_sweep(sweep_file(tmp_path)), tmp_path / "out")


# Scores with noise

OF_CLIENTS = BASE.replace('name = "digits"\nclients = 6', 'name = "heart-disease"\npartition = "natural"')
NOISED = f"{AXIS}{TUNING}score_noise_multiplier = 2.5\n"
UNSEEDED = NOISED.replace("seed = 6\n", "").replace("expected_trials = 4", "expected_trials = 9")


def of_clients(folder: Path, text: str = NOISED, test: str = "within") -> tuple[Any, Path]:
    root = folder / "data"
    if not root.exists():
        write_hospitals(root, KINDS["heart-disease"].held())
    base = OF_CLIENTS.replace("validation = 0.2", f'validation = 0.3\ntest = "{test}"')
    return load_sweep(sweep_file(folder, text, base)), root


@pytest.mark.parametrize(("test", "clients"), [("within", 4), ("clients", 1)])
def test_a_noised_score_selects_and_is_all_that_is_said_of_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], test: str, clients: int
) -> None:
    (sweep, root), out = of_clients(tmp_path, test=test), tmp_path / "out"
    file = tmp_path / "sweep.toml"
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(file), "--out", str(out), "--jobs", "1", "--data-root", str(root)])
    assert not ended.value.code
    said = capsys.readouterr().out
    kept, chosen = (json.loads((out / name).read_text()) for name in ("scores.json", "tuning.json"))
    assert (out / "scores.json").stat().st_mode & 0o777 == 0o600
    scores = kept["scores"]
    assert chosen["score"] == scores[chosen["selected"]] == max(scores.values())
    assert (chosen["by"], chosen["score_clients"]) == ("noised_validation_accuracy", clients)
    assert chosen["score_noise_stddev"] == 2.5 / clients
    plan = common_plan(sweep, sweep.trials(), root)
    noise, count = ScoreNoise(multiplier=2.5), sweep.tuning.count
    assert chosen["epsilon"] == tuning_epsilon(plan, count, noise) > tuning_epsilon(plan, count)
    assert f"by noised_validation_accuracy {chosen['score']:.4f}" in said
    assert "which the epsilon of the tuning includes" in said
    assert "every score without noise on clients' examples" in chosen["condition"]
    assert spent_below(out)[0].total.epsilon == chosen["epsilon"]

    bare = []
    for name in scores:
        config = load_config(out / "trials" / name / "config.toml")
        federation = make_federation(config, root)
        task, data = task_of(config, federation, "cpu"), federation.dataset
        assert data.validation_inputs is not None
        assert data.validation_labels is not None
        assert data.validated is not None
        model = task.layout.flatten(load_model(out / "trials" / name))
        total = sum_of_scores(task, model, data.validation_inputs, data.validation_labels, data.validated)
        bare.append(total / UNITS / clients)
        summary = json.loads((out / "trials" / name / "summary.json").read_text())
        assert ("validation_accuracy" in summary.get("not_covered", ())) == (test == "within")
    moved = np.array(list(scores.values())) - np.array(bare)
    assert len(moved) > 2
    assert np.all(np.abs(moved) > 1e-6)
    assert len(set(np.round(moved, 6))) == len(moved)
    assert all((score * clients / release_grid(2.5)).is_integer() for score in scores.values())
    assert not any(f"{score:.4f}" in said for score in [*bare, *scores.values()] if score != chosen["score"])


@pytest.mark.parametrize("source", [SeededStreams(3, "a"), SystemStreams()], ids=["seeded", "system"])
def test_the_noise_of_scores_has_the_deviation_that_is_accounted(source: Any) -> None:
    noise, clients, total = ScoreNoise(multiplier=3.0), 7, 4 * UNITS + 123
    found = [with_noise(total, clients, noise, source.source(Purpose.SCORE_NOISE, client=n)) for n in range(4000)]
    moved = (np.array(found) * clients - total / UNITS) / 3.0
    rounding = (release_grid(3.0) / 3.0) ** 2 / 12.0
    assert abs(moved.mean()) < stats.norm.isf(FALSE_ALARM / 2) * np.sqrt((1.0 + rounding) / len(moved))
    tails = stats.chi2.isf([1.0 - FALSE_ALARM / 2, FALSE_ALARM / 2], len(moved)) / len(moved)
    assert tails[0] < np.mean(moved**2) / (1.0 + rounding) < tails[1]


def test_scores_have_streams_of_their_own_tuning_or_of_the_operating_system() -> None:
    def drawn(seed: int | None, tuning: str, place: int) -> bytes:
        return streams_of(seed, tuning).source(Purpose.SCORE_NOISE, client=place).words(2).tobytes()

    assert drawn(1, "a", 0) == drawn(1, "a", 0)
    assert len({drawn(1, "a", 0), drawn(1, "a", 1), drawn(2, "a", 0), drawn(1, "b", 0)}) == 4
    assert drawn(None, "a", 0) != drawn(None, "a", 0)


def test_scores_are_drawn_once_however_often_a_tuning_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sweep, root), out = of_clients(tmp_path, UNSEEDED), tmp_path / "out"
    folder = RunDirectory(out)
    out.mkdir()
    trials = draw_trials(sweep, sweep.trials(), folder, begun=False)
    while len(trials) < 3:
        (out / "drawn.json").unlink()
        trials = draw_trials(sweep, sweep.trials(), folder, begun=False)
    calls = []

    def killed_at_the_second(*arguments: Any) -> float:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return with_noise(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("fedpriv.sweeps.tuning_score.with_noise", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(sweep, out, data_root=root)
    (first,) = folder.read_json("scores.json")["scores"].items()
    assert not (out / "tuning.json").exists()
    run_sweep(sweep, out, data_root=root, resume=True)
    whole, chosen = (out / "scores.json").read_bytes(), (out / "tuning.json").read_bytes()
    scores = json.loads(whole)["scores"]
    assert scores[first[0]] == first[1]
    assert len(scores) == len(trials)
    (out / "tuning.json").unlink()
    for _ in range(2):
        run_sweep(sweep, out, data_root=root, resume=True)
        assert ((out / "scores.json").read_bytes(), (out / "tuning.json").read_bytes()) == (whole, chosen)
    (out / "scores.json").unlink()
    with pytest.raises(UserError, match=r"scores\.json.*missing"):
        run_sweep(sweep, out, data_root=root, resume=True)
    assert not (out / "scores.json").exists()
    with pytest.raises(UserError, match="another"):
        run_sweep(of_clients(tmp_path, UNSEEDED.replace("2.5", "9.0"))[0], out, data_root=root, resume=True)


def test_noise_is_for_scores_on_clients_examples_and_only_for_those(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path, NOISED))
    with pytest.raises(UserError, match=r"^tuning\.score_noise_multiplier: expected no value with public validation"):
        run_sweep(sweep, tmp_path / "out")
    for test in ("within", "clients"):
        bare, root = of_clients(tmp_path, AXIS + TUNING, test)
        with pytest.raises(UserError, match=r"Set tuning\.score_noise_multiplier"):
            run_sweep(bare, tmp_path / "out", data_root=root)
    for wrong in ("0", "-1.0", "nan", '"much"'):
        with pytest.raises(UserError, match=r"tuning\.score_noise_multiplier"):
            load_sweep(sweep_file(tmp_path, NOISED.replace("2.5", wrong)))


def test_where_every_trial_fails_there_is_no_score_to_speak_of(tmp_path: Path) -> None:
    sweep, root = of_clients(tmp_path)
    assert sweep.tuning is not None
    table = pd.DataFrame({"trial": ["a"], "status": ["failed"], "s": [None]})
    chosen = choose_best(sweep.tuning, common_plan(sweep, sweep.trials(), root), "s", {}, table)
    assert chosen["selected"] is chosen["score"] is chosen["score_clients"] is None
    assert "over clients" in about_tuning(chosen)[1]


def test_a_tuning_without_noised_scores_goes_on_as_it_was_drawn_before_there_were_any(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path))
    draw_trials(sweep, sweep.trials(), RunDirectory(tmp_path), begun=False)
    tuning = {"distribution": "geometric", "expected_trials": 4.0, "eta": None, "seed": 6}
    tables = json.dumps([tuning, [trial.tables for trial in sweep.trials()]], sort_keys=True)
    assert RunDirectory(tmp_path).read_json("drawn.json")["digest"] == hashlib.sha256(tables.encode()).hexdigest()


def test_eta_is_for_the_negative_binomial_alone() -> None:
    assert Tuning(distribution="negative-binomial", expected_trials=3.0, eta=0.5).count.expected == 3.0
    for distribution, eta in (("geometric", 1.0), ("poisson", 0.0), ("negative-binomial", None)):
        with pytest.raises(UserError, match=r"tuning\.eta"):
            Tuning(distribution=distribution, expected_trials=3.0, eta=eta)  # pyright: ignore[reportArgumentType]


def test_no_trial_at_all_is_an_outcome_of_poisson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load_sweep(sweep_file(tmp_path, AXIS + TUNING.replace("geometric", "poisson").replace("4", "1")))
    assert sweep.tuning is not None
    with monkeypatch.context() as patched:
        patched.setattr(PoissonTrials, "quantile", lambda *_: 0)
        with pytest.raises(UserError, match="a draw of 0 trials"):
            run_sweep(sweep, tmp_path / "out")
    with pytest.raises(UserError, match="a draw of 0 trials"):  # The draw is kept.
        run_sweep(sweep, tmp_path / "out", resume=True)


def test_the_shipped_tuning_is_one() -> None:
    sweep = load_sweep(SHIPPED)
    assert sweep.tuning is not None
    assert common_plan(sweep, sweep.trials(), None).epsilon <= 8.0
