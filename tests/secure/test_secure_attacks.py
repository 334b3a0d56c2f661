"""Attacks of a server, with or without some clients and helpers: none reveals more than one sum over enough clients."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kstest
from support.secure_round import World, public_key, signing_key, some_values

from fedpriv.errors import UserError
from fedpriv.secure import Helper, Masked, Query
from fedpriv.secure import helper as helper_module
from fedpriv.secure.masks import add_mask
from fedpriv.secure.messages import Member, Sealed, signed_bytes
from fedpriv.secure.sealing import seal_seed

VICTIM = 2


def forged(world: World, victim: Masked, sign: Callable[[int, bytes], bytes]) -> tuple[Query, dict[int, bytes]]:
    """Return a query with the victim's box and boxes that the server made under the other clients' names.

    Args:
        world: The parties.
        victim: The victim's message.
        sign: Returns the signature of some bytes under a client's name.

    Returns:
        The query and the server's seeds by client.
    """
    key, seeds, members = world.keys()[0], {}, []
    for client in range(5):
        if client == VICTIM:
            members.append(Member(client=client, box=victim.sealed[0].box, signature=victim.sealed[0].signature))
            continue
        seeds[client] = bytes([client] * 32)
        context = world.facts.context(client, key.identity, key.key)
        box = seal_seed(seeds[client], key.key, context)
        members.append(Member(client=client, box=box, signature=sign(client, signed_bytes(box, context))))
    return Query(facts=world.facts, identity=key.identity, key=key.key, members=tuple(members)), seeds


def isolated(world: World, victim: Masked, query: Query, seeds: dict[int, bytes]) -> np.ndarray:
    """Return the difference between the victim's message and its mask, as the server would compute it."""
    words = victim.words - world.helper().answer(query).words
    for client, seed in seeds.items():
        add_mask(words, seed, run="run-1", round=1, client=client, helper=query.identity)
    return words.view(np.int32).astype(np.int64)


def test_a_server_cannot_isolate_a_victim_with_boxes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    victim = world.message(VICTIM, some_values(7) % 1000)
    others = {client: world.message(client).sealed[0].signature for client in range(5)}
    forgeries: list[Callable[[int, bytes], bytes]] = [
        lambda _client, _content: bytes(64),
        lambda client, _content: others[client],
        lambda _client, content: signing_key("server").sign(content),
        lambda _client, content: signing_key(f"client {VICTIM}").sign(content),
    ]
    attempts = [forged(world, victim, sign) for sign in forgeries]
    for query, _ in attempts:
        with pytest.raises(UserError, match="each client's signature of its seed and the facts, got a wrong one"):
            world.helper().answer(query)
    # Without the check, the attack works.
    monkeypatch.setattr(Sealed, "is_signed_by", lambda *_: True)
    np.testing.assert_array_equal(isolated(world, victim, *attempts[0]), some_values(7) % 1000)


