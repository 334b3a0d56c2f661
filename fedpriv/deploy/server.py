"""Deployment over Flower's network: connected nodes, answers in time, and their records in the run directory."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedpriv.deploy.checks import check_space
from fedpriv.deploy.coordinator import Coordinator, Outcome
from fedpriv.deploy.device.heads import HEAD, Head
from fedpriv.deploy.heads import HeadBook, newer_heads
from fedpriv.deploy.helper.messages import ACTION
from fedpriv.deploy.helpers import end_run, helper_answers, helper_keys
from fedpriv.deploy.operate.tally import Counts, Tally
from fedpriv.deploy.parties import client_in_words, clients_in_words
from fedpriv.deploy.status.record import StatusWriter, note_run
from fedpriv.deploy.sums import HelperList, SecureSums
from fedpriv.errors import UserError, number_of
from fedpriv.experiment.build import Experiment
from fedpriv.experiment.deployment import DeploymentChoice
from fedpriv.experiment.recorder import Recorder
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.flower.internals.app import SERVER_NODE, reason_in_short
from fedpriv.flower.messages import (
    CONFIG,
    FEDPRIV,
    TERMS,
    MessageFormat,
    ModelArrays,
    NodeInfo,
    ask_node_info,
    masked_of,
    printable,
    refused,
)
from fedpriv.flower.refusals import Refusal
from fedpriv.rounds import Total
from fedpriv.secure import Masked
from fedpriv.streams import SystemStreams
from fedpriv.tables import Record

__all__ = ["PARTICIPATION", "Network", "refuse_full_disk", "run_turns", "take_up", "with_secret_streams"]

PARTICIPATION = "participation.jsonl"

T = TypeVar("T")

_log = logging.getLogger("flwr")
_SECURE = f"{MessageType.QUERY}.{ACTION}"
_POLL_SECONDS = 0.2
_RETRY_SECONDS = 5.0
_QUESTION_SECONDS = 30.0
_END_SECONDS = 30.0
# A node asks for work every three seconds.
_SETTLING_SECONDS = 8.0
_SAY_SECONDS = 30.0

# Fixed time, after the deadline of a turn with a secret cohort, for reading and summing its answers.
_SUMMING_SHARE, _SUMMING_SECONDS = 0.05, 1.0


@dataclass
class Network:
    """Nodes of a Flower run, by client id, and the helpers of secure aggregation among them.

    The server asks each node once for its client id. A node that restarts gets another node id and is asked again. If
    two nodes have the same client id, the first one stays. Nodes that name the same helper are all asked: only answers
    with the helper's signature count, so no other node can take its place.

    Args:
        grid: Connection to the nodes.
        population: Maximum number of clients.
        nodes: The connected nodes by client id.
        seen: The clients that have been connected.
        leave_out: Whether a turn ends without waiting for clients that have never been connected.
        tally: Counter of the run's messages for metrics; None for none.
        helpers: Identity keys of connected helpers by node.
        met: Called after each look at the connected nodes.
    """

    grid: Grid
    population: int
    nodes: dict[int, int] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    leave_out: bool = False
    helpers: dict[int, str] = field(default_factory=dict)
    tally: Tally | None = None
    met: Callable[[], None] = lambda: None
    _asked_at: dict[int, float] = field(default_factory=dict)
    _questions: dict[str, int] = field(default_factory=dict)

    def meet(self) -> None:
        """Ask new nodes for their client ids, and record the nodes that answered and the nodes that left.

        A node that does not answer is asked again, because a killed process may have lost the question.
        """
        online, now = set(self.grid.get_node_ids()), time.monotonic()
        self.nodes = {client: node for client, node in self.nodes.items() if node in online}
        self.helpers = {node: identity for node, identity in self.helpers.items() if node in online}
        self._asked_at = {node: at for node, at in self._asked_at.items() if node in online}
        known = {*self.nodes.values(), *self.helpers}
        new = sorted(n for n in online - known if now - self._asked_at.get(n, -math.inf) >= _QUESTION_SECONDS)
        sent = self._push({node: Message(ask_node_info(), node, MessageType.TRAIN) for node in new})
        self._questions |= sent
        self._asked_at |= dict.fromkeys(new, now)
        for message_id, answer in self._pull(self._questions):
            node = self._questions.pop(message_id)
            if isinstance(answer, str):
                _log.warning("node %d: %s", node, answer)
            else:
                self._note_node(node, answer)
        self.met()

    def wait_for(self, clients: int, seconds: float) -> None:
        """Wait until at least `clients` clients are connected.

        Raises:
            UserError: If they are not connected after `seconds` seconds.
        """
        end = time.monotonic() + seconds
        while True:
            self.meet()
            if len(self.nodes) >= clients:
                return
            if time.monotonic() > end:
                remedy = "Start these nodes, add --wait to wait for them, or lower deployment.min_participants"
                expected = f"at least {clients} of {number_of(self.population, 'client')} within {seconds:g} s"
                got = f"{len(self.nodes)}, without {clients_in_words(self.absent)}"
                raise UserError("SuperNodes", expected, got, remedy)
            time.sleep(_POLL_SECONDS)

    def wait_for_all(self) -> None:
        """Wait until all clients are connected, and name those that are missing from time to time."""
        said_at = -math.inf
        while len(self.nodes) < self.population:
            self.meet()
            if self.absent and time.monotonic() - said_at > _SAY_SECONDS:
                said_at = time.monotonic()
                _log.warning("waiting for %s", clients_in_words(self.absent))
            time.sleep(_POLL_SECONDS)

    @property
    def absent(self) -> list[int]:
        """Clients that are not connected."""
        return [client for client in range(self.population) if client not in self.nodes]

    def settle(self) -> None:
        """Wait until all clients are connected, or none has connected for some seconds."""
        end, known = time.monotonic() + _SETTLING_SECONDS, len(self.nodes)
        while len(self.nodes) < self.population and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            self.meet()
            if len(self.nodes) > known:
                end, known = time.monotonic() + _SETTLING_SECONDS, len(self.nodes)

    def wait_for_helpers(
        self,
        pinned: Iterable[bytes],
        seconds: float,
        remedy: str = "Start the helper, and continue with --resume",
    ) -> None:
        """Wait until all helpers are connected: without one of them, clients would be charged for a void turn.

        Raises:
            UserError: If they are not connected after `seconds` seconds.
        """
        wanted, end = {one.hex() for one in pinned}, time.monotonic() + seconds
        while missing := sorted(wanted - set(self.helpers.values())):
            if time.monotonic() > end:
                got = f"silence of {', '.join(name[:16] for name in missing)}"
                raise UserError("helpers", f"a node of each helper within {seconds:g} s", got, remedy)
            time.sleep(_POLL_SECONDS)
            self.meet()

    def exchange(self, contents: dict[int, RecordDict], seconds: float, group: str) -> dict[int, Message | str]:
        """Send each client its content, and return the answers that arrive in time, by client.

        A client that joins or returns before the deadline gets its content then. A silent client is asked again at half
        time: it answers the same request with the same bytes. Instructions expire with their turn, so that no client
        works, and pays, for a turn that is over.

        Args:
            contents: Contents by client.
            seconds: Time until the deadline.
            group: Name of the turn in Flower's log.

        Returns:
            Answers by client, with a text in place of an unreadable answer.
        """
        end = time.monotonic() + seconds
        again = max(seconds / 2.0, _RETRY_SECONDS)
        waiting: dict[str, int] = {}
        asked: dict[str, int] = {}
        answers: dict[int, Message | str] = {}
        send_at = dict.fromkeys(contents, 0.0)
        while self._awaited(contents, answers) and (left := end - time.monotonic()) > 0.0:
            self.meet()
            now = time.monotonic()
            due = [c for c in contents if c not in answers and c in self.nodes and send_at[c] <= now]
            sent = self._push({c: _message(contents[c], self.nodes[c], left, group) for c in due})
            waiting |= sent
            asked |= {message_id: self.nodes[client] for message_id, client in sent.items()}
            reached = set(sent.values())
            send_at |= {client: now + (again if client in reached else _RETRY_SECONDS) for client in due}
            for message_id, answer in self._pull(waiting):
                client = waiting.pop(message_id)
                by = asked[message_id] if isinstance(answer, str) else answer.metadata.src_node_id
                if not isinstance(answer, str) and answer.has_error() and by == SERVER_NODE:
                    send_at[client] = min(send_at[client], now + _RETRY_SECONDS)  # its node is gone but may return
                elif by == asked[message_id]:
                    answers.setdefault(client, answer)
                else:
                    _log.warning("node %d answered a message for another node: ignored", by)
            waiting = {message_id: client for message_id, client in waiting.items() if client not in answers}
            time.sleep(_POLL_SECONDS)
        return answers

    def _awaited(self, contents: Mapping[int, RecordDict], answers: Mapping[int, Message | str]) -> bool:
        """Return whether an answer of some client is still waited for."""
        return any(c not in answers and (c in self.seen or not self.leave_out) for c in contents)

    def ask_helpers(
        self,
        contents: Mapping[str, RecordDict],
        read: Callable[[str, RecordDict], T],
        seconds: float,
        group: str,
    ) -> tuple[dict[str, T], dict[str, str]]:
        """Send each helper its content; return the answers in time, and the reasons why others are missing.

        A silent helper is asked again: it answers the same question with the same bytes.

        Args:
            contents: Contents by identity key of the helper.
            read: Returns a helper's answer in a content, or raises `UserError` if it is not that helper's.
            seconds: Time until the deadline.
            group: Name of the turn in Flower's log.
        """
        end = time.monotonic() + seconds
        again = max(seconds / 4.0, _RETRY_SECONDS)
        found: dict[str, T] = {}
        reasons: dict[str, str] = {}
        waiting: dict[str, int] = {}
        send_at: dict[int, float] = {}
        while (left := end - time.monotonic()) > 0.0:
            self.meet()
            now = time.monotonic()
            open_nodes = {n: who for n, who in self.helpers.items() if who in contents and who not in found}
            due = [node for node in open_nodes if send_at.get(node, 0.0) <= now]
            waiting |= self._push({n: _message(contents[open_nodes[n]], n, left, group, _SECURE) for n in due})
            send_at |= dict.fromkeys(due, now + again)
            for message_id, answer in self._pull(waiting):
                node = waiting.pop(message_id)
                identity = self.helpers.get(node, "")
                if isinstance(answer, str) or answer.has_error():  # its node may return
                    reasons[identity] = answer if isinstance(answer, str) else reason_in_short(answer.error)
                    continue
                try:
                    found[identity] = read(identity, _not_refused(answer.content))
                except UserError as error:
                    reasons[identity] = str(error)
                    send_at[node] = math.inf
            refused = {self.helpers[n] for n, at in send_at.items() if at == math.inf and n in self.helpers}
            pending = {self.helpers[n] for n, at in send_at.items() if at < math.inf and n in self.helpers}
            if all(identity in found or identity in refused - pending for identity in contents):
                break
            time.sleep(_POLL_SECONDS)
        missing = {who: printable(reasons.get(who, "silence")) for who in contents if who not in found}
        return found, missing

    def _push(self, messages: dict[int, Message]) -> dict[str, int]:
        """Send messages, and return the keys of those that Flower accepted, by their message ids."""
        if not messages:
            return {}
        if self.tally is not None:
            self.tally.sent(message.content for message in messages.values())
        ids = list(self.grid.push_messages(list(messages.values())))
        if not ids:
            remedy = "Choose a smaller model: the messages may be too large"
            raise UserError(
                "SuperLink", f"it to accept {number_of(len(messages), 'message')}", "a refusal of all", remedy
            )
        return {message_id: key for message_id, key in zip(ids, messages, strict=False) if message_id}

    def _pull(self, waiting: Mapping[str, int]) -> list[tuple[str, Message | str]]:
        """Return the answers to messages with the ids of those messages; a text in place of an unreadable answer.

        Answers, including their ids, come from nodes and are not trusted.
        """
        if not waiting:
            return []
        try:
            found = list(self.grid.pull_messages(list(waiting)))
        except Exception:
            return [pair for message_id in waiting for pair in self._pull_one(message_id)]
        if self.tally is not None:
            self.tally.received(answer.content for answer in found if answer.has_content())
        by_id = {answer.metadata.reply_to_message_id: answer for answer in found}
        return [(message_id, answer) for message_id, answer in by_id.items() if message_id in waiting]

    def _pull_one(self, message_id: str) -> list[tuple[str, Message | str]]:
        try:
            found = list(self.grid.pull_messages([message_id]))
        except Exception as error:
            return [(message_id, f"an answer that cannot be read ({type(error).__name__})")]
        return [(message_id, answer) for answer in found if answer.metadata.reply_to_message_id == message_id]

    def _note_node(self, node: int, answer: Message) -> None:
        if answer.has_error():
            _log.warning("node %d: %s", node, printable(reason_in_short(answer.error)))
            return
        found = NodeInfo.of_answer(answer.content)
        if found is not None and found.helper:
            self.helpers[node] = found.helper
        elif found is None or found.client is None or not 0 <= found.client < self.population:
            given = None if found is None else found.client
            _log.warning("node %d: partition-id %s, expected 0 to %d: ignored", node, given, self.population - 1)
        elif self.nodes.get(found.client, node) != node:
            _log.warning("node %d: client %d is already connected: ignored", node, found.client)
        else:
            self.nodes[found.client] = node
            self.seen.add(found.client)


def refuse_full_disk(path: Path, experiment: Experiment) -> None:
    """Raise UserError if a run's checkpoints and models cannot fit on the disk: clients would be charged in vain."""
    model = experiment.initial_model
    state = experiment.server.init(model)
    # A checkpoint is written beside the former one; the first model and the last one stay.
    wanted = 2 * sum(part.numel() * part.element_size() for part in state) + 8 * model.numel()
    (space,) = check_space(path, 0.0, "", least=wanted)
    if space.state == "wrong":
        expected, remedy = f"room for checkpoints and models, {wanted:,} bytes", "Free some, or choose another --out"
        raise UserError(str(path), expected, space.line.split(";")[0], remedy)


