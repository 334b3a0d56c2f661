"""Schedules decide when the server moves: after rounds, after a number of answers, or after some seconds.

Each schedule is a pure function of public values. A client is asked again only when the step in which its last message
counts is done. It therefore counts at most once per step. Its draws of noise and batches (addressed by step and client)
never repeat. It can learn if its message counted before it updates its memory again. A client that dropped out or was
late has not updated its memory.

Messages still on the way when the last step is done are late: their clients have taken a model, and nothing stops them.
They are `late` in that step; with rounds, they are late in the round that ended without them.

Weights and memory: if clients have an error-feedback memory, every message has weight 1. For each message, the server's
memory moves by beta / n and the client's memory by beta. Only then does the server's memory stay the mean of the
clients' memories: down-weighting a message would make client and server memories diverge permanently. Nothing is lost
by it. Weights exist because a slow client is heard too rarely or too late, and the mean of memories holds every
client's last message at equal weight, regardless of its age.

A simulation knows one thing that a real client cannot know when it starts: the step in which its message will count.
The client's batches and noise are addressed by that step, and a damped memory decays up to it. A timeline that is known
in advance provides it.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fedpriv.checks import at_least_one, is_real, real_from, shown
from fedpriv.clock.participation import Clock, Participation
from fedpriv.clock.timeline import Group, Step, Timeline
from fedpriv.errors import UserError
from fedpriv.plugins import Registry
from fedpriv.privacy import Everyone, FixedSize, Sampling
from fedpriv.streams import Purpose

__all__ = ["SCHEDULES", "FedBuff", "FedFix", "Schedule", "Synchronous", "check_everyone"]


class Schedule(Protocol):
    """A frozen dataclass that decides which clients are asked when, and when the server moves."""

    @property
    def draws_cohorts(self) -> bool:
        """True if cohorts are drawn and accounted as in `[cohort]`; otherwise the timeline is (`Scheduled`)."""
        ...

    @property
    def shows_messages(self) -> bool:
        """True if other clients see each message, so that only the noise that its sender adds protects it."""
        ...

    def check(self, sampling: Sampling, *, memory: bool) -> None:
        """Raise UserError for a cohort or a method that the schedule does not support.

        Raises:
            UserError: Names the key at fault.
        """
        ...

    def timeline(self, clock: Clock, sampling: Sampling, steps: int, *, memory: bool, hidden: bool) -> Timeline:
        """Return the first `steps` steps.

        Args:
            clock: Determines how long clients take.
            sampling: Selects the clients to ask, if cohorts are drawn.
            steps: Number of steps.
            memory: True if clients have a memory, so that all messages have weight 1.
            hidden: True if the clock must not reveal which clients were asked; see `Synchronous`.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Synchronous:
    """Rounds: ask a cohort, wait, move.

    A round ends when all clients that were asked have answered or were noticed to have dropped out, and at the latest
    after `deadline`. With over-selection it ends when as many clients have answered as the cohort has places. A client
    that has not answered by then is late and does not count.

    Args:
        deadline: Seconds after which a round ends, even if clients are missing; None for no deadline.
        over_select: Asks this many times the places of a cohort of fixed size.

    Privacy: without over-selection, whether an asked client counts depends only on the client itself: on its device,
    its number of examples, its hours and its dropouts. All of these are independent of the data and of other clients.
    Given them, a round in which the client would not count is one in which its message is zero. The sampling's
    accounting is therefore an upper bound for every round, amplification included (thinning). Three cases:

    *   With a deadline and hours of availability, the start of a round decides which clients are in time. So every
        round lasts until its deadline, and round k begins at the same hour regardless of the clients asked and their
        speed.
    *   With a deadline and devices that are always available, being in time does not depend on the start of the round.
        The round may end before its deadline, unless the cohort is `hidden`: the clock must then reveal nothing about
        which clients were asked.
    *   Without a deadline a round waits for the last of the clients asked. Its end, and so the start of the next round,
        depends on all of them, but no client is late. The clients that count are those asked that do not drop out, and
        dropouts are drawn by client and round, independently of the hour.

    With over-selection, the clients that count depend on the others; the timeline is then treated as public and
    accounted (`Scheduled`), without amplification.
    """

    deadline: float | None = None
    over_select: float = 1.0

    def __post_init__(self) -> None:
        if self.deadline is not None:
            _check_seconds("schedule.deadline", self.deadline)
        if not is_real(self.over_select, 1.0, 100.0):
            remedy = "Choose 1.3 to ask 30 % more clients than a round has places, or 1 to ask as many"
            raise UserError("schedule.over_select", "a factor from 1 to 100", shown(self.over_select), remedy)

    @property
    def draws_cohorts(self) -> bool:
        """See `Schedule.draws_cohorts`."""
        return self.over_select == 1.0

    @property
    def shows_messages(self) -> bool:
        """False: messages go to the server."""
        return False

    def check(self, sampling: Sampling, *, memory: bool) -> None:
        """See `Schedule.check`."""
        if not self.draws_cohorts:
            self._asked(sampling)

    def timeline(self, clock: Clock, sampling: Sampling, steps: int, *, memory: bool, hidden: bool) -> Timeline:
        """See `Schedule.timeline`. The sum is divided by the expected cohort, as if all clients asked counted."""
        (asked, places), lasts = self._asked(sampling), self._lasts(clock, hidden=hidden)
        rounds: list[Step] = []
        for number in range(1, steps + 1):
            begin, down, up = (rounds[-1].seconds, *_bytes(rounds[-1])) if rounds else (0.0, 0, 0)
            cohort = asked.cohort(clock.streams.source(Purpose.COHORT, number))
            tried = [clock.participation(client, begin, number) for client in cohort.tolist()]
            rounds.append(self._round(number, begin, tried, places, (down, up), clock.model_bytes, lasts=lasts))
        return Timeline(
            scheme="synchronous" if places is None else "over-selection",
            population=sampling.population,
            expected_size=sampling.expected_size,
            steps=tuple(rounds),
        )

    def _lasts(self, clock: Clock, *, hidden: bool) -> bool:
        """Return True if every round lasts until its deadline; see Privacy above."""
        return self.draws_cohorts and self.deadline is not None and (hidden or clock.fleet.devices.keep_hours)

    def _round(
        self,
        number: int,
        begin: float,
        tried: list[Participation],
        places: int | None,
        sent: tuple[int, int],
        model_bytes: int,
        *,
        lasts: bool,
    ) -> Step:
        until = math.inf if self.deadline is None else begin + self.deadline
        answers = sorted((one.ends, one.client) for one in tried if not one.drops and one.ends <= until)
        end = min(until, max((one.ends for one in tried), default=begin))
        if places is not None and len(answers) >= places:
            answers, end = answers[:places], answers[places - 1][0]
        elif lasts:
            end = until
        counted = {client for _, client in answers}
        reached = [one for one in tried if one.begins <= end]
        late = [one.client for one in reached if not one.drops and one.client not in counted]
        return Step(
            number=number,
            seconds=end,
            groups=(Group(number - 1, 1.0, _ids(counted)),),
            asked=_ids(one.client for one in tried),
            dropped=_ids(one.client for one in reached if one.drops),
            late=_ids(late),
            bytes_down=sent[0] + len(reached) * model_bytes,
            bytes_up=sent[1] + (len(counted) + len(late)) * model_bytes,
        )

    def _asked(self, sampling: Sampling) -> tuple[Sampling, int | None]:
        """Return the sampling of clients to ask, and how many of them count; None for all."""
        if self.draws_cohorts:
            return sampling, None
        if not sampling.cohort_size:
            remedy = "Set sampling and size in [cohort], or remove over_select"
            raise UserError("schedule.over_select", 'cohort.sampling = "fixed"', f'"{sampling.name}"', remedy)
        # 1.1 times 50 is 55, but slightly more in floating point.
        more = math.ceil(self.over_select * sampling.cohort_size * (1.0 - 1e-12))
        if more > sampling.population:
            expected = f"at most {sampling.population / sampling.cohort_size:g} with {sampling.cohort_size} places"
            remedy = f"Lower schedule.over_select: there are {sampling.population} clients to ask"
            raise UserError("schedule.over_select", expected, self.over_select, remedy)
        return FixedSize(sampling.population, more), sampling.cohort_size


