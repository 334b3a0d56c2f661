"""A study: runs to compare, read from a sweep's folder or any folder of run directories."""

import json
import math
import tomllib
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import pandas as pd

from fedpriv.clock import SCHEDULES, FedBuff, FedFix, Token
from fedpriv.errors import UserError, nearest
from fedpriv.experiment.results import load_results
from fedpriv.experiment.run_directory import DIAGNOSTICS_FILE, RunDirectory, flat_tables
from fedpriv.experiment.schema import field_names, read_table
from fedpriv.plugins import bare_reference
from fedpriv.privacy import SAMPLINGS, rounded_up
from fedpriv.sweeps.files import CHOSEN, FAILURE, STOPPED, TABLE, TRIALS, TUNED, status_of
from fedpriv.tables import Record, as_text, short_texts
from fedpriv.tasks.metrics import METRICS, Metric, recorded_metrics

__all__ = [
    "HYPERPARAMETERS",
    "TERMS",
    "Study",
    "load_study",
    "not_covered",
    "problem_key",
    "scores_of",
    "short_names",
    "unreleased",
]

Row = Mapping[Hashable, Any]
"""A row of a table of pandas, by column."""

COSTS = ("simulated_seconds", "bytes_up", "bytes_down")
TERMS = ("trust", "adjacency", "unit", "delta")
"""The properties of a guarantee besides epsilon: columns with the actual values, from the config or defaults."""
HYPERPARAMETERS = (*(f"{table}." for table in TUNED), "training.")
"""Tables with keys that tuning may change; all other tables define the problem, or its privacy."""

