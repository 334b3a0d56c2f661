"""The token walk: its graphs, its kernel, the variance of its visits, and its account."""

import itertools
from pathlib import Path

import dp_accounting as dpa
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from scipy import stats
from support.clocks import STEADY, UNEQUAL, clock
from support.helpers import FALSE_ALARM

from fedpriv.clock import Timeline, Token
from fedpriv.clock.graphs import Graph, grid, regular, ring
from fedpriv.clock.token_walk import base_chain, repelled
from fedpriv.errors import UserError
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import Config, apply_settings, check_config, load_config, parse_config
from fedpriv.flower.run_config import RunConfig
from fedpriv.privacy import Everyone
from fedpriv.streams import Purpose, SeededStreams

CONFIG = Path(__file__).parents[2] / "sim_configs" / "token-walk.toml"
SMALL = ["data.clients=12", "training.rounds=30", "training.evaluate_every=30", "schedule.graph=grid"]


def small(*settings: str) -> Config:
    return parse_config(apply_settings(load_config(CONFIG).tables, [*SMALL, "schedule.degree=", *settings]))


def walked(token: Token, clients: int, steps: int, seed: int = 5) -> Timeline:
    made = clock(STEADY, clients, seed)
    return token.timeline(made, Everyone(clients), steps, memory=False, hidden=False)


def visited(made: Timeline) -> list[int]:
    return [int(step.counted[0]) for step in made.steps]


def chain(graph: Graph) -> np.ndarray:
    """The base chain as a matrix."""
    found = np.zeros((graph.population,) * 2)
    for client in range(graph.population):
        clients, chances = base_chain(graph, client)
        found[client, clients] += chances
    return found


def metropolis(adjacent: np.ndarray) -> np.ndarray:
    """The same in another form, from the matrix of neighbors."""
    degrees = adjacent.sum(axis=1)
    proposed = adjacent / np.maximum(degrees, 1)[:, None]
    found = proposed * np.minimum(1.0, (proposed.T / np.where(adjacent, proposed, 1.0)))
    return found + np.diag(1.0 - found.sum(axis=1))


def adjacency(graph: Graph) -> np.ndarray:
    found = np.zeros((graph.population,) * 2)
    for client in range(graph.population):
        found[client, graph.neighbors(client)] = 1.0
    return found


