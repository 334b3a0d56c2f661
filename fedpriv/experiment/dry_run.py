"""Trying an experiment: everything is resolved and made, and one client computes one message."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedpriv.data.federation import Federation
from fedpriv.errors import UserError
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import Config
from fedpriv.privacy import signal_warning

__all__ = ["Findings", "try_experiment"]

# Test examples that the loss is computed on.
_MAX_TESTED = 1024


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an experiment consists of.

    Args:
        examples: Number of training examples.
        test_examples: Number of test examples.
        input_shape: Shape of one input.
        classes: Number of labels.
        clients: Number of clients.
        fewest: Number of examples of the client with the fewest; None if clients are made when they are asked.
        most: Number of examples of the client with the most.
        parameters: Number of trainable parameters.
        loss: Mean loss (nats) of the first model on test examples.
        signal_norm: Length of what the client would send without bound and noise.
        epsilon: What the run will spend; None if it is not private.
        delta: Its delta.
        warning: What to read before training; None if nothing.
        sources: Where classes come from that are not of fedpriv, by key.
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
    warning: str | None
    sources: dict[str, dict[str, str]]


def try_experiment(config: Config, *, device: str = "cpu", data_root: Path | None = None) -> Findings:
    """Load the data, build the model, calibrate the noise and let the client with the most examples compute once.

    Nothing is written, and nothing is released.

    Args:
        config: The experiment.
        device: Where gradients are computed.
        data_root: Where data sets are; None for the environment's choice.

    Raises:
        UserError: If something cannot be made, or the first loss or signal is not finite.
    """
    experiment = assemble(config, device=device, data_root=data_root)
    population, plan = experiment.population, experiment.plan
    federation, task = population.federation, population.task
    dataset, model = federation.dataset, experiment.initial_model
    sizes = np.diff(federation.offsets) if isinstance(federation, Federation) else None
    loss, _ = task.evaluate(model, dataset.test_inputs[:_MAX_TESTED], dataset.test_labels[:_MAX_TESTED])
    if not math.isfinite(loss):
        remedy = "Scale the inputs by fixed constants, or lower the first weights"
        raise UserError("[model]", "a finite loss of the first model on test examples", loss, remedy)
    client = 0 if sizes is None else int(sizes.argmax())
    norm = float(torch.linalg.vector_norm(population.signal(client, model.to(task.device), 1)))
    if not math.isfinite(norm):
        remedy = "Lower the learning rate of [local], or scale the inputs by fixed constants"
        raise UserError("[local]", f"a finite signal of client {client} in its first round", norm, remedy)
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
        warning=None if plan is None else signal_warning(plan, task.layout.size),
        sources=config.sources,
    )
