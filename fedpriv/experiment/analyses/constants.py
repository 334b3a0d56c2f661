"""Constants of a training from the answers of an analysis: `[data] standardize = "DIR"`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from fedpriv.errors import UserError, nearest
from fedpriv.experiment.analyses.answers_file import ANALYSIS_FILE
from fedpriv.privacy import REPLACE_FACTOR, trust_of
from fedpriv.tables import Record, Table

__all__ = ["standardized"]


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
        made["privacy"] = {**privacy, **_cost(privacy, found, folder)}
    return made


def _read(path: Path) -> Record:
    try:
        found: Record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"answers", "name", "mu", "unit", "trust", "adjacency"} - set(found)
        if missing:
            raise KeyError(min(missing))
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Run fedpriv analyze first, and give its run directory"
        raise UserError(
            "data.standardize", f"a run directory with {ANALYSIS_FILE}", f"{path}: {error}", remedy
        ) from None
    return found


def _moments(found: Record, folder: Path) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation of each column that was asked about."""
    moments = [answer for answer in found["answers"].values() if answer["kind"] == "moments"]
    if not moments:
        remedy = 'Add a query with kind = "moments" to its [analysis]'
        raise UserError("data.standardize", "an analysis with means and variances", str(folder), remedy)
    return {
        column: (mean, std)
        for answer in moments
        for column, mean, std in zip(*(answer[key] for key in ("columns", "mean", "std")), strict=True)
    }


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


def _cost(privacy: Table, found: Record, folder: Path) -> dict[str, object]:
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
    # A record changes a client: the promise to clients for records is that under replace.
    wanted = privacy.get("adjacency") or ("replace" if unit == "example" else trust.default_adjacency)
    dearer = found["adjacency"] == "add-or-remove" and (wanted == "replace" or found["unit"] != unit)
    mu = float(found["mu"]) * (REPLACE_FACTOR if dearer else 1.0)
    before = privacy.get("analyses_mu")
    earlier = privacy.get("analyses")
    names = [*(earlier if isinstance(earlier, list) else []), f"the analysis {found['name']}"]
    total = math.hypot(mu, before) if isinstance(before, float) else mu
    return {"analyses": names, "analyses_mu": total}
