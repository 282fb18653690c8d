"""The life of a storage node: start, initialisation, operation, stop."""

from __future__ import annotations

from typing import Any

import pytest

from neo.lib.exception import BackendError, ConfigurationError
from neo.lib.protocol import (
    MAX_TID,
    SPARE,
    ZERO_TID,
    AcceptIdentification,
    AnswerLastIDs,
    AnswerPartitionTable,
    AnswerRecovery,
    AnswerUnfinishedTransactions,
    AskFinalTID,
    AskLastIDs,
    AskLockedTransactions,
    AskLockInformation,
    AskPackOrders,
    AskPartitionTable,
    AskRecovery,
    AskSize,
    AskUnfinishedTransactions,
    CellState,
    Error,
    ErrorCode,
    FlushLog,
    NodeState,
    NodeType,
    NotifyFeatures,
    NotifyNodeInformation,
    NotifyPackCompleted,
    NotifyPackSigned,
    NotifyReady,
    NotifyRepair,
    NotifyTransactionFinished,
    Packet,
    Ping,
    Pong,
    RequestIdentification,
    SendPartitionTable,
    StartOperation,
    StopOperation,
    Truncate,
    ValidateTransaction,
)
from neo.storage.database.memory import MemoryBackend
from neo.storage.identification import PARKED_MAX

from .storage_harness import M1, NAME, OUT, UP, Harness, number

C1 = -0x20000000 + 1
T1, T2 = number(10), number(12)
LARGE = b"\x80" + bytes(7)
A, B = number(2), number(4)


def restart(h: Harness, **options: Any) -> Harness:
    """A new process on what is on disk."""
    return Harness(MemoryBackend(image=h.backend.image()), **options)


def test_creation() -> None:
    h = Harness()
    peer = h.answer_call()
    _, msg_id, args = peer.expect(RequestIdentification)
    assert args == (
        NodeType.STORAGE,
        None,
        (b"127.0.0.1", 12345),
        NAME.encode(),
        None,
        {
            b"devpath": (b"host", b"0"),
            b"new_nid": (),
            b"features": (b"lease", b"check"),
            b"age": args[5][b"age"],
        },
    )
    assert 0 <= args[5][b"age"] < 60
    assert h.backend.settings().name is None
    h.hold_jobs = True
    peer.send(AcceptIdentification, NodeType.MASTER, M1, 1, msg_id=msg_id)
    h.m = peer
    recovery = peer.send(AskRecovery)
    assert not peer.packets()  # nothing is answered before the name is on disk
    h.hold_jobs = False
    h.turn()
    assert peer.packets() == [(AnswerRecovery, recovery, (None, None, None))]
    assert h.backend.settings()[:2] == (NAME, None)  # the nid may be another one's
    peer.send(SendPartitionTable, 1, 0, (((1, UP),),))
    h.turn()
    assert h.backend.settings()[:2] == (NAME, 1)
    h.tell_nodes((NodeType.STORAGE, (b"127.0.0.1", 12345), 1, NodeState.PENDING, 1.5))
    rows = (((1, UP),), ((1, UP),))
    peer.send(SendPartitionTable, 1, 0, rows)
    assert peer.ask(AskLockedTransactions) == ({},)
    peer.send(AskLastIDs)
    assert peer.receive(NotifyPackCompleted) == (ZERO_TID,)
    assert peer.receive(AnswerLastIDs) == (None, None, MAX_TID)
    assert peer.ask(AskPackOrders, number(1)) == ((),)
    peer.send(StartOperation, False)
    peer.expect(NotifyReady)
    assert not peer.packets()
    again = restart(h)
    assert again.answer_call().receive(RequestIdentification)[1] == 1


def test_partition_table_survives() -> None:
    h = Harness()
    h.operate((((1, UP),), ((1, UP), (2, OUT))))
    h.change_table(2, (0, 2, OUT))
    h = restart(h)
    m = h.master()
    assert m.ask(AskRecovery) == (2, None, None)
    m.send(AskPartitionTable)
    ptid, replicas, rows = m.receive(AnswerPartitionTable)
    assert (ptid, replicas) == (2, 0)
    assert rows == (((1, UP), (2, OUT)), ((1, UP), (2, OUT)))


