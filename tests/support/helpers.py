"""Shared parts of several tests: an example of every method, adversarial numbers, exact norms, two-sided statistics."""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fedpriv.feedback import Release
from fedpriv.methods import (
    DIFF2,
    DPGD,
    AdaptiveBound,
    AlphaNormEC,
    CenteredClip,
    Clip21,
    Clip21SGD2M,
    DiceSGD,
    DPFedAvg,
    DPScaffold,
    FedAlphaNormEC,
    FedSpeed,
    Method,
    NormalizedSGD,
    PrivateIHT,
    PrivateSpiderBoost,
    optimized,
    server_step,
    with_side_values,
)
from fedpriv.methods.server_optimizers import Adagrad, Adam, Momentum, ServerOptimized, Yogi

FALSE_ALARM = 1e-9
"""Probability with which one statistical test fails although the law holds."""

thorough = settings(max_examples=120, deadline=None, derandomize=True, database=None)
brief = settings(thorough, max_examples=40)


def adding(noise: Tensor | None) -> Release | None:
    """Return a release that adds a given noise to a message, without rounding; None for None."""
    return None if noise is None else lambda message: message + noise


EXAMPLES: dict[str, Method] = {
    "alpha-normec": AlphaNormEC(alpha=1.0, beta=0.5, server_lr=0.1),
    "alpha-normec without server normalization": AlphaNormEC(
        alpha=0.5, beta=0.5, server_lr=0.2, server_normalization=False
    ),
    "alpha-normec with a small alpha": AlphaNormEC(alpha=0.01, beta=0.01, server_lr=0.1, server_normalization=False),
    "alpha-normec damped": AlphaNormEC(alpha=1.0, beta=0.3, server_lr=0.5, server_normalization=False, damping=0.1),
    "alpha-normec damped and normalized": AlphaNormEC(alpha=0.1, beta=0.05, server_lr=0.1, damping=0.02),
    "alpha-normec sent": AlphaNormEC(alpha=1.0, beta=0.3, server_lr=0.5, server_normalization=False, memory="sent"),
    "alpha-normec sent, damped and normalized": AlphaNormEC(
        alpha=1.0, beta=0.5, server_lr=0.1, memory="sent", damping=0.2
    ),
    "fed-alpha-normec": FedAlphaNormEC(alpha=0.5, beta=0.2, server_lr=0.1),
    "normalized-sgd": NormalizedSGD(alpha=0.5, server_lr=0.5),
    "clip21": Clip21(clip_norm=0.5, server_lr=0.2),
    "clip21 with a tight clip": Clip21(clip_norm=0.01, server_lr=0.5),
    "dp-fedavg": DPFedAvg(clip_norm=0.5, server_lr=0.5),
    "dp-fedavg with server adam": optimized(DPFedAvg(clip_norm=0.5, server_lr=0.02), Adam(tau=0.01)),
    "clip21 with server momentum": optimized(Clip21(clip_norm=0.5, server_lr=0.05), Momentum(momentum=0.8)),
    "alpha-normec damped with server yogi": optimized(
        AlphaNormEC(alpha=1.0, beta=0.3, server_lr=0.02, server_normalization=False, damping=0.1), Yogi(tau=0.01)
    ),
    "alpha-normec sent with server adagrad": optimized(
        AlphaNormEC(alpha=1.0, beta=0.3, server_lr=0.05, server_normalization=False, memory="sent"),
        Adagrad(beta1=0.5, tau=0.1),
    ),
    "dp-gd": DPGD(max_norm=0.5, server_lr=0.5),
    "dp-scaffold": DPScaffold(clip_norm=0.5, server_lr=0.2),
    "clip21-sgd2m": Clip21SGD2M(clip_norm=0.5, weight=0.4, beta=0.6, server_lr=0.2),
    "diff2": DIFF2(clip_norm=0.5, smoothness=2.0, period=3, server_lr=0.5),
    "private-spiderboost": PrivateSpiderBoost(
        clip_norm=0.5, smoothness=20.0, period=4, restart_weight=1.5, server_lr=0.2
    ),
    "dice-sgd": DiceSGD(clip_norm=0.3, feedback_clip=0.2, gradient_cap=1.0, server_lr=0.5),
    "centered-clip": CenteredClip(clip_norm=0.5, beta=0.4, server_lr=0.3),
    "centered-clip normalized, with server momentum": optimized(
        CenteredClip(bound="normalize", alpha=0.5, server_lr=0.1), Momentum(momentum=0.5)
    ),
    "fedspeed": FedSpeed(clip_norm=0.5, prox=0.2, server_lr=0.5),
    "private-iht": PrivateIHT(sparsity=3, clip_norm=0.5, step_size=0.5),
}
"""Name of the method, as in the table of all, and the difference of this example. Every method needs one."""

WITH_SIDE_VALUES: dict[str, Method] = {
    "dp-fedavg with an adaptive bound": with_side_values(DPFedAvg(clip_norm=0.5, server_lr=0.5), AdaptiveBound()),
    "alpha-normec sent, damped, with an adaptive bound": with_side_values(
        AlphaNormEC(alpha=0.5, beta=0.3, server_lr=0.1, memory="sent", damping=0.1), AdaptiveBound(quantile=0.3)
    ),
    "centered-clip with an adaptive bound and server momentum": optimized(
        with_side_values(CenteredClip(server_lr=0.1), AdaptiveBound(rate=0.5)), Momentum(momentum=0.5)
    ),
    "clip21 with an adaptive bound": with_side_values(Clip21(clip_norm=0.5, server_lr=0.2), AdaptiveBound(share=0.1)),
}
"""Methods with messages that are longer than their signals, and shorter than 1."""

