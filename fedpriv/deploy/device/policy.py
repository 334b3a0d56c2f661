"""Policy of a client: the file `fedpriv-client.toml`, which no server can change."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import Template
from typing import Literal

from fedpriv.checks import positive_real, real_from, whole_from
from fedpriv.data.dataset import DATASETS
from fedpriv.deploy.kinds import in_file
from fedpriv.errors import UserError
from fedpriv.experiment.config import Config, read_config_file
from fedpriv.experiment.schema import NAMED, read_table, refuse_unknown
from fedpriv.files import make_private_folder, replace_durably
from fedpriv.flower.messages import ClientInstructions, RunTerms, method_name
from fedpriv.flower.privacy_terms import NO_PROMISE
from fedpriv.flower.refusals import Refusal
from fedpriv.methods import METHODS, has_memory
from fedpriv.plugins import is_reference, whole_reference
from fedpriv.privacy import REPLACE_FACTOR, UNITS, Adjacency, PrivacyPlan, TrustName, UnitName, by_reliance
from fedpriv.rounds import record_bound
from fedpriv.tables import Table
from fedpriv.tasks.kinds import TASKS
from fedpriv.tasks.models import MODELS

__all__ = [
    "POLICY_FILE",
    "POLICY_TEXT",
    "AcceptedTrust",
    "Accepts",
    "AggregationLimits",
    "Limits",
    "OwnData",
    "Policy",
    "load_policy",
    "write_default_policy",
]

POLICY_FILE = "fedpriv-client.toml"

_POLICY = """\
# Policy of this client. Only its operator decides: no server can change or read this file.

[accepts]
# "local": the client sends only messages that it has noised itself.
# "aggregator": also masked messages with a share of the noise, if helpers are pinned below in [aggregation].
# "central": the client may send bounded messages without noise to the server, which is trusted to add noise.
trust = "$trust"
# "client": only runs that protect all examples of this client together.
# "example": also runs that protect single examples; [limits] epsilon is then the budget of one example.
unit = "$unit"
# Names from `fedpriv list`; an empty list accepts all.
methods = [@methods@]
models = []                 # names from `fedpriv list`; empty: all
data = []                   # names from `fedpriv list`; empty: all
tasks = []                  # names from `fedpriv list`; empty: all
max_parameters = 10000000   # largest model
evaluation = false          # true: metrics of an app's evaluation may leave; they are neither bounded nor noised

[limits]
# Privacy budget of this client's data, over all runs together, against the adversary defined by `trust`.
epsilon = $epsilon
# client_epsilon = 100.0    # with accepts.unit = "example": also a budget of all examples together; absent: none
delta = $delta
min_noise_multiplier = 0.3  # minimum of noise over l2 sensitivity in a single release
max_l2_bound = 100.0        # longest message
max_rounds = 100000         # longest run
# Adjacency for this client's own noise, correlated noise and the minimum above; "add-or-remove" is half as strict.
adjacency = "replace"

[aggregation]
# Identity keys of the helpers of secure aggregation, from their operators: all of them, and no other, must take part.
helpers = [$helpers]
least_survivors = 2         # minimum number of clients in a sum; helpers have another minimum
colluders = 0               # least number of colluding clients that the noise must withstand
min_share_multiplier = 0.0  # minimum of this client's own noise over l2 sensitivity, against server and all helpers

