"""Who may connect to the master, what it is told, elections, commands."""

from __future__ import annotations

from typing import Any

import pytest

from neo.lib.connection import Connection
from neo.lib.protocol import (
    AGE,
    AddPendingNodes,
    AskBeginTransaction,
    AskClusterState,
    AskLastIDs,
    AskRecovery,
    CheckReplicas,
    ClusterState,
    ErrorCode,
    FlushLog,
    NodeState,
    NodeType,
    Ping,
    Repair,
    RequestIdentification,
    SetClusterState,
    SetNodeState,
    SetNumReplicas,
    Truncate,
    TweakPartitionTable,
)
from neo.lib.util import p64
from neo.master.election import Secondary
from tests.unit.master_peers import (
    Disk,
    FakeAdmin,
    FakeClient,
    FakeStorage,
    Peer,
    U,
    World,
)
from tests.unit.test_master_transactions import begin, cluster, commit

RUNNING, DOWN = NodeState.RUNNING, NodeState.DOWN
DENIED = ErrorCode.DENIED


def start_peer(world: World, cls: type[Peer], **claim: Any) -> Peer:
    """A peer that may be refused."""
    world.sim.start("X", lambda runtime: cls(runtime, world.addresses[0], **claim))
    world.until(lambda: world.sim.app("X").received or world.sim.app("X").errors)
    world.settle()
    peer = world.sim.app("X")
    assert isinstance(peer, Peer)
    return peer


# --- identification ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "claim", "text"),
    [
        (FakeClient, {"name": b"other"}, "cluster name 'other' expected"),
        (FakeAdmin, {"address": ("127.0.0.1", 10000)}, "address conflict"),
        (FakeAdmin, {"address": ("127.0.0.1", 20001)}, "address conflict"),
        (FakeClient, {"address": ("127.0.0.1", 1)}, "a client has no address"),
        (FakeClient, {"kind": NodeType.MASTER}, "a master has an address"),
        (
            FakeClient,
            {"kind": NodeType.STORAGE, "nid": 1, "address": ("127.0.0.1", 3)},
            "duplicated node id",
        ),
        (
            FakeClient,
            {"kind": NodeType.STORAGE, "nid": 1, "address": ("127.0.0.1", 20001)},
            "already connected",
        ),
        (FakeClient, {"kind": NodeType.STORAGE}, "wants a new node id"),
        (
            FakeClient,
            {"kind": NodeType.STORAGE, "extra": {b"new_nid": (7,)}},
            "wants a new node id",
        ),
    ],
)
def test_refused(cls: type[Peer], claim: dict[str, Any], text: str) -> None:
    """Scenarios 15 and 21."""
    world = cluster(1, replicas=0)
    nodes = len(world.master.nodes)
    peer = start_peer(world, cls, **claim)
    ((code, message),) = peer.errors
    assert code == ErrorCode.PROTOCOL_ERROR
    assert text in message
    assert peer.conn is None
    assert len(world.master.nodes) == nodes
    commit(world, world.client("C1"), 1)


def test_client_before_the_operation() -> None:
    """It waits for a while, then is told to come again."""
    world = World()
    peer = start_peer(world, FakeClient)
    assert 1 < world.sim.time < 3
    assert peer.errors[0][0] == ErrorCode.NOT_READY
    assert peer.conn is None
    assert not world.master.identification.parked


def test_client_a_moment_before_the_operation() -> None:
    world = World(autostart=1)
    world.sim.start("C", lambda runtime: FakeClient(runtime, world.addresses[0]))
    world.sim.start("D", lambda runtime: FakeClient(runtime, world.addresses[0]))
    world.settle()
    assert len(world.master.identification.parked) == 2
    world.sim.crash("D")
    world.storages("S1")
    world.until(lambda: world.sim.app("C").accepted)
    assert world.state is ClusterState.RUNNING
    assert world.sim.time < 1.5


