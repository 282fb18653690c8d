"""Whole clusters in the simulator: real masters, storages, admins and clients.

Each storage node has a `Disk`, which keeps what is durable, and what a disk might have
kept besides, for the case that its machine dies.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from neo.admin.app import Admin, AdminOptions
from neo.lib.config import Limits
from neo.lib.connection import Connection
from neo.lib.exception import BackendError
from neo.lib.handler import Handler
from neo.lib.protocol import (
    READABLE,
    AddPendingNodes,
    ClusterState,
    NodeState,
    NodeType,
    Packet,
    SetClusterState,
    SetNodeState,
    TweakPartitionTable,
)
from neo.lib.pt import PartitionTable
from neo.lib.util import Address, u64
from neo.master.app import Master, MasterOptions
from neo.storage.app import StorageNode, StorageOptions
from neo.storage.database.memory import MemoryBackend

from .runtime import HOST, Process, SimRuntime, Simulation, SimulationFailed
from .workload import TokenStorage

P = ParamSpec("P")
T = TypeVar("T")

CLUSTER = "simulated"
VOLATILE_MAX = 8  # images that a disk might have kept


class Disk:
    """The database of one storage node, through the node's lives.

    latest: what is committed, which survives the death of the process.
    durable: what survives the death of the machine for sure; `volatile` what may.
    fail: called before each commit, may raise OSError. uncertain: the next commit
    fails, as if its last fsync did: all or nothing of it may be found later.
    """

    def __init__(self, sim: Simulation, dedup: bool = False) -> None:
        self.sim = sim
        self.dedup = dedup
        self.backend: MemoryBackend | None = None
        self.latest: bytes | None = None
        self.durable: bytes | None = None
        self.volatile: list[bytes] = []
        self.fail: Callable[[bool], object] | None = None
        self.uncertain = False
        self._opened: tuple[bytes | None, sqlite3.Connection] | None = None

    def open(self) -> MemoryBackend:
        """The database, as the disk has it."""
        self.backend = None
        self.uncertain = False
        self.backend = MemoryBackend(self.latest, dedup=self.dedup, observer=self)
        self._keep(durable=True)
        return self.backend

    def before_commit(self, durable: bool) -> None:
        """See CommitObserver."""
        if self.fail is not None:
            self.fail(durable)

    def after_commit(self, durable: bool) -> None:
        """See CommitObserver."""
        if self.backend is None:  # it is being opened
            return
        if self.uncertain:
            before = self.latest
            self._keep(durable=False)
            if self.sim.rng("disk").random() < 0.5:
                self.latest = before
            raise BackendError("commit failed: Input/output error")
        self._keep(durable)

    def _keep(self, durable: bool) -> None:
        assert self.backend is not None
        self.latest = self.backend.image()
        if durable:
            self.durable = self.latest
            self.volatile.clear()
        elif len(self.volatile) < VOLATILE_MAX:
            self.volatile.append(self.latest)

    def power_loss(self) -> None:
        """Lose what is not durable, or not."""
        choice = self.sim.rng("disk").randrange(len(self.volatile) + 1)
        self.latest = [self.durable, *self.volatile][choice]
        self.durable = self.latest
        self.volatile.clear()

    def erase(self) -> None:
        """All is lost."""
        self.latest = self.durable = None
        self.volatile.clear()

    # --- a look into the durable image ---

    def select(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        """Rows that are there after the death of the machine, whatever happens."""
        image = self.durable
        if image is None:
            return []
        if self._opened is None or self._opened[0] is not image:
            connection = sqlite3.connect(":memory:", isolation_level=None)
            connection.deserialize(image[:18] + b"\1\1" + image[20:])
            if self._opened is not None:
                self._opened[1].close()
            self._opened = image, connection
        return self._opened[1].execute(sql, args).fetchall()

    def _setting(self, name: str) -> int | None:
        rows = self.select("SELECT value FROM config WHERE name=?", name)
        return int(rows[0][0]) if rows else None

    @property
    def nid(self) -> int | None:
        """Whose disk it is."""
        return self._setting("nid")

    @property
    def ptid(self) -> int | None:
        """Version of its partition table."""
        return self._setting("ptid")

    def ttid_of(self, partition: int, tid: bytes) -> int | None:
        """Ttid of an acknowledged transaction, in the partition of its metadata.

        It may be only locked: then the next start finishes it.
        """
        done = "SELECT ttid FROM trans WHERE partition=? AND tid=?"
        locked = "SELECT ttid FROM ttrans WHERE tid=?"
        t = u64(tid)
        rows = self.select(done, partition, t) or self.select(locked, t)
        return rows[0][0] if rows else None

    def has_object(self, partition: int, oid: bytes, tid: bytes, ttid: int) -> bool:
        """Whether a version of an object is there, be it only voted."""
        row = "SELECT 1 FROM {} WHERE partition=? AND oid=? AND tid=?"
        return bool(
            self.select(row.format("obj"), partition, u64(oid), u64(tid))
            or self.select(row.format("tobj"), partition, u64(oid), ttid)
        )


class Operator(Handler):
    """A control tool that sends one command to an admin node."""

    def __init__(
        self,
        runtime: SimRuntime,
        admin: Address,
        packet: Packet[...],
        args: tuple[Any, ...],
        closed: Callable[[str], object],
    ) -> None:
        super().__init__()
        self.packet, self.args = packet, args
        self.outcome = "no answer"
        self._closed = closed
        self.conn = runtime.connect(admin, self)
        runtime.call_later(60, lambda: self.conn.close("no answer"))

    def connected(self, conn: Connection) -> None:
        conn.ask(self.packet, *self.args).then(
            lambda *answer: self._end(f"{answer}"),
            lambda code, text: self._end(f"error {code}: {text}"),
        )

    def _end(self, outcome: str) -> None:
        self.outcome = outcome
        self.conn.close()

    def closed(self, conn: Connection) -> None:
        self._closed(self.outcome)


class ClientNode:
    """A process with a storage that ZODB could use."""

    def __init__(self, runtime: SimRuntime, masters: str, **options: Any) -> None:
        self.runtime = runtime
        self.storage = TokenStorage(
            masters, CLUSTER, _runtime=lambda: runtime, **options
        )
        self.check = self.storage._core.check


@dataclass
class Shape:
    """How a cluster looks. `drawn()` takes one from the seed."""

    masters: int = 1
    storages: int = 1
    replicas: int = 0
    partitions: int = 1
    clients: int = 1
    threads: int = 1  # of each client
    admins: int = 0
    dedup: bool = False
    compress: bool = False
    spares: int = 0  # storages that may be started and added later

    @classmethod
    def drawn(cls, sim: Simulation) -> Shape:
        rng = sim.rng("shape")
        storages = rng.choice([1, 1, 2, 2, 3, 4])
        return cls(
            masters=rng.choice([1, 1, 2, 3]),
            storages=storages,
            replicas=rng.randint(0, min(2, storages - 1)),
            partitions=rng.choice([1, 2, 3, 5, 12]),
            clients=rng.choice([1, 2, 3]),
            threads=rng.choice([1, 1, 2, 3]),
            admins=rng.choice([0, 1]),
            dedup=rng.random() < 0.3,
            compress=rng.random() < 0.3,
            spares=rng.choice([0, 0, 1, 2]),
        )


class Cluster:
    """All nodes of a cluster, by the names of their processes: m0, s0, a0, c0...

    `number` tells clusters of one world apart: m0.1...
    """

    def __init__(
        self,
        sim: Simulation,
        shape: Shape | None = None,
        number: int = 0,
        limits: Limits | None = None,
    ) -> None:
        self.sim = sim
        self.limits = limits or Limits()
        self.client_options: dict[str, Any] = {}
        self.shape = shape = shape or Shape()
        suffix = f".{number}" if number else ""
        self.masters = [f"m{i}{suffix}" for i in range(shape.masters)]
        self.storages = [f"s{i}{suffix}" for i in range(shape.storages + shape.spares)]
        self.spares = self.storages[shape.storages :]
        self.admins = [f"a{i}{suffix}" for i in range(shape.admins)]
        self.clients = [f"c{i}{suffix}" for i in range(shape.clients)]
        self.addresses: dict[str, Address] = {
            name: (HOST, base + 100 * number + i)
            for base, names in (
                (10000, self.masters), (20000, self.storages), (30000, self.admins)
            )
            for i, name in enumerate(names)
        }  # fmt: skip
        self.disks = {name: Disk(sim, shape.dedup) for name in self.storages}
        self.last_tids: dict[str, tuple[int, bytes]] = {}
        self.autostart = shape.storages  # of masters that start from now on
        self.truncating = False  # may be: transactions are lost
        # Identities of storages whose disk is lost, until they are removed.
        self.lost: dict[int, None] = {}
        # What clients were told, of which nothing may be lost: (tid, oids).
        self.acknowledged: list[tuple[bytes, list[bytes]]] = []
        self._readable: dict[tuple[int, int], None] = {}  # cells that were checked
        self._ptids: dict[str, int | None] = {}  # of masters
        self._tables: dict[int | None, list[tuple[int, int]]] = {}  # readable cells
        # What each client has, and since when.
        self._client_ptids: dict[str, tuple[int | None, float]] = {}
        sim.invariants.append(self.check)

    # --- nodes ------------------------------------------------------------------------

    @property
    def nodes(self) -> list[str]:
        """All but clients."""
        return [*self.masters, *self.storages, *self.admins]

    def process(self, name: str) -> Process:
        return self.sim.process(name)

    def start(self, *names: str) -> None:
        """Start nodes, by default all but the spare ones."""
        usual = [n for n in (*self.nodes, *self.clients) if n not in self.spares]
        for name in names or usual:
            self.sim.start(name, getattr(self, f"_make_{name[0]}")(name))

    def _others(self, name: str) -> tuple[Address, ...]:
        return tuple(self.addresses[m] for m in self.masters if m != name)

    def _make_m(self, name: str) -> Callable[[SimRuntime], Master]:
        options = partial(
            MasterOptions,
            cluster=CLUSTER,
            bind=self.addresses[name],
            masters=self._others(name),
            partitions=self.shape.partitions,
            replicas=self.shape.replicas,
            limits=self.limits,
        )
        return lambda runtime: Master(runtime, options(autostart=self.autostart))

    def _make_s(self, name: str) -> Callable[[SimRuntime], StorageNode]:
        options = StorageOptions(
            cluster=CLUSTER,
            bind=self.addresses[name],
            masters=self._others(name),
            host=name,
            limits=self.limits,
        )
        disk = self.disks[name]
        return lambda runtime: StorageNode(runtime, disk.open(), options)

    def _make_a(self, name: str) -> Callable[[SimRuntime], Admin]:
        options = AdminOptions(
            cluster=CLUSTER, bind=self.addresses[name], masters=self._others(name)
        )
        return lambda runtime: Admin(runtime, options)

    def _make_c(self, name: str) -> Callable[[SimRuntime], ClientNode]:
        masters = " ".join(f"{host}:{port}" for host, port in self._others(name))
        return partial(
            ClientNode,
            masters=masters,
            compress=self.shape.compress,
            **self.client_options,
        )

    def crash(self, name: str, power: bool = False) -> None:
        """Kill a process, or (`power`) its whole machine."""
        self.sim.crash(name, silent=power)
        if power and name in self.disks:
            self.disks[name].power_loss()

    def restart(self, *names: str) -> None:
        """Start again those that are down, of all by default."""
        for name in names or self.nodes:
            process = self.process(name)
            if not process.alive and process.factory is not None:
                self.sim.restart(name)

    # --- operators --------------------------------------------------------------------

    def command(self, packet: Packet[P], *args: P.args, **_: P.kwargs) -> None:
        """Let an operator send a command, by an admin that runs. No matter if it fails.

        The outcome is noted in the trace.
        """
        text = f"{packet}{args!r}"
        runtime = self._operator()
        for name in self.admins:
            if self.process(name).alive:
                self.sim.note("OPERATOR", f"{text} to {name}")
                address = self.addresses[name]
                Operator(runtime, address, packet, args, partial(self._outcome, text))
                return
        self.sim.note("OPERATOR", f"{text}: no admin")

    def _operator(self) -> SimRuntime:
        process = self.process("o" + self.admins[0][1:] if self.admins else "o0")
        if not process.alive:
            process.start(lambda runtime: None)
        return process.runtime

    def _outcome(self, text: str, outcome: str) -> None:
        self.sim.note("OPERATOR", f"{text}: {outcome}")
        word = "refused" if outcome.startswith("error") else "done"
        if outcome == "no answer":
            word = outcome
        self.sim.sometimes(f"{text.partition('(')[0]} {word}")

    def lose(self, name: str) -> None:
        """The disk of a storage that is down is lost for ever."""
        nid = self.disks[name].nid
        if nid is not None:
            self.lost[nid] = None
        self.disks[name].erase()

    def replace_lost(self) -> None:
        """What the documentation tells an operator to do once a disk was replaced.

        To be called from time to time, as long as there are lost ones.
        """
        primary = self.primary
        if primary is None:
            return
        nodes = primary.nodes
        if self.state_of(primary) is ClusterState.RECOVERING:
            self.command(SetClusterState, ClusterState.VERIFYING)
            return
        pending = [
            node.nid
            for node in nodes.of_type(NodeType.STORAGE)
            if node.state is NodeState.PENDING and node.nid is not None
        ]
        known = [nid for nid in self.lost if nodes.by_nid(nid) is not None]
        if pending:
            self.command(AddPendingNodes, pending)
        elif any(nid in primary.pt.nids() for nid in self.lost):
            self.command(TweakPartitionTable, False, known)
            for nid in known:
                self.command(SetNodeState, nid, NodeState.UNKNOWN)
        else:
            self.lost.clear()

    # --- state ------------------------------------------------------------------------

    @property
    def primary(self) -> Master | None:
        """The master that runs the cluster, if there is exactly one."""
        primaries = [
            app
            for name in self.masters
            if (app := self.sim.app(name)) is not None
            and self.state_of(app) is not None
        ]
        return primaries[0] if len(primaries) == 1 else None

    @staticmethod
    def state_of(master: Master) -> ClusterState | None:
        """Cluster state of a master, None if it is not primary."""
        return getattr(master.phase, "state", None)

    @property
    def running(self) -> bool:
        """Whether the cluster serves."""
        primary = self.primary
        return primary is not None and self.state_of(primary) is ClusterState.RUNNING

    @property
    def healthy(self) -> bool:
        """Whether all storages that have cells serve all of them.

        Those that have none are pending after a restart of the cluster.
        """
        primary = self.primary
        if primary is None or not self.running:
            return False
        pt = primary.pt
        apps = {
            app.nid: app
            for name in self.storages
            if (app := self.sim.app(name)) is not None
        }
        return (
            all(state in READABLE for _, _, state in pt)
            and primary.nodes.running().keys() >= set(pt.nids())
            and all(nid in apps and apps[nid].operation for nid in pt.nids())
        )

    def storage(self, name: str = "c0") -> TokenStorage:
        """What an application of that client uses."""
        storage: TokenStorage = self.sim.app(name).storage
        return storage

    def call(self, function: Callable[..., T], *args: Any, client: str = "c0") -> T:
        """Run a function in an application thread of a client."""
        return self.sim.call(client, function, *args)

    # --- checks -----------------------------------------------------------------------

    def check(self) -> None:
        """Hold after every event, besides what each node checks."""
        self._check_new_cells()
        for name in self.clients:
            process = self.process(name)
            if process.app is None:
                continue
            core = process.app.storage._core
            if core.pt.ptid != self._client_ptids.get(name, (None, 0))[0]:
                self._client_ptids[name] = core.pt.ptid, self.sim.time
            tid = core.last_tid
            incarnation, previous = self.last_tids.get(name, (0, b""))
            if incarnation == process.incarnation and not self.truncating:
                assert tid is None or tid >= previous, f"{name}: last tid decreases"
            if tid is not None:
                self.last_tids[name] = process.incarnation, tid

    def check_durable(
        self, storage: TokenStorage, oids: Iterable[bytes], tid: bytes
    ) -> None:
        """Fail unless what a client was told is on the disks of all readable cells.

        Its partition table is the one that the primary had when it said so. Source:
        promise P7.
        """
        pt = storage._core.pt
        if not pt.np or self.truncating:  # no table: the primary was lost right after
            return
        oids = list(oids)
        self.acknowledged.append((tid, oids))
        self._check_disks(pt, tid, oids)
        name = storage._core.runtime.process.name
        if len(self.masters) == 1 or self._client_ptids[name][1] > self.sim.time - 1:
            return  # the table may have come after the answer, before its thread runs
        # Another master must not start with an older table, where more is readable.
        now = set(_readable(pt))
        for name, disk in self._disks(pt.readable_nids()):
            late = set(self._tables.get(disk.ptid, ())) - now
            if late and (disk.ptid or 0) < (pt.ptid or 0):
                raise self.sim.failure(
                    f"P7: {tid.hex()} was acknowledged, but (partition, nid)"
                    f" {sorted(late)} are still readable on the disk of {name}"
                )

    def _disks(self, nids: Iterable[int]) -> list[tuple[str, Disk]]:
        """Disks of these storages, of which some may be lost."""
        by_nid = {
            disk.nid: (name, disk)
            for name, disk in self.disks.items()
            if disk.ptid is not None  # else its nid is a wish
        }
        return [by_nid[nid] for nid in nids if nid not in self.lost]

    def _check_disks(
        self,
        pt: PartitionTable,
        tid: bytes,
        oids: Iterable[bytes],
        only: tuple[int, int] | None = None,
    ) -> None:
        """Is a transaction on all disks concerned? `only`: on that (partition, nid)."""
        np = pt.np

        def disks(partition: int) -> list[tuple[str, Disk]]:
            nids = pt.readable[partition]
            if only is not None and partition == only[0]:
                nids = only[1:]
            return [
                (name, disk)
                for name, disk in self._disks(nids)
                # The cell may be elsewhere since the answer was sent.
                if (disk.ptid or 0) <= (pt.ptid or 0)
                or disk.ptid not in self._tables
                or (partition, disk.nid) in self._tables[disk.ptid]
            ]

        def fail(partition: int, name: str, lack: str) -> SimulationFailed:
            return self.sim.failure(
                f"P7: {tid.hex()} was acknowledged, but partition {partition} on the"
                f" disk of {name} lacks its {lack}"
            )

        partition, ttid = u64(tid) % np, 0
        for name, disk in disks(partition):
            found = disk.ttid_of(partition, tid)
            if found is None:
                raise fail(partition, name, "metadata")
            ttid = found
        for oid in oids:
            partition = u64(oid) % np
            if only is not None and partition != only[0]:
                continue
            for name, disk in disks(partition):
                if not disk.has_object(partition, oid, tid, ttid):
                    raise fail(partition, name, f"object {oid.hex()}")

    def _check_new_cells(self) -> None:
        """Cells that became readable have, durably, all that was acknowledged."""
        ptids = {
            name: app.pt.ptid
            for name in self.masters
            if isinstance(app := self.process(name).app, Master)
        }
        if ptids == self._ptids:
            return
        self._ptids = ptids
        for name, ptid in ptids.items():
            if ptid is not None:
                self._tables[ptid] = _readable(self.process(name).app.pt)
        primary = self.primary
        if primary is None or not self.running or self.truncating:
            return
        pt = primary.pt
        if any((disk.ptid or 0) > (pt.ptid or 0) for disk in self.disks.values()):
            return  # another one was primary since
        before, self._readable = self._readable, {}
        for cell in _readable(pt):
            self._readable[cell] = None
            if cell not in before and cell[1] not in self.lost:
                self.sim.sometimes("a cell becomes readable")
                for tid, oids in self.acknowledged:
                    self._check_disks(pt, tid, oids, cell)

    def replicas(self) -> dict[str, dict[Any, Any]]:
        """Content of each readable cell: for `tests.history.check`."""
        primary = self.primary
        assert primary is not None
        result: dict[str, dict[Any, Any]] = {}
        for name in self.storages:
            node = self.sim.app(name)
            if node is None:  # a spare one
                continue
            backend = node.backend
            for partition, cell in backend.own_cells().items():
                if cell.state in READABLE:
                    content = result[f"{partition}/{name}"] = {}
                    read_cell(backend, partition, content)
        return result

    def leftovers(self) -> dict[str, int]:
        """Voted transactions that nobody finishes, and data that nobody refers to."""
        result = {}
        for name in self.storages:
            node = self.sim.app(name)
            if node is None or node.operation is None:
                continue
            backend = node.backend
            count = len(backend.locked_transactions())
            backend.begin(False)
            count += backend.prune_orphans(0, 1 << 30, True)[0]
            backend.commit()
            if count:
                result[name] = count
        return result


def _readable(pt: PartitionTable) -> list[tuple[int, int]]:
    """Readable cells: (partition, nid)."""
    return [(p, nid) for p, nids in enumerate(pt.readable) for nid in nids]


def read_cell(backend: MemoryBackend, partition: int, content: dict[Any, Any]) -> None:
    """All transactions and records of a cell, as a replica must have them too."""
    for tid in backend.tids_from(partition, bytes(8), b"\x7f" + b"\xff" * 7, 1 << 30):
        transaction = backend.transaction(tid)
        assert transaction is not None
        content[tid] = (
            transaction.user,
            transaction.description,
            transaction.extension,
            sorted(transaction.oids),
            transaction.packed,
            transaction.ttid,
        )
    keys = backend.object_keys(
        partition, 1 << 30, bytes(8), b"\x7f" + b"\xff" * 7, bytes(8)
    )
    for tid, oid in keys:
        revision = backend.load(oid, at=tid)
        assert revision is not None
        content[tid, oid] = revision[2:]


def transactions_of(replicas: dict[str, dict[Any, Any]]) -> dict[bytes, list[bytes]]:
    """tid -> oids, from the metadata of all cells."""
    return {
        key: row[3]
        for content in replicas.values()
        for key, row in content.items()
        if isinstance(key, bytes)
    }
