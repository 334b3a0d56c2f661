"""Log a run to MLflow: to the store in MLFLOW_TRACKING_URI, or to MLflow's default."""

import json
import logging
import os
import time
from collections.abc import Mapping

# Otherwise MLflow would report its usage to its makers.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.tables import Table
from fedpriv.tracking.trackers import Ended, Taken, Tracked

__all__ = ["Tracker", "prepare"]

# In the run directory: the ids of its MLflow run and store.
FILE = "mlflow.json"
_MAX_LENGTH = 500
_AT_ONCE = 100
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "killed": "KILLED"}


def prepare() -> str:
    """Prepare store and experiment before several processes need them at once; return the store."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    store = mlflow.get_tracking_uri()
    _experiment(MlflowClient(store))
    return store


class Tracker:
    """One MLflow run; a later session resumes it. See `trackers.Tracker`."""

    def begin(self, run: Tracked) -> Taken:
        """Resume the run named in the run directory, or create a new one."""
        directory = RunDirectory(run.folder)
        self._client = MlflowClient(run.store)
        known = directory.read_json(FILE)
        if known is not None and known["store"] == run.store:
            self._run = str(known["run"])
            found = self._client.get_run(self._run)
            if found.info.status == "FINISHED":
                return Taken({}, finished=True)
            self._client.update_run(self._run, status="RUNNING")
            return Taken({key: self._last_step(key) for key in found.data.metrics})
        tags = {"fedpriv.digest": run.digest, "fedpriv.folder": str(run.folder.resolve())}
        tags |= {"fedpriv.sweep": run.group} if run.group else {}
        made = self._client.create_run(_experiment(self._client), run_name=run.name, tags=tags)
        self._run = str(made.info.run_id)
        directory.write_json(FILE, {"store": run.store, "run": self._run})
        parameters = [Param(key, _text(value)) for key, value in run.parameters.items()]
        for start in range(0, len(parameters), _AT_ONCE):
            self._client.log_batch(self._run, params=parameters[start : start + _AT_ONCE])
        return Taken({})

    def row(self, round: int, metrics: Mapping[str, float]) -> None:
        """Log metrics at step `round`."""
        now = time.time_ns() // 1_000_000
        self._client.log_batch(self._run, metrics=[Metric(key, value, now, round) for key, value in metrics.items()])

    def end(self, status: Ended, texts: Mapping[str, str], summary: Table) -> None:
        """Log texts as artifacts, and the run's status."""
        del summary
        for name, text in texts.items():
            self._client.log_text(self._run, text, name)
        self._client.set_tag(self._run, "fedpriv.status", status)
        self._client.set_terminated(self._run, _STATUS[status])

    def _last_step(self, key: str) -> int:
        return max(metric.step for metric in self._client.get_metric_history(self._run, key))


def _experiment(client: MlflowClient) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedpriv")
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException:  # another process has just created it
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _text(value: object) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:_MAX_LENGTH]