def with_secret_streams(experiment: Experiment) -> Experiment:
    """Return the experiment with cohorts and noise from the operating system.

    Batches, and the groups of clients that take turns, still follow from the seed.
    """
    streams = SystemStreams(experiment.config.seed)
    rules = replace(experiment.population.rules, streams=streams)
    population = replace(experiment.population, rules=rules)
    return replace(experiment, server=replace(experiment.server, streams=streams), population=population)


def take_up(
    experiment: Experiment, directory: RunDirectory, recorder: Recorder, helpers: HelperList | None = None
) -> Coordinator:
    """Return the run in its last saved state, or in its initial state, with consistent records.

    A turn is saved before its row is written, so that a crash cannot undo published results. A row that is missing for
    that reason is written now.

    Args:
        experiment: The experiment.
        directory: The run directory.
        recorder: Writer of its records.
        helpers: Helpers of secure aggregation; None for none.

    Raises:
        UserError: If rounds are recorded but their checkpoint is missing, or if the plan has other helpers.
    """
    config = experiment.config
    sums = None
    if config.sums_securely and experiment.plan is not None:
        sums = SecureSums(experiment.plan, helpers or HelperList(()))
    coordinator = Coordinator(
        server=experiment.server,
        client=experiment.population.rules,
        plan=experiment.plan,
        choice=config.deployment or DeploymentChoice(),
        turns=config.training.rounds,
        digest=config.digest,
        state=experiment.server.init(experiment.initial_model),
        sums=sums,
    )
    saved = directory.saved(config.digest, recorder.promise)
    if saved is not None:
        _, server, tensors = saved
        coordinator.restore(type(coordinator.state)(**server), tensors)
    elif any(row["round"] > 0 for name in (PARTICIPATION, "rounds.jsonl") for row in directory.rows(name)):
        expected, got = "the checkpoint of the recorded rounds", "a missing file"
        remedy = "Restore it, since clients have paid for these rounds, or choose a new --out for a new run"
        raise UserError(str(directory.checkpoint.path), expected, got, remedy)
    recorder.begin()
    directory.keep_rows(PARTICIPATION, coordinator.turn)
    recorder.replayed(coordinator.turn, coordinator.asked_times)
    if len(directory.rows("rounds.jsonl")) <= coordinator.turn:
        recorder.initial(coordinator.state.model, coordinator.turn)
    return coordinator