[data]
own = ""                    # a file with this client's own examples; empty: its part of the experiment's data set
"""

POLICY_TEXT = Template(_POLICY.replace("@methods@", ", ".join(f'"{name}"' for name in sorted(METHODS))))
"""Template of a policy, for `trust`, `unit`, `epsilon`, `delta` and `helpers`, that accepts all methods."""

AcceptedTrust = TrustName | Literal["none"]
"""The word of `accepts.trust`; see `Accepts`."""

# The noise in the instructions must be the noise that the terms require, up to the last digits of a float64.
_TOLERANCE = 1e-9

_MAX_NUMBER = 1e18

# A smaller noise multiplier counts as no noise, for any policy.
_MIN_NOISE_MULTIPLIER = 1e-6


@dataclass(frozen=True, kw_only=True)
class Accepts:
    """Instructions that the client accepts.

    Args:
        unit: client: only runs that protect all examples of the client together. example: also runs that protect single
            examples.
        trust: local: the client sends only messages that it has noised itself. aggregator: also masked messages with a
            share of the noise. central: also messages without noise, to a server that is trusted to add the noise.
            none: also runs without a privacy guarantee.
        methods: Names of methods; empty for all. A class in a file of the client is named as in a config, by a path
            from the policy's folder; a server's config names another copy of the file, with the same content.
        models: Names of models, likewise.
        data: Names of data sets, likewise.
        tasks: Names of tasks, likewise.
        max_parameters: Maximum number of parameters of a model.
        evaluation: True if the metrics of an app's evaluation may leave, although they are neither bounded nor noised.
    """

    trust: AcceptedTrust = field(default="local", metadata=NAMED)
    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    max_parameters: int = 10_000_000
    evaluation: bool = False
    unit: UnitName = "client"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UserError("accepts.unit", '"client" or "example"', repr(self.unit), "Change the value")
        words = (*by_reliance(), NO_PROMISE)
        if self.trust not in words:
            expected = " or ".join(f'"{word}"' for word in words)
            raise UserError("accepts.trust", expected, repr(self.trust), "Change the value")

    @property
    def trusts(self) -> tuple[str, ...]:
        """Names of the trusts of accepted runs."""
        words = (*by_reliance(), NO_PROMISE)
        return words[: 1 + words.index(self.trust)]

    @property
    def unpromised(self) -> bool:
        """True if runs without a privacy guarantee are accepted, too."""
        return self.trust == NO_PROMISE


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the client.

    Args:
        epsilon: Privacy budget of one unit of its data (`accepts.unit`), over all runs together, against the adversary
            of `trust`.
        client_epsilon: Budget of all its examples together, if the unit is `example`; None for none.
        delta: Delta of the budget.
        min_noise_multiplier: Minimum of noise over l2 sensitivity in a single release.
        max_l2_bound: Maximum bound of a message.
        max_rounds: Maximum number of rounds of a run.
        adjacency: Adjacency for this client's own noise, correlated noise and `min_noise_multiplier`; see
            `PrivacyPlan`.
    """

    epsilon: float
    delta: float
    min_noise_multiplier: float = 0.0
    max_l2_bound: float = math.inf
    max_rounds: int = 100_000
    adjacency: Literal["replace", "add-or-remove"] = "replace"
    client_epsilon: float | None = None

    def __post_init__(self) -> None:
        positive_real("limits.epsilon", self.epsilon, "Set it to the budget")
        if not 0.0 < self.delta < 1.0:
            raise UserError("limits.delta", "a number between 0 and 1", self.delta, "Set it well below 1 / clients")
        if self.client_epsilon is not None:
            positive_real("limits.client_epsilon", self.client_epsilon, "Set it to the budget, or remove it")
        real_from("limits.min_noise_multiplier", self.min_noise_multiplier, 0, "Change the value")
        if not self.max_l2_bound > 0.0:
            raise UserError("limits.max_l2_bound", "a number above 0", self.max_l2_bound, "Change the value")


