"""Dry run of an experiment: build all parts, and let one client compute one signal."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedpriv.data.federation import Federation
from fedpriv.errors import UserError
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import Config
from fedpriv.privacy import delta_warning, signal_warning
from fedpriv.rounds import client_round

__all__ = ["Findings", "try_experiment"]

# Most test examples for the first loss.
_MAX_TESTED = 1024


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The parts of an experiment, in numbers.

    Args:
        examples: Number of training examples.
        test_examples: Number of test examples.
        input_shape: Shape of one input.
        classes: Number of labels.
        clients: Number of clients.
        fewest: Number of examples of the client with the fewest; None if clients are generated on request.
        most: Number of examples of the client with the most.
        parameters: Number of trainable parameters.
        loss: Mean loss (nats) of the first model on test examples.
        signal_norm: Norm of the client's signal, before bounding and noise.
        epsilon: Epsilon of the whole run; None if it is not private.
        delta: Its delta.
        warnings: Warnings to read before training.
        sources: Sources of classes outside of fedpriv, by key.
    """

    examples: int
    test_examples: int
    input_shape: tuple[int, ...]
    classes: int
    clients: int
    fewest: int | None
    most: int | None
    parameters: int
    loss: float
    signal_norm: float
    epsilon: float | None
    delta: float | None
    warnings: tuple[str, ...]
    sources: dict[str, dict[str, str]]


def try_experiment(config: Config, *, device: str = "cpu", data_root: Path | None = None) -> Findings:
    """Load the data, build the model, calibrate the noise and let the client with the most examples compute once.

    This writes nothing and releases nothing.

    Args:
        config: The experiment.
        device: The device for gradients.
        data_root: The folder of the data sets; None for the default.

    Raises:
        UserError: If a part cannot be built, or the first loss or signal is not finite.
    """
    experiment = assemble(config, device=device, data_root=data_root)
    population, plan = experiment.population, experiment.plan
    federation, task = population.federation, population.task
    dataset, model = federation.dataset, experiment.initial_model
    sizes = np.diff(federation.offsets) if isinstance(federation, Federation) else None
    loss = task.evaluate(model, dataset.test_inputs[:_MAX_TESTED], dataset.test_labels[:_MAX_TESTED])["loss"]
    if not math.isfinite(loss):
        remedy = "Scale the inputs by fixed constants, or lower the first weights"
        raise UserError("[model]", "a finite loss of the first model on test examples", loss, remedy)
    client = 0 if sizes is None else int(sizes.argmax())
    state = population.rules.init_client(task.layout.size)
    signal = population.signal(client, model.to(task.device), 1, state=state)
    norm = float(torch.linalg.vector_norm(signal[: task.layout.size]))
    if not math.isfinite(norm):
        remedy = "Lower the learning rate of [local], or scale the inputs by fixed constants"
        raise UserError("[local]", f"a finite signal of client {client} in its first round", norm, remedy)
    client_round(population.rules, client, state, signal.cpu(), 1)
    return Findings(
        examples=dataset.examples,
        test_examples=len(dataset.test_labels),
        input_shape=dataset.input_shape,
        classes=dataset.classes,
        clients=federation.population,
        fewest=None if sizes is None else int(sizes.min()),
        most=None if sizes is None else int(sizes.max()),
        parameters=task.layout.size,
        loss=loss,
        signal_norm=norm,
        epsilon=None if plan is None else plan.epsilon,
        delta=None if plan is None else plan.delta,
        warnings=()
        if plan is None
        else tuple(filter(None, (delta_warning(plan), signal_warning(plan, task.layout.size)))),
        sources=config.sources,
    )
