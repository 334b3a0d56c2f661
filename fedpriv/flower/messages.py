"""What travels between a strategy and its clients.

| message | holds | the answer holds |
|---|---|---|
| introduction | `fedpriv`: the question | `fedpriv`: the client's id, if the node knows one |
| training | `arrays`: the model; `config`: the app's; `fedpriv`: an `Order` | `arrays`: the message; its scale |
| training of a deployment | the same, and `terms`: the `Terms` | the same, or `fedpriv`: a refusal |

A message with a client's noise is a multiple of the grid of `fedpriv.mechanisms.noise` in each coordinate. It travels
as small integers and that scale, in at most half the bytes of float32.

Both are Flower messages of type `train`: a mod sees those, and no app has to register anything for them.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedpriv.errors import UserError
from fedpriv.experiment.schema import read_table, write_table
from fedpriv.flower.promise import Promise
from fedpriv.methods import METHODS, Method
from fedpriv.rounds import ClientRules
from fedpriv.streams import SeededStreams, SystemStreams
from fedpriv.vectors import Layout, refuse_buffers

__all__ = [
    "ARRAYS",
    "CONFIG",
    "DIAGNOSTICS",
    "FEDPRIV",
    "TERMS",
    "Introduction",
    "MessageFormat",
    "ModelArrays",
    "Order",
    "Terms",
    "asks_who",
    "introduction",
    "method_name",
    "printable",
    "refusal_record",
    "refused",
]

ARRAYS = "arrays"
CONFIG = "config"
DIAGNOSTICS = "diagnostics"
FEDPRIV = "fedpriv"

TERMS = "terms"

# Of an array in NumPy's own format, with the number of its dimensions far beyond any model's.
_LARGEST_HEADER = 1024
# Largest integer up to which float32 holds all integers.
_MAX_EXACT = 2**24

_ASK = "ask"
_REFUSED = "refused"
_SCALE = "scale"
_WHO = "who are you"
_METHOD = "method."
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class ModelArrays:
    """How a model lies in an `ArrayRecord`, and back.

    Args:
        layout: Names and shapes.
        dtypes: Number format of each array, which the clients get back.
    """

    layout: Layout
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, record: ArrayRecord) -> "ModelArrays":
        """The layout of a model.

        Raises:
            UserError: If an array is not of floating point numbers or is a buffer of BatchNorm.
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

    def vector(self, record: ArrayRecord) -> Tensor:
        """The float32 vector `[params]` of arrays in this layout; a `UserError` if they are in another."""
        tensors = {name: torch.from_numpy(array.numpy()).float() for name, array in record.items()}
        return self.layout.flatten(tensors)

    def received(self, content: RecordDict, form: "MessageFormat") -> Tensor:
        """Return the message `[params]`, float32, in an answer that need not be trusted.

        Args:
            content: The answer.
            form: The number format that the agreement asks for.

        Raises:
            UserError: If the scale, names, shapes, number formats or lengths are not those of a message in this layout.
        """
        record, facts = content.array_records[ARRAYS], content.config_records.get(FEDPRIV, ConfigRecord())
        if facts.get(_SCALE) != form.scale:
            raise _no_message(f"numbers in units of {facts.get(_SCALE)!r}, where the plan says {form.scale!r}")
        if list(record) != [name for name, _ in self.layout.entries]:
            raise _no_message(f"{len(record)} arrays of other names")
        for (name, shape), array in zip(self.layout.entries, record.values(), strict=True):
            data = bytes(array.data)
            if (array.dtype, tuple(array.shape), array.stype) != (form.dtype, tuple(shape), "numpy.ndarray"):
                raise _no_message(f"{name} of shape {list(array.shape)[:9]}, {str(array.dtype)[:20]}")
            if len(data) > form.numpy.itemsize * math.prod(shape) + _LARGEST_HEADER:
                raise _no_message(f"{len(data):,} bytes for {name}")
            file = io.BytesIO(data)
            try:
                read = np.lib.format.read_magic(file) == (1, 0) and np.lib.format.read_array_header_1_0(file)
            except Exception:
                read = False
            if not read or (read[0], read[2]) != (tuple(shape), form.numpy):
                raise _no_message(f"{name} that is not what it says")
        vector = self.vector(record)
        return vector if form.scale is None else vector * form.scale

    def model(self, vector: Tensor) -> ArrayRecord:
        """A model `[params]` as arrays, each in its own number format."""
        return self._record(vector, self.dtypes)

    def message(self, vector: Tensor, form: "MessageFormat") -> dict[str, ArrayRecord | ConfigRecord]:
        """Return the records of a message `[params]`: float32 arrays, or integers with their scale.

        Another rounding of a message without noise could lengthen it beyond its bound.
        """
        if form.scale is None:
            return {ARRAYS: self._record(vector, (form.dtype,) * len(self.dtypes))}
        levels = torch.round(vector.double() / form.scale)
        arrays = self._record(levels, (form.dtype,) * len(self.dtypes))
        return {ARRAYS: arrays, FEDPRIV: ConfigRecord({_SCALE: form.scale})}

    def _record(self, vector: Tensor, dtypes: tuple[str, ...]) -> ArrayRecord:
        tensors = self.layout.unflatten(vector.detach().cpu())
        pairs = zip(tensors.items(), dtypes, strict=True)
        return ArrayRecord({name: Array(tensor.numpy().astype(dtype)) for (name, tensor), dtype in pairs})


