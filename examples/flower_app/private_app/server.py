"""The server: a private strategy in place of FedAvg."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedpriv.flower import DPFedAvg, Privacy

from .task import load_data, new_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, print the promise, and save the model."""
    config = context.run_config
    strategy = DPFedAvg(  # the second line
        clip_norm=1.0, server_lr=1.0, num_clients=int(config["clients"]), privacy=Privacy(epsilon=8.0, delta=1e-5)
    )
    result = strategy.start(grid, ArrayRecord(new_model().state_dict()), num_rounds=int(config["rounds"]))
    model = new_model()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    images, labels = load_data()
    accuracy = (model(images).argmax(dim=1) == labels).float().mean()
    print(f"accuracy {accuracy:.3f} at epsilon {strategy.plan.epsilon:.3f}, delta {strategy.plan.delta:g}")
    print(strategy.statement)
    torch.save(model.state_dict(), str(config["out"]))