GRAPHS = {
    "ring": ring(7),
    "ring of two": ring(2),
    "grid": grid(11),
    "regular": regular(14, 3, SeededStreams(1).source(Purpose.GRAPH)),
    "dense": regular(9, 6, SeededStreams(1).source(Purpose.GRAPH)),
    "star": Graph.of(6, np.array([[0, i] for i in range(1, 6)])),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_base_chain_is_that_of_metropolis_and_hastings(name: str) -> None:
    graph = GRAPHS[name]
    found, adjacent = chain(graph), adjacency(graph)
    assert np.array_equal(adjacent, adjacent.T)
    assert not adjacent.diagonal().any()
    np.testing.assert_allclose(found, metropolis(adjacent), atol=1e-12)
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    assert not len(graph.unreachable(0))


def test_graphs_have_the_neighbors_that_they_state() -> None:
    assert {graph: sorted(set(np.diff(GRAPHS[graph].starts))) for graph in ("ring", "regular", "dense")} == {
        "ring": [2],
        "regular": [3],
        "dense": [6],
    }
    assert grid(11).neighbors(5).tolist() == [1, 4, 6, 9]
    assert grid(11).neighbors(10).tolist() == [6, 9]
    assert ring(1).neighbors(0).tolist() == []


@pytest.mark.parametrize("alpha", [0.0, 0.5, 3.0, 400.0])
def test_the_kernel_is_the_base_chain_times_a_power_of_the_share_of_visits(alpha: float) -> None:
    rng = np.random.default_rng(2)
    base = chain(grid(6))
    visits = rng.integers(1, 9, 6).astype(float)
    shares, target = visits / visits.sum(), np.full(6, 1 / 6)
    expected = base * (shares / target) ** -alpha
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(repelled(base, np.tile(visits, (6, 1)), alpha), expected, atol=1e-9)
    if alpha == 0.0:
        np.testing.assert_allclose(expected, base)


def test_each_step_is_drawn_from_the_kernel_of_the_visits_before_it() -> None:
    token, graph = Token(graph="grid", repellence=2.0), grid(5)
    found: dict[tuple[int, int], int] = {}
    for seed in range(250):
        first, second, third = visited(walked(token, 5, 3, seed))
        assert first == 0
        found[second, third] = found.get((second, third), 0) + 1
    base, expected = metropolis(adjacency(graph)), {}
    for second in range(5):
        for third in range(5):
            one, two = np.ones(5), np.ones(5)
            one[0], two[0] = 2.0, 2.0
            two[second] += 1.0
            kernel_one, kernel_two = base[0] * one**-2.0, base[second] * two**-2.0
            chance = kernel_one[second] / kernel_one.sum() * kernel_two[third] / kernel_two.sum()
            if chance > 0.0:
                expected[second, third] = 250 * chance
    assert set(found) <= set(expected)
    pairs = sorted(expected)
    observed = [found.get(pair, 0) for pair in pairs]
    assert stats.chisquare(observed, [expected[pair] for pair in pairs]).pvalue > FALSE_ALARM


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_visits_tend_to_the_uniform_share_from_a_bad_start(tmp_path: Path, alpha: float) -> None:
    file = tmp_path / "edges.csv"  # a path of four clients that ends in a clique of four
    clique = [f"{i},{j}" for i in range(3, 7) for j in range(i + 1, 7)]
    file.write_text("\n".join(["from,to", "0,1", "1,2", "2,3", *clique]) + "\n")
    token = Token(graph="file", file=str(file), repellence=alpha, start=0)
    far = [np.abs(np.bincount(visited(walked(token, 7, n)), minlength=7) / n - 1 / 7).max() for n in (15, 2000)]
    assert far[1] < (0.03 if alpha else 0.1)
    assert far[0] > (0.05 if alpha else 0.15)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 5.0])
def test_the_variance_of_visits_falls_with_repellence_as_the_theory_says(alpha: float) -> None:
    walks, steps = 1500, 500
    base, rng = chain(grid(6)), np.random.default_rng(4)
    values, vectors = np.linalg.eigh(base)
    visits, holders, every = np.ones((walks, 6)), np.zeros(walks, int), np.arange(walks)
    for _ in range(steps):
        chances = np.cumsum(repelled(base[holders], visits, alpha), axis=1)
        holders = (chances < rng.random((walks, 1))).sum(axis=1)
        visits[every, holders] += 1.0
    scaled = (visits / visits.sum(axis=1, keepdims=True) - 1 / 6) * np.sqrt(steps)
    found = (scaled @ vectors[:, :-1]).var(axis=0)
    slow = values[:-1]
    expected = (1 + slow) / (1 - slow) / (1 + 2 * alpha * (1 + slow)) / 6
    np.testing.assert_allclose(found, expected, rtol=0.16)


def test_a_client_that_drops_out_leaves_the_token_where_it_was() -> None:
    made = clock(UNEQUAL, 9)
    steps = Token(graph="grid").timeline(made, Everyone(9), 80, memory=False, hidden=False).steps
    assert sum(len(step.dropped) for step in steps) > 0
    graph = grid(9)
    for before, after in itertools.pairwise(steps):
        holder = int(before.counted[0])
        assert set(after.asked.tolist()) <= {holder, *graph.neighbors(holder).tolist()}
        assert len(after.counted) == 1
        assert [group.start for group in after.groups] == [after.number - 1]