@dataclass(frozen=True, kw_only=True)
class MessageFormat:
    """Number format in which messages travel; both sides derive it from their own half of the agreement.

    Args:
        dtype: Name of the number format of all arrays.
        scale: Value of one unit of an integer array; None for float32.
    """

    dtype: str = "float32"
    scale: float | None = None

    @classmethod
    def of(cls, rules: ClientRules) -> "MessageFormat":
        """Return float32 for messages without noise, otherwise the smallest integers that hold every message.

        With a multiplier of noise so small that nothing can be promised, levels need not fit into 24 bits: float32
        then rounds what is already released.
        """
        grid = rules.release_grid
        largest = math.inf if grid is None else rules.message_limit / grid
        fitting = (name for name in ("int8", "int16", "int32") if largest <= min(np.iinfo(name).max, _MAX_EXACT))
        dtype = next(fitting, None)
        return cls() if dtype is None else cls(dtype=dtype, scale=grid)

    @property
    def numpy(self) -> np.dtype:
        """The number format on the wire: little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")


def _no_message(got: str) -> UserError:
    expected = "arrays as in the model, in the number format of the plan"
    return UserError("message", expected, got, "Its client does not run this version")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What one client is told about its part in one round.

    Args:
        method: Whose client rule it follows.
        round: The current round, from 1.
        client: Its id.
        last_round: The last round whose message of this client was summed; 0: none.
        noise_stddev: Standard deviation per coordinate of the noise that it adds; 0 for none.
        seed: Where its noise comes from in a simulation; None: from its own operating system.
        noise_id: Keeps the noise of different experiments with one seed apart; see `SeededStreams`.
        private: Whether anything but the message may leave the client.
        diagnostics: Whether it reports the norm of its signal, which is not protected: in simulations, and in runs that
            promise nothing.
    """

    method: Method
    round: int
    client: int
    last_round: int = 0
    noise_stddev: float = 0.0
    seed: int | None = None
    noise_id: str = ""
    private: bool = True
    diagnostics: bool = False

    @property
    def rules(self) -> ClientRules:
        """The client's half of the agreement."""
        streams = SystemStreams() if self.seed is None else SeededStreams(self.seed, self.noise_id)
        return ClientRules(method=self.method, noise_stddev=self.noise_stddev, streams=streams)

    def to_record(self) -> ConfigRecord:
        """As the record `fedpriv`; the seed is in it only if there is one."""
        table: dict[str, Any] = {"method": method_name(self.method)}
        table |= {_METHOD + key: value for key, value in write_table(self.method).items()}
        table |= {key: getattr(self, key) for key in _PLAIN if getattr(self, key) is not None}
        return ConfigRecord(table)

    @classmethod
    def of(cls, content: RecordDict) -> "Order":
        """The order in a message.

        Raises:
            UserError: If the message holds none, or one that this version does not understand.
        """
        record = content.config_records.get(FEDPRIV)
        if record is None or "method" not in record:
            raise UserError(
                "message",
                f"a record {FEDPRIV!r}",
                f"the records {', '.join(content) or 'none'}",
                "Use a strategy of fedpriv's `strategies` in the ServerApp",
            )
        hyperparameters = {k.removeprefix(_METHOD): v for k, v in record.items() if k.startswith(_METHOD)}
        method = read_table(METHODS.known(record["method"], "method"), hyperparameters, "method")
        plain = {key: record[key] for key in _PLAIN if key in record}
        return read_table(cls, plain, FEDPRIV, method=method)


