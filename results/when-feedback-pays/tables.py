"""Tables, figures, the rule and the page of the map, from the cells that are complete."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import t as student

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[0] / "benchmarks"), str(HERE)]

from cells import CELLS, FAMILIES, OF_MEMORY, REFERENCE, Cell, Facts  # noqa: E402
from page import fill  # noqa: E402
from page import table as markdown  # noqa: E402

PAGE = HERE / "README.md"
PLAIN = "no memory"
# An error of hours counts as this share of an accuracy: 12.3, the error of the constant 40, is 1.
HOURS = 12.3
CONFIDENCE = 0.95
# Cells for a rule, and marks on an axis of points.
ENOUGH = 12
# Places of cells without noise on an axis of noise, and the end of that strip.
_LEFT, _STEP, _FIRST_NOISE = 5e-4, 1.2, 6e-3
TICKS = (-30, -10, -3, -1, 0, 1, 3, 10, 30)
COLOURS = ("#332288", "#88CCEE", "#117733", "#CC6677", "#AA4499", "#999933")


@dataclass(frozen=True)
class Gain:
    """A mean difference over paired seeds, positive if better, and half its interval of confidence."""

    mean: float
    half: float
    seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes 0, otherwise 0."""
        return 0 if abs(self.mean) <= self.half else int(math.copysign(1, self.mean))


def gain(cell: Cell, ours: dict[int, float], theirs: dict[int, float]) -> Gain:
    """Return the paired gain over the seeds that both have."""
    seeds = sorted(ours.keys() & theirs.keys())
    differences = np.array([cell.sign * (ours[seed] - theirs[seed]) for seed in seeds])
    quantile = student.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1)
    return Gain(
        float(differences.mean()), float(quantile * differences.std(ddof=1) / math.sqrt(len(seeds))), len(seeds)
    )


@dataclass(frozen=True)
class Judged:
    """The scores of a complete cell by family and seed, and the numbers that a user knows before a run."""

    cell: Cell
    facts: Facts
    scores: dict[str, dict[int, float]]

    def mean(self, family: str) -> float:
        """Return a family's mean test score over the seeds that all families have."""
        common = set.intersection(*(set(found) for found in self.scores.values()))
        return float(np.mean([self.scores[family][seed] for seed in common]))

    @property
    def best(self) -> str:
        """The family with the best mean test score."""
        return max(self.scores, key=lambda family: self.cell.sign * self.mean(family))

    def against(self, family: str, other: str) -> Gain:
        """Return the gain of one family over another."""
        return gain(self.cell, self.scores[family], self.scores[other])

    def used(self, family: str) -> str:
        """Return a family, or the reference if the family does not apply."""
        return family if family in self.scores else REFERENCE

    def hit(self, family: str) -> bool:
        """True if a family is the best, or the best is not ahead by more than chance."""
        family = self.used(family)
        return family == self.best or self.against(self.best, family).sign == 0

    def regret(self, family: str) -> float:
        """Return how far a family is behind the best, as a share of accuracy (hours: of the error of a constant)."""
        behind = abs(self.mean(self.best) - self.mean(self.used(family)))
        return behind / HOURS if self.cell.metric == "rmse" else behind

    @property
    def features(self) -> dict[str, float]:
        """The numbers that a rule may look at: public, and known before a run."""
        expected = self.cell.clients * self.cell.share
        return {
            "noise": self.facts.noise,
            "noise * sqrt(rounds)": self.facts.noise * math.sqrt(self.cell.rounds),
            "clients": float(self.cell.clients),
            "cohort": expected,
            "turns": self.cell.share * self.cell.rounds,
            "parameters": float(self.facts.size),
        }


@dataclass(frozen=True)
class Rule:
    """`low` if a feature is below a limit, otherwise `high`."""

    feature: str
    limit: float
    low: str
    high: str

    def choice(self, judged: Judged) -> str:
        """Return the family to use."""
        return self.low if judged.features[self.feature] < self.limit else self.high

    def __str__(self) -> str:
        if self.low == self.high:
            return f"always {self.low}"
        return f"{self.low} if {self.feature} < {self.limit:.2g}, otherwise {self.high}"


