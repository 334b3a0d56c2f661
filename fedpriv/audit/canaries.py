"""Canaries: clients whose every message is known to the auditor, and how an engine runs them.

A canary pushes along one direction `u` of length 1 for as long as its bound allows, with a random sign of its own in
every round. Signs make scores sharp: what clients send in common, and noise that repeats, is not correlated with them.

    signal in round k:  coin * sign_k * scale * u        message:  coin * sign_k * B u

`scale` is a million times all that a memory can hold, so that the residual points along the signal whatever the memory.

The coin decides what the auditor must guess. Under add-or-remove it says whether the canary takes part: candidates are
twice the canaries that are asked for, and a fair coin for each picks about half. Under replace all candidates take
part, and the coin is a sign on all of a canary's messages. Both are the secret bits that one-run bounds need.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedpriv.engines import Population, VectorizedEngine
from fedpriv.methods import feedback_of
from fedpriv.rounds import ClientRules

__all__ = ["Canaries", "CanaryPopulation", "VectorizedCanaries", "draw_canaries", "signal_scale"]

# Sets the auditor's addresses apart from all that an experiment draws (`fedpriv.streams.Purpose`).
_AUDIT = 0x61756469
_DIRECTIONS, _COORDINATES, _STEADY, _SIGNS, _COINS, _COHORTS, _UNSEEN = range(7)
# One canary in ten pushes along a single coordinate, because noise may be missing in some coordinates only; and one in
# ten keeps its sign, because random signs cancel in the last model.
_SHARE = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Canaries:
    """All candidates of one audit: first those along random directions, then those along coordinates, then steady ones.

    Args:
        seed: The audit's own; equal seeds and settings give equal candidates.
        directions: Unit vectors, float32 `[isotropic, params]`.
        coordinates: Indices of parameters, int64 `[coordinate canaries]`, all different.
        steady: Directions of canaries whose sign is always 1, float32 `[steady canaries, params]`.
        signs: 1 or -1 for each candidate and round, int8 `[candidates, rounds]`.
        takes_part: Whether a candidate is in a round's cohort if it takes part at all, bool `[candidates, rounds]`.
        coins: 0 or 1 (add-or-remove), or -1 or 1 (replace), int8 `[candidates]`; 1 for coordinates and
            steady canaries.
        absent_send: Whether candidates with coin 0 send a message of zero (trust local, where noise is all of it).
    """

    seed: int
    directions: Tensor
    coordinates: np.ndarray
    steady: Tensor
    signs: np.ndarray
    takes_part: np.ndarray
    coins: np.ndarray
    absent_send: bool

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
        took_part = self.takes_part[: self.isotropic].any(axis=1)
        return np.flatnonzero((self.coins[: self.isotropic] != 0) & took_part)

    @cached_property
    def patterns(self) -> np.ndarray:
        """Signs in the rounds that a candidate takes part in, 0 in others; float64 `[candidates, rounds]`."""
        return self.signs * self.takes_part.astype(np.float64)

    def cohort(self, round: int) -> np.ndarray:
        """Which of `planted` take part in `round` (from 1), ascending int64."""
        return np.flatnonzero(self.takes_part[self.planted, round - 1])

    def push(self, candidate: int, round: int) -> Tensor:
        """The direction of a candidate's message in `round`, a new tensor `[params]` of length 1, or 0."""
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
        """Unit vectors `[count, params]` and signs `[count, rounds]` of candidates that are in no run at all.

        Args:
            count: How many.
            turn: Tells calls apart; each gives others.
        """
        rng = generator(self.seed, _UNSEEN, turn)
        directions = torch.from_numpy(_unit_rows(rng, count, self.directions.shape[1]))
        return directions, _random_signs(rng, (count, self.signs.shape[1])).astype(np.float64)


def draw_canaries(
    *, seed: int, count: int, size: int, rounds: int, sampling_prob: float, replace: bool, local: bool
) -> Canaries:
    """Return the candidates of an audit.

    Args:
        seed: The audit's.
        count: How many canaries take part, about: see the coins.
        size: Number of parameters.
        rounds: Number of rounds.
        sampling_prob: Probability with which each takes part in a round.
        replace: Whether adjacency is replace.
        local: Whether trust is local.
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
    """Return a length of signals of which no memory can turn the residual by more than a millionth.

    A memory holds at most `beta` times every message of the run, its noise included where that is remembered.
    """
    rule, bounded = feedback_of(rules.method), rules.method.bounded
    beta = 1.0 if rule is None or rule.beta is None else max(rule.beta, 1.0)
    longest = bounded.l2_bound + 2.0 * rules.noise_stddev * math.sqrt(size)
    return min(1e6 * (1.0 + 1.0 / bounded.lipschitz + bounded.l2_bound + rounds * beta * longest), 1e30)


@dataclass(frozen=True, kw_only=True)
class CanaryPopulation(Population):
    """Clients that are canaries: rules, streams and devices are those of the others, signals the auditor's.

    Args:
        canaries: Who they are.
        first: The id of the first of `canaries.planted`.
        scale: Length of a signal; see `signal_scale`.
    """

    canaries: Canaries
    first: int
    scale: float

    def signal(self, client: int, model: Tensor, round: int) -> Tensor:
        """See `Population.signal`; the model does not matter."""
        push = self.canaries.push(int(self.canaries.planted[client - self.first]), round)
        return (push * self.scale).to(model.device, model.dtype)


class VectorizedCanaries(VectorizedEngine):
    """The vectorized engine for canaries: chunks, client steps and sums are its own, signals are not computed."""

    def _signals(self, model: Tensor, clients: list[int], round: int) -> Tensor:
        return torch.stack([self._population.signal(client, model, round) for client in clients])