_NOT_SETTING = ("name", "seed", "training.evaluate_every", "privacy.draw")
_PROMISED = ("private", "epsilon", "delta", "trust", "adjacency", "adversary", "accountant", "population", "rounds")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Runs to compare.

    Args:
        name: The study's name.
        trials: One row per trial, including trials without a result: `trial`, `status` (done, failed, stopped or left),
            `reason`, and the known keys of its config.
        runs: One row per finished run: `run`, the keys of its config, `seed`; `setting`, equal for configs that differ
            only in the seed; `method`; `problem` and `privacy`, words that distinguish them; the guarantee (`epsilon`,
            `delta`, ...), the last accuracies and losses, `cohort_size` (expected), recorded costs and distances,
            `hidden`, True if its costs are not released, and `not_covered`, the scores that its epsilon does not cover,
            separated by commas.
        rounds: One row per recorded round of a finished run: `run`, `setting`, `round`, and the recorded values.
        statements: The privacy statements, each with its runs.
        tuning: The trial selected by a tuning, with its guarantee; None for other sweeps.
        metrics: The metrics of all runs, except the loss; the first one selects settings.
    """

    name: str
    trials: pd.DataFrame
    runs: pd.DataFrame
    rounds: pd.DataFrame
    statements: dict[str, tuple[str, ...]]
    tuning: Record | None = None
    metrics: tuple[Metric, ...] = (METRICS["accuracy"],)

    @property
    def metric(self) -> Metric:
        """The metric that selects settings."""
        return self.metrics[0]

    @property
    def scores(self) -> tuple[str, ...]:
        """The columns of metrics and losses."""
        return scores_of(self.metrics)

    @property
    def keys(self) -> list[str]:
        """The keys of the configs, in order of appearance."""
        return [key for key in self.runs.columns if "." in key and not key.startswith(("heterogeneity.", "sources."))]

    def varying(self, rows: pd.DataFrame | None = None) -> list[str]:
        """Return the keys with more than one value, in `rows` if given."""
        rows = self.runs if rows is None else rows
        return [key for key in self.keys if key not in _NOT_SETTING and rows[key].map(as_text).nunique() > 1]


def scores_of(metrics: Iterable[Metric]) -> tuple[str, ...]:
    """Return the columns of metrics and losses: on test examples, then on validation examples."""
    names = dict.fromkeys((*(metric.name for metric in metrics), "loss"))
    return tuple(f"{on}_{name}" for on in ("test", "validation") for name in names)


def load_study(path: Path | str, metric: str | None = None) -> Study:
    """Load all runs of a sweep's folder, of any folder of run directories, or one run.

    Args:
        path: The folder.
        metric: The metric that selects settings; None for the first of each run's task.

    Raises:
        UserError: If there is no finished run, a file is damaged, runs of one setting and seed used different data, or
            the runs do not share the metric.
    """
    root = Path(path)
    if not root.is_dir():
        got = "a file" if root.exists() else "a path without a folder"
        raise UserError(str(root), "a folder with runs", got, "Create one with: fedpriv run or fedpriv sweep")
    found = {_name(folder, root): folder for folder in _folders(root)}
    trials, configs = _trials(root, found)
    asked = [name for name, config in configs.items() if config.get("model.name") == "statistics"]
    if asked and len(asked) == len(found):
        remedy = "Read their analysis.json, or choose a folder with runs of fedpriv run"
        raise UserError(str(root), "a run that trains a model", "analyses alone", remedy)
    for name in asked:
        del found[name], trials[name], configs[name]
    done = [name for name in found if trials[name]["status"] == "done"]
    if not done:
        reasons = sorted({str(row["reason"]) for row in trials.values() if row["reason"]})
        words = reasons[0] if reasons else "unfinished runs" if found else "a folder without runs"
        raise UserError(str(root), "at least one finished run", words, "Create one with: fedpriv run or fedpriv sweep")
    rounds, metrics = load_results(root), _metrics([found[name] for name in done], metric)
    scores = scores_of(metrics)
    runs = pd.DataFrame([_run(name, found[name], configs[name], scores) for name in done])
    _refuse_other_data(runs)
    _describe(runs, rounds, {name: str(found[name].relative_to(root)) for name in done}, scores)
    rounds = _rounds(rounds, runs, scores)
    statements: dict[str, list[str]] = {}
    for name in done:
        file = found[name] / "privacy.txt"
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else "No statement was found.\n"
        statements.setdefault(text, []).append(name)
    return Study(
        name=root.resolve().name,
        trials=pd.DataFrame(list(trials.values())),
        runs=runs.drop(columns="place"),
        rounds=rounds,
        statements={text: tuple(names) for text, names in statements.items()},
        tuning=RunDirectory(root).read_json(CHOSEN),
        metrics=metrics,
    )


def unreleased(rows: pd.DataFrame, column: str) -> bool:
    """Return True if a column has values that are not released: client heterogeneity, or costs of hidden cohorts."""
    if column.startswith("heterogeneity."):
        return bool(rows[column].notna().any())
    hidden = column in (*COSTS, "bytes") and "hidden" in rows
    return hidden and bool(rows.loc[rows["hidden"], column].notna().any())


def not_covered(rows: pd.DataFrame) -> set[str]:
    """Return the names of the scores that some run's epsilon does not cover."""
    texts = rows["not_covered"].unique() if "not_covered" in rows else ()
    return {name for text in texts for name in text.split(", ") if name}


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return each key's last word if these are distinct, otherwise the whole key; for a name or kind, the table's."""
    keys = list(keys)
    parts = [key.rpartition(".") for key in keys]
    last = [table if word in ("kind", "name") and table else word for table, _, word in parts]
    return {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}


def problem_key(key: str) -> bool:
    """Return True if a config key defines the problem."""
    key = key.removeprefix("sources.")  # a class with another source is another one
    return not key.startswith((*HYPERPARAMETERS, "privacy.", "deployment.")) and key not in _NOT_SETTING


def _folders(root: Path) -> list[Path]:
    """Return the folders of runs, and of trials that failed before they ran, by path."""
    files = (*root.rglob("config.toml"), *root.rglob(FAILURE))
    marks = ("rounds.jsonl", "summary.json", "digest.txt", FAILURE, STOPPED)
    return sorted({file.parent for file in files if any((file.parent / mark).exists() for mark in marks)})


def _name(folder: Path, root: Path) -> str:
    parts = folder.relative_to(root).parts
    return "/".join(parts[1:] if parts[:1] == (TRIALS,) and len(parts) > 1 else parts) or root.resolve().name


def _trials(root: Path, found: Mapping[str, Path]) -> tuple[dict[str, dict[str, object]], dict[str, Record]]:
    """Return the rows of all trials by name, and the configs of those that have one."""
    rows: dict[str, dict[str, object]] = {}
    configs: dict[str, Record] = {}
    for name, folder in found.items():
        directory = RunDirectory(folder)
        configs[name] = _config(directory.file("config.toml"))
        status = status_of(folder) or "left"
        file = {"failed": FAILURE, "stopped": STOPPED}.get(status)
        why = (directory.read_json(file) if file else None) or {}
        rows[name] = {"trial": name, "status": status, "reason": str(why.get("reason", "")), **configs[name]}
    for number, listed in enumerate(_listed(root / TABLE)):
        keys = {key: _value(text) for key, text in listed.items() if text and ("." in key or key == "seed")}
        if not listed["trial"]:
            rows[f"\0{number}"] = {"trial": "", "status": "failed", "reason": listed.get("reason", ""), **keys}
        elif listed["trial"] not in rows:
            rows[listed["trial"]] = {"trial": listed["trial"], "status": "left", "reason": "", **keys}
        elif not configs[listed["trial"]]:
            rows[listed["trial"]] |= keys
    return rows, configs


def _listed(path: Path) -> list[dict[str, str]]:
    """Return the rows of a sweep's table, which also lists trials without a folder; empty if there is no table."""
    if not path.exists():
        return []
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        return [{str(k): str(v) for k, v in row.items()} for row in table.to_dict("records") if row["status"]]
    except (ValueError, KeyError) as error:
        raise UserError(str(path), "a sweep's table", repr(error), "Run the sweep again with --resume") from None