@dataclass(frozen=True, kw_only=True)
class FedBuff:
    """A step whenever K messages have arrived, while other clients keep working; K = 1 is plain asynchronous averaging.

    Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", arXiv 2106.06639. `concurrency`
    clients work at any time (fewer if all others wait for the step in which they count). When a client answers or is
    noticed to have dropped out, it makes room for another, drawn uniformly from the clients that neither work nor wait.
    A message that is s steps behind has weight (1 + s)^-a; the weighted sum is divided by K.

    Args:
        buffer_size: K.
        concurrency: Number of clients at work at a time.
        staleness_exponent: a; None is 1/2, or 0 for methods with memory, which require equal weights.
    """

    buffer_size: int
    concurrency: int
    staleness_exponent: float | None = None

    def __post_init__(self) -> None:
        for key in ("buffer_size", "concurrency"):
            at_least_one(f"schedule.{key}", getattr(self, key), "Set it to a number of clients")
        if self.staleness_exponent is not None:
            remedy = "Choose 0.5, the usual value, or 0 for equal weights"
            real_from("schedule.staleness_exponent", self.staleness_exponent, 0, remedy, high=100.0)

    @property
    def draws_cohorts(self) -> bool:
        """False: the timeline is accounted."""
        return False

    @property
    def shows_messages(self) -> bool:
        """False: messages go to the server."""
        return False

    def check(self, sampling: Sampling, *, memory: bool) -> None:
        """See `Schedule.check`."""
        check_everyone("fedbuff", sampling)
        for key in ("buffer_size", "concurrency"):
            if getattr(self, key) > sampling.population:
                expected = f"at most {sampling.population}, the number of clients"
                raise UserError(
                    f"schedule.{key}",
                    expected,
                    getattr(self, key),
                    "Lower it, because a client counts at most once in a step",
                )
        if memory and self.staleness_exponent:
            expected = "0, or no value, for a method with memory"
            remedy = "Remove it: down-weighted messages would make the server's memory diverge from the clients'"
            raise UserError("schedule.staleness_exponent", expected, self.staleness_exponent, remedy)

    def timeline(self, clock: Clock, sampling: Sampling, steps: int, *, memory: bool, hidden: bool) -> Timeline:
        """See `Schedule.timeline`."""
        usual = 0.0 if memory else 0.5
        exponent = usual if self.staleness_exponent is None else self.staleness_exponent
        return Timeline(
            scheme="fedbuff",
            population=sampling.population,
            expected_size=float(self.buffer_size),
            steps=tuple(_Buffer(clock, self.buffer_size, self.concurrency, exponent).run(steps)),
        )


