"""Small federations for tests, and rounds run on them."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedpriv.data.dataset import Dataset
from fedpriv.data.datasets import Digits
from fedpriv.data.federation import Federation, federate
from fedpriv.data.partitions import Dirichlet
from fedpriv.engines import Engine, LoopEngine, Population
from fedpriv.methods import Method, ServerState
from fedpriv.privacy import AggregationChoice, Everyone, Sampling, TrustName, make_plan
from fedpriv.rounds import ClientRules, ServerRules, Total, begin_round, finish_round, make_agreement
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import FullGradient, LocalWork
from fedpriv.tasks.models import Softmax
from fedpriv.tasks.task import Task

MakeEngine = Callable[[Population], Engine]


@cache
def ragged_digits(clients: int = 12) -> Federation:
    """Six hundred digits, with labels and sizes that differ much between clients."""
    digits = Digits().load(None)
    dataset = dataset_of(digits.train_inputs[:600], digits.train_labels[:600])
    return federate(dataset, Dirichlet(concentration=0.15), clients, np.random.default_rng(7))


@dataclasses.dataclass(frozen=True)
class AnyFederation:
    """A federation without checks: client i holds `parts[i]`, also nothing, also rows of another client."""

    dataset: Dataset
    parts: Sequence[np.ndarray]

    @property
    def population(self) -> int:
        return len(self.parts)

    @property
    def sizes(self) -> np.ndarray:
        return np.array([len(part) for part in self.parts], dtype=np.int64)

    def rows_of(self, client: int) -> np.ndarray:
        return np.asarray(self.parts[client], dtype=np.int64)


def dataset_of(inputs: Tensor, labels: Tensor, classes: int = 10) -> Dataset:
    """A data set of training examples, the first of which is also its test example."""
    return Dataset(
        name="made",
        train_inputs=inputs,
        train_labels=labels,
        test_inputs=torch.zeros_like(inputs[:1]),
        test_labels=labels[:1],
        classes=classes,
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    """One experiment without configuration files: both halves of the agreement, the clients and the start."""

    server: ServerRules
    population: Population
    initial_model: Tensor


def setting(
    method: Method,
    *,
    federation: Any = None,
    module: nn.Module | None = None,
    work: LocalWork | None = None,
    sampling: Sampling | None = None,
    trust: TrustName | None = None,
    noise_multiplier: float = 0.1,
    seed: int = 5,
    aggregation: AggregationChoice | None = None,
) -> Setting:
    """A setting on the ragged digits with full gradients and everyone, unless something else is given."""
    federation = federation or ragged_digits()
    sampling = sampling or Everyone(federation.population)
    shape = tuple(federation.dataset.train_inputs.shape[1:])
    task = Task(module or Softmax().build(shape, federation.dataset.classes, 0))
    streams = SeededStreams(seed)
    plan = None
    if trust is not None:
        plan = make_plan(
            trust=trust if aggregation is None else aggregation.of(sampling, sampling.population, task.layout.size),
            sampling=sampling,
            rounds=50,
            delta=1e-5,
            l2_bound=method.bounded.l2_bound,
            noise_multiplier=noise_multiplier,
        )
    server, client, _ = make_agreement(method, sampling, plan, streams)
    population = Population(
        rules=client,
        task=task,
        federation=cast(Federation, federation),
        work=work or FullGradient(),
        streams=streams,
    )
    return Setting(server, population, task.initial_model())


def advance(
    engine: Engine, rules: ServerRules, state: ServerState, first: int, last: int
) -> tuple[ServerState, list[Tensor], list[Total]]:
    """The server's state after rounds `first` to `last`, and each round's model and total."""
    models, totals = [], []
    for k in range(first, last + 1):
        total = engine.sum_messages(begin_round(rules, state, k))
        state = finish_round(rules, state, k, total.sum)
        models.append(state.model)
        totals.append(total)
    return state, models, totals


def models_of(made: Setting, make: MakeEngine = LoopEngine, rounds: int = 20) -> list[Tensor]:
    """The model after each round, by an engine made for it."""
    start = made.server.method.init_server(made.initial_model)
    return advance(make(made.population), made.server, start, 1, rounds)[1]


def client_rules(made: Setting) -> ClientRules:
    """The clients' half of the agreement."""
    return made.population.rules
