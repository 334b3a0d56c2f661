"""Laws of devices, the virtual clock and the schedules, all without data."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from support.clocks import FREE, SCHEDULES, STEADY, UNEQUAL, clock, entries, sampling_of, timeline, traced
from support.helpers import FALSE_ALARM, accepts_law

from fedpriv.clock import Clock, FedBuff, FedFix, Fleet, Group, Profile, Step, Synchronous, Timeline
from fedpriv.clock.profiles import LogNormal, Same, Trace, Uniform
from fedpriv.errors import UserError
from fedpriv.privacy import Everyone, FixedSize, Poisson, Sampling
from fedpriv.streams import SeededStreams

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
SEEDS = range(3)


# Devices.


def test_log_normal_devices_have_the_median_and_the_spread_that_they_state() -> None:
    devices = LogNormal(speed=30.0, download=1e6, upload=2e5, speed_spread=0.7, download_spread=1.3, upload_spread=0.0)
    fleet = Fleet(devices, 4000, SeededStreams(3))
    profiles = [fleet.profile(client) for client in range(4000)]
    speeds, downloads = (np.log([getattr(one, key) for one in profiles]) for key in ("speed", "download"))
    assert accepts_law((speeds - np.log(30.0)) / 0.7, stats.norm.cdf)
    assert accepts_law((downloads - np.log(1e6)) / 1.3, stats.norm.cdf)
    assert not accepts_law((speeds - np.log(30.0)) / 0.5, stats.norm.cdf)
    assert {one.upload for one in profiles} == {2e5}
    assert abs(np.corrcoef(speeds, downloads)[0, 1]) < stats.norm.isf(FALSE_ALARM / 2) / np.sqrt(4000)


def test_uniform_devices_fill_their_range_and_hours_fill_the_day() -> None:
    fleet = Fleet(Uniform(speed=(2.0, 6.0), download=(1.0, 1.0), upload=(5.0, 9.0)), 4000, SeededStreams(3))
    profiles = [fleet.profile(client) for client in range(4000)]
    assert accepts_law(np.array([one.speed for one in profiles]), stats.uniform(2.0, 4.0).cdf)
    assert accepts_law(np.array([one.upload for one in profiles]), stats.uniform(5.0, 4.0).cdf)
    assert accepts_law(np.array([one.phase for one in profiles]), stats.uniform().cdf)


def test_a_device_depends_on_the_seed_and_the_client_alone() -> None:
    few, many = Fleet(UNEQUAL, 10, SeededStreams(3)), Fleet(UNEQUAL, 10**9, SeededStreams(3))
    forwards = [few.profile(client) for client in range(10)]
    assert forwards == [many.profile(client) for client in reversed(range(10))][::-1]
    assert len(set(forwards)) == 10
    assert Fleet(UNEQUAL, 10, SeededStreams(4)).profile(0) != forwards[0]
    with pytest.raises(IndexError):
        few.profile(10)


def test_a_trace_gives_a_row_to_each_client_or_draws_rows_for_more(tmp_path: Path) -> None:
    rows = [Profile(1.0 + i, 10.0, 20.0, 0.5, 0.25, 0.1) for i in range(4)]
    devices = traced(tmp_path / "trace.csv", rows)
    assert [Fleet(devices, 3, SeededStreams(1)).profile(client) for client in range(3)] == rows[:3]
    drawn = [Fleet(devices, 4000, SeededStreams(1)).profile(client) for client in range(4000)]
    counts = [drawn.count(row) for row in rows]
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_a_trace_may_leave_out_habits(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("upload,speed,download\n3,1,2\n")
    assert Trace(file=str(file)).rows == (Profile(1.0, 2.0, 3.0, 1.0, 0.0, 0.0),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("speed,download\n1,2\n", "upload"),
        ("speed,download,upload,sped\n1,2,3,4\n", "speed"),
        ("speed,speed,download,upload\n1,1,2,3\n", "once"),
        ("speed,download,upload\n1,2\n", "line 2"),
        ("speed,download,upload\n1,2,3\n\n1,2,3,4\n", "line 4"),
        ("speed,download,upload\n1,fast,3\n", "download"),
        ("speed,download,upload\n1,0,3\n", "download"),
        ("speed,download,upload\n1,nan,3\n", "download"),
        ("speed,download,upload,dropout\n1,2,3,1\n", "dropout"),
        ("speed,download,upload,available\n1,2,3,0\n", "available"),
        ("speed,download,upload,phase\n1,2,3,2\n", "phase"),
        ("speed,download,upload\n", "a header alone"),
        ("", "an empty file"),
    ],
)
def test_a_mistake_in_a_trace_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        Trace(file=str(file))
    assert says in str(caught.value)
    assert "trace.csv" in str(caught.value)


def test_a_trace_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"devices\.file"):
        Trace(file=str(tmp_path / "none.csv"))


# The clock.


def test_a_participation_is_download_work_and_upload() -> None:
    made = clock(Same(speed=4.0, download=100.0, upload=50.0), 1, examples=[12], model_bytes=1000)
    one = made.participation(0, 7.0, 1)
    assert (one.begins, one.ends, one.drops) == (7.0, 7.0 + 10.0 + 3.0 + 20.0, False)


def test_a_client_waits_for_its_hours(tmp_path: Path) -> None:
    day = 100.0
    made = traced(tmp_path / "trace.csv", [Profile(1.0, 1.0, 1.0, 0.25, 0.5), Profile(1.0, 1.0, 1.0, 0.5, 0.75)], day)
    fleet = Fleet(made, 2, SeededStreams(0))
    assert [fleet.begins(0, asked) for asked in (0.0, 50.0, 60.0, 80.0, 149.0)] == [50.0, 50.0, 60.0, 150.0, 150.0]
    assert [fleet.begins(1, asked) for asked in (0.0, 10.0, 30.0, 80.0)] == [0.0, 10.0, 75.0, 80.0]


def test_clients_drop_out_as_often_as_they_are_said_to() -> None:
    made = clock(Same(speed=1.0, download=1.0, upload=1.0, dropout=0.3), 50)
    drops = sum(made.participation(client, 0.0, k).drops for client in range(50) for k in range(80))
    assert stats.binomtest(drops, 4000, 0.3).pvalue > FALSE_ALARM
    assert stats.binomtest(drops, 4000, 0.2).pvalue < FALSE_ALARM


# Schedules.


@pytest.mark.parametrize("seed", SEEDS)
@every_schedule
def test_a_client_counts_once_in_a_step_and_is_asked_again_only_when_that_step_is_done(name: str, seed: int) -> None:
    made = timeline(name, seed=seed)
    for steps in entries(made).values():
        assert all(start < step for step, start, _ in steps)
        assert all(before[0] <= after[1] for before, after in itertools.pairwise(steps))


@pytest.mark.parametrize("seed", SEEDS)
@every_schedule
def test_nobody_counts_who_dropped_out_or_was_late(name: str, seed: int) -> None:
    for step in timeline(name, seed=seed).steps:
        counted = set(step.counted.tolist())
        assert not counted & set(step.late.tolist())
        if "rounds" in name or "over" in name:
            assert not counted & set(step.dropped.tolist())
            assert counted | set(step.late.tolist()) | set(step.dropped.tolist()) <= set(step.asked.tolist())


@pytest.mark.parametrize("seed", SEEDS)
@every_schedule
def test_time_and_bytes_only_grow_and_every_message_is_paid_for(name: str, seed: int) -> None:
    made = timeline(name, seed=seed)
    assert [step.number for step in made.steps] == list(range(1, 26))
    for earlier, later in itertools.pairwise(made.steps):
        assert earlier.seconds <= later.seconds
        assert earlier.bytes_down <= later.bytes_down
        assert later.bytes_up - earlier.bytes_up == 400 * len(later.sent)
    last = made.steps[-1]
    messages = sum(len(step.sent) + len(step.dropped) for step in made.steps)
    asked = sum(len(step.asked) for step in made.steps)
    assert 400 * messages <= last.bytes_down <= 400 * asked


@every_schedule
def test_a_timeline_is_its_seeds_and_a_longer_one_begins_with_it(name: str) -> None:
    made = timeline(name, steps=10)
    assert made.fingerprint == timeline(name, steps=10).fingerprint != timeline(name, steps=10, seed=6).fingerprint
    longer = timeline(name, steps=20)
    *before, last = longer.steps[:10]
    # Clients still at work at the end are late there, and count later in the longer timeline.
    last = last._replace(late=made.steps[-1].late, bytes_up=made.steps[-1].bytes_up)
    cut = Timeline(scheme="", population=16, expected_size=1.0, steps=(*before, last))
    assert cut.fingerprint == made.fingerprint
    assert [step.bytes_up for step in cut.steps] == [step.bytes_up for step in made.steps]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["fedbuff", "fedbuff that weighs little", "asynchronous", "fedfix"])
def test_who_is_under_way_when_the_last_step_is_done_is_who_would_have_counted_later(name: str, seed: int) -> None:
    made, longer = timeline(name, seed=seed, steps=10), timeline(name, seed=seed, steps=120)
    assert all(not len(step.late) for step in made.steps[:-1])
    later = [client for client, steps in entries(longer).items() if any(start < 10 < step for step, start, _ in steps)]
    assert sorted(later) == made.steps[-1].late.tolist()


@every_schedule
def test_with_memory_every_message_weighs_the_same(name: str) -> None:
    if SCHEDULES[name][0] != FedBuff(buffer_size=3, concurrency=12, staleness_exponent=1.5):
        weights = {group.weight for step in timeline(name, memory=True).steps for group in step.groups}
        assert weights == {1.0}


def test_a_round_lasts_until_the_last_answer_or_the_deadline(tmp_path: Path) -> None:
    devices = traced(tmp_path / "t.csv", [Profile(1.0, 1e9, 1e9), Profile(0.5, 1e9, 1e9), Profile(0.1, 1e9, 1e9)])
    made = clock(devices, 3, examples=[2, 2, 2], model_bytes=10**3)
    whole = Synchronous().timeline(made, Everyone(3), 2, memory=False, hidden=False)
    assert [step.seconds for step in whole.steps] == pytest.approx([20.0, 40.0], rel=1e-6)
    assert whole.step(2).counted.tolist() == [0, 1, 2]
    cut = Synchronous(deadline=5.0).timeline(made, Everyone(3), 2, memory=False, hidden=False)
    assert [step.seconds for step in cut.steps] == [5.0, 10.0]
    assert cut.step(1).counted.tolist() == [0, 1]
    assert cut.step(1).late.tolist() == [2]
    assert (cut.step(2).bytes_down, cut.step(2).bytes_up) == (6000, 6000)
    ample = Synchronous(deadline=100.0).timeline(made, Everyone(3), 1, memory=False, hidden=False)
    assert ample.step(1).seconds == pytest.approx(20.0)


def test_over_selection_takes_the_first_answers_and_no_more() -> None:
    made = clock(STEADY, 20)
    steps = Synchronous(over_select=1.5).timeline(made, FixedSize(20, 8), 10, memory=False, hidden=False).steps
    for step in steps:
        assert len(step.asked) == 12
        assert len(step.counted) == 8
        assert len(step.late) == 4
        begin = steps[step.number - 2].seconds if step.number > 1 else 0.0
        ends = {one: made.participation(one, begin, step.number).ends for one in step.asked.tolist()}
        assert max(ends[one] for one in step.counted.tolist()) == step.seconds
        assert min(ends[one] for one in step.late.tolist()) >= step.seconds


def test_where_cohorts_are_hidden_the_clock_says_nothing_of_them() -> None:
    schedule, sampling = Synchronous(deadline=8.0), Poisson(30, 0.2)
    hidden = [
        schedule.timeline(clock(STEADY, 30, seed), sampling, 20, memory=False, hidden=True).steps for seed in SEEDS
    ]
    assert all([step.seconds for step in steps] == [8.0 * (k + 1) for k in range(20)] for steps in hidden)
    seen = schedule.timeline(clock(STEADY, 30), sampling, 20, memory=False, hidden=False).steps
    assert seen[-1].seconds < 160.0


def test_where_cohorts_are_hidden_being_in_time_depends_on_nobody_else() -> None:
    made, alone = clock(UNEQUAL, 30), clock(UNEQUAL, 30)
    steps = Synchronous(deadline=8.0).timeline(made, Poisson(30, 0.3), 20, memory=False, hidden=True).steps
    for step in steps:
        for client in step.asked.tolist():
            one = alone.participation(client, 8.0 * (step.number - 1), step.number)
            in_time = not one.drops and one.ends <= 8.0 * step.number
            assert (client in step.counted) == in_time


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("available", [1.0, 0.5])
@pytest.mark.parametrize("deadline", [None, 8.0])
@pytest.mark.parametrize("sampling", [Everyone(12), Poisson(12, 0.4), FixedSize(12, 5)])
@pytest.mark.sampled
def test_slowing_a_client_changes_no_other_clients_rounds(
    tmp_path: Path, sampling: Sampling, deadline: float | None, available: float, hidden: bool
) -> None:
    for seed in SEEDS:
        fleet, found = Fleet(UNEQUAL, 12, SeededStreams(seed)), []
        profiles = [fleet.profile(client)._replace(available=available) for client in range(12)]
        for slower in (1.0, 3.0, 1e3):
            first = profiles[0]._replace(speed=profiles[0].speed / slower)
            made = clock(traced(tmp_path / "t.csv", [first, *profiles[1:]], day=60.0), 12, seed)
            rule = Synchronous(deadline=deadline)
            steps = rule.timeline(made, sampling, 20, memory=False, hidden=hidden).steps
            found.append([[client for client in step.counted.tolist() if client != 0] for step in steps])
        assert found[0] == found[1] == found[2]


def test_rounds_last_until_the_deadline_where_devices_keep_hours(tmp_path: Path) -> None:
    quick = Profile(1e3, 1e9, 1e9)
    for last, seconds in ((quick, 0.01), (quick._replace(available=0.9, phase=0.95), 8.0)):
        made = clock(traced(tmp_path / "t.csv", [quick, last]), 2, examples=[10, 10], model_bytes=1)
        step = Synchronous(deadline=8.0).timeline(made, Everyone(2), 1, memory=False, hidden=False).step(1)
        assert step.seconds == pytest.approx(seconds, rel=1e-6)
        assert step.counted.tolist() == [0, 1]


@pytest.mark.parametrize(("factor", "places", "asked"), [(1.1, 50, 55), (1.3, 100, 130), (1.1, 5, 6), (1.0001, 50, 51)])
def test_over_selection_asks_as_many_as_are_written(factor: float, places: int, asked: int) -> None:
    made, sampling = clock(STEADY, 200), FixedSize(200, places)
    step = Synchronous(over_select=factor).timeline(made, sampling, 1, memory=False, hidden=False).step(1)
    assert (len(step.asked), len(step.counted)) == (asked, places)


@pytest.mark.parametrize("seconds", [1e13, 1e-7, float("nan")])
def test_seconds_out_of_range_are_told_the_range(seconds: float) -> None:
    for make, key in ((Synchronous, "deadline"), (FedFix, "window")):
        with pytest.raises(UserError, match=rf"^schedule\.{key}: expected .* from 1e-06 to 1e\+12, got"):
            make(**{key: seconds})


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["fedbuff", "fedbuff that weighs little", "asynchronous"])
def test_fedbuff_steps_at_every_kth_message_and_weighs_by_staleness(name: str, seed: int) -> None:
    made, rule = timeline(name, seed=seed), SCHEDULES[name][0]
    assert isinstance(rule, FedBuff)
    exponent = 0.5 if rule.staleness_exponent is None else rule.staleness_exponent
    for step in made.steps:
        assert len(step.counted) == rule.buffer_size
        for group in step.groups:
            assert group.weight == (1.0 + step.number - 1 - group.start) ** -exponent
    assert made.expected_size == rule.buffer_size
    assert max(step.staleness or 0.0 for step in made.steps) > 0.0


def test_fedbuff_of_equal_devices_that_all_work_and_all_count_is_rounds() -> None:
    made = clock(Same(speed=1.0, download=1.0, upload=1.0), 6, examples=[3] * 6)
    buffer = FedBuff(buffer_size=6, concurrency=6).timeline(made, Everyone(6), 5, memory=False, hidden=False)
    rounds = Synchronous().timeline(made, Everyone(6), 5, memory=False, hidden=False)
    assert buffer.fingerprint == rounds.fingerprint


def test_fedbuff_asks_everybody_alike() -> None:
    devices = Same(speed=1.0, download=1.0, upload=1.0)
    made = FedBuff(buffer_size=5, concurrency=10).timeline(
        clock(devices, 40, examples=[3] * 40), Everyone(40), 800, memory=False, hidden=False
    )
    counts = np.bincount(np.concatenate([step.counted for step in made.steps]), minlength=40)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_fedfix_with_a_long_window_is_rounds_of_that_length() -> None:
    made = clock(STEADY, 12)
    windows = FedFix(window=1e4).timeline(made, Everyone(12), 5, memory=False, hidden=False)
    assert [step.seconds for step in windows.steps] == [1e4 * (k + 1) for k in range(5)]
    assert all(step.counted.tolist() == list(range(12)) for step in windows.steps)
    assert {group.weight for step in windows.steps for group in step.groups} == {1.0}


@pytest.mark.parametrize("seed", SEEDS)
def test_fedfix_gives_every_client_the_same_weight_in_the_long_run(seed: int) -> None:
    made = FedFix(window=0.7).timeline(clock(STEADY, 12, seed), Everyone(12), 60, memory=False, hidden=False)
    for client, steps in entries(made).items():
        assert sum(weight for _, _, weight in steps) == steps[-1][0], client
        assert all(weight == step - start for step, start, weight in steps)
    assert max(group.weight for step in made.steps for group in step.groups) > 3.0


def test_fedfix_weighs_by_the_windows_that_the_work_takes(tmp_path: Path) -> None:
    devices = traced(tmp_path / "t.csv", [Profile(1.0, 1e9, 1e9), Profile(0.2, 1e9, 1e9)])
    made = FedFix(window=2.0).timeline(
        clock(devices, 2, examples=[1, 1], model_bytes=1), Everyone(2), 6, memory=False, hidden=False
    )
    assert entries(made) == {0: [(k, k - 1, 1.0) for k in range(1, 7)], 1: [(3, 0, 3.0), (6, 3, 3.0)]}


def test_a_client_twice_in_a_step_is_refused() -> None:
    ids, none = np.array([1, 2]), np.array([], dtype=np.int64)
    groups = (Group(0, 1.0, ids), Group(1, 1.0, np.array([2])))
    step = Step(2, 1.0, groups, none, none, none, 0, 0)
    with pytest.raises(ValueError, match="twice"):
        Timeline(scheme="fedbuff", population=4, expected_size=1.0, steps=(step,))


def test_a_model_is_kept_as_long_as_somebody_works_on_it() -> None:
    for name in SCHEDULES:
        made = timeline(name)
        used = {start: step for steps in entries(made).values() for step, start, _ in steps}
        for start, step in used.items():
            assert made.last_use[start] >= step


@pytest.mark.parametrize(
    ("rule", "sampling", "memory", "where"),
    [
        (Synchronous(over_select=1.5), Everyone(10), False, "over_select"),
        (Synchronous(over_select=1.5), Poisson(10, 0.5), False, "over_select"),
        (Synchronous(over_select=3.0), FixedSize(10, 5), False, "over_select"),
        (FedBuff(buffer_size=11, concurrency=2), Everyone(10), False, "buffer_size"),
        (FedBuff(buffer_size=2, concurrency=11), Everyone(10), False, "concurrency"),
        (FedBuff(buffer_size=2, concurrency=2), FixedSize(10, 5), False, "cohort.sampling"),
        (FedBuff(buffer_size=2, concurrency=2, staleness_exponent=0.5), Everyone(10), True, "staleness_exponent"),
        (FedFix(window=1.0), Poisson(10, 0.5), False, "cohort.sampling"),
    ],
)
def test_what_a_schedule_cannot_serve_is_refused(rule, sampling, memory: bool, where: str) -> None:
    with pytest.raises(UserError, match=where):
        rule.check(sampling, memory=memory)


def test_a_buffer_of_all_clients_fills_although_they_wait_in_it() -> None:
    made = FedBuff(buffer_size=10, concurrency=3).timeline(
        clock(UNEQUAL, 10), Everyone(10), 8, memory=False, hidden=False
    )
    assert all(step.counted.tolist() == list(range(10)) for step in made.steps)


def test_the_clock_is_asked_for_nothing_but_numbers() -> None:
    assert set(Clock.__dataclass_fields__) == {"fleet", "examples", "model_bytes", "streams"}
    assert set(FREE) < set(SCHEDULES)
    assert sampling_of("fixed", 8) == FixedSize(8, 4)
