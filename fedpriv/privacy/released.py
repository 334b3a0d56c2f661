"""The files and values that a run writes: which are released, which the guarantee covers, and who may read the rest.

The recorder takes every file's mode from here, the trackers the values that they may receive, and the privacy statement
its list. So the statement matches the run.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Literal

__all__ = ["OUTPUTS", "OWNER_ONLY", "SCORES", "VALUES", "DataFacts", "Kind", "Output", "Whose", "mode_of", "outputs_of"]

OWNER_ONLY = 0o600
"""Mode of a file that is not released; a folder of such files has mode 0700."""


class Kind(Enum):
    """The release status of a file or value."""

    RELEASED = "released"
    """Computed from noised sums, which the guarantee covers, or independent of all clients' data."""
    TIMING = "released, not covered"
    """A duration."""
    OWNER = "not released"
    """Computed from clients' data without noise. Only the file's owner can read it, from its first byte on."""


@dataclass(frozen=True)
class Output:
    """A file or folder that a run writes.

    Args:
        name: Its name in the run directory.
        kind: Its release status.
        about: Its content, for the privacy statement.
        by: The runs that write it: `all`, or only those that are a `simulation`, a `deployment`, an `audit` or part of
            a `sweep`, or that have a `tracker`.
        left: True if every finished in-process simulation leaves it.
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
        "model.json",
        Kind.RELEASED,
        "the shapes of inputs and outputs, and the declared names of classes and constants of inputs",
        left=True,
    ),
    Output(
        "rounds.jsonl",
        Kind.RELEASED,
        "epsilon and the scores of the model, round by round, and the virtual clock unless it shows who took part",
        left=True,
    ),
    Output("analysis.json", Kind.RELEASED, "the answers of an analysis, with standard errors of the noise"),
    Output("curves.png", Kind.RELEASED, "the same as a picture", left=True),
    Output("summary.json", Kind.RELEASED, "the promise and the last scores; of its timings see below", left=True),
    Output("engine.json", Kind.TIMING, "how the run was executed, and how long a client took if measured", left=True),
    Output("groups.json", Kind.RELEASED, "which trials a sweep compares", "sweep"),
    Output(
        "trials.csv",
        Kind.RELEASED,
        "a sweep's trials with settings and released scores; not covered: timings, and error messages of failed trials",
        "sweep",
    ),
    Output("tuning.json", Kind.RELEASED, "the trial that a tuning chose, and the promise of that choice", "sweep"),
    Output("drawn.json", Kind.OWNER, "the trials that a tuning drew, which stay secret", "sweep"),
    Output("scores.json", Kind.OWNER, "the noised scores of a tuning's trials, which stay secret", "sweep"),
    Output("stopped.json", Kind.RELEASED, "why a sweep stopped the run, by released scores", "sweep"),
    Output(
        "audit.json",
        Kind.RELEASED,
        "the verdict of an audit, a separate run with canaries among the clients",
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
        "until the run ends, with the clients' memories, past noise, who took part, and a checksum of the data",
    ),
    Output("diagnostics.jsonl", Kind.OWNER, "norms, counts and speed, round by round", left=True),
    Output("diagnostics.json", Kind.OWNER, "totals, how clients differ, and a checksum of the data", left=True),
    Output("heterogeneity.json", Kind.OWNER, "how clients differ", "simulation", left=True),
    Output("participation.jsonl", Kind.OWNER, "who was asked, who answered and how", "deployment"),
    Output("nodes.json", Kind.OWNER, "which clients are connected, and when each last was", "deployment"),
    Output("clients.json", Kind.OWNER, "scores of single clients, in runs without privacy alone", "simulation"),
    Output(
        "ledgers.json", Kind.OWNER, "what single clients' records spent, if clients divide by own sizes", "simulation"
    ),
    Output("flower.log", Kind.OWNER, "the output of Flower's processes", "simulation"),
    Output("failure.json", Kind.OWNER, "why a trial of a sweep failed", "sweep"),
)

_OF_NAME = {output.name: output for output in OUTPUTS}

SCORES = ("accuracy", "loss", "auroc", "f1", "ece", "rmse", "mae", "perplexity")
"""Built-in scores. Those of user tasks are released, too."""

VALUES = {
    **dict.fromkeys(("name", "method", "engine", "digest", "seed", "rounds", "round"), Kind.RELEASED),
    **dict.fromkeys(("population", "expected_cohort", "parameters", "not_covered"), Kind.RELEASED),
    **dict.fromkeys(("private", "epsilon", "delta", "noise_multiplier", "noise_stddev"), Kind.RELEASED),
    **dict.fromkeys(("l2_sensitivity", "trust", "adjacency", "accountant", "adversary", "ledger"), Kind.RELEASED),
    **dict.fromkeys((f"{on}_{score}" for on in ("test", "validation") for score in SCORES), Kind.RELEASED),
    "metrics": Kind.RELEASED,
    "void": Kind.RELEASED,
    **dict.fromkeys(("epsilon_spent", "rounds_planned"), Kind.RELEASED),
    **dict.fromkeys(("simulated_seconds", "bytes_down", "bytes_up", "counted"), Kind.RELEASED),
    **dict.fromkeys(("seconds", "clients_per_second", "execution"), Kind.TIMING),
}
"""The keys of `summary.json` and of the rows of `rounds.jsonl`."""


def mode_of(name: str) -> int | None:
    """Return the mode with which a run creates one of its files; None leaves it to the umask.

    Raises:
        ValueError: If `OUTPUTS` lacks the file. Every file must be in the privacy statement.
    """
    if name not in _OF_NAME:
        raise ValueError(f"{name} is not in OUTPUTS, the list of a run's files")
    return OWNER_ONLY if _OF_NAME[name].kind is Kind.OWNER else None


def outputs_of(*, deployed: bool) -> list[Output]:
    """Return the files of a deployment or of a simulation, the released ones first."""
    other = "simulation" if deployed else "deployment"
    order = list(Kind)
    return sorted((output for output in OUTPUTS if output.by != other), key=lambda output: order.index(output.kind))


Whose = Literal["public", "clients", "within"]
"""The examples that models are scored on: public ones, those of clients that take no part, or of protected clients."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The origin of a run's examples, as far as the privacy statement depends on it.

    Args:
        clients: `natural` for the clients of the data set; `simulated` for a pool divided among clients; `resampled`
            for clients that draw from a pool.
        test: Origin of the test examples.
        validation: Origin of the validation examples; None if there are none.
        scores: Names of the scores, without `test_` or `validation_`.
        asked: The questions of an analysis, in words; empty for a training.
        weight: How an analysis weighs clients; a sentence.
        reported: The values that clients send within their noised messages, in words; see `fedpriv.methods.SideValues`.
    """

    clients: Literal["natural", "simulated", "resampled"]
    test: Whose = "public"
    validation: Whose | None = None
    scores: tuple[str, ...] = ("accuracy", "loss")
    reported: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    weight: str = ""

    @property
    def not_covered(self) -> tuple[str, ...]:
        """Names of the scores that are computed without noise on protected clients' examples."""
        scored = {"test": self.test, "validation": self.validation}
        return tuple(f"{on}_{score}" for on, whose in scored.items() if whose == "within" for score in self.scores)
