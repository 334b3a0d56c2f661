"""Analysis of a study: means over seeds select, guarantees are not mixed, shares and fronts are correct."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import brief

from fedpriv.errors import UserError
from fedpriv.report.analysis import (
    QUANTITIES,
    against,
    best_settings,
    front,
    heat_maps,
    judge_of,
    settings_table,
    share_near_best,
    thinned,
)
from fedpriv.report.study import Study

EPSILON = next(quantity for quantity in QUANTITIES if quantity.name == "epsilon")


def study_of(*runs: dict[str, Any]) -> Study:
    """Return a study of finished runs, each given by the values that vary."""
    rows = []
    for number, given_ in enumerate(runs):
        run = {"method.name": "m", "method.lr": 1.0, "seed": 0, "accuracy": 0.5, "epsilon": float("nan"), **given_}
        accuracy, private = run.pop("accuracy"), run["epsilon"] == run["epsilon"]
        promise = f"central trust, ε = {run['epsilon']}" if private else "not private"
        told = {"run": str(number), "name": "n", "method": run["method.name"], "private": private, "privacy": promise}
        identity = str({key: value for key, value in run.items() if key not in ("seed", "validation_accuracy")})
        rows.append(
            {**run, **told, "problem": "", "delta": 1e-5, "trust": "central", "setting": identity}
            | {"test_accuracy": accuracy, "test_loss": 1.0 - accuracy, "validation_loss": 0.0}
        )
    table = pd.DataFrame(rows)
    for key in ("validation_accuracy", "simulated_seconds", "bytes_up", "bytes_down", "bytes"):
        table[key] = pd.to_numeric(table[key]) if key in table else float("nan")
    order = {identity: number for number, identity in enumerate(sorted(table["setting"].unique()), 1)}
    table["setting"] = table["setting"].map(order.get)
    return Study(name="s", trials=pd.DataFrame(), runs=table, rounds=pd.DataFrame(), statements={})


def best_of(study: Study, wanted: str | None = None) -> pd.DataFrame:
    judge = judge_of(study, wanted)
    return best_settings(settings_table(study, judge), judge)


def test_the_best_setting_has_the_best_mean_over_seeds_and_not_the_best_run() -> None:
    lucky = [{"method.lr": 0.1, "seed": seed, "accuracy": a} for seed, a in enumerate((0.9, 0.1))]
    steady = [{"method.lr": 0.2, "seed": seed, "accuracy": a} for seed, a in enumerate((0.6, 0.7))]
    best = best_of(study_of(*lucky, *steady)).iloc[0]
    assert (best["method.lr"], best["seeds"], best["tried"]) == (0.2, 2, 2)
    assert best["test_accuracy_mean"] == pytest.approx(0.65)
    assert best["test_accuracy_std"] == pytest.approx(np.std([0.6, 0.7], ddof=1))
    assert (best["test_accuracy_min"], best["test_accuracy_max"]) == (0.6, 0.7)


def test_a_run_that_lies_there_twice_is_one_seed() -> None:
    run = {"seed": 1, "accuracy": 0.9}
    table = settings_table(study_of(run, run, run, {"seed": 2, "accuracy": 0.5}), "test")
    assert table["seeds"].tolist() == [2]
    assert table["test_accuracy_mean"].tolist() == pytest.approx([0.7])


def test_validation_chooses_where_every_run_has_it_and_test_accuracy_otherwise() -> None:
    a = {"method.lr": 0.1, "accuracy": 0.9, "validation_accuracy": 0.1}
    b = {"method.lr": 0.2, "accuracy": 0.2, "validation_accuracy": 0.8}
    assert best_of(study_of(a, b))["method.lr"].tolist() == [0.2]
    assert best_of(study_of(a, b), "test")["method.lr"].tolist() == [0.1]
    without = {"method.lr": 0.3, "accuracy": 0.1}
    assert best_of(study_of(a, b, without))["method.lr"].tolist() == [0.1]
    with pytest.raises(
        UserError, match="--select validation: expected runs with a validation accuracy, got 1 without it"
    ):
        judge_of(study_of(a, b, without), "validation")


def test_what_runs_under_one_promise_reach_changes_nothing_under_another() -> None:
    private = [{"method.lr": lr, "accuracy": lr, "epsilon": 2.0} for lr in (0.1, 0.3, 0.2)]
    others = [{"method.lr": 0.5, "accuracy": 0.99}, {"method.lr": 0.6, "accuracy": 0.98, "epsilon": 8.0}]
    alone, together = best_of(study_of(*private)), best_of(study_of(*private, *others))
    assert together["privacy"].tolist() == ["not private", "central trust, ε = 8.0", "central trust, ε = 2.0"]
    assert together["method.lr"].tolist()[2] == alone["method.lr"].tolist()[0] == 0.3
    near = share_near_best(settings_table(study_of(*private, *others), "test"), [15.0])
    assert near.set_index("privacy").loc["central trust, ε = 2.0", "near_all"] == pytest.approx(2 / 3)


def test_shares_near_the_best_count_settings() -> None:
    grid = [{"method.lr": i, "accuracy": a} for i, a in enumerate((0.90, 0.89, 0.85, 0.50))]
    rival = [{"method.name": "r", "method.lr": i, "accuracy": a} for i, a in enumerate((0.95, 0.60))]
    table = share_near_best(settings_table(study_of(*grid, *rival), "test"), [1.0, 5.0, 10.0])
    shares = table.set_index(["method", "points"])
    assert shares["near_own"].to_dict() == {
        ("m", 1.0): 0.5, ("m", 5.0): 0.75, ("m", 10.0): 0.75, ("r", 1.0): 0.5, ("r", 5.0): 0.5, ("r", 10.0): 0.5
    }  # fmt: skip
    assert shares["near_all"].loc["m"].tolist() == [0.0, 0.25, 0.75]


@brief
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 100)), min_size=1, max_size=12))
def test_shares_grow_with_the_distance_and_the_best_of_all_is_harder_to_reach(grid: list[tuple[str, int]]) -> None:
    runs = [{"method.name": m, "method.lr": i, "accuracy": a / 100} for i, (m, a) in enumerate(grid)]
    table = share_near_best(settings_table(study_of(*runs), "test"), [0.0, 1.0, 10.0, 100.0])
    assert (table["near_all"] <= table["near_own"]).all()
    for _, rows in table.groupby("method"):
        assert rows["near_own"].is_monotonic_increasing
        assert rows["near_all"].is_monotonic_increasing
        assert rows["near_own"].iloc[0] > 0.0
        assert rows["near_all"].iloc[-1] == 1.0


@brief
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=30))
def test_the_front_holds_what_nothing_else_is_preferable_to(points: list[tuple[int, int]]) -> None:
    rows = pd.DataFrame(points, columns=["cost", "value"])
    found = set(front(rows, "cost", "value").itertuples(index=False, name=None))
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] >= p[1]}
    assert found == set(points) - beaten


@brief
@given(st.integers(0, 5000), st.integers(2, 100))
def test_thinning_keeps_the_ends_and_the_order(length: int, most: int) -> None:
    kept = thinned(length, most)
    assert len(kept) == min(length, most)
    assert (np.diff(kept) > 0).all()
    if length:
        assert kept[[0, -1]].tolist() == [0, length - 1]
        assert np.ptp(np.diff(kept)) <= 1 if len(kept) > 1 else True


def test_a_cell_of_a_heat_map_is_the_best_over_all_other_hyperparameters() -> None:
    rng = np.random.default_rng(0)
    runs = [
        {"method.a": a, "method.b": b, "method.c": c, "seed": seed, "accuracy": float(rng.random())}
        for a in (0.1, 1.0)
        for b in (1, 2, 10)
        for c in ("x", "y")
        for seed in (0, 1)
        if (a, b) != (1.0, 10)
    ]
    study = study_of(*runs)
    maps = {one.keys: one for one in heat_maps(study, settings_table(study, "test"))}
    assert set(maps) == {("method.a", "method.b"), ("method.a", "method.c"), ("method.b", "method.c")}
    one = maps["method.a", "method.b"]
    assert (one.rows, one.columns) == (["0.1", "1"], ["1", "2", "10"])
    means = pd.DataFrame(runs).groupby(["method.a", "method.b", "method.c"])["accuracy"].mean()
    best = means.groupby(level=[0, 1]).max()
    for i, a in enumerate((0.1, 1.0)):
        for j, b in enumerate((1, 2, 10)):
            wanted = best.get((a, b), float("nan"))
            assert one.values[i, j] == pytest.approx(wanted, nan_ok=True)
            assert one.seeds[i, j] == (0 if np.isnan(wanted) else 2)


def test_accuracy_against_epsilon_takes_the_best_at_each_and_rounds_up() -> None:
    runs = [{"method.lr": lr, "epsilon": e, "accuracy": lr * e / 10} for lr in (0.5, 1.0) for e in (1.00001, 4.0)]
    study = study_of(*runs, {"accuracy": 0.9}, {"method.name": "one epsilon", "epsilon": 4.0})
    table = against(settings_table(study, "test"), EPSILON, "test")
    assert table["series"].unique().tolist() == ["m"]
    assert table["x"].tolist() == [1.001, 4.0, float("inf")]
    assert table["accuracy"].tolist() == pytest.approx([0.100001, 0.4, 0.9])


def test_a_quantity_that_does_not_vary_has_no_figure() -> None:
    table = settings_table(study_of({"epsilon": 2.0}, {"method.lr": 2.0, "epsilon": 2.0}, {"accuracy": 0.9}), "test")
    assert all(against(table, quantity, "test").empty for quantity in QUANTITIES if quantity.column in table)


def test_the_momentum_of_a_server_optimizer_is_told_with_its_name() -> None:
    plain = {"method.lr": 0.1}
    heavy = {"method.lr": 0.1, "server.optimizer": "momentum", "server.momentum": 0.9}
    table = settings_table(study_of(plain, heavy), "test")
    assert set(table["hyperparameters"]) == {"", "optimizer=momentum, momentum=0.9"}
