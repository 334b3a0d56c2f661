"""Constants of a training from the answers of an analysis: `[data] standardize = "DIR"`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from fedpriv.clock import SCHEDULES
from fedpriv.errors import UserError, nearest
from fedpriv.experiment.analyses.answers_file import ANALYSIS_FILE
from fedpriv.experiment.analyses.clients import refuse_other_clients
from fedpriv.experiment.schema import read_table
from fedpriv.privacy import REPLACE_FACTOR, Trust, adjacency_of, trust_of, unit_name
from fedpriv.tables import Record, Table

__all__ = ["check_same_clients", "standardized"]


def standardized(tables: Table) -> dict[str, object]:
    """Return a config with means and standard deviations of an analysis in place of `data.standardize`.

    Of a table, the columns of `data.numeric` that were asked about get `[mean, std]`, and others stay. Of arrays,
    `data.mean` and `data.std` are set. In a private run, `privacy.analyses` and `privacy.analyses_mu` record the cost.

    Args:
        tables: A config; without the key it is returned unchanged.

    Raises:
        UserError: If there are no such answers, or their promise says nothing about the adversary or unit of this run.
    """
    data = tables.get("data")
    if not isinstance(data, Mapping) or "standardize" not in data:
        return dict(tables)
    folder = Path(str(data["standardize"]))
    found = _read(folder / ANALYSIS_FILE)
    kept = {key: value for key, value in data.items() if key != "standardize"}
    made: dict[str, object] = {**tables, "data": {**kept, **_constants(kept, _moments(found, folder), folder)}}
    if isinstance(privacy := tables.get("privacy"), Mapping):
        made["privacy"] = {**privacy, **_cost(tables, privacy, found, folder)}
    return made


def check_same_clients(tables: Table, resolved: Record) -> None:
    """Raise UserError if a private run takes constants from an analysis of other clients.

    Args:
        tables: The config with the key `data.standardize`, if it has it.
        resolved: Its resolved tables.
    """
    data = tables.get("data")
    if isinstance(data, Mapping) and "standardize" in data and "privacy" in resolved:
        folder = Path(str(data["standardize"]))
        refuse_other_clients(_read(folder / ANALYSIS_FILE).get("clients_of"), resolved, folder)


def _read(path: Path) -> Record:
    try:
        found: Record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"answers", "name", "mu", "unit", "trust", "adjacency"} - set(found)
        if missing:
            raise KeyError(min(missing))
        if found["mu"] is not None:
            _check_promise(found)
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error).rstrip(".")
        remedy = "Run fedpriv analyze first, and give its run directory"
        raise UserError(
            "data.standardize", f"a run directory with {ANALYSIS_FILE}", f"{path}: {reason}", remedy
        ) from None
    return found


def _check_promise(found: Record) -> None:
    """Raise an error unless a promise has known names, and numbers from 0."""
    trust_of(found["trust"])
    unit_name(found["unit"])
    adjacency_of(found["adjacency"])
    for key in ("mu", "colluders", "helpers"):
        value = found.get(key) or 0
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"{key} = {value!r}")


def _moments(found: Record, folder: Path) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation of each column that was asked about."""
    moments = [one for one in found["answers"].values() if one["kind"] == "moments" and not one.get("of_label")]
    if not moments:
        remedy = 'Add a query with kind = "moments" to its [analysis]'
        raise UserError("data.standardize", "an analysis with means and variances", str(folder), remedy)
    try:
        return {
            column: (mean, std)
            for answer in moments
            for column, mean, std in zip(*(answer[key] for key in ("columns", "mean", "std")), strict=True)
        }
    except (KeyError, ValueError, TypeError) as error:
        expected, remedy = "columns, mean and std of each answer", "Give the run directory of fedpriv analyze"
        raise UserError("data.standardize", expected, f"{folder}: {error!r}", remedy) from None


