"""Masters under failure: takeover, silence, splits, clocks, stops (testing.md 9)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from neo.lib.connection import Connection
from neo.lib.handler import Handler
from neo.lib.protocol import (
    AddPendingNodes,
    AskMonitorInformation,
    ClusterState,
    Packet,
    SetClusterState,
    Truncate,
    TweakPartitionTable,
)
from neo.lib.util import Address
from tests.history import OK
from tests.simulation.cluster import Shape, transactions_of
from tests.simulation.runtime import SimRuntime
from tests.simulation.test_cluster import World

STANDARD = Shape(masters=2, storages=3, replicas=1, partitions=12, clients=2, admins=1)


QUIET = Shape(masters=2, storages=3, replicas=1, partitions=3, clients=2)


def world_of(shape: Shape = STANDARD, think: float = 0.1, seed: int = 0) -> World:
    """A running cluster whose clients are not too busy: much time passes here."""
    world = World(shape, seed)
    world.tokens.think = think
    world.commits(10)
    return world


def primary_of(world: World) -> str:
    """Name of the primary."""
    primary = world.cluster.primary
    assert primary is not None
    return next(
        name for name in world.cluster.masters if world.sim.app(name) is primary
    )


def gap(world: World, since: float) -> float:
    """Longest time without a commit since then, until now."""
    ends = sorted(
        a.end for a in world.tokens.attempts if a.outcome == OK and a.end >= since
    )
    times = [since, *ends, world.sim.time]
    return max(b - a for a, b in pairwise(times))


def running_masters(world: World) -> list[str]:
    """Those that think that they run the cluster."""
    return [
        name
        for name in world.cluster.masters
        if (app := world.sim.app(name)) is not None
        and not world.cluster.process(name).paused
        and world.cluster.state_of(app) is ClusterState.RUNNING
    ]


# --- the primary dies -----------------------------------------------------------------


@pytest.mark.parametrize("power", [False, True])
def test_takeover(power: bool) -> None:
    """Row 4. When the machine dies, its silence must be noticed first."""
    world = world_of()
    for _ in range(4):
        world.commits(10)
        name = primary_of(world)
        since = world.sim.time
        world.cluster.crash(name, power)
        world.commits(20)
        assert gap(world, since) <= (15 if power else 1.5), since
        world.cluster.restart(name)
        world.sim.run(1)
    world.audit()


def test_sole_master_restarts() -> None:
    """Row 5."""
    world = world_of(Shape(storages=3, replicas=1, partitions=12, clients=3))
    rng = world.sim.rng("faults")
    for _ in range(10):
        world.sim.run(rng.random())
        world.cluster.crash("m0")
        world.sim.run(rng.random() * 3)
        world.cluster.restart("m0")
        since = world.sim.time
        world.commits(10)
        assert gap(world, since) <= 2, since
    world.audit()


def test_paused_primary() -> None:
    """Row 10: replaced; when it goes on, it steps down and acknowledges nothing."""
    world = world_of()
    name = primary_of(world)
    since = world.sim.time
    world.sim.pause(name)
    world.commits(20)
    world.sim.run(since + 60 - world.sim.time)
    assert gap(world, since) <= 15
    world.sim.resume(name)
    since = world.sim.time
    world.sim.run(5)
    assert gap(world, since) <= 1
    assert running_masters(world) == [m for m in world.cluster.masters if m != name]
    world.audit()


def test_paused_storage() -> None:
    """Row 9: expelled; when it goes on, it notices and catches up."""
    for seconds in 15, 40:
        world = world_of()
        since = world.sim.time
        world.sim.pause("s1")
        world.sim.run(seconds)
        assert gap(world, since) <= 15
        world.sim.resume("s1")
        since = world.sim.time
        world.sim.run_until(lambda w=world: w.cluster.healthy, 10)
        assert gap(world, since) <= 1
        world.audit()


def test_paused_storage_that_is_indispensable() -> None:
    """Row 9: nobody is expelled, all goes on when the storage does."""
    world = world_of(Shape(masters=2, storages=2, partitions=2, clients=2))
    world.sim.pause("s1")
    world.sim.run(60)
    world.sim.resume("s1")
    since = world.sim.time
    world.commits(10)
    assert gap(world, since) <= 5
    world.audit()


# --- links ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair", ["ps", "sp", "pp2", "p2p", "pc", "cp"], ids=lambda pair: pair
)
def test_silent_link(pair: str) -> None:
    """Row 15, for the links of the primary, each direction."""
    world = world_of()
    primary = primary_of(world)
    other = next(name for name in world.cluster.masters if name != primary)
    names = {"ps": (primary, "s1"), "pp2": (primary, other), "pc": (primary, "c1")}
    src, dst = names.get(pair) or {
        "sp": ("s1", primary), "p2p": (other, primary), "cp": ("c1", primary)
    }[pair]  # fmt: skip
    since = world.sim.time
    world.sim.clog(src, dst)
    world.sim.run(30)
    world.sim.unclog(src, dst)
    assert gap(world, since) <= 15
    world.sim.run(5)
    assert gap(world, since) <= 15
    world.audit()


SPLITS = [
    (["p", "s0", "s1"], ["o", "s2"]),
    (["p", "s0", "s2"], ["o", "s1"]),
    (["p", "s1", "s2"], ["o", "s0"]),
    (["p", "s0"], ["o", "s1", "s2"]),
    (["p", "s1"], ["o", "s0", "s2"]),
    (["p", "s2"], ["o", "s0", "s1"]),
    (["p"], ["o", "s0", "s1", "s2"]),
]


@pytest.mark.parametrize(
    ("side", "rest"), SPLITS, ids=["".join(side) for side, _ in SPLITS]
)
@pytest.mark.parametrize("clients", ["side", "rest"])
def test_split(side: list[str], rest: list[str], clients: str) -> None:
    """Row 17: at most one side goes on."""
    world = world_of()
    primary = primary_of(world)
    other = next(name for name in world.cluster.masters if name != primary)
    names = {"p": primary, "o": other}
    sides = [[names.get(name, name) for name in group] for group in (side, rest)]
    sides[clients == "rest"] += ["c0", "c1", "a0"]
    since = world.sim.time
    world.sim.partition(*sides)
    world.sim.run(20)
    for _ in range(10):
        world.sim.run(2)
        expected = {
            3: [primary],  # the primary with all partitions
            2: [],
            1: [other],  # all storages are on the other side
        }[len(side)]
        assert running_masters(world) == expected
    if expected == [primary if clients == "side" else other]:
        assert gap(world, since) <= 15
    world.sim.heal()
    since = world.sim.time
    world.commits(10)
    assert gap(world, since) <= 15
    world.audit()


def test_machine_of_the_primary_and_a_storage_dies() -> None:
    """Who is left has all data: it goes on without an operator (P16)."""
    for silent, limit in (False, 8), (True, 80):
        world = world_of()
        since = world.sim.time
        world.cluster.crash(primary_of(world), silent)
        world.cluster.crash("s1", silent)
        world.commits(10, 100)
        assert gap(world, since) <= limit
        world.cluster.restart()
        world.audit()


def test_two_storages_one_machine_dies() -> None:
    """The other storage can't know what was committed without it: it waits."""
    world = world_of(Shape(masters=2, storages=2, replicas=1, clients=2))
    world.cluster.crash(primary_of(world))
    world.cluster.crash("s1")
    world.sim.run(100)
    assert running_masters(world) == []
    world.cluster.restart("s1")
    world.commits(10)
    world.cluster.restart()
    world.audit()


