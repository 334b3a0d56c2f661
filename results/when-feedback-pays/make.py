"""When does feedback pay under privacy? A map over data, populations, skew and promises, made in short sittings.

    python results/when-feedback-pays/make.py --work FOLDER --data-root DATA --minutes 30   # as often as needed
    python results/when-feedback-pays/make.py --work FOLDER --status                        # done, and CPU time left
    python results/when-feedback-pays/make.py --work FOLDER --page                          # tables, figures, README.md

cells.py lists the cells and the families. In a cell, every family is tuned on seed 0: 8 settings, steps and the other
hyperparameter in a grid; while the best by validation is at an end of a range, the range is extended there, by at most
4 settings. The best of each is judged with seeds 1 to 5, and the two with the best validation there with 6 to 10, too.

FOLDER keeps a JSON file for each finished trial, under the hash of its config. It may be killed at any time.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[0] / "benchmarks"), str(HERE)]

from cells import (  # noqa: E402
    CELLS,
    REFERENCE,
    STEPS,
    WORST_ERROR,
    Cell,
    Facts,
    Family,
    config,
    families,
)

TUNING_SEED = 0
JUDGES = (1, 2, 3, 4, 5)
MORE_JUDGES = (6, 7, 8, 9, 10)
EXTENSIONS = 4
# Expected settings beyond the first 8, and CPU seconds of a trial of which nothing is known, for estimates.
USUAL_EXTENSIONS, USUAL_SECONDS = 2.5, 1.1

SETTINGS = ("method", "server", "adaptive", "noise", "cohort")

At = tuple[int, int]
Result = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A setting of a family in a cell, with a seed."""

    family: Family
    at: At
    seed: int


class Store:
    """The finished trials of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, Result] = {}

    def facts(self, cell: Cell) -> Facts | None:
        """Return the facts about a cell; None if they were not measured."""
        found = _read(self._folder(cell) / "facts.json")
        return None if found is None else Facts(**found)

    def keep_facts(self, cell: Cell, facts: Facts) -> None:
        """Save the facts about a cell."""
        _write(self._folder(cell) / "facts.json", asdict(facts))

    def get(self, cell: Cell, trial: Trial, facts: Facts) -> Result | None:
        """Return the result of a trial; None if it is not finished."""
        file = self._file(cell, trial, facts)
        found = self._known.get(file) or _read(file)
        if found is not None:
            self._known[file] = found
        return found

    def keep(self, cell: Cell, trial: Trial, facts: Facts, result: Result) -> None:
        """Save the result of a trial."""
        _write(self._file(cell, trial, facts), result)

    def seconds(self, cell: Cell) -> list[float]:
        """Return the CPU seconds of each finished trial of a cell."""
        found = (_read(file) for file in self._folder(cell).glob("trial-*.json"))
        return [result["cpu"] for result in found if result is not None]

    def _folder(self, cell: Cell) -> Path:
        return self.folder / cell.name

    def _file(self, cell: Cell, trial: Trial, facts: Facts) -> Path:
        return self._folder(cell) / _file_name(cell, trial, facts)


@cache
def _file_name(cell: Cell, trial: Trial, facts: Facts) -> str:
    tables = config(cell, trial.family, trial.at, trial.seed, facts)
    text = json.dumps(tables, sort_keys=True).replace(f"{HERE}/", "")
    return f"trial-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(content), encoding="utf-8")
    os.replace(unfinished, file)  # noqa: PTH105


def score(cell: Cell, found: dict[str, float]) -> float:
    """Return the score of a cell's metric, with a bound for models that diverged."""
    value = found[cell.metric]
    if cell.metric == "rmse":
        return min(value, WORST_ERROR) if math.isfinite(value) else WORST_ERROR
    return value if math.isfinite(value) else 0.0


def first_settings(family: Family) -> list[At]:
    """Return the 8 settings that are tried first."""
    return [(value, step) for value in (family.first, family.first + 1) for step in range(STEPS)]


def best_of(cell: Cell, tuned: dict[At, Result]) -> At:
    """Return the setting with the best validation score; of equal ones, that with the lowest validation loss."""

    def rank(at: At) -> tuple[float, float]:
        loss = tuned[at]["validation_loss"]
        return cell.sign * tuned[at]["validation"], -loss if math.isfinite(loss) else -math.inf

    return max(tuned, key=rank)


