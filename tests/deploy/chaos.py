"""Deployment in one process, on a network and disks that lose, repeat, delay, tear and fill up according to a seed.

Only the network and the disks are simulated: server and clients are `Coordinator` and `Device`, and clients' files are
real files. After every turn, a bookkeeper with full knowledge checks all invariants.
"""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.noise_faults import rows_by
from torch import Tensor

import fedpriv.files
import fedpriv.mechanisms.noise
from fedpriv.deploy.coordinator import Coordinator
from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.ledger import Ledger, spent
from fedpriv.deploy.device.memory import MemoryFile
from fedpriv.deploy.device.policy import AcceptedTrust, Accepts, AggregationLimits, Limits, Policy
from fedpriv.deploy.helper.folder import SIGNING_FILE, make_signing_key
from fedpriv.deploy.sums import HelperList, SecureSums
from fedpriv.errors import UserError
from fedpriv.experiment.deployment import DeploymentChoice
from fedpriv.feedback import decayed
from fedpriv.flower.messages import ClientInstructions, RunTerms
from fedpriv.flower.refusals import Refusal
from fedpriv.mechanisms.shares import IntegerSums
from fedpriv.methods import has_memory, server_step
from fedpriv.privacy import Aggregation, NoiseChoice, Poisson, Sampling, Separated, correlated, make_plan
from fedpriv.rounds import make_agreement
from fedpriv.secure import Closed, Helper, Masked
from fedpriv.streams import Purpose, Streams

SIZE = 6
CLIENTS = 4


class CrashError(BaseException):
    """Error for a client's machine that stops; no error handler runs on it."""


@dataclass(frozen=True)
class Faults:
    """Probabilities of faults."""

    lost_request: float = 0.1
    lost_reply: float = 0.1
    twice: float = 0.15
    late_request: float = 0.1
    late_reply: float = 0.1
    client_crash: float = 0.1
    disk_full: float = 0.05
    disk_lost: float = 0.01
    server_crash: float = 0.1


@dataclass
class Disk:
    """Layer between clients and the operating system that stops or fills up at the n-th write, perhaps half way.

    A machine may also stop when a folder is synchronized: after each file that was replaced or extended.
    """

    rng: np.random.Generator
    crash_at: int = -1
    full_at: int = -1
    writes: int = 0

    def plan(self, faults: Faults) -> None:
        self.writes, self.crash_at, self.full_at = 0, -1, -1
        if self.rng.random() < faults.client_crash:
            self.crash_at = int(self.rng.integers(0, 9))
        elif self.rng.random() < faults.disk_full:
            self.full_at = int(self.rng.integers(0, 8))

    def write(self, file: int, content: Any) -> int:
        """Call os.write, which may write only a part."""
        number, self.writes = self.writes, self.writes + 1
        if number in (self.full_at, self.crash_at):
            half = bytes(content)[: len(content) // 2]
            if half and self.rng.random() < 0.5:
                REAL_WRITE(file, half)
            if number == self.full_at:
                raise OSError(28, "No space left on device")
            raise CrashError
        return REAL_WRITE(file, content)

    def sync_folder(self, _: Path) -> None:
        """Call fedpriv's sync_folder; a machine may stop after it."""
        number, self.writes = self.writes, self.writes + 1
        if number == self.crash_at:
            raise CrashError


REAL_WRITE = os.write


@contextmanager
def simulated_disk(disk: Disk) -> Iterator[None]:
    """Route client files through `disk`; fsync does nothing, because no machine really stops here."""

    class Os:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, file: int, content: Any) -> int:
            return disk.write(file, content)

        def fsync(self, file: int) -> None:
            pass

    before, synced = fedpriv.files.os, fedpriv.files.sync_folder
    fedpriv.files.os, fedpriv.files.sync_folder = Os(), disk.sync_folder  # type: ignore[assignment]
    try:
        yield
    finally:
        fedpriv.files.os, fedpriv.files.sync_folder = before, synced


