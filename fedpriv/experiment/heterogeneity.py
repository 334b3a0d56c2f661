"""Measure how much the clients of an experiment differ. For simulations only: the results are not private."""

import numpy as np
import torch

from fedpriv.data.federation import Federation
from fedpriv.data.heterogeneity import evenly_chosen, gradient_metrics, size_metrics
from fedpriv.data.partitions import mean_total_variation
from fedpriv.engines import Population, one_thread
from fedpriv.experiment.config import Config
from fedpriv.experiment.timing import gradient_examples

__all__ = ["measure_heterogeneity"]

_NOTE = "Not private: computed from the clients' own data. For simulations only."
# Maximum number of clients in the comparison of gradients, and the minimum that represents a larger population.
_MAX_CLIENTS, _MIN_CLIENTS = 200, 10
# Maximum number of clients in the label counts if counting needs a draw for each.
_MAX_DRAWN = 2_000
# The maximum cost of these measurements: a share of a run's gradients, and the floating-point operations that are
# allowed in any run (about a second on a core).
_SHARE_OF_RUN, _FREE_OPERATIONS = 0.01, 2e10


def measure_heterogeneity(config: Config, population: Population, *, bounded: bool = True) -> dict[str, object]:
    """Measure how clients differ in sizes, labels, and full local gradients at the initial model.

    Labels are counted for all clients, or for 2,000 evenly spaced clients if examples are drawn for each client.
    Gradients are computed for at most 200 evenly spaced clients. Their cost is limited to one round and to a hundredth
    of the run, or to 2e10 floating-point operations if that is more. If the limit leaves fewer than ten clients of ten
    or more, gradients are skipped.

    Args:
        config: The experiment.
        population: Its clients.
        bounded: Limit the cost of gradients as above.

    Returns:
        A dict for JSON: `label_tv` (see `mean_total_variation`; only for labels that are classes), the values of
        `size_metrics` and `gradient_metrics`, and the numbers of clients they cover. `gradients_skipped` gives the
        reason if there are no gradients.
    """
    federation = population.federation
    everyone = isinstance(federation, Federation)
    counted = evenly_chosen(federation.population, federation.population if everyone else _MAX_DRAWN)
    labels = {}
    if federation.dataset.kind == "classes":
        counts = federation.label_counts() if everyone else _counts(population, counted)
        labels = {"label_tv": mean_total_variation(counts), "label_clients": len(counted)}
    return {
        "note": _NOTE,
        "population": federation.population,
        **size_metrics(federation.sizes),
        **labels,
        **_gradients(config, population, bounded=bounded),
    }


def _counts(population: Population, clients: np.ndarray) -> np.ndarray:
    """Return the number of examples of each label, int64 `[clients, classes]`."""
    federation = population.federation
    labels, classes = federation.dataset.train_labels.numpy(), federation.dataset.classes
    return np.stack([np.bincount(labels[federation.rows_of(c)], minlength=classes) for c in clients.tolist()])


def _gradients(config: Config, population: Population, *, bounded: bool) -> dict[str, object]:
    federation, task = population.federation, population.task
    allowed = _allowed_examples(config, population) if bounded else np.inf
    clients = evenly_chosen(federation.population, _MAX_CLIENTS)
    while federation.sizes[clients].sum() > allowed and len(clients) > 1:
        clients = evenly_chosen(federation.population, len(clients) * 9 // 10)
    fewest = min(_MIN_CLIENTS, federation.population)
    if len(clients) < fewest or federation.sizes[clients].sum() > allowed:
        reason = f"gradients of {fewest} clients exceed the allowed cost of {int(allowed):,} examples"
        return {"gradient_clients": 0, "gradients_skipped": reason}
    data, model = federation.dataset, task.initial_model().to(task.device)
    # Index rows directly: `population.examples` would copy the data a second time.
    rows = (torch.from_numpy(federation.rows_of(client)) for client in clients.tolist())
    held = ((data.train_inputs[at].to(task.device), data.train_labels[at].to(task.device)) for at in rows)
    with one_thread():
        metrics = gradient_metrics(task.gradient(model, inputs, labels) for inputs, labels in held)
    return {"gradient_clients": len(clients), **metrics}


def _allowed_examples(config: Config, population: Population) -> float:
    """Return the maximum number of example gradients to compute."""
    federation, task = population.federation, population.task
    few = federation.sizes[evenly_chosen(federation.population, _MAX_CLIENTS)].tolist()
    used = [gradient_examples(population.work, n) for n in few]
    round_examples = config.cohort.of(federation.population).expected_size * float(np.mean(used))
    # A backward pass costs twice a forward pass.
    free = _FREE_OPERATIONS / (3 * task.operations(torch.zeros(1, *federation.dataset.input_shape)))
    return max(free, min(_SHARE_OF_RUN * config.training.rounds, 1.0) * round_examples)
