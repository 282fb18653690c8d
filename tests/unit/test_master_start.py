"""The master from its start to operation: recovery, creation, verification, stop."""

from __future__ import annotations

import pytest

from neo.lib.protocol import (
    AskBeginTransaction,
    AskClusterState,
    AskFinishTransaction,
    AskLastIDs,
    AskNewOIDs,
    ClusterState,
    ErrorCode,
    NodeState,
    NodeType,
    SetClusterState,
    Truncate,
)
from neo.lib.util import p64
from neo.master.recovery import UNKNOWN_TABLES
from tests.unit.master_peers import OUT, Disk, FakeStorage, U, World

RECOVERING = ClusterState.RECOVERING
RUNNING = ClusterState.RUNNING


def two(**options: object) -> World:
    """A cluster of two storages, one replica, RUNNING."""
    world = World(replicas=1, autostart=2, **options)
    world.storages("S1", "S2")
    world.running()
    return world


def commit(world: World, client: object, *oids: int) -> bytes:
    """Commit; return the tid."""
    (ttid,) = world.call(client, AskBeginTransaction, None)  # type: ignore[arg-type]
    _, tid = world.call(
        client,  # type: ignore[arg-type]
        AskFinishTransaction,
        ttid,
        [p64(oid) for oid in oids],
        [],
        [],
        None,
    )
    return tid  # type: ignore[no-any-return]


def test_creation_by_autostart() -> None:
    """The packets of a new cluster come as observed on the wire (behaviour 13)."""
    world = World(replicas=1, autostart=2)
    world.storages("S1")
    world.settle()
    assert world.state is RECOVERING
    assert world.master.phase.describe() == [
        "recovery waits for 1 storages to create a new cluster, or an administrator"
    ]
    world.storages("S2")
    world.running()
    assert world.storage("S1").names == [
        "AcceptIdentification",
        "NotifyNodeInformation",
        "AskRecovery",
        "NotifyNodeInformation",
        "NotifyNodeInformation",
        "NotifyClusterInformation",
        "SendPartitionTable",
        "AskLockedTransactions",
        "AskLastIDs",
        "AskPackOrders",
        "NotifyClusterInformation",
        "StartOperation",
    ]
    assert world.table == "UU UU"
    assert world.storage("S1").of("AskPackOrders") == [(p64(1),)]


def test_creation_by_an_administrator() -> None:
    world = World()
    admin = world.admin()
    assert admin.of("SendPartitionTable") == [(None, 0, ((), ()))]
    start = SetClusterState, ClusterState.VERIFYING
    assert world.refused(admin, *start)[0] == ErrorCode.DENIED
    world.storages("S1", "S2", "S3")
    world.storage("S3").hold.add("AskRecovery")
    world.settle()
    assert world.state is RECOVERING
    assert world.call(admin, *start) == ("Cluster state changed",)
    world.running()
    assert world.table == "U. .U"
    assert world.call(admin, AskClusterState) == (RUNNING,)
    assert world.refused(admin, *start) == (1, "Can not switch to this state")
    assert admin.names[:4] == [
        "AcceptIdentification",
        "NotifyNodeInformation",
        "SendPartitionTable",
        "NotifyNodeInformation",
    ]


def test_start_while_a_storage_is_answering() -> None:
    world = World()
    admin = world.admin()
    world.start_storage("S1")
    world.storage("S1").hold.add("AskRecovery")
    world.until(lambda: world.storage("S1").held)
    code, text = world.refused(admin, SetClusterState, ClusterState.VERIFYING)
    assert (code, text) == (
        1,
        "Cannot exit recovery now: node S1 is entering cluster",
    )


def restart(world: World, *names: str, **claim: object) -> None:
    """Restart the master, and only these storages."""
    for name in world.disks:
        if world.sim.app(name) is not None:
            world.sim.crash(name)
    world.sim.crash("M0")
    world.settle()
    world.start_master(0)
    for name in names:
        world.start_storage(name, **claim)


def test_older_data_are_not_enough() -> None:
    """What was committed under the master before is not forgotten by the next one."""
    world = two()
    world.sim.crash("S1")
    world.until(lambda: world.table == "OU OU")
    tid = commit(world, world.client("C1"), 1)
    restart(world, "S2")
    world.running()
    world.sim.crash("S2")
    world.settle()
    world.start_storage("S1")  # before anything else is committed
    world.settle(3)
    assert world.state is RECOVERING
    (line,) = world.master.phase.describe()
    assert "S2" in line
    assert "which may have newer data" in line
    world.start_storage("S2")
    world.running()
    assert world.master.transactions.last_tid == tid


