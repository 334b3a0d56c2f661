"""Client of a deployment, which enforces its own policy, stores its memory durably and never noises a message twice.

A device handles instructions in these steps; each line also gives the state on disk if the step is interrupted:

1. It checks the instructions against the client's policy, and the turn against the client's record. Nothing changes.
2. It computes the message. Nothing changes, and the device may follow the same instructions again.
3. It writes the message and the new memory next to the current memory, which stays valid. Only this step needs space: a
   full disk stops the device here or in the next step, and nothing is charged.
4. It writes the release to the ledger. The release counts even if it is never sent, so the ledger never underestimates.
   With the next instructions, the device finds the message of the last ledger entry and continues with step 5.
5. It replaces the memory by the new one. From now on, the same request gets the same message.
6. It sends the message together with the signed head of the ledger.

Under secure aggregation, the message of steps 2 to 6 is the masked one: its bytes are stored, charged and sent again.

Before step 2, the device compares the ledger with every record of its length: the memory file of each run, and the head
that the server sends (`fedpriv.deploy.device.heads`). A lost ledger, or an older copy of it, stops all runs.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from fedpriv.deploy.device.heads import Head, LedgerKey
from fedpriv.deploy.device.ledger import LOCK_FILE, Entry, Ledger, delta_of_runs, in_words, spent, surely_within
from fedpriv.deploy.device.masking import masks_of
from fedpriv.deploy.device.memory import MemoryFile, Record, remembered_ledgers
from fedpriv.deploy.device.policy import POLICY_FILE, Policy, load_policy
from fedpriv.engines import one_thread
from fedpriv.errors import UserError
from fedpriv.files import make_private_folder, only_one
from fedpriv.flower.messages import ClientInstructions, RunTerms, method_name
from fedpriv.flower.privacy_terms import PrivacyTerms
from fedpriv.flower.refusals import Refusal
from fedpriv.methods import ClientState, Method, has_memory, message_size, own_signal_of
from fedpriv.privacy import PrivacyPlan, UnitName
from fedpriv.rounds import client_round, integer_sums
from fedpriv.streams import Streams, SystemStreams

__all__ = ["Device"]

STATE_FOLDER = "state"

_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class Device:
    """Client with a home folder that holds its policy; its memories and its ledger are in the subfolder `state`.

    Args:
        policy: Policy of the client.
        folder: Folder of its records.
        streams: Source of its noise; any source other than the operating system is for tests.
    """

    policy: Policy
    folder: Path
    streams: Streams = field(default_factory=SystemStreams)

    @classmethod
    def at(cls, home: Path, streams: Streams | None = None) -> "Device":
        """Return the client with a home folder.

        Raises:
            UserError: If its policy cannot be read.
        """
        return cls(load_policy(home / POLICY_FILE), home / STATE_FOLDER, streams or SystemStreams())

    def answer(
        self,
        instructions: ClientInstructions,
        terms: RunTerms,
        model: Tensor,
        make_signal: Callable[..., Tensor],
        shown: Head | None = None,
        settings: str = "",
        shared: Tensor | None = None,
    ) -> Tensor:
        """Return the message for some instructions; it is on disk before this returns.

        It is `[params]`, or under secure aggregation the bytes of a `Masked`, uint8 `[bytes]`.

        Args:
            instructions: Instructions from the server.
            terms: State of the run, and the server's privacy terms.
            model: x, `[params]`.
            make_signal: Returns the message without privacy, `[params]`; called only if a new message is needed. If the
                method corrects local steps, the vector `[params]` to add to their gradients is its argument; if it has
                its own signal (`OwnSignal`), the client's state is the argument `state`.
            shown: Head of this client's ledger from the server; None if the server sends none, like servers before
                heads existed. Then only the client's own files bear witness to the length of the ledger.
            settings: Digest of any other input of the signal.
            shared: The vector `[params]` that the method sends beside the model; see `Broadcast.shared`.

        Raises:
            Refusal: If the device does not follow the instructions; nothing is sent, and no memory changes.
        """
        try:
            return self._answer(instructions, terms, model, make_signal, shown, settings, shared)
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
        """Return the signed head of the ledger for the server; None before the first release.

        Raises:
            UserError: If the key, or the file with the ledger's length, cannot be read.
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
        make_signal: Callable[..., Tensor],
        shown: Head | None,
        settings: str,
        shared: Tensor | None,
    ) -> Tensor:
        plan = self._check(instructions, terms, model, shared)
        masks = masks_of(self.policy, self.folder.parent, instructions, terms, model, plan, shared, settings)
        request = _digest(instructions, terms, model, settings, shared)
        memory, ledger = MemoryFile(self.folder, terms.run, instructions.client), Ledger(self.folder)
        make_private_folder(self.folder)
        with only_one(self.folder / LOCK_FILE):
            memory.complete(ledger.holds)
            record = _in_epoch(memory.read(), terms)
            if terms.turn <= record.latest_turn:
                return _given_before(record, terms, request)
            past, entry = ledger.entries(), _entry(instructions, terms, request)
            self._refuse_forgotten(ledger, shown)
            _refuse_changed(past, entry)
            settled = _settled(instructions, terms, record)
            state = _state(instructions, settled, len(model))
            _refuse_released(past, entry)
            _refuse_early(past, entry)
            self._afford(ledger, past, entry)
            with one_thread():
                exact = torch.float32 if instructions.example_terms is None else torch.float64
                signal = _signal(instructions.method, state, shared, make_signal).to(exact).reshape(-1)
                if not bool(torch.isfinite(signal).all()):
                    _log.warning("client %d: its update is not finite and counts as zero", instructions.client)
                message, after = self._make(instructions, terms, state, signal, plan, shared)
                reply = message if masks is None else masks.mask(message)
            line = ledger.drafted(entry)
            answered = settled.answered(terms.turn, after._asdict(), request, reply, line.lines, line.digest)
            memory.prepare(answered)
            try:
                ledger.append(line)
            except UserError:
                memory.drop()
                raise
            memory.finish()
        return reply

    def _check(
        self, instructions: ClientInstructions, terms: RunTerms, model: Tensor, shared: Tensor | None
    ) -> PrivacyPlan | None:
        if (
            terms.turn < 1
            or not 0 <= terms.last_turn < terms.turn
            or terms.turn > terms.rounds
            or instructions.round < 1
        ):
            got = f"turn {terms.turn} of {terms.rounds} after turn {terms.last_turn}"
            raise Refusal("model", "turn", "consecutive turns", got, "Ask the server's operator")
        plan = self.policy.check(instructions, terms, message_size(instructions.method, model.numel()))
        if not all(bool(torch.isfinite(sent).all()) for sent in (model, shared) if sent is not None):
            raise Refusal(
                "model", "model", "finite numbers", "NaN or infinity", "Start the run again from a finite model"
            )
        if (shared is not None) != instructions.method.needs_shared:
            expected, got = ("a second vector", "none") if shared is None else ("no second vector", "one")
            raise Refusal("model", "model", expected, got, "Use one version of fedpriv on both sides")
        return plan

    def _refuse_forgotten(self, ledger: Ledger, shown: Head | None) -> None:
        """Raise a `UserError` if any witness knows of releases that are missing in the ledger."""
        for path, lines, digest in remembered_ledgers(self.folder):
            ledger.refuse_without(lines, digest, f" according to {path}")
        key = self._key
        if shown is None:
            return
        if shown.key == key.public and shown.valid:
            ledger.refuse_without(shown.lines, shown.hash, " according to this client's signed head from the server")
        else:
            _log.warning("the server sends a head of this client's ledger with another key's signature: ignored")

    def _afford(self, ledger: Ledger, past: list[Entry], entry: Entry) -> None:
        limits = self.policy.limits
        if entry.trust_rules is None:  # accepted by the policy
            return
        # A release without a guarantee has infinite epsilon, unless the client's operator still accepts such releases.
        releases = [*(e for e in past if e.trust_rules is not None or not self.policy.accepts.unpromised), entry]
        delta = ledger.share(limits.delta)
        for unit, budget in self.policy.budgets.items():
            left = budget - ledger.charged
            if left > 0.0 and surely_within(releases, left, delta, limits.adjacency, unit):
                continue
            epsilon = spent(releases, delta, limits.adjacency, unit) + ledger.charged
            if not epsilon <= budget:
                self._refuse_deltas(releases, delta, unit)
                expected = f"at most {budget:g} at delta = {limits.delta:g} for one {unit}, over all runs"
                remedy = (
                    f"Runs that cost less may still fit. {POLICY_FILE} sets this client's total budget, in [limits]"
                )
                raise Refusal("budget", "epsilon after another message", expected, in_words(epsilon), remedy)

    def _refuse_deltas(self, releases: list[Entry], delta: float, unit: UnitName) -> None:
        """Raise a `Refusal` if the deltas of runs alone exceed what is left: no epsilon is finite then."""
        total = delta_of_runs(releases, self.policy.limits.adjacency, unit)
        if total > delta:
            expected = f"at most {delta:g} for all of them together, the rest of limits.delta in {POLICY_FILE}"
            remedy = "Runs without local trust cost their whole delta: choose a smaller privacy.delta for each run"
            raise Refusal("budget", "delta of this client's runs", expected, f"{total:g}", remedy)

    def _make(
        self,
        instructions: ClientInstructions,
        terms: RunTerms,
        state: ClientState,
        signal: Tensor,
        plan: PrivacyPlan | None,
        shared: Tensor | None,
    ) -> tuple[Tensor, ClientState]:
        sums = None if plan is None else integer_sums(plan)
        rules = replace(instructions.rules, streams=self.streams, sums=sums)
        message, after = client_round(
            rules, instructions.client, state, signal.cpu(), instructions.round, turn=terms.turn, shared=shared
        )
        return message.contiguous(), after


