"""Run an experiment in this process, on Ray, in Flower's simulation, or on real devices."""

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from fedpriv.checks import a_path, at_least_one
from fedpriv.experiment import run
from fedpriv.experiment.config import Config, load_config
from fedpriv.experiment.execution import EngineName, Execution
from fedpriv.experiment.watching import Watcher
from fedpriv.tables import Record

if TYPE_CHECKING:
    from fedpriv.deploy.run import Connection

__all__ = ["run_experiment"]


class _Common(TypedDict):
    device: str
    data_root: Path | None
    resume: bool
    watch: Watcher | None


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
    deploy: "str | Connection | None" = None,
) -> Record | None:
    """Run an experiment and return its summary.

    Args:
        config: The experiment, or the path of its TOML file.
        out: The run directory.
        engine: `auto`, `loop`, `vectorized`, `ray` or `flower` (Flower's simulation); `auto` measures and chooses.
        device: The device that computes gradients: `cpu`, `cuda`, `cuda:1`, ...
        data_root: The folder of the data sets; None uses the environment's setting.
        resume: Resume from the checkpoint in `out`, if there is one.
        watch: Called after every round with the recorded values; raise `StopRun` in it to save and end the run.
        checkpoint_every: Rounds between checkpoints; None writes one about every ten seconds.
        execution: Workers, memory, noise and precision for the in-process and Ray engines; its engine is `engine`.
        deploy: The folder `admin` of a deployment, or the name of a Flower connection, to run on real devices.

    Returns:
        The contents of `summary.json`; None if the run directory is on the server of a deployment, another machine.

    Raises:
        UserError: For any mistake that the user can fix. Earlier results are never lost.
    """
    config = config if isinstance(config, Config) else load_config(config)
    out = a_path("out", out)
    device = str(device) if isinstance(device, torch.device) else device
    data_root = None if data_root is None else a_path("data_root", data_root)
    if checkpoint_every is not None:
        at_least_one("--checkpoint-every", checkpoint_every, "Give a number of rounds")
    common: _Common = {"device": device, "data_root": data_root, "resume": resume, "watch": watch}
    if deploy is not None:
        from fedpriv.deploy.run import run_deployed

        return run_deployed(config, out, deploy, **common)
    if engine == "flower":
        from fedpriv.flower.launch import run_with_flower

        return run_with_flower(config, out, **common)
    return run.run_experiment(
        config, out, engine=engine, checkpoint_every=checkpoint_every, execution=execution, **common
    )