def test_restart_waits_for_all_readable_nodes() -> None:
    """Scenario 22."""
    world = two()
    restart(world, "S1")
    world.settle(3)
    assert world.state is RECOVERING
    (line,) = world.master.phase.describe()
    assert "S2, which may have newer data" in line
    world.start_storage("S2")
    world.running()
    assert world.table == "UU UU"
    assert world.master.pt.ptid == 1


def test_restart_by_an_administrator_outdates_the_missing() -> None:
    """Scenario 22, with the word of the administrator."""
    world = two()
    restart(world, "S1")
    admin = world.admin()
    world.settle(3)
    world.call(admin, SetClusterState, ClusterState.VERIFYING)
    world.running()
    assert world.table == "UO UO"
    # Nobody knows how far the missing one came alone.
    assert world.master.pt.ptid == 1 + UNKNOWN_TABLES + 1
    nodes = {
        node.nid: node.state for node in world.master.nodes.of_type(NodeType.STORAGE)
    }
    assert nodes == {1: NodeState.RUNNING, 2: NodeState.DOWN}
    assert len(admin.of("NotifyPartitionChanges")) == 1


def test_the_number_of_a_table_is_not_used_again() -> None:
    """Recovery starts with an older table than the one that only a lost storage got."""
    world = two()
    world.sim.clog("M0", "S1")
    world.sim.crash("S2")
    world.until(lambda: world.table == "UO UO")
    world.sim.crash("S1")  # neither of them knows this table
    world.until(lambda: world.state is RECOVERING)
    assert world.master.known_ptid == 2
    world.sim.heal()
    world.storages("S1", "S2")
    world.running()
    assert world.table == "UU UU"
    world.sim.crash("S2")
    world.until(lambda: world.table == "UO UO")
    assert world.master.pt.ptid == 3


def test_newest_partition_table_wins() -> None:
    """Scenario 24."""
    world = World()
    rows = [{1: U, 2: OUT}, {1: U}]
    world.start_storage("S2", Disk(2, 5, 1, [{1: U, 2: U}, {1: U, 2: U}]))
    world.settle(2)
    assert world.state is RECOVERING
    world.start_storage("S1", Disk(1, 7, 1, rows))
    world.running()
    assert world.master.pt.ptid == 7
    assert world.table == "UO U."


def test_the_node_asked_for_its_table_leaves() -> None:
    """Scenario 25: another one with the same version is asked."""
    world = World(replicas=1)
    rows = [{1: U, 2: U}, {1: U, 2: U}]
    world.start_storage("S1", Disk(1, 3, 1, rows))
    world.storage("S1").hold.add("AskPartitionTable")
    world.start_storage("S2", Disk(2, 3, 1, rows))
    world.storage("S2").hold.add("AskPartitionTable")
    world.settle(2)
    asked = next(n for n in ("S1", "S2") if world.storage(n).held)
    other = "S2" if asked == "S1" else "S1"
    world.sim.crash(asked)
    world.until(lambda: world.storage(other).held)
    world.storage(other).release("AskPartitionTable")
    world.settle(2)
    assert world.state is RECOVERING
    assert world.master.pt.ptid == 3


def test_an_erased_database_is_not_taken_for_the_data() -> None:
    """A storage comes back empty, with the nid of a node that had all cells."""
    world = World(replicas=1)
    rows = [{1: U, 2: U}, {1: U, 2: U}]
    world.start_storage("S1", Disk(1))
    world.start_storage("S2", Disk(2, 3, 1, rows))
    admin = world.admin()
    world.settle(2)
    assert world.state is RECOVERING
    world.call(admin, SetClusterState, ClusterState.VERIFYING)
    world.running()
    assert world.table == "OU OU"