@pytest.mark.parametrize("touches", ["s0", "s1", "s2"])
def test_nothing_is_acknowledged_that_the_others_miss(touches: str) -> None:
    """The primary is cut off with one storage, then both die; the others go on.

    The primary notices the silence of one of the others first, and goes on without; it
    acknowledges nothing as long as the last one doesn't know that.
    """
    world = world_of()
    primary = primary_of(world)
    side = [primary, touches, *world.cluster.clients]
    world.sim.partition(side, [n for n in world.cluster.nodes if n not in side])
    world.sim.run(14)
    world.cluster.crash(primary)
    world.cluster.crash(touches)
    world.sim.heal()
    world.commits(10)
    world.cluster.restart()
    world.audit()


# --- storages of no use ---------------------------------------------------------------


def count_losses(world: World, name: str) -> list[float]:
    """Times at which a storage loses its master, from now on."""
    app = world.sim.app(name)
    times: list[float] = []
    lost = app.master_lost

    def master_lost(conn: Any) -> None:
        times.append(world.sim.time)
        lost(conn)

    app.master_lost = master_lost
    return times


def test_clients_cannot_reach_a_healthy_storage() -> None:
    """Row 16: it is disconnected once a minute, more or less, and commits go on."""
    world = world_of(QUIET, think=1)
    since = world.sim.time
    for name in world.cluster.clients:
        world.sim.link(name, "s1").refused = True
        world.sim.reset(name, "s1")
    times = count_losses(world, "s1")
    world.sim.run(150)
    assert gap(world, since) <= 5
    assert 3 <= len(times) <= 4, times
    world.sim.heal()
    world.sim.run_until(lambda: world.cluster.healthy, 65)
    world.audit()


