"""Transactions at the master: both phases, arbitration, ids, questions."""

from __future__ import annotations

from typing import Any

import pytest

from neo.lib.protocol import (
    MAX_TID,
    ZERO_TID,
    AbortTransaction,
    AddPendingNodes,
    AskBeginTransaction,
    AskFinalTID,
    AskFinishTransaction,
    AskLastIDs,
    AskLastTransaction,
    AskNewOIDs,
    AskPackOrders,
    AskUnfinishedTransactions,
    CellState,
    ClusterState,
    ErrorCode,
    FailedVote,
    NodeType,
    NotifyPackCompleted,
    NotifyReplicationDone,
    TweakPartitionTable,
    WaitForPack,
)
from neo.lib.util import add64, p64, tid_from_time, u64
from neo.master import transactions
from tests.unit.master_peers import (
    OUT,
    Disk,
    FakeClient,
    Outcome,
    Peer,
    U,
    World,
)

ACK, INCOMPLETE = ErrorCode.ACK, ErrorCode.INCOMPLETE_TRANSACTION


def cluster(storages: int = 2, **options: Any) -> World:
    """RUNNING, with two partitions and one replica by default."""
    options = {"replicas": 1, "autostart": storages, **options}
    world = World(**options)
    world.storages(*(f"S{i + 1}" for i in range(storages)))
    world.running()
    return world


def begin(world: World, client: Peer, tid: bytes | None = None) -> bytes:
    (ttid,) = world.call(client, AskBeginTransaction, tid)
    assert type(ttid) is bytes
    return ttid


def finish(world: World, client: Peer, ttid: bytes, *oids: int) -> Outcome:
    args = ttid, [p64(oid) for oid in oids], [], [], None
    return world.ask(client, AskFinishTransaction, *args)


def commit(world: World, client: Peer, *oids: int) -> bytes:
    outcome = finish(world, client, begin(world, client), *oids)
    world.until(lambda: outcome.over)
    assert outcome.answer is not None, outcome.error
    tid = outcome.answer[1]
    assert type(tid) is bytes
    return tid


def closed(world: World, peer: Peer) -> str:
    """Wait until the peer is disconnected; the text of the error it got."""
    world.until(lambda: peer.conn is None)
    code, text = peer.errors[-1]
    assert code == ErrorCode.PROTOCOL_ERROR
    return text


def test_commit() -> None:
    world = cluster()
    author, other = world.client("C1"), world.client("C2", extra={b"read_only": True})
    backup = world.client("C3", extra={b"backup": b"copy"})
    ttid = begin(world, author)
    outcome = finish(world, author, ttid, 1, 2)
    world.until(lambda: outcome.over)
    assert outcome.answer is not None
    tid = outcome.answer[1]
    assert u64(tid) % 2 == u64(ttid) % 2
    world.settle()
    assert other.of("InvalidateObjects") == [(tid, (p64(1), p64(2)))]
    assert backup.of("InvalidatePartitions") == [(tid, (1, 0))]
    assert author.names.count("InvalidateObjects") == 0
    for name in ("S1", "S2"):
        assert world.disks[name].committed == {ttid: tid}
        assert world.storage(name).of("AskLockInformation") == [(ttid, tid, False)]
    assert world.call(author, AskLastTransaction) == (tid,)
    assert world.call(author, AskLastIDs) == (tid, p64(2), tid)
    assert world.call(author, AskNewOIDs, 1) == ((p64(3),),)


