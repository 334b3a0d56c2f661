"""Clocks and timelines for tests, without data."""

from collections.abc import Sequence
from pathlib import Path

from fedpriv.clock import Clock, Devices, FedBuff, FedFix, Fleet, Schedule, Synchronous, Timeline, Token
from fedpriv.clock.profiles import LogNormal, Profile, Trace
from fedpriv.privacy import Everyone, FixedSize, Sampling
from fedpriv.streams import SeededStreams

UNEQUAL = LogNormal(speed=10.0, download=1e4, upload=5e3, speed_spread=1.5, dropout=0.15, available=0.7, day=60.0)
"""Devices that differ much, drop out, and are often away."""

STEADY = LogNormal(speed=10.0, download=1e4, upload=5e3, speed_spread=1.5)
"""The same, always there."""

SCHEDULES: dict[str, tuple[Schedule, str]] = {
    "rounds": (Synchronous(), "everyone"),
    "rounds with a deadline": (Synchronous(deadline=8.0), "everyone"),
    "over-selection": (Synchronous(over_select=1.5), "fixed"),
    "over-selection with a deadline": (Synchronous(over_select=1.5, deadline=6.0), "fixed"),
    "fedbuff": (FedBuff(buffer_size=4, concurrency=9), "everyone"),
    "fedbuff that weighs little": (FedBuff(buffer_size=3, concurrency=12, staleness_exponent=1.5), "everyone"),
    "asynchronous": (FedBuff(buffer_size=1, concurrency=6), "everyone"),
    "fedfix": (FedFix(window=3.0), "everyone"),
    "token": (Token(graph="grid", repellence=3.0), "everyone"),
}
"""By name: the rule, and the cohorts under it."""

FREE = tuple(name for name in SCHEDULES if not name.startswith("rounds"))
"""Those with an accounted timeline."""


def sampling_of(cohort: str, clients: int) -> Sampling:
    return Everyone(clients) if cohort == "everyone" else FixedSize(clients, clients // 2)


def clock(devices: Devices, clients: int, seed: int = 5, examples: Sequence[int] = (), model_bytes: int = 400) -> Clock:
    """A clock; client i does `examples[i]` examples of work, or 5 + i % 7."""
    streams = SeededStreams(seed)
    work = examples or [5 + client % 7 for client in range(clients)]
    fleet = Fleet(devices, clients, streams)
    return Clock(fleet=fleet, examples=lambda client: work[client], model_bytes=model_bytes, streams=streams)


def timeline(
    name: str, *, clients: int = 16, steps: int = 25, seed: int = 5, devices: Devices = UNEQUAL, memory: bool = False
) -> Timeline:
    schedule, cohort = SCHEDULES[name]
    made = clock(devices, clients, seed)
    return schedule.timeline(made, sampling_of(cohort, clients), steps, memory=memory, hidden=False)


def traced(path: Path, profiles: Sequence[Profile], day: float = 86400.0) -> Trace:
    """Devices of a file that is written now."""
    rows = [",".join(Profile._fields), *(",".join(map(str, profile)) for profile in profiles)]
    path.write_text("\n".join(rows) + "\n")
    return Trace(file=str(path), day=day)


def entries(made: Timeline) -> dict[int, list[tuple[int, int, float]]]:
    """Of each client, the steps in which it counts: (step, model it started from, weight)."""
    found: dict[int, list[tuple[int, int, float]]] = {}
    for step in made.steps:
        for group in step.groups:
            for client in group.clients.tolist():
                found.setdefault(client, []).append((step.number, group.start, group.weight))
    return found
