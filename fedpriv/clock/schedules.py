"""When the server moves: after rounds, after so many answers, or after so many seconds. Each is a pure scheduler.

A client is asked again only once the step in which its last message counts is done. So it counts at most once in a
step, its draws of noise and of batches (addressed by step and client) are never the same twice, and it can be told what
became of its message before it moves its memory again. A client that dropped out or came too late has not moved it.

Messages that are still on their way when the last step is done come too late: their clients have taken a model, and
nothing stops them. They are `late` in that step, where rounds have them in the round that ended without them.

Weights and memory: where clients have an error-feedback memory, every message weighs 1. The server's memory moves by
beta / n for each message as the client's own moves by beta, and only so does it stay the mean of theirs; a message
weighed down on its way would part them for ever. Nothing is lost by it: weights exist because a slow client's voice is
heard too seldom or too late, and the mean of memories holds every client's last word at equal weight, however long ago
it was spoken.

What no real client could know when it begins: the step in which its message is going to count. Its batches and its
noise are addressed by that step, and a damped memory decays up to it. A timeline that is known beforehand can say it.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fedpriv.checks import at_least_one, real_from
from fedpriv.clock.participation import Clock, Participation
from fedpriv.clock.timeline import Group, Step, Timeline
from fedpriv.errors import UserError
from fedpriv.plugins import Registry
from fedpriv.privacy import Everyone, FixedSize, Sampling
from fedpriv.streams import Purpose

__all__ = ["SCHEDULES", "FedBuff", "FedFix", "Schedule", "Synchronous"]


class Schedule(Protocol):
    """A frozen dataclass: a rule of who is asked when, and when the server moves."""

    @property
    def draws_cohorts(self) -> bool:
        """Whether cohorts are drawn and accounted as `[cohort]` says. Else the timeline is (`Scheduled`)."""
        ...

    def check(self, sampling: Sampling, *, memory: bool) -> None:
        """Refuses a cohort or a method that the schedule cannot serve.

        Raises:
            UserError: With the key that is at fault.
        """
        ...

    def timeline(self, clock: Clock, sampling: Sampling, steps: int, *, memory: bool, hidden: bool) -> Timeline:
        """The first `steps` steps.

        Args:
            clock: How long clients take.
            sampling: Who is asked, where cohorts are drawn.
            steps: How many.
            memory: Whether clients have a memory, so that all messages weigh 1.
            hidden: Whether it must not be seen from the clock who was asked; see `Synchronous`.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Synchronous:
    """Rounds: ask a cohort, wait, move.

    A round ends when all who were asked have answered, or were noticed to have dropped out; at the latest after
    `deadline`. With over-selection it ends when as many have answered as the cohort has places. Who has not answered by
    then is too late and does not count.

    Args:
        deadline: Seconds after which a round ends, whoever is missing; None for none.
        over_select: Asks for this many times the places of a cohort of fixed size.

    Privacy: without over-selection, whether a client that is asked counts depends on itself alone: on its device, its
    number of examples, its hours and its own dropouts, all of which are independent of data and of other clients. Given
    that, a round in which it would not count is one in which its message is zero, so that every round is at most what
    the sampling's accounting takes it for, amplification included (thinning). Three cases:

    *   With a deadline and hours of availability, when a round begins decides who is in time. So every round lasts
        until its deadline, and the k-th begins at the same hour whoever is asked and however fast they are.
    *   With a deadline and devices that are always there, being in time does not depend on when a round begins. It may
        end before its deadline, unless the cohort is `hidden`: the clock must then say nothing of who was asked.
    *   Without a deadline a round waits for the last of those asked: when it ends, and so when the next begins, depends
        on all of them, but nobody is late. Who counts is who was asked and does not drop out, which is drawn by client
        and round, at whatever hour.

    With over-selection who counts depends on the others; the timeline is then taken as public and accounted
    (`Scheduled`), without amplification.
    """

    deadline: float | None = None
    over_select: float = 1.0

    def __post_init__(self) -> None:
        if self.deadline is not None:
            _check_seconds("schedule.deadline", self.deadline)
        if not 1.0 <= self.over_select <= 100.0:
            remedy = "1.3 asks 30 % more clients than a round has places; 1 asks as many"
            raise UserError("schedule.over_select", "a factor from 1 to 100", self.over_select, remedy)

    @property
    def draws_cohorts(self) -> bool:
        """See `Schedule.draws_cohorts`."""
        return self.over_select == 1.0

    def check(self, sampling: Sampling, *, memory: bool) -> None:
        """See `Schedule.check`."""
        if not self.draws_cohorts:
            self._asked(sampling)

    def timeline(self, clock: Clock, sampling: Sampling, steps: int, *, memory: bool, hidden: bool) -> Timeline:
        """See `Schedule.timeline`. The sum is divided by the expected cohort, as if all who are asked counted."""
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
        """Whether every round lasts until its deadline; see Privacy above."""
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
        """Who is asked, and how many of them count; None for all."""
        if self.draws_cohorts:
            return sampling, None
        if not sampling.cohort_size:
            remedy = "Set sampling and size in [cohort], or leave out over_select"
            raise UserError("schedule.over_select", 'cohort.sampling = "fixed"', f'"{sampling.name}"', remedy)
        # 1.1 times 50 is 55, which floats make a little more.
        more = math.ceil(self.over_select * sampling.cohort_size * (1.0 - 1e-12))
        if more > sampling.population:
            expected = f"at most {sampling.population / sampling.cohort_size:g} with {sampling.cohort_size} places"
            remedy = f"There are {sampling.population} clients to ask"
            raise UserError("schedule.over_select", expected, self.over_select, remedy)
        return FixedSize(sampling.population, more), sampling.cohort_size