def _value(text: str) -> object:
    """Return a number of a table as a number, other values as text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if _is_number(value) and math.isfinite(value) else text


def _config(path: Path) -> Record:
    if not path.exists():
        return {}
    try:
        return flat_tables(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(str(path), "a TOML file", str(error), "Start the run again with a new --out") from None


def _metrics(folders: Iterable[Path], wanted: str | None) -> tuple[Metric, ...]:
    """Return the metrics of all runs, the selecting one first."""
    recorded = [recorded_metrics(RunDirectory(folder).read_json("summary.json") or {}) for folder in folders]
    known = {metric.name: metric for metrics in recorded for metric in metrics} | {"loss": METRICS["loss"]}
    firsts = list(dict.fromkeys(metrics[0].name for metrics in recorded))
    if wanted is None and len(firsts) > 1:
        remedy = "Choose one by --select, such as --select test_loss, or report on the runs in different folders"
        raise UserError("--select", "runs that are judged by one metric", ", ".join(firsts), remedy)
    first = firsts[0] if wanted is None else wanted
    if first not in known:
        raise UserError("--select", f"test or validation, or one of {', '.join(known)}", first, nearest(first, known))
    if wanted is not None:
        lacking = sum(first not in {metric.name for metric in metrics} | {"loss"} for metrics in recorded)
        if lacking:
            raise UserError("--select", f"runs with {first}", f"{lacking} without it", "Choose a metric of all runs")
    rest = (name for name in known if name not in (first, "loss"))
    return (known[first], *(known[name] for name in rest))


def _run(name: str, folder: Path, config: Record, scores: Iterable[str]) -> dict[str, object]:
    directory = RunDirectory(folder)
    summary = directory.read_json("summary.json")
    if not isinstance(summary, dict) or not config:
        raise UserError(
            str(folder), "config.toml and summary.json of a run", "an incomplete folder", "Start the run again"
        )
    plan = directory.read_json("privacy.json") or {}
    metrics = {key: summary.get(key) for key in (*_PROMISED, *scores, *COSTS) if key in summary}
    # Older runs have it in their summary.
    known = {**summary, **(directory.read_json(DIAGNOSTICS_FILE) or {})}
    metrics |= {"data_fingerprint": known["data_fingerprint"]} if "data_fingerprint" in known else {}
    metrics["not_covered"] = ", ".join(summary.get("not_covered", ()))
    metrics["unit"] = plan.get("unit")
    metrics["hidden"] = not set(COSTS) & set(summary)
    metrics["cohort_size"] = (plan.get("sampling") or {}).get("expected_size", summary.get("expected_cohort"))
    apart = {key: value for key, value in config.items() if key not in _NOT_SETTING and key[:11] != "deployment."}
    identity = json.dumps({key: as_text(value) for key, value in apart.items()}, sort_keys=True)
    method = bare_reference(config.get("method.name", summary.get("method", "?")))
    names = {"run": name, "setting": identity, "method": method}
    return {**names, **config, **metrics}


def _refuse_other_data(runs: pd.DataFrame) -> None:
    """Raise UserError unless runs of one setting and seed used the same data: their mean would be meaningless."""
    if "data_fingerprint" not in runs:
        return
    known = runs[runs["data_fingerprint"].notna()]
    kind = known["data_fingerprint"].str.len()  # checksums of different versions of fedpriv cannot be compared
    for _, rows in known.groupby(["setting", "seed", kind.rename("kind")], sort=True):
        first = rows.drop_duplicates("data_fingerprint")
        if len(first) > 1:
            one, other = first["run"].iloc[:2]
            remedy = "Run one of them again, or report on them in different folders"
            raise UserError(f"{one} and {other}", "one setting and seed with the same data", "different data", remedy)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _describe(runs: pd.DataFrame, rounds: pd.DataFrame, places: Mapping[str, str], scores: tuple[str, ...]) -> None:
    """Add columns to the runs: those derived from several runs, and those that only the rounds have."""
    runs["place"] = runs["run"].map(places)
    distances = [key for key in rounds.columns if key.startswith("heterogeneity.") and key not in runs]
    last = rounds.groupby("run", sort=False).last(skipna=False)
    for key in (*scores, *COSTS, *_PROMISED, *distances):
        known = runs[key].astype(object) if key in runs else pd.Series(None, runs.index, dtype=object)
        runs[key] = known.where(known.notna(), runs["place"].map(last[key])) if key in last else known
    for key in (*scores, *COSTS, *distances, "epsilon", "delta", "population", "rounds", "cohort_size"):
        runs[key] = pd.to_numeric(runs[key], errors="coerce")
    runs["hidden"] &= runs[list(COSTS)].notna().any(axis=1)
    runs["private"] = runs["private"].fillna(value=False).astype(bool)
    order = {identity: number for number, identity in enumerate(sorted(runs["setting"].unique()), 1)}
    runs["setting"] = runs["setting"].map(order)
    runs["bytes"] = runs["bytes_up"] + runs["bytes_down"].fillna(0.0)
    runs["cohort_size"] = runs["cohort_size"].fillna(pd.Series([_cohort_size(row) for row in runs.to_dict("records")]))
    keys = [key for key in runs.columns if "." in key and not key.startswith("heterogeneity.")]
    varying = {key for key in keys if runs[key].map(as_text).nunique() > 1}
    runs["problem"] = words_of(runs, telling(runs, [key for key in keys if key in varying and problem_key(key)]))
    runs["privacy"] = _privacy(runs, [key for key in keys if key.startswith("privacy.")])


def telling(rows: pd.DataFrame, keys: Iterable[str]) -> list[str]:
    """Return the keys that help to distinguish rows: drops constant keys of only some rows."""
    kept: list[str] = []
    known = [()] * len(rows)
    for key in keys:
        texts = rows[key].map(as_text).tolist()
        more = [(*before, text) for before, text in zip(known, texts, strict=True)]
        if len(set(texts) - {""}) > 1 or "" not in texts or len(set(more)) > len(set(known)):
            kept.append(key)
            known = more
    return kept


def words_of(rows: pd.DataFrame, keys: list[str]) -> list[str]:
    """Return `key=value, ...` for each row, with the keys that it has."""
    names = short_names(keys)
    texts = {key: short_texts(rows[key], key) for key in keys}
    return [", ".join(f"{names[k]}={texts[k][i]}" for k in keys if texts[k][i]) for i in range(len(rows))]


def _privacy(runs: pd.DataFrame, keys: list[str]) -> list[str]:
    """Describe each run's guarantee: trust and epsilon, and other properties that differ between private runs.

    Adjacency, unit and delta are the actual values, which the config may leave to defaults.
    """
    private = runs[runs["private"]]
    shown = ("privacy.epsilon", "privacy.noise_multiplier", "privacy.draw", *(f"privacy.{term}" for term in TERMS))
    rest = [*(key for key in keys if key not in shown), *(term for term in TERMS if term != "trust")]
    rest = words_of(runs, [key for key in rest if private[key].map(as_text).nunique() > 1])
    return [
        ", ".join(part for part in (f"{row['trust']} trust", epsilon, others) if part)
        if row["private"]
        else "not private"
        for row, epsilon, others in zip(runs.to_dict("records"), _epsilons(runs), rest, strict=True)
    ]


def _epsilons(runs: pd.DataFrame) -> list[str]:
    """Return each run's epsilon in words: the requested value, or that of a given noise, rounded up."""
    key = "privacy.epsilon"
    wanted = short_texts(runs[key], key) if key in runs else [""] * len(runs)
    return [
        f"ε ≤ {asked}" if asked else f"ε = {rounded_up(got)}" if got == got else "ε unknown"
        for asked, got in zip(wanted, runs["epsilon"], strict=True)
    ]


