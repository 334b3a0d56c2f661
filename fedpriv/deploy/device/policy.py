"""What a client agrees to: its own file, `fedpriv-client.toml`, which no server can change."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import Template
from typing import Literal

from fedpriv.checks import positive_real, real_from
from fedpriv.data.dataset import DATASETS
from fedpriv.errors import UserError
from fedpriv.experiment.config import Config, read_config_file
from fedpriv.experiment.schema import read_table, refuse_unknown
from fedpriv.files import make_private_folder, replace_durably
from fedpriv.flower.messages import ClientInstructions, RunTerms, method_name
from fedpriv.flower.privacy_terms import NO_PROMISE
from fedpriv.flower.refusals import Refusal
from fedpriv.methods import METHODS, has_memory
from fedpriv.plugins import is_reference
from fedpriv.privacy import REPLACE_FACTOR, Local, PrivacyPlan, by_reliance
from fedpriv.tasks.models import MODELS

__all__ = [
    "POLICY_FILE",
    "POLICY_TEXT",
    "Accepts",
    "Limits",
    "OwnData",
    "Policy",
    "load_policy",
    "write_default_policy",
]

POLICY_FILE = "fedpriv-client.toml"

_POLICY = """\
# What this client agrees to. Only its operator decides: no server can change or read this file.

[accepts]
# "local": only messages that this client has noised itself leave it.
# "central": bare bounded messages may go to the server, which is trusted to add noise.
trust = "$trust"
# Names from `fedpriv list`; an empty list accepts any.
methods = [@methods@]
models = []                 # names from `fedpriv list`; empty: any
data = []                   # names from `fedpriv list`; empty: any
max_parameters = 10000000   # largest model
evaluation = false          # whether metrics of an app's own evaluation may leave, which nothing bounds or hides

[limits]
# Most that may be spent on this client's data, over all runs together, against the adversary that `trust` names.
epsilon = $epsilon
delta = $delta
min_noise_multiplier = 0.3  # floor on noise over l2 sensitivity in a single release
max_l2_bound = 100.0        # longest message
max_rounds = 100000         # longest run
# Neighbours under which this client's own noise is counted, and the floor is meant; "add-or-remove" is half as strict.
adjacency = "replace"

