"""Whole clusters: the usual life, each kind of crash, and random faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neo.lib.connection import Connection
from neo.lib.handler import Handler
from neo.lib.protocol import (
    READABLE,
    AcceptIdentification,
    AddPendingNodes,
    ClusterState,
    NodeType,
    SetNumReplicas,
    TweakPartitionTable,
)
from tests.history import CONFLICT, OK
from tests.simulation.cluster import CLUSTER, Cluster, Shape, transactions_of
from tests.simulation.disk import Disk
from tests.simulation.faults import KINDS
from tests.simulation.objects import Change, Objects
from tests.simulation.runtime import SimRuntime, Simulation, SimulationFailed
from tests.simulation.scenario import Options, Run, shrink
from tests.simulation.workload import ALL, Tokens

SHAPES = [
    Shape(),
    Shape(storages=2, partitions=3, clients=2, threads=2),
    Shape(masters=2, storages=3, replicas=1, partitions=4, clients=2, admins=1),
    Shape(storages=2, replicas=1, partitions=2, dedup=True, compress=True),
]


class World:
    """A running cluster with its workload, without faults of its own."""

    def __init__(self, shape: Shape, seed: int | str = 0) -> None:
        self.sim = Simulation(seed)
        self.cluster = Cluster(self.sim, shape)
        self.tokens = Tokens(self.sim)
        self.cluster.start()
        self.sim.run_until(lambda: self.cluster.healthy, 20)
        self.cluster.call(self.tokens.create, self.cluster.storage())
        for name in self.cluster.clients:
            for _ in range(shape.threads):
                self.tokens.start(name, self.cluster.storage(name))

    def commits(self, count: int, within: float = 30) -> None:
        """Wait for some more commits."""
        expected = self.tokens.committed + count
        self.sim.run_until(lambda: self.tokens.committed >= expected, within)

    def audit(self) -> None:
        """Stop the work and check all."""
        self.sim.run_until(lambda: self.cluster.healthy, 60)
        self.tokens.stopping = True
        self.sim.run_until(lambda: not self.tokens.running, 60)
        self.sim.run(3)
        replicas = self.cluster.replicas()
        metadata = transactions_of(replicas)
        self.cluster.call(self.tokens.check, self.cluster.storage(), replicas, metadata)
        assert self.cluster.leftovers() == {}


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_usual_life(shape: Shape) -> None:
    world = World(shape)
    world.commits(100)
    world.audit()
    cells = world.cluster.replicas()
    assert len(cells) == shape.partitions * (shape.replicas + 1)
    failed = [a for a in world.tokens.attempts if a.outcome in ("fail", "unknown")]
    assert failed == []


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("shape", SHAPES[2:], ids=repr)
def test_storages_crash_in_turn(shape: Shape, power: bool) -> None:
    world = World(shape)
    for _ in range(2):
        for name in world.cluster.storages:
            world.commits(10)
            world.cluster.crash(name, power)
            world.commits(10)
            world.cluster.restart(name)
            world.sim.run_until(lambda: world.cluster.healthy, 30)
    world.audit()


@pytest.mark.parametrize("masters", [1, 2, 3])
def test_primary_crashes(masters: int) -> None:
    world = World(Shape(masters=masters, storages=2, replicas=1, clients=2))
    for _ in range(4):
        world.commits(10)
        primary = next(
            name
            for name in world.cluster.masters
            if world.sim.app(name) is world.cluster.primary
        )
        world.cluster.crash(primary)
        if masters > 1:
            world.commits(5)
        world.cluster.restart(primary)
    world.commits(10)
    world.audit()


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_all_nodes_crash(shape: Shape, power: bool) -> None:
    world = World(shape)
    for _ in range(5):
        world.commits(10)
        for name in world.cluster.nodes:
            world.cluster.crash(name, power)
        world.sim.run(1)
        world.cluster.restart()
    world.commits(10)
    world.audit()


def test_clients_crash_at_any_moment() -> None:
    world = World(Shape(storages=2, replicas=1, partitions=2, clients=3, threads=2))
    rng = world.sim.rng("faults")
    for _ in range(30):
        world.sim.run(rng.random() * 0.3)
        name = rng.choice(world.cluster.clients[1:])
        world.cluster.crash(name)
        world.sim.restart(name)
        world.tokens.start(name, world.cluster.storage(name))
    world.commits(10)
    world.audit()


def test_clean_stop_of_storages() -> None:
    """They leave one after the other, with an empty write-ahead log, and come back."""
    world = World(Shape(storages=2, replicas=1, partitions=2))
    for name in world.cluster.storages:
        process = world.cluster.process(name)
        process.app.shutdown()
        world.sim.run_until(lambda p=process: not p.alive, 10)
        assert process.status == 0
        world.commits(5)
        world.sim.restart(name)
        world.sim.run_until(lambda: world.cluster.healthy, 30)
    world.audit()


def test_failing_disk_stops_its_storage_only() -> None:
    world = World(Shape(storages=2, replicas=1, partitions=2))
    world.commits(10)
    disk = world.cluster.disks["s0"]

    def fail(durable: bool) -> None:
        raise OSError(28, "No space left on device")

    disk.fail = fail
    process = world.cluster.process("s0")
    world.sim.run_until(lambda: not process.alive, 10)
    assert process.status == 1
    world.commits(10)
    disk.fail = None
    world.sim.restart("s0")
    world.sim.run_until(lambda: world.cluster.healthy, 30)
    world.audit()


def test_lost_disk_is_replicated_again() -> None:
    """An empty storage has another identity: the others go on without the old one."""
    world = World(Shape(storages=2, replicas=1, partitions=2))
    world.commits(10)
    world.sim.run_until(lambda: world.cluster.healthy, 20)
    world.cluster.crash("s1")
    world.sim.run(0.1)  # what it said before arrives, and is true
    world.cluster.disks["s1"].erase()
    world.commits(10)
    world.sim.restart("s1")
    world.commits(10)
    primary = world.cluster.primary
    assert primary is not None
    assert all(len(nids) == 1 for nids in primary.pt.readable)


def test_disk_keeps_what_was_durable() -> None:
    sim = Simulation()
    for _ in range(20):
        disk = Disk(sim)
        backend = disk.open()
        backend.begin(True)
        backend.set_name("durable")
        backend.commit()
        backend.begin(False)
        backend.set_nid(3)
        backend.commit()
        assert disk.open().settings().nid == 3  # as after kill -9
    found = set()
    for _ in range(20):
        disk = Disk(sim)
        backend = disk.open()
        backend.begin(True)
        backend.set_name("durable")
        backend.commit()
        backend.begin(False)
        backend.set_nid(3)
        backend.commit()
        disk.power_loss()
        settings = disk.open().settings()
        assert settings.name == "durable"
        found.add(settings.nid)
    assert found == {None, 3}


def test_workload_reaches_what_it_should() -> None:
    """Conflicts, resolved ones, checks: else the runs below prove little."""
    world = World(Shape(storages=2, partitions=3, clients=3, threads=2))
    world.commits(150)
    world.audit()
    good = [a for a in world.tokens.attempts if a.outcome == OK]
    assert any(a.resolved for a in good)
    assert any(a.checked for a in good)
    assert any(len(a.written) == 3 for a in good)
    outcomes = {a.outcome for a in world.tokens.attempts}
    assert outcomes == {"ok", "conflict", "read"}
    assert {oid for a in good for oid in a.written} == set(ALL)
    primary = world.cluster.primary
    assert primary is not None
    assert world.cluster.state_of(primary) is ClusterState.RUNNING
    assert all(state in READABLE for _, _, state in primary.pt)


class Closer(Handler):
    """A primary that accepts whoever comes, and closes."""

    def __init__(self, runtime: SimRuntime, nid: int) -> None:
        super().__init__()
        self.runtime = runtime
        self.nid = nid
        self.accepted = 0

    def start(self) -> None:
        self.runtime.listen(("127.0.0.1", 10000), self.accept)

    def accept(self, conn: Connection) -> None:
        conn.handler = self

    def request_identification(self, conn: Connection, *args: Any) -> None:
        self.accepted += 1
        conn.answer(AcceptIdentification, NodeType.MASTER, -0x0FFFFFFF, self.nid)
        conn.abort()


@pytest.mark.parametrize(("name", "nid"), [("s0", 1), ("a0", -0x2FFFFFFF)])
def test_sessions_that_end_at_once(name: str, nid: int) -> None:
    """They are not begun again without a pause."""
    sim = Simulation()
    cluster = Cluster(sim, Shape(admins=1))
    sim.start("m0", lambda runtime: Closer(runtime, nid))
    cluster.start(name)
    sim.run(20)
    assert 15 <= sim.app("m0").accepted <= 42


@pytest.mark.parametrize("is_running", [False, True])
def test_empty_storages_with_one_nid(is_running: bool) -> None:
    """Each got it from another master; or its owner has data meanwhile."""
    sim = Simulation()
    cluster = Cluster(sim, Shape(storages=2, replicas=1, partitions=2))
    for name in cluster.storages:
        backend = cluster.disks[name].open()
        backend.begin(True)
        backend.set_name(CLUSTER)
        backend.set_nid(1)
        backend.commit()
    if is_running:
        cluster.autostart = 1
        cluster.start("m0", "s0")
        sim.run_until(lambda: cluster.running, 20)
        cluster.start("s1")
    else:
        cluster.start("m0", "s0", "s1")
    sim.run_until(
        lambda: {sim.app(name).nid for name in cluster.storages} == {1, 2}, 20
    )
    assert sim.app("s0").nid == 1 or not is_running


@pytest.mark.parametrize("first", ["s1", "s2"])
@pytest.mark.parametrize("restarted", [False, True], ids=["", "restarted"])
def test_storage_that_was_forgotten(first: str, restarted: bool) -> None:
    """It had no cell, and its nid was given to another storage."""
    sim = Simulation()
    cluster = Cluster(sim, Shape(storages=1, admins=1, spares=2, partitions=2))
    cluster.start()
    sim.run_until(lambda: cluster.running, 20)
    cluster.start("s1")
    sim.run_until(lambda: sim.app("s1").nid == 2, 20)
    sim.run(1)
    sim.crash("s1")
    sim.run(1)
    cluster.start("s2")
    sim.run_until(lambda: sim.app("s2").nid == 2, 20)
    sim.run(1)
    for packet, *args in (
        (AddPendingNodes, [2]),
        (SetNumReplicas, 1),
        (TweakPartitionTable, False, []),
    ):
        cluster.command(packet, *args)
        sim.run(2)
    assert sim.app("m0").pt.readable_nids() == [1, 2]
    sim.crash("s2")
    if restarted:
        sim.crash("m0")
        cluster.start("m0")
    second = {"s1": "s2", "s2": "s1"}[first]
    cluster.start(first)
    sim.run(3)
    cluster.start(second)
    sim.run_until(lambda: cluster.healthy and sim.app("s1").nid == 3, 20)
    assert sim.app("s2").nid == 2
    assert cluster.replicas()


@pytest.mark.parametrize("seed", range(3))
def test_objects_reach_what_they_should(seed: int) -> None:
    """ZODB's own workload: conflicts, resolved ones too, undo."""
    shape = Shape(storages=2, partitions=3, clients=3, threads=1, replicas=1)
    options = Options(shape, every=1e9, commits=400, think=0.05, objects=True)
    run = Run(seed, options=options)
    run.execute()
    outcomes = Counter((c.kind, c.outcome) for c in run.objects.changes)
    for kind in ("insert", "move", "vote", "undo"):
        assert outcomes[kind, OK] > 5, outcomes
    for kind in ("move", "undo"):
        assert outcomes[kind, CONFLICT] > 0, outcomes
    # All of them change the same counter, at the same time.
    assert outcomes["vote", OK] > 5 * outcomes["vote", CONFLICT], outcomes