def test_a_link_that_breaks_once_costs_no_minute() -> None:
    """Scenario 48: the storage comes back, and is up to date, at once."""
    world = world_of(QUIET, think=1)
    for _ in range(2):
        times = count_losses(world, "s1")
        while not times:
            world.sim.reset("c0", "s1")
            world.sim.run(0.1)
        world.sim.run_until(lambda: world.cluster.healthy, 5)
        world.sim.run(121)
    world.audit()


def test_dead_storages_are_not_blamed() -> None:
    """However often they die, they come back at once (rows 1 and 2)."""
    world = world_of()
    for _ in range(5):
        world.cluster.crash("s1")
        world.commits(5)
        world.cluster.restart("s1")
        world.sim.run_until(lambda: world.cluster.healthy, 5)
    world.audit()


# --- clocks ---------------------------------------------------------------------------

STEPS = [-1, -5, -86400, 3600, 0.5]


@pytest.mark.parametrize("step", STEPS)
def test_clock_of_the_primary_steps(step: float) -> None:
    """Row 20, while running: nothing happens but a warning."""
    world = world_of()
    process = world.cluster.process(primary_of(world))
    since = world.sim.time
    for _ in range(3):
        process.skew += step
        world.commits(10)
    process.drift = -1.0  # frozen
    world.commits(10)
    rng = world.sim.rng("clock")
    for _ in range(20):
        process.skew += rng.gauss(0, 2)
        world.commits(3)
    assert gap(world, since) <= 1
    world.audit()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("masters", [1, 2])
def test_clock_of_the_next_primary(masters: int, step: float) -> None:
    """Row 20, at a restart or another master: a clock ahead is followed for ever."""
    world = world_of(replace(STANDARD, masters=masters))
    for direction in 1, -1, 1:
        name = primary_of(world)
        other = next((m for m in world.cluster.masters if m != name), name)
        world.cluster.process(other).skew += step * direction
        since = world.sim.time
        world.cluster.crash(name)
        if masters == 1:
            world.cluster.restart(name)
        world.commits(20)
        assert gap(world, since) <= 3
        if masters == 2:
            world.cluster.restart(name)
            world.sim.run(2)
    world.audit()


def test_clocks_of_all_differ() -> None:
    """Scenario 180: by hours, and all step when they like."""
    world = World(STANDARD)
    rng = world.sim.rng("clock")
    for _ in range(10):
        for process in world.sim.processes.values():
            process.skew += rng.choice([-1e5, -3600, -1, 0, 1, 3600, 1e5])
        world.commits(10)
        if rng.random() < 0.5:
            name = rng.choice(world.cluster.nodes)
            world.cluster.crash(name)
            world.cluster.restart(name)
    world.audit()


# --- for people -----------------------------------------------------------------------


class Tool(Handler):
    """`neoctl`: sends one request."""

    def __init__(
        self, runtime: SimRuntime, admin: Address, packet: Packet[...], *args: Any
    ) -> None:
        super().__init__()
        self.runtime = runtime
        self.admin = admin
        self.request = packet, args
        self.answer: tuple[Any, ...] | None = None
        self.refused: str | None = None

    def start(self) -> None:
        self.runtime.connect(self.admin, self)

    def connected(self, conn: Connection) -> None:
        packet, args = self.request
        conn.ask(packet, *args).then(self._answered, self._failed)

    def _answered(self, *answer: Any) -> None:
        self.answer = answer

    def _failed(self, code: int | None, text: str) -> None:
        self.refused = text


