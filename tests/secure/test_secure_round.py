"""A round: exact sums of all who answered, and a void round instead of a wrong sum."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.secure_round import MAX_TOTAL, World, public_key, signing_key, some_values

from fedpriv.errors import UserError
from fedpriv.secure import Closed, HelperKey, Masked, VoidRoundError, mask_message


def expected(clients: tuple[int, ...] | range | list[int], size: int = 7) -> np.ndarray:
    """Return the sum modulo 2^32, as a number from -2^31 on, in whole numbers without any width."""
    total = [sum(int(some_values(size, client)[k]) for client in clients) for k in range(size)]
    return np.array([(value + 2**31) % 2**32 - 2**31 for value in total], dtype=np.int64)


def test_sums_are_exact_for_every_pattern_of_dropouts(tmp_path: Path) -> None:
    """Partial sums of these values leave the range of 32 bits; the sum of all does not."""
    world = World(tmp_path, helpers=2)
    for round, pattern in enumerate(itertools.product([False, True], repeat=5), start=1):
        facts = world.at(round=round)
        clients = [client for client in range(5) if pattern[client]]
        messages = [world.message(client, facts=facts) for client in reversed(clients)]
        if len(clients) < 3:
            with pytest.raises(VoidRoundError, match=f"round {round}: expected messages from at least 3 clients, got"):
                world.closed(messages, facts)
            continue
        closed = world.closed(messages, facts)
        assert closed.clients == clients
        np.testing.assert_array_equal(world.total(closed), expected(clients))
    full = expected(range(5))
    assert (full == sum(some_values(7, client) for client in range(5))).all()


def test_values_beyond_32_bits_wrap_around(tmp_path: Path) -> None:
    """Only the sum has to fit."""
    world = World(tmp_path)
    far = np.array([2**40, -(2**40), 2**31, -(2**31) - 1, 2**62, 0, 5], dtype=np.int64)
    messages = [world.message(0, far), world.message(1, -far), world.message(2, np.arange(7))]
    np.testing.assert_array_equal(world.total(world.closed(messages)), np.arange(7))


def test_any_order_of_messages_gives_the_same_bytes(tmp_path: Path) -> None:
    world = World(tmp_path)
    messages = [world.message(client) for client in range(4)]
    closed = {world.closed(order).to_bytes() for order in itertools.permutations(messages)}
    assert len(closed) == 1


def test_the_same_message_again_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    collector, messages = world.collector(), [world.message(client) for client in range(3)]
    assert [collector.add(message) for message in messages] == [True, True, True]
    again = Masked.from_bytes(messages[1].to_bytes())
    assert not collector.add(again)
    np.testing.assert_array_equal(world.total(Closed.from_bytes(collector.close())), expected(range(3)))
    assert not collector.add(again)


def test_a_second_message_of_a_client_is_refused(tmp_path: Path) -> None:
    """It has fresh seeds: to count both would count the client twice."""
    world = World(tmp_path)
    collector = world.collector()
    collector.add(world.message(0))
    with pytest.raises(UserError, match="message of client 0: expected one message in a round, got a second one"):
        collector.add(world.message(0))


def test_who_took_part_is_fixed_before_the_first_query(tmp_path: Path) -> None:
    """Queries come out of the bytes to store, which never change."""
    world = World(tmp_path)
    collector, late = world.collector(), world.message(4)
    for client in (2, 0, 3):
        collector.add(world.message(client))
    content = collector.close()
    with pytest.raises(UserError, match="a message before the helpers are asked"):
        collector.add(late)
    assert collector.close() == content
    assert collector.clients == Closed.from_bytes(content).clients == [0, 2, 3]


@pytest.mark.parametrize("change", [{"round": 2}, {"share_stddev": 0.5}, {"digest": bytes(32)}, {"least_survivors": 2}])
def test_a_message_of_other_facts_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    world = World(tmp_path)
    with pytest.raises(UserError, match="message of client 0: expected the facts of this round"):
        world.collector().add(world.message(0, facts=world.at(**change)))


def test_a_message_for_another_key_of_a_helper_is_refused(tmp_path: Path) -> None:
    """A helper that lost its record shows a new key; older messages are void."""
    world = World(tmp_path)
    old = world.message(0)
    world.helper().erase("run-1")
    with pytest.raises(UserError, match="a seed for each helper's key of this run"):
        world.collector().add(old)


def test_a_message_with_a_bad_signature_does_not_void_the_round(tmp_path: Path) -> None:
    world = World(tmp_path)
    collector = world.collector(enrolled=world.enrolled)
    forged = mask_message(some_values(7), world.facts, 1, signing_key("client 0"), world.keys(), world.pinned)
    stranger = mask_message(some_values(7), world.facts, 9, signing_key("client 9"), world.keys(), world.pinned)
    for message in (forged, stranger):
        with pytest.raises(UserError, match="expected the signature of an enrolled client"):
            collector.add(message)
    for client in range(3):
        collector.add(world.message(client))
    np.testing.assert_array_equal(world.total(Closed.from_bytes(collector.close())), expected(range(3)))


class TestHelpersOfARun:
    def test_a_client_masks_for_all_pinned_helpers_or_for_none(self, tmp_path: Path) -> None:
        """A server could leave the honest one out."""
        world = World(tmp_path, helpers=2)
        keys, signer = world.keys(), signing_key("client 0")
        other = HelperKey.signed("run-1", bytes(range(32)), signing_key("helper 2"))
        for shown in ([], keys[:1], [keys[0], keys[0]], [*keys, other], [keys[0], other]):
            with pytest.raises(UserError, match="helpers: expected one key from each pinned helper"):
                mask_message(some_values(7), world.facts, 0, signer, shown, world.pinned)
        with pytest.raises(UserError, match="pinned helper"):
            mask_message(some_values(7), world.facts, 0, signer, [], [])

    def test_a_key_without_its_helpers_signature_is_refused(self, tmp_path: Path) -> None:
        """A server could show its own key in a helper's place."""
        world = World(tmp_path)
        key, signer = world.keys()[0], signing_key("client 0")
        own = HelperKey.signed("run-1", bytes(range(32)), signing_key("server"))
        for shown in (replace(own, identity=key.identity), replace(key, key=own.key), world.helper().key("run-2")):
            with pytest.raises(UserError, match="expected a key for run 'run-1' with its signature"):
                mask_message(some_values(7), world.facts, 0, signer, [shown], world.pinned)

    def test_two_helpers_with_one_key_are_refused(self, tmp_path: Path) -> None:
        world = World(tmp_path, helpers=2)
        shared = [HelperKey.signed("run-1", bytes(range(32)), signing_key(f"helper {j}")) for j in range(2)]
        with pytest.raises(UserError, match="helpers: expected distinct keys"):
            mask_message(some_values(7), world.facts, 0, signing_key("client 0"), shared, world.pinned)