@dataclass(frozen=True, kw_only=True)
class AggregationLimits:
    """Limits of the client for secure aggregation.

    Args:
        helpers: Identity keys of the helpers, 64 hexadecimal digits each. All of them and no other must take part: a
            list from the server could hold its own keys.
        least_survivors: Minimum of t, the number of clients in a sum.
        colluders: Minimum of c, the number of colluding clients that the noise must withstand.
        min_share_multiplier: Minimum of the client's own share of the noise over l2 sensitivity. Against the server
            together with all helpers, this share alone protects it.
    """

    helpers: tuple[str, ...] = ()
    least_survivors: int = 2
    colluders: int = 0
    min_share_multiplier: float = 0.0

    def __post_init__(self) -> None:
        for key in self.helpers:
            if len(key) != 64 or set(key) - set("0123456789abcdef"):
                expected = "identity keys, 64 digits of 0-9a-f"
                raise UserError("aggregation.helpers", expected, repr(key), "Ask the helper's operator")
        whole_from("aggregation.least_survivors", self.least_survivors, 2, "A sum of one message is that message")
        whole_from("aggregation.colluders", self.colluders, 0, "Set it to 0 or more")
        real_from("aggregation.min_share_multiplier", self.min_share_multiplier, 0, "Change the value")

    @property
    def identities(self) -> frozenset[bytes]:
        """The identity keys."""
        return frozenset(map(bytes.fromhex, self.helpers))

    def check(self, plan: PrivacyPlan, parameters: int, moved: float) -> None:
        """Raise a `Refusal` unless a plan with secure aggregation is within the limits.

        Args:
            plan: The plan.
            parameters: Number of parameters of the model.
            moved: Change of a message that the noise has to hide.
        """
        numbers = plan.aggregation
        if numbers is None:
            return
        if numbers.everyone_answers:  # this device flips no coins, and the server sees whom it asks
            raise _no("aggregation", "a plan that credits no sampling", "one in which everyone answers")
        if not self.helpers:
            raise _no("aggregation.helpers", "a run without secure aggregation: no helper is pinned", plan.trust)
        if not numbers.least_survivors >= self.least_survivors:
            floor = f"at least {self.least_survivors} clients in a sum"
            raise _no("aggregation.least_survivors", floor, numbers.least_survivors)
        if not numbers.colluders >= self.colluders:
            raise _no("aggregation.colluders", f"noise for at least {self.colluders}", numbers.colluders)
        if numbers.size != parameters:
            raise _no("aggregation", f"a plan for {parameters:,} parameters", f"{numbers.size:,}")
        share = plan.shares.client / moved
        if not share >= self.min_share_multiplier:
            floor = f"at least {self.min_share_multiplier:g}"
            raise _no("aggregation.min_share_multiplier", floor, f"{share:g}")


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """Training data of the client.

    Args:
        own: File with its own examples; empty for its part of the experiment's data set, by its id.
    """

    own: str = ""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Policy of a client; see its parts."""

    accepts: Accepts = field(default_factory=Accepts)
    limits: Limits
    data: OwnData = field(default_factory=OwnData)
    aggregation: AggregationLimits = field(default_factory=AggregationLimits)

    @property
    def budgets(self) -> dict[UnitName, float]:
        """The budgets by unit."""
        whole = self.limits.client_epsilon
        own: dict[UnitName, float] = {self.accepts.unit: self.limits.epsilon}
        return own if whole is None or self.accepts.unit == "client" else {**own, "client": whole}

    def check_experiment(self, config: Config) -> None:
        """Raise a `Refusal` unless the policy accepts model, data and task, and all files are in the data folder."""
        _among("accepts.models", config.tables["model"]["name"], self.accepts.models)
        _among("accepts.data", config.tables["data"]["name"], self.accepts.data)
        _among("accepts.tasks", TASKS.name_of(config.task), self.accepts.tasks)
        for key, value in config.tables["data"].items():
            if key == "name":
                continue  # accepted above; a class is one that this client's policy names
            if isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts):
                raise _no("data", "files below this client's data folder", repr(value))

    def check_app(self) -> None:
        """Raise a `Refusal` if the policy names models, data sets or tasks: those of a user's app are unknown."""
        _among("accepts.models", "the app's own model", self.accepts.models)
        _among("accepts.data", "the app's own data", self.accepts.data)
        _among("accepts.tasks", "the app's own task", self.accepts.tasks)

    def check_evaluation(self, asked: str) -> None:
        """Raise a `Refusal` unless a message other than for training is an evaluation and the policy accepts it.

        Args:
            asked: Type of the message.
        """
        if asked != "evaluate":
            raise _no("message", "a message for training", repr(asked[:40]))
        if not self.accepts.evaluation:
            raise _no("accepts.evaluation", "messages for training only", repr(asked))

    def check(self, instructions: ClientInstructions, terms: RunTerms, parameters: int) -> PrivacyPlan | None:
        """Return the privacy plan of the terms; None without a privacy guarantee.

        Args:
            instructions: Instructions from the server, which is not trusted.
            terms: Terms of the run, from the same message.
            parameters: Number of parameters of the model.

        Raises:
            Refusal: If the instructions exceed the policy, or have less noise than the terms require.
        """
        _refuse_odd_numbers(instructions, terms)
        if not terms.rounds <= self.limits.max_rounds:
            raise _no("limits.max_rounds", f"at most {self.limits.max_rounds:,}", f"{terms.rounds:,}")
        if instructions.seed is not None:
            raise _no("seed", "noise from this client's operating system", "a seed in the instructions")
        if instructions.turn or instructions.grid:
            raise _no("grid", "the grid and the turn of the terms", "a grid or a turn in the instructions")
        if instructions.diagnostics:
            raise _no("diagnostics", "requests for messages only", "a request for norms of signals without noise")
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
            raise _no("private", "requests for messages only, as in the terms", "a request for metrics")
        if terms.unit == "example" and self.accepts.unit != "example":
            raise _no("accepts.unit", "runs that protect clients", "a run that protects single examples")
        plan = _plan(instructions, terms)
        _check_examples(instructions, plan, self.limits.adjacency)
        multiplier = plan.noise_multiplier
        reach = REPLACE_FACTOR if self.limits.adjacency == "replace" else 1.0
        if plan.sums is not None:
            multiplier = plan.noise_stddev / (plan.sums.l2_bound * reach)
            self.aggregation.check(plan, parameters, plan.sums.l2_bound * reach)
        if plan.trust_rules.charges_participations:
            moved = bound * reach
            moved = moved if plan.record is None else plan.record.sensitivity(self.limits.adjacency, 1)
            multiplier = (instructions.noise_stddev or instructions.step_stddev) / moved
        if plan.noise is not None:
            multiplier /= plan.noise.column
        least = max(self.limits.min_noise_multiplier, _MIN_NOISE_MULTIPLIER)
        if not multiplier >= least:
            floor = f"at least {least:g}"
            raise _no("limits.min_noise_multiplier", floor, f"{multiplier:g}")
        needed = plan.shares.client
        if not abs(instructions.noise_stddev - needed) <= _TOLERANCE * needed:
            raise _no("noise", f"a standard deviation of {needed:g}, as in the terms", f"{instructions.noise_stddev:g}")
        return plan