def command(world: World, packet: Packet[...], *args: Any) -> tuple[Any, ...]:
    """What the cluster answers to an administrator."""
    address = world.cluster.addresses["a0"]
    tool = world.sim.start("ctl", lambda rt: Tool(rt, address, packet, *args)).app
    world.sim.run_until(lambda: tool.answer is not None or tool.refused, 5)
    world.sim.crash("ctl")
    assert tool.answer is not None, tool.refused
    return tool.answer  # type: ignore[no-any-return]


def summary(world: World) -> list[str]:
    """What `neoctl print summary` shows."""
    lines: list[str] = command(world, AskMonitorInformation)[2].decode().splitlines()
    return lines


def test_summary_says_who_is_awaited() -> None:
    world = world_of()
    first, *rest = summary(world)
    assert first.startswith("RUNNING; UP_TO_DATE=24; ltid=")
    assert rest == []
    for name in world.cluster.nodes:
        world.cluster.crash(name)
    world.cluster.restart(*world.cluster.masters, "a0", "s0", "s2")
    world.sim.run(3)
    first, *rest = summary(world)
    assert first == "RECOVERING; UP_TO_DATE=24; DOWN=3"
    nid = world.cluster.disks["s1"].open().settings().nid
    assert rest == [
        f"    recovery waits for S{nid}, which may have newer data (or for an"
        " administrator to start the cluster without)"
    ]
    world.cluster.restart()
    world.audit()


def test_summary_warns_until_all_know_the_partition_table() -> None:
    """Before, the loss of a storage would stop the cluster: nobody must stop one."""
    world = world_of()
    assert command(world, AskMonitorInformation)[:2] == ((), ())
    primary = world.cluster.primary
    assert primary is not None
    world.sim.clog("s1", primary_of(world))
    primary.change_table([], 1)
    world.sim.run(1)
    warning, problem, text = command(world, AskMonitorInformation)
    assert (warning, problem) == ((None,), ())
    lines = text.decode().splitlines()
    assert lines[0].startswith("RUNNING; UP_TO_DATE=24; ltid=")
    nid = world.sim.app("s1").nid
    assert lines[1] == f"    commits wait for S{nid} to write the partition table"
    world.sim.heal()
    world.sim.run(5)
    assert command(world, AskMonitorInformation)[:2] == ((), ())
    world.audit()


# --- truncation -----------------------------------------------------------------------


def stopped_world(seed: int = 0) -> tuple[World, list[bytes], Any]:
    """Whose clients have done their work, with its tids and what all replicas hold."""
    world = world_of(seed=seed)
    world.tokens.stopping = True
    world.sim.run_until(lambda: not world.tokens.running, 10)
    world.sim.run(2)
    for name in world.cluster.clients:  # their last tid will not be the last any more
        world.cluster.crash(name)
    replicas = world.cluster.replicas()
    return world, sorted(transactions_of(replicas)), replicas


def check_truncated(world: World, tid: bytes, before: Any, maybe: bool = False) -> None:
    """All cells hold what they held, up to that tid (`maybe`: or all of it)."""
    world.sim.run_until(lambda: world.cluster.healthy, 60)
    world.sim.run(2)
    replicas = world.cluster.replicas()
    expected = {
        name: {k: v for k, v in cell.items() if key_tid(k) <= tid}
        for name, cell in before.items()
    }
    if maybe and replicas != expected:
        expected = before
    assert {n: sorted(map(repr, c)) for n, c in replicas.items()} == {
        n: sorted(map(repr, c)) for n, c in expected.items()
    }
    assert replicas == expected
    assert world.cluster.leftovers() == {}


def key_tid(key: Any) -> bytes:
    """Of a key of `Cluster.replicas`."""
    return key if isinstance(key, bytes) else key[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(12))
