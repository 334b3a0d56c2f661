"""Servers of Flower's older interface.

    def server_fn(context):
        server = PrivateServer(DPFedAvg(...), initial_parameters=parameters)
        return ServerAppComponents(server=server, config=ServerConfig(num_rounds=3))

The rules of older strategies (`configure_fit`, `aggregate_fit`) are not run: a strategy of `fedpriv.flower` takes their
place, as it takes that of `FedAvg`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.common import NDArrays, Parameters, Scalar, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import History, Server, SimpleClientManager
from flwr.serverapp.strategy import Strategy

from fedpriv.errors import UserError
from fedpriv.flower.internals.app import grid_behind
from fedpriv.flower.legacy import NotLegacy

__all__ = ["PrivateServer"]

EvaluateFn = Callable[[int, NDArrays, dict[str, Scalar]], tuple[float, Mapping[str, int | float]] | None]
"""As `evaluate_fn` of Flower's older strategies: round, arrays and settings give the loss and metrics."""

_JOIN_SECONDS = 120.0
# As in `Strategy.start`: seconds of a round.
_TIMEOUT = 3600.0


class PrivateServer(Server):
    """A server for `ServerAppComponents(server=..., config=...)` that runs a strategy of `fedpriv.flower`.

    Args:
        strategy: The strategy, such as `DPFedAvg(...)`.
        initial_parameters: The first model, as in Flower's older strategies.
        fit_config: Settings for the clients, the same in all rounds.
        evaluate_fn: Evaluates the model on the server after every round.

    Raises:
        UserError: If the strategy is another one, or without a first model.
    """

    def __init__(
        self,
        strategy: Any,
        *,
        initial_parameters: Parameters | Sequence[np.ndarray] | None = None,
        fit_config: Mapping[str, Scalar] | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> None:
        super().__init__(client_manager=SimpleClientManager())
        if not isinstance(strategy, NotLegacy) or not isinstance(strategy, Strategy):
            expected, remedy = "a strategy of fedpriv.flower", "Give DPFedAvg(...), AlphaNormEC(...) or another one"
            raise UserError("strategy", expected, type(strategy).__name__, remedy)
        if initial_parameters is None:
            remedy = "Give initial_parameters=ndarrays_to_parameters(...): no client is asked for its own model"
            raise UserError("initial_parameters", "the first model", "an argument left out", remedy)
        if isinstance(initial_parameters, Parameters):
            initial_parameters = parameters_to_ndarrays(initial_parameters)
        self._first = list(initial_parameters)
        self._private, self._fit_config, self._evaluate_fn = strategy, fit_config, evaluate_fn

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        """Run all rounds; return the history and the duration (seconds)."""
        began, manager = time.monotonic(), self.client_manager()
        if not manager.wait_for(1, timeout=int(_JOIN_SECONDS)):
            raise UserError("Flower nodes", "at least one", f"0 after {_JOIN_SECONDS:g} s", "Start the nodes")
        found = self._private.start(
            grid_behind(next(iter(manager.all().values()))),
            ArrayRecord({str(place): Array(array) for place, array in enumerate(self._first)}),
            num_rounds=num_rounds,
            train_config=ConfigRecord(dict(self._fit_config or {})),
            evaluate_fn=None if self._evaluate_fn is None else self._evaluated,
            timeout=_TIMEOUT if timeout is None else timeout,
        )
        self.parameters = ndarrays_to_parameters([array.numpy() for array in found.arrays.values()])
        history = History()
        for number, metrics in _plain(found.train_metrics_clientapp):
            history.add_metrics_distributed_fit(number, metrics)
        for number, metrics in _plain(found.evaluate_metrics_clientapp):
            history.add_metrics_distributed(number, metrics)
        for number, metrics in _plain(found.evaluate_metrics_serverapp):
            history.add_loss_centralized(number, metrics["loss"])
            history.add_metrics_centralized(number, metrics)
        return history, time.monotonic() - began

    def _evaluated(self, number: int, arrays: ArrayRecord) -> MetricRecord | None:
        found = self._evaluate_fn and self._evaluate_fn(number, [array.numpy() for array in arrays.values()], {})
        return None if found is None else MetricRecord({"loss": float(found[0]), **found[1]})


def _plain(rounds: Mapping[int, MetricRecord]) -> list[tuple[int, dict[str, Any]]]:
    return [(number, dict(metrics)) for number, metrics in rounds.items()]
