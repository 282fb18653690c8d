"""Stores, locks, votes, unlocks, aborts; and the reads that they delay."""

from __future__ import annotations

from hashlib import sha1
from typing import Any

import pytest

from neo.lib.config import Limits
from neo.lib.protocol import (
    FEATURE_EARLY_VOTE,
    FEATURE_LEASE,
    INVALID_PARTITION,
    MAX_TID,
    ZERO_HASH,
    ZERO_TID,
    AnswerInformationLocked,
    AnswerObject,
    AnswerRelockObject,
    AnswerStoreObject,
    AnswerStoreTransaction,
    AnswerTIDsFrom,
    AnswerTransactionInformation,
    AnswerUnfinishedTransactions,
    AnswerVoteTransaction,
    AskCheckCurrentSerial,
    AskFinalTID,
    AskLockInformation,
    AskObject,
    AskObjectHistory,
    AskObjects,
    AskObjectUndoSerial,
    AskOIDsFrom,
    AskStoreObject,
    AskStoreTransaction,
    AskTIDs,
    AskTIDsFrom,
    AskTransactionInformation,
    AskUnfinishedTransactions,
    AskVoteTransaction,
    CellState,
    Error,
    ErrorCode,
    NotifyDeadlock,
    NotifyFeatures,
    NotifyStalledTransaction,
    NotifyUnlockInformation,
    StopOperation,
)
from neo.storage import client, pending, transactions
from neo.storage.database.memory import MemoryBackend

from .storage_harness import OUT, UP, Harness, Peer, number

T1, T2, T3, T4, T5, T6 = (number(n) for n in (10, 12, 14, 16, 18, 20))
A, B, C = number(2), number(4), number(6)
ODD = number(3)


@pytest.fixture
def h() -> Harness:
    """A node that has two partitions alone."""
    harness = Harness()
    harness.operate()
    return harness


@pytest.fixture
def patient() -> Harness:
    """As `h`; its peers may be silent."""
    harness = Harness(limits=Limits(ping_after=1e6, silence_limit=2e6))
    harness.operate()
    return harness


def accepted(peer: Peer) -> None:
    """The last store was accepted, with a lock."""
    assert peer.receive(AnswerStoreObject) == (None,)


def conflict(peer: Peer, tid: bytes) -> None:
    assert peer.receive(AnswerStoreObject) == (tid,)


def nothing(*peers: Peer) -> None:
    for peer in peers:
        assert peer.packets() == []


def refused(peer: Peer) -> None:
    """The peer broke a rule: it is told, and disconnected."""
    code, text = peer.receive(Error)
    assert code == ErrorCode.PROTOCOL_ERROR, text
    assert peer.is_closed


def orphans(h: Harness) -> tuple[int, int | None]:
    """Values that nothing refers to."""
    h.backend.begin(False)
    result = h.backend.prune_orphans(0, 100, True)
    h.backend.commit()
    return result


def test_commit(h: Harness) -> None:
    c = h.client()
    c.store(T1, A, b"a")
    accepted(c)
    c.vote(T1, A)
    assert c.receive(AnswerStoreTransaction) == ()
    h.m.lock(T1, T2)
    assert h.m.receive(AnswerInformationLocked) == (T1,)
    assert c.ask(AskFinalTID, T1) == (T2,)
    h.m.unlock(T1)
    value = (0, sha1(b"a").digest(), b"a")
    assert c.load(A) == (A, T2, None, *value, None)
    assert h.backend.load(A) is None  # not applied: the answer came from memory
    h.advance(1)
    assert h.backend.load(A) == (T2, None, *value, None)
    assert c.load(A) == (A, T2, None, *value, None)
    assert c.ask(AskFinalTID, T1) == (T2,)
    assert c.ask(AskTransactionInformation, T2) == (
        T2,
        b"user",
        b"description",
        b"",
        False,
        (A,),
    )


def replicated() -> Harness:
    """A node that is one of two which have all."""
    h = Harness()
    h.operate(rows=(((1, UP), (2, UP)),) * 2)
    return h


def test_vote_of_a_node_that_is_alone(h: Harness) -> None:
    """The sync of the lock covers it: it is answered before it is written."""
    c = h.client()
    c.store(T1, A, b"a")
    accepted(c)
    commits = []
    begin = h.backend.begin
    h.backend.begin = lambda durable: (commits.append(durable), begin(durable))[1]  # type: ignore[method-assign]
    h.hold_jobs = True
    c.vote(T1, A)
    c.expect(AnswerStoreTransaction)
    h.m.lock(T1, T2)
    nothing(h.m)
    h.hold_jobs = False
    h.turn()
    assert h.m.receive(AnswerInformationLocked) == (T1,)
    assert commits == [False, True]
    h.change_table(2, (0, 2, OUT))
    c.store(T3, B, b"b")
    accepted(c)
    c.vote(T3, B)
    assert commits[-1]  # not alone any more


def test_answers_wait_for_the_disk() -> None:
    h = replicated()
    c, d = h.client(), h.client(2)
    for peer, ttid, oid in ((c, T1, A), (d, T2, B)):
        peer.store(ttid, oid, b"x")
        accepted(peer)
    commits = []
    begin = h.backend.begin
    h.backend.begin = lambda durable: (commits.append(durable), begin(durable))[1]  # type: ignore[method-assign]
    h.hold_jobs = True
    c.vote(T1, A)
    d.vote(T2, B)
    e = h.client(3)
    e.store(T3, C, b"x")
    accepted(e)  # stores and loads go on
    e.vote(T3, C)
    nothing(c, d, e)
    h.hold_jobs = False
    h.turn()
    for peer in (c, d, e):
        peer.expect(AnswerStoreTransaction)
    assert commits == [True, True]  # the first vote, then all that waited


def test_conflict_and_stale_base(h: Harness) -> None:
    c, d = h.client(), h.client(2)
    c.commit(T1, T1, {A: b"1"})
    c.commit(T2, T2, {A: b"2"}, {A: T1})
    c.store(T4, A, b"4", T1)
    conflict(c, T2)
    d.store(T3, A, b"3", T2)  # no lock was taken
    accepted(d)
    c.store(T4, B, b"4", T5)
    accepted(c)  # no revision: any base
    d.abort(T3)
    c.store(T4, A, b"4", T5)
    # What it read was truncated: its application may try again.
    assert c.receive(Error)[0] == ErrorCode.INCOMPLETE_TRANSACTION
    d.store(T6, A, b"6", T2)
    accepted(d)


