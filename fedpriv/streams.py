"""Random streams addressed by purpose, round and client, or drawn from the operating system.

A seeded draw depends on its address alone, never on the order of requests. That gives engine equality, reproducible
cohorts and exact resumption without storing a generator's state.
"""

import hashlib
import os
import random
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from fedpriv.philox import philox_in_c

__all__ = [
    "PhiloxStart",
    "Purpose",
    "Randomness",
    "SeededSource",
    "SeededStreams",
    "Source",
    "Streams",
    "SystemStreams",
    "Words",
]

Randomness = Literal["seeded", "system"]
"""The source of noise and cohorts: a seed, or the operating system."""


class Purpose(IntEnum):
    """The purpose of a stream. Values are part of every seeded result: never renumber, only append."""

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
    SCORE_NOISE = 12
    STEP_NOISE = 13
    AUGMENTATION = 14
    GROUP = 15
    GRAPH = 16
    WALK = 17


class Words(Protocol):
    """A stream of uniform real numbers, drawn to as many bits as needed."""

    @property
    def position(self) -> int:
        """Number of words drawn so far."""
        ...

    def words(self, size: int) -> np.ndarray:
        """Return the next uniform 64-bit numbers, uint64 `[size]`: each is the first bits of a uniform real number."""
        ...

    def more(self, position: int, number: int) -> int:
        """Return 64 further bits of the real number that the word at `position` begins.

        The bits are independent of all other words and of every other draw. Request each word once, in order.

        Args:
            position: Position of the number's first word.
            number: Index of the further word, from 1.
        """
        ...


class Source(Words, Protocol):
    """A stream of random numbers with the three laws that privacy rests on."""

    def uniform(self, size: int) -> np.ndarray:
        """Return independent uniform multiples of 2^-53 in [0, 1), float64 `[size]`."""
        ...

    def subset(self, population: int, size: int) -> np.ndarray:
        """Return a uniformly random subset of `range(population)`, ascending int64 `[size]`, in O(size) work."""
        ...


class Streams(Protocol):
    """A random source for each address."""

    def source(self, purpose: Purpose, round: int = 0, client: int = 0) -> Source:
        """Return the source for `purpose` in `round` (from 1; 0 is before the first round) for `client`."""
        ...


_MORE = 0x6D6F7265
_FEW = 256  # Up to this many words, the operating system is faster than keying a cipher.
_NOISE = (Purpose.SERVER_NOISE, Purpose.CLIENT_NOISE, Purpose.CLIENT_NOISE_SUM, Purpose.SCORE_NOISE, Purpose.STEP_NOISE)


class PhiloxStart(NamedTuple):
    """Key of a generator, and the number of its words before the next one."""

    key: tuple[int, int]
    position: int


class SeededSource:
    """A Philox generator. Use `rng` directly only for draws that need no secrecy (partitions, minibatches).

    Its words are made in C if possible: the same words, without making a generator of numpy.

    Args:
        entropy: The seed, at least 0.
        address: Numbers that distinguish the streams of a seed, at least 0.
    """

    def __init__(self, entropy: int, address: tuple[int, ...]) -> None:
        self._entropy, self._address, self._given = entropy, address, 0
        self._rng: np.random.Generator | None = None
        self._key: tuple[int, int] | None = None

    @property
    def rng(self) -> np.random.Generator:
        """The generator, after the words drawn so far."""
        if self._rng is None:
            self._rng = np.random.Generator(np.random.Philox(self._sequence(self._address)))
            self._rng.bit_generator.random_raw(self._given, output=False)
        return self._rng

    @property
    def position(self) -> int:
        """See `Words.position`."""
        return self._given

    def words(self, size: int) -> np.ndarray:
        """See `Words.words`."""
        start, in_c = self.skipped(size), philox_in_c()
        if start is not None and in_c is not None:
            return in_c.words(start.key, start.position, size)
        found = self.rng.bit_generator.random_raw(size)
        self._given += size
        return found

    def skipped(self, size: int) -> PhiloxStart | None:
        """Skip the next words, for a caller that makes them itself, and return where they begin.

        Returns:
            None if only numpy can make them; no word is skipped then.
        """
        in_c = philox_in_c() if self._rng is None else None
        if in_c is None:
            return None
        self._key = self._key or in_c.key(self._entropy, self._address)
        start = PhiloxStart(self._key, self._given)
        self._given += size
        return start

    def more(self, position: int, number: int) -> int:
        """See `Words.more`; depends on address, position and number alone."""
        # Longer than any address, so it never equals one.
        key = (*self._address, _MORE, position % 2**32, position >> 32)
        return int(np.random.Philox(self._sequence(key)).random_raw(number)[-1])

    def _sequence(self, address: tuple[int, ...]) -> np.random.SeedSequence:
        return np.random.SeedSequence(self._entropy, spawn_key=address)

    def uniform(self, size: int) -> np.ndarray:
        """See `Source.uniform`."""
        return self.rng.random(size)

    def subset(self, population: int, size: int) -> np.ndarray:
        """See `Source.subset`."""
        return np.sort(self.rng.choice(population, size, replace=False, shuffle=False))


