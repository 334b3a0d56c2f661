"""The token walk: no server, and one client at a time; the model travels along a public graph.

Doshi, Hu, Eun 2023, "Self-Repellent Random Walks on General Graphs", arXiv 2305.05097; Hu, Doshi, Eun 2024,
"Accelerating Distributed Stochastic Optimization via Self-Repellent Random Walks", arXiv 2401.09665. Only their
abstracts were read. With the kernel P of a reversible chain with the target distribution mu, and the share x_j of
visits so far, client i gives the token to client j with probability

    K_ij  proportional to  P_ij (x_j / mu_j)^(-alpha)

alpha = 0 is the base chain. The abstracts state that x tends to mu, and that its asymptotic variance falls as
1 / alpha.

| the papers' letter | here |
|---|---|
| P | `base_chain`: Metropolis and Hastings for the uniform mu, with uniform proposals of a neighbor |
| alpha | `repellence` |
| x | visits so far over their sum; every client begins with one fictitious visit |

Derived here, for the tests: near mu, x moves by ((K[x] distribution) - x) / steps, and the derivative of the stationary
distribution of K[x] at mu is -alpha (I + P^T). With gain 1 / steps, the variance of x along an eigenvector of P with
eigenvalue l is then that of the base chain, (1 + l) / (1 - l) / n over steps, times 1 / (1 + 2 alpha (1 + l)).

Ours: the fictitious visits; the graphs; a client that drops out leaves the token with the client before it, which draws
again. Every visit is one message, as is one of a client that keeps the token: the clock counts its transfers, too.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fedpriv.checks import is_whole, real_from
from fedpriv.clock.graphs import MAX_ENDS, Graph, grid, read_edges, regular, ring
from fedpriv.clock.participation import Clock
from fedpriv.clock.schedules import check_everyone
from fedpriv.clock.timeline import Group, Step, Timeline
from fedpriv.errors import UserError, nearest
from fedpriv.privacy import Sampling
from fedpriv.streams import Purpose, Streams

__all__ = ["GRAPHS", "Token", "base_chain", "repelled"]

GraphName = Literal["ring", "grid", "regular", "file"]
GRAPHS: tuple[GraphName, ...] = get_args(GraphName)

MAX_REPELLENCE = 1e6


@dataclass(frozen=True, kw_only=True)
class Token:
    """One client at a time: the model travels from neighbor to neighbor on a graph, and avoids clients visited often.

    Args:
        graph: `ring`, `grid`, `regular` (random, with `degree` neighbors each) or `file`.
        repellence: alpha; 0 for the Metropolis-Hastings chain, larger values for more equal visits.
        start: The client that works in the first step.
        degree: Number of neighbors of each client in the graph `regular`; otherwise None.
        file: A CSV file with the columns from and to, and one edge a line, for the graph `file`; otherwise None.
        checksum: Of the edges; None for that of the file.

    Raises:
        UserError: If a value does not suit the graph, or the file has a mistake.

    Privacy: the walk is drawn before the run, from the graph, devices, sizes and a seed, all public. The next client
    sees the model before and after a step, and so the message. Only the client's own noise protects it (trust local),
    and a client is charged for each of its visits.
    """

    graph: GraphName = "ring"
    repellence: float = 0.0
    start: int = 0
    degree: int | None = None
    file: str | None = None
    checksum: str | None = None

    def __post_init__(self) -> None:
        if self.graph not in GRAPHS:
            expected = " or ".join(f'"{name}"' for name in GRAPHS)
            raise UserError("schedule.graph", expected, repr(self.graph), nearest(str(self.graph), GRAPHS))
        real_from("schedule.repellence", self.repellence, 0, "Choose 5, or 0 for no repellence", high=MAX_REPELLENCE)
        if not is_whole(self.start, 0, 2**31):
            raise UserError("schedule.start", "a client id from 0", repr(self.start), "Set it to 0")
        self._check_key("degree", "regular", "Set it to a number of neighbors such as 4")
        self._check_key("file", "file", "Set it to a CSV file of edges")
        if self.degree is not None and not is_whole(self.degree, 3, MAX_ENDS):
            remedy = 'Choose 3 or more; graph = "ring" has 2'
            raise UserError("schedule.degree", "a whole number of neighbors from 3", repr(self.degree), remedy)
        if self.file is not None:
            found = f"{zlib.crc32(read_edges(self.file).tobytes()):08x}"
            if self.checksum not in (None, found):
                expected, remedy = f"edges of checksum {self.checksum}", "Give that file, or remove schedule.checksum"
                raise UserError("schedule.file", expected, f"{self.file!r} ({found})", remedy)
            object.__setattr__(self, "checksum", found)

    @property
    def draws_cohorts(self) -> bool:
        """False: the timeline is accounted."""
        return False

    @property
    def shows_messages(self) -> bool:
        """True: the next client sees the model before and after a step."""
        return True

    def check(self, sampling: Sampling, *, memory: bool) -> None:
        """See `Schedule.check`."""
        check_everyone("token", sampling)
        if self.start >= sampling.population:
            expected = f"a client id below {sampling.population}"
            raise UserError("schedule.start", expected, self.start, "Set it to 0")

    def timeline(self, clock: Clock, sampling: Sampling, steps: int, *, memory: bool, hidden: bool) -> Timeline:
        """See `Schedule.timeline`.

        Raises:
            UserError: If the token cannot reach all clients.
        """
        graph = self.of(sampling.population, clock.streams)
        return Timeline(
            scheme="token",
            population=sampling.population,
            expected_size=1.0,
            steps=tuple(self._walk(clock, graph, steps)),
        )

    def of(self, population: int, streams: Streams) -> Graph:
        """Return the graph of a number of clients.

        Raises:
            UserError: If it does not suit the number, or is not connected.
        """
        if self.file is not None:
            return self._of_file(population, self.file)
        if self.degree is None:
            return ring(population) if self.graph == "ring" else grid(population)
        if self.degree >= population or self.degree * population > MAX_ENDS or self.degree * population % 2:
            expected = f"a number below {population} clients, with an even product of at most {MAX_ENDS:,}"
            raise UserError("schedule.degree", expected, self.degree, "Choose another degree such as 4")
        return regular(population, self.degree, streams.source(Purpose.GRAPH))

    def _of_file(self, population: int, file: str) -> Graph:
        edges = read_edges(file)
        if int(edges.max()) >= population:
            expected = f"client ids below {population}, the number of clients"
            raise UserError(file, expected, int(edges.max()), "Fix the edges, or raise data.clients")
        graph = Graph.of(population, edges)
        apart = graph.unreachable(self.start)
        if len(apart):
            got = f"{len(apart)} clients without a path from client {self.start}; the first is {apart[0]}"
            raise UserError(file, "a connected graph", got, "Add edges until every client can be reached")
        return graph

    def _check_key(self, key: str, graph: GraphName, remedy: str) -> None:
        given = getattr(self, key)
        if self.graph == graph and given is None:
            raise UserError(f"schedule.{key}", f'a value with graph = "{graph}"', "a missing key", remedy)
        if self.graph != graph and given is not None:
            expected = f'no value unless graph = "{graph}"'
            raise UserError(f"schedule.{key}", expected, repr(given), f'Remove it, or set graph = "{graph}"')

    def _walk(self, clock: Clock, graph: Graph, steps: int) -> Iterator[Step]:
        visits = np.ones(graph.population)
        holder, now, attempts, bytes_down, bytes_up = self.start, 0.0, 0, 0, 0
        for number in range(1, steps + 1):
            asked: list[int] = []
            dropped: list[int] = []
            while True:
                attempts += 1
                client = self.start if attempts == 1 else self._next(clock, graph, visits, holder, attempts)
                one = clock.participation(client, now, attempts)
                now, bytes_down = one.ends, bytes_down + clock.model_bytes
                asked.append(client)
                if not one.drops:
                    break
                dropped.append(client)
            visits[client] += 1.0
            holder, bytes_up = client, bytes_up + clock.model_bytes
            group = Group(number - 1, 1.0, np.array([client], dtype=np.int64))
            nobody = np.empty(0, dtype=np.int64)
            yield Step(number, now, (group,), _ascending(asked), _ascending(dropped), nobody, bytes_down, bytes_up)

    def _next(self, clock: Clock, graph: Graph, visits: np.ndarray, holder: int, attempt: int) -> int:
        """Draw the client that gets the token from its holder, possibly the holder itself."""
        clients, base = base_chain(graph, holder)
        chances = np.cumsum(repelled(base, visits[clients], self.repellence))
        drawn = float(clock.streams.source(Purpose.WALK, attempt).uniform(1)[0])
        return int(clients[np.searchsorted(chances / chances[-1], drawn, side="right")])


def base_chain(graph: Graph, client: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a client's row of the Metropolis-Hastings chain for the uniform distribution.

    A neighbor j of client i is proposed with probability 1 / degree_i, and accepted with probability
    min(1, degree_i / degree_j); otherwise the client itself is next.

    Returns:
        The clients that may be next, int64 `[degree + 1]`: the neighbors, and the client itself as the last. Their
        probabilities, float64 `[degree + 1]`.
    """
    neighbors = graph.neighbors(client)
    chances = 1.0 / np.maximum(graph.degrees(neighbors), len(neighbors))
    stays = max(1.0 - float(chances.sum()), 0.0) if len(neighbors) else 1.0
    return np.append(neighbors, client), np.append(chances, 0.0 if stays < 1e-12 else stays)


def repelled(base: np.ndarray, visits: np.ndarray, repellence: float) -> np.ndarray:
    """Return the self-repellent kernel for the uniform target: P_ij x_j^(-alpha) over its sum, `[..., clients]`.

    Args:
        base: P_ij of the clients that may be next, `[..., clients]`, with a positive sum.
        visits: Their numbers of visits, above 0, `[..., clients]`. Only ratios matter: shares give the same result.
        repellence: alpha.
    """
    logs = np.where(base > 0.0, -repellence * np.log(visits), -np.inf)
    weights = base * np.exp(logs - logs.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _ascending(clients: list[int]) -> np.ndarray:
    return np.sort(np.array(clients, dtype=np.int64))
