"""Public graphs of clients, on which a token travels."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fedpriv.data.files import refuse_other_separator
from fedpriv.errors import UserError
from fedpriv.streams import Source

__all__ = ["MAX_ENDS", "Graph", "grid", "read_edges", "regular", "ring"]

MAX_ENDS = 2 * 10**7
"""Most ends of edges in a random graph."""

_COLUMNS = ["from", "to"]
_MAX_TRIES = 200


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph without loops or repeated edges.

    Args:
        starts: `ends[starts[i]:starts[i + 1]]` are the neighbors of client i; int64 `[clients + 1]`.
        ends: int64 `[2 * edges]`, ascending for each client.
    """

    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, population: int, edges: np.ndarray) -> "Graph":
        """Return the graph of the edges `[edges, 2]`; loops are left out, and repeated edges count once."""
        edges = edges[edges[:, 0] != edges[:, 1]]
        both = np.concatenate([edges, edges[:, ::-1]])
        both = np.unique(both, axis=0) if len(both) else both
        degrees = np.bincount(both[:, 0], minlength=population)
        return cls(np.concatenate([[0], np.cumsum(degrees)]).astype(np.int64), both[:, 1].astype(np.int64))

    @property
    def population(self) -> int:
        """Number of clients."""
        return len(self.starts) - 1

    def neighbors(self, client: int) -> np.ndarray:
        """Return the neighbors of a client, ascending int64 `[degree]`."""
        return self.ends[self.starts[client] : self.starts[client + 1]]

    def degrees(self, clients: np.ndarray) -> np.ndarray:
        """Return the numbers of neighbors of clients, int64 `[clients]`."""
        return self.starts[clients + 1] - self.starts[clients]

    def unreachable(self, start: int) -> np.ndarray:
        """Return the clients without a path from `start`, ascending int64."""
        tails = np.repeat(np.arange(self.population), np.diff(self.starts))
        matrix = coo_matrix((np.ones(len(tails), np.int8), (tails, self.ends)), shape=(self.population,) * 2)
        parts = connected_components(matrix, directed=False)[1]
        return np.flatnonzero(parts != parts[start])


def ring(population: int) -> Graph:
    """Return a cycle through all clients, in the order of their ids."""
    clients = np.arange(population)
    return Graph.of(population, np.stack([clients, (clients + 1) % population], axis=1))


def grid(population: int) -> Graph:
    """Return a grid that is as nearly square as possible, filled row by row; the last row may be shorter."""
    columns = int(np.ceil(np.sqrt(population)))
    clients = np.arange(population)
    right = clients[(clients % columns < columns - 1) & (clients + 1 < population)]
    down = clients[clients + columns < population]
    edges = np.concatenate([np.stack([right, right + 1], axis=1), np.stack([down, down + columns], axis=1)])
    return Graph.of(population, edges)


def regular(population: int, degree: int, source: Source) -> Graph:
    """Return a random connected graph in which every client has `degree` neighbors.

    Ends of edges are paired at random; pairs that make a loop or repeat an edge are paired again (after Steger and
    Wormald 1999, "Generating random regular graphs quickly"). A graph that is not connected is drawn again. If clients
    have more than half of all others as neighbors, the pairs that are not neighbors are drawn instead.

    Args:
        population: Number of clients, at least `degree + 1`.
        degree: Number of neighbors, at least 3; `population * degree` must be even.
        source: Random numbers.

    Raises:
        UserError: If no graph is found, which is improbable.
    """
    dense = 2 * degree > population - 1
    for _ in range(_MAX_TRIES):
        keys = _paired(population, population - 1 - degree if dense else degree, source)
        if keys is None:
            continue
        if dense:
            first, second = np.triu_indices(population, 1)
            keys = np.setdiff1d(first * population + second, keys)
        found = Graph.of(population, np.stack([keys // population, keys % population], axis=1))
        if not len(found.unreachable(0)):
            return found
    expected = "a degree for which a connected graph is found"
    raise UserError("schedule.degree", expected, degree, "Raise it, or change the seed")


def _paired(population: int, degree: int, source: Source) -> np.ndarray | None:
    """Return the edges as `smaller * population + larger`, int64 `[edges]`; None if the last ends have no partner."""
    left, keys = np.repeat(np.arange(population), degree), np.empty(0, np.int64)
    for _ in range(_MAX_TRIES):
        if not len(left):
            return keys
        order = np.argsort(source.uniform(len(left)), kind="stable")
        pairs = np.sort(left[order].reshape(-1, 2), axis=1)
        found = pairs[:, 0] * population + pairs[:, 1]
        kept = np.zeros(len(found), bool)
        kept[np.unique(found, return_index=True)[1]] = True
        kept &= (pairs[:, 0] != pairs[:, 1]) & ~np.isin(found, keys)
        keys, left = np.concatenate([keys, found[kept]]), pairs[~kept].ravel()
    return None


def read_edges(path: str) -> np.ndarray:
    """Return the edges of a CSV file with the columns `from` and `to`, int64 `[edges, 2]`.

    Raises:
        UserError: If it is no such file.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file, strict=True)
            if list(table.fieldnames or []) != _COLUMNS:
                refuse_other_separator(Path(path), ",", _COLUMNS)
                got = ",".join(table.fieldnames or []) or "an empty file"
                raise UserError(path, "the header from,to", got, "Write one edge a line below it, such as 0,1")
            edges = [_edge(f"{path}: line {table.line_num}", row.values()) for row in table]
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "Check the path; a relative one is resolved against the current directory"
        raise UserError("schedule.file", "a CSV file of edges", f"{path!r} ({reason})", remedy) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(path, "a CSV file", str(error), "Fix the file") from None
    if not edges:
        raise UserError(path, "one edge a line", "a header alone", "Add an edge such as 0,1")
    return np.array(edges, dtype=np.int64)


def _edge(where: str, texts: Iterable[str | None]) -> tuple[int, int]:
    values = list(texts)
    given = ",".join(str(text) for text in values if text is not None)
    if len(values) != 2 or not all(isinstance(text, str) and text.strip().isdecimal() for text in values):
        raise UserError(where, "two client ids from 0", repr(given), "Write two whole numbers such as 0,1")
    first, second = (int(str(text)) for text in values)
    if max(first, second) >= 2**31 or first == second:
        raise UserError(where, "two different client ids", repr(given), "Fix the line: an edge joins two clients")
    return first, second
