"""Whole clusters in the simulator: real masters, storages, admins and clients.

It checks promise P7 (testing.md) at the moment when a primary master is about to tell
that a transaction is committed: all of it is, durably, on the disks of all readable
cells. It stays so: what becomes readable, or serves again, has all that was told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from neo.admin.app import Admin, AdminOptions
from neo.lib.config import Limits
from neo.lib.connection import Connection
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
from neo.master.transactions import Transaction
from neo.storage.app import StorageNode, StorageOptions
from neo.storage.database.memory import MemoryBackend
from neo.storage.locks import UNLOCKED

from .disk import Disk
from .runtime import HOST, Process, SimRuntime, Simulation, SimulationFailed
from .workload import TokenStorage

P = ParamSpec("P")
T = TypeVar("T")

CLUSTER = "simulated"


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
        self._names = frozenset((*self.nodes, *self.clients))
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
        # What was told, of which nothing may be lost: tid -> oids.
        self.acknowledged: dict[bytes, list[bytes]] = {}
        self._checked: dict[tuple[int, int], None] = {}  # readable cells, of all that
        self._operations: dict[StorageNode, object] = {}  # the last one of each
        self._seen: dict[str, tuple[object, int | None]] = {}  # phase, ptid of masters
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

        def make(runtime: SimRuntime) -> Master:
            master = Master(runtime, options(autostart=self.autostart))
            transactions: Any = master.transactions
            commit = transactions._commit

            def observed(transaction: Transaction) -> None:
                self._committing(master, transaction)
                commit(transaction)

            transactions._commit = observed
            return master

        return make

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
        if name in self.disks:
            if power:
                self.disks[name].power_loss()
            else:
                self.disks[name].close()

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
        """Whether all storages that have cells serve all of them, and know it.

        Those that have none are pending after a restart of the cluster; one that got
        the nid of an absent storage may be refused, until its database is erased.
        """
        primary = self.primary
        if primary is None or not self.running:
            return False
        pt = primary.pt
        serving = {
            app.nid
            for name in self.storages
            if (app := self.sim.app(name)) is not None and app.operation
        }
        return (
            all(state in READABLE for _, _, state in pt)
            and primary.nodes.running().keys() >= set(pt.nids())
            and serving.issuperset(pt.nids())
            and not primary.transactions.settling.owing
        )

    def storage(self, name: str = "c0") -> TokenStorage:
        """What an application of that client uses."""
        storage: TokenStorage = self.sim.app(name).storage
        return storage

    def call(self, function: Callable[..., T], *args: Any, client: str = "c0") -> T:
        """Run a function in an application thread of a client."""
        return self.sim.call(client, function, *args)

    def close(self) -> None:
        """Give the memory of the disks back, at the end."""
        for disk in self.disks.values():
            disk.erase()

    # --- checks -----------------------------------------------------------------------

    def check(self, process: Process) -> None:
        """Hold after every event of a process, besides what each node checks."""
        if process.name not in self._names:
            return  # of another cluster
        app = process.app
        if isinstance(app, Master):
            if app.truncate_tid is not None:
                self._forget(app.truncate_tid)
            seen = app.phase, app.pt.ptid
            before = self._seen.get(process.name)
            if seen != before:
                self._seen[process.name] = seen
                self._check_new_cells(before is None or before[0] is not app.phase)
        elif isinstance(app, StorageNode):
            operation = app.operation
            if operation is not None and operation is not self._operations.get(app):
                self._operations[app] = operation
                # When it has dropped what was not finished.
                self.sim.after(1.0, lambda: self._check_start(process, operation))
        elif isinstance(app, ClientNode):
            tid = app.storage._core.last_tid
            if self.truncating:
                self.last_tids.pop(process.name, None)
            elif tid is not None:
                incarnation, previous = self.last_tids.get(process.name, (0, b""))
                assert incarnation != process.incarnation or tid >= previous, (
                    f"{process.name}: last tid decreases"
                )
                self.last_tids[process.name] = process.incarnation, tid

    def _committing(self, master: Master, transaction: Transaction) -> None:
        """A primary is about to tell that a transaction is committed."""
        tid = transaction.tid
        assert tid is not None
        oids = self.acknowledged[tid] = list(transaction.oids)
        self._check_disks(master, tid, oids)
        if len(self.masters) == 1:
            return
        # Another one must not start with an older table, where more is readable.
        now = dict.fromkeys(_readable(master.pt))
        for name, disk in self._disks(master, master.pt.readable_nids()):
            late = disk.readable().keys() - now
            if late and (disk.ptid or 0) < (master.pt.ptid or 0):
                raise self.sim.failure(
                    f"P7: {tid.hex()} is acknowledged, but (partition, nid)"
                    f" {sorted(late)} are still readable on the disk of {name}"
                )

    def _forget(self, truncated: bytes) -> None:
        """What was committed after a tid is going to be lost."""
        for tid in [tid for tid in self.acknowledged if tid > truncated]:
            del self.acknowledged[tid]

    def acknowledge(self, oids: Iterable[bytes], tid: bytes) -> None:
        """A client was told that a transaction is committed.

        If not by the master that committed it, then after that master was lost: what
        the operation began with has it.
        """
        if tid in self.acknowledged or self.truncating:
            return
        self.sim.sometimes("a commit is told by others than its master")
        oids = self.acknowledged[tid] = list(oids)
        if self.primary is not None and self.running:
            self._check_disks(self.primary, tid, oids)

    def _disks(self, master: Master, nids: Iterable[int]) -> list[tuple[str, Disk]]:
        """Disks of storages that a master knows, of which some may be lost."""
        names = {address: name for name, address in self.addresses.items()}
        found = []
        for nid in nids:
            node = master.nodes.by_nid(nid)
            assert node is not None, (nid, master)
            assert node.address is not None, node
            if nid not in self.lost:
                name = names.get(node.address)
                if name is None:  # that of another node, which was moved
                    name = self.sim.listeners[node.address].process.name
                found.append((name, self.disks[name]))
        return found

    def _check_disks(
        self,
        master: Master,
        tid: bytes,
        oids: Iterable[bytes],
        only: tuple[int, int] | None = None,
    ) -> None:
        """Is a transaction on all disks that a master takes for good? `only`: on that
        (partition, nid).
        """
        pt = master.pt
        np = pt.np

        def disks(partition: int) -> list[tuple[str, Disk]]:
            nids = pt.readable[partition]
            if only is not None and partition == only[0]:
                nids = only[1:]
            return [
                (name, disk)
                for name, disk in self._disks(master, nids)
                # Else another master is primary since, and has moved the cell.
                if (disk.ptid or 0) <= (pt.ptid or 0)
                or (partition, disk.nid) in disk.readable()
            ]

        def fail(partition: int, name: str, lack: str) -> SimulationFailed:
            return self.sim.failure(
                f"P7: {tid.hex()} is acknowledged, but partition {partition} on the"
                f" disk of {name} lacks its {lack}"
            )

        partition, ttid = u64(tid) % np, None
        for name, disk in disks(partition):
            ttid = disk.ttid_of(partition, tid)
            if ttid is None:
                raise fail(partition, name, "metadata")
        if ttid is None:
            return  # they are nowhere that can be looked at
        for oid in oids:
            partition = u64(oid) % np
            if only is not None and partition != only[0]:
                continue
            for name, disk in disks(partition):
                if not disk.has_object(partition, oid, tid, ttid):
                    raise fail(partition, name, f"object {oid.hex()}")

    def _check_new_cells(self, is_start: bool) -> None:
        """Cells that became readable have, durably, all that was acknowledged; after a
        start, all those that are readable.
        """
        primary = self.primary
        if primary is None or not self.running:
            return
        pt = primary.pt
        if is_start:
            self._checked.clear()
        elif any((disk.ptid or 0) > (pt.ptid or 0) for disk in self.disks.values()):
            return  # another one was primary since
        before, self._checked = self._checked, dict.fromkeys(_readable(pt))
        for cell in self._checked:
            if cell not in before and cell[1] not in self.lost:
                self.sim.sometimes("a cell becomes readable")
                self._check_cell(primary, cell)

    def _check_start(self, process: Process, operation: object) -> None:
        """A storage serves again: nothing happened without it."""
        storage, primary = process.app, self.primary
        if storage is None or storage.operation is not operation:
            return
        if primary is None or not self.running:
            return
        for cell in _readable(storage.pt):
            if cell[1] == storage.nid and cell[1] in primary.pt.readable[cell[0]]:
                self._check_cell(primary, cell)

    def _check_cell(self, primary: Master, cell: tuple[int, int]) -> None:
        for tid, oids in self.acknowledged.items():
            self._check_disks(primary, tid, oids, cell)

    def replicas(self) -> dict[str, dict[Any, Any]]:
        """Content of each readable cell: for `tests.history.check`."""
        primary = self.primary
        assert primary is not None
        result: dict[str, dict[Any, Any]] = {}
        for name in self.storages:
            node = self.sim.app(name)
            if node is None or node.operation is None:  # a spare one, or refused
                continue
            backend = node.backend
            for partition, cell in backend.own_cells().items():
                if cell.state in READABLE:
                    content = result[f"{partition}/{name}"] = {}
                    read_cell(backend, partition, content)
        return result

    def leftovers(self) -> dict[str, int]:
        """Transactions that nobody finishes, and data that nobody refers to."""
        result = {}
        for name in self.storages:
            node = self.sim.app(name)
            if node is None or node.operation is None:
                continue
            backend = node.backend
            open_ones = node.operation.transactions.by_ttid.values()
            count = sum(transaction.state < UNLOCKED for transaction in open_ones)
            count += len(backend.locked_transactions())
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
