"""On label shards, error feedback follows gradient descent; normalizing without memory stops short of the optimum."""

from dataclasses import replace

import torch

from fedpriv.experiment.build import Experiment, assemble, make_federation
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.execution import make_engine
from fedpriv.rounds import begin_round, finish_round

ROUNDS = 300
METHODS = {
    "gradient descent": {"name": "dp-fedavg", "clip_norm": 1e6, "server_lr": 10.0},
    "alpha-NormEC": {
        "name": "alpha-normec",
        "alpha": 0.1,
        "beta": 0.1,
        "server_normalization": False,
        "server_lr": 10.0,
    },
    "normalized SGD": {"name": "normalized-sgd", "alpha": 0.1, "server_lr": 3.0},
}


def problem() -> Experiment:
    """Return 40 clients with one label shard of digits each, at four principal components, so that a minimum exists."""
    config = parse_config(
        {
            "name": "label-shards",
            "seed": 1,
            "data": {"name": "digits", "clients": 40, "partition": "shards", "shards_per_client": 1},
            "model": {"name": "softmax"},
            "method": METHODS["gradient descent"],
            "training": {"rounds": ROUNDS},
        }
    )
    federation = make_federation(config)
    inputs = federation.dataset.train_inputs.flatten(1)
    centred = inputs - inputs.mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    turn = vectors[:, -4:] / values[-4:].sqrt()
    test = (federation.dataset.test_inputs.flatten(1) - inputs.mean(dim=0)) @ turn
    dataset = replace(federation.dataset, train_inputs=centred @ turn, test_inputs=test)
    return assemble(config, federation=replace(federation, dataset=dataset))


def trained(experiment: Experiment, method: dict) -> tuple[float, float]:
    """Return objective (mean over clients of their mean loss) and test accuracy after all rounds."""
    tried = experiment.with_method(parse_config({**experiment.config.tables, "method": method}))
    engine = make_engine("vectorized", tried)
    state = tried.config.method.init_server(tried.initial_model)
    for number in range(1, ROUNDS + 1):
        total = engine.sum_messages(begin_round(tried.server, state, number))
        state = finish_round(tried.server, state, number, total.sum)
    people = tried.population
    losses = []
    for client in range(people.federation.population):
        rows = torch.from_numpy(people.federation.rows_of(client))
        weights = torch.full((len(rows),), 1.0 / len(rows))
        losses.append(people.task.loss(state.model, people.inputs[rows], people.labels[rows], weights))
    return float(torch.stack(losses).mean()), tried.evaluate(state.model)["accuracy"]


def test_alpha_normec_reaches_gradient_descent_on_label_shards_where_normalized_sgd_stalls():
    experiment = problem()
    found = {name: trained(experiment, method) for name, method in METHODS.items()}
    descent, feedback, without = (found[name] for name in METHODS)
    assert abs(feedback[0] - descent[0]) < 1e-3
    assert abs(feedback[1] - descent[1]) <= 0.01
    assert without[0] > descent[0] + 0.015
