"""Write locks: who may store an object, who waits, who must give a lock back.

Per object and storage, one transaction at most holds the write lock. The older
transaction (smaller ttid) has priority: a younger one waits for it. When an older one
needs the lock of a younger one that has not voted, it waits too, and the younger one's
client is asked to lock again (NotifyDeadlock): so no cycle of waiting can last. Waiters
of an object are served by increasing ttid, for one ttid in order of arrival. Nobody
else may take an object whose conflict a transaction has to resolve, but older ones.

This module decides and orders; `transactions.py` acts. Source: behaviour 3.3, 3.5, 0.4.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from .database.interface import Oid, Tid, Value

if TYPE_CHECKING:
    from neo.lib.connection import Connection
    from neo.lib.node import Node
    from neo.lib.runtime import Timer

# --- how a partition may be accessed on this node ---------------------------------

ABSENT: Final = 0  # no cell, or a corrupted one: nothing is kept
BLIND: Final = 1  # being replicated: written without checking conflicts
COMPLETE: Final = 2  # replicated, the master has not said yet that it is readable
READABLE: Final = 3

# --- what may become of a request -------------------------------------------------

GRANTED: Final = 0  # accepted, with the lock
LOCKLESS: Final = 1  # accepted, without lock
IGNORED: Final = 2  # not kept: the cell is not here
WAIT: Final = 3  # until the lock is free
DEADLOCK: Final = 4  # likewise, and the holder's client must be told
UNKNOWN: Final = 5  # refused: its base is later than the last revision

Outcome = int | bytes  # bytes: tid of the revision that conflicts

# --- states of a transaction ------------------------------------------------------

OPEN: Final = 0
VOTED: Final = 1
LOCKED: Final = 2  # its final tid is known: its objects are read-locked
UNLOCKED: Final = 3  # committed, maybe not applied to the database yet

# --- kinds of requests ------------------------------------------------------------

STORE: Final = 0
CHECK: Final = 1
RELOCK: Final = 2


class Write:
    """What a transaction stores for an object.

    `value`: the value, the id under which it was spilled to the database, or None if
    there is no data. `value_tid`: revision whose data is restored (undo).
    """

    __slots__ = ("serial", "value", "value_tid")

    def __init__(
        self, serial: Tid, value: Value | int | None, value_tid: Tid | None
    ) -> None:
        self.serial = serial
        self.value = value
        self.value_tid = value_tid

    @property
    def size(self) -> int:
        """Bytes in memory."""
        value = self.value
        return len(value[1]) if type(value) is tuple else 0


class Transaction:
    """A transaction in progress on this node.

    `checks` maps an oid to the serial that must still be current; `conflicts` are the
    oids whose last store or check was refused, `forgotten` those whose blind one turned
    out to conflict, which nobody was told by this node; `blind` are the oids written
    without lock, `locks` those whose write lock is held; `notified` those for which the
    client was asked to lock again; `waiting` counts the parked requests per oid.
    """

    __slots__ = (
        "blind",
        "checks",
        "conflicts",
        "forgotten",
        "has_metadata",
        "is_durable",
        "locks",
        "memory",
        "node",
        "notified",
        "readers",
        "spilling",
        "state",
        "tid",
        "touched",
        "ttid",
        "waiting",
        "writes",
    )

    def __init__(self, ttid: Tid, node: Node | None, now: float) -> None:
        self.ttid = ttid
        self.node = node
        self.touched = now  # monotonic time of its last packet
        self.state = OPEN
        self.tid: Tid | None = None
        self.writes: dict[Oid, Write] = {}
        self.checks: dict[Oid, Tid] = {}
        self.conflicts: dict[Oid, None] = {}
        self.forgotten: dict[Oid, None] = {}
        self.blind: dict[Oid, None] = {}
        self.locks: dict[Oid, None] = {}
        self.notified: dict[Oid, None] = {}
        self.waiting: dict[Oid, int] = {}
        self.readers: list[Reading] = []  # resumed when it ends
        self.memory = 0  # bytes of values in `writes`
        self.spilling = 0  # bytes of them being written to the database
        self.has_metadata = False
        self.is_durable = False  # its vote is on disk

    def __repr__(self) -> str:
        return f"<transaction {self.ttid.hex()} of {self.node}, state {self.state}>"


class Demand:
    """A store, a check or a relock, which may have to wait for a write lock."""

    __slots__ = (
        "conn",
        "kind",
        "msg_id",
        "oid",
        "order",
        "serial",
        "since",
        "transaction",
        "write",
    )

    def __init__(
        self,
        kind: int,
        transaction: Transaction,
        oid: Oid,
        serial: Tid,
        write: Write | None,
        conn: Connection,
    ) -> None:
        self.kind = kind
        self.transaction = transaction
        self.oid = oid
        self.serial = serial
        self.write = write
        self.conn = conn
        self.msg_id = conn.message_id
        self.order = 0
        self.since = 0.0

    @property
    def size(self) -> int:
        """Bytes that it costs while it waits, roughly."""
        return 1000 + (self.write.size if self.write is not None else 0)


class Reservation:
    """An object that waits to be stored again by who was told of a conflict.

    `timer`: ends it. There is none of an object that is locked.
    """

    __slots__ = ("timer", "transaction")

    def __init__(self, transaction: Transaction, timer: Timer) -> None:
        self.transaction = transaction
        self.timer = timer


class Reading:
    """A read that waits for the end of a transaction."""

    __slots__ = ("conn", "resume")

    def __init__(self, conn: Connection, resume: Callable[[], object]) -> None:
        self.conn = conn
        self.resume = resume


def decide_held(demand: Demand, holder: Transaction) -> Outcome | None:
    """What to do with a request for an object that `holder` has locked.

    None: the requester is the holder, and the present revision must still be compared.
    Source: behaviour 3.3, case 3.
    """
    transaction, oid = demand.transaction, demand.oid
    if holder is not transaction and (
        holder.ttid < transaction.ttid or holder.state != OPEN
    ):
        return WAIT
    if oid in transaction.blind:
        return LOCKLESS
    if holder is not transaction:
        if oid in holder.blind:
            return LOCKLESS
        return WAIT if oid in holder.notified else DEADLOCK
    previous = transaction.writes.get(oid)
    if previous is None:
        return None  # it was only checked: the store that follows is compared as well
    if demand.kind != STORE or previous.value_tid in (None, demand.serial):
        return GRANTED
    return previous.value_tid


def _order(demand: Demand) -> tuple[bytes, int]:
    return demand.transaction.ttid, demand.order


class WaitQueues:
    """Requests that wait for write locks, by object."""

    def __init__(self) -> None:
        self._queues: dict[Oid, list[Demand]] = {}
        self._arrivals = 0
        self._sizes: dict[Connection, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __contains__(self, oid: Oid) -> bool:
        return oid in self._queues

    def __iter__(self) -> Iterator[tuple[Oid, list[Demand]]]:
        """Objects with their waiters, in order."""
        return iter(list(self._queues.items()))

    def size(self, conn: Connection) -> int:
        """Bytes that the parked requests of a peer cost."""
        return self._sizes.get(conn, 0)

    def park(self, demand: Demand, now: float) -> None:
        """Add a request to the queue of its object."""
        self._arrivals += 1
        demand.order = self._arrivals
        demand.since = now
        oid, waiting = demand.oid, demand.transaction.waiting
        insort(self._queues.setdefault(oid, []), demand, key=_order)
        waiting[oid] = waiting.get(oid, 0) + 1
        conn = demand.conn
        self._sizes[conn] = self._sizes.get(conn, 0) + demand.size

    def waiters(self, oid: Oid) -> list[Demand]:
        """Requests that wait for an object, in the order in which they are served."""
        return list(self._queues.get(oid, ()))

    def remove(self, demand: Demand) -> None:
        """Take a request out of its queue."""
        oid, waiting = demand.oid, demand.transaction.waiting
        queue = self._queues[oid]
        queue.remove(demand)
        if not queue:
            del self._queues[oid]
        if waiting[oid] == 1:
            del waiting[oid]
        else:
            waiting[oid] -= 1
        conn = demand.conn
        size = self._sizes[conn] - demand.size
        if size:
            self._sizes[conn] = size
        else:
            del self._sizes[conn]

    def check(self) -> None:
        """Assert that queues are ordered, and counted by their transactions."""
        for oid, queue in self._queues.items():
            assert queue, oid
            assert queue == sorted(queue, key=_order), (oid, queue)
            for demand in queue:
                assert demand.oid == oid, (demand.oid, oid)
                count = sum(d.transaction is demand.transaction for d in queue)
                assert demand.transaction.waiting[oid] == count, demand.transaction
