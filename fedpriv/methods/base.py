"""The interface of methods: a pure client rule and a pure server rule that act on the last axis."""

from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import TypeVar

from fedpriv.bounding import IN_PLACE, Bounded
from fedpriv.feedback import Feedback, Release
from fedpriv.plugins import Registry
from fedpriv.vectors import ServerState, State, norm

__all__ = [
    "METHODS",
    "AroundMethod",
    "ClientState",
    "ClientStateT",
    "Constrained",
    "ExampleRule",
    "Gradients",
    "LostMemory",
    "Method",
    "OwnSignal",
    "PlainMethod",
    "Row",
    "ServerState",
    "ServerStateT",
    "direction",
    "feedback_of",
    "has_memory",
    "own_signal_of",
    "owns_steps",
    "server_step",
]

ClientState = State
"""A NamedTuple of tensors `[..., any]`, possibly none: engines stack, index and store it for any method."""

ClientStateT = TypeVar("ClientStateT", bound=ClientState, default=Any)
ServerStateT = TypeVar("ServerStateT", bound=ServerState, default=Any)

LostMemory = Literal["reset-one", "reset-all"]
"""The action of a deployment if a client has lost its state; see `Method.lost_memory`."""


class Row(NamedTuple):
    """A method's row in the README's table: message and memory of client i, server rule, and source."""

    message: str
    memory: str = "-"
    server: str = "x -= lr mean"
    source: str = "-"


class Method(Protocol[ClientStateT, ServerStateT]):
    """A frozen dataclass of hyperparameters with the two rules of a paper.

    Its parameters are the NamedTuples of a client's and of the server's state; `Method` alone is one with any states.

    Rules are pure: they use no randomness, input or output, and change no argument. They act on the last axis, so
    `[params]` is one client and `[clients, params]` a cohort.

    Formal guarantee of every method, checked by the contract tests: with `release=None`, the message's l2 norm is at
    most `bounded.l2_bound` for every state and signal. Otherwise the result is `release` of that message, called once.
    """

    row: ClassVar[Row]

    @property
    def bounded(self) -> Bounded:
        """The map that bounds messages."""
        ...

    @property
    def server_lr(self) -> float:
        """`gamma`: the server's step size along the direction that its rule returns."""
        ...

    @property
    def client_part(self) -> "Method[ClientStateT]":
        """The method that clients run, without any server optimizer around it."""
        ...

    @property
    def feedback(self) -> Feedback | None:
        """The client rule as parameters, if it has that form; see `feedback_of`."""
        ...

    @property
    def needs_gradient_scale(self) -> bool:
        """True if signals must be divided by the length of local steps."""
        ...

    @property
    def needs_client_noise(self) -> bool:
        """True if a private run requires noise at the client (trust local)."""
        ...

    @property
    def needs_shared(self) -> bool:
        """True if clients receive a second vector beside the model; see `shared`."""
        ...

    @property
    def corrects_steps(self) -> bool:
        """True if clients correct their local steps with that vector; see `step_offset`."""
        ...

    @property
    def step_prox(self) -> float:
        """The factor of x_t - x_0, their move so far, that clients add to the gradient of each local step; 0 for none.

        Above 0, clients also add `step_offset`, without a vector of the server unless `corrects_steps`.
        """
        ...

    @property
    def lost_memory(self) -> LostMemory:
        """The action of a deployment if a client has lost its state.

        `reset-one`: only that client's state is reset; correct if the server's copy of the lost state fades, or if
        there is none. `reset-all`: the states of all clients and the server's memory are reset, and the model is kept;
        correct if the server's copy would stay forever.
        """
        ...

    def init_client(self, size: int) -> ClientStateT:
        """Return the state of a client that has never taken part; independent of its data. `size` is d."""
        ...

    def init_server(self, model: Tensor) -> ServerStateT:
        """Return the server's state before the first round, from the model `[params]`."""
        ...

    def shared(self, state: ServerStateT) -> Tensor | None:
        """Return the vector `[params]` that clients receive beside the model; None for the model alone.

        Like the model, it depends only on released values. See `needs_shared`.
        """
        ...

    def in_round(self, shared: Tensor) -> "Method[ClientStateT]":
        """Return the method of clients in a round, from the vector that `shared` returned.

        Its messages have the same `bounded.l2_bound`.
        """
        ...

    def step_offset(self, state: ClientStateT, shared: Tensor | None) -> Tensor | None:
        """Return the vector `[..., params]` that a client adds to the gradient of each local step; None for none.

        The signal is still the mean (or the sum) of the gradients without it.

        Args:
            state: The client's state before the round.
            shared: The vector that the server's `shared` returned, `[params]`; None if it returned none.
        """
        ...

    def client_rule(
        self,
        state: ClientStateT,
        signal: Tensor,
        release: Release | None,
        round: int,
    ) -> tuple[Tensor, ClientStateT]:
        """Return the message and the new state.

        Args:
            state: The client's state, fields `[..., any]`.
            signal: Its message without privacy, a gradient or pseudo-gradient, `[..., params]`.
            release: Adds the client's noise to its bounded message `[..., params]` and rounds the result to the grid
                of releases; None if the client adds no noise.
            round: The current round, from 1.
        """
        ...

    def server_rule(
        self, state: ServerStateT, mean_message: Tensor, sampling_prob: float
    ) -> tuple[Tensor, ServerStateT]:
        """Return the direction d `[params]`, against which `server_step` moves the model, and the new state.

        Args:
            state: The server's state.
            mean_message: Sum of the messages, including noise, over the expected cohort size; `[params]`.
            sampling_prob: Expected cohort size over population.

        Returns:
            d, and the state after the round with its model unchanged.
        """
        ...


