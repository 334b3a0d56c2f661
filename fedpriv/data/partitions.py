"""Partitions: rules that assign training examples to clients, based on labels and natural clients.

Every rule gives each row one owner and every client at least one row, except for natural clients, who hold their actual
examples. All rules but `natural` simulate clients: they divide a pool and may use its labels. Cost grows with the
number of examples plus the number of clients.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedpriv.checks import positive_int, positive_real, real_within
from fedpriv.data.dataset import DATASETS
from fedpriv.errors import UserError
from fedpriv.plugins import Registry

__all__ = [
    "PARTITIONS",
    "Dirichlet",
    "Iid",
    "LabelShards",
    "Natural",
    "Partition",
    "QuantitySkew",
    "Resampled",
    "given_clients",
    "mean_total_variation",
]


class Partition(Protocol):
    """A rule that assigns examples to clients; read from the table `[data]`."""

    def split(
        self, labels: np.ndarray, groups: np.ndarray | None, clients: int | None, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """Return the rows of each client: ascending int64, disjoint, non-empty except for natural clients without data.

        Args:
            labels: int64 `[examples]`.
            groups: int64 `[examples]`, the natural client of each example; None if there are none.
            clients: Number of clients; None is allowed for natural clients only, and means all of them.
            rng: The only source of randomness; equal states give equal splits.

        Raises:
            UserError: If there are too few examples, shards or natural clients.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Iid:
    """Examples assigned at random: sizes differ by at most one, and label distributions are alike."""

    def split(
        self,
        labels: np.ndarray,
        groups: np.ndarray | None,
        clients: int | None,
        rng: np.random.Generator,
    ) -> list[np.ndarray]:
        """See `Partition.split`."""
        number = _enough_examples(len(labels), clients)
        return _rows_by_owner(rng.permutation(len(labels)) % number, number)


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """Skewed labels and sizes: each label is divided by a separate Dirichlet draw over the clients.

    For each label, shares ~ Dirichlet(concentration, ..., concentration) over clients; its examples, shuffled, are cut
    in these shares. Small concentrations leave each label with few clients. Each client without examples then receives
    one, always from the client that has the most. Source: Yurochkin et al., Bayesian Nonparametric Federated Learning
    of Neural Networks, ICML 2019, section 4. (Hsu et al., arXiv:1909.06335, draw labels for each client instead, with
    equal sizes.)

    Args:
        concentration: 1e-6 to 1e9; at 100 or more, label distributions are nearly alike.

    Raises:
        UserError: If `concentration` is out of range.
    """

    concentration: float = 0.5

    def __post_init__(self) -> None:
        positive_real("data.concentration", self.concentration)
        if not 1e-6 <= self.concentration <= 1e9:
            expected, remedy = "1e-6 to 1e9", "Choose a usual value, 0.1 to 100"
            raise UserError("data.concentration", expected, self.concentration, remedy)

    def split(
        self,
        labels: np.ndarray,
        groups: np.ndarray | None,
        clients: int | None,
        rng: np.random.Generator,
    ) -> list[np.ndarray]:
        """See `Partition.split`."""
        number = _enough_examples(len(labels), clients)
        shuffled = rng.permutation(len(labels))
        owner = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            rows = shuffled[labels[shuffled] == label]
            shares = rng.dirichlet(np.full(number, self.concentration))
            owner[rows] = rng.permutation(number)[_cut(shares, len(rows))]
        owner[shuffled] = _without_empty_clients(owner[shuffled], number)
        return _rows_by_owner(owner, number)