@pytest.mark.parametrize(
    "rows", [(), ((), ((1, UP),))], ids=["no partition", "no cell"]
)
def test_incomplete_table_is_refused(rows: Any) -> None:
    m = Harness().master()
    m.send(SendPartitionTable, 1, 0, rows)
    assert m.receive(Error)[0] == ErrorCode.PROTOCOL_ERROR
    assert m.is_closed


def test_partition_table_id_must_follow() -> None:
    h = Harness()
    m = h.operate()
    h.change_table(3, (0, 2, OUT))
    assert m.receive(Error)[0] == ErrorCode.PROTOCOL_ERROR
    assert m.is_closed
    assert h.connections  # and it searches the master again


def test_start_without_table_is_refused() -> None:
    m = Harness().master()
    m.send(StartOperation, False)
    assert m.is_closed


def test_wrong_cluster_is_refused_at_start() -> None:
    h = Harness()
    h.operate()
    with pytest.raises(ConfigurationError, match=r"'testing'.*'other'"):
        restart(h, cluster="other")


def test_refusals() -> None:
    """A name that masters refuse isn't written; the node gives up if told so."""
    h = Harness(max_refusals=2)
    for _ in range(2):
        assert h.status is None
        peer = h.answer_call()
        _, msg_id, _ = peer.expect(RequestIdentification)
        peer.send(Error, 6, b"invalid cluster name", msg_id=msg_id)
    assert h.status == 1
    assert "invalid cluster name" in h.log.lines[-1]
    h = Harness(max_refusals=1)
    peer = h.answer_call()
    _, msg_id, _ = peer.expect(RequestIdentification)
    peer.send(Error, 2, b"later", msg_id=msg_id)
    assert h.status is None  # not ready is no refusal


@pytest.mark.parametrize("case", ["empty", "member", "told"])
def test_nid_that_is_refused(case: str) -> None:
    """That of an empty database is a wish only."""
    h = Harness()
    if case == "member":
        h.operate()
    else:
        h.master()
    h = restart(h, **({"nid": 1} if case == "told" else {}))
    nids = []
    for _ in range(3):
        peer = h.answer_call()
        _, msg_id, args = peer.expect(RequestIdentification)
        nids.append(args[1])
        peer.send(Error, ErrorCode.PROTOCOL_ERROR, b"duplicated", msg_id=msg_id)
    assert nids == [None if case == "empty" else 1] * 3
    peer = h.answer_call()
    _, msg_id, _ = peer.expect(RequestIdentification)
    peer.send(AcceptIdentification, NodeType.MASTER, M1, 7, msg_id=msg_id)
    assert h.node.nid == 7
    assert h.backend.settings().nid == (None if case == "empty" else 7)


def test_spare_that_got_the_nid_of_a_storage_with_data() -> None:
    """From a master that knew no other one: it goes on saying that it has nothing."""
    h = Harness()
    h.operate((((2, UP),),))
    h = restart(h)
    for nid in (2, 2):
        peer = h.answer_call()
        _, msg_id, args = peer.expect(RequestIdentification)
        assert args[5][SPARE] is True
        peer.send(AcceptIdentification, NodeType.MASTER, M1, nid, msg_id=msg_id)
        h.turn()
        assert h.node.nid == nid
        # The table is what it was: who has the data is still in it.
        assert list(h.backend.own_cells()) == []
        h.m = peer
        peer.send(AskPartitionTable)
        assert peer.receive(AnswerPartitionTable) == (1, 0, (((2, UP),),))
        h = restart(h)


@pytest.mark.parametrize("operates", [False, True])
def test_down_ends_the_process(operates: bool) -> None:
    h = Harness()
    if operates:
        h.operate()
        h.client().commit(T1, T1, {A: b"a"})
    else:
        h.master()
    h.tell_nodes((NodeType.STORAGE, (b"127.0.0.1", 12345), 1, NodeState.DOWN, None))
    assert h.status == 0


def test_unknown_erases() -> None:
    backend = MemoryBackend()
    h = Harness(backend)
    h.operate()
    h.client().commit(T1, T1, {A: b"a"})
    images: list[bytes] = []
    close = backend.close

    def closing() -> None:
        images.append(backend.image())
        close()

    backend.close = closing  # type: ignore[method-assign]
    h.tell_nodes((NodeType.STORAGE, (b"127.0.0.1", 12345), 1, NodeState.UNKNOWN, None))
    assert h.status == 0
    emptied = MemoryBackend(image=images[0])
    assert emptied.settings().ptid is None
    assert emptied.load(A) is None


