"""Errors of analyses by trust, and heavy hitters by trust and oracle; writes the tables and the plots of this page.

    python results/analytics/make.py --data-root /tmp/data        about five minutes of CPU

Levels and rounds are computed by the library's rules on all clients at once, with one draw of the clients' summed
noise for the trusts that add up messages, and with a report of each single client for local heavy hitters.
"""

import argparse
import csv
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats

from fedpriv.analytics.heavy.local import NO_ITEM, ask_users
from fedpriv.analytics.heavy.prefixes import encoded, of_length
from fedpriv.analytics.heavy.scores import f1_score, normalized_cumulative_rank, true_items
from fedpriv.analytics.heavy.tree import Estimates, HeavyHitters, Tally
from fedpriv.analytics.queries import Histogram, Moments, Quantiles, Query
from fedpriv.analytics.statistics import Statistics
from fedpriv.data.text.words import Words
from fedpriv.experiment.analyses.answers import noise_on_mean
from fedpriv.experiment.schema import write_table
from fedpriv.mechanisms.noise import release_clients_sum, release_sum
from fedpriv.privacy import AggregationChoice, Everyone, PrivacyPlan, make_plan
from fedpriv.streams import Purpose, SeededStreams

HERE = Path(__file__).parent
DELTA, TOP, LENGTH = 1e-6, 10, 6
TRUSTS = ("central", "aggregator", "local")
EPSILONS = (1.0, 2.0, 4.0, 8.0)
CLIENTS = (300, 3_000, 30_000)
AT = {"epsilon": 2.0, "clients": 3_000}
COLORS = {"central": "#332288", "aggregator": "#44AA99", "local": "#CC6677"}
COLORS |= {"k-rr": "#999933", "oue": "#CC6677", "olh": "#AA4499"}


def plan_for(trust: str, clients: int, epsilon: float, size: int, rounds: int = 1) -> PrivacyPlan:
    """Return the plan of messages of length 1, under `replace` for every trust."""
    sampling = Everyone(clients)
    aggregation = AggregationChoice().of(sampling, clients, size)
    return make_plan(
        trust=aggregation if trust == "aggregator" else trust,  # pyright: ignore[reportArgumentType]
        adjacency="replace",
        sampling=sampling,
        rounds=rounds,
        delta=DELTA,
        l2_bound=1.0,
        epsilon=epsilon,
    )


