"""Connections between storage nodes, and what one asks of another: the source side of
replications and checks.

A connection serves both ends. An end is *client* while it has requests of its own, and
*server* since it got one; when it needs the connection no more, it says CloseClient if
the other end may still use it, else it closes. Source: protocol 6.5 and 6.6, behaviour
5.6, storage-format 14 and 15.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.handler import Handler, Refused, refuse
from neo.lib.node import Node
from neo.lib.protocol import (
    ZERO_TID,
    AddObject,
    AddTransaction,
    AnswerCheckSerialRange,
    AnswerCheckTIDRange,
    AnswerFetchObjects,
    AnswerFetchTransactions,
    ErrorCode,
)

from .background import OUTPUT_MAX, OUTPUT_RETRY, Slices
from .database.interface import Oid, Reader, Tid, Transaction

if TYPE_CHECKING:
    from .operation import Operation

# Items compared, and sent, at a time.
LENGTH_MAX = 1000
# Bytes that an item counts for, besides its data.
ITEM_SIZE = 200
SLICE = 50
# Bytes of data after which a chunk of objects ends.
CHUNK_SIZE = 4 << 20
CHECK_LENGTH_MAX = 40_000


class Link:
    """How a connection between storages is used by this end."""

    __slots__ = ("is_client", "is_server", "peer")

    def __init__(self, peer: Node | None, is_client: bool) -> None:
        self.peer = peer  # None: of another cluster
        self.is_client = is_client
        self.is_server = not is_client


class PeerHandler(Handler):
    """Storage nodes connected to one in operation."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation
        self.node = operation.node
        self.background = operation.background
        self.links: dict[Connection, Link] = {}

    # --- connections --------------------------------------------------------------

    def accepted(self, conn: Connection, peer: Node | None) -> None:
        """A storage identified."""
        self.links[conn] = Link(peer, is_client=False)
        self._watch(conn)

    def connected_to(self, conn: Connection, peer: Node) -> None:
        """A storage accepted us."""
        self.links[conn] = Link(peer, is_client=True)
        self._watch(conn)

    def _watch(self, conn: Connection) -> None:
        limits = self.node.options.limits
        conn.watch_silence(limits.ping_after, limits.silence_limit, only_if_owed=True)

    def make_room(self, peer: Node) -> None:
        """A storage identifies: give up the connection that exists, or refuse.

        When two storages connect to each other, the connection that the greater nid
        opened survives. An older connection of the peer is one that it lost.
        """
        assert peer.nid is not None
        assert self.node.nid is not None
        ours = self.operation.replication.connecting(peer)
        if (
            ours is None
            and peer.connection is not None
            and not peer.connection.incoming
        ):
            ours = peer.connection
        if ours is not None and self.node.nid > peer.nid:
            raise ProtocolError("already connected")
        for conn in (ours, peer.connection):
            if conn is not None:
                conn.close("replaced by a new connection")

    def closed(self, conn: Connection) -> None:
        link = self.links.pop(conn)
        self.node.forget(conn)
        if link.peer is not None and link.peer.connection is conn:
            link.peer.connection = None
        self.operation.replication.source_lost(conn)

    def close_client(self, conn: Connection) -> None:
        link = self.links[conn]
        if not link.is_server:
            raise ProtocolError("CloseClient of a node that was no client")
        link.is_server = False
        if not link.is_client:
            conn.close("unused")

    # --- source of a replication --------------------------------------------------

    def _serve(
        self,
        conn: Connection,
        partition: int,
        bound: Tid | None,
        error: ErrorCode,
        read: Callable[[int], Slices],
    ) -> None:
        """Start a read when all transactions up to `bound` are applied."""
        self.links[conn].is_server = True
        self._check_readable(partition, error)
        pending = self.operation.transactions.pending
        transaction = None
        if bound is not None:
            transaction = pending.until(bound)
        if transaction is None:
            self.background.start(conn, read(conn.message_id))
            return
        msg_id = conn.message_id

        def again() -> None:
            conn.message_id = msg_id
            try:
                self._serve(conn, partition, bound, error, read)
            except Refused as refusal:
                refuse(conn, msg_id, refusal)

        pending.wait(conn, transaction, again)

    def _pause(self, size: int) -> Slices:
        """Let clients go first."""
        seconds = self.operation.pace.pause(size)
        if seconds:
            yield seconds

    def _check_readable(self, partition: int, error: ErrorCode) -> None:
        if not self.node.is_readable(partition):
            raise Refused(error, f"partition {partition} is not readable here")

    def ask_fetch_transactions(
        self,
        conn: Connection,
        partition: int,
        length: int,
        min_tid: Tid,
        max_tid: Tid,
        tids: Sequence[Tid],
        ask_pack_info: bool,
    ) -> None:
        error = ErrorCode.REPLICATION_ERROR
        size = min(length, LENGTH_MAX)
        if not size:
            raise ProtocolError("a chunk of 0 transactions")

        def read(msg_id: int) -> Slices:
            chunk = yield lambda reader: reader.fetch_transactions(
                partition, size, min_tid, max_tid, tids
            )
            missing = chunk.missing
            for start in range(0, len(missing), SLICE):
                some = missing[start : start + SLICE]
                found = yield _reading_transactions(missing[start : start + SLICE])
                self._check_readable(partition, error)
                for tid, item in zip(some, found, strict=True):
                    if item is None:
                        raise Refused(error, f"transaction {tid.hex()} vanished")
                    pack = item.pack
                    args = (
                        tid,
                        item.user,
                        item.description,
                        item.extension,
                        item.packed,
                        item.ttid,
                        item.oids,
                        pack and tuple(pack),
                    )
                    conn.send(AddTransaction, msg_id, args)
                while conn.out_size > OUTPUT_MAX:
                    yield OUTPUT_RETRY
                yield from self._pause(ITEM_SIZE * len(some))
            completed = None
            if ask_pack_info:
                cells = yield lambda reader: reader.own_cells()
                cell = cells.get(partition)
                completed = ZERO_TID if cell is None else cell.pack
            self._check_readable(partition, error)
            answer = chunk.next_tid, chunk.unknown, completed
            conn.send(AnswerFetchTransactions, msg_id, answer)

        self._serve(conn, partition, max_tid, error, read)

    def ask_fetch_objects(
        self,
        conn: Connection,
        partition: int,
        length: int,
        min_tid: Tid,
        max_tid: Tid,
        min_oid: Oid,
        objects: Mapping[Tid, Sequence[Oid]],
    ) -> None:
        error = ErrorCode.REPLICATION_ERROR
        size = min(length, LENGTH_MAX)
        if not size:
            raise ProtocolError("a chunk of 0 objects")
        is_anonymous = self.links[conn].peer is None

        def read(msg_id: int) -> Slices:
            chunk = yield lambda reader: reader.fetch_objects(
                partition, size, min_tid, max_tid, min_oid, objects
            )
            missing, unknown = chunk.missing, chunk.unknown
            end = chunk.next_tid, chunk.next_oid
            position = total = 0
            while position < len(missing):
                if total > CHUNK_SIZE:
                    # What follows is for the next chunk.
                    end = missing[position]
                    unknown = _before(unknown, end)
                    break
                some = missing[position : position + SLICE]
                found = yield _reading_objects(some, is_anonymous)
                self._check_readable(partition, error)
                before = total
                for (tid, oid), args in zip(some, found, strict=False):
                    if args is None:
                        raise Refused(error, f"{oid.hex()} at {tid.hex()} vanished")
                    conn.send(AddObject, msg_id, args)
                    total += ITEM_SIZE + len(args[4])
                    while conn.out_size > OUTPUT_MAX:
                        yield OUTPUT_RETRY
                position += len(found)
                yield from self._pause(total - before)
            self._check_readable(partition, error)
            conn.send(AnswerFetchObjects, msg_id, (*end, unknown))

        self._serve(conn, partition, max_tid, error, read)

    # --- check of replicas --------------------------------------------------------

    def ask_check_tid_range(
        self, conn: Connection, partition: int, length: int, min_tid: Tid, max_tid: Tid
    ) -> None:
        error = ErrorCode.CHECKING_ERROR
        size = min(length, CHECK_LENGTH_MAX)

        def read(msg_id: int) -> Slices:
            result = yield lambda reader: reader.check_tid_range(
                partition, size, min_tid, max_tid
            )
            self._check_readable(partition, error)
            conn.send(AnswerCheckTIDRange, msg_id, tuple(result))

        self._serve(conn, partition, max_tid, error, read)

    def ask_check_serial_range(
        self,
        conn: Connection,
        partition: int,
        length: int,
        min_tid: Tid,
        max_tid: Tid,
        min_oid: Oid,
    ) -> None:
        error = ErrorCode.CHECKING_ERROR
        size = min(length, CHECK_LENGTH_MAX)

        def read(msg_id: int) -> Slices:
            result = yield lambda reader: reader.check_serial_range(
                partition, size, min_tid, max_tid, min_oid
            )
            self._check_readable(partition, error)
            conn.send(AnswerCheckSerialRange, msg_id, tuple(result))

        self._serve(conn, partition, max_tid, error, read)

    # --- requester of a replication -----------------------------------------------

    def add_transaction(self, conn: Connection, *args: object) -> None:
        self.operation.replication.received(conn, args)

    def add_object(self, conn: Connection, *args: object) -> None:
        self.operation.replication.received(conn, args)