@contextmanager
def unrounded_noise() -> Iterator[None]:
    """Use draws of `Draws` as noise, without rounding, so that `_follow_noise` can follow their effect."""

    def released(streams: "Draws", purpose: Purpose, stddev: float, values: Tensor, address: Any, *_: Any, **__: Any):  # type: ignore[no-untyped-def]
        if stddev == 0.0:
            return values
        drawn = torch.from_numpy(streams.source(purpose, *address).normal(len(values)))
        return values.double() + stddev * drawn.double()

    def noised(sums: IntegerSums, streams: "Draws", stddev: float, values: Tensor, turn: int, client: int) -> Tensor:
        exact, made = values.double(), streams.made[turn, client]
        drawn = torch.from_numpy(streams.source(Purpose.CLIENT_NOISE, turn, client).normal(len(values)))
        on_grid = torch.round((exact + stddev * drawn.double()) / sums.grid) * sums.grid
        made[-1] = ((on_grid - exact) / stddev).float().numpy()
        return on_grid

    noise = fedpriv.mechanisms.noise
    before, noise._released = noise._released, released  # type: ignore[assignment]
    rows, noise.release_rows = noise.release_rows, rows_by(released)  # type: ignore[assignment]
    shares, IntegerSums.noised = IntegerSums.noised, noised  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        noise._released, noise.release_rows = before, rows
        IntegerSums.noised = shares  # type: ignore[method-assign]


