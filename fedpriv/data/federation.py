"""A federation: a data set and the assignment of its training examples to clients."""

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from fedpriv.data.dataset import Dataset
from fedpriv.data.mapped import mapped
from fedpriv.data.partitions import (
    Dirichlet,
    LabelShards,
    Natural,
    Partition,
    Resampled,
    given_clients,
    mean_total_variation,
)
from fedpriv.data.shifts import Shift
from fedpriv.errors import UserError, naming, require_extra
from fedpriv.streams import Purpose, SeededStreams

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

__all__ = [
    "Federation",
    "Holders",
    "ResampledFederation",
    "federate",
    "plot_who_holds_what",
    "shifted",
    "spread",
    "who_holds_what",
]

PALETTE = (
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#117733",
    "#999933",
    "#DDCC77",
    "#CC6677",
    "#882255",
    "#AA4499",
    "#BBBBBB",
)
"""Paul Tol's muted scheme, suitable for color-blind readers."""

# Bytes that are hashed at once.
_BLOCK = 2**24


@dataclass(frozen=True, kw_only=True, eq=False)
class Federation:
    """A data set divided among clients: client i holds the training rows `rows[offsets[i]:offsets[i + 1]]`.

    Args:
        dataset: The examples.
        offsets: int64 `[clients + 1]`, ascending from 0 to the number of rows. A client without rows sends zeros.
        rows: int64 `[held]`, disjoint rows of the training examples.

    Raises:
        UserError: If no client holds an example, or an example has two owners or does not exist.
    """

    dataset: Dataset
    offsets: np.ndarray
    rows: np.ndarray

    def __post_init__(self) -> None:
        if len(self.offsets) < 2 or self.offsets[0] != 0 or self.offsets[-1] != len(self.rows):
            raise _wrong("offsets from 0 to the number of rows")
        if (self.sizes < 0).any() or not len(self.rows):
            raise _wrong("ascending offsets, and a client with an example")
        if self.rows.min() < 0 or np.bincount(self.rows).max() > 1 or self.rows.max() >= self.dataset.examples:
            raise _wrong("rows of the training examples, each at most once")

    @property
    def population(self) -> int:
        """Number of clients."""
        return len(self.offsets) - 1

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of examples of each client, int64 `[clients]`."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of every example and of the assignment, as 64 hexadecimal digits.

        Arrays in memory count as they are after loading, scaling and holding out. Of inputs on the disk, the whole file
        counts; it is read in blocks, once per process unless it changes.
        """
        return _checksum(self.dataset, self.offsets, self.rows)

    def rows_of(self, client: int) -> np.ndarray:
        """Return the training rows of `client`, int64 `[size]`, ascending.

        Raises:
            IndexError: If there is no such client.
        """
        _check_client(client, self.population)
        return self.rows[self.offsets[client] : self.offsets[client + 1]]

    def label_counts(self) -> np.ndarray:
        """Return the number of examples of each label at each client, int64 `[clients, classes]`.

        Labels that are not classes count as one.
        """
        if self.dataset.kind != "classes":
            return self.sizes[:, None]
        classes = self.dataset.classes
        holder = np.repeat(np.arange(self.population), self.sizes)
        cells = holder * classes + self.dataset.train_labels.numpy()[self.rows]
        return np.bincount(cells, minlength=self.population * classes).reshape(-1, classes)


# Drawing the rows of a client takes longer than the gradient of a small model.
_recent_rows = lru_cache(maxsize=2**16)(Resampled.rows_of)
_MAX_KEPT_EXAMPLES = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class ResampledFederation:
    """Clients that draw their examples with replacement; needs no memory per client.

    Args:
        dataset: The examples.
        population: Number of clients.
        partition: The number of draws per client.
        seed: The seed of all draws.
    """

    dataset: Dataset
    population: int
    partition: Resampled
    seed: int

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of examples of each client, int64 `[clients]`: a broadcast view of one number."""
        return np.broadcast_to(np.int64(self.partition.examples), (self.population,))

    @cached_property
    def fingerprint(self) -> str:
        """See `Federation.fingerprint`."""
        return _checksum(self.dataset, np.array([self.population, self.partition.examples, self.seed]))

    def rows_of(self, client: int) -> np.ndarray:
        """Return the training rows of `client`, int64 `[size]`, ascending, with repetitions.

        Raises:
            IndexError: If there is no such client.
        """
        _check_client(client, self.population)
        draw = _recent_rows if self.partition.examples <= _MAX_KEPT_EXAMPLES else Resampled.rows_of
        return draw(self.partition, client, self.dataset.examples, self.seed)

    def label_counts(self) -> np.ndarray:
        """Return the number of examples of each label at each client, int64 `[clients, classes]`."""
        if self.dataset.kind != "classes":
            return self.sizes[:, None]
        labels, classes = self.dataset.train_labels.numpy(), self.dataset.classes
        counts = (np.bincount(labels[self.rows_of(c)], minlength=classes) for c in range(self.population))
        return np.fromiter(counts, dtype=(np.int64, classes), count=self.population)


