"""Plans with correlated noise (trust central): the matrix of the noise, its charge, and its words.

The charge is exact: all rounds together are one Gaussian mechanism on C s (`fedpriv.mechanisms.correlated`), where s
are the sums of messages, for any adaptive choice of these. A client's message is bounded by B in every round, for
every memory. So clients' memories change nothing here.

With coins (kind `cyclic-banded`): let C have at most b bands, and let every client have one turn in b rounds. Cut
the run into windows of b rounds that begin with a client's turn. One message changes C s only within its window, by
at most B |c| in norm. A window is therefore one Gaussian mechanism of which a secret coin hides the participation,
and windows compose adaptively (Choquette-Choo et al. 2023). With more bands than b, a window would overlap the next
turn, and the bound is false.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol, get_args

import numpy as np

from fedpriv.checks import is_whole, plain_numbers, true_or_false
from fedpriv.errors import UserError, nearest
from fedpriv.mechanisms.base import Mechanism
from fedpriv.mechanisms.correlated import SLACK, Correlated, Fading, fading, filtered, squared_sensitivity
from fedpriv.mechanisms.noise import Gaussian
from fedpriv.privacy.sampling import Sampling

__all__ = ["NOISE_KINDS", "Banded", "FadingNoise", "NoiseChoice", "NoiseKind", "NoiseMatrix", "read_matrix"]

NoiseKind = Literal["independent", "banded", "cyclic-banded", "geometric-schedule"]
"""The kind of the noise over rounds."""

NOISE_KINDS: tuple[NoiseKind, ...] = get_args(NoiseKind)

_NAMED: Mapping[str, bool] = {"named": True}

_MAX_FADING = 1e9
"""The most by which noise may fade over a run."""


class NoiseMatrix(Protocol):
    """The matrix C of a plan's noise; a frozen dataclass."""

    @property
    def hidden(self) -> bool:
        """True if secret coins within groups lower epsilon."""
        ...

    @property
    def rounds(self) -> int:
        """K, the number of rounds for which it is accounted."""
        ...

    @property
    def column(self) -> float:
        """Norm of the change of C s by one message of length 1, in its own window."""
        ...

    def charge(self, rounds: int, sampling: Sampling) -> float:
        """Return the squared sensitivity of the first rounds, in units of a message's bound, without coins."""
        ...

    def check(self, sampling: Sampling) -> None:
        """Raise UserError if the noise cannot be accounted for with this sampling."""
        ...

    def applied(self, patterns: np.ndarray) -> np.ndarray:
        """Return C times the rows of `[clients, rounds]`: the values that fresh noise hides of them."""
        ...

    def mechanism(self, stddev: float, bound: float, messages: int) -> Mechanism:
        """Return the server's noise.

        Args:
            stddev: The plan's standard deviation.
            bound: Bound of a message.
            messages: Safe maximum of the number of messages in a round.
        """
        ...

    def how(self, stddev: float, moved: float, sampling: Sampling, rounds: int) -> str:
        """Return sentences on the noise for the statement.

        Args:
            stddev: The plan's standard deviation.
            moved: The plan's `l2_sensitivity`.
            sampling: The plan's sampling.
            rounds: The plan's number of rounds.
        """
        ...

    def as_dict(self) -> dict[str, object]:
        """Return the record, for JSON."""
        ...


