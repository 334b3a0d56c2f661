"""Encodings: one for each object, and nothing else is read."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.secure_round import World, signing_key

from fedpriv.errors import UserError
from fedpriv.secure import Answer, Closed, HelperKey, Masked, Query, RoundFacts
from fedpriv.secure.log import Answered, Record
from fedpriv.secure.wire import Fields, pack

Reader = Callable[[bytes], HelperKey | Masked | Query | Answer | Closed | Record]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Reader, bytes]]:
    world = World(tmp_path_factory.mktemp("home"), helpers=2)
    world.facts = world.at(size=2)
    closed = world.closed([world.message(client) for client in range(3)])
    record = Record("run-1", bytes(32), {1: Answered(bytes(32), b"a" * 32), 300: Answered(b"b" * 32, bytes(32))})
    return {
        "key": (HelperKey.from_bytes, world.keys()[0].to_bytes()),
        "message": (Masked.from_bytes, world.message(0).to_bytes()),
        "query": (Query.from_bytes, closed.queries[0].to_bytes()),
        "answer": (Answer.from_bytes, world.helper(0).answer(world.query_of(closed, 0)).to_bytes()),
        "closed": (Closed.from_bytes, closed.to_bytes()),
        "record": (Record.from_bytes, record.to_bytes()),
    }


def reread(read: Reader, content: bytes) -> bytes | None:
    """Return the encoding of the object that was read; None if it was refused."""
    with suppress(UserError):
        return read(content).to_bytes()
    return None


KINDS = ("key", "message", "query", "answer", "closed", "record")


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_comes_back_with_the_same_bytes(encoded: dict[str, tuple[Reader, bytes]], kind: str) -> None:
    read, content = encoded[kind]
    assert read(content).to_bytes() == content
    with pytest.raises(UserError, match="expected"):
        read(content + b"\0")


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_cut_off_or_changed_are_refused_or_another_object(
    encoded: dict[str, tuple[Reader, bytes]], kind: str
) -> None:
    """Two encodings of one object could be signed once and read twice."""
    read, content = encoded[kind]
    for length in range(0, len(content), 3):
        assert reread(read, content[:length]) in (None, content[:length])
    for position in range(0, len(content), 2):
        changed = bytearray(content)
        changed[position] ^= 0x81
        assert reread(read, bytes(changed)) in (None, changed)


def test_fields_of_different_objects_never_have_the_same_bytes() -> None:
    objects = [
        ("a", "bc"),
        ("ab", "c"),
        ("abc",),
        ("abc", ""),
        (b"abc",),
        (1, 2),
        (1.0, 2),
        (12,),
        (b"", b"a"),
        (b"a", b""),
    ]
    assert len({pack("kind", *fields) for fields in objects} | {pack("kin", "d", "abc")}) == len(objects) + 1


@pytest.mark.parametrize("value", [-1, 2**63])
def test_numbers_beyond_their_range_are_refused(value: int) -> None:
    with pytest.raises(UserError, match="whole numbers from 0"):
        pack("kind", value)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (pack("another", 1), "another kind"),
        (pack("kind", "one"), "another type"),
        (pack("kind", 1)[:-1], "an incomplete object"),
        (pack("kind", 1, 1), "further bytes"),
        (pack("kind", 0)[:-8] + b"\xff" * 8, "too large"),
        (b"", "an incomplete object"),
    ],
)
def test_an_unexpected_field_is_one_line(content: bytes, got: str) -> None:
    def read() -> None:
        fields = Fields("kind", content)
        fields.whole()
        fields.end()

    with pytest.raises(UserError, match=f"^kind: expected the bytes of one kind, got .*{got}.*$"):
        read()


def test_texts_that_are_too_long_or_not_text_are_refused() -> None:
    with pytest.raises(UserError, match="at most 256 bytes"):
        pack("kind", "ä" * 129)
    for content, got in [(b"\xff", "not UTF-8"), (b"a" * 257, "too long")]:
        with pytest.raises(UserError, match=got):
            Fields("kind", pack("kind", content).replace(b"\nb", b"\ns")).text()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run", ""),
        ("run", "a" * 257),
        ("round", -1),
        ("least_survivors", 1),
        ("colluders", 3),
        ("colluders", -1),
        ("share_stddev", 0.0),
        ("share_stddev", math.inf),
        ("share_stddev", math.nan),
        ("grid", 0.75),
        ("grid", -0.5),
        ("grid", math.nan),
        ("size", 0),
        ("size", 2**33 + 1),
        ("digest", b"short"),
    ],
)
def test_facts_out_of_range_are_refused(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^{name}: expected"):
        World(tmp_path).at(**{name: value})


def test_facts_out_of_range_are_refused_in_a_message(tmp_path: Path) -> None:
    """A server cannot show a client facts that it could not have itself."""
    world = World(tmp_path)
    good = world.facts
    content = pack(
        "message", *good.values[:2], 1, *good.values[3:], 0, bytes(28), *[bytes(32)] * 2, bytes(80), bytes(64)
    )
    with pytest.raises(UserError, match="least_survivors"):
        Masked.from_bytes(content)


def test_each_fact_is_in_the_bytes_that_a_client_signs(tmp_path: Path) -> None:
    facts = World(tmp_path).facts
    others = [
        replace(facts, run="run-2"),
        replace(facts, round=2),
        replace(facts, least_survivors=4),
        replace(facts, colluders=2),
        replace(facts, share_stddev=math.nextafter(0.75, 1.0)),
        replace(facts, grid=2.0**-21),
        replace(facts, size=8),
        replace(facts, digest=bytes(32)),
    ]
    assert len(others) == len(RoundFacts.__dataclass_fields__)
    signed = {one.context(0, bytes(32), bytes(32)) for one in [facts, *others]}
    signed |= {facts.context(1, bytes(32), bytes(32)), facts.context(0, b"a" * 32, bytes(32))}
    signed |= {facts.context(0, bytes(32), b"a" * 32)}
    assert len(signed) == len(others) + 4


def test_a_key_is_valid_with_its_helpers_signature_alone() -> None:
    key = HelperKey.signed("run-1", bytes(range(32)), signing_key("helper 0"))
    assert key.is_valid
    assert not replace(key, run="run-2").is_valid
    assert not replace(key, key=bytes(32)).is_valid
    assert not replace(key, identity=signing_key("helper 1").public_key().public_bytes_raw()).is_valid
    assert not replace(key, identity=b"short").is_valid


def test_an_answer_is_that_of_its_query_alone(tmp_path: Path) -> None:
    world = World(tmp_path)
    query = world.query()
    answer = world.helper().answer(query)
    assert answer.answers(query)
    changed = answer.words.copy()
    changed[0] += 1
    assert not replace(answer, words=changed).answers(query)
    assert not replace(answer, words=answer.words[:-1]).answers(query)
    assert not replace(answer, signature=bytes(64)).answers(query)
    assert not answer.answers(replace(query, members=query.members[1:]))
    assert not answer.answers(replace(query, facts=world.at(round=2)))
    assert np.array_equal(Answer.from_bytes(answer.to_bytes()).words, answer.words)