def contend(h: Harness) -> tuple[Peer, Peer, Peer]:
    """Clients of T3, T4 and T5, which lost A to T2: T3 is told of it, others wait."""
    peers = h.client(), h.client(2), h.client(3)
    c, d, e = peers
    c.store(T1, A, b"1")
    accepted(c)
    e.store(T5, A, b"5")
    d.store(T4, A, b"4")
    c.store(T3, A, b"3")
    nothing(*peers)
    c.vote(T1, A)
    c.packets()
    h.m.lock(T1, T2)
    h.m.unlock(T1)
    conflict(c, T2)
    nothing(d, e)
    return peers


def test_who_is_told_of_a_conflict_resolves_it_alone(h: Harness) -> None:
    c, d, e = contend(h)
    c.store(T3, A, b"resolved", T2)
    accepted(c)
    nothing(d, e)
    c.vote(T3, A)
    c.packets()
    h.m.lock(T3, T6)
    h.m.unlock(T3)
    conflict(d, T6)
    nothing(e)
    h.advance(1)  # it takes long
    conflict(e, T6)
    e.store(T5, A, b"resolved", T6)
    accepted(e)
    d.store(T4, A, b"resolved", T6)
    assert e.receive(NotifyDeadlock) == (T5, A)  # and is as old as ever


@pytest.mark.parametrize("how", ["abort", "loss", "master"])
def test_who_gives_up_leaves_the_object_to_the_next(h: Harness, how: str) -> None:
    c, d, e = contend(h)
    if how == "abort":
        c.abort(T3)
    elif how == "loss":
        c.lose()
    else:
        h.m.abort(T3)
    conflict(d, T2)
    nothing(e)
    h.advance(0.15)
    nothing(e)  # the time left by the first one is not that of the second
    d.store(T4, A, b"resolved", T2)
    accepted(d)
    h.advance(0.15)
    d.abort(T4)
    conflict(e, T2)


def test_slow_client_that_resolves_conflicts(h: Harness) -> None:
    """All that wait for it are told then: nobody waits for several such clients."""
    c, d, e = contend(h)
    h.advance(0.1)
    c.store(T3, A, b"wrong", T1)
    conflict(c, T2)
    h.advance(0.15)
    conflict(d, T2)
    conflict(e, T2)
    e.store(T5, A, b"resolved", T2)
    accepted(e)
    c.store(T3, A, b"resolved", T2)
    d.store(T4, A, b"resolved", T2)
    assert e.receive(NotifyDeadlock) == (T5, A)
    e.abort(T5)
    accepted(c)
    nothing(d)


def test_older_transactions_wait_for_no_resolution(h: Harness) -> None:
    """Which may itself wait for them."""
    c = h.client()
    c.commit(T1, T1, {A: b"1"})
    c.commit(T2, T2, {A: b"2"}, {A: T1})
    d, e = h.client(2), h.client(3)
    d.store(T4, A, b"4", T1)
    conflict(d, T2)
    e.store(T5, A, b"5", T1)
    d.store(T4, A, b"wrong", T1)
    conflict(d, T2)
    assert e.ask(AskCheckCurrentSerial, T6, B, T1) == (None,)
    nothing(e)
    c.store(T3, A, b"3", T1)
    conflict(c, T2)
    d.store(T4, A, b"resolved", T2)
    nothing(d)  # it is no more for this one
    c.store(T3, A, b"resolved", T2)
    accepted(c)
    c.abort(T3)
    accepted(d)
    nothing(e)
    d.abort(T4)
    conflict(e, T2)


def test_nothing_is_reserved_for_a_check(h: Harness) -> None:
    """Its client can't resolve the conflict."""
    c, d = h.client(), h.client(2)
    c.commit(T1, T1, {A: b"1"})
    c.commit(T2, T2, {A: b"2"}, {A: T1})
    assert c.ask(AskCheckCurrentSerial, T3, A, T1) == (T2,)
    d.store(T4, A, b"4", T2)
    accepted(d)


def test_reservation_for_who_gave_its_lock_back(h: Harness) -> None:
    c, d, e = h.client(), h.client(2), h.client(3)
    d.store(T2, A, b"d")
    accepted(d)
    c.store(T1, A, b"c")
    assert d.receive(NotifyDeadlock) == (T2, A)
    d.relock(T2, A)
    accepted(c)
    e.store(T3, A, b"e")
    c.vote(T1, A)
    c.packets()
    h.m.lock(T1, T4)
    h.m.unlock(T1)
    assert d.receive(AnswerRelockObject)[0][:2] == (ZERO_TID, T4)
    nothing(e)
    d.store(T2, A, b"resolved", T4)
    accepted(d)


def test_reservation_in_a_cell_that_is_dropped(h: Harness) -> None:
    c, d = h.client(), h.client(2)
    c.commit(T1, T1, {A: b"1"})
    c.commit(T2, T2, {A: b"2"}, {A: T1})
    c.store(T3, A, b"3", T1)
    conflict(c, T2)
    d.store(T4, A, b"4", T1)
    nothing(d)
    h.change_table(2, (0, 1, CellState.DISCARDED))
    conflict(d, ZERO_TID)


def test_reservation_ends_with_operation(h: Harness) -> None:
    contend(h)
    h.m.send(StopOperation)
    h.advance(1)


def test_transactions_that_have_nothing_here_any_more(h: Harness) -> None:
    """All their cells went elsewhere (behaviour 12.1 D10): nobody would end them."""
    c = h.client()
    for ttid, oid in (T1, A), (T2, B), (T3, C), (T4, ODD):
        c.store(ttid, oid, b"1")
        accepted(c)
    c.vote(T1, A)
    c.vote(T4, ODD)
    c.packets()
    h.change_table(2, (0, 1, CellState.DISCARDED))
    transactions = h.node.operation.transactions  # type: ignore[union-attr]
    assert [*transactions.by_ttid] == [T4]
    # Clients may not know it yet.
    c.vote_only(T2)
    assert c.receive(AnswerVoteTransaction) == ()
    c.vote(T3, C)
    assert c.receive(AnswerStoreTransaction) == ()
    assert [*transactions.by_ttid] == [T4]
    for ttid in T1, T2, T3:
        c.abort(ttid)
    h.m.lock(T4, T5)
    h.m.unlock(T4)
    h.advance(1)
    assert not transactions.by_ttid
    assert c.load(ODD)[1] == T5