def _signal(method: Method, state: ClientState, shared: Tensor | None, make_signal: Callable[..., Tensor]) -> Tensor:
    """Return the signal of a client with this state; see `Device.answer`."""
    if own_signal_of(method) is not None:
        return make_signal(state=state)
    offset = method.step_offset(state, shared)
    return make_signal() if offset is None else make_signal(offset)


def _in_epoch(record: Record | None, terms: RunTerms) -> Record:
    """Return the record, or a new one if all memories have been reset since."""
    record = record or Record(epoch=terms.epoch)
    if terms.epoch < record.epoch:
        remedy = "Drop these instructions: they are from before a reset"
        raise Refusal("stale", "epoch", f"at least {record.epoch}", terms.epoch, remedy)
    if terms.epoch == record.epoch:
        return record
    # Earlier turns stay recorded, so that the client never answers old instructions again.
    ledger = {"ledger_lines": record.ledger_lines, "ledger_hash": record.ledger_hash}
    return Record(epoch=terms.epoch, committed_turn=record.latest_turn, **ledger)


def _given_before(record: Record, terms: RunTerms, request: str) -> Tensor:
    """Return the earlier message for the same request.

    Raises:
        Refusal: If this turn, or a later one, had another request.
    """
    if terms.turn == record.pending_turn and request == record.request and record.reply is not None:
        return record.reply
    expected = f"a turn after {record.latest_turn}, or the same request again"
    raise Refusal("stale", "turn", expected, terms.turn, "Send a new turn: each turn is answered once")


