"""Compares the federation of `two_hours.py` with simulations and ledgers, and fills the page.

    python results/deployment/two_hours_page.py FOLDER

Every run is replayed by the loop engine with the clients that counted in each round; the model must have the same
bytes. Every line of a ledger must belong to a round in which the server asked the client, and every message that
counted must have its line. Writes `two-hours.csv` (rounds), `two-hours-events.csv`,
`two-hours.png` and a table of `two-hours.md`.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[0] / "benchmarks"))

from page import fill, table  # noqa: E402

from fedpriv.deploy.heads import HeadBook  # noqa: E402
from fedpriv.experiment.build import assemble  # noqa: E402
from fedpriv.experiment.config import load_config  # noqa: E402
from fedpriv.experiment.execution import make_engine  # noqa: E402
from fedpriv.experiment.run_directory import RunDirectory  # noqa: E402
from fedpriv.rounds import begin_round, finish_round, skip_round  # noqa: E402

PAGE = HERE / "two-hours.md"
MODEL = "model.safetensors"
# Rows of the figure, and the words of an action that belong to each.
LANES = {
    "server": ("kill server", "stop server", "start server", "renew", "server.tar"),
    "helper": ("helper-0",),
    "nodes": ("node-",),
    "federation": ("deploy add", "deploy remove"),
}
QUIET = ("deploy status", "deploy check", "deploy list", "deploy ledger", "wait", "run", "resume", "started", "stopped")


@dataclass(frozen=True)
class Line:
    """A line of a ledger: a release, or a charge without a run."""

    client: int
    run: str
    turn: int
    time: float


def replayed(config: Path, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the model of a simulation in which the clients of each row counted."""
    experiment = assemble(load_config(config))
    engine, server = make_engine("loop", experiment), experiment.server
    state = server.init(experiment.initial_model)
    for row in rows:
        lost = [int(client) for client, refusal in row["refused"].items() if refusal["kind"] == "lost"]
        if lost:
            engine.restore(_without(engine.save(), lost))
        broadcast = begin_round(server, state, row["round"])
        if row["happened"] == "applied":
            total = engine.sum_messages(broadcast._replace(cohort=np.array(row["counted"], dtype=np.int64)))
            state = finish_round(server, state, row["round"], total.sum)
        else:
            state = skip_round(server, state)
    with tempfile.TemporaryDirectory() as folder:
        RunDirectory(Path(folder)).write_model(MODEL, state.model, experiment.population.task.layout)
        return (Path(folder) / MODEL).read_bytes()