@dataclass(frozen=True)
class SeededStreams:
    """Reproducible streams for simulation: equal seeds and addresses give equal numbers.

    Anyone who knows the seed can subtract the noise, so draws from these streams protect no real person.

    Args:
        seed: The seed of every draw.
        noise_id: Identifies the experiment that the noise belongs to. Experiments with one seed share data, cohorts and
            batches, but never noise: the difference of two releases with the same noise would be noise-free.
        own_cohorts: If True, the experiment does not share cohorts either.
    """

    seed: int
    noise_id: str = ""
    own_cohorts: bool = False

    def source(self, purpose: Purpose, round: int = 0, client: int = 0) -> SeededSource:
        """See `Streams.source`."""
        own = purpose in _NOISE or (self.own_cohorts and purpose is Purpose.COHORT)
        entropy = self._noise_seed if own else self.seed
        return SeededSource(entropy, (int(purpose), int(round), int(client)))

    @cached_property
    def _noise_seed(self) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed} {self.noise_id}".encode()).digest(), "little")


class SystemSource:
    """Random numbers from the operating system's entropy; every draw is new."""

    def __init__(self) -> None:
        self._given = 0
        self._process = 0
        self._cipher: CipherContext | None = None

    @property
    def position(self) -> int:
        """See `Words.position`."""
        return self._given

    def words(self, size: int) -> np.ndarray:
        """See `Words.words`: the key stream of AES-256 in counter mode, under a key that only this source uses."""
        self._given += size
        if self._cipher is None and size <= _FEW:
            return np.frombuffer(os.urandom(8 * size), dtype=np.uint64)
        if self._cipher is None or self._process != os.getpid():  # never repeat a parent's stream
            self._process = os.getpid()
            self._cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
        return np.frombuffer(self._cipher.update(bytes(8 * size)), dtype=np.uint64)

    def more(self, position: int, number: int) -> int:
        """See `Words.more`."""
        return int.from_bytes(os.urandom(8), "little")

    def uniform(self, size: int) -> np.ndarray:
        """See `Source.uniform`; 53 random bits each."""
        bits = np.frombuffer(os.urandom(8 * size), dtype=np.uint64)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def subset(self, population: int, size: int) -> np.ndarray:
        """See `Source.subset`."""
        return np.sort(np.array(random.SystemRandom().sample(range(population), size), dtype=np.int64))


@dataclass(frozen=True)
class SystemStreams:
    """Secret streams for deployment: the address is ignored, and no draw can be repeated.

    The groups of clients that take turns are an exception. They are public, and have to be the same in all rounds, also
    after a server restarts: in other groups, a client's next turn could come too early.

    Args:
        public: Seed of the draw of groups.
    """

    public: int = 0

    def source(self, purpose: Purpose, round: int = 0, client: int = 0) -> Source:
        """See `Streams.source`."""
        if purpose is Purpose.GROUP:
            return SeededStreams(self.public).source(purpose, round, client)
        return SystemSource()
