"""One run of those whose privacy is added up: what its folder says of its clients, its promise and its rounds."""

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpriv.errors import UserError
from fedpriv.experiment.config import NOISE_TABLES
from fedpriv.experiment.run_directory import RunDirectory, flat_tables
from fedpriv.privacy import PrivacyPlan, read_plan
from fedpriv.sweeps.files import STOPPED

__all__ = ["Run", "finite", "name_of", "read_run"]

# The rounds of real devices, one row each; only a deployment has it.
_PARTICIPATION = "participation.jsonl"

_STATES = ("finished", "stopped", "unfinished")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, as far as it has spent anything.

    Args:
        name: The run's folder, seen from the folder that was searched.
        clients: What tells its clients from those of other runs; see `clients_of`.
        state: finished, stopped (by a rule) or unfinished.
        rounds: Rounds that released something.
        planned: Rounds of the experiment.
        plan: What it promises; None if it promises nothing.
        noise: What decides its noise, if that comes from the seed; None if it comes from the operating system.
        scores: Test losses by round, to tell equal runs from unequal ones.
        draw: What tells the trials of a tuning apart; None for other runs.
        note: What a reader must know of how the run is counted; may be empty.
    """

    name: str
    clients: dict[str, Any]
    state: str
    rounds: int
    planned: int
    plan: PrivacyPlan | None
    noise: str | None
    scores: dict[int, float]
    draw: int | None = None
    note: str = ""

    @property
    def parts(self) -> "tuple[Run, ...]":
        """The runs that it stands for."""
        return (self,)

    @property
    def extent(self) -> str:
        """What it is charged for; a few words."""
        return f"{self.rounds} of {self.planned}"

    def epsilon_after(self, rounds: int) -> float:
        """Spent by so many rounds at the plan's delta; infinite for any round that promises nothing."""
        if rounds == 0:
            return 0.0
        return math.inf if self.plan is None else self.plan.epsilon_after(rounds)

    def mu_after(self, rounds: int) -> float | None:
        """Mu of Gaussian DP by then; None if none is exact, or nothing is promised."""
        return None if self.plan is None else self.plan.mu_after(rounds)

    def as_dict(self) -> dict[str, Any]:
        """The run's own part, ready for JSON."""
        epsilon, plan = self.epsilon_after(self.rounds), self.plan
        return {
            "run": self.name,
            "state": self.state,
            "rounds": self.rounds,
            "rounds_planned": self.planned,
            "private": plan is not None and plan.private,
            "epsilon": finite(epsilon),
            "delta": None if plan is None else plan.delta,
            "gaussian_dp_mu": finite(self.mu_after(self.rounds)),
        }


def finite(value: float | None) -> float | None:
    """The number, or None for an infinite one, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def read_run(path: Path, root: Path) -> Run:
    """Read what a run directory says about its clients, its promise and its rounds.

    Raises:
        UserError: If a file is damaged, or `privacy.json` is missing although something was released.
    """
    directory = RunDirectory(path)
    config = _config(directory.file("config.toml"))
    deployed, planned = directory.file(_PARTICIPATION).exists(), int(config["training"]["rounds"])
    state = _state(directory)
    rows = directory.rows("rounds.jsonl")
    record = directory.read_json("privacy.json")
    plan = None if record is None else read_plan(record, str(directory.file("privacy.json")))
    rounds = planned if state == "finished" else min(_released(directory, rows), planned)
    if deployed and state != "finished" and plan is not None and not plan.trust_rules.trusts_server:
        rounds = min(rounds + 1, planned)  # messages of the open turn may have left the clients
    if record is None and rounds > 0:
        remedy = "Restore the file, or move the run out of the folder"
        raise UserError(str(directory.file("privacy.json")), "what the run promises", "no such file", remedy)
    return Run(
        name=name_of(path, root),
        clients=clients_of(config, deployed=deployed),
        state=state,
        rounds=rounds,
        planned=planned,
        plan=plan,
        noise=None if deployed or plan is None else _noise_of(config),
        scores={row["round"]: row["test_loss"] for row in rows if row["round"] and row.get("test_loss") is not None},
        draw=flat_tables(config).get("privacy.draw"),
    )


def clients_of(config: dict[str, Any], *, deployed: bool) -> dict[str, Any]:
    """Return what tells a run's clients from those of other runs.

    Simulated clients are made of the whole table `[data]` and the seed. Clients that a data set has by nature, and real
    devices, are the same whatever the seed and whatever else the table says: runs on some of them are charged to all.
    """
    data = config["data"]
    if deployed:
        return {"name": data["name"], "clients": "of a deployment"}
    if data["partition"] == "natural":
        return {"name": data["name"], "partition": "natural"}
    return {**data, "seed": config["seed"]}


def _noise_of(config: dict[str, Any]) -> str:
    """The tables and the seed from which a simulation draws its noise, as `Config.noise_id` has them."""
    tables = {name: config[name] for name in NOISE_TABLES if name in config}
    return json.dumps([tables, config["training"]["rounds"], config["seed"]], sort_keys=True)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
        flat = flat_tables(config)
        missing = [key for key in ("seed", "data.name", "data.partition", "training.rounds") if key not in flat]
    except (OSError, ValueError) as error:
        raise UserError(str(path), "a run's TOML file", str(error), "Restore it, or move the run away") from None
    if missing:
        raise UserError(str(path), f"a resolved config with {missing[0]}", "one without", "Move the run away")
    return config


def _state(directory: RunDirectory) -> str:
    finished, stopped, unfinished = _STATES
    if directory.file("summary.json").exists():
        return finished
    return stopped if directory.file(STOPPED).exists() else unfinished


def _released(directory: RunDirectory, rows: Sequence[dict[str, Any]]) -> int:
    """The last round of which anything is recorded: a row, also one that was only begun, or a checkpoint."""
    recorded = max((row["round"] for row in rows), default=0)
    file = directory.file("rounds.jsonl")
    if rows and not file.read_bytes().endswith(b"\n"):
        recorded += 1
    turns = max((row["round"] for row in directory.rows(_PARTICIPATION)), default=0)
    return max(recorded, turns, directory.checkpoint.round() or 0)


def name_of(path: Path, root: Path) -> str:
    """What a folder is called, seen from the one that was searched."""
    relative = path.relative_to(root).as_posix()
    return root.resolve().name if relative == "." else relative
