"""The client: an ordinary train function, and the mod that makes its update private."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn, optim

from fedpriv.flower import private_mod

from .task import load_partition, new_model

app = ClientApp(mods=[private_mod])  # the first line


@app.train()
def train(message: Message, context: Context) -> Message:
    """Five steps of gradient descent from the model that came."""
    model = new_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = load_partition(int(context.node_config["partition-id"]), int(context.run_config["clients"]))
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(labels)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)
