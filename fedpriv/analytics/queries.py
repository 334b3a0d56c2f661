"""Queries: how a record becomes a bounded vector, and how the noised mean of such vectors becomes an answer.

Each query describes a record by a few entries (place, value) of a vector phi with norm at most `norm`. An analysis
joins the queries to one vector of norm at most 1: query j is multiplied by sqrt(share_j) / norm_j, and the shares sum
to 1. One Gaussian mechanism then answers all of them, and query j alone costs sqrt(share_j) of its mu. If the records
of a client are summed, only the whole vector has a bound: there, each query alone costs as much as all.

| query | phi of a record | norm | replacing a record moves phi by |
|---|---|---|---|
| count | 1 | 1 | 0 |
| labels, histogram, categories | the indicator of its bin | 1 | at most sqrt(2) |
| moments of c columns | u and u^2 - 1/2 of each, u in [-1, 1] | sqrt(5 c / 4) | at most 2 sqrt(c) |
| quantiles | the indicators of its node at each of L levels | sqrt(L) | at most sqrt(2 L) |
| prefixes | the indicator of its prefix, if it is one of them | 1 | at most sqrt(2) |

Plans charge 2 norm for `replace`, which is up to sqrt(2) times too much.

Answers are linear in the noised mean, except variances and ratios. `Seen` has the standard deviation of its noise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from fedpriv.analytics.heavy import prefixes as words
from fedpriv.analytics.tree import cumulative
from fedpriv.checks import plain_numbers
from fedpriv.errors import UserError, nearest, plural

__all__ = [
    "KINDS",
    "LABEL",
    "Categories",
    "Column",
    "Count",
    "Entries",
    "Histogram",
    "Labels",
    "Moments",
    "Prefixes",
    "Quantiles",
    "Query",
    "Seen",
    "missing_place",
    "read_query",
    "vector_scales",
]

LABEL = "label"
"""The name of a label that is a number, in place of a column."""

MAX_BINS = 100_000
MAX_LEVELS = 16


class Entries(NamedTuple):
    """The nonzero entries of phi: places int64 and values float32, both `[records, entries]`."""

    places: Tensor
    values: Tensor


class Column(NamedTuple):
    """A column of the prepared inputs: its place, and the constants for which raw = prepared * scale + shift."""

    place: int
    shift: float = 0.0
    scale: float = 1.0

    def prepared(self, raw: float) -> float:
        """Return a raw value in the unit of the prepared inputs."""
        return (raw - self.shift) / self.scale


class Seen(NamedTuple):
    """What the server sees of one query.

    Args:
        mean: The noised mean over clients of phi, `[size]` float64.
        stddev: Standard deviation of the noise on each number.
        total: Number of records that `mean` = 1 stands for; None if every client counts as one.
    """

    mean: np.ndarray
    stddev: float
    total: float | None

    @property
    def unit(self) -> float:
        """The factor from means to answers: records, or shares of clients."""
        return 1.0 if self.total is None else self.total


class Query(Protocol):
    """A question about the clients' records: a frozen dataclass.

    Attributes:
        kind: Its name in `[analysis]`.
    """

    kind: ClassVar[str]

    @property
    def name(self) -> str:
        """The name of the answer."""
        ...

    @property
    def share(self) -> float | None:
        """Its share of the squared noise multiplier; None for an equal part of what the other queries leave."""
        ...

    def key(self, name: str) -> str:
        """Return the name of a key in configs, for errors."""
        ...

    @property
    def about(self) -> str:
        """The question in words, for the privacy statement."""
        ...

    @property
    def of_label(self) -> bool:
        """True if the question is about a label that is a number; `entries` then takes labels as inputs."""
        ...

    def size(self, labels: int) -> int:
        """Return the length of phi, from the number of labels."""
        ...

    def norm(self) -> float:
        """Return the largest norm of phi."""
        ...

    def entries(self, inputs: Tensor) -> Entries | None:
        """Return the entries of phi for inputs `[records, *input_shape]`; None if phi depends on the labels alone."""
        ...

    def answer(self, seen: Seen) -> dict[str, object]:
        """Return values and standard errors for JSON."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Fields of every query.

    Args:
        name: See `Query`.
        share: See `Query`; None for an equal part of what the other queries leave.
        of_label: Set by the analysis; see `Query`.
    """

    kind: ClassVar[str]
    name: str = ""
    share: float | None = None
    of_label: bool = False

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.share is not None and not 0.0 < self.share <= 1.0:
            raise UserError(self.key("share"), "above 0 and at most 1", self.share, "Give a share such as 0.5")

    def key(self, name: str) -> str:
        """Return the name of a key in configs, for errors."""
        return f"analysis.{self.name}.{name}"


@dataclass(frozen=True, kw_only=True)
class Count(_Asked):
    """The number of records."""

    kind: ClassVar[str] = "count"

    @property
    def about(self) -> str:
        """See `Query.about`."""
        return "the number of records"

    def size(self, labels: int) -> int:
        """Return 1."""
        return 1

    def norm(self) -> float:
        """Return 1."""
        return 1.0

    def entries(self, inputs: Tensor) -> Entries:
        """See `Query.entries`."""
        ones = inputs.new_ones((len(inputs), 1), dtype=torch.float32)
        return Entries(torch.zeros_like(ones, dtype=torch.int64), ones)

    def answer(self, seen: Seen) -> dict[str, object]:
        """See `Query.answer`."""
        return {"value": seen.unit * float(seen.mean[0]), "standard_error": seen.unit * seen.stddev}


@dataclass(frozen=True, kw_only=True)
class Labels(_Asked):
    """The histogram of the labels."""

    kind: ClassVar[str] = "labels"

    @property
    def about(self) -> str:
        """See `Query.about`."""
        return "the histogram of labels"

    def size(self, labels: int) -> int:
        """Return the number of labels."""
        return labels

    def norm(self) -> float:
        """Return 1."""
        return 1.0

    def entries(self, inputs: Tensor) -> None:
        """Return None: the loss adds the entry of the label."""
        return

    def answer(self, seen: Seen) -> dict[str, object]:
        """See `Query.answer`."""
        return _bins(seen)


@dataclass(frozen=True, kw_only=True)
class Categories(_Asked):
    """The histogram of a column of categories, which is several inputs of 0 or 1. A missing category is in no bin.

    Args:
        column: Name of the column, or the place of its first input.
        categories: Number of categories; None for those that the data set declares.
    """

    kind: ClassVar[str] = "categories"
    column: str | int = 0
    categories: int | None = None

    @property
    def about(self) -> str:
        """See `Query.about`."""
        return f"the histogram of {self.categories} categories"

    def size(self, labels: int) -> int:
        """Return the number of categories."""
        return self.categories or 0

    def norm(self) -> float:
        """Return 1."""
        return 1.0

    def resolved(self, columns: Mapping[str, Column], categories: Mapping[str, tuple[int, int]]) -> "Categories":
        """Return the query with the place of the column; see `Moments.resolved`."""
        if isinstance(self.column, int) and self.categories is not None:
            return self
        if str(self.column) not in categories:
            remedy = nearest(str(self.column), categories) if categories else "Give the place and number of its inputs"
            raise UserError(self.key("column"), "a column of data.categories", repr(self.column), remedy)
        place, number = categories[str(self.column)]
        return replace(self, column=place, categories=number)

    def entries(self, inputs: Tensor) -> Entries:
        """See `Query.entries`."""
        flat, start = _flat(self, inputs), int(self.column)
        values = flat[:, start : start + self.size(0)].clamp(0.0, 1.0)
        if values.shape[1] != self.size(0):
            raise missing_place(self.key("column"), start + self.size(0) - 1, flat.shape[1])
        return Entries(torch.arange(self.size(0), device=flat.device).expand(values.shape), values)

    def answer(self, seen: Seen) -> dict[str, object]:
        """See `Query.answer`."""
        return _bins(seen)


@dataclass(frozen=True, kw_only=True)
class _OfColumn(_Asked):
    """Fields of a query about one column of numbers.

    Args:
        column: Name or place of the column.
        low: Least value; smaller ones count as `low`. A public constant.
        high: Largest value; larger ones count as `high`. A public constant.
        shift: Set from the data set: raw = prepared * scale + shift.
        scale: Set from the data set.
    """

    column: str | int = 0
    low: float | None = None
    high: float | None = None
    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self, self.low, self.high)

    def resolved(self, columns: Mapping[str, Column], categories: Mapping[str, tuple[int, int]]) -> "_OfColumn":
        """Return the query with the column's place and constants; see `Moments.resolved`."""
        if self.of_label or (self.column == LABEL and LABEL not in columns):
            return replace(self, column=0, of_label=True)
        place, shift, scale = _column_of(self, "column", self.column, columns)
        return replace(self, column=place, shift=shift, scale=scale)

    def _place_in_range(self, inputs: Tensor) -> Tensor:
        """Return where the values are in [low, high], from 0 to 1, `[records]`."""
        flat, place = _flat(self, inputs), int(self.column)
        if place >= flat.shape[1]:
            raise missing_place(self.key("column"), place, flat.shape[1])
        column = Column(place, self.shift, self.scale)
        low, high = column.prepared(cast(float, self.low)), column.prepared(cast(float, self.high))
        return ((flat[:, place] - low) / (high - low)).clamp(0.0, 1.0)

    def _edges(self, bins: int) -> np.ndarray:
        return np.linspace(cast(float, self.low), cast(float, self.high), bins + 1)


