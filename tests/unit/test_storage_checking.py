"""Checks: the packets of a storage, towards neoppod's storages too."""

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
    AnswerCheckCell,
    AnswerCheckSerialRange,
    AnswerCheckTIDRange,
    AnswerDigests,
    AnswerFetchObjects,
    AnswerFetchTransactions,
    AskCheckCell,
    AskCheckSerialRange,
    AskCheckTIDRange,
    AskDigests,
    AskFetchObjects,
    AskFetchTransactions,
    CellState,
    CheckPartition,
    Error,
    ErrorCode,
    NotifyDamaged,
    NotifyFeatures,
    NotifyPartitionCorrupted,
    Ping,
    Pong,
    RequestIdentification,
)
from neo.storage import checking
from neo.storage.checking import Report, corrupted

from .storage_harness import UP, Harness, Peer, number
from .test_storage_replication import OTHER, source, value

A, T = number(2), number(10)
TABLE = (((1, UP), (2, UP)), ((2, UP),))


@pytest.fixture
def h() -> Harness:
    """A node with one transaction in partition 0, and a replica, not connected."""
    harness = Harness()
    harness.operate(TABLE)
    harness.tell_nodes(OTHER)
    harness.client().commit(T, T, {A: b"data"})
    harness.advance(1)  # it is applied
    harness.m.packets()
    return harness


def connect(h: Harness, *features: bytes) -> Peer:
    """The replica accepts; `features` of it."""
    peer = source(h)
    if features:
        peer.send(NotifyFeatures, features)
    _, msg_id, _ = peer.expect(Ping)
    peer.send(Pong, msg_id=msg_id)
    return peer


def answer(peer: Peer, asked: Any, packet: Any, *args: Any) -> Any:
    """Answer the next request, of this kind; its arguments."""
    _, msg_id, found = peer.expect(asked)
    peer.send(packet, *args, msg_id=msg_id)
    return found


def digest_of(h: Harness, of_objects: bool) -> Any:
    """What the node itself would answer."""
    peer = h.dial()
    args = h.node.options.cluster.encode(), 2.5, {b"features": (b"check",)}
    peer.send(RequestIdentification, OTHER[0], 2, OTHER[1], *args)
    peer.expect(AcceptIdentification)
    assert peer.receive(NotifyFeatures) == ((b"check",),)
    bounds = ZERO_TID, ZERO_OID, MAX_TID
    items, tid, oid = peer.ask(AskDigests, 0, of_objects, 9, *bounds)
    assert (tid, oid) == (None, None)
    peer.lose()
    return items


def test_same(h: Harness) -> None:
    transactions, objects = digest_of(h, False), digest_of(h, True)
    assert [item[:2] for item in transactions] == [(T, ZERO_OID)]
    assert [item[:2] for item in objects] == [(T, A)]
    h.m.send(AskCheckCell, 0, None, ZERO_TID, T, True)
    peer = connect(h, b"check")
    args = answer(peer, AskDigests, AnswerDigests, transactions, None, None)
    assert args == (0, False, checking.CHUNK, ZERO_TID, ZERO_OID, T)
    answer(peer, AskDigests, AnswerDigests, objects, None, None)
    assert h.m.receive(AnswerCheckCell) == (0, 0, 0, 0, 0, ())


def test_repair(h: Harness) -> None:
    """In several chunks: what is missing, then what is damaged here."""
    transactions, objects = digest_of(h, False), digest_of(h, True)
    h.backend.begin(True)
    h.backend.execute("UPDATE data SET value = x'00'")
    h.backend.commit()
    h.m.send(AskCheckCell, 0, None, ZERO_TID, T, True)
    peer = connect(h, b"check")
    first, second = number(4), number(6)
    items = [(first, ZERO_OID, b"1"), *transactions]
    answer(peer, AskDigests, AnswerDigests, items, None, None)
    _, msg_id, args = peer.expect(AskFetchTransactions)
    assert args == (0, 1, first, first, (), False)
    metadata = (first, b"u", b"d", b"", False, first, (A,), None)
    peer.send(AddTransaction, *metadata, msg_id=msg_id)
    peer.send(AnswerFetchTransactions, None, (), None, msg_id=msg_id)
    found = h.backend.transaction(first)
    assert found is not None
    assert found.user == b"u"
    # The replica ends its first chunk before the last record.
    args = answer(peer, AskDigests, AnswerDigests, [(second, A, b"2")], T, A)
    assert args[1:5] == (True, checking.CHUNK, ZERO_TID, ZERO_OID)
    _, msg_id, args = peer.expect(AskFetchObjects)
    assert args == (0, 1, second, second, A, {})
    peer.send(AddObject, A, second, 0, bytes(20), b"wrong, too", None, msg_id=msg_id)
    peer.send(AnswerFetchObjects, None, None, {}, msg_id=msg_id)
    args = answer(peer, AskDigests, AnswerDigests, objects, None, None)
    assert args[3:5] == (T, A)
    _, msg_id, args = peer.expect(AskFetchObjects)
    assert args == (0, 1, T, T, A, {})
    peer.send(AddObject, A, T, *value(b"data"), None, msg_id=msg_id)
    peer.send(AnswerFetchObjects, None, None, {}, msg_id=msg_id)
    assert h.m.receive(AnswerCheckCell) == (2, 0, 0, 1, 2, ())
    loaded = h.backend.load(A)
    assert loaded is not None
    assert loaded[4] == b"data"


