"""Scenarios of behaviour.md 11, A, B, F, I: masters, recovery, replication."""

from __future__ import annotations

from typing import Any

import pytest
from ZODB.utils import p64

from neo.lib.protocol import (
    AddPendingNodes,
    AnswerObject,
    CellState,
    ClusterState,
    NodeState,
    NodeType,
    SetClusterState,
    SetNodeState,
    SetNumReplicas,
    Truncate,
)
from neo.lib.pt import PartitionTable
from neo.master.app import Master
from tests.simulation.cluster import Cluster, Shape
from tests.simulation.runtime import Simulation
from tests.simulation.test_replicas import Tool, nid_of
from tests.simulation.test_transactions import REPLICATED, SPREAD, Scene, X, Y, Z

THREE = Shape(masters=3, storages=2, replicas=1, partitions=2, clients=2, admins=1)


def primary_of(scene: Scene) -> Master:
    primary = scene.cluster.primary
    assert primary is not None
    return primary


def states(pt: PartitionTable) -> set[CellState]:
    return {state for _, _, state in pt}


# --- A: masters -----------------------------------------------------------------------


def test_2_the_first_master_does_not_hear_the_others() -> None:
    """Two primaries in RECOVERING: the one that is longest there stays it."""
    sim = Simulation("deaf")
    cluster = Cluster(sim, Shape(masters=3, storages=1))
    cluster.start("m0")
    sim.run(1)
    sim.pause("m0")
    cluster.start("m1")
    sim.run(0.5)
    cluster.start("m2")
    sim.run(0.5)
    sim.resume("m0")
    sim.run(5)
    assert cluster.primary is sim.app("m0")
    assert cluster.state_of(sim.app("m0")) is ClusterState.RECOVERING
    assert cluster.state_of(sim.app("m1")) is cluster.state_of(sim.app("m2")) is None
    cluster.start("s0", "c0")
    sim.run_until(lambda: cluster.healthy, 10)


def test_7_8_many_masters_start_at_once() -> None:
    """One primary; only storages are in the table of the new cluster."""
    scene = Scene(Shape(masters=20, storages=2, replicas=1))
    scene.sim.run(3)
    apps = [scene.sim.app(name) for name in scene.cluster.masters]
    assert sum(scene.cluster.state_of(app) is not None for app in apps) == 1
    nodes = primary_of(scene).nodes
    known = nodes.of_type(NodeType.MASTER)
    assert [node.state for node in known] == [NodeState.RUNNING] * 20
    kinds = {nodes.by_nid(nid).type for nid in primary_of(scene).pt.nids()}
    assert kinds == {NodeType.STORAGE}


def test_8_created_while_secondaries_come_and_go() -> None:
    """The table of the new cluster has nothing but storages."""
    sim = Simulation("creation")
    cluster = Cluster(sim, THREE)
    cluster.start("m0")
    sim.run(1)
    cluster.start("m1", "m2", "s0", "s1")
    for _ in range(10):
        sim.run(0.01)
        cluster.crash("m2")
        sim.run(0.01)
        cluster.restart("m2")
    sim.run_until(lambda: cluster.healthy, 20)
    primary = cluster.primary
    assert primary is not None
    nids = {sim.app(name).nid for name in cluster.storages}
    assert set(primary.pt.nids()) == nids


def test_9_19_masters_change_while_nodes_join() -> None:
    """Wherever the master is lost, everybody finds the next one."""
    scene = Scene(THREE)
    rng = scene.sim.rng("faults")
    for _ in range(12):
        primary = primary_of(scene)
        (name,) = (m for m in scene.cluster.masters if scene.sim.app(m) is primary)
        scene.cluster.crash("s1")
        scene.sim.run(0.1)
        scene.cluster.restart("s1")
        scene.sim.reset("c1", name)
        for _ in range(rng.randrange(60)):
            scene.sim.step()
        scene.cluster.crash(name)
        scene.sim.run(rng.choice([0, 1, 3]))
        scene.cluster.restart(name)
        scene.sim.run_until(lambda: scene.cluster.healthy, 20)
        assert scene.commits("c1", X, Y, within=10) < 10
    scene.audit()


# --- B: recovery ----------------------------------------------------------------------


