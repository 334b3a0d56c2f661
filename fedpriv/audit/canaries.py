"""Canaries: clients with messages known to the auditor, and the engine that runs them.

A canary pushes along one direction `u` of length 1, as far as its bound allows, with a random sign in every round.
Signs make scores sharp: they are uncorrelated with clients' common messages and with repeated noise.

    signal in round k:  coin * sign_k * scale * u        message:  coin * sign_k * B u

`scale` is a million times the largest possible memory, so the residual points along the signal for every memory.

The coin decides the secret that the auditor must guess. Under add-or-remove it decides if the canary takes part: there
are twice as many candidates as requested canaries, and a fair coin for each picks about half. Under replace all
candidates take part, and the coin is a sign on all of a canary's messages. Both are the secret bits that one-run bounds
need.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedpriv.audit.gradients import CanaryGradients, canary_examples
from fedpriv.engines import Population, VectorizedEngine
from fedpriv.methods import ClientState, FedSpeed, feedback_of, side_values_of
from fedpriv.rounds import ClientRules
from fedpriv.tasks.task import Task

__all__ = ["BATCHES", "Canaries", "CanaryPopulation", "VectorizedCanaries", "draw_canaries", "signal_scale"]

# Separates the auditor's addresses from all draws of an experiment (`fedpriv.streams.Purpose`).
_AUDIT = 0x61756469
_DIRECTIONS, _COORDINATES, _STEADY, _SIGNS, _COINS, _COHORTS, _UNSEEN, _GROUPS, BATCHES = range(9)
# One canary in ten pushes along a single coordinate, because noise may be missing in some coordinates only. One in ten
# keeps its sign, because random signs cancel in the last model.
_SHARE = 0.1
# A push that was halved so often is below the rounding of float32.
_HALVINGS = 30


@dataclass(frozen=True, kw_only=True, eq=False)
class Canaries:
    """All candidates of one audit: first those along random directions, then those along coordinates, then steady ones.

    Args:
        seed: The audit's seed; equal seeds and settings give equal candidates.
        directions: Unit vectors, float32 `[isotropic, params]`.
        coordinates: Indices of parameters, int64 `[coordinate canaries]`, all different.
        steady: Directions of canaries with constant sign 1, float32 `[steady canaries, params]`.
        signs: 1 or -1 for each candidate and round, int8 `[candidates, rounds]`.
        takes_part: True if a candidate, if it takes part at all, is in a round's cohort, bool `[candidates, rounds]`.
        coins: 0 or 1 (add-or-remove), or -1 or 1 (replace), int8 `[candidates]`; 1 for coordinates and
            steady canaries.
        absent_send: True if candidates with coin 0 send a zero message (trust local: the message is pure noise).
        weights: Length of a candidate's push in the message of a round, over the longest that one unit of privacy may
            have; float64 `[candidates, rounds]`. None for 1 everywhere.
        charged: Number of noised sums of a round that a candidate is charged for, `[candidates, rounds]`; None for the
            squares of its lengths.
        batched: True if secret batches decide in which rounds a candidate pushes.
    """

    seed: int
    directions: Tensor
    coordinates: np.ndarray
    steady: Tensor
    signs: np.ndarray
    takes_part: np.ndarray
    coins: np.ndarray
    absent_send: bool
    weights: np.ndarray | None = None
    charged: np.ndarray | None = None
    batched: bool = False

    @property
    def isotropic(self) -> int:
        """Number of candidates along random directions."""
        return len(self.directions)

    @property
    def along(self) -> slice:
        """The candidates along coordinates."""
        return slice(self.isotropic, self.isotropic + len(self.coordinates))

    @cached_property
    def planted(self) -> np.ndarray:
        """The candidates that are clients, ascending int64; canary client `n + i` is candidate `planted[i]`."""
        return np.arange(len(self.coins)) if self.absent_send else np.flatnonzero(self.coins)

    @cached_property
    def seen(self) -> np.ndarray:
        """The candidates along random directions that took part in some round with a message, ascending int64."""
        took_part = (self.patterns[: self.isotropic] != 0.0).any(axis=1)
        return np.flatnonzero((self.coins[: self.isotropic] != 0) & took_part)

    @cached_property
    def patterns(self) -> np.ndarray:
        """Signs and lengths in the rounds of a candidate, 0 in other rounds; float64 `[candidates, rounds]`."""
        found = self.signs * self.takes_part.astype(np.float64)
        return found if self.weights is None else found * self.weights

    @property
    def roots(self) -> np.ndarray:
        """Root of the number of releases that each candidate is charged for, float64 `[candidates]`."""
        charged = self.patterns**2 if self.charged is None else self.takes_part * self.charged
        return np.sqrt(charged.sum(axis=1))

    def cohort(self, round: int) -> np.ndarray:
        """Return the indices into `planted` of the canaries in `round` (from 1), ascending int64."""
        return np.flatnonzero(self.takes_part[self.planted, round - 1])

    def push(self, candidate: int, round: int) -> Tensor:
        """Return the direction of a candidate's message in `round`: a new tensor `[params]` of length 1, or 0."""
        amplitude = float(self.coins[candidate]) * float(self.signs[candidate, round - 1])
        if candidate < self.isotropic:
            return self.directions[candidate] * amplitude
        position = candidate - self.isotropic
        if position >= len(self.coordinates):
            return self.steady[position - len(self.coordinates)] * amplitude
        push = torch.zeros(self.directions.shape[1])
        push[self.coordinates[position]] = amplitude
        return push

    def unseen(self, count: int, turn: int = 0) -> tuple[Tensor, np.ndarray]:
        """Return unit vectors `[count, params]` and signs `[count, rounds]` of candidates that are in no run.

        Args:
            count: Number of candidates.
            turn: Distinguishes calls; each value gives different candidates.
        """
        rng = generator(self.seed, _UNSEEN, turn)
        directions = torch.from_numpy(_unit_rows(rng, count, self.directions.shape[1]))
        return directions, _random_signs(rng, (count, self.signs.shape[1])).astype(np.float64)


