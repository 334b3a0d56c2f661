"""The cells of the map and the families of methods, as listed before the first run.

A cell is a problem: data, population, spread of labels, cohort, promise. Every family is tuned in the same way in each:
on a grid of two hyperparameters, the server's step and one other. `config` returns the tables of a trial.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE / "data.py"
DELTA = 1e-5
VALIDATION = 0.1
MOMENTUM = 0.9
DAMPING = 0.1
# The middle of the steps, and the longest random walk of the model by noise in the middle: about the length of a model.
STEP, WALK = 3.0, 6.0
RATIO = 10**0.5
STEPS = 4
# Test scores of a regression (hours of work) above this error count as this: the constant 40 has 12.3.
WORST_ERROR = 20.0

SKEWS: dict[str, dict[str, Any]] = {
    "none": {"partition": "iid"},
    "moderate": {"partition": "dirichlet", "concentration": 0.3},
    "shards": {"partition": "shards"},
    "sizes": {"partition": "quantity"},
    "sorted": {"partition": f"{DATA}:TargetShards"},
    "resampled": {"partition": "resampled", "examples": 10},
}
MODELS: dict[str, dict[str, Any]] = {
    "softmax": {"name": "softmax"},
    "mlp": {"name": "mlp", "hidden": [16]},
    "cnn": {"name": "cnn", "width": 2},
}
REGRESSION = {"name": "regression", "loss": "huber", "center": 40.0, "scale": 12.0}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One problem.

    Args:
        data: A function of data.py.
        clients: The population.
        skew: A name of SKEWS.
        share: The probability with which a client is in a round; 1 for everyone.
        epsilon: None without noise.
        model: A name of MODELS.
        rounds: The number of rounds.
        trust: Who adds the noise.
        unit: The protected data.
        options: Further keys of the data set.
    """

    data: str
    clients: int
    skew: str
    share: float = 1.0
    epsilon: float | None = None
    model: str = "softmax"
    rounds: int = 40
    trust: str = "central"
    unit: str = "client"
    options: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """A name that is also that of a folder."""
        promise = "none" if self.epsilon is None else f"eps{self.epsilon:g}"
        parts = [self.data, str(self.clients), self.skew, f"q{self.share:g}", promise, self.model]
        parts += [part for part, usual in ((self.trust, "central"), (self.unit, "client")) if part != usual]
        return "-".join(parts)

    @property
    def source(self) -> str:
        """The people or things behind the data: a9a and hours are about the same people."""
        return "adult" if self.data in ("a9a", "hours") else self.data

    @property
    def metric(self) -> str:
        """The name of the score."""
        return "rmse" if self.data == "hours" else "accuracy"

    @property
    def sign(self) -> int:
        """1 if a higher score is better, otherwise -1."""
        return -1 if self.data == "hours" else 1

    @property
    def private(self) -> bool:
        """True if there is noise."""
        return self.epsilon is not None

    def as_dict(self) -> dict[str, Any]:
        """Return name and values, for tables."""
        return {"cell": self.name, **asdict(self), "options": dict(self.options)}