class TestAnswers:
    def test_one_lost_answer_leaves_no_sum(self, tmp_path: Path) -> None:
        world = World(tmp_path, helpers=2)
        closed = world.closed([world.message(client) for client in range(3)])
        answers = [world.helper(j).answer(world.query_of(closed, j)) for j in range(2)]
        for given in ([], answers[:1], answers[1:]):
            with pytest.raises(UserError, match=r"answer of helper .*: expected an answer about round 1, got silence"):
                closed.total(given, MAX_TOTAL)
        np.testing.assert_array_equal(closed.total(reversed(answers), MAX_TOTAL), expected(range(3)))

    def test_a_stale_answer_or_one_about_others_leaves_no_sum(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        facts = world.at(round=2)
        before = world.closed([world.message(client) for client in range(3)])
        closed = world.closed([world.message(client, facts=facts) for client in range(3)], facts)
        others = world.query(range(4), facts)
        stale = world.helper().answer(before.queries[0])
        with pytest.raises(UserError, match="expected its signed answer to the query of round 2"):
            closed.total([stale], MAX_TOTAL)
        with pytest.raises(UserError, match="expected its signed answer to the query of round 2"):
            closed.total([world.helper().answer(others)], MAX_TOTAL)

    def test_an_answer_under_anothers_name_leaves_no_sum(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        closed = world.closed([world.message(client) for client in range(3)])
        answer = replace(world.helper().answer(closed.queries[0]), words=np.zeros(7, dtype=np.uint32))
        with pytest.raises(UserError, match="expected its signed answer"):
            closed.total([answer], MAX_TOTAL)


class TestGuardBand:
    def test_a_sum_in_the_band_voids_the_round(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        values = [np.array([0, 0, 334, -334, 0, 0, 0]), np.array([0, 0, 333, -333, 0, 0, 0])]
        at_edge = world.closed([world.message(client, values[client > 0]) for client in range(3)])
        np.testing.assert_array_equal(world.total(at_edge, 1000), [0, 0, 1000, -1000, 0, 0, 0])
        with pytest.raises(VoidRoundError, match="at most 999 grid units, got 2 of 7 coordinates beyond it"):
            world.total(at_edge, 999)

    def test_the_least_number_of_32_bits_is_in_the_band(self, tmp_path: Path) -> None:
        """-2^31 and 2^31 are the same number modulo 2^32."""
        world = World(tmp_path)
        half = np.full(7, 2**30, dtype=np.int64)
        closed = world.closed([world.message(0, half), world.message(1, half), world.message(2, 0 * half)])
        with pytest.raises(VoidRoundError, match="7 of 7 coordinates"):
            world.total(closed)

    @pytest.mark.parametrize("limit", [0, 2**31])
    def test_a_limit_without_a_band_is_refused(self, tmp_path: Path, limit: int) -> None:
        world = World(tmp_path)
        with pytest.raises(UserError, match="max_total"):
            world.total(world.closed([world.message(client) for client in range(3)]), limit)


def test_a_stored_message_is_resent_to_the_byte(tmp_path: Path) -> None:
    world = World(tmp_path)
    message = world.message(0)
    assert Masked.from_bytes(message.to_bytes()).to_bytes() == message.to_bytes()
    assert message.to_bytes() != world.message(0).to_bytes()
    assert public_key("client 0") == world.enrolled[0]
