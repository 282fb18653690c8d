"""Replication: the packets of both sides, and what may go wrong."""

from __future__ import annotations

from hashlib import sha1
from typing import Any

import pytest

from neo.lib.protocol import (
    MAX_TID,
    ZERO_HASH,
    ZERO_OID,
    ZERO_TID,
    AcceptIdentification,
    AddObject,
    AddTransaction,
    AnswerFetchObjects,
    AnswerFetchTransactions,
    AnswerInformationLocked,
    AnswerStoreObject,
    AnswerStoreTransaction,
    AnswerUnfinishedTransactions,
    AskCheckSerialRange,
    AskCheckTIDRange,
    AskFetchObjects,
    AskFetchTransactions,
    AskUnfinishedTransactions,
    CellState,
    CloseClient,
    Error,
    ErrorCode,
    NodeState,
    NodeType,
    NotifyPackCompleted,
    NotifyReplicationDone,
    NotifyTransactionFinished,
    RequestIdentification,
)
from neo.storage import peers, replication
from neo.storage.database.interface import Transaction

from .storage_harness import NAME, OUT, UP, Harness, Peer, number

T1, T2, T3, T4, T5 = (number(n) for n in (10, 12, 14, 16, 18))
LARGE = b"\x80" + bytes(7)  # more than a database holds
A, B = number(2), number(4)
ADDRESS = (b"127.0.0.1", 20002)
OTHER = (NodeType.STORAGE, ADDRESS, 2, NodeState.RUNNING, 2.5)
TABLE = (((1, OUT), (2, UP)), ((1, UP), (2, UP)))


def value(data: bytes) -> tuple[int, bytes, bytes]:
    return 0, sha1(data).digest(), data


def tell_unfinished(m: Peer, max_tid: bytes, ttids: tuple[bytes, ...] = ()) -> None:
    """Answer as the master, for partition 0."""
    _, msg_id, args = m.expect(AskUnfinishedTransactions)
    assert args == ((0,),)
    m.send(AnswerUnfinishedTransactions, max_tid, ttids, msg_id=msg_id)


def replicating(**options: Any) -> tuple[Harness, Peer]:
    """A node whose cell 0 is out of date; and its source, which accepted it."""
    h = Harness(**options)
    m = h.operate(TABLE)
    h.tell_nodes(OTHER)
    tell_unfinished(m, T2, ())
    return h, source(h)


def source(h: Harness) -> Peer:
    """Take the connection that the node opens to the source."""
    peer = h.answer_call()
    _, msg_id, args = peer.expect(RequestIdentification)
    assert args[:2] == (NodeType.STORAGE, 1)
    assert args[3:5] == (NAME.encode(), 1.5)
    peer.send(AcceptIdentification, NodeType.STORAGE, 2, 1, msg_id=msg_id)
    return peer


def transfer(peer: Peer, goal: bytes = T2) -> None:
    """Play the source of the whole partition: one transaction."""
    _, msg_id, args = peer.expect(AskFetchTransactions)
    assert args[0] == 0
    assert args[3] == goal
    metadata = (goal, b"u", b"d", b"", False, goal, (A,), None)
    peer.send(AddTransaction, *metadata, msg_id=msg_id)
    peer.send(AnswerFetchTransactions, None, (), ZERO_TID, msg_id=msg_id)
    _, msg_id, args = peer.expect(AskFetchObjects)
    peer.send(AddObject, A, goal, *value(b"data"), None, msg_id=msg_id)
    peer.send(AnswerFetchObjects, None, None, {}, msg_id=msg_id)


def test_replication() -> None:
    h, peer = replicating()
    c = h.client()
    c.store(T3, A, b"blind")
    assert c.packets()[0][2] == (ZERO_TID,)
    transfer(peer)
    assert h.m.receive(NotifyReplicationDone) == (0, T2)
    assert h.backend.own_cells()[0].tid == T2
    # The history is known now: conflicts are, too.
    d = h.client(2)
    d.store(T4, A, b"x")
    assert d.packets()[0][2] == (T2,)
    d.store(T4, A, b"x", T2)
    assert d.packets()[0][2] == (None,)  # T3's write conflicted, and was forgotten
    h.change_table(2, (0, 1, UP))
    h.m.expect(NotifyPackCompleted)
    assert c.load(A)[1] == T2
    h.advance(99)
    assert h.m.is_closed or not peer.is_closed


