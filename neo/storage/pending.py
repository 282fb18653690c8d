"""Transactions that have their tid and aren't in the committed tables yet.

An object is *pending* from the lock of a transaction that stores it until that is
applied. A read of a pending object is answered if it asks for an older revision, with
the tid of the transaction as next tid (behaviour 12.3); from memory if it asks for the
revision of an UNLOCKED transaction; else it waits for the transaction. So does a read
of transactions up to a tid that includes it.
"""

from __future__ import annotations

from collections.abc import Callable

from neo.lib.connection import Connection
from neo.lib.handler import not_ready
from neo.lib.protocol import ZERO_HASH

from .database.interface import Backend, Oid, Revision, Tid
from .locks import LOCKED, UNLOCKED, Reading, Transaction
from .writer import Writer

# Reads of one peer that wait.
READS_MAX = 10_000
# Objects whose last tid is remembered, once it is applied.
RECENT = 10_000


class Pending:
    """The LOCKED and UNLOCKED transactions, and the reads that wait for them.

    `by_oid`: those that store an object, by increasing tid.
    """

    def __init__(self, backend: Backend, writer: Writer) -> None:
        self._backend = backend
        self._writer = writer
        self._unapplied: dict[Tid, Transaction] = {}  # by ttid, in order of their locks
        self.by_oid: dict[Oid, list[Transaction]] = {}
        self.applied: dict[Oid, Tid | None] = {}  # last tids in the database, of now
        # Last tids in the database of what was applied lately: what is modified again
        # and again, by whom waits for the answer, needs no look into the database,
        # whose pages the other connection has just changed.
        self.recent: dict[Oid, Tid] = {}
        self._reads: dict[Connection, int] = {}

    def __contains__(self, ttid: Tid) -> bool:
        return ttid in self._unapplied

    def add(self, transaction: Transaction) -> None:
        """A transaction is locked: it has its tid."""
        assert transaction.state == LOCKED
        self._unapplied[transaction.ttid] = transaction
        by_oid = self.by_oid
        for oid in transaction.writes:
            if oid in by_oid:
                by_oid[oid].append(transaction)
            else:
                by_oid[oid] = [transaction]

    def remove(self, transaction: Transaction) -> None:
        """The database shows a transaction."""
        del self._unapplied[transaction.ttid]
        assert transaction.tid is not None
        recent = self.recent
        if len(recent) > RECENT:
            recent.clear()
        for oid in transaction.writes:
            users = self.by_oid[oid]
            users.remove(transaction)
            if not users:
                del self.by_oid[oid]
            recent[oid] = transaction.tid

    def last_tid_of(self, oid: Oid) -> Tid | None:
        """Tid of the last committed revision, applied or not."""
        for transaction in reversed(self.by_oid.get(oid, ())):
            if transaction.state == UNLOCKED:
                return transaction.tid
        if (tid := self.recent.get(oid)) is not None:
            return tid
        if oid in self.applied:
            return self.applied[oid]
        return self._backend.last_tid_of(oid)

    def load(
        self, oid: Oid, at: Tid | None, before: Tid | None
    ) -> Revision | Transaction | None:
        """Read an object that is pending.

        A transaction is returned if the read must wait for it.
        """
        users = self.by_oid[oid]
        # Those that the answer depends on come first, by increasing tid.
        visible = [t for t in users if _is_visible(t, at, before)]
        if not visible:
            revision = self._backend.load(oid, at, before)
            if revision is None or revision[1] is not None:
                return revision
            tid, _, compression, checksum, data, value_tid = revision
            return tid, users[0].tid, compression, checksum, data, value_tid
        last = visible[-1]
        write = last.writes[oid]
        value = write.value
        if (
            at is not None
            or last.state != UNLOCKED
            or write.value_tid is not None
            or isinstance(value, int)
        ):
            return last
        assert last.tid is not None
        following = users[users.index(last) + 1 :]
        next_tid = following[0].tid if following else None
        if value is None:
            return last.tid, next_tid, None, ZERO_HASH, b"", None
        checksum, data, compression = value
        return last.tid, next_tid, compression, checksum, data, None

    def until(self, bound: Tid) -> Transaction | None:
        """The last transaction that a read of tids <= `bound` must wait for."""
        result = None
        for transaction in self._unapplied.values():
            assert transaction.tid is not None
            if transaction.tid <= bound:
                result = transaction
        return result

    def at(self, tid: Tid) -> Transaction | None:
        """The transaction that is known by this tid, if it isn't applied."""
        for transaction in self._unapplied.values():
            if transaction.tid == tid:
                return transaction
        return None

    def wait(
        self, conn: Connection, transaction: Transaction, resume: Callable[[], object]
    ) -> None:
        """Call `resume` when something happened to a LOCKED or UNLOCKED transaction.

        That is, when it is unlocked or applied: `resume` looks again, and may wait
        again. An UNLOCKED one is applied now.
        """
        count = self._reads.get(conn, 0)
        if count >= READS_MAX:
            raise not_ready("too many reads wait")
        self._reads[conn] = count + 1
        transaction.readers.append(Reading(conn, resume))
        if transaction.state == UNLOCKED:
            self._writer.flush()

    def resume(self, transaction: Transaction) -> None:
        """Resume the reads that wait for a transaction, which changed."""
        readers, transaction.readers = transaction.readers, []
        for reading in readers:
            conn = reading.conn
            count = self._reads[conn] - 1
            if count:
                self._reads[conn] = count
            else:
                del self._reads[conn]
            if not conn.closed:
                reading.resume()

    def check(self) -> None:
        """Assert what must hold between two events."""
        for oid, users in self.by_oid.items():
            tids = [t.tid for t in users if t.tid is not None]
            assert len(tids) == len(users), oid
            assert tids == sorted(tids), (oid, tids)
            assert all(oid in t.writes for t in users), oid
        for conn, count in self._reads.items():
            waiting = sum(
                r.conn is conn for t in self._unapplied.values() for r in t.readers
            )
            assert waiting == count, (conn, count, waiting)


def _is_visible(transaction: Transaction, at: Tid | None, before: Tid | None) -> bool:
    """Whether a read may see what a transaction that has its tid stored."""
    tid = transaction.tid
    assert tid is not None
    if at is not None:
        return tid <= at
    return before is None or tid < before
