"""Secure aggregation for the strategy of a user's app: helpers among the run's nodes, and one sum in each round.

A deployment has the same parts (`fedpriv.deploy.sums`, `fedpriv.deploy.helpers`). A strategy cannot resume a run:
U, the clients in a sum, is fixed before the first helper is asked and never changes afterwards, but it need not outlive
the strategy's process. If that ends, so does the run, and no helper is ever asked about the round again.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedpriv.deploy.facts import settings_digest
from fedpriv.deploy.helpers import end_run, helper_answers, helper_keys
from fedpriv.deploy.server import Network
from fedpriv.deploy.sums import HelperList, SecureSums
from fedpriv.errors import UserError, number_of
from fedpriv.flower.messages import ClientInstructions, RunTerms, masked_of
from fedpriv.flower.server.nodes import Nodes
from fedpriv.privacy import PrivacyPlan
from fedpriv.rounds import Total
from fedpriv.secure import Closed, Masked, RoundFacts
from fedpriv.streams import SeededStreams, Streams

__all__ = ["MaskedRounds", "masked_message", "refuse_other_nodes"]

_log = logging.getLogger("flwr")
_END_SECONDS = 30.0
_MAX_SHOWN = 4


@dataclass
class MaskedRounds:
    """Sums of the masked messages of a strategy's rounds.

    Args:
        sums: The plan and the parties.
        run: Name of the run.
        network: The helpers' nodes.
        patience: Seconds to wait for helpers: to connect, to show their keys, or to answer about a round.
        reason: Reason why the last round was void; empty if it was not.
    """

    sums: SecureSums
    run: str
    network: Network
    patience: float
    reason: str = ""
    _facts: RoundFacts | None = field(default=None, repr=False)
    _closed: Closed | None = field(default=None, repr=False)
    _has_keys: bool = False

    @classmethod
    def of(
        cls, grid: Grid, nodes: Nodes, plan: PrivacyPlan | None, parties: HelperList, run: str, patience: float
    ) -> "MaskedRounds":
        """Return the sums of a run that has not begun.

        Args:
            grid: Connection to the nodes.
            nodes: Nodes of the run.
            plan: Its privacy plan.
            parties: Its helpers, and the clients' keys if they are known.
            run: Name of the run.
            patience: See the class.

        Raises:
            UserError: If the run has no secure aggregation, has no noise, or has another number of helpers.
        """
        if plan is None or plan.aggregation is None:
            trust = "a run without privacy" if plan is None else f'privacy.trust = "{plan.trust}"'
            remedy = 'Set trust="aggregator" in Privacy, or remove helpers'
            raise UserError("helpers", 'none unless privacy.trust = "aggregator"', trust, remedy)
        network = Network(grid, len(nodes.clients), dict(enumerate(nodes.clients)), helpers=dict(nodes.helpers))
        return cls(SecureSums(plan, parties), run, network, patience)

    @property
    def _size(self) -> int:
        return 0 if self.sums.plan.aggregation is None else self.sums.plan.aggregation.size

    def shown(self) -> tuple[str, ...]:
        """Return the helpers' keys for a client's terms, after all helpers are connected.

        Raises:
            UserError: If a helper is missing, or shows no key. No client was asked, and none is charged.
        """
        pinned = self.sums.parties.pinned
        self.network.meet()  # a helper that left since the last round is missing
        self.network.wait_for_helpers(pinned, self.patience, "Start the helper before the next run")
        if not self.sums.keys:
            self._has_keys = True
            self.sums.keys = helper_keys(self.network, self.run, pinned, self.patience)
        return self.sums.shown()

    def open(
        self,
        instructions: ClientInstructions,
        terms: RunTerms,
        model: Tensor,
        content: RecordDict,
        shared: Tensor | None = None,
    ) -> None:
        """Open a round.

        Args:
            instructions: Instructions to any client of the round.
            terms: Its terms.
            model: x as clients read it, `[params]`.
            content: Everything in the message that is the same for all clients.
            shared: The vector beside the model, `[params]`; None if the method has none.
        """
        self._facts = self.sums.facts(instructions, terms, model, shared, settings_digest(content))

    def close(self, messages: Mapping[int, Masked]) -> tuple[list[int], dict[int, str]]:
        """Fix U, the clients in the sum of a round. Return it, and the faults of unusable messages by client.

        Args:
            messages: Messages by the client that sent them.
        """
        facts, self._facts, self._closed, least = self._facts, None, None, self.sums.least
        if facts is None:
            self.reason = f"fewer than {least} clients were asked"
            return [], {}
        collector, invalid = self.sums.collected(facts, messages)
        clients = collector.clients
        enough = len(clients) >= least
        self._closed = Closed.from_bytes(collector.close()) if enough else None
        self.reason = "" if enough else f"{number_of(len(clients), 'client')} answered, and a sum needs {least}"
        return clients, invalid

    def total(self) -> Total:
        """Return the sum over U, float64 `[params]`. It is void if U is too small, or if a helper does not answer."""
        found, closed, self._closed = None, self._closed, None
        messages = 0 if closed is None else len(closed.clients)
        if closed is not None:
            try:
                found, self.reason = self.sums.total(closed, helper_answers(self.network, closed, self.patience))
            except UserError as error:
                self.sums.keys = []  # a helper that has lost its records makes a new key
                self.reason = str(error)
        nothing = torch.zeros(self._size, dtype=torch.float64)
        return Total(nothing if found is None else found, messages, 0, math.nan, void=found is None)

    def end(self) -> None:
        """Ask the helpers to erase their keys for the run; a helper that does not is named in the log."""
        if not self._has_keys:
            return
        try:
            missing = end_run(self.network, self.run, self.sums.parties.pinned, _END_SECONDS)
        except Exception as error:  # the end of the run matters more
            missing = {key.hex(): f"{type(error).__name__}: {error}" for key in self.sums.parties.pinned}
        for identity, why in sorted(missing.items()):
            _log.warning("helper %s has not erased its key for the run: %s", identity[:16], why)


def masked_message(content: RecordDict) -> Masked:
    """Return the masked message in an untrusted answer.

    Raises:
        UserError: If there is none.
    """
    return Masked.from_bytes(masked_of(content))


def refuse_other_nodes(nodes: Nodes, plan: PrivacyPlan | None, parties: HelperList | None, streams: Streams) -> None:
    """Raise UserError unless real nodes have helpers and no seed, and simulated ones have no helpers.

    Args:
        nodes: Nodes of the run.
        plan: Its privacy plan.
        parties: Its helpers; None for none.
        streams: Source of its cohorts.
    """
    if parties is None:
        if plan is not None and plan.aggregation is not None and nodes.guarded:
            got = f"an empty list, although {_named(nodes.guarded)} have a home and a policy: this is no simulation"
            remedy = "Give the strategy helpers=..., the keys that the helpers' operators read out"
            raise UserError("helpers", "the identity keys of the helpers", got, remedy)
        return
    simulated = sorted({*range(len(nodes.clients))} - {*nodes.guarded})
    if simulated:
        got = f"{_named(simulated)} without a home: a simulation"
        remedy = "Remove helpers, which a simulation does without, or start nodes with `fedpriv deploy node`"
        raise UserError("helpers", "clients with a home, a policy and keys", got, remedy)
    if isinstance(streams, SeededStreams):
        remedy = "Remove seed: clients with a policy refuse seeds"
        raise UserError("seed", "None with helpers", streams.seed, remedy)


def _named(clients: Sequence[int]) -> str:
    more = f" and {len(clients) - _MAX_SHOWN} more" if len(clients) > _MAX_SHOWN else ""
    return f"clients {', '.join(map(str, clients[:_MAX_SHOWN]))}{more}"