@pytest.mark.parametrize("nid", [-4096, 1, -268435455, 2**31 - 1, 0])
def test_nid_of_another_kind(nid: int) -> None:
    """It is not granted, and harms nobody."""
    world = cluster(1, replicas=0)
    client = world.client("C1", nid=nid)
    assert client.nid == -0x20000000 + 1
    again = world.client("C2", nid=-0x20000000 + 5)
    assert again.nid == -0x20000000 + 5
    taken = world.client("C3", nid=-0x20000000 + 5)
    assert taken.nid == -0x20000000 + 2


def test_node_information() -> None:
    """Who learns about what (behaviour 1.3); timestamps increase on each connection."""
    world = cluster(1, replicas=0)
    admin = world.admin(extra={b"backup": (b"copy",)})
    client = world.client("C1")
    backup = world.client("C2", extra={b"backup": b"copy"})
    world.settle()

    def kinds(peer: Peer) -> set[NodeType]:
        told = peer.of("NotifyNodeInformation")
        rows = [row for _, rows in told for row in rows]
        return {row[0] for row in rows if row[2] != peer.nid}

    M, S, C, A = NodeType  # noqa: N806
    assert kinds(world.storage("S1")) == {M, C}
    assert kinds(admin) == {M, S, C}
    assert kinds(client) == {M, S}
    assert kinds(backup) == {M, S, A}
    for peer in (admin, client, backup, world.storage("S1")):
        _, rows = peer.of("NotifyNodeInformation")[0]
        assert rows[0][2] == peer.nid  # first itself
        times = [timestamp for timestamp, _ in peer.of("NotifyNodeInformation")]
        assert times == sorted(set(times))
    world.sim.crash("C1")
    world.settle()
    ((_, rows),) = admin.of("NotifyNodeInformation")[-1:]
    assert rows[0][2:4] == (client.nid, NodeState.UNKNOWN)


def test_timestamps_increase_when_the_clock_is_set_back() -> None:
    world = cluster(1, replicas=0)
    admin = world.admin()
    for i in range(3):
        world.client(f"C{i}")
        world.sim.processes["M0"].skew -= 1000
    times = [timestamp for timestamp, _ in admin.of("NotifyNodeInformation")]
    assert times == sorted(set(times))


def test_a_storage_returns_before_its_loss_is_noticed() -> None:
    """A silent connection is replaced (behaviour 12.1 D5)."""
    world = cluster(2)
    world.sim.crash("S2", silent=True)
    world.settle(4)
    world.start_storage("S2")
    world.until(lambda: world.storage("S2").accepted, within=4)


def test_a_silent_storage_is_disconnected() -> None:
    world = cluster(2)
    world.sim.pause("S2")
    world.settle(15)
    assert world.table == "UO UO"
    world.sim.pause("S1")
    world.settle(60)  # it is indispensable
    assert world.state is ClusterState.RUNNING


def test_no_identification() -> None:
    world = World()

    class Mute(FakeClient):
        def connected(self, conn: Connection) -> None:
            self.conn = conn
            conn.ask(Ping)

    peer = start_peer(world, Mute)
    assert peer.names == ["Pong"]
    world.until(lambda: peer.conn is None, within=11)


def test_anything_before_identification() -> None:
    world = World()

    class Rude(FakeClient):
        def connected(self, conn: Connection) -> None:
            self.conn = conn
            conn.ask(AskLastIDs)

    peer = start_peer(world, Rude)
    assert peer.errors[0][0] == ErrorCode.PROTOCOL_ERROR
    assert peer.conn is None


def test_clone() -> None:
    """Scenario 132: a new nid, DOWN, with cells that are out of date."""
    world = cluster(1, replicas=0)
    client = world.client("C1")
    clone = start_peer(
        world,
        FakeClient,
        kind=NodeType.STORAGE,
        extra={b"devpath": (b"h",), b"new_nid": (0, 1)},
    )
    assert clone.nid == 2
    ((_, rows),) = clone.of("NotifyNodeInformation")
    assert rows[0][3] is DOWN
    assert world.table == "UO UO"
    names = client.names
    assert names.index("NotifyPartitionChanges") > names.index("NotifyNodeInformation")
    world.sim.crash("X")
    world.settle()
    world.start_storage("S2", Disk(2, 2, 0, [dict(r) for r in world.master.pt.rows]))
    node = world.master.nodes.by_nid(2)
    assert node is not None
    world.until(lambda: node.state is RUNNING)
    world.running()