def _before(
    objects: Mapping[Tid, Sequence[Oid]], end: tuple[Tid, Oid]
) -> dict[Tid, list[Oid]]:
    """The keys that precede `end`."""
    result = {
        tid: [oid for oid in oids if (tid, oid) < end] for tid, oids in objects.items()
    }
    return {tid: oids for tid, oids in result.items() if oids}


def _reading_transactions(
    tids: Sequence[Tid],
) -> Callable[[Reader], list[Transaction | None]]:
    return lambda reader: [reader.transaction(tid) for tid in tids]


_Record = tuple[Oid, Tid, int, bytes, bytes, Tid | None]


def _reading_objects(
    keys: Sequence[tuple[Tid, Oid]], is_anonymous: bool
) -> Callable[[Reader], list[_Record | None]]:
    return lambda reader: _load(reader, keys, is_anonymous)


def _load(
    reader: Reader, keys: Sequence[tuple[Tid, Oid]], is_anonymous: bool
) -> list[_Record | None]:
    """Arguments of AddObject for records, None for one that is not there.

    Not for all of them, if they are big.
    A backup (anonymous) of neoppod dies of a pointer to a revision that was packed.
    """
    result: list[_Record | None] = []
    size = 0
    for tid, oid in keys:
        if size > OUTPUT_MAX:
            break
        found = reader.load(oid, at=tid)
        if found is None:
            result.append(None)
            continue
        _, _, compression, checksum, data, value_tid = found
        if is_anonymous and value_tid and not reader.has_revision(oid, value_tid):
            value_tid = None
        result.append((oid, tid, compression or 0, checksum, data, value_tid))
        size += len(data)
    return result