@dataclass(frozen=True, kw_only=True)
class LabelShards:
    """Few labels per client: examples sorted by label are cut into equal shards, which are assigned at random.

    A shard across the border of two labels has both, so the clients' numbers of labels sum to at most
    `clients * shards_per_client + classes - 1`. Source: McMahan et al., Communication-Efficient Learning of
    Deep Networks from Decentralized Data, AISTATS 2017, section 3.

    Args:
        shards_per_client: Shards for each client, at least 1.

    Raises:
        UserError: If `shards_per_client` is less than 1.
    """

    shards_per_client: int = 2

    def __post_init__(self) -> None:
        positive_int("data.shards_per_client", self.shards_per_client)

    def split(
        self,
        labels: np.ndarray,
        groups: np.ndarray | None,
        clients: int | None,
        rng: np.random.Generator,
    ) -> list[np.ndarray]:
        """See `Partition.split`."""
        examples, number = len(labels), _enough_examples(len(labels), clients)
        shards = number * self.shards_per_client
        if shards > examples:
            expected = f"at most {examples // number} for {examples} examples and {number} clients"
            raise UserError(
                "data.shards_per_client",
                expected,
                self.shards_per_client,
                "Lower data.shards_per_client or data.clients",
            )
        shuffled = rng.permutation(examples)
        sorted_rows = shuffled[np.argsort(labels[shuffled], kind="stable")]
        owner = np.empty(examples, dtype=np.int64)
        owner[sorted_rows] = (rng.permutation(shards) % number)[np.arange(examples) * shards // examples]
        return _rows_by_owner(owner, number)


@dataclass(frozen=True, kw_only=True)
class QuantitySkew:
    """Skewed sizes with similar labels: log-normal shares of the examples, which are assigned at random.

    Shares are proportional to exp(size_spread * z), z standard normal, so their coefficient of variation is about
    sqrt(exp(size_spread^2) - 1): 0.53 at 0.5, 1.3 at 1, 7.3 at 2. Each client without examples then receives one,
    always from the client that has the most. Source: Acar et al., Federated Learning Based on Dynamic Regularization,
    ICLR 2021, with log-normal sizes in its unbalanced data.

    Args:
        size_spread: Standard deviation of the logarithm of a client's share, 0 to 5; 0 makes sizes equal.

    Raises:
        UserError: If `size_spread` is out of range.
    """

    size_spread: float = 1.0

    def __post_init__(self) -> None:
        real_within("data.size_spread", self.size_spread, 0, 5)

    def split(
        self,
        labels: np.ndarray,
        groups: np.ndarray | None,
        clients: int | None,
        rng: np.random.Generator,
    ) -> list[np.ndarray]:
        """See `Partition.split`."""
        examples, number = len(labels), _enough_examples(len(labels), clients)
        shuffled = rng.permutation(examples)
        shares = np.exp(self.size_spread * rng.standard_normal(number))
        owner = np.empty(examples, dtype=np.int64)
        owner[shuffled] = _without_empty_clients(_cut(shares, examples), number)
        return _rows_by_owner(owner, number)


@dataclass(frozen=True, kw_only=True)
class Natural:
    """The natural clients of the data: client i holds the examples of group i.

    With fewer clients than groups, the first groups are used and the examples of the others are left out.
    """

    def split(
        self,
        labels: np.ndarray,
        groups: np.ndarray | None,
        clients: int | None,
        rng: np.random.Generator,
    ) -> list[np.ndarray]:
        """See `Partition.split`; uses no randomness."""
        return self.split_among(groups, 0 if groups is None else int(groups.max()) + 1, clients)

    def split_among(self, groups: np.ndarray | None, found: int, clients: int | None) -> list[np.ndarray]:
        """Return the rows of `found` natural clients, of which the last may hold no examples."""
        if groups is None:
            having = ", ".join(name for name, source in DATASETS.items() if source.natural)
            expected = f"a dataset with natural clients ({having}) for 'natural'"
            remedy = "Choose such a dataset, name the clients of yours (csv: data.client), or choose another partition"
            raise UserError("data.partition", expected, "a dataset without them", remedy)
        number = found if clients is None else _positive(clients)
        if number > found:
            remedy = "Lower data.clients, or remove it to use all"
            raise UserError("data.clients", f"at most {found}, the natural clients", clients, remedy)
        return _rows_by_owner(groups, found)[:number]


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """Any number of clients, each with examples drawn with replacement: for populations larger than the data.

    Nothing is stored per client: a client's examples are recomputed from its number on every access. Clients share
    examples, so this simulates the cost and the privacy of a large population, not its diversity.

    Args:
        examples: Number of draws per client, from 1 to a million.

    Raises:
        UserError: If `examples` is out of range.
    """

    examples: int = 15

    def __post_init__(self) -> None:
        positive_int("data.examples", self.examples)
        real_within("data.examples", self.examples, 1, 10**6)

    def split(
        self,
        labels: np.ndarray,
        groups: np.ndarray | None,
        clients: int | None,
        rng: np.random.Generator,
    ) -> list[np.ndarray]:
        """Return the rows of each client, ascending, with repetitions; see `rows_of`, which needs no list."""
        seed = int(rng.integers(2**63))
        return [self.rows_of(client, len(labels), seed) for client in range(given_clients(clients))]

    def rows_of(self, client: int, examples: int, seed: int) -> np.ndarray:
        """Return the rows of one client, ascending int64, of a data set of `examples`."""
        sequence = np.random.SeedSequence(seed, spawn_key=(client,))
        return np.sort(np.random.Generator(np.random.Philox(sequence)).integers(examples, size=self.examples))


PARTITIONS: Registry[Partition] = Registry(
    "partition",
    {
        "iid": Iid,
        "dirichlet": Dirichlet,
        "shards": LabelShards,
        "quantity": QuantitySkew,
        "natural": Natural,
        "resampled": Resampled,
    },
    protocol=Partition,
    group="fedpriv.partitions",
    wrap="fedpriv.data.flwr_partitions:FlwrPartition",
)


def mean_total_variation(counts: np.ndarray) -> float:
    """Return how much labels differ between clients: the mean total variation distance to all clients' labels.

    0 if every client has all labels in the same shares; near 1 if each client holds only one rare label.

    Args:
        counts: `[clients, classes]`, the number of examples of each label; clients without examples are ignored.
    """
    held = counts[counts.sum(axis=1) > 0].astype(np.float64)
    shares = held / held.sum(axis=1, keepdims=True)
    return float(np.abs(shares - held.sum(axis=0) / held.sum()).sum(axis=1).mean() / 2)


def given_clients(clients: int | None) -> int:
    """Return the number of clients for a rule that requires one; raise UserError unless it is positive."""
    if clients is None:
        raise UserError("data.clients", "a whole number", "a missing key", "Set data.clients to the number of clients")
    return _positive(clients)


def _positive(clients: int) -> int:
    positive_int("data.clients", clients)
    return clients


def _enough_examples(examples: int, clients: int | None) -> int:
    """Return the number of clients if each can have an example; otherwise raise UserError."""
    if clients is None:
        remedy = "Set data.clients; only data.partition = 'natural' works without it"
        raise UserError("data.clients", "a number of clients", "a missing key", remedy)
    if _positive(clients) > examples:
        remedy = "Lower data.clients, because every client needs an example"
        raise UserError("data.clients", f"at most {examples}, the number of training examples", clients, remedy)
    return clients


def _rows_by_owner(owner: np.ndarray, clients: int) -> list[np.ndarray]:
    """Return ascending rows of each client, given the owner int64 `[examples]` of each row."""
    ends = np.cumsum(np.bincount(owner, minlength=clients))
    return np.split(np.argsort(owner, kind="stable"), ends[:-1])


def _cut(shares: np.ndarray, examples: int) -> np.ndarray:
    """Return ascending owners int64 `[examples]`, in proportion to `shares` `[clients]`, to within one example each."""
    ends = np.cumsum(shares)
    middles = (np.arange(examples) + 0.5) / examples
    return np.minimum(np.searchsorted(ends, middles * ends[-1]), len(shares) - 1)


def _without_empty_clients(owner: np.ndarray, clients: int) -> np.ndarray:
    """Return `owner` with one example moved to each client without any, each time from the client with the most.

    Repeatedly taking from the largest client takes the examples of the highest rank within their clients.
    """
    sizes = np.bincount(owner, minlength=clients)
    empty = np.flatnonzero(sizes == 0)
    order = np.argsort(owner, kind="stable")
    rank = np.empty(len(owner), dtype=np.int64)
    rank[order] = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    filled = owner.copy()
    filled[np.argsort(-rank, kind="stable")[: len(empty)]] = empty
    return filled
