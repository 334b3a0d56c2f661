"""Side values: a few bounded numbers beside a message, in the same noised sum and under the same epsilon.

Two uses, alone or together, around any method of fedpriv that bounds with clip_C or N_alpha:

**Adaptive bounds.** Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially Private Learning with Adaptive Clipping",
arXiv 1905.03871. Clients say whether their message was left as it is, and the server moves the bound to a quantile of
the lengths of signals (of residuals, for methods with memory):

    b_i = 1 if ||u_i|| <= C_k, otherwise 0
    f <- 1/2 + (1 / n) (sum_i (b_i - 1/2) + noise)          C_{k+1} <- C_k exp(-eta (f - quantile))

For N_alpha, C is alpha: at the median, half of the messages are longer than 1/2. Then beta follows as kappa alpha, with
kappa the quotient of the configured beta and alpha, so that residuals still shrink at the same rate.

**Private metrics.** Clients add the loss of the received model on their own examples, capped, and its accuracy. They
leave the client, or its server, only with noise.

A message m with bound B and the values s in [-1, 1] are sent as one vector of length at most 1,

    (w m / B, sqrt(p_1) s_1, ..., sqrt(p_j) s_j)            w = sqrt(1 - p_1 - ... - p_j)

so one noise covers all of it, and the plan, its epsilon and its sensitivity are those of any message with bound 1. The
shares p are shares of the squared noise multiplier: with the multiplier z, the noise on a mean message is
B z / (w n), and that on the fraction f is z / (2 sqrt(p) n). The paper's sigma_b is z / (2 sqrt(p)).

| the paper's letter | here | who keeps it |
|---|---|---|
| C | `SideState.side_bound`; clients receive it | server |
| gamma, eta_C | `quantile`, `rate` | server |
| z_Delta, sigma_b | z / sqrt(1 - p), z / (2 sqrt(p)) with p the `share` | server or client |
| qn | the expected cohort size, never the actual one | server |

Ours, not the paper's: the split by shares instead of by sigma_b; limits on C; alpha; memories, which take the messages
in their own units, so that a changing C leaves them right.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fedpriv.bounding import Bounded, Clip, SmoothedNormalization
from fedpriv.checks import plain_numbers, real_within
from fedpriv.errors import UserError
from fedpriv.feedback import Feedback, Release, RoundedRelease
from fedpriv.methods.base import AroundMethod, ClientState, Method, Row, ServerState, own_signal_of
from fedpriv.vectors import joined, norm, parted

__all__ = [
    "AdaptiveBound",
    "PrivateMetrics",
    "SideState",
    "SideValues",
    "bare",
    "message_size",
    "refuse_for_examples",
    "side_values_of",
    "with_side_values",
]

MAX_MOVE = 1e6
"""The bound stays within this factor of the configured one."""

# Noise may move a fraction by more; the bound then moves by this much.
_MOST = 10.0
# float32 rounds a vector of length 1 by less than this.
_SHRINK = 1.0 - 2.0**-20
# A clipped message is longer than this share of the bound, and one that was left as it is need not be.
_LEFT = 1.0 - 2.0**-20


@dataclass(frozen=True, kw_only=True)
class AdaptiveBound:
    """A bound that follows a quantile; the table `[adaptive]`.

    Args:
        quantile: The share of messages that are to be left as they are; with N_alpha, of those shorter than 1/2.
        rate: eta: the bound moves by at most this share per round.
        share: The share of the squared noise multiplier that the count costs. Its noise is
            z / (2 sqrt(share) times the expected cohort size), as a fraction of the cohort.
    """

    quantile: float = 0.5
    rate: float = 0.2
    share: float = 0.05

    def __post_init__(self) -> None:
        real_within("adaptive.quantile", self.quantile, 0.01, 0.99, "Set it, usually to 0.5")
        real_within("adaptive.rate", self.rate, 1e-3, 2.0, "Set it, usually to 0.2")
        real_within("adaptive.share", self.share, 1e-6, 0.9, "Set it, usually to 0.05")
        plain_numbers(self)


@dataclass(frozen=True, kw_only=True)
class PrivateMetrics:
    """The metrics that clients report with noise.

    Args:
        share: The share of the squared noise multiplier that they cost together.
        max_loss: The largest loss of a client that counts.
        accuracy: True if the task has an accuracy; False for the loss alone.
    """

    share: float
    max_loss: float
    accuracy: bool = True

    def __post_init__(self) -> None:
        real_within("privacy.metrics_share", self.share, 1e-6, 0.9, "Set it, usually to 0.05")
        real_within("privacy.metrics_max_loss", self.max_loss, 1e-6, 1e6, "Set it to the loss of a first model")
        plain_numbers(self)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values, in order."""
        return ("loss", "accuracy") if self.accuracy else ("loss",)

    @property
    def most(self) -> tuple[float, ...]:
        """The largest value of each."""
        return (self.max_loss, 1.0)[: len(self.names)]


