"""Errors of sparse linear regression under local privacy; writes the tables and the plot of this page.

    python results/analytics/sparse/make.py --data-root /tmp/data        about a minute of CPU

Sequential runs call the rules of `private-iht` on whole groups of users, with one draw of the users' summed noise.
"""

import argparse
import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fedpriv.analytics import SparseMoments
from fedpriv.mechanisms.noise import release_clients_sum
from fedpriv.methods import PrivateIHT, server_step
from fedpriv.privacy import Separated, make_plan
from fedpriv.streams import SeededStreams

HERE = Path(__file__).parent
DELTA, SEEDS, GROUPS = 1e-6, range(1, 4), 8
BASE = {"n": 200_000, "k": 4, "d": 16, "epsilon": 8.0}
SWEPT = {
    "n": [50_000, 100_000, 200_000, 400_000],
    "k": [1, 2, 4, 8],
    "d": [8, 16, 32],
    "epsilon": [2.0, 4.0, 8.0, 16.0],
}
ORDERS = {
    "sequential": {"n": -0.5, "k": 1.0, "d": 0.5, "epsilon": -1.0},
    "non-interactive": {"n": -0.5, "k": 0.5, "d": 1.0, "epsilon": -1.0},
}
LOWEST = {
    "sequential": {"n": -0.5, "k": 0.5, "d": 0.5, "epsilon": -1.0},
    "non-interactive": {"n": -0.5, "k": 0.5, "d": 0.5, "epsilon": -1.0},
}
USEFUL = 0.7  # the estimate zero has error 1, so that larger errors say nothing of an order


class Users(NamedTuple):
    """One example of each user: x `[users, d]` and y `[users]`."""

    inputs: Tensor
    targets: Tensor


def synthetic(users: int, size: int, sparsity: int, seed: int) -> tuple[Users, Tensor]:
    """Return users with x ~ N(0, I), y = x theta + N(0, 0.01), and a theta of length 1 with k equal numbers."""
    draw = torch.Generator().manual_seed(seed)
    theta = torch.zeros(size)
    places = torch.randperm(size, generator=draw)[:sparsity]
    theta[places] = (torch.randint(2, (sparsity,), generator=draw) * 2.0 - 1.0) / sparsity**0.5
    inputs = torch.randn(users, size, generator=draw)
    return Users(inputs, inputs @ theta + 0.1 * torch.randn(users, generator=draw)), theta


def sequential(users: Users, method: PrivateIHT, epsilon: float | None, seed: int) -> Tensor:
    """Return the model after one round for each group of users."""
    sampling = Separated(len(users.targets), GROUPS)
    stddev = 0.0
    if epsilon is not None:
        plan = make_plan(
            trust="local",
            sampling=sampling,
            rounds=GROUPS,
            delta=DELTA,
            l2_bound=method.bounded.l2_bound,
            epsilon=epsilon,
        )
        stddev = plan.shares.client
    streams, state = SeededStreams(seed), method.init_server(torch.zeros(users.inputs.shape[1]))
    for round in range(1, GROUPS + 1):
        group = torch.as_tensor(sampling.drawn(streams, round))
        x, y = users.inputs[group], users.targets[group]
        signals = (x @ state.model - y).unsqueeze(1) * x
        messages, _ = method.client_rule(method.init_client(x.shape[1]), signals, None, round)
        total = messages.double().sum(dim=0)
        noised = release_clients_sum(streams, stddev, total, round, len(group)) if stddev else total
        mean = (noised / sampling.expected_size).float()
        state = server_step(method, state, mean, sampling.sampling_prob)
    return state.model.double()


def at_once(users: Users, method: SparseMoments, epsilon: float | None, seed: int) -> Tensor:
    """Return the estimate from one message of each user."""
    if epsilon is None:
        parts = zip(users.inputs.split(2048), users.targets.split(2048), strict=True)
        total = torch.stack([method.messages(x, y).double().sum(dim=0) for x, y in parts]).sum(dim=0)
        return method.estimate(total / len(users.targets))
    plan = method.plan(len(users.targets), epsilon=epsilon, delta=DELTA)
    return method.estimate(method.simulate(*users, plan, SeededStreams(seed)))