def load_policy(path: Path) -> Policy:
    """Read a policy.

    Raises:
        UserError: If the file is not a valid policy. The client then follows no instructions.
    """
    tables = read_config_file(path)
    with in_file(path):
        return _policy_in(tables, path)


def _policy_in(tables: Table, path: Path) -> Policy:
    """Return the policy in the tables of a file; errors name keys alone."""
    kinds = {"accepts": Accepts, "limits": Limits, "data": OwnData, "aggregation": AggregationLimits}
    refuse_unknown(tables, list(kinds), "")
    given: dict[str, Table] = {}
    for name in kinds:
        table = tables.get(name, {})
        if not isinstance(table, dict):
            raise UserError(name, "a table", repr(table), f"Write [{name}], and its keys below")
        given[name] = table
    if "limits" not in tables:
        remedy = "Add it with the client's privacy budget"
        raise UserError(str(path), "a table [limits] with epsilon and delta", "a file without it", remedy)
    given["accepts"] = {
        key: [whole_reference(name, path.parent) for name in value] if isinstance(value, list) else value
        for key, value in given["accepts"].items()
    }
    policy = Policy(**{name: read_table(kind, given[name], name) for name, kind in kinds.items()})
    accepted = (("methods", METHODS), ("models", MODELS), ("data", DATASETS), ("tasks", TASKS))
    for key, registry in accepted:
        for name in filter(is_reference, getattr(policy.accepts, key)):
            registry.resolve(name, f"accepts.{key}")  # from here on instructions may name it
    for name in policy.accepts.methods:
        if name not in METHODS:
            raise UserError("accepts.methods", f"names among {', '.join(METHODS)}", repr(name), f"Edit {path}")
    return policy