# --- commands ---------------------------------------------------------------------


def test_add_tweak_kill_drop() -> None:
    """Scenarios 127 to 129 and 137."""
    world = cluster(2, partitions=4)
    admin = world.admin()
    assert world.table == "UU UU UU UU"
    world.storages("S3")
    node = world.master.nodes.by_nid(3)
    assert node is not None
    assert node.state is NodeState.PENDING
    assert world.call(admin, TweakPartitionTable, False, [])[0] is False
    assert world.call(admin, AddPendingNodes, [2, 3, 99]) == ("Nodes added: S3",)
    assert world.call(admin, AddPendingNodes, [3]) == ("No node added",)
    world.running()
    dry = world.call(admin, TweakPartitionTable, True, [])
    assert world.table == "UU UU UU UU"
    assert world.call(admin, TweakPartitionTable, False, []) == dry
    assert world.table == "UU. UFO FUO UU."
    assert world.call(admin, TweakPartitionTable, False, []) == (False, dry[1])
    assert world.refused(admin, SetNodeState, 2, NodeState.UNKNOWN) == (
        DENIED,
        "a running node must be stopped before removal",
    )
    assert world.call(admin, SetNodeState, 2, DOWN) == ("state changed",)
    assert world.table == "UO. U.O FOO UO."
    assert world.call(admin, SetNodeState, 2, DOWN) == ("node already in DOWN state",)
    world.until(lambda: world.sim.app("S2") is None)
    assert world.refused(admin, SetNodeState, 1, DOWN)[0] == DENIED
    assert world.refused(admin, TweakPartitionTable, True, [])[0] == DENIED
    assert world.call(admin, TweakPartitionTable, True, [2])[0] is True
    assert world.call(admin, SetNodeState, 2, NodeState.UNKNOWN) == (
        "node permanently removed",
    )
    assert world.table == "U. UO UO U."
    assert world.refused(admin, SetNodeState, 2, DOWN) == (DENIED, "unknown node")
    names = admin.names[::-1]
    assert names.index("NotifyNodeInformation") < names.index("NotifyPartitionChanges")
    # It comes back with its old database.
    world.start_storage("S2")
    world.settle()
    node = world.master.nodes.by_nid(2)
    assert node is not None
    assert node.state is NodeState.PENDING
    assert world.call(admin, SetNodeState, 2, NodeState.UNKNOWN)
    world.until(lambda: world.sim.app("S2") is None)
    assert world.disks["S2"] == Disk()


def test_pending_storage_is_forgotten_when_it_leaves() -> None:
    world = cluster(1, replicas=0)
    admin = world.admin()
    world.storages("S2")
    world.sim.crash("S2")
    world.settle()
    assert world.master.nodes.by_nid(2) is None
    _, rows = admin.of("NotifyNodeInformation")[-1]
    assert rows[0][2:4] == (2, NodeState.UNKNOWN)


def test_set_num_replicas() -> None:
    world = cluster(2)
    admin = world.admin()
    world.call(admin, SetNumReplicas, 0)
    world.settle()
    assert world.disks["S1"].replicas == 0
    assert world.disks["S1"].ptid == world.master.pt.ptid == 2
    world.call(admin, TweakPartitionTable, False, [])
    assert world.table == "U. .U"


