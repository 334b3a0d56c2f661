"""Trust models: which party adds the noise, and the rules that follow. No other code tests for a trust's name.

Configs, records, instructions and ledgers keep only the name; `trust_of` returns its object.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, cast

from fedpriv.errors import UserError, nearest
from fedpriv.plugins import Registry
from fedpriv.privacy.unit import Adjacency

__all__ = [
    "TRUSTS",
    "Aggregator",
    "Central",
    "HiddenAggregator",
    "Local",
    "Shares",
    "Trust",
    "TrustName",
    "by_reliance",
    "trust_name",
    "trust_of",
]

TrustName = Literal["central", "local", "aggregator"]
"""The name of a trust in `TRUSTS`."""


class Shares(NamedTuple):
    """Standard deviations per coordinate: of the noise on the sum of messages, and of that on each message."""

    server: float
    client: float


class Trust(Protocol):
    """The party that adds the noise, and the adversary that a guarantee holds against.

    A frozen dataclass without fields.

    Attributes:
        name: Its name in configs, records, instructions and ledgers.
        adversary: The adversary that the guarantee holds against; one clause.
        seen: The view of an auditor in the adversary's place; one clause.
        noised: The values that the noise is added to, in words.
        default_adjacency: The adjacency of a plan that names none.
        reliance: The degree to which a client relies on others; 0 for not at all. A client that accepts a trust also
            accepts trusts with less reliance.
        trusts_server: True if nothing is promised against the server itself.
        clients_add_noise: True if messages have noise on them when they leave a client.
        shows_messages: True if the adversary sees each message separately, with its sender.
        hides_cohorts: True if the adversary does not see who took part; only then may sampling be credited.
        charges_participations: True if a client's own noise alone protects it, so that it is charged for the messages
            that it sent; otherwise its first message is charged with the whole guarantee.
        secure_sums: True if messages are summed by secure aggregation; a plan then has an `Aggregation`, and clients
            add integer shares of the noise (`fedpriv.privacy.aggregation`).
    """

    name: ClassVar[str]
    adversary: ClassVar[str]
    seen: ClassVar[str]
    noised: ClassVar[str]
    default_adjacency: ClassVar[Adjacency]
    reliance: ClassVar[int]
    trusts_server: ClassVar[bool]
    clients_add_noise: ClassVar[bool]
    shows_messages: ClassVar[bool]
    hides_cohorts: ClassVar[bool]
    charges_participations: ClassVar[bool]
    secure_sums: ClassVar[bool]

    def split(self, stddev: float, cohort: float) -> Shares:
        """Return the noise that the server and each client add.

        Args:
            stddev: The plan's standard deviation per coordinate.
            cohort: Expected number of messages in a round.
        """
        ...

    def noises(self, cohort: float) -> float:
        """Return the number of independent noise vectors of the plan's deviation in the sum of `cohort` messages."""
        ...

    def more_clients(self, excess: float) -> float:
        """Return the factor on the number of clients that makes the noise on the mean `excess` times smaller."""
        ...

    def who(self, most: str) -> str:
        """Return the statement's sentences on the adversary and on the party that adds the noise.

        Args:
            most: `Sampling.most`, for a trust under which the adversary sees who took part.
        """
        ...


@dataclass(frozen=True)
class Central:
    """The server adds the noise to the sum of a round's messages, and only models are released."""

    name: ClassVar[str] = "central"
    adversary: ClassVar[str] = (
        "anyone who sees the models (after every round) and knows all other clients; the server is trusted"
    )
    seen: ClassVar[str] = "every noised sum of messages, which reveals at least as much as the models computed from it"
    noised: ClassVar[str] = "the sum of a round's messages"
    default_adjacency: ClassVar[Adjacency] = "add-or-remove"
    reliance: ClassVar[int] = 2
    trusts_server: ClassVar[bool] = True
    clients_add_noise: ClassVar[bool] = False
    shows_messages: ClassVar[bool] = False
    hides_cohorts: ClassVar[bool] = True
    charges_participations: ClassVar[bool] = False
    secure_sums: ClassVar[bool] = False

    def split(self, stddev: float, cohort: float) -> Shares:
        """Return all noise for the server."""
        return Shares(server=stddev, client=0.0)

    def noises(self, cohort: float) -> float:
        """Return 1 for any number of messages."""
        return 1.0

    def more_clients(self, excess: float) -> float:
        """Return `excess`: the same noise is divided by a larger number."""
        return excess

    def who(self, most: str) -> str:
        """See `Trust.who`."""
        return (
            f"Adversary: {self.adversary}. The server sees every message without noise, adds the noise to their sum, "
            "and releases only results computed from the noised sums. Nothing is promised against the server itself."
        )