def test_conflict_that_nobody_told() -> None:
    """The readable cell was dropped while the store waited there."""
    h, peer = replicating()
    c = h.client()
    c.store(T3, A, b"blind")
    c.expect(AnswerStoreObject)
    transfer(peer)
    h.m.expect(NotifyReplicationDone)
    c.vote(T3, A)
    assert c.receive(Error)[0] == ErrorCode.INCOMPLETE_TRANSACTION
    c.store(T3, A, b"resolved", T2)
    assert c.receive(AnswerStoreObject) == (None,)
    c.vote(T3, A)
    c.expect(AnswerStoreTransaction)


def test_transactions_that_were_open() -> None:
    """Scenarios 117 and 118."""
    h = Harness()
    m = h.operate(TABLE)
    h.tell_nodes(OTHER)
    tell_unfinished(m, T1, (T2, T3, T4))
    m.abort(T2)
    peer = source(h)
    transfer(peer, T1)
    assert not m.packets()
    m.send(NotifyTransactionFinished, T3, T5)
    _, msg_id, args = peer.expect(AskFetchTransactions)
    assert args[2:4] == (number(11), T5)
    peer.send(AnswerFetchTransactions, None, (), None, msg_id=msg_id)
    peer.send(
        AnswerFetchObjects,
        None,
        None,
        {},
        msg_id=peer.expect(AskFetchObjects)[1],
    )
    assert not m.packets()
    m.abort(T4)
    assert m.receive(NotifyReplicationDone) == (0, T5)


def test_competing_blind_writes() -> None:
    """Scenario 90: one transaction at most may keep its write."""
    h, peer = replicating()
    c, d = h.client(), h.client(2)
    c.store(T3, B, b"c")
    d.store(T4, B, b"d")
    transfer(peer)
    assert not h.m.packets()
    e = h.client(3)
    e.store(T5, B, b"e")
    assert not e.packets()  # after those two
    d.abort(T4)
    assert h.m.receive(NotifyReplicationDone) == (0, T2)
    c.abort(T3)
    assert e.packets()[0][2] == (None,)


def test_partitions_that_end_together() -> None:
    """Nobody writes blindly in one while the other one is settled."""
    h = Harness()
    m = h.operate((((1, OUT), (2, UP)), ((1, OUT), (2, UP))))
    h.tell_nodes(OTHER)
    _, msg_id, _ = m.expect(AskUnfinishedTransactions)
    m.send(AnswerUnfinishedTransactions, T1, (), msg_id=msg_id)
    peer = source(h)
    c, d, e = (h.client(n) for n in (1, 2, 3))
    odd = number(3)
    for client, ttid in ((d, T3), (e, T4)):
        for oid in (A, odd):
            client.store(ttid, oid, b"blind")
            assert client.receive(AnswerStoreObject) == (ZERO_TID,)
    for question, answer in (
        (AskFetchTransactions, (AnswerFetchTransactions, None, (), ZERO_TID)),
        (AskFetchObjects, (AnswerFetchObjects, None, None, {})),
    ):
        for _, msg_id, _ in [peer.expect(question), peer.expect(question)]:
            peer.send(*answer, msg_id=msg_id)
    assert not m.packets()
    e.vote(T4, A, odd)
    e.expect(AnswerStoreTransaction)
    c.store(T2, odd, b"waits")
    assert not c.packets()
    m.lock(T4, T5)
    m.expect(AnswerInformationLocked)
    m.unlock(T4)
    assert [args[0] for _, _, args in m.packets()] == [0, 1]
    # D's writes conflict with what was committed; the lock is free for C, too late.
    assert c.receive(AnswerStoreObject) == (T5,)


