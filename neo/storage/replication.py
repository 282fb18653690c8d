"""Replication: how the OUT_OF_DATE cells of this node become readable.

For each such partition, a `Target`. The master says up to which tid the others are
committed, and which transactions are still open (AskUnfinishedTransactions); all that
begins later is written here too, without checking conflicts (`locks.BLIND`). The
partition is copied from a readable cell up to that tid; then again when the last of the
open transactions ended, up to the tid of the last one that was committed. When nothing
is missing, it is COMPLETE: writes are checked again, and those made blindly get their
locks; as soon as no two transactions compete for one, the master is told
(NotifyReplicationDone), who makes the cell readable.

A `Session` copies one partition from one source: transactions, then objects, by chunks;
the progress in objects is recorded with each chunk. Any failure ends the session; the
target remains, and another source is tried. What arrives late belongs to no session.

Source: behaviour 5.4 to 5.7, storage-format 14.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha1
from itertools import groupby
from typing import TYPE_CHECKING, Any

from neo.lib.connection import Connection, Request
from neo.lib.exception import ProtocolError
from neo.lib.node import Node, nid_str
from neo.lib.protocol import (
    FEATURE_CHECK,
    MAX_TID,
    ZERO_HASH,
    ZERO_OID,
    ZERO_TID,
    AskFetchObjects,
    AskFetchTransactions,
    AskUnfinishedTransactions,
    CellState,
    NotifyDamaged,
    NotifyReplicationDone,
)
from neo.lib.util import add64

from .background import QUEUE
from .database.interface import Backend, Oid, PackOrder, Tid, Transaction, Value
from .peers import explain

if TYPE_CHECKING:
    from .operation import Operation

CHUNK = 1000  # items of one request
PIECE, PIECE_SIZE = 100, 1 << 20  # items and bytes that are written at once
ITEM_SIZE = 200  # bytes that an item counts for, besides its data
WAITING_SIZE = 4 << 20  # bytes that wait to be written: the next chunk is not asked for
SESSIONS_MAX = 2  # partitions copied at a time
RETRY_DELAY = 1.0  # seconds between two attempts to copy a partition

Key = tuple[bytes, ...]  # (tid,) or (tid, oid): a position in a partition


class Target:
    """A partition to copy.

    `goal` is the last tid to have, None while the master has not said; `done` the last
    one of which everything is here; `watched` are the transactions that were open.
    """

    __slots__ = ("avoid", "damaged", "done", "goal", "partition", "watched")

    def __init__(self, partition: int, done: Tid) -> None:
        self.partition = partition
        self.done = done
        self.goal: Tid | None = None
        self.watched: dict[Tid, None] = {}
        self.avoid: int | None = None  # nid of the source that failed last
        # How often each source (nid) sent a record with a wrong checksum.
        self.damaged: dict[Any, dict[int, int]] = {}

    @property
    def is_late(self) -> bool:
        """Whether something is known to be missing."""
        return self.goal is not None and self.goal > self.done


class Replication:
    """Copies the OUT_OF_DATE partitions of a node in operation."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.node = operation.node
        self.runtime = operation.runtime
        self.targets: dict[int, Target] = {}
        # Replicated, the master has not made them readable yet: told so, or not.
        self.complete: dict[int, bool] = {}
        self._tids: dict[int, Tid] = {}  # up to which these were copied
        self.sessions: dict[int, Session] = {}
        self.is_over = False
        self._scheduled = False

    # --- what is to be copied -----------------------------------------------------

    def add(self, partitions: Sequence[int]) -> None:
        """Cells of this node are OUT_OF_DATE now."""
        if not partitions:
            return
        targets = {}
        for partition in partitions:
            # Where to start is read when the change of the table is on disk.
            target = targets[partition] = Target(partition, ZERO_TID)
            self.targets[partition] = target

        def started(max_tid: Tid, ttids: Sequence[Tid]) -> None:
            if max_tid > MAX_TID:
                raise ProtocolError(f"invalid tid {max_tid.hex()}")
            for partition, target in targets.items():
                if self.targets.get(partition) is target:
                    target.goal = max_tid
                    target.watched = dict.fromkeys(ttids)
            # Also lets a deletion of these partitions end that was submitted before.
            self.node.writer.barrier(lambda: self._started(targets))

        assert self.node.master is not None
        self.node.master.ask(AskUnfinishedTransactions, list(partitions)).then(
            lambda *args: None if self.is_over else started(*args)
        )

    def _started(self, targets: Mapping[int, Target]) -> None:
        if self.is_over:
            return
        cells = self.node.backend.own_cells()
        for partition, target in targets.items():
            if self.targets.get(partition) is target and partition in cells:
                target.done = cells[partition].tid or ZERO_TID
        self.advance()

    def remove(self, partition: int) -> None:
        """The cell is not OUT_OF_DATE any more, or not ours."""
        self.targets.pop(partition, None)
        self.complete.pop(partition, None)
        self._tids.pop(partition, None)
        session = self.sessions.pop(partition, None)
        if session is not None:
            session.end()

    def finished(self, ttid: Tid, tid: Tid | None) -> None:
        """A transaction that was open ended; `tid`: it was committed."""
        is_ours = False
        for target in self.targets.values():
            if ttid in target.watched:
                is_ours = True
                del target.watched[ttid]
                if tid is not None and target.goal is not None:
                    target.goal = max(target.goal, tid)
        if is_ours:
            self.advance()

    def leave(self) -> None:
        """The node leaves operation."""
        self.is_over = True
        for session in self.sessions.values():
            session.end()
        self.sessions.clear()

    # --- copying ------------------------------------------------------------------

    def advance(self) -> None:
        """Start what can be started, finish what can be finished."""
        for target in list(self.targets.values()):
            if target.goal is None or target.partition in self.sessions:
                continue
            if not (target.is_late or target.watched):
                self._replicated(target)
        late = sorted(
            (target.done, bool(target.watched), target.partition)
            for target in self.targets.values()
            if target.is_late and target.partition not in self.sessions
        )
        for _, _, partition in late:
            if len(self.sessions) >= SESSIONS_MAX:
                return
            self._start(self.targets[partition])

    def _start(self, target: Target) -> None:
        source = self._choose_source(target)
        if source is None:
            self._retry_later()
            return
        session = self.sessions[target.partition] = Session(self, target, source)
        self.operation.peer_handler.open(source, session.connected)

    def _choose_source(self, target: Target) -> Node | None:
        """A running node with a readable cell, at random; not the one that failed."""
        running = self.node.nodes.running()
        nids = self.sources(target.partition)
        others = [nid for nid in nids if nid != target.avoid]
        candidates = sorted(others or nids)
        return running[self.runtime.rng.choice(candidates)] if candidates else None

    def sources(self, partition: int) -> list[int]:
        """Running nodes from which a partition can be copied."""
        running = self.node.nodes.running()
        return [
            nid
            for nid in self.node.pt.readable[partition]
            if nid in running
            and nid != self.node.nid
            and running[nid].address is not None
        ]

    def failed(self, session: Session, reason: str) -> None:
        """A session ends before it is done."""
        if session.is_over:
            return
        session.end()
        target = session.target
        del self.sessions[target.partition]
        target.avoid = session.source.nid
        self.node.log.warning(
            "replication of partition %d from %s interrupted: %s",
            target.partition,
            nid_str(session.source.nid),
            reason,
        )
        self._retry_later()

    def _retry_later(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.runtime.call_later(RETRY_DELAY, self._retry)

    def _retry(self) -> None:
        self._scheduled = False
        if not self.is_over:
            self.advance()

    def copied(self, session: Session) -> None:
        """A session is done: all is here and on disk up to its goal."""
        target = session.target
        del self.sessions[target.partition]
        target.done = session.goal
        target.avoid = None
        session.end()
        self.advance()

    # --- the end ------------------------------------------------------------------

    def _replicated(self, target: Target) -> None:
        """Nothing is missing: writes are checked from now on."""
        del self.targets[target.partition]
        self.complete[target.partition] = False
        self._tids[target.partition] = target.done
        self.operation.refresh_access([target.partition])
        self.try_finish()

    def try_finish(self) -> None:
        """Tell the master of the partitions in which no blind writes compete."""
        waiting = [p for p, is_told in self.complete.items() if not is_told]
        if not waiting or self.is_over:
            return
        transactions = self.operation.transactions
        excluded = transactions.reserve_blind_writes(waiting)
        master = self.node.master
        assert master is not None
        settled = [p for p in waiting if p not in excluded]
        for partition in settled:
            self.complete[partition] = True
            master.notify(NotifyReplicationDone, partition, self._tids[partition])
        transactions.settle_blind_writes(settled)

    # --- debugging ----------------------------------------------------------------

    def describe(self) -> list[str]:
        """Lines for the log."""
        return [
            f"replication of {t.partition}: {t.done.hex()} of"
            f" {t.goal.hex() if t.goal else None}, {len(t.watched)} watched"
            for t in self.targets.values()
        ]

    def check(self) -> None:
        """Assert that each session has a target, each target an OUT_OF_DATE cell."""
        for partition in (*self.targets, *self.complete):
            state = self.node.own_state(partition)
            assert state is CellState.OUT_OF_DATE, (partition, state)
        for partition, session in self.sessions.items():
            assert self.targets[partition] is session.target
            assert not session.is_over


class Session:
    """The copy of a partition from a source, up to `goal`.

    What is received is written in pieces, one at a time, so that what clients write
    comes between them; the next chunk is asked for before the last one is written,
    unless too much waits already.
    """

    def __init__(self, replication: Replication, target: Target, source: Node) -> None:
        assert target.goal is not None
        self.replication = replication
        self.target = target
        self.source = source
        self.goal = target.goal
        self.conn: Connection | None = None
        self.request: Request | None = None
        self.is_over = False
        self._first = add64(target.done, 1) if target.done > ZERO_TID else ZERO_TID
        self._items: list[tuple[Any, ...]] = []
        self._size = 0  # bytes of `_items`
        # Of the present chunk: where it starts, what was here of it (the first CHUNK
        # items), whether there may be more, and what came.
        self._position: Key = ()
        self._known: dict[Any, None] = {}
        self._is_full = False
        self._received: dict[Any, None] = {}
        # (job, what follows its commit, is it durable?, bytes)
        self._pieces: deque[_Piece] = deque()
        self._waiting_size = 0  # bytes of `_pieces`
        self._is_writing = False
        self._next: Callable[[], object] | None = None  # when less waits
        self._backend = replication.node.backend
        self._reader = replication.node.backend.background
        self._writer = replication.node.writer
        self._pace = replication.operation.pace

    def connected(self, conn: Connection | None, reason: str) -> None:
        """There is a connection with the source, or none."""
        if conn is None:
            self.replication.failed(self, reason)
            return
        self.conn = conn
        if self.is_over:
            self._release()
        else:
            self._ask_transactions(self._first, is_first=True)

    def end(self) -> None:
        """What comes from now on is late."""
        if not self.is_over:
            self.is_over = True
            self._release()

    def _release(self) -> None:
        if self.conn is not None:
            peers = self.replication.operation.peer_handler
            if self.request is not None:
                peers.expect_no_more(self.conn, self.request)
            peers.release(self.conn)

    def _read(self, read: Callable[[], Any], done: Callable[[Any], object]) -> None:
        def call(result: Any) -> None:
            if isinstance(result, Exception):
                raise result
            if not self.is_over:
                done(result)

        self.replication.runtime.submit(QUEUE, read, call)

    def _asked(self, request: Request, done: Callable[..., object]) -> None:
        assert self.conn is not None
        self.request = request
        peers = self.replication.operation.peer_handler
        peers.expect(self.conn, request, self.received)
        request.then(done, self._failed)

    def _failed(self, code: int | None, text: str) -> None:
        self.replication.failed(self, explain(code, text))

    # --- what is received -----------------------------------------------------------

    def received(self, args: tuple[Any, ...]) -> None:
        """An item of the present chunk."""
        if self.is_over:
            return
        if len(args) == 6:
            wrong = wrong_object(args)
            key: Any = args[1], args[0]
            self._size += len(args[4])
        else:
            wrong = wrong_transaction(args)
            key = args[0]
            self._size += 8 * len(args[6])
        if wrong and not self._nobody_has_it_right(key, args):
            self.replication.failed(self, wrong)
            return
        self._size += ITEM_SIZE
        self._items.append(args)
        if self._is_full:
            self._received[key] = None
        if len(self._items) >= PIECE or self._size >= PIECE_SIZE:
            self._write_items()

    def _nobody_has_it_right(self, key: Any, args: tuple[Any, ...]) -> bool:
        """Is the value damaged on all sources? Then it is better than none.

        Its checksum remains wrong, so nobody will take it for good; and the rest of
        the partition gets a replica.
        """
        target, replication = self.target, self.replication
        if len(args) != 6 or max(args[0], args[1], args[5] or ZERO_TID) > MAX_TID:
            return False
        assert self.conn is not None
        link = replication.operation.peer_handler.links.get(self.conn)
        if link is not None and FEATURE_CHECK in link.features:
            self.conn.notify(NotifyDamaged, args[0], args[1])  # maybe it can repair it
        failures = target.damaged.setdefault(key, {})
        nid = self.source.nid or 0
        failures[nid] = failures.get(nid, 0) + 1
        sources = replication.sources(target.partition)
        # With `dedup`, an equal checksum means an equal value.
        if self._backend.dedup or any(failures.get(n, 0) < 2 for n in sources):
            return False
        replication.node.log.error(
            "%s at %s is damaged on all replicas: replicated as it is",
            args[0].hex(),
            args[1].hex(),
        )
        return True

    def _write_items(self) -> None:
        items, self._items = self._items, []
        size, self._size = self._size, 0
        backend = self._backend
        if items:
            self._write(lambda: add_items(backend, items), size=size)

    def _take_chunk(self, position: Key | None) -> bool:
        """The answer came: write what is left; is the next position right?"""
        assert self.conn is not None
        if self.request is not None:
            peers = self.replication.operation.peer_handler
            peers.expect_no_more(self.conn, self.request)
        self.request = None
        if self.is_over:
            return False
        if position is not None and (
            not self._position < position or position[0] > self.goal
        ):
            self._failed(None, f"invalid position {position[0].hex()}")
            return False
        self._write_items()
        return True

    # --- writing --------------------------------------------------------------------

    def _write(
        self,
        job: Callable[[], object],
        done: Callable[[], object] | None = None,
        *,
        size: int = 0,
        durable: bool = False,
    ) -> None:
        """Add a piece."""
        self._pieces.append((job, done, durable, size))
        self._waiting_size += size
        self._write_next()

    def _write_next(self) -> None:
        if self._is_writing or not self._pieces or self.is_over:
            return
        self._is_writing = True
        job, done, durable, size = self._pieces.popleft()

        def written(result: object) -> None:
            if self.is_over:
                return
            self._waiting_size -= size
            if done is not None:
                done()
            following = self._next
            if following is not None and self._waiting_size <= WAITING_SIZE:
                self._next = None
                following()
            pause = self._pace.pause(size)
            if pause:
                self.replication.runtime.call_later(pause, resume)
            else:
                resume()

        def resume() -> None:
            self._is_writing = False
            self._write_next()

        self._writer.submit(job, written, durable=durable)

    def _go_on(self, following: Callable[[], object]) -> None:
        """Ask for the next chunk: now, or when less waits to be written."""
        if self._waiting_size <= WAITING_SIZE:
            following()
        else:
            self._next = following

    # --- transactions ---------------------------------------------------------------

    def _ask_transactions(self, min_tid: Tid, is_first: bool = False) -> None:
        partition, goal = self.target.partition, self.goal
        reader = self._reader
        self._position = (min_tid,)

        def ask(known: list[Tid]) -> None:
            assert self.conn is not None
            self._expect(known)
            request = self.conn.ask(
                AskFetchTransactions, partition, CHUNK, min_tid, goal, known, is_first
            )
            self._asked(request, self._transactions)

        self._read(lambda: reader.tids_from(partition, min_tid, goal, CHUNK), ask)

    def _expect(self, known: Sequence[Any]) -> None:
        self._known = dict.fromkeys(known)
        self._is_full = len(known) == CHUNK
        self._received = {}

    def _transactions(
        self, next_tid: Tid | None, delete: Sequence[Tid], completed: Tid | None
    ) -> None:
        if not self._take_chunk(None if next_tid is None else (next_tid,)):
            return
        backend, partition = self._backend, self.target.partition
        unknown = [tid for tid in delete if tid in self._known]
        packed_less: Tid | None = None
        if completed is not None:
            # Not by the job: the reader face is the loop's.
            own = backend.own_cells().get(partition)
            if own is not None and completed < own.pack:
                packed_less = completed

        def write() -> None:
            for tid in unknown:
                backend.delete_transaction(tid)
            if packed_less is not None:
                backend.set_packed(partition, packed_less)

        def following() -> None:
            if next_tid is None:
                self._ask_objects(self._first, ZERO_OID)
            else:
                self._ask_transactions(next_tid)

        if unknown or packed_less is not None:
            self._write(write)
        if self._is_full:
            end = next_tid or add64(self.goal, 1)
            self._delete_more_transactions(next(reversed(self._known)), end, following)
        else:
            self._go_on(following)

    def _delete_more_transactions(
        self, last: Tid, end: Tid, then: Callable[[], object]
    ) -> None:
        """Delete what is here between `last` and `end`, both excluded, and not there.

        The source was told of what is here up to `last` only.
        """
        backend, partition = self._backend, self.target.partition
        reader, received = self._reader, self._received
        if end <= last:
            self._go_on(then)
            return
        first, bound = add64(last, 1), add64(end, -1)

        def found(tids: list[Tid]) -> None:
            unknown = [tid for tid in tids if tid not in received]

            def write() -> None:
                for tid in unknown:
                    backend.delete_transaction(tid)

            if unknown:
                self._write(write)
            if len(tids) == CHUNK:
                self._delete_more_transactions(tids[-1], end, then)
            else:
                self._go_on(then)

        self._read(lambda: reader.tids_from(partition, first, bound, CHUNK), found)

    # --- objects --------------------------------------------------------------------

    def _ask_objects(self, min_tid: Tid, min_oid: Oid) -> None:
        partition, goal = self.target.partition, self.goal
        reader = self._reader
        self._position = min_tid, min_oid

        def ask(keys: list[tuple[Tid, Oid]]) -> None:
            assert self.conn is not None
            self._expect(keys)
            objects = by_tid(keys)
            request = self.conn.ask(
                AskFetchObjects, partition, CHUNK, min_tid, goal, min_oid, objects
            )
            self._asked(request, self._objects)

        self._read(
            lambda: reader.object_keys(partition, CHUNK, min_tid, goal, min_oid), ask
        )

    def _objects(
        self,
        next_tid: Tid | None,
        next_oid: Oid | None,
        delete: Mapping[Tid, Sequence[Oid]],
    ) -> None:
        position = None
        if next_tid is not None:
            position = next_tid, next_oid or ZERO_OID
            if next_oid is None or next_tid == ZERO_TID:
                self._failed(None, f"invalid position {next_tid.hex()}")
                return
        if not self._take_chunk(position):
            return
        backend, known = self._backend, self._known
        unknown = [
            (tid, oid)
            for tid, oids in delete.items()
            for oid in oids
            if (tid, oid) in known
        ]
        if unknown:
            self._write(lambda: delete_objects(backend, unknown))
        if self._is_full:
            self._delete_more_objects(
                next(reversed(known)), position, lambda: self._chunk_done(position)
            )
        else:
            self._chunk_done(position)

    def _chunk_done(self, position: tuple[Tid, Oid] | None) -> None:
        """Record the progress, after all of the chunk."""
        backend, partition, goal = self._backend, self.target.partition, self.goal
        if position is None:
            # Durable: the master is going to be told.
            self._write(
                lambda: backend.set_replicated(partition, goal),
                lambda: self.replication.copied(self),
                durable=True,
            )
        else:
            done = add64(position[0], -1)
            self._write(lambda: backend.set_replicated(partition, done))
            self._go_on(lambda: self._ask_objects(*position))

    def _delete_more_objects(
        self,
        last: tuple[Tid, Oid],
        end: tuple[Tid, Oid] | None,
        then: Callable[[], object],
    ) -> None:
        """As `_delete_more_transactions`; None: the end of the partition."""
        backend, partition, goal = self._backend, self.target.partition, self.goal
        reader, received = self._reader, self._received
        if end is not None and end <= last:
            then()
            return
        tid, oid = last[0], add64(last[1], 1)
        bound = goal if end is None else end[0]

        def found(keys: list[tuple[Tid, Oid]]) -> None:
            inside = [key for key in keys if end is None or key < end]
            unknown = [key for key in inside if key not in received]
            if unknown:
                self._write(lambda: delete_objects(backend, unknown))
            if len(inside) == CHUNK:
                self._delete_more_objects(keys[-1], end, then)
            else:
                then()

        self._read(lambda: reader.object_keys(partition, CHUNK, tid, bound, oid), found)


_Piece = tuple[Callable[[], object], Callable[[], object] | None, bool, int]


# --- items as they come -------------------------------------------------------------


def wrong_object(args: tuple[Any, ...]) -> str:
    """What is wrong with an AddObject, if anything."""
    oid, tid, _, checksum, data, value_tid = args
    largest: bytes = max(oid, tid, value_tid or ZERO_TID)
    if largest > MAX_TID:
        return f"invalid id {largest.hex()}"
    if (data or checksum != ZERO_HASH) and sha1(data).digest() != checksum:
        return f"{oid.hex()} at {tid.hex()}: wrong checksum"
    return ""


def wrong_transaction(args: tuple[Any, ...]) -> str:
    """What is wrong with an AddTransaction, if anything."""
    tid, *_, ttid, _, pack = args
    largest: bytes = max(tid, ttid, pack[3] if pack else ZERO_TID)
    return f"invalid id {largest.hex()}" if largest > MAX_TID else ""


def by_tid(keys: Iterable[tuple[Tid, Oid]]) -> dict[Tid, list[Oid]]:
    """Sorted keys of records, as AskFetchObjects wants them."""
    return {
        tid: [oid for _, oid in group]
        for tid, group in groupby(keys, lambda key: key[0])
    }


def add_items(backend: Backend, items: Iterable[tuple[Any, ...]]) -> None:
    """Write what AddTransaction and AddObject bring."""
    for item in items:
        if len(item) == 6:
            oid, tid, compression, checksum, data, value_tid = item
            value: Value | None = None
            if data or checksum != ZERO_HASH:
                value = checksum, data, compression
            backend.add_object(oid, tid, value, value_tid)
        else:
            tid, user, description, extension, packed, ttid, oids, pack = item
            order = pack and PackOrder(*pack)
            backend.add_transaction(
                tid,
                Transaction(user, description, extension, oids, packed, ttid, order),
            )


def delete_objects(backend: Backend, keys: Iterable[tuple[Tid, Oid]]) -> None:
    """Delete records."""
    for tid, oid in keys:
        backend.delete_object(oid, tid)
