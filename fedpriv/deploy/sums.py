"""Server's side of a run's sums under secure aggregation, without the network: the helpers' keys, U, and the total."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import RecordDict
from torch import Tensor

from fedpriv.deploy.facts import facts_of
from fedpriv.errors import UserError
from fedpriv.flower.messages import FEDPRIV, TERMS, ClientInstructions, RunTerms
from fedpriv.privacy import PrivacyPlan
from fedpriv.secure import Answer, Closed, Collector, HelperKey, Masked, RoundFacts, VoidRoundError

__all__ = ["ClosedTurn", "HelperList", "SecureSums"]


@dataclass(frozen=True)
class HelperList:
    """Helpers and clients of a deployment, as the person who starts a run names them.

    Args:
        pinned: Public identity keys of the helpers.
        enrolled: Public keys of the clients; None leaves the check of signatures to the helpers.
        again: Reads them again, since clients may be added during a run; None if they do not change.
    """

    pinned: tuple[bytes, ...]
    enrolled: Mapping[int, bytes] | None = None
    again: Callable[[], Mapping[int, bytes]] | None = None

    @property
    def clients(self) -> Mapping[int, bytes] | None:
        """Public keys of the clients that are enrolled now; those of the start if the list cannot be read."""
        if self.again is not None:
            with suppress(UserError):
                return self.again()
        return self.enrolled


@dataclass(frozen=True, kw_only=True)
class ClosedTurn:
    """A turn after U was fixed, and before the helpers have answered.

    Args:
        asked: Clients that were asked, ascending.
        refused: Kind and reason by client.
        invalid: Fault of the message by client.
        content: The bytes of `Closed`.
    """

    asked: list[int]
    refused: dict[int, tuple[str, str]]
    invalid: dict[int, str]
    content: bytes

    @property
    def closed(self) -> Closed:
        """The masked sum and the queries."""
        return Closed.from_bytes(self.content)

    def save(self) -> dict[str, Tensor]:
        """Return the turn as tensors."""
        facts = {"asked": self.asked, "refused": list(self.refused.items()), "invalid": list(self.invalid.items())}
        return {"closing": _tensor(json.dumps(facts).encode()), "closed": _tensor(self.content)}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> "ClosedTurn | None":
        """Return the turn in saved tensors, if there is one."""
        if "closed" not in tensors:
            return None
        facts = json.loads(tensors["closing"].numpy().tobytes())
        refused = {int(client): (kind, why) for client, (kind, why) in facts["refused"]}
        invalid = {int(client): why for client, why in facts["invalid"]}
        content = tensors["closed"].numpy().tobytes()
        return cls(asked=facts["asked"], refused=refused, invalid=invalid, content=content)


@dataclass
class SecureSums:
    """Sums of a run.

    Args:
        plan: Its privacy plan.
        parties: Helpers and clients.
        keys: The helpers' keys for the run; empty until they are asked.

    Raises:
        UserError: If the plan has no noise, or another number of helpers.
    """

    plan: PrivacyPlan
    parties: HelperList
    keys: list[HelperKey] = field(default_factory=list)

    def __post_init__(self) -> None:
        numbers = self.plan.aggregation
        if numbers is None:
            raise ValueError(f"a plan without secure aggregation: {self.plan}")
        if not self.plan.private:
            remedy = "Set privacy.epsilon"
            raise UserError("privacy.noise_multiplier", "noise with secure aggregation in a deployment", 0.0, remedy)
        if len(set(self.parties.pinned)) != numbers.helpers:
            got = f"{len(set(self.parties.pinned))} in admin/helpers of the deployment"
            remedy = "Set aggregation.helpers, or make the deployment with `fedpriv deploy init --helpers`"
            raise UserError("helpers", f"aggregation.helpers = {numbers.helpers} helpers", got, remedy)

    @property
    def least(self) -> int:
        """t, the fewest clients in a sum."""
        return 0 if self.plan.aggregation is None else self.plan.aggregation.least_survivors

    def shown(self) -> tuple[str, ...]:
        """Return the helpers' keys for a client's terms."""
        return tuple(key.to_bytes().hex() for key in self.keys)

    def facts(
        self,
        instructions: ClientInstructions,
        terms: RunTerms,
        model: Tensor,
        shared: Tensor | None = None,
        settings: str = "",
    ) -> RoundFacts:
        """Return the facts of a turn from the instructions to any of its clients, as that client reads them.

        See `fedpriv.deploy.facts.facts_of`.
        """
        content = RecordDict({FEDPRIV: instructions.to_record(), TERMS: terms.to_record()})
        read = RunTerms.of(content)
        if read is None:
            raise RuntimeError("no terms")
        return facts_of(ClientInstructions.of(content), read, model, self.plan, shared, settings)

    def collected(self, facts: RoundFacts, messages: Mapping[int, Masked]) -> tuple[Collector, dict[int, str]]:
        """Return the collector of a turn's messages, and the faults of unusable ones.

        Args:
            facts: Facts of the turn.
            messages: Messages by the client that sent them.
        """
        collector = Collector(facts, self.keys, self.parties.pinned, self.parties.clients)
        invalid: dict[int, str] = {}
        for client, message in messages.items():
            try:
                if message.client != client:
                    raise UserError("message", f"one of client {client}", message.client, "Check the partition-id")
                collector.add(message)
            except UserError as error:
                invalid[client] = str(error)
        return collector, invalid

    def total(self, closed: Closed, answers: Sequence[Answer]) -> tuple[Tensor | None, str]:
        """Return the sum of a turn's noised messages, float64 `[params]`; None and a reason if the turn is void."""
        sums = self.plan.sums
        if sums is None:
            raise RuntimeError("a plan without secure aggregation")
        try:
            levels = closed.total(answers, sums.limit)
        except VoidRoundError as error:
            return None, str(error)
        return torch.from_numpy(levels.astype(np.float64)) * sums.step, ""


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