def test_stores_of_one_transaction_replace_each_other(h: Harness) -> None:
    c = h.client()
    for data in (b"1", b"22", None, b"333"):
        c.store(T1, A, data)
        accepted(c)
    c.vote(T1, A)
    c.packets()
    h.m.lock(T1, T1)
    h.m.unlock(T1)
    h.advance(2)
    assert c.load(A)[5] == b"333"
    assert orphans(h) == (0, None)


def test_younger_waits_for_older(h: Harness) -> None:
    """Scenario 84, for one storage; 47."""
    c, d = h.client(), h.client(2)
    c.store(T1, A, b"1")
    accepted(c)
    d.store(T2, A, b"2")
    nothing(c, d)
    c.vote(T1, A)
    c.packets()
    h.m.lock(T1, T3)
    nothing(d)
    h.m.unlock(T1)
    conflict(d, T3)
    d.store(T2, A, b"2", T3)
    accepted(d)


def test_waiters_are_served_by_ttid_then_arrival(h: Harness) -> None:
    c = h.client()
    c.store(T1, A, b"1")
    c.packets()
    ids = [
        (T3, c.store(T3, A, b"3")),
        (T2, c.store(T2, A, b"2")),
        (T2, c.store(T2, A, b"2 again")),
    ]
    nothing(c)
    c.abort(T1)
    served = [msg_id for _, msg_id, _ in c.packets()]
    assert served == [ids[1][1], ids[2][1]]
    c.abort(T2)
    assert [msg_id for _, msg_id, _ in c.packets()] == [ids[0][1]]


def test_deadlock_is_avoided(h: Harness) -> None:
    """Scenario 85, as seen by the storage where the younger one has the lock."""
    c, d = h.client(), h.client(2)
    d.store(T2, A, b"d")
    accepted(d)
    c.store(T1, A, b"c")
    assert d.receive(NotifyDeadlock) == (T2, A)
    c.store(T1, A, b"c again")
    nothing(c, d)  # told once
    d.relock(T2, A)
    accepted(c)
    accepted(c)
    nothing(d)
    c.vote(T1, A)
    c.packets()
    h.m.lock(T1, T3)
    h.m.unlock(T1)
    data = (0, sha1(b"d").digest(), b"d")
    assert d.receive(AnswerRelockObject) == ((ZERO_TID, T3, data),)
    d.store(T2, A, b"resolved", T3)
    accepted(d)


def test_relock_without_conflict(h: Harness) -> None:
    c, d = h.client(), h.client(2)
    d.store(T2, A, b"d")
    accepted(d)
    c.store(T1, A, b"c")
    d.receive(NotifyDeadlock)
    d.relock(T2, A)
    accepted(c)
    c.abort(T1)
    assert d.receive(AnswerRelockObject) == (None,)
    d.relock(T2, A)  # nobody wants it
    assert d.receive(AnswerRelockObject) == (None,)
    d.relock(T2, B)  # never stored
    assert d.receive(AnswerRelockObject) == (None,)
    d.relock(T5, B)  # unknown
    assert d.receive(AnswerRelockObject) == (None,)


def test_relock_of_a_check(h: Harness) -> None:
    c, d = h.client(), h.client(2)
    c.commit(T1, T1, {A: b"1"})
    assert d.ask(AskCheckCurrentSerial, T3, A, T1) == (None,)
    c.store(T2, A, b"c", T1)
    assert d.receive(NotifyDeadlock) == (T3, A)
    d.relock(T3, A)
    accepted(c)
    c.vote(T2, A)
    h.m.lock(T2, T4)
    h.m.unlock(T2)
    assert d.receive(AnswerRelockObject) == ((T1, T4, None),)


def test_no_notification_after_the_vote(h: Harness) -> None:
    c, d = h.client(), h.client(2)
    d.store(T2, A, b"d")
    d.vote(T2, A)
    d.packets()
    c.store(T1, A, b"c")
    nothing(c, d)
    h.m.lock(T2, T2)
    h.m.unlock(T2)
    conflict(c, T2)


def test_check_then_store(h: Harness) -> None:
    """Defect D6: accepted, if the base is right."""
    c = h.client()
    c.commit(T1, T1, {A: b"1"})
    assert c.ask(AskCheckCurrentSerial, T2, A, ZERO_TID) == (T1,)
    assert c.ask(AskCheckCurrentSerial, T2, A, T1) == (None,)
    c.store(T2, A, b"2", T1)
    accepted(c)
    assert c.ask(AskCheckCurrentSerial, T2, A, T1) == (None,)
    c.vote(T2, A)
    h.m.lock(T2, T2)
    h.m.unlock(T2)
    c.packets()
    assert c.load(A)[5] == b"2"


def test_undo_store(h: Harness) -> None:
    c = h.client()
    c.commit(T1, T1, {A: b"1"})
    c.commit(T2, T2, {A: b"2"}, {A: T1})
    found = c.ask(AskObjectUndoSerial, T3, T3, T2, (A,))
    assert found == ({A: (T2, T1, True)},)
    c.store(T3, A, b"1", T2, T1)
    accepted(c)
    assert c.ask(AskObjectUndoSerial, T3, T4, T1, (A,)) == ({A: (T1, None, True)},)
    c.store(T3, A, b"x", T2)  # the base is what is stored now
    conflict(c, T1)
    c.store(T3, A, b"1", T1, T1)
    accepted(c)
    c.store(T3, A, b"1", T6, T1)
    conflict(c, T1)
    c.vote(T3, A)
    h.m.lock(T3, T3)
    h.m.unlock(T3)
    c.packets()
    assert c.load(A) == (A, T3, None, 0, sha1(b"1").digest(), b"1", T1)
    c.store(T4, A, b"", T3, T6)
    assert c.receive(Error)[0] == ErrorCode.UNDO_PACK_ERROR
    c.store(T4, A, b"4", T3)
    accepted(c)