[data]
own = ""                    # a file with this client's own examples; empty: its part of the experiment's data set
"""

POLICY_TEXT = Template(_POLICY.replace("@methods@", ", ".join(f'"{name}"' for name in sorted(METHODS))))
"""A policy for `trust`, `epsilon` and `delta`, which accepts every method there is."""

# What the server says it adds must be what the promise needs, up to the last digits of a float64.
_TOLERANCE = 1e-9

_MOST = 1e18

# Less noise than that over the sensitivity is none, whatever a policy says.
_LEAST_NOISE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Accepts:
    """Which orders are followed.

    Args:
        trust: local: only messages leave that this client has noised itself. central: bare messages, too, to a server
            that is trusted to add the noise. none: also runs that promise nothing.
        methods: Names of methods; empty: all.
        models: Names of models; empty: all.
        data: Names of data sets; empty: all.
        max_parameters: Largest model.
        evaluation: Whether the metrics of an app's evaluation may leave: nothing bounds or hides them.
    """

    trust: str = Local.name
    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    max_parameters: int = 10_000_000
    evaluation: bool = False

    def __post_init__(self) -> None:
        words = (*by_reliance(), NO_PROMISE)
        if self.trust not in words:
            expected = " or ".join(f'"{word}"' for word in words)
            raise UserError("accepts.trust", expected, repr(self.trust), "Change the value")

    @property
    def trusts(self) -> tuple[str, ...]:
        """The trusts of runs that are followed, in words."""
        words = (*by_reliance(), NO_PROMISE)
        return words[: 1 + words.index(self.trust)]

    @property
    def unpromised(self) -> bool:
        """Whether runs that promise nothing are followed, too."""
        return self.trust == NO_PROMISE


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far the client goes.

    Args:
        epsilon: Most that may be spent on its data, over all runs together, against the adversary of `trust`.
        delta: The delta of that.
        min_noise_multiplier: Least noise over l2 sensitivity of a single release.
        max_l2_bound: Largest bound of a message.
        max_rounds: Longest run.
        adjacency: Under which neighbours this client's own noise is counted, and its floor is meant; see `PrivacyPlan`.
    """

    epsilon: float
    delta: float
    min_noise_multiplier: float = 0.0
    max_l2_bound: float = math.inf
    max_rounds: int = 100_000
    adjacency: Literal["replace", "add-or-remove"] = "replace"

    def __post_init__(self) -> None:
        positive_real("limits.epsilon", self.epsilon, "Give the budget")
        if not 0.0 < self.delta < 1.0:
            raise UserError("limits.delta", "a number between 0 and 1", self.delta, "Well below 1 / clients is usual")
        real_from("limits.min_noise_multiplier", self.min_noise_multiplier, 0, "Mend it")
        if not self.max_l2_bound > 0.0:
            raise UserError("limits.max_l2_bound", "a number above 0", self.max_l2_bound, "Mend it")


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """What the client trains on.

    Args:
        own: A file with its own examples; empty: its part of the experiment's data set, by its id.
    """

    own: str = ""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A client's policy; see its parts."""

    accepts: Accepts = field(default_factory=Accepts)
    limits: Limits
    data: OwnData = field(default_factory=OwnData)

    def check_experiment(self, config: Config) -> None:
        """Raises Refusal unless the experiment's model and data are accepted, and its files below the data's folder."""
        _among("accepts.models", config.tables["model"]["name"], self.accepts.models)
        _among("accepts.data", config.tables["data"]["name"], self.accepts.data)
        for value in config.tables["data"].values():
            if isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts):
                raise _no("data", "files below this client's folder of data", repr(value))

    def check_app(self) -> None:
        """Raises Refusal if the policy names models or data sets: which ones an app of its own uses is not known."""
        _among("accepts.models", "an app's own", self.accepts.models)
        _among("accepts.data", "an app's own", self.accepts.data)

    def check_evaluation(self, asked: str) -> None:
        """Raises Refusal unless a message that asks for anything but training is an evaluation, and accepted.

        Args:
            asked: The message's type.
        """
        if asked != "evaluate":
            raise _no("message", "one that asks for training", repr(asked[:40]))
        if not self.accepts.evaluation:
            raise _no("accepts.evaluation", "messages that ask for training", repr(asked))

    def check(self, instructions: ClientInstructions, terms: RunTerms, parameters: int) -> PrivacyPlan | None:
        """The plan that the terms promise; None if they promise nothing.

        Raises:
            Refusal: If the order asks for more than the policy allows, or for less noise than the terms promise.
        """
        _refuse_odd_numbers(instructions, terms)
        if not terms.rounds <= self.limits.max_rounds:
            raise _no("limits.max_rounds", f"at most {self.limits.max_rounds:,}", f"{terms.rounds:,}")
        if instructions.seed is not None:
            raise _no("seed", "noise from this client's own operating system", "a seed in the order")
        if instructions.diagnostics:
            raise _no("diagnostics", "orders for messages alone", "one for norms of bare signals")
        _among("accepts.methods", method_name(instructions.method), self.accepts.methods)
        if not 1 <= parameters <= self.accepts.max_parameters:
            raise _no("accepts.max_parameters", f"at most {self.accepts.max_parameters:,}", f"{parameters:,}")
        bound = instructions.method.bounded.l2_bound
        if not bound <= self.limits.max_l2_bound:
            raise _no("limits.max_l2_bound", f"at most {self.limits.max_l2_bound:g}", f"{bound:g}")
        if terms.trust not in self.accepts.trusts:
            raise _no("accepts.trust", " or ".join(self.accepts.trusts), repr(terms.trust))
        if terms.trust_rules is None:
            return None
        if not instructions.private:
            raise _no("private", "an order for messages alone, as the terms promise", "one for metrics besides")
        plan = _plan(instructions, terms)
        multiplier = plan.noise_multiplier
        if plan.trust_rules.charges_participations:
            multiplier = instructions.noise_stddev / (
                bound * (REPLACE_FACTOR if self.limits.adjacency == "replace" else 1.0)
            )
        least = max(self.limits.min_noise_multiplier, _LEAST_NOISE)
        if not multiplier >= least:
            floor = f"at least {least:g}"
            raise _no("limits.min_noise_multiplier", floor, f"{multiplier:g}")
        needed = plan.trust_rules.split(plan.noise_stddev, plan.sampling.expected_size).client
        if not abs(instructions.noise_stddev - needed) <= _TOLERANCE * needed:
            raise _no("noise", f"a standard deviation of {needed:g}, as promised", f"{instructions.noise_stddev:g}")
        return plan