def _refuse_released(past: list[Entry], entry: Entry) -> None:
    """Raise a `Refusal` if the ledger has a message of this turn, which may have been sent and is now lost."""
    if any(e.run == entry.run and e.client == entry.client and e.turn >= entry.turn for e in past):
        expected = f"a turn after {entry.turn}, which is in the ledger"
        remedy = "Send a new turn: the message of this one is lost, and no turn is noised twice"
        raise Refusal("stale", "turn", expected, entry.turn, remedy)


def _refuse_changed(past: list[Entry], entry: Entry) -> None:
    """Raise a `Refusal` if the terms of a run change although its turns are accounted together, not one by one.

    For single examples: a memory that differs by one example under other terms, or hardly any noise in the turn that
    shows the difference, would reveal more than the sum of the turns' own costs. For correlated noise, and clients that
    take turns: the charge is that of one matrix, and of messages a stated number of turns apart.
    """
    names = (*(field.name for field in fields(PrivacyTerms)), "method", "l2_bound", "noise_stddev")
    for other in past:
        together = other.in_turns or entry.in_turns
        same = other.run == entry.run and (together or other.client == entry.client)
        if not same or not (together or other.record or entry.record):
            continue
        changed = [name for name in names if getattr(other, name) != getattr(entry, name)]
        if changed:
            expected, got = f"the terms of turn {other.turn} of this run", f"a different {changed[0]}"
            raise Refusal("policy", "terms", expected, got, "Start a new run")