@dataclass(frozen=True, kw_only=True)
class Banded:
    """Noise of banded matrix factorization; `hidden` for `cyclic-banded`.

    Args:
        coefficients: c, with c_0 = 1, not negative and never increasing.
        rounds: K.
        damping: lambda of the workload that c was chosen for; does not affect privacy.
        hidden: See `NoiseMatrix`.
    """

    coefficients: tuple[float, ...]
    rounds: int
    damping: float = 0.0
    hidden: bool = False

    def __post_init__(self) -> None:
        plain_numbers(self)
        true_or_false("hidden", self.hidden)
        c = self.coefficients
        if not c or c[0] != 1.0 or not c[-1] >= 0.0 or not all(a >= b for a, b in pairwise(c)):
            raise ValueError(f"coefficients begin with 1, are not negative and never increase: {c}")

    @property
    def column(self) -> float:
        """See `NoiseMatrix.column`; includes the rounding of earlier noise."""
        return math.sqrt(math.fsum(c * c for c in self.coefficients)) * (1.0 + self._slack)

    def charge(self, rounds: int, sampling: Sampling) -> float:
        """See `NoiseMatrix.charge`."""
        if rounds > self.rounds:
            raise ValueError(f"the noise is accounted for {self.rounds} rounds, not for {rounds}")
        return squared_sensitivity(self.coefficients, rounds, sampling.separation) * (1.0 + self._slack) ** 2

    def check(self, sampling: Sampling) -> None:
        """See `NoiseMatrix.check`."""
        if self.hidden and len(self.coefficients) > sampling.separation:
            expected = f"at most {sampling.separation}, the rounds between two turns of a client"
            remedy = "Lower it, or raise cohort.min_separation"
            raise UserError("noise.bands", expected, len(self.coefficients), remedy)

    def applied(self, patterns: np.ndarray) -> np.ndarray:
        """See `NoiseMatrix.applied`."""
        return filtered(patterns, self.coefficients)

    def mechanism(self, stddev: float, bound: float, messages: int) -> Mechanism:
        """See `NoiseMatrix.mechanism`."""
        if len(self.coefficients) == 1:
            return Gaussian(stddev)
        return Correlated(
            stddev=stddev, coefficients=self.coefficients, rounds=self.rounds, bound=bound, messages=messages
        )

    def how(self, stddev: float, moved: float, sampling: Sampling, rounds: int) -> str:
        """See `NoiseMatrix.how`."""
        turns = math.ceil(rounds / sampling.separation)
        one = moved * self.column
        if self.hidden:
            bound = (
                f"A message moves the values under the fresh noise by at most {one:g}, all of it before the client's "
                f"next turn, of which there are at most {turns}; each is charged as one release of a client that a "
                "secret coin hides."
            )
        else:
            whole = moved * math.sqrt(self.charge(rounds, sampling))
            bound = (
                f"One message moves the values under the fresh noise by at most {one:g}, and all messages of a client, "
                f"at least {sampling.separation} rounds apart and at most {turns}, by at most {whole:g} (Euclidean "
                "norm): all rounds are charged as one release of that sensitivity."
            )
        return (
            f"Noise is correlated over rounds (banded matrix factorization, {len(self.coefficients)} bands). In each "
            f"of {rounds} rounds, fresh Gaussian noise of standard deviation {stddev:.6g} per coordinate is added to "
            f"the sum of messages, and shares of the noise of the last {len(self.coefficients) - 1} rounds are taken "
            f"off. {bound} Past noise is as secret as messages: the server keeps it in its checkpoint alone. "
            f"Its rounding in float64 is charged as a share of {self._slack:.2g} of the sensitivity."
        )

    def as_dict(self) -> dict[str, object]:
        """See `NoiseMatrix.as_dict`."""
        kind = "cyclic-banded" if self.hidden else "banded"
        record = {"bands": len(self.coefficients), "coefficients": list(self.coefficients), "damping": self.damping}
        return {"kind": kind, "rounds": self.rounds, **record}

    @property
    def _slack(self) -> float:
        return SLACK if len(self.coefficients) > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class FadingNoise:
    """Independent noise that fades over the run; see `Fading`. An experiment, under full participation only.

    Args:
        damping: lambda, in (0, 1).
        rounds: K.
    """

    damping: float
    rounds: int

    def __post_init__(self) -> None:
        plain_numbers(self)

    @property
    def hidden(self) -> bool:
        """False: everyone takes part in every round."""
        return False

    @property
    def column(self) -> float:
        """Norm of the change by a message in the last round, the largest of a single one."""
        return 1.0

    def charge(self, rounds: int, sampling: Sampling) -> float:
        """See `NoiseMatrix.charge`: the sum of squares over the first rounds, in all of which a client may be."""
        return self._at(1.0).sensitivity(1.0, rounds) ** 2

    def check(self, sampling: Sampling) -> None:
        """See `NoiseMatrix.check`."""
        if sampling.hiding_prob < 1.0 or sampling.separation > 1:
            expected = '"everyone" with kind = "geometric-schedule": rounds of unequal noise are charged as one'
            raise UserError("cohort.sampling", expected, f'"{sampling.name}"', 'Set it to "everyone"')

    def applied(self, patterns: np.ndarray) -> np.ndarray:
        """See `NoiseMatrix.applied`."""
        return patterns / [fading(self.damping, self.rounds - k) for k in range(1, patterns.shape[1] + 1)]

    def mechanism(self, stddev: float, bound: float, messages: int) -> Mechanism:
        """See `NoiseMatrix.mechanism`."""
        return self._at(stddev)

    def how(self, stddev: float, moved: float, sampling: Sampling, rounds: int) -> str:
        """See `NoiseMatrix.how`."""
        first, whole = stddev * fading(self.damping, self.rounds - 1), math.sqrt(self.charge(rounds, sampling))
        return (
            f"In {rounds} rounds, Gaussian noise is added to the sum of messages, of a standard deviation per "
            f"coordinate that falls from {first:.6g} in the first round to {stddev:.6g} in the last, by the square "
            f"root of {1.0 - self.damping:g} each round. All rounds together are one Gaussian release: a "
            f"client in all of them moves them by {moved / stddev * whole:.6g} standard deviations."
        )

    def as_dict(self) -> dict[str, object]:
        """See `NoiseMatrix.as_dict`."""
        return {"kind": "geometric-schedule", "rounds": self.rounds, "damping": self.damping}

    def _at(self, stddev: float) -> Fading:
        return Fading(stddev=stddev, damping=self.damping, rounds=self.rounds)


