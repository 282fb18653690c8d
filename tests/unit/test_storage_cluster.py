"""Storage nodes in whole clusters, simulated: conflicts, crashes, replication.

Clients increment counters, resolve conflicts by adding, and note what was acknowledged;
at the end each counter has what was acknowledged (or more, if the outcome of a commit
was never learnt), and all replicas are equal.
"""

from __future__ import annotations

from hashlib import sha1
from typing import Any

import pytest
from ZODB.POSException import ConflictError, POSError

from neo.client.app import ClientApp, ClientOptions
from neo.client.exception import NEOStorageError, NEOStorageNotFoundError
from neo.client.transactions import Transaction
from neo.lib.protocol import MAX_TID, ZERO_OID, ZERO_TID, CellState
from neo.lib.util import p64
from neo.master.app import Master, MasterOptions
from neo.storage.app import StorageNode, StorageOptions
from neo.storage.database.memory import MemoryBackend
from tests.simulation.runtime import SimRuntime, Simulation

MASTER = ("127.0.0.1", 10000)
NAME = "counters"
COUNTERS = 4


class Disk:
    """What a machine that loses power keeps at least: see CommitObserver."""

    def __init__(self) -> None:
        self.backend: MemoryBackend | None = None
        self.image: bytes | None = None

    def before_commit(self, durable: bool) -> None:
        """It never fails."""

    def after_commit(self, durable: bool) -> None:
        if durable and self.backend is not None:
            self.image = self.backend._connection.serialize()


class Cluster:
    """A simulated cluster, with its clients' memory of what they were told."""

    def __init__(
        self, seed: int, storages: int, replicas: int, partitions: int = 3
    ) -> None:
        self.sim = Simulation(seed)
        self.disks: dict[int, MemoryBackend] = {}
        self.durable: dict[int, Disk] = {}
        self.acknowledged = [0] * COUNTERS
        self.unknown = [0] * COUNTERS
        self.stopping = False
        self.finished: dict[str, int] = {}
        options = MasterOptions(
            cluster=NAME,
            bind=MASTER,
            replicas=replicas,
            partitions=partitions,
            autostart=storages,
        )
        self.sim.start("M", lambda runtime: Master(runtime, options))
        for number in range(1, storages + 1):
            self.start(number)
        self.until(lambda: all(self.nodes()) and all(n.operation for n in self.nodes()))

    def start(self, number: int, power: bool = True) -> None:
        """Start a storage, on the disk that it left; `power`: it was not lost."""
        old = self.disks.get(number)
        image = old.image() if old is not None else None
        if not power:
            image = self.durable[number].image

        def make(runtime: SimRuntime) -> StorageNode:
            disk = self.durable[number] = Disk()
            disk.image = image
            disk.backend = MemoryBackend(image=image, observer=disk)
            self.disks[number] = disk.backend
            return StorageNode(
                runtime,
                self.disks[number],
                StorageOptions(NAME, ("127.0.0.1", 20000 + number), [MASTER]),
            )

        self.sim.start(f"S{number}", make)

    def crash(self, number: int) -> None:
        self.sim.process(f"S{number}").crash()

    def crash_of_client(self, number: int) -> None:
        """Its last increment may have been finished or not."""
        process = self.sim.process(f"C{number}")
        if process.alive:
            process.crash()
            for counter in range(COUNTERS):
                self.unknown[counter] += 1

    def nodes(self) -> list[StorageNode]:
        return [p.app for n, p in self.sim.processes.items() if n[0] == "S" and p.app]

    def until(self, condition: Any, within: float = 120) -> None:
        self.sim.run_until(condition, within)

    # --- clients ----------------------------------------------------------------------

    def add_client(self, number: int, rounds: int, pairs: bool = False) -> None:
        name = f"C{number}"
        options = ClientOptions((MASTER,), NAME)
        self.sim.start(name, lambda runtime: ClientApp(runtime, options))
        self.sim.run(0.1)
        self.sim.spawn(name, self.work, name, rounds, pairs)

    def work(self, name: str, rounds: int, pairs: bool) -> None:
        app = self.sim.process(name).app
        rng = self.sim.rng(name)
        app.connect()
        done = 0
        while done < rounds and not self.stopping:
            first = rng.randrange(COUNTERS)
            numbers = [first, (first + 1) % COUNTERS] if pairs else [first]
            if rng.random() < 0.5:
                numbers.reverse()
            try:
                if self.increment(app, numbers):
                    done += 1
            except (POSError, NEOStorageError):
                app.runtime.wait(lambda: False, (), 0.3)
        self.finished[name] = done

    def increment(self, app: ClientApp, numbers: list[int]) -> bool:
        transaction = Transaction(app, b"", b"", b"")
        app.sync()
        values: dict[bytes, int] = {}
        try:
            base = {}
            for number in numbers:
                oid = p64(number + 1)
                try:
                    data, serial, _ = app.reader.load(oid)
                except NEOStorageNotFoundError:
                    data, serial = b"0", ZERO_TID
                base[oid] = serial
                values[oid] = int(data or b"0") + 1
            transaction.begin()
            for oid, value in values.items():
                self.store(transaction, oid, base[oid], value)
            while not transaction.wait_stores():
                conflict = transaction.next_conflict()
                if conflict is not None:
                    self.resolve(app, transaction, *conflict)
            transaction.vote()
        except BaseException:
            transaction.abort()
            raise
        try:
            transaction.finish(None)
        except (POSError, NEOStorageError):
            for number in numbers:
                self.unknown[number] += 1
            return False
        for number in numbers:
            self.acknowledged[number] += 1
        return True

    def store(self, t: Transaction, oid: bytes, serial: bytes, value: int) -> None:
        data = b"%d" % value
        t.store(oid, serial, data, (0, sha1(data).digest(), data))

    def resolve(self, app: ClientApp, t: Transaction, version: Any, tid: bytes) -> None:
        if version.origin == ZERO_TID:
            raise ConflictError("created by two")
        old = int(app.reader.load(version.oid, at=version.origin)[0])
        committed = int(app.reader.load(version.oid, at=tid)[0])
        value = committed + int(version.data) - old
        data = b"%d" % value
        record = (0, sha1(data).digest(), data)
        t.store_resolved(version.oid, tid, data, record)

    # --- checks -----------------------------------------------------------------------

    def readable(self) -> bool:
        """Whether all cells are up to date, for all nodes, and nothing is left."""
        nodes = self.nodes()
        return all(
            node.operation
            and all(state is CellState.UP_TO_DATE for _, _, state in node.pt)
            and not node.operation.transactions.by_ttid
            and node.writer.idle
            for node in nodes
        )

    def readable_cells(self) -> bool:
        """Whether all cells are up to date, while clients go on."""
        return all(
            node.operation
            and all(state is CellState.UP_TO_DATE for _, _, state in node.pt)
            for node in self.nodes()
        )

    def check(self) -> None:
        self.until(self.readable)
        content: dict[int, Any] = {}
        pt = self.nodes()[0].pt
        for number, disk in sorted(self.disks.items()):
            disk.begin(False)
            assert disk.prune_orphans(0, 10000, True) == (0, None)
            disk.commit()
            assert disk.locked_transactions() == {}
            for partition in disk.own_cells():
                tids = disk.tids_from(partition, ZERO_TID, MAX_TID, 100000)
                keys = disk.object_keys(partition, 100000, ZERO_TID, MAX_TID, ZERO_OID)
                found = (
                    [disk.transaction(tid) for tid in tids],
                    [(oid, disk.load(oid, at=tid)) for tid, oid in keys],
                )
                assert content.setdefault(partition, found) == found, number
        for number in range(COUNTERS):
            oid = p64(number + 1)
            data = {}
            disks = {node.nid: node.backend for node in self.nodes()}
            for nid in pt.readable[pt.partition_of(oid)]:
                revision = disks[nid].load(oid)
                data[nid] = int(revision[4]) if revision else 0
            least = self.acknowledged[number]
            assert len(set(data.values())) == 1, data
            value = next(iter(data.values()))
            assert least <= value <= least + self.unknown[number], (number, value)