def _without(saved: dict[str, torch.Tensor], lost: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the saved states of an engine without those of some clients, which then start with new ones."""
    kept = torch.tensor([client not in lost for client in saved["clients"].tolist()], dtype=torch.bool)
    return {name: tensor[kept] for name, tensor in saved.items()}


def ledger_of(folder: Path, client: int) -> list[Line]:
    """Return the lines of a node's ledger."""
    rows = [json.loads(line) for line in (folder / "state" / "ledger.jsonl").read_text().splitlines()]
    return [Line(client, row.get("run", ""), row.get("turn", 0), row["time"]) for row in rows]


def ledgers_in(folder: Path) -> dict[int, list[Line]]:
    """Return each client's ledger, with the lines that a restored copy lacks and the lost folder has."""
    found = {}
    for node in sorted((folder / "deployment").glob("node-*[0-9]")):
        client = int(node.name.removeprefix("node-"))
        found[client] = ledger_of(node, client)
        if (folder / f"lost-{node.name}").is_dir():
            lost = [line for line in ledger_of(folder / f"lost-{node.name}", client) if line not in found[client]]
            found[client] = sorted([*found[client], *lost], key=lambda line: line.time)
    return found


def names_of_runs(ledgers: Mapping[int, Sequence[Line]], sessions: Sequence[str]) -> dict[str, str]:
    """Return the session of each run's name: runs and sessions follow one another in time."""
    lines = sorted((line for lines in ledgers.values() for line in lines if line.run), key=lambda line: line.time)
    return dict(zip(dict.fromkeys(line.run for line in lines), sessions, strict=True))


def checked(folder: Path, events: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row for each round: outcome, clients, charges, and whether the model of its run is the simulation's."""
    sessions = list(dict.fromkeys(event["session"] for event in events if event["action"] == "run"))
    ledgers = ledgers_in(folder)
    runs = names_of_runs(ledgers, sessions)
    began = min(event["time"] for event in events)
    found = []
    for session in sessions:
        out = folder / "runs" / session
        rows = RunDirectory(out).rows("participation.jsonl")
        same = replayed(folder / f"{session}.toml", rows) == (out / MODEL).read_bytes()
        for row in rows:
            lines = [
                line
                for lines in ledgers.values()
                for line in lines
                if runs.get(line.run) == session and line.turn == row["round"]
            ]
            charged = sorted(line.client for line in lines)
            assert len(set(charged)) == len(charged), f"{session}, round {row['round']}: charged twice, {charged}"
            assert set(row["counted"]) <= set(charged) <= set(row["asked"]), (session, row["round"], charged, row)
            others = {key: row[key] for key in ("late", "gone", "refused", "invalid", "failed")}
            facts = {"session": session, "round": row["round"], "happened": row["happened"]}
            facts |= {"minute": (max(line.time for line in lines) - began) / 60.0 if lines else np.nan}
            facts |= {"asked": len(row["asked"]), "counted": len(row["counted"]), "charged": len(charged)}
            facts |= {key: " ".join(str(client) for client in value) for key, value in others.items()}
            found.append({**facts, "model_is_the_simulations": same})
    heads = HeadBook(folder / "deployment" / "server" / "flower" / "client-heads.json").heads
    for client, head in heads.items():
        node = folder / "deployment" / f"node-{client}"
        assert head.lines == len(ledger_of(node, client)), f"client {client}: {head.lines} lines at the server"
    return pd.DataFrame(found)


def draw(frame: pd.DataFrame, events: Sequence[Mapping[str, Any]]) -> None:
    """Draw the counted clients of each round over time, above the events."""
    figure, (top, below) = plt.subplots(2, 1, figsize=(9, 4.2), sharex=True, height_ratios=[3, 2])
    for number, (_, part) in enumerate(frame.groupby("session", sort=False)):
        colour = f"C{number % 2}"
        top.plot(part["minute"], part["asked"], color="0.75", linewidth=1, zorder=1)
        top.plot(part["minute"], part["counted"], "o-", color=colour, markersize=3.5, linewidth=1)
    top.set(ylabel="clients", ylim=(0, frame["asked"].max() + 0.6))
    top.set_title("Counted clients of each round (dots), of those that were asked (light line)", fontsize=10)
    lanes = list(LANES)
    for event in events:
        if event["action"].startswith(QUIET):
            continue
        lane = next((name for name in reversed(lanes) if any(word in event["action"] for word in LANES[name])), None)
        if lane is None:
            continue
        mark = "x" if "kill" in event["action"] or "remove" in event["action"] else "|"
        below.plot(event["seconds"] / 60.0, lanes.index(lane), mark, color="C3" if mark == "x" else "0.2", markersize=7)
    below.set(xlabel="minutes since the start", yticks=range(len(lanes)), yticklabels=lanes, ylim=(-0.6, 3.6))
    below.set_title("Kills and removals (red crosses) and other actions (bars)", fontsize=10)
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "two-hours.png", dpi=130)


def write_tables(frame: pd.DataFrame, events: Sequence[Mapping[str, Any]]) -> None:
    """Fill the table of runs, and write the events."""
    lines = []
    for session, part in frame.groupby("session", sort=False):
        odd = part[["late", "gone", "refused", "invalid", "failed"]]
        without = "; ".join(
            f"{row['round']}: {', '.join(f'{key} {value}' for key, value in row[odd.columns].items() if value)}"
            for _, row in part.iterrows()
            if any(row[odd.columns])
        )
        minutes = f"{part['minute'].min():.0f} to {part['minute'].max():.0f}"
        same = "yes" if part["model_is_the_simulations"].all() else "no"
        counts = [len(part), int(part["counted"].sum()), int(part["charged"].sum())]
        lines.append([session, minutes, *counts, same, without or "none"])
    head = ("run", "minutes", "rounds", "messages that counted", "lines in ledgers", "bits of the simulation", "others")
    fill("runs", table(head, lines), PAGE)
    said = [{**event, "output": _last_line(str(event["output"]))} for event in events]
    rows = pd.DataFrame(said)[["seconds", "session", "rounds", "action", "code", "output"]]
    rows.to_csv(HERE / "two-hours-events.csv", index=False)


def _last_line(text: str) -> str:
    """Return the last line of an output that says more than a table's row, of at most 200 characters."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def main() -> None:
    """Check the folder, and write table and figure."""
    folder = Path(sys.argv[1])
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    origin = json.loads((folder / "origin.json").read_text()) if (folder / "origin.json").is_file() else {}
    for event in events:
        event["time"] = origin.get("began", 0.0) + event["seconds"]
    frame = checked(folder, events)
    frame.to_csv(HERE / "two-hours.csv", index=False, float_format="%.3f")
    draw(frame, events)
    write_tables(frame, events)
    print(frame.to_string())


if __name__ == "__main__":
    main()
