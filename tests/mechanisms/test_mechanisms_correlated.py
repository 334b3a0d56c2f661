"""Correlated noise: its matrix, its sensitivity, its coefficients and the mechanism that draws it."""

import math
from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpriv.errors import UserError
from fedpriv.mechanisms.coefficients import optimal_coefficients, workload
from fedpriv.mechanisms.correlated import SLACK, Correlated, Fading, filtered, row_norms, squared_sensitivity
from fedpriv.mechanisms.gaussian import release_grid, rounded_noise
from fedpriv.mechanisms.noise import Gaussian, release_sum
from fedpriv.streams import Purpose, SeededStreams

SIZE = 300


def toeplitz(column: tuple[float, ...], rounds: int) -> np.ndarray:
    matrix = np.zeros((rounds, rounds))
    for j, c in enumerate(column[:rounds]):
        matrix += c * np.eye(rounds, k=-j)
    return matrix


def mechanism(coefficients: tuple[float, ...], stddev: float = 2.0, rounds: int = 12) -> Correlated:
    return Correlated(stddev=stddev, coefficients=coefficients, rounds=rounds, bound=1.0, messages=10)


def sums(rounds: int, size: int = SIZE) -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).standard_normal((rounds, size)))


def played(mechanism: Correlated, totals: Tensor, seed: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Return the releases of all rounds, and the states after each."""
    state, released, states = mechanism.init(totals.shape[1]), [], []
    for k, total in enumerate(totals, start=1):
        noisy, state = mechanism.noise(state, total, SeededStreams(seed), k)
        released.append(noisy)
        states.append(state.noise_earlier)
    return torch.stack(released), states


def schemas(rounds: int, separation: int) -> list[tuple[int, ...]]:
    """All sets of rounds that are at least `separation` apart."""
    every = (chosen for many in range(1, rounds + 1) for chosen in combinations(range(rounds), many))
    return [chosen for chosen in every if all(b - a >= separation for a, b in pairwise(chosen))]


@pytest.mark.parametrize(("separation", "bands"), [(1, 1), (1, 3), (2, 2), (2, 5), (3, 3), (4, 2), (4, 10)])
def test_the_sensitivity_is_that_of_the_worst_of_all_sets_of_rounds(separation: int, bands: int) -> None:
    """For one direction of all messages, the worst by |C'C| entries >= 0; also for the first rounds of the run."""
    rounds = 10
    c = optimal_coefficients(0.05, rounds, bands, max(separation, 2))
    for first in (rounds, 7, 4, 1):
        gram = (matrix := toeplitz(c, first)).T @ matrix
        worst = max(gram[np.ix_(chosen, chosen)].sum() for chosen in schemas(first, separation))
        assert squared_sensitivity(c, first, separation) == pytest.approx(worst, rel=1e-12)
    assert squared_sensitivity(c, 0, separation) == 0.0


def test_random_directions_of_messages_move_no_more() -> None:
    c = optimal_coefficients(0.0, 9, 3, 3)
    matrix, rng = toeplitz(c, 9), np.random.default_rng(0)
    most = 0.0
    for chosen, _ in product(schemas(9, 2), range(5)):
        messages = np.zeros((9, 3))
        messages[list(chosen)] = rng.standard_normal((len(chosen), 3))
        messages /= np.maximum(np.linalg.norm(messages, axis=1, keepdims=True), 1e-12)
        most = max(most, float(np.square(matrix @ messages).sum()))
    assert 0.5 < most / squared_sensitivity(c, 9, 2) <= 1.0 + 1e-12


def test_columns_of_b_bands_that_are_b_apart_are_orthogonal() -> None:
    c = optimal_coefficients(0.0, 100, 20, 20)
    one = sum(x * x for x in c)
    assert squared_sensitivity(c, 100, 20) == pytest.approx(5 * one, rel=1e-12)
    assert squared_sensitivity(c, 81, 20) == pytest.approx(4 * one + 1.0, rel=1e-12)


# Of a prototype with the same loss in torch: damping, b, mean and last error at unit noise, and the first coefficients.
GOLDEN = [
    (0.0, 5, 16.2, 31.8, (0.678, 0.580, 0.516)),
    (0.0, 20, 5.74, 15.9, (0.537, 0.421, 0.362)),
    (0.0, 50, 3.33, 10.05, (0.509, 0.386, 0.324)),
    (0.03, 20, 4.04, 8.44, (0.491, 0.360, 0.292)),
    (0.1, 5, 6.80, 10.04, (0.473, 0.327, 0.248)),
    (0.1, 20, 3.23, 5.02, (0.449, 0.302, 0.225)),
    (0.3, 20, 2.62, 3.12, (0.348, 0.182, 0.106)),
]


@pytest.mark.parametrize(("damping", "separation", "best", "independent", "first"), GOLDEN)
def test_the_coefficients_are_those_of_another_implementation(
    damping: float, separation: int, best: float, independent: float, first: tuple[float, ...]
) -> None:
    found = optimal_coefficients(damping, 100, separation, separation)
    for c, expected in ((found, best), ((1.0,), independent)):
        errors = row_norms(c, workload(damping, 100))
        rmse = math.sqrt(float(np.square(errors).mean()) * squared_sensitivity(c, 100, separation))
        assert rmse == pytest.approx(expected, rel=2e-3)
    assert found[1:4] == pytest.approx(first, abs=1.6e-3)
    assert len(found) == separation
    assert all(a >= b > 0.0 for a, b in pairwise(found))


@pytest.mark.parametrize("damping", [0.0, 0.1, 0.3])
def test_coefficients_are_never_worse_than_none_and_none_under_full_participation(damping: float) -> None:
    for rounds, bands, separation in ((1, 1, 1), (30, 30, 1), (30, 5, 1), (7, 7, 20), (30, 3, 10)):
        c = optimal_coefficients(damping, rounds, bands, separation)
        mean = np.square(row_norms(c, workload(damping, rounds))).mean() * squared_sensitivity(c, rounds, separation)
        alone = np.square(row_norms((1.0,), workload(damping, rounds))).mean()
        assert mean <= alone * squared_sensitivity((1.0,), rounds, separation) * (1.0 + 1e-12)
        assert (c == (1.0,)) == (separation == 1)


@pytest.mark.parametrize("c", [(1.0,), (1.0, 0.5), optimal_coefficients(0.0, 40, 40, 40), (1.0,) * 40])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_no_matrix_beats_the_bound_under_full_participation(c: tuple[float, ...], damping: float) -> None:
    """A client that sends one vector in all of the first k rounds moves row k of A by (A 1)_k (Cauchy and Schwarz)."""
    column = workload(damping, 40)
    for k in range(1, 41):
        error = row_norms(c, column[:k])[-1] * math.sqrt(squared_sensitivity(c, k, 1))
        assert error >= column[:k].sum() * (1.0 - 1e-12)


def test_the_noise_times_the_matrix_is_fresh_noise() -> None:
    """C w = z, to the rounding of releases; z is the noise of one round alone."""
    c, rounds = optimal_coefficients(0.0, 12, 4, 4), 12
    released, states = played(mechanism(c), totals := sums(rounds))
    noise = (released - totals).numpy()
    fresh = torch.from_numpy(toeplitz(c, rounds) @ noise)
    alone = torch.stack([release_sum(SeededStreams(1), 2.0, torch.zeros(SIZE).double(), k) for k in range(1, 13)])
    assert float((fresh - alone).abs().max()) <= release_grid(2.0) * (1.0 + 1e-9)
    inverse = filtered(np.eye(rounds), (1.0,), c).T
    assert np.allclose(toeplitz(c, rounds) @ inverse, np.eye(rounds), atol=1e-12)
    kept = torch.from_numpy(noise[[11, 10, 9]])
    assert torch.equal(states[-1], kept)
    assert float(torch.remainder(released, release_grid(2.0)).abs().max()) == 0.0
    assert float(torch.remainder(states[-1], release_grid(2.0)).abs().max()) > 0.0


def test_a_run_equals_an_independent_reference() -> None:
    """The definition with another loop, in exact order: the past noise of each round, from releases alone."""
    c, rounds, grid = optimal_coefficients(0.1, 9, 3, 3), 9, release_grid(0.7)
    released, _ = played(mechanism(c, 0.7, rounds), totals := sums(rounds, 20), seed=4)
    expected: list[np.ndarray] = []
    for k in range(rounds):
        words = SeededStreams(4).source(Purpose.SERVER_NOISE, k + 1)
        taken = totals[k].numpy().copy()
        for j in range(1, min(k, 2) + 1):
            taken -= c[j] * (expected[k - j] - totals[k - j].numpy())
        expected.append(rounded_noise(taken, 0.7, words) * grid)
    assert np.array_equal(released.numpy(), np.stack(expected))


@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_the_memory_of_a_server_has_the_noise_of_its_row(damping: float) -> None:
    """Monte Carlo over 40,000 coordinates: the relative error of a deviation is 0.35 %; 2 % is 5.6 of these.

    Rounding to the grid adds at most 0.27 % to the deviation. Independent noise would have 1.4 times as much or more.
    """
    rounds, c = 20, optimal_coefficients(damping, 20, 10, 10)
    size = 40_000
    released, _ = played(mechanism(c, 1.0, rounds), torch.zeros(rounds, size).double())
    memory = torch.zeros(size).double()
    expected = row_norms(c, workload(damping, rounds))
    for k in range(rounds):
        memory = (1.0 - damping) * memory + released[k]
        assert float(memory.std()) == pytest.approx(expected[k], rel=0.02)
    assert expected[-1] < row_norms((1.0,), workload(damping, rounds))[-1] / 1.4


def test_one_band_is_independent_noise_to_the_bit() -> None:
    released, states = played(mechanism((1.0,)), totals := sums(6))
    for k in range(6):
        alone, _ = Gaussian(2.0).noise(Gaussian(2.0).init(SIZE), totals[k], SeededStreams(1), k + 1)
        assert torch.equal(released[k], alone)
    assert states[-1].shape == (0, SIZE)


def test_no_noise_leaves_sums_as_they_are() -> None:
    released, states = played(mechanism((1.0, 0.5), 0.0), totals := sums(4))
    assert torch.equal(released, totals)
    assert float(states[-1].abs().max()) == 0.0


@pytest.mark.parametrize(
    "noise", [mechanism((1.0, 0.5), rounds=4), Fading(stddev=1.0, damping=0.1, rounds=4)], ids=["banded", "fading"]
)
def test_rounds_beyond_those_accounted_for_get_no_noise(noise: Correlated | Fading) -> None:
    for round in (0, 5):
        with pytest.raises(ValueError, match="accounted for 4 rounds"):
            noise.noise(noise.init(3), torch.zeros(3).double(), SeededStreams(0), round)  # type: ignore[arg-type]


def test_rounding_that_the_plan_does_not_cover_is_refused() -> None:
    """The bound of the module: 2 (bands + 1) 2^-53 sqrt(K) (largest sum + 20 |c|_1 deviation sqrt(d)) <= SLACK B."""
    many = Correlated(stddev=1.0, coefficients=(1.0, 0.5), rounds=10**6, bound=1e-3, messages=1000)
    assert many.init(0).noise_earlier.shape == (1, 0)
    spread = float(row_norms((1.0, 0.5), np.eye(1, 99)[0])[-1])
    longest = SLACK * 1e-3 / (2 * 3 * 2.0**-53 * 1000) - 1.0
    size = (longest / (20 * 1.5 * spread * many.stddev)) ** 2
    assert many.init(int(0.999 * size)).noise_earlier.shape[1] > 1000
    with pytest.raises(UserError, match=r"noise\.bands: expected a model and noise with a rounding"):
        many.init(int(1.001 * size))


def test_noise_beyond_the_memory_is_refused_before_it_is_allocated() -> None:
    noise = Correlated(stddev=1e-3, coefficients=(1.0, 0.5), rounds=12, bound=1.0, messages=9)
    with pytest.raises(UserError, match=r"noise\.bands: expected an object that fits in memory"):
        noise.init(10**12)


def test_fading_noise_falls_as_its_memory_does_and_says_what_it_hides() -> None:
    noise = Fading(stddev=0.5, damping=0.2, rounds=6)
    zeros = torch.zeros(30_000).double()
    spread = [float(noise.noise(noise.init(1), zeros, SeededStreams(2), k)[0].std()) for k in range(1, 7)]
    assert spread == pytest.approx([0.5 * 0.8 ** (-(6 - k) / 2) for k in range(1, 7)], rel=0.025)
    squares = [0.8 ** (6 - k) for k in range(1, 7)]
    for first in range(7):
        assert noise.sensitivity(3.0, first) == pytest.approx(3.0 * math.sqrt(sum(squares[:first])))
    assert noise.event(3.0, 6) == pytest.approx(6.0 * math.sqrt(sum(squares)))
    assert mechanism((1.0, 0.5)).event(1.0, 2) == pytest.approx(math.sqrt(1.0 + 1.5**2) / 2.0)
    assert mechanism((1.0, 0.5), 0.0).event(1.0, 2) == math.inf


def test_fading_noise_is_the_best_for_the_last_memory_under_full_participation() -> None:
    """It attains Cauchy and Schwarz' bound: the last error times the sensitivity is the sum of A's last row."""
    damping, rounds = 0.3, 24
    noise = Fading(stddev=1.0, damping=damping, rounds=rounds)
    column = workload(damping, rounds)
    spread = [(1.0 - damping) ** (-more / 2) for more in range(rounds)]
    error = math.sqrt(float(np.square(column * spread).sum()))
    assert error * noise.sensitivity(1.0, rounds) == pytest.approx(column.sum())
    independent = math.sqrt(float(np.square(column).sum()) * rounds)
    assert independent / column.sum() == pytest.approx(2.06, abs=0.01)