def _cells() -> list[Cell]:
    many = {"share": 0.1, "rounds": 40}
    more = {"share": 0.03, "rounds": 60}
    most = {"share": 0.01, "rounds": 80}
    lists = [
        [
            Cell(data="digits", clients=300, skew="shards", epsilon=8.0),
            Cell(data="digits", clients=100, skew="shards"),
            Cell(data="digits", clients=3000, skew="resampled", epsilon=1.0, **more),
            Cell(data="digits", clients=30_000, skew="resampled", epsilon=1.0, **most),
            Cell(data="digits", clients=300, skew="moderate", epsilon=2.0),
            Cell(data="digits", clients=30, skew="none"),
            Cell(data="digits", clients=100, skew="moderate", epsilon=8.0),
            Cell(data="digits", clients=100, skew="moderate", model="mlp"),
            Cell(data="digits", clients=30_000, skew="resampled", epsilon=8.0, model="mlp", **most),
            Cell(data="digits", clients=300, skew="shards", epsilon=2.0, trust="aggregator"),
            Cell(data="digits", clients=300, skew="moderate", epsilon=8.0, **many),
            Cell(data="digits", clients=30, skew="none", model="cnn", rounds=30),
        ],
        [
            Cell(data="a9a", clients=10_000, skew="none", epsilon=8.0, **more),
            Cell(data="a9a", clients=1000, skew="moderate", epsilon=1.0),
            Cell(data="a9a", clients=1000, skew="shards", epsilon=2.0, **many),
            Cell(data="a9a", clients=30, skew="shards"),
            Cell(data="a9a", clients=10_000, skew="shards", epsilon=1.0, **more),
            Cell(data="a9a", clients=30, skew="shards", epsilon=1.0, unit="example", rounds=30),
            Cell(data="a9a", clients=30_000, skew="resampled", **most),
            Cell(data="a9a", clients=300, skew="shards", epsilon=1.0),
            Cell(data="a9a", clients=300, skew="shards", epsilon=2.0, model="mlp"),
            Cell(data="a9a", clients=1000, skew="shards", epsilon=8.0, trust="local"),
            Cell(data="a9a", clients=10_000, skew="moderate", epsilon=8.0, model="mlp", **more),
        ],
        [
            Cell(data="sst2", clients=1000, skew="moderate", epsilon=2.0),
            Cell(data="sst2", clients=3000, skew="none", **many),
            Cell(data="sst2", clients=1000, skew="shards", epsilon=1.0, **many),
            Cell(data="sst2", clients=30_000, skew="moderate", epsilon=1.0, options=(("sentences", 67_349),), **most),
            Cell(data="sst2", clients=100, skew="shards", epsilon=8.0),
            Cell(data="sst2", clients=30_000, skew="shards", epsilon=8.0, options=(("sentences", 67_349),), **most),
            Cell(data="sst2", clients=30, skew="moderate"),
            Cell(data="sst2", clients=3000, skew="none", epsilon=8.0, model="mlp", **many),
            Cell(data="sst2", clients=10_000, skew="none", epsilon=2.0, **more),
        ],
        [
            Cell(data="hours", clients=1000, skew="none", epsilon=2.0, **more),
            Cell(data="hours", clients=100, skew="sorted"),
            Cell(data="hours", clients=100, skew="sorted", epsilon=1.0),
            Cell(data="hours", clients=300, skew="sorted", epsilon=1.0, **many),
            Cell(data="hours", clients=300, skew="sizes", epsilon=2.0),
            Cell(data="hours", clients=30_000, skew="resampled", epsilon=1.0, **most),
            Cell(data="hours", clients=30, skew="sorted", epsilon=1.0, unit="example", rounds=30),
            Cell(data="hours", clients=1000, skew="sorted", model="mlp"),
            Cell(data="hours", clients=30, skew="none", epsilon=8.0),
            Cell(data="hours", clients=3000, skew="sorted", epsilon=2.0, model="mlp", **more),
            Cell(data="hours", clients=1000, skew="none", epsilon=8.0, trust="local"),
        ],
        [
            Cell(data="mushrooms", clients=300, skew="moderate"),
            Cell(data="mushrooms", clients=300, skew="shards", epsilon=1.0),
            Cell(data="mushrooms", clients=30_000, skew="resampled", epsilon=1.0, **most),
            Cell(data="mushrooms", clients=100, skew="shards", epsilon=8.0),
            Cell(data="mushrooms", clients=3000, skew="none", epsilon=1.0, **many),
            Cell(data="mushrooms", clients=1000, skew="moderate", epsilon=2.0, **many),
            Cell(data="mushrooms", clients=30, skew="none", epsilon=2.0),
            Cell(data="mushrooms", clients=300, skew="shards", model="mlp"),
            Cell(data="mushrooms", clients=100, skew="moderate", epsilon=8.0, trust="aggregator"),
            Cell(data="mushrooms", clients=30, skew="none", epsilon=1.0, trust="local", unit="example"),
        ],
        [
            Cell(data="mnist", clients=1000, skew="moderate", epsilon=8.0, **many),
            Cell(data="mnist", clients=300, skew="shards", epsilon=2.0),
            Cell(data="mnist", clients=300, skew="shards"),
            Cell(data="mnist", clients=30_000, skew="resampled", epsilon=8.0, **most),
            Cell(data="mnist", clients=3000, skew="shards", epsilon=1.0, **many),
            Cell(data="mnist", clients=30, skew="none", epsilon=8.0),
            Cell(data="mnist", clients=10_000, skew="none", epsilon=2.0, options=(("images", 20_000),), **more),
            Cell(data="mnist", clients=3000, skew="moderate", epsilon=8.0, model="mlp", **more),
            Cell(data="mnist", clients=3000, skew="moderate", epsilon=2.0),
        ],
    ]
    longest = max(map(len, lists))
    return [cells[at] for at in range(longest) for cells in lists if at < len(cells)]


