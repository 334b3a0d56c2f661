"""Ledger of a client: every release, recorded before it is sent, and the total privacy cost.

The ledger has one JSON line for each release, with the hash of the previous line. A second file holds the number of
lines and the hash of the last line, and so does each memory: while any of these files exists, lost or changed lines are
detected. An incomplete last line after a crash is no release, because a message is sent only after its line is complete
and on disk.

A line may also be a charge: an epsilon that releases missing from a restored copy may have cost
(`fedpriv deploy restore --charge`). It is part of the chain of hashes, so that its removal is noticed like that of a
release.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from fedpriv.deploy.device.memory import remembered_ledgers
from fedpriv.errors import UserError, number_of
from fedpriv.files import append_durably, finish_replacing, make_private_folder, only_one, prepare_replacing
from fedpriv.flower.privacy_terms import PrivacyTerms
from fedpriv.privacy import REPLACE_FACTOR, Adjacency, Everyone, PrivacyPlan, UnitName, rounded_up
from fedpriv.privacy.records import RecordBound

__all__ = ["Draft", "Entry", "Ledger", "account_of", "delta_of_runs", "in_words", "spent", "surely_within"]

LEDGER_FILE = "ledger.jsonl"
HEAD_FILE = "ledger.head"
LOCK_FILE = "lock"
_FIRST = "0" * 64
_ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Entry(PrivacyTerms):
    """One release, with its privacy terms.

    Args:
        run: Name of the run.
        client: Client id in the run.
        turn: Turn of the release.
        request: SHA-256 of the request.
        method: Method of the client rule that was applied.
        l2_bound: Bound of the message.
        noise_stddev: Standard deviation per coordinate of this client's noise, on its message or on the sum of every
            local step (`dp-sgd`); 0 for none.
    """

    run: str
    client: int
    turn: int
    request: str
    method: str
    l2_bound: float
    noise_stddev: float


@dataclass(frozen=True)
class Draft:
    """Line that is not in the ledger yet.

    Args:
        line: The line, without the line break.
        lines: Number of lines after it is added.
    """

    line: bytes
    lines: int

    @property
    def digest(self) -> str:
        """SHA-256 of the line."""
        return hashlib.sha256(self.line).hexdigest()


class Ledger:
    """Releases of one client's data over all runs. Writers must hold the lock of the folder.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_FILE
        self._head = folder / HEAD_FILE
        self._hashes = [_FIRST]
        self._length = 0
        self._charges: list[float] = []

    @property
    def charged(self) -> float:
        """Epsilon charged for missing releases, after the lines were read; infinite if the whole budget is charged."""
        return math.fsum(self._charges)

    def share(self, delta: float) -> float:
        """Return the part of a delta that is left for the recorded releases: each charge takes half of what is left."""
        return delta / 2.0 ** len(self._charges)

    @property
    def lines(self) -> int:
        """Number of releases and charges, after they were read."""
        return len(self._hashes) - 1

    @property
    def last_hash(self) -> str:
        """SHA-256 of the last line."""
        return self._hashes[-1]

    def entries(self) -> list[Entry]:
        """Return all releases, in the order of time. Nothing is changed.

        Raises:
            UserError: If a line is missing or was changed, so that the spent budget is unknown.
        """
        self._hashes, self._length, self._charges = [_FIRST], 0, []
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # an incomplete line was never sent
        self._length = len(whole)
        read = [self._read(number, line) for number, line in enumerate(whole.splitlines(), 1)]
        found = [entry for entry in read if entry is not None]
        noted = self.noted()
        if noted is not None and noted[0] < 0:
            expected, remedy = "the number of lines and a hash", "Restore the newest copy, together with the ledger"
            raise UserError(str(self._head), expected, "a damaged file", remedy)
        if noted is not None:
            self.refuse_without(*noted)
        return found

    def noted(self) -> tuple[int, str] | None:
        """Return the number of lines and the hash of the last line from the second file; None if it does not exist."""
        if not self._head.exists():
            return None
        text = self._head.read_text(encoding="utf-8", errors="replace")
        lines, _, digest = text.strip().partition(" ")
        return int(lines) if lines.isdecimal() else -1, digest

    def refuse_without(self, lines: int, digest: str, witness: str = "") -> None:
        """Raise a `UserError` unless the ledger has at least `lines` lines, and line number `lines` has this hash.

        Args:
            lines: Required number of lines.
            digest: SHA-256 of the last of them.
            witness: Source of the requirement, in words, for the error.
        """
        if lines and not self._has(lines, digest):
            raise self._damaged(max(lines, 0), witness)

    def holds(self, lines: int, digest: str) -> bool:
        """Read the ledger, and return whether its line number `lines`, from 1, has this hash."""
        self.entries()
        return self._has(lines, digest)

    def drafted(self, entry: Entry) -> Draft:
        """Return the line for a release; call `entries` before. Nothing is written."""
        line = json.dumps({**asdict(entry), "time": time.time(), "before": self.last_hash}).encode()
        return Draft(line, self.lines + 1)

    def charge(self, epsilon: float, reason: str) -> None:
        """Charge an epsilon for releases that are missing in the ledger; it is on disk when this returns.

        Args:
            epsilon: Epsilon of all missing releases together, at half of the policy's delta, or of what earlier charges
                left of it; infinite for the whole budget.
            reason: Reason, in words.

        Raises:
            UserError: If the ledger is damaged, or the disk is full.
        """
        self.entries()
        value = epsilon if math.isfinite(epsilon) else _ALL
        row = {"charge": value, "reason": reason, "time": time.time(), "before": self.last_hash}
        self.append(Draft(json.dumps(row).encode(), self.lines + 1))
        self._charges.append(epsilon)

    def append(self, draft: Draft) -> None:
        """Write the last drafted line; it is on disk when this returns.

        Raises:
            UserError: If the disk is full; the line is then not in the ledger, and nothing may be sent.
        """
        make_private_folder(self.path.parent)
        prepare_replacing(self._head, f"{draft.lines} {draft.digest}\n".encode())
        append_durably(self.path, draft.line + b"\n", self._length)
        self._length += len(draft.line) + 1
        self._hashes.append(draft.digest)
        with suppress(UserError):  # an older head is still valid, and the next line updates it
            finish_replacing(self._head)

    def _has(self, lines: int, digest: str) -> bool:
        return 0 < lines <= self.lines and self._hashes[lines] == digest

    def _read(self, number: int, line: bytes) -> Entry | None:
        """Return the release in a line; None for a charge."""
        try:
            row = json.loads(line)
            before, _ = row.pop("before"), row.pop("time")
            charge = row.get("charge")
            entry = Entry(**row) if charge is None else None
            if charge is not None:
                value = math.inf if charge == _ALL else float(charge)
                if not value >= 0.0:
                    raise ValueError(f"a charge of {value}")
                self._charges.append(value)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise self._damaged(number) from None
        if before != self.last_hash:
            raise self._damaged(number)
        self._hashes.append(hashlib.sha256(line).hexdigest())
        return entry

    def _damaged(self, number: int, witness: str = "") -> UserError:
        remedy = "Restore the newest copy: without it the spent budget is unknown, and nothing more is sent"
        where, expected = f"{self.path}, line {number}", f"the original line{witness}"
        return UserError(where, expected, "a changed or missing line", remedy)