def test_deletion(h: Harness) -> None:
    c = h.client()
    c.commit(T1, T1, {A: b"1"})
    c.commit(T2, T2, {A: None}, {A: T1})
    assert c.load(A) == (A, T2, None, None, ZERO_HASH, b"", None)
    h.advance(1)
    assert c.load(A) == (A, T2, None, None, ZERO_HASH, b"", None)
    assert c.ask(AskOIDsFrom, 0, 10, ZERO_TID, T1) == (None, (A,))
    assert c.ask(AskOIDsFrom, 0, 10, ZERO_TID, T2) == (None, ())


WRONG: list[tuple[Any, ...]] = [
    (AskStoreObject, A, ZERO_TID, 0, ZERO_HASH, b"x", None, T2),
    (AskStoreObject, A, ZERO_TID, 0, sha1(b"y").digest(), b"x", None, T2),
    (AskStoreObject, b"\x80" + bytes(7), ZERO_TID, 0, ZERO_HASH, b"", None, T2),
    (AskStoreObject, A, b"\x80" + bytes(7), 0, ZERO_HASH, b"", None, T2),
    (AskStoreObject, A, ZERO_TID, 0, ZERO_HASH, b"", b"\xff" * 8, T2),
    (AskStoreObject, A, ZERO_TID, 0, ZERO_HASH, b"", None, b"\xff" * 8),
    (AskCheckCurrentSerial, T2, b"\xff" * 8, ZERO_TID),
    (AskVoteTransaction, T2),
    (AskVoteTransaction, T1),
    (AskStoreTransaction, T1, b"", b"", b"", (), None),
    (AskStoreTransaction, T2, b"", b"", b"", [A] * (1 << 21), None),
    (AskStoreTransaction, T2, b"", b"", b"", (), ([A] * (1 << 21), T1)),
    (AskStoreObject, B, ZERO_TID, 0, ZERO_HASH, b"", None, T1),
    (AskObjectHistory, A, 1, 1),
    (AskTIDs, 1, 1, 0),
]


@pytest.mark.parametrize("packet", WRONG, ids=range(len(WRONG)))
def test_wrong_packets_of_clients(h: Harness, packet: tuple[Any, ...]) -> None:
    c = h.client()
    c.store(T1, A, b"a")
    c.vote(T1, A)
    c.packets()
    c.send(*packet)
    refused(c)
    h.client().load(A)


def test_transaction_of_another_client(h: Harness) -> None:
    c, d = h.client(), h.client(2)
    c.store(T1, A, b"a")
    accepted(c)
    d.abort(T1)  # ignored
    d.store(T1, B, b"b")
    refused(d)
    c.vote(T1, A)
    c.expect(AnswerStoreTransaction)


@pytest.mark.parametrize(
    "packet",
    [
        (AskLockInformation, T2, T2, False),
        (AskLockInformation, T3, T3, False),
        (AskLockInformation, T1, number(1), False),
        (AskLockInformation, T1, b"\xff" * 8, False),
        (NotifyUnlockInformation, T2),
        (NotifyUnlockInformation, T1),
    ],
)
def test_wrong_packets_of_the_master(h: Harness, packet: tuple[Any, ...]) -> None:
    c = h.client()
    c.store(T1, A, b"a")
    c.vote(T1, A)
    c.store(T3, B, b"a")
    h.m.send(*packet)
    refused(h.m)


def test_eager_unlock() -> None:
    """Where a commit costs no flush, an idle writer applies what is unlocked."""
    h = Harness(eager=True)
    h.operate()
    c = h.client()
    c.commit(T1, T2, {A: b"a"})
    assert c.load(A)[1] == T2
    revision = h.backend.load(A)
    assert revision is not None
    assert revision[0] == T2


def test_early_vote() -> None:
    """A vote that comes before the answers to stores is refused, not harmful, as long
    as one of them waits or conflicts."""
    h = Harness()
    h.operate()
    other, c = h.client(), h.client(2)
    assert c.conn.node is not None
    c.conn.node.extra["features"] = (FEATURE_EARLY_VOTE,)
    other.store(T1, A, b"a")
    accepted(other)
    c.store(T2, A, b"b")
    c.vote(T2, A)  # the store waits
    assert c.receive(Error)[0] == ErrorCode.INCOMPLETE_TRANSACTION
    other.vote(T1, A)
    other.expect(AnswerStoreTransaction)
    h.m.lock(T1, T1)
    h.m.expect(AnswerInformationLocked)
    h.m.unlock(T1)
    assert c.receive(AnswerStoreObject) == (T1,)
    c.vote(T2, A)  # the conflict is not resolved
    assert c.receive(Error)[0] == ErrorCode.INCOMPLETE_TRANSACTION
    c.store(T2, A, b"c", base=T1)
    c.vote(T2, A)
    accepted(c)
    assert c.receive(AnswerStoreTransaction) == ()
    assert h.backend.locked_transactions() == {T2: None}


def test_vote_without_metadata() -> None:
    h = Harness()
    h.operate((((2, UP),), ((1, UP),)))
    c = h.client()
    c.store(T1, ODD, b"a")
    accepted(c)
    assert c.ask(AskVoteTransaction, T1) == ()
    assert h.backend.locked_transactions() == {T1: None}
    h.m.lock(T1, T1)
    h.m.expect(AnswerInformationLocked)
    assert h.backend.locked_transactions() == {T1: None}
    h.m.unlock(T1)
    assert c.load(ODD)[1] == T1
    assert c.ask(AskFinalTID, T1) == (T1,)
    h.advance(1)
    assert c.ask(AskFinalTID, T1)[0] == ErrorCode.NON_READABLE_CELL


def test_check_only(h: Harness) -> None:
    c = h.client()
    assert c.ask(AskCheckCurrentSerial, T1, A, ZERO_TID) == (None,)
    assert c.ask(AskVoteTransaction, T1) == ()
    h.m.lock(T1, T1)
    h.m.expect(AnswerInformationLocked)
    h.m.unlock(T1)
    c.store(T2, A, b"a")
    accepted(c)


