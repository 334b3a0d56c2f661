"""Arguments of Flower's strategies, with what takes their place in ours."""

import math
from collections.abc import Mapping

from flwr.app import ArrayRecord, MetricRecord

from fedpriv.checks import is_real, is_whole
from fedpriv.errors import UserError
from fedpriv.experiment.schema import refuse_unknown
from fedpriv.flower.server.run_record import EvaluateFn

__all__ = ["checked_evaluation", "refuse_arguments", "refuse_start", "refuse_values"]


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


# An argument's value, described, and a member that every valid value has.
_VALUES = {
    "privacy": ("a promise or None", "plan", "Give Privacy(epsilon=...) of fedpriv.flower"),
    "noise": ("a choice of noise or None", "of", 'Give NoiseChoice(kind="banded") of fedpriv.privacy'),
    "adaptive": ("an adaptive bound or None", "share", "Give AdaptiveBound() of fedpriv.methods"),
    "server_optimizer": ("an optimizer or None", "init", "Give Adam() of fedpriv.methods.server_optimizers"),
    "cohort": ("a sampling or None", "population", "Give FixedSize(population=100, size=10) of fedpriv.privacy"),
    "out": ("a path, a RunFolder or None", "joinpath", 'Give the path of a folder, such as "/home/me/runs/first"'),
}


def refuse_values(given: Mapping[str, object]) -> None:
    """Raise UserError for the first argument of a strategy with a value of the wrong type.

    Args:
        given: `privacy`, `noise`, `adaptive`, `server_optimizer`, `cohort`, `seed` and `out`, as far as they are given.
    """
    for name, value in given.items():
        if value is None:
            continue
        if name == "seed":
            if not is_whole(value, 0):
                raise UserError(name, "a whole number from 0", repr(value), "Omit it unless this is a simulation")
            continue
        expected, member, remedy = _VALUES[name]
        if name == "out" and (isinstance(value, str) or hasattr(value, "path")):
            continue
        if isinstance(value, type | str) or not hasattr(value, member):
            raise UserError(name, expected, _shown(value), remedy)


def refuse_start(initial_arrays: object, num_rounds: object, timeout: object) -> None:
    """Raise UserError for arguments of `strategy.start` with which no round can begin."""
    if not isinstance(initial_arrays, ArrayRecord):
        remedy = "Give strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=...)"
        raise UserError("initial_arrays", "an ArrayRecord", _shown(initial_arrays), remedy)
    if not is_whole(num_rounds, 1):
        raise UserError("num_rounds", "a whole number from 1", repr(num_rounds), "Give the number of rounds")
    if timeout != math.inf and not is_real(timeout, 1e-3):
        raise UserError("timeout", "seconds above 0", repr(timeout), "Give the longest time for one round")


def checked_evaluation(evaluate_fn: EvaluateFn | None) -> EvaluateFn | None:
    """Return `evaluate_fn` with its values checked: Flower would read them only after the last round.

    Raises:
        UserError: From the returned function, if `evaluate_fn` returns neither a MetricRecord nor None.
    """
    if evaluate_fn is None:
        return None

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        found = evaluate_fn(server_round, arrays)
        if found is not None and not isinstance(found, MetricRecord):
            remedy = 'Return MetricRecord({"accuracy": ...})'
            raise UserError("evaluate_fn", "a MetricRecord or None", _shown(found), remedy)
        return found

    return evaluate


def _shown(value: object) -> str:
    """Return a short description of a wrong value."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if isinstance(value, str | int | float) else type(value).__name__