@dataclass(eq=False)
class Draws(Streams):
    """Source of new noise at every draw, as in a deployment, with a record of the turn and client of each draw."""

    rng: np.random.Generator
    made: dict[tuple[int, int], list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    def source(self, purpose: Purpose, round: int = 0, client: int = 0) -> Any:
        outer = self

        class Source:
            def normal(self, size: int) -> np.ndarray:
                drawn = outer.rng.standard_normal(size).astype(np.float32)
                if purpose == Purpose.CLIENT_NOISE:
                    outer.made[round, client].append(drawn)
                if purpose == Purpose.SERVER_NOISE:
                    outer.made[round, -1].append(drawn)
                return drawn

            def uniform(self, size: int) -> np.ndarray:
                return outer.rng.random(size)

            def subset(self, population: int, size: int) -> np.ndarray:
                return np.sort(outer.rng.choice(population, size, replace=False))

        return Source()


@dataclass
class World:
    """Server, clients, and the messages in transit between them.

    Args:
        folder: Folder of the clients' homes.
        method: The method.
        trust: `none`, `central`, `local` or `aggregator`.
        seed: Seed of all random events.
        turns: Number of turns.
        choice: Rules of the deployment.
        faults: Probabilities of faults.
        budget: Epsilon of the clients' policies.
        apart: Turns between two answers of a client, with banded noise; 0 for Poisson cohorts and independent noise.
    """

    folder: Path
    method: Any
    trust: AcceptedTrust
    seed: int
    turns: int = 60
    choice: DeploymentChoice = field(default_factory=DeploymentChoice)
    faults: Faults = field(default_factory=Faults)
    budget: float = 1e9
    apart: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.draws = Draws(np.random.default_rng(self.seed + 10**6))
        sampling: Sampling = Separated(CLIENTS, self.apart) if self.apart else Poisson(CLIENTS, 0.8)
        plan = None
        if self.trust != "none":
            numbers = Aggregation(helpers=1, least_survivors=2, colluders=0, most=CLIENTS, size=SIZE)
            plan = make_plan(
                trust=numbers if self.trust == "aggregator" else self.trust,
                sampling=sampling,
                rounds=self.turns,
                delta=1e-5,
                l2_bound=self.method.bounded.l2_bound,
                noise_multiplier=1.0,
                client_memory=has_memory(self.method),
            )
        if self.apart and plan is not None:
            matrix = NoiseChoice(kind="banded").of(sampling, self.turns, 0.0)
            assert matrix is not None
            plan = correlated(plan, matrix, None)
        self.server_rules, self.client_rules, _ = make_agreement(self.method, sampling, plan, self.draws)
        self.plan = plan
        self.helper = self._new_helper()
        self.server = self._new_server()
        self.noise_only = self.method.init_server(torch.zeros(SIZE))
        limits = Limits(epsilon=self.budget, delta=1e-5)
        pinned = AggregationLimits(helpers=(self._identity.hex(),))
        self.policy = Policy(accepts=Accepts(trust=self.trust), limits=limits, aggregation=pinned)
        self.members = [self._new_member(i) for i in range(CLIENTS)]
        self.disk = Disk(np.random.default_rng(self.seed + 2 * 10**6))
        self.saved: Any = None
        self.delayed: list[tuple[int, ClientInstructions, RunTerms, Tensor]] = []
        self.sent: dict[tuple[int, int], set[bytes]] = defaultdict(set)  # (client, turn) -> message sent by the client
        self.outcomes: list[Any] = []
        self.lost: set[int] = set()
        self.gone: dict[int, Tensor] = {}  # memories of clients in secret cohorts that are no longer asked
        self.crashed: set[tuple[int, int]] = set()  # (client, turn) in which the client's machine stopped

    def run(self) -> None:
        """Run all turns, with checks after each."""
        with simulated_disk(self.disk), unrounded_noise():
            while not self.server.done:
                self.step()
                self.check()

    def step(self) -> None:
        """Run one turn."""
        rng, faults = self.rng, self.faults
        sums = self.server.sums
        if sums is not None and not sums.keys:
            sums.keys = [self.helper.key(self.server.run)]
        broadcast = self.server.begin()
        self._save()
        self._perhaps_crash_server()
        broadcast = self.server.begin()
        if rng.random() < faults.disk_lost:
            self._lose_disk(int(rng.integers(CLIENTS)))
        turn = broadcast.address
        events: list[tuple[int, ClientInstructions, RunTerms, Tensor]] = [*self.delayed]
        self.delayed = []
        for client in self.server.asked():
            event = (client, *self.server.instructions(client), broadcast.model)
            if rng.random() < faults.lost_request:
                continue
            if rng.random() < faults.late_request:
                self.delayed.append(event)
                continue
            events += [event] * (2 if rng.random() < faults.twice else 1)
        rng.shuffle(events)  # type: ignore[arg-type]
        replies, refusals = self._deliver(events, turn)
        if rng.random() < faults.server_crash:  # the answers are lost; the same turn is requested again
            self._restart_server()
            broadcast = self.server.begin()
            again = [
                (c, *self.server.instructions(c), broadcast.model) for c in self.server.asked() if rng.random() < 0.8
            ]
            replies, refusals = self._deliver(again, turn)
        outcome = self._finished(replies, refusals)
        if rng.random() < faults.server_crash:  # before anything of the turn was saved or published
            self._restart_server()
            return
        self._follow_noise(outcome)
        self.outcomes.append(outcome)
        self._save()
        self._perhaps_crash_server()

    def _finished(self, replies: dict[int, Tensor], refusals: dict[int, tuple[str, str]]) -> Any:
        """Return the outcome of the open turn; under secure aggregation, the server may stop at any step."""
        if self.server.sums is None:
            return self.server.finish(replies, refusals)
        masked = {client: Masked.from_bytes(reply.numpy().tobytes()) for client, reply in replies.items()}
        outcome = self.server.close(masked, refusals)
        if outcome is not None:
            return outcome
        self._save()
        self._perhaps_crash_server()
        closed = self.server.closed
        assert closed is not None, "the server forgot who counts"
        if self.rng.random() < self.faults.disk_lost:
            self.helper.erase(self.server.run)
        if self.rng.random() < self.faults.lost_reply:  # the helper answers, and the server asks again
            self._asked(closed)
            self._restart_server()
        return self._asked(closed)

    def _asked(self, closed: Closed) -> Any:
        try:
            return self.server.conclude([self.helper.answer(query) for query in closed.queries])
        except UserError as lost:
            assert "lost or erased" in str(lost)  # noqa: PT017
            return self.server.conclude((), str(lost))

    def _deliver(
        self, events: list[tuple[int, ClientInstructions, RunTerms, Tensor]], turn: int
    ) -> tuple[dict[int, Tensor], dict[int, tuple[str, str]]]:
        replies: dict[int, Tensor] = {}
        refusals: dict[int, tuple[str, str]] = {}
        for client, instructions, terms, model in events:
            answer = self._answer(client, instructions, terms, model)
            if answer is None or self.rng.random() < self.faults.lost_reply:
                continue
            if terms.turn != turn or self.rng.random() < self.faults.late_reply:
                continue  # the server listens to the open turn only
            if isinstance(answer, Refusal):
                refusals.setdefault(client, (answer.kind, str(answer)))
            else:
                replies[client] = answer
        return replies, refusals

    def _answer(
        self, client: int, instructions: ClientInstructions, terms: RunTerms, model: Tensor
    ) -> Tensor | Refusal | None:
        self.disk.plan(self.faults)
        try:
            message = self.members[client].answer(
                instructions, terms, model, lambda: self.signal(client, terms.turn, model)
            )
        except CrashError:
            self.crashed.add((client, terms.turn))
            self.members[client] = self._new_member(client)
            return None
        except Refusal as refusal:
            return refusal
        finally:
            self.disk.crash_at = self.disk.full_at = -1
        self.sent[client, terms.turn].add(message.numpy().tobytes())
        if self.rng.random() < self.faults.client_crash:
            self.members[client] = self._new_member(client)
        return message

    def signal(self, client: int, turn: int, model: Tensor) -> Tensor:
        """Return a different signal at every call, which detects two calls for one message."""
        self.calls = getattr(self, "calls", 0) + 1
        rng = np.random.default_rng((self.seed, client, turn, self.calls))
        return model + torch.tensor(rng.standard_normal(SIZE) + client, dtype=torch.float32)

    def check(self) -> None:
        """Check the invariants of every turn."""
        if self.server.secret_cohorts:
            assert self.server.epoch == 0, "a reset of all memories reveals a lost one"
            assert self.server.left_out <= set(self.gone)
        for (client, turn), messages in self.sent.items():
            assert len(messages) == 1, f"client {client} answered turn {turn} with {len(messages)} messages"
        for client in range(CLIENTS):
            entries = Ledger(self.members[client].folder).entries()
            listed = {entry.turn for entry in entries}
            assert len(listed) == len(entries), "a turn was noised twice"
            sent, crashed = ({turn for who, turn in of if who == client} for of in (self.sent, self.crashed))
            assert sent <= listed
            assert listed <= sent | crashed, "a message that was never made to leave is charged"
            assert len(listed) <= self.server.asked_times[client], "the server claims less than was sent"
            if self.trust != "none":
                assert spent(entries, 1e-5, "replace") <= self.budget
            gaps = [later - sooner for sooner, later in pairwise(sorted(listed))]
            assert all(gap >= max(self.apart, 1) for gap in gaps), "answers closer than the plan says"
        if self.trust == "aggregator":
            assert self.server_rules.voids(self.server.state) == self.server.turn - self.server.applied
        if has_memory(self.method) and self.exact:
            assert torch.allclose(self.server.state._asdict()["memory"], self.expected_memory(), atol=1e-5)

    @property
    def exact(self) -> bool:
        """Return whether the server's memory must match the clients': if none was lost since the last reset.

        If cohorts are secret, a lost memory causes no reset: the server's memory keeps that client's contribution.
        """
        return not self.lost

    def expected_memory(self) -> Tensor:
        """Return the mean of the clients' committed memories, plus the noise in the server's memory."""
        total = torch.zeros(SIZE)
        for client in range(CLIENTS):
            total += self.gone[client] if client in self.gone else self._remembered(client)
        return total / CLIENTS + self.noise_only.memory

    def _remembered(self, client: int) -> Tensor:
        """Return a client's committed memory."""
        record = MemoryFile(self.members[client].folder, self.server.run, client).read()
        last = self.server.last_turn.get(client, 0)
        if record is None or last == 0 or record.epoch != self.server.epoch:
            assert last == 0
            return torch.zeros(SIZE)
        settled = record.settled(last)
        assert settled is not None
        memory = settled.committed["memory"]
        if "updated" in settled.committed:
            memory = decayed(memory, self.method.damping, self.server.applied - settled.committed["updated"])
        return memory

    def _follow_noise(self, outcome: Any) -> None:
        """Track the effect of the noise alone on the server's memory."""
        if not has_memory(self.method):
            return
        if outcome.happened == "reset":
            self.lost.clear()
            self.noise_only = self.method.init_server(torch.zeros(SIZE))
        if outcome.happened != "applied":
            return
        noise = torch.zeros(SIZE)
        if self.apart:  # as released: with what is taken back of earlier turns
            noise += self.server.state._asdict()["noise_earlier"][0]
        elif self.trust == "central":
            noise += self.server_rules.noise_stddev * torch.from_numpy(self.draws.made[outcome.turn, -1][-1])
        if self.trust in ("local", "aggregator") and not self.method.needs_client_noise:
            for client in outcome.counted:
                noise += self.client_rules.noise_stddev * torch.from_numpy(self.draws.made[outcome.turn, client][-1])
        size, prob = self.server_rules.sampling.expected_size, self.server_rules.sampling.sampling_prob
        self.noise_only = server_step(self.method, self.noise_only, noise / size, prob)

    @property
    def _identity(self) -> bytes:
        return self.helper.identity.public_key().public_bytes_raw()

    def _new_helper(self) -> Helper:
        """Make the helper, and the clients' keys."""
        enrolled = {}
        for client in range(CLIENTS):
            home = self.folder / str(client)
            home.mkdir(parents=True)
            enrolled[client] = make_signing_key(home / SIGNING_FILE).public_key().public_bytes_raw()
        return Helper(self.folder / "helper", Ed25519PrivateKey.generate(), enrolled, 2)

    def _new_server(self) -> Coordinator:
        parties = HelperList((self._identity,), self.helper.enrolled)
        return Coordinator(
            sums=None if self.trust != "aggregator" or self.plan is None else SecureSums(self.plan, parties),
            server=self.server_rules,
            client=self.client_rules,
            plan=self.plan,
            choice=self.choice,
            turns=self.turns,
            digest="d",
            state=self.server_rules.init(torch.zeros(SIZE)),
        )

    def _new_member(self, client: int) -> Device:
        return Device(self.policy, self.folder / str(client) / "state", self.draws)

    def _save(self) -> None:
        state = type(self.server.state)(*(part.clone() for part in self.server.state))
        self.saved = state, {name: tensor.clone() for name, tensor in self.server.save().items()}

    def _perhaps_crash_server(self) -> None:
        if self.rng.random() < self.faults.server_crash:
            self._restart_server()

    def _restart_server(self) -> None:
        self.server = self._new_server()
        self.server.restore(*self.saved)

    def _lose_disk(self, client: int) -> None:
        """Delete the memory but keep the ledger, as if it had been backed up."""
        folder = self.members[client].folder / f"{self.server.run}-{client}"
        if not folder.exists():
            return
        left_out = self.server.secret_cohorts and self.method.lost_memory == "reset-all"
        if left_out and len(self.gone) == CLIENTS - 1:
            return  # a run without any client would end
        if self.server.last_turn.get(client, 0) and left_out and client not in self.gone:
            self.gone[client] = self._remembered(client)
        elif self.server.last_turn.get(client, 0) and not left_out:
            self.lost.add(client)
        shutil.rmtree(folder)