class PlainMethod:
    """Defaults of a method: clients run it unchanged, and client or server may add the noise."""

    row: ClassVar[Row] = Row("see its file", memory="?", server="?")

    @property
    def client_part(self: Self) -> Self:
        """The method itself."""
        return self

    @property
    def feedback(self) -> Feedback | None:
        """None: the client rule is not given as parameters."""
        return None

    @property
    def needs_client_noise(self) -> bool:
        """False."""
        return False

    @property
    def needs_gradient_scale(self) -> bool:
        """False."""
        return False

    @property
    def needs_shared(self) -> bool:
        """False, unless the method corrects local steps."""
        return self.corrects_steps

    @property
    def corrects_steps(self) -> bool:
        """False."""
        return False

    @property
    def step_prox(self) -> float:
        """0: local steps are those of the local work."""
        return 0.0

    def shared(self, state: Any) -> Tensor | None:
        """Return None: clients receive the model alone."""
        return None

    def in_round(self: Self, shared: Tensor) -> Self:
        """Return the method itself."""
        return self

    def step_offset(self, state: Any, shared: Tensor | None) -> Tensor | None:
        """Return None: local steps are those of the local work."""
        return None


class AroundMethod(Generic[ClientStateT]):
    """Defaults of a method around another: clients keep the same state and steps, and nothing else differs."""

    method: Method[ClientStateT]

    @property
    def server_lr(self) -> float:
        """The method's."""
        return self.method.server_lr

    @property
    def needs_gradient_scale(self) -> bool:
        """The method's."""
        return self.method.needs_gradient_scale

    @property
    def needs_client_noise(self) -> bool:
        """The method's."""
        return self.method.needs_client_noise

    @property
    def corrects_steps(self) -> bool:
        """The method's."""
        return self.method.corrects_steps

    @property
    def step_prox(self) -> float:
        """The method's."""
        return self.method.step_prox

    @property
    def lost_memory(self) -> LostMemory:
        """The method's; state that is added around it holds only released values, and is reset with the server's."""
        return self.method.lost_memory

    def init_client(self, size: int) -> ClientStateT:
        """Return the method's state."""
        return self.method.init_client(size)


class Gradients(Protocol):
    """The gradients of one client in one round, for a method with its own signal.

    With the unit `example`, bounds apply to the gradient of each example, and sums of gradients are divided by the
    client's public number. Otherwise, the client's signal is bounded as if it were the gradient of a single example.
    """

    def mean(self, at: Tensor, clip_norm: float) -> Tensor:
        """Return the mean `[params]` of the gradients at the model `at`, each clipped to `clip_norm`."""
        ...

    def change(self, at: Tensor, before: Tensor, radius: float) -> Tensor:
        """Return the mean `[params]` of the gradients' changes from the model `before` to `at`.

        Each change is divided by `radius`, above 0, and then clipped to 1. Both gradients use the same examples.
        """
        ...


class ExampleRule(NamedTuple):
    """How the bounded gradients of examples enter messages; `fedpriv.privacy.records.RecordBound` has the proofs.

    Args:
        key: The method's parameter that has to be equal to `privacy.example_clip`.
        example_clip: Its value.
        lipschitz: The factor by which a message may move as far as a mean of gradients clipped to `example_clip`.
        clip_norm: See `RecordBound`, as for the other parameters.
        feedback_clip: See `RecordBound`.
        period: See `RecordBound`.
        restart_weight: See `RecordBound`.
    """

    key: str
    example_clip: float
    lipschitz: float = 1.0
    clip_norm: float | None = None
    feedback_clip: float | None = None
    period: int | None = None
    restart_weight: float = 1.0

    @property
    def least(self) -> float:
        """The factor of the part of a message that one example moves least, against a mean of bounded gradients."""
        part = 1.0 if self.clip_norm is None else self.clip_norm / self.example_clip
        return self.lipschitz * part * min(1.0, self.restart_weight)