@dataclass(frozen=True, kw_only=True)
class FedBuff:
    """A step whenever K messages have arrived, while others go on working; K = 1 is plain asynchronous averaging.

    Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", arXiv 2106.06639. So many clients
    are at work at any time as `concurrency` says (fewer if all others wait for the step in which they count); whoever
    answers or is noticed to have dropped out makes room for another, drawn uniformly from those who neither work nor
    wait. A message that is s steps behind weighs (1 + s)^-a; the weighted sum is divided by K.

    Args:
        buffer_size: K.
        concurrency: Clients at work at a time.
        staleness_exponent: a; None is 1/2, and 0 for methods with memory, whose messages must weigh the same.
    """

    buffer_size: int
    concurrency: int
    staleness_exponent: float | None = None

    def __post_init__(self) -> None:
        for key in ("buffer_size", "concurrency"):
            at_least_one(f"schedule.{key}", getattr(self, key), "Give a number of clients")
        if self.staleness_exponent is not None:
            remedy = "0.5 is usual; 0 weighs all messages the same"
            real_from("schedule.staleness_exponent", self.staleness_exponent, 0, remedy, high=100.0)

    @property
    def draws_cohorts(self) -> bool:
        """No."""
        return False

    def check(self, sampling: Sampling, *, memory: bool) -> None:
        """See `Schedule.check`."""
        _check_everyone("fedbuff", sampling)
        for key in ("buffer_size", "concurrency"):
            if getattr(self, key) > sampling.population:
                expected = f"at most {sampling.population}, the number of clients"
                raise UserError(f"schedule.{key}", expected, getattr(self, key), "A client counts once in a step")
        if memory and self.staleness_exponent:
            got, remedy = self.staleness_exponent, "A weighed message would part the server's memory from the clients'"
            raise UserError("schedule.staleness_exponent", "0, or nothing, for a method with memory", got, remedy)

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
    """A step every `window` seconds, from whatever has arrived; everybody is always at work.

    Fraboni, Vidal, Kameni, Lorenzi 2023, "A General Theory for Federated Optimization with Asynchronous and
    Heterogeneous Clients Updates", arXiv 2206.10189: x += eta sum_i d_i (w_i - x_start_i) over those who arrived, with
    d_i = ceil(tau_i / Dt) p_i, tau_i the time of client i's work and p_i = 1 / n. Here tau_i includes the wait for a
    client's hours, and 1 / n is the division by the expected weight of a step, n. A slow client speaks seldom and then
    louder; it is also the one whose privacy costs most. With memory every message weighs 1, which the mean of memories
    makes fair already.

    Args:
        window: Dt in simulated seconds.
    """

    window: float

    def __post_init__(self) -> None:
        _check_seconds("schedule.window", self.window)

    @property
    def draws_cohorts(self) -> bool:
        """No."""
        return False

    def check(self, sampling: Sampling, *, memory: bool) -> None:
        """See `Schedule.check`."""
        _check_everyone("fedfix", sampling)

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
        free: dict[int, list[int]] = defaultdict(list)  # after which step: who can be asked
        takes: dict[int, int] = defaultdict(int)  # in which window: how many take a model
        ends: dict[int, list[tuple[Participation, int]]] = defaultdict(list)  # in which: who answers, asked after which
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
        """In which window, from 1, a time lies; it ends the earlier of two."""
        return math.ceil(seconds / self.window)

    def _under_way(self, ends: dict[int, list[tuple[Participation, int]]], number: int) -> list[int]:
        """Who has taken a model until the end of a window, and is going to answer after it."""
        expected = [one for answers in ends.values() for one, _ in answers]
        return [one.client for one in expected if self._within(one.begins) <= number and not one.drops]