class TestClientsOfAQuery:
    def test_too_few_for_the_helper_are_refused(self, tmp_path: Path) -> None:
        """The server chose a lower threshold, and clients signed it."""
        world = World(tmp_path, min_clients=4)
        with pytest.raises(UserError, match="expected at least 4 clients, got 3"):
            world.helper().answer(world.query(range(3)))
        world.helper().answer(world.query(range(4)))

    def test_too_few_for_the_clients_are_refused(self, tmp_path: Path) -> None:
        world = World(tmp_path, min_clients=2)
        query = world.query(range(3))
        for count in (0, 1, 2):
            with pytest.raises(UserError, match=f"expected at least 3 clients, got {count}"):
                world.helper().answer(replace(query, members=query.members[:count]))
        world.helper().answer(query)

    def test_a_client_twice_or_out_of_order_is_refused(self, tmp_path: Path) -> None:
        """Three times the victim's mask is as good as the mask."""
        world = World(tmp_path)
        query = world.query(range(4))
        first, second, third, fourth = query.members
        for members in (
            (first, first, first),
            (first, second, second),
            (second, first, third),
            (fourth, third, second),
        ):
            asked = replace(query, members=members)
            with pytest.raises(UserError, match="distinct clients in ascending order"):
                world.helper().answer(asked)
            with pytest.raises(UserError, match="distinct clients in ascending order"):
                Query.from_bytes(asked.to_bytes())

    def test_one_box_under_two_names_is_refused(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        query = world.query(range(4))
        copied = replace(query.members[0], client=1)
        with pytest.raises(UserError, match="got a wrong one for client 1"):
            world.helper().answer(replace(query, members=(query.members[0], copied, *query.members[2:])))

    def test_puppets_are_unknown_to_the_helper(self, tmp_path: Path) -> None:
        """The server registers clients as it likes; the helper's list is not the server's."""
        world = World(tmp_path)
        puppets = World(tmp_path, clients=9)
        query = puppets.query([VICTIM, 5, 6, 7])
        with pytest.raises(UserError, match="expected enrolled clients, got client 5"):
            world.helper().answer(query)

    def test_one_key_under_two_names_cannot_be_enrolled(self, tmp_path: Path) -> None:
        enrolled = {0: public_key("client 0"), 1: public_key("client 1"), 2: public_key("client 0")}
        with pytest.raises(UserError, match="key of client 2: expected a key that no other client has"):
            Helper(tmp_path, signing_key("helper 0"), enrolled, 3)

    @pytest.mark.parametrize("key", [b"", b"short", bytes(33)])
    def test_a_broken_key_cannot_be_enrolled(self, tmp_path: Path, key: bytes) -> None:
        with pytest.raises(UserError, match="key of client 0: expected an Ed25519 key"):
            Helper(tmp_path, signing_key("helper 0"), {0: key}, 3)

    def test_a_list_that_changes_later_is_not_followed(self, tmp_path: Path) -> None:
        enrolled = World(tmp_path).enrolled
        helper = Helper(tmp_path / "helper-0", signing_key("helper 0"), enrolled, 3)
        enrolled[9] = public_key("client 9")
        assert 9 not in helper.enrolled

    def test_a_helper_that_answers_about_one_client_cannot_be_made(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="min_clients: expected at least 2, got 1"):
            Helper(tmp_path, signing_key("helper 0"), {}, 1)


class TestFactsOfAQuery:
    @pytest.mark.parametrize(
        "change",
        [
            {"round": 2},
            {"least_survivors": 2},
            {"colluders": 0},
            {"share_stddev": 0.5},
            {"grid": 2.0**-19},
            {"size": 6},
            {"digest": bytes(32)},
        ],
    )
    def test_facts_that_clients_did_not_sign_are_refused(self, tmp_path: Path, change: dict[str, object]) -> None:
        world = World(tmp_path, min_clients=2)
        with pytest.raises(UserError, match="each client's signature of its seed and the facts"):
            world.helper().answer(replace(world.query(), facts=world.at(**change)))

    @pytest.mark.parametrize(
        "change",
        [
            {"round": 2},
            {"least_survivors": 2},
            {"colluders": 0},
            {"share_stddev": 0.5},
            {"grid": 0.5},
            {"digest": bytes(32)},
        ],
    )
    def test_clients_that_signed_different_facts_are_refused(self, tmp_path: Path, change: dict[str, object]) -> None:
        """The server showed one client a lower threshold, another model or less noise, or replays an old round."""
        world = World(tmp_path)
        query, other = world.query(), world.message(3, facts=world.at(**change)).sealed[0]
        replaced = Member(client=3, box=other.box, signature=other.signature)
        asked = replace(query, members=(*query.members[:3], replaced, query.members[4]))
        with pytest.raises(UserError, match="got a wrong one for client 3"):
            world.helper().answer(asked)

    def test_a_box_of_other_facts_is_refused_with_a_good_signature_too(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        query, key = world.query(), world.keys()[0]
        box = seal_seed(bytes(32), key.key, world.at(round=2).context(3, key.identity, key.key))
        content = signed_bytes(box, world.facts.context(3, key.identity, key.key))
        replaced = Member(client=3, box=box, signature=signing_key("client 3").sign(content))
        asked = replace(query, members=(*query.members[:3], replaced, query.members[4]))
        with pytest.raises(UserError, match="expected a sealed seed of these facts, got a wrong one for client 3"):
            world.helper().answer(asked)

    def test_a_box_for_another_run_is_refused(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        query = world.query(facts=world.at(run="run-2"))
        world.helper().key("run-1")
        for asked in (replace(query, facts=world.facts), replace(query, facts=world.facts, key=world.keys()[0].key)):
            with pytest.raises(UserError, match="query about round 1: expected"):
                world.helper().answer(asked)
        with pytest.raises(UserError, match="run 'run-3': expected a run with a key at this helper"):
            world.helper().answer(replace(query, facts=world.at(run="run-3")))

    def test_a_query_to_another_helper_is_refused(self, tmp_path: Path) -> None:
        world = World(tmp_path, helpers=2)
        closed = world.closed([world.message(client) for client in range(3)])
        with pytest.raises(UserError, match="expected this helper's key for the run"):
            world.helper(0).answer(world.query_of(closed, 1))


class TestDifferences:
    def test_all_and_then_all_but_one_is_refused(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        query = world.query()
        answer = world.helper().answer(query)
        for position in range(5):
            rest = (*query.members[:position], *query.members[position + 1 :])
            with pytest.raises(UserError, match="expected the query that was answered, got a different query"):
                world.helper().answer(replace(query, members=rest))
        assert world.helper().answer(query).to_bytes() == answer.to_bytes()

    def test_the_same_clients_with_other_boxes_are_refused(self, tmp_path: Path) -> None:
        """A client that colludes signs a second box. One answer for each round needs no argument about differences."""
        world = World(tmp_path)
        query, again = world.query(), world.message(4).sealed[0]
        world.helper().answer(query)
        other = Member(client=4, box=again.box, signature=again.signature)
        with pytest.raises(UserError, match="expected the query that was answered"):
            world.helper().answer(replace(query, members=(*query.members[:4], other)))

    def test_old_rounds_stay_answered(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        queries = [world.query(facts=world.at(round=round)) for round in (1, 2, 3)]
        answers = [world.helper().answer(query) for query in queries]
        for query, answer in zip(queries, answers, strict=True):
            with pytest.raises(UserError, match="the query that was answered"):
                world.helper().answer(replace(query, members=query.members[:3]))
            assert world.helper().answer(query).to_bytes() == answer.to_bytes()

    def test_a_refused_query_leaves_no_trace(self, tmp_path: Path) -> None:
        """A client that sends a broken box does not void the round."""
        world = World(tmp_path)
        query = world.query()
        broken = (*query.members[:4], replace(query.members[4], signature=bytes(64)))
        with pytest.raises(UserError, match="client 4"):
            world.helper().answer(replace(query, members=broken))
        assert world.helper().answer(replace(query, members=query.members[:4])).round == 1

    def test_two_helpers_that_are_asked_about_different_clients_reveal_nothing(self, tmp_path: Path) -> None:
        """Uniform up to one helper's mask of the client that only one of the two counted; fixed rate of 1e-6."""
        world = World(tmp_path, helpers=2)
        world.facts = world.at(size=20_000)
        zeros = np.zeros(20_000, dtype=np.int64)
        messages = [world.message(client, zeros) for client in range(4)]
        everyone, others = world.closed(messages), world.closed(messages[1:])
        first, second = (
            world.helper(0).answer(world.query_of(everyone, 0)),
            world.helper(1).answer(world.query_of(others, 1)),
        )
        for closed in (everyone, others):
            rest = closed.words - first.words - second.words
            assert kstest((rest + 0.5) / 2.0**32, "uniform").pvalue > 1e-6
            with pytest.raises(UserError, match="expected its signed answer to the query"):
                closed.total([first, second], 2**31 - 1)


def test_a_helper_keeps_no_seed_and_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, seeds = World(tmp_path), []
    opened = helper_module.open_seed
    monkeypatch.setattr(helper_module, "open_seed", lambda *given: seeds.append(opened(*given)) or seeds[-1])
    world.helper().answer(world.query())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(seeds) == 5
    assert len(files) == 3
    for path in files:
        assert not any(seed in path.read_bytes() for seed in seeds)
        assert path.stat().st_mode & 0o077 == 0
