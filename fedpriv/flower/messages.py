"""Messages between a strategy and its clients.

| message | its records | records of the answer |
|---|---|---|
| question | `fedpriv`: the question | `fedpriv`: a `NodeInfo` |
| training | `arrays`: the model; `config`: the app's; `fedpriv`: `ClientInstructions` | `arrays`: the message; scale |
| training with control variates | also `shared`: a second vector, as arrays | the same |
| training in a deployment | also `terms`: `RunTerms` | the same, or `fedpriv`: a refusal |
| the same with secure aggregation | the same | `masked`: the bytes of a masked message, or a refusal |

In a message with client noise, each coordinate is a multiple of the grid of `fedpriv.mechanisms.noise`. It is sent as
small integers and that scale, in at most half the bytes of float32.

All of them are Flower messages of type `train`: mods see this type, and apps need not register handlers for it.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedpriv.errors import UserError
from fedpriv.experiment.schema import read_table, write_table
from fedpriv.flower.privacy_terms import PrivacyTerms
from fedpriv.mechanisms.shares import HALF_MODULUS, IntegerSums
from fedpriv.methods import (
    METHODS,
    AdaptiveBound,
    Method,
    PrivateMetrics,
    bare,
    message_size,
    side_values_of,
    with_side_values,
)
from fedpriv.privacy.records import ExampleTerms
from fedpriv.rounds import ClientRules
from fedpriv.streams import SeededStreams, SystemStreams
from fedpriv.vectors import Layout, refuse_buffers

__all__ = [
    "ARRAYS",
    "CONFIG",
    "DIAGNOSTICS",
    "FEDPRIV",
    "SHARED",
    "TERMS",
    "ClientInstructions",
    "MessageFormat",
    "ModelArrays",
    "NodeInfo",
    "RunTerms",
    "ask_node_info",
    "asks_node_info",
    "masked_content",
    "masked_of",
    "method_name",
    "printable",
    "refusal_record",
    "refused",
]

ARRAYS = "arrays"
CONFIG = "config"
DIAGNOSTICS = "diagnostics"
FEDPRIV = "fedpriv"
SHARED = "shared"

TERMS = "terms"

# Bytes of the header of an array in NumPy's format, enough for far more dimensions than any model has.
_MAX_HEADER = 1024
# float32 holds all integers up to this one.
_MAX_EXACT = 2**24

_ASK = "ask"
_MASKED = "masked"
_REFUSED = "refused"
_SCALE = "scale"
_WHO = "who are you"
_METHOD = "method."
_SIDE_VALUES = "side values"
_ADAPTIVE, _METRICS = "adaptive.", "metrics."
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class ModelArrays:
    """Conversion between a model vector and an `ArrayRecord`.

    Args:
        layout: Names and shapes.
        dtypes: Number format of each array in messages to clients.
    """

    layout: Layout
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, record: ArrayRecord) -> "ModelArrays":
        """Return the layout of a model.

        Raises:
            UserError: If an array does not hold floating point numbers, or is a buffer of BatchNorm.
        """
        refuse_buffers(name for name in record if name.rsplit(".", 1)[-1] in _BUFFERS)
        for name, array in record.items():
            if not array.dtype.startswith("float"):
                raise UserError(
                    f"array {name}",
                    "floating point numbers",
                    array.dtype,
                    "Send parameters only: counters and masks cannot be bounded or noised",
                )
        entries = tuple((name, tuple(array.shape)) for name, array in record.items())
        return cls(Layout(entries), tuple(array.dtype for array in record.values()))

    def vector(self, record: ArrayRecord, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the vector `[params]` of arrays in this layout.

        Raises:
            UserError: If the arrays have another layout.
        """
        tensors = {name: torch.from_numpy(array.numpy()).to(dtype) for name, array in record.items()}
        return self.layout.flatten(tensors)

    def received(self, content: RecordDict, form: "MessageFormat") -> Tensor:
        """Return the message in an untrusted answer: `[params]`, and side values if the method has some.

        It is float32, or float64 if the number format of the agreement is.

        Args:
            content: The answer.
            form: The number format of the agreement.

        Raises:
            UserError: If the scale, names, shapes, number formats or lengths are not those of a message in this layout.
        """
        record, facts = content.array_records[ARRAYS], content.config_records.get(FEDPRIV, ConfigRecord())
        if facts.get(_SCALE) != form.scale:
            raise _no_message(f"numbers in units of {facts.get(_SCALE)!r}, but the plan has {form.scale!r}")
        entries = (*self.layout.entries, *([(_SIDE_VALUES, (form.beside,))] if form.beside else []))
        if list(record) != [name for name, _ in entries]:
            raise _no_message(f"{len(record)} arrays with other names")
        for (name, shape), array in zip(entries, record.values(), strict=True):
            data = bytes(array.data)
            if (array.dtype, tuple(array.shape), array.stype) != (form.dtype, tuple(shape), "numpy.ndarray"):
                raise _no_message(f"{name} of shape {list(array.shape)[:9]}, {str(array.dtype)[:20]}")
            if len(data) > form.numpy.itemsize * math.prod(shape) + _MAX_HEADER:
                raise _no_message(f"{len(data):,} bytes for {name}")
            file = io.BytesIO(data)
            try:
                read = np.lib.format.read_magic(file) == (1, 0) and np.lib.format.read_array_header_1_0(file)
            except Exception:
                read = False
            if not read or (read[0], read[2]) != (tuple(shape), form.numpy):
                raise _no_message(f"{name} with a wrong header")
        vector = self._whole(record, torch.float64 if form.dtype == "float64" else torch.float32)
        return vector if form.scale is None else vector * form.scale

    def model(self, vector: Tensor) -> ArrayRecord:
        """Return a model `[params]` as arrays in their number formats."""
        return self._record(vector, self.dtypes)

    def question(self, model: Tensor, shared: Tensor | None) -> dict[str, ArrayRecord | ConfigRecord]:
        """Return the records of a model `[params]` and of the vector beside it; see `Broadcast.shared`."""
        beside = {} if shared is None else {SHARED: self._record(shared, ("float32",) * len(self.dtypes))}
        return {ARRAYS: self.model(model), **beside}

    def shared(self, content: RecordDict, method: Method) -> Tensor | None:
        """Return the vector beside the model in a message; None if the method has none.

        Raises:
            UserError: If the method needs it and the message lacks it, the reverse, or it has another length.
        """
        record, remedy = content.array_records.get(SHARED), "Use one version of fedpriv on both sides"
        if (record is not None) != method.needs_shared:
            expected = "a second vector" if method.needs_shared else "the model alone"
            got = ", ".join(content) or "an empty message"
            raise UserError("message", f"{expected} for {method_name(method)}", got, remedy)
        if record is None:
            return None
        side = side_values_of(method)
        size = self.layout.size if side is None else side.shared_size(self.layout.size)
        found = self._whole(record) if size >= self.layout.size else self._beside(record)
        if found.shape != (size,):
            raise UserError("message", f"a second vector of {size:,} numbers", f"{found.numel():,}", remedy)
        return found

    def message(self, vector: Tensor, form: "MessageFormat") -> dict[str, ArrayRecord | ConfigRecord]:
        """Return the records of a message, `[params]` or with side values: float32 arrays, or integers with a scale.

        A message without noise is never rounded again, because rounding could lengthen it beyond its bound.
        """
        if form.scale is None:
            return {ARRAYS: self._record(vector, (form.dtype,) * len(self.dtypes))}
        levels = torch.round(vector.double() / form.scale)
        arrays = self._record(levels, (form.dtype,) * len(self.dtypes))
        return {ARRAYS: arrays, FEDPRIV: ConfigRecord({_SCALE: form.scale})}

    def _record(self, vector: Tensor, dtypes: tuple[str, ...]) -> ArrayRecord:
        """Return a vector as arrays: `[params]`, side values alone, or one after the other."""
        vector, size = vector.detach().cpu(), self.layout.size
        whole, beside = (vector[:0], vector) if len(vector) < size else (vector[:size], vector[size:])
        tensors = self.layout.unflatten(whole) if len(whole) == size else {}
        pairs = zip(tensors.items(), dtypes[: len(tensors)], strict=True)
        arrays = {name: Array(tensor.numpy().astype(dtype)) for (name, tensor), dtype in pairs}
        if len(beside):
            arrays[_SIDE_VALUES] = Array(beside.numpy().astype(dtypes[0]))
        return ArrayRecord(arrays)

    def _whole(self, record: ArrayRecord, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the vector `[params]` of arrays in this layout, followed by side values if there are any."""
        if _SIDE_VALUES not in record:
            return self.vector(record, dtype)
        own = self.vector(ArrayRecord({name: array for name, array in record.items() if name != _SIDE_VALUES}), dtype)
        return torch.cat([own, self._beside(record).to(dtype)])

    @staticmethod
    def _beside(record: ArrayRecord) -> Tensor:
        """Return the side values of a record; nothing if it has none."""
        found = record.get(_SIDE_VALUES)
        return torch.zeros(0) if found is None else torch.from_numpy(found.numpy()).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class MessageFormat:
    """Number format of messages; server and clients derive it from their halves of the agreement.

    Args:
        dtype: Name of the number format of all arrays.
        scale: Value of one unit of an integer array; None for float32.
        beside: Number of side values after the parameters.
    """

    dtype: str = "float32"
    scale: float | None = None
    beside: int = 0

    @classmethod
    def of(cls, rules: ClientRules) -> "MessageFormat":
        """Return float32 for messages without noise, otherwise the smallest integers that hold every message.

        Without noise, messages are float64 if the unit of privacy is `example`: rounding to float32 could exceed the
        part of a single record. Integers of simulated secure aggregation are float64, too. If the noise multiplier is
        too small for any privacy, the levels may exceed 24 bits. The format is then float32, which rounds a message
        that is already released.
        """
        beside = message_size(rules.method, 0)
        if rules.sums is not None or (rules.examples is not None and rules.noise_stddev == 0.0):
            return cls(dtype="float64", beside=beside)
        grid = rules.release_grid
        largest = math.inf if grid is None else rules.message_limit / grid
        fitting = (name for name in ("int8", "int16", "int32") if largest <= min(np.iinfo(name).max, _MAX_EXACT))
        dtype = next(fitting, None)
        return cls(beside=beside) if dtype is None else cls(dtype=dtype, scale=grid, beside=beside)

    @property
    def numpy(self) -> np.dtype:
        """The number format on the wire: little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")


def _no_message(got: str) -> UserError:
    expected = "arrays as in the model, in the number format of the plan"
    return UserError("message", expected, got, "Install this version of fedpriv on the client")


@dataclass(frozen=True, kw_only=True)
class ClientInstructions:
    """Instructions to one client for one round.

    Args:
        method: Method of the client rule.
        round: Current round, from 1.
        client: Id of the client.
        last_round: Last round that summed a message of this client; 0 for none.
        noise_stddev: Standard deviation per coordinate of the noise that the client adds; 0 for none.
        examples: How the gradients of examples are bounded, as text (`ExampleTerms.as_text`); empty unless the unit of
            privacy is `example`.
        step_stddev: See `ClientRules`.
        seed: Seed of the noise in a simulation; None for noise from the client's operating system.
        noise_id: Separates the noise of experiments that share a seed; see `SeededStreams`.
        private: True if nothing but the message may leave the client.
        turn: In simulations, the address of the noise if some rounds are void; 0 for the round.
        grid: In simulations, the grid of integer shares of noise under secure aggregation; 0 for other trusts.
        diagnostics: True if the client reports the norm of its signal, which is not protected: in simulations, and in
            runs without a privacy guarantee.
    """

    method: Method
    round: int
    client: int
    last_round: int = 0
    noise_stddev: float = 0.0
    examples: str = ""
    step_stddev: float = 0.0
    seed: int | None = None
    noise_id: str = ""
    private: bool = True
    turn: int = 0
    grid: float = 0.0
    diagnostics: bool = False

    @property
    def rules(self) -> ClientRules:
        """Client's half of the agreement."""
        streams = SystemStreams() if self.seed is None else SeededStreams(self.seed, self.noise_id)
        return ClientRules(
            method=self.method,
            noise_stddev=self.noise_stddev,
            streams=streams,
            examples=self.example_terms,
            step_stddev=self.step_stddev,
            sums=IntegerSums(grid=self.grid, limit=HALF_MODULUS - 1, least=1) if self.grid else None,
        )

    @property
    def address(self) -> int:
        """The address of the noise, which no other round has."""
        return self.turn or self.round

    @property
    def example_terms(self) -> ExampleTerms | None:
        """How the gradients of examples are bounded; None unless the unit of privacy is `example`.

        Raises:
            UserError: If the text does not say that.
        """
        return ExampleTerms.of_text(self.examples) if self.examples else None

    def to_record(self) -> ConfigRecord:
        """Return the record `fedpriv`, which includes a seed only if there is one."""
        table: dict[str, Any] = {"method": method_name(self.method)}
        table |= _prefixed(_METHOD, bare(self.method))
        if (side := side_values_of(self.method)) is not None:
            table |= _prefixed(_ADAPTIVE, side.adaptive) | _prefixed(_METRICS, side.metrics)
        table |= {key: getattr(self, key) for key in _PLAIN if getattr(self, key) is not None}
        return ConfigRecord(table)

    @classmethod
    def of(cls, content: RecordDict) -> "ClientInstructions":
        """Return the instructions in a message.

        Raises:
            UserError: If the message has no instructions, or this version does not understand them.
        """
        record = content.config_records.get(FEDPRIV)
        if record is None or "method" not in record:
            raise UserError(
                "message",
                f"a record {FEDPRIV!r}",
                f"the records {', '.join(content)}" if content else "an empty message",
                "Use a strategy of fedpriv's `strategies` in the ServerApp",
            )
        known = {"method", *_PLAIN}
        for key in record:  # an app may read the record, and no digest of the order covers other keys
            if key not in known and not key.startswith((_METHOD, _ADAPTIVE, _METRICS)):
                remedy = "Use one version of fedpriv on both sides"
                raise UserError("message", "instructions of this version", f"the key {key[:40]!r}", remedy)
        method = read_table(METHODS.known(record["method"], "method"), _after(_METHOD, record), "method")
        adaptive, metrics = _after(_ADAPTIVE, record), _after(_METRICS, record)
        method = with_side_values(
            method,
            read_table(AdaptiveBound, adaptive, "adaptive") if adaptive else None,
            read_table(PrivateMetrics, metrics, "metrics") if metrics else None,
        )
        plain = {key: record[key] for key in _PLAIN if key in record}
        return read_table(cls, plain, FEDPRIV, method=method)


def _prefixed(prefix: str, instance: object) -> dict[str, Any]:
    """Return the fields of a dataclass by name, after a prefix; nothing for None."""
    return {} if instance is None else {prefix + key: value for key, value in write_table(instance).items()}


def _after(prefix: str, record: ConfigRecord) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}