def test_26_dropped_storage_comes_back_with_its_old_database() -> None:
    """It is pending, and in no table; its data count for nothing."""
    scene = Scene(Shape(storages=2, replicas=1, partitions=2, clients=2, admins=1))
    tool = Tool(scene)  # type: ignore[arg-type]
    nid = nid_of(scene, "s1")  # type: ignore[arg-type]
    scene.cluster.crash("s1")
    scene.sim.run(0.5)
    tool.text(SetNodeState, nid, NodeState.UNKNOWN)
    assert scene.commits("c0", X, Y, within=5) < 5
    for name in ("m0", "s0"):
        scene.cluster.crash(name)
    scene.cluster.restart("m0", "s0")
    scene.sim.run_until(lambda: scene.cluster.running, 20)
    scene.cluster.restart("s1")
    scene.sim.run_until(lambda: scene.sim.app("s1").nid is not None, 10)
    scene.sim.run(1)
    primary = primary_of(scene)
    assert list(primary.pt.nids()) == [nid_of(scene, "s0")]  # type: ignore[arg-type]
    nid = nid_of(scene, "s1")  # type: ignore[arg-type]
    node = primary.nodes.by_nid(nid)
    assert node is not None
    assert node.state is NodeState.PENDING
    tool.text(AddPendingNodes, [nid])
    assert tool.tweak()
    scene.sim.run_until(lambda: scene.cluster.healthy, 20)
    assert len(primary_of(scene).pt.nids()) == 2
    scene.audit()


@pytest.mark.parametrize("moment", range(0, 60, 6))
def test_40_storage_lost_while_truncating(moment: int) -> None:
    """Whenever it dies, and whoever does: it is not forgotten."""
    scene = Scene(Shape(storages=2, replicas=1, partitions=2, clients=2, admins=1))
    commits = [scene.commit(f"t{i}") for i in range(3)]
    for commit in commits:
        commit.run(*commit.all(X, Y))
    tool = Tool(scene)  # type: ignore[arg-type]
    scene.sim.invariants.remove(scene.cluster.check)  # the last tid decreases
    tool.text(Truncate, commits[0].tid)
    for _ in range(moment):
        scene.sim.step()
    victim = ["s0", "s1", "m0"][moment % 3]
    scene.cluster.crash(victim, power=bool(moment % 2))
    scene.sim.run(1)
    scene.cluster.restart(victim)
    scene.sim.run_until(lambda: scene.cluster.healthy, 60)
    for oid in (X, Y):
        assert scene.tokens_of(oid) == ["init", "t0"]
    assert scene.commits("c0", X, within=10) < 10
    scene.audit()


@pytest.mark.parametrize("storage", ["s0", "s1"])
def test_44_storage_sends_what_is_not_expected(storage: str) -> None:
    """It is disconnected, and comes back; the cluster waits for it if it must."""
    scene = Scene(SPREAD)
    connection = scene.sim.app(storage).master
    connection.notify(AnswerObject, X, p64(1), None, 0, bytes(20), b"", None)
    scene.sim.run_until(lambda: not scene.cluster.running, 5)
    scene.sim.run_until(lambda: scene.cluster.healthy, 20)
    assert scene.commits("c0", X, Y, within=10) < 10
    scene.audit()


def test_45_start_without_storage() -> None:
    """Denied with a message."""
    sim = Simulation("start")
    cluster = Cluster(sim, Shape(admins=1))
    cluster.start("m0", "a0")
    sim.run(1)

    class World:
        pass

    world: Any = World()
    world.sim, world.cluster = sim, cluster
    code, text = Tool(world).ask(SetClusterState, ClusterState.VERIFYING)
    assert code
    assert "storage" in text
    assert cluster.state_of(sim.app("m0")) is ClusterState.RECOVERING


# --- F: replication -------------------------------------------------------------------


def test_131_replicas_stop_one_after_the_other() -> None:
    """The last one serves alone; cells stop growing old when it dies, too."""
    scene = Scene(Shape(storages=3, replicas=2, partitions=3, clients=2))
    for name in ("s2", "s1"):
        scene.cluster.crash(name)
        assert scene.commits("c0", X, Y, Z, within=5) < 5
    pt = primary_of(scene).pt
    outdated = [cell for cell in pt if cell[2] is CellState.OUT_OF_DATE]
    assert len(outdated) == 6
    scene.cluster.crash("s0")
    scene.sim.run(2)
    assert not scene.cluster.running
    for name in ("s2", "s1"):
        scene.cluster.restart(name)
        scene.sim.run(3)
        assert not scene.cluster.running  # they don't have the last commits
    scene.cluster.restart("s0")
    scene.sim.run_until(lambda: scene.cluster.healthy, 30)
    assert scene.tokens_of(X) == ["init", "by c0", "by c0"]
    scene.audit()


