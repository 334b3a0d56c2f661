"""The trade-off curve of a plan: how well the best test can detect one client's data."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fedpriv.errors import UserError, naming, plural, require_extra
from fedpriv.privacy import PrivacyPlan, rounded_up
from fedpriv.privacy.gaussian import gaussian_tradeoff

__all__ = ["envelope", "plot_trade_off", "trade_off"]

# Small deltas bound the ends of the curve, large ones its middle.
_DELTAS = (1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.04)
_DELTAS += (0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.3, 0.5, 0.8)

_TYPE_I = np.linspace(0.0, 1.0, 501)

# The largest argument of `exp`, with room for the factors that multiply its result.
_MAX_EXPONENT = 700.0


def envelope(bounds: Iterable[tuple[float, float]], type_i: np.ndarray) -> np.ndarray:
    """Return the least type II error that all (epsilon, delta) bounds together allow, at each type I error.

    Formal guarantees:
        (epsilon, delta)-differential privacy, in both directions, is the same as the bound
        max(0, 1 - delta - e^epsilon a, e^-epsilon (1 - delta - a)) at type I error a (Wasserman, Zhou 2010). Several
        bounds hold at once, so their maximum does.
    """
    least = np.zeros_like(type_i)
    for epsilon, delta in bounds:
        if epsilon > _MAX_EXPONENT:
            continue
        steep = 1.0 - delta - math.exp(epsilon) * type_i
        flat = math.exp(-epsilon) * (1.0 - delta - type_i)
        least = np.maximum(least, np.maximum(steep, flat))
    return least


def trade_off(plan: PrivacyPlan) -> tuple[np.ndarray, np.ndarray]:
    """Return type I errors from 0 to 1 and, for each, a lower bound on the type II error of the plan's adversary.

    Uses the exact Gaussian curve if the plan has an exact mu; otherwise the envelope of its epsilons at several deltas.
    """
    mu = plan.gaussian_dp_mu
    if mu is not None:
        return _TYPE_I, gaussian_tradeoff(_TYPE_I, mu)
    bounds = [(epsilon, delta) for delta, epsilon in plan.epsilons(_DELTAS).items()]
    return _TYPE_I, envelope(bounds, _TYPE_I)


def plot_trade_off(plan: PrivacyPlan | None, path: Path, name: str) -> None:
    """Draw a plan's trade-off curve as a PNG.

    Args:
        plan: The plan; None for a non-private experiment.
        path: The file to write; ends in `.png`.
        name: The experiment's name, for the title.

    Raises:
        UserError: If the experiment is not private, the file is not a PNG, or the plotting packages are missing.
    """
    require_extra("--plot", "report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.suffix.lower() != ".png":
        raise UserError("--plot", "a file that ends in .png", str(path), "Rename the file")
    if plan is None or not plan.private:
        raise UserError(
            "--plot", "a private experiment", "one without a privacy guarantee", "Add [privacy] with an epsilon"
        )
    type_i, type_ii = trade_off(plan)
    figure = Figure(figsize=(5.6, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(plan, name), fontsize=10, parse_math=False)
    axes = figure.subplots()
    axes.plot([0, 1], [1, 0], color="#888888", linestyle="--", label="perfect privacy: no test beats guessing")
    axes.plot(type_i, type_ii, color="#0072B2", label=_label(plan))
    axes.fill_between(type_i, 0.0, type_ii, color="#0072B2", alpha=0.08)
    axes.text(0.03, 0.03, "no test gets below the curve", color="#0072B2", fontsize=8)
    axes.set(xlabel="type I error (false alarm)", ylabel="type II error (miss)", xlim=(0, 1), ylim=(0, 1))
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=8)
    with naming(path):
        figure.savefig(path, dpi=120, format="png")


def _title(plan: PrivacyPlan, name: str) -> str:
    promise = f"epsilon {rounded_up(plan.epsilon)} at delta {plan.delta:g}, {plan.adjacency}"
    rounds = f"{plan.rounds} {plural('round', plan.rounds)}"
    return f"{name}: detecting one client's data\ntrust {plan.trust}, {promise}, {rounds}"


def _label(plan: PrivacyPlan) -> str:
    mu = plan.gaussian_dp_mu
    if mu is None:
        return f"bound from epsilon at {len(plan.epsilons(_DELTAS))} deltas"
    return f"Gaussian mechanism, mu = {rounded_up(mu)} (exact)"
