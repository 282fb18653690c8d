"""What comes in one turn of the loop is one query, where a query costs more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from neo.lib.protocol import AskStoreObject, ErrorCode
from neo.storage.database.memory import MemoryBackend

from .storage_harness import Harness, number

A, B, C = number(0), number(2), number(4)
T1, T2, T3 = number(100), number(102), number(104)


@pytest.fixture
def h() -> Harness:
    backend = MemoryBackend()
    backend.loads_together = True
    harness = Harness(backend)
    harness.operate()
    client = harness.client(9)
    client.commit(T1, T1, {A: b"1", B: b"2"})
    return harness


@pytest.fixture
def asked(h: Harness, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many objects each query looked for."""
    sizes: list[int] = []
    last_tid_of, last_tids_of = h.backend.last_tid_of, h.backend.last_tids_of

    def one(oid: bytes) -> bytes | None:
        sizes.append(1)
        return last_tid_of(oid)

    def many(oids: Any) -> Any:
        sizes.append(len(oids))
        with monkeypatch.context() as patch:
            patch.setattr(h.backend, "last_tid_of", last_tid_of)
            return last_tids_of(oids)

    monkeypatch.setattr(h.backend, "last_tid_of", one)
    monkeypatch.setattr(h.backend, "last_tids_of", many)
    return sizes


@contextmanager
def one_turn(h: Harness) -> Iterator[None]:
    turn, h.turn = h.turn, lambda: None  # type: ignore[method-assign]
    yield
    h.turn = turn  # type: ignore[method-assign]
    h.turn()


def test_stores_of_one_turn(h: Harness, asked: list[int]) -> None:
    c, d = h.client(), h.client(2)
    with one_turn(h):
        granted = c.store(T2, A, b"3", T1)
        conflict = c.store(T2, B, b"4")
        new = c.store(T2, C, b"5")
        waiting = d.store(T3, A, b"6", T1)
    assert asked == [4]
    answers = {msg_id: args for _, msg_id, args in c.packets()}
    assert answers == {granted: (None,), conflict: (T1,), new: (None,)}
    assert d.packets() == []
    c.abort(T2)
    assert [msg_id for _, msg_id, _ in d.packets()] == [waiting]


def test_vote_comes_after_the_stores_before_it(h: Harness, asked: list[int]) -> None:
    c = h.client()
    with one_turn(h):
        stored = c.store(T2, A, b"3", T1)
        c.store(T2, C, b"4")
        voted = c.vote(T2, A, C)
        assert asked == [2]
    h.m.lock(T2, T2)
    h.m.unlock(T2)
    h.advance(1)
    found = [msg_id for _, msg_id, _ in c.packets()]
    assert found.index(stored) < found.index(voted)
    assert c.load(C)[1] == c.load(A)[1] == T2


def test_store_after_the_vote_closes(h: Harness) -> None:
    """The error is told, and the packets that follow are not looked at."""
    c = h.client()
    c.store(T2, A, b"3", T1)
    c.vote(T2, A)
    c.packets()
    with one_turn(h):
        late = c.store(T2, C, b"4")
        c.vote(T3, C)
    (answer,) = c.packets()
    assert answer[1:] == (late, (ErrorCode.PROTOCOL_ERROR, answer[2][1]))
    assert c.conn.closed
    assert T3 not in h.node.operation.transactions.by_ttid


def test_stores_of_a_client_that_left(h: Harness) -> None:
    c = h.client()
    with one_turn(h):
        c.store(T2, A, b"3", T1)
        c.store(T2, B, b"3", T1)
        c.lose()
    assert T2 not in h.node.operation.transactions.by_ttid


def test_checksum_is_verified_at_once(h: Harness) -> None:
    c = h.client()
    c.send(AskStoreObject, A, T1, 0, bytes(20), b"x", None, T2)
    assert c.packets()[0][2][0] == ErrorCode.PROTOCOL_ERROR
    assert c.conn.closed
