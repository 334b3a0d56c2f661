"""Log a run as TensorBoard event files, in the folder `tensorboard` of the run directory."""

import json
from collections.abc import Mapping

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from fedpriv.files import make_owners_folder
from fedpriv.tables import Table
from fedpriv.tracking.trackers import Ended, Taken, Tracked

__all__ = ["Tracker", "prepare"]

FOLDER = "tensorboard"


def prepare() -> str:
    """Return an empty store: nothing needs preparing."""
    return ""


class Tracker:
    """One run's event files; each session adds one. See `trackers.Tracker`."""

    def begin(self, run: Tracked) -> Taken:
        """Return the contents of the existing event files."""
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
            for part in hparams(parameters, dict.fromkeys(map(run.name_of, (*run.scores, "epsilon")), 0.0)):
                writer.add_summary(part)
        return Taken(sent, finished=ended)

    def row(self, round: int, metrics: Mapping[str, float]) -> None:
        """Log scalars at step `round`."""
        if self._writer is not None:
            for key, value in metrics.items():
                self._writer.add_scalar(key, value, round)

    def end(self, status: Ended, texts: Mapping[str, str], summary: Table) -> None:
        """Log texts if the run is finished, and close the file."""
        del summary
        if self._writer is not None:
            for name, text in texts.items() if status == "finished" else ():
                self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()))
            self._writer.close()


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