ALWAYS = Rule("noise", math.inf, REFERENCE, REFERENCE)


def fitted(found: list[Judged]) -> Rule:
    """Return the rule with the most hits; of equal ones that with the least regret, and then the simplest."""
    names = [name for name in FAMILIES if any(name in judged.scores for judged in found)]
    hit = {name: np.array([judged.hit(name) for judged in found]) for name in names}
    regret = {name: np.array([judged.regret(name) for judged in found]) for name in names}
    best, best_rank = ALWAYS, (-1.0, 0.0, 0.0)
    for feature in found[0].features:
        values = np.array([judged.features[feature] for judged in found])
        ordered = np.unique(values)
        limits = [math.inf, *np.sqrt(np.maximum(ordered[:-1], ordered[1:] / 100) * ordered[1:])]
        for limit in limits:
            below = values < limit
            for low in names:
                for high in names if limit < math.inf else [low]:
                    hits = float(np.where(below, hit[low], hit[high]).sum())
                    rank = (hits, -float(np.where(below, regret[low], regret[high]).mean()), float(low == high))
                    if rank > best_rank:
                        best, best_rank = Rule(feature, float(limit), low, high), rank
    return best


def judged_cells(found: dict[str, tuple[Any, Facts | None]]) -> list[Judged]:
    """Return the complete cells."""
    complete = []
    for cell in CELLS:
        stage, facts = found[cell.name]
        if stage is None or facts is None or stage.next is not None:
            continue
        scores = {name: {seed: one["test"] for seed, one in each.items()} for name, each in stage.judged.items()}
        complete.append(Judged(cell, facts, scores))
    return complete


def trials_table(found: dict[str, tuple[Any, Facts | None]]) -> pd.DataFrame:
    """Return a row for each finished trial."""
    rows = []
    for name, (stage, _) in found.items():
        if stage is None:
            continue
        for kind, group in (("tuning", stage.tuned), ("judging", stage.judged)):
            for family, each in group.items():
                for one in each.values():
                    kept = {key: one[key] for key in ("seed", "validation", "test", "epsilon", "cpu")}
                    value = FAMILIES[family].values[one["at"][0]]
                    step = one["setting"]["method"]["server_lr"]
                    rows.append({"cell": name, "family": family, "kind": kind, "value": value, "step": step, **kept})
    return pd.DataFrame(rows)


def ends_table(found: dict[str, tuple[Any, Facts | None]]) -> pd.DataFrame:
    """Return for each tuned family how far its ranges were extended, and whether the best is still at an end."""
    rows = []
    for name, (stage, _) in found.items():
        if stage is None:
            continue
        for family, at in stage.chosen.items():
            tried = stage.tuned[family]
            steps = [one[1] for one in tried if one[0] == at[0]]
            still = at[1] in (min(steps), max(steps))
            rows.append({"cell": name, "family": family, "extended": len(tried) - 8, "step at an end": still})
    return pd.DataFrame(rows)


def _number(cell: Cell, value: float) -> str:
    return f"{value:.2f}" if cell.metric == "rmse" else f"{value:.3f}"


def _promise(cell: Cell) -> str:
    if cell.epsilon is None:
        return "none"
    more = [part for part in (cell.trust, cell.unit) if part not in ("central", "client")]
    return ", ".join([f"{cell.epsilon:g}", *more])


def cells_text(found: dict[str, tuple[Any, Facts | None]]) -> str:
    """Return the list of all cells, with the state of each."""
    rows = []
    for cell in CELLS:
        stage, facts = found[cell.name]
        state = "not begun" if stage is None else ("complete" if stage.next is None else f"{stage.done} trials")
        noise = "" if facts is None else f"{facts.noise:.2g}"
        size = "" if facts is None else f"{facts.size:,}"
        cohort = "everyone" if cell.share == 1.0 else f"{cell.share:g}"
        row = [cell.data, cell.model, size, f"{cell.clients:,}", cell.skew, cohort, cell.rounds, _promise(cell), noise]
        rows.append([*row, state])
    head = ["data", "model", "parameters", "clients", "skew", "cohort", "rounds", "epsilon", "noise", "state"]
    return markdown(head, rows)