def test_many_clients_are_told_of_several_commits_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But before anything else that is sent to them."""
    monkeypatch.setattr(transactions, "MANY", 2)
    monkeypatch.setattr(transactions, "TOGETHER", 0.1)
    world = cluster(1, replicas=0)
    author, *others = (world.client(f"C{i}") for i in range(4))
    first = others[0]
    node = world.master.nodes.by_nid(first.nid)
    assert node is not None
    sent: list[int] = []
    flush = node.connection.transport.flush_soon

    def flushing() -> None:
        sent.append(len(node.connection.out))
        flush()

    monkeypatch.setattr(node.connection.transport, "flush_soon", flushing)
    tids = []
    start = world.sim.time
    while world.sim.time < start + 0.2:
        tids.append(commit(world, author, 1))
    world.settle()
    for other in others:
        assert [tid for tid, _ in other.of("InvalidateObjects")] == tids
    assert sum(sent) == len(tids)
    assert len(sent) <= 4 < len(tids)
    # Who synchronises knows all.
    monkeypatch.setattr(transactions, "TOGETHER", 1000)
    tids.append(commit(world, author, 1))
    world.settle()
    assert len(first.of("InvalidateObjects")) == len(tids) - 1
    world.call(first, AskLastTransaction)
    assert [tid for tid, _ in first.of("InvalidateObjects")] == tids


@pytest.mark.parametrize("is_slow", [False, True])
def test_begun_along_with_a_finish(
    monkeypatch: pytest.MonkeyPatch, is_slow: bool
) -> None:
    """The answer comes with the end, unless that takes long."""
    monkeypatch.setattr(transactions, "TOGETHER", 0.5)
    world = cluster(1, replicas=0)
    client = world.client("C1")
    ttid = begin(world, client)
    storage = world.storage("S1")
    storage.hold.add("AskLockInformation")
    outcome = finish(world, client, ttid, 1)
    ahead = world.ask(client, AskBeginTransaction, None)
    world.settle(0.4)
    assert not outcome.over
    assert not ahead.over
    if is_slow:
        world.settle(0.4)
        assert ahead.over
    storage.release("AskLockInformation")
    world.until(lambda: outcome.over)
    assert ahead.over
    # One that comes later is not held back.
    storage.hold.add("AskLockInformation")
    finish(world, client, begin(world, client), 1)
    world.settle(0.1)
    begin(world, client)


def test_only_concerned_storages_take_part() -> None:
    """Scenario 73: a storage whose object was only checked does."""
    world = cluster(replicas=0)
    client = world.client("C1")
    ttid = begin(world, client)
    mine = u64(ttid) % 2
    world.call(client, AskFinishTransaction, ttid, [p64(mine)], [], [], None)
    asked = [bool(world.storage(n).of("AskLockInformation")) for n in ("S1", "S2")]
    assert asked == [mine == 0, mine == 1]
    ttid = begin(world, client)
    mine = u64(ttid) % 2
    args = ttid, [p64(mine)], [], [1 - mine], None
    world.call(client, AskFinishTransaction, *args)
    asked_twice = [world.storage(n).of("AskLockInformation") for n in ("S1", "S2")]
    assert all(ttid in [args[0] for args in asked] for asked in asked_twice)


def test_unlock_in_order_of_tids() -> None:
    """Scenario 82: locked in another order than that of their tids."""
    world = cluster(replicas=0)
    first, second, third = (world.client(f"C{i}") for i in (1, 2, 3))
    one, two = world.storage("S1"), world.storage("S2")
    ttids: list[bytes] = []
    clients = []
    while len(ttids) < 2:  # one transaction for each storage, S1 first
        ttid = begin(world, first)
        if u64(ttid) % 2 == len(ttids):
            ttids.append(ttid)
            clients.append(first)
        else:
            world.tell(first, AbortTransaction, ttid, [])
    one.hold.add("AskLockInformation")
    slow = finish(world, first, ttids[0], 0)
    world.until(lambda: one.held)
    fast = finish(world, first, ttids[1], 1)
    world.settle()
    assert world.disks["S2"].temporary
    assert not slow.over
    assert not fast.over
    assert not two.of("NotifyUnlockInformation")
    one.release("AskLockInformation")
    world.until(lambda: slow.over and fast.over)
    world.settle()
    for client in (second, third):
        tids = [args[0] for args in client.of("InvalidateObjects")]
        assert tids == [slow.answer[1], fast.answer[1]]  # type: ignore[index]
        assert tids == sorted(tids)


def test_begin_waits_for_a_storage_that_starts() -> None:
    """Scenario 46."""
    world = cluster(1)
    client = world.client("C1")
    world.sim.crash("S1")
    world.until(lambda: world.state is ClusterState.RECOVERING)
    world.start_storage("S1", hold=["StartOperation"])
    world.until(lambda: world.state is ClusterState.RUNNING)
    client = world.client("C2")
    late = world.ask(client, AskBeginTransaction, None)
    world.settle(40)  # it is indispensable: nothing can be done
    assert not late.over
    world.storage("S1").release("StartOperation")
    world.until(lambda: late.over)
    assert late.answer is not None


@pytest.mark.parametrize("held", ["StartOperation", "AskLockInformation"])
def test_a_storage_that_does_nothing_is_disconnected(held: str) -> None:
    """It holds up commits no longer than the limit, for there is a replica."""
    world = cluster()
    client = world.client("C1")
    if held == "StartOperation":
        world.sim.crash("S2")
        world.settle()
        world.start_storage("S2", hold=[held])
        world.until(lambda: world.storage("S2").held)
        outcome = world.ask(client, AskBeginTransaction, None)
    else:
        world.storage("S2").hold.add(held)
        outcome = finish(world, client, begin(world, client), 1)
    world.settle(10)
    assert not outcome.over
    world.until(lambda: outcome.over, within=10)
    assert outcome.answer is not None
    assert world.table == "UO UO"


def test_the_last_lock_comes_by_the_loss_of_a_storage() -> None:
    """Scenario 83."""
    world = cluster()
    client = world.client("C1")
    world.storage("S2").hold.add("AskLockInformation")
    outcome = finish(world, client, begin(world, client), 1)
    world.until(lambda: world.storage("S2").held)
    world.sim.crash("S2")
    world.until(lambda: outcome.over)
    assert outcome.answer is not None
    world.settle()
    assert len(world.disks["S1"].committed) == 1


def test_failed_vote_disconnects_at_finish() -> None:
    """Scenario 48: the table first, then the locks."""
    world = cluster()
    client = world.client("C1")
    ttid = begin(world, client)
    vote = world.ask(client, FailedVote, ttid, [2])
    world.until(lambda: vote.over)
    assert vote.answer is not None  # ACK
    lost = world.storage("S2").lost
    outcome = finish(world, client, ttid, 1)
    world.until(lambda: outcome.over)
    assert outcome.answer is not None
    assert world.storage("S2").lost == lost + 1
    names = world.storage("S1").names
    assert names.index("NotifyPartitionChanges") < names.index("AskLockInformation")
    assert not world.storage("S2").of("AskLockInformation")


def test_failed_vote_of_the_only_copy() -> None:
    world = cluster(1, replicas=0)
    client = world.client("C1")
    ttid = begin(world, client)
    assert world.refused(client, FailedVote, ttid, [1])[0] == INCOMPLETE
    assert world.call(client, FailedVote, ttid, [7]) == ("",)
    assert world.state is ClusterState.RUNNING


def arbitration() -> tuple[World, FakeClient, bytes, FakeClient, bytes, Outcome]:
    """np=3, r=1, 3 storages; C1 can't reach S2 and voted, C2 can't reach S1."""
    world = cluster(3, partitions=3)
    assert world.table == "UU. U.U .UU"
    one, two = world.client("C1"), world.client("C2")
    first, second = begin(world, one), begin(world, two)
    assert world.call(one, FailedVote, first, [2]) == ("",)
    parked = world.ask(two, FailedVote, second, [1])
    world.settle()
    assert not parked.over
    return world, one, first, two, second, parked


def test_arbitration_first_commits() -> None:
    """Scenario 52."""
    world, one, first, _, _, parked = arbitration()
    outcome = finish(world, one, first, 0, 1, 2)
    world.until(lambda: outcome.over and parked.over)
    assert outcome.answer is not None
    assert parked.error == (INCOMPLETE, "")
    assert world.table == "UO. U.U .OU"


def test_arbitration_first_aborts() -> None:
    """Scenarios 52 and 54: no node is disconnected for what is aborted."""
    world, one, first, two, second, parked = arbitration()
    world.tell(one, AbortTransaction, first, [1, 2, 3])
    assert parked.answer == ("",)
    assert world.storage("S1").of("AbortTransaction") == [(first, ())]
    outcome = finish(world, two, second, 0, 1, 2)
    world.until(lambda: outcome.over)
    assert outcome.answer is not None
    assert world.table == "OU. O.U .UU"


def test_arbitration_finish_refused() -> None:
    """Scenario 53."""
    world, one, first, _, _, _ = arbitration()
    world.sim.crash("S3")
    world.until(lambda: "O" in world.table)
    outcome = finish(world, one, first, 0)
    world.until(lambda: outcome.over)
    assert outcome.error == (INCOMPLETE, "")
    assert world.state is ClusterState.RUNNING
    assert world.master.transactions.last_tid == ZERO_TID


def test_imposed_tids() -> None:
    """Scenario 71; row 36 of testing.md 9."""
    world = cluster(1, replicas=0)
    client = world.client("C1")
    last = commit(world, client, 1)

    def refused(tid: bytes | None) -> str:
        peer = world.client(f"X{len(world.sim.processes)}")
        world.ask(peer, AskBeginTransaction, tid)
        world.until(lambda: peer.conn is None)
        return peer.errors[-1][1] if peer.errors else "closed"

    future = tid_from_time(world.sim.processes["M0"].now() + 2 * 86400)
    far = p64(u64(last) + (1 << 60))
    for tid in (last, ZERO_TID, future, far, MAX_TID, b"\xff" * 8):
        refused(tid)
    tid = add64(last, 1)
    assert begin(world, client, tid) == tid
    refused(None)
    refused(add64(last, 2))
    world.tell(client, AbortTransaction, tid, [])
    assert begin(world, client, tid) == tid
    outcome = finish(world, client, tid, 1)
    world.until(lambda: outcome.over)
    assert outcome.answer == (tid, tid)
    assert commit(world, client, 1) > tid


def test_others_begin_while_an_import_is_finished() -> None:
    world = cluster(1, replicas=0)
    client, other = world.client("C1"), world.client("C2")
    tid = add64(commit(world, client, 1), 1000)
    begin(world, client, tid)
    world.storage("S1").hold.add("AskLockInformation")
    imported = finish(world, client, tid, 1)
    world.until(lambda: world.storage("S1").held)
    ttid = begin(world, other)
    assert ttid > tid
    world.storage("S1").release("AskLockInformation")
    outcome = finish(world, other, ttid, 1)
    world.until(lambda: outcome.over and imported.over)
    assert imported.answer == (tid, tid)


def test_imports_follow_each_other() -> None:
    """The client that imports needs not wait for the end of the former commit."""
    world = cluster(1, replicas=0)
    client, other = world.client("C1"), world.client("C2")
    first = add64(commit(world, client, 1), 1000)
    tids = [add64(first, 10 * number) for number in range(3)]
    world.storage("S1").hold.add("AskLockInformation")
    for tid in tids:
        assert begin(world, client, tid) == tid
        finish(world, client, tid, 1)
    world.ask(other, AskBeginTransaction, add64(first, 100))
    world.until(lambda: other.conn is None)
    world.ask(client, AskBeginTransaction, tids[1])
    world.until(lambda: client.conn is None)
    world.storage("S1").release("AskLockInformation")
    committed = world.storage("S1").disk.committed
    world.until(lambda: tids[-1] in committed)
    assert list(committed)[-3:] == tids


def test_imports_are_finished_in_order() -> None:
    """Several may be stored at once; who is aborted does not hold back the next."""
    world = cluster(1, replicas=0)
    client, other = world.client("C1"), world.client("C2")
    first = add64(commit(world, client, 1), 1000)
    tids = [add64(first, 10 * number) for number in range(4)]
    for tid in tids:
        assert begin(world, client, tid) == tid
    world.ask(other, AskBeginTransaction, None)
    world.until(lambda: other.conn is None)
    world.tell(client, AbortTransaction, tids[0], [])
    outcomes = [finish(world, client, tid, 1) for tid in tids[1:3]]
    world.until(lambda: all(outcome.over for outcome in outcomes))
    assert [outcome.answer for outcome in outcomes] == [(t, t) for t in tids[1:3]]
    later = add64(first, 100)
    begin(world, client, later)
    world.ask(client, AskFinishTransaction, later, [p64(1)], [], [], None)
    world.until(lambda: client.conn is None)
    committed = world.storage("S1").disk.committed
    world.until(lambda: tids[2] in committed)
    assert list(committed)[-2:] == tids[1:3]


def test_clock_set_back() -> None:
    """Scenario 72: the master survives, tids go on increasing."""
    world = cluster(1, replicas=0)
    client = world.client("C1")
    old = begin(world, client)
    tids = [commit(world, client, 1)]
    world.sim.processes["M0"].skew -= 3600
    outcome = finish(world, client, old, 1)
    world.until(lambda: outcome.over)
    assert outcome.answer is not None
    tids.append(outcome.answer[1])
    tids += [commit(world, client, 1) for _ in range(3)]
    assert tids == sorted(set(tids))
    assert u64(tids[-1]) - u64(tids[0]) < 20
    world.sim.processes["M0"].skew += 86400
    tids += [commit(world, client, 1) for _ in range(3)]
    assert tids == sorted(set(tids))


def test_ids_of_a_former_primary_are_not_given_again() -> None:
    """Its clock was late, so they were consecutive; they were not committed."""
    world = cluster(1, replicas=0)
    client = world.client("C1")
    commit(world, client, 1)
    world.sim.processes["M0"].skew -= 3600
    lost = [begin(world, client) for _ in range(5)]
    world.sim.crash("M0")
    world.settle()
    world.start_master(0)
    world.running()
    client = world.client("C2")
    given = [begin(world, client) for _ in range(20)]
    assert min(given) > max(lost)


def test_final_tid() -> None:
    """Scenarios 63 to 66."""
    world = cluster(1, replicas=0)
    client = world.client("C1")
    ttid = begin(world, client)
    never = p64(u64(ttid) + (1 << 40))
    assert world.call(client, AskFinalTID, never) == (None,)
    storage = world.storage("S1")
    storage.hold.add("AskLockInformation")
    lost = finish(world, client, ttid, 1)
    world.until(lambda: storage.held)
    world.sim.crash("C1")
    client = world.client("C2")
    asked = world.ask(client, AskFinalTID, ttid)
    # Requests in between: the delayed answer must keep its id.
    other = begin(world, client)
    world.call(client, AskNewOIDs, 1)
    assert not asked.over
    storage.release("AskLockInformation")
    world.until(lambda: asked.over)
    assert asked.answer == (world.disks["S1"].committed[ttid],)
    assert not lost.over
    assert world.call(client, AskFinalTID, ttid) == (MAX_TID,)
    # A transaction that is dropped meanwhile.
    asking = world.client("C3")
    asked = world.ask(asking, AskFinalTID, other)
    world.settle()
    world.tell(client, AbortTransaction, other, [])
    assert asked.answer == (None,)


def test_a_client_that_leaves() -> None:
    """First phase: dropped; second phase: completed (scenario 62)."""
    world = cluster(1, replicas=0)
    client, other = world.client("C1"), world.client("C2")
    storage = world.storage("S1")
    ttid, finishing = begin(world, client), begin(world, client)
    world.call(storage, AskUnfinishedTransactions, [])
    storage.hold.add("AskLockInformation")
    finish(world, client, finishing, 1)
    world.until(lambda: storage.held)
    world.sim.crash("C1")
    world.until(lambda: ttid not in world.master.transactions.in_progress)
    world.settle()
    assert storage.of("AbortTransaction") == [(ttid, ())]
    storage.release("AskLockInformation")
    world.settle()
    tid = world.disks["S1"].committed[finishing]
    assert other.of("InvalidateObjects") == [(tid, (p64(1),))]
    assert storage.of("NotifyTransactionFinished") == [(finishing, tid)]


def test_abort_of_an_unknown_transaction() -> None:
    """Scenario 69."""
    world = cluster(1, replicas=0)
    client, other = world.client("C1"), world.client("C2")
    world.tell(client, AbortTransaction, p64(5), [])
    ttid = begin(world, client)
    world.tell(other, AbortTransaction, ttid, [])
    commit(world, other, 1)
    outcome = finish(world, client, ttid, 1)
    world.until(lambda: outcome.over)
    assert outcome.answer is not None


@pytest.mark.parametrize(
    "args",
    [
        (p64(9), [], [], [], None),
        ("ttid", [b"\xff" * 8], [], [], None),
        ("ttid", [], [2], [], None),
        ("ttid", [], [], [99], None),
        ("ttid", [], [], [], (None, ZERO_TID)),
        ("ttid", [], [], [], (None, MAX_TID)),
    ],
)
def test_bad_finish(args: tuple[Any, ...]) -> None:
    """Scenario 68: an error for this client only."""
    world = cluster(1, replicas=0)
    client, other = world.client("C1"), world.client("C2")
    commit(world, client, 1)
    ttid = begin(world, client)
    world.ask(client, AskFinishTransaction, *[ttid if a == "ttid" else a for a in args])
    world.until(lambda: client.conn is None)
    commit(world, other, 1)


@pytest.mark.parametrize(("packet", "arg"), [(AskNewOIDs, 0), (AskNewOIDs, 2**32 - 1)])
def test_bad_requests(packet: Any, arg: int) -> None:
    world = cluster(1, replicas=0)
    client = world.client("C1")
    world.ask(client, packet, arg)
    world.until(lambda: client.conn is None)
    commit(world, world.client("C2"), 1)


def test_read_only_client() -> None:
    world = cluster(1, replicas=0)
    client = world.client("C1", extra={b"read_only": True})
    code, _ = world.refused(client, AskBeginTransaction, None)
    assert code == ErrorCode.READ_ONLY_ACCESS
    world.tell(client, AbortTransaction, p64(1), [])
    assert client.errors[-1][0] == ErrorCode.READ_ONLY_ACCESS
    assert world.call(client, AskLastTransaction) == (ZERO_TID,)


# --- replication ------------------------------------------------------------------


def test_a_replica_returns() -> None:
    """The sequence of behaviour 13; changes of one turn come as one."""
    world = cluster(partitions=4)
    client = world.client("C1")
    world.sim.crash("S2")
    world.until(lambda: world.table == "UO UO UO UO")
    tid = commit(world, client, 1)
    world.start_storage("S2")
    storage = world.storage("S2")
    world.running()
    world.settle()
    # Not before the storage asked what to wait for.
    world.tell(storage, NotifyReplicationDone, 0, tid)
    assert world.table == "UO UO UO UO"
    ttid = begin(world, client)
    answer = world.call(storage, AskUnfinishedTransactions, [0, 1, 2])
    assert answer == (tid, (ttid,))
    outcome = finish(world, client, ttid, 1)
    world.until(lambda: outcome.over)
    world.settle()
    final = outcome.answer[1]  # type: ignore[index]
    assert storage.of("NotifyTransactionFinished") == [(ttid, final)]
    before = len(client.of("NotifyPartitionChanges"))
    assert storage.conn is not None
    for partition in range(4):
        storage.conn.notify(NotifyReplicationDone, partition, final)
    storage.conn.transport.flush()  # type: ignore[attr-defined]
    world.settle()
    assert world.table == "UU UU UU UO"
    assert len(client.of("NotifyPartitionChanges")) - before <= 2
    world.tell(storage, NotifyReplicationDone, 0, final)  # again: ignored
    assert storage.conn is not None
    # A cell that is outdated again must ask again.
    world.call(storage, AskUnfinishedTransactions, [3])
    world.master.change_table([(3, 2, CellState.DISCARDED)])
    world.master.change_table([(3, 2, OUT)])
    world.settle()
    world.tell(storage, NotifyReplicationDone, 3, final)
    assert world.table == "UU UU UU UO"


def test_a_replica_is_lost_before_its_return_is_told() -> None:
    """It waits for the disks of the others: meanwhile, commits go on without it."""
    world = cluster(partitions=4)
    client = world.client("C1")
    world.sim.crash("S2")
    world.until(lambda: world.table == "UO UO UO UO")
    tid = commit(world, client, 1)
    settling = world.master.transactions.settling
    for lives in range(2):
        world.start_storage("S2")
        storage = world.storage("S2")
        world.running()
        world.settle()
        world.call(storage, AskUnfinishedTransactions, [0])
        first = world.master.nodes.by_nid(1)
        assert first is not None
        if not lives:
            settling.owing[first] = world.master.runtime.monotonic()
            world.tell(storage, NotifyReplicationDone, 0, tid)
            world.sim.crash("S2")
            world.until(lambda: 2 not in world.master.nodes.running())
            settling.storage_lost(first)
        world.settle()
        assert world.table == "UO UO UO UO"


def test_two_replicas_return_before_it_can_be_told() -> None:
    world = cluster(3, replicas=2)
    client = world.client("C1")
    for name in ("S2", "S3"):
        world.sim.crash(name)
    world.until(lambda: world.table == "UOO UOO")
    tid = commit(world, client, 1)
    settling = world.master.transactions.settling
    first = world.master.nodes.by_nid(1)
    assert first is not None
    for name in ("S2", "S3"):
        world.start_storage(name)
        world.running()
        world.settle()
        world.call(world.storage(name), AskUnfinishedTransactions, [0, 1])
    settling.owing[first] = world.master.runtime.monotonic()
    for name in ("S2", "S3"):
        world.tell(world.storage(name), NotifyReplicationDone, 0, tid)
    assert world.table == "UOO UOO"
    settling.storage_lost(first)
    assert world.table == "UUO UOO"
    world.settle()
    assert world.table == "UUU UOO"


def test_replication_of_what_is_not_assigned() -> None:
    """A tweak took the cell away when it was just complete."""
    world = cluster(replicas=0)
    storage = world.storage("S1")
    assert world.table == "U. .U"
    lost = storage.lost
    world.tell(storage, NotifyReplicationDone, 1, ZERO_TID)
    world.settle()
    assert storage.lost == lost
    assert world.table == "U. .U"


# --- packs ------------------------------------------------------------------------


def test_pack_orders() -> None:
    world = cluster()
    client = world.client("C1")
    last = commit(world, client, 1)
    ttid = begin(world, client)
    _, pack_id = world.call(
        client, AskFinishTransaction, ttid, [], [], [], (None, last)
    )
    world.settle()
    for name in ("S1", "S2"):
        storage = world.storage(name)
        assert storage.of("AskLockInformation")[-1] == (ttid, pack_id, True)
        assert storage.of("NotifyPackSigned") == [((pack_id,), ())]
    order = (pack_id, True, False, None, last)
    storage = world.storage("S1")
    assert world.call(storage, AskPackOrders, p64(1)) == ((order,),)
    assert world.call(client, AskPackOrders, p64(1)) == ((order,),)
    assert world.call(client, AskPackOrders, ZERO_TID) == ((order,),)
    assert world.call(client, WaitForPack, p64(3)) == ()
    waiting = world.ask(client, WaitForPack, pack_id)
    world.tell(storage, NotifyPackCompleted, pack_id)
    assert not waiting.over
    world.tell(world.storage("S2"), NotifyPackCompleted, pack_id)
    assert waiting.answer == ()
    # Forgotten: the storages are asked.
    assert world.call(client, AskPackOrders, ZERO_TID) == ((),)
    assert storage.of("AskPackOrders")[-1] == (ZERO_TID,)


def test_restart_with_data() -> None:
    """Ids are those of the storages."""
    rows = [{1: U}, {1: U}]
    last = p64(1 << 40)
    disk = Disk(1, 3, 0, rows, committed={last: last}, last_oid=p64(7))
    world = World()
    world.start_storage("S1", disk)
    world.running()
    client = world.client("C1")
    assert world.call(client, AskLastIDs) == (last, p64(7), last)


def test_commits_wait_for_the_table_to_settle() -> None:
    """Else a new primary could go on without the storage that alone has one."""
    world = World(masters=2, replicas=1, autostart=3)
    world.storages("S1", "S2", "S3")
    world.running()
    world.until(lambda: len(world.master.nodes.identified(NodeType.MASTER)) == 1)
    client = world.client("C1")
    commit(world, client, 0, 1)
    world.storage("S3").hold.add("AskPackOrders")
    world.sim.crash("S2")
    world.settle()
    assert "O" in world.table
    outcome = finish(world, client, begin(world, client), 0)
    world.settle(5)
    assert not outcome.over
    assert all("AskLockInformation" in world.storage(s).names for s in ("S1", "S3"))
    world.storage("S3").release("AskPackOrders")
    world.until(lambda: outcome.over)
    assert outcome.answer is not None


@pytest.mark.parametrize("held", [1, 3])
def test_who_does_not_confirm_the_table(held: int) -> None:
    """It is disconnected, if the cluster can run without it; else it is awaited."""
    world = World(masters=2, replicas=2 if held == 3 else 1, autostart=3)
    world.storages("S1", "S2", "S3")
    world.running()
    world.until(lambda: len(world.master.nodes.identified(NodeType.MASTER)) == 1)
    client = world.client("C1")
    world.storage(f"S{held}").hold.add("AskPackOrders")
    world.sim.crash("S2")
    world.settle()
    outcome = finish(world, client, begin(world, client), 0)
    world.settle(20)
    assert outcome.over == (held == 3)
    world.start_storage("S2")
    world.storage(f"S{held}").release("AskPackOrders")
    world.until(lambda: outcome.over)
    assert outcome.answer is not None


def test_added_storage_that_never_gets_ready() -> None:
    """Row 26 of testing.md 9: nobody waits for it, and it is put aside."""
    world = cluster()
    client = world.client("C1")
    world.storages("S3", hold=["StartOperation"])
    world.call(world.admin(), AddPendingNodes, [3])
    since = world.sim.time
    commit(world, client, 1)  # it has no cell
    assert world.sim.time < since + 1
    storage = world.storage("S3")
    world.until(lambda: storage.lost, 20)
    world.until(lambda: storage.errors, 5)
    assert storage.errors[0][0] == ErrorCode.NOT_READY
    assert "put aside" in storage.errors[0][1]
    since = world.sim.time
    world.until(lambda: len(storage.of("StartOperation")) > 1, 70)
    assert world.sim.time > since + 50
    # Its log says so again only if the words are others.
    assert len(storage.errors) > 20
    assert len(set(storage.errors)) == 1
    world.until(lambda: len(storage.of("StartOperation")) > 2, 150)
    assert world.sim.time > since + 180  # for longer each time
    world.storage("S3").release("StartOperation")
    world.settle()
    assert not world.master.transactions.starting


def test_cells_assigned_since_the_begin() -> None:
    """The client did not write there: the storage replicates that transaction."""
    world = cluster(2, replicas=0)
    client = world.client("C1")
    world.storages("S3")
    admin = world.admin()
    world.call(admin, AddPendingNodes, [3])
    world.settle()
    storage = world.storage("S3")
    old = begin(world, client)
    world.call(admin, TweakPartitionTable, False, [1])
    world.settle()
    new = begin(world, client)
    world.call(storage, AskUnfinishedTransactions, [0, 1])
    for ttid in old, new:
        outcome = finish(world, client, ttid, 0, 1)
        world.until(lambda outcome=outcome: outcome.over)
        assert outcome.answer is not None
    world.settle()
    assert [args[0] for args in storage.of("AskLockInformation")] == [new]
    assert [args[0] for args in storage.of("NotifyTransactionFinished")] == [old, new]
    assert storage.lost == 0


def test_a_replica_that_returns_and_who_does_not_know() -> None:
    """The one that carried the operation is lost before it learns of the other."""
    world = cluster(partitions=1)
    client = world.client("C1")
    world.sim.crash("S2")
    world.until(lambda: world.table == "UO")
    tid = commit(world, client, 1)
    world.start_storage("S2")
    storage = world.storage("S2")
    world.running()
    world.settle()
    world.call(storage, AskUnfinishedTransactions, [0])
    world.sim.clog("M0", "S1")
    world.tell(storage, NotifyReplicationDone, 0, tid)
    assert world.table == "UU"
    world.sim.crash("S1")
    world.settle(3)
    assert world.state is ClusterState.RECOVERING
    (line,) = world.master.phase.describe()
    assert "recovery waits for S1 " in line
    assert world.disks["S2"].rows == [{1: U, 2: U}]
    world.sim.heal()
    world.start_storage("S1")
    world.running()
    assert world.master.transactions.last_tid == tid