@dataclass(frozen=True, kw_only=True)
class FedFix:
    """A step every `window` seconds, from the messages that have arrived; all clients are always at work.

    Fraboni, Vidal, Kameni, Lorenzi 2023, "A General Theory for Federated Optimization with Asynchronous and
    Heterogeneous Clients Updates", arXiv 2206.10189: x += eta sum_i d_i (w_i - x_start_i) over the arrived messages,
    with d_i = ceil(tau_i / Dt) p_i, tau_i the time of client i's work and p_i = 1 / n. Here tau_i includes the wait for
    a client's hours, and 1 / n is the division by the expected weight of a step, n. A slow client counts rarely and
    then with a larger weight; it also has the highest privacy cost. With memory every message has weight 1, and the
    mean of memories already makes clients equal.

    Args:
        window: Dt in simulated seconds.
    """

    window: float

    def __post_init__(self) -> None:
        _check_seconds("schedule.window", self.window)

    @property
    def draws_cohorts(self) -> bool:
        """False: the timeline is accounted."""
        return False

    @property
    def shows_messages(self) -> bool:
        """False: messages go to the server."""
        return False

    def check(self, sampling: Sampling, *, memory: bool) -> None:
        """See `Schedule.check`."""
        check_everyone("fedfix", sampling)

    def timeline(self, clock: Clock, sampling: Sampling, steps: int, *, memory: bool, hidden: bool) -> Timeline:
        """See `Schedule.timeline`."""
        population = sampling.population
        return Timeline(
            scheme="fedfix",
            population=population,
            expected_size=float(population),
            steps=tuple(self._windows(clock, population, steps, equal=memory)),
        )

    def _windows(self, clock: Clock, population: int, steps: int, *, equal: bool) -> Iterator[Step]:
        free: dict[int, list[int]] = defaultdict(list)  # clients that can be asked, by the last step
        takes: dict[int, int] = defaultdict(int)  # number of downloads, by window
        ends: dict[int, list[tuple[Participation, int]]] = defaultdict(list)  # answers with the step before, by window
        attempts: dict[int, int] = defaultdict(int)
        free[0] = list(range(population))
        down = up = 0
        for number in range(1, steps + 1):
            asked = free.pop(number - 1, [])
            for client in asked:
                attempts[client] += 1
                one = clock.participation(client, (number - 1) * self.window, attempts[client])
                takes[max(self._within(one.begins), number)] += 1
                ends[max(self._within(one.ends), number)].append((one, number - 1))
            arrived = ends.pop(number, [])
            free[number] = sorted(one.client for one, _ in arrived)
            groups: dict[tuple[int, float], list[int]] = defaultdict(list)
            for one, since in arrived:
                if not one.drops:
                    start = min(max(int(one.begins // self.window), since), number - 1)
                    groups[start, 1.0 if equal else float(number - since)].append(one.client)
            down += takes.pop(number, 0) * clock.model_bytes
            late = self._under_way(ends, number) if number == steps else []
            up += (sum(map(len, groups.values())) + len(late)) * clock.model_bytes
            yield Step(
                number=number,
                seconds=number * self.window,
                groups=_groups(groups, number),
                asked=_ids(asked),
                dropped=_ids(one.client for one, _ in arrived if one.drops),
                late=_ids(late),
                bytes_down=down,
                bytes_up=up,
            )

    def _within(self, seconds: float) -> int:
        """Return the window, from 1, that contains a time; a boundary belongs to the earlier window."""
        return math.ceil(seconds / self.window)

    def _under_way(self, ends: dict[int, list[tuple[Participation, int]]], number: int) -> list[int]:
        """Return the clients that took a model by the end of a window and will answer after it."""
        expected = [one for answers in ends.values() for one, _ in answers]
        return [one.client for one in expected if self._within(one.begins) <= number and not one.drops]


SCHEDULES: Registry[Schedule] = Registry(
    "schedule",
    {
        "synchronous": Synchronous,
        "fedbuff": FedBuff,
        "fedfix": FedFix,
        "token": "fedpriv.clock.token_walk:Token",
    },
)


@dataclass
class _Buffer:
    """The events of FedBuff, ordered by time and then by when they were scheduled."""

    clock: Clock
    size: int
    concurrency: int
    exponent: float
    _events: list[tuple[float, int, bool, Participation]] = field(default_factory=list)
    _busy: set[int] = field(default_factory=set)  # at work, or waiting for their step
    _starts: dict[int, int] = field(default_factory=dict)  # model numbers of clients at work
    _attempts: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _at_work: int = 0
    _asks: int = 0
    _foreseen: int = 0

    def run(self, steps: int) -> Iterator[Step]:
        """Yield `steps` steps."""
        done = down = up = 0
        waiting: dict[int, list[int]] = defaultdict(list)  # by the model that they took
        asked, dropped = self._ask(0.0), []
        while done < steps:
            now, _, answers, one = heapq.heappop(self._events)
            if not answers:
                self._starts[one.client] = done
                down += self.clock.model_bytes
                self._foresee(one.ends, True, one)
                continue
            self._at_work -= 1
            start = self._starts.pop(one.client)
            if one.drops:
                dropped.append(one.client)
                self._busy.discard(one.client)
            else:
                waiting[start].append(one.client)
                up += self.clock.model_bytes
            if sum(map(len, waiting.values())) == self.size:
                done += 1
                late = self._under_way() if done == steps else []
                up += len(late) * self.clock.model_bytes
                weighed = {(s, (1.0 + done - 1 - s) ** -self.exponent): clients for s, clients in waiting.items()}
                groups = _groups(weighed, done)
                yield Step(done, now, groups, _ids(asked), _ids(dropped), _ids(late), down, up)
                for clients in waiting.values():
                    self._busy.difference_update(clients)
                waiting, asked, dropped = defaultdict(list), [], []
            asked += self._ask(now)

    def _under_way(self) -> list[int]:
        """Return the clients that have taken a model and will answer."""
        return [one.client for _, _, answers, one in self._events if answers and not one.drops]

    def _ask(self, now: float) -> list[int]:
        """Put clients to work until enough are working; return them."""
        asked = []
        while self._at_work < self.concurrency and len(self._busy) < self.clock.population:
            client = self._draw()
            self._busy.add(client)
            self._attempts[client] += 1
            self._at_work += 1
            one = self.clock.participation(client, now, self._attempts[client])
            self._foresee(one.begins, False, one)
            asked.append(client)
        return asked

    def _draw(self) -> int:
        """Draw uniformly from the clients that are not busy, by rejection."""
        self._asks += 1
        source, everyone = self.clock.streams.source(Purpose.ASKING, self._asks), self.clock.population
        while True:
            for client in (source.uniform(64) * everyone).astype(np.int64).tolist():
                if client not in self._busy:
                    return client

    def _foresee(self, when: float, answers: bool, one: Participation) -> None:
        self._foreseen += 1
        heapq.heappush(self._events, (when, self._foreseen, answers, one))


def _groups(weighed: dict[tuple[int, float], list[int]], number: int) -> tuple[Group, ...]:
    """Return groups in a fixed order; if no client counts, one empty group with the newest model."""
    found = [Group(start, weight, _ids(clients)) for (start, weight), clients in sorted(weighed.items())]
    return tuple(found) or (Group(number - 1, 1.0, _ids(())),)


def _ids(clients: Iterable[int]) -> np.ndarray:
    return np.array(sorted(clients), dtype=np.int64)


def _bytes(step: Step) -> tuple[int, int]:
    return step.bytes_down, step.bytes_up


def _check_seconds(key: str, value: float) -> None:
    if not is_real(value, 1e-6, 1e12):
        raise UserError(
            key,
            "simulated seconds, from 1e-06 to 1e+12",
            shown(value),
            "Choose seconds to hours, the duration of a participation",
        )


def check_everyone(schedule: str, sampling: Sampling) -> None:
    """Raise UserError if the sampling draws cohorts although the schedule selects the clients."""
    if sampling.name != Everyone.name:
        remedy = "Remove [cohort], because the schedule selects the clients"
        got = f'"{sampling.name}"'
        raise UserError("cohort.sampling", f'"everyone" with schedule.kind = "{schedule}"', got, remedy)