def test_interrupted_truncation(seed: int) -> None:
    """Scenarios 38 and 40: one node dies, or all, at any moment; perhaps twice."""
    world, tids, before = stopped_world(seed=seed)
    rng = world.sim.rng("faults")
    tid = tids[len(tids) // 2]
    command(world, Truncate, tid)
    for _ in range(rng.choice([1, 2])):
        world.sim.run(rng.random() ** 2 * 0.3)
        if rng.random() < 0.3:
            names = list(world.cluster.nodes)
        else:
            names = rng.sample(["m0", "m1", "s0", "s1", "s2"], rng.choice([1, 1, 2]))
        for name in names:
            if world.cluster.process(name).alive:
                world.cluster.crash(name, rng.random() < 0.3)
        world.sim.run(rng.choice([0, 0.1, 20]))
        world.cluster.restart()
    check_truncated(world, tid, before, maybe=True)


def test_forced_start_with_a_truncation() -> None:
    """A storage that was not there to truncate has nothing to say any more."""
    world, tids, before = stopped_world()
    tid = tids[len(tids) // 2]
    world.cluster.crash("s1")
    world.sim.run(1)
    command(world, Truncate, tid)
    world.sim.run(30)
    assert not world.cluster.running
    command(world, SetClusterState, ClusterState.VERIFYING)
    world.sim.run_until(lambda: world.cluster.running, 10)
    world.cluster.restart("s1")
    world.sim.run(3)
    nid = world.sim.app("s1").nid
    primary = world.cluster.primary
    assert primary is not None
    assert nid not in primary.pt.nids()
    command(world, AddPendingNodes, [nid])
    world.sim.run(2)
    command(world, TweakPartitionTable, False, [])
    world.sim.run_until(lambda: nid in primary.pt.readable_nids(), 20)
    world.sim.run_until(lambda: world.cluster.healthy, 20)
    world.sim.run(2)
    cells = {name.split("/")[0]: cell for name, cell in before.items()}
    for name, cell in world.cluster.replicas().items():
        expected = cells[name.split("/")[0]]
        assert cell == {k: v for k, v in expected.items() if key_tid(k) <= tid}, name


@pytest.mark.parametrize("joins", ["running", "recovering"])
def test_a_truncation_that_one_storage_missed(joins: str) -> None:
    """It recorded it and died; the others are done with it, and go on.

    When it comes back, it alone has something to delete, whoever is primary then.
    """
    world = world_of()
    tid = world.cluster.storage().lastTransaction()
    world.cluster.crash("s1")
    world.commits(10)
    # It has the present table, with cells that are out of date.
    world.cluster.restart("s1")
    world.sim.run_until(lambda: world.sim.app("s1").operation, 10)
    world.cluster.crash("s1")
    backend = world.cluster.disks["s1"].open()
    backend.begin(True)
    backend.set_truncate_tid(tid)
    backend.commit()

    def restart(*storages: str) -> None:
        for name in world.cluster.nodes:
            if world.cluster.process(name).alive:
                world.cluster.crash(name)
        world.cluster.restart(*world.cluster.masters, "a0", *storages)
        world.commits(10)

    restart("s0", "s2")
    if joins == "running":
        world.cluster.restart("s1")
        world.commits(10)
    else:
        restart("s0", "s1", "s2")
    assert world.sim.app("s1").backend.settings().truncate_tid is None
    world.audit()


@pytest.mark.parametrize("reset", [False, True])
def test_a_storage_returns_to_a_former_primary(reset: bool) -> None:
    """It has all data, but another master runs the cluster with the others."""
    world = world_of(replace(QUIET, replicas=2))
    old = primary_of(world)
    new = next(name for name in world.cluster.masters if name != old)
    rest = [*world.cluster.storages, *world.cluster.clients, new]
    if reset:
        for name in rest:
            world.sim.link(name, old).refused = world.sim.link(old, name).refused = True
            world.sim.reset(old, name)
        world.sim.run(0.1)
    world.sim.partition([old], rest)
    world.sim.run(20)
    assert running_masters(world) == [new]
    world.sim.partition(["s2"], [name for name in rest if name != "s2"])
    for link in ("s2", old), (old, "s2"):
        world.sim.unclog(*link)
        world.sim.link(*link).refused = False
    world.sim.run_until(lambda: len(world.sim.app(old).nodes.running()) == 0, 5)
    for _ in range(20):
        world.sim.run(2)
        assert running_masters(world) == [new]
    assert world.sim.app(old).nodes.by_nid(world.sim.app("s2").nid).connection
    world.sim.heal()
    world.commits(10)
    world.audit()
