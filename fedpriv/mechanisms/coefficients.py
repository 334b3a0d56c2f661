"""The coefficients of correlated noise: an optimum by gradient descent, in float64.

For a workload A and clients with known gaps between their rounds, the mean squared error over rounds at equal privacy
is mean_k |row_k(A C^-1)|^2 sens(C)^2. It is minimized by L-BFGS over positive coefficients that never increase,
c_j = c_{j-1} sigmoid(theta_j). Privacy does not depend on how good the result is.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

from functools import lru_cache

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from fedpriv.mechanisms.correlated import filtered

__all__ = ["optimal_coefficients", "workload"]

_STEPS = 500
_FINEST = 2.0**-16  # Coefficients are multiples of it, so that last digits of a machine's arithmetic do not matter.


def workload(damping: float, rounds: int) -> np.ndarray:
    """Return the first column of A, (1 - lambda)^j, float64 `[rounds]`: a memory that forgets `damping` a round.

    With damping 0, these are sums over all rounds: a model without memory, or a memory that never fades.
    """
    return (1.0 - damping) ** np.arange(rounds, dtype=np.float64)


@lru_cache(maxsize=64)
def optimal_coefficients(damping: float, rounds: int, bands: int, separation: int) -> tuple[float, ...]:
    """Return c with c_0 = 1, at most `bands` numbers; never worse than independent noise, c = (1,).

    Args:
        damping: lambda of the workload; see `workload`.
        rounds: K, at least 1.
        bands: Maximum number of coefficients, from 1 to K.
        separation: The fewest rounds from one message of a client to its next.
    """
    column = workload(damping, rounds)
    if bands == 1:
        return (1.0,)
    steps = np.arange(1, bands)
    first = logit(np.clip((1.0 - damping) * (2 * steps - 1) / (2 * steps), 1e-6, 1.0 - 1e-6))
    found = minimize(
        _objective, first, (column, separation), method="L-BFGS-B", jac=True, options={"maxiter": _STEPS, "ftol": 1e-14}
    )
    coefficients = np.floor(_coefficients(np.asarray(found.x)) / _FINEST) * _FINEST
    coefficients = coefficients[: np.count_nonzero(coefficients)]
    independent = np.ones(1)
    if _loss(coefficients, column, separation)[0] >= _loss(independent, column, separation)[0]:
        return (1.0,)
    return tuple(coefficients.tolist())


def _coefficients(theta: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones(1), np.cumprod(np.asarray(expit(theta)))])


def _objective(theta: np.ndarray, column: np.ndarray, separation: int) -> tuple[float, np.ndarray]:
    """Return the log of the loss, and its gradient in theta."""
    coefficients = _coefficients(theta)
    loss, slope = _loss(coefficients, column, separation)
    later = np.cumsum((coefficients * slope)[::-1])[::-1][1:]
    return loss, later * np.asarray(expit(-theta))


def _loss(coefficients: np.ndarray, column: np.ndarray, separation: int) -> tuple[float, np.ndarray]:
    """Return the log of error times squared sensitivity, and its gradient in c.

    With x = C^-1 a and w_i the share of rounds that x_i counts in, the error is sum_i w_i x_i^2. As C x = a, a change
    of c_j changes x by -C^-1 of x, shifted by j. The sensitivity is the norm of the sum of columns 0, b, 2 b, ...
    """
    rounds, bands = len(column), len(coefficients)
    x = filtered(column, (1.0,), tuple(coefficients))
    weighted = x * (np.arange(rounds, 0, -1) / rounds)
    error = float(x @ weighted)
    back = filtered(weighted[::-1], (1.0,), tuple(coefficients))[::-1]
    by_error = np.array([-2.0 * float(back[j:] @ x[: rounds - j]) for j in range(bands)])
    pulses = np.zeros(rounds)
    pulses[::separation] = 1.0
    moved = filtered(pulses, tuple(coefficients))
    by_moved = np.array([2.0 * float(moved[j:] @ pulses[: rounds - j]) for j in range(bands)])
    squared = float(moved @ moved)
    return float(np.log(error) + np.log(squared)), by_error / error + by_moved / squared