def test_cell_not_here() -> None:
    """Scenario 80."""
    h = Harness()
    h.operate((((1, UP),), ((2, UP),)))
    c = h.client()
    c.store(T1, ODD, b"a")
    conflict(c, ZERO_TID)
    c.vote(T1, ODD)
    c.expect(AnswerStoreTransaction)
    h.m.lock(T1, T1)
    h.m.unlock(T1)
    h.advance(1)
    assert h.backend.load(ODD) is None
    assert c.load(ODD)[0] == ErrorCode.NON_READABLE_CELL


def test_last_tids_are_remembered(
    patient: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not beyond a change of the table: who replicates gets more than it was told."""
    h = patient
    monkeypatch.setattr(pending, "RECENT", 1)
    looked_for: list[bytes] = []
    last_tid_of = h.backend.last_tid_of

    def looking(oid: bytes) -> bytes | None:
        looked_for.append(oid)
        return last_tid_of(oid)

    monkeypatch.setattr(h.backend, "last_tid_of", looking)
    c = h.client()
    for ttid, oids in ((T1, (A, B)), (T2, (C,))):
        c.commit(ttid, ttid, dict.fromkeys(oids, b"x"))
        h.advance(99)
        looked_for.clear()
        for oid in oids:
            c.store(T5, oid, b"y")
            conflict(c, ttid)
        assert not looked_for
    c.store(T5, A, b"y")
    conflict(c, T1)
    assert looked_for == [A]
    h.change_table(2, (1, 1, OUT), (1, 2, UP))
    c.store(T5, C, b"y")
    conflict(c, T2)
    assert looked_for == [A, C]


def test_blind_writes_of_an_outdated_cell() -> None:
    h = Harness()
    h.operate((((1, UP),), ((1, OUT), (2, UP))))
    h.m.packets()
    c, d = h.client(), h.client(2)
    for peer, ttid in ((c, T1), (d, T2), (c, T1)):
        peer.store(ttid, ODD, b"x", T6)
        conflict(peer, ZERO_TID)
    c.relock(T1, ODD)
    assert c.receive(AnswerRelockObject) == (None,)
    c.vote(T1, ODD)
    c.expect(AnswerStoreTransaction)
    h.m.lock(T1, T1)
    h.m.unlock(T1)
    h.advance(1)
    assert h.backend.load(ODD) is not None
    assert c.load(ODD)[0] == ErrorCode.NON_READABLE_CELL
    assert c.ask(AskTIDsFrom, ZERO_TID, MAX_TID, 9, 1)[0] == ErrorCode.NON_READABLE_CELL


@pytest.mark.parametrize("how", ["abort", "loss", "master", "discarded"])
def test_end_frees_locks_and_waiters(h: Harness, how: str) -> None:
    c, d = h.client(), h.client(2)
    c.store(T1, A, b"1")
    accepted(c)
    d.store(T2, A, b"2")
    waiting = c.store(T1, ODD, b"1"), d.store(T3, ODD, b"3")
    c.packets()
    if how == "abort":
        c.abort(T1)
    elif how == "loss":
        c.lose()
    elif how == "master":
        h.m.abort(T1)
    else:
        h.change_table(2, (0, 1, CellState.DISCARDED))
        assert d.receive(AnswerStoreObject) == (ZERO_TID,)
        assert waiting
        return
    accepted(d)
    accepted(d)


def test_abort_answers_its_own_parked_stores(h: Harness) -> None:
    c, d = h.client(), h.client(2)
    c.store(T1, A, b"1")
    d.store(T2, A, b"2")
    d.store(T2, B, b"2")
    accepted(d)
    d.abort(T2)
    conflict(d, ZERO_TID)
    c.store(T1, B, b"1")
    accepted(c)
    accepted(c)


def test_abort_after_vote(h: Harness) -> None:
    """Scenario 61."""
    c = h.client()
    c.store(T1, A, b"1")
    c.vote(T1, A)
    c.abort(T1)
    assert h.backend.locked_transactions() == {}
    assert orphans(h) == (0, None)
    c.packets()
    c.store(T2, A, b"2")
    accepted(c)
    c.vote(T2, A)
    h.m.lock(T2, T2)
    c.abort(T2)  # too late
    h.m.abort(T2)
    h.m.unlock(T2)
    assert not h.m.is_closed


def test_loss_of_a_voted_client_changes_nothing(h: Harness) -> None:
    """Scenario 74."""
    c, d = h.client(), h.client(2)
    c.store(T1, A, b"1")
    c.vote(T1, A)
    d.store(T2, A, b"2")
    c.lose()
    nothing(d)
    h.m.lock(T1, T1)
    h.m.unlock(T1)
    conflict(d, T1)


def stalled_in(h: Harness) -> list[tuple[bytes]]:
    """What the master was told of stalled transactions."""
    return [a for p, _, a in h.m.packets() if p is NotifyStalledTransaction]


@pytest.mark.parametrize("is_voted", [False, True])
def test_lease_ended_by_the_master(patient: Harness, is_voted: bool) -> None:
    """A stalled transaction is reported, and refused once the master dropped it."""
    patient.m.send(NotifyFeatures, (FEATURE_LEASE,))
    c, d = patient.client(), patient.client(2)
    c.store(T1, A, b"1")
    accepted(c)
    if is_voted:
        c.vote(T1, A)
        c.expect(AnswerStoreTransaction)
    patient.advance(5)
    d.store(T2, A, b"2")
    patient.m.packets()
    patient.advance(59)
    assert stalled_in(patient) == []
    patient.advance(2)
    assert stalled_in(patient) == [(T1,)]
    assert not c.is_closed
    nothing(d)
    patient.m.send(NotifyStalledTransaction, T1)
    accepted(d)
    c.packets()
    for send in (
        lambda: c.store(T1, B, b"1"),
        lambda: c.vote(T1, A),
        lambda: c.send(AskVoteTransaction, T1),
    ):
        send()
        assert c.receive(Error)[0] == ErrorCode.INCOMPLETE_TRANSACTION
    assert not c.is_closed
    assert T1 not in patient.node.operation.transactions.by_ttid  # type: ignore[union-attr]


def test_who_waits_itself_has_no_lease(patient: Harness) -> None:
    """Unless it is asked to give its lock back and does not."""
    patient.m.send(NotifyFeatures, (FEATURE_LEASE,))
    c, d, e = patient.client(), patient.client(2), patient.client(3)
    c.store(T1, A, b"1")
    d.store(T2, B, b"2")
    d.store(T2, A, b"2")
    e.store(T3, B, b"3")

    def stalled() -> set[bytes]:
        patient.advance(130)
        return {ttid for (ttid,) in stalled_in(patient)}

    assert stalled() == {T1}
    c.store(T1, B, b"1")
    assert stalled() == {T2}


def test_lease(patient: Harness) -> None:
    c, d = patient.client(), patient.client(2)
    c.store(T1, A, b"1")
    patient.advance(2)
    d.store(T2, A, b"2")
    patient.advance(80)
    assert c.is_closed
    accepted(d)


def test_many_waiters_are_linear(h: Harness) -> None:
    """Scenario 89: each waiter is looked at a bounded number of times."""
    c = h.client()
    c.store(number(100), A, b"0")
    c.packets()
    for n in range(300, 100, -2):
        c.store(number(n), A, b"x")
    decisions = 0
    manager = h.node.operation.transactions  # type: ignore[union-attr]
    decide = manager._decide

    def counting(demand: Any) -> Any:
        nonlocal decisions
        decisions += 1
        return decide(demand)

    manager._decide = counting  # type: ignore[method-assign]
    for n in range(100, 301, 2):
        c.abort(number(n))
    assert decisions <= 2 * 100


def test_values_are_spilled(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "MEMORY_OF_TRANSACTION", 100)
    c, d = h.client(), h.client(2)
    c.store(T2, A, b"a" * 60)
    accepted(c)
    c.store(T2, B, b"b" * 60)
    accepted(c)
    assert h.node.operation is not None
    manager = h.node.operation.transactions
    assert manager.by_ttid[T2].memory == 0
    c.store(T2, B, b"B" * 60)
    accepted(c)
    d.store(T1, A, b"d")
    c.receive(NotifyDeadlock)
    c.relock(T2, A)
    accepted(d)
    d.vote(T1, A)
    h.m.lock(T1, T1)
    h.m.unlock(T1)
    data = (0, sha1(b"a" * 60).digest(), b"a" * 60)
    assert c.receive(AnswerRelockObject) == ((ZERO_TID, T1, data),)
    c.store(T2, A, b"resolved" * 20, T1)
    accepted(c)
    c.vote(T2, A, B)
    h.m.lock(T2, T3)
    h.m.unlock(T2)
    c.packets()
    assert c.load(A)[5] == b"resolved" * 20
    assert c.load(B)[5] == b"B" * 60
    c.store(T4, C, b"c" * 101)
    accepted(c)
    c.abort(T4)
    h.advance(1)
    assert orphans(h) == (0, None)


def test_spill_that_ends_after_the_vote(
    h: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "MEMORY_OF_TRANSACTION", 100)
    c = h.client()
    h.hold_jobs = True
    c.store(T1, A, b"a" * 101)
    nothing(c)
    c.vote(T1, A)  # against the rules, and harmless
    c.store(T2, B, b"b" * 101)
    c.abort(T2)
    h.hold_jobs = False
    h.turn()
    h.m.lock(T1, T1)
    h.m.unlock(T1)
    h.advance(1)
    assert c.packets()
    assert c.load(A)[5] == b"a" * 101
    assert orphans(h) == (0, None)


# --- reads ---------------------------------------------------------------------


def test_many_objects_in_one_packet(h: Harness) -> None:
    c = h.client()
    c.commit(T1, T1, {A: b"a", B: b"b"})
    c.commit(T2, T2, {A: b"A", C: None}, {A: T1})
    c.store(T3, B, b"later", T1)
    c.vote(T3, B)
    h.m.lock(T3, T4)
    c.packets()
    a = c.load(A, before=T2)
    c.store(T5, ODD, b"odd")
    c.vote(T5, ODD)
    h.m.lock(T5, T6)
    h.m.unlock(T5)
    c.packets()
    wanted = [(A, None, T2), (A, T2, None), (B, None, T5), (C, None, T2), (C, T2, None)]
    nothing = number(7), None, None
    rows, codes = c.ask(AskObjects, [*wanted, nothing, (ODD, None, None)])
    assert rows[0] == a[1:]
    assert [row and row[4] for row in rows[:3]] == [b"a", b"A", None]
    assert [row and row[4] for row in rows[3:]] == [None, b"", None, b"odd"]
    assert codes == (
        ErrorCode.NOT_READY,  # it may be committed in a moment
        ErrorCode.OID_NOT_FOUND,
        ErrorCode.OID_DOES_NOT_EXIST,
    )
    c.send(AskObjects, [])
    refused(c)


def test_objects_of_other_nodes() -> None:
    h = Harness()
    h.operate([[(1, UP)], [(2, UP)]])
    c = h.client()
    c.commit(T1, T1, {A: b"a"})
    c.packets()
    rows, codes = c.ask(AskObjects, [(ODD, None, None), (A, None, None)])
    assert [row and row[4] for row in rows] == [None, b"a"]
    assert codes == (ErrorCode.NON_READABLE_CELL,)


def test_size_of_many_objects(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "OBJECTS_SIZE", 5)
    c = h.client()
    c.commit(T1, T1, {A: b"aaa", B: b"bbb", C: b"ccc"})
    wanted = [(oid, None, None) for oid in (A, B, C)]
    assert len(c.ask(AskObjects, wanted)[0]) == 2
    assert len(c.ask(AskObjects, wanted[2:])[0]) == 1
    monkeypatch.setattr(client, "LOADS", 1)
    assert len(c.ask(AskObjects, wanted)[0]) == 1


def loading_together() -> Harness:
    """As `h`, on a database where a query costs more than what it reads."""
    backend = MemoryBackend()
    backend.loads_together = True
    harness = Harness(backend)
    harness.operate()
    return harness


def test_loads_of_one_turn_are_one_query(monkeypatch: pytest.MonkeyPatch) -> None:
    h = loading_together()
    c, d = h.client(), h.client(2)
    c.commit(T1, T1, {A: b"1", B: b"2"})
    c.commit(T2, T2, {B: b"3"}, {B: T1})
    c.store(T3, C, b"4")
    c.vote(T3, C)
    h.m.lock(T3, T4)
    c.packets()
    h.turn()
    asked: list[int] = []
    load_many = h.backend.load_many

    def counting(wanted: Any) -> Any:
        asked.append(len(wanted))
        return load_many(wanted)

    monkeypatch.setattr(h.backend, "load_many", counting)
    wanted = [
        (c, (A, None, None)),
        (c, (B, None, T2)),
        (d, (B, None, None)),
        (d, (C, None, None)),  # waits
        (d, (C, None, T4)),  # not yet
        (c, (bytes(7) + b"\x50", None, None)),  # never
    ]
    with monkeypatch.context() as patch:
        patch.setattr(h, "turn", lambda: None)
        ids = [peer.send(AskObject, *args) for peer, args in wanted]
    h.turn()
    assert asked == [4]
    h.m.unlock(T3)
    h.advance(1)
    answers = {
        (peer, msg_id): args for peer in (c, d) for _, msg_id, args in peer.packets()
    }
    found = [
        answers[peer, msg_id] for (peer, _), msg_id in zip(wanted, ids, strict=True)
    ]
    assert [args[1:3] for args in found[:4]] == [
        (T1, None),
        (T1, T2),
        (T2, None),
        (T4, None),
    ]
    assert [args[0] for args in found[4:]] == [
        ErrorCode.OID_NOT_FOUND,
        ErrorCode.OID_DOES_NOT_EXIST,
    ]


def test_load_of_a_client_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    h = loading_together()
    c, d = h.client(), h.client(2)
    c.store(T1, A, b"1")
    c.vote(T1, A)
    h.m.lock(T1, T1)
    with monkeypatch.context() as patch:
        patch.setattr(h, "turn", lambda: None)
        d.send(AskObject, A, None, None)
    d.lose()
    h.m.unlock(T1)
    h.advance(1)
    assert not d.packets()
    c.packets()
    assert c.load(A)[1] == T1


@pytest.mark.parametrize("together", [False, True])
def test_reads_during_a_commit(h: Harness, together: bool) -> None:
    """Scenario 101, and 12.3: older revisions are answered at once."""
    if together:
        h = loading_together()
    c, d = h.client(), h.client(2)
    c.commit(T1, T1, {A: b"1"})
    c.store(T2, A, b"2", T1)
    c.vote(T2, A)
    c.packets()
    assert c.load(A)[1:3] == (T1, None)  # voted: not visible
    h.m.lock(T2, T4)
    assert d.load(A, None, T4)[1:3] == (T1, T4)
    assert d.load(A, T1, None)[1:3] == (T1, T4)
    assert d.load(A, None, T1)[0] == ErrorCode.OID_NOT_FOUND
    waiting = [
        d.send(AskObject, A, None, None),
        d.send(AskObject, A, None, T5),
        d.send(AskObject, A, T4, None),
        d.send(AskObjectHistory, A, 0, 9),
        d.send(AskTIDsFrom, ZERO_TID, T4, 9, 0),
        d.send(AskOIDsFrom, 0, 9, ZERO_TID, T4),
        d.send(AskTransactionInformation, T4),
        d.send(AskTIDs, 0, 9, INVALID_PARTITION),
        d.send(AskObjectUndoSerial, T5, T5, T1, (A,)),
    ]
    nothing(d)
    assert d.ask(AskTIDsFrom, ZERO_TID, T3, 9, 0) == ((T1,),)
    h.m.unlock(T2)
    answers = {msg_id: (packet, args) for packet, msg_id, args in d.packets()}
    found = [answers[msg_id] for msg_id in waiting]
    assert [args[1] for _, args in found[:3]] == [T4, T4, T4]
    assert found[3][1] == (A, ((T4, 1), (T1, 1)))
    assert found[4] == (AnswerTIDsFrom, ((T1, T4),))
    assert found[5][1] == (None, (A,))
    assert found[6][0] is AnswerTransactionInformation
    assert found[7][1] == ((T4, T1),)
    assert found[8][1] == ({A: (T4, None, False)},)


def test_read_of_an_object_being_created(h: Harness) -> None:
    c = h.client()
    assert c.load(A)[0] == ErrorCode.OID_DOES_NOT_EXIST
    c.store(T1, A, b"1")
    c.vote(T1, A)
    h.m.lock(T1, T3)
    c.packets()
    code, text = c.load(A, None, T3)
    assert code == ErrorCode.OID_NOT_FOUND
    assert text == A.hex().encode()


def test_chain_of_commits_before_any_is_applied(h: Harness) -> None:
    c = h.client()
    c.commit(T1, T1, {A: b"1"})
    c.commit(T2, T2, {A: b"2"}, {A: T1})
    c.store(T3, A, b"3", T2)
    c.vote(T3, A)
    h.m.lock(T3, T3)
    c.packets()
    assert c.load(A, None, T3)[1:3] == (T2, T3)
    assert c.load(A, None, T2)[1:3] == (T1, T2)
    assert c.load(A, T2, None)[1:3] == (T2, T3)
    assert c.load(A, None, T1)[0] == ErrorCode.OID_NOT_FOUND


def test_lost_reader_is_forgotten(h: Harness) -> None:
    c, d = h.client(), h.client(2)
    c.store(T1, A, b"1")
    c.vote(T1, A)
    h.m.lock(T1, T1)
    d.send(AskObject, A, None, None)
    d.lose()
    h.m.unlock(T1)
    c.packets()
    assert c.load(A)[1] == T1


def test_abort_that_overtakes_the_vote(h: Harness) -> None:
    """The last packets of a lost connection come after the master's AbortTransaction.

    What they leave here would never end, and keep its locks.
    """
    c, d = h.client(), h.client(2)
    h.m.abort(T1)
    c.store(T1, A, b"1")
    c.vote(T1, A)
    c.store(T2, B, b"2")
    c.vote(T2, B)
    d.store(T3, A, b"3")
    nothing(d, h.m)
    c.lose()
    _, msg_id, args = h.m.expect(AskUnfinishedTransactions)
    assert args == ((),)
    nothing(d)
    h.m.send(AnswerUnfinishedTransactions, ZERO_TID, (T2, T3), msg_id=msg_id)
    accepted(d)
    assert set(h.backend.locked_transactions()) == {T2}
    h.m.lock(T2, T2)
    h.m.unlock(T2)
    assert d.load(B)[1] == T2


@pytest.mark.parametrize("end", ["finished", "stopped"])
def test_vote_of_a_lost_client_is_over_before_the_answer(h: Harness, end: str) -> None:
    c = h.client()
    c.store(T1, A, b"1")
    c.vote(T1, A)
    c.lose()
    _, msg_id, _ = h.m.expect(AskUnfinishedTransactions)
    if end == "finished":
        h.m.lock(T1, T1)
        h.m.unlock(T1)
        h.m.packets()
    else:
        h.m.send(StopOperation)
    h.m.send(AnswerUnfinishedTransactions, T1, (), msg_id=msg_id)
    assert not h.m.is_closed
    if end == "finished":
        assert h.client(2).load(A)[1] == T1


def test_pack_at_a_tid_that_no_database_holds(h: Harness) -> None:
    c = h.client()
    args = (T1, b"u", b"d", b"", (), (None, b"\x80" + bytes(7)))
    c.send(AskStoreTransaction, *args)
    refused(c)


@pytest.mark.parametrize("field", range(3))
def test_metadata_that_the_database_can_not_hold(
    h: Harness, monkeypatch: pytest.MonkeyPatch, field: int
) -> None:
    monkeypatch.setattr(h.node.backend, "metadata_max", 10)
    c = h.client()
    c.store(T1, A, b"1")
    c.packets()
    metadata = [b"x" * 10] * 3
    metadata[field] += b"y"
    c.send(AskStoreTransaction, T1, *metadata, (A,), None)
    assert c.receive(Error)[0] == ErrorCode.DENIED
    assert not c.is_closed
    c.send(AskStoreTransaction, T1, *[b"x" * 10] * 3, (A,), None)
    c.expect(AnswerStoreTransaction)


def test_too_many_waiting_reads(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "READS_MAX", 2)
    c, d = h.client(), h.client(2)
    c.store(T1, A, b"1")
    c.vote(T1, A)
    h.m.lock(T1, T1)
    for _ in range(3):
        d.send(AskObject, A, None, None)
    assert d.receive(Error)[0] == ErrorCode.NOT_READY
    assert d.is_closed
    h.m.unlock(T1)
    assert not h.m.is_closed


def test_too_many_waiting_stores(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "LIMIT", 3000)
    c, d = h.client(), h.client(2)
    c.store(T1, A, b"1")
    for _ in range(5):
        d.store(T2, A, b"2")
    assert d.receive(Error)[0] == ErrorCode.NOT_READY
    assert d.is_closed


def test_long_lists_come_in_slices(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    from neo.storage import client

    monkeypatch.setattr(client, "SLICE", 2)
    c = h.client()
    for n in range(10, 30, 2):
        c.commit(number(n), number(n), {number(n): b"x"})
    tids = tuple(number(n) for n in range(10, 30, 2))
    assert c.ask(AskTIDsFrom, ZERO_TID, MAX_TID, 100, 0) == (tids,)
    assert c.ask(AskTIDsFrom, ZERO_TID, MAX_TID, 5, 0) == (tids[:5],)
    assert c.ask(AskTIDsFrom, number(12), number(16), 5, 0) == (tids[1:4],)
    assert c.ask(AskOIDsFrom, 0, 100, ZERO_TID, MAX_TID) == (None, tids)
    following, oids = c.ask(AskOIDsFrom, 0, 5, ZERO_TID, MAX_TID)
    assert (following, oids) == (number(20), tids[:5])


def test_reads_of_what_is_not_here(h: Harness) -> None:
    c = h.client()
    assert c.load(b"\xff" * 8)[0] == ErrorCode.OID_DOES_NOT_EXIST
    assert c.ask(AskTransactionInformation, T1)[0] == ErrorCode.TID_NOT_FOUND
    assert c.ask(AskObjectHistory, A, 0, 1)[0] == ErrorCode.OID_NOT_FOUND
    for partition in (2, 100):
        found = c.ask(AskTIDs, 0, 1, partition)
        assert found[0] == ErrorCode.NON_READABLE_CELL
    assert c.ask(AskFinalTID, T1) == (None,)
    assert c.ask(AskObjectUndoSerial, T2, T2, T1, ()) == ({},)


def test_crash_after_lock_is_found_again(h: Harness) -> None:
    c = h.client()
    c.store(T1, A, b"1")
    c.vote(T1, A)
    h.m.lock(T1, T2)
    again = Harness(MemoryBackend(image=h.backend.image()))
    assert again.backend.locked_transactions() == {T1: T2}


def test_answer_object_bytes(h: Harness) -> None:
    """No data: nil, zeros, empty (storage-format 9.1)."""
    c = h.client()
    c.commit(T1, T1, {A: None})
    h.advance(1)
    c.load(B)
    c.send(AskObject, A, None, None)
    assert c.receive(AnswerObject) == (A, T1, None, None, ZERO_HASH, b"", None)


def test_metadata_asked_in_one_turn_is_one_query(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h = loading_together()
    c, d = h.client(), h.client(2)
    c.commit(T1, T1, {A: b"1"})
    c.commit(T2, T2, {B: b"3"})
    c.store(T3, C, b"4")
    c.vote(T3, C)
    h.m.lock(T3, T4)
    c.packets()
    h.turn()
    asked: list[int] = []
    transactions = h.backend.transactions

    def counting(tids: Any) -> Any:
        asked.append(len(tids))
        return transactions(tids)

    monkeypatch.setattr(h.backend, "transactions", counting)
    wanted = [(c, T1), (d, T2), (d, T4), (c, T5)]  # T4 is not applied, T5 never was
    with monkeypatch.context() as patch:
        patch.setattr(h, "turn", lambda: None)
        ids = [peer.send(AskTransactionInformation, tid) for peer, tid in wanted]
    h.turn()
    assert asked == [4]
    h.m.unlock(T3)
    h.advance(1)
    answers = {
        (peer, msg_id): args for peer in (c, d) for _, msg_id, args in peer.packets()
    }
    found = [
        answers[peer, msg_id] for (peer, _), msg_id in zip(wanted, ids, strict=True)
    ]
    assert [(args[0], args[5]) for args in found[:3]] == [
        (T1, (A,)),
        (T2, (B,)),
        (T4, (C,)),
    ]
    assert found[3][0] == ErrorCode.TID_NOT_FOUND
