"""Partitions: which client holds which training examples, as rules on labels and natural clients.

Every rule gives each row one owner and every client at least one row, but for natural clients, who hold what is theirs.
All rules but `natural` simulate clients: they divide a pool, whose labels they may look at. Cost follows the number of
examples plus the number of clients.
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
    """Decides which client holds which examples; filled from the table `[data]`."""

    def split(
        self, labels: np.ndarray, groups: np.ndarray | None, clients: int | None, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """The rows of each client: ascending int64, disjoint, none empty but those of a natural client without data.

        Args:
            labels: int64 `[examples]`.
            groups: int64 `[examples]`, natural client of each example; None where there is none.
            clients: Number of clients; None is for natural clients only, and means all of them.
            rng: All randomness; equal states give equal splits.

        Raises:
            UserError: If there are fewer examples, shards or natural clients than are needed.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Iid:
    """Examples dealt out at random: sizes differ by at most one, labels are alike."""

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
    """Skewed labels and sizes: each label is divided by its own Dirichlet draw over the clients.

    For each label, shares ~ Dirichlet(concentration, ..., concentration) over clients; its examples,
    shuffled, are cut in these shares. Small concentrations leave each label with few clients. Clients that
    got nothing are then given one example each, always of the client that has most. Source: Yurochkin et al.,
    Bayesian Nonparametric Federated Learning of Neural Networks, ICML 2019, section 4. (Hsu et al.,
    arXiv:1909.06335, draw labels for each client instead, with equal sizes.)

    Args:
        concentration: 1e-6 to 1e9; from about 100, labels are alike.

    Raises:
        UserError: If `concentration` is out of range.
    """

    concentration: float = 0.5

    def __post_init__(self) -> None:
        positive_real("data.concentration", self.concentration)
        if not 1e-6 <= self.concentration <= 1e9:
            expected, remedy = "1e-6 to 1e9", "Usual values are 0.1 to 100"
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
    """Few labels each: examples sorted by label are cut into equal shards, dealt out at random.

    A shard that spans the border of two labels has both, so the clients' numbers of labels sum to at most
    `clients * shards_per_client + classes - 1`. Source: McMahan et al., Communication-Efficient Learning of
    Deep Networks from Decentralized Data, AISTATS 2017, section 3.

    Args:
        shards_per_client: Shards for each client, at least 1.

    Raises:
        UserError: If `shards_per_client` is less.
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
            raise UserError("data.shards_per_client", expected, self.shards_per_client, "Lower it, or data.clients")
        shuffled = rng.permutation(examples)
        sorted_rows = shuffled[np.argsort(labels[shuffled], kind="stable")]
        owner = np.empty(examples, dtype=np.int64)
        owner[sorted_rows] = (rng.permutation(shards) % number)[np.arange(examples) * shards // examples]
        return _rows_by_owner(owner, number)


@dataclass(frozen=True, kw_only=True)
class QuantitySkew:
    """Skewed sizes, labels alike: log-normal shares of the examples, which are dealt out at random.

    Shares are proportional to exp(size_spread * z), z standard normal, so that their coefficient of variation is about
    sqrt(exp(size_spread^2) - 1): 0.53 at 0.5, 1.3 at 1, 7.3 at 2. Clients that got nothing are then given one example
    each, always of the client that has most. Source: Acar et al., Federated Learning Based on Dynamic Regularization,
    ICLR 2021, whose unbalanced data have log-normal sizes.

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
    """The clients that the data has by nature: client i holds the examples of group i.

    With fewer clients than groups, the first groups are taken and the examples of the others are left out.
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
        """The same for `found` natural clients, the last of whom may hold nothing."""
        if groups is None:
            having = ", ".join(name for name, source in DATASETS.items() if source.natural)
            expected = f"a dataset with natural clients ({having}) for 'natural'"
            raise UserError("data.partition", expected, "one without", "Choose such a dataset, or another partition")
        number = found if clients is None else _positive(clients)
        if number > found:
            remedy = "Lower data.clients, or leave it out to take all"
            raise UserError("data.clients", f"at most {found}, the natural clients", clients, remedy)
        return _rows_by_owner(groups, found)[:number]


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """Any number of clients, each with examples drawn anew with replacement: for populations larger than the data.

    Nothing is stored by client: what one holds follows from its number whenever it is asked for. Clients share
    examples, so that this simulates the cost and the privacy of a large population, not its diversity.

    Args:
        examples: Draws of each client, from 1 to a million.

    Raises:
        UserError: If `examples` is no such number.
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
        """The rows of each client, ascending, with repetitions; see `rows_of`, which needs no list."""
        seed = int(rng.integers(2**63))
        return [self.rows_of(client, len(labels), seed) for client in range(given_clients(clients))]

    def rows_of(self, client: int, examples: int, seed: int) -> np.ndarray:
        """The rows of one client, ascending int64, of a data set of `examples`."""
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
)


def mean_total_variation(counts: np.ndarray) -> float:
    """How much labels differ between clients: the mean total variation distance to all clients' labels.

    0 if every client has all labels in the same shares; towards 1 if each holds alone one rare label.

    Args:
        counts: `[clients, classes]`, examples of each label; clients without examples are left out.
    """
    held = counts[counts.sum(axis=1) > 0].astype(np.float64)
    shares = held / held.sum(axis=1, keepdims=True)
    return float(np.abs(shares - held.sum(axis=0) / held.sum()).sum(axis=1).mean() / 2)


def given_clients(clients: int | None) -> int:
    """The number of clients of a rule that needs one; a `UserError` where there is none, or no positive one."""
    if clients is None:
        raise UserError("data.clients", "a whole number", "nothing", "Say how many clients there are")
    return _positive(clients)


def _positive(clients: int) -> int:
    positive_int("data.clients", clients)
    return clients


def _enough_examples(examples: int, clients: int | None) -> int:
    """The number of clients, once it is sure that each can have an example."""
    if clients is None:
        remedy = "Set data.clients; only data.partition = 'natural' can do without"
        raise UserError("data.clients", "a number of clients", "none", remedy)
    if _positive(clients) > examples:
        remedy = "Lower data.clients: every client needs an example"
        raise UserError("data.clients", f"at most {examples}, the number of training examples", clients, remedy)
    return clients


def _rows_by_owner(owner: np.ndarray, clients: int) -> list[np.ndarray]:
    """Ascending rows of each client, from the owner int64 `[examples]` of each row."""
    ends = np.cumsum(np.bincount(owner, minlength=clients))
    return np.split(np.argsort(owner, kind="stable"), ends[:-1])


def _cut(shares: np.ndarray, examples: int) -> np.ndarray:
    """Ascending owners int64 `[examples]`, in numbers like `shares` `[clients]`, within one example each."""
    ends = np.cumsum(shares)
    middles = (np.arange(examples) + 0.5) / examples
    return np.minimum(np.searchsorted(ends, middles * ends[-1]), len(shares) - 1)


def _without_empty_clients(owner: np.ndarray, clients: int) -> np.ndarray:
    """`owner` with one example moved to each client that has none, always from a client that then has most.

    Taking from the largest again and again takes the examples of the highest rank within their clients.
    """
    sizes = np.bincount(owner, minlength=clients)
    empty = np.flatnonzero(sizes == 0)
    order = np.argsort(owner, kind="stable")
    rank = np.empty(len(owner), dtype=np.int64)
    rank[order] = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    mended = owner.copy()
    mended[np.argsort(-rank, kind="stable")[: len(empty)]] = empty
    return mended
