"""The map of results/when-feedback-pays: its cells, and sittings that end at any time."""

import importlib.util
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedpriv import load_config

FOLDER = Path(__file__).parents[2] / "results" / "when-feedback-pays"
NAMES = ("cells", "tables", "page", "data")


@pytest.fixture(scope="module")
def make() -> Iterator[ModuleType]:
    """The program of the map; its neighbors have common names, so they leave again."""
    path, before = list(sys.path), {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    spec = importlib.util.spec_from_file_location("when_feedback_pays", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    for name in (*NAMES, spec.name):
        sys.modules.pop(name, None)
    sys.modules.update(before)


class Counted:
    """Stands for the runner: scores with one best setting, and a list of what was asked."""

    def __init__(self, make: ModuleType, best: tuple[int, int]) -> None:
        self.make, self.best, self.asked = make, best, []

    def facts(self, cell: Any) -> Any:
        return self.make.Facts(size=10, noise=0.5)

    def run(self, cell: Any, trial: Any, facts: Any) -> dict[str, Any]:
        self.asked.append((cell.name, trial.family.name, trial.at, trial.seed))
        away = abs(trial.at[0] - self.best[0]) + abs(trial.at[1] - self.best[1])
        score = 0.9 - 0.01 * away + 0.001 * (trial.seed % 3) + 0.002 * (trial.family.name == "momentum")
        told = {"validation": score, "validation_loss": 1 - score, "test": score, "test_loss": 1 - score}
        return {
            "family": trial.family.name,
            "at": trial.at,
            "seed": trial.seed,
            "setting": {"method": {"server_lr": 1.0}},
            "cpu": 0.5,
        } | {
            "epsilon": None,
            "seconds": 0.5,
            **told,
        }


def test_the_cells_cover_what_the_page_says(make: ModuleType) -> None:
    cells = make.CELLS
    assert len({cell.name for cell in cells}) == len(cells) >= 60
    assert {cell.epsilon for cell in cells} == {None, 8.0, 2.0, 1.0}
    assert {30, 100, 300, 1000, 3000, 10_000, 30_000} == {cell.clients for cell in cells}
    assert {cell.trust for cell in cells} == {"central", "local", "aggregator"}
    assert {cell.unit for cell in cells} == {"client", "example"}
    assert len({cell.source for cell in cells}) >= 4
    first = cells[: len(cells) // 3]
    assert {cell.data for cell in first} == {cell.data for cell in cells}
    assert {cell.epsilon for cell in first} == {cell.epsilon for cell in cells}


def read(make: ModuleType, cell: Any, family: Any) -> None:
    facts = make.Facts(size=600, noise=0.3 if cell.private else 0.0)
    value = len(family.values) - 1
    for at in [*make.first_settings(family), (value, -3), (0, 7)]:
        tables = make.config(cell, family, at, 3, facts)
        assert 0.0 < tables["method"]["server_lr"] < math.inf
    config = load_config(make.config(cell, family, (value, 1), 3, facts))
    assert (config.privacy is not None) == cell.private


def test_some_trials_are_experiments(make: ModuleType) -> None:
    pairs = [(cell, family) for cell in make.CELLS for family in make.families(cell)]
    for cell, family in pairs[::30]:
        read(make, cell, family)


@pytest.mark.slow
def test_every_trial_is_an_experiment(make: ModuleType) -> None:
    for cell in make.CELLS:
        for family in make.families(cell):
            read(make, cell, family)


def test_a_sitting_that_ends_is_gone_on_with(make: ModuleType, tmp_path: Path) -> None:
    cell, store, runner = make.Cell(data="digits", clients=10, skew="none"), make.Store(tmp_path), Counted(make, (1, 2))
    sitting = make.go_on(store, runner, [cell], math.inf)
    for _ in range(30):
        next(sitting)
    sitting.close()
    (tmp_path / cell.name / "trial-0.part").write_text("{", encoding="utf-8")
    assert make.Stage(store, cell, store.facts(cell)).done == 30
    assert not list(make.go_on(store, runner, [cell], -math.inf))
    rest = list(make.go_on(make.Store(tmp_path), runner, [cell], math.inf))
    assert len(runner.asked) == len(set(runner.asked)) == 30 + len(rest)
    stage = make.Stage(store, cell, store.facts(cell))
    assert stage.next is None
    assert stage.done == len(runner.asked)
    assert make.expected_trials(cell, stage) == 0.0
    assert sorted(len(seeds) for seeds in stage.judged.values()) == [5] * 6 + [10] * 2
    assert len(stage.judged["momentum"]) == 10


def test_ranges_move_until_the_best_is_inside(make: ModuleType, tmp_path: Path) -> None:
    cell, store, runner = make.Cell(data="digits", clients=10, skew="none"), make.Store(tmp_path), Counted(make, (1, 5))
    list(make.go_on(store, runner, [cell], math.inf))
    stage = make.Stage(store, cell, store.facts(cell))
    for family in make.families(cell):
        tried = stage.tuned[family.name]
        assert len(tried) <= 12
        assert {at[1] for at in tried} >= {3, 4, 5}
        assert stage.chosen[family.name][1] == 5


def test_the_page_is_written_and_the_rule_is_found(
    make: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables, "draw", lambda *_: None)
    cell, store = make.CELLS[0], make.Store(tmp_path / "work")
    list(make.go_on(store, Counted(make, (1, 2)), [cell], math.inf))
    shutil.copy(FOLDER / "README.md", tmp_path / "README.md")
    tables.write_page(make.stages(store, make.CELLS), tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"1 of {len(make.CELLS)} cells are complete" in text
    assert {"cells.csv", "trials.csv", "ends.csv"} <= {file.name for file in tmp_path.iterdir()}

    def judged(noise: float, memory: float) -> Any:
        scores = {"momentum": {seed: 0.8 + 0.001 * seed for seed in range(5)}}
        scores["published memory"] = {seed: memory + 0.0011 * seed for seed in range(5)}
        return tables.Judged(cell, make.Facts(size=10, noise=noise), scores)

    found = [judged(0.01, 0.85), judged(0.05, 0.84), judged(0.4, 0.7), judged(0.9, 0.6)]
    rule = tables.fitted(found)
    assert (rule.low, rule.high, 0.05 < rule.limit <= 0.4) == ("published memory", "momentum", True)
    assert [one.hit("momentum") for one in found] == [False, False, True, True]


def test_a_trial_trains(make: ModuleType, tmp_path: Path) -> None:
    cell = make.Cell(data="digits", clients=10, skew="none", epsilon=8.0, rounds=2)
    runner = make.Runner(tmp_path)
    facts = runner.facts(cell)
    assert facts.size == 650
    assert facts.noise > 1.0
    family = make.families(cell)[0]
    result = runner.run(cell, make.Trial(family, (2, 1), 0), facts)
    assert 0.0 <= result["test"] <= 1.0
    assert result["epsilon"] <= 8.0
