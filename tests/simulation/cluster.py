"""Whole clusters in the simulator: real masters, storages, admins and clients.

Each storage node has a `Disk`, which keeps what is durable, and what a disk might have
kept besides, for the case that its machine dies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from neo.admin.app import Admin, AdminOptions
from neo.lib.config import Limits
from neo.lib.protocol import READABLE, ClusterState
from neo.lib.util import Address
from neo.master.app import Master, MasterOptions
from neo.storage.app import StorageNode, StorageOptions
from neo.storage.database.memory import MemoryBackend

from .runtime import HOST, Process, SimRuntime, Simulation
from .workload import TokenStorage

T = TypeVar("T")

CLUSTER = "simulated"
VOLATILE_MAX = 8  # images that a disk might have kept


class Disk:
    """The database of one storage node, through the node's lives.

    latest: what is committed, which survives the death of the process.
    durable: what survives the death of the machine for sure; `volatile` what may.
    """

    def __init__(self, sim: Simulation, dedup: bool = False) -> None:
        self.sim = sim
        self.dedup = dedup
        self.backend: MemoryBackend | None = None
        self.latest: bytes | None = None
        self.durable: bytes | None = None
        self.volatile: list[bytes] = []
        self.fail: Callable[[bool], object] | None = None  # may raise OSError

    def open(self) -> MemoryBackend:
        """The database, as the disk has it."""
        self.backend = None
        self.backend = MemoryBackend(self.latest, dedup=self.dedup, observer=self)
        self._keep(durable=True)
        return self.backend

    def before_commit(self, durable: bool) -> None:
        """See CommitObserver."""
        if self.fail is not None:
            self.fail(durable)

    def after_commit(self, durable: bool) -> None:
        """See CommitObserver."""
        if self.backend is not None:  # else it is being opened
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
        self.storages = [f"s{i}{suffix}" for i in range(shape.storages)]
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
        sim.invariants.append(self.check)

    # --- nodes ------------------------------------------------------------------------

    @property
    def nodes(self) -> list[str]:
        """All but clients."""
        return [*self.masters, *self.storages, *self.admins]

    def process(self, name: str) -> Process:
        return self.sim.process(name)

    def start(self, *names: str) -> None:
        """Start nodes, all by default."""
        for name in names or (*self.nodes, *self.clients):
            self.sim.start(name, getattr(self, f"_make_{name[0]}")(name))

    def _others(self, name: str) -> tuple[Address, ...]:
        return tuple(self.addresses[m] for m in self.masters if m != name)

    def _make_m(self, name: str) -> Callable[[SimRuntime], Master]:
        options = MasterOptions(
            cluster=CLUSTER,
            bind=self.addresses[name],
            masters=self._others(name),
            partitions=self.shape.partitions,
            replicas=self.shape.replicas,
            autostart=self.shape.storages,
            limits=self.limits,
        )
        return lambda runtime: Master(runtime, options)

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
            if not self.process(name).alive:
                self.sim.restart(name)

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
        for name in self.clients:
            process = self.process(name)
            if process.app is None:
                continue
            core = process.app.storage._core
            tid = core.last_tid
            incarnation, previous = self.last_tids.get(name, (0, b""))
            if incarnation == process.incarnation:
                assert tid is None or tid >= previous, f"{name}: last tid decreases"
            if tid is not None:
                self.last_tids[name] = process.incarnation, tid

    def replicas(self) -> dict[str, dict[Any, Any]]:
        """Content of each readable cell: for `tests.history.check`."""
        primary = self.primary
        assert primary is not None
        result: dict[str, dict[Any, Any]] = {}
        for name in self.storages:
            node = self.sim.app(name)
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
            backend = self.sim.app(name).backend
            count = len(backend.locked_transactions())
            backend.begin(False)
            count += backend.prune_orphans(0, 1 << 30, True)[0]
            backend.commit()
            if count:
                result[name] = count
        return result


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
