"""Running an experiment in process: the loop over rounds, checkpoint and resumption."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpriv.engines import Engine
from fedpriv.experiment.assemble import Experiment, assemble
from fedpriv.experiment.config import Config, load_config
from fedpriv.experiment.engines import ENGINE_FILE, Execution, read_record, start_engine
from fedpriv.experiment.journal import Journal, Watcher
from fedpriv.experiment.records import RunDirectory
from fedpriv.methods import ServerState
from fedpriv.rounds import begin_round, finish_round

__all__ = ["run_experiment"]


def run_experiment(
    config: Config | Path | str,
    out: Path | str,
    *,
    engine: str = "auto",
    device: str = "cpu",
    data_root: Path | None = None,
    resume: bool = False,
    watch: Watcher | None = None,
    checkpoint_every: int | None = None,
    execution: Execution | None = None,
) -> dict[str, Any]:
    """Runs an experiment and returns its summary.

    Args:
        config: The experiment, or the path of its TOML file.
        out: The run directory.
        engine: `auto`, `loop`, `vectorized` or `ray`; `auto` measures and chooses.
        device: Where gradients are computed.
        data_root: Where data sets lie; None for the environment's choice.
        resume: Whether `out` may hold a part of this experiment, which is then gone on with.
        watch: Called after every round with what was recorded.
        checkpoint_every: Rounds from one checkpoint to the next; None writes one about every ten seconds.
        execution: Workers, memory, noise and precision; its engine is `engine`.

    Raises:
        UserError: On anything that the user can mend; nothing of an earlier run is lost.
    """
    config = config if isinstance(config, Config) else load_config(config)
    directory = RunDirectory(Path(out))
    execution = replace(execution or Execution(), engine=engine).completed(
        read_record(directory) if resume else None, begun=resume and directory.checkpoint.path.exists()
    )
    options = {"channels_last": bool(execution.channels_last), "precision": str(execution.precision)}
    experiment = assemble(config, device=device, data_root=data_root, **options)
    with directory.locked():
        done = directory.claim(config.to_toml(), config.digest, resume=resume)
        if done is not None:
            return done
        runner, ran = start_engine(experiment, execution)
        with closing(runner):
            record = {**ran.as_dict(), "device": device, **options}
            journal = Journal(experiment, directory, record, watch=watch, checkpoint_every=checkpoint_every)
            return _run(experiment, runner, journal, directory)


def _run(experiment: Experiment, engine: Engine, journal: Journal, directory: RunDirectory) -> dict[str, Any]:
    start, state = _take_up(experiment, engine, directory, journal.promise)
    directory.write_json(ENGINE_FILE, journal.ran)
    journal.begin()
    journal.replayed(start)
    if start == 0 and not directory.rows("rounds.jsonl"):
        journal.initial(state.model)
    for number in range(start + 1, experiment.config.training.rounds + 1):
        total = engine.sum_messages(begin_round(experiment.server, state, number))
        state = finish_round(experiment.server, state, number, total.sum)
        journal.after_round(number, state, total, engine.save)
    return journal.finish(state)


def _take_up(experiment: Experiment, engine: Engine, directory: RunDirectory, promise: str) -> tuple[int, ServerState]:
    """The last round that is safe, and the state after it; clients' states go back to the engine."""
    fresh = experiment.config.method.init_server(experiment.initial_model)
    saved = directory.checkpoint.read(experiment.config.digest, promise)
    if saved is None:
        return 0, fresh
    last, server, client = saved
    engine.restore(client)
    return last, _state_like(fresh, server)


def _state_like(fresh: ServerState, tensors: dict[str, Tensor]) -> ServerState:
    return type(fresh)(**tensors)
