"""A client that computes one full-batch gradient of a softmax regression on its part of the digits."""

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.datasets import load_digits

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Sends the model after a step of length one."""
    part, parts = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    digits = load_digits()
    inputs = torch.tensor(digits.images, dtype=torch.float32).flatten(1)[part::parts] / 16.0
    labels = torch.tensor(digits.target)[part::parts]
    state = message.content.array_records["arrays"].to_torch_state_dict()
    weight, bias = state["weight"].requires_grad_(), state["bias"].requires_grad_()
    loss = F.cross_entropy(F.linear(inputs, weight, bias), labels)
    by_weight, by_bias = torch.autograd.grad(loss, (weight, bias))
    stepped = {"weight": (weight - by_weight).detach(), "bias": (bias - by_bias).detach()}
    content = {"arrays": ArrayRecord(stepped), "metrics": MetricRecord({"num-examples": len(labels)})}
    return Message(RecordDict(content), reply_to=message)