def run_turns(
    grid: Grid,
    experiment: Experiment,
    coordinator: Coordinator,
    arrays: ModelArrays,
    recorder: Recorder,
    directory: RunDirectory,
    *,
    wait_for_all: bool = False,
) -> Record:
    """Run the remaining turns, and return the summary.

    Args:
        grid: Connection to the nodes.
        experiment: The experiment.
        coordinator: The run.
        arrays: Layout of the model.
        recorder: Writer of the run's records.
        directory: The run directory.
        wait_for_all: Begin once all clients are connected, however long that takes.

    Raises:
        UserError: If clients are missing at the start, or a turn stops the run; --resume continues it.
    """
    choice = experiment.config.deployment or DeploymentChoice()
    population = experiment.population.federation.population
    network = Network(grid, population, leave_out=choice.absent == "leave-out")
    status = StatusWriter(directory, experiment.config.name, population, coordinator.turns)
    network.met = lambda: status.note(coordinator.turn, network.nodes, network.helpers)
    note_run(directory.path)
    if wait_for_all:
        network.wait_for_all()
    network.wait_for(max(choice.min_participants, coordinator.least_messages), choice.join_timeout)
    network.settle()
    _warn_of_absent(network, coordinator)
    network.tally = _tally_of(coordinator, directory)

    book = HeadBook.of_deployment(directory.path)
    coordinator.heads = newer_heads(coordinator.heads, book.heads)

    def save() -> None:
        directory.save(
            coordinator.digest, recorder.promise, coordinator.turn, coordinator.state._asdict(), coordinator.save()
        )
        book.keep(coordinator.heads)

    def received(content: RecordDict) -> Tensor:
        return arrays.received(content, MessageFormat.of(coordinator.client))

    seconds = coordinator.turn_seconds
    if coordinator.secret_cohorts:
        left = coordinator.turns - coordinator.turn
        _log.info("Every turn lasts %g s, regardless of who takes part (deployment.deadline); %d remain", seconds, left)
    while not coordinator.done:
        began = time.monotonic()
        if coordinator.sums is None:
            coordinator.begin()
            save()
            answers = _exchanged(network, coordinator, arrays)
            replies, refusals, failed = _read(answers.items(), received)
            with _noted(directory, network, coordinator, set(replies), refusals, failed):
                outcome = coordinator.finish(replies, refusals, _heads(answers))
        else:
            outcome, failed = _secure_turn(network, coordinator, arrays, choice.join_timeout, save, directory)
        save()
        if coordinator.secret_cohorts:
            # The times of the model and of the next turn must not depend on who answers or on the time of the sum.
            _sleep_until(began + seconds * (1.0 + _SUMMING_SHARE) + _SUMMING_SECONDS)
        directory.append(PARTICIPATION, _row(outcome, failed, set(network.nodes)))
        _count(network, coordinator, outcome, failed, time.monotonic() - began)
        status.note(coordinator.turn, network.nodes, network.helpers, now=True)
        _report(outcome, failed)
        recorder.after_round(outcome.turn, coordinator.state, outcome.total, None, coordinator.asked_times)
    if coordinator.sums is not None:
        missing = end_run(network, coordinator.run, coordinator.sums.parties.pinned, _END_SECONDS)
        for identity, why in sorted(missing.items()):
            _log.warning("helper %s has not erased its key for the run: %s", identity[:16], why)
    return recorder.finish(coordinator.state)


