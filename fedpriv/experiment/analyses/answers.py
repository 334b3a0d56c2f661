"""The answers of an analysis, with standard errors of the noise and the cost of each."""

import math
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from fedpriv.analytics.queries import Categories, Labels, Query
from fedpriv.analytics.statistics import Statistics
from fedpriv.data.dataset import Declared, declared_by
from fedpriv.experiment.analyses.answers_file import ANALYSIS_FILE
from fedpriv.experiment.analyses.clients import clients_of
from fedpriv.experiment.analyses.tables import columns_of
from fedpriv.experiment.build import Experiment
from fedpriv.mechanisms.gaussian import release_grid
from fedpriv.privacy import PrivacyPlan
from fedpriv.tables import Record

__all__ = ["ANALYSIS_FILE", "answers_of", "noise_on_mean"]


def noise_on_mean(plan: PrivacyPlan | None) -> float:
    """Return the standard deviation of the noise on each number of the mean message; 0 without a plan.

    With the server's noise of deviation s and clients' noise of deviation c on n expected messages, on the grids G and
    g, it is sqrt(s^2 + G^2 / 12 + n (c^2 + g^2 / 12)) / n. The second and fourth terms are those of rounding.
    """
    if plan is None:
        return 0.0
    server, client = plan.shares
    clients = plan.sampling.expected_size

    def variance(stddev: float) -> float:
        if stddev == 0.0:
            return 0.0
        grid = release_grid(stddev) if plan.sums is None else plan.sums.step
        return stddev**2 + grid**2 / 12.0

    return math.sqrt(variance(server) + clients * variance(client)) / clients


def answers_of(experiment: Experiment, vector: Tensor) -> Record | None:
    """Return the answers for `analysis.json`; None unless the experiment is an analysis.

    Args:
        experiment: The experiment.
        vector: The released model, `[params]`.
    """
    config, plan = experiment.config, experiment.plan
    model = config.model
    if not isinstance(model, Statistics):
        return None
    labels = config.task.width(experiment.population.federation.dataset.classes) - 1
    clients = experiment.server.sampling.population
    seen = model.seen(vector.double().cpu().numpy(), labels, noise_on_mean(plan), clients)
    shares, sums = model.shares(), model.records is not None
    declared = declared_by(config.data.dataset)
    before = None if config.privacy is None else config.privacy.analyses_mu
    answers = {
        query.name: {
            "kind": query.kind,
            **({"of_label": True} if query.of_label else {}),
            **_names(query, declared, labels),
            **query.answer(seen[query.name]),
            **_cost(plan, shares[query.name], sums),
        }
        for query in model.asked
    }
    return {
        "name": config.name,
        "digest": config.digest,
        "clients": clients,
        "clients_of": clients_of(config.tables),
        "weight": "every client counts as one" if model.records is None else "records",
        "records": model.records,
        **_promise(plan, before or 0.0),
        "analyses": None if config.privacy is None else config.privacy.analyses,
        "answers": answers,
    }


def _names(query: Query, declared: Declared, labels: int) -> dict[str, object]:
    """Return the names of the bins of a histogram of labels or categories, as far as the data set declares them."""
    names: Sequence[str] = ()
    if isinstance(query, Labels):
        names = declared.class_names or ()
    elif isinstance(query, Categories) and declared.columns is not None:
        listed = cast(Mapping[str, list[str]], declared.columns["categories"])
        at = {place: listed[name] for name, (place, _) in columns_of(declared)[1].items()}
        names = at.get(int(query.column), ())
    return {"names": list(names)} if names and len(names) == query.size(labels) else {}


def _promise(plan: PrivacyPlan | None, before: float) -> dict[str, object]:
    """Return the promise to all answers together, and for compositions mu, which includes `before` of analyses before.

    Sampling is not credited in mu.
    """
    if plan is None:
        absent = ("epsilon", "delta", "unit", "trust", "adjacency", "colluders", "helpers", "mu")
        return {"private": False, "adversary": "none: not private", **dict.fromkeys(absent)}
    multiplier = plan.noise_multiplier
    return {
        "private": plan.private,
        "epsilon": plan.epsilon if math.isfinite(plan.epsilon) else None,
        "delta": plan.delta,
        "adversary": plan.adversary,
        "unit": plan.unit,
        "trust": plan.trust,
        "adjacency": plan.adjacency,
        "colluders": None if plan.aggregation is None else plan.aggregation.colluders,
        "helpers": None if plan.aggregation is None else plan.aggregation.helpers,
        "mu": math.hypot(math.sqrt(plan.releases.charged(plan.rounds)) / multiplier, before) if multiplier else None,
    }


def _cost(plan: PrivacyPlan | None, share: float, sums: bool) -> dict[str, object]:
    """Return the epsilon of one answer alone. The answers together cost less than the sum.

    A client's sum over records is only bounded as a whole: with many records, one answer may have all of its length.
    """
    if plan is None or plan.noise_multiplier == 0.0 or share == 0.0:
        return {"share": share, "epsilon_alone": None}
    bounded = 1.0 if sums and plan.record is None else share
    alone = plan.releases.bound(plan.noise_multiplier / math.sqrt(bounded), plan.rounds)
    return {"share": share, "epsilon_alone": alone.epsilon if math.isfinite(alone.epsilon) else None}