@dataclass(frozen=True, kw_only=True)
class RunTerms(PrivacyTerms):
    """Terms of a deployment for a client: the state of the run, and the privacy terms.

    A turn is one broadcast with its answers. Turns are numbered from 1 and never repeated. A round of the method is a
    turn that counted. Turns identify messages and the draws of noise, and the client pays for every turn.

    Args:
        run: Unique name of the run, under which the client stores its memory.
        turn: Current turn.
        last_turn: Last turn in which a message of this client counted; 0 for none, and the client restarts.
        epoch: Number of times that all memories were reset.
        digest: Digest of the experiment.
        helpers: Keys of the helpers of secure aggregation for the run, as hexadecimal digits of `HelperKey.to_bytes`.
    """

    run: str
    turn: int
    last_turn: int
    epoch: int
    digest: str
    helpers: tuple[str, ...] = field(default=(), metadata={"absent_by_default": True})

    def to_record(self) -> ConfigRecord:
        """Return the record `terms`."""
        return ConfigRecord(write_table(self))

    @classmethod
    def of(cls, content: RecordDict) -> "RunTerms | None":
        """Return the terms in a message; None for a message of a simulation."""
        record = content.config_records.get(TERMS)
        return None if record is None else read_table(cls, dict(record), TERMS)


def masked_content(content: bytes) -> RecordDict:
    """Return the content of a masked message under secure aggregation."""
    return RecordDict({_MASKED: ConfigRecord({_MASKED: content})})


