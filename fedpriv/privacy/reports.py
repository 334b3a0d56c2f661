"""The promise of randomized reports: every client sends one, which alone has epsilon-local differential privacy."""

import textwrap
from dataclasses import dataclass
from typing import cast

from fedpriv.errors import UserError
from fedpriv.privacy.aggregation import Aggregation
from fedpriv.privacy.sampling import Everyone, Sampling
from fedpriv.privacy.trust import Trust, TrustName, trust_of
from fedpriv.privacy.unit import Adjacency, UnitName
from fedpriv.tables import Table

__all__ = ["MECHANISM", "LocalReports", "reports_statement"]

MECHANISM = "randomized reports"
"""The entry `mechanism` of their `privacy.json`."""


@dataclass(frozen=True, kw_only=True)
class LocalReports:
    """The promise of an analysis in which every client sends one randomized report.

    Args:
        epsilon: Privacy of a report: the largest logarithm of a ratio of its probabilities, over all data of a client.
        clients: Number of clients, each with one report.
        oracle: Name of the frequency oracle.

    Formal guarantee: the question may depend on reports of other clients, never on data of its own, and it answers
    once. So the view of the server is (`epsilon`, 0)-differentially private under `replace`, for each client. Presence
    is visible: there is no promise under `add-or-remove`. Several analyses, or an analysis and a run with Gaussian
    noise, add up by basic composition: the sum of the epsilons at the sum of the deltas.
    """

    epsilon: float
    clients: int
    oracle: str

    @property
    def delta(self) -> float:
        """0: the promise holds without exception."""
        return 0.0

    @property
    def trust(self) -> TrustName:
        """The server is the adversary."""
        return "local"

    @property
    def adjacency(self) -> Adjacency:
        """The only one."""
        return "replace"

    @property
    def unit(self) -> UnitName:
        """A report protects all data of a client."""
        return "client"

    @property
    def trust_rules(self) -> Trust:
        """See `PrivacyPlan.trust_rules`."""
        return trust_of(self.trust)

    @property
    def adversary(self) -> str:
        """See `PrivacyPlan.adversary`."""
        return self.trust_rules.adversary

    @property
    def private(self) -> bool:
        """True."""
        return True

    @property
    def sampling(self) -> Sampling:
        """Every client takes part."""
        return Everyone(self.clients)

    @property
    def aggregation(self) -> Aggregation | None:
        """None: the server sees every report."""
        return None

    def epsilon_after(self, rounds: int) -> float:
        """Return the cost of the analysis; 0 before it begins."""
        return self.epsilon if rounds > 0 else 0.0

    def mu_after(self, rounds: int) -> float | None:
        """Return None: a report is no Gaussian mechanism, and composes with others by adding epsilons."""
        return None if rounds > 0 else 0.0

    def as_dict(self) -> dict[str, object]:
        """Return the promise for `privacy.json`."""
        promise = {
            "unit": self.unit,
            "adversary": self.adversary,
            "adjacency": self.adjacency,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "accountant": "none: one report of each client",
        }
        return {
            "private": True,
            "mechanism": MECHANISM,
            "oracle": self.oracle,
            "trust": self.trust,
            **promise,
            "clients": self.clients,
            "rounds": 1,
            "noise_multiplier": None,
            "gaussian_dp_mu": None,
            "zcdp_rho": None,
            "promises": [promise],
            "epsilons": {"0.0": self.epsilon},
        }

    @classmethod
    def read(cls, table: Table, where: str) -> "LocalReports":
        """Return the promise with the record `table`; raise UserError if it is none."""
        try:
            epsilon, clients = float(cast(float, table["epsilon"])), int(cast(int, table["clients"]))
            return cls(epsilon=epsilon, clients=clients, oracle=str(table["oracle"]))
        except (KeyError, TypeError, ValueError) as error:
            remedy = "Restore the file, or move the run to another folder"
            raise UserError(where, "the record of randomized reports", repr(error), remedy) from None


def reports_statement(promise: LocalReports, question: str) -> str:
    """Return the privacy statement of randomized reports; paragraphs of plain text.

    Args:
        promise: The promise.
        question: The question in words.
    """
    from fedpriv.privacy.statement import rounded_up

    epsilon = rounded_up(promise.epsilon)
    paragraphs = [
        "Privacy statement for an analysis",
        f"Promise: against the adversary below, the run is epsilon-differentially private with epsilon = {epsilon} and "
        "delta = 0, for each client.",
        f"Adversary: {promise.adversary}. The server sees who takes part.",
        "Unit: one client, that is, all of its data.",
        "Neighbors (replace): two populations that differ in all the data of one client. Nothing is promised about "
        "whether a client takes part.",
        f"Mechanism: each of {promise.clients:,} clients draws one of its words, each equally likely, and sends one "
        f"randomized report ({promise.oracle}) about its first letters. A public draw, independent of all data, "
        "decides about which level of the tree. Over any two data sets of a client, the probabilities of its report "
        "differ by a factor of at most e^epsilon. Coins have exact probabilities, rounded so that epsilon is never "
        "exceeded. The candidates that a client is asked about depend on reports of others alone.",
        f"Analysis: {question}. The epsilon above covers the answer and everything computed from it.",
        "Composition: another analysis or training of the same clients adds its epsilon and its delta.",
        "Not covered:\n"
        "* other runs on the same clients' data: the privacy costs of all runs add up;\n"
        "* the time that a client takes, and whether it answers at all;\n"
        "* the randomness comes from a seed: anyone who knows it can remove the noise. This is a simulation; with real "
        "people, it must come from the operating system of each client.",
    ]
    return "\n\n".join(_fill(paragraph) for paragraph in paragraphs) + "\n"


def _fill(text: str) -> str:
    filled = (
        textwrap.fill(line, 100, subsequent_indent="  " if line.startswith("*") else "") for line in text.split("\n")
    )
    return "\n".join(filled)
