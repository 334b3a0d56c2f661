"""Randomness by address: what a draw is for, in which round, for which client; or from the operating system.

A seeded draw depends on its address alone, never on who asks first. That gives engine equality, reproducible
cohorts and exact resumption without storing a generator's state.
"""

import os
import random
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np

__all__ = ["Purpose", "SeededStreams", "Source", "Streams", "SystemStreams"]


class Purpose(IntEnum):
    """What a stream is for. Values are part of every seeded result: never renumber, only append."""

    MODEL = 0
    PARTITION = 1
    COHORT = 2
    SERVER_NOISE = 3
    CLIENT_NOISE = 4
    LOCAL_WORK = 5
    DATA = 6
    CLIENT_NOISE_SUM = 7
    SHIFT = 8
    DEVICE = 9
    DROPOUT = 10
    ASKING = 11


class Source(Protocol):
    """A stream of random numbers with the three laws that privacy rests on."""

    def normal(self, size: int) -> np.ndarray:
        """Independent standard normal float32 numbers, `[size]`."""
        ...

    def uniform(self, size: int) -> np.ndarray:
        """Independent uniform float64 numbers in [0, 1), `[size]`."""
        ...

    def subset(self, population: int, size: int) -> np.ndarray:
        """A uniformly random subset of `range(population)`, ascending int64, `[size]`, in O(size) work."""
        ...


class Streams(Protocol):
    """Gives the source of randomness at an address."""

    def source(self, purpose: Purpose, round: int = 0, client: int = 0) -> Source:  # noqa: A002
        """The source for `purpose` in `round` (from 1; 0 is before the first) at `client`."""
        ...


class SeededSource:
    """A Philox generator. `rng` is open for draws that need no secrecy (partitions, minibatches)."""

    def __init__(self, sequence: np.random.SeedSequence) -> None:
        self.rng = np.random.Generator(np.random.Philox(sequence))

    def normal(self, size: int) -> np.ndarray:
        """See `Source.normal`."""
        return self.rng.standard_normal(size, dtype=np.float32)

    def uniform(self, size: int) -> np.ndarray:
        """See `Source.uniform`."""
        return self.rng.random(size)

    def subset(self, population: int, size: int) -> np.ndarray:
        """See `Source.subset`."""
        return np.sort(self.rng.choice(population, size, replace=False, shuffle=False))


@dataclass(frozen=True)
class SeededStreams:
    """Reproducible streams for simulation: equal seed and address, equal numbers.

    Whoever knows the seed can subtract the noise, so nothing drawn from here protects a real person.
    """

    seed: int

    def source(self, purpose: Purpose, round: int = 0, client: int = 0) -> SeededSource:  # noqa: A002
        """See `Streams.source`."""
        address = (int(purpose), int(round), int(client))
        return SeededSource(np.random.SeedSequence(self.seed, spawn_key=address))


class SystemSource:
    """Numbers made of the operating system's entropy; every draw is new."""

    def normal(self, size: int) -> np.ndarray:
        """See `Source.normal`; Box-Muller in float64, rounded once to float32."""
        pairs = (size + 1) // 2
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(pairs)))
        angle = 2.0 * np.pi * self.uniform(pairs)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return both[:size].astype(np.float32)

    def uniform(self, size: int) -> np.ndarray:
        """See `Source.uniform`; 53 random bits each."""
        bits = np.frombuffer(os.urandom(8 * size), dtype=np.uint64)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def subset(self, population: int, size: int) -> np.ndarray:
        """See `Source.subset`."""
        return np.sort(np.array(random.SystemRandom().sample(range(population), size), dtype=np.int64))


@dataclass(frozen=True)
class SystemStreams:
    """Secret streams for deployment: the address is ignored, nothing can be drawn twice."""

    def source(self, purpose: Purpose, round: int = 0, client: int = 0) -> SystemSource:  # noqa: A002, ARG002
        """See `Streams.source`."""
        return SystemSource()
