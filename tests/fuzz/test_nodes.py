"""Malformed, unexpected and hostile packets against nodes of a simulated cluster.

A peer in each role sends one packet on a connection of its own. Whatever it is, no
exception leaves the node, its `check()` holds, its memory stays bounded, and everybody
else goes on: at the end, the cluster still commits.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from random import Random  # noqa: TID251 - seeded
from typing import Any

import pytest

from neo.lib.connection import Connection
from neo.lib.exception import ConfigurationError
from neo.lib.handler import Handler
from neo.lib.protocol import (
    BY_CODE,
    HANDSHAKE,
    AcceptIdentification,
    NodeType,
    Packet,
    RequestIdentification,
)
from neo.lib.runtime import Throttle
from tests.fakes import CONVERSATIONS, Recorder, conversation
from tests.simulation.cluster import CLUSTER, Cluster, Shape
from tests.simulation.runtime import SimRuntime, Simulation
from tests.simulation.workload import Tokens

from .cases import framing, malformed, message, valid

NAME = CLUSTER.encode()
ADDRESS = ("127.0.0.1", 10000)  # of the first master
INPUTS = int(os.environ.get("NEO_FUZZ", 5_000))
# What these order is done, as it should be: an administrator could really do it.
ORDERS = {"SetClusterState", "SetNodeState", "Truncate", "TweakPartitionTable",
          "SetNumReplicas", "AddPendingNodes", "Repair"}  # fmt: skip


class Peer(Recorder):
    """A peer in some role: accepts everything, answers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conn: Connection | None = None
        self.nid: int | None = None

    def send(self, data: bytes) -> None:
        """Send bytes of any kind."""
        assert self.conn is not None
        self.conn._write(data)


class World:
    """A cluster at work, and a process `x` from which peers connect."""

    def __init__(self, seed: int) -> None:
        self.sim = Simulation(seed, latency=(1e-5, 2e-5), cut=0.05, disk_latency=1e-5)
        shape = Shape(masters=2, storages=2, replicas=1, partitions=3, admins=1)
        self.cluster = Cluster(self.sim, shape)
        self.tokens = Tokens(self.sim, think=0.2)
        self.cluster.start()
        self.sim.run_until(lambda: self.cluster.healthy, 20)
        self.cluster.call(self.tokens.create, self.cluster.storage())
        self.tokens.start("c0", self.cluster.storage())
        self.sim.start("x", lambda runtime: runtime)
        self.runtime: SimRuntime = self.sim.app("x")
        self.primary = next(
            name
            for name in self.cluster.masters
            if self.sim.app(name) is self.cluster.primary
        )
        self.secondary = next(n for n in self.cluster.masters if n != self.primary)
        self._port = 50000
        self._sponsor: dict[NodeType, Peer] = {}

    def peer(self, name: str) -> Peer:
        """A new connection to a node, not identified."""
        peer = Peer()
        self.runtime.throttle = Throttle()  # time is short
        peer.conn = self.runtime.connect(self.cluster.addresses[name], peer)
        peer.conn.trust()
        self.sim.run_until(lambda: peer.connections or peer.closings, 5)
        assert peer.connections
        return peer

    def identified(
        self,
        name: str,
        kind: NodeType,
        nid: int | None = None,
        timestamp: float | None = None,
    ) -> Peer:
        """A connection to a node that accepted us."""
        peer = self.peer(name)
        assert peer.conn is not None
        address = None
        if kind is not NodeType.CLIENT and timestamp is None:
            self._port += 1
            address = (b"127.0.0.1", self._port)
        accepted: list[int] = []

        def done(_kind: NodeType, _nid: int | None, mine: int | None) -> None:
            accepted.append(1)
            peer.nid = mine

        peer.conn.ask(
            RequestIdentification, kind, nid, address, NAME, timestamp, {}
        ).then(done, lambda code, text: accepted.append(0))
        self.sim.run_until(lambda: accepted, 5)
        assert accepted == [1], (name, kind, peer.conn.reason, peer.errors)
        return peer

    def sponsored(self, kind: NodeType) -> Peer:
        """A connection to a storage, of a node that the master announced."""
        sponsor = self._sponsor.get(kind)
        if sponsor is None or sponsor.closings:
            sponsor = self._sponsor[kind] = self.identified(self.primary, kind)
            self.sim.run_until(
                lambda: any(p.name == "NotifyNodeInformation" for _, p, _ in
                            sponsor.received), 5)  # fmt: skip
            self.sim.run(0.01)
        nodes = next(
            args[1] for _, p, args in sponsor.received
            if p.name == "NotifyNodeInformation"
        )  # fmt: skip
        timestamp = next(row[4] for row in nodes if row[2] == sponsor.nid)
        return self.identified("s0", kind, sponsor.nid, timestamp)

    def check(self) -> None:
        """Everybody else goes on."""
        expected = self.tokens.committed + 1
        self.sim.run_until(lambda: self.tokens.committed >= expected, 30)
        for name in (*self.cluster.nodes, *self.cluster.clients):
            process = self.cluster.process(name)
            assert process.alive, name
            assert process.incarnation == 1, name


