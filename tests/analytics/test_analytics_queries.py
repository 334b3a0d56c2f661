"""Queries: bounds on how far a record moves them, unbiased answers, and standard errors by exact formulas."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from fedpriv.analytics.queries import (
    Categories,
    Count,
    Histogram,
    Labels,
    Moments,
    Quantiles,
    Query,
    Seen,
    read_query,
    vector_scales,
)
from fedpriv.analytics.statistics import Statistics, StatisticsTask
from fedpriv.analytics.tree import consistent, cumulative
from fedpriv.errors import UserError
from fedpriv.experiment.analyses.answers import noise_on_mean
from fedpriv.experiment.schema import write_table
from fedpriv.mechanisms.gaussian import release_grid
from fedpriv.privacy import Everyone, Poisson, TrustName, make_plan
from fedpriv.tasks.task import Task

LABELS, WIDTH = 4, 5
RANGE: dict[str, Any] = {"low": -1.0, "high": 2.0}
QUERIES: Sequence[Query] = [
    Count(name="count"),
    Labels(name="labels"),
    Histogram(name="histogram", column=0, bins=6, **RANGE),
    Categories(name="categories", column=3, categories=2),
    Moments(name="moments", columns=(0, 1, 2), shifts=(0.0,) * 3, scales=(1.0, 2.0, 0.5), **RANGE),
    Moments(name="counted", columns=(1,), shifts=(0.5,), scales=(1.0,), counted=True, **RANGE),
    Quantiles(name="quantiles", column=1, levels=4, **RANGE),
]
REPLACED = {
    "count": 0.0,
    "labels": math.sqrt(2.0),
    "histogram": math.sqrt(2.0),
    "categories": math.sqrt(2.0),
    "moments": 2.0 * math.sqrt(3.0),
    "counted": 2.0,
    "quantiles": math.sqrt(8.0),
}
"""How far a replaced record moves phi, by the name of the query."""


def model_of(*queries: Query, records: int | None = None) -> Statistics:
    return Statistics(queries=[{"kind": query.kind, **write_table(query)} for query in queries], records=records)


def records(number: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    """Records with every label, and with values at, near and far beyond the ends of the range."""
    draw = np.random.default_rng(3)
    inputs = draw.normal(0.0, 2.0, (number, WIDTH))
    inputs[:20] = draw.choice([-1.0, 2.0, 1e30, -1e30, 0.5, math.nan], (20, WIDTH))
    inputs[0], inputs[1] = 1e30, -1e30
    inputs[:, 3:] = np.eye(2)[draw.integers(0, 2, number)]
    return torch.from_numpy(inputs).float(), torch.from_numpy(np.arange(number) % LABELS)


def vectors(model: Statistics) -> torch.Tensor:
    """The vector of each record, as training computes it: minus the gradient of its loss."""
    kind = StatisticsTask()
    task = Task(model.build((WIDTH,), kind.width(LABELS), 0), "cpu", kind=kind)
    start = task.initial_model()
    inputs, labels = records()
    return torch.stack([-task.gradient(start, inputs[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_neighboring_records_move_a_query_at_most_as_far_as_stated(query: Query) -> None:
    found = vectors(model_of(query)).double() * query.norm()
    assert torch.isfinite(found).all()
    assert query.norm() * 0.8 < float(found.norm(dim=1).max()) <= query.norm() * (1 + 1e-6)  # added or removed
    assert float(torch.cdist(found, found).max()) == pytest.approx(REPLACED[query.name], abs=2e-3)
    assert REPLACED[query.name] <= 2.0 * query.norm()


def test_all_queries_together_are_within_the_unit_ball_at_any_shares() -> None:
    for shares in (None, 0.05):
        asked = [QUERIES[0], *(read_query({"kind": q.kind, **write_table(q), "share": shares}) for q in QUERIES[1:])]
        model = model_of(*asked)
        found = vectors(model)
        assert 0.9 < float(found.double().norm(dim=1).max()) <= 1.0 + 1e-6
        assert math.fsum(model.shares().values()) == pytest.approx(1.0)


def test_the_sum_of_gradients_of_single_examples_is_that_of_their_vectors() -> None:
    from fedpriv.bounding import Clip

    model, kind = model_of(*QUERIES), StatisticsTask()
    task = Task(model.build((WIDTH,), kind.width(LABELS), 0), "cpu", kind=kind)
    inputs, labels = records()
    found = task.clipped_sum(task.initial_model(), inputs, labels, Clip(clip_norm=1.0))
    torch.testing.assert_close(-found, vectors(model).double().sum(dim=0), rtol=1e-5, atol=1e-5)


def test_without_noise_answers_are_those_of_the_records() -> None:
    model = model_of(*QUERIES)
    mean = vectors(model).double().mean(dim=0).numpy()
    seen = model.seen(mean, LABELS, 0.0, 10)
    answers: dict[str, Any] = {query.name: query.answer(seen[query.name]) for query in model.asked}
    inputs, labels = (part.numpy() for part in records())
    column = np.clip(np.nan_to_num(inputs[:, 0]), -1.0, 2.0)
    assert answers["labels"]["value"] == pytest.approx([0.25] * 4, abs=1e-6)
    counts = np.histogram(column, np.linspace(-1.0, 2.0, 7))[0] / len(labels)
    assert answers["histogram"]["value"] == pytest.approx(counts, abs=1e-6)
    assert answers["moments"]["mean"][0] == pytest.approx(column.mean(), abs=1e-5)
    assert answers["moments"]["variance"][0] == pytest.approx(column.var(), abs=1e-5)
    raw = np.clip(np.nan_to_num(inputs[:, 1]) * 2.0, -1.0, 2.0)  # the constants of the column
    assert answers["moments"]["mean"][1] == pytest.approx(raw.mean(), abs=1e-5)
    values = np.clip(np.nan_to_num(inputs[:, 1]), -1.0, 2.0)
    quantiles = np.quantile(values, [0.25, 0.5, 0.75], method="inverted_cdf")
    assert answers["quantiles"]["value"] == pytest.approx(quantiles, abs=answers["quantiles"]["interval"])


def test_standard_errors_of_linear_answers_are_their_slopes_times_the_noise() -> None:
    for query in QUERIES[:4]:
        size = query.size(LABELS)
        zero, one = np.zeros(size), np.eye(1, size)[0]
        at: list[Any] = [query.answer(Seen(mean, 0.1, 30.0)) for mean in (zero, one)]
        moved = np.ravel(at[1]["value"])[0] - np.ravel(at[0]["value"])[0]
        assert at[0]["standard_error"] == pytest.approx(0.1 * moved) == pytest.approx(3.0)


def test_variances_are_unbiased_and_their_standard_error_is_exact() -> None:
    """Over all values of the noise, by Gauss-Hermite quadrature, which is exact for polynomials."""
    query = Moments(name="m", columns=(0,), shifts=(0.0,), scales=(1.0,), low=-3.0, high=5.0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    weights = weights / weights.sum()
    first, second, stddev = 0.3, 0.4, 0.2
    found = np.array(
        [
            [query.answer(Seen(np.array([first + stddev * a, second - 0.5 + stddev * b]), stddev, None)) for b in nodes]
            for a in nodes
        ]
    )
    values = {key: np.array([[one[key][0] for one in row] for row in found]) for key in ("mean", "variance")}
    probs = np.outer(weights, weights)
    exact: Any = query.answer(Seen(np.array([first, second - 0.5]), stddev, None))
    for key, truth in (("mean", 1.0 + 4.0 * first), ("variance", 16.0 * (second - first**2))):
        mean = float((probs * values[key]).sum())
        assert mean == pytest.approx(truth)
        spread = math.sqrt(float((probs * (values[key] - mean) ** 2).sum()))
        assert exact[f"{key}_standard_error"][0] == pytest.approx(spread)


@pytest.mark.parametrize("total", [None, 1.0])
def test_the_tree_is_the_least_squares_fit_within_its_error_bound(total: float | None) -> None:
    levels = 4
    size, leaves = 2 ** (levels + 1) - 2, 2**levels
    node_of = [np.repeat(np.eye(2**level), 2 ** (levels - level), axis=1) for level in range(1, levels + 1)]
    nodes = np.concatenate(node_of)  # [nodes, leaves]
    noised = np.random.default_rng(1).normal(0.0, 1.0, size)
    found = consistent(noised, levels, total)
    weights, given = nodes, noised
    if total is not None:
        weights, given = np.concatenate([nodes, 1e6 * np.ones((1, leaves))]), np.append(noised, 1e6 * total)
    fit = np.linalg.lstsq(weights, given, rcond=None)[0]
    np.testing.assert_allclose(found[-1], fit, atol=1e-6)
    for above, below in itertools.pairwise(found):
        np.testing.assert_allclose(above, below.reshape(-1, 2).sum(axis=1))
    zero = cumulative(np.zeros(size), levels, total)
    slopes = np.stack([cumulative(row, levels, total) - zero for row in np.eye(size)])
    assert float((slopes**2).sum(axis=0).max()) <= levels


@pytest.mark.parametrize("trust", ["central", "local"])
@pytest.mark.parametrize("stddev", [0.3, 1.0, 37.0])
def test_the_variance_of_released_noise_is_exactly_the_stated_one(trust: TrustName, stddev: float) -> None:
    clients = 50
    plan = make_plan(
        trust=trust,
        adjacency="add-or-remove" if trust == "central" else "replace",
        sampling=Everyone(clients),
        rounds=1,
        delta=1e-5,
        l2_bound=1.0,
        noise_multiplier=stddev,
    )
    share = plan.shares.server or plan.shares.client
    grid = release_grid(share)
    for rest in (0.0, 0.3 * grid, 0.5 * grid):  # the part of the message that is not on the grid
        steps = np.arange(-int(12 * share / grid), int(12 * share / grid) + 1)
        edges = ((np.append(steps, steps[-1] + 1) - 0.5) * grid - rest) / share
        law = np.diff(ndtr(edges))
        mean = float(law @ steps) * grid
        variance = float(law @ (steps * grid - mean) ** 2)
        assert mean == pytest.approx(rest, abs=1e-9 * share)
        number = 1 if trust == "central" else clients
        assert noise_on_mean(plan) == pytest.approx(math.sqrt(number * variance) / clients, rel=1e-9)


def test_a_cohort_that_is_sampled_has_the_noise_of_its_expected_size() -> None:
    plan = make_plan(
        trust="central", sampling=Poisson(100, 0.1), rounds=1, delta=1e-5, l2_bound=1.0, noise_multiplier=4.0
    )
    assert noise_on_mean(plan) == pytest.approx(math.sqrt(16.0 + 1.0 / 12.0) / 10.0)
    assert noise_on_mean(None) == 0.0


def test_shares_of_more_than_everything_are_refused() -> None:
    with pytest.raises(UserError, match="at most 1 in total"):
        vector_scales([Count(name="a", share=0.7), Count(name="b", share=0.7)])
    with pytest.raises(UserError, match="at most 1 in total"):
        vector_scales([Count(name="a", share=1.0), Count(name="b")])