@runtime_checkable
class OwnSignal(Protocol):
    """A method with a signal of more than one gradient: several bounds of each example, or several models.

    The signal is then several vectors in a row, `[..., vectors * params]`. The client rule takes them, and also a
    single vector `[..., params]`, a signal without the rest; its message has `params` numbers. The state after a round
    contains no noise. Only classes of fedpriv are accounted for the unit `example`, as each has its own proof.
    """

    @property
    def vectors(self) -> int:
        """Number of vectors in a signal, at least 2."""
        ...

    @property
    def needs_everyone(self) -> bool:
        """True if clients need the model of the last round, which only those who took part have."""
        ...

    def own_signal(self, state: Any, model: Tensor, gradients: Gradients, round: int) -> Tensor:
        """Return the signal `[vectors * params]` of a client with this state at the model `[params]`."""
        ...

    @property
    def example_rule(self) -> ExampleRule:
        """The facts by which single examples are accounted."""
        ...


@runtime_checkable
class Constrained(Protocol):
    """A method with a server step that ends in a set of models, which the step along another direction would leave."""

    @property
    def steps_into(self) -> str:
        """The set, in words that follow a preposition."""
        ...


def own_signal_of(method: Method) -> OwnSignal | None:
    """Return the method that clients run if it makes its own signal, otherwise None."""
    method = method.client_part
    return method if isinstance(method, OwnSignal) else None


def owns_steps(method: Method) -> bool:
    """Return True if clients change their local steps by the method: only fedpriv's own training can do that."""
    return method.corrects_steps or method.step_prox > 0.0


def server_step(
    method: Method[Any, ServerStateT], state: ServerStateT, mean_message: Tensor, sampling_prob: float
) -> ServerStateT:
    """Return the server's next state: its rule's new memory, and x <- x - gamma d.

    No other code moves a model. Arguments are those of `Method.server_rule`.
    """
    direction, after = method.server_rule(state, mean_message, sampling_prob)
    if direction.shape != state.model.shape:
        given, expected = list(direction.shape), list(state.model.shape)
        raise ValueError(f"{method}: a direction of shape {given} for a model of {expected}")
    moved = state.model - method.server_lr * direction.to(state.model.dtype)
    return after._replace(model=moved)  # pyright: ignore[reportPrivateUsage]


METHODS: Registry[Method] = Registry(
    "method",
    {
        "alpha-normec": "fedpriv.methods.alpha_normec:AlphaNormEC",
        "fed-alpha-normec": "fedpriv.methods.fed_alpha_normec:FedAlphaNormEC",
        "normalized-sgd": "fedpriv.methods.normalized_sgd:NormalizedSGD",
        "clip21": "fedpriv.methods.clip21:Clip21",
        "clip21-sgd2m": "fedpriv.methods.clip21_sgd2m:Clip21SGD2M",
        "dp-fedavg": "fedpriv.methods.dp_fedavg:DPFedAvg",
        "dp-gd": "fedpriv.methods.dp_gd:DPGD",
        "centered-clip": "fedpriv.methods.centered_clip:CenteredClip",
        "dp-scaffold": "fedpriv.methods.dp_scaffold:DPScaffold",
        "diff2": "fedpriv.methods.difference_estimators:DIFF2",
        "private-spiderboost": "fedpriv.methods.difference_estimators:PrivateSpiderBoost",
        "dice-sgd": "fedpriv.methods.dice_sgd:DiceSGD",
        "fedspeed": "fedpriv.methods.fedspeed:FedSpeed",
        "private-iht": "fedpriv.methods.sparse.private_iht:PrivateIHT",
    },
    protocol=Method,
    group="fedpriv.methods",
)


def damping_of(method: Method) -> float:
    """Return the share of the server's memory that is forgotten each round; 0 without memory, or if it is unknown."""
    rule = feedback_of(method)
    return 0.0 if rule is None or rule.beta is None else rule.damping


def feedback_of(method: Method) -> Feedback | None:
    """Return the method's client rule as parameters, or None if its property `feedback` does not describe it.

    The property is ignored in a class that overrides `client_rule` and inherits `feedback`, and for a bounded map that
    is not exactly one of those with a known equivalent in place, or is not the map that determines the noise.
    """
    method = method.client_part
    for kind in type(method).__mro__:
        if "feedback" in vars(kind):
            found = method.feedback
            if found is None or type(found.bounded) not in IN_PLACE or found.bounded != method.bounded:
                return None
            return found
        if "client_rule" in vars(kind):
            return None
    return None


def has_memory(method: Method) -> bool:
    """Return True if clients keep a state from round to round."""
    return len(method.init_client(0)) > 0


def direction(vector: Tensor) -> Tensor:
    """Return v / ||v||_2 of `[params]`; zero if v is zero."""
    exact = vector.double()
    length = norm(exact)
    return (exact / length).to(vector.dtype) if float(length) > 0.0 else torch.zeros_like(vector)