def run(cluster: Cluster, clients: int, rounds: int, pairs: bool) -> None:
    for number in range(clients):
        cluster.add_client(number, rounds, pairs)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pairs", [False, True])
def test_concurrent_clients(seed: int, pairs: bool) -> None:
    """Conflicts and deadlocks, on two replicas."""
    cluster = Cluster(seed, storages=2, replicas=1)
    run(cluster, 3, 10, pairs)
    cluster.until(lambda: len(cluster.finished) == 3, 300)
    assert sum(cluster.acknowledged) >= 30
    cluster.check()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("storages", [2, 3])
def test_crashes_and_replication(seed: int, storages: int) -> None:
    """Storages die during commits and come back, one at a time."""
    cluster = Cluster(seed, storages, replicas=1)
    run(cluster, 3, 60, seed % 2 == 0)
    rng = cluster.sim.rng("crashes")
    for _ in range(3):
        victim = rng.randint(1, storages)
        cluster.sim.run(rng.uniform(0.5, 3))
        cluster.crash(victim)
        cluster.sim.run(rng.uniform(0.1, 4))
        cluster.start(victim, power=rng.random() < 0.5)
        cluster.until(cluster.readable_cells)
    cluster.until(lambda: len(cluster.finished) == 3, 600)
    cluster.check()


@pytest.mark.parametrize("seed", range(4))
def test_all_storages_restart(seed: int) -> None:
    """Without replica: the verification finishes what was locked."""
    cluster = Cluster(seed, storages=2, replicas=0)
    run(cluster, 2, 40, True)
    rng = cluster.sim.rng("crashes")
    for _ in range(3):
        cluster.sim.run(rng.uniform(0.5, 3))
        victim = rng.randint(1, 2)
        cluster.crash(victim)
        cluster.sim.run(rng.uniform(0.1, 2))
        cluster.start(victim, power=rng.random() < 0.5)
    cluster.until(lambda: len(cluster.finished) == 2, 600)
    cluster.check()


@pytest.mark.parametrize("seed", range(6))
def test_masters_and_clients_die(seed: int) -> None:
    """Operation stops and starts again; transactions are dropped or finished."""
    cluster = Cluster(seed, storages=2, replicas=1)
    run(cluster, 4, 40, True)
    rng = cluster.sim.rng("crashes")
    for number in range(3):
        cluster.sim.run(rng.uniform(0.5, 3))
        cluster.crash_of_client(number)
        cluster.sim.run(rng.uniform(0.5, 3))
        cluster.sim.process("M").crash()
        cluster.sim.run(rng.uniform(0.1, 2))
        cluster.sim.process("M").start(None)
    cluster.until(lambda: "C3" in cluster.finished, 600)
    cluster.check()
