"""Division of an app's model into trained and fixed arrays.

A message covers the trained arrays. They form one vector that is bounded, noised and summed. All other arrays are
fixed: every client receives them unchanged, no noise is ever added to them, and no client sends them back.

| array | no declaration | declared `trainable` | declared `frozen` |
|---|---|---|---|
| floating point | trained; see below | trained | fixed |
| integers, booleans | fixed | fixed | fixed |
| statistics of BatchNorm | refused | refused | fixed |
| anything else, such as complex numbers | refused | refused | fixed |

`trainable=` declares all other arrays frozen. Without a declaration, arrays that an app does not train are unknown, and
noise would destroy them. In a private run, a client therefore refuses before its first message if training has left
some arrays, but not all, exactly unchanged.

A client also refuses if its app changes a fixed array. Both refusals depend on the client's data, if only slightly. If
the server is the adversary (trust local), a client therefore does not refuse but writes to its own log, except in a
simulation. A change to a fixed array is then dropped, because no message contains it.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor, nn

from fedpriv.errors import UserError, nearest
from fedpriv.flower.messages import ClientInstructions, ModelArrays

__all__ = ["TRAINED", "Patterns", "TrainedArrays", "check_training", "digest_of", "frozen_arrays"]

TRAINED = "trained"
"""Record of a training message that names the trained arrays."""

Patterns = Sequence[str] | str

_log = logging.getLogger("flwr")

_INTEGERS = ("int", "uint", "bool")
_MAX_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class TrainedArrays:
    """Division of a model's arrays into trained and fixed ones.

    Args:
        names: Names of all arrays, in the model's order.
        trained: Names of the trained ones, in the same order.
        declared: True if the app's developer declared them.
    """

    names: tuple[str, ...]
    trained: tuple[str, ...]
    declared: bool

    @classmethod
    def of_model(
        cls, model: ArrayRecord, trainable: Patterns | None = None, frozen: Patterns | None = None
    ) -> "TrainedArrays":
        """Return the division of a model; see the module for the rule.

        Args:
            model: The initial model.
            trainable: Patterns of the names of trained arrays, such as `head.*`; None for no declaration.
            frozen: Patterns of the names of fixed arrays; give at most one of `trainable` and `frozen`.

        Raises:
            UserError: If both are given, if a pattern matches no array, or if no array can be trained.
        """
        if trainable is not None and frozen is not None:
            raise UserError(
                "trainable, frozen", "at most one of the two", "both", "Remove one of them; it follows from the other"
            )
        integers = {name for name, array in model.items() if array.dtype.startswith(_INTEGERS)}
        if trainable is None:
            trained = set(model) - _matching(model, frozen or (), "frozen") - integers
        else:
            trained = _matching(model, trainable, "trainable") - integers
        named = [name for name in _listed(trainable) if name in integers]
        if named or not set(model) - integers:
            if not model:
                raise UserError(
                    "initial_arrays", "the arrays of a model", "an empty record", "Give ArrayRecord(model.state_dict())"
                )
            name = (named or list(model))[0]
            remedy = "Train parameters only: counters and masks cannot be bounded or noised"
            raise UserError(f"array {name}", "floating point numbers", model[name].dtype, remedy)
        if not trained:
            declared = "trainable" if frozen is None else "frozen"
            raise UserError(
                declared,
                "an array to train",
                "0 arrays",
                f"The model has: {_shown(name for name in model if name not in integers)}",
            )
        return cls(
            names=tuple(model),
            trained=tuple(name for name in model if name in trained),
            declared=trainable is not None or frozen is not None,
        )

    @classmethod
    def of_message(cls, content: RecordDict, model: ArrayRecord) -> "TrainedArrays":
        """Return the division of the model in a training message; all arrays are trained if the message names none.

        Raises:
            UserError: If the message names no arrays, or arrays that the model does not have.
        """
        record = content.config_records.get(TRAINED)
        if record is None:
            return cls(names=tuple(model), trained=tuple(model), declared=True)
        named = record.get("names")
        known = {name for name in named if isinstance(name, str)} if isinstance(named, list) else set()
        if not known or not known <= set(model):
            remedy = "Use one version of fedpriv on both sides"
            raise UserError("message", "names of arrays of its model", _shown(sorted(known - set(model))), remedy)
        trained = tuple(name for name in model if name in known)
        return cls(names=tuple(model), trained=trained, declared=record.get("declared") is True)

    @property
    def fixed(self) -> tuple[str, ...]:
        """Names of the arrays that are not trained, in the model's order."""
        trained = set(self.trained)
        return tuple(name for name in self.names if name not in trained)

    def to_record(self) -> ConfigRecord:
        """Return the record `TRAINED` for clients."""
        return ConfigRecord({"names": list(self.trained), "declared": self.declared})

    def part(self, record: ArrayRecord) -> ArrayRecord:
        """Return the trained arrays of the model, or of an answer, which may omit fixed ones.

        Raises:
            UserError: If `record` does not hold the model's arrays in the model's order.
        """
        if tuple(record) not in (self.names, self.trained):
            raise UserError(
                "model", f"the arrays {_shown(self.names)}", _shown(record), "Send and return the same model"
            )
        return ArrayRecord({name: record[name] for name in self.trained})

    def whole(self, trained: Mapping[str, Array], fixed: Mapping[str, Array]) -> ArrayRecord:
        """Return the model that consists of the given trained and fixed arrays."""
        return ArrayRecord({name: trained[name] if name in trained else fixed[name] for name in self.names})

    def __str__(self) -> str:
        if not self.fixed:
            return f"all arrays of the model: {', '.join(self.names)}"
        return f"{', '.join(self.trained)}. Fixed, and not covered: {', '.join(self.fixed)}"


