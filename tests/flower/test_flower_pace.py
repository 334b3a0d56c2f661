"""Rounds of equal duration: neither the time nor the content of a model reveals how fast a client is."""

import logging
import math
from types import SimpleNamespace

import pytest
from flower_existing_app import CLIENTS, app, initial_net
from flower_in_process import InProcessGrid, inside_a_run
from flwr.app import ArrayRecord, ConfigRecord

from fedpriv.errors import UserError
from fedpriv.flower.messages import asks_node_info
from fedpriv.flower.server import pace
from fedpriv.privacy import Everyone, Poisson
from strategies import AlphaNormEC, DPFedAvg, Privacy, method_strategy

CENTRAL = Privacy(noise_multiplier=1.0)
SECRET = Poisson(CLIENTS, 0.5)
ROUNDS, SECONDS, POLL = 6, 60.0, 3.0
WINDOW = 0.95 * SECONDS - 5.0


@pytest.fixture
def clock(monkeypatch):
    """Clock that advances only while a client works or the server sleeps."""
    clock = SimpleNamespace(now=1000.0)

    def sleep(seconds):
        assert seconds >= 0.0
        clock.now += seconds

    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    return clock


class ClockedGrid(InProcessGrid):
    """Grid of clients with given durations; it polls for answers every three seconds, like Flower's grid."""

    def __init__(self, clock, seconds, **given):
        super().__init__(app, CLIENTS, **given)
        self.clock = clock
        self.seconds = seconds
        self.waits = []

    def send_and_receive(self, messages, *, timeout=None):
        asked = list(messages)
        answers = super().send_and_receive(asked, timeout=timeout)
        if not asked or asks_node_info(asked[0].content):
            return answers
        self.waits.append(timeout)
        needed = {m.metadata.dst_node_id: self.seconds[self.order.index(m.metadata.dst_node_id)] for m in asked}
        end = POLL * math.ceil(min(math.inf if timeout is None else timeout, max(needed.values())) / POLL)
        self.clock.now += end
        return [answer for answer in answers if needed[answer.metadata.src_node_id] <= end]


def run(clock, seconds, rounds=ROUNDS, timeout=3600.0, **given):
    """Run a strategy; return it, its grid and the time of each model, in seconds from the first."""
    strategy = given.pop("kind", DPFedAvg)(num_clients=CLIENTS, seed=4, **given)
    grid, moments = ClockedGrid(clock, seconds), []
    with inside_a_run():
        strategy.start(
            grid,
            ArrayRecord(initial_net().state_dict()),
            num_rounds=rounds,
            timeout=timeout,
            train_config=ConfigRecord({"lr": 0.1}),
            evaluate_fn=lambda *_: moments.append(clock.now),
        )
    return strategy, grid, [moment - moments[0] for moment in moments]


FAST, UNLIKE, HANGING = [1.0] * CLIENTS, [1.0, 20.0, 1.0, 40.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1e6]


@pytest.mark.parametrize("seconds", [FAST, UNLIKE, HANGING], ids=["fast", "unlike", "one hangs"])
@pytest.mark.parametrize("kind", [DPFedAvg, AlphaNormEC])
def test_a_round_of_a_secret_cohort_lasts_its_time_whoever_takes_part(kind, seconds, clock, caplog):
    with caplog.at_level(logging.WARNING, "flwr"):
        strategy, _, moments = run(clock, seconds, kind=kind, privacy=CENTRAL, cohort=SECRET, round_seconds=SECONDS)
    assert strategy.plan is not None
    assert strategy.plan.amplification
    assert moments == pytest.approx([SECONDS * k for k in range(ROUNDS + 1)])
    assert "more than round_seconds" not in caplog.text


def test_an_empty_cohort_does_not_show_either(clock):
    strategy, grid, moments = run(
        clock, FAST, rounds=12, privacy=CENTRAL, cohort=Poisson(CLIENTS, 0.1), round_seconds=SECONDS
    )
    assert len(grid.waits) < 12
    assert moments == pytest.approx([SECONDS * k for k in range(13)])
    assert strategy.attendance.counted > 0


def test_an_answer_after_the_window_is_a_message_of_zero(clock, caplog):
    slow = [1.0, 1.0, 1.0, WINDOW + POLL + 0.1, 1.0]
    with caplog.at_level(logging.WARNING, "flwr"):
        late, grid, _ = run(clock, slow, privacy=CENTRAL, cohort=SECRET, round_seconds=SECONDS)
    assert 3 not in late.attendance.last_round
    assert f"client 3: no answer within {WINDOW:g} s" in caplog.text
    assert set(grid.waits) == {WINDOW}
    sent = [message for message in grid.seen if not asks_node_info(message.content)]
    assert {message.metadata.ttl for message in sent} == {WINDOW}
    fast = [*slow[:3], WINDOW - POLL, *slow[4:]]
    in_time, _, _ = run(clock, fast, privacy=CENTRAL, cohort=SECRET, round_seconds=SECONDS)
    assert 3 in in_time.attendance.last_round


