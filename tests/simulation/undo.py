"""Applications of simulated clients that write and undo, without any order among them.

What an undo must give back is known: the version before the transaction that it undoes.
"""

from __future__ import annotations

from dataclasses import dataclass

from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, POSKeyError, UndoError
from ZODB.utils import p64, u64

from neo.client.exception import NEOStorageUnknownOutcome
from neo.client.Storage import Storage
from tests.history import CONFLICT, FAIL, OK, UNKNOWN

from .runtime import Simulation

OIDS = [p64(1000 + i) for i in range(4)]


@dataclass
class Change:
    """One transaction: a write of `data`, or the undo of another one."""

    data: bytes
    undone: Change | None = None
    oids: tuple[bytes, ...] = ()
    outcome: str = UNKNOWN
    tid: bytes = b""


class Undos:
    """The workload and what is known of its changes."""

    def __init__(self, sim: Simulation, think: float) -> None:
        self.sim = sim
        self.rng = sim.rng("undo")
        self.think = think
        self.changes: list[Change] = []
        self.running = 0
        self.stopping = False

    def create(self, storage: Storage) -> None:
        """Make the objects."""
        change = Change(b"init")
        while change.outcome != OK:
            self._attempt(storage, change, OIDS)
        self.changes.append(change)

    def start(self, name: str, storage: Storage) -> None:
        """Run a thread in a client."""
        self.sim.spawn(name, self._work, name, storage)

    def _work(self, name: str, storage: Storage) -> None:
        process = self.sim.processes[name]
        self.running += 1
        try:
            while not self.stopping:
                process.sleep(self.rng.expovariate(1 / self.think))
                self._step(storage)
        finally:
            self.running -= 1

    def _step(self, storage: Storage) -> None:
        rng = self.rng
        done = [c for c in self.changes[1:] if c.outcome == OK][-4:]
        change = Change(b"%d" % len(self.changes))
        oids = rng.sample(OIDS, rng.randint(1, 2))
        if done and rng.random() < 0.5:
            change.undone = rng.choice(done)
            oids = list(change.undone.oids)
        self.changes.append(change)
        try:
            storage.sync()
            self._attempt(storage, change, oids)
        except (TransientError, NEOStorageUnknownOutcome):
            change.outcome = FAIL

    def _attempt(self, storage: Storage, change: Change, oids: list[bytes]) -> None:
        txn = TransactionMetaData("undo", change.data.decode())
        bases = {} if change.data == b"init" else self._bases(storage, oids)
        try:
            storage.tpc_begin(txn)
            if change.undone is not None:
                storage.undo(change.undone.tid, txn)
            else:
                for oid in oids:
                    base = bases.get(oid, bytes(8))
                    storage.store(oid, base, change.data, "", txn)
            storage.tpc_vote(txn)
            change.oids = tuple(oids)
            change.outcome = UNKNOWN
            change.tid = storage.tpc_finish(txn)
            change.outcome = OK
        except NEOStorageUnknownOutcome:
            change.outcome = UNKNOWN
        except (ConflictError, UndoError):
            change.outcome = CONFLICT
        except TransientError:
            change.outcome = FAIL
        finally:
            storage.tpc_abort(txn)

    def _bases(self, storage: Storage, oids: list[bytes]) -> dict[bytes, bytes]:
        before = p64(u64(storage.lastTransaction()) + 1)
        found = {oid: storage.loadBefore(oid, before) for oid in oids}
        return {oid: revision[1] for oid, revision in found.items() if revision}

    # --- the end ----------------------------------------------------------------------

    def check(self, storage: Storage) -> None:
        """Compare with what the cluster holds: run it in an application thread."""
        storage.sync()
        for oid in OIDS:
            self._check(oid, self._history(storage, oid))

    def _history(self, storage: Storage, oid: bytes) -> list[tuple[bytes, bytes]]:
        """(tid, data) of all versions, oldest first."""
        versions: list[tuple[bytes, bytes]] = []
        tid = p64(u64(storage.lastTransaction()) + 1)
        while True:
            try:
                found = storage.loadBefore(oid, tid)
            except POSKeyError:
                found = None
            if found is None:
                return versions[::-1]
            data, tid, _ = found
            versions.append((tid, data))

    def _check(self, oid: bytes, versions: list[tuple[bytes, bytes]]) -> None:
        tids = [tid for tid, _ in versions]
        data_at = dict(versions)
        changes = {c.tid: c for c in self.changes if c.outcome == OK and oid in c.oids}
        wrong = [
            f"P7: {c.tid.hex()} is lost" for t, c in changes.items() if t not in data_at
        ]
        unknown = [c for c in self.changes if c.outcome == UNKNOWN]
        for tid, data in versions:
            change = changes.get(tid)
            if change is None:
                if not any(c.undone is not None or c.data == data for c in unknown):
                    wrong.append(f"P9: {tid.hex()} is there, with {data!r}")
            elif change.undone is None:
                if data != change.data:
                    wrong.append(f"P1: {data!r} at {tid.hex()}, not {change.data!r}")
            else:
                undone = change.undone.tid
                if undone not in data_at:
                    wrong.append(f"P14: {tid.hex()} undoes {undone.hex()}, not there")
                    continue
                expected = data_at[tids[tids.index(undone) - 1]]
                if data != expected:
                    wrong.append(
                        f"P14: undo at {tid.hex()} gave {data!r}, not {expected!r}"
                    )
        if wrong:
            raise self.sim.failure(f"{oid.hex()}: " + "; ".join(wrong))