def extension(cell: Cell, family: Family, tuned: dict[At, Result]) -> At | None:
    """Return the next setting beyond an end of a range at which the best setting is; None if there is none.

    The range of steps comes first. Values of the other hyperparameter end with the family's list.
    """
    if len(tuned) >= len(first_settings(family)) + EXTENSIONS:
        return None
    value, step = best_of(cell, tuned)
    steps = [at[1] for at in tuned if at[0] == value]
    for beyond, end in ((step + 1, max(steps)), (step - 1, min(steps))):
        if step == end:
            return value, beyond
    values = [at[0] for at in tuned if at[1] == step]
    for beyond, end in ((value + 1, max(values)), (value - 1, min(values))):
        if value == end and not family.fixed and 0 <= beyond < len(family.values):
            return beyond, step
    return None


def tuned_so_far(store: Store, cell: Cell, family: Family, facts: Facts) -> tuple[dict[At, Result], At | None]:
    """Return the finished settings of a family, in order, and the next one to try; None if it is tuned."""
    tuned: dict[At, Result] = {}
    for at in first_settings(family):
        result = store.get(cell, Trial(family, at, TUNING_SEED), facts)
        if result is None:
            return tuned, at
        tuned[at] = result
    while (at := extension(cell, family, tuned)) is not None:
        result = store.get(cell, Trial(family, at, TUNING_SEED), facts)
        if result is None:
            return tuned, at
        tuned[at] = result
    return tuned, None


def top_two(cell: Cell, judged: dict[str, dict[int, Result]]) -> list[str]:
    """Return the two families with the best mean validation score over the first judging seeds."""

    def mean(name: str) -> float:
        return cell.sign * sum(judged[name][seed]["validation"] for seed in JUDGES)

    return sorted(judged, key=mean, reverse=True)[:2]


class Stage:
    """The state of a cell: the settings tried, the best of each family, the judged seeds, and the next trial."""

    def __init__(self, store: Store, cell: Cell, facts: Facts) -> None:
        self.tuned: dict[str, dict[At, Result]] = {}
        self.chosen: dict[str, At] = {}
        self.judged: dict[str, dict[int, Result]] = {}
        self.next: Trial | None = None
        for family in families(cell):
            self.tuned[family.name], at = tuned_so_far(store, cell, family, facts)
            if at is not None:
                self.next = Trial(family, at, TUNING_SEED)
                return
            self.chosen[family.name] = best_of(cell, self.tuned[family.name])
        self.judged = {name: {} for name in self.chosen}
        names = {family.name: family for family in families(cell)}
        self._judge(store, cell, facts, list(names.values()), JUDGES)
        if self.next is None:
            self._judge(store, cell, facts, [names[name] for name in top_two(cell, self.judged)], MORE_JUDGES)

    def _judge(self, store: Store, cell: Cell, facts: Facts, found: list[Family], seeds: tuple[int, ...]) -> None:
        for seed in seeds:
            for family in found:
                trial = Trial(family, self.chosen[family.name], seed)
                result = store.get(cell, trial, facts)
                if result is None:
                    self.next = trial
                    return
                self.judged[family.name][seed] = result

    @property
    def done(self) -> int:
        """The number of finished trials."""
        return sum(len(each) for group in (self.tuned, self.judged) for each in group.values())


def expected_trials(cell: Cell, stage: Stage | None) -> float:
    """Return how many more trials a cell takes, about."""
    found = families(cell)
    if stage is not None and stage.next is None:
        return 0.0
    if stage is not None and stage.chosen and len(stage.chosen) == len(found):
        tuning = 0.0
    else:
        tuned = {} if stage is None else stage.tuned
        tuning = sum(
            max(8 + USUAL_EXTENSIONS - len(tuned.get(one.name, {})), 1.0)
            for one in found
            if stage is None or one.name not in stage.chosen
        )
    judged = 0 if stage is None else sum(map(len, stage.judged.values()))
    return tuning + len(found) * len(JUDGES) + 2 * len(MORE_JUDGES) - judged


