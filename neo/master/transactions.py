"""Transactions, from their ids to the unlock of the storages (behaviour 2.11 and 3).

A transaction is in its first phase until its client asks to finish it; then it has a
tid, stands in the finish queue and is never aborted. The queue is in the order of tids:
a transaction is committed when the storages involved have locked it and all those
before it are committed. So clients hear of commits in the order of tids.

Who waits stands in lists: begins (in order of arrival) while a storage is starting,
failed votes until another transaction ends, AskFinalTID in its transaction.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from neo.lib.connection import Connection, Reply, encode_tail
from neo.lib.exception import ProtocolError
from neo.lib.handler import Refused, not_ready
from neo.lib.node import Node, nid_str
from neo.lib.protocol import (
    MAX_TID,
    ZERO_OID,
    ZERO_TID,
    AbortTransaction,
    AnswerBeginTransaction,
    AnswerFinalTID,
    AnswerNewOIDs,
    AnswerTransactionFinished,
    AnswerUnfinishedTransactions,
    AskLockInformation,
    ErrorCode,
    InvalidateObjects,
    InvalidatePartitions,
    NotifyStalledTransaction,
    NotifyTransactionFinished,
    NotifyUnlockInformation,
    Pack,
    Ping,
)
from neo.lib.util import add_tid, p64, u64

from .reputation import Reputation
from .settling import Settling
from .tid import clock_tid, final_tid, next_tid

if TYPE_CHECKING:
    from .app import Master

# A jump of the clock between two looks at it that deserves a warning (seconds).
CLOCK_STEP = 1.0
# How far in the future an imposed tid may be (seconds): those of a database that was
# made on a machine with a wrong clock would hold back all later ones.
FUTURE_MAX = 86400.0
# After the last tid, even if that is too far in the future already: one minute.
FUTURE_STEP = 1 << 32
# Of ids, after those of a former primary, if the clock is late: up to one minute.
ID_GAP = 1 << 32
NEW_OIDS_MAX = 1 << 16
# Who answers a Ping within this time (seconds) is healthy.
ALIVE = 1.0
# More clients than these are not told of each commit on its own, but within TOGETHER
# seconds: with 200 of them, that is most of what a commit costs. Who synchronises, or
# is answered, has been told before.
MANY = 16
TOGETHER = 0.05
# Requests that wait; beyond, clients are told to come again later.
PARKED_MAX = 100_000
# Transactions that are remembered as dropped.
EXPIRED_MAX = 1000


class Transaction:
    """One transaction in progress."""

    __slots__ = (
        "approved",
        "asking",
        "begun",
        "client",
        "failed",
        "healthy",
        "imposed",
        "involved",
        "oids",
        "pack",
        "partitions",
        "ptid",
        "reply",
        "since",
        "tid",
        "ttid",
        "waiting",
        "watchers",
    )

    def __init__(self, ttid: bytes, client: Node, begun: int, imposed: bool) -> None:
        self.ttid = ttid
        self.client: Node | None = client  # None: lost, while being finished
        # Of the storages, those that were ready by then have it in full.
        self.begun = begun
        self.imposed = imposed  # the tid came with the begin
        self.failed: dict[int, None] = {}  # nids where writes failed (FailedVote)
        self.healthy: dict[int, None] = {}  # of these, those that answer us
        # Connections to tell its end: storages that replicate.
        self.watchers: dict[Connection, None] = {}
        self.asking: list[Reply] = []  # AskFinalTID
        # Second phase:
        self.tid: bytes | None = None
        self.reply: Reply | None = None
        self.oids: Sequence[bytes] = ()
        self.partitions: list[int] = []  # of modified and deleted oids
        self.involved: dict[int, Connection] = {}  # by nid
        self.waiting: dict[int, None] = {}  # nids that have not locked yet
        self.pack: Pack | None = None
        self.approved = False  # the pack order
        # Storages whose cells are readable in this version of the table, or a later
        # one, have the transaction.
        self.ptid = 0
        self.since = 0.0  # monotonic time of the finish

    def __repr__(self) -> str:
        state = "begun"
        if self.tid is not None:
            awaited = ", ".join(map(nid_str, self.waiting)) or "its predecessors"
            state = f"finishing as {self.tid.hex()}, waits for {awaited}"
        client = nid_str(self.client.nid if self.client else None)
        return f"<Transaction {self.ttid.hex()} of {client}, {state}>"


class Transactions:
    """All that the primary master knows of transactions; reset at each recovery."""

    def __init__(self, master: Master) -> None:
        self.master = master
        self.runtime = master.runtime
        self.log = master.runtime.log
        self._telling = False  # `_tell` will be called
        self._offset = self.runtime.now() - self.runtime.monotonic()
        self._given = ZERO_TID  # the greatest id that was made, for as long as we live
        self.settling = Settling(master, self._settled)
        self.reputation = Reputation()
        self.reset()

    def reset(self) -> None:
        """Forget all: the operation is over (the peers know)."""
        self.settling.reset()
        self.last_tid = ZERO_TID  # committed
        self.last_oid = ZERO_OID
        self.first_tid = MAX_TID
        self.in_progress: dict[bytes, Transaction] = {}  # by ttid, both phases
        self.queue: deque[Transaction] = deque()  # second phase, by tid
        self.clients: dict[Node, Connection] = {}
        self.by_client: dict[Node, dict[bytes, Transaction]] = {}
        # Backup masters: they follow partitions instead of objects.
        self.backups: dict[Node, Connection] = {}
        # Storages that can take part: nid -> (rank of arrival, connection).
        self.ready: dict[int, tuple[int, Connection]] = {}
        self.rank = 0
        # Cells that were assigned during the operation: (partition, nid) -> rank.
        # Transactions that had begun were not written there; they are replicated.
        self.assigned: dict[tuple[int, int], int] = {}
        self.starting: dict[Node, float] = {}  # since when (monotonic)
        self.stopping = False  # nothing begins any more
        # Dropped because others waited for them: their clients may not know it.
        self.expired: dict[bytes, Node | None] = {}
        # Those of an import in their first phase, by ttid.
        self._imposed: dict[bytes, Transaction] = {}
        self._begins: deque[tuple[Reply, bytes | None]] = deque()
        self._votes: list[tuple[Reply, Transaction, dict[int, None]]] = []

    # --- storages and clients -------------------------------------------------------

    def storage_starting(self, node: Node) -> None:
        """StartOperation was sent."""
        self.starting[node] = self.runtime.monotonic()

    def storage_ready(self, node: Node) -> None:
        """It accepts clients: transactions that begin from now on involve it."""
        del self.starting[node]
        self.rank += 1
        assert node.nid is not None
        self.reputation.ready(node.nid)
        self.ready[node.nid] = self.rank, node.connection
        self._retry_begins()

    def cells_assigned(self, cells: Iterable[tuple[int, int]]) -> None:
        """Transactions that begin from now on know of these (partition, nid)."""
        self.rank += 1
        for cell in cells:
            self.assigned[cell] = self.rank

    def storage_lost(self, node: Node) -> None:
        """Nothing more waits for it. The cluster is operational without it."""
        self.starting.pop(node, None)
        nid = node.nid
        assert nid is not None
        self.settling.storage_lost(node)
        if self.ready.pop(nid, None) is not None:
            for transaction in self.queue:
                if nid in transaction.waiting:
                    del transaction.waiting[nid]
                    # The node may not have it: it is late from this table on.
                    transaction.ptid = self.master.pt.ptid or 0
            self._unlock()
        self._retry_begins()
        self._retry_votes()

    def _settled(self) -> None:
        """The partition table is on the disks: what waited for that goes on."""
        self._unlock()
        self.master.tell_replicated()

    def client_joined(self, node: Node, conn: Connection, backup: bool) -> None:
        (self.backups if backup else self.clients)[node] = conn

    def client_lost(self, node: Node) -> None:
        """Drop what it began; what it asked to finish is completed without it."""
        self.clients.pop(node, None)
        self.backups.pop(node, None)
        for transaction in list(self.by_client.pop(node, {}).values()):
            if transaction.tid is None:
                self._drop(transaction, ())
            else:
                transaction.client = transaction.reply = None
        self._ended()

    # --- ids --------------------------------------------------------------------------

    @property
    def greatest(self) -> bytes:
        """The greatest id known: no later one may be at or below it."""
        greatest = max(self.last_tid, self._given)
        if self.in_progress:
            # In the order of ttids, for each was made greater than the ones before.
            greatest = max(greatest, next(reversed(self.in_progress)))
        if self.queue:
            greatest = max(greatest, self.queue[-1].tid or ZERO_TID)
        return greatest

    def clock(self) -> bytes:
        """Tid of the clock, which may have been set."""
        now = self.runtime.now()
        offset = now - self.runtime.monotonic()
        step = offset - self._offset
        if abs(step) > CLOCK_STEP:
            self.log.warning(
                "the clock was set %s by %.1f s: tids go on increasing",
                "ahead" if step > 0 else "back",
                abs(step),
            )
        self._offset = offset
        return clock_tid(now)

    def set_last_ids(
        self, last_tid: bytes, last_oid: bytes, first_tid: bytes, last_ttid: bytes
    ) -> None:
        """What verification found on the storages.

        The former primary may have given ids that no storage knows, one after the
        other if its clock was late. None may be given again: who asks what became of
        its transaction would hear of another one. So leave a gap that nobody fills.
        """
        self.last_tid, self.last_oid, self.first_tid = last_tid, last_oid, first_tid
        last = max(last_tid, last_ttid)
        if last != ZERO_TID and last >= max(self.clock(), self._given):
            self._given = add_tid(last, self.runtime.rng.randrange(ID_GAP))
        if last_tid > clock_tid(self.runtime.now() + CLOCK_STEP):
            self.log.warning(
                "the clock is behind the last tid, %s: new ones follow it",
                last_tid.hex(),
            )

    def new_oids(self, conn: Connection, count: int) -> None:
        """AskNewOIDs."""
        if not 0 < count <= NEW_OIDS_MAX:
            raise ProtocolError(f"from 1 to {NEW_OIDS_MAX} oids can be asked")
        first = u64(self.last_oid) + 1
        if first + count > u64(MAX_TID):
            raise ProtocolError("no more oids")
        oids = [p64(oid) for oid in range(first, first + count)]
        self.last_oid = oids[-1]
        conn.answer(AnswerNewOIDs, oids)

    # --- first phase ------------------------------------------------------------------

    def begin(self, conn: Connection, tid: bytes | None) -> None:
        """AskBeginTransaction."""
        if self.stopping or self._awaits_storages():
            # A client must know whether it has to write to a storage.
            if len(self._begins) >= PARKED_MAX:
                raise not_ready("too many transactions wait to begin")
            self._begins.append((conn.defer(), tid))
            return
        assert conn.node is not None
        ttid = self._begin(conn.node, tid)
        former = self.queue[-1] if self.queue else None
        if (
            former is not None
            and former.client is conn.node
            and former.since == self.runtime.monotonic()
        ):
            # Begun ahead, along with the end of the former one, before which nobody
            # needs it; and to wake the client now takes time from the storages.
            conn.answer_later(AnswerBeginTransaction, ttid)
            self._tell_soon()
        else:
            conn.answer(AnswerBeginTransaction, ttid)

    def _awaits_storages(self) -> bool:
        """Is a storage starting that clients would have to write to?"""
        return bool(self.starting) and any(
            node.nid in row for node in self.starting for row in self.master.pt.rows
        )

    def _begin(self, client: Node, tid: bytes | None) -> bytes:
        if tid is None:
            if self._imposed:
                first = next(iter(self._imposed))
                raise ProtocolError(f"an import is in progress, with tid {first.hex()}")
            ttid = self._given = next_tid(self.clock(), self.greatest)
        else:
            self._check_imposed(client, tid)
            ttid = tid
        transaction = Transaction(ttid, client, self.rank, tid is not None)
        if tid is not None:
            self._imposed[ttid] = transaction
        self.in_progress[ttid] = transaction
        self.by_client.setdefault(client, {})[ttid] = transaction
        return ttid

    def _check_imposed(self, client: Node, tid: bytes) -> None:
        in_progress = self.in_progress
        # What this client imported before may still be in progress.
        if any(
            not other.imposed or other.client is not client
            for other in in_progress.values()
        ):
            raise ProtocolError(
                "an imposed tid needs that no other transaction is in progress"
            )
        last_tid = next(reversed(in_progress)) if in_progress else self.last_tid
        if tid <= last_tid:
            raise ProtocolError(
                f"tid {tid.hex()} is not after the last one, {last_tid.hex()}"
            )
        limit = max(
            clock_tid(self.runtime.now() + FUTURE_MAX),
            add_tid(self.last_tid, FUTURE_STEP),
        )
        if tid > limit and not self.master.options.future_tids:
            raise ProtocolError(
                f"tid {tid.hex()} is too far in the future: all later ones would be too"
            )
        if tid >= MAX_TID:
            raise ProtocolError(f"invalid tid {tid.hex()}")

    def _retry_begins(self) -> None:
        while self._begins and not (self.stopping or self._awaits_storages()):
            reply, tid = self._begins.popleft()
            if reply.closed:
                continue
            node = reply.conn.node
            assert node is not None
            try:
                reply.answer(AnswerBeginTransaction, self._begin(node, tid))
            except ProtocolError as error:
                reply.refuse(Refused(ErrorCode.PROTOCOL_ERROR, str(error), close=True))

    def _first_phase(self, conn: Connection, ttid: bytes) -> Transaction:
        transaction = self.in_progress.get(ttid)
        if ttid in self.expired and self.expired[ttid] is conn.node:
            raise Refused(
                ErrorCode.INCOMPLETE_TRANSACTION, "others waited for it: aborted"
            )
        if transaction is None or transaction.client is not conn.node:
            raise ProtocolError(f"unknown transaction {ttid.hex()}")
        if transaction.tid is not None:
            raise ProtocolError(f"transaction {ttid.hex()} is being finished")
        return transaction

    def _took_part(
        self, transaction: Transaction, nids: Iterable[int]
    ) -> dict[int, None]:
        """Those of the storages that are ready since before the transaction began."""
        ready, begun = self.ready, transaction.begun
        return {n: None for n in nids if n in ready and ready[n][0] <= begun}

    def failed_vote(self, conn: Connection, ttid: bytes, nids: Sequence[int]) -> None:
        """FailedVote: arbitrate, so that each partition keeps a complete replica.

        If a storage is dead, we shall hear of it, and needn't blame it for anything.
        """
        transaction = self._first_phase(conn, ttid)
        if len(self._votes) >= PARKED_MAX:
            raise not_ready("too many failed votes wait")
        vote = conn.defer(), transaction, self._took_part(transaction, nids)
        asked = dict.fromkeys(vote[2])

        def look() -> None:
            if not asked:
                self._votes.append(vote)
                self._retry_votes()

        def alive(nid: int) -> None:
            if nid in asked:
                del asked[nid]
                transaction.healthy[nid] = None
                look()

        def lost(nid: int, code: int | None, text: str) -> None:
            if nid in asked:
                del asked[nid]
                look()

        def too_late() -> None:
            if asked:
                asked.clear()
                look()

        for nid in list(asked):
            storage = self.ready[nid][1]
            storage.ask(Ping).then(partial(alive, nid), partial(lost, nid))
        if asked:
            self.runtime.call_later(ALIVE, too_late)
        else:
            look()

    def _arbitrate(
        self, reply: Reply, transaction: Transaction, failed: dict[int, None]
    ) -> bool:
        """Answer a failed vote; false if that depends on other transactions."""
        if failed:
            if not self.master.operational_without(failed):
                reply.error(ErrorCode.INCOMPLETE_TRANSACTION)
                return True
            others = dict(failed)
            for other in self.in_progress.values():
                if other is not transaction:
                    others.update(other.failed)
            if len(others) > len(failed) and not self.master.operational_without(
                others
            ):
                return False
            transaction.failed = failed
        reply.error(ErrorCode.ACK)
        return True

    def _retry_votes(self) -> None:
        votes, self._votes = self._votes, []
        for reply, transaction, failed in votes:
            if reply.closed:
                continue
            if self.in_progress.get(transaction.ttid) is not transaction:
                reply.error(ErrorCode.INCOMPLETE_TRANSACTION)
                continue
            failed = self._took_part(transaction, failed)
            if not self._arbitrate(reply, transaction, failed):
                self._votes.append((reply, transaction, failed))

    def abort(self, conn: Connection, ttid: bytes, nids: Sequence[int]) -> None:
        """AbortTransaction. One that is unknown was dropped with its former client."""
        transaction = self.in_progress.get(ttid)
        if transaction is None or transaction.client is not conn.node:
            return
        if transaction.tid is not None:
            raise ProtocolError(f"transaction {ttid.hex()} is being finished")
        self._drop(transaction, nids)
        self._ended()

    def abort_first_phases(self) -> None:
        """The operation ends: who has not asked to finish waited for too long."""
        assert self.stopping
        for transaction in list(self.in_progress.values()):
            if transaction.tid is None:
                self.log.warning("%r: aborted, the cluster stops", transaction)
                self._expire(transaction)
        self._ended()

    def stalled(self, conn: Connection, ttid: bytes) -> None:
        """NotifyStalledTransaction: others wait for a client that does nothing.

        It may still be about to write to storages that forget the transaction now:
        these refuse that, and what it asks here is refused, too.
        """
        transaction = self.in_progress.get(ttid)
        if transaction is None:
            conn.notify(AbortTransaction, ttid, ())
        elif transaction.tid is None:
            self.log.warning("%r: others wait, its client stalls: aborted", transaction)
            self._expire(transaction)
            self._ended()

    def _expire(self, transaction: Transaction) -> None:
        """Abort what its client may still be about to write or to vote."""
        ttid = transaction.ttid
        self.expired[ttid] = transaction.client
        if len(self.expired) > EXPIRED_MAX:
            del self.expired[next(iter(self.expired))]
        others = []
        for nid, (_, storage) in self.ready.items():
            node = storage.node
            if node is not None and "features" in node.extra:
                storage.notify(NotifyStalledTransaction, ttid)
            else:
                others.append(nid)
        self._drop(transaction, others)

    def _drop(self, transaction: Transaction, nids: Sequence[int]) -> None:
        """Abort: tell these storages, and those that wait for its end."""
        told = dict(transaction.watchers)
        for nid in nids:
            if nid in self.ready:
                told[self.ready[nid][1]] = None
        self._forget(transaction)
        if told:
            tail = encode_tail(AbortTransaction, transaction.ttid, ())
            for conn in told:
                conn.notify_encoded(AbortTransaction, tail)
        for reply in transaction.asking:
            reply.answer(AnswerFinalTID, None)

    def _forget(self, transaction: Transaction) -> None:
        ttid = transaction.ttid
        del self.in_progress[ttid]
        self._imposed.pop(ttid, None)
        client = transaction.client
        if client is not None:
            mine = self.by_client.get(client)
            if mine is not None:
                mine.pop(ttid, None)

    def _ended(self) -> None:
        """A transaction is over: who waited for that?"""
        if self._votes:
            self._retry_votes()
        self.master.primary.transactions_ended()

    # --- second phase -----------------------------------------------------------------

    def finish(
        self,
        conn: Connection,
        ttid: bytes,
        oids: Sequence[bytes],
        deleted: Sequence[int],
        checked: Sequence[int],
        pack: Pack | None,
    ) -> None:
        """AskFinishTransaction."""
        master = self.master
        transaction = self._first_phase(conn, ttid)
        if transaction.imposed and next(iter(self._imposed)) != ttid:
            raise ProtocolError(f"{ttid.hex()} is finished before its predecessor")
        np = master.pt.np
        numbers = struct.unpack(f">{len(oids)}Q", b"".join(oids))
        greatest = max(numbers, default=0)
        if greatest >= u64(MAX_TID) or max((*deleted, *checked), default=0) >= np:
            raise ProtocolError("oid or partition out of range")
        if pack is not None and not ZERO_TID < pack[1] <= self.last_tid:
            raise ProtocolError("the pack time is not among the transactions")
        reply = conn.defer()
        failed = transaction.failed
        if failed and not master.operational_without(failed):
            self._incomplete(reply, transaction)
            return
        modified = dict.fromkeys([oid % np for oid in numbers])
        modified.update(dict.fromkeys(deleted))
        cells = master.pt.rows
        holders: dict[int, None] = {}
        assigned, begun = self.assigned, transaction.begun
        for partition in {**modified, **dict.fromkeys(checked), u64(ttid) % np: None}:
            if assigned:
                for nid in cells[partition]:
                    if assigned.get((partition, nid), 0) <= begun:
                        holders[nid] = None
            else:
                holders.update(dict.fromkeys(cells[partition]))
        for nid in self._took_part(transaction, failed):
            # Outdated before any lock is requested: verification relies on that.
            if nid in holders:
                if nid in transaction.healthy:
                    self.reputation.unreachable(nid, self.runtime.monotonic())
                master.expel(nid, f"writes of {ttid.hex()} failed there")
                if self.in_progress.get(ttid) is not transaction:
                    return  # the operation is over
        involved = {
            nid: self.ready[nid][1] for nid in self._took_part(transaction, holders)
        }
        if not involved:
            self._incomplete(reply, transaction)
            return
        tid = self._enqueue(transaction)
        if greatest > u64(self.last_oid):
            self.last_oid = p64(greatest)
        transaction.ptid = master.pt.ptid or 0
        transaction.reply = reply
        transaction.oids = oids
        transaction.partitions = list(modified)
        transaction.pack = pack
        transaction.approved = pack is not None and master.packs.approves()
        transaction.involved = involved
        transaction.waiting = dict.fromkeys(involved)
        for storage in involved.values():
            storage.ask(AskLockInformation, ttid, tid, transaction.approved)
        if transaction.imposed:
            del self._imposed[ttid]
            self._retry_begins()
        if len(self.queue) == 1:
            # The begin of the next one, which came along, can wait. Last, for who is
            # lost by this may end the operation.
            for storage in list(involved.values()):
                storage.transport.flush()

    def _incomplete(self, reply: Reply, transaction: Transaction) -> None:
        reply.error(ErrorCode.INCOMPLETE_TRANSACTION)
        self._drop(transaction, list(self.ready))
        self._ended()

    def _enqueue(self, transaction: Transaction) -> bytes:
        if transaction.imposed:
            tid = transaction.ttid
        else:
            np = self.master.pt.np
            tid = final_tid(self.clock(), self.greatest, transaction.ttid, np)
            self._given = tid
        transaction.tid = tid
        transaction.since = self.runtime.monotonic()
        self.queue.append(transaction)
        if len(self.queue) == 1:
            self.master.primary.lock_awaited()
        return tid

    def locked(self, conn: Connection, ttid: bytes) -> None:
        """AnswerInformationLocked."""
        transaction = self.in_progress.get(ttid)
        assert conn.node is not None
        nid = conn.node.nid
        if transaction is None or nid not in transaction.waiting:
            raise ProtocolError(f"unknown transaction {ttid.hex()}")
        del transaction.waiting[nid]
        if not transaction.waiting and self.queue[0] is transaction:
            self._unlock()

    def _unlock(self) -> None:
        """Commit what is locked at the head of the queue."""
        queue = self.queue
        while queue and not (queue[0].waiting or self.settling.owing):
            transaction = queue.popleft()
            self._forget(transaction)
            self._commit(transaction)
            self._ended()

    def _invalidate(
        self, author: Node | None, tid: bytes, oids: Sequence[bytes]
    ) -> None:
        """Tell the other clients what was committed; see MANY."""
        tail = encode_tail(InvalidateObjects, tid, oids)
        is_urgent = len(self.clients) <= MANY
        for node, conn in self.clients.items():
            if node is author:
                continue
            if is_urgent:
                conn.notify_encoded(InvalidateObjects, tail)
            else:
                conn.notify_later(InvalidateObjects, tail)
        if not is_urgent:
            self._tell_soon()

    def _tell_soon(self) -> None:
        """Send in TOGETHER what clients are told without hurry."""
        if not self._telling:
            self._telling = True
            self.runtime.call_later(TOGETHER, self._tell)

    def _tell(self) -> None:
        self._telling = False
        for conn in self.clients.values():
            conn.flush_waiting()

    def _commit(self, transaction: Transaction) -> None:
        # Clients first: unless they are many, they are told before a storage shows it.
        ttid, tid, oids = transaction.ttid, transaction.tid, transaction.oids
        assert tid is not None
        author = transaction.client
        if transaction.reply is not None:
            transaction.reply.answer(AnswerTransactionFinished, ttid, tid)
        if len(self.clients) > (author in self.clients):
            self._invalidate(author, tid, oids)
        for conn in self.backups.values():
            conn.notify(InvalidatePartitions, tid, transaction.partitions)
        tail = encode_tail(NotifyUnlockInformation, ttid)
        for conn in transaction.involved.values():
            conn.notify_encoded(NotifyUnlockInformation, tail)
        if self.last_tid == ZERO_TID:
            self.first_tid = tid
        self.last_tid = tid
        self.master.committed_ptid = max(self.master.committed_ptid, transaction.ptid)
        if transaction.pack is not None:
            self.master.packs.committed(tid, transaction.pack, transaction.approved)
        for conn in transaction.watchers:
            conn.notify(NotifyTransactionFinished, ttid, tid)
        for reply in transaction.asking:
            reply.answer(AnswerFinalTID, tid)

    # --- questions --------------------------------------------------------------------

    def final_tid(self, conn: Connection, ttid: bytes) -> None:
        """AskFinalTID: what became of a transaction whose client lost us."""
        transaction = self.in_progress.get(ttid)
        if transaction is not None:
            if len(transaction.asking) >= PARKED_MAX:
                raise not_ready("too many requests wait")
            transaction.asking.append(conn.defer())
        else:
            conn.answer(AnswerFinalTID, None if ttid > self.greatest else MAX_TID)

    def unfinished(self, conn: Connection) -> None:
        """AskUnfinishedTransactions: a storage will wait for the end of each."""
        for transaction in self.in_progress.values():
            transaction.watchers[conn] = None
        conn.answer(AnswerUnfinishedTransactions, self.last_tid, list(self.in_progress))

    def late(self, now: float, limit: float) -> tuple[list[int], float | None]:
        """Nids that owe a lock, their readiness or the confirmation of a table since
        `limit` seconds, and when the next ones will be late (monotonic time; None:
        nobody owes anything).
        """
        nids: dict[int, None] = {}
        deadline = None
        for transaction in self.queue:
            if transaction.waiting:
                if transaction.since + limit > now:
                    deadline = transaction.since + limit
                    break
                nids.update(transaction.waiting)
        for node, since in (*self.starting.items(), *self.settling.owing.items()):
            if since + limit <= now:
                assert node.nid is not None
                nids[node.nid] = None
            elif deadline is None or since + limit < deadline:
                deadline = since + limit
        return list(nids), deadline

    def describe(self) -> list[str]:
        """Lines for the log."""
        lines = [
            f"last tid {self.last_tid.hex()}, last oid {self.last_oid.hex()},"
            f" {len(self.clients)} clients, {len(self._begins)} begins and"
            f" {len(self._votes)} failed votes wait"
        ]
        lines += [repr(transaction) for transaction in self.in_progress.values()]
        return lines

    def check(self) -> None:
        """Assert what always holds."""
        tids = [transaction.tid or ZERO_TID for transaction in self.queue]
        assert tids == sorted(set(tids)), tids
        assert not tids or tids[0] > self.last_tid, (tids[0], self.last_tid)
        finishing = [t for t in self.in_progress.values() if t.tid is not None]
        assert len(finishing) == len(self.queue), (finishing, self.queue)
        ttids = list(self.in_progress)
        assert ttids == sorted(ttids), ttids
        np = self.master.pt.np
        for transaction in self.queue:
            tid = transaction.tid
            assert tid is not None
            assert tid >= transaction.ttid, transaction
            assert u64(tid) % np == u64(transaction.ttid) % np, transaction
            assert transaction.waiting.keys() <= transaction.involved.keys()
            assert transaction.waiting.keys() <= self.ready.keys(), transaction
        for client, mine in self.by_client.items():
            assert client in self.clients or not mine, client
            for ttid, transaction in mine.items():
                assert self.in_progress.get(ttid) is transaction, transaction
        assert not self.queue or self.queue[0].waiting or self.settling.owing, (
            self.queue
        )
        assert all(node.connection is not None for node in self.settling.owing)
