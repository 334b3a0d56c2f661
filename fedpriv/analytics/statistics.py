"""The model and the loss of an analysis: the gradient of a record's loss is minus its vector phi."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedpriv.analytics.queries import Query, Seen, read_query, vector_scales
from fedpriv.data.labels import LabelKind
from fedpriv.errors import UserError
from fedpriv.tasks.kinds import TaskKind

__all__ = ["Statistics", "StatisticsTask"]

MAX_SIZE = 10**8


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The vector of an analysis in place of a model; the table `[analysis]` writes it.

    Args:
        queries: The resolved queries, one table each.
        records: Number of records of a client that counts as 1; None if every client counts as one.

    Raises:
        UserError: If a query is invalid.
    """

    dense: ClassVar[bool] = False
    queries: list[dict[str, object]] = field(default_factory=list)
    records: int | None = None

    def __post_init__(self) -> None:
        if not self.queries:
            raise UserError("model.queries", "at least one query", "an empty list", "Use the table [analysis]")
        vector_scales(self.asked)

    @cached_property
    def asked(self) -> list[Query]:
        """The queries."""
        return [read_query(table) for table in self.queries]

    @property
    def questions(self) -> tuple[str, ...]:
        """The queries in words, for the privacy statement."""
        return tuple(f"{query.name} ({query.about})" for query in self.asked)

    @property
    def weight(self) -> str:
        """How clients are weighed; a sentence."""
        if self.records is None:
            return "A client's vector is the mean over its records, so every client counts as one, however many it has."
        return (
            f"A client's vector is the sum over its records divided by {self.records:,}, and at most of length 1: "
            "of a client with more records than that, some may not count."
        )

    def parameters(self, input_shape: tuple[int, ...], classes: int) -> int:
        """Return the length of the vector; see `ModelSource.parameters`. `classes` is `StatisticsTask.width`."""
        size = self._ends(classes - 1)[-1]
        if size > MAX_SIZE:
            raise UserError("[analysis]", f"at most {MAX_SIZE:,} numbers", f"{size:,}", "Ask for fewer bins or levels")
        return size

    def build(self, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """Return a module from inputs to one output for them, and those of labels; see `ModelSource.build`."""
        module = _Linear(self.asked, self._ends(classes - 1), classes - 1)
        with torch.no_grad():
            module(torch.zeros(1, *input_shape))  # raises if an input has no such column
        return module

    def _ends(self, labels: int) -> list[int]:
        ends = [0]
        for query in self.asked:
            ends.append(ends[-1] + query.size(labels))
        return ends

    def seen(self, vector: np.ndarray, labels: int, stddev: float, clients: int) -> dict[str, Seen]:
        """Return the part of each query, by name, in units of its phi.

        Args:
            vector: The released vector, `[size]`.
            labels: Number of labels.
            stddev: Standard deviation of the noise on each of its numbers.
            clients: Number of clients in the population.
        """
        total = None if self.records is None else float(self.records) * clients
        parts = zip(self.asked, pairwise(self._ends(labels)), vector_scales(self.asked), strict=True)
        return {
            query.name: Seen(vector[start:end].astype(np.float64) / scale, stddev / scale, total)
            for query, (start, end), scale in parts
        }

    def shares(self) -> Mapping[str, float]:
        """Return the share of the squared noise multiplier of each query, by name."""
        scales = vector_scales(self.asked)
        return {query.name: (scale * query.norm()) ** 2 for query, scale in zip(self.asked, scales, strict=True)}


class _Linear(nn.Module):
    """<answers, phi> of inputs, and the part of each label; or the parts of queries about labels that are numbers."""

    def __init__(self, queries: Sequence[Query], ends: Sequence[int], labels: int) -> None:
        super().__init__()
        self._queries = [*zip(queries, ends, vector_scales(queries), strict=False)]
        self._labels = labels
        self.answers = nn.Parameter(torch.zeros(ends[-1]))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs `[batch, ...]` to `[batch, 1 + labels]`."""
        linear = self.answers.new_zeros(len(inputs), 1)
        of_labels = self.answers.new_zeros(len(inputs), self._labels)
        of_numbers: list[Tensor] = []
        for query, start, scale in self._queries:
            if query.of_label:
                part = scale * self.answers[start : start + query.size(self._labels)]
                of_numbers.append(part.expand(len(inputs), -1))
                continue
            found = query.entries(inputs)
            if found is None:
                of_labels = of_labels + scale * self.answers[start : start + query.size(self._labels)]
            else:
                values = self.answers[found.places + start] * found.values
                linear = linear + scale * values.sum(dim=1, keepdim=True)
        return torch.cat([linear, *(of_numbers or [of_labels])], dim=1)


@dataclass(frozen=True, kw_only=True)
class StatisticsTask(TaskKind):
    """The loss -<x, phi> of a record; nothing is scored on test examples.

    Args:
        labels: The kind of labels of the data set: `classes` or `numbers`.
        queries: The resolved queries about labels that are numbers, one table each; None for none.
    """

    labels: LabelKind = "classes"  # pyright: ignore[reportIncompatibleVariableOverride]
    queries: list[dict[str, object]] | None = None

    def __post_init__(self) -> None:
        if self.labels not in ("classes", "numbers"):
            raise UserError("analysis.label_kind", '"classes" or "numbers"', repr(self.labels), "Change the key")
        if self.queries and self.labels != "numbers":
            remedy = 'Set analysis.label_kind = "numbers"'
            raise UserError("analysis.label_kind", '"numbers" with a column "label"', repr(self.labels), remedy)
        super().__post_init__()

    @cached_property
    def _asked(self) -> list[Query]:
        return [read_query(table) for table in self.queries or ()]

    @property
    def scores(self) -> tuple[str, ...]:
        """None: the released numbers are the answers."""
        return ()

    def width(self, classes: int) -> int:
        """Return one output for the inputs, and one for each label, or for each number of a query about labels."""
        return 1 + (classes if self.labels == "classes" else sum(query.size(0) for query in self._asked))

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """See `TaskKind.losses`."""
        found = outputs[:, 0]
        if self.labels == "classes":
            found = found + outputs[:, 1:].gather(1, labels[:, None])[:, 0]
        end, values = 1, labels.reshape(len(labels), -1)
        for query in self._asked:
            start, end = end, end + query.size(0)
            entries = query.entries(values)
            assert entries is not None
            found = found + (outputs[:, start:end].gather(1, entries.places) * entries.values).sum(dim=1)
        return -found
