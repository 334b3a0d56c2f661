"""Tables of a deployment's view for terminals, and the same as JSON."""

import dataclasses
import datetime
import json
from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedpriv.deploy.status.view import DAMAGED, DeploymentView, NodeView

__all__ = ["as_json", "list_table", "status_table"]

_STYLES = {"online": "green", "offline": "yellow", "absent": "red", "not registered": "red", "stopped": "red"}


def as_json(view: DeploymentView) -> str:
    """Return a view as one JSON object. Times are in UTC, as in ISO 8601; null is an unknown time."""
    content = dataclasses.asdict(view)
    content["now"] = _time(view.now)
    for run in content["runs"]:
        run["written"] = _time(run["written"])
    for node in content["nodes"]:
        node["last_seen"] = _time(node["last_seen"])
    return json.dumps(content, indent=2)


def list_table(view: DeploymentView) -> RenderableType:
    """Return the nodes of a view by name, with state and last connection, below the server's state."""
    table = _table("node", "state", "last seen")
    for node in view.nodes:
        table.add_row(node.name, _state(node.state), _ago(node.last_seen, view.now))
    return Group(Text(f"server      {view.server}"), table)


def status_table(view: DeploymentView) -> RenderableType:
    """Return everything in a view."""
    lines = [f"server      {view.server}"]
    ends = ", ".join(f"{what} until {end}" for what, end in view.certificates.items())
    lines += [f"certificate {ends}"] if ends else []
    for run in view.runs:
        failed = f", {run.failed} not used" if run.failed else ""
        mark = "shown" if run.path == view.shown and len(view.runs) > 1 else ""
        rounds = f"round {run.turn} of {run.turns}{failed}"
        age = f", last written {_ago(run.written, view.now)}" if run.state != "finished" else ""
        lines.append(f"run         {run.name}: {run.state}, {rounds}{age}{f' ({mark})' if mark else ''}; {run.path}")
    if not view.runs:
        lines.append("run         none yet")
    lines += [f"fault       {node.name}: {node.fault}" for node in view.nodes if node.fault]
    rounds = ("counted", "missed", "refused") if view.shown else ()
    table = _table("node", "state", "last seen", *rounds, "budget left")
    for node in view.nodes:
        seen = _ago(node.last_seen, view.now)
        table.add_row(node.name, _state(node.state), seen, *(_rounds(node) if rounds else ()), _budget(node))
    return Group(Text("\n".join(lines)), table)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _state(state: str) -> Text:
    return Text(state, style=_STYLES.get(state, ""))


def _rounds(node: NodeView) -> tuple[str, str, str]:
    """Return the rounds that counted, were missed and were refused; dashes for a node that was never asked."""
    if not node.asked:
        return "-", "-", "-"
    return f"{node.counted} of {node.asked}", str(node.missed), _refusals(node.refused)


def _refusals(refused: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in refused.items()) or "0"


def _budget(node: NodeView) -> Text:
    bad = node.budget == "used up" or node.budget.startswith(("0 of", DAMAGED))
    return Text(node.budget, style="red" if bad else "")


def _time(moment: float | None) -> str | None:
    if moment is None:
        return None
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _ago(moment: float | None, now: float) -> str:
    if moment is None:
        return "unknown"
    seconds = max(now - moment, 0.0)
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2.0 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago" if seconds >= 10.0 else "now"