CELLS = _cells()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of method.

    Args:
        name: Its name in tables.
        axis: The second hyperparameter.
        values: Its values, in order.
        first: The index of the first of the two that are tried at the beginning; no others if `fixed`.
        fixed: True if the values are no range, so that they have no ends.
    """

    name: str
    axis: str
    values: tuple[Any, ...]
    first: int
    fixed: bool = False


_CLIPS = (0.03, 0.1, 0.3, 1.0, 3.0)
_BETAS = (0.003, 0.03, 0.3, 1.0)
REFERENCE = "momentum"
FAMILIES = {
    family.name: family
    for family in (
        Family(name="no memory", axis="clip_norm", values=_CLIPS, first=2),
        Family(name=REFERENCE, axis="clip_norm", values=_CLIPS, first=2),
        Family(name="Adam", axis="clip_norm", values=_CLIPS, first=2),
        Family(name="published memory", axis="beta", values=_BETAS, first=1),
        Family(name="damped memory", axis="beta", values=_BETAS, first=1),
        Family(name="public memory", axis="beta", values=_BETAS, first=1),
        Family(name="Clip21-SGD2M", axis="beta", values=_BETAS, first=1),
        Family(name="adaptive clip", axis="quantile", values=(0.3, 0.5, 0.8, 0.95), first=1),
        Family(name="correlated noise", axis="kind", values=("banded", "cyclic-banded"), first=0, fixed=True),
    )
}
OF_MEMORY = ("published memory", "damped memory", "public memory", "Clip21-SGD2M")
_CYCLIC_BANDS = 4


def families(cell: Cell) -> list[Family]:
    """Return the families that apply to a cell."""
    away = set()
    if cell.unit == "example":
        away |= {"adaptive clip"}
    if not (cell.private and cell.trust == "central" and cell.unit == "client" and cell.share < 1.0):
        away |= {"correlated noise"}
    return [family for family in FAMILIES.values() if family.name not in away]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The numbers that determine the middle of the steps.

    Args:
        size: The number of parameters, d.
        noise: The expected length of the noise on the mean message, if a message has at most length 1.
    """

    size: int
    noise: float


def gain(cell: Cell, family: str, value: Any) -> float:
    """Return how often one message moves the model, over the whole run, for a server step of 1."""
    if family in (REFERENCE, "adaptive clip", "correlated noise"):
        return 1.0 / (1.0 - MOMENTUM)
    if family == "damped memory":
        return value * cell.share * min(cell.rounds, 1.0 / DAMPING)
    if family in ("published memory", "Clip21-SGD2M"):
        return value * cell.share * cell.rounds / 3.0
    return 1.0


def middle(cell: Cell, family: str, value: Any, facts: Facts) -> float:
    """Return the middle of the server's steps: `STEP` a round without noise, and a random walk of `WALK` with noise."""
    gained = gain(cell, family, value)
    full = 1.0 if family in OF_MEMORY else gained  # a full memory is as long as the signal
    quiet = STEP / (min(gained, full) if family in OF_MEMORY else full)
    loud = math.inf if facts.noise == 0.0 else WALK / (facts.noise * math.sqrt(cell.rounds) * gained)
    if family == "Adam":
        return min(quiet, loud) * max(1.0, facts.noise) / math.sqrt(facts.size)
    return min(quiet, loud)