@pytest.mark.parametrize("how", ["position", "error", "lost", "refused"])
def test_replica_that_fails(h: Harness, how: str) -> None:
    h.m.send(AskCheckCell, 0, None, ZERO_TID, T, True)
    if how == "refused":
        for _ in range(checking.CONNECT_TRIES):
            peer = h.answer_call()
            _, msg_id, _ = peer.expect(RequestIdentification)
            peer.send(Error, ErrorCode.NOT_READY, b"later", msg_id=msg_id)
            h.advance(checking.RETRY_DELAY)
    else:
        peer = connect(h, b"check")
        _, msg_id, _ = peer.expect(AskDigests)
        if how == "lost":
            peer.lose()
        elif how == "error":
            peer.send(Error, ErrorCode.CHECKING_ERROR, b"dropped", msg_id=msg_id)
        else:
            peer.send(AnswerDigests, (), ZERO_TID, ZERO_OID, msg_id=msg_id)
    *counts, problems = h.m.receive(AnswerCheckCell)
    assert counts == [0] * 5
    assert len(problems) == 1
    assert problems[0].startswith(b"S2: ")


def test_cell_that_is_not_readable(h: Harness) -> None:
    h.m.send(AskCheckCell, 1, None, ZERO_TID, T, True)
    assert h.m.receive(AnswerCheckCell)[-1] == (b"not readable here",)
    h.m.send(AskCheckCell, 0, None, ZERO_TID, T, True)
    peer = connect(h, b"check")
    h.change_table(2, (0, 1, CellState.DISCARDED))
    answer(peer, AskDigests, AnswerDigests, (), None, None)
    assert h.m.packets()[-1][2][-1] == (b"S2: no longer readable here",)


@pytest.mark.parametrize("differs", ["", "transactions", "records"])
@pytest.mark.parametrize("legacy", [False, True])
def test_storage_of_neoppod(h: Harness, differs: str, legacy: bool) -> None:
    """Only keys are compared, with it; and by it, on behalf of an old master."""
    if legacy:
        h.m.send(CheckPartition, 0, (b"", None), ZERO_TID, T)
    else:
        h.m.send(AskCheckCell, 0, None, ZERO_TID, T, False)
    peer = connect(h)
    count = 2 if differs == "transactions" else 1
    args = count, sha1(b"10").digest(), T
    asked = answer(peer, AskCheckTIDRange, AnswerCheckTIDRange, *args)
    assert asked == (0, checking.CHUNK, ZERO_TID, T)
    if differs != "transactions":
        oid = number(4) if differs else A
        digest = sha1(b"4" if differs else b"2").digest()
        args = 1, sha1(b"10").digest(), T, digest, oid
        asked = answer(peer, AskCheckSerialRange, AnswerCheckSerialRange, *args)
        assert asked == (0, checking.CHUNK, ZERO_TID, T, ZERO_OID)
    found = h.m.packets()
    if legacy:
        expected = [(NotifyPartitionCorrupted, (0, (1, 2)))] if differs else []
        assert [(packet, args) for packet, _, args in found] == expected
    else:
        problems = found[-1][2][-1]
        assert len(problems) == bool(differs)
        assert all(differs.encode() in text for text in problems)


def test_damaged_value(h: Harness) -> None:
    """Told by a client: looked at, and repaired if it is so."""
    c = h.client(2)
    c.send(NotifyDamaged, A, T)
    c.send(NotifyDamaged, A, number(8))
    assert not h.connections
    h.backend.begin(True)
    h.backend.execute("UPDATE data SET value = x'00'")
    h.backend.commit()
    c.send(NotifyDamaged, A, T)
    peer = source(h)
    _, msg_id, args = peer.expect(AskFetchObjects)
    assert args == (0, 1, T, T, A, {})
    peer.send(AddObject, A, T, *value(b"data"), None, msg_id=msg_id)
    peer.send(AnswerFetchObjects, None, None, {}, msg_id=msg_id)
    loaded = h.backend.load(A)
    assert loaded is not None
    assert loaded[3:5] == (sha1(b"data").digest(), b"data")
    assert "repaired" in h.log.lines[-1]


def test_operation_ends(h: Harness) -> None:
    """Nobody waits for the answer."""
    h.m.send(AskCheckCell, 0, None, ZERO_TID, T, True)
    peer = connect(h, b"check")
    h.m.lose()
    assert peer.is_closed
    h.advance(10)


def test_corrupted() -> None:
    report = Report()
    report.compared = {2: None, 3: None}
    assert corrupted(report, 1, None) == []
    report.differing = {3: None}
    assert corrupted(report, 1, None) == [1, 2, 3]
    assert corrupted(report, 1, 1) == [3]
    assert corrupted(report, 1, 2) == [3]
    assert corrupted(report, 1, 3) == [1, 2]


def test_no_data_is_no_damage(h: Harness) -> None:
    """A deletion has a digest, too."""
    h.client(2).commit(number(14), number(14), {A: None}, {A: T})
    items = digest_of(h, True)
    assert [item[:2] for item in items] == [(T, A), (number(14), A)]
    assert all(len(item[2]) == 8 for item in items)
    loaded = h.backend.load(A)
    assert loaded is not None
    assert loaded[3] == ZERO_HASH
