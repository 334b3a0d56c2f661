"""Typical Flower apps in folders, which import nothing from this project."""

from pathlib import Path
from typing import Any

import tomli_w

CLIENTS = 5

TASK = """
import torch
from torch import nn


def new_net():
    # its own generator: Flower imports the client's module, which seeds PyTorch, in another thread of the same process
    net, generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return net


def load_data(partition):
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(20 + partition, 3, generator=generator)
    return x, x.sum(dim=1, keepdim=True) + partition
"""

CLIENT = """
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from plain.task import load_data

app = ClientApp()
torch.manual_seed(11)


def asked(msg, context):
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    partition = context.node_config["partition-id"]
    return net, partition, *load_data(partition)


@app.train()
def train(msg, context):
    count = context.state["seen"]["count"] if "seen" in context.state else 0
    context.state["seen"] = ConfigRecord({"count": count + 1})
    if context.run_config["seeded"]:
        torch.manual_seed(100 * context.node_config["partition-id"] + count)
    net, partition, x, y = asked(msg, context)
    optimizer = torch.optim.SGD(net.parameters(), lr=msg.content["config"]["lr"] / (1 + count))
    for row in torch.randperm(len(x)):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x[row]), y[row])
        loss.backward()
        optimizer.step()
    metrics = {"loss": loss.item(), "num-examples": len(x), "partition": partition, "count": count + 1}
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=msg)


@app.evaluate()
def evaluate(msg, context):
    net, partition, x, y = asked(msg, context)
    loss = nn.functional.mse_loss(net(x), y).item()
    metrics = {"loss": loss, "num-examples": len(x), "partition": partition}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
"""

SERVER = '''
import random

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from plain.task import new_net

app = ServerApp()


def by_partition(replies):
    return sorted(replies, key=lambda reply: reply.content["metrics"]["partition"])


class Sorted(FedAvg):
    """Add messages in the order of partitions, because the rounding of floats depends on it."""

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, by_partition(replies))

    def aggregate_evaluate(self, server_round, replies):
        return super().aggregate_evaluate(server_round, by_partition(replies))


@app.main()
def main(grid, context):
    config = context.run_config
    random.seed(5)  # FedAvg shuffles the nodes
    arrays = ArrayRecord(new_net().state_dict())
    found = {}
    for name, kind in {"fedavg": FedAvg, "sorted": Sorted}.items():
        strategy = kind(min_available_nodes=config["clients"])
        train = ConfigRecord({"lr": config["lr"]})
        result = strategy.start(grid, arrays, num_rounds=config["rounds"], train_config=train)
        found |= {f"{name} {key}": array.numpy() for key, array in result.arrays.items()}
        for metrics in (result.train_metrics_clientapp, result.evaluate_metrics_clientapp):
            for k, record in metrics.items():
                found |= {f"{name} {k} {key} {len(found)}": value for key, value in record.items()}
    np.savez(config["out"], **found)
'''

LEGACY_CLIENT = """
import numpy as np
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp


class Adds(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def fit(self, parameters, config):
        return [array + self.partition for array in parameters], 10, {}

    def evaluate(self, parameters, config):
        return float(parameters[0].sum()), 10, {}


def client_fn(context):
    return Adds(context.node_config["partition-id"]).to_client()


app = ClientApp(client_fn)
"""

LEGACY_SERVER = """
import numpy as np
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp


class Saving(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        np.savez(self.out, *parameters_to_ndarrays(parameters))
        return parameters, metrics


def server_fn(context):
    strategy = Saving(initial_parameters=ndarrays_to_parameters([np.zeros(4)]))
    strategy.out = context.run_config["out"]
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))


app = ServerApp(server_fn=server_fn)
"""

CONFIG = {"rounds": 3, "lr": 0.05, "clients": CLIENTS, "seeded": True, "out": "out.npz", "model": {"width": 8}}


def write_app(folder: Path, *, client: str = CLIENT, server: str = SERVER, **config: Any) -> Path:
    """Write an app and return its folder."""
    package = folder / "plain"
    package.mkdir(parents=True)
    for name, text in {"__init__": "", "task": TASK, "client": client, "server": server}.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    components = {"serverapp": "plain.server:app", "clientapp": "plain.client:app"}
    tables = {
        "project": {"name": "plain-app", "version": "1.0.0", "license": "Apache-2.0", "description": "An app"},
        "tool": {"flwr": {"app": {"publisher": "me", "components": components, "config": {**CONFIG, **config}}}},
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
    return folder
