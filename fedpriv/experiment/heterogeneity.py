"""How much the clients of an experiment differ, for its run directory: simulations only, and not private."""

from typing import Any

import numpy as np
import torch

from fedpriv.data.federation import Federation
from fedpriv.data.heterogeneity import evenly_chosen, gradient_figures, size_figures
from fedpriv.data.partitions import mean_total_variation
from fedpriv.engines import Population, one_thread
from fedpriv.experiment.config import Config

__all__ = ["measure_heterogeneity"]

_NOTE = "Not private: computed from the clients' own data. For simulations only."
# Clients whose gradients are compared, and the fewest of a larger population that say something about it.
_MOST_CLIENTS, _FEWEST_CLIENTS = 200, 10
# Clients whose labels are counted where that takes a draw for each.
_MAX_DRAWN = 2_000
# Share of a run's gradients that the figures may cost, and floating-point operations that they may cost in any run:
# about a second on a core.
_SHARE_OF_RUN, _FREE_OPERATIONS = 0.01, 2e10


def measure_heterogeneity(config: Config, population: Population, *, bounded: bool = True) -> dict[str, Any]:
    """How much clients differ in sizes, labels, and full local gradients at the initial model.

    Labels are those of all clients; where examples are drawn anew for each, of 2,000 clients evenly spaced. Gradients
    are those of at most 200 clients evenly spaced, and of no more than cost a round and a hundredth of the run, or, if
    that is more, 2e10 floating-point operations; where fewer than ten clients of ten or more would be left, of none.

    Args:
        config: The experiment.
        population: Its clients.
        bounded: Whether gradients are bounded in cost like this.

    Returns:
        For JSON: `label_tv` (see `mean_total_variation`), the figures of `size_figures` and `gradient_figures`, and of
        how many clients they are; `gradients_skipped` says why, where there are none.
    """
    federation = population.federation
    everyone = isinstance(federation, Federation)
    counted = evenly_chosen(federation.population, federation.population if everyone else _MAX_DRAWN)
    return {
        "note": _NOTE,
        "population": federation.population,
        **size_figures(federation.sizes),
        "label_tv": mean_total_variation(federation.label_counts() if everyone else _counts(population, counted)),
        "label_clients": len(counted),
        **_gradients(config, population, bounded=bounded),
    }


def _counts(population: Population, clients: np.ndarray) -> np.ndarray:
    """Examples of each label, int64 `[clients, classes]`."""
    federation = population.federation
    labels, classes = federation.dataset.train_labels.numpy(), federation.dataset.classes
    return np.stack([np.bincount(labels[federation.rows_of(c)], minlength=classes) for c in clients.tolist()])


def _gradients(config: Config, population: Population, *, bounded: bool) -> dict[str, Any]:
    federation, task = population.federation, population.task
    allowed = _allowed_examples(config, population) if bounded else np.inf
    clients = evenly_chosen(federation.population, _MOST_CLIENTS)
    while federation.sizes[clients].sum() > allowed and len(clients) > 1:
        clients = evenly_chosen(federation.population, len(clients) * 9 // 10)
    fewest = min(_FEWEST_CLIENTS, federation.population)
    if len(clients) < fewest or federation.sizes[clients].sum() > allowed:
        reason = f"the gradients of {fewest} clients cost more than they may: those of {int(allowed):,} examples"
        return {"gradient_clients": 0, "gradients_skipped": reason}
    data, model = federation.dataset, task.initial_model().to(task.device)
    # Rows, not `population.examples`: that would make a copy of the data beside the engine's.
    rows = (torch.from_numpy(federation.rows_of(client)) for client in clients.tolist())
    held = ((data.train_inputs[at].to(task.device), data.train_labels[at].to(task.device)) for at in rows)
    with one_thread():
        figures = gradient_figures(task.gradient(model, inputs, labels) for inputs, labels in held)
    return {"gradient_clients": len(clients), **figures}


def _allowed_examples(config: Config, population: Population) -> float:
    """How many examples' gradients may be taken."""
    federation, task = population.federation, population.task
    few = federation.sizes[evenly_chosen(federation.population, _MOST_CLIENTS)].tolist()
    unused = np.random.default_rng(0)
    used = [sum(n if b is None else len(b) for b in population.work.batches(n, unused)) for n in few]
    round_examples = config.cohort.of(federation.population).expected_size * float(np.mean(used))
    # Backwards costs twice what forwards does.
    free = _FREE_OPERATIONS / (3 * task.operations(torch.zeros(1, *federation.dataset.input_shape)))
    return max(free, min(_SHARE_OF_RUN * config.training.rounds, 1.0) * round_examples)
