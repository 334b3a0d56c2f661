"""Guard of a client behind `private_mod`: the client's policy, ledger and memory, independent of the server.

Under local trust, the server is the adversary. The node alone therefore decides whether and how a client is guarded,
never a message or a run config:

1. A node with a home is guarded. Its operator sets the home: `--node-config 'fedpriv-home="/absolute/path"'`. If the
   home has no policy `fedpriv-client.toml`, the guard writes one with strict defaults (trust local, epsilon 8). The
   client follows instructions as in a deployment (`fedpriv.deploy.device.device`): within the policy and the budget,
   each turn once, and the same instructions get the same bytes. It answers nothing else, except evaluations if the
   policy accepts them.
2. A process that simulates clients (`fedpriv.flower.simulation`) follows all instructions, including seeded ones.
3. Any other node refuses everything.

Failures of an app can depend on the data. An error instead of a message would therefore leak information to the server,
at no cost and as often as it asks. Under local trust, an app that fails thus counts as an app with a zero update: the
message is pure noise, the client pays for it, and only the client's own log mentions the failure.
"""

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
from fedpriv.deploy.facts import settings_digest
from fedpriv.errors import UserError
from fedpriv.flower.messages import (
    ClientInstructions,
    MessageFormat,
    ModelArrays,
    NodeInfo,
    RunTerms,
    masked_content,
)
from fedpriv.flower.refusals import Refusal
from fedpriv.flower.simulation import simulated

__all__ = ["HOME", "Guard", "answer_content", "content_of", "guard_of", "own_id", "refuse_unless_simulated", "terms_of"]

HOME = "fedpriv-home"
"""Key of a node's configuration for its home."""

_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class Guard:
    """Guard between an app and a server.

    Args:
        device: Client with its policy and its records.
        client: Client id set by the node's operator; None if it is not set.
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
        shared: Tensor | None,
    ) -> RecordDict:
        """Return the content of the answer to a training message: the arrays and the head of the ledger.

        Args:
            message: Received message.
            instructions: Instructions in it.
            model: Layout of the arrays.
            start: x, `[params]`.
            make_signal: Returns the message without privacy, `[params]`; raises a `Refusal` of kind `app` if the app
                fails.
            shared: The vector that the client received beside the model, `[params]`; None for none.

        Raises:
            Refusal: If the client does not follow the instructions.
        """
        terms = terms_of(message)
        if self.client is not None and instructions.client != self.client:
            remedy = "Check the partition-id of the nodes"
            raise Refusal("model", "instructions", f"client {self.client}", instructions.client, remedy)
        self.device.policy.check_app()
        shown, settings = Head.of(message.content), settings_digest(message.content)
        signal = partial(_signal_or_nothing, make_signal, instructions, start) if terms.against_server else make_signal
        answer = self.device.answer(instructions, terms, start, signal, shown, settings, shared)
        return answer_content(self.device, instructions, model, answer)

    def releases_metrics(self, message: Message) -> bool:
        """Return whether the app's metrics may leave: only if the run is not private and the policy accepts that."""
        return terms_of(message).trust_rules is None and self.device.policy.accepts.unpromised

    def evaluate(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Return the answer to a message of another type: the metrics of an evaluation, if the policy accepts it.

        Raises:
            Refusal: If the policy does not accept the message.
        """
        self.device.policy.check_evaluation(message.metadata.message_type.split(".")[0])
        metrics = content_of(call_next(message, context)).metric_records
        return Message(RecordDict({**metrics}), reply_to=message)


def guard_of(context: Context) -> Guard | None:
    """Return the guard of a node; None in a simulation.

    Raises:
        Refusal: If the node's home, or the policy in it, is invalid.
        UserError: If the node has no home.
    """
    home = context.node_config.get(HOME)
    if not home:
        refuse_unless_simulated()
        return None
    try:
        path = Path(str(home))
        if not path.is_absolute():
            remedy = "Give an absolute path, since Flower's processes run in other folders"
            raise UserError(f"--node-config {HOME}", "an absolute path", str(path), remedy)
        if write_default_policy(path):
            _log.warning("%s had no policy: wrote the default policy there. Read it.", path)
        return Guard(Device.at(path), own_id(context))
    except (UserError, OSError, ValueError) as error:  # the text may reveal the content of the disk
        raise Refusal.because("trouble", str(error)) from None


def refuse_unless_simulated() -> None:
    """Raise a `UserError` on a node without a home outside simulations, because its server cannot be trusted."""
    if not simulated():
        remedy = (
            f"Start the SuperNode with --node-config '{HOME}=\"/absolute/path\"', or nodes of a deployment with: "
            "fedpriv deploy node BUNDLE"
        )
        raise UserError("node", "a home with a policy", "a node without a home", remedy)


def content_of(answer: Message) -> RecordDict:
    """Return the content of an app's answer.

    Raises:
        UserError: If the answer is an error; it includes the reason.
    """
    if answer.has_error():
        raise UserError("app", "an answer", f"an error: {answer.error.reason}", "Fix the app")
    return answer.content


def own_id(context: Context) -> int | None:
    """Return the client id set by a node's operator; None if it is not set."""
    return NodeInfo.of_node(context.node_config).client


def terms_of(message: Message) -> RunTerms:
    """Return the terms in a message.

    Raises:
        Refusal: If there are no terms, or they cannot be parsed.
    """
    try:
        terms = RunTerms.of(message.content)
    except UserError as error:
        raise Refusal.because("model", str(error)) from None
    if terms is None:
        remedy = "Install the same version of fedpriv on the server"
        raise Refusal("model", "instructions", "the terms of a deployment", "a message without terms", remedy)
    return terms


def answer_content(device: Device, instructions: ClientInstructions, model: ModelArrays, answer: Tensor) -> RecordDict:
    """Return the content of an answer: the message, and the signed head of the client's ledger.

    Args:
        device: The client.
        instructions: Instructions that it has followed.
        model: Layout of the arrays.
        answer: Its message `[params]`, or the bytes of a masked one, uint8 `[bytes]`.
    """
    head = device.head()
    if answer.dtype == torch.uint8:
        records = masked_content(answer.numpy().tobytes())
    else:
        records = RecordDict({**model.message(answer, MessageFormat.of(instructions.rules))})
    return records if head is None else RecordDict({**records, HEAD: head.to_record()})


def _signal_or_nothing(make_signal: Callable[[], Tensor], instructions: ClientInstructions, start: Tensor) -> Tensor:
    """Return the signal of an app; if the app fails, a signal that is not finite and therefore counts as zero."""
    try:
        return make_signal()
    except Refusal as no:
        if no.kind != "app":
            raise
        words = "client %d: its app failed (%s). The server is not informed: the client sends pure noise."
        _log.error(words, instructions.client, no, exc_info=no.__cause__)
        return torch.full_like(start, math.nan)
