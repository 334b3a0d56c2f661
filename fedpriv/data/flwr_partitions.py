"""Partitioners of flwr-datasets as partitions: `partition = "flwr_datasets.partitioner:DirichletPartitioner"`."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from fedpriv.data.own import RESERVED
from fedpriv.data.partitions import given_clients
from fedpriv.errors import UserError, require_extra
from fedpriv.plugins import line_of, settings_of

__all__ = ["FlwrPartition"]

_KEY = "data.partition"
_COLUMNS = ("label", "client")
_ROW = "row"


@dataclass(frozen=True, kw_only=True)
class FlwrPartition:
    """Base of the settings of a partitioner. The class that `of` returns has its parameters as fields.

    The program itself passes `num_partitions` (the number of clients) and `seed` (from the experiment's seed). The
    partitioner divides a table with the columns `label` and, for data with natural clients, `client`; `partition_by`
    names one of them. As in flwr-datasets, the rows are shuffled before.
    """

    called: ClassVar[Callable[..., Any]]
    asked: ClassVar[tuple[str, ...]]

    @staticmethod
    def of(found: Any, where: str, name: str) -> "type[FlwrPartition]":
        """Return the settings of a partitioner's class; see `fedpriv.plugins.Registry`.

        Raises:
            UserError: If it is another object, or divides by natural clients alone, which `natural` does.
        """
        if not (inspect.isclass(found) and "load_partition" in dir(found)):
            remedy = "Make it a class with @dataclass(frozen=True) and a field for each key of the partition"
            raise UserError(where, "a dataclass that is a partition", repr(name), remedy)
        require_extra(where, "datasets")
        if found.__name__ == "NaturalIdPartitioner":
            remedy = 'Write partition = "natural", which also chooses the test examples of natural clients'
            raise UserError(where, "a partitioner that simulates clients", repr(name), remedy)
        return settings_of(FlwrPartition, found, where, given=("num_partitions", "seed"), reserved=RESERVED)

    def split(
        self, labels: np.ndarray, groups: np.ndarray | None, clients: int | None, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """See `Partition.split`. Examples that the partitioner leaves out belong to no client.

        Raises:
            UserError: If the partitioner raises an exception, leaves a client without examples, or does not divide
                examples.
        """
        from datasets import Dataset

        shuffled, seed = rng.permutation(len(labels)), int(rng.integers(2**31))
        columns = {_ROW: shuffled, "label": labels[shuffled]} | ({} if groups is None else {"client": groups[shuffled]})
        by = getattr(self, "partition_by", "label")
        if by not in columns or by == _ROW:
            known = " or ".join(repr(name) for name in _COLUMNS if name in columns)
            remedy = "Choose one of these columns; data without natural clients have no 'client'"
            raise UserError("data.partition_by", known, repr(by), remedy)
        options = {field.name: getattr(self, field.name) for field in fields(self)} | {"seed": seed}
        if "num_partitions" in self.asked:
            options["num_partitions"] = given_clients(clients)
        if "seed" not in self.asked:
            del options["seed"]
        try:
            with warnings.catch_warnings(action="ignore"):  # a partitioner warns when it draws again
                partitioner = type(self).called(**options)
                partitioner.dataset = Dataset.from_dict(columns)
                parts = [partitioner.load_partition(client) for client in range(int(partitioner.num_partitions))]
        except Exception as error:
            expected = f"a partitioner that can divide {len(labels):,} examples"
            raise UserError(_KEY, expected, line_of(error, type(self).called), "Correct its keys in [data]") from error
        return _rows(parts, clients)


def _rows(parts: list[Any], clients: int | None) -> list[np.ndarray]:
    """Return the rows of each part, ascending int64."""
    if not parts or any(_ROW not in part.column_names for part in parts):
        got, remedy = "one that divides columns", "Choose a partitioner that is not vertical"
        raise UserError(_KEY, "a partitioner that divides examples", got, remedy)
    if clients not in (None, len(parts)):
        remedy = "Correct data.clients, or remove it"
        raise UserError("data.clients", f"{len(parts)}, as the partitioner makes", clients, remedy)
    rows = [np.sort(np.asarray(part[_ROW], dtype=np.int64)) for part in parts]
    empty = [client for client, part in enumerate(rows) if not len(part)]
    if empty:
        remedy = "Change its keys in [data], or lower data.clients"
        raise UserError(_KEY, "an example for each client", f"client {empty[0]} without examples", remedy)
    return rows