def masked_of(content: RecordDict) -> bytes:
    """Return the bytes of a masked message in an untrusted answer.

    Raises:
        UserError: If there is none.
    """
    found = content.config_records.get(_MASKED, ConfigRecord()).get(_MASKED)
    if not isinstance(found, bytes):
        raise _no_message("no masked message")
    return found


def refusal_record(kind: str, reason: str) -> RecordDict:
    """Return the content of a refusal: its kind, and one line for people."""
    return RecordDict({FEDPRIV: ConfigRecord({_REFUSED: kind, "reason": reason})})


def refused(content: RecordDict) -> tuple[str, str] | None:
    """Return kind and reason of a refusal; None if the answer is not a refusal."""
    record = content.config_records.get(FEDPRIV)
    if record is None or _REFUSED not in record:
        return None
    return printable(record[_REFUSED]), printable(record.get("reason", "no reason given"))


def printable(text: object, longest: int = 300) -> str:
    """Return untrusted text as one short line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)[: 4 * longest]).split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


_PLAIN = ("round", "client", "last_round", "noise_stddev", "seed", "noise_id", "private", "diagnostics")
_PLAIN += ("examples", "step_stddev", "turn", "grid")


def method_name(method: Method) -> str:
    """Return the method's name in the table of methods, without its server optimizer."""
    return METHODS.name_of(bare(method))


