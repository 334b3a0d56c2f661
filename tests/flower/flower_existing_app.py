"""Typical Flower app with its own model, data and training. Two lines make it private."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedpriv.flower import AlphaNormEC, Privacy, private_mod  # the first line

CLIENTS = 5
ROUNDS = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 4)
        self.out = nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.out(torch.tanh(self.hidden(x)))


def load_data(partition: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(20, 3, generator=generator)
    return x, x.sum(dim=1, keepdim=True) + partition


def train_locally(net: nn.Module, partition: int, lr: float, epochs: int = 2) -> float:
    x, y = load_data(partition)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    loss = torch.zeros(())
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


app = ClientApp(mods=[private_mod])


@app.train()
def train(msg: Message, context: Context) -> Message:
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
    partition = int(context.node_config["partition-id"])
    loss = train_locally(net, partition, msg.content["config"]["lr"])  # type: ignore[index, arg-type]
    metrics = MetricRecord({"train_loss": loss, "num-examples": 20})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
    x, y = load_data(int(context.node_config["partition-id"]))
    loss = nn.functional.mse_loss(net(x), y).item()
    return Message(RecordDict({"metrics": MetricRecord({"loss": loss, "num-examples": len(x)})}), reply_to=msg)


def initial_net() -> Net:
    torch.manual_seed(0)
    return Net()


def main(grid: Grid) -> AlphaNormEC:
    """Run the ServerApp; return the strategy for inspection."""
    strategy = AlphaNormEC(alpha=1.0, beta=0.1, server_lr=0.1, privacy=Privacy(epsilon=8.0), num_clients=CLIENTS)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(initial_net().state_dict()),
        train_config=ConfigRecord({"lr": 0.1}),
        num_rounds=ROUNDS,
    )
    return strategy