@pytest.mark.parametrize(
    ("packet", "args"),
    [
        (SetClusterState, (ClusterState.RUNNING,)),
        (SetClusterState, (ClusterState.RECOVERING,)),
        (SetClusterState, (ClusterState.STARTING_BACKUP,)),
        (SetClusterState, (ClusterState.STOPPING_BACKUP,)),
        (SetClusterState, (ClusterState.BACKINGUP,)),
        (SetNodeState, (-0x10000000 + 1, DOWN)),
        (SetNodeState, (-0x10000000 + 1, NodeState.UNKNOWN)),
        (SetNodeState, (1, RUNNING)),
        (SetNodeState, (77, DOWN)),
        (TweakPartitionTable, (False, [1])),
        (TweakPartitionTable, (False, [77])),
        (Repair, ([77], False)),
        (CheckReplicas, ({9: None}, p64(0), None)),
        (CheckReplicas, ({0: 77}, p64(0), None)),
        (Truncate, (p64(1),)),
    ],
)
def test_denied(packet: Any, args: tuple[Any, ...]) -> None:
    """Denied, with a text, and nothing changes."""
    world = cluster(1, replicas=0)
    admin = world.admin()
    code, text = world.refused(admin, packet, *args)
    assert code == DENIED
    assert text
    assert world.state is ClusterState.RUNNING


@pytest.mark.parametrize(
    ("packet", "args"),
    [
        (AddPendingNodes, ([1],)),
        (TweakPartitionTable, (False, [])),
        (SetNumReplicas, (1,)),
        (CheckReplicas, ({0: None}, p64(0), None)),
        (Truncate, (p64(1),)),
        (SetNodeState, (1, NodeState.UNKNOWN)),
    ],
)
def test_denied_before_the_operation(packet: Any, args: tuple[Any, ...]) -> None:
    world = World()
    admin = world.admin()
    world.storages("S1")
    code, text = world.refused(admin, packet, *args)
    assert code == DENIED
    assert "RECOVERING" in text


def test_other_commands() -> None:
    world = cluster(2)
    admin, client = world.admin(), world.client("C1")
    world.call(admin, Repair, [1], True)
    world.call(admin, CheckReplicas, {0: 2, 1: None}, p64(0), None)
    world.tell(admin, FlushLog)
    assert world.storage("S1").of("NotifyRepair") == [(True,)]
    checks = [a for n in ("S1", "S2") for a in world.storage(n).of("CheckPartition")]
    source = (b"", (b"127.0.0.1", 20002))
    assert checks == [(0, source, p64(0), p64(0)), (1, (b"", None), p64(0), p64(0))]
    assert client.of("FlushLog") == [()]
    assert admin.of("FlushLog") == []
    assert world.call(admin, AskRecovery) == (1, None, None)


def test_kill_in_recovery() -> None:
    """A storage is told to exit; recovery goes on without it (scenario 27)."""
    world = World()
    admin = world.admin()
    world.storages("S1", "S2")
    world.call(admin, SetNodeState, 1, DOWN)
    world.until(lambda: world.sim.app("S1") is None)
    world.call(admin, SetClusterState, ClusterState.VERIFYING)
    world.running()
    assert world.table == "U U"
    assert world.master.nodes.by_nid(1) is None


# --- elections --------------------------------------------------------------------


def primaries(world: World) -> list[str]:
    """Masters that play primary."""
    return [
        name
        for name, process in world.sim.processes.items()
        if name[0] == "M"
        and process.app is not None
        and not isinstance(process.app.phase, Secondary)
    ]


def elected(world: World, alive: int) -> bool:
    """Is there one primary, and is it known to all others?"""
    names = primaries(world)
    if len(names) != 1:
        return False
    primary = world.sim.app(names[0])
    running = [n for n in primary.nodes.identified(NodeType.MASTER) if n.address]
    return len(running) == alive - 1 and all(
        p.app is primary
        or (p.app.phase.identified and p.app.phase.primary.address == primary.address)
        for name, p in world.sim.processes.items()
        if name[0] == "M" and p.app is not None
    )


@pytest.mark.parametrize("seed", range(10))
def test_election(seed: int) -> None:
    """Scenario 1: one primary; another one when it dies; commands reach the primary."""
    world = World(seed, masters=3)
    world.until(lambda: elected(world, 3), within=10)
    first = primaries(world)[0]
    world.sim.crash(first)
    world.until(lambda: elected(world, 2), within=10)
    second = primaries(world)[0]
    world.start_master(int(first[1:]))
    world.until(lambda: elected(world, 3), within=10)
    assert primaries(world) == [second]