def draw_canaries(
    *,
    seed: int,
    count: int,
    size: int,
    rounds: int,
    sampling_prob: float,
    replace: bool,
    local: bool,
    separation: int = 1,
) -> Canaries:
    """Return the candidates of an audit.

    Args:
        seed: The audit's seed.
        count: Approximate number of canaries that take part; it depends on the coins.
        size: Number of parameters.
        rounds: Number of rounds.
        sampling_prob: Probability that a canary takes part in a round in which it may.
        replace: True if adjacency is replace.
        local: True if the auditor sees messages one by one, as under local trust.
        separation: Rounds from one turn of a canary to its next; each is in a random group.
    """
    steady = max(round(_SHARE * count), 2)
    along = min(steady, size)
    isotropic = (count - along - steady) * (1 if replace else 2)
    heads = generator(seed, _COINS).integers(2, size=isotropic)
    coins = np.concatenate([2 * heads - 1 if replace else heads, np.ones(along + steady, dtype=np.int64)])
    everyone = sampling_prob >= 1.0
    drawn = (len(coins), rounds)
    signs = _random_signs(generator(seed, _SIGNS), drawn)
    signs[isotropic + along :] = 1
    present = np.ones(drawn, bool) if everyone else generator(seed, _COHORTS).random(drawn) < sampling_prob
    if separation > 1:
        present &= np.arange(rounds) % separation == generator(seed, _GROUPS).integers(separation, size=(drawn[0], 1))
    return Canaries(
        seed=seed,
        directions=torch.from_numpy(_unit_rows(generator(seed, _DIRECTIONS), isotropic, size)),
        coordinates=generator(seed, _COORDINATES).choice(size, along, replace=False),
        steady=torch.from_numpy(_unit_rows(generator(seed, _STEADY), steady, size)),
        signs=signs,
        takes_part=present,
        coins=coins.astype(np.int8),
        absent_send=local,
    )


