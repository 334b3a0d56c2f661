"""The files and values that a run writes: which are released, which of them the promise covers, who may read the rest.

The recorder takes the mode of every file that it creates from here, the trackers what they may be sent, and the privacy
statement its list: what the statement says is what is done.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Literal

__all__ = ["OUTPUTS", "OWNER_ONLY", "VALUES", "DataFacts", "Kind", "Output", "Whose", "mode_of", "outputs_of"]

OWNER_ONLY = 0o600
"""Mode of a file that is not released; a folder of such files has 0700."""


class Kind(Enum):
    """Whether something is released."""

    RELEASED = "released"
    """Made of noised sums, which the promise covers, or of what says nothing about any client's data."""
    TIMING = "released, not covered"
    """How long something took."""
    OWNER = "not released"
    """Made of clients' bare data. Its file can be read by its owner alone from its first byte on."""


@dataclass(frozen=True)
class Output:
    """A file or folder that a run writes.

    Args:
        name: In the run directory.
        kind: Whether it is released.
        about: Its content, for the privacy statement.
        by: `all` runs, or only those that are a `simulation`, a `deployment`, an `audit` or part of a `sweep`, or that
            have a `tracker`.
        left: Whether every finished simulation in process leaves it.
    """

    name: str
    kind: Kind
    about: str
    by: Literal["all", "simulation", "deployment", "sweep", "tracker", "audit"] = "all"
    left: bool = False


OUTPUTS = (
    Output("config.toml", Kind.RELEASED, "the experiment", left=True),
    Output("digest.txt", Kind.RELEASED, "the experiment's digest"),
    Output(".lock", Kind.RELEASED, "empty"),
    Output("privacy.json", Kind.RELEASED, "the promise in numbers", left=True),
    Output("privacy.txt", Kind.RELEASED, "this statement", left=True),
    Output("initial.safetensors", Kind.RELEASED, "the first model", left=True),
    Output("model.safetensors", Kind.RELEASED, "the last model", left=True),
    Output(
        "rounds.jsonl",
        Kind.RELEASED,
        "epsilon and the scores of the model, round by round, and the virtual clock unless it shows who took part",
        left=True,
    ),
    Output("curves.png", Kind.RELEASED, "the same as a picture", left=True),
    Output("summary.json", Kind.RELEASED, "the promise and the last scores; of its timings see below", left=True),
    Output(
        "engine.json", Kind.TIMING, "how the run was run, and how long a client took if that was measured", left=True
    ),
    Output("groups.json", Kind.RELEASED, "which trials a sweep compares", "sweep"),
    Output(
        "trials.csv",
        Kind.RELEASED,
        "a sweep's trials with settings and released scores; not covered: timings, and the words with which one failed",
        "sweep",
    ),
    Output("tuning.json", Kind.RELEASED, "the trial that a tuning chose, and what the choice promises", "sweep"),
    Output("drawn.json", Kind.OWNER, "the trials that a tuning drew, which stay secret", "sweep"),
    Output("scores.json", Kind.OWNER, "the noised scores of a tuning's trials, which stay secret", "sweep"),
    Output("stopped.json", Kind.RELEASED, "why a sweep stopped the run, by released scores", "sweep"),
    Output(
        "audit.json",
        Kind.RELEASED,
        "the verdict of an audit, a run of its own with canaries among the clients",
        "audit",
    ),
    Output("audit.png", Kind.RELEASED, "the same as a picture", "audit"),
    Output("mlflow.json", Kind.RELEASED, "the run's id in a tracker", "tracker"),
    Output("wandb.json", Kind.RELEASED, "the run's id in a tracker", "tracker"),
    Output("tensorboard", Kind.RELEASED, "rows for a tracker; not released with --log-diagnostics", "tracker"),
    Output("wandb", Kind.RELEASED, "rows for a tracker; not released with --log-diagnostics", "tracker"),
    Output(
        "checkpoint.safetensors",
        Kind.OWNER,
        "until the run ends, with the clients' memories, who took part, and a checksum of the data",
    ),
    Output("diagnostics.jsonl", Kind.OWNER, "norms, counts and speed, round by round", left=True),
    Output("diagnostics.json", Kind.OWNER, "totals, how clients differ, and a checksum of the data", left=True),
    Output("heterogeneity.json", Kind.OWNER, "how clients differ", "simulation", left=True),
    Output("participation.jsonl", Kind.OWNER, "who was asked, who answered and how", "deployment"),
    Output("flower.log", Kind.OWNER, "the output of Flower's processes", "simulation"),
    Output("failure.json", Kind.OWNER, "why a trial of a sweep failed", "sweep"),
)

_OF_NAME = {output.name: output for output in OUTPUTS}

VALUES = {
    **dict.fromkeys(("name", "method", "engine", "digest", "seed", "rounds", "round"), Kind.RELEASED),
    **dict.fromkeys(("population", "expected_cohort", "parameters", "not_covered"), Kind.RELEASED),
    **dict.fromkeys(("private", "epsilon", "delta", "noise_multiplier", "noise_stddev"), Kind.RELEASED),
    **dict.fromkeys(("l2_sensitivity", "trust", "adjacency", "accountant", "adversary", "ledger"), Kind.RELEASED),
    **dict.fromkeys(("test_accuracy", "test_loss", "validation_accuracy", "validation_loss"), Kind.RELEASED),
    **dict.fromkeys(("simulated_seconds", "bytes_down", "bytes_up", "counted"), Kind.RELEASED),
    **dict.fromkeys(("seconds", "clients_per_second", "execution"), Kind.TIMING),
}
"""The keys of `summary.json` and of the rows of `rounds.jsonl`."""


def mode_of(name: str) -> int | None:
    """Mode with which a run creates one of its files; None to leave it to the umask.

    Raises:
        ValueError: If the list does not have it. Every file has to be in the privacy statement.
    """
    if name not in _OF_NAME:
        raise ValueError(f"{name} is not in OUTPUTS, the list of what a run writes")
    return OWNER_ONLY if _OF_NAME[name].kind is Kind.OWNER else None


def outputs_of(*, deployed: bool) -> list[Output]:
    """The files of a deployment or of a simulation, those that are released first."""
    other = "simulation" if deployed else "deployment"
    order = list(Kind)
    return sorted((output for output in OUTPUTS if output.by != other), key=lambda output: order.index(output.kind))


Whose = Literal["public", "clients", "within"]
"""Whose examples models are scored on: nobody's, those of clients that take no part, or the protected clients' own."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """Whose examples a run uses for what, as far as the privacy statement depends on it.

    Args:
        clients: `natural` for clients that the data have; `simulated` for a pool that was divided; `resampled` for
            clients that draw from a pool.
        test: Whose examples models are tested on.
        validation: The same for examples to choose by; None if there are none.
    """

    clients: Literal["natural", "simulated", "resampled"]
    test: Whose = "public"
    validation: Whose | None = None

    @property
    def not_covered(self) -> tuple[str, ...]:
        """Names of the scores that are computed, without noise, on the examples of protected clients."""
        scored = {"test": self.test, "validation": self.validation}
        return tuple(
            f"{on}_{score}" for on, whose in scored.items() if whose == "within" for score in ("accuracy", "loss")
        )