def _tally_of(coordinator: Coordinator, directory: RunDirectory) -> Tally:
    """Return the counter of a run's messages for metrics."""
    plan = coordinator.plan
    epsilon = plan.epsilon if plan is not None and plan.private else None
    counts = Counts(run=directory.path.name, id=coordinator.run[:12], turns=coordinator.turns, epsilon=epsilon)
    tally = Tally.of_run(counts, coordinator.secret_cohorts)
    tally.counts.epsilon_left = _epsilon_left(coordinator)
    tally.save()
    return tally


def _epsilon_left(coordinator: Coordinator) -> float | None:
    plan = coordinator.plan
    if plan is None or not plan.private:
        return None
    return max(plan.epsilon - (plan.epsilon_after(coordinator.turn) if coordinator.turn else 0.0), 0.0)


def _count(
    network: Network, coordinator: Coordinator, outcome: Outcome, failed: Mapping[int, str], seconds: float
) -> None:
    if network.tally is None:
        return
    answered = len(outcome.asked) - len(outcome.silent) - len(outcome.refused) - len(outcome.invalid)
    messages = {
        "answers": answered,
        "unusable": len(outcome.invalid) + len(failed),
        "missing": sum(client not in failed for client in outcome.silent),
        "refusals": [kind for kind, _ in outcome.refused.values()],
    }
    network.tally.turn(outcome.happened, seconds, _epsilon_left(coordinator), messages)