def check_training(
    arrays: TrainedArrays,
    instructions: ClientInstructions,
    model: ModelArrays,
    fixed: Mapping[str, Array],
    answer: ArrayRecord,
    signal: Tensor,
) -> None:
    """Check that an app trained exactly the arrays that the server names; see the module for the rule.

    Args:
        arrays: The division of the model.
        instructions: Instructions to the client for this round.
        model: Layout of the trained arrays.
        fixed: The fixed arrays, as received.
        answer: Arrays returned by the train function.
        signal: x - x_local of the trained arrays, `[params]`.

    Raises:
        UserError: If a fixed array was changed, or training left some of the trained arrays unchanged, and the refusal
            reveals nothing to an adversary.
    """
    troubles = [_changed(name) for name, array in fixed.items() if name in answer and not _equal(array, answer[name])]
    if instructions.private and not arrays.declared and instructions.last_round == 0:
        troubles += _unchanged(model, signal)
    for trouble in troubles[:1]:
        if instructions.noise_stddev == 0.0 or instructions.diagnostics:
            raise trouble
        _log.error("client %d: %s (This is not reported to the server.)", instructions.client, trouble)


def frozen_arrays(module: nn.Module) -> list[str]:
    """Return the names of the arrays of a module that are not trained: `frozen=frozen_arrays(net)`.

    These are its buffers and the parameters that do not require a gradient.
    """
    trained = {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    return [name for name in module.state_dict() if name not in trained]


def _changed(name: str) -> UserError:
    remedy = "Do not change it in training (set BatchNorm to eval mode), or do not declare it frozen"
    return UserError(f"array {name}", "the values that were sent, since it is fixed", "changed values", remedy)


def _unchanged(model: ModelArrays, signal: Tensor) -> list[UserError]:
    """Return an error if training left some arrays of the signal at zero, but not all."""
    parts = {name: part for name, part in model.layout.unflatten(signal).items() if part.numel()}
    idle = [name for name, part in parts.items() if not bool(part.any())]
    if not idle or len(idle) == len(parts):
        return []
    remedy = (
        "Give the strategy "
        f"frozen=[{idle[0]!r}, ...], since noise would destroy untrained arrays, or trainable='*' if they are trained"
    )
    got = "the exact values that were sent"
    return [UserError(f"arrays {_shown(idle)}", "arrays that training changes", got, remedy)]


def _equal(sent: Array, returned: Array) -> bool:
    """Return whether an app returned an array unchanged, up to a change of its number format."""
    if sent.data == returned.data:
        return True
    before, after = sent.numpy(), returned.numpy()
    floating = np.issubdtype(before.dtype, np.floating) and np.issubdtype(after.dtype, np.floating)
    return np.array_equal(before.astype(after.dtype) if floating else before, after, equal_nan=floating)


def digest_of(arrays: ArrayRecord) -> str:
    """Return the SHA-256 digest of a model's arrays with their names, formats and shapes, in hexadecimal."""
    hashed = hashlib.sha256()
    for name, array in arrays.items():
        hashed.update(repr((name, array.dtype, tuple(array.shape))).encode() + array.data)
    return hashed.hexdigest()


def _matching(names: Iterable[str], patterns: Patterns, argument: str) -> set[str]:
    found: set[str] = set()
    for pattern in _listed(patterns):
        matched = {name for name in names if name == pattern or fnmatchcase(name, pattern)}
        if not matched:
            remedy = nearest(pattern, names)
            raise UserError(argument, "names of arrays, or patterns such as head.*", repr(pattern), remedy)
        found |= matched
    return found


def _listed(patterns: Patterns | None) -> Sequence[str]:
    return (patterns,) if isinstance(patterns, str) else patterns or ()


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MAX_SHOWN} more" if len(listed) > _MAX_SHOWN else ""
    return (", ".join(listed[:_MAX_SHOWN]) or "none") + more
