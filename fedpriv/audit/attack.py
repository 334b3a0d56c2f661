"""The attacked run: the unmodified experiment, with canaries among its clients and an observer after its noise.

The experiment's engine runs the real clients, on the experiment's random streams. A second engine of the same class
runs the canaries with the same client rules, and the two sums are added. Sums of parts of a cohort add up to the sum of
the whole, to the bit (`fedpriv.aggregation.exact`), so no draw of the experiment changes. There are only more clients:

| with m canaries next to n clients | without an audit |
|---|---|
| population n + m; expected cohort q (n + m), which divides sums; capacity and grid of the sums to match | n |
| noise multiplier, q and claim | the same |

Under secure aggregation, canaries add no noise: the shares of the real clients are the plan's whole noise. Against the
server with all helpers, who see each message, a canary has its own share.

The observer wraps the server's rule and records its input: the noisy sum over the expected cohort. If trust is local,
each canary's messages are requested separately, and the engine's sum is the message itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedpriv.audit.canaries import Canaries, CanaryPopulation, VectorizedCanaries, signal_scale
from fedpriv.data.federation import ResampledFederation
from fedpriv.data.partitions import Resampled
from fedpriv.engines import Engine, LoopEngine, Population
from fedpriv.errors import UserError
from fedpriv.experiment.build import Experiment
from fedpriv.experiment.execution import LocalEngine, make_engine
from fedpriv.methods import Method
from fedpriv.privacy import Poisson
from fedpriv.rounds import Broadcast, ServerRules, Total, begin_round, capacity_of, finish_round

__all__ = ["CANARY_ENGINES", "Attack", "Released", "start_attack"]

# By name of the engine that runs the real clients.
CANARY_ENGINES: dict[str, Callable[[Population], Engine]] = {"loop": LoopEngine, "vectorized": VectorizedCanaries}


@dataclass(frozen=True, kw_only=True, eq=False)
class Released:
    """The releases of an attacked run.

    Args:
        sums: The noisy sum of each round's messages, float32 `[rounds, params]`.
        move: The last model minus the first, float64 `[params]`.
    """

    sums: Tensor
    move: Tensor


class _Observed:
    """A method with a wrapped server rule: `released` stores each mean message that the rule receives."""

    def __init__(self, method: Method, released: Tensor, divisor: float) -> None:
        self._method = method
        self._released = released
        self._divisor = divisor
        self._rounds = 0

    def server_rule(self, state: object, mean_message: Tensor, sampling_prob: float) -> tuple[Tensor, object]:
        """See `Method.server_rule`."""
        own = mean_message[: self._released.shape[-1]]  # without side values, which are the same for all canaries
        self._released[self._rounds] = own.double() * self._divisor
        self._rounds += 1
        return self._method.server_rule(state, mean_message, sampling_prob)

    def __getattr__(self, name: str) -> object:
        return getattr(self._method, name)


@dataclass(frozen=True, kw_only=True, eq=False)
class Attack:
    """A run with canaries, ready to start; created by `start_attack`.

    Args:
        experiment: The experiment, as it is without an audit.
        canaries: The planted canaries.
        clients: The engine of the real clients.
        planted: The engine of the canaries.
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
        """Return the messages of one canary as its server sees them, float64 `[its rounds, params]`.

        Args:
            position: Index into `canaries.planted`. A canary's messages do not depend on other clients; call once for
                each.
        """
        rounds = 1 + np.flatnonzero(self.canaries.takes_part[self.canaries.planted[position]])
        alone = np.array([self.first_canary + position], dtype=np.int64)
        model, capacity = self.experiment.initial_model, capacity_of(self.server.sampling)
        other = model + 1.0 if self.experiment.population.needs_states else model  # differences need a moving model
        at = (model, other)
        sums = (self.planted.sum_messages(Broadcast(k, at[k % 2], alone, capacity)).sum for k in rounds.tolist())
        sent = [sum_[: len(model)] for sum_ in sums]
        return torch.stack(sent) if sent else model.new_zeros(0, len(model), dtype=torch.float64)

    def run(self, apart: Tensor | None = None, watch: Callable[[int], None] = lambda _: None) -> Released:
        """Run all rounds and return the releases.

        Args:
            apart: Sums of the canaries' messages by round `[rounds, params]`, if they were requested separately.
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
            if total.void:
                remedy = "Lower aggregation.least_survivors, or audit a plan in which everyone takes part"
                raise UserError(f"round {number}", "a round that counts, in an audit", "a void round", remedy)
            planted = self._planted(broadcast) if apart is None else self._whole(apart[number - 1], total.sum)
            state = finish_round(server, state, number, _with(total, planted).sum)
            watch(number)
        return Released(sums=sums, move=state.model.double() - first.double())

    @staticmethod
    def _whole(planted: Tensor, like: Tensor) -> Tensor:
        """Return canaries' messages with side values of zero, as long as another sum."""
        return torch.cat([planted, planted.new_zeros(len(like) - len(planted))])

    def _planted(self, broadcast: Broadcast) -> Tensor:
        """Return the sum of the canaries' messages in a round, float64 `[params]`."""
        cohort = self.first_canary + self.canaries.cohort(broadcast.round)
        return self.planted.sum_messages(broadcast._replace(cohort=cohort)).sum


def _with(total: Total, planted: Tensor) -> Total:
    return total._replace(sum=total.sum + planted)


@contextmanager
def start_attack(experiment: Experiment, canaries: Canaries, engine: LocalEngine) -> Iterator[Attack]:
    """Start both engines; close them on exit.

    Args:
        experiment: The experiment to attack.
        canaries: The canaries to plant.
        engine: `loop`, `vectorized`, or `auto`, which measures the real clients.
    """
    people, sampling = experiment.population, experiment.server.sampling
    # In a secure sum, the real clients' shares are the whole noise: canaries add none.
    in_sums = people.rules.sums is not None and not canaries.absent_send
    rules = replace(people.rules, noise_stddev=0.0) if in_sums else people.rules
    wider = Poisson(sampling.population + len(canaries.planted), sampling.sampling_prob)
    size, rounds = people.task.layout.size, experiment.config.training.rounds
    planted = CanaryPopulation(
        rules=rules,
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
    """Return placeholder data for canaries, which use none: engines need only each client's number of examples."""
    return ResampledFederation(
        dataset=people.federation.dataset, population=population, partition=Resampled(examples=1), seed=0
    )


def bytes_needed(params: int, rounds: int, candidates: int) -> int:
    """Return the approximate memory of an attack besides the run itself: releases, directions, memories, signs."""
    return 12 * params * (rounds + candidates) + 32 * candidates * rounds