def test_shutdown_commits_what_is_unlocked() -> None:
    backend = MemoryBackend()
    h = Harness(backend)
    h.operate()
    h.client().commit(T1, T1, {A: b"a"})
    assert backend.load(A) is None
    images: list[bytes] = []
    backend.close = lambda: images.append(backend.image())  # type: ignore[method-assign]
    h.node.shutdown()
    h.turn()
    assert h.status == 0
    found = MemoryBackend(image=images[0]).load(A)
    assert found is not None
    assert found[0] == T1


def test_reset() -> None:
    h = Harness()
    h.operate()
    backend = MemoryBackend(image=h.backend.image())
    backend.close = lambda: None  # type: ignore[method-assign]
    again = Harness(backend, reset=True)
    assert again.status == 0
    assert backend.settings().ptid is None


def test_new_nid() -> None:
    h = Harness()
    h.operate((((1, UP),), ((2, UP),), ((1, UP),)))
    clone = MemoryBackend(image=h.backend.image())
    clone.close = lambda: None  # type: ignore[method-assign]
    again = Harness(clone, new_nid=True)
    peer = again.answer_call()
    _, msg_id, args = peer.expect(RequestIdentification)
    assert args[1:3] == (None, None)
    assert args[5][b"new_nid"] == (0, 2)
    peer.send(AcceptIdentification, NodeType.MASTER, M1, 3, msg_id=msg_id)
    again.turn()
    assert again.status == 0
    assert clone.settings().nid == 3
    assert list(clone.own_cells()) == [0, 2]


def test_loss_of_the_master() -> None:
    """All is dropped but what is voted, which waits for the verification."""
    h = Harness()
    m = h.operate()
    c = h.client()
    c.store(T1, A, b"a")
    c.vote(T1, A)
    c.store(T2, B, b"b")
    h.hold_jobs = True
    c.store(number(14), number(6), b"b")
    c.vote(number(14), number(6))
    m.lose()
    assert c.is_closed
    assert not h.connections  # the writer drains first
    h.hold_jobs = False
    h.turn()
    m = h.master()
    assert m.ask(AskLockedTransactions) == ({T1: None, number(14): None},)
    assert m.ask(AskFinalTID, T1) == (None,)
    m.send(ValidateTransaction, T1, T1)
    assert m.ask(AskFinalTID, T1) == (T1,)
    m.send(AskLastIDs)
    m.expect(NotifyPackCompleted)
    assert m.receive(AnswerLastIDs) == (T1, A, T1)
    m.send(StartOperation, False)
    m.expect(NotifyReady)
    assert h.backend.locked_transactions() == {}


def test_stop_operation_is_over_before_the_next_packet() -> None:
    h = Harness()
    m = h.operate()
    c = h.client()
    c.commit(T1, T1, {A: b"a"})
    c.commit(T2, T2, {A: b"b"}, {A: T1})
    h.hold_jobs = True
    m.send(StopOperation)
    m.send(Truncate, T1)
    recovery = m.send(AskRecovery)
    assert c.is_closed
    assert not m.packets()
    h.hold_jobs = False
    h.turn()
    assert m.packets() == [(AnswerRecovery, recovery, (1, None, T1))]
    m.send(AskLastIDs)
    m.expect(NotifyPackCompleted)
    assert m.receive(AnswerLastIDs) == (T1, A, T1)
    assert m.ask(AskRecovery) == (1, None, None)
    found = h.backend.load(A)
    assert found is not None
    assert found[0] == T1


def test_database_error_ends_the_node() -> None:
    h = Harness()
    h.operate()
    c = h.client()
    c.store(T1, A, b"a")
    c.vote(T1, A)

    def fail() -> None:
        raise BackendError("disk full")

    h.backend.commit = fail  # type: ignore[method-assign]
    h.m.packets()
    with pytest.raises(BackendError, match="disk full"):
        h.m.lock(T1, T2)
    assert not h.m.packets()