def surely_within(
    entries: Sequence[Entry], epsilon: float, delta: float, adjacency: Adjacency, unit: UnitName = "client"
) -> bool:
    """Return True if a simple bound shows that the releases cost at most `epsilon` at `delta`.

    The bound is zero-concentrated privacy, Bun and Steinke 2016, propositions 1.3 and 1.6: Gaussian noise is rho-zCDP
    with rho = mu^2 / 2, which is (rho + 2 sqrt(rho log(1 / delta)), delta)-private. It avoids an accountant, which
    takes seconds to load, and whose lower epsilon matters only near the limit.

    Args:
        entries: Releases.
        epsilon: The limit.
        delta: Delta of all releases together.
        adjacency: See `spent`.
        unit: See `spent`.
    """
    if not all(entry.charges_participations for entry in entries):
        return False
    rho = 0.5 * math.fsum(ratio**2 for ratio in _ratios(entries, adjacency, unit))
    return rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta)) <= epsilon


def delta_of_runs(entries: Sequence[Entry], adjacency: Adjacency, unit: UnitName = "client") -> float:
    """Return the sum of the deltas of runs that cost their whole guarantee: those without local trust.

    Args:
        entries: Releases.
        adjacency: See `spent`.
        unit: See `spent`.
    """
    return math.fsum(plan.delta for *_, plan in _by_others(entries, adjacency, unit))


def _by_others(entries: Sequence[Entry], adjacency: Adjacency, unit: UnitName) -> set[tuple[str, int, PrivacyPlan]]:
    """Return run, client and plan of each run in which others add noise."""
    promised = [entry for entry in entries if entry.trust_rules is not None]
    return {(e.run, e.client, _plan_of(e, unit, adjacency)) for e in promised if not e.charges_participations}