def config(cell: Cell, family: Family, at: tuple[int, int], seed: int, facts: Facts) -> dict[str, Any]:
    """Return the tables of a trial.

    Args:
        cell: The problem.
        family: The kind of method.
        at: The index of the value of the family's axis, and that of the step, 0 to 3 before any extension.
        seed: The seed.
        facts: See `Facts`.
    """
    value = family.values[at[0]]
    step = float(f"{middle(cell, family.name, value, facts) * RATIO ** (at[1] - (STEPS - 1) / 2):.4g}")
    tables: dict[str, Any] = {
        "name": "when-feedback-pays",
        "seed": seed,
        "data": {
            "name": f"{DATA}:{cell.data}",
            "clients": cell.clients,
            "validation": VALIDATION,
            **SKEWS[cell.skew],
            **dict(cell.options),
        },
        "model": MODELS[cell.model],
        "local": {"work": "full-gradient"},
        "cohort": _cohort(cell, value if family.axis == "kind" else None),
        "training": {"rounds": cell.rounds, "evaluate_every": cell.rounds},
    }
    if cell.metric == "rmse":
        tables["task"] = REGRESSION
    if cell.private:
        tables["privacy"] = {"trust": cell.trust, "epsilon": cell.epsilon, "delta": DELTA}
        if cell.unit == "example":
            tables["privacy"] |= {"unit": "example", "example_clip": 1.0}
    _add_method(tables, cell, family, value, step)
    return tables


def _cohort(cell: Cell, kind: str | None) -> dict[str, Any]:
    """Return the cohort; with correlated noise, groups take turns, and a round has as many clients as without."""
    if cell.share == 1.0:
        return {"sampling": "everyone"}
    turns = round(1.0 / cell.share)
    if kind == "banded":
        return {"sampling": "separated", "min_separation": turns}
    if kind == "cyclic-banded":
        return {"sampling": "separated", "min_separation": _CYCLIC_BANDS, "probability": cell.share}
    return {"sampling": "poisson", "probability": cell.share}


def _add_method(tables: dict[str, Any], cell: Cell, family: Family, value: Any, step: float) -> None:
    bound = value if family.axis == "clip_norm" else 1.0
    averaging: dict[str, Any] = {"name": "dp-fedavg", "clip_norm": bound}
    if cell.unit == "example":
        tables["privacy"]["example_clip"] = bound
        averaging = {"name": "dp-gd", "max_norm": max(1.0, bound)}
    if family.axis == "clip_norm":
        # Without noise in the way, a step is a number of bounds; Adam's steps have their own length.
        tables["method"] = {**averaging, "server_lr": step if family.name == "Adam" else float(f"{step / bound:.4g}")}
    elif family.name in ("published memory", "damped memory"):
        damping = {"damping": DAMPING} if family.name == "damped memory" else {}
        memory = {"name": "alpha-normec", "alpha": 1.0, "beta": value, "server_normalization": False}
        tables["method"] = {**memory, **damping, "server_lr": step}
    elif family.name == "public memory":
        tables["method"] = {"name": "centered-clip", "clip_norm": bound, "beta": value, "server_lr": step}
    elif family.name == "Clip21-SGD2M":
        memory = {"name": "clip21-sgd2m", "clip_norm": bound, "weight": 0.5, "beta": value}
        tables["method"] = {**memory, "server_lr": step}
    else:
        tables["method"] = {**averaging, "server_lr": step}
    if family.axis == "quantile":
        tables["adaptive"] = {"quantile": value}
    if family.axis == "kind":
        tables["noise"] = {"kind": value}
    if family.name == "Adam":
        tables["server"] = {"optimizer": "adam"}
    elif family.name in (REFERENCE, "adaptive clip", "correlated noise"):
        tables["server"] = {"optimizer": "momentum", "momentum": MOMENTUM}
