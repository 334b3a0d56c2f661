"""Storage of the model of a run that ends with an error, since its privacy budget is spent."""

import logging
from pathlib import Path

from flwr.app import ArrayRecord
from safetensors import SafetensorError
from safetensors.numpy import save_file

__all__ = ["rescue"]

_log = logging.getLogger("flwr")


def rescue(model: ArrayRecord, rounds: int, folder: Path) -> Path | None:
    """Store a model, log its file and return it; None if no round was finished, or if the model cannot be written.

    Args:
        model: Model after the last finished round.
        rounds: Number of finished rounds.
        folder: Folder of the file; existing files are not replaced.
    """
    if rounds == 0:
        return None
    try:
        file = _free(folder.resolve(), f"fedpriv-model-after-round-{rounds}")
        save_file({name: array.numpy().copy() for name, array in model.items()}, file)
    except (OSError, SafetensorError, KeyError) as error:
        _log.error("The model after round %d could not be stored: %s", rounds, error)
        return None
    _log.error("The run ends early. The model after round %d is in %s", rounds, file)
    return file


def _free(folder: Path, name: str) -> Path:
    """Return a file that does not exist yet."""
    number, file = 1, folder / f"{name}.safetensors"
    while file.exists():
        number += 1
        file = folder / f"{name}-{number}.safetensors"
    return file