def spent(entries: Sequence[Entry], delta: float, adjacency: Adjacency, unit: UnitName = "client") -> float:
    """Return epsilon at `delta` of all releases together; infinite if any release has no privacy guarantee.

    If all trust was local, this epsilon holds against the server, because only this client's own noise counts. A run
    with central trust costs its full epsilon from the first message on, because its guarantee covers all of its rounds
    together. Both kinds, and several central runs, add up by basic composition.

    Args:
        entries: Releases.
        delta: Delta of all releases together.
        adjacency: Adjacency for the client's own noise, secure aggregation and correlated noise. Other central runs
            count under the adjacency of their guarantee; if that is add-or-remove for any run, so is the sum.
        unit: The unit whose privacy is spent. A run that protects clients protects their examples by its epsilon under
            `replace`: one example more or less also changes a message that is present.
    """
    if not entries:
        return 0.0
    if any(entry.trust_rules is None for entry in entries):
        return math.inf
    local = [entry for entry in entries if entry.charges_participations]
    central = _by_others(entries, adjacency, unit)
    left = delta - math.fsum(plan.delta for *_, plan in central)
    if left < 0.0 or (local and left <= 0.0):
        return math.inf
    by_others = math.fsum(plan.epsilon for *_, plan in central)
    return by_others + (_spent_locally(local, left, adjacency, unit) if local else 0.0)


def in_words(epsilon: float) -> str:
    """Return an epsilon as text, rounded up; `inf` if it is infinite."""
    return rounded_up(epsilon) if math.isfinite(epsilon) else "inf"


def account_of(folder: Path, epsilon: float, delta: float, adjacency: Adjacency, unit: UnitName = "client") -> str:
    """Return a summary of a ledger as text: one line for each run, and the total.

    Args:
        folder: Folder of the ledger.
        epsilon: Privacy budget.
        delta: Delta of the budget.
        adjacency: See `spent`.
        unit: See `spent`.

    Raises:
        UserError: If the ledger is damaged, or shorter than a memory next to it records.
    """
    if folder.exists():
        with only_one(folder / LOCK_FILE):
            ledger = Ledger(folder)
            entries = ledger.entries()
            for path, number, digest in remembered_ledgers(folder):
                ledger.refuse_without(number, digest, f" according to {path}")
            charged, delta_left = ledger.charged, ledger.share(delta)
    else:
        entries, charged, delta_left = [], 0.0, delta
    lines = []
    for run in dict.fromkeys(entry.run for entry in entries):
        part = [entry for entry in entries if entry.run == run]
        last = part[-1]
        alone = (
            "no privacy guarantee"
            if last.trust_rules is None
            else f"epsilon {in_words(spent(part, delta, adjacency, unit))} for this run alone"
        )
        noise = f"noise {last.noise_stddev:g}" if last.noise_stddev else "no noise from this client"
        what = f"{number_of(len(part), 'message')} of norm at most {last.l2_bound:g}, {noise}"
        if (numbers := last.sums) is not None:
            what += (
                f", in sums of at least {numbers.least_survivors} clients, up to {numbers.colluders} of them against it"
            )
        lines.append(f"run {run[:12]}  client {last.client}  {last.method}  trust {last.trust}  {what}: {alone}")
    trusts = [trust for entry in entries if (trust := entry.trust_rules) is not None]
    against = [f"adversary   {max(trusts, key=lambda trust: trust.reliance).adversary}"] if trusts else []
    all_runs = in_words(spent(entries, delta_left, adjacency, unit) + charged)
    if charged:
        much = "the whole budget" if math.isinf(charged) else f"epsilon {in_words(charged)}"
        lines.append(f"charged     {much} for releases that a restored copy lacked")
    total = f"epsilon {all_runs} of {epsilon:g} at delta = {delta:g}, {adjacency} adjacency, for one {unit}"
    added = _composition(entries, charged, adjacency, unit)
    return "\n".join([*lines, f"spent       {total}, all runs together", *added, *against])


def _composition(entries: Sequence[Entry], charged: float, adjacency: Adjacency, unit: UnitName) -> list[str]:
    """Return a line about the sum of several guarantees; none if there is one guarantee, or no guarantee."""
    central = len(_by_others(entries, adjacency, unit))
    parts = [f"each of {central} runs without local trust" if central > 1 else "the run without local trust"]
    parts = parts if central else []
    parts += ["all messages with this client's own noise"] if any(e.charges_participations for e in entries) else []
    parts += ["the charge"] if charged else []
    if max(central, len(parts)) < 2 or any(entry.trust_rules is None for entry in entries):
        return []
    return [f"added       by basic composition, an upper bound: the epsilons and deltas of {', and of '.join(parts)}"]


