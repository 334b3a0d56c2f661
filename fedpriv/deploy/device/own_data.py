"""What a device trains on: a file of its own, or its part of the experiment's data set."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpriv.data.own import labelled_arrays
from fedpriv.data.user_files import read_arrays
from fedpriv.deploy.device.member import Member
from fedpriv.engines import one_thread
from fedpriv.errors import UserError
from fedpriv.experiment.build import build_module, check_device, count_parameters
from fedpriv.experiment.config import Config
from fedpriv.flower.messages import Order, Terms
from fedpriv.flower.refusals import Refusal
from fedpriv.flower.run_config import RunConfig
from fedpriv.plugins import only_known
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import batches_of, make_signal
from fedpriv.tasks.task import Task

__all__ = ["own_signal", "read_own_data"]

ARRAYS = ("inputs", "labels", "classes")


def own_signal(member: Member, run: RunConfig, order: Order, terms: Terms, model: Tensor) -> Tensor:
    """What the client would send without privacy, `[params]`, on the CPU.

    Raises:
        Refusal: If the experiment is not the one that the terms name, or not one that the policy accepts.
        UserError: If the data are not there.
    """
    with only_known():  # the server wrote the text: it may name no module for this device to import
        config = run.load()
    if config.digest != terms.digest:
        got = f"another one, {config.digest[:12]}"
        raise Refusal("model", "experiment", f"the one of the terms, {terms.digest[:12]}", got, "Start the run again")
    member.policy.check_experiment(config)
    with one_thread():
        if member.policy.data.own:
            path = member.folder.parent / Path(member.policy.data.own).expanduser()
            return _signal_of_file(path, run, config, order, terms, model)
        # The server wrote the config: nothing is made of a model that is not the one that it sent.
        population = run.assemble_clients(config, check_size=lambda size: _refuse_other_size(size, model))
        if not order.client < population.federation.population:
            expected = f"a client below {population.federation.population}"
            raise Refusal("model", "order", expected, order.client, "Start nodes with the ids of the experiment")
        return population.signal(order.client, model.to(population.task.device), terms.turn).cpu()


def read_own_data(path: Path) -> tuple[Tensor, Tensor, int]:
    """Return inputs float32 `[examples, ...]`, labels int64 `[examples]` and the number of labels.

    Raises:
        UserError: If the file is not an .npz with `inputs` (floats), `labels` (whole numbers from 0) and `classes`; it
            names the first row that is wrong.
    """
    found = read_arrays(path)
    remedy = "Write it with numpy.savez(path, inputs=..., labels=..., classes=...)"
    if "classes" not in found:
        raise UserError(str(path), "inputs, labels and classes", f"only {', '.join(found) or 'nothing'}", remedy)
    inputs = found.get("inputs")
    if isinstance(inputs, np.ndarray) and (inputs.ndim < 2 or inputs.dtype.kind in "iu"):
        got = f"{inputs.dtype} of shape {list(inputs.shape)}"
        expected = "inputs of floats, [examples, ...], scaled as all clients scale them"
        raise UserError(str(path), expected, got, remedy)
    inputs, labels, classes = labelled_arrays({name: found.get(name) for name in ARRAYS}, str(path))
    return torch.from_numpy(inputs), torch.from_numpy(labels), classes


def _signal_of_file(path: Path, run: RunConfig, config: Config, order: Order, terms: Terms, model: Tensor) -> Tensor:
    check_device(run.device)
    inputs, labels, classes = read_own_data(path)
    shape = tuple(inputs.shape[1:])
    _refuse_other_size(count_parameters(config, shape, classes), model)
    task = Task(build_module(config, shape, classes, 0), run.device)
    batches = batches_of(config.local, SeededStreams(config.seed), len(labels), terms.turn, order.client)
    at = model.to(task.device)
    given = inputs.to(task.device), labels.to(task.device)
    return make_signal(task, at, *given, config.local, batches).cpu()


def _refuse_other_size(size: int, model: Tensor) -> None:
    if size != len(model):
        expected = "as many parameters as the experiment's model has on this client's data"
        raise Refusal("model", "model", expected, f"{len(model):,}", "Give server and clients data of the same shape")