@dataclass(frozen=True)
class NodeInfo:
    """Answer of a node about itself, as its operator has set it.

    Args:
        client: Client id; None if it has none.
        helper: Public identity key of a helper of secure aggregation, in hexadecimal digits; empty for other nodes.
        guarded: True if it has a home with a policy; a client without one only answers in simulations.
    """

    client: int | None
    helper: str = ""
    guarded: bool = False

    def to_content(self) -> RecordDict:
        """Return the content of an answer."""
        known: dict[str, int | str] = {} if self.client is None else {"client": self.client}
        known |= {"helper": self.helper} if self.helper else {}
        known |= {"guarded": True} if self.guarded else {}
        return RecordDict({FEDPRIV: ConfigRecord({**known})})

    @classmethod
    def of_node(cls, node_config: Mapping[str, Any]) -> "NodeInfo":
        """Read it from a node's configuration (`partition-id`, `fedpriv-helper`, `fedpriv-home`).

        Raises:
            UserError: If the id is not a whole number.
        """
        client, home = node_config.get("partition-id"), node_config.get("fedpriv-home")
        try:
            return cls(
                None if client is None else int(client), str(node_config.get("fedpriv-helper", "")), guarded=bool(home)
            )
        except ValueError:
            raise UserError(
                "--node-config partition-id", "a whole number", repr(client), "Set it to a number from 0"
            ) from None

    @classmethod
    def of_answer(cls, content: RecordDict) -> "NodeInfo | None":
        """Read it from the content of an answer; None if the node did not understand the question."""
        record = content.config_records.get(FEDPRIV)
        if record is None or _ASK in record:
            return None
        client, helper = record.get("client"), record.get("helper", "")
        return cls(
            client if type(client) is int else None,
            helper if isinstance(helper, str) else "",
            guarded=record.get("guarded") is True,
        )


def ask_node_info() -> RecordDict:
    """Return the content of the message that asks a node for its `NodeInfo`."""
    return RecordDict({FEDPRIV: ConfigRecord({_ASK: _WHO})})


def asks_node_info(content: RecordDict) -> bool:
    """Return whether a message asks for the `NodeInfo`."""
    record = content.config_records.get(FEDPRIV)
    return record is not None and _ASK in record
