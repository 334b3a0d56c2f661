"""Flower's own FedAvg, which notes when each round ends."""

import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    stamps = Path(str(context.run_config["stamps"]))

    def note(number: int, arrays: ArrayRecord) -> None:  # noqa: ARG001
        with stamps.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"round": number, "time": time.monotonic()}) + "\n")

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=4, min_available_nodes=4)
    arrays = ArrayRecord({"weight": torch.zeros(10, 64), "bias": torch.zeros(10)})
    strategy.start(grid, arrays, num_rounds=int(context.run_config["rounds"]), evaluate_fn=note)
