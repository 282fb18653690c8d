"""Transactions in progress: stores, votes, locks, and what they delay.

Life of a transaction here: OPEN with its first store, check or vote; VOTED when its
vote arrives (durable when it is answered); LOCKED when the master tells its final tid;
UNLOCKED when the master says so: its write locks are free, its objects visible. A lazy
job of the writer moves it to the committed ones, after which it is forgotten; an abort
forgets it before it is LOCKED. What is committed is thus what the database has
plus the UNLOCKED transactions: conflict checks and reads look at these first
(`pending.py`).

Who is told of a conflict resolves it and stores again. If all that wait for an object
were told of it at once, all would, and one would win. So the object is *reserved* for
the first one: younger transactions wait as if it had the lock, until it stores again,
ends, or took too long. Older ones do not, hence reservations are in no cycle of
waiting.

Values stay in memory until they are applied; beyond limits they are spilled to the
database by the writer. Source: behaviour 3.3 to 3.9, architecture 6.4.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from struct import Struct

from neo.lib.connection import LIMIT, Connection
from neo.lib.exception import ProtocolError
from neo.lib.handler import Refused, not_ready
from neo.lib.node import Node
from neo.lib.protocol import (
    FEATURE_EARLY_VOTE,
    MAX_TID,
    MAX_TRANSACTION_OIDS,
    ZERO_TID,
    AnswerCheckCurrentSerial,
    AnswerInformationLocked,
    AnswerRelockObject,
    AnswerStoreObject,
    AnswerStoreTransaction,
    AnswerVoteTransaction,
    ErrorCode,
    NotifyDeadlock,
)
from neo.lib.runtime import Runtime

from .database.interface import Backend, Metadata, Oid, Store, Tid
from .locks import (
    ABSENT,
    BLIND,
    CHECK,
    DEADLOCK,
    GRANTED,
    IGNORED,
    LOCKED,
    LOCKLESS,
    OPEN,
    READABLE,
    RELOCK,
    STORE,
    UNKNOWN,
    UNLOCKED,
    VOTED,
    WAIT,
    Demand,
    Outcome,
    Reservation,
    Transaction,
    WaitQueues,
    Write,
    decide_held,
)
from .pending import Pending
from .writer import Writer

_u64 = Struct(">Q").unpack

# Bytes of values in memory, of one transaction and of all, before some are spilled.
MEMORY_OF_TRANSACTION = 16 << 20
MEMORY = 256 << 20
# Seconds that a client has to resolve a conflict before others get their turn.
RESERVATION = 0.2
# Transactions that are remembered after their end.
REMEMBERED_MAX = 1000


PackRequest = tuple[Sequence[Oid] | None, Tid]


def _remember(ttids: dict[Tid, None], ttid: Tid) -> None:
    """Add one of which late packets may come; the oldest ones are forgotten."""
    ttids[ttid] = None
    if len(ttids) > REMEMBERED_MAX:
        del ttids[next(iter(ttids))]


class Transactions:
    """All transactions in progress on a node in operation.

    `report_stalled(ttid)`: let the master end a transaction; false if it does not know
    how. `access`: how each partition may be used (`locks.ABSENT`...); who changes it
    calls `access_changed`. `ended(ttid)` is called for each transaction that was
    unlocked or dropped, before those who waited for its locks are served. `is_alone()`:
    no other node has a cell.
    """

    def __init__(
        self,
        runtime: Runtime,
        backend: Backend,
        writer: Writer,
        access: list[int],
        lease: float,
        report_stalled: Callable[[Tid], bool],
        ended: Callable[[Tid], object],
        is_alone: Callable[[], bool],
    ) -> None:
        self._runtime = runtime
        self._backend = backend
        self._writer = writer
        self.access = access
        self._np = len(access)
        self._lease = lease
        self._report_stalled = report_stalled
        self._ended = ended
        self._is_alone = is_alone
        self.by_ttid: dict[Tid, Transaction] = {}
        self._locks: dict[Oid, Transaction] = {}
        self._reservations: dict[Oid, Reservation] = {}  # of objects without lock
        self._hurried: Oid | None = None  # it is not reserved again
        # Those that stalled: nothing of them is accepted any more.
        self._refused: dict[Tid, None] = {}
        # Those of which nothing was left when cells went elsewhere.
        self._left: dict[Tid, None] = {}
        self.queues = WaitQueues()
        self.pending = Pending(backend, writer)
        self._memory = 0
        self._freed: deque[Oid] = deque()  # whose waiters must be looked at
        self._serving = False
        self._watching = False
        self.is_over = False

    # --- stores, checks, relocks --------------------------------------------------

    def store(
        self, conn: Connection, ttid: Tid, oid: Oid, serial: Tid, write: Write
    ) -> None:
        """AskStoreObject, whose data was verified."""
        transaction = self._join(conn, ttid)
        self._handle(Demand(STORE, transaction, oid, serial, write, conn))
        if self._freed:
            self._serve()

    def check_serial(self, conn: Connection, ttid: Tid, oid: Oid, serial: Tid) -> None:
        """AskCheckCurrentSerial."""
        transaction = self._join(conn, ttid)
        self._handle(Demand(CHECK, transaction, oid, serial, None, conn))

    def relock(self, conn: Connection, ttid: Tid, oid: Oid) -> None:
        """AskRelockObject: give the lock to who waits, and ask for it again."""
        transaction = self.by_ttid.get(ttid)
        if (
            transaction is None
            or transaction.state != OPEN
            or oid not in transaction.locks
            or oid in transaction.blind
        ):
            conn.answer(AnswerRelockObject, None)
            return
        self._owned(conn, transaction)
        write = transaction.writes.get(oid)
        serial = write.serial if write is not None else transaction.checks[oid]
        demand = Demand(RELOCK, transaction, oid, serial, None, conn)
        self._release(transaction, oid)
        self._serve()
        self._handle(demand)
        self._serve()

    def _join(self, conn: Connection, ttid: Tid) -> Transaction:
        """The transaction, registered if it is new."""
        transaction = self.by_ttid.get(ttid)
        if transaction is None:
            if ttid in self._refused:
                raise Refused(ErrorCode.INCOMPLETE_TRANSACTION, "others waited")
            if ttid > MAX_TID:
                raise ProtocolError(f"invalid ttid {ttid.hex()}")
            transaction = Transaction(ttid, conn.node, self._runtime.monotonic())
            self.by_ttid[ttid] = transaction
            return transaction
        self._owned(conn, transaction)
        if transaction.state != OPEN:
            raise ProtocolError(f"{ttid.hex()} was voted already")
        return transaction

    def _owned(self, conn: Connection, transaction: Transaction) -> None:
        if transaction.node is not conn.node:
            raise ProtocolError(f"{transaction.ttid.hex()} is of another client")
        transaction.touched = self._runtime.monotonic()

    def _handle(self, demand: Demand) -> None:
        outcome = self._decide(demand)
        if outcome in (WAIT, DEADLOCK):
            self._park(demand, outcome == DEADLOCK)
        else:
            self._settle(demand, outcome)

    def _decide(self, demand: Demand) -> Outcome:
        """Source: behaviour 3.3."""
        oid = demand.oid
        access = self.access[_u64(oid)[0] % self._np]
        if access == BLIND:
            return LOCKLESS
        holder = self._locks.get(oid)
        if holder is not None:
            outcome = decide_held(demand, holder)
            if outcome is not None:
                return outcome
        elif (
            oid in self._reservations
            and self._reservations[oid].transaction.ttid < demand.transaction.ttid
        ):
            return WAIT
        if access == ABSENT:
            return IGNORED
        current = self.pending.last_tid_of(oid)
        if current is None or current == demand.serial:
            return GRANTED
        # A lesser tid would be no conflict that its client could resolve.
        return current if current > demand.serial else UNKNOWN

    def _park(self, demand: Demand, is_deadlock: bool) -> None:
        if self.queues.size(demand.conn) > LIMIT:
            raise not_ready("too many requests wait")
        self.queues.park(demand, self._runtime.monotonic())
        if is_deadlock:
            self._notify_deadlock(demand.oid)
        if not self._watching:
            self._watching = True
            self._runtime.call_later(self._lease, self._watch_leases)

    def _notify_deadlock(self, oid: Oid) -> None:
        holder = self._locks[oid]
        holder.notified[oid] = None
        if holder.node is not None and holder.node.connection is not None:
            holder.node.connection.notify(NotifyDeadlock, holder.ttid, oid)

    def _settle(self, demand: Demand, outcome: Outcome) -> None:
        """Do what was decided, and answer."""
        transaction, oid, write = demand.transaction, demand.oid, demand.write
        answer: Tid | None = None
        if outcome == GRANTED:
            if (
                write is not None
                and write.value_tid is not None
                and not self._can_restore(oid, write.value_tid)
            ):
                demand.conn.error(
                    demand.msg_id,
                    ErrorCode.UNDO_PACK_ERROR,
                    f"{oid.hex()} was packed: nothing at {write.value_tid.hex()}",
                )
                return
            if self._locks.get(oid) is None:
                self._locks[oid] = transaction
                transaction.locks[oid] = None
                if oid in self._reservations:
                    # Its own, or a younger one's: those who wait are younger, too.
                    self._reservations.pop(oid).timer.cancel()
            transaction.blind.pop(oid, None)
            transaction.forgotten.pop(oid, None)
        elif outcome == LOCKLESS:
            transaction.blind[oid] = None
            transaction.forgotten.pop(oid, None)
            answer = ZERO_TID
        elif outcome == IGNORED:
            self._answer(demand, ZERO_TID)
            return
        elif outcome == UNKNOWN:
            # Its client read it before a truncation: the next attempt will not.
            text = f"{oid.hex()} has no revision {demand.serial.hex()} any more"
            demand.conn.error(demand.msg_id, ErrorCode.INCOMPLETE_TRANSACTION, text)
            return
        else:
            assert type(outcome) is bytes, outcome
            transaction.conflicts[oid] = None
            transaction.forgotten.pop(oid, None)
            if oid not in self._locks and (
                demand.kind == STORE or oid in transaction.writes
            ):
                self._reserve(oid, transaction)
            self._answer(demand, outcome)
            return
        transaction.conflicts.pop(oid, None)
        if demand.kind == STORE:
            assert write is not None
            transaction.checks.pop(oid, None)
            if self._keep(transaction, oid, write):
                self._spill(transaction, lambda: self._answer(demand, answer))
                return
        elif demand.kind == CHECK and oid not in transaction.writes:
            transaction.checks[oid] = demand.serial
        self._answer(demand, answer)

    def _can_restore(self, oid: Oid, tid: Tid) -> bool:
        """Whether the revision that an undo copies is here, or need not be."""
        return (
            self.access[_u64(oid)[0] % self._np] != READABLE
            or any(t.tid == tid for t in self.pending.by_oid.get(oid, ()))
            or self._backend.has_revision(oid, tid)
        )

    def _answer(self, demand: Demand, conflict: Tid | None) -> None:
        conn, kind = demand.conn, demand.kind
        if kind == STORE:
            conn.send(AnswerStoreObject, demand.msg_id, (conflict,))
        elif kind == CHECK:
            conn.send(AnswerCheckCurrentSerial, demand.msg_id, (conflict,))
        elif conflict is None or conflict == ZERO_TID:
            conn.send(AnswerRelockObject, demand.msg_id, (None,))
        else:
            self._give_back(demand, conflict)

    def _give_back(self, demand: Demand, conflict: Tid) -> None:
        """Cancel a store whose lock was lost; its client gets the data back."""
        transaction, oid = demand.transaction, demand.oid
        transaction.checks.pop(oid, None)
        write = transaction.writes.get(oid)
        value = write and write.value

        if isinstance(value, int):
            value = self._backend.spilled(value)
        data = value and (value[2], value[0], value[1])
        answer = (demand.serial, conflict, data)
        demand.conn.send(AnswerRelockObject, demand.msg_id, (answer,))
        self._discard(transaction, oid)

    # --- values -------------------------------------------------------------------

    def _keep(self, transaction: Transaction, oid: Oid, write: Write) -> bool:
        """Take a write; true if there is so much that values must be spilled."""
        if oid in transaction.writes:
            self._discard(transaction, oid)
        transaction.writes[oid] = write
        size = write.size
        transaction.memory += size
        self._memory += size
        return size > 0 and (
            transaction.memory - transaction.spilling > MEMORY_OF_TRANSACTION
            or self._memory > MEMORY
        )

    def _discard(self, transaction: Transaction, oid: Oid) -> None:
        """Forget what a transaction stored for an object, if anything."""
        write = transaction.writes.pop(oid, None)
        if write is not None:
            size = write.size
            transaction.memory -= size
            self._memory -= size
            if type(write.value) is int:
                self._release_values([write.value])

    def _release_values(self, data_ids: list[int]) -> None:
        backend = self._backend
        self._writer.submit_lazily(lambda: backend.release(data_ids))

    def _spill(self, transaction: Transaction, done: Callable[[], object]) -> None:
        """Write the values of a transaction to the database, then call `done`."""
        writes = [
            (oid, write, write.value)
            for oid, write in transaction.writes.items()
            if type(write.value) is tuple
        ]
        size = sum(len(value[1]) for _, _, value in writes)
        transaction.spilling += size
        backend = self._backend

        def spilled(data_ids: list[int]) -> None:
            transaction.spilling -= size
            if self.is_over:
                return  # `drop_unfinished` does the rest
            useless = []
            is_open = transaction.state == OPEN
            for (oid, write, value), data_id in zip(writes, data_ids, strict=True):
                if (
                    is_open
                    and transaction.writes.get(oid) is write
                    and write.value is value
                ):
                    transaction.memory -= len(value[1])
                    self._memory -= len(value[1])
                    write.value = data_id
                else:
                    # Aborted, stored again, or voted meanwhile.
                    useless.append(data_id)
            if useless:
                self._release_values(useless)
            done()

        self._writer.submit(
            lambda: [backend.spill(oid, value) for oid, _, value in writes],
            spilled,
            durable=False,
        )

    # --- locks --------------------------------------------------------------------

    def _release(self, transaction: Transaction, oid: Oid) -> None:
        del self._locks[oid]
        del transaction.locks[oid]
        transaction.notified.pop(oid, None)
        if oid in self.queues:
            self._freed.append(oid)

    def _reserve(self, oid: Oid, transaction: Transaction) -> None:
        """The client of a transaction is told of a conflict: it may resolve it."""
        if oid == self._hurried:
            return
        former = self._reservations.get(oid)
        if former is not None:
            if former.transaction is transaction:
                return  # told again: it gets no more time
            former.timer.cancel()
        timer = self._runtime.call_later(
            RESERVATION, lambda: self._reservation_is_over(oid)
        )
        self._reservations[oid] = Reservation(transaction, timer)

    def _reservation_is_over(self, oid: Oid) -> None:
        """Nobody waits twice for slow clients: all are told what there is."""
        if self.is_over:
            return
        self._hurried = oid
        self._unreserve([oid])
        self._serve()
        self._hurried = None

    def _unreserve(self, oids: Iterable[Oid]) -> None:
        for oid in oids:
            self._reservations.pop(oid).timer.cancel()
            if oid in self.queues:
                self._freed.append(oid)

    def _serve(self) -> None:
        """Look at the waiters of the objects that were freed.

        Not reentrant: what happens meanwhile (a lock freed by a conflict, a connection
        closed) is noted, and seen by the loop below.
        """
        if self._serving:
            return
        self._serving = True
        freed = self._freed
        while freed:
            self._serve_one(freed.popleft())
        self._serving = False

    def _serve_one(self, oid: Oid) -> None:
        is_taken = False
        for demand in self.queues.waiters(oid):
            transaction = demand.transaction
            if oid not in transaction.waiting:
                continue  # aborted by what happened to another one
            if is_taken and self._locks.get(oid) is not transaction:
                continue  # who comes first waits, hence those behind too
            outcome = self._decide(demand)
            if outcome == DEADLOCK:
                self._notify_deadlock(oid)
            if outcome in (WAIT, DEADLOCK):
                is_taken = True
            else:
                self.queues.remove(demand)
                self._settle(demand, outcome)

    def _watch_leases(self) -> None:
        """End the transactions that others wait for, and whose clients do nothing.

        Source: architecture 6.6.
        """
        self._watching = False
        if self.is_over or not len(self.queues):
            return
        now = self._runtime.monotonic()
        due = now + self._lease
        for oid, demands in self.queues:
            holder = self._locks.get(oid)
            if holder is None or holder.state > VOTED:
                continue
            if holder.waiting and oid not in holder.notified:
                continue  # for another one, here
            since = max(holder.touched, min(demand.since for demand in demands))
            if now < since + self._lease:
                due = min(due, since + self._lease)
            else:
                self._end_lease(holder)
        self._watching = True
        delay = max(due - now, self._lease / 20)
        self._runtime.call_later(delay, self._watch_leases)

    def _end_lease(self, holder: Transaction) -> None:
        now = self._runtime.monotonic()
        idle = now - holder.touched
        holder.touched = now  # not said again before long
        node = holder.node
        self._runtime.log.warning(
            "others wait for %s of %s, idle for %.0f s", holder.ttid.hex(), node, idle
        )
        if self._report_stalled(holder.ttid):
            return
        # The loss of the connection drops what is not voted, no more.
        if holder.state == OPEN and node is not None and node.connection is not None:
            node.connection.close(f"{holder.ttid.hex()} holds locks without progress")

    # --- vote, lock, unlock -------------------------------------------------------

    def vote(
        self, conn: Connection, ttid: Tid, metadata: Metadata | None = None
    ) -> None:
        """AskVoteTransaction, or AskStoreTransaction if there is metadata."""
        if metadata is not None:
            pack_oids = metadata.pack and metadata.pack[0]
            if len(metadata.oids) > MAX_TRANSACTION_OIDS or (
                pack_oids and len(pack_oids) > MAX_TRANSACTION_OIDS
            ):
                raise ProtocolError(f"more than {MAX_TRANSACTION_OIDS} oids")
            if metadata.pack and metadata.pack[1] > MAX_TID:
                raise ProtocolError(f"invalid pack tid {metadata.pack[1].hex()}")
            limit = self._backend.metadata_max
            if limit is not None and max(map(len, metadata[:3])) > limit:
                raise Refused(
                    ErrorCode.DENIED,
                    "user name, description or extension of the transaction is longer"
                    f" than the {limit} bytes that the database can hold",
                )
            transaction = self._join(conn, ttid)
            if self.access[_u64(ttid)[0] % self._np] != ABSENT:
                transaction.has_metadata = True
            answer, kept = AnswerStoreTransaction, metadata
        else:
            if ttid not in self.by_ttid and ttid not in self._refused:
                if ttid not in self._left:
                    raise ProtocolError(f"unknown transaction {ttid.hex()}")
                conn.answer(AnswerVoteTransaction)
                return
            transaction = self._join(conn, ttid)
            answer, kept = AnswerVoteTransaction, None
        if transaction.forgotten:
            oid = next(iter(transaction.forgotten))
            raise Refused(
                ErrorCode.INCOMPLETE_TRANSACTION, f"conflict of {oid.hex()}, not told"
            )
        if transaction.waiting or transaction.conflicts or transaction.spilling:
            assert conn.node is not None
            if FEATURE_EARLY_VOTE in conn.node.extra.get("features", ()):
                raise Refused(ErrorCode.INCOMPLETE_TRANSACTION)
            if transaction.waiting:
                raise ProtocolError(f"{ttid.hex()} voted while its stores wait")
        transaction.state = VOTED
        stores = [
            Store(oid, write.value_tid, write.value)
            for oid, write in transaction.writes.items()
        ]
        recorded = kept if transaction.has_metadata else None
        if not stores and recorded is None:
            transaction.is_durable = True
            conn.answer(answer)
            if self._is_empty(transaction):
                self._leave(transaction)
            return
        backend = self._backend
        if self._is_alone():
            # If it is lost by a crash before the lock is durable, nobody knows more of
            # the transaction than that it was not finished. The sync of the lock
            # covers it, and what is done for it here hides behind the way to there.
            conn.answer(answer)
            self._writer.submit(
                lambda: backend.vote(ttid, stores, recorded), durable=False
            )
            return
        reply = conn.defer()

        def voted(result: None) -> None:
            transaction.is_durable = True
            reply.answer(answer)

        # Durable: a client that is told so may ask to finish, and what one node has
        # locked must be found on the others after a crash of all nodes.
        self._writer.submit(lambda: backend.vote(ttid, stores, recorded), voted)

    def lock(self, conn: Connection, ttid: Tid, tid: Tid, pack: bool) -> None:
        """AskLockInformation: the transaction is decided when all have answered."""
        transaction = self.by_ttid.get(ttid)
        if transaction is None or transaction.state != VOTED:
            raise ProtocolError(f"{ttid.hex()} is not a voted transaction")
        if not ttid <= tid <= MAX_TID:
            raise ProtocolError(f"{ttid.hex()} can't become {tid.hex()}")
        transaction.state = LOCKED
        transaction.tid = tid
        self.pending.add(transaction)
        reply = conn.defer()

        def locked(result: None = None) -> None:
            reply.answer(AnswerInformationLocked, ttid)

        if transaction.has_metadata:
            backend = self._backend
            # Durable: the client is told of the commit when all nodes have said so.
            self._writer.submit(lambda: backend.lock(ttid, tid, pack), locked)
        elif transaction.is_durable:
            locked()
        else:
            self._writer.barrier(locked)

    def unlock(self, ttid: Tid) -> None:
        """NotifyUnlockInformation: the transaction is committed."""
        transaction = self.by_ttid.get(ttid)
        if transaction is None or transaction.state != LOCKED:
            raise ProtocolError(f"{ttid.hex()} is not a locked transaction")
        transaction.state = UNLOCKED
        tid = transaction.tid
        assert tid is not None
        backend = self._backend
        self._writer.submit_lazily(
            lambda: backend.unlock(ttid, tid), lambda result: self._applied(transaction)
        )
        for oid in tuple(transaction.locks):
            self._release(transaction, oid)
        transaction.blind.clear()
        self._end([ttid])
        self.pending.resume(transaction)

    def _applied(self, transaction: Transaction) -> None:
        """The database shows the transaction."""
        if self.is_over:
            return
        del self.by_ttid[transaction.ttid]
        self._memory -= transaction.memory
        self.pending.remove(transaction)
        self.pending.resume(transaction)

    # --- abort --------------------------------------------------------------------

    def abort(self, ttid: Tid) -> None:
        """Drop a transaction, unless it is locked, or unknown."""
        transaction = self.by_ttid.get(ttid)
        if transaction is not None and transaction.state <= VOTED:
            self._drop(transaction)
            self._end([ttid])

    def refuse(self, ttid: Tid) -> None:
        """The master aborts a transaction whose client does not know it."""
        _remember(self._refused, ttid)
        self.abort(ttid)

    def abort_of_node(self, node: Node, *, voted: bool) -> None:
        """Drop the transactions of a client, if it is gone for all `voted` ones too."""
        limit = VOTED if voted else OPEN
        ttids = [
            ttid
            for ttid, transaction in self.by_ttid.items()
            if transaction.node is node and transaction.state <= limit
        ]
        for ttid in ttids:
            self._drop(self.by_ttid[ttid])
        self._end(ttids)

    def _end(self, ttids: Iterable[Tid]) -> None:
        """Transactions ended: their locks are free.

        Those who wait come last: a blind write of a partition whose replication ends
        takes the lock first (`reserve_blind_writes`).
        """
        for ttid in ttids:
            self._ended(ttid)
        self._serve()

    def _drop(self, transaction: Transaction) -> None:
        ttid = transaction.ttid
        del self.by_ttid[ttid]
        for oid in tuple(transaction.waiting):
            for demand in self.queues.waiters(oid):
                if demand.transaction is transaction:
                    self.queues.remove(demand)
                    self._answer(demand, ZERO_TID)
        for oid in tuple(transaction.locks):
            self._release(transaction, oid)
        self._unreserve(
            oid
            for oid in transaction.conflicts
            if oid in self._reservations
            and self._reservations[oid].transaction is transaction
        )
        self._memory -= transaction.memory
        if transaction.state == VOTED:
            # What is left by a crash is dropped by the next start: nothing is promised.
            backend = self._backend
            self._writer.submit(lambda: backend.abort(ttid), durable=False)
        else:
            spilled = [
                write.value
                for write in transaction.writes.values()
                if type(write.value) is int
            ]
            if spilled:
                self._release_values(spilled)
        transaction.state = OPEN
        transaction.writes.clear()

    # --- partition table ----------------------------------------------------------

    def access_changed(self, partitions: Iterable[int]) -> None:
        """`access` changed: drop what was lost, serve who waited for no lock."""
        self.pending.recent.clear()  # replication wrote, too
        changed = set(partitions)
        lost = {p for p in changed if self.access[p] == ABSENT}
        if lost:
            for transaction in self.by_ttid.values():
                if transaction.state <= VOTED:
                    self._drop_partitions(transaction, lost)
        self._unreserve(
            [o for o in self._reservations if _u64(o)[0] % self._np in changed]
        )
        for oid, _ in self.queues:
            if _u64(oid)[0] % self._np in changed:
                self._freed.append(oid)
        self._serve()
        if lost:
            for transaction in tuple(self.by_ttid.values()):
                if transaction.state <= VOTED and self._is_empty(transaction):
                    self._leave(transaction)

    def _leave(self, transaction: Transaction) -> None:
        """Nothing of a transaction is here, and the master will not say how it ends."""
        _remember(self._left, transaction.ttid)
        self.abort(transaction.ttid)

    def _is_empty(self, transaction: Transaction) -> bool:
        return not (
            transaction.writes
            or transaction.checks
            or transaction.conflicts
            or transaction.forgotten
            or transaction.blind
            or transaction.locks
            or transaction.waiting
            or transaction.has_metadata
        )

    def _drop_partitions(self, transaction: Transaction, lost: set[int]) -> None:
        np = self._np

        def select(oids: Iterable[Oid]) -> list[Oid]:
            return [oid for oid in oids if _u64(oid)[0] % np in lost]

        for oid in select(transaction.locks):
            self._release(transaction, oid)
        for oid in select(transaction.blind):
            del transaction.blind[oid]
        for oid in select(transaction.checks):
            del transaction.checks[oid]
        for oid in select(transaction.forgotten):
            del transaction.forgotten[oid]
        for oid in select(transaction.conflicts):
            del transaction.conflicts[oid]
        if _u64(transaction.ttid)[0] % np in lost:
            transaction.has_metadata = False
        for oid in select(transaction.writes):
            if transaction.state == OPEN:
                self._discard(transaction, oid)
            else:
                # The rows of the vote are dropped with the change of the table.
                size = transaction.writes.pop(oid).size
                transaction.memory -= size
                self._memory -= size

    # --- end of a replication -----------------------------------------------------

    def reserve_blind_writes(self, partitions: Iterable[int]) -> set[int]:
        """Prepare the end of the replication of partitions that are BLIND.

        Each object written blindly gets a lock, which goes to the highest ttid and only
        delays new transactions. Returns the partitions where several transactions wrote
        the same object: they must wait for one of them. Source: behaviour 5.7.
        """
        waiting = set(partitions)
        excluded = set()
        for ttid in sorted(self.by_ttid):
            transaction = self.by_ttid[ttid]
            if transaction.state == UNLOCKED:
                continue
            for oid in transaction.blind:
                partition = _u64(oid)[0] % self._np
                if partition not in waiting:
                    continue
                holder = self._locks.get(oid)
                if holder is not None and holder is not transaction:
                    assert oid in holder.blind, (oid, holder, transaction)
                    excluded.add(partition)
                    del holder.locks[oid]
                self._locks[oid] = transaction
                transaction.locks[oid] = None
        return excluded

    def settle_blind_writes(self, partitions: Container[int]) -> None:
        """Make the blind writes of partitions normal ones: their history is complete.

        All at once: who is served in between might write blindly in another of them.

        One that conflicts is forgotten, silently: a readable cell told its client, who
        stores again, or doesn't vote. If that cell was dropped before it could, the
        vote is refused here.
        """
        for transaction in tuple(self.by_ttid.values()):
            if transaction.state == UNLOCKED:
                continue
            for oid in tuple(transaction.blind):
                if _u64(oid)[0] % self._np not in partitions:
                    continue
                del transaction.blind[oid]
                write = transaction.writes.get(oid)
                serial = write.serial if write else transaction.checks.get(oid)
                current = self.pending.last_tid_of(oid)
                if current is None or serial is None or current <= serial:
                    continue
                if transaction.state == OPEN:
                    self._release(transaction, oid)
                    self._discard(transaction, oid)
                    transaction.checks.pop(oid, None)
                    transaction.forgotten[oid] = None
        self._serve()

    # --- reads --------------------------------------------------------------------

    def written(self, ttid: Tid) -> dict[Oid, Tid]:
        """What a transaction wrote, for `undo_serials`: value_tid, or the ttid."""
        transaction = self.by_ttid.get(ttid)
        if transaction is None:
            return {}
        return {o: w.value_tid or ttid for o, w in transaction.writes.items()}

    # --- support ------------------------------------------------------------------

    def leave(self) -> None:
        """The node leaves operation: completions to come have nothing to do."""
        self.is_over = True
        self._writer.flush()

    def describe(self) -> list[str]:
        """Lines for the log."""
        lines = [
            f"{t.ttid.hex()} {t.tid.hex() if t.tid else ''} state={t.state} {t.node}"
            f" writes={len(t.writes)} checks={len(t.checks)} locks={len(t.locks)}"
            f" blind={len(t.blind)} memory={t.memory} readers={len(t.readers)}"
            for t in self.by_ttid.values()
        ]
        for oid, demands in self.queues:
            ttids = " ".join(demand.transaction.ttid.hex() for demand in demands)
            lines.append(f"waiting for {oid.hex()}: {ttids}")
        return lines

    def check(self) -> None:
        """Assert what must hold between two events. Source: testing 4."""
        assert not self._freed, self._freed
        assert not self._serving
        self.queues.check()
        memory = 0
        for ttid, transaction in self.by_ttid.items():
            assert transaction.ttid == ttid
            memory += transaction.memory
            assert transaction.memory == sum(
                write.size for write in transaction.writes.values()
            ), transaction
            assert (transaction.state >= LOCKED) == (ttid in self.pending), ttid
            assert (transaction.tid is None) == (transaction.state <= VOTED)
            assert transaction.state == OPEN or not transaction.waiting, ttid
            assert transaction.state >= LOCKED or not transaction.readers, ttid
            assert transaction.state != UNLOCKED or not transaction.locks, ttid
            for oid in transaction.locks:
                assert self._locks[oid] is transaction, (ttid, oid)
                assert (
                    oid in transaction.writes
                    or oid in transaction.checks
                    or oid in transaction.blind
                ), (ttid, oid)
            for oid in transaction.waiting:
                assert oid in self.queues, oid
        assert memory == self._memory, (memory, self._memory)
        for oid, transaction in self._locks.items():
            assert self.by_ttid[transaction.ttid] is transaction, transaction
            assert oid in transaction.locks, oid
        for oid, reservation in self._reservations.items():
            transaction = reservation.transaction
            assert oid not in self._locks, oid
            assert self.by_ttid[transaction.ttid] is transaction, transaction
            assert oid in transaction.conflicts, (oid, transaction)
            assert self.access[_u64(oid)[0] % self._np] not in (ABSENT, BLIND), oid
        for oid, demands in self.queues:
            holder = self._locks.get(oid)
            first = demands[0].transaction
            if holder is None:
                transaction = self._reservations[oid].transaction
                assert transaction.ttid < first.ttid, (oid, transaction, first)
                continue
            # Who waits, waits for somebody: not for itself, and not for nothing.
            assert (
                holder is first
                or holder.ttid < first.ttid
                or holder.state != OPEN
                or oid in holder.notified
            ), (oid, holder, first)
        self.pending.check()