SCHEDULES: Registry[Schedule] = Registry(
    "schedule",
    {
        "synchronous": Synchronous,
        "fedbuff": FedBuff,
        "fedfix": FedFix,
    },
)


@dataclass
class _Buffer:
    """The events of FedBuff, in order of time and then of when they were foreseen."""

    clock: Clock
    size: int
    concurrency: int
    exponent: float
    _events: list[tuple[float, int, bool, Participation]] = field(default_factory=list)
    _busy: set[int] = field(default_factory=set)  # at work, or waiting for the step in which they count
    _starts: dict[int, int] = field(default_factory=dict)  # of those at work: the number of the model they took
    _attempts: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _at_work: int = 0
    _asks: int = 0
    _foreseen: int = 0

    def run(self, steps: int) -> Iterator[Step]:
        """So many steps."""
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
        """Who has taken a model and is going to answer."""
        return [one.client for _, _, answers, one in self._events if answers and not one.drops]

    def _ask(self, now: float) -> list[int]:
        """Puts clients to work until there are enough; returns whom."""
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
        """One of those who are not busy, uniformly: draws from all until it is one of them."""
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
    """In a fixed order; where nobody counts, one group without clients, from the newest model."""
    found = [Group(start, weight, _ids(clients)) for (start, weight), clients in sorted(weighed.items())]
    return tuple(found) or (Group(number - 1, 1.0, _ids(())),)


def _ids(clients: Iterable[int]) -> np.ndarray:
    return np.array(sorted(clients), dtype=np.int64)


def _bytes(step: Step) -> tuple[int, int]:
    return step.bytes_down, step.bytes_up


def _check_seconds(key: str, value: float) -> None:
    if not 1e-6 <= value <= 1e12:
        raise UserError(key, "simulated seconds, from 1e-06 to 1e+12", value, "A participation lasts seconds to hours")


def _check_everyone(schedule: str, sampling: Sampling) -> None:
    if sampling.name != Everyone.name:
        remedy = "The schedule says who is asked; leave out [cohort]"
        got = f'"{sampling.name}"'
        raise UserError("cohort.sampling", f'"everyone" with schedule.kind = "{schedule}"', got, remedy)
