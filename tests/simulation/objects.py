"""Applications of simulated clients that are ZODB's own: connections, BTrees, undo.

In each snapshot, a counter says how many keys a tree has, and following the pointers of
a ring's nodes leads to all of them, and back to the first one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from BTrees.Length import Length
from BTrees.OOBTree import OOBTree
from persistent import Persistent
from transaction import TransactionManager
from transaction.interfaces import TransientError
from ZODB.Connection import Connection
from ZODB.DB import DB
from ZODB.POSException import ConflictError, UndoError
from ZODB.utils import p64

from neo.client.exception import NEOStorageUnknownOutcome
from neo.client.Storage import Storage
from tests.history import CONFLICT, FAIL, OBJECTS, OK, UNKNOWN

from .runtime import Process, Simulation

#: objects of the other workload, when this one has the root
OTHERS = [p64(1 + i) for i in range(OBJECTS)]
RING = 8  # nodes
MARKS = 4
CACHE_SIZE = 10  # of connections, objects: much is loaded again and again


class Node(Persistent):
    """One of the ring."""

    next: Node


class Mark(Persistent):
    """Who changed it last: it is what keeps changes from being undone out of order."""

    token = ""


@dataclass
class Change:
    """One transaction."""

    token: str
    kind: str  # insert, move, vote, undo
    outcome: str = FAIL
    tid: bytes = b""  # if it may be undone
    undone: Change | None = None


class Objects:
    """The workload and what is known of its changes."""

    def __init__(self, sim: Simulation, think: float) -> None:
        self.sim = sim
        self.rng = sim.rng("objects")
        self.think = think
        self.changes: list[Change] = []
        self.running = 0
        self.stopping = False

    # --- threads ----------------------------------------------------------------------

    def create(self, name: str, storage: Storage) -> None:
        """Make the objects; in an application thread."""
        conn = self._connect(self.sim.processes[name], storage)
        manager = conn.transaction_manager
        while True:
            try:
                manager.begin()
                root = conn.root()
                if "tree" not in root:
                    self._make(root)
                    manager.commit()
                return
            except (TransientError, NEOStorageUnknownOutcome):
                self.sim.processes[name].sleep(1)
            finally:
                manager.abort()

    def _make(self, root: Any) -> None:
        root["tree"] = OOBTree()
        root["count"] = Length()
        root["votes"] = Length()
        root["marks"] = tuple(Mark() for _ in range(MARKS))
        ring = root["ring"] = tuple(Node() for _ in range(RING))
        for i, node in enumerate(ring):
            node.next = ring[(i + 1) % RING]

    def _connect(self, process: Process, storage: Storage) -> Connection:
        while True:
            try:
                db = DB(storage, cache_size=CACHE_SIZE)
                return db.open(TransactionManager())
            except (TransientError, NEOStorageUnknownOutcome):
                process.sleep(1)

    def start(self, name: str, storage: Storage) -> None:
        """Run a thread in a client."""
        self.sim.spawn(name, self._work, name, storage)

    def _work(self, name: str, storage: Storage) -> None:
        process = self.sim.processes[name]
        self.running += 1
        try:
            conn = self._connect(process, storage)
            while not self.stopping:
                process.sleep(self.rng.expovariate(1 / self.think))
                self._step(conn)
        finally:
            self.running -= 1

    # --- one transaction --------------------------------------------------------------

    def _step(self, conn: Connection) -> None:
        rng = self.rng
        kind = rng.choice(["insert", "insert", "move", "vote", "undo"])
        change = Change(f"{len(self.changes):06}", kind)
        self.changes.append(change)
        manager = conn.transaction_manager
        try:
            manager.begin()
            root = conn.root()
            if rng.random() < 0.2:
                self._verify(root)
            done: Callable[[], bytes] | None = getattr(self, "_" + kind)(root, change)
            manager.get().note(f"{kind} {change.token}")
            change.outcome = UNKNOWN  # the client may die
            manager.commit()
            change.outcome = OK
            if done is not None:
                change.tid = done()
        except NEOStorageUnknownOutcome:
            change.outcome = UNKNOWN
        except (ConflictError, UndoError):
            change.outcome = CONFLICT
        except TransientError:
            change.outcome = FAIL
        finally:
            manager.abort()
        self.sim.sometimes(f"zodb {kind} {change.outcome}")

    def _insert(self, root: Any, change: Change) -> None:
        # Some far from each other, some side by side.
        token = change.token
        key = token[::-1] if self.rng.random() < 0.7 else token
        root["tree"][key] = token
        root["count"].change(1)

    def _move(self, root: Any, change: Change) -> Callable[[], bytes] | None:
        """Take one node out of the ring, and put it elsewhere."""
        nodes = root["ring"]
        node, place = self.rng.sample(nodes, 2)
        before = next(n for n in nodes if n.next is node)
        if before is place:
            return None
        before.next = node.next
        node.next = place.next
        place.next = node
        return lambda: node._p_serial

    def _vote(self, root: Any, change: Change) -> Callable[[], bytes]:
        root["votes"].change(1)
        mark = self.rng.choice(root["marks"])
        mark.token = change.token
        return lambda: mark._p_serial

    def _undo(self, root: Any, change: Change) -> None:
        """Undo one of the last transactions that may be undone."""
        known = [c for c in self.changes if c.outcome == OK and c.tid][-4:]
        if known:
            change.undone = self.rng.choice(known)
            jar = root._p_jar
            jar.db().undo(change.undone.tid, jar.transaction_manager.get())

    # --- what must be so --------------------------------------------------------------

    def _verify(self, root: Any) -> list[str]:
        """Values of the tree, of a snapshot where all is as it must be."""
        tokens = list(root["tree"].values())
        count = root["count"]()
        if len(tokens) != count:
            raise self.sim.failure(f"P4: {len(tokens)} keys, {count} were counted")
        node, seen = root["ring"][0], dict.fromkeys(root["ring"])
        for _ in range(RING):
            seen.pop(node, None)
            node = node.next
        if seen or node is not root["ring"][0]:
            raise self.sim.failure("P4: the ring is broken")
        return tokens

    def check(self, name: str, storage: Storage) -> None:
        """Compare with what the cluster holds: run it in an application thread."""
        conn = self._connect(self.sim.processes[name], storage)
        root = conn.root()
        found = Counter(self._verify(root))
        for change in self.changes:
            if change.kind == "insert":
                times = found.pop(change.token, 0)
                if times != 1 and change.outcome == OK:
                    raise self.sim.failure(f"P1: {change} is there {times} times")
                if times and change.outcome in (CONFLICT, FAIL):
                    raise self.sim.failure(f"P9: {change} is there")
        if found:
            raise self.sim.failure(f"P9: {found} come from nowhere")
        votes = root["votes"]()
        least, most = self._votes()
        if not least <= votes <= most:
            raise self.sim.failure(f"P1: {votes} votes, not {least} to {most}")

    def _votes(self) -> tuple[int, int]:
        """How many there must be, at least and at most."""
        least = most = 0
        for change in self.changes:
            sure, maybe = change.outcome == OK, change.outcome == UNKNOWN
            if change.kind == "vote":
                least += sure
                most += sure or maybe
            elif change.undone is not None and change.undone.kind == "vote":
                least -= sure or maybe
                most -= sure
        return least, most