class SideState(NamedTuple):
    """The server's state of side values.

    `side_bound` is the bound of the next round `[1]`, and `side_values` are the last released values: the fraction of
    messages that were left as they are, if the bound adapts, and the metrics, if any. NaN before the first round.
    """

    side_bound: Tensor
    side_values: Tensor


@dataclass(frozen=True, kw_only=True)
class _UnitBall:
    """The bound of a message with its side values; `inner` is the map of the method."""

    inner: Bounded

    @property
    def l2_bound(self) -> float:
        return 1.0

    @property
    def lipschitz(self) -> float:
        return self.inner.lipschitz / self.inner.l2_bound

    def __call__(self, vectors: Tensor) -> Tensor:
        return Clip(clip_norm=1.0)(vectors)


class _HasBound(Protocol):
    """A dataclass with a bound that may adapt: clip_norm or alpha, and beta if it has to follow alpha."""

    clip_norm: float
    alpha: float
    beta: float


@dataclass(frozen=True, kw_only=True)
class SideValues(AroundMethod[ClientState]):
    """A method that sends side values with its messages; clients run it as well.

    A signal is `[..., params]`, followed by the client's metrics if `metrics` is given; a message is `[..., params]`,
    followed by the side values.

    Args:
        method: The method, one of fedpriv's, that bounds with clip_C or N_alpha.
        adaptive: How its bound adapts; None for a fixed one.
        metrics: The metrics of clients; None for none.

    Raises:
        UserError: If the method has no such bound, or the shares leave nothing for its messages.
    """

    row: ClassVar[Row] = Row("the method's, with side values", memory="the method's", server="the method's")

    method: Method
    adaptive: AdaptiveBound | None = None
    metrics: PrivateMetrics | None = None

    def __post_init__(self) -> None:
        where = "[adaptive]" if self.adaptive else "privacy.metrics_share"
        own = type(self.method).__module__.partition(".")[0] != __name__.partition(".")[0]
        if own or own_signal_of(self.method) is not None or _bound_key(self.method) is None:
            expected = "a method of fedpriv that bounds one vector with clip_norm or alpha"
            got = type(self.method).__name__
            raise UserError(where, expected, got, "Choose dp-fedavg, clip21, centered-clip or alpha-normec")
        contraction = getattr(self.method, "beta", 0.0) / getattr(self.method, "alpha", 1.0)
        if self.adaptive is not None and _bound_key(self.method) == "alpha" and contraction > 1.0:
            expected = "at most alpha with [adaptive], which keeps beta / alpha: residuals grow above 1"
            raise UserError("method.beta", expected, f"{contraction:g} alpha", "Lower method.beta")
        if not self._weight > 0.1:
            got = f"{sum(self._shares):g}"
            raise UserError(
                "privacy.metrics_share", "shares of at most 0.9, with that of [adaptive]", got, "Lower one of them"
            )

    @property
    def client_part(self) -> "SideValues":
        """The method itself."""
        return self

    @property
    def bounded(self) -> Bounded:
        """The bound 1 of a message with its side values."""
        return _UnitBall(inner=self.method.bounded)

    @property
    def feedback(self) -> Feedback | None:
        """None: engines run `client_rule`."""
        return None

    @property
    def needs_shared(self) -> bool:
        """True if the bound adapts, or the method needs a vector."""
        return self.adaptive is not None or self.method.needs_shared

    @property
    def count(self) -> int:
        """The number of side values."""
        return len(self._shares)

    @property
    def given(self) -> int:
        """The number of values after the signal: the client's metrics."""
        return 0 if self.metrics is None else len(self.metrics.names)

    @property
    def reported(self) -> tuple[str, ...]:
        """The side values in words, for the privacy statement."""
        bit = () if self.adaptive is None else ("whether its message was shortened",)
        return bit + (() if self.metrics is None else tuple(f"its {name}" for name in self.metrics.names))

    def shared_size(self, size: int) -> int:
        """Return the length of the vector that clients receive beside a model of `size`; 0 for none."""
        return (size if self.method.needs_shared else 0) + (self.adaptive is not None)

    def init_server(self, model: Tensor) -> ServerState:
        """Return the method's state, the configured bound, and NaN for the values of no round."""
        return joined(self.method.init_server(model), self._side(model, _bound(self.method)))

    def shared(self, state: ServerState) -> Tensor | None:
        """Return the method's vector, followed by the bound if it adapts."""
        own, side = self._parts(state)
        inner = self.method.shared(own)
        parts = [] if inner is None else [inner]
        parts += [] if self.adaptive is None else [side.side_bound.to(state.model)]
        return torch.cat(parts) if parts else None

    def in_round(self, shared: Tensor) -> "SideValues":
        """Return the method with the round's bound.

        Raises:
            UserError: If the bound is out of range.
        """
        method, size = self.method, len(shared) - (self.adaptive is not None)
        if self.adaptive is not None:
            method = _with_bound(method, float(shared[-1]))
        return replace(self, method=method.in_round(shared[:size]) if size else method)

    def step_offset(self, state: ClientState, shared: Tensor | None) -> Tensor | None:
        """Return the method's."""
        if shared is None or not self.method.needs_shared:
            return self.method.step_offset(state, None)
        return self.method.step_offset(state, shared[: len(shared) - (self.adaptive is not None)])

    def client_rule(
        self, state: ClientState, signal: Tensor, release: Release | None, round: int
    ) -> tuple[Tensor, ClientState]:
        """See `Method.client_rule`."""
        size = signal.shape[-1] - self.given
        sending = _Sending(self, signal[..., size:], release)
        message, after = self.method.client_rule(state, signal[..., :size], sending.inner, round)
        return (sending.joint(message) if release is None else sending.sent), after

    def server_rule(self, state: ServerState, mean_message: Tensor, sampling_prob: float) -> tuple[Tensor, ServerState]:
        """See `Method.server_rule`."""
        own, side = self._parts(state)
        bound, size = float(side.side_bound), len(state.model)
        method = self.method if self.adaptive is None else _with_bound(self.method, bound)
        direction, own = method.server_rule(own, self.unjoined(mean_message[:size], method), sampling_prob)
        values = mean_message[size:].double()
        values = (values / values.new_tensor(self._shares).sqrt() / _SHRINK + 1.0) / 2.0
        if self.adaptive is not None:
            past = min(max(float(values[0]) - self.adaptive.quantile, -_MOST), _MOST)
            moved = bound * math.exp(-self.adaptive.rate * past)
            first = _bound(self.method)
            bound = min(max(moved, first / MAX_MOVE), first * MAX_MOVE)
        most = values.new_tensor(((1.0,) if self.adaptive else ()) + (self.metrics.most if self.metrics else ()))
        return direction, joined(own, SideState(side.side_bound.new_tensor([bound]), (values * most).to(state.model)))

    def released(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the last released values by name: `bound` and `unbounded_fraction`, `client_loss`, `client_accuracy`.

        They are functions of noised sums, and may exceed the range of the value: noise does.

        Args:
            state: The server's state, by the names of its fields, which may be more than those of the method.
        """
        names = [*(["unbounded_fraction"] if self.adaptive else ()), *_metric_names(self.metrics)]
        values = cast(list[float], state["side_values"].tolist())  # pyright: ignore[reportUnknownMemberType]
        found = dict(zip(names, values, strict=True))
        return ({"bound": float(state["side_bound"])} if self.adaptive else {}) | found

    def unjoined(self, message: Tensor, method: Method) -> Tensor:
        """Return the method's part of a message, `[..., params]`, in the method's own units."""
        return message * (method.bounded.l2_bound / (self._weight * _SHRINK))

    def join(self, message: Tensor, values: Tensor) -> Tensor:
        """Return the message `[..., params]` with all side values, of length at most 1.

        Args:
            message: Within the method's bound.
            values: The client's metrics, `[..., metrics]`.
        """
        bound, parts = self.method.bounded.l2_bound, [message * (self._weight * _SHRINK / self.method.bounded.l2_bound)]
        shares = [math.sqrt(share) * _SHRINK for share in self._shares]
        if self.adaptive is not None:
            left = bound / 2.0 if isinstance(self.method.bounded, SmoothedNormalization) else bound * _LEFT
            short = norm(message, dim=-1, keepdim=True, exact=True) <= left
            parts.append(shares[0] * (2.0 * short.to(message) - 1.0))
        if self.metrics is not None:
            most = values.new_tensor(self.metrics.most)
            # A client's loss that is not finite counts as the largest.
            signs = 2.0 * (torch.nan_to_num(values, nan=math.inf) / most).clamp(0.0, 1.0) - 1.0
            parts.append(signs.to(message) * message.new_tensor(shares[-self.given :]))
        return torch.cat(parts, dim=-1)

    @property
    def _shares(self) -> tuple[float, ...]:
        metrics = () if self.metrics is None else (self.metrics.share / self.given,) * self.given
        return ((self.adaptive.share,) if self.adaptive is not None else ()) + metrics

    @property
    def _weight(self) -> float:
        return math.sqrt(max(1.0 - sum(self._shares), 0.0))

    def _side(self, model: Tensor, bound: float) -> SideState:
        return SideState(model.new_tensor([bound]), model.new_full((self.count,), math.nan))

    def _parts(self, state: ServerState) -> tuple[ServerState, SideState]:
        nothing = state.model[:0]
        return parted(state, self.method.init_server(nothing), self._side(nothing, 1.0))


class _Sending:
    """One call of a client rule: joins the side values to the method's message when it is released.

    `sent` is what leaves the client, `[..., params + side values]`, once the method has released its message. The
    method sees its own part of it, in its own units.
    """

    sent: Tensor

    def __init__(self, method: SideValues, values: Tensor, release: Release | None) -> None:
        self._method, self._values, self._release = method, values, release
        self._rounded: Tensor | None = None

    @property
    def inner(self) -> Release | None:
        """The release that the method calls; None without noise."""
        if isinstance(self._release, RoundedRelease):
            step = self._release.step * self._method.unjoined(torch.ones(1), self._method.method).item()
            return RoundedRelease(rounded=self._rounded_part, noised=lambda _: self._send(self._release), step=step)
        return None if self._release is None else self._noised_part

    def joint(self, message: Tensor) -> Tensor:
        """Return the message with its side values."""
        return self._method.join(message, self._values)

    def _noised_part(self, message: Tensor) -> Tensor:
        assert self._release is not None
        self.sent = self._release(self.joint(message))
        return self._own_part(self.sent)

    def _rounded_part(self, message: Tensor) -> Tensor:
        """Round once: a rule rounds before it remembers, and its release would round again."""
        assert isinstance(self._release, RoundedRelease)
        if self._rounded is None:
            self._rounded = self._release.rounded(self.joint(message))
        return self._own_part(self._rounded)

    def _send(self, release: Release | None) -> Tensor:
        assert isinstance(release, RoundedRelease)
        assert self._rounded is not None
        self.sent = release.noised(self._rounded)
        return self._own_part(self.sent)

    def _own_part(self, joint: Tensor) -> Tensor:
        return self._method.unjoined(joint[..., : joint.shape[-1] - self._method.count], self._method.method)


def with_side_values(
    method: Method, adaptive: AdaptiveBound | None = None, metrics: PrivateMetrics | None = None
) -> Method:
    """Return the method with side values; the method itself without any."""
    if adaptive is None and metrics is None:
        return method
    return SideValues(method=method, adaptive=adaptive, metrics=metrics)


def side_values_of(method: Method) -> SideValues | None:
    """Return the side values of a method with or without a server optimizer; None for none."""
    method = method.client_part
    return method if isinstance(method, SideValues) else None


def bare(method: Method) -> Method:
    """Return the method that has a name and hyperparameters, without server optimizer and side values."""
    side = side_values_of(method)
    return method.client_part if side is None else side.method


def refuse_for_examples(method: Method) -> None:
    """Raise UserError for side values if the unit of privacy is one example, which may change each of them completely.

    With noise on local steps (`dp-sgd`), messages get none, and metrics would leave the client without any.
    """
    side = side_values_of(method)
    if side is not None:
        where = "[adaptive]" if side.adaptive is not None else "privacy.metrics_share"
        expected = 'privacy.unit = "client": one example may decide all of a client\'s side values'
        raise UserError(where, expected, '"example"', f"Remove {where}, or change the unit")


def message_size(method: Method, size: int) -> int:
    """Return the length of a message of a method for a model of `size` parameters."""
    side = side_values_of(method)
    return size if side is None else size + side.count


def _metric_names(metrics: PrivateMetrics | None) -> list[str]:
    return [] if metrics is None else [f"client_{name}" for name in metrics.names]


def _bound_key(method: Method) -> str | None:
    """Return the name of the hyperparameter that is the bound; None if there is none."""
    bounded = method.bounded
    kinds: dict[type[Bounded], str] = {Clip: "clip_norm", SmoothedNormalization: "alpha"}
    key = kinds.get(type(bounded))
    return key if key is not None and getattr(method, key, None) == getattr(bounded, key) else None


def _bound(method: Method) -> float:
    return float(getattr(method, str(_bound_key(method))))


def _with_bound(method: Method, bound: float) -> Method:
    """Return the method with another bound; with alpha, beta over alpha stays."""
    changes: dict[str, Any] = {str(_bound_key(method)): bound}
    if "alpha" in changes and hasattr(method, "beta"):
        own = cast(_HasBound, method)
        changes["beta"] = own.beta / own.alpha * bound
    return cast(Method, replace(cast(Any, method), **changes))
