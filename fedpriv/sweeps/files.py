"""What lies in the folder of a sweep, and what the files of a trial say about it."""

from pathlib import Path

__all__ = ["CHOSEN", "DRAWN", "FAILURE", "GROUPS", "STOPPED", "TABLE", "TRIALS", "TUNED", "status_of"]

TRIALS = "trials"
"""The folder of the trials' run directories."""

TABLE = "trials.csv"
GROUPS = "groups.json"
CHOSEN = "tuning.json"
DRAWN = "drawn.json"

FAILURE = "failure.json"
"""In a trial's directory: why it failed."""

STOPPED = "stopped.json"
"""In a trial's directory: why it was not worth its remaining rounds."""

TUNED = {"method": "name", "local": "work", "server": "optimizer"}
"""Tables of a config that whoever tunes chooses, and the key of each that says whose numbers the others are."""


def status_of(folder: Path) -> str:
    """`done`, `stopped` or `failed`; empty for a trial that is still to be run, or gone on with."""
    files = (("summary.json", "done"), (STOPPED, "stopped"), (FAILURE, "failed"))
    return next((status for file, status in files if (folder / file).exists()), "")