def _warn_of_absent(network: Network, coordinator: Coordinator) -> None:
    if not network.absent:
        return
    cost, remedy = f"a turn that asks one of them lasts {coordinator.turn_seconds:g} s", ""
    if coordinator.secret_cohorts:
        cost = "their messages count as zero"
    elif network.leave_out:
        cost = "turns do not wait for them"
    else:
        remedy = ', or set deployment.absent = "leave-out" to go on without them'
    everyone = f"To wait for all at the start, add --wait{remedy}"
    _log.warning("not connected: %s; %s. %s", clients_in_words(network.absent), cost, everyone)


@contextmanager
def _noted(
    directory: RunDirectory,
    network: Network,
    coordinator: Coordinator,
    usable: set[int],
    refusals: Mapping[int, tuple[str, str]],
    failed: dict[int, str],
) -> Iterator[None]:
    """Write a turn's row also if the turn stops the run; resumption asks the same again, and replaces the row."""
    asked, turn, began = coordinator.asked(), coordinator.turn + 1, time.monotonic()
    try:
        yield
    except UserError as error:
        outcome = Outcome(
            turn=turn,
            happened="stopped",
            asked=asked,
            counted=[],
            refused=dict(refusals),
            invalid={},
            total=Total(torch.zeros(0), 0, 0, math.nan),
            reason=str(error),
            _unused=tuple(usable),
        )
        directory.append(PARTICIPATION, _row(outcome, failed, set(network.nodes)))
        _count(network, coordinator, outcome, failed, time.monotonic() - began)
        raise