def test_chunks_and_deletions() -> None:
    h, peer = replicating()
    h.backend.begin(True)
    h.backend.add_object(B, T1, (sha1(b"").digest(), b"", 0), None)
    h.backend.commit()
    _, msg_id, args = peer.expect(AskFetchTransactions)
    assert args == (0, 1000, ZERO_TID, T2, (), True)
    metadata = (T1, b"u", b"d", b"", False, T1, (A,), (True, True, (A, B), T1))
    peer.send(AddTransaction, *metadata, msg_id=msg_id)
    peer.send(AnswerFetchTransactions, T2, (), number(3), msg_id=msg_id)
    _, msg_id, args = peer.expect(AskFetchTransactions)
    assert args == (0, 1000, T2, T2, (), False)
    peer.send(AnswerFetchTransactions, None, (), None, msg_id=msg_id)
    _, msg_id, args = peer.expect(AskFetchObjects)
    assert args == (0, 1000, ZERO_TID, T2, ZERO_OID, {T1: (B,)})
    peer.send(AddObject, A, T1, *value(b"a"), None, msg_id=msg_id)
    late = msg_id
    peer.send(AnswerFetchObjects, T2, A, {T1: (B,)}, msg_id=msg_id)
    assert h.backend.own_cells()[0].tid == number(11)
    _, msg_id, args = peer.expect(AskFetchObjects)
    assert args == (0, 1000, T2, T2, A, {})
    peer.send(AddObject, B, T2, *value(b"late"), None, msg_id=late)  # ignored
    peer.send(AddObject, A, T2, 0, ZERO_HASH, b"", None, msg_id=msg_id)
    peer.send(AnswerFetchObjects, None, None, {}, msg_id=msg_id)
    assert h.m.receive(NotifyReplicationDone) == (0, T2)
    assert h.backend.load(B) is None
    found = h.backend.load(A)
    assert found is not None
    assert found[0] == T2
    assert found[4] == b""
    order = h.backend.transaction(T1)
    assert order is not None
    assert order.pack is not None
    assert list(order.pack.oids or ()) == [A, B]


def test_session_that_ends_with_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waited for its turn gets it."""
    monkeypatch.setattr(replication, "SESSIONS_MAX", 1)
    h = Harness()
    m = h.operate((((1, OUT), (2, UP)), ((1, OUT), (2, UP))))
    h.tell_nodes(OTHER)
    _, msg_id, _ = m.expect(AskUnfinishedTransactions)
    m.send(AnswerUnfinishedTransactions, T2, (), msg_id=msg_id)
    peer = source(h)
    assert peer.expect(AskFetchTransactions)[2][0] == 0
    h.change_table(2, (0, 1, CellState.DISCARDED))
    assert peer.expect(AskFetchTransactions)[2][0] == 1


@pytest.mark.parametrize(
    "how",
    [
        *("lost", "error", "code", "checksum", "id", "ttid", "pack"),
        *("object", "pointer", "first", "position", "master"),
    ],
)
def test_interruptions(how: str) -> None:
    """The target is kept; another attempt follows."""
    h, peer = replicating()
    _, msg_id, _ = peer.expect(AskFetchTransactions)
    if how == "lost":
        peer.lose()
    elif how == "error":
        args = ErrorCode.REPLICATION_ERROR, b"dropped"
        peer.send(Error, *args, msg_id=msg_id)
    elif how == "code":
        peer.send(Error, 77, b"", msg_id=msg_id)
    elif how == "first":
        peer.send(AnswerFetchTransactions, ZERO_TID, (), ZERO_TID, msg_id=msg_id)
    elif how in ("id", "ttid", "pack"):
        tid, ttid = (LARGE if how == name else T1 for name in ("id", "ttid"))
        pack = (True, False, None, LARGE) if how == "pack" else None
        metadata = (tid, b"u", b"d", b"", False, ttid, (A,), pack)
        peer.send(AddTransaction, *metadata, msg_id=msg_id)
        peer.send(AnswerFetchTransactions, None, (), ZERO_TID, msg_id=msg_id)
    elif how == "master":
        h.change_table(2, (0, 1, CellState.DISCARDED))
        peer.send(AnswerFetchTransactions, None, (), ZERO_TID, msg_id=msg_id)
        assert not peer.packets()
        assert not peer.is_closed
        return
    else:
        peer.send(AnswerFetchTransactions, None, (), ZERO_TID, msg_id=msg_id)
        _, msg_id, _ = peer.expect(AskFetchObjects)
        if how == "checksum":
            wrong = (0, bytes(20), b"data", None)
            peer.send(AddObject, A, T1, *wrong, msg_id=msg_id)
            peer.send(AnswerFetchObjects, None, None, {}, msg_id=msg_id)
        elif how in ("object", "pointer"):
            oid, pointer = (LARGE, None) if how == "object" else (A, LARGE)
            peer.send(AddObject, oid, T1, *value(b"data"), pointer, msg_id=msg_id)
            peer.send(AnswerFetchObjects, None, None, {}, msg_id=msg_id)
        else:
            peer.send(AnswerFetchObjects, ZERO_TID, A, {}, msg_id=msg_id)
    assert "interrupted" in h.log.lines[-1]
    assert not peer.packets()
    h.advance(1)
    if how == "lost":
        peer = source(h)
    transfer(peer)
    assert h.m.packets()[-1][2] == (0, T2)


def test_source_that_refuses() -> None:
    h = Harness()
    m = h.operate(TABLE)
    h.tell_nodes(OTHER)
    tell_unfinished(m, T2, ())
    for answer in ("error", "stranger", "silence"):
        peer = h.answer_call()
        _, msg_id, _ = peer.expect(RequestIdentification)
        if answer == "error":
            peer.send(Error, ErrorCode.NOT_READY, b"later", msg_id=msg_id)
        elif answer == "stranger":
            peer.send(AcceptIdentification, NodeType.STORAGE, 3, 1, msg_id=msg_id)
        else:
            m.conn.last_received = h.time + 20
            h.advance(15)
        assert peer.is_closed
        h.advance(1)
    transfer(source(h))
    assert m.packets()[-1][2] == (0, T2)


def test_no_source_yet() -> None:
    h = Harness()
    m = h.operate(TABLE)
    tell_unfinished(m, T2, ())
    assert not h.connections
    h.tell_nodes(OTHER)
    h.advance(1)
    transfer(source(h))


def identify(h: Harness, nid: int | None = 2, stamp: float = 2.5) -> Peer:
    """A storage connects to the node."""
    peer = h.dial()
    args = (NodeType.STORAGE, nid, ADDRESS, NAME.encode(), stamp, {})
    peer.send(RequestIdentification, *args)
    return peer


def test_both_connect_at_once() -> None:
    """The connection of the greater nid survives: here, the other's."""
    h = Harness()
    m = h.operate(TABLE)
    h.tell_nodes(OTHER)
    tell_unfinished(m, T2, ())
    ours = h.answer_call()
    theirs = identify(h)
    assert ours.is_closed
    assert theirs.receive(AcceptIdentification) == (NodeType.STORAGE, 1, 2)
    h.advance(1)
    transfer(theirs)
    assert m.packets()[-1][2] == (0, T2)