def gains_text(found: list[Judged]) -> str:
    """Return a row for each complete cell: the score of the reference, and the gains of all other families over it."""
    others = [name for name in FAMILIES if name != REFERENCE]
    rows = []
    for judged in found:
        cell = judged.cell
        row = [cell.data, cell.model, f"{cell.clients:,}", cell.skew, f"{cell.share:g}", _promise(cell)]
        row += [f"{judged.facts.noise:.2g}", _number(cell, judged.mean(REFERENCE))]
        for name in others:
            if name not in judged.scores:
                row.append("")
                continue
            ahead = judged.against(name, REFERENCE)
            shown = f"{'+' if ahead.mean >= 0 else '-'}{_number(cell, abs(ahead.mean))}"
            row.append(f"**{shown}**" if ahead.sign else shown)
        rows.append(row)
    head = ["data", "model", "clients", "skew", "share", "epsilon", "noise", REFERENCE, *others]
    return markdown(head, rows)


def signs_text(found: list[Judged]) -> str:
    """Return a row for each family: in how many cells it is better or worse, by noise, and its pooled gain."""
    groups = {
        "no noise": [judged for judged in found if not judged.cell.private],
        "noise below 0.1": [judged for judged in found if judged.cell.private and judged.facts.noise < 0.1],
        "noise from 0.1": [judged for judged in found if judged.cell.private and judged.facts.noise >= 0.1],
    }
    rows = []
    pairs = [(name, REFERENCE) for name in FAMILIES if name != REFERENCE] + [(name, PLAIN) for name in OF_MEMORY]
    for name, other in pairs:
        row = [name, other]
        for cells in groups.values():
            gains = [(judged.against(name, other), judged.cell) for judged in cells if name in judged.scores]
            signs = [one.sign for one, _ in gains]
            accuracies = [one for one, cell in gains if cell.metric == "accuracy"]
            text = f"{signs.count(1)} / {signs.count(0)} / {signs.count(-1)}"
            row.append(f"{text}; {pooled(accuracies)}" if accuracies else (text if gains else ""))
        rows.append(row)
    return markdown(["family", "against", *groups], rows)


def pooled(gains: list[Gain]) -> str:
    """Return the mean gain over cells in points of accuracy, and half its interval by the pooled error of the seeds."""
    mean = float(np.mean([one.mean for one in gains]))
    errors = [one.half / student.ppf((1 + CONFIDENCE) / 2, one.seeds - 1) for one in gains]
    half = student.ppf((1 + CONFIDENCE) / 2, sum(one.seeds - 1 for one in gains)) * math.hypot(*errors) / len(gains)
    return f"{100 * mean:+.1f} ± {100 * half:.1f}"


def rule_text(found: list[Judged]) -> str:
    """Return the rule that is fitted without each source, and its hits there, beside those of the trivial rule."""
    rows, hits = [], np.zeros(3, dtype=int)
    behind = np.zeros(2)
    sources = list(dict.fromkeys(judged.cell.source for judged in found))
    for source in sources:
        inside = [judged for judged in found if judged.cell.source != source]
        outside = [judged for judged in found if judged.cell.source == source]
        if not inside:
            continue
        rule = fitted(inside)
        ours = sum(judged.hit(rule.choice(judged)) for judged in outside)
        theirs = sum(judged.hit(REFERENCE) for judged in outside)
        behind += [sum(judged.regret(one.choice(judged)) for judged in outside) for one in (rule, ALWAYS)]
        hits += [ours, theirs, len(outside)]
        rows.append([source, str(rule), f"{ours} of {len(outside)}", f"{theirs} of {len(outside)}"])
    if rows:
        rows.append(["all", "", f"{hits[0]} of {hits[2]}", f"{hits[1]} of {hits[2]}"])
        rows.append(["mean points behind the best", "", *(f"{100 * one / hits[2]:.2f}" for one in behind)])
    whole = f"\nFitted on all complete cells: **{fitted(found)}**.\n\n"
    head = ["left out", "rule fitted on the others", "its hits", f"always {REFERENCE}"]
    return markdown(head, rows) + whole + _constant_rules_text(found)


