"""A client's own defense behind `private_mod`: its policy, ledger and memory, whatever a server asks.

Where trust is local the server is the adversary. So whether and how a client is guarded is decided by its node alone,
never by a message or a run config:

1. A node with a home is guarded. Its operator names the home: `--node-config 'fedpriv-home="/absolute/path"'`. The
   policy in it, `fedpriv-client.toml`, is written with strict defaults if there is none (trust local, epsilon 8).
   Orders are followed as in a deployment (`fedpriv.deploy.device.device`): within the policy and the budget, each turn
   once, and the same order gets the same bytes. Nothing else is answered, but evaluations if the policy accepts them.
2. A process that plays clients (`fedpriv.flower.simulation`) follows every order, seeded ones included.
3. Any other node answers nothing.

Whether an app fails can depend on the data, so that an error in place of a message would tell the server of them, for
nothing and as often as it asks. Where trust is local, an app that fails therefore counts as one whose update is zero:
the message is noise, it is paid for, and only the client's own log says so.
"""

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.heads import HEAD, Head
from fedpriv.deploy.device.policy import write_default_policy
from fedpriv.errors import UserError
from fedpriv.flower.messages import FEDPRIV, TERMS, ClientInstructions, MessageFormat, ModelArrays, NodeInfo, RunTerms
from fedpriv.flower.refusals import Refusal
from fedpriv.flower.simulation import simulated

__all__ = ["HOME", "Guard", "answer_content", "content_of", "guard_of", "own_id", "refuse_unless_simulated", "terms_of"]

HOME = "fedpriv-home"
"""The key of a node's configuration that names its home."""

_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class Guard:
    """What stands between an app and a server.

    Args:
        member: The client: its policy and its records.
        client: The id that its operator gave it; None if none was given.
    """

    device: Device
    client: int | None

    def train(
        self,
        message: Message,
        instructions: ClientInstructions,
        model: ModelArrays,
        start: Tensor,
        make_signal: Callable[[], Tensor],
    ) -> RecordDict:
        """Return the content of the answer to a training message: the arrays and the head of the ledger.

        Args:
            message: What came.
            instructions: The order in it.
            model: How arrays are laid out.
            start: x, `[params]`.
            make_signal: Gives what the client would send without privacy, `[params]`; a Refusal of the kind `app` if
                the app fails.

        Raises:
            Refusal: If the order is not followed.
        """
        terms = terms_of(message)
        if self.client is not None and instructions.client != self.client:
            raise Refusal("model", "order", f"one for client {self.client}", instructions.client, "It is another's")
        self.device.policy.check_app()
        shown, settings = Head.of(message.content), _settings(message.content)
        signal = partial(_signal_or_nothing, make_signal, instructions, start) if terms.against_server else make_signal
        answer = self.device.answer(instructions, terms, start, signal, shown, settings)
        return answer_content(self.device, instructions, model, answer)

    def releases_metrics(self, message: Message) -> bool:
        """Return whether the app's metrics may leave: if the run promises nothing, and the policy accepts that."""
        return terms_of(message).trust_rules is None and self.device.policy.accepts.unpromised

    def evaluate(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Return the answer to a message of another type: the metrics of an evaluation, if the policy accepts it.

        Raises:
            Refusal: If it does not.
        """
        self.device.policy.check_evaluation(message.metadata.message_type.split(".")[0])
        metrics = content_of(call_next(message, context)).metric_records
        return Message(RecordDict({**metrics}), reply_to=message)


def guard_of(context: Context) -> Guard | None:
    """Return the guard of a node; None in a simulation.

    Raises:
        Refusal: If the node's home, or the policy in it, is not right.
        UserError: If the node has no home.
    """
    home = context.node_config.get(HOME)
    if not home:
        refuse_unless_simulated()
        return None
    try:
        path = Path(str(home))
        if not path.is_absolute():
            raise UserError(f"--node-config {HOME}", "an absolute path", str(path), "Flower's processes work elsewhere")
        if write_default_policy(path):
            _log.warning("%s had no policy: the default one was written there. Read it.", path)
        return Guard(Device.at(path), own_id(context))
    except (UserError, OSError, ValueError) as error:  # in whose words may stand what is on the disk
        raise Refusal.because("trouble", str(error)) from None


def refuse_unless_simulated() -> None:
    """Raises UserError on a node without a home that is no simulation: its server may be anyone's."""
    if not simulated():
        remedy = (
            f"Start the SuperNode with --node-config '{HOME}=\"/absolute/path\"', or nodes of a deployment with: "
            "fedpriv deploy node BUNDLE"
        )
        raise UserError("node", "one with a home of its own, and a policy in it", "one without", remedy)


def content_of(answer: Message) -> RecordDict:
    """Return the content of an app's answer; a `UserError` with its reason if the answer is an error."""
    if answer.has_error():
        raise UserError("app", "an answer", f"an error: {answer.error.reason}", "Mend the app")
    return answer.content


def own_id(context: Context) -> int | None:
    """Return the client id that a node's operator gave it; None if none was given."""
    return NodeInfo.of_node(context.node_config).client


def terms_of(message: Message) -> RunTerms:
    """Return the terms in a message.

    Raises:
        Refusal: If there are none, or none that can be understood.
    """
    try:
        terms = RunTerms.of(message.content)
    except UserError as error:
        raise Refusal.because("model", str(error)) from None
    if terms is None:
        remedy = "The server needs a fedpriv of the same version"
        raise Refusal("model", "order", "terms, as deployments have them", "none", remedy)
    return terms


def answer_content(device: Device, instructions: ClientInstructions, model: ModelArrays, answer: Tensor) -> RecordDict:
    """Return the content of an answer: the message `[params]`, and the signed head of the client's ledger."""
    head, records = device.head(), model.message(answer, MessageFormat.of(instructions.rules))
    return RecordDict({**records} if head is None else {**records, HEAD: head.to_record()})


def _signal_or_nothing(make_signal: Callable[[], Tensor], instructions: ClientInstructions, start: Tensor) -> Tensor:
    """Return the signal of an app; one that is not finite, and so counts as nothing, if the app fails."""
    try:
        return make_signal()
    except Refusal as no:
        if no.kind != "app":
            raise
        words = "client %d: its app failed (%s). The server is not told: a message that holds noise alone goes out."
        _log.error(words, instructions.client, no, exc_info=no.__cause__)
        return torch.full_like(start, math.nan)


def _settings(content: RecordDict) -> str:
    """Return a digest of everything in a message that an app may read besides the model and the order."""
    hashed = hashlib.sha256()
    for name, record in sorted(content.items()):
        if name not in (FEDPRIV, TERMS, HEAD) and name not in content.array_records:
            hashed.update(repr((name, sorted(record.items()))).encode())
    return hashed.hexdigest()