def test_greater_nid_refuses() -> None:
    h = Harness()
    m = h.operate((((5, OUT), (2, UP)), ((5, UP),)), nid=5)
    h.tell_nodes(OTHER)
    tell_unfinished(m, T2, ())
    ours = h.answer_call()
    theirs = identify(h)
    assert theirs.receive(Error)[0] == ErrorCode.PROTOCOL_ERROR
    assert not ours.is_closed


@pytest.fixture
def full() -> Harness:
    """A node with 5 transactions in partition 0."""
    h = Harness()
    h.operate((((1, UP),), ((2, UP),)))
    h.tell_nodes(OTHER)
    c = h.client()
    for n in range(10, 20, 2):
        c.commit(number(n), number(n), {number(n): b"x" * n})
    c.store(number(20), A, None)
    c.vote(number(20), A)
    return h


def test_serve(full: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SLICE", 2)
    peer = identify(full)
    peer.expect(AcceptIdentification)
    known = (number(10), number(13), number(99))
    request = peer.send(AskFetchTransactions, 0, 3, ZERO_TID, MAX_TID, known, True)
    found = peer.packets()
    assert all(msg_id == request for _, msg_id, _ in found)
    assert [args[0] for _, _, args in found[:-1]] == [number(12), number(14)]
    next_tid, delete, completed = found[-1][2]
    assert (next_tid, set(delete), completed) == (number(16), {number(13)}, ZERO_TID)
    objects = {number(10): (number(10), number(12))}
    peer.send(AskFetchObjects, 0, 2, ZERO_TID, MAX_TID, ZERO_OID, objects)
    found = peer.packets()
    expected = (number(12), number(12), *value(b"x" * 12), None)
    assert [args for _, _, args in found[:-1]] == [expected]
    assert found[-1][2] == (number(14), number(14), {number(10): (number(12),)})
    count, digest, last = peer.ask(AskCheckTIDRange, 0, 2, ZERO_TID, MAX_TID)
    assert (count, digest, last) == (2, sha1(b"10,12").digest(), number(12))
    found = peer.ask(AskCheckSerialRange, 0, 2, ZERO_TID, MAX_TID, ZERO_OID)
    assert found[0] == 2
    assert found[2::2] == (number(12), number(12))


def test_serve_waits_for_locks(full: Harness) -> None:
    peer = identify(full)
    peer.expect(AcceptIdentification)
    full.m.lock(number(20), number(30))
    first = peer.send(AskFetchTransactions, 0, 9, number(18), number(30), (), False)
    assert not peer.packets()
    full.m.unlock(number(20))
    found = peer.packets()
    assert [args[0] for _, _, args in found[:-1]] == [number(18), number(30)]
    assert found[-1][1:] == (first, (None, (), None))


def test_serve_is_paced(full: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "OUTPUT_MAX", 10)
    peer = identify(full)
    peer.expect(AcceptIdentification)
    peer.send(AskFetchObjects, 0, 9, ZERO_TID, MAX_TID, ZERO_OID, {})
    for _ in range(5):
        assert len(peer.packets()) == 1
        full.advance(0.01)
    assert peer.packets()[-1][0] is AnswerFetchObjects


@pytest.mark.parametrize("partition", [1, 7])
def test_serve_what_is_here_only(full: Harness, partition: int) -> None:
    peer = identify(full, None)
    peer.expect(AcceptIdentification)
    bounds = ZERO_TID, MAX_TID
    found = peer.ask(AskFetchTransactions, partition, 9, *bounds, (), False)
    assert found[0] == ErrorCode.REPLICATION_ERROR
    found = peer.ask(AskFetchObjects, partition, 9, *bounds, ZERO_OID, {})
    assert found[0] == ErrorCode.REPLICATION_ERROR
    found = peer.ask(AskCheckTIDRange, partition, 9, *bounds)
    assert found[0] == ErrorCode.CHECKING_ERROR
    found = peer.ask(AskCheckSerialRange, partition, 9, *bounds, ZERO_OID)
    assert found[0] == ErrorCode.CHECKING_ERROR
    assert not peer.is_closed


def test_partition_dropped_while_serving(full: Harness) -> None:
    peer = identify(full)
    peer.expect(AcceptIdentification)
    full.hold_jobs = True
    peer.send(AskFetchObjects, 0, 9, ZERO_TID, MAX_TID, ZERO_OID, {})
    full.change_table(2, (0, 1, CellState.DISCARDED))
    full.hold_jobs = False
    full.turn()
    assert peer.receive(Error)[0] == ErrorCode.REPLICATION_ERROR


def test_close_client(full: Harness) -> None:
    peer = identify(full)
    peer.expect(AcceptIdentification)
    peer.send(CloseClient)
    assert peer.is_closed


def test_unused_connection_is_released() -> None:
    h, peer = replicating()
    transfer(peer)
    h.m.conn.last_received = h.time + 1000
    h.advance(101)
    assert peer.is_closed


def test_connection_that_serves_is_kept() -> None:
    h, peer = replicating()
    transfer(peer)
    peer.send(AskFetchTransactions, 1, 9, ZERO_TID, MAX_TID, (), False)
    peer.packets()
    h.m.conn.last_received = h.time + 1000
    h.advance(101)
    assert peer.receive(CloseClient) == ()
    assert not peer.is_closed
    peer.send(CloseClient)
    assert peer.is_closed


def test_more_here_than_the_source_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is here after the last key that the source was told, but not there, goes."""
    monkeypatch.setattr(replication, "CHUNK", 2)
    h = Harness()
    m = h.operate(TABLE)
    backend = h.backend
    backend.begin(True)
    tids = [number(n) for n in range(2, 12, 2)]
    for tid in tids:
        backend.add_transaction(tid, Transaction(b"", b"", b"", (A,), False, tid, None))
        backend.add_object(A, tid, None, None)
    backend.commit()
    h.tell_nodes(OTHER)
    tell_unfinished(m, T2)
    peer = source(h)
    _, msg_id, args = peer.expect(AskFetchTransactions)
    assert args[4] == (number(2), number(4))
    # There: 2, 8 and 12, so 6 and 10 are unknown too.
    metadata = (b"u", b"d", b"", False)
    for tid in (number(8), T2):
        peer.send(AddTransaction, tid, *metadata, tid, (A,), None, msg_id=msg_id)
    peer.send(AnswerFetchTransactions, None, (number(4),), ZERO_TID, msg_id=msg_id)
    assert backend.tids_from(0, ZERO_TID, MAX_TID, 9) == [number(2), number(8), T2]
    # Objects: 2 and 8 in the first chunk, then 10 and 12.
    _, msg_id, args = peer.expect(AskFetchObjects)
    assert args[5] == {number(2): (A,), number(4): (A,)}
    peer.send(AddObject, A, number(8), *value(b"8"), None, msg_id=msg_id)
    answer = number(10), A, {number(4): (A,)}
    peer.send(AnswerFetchObjects, *answer, msg_id=msg_id)
    keys = backend.object_keys(0, 9, ZERO_TID, MAX_TID, ZERO_OID)
    assert keys == [(tid, A) for tid in (number(2), number(8), number(10))]
    _, msg_id, args = peer.expect(AskFetchObjects)
    assert args[2:] == (number(10), T2, A, {number(10): (A,)})
    peer.send(AddObject, A, T2, *value(b"12"), None, msg_id=msg_id)
    peer.send(AnswerFetchObjects, None, None, {}, msg_id=msg_id)
    assert m.receive(NotifyReplicationDone) == (0, T2)
    keys = backend.object_keys(0, 9, ZERO_TID, MAX_TID, ZERO_OID)
    assert keys[2:] == [(number(10), A), (T2, A)]


def test_serve_bytes(full: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of objects are limited in bytes, too."""
    monkeypatch.setattr(peers, "SLICE", 2)
    monkeypatch.setattr(peers, "CHUNK_SIZE", 10)
    peer = identify(full)
    peer.expect(AcceptIdentification)
    known = {number(n): (A,) for n in (11, 15)}
    peer.send(AskFetchObjects, 0, 9, ZERO_TID, MAX_TID, ZERO_OID, known)
    found = peer.packets()
    assert [args[1] for _, _, args in found[:-1]] == [number(10), number(12)]
    assert found[-1][2] == (number(14), number(14), {number(11): (A,)})


def test_chunks_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next chunk is asked for while this one waits for the disk."""
    monkeypatch.setattr(replication, "WAITING_SIZE", 300)
    h, peer = replicating()
    _, msg_id, _ = peer.expect(AskFetchTransactions)
    peer.send(AnswerFetchTransactions, None, (), ZERO_TID, msg_id=msg_id)
    for n in range(3):
        _, msg_id, _ = peer.expect(AskFetchObjects)
        h.hold_writer = True
        peer.send(AddObject, A, number(2 + n), *value(b"x"), None, msg_id=msg_id)
        peer.send(AnswerFetchObjects, number(3 + n), A, {}, msg_id=msg_id)
        if n == 1:  # two chunks wait
            assert not peer.packets()
            h.hold_writer = False
            h.turn()
    assert h.backend.own_cells()[0].tid == number(3)
    h.hold_writer = False
    h.turn()
    assert h.backend.own_cells()[0].tid == number(4)


def test_clients_go_first() -> None:
    """As long as they are active, replication has its guaranteed rate."""
    h, peer = replicating(replication_rate=0.0001)  # 100 bytes per second
    c = h.client()
    _, msg_id, _ = peer.expect(AskFetchTransactions)
    peer.send(AnswerFetchTransactions, None, (), ZERO_TID, msg_id=msg_id)
    for n in range(4):
        c.load(A)
        _, msg_id, _ = peer.expect(AskFetchObjects)
        peer.send(AddObject, A, number(2 + n), *value(b"x"), None, msg_id=msg_id)
        peer.send(AnswerFetchObjects, number(3 + n), A, {}, msg_id=msg_id)
        waits = n < 3
        assert (h.backend.own_cells()[0].tid != number(2 + n)) is waits
        if n == 2:  # they stop
            h.advance(10)
            assert h.backend.own_cells()[0].tid == number(4)
            break


def test_damaged_on_all_replicas() -> None:
    """The rest of the partition must get a replica; nobody takes the value for good."""
    h, peer = replicating()
    for attempt in range(2):
        _, msg_id, _ = peer.expect(AskFetchTransactions)
        peer.send(AnswerFetchTransactions, None, (), ZERO_TID, msg_id=msg_id)
        _, msg_id, _ = peer.expect(AskFetchObjects)
        peer.send(AddObject, A, T1, 0, bytes(20), b"data", None, msg_id=msg_id)
        peer.send(AddObject, A, T2, *value(b"good"), None, msg_id=msg_id)
        peer.send(AnswerFetchObjects, None, None, {}, msg_id=msg_id)
        assert ("interrupted" in h.log.lines[-1]) is (attempt == 0)
        h.advance(1)
    assert "damaged on all replicas" in h.log.lines[-1]
    assert h.m.receive(NotifyReplicationDone) == (0, T2)
    damaged = h.backend.load(A, at=T1)
    assert damaged is not None
    assert damaged[2:5] == (0, bytes(20), b"data")
    good = h.backend.load(A)
    assert good is not None
    assert good[4] == b"good"