def _check_client(client: int, population: int) -> None:
    if not 0 <= client < population:
        raise IndexError(f"client {client} of a population of {population}")


def _checksum(dataset: Dataset, *assignment: np.ndarray) -> str:
    found = hashlib.sha256()
    parts = ("train_inputs", "train_labels", "test_inputs", "test_labels", "validation_inputs", "validation_labels")
    named = [(name, getattr(dataset, name)) for name in parts]
    for name, held in (*named, *(("assignment", array) for array in assignment)):
        on_disk = mapped(held)
        if on_disk is not None:
            file, arrays = on_disk.parts
            state = Path(file).stat()  # these numbers change if the file is written again
            content = _checksum_of_file(file, state.st_size, state.st_mtime_ns, state.st_ino)
            found.update(f"{name} {content} ".encode())
        else:
            arrays = () if held is None else (held if isinstance(held, np.ndarray) else held.cpu().numpy(),)
        for array in arrays:
            found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            for block in _blocks(array):
                found.update(block.data)
    return found.hexdigest()


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Return contiguous pieces of an array of at least one axis."""
    rows = max(_BLOCK // max(array[:1].nbytes, 1), 1)
    return (np.ascontiguousarray(array[at : at + rows]) for at in range(0, len(array), rows))


@lru_cache(maxsize=64)
def _checksum_of_file(file: str, size: int, written: int, inode: int) -> str:
    del size, written, inode
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


Holders = Federation | ResampledFederation
"""A data set and the examples of each client."""


def spread(dataset: Dataset, partition: Partition, clients: int | None, rng: np.random.Generator) -> Holders:
    """Distribute a data set among clients by any rule; see `federate` for rules that divide it."""
    if not isinstance(partition, Resampled):
        return federate(dataset, partition, clients, rng)
    population, seed = given_clients(clients), int(rng.integers(2**63))
    return ResampledFederation(dataset=dataset, population=population, partition=partition, seed=seed)


def federate(dataset: Dataset, partition: Partition, clients: int | None, rng: np.random.Generator) -> Federation:
    """Divide a data set among clients by `partition`.

    Args:
        dataset: The examples.
        partition: The rule.
        clients: Number of clients; None is allowed for natural clients only, and means all of them.
        rng: The only source of randomness.

    Raises:
        UserError: If the rule does not suit this number of clients; see `Partition.split`.
    """
    if isinstance(partition, Natural):
        parts = partition.split_among(dataset.groups, dataset.natural_population, clients)
    else:
        if dataset.kind != "classes" and isinstance(partition, Dirichlet | LabelShards):
            got = f"{type(partition).__name__} with labels that are {dataset.kind}"
            raise UserError("data.partition", "a partition without classes", got, "Choose iid, natural or another one")
        parts = partition.split(dataset.train_labels.numpy(), dataset.groups, clients, rng)
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return Federation(dataset=dataset, offsets=offsets, rows=np.concatenate(parts))


def who_holds_what(federation: Holders) -> "pd.DataFrame":
    """Return one row per client: `client`, `examples`, and the count of each label: `label_0`, `label_1`, ..."""
    import pandas as pd

    counts = federation.label_counts()
    table = {"client": np.arange(federation.population), "examples": federation.sizes}
    return pd.DataFrame(table | {f"label_{label}": counts[:, label] for label in range(counts.shape[1])})


def plot_who_holds_what(federation: Holders, path: Path | BinaryIO, *, partition: str = "") -> None:
    """Plot each client's labels to `path`; the suffix decides the format, PNG by default.

    Up to 100 clients and 10 labels are stacked bars. More are a heat map of clients, sorted by main label, and a
    histogram of their sizes.

    Args:
        federation: The federation to show. Not private: the plot shows counts of single clients.
        path: The file, in an existing folder; or an open file.
        partition: Name of the partition, for the title.

    Raises:
        UserError: If the plotting packages are not installed.
    """
    require_extra("the plot of clients' labels", "report")
    from matplotlib.figure import Figure

    counts = federation.label_counts()
    figure = Figure(figsize=(10, 5.5), dpi=150)
    figure.suptitle(_title(federation, counts, partition), fontsize=12)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    few = len(counts) <= 100 and counts.shape[1] <= len(PALETTE)
    (_draw_bars if few else _draw_heat_map)(figure, counts)
    with naming(path) if isinstance(path, Path) else nullcontext():
        figure.savefig(path)


def _wrong(expected: str) -> UserError:
    return UserError("federation", expected, "arrays that break this rule", "Create it with federate(...)")


def _title(federation: Holders, counts: np.ndarray, partition: str) -> str:
    what = " · ".join(part for part in (federation.dataset.name, partition) if part)
    clients = f"{federation.population:,} client{'s' if federation.population > 1 else ''}"
    return f"{what} · {clients} · mean total variation of labels {mean_total_variation(counts):.2f}"


def _draw_bars(figure: "Figure", counts: np.ndarray) -> None:
    axes = figure.add_subplot()
    clients, bottom = np.arange(len(counts)), np.zeros(len(counts))
    for label, held in enumerate(counts.T):
        axes.bar(clients, held, 0.85, bottom, color=PALETTE[label], label=str(label))
        bottom += held
    axes.set(xlabel="client", ylabel="training examples", xlim=(-0.6, len(counts) - 0.4))
    axes.xaxis.set_major_locator(_whole_ticks(12))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], title="label", loc="outside right center", frameon=False)


def _draw_heat_map(figure: "Figure", counts: np.ndarray) -> None:
    shares, sizes = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), counts.sum(axis=1)
    order = np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))
    left, right = figure.subplots(1, 2, width_ratios=(5, 2))
    image = left.imshow(shares[order].T, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    left.set(xlabel="clients, sorted by main label", ylabel="label")
    if counts.shape[1] <= 20:
        left.set_yticks(range(counts.shape[1]))
    left.xaxis.set_major_formatter("{x:,.0f}")
    figure.colorbar(image, ax=left, label="share of the client's examples", pad=0.02)
    right.hist(sizes, bins=_whole_bins(sizes), color=PALETTE[0])
    right.set(xlabel="training examples of a client", ylabel="number of clients")
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.xaxis.set_major_locator(_whole_ticks(4))
    right.spines[["top", "right"]].set_visible(False)


def _whole_ticks(maximum: int) -> "MaxNLocator":
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(maximum, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def _whole_bins(sizes: np.ndarray) -> np.ndarray:
    """Return the edges of at most 40 bins that each hold the same number of whole numbers."""
    step = -(-int(np.ptp(sizes) + 1) // 40)
    return np.arange(sizes.min(), sizes.max() + step + 1, step) - 0.5


def shifted(federation: Holders, shift: Shift, streams: SeededStreams) -> Federation:
    """Return the federation with each client's training inputs shifted, and its data set in the clients' order.

    Examples without an owner are left out. Needs memory for one more copy of the training inputs, temporarily.

    Args:
        federation: The clients' examples.
        shift: The transformation of each client's inputs.
        streams: The source of the clients' draws.

    Raises:
        UserError: If clients share examples, or the shift is undefined for such inputs.
    """
    if not isinstance(federation, Federation):
        remedy = "Choose another data.partition, or remove data.shift"
        raise UserError("data.shift", "a partition that assigns each example to one client", "'resampled'", remedy)
    dataset, rows = federation.dataset, torch.from_numpy(federation.rows)
    if mapped(dataset.train_inputs) is not None:
        remedy = "Remove data.shift, or choose data that fit in memory"
        raise UserError("data.shift", "inputs in memory", "inputs in a mapped file", remedy)
    shift.check(dataset.input_shape)
    inputs = torch.empty(len(rows), *dataset.input_shape)
    for client in range(federation.population):
        own = slice(*federation.offsets[client : client + 2].tolist())
        rng = streams.source(Purpose.SHIFT, client=client).rng
        inputs[own] = shift.apply(dataset.train_inputs[rows[own]], rng)
    moved = replace(dataset, train_inputs=inputs, train_labels=dataset.train_labels[rows], groups=None)
    return Federation(dataset=moved, offsets=federation.offsets, rows=np.arange(len(rows)))