def test_two_empty_storages_with_one_nid() -> None:
    """Scenario 6: their nids came from masters that did not know each other."""
    world = World(replicas=1, autostart=2)
    world.start_storage("S1", Disk(1))
    world.start_storage("S2", Disk(1))
    world.running()
    assert sorted(disk.nid or 0 for disk in world.disks.values()) == [1, 2]


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ("locked", "locked", "committed"),
        ("locked", "voted", "committed"),
        ("voted", "committed", "committed"),
        ("voted", "voted", "dropped"),
        ("voted", "nothing", "dropped"),
        ("committed", "locked", "committed"),
    ],
)
def test_verification(first: str, second: str, outcome: str) -> None:
    """Scenarios 29 to 33."""
    rows = [{1: U, 2: U}, {1: U, 2: U}]
    ttid, tid = p64(1 << 40), p64((1 << 40) + 4)
    disks = []
    for nid, state in enumerate((first, second), 1):
        disk = Disk(nid, 3, 1, rows)
        if state == "committed":
            disk.committed[ttid] = tid
        elif state != "nothing":
            disk.temporary[ttid] = tid if state == "locked" else None
        disks.append(disk)
    world = World(replicas=1)
    world.start_storage("S1", disks[0])
    world.start_storage("S2", disks[1])
    world.running()
    for disk in disks:
        assert not disk.temporary
        assert disk.committed == ({ttid: tid} if outcome == "committed" else {})
    last = tid if outcome == "committed" else bytes(8)
    assert world.master.transactions.last_tid == last


def test_a_lock_without_readable_cell_does_not_count() -> None:
    """Scenario 34."""
    rows = [{1: U, 2: OUT}, {1: U, 2: OUT}]
    ttid, tid = p64(1 << 40), p64((1 << 40) + 4)
    world = World(replicas=1)
    late = Disk(2, 3, 1, rows, temporary={ttid: tid})
    world.start_storage("S2", late)
    world.settle()
    world.start_storage("S1", Disk(1, 3, 1, rows))
    world.running()
    world.until(lambda: not late.temporary)
    assert not late.committed


def test_last_oid_is_recovered() -> None:
    world = two()
    client = world.client("C1")
    commit(world, client, 41)
    for name in world.disks:
        world.disks[name].last_oid = p64(41)
    restart(world, "S1", "S2")
    world.running()
    client = world.client("C2")
    assert world.call(client, AskNewOIDs, 2) == ((p64(42), p64(43)),)


def test_losing_and_regaining_the_only_copy() -> None:
    """Scenario 43: back to recovery, and on by itself when the storage returns."""
    world = World(autostart=1)
    world.storages("S1")
    world.running()
    client = world.client("C1")
    tid = commit(world, client, 1)
    world.sim.crash("S1")
    world.until(lambda: world.state is RECOVERING)
    world.until(lambda: client.conn is None)
    assert client.names[-1] == "StopOperation"
    world.start_storage("S1")
    world.running()
    client = world.client("C2")
    assert world.call(client, AskLastIDs)[0] == tid
    assert commit(world, client, 2) > tid


def test_replicas_lost_one_after_the_other() -> None:
    """Scenario 23: one is enough, if the master lives and it missed no commit."""
    world = two()
    world.sim.crash("S2")
    world.until(lambda: world.table == "UO UO")
    world.sim.crash("S1")
    world.until(lambda: world.state is RECOVERING)
    world.start_storage("S2")
    world.running()
    assert world.table == "OU OU"


def test_the_master_knows_who_missed_a_commit() -> None:
    """As above, but S1 alone has the last commit: without it, nothing is served."""
    world = two()
    client = world.client("C1")
    commit(world, client, 1)
    world.sim.crash("S2")
    world.until(lambda: world.table == "UO UO")
    tid = commit(world, client, 2)
    world.sim.crash("S1")
    world.until(lambda: world.state is RECOVERING)
    world.start_storage("S2")
    world.start_storage("S3")  # a new one
    world.settle(3)
    assert world.state is RECOVERING
    world.sim.crash("S2")
    world.settle(3)
    assert world.state is RECOVERING
    world.start_storage("S1")
    world.running()
    assert world.table == "UO UO"
    assert world.master.transactions.last_tid == tid


def test_truncate() -> None:
    """All nodes note the truncation before anybody does it (scenario 38)."""
    world = two()
    admin, client = world.admin(), world.client("C1")
    tids = [commit(world, client, oid) for oid in (1, 2, 3)]
    assert world.refused(admin, Truncate, tids[2])[0] == ErrorCode.DENIED
    assert world.refused(admin, Truncate, p64(1))[0] == ErrorCode.DENIED
    world.storage("S1").hold.add("AskLastIDs")
    world.call(admin, Truncate, tids[0])
    world.until(lambda: world.storage("S1").held.get("AskLastIDs"))
    assert world.disks["S1"].truncate == tids[0]
    assert client.conn is None
    # S1 dies in the middle: the truncation is not forgotten.
    world.sim.crash("S1")
    world.until(lambda: world.state is RECOVERING)
    world.settle(3)
    assert world.state is RECOVERING
    assert world.storage("S2").names[-8:].count("StartOperation") == 0
    world.start_storage("S1")
    world.running()
    for disk in world.disks.values():
        assert list(disk.committed.values()) == tids[:1]
        assert disk.truncate is None
    assert world.master.transactions.last_tid == tids[0]
    assert world.table == "UU UU"


