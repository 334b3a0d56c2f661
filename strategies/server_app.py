"""The ServerApp that runs fedpriv's experiments: `serverapp = "strategies.server_app:app"`.

It writes the same run directory, with the same numbers, as the engines in process.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedpriv.deploy.parties import helper_list
from fedpriv.deploy.server import refuse_full_disk, run_turns, take_up, with_secret_streams
from fedpriv.errors import UserError
from fedpriv.experiment.build import Experiment
from fedpriv.experiment.recorder import Recorder
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.files import write_atomically
from fedpriv.flower.messages import ARRAYS, ModelArrays
from fedpriv.flower.run_config import TEST_SEEDED, RunConfig
from fedpriv.flower.server.attendance import Attendance

from .method_strategy import MethodStrategy

__all__ = ["app"]

_log = logging.getLogger("flwr")
_JOIN_SECONDS = 60.0

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names.

    The run config has the keys of `RunConfig`, and keys set by the launcher: `claimed` if the run directory already
    belongs to this run; `failure-report`, a file for the error line of a failed run; `deployed` if clients are devices
    with local memories; `resume` if the run directory may hold a part of this run; `wait` if the first turn waits for
    all clients; `helpers` and `enrolled`, see `helper_list`; and `test-seeded`, for tests alone.
    """
    try:
        (_run_deployed if context.run_config.get("deployed") else _run)(grid, context)
    except (UserError, OSError) as error:
        report = context.run_config.get("failure-report")
        if report and Path(str(report)).parent.is_dir():
            write_atomically(Path(str(report)), _line_of(error))
        raise


def _line_of(error: UserError | OSError) -> str:
    """Return the error line of a failed run."""
    if isinstance(error, UserError):
        return str(error)
    where = error.filename or "the run directory"
    return f"{where}: {error.strerror or error}. Free some room or repair the folder, then resume with --resume."


def _run(grid: Grid, context: Context) -> None:
    run = RunConfig.of(context.run_config)
    config = run.load()
    config.check_only_sampled_answer()
    experiment = run.assemble(config)
    directory = RunDirectory(run.run_directory(f"{config.name}-{context.run_id}"))
    with directory.locked():
        directory.claim(config.to_toml(), config.digest, resume=bool(context.run_config.get("claimed", False)))
        recorder = Recorder(experiment, directory, {"engine": "flower", "client_noise": "faithful"})
        recorder.begin()
        strategy = make_strategy(experiment)
        strategy.rescue_folder = directory.path
        strategy.start(
            grid,
            ArrayRecord({ARRAYS: experiment.initial_model}),
            num_rounds=config.training.rounds,
            train_config=ConfigRecord({"experiment": config.digest}),
            evaluate_fn=_recorder(recorder, strategy),
        )
        recorder.finish(strategy.state)
    _log.info("The run is in %s", directory.path)


def _run_deployed(grid: Grid, context: Context) -> None:
    run = RunConfig.of(context.run_config)
    config = run.load()
    config.check_deployable()
    resume = bool(context.run_config.get("resume", False))
    seeded = bool(context.run_config.get("test-seeded", False)) and os.environ.get(TEST_SEEDED) == "1"
    experiment = run.assemble(config)
    if not seeded:
        experiment = with_secret_streams(experiment)
    directory = RunDirectory(run.run_directory(f"{config.name}-{context.run_id}"))
    refuse_full_disk(directory.path, experiment)
    with directory.locked():
        if directory.claim(config.to_toml(), config.digest, resume=resume) is not None:
            return
        ran = {"engine": "deployment", "client_noise": "faithful"}
        recorder = Recorder(experiment, directory, ran, randomness="seeded" if seeded else "system", deployed=True)
        coordinator = take_up(experiment, directory, recorder, helper_list(context.run_config))
        _log.info("%s", directory.file("privacy.txt").read_text(encoding="utf-8"))
        arrays = ModelArrays.of(ArrayRecord({ARRAYS: experiment.initial_model}))
        wait = bool(context.run_config.get("wait", False))
        run_turns(grid, experiment, coordinator, arrays, recorder, directory, wait_for_all=wait)
    _log.info("The run is in %s", directory.path)


class RecordedStrategy(MethodStrategy):
    """The strategy of an experiment: every client has to answer, as with any engine. The recorder reports the rest."""

    def refuse_nothing_learned(self) -> None:
        """Do nothing: the recorder records the run in any case."""

    def _new_attendance(self, rounds: int) -> Attendance:
        remedy = "Fix it and start again with another --out, or with --engine loop, which needs no Flower"
        return replace(super()._new_attendance(rounds), remedy=remedy)


def make_strategy(experiment: Experiment) -> MethodStrategy:
    """Return the strategy under the experiment's agreement."""
    return RecordedStrategy(
        lambda *_: experiment.agreement,
        num_clients=experiment.population.federation.population,
        join_timeout=_JOIN_SECONDS,
        max_failures=0.0,
    )


def _recorder(recorder: Recorder, strategy: MethodStrategy) -> Callable[[int, ArrayRecord], MetricRecord | None]:
    """Return the function that writes the records; Flower calls it with the first model and after every round."""

    def record(server_round: int, arrays: ArrayRecord) -> None:  # noqa: ARG001
        if server_round == 0:
            recorder.initial(strategy.state.model)
        else:
            recorder.after_round(server_round, strategy.state, strategy.total, None)

    return record