def _constants(data: Table, moments: Mapping[str, tuple[float, float]], folder: Path) -> dict[str, object]:
    numeric = data.get("numeric")
    if isinstance(numeric, Mapping):
        for column in moments:
            if column not in numeric:
                remedy = nearest(column, list(map(str, numeric)))
                raise UserError("data.numeric", f"the columns of {folder}", f"a table without {column}", remedy)
        return {"numeric": {**numeric, **{column: list(pair) for column, pair in moments.items()}}}
    if sorted(moments) != sorted(map(str, range(len(moments)))):
        remedy = "Ask about all columns of the arrays, or all channels"
        raise UserError("data.standardize", "moments of the columns 0, 1, ...", ", ".join(moments), remedy)
    ordered = [moments[str(place)] for place in range(len(moments))]
    return {"mean": [mean for mean, _ in ordered], "std": [std for _, std in ordered]}


def _cost(tables: Table, privacy: Table, found: Record, folder: Path) -> dict[str, object]:
    """Return the keys that record the cost of the analysis in the units of this run's promise."""
    if found["mu"] is None:
        remedy = "Repeat the analysis with the [privacy] of this run"
        raise UserError("data.standardize", "a private analysis in a private run", f"{folder} without noise", remedy)
    trust, unit = trust_of(str(privacy.get("trust", "central"))), str(privacy.get("unit", "client"))
    if trust_of(found["trust"]).reliance > trust.reliance:
        remedy = f'Repeat the analysis with privacy.trust = "{trust.name}"'
        expected = f"an analysis that promises something against the adversary of trust {trust.name}"
        raise UserError("data.standardize", expected, f'trust "{found["trust"]}" in {folder}', remedy)
    if (found["unit"], unit) == ("example", "client"):
        remedy = 'Repeat the analysis with privacy.unit = "client"'
        raise UserError("data.standardize", "an analysis that protects clients", f"unit example in {folder}", remedy)
    _refuse_more_colluders(tables, trust, found, folder)
    # A record changes a client: the promise to clients for records is that under replace.
    wanted = privacy.get("adjacency") or ("replace" if unit == "example" else _default_adjacency(tables, trust))
    dearer = found["adjacency"] == "add-or-remove" and (wanted == "replace" or found["unit"] != unit)
    mu = float(found["mu"]) * (REPLACE_FACTOR if dearer else 1.0)
    before = privacy.get("analyses_mu")
    earlier = privacy.get("analyses")
    names = [*(earlier if isinstance(earlier, list) else []), *(found.get("analyses") or [])]
    total = math.hypot(mu, before) if isinstance(before, int | float) else mu
    return {"analyses": [*names, f"the analysis {found['name']}"], "analyses_mu": total}


def _default_adjacency(tables: Table, trust: Trust) -> str:
    """Return the adjacency of a plan for clients that names none: timelines are accounted under replace alone."""
    schedule = tables.get("schedule")
    if not isinstance(schedule, Mapping) or "kind" not in schedule:
        return trust.default_adjacency
    kind = SCHEDULES.resolve(schedule["kind"], "schedule.kind")
    rule = read_table(kind, {key: value for key, value in schedule.items() if key != "kind"}, "schedule")
    return trust.default_adjacency if rule.draws_cohorts else "replace"


def _refuse_more_colluders(tables: Table, trust: Trust, found: Record, folder: Path) -> None:
    """Raise UserError if more clients or other helpers may collude in the run than in the analysis.

    One honest helper suffices, but it must be the same one in both.
    """
    if not (trust.secure_sums and trust_of(found["trust"]).secure_sums):
        return
    sums = tables.get("aggregation")
    given = dict(cast(Table, sums)) if isinstance(sums, Mapping) else {}
    colluders, helpers = given.get("colluders", 0), given.get("helpers", 1)
    if cast(int, colluders) > (found.get("colluders") or 0):
        remedy = f"Repeat the analysis with aggregation.colluders = {colluders}"
        expected = f"an analysis that allows {colluders} colluders"
        raise UserError("data.standardize", expected, f"{found.get('colluders') or 0} in {folder}", remedy)
    if helpers != (found.get("helpers") or 1):
        remedy = f"Repeat the analysis with the helpers of this run, aggregation.helpers = {helpers}"
        expected = "an analysis with the same helpers"
        raise UserError("data.standardize", expected, f"{found.get('helpers') or 1} in {folder}", remedy)