ROLES: dict[str, Callable[[World], Peer]] = {
    "fresh to primary": lambda w: w.peer(w.primary),
    "fresh to secondary": lambda w: w.peer(w.secondary),
    "fresh to storage": lambda w: w.peer("s0"),
    "fresh to admin": lambda w: w.peer("a0"),
    "client to primary": lambda w: w.identified(w.primary, NodeType.CLIENT),
    "storage to primary": lambda w: w.identified(w.primary, NodeType.STORAGE),
    "admin to primary": lambda w: w.identified(w.primary, NodeType.ADMIN),
    "client to storage": lambda w: w.sponsored(NodeType.CLIENT),
    "storage to storage": lambda w: w.sponsored(NodeType.STORAGE),
    "unknown storage to storage": lambda w: w.identified("s0", NodeType.STORAGE),
}


def attack(world: World, role: str, cases: Iterator[tuple[str, bytes]]) -> None:
    """Send each case, on a new connection whenever the last one was closed."""
    peer: Peer | None = None
    last = ""
    try:
        for number, (what, data) in enumerate(cases):
            last = what
            if peer is None or peer.closings:
                peer = ROLES[role](world)
            peer.send(data)
            world.sim.run(0.001)
            if number % 200 == 199:
                world.check()
        world.check()
    except BaseException as error:
        error.add_note(f"{role}: {last}")
        raise
    if peer is not None and peer.conn is not None:
        peer.conn.close()


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.mark.parametrize("role", ROLES)
def test_framing(role: str, world: World) -> None:
    """No packet at all."""
    for what, data in framing():
        peer = ROLES[role](world)
        peer.send(data)
        world.sim.run(0.002)
        if data[:1] not in b"\xdd\xdf\xc6\xdb\xc9\x93":  # else it waits for more
            assert peer.closings, what
        assert peer.conn is not None
        peer.conn.close()
    world.check()