def test_objects_that_are_wrong() -> None:
    """What the workload looks at in each snapshot, and at the end."""
    sim = Simulation()
    cluster = Cluster(sim, Shape())
    cluster.start()
    sim.run_until(lambda: cluster.healthy, 20)
    objects = Objects(sim, 0.1)
    cluster.call(objects.create, "c0", cluster.storage())

    def spoil(change: Callable[[Any], object]) -> None:
        conn = objects._connect(sim.processes["c0"], cluster.storage())
        change(conn.root())
        conn.transaction_manager.commit()

    def check(wrong: str) -> None:
        with pytest.raises(SimulationFailed, match=wrong):
            cluster.call(objects.check, "c0", cluster.storage())

    objects.changes.append(Change("lost", "insert", OK))
    check("P1: .*lost.* is there 0 times")
    objects.changes[:] = [Change("vote", "vote", OK)]
    check("P1: 0 votes, not 1 to 1")
    objects.changes.clear()
    cluster.call(spoil, lambda root: root["tree"].setdefault("x", "strange"))
    check("P4: 1 keys, 0 were counted")
    cluster.call(spoil, lambda root: root["count"].change(1))
    check("P9: .*strange.* come from nowhere")
    objects.changes.append(Change("strange", "insert", CONFLICT))
    check("P9: .*strange.* is there")
    cluster.call(spoil, lambda root: setattr(root["ring"][3], "next", root["ring"][2]))
    check("P4: the ring is broken")