def write_default_policy(home: Path) -> bool:
    """Write the default policy to a home without a policy; return whether it was written.

    Raises:
        UserError: If the disk is full or cannot be written to.
    """
    path = home / POLICY_FILE
    if path.exists():
        return False
    make_private_folder(home)
    accepts, limits = Accepts(), Limits(epsilon=8.0, delta=1e-5)
    values = {"trust": accepts.trust, "unit": accepts.unit, "epsilon": limits.epsilon, "delta": limits.delta}
    replace_durably(path, POLICY_TEXT.substitute(values, helpers="").encode())
    return True


def _plan(instructions: ClientInstructions, terms: RunTerms) -> PrivacyPlan:
    if has_memory(instructions.method) and not terms.client_memory:
        raise _no("client_memory", "true with a method that has a memory", "false")
    try:
        return terms.plan(instructions.method.bounded.l2_bound)
    except UserError as error:
        raise Refusal(
            "policy", "terms", "privacy terms that can be checked", str(error), "Ask the server's operator"
        ) from None


def _check_examples(instructions: ClientInstructions, plan: PrivacyPlan, adjacency: Adjacency) -> None:
    """Raise a `Refusal` unless gradients are bounded and noised as the terms promise for single examples."""
    asked, record = instructions.example_terms, plan.record
    if asked != (None if record is None else record.terms):
        raise _no("examples", "gradients bounded as in the terms", instructions.examples or "gradients without a bound")
    if record is None:
        if instructions.step_stddev != 0.0:
            raise _no("step_stddev", "no noise on local steps", instructions.step_stddev)
        return
    if not record.terms.declared:
        raise _no("examples", "a public number of examples in the terms (privacy.examples)", "terms without it")
    if record != record_bound(instructions.method, record.terms):
        raise _no("record", "the sensitivity of this method", plan.record)
    if plan.trust_rules.charges_participations and record.restart_weight != 1.0:
        raise _no("method.restart_weight", "1, so that all messages cost the same", record.restart_weight)
    if record.period is not None and adjacency != "replace":
        raise _no("limits.adjacency", "a method with a proof for add-or-remove", method_name(instructions.method))
    needed = plan.noise_stddev if record.route == "steps" else 0.0
    if not abs(instructions.step_stddev - needed) <= _TOLERANCE * needed:
        raise _no("noise", f"a deviation of {needed:g} on every step, as in the terms", f"{instructions.step_stddev:g}")


def _refuse_odd_numbers(instructions: ClientInstructions, terms: RunTerms) -> None:
    """Raise a `Refusal` for numbers that no correct server sends."""
    asked = {"bound": instructions.method.bounded.l2_bound, "round": instructions.round, "client": instructions.client}
    noise = {"noise_stddev": instructions.noise_stddev, "step_stddev": instructions.step_stddev}
    for name, value in {**asdict(terms), **asked, **noise}.items():
        if isinstance(value, int | float) and not 0 <= value < _MAX_NUMBER:
            raise _no(name, "a finite number of at least 0", value)


def _among(where: str, name: str, accepted: tuple[str, ...]) -> None:
    if accepted and name not in accepted:
        raise _no(where, " or ".join(accepted), repr(name))


def _no(where: str, expected: str, got: object) -> Refusal:
    return Refusal("policy", where, expected, got, f"Ask this client's operator, who decides in {POLICY_FILE}")