@pytest.mark.parametrize("role", ROLES)
def test_malformed(role: str) -> None:
    """Each code with what its type forbids: refused, the connection is closed."""
    rng = Random(role)
    every = max(1, 50_000 // INPUTS)

    def cases() -> Iterator[tuple[str, bytes]]:
        for packet in BY_CODE.values():
            for number, (what, data) in enumerate(malformed(packet, rng)):
                if every == 1 or rng.randrange(every) == 0 or number == 0:
                    yield f"{packet} {what}", data

    attack(World(1), role, cases())


@pytest.mark.parametrize("role", ROLES)
def test_valid(role: str) -> None:
    """Each code with arguments of the right types and senseless values."""
    rng = Random(role)
    rounds = max(2, INPUTS // 10_000)

    def cases() -> Iterator[tuple[str, bytes]]:
        for _ in range(rounds):
            for packet in BY_CODE.values():
                if packet.name in ORDERS and "admin" in role:
                    continue
                args = valid(packet, rng)
                yield f"{packet}{args}", message(packet.code, args)

    attack(World(2), role, cases())


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_mutated_conversations(name: str, world: World) -> None:
    """What nodes really said, with bytes changed, packets dropped, repeated..."""
    rng = Random(name)
    lines = [line["data"] for line in conversation(name)]
    lines = [data for data in lines if data != HANDSHAKE]
    orders = {packet.code for packet in BY_CODE.values() if packet.name in ORDERS}
    for round_ in range(max(2, INPUTS // 10_000)):
        stream = [data for data in lines if not is_order(data, orders)]
        for _ in range(rng.randint(1, 5)):
            i, j = (rng.randrange(len(stream)) for _ in range(2))
            kind = rng.randrange(4)
            if kind == 0:
                damaged = bytearray(stream[i])
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
                stream[i] = bytes(damaged)
            elif kind == 1:
                stream[i] = stream[i][: rng.randrange(len(stream[i]))]
            elif kind == 2:
                stream[i], stream[j] = stream[j], stream[i]
            else:
                stream.insert(j, stream[i])
        role = rng.choice([r for r in ROLES if "admin to" not in r])
        peer = ROLES[role](world)
        for data in stream:
            if data:
                peer.send(data)
        try:
            world.sim.run(0.01)
        except BaseException as error:
            error.add_note(f"{role}: {name}, round {round_}")
            raise
        assert peer.conn is not None
        peer.conn.close()
    world.check()


def is_order(data: bytes, orders: set[int]) -> bool:
    return data[1:3][-1] in orders and data[1] < 0x80


def test_memory(world: World) -> None:
    """What an unknown peer sends for ever costs less than a megabyte."""
    for name in ("s0", "a0", world.primary):
        peer = world.peer(name)
        tracemalloc.start()
        try:
            peer.send(b"\x93\0\1\xdd\xff\xff\xff\xff")
            for _ in range(100):
                peer.send(bytes(4096))
                world.sim.run(0.001)
                if peer.closings:
                    break
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peer.closings
        assert peak < 8 << 20
    world.check()


# --- nodes that connect to a hostile one ----------------------------------------------


class HostilePrimary(Handler):
    """Accepts whoever identifies, then says one thing."""

    def __init__(self, runtime: SimRuntime, nid: int) -> None:
        super().__init__()
        self.runtime = runtime
        self.nid = nid
        self.data = b""
        self.served = 0
        self.recorder = Recorder()

    def start(self) -> None:
        self.runtime.listen(ADDRESS, self.accept)

    def accept(self, conn: Connection) -> None:
        conn.handler = self
        conn.trust()

    def request_identification(self, conn: Connection, *args: Any) -> None:
        conn.answer(AcceptIdentification, NodeType.MASTER, -0x0FFFFFFF, self.nid)
        conn._write(self.data)
        conn.handler = self.recorder
        self.served += 1
        self.runtime.unlisten()  # else the node comes back at once


def hostile_world(kind: str) -> tuple[Simulation, HostilePrimary, Cluster]:
    sim = Simulation(kind, latency=(1e-5, 2e-5), cut=0.05, disk_latency=1e-5)
    cluster = Cluster(sim, Shape(admins=1))
    nid = {"s": 1, "a": -0x2FFFFFFF, "c": -0x1FFFFFFF}[kind[0]]
    sim.start("m0", lambda runtime: HostilePrimary(runtime, nid))
    return sim, sim.app("m0"), cluster


@pytest.mark.parametrize("kind", ["s0", "a0", "c0"])
def test_hostile_primary(kind: str) -> None:
    """It may say anything: nodes disconnect or obey, but don't fail."""
    rng = Random(kind)
    every = max(1, 200_000 // INPUTS)

    def cases(packet: Packet) -> Iterator[tuple[str, bytes]]:
        for what, data in malformed(packet, rng):
            if rng.randrange(every) == 0:
                yield what, data
        for _ in range(max(2, INPUTS // 20_000)):
            args = valid(packet, rng)
            yield str(args), message(packet.code, args)

    sim, primary, cluster = hostile_world(kind)
    for packet in BY_CODE.values():
        for what, data in cases(packet):
            primary.data = data
            if ADDRESS not in sim.listeners:
                primary.start()
            served = primary.served
            if kind[0] == "s":
                cluster.disks[kind].erase()
            try:
                cluster.start(kind)
                if kind[0] == "c":
                    sim.app(kind).storage._core._search.start()
                sim.run_until(lambda n=served: primary.served > n, 5)
                sim.run(0.01)
            except ConfigurationError:
                pass
            except BaseException as error:
                error.add_note(f"{packet} {what}")
                raise
            if cluster.process(kind).alive:
                cluster.crash(kind)
