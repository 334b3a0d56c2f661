"""Rows of a run in Weights & Biases: where and how as its own environment variables (WANDB_MODE ...) say."""

import os
import secrets
from collections.abc import Mapping
from typing import Any

import wandb

from fedpriv.experiment.run_directory import RunDirectory, flat_tables
from fedpriv.files import make_owners_folder
from fedpriv.tracking.trackers import Taken, Tracked

__all__ = ["Tracker", "prepare"]

# Where a run directory keeps the run's id, and the last round that was handed over: off line there is nobody to ask.
FILE = "wandb.json"


def prepare() -> str:
    """Needs nothing; its own errors come when a run begins."""
    return ""


class Tracker:
    """One run of W&B; a session that follows goes on with its id. See `tracking.Tracker`."""

    def begin(self, run: Tracked) -> Taken:
        """The run that the run directory names, else a new one."""
        self._directory = RunDirectory(run.folder)
        self._known = self._directory.read_json(FILE) or {"id": secrets.token_hex(4), "round": -1, "ended": False}
        if self._known["ended"]:
            return Taken({}, finished=True)
        if run.diagnostics:
            make_owners_folder(run.folder / "wandb")
        # Nothing of the machine, its screen or its git is sent.
        settings = wandb.Settings(
            root_dir=str(run.folder),
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            disable_job_creation=True,
            x_disable_stats=True,
            x_disable_meta=True,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedpriv"),
            id=self._known["id"],
            name=run.name,
            group=run.group,
            config=run.parameters,
            resume="allow",
            reinit="create_new",
            settings=settings,
        )
        self._directory.write_json(FILE, self._known)
        return Taken({}, rounds=int(self._known["round"]))

    def row(self, round: int, figures: Mapping[str, float]) -> None:
        """Metrics at step `round`, noted down before they are handed over."""
        self._known["round"] = round
        self._directory.write_json(FILE, self._known)
        self._run.log(dict(figures), step=round)

    def end(self, status: str, texts: Mapping[str, str], summary: Mapping[str, Any]) -> None:
        """Summary and privacy statement, and the end of the session."""
        flat = {key: value for key, value in flat_tables(dict(summary)).items() if value is not None}
        statement = {"privacy": texts["privacy.txt"]} if "privacy.txt" in texts else {}
        self._run.summary.update({**flat, **statement, "status": status})
        self._run.finish(exit_code=int(status in ("failed", "killed")))
        self._known["ended"] = status == "finished"
        self._directory.write_json(FILE, self._known)
