"""What a method is: a client rule and a server rule that act on the last axis, and pure."""

from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from fedpriv.bounding import IN_PLACE, Bounded
from fedpriv.feedback import Feedback, Release
from fedpriv.plugins import Registry
from fedpriv.vectors import norm

__all__ = [
    "METHODS",
    "ClientState",
    "Method",
    "PlainMethod",
    "Row",
    "ServerState",
    "direction",
    "feedback_of",
    "has_memory",
    "server_step",
]


# A NamedTuple of tensors `[..., any]`, possibly none: engines stack, index and store it without knowing the method.
ClientState = Any

# A NamedTuple of vectors `[params]`, or figures `[1]`, whose field `model` is the model x.
ServerState = Any


class Row(NamedTuple):
    """A method's row in the README's table: what client i sends and remembers, what the server does, whose it is."""

    message: str
    memory: str = "-"
    server: str = "x -= lr mean"
    source: str = "-"


class Method(Protocol):
    """A frozen dataclass of hyperparameters with the two rules of a paper.

    Rules are pure: no randomness, no input or output, no change of an argument. They act on the last axis, so
    `[params]` is one client and `[clients, params]` a cohort.

    Formal guarantee that every method gives and the contract tests check: with `release=None` the message's l2 norm
    is at most `bounded.l2_bound` for every state and signal, and otherwise the message is `release` of that message,
    called once.
    """

    row: ClassVar[Row]

    @property
    def bounded(self) -> Bounded:
        """The map that bounds what is sent."""
        ...

    @property
    def server_lr(self) -> float:
        """gamma: how far the server steps along the direction that its rule gives."""
        ...

    @property
    def client_part(self) -> "Method":
        """What clients run of it: itself, or the method within that a server optimiser is put around."""
        ...

    @property
    def feedback(self) -> Feedback | None:
        """The client rule as figures, if it is of that form; see `feedback_of`."""
        ...

    @property
    def needs_gradient_scale(self) -> bool:
        """Whether the length of local steps has to be taken out of a signal."""
        ...

    @property
    def needs_client_noise(self) -> bool:
        """Whether a private run is only right with noise at the client (trust local)."""
        ...

    @property
    def lost_memory(self) -> Literal["start-afresh", "re-base"]:
        """What a deployment does when a client has lost its state.

        start-afresh: the client alone begins anew; right where what the server holds of the lost state fades, or where
        there is none. re-base: all clients and the server's memory begin anew, and the model stays; right where it
        would stay for ever.
        """
        ...

    def init_client(self, size: int) -> ClientState:
        """The state of a client that never took part; independent of its data. `size` is d."""
        ...

    def init_server(self, model: Tensor) -> ServerState:
        """The server's state before the first round, from the model `[params]`."""
        ...

    def client_rule(
        self,
        state: ClientState,
        signal: Tensor,
        release: Release | None,
        round: int,
    ) -> tuple[Tensor, ClientState]:
        """Return the message and the new state.

        Args:
            state: What the client kept, fields `[..., any]`.
            signal: What it would send without privacy, a gradient or pseudo-gradient, `[..., params]`.
            release: Adds the client's noise to its bounded message `[..., params]`, rounded to the grid on which
                messages are released; None if the client adds none.
            round: The current round, from 1.
        """
        ...

    def server_rule(self, state: ServerState, mean_message: Tensor, sampling_prob: float) -> tuple[Tensor, ServerState]:
        """Return the direction d `[params]`, against which `server_step` moves the model, and the new state.

        Args:
            state: The server's state.
            mean_message: Sum of the messages, noise included, over the expected cohort size; `[params]`.
            sampling_prob: Expected cohort size over population.

        Returns:
            d, and the state after the round but for its model, which is left as it is.
        """
        ...


class PlainMethod:
    """What a method says of itself unless it says otherwise: clients run it as it is, whoever adds the noise."""

    row: ClassVar[Row] = Row("see its file", memory="?", server="?")

    @property
    def client_part(self: Self) -> Self:
        """The method itself."""
        return self

    @property
    def feedback(self) -> Feedback | None:
        """The client rule is no figures."""
        return None

    @property
    def needs_client_noise(self) -> bool:
        """No."""
        return False

    @property
    def needs_gradient_scale(self) -> bool:
        """No."""
        return False


def server_step(method: Method, state: ServerState, mean_message: Tensor, sampling_prob: float) -> ServerState:
    """The server's next state: what its rule remembers, and x <- x - gamma d.

    Nothing else moves a model. Arguments are those of `Method.server_rule`.
    """
    direction, after = method.server_rule(state, mean_message, sampling_prob)
    if direction.shape != state.model.shape:
        given, expected = list(direction.shape), list(state.model.shape)
        raise ValueError(f"{method}: a direction of shape {given} for a model of {expected}")
    return after._replace(model=state.model - method.server_lr * direction.to(state.model.dtype))


METHODS: Registry[Method] = Registry(
    "method",
    {
        "alpha-normec": "fedpriv.methods.alpha_normec:AlphaNormEC",
        "fed-alpha-normec": "fedpriv.methods.fed_alpha_normec:FedAlphaNormEC",
        "normalized-sgd": "fedpriv.methods.normalized_sgd:NormalizedSGD",
        "clip21": "fedpriv.methods.clip21:Clip21",
        "dp-fedavg": "fedpriv.methods.dp_fedavg:DPFedAvg",
    },
    protocol=Method,
    group="fedpriv.methods",
)


def feedback_of(method: Method) -> Feedback | None:
    """The method's client rule as figures, if it is of that form and says so in a property `feedback`.

    A class that changes `client_rule` and inherits `feedback` does not say so; nor does one whose bounded map is not
    exactly one of those that are known to be the same in place, or is not the map that its noise is for.
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
    """Whether clients keep anything from round to round."""
    return bool(method.init_client(0)._fields)


def direction(vector: Tensor) -> Tensor:
    """v / ||v||_2 of `[params]`; zero where v is zero."""
    exact = vector.double()
    length = norm(exact)
    return (exact / length).to(vector.dtype) if float(length) > 0.0 else torch.zeros_like(vector)