def load_policy(path: Path) -> Policy:
    """Reads a policy.

    Raises:
        UserError: If the file is not a valid policy: then no order is followed.
    """
    tables = read_config_file(path)
    refuse_unknown(tables, ["accepts", "limits", "data"], "")
    kinds = {"accepts": Accepts, "limits": Limits, "data": OwnData}
    for name in kinds:
        if not isinstance(tables.get(name, {}), dict):
            raise UserError(f"{path}: {name}", "a table", repr(tables[name]), f"Write [{name}] and its keys below")
    if "limits" not in tables:
        raise UserError(str(path), "a table [limits] with epsilon and delta", "none", "Say what may be spent at most")
    policy = Policy(**{name: read_table(kind, tables.get(name, {}), name) for name, kind in kinds.items()})
    accepted = (("methods", METHODS), ("models", MODELS), ("data", DATASETS))
    for key, registry in accepted:
        for name in filter(is_reference, getattr(policy.accepts, key)):
            registry.resolve(name, f"accepts.{key}")  # from here on orders may name it
    for name in policy.accepts.methods:
        if name not in METHODS:
            raise UserError("accepts.methods", f"names among {', '.join(METHODS)}", repr(name), f"Mend {path}")
    return policy


def write_default_policy(home: Path) -> bool:
    """Write the default policy into a home that has none; return whether it was written.

    Raises:
        UserError: If the disk is full or cannot be written to.
    """
    path = home / POLICY_FILE
    if path.exists():
        return False
    make_private_folder(home)
    replace_durably(path, POLICY_TEXT.substitute(trust=Accepts().trust, epsilon=8.0, delta=1e-5).encode())
    return True


def _plan(instructions: ClientInstructions, terms: RunTerms) -> PrivacyPlan:
    if has_memory(instructions.method) and not terms.client_memory:
        raise _no("client_memory", "true with a method that has a memory", "false")
    try:
        return terms.plan(instructions.method.bounded.l2_bound)
    except UserError as error:
        raise Refusal(
            "policy", "terms", "a promise that can be checked", str(error), "Ask the server's operator"
        ) from None


def _refuse_odd_numbers(instructions: ClientInstructions, terms: RunTerms) -> None:
    """Raises Refusal for what no server that is well would send."""
    asked = {"bound": instructions.method.bounded.l2_bound, "round": instructions.round, "client": instructions.client}
    for name, value in {**asdict(terms), **asked, "noise_stddev": instructions.noise_stddev}.items():
        if isinstance(value, int | float) and not 0 <= value < _MOST:
            raise _no(name, "a number from 0, and finite", value)


def _among(where: str, name: str, accepted: tuple[str, ...]) -> None:
    if accepted and name not in accepted:
        raise _no(where, " or ".join(accepted), repr(name))


def _no(where: str, expected: str, got: object) -> Refusal:
    return Refusal("policy", where, expected, got, f"Ask this client's operator, who decides in {POLICY_FILE}")
