"""The attacked run: the experiment itself, with canaries among its clients and an observer behind its noise.

The experiment's engine runs the real clients, on the experiment's own streams. A second engine of the same class runs
the canaries by the same client rules, and the two sums are added: sums of parts of a cohort add up to the sum of the
whole, to the bit (`fedpriv.aggregation.exact`). So not one draw of the experiment changes. There are only more clients:

| with m canaries beside n clients | without an audit |
|---|---|
| population n + m, expected cohort q (n + m), by which sums are divided; capacity and grid of the sums to match | n |
| noise multiplier, q and claim | the same |

The observer is put around the server's rule and records what the rule is given: the noised sum over the expected
cohort. If trust is local, each canary is asked for its messages alone, and the engine's sum is the message itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedpriv.audit.canaries import Canaries, CanaryPopulation, VectorizedCanaries, signal_scale
from fedpriv.data.federation import ResampledFederation
from fedpriv.data.partitions import Resampled
from fedpriv.engines import Engine, LoopEngine, Population
from fedpriv.experiment.build import Experiment
from fedpriv.experiment.execution import make_engine
from fedpriv.methods import Method
from fedpriv.privacy import Poisson
from fedpriv.rounds import Broadcast, ServerRules, Total, begin_round, capacity_of, finish_round

__all__ = ["CANARY_ENGINES", "Attack", "Released", "start_attack"]

# By the name of the engine that runs the real clients.
CANARY_ENGINES: dict[str, Callable[[Population], Engine]] = {"loop": LoopEngine, "vectorized": VectorizedCanaries}


@dataclass(frozen=True, kw_only=True, eq=False)
class Released:
    """What an attacked run has shown.

    Args:
        sums: The noised sum of each round's messages, float32 `[rounds, params]`.
        move: The last model minus the first, float64 `[params]`.
    """

    sums: Tensor
    move: Tensor


class _Observed:
    """A method whose server rule is watched: `released` holds each mean message that it was given."""

    def __init__(self, method: Method, released: Tensor, divisor: float) -> None:
        self._method = method
        self._released = released
        self._divisor = divisor
        self._rounds = 0

    def server_rule(self, state: Any, mean_message: Tensor, sampling_prob: float) -> tuple[Tensor, Any]:
        """See `Method.server_rule`."""
        self._released[self._rounds] = mean_message.double() * self._divisor
        self._rounds += 1
        return self._method.server_rule(state, mean_message, sampling_prob)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)


@dataclass(frozen=True, kw_only=True, eq=False)
class Attack:
    """A run with canaries, ready to begin; made by `start_attack`.

    Args:
        experiment: What is attacked, as it is without an audit.
        canaries: Who is planted.
        clients: Runs the real clients.
        planted: Runs the canaries.
        server: The server's rules with the canaries in the population.
    """

    experiment: Experiment
    canaries: Canaries
    clients: Engine
    planted: Engine
    server: ServerRules

    @property
    def first_canary(self) -> int:
        """The id of the first canary: the number of real clients."""
        return self.experiment.population.federation.population

    def messages(self, position: int) -> Tensor:
        """The messages of one canary as its server sees them, float64 `[rounds that it takes part in, params]`.

        Args:
            position: Which of `canaries.planted`. A canary's messages depend on nobody else; ask once for each.
        """
        rounds = 1 + np.flatnonzero(self.canaries.takes_part[self.canaries.planted[position]])
        alone = np.array([self.first_canary + position], dtype=np.int64)
        model, capacity = self.experiment.initial_model, capacity_of(self.server.sampling)
        sent = [self.planted.sum_messages(Broadcast(k, model, alone, capacity)).sum for k in rounds.tolist()]
        return torch.stack(sent) if sent else model.new_zeros(0, len(model), dtype=torch.float64)

    def run(self, apart: Tensor | None = None, watch: Callable[[int], None] = lambda _: None) -> Released:
        """Run all rounds and return what they released.

        Args:
            apart: Sums of the canaries' messages by round `[rounds, params]`, if they were asked for one by one.
            watch: Called with the number of every finished round.
        """
        first, rounds = self.experiment.initial_model, self.experiment.config.training.rounds
        sums = torch.empty(rounds, len(first))
        observer = _Observed(self.server.method, sums, self.server.sampling.expected_size)
        server = replace(self.server, method=cast(Method, observer))
        state = self.server.init(first)
        for number in range(1, rounds + 1):
            broadcast = begin_round(self.experiment.server, state, number)
            broadcast = broadcast._replace(capacity=capacity_of(server.sampling))
            total = self.clients.sum_messages(broadcast)
            planted = self._planted(broadcast) if apart is None else apart[number - 1]
            state = finish_round(server, state, number, _with(total, planted).sum)
            watch(number)
        return Released(sums=sums, move=state.model.double() - first.double())

    def _planted(self, broadcast: Broadcast) -> Tensor:
        """The sum of the canaries' messages in a round, float64 `[params]`."""
        cohort = self.first_canary + self.canaries.cohort(broadcast.round)
        return self.planted.sum_messages(broadcast._replace(cohort=cohort)).sum


def _with(total: Total, planted: Tensor) -> Total:
    return total._replace(sum=total.sum + planted)


@contextmanager
def start_attack(experiment: Experiment, canaries: Canaries, engine: str) -> Iterator[Attack]:
    """Start both engines; ends them afterwards.

    Args:
        experiment: What is attacked.
        canaries: Who is planted.
        engine: `loop`, `vectorized`, or `auto`, which measures the real clients.
    """
    people, sampling = experiment.population, experiment.server.sampling
    wider = Poisson(sampling.population + len(canaries.planted), sampling.sampling_prob)
    size, rounds = people.task.layout.size, experiment.config.training.rounds
    planted = CanaryPopulation(
        rules=people.rules,
        task=people.task,
        federation=_holders(people, wider.population),
        work=people.work,
        streams=people.streams,
        canaries=canaries,
        first=sampling.population,
        scale=signal_scale(people.rules, size, rounds),
    )
    clients = make_engine(engine, experiment)
    try:
        yield Attack(
            experiment=experiment,
            canaries=canaries,
            clients=clients,
            planted=CANARY_ENGINES[clients.name](planted),
            server=replace(experiment.server, sampling=wider),
        )
    finally:
        clients.close()


def _holders(people: Population, population: int) -> ResampledFederation:
    """Stand-in data for canaries, who use none: engines ask only how many examples each client has."""
    return ResampledFederation(
        dataset=people.federation.dataset, population=population, partition=Resampled(examples=1), seed=0
    )


def bytes_needed(params: int, rounds: int, candidates: int) -> int:
    """Return about how much memory an attack takes beside the run itself: releases, directions, memories, signs."""
    return 12 * params * (rounds + candidates) + 32 * candidates * rounds
