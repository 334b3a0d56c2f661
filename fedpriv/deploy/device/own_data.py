"""Training data of a device: its own file, or its part of the experiment's data set."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpriv.deploy.device.device import Device
from fedpriv.engines import one_thread
from fedpriv.errors import UserError
from fedpriv.experiment.build import build_module, check_device, count_parameters
from fedpriv.experiment.config import Config
from fedpriv.flower.messages import ClientInstructions, RunTerms
from fedpriv.flower.refusals import Refusal
from fedpriv.flower.run_config import RunConfig
from fedpriv.plugins import only_known
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import batches_of, make_signal
from fedpriv.tasks.task import Task

__all__ = ["own_signal", "read_own_data"]


def own_signal(
    device: Device, run: RunConfig, instructions: ClientInstructions, terms: RunTerms, model: Tensor
) -> Tensor:
    """Return the client's message without privacy, `[params]`, on the CPU.

    Raises:
        Refusal: If the experiment differs from the one in the terms, or the policy does not accept it.
        UserError: If the data are missing.
    """
    with only_known():  # the server wrote the text, which must not name modules for this device to import
        config = run.load()
    if config.digest != terms.digest:
        expected = f"experiment {terms.digest[:12]} of the terms"
        raise Refusal("model", "experiment", expected, f"experiment {config.digest[:12]}", "Start the run again")
    device.policy.check_experiment(config)
    with one_thread():
        if device.policy.data.own:
            path = device.folder.parent / Path(device.policy.data.own).expanduser()
            return _signal_of_file(path, run, config, instructions, terms, model)
        # The server wrote the config: check the size of its model before allocating anything for it.
        population = run.assemble_clients(config, check_size=lambda size: _refuse_other_size(size, model))
        if not instructions.client < population.federation.population:
            expected = f"a client below {population.federation.population}"
            remedy = "Start the nodes with the client ids of the experiment"
            raise Refusal("model", "instructions", expected, instructions.client, remedy)
        return population.signal(instructions.client, model.to(population.task.device), terms.turn).cpu()


def read_own_data(path: Path) -> tuple[Tensor, Tensor, int]:
    """Return inputs float32 `[examples, ...]`, labels int64 `[examples]` and the number of classes.

    Raises:
        UserError: If the file is not an .npz file with valid `inputs`, `labels` and `classes`.
    """
    expected = "an .npz file with inputs (floats), labels (whole numbers from 0) and classes (a whole number)"
    remedy = "Write it with numpy.savez(path, inputs=..., labels=..., classes=...)"
    try:
        with np.load(path, allow_pickle=False) as file:
            inputs, labels, classes = file["inputs"], file["labels"], int(file["classes"])
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(str(path), expected, str(error), remedy) from None
    sound = inputs.ndim >= 2 and labels.shape == inputs.shape[:1] and len(labels) > 0 and labels.dtype.kind in "iu"
    if not sound or not np.isfinite(inputs).all() or labels.min() < 0 or labels.max() >= classes:
        got = f"inputs {list(inputs.shape)}, labels {list(labels.shape)} of {labels.dtype}, {classes} classes"
        raise UserError(str(path), expected, got, remedy)
    return torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(labels.astype(np.int64)), classes


def _signal_of_file(
    path: Path, run: RunConfig, config: Config, instructions: ClientInstructions, terms: RunTerms, model: Tensor
) -> Tensor:
    check_device(run.device)
    inputs, labels, classes = read_own_data(path)
    shape = tuple(inputs.shape[1:])
    _refuse_other_size(count_parameters(config, shape, classes), model)
    task = Task(build_module(config, shape, classes, 0), run.device)
    batches = batches_of(config.local, SeededStreams(config.seed), len(labels), terms.turn, instructions.client)
    at = model.to(task.device)
    given = inputs.to(task.device), labels.to(task.device)
    return make_signal(task, at, *given, config.local, batches).cpu()


def _refuse_other_size(size: int, model: Tensor) -> None:
    if size != len(model):
        expected = "as many parameters as the experiment's model has on this client's data"
        raise Refusal("model", "model", expected, f"{len(model):,}", "Give server and clients data of the same shape")