def test_stop_waits_for_transactions() -> None:
    """Scenario 41."""
    world = two()
    admin, client, other = world.admin(), world.client("C1"), world.client("C2")
    (ttid,) = world.call(client, AskBeginTransaction, None)
    world.call(admin, SetClusterState, ClusterState.STOPPING)
    late = world.ask(other, AskBeginTransaction, None)
    world.settle(3)
    assert world.state is ClusterState.STOPPING
    assert not late.over
    world.call(client, AskFinishTransaction, ttid, [p64(1)], [], [], None)
    world.until(lambda: world.sim.app("M0") is None)
    world.until(lambda: world.sim.app("S1") is None and world.sim.app("S2") is None)
    assert late.error == (None, "closed by the peer") or late.error is not None
    assert all(len(disk.committed) == 1 for disk in world.disks.values())
    world.start_master(0)
    world.start_storage("S1")
    world.start_storage("S2")
    world.running()
    assert (world.table, world.master.pt.ptid) == ("UU UU", 1)


@pytest.mark.parametrize("held", ["AskRecovery", "AskLockedTransactions", "AskLastIDs"])
def test_stop_from_other_states(held: str) -> None:
    """Scenario 42."""
    world = two()
    restart(world, "S1", "S2", hold=[held])
    admin = world.admin()
    world.until(lambda: world.storage("S1").held.get(held))
    world.call(admin, SetClusterState, ClusterState.STOPPING)
    for name in ("S1", "S2"):
        if isinstance(world.sim.app(name), FakeStorage):
            world.storage(name).release(held)
    for name in ("M0", "S1", "S2"):
        world.until(lambda name=name: world.sim.app(name) is None)


@pytest.mark.parametrize("stalled", ["begun", "voted", "finishing"])
def test_stop_does_not_wait_for_ever(stalled: str) -> None:
    """Row 37 of testing.md 9: all is over in 10 s; what storages owe is verified."""
    world = two()
    client = world.client("C1")
    (ttid,) = world.call(client, AskBeginTransaction, None)
    if stalled == "voted":
        for disk in world.disks.values():
            disk.temporary[ttid] = None
    if stalled == "finishing":
        world.storage("S1").hold.add("AskLockInformation")
        args = ttid, [p64(1)], [], [], None
        outcome = world.ask(client, AskFinishTransaction, *args)
        world.settle()
    world.call(world.admin(), SetClusterState, ClusterState.STOPPING)
    names = "M0", "S1", "S2"
    world.until(lambda: all(world.sim.app(name) is None for name in names), 10)
    assert all(world.sim.process(name).status == 0 for name in names)
    if stalled == "finishing":
        world.until(lambda: outcome.over)
        assert outcome.error is not None  # unknown
        assert world.disks["S2"].temporary
        world.disks["S1"].temporary[ttid] = None
    world.start_master(0)
    world.storages("S1", "S2")
    world.running()
    committed = [len(disk.committed) for disk in world.disks.values()]
    assert committed == ([1, 1] if stalled == "finishing" else [0, 0])


def test_late_packets_of_a_former_phase() -> None:
    """Scenarios 36 and 37: NotifyReady and a lock that come during the recovery."""
    world = World(autostart=2, partitions=2)
    world.storages("S1", "S2")
    world.running()
    client = world.client("C1")
    (ttid,) = world.call(client, AskBeginTransaction, None)
    one = world.storage("S1")
    one.hold.add("AskLockInformation")
    world.ask(client, AskFinishTransaction, ttid, [p64(0), p64(1)], [], [], None)
    world.until(lambda: one.held)
    lost = one.lost
    world.sim.crash("S2")
    world.until(lambda: world.state is RECOVERING)
    one.release("AskLockInformation")
    world.settle()
    assert one.lost == lost
    world.start_storage("S2")
    world.running()
    assert one.lost == lost
    assert all(disk.committed.keys() == {ttid} for disk in world.disks.values())
