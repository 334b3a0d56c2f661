"""The trade-off curve: below every bound's limit, exact for Gaussian plans, and plotted."""

from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from fedpriv.errors import UserError
from fedpriv.experiment.pictures.tradeoff import envelope, plot_trade_off, trade_off
from fedpriv.privacy import Everyone, Poisson, PrivacyPlan, Sampling
from fedpriv.privacy.gaussian import gaussian_tradeoff

GRID = np.linspace(0.0, 1.0, 101)


def plan(sampling: Sampling, noise: float = 4.0) -> PrivacyPlan:
    return PrivacyPlan(
        trust="central",
        adjacency="add-or-remove",
        sampling=sampling,
        rounds=16,
        delta=1e-5,
        l2_bound=1.0,
        noise_multiplier=noise,
    )


def test_the_gaussian_curve_is_that_of_a_threshold_test() -> None:
    normal = NormalDist()
    for threshold in (-1.0, 0.0, 0.7, 2.0):
        alarm, miss = 1.0 - normal.cdf(threshold), normal.cdf(threshold - 1.3)
        assert gaussian_tradeoff(np.array([alarm]), 1.3)[0] == pytest.approx(miss)
    assert gaussian_tradeoff(GRID, 0.0) == pytest.approx(1.0 - GRID)


def test_one_bound_is_two_lines_that_meet_on_the_diagonal() -> None:
    epsilon, delta = np.log(3.0), 0.1
    curve = envelope([(epsilon, delta)], GRID)
    assert curve == pytest.approx(np.maximum.reduce([0.9 - 3.0 * GRID, (0.9 - GRID) / 3.0, 0.0 * GRID]))
    assert envelope([(0.0, 0.0)], GRID) == pytest.approx(1.0 - GRID)
    assert envelope([(float("inf"), 1e-5), (1e5, 1e-6)], GRID) == pytest.approx(0.0 * GRID)


def test_the_envelope_of_a_gaussian_plan_is_below_its_exact_curve_and_touches_it() -> None:
    made = plan(Everyone(50))
    alarms, misses = trade_off(made)
    assert misses == pytest.approx(gaussian_tradeoff(alarms, 1.0))
    bounds = [(epsilon, delta) for delta, epsilon in made.epsilons((0.03, 0.1, 0.2, 0.3)).items()]
    gap = misses - envelope(bounds, alarms)
    assert gap.min() > -1e-9
    assert 0.0 < gap.max() < 0.03


def test_a_hidden_cohort_is_harder_to_tell_than_a_known_one() -> None:
    alarms, hidden = trade_off(plan(Poisson(50, 0.2)))
    _, known = trade_off(plan(Everyone(50)))
    assert (hidden >= known - 1e-6).all()
    assert (hidden > known + 0.1).any()
    assert (hidden <= 1.0 - alarms + 1e-9).all()


def test_the_picture_is_a_png_and_nothing_promised_draws_none(tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    plot_trade_off(plan(Everyone(50)), picture, "a $name_{x}")
    assert picture.read_bytes().startswith(b"\x89PNG")
    for nothing in (None, plan(Everyone(50), noise=0.0)):
        with pytest.raises(UserError, match="--plot"):
            plot_trade_off(nothing, tmp_path / "none.png", "x")
    with pytest.raises(UserError, match=r"\.png"):
        plot_trade_off(plan(Everyone(50)), tmp_path / "none.gif", "x")
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]