def _refuse_early(past: list[Entry], entry: Entry) -> None:
    """Raise a `Refusal` if a run's last messages are not as many turns before this one as its terms say.

    Formal guarantee: in the first K turns of a run with the separation b, the ledger has at most ceil(K / b) messages,
    any two of them at least b turns apart, whatever the server asks: no message is sent before its line is in the
    ledger, and the terms of a run do not change (`_refuse_changed`). Resets, resumptions and lost memories change no
    line, and another client id is refused in the same run. A run of another name is another run, and charged in full.

    The server is trusted with the noise, and with the truth of the number of the turn, the name of the run and the
    matrix, as with every promise of trust central.
    """
    for other in past:
        if other.run != entry.run or not (other.in_turns or entry.in_turns):
            continue
        if other.client != entry.client:
            expected = f"client {other.client}, as in turn {other.turn}: two ids would be charged as one client"
            raise Refusal("policy", "client", expected, entry.client, "Ask the server's operator")
        if entry.turn < other.turn + entry.separation:
            expected = f"a turn from {other.turn + entry.separation}: answers are {entry.separation} turns apart"
            raise Refusal("policy", "turn", expected, entry.turn, "Ask each client in its own turns only")


def _settled(instructions: ClientInstructions, terms: RunTerms, record: Record) -> Record:
    """Return the record after the server has named the last turn that counted."""
    settled = record.settled(terms.last_turn)
    if _is_dropped(terms, record):
        where, expected = f"memory of client {instructions.client}", f"that turn {record.pending_turn} counted"
        got = "a message that was sent but is not remembered, which costs single examples more"
        raise Refusal("lost", where, expected, got, "The server applies its rule for lost memories")
    if settled is None and not has_memory(instructions.method):
        return Record(epoch=record.epoch, committed_turn=terms.last_turn)
    if settled is None:
        where, expected = f"memory of client {instructions.client}", f"its state after turn {terms.last_turn}"
        got = f"its state after turn {record.latest_turn}" if record.latest_turn else "a lost memory"
        raise Refusal("lost", where, expected, got, "The server applies its rule for lost memories")
    return settled


def _is_dropped(terms: RunTerms, record: Record) -> bool:
    """Return True if the server saw a message that a noiseless memory, accounted for single examples, would lack.

    The bound of `fedpriv.privacy.records` needs every message in the memory that follows it. A restart is as good.
    """
    bound = terms.record_bound if terms.charges_participations else None
    remembers = bound is not None and bound.route == "memory"
    return remembers and record.pending_turn > 0 and terms.last_turn not in (0, record.pending_turn)


def _state(instructions: ClientInstructions, record: Record, size: int) -> ClientState:
    """Return the client's state before this turn."""
    fresh = instructions.rules.init_client(size)
    if record.committed_turn == 0 or not fresh._fields:
        return fresh
    shapes = {name: tuple(field.shape) for name, field in fresh._asdict().items()}
    kept = {name: tuple(field.shape) for name, field in record.committed.items()}
    if kept != shapes:
        expected = f"a model with memory of the shapes {kept}"
        raise Refusal("model", "model", expected, shapes, "Start a new run for this model")
    if not all(bool(torch.isfinite(field).all()) for field in record.committed.values()):
        where, remedy = f"memory of client {instructions.client}", "The server applies its rule for lost memories"
        raise Refusal("lost", where, "finite numbers", "NaN or infinity", remedy)
    updated = record.committed.get("updated")
    if updated is not None and not float(updated.max()) < instructions.round:  # damping would undo itself
        expected = f"a round after {float(updated.max()):g}, which is in the memory"
        raise Refusal("stale", "round", expected, instructions.round, "Send a new turn with the next round")
    return type(fresh)(**record.committed)


def _digest(
    instructions: ClientInstructions, terms: RunTerms, model: Tensor, settings: str, shared: Tensor | None
) -> str:
    """Return a digest of every input of an answer except the client's own data and memory."""
    asked = {**asdict(replace(instructions, last_round=0)), "name": method_name(instructions.method), **asdict(terms)}
    asked |= {"settings": settings} if settings else {}
    hashed = hashlib.sha256(json.dumps(asked, sort_keys=True, default=repr).encode())
    for sent in (model, shared):
        hashed.update(b"" if sent is None else sent.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def _entry(instructions: ClientInstructions, terms: RunTerms, request: str) -> Entry:
    shared = {k: v for k, v in asdict(terms).items() if k in Entry.__dataclass_fields__}
    return Entry(
        **shared,
        client=instructions.client,
        request=request,
        method=method_name(instructions.method),
        l2_bound=instructions.method.bounded.l2_bound,
        noise_stddev=instructions.noise_stddev or instructions.step_stddev,
    )