def generator(seed: int, purpose: int, turn: int = 0) -> np.random.Generator:
    """Return the auditor's generator at an address; independent of every stream of an experiment."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_AUDIT, purpose, turn, 0))))


def _random_signs(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return (2 * rng.integers(2, size=shape, dtype=np.int8) - 1).astype(np.int8)


def _unit_rows(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    rows = rng.standard_normal((count, size), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def signal_scale(rules: ClientRules, size: int, rounds: int) -> float:
    """Return a signal length at which no memory turns the residual by more than a millionth.

    A memory holds at most `beta` times every message of the run, including its noise if the method remembers it.
    """
    rule, bounded = feedback_of(rules.method), rules.method.bounded
    beta = 1.0 if rule is None or rule.beta is None else max(rule.beta, 1.0)
    longest = bounded.l2_bound + 2.0 * rules.noise_stddev * math.sqrt(size)
    return min(1e6 * (1.0 + 1.0 / bounded.lipschitz + bounded.l2_bound + rounds * beta * longest), 1e30)


@dataclass(frozen=True, kw_only=True)
class CanaryPopulation(Population):
    """Clients that are canaries: with the rules, streams and devices of other clients, and the auditor's signals.

    Args:
        canaries: The canaries.
        first: The id of the first of `canaries.planted`.
        scale: Length of a signal; see `signal_scale`. Canary examples and methods with their own signal have gradients
            instead: see `fedpriv.audit.gradients`.
    """

    canaries: Canaries
    first: int
    scale: float

    def examples(self, client: int) -> tuple[Tensor, Tensor]:
        """See `Population.examples`."""
        return canary_examples(self.rules.examples)

    def signal(
        self,
        client: int,
        model: Tensor,
        round: int,
        rules: ClientRules | None = None,
        offset: Tensor | None = None,
        state: ClientState | None = None,
    ) -> Tensor:
        """See `Population.signal`; independent of the model and of the state.

        If the client averages its signals or sums them up (`fedspeed`), the average, or the sum that it sends, is the
        push: signals make up for those of earlier rounds.
        """
        candidate = int(self.canaries.planted[client - self.first])
        push, rule = self.canaries.push(candidate, round), feedback_of(self.rules.method)
        if self.rules.examples is not None or self.needs_states:
            planted = replace(self, task=cast(Task, CanaryGradients(push.to(model.device), model)))
            return Population.signal(planted, client, model, round, rules, offset, state)
        if rule is not None and rule.weight is not None:
            before = np.flatnonzero(self.canaries.takes_part[candidate, : round - 1])
            past = self.canaries.push(candidate, int(before[-1]) + 1) if len(before) else torch.zeros_like(push)
            push = (push - (1.0 - rule.weight) * past) / rule.weight
        elif isinstance(self.rules.method, FedSpeed):
            push = 0.5 * (push - self._moves(candidate, round))
        signal, side = push.to(model.device, model.dtype) * self.scale, side_values_of(self.rules.method)
        return signal if side is None else torch.cat([signal, signal.new_zeros(side.given)])

    def _moves(self, candidate: int, round: int) -> Tensor:
        """Return h_i before `round`, in units of the scale: each round, h_i becomes (push + h_i) / 2."""
        moves = torch.zeros(self.canaries.directions.shape[1])
        for before in np.flatnonzero(self.canaries.takes_part[candidate, : round - 1])[-_HALVINGS:].tolist():
            moves = 0.5 * (moves + self.canaries.push(candidate, before + 1))
        return moves


class VectorizedCanaries(VectorizedEngine):
    """The vectorized engine for canaries: same chunks, client steps and sums, but signals are not computed."""

    def _signals(self, model: Tensor, clients: list[int], round: int, offsets: Tensor | None = None) -> Tensor:
        return torch.stack([self._population.signal(client, model, round) for client in clients])