@dataclass(frozen=True, kw_only=True)
class Terms(Promise):
    """What a deployment tells a client besides its order: where both stand, and the promise.

    A turn is one broadcast with its answers, numbered from 1 and never repeated; a round of the method is a turn that
    counted. Messages are told apart by turns, noise is drawn by turns, and every turn is paid for.

    Args:
        run: The run's own name, which no other run has; the client's memory is kept under it.
        turn: The current turn.
        last_turn: The last turn whose message of this client counted; 0: none, and the client starts afresh.
        epoch: How often all memories were started anew.
        digest: The experiment.
    """

    run: str
    turn: int
    last_turn: int
    epoch: int
    digest: str

    def to_record(self) -> ConfigRecord:
        """As the record `terms`."""
        return ConfigRecord(write_table(self))

    @classmethod
    def of(cls, content: RecordDict) -> "Terms | None":
        """The terms in a message; None in one of a simulation."""
        record = content.config_records.get(TERMS)
        return None if record is None else read_table(cls, dict(record), TERMS)


def refusal_record(kind: str, reason: str) -> RecordDict:
    """The content of an answer that says no: what for, and one line for people."""
    return RecordDict({FEDPRIV: ConfigRecord({_REFUSED: kind, "reason": reason})})


def refused(content: RecordDict) -> tuple[str, str] | None:
    """Kind and reason if an answer says no."""
    record = content.config_records.get(FEDPRIV)
    if record is None or _REFUSED not in record:
        return None
    return printable(record[_REFUSED]), printable(record.get("reason", "no reason given"))


def printable(text: object, longest: int = 300) -> str:
    """One short line of something that somebody else wrote."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)[: 4 * longest]).split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


_PLAIN = ("round", "client", "last_round", "noise_stddev", "seed", "noise_id", "private", "diagnostics")


def method_name(method: Method) -> str:
    """The method's name in the table of methods, whatever optimiser its server has."""
    return METHODS.name_of(method.client_part)


@dataclass(frozen=True)
class Introduction:
    """What a node says of itself: the client id that its operator gave it; None if none was given."""

    client: int | None

    def to_content(self) -> RecordDict:
        """As the content of an answer."""
        return RecordDict({FEDPRIV: ConfigRecord({} if self.client is None else {"client": self.client})})

    @classmethod
    def of_node(cls, node_config: Mapping[str, Any]) -> "Introduction":
        """From a node's configuration (`partition-id`).

        Raises:
            UserError: If the id is not a whole number.
        """
        client = node_config.get("partition-id")
        try:
            return cls(None if client is None else int(client))
        except ValueError:
            raise UserError(
                "--node-config partition-id", "a whole number", repr(client), "Start the node with a number from 0"
            ) from None

    @classmethod
    def of_answer(cls, content: RecordDict) -> "Introduction | None":
        """From the content of an answer; None if whoever answered does not know the question."""
        record = content.config_records.get(FEDPRIV)
        if record is None or _ASK in record:
            return None
        client = record.get("client")
        return cls(client if type(client) is int else None)


def introduction() -> RecordDict:
    """The content of the question who a node is."""
    return RecordDict({FEDPRIV: ConfigRecord({_ASK: _WHO})})


def asks_who(content: RecordDict) -> bool:
    """Whether a message is that question."""
    record = content.config_records.get(FEDPRIV)
    return record is not None and _ASK in record
