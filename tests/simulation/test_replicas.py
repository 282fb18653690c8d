"""Replicas under failure: replication, checks, repairs, tweaks (testing.md 9)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from neo.lib.connection import Connection
from neo.lib.handler import Handler
from neo.lib.protocol import (
    READABLE,
    ZERO_TID,
    AddPendingNodes,
    AskCheck,
    CellState,
    ErrorCode,
    Packet,
    Repair,
    SetNodeState,
    SetNumReplicas,
    TweakPartitionTable,
)
from neo.lib.protocol import NodeState as N
from neo.storage import checking, replication
from neo.storage.client import ClientHandler
from tests.simulation.cluster import Shape
from tests.simulation.runtime import HOST
from tests.simulation.test_cluster import World

STANDARD = Shape(masters=2, storages=3, replicas=1, partitions=12, clients=3, admins=1)
PAIR = Shape(storages=2, replicas=1, partitions=2, clients=2, admins=1)


class Tool(Handler):
    """What neoctl does: a process that asks the admin."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.answers: list[Any] = []
        world.sim.start("tool", self._start)
        self.connect()

    def _start(self, runtime: Any) -> Tool:
        self.runtime = runtime
        return self

    def connect(self) -> Connection:
        """The connection to the admin, which closes it if nothing is asked for long."""
        address = self.world.cluster.addresses["a0"]
        self.conn: Connection = self.runtime.connect(address, self)
        self.conn.trust()
        self.world.sim.run_until(lambda: self.conn.is_established, 5)
        return self.conn

    def check(self) -> None:
        """Part of an application."""

    def closed(self, conn: Connection) -> None:
        """Asked again by `ask`."""

    def ask(self, packet: Packet[...], *args: Any) -> Any:
        """Arguments of the answer, or (code, text)."""
        sim = self.world.sim
        answers: list[Any] = []
        self.connect().ask(packet, *args).then(
            lambda *answer: answers.append(answer),
            lambda code, text: answers.append((code, text)),
        )
        sim.run_until(lambda: bool(answers), 60)
        return answers[0]

    def text(self, packet: Packet[...], *args: Any) -> str:
        """Ask for what is only acknowledged."""
        answer = self.ask(packet, *args)
        assert len(answer) == 1, answer
        return str(answer[0])

    def tweak(self, *nids: int) -> bool:
        """Whether something changed."""
        changed, _ = self.ask(TweakPartitionTable, False, nids)
        return bool(changed)

    def check_all(self, reference: int | None = None, repair: bool = False) -> Any:
        """(nid, missing, extra, different, damaged, repaired), of cells that differ."""
        partitions = dict.fromkeys(
            range(self.world.cluster.shape.partitions), reference
        )
        (cells,) = self.ask(AskCheck, partitions, ZERO_TID, None, repair)
        assert not any(cell[-1] for cell in cells), [cell[-1] for cell in cells]
        return [cell[1:-1] for cell in cells if any(cell[2:-1])]


def execute(world: World, name: str, sql: str) -> int:
    """Change the database of a node behind its back; how many rows."""
    connection = world.sim.app(name).backend._connection
    count: int = connection.execute(sql).rowcount
    return count


def totals(cells: Any) -> dict[int, list[int]]:
    """Sums of (missing, extra, different, damaged, repaired) by nid."""
    result: dict[int, list[int]] = {}
    for nid, *counts in cells:
        before = result.get(nid, [0] * 5)
        result[nid] = [a + b for a, b in zip(before, counts, strict=True)]
    return result


def nid_of(world: World, name: str) -> int:
    nid: int = world.sim.app(name).nid
    return nid


def pause(world: World) -> None:
    """Let the applications stop, and all they did be applied."""
    world.tokens.stopping = True
    world.sim.run_until(lambda: not world.tokens.running, 60)
    world.sim.run(3)


def resume(world: World) -> None:
    world.tokens.stopping = False
    for name in world.cluster.clients:
        world.tokens.start(name, world.cluster.storage(name))


# Why a command fails: later, not in this state, the primary is gone.
LOST = ErrorCode.NOT_READY, ErrorCode.DENIED, ErrorCode.PROTOCOL_ERROR

DAMAGE = {
    "value": "UPDATE data SET value = x'00' || value",
    "hash": "UPDATE data SET hash = zeroblob(20)",
    "row": "DELETE FROM data",
    "type": "UPDATE data SET value = 'text'",
}


# --- checks and repairs ---------------------------------------------------------------


