"""Who adds the noise, and what follows from it. A trust answers for itself; nobody else asks for its name.

Configs, records, orders and ledgers keep the plain word; `trust_of` makes the object of it.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from fedpriv.errors import UserError, nearest
from fedpriv.plugins import Registry

__all__ = ["TRUSTS", "Central", "Local", "Shares", "Trust", "by_reliance", "trust_of"]


class Shares(NamedTuple):
    """Standard deviations per coordinate: of the noise on the sum of messages, and of that on each message."""

    server: float
    client: float


class Trust(Protocol):
    """Who adds the noise, and against whom a promise holds: a frozen dataclass without fields.

    Attributes:
        name: The word in configs, records, orders and ledgers.
        adversary: Against whom; one clause.
        seen: What an auditor in the adversary's place sees; one clause.
        noised: What the noise is added to, in words.
        default_adjacency: The neighbors of a plan that names none.
        reliance: How much a client relies on others, 0 for on nobody. Who accepts a trust accepts those that rely less.
        trusts_server: Whether nothing is promised against the server itself.
        clients_add_noise: Whether what leaves a client has noise on it.
        shows_messages: Whether the adversary sees each message by itself, and whose it is.
        hides_cohorts: Whether the adversary does not see who took part: only then may sampling be credited.
        charges_participations: Whether a client's own noise alone protects it, so that it pays for the messages that it
            sent; else it pays for the whole promise from the first on.
    """

    name: ClassVar[str]
    adversary: ClassVar[str]
    seen: ClassVar[str]
    noised: ClassVar[str]
    default_adjacency: ClassVar[str]
    reliance: ClassVar[int]
    trusts_server: ClassVar[bool]
    clients_add_noise: ClassVar[bool]
    shows_messages: ClassVar[bool]
    hides_cohorts: ClassVar[bool]
    charges_participations: ClassVar[bool]

    def split(self, stddev: float, cohort: float) -> Shares:
        """Who adds how much noise.

        Args:
            stddev: The plan's standard deviation per coordinate.
            cohort: Expected number of messages in a round.
        """
        ...

    def noises(self, cohort: float) -> float:
        """How many independent noises of the plan's standard deviation are in the sum of `cohort` messages."""
        ...

    def more_clients(self, excess: float) -> float:
        """How many times more clients make the noise on the mean message `excess` times smaller."""
        ...

    def who(self, most: str) -> str:
        """Who adds the noise and what is promised against whom, for the statement.

        Args:
            most: Whose epsilon it is where participation is seen, in sentences of the sampling.
        """
        ...


@dataclass(frozen=True)
class Central:
    """The server adds the noise to the sum of a round's messages, and only models are released."""

    name: ClassVar[str] = "central"
    adversary: ClassVar[str] = (
        "anyone who sees the models (after every round) and knows all other clients; the server is trusted"
    )
    seen: ClassVar[str] = "every noised sum of messages, which tells at least as much as the models made from it"
    noised: ClassVar[str] = "the sum of a round's messages"
    default_adjacency: ClassVar[str] = "add-or-remove"
    reliance: ClassVar[int] = 2
    trusts_server: ClassVar[bool] = True
    clients_add_noise: ClassVar[bool] = False
    shows_messages: ClassVar[bool] = False
    hides_cohorts: ClassVar[bool] = True
    charges_participations: ClassVar[bool] = False

    def split(self, stddev: float, cohort: float) -> Shares:
        """All of it at the server."""
        return Shares(server=stddev, client=0.0)

    def noises(self, cohort: float) -> float:
        """One, however many messages there are."""
        return 1.0

    def more_clients(self, excess: float) -> float:
        """As many times more: the same noise over a larger number."""
        return excess

    def who(self, most: str) -> str:
        """See `Trust.who`."""
        return (
            f"Adversary: {self.adversary}. The server sees every message as it is, adds the noise to their sum, and "
            "releases nothing but what it makes of the noised sums. Against the server itself nothing is promised."
        )


@dataclass(frozen=True)
class Local:
    """Each client adds noise to its message before it leaves, and the server sees every message."""

    name: ClassVar[str] = "local"
    adversary: ClassVar[str] = "the server itself, or anyone who sees every message and knows whose it is"
    seen: ClassVar[str] = "every noised message of every canary and whose it is"
    noised: ClassVar[str] = "every message"
    default_adjacency: ClassVar[str] = "replace"
    reliance: ClassVar[int] = 0
    trusts_server: ClassVar[bool] = False
    clients_add_noise: ClassVar[bool] = True
    shows_messages: ClassVar[bool] = True
    hides_cohorts: ClassVar[bool] = False
    charges_participations: ClassVar[bool] = True

    def split(self, stddev: float, cohort: float) -> Shares:
        """All of it at every client."""
        return Shares(server=0.0, client=stddev)

    def noises(self, cohort: float) -> float:
        """One a message."""
        return cohort

    def more_clients(self, excess: float) -> float:
        """The square: the noise on the sum grows with the root of the number of clients."""
        return excess**2

    def who(self, most: str) -> str:
        """See `Trust.who`."""
        return (
            f"Adversary: {self.adversary}. Every client adds the noise to its own message before it leaves. The server "
            f"sees who took part, so no amplification by sampling is claimed. {most}"
        )


TRUSTS: Registry[Trust] = Registry("trust", {"central": Central, "local": Local})


def by_reliance() -> tuple[str, ...]:
    """All names, from the trust that relies on nobody on: who accepts one accepts those before it."""
    return tuple(sorted(TRUSTS, key=lambda name: TRUSTS[name].reliance))


def trust_of(name: str) -> Trust:
    """The trust that a word stands for.

    Raises:
        UserError: If there is none.
    """
    if name == "aggregator":
        remedy = 'Secure aggregation is not offered yet: use "local", or "central" with a server that you trust'
        raise UserError("privacy.trust", '"central" or "local"', '"aggregator"', remedy)
    if name not in TRUSTS:
        raise UserError("privacy.trust", "a known name", repr(name), nearest(str(name), TRUSTS))
    return TRUSTS[name]()