def _secure_turn(
    network: Network,
    coordinator: Coordinator,
    arrays: ModelArrays,
    patience: float,
    save: Callable[[], None],
    directory: RunDirectory,
) -> tuple[Outcome, dict[int, str]]:
    """Run a turn under secure aggregation, or its rest; return its outcome, and failures by client.

    Args:
        network: The nodes.
        coordinator: The run.
        arrays: Layout of the model.
        patience: Seconds to wait for helpers that are not connected, before any client is asked.
        save: Writes a checkpoint.
        directory: The run directory.

    Raises:
        UserError: If a helper is missing before the turn; nothing was charged.
    """
    sums, outcome, failed = coordinator.sums, None, dict[int, str]()
    if sums is None:
        raise RuntimeError("no secure aggregation")
    if coordinator.closed is None:
        network.wait_for_helpers(sums.parties.pinned, patience)
        if not sums.keys:
            sums.keys = helper_keys(network, coordinator.run, sums.parties.pinned, patience)
        coordinator.begin()
        save()
        answers = _exchanged(network, coordinator, arrays)
        messages, refusals, failed = _read(answers.items(), lambda content: Masked.from_bytes(masked_of(content)))
        with _noted(directory, network, coordinator, set(messages), refusals, failed):
            outcome = coordinator.close(messages, refusals, _heads(answers))
        if outcome is None:
            save()  # a server that forgot U could ask only about another one, which helpers refuse
    closed = coordinator.closed
    if closed is not None:
        try:
            outcome = coordinator.conclude(helper_answers(network, closed, coordinator.turn_seconds))
        except UserError as error:
            outcome = coordinator.conclude((), str(error))
    if outcome is None:
        raise RuntimeError("a turn without an outcome")
    return outcome, failed