def _constant_rules_text(found: list[Judged]) -> str:
    """Return the hits of each family in all cells, with momentum where the family does not apply."""
    rows = [
        (name, sum(judged.hit(name) for judged in found), 100 * float(np.mean([one.regret(name) for one in found])))
        for name in FAMILIES
    ]
    rows.sort(key=lambda row: row[2])
    shown = [[name, f"{hits} of {len(found)}", f"{behind:.2f}"] for name, hits, behind in rows]
    return markdown(["always", "hits", "mean points behind the best"], shown)


def draw(found: list[Judged], file: Path) -> None:
    """Gain of each family over the reference against the noise, with 95 % intervals; without noise at the left."""
    others = [name for name in FAMILIES if name != REFERENCE]
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 4, sharex=True, sharey=True).flatten()
    colours = dict(zip(sorted({cell.data for cell in CELLS}), COLOURS, strict=True))
    loudest = max((judged.facts.noise for judged in found), default=1.0)
    still = [judged for judged in found if not judged.cell.private]
    for panel, name in zip(panels, others, strict=True):
        panel.axhline(0.0, color="black", linewidth=0.8)
        panel.axvline(_FIRST_NOISE, color="#BBBBBB", linewidth=0.8)
        for judged in found:
            if name not in judged.scores:
                continue
            ahead = judged.against(name, REFERENCE)
            scale = 100 / HOURS if judged.cell.metric == "rmse" else 100
            # Cells without noise are side by side, in the order of the list.
            at = judged.facts.noise if judged.cell.private else _LEFT * _STEP ** still.index(judged)
            colour = colours[judged.cell.data]
            panel.errorbar(at, scale * ahead.mean, scale * ahead.half, color=colour, marker="o", ms=3.5, lw=0.9)
        panel.set_title(name, fontsize=12)
        panel.set_xscale("log")
        panel.set_yscale("symlog", linthresh=1.0)
        panel.set_yticks(TICKS, [f"{tick:+g}" if tick else "0" for tick in TICKS])
        panel.set(xlim=(_LEFT / 1.5, 2 * loudest), ylim=(-1.5 * max(TICKS), 1.5 * max(TICKS)))
        marks = [10.0**power for power in range(-2, 3) if 10.0**power < 2 * loudest]
        panel.set_xticks([math.sqrt(_LEFT * _FIRST_NOISE), *marks], ["none", *(f"{mark:g}" for mark in marks)])
        panel.minorticks_off()
    shown = [panels[0].plot([], [], "o", color=colour, ms=5, label=data)[0] for data, colour in colours.items()]
    figure.legend(handles=shown, loc="outside upper center", ncols=len(shown), fontsize=11, frameon=False)
    figure.supxlabel("noise: length of the noise on the mean message, over the bound")
    figure.supylabel(f"points gained over {REFERENCE} (linear from -1 to +1)")
    figure.savefig(file, dpi=120)


def write_page(found: dict[str, tuple[Any, Facts | None]], page: Path = PAGE) -> None:
    """Write cells.csv, trials.csv, ends.csv, gains.png and the tables of the page beside it."""
    complete = judged_cells(found)
    folder = page.parent
    rows = []
    for judged in complete:
        for name in judged.scores:
            ahead = judged.against(name, REFERENCE) if name != REFERENCE else Gain(0.0, 0.0, 0)
            told = {**judged.cell.as_dict(), **judged.features, "family": name, "test": judged.mean(name)}
            rows.append({**told, "gain": ahead.mean, "half": ahead.half, "sign": ahead.sign, "seeds": ahead.seeds})
    for name, content in (("cells", pd.DataFrame(rows)), ("trials", trials_table(found)), ("ends", ends_table(found))):
        content.to_csv(folder / f"{name}.csv", index=False, float_format="%.5g")
    draw(complete, folder / "gains.png")
    fill("cells", f"{len(complete)} of {len(CELLS)} cells are complete.\n\n{cells_text(found)}", page)
    if complete:
        fill("gains", gains_text(complete), page)
        fill("signs", signs_text(complete), page)
    if len(complete) >= ENOUGH:
        fill("rule", rule_text(complete), page)
    print(f"{page}: {len(complete)} of {len(CELLS)} cells")
