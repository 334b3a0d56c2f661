"""The null distribution of every score is exact for any releases."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from support.helpers import accepts_law, accepts_variance
from torch import Tensor

from fedpriv.audit.scores import Null, coordinate_scores, gram, projections

RELEASES = {
    "noise": lambda rng, k, d: rng.standard_normal((k, d)),
    "a signal that grows": lambda rng, k, d: (
        np.outer(np.arange(k), rng.standard_normal(d)) + rng.standard_normal((k, d))
    ),
    "the same in every round": lambda rng, k, d: np.tile(rng.standard_normal(d), (k, 1)),
    "in few coordinates": lambda rng, k, d: rng.standard_normal((k, d)) * (np.arange(d) < d // 4),
    "huge": lambda rng, k, d: 1e12 * rng.standard_normal((k, d)),
}


def unseen(size: int, rounds: int, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    directions = rng.standard_normal((4000, size))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return torch.from_numpy(directions), rng.choice([-1.0, 1.0], (4000, rounds))


@pytest.mark.parametrize("kind", RELEASES)
@pytest.mark.parametrize(("rounds", "size"), [(10, 500), (40, 60)])
def test_directions_in_no_run_score_the_standard_normal(kind: str, rounds: int, size: int) -> None:
    """Also with fewer than three parameters per round, when weights are shrunk."""
    rng = np.random.default_rng(5)
    released = torch.from_numpy(RELEASES[kind](rng, rounds, size))
    directions, patterns = unseen(size, rounds, rng)
    null, projected = Null.of(gram(released), size), projections(directions, released)
    for scores in (null.matched(projected, patterns), null.whitened(projected, patterns)):
        if kind == "the same in every round":  # signs that add up to 0 leave only rounding errors, which count as noise
            assert scores.std() <= 1.02
        else:
            assert accepts_variance(scores, 1.0)
            assert accepts_law(scores, stats.norm.cdf)


def test_signs_in_no_run_score_the_standard_normal_at_any_coordinate() -> None:
    rng = np.random.default_rng(6)
    columns = rng.standard_normal((4000, 40)) * rng.uniform(0.0, 5.0, (4000, 1)) + np.linspace(0.0, 3.0, 40)
    scores = coordinate_scores(columns, rng.choice([-1.0, 1.0], (4000, 40)))
    assert accepts_variance(scores, 1.0)
    assert np.abs(scores).max() <= math.sqrt(40)


def test_whitening_finds_rounds_without_noise_and_matching_does_not() -> None:
    rng = np.random.default_rng(7)
    rounds, size = 20, 400
    directions, patterns = unseen(size, rounds, rng)
    released = rng.standard_normal((rounds, size)) * 5.0
    released[[4, 9]] *= 0.001
    released = torch.from_numpy(released + np.outer(patterns[0], directions[0].numpy()))
    null, projected = Null.of(gram(released), size), projections(directions[:1], released)
    assert null.whitened(projected, patterns[:1])[0] > 10.0
    assert null.matched(projected, patterns[:1])[0] < 4.0


def test_a_candidate_that_never_took_part_scores_nothing() -> None:
    released = torch.randn(5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    null, none = Null.of(gram(released), 30), np.zeros((2, 5))
    assert null.whitened(projections(released[:2], released), none).tolist() == [0.0, 0.0]
    assert coordinate_scores(np.ones((2, 5)), none).tolist() == [0.0, 0.0]


def test_sums_over_columns_do_not_depend_on_their_blocks() -> None:
    wide = torch.randn(4, 70_000, generator=torch.Generator().manual_seed(1))
    exact = wide.double()
    assert np.allclose(gram(wide), (exact @ exact.T).numpy(), rtol=1e-12)
    assert np.allclose(projections(wide[:2], wide), (exact[:2] @ exact.T).numpy(), rtol=1e-12)
