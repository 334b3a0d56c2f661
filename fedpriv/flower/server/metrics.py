"""Average of the metrics that clients report, and the reasons why some of them do not count.

| a client reports | effect |
|---|---|
| `num-examples` above 0 | its metrics count with that weight |
| `num-examples` 0 | none of its metrics counts, because it has no examples to measure them on |
| no `num-examples`, or a negative or non-finite value | none of its metrics counts |
| a metric that is not finite, or has another length than on other clients | this metric does not count |
| only some of the metrics | each metric is averaged over the clients that report it |

Every omission is reported.
"""

import logging
import math
from collections.abc import Mapping

from flwr.app import MetricRecord, RecordDict
from torch import Tensor

from fedpriv.flower.messages import DIAGNOSTICS
from fedpriv.rounds import Total

__all__ = ["WEIGHT", "average_metrics", "metrics_of_app", "total_of_answers", "warn_of_total"]

_log = logging.getLogger("flwr")

WEIGHT = "num-examples"

Value = int | float | list[int] | list[float]


def average_metrics(answers: Mapping[int, RecordDict]) -> tuple[MetricRecord | None, dict[int, str]]:
    """Return the average over clients, weighted by number of examples, and for each client the metrics left out.

    Args:
        answers: Contents of answers by client. If several records have the same metric, the first one counts.

    Returns:
        The average, None without metrics; and by client, one line about its metrics that do not count.
    """
    reported = {client: _merged(content) for client, content in answers.items()}
    if not any(reported.values()):
        return None, {}
    left_out = {client: why for client, metrics in reported.items() if (why := _fault_of_weight(metrics))}
    counted = {client: metrics for client, metrics in reported.items() if client not in left_out}
    average: dict[str, Value] = {}
    for name in dict.fromkeys(name for metrics in counted.values() for name in metrics if name != WEIGHT):
        values = {client: metrics[name] for client, metrics in counted.items() if name in metrics}
        faults = _faults_of_values(name, values)
        left_out |= {c: f"{left_out[c]}; {why}" if c in left_out else why for c, why in faults.items()}
        good = {client: value for client, value in values.items() if client not in faults}
        if good:
            average[name] = _mean(good, {client: float(counted[client][WEIGHT]) for client in good})  # type: ignore[arg-type]
    return (MetricRecord(average) if average else None), left_out


def _merged(content: RecordDict) -> dict[str, Value]:
    merged: dict[str, Value] = {}
    for record in content.metric_records.values():
        merged = {**record, **merged}
    return merged


def _fault_of_weight(metrics: dict[str, Value]) -> str:
    weight = metrics.get(WEIGHT)
    if weight is None:
        return f"no {WEIGHT}: its metrics do not count"
    if isinstance(weight, list) or not (_finite(weight) and weight > 0):
        return f"{WEIGHT} {weight}: its metrics do not count"
    return ""


def _faults_of_values(name: str, values: Mapping[int, Value]) -> dict[int, str]:
    lengths = [_length(value) for value in values.values()]
    usual = max(lengths, key=lengths.count)
    faults = {}
    for client, value in values.items():
        if _length(value) != usual:
            faults[client] = f"{name} of another length than other clients' does not count"
        elif not all(_finite(number) for number in (value if isinstance(value, list) else [value])):
            faults[client] = f"{name} is not finite and does not count"
    return faults


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond all floats
        return False


def _length(value: Value) -> int | None:
    return len(value) if isinstance(value, list) else None


def _mean(values: Mapping[int, Value], weights: Mapping[int, float]) -> float | list[float]:
    largest = max(weights.values())
    scaled = [weights[client] / largest for client in values]
    shares = [weight / math.fsum(scaled) for weight in scaled]
    rows = [value if isinstance(value, list) else [value] for value in values.values()]
    means = [math.fsum(w * x for w, x in zip(shares, column, strict=True)) for column in zip(*rows, strict=True)]
    return means if isinstance(next(iter(values.values())), list) else means[0]


def total_of_answers(summed: Tensor, answers: list[RecordDict]) -> Total:
    """Return the sum with the diagnostics that clients reported about their signals, if they were asked to."""
    reports = [content.metric_records.get(DIAGNOSTICS, MetricRecord()).get("signal-norm") for content in answers]
    norms = [float(norm) for norm in reports if isinstance(norm, int | float)]
    finite = [norm for norm in norms if math.isfinite(norm)]
    mean = math.fsum(finite) / len(finite) if finite else math.nan
    return Total(summed, len(answers), len(norms) - len(finite), mean)


def warn_of_total(round: int, total: Total) -> None:
    """Log warnings about a round's updates that are not finite, or all zero."""
    if total.non_finite:
        updates = "1 update was" if total.non_finite == 1 else f"{total.non_finite} updates were"
        words = "round %d: %s not finite, out of %d; each counts as zero"
        _log.warning(words, round, updates, total.messages)
    if total.signal_norm == 0.0 and round == 1:
        _log.warning("round 1: all updates are zero. Does the train function return the model that it trained?")


def metrics_of_app(content: RecordDict) -> RecordDict:
    """Return an answer's metrics without those that fedpriv's own client adds."""
    return RecordDict({name: record for name, record in content.metric_records.items() if name != DIAGNOSTICS})
