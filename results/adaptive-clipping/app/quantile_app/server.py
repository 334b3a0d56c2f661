"""The server: FedAvg in Flower's wrapper for adaptive clipping, or fedpriv's strategy with an adaptive bound."""

import csv
import os
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyClientSideAdaptiveClipping, FedAvg

from fedpriv.flower import DPFedAvg, Privacy
from fedpriv.methods import AdaptiveBound
from quantile_app.client import SIZE

RULE = os.environ.get("QUANTILE_RULE", "fedpriv")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds, and write the clip norm after each."""
    config = context.run_config
    first, clients, noise = float(config["first"]), int(config["clients"]), float(config["noise"])
    bounds = [first]
    if RULE == "flower":
        strategy = DifferentialPrivacyClientSideAdaptiveClipping(
            FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients),
            noise_multiplier=noise,
            num_sampled_clients=clients,
            initial_clipping_norm=first,
            target_clipped_quantile=0.5,
            clip_norm_lr=0.2,
            clipped_count_stddev=clients / 20.0,
        )
    else:
        # The same noise on the count: z / (2 sqrt(share)) is its standard deviation.
        share = (noise / (2.0 * clients / 20.0)) ** 2
        privacy = Privacy(noise_multiplier=noise)
        strategy = DPFedAvg(
            clip_norm=first, adaptive=AdaptiveBound(rate=0.2, share=share), privacy=privacy, num_clients=clients, seed=1
        )

    def record(round: int, _: ArrayRecord) -> MetricRecord | None:
        if round:
            bounds.append(float(strategy.clipping_norm if RULE == "flower" else strategy.state.side_bound))
        return None

    start = ArrayRecord({"model": Array(np.zeros(SIZE, dtype=np.float32))})
    strategy.start(grid, start, num_rounds=int(config["rounds"]), evaluate_fn=record)
    with Path(str(config["out"])).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["round", "bound"], *enumerate(bounds)])