def _plan_of(entry: Entry, unit: UnitName, adjacency: Adjacency) -> PrivacyPlan:
    """Return the plan of a run that is charged as a whole, for one `unit`.

    A server that is not trusted does not choose the adjacency: the same noise is charged under that of the policy. So
    is correlated noise.
    """
    plan = entry.plan(entry.l2_bound)
    if unit == "example":
        return plan.under_replace() if plan.record is None else plan
    whole = plan.of_clients() or replace(plan, noise_multiplier=0.0)
    own = plan.noise is not None or not plan.trust_rules.trusts_server
    return whole.under_replace() if adjacency == "replace" and own else whole


def _spent_locally(entries: Sequence[Entry], delta: float, adjacency: Adjacency, unit: UnitName) -> float:
    """Return epsilon of releases with this client's Gaussian noise.

    They compose to a single Gaussian release with mu^2 equal to the sum of (sensitivity / stddev)^2. Secret batches are
    credited run by run; epsilons and deltas of runs then add up. The smaller bound is returned.
    """
    ratios = _ratios(entries, adjacency, unit)
    if not all(map(math.isfinite, ratios)):
        return math.inf
    together = _gaussian(ratios, delta)
    batched = unit == "example" and any(entry.record for entry in entries)
    return min(together, _run_by_run(entries, delta, adjacency)) if batched else together


def _run_by_run(entries: Sequence[Entry], delta: float, adjacency: Adjacency) -> float:
    runs: dict[tuple[str, int, PrivacyTerms], list[Entry]] = {}
    for entry in entries:
        terms = PrivacyTerms(**{field.name: getattr(entry, field.name) for field in fields(PrivacyTerms)})
        runs.setdefault((entry.run, entry.client, terms), []).append(entry)
    share, epsilon = delta / len(runs), 0.0
    for part in runs.values():
        record = part[0].record_bound
        if record is None:
            epsilon += _gaussian(_ratios(part, adjacency, "example"), share)
            continue
        found = replace(part[0].plan(part[0].l2_bound), delta=share, adjacency=adjacency)
        found = replace(found, noise_multiplier=part[0].noise_stddev / found.l2_sensitivity)
        epsilon += found.epsilon_of_participations(len(part))
    return epsilon


def _gaussian(ratios: Sequence[float], delta: float) -> float:
    """Return epsilon of Gaussian releases with these sensitivities over standard deviations."""
    same = len(set(ratios)) == 1
    mu = ratios[0] if same else math.sqrt(math.fsum(ratio**2 for ratio in ratios))
    rounds = len(ratios) if same else 1
    plan = PrivacyPlan(
        trust="local",
        adjacency="replace",
        sampling=Everyone(1),
        rounds=rounds,
        delta=delta,
        l2_bound=1.0,
        noise_multiplier=1.0 / mu,
    )
    return plan.epsilon_of_participations(rounds)


def _ratios(entries: Sequence[Entry], adjacency: Adjacency, unit: UnitName) -> list[float]:
    """Return sensitivity over standard deviation of each release; infinite if it promises nothing for the unit.

    A memory of the parts that clipping cut off costs more than its releases one by one: it has one ratio for each run.
    """
    found: list[float] = []
    together: dict[tuple[str, int, str, float], list[Entry]] = {}
    for entry in entries:
        record = entry.record_bound
        if unit == "example" and record is not None and record.feedback_clip is not None:
            together.setdefault((entry.run, entry.client, entry.record, entry.noise_stddev), []).append(entry)
        else:
            found.append(_moved(entry, adjacency, unit) / entry.noise_stddev)
    for (*_, text, stddev), part in together.items():
        found.append(RecordBound.read(text).sensitivity(adjacency, len(part)) / stddev)
    return found


def _moved(entry: Entry, adjacency: Adjacency, unit: UnitName) -> float:
    """Return how far one unit of data moves a release, so that the squares of all releases of a run add up."""
    record = entry.record_bound
    if record is None:
        return (REPLACE_FACTOR if adjacency == "replace" or unit == "example" else 1.0) * entry.l2_bound
    steps = record.terms.steps
    if unit == "example":
        return record.sensitivity(adjacency, 1) * math.sqrt(max(steps, 1))
    return math.inf if steps else (REPLACE_FACTOR if adjacency == "replace" else 1.0) * entry.l2_bound