@pytest.mark.parametrize(("how", "dedup"), [("value", False), ("row", True)])
def test_damaged_value_is_repaired_when_it_is_read(how: str, dedup: bool) -> None:
    """Row 23: it is never returned as good, and no operator is needed."""
    shape = Shape(storages=2, replicas=1, partitions=2, clients=2, dedup=dedup)
    world = World(shape)
    world.commits(30)
    pause(world)
    assert execute(world, "s1", DAMAGE[how]) > 30
    resume(world)
    world.commits(50)
    pause(world)
    # Old revisions are read by the audit only; repeatedly, for half of the reads only
    # are for the damaged replica.
    for _ in range(10):
        storage = world.cluster.storage()
        storage._core.cache.clear()
        world.cluster.call(world.tokens.check, storage)
        world.sim.run(2)
    world.audit()


@pytest.mark.parametrize("how", DAMAGE)
def test_check_and_repair(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 23: values damaged, rows missing, on one replica."""
    monkeypatch.setattr(checking, "CHUNK", 7)
    monkeypatch.setattr(checking, "SLICE", 3)
    world = World(PAIR)
    world.commits(60)
    tool = Tool(world)
    assert tool.check_all() == []  # while clients are active
    pause(world)
    damaged = execute(world, "s1", DAMAGE[how] + " WHERE id % 3 = 0")
    rows = execute(world, "s1", "DELETE FROM obj WHERE oid % 4 = 1 AND data_id % 3")
    rows += execute(world, "s1", "DELETE FROM trans WHERE tid % 5 = 0")
    assert damaged > 5
    assert rows > 5
    nid = nid_of(world, "s1")
    expected = [rows, 0, 0, damaged]
    assert totals(tool.check_all()) == {nid: [*expected, 0]}
    assert totals(tool.check_all(repair=True)) == {nid: [*expected, rows + damaged]}
    assert tool.check_all() == []
    tool.text(Repair, [nid], False)  # the values of the rows that were deleted
    resume(world)
    world.commits(20)
    world.audit()


def test_check_with_reference() -> None:
    """What is different: only an administrator knows who is right."""
    world = World(PAIR)
    world.commits(60)
    tool = Tool(world)
    pause(world)
    different = execute(
        world,
        "s1",
        "UPDATE trans SET user = 'other' WHERE tid % 3 = 0 AND tid % 4 != 1",
    ) + execute(
        world,
        "s1",
        "UPDATE obj SET data_id = (SELECT MIN(id) FROM data) WHERE tid % 4 = 0"
        " AND data_id != (SELECT MIN(id) FROM data)",
    )
    rows = execute(world, "s0", "DELETE FROM trans WHERE tid % 4 = 1")
    assert different > 5
    s0, s1 = nid_of(world, "s0"), nid_of(world, "s1")
    found = totals(tool.check_all())
    assert found[s0][0] == rows
    assert found[s0][2] == found[s1][2] > 5
    # Without reference only what is missing is repaired.
    assert totals(tool.check_all(repair=True))[s0][4] == rows
    found = totals(tool.check_all())
    assert set(found) == {s0, s1}
    rows = execute(world, "s0", "DELETE FROM trans WHERE tid % 4 = 1")
    found = totals(tool.check_all(s0, repair=True))
    assert found[s1][1] == rows  # s0 is right, so they must go
    assert found[s1][2] == found[s1][4] - rows == different
    assert tool.check_all() == []
    assert tool.check_all(s1) == []


@pytest.mark.parametrize("names", [["s1"], ["s0", "s1"], ["m0"]], ids=repr)
def test_check_is_interrupted(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica dies, the operation ends: the administrator is told."""
    monkeypatch.setattr(checking, "CHUNK", 2)
    world = World(PAIR)
    world.commits(20)
    tool = Tool(world)
    answers: list[Any] = []
    told = 0
    for delay in (0.01, 0.02, 0.03, 0.04):
        tool.connect().ask(AskCheck, {0: None, 1: None}, ZERO_TID, None, True).then(
            answers.append, lambda code, text: answers.append((code, text))
        )
        world.sim.run(delay)
        for name in names:
            world.cluster.crash(name)
        world.sim.run_until(lambda: answers, 30)
        answer = answers.pop()
        if names == ["s1"]:
            told += any(cell[-1] for cell in answer)
        else:
            assert answer[0] in (*LOST, None), answer
            told += 1
        world.cluster.restart(*names)
        world.commits(5)
        world.sim.run_until(lambda: world.cluster.healthy, 30)
    assert told
    world.audit()


# --- reads ----------------------------------------------------------------------------


def test_reads_are_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    """And cells that are out of date are never read."""
    counts: Counter[int] = Counter()
    ask_object = ClientHandler.ask_object

    def count(self: ClientHandler, conn: Connection, oid: bytes, *args: Any) -> None:
        node = self.operation.node
        counts[node.nid or 0] += 1
        assert node.is_readable(node.pt.partition_of(oid)), "never asked for"
        ask_object(self, conn, oid, *args)

    monkeypatch.setattr(ClientHandler, "ask_object", count)
    world = World(PAIR)
    world.commits(200)
    first, second = counts[nid_of(world, "s0")], counts[nid_of(world, "s1")]
    assert min(first, second) > 0.3 * (first + second) > 30
    monkeypatch.undo()
    world.audit()


# --- replication ----------------------------------------------------------------------


@pytest.mark.parametrize("who", ["s0", "s1", "m0", "link"])
def test_interrupted_replication(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each phase, again and again: it goes on, and the replicas get identical."""
    monkeypatch.setattr(replication, "CHUNK", 4)
    monkeypatch.setattr(replication, "PIECE", 2)
    world = World(Shape(storages=3, replicas=1, partitions=3, clients=2))
    rng = world.sim.rng("faults")
    for _ in range(6):
        world.cluster.crash("s2")
        world.commits(15)
        world.cluster.restart("s2")
        world.sim.run_until(
            lambda: (app := world.sim.app("s2")) and app.operation is not None, 20
        )
        world.sim.run(rng.random() * 0.05)
        if who == "link":
            world.sim.reset("s2", rng.choice(["s0", "s1"]))
        else:
            world.cluster.crash(who)
            world.sim.run(rng.random())
            world.cluster.restart(who)
        world.sim.run_until(lambda: world.cluster.healthy, 40)
    world.audit()


def test_rows_that_came_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell is assigned again while its old rows are being deleted (scenario 134)."""
    monkeypatch.setattr(replication, "CHUNK", 4)
    world = World(Shape(storages=3, replicas=1, partitions=6, clients=2, admins=1))
    tool = Tool(world)
    world.commits(60)
    for _ in range(4):
        nids = [nid_of(world, name) for name in world.cluster.storages]
        left_out = nids[world.sim.rng("faults").randrange(3)]
        tool.tweak(left_out)
        world.sim.run(world.sim.rng("faults").random())
        tool.tweak()
        world.commits(10)
    world.sim.run_until(lambda: not world.sim.run(1) and world.cluster.healthy, 60)
    assert tool.check_all() == []
    world.audit()


# --- who has what ---------------------------------------------------------------------


def test_more_replicas_then_less() -> None:
    """Scenario 133, with clients."""
    world = World(Shape(storages=3, replicas=0, partitions=6, clients=2, admins=1))
    tool = Tool(world)
    for replicas in (1, 2, 0, 1):
        tool.text(SetNumReplicas, replicas)
        assert tool.tweak()
        assert not tool.tweak()  # scenario 127
        world.commits(20)
        world.sim.run_until(lambda: world.cluster.healthy, 60)
        primary = world.cluster.primary
        assert primary is not None
        assert all(len(row) == replicas + 1 for row in primary.pt.rows)
    world.audit()


def test_lost_disk_is_replaced() -> None:
    """Row 25: by an empty one, in a few commands; no data is ever missing."""
    world = World(STANDARD)
    tool = Tool(world)
    world.commits(20)
    old = nid_of(world, "s1")
    world.cluster.crash("s1", power=True)
    world.sim.run(0.1)  # what it said before arrives, and is true
    world.cluster.disks["s1"].erase()
    world.commits(20)
    world.sim.restart("s1")
    world.sim.run_until(lambda: nid_of(world, "s1") not in (None, old), 20)
    new = nid_of(world, "s1")
    tool.text(AddPendingNodes, [new])
    _, text = tool.ask(TweakPartitionTable, False, [])
    assert "down nodes must be listed" in text
    assert tool.tweak(old)
    primary = world.cluster.primary
    assert primary is not None

    def replicated() -> bool:
        return all(
            state is CellState.UP_TO_DATE for _, nid, state in primary.pt if nid != old
        )

    world.sim.run_until(replicated, 60)
    assert tool.text(SetNodeState, old, N.UNKNOWN) == "node permanently removed"
    world.commits(20)
    assert all(len(row) == 2 for row in primary.pt.rows)
    assert tool.check_all() == []
    world.audit()


@pytest.mark.parametrize("seed", range(3))
def test_killed_while_the_table_changes(seed: int) -> None:
    """Row 27: add, tweak, drop, with nodes that die meanwhile; it can be repeated."""
    world = World(STANDARD, seed)
    rng = world.sim.rng("faults")
    for _ in range(5):
        tool = Tool(world)
        action = rng.choice(["tweak", "replicas", "leave", "kill"])
        nids = [nid_of(world, name) for name in world.cluster.storages]
        if action == "tweak":
            tool.conn.ask(TweakPartitionTable, False, [])
        elif action == "replicas":
            tool.conn.ask(SetNumReplicas, rng.choice([1, 2]))
            tool.conn.ask(TweakPartitionTable, False, [])
        elif action == "leave":
            tool.conn.ask(TweakPartitionTable, False, [rng.choice(nids)])
        else:
            tool.conn.ask(SetNodeState, rng.choice(nids), N.DOWN)
        world.sim.run(rng.random() * 0.1)
        victim = rng.choice([*world.cluster.masters, *world.cluster.storages])
        if world.cluster.process(victim).alive:
            world.cluster.crash(victim, power=rng.random() < 0.5)
        world.sim.run(rng.random() * 2)
        # Who was told to stop does so later.
        world.sim.run_until(
            lambda: world.cluster.restart() or world.cluster.healthy, 60
        )
        world.sim.crash("tool")
    tool = Tool(world)
    tool.text(SetNumReplicas, 1)
    tool.tweak()
    world.sim.run_until(lambda: world.cluster.healthy, 60)
    primary = world.cluster.primary
    assert primary is not None
    assert all(len(row) == 2 for row in primary.pt.rows)
    assert tool.check_all() == []
    world.audit()


def copy_disk(world: World, name: str) -> bytes:
    """What is on the disk of a node."""
    image: bytes | None = world.cluster.disks[name].latest
    assert image is not None
    return image


def put_back(world: World, name: str, image: bytes) -> None:
    """Replace the content of the disk of a node that is down."""
    world.cluster.disks[name].put(image)


@pytest.mark.parametrize(("name", "power"), [("s0", True), ("s2", False)])
def test_older_copy_of_a_disk(name: str, power: bool) -> None:
    """Row 24: noticed before it serves, out of date, caught up."""
    world = World(Shape(storages=3, replicas=1, partitions=6, clients=2, admins=1))
    tool = Tool(world)
    world.commits(20)
    image = copy_disk(world, name)
    world.commits(20)
    for other in world.cluster.nodes:
        world.cluster.crash(other, power)
    put_back(world, name, image)
    nid = nid_of_disk(world, name)
    world.cluster.restart()
    lines: list[str] = []
    primary = world.sim.app("m0")
    primary.log.error = lambda text, *args: lines.append(text % args)
    world.sim.run_until(lambda: world.cluster.running, 20)
    late = [p for p, n, state in primary.pt if state is CellState.OUT_OF_DATE]
    assert late
    assert all(n == nid for _, n, s in primary.pt if s is CellState.OUT_OF_DATE)
    assert len(lines) == len(late)
    assert all("is old" in line for line in lines)
    world.commits(20)
    world.sim.run_until(lambda: world.cluster.healthy, 60)
    assert tool.check_all() == []
    world.audit()


def nid_of_disk(world: World, name: str) -> int | None:
    return world.cluster.disks[name].open().settings().nid


def test_clone() -> None:
    """Scenario 132: a copied database gets an id of its own, and what it lacks."""
    world = World(Shape(storages=3, replicas=1, partitions=2, clients=2))
    world.commits(30)
    # The third one leaves; its place is for the clone.
    world.sim.run(1)
    image = copy_disk(world, "s0")
    world.commits(30)
    world.cluster.crash("s2")
    put_back(world, "s2", image)
    primary = world.cluster.primary
    assert primary is not None
    before = {nid for _, nid, _ in primary.pt}
    make = world.cluster._make_s

    def clone(runtime: Any, new_nid: bool = False) -> Any:
        node = make("s2")(runtime)
        # At another address: the lost one is not to be taken for it.
        options = {"bind": (HOST, 20009), "new_nid": new_nid}
        node.options = replace(node.options, **options)
        return node

    world.sim.start("s2", lambda runtime: clone(runtime, new_nid=True))
    process = world.cluster.process("s2")
    world.sim.run_until(lambda: not process.alive, 20)
    assert process.status == 0
    world.commits(10)
    world.sim.start("s2", clone)
    world.sim.run_until(lambda: world.sim.app("s2").operation is not None, 20)
    (new,) = {nid for _, nid, _ in primary.pt} - before
    assert nid_of(world, "s2") == new
    world.sim.run_until(
        lambda: all(s in READABLE for _, n, s in primary.pt if n == new), 30
    )
    assert primary.pt.assigned(new)
    world.tokens.stopping = True
    world.sim.run_until(lambda: not world.tokens.running, 60)
    world.sim.run(3)
    world.cluster.call(
        world.tokens.check, world.cluster.storage(), world.cluster.replicas()
    )
