"""Training data of a device: its own file, or its part of the experiment's data set."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpriv.data.augment import augmented, draws_of
from fedpriv.data.labels import labels_as
from fedpriv.data.own import labelled_arrays
from fedpriv.data.user_files import read_arrays
from fedpriv.deploy.device.device import Device
from fedpriv.engines import one_thread, with_metrics
from fedpriv.errors import UserError
from fedpriv.experiment.build import build_module, check_device, check_task, count_parameters
from fedpriv.experiment.config import Config
from fedpriv.flower.messages import ClientInstructions, RunTerms
from fedpriv.flower.refusals import Refusal
from fedpriv.flower.run_config import RunConfig
from fedpriv.methods import ClientState, own_signal_of
from fedpriv.plugins import only_known
from fedpriv.rounds import ClientRules
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import ClientGradients, batches_of, make_signal
from fedpriv.tasks.task import Task

__all__ = ["own_signal", "read_own_data"]

ARRAYS = ("inputs", "labels", "classes")


def own_signal(
    device: Device,
    run: RunConfig,
    instructions: ClientInstructions,
    terms: RunTerms,
    model: Tensor,
    offset: Tensor | None = None,
    state: ClientState | None = None,
) -> Tensor:
    """Return the client's message without privacy, `[params]`, on the CPU; see `Population.signal` for its arguments.

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
    _refuse_other_work(config, instructions)
    if instructions.examples and device.policy.limits.adjacency == "add-or-remove":
        config.check_positions()
    # Under secure aggregation a void turn is tried again, as in simulations: with the same batches, and fresh noise.
    # A method with its own signal counts rounds, too: its restarts and memories follow those that counted.
    by_round = terms.aggregation or own_signal_of(instructions.method) is not None
    number = instructions.round if by_round else terms.turn
    with one_thread():
        if device.policy.data.own:
            path = device.folder.parent / Path(device.policy.data.own).expanduser()
            rules = _rules(device, instructions)
            given = (model, offset, state)
            return _signal_of_file(path, run, config, rules, (number, instructions.client), given)
        # The server wrote the config: check the size of its model before allocating anything for it.
        population = run.assemble_clients(config, check_size=lambda size: _refuse_other_size(size, model))
        if not instructions.client < population.federation.population:
            expected = f"a client below {population.federation.population}"
            remedy = "Start the nodes with the client ids of the experiment"
            raise Refusal("model", "instructions", expected, instructions.client, remedy)
        rules, at = _rules(device, instructions), model.to(population.task.device)
        beside = None if offset is None else offset.to(at.device)
        return population.signal(instructions.client, at, number, rules, beside, state).cpu()


def read_own_data(path: Path) -> tuple[Tensor, Tensor, int]:
    """Return inputs float32 `[examples, ...]`, labels int64 `[examples]` and the number of labels.

    Raises:
        UserError: If the file is not an .npz with `inputs` (floats), `labels` (whole numbers from 0) and `classes`; it
            names the first row that is wrong.
    """
    found = read_arrays(path)
    remedy = "Write it with numpy.savez(path, inputs=..., labels=..., classes=...)"
    if "classes" not in found:
        raise UserError(
            str(path),
            "inputs, labels and classes",
            f"the arrays {', '.join(found)}" if found else "an empty file",
            remedy,
        )
    inputs = found.get("inputs")
    if isinstance(inputs, np.ndarray) and (inputs.ndim < 2 or inputs.dtype.kind in "iu"):
        got = f"{inputs.dtype} of shape {list(inputs.shape)}"
        expected = "inputs of floats, [examples, ...], scaled as all clients scale them"
        raise UserError(str(path), expected, got, remedy)
    inputs, labels, classes = labelled_arrays({name: found.get(name) for name in ARRAYS}, str(path))
    return torch.from_numpy(inputs), torch.from_numpy(labels), classes


def _signal_of_file(
    path: Path,
    run: RunConfig,
    config: Config,
    rules: ClientRules,
    address: tuple[int, int],
    received: tuple[Tensor, Tensor | None, ClientState | None],
) -> Tensor:
    model, offset, state = received
    check_device(run.device, "device")
    with labels_as(config.task.labels):
        inputs, labels, classes = read_own_data(path)
    config.task.check_labels(str(path), labels, classes)
    shape = tuple(inputs.shape[1:])
    _refuse_other_size(count_parameters(config, shape, classes), model)
    module = build_module(config, shape, classes, 0)
    check_task(config, module, shape, labels[:1], classes)
    task = Task(module, run.device, kind=config.task)
    streams = SeededStreams(config.seed) if rules.examples is None else rules.streams
    at = model.to(task.device)
    given = plain = inputs.to(task.device), labels.to(task.device)
    losses = partial(task.example_losses, at, *given)
    batches = batches_of(config.local, streams, len(labels), *address, losses)
    if config.augment is not None:
        draws = draws_of(config.augment, SeededStreams(config.seed), len(labels), *address)
        given = augmented(config.augment, inputs, draws, batches).to(task.device), given[1]
    clipped, beside = rules.clipped(*address), None if offset is None else offset.to(task.device)
    if state is not None and (own := own_signal_of(rules.method)) is not None:
        return own.own_signal(
            state, at, ClientGradients(task, *given, config.local, batches, clipped), address[0]
        ).cpu()
    prox = rules.method.step_prox
    signal = make_signal(task, at, *given, config.local, batches, clipped, beside, prox)
    return with_metrics(rules, signal, task, at, *plain).cpu()


def _rules(device: Device, instructions: ClientInstructions) -> ClientRules:
    """Return the client's half of the agreement, with the device's own source of randomness."""
    return replace(instructions.rules, streams=device.streams)


def _refuse_other_work(config: Config, instructions: ClientInstructions) -> None:
    """Raise a `Refusal` if batches or local steps are not those that the ledger charges for single examples."""
    charged = instructions.example_terms
    if charged is not None and charged != config.example_terms:
        got = "an experiment with other batches, local steps or bounds"
        raise Refusal("model", "experiment", f"the work in the instructions, {charged.as_text()}", got, "Do not join")


def _refuse_other_size(size: int, model: Tensor) -> None:
    if size != len(model):
        expected = "as many parameters as the experiment's model has on this client's data"
        raise Refusal("model", "model", expected, f"{len(model):,}", "Give server and clients data of the same shape")