def test_126_a_node_with_a_feeding_cell_dies() -> None:
    """In the end, each partition has as many cells as it should."""
    scene = Scene(
        Shape(storages=2, replicas=1, partitions=4, clients=2, admins=1, spares=1)
    )
    tool = Tool(scene)  # type: ignore[arg-type]
    scene.cluster.start("s2")
    scene.sim.run_until(lambda: scene.sim.app("s2").nid is not None, 5)
    tool.text(AddPendingNodes, [nid_of(scene, "s2")])  # type: ignore[arg-type]
    for name in ("s0", "s1"):
        scene.sim.clog(name, "s2")
    assert tool.tweak()
    pt = primary_of(scene).pt
    feeding = {nid for _, nid, state in pt if state is CellState.FEEDING}
    assert feeding
    victim = next(n for n in ("s0", "s1") if scene.sim.app(n).nid in feeding)
    scene.cluster.crash(victim)
    scene.sim.run(0.5)
    nid = scene.cluster.disks[victim].nid
    assert (nid, CellState.FEEDING) not in [cell[1:] for cell in primary_of(scene).pt]
    scene.sim.heal()
    scene.cluster.restart(victim)
    scene.sim.run_until(lambda: scene.cluster.healthy, 60)
    assert not tool.tweak() or scene.sim.run_until(lambda: scene.cluster.healthy, 60)
    cells = primary_of(scene).pt.cells
    assert [len(row) for row in cells] == [2] * 4
    assert states(primary_of(scene).pt) == {CellState.UP_TO_DATE}
    scene.audit()


def test_135_deletions_and_undo_are_replicated() -> None:
    """As what they are."""
    scene = Scene(REPLICATED)
    storage = scene.cluster.storage()
    first = scene.commit("t")
    first.run(*first.all(X, Y))
    scene.cluster.crash("s1")
    scene.sim.run(0.5)
    undo, delete = scene.commit("undo"), scene.commit("delete")
    serial = first.tid
    undo.run(
        lambda: storage.tpc_begin(undo.txn),
        lambda: storage.undo(first.tid, undo.txn),
        undo.vote,
        undo.finish,
    )
    assert undo.outcome == "ok"
    serial = scene.do(storage.load, Z)[1]
    delete.run(
        lambda: storage.tpc_begin(delete.txn),
        lambda: storage.deleteObject(Z, serial, delete.txn),
        delete.vote,
        delete.finish,
    )
    assert delete.outcome == "ok"
    scene.cluster.restart("s1")
    scene.audit()  # compares the replicas
    scene.cluster.crash("s0")
    scene.sim.run(0.5)
    assert scene.tokens_of(X) == ["init"]
    scene.cluster.restart("s0")
    scene.audit()


# --- I: admin -------------------------------------------------------------------------


def test_174_master_dies_while_a_tool_waits() -> None:
    """The tool gets an error; what comes for one that left is ignored."""
    scene = Scene(Shape(admins=1, clients=2))
    tool = Tool(scene)  # type: ignore[arg-type]
    scene.sim.clog("a0", "m0")
    answers: list[Any] = []
    for _ in range(2):
        tool.connect().ask(SetNumReplicas, 0).then(
            lambda *answer: answers.append(answer),
            lambda code, text: answers.append((code, text)),
        )
    scene.sim.run(0.5)
    assert not answers
    scene.cluster.crash("m0")
    scene.sim.run_until(lambda: len(answers) == 2, 5)
    assert all(len(answer) == 2 and answer[0] for answer in answers), answers
    scene.sim.heal()
    scene.cluster.restart("m0")
    scene.sim.run_until(lambda: scene.cluster.healthy, 20)
    scene.sim.clog("a0", "m0")
    gone = tool.connect()
    gone.ask(SetNumReplicas, 0)
    scene.sim.run(0.5)
    gone.close("gone")
    scene.sim.heal()
    scene.sim.run(1)
    assert tool.ask(SetNumReplicas, 0)