@pytest.mark.parametrize("seed", range(3))
def test_election_of_many(seed: int) -> None:
    """Scenario 7."""
    world = World(seed, masters=20)
    world.until(lambda: elected(world, 20), within=30)


def test_a_secondary_redirects_and_obeys() -> None:
    """Scenarios 10 and 11."""
    world = World(masters=2)
    world.until(lambda: elected(world, 2))
    primary = primaries(world)[0]
    other = "M1" if primary == "M0" else "M0"
    to = world.addresses[int(other[1:])]
    world.sim.start("X", lambda runtime: FakeClient(runtime, to))
    world.until(lambda: world.sim.app("X").of("NotPrimaryMaster"))
    ((index, masters),) = world.sim.app("X").of("NotPrimaryMaster")
    assert masters[index] == (b"127.0.0.1", 10000 + int(primary[1:]))
    admin = world.admin(to=world.addresses[int(primary[1:])])
    conn = world.sim.app(other).phase.conn
    world.tell(admin, FlushLog)
    assert world.sim.app(other).phase.conn is conn
    mine = world.sim.app(primary).node.nid
    assert world.refused(admin, SetNodeState, mine, DOWN)[0] == DENIED
    nid = world.sim.app(other).node.nid
    world.call(admin, SetNodeState, nid, DOWN)
    world.until(lambda: world.sim.app(other) is None)
    assert world.call(admin, AskClusterState) == (ClusterState.RECOVERING,)
    world.call(admin, SetClusterState, ClusterState.STOPPING)
    world.until(lambda: world.sim.app(primary) is None)


def test_secondaries_stop_with_the_cluster() -> None:
    world = World(masters=3)
    world.until(lambda: elected(world, 3))
    primary = primaries(world)[0]
    admin = world.admin(to=world.addresses[int(primary[1:])])
    world.call(admin, SetClusterState, ClusterState.STOPPING)
    for i in range(3):
        world.until(lambda i=i: world.sim.app(f"M{i}") is None)


def test_a_running_cluster_keeps_its_primary() -> None:
    """Scenarios 3 and 4: an earlier key, an unknown address: it is a secondary."""
    world = cluster(1, replicas=0)
    client = world.client("C1")
    ttid = begin(world, client)
    world.addresses.append(("127.0.0.1", 10001))
    world.start_master(1)
    world.sim.processes["M1"].skew -= 1e6
    world.until(lambda: elected(world, 2))
    assert primaries(world) == ["M0"]
    assert ttid in world.master.transactions.in_progress
    world.sim.crash("M1")
    world.settle()
    node = world.master.nodes.by_address(("127.0.0.1", 10001))
    assert node is not None
    assert node.state is DOWN


def test_a_secondary_returns_before_its_loss_is_noticed() -> None:
    """It gives itself another nid than it had; seed 3065 of simulated power losses."""
    world = World(masters=3)
    world.until(lambda: elected(world, 3))
    primary = primaries(world)[0]
    other = next(n for n in ("M2", "M1", "M0") if n != primary)
    world.sim.crash(other, silent=True)
    world.settle(4)
    world.start_master(int(other[1:]))
    world.until(lambda: elected(world, 3), within=5)


def test_takeover_while_running() -> None:
    """Scenario 1: the cluster runs again by itself, with the storage's data."""
    world = cluster(1, replicas=0, masters=2)
    world.until(lambda: elected(world, 2))
    assert primaries(world) == ["M0"]
    client = world.client("C1")
    tid = commit(world, client, 1)
    world.sim.crash("S1")
    world.sim.crash("M0")
    start = world.sim.time
    world.until(lambda: primaries(world) == ["M1"])
    assert world.sim.time - start < 1.5
    world.start_storage("S1", to=world.addresses[1])
    other = world.sim.app("M1")
    world.until(lambda: other.phase.state is ClusterState.RUNNING)
    assert other.transactions.last_tid == tid


