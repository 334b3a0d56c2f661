"""Run an experiment in process: the loop over rounds, checkpoints and resumption."""

import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedpriv.checks import a_path, an_object, at_least_one, true_or_false
from fedpriv.engines import Engine
from fedpriv.experiment.build import Experiment, assemble
from fedpriv.experiment.config import Config, load_config
from fedpriv.experiment.execution import ENGINE_FILE, EngineName, Execution, read_record, start_engine
from fedpriv.experiment.recorder import OLDER, Recorder
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.experiment.timing import Versions
from fedpriv.experiment.watching import Watcher
from fedpriv.methods import ServerState
from fedpriv.rounds import begin_round, finish_round, skip_round
from fedpriv.tables import Record

__all__ = ["run_experiment"]

_log = logging.getLogger("fedpriv")


def run_experiment(
    config: Config | Path | str,
    out: Path | str,
    *,
    engine: EngineName = "auto",
    device: str = "cpu",
    data_root: Path | None = None,
    resume: bool = False,
    watch: Watcher | None = None,
    checkpoint_every: int | None = None,
    execution: Execution | None = None,
) -> Record:
    """Run an experiment and return its summary.

    Args:
        config: The experiment, or the path of its TOML file.
        out: The run directory.
        engine: `auto`, `loop`, `vectorized` or `ray`; `auto` measures and chooses.
        device: The device that computes gradients.
        data_root: The folder of the data sets; None uses the environment's setting.
        resume: Resume from the checkpoint in `out`, if there is one.
        watch: Called after every round with the recorded values. Raise `StopRun` in it to save and end the run.
        checkpoint_every: Rounds between checkpoints; None writes one about every ten seconds.
        execution: Workers, memory, noise and precision; its engine is `engine`.

    Raises:
        UserError: For any mistake that the user can fix. Earlier results are never lost.
    """
    config = config if isinstance(config, Config) else load_config(config)
    directory = RunDirectory(a_path("out", out))
    data_root = None if data_root is None else a_path("data_root", data_root)
    device = str(device) if isinstance(device, torch.device) else device
    true_or_false("resume", resume)
    if checkpoint_every is not None:
        at_least_one("--checkpoint-every", checkpoint_every, "Give a number of rounds")
    for name, value, member, example in (
        ("watch", watch, "__call__", "a function of two tables"),
        ("execution", execution, "client_noise", "fedpriv.Execution()"),
    ):
        if value is not None:
            an_object(name, value, member, example)
    execution = replace(execution or Execution(), engine=engine).completed(
        read_record(directory) if resume else None, begun=resume and directory.checkpoint.path.exists()
    )
    channels_last, precision = bool(execution.channels_last), execution.precision or "float32"
    experiment = assemble(config, device=device, data_root=data_root, channels_last=channels_last, precision=precision)
    if precision == "bfloat16" and torch.device(device).type == "cpu" and not _multiplies_bfloat16():
        _log.warning("--precision bfloat16: this processor has no instructions for it; float32 is faster")
    with directory.locked():
        done = directory.claim(config.to_toml(), config.digest, resume=resume)
        if done is not None:
            return done
        runner, ran = start_engine(experiment, execution)
        with closing(runner):
            record = {**ran.as_dict(), "device": device, "channels_last": channels_last, "precision": precision}
            often = {"watch": watch, "checkpoint_every": checkpoint_every}
            recorder = Recorder(experiment, directory, record, forward=runner.forward, **often)
            return _run(experiment, runner, recorder, directory)


def _multiplies_bfloat16() -> bool:
    """Return True if PyTorch multiplies bfloat16 on this processor without converting it."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _run(experiment: Experiment, engine: Engine, recorder: Recorder, directory: RunDirectory) -> Record:
    start, state, versions = _take_up(experiment, engine, directory, recorder.promise)
    directory.write_json(ENGINE_FILE, recorder.ran)
    recorder.begin()
    recorder.replayed(start)
    if start == 0 and not directory.rows("rounds.jsonl"):
        recorder.initial(state.model)
    for number in range(start + 1, experiment.config.training.rounds + 1):
        spent = experiment.server.filtered(state)
        if spent is not None and spent.stopped:
            break
        if versions is None:
            total = engine.sum_messages(begin_round(experiment.server, state, number))
        else:
            total = versions.total(engine, experiment.server, number)
        if total.void:
            state = skip_round(experiment.server, state)
        else:
            state = finish_round(experiment.server, state, number, total.sum)
        if versions is not None:
            versions.moved(number, state.model)
        older = {} if versions is None else versions.older_than(number)
        recorder.after_round(number, state, total, engine.save, older=older)
    return recorder.finish(state)


def _take_up(
    experiment: Experiment, engine: Engine, directory: RunDirectory, promise: str
) -> tuple[int, ServerState, Versions | None]:
    """Return the last saved round, the state after it and, on the virtual clock, the models still in use by clients.

    Restores the clients' states in the engine.
    """
    last, state = 0, experiment.server.init(experiment.initial_model)
    older: dict[int, Tensor] = {}
    saved = directory.saved(experiment.config.digest, promise)
    if saved is not None:
        last, server, client = saved
        engine.restore(client)
        older = {int(name.removeprefix(OLDER)): server.pop(name) for name in list(server) if name.startswith(OLDER)}
        state = _state_like(state, server)
    if experiment.timeline is None:
        return last, state, None
    versions = Versions(experiment.timeline, older)
    versions.moved(last, state.model)
    return last, state, versions


def _state_like(fresh: ServerState, tensors: dict[str, Tensor]) -> ServerState:
    return type(fresh)(**tensors)