def test_flush_log_and_pack_signed_and_repair() -> None:
    h = Harness()
    m = h.operate()
    m.send(FlushLog)
    assert "flush" in h.log.lines
    m.send(NotifyPackSigned, (T1,), ())
    assert h.node.last_pack == T1
    m.send(NotifyRepair, True)
    assert "0 unreferenced values found" in h.log.lines[-1]
    assert not m.is_closed


@pytest.mark.parametrize(
    ("packet", "args"),
    [
        (NotifyPackSigned, ((LARGE,), ())),
        (NotifyPackSigned, ((), (T1, LARGE))),
        (NotifyTransactionFinished, (T1, LARGE)),
        (AskLockInformation, (LARGE, LARGE, False)),
    ],
)
def test_ids_that_no_database_holds(packet: Packet[...], args: Any) -> None:
    """The peer is refused, the node goes on."""
    h = Harness()
    m = h.operate(((((1, OUT), (2, UP))), ((1, UP),)))
    m.expect(AskUnfinishedTransactions)
    m.send(packet, *args)
    assert m.receive(Error)[0] == ErrorCode.PROTOCOL_ERROR
    assert m.is_closed


def test_tid_that_no_database_holds() -> None:
    h = Harness()
    m = h.operate(((((1, OUT), (2, UP))), ((1, UP),)))
    _, msg_id, _ = m.expect(AskUnfinishedTransactions)
    m.send(AnswerUnfinishedTransactions, LARGE, (), msg_id=msg_id)
    assert m.receive(Error)[0] == ErrorCode.PROTOCOL_ERROR


def test_silent_master_is_given_up() -> None:
    h = Harness()
    m = h.operate()
    h.advance(4)
    m.expect(Ping)
    h.advance(7)
    assert m.is_closed
    assert h.connections


# --- peers --------------------------------------------------------------------


def identify(h: Harness, nid: int | None, stamp: float | None, **changes: Any) -> Any:
    peer = h.dial()
    arguments = {
        "kind": NodeType.CLIENT,
        "nid": nid,
        "address": None,
        "name": NAME.encode(),
        "stamp": stamp,
        "extra": {},
    }
    peer.send(RequestIdentification, *{**arguments, **changes}.values())
    return peer


def test_not_operational() -> None:
    """Without a master, nobody knows when it will be."""
    h = Harness()
    for peer in (identify(h, C1, 2.5), identify(h, None, None, kind=NodeType.STORAGE)):
        assert peer.receive(Error)[0] == ErrorCode.NOT_READY
        assert peer.is_closed


def initialised() -> Harness:
    """A node to which StartOperation only must be said."""
    h = Harness()
    h.master().send(SendPartitionTable, 1, 0, (((1, UP),), ((1, UP),)))
    return h


def test_operational_soon() -> None:
    """Who comes before StartOperation waits for it: a healthy node refuses nobody."""
    h = initialised()
    early = identify(h, C1, h.timestamp + 1)  # before it is announced, even
    h.tell_nodes((NodeType.CLIENT, None, C1, NodeState.RUNNING, h.timestamp + 1))
    unknown = identify(h, C1 + 1, 2.5)
    anonymous = identify(h, None, None, kind=NodeType.STORAGE)
    assert anonymous.receive(Error)[0] == ErrorCode.NOT_READY
    early.send(Ping)
    early.expect(Pong)
    assert not unknown.packets()
    h.m.send(StartOperation, False)
    assert early.receive(AcceptIdentification) == (NodeType.STORAGE, 1, C1)
    assert unknown.receive(Error)[0] == ErrorCode.NOT_READY
    early.ask(AskSize)


def test_not_operational_for_long() -> None:
    h = initialised()
    peers = [identify(h, C1 + i, 2.5) for i in range(PARKED_MAX + 1)]
    assert peers.pop().receive(Error)[0] == ErrorCode.NOT_READY
    h.advance(9)
    assert not any(peer.is_closed for peer in peers)
    h.advance(2)
    for peer in peers:
        assert peer.receive(Error)[0] == ErrorCode.NOT_READY
        assert peer.is_closed


