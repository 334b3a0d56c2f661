"""A client of a deployment: guards itself, remembers durably, and never noises a message twice.

What happens to an order, and what is on the disk when it is interrupted there:

1. It is checked against the client's policy, and its turn against the client's record: nothing has changed.
2. The message is made: nothing has changed, and the same order may be followed anew.
3. The message and the memory after it are written beside the memory, which still holds. Only this takes up room: a disk
   that is full ends it here, or in the next step, and nothing is charged.
4. The release is written to the ledger: it is counted, though nothing was sent. The ledger is never too low. The next
   order finds the message that is in the ledger, and takes the fifth step.
5. What was written beside the memory takes its place: from now on the same request gets the same message.
6. The message is sent, and with it the signed head of the ledger.

Before 2, the ledger is compared with every witness of how long it was: the memory file of each run, and the head that
the server shows (`fedpriv.deploy.device.heads`). A ledger that was lost, or is an older copy, stops every run, not only
its own.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fedpriv.deploy.device.heads import Head, LedgerKey
from fedpriv.deploy.device.ledger import LOCK_FILE, Entry, Ledger, in_words, spent, surely_within
from fedpriv.deploy.device.memory import MemoryFile, Record, remembered_ledgers
from fedpriv.deploy.device.policy import POLICY_FILE, Policy, load_policy
from fedpriv.engines import one_thread
from fedpriv.errors import UserError
from fedpriv.files import make_private_folder, only_one
from fedpriv.flower.messages import ClientInstructions, RunTerms, method_name
from fedpriv.flower.refusals import Refusal
from fedpriv.methods import ClientState, has_memory
from fedpriv.rounds import client_round
from fedpriv.streams import Streams, SystemStreams

__all__ = ["Device"]

STATE_FOLDER = "state"

_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class Device:
    """The client whose home is a folder with its policy; its memories and its ledger are in `state` below it.

    Args:
        policy: What it agrees to.
        folder: Where its records are.
        streams: Where its noise comes from; anything but the operating system is for tests.
    """

    policy: Policy
    folder: Path
    streams: Streams = field(default_factory=SystemStreams)

    @classmethod
    def at(cls, home: Path, streams: Streams | None = None) -> "Device":
        """The client at home in a folder; a `UserError` if its policy cannot be read."""
        return cls(load_policy(home / POLICY_FILE), home / STATE_FOLDER, streams or SystemStreams())

    def answer(
        self,
        instructions: ClientInstructions,
        terms: RunTerms,
        model: Tensor,
        make_signal: Callable[[], Tensor],
        shown: Head | None = None,
        settings: str = "",
    ) -> Tensor:
        """The message `[params]` for an order, on the disk before it is returned.

        Args:
            instructions: What is asked.
            terms: Where the server stands, and what it promises.
            model: x, `[params]`.
            make_signal: Gives what the client would send without privacy, `[params]`; called only if a message is made.
            shown: The head of this client's ledger that the server shows; None if it shows none, as servers of before
                heads did: then only the client's own files say how long the ledger was.
            settings: Anything else that was asked and that the signal depends on.

        Raises:
            Refusal: If the order is not followed; nothing is sent and no memory moves.
        """
        try:
            return self._answer(instructions, terms, model, make_signal, shown, settings)
        except Refusal:
            raise
        except UserError as error:
            raise Refusal.because("trouble", str(error)) from None
        except OSError as error:
            line = f"{error.filename or self.folder}: {error.strerror or error}"
            raise Refusal.because("trouble", line) from None
        except Exception as error:
            raise Refusal.because("trouble", f"{type(error).__name__}: {error}") from error

    def head(self) -> Head | None:
        """Return the signed head of the ledger, for the server to keep; None while nothing was released.

        Raises:
            UserError: If the key or the ledger's own note of its length cannot be read.
        """
        last = Ledger(self.folder).noted()
        return None if last is None or last[0] < 1 else self._key.sign(*last)

    @property
    def _key(self) -> LedgerKey:
        return LedgerKey.at(self.folder.parent)

    def _answer(
        self,
        instructions: ClientInstructions,
        terms: RunTerms,
        model: Tensor,
        make_signal: Callable[[], Tensor],
        shown: Head | None,
        settings: str,
    ) -> Tensor:
        self._check(instructions, terms, model)
        request = _digest(instructions, terms, model, settings)
        memory, ledger = MemoryFile(self.folder, terms.run, instructions.client), Ledger(self.folder)
        make_private_folder(self.folder)
        with only_one(self.folder / LOCK_FILE):
            memory.complete(ledger.holds)
            record = _in_epoch(memory.read(), terms)
            if terms.turn <= record.latest_turn:
                return _given_before(record, terms, request)
            past, entry = ledger.entries(), _entry(instructions, terms, request)
            self._refuse_forgotten(ledger, shown)
            settled = _settled(instructions, terms, record)
            state = _state(instructions, settled, len(model))
            _refuse_released(past, entry)
            self._afford(past, entry)
            with one_thread():
                signal = make_signal().float().reshape(-1)
                if not bool(torch.isfinite(signal).all()):
                    _log.warning("client %d: its update is not finite and counts as nothing", instructions.client)
                message, after = self._make(instructions, terms, state, signal)
            line = ledger.drafted(entry)
            answered = settled.answered(terms.turn, after._asdict(), request, message, line.lines, line.digest)
            memory.prepare(answered)
            try:
                ledger.append(line)
            except UserError:
                memory.drop()
                raise
            memory.finish()
        return message

    def _check(self, instructions: ClientInstructions, terms: RunTerms, model: Tensor) -> None:
        if (
            terms.turn < 1
            or not 0 <= terms.last_turn < terms.turn
            or terms.turn > terms.rounds
            or instructions.round < 1
        ):
            got = f"turn {terms.turn} of {terms.rounds} after turn {terms.last_turn}"
            raise Refusal("model", "turn", "one after the other", got, "Ask the server's operator")
        self.policy.check(instructions, terms, model.numel())
        if not bool(torch.isfinite(model).all()):
            raise Refusal(
                "model", "model", "finite numbers", "NaN or infinity", "Start the run again from a sound model"
            )

    def _refuse_forgotten(self, ledger: Ledger, shown: Head | None) -> None:
        """Raises UserError if any witness knows of releases that the ledger does not."""
        for path, lines, digest in remembered_ledgers(self.folder):
            ledger.refuse_without(lines, digest, f", as {path} remembers it")
        key = self._key
        if shown is None:
            return
        if shown.key == key.public and shown.valid:
            ledger.refuse_without(shown.lines, shown.hash, ", as this client has signed it and the server shows it")
        else:
            _log.warning("the server shows a ledger of this client that another key has signed: not believed")

    def _afford(self, past: list[Entry], entry: Entry) -> None:
        limits = self.policy.limits
        if entry.trust_rules is None:  # which the policy accepts
            return
        # What was once sent without a promise cannot be made up for, unless the client's operator accepts that still.
        releases = [*(e for e in past if e.trust_rules is not None or not self.policy.accepts.unpromised), entry]
        if surely_within(releases, limits.epsilon, limits.delta, limits.adjacency):
            return
        epsilon = spent(releases, limits.delta, limits.adjacency)
        if not epsilon <= limits.epsilon:
            expected = f"at most {limits.epsilon:g} at delta = {limits.delta:g}, over all runs"
            remedy = f"The budget of this client is used up; its operator decides in {POLICY_FILE}"
            raise Refusal("budget", "epsilon after another message", expected, in_words(epsilon), remedy)

    def _make(
        self, instructions: ClientInstructions, terms: RunTerms, state: ClientState, signal: Tensor
    ) -> tuple[Tensor, ClientState]:
        rules = replace(instructions.rules, streams=self.streams)
        message, after = client_round(
            rules, instructions.client, state, signal.cpu(), instructions.round, turn=terms.turn
        )
        return message.contiguous(), after


def _in_epoch(record: Record | None, terms: RunTerms) -> Record:
    """The record, or a fresh one if all memories were started anew since."""
    record = record or Record(epoch=terms.epoch)
    if terms.epoch < record.epoch:
        raise Refusal("stale", "epoch", f"at least {record.epoch}", terms.epoch, "An order from before a new start")
    if terms.epoch == record.epoch:
        return record
    # What was answered before stays known, so that no old order is answered again.
    ledger = {"ledger_lines": record.ledger_lines, "ledger_hash": record.ledger_hash}
    return Record(epoch=terms.epoch, committed_turn=record.latest_turn, **ledger)


def _given_before(record: Record, terms: RunTerms, request: str) -> Tensor:
    """The message that answered the same request."""
    if terms.turn == record.pending_turn and request == record.request and record.reply is not None:
        return record.reply
    expected = f"a turn after {record.latest_turn}, or what was asked in it"
    raise Refusal("stale", "turn", expected, terms.turn, "Each turn is answered once")


def _refuse_released(past: list[Entry], entry: Entry) -> None:
    """Raises Refusal if a message of this turn was written down, and may have been sent, that is not there any more."""
    if any(e.run == entry.run and e.client == entry.client and e.turn >= entry.turn for e in past):
        expected = f"a turn after {entry.turn}, which is in the ledger"
        raise Refusal("stale", "turn", expected, entry.turn, "Its message is lost, and no turn is noised twice")


def _settled(instructions: ClientInstructions, terms: RunTerms, record: Record) -> Record:
    """The record once it is known which turn counted last."""
    settled = record.settled(terms.last_turn)
    if settled is None and not has_memory(instructions.method):
        return Record(epoch=record.epoch, committed_turn=terms.last_turn)
    if settled is None:
        where, expected = f"memory of client {instructions.client}", f"its state after turn {terms.last_turn}"
        got = f"that after turn {record.latest_turn}" if record.latest_turn else "none"
        raise Refusal("lost", where, expected, got, "The server goes by its rule for lost memories")
    return settled


def _state(instructions: ClientInstructions, record: Record, size: int) -> ClientState:
    """The state that the order goes on from."""
    fresh = instructions.method.init_client(size)
    if record.committed_turn == 0 or not fresh._fields:
        return fresh
    shapes = {name: tuple(field.shape) for name, field in fresh._asdict().items()}
    kept = {name: tuple(field.shape) for name, field in record.committed.items()}
    if kept != shapes:
        raise Refusal("model", "model", f"one whose memory has the shapes {kept}", shapes, "Start a new run for it")
    if not all(bool(torch.isfinite(field).all()) for field in record.committed.values()):
        where, remedy = f"memory of client {instructions.client}", "The server goes by its rule for lost memories"
        raise Refusal("lost", where, "finite numbers", "NaN or infinity", remedy)
    return type(fresh)(**record.committed)


def _digest(instructions: ClientInstructions, terms: RunTerms, model: Tensor, settings: str) -> str:
    """Of everything that an answer depends on but the client's own data and memory."""
    asked = {**asdict(replace(instructions, last_round=0)), "name": method_name(instructions.method), **asdict(terms)}
    asked |= {"settings": settings} if settings else {}
    hashed = hashlib.sha256(json.dumps(asked, sort_keys=True, default=repr).encode())
    hashed.update(model.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def _entry(instructions: ClientInstructions, terms: RunTerms, request: str) -> Entry:
    shared = {k: v for k, v in asdict(terms).items() if k in Entry.__dataclass_fields__}
    return Entry(
        **shared,
        client=instructions.client,
        request=request,
        method=method_name(instructions.method),
        l2_bound=instructions.method.bounded.l2_bound,
        noise_stddev=instructions.noise_stddev,
    )