def test_the_waiting_is_never_longer_than_the_timeout(clock):
    _, grid, moments = run(clock, HANGING, timeout=12.0, privacy=CENTRAL, cohort=SECRET, round_seconds=SECONDS)
    assert set(grid.waits) == {12.0}
    assert moments == pytest.approx([SECONDS * k for k in range(ROUNDS + 1)])


def test_evaluation_by_clients_lasts_its_time_too(clock):
    _, _, moments = run(clock, UNLIKE, privacy=CENTRAL, cohort=SECRET, round_seconds=SECONDS, evaluate=True)
    assert moments == pytest.approx([2.0 * SECONDS * k for k in range(ROUNDS + 1)])


def test_a_round_that_takes_longer_than_its_time_is_said(clock, caplog, monkeypatch):
    strategy = DPFedAvg(num_clients=CLIENTS, seed=4, privacy=CENTRAL, cohort=SECRET, round_seconds=SECONDS)
    read = method_strategy.read_answers

    def slowly(*given):
        clock.now += 30.0
        return read(*given)

    monkeypatch.setattr(method_strategy, "read_answers", slowly)
    with inside_a_run(), caplog.at_level(logging.WARNING, "flwr"):
        strategy.start(
            ClockedGrid(clock, [40.0] * CLIENTS),
            ArrayRecord(initial_net().state_dict()),
            num_rounds=1,
            train_config=ConfigRecord({"lr": 0.1}),
        )
    assert "a round took 12.0 s more than round_seconds = 60, which may reveal who took part" in caplog.text


def test_without_a_time_a_round_ends_with_its_last_answer_and_a_client_that_hangs_costs_the_timeout(clock):
    _, grid, moments = run(clock, FAST, cohort=Everyone(CLIENTS))
    assert moments == pytest.approx([POLL * k for k in range(ROUNDS + 1)])
    assert set(grid.waits) == {3600.0}
    _, _, moments = run(clock, HANGING, rounds=2, timeout=300.0, cohort=Everyone(CLIENTS))
    assert moments == pytest.approx([300.0 * k for k in range(3)])


@pytest.mark.parametrize(
    ("given", "said", "not_said"),
    [
        ({"cohort": SECRET}, "not against one who can time rounds", "regardless of who takes part"),
        (
            {"cohort": SECRET, "round_seconds": SECONDS},
            "every round lasts 60 s, regardless of who takes part",
            "can time rounds",
        ),
        ({"cohort": Everyone(CLIENTS)}, "Failures:", "Time:"),
    ],
    ids=["secret", "secret and equally long", "everyone"],
)
def test_the_statement_says_what_a_rounds_time_shows(given, said, not_said, clock):
    strategy, _, _ = run(clock, FAST, rounds=1, privacy=CENTRAL, **given)
    statement = " ".join(strategy.statement.split())
    assert said in statement
    assert not_said not in statement


@pytest.mark.parametrize("seconds", [0.0, 9.9, -1.0, math.inf, math.nan])
def test_a_time_that_leaves_none_for_answers_is_refused(seconds):
    with pytest.raises(UserError, match="round_seconds: expected seconds from 10 to 1e9, got"):
        DPFedAvg(round_seconds=seconds)


def test_a_node_that_comes_back_takes_no_more_than_its_share_of_a_round(clock):
    """A node that joins again is asked for its id before any client is asked to train."""
    strategy = DPFedAvg(num_clients=CLIENTS, seed=4, privacy=CENTRAL, cohort=SECRET, round_seconds=SECONDS)
    grid, moments = ClockedGrid(clock, FAST), []
    introduced = []
    send = grid.send_and_receive

    def sending(messages, *, timeout=None):
        asked = list(messages)
        if asked and asks_node_info(asked[0].content):
            introduced.append(timeout)
            if len(introduced) > 1:
                clock.now += timeout
                return []
        return send(asked, timeout=timeout)

    grid.send_and_receive = sending

    def rejoin(*_):
        moments.append(clock.now)
        grid.get_node_ids = lambda: [*grid.order[1:], 77]

    with inside_a_run():
        strategy.start(
            grid,
            ArrayRecord(initial_net().state_dict()),
            num_rounds=2,
            train_config=ConfigRecord({"lr": 0.1}),
            evaluate_fn=rejoin,
        )
    assert introduced[1:] == [pytest.approx(WINDOW / 4)]
    assert [moment - moments[0] for moment in moments] == pytest.approx([0.0, SECONDS, 2.0 * SECONDS])