@dataclass(frozen=True)
class Local:
    """Each client adds noise to its message before sending it, and the server sees every message."""

    name: ClassVar[str] = "local"
    adversary: ClassVar[str] = "the server itself, or anyone who sees every message and knows whose it is"
    seen: ClassVar[str] = "every noised message of every canary, and its sender"
    noised: ClassVar[str] = "every message"
    default_adjacency: ClassVar[Adjacency] = "replace"
    reliance: ClassVar[int] = 0
    trusts_server: ClassVar[bool] = False
    clients_add_noise: ClassVar[bool] = True
    shows_messages: ClassVar[bool] = True
    hides_cohorts: ClassVar[bool] = False
    charges_participations: ClassVar[bool] = True
    secure_sums: ClassVar[bool] = False

    def split(self, stddev: float, cohort: float) -> Shares:
        """Return all noise for each client."""
        return Shares(server=0.0, client=stddev)

    def noises(self, cohort: float) -> float:
        """Return one per message."""
        return cohort

    def more_clients(self, excess: float) -> float:
        """Return the square of `excess`: the noise on the sum grows with the root of the number of clients."""
        return excess**2

    def who(self, most: str) -> str:
        """See `Trust.who`."""
        return (
            f"Adversary: {self.adversary}. Every client adds the noise to its own message before sending it. The "
            f"server sees who took part, so no amplification by sampling is claimed. {most}"
        )


@dataclass(frozen=True)
class Aggregator:
    """Each client adds a share of the noise and masks its message, and the server learns only the noised sum."""

    name: ClassVar[str] = "aggregator"
    adversary: ClassVar[str] = (
        "the server itself, or anyone who sees the noised sums and who took part, together with all helpers but one "
        "and with as many clients as the plan allows to collude"
    )
    seen: ClassVar[str] = "every noised sum of messages, and who took part"
    noised: ClassVar[str] = "the sum of a round's messages, in equal shares by the clients"
    default_adjacency: ClassVar[Adjacency] = "replace"
    reliance: ClassVar[int] = 1
    trusts_server: ClassVar[bool] = False
    clients_add_noise: ClassVar[bool] = True
    shows_messages: ClassVar[bool] = False
    hides_cohorts: ClassVar[bool] = False
    charges_participations: ClassVar[bool] = False
    secure_sums: ClassVar[bool] = True

    def split(self, stddev: float, cohort: float) -> Shares:
        """Return equal shares for the clients, if all of the cohort answer; see `PrivacyPlan.shares` for a plan's."""
        return Shares(server=0.0, client=stddev / math.sqrt(cohort))

    def noises(self, cohort: float) -> float:
        """Return 1 for any number of messages."""
        return 1.0

    def more_clients(self, excess: float) -> float:
        """Return `excess`: the same noise is divided by a larger number."""
        return excess

    def who(self, most: str) -> str:
        """See `Trust.who`."""
        return (
            f"Adversary: {self.adversary}. Every client adds its share of the noise to its own message and masks it. "
            "The masks cancel only in the sum, and one honest helper keeps them secret. The server sees who took part, "
            f"so no amplification by sampling is claimed. {most}"
        )


@dataclass(frozen=True)
class HiddenAggregator(Aggregator):
    """`Aggregator`, if all clients answer in all rounds: those that are not sampled send their share of the noise."""

    adversary: ClassVar[str] = (
        "the server itself, or anyone who sees the noised sums, together with all helpers but one and with as many "
        "clients as the plan allows to collude"
    )
    seen: ClassVar[str] = "every noised sum of messages"
    hides_cohorts: ClassVar[bool] = True

    def who(self, most: str) -> str:
        """See `Trust.who`."""
        return (
            f"Adversary: {self.adversary}. Every client adds its share of the noise to its own message and masks it. "
            "The masks cancel only in the sum, and one honest helper keeps them secret. A client flips its own coins, "
            "and a client that is not sampled answers with a message of zero and its share, so that nobody else knows "
            "who took part."
        )


TRUSTS: Registry[Trust] = Registry("trust", {"central": Central, "local": Local, "aggregator": Aggregator})


def by_reliance() -> tuple[str, ...]:
    """Return all names by increasing reliance: a client that accepts one accepts all before it."""
    return tuple(sorted(TRUSTS, key=lambda name: TRUSTS[name].reliance))


def trust_of(name: str) -> Trust:
    """Return the trust with this name.

    Raises:
        UserError: If there is none.
    """
    if name not in TRUSTS:
        raise UserError("privacy.trust", "a known name", repr(name), nearest(str(name), TRUSTS))
    return TRUSTS[name]()


def trust_name(name: str) -> TrustName:
    """Return the name if there is such a trust; see `trust_of` for errors."""
    trust_of(name)
    return cast(TrustName, name)