def noised(mean: np.ndarray, plan: PrivacyPlan, streams: SeededStreams, round: int = 1) -> np.ndarray:
    """Return a mean over clients with the noise of a plan."""
    clients = plan.sampling.population
    total = torch.as_tensor(mean * clients)
    if plan.shares.server:
        return release_sum(streams, plan.shares.server, total, round).numpy() / clients
    return release_clients_sum(streams, plan.shares.client, total, round, clients).numpy() / clients


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % interval (Student's t)."""
    width = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(width)


# Histograms, quantiles and moments.


@cache
def ages(root: Path) -> np.ndarray:
    """Return the ages of Adult's training rows, one client each."""
    lines = (root / "adult" / "adult.data").read_text().splitlines()
    return np.array([float(line.split(",")[0]) for line in lines if line.strip()])


QUERIES: tuple[Query, ...] = (
    Histogram(name="histogram", low=0.0, high=100.0, bins=10),
    Quantiles(name="median", low=0.0, high=128.0, levels=7, at=(0.5,)),
    Moments(name="mean", columns=(0,), shifts=(0.0,), scales=(1.0,), low=0.0, high=100.0),
)


def errors_of(query: Query, trust: str, clients: int, epsilon: float, seed: int, root: Path) -> float:
    """Return the error of one answer: the total variation of a histogram, or the difference of ages in years."""
    drawn = SeededStreams(seed).source(Purpose.DATA).subset(len(ages(root)), clients)
    held = torch.as_tensor(ages(root)[drawn]).float()[:, None]
    model = Statistics(queries=[{"kind": query.kind, **write_table(query)}])
    size, found = query.size(0), query.entries(held)
    assert found is not None
    mean = np.zeros(size)
    np.add.at(mean, found.places.numpy().ravel(), found.values.numpy().ravel() / clients)
    plan = plan_for(trust, clients, epsilon, size)
    streams = SeededStreams(seed, noise_id=f"{query.name} {trust} {clients} {epsilon}")
    released = noised(mean / query.norm(), plan, streams)
    seen = model.seen(released, 0, noise_on_mean(plan), clients)[query.name]
    exact = query.answer(seen._replace(mean=mean, stddev=0.0))
    answer = query.answer(seen)
    key = "mean" if query.name == "mean" else "value"
    off = np.abs(np.array(answer[key]) - np.array(exact[key]))
    return float(off.sum() / 2.0 if query.name == "histogram" else off[0])


def simple(root: Path) -> Iterator[dict[str, object]]:
    """Yield the errors of simple questions."""
    cells = [(AT["clients"], epsilon) for epsilon in EPSILONS] + [(clients, AT["epsilon"]) for clients in CLIENTS]
    for query in QUERIES:
        for trust in TRUSTS:
            for clients, epsilon in dict.fromkeys(cells):
                runs = [errors_of(query, trust, int(clients), epsilon, seed, root) for seed in range(1, 11)]
                mean, width = interval(runs)
                yield {
                    "answer": query.name,
                    "trust": trust,
                    "clients": int(clients),
                    "epsilon": epsilon,
                    "error": f"{mean:.4g}",
                    "half_width": f"{width:.3g}",
                }


# Heavy hitters.


class Corpus(NamedTuple):
    """The words of all clients, as prefixes of `LENGTH` letters, sorted by client, and the true top words."""

    items: np.ndarray
    owners: np.ndarray
    clients: int
    true: list[int]


@cache
def corpus(name: str, root: Path) -> Corpus:
    """Return a data set's words."""
    file = {"tiny-shakespeare": "tinyshakespeare/input.txt", "sst2": "sst2/train.tsv"}[name]
    data = Words(file=file).load(root)
    assert data.groups is not None
    items = encoded(data.train_inputs[:, :LENGTH].numpy())
    clients = data.natural_population
    return Corpus(items, data.groups, clients, true_items(items, data.groups, clients, TOP))


def one_each(words: Corpus, seed: int) -> np.ndarray:
    """Return one word of each client, drawn at random."""
    counts = np.bincount(words.owners, minlength=words.clients)
    starts = np.cumsum(counts) - counts
    places = SeededStreams(seed).source(Purpose.DATA).uniform(words.clients)
    rows = np.minimum(starts + (places * counts).astype(np.int64), len(words.items) - 1)
    return np.where(counts > 0, words.items[rows], NO_ITEM)


def by_reports(words: Corpus, asked: HeavyHitters, epsilon: float, seed: int) -> list[int]:
    """Return the words found by one randomized report of each client."""
    streams = SeededStreams(seed, noise_id=f"{asked} {epsilon}")
    return [one.item for one in ask_users(asked, one_each(words, seed), epsilon, streams).found]


def by_sums(words: Corpus, asked: HeavyHitters, trust: str, epsilon: float, seed: int) -> list[int]:
    """Return the words found by sums of clients' vectors over all levels."""
    streams = SeededStreams(seed, noise_id=f"{asked} {trust} {epsilon}")
    weights = 1.0 / np.bincount(words.owners, minlength=words.clients)[words.owners] / words.clients
    plan = plan_for(trust, words.clients, epsilon, 1200, rounds=len(asked.steps))
    tally, kept = Tally(asked), None
    for level, letters in enumerate(asked.lengths):
        candidates = asked.candidates(level, kept)
        prefixes = of_length(words.items, LENGTH, letters)
        places = np.minimum(np.searchsorted(candidates, prefixes), len(candidates) - 1)
        held = np.where(candidates[places] == prefixes, weights, 0.0)
        mean = np.bincount(places, weights=held, minlength=len(candidates))
        found = Estimates(candidates, noised(mean, plan, streams, level + 1), noise_on_mean(plan))
        tally.add(level, found)
        kept = asked.extended(found)
    return [one.item for one in tally.all()[:TOP]]


VARIANTS = {
    "fixed": {"extension": "fixed"},
    "adaptive": {"extension": "adaptive"},
    "4 parties apart": {"extension": "fixed", "parties": 4},
    "4 parties, shared": {"extension": "fixed", "parties": 4, "shared": 2},
    "4 parties, shared, adaptive": {"extension": "adaptive", "parties": 4, "shared": 2},
    "4 parties, shared, adaptive, pruned": {"extension": "adaptive", "parties": 4, "shared": 2, "prune": True},
}


def hitters(root: Path) -> Iterator[dict[str, object]]:
    """Yield F1 and NCR of all cells."""
    for data in ("tiny-shakespeare", "sst2"):
        words = corpus(data, root)
        for epsilon in EPSILONS:
            for trust in ("central", "aggregator"):
                asked = HeavyHitters(top=TOP, length=LENGTH)
                runs = [by_sums(words, asked, trust, epsilon, seed) for seed in range(1, 6)]
                yield scored(words, runs, data=data, epsilon=epsilon, by=trust, variant="adaptive")
            for oracle in ("k-rr", "oue", "olh"):
                for variant, keys in VARIANTS.items():
                    parties = "parties" in variant
                    if parties and (data == "tiny-shakespeare" or oracle == "olh" or epsilon not in (2.0, 4.0)):
                        continue
                    asked = HeavyHitters(top=TOP, length=LENGTH, oracle=oracle, **keys)  # pyright: ignore[reportArgumentType]
                    runs = [by_reports(words, asked, epsilon, seed) for seed in range(1, 4)]
                    yield scored(words, runs, data=data, epsilon=epsilon, by=oracle, variant=variant)


def scored(words: Corpus, runs: list[list[int]], **cell: object) -> dict[str, object]:
    """Return a row with means and half-widths of 95 % intervals."""
    scores = {
        "f1": [f1_score(found, words.true) for found in runs],
        "ncr": [normalized_cumulative_rank(found, words.true) for found in runs],
    }
    row = {**cell, "seeds": len(runs)}
    for name, values in scores.items():
        mean, width = interval(values)
        row |= {name: f"{mean:.3f}", f"{name}_half_width": f"{width:.3f}"}
    return row


# Output.


def write(name: str, rows: Iterator[dict[str, object]]) -> None:
    """Write rows as CSV, line by line."""
    with (HERE / name).open("w", newline="") as file:
        first = next(rows)
        writer = csv.DictWriter(file, list(first), lineterminator="\n")
        writer.writeheader()
        writer.writerow(first)
        for row in rows:
            writer.writerow(row)
            file.flush()


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with (HERE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def plot_errors() -> None:
    """Draw errors of simple questions against epsilon and the number of clients."""
    rows, figure = read("errors.csv"), plt.figure(figsize=(9.0, 7.0), layout="constrained")
    axes = figure.subplots(3, 2, sharex="col")
    names = {"histogram": "histogram: total variation", "median": "median: years", "mean": "mean: years"}
    fixed = {"epsilon": ("clients", str(AT["clients"])), "clients": ("epsilon", str(AT["epsilon"]))}
    for line, answer in zip(axes, names, strict=True):
        for axis, key in zip(line, fixed, strict=True):
            other, value = fixed[key]
            for place, trust in enumerate(TRUSTS):
                cells = [row for row in rows if (row["answer"], row["trust"], row[other]) == (answer, trust, value)]
                cells.sort(key=lambda row: float(row[key]))
                x = np.array([float(row[key]) for row in cells]) * 1.03 ** (place - 1)
                y, width = ([float(row[column]) for row in cells] for column in ("error", "half_width"))
                axis.errorbar(x, y, yerr=width, color=COLORS[trust], marker="o", ms=4, lw=1.5, capsize=2, label=trust)
            axis.set(xscale="log", yscale="log")
            axis.set_ylabel(names[answer])
    axes[2, 0].set_xlabel(f"epsilon, with {AT['clients']:,} clients")
    axes[2, 1].set_xlabel(f"clients, with epsilon {AT['epsilon']:g}")
    axes[2, 0].set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS], minor=False)
    axes[2, 0].minorticks_off()
    axes[0, 0].legend(frameon=False)
    figure.savefig(HERE / "errors.png", dpi=110)