def _cohort_size(row: Row) -> float:
    """Return the expected cohort size of an older run without a record; NaN if its config does not define it."""
    schedule = SCHEDULES.get(str(row.get("schedule.kind")))
    if schedule is Token:
        return 1.0
    if schedule in (FedBuff, FedFix):
        return float(row["schedule.buffer_size"] if schedule is FedBuff else row["population"])
    kind = SAMPLINGS.get(str(row.get("cohort.sampling")))
    if kind is None or row["population"] != row["population"]:
        return float("nan")
    fields = field_names(kind, ("population",))
    options = {name: row[f"cohort.{name}"] for name in fields if as_text(row.get(f"cohort.{name}"))}
    options = {k: int(v) if isinstance(v, float) and v.is_integer() and k == "size" else v for k, v in options.items()}
    try:
        return float(read_table(kind, options, "cohort", population=int(row["population"])).expected_size)
    except UserError:
        return float("nan")


def _rounds(rounds: pd.DataFrame, runs: pd.DataFrame, scores: tuple[str, ...]) -> pd.DataFrame:
    """Return the rounds of finished runs, with the columns that curves need."""
    names, settings = (dict(zip(runs["place"], runs[key], strict=True)) for key in ("run", "setting"))
    kept = rounds[rounds["run"].isin(list(names))]
    made = pd.DataFrame({"run": kept["run"].map(names), "setting": kept["run"].map(settings), "round": kept["round"]})
    for key in (*scores, *COSTS, "epsilon"):
        made[key] = pd.to_numeric(kept[key], errors="coerce") if key in kept else float("nan")
    made["bytes"] = made["bytes_up"] + made["bytes_down"].fillna(0.0)
    return made.reset_index(drop=True)