@cache
def errors(n: int, k: int, d: int, epsilon: float, seed: int) -> dict[str, float]:
    """Return both estimation errors in the l2 norm."""
    users, theta = synthetic(n, d, k, seed)
    iht = PrivateIHT(sparsity=k, clip_norm=1.5 * d**0.5, step_size=0.7)
    moments = SparseMoments(sparsity=k, clip_norm=1.5 * d, floor=0.5)
    found = {
        "sequential": sequential(users, iht, epsilon, seed),
        "non-interactive": at_once(users, moments, epsilon, seed),
    }
    return {name: float((estimate - theta.double()).norm()) for name, estimate in found.items()}


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % interval."""
    width = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(width)


def sweep() -> list[dict[str, object]]:
    """Return one row for each cell and method."""
    rows: list[dict[str, object]] = []
    for key, values in SWEPT.items():
        for value in values:
            cell = {**BASE, key: value}
            runs = [errors(**cell, seed=seed) for seed in SEEDS]
            for name in ORDERS:
                mean, width = interval([run[name] for run in runs])
                rows.append(
                    {"swept": key, "model": name, **cell, "error": round(mean, 4), "half_width": round(width, 4)}
                )
            print(rows[-2:], flush=True)
    return rows


def slopes(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the exponents of fits to useful errors, beside those of the abstract's bounds."""
    found: list[dict[str, object]] = []
    for name, orders in ORDERS.items():
        for key, order in orders.items():
            cells = [row for row in rows if row["swept"] == key and row["model"] == name and row["error"] < USEFUL]
            x, y = (np.log([float(row[column]) for row in cells]) for column in (key, "error"))
            slope = float(np.polyfit(x, y, 1)[0]) if len(cells) > 2 else float("nan")
            found.append(
                {
                    "model": name,
                    "in": key,
                    "cells": len(cells),
                    "measured": round(slope, 2),
                    "upper": order,
                    "lower": LOWEST[name][key],
                }
            )
    return found


def adult(data_root: Path) -> tuple[Users, Users]:
    """Return training and test rows of a9a: 123 numbers 0 or 1, and an income above 50,000 as 1 or -1."""

    def read(name: str) -> Users:
        lines = (data_root / "libsvm" / name).read_text().splitlines()
        inputs, targets = torch.zeros(len(lines), 123), torch.zeros(len(lines))
        for row, line in enumerate(lines):
            label, *given = line.split()
            targets[row] = float(label)
            inputs[row, [int(part.split(":")[0]) - 1 for part in given]] = 1.0
        return Users(inputs, targets)

    return read("a9a"), read("a9a.t")


def real(data_root: Path) -> list[dict[str, object]]:
    """Return accuracy and R^2 on a9a's test rows."""
    train, test = adult(data_root)
    methods = {
        "sequential": (sequential, PrivateIHT(sparsity=10, clip_norm=4.0, step_size=0.15)),
        "non-interactive": (at_once, SparseMoments(sparsity=10, clip_norm=14.5, floor=0.2)),
    }
    rows: list[dict[str, object]] = []
    for name, (run, method) in methods.items():
        for epsilon in (2.0, 4.0, 8.0, 16.0, None):
            scores: list[tuple[float, float]] = []
            for seed in SEEDS if epsilon is not None or name == "sequential" else (1, 1):
                fitted = test.inputs.double() @ run(train, method, epsilon, seed)
                residual = float((fitted - test.targets).square().mean() / test.targets.var(correction=0))
                scores.append((float((fitted.sign() == test.targets).double().mean()), 1.0 - residual))
            (accuracy, first), (r2, second) = (interval([score[i] for score in scores]) for i in (0, 1))
            rows.append(
                {
                    "model": name,
                    "epsilon": "none" if epsilon is None else epsilon,
                    "accuracy": round(accuracy, 4),
                    "accuracy_half_width": round(first, 4),
                    "r2": round(r2, 3),
                    "r2_half_width": round(second, 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Draw the error against each quantity, with the upper bounds' orders through the base cell."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, key in zip(axes, SWEPT, strict=True):
        for color, name in zip(("tab:blue", "tab:orange"), ORDERS, strict=True):
            shown = {"sequential": "in turns", "non-interactive": "at once"}[name]
            cells = [row for row in rows if row["swept"] == key and row["model"] == name]
            x, y, width = (np.array([float(row[c]) for row in cells]) for c in (key, "error", "half_width"))
            axis.errorbar(x, y, yerr=width, color=color, marker="o", ms=4, capsize=3, label=shown)
            anchor = float(next(row["error"] for row in cells if row[key] == BASE[key]))
            order = f"{shown}, order of the upper bound"
            axis.plot(x, anchor * (x / BASE[key]) ** ORDERS[name][key], ":", color=color, label=order)
        axis.axhline(1.0, color="gray", lw=0.8)
        axis.set(xscale="log", yscale="log", xlabel=key, ylim=(0.01, 3.0))
        axis.set_xticks(SWEPT[key], [f"{value:,g}" if key != "n" else f"{value // 1000}k" for value in SWEPT[key]])
        axis.minorticks_off()
    axes[0].set_ylabel("error in the l2 norm")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as CSV."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = sweep()
    write(HERE / "errors.csv", found)
    write(HERE / "orders.csv", slopes(found))
    draw(found, HERE / "errors.png")
    write(HERE / "adult.csv", real(arguments.data_root))
