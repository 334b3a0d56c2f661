"""Rows of a run as TensorBoard's event files, in the folder `tensorboard` of the run directory."""

import json
from collections.abc import Mapping
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from fedpriv.files import make_owners_folder
from fedpriv.tracking.trackers import Taken, Tracked

__all__ = ["Tracker", "prepare"]

FOLDER = "tensorboard"
# Shown beside the parameters of a run.
_METRICS = ("test_accuracy", "test_loss", "epsilon")


def prepare() -> str:
    """Needs nothing."""
    return ""


class Tracker:
    """One run's event files; each session adds one. See `tracking.Tracker`."""

    def begin(self, run: Tracked) -> Taken:
        """What the files that are there hold."""
        folder = run.folder / FOLDER
        sent: dict[str, int] = {}
        ended = False
        if folder.exists():
            found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
            sent = {tag: found.Scalars(tag)[-1].step for tag in found.Tags()["scalars"]}
            ended = "summary.json/text_summary" in found.Tags()["tensors"]
        if run.diagnostics and not ended:
            make_owners_folder(folder)
        self._writer = SummaryWriter(str(folder)) if not ended else None
        if self._writer is not None and not sent:
            parameters = {key: _plain(value) for key, value in run.parameters.items()}
            writer = self._writer._get_file_writer()
            assert writer is not None
            for part in hparams(parameters, dict.fromkeys(map(run.name_of, _METRICS), 0.0)):
                writer.add_summary(part)
        return Taken(sent, finished=ended)

    def row(self, round: int, figures: Mapping[str, float]) -> None:
        """Scalars at step `round`."""
        if self._writer is not None:
            for key, value in figures.items():
                self._writer.add_scalar(key, value, round)

    def end(self, status: str, texts: Mapping[str, str], summary: Mapping[str, Any]) -> None:
        """Texts of a run that is finished, and the end of the file."""
        del summary
        if self._writer is not None:
            for name, text in texts.items() if status == "finished" else ():
                self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()))
            self._writer.close()


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
