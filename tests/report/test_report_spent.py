"""The total privacy cost of runs on the same clients: grouping, composition, and the charged rounds."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from fedpriv.cli import main
from fedpriv.errors import UserError
from fedpriv.experiment.config import Config, load_config
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import Checkpoint, RunDirectory
from fedpriv.experiment.watching import StopRun
from fedpriv.privacy import Everyone, make_plan, read_plan
from fedpriv.report.spent import Group, notes_on, spent_below
from fedpriv.sweeps.tuning import Tuning, choose_best

QUICKSTART = Path(__file__).parents[2] / "sim_configs" / "quickstart.toml"
NOISE = ["privacy.epsilon=", "privacy.noise_multiplier=3.0"]
POISSON = ["cohort.sampling=poisson", "cohort.probability=0.3"]
LOCAL = ["privacy.trust=local", "privacy.adjacency=replace"]
NATURAL = ["data=", "data.name=mnist-by-writer", "data.partition=natural"]


def config(*settings: str) -> Config:
    return load_config(QUICKSTART, ["data.clients=12", "training.rounds=6", *NOISE, *settings])


def record(folder: Path, *settings: str, released: int | None = None, population: int = 12) -> RunDirectory:
    """Write the files of a run, finished or killed after `released` rounds, without running it."""
    experiment, directory = config(*settings), RunDirectory(folder)
    folder.mkdir(parents=True)
    directory.claim(experiment.to_toml(), experiment.digest, resume=False)
    plan = experiment.plan(experiment.cohort.of(population), size=650)
    promise = {"private": False, "trust": None} if plan is None else plan.as_dict()
    directory.write_json("privacy.json", promise)
    for number in range((6 if released is None else released) + 1):
        directory.append("rounds.jsonl", {"round": number, "test_loss": 1.0 / (number + 1)})
    if released is None:
        directory.write_json("summary.json", {"digest": experiment.digest})
    return directory


def only(folder: Path) -> Group:
    (group,) = spent_below(folder)
    return group


def gaussian(mu: float, delta: float = 1e-5) -> float:
    made = make_plan(
        trust="central", sampling=Everyone(3), rounds=1, delta=delta, l2_bound=1.0, noise_multiplier=1.0 / mu
    )
    return made.epsilon


def test_gaussian_runs_on_the_same_clients_compose_to_one_gaussian_mechanism(tmp_path: Path) -> None:
    record(tmp_path / "a")
    record(tmp_path / "deep" / "b", "method.beta=0.2", "privacy.noise_multiplier=2.0")
    total = only(tmp_path).total
    mu = math.sqrt(6 / 3.0**2 + 6 / 2.0**2)
    assert total.composition == "gaussian"
    assert total.mu == pytest.approx(mu)
    assert total.epsilon == pytest.approx(gaussian(mu))
    assert total.delta == 1e-5
    alone = [run.epsilon_after(6) for run in only(tmp_path).runs]
    assert max(alone) < total.epsilon < sum(alone)


def test_runs_with_different_deltas_are_stated_at_the_smallest(tmp_path: Path) -> None:
    record(tmp_path / "a")
    record(tmp_path / "b", "privacy.delta=1e-7")
    total = only(tmp_path).total
    assert total.delta == 1e-7
    assert total.epsilon == pytest.approx(gaussian(math.sqrt(2 * 6 / 9), 1e-7))


def test_one_run_alone_has_spent_what_it_states(tmp_path: Path) -> None:
    directory = record(tmp_path / "a", *POISSON)
    total = only(tmp_path).total
    assert total.epsilon == directory.read_json("privacy.json")["epsilon"]
    assert only(tmp_path / "a").runs[0].name == "a"


def test_a_run_with_hidden_cohorts_makes_the_sum_basic_in_epsilon_and_in_delta(tmp_path: Path) -> None:
    record(tmp_path / "a")
    record(tmp_path / "b", *POISSON, "privacy.delta=1e-6")
    group = only(tmp_path)
    assert group.total.composition == "basic"
    assert group.total.mu is None
    assert group.total.epsilon == pytest.approx(sum(run.epsilon_after(6) for run in group.runs))
    assert group.total.delta == pytest.approx(1.1e-5)


def test_deltas_that_add_up_to_one_promise_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        record(tmp_path / name, *POISSON, "privacy.delta=0.6", f"method.beta=0.{len(name)}{ord(name)}")
    assert only(tmp_path).total.epsilon == math.inf


@pytest.mark.parametrize("change", ["seed=8", "data.clients=13", "data.concentration=0.4", "data.partition=iid"])
def test_runs_on_other_clients_are_another_group_and_said(tmp_path: Path, change: str) -> None:
    more = ["data.concentration="] if change == "data.partition=iid" else []
    record(tmp_path / "a")
    record(tmp_path / "b", change, *more)
    first, second = spent_below(tmp_path)
    assert [[run.name for run in group.runs] for group in (first, second)] == [["a"], ["b"]]
    assert any("other clients" in note for note in notes_on([first, second]))
    assert not any("other clients" in note for note in notes_on([first]))


def test_natural_clients_are_the_same_whatever_the_seed_and_what_is_held_out(tmp_path: Path) -> None:
    for name, change in (("a", ()), ("b", ("seed=8",)), ("c", ("data.clients=5",)), ("d", ("data.validation=0.1",))):
        record(tmp_path / name, *NATURAL, *change)
    assert len(only(tmp_path).runs) == 4


@pytest.mark.parametrize("partition", ["natural", "iid"])
def test_the_folder_of_a_file_that_loads_the_data_makes_no_other_clients_and_no_other_noise(
    tmp_path: Path, partition: str
) -> None:
    text = "def load():\n    return {}\n"
    chosen = [f"data.partition={partition}"] if partition == "natural" else ["data.clients=12"]
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "data.py").write_text(text)
        record(tmp_path / "runs" / place, "data=", f"data.name={tmp_path / place / 'data.py'}:load", *chosen)
    assert only(tmp_path / "runs").total.epsilon < math.inf
    file = tmp_path / "runs" / "there" / "rounds.jsonl"
    file.write_text(file.read_text().replace("0.5", "0.6"))
    assert only(tmp_path / "runs").total.epsilon == math.inf


def test_other_trust_and_adjacency_are_other_promises_on_the_same_clients_and_said(tmp_path: Path) -> None:
    record(tmp_path / "a")
    record(tmp_path / "b", "privacy.adjacency=replace")
    record(tmp_path / "c", *LOCAL)
    groups = spent_below(tmp_path)
    assert [(group.trust, group.adjacency) for group in groups] == [
        ("central", "add-or-remove"),
        ("central", "replace"),
        ("local", "replace"),
    ]
    assert len({group.adversary for group in groups}) == 2
    (said,) = [note for note in notes_on(groups) if "adversary of trust central" in note]
    assert "trust local" in said


def test_runs_with_secure_aggregation_hold_together_against_the_fewest_colluders(tmp_path: Path) -> None:
    sums = [*LOCAL, "privacy.trust=aggregator", "aggregation.least_survivors=8"]
    record(tmp_path / "a", *sums, "aggregation.colluders=3")
    assert not any("colluders" in note for note in notes_on(spent_below(tmp_path)))
    record(tmp_path / "b", *sums, "aggregation.colluders=1", "method.beta=0.2")
    group = only(tmp_path)
    assert group.total.mu == pytest.approx(math.sqrt(2 * 6) / 3.0)
    assert any(note.endswith("colluders: together, at most 1.") for note in notes_on([group]))
    record(tmp_path / "c")
    assert any("also against that of trust aggregator" in note for note in notes_on(spent_below(tmp_path)))


@pytest.mark.parametrize("released", [0, 2, 5])
def test_a_killed_run_is_charged_for_the_rounds_that_it_released(tmp_path: Path, released: int) -> None:
    plan = read_plan(record(tmp_path / "a", released=released).read_json("privacy.json"), "")
    assert plan is not None
    group = only(tmp_path)
    assert group.total.epsilon == plan.epsilon_after(released)
    assert group.planned.epsilon == plan.epsilon
    assert group.as_dict()["runs"][0]["state"] == "unfinished"
    assert any("Unfinished runs" in note for note in notes_on([group]))


def test_a_checkpoint_or_a_torn_row_that_knows_more_rounds_is_believed(tmp_path: Path) -> None:
    directory = record(tmp_path / "a", released=2)
    with directory.file("rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "test')
    assert only(tmp_path).runs[0].rounds == 3
    directory.checkpoint.write("digest", "promise", 4, {"model": torch.zeros(1)}, {})
    assert only(tmp_path).runs[0].rounds == 4
    directory.write_json("summary.json", {})
    assert only(tmp_path).runs[0].rounds == 6


@pytest.mark.parametrize(("settings", "charged"), [((), 2), (LOCAL, 3)])
def test_messages_of_a_turn_that_real_devices_have_begun_are_charged(tmp_path: Path, settings: Any, charged: int):
    directory = record(tmp_path / "a", *settings, released=1)
    directory.append("participation.jsonl", {"round": 2})
    assert only(tmp_path).runs[0].rounds == charged


def test_devices_of_a_deployment_are_the_same_whatever_the_seed(tmp_path: Path) -> None:
    for name, change in (("a", "seed=7"), ("b", "seed=8")):
        record(tmp_path / name, change).append("participation.jsonl", {"round": 6})
    assert len(only(tmp_path).runs) == 2
    assert only(tmp_path).total.composition == "gaussian"


def test_a_run_without_privacy_leaves_its_clients_without_a_bound(tmp_path: Path) -> None:
    record(tmp_path / "a")
    record(tmp_path / "b", *LOCAL)
    record(tmp_path / "c", "seed=8")
    record(tmp_path / "open", "privacy=", released=1)
    groups = spent_below(tmp_path)
    assert [group.total.epsilon == math.inf for group in groups] == [True, True, False]
    assert any("open is not private" in note for note in notes_on(groups))
    table = groups[0].as_dict()
    assert table["epsilon"] is None
    assert table["private"] is False


def test_a_run_without_privacy_that_released_nothing_costs_nothing(tmp_path: Path) -> None:
    record(tmp_path / "a")
    record(tmp_path / "open", "privacy=", released=0)
    assert only(tmp_path).total.epsilon == only(tmp_path).runs[0].epsilon_after(6)


def test_runs_that_failed_before_their_plan_are_one_group_with_words(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    record(tmp_path / "a")
    for number in range(3):
        directory = record(tmp_path / f"dead {number}", f"seed={7 + number}", released=0)
        for name in ("privacy.json", "rounds.jsonl"):
            directory.file(name).unlink()
    alone, early = groups = spent_below(tmp_path)
    assert [run.name for run in alone.runs] == ["a"]
    assert [run.name for run in early.runs] == ["dead 0", "dead 1", "dead 2"]
    assert early.total.epsilon == 0.0
    json.dumps(early.as_dict(), allow_nan=False)
    assert notes_on(groups) == notes_on([alone])
    assert call("privacy", "--spent", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    words = "ended before a privacy plan was recorded; nothing was released or spent:"
    assert f"{words}\n  dead 0\n  dead 1\n  dead 2\n" in shown
    assert "no privacy" not in shown


def test_noise_too_small_to_promise_anything_is_no_bound_either(tmp_path: Path) -> None:
    record(tmp_path / "a")
    record(tmp_path / "b", "privacy.noise_multiplier=0.0")
    assert only(tmp_path).total.epsilon == math.inf
    json.dumps(only(tmp_path).as_dict(), allow_nan=False)


def test_a_copy_of_a_run_is_charged_again_but_shared_noise_with_other_results_has_no_bound(tmp_path: Path) -> None:
    directory = record(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert only(tmp_path).total.mu == pytest.approx(math.sqrt(2 * 6 / 9))
    rows = directory.rows("rounds.jsonl")
    rows[4]["test_loss"] += 1e-9
    directory.file("rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    group = only(tmp_path)
    assert group.total.epsilon == math.inf
    assert any("share their noise" in note for note in notes_on([group]))


def test_runs_of_a_schedule_are_charged_by_their_timeline(tmp_path: Path) -> None:
    from fedpriv.privacy import Scheduled

    directory = record(tmp_path / "a", "privacy.adjacency=replace")
    sampling = Scheduled(12, 4.0, scheme="fedbuff", squares=(1.0, 1.0, 2.0, 2.0, 3.0, 4.0), sent=(1, 1, 2, 2, 3, 4))
    options: dict[str, Any] = {"rounds": 6, "delta": 1e-5, "l2_bound": 1.0, "noise_multiplier": 3.0}
    directory.write_json("privacy.json", make_plan(trust="central", sampling=sampling, **options).as_dict())
    assert only(tmp_path).total.mu == pytest.approx(2.0 / 3.0)
    directory.file("summary.json").unlink()
    directory.keep_rows("rounds.jsonl", 2)
    assert only(tmp_path).total.mu == pytest.approx(2.0 / 3.0)
    assert any("timeline" in note for note in notes_on(spent_below(tmp_path)))


# Tunings


def tuned(
    folder: Path,
    *settings: str,
    draws: Sequence[int] = (11, 12, 13),
    score: float | None = None,
    failed: bool = False,
    distribution: Any = "geometric",
) -> dict[str, Any]:
    """Write the folder of a finished tuning; return it with the stated values."""
    tuning = Tuning(distribution=distribution, expected_trials=4.0, score_noise_multiplier=score)
    names = [f"trial-{draw}" for draw in draws]
    released = 2 if failed else None
    trials = [
        record(folder / "trials" / name, f"privacy.draw={draw}", *settings, released=released)
        for draw, name in zip(draws, names, strict=True)
    ]
    plan = read_plan(trials[-1].read_json("privacy.json"), "")
    assert plan is not None
    status = "failed" if failed else "done"
    table = pd.DataFrame({"trial": names, "status": status, "s": [0.1 * (n % 2) for n in range(len(names))]})
    changes: Any = {name: SimpleNamespace(changes={}) for name in names}
    chosen = choose_best(tuning, plan, "s", changes, table, None if score is None else 12)
    directory = RunDirectory(folder)
    directory.write_json("drawn.json", {"digest": "d", "trials": [{"draw": draw, "place": 0} for draw in draws]})
    directory.write_json("tuning.json", chosen)
    if score is not None:
        kept = {"noise_multiplier": score, "clients": 12, "scores": dict.fromkeys(names, 0.5)}
        directory.write_json("scores.json", kept)
    return chosen


def noted(folder: Path, words: str) -> bool:
    return any(words in note for note in notes_on(spent_below(folder)))


@pytest.mark.parametrize("score", [None, 4.0])
@pytest.mark.parametrize("settings", [(), POISSON], ids=["everyone", "poisson"])
def test_a_tuning_is_one_release_with_its_own_epsilon_and_its_trials_are_not_counted_again(
    tmp_path: Path, settings: Sequence[str], score: float | None, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    chosen = tuned(tmp_path / "best", *settings, score=score)
    group = only(tmp_path)
    assert [run.name for run in group.runs] == ["best"]
    assert (group.total.epsilon, group.total.delta) == (chosen["epsilon"], 1e-5) == (group.planned.epsilon, 1e-5)
    (said,) = group.as_dict()["runs"]
    assert (said["state"], said["selected"]) == ("tuning", "trial-12")
    assert said["condition"] == chosen["condition"]
    assert noted(tmp_path, "best is a tuning, counted as one release of its best trial")
    assert noted(tmp_path, f"its epsilon holds {said['condition']}.")
    monkeypatch.setenv("COLUMNS", "200")
    for arguments in ((), ("--json",)):
        assert call("privacy", "--spent", str(tmp_path), *arguments) == 0
        text = capsys.readouterr().out
        assert "tuning" in text
        assert "trial-11" not in text
    record(tmp_path / "other", "method.beta=0.2")
    total = only(tmp_path).total
    assert total.composition == "basic"
    assert total.epsilon == pytest.approx(chosen["epsilon"] + only(tmp_path / "other").total.epsilon)
    assert total.delta == pytest.approx(2e-5)
    assert only(tmp_path / "best").total.epsilon == chosen["epsilon"]


def test_an_unfinished_tuning_is_the_sum_of_all_its_trials(tmp_path: Path) -> None:
    tuned(tmp_path / "best")
    (tmp_path / "best" / "tuning.json").unlink()
    shutil.rmtree(tmp_path / "best" / "trials" / "trial-13")
    record(tmp_path / "best" / "trials" / "trial-13", "privacy.draw=13", released=2)
    assert only(tmp_path).total.mu == pytest.approx(math.sqrt((6 + 6 + 2) / 9))
    assert noted(tmp_path, "best is an unfinished tuning, without tuning.json")
    assert not noted(tmp_path, "elsewhere")


def lowered(chosen: dict[str, Any], folder: Path) -> Any:
    del folder
    return chosen | {"epsilon": 0.999 * chosen["epsilon"]}


def without_drawn(chosen: dict[str, Any], folder: Path) -> Any:
    (folder / "drawn.json").unlink()
    return chosen


def one_more(chosen: dict[str, Any], folder: Path) -> Any:
    record(folder / "trials" / "more", "privacy.draw=14")
    return chosen


def a_copy(chosen: dict[str, Any], folder: Path) -> Any:
    shutil.copytree(folder / "trials" / "trial-11", folder / "trials" / "copy")
    return chosen


def other_noise(chosen: dict[str, Any], folder: Path) -> Any:
    shutil.rmtree(folder / "trials" / "trial-11")
    record(folder / "trials" / "trial-11", "privacy.draw=11", "privacy.noise_multiplier=2.5")
    return chosen


def other_data(chosen: dict[str, Any], folder: Path) -> Any:
    shutil.rmtree(folder / "trials" / "trial-11")
    record(folder / "trials" / "trial-11", "privacy.draw=11", "seed=8")
    return chosen


@pytest.mark.parametrize(
    "damage",
    [
        lowered,
        without_drawn,
        one_more,
        a_copy,
        other_noise,
        other_data,
        lambda *_: [],
        lambda *_: 7,
        lambda chosen, _: chosen | {"delta": 1e-6},
        lambda chosen, _: chosen | {"adjacency": "replace"},
        lambda chosen, _: chosen | {"selected": "gone"},
        lambda chosen, _: chosen | {"selected": None},
        lambda chosen, _: chosen | {"selected": []},
        lambda chosen, _: chosen | {"expected_trials": 8.0},
        lambda chosen, _: chosen | {"expected_trials": "4"},
        lambda chosen, _: chosen | {"distribution": "constant"},
        lambda chosen, _: chosen | {"distribution": "negative-binomial", "eta": 4.0},
        lambda chosen, _: chosen | {"epsilon": "little"},
        lambda chosen, _: {key: value for key, value in chosen.items() if key != "unit"},
    ],
)
def test_a_tuning_that_does_not_fit_its_trials_is_their_sum(
    tmp_path: Path, damage: Callable[[dict[str, Any], Path], Any]
) -> None:
    folder = tmp_path / "best"
    changed = damage(tuned(folder), folder)
    (folder / "tuning.json").write_text(json.dumps(changed))
    groups = spent_below(tmp_path)
    trials = len(list((folder / "trials").iterdir()))
    assert sum(len(group.runs) for group in groups) == trials
    if damage is not other_data:
        expected = (trials - 1) * 6 / 9 + (6 / 6.25 if damage is other_noise else 6 / 9)
        assert groups[0].total.mu == pytest.approx(math.sqrt(expected))
    assert noted(tmp_path, "tuning.json does not fit its trials")


def test_a_stated_epsilon_above_what_is_due_is_believed(tmp_path: Path) -> None:
    chosen = tuned(tmp_path / "best")
    for stated, charged in ((chosen["epsilon"] + 1.0, chosen["epsilon"] + 1.0), (None, math.inf)):
        RunDirectory(tmp_path / "best").write_json("tuning.json", chosen | {"epsilon": stated})
        assert only(tmp_path).total.epsilon == charged


def test_what_was_released_of_a_tuning_is_counted_as_the_tuning(tmp_path: Path) -> None:
    chosen = tuned(tmp_path / "best")
    for name in ("drawn.json", "trials/trial-11", "trials/trial-13"):
        path = tmp_path / "best" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert only(tmp_path).total.epsilon == chosen["epsilon"]


def test_a_tuning_whose_trials_all_failed_has_its_price(tmp_path: Path) -> None:
    chosen = tuned(tmp_path / "best", failed=True)
    assert chosen["selected"] is None
    assert only(tmp_path).total.epsilon == chosen["epsilon"]


def test_scores_of_a_tuning_that_is_not_counted_as_one_are_added_to_its_trials(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path / "best")
    chosen = tuned(folder.path, score=4.0)
    exact = math.sqrt(3 * 6 / 9 + 3 / 16)
    folder.write_json("tuning.json", chosen | {"score_noise_multiplier": 400.0, "epsilon": 0.1})
    assert only(tmp_path).total.mu == pytest.approx(exact)
    folder.file("tuning.json").unlink()
    assert only(tmp_path).total.mu == pytest.approx(exact)
    folder.file("scores.json").unlink()
    assert only(tmp_path).total.mu == pytest.approx(math.sqrt(3 * 6 / 9))
    folder.write_json("tuning.json", chosen | {"epsilon": 0.1})
    assert only(tmp_path).total.mu == pytest.approx(exact)
    for file in ({"noise_multiplier": 0.0}, {"noise_multiplier": "much"}, []):
        folder.write_json("scores.json", file)
        with pytest.raises(UserError, match=r"scores\.json"):
            spent_below(tmp_path)


EXAMPLES = ["privacy.unit=example", "privacy.example_clip=1.0", "privacy.examples=100"]
BATCHES = ["method=", "method.name=dp-gd", "local=", "local.work=poisson-gradient", "local.rate=0.1"]


@pytest.mark.parametrize("settings", [EXAMPLES, [*EXAMPLES, *BATCHES]], ids=["memory", "batches"])
def test_scores_cost_an_example_as_much_as_a_client(settings: list[str], tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path / "best")
    tuned(folder.path, *settings, score=4.0)
    folder.file("tuning.json").unlink()
    (scores,) = [run for run in only(tmp_path).runs if run.name.endswith("scores.json")]
    assert scores.mu_after(3) == pytest.approx(math.sqrt(3) / 4.0)


def test_tunings_that_share_their_noise_are_no_better_than_runs_that_do(tmp_path: Path) -> None:
    tuned(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert math.isfinite(only(tmp_path).total.epsilon)
    directory = RunDirectory(tmp_path / "two" / "trials" / "trial-11")
    rows = directory.rows("rounds.jsonl")
    rows[4]["test_loss"] += 1e-9
    directory.file("rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert only(tmp_path).total.epsilon == math.inf


def test_trials_without_the_folder_of_their_tuning_are_said_to_be_that(tmp_path: Path) -> None:
    tuned(tmp_path / "best")
    folder = tmp_path / "best" / "trials"
    assert only(folder).total.mu == pytest.approx(math.sqrt(3 * 6 / 9))
    assert noted(folder, "elsewhere: trial-11, trial-12, trial-13.")
    assert noted(folder / "trial-11", "elsewhere: trial-11.")


def test_real_runs_finished_stopped_and_private_or_not(tmp_path: Path) -> None:
    def stop(released: dict[str, Any], diagnostics: dict[str, Any]) -> None:
        del diagnostics
        if released["round"] == 2:
            raise StopRun("enough")

    whole = run_experiment(config(), tmp_path / "whole", engine="vectorized")
    with pytest.raises(StopRun):
        run_experiment(config("method.beta=0.3"), tmp_path / "part", engine="vectorized", watch=stop)
    group = only(tmp_path)
    assert {run.name: run.rounds for run in group.runs} == {"whole": 6, "part": 2}
    assert group.total.mu == pytest.approx(math.sqrt((6 + 2) / 9))
    assert only(tmp_path / "whole").total.epsilon == whole["epsilon"]


def test_a_checkpoint_tells_its_round_without_being_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors")
    assert checkpoint.round() is None
    checkpoint.write("digest", "promise", 7, {"model": torch.zeros(3)}, {})
    assert checkpoint.round() == 7
    checkpoint.path.write_bytes(b"torn")
    with pytest.raises(UserError, match="undamaged checkpoint"):
        checkpoint.round()


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize("damage", ["no folder", "empty", "config.toml", "privacy.json", "lost privacy.json", "data"])
def test_a_folder_without_runs_or_with_damaged_ones_is_one_clear_line(damage: str, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "runs"
    if damage != "no folder":
        folder.mkdir()
    if damage not in ("no folder", "empty"):
        directory = record(folder / "a")
        if damage == "lost privacy.json":
            directory.file("privacy.json").unlink()
        elif damage == "data":
            directory.file("config.toml").write_text("seed = 3\n")
        else:
            directory.file(damage).write_text("{")
    assert call("privacy", "--spent", str(folder)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line


def test_people_see_a_table_and_programs_see_json(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    record(tmp_path / "[a]")
    record(tmp_path / "b", "method.beta=0.2")
    assert call("privacy", "--spent", str(tmp_path)) == 0
    text = capsys.readouterr().out
    for words in ("[a]", "6 of 6", "together", "seed 7", "trust central, add-or-remove", "adversary: anyone", "mu = "):
        assert words in text
    assert call("privacy", "--spent", str(tmp_path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (group,) = found["groups"]
    assert group["epsilon"] == only(tmp_path).total.epsilon
    assert [run["run"] for run in group["runs"]] == ["[a]", "b"]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (str(QUICKSTART), "--spent", "runs"),
        ("--spent", "runs", "-s", "seed=3"),
        ("--spent", "runs", "--plot", "x.png"),
        (str(QUICKSTART), "--plot", "x.gif"),
        (str(QUICKSTART), "--plot", "x.png", "-s", "privacy="),
        (str(QUICKSTART), "--plot", "nowhere/x.png"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(arguments: tuple[str, ...], tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("privacy", *arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_the_picture_is_drawn_beside_the_statement(tmp_path: Path, capsys) -> None:
    picture = tmp_path / "curve.png"
    assert call("privacy", str(QUICKSTART), "--plot", str(picture)) == 0
    text = capsys.readouterr().out
    assert "Promise:" in text
    assert str(picture) in text
    assert picture.stat().st_size > 10_000