LINEAR = {
    name: method
    for name, method in EXAMPLES.items()
    if not isinstance(method, DIFF2 | PrivateIHT)
    and (not isinstance(method, ServerOptimized) or isinstance(method.optimizer, Momentum))
}
"""Those with a linear server rule, except for the direction of a normalized step: adaptive steps are not, nor are
differences, which count by the length of the last step."""

WITH_MEMORY = {name: method for name, method in EXAMPLES.items() if "memory" in method.init_client(1)._fields}

SINGLE = [0.0, -0.0, 1.0, 1e-45, -1e-45, 1.2e-38, 1e-20, 2.0**95.9, 1e29, 3e38, 3.4028234663852886e38]
DOUBLE = [*SINGLE, 5e-324, 1e-170, 1e160, 1e300, 1.7976931348623157e308]
NON_FINITE = [float("nan"), float("inf"), -float("inf")]


def numbers(dtype: torch.dtype, *, finite: bool = False) -> st.SearchStrategy[float]:
    """Numbers that break norms: zeros, subnormals, the largest, and NaN and infinities unless `finite`."""
    width, corners = (32, SINGLE) if dtype == torch.float32 else (64, DOUBLE)
    special = [float(torch.tensor(corner, dtype=dtype)) for corner in corners] + ([] if finite else NON_FINITE)
    anything = st.floats(width=width, allow_nan=not finite, allow_infinity=not finite)
    ordinary = st.floats(-100.0, 100.0, width=width)
    return st.one_of(st.sampled_from(special), ordinary, anything)


@st.composite
def rows(
    draw: st.DrawFn, *, dtype: torch.dtype | None = None, finite: bool = False, least: int = 1, size: int | None = None
) -> Tensor:
    """A few rows `[rows, params]` of adversarial numbers, float32 or float64."""
    chosen = dtype or draw(st.sampled_from([torch.float32, torch.float64]))
    width = draw(st.integers(0, 5)) if size is None else size
    height = draw(st.integers(least, 4))
    number = numbers(chosen, finite=finite)
    cells = draw(st.lists(number, min_size=height * width, max_size=height * width))
    return torch.tensor(cells, dtype=chosen).reshape(height, width)


def within(vector: Tensor, bound: float) -> bool:
    """Return True if ||vector||_2 <= bound, in exact arithmetic; False if a coordinate is not finite."""
    return bool(torch.isfinite(vector).all()) and squared_norm(vector) <= Fraction(bound) ** 2


def squared_norm(vector: Tensor) -> Fraction:
    """The exact square of a finite vector's l2 norm."""
    return sum((Fraction(float(coordinate)) ** 2 for coordinate in vector.reshape(-1).tolist()), Fraction(0))


def same(first: Tensor, second: Tensor) -> bool:
    """Return True if two tensors are equal to the bit, NaN and the sign of zero included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return first.detach().numpy().tobytes() == second.detach().numpy().tobytes()


def stacked(states: list[Any]) -> Any:
    """One state `[clients, ...]` from the states of single clients."""
    return type(states[0])(*(torch.stack(fields) for fields in zip(*states, strict=True)))


def row_of(state: Any, row: int) -> Any:
    """One client's state from a state `[clients, ...]`."""
    return type(state)(*(field[row] for field in state))


def fresh_clients(method: Method, clients: int, size: int, dtype: torch.dtype = torch.float64) -> Any:
    """The states `[clients, ...]` of clients that never took part."""
    state = stacked([method.init_client(size) for _ in range(clients)]) if clients else method.init_client(size)
    return type(state)(*(field.to(dtype) for field in state))


def damping_of(method: Method) -> float:
    """How much of its memory the method forgets each round."""
    return float(getattr(method.client_part, "damping", 0.0))


def memories_after(method: Method, state: Any, round: int) -> Tensor:
    """The clients' memories `[clients, params]` as they count after `round`, skipped rounds included."""
    if "updated" not in state._fields:
        return state.memory
    return state.memory * (1.0 - damping_of(method)) ** (round - state.updated)


def accepts_variance(samples: np.ndarray, variance: float) -> bool:
    """Two-sided chi-square test that independent centered normal samples have `variance`, at `FALSE_ALARM`."""
    samples = np.asarray(samples, dtype=np.float64).ravel()
    below = stats.chi2.cdf((samples**2).sum() / variance, len(samples))
    return bool(FALSE_ALARM / 2 < below < 1.0 - FALSE_ALARM / 2)


def accepts_law(samples: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Kolmogorov-Smirnov test that independent samples follow `cdf`, at `FALSE_ALARM`."""
    return bool(stats.kstest(np.asarray(samples, dtype=np.float64).ravel(), cdf).pvalue > FALSE_ALARM)


def descend(
    method: Method, gradients: Callable[[Tensor], Tensor], start: Tensor, rounds: int, lr_decay: float = 1.0
) -> tuple[list[Any], list[Tensor]]:
    """Server states and clients' messages of rounds with everyone, full gradients and no noise.

    Args:
        method: The method to run.
        gradients: The clients' gradients `[clients, params]` at a model `[params]`.
        start: The first model.
        rounds: How many.
        lr_decay: Factor on the server's step from round to round.
    """
    server = method.init_server(start)
    clients = fresh_clients(method, len(gradients(start)), len(start), start.dtype)
    states, sent = [server], []
    for k in range(1, rounds + 1):
        shared = method.shared(server)
        rule = method if shared is None else method.in_round(shared)
        messages, clients = rule.client_rule(clients, gradients(server.model), None, k)
        scaled = method if lr_decay == 1.0 else dataclasses.replace(method, server_lr=method.server_lr * lr_decay**k)  # type: ignore[type-var,attr-defined]
        server = server_step(scaled, server, messages.sum(dim=0) / len(messages), 1.0)
        states.append(server)
        sent.append(messages)
    return states, sent