def test_master_lost_before_operation() -> None:
    h = initialised()
    peer = identify(h, C1, 2.5)
    h.m.lose()
    assert peer.is_closed
    h.advance(20)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"name": b"other"}, ErrorCode.PROTOCOL_ERROR),
        ({"nid": None}, ErrorCode.PROTOCOL_ERROR),
        ({"nid": 1}, ErrorCode.PROTOCOL_ERROR),
        ({"kind": NodeType.ADMIN}, ErrorCode.PROTOCOL_ERROR),
        ({"stamp": 3.5}, ErrorCode.NOT_READY),
        ({"stamp": None}, ErrorCode.NOT_READY),
        ({"nid": C1 + 1}, ErrorCode.NOT_READY),
    ],
)
def test_refused_peers(changes: dict[str, Any], code: ErrorCode) -> None:
    h = Harness()
    h.operate()
    h.client()
    peer = identify(h, **{"nid": C1, "stamp": 2.5, **changes})
    assert peer.receive(Error)[0] == code
    assert peer.is_closed


def test_parked_connection_waits() -> None:
    h = Harness()
    h.operate()
    peer = identify(h, C1, h.timestamp + 0.5)
    h.advance(2)
    peer.send(Ping)
    peer.expect(Pong)
    peer.lose()


def test_announced_later() -> None:
    h = Harness()
    h.operate()
    late = h.timestamp + 0.5
    peer = identify(h, C1, late)
    other = identify(h, C1 + 1, late)
    assert not peer.packets()
    h.tell_nodes((NodeType.CLIENT, None, C1, NodeState.RUNNING, late))
    assert peer.receive(AcceptIdentification) == (NodeType.STORAGE, 1, C1)
    assert other.receive(Error)[0] == ErrorCode.NOT_READY


def test_parked_peer_may_only_wait() -> None:
    h = Harness()
    h.operate()
    peer = identify(h, C1, h.timestamp + 0.5)
    peer.send(AskSize)
    assert peer.receive(Error)[0] == ErrorCode.PROTOCOL_ERROR


def test_silent_stranger_is_closed() -> None:
    h = Harness()
    h.operate()
    peer = h.dial()
    h.advance(3)
    assert not peer.is_closed
    h.advance(8)
    assert peer.is_closed


def test_stale_connection_is_replaced() -> None:
    h = Harness()
    h.operate()
    old = h.client()
    new = identify(h, C1, 2.5)
    assert new.receive(AcceptIdentification) == (NodeType.STORAGE, 1, C1)
    assert old.is_closed
    assert not new.is_closed
    new.commit(T1, T1, {A: b"a"})


def test_features() -> None:
    h = Harness()
    h.operate()
    h.client()
    peer = identify(h, C1, 2.5, extra={b"features": (b"size",)})
    peer.expect(AcceptIdentification)
    features = b"size", b"early-vote", b"objects", b"check"
    assert peer.receive(NotifyFeatures) == (features,)
    assert peer.ask(AskSize)[0] > 0


def test_anonymous_storage() -> None:
    h = Harness()
    h.operate()
    peer = identify(h, None, None, kind=NodeType.STORAGE)
    assert peer.receive(AcceptIdentification) == (NodeType.STORAGE, None, None)


def test_client_gone() -> None:
    h = Harness()
    h.operate()
    c = h.client()
    c.store(T1, A, b"a")
    c.vote(T1, A)
    h.tell_nodes((NodeType.CLIENT, None, C1, NodeState.UNKNOWN, None))
    assert c.is_closed
    assert h.backend.locked_transactions() == {}


def test_unasked_unfinished_transactions_of_readable_cells() -> None:
    h = Harness()
    m = h.operate((((1, UP),), ((1, OUT), (2, UP))))
    assert m.receive(AskUnfinishedTransactions) == ((1,),)
    m.send(NotifyNodeInformation, h.timestamp, ())
    assert m.is_closed  # its time stands still


def test_discarded_cell_is_deleted() -> None:
    h = Harness()
    h.operate((((1, UP),), ((1, UP),)))
    c = h.client()
    c.commit(T1, T1, {A: b"a", number(3): b"c"})
    assert c.load(A)[1] == T1
    h.change_table(2, (0, 2, UP), (0, 1, CellState.DISCARDED))
    assert c.load(A)[0] == ErrorCode.NON_READABLE_CELL
    h.advance(1)
    assert h.backend.load(A) is None
    assert c.load(number(3))[1] == T1


def test_dump() -> None:
    h = Harness()
    h.node.dump()
    h.operate()
    c = h.client()
    c.store(T1, A, b"a")
    c.store(T2, A, b"b")
    h.node.dump()
