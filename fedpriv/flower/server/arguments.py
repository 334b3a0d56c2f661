"""Arguments of Flower's strategies, with what takes their place in ours."""

from collections.abc import Mapping

from fedpriv.errors import UserError
from fedpriv.experiment.schema import refuse_unknown

__all__ = ["refuse_arguments"]

_COHORT = "Give cohort=FixedSize(...) or Poisson(...) of fedpriv.privacy: how clients are drawn decides the noise"
_EVALUATE = "Give evaluate=True: all clients then evaluate, and their metrics are not protected"
_CLIENTS = "Give num_clients, the number of clients that the run waits for"
_FAILURES = "Give max_failures, the largest share of a round's clients that may fail"
_RECORD = "Omit it: the mod finds the only ArrayRecord by itself, and settings come as train_config"
_WEIGHT = "Omit it: all clients have one weight, because weights by numbers of examples would reveal them"
_METRICS = "Omit it: a private run has no metrics of clients, and other runs average them by num-examples"
_SERVER = "Give server_optimizer=Adam(...), Yogi(...) or Momentum(...) of fedpriv.methods.server_optimizers"
_PROXIMAL = "Add the proximal term to the loss of your train function, and keep mu in train_config of strategy.start"
_START = "Give it to strategy.start, or to PrivateServer in apps with ServerAppComponents"
_INSTEAD = {
    "fraction_train": _COHORT,
    "fraction_fit": _COHORT,
    "fraction_evaluate": _EVALUATE,
    "min_train_nodes": _FAILURES,
    "min_fit_clients": _FAILURES,
    "min_evaluate_nodes": _EVALUATE,
    "min_evaluate_clients": _EVALUATE,
    "min_available_nodes": _CLIENTS,
    "min_available_clients": _CLIENTS,
    "accept_failures": _FAILURES,
    "weighted_by_key": _WEIGHT,
    "arrayrecord_key": _RECORD,
    "configrecord_key": _RECORD,
    "train_metrics_aggr_fn": _METRICS,
    "evaluate_metrics_aggr_fn": _METRICS,
    "fit_metrics_aggregation_fn": _METRICS,
    "evaluate_metrics_aggregation_fn": _METRICS,
    "eta": f"Give server_lr. {_SERVER}",
    "eta_l": "Omit it: local steps are your train function's",
    "beta_1": _SERVER,
    "beta_2": _SERVER,
    "tau": _SERVER,
    "server_learning_rate": "Give server_lr",
    "server_momentum": _SERVER,
    "proximal_mu": _PROXIMAL,
    "evaluate_fn": _START,
    "initial_parameters": _START,
    "on_fit_config_fn": _START.replace("it", "train_config", 1),
    "on_evaluate_config_fn": _START.replace("it", "evaluate_config", 1),
}


def refuse_arguments(given: Mapping[str, object], known: list[str], name: str) -> None:
    """Raise UserError for the first unknown argument of a strategy.

    Args:
        given: Arguments by name.
        known: Names of the arguments that the strategy takes.
        name: Name of the strategy.
    """
    for key in given:
        if key in _INSTEAD and key not in known:
            raise UserError(f"{name}({key}=...)", f"an argument of {name}", "one of Flower's strategies", _INSTEAD[key])
    refuse_unknown(given, known, name)