def _exchanged(network: Network, coordinator: Coordinator, arrays: ModelArrays) -> dict[int, Message | str]:
    """Send the instructions of the open turn, and return the answers in time, by client."""
    broadcast = coordinator.begin()
    question = arrays.question(broadcast.model, broadcast.shared)
    shared = {**question, CONFIG: ConfigRecord({"experiment": coordinator.digest})}
    contents = {}
    for client in coordinator.asked():
        instructions, terms = coordinator.instructions(client)
        shown = {HEAD: coordinator.heads[client].to_record()} if client in coordinator.heads else {}
        contents[client] = RecordDict({**shared, FEDPRIV: instructions.to_record(), TERMS: terms.to_record(), **shown})
    return network.exchange(contents, coordinator.turn_seconds, str(broadcast.address))


def _sleep_until(moment: float) -> None:
    time.sleep(max(moment - time.monotonic(), 0.0))


def _message(content: RecordDict, node: int, seconds: float, group: str, kind: str = MessageType.TRAIN) -> Message:
    return Message(content, node, kind, ttl=max(seconds, 1.0), group_id=group)


def _not_refused(content: RecordDict) -> RecordDict:
    """Return the content of a helper's answer.

    Raises:
        UserError: If it is a refusal; the text is the helper's.
    """
    no = refused(content)
    if no is not None:
        raise Refusal.because("policy", f"a refusal ({no[1].rstrip('.')})")
    return content


def _read(
    answers: Iterable[tuple[int, Message | str]], received: Callable[[RecordDict], T]
) -> tuple[dict[int, T], dict[int, tuple[str, str]], dict[int, str]]:
    """Return messages, refusals and failures by client; every answer is one of the three.

    Args:
        answers: Answers by client, with a text in place of an unreadable one.
        received: Returns the message in a content, or raises `UserError`.
    """
    replies: dict[int, T] = {}
    refusals: dict[int, tuple[str, str]] = {}
    failed: dict[int, str] = {}
    for client, answer in answers:
        try:
            if isinstance(answer, str):
                failed[client] = answer
            elif answer.has_error():
                failed[client] = printable(reason_in_short(answer.error))
            elif (no := refused(answer.content)) is not None:
                refusals[client] = no
            else:
                replies[client] = received(answer.content)
        except UserError as error:
            failed[client] = printable(error)
        except Exception as error:
            failed[client] = f"an answer that cannot be read ({type(error).__name__})"
    return replies, refusals, failed


def _heads(answers: Mapping[int, Message | str]) -> dict[int, Head]:
    """Return the heads of ledgers in answers, by client."""
    contents = {i: a.content for i, a in answers.items() if not isinstance(a, str) and a.has_content()}
    heads = {client: Head.of(content) for client, content in contents.items()}
    return {client: head for client, head in heads.items() if head is not None}


def _row(outcome: Outcome, failed: dict[int, str], online: set[int]) -> dict[str, object]:
    silent = [client for client in outcome.silent if client not in failed]
    return {
        "round": outcome.turn,
        "happened": outcome.happened,
        "asked": outcome.asked,
        "counted": outcome.counted,
        "late": [client for client in silent if client in online],
        "gone": [client for client in silent if client not in online],
        "refused": {str(client): {"kind": kind, "reason": why} for client, (kind, why) in outcome.refused.items()},
        "invalid": {str(client): why for client, why in outcome.invalid.items()},
        "failed": {str(client): why for client, why in failed.items()},
        **({"reason": outcome.reason} if outcome.reason else {}),
    }


def _report(outcome: Outcome, failed: dict[int, str]) -> None:
    if outcome.happened != "applied":
        why = f" ({outcome.reason})" if outcome.reason else ""
        _log.warning("turn %d: %s%s; its messages are not used", outcome.turn, outcome.happened, why)
    for client, (kind, why) in outcome.refused.items():
        _log.warning("turn %d: %s refuses (%s): %s", outcome.turn, client_in_words(client), kind, why)
    for client, why in {**outcome.invalid, **failed}.items():
        _log.warning("turn %d: %s: %s", outcome.turn, client_in_words(client), why)
    if outcome.silent:
        _log.warning("turn %d: no answer in time from %s", outcome.turn, clients_in_words(outcome.silent))