class Runner:
    """Runs trials in this process, on one thread, and keeps the data of one cell and seed."""

    def __init__(self, data_root: Path) -> None:
        import torch

        torch.set_num_threads(1)
        self.data_root = data_root
        self._held: tuple[str, Any] = ("", None)

    def _assemble(self, tables: dict[str, Any]) -> Any:
        from fedpriv import load_config
        from fedpriv.experiment.build import assemble, make_federation

        parsed = load_config(tables)
        key = json.dumps([tables["data"], tables["seed"]], sort_keys=True)
        if self._held[0] != key:
            self._held = key, make_federation(parsed, self.data_root)
        return assemble(parsed, federation=self._held[1])

    def facts(self, cell: Cell) -> Facts:
        """Measure the facts about a cell: build it with clipping at 1, and read its plan."""
        family = next(family for family in families(cell) if family.name == REFERENCE)
        at = family.values.index(1.0), 0
        built = self._assemble(config(cell, family, at, TUNING_SEED, Facts(size=1, noise=0.0)))
        size, plan = built.population.task.layout.size, built.plan
        if plan is None:
            return Facts(size=size, noise=0.0)
        expected = cell.clients * cell.share
        among = math.sqrt(expected) if cell.trust == "local" else 1.0
        return Facts(size=size, noise=plan.noise_stddev * among * math.sqrt(size) / expected)

    def run(self, cell: Cell, trial: Trial, facts: Facts) -> Result:
        """Train, and return the scores of the last model, and the time that it took."""
        from fedpriv.experiment.execution import Execution, start_engine
        from fedpriv.rounds import begin_round, finish_round, skip_round

        began, cpu = time.monotonic(), time.process_time()
        tables = config(cell, trial.family, trial.at, trial.seed, facts)
        built = self._assemble(tables)
        engine, _ = start_engine(built, Execution(engine="vectorized").completed(None, begun=False))
        try:
            state = built.server.init(built.initial_model)
            for number in range(1, cell.rounds + 1):
                total = engine.sum_messages(begin_round(built.server, state, number))
                if total.void:
                    state = skip_round(built.server, state)
                else:
                    state = finish_round(built.server, state, number, total.sum)
        finally:
            engine.close()
        tested, validated = built.evaluate(state.model), built.validate(state.model)
        return {
            "family": trial.family.name,
            "at": trial.at,
            "seed": trial.seed,
            "setting": {key: tables[key] for key in SETTINGS if key in tables},
            "validation": score(cell, validated),
            "validation_loss": validated["loss"],
            "test": score(cell, tested),
            "test_loss": tested["loss"],
            "epsilon": None if built.plan is None else built.plan.epsilon,
            "cpu": time.process_time() - cpu,
            "seconds": time.monotonic() - began,
        }


def go_on(store: Store, runner: Runner, cells: list[Cell], until: float) -> Iterator[tuple[Cell, Trial, Result]]:
    """Run the missing trials, cell after cell, until a time of `time.monotonic`; no trial begins after it."""
    for cell in cells:
        if time.monotonic() >= until:
            return
        facts = store.facts(cell)
        if facts is None:
            facts = runner.facts(cell)
            store.keep_facts(cell, facts)
        while time.monotonic() < until and (trial := Stage(store, cell, facts).next) is not None:
            result = runner.run(cell, trial, facts)
            store.keep(cell, trial, facts, result)
            yield cell, trial, result


def stages(store: Store, cells: list[Cell]) -> dict[str, tuple[Stage | None, Facts | None]]:
    """Return the state of each cell."""
    found = {cell.name: store.facts(cell) for cell in cells}
    return {
        cell.name: (None if (facts := found[cell.name]) is None else Stage(store, cell, facts), found[cell.name])
        for cell in cells
    }


def print_status(store: Store, cells: list[Cell]) -> None:
    """Print the number of finished trials and cells, and the estimated CPU time of the rest."""
    done, complete, spent, left = 0, 0, 0.0, 0.0
    for cell in cells:
        facts = store.facts(cell)
        stage = None if facts is None else Stage(store, cell, facts)
        seconds = store.seconds(cell)
        each = sum(seconds) / len(seconds) if seconds else USUAL_SECONDS
        more = expected_trials(cell, stage)
        done += 0 if stage is None else stage.done
        complete += stage is not None and stage.next is None
        spent += sum(seconds)
        left += more * each
        if stage is not None:
            print(f"{cell.name:45s} {stage.done:4d} done, about {more:4.0f} left, {each:5.2f} s each")
    print(f"{complete} of {len(cells)} cells complete, {done} trials done in {spent / 3600:.2f} h of CPU time")
    print(f"about {left / 3600:.2f} h left ({USUAL_SECONDS:g} s for a trial of a cell without any)")


def main() -> None:
    """Run trials, or say how far the map is, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="finished trials; outside git")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no trial after this time")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells with this in their name")
    parser.add_argument("--status", action="store_true")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    until = time.monotonic() + 60.0 * options.minutes
    store = Store(options.work)
    cells = [cell for cell in CELLS if options.only in cell.name]
    if options.status:
        print_status(store, cells)
    elif options.page:
        from tables import write_page

        write_page(stages(store, CELLS))
    else:
        for cell, trial, result in go_on(store, Runner(options.data_root), cells, until):
            line = f"{cell.name} {trial.family.name} {trial.at} seed {trial.seed}"
            print(f"{line}: {cell.metric} {result['test']:.4f}, {result['cpu']:.2f} s", flush=True)


if __name__ == "__main__":
    main()
