"""The runs of each setting, for the page: names, scores, and links to their folders."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict
from urllib.parse import quote

from fedpriv.report import words
from fedpriv.report.study import Study
from fedpriv.sweeps.files import TRIALS

__all__ = ["Run", "runs_of"]


class Run(TypedDict):
    """A run of a setting, as text; `link` is relative to the page, and empty if the page lies outside the study."""

    name: str
    seed: str
    score: str
    link: str


def runs_of(study: Study, root: Path | None, folder: Path) -> Mapping[int, list[Run]]:
    """Return the runs of each setting, by its number.

    Args:
        study: The study.
        root: The folder that the study was read from; None if unknown, without links then.
        folder: The folder of the page.
    """
    column, unit = f"test_{study.metric.name}", " %" if study.metric.bounded else ""
    inside = root is not None and folder.resolve().is_relative_to(root.resolve())
    made: dict[int, list[Run]] = {}
    for row in study.runs.sort_values(["setting", "seed", "run"], kind="stable").to_dict("records"):
        value = row[column]
        made.setdefault(int(row["setting"]), []).append(
            Run(
                name=str(row["run"]),
                seed=words.number(row["seed"]),
                score="–" if value != value else words.shown(value, study.metric) + unit,
                link=_link(str(row["run"]), root, folder) if inside and root is not None else "",
            )
        )
    return made


def _link(run: str, root: Path, folder: Path) -> str:
    """Return the address of a run's folder, relative to the page; empty if it is not there."""
    for place in (root / TRIALS / run, root / run, root):
        if (place / "config.toml").exists():
            return quote(Path(os.path.relpath(place.resolve(), folder.resolve())).as_posix()) + "/"
    return ""