def plot_hitters() -> None:
    """Draw F1 and NCR against epsilon by trust and oracle."""
    rows, figure = read("hitters.csv"), plt.figure(figsize=(9.0, 6.0), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for line, data in zip(axes, ("tiny-shakespeare", "sst2"), strict=True):
        for axis, score in zip(line, ("f1", "ncr"), strict=True):
            for place, by in enumerate(("central", "aggregator", "k-rr", "oue", "olh")):
                for variant, style in (("adaptive", "-"), ("fixed", ":")):
                    cells = [row for row in rows if (row["data"], row["by"], row["variant"]) == (data, by, variant)]
                    if not cells:
                        continue
                    x = np.array([float(row["epsilon"]) for row in cells]) * 1.03 ** (place - 2)
                    y, width = ([float(row[column]) for row in cells] for column in (score, f"{score}_half_width"))
                    label = by if by in TRUSTS else f"local, {by}{', fixed' * (variant == 'fixed')}"
                    axis.errorbar(
                        x, y, yerr=width, color=COLORS[by], ls=style, marker="o", ms=3, capsize=2, label=label
                    )
            axis.set(xscale="log", ylim=(-0.05, 1.1))
            axis.set_title(f"{data}: {score.upper()}", fontsize=10)
            axis.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
            axis.minorticks_off()
    for axis in axes[1]:
        axis.set_xlabel("epsilon")
    axes[0, 0].legend(frameon=False, fontsize=7, loc="upper left")
    figure.savefig(HERE / "hitters.png", dpi=110)


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--plots", action="store_true", help="draw from the tables that are there")
    given = parser.parse_args()
    if not given.plots:
        write("errors.csv", simple(given.data_root))
        write("hitters.csv", hitters(given.data_root))
    plot_errors()
    plot_hitters()


if __name__ == "__main__":
    main()