@pytest.mark.parametrize("trials", [0, 3])
def test_the_account_is_that_of_the_client_visited_most(trials: int) -> None:
    config = small(f"seed={trials}")
    experiment = assemble(config)
    assert experiment.plan is not None
    assert experiment.timeline is not None
    most = int(np.bincount(visited(experiment.timeline)).max())
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    event = dpa.SelfComposedDpEvent(dpa.GaussianDpEvent(experiment.plan.noise_multiplier), most)
    by_hand = accountant.compose(event).get_epsilon(experiment.plan.delta)
    assert 2 <= most < 30
    assert experiment.plan.adjacency == "replace"
    assert experiment.plan.epsilon == pytest.approx(by_hand, rel=0.01)
    caveats = experiment.plan.sampling.caveats(
        trust=experiment.plan.trust_rules, adjacency="replace", client_memory=False, rounds=experiment.plan.rounds
    )
    assert "stands for every other client on the graph" in caveats


@pytest.mark.parametrize("trust", ["central", "aggregator"])
def test_the_next_client_sees_the_message_so_that_only_local_trust_is_accepted(trust: str) -> None:
    with pytest.raises(UserError, match=r"privacy\.trust.*local|\[devices\].*aggregator") as caught:
        small(f"privacy.trust={trust}")
    assert "\n" not in str(caught.value)
    tables = {key: value for key, value in small().tables.items() if key != "privacy"}
    check_config(parse_config(tables))


MISTAKES = [
    (["schedule.graph=rind"], "schedule.graph", "ring"),
    (["schedule.repellence=-1"], "schedule.repellence", "-1"),
    (["schedule.start=12"], "schedule.start", "12"),
    (["schedule.graph=regular"], "schedule.degree", "missing"),
    (["schedule.degree=4"], "schedule.degree", "regular"),
    (["schedule.graph=regular", "schedule.degree=2"], "schedule.degree", "ring"),
    (["schedule.graph=regular", "schedule.degree=12"], "schedule.degree", "12"),
    (["schedule.graph=regular", "data.clients=13", "schedule.degree=3"], "schedule.degree", "even"),
    (["schedule.graph=file"], "schedule.file", "missing"),
    (["schedule.graph=file", "schedule.file=/nowhere.csv"], "schedule.file", "nowhere"),
    (["cohort.sampling=poisson", "cohort.probability=0.5"], "cohort.sampling", "token"),
    (["privacy.unit=example"], "example", ""),
    (["privacy.adjacency=add-or-remove"], "privacy.adjacency", "replace"),
    (["devices="], "[devices]", "a missing table"),
]


@pytest.mark.parametrize(("settings", "where", "says"), MISTAKES)
def test_a_mistake_is_one_line(settings: list[str], where: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        assemble(small(*settings))
    line = str(caught.value)
    assert where in line
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "an empty file"),
        ("a,b\n0,1\n", "from,to"),
        ("from,to\n", "a header alone"),
        ("from,to\n0,x\n", "line 2"),
        ("from,to\n0,1\n2\n", "line 3"),
        ("from,to\n0,1,2\n", "line 2"),
        ("from,to\n0,-1\n", "line 2"),
        ("from,to\n1,1\n", "two different"),
        ("from,to\n0,12\n", "below 12"),
        ("from,to\n0,1\n2,3\n", "10 clients without a path from client 0; the first is 2"),
    ],
)
def test_a_mistake_in_a_file_of_edges_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "edges.csv"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        assemble(small("schedule.graph=file", f"schedule.file={file}"))
    assert says in str(caught.value)
    assert "edges.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_other_edges_is_not_mixed_into_a_run(tmp_path: Path) -> None:
    file = tmp_path / "edges.csv"
    file.write_text("from,to\n0,1\n1,2\n")
    token = Token(graph="file", file=str(file))
    file.write_text("from,to\n0,1\n0,2\n")
    with pytest.raises(UserError, match=r"schedule\.file.*checksum"):
        Token(graph="file", file=str(file), checksum=token.checksum)


def test_flower_and_deployments_refuse_the_walk() -> None:
    with pytest.raises(UserError, match=r"\[devices\].*remove \[devices\] and \[schedule\]"):
        RunConfig().assemble(small())
    with pytest.raises(UserError, match=r"\[devices\]"):
        small().check_deployable()
