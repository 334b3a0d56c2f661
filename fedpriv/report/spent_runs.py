"""One run for privacy totals: its clients, guarantee and rounds, according to its folder."""

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedpriv.errors import UserError
from fedpriv.experiment.analyses.clients import CONSTANTS
from fedpriv.experiment.config import NOISE_TABLES, with_bare_names
from fedpriv.experiment.run_directory import RunDirectory, flat_tables
from fedpriv.plugins import bare_reference
from fedpriv.privacy import PrivacyPlan, read_plan
from fedpriv.privacy.reports import MECHANISM, LocalReports
from fedpriv.sweeps.files import STOPPED
from fedpriv.tables import Record

__all__ = ["Run", "finite", "name_of", "read_run"]

# The rounds of real devices, one row each; only deployments have this file.
_PARTICIPATION = "participation.jsonl"

State = Literal["finished", "stopped", "unfinished", "tuning"]
"""The state of a run, or `tuning` for a tuning that counts as one run."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run and the part of it that has been released.

    Args:
        name: The run's folder, relative to the folder that was searched.
        clients: Identifies the run's clients; see `clients_of`.
        state: finished, stopped (by a rule) or unfinished.
        rounds: Number of rounds that released something.
        planned: Number of rounds of the experiment.
        plan: The privacy plan, or the promise of randomized reports; None if there is no guarantee.
        noise: Identifies the noise, if it comes from the seed; None if it comes from the operating system.
        scores: Test losses by round, to detect copies of runs.
        draw: Identifies a trial of a tuning; None for other runs.
        note: A note on how the run is counted; may be empty.
        recorded: False if the run ended before its privacy plan was recorded; it released nothing.
    """

    name: str
    clients: dict[str, object]
    state: State
    rounds: int
    planned: int
    plan: PrivacyPlan | LocalReports | None
    noise: str | None
    scores: dict[int, float]
    draw: int | None = None
    note: str = ""
    recorded: bool = True

    @property
    def training_plan(self) -> PrivacyPlan | None:
        """The privacy plan of a training; None without one, and for randomized reports."""
        return None if isinstance(self.plan, LocalReports) else self.plan

    @property
    def parts(self) -> "tuple[Run, ...]":
        """The runs that it represents."""
        return (self,)

    @property
    def extent(self) -> str:
        """The charged rounds, in a few words."""
        return f"{self.rounds} of {self.planned}"

    def epsilon_after(self, rounds: int) -> float:
        """Return epsilon after some rounds, at the plan's delta; infinite after any round without a guarantee."""
        if rounds == 0:
            return 0.0
        return math.inf if self.plan is None else self.plan.epsilon_after(rounds)

    def mu_after(self, rounds: int) -> float | None:
        """Return mu of Gaussian DP after some rounds; None if there is no exact mu or no guarantee."""
        return None if self.plan is None else self.plan.mu_after(rounds)

    def as_dict(self) -> dict[str, object]:
        """Return the run's entry for JSON."""
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
    """Return the number, or None if it is infinite, which JSON cannot represent."""
    return value if value is not None and math.isfinite(value) else None


def read_run(path: Path, root: Path) -> Run:
    """Read a run's clients, guarantee and rounds from its directory.

    Raises:
        UserError: If a file is damaged, or `privacy.json` is missing although something was released.
    """
    directory = RunDirectory(path)
    config = _config(directory.file("config.toml"))
    deployed, planned = directory.file(_PARTICIPATION).exists(), int(config["training"]["rounds"])
    state = _state(directory)
    rows = directory.rows("rounds.jsonl")
    record = directory.read_json("privacy.json")
    plan = None if record is None else _promise(record, str(directory.file("privacy.json")))
    rounds = planned if state == "finished" else min(_released(directory, rows), planned)
    if deployed and state != "finished" and plan is not None and not plan.trust_rules.trusts_server:
        rounds = min(rounds + 1, planned)  # messages of the open turn may have left the clients
    if record is None and rounds > 0:
        remedy = "Restore the file, or move the run out of the folder"
        raise UserError(str(directory.file("privacy.json")), "the run's privacy plan", "a missing file", remedy)
    return Run(
        name=name_of(path, root),
        clients=clients_of(config, deployed=deployed),
        state=state,
        rounds=rounds,
        planned=planned,
        plan=plan,
        noise=None if deployed or plan is None else _noise_of(config),
        scores={row["round"]: row["test_loss"] for row in rows if row["round"] and row.get("test_loss") is not None},
        draw=config.get("privacy", {}).get("draw"),
        recorded=record is not None,
    )


def _promise(record: Record, where: str) -> PrivacyPlan | LocalReports | None:
    if record.get("mechanism") == MECHANISM:
        return LocalReports.read(record, where)
    return read_plan(record, where)


def clients_of(config: Record, *, deployed: bool) -> dict[str, object]:
    """Return values that identify a run's clients.

    Simulated clients are determined by the seed and the table `[data]`, without constants that scale inputs. Natural
    clients of a data set, and real devices, are the same for every seed and every other value of the table: runs on
    some of them are charged to all.
    """
    data = {key: value for key, value in config["data"].items() if key not in CONSTANTS}
    data["name"] = bare_reference(config["data"]["name"])
    if deployed:
        return {"name": data["name"], "clients": "of a deployment"}
    if data["partition"] == "natural":
        return {"name": data["name"], "partition": "natural"}
    return {**data, "seed": config["seed"]}


def _noise_of(config: Record) -> str:
    """Return the tables and the seed that determine a simulation's noise, as in `Config.noise_id`."""
    tables = with_bare_names({name: config[name] for name in NOISE_TABLES if name in config})
    return json.dumps([tables, config["training"]["rounds"], config["seed"]], sort_keys=True)


def _config(path: Path) -> Record:
    try:
        config: Record = tomllib.loads(path.read_text(encoding="utf-8"))
        flat = flat_tables(config)
        missing = [key for key in ("seed", "data.name", "data.partition", "training.rounds") if key not in flat]
    except (OSError, ValueError) as error:
        raise UserError(str(path), "a run's TOML file", str(error), "Restore the file, or move the run away") from None
    if missing:
        raise UserError(str(path), f"a resolved config with {missing[0]}", "a config without it", "Move the run away")
    return config


def _state(directory: RunDirectory) -> State:
    if directory.file("summary.json").exists():
        return "finished"
    return "stopped" if directory.file(STOPPED).exists() else "unfinished"


def _released(directory: RunDirectory, rows: Sequence[Record]) -> int:
    """Return the last recorded round: from a row, even an incomplete one, or a checkpoint."""
    recorded = max((row["round"] for row in rows), default=0)
    file = directory.file("rounds.jsonl")
    if rows and not file.read_bytes().endswith(b"\n"):
        recorded += 1
    taken = (row["round"] for row in directory.rows(_PARTICIPATION) if row.get("happened") != "stopped")
    turns = max(taken, default=0)
    return max(recorded, turns, directory.checkpoint.round() or 0)


def name_of(path: Path, root: Path) -> str:
    """Return a folder's name, relative to the folder that was searched."""
    relative = path.relative_to(root).as_posix()
    return root.resolve().name if relative == "." else relative