@pytest.mark.parametrize("age", [0.5, 60.0])
def test_a_storage_that_another_master_counts_on(age: float) -> None:
    """Its former process may have promised to follow a master that is out of sight."""
    world = World(masters=2)
    rows = [{1: U}, {1: U}]
    world.sim.clog("M0", "M1")
    world.sim.clog("M1", "M0")
    start = world.sim.time
    world.start_storage("S1", Disk(1, 3, 0, rows), extra={AGE: age})
    if age < 10:
        world.settle(3)
        assert world.master.phase.describe() == [
            "recovery waits for masters that are silent: they may still count on"
            " S1 (127.0.0.1:20001), just started"
        ]
    world.running()
    assert (8 < world.sim.time - start < 11) == (age < 10)


def test_a_dead_master_counts_on_nobody() -> None:
    """Its machine says that nobody listens there."""
    world = World(masters=2)
    world.sim.crash("M1")
    start = world.sim.time
    world.start_storage("S1", Disk(1, 3, 0, [{1: U}, {1: U}]), extra={AGE: 0.1})
    world.running()
    assert world.sim.time - start < 0.5


def test_nothing_is_created_twice() -> None:
    """Who followed the primary of a running cluster knows that there is a database."""
    world = World(masters=2, autostart=1)
    world.until(lambda: elected(world, 2))
    primary = primaries(world)[0]
    other = "M1" if primary == "M0" else "M0"
    world.start_storage("S1", to=world.addresses[int(primary[1:])])
    first = world.sim.app(primary)
    world.until(lambda: first.phase.state is ClusterState.RUNNING)
    world.settle()
    world.sim.crash("S1")
    world.sim.crash(primary)
    world.until(lambda: primaries(world) == [other])
    to = world.addresses[int(other[1:])]
    world.start_storage("S2", to=to)
    world.settle(5)
    second = world.sim.app(other)
    assert second.phase.state is ClusterState.RECOVERING
    (line,) = second.phase.describe()
    assert "there was one" in line
    world.start_storage("S1", to=to)
    world.until(lambda: second.phase.state is ClusterState.RUNNING)


def test_unsynchronised_masters_at_creation() -> None:
    """Scenario 6: two storages, each at another master, both with the nid 1."""
    world = World(masters=2, replicas=1, autostart=2)
    world.sim.clog("M0", "M1")
    world.sim.clog("M1", "M0")
    world.start_storage("S1", to=world.addresses[0])
    world.start_storage("S2", to=world.addresses[1])
    world.until(lambda: world.storage("S1").accepted and world.storage("S2").accepted)
    assert [world.disks[n].nid for n in ("S1", "S2")] == [1, 1]
    world.sim.heal()
    world.until(lambda: elected(world, 2))
    primary = primaries(world)[0]
    for name in ("S1", "S2"):
        world.sim.crash(name)
        world.start_storage(name, to=world.addresses[int(primary[1:])])
    master = world.sim.app(primary)
    world.until(lambda: master.phase.state is ClusterState.RUNNING)
    assert sorted(world.disks[n].nid or 0 for n in ("S1", "S2")) == [1, 2]


def test_packets_of_other_roles_are_refused() -> None:
    """A client is no administrator."""
    world = cluster(1, replicas=0)
    for i, (packet, args) in enumerate(
        [
            (SetNodeState, (1, DOWN)),
            (RequestIdentification, (NodeType.CLIENT, None, None, b"test", None, {})),
        ]
    ):
        peer = world.client(f"C{i}")
        world.ask(peer, packet, *args)  # type: ignore[arg-type]
        world.until(lambda peer=peer: peer.conn is None)
    storage = world.storage("S1")
    assert isinstance(storage, FakeStorage)
    lost = storage.lost
    world.ask(storage, AskBeginTransaction, None)
    world.until(lambda: storage.lost > lost)
    world.running()
