"""Rounds with a hostile server, a network that loses and repeats, and helpers that are killed and lose their disks.

`FEDPRIV_CHAOS=20 pytest tests/secure/test_secure_chaos.py` runs twenty times as many seeds.
"""

import hashlib
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from support.secure_round import MAX_TOTAL, World, some_values

from fedpriv.errors import UserError
from fedpriv.files import make_private_folder
from fedpriv.secure import Answer, Closed, Masked, Query
from fedpriv.secure import log as log_module

SEEDS = range(5 * int(os.environ.get("FEDPRIV_CHAOS", "1")))
ROUNDS = 5


class Killed(BaseException):
    """The helper's process ends here."""


@dataclass
class Chaos:
    """All parties, and a bookkeeper who sees every answer that leaves a helper."""

    world: World
    random: random.Random
    seen: dict[tuple[int, bytes, int], set[bytes]] = field(default_factory=lambda: defaultdict(set))
    exact: int = 0
    void: int = 0

    @property
    def revealed_twice(self) -> list[tuple[int, bytes, int]]:
        """Helper, key and round of answers about different queries."""
        return [about for about, queries in self.seen.items() if len(queries) > 1]

    @contextmanager
    def dying(self) -> Iterator[None]:
        """Kill the helper before or after one of its writes, sometimes."""
        at, after, writes = self.random.choice([None, None, 1, 2]), self.random.random() < 0.5, 0
        original = log_module.replace_durably

        def killing(path: Path, content: bytes) -> None:
            nonlocal writes
            writes += 1
            if writes == at:
                if after:
                    original(path, content)
                raise Killed
            original(path, content)

        log_module.replace_durably = killing
        try:
            yield
        finally:
            log_module.replace_durably = original

    def ask(self, j: int, query: Query) -> Answer | None:
        """Ask a helper; it may be killed, and the question or the answer may be lost."""
        if self.random.random() < 0.15:
            return None
        try:
            with self.dying():
                answer = self.world.helper(j).answer(Query.from_bytes(query.to_bytes()))
        except (Killed, UserError):
            return None
        # The server may see it from here on. A lost disk means another key, with which no older seed opens.
        self.seen[j, query.key, query.facts.round].add(b"".join(str(m.client).encode() + m.box for m in query.members))
        return None if self.random.random() < 0.15 else Answer.from_bytes(answer.to_bytes())

    def lie(self, query: Query, old: list[Query]) -> Query:
        """Return another query about the round, or about an older one."""
        members = list(query.members)
        kind = self.random.randrange(4)
        if kind == 0:
            members.pop(self.random.randrange(len(members)))
        elif kind == 1 and old:
            return replace(self.random.choice(old), members=tuple(self.random.choice(old).members[:3]))
        elif kind == 2:
            members[0] = replace(members[0], signature=bytes(64))
        else:
            members = [members[0]] * len(members)
        return replace(query, members=tuple(members))

    def play(self, round: int, old: list[Query]) -> None:
        facts = self.world.at(round=round)
        for j in range(self.world.helpers):
            if self.random.random() < 0.1:
                shutil.rmtree(self.world.home / f"helper-{j}", ignore_errors=True)
        clients = sorted(self.random.sample(range(5), self.random.randint(2, 5)))
        messages = [self.world.message(client, facts=facts).to_bytes() for client in clients]
        self.random.shuffle(messages)
        collector = self.world.collector(facts, self.world.enrolled)
        try:
            for content in [*messages, *self.random.sample(messages, 1)]:
                collector.add(Masked.from_bytes(content))
            stored = collector.close()
        except UserError:  # too few
            self.void += 1
            assert len(clients) < 3
            return
        answers: dict[int, Answer] = {}
        for _ in range(10):
            closed = Closed.from_bytes(stored)  # the server may have restarted
            j = self.random.randrange(self.world.helpers)
            query = self.world.query_of(closed, j)
            lies = self.random.random() < 0.3
            answer = self.ask(j, self.lie(query, old) if lies else query)
            if answer is not None and not lies:
                answers[j] = answer
        old.extend(Closed.from_bytes(stored).queries)
        try:
            total = Closed.from_bytes(stored).total(answers.values(), MAX_TOTAL)
        except UserError:
            self.void += 1
            return
        expected = sum(some_values(facts.size, client) for client in clients)
        np.testing.assert_array_equal(total, (expected + 2**31) % 2**32 - 2**31)
        self.exact += 1


def test_a_round_has_one_exact_sum_or_none_and_each_helper_reveals_one_at_most(tmp_path: Path) -> None:
    exact = void = 0
    for seed in SEEDS:
        world = World(tmp_path / str(seed), helpers=1 + seed % 2)
        chaos, old = Chaos(world, random.Random(seed)), []
        for round in range(1, ROUNDS + 1):
            chaos.play(round, old)
            assert chaos.revealed_twice == []
        exact, void = exact + chaos.exact, void + chaos.void
    assert exact > len(SEEDS)
    assert void > len(SEEDS) / 2


@pytest.mark.parametrize("fault", ["twice", "forgets"])
def test_the_bookkeeper_notices_a_helper_that_answers_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def key_of(log: log_module.RunLog) -> bytes:
        make_private_folder(log.folder)
        return hashlib.sha256(str(log.home).encode()).digest()

    if fault == "twice":
        monkeypatch.setattr(log_module.Record, "with_answer", lambda self, *_: self)
    else:
        monkeypatch.setattr(log_module.RunLog, "write", lambda *_: None)
        monkeypatch.setattr(log_module.RunLog, "read", lambda self: log_module.Record(self.run, key_of(self)))
    with pytest.raises(AssertionError, match=r"== \[\]"):
        test_a_round_has_one_exact_sum_or_none_and_each_helper_reveals_one_at_most(tmp_path)
