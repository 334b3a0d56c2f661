"""Log a run to Weights & Biases, configured by its environment variables (WANDB_MODE ...)."""

import os
import secrets
from collections.abc import Mapping

import wandb

from fedpriv.experiment.run_directory import RunDirectory, flat_tables
from fedpriv.files import make_owners_folder
from fedpriv.tables import Table
from fedpriv.tracking.trackers import Ended, Taken, Tracked

__all__ = ["Tracker", "prepare"]

# In the run directory: the run's id and the last round handed over, because offline no server can be asked.
FILE = "wandb.json"


def prepare() -> str:
    """Return an empty store: nothing needs preparing, and W&B reports errors when a run begins."""
    return ""


class Tracker:
    """One W&B run; a later session resumes it by id. See `trackers.Tracker`."""

    def begin(self, run: Tracked) -> Taken:
        """Resume the run named in the run directory, or create a new one."""
        self._directory = RunDirectory(run.folder)
        self._known = self._directory.read_json(FILE) or {"id": secrets.token_hex(4), "round": -1, "ended": False}
        if self._known["ended"]:
            return Taken({}, finished=True)
        if run.diagnostics:
            make_owners_folder(run.folder / "wandb")
        # Send nothing about the machine, its console or its git repository.
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

    def row(self, round: int, metrics: Mapping[str, float]) -> None:
        """Log metrics at step `round`; the round is recorded before they are handed over."""
        self._known["round"] = round
        self._directory.write_json(FILE, self._known)
        self._run.log(dict(metrics), step=round)

    def end(self, status: Ended, texts: Mapping[str, str], summary: Table) -> None:
        """Log summary and privacy statement, and end the session."""
        flat = {key: value for key, value in flat_tables(dict(summary)).items() if value is not None}
        statement = {"privacy": texts["privacy.txt"]} if "privacy.txt" in texts else {}
        self._run.summary.update({**flat, **statement, "status": status})
        self._run.finish(exit_code=int(status in ("failed", "killed")))
        self._known["ended"] = status == "finished"
        self._directory.write_json(FILE, self._known)