# --- random runs ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_of_fault(kind: str) -> None:
    shape = Shape(2, 3, 1, 3, 2, 2, 1, spares=1)
    Run(f"kind {kind}", shape=shape, kinds=[kind], every=0.5).execute()


def execute(
    seed: int, changes: dict[str, Any], config: pytest.Config, marks: Counter[str]
) -> None:
    """One run, as the command line wants it."""
    changes = {**changes, **json.loads(config.getoption("--options", "{}"))}
    options = Options.drawn(seed).changed(changes)
    if config.getoption("--shrink", False):
        options = shrink(seed, options, print)
    path = config.getoption("--trace-file", None)
    run = Run(seed, options=options, trace=True if path else None)
    try:
        run.execute()
    finally:
        if path:
            Path(path).write_text(run.sim.report(None))
        marks.update(run.sim.marks)


def test_random(
    random_seed: int, request: pytest.FixtureRequest, marks: Counter[str]
) -> None:
    """Anything at any time."""
    execute(random_seed, {}, request.config, marks)


def test_kept(
    kept_seed: tuple[int, dict[str, Any], str],
    request: pytest.FixtureRequest,
    marks: Counter[str],
) -> None:
    """What failed once."""
    seed, changes, _ = kept_seed
    execute(seed, changes, request.config, marks)


def digest(seed: int) -> str:
    run = Run(seed)
    run.execute(10)
    return run.sim.digest


def test_same_seed_same_run() -> None:
    seeds = range(4)
    digests = [digest(seed) for seed in seeds]
    assert len(set(digests)) == len(digests)
    assert [digest(seed) for seed in seeds] == digests
    for hash_seed in "12":
        output = subprocess.run(
            [
                sys.executable,
                "-c",
                "from tests.simulation.test_cluster import digest\n"
                f"for seed in {list(seeds)}: print(digest(seed))",
            ],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert output == digests