@dataclass(frozen=True, kw_only=True)
class Histogram(_OfColumn):
    """The histogram of a column of numbers, in bins of equal width. Values out of range are in the first or last bin.

    Args:
        bins: Number of bins.
    """

    kind: ClassVar[str] = "histogram"
    bins: int = 10

    @property
    def about(self) -> str:
        """See `Query.about`."""
        return f"a histogram of {self.bins} bins from {self.low:g} to {self.high:g}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bins <= MAX_BINS:
            raise UserError(self.key("bins"), f"a number from 1 to {MAX_BINS:,}", self.bins, "Give the number of bins")

    def size(self, labels: int) -> int:
        """Return the number of bins."""
        return self.bins

    def norm(self) -> float:
        """Return 1."""
        return 1.0

    def entries(self, inputs: Tensor) -> Entries:
        """See `Query.entries`."""
        at = (self._place_in_range(inputs) * self.bins).long().clamp(max=self.bins - 1)
        return Entries(at[:, None], torch.ones_like(at[:, None], dtype=torch.float32))

    def answer(self, seen: Seen) -> dict[str, object]:
        """See `Query.answer`."""
        return {**_bins(seen), "edges": self._edges(self.bins).tolist()}


@dataclass(frozen=True, kw_only=True)
class Quantiles(_OfColumn):
    """Quantiles of a column of numbers, from noised counts in a binary tree of intervals.

    Args:
        at: The ranks, in (0, 1).
        levels: Levels of the tree below the root: the range has 2^levels intervals.
    """

    kind: ClassVar[str] = "quantiles"
    at: tuple[float, ...] = (0.25, 0.5, 0.75)
    levels: int = 8

    @property
    def about(self) -> str:
        """See `Query.about`."""
        return f"quantiles from {self.low:g} to {self.high:g}, by a tree of {self.levels} levels"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "at", tuple(self.at))
        if not 1 <= self.levels <= MAX_LEVELS:
            raise UserError(self.key("levels"), f"a number from 1 to {MAX_LEVELS}", self.levels, "Give 8 for 256 bins")
        if not self.at or not all(0.0 < rank < 1.0 for rank in self.at):
            raise UserError(self.key("at"), "ranks above 0 and below 1", list(self.at), "Give ranks such as [0.5]")

    def size(self, labels: int) -> int:
        """Return the number of nodes below the root."""
        return 2 ** (self.levels + 1) - 2

    def norm(self) -> float:
        """Return the root of the number of levels: a record is in one node of each."""
        return math.sqrt(self.levels)

    def entries(self, inputs: Tensor) -> Entries:
        """See `Query.entries`. The nodes of level l begin at 2^l - 2."""
        leaf = (self._place_in_range(inputs) * 2**self.levels).long().clamp(max=2**self.levels - 1)
        places = [2**level - 2 + leaf // 2 ** (self.levels - level) for level in range(1, self.levels + 1)]
        stacked = torch.stack(places, dim=1)
        return Entries(stacked, torch.ones_like(stacked, dtype=torch.float32))

    def answer(self, seen: Seen) -> dict[str, object]:
        """See `Query.answer`. `rank_error` is at least the standard error of the share of records below a value."""
        shares = cumulative(seen.mean, self.levels, total=1.0 if seen.total is None else None)
        total = max(float(shares[-1]), 1e-12)
        rank_error = math.sqrt(self.levels) * seen.stddev / total
        ranks = np.maximum.accumulate(np.clip(shares / total, 0.0, 1.0))
        edges = self._edges(2**self.levels)

        def value(rank: float) -> float:
            return float(np.interp(min(max(rank, 0.0), 1.0), ranks, edges))

        return {
            "at": list(self.at),
            "value": [value(rank) for rank in self.at],
            "low": [value(rank - 2.0 * rank_error) for rank in self.at],
            "high": [value(rank + 2.0 * rank_error) for rank in self.at],
            "rank_error": rank_error,
            "interval": float(edges[1] - edges[0]),
        }


@dataclass(frozen=True, kw_only=True)
class Moments(_Asked):
    """Mean, variance and standard deviation of columns of numbers, or of the channels of images.

    Args:
        columns: Names or places of the columns; empty for all. Of images, the places of channels.
        low: Least value, one number or one for each column; smaller values count as `low`. Public constants.
        high: Largest value, likewise.
        shifts: Set from the data set: raw = prepared * scale + shift.
        scales: Set from the data set.
        counted: Set by the analysis: True if phi also has an entry that counts records, to divide by.
    """

    kind: ClassVar[str] = "moments"
    columns: tuple[str | int, ...] = ()
    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None
    shifts: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    names: tuple[str, ...] = field(default=())
    counted: bool = False

    @property
    def about(self) -> str:
        """See `Query.about`."""
        return f"mean and variance of {len(self.columns)} {plural('column', len(self.columns))}"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("columns", "shifts", "scales", "names"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        for low, high in zip(*(self._of_all(end) for end in (self.low, self.high)), strict=True):
            _check_range(self, low, high)

    def _of_all(self, end: float | Sequence[float] | None) -> tuple[float | None, ...]:
        number = max(len(self.columns), 1)
        if end is None or isinstance(end, int | float):
            return (end,) * number
        if len(end) != number:
            expected = f"one number, or one for each of {number} {plural('column', number)}"
            got = f"{len(end)} {plural('number', len(end))}"
            raise UserError(self.key("low and high"), expected, got, "Give a range of each column")
        return tuple(end)

    def resolved(self, columns: Mapping[str, Column], categories: Mapping[str, tuple[int, int]]) -> "Moments":
        """Return the query with the places and constants of its columns.

        Args:
            columns: The columns of numbers that the data set declares, by name.
            categories: For each declared column of categories, the place of its first input, and their number.

        Raises:
            UserError: If the data set has no such column, or a column is named twice.
        """
        asked = self.columns or tuple(columns)
        if self.of_label or (asked == (LABEL,) and LABEL not in columns):
            return replace(self, columns=(0,), shifts=(0.0,), scales=(1.0,), names=(LABEL,), of_label=True)
        if not asked:
            remedy = "Give places such as [0, 1]: this data set does not declare names of columns"
            raise UserError(self.key("columns"), "columns", "an absent key", remedy)
        found = [_column_of(self, "columns", one, columns) for one in asked]
        places = [column.place for column in found]
        for number, (one, place) in enumerate(zip(asked, places, strict=True)):
            if place in places[:number]:
                raise UserError(self.key("columns"), "different columns", f"{one!r} twice", "Give each column once")
        return replace(
            self,
            columns=tuple(places),
            shifts=tuple(column.shift for column in found),
            scales=tuple(column.scale for column in found),
            names=tuple(map(str, asked)),
        )

    def size(self, labels: int) -> int:
        """Return two numbers a column, and one to count."""
        return 2 * len(self.columns) + self.counted

    def norm(self) -> float:
        """Return the largest norm: u^2 + (u^2 - 1/2)^2 is at most 5/4, at u = 1 and u = -1."""
        return math.sqrt(1.25 * len(self.columns) + self.counted)

    def entries(self, inputs: Tensor) -> Entries:
        """See `Query.entries`: first all u, then all u^2 - 1/2. Of images, means over the pixels of a channel."""
        images = inputs.dim() > 2
        values = torch.nan_to_num(inputs.float()).flatten(2) if images else _flat(self, inputs)[:, :, None]
        places = [int(place) for place in self.columns]
        if max(places) >= values.shape[1]:
            raise missing_place(self.key("columns"), max(places), values.shape[1])
        low, high = (torch.tensor(ends, device=values.device)[None, :, None] for ends in self._prepared_ranges())
        u = (2.0 * (values[:, places] - low) / (high - low) - 1.0).clamp(-1.0, 1.0)
        found = torch.cat([u.mean(dim=2), u.square().mean(dim=2) - 0.5], dim=1)
        if self.counted:
            found = torch.cat([found, torch.ones_like(found[:, :1])], dim=1)
        return Entries(torch.arange(found.shape[1], device=found.device).expand(found.shape), found)

    def _prepared_ranges(self) -> tuple[list[float], list[float]]:
        found = [Column(0, *constants) for constants in zip(self.shifts, self.scales, strict=True)]
        ends = [cast(tuple[float, ...], self._of_all(end)) for end in (self.low, self.high)]
        low, high = ([column.prepared(raw) for column, raw in zip(found, end, strict=True)] for end in ends)
        return low, high

    def answer(self, seen: Seen) -> dict[str, object]:
        """See `Query.answer`. Standard errors of variances, and of ratios, are those of the linear part (delta method).

        A standard deviation is at least the root of the variance's standard error, so that inputs may be divided by it.
        The noise on the mean makes its square too large by the noise's variance, which the variance gets back.
        """
        number = len(self.columns)
        total = float(seen.mean[-1]) if self.counted else 1.0
        total = total if abs(total) > seen.stddev else math.copysign(max(seen.stddev, 1e-12), total or 1.0)
        first, second = seen.mean[:number] / total, seen.mean[number : 2 * number] / total + 0.5
        stddev, ratio = seen.stddev / abs(total), 1.0 if self.counted else 0.0
        ends = [np.array(cast(tuple[float, ...], self._of_all(end))) for end in (self.low, self.high)]
        middle, half = (ends[0] + ends[1]) / 2.0, (ends[1] - ends[0]) / 2.0
        variance = half**2 * (second - first**2 + stddev**2)
        # The noise of the total moves the mean by -first, and the second moment less 1/2 by -(second - 1/2).
        mean_error = half * stddev * np.sqrt(1.0 + ratio * first**2)
        moved = ratio * (2.0 * first**2 - (second - 0.5)) ** 2
        variance_error = half**2 * np.sqrt(stddev**2 * (1.0 + 4.0 * first**2 + moved) + 2.0 * stddev**4)
        std = np.sqrt(np.maximum(np.maximum(variance, variance_error), (1e-6 * half) ** 2))
        return {
            "columns": list(self.names or map(str, self.columns)),
            "mean": (middle + half * first).tolist(),
            "mean_standard_error": mean_error.tolist(),
            "variance": variance.tolist(),
            "variance_standard_error": variance_error.tolist(),
            "std": std.tolist(),
        }


@dataclass(frozen=True, kw_only=True)
class Prefixes(_Asked):
    """The shares of words that begin with each of some prefixes; of the data set `words`.

    Args:
        prefixes: Different prefixes of one length. A whole word may be shorter, and ends with `$`.
    """

    kind: ClassVar[str] = "prefixes"
    prefixes: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        """See `Query.about`."""
        return f"the shares of {len(self.prefixes):,} prefixes of words"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        try:
            if len(np.unique(self._numbers)) < max(len(self.prefixes), 1):
                raise ValueError("a list without prefixes" if not self.prefixes else "a prefix twice")
        except ValueError as error:
            expected = f"different prefixes of one length, at most {words.MAX_LENGTH}; whole words end with $"
            raise UserError(self.key("prefixes"), expected, str(error), "Correct the list") from None

    @property
    def _length(self) -> int:
        open_ = [len(prefix) for prefix in self.prefixes if not prefix.endswith(words.END)]
        return max([*open_, *(len(prefix) for prefix in self.prefixes)], default=1)

    @property
    def _numbers(self) -> np.ndarray:
        if self._length > words.MAX_LENGTH:
            raise ValueError(max(self.prefixes, key=len))
        return words.read(self.prefixes, self._length)

    def size(self, labels: int) -> int:
        """Return the number of prefixes."""
        return len(self.prefixes)

    def norm(self) -> float:
        """Return 1: a word begins with at most one of different prefixes of one length."""
        return 1.0

    def entries(self, inputs: Tensor) -> Entries:
        """See `Query.entries`: inputs are the symbols of a word, `[records, letters]`."""
        flat = _flat(self, inputs)
        if flat.shape[1] < self._length:
            raise missing_place(self.key("prefixes"), self._length - 1, flat.shape[1])
        order = np.argsort(self._numbers)
        sorted_ = torch.as_tensor(self._numbers[order], device=flat.device)
        powers = torch.as_tensor([words.SYMBOLS**left for left in reversed(range(self._length))], device=flat.device)
        symbols = flat[:, : self._length].long().clamp(0, words.SYMBOLS - 1)
        found = (symbols * powers).sum(dim=1, keepdim=True)
        at = (sorted_ < found).sum(dim=1, keepdim=True).clamp(max=len(order) - 1)
        matched = (sorted_[at] == found).float()
        return Entries(torch.as_tensor(order, device=flat.device)[at], matched)

    def answer(self, seen: Seen) -> dict[str, object]:
        """See `Query.answer`."""
        return {"names": list(self.prefixes), **_bins(seen)}


KINDS: dict[str, type[Query]] = {
    kind.kind: kind for kind in (Count, Labels, Histogram, Categories, Moments, Quantiles, Prefixes)
}
"""The queries by the name of their kind."""


def read_query(table: Mapping[str, object]) -> Query:
    """Return the query of a resolved table, as `Statistics` holds it.

    Raises:
        UserError: If it is no such table.
    """
    options = dict(table)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise UserError("model.queries", f"queries of the kinds {', '.join(KINDS)}", repr(kind), "Use [analysis]")
    try:
        return KINDS[str(kind)](**options)
    except TypeError as error:
        raise UserError("model.queries", f"the keys of {kind}", str(error), "Use [analysis]") from None


def vector_scales(queries: Sequence[Query]) -> list[float]:
    """Return the factor on each query's phi for which the joined vector has norm at most 1.

    Raises:
        UserError: If the shares exceed 1, or leave nothing for a query without one.
    """
    given = math.fsum(query.share or 0.0 for query in queries)
    open_ = sum(query.share is None for query in queries)
    if given > 1.0 + 1e-9 or (open_ and given > 1.0 - 1e-9):
        raise UserError("analysis.NAME.share", "shares of at most 1 in total", f"{given:g}", "Lower some of them")
    rest = (1.0 - given) / open_ if open_ else 0.0
    return [math.sqrt(rest if query.share is None else query.share) / query.norm() for query in queries]


def _bins(seen: Seen) -> dict[str, object]:
    return {"value": (seen.unit * seen.mean).tolist(), "standard_error": seen.unit * seen.stddev}


def _flat(query: _Asked, inputs: Tensor) -> Tensor:
    if inputs.dim() > 2:
        expected = "a data set of columns"
        got = f"inputs of shape {list(inputs.shape[1:])}"
        raise UserError(f"analysis.{query.name}", expected, got, 'Images have kind = "moments" and "labels" alone')
    return torch.nan_to_num(inputs.float())


def missing_place(where: str, place: int, columns: int) -> UserError:
    """Return the error for a place beyond the inputs, of which there are `columns`."""
    return UserError(where, f"a column from 0 to {columns - 1}", place, "Give the place of a column")


def _column_of(query: _Asked, key: str, asked: str | int, columns: Mapping[str, Column]) -> Column:
    if isinstance(asked, int):
        by_place = {column.place: column for column in columns.values()}
        if asked < 0:
            raise UserError(query.key(key), "a place from 0", asked, "Give the place of a column")
        return by_place.get(asked, Column(asked))
    if asked not in columns:
        remedy = nearest(asked, columns) if columns else "Give its place, a number from 0"
        raise UserError(query.key(key), "a column of numbers that the data set declares", repr(asked), remedy)
    return columns[asked]


def _check_range(query: _Asked, low: float | None, high: float | None) -> None:
    if low is None or high is None:
        key = query.key("low" if low is None else "high")
        remedy = "Give a public range; if you do not know one, ask for a histogram over a wide range first"
        raise UserError(key, "the range of the values", "an absent key", remedy)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(query.key("high"), f"a finite number above low = {low:g}", f"{high:g}", "Correct the range")