def read_matrix(record: Mapping[str, Any]) -> NoiseMatrix:
    """Return the matrix that wrote the record; raise KeyError or ValueError for another."""
    kind, rounds, damping = record["kind"], record["rounds"], record["damping"]
    if kind == "geometric-schedule":
        return FadingNoise(damping=damping, rounds=rounds)
    if kind not in ("banded", "cyclic-banded"):
        raise ValueError(f"no noise is called {kind!r}")
    coefficients = tuple(record["coefficients"])
    return Banded(coefficients=coefficients, rounds=rounds, damping=damping, hidden=kind == "cyclic-banded")


@dataclass(frozen=True, kw_only=True)
class NoiseChoice:
    """The noise over rounds, under trust central; the table `[noise]`.

    Args:
        kind: `independent`: fresh noise in every round. `banded`: noise that takes back earlier noise, for groups that
            take turns (`Separated`). `cyclic-banded`: the same, if coins decide who of a group takes part.
            `geometric-schedule`: independent noise that fades, an experiment for methods with damping, if everyone
            takes part in every round.
        bands: Number of coefficients for the banded kinds: bands - 1 earlier noise vectors are kept. None for
            `cohort.min_separation`.

    Raises:
        UserError: If a value is out of range.
    """

    kind: NoiseKind = field(metadata=_NAMED)
    bands: int | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.kind not in NOISE_KINDS:
            raise UserError("noise.kind", "a known name", repr(self.kind), nearest(str(self.kind), NOISE_KINDS))
        if self.bands is not None and not self.banded:
            raise UserError("noise.bands", f'no value with kind = "{self.kind}"', self.bands, "Remove it")
        if self.bands is not None and not is_whole(self.bands, 1):
            raise UserError("noise.bands", "a whole number from 1", self.bands, "Set it to cohort.min_separation")

    @property
    def banded(self) -> bool:
        """True for both kinds with bands."""
        return self.kind in ("banded", "cyclic-banded")

    def of(self, sampling: Sampling, rounds: int, damping: float) -> NoiseMatrix | None:
        """Return the matrix, checked against the sampling; None for independent noise.

        Args:
            sampling: The sampling of clients.
            rounds: Number of rounds.
            damping: The share of the method's memory that is forgotten each round; 0 without memory.

        Raises:
            UserError: If the noise cannot be accounted for, or would not help.
        """
        if self.kind == "independent":
            return None
        if self.kind == "geometric-schedule":
            return self._fading(sampling, rounds, damping)
        return self._of_bands(sampling, rounds, damping)

    def _fading(self, sampling: Sampling, rounds: int, damping: float) -> NoiseMatrix:
        if not damping > 0.0:
            expected = 'above 0 with noise.kind = "geometric-schedule": the noise fades as the memory does'
            raise UserError("method.damping", expected, damping, "Set it, or remove [noise]")
        if not (rounds - 1) * -0.5 * math.log1p(-damping) < math.log(_MAX_FADING):
            most = math.ceil(-2.0 * math.log(_MAX_FADING) / math.log1p(-damping))
            expected = f"at most {most:,} with this damping: the first rounds would have noise alone"
            raise UserError("training.rounds", expected, f"{rounds:,}", "Lower it or method.damping")
        found = FadingNoise(damping=damping, rounds=max(rounds, 1))
        found.check(sampling)
        return found

    def _of_bands(self, sampling: Sampling, rounds: int, damping: float) -> NoiseMatrix:
        from fedpriv.mechanisms.coefficients import optimal_coefficients  # imports scipy.optimize

        apart, hidden = sampling.separation, self.kind == "cyclic-banded"
        if apart < 2:
            expected = (
                f'"separated", with min_separation of at least 2, for kind = "{self.kind}": for a client that may be '
                "in every round, correlated noise could lower errors by at most a factor 1.225"
            )
            raise UserError("cohort.sampling", expected, f'"{sampling.name}"', "Set it, or remove [noise]")
        if hidden != (sampling.hiding_prob < 1.0):
            expected = "a value below 1 / min_separation" if hidden else "no value"
            other = "banded" if hidden else "cyclic-banded"
            remedy = f'Change it, or set noise.kind = "{other}"'
            raise UserError(
                "cohort.probability", f'{expected} with kind = "{self.kind}"', sampling.sampling_prob, remedy
            )
        bands = min(apart, max(rounds, 1)) if self.bands is None else self.bands
        if bands > apart:
            expected = f"at most {apart}, cohort.min_separation: windows would overlap, and more bands gain nothing"
            raise UserError("noise.bands", expected, bands, "Lower it, or raise cohort.min_separation")
        coefficients = optimal_coefficients(damping, max(rounds, 1), min(bands, max(rounds, 1)), apart)
        return Banded(coefficients=coefficients, rounds=max(rounds, 1), damping=damping, hidden=hidden)
