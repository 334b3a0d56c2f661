"""Prometheus metrics of a server, a node or a helper, for `--metrics-port`.

Nothing private is shown: no client's data, and no value without noise. A node shows the rest of its budget only if it
accepts no other trust than `local`: under other trusts a change could show that it took part in a secret cohort.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedpriv.deploy.operate.expiry import endings
from fedpriv.errors import UserError, require_extra

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from fedpriv.deploy.operate.tally import Counts

__all__ = ["NodeBudget", "node_budgets", "serve_metrics"]

_HOST_OPTION = "--metrics-host"


@dataclass(frozen=True)
class NodeBudget:
    """Privacy budget of a node for one unit.

    Args:
        unit: client or example.
        epsilon: The budget.
        left: The part that is left; None if it is not shown.
    """

    unit: str
    epsilon: float
    left: float | None


def node_budgets(folder: Path) -> list[NodeBudget]:
    """Return the budgets of a node's policy. The rest is computed from the terms in the ledger, never from data.

    Raises:
        UserError: If the policy or the ledger cannot be read.
    """
    from fedpriv.deploy.device.device import Device
    from fedpriv.deploy.device.ledger import Ledger, spent
    from fedpriv.flower.privacy_terms import NO_PROMISE
    from fedpriv.privacy import TRUSTS

    device = Device.at(folder)
    policy = device.policy
    found: list[NodeBudget] = []
    for unit, budget in policy.budgets.items():
        left = None
        trust = policy.accepts.trust
        if trust != NO_PROMISE and TRUSTS[trust].charges_participations:
            ledger = Ledger(device.folder)
            entries = ledger.entries()
            used = spent(entries, ledger.share(policy.limits.delta), policy.limits.adjacency, unit)
            left = max(budget - used - ledger.charged, 0.0)
        found.append(NodeBudget(unit, budget, left))
    return found


def serve_metrics(
    folder: Path,
    port: int,
    host: str,
    *,
    superlink: str = "",
    counts: "Callable[[], list[Counts]] | None" = None,
    budgets: Callable[[], list[NodeBudget]] | None = None,
) -> int:
    """Serve metrics over HTTP in a thread of this process; return the port.

    Args:
        folder: Folder of a server, node or helper.
        port: Port; 0 for a free one.
        host: Address of this machine at which it listens.
        superlink: HOST:PORT of the server, for a node.
        counts: Returns the counts of a server's runs.
        budgets: Returns the budgets of a node.

    Raises:
        UserError: If `prometheus-client` is not installed, or the port is not free.
    """
    require_extra("--metrics-port", "metrics")
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(_Collector(folder, superlink, counts, budgets))  # type: ignore[arg-type]  # has only `collect`
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        remedy = f"Choose another one, or another {_HOST_OPTION}"
        raise UserError("--metrics-port", f"a free port at {host}", error.strerror or error, remedy) from None
    return int(server.server_port)


class _Collector:
    """Collector of all metrics at the time of a request."""

    def __init__(
        self,
        folder: Path,
        superlink: str,
        counts: "Callable[[], list[Counts]] | None",
        budgets: Callable[[], list[NodeBudget]] | None,
    ) -> None:
        self._folder, self._superlink, self._counts, self._budgets = folder, superlink, counts, budgets
        self._one_by_one = threading.Lock()
        self._known: tuple[object, list[NodeBudget]] | None = None

    def describe(self) -> "list[Metric]":
        """Return no metric, so that registration calls no file."""
        return []

    def collect(self) -> "Iterator[Metric]":
        """Yield the metrics."""
        from prometheus_client.core import GaugeMetricFamily

        name = "fedpriv_certificate_end_timestamp_seconds"
        ends = GaugeMetricFamily(name, "End of a certificate, in Unix time", labels=["certificate"])
        for ending in endings(self._folder, self._superlink):
            ends.add_metric([ending.certificate], ending.at.timestamp())
        yield ends
        if self._counts is not None:
            yield from _of_runs(self._counts())
        if self._budgets is not None:
            yield from self._of_node(self._budgets)

    def _of_node(self, budgets: Callable[[], list[NodeBudget]]) -> "Iterator[Metric]":
        """Yield a node's budgets, which are computed again only if its ledger or its policy has changed."""
        from prometheus_client.core import GaugeMetricFamily

        with self._one_by_one:
            changed = [_stamp(self._folder / name) for name in ("state/ledger.jsonl", "fedpriv-client.toml")]
            if self._known is None or self._known[0] != changed:
                try:
                    self._known = (changed, budgets())
                except (UserError, OSError):  # the node reports it; a metric that is absent can raise an alarm
                    return
            found = self._known[1]
        total = GaugeMetricFamily("fedpriv_budget_epsilon", "Privacy budget over all runs", labels=["unit"])
        left = GaugeMetricFamily("fedpriv_budget_left_epsilon", "The part of it that is left", labels=["unit"])
        for budget in found:
            total.add_metric([budget.unit], budget.epsilon)
            if budget.left is not None:
                left.add_metric([budget.unit], budget.left)
        yield from (total, left)


def _of_runs(runs: "list[Counts]") -> "Iterator[Metric]":
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    base = ["run", "id"]
    turns = CounterMetricFamily("fedpriv_run_turns", "Finished turns by outcome", labels=[*base, "outcome"])
    refusals = CounterMetricFamily("fedpriv_run_refusals", "Refusals of clients by kind", labels=[*base, "kind"])
    for run in runs:
        for outcome, number in run.finished.items():
            turns.add_metric([run.run, run.id, outcome], number)
        for kind, number in (run.refusals or {}).items():
            refusals.add_metric([run.run, run.id, kind], number)
    yield from (turns, refusals)
    for name, about, key in _COUNTERS:
        counter = CounterMetricFamily(name, about, labels=base)
        for run in runs:
            if (value := getattr(run, key)) is not None:
                counter.add_metric([run.run, run.id], value)
        yield counter
    for name, about, key in _GAUGES:
        gauge = GaugeMetricFamily(name, about, labels=base)
        for run in runs:
            if (value := getattr(run, key)) is not None:
                gauge.add_metric([run.run, run.id], value)
        yield gauge


_COUNTERS = (
    ("fedpriv_run_answers", "Usable messages of clients", "answers"),
    ("fedpriv_run_unusable", "Answers that could not be used", "unusable"),
    ("fedpriv_run_missing", "Requests without an answer in time", "missing"),
    ("fedpriv_run_sent_bytes", "Bytes of requests to clients", "sent"),
    ("fedpriv_run_received_bytes", "Bytes of answers of clients", "received"),
    ("fedpriv_run_seconds", "Time in turns", "seconds"),
)
_GAUGES = (
    ("fedpriv_run_planned_turns", "Turns of the run", "turns"),
    ("fedpriv_run_epsilon", "Promised epsilon of the run", "epsilon"),
    ("fedpriv_run_epsilon_left", "The part of it that later turns may use", "epsilon_left"),
)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)
