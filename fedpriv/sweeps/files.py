"""Names of the files in a sweep's folder, and the status of a trial according to its files."""

from pathlib import Path

__all__ = ["CHOSEN", "DRAWN", "FAILURE", "GROUPS", "STOPPED", "TABLE", "TRIALS", "TUNED", "status_of"]

TRIALS = "trials"
"""The folder of the trials' run directories."""

TABLE = "trials.csv"
GROUPS = "groups.json"
CHOSEN = "tuning.json"
DRAWN = "drawn.json"

FAILURE = "failure.json"
"""In a trial's directory: the reason why it failed."""

STOPPED = "stopped.json"
"""In a trial's directory: the reason why it was stopped early."""

TUNED = {"method": "name", "local": "work", "server": "optimizer"}
"""Config tables that tuning may change, and the key of each that identifies the component with those settings."""


def status_of(folder: Path) -> str:
    """Return `done`, `stopped` or `failed`; empty for a trial that has not started or can be resumed."""
    files = (("summary.json", "done"), (STOPPED, "stopped"), (FAILURE, "failed"))
    return next((status for file, status in files if (folder / file).exists()), "")
