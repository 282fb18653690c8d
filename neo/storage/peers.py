"""Connections between storage nodes, and what one asks of another: the source side of
replications and checks.

A connection serves both ends. An end is *client* while it has requests of its own, and
*server* since it got one; when it needs the connection no more, it says CloseClient if
the other end may still use it, else it closes. Source: protocol 6.5 and 6.6, behaviour
5.6, storage-format 14 and 15.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from neo.lib.connection import Connection, Request
from neo.lib.exception import ProtocolError
from neo.lib.handler import Handler, Refused, refuse
from neo.lib.node import Node, nid_str, wire_address
from neo.lib.protocol import (
    FEATURE_CHECK,
    FEATURES,
    ZERO_TID,
    AddObject,
    AddTransaction,
    AnswerCheckSerialRange,
    AnswerCheckTIDRange,
    AnswerDigests,
    AnswerFetchObjects,
    AnswerFetchTransactions,
    CloseClient,
    ErrorCode,
    NodeType,
    Packet,
    RequestIdentification,
)

from .background import OUTPUT_MAX, OUTPUT_RETRY, Slices
from .database.interface import Oid, Reader, Tid, Transaction
from .digests import Item, Key, digests

if TYPE_CHECKING:
    from .operation import Operation

# Items compared, and sent, at a time.
LENGTH_MAX = 1000
# Bytes that an item counts for, besides its data.
ITEM_SIZE = 200
SLICE = 50
RELEASE_DELAY = 100.0  # seconds that an unused connection is kept
# Bytes of data after which a chunk of objects ends.
CHUNK_SIZE = 4 << 20
CHECK_LENGTH_MAX = 40_000


Opened = Callable[[Connection | None, str], object]
Receiver = Callable[[tuple[Any, ...]], object]


class Link:
    """How a connection between storages is used by this end.

    `users`: how many of our tasks use it; `receivers`: where the items of a request go,
    by its id.
    """

    __slots__ = ("features", "is_client", "is_server", "peer", "receivers", "users")

    def __init__(self, peer: Node | None, is_client: bool) -> None:
        self.peer = peer  # None: of another cluster
        self.is_client = is_client
        self.is_server = not is_client
        self.users = 0
        self.receivers: dict[int, Receiver] = {}
        self.features: tuple[bytes, ...] = ()


class PeerHandler(Handler):
    """Storage nodes connected to one in operation."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation
        self.node = operation.node
        self.background = operation.background
        self.links: dict[Connection, Link] = {}
        # Connections that are being opened, and who wants them.
        self._opening: dict[Node, tuple[Connection, list[Opened]]] = {}

    # --- connections --------------------------------------------------------------

    def accepted(
        self, conn: Connection, peer: Node | None, features: tuple[bytes, ...] = ()
    ) -> None:
        """A storage identified."""
        link = self.links[conn] = Link(peer, is_client=False)
        link.features = features
        self._watch(conn)

    def open(self, peer: Node, opened: Opened) -> None:
        """Connect to a running storage, unless it is so.

        `opened(conn, "")` follows, then `release(conn)` is due; or `opened(None,
        reason)`.
        """
        conn = peer.connection
        if conn is not None and conn in self.links:
            self._use(conn, opened)
        elif peer in self._opening:
            self._opening[peer][1].append(opened)
        elif peer.address is None:
            opened(None, "it has no address")
        else:
            handler = SourceIdentification(self, peer)
            conn = self.node.runtime.connect(peer.address, handler)
            self._opening[peer] = conn, [opened]
            self.node.connections[conn] = None

    def _use(self, conn: Connection, opened: Opened) -> None:
        link = self.links[conn]
        link.is_client = True
        link.users += 1
        opened(conn, "")

    def opening(self, peer: Node) -> Connection | None:
        """The connection that is being opened to a node."""
        found = self._opening.get(peer)
        return None if found is None else found[0]

    def connected_to(self, conn: Connection, peer: Node) -> None:
        """A storage accepted us."""
        self.links[conn] = Link(peer, is_client=True)
        self._watch(conn)
        for opened in self._opening.pop(peer)[1]:
            if conn in self.links:
                self._use(conn, opened)
            else:
                opened(None, conn.reason)

    def not_connected(self, peer: Node, reason: str) -> None:
        """A storage could not be reached, or refused."""
        _, waiting = self._opening.pop(peer)
        for opened in waiting:
            conn = peer.connection
            if conn is not None and conn in self.links:
                self._use(conn, opened)  # it connected to us meanwhile
            else:
                opened(None, reason)

    def release(self, conn: Connection) -> None:
        """One who opened the connection needs it no more."""
        link = self.links.get(conn)
        if link is not None:
            link.users -= 1
            if not link.users:
                self.node.runtime.call_later(RELEASE_DELAY, lambda: self._unused(conn))

    def _unused(self, conn: Connection) -> None:
        """Give up a connection that was not used for long. Source: protocol 6.5."""
        link = self.links.get(conn)
        if link is None or not link.is_client or link.users:
            return
        if link.is_server:
            link.is_client = False
            conn.notify(CloseClient)
        else:
            conn.close("unused")

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
        ours = self.opening(peer)
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

    def ask_digests(
        self,
        conn: Connection,
        partition: int,
        of_objects: bool,
        length: int,
        min_tid: Tid,
        min_oid: Oid,
        max_tid: Tid,
    ) -> None:
        error = ErrorCode.CHECKING_ERROR
        left = min(length, LENGTH_MAX)
        if not left:
            raise ProtocolError("digests of 0 items")

        def read(msg_id: int) -> Slices:
            result: list[Item] = []
            position: Key | None = (min_tid, min_oid)
            total = 0
            while position is not None and len(result) < left and total < CHUNK_SIZE:
                count = min(SLICE, left - len(result))
                items, size, position = yield digests(
                    of_objects, partition, count, *position, max_tid
                )
                self._check_readable(partition, error)
                result += items
                total += size
                yield from self._pause(size)
            tid, oid = position or (None, None)
            conn.send(AnswerDigests, msg_id, (result, tid, oid))

        self._serve(conn, partition, max_tid, error, read)

    def notify_damaged(self, conn: Connection, oid: Oid, tid: Tid) -> None:
        self.operation.checks.damaged(oid, tid)

    # --- requests of this end -------------------------------------------------------

    def expect(self, conn: Connection, request: Request, receiver: Receiver) -> None:
        """The items of a request go to `receiver`; others are late, and ignored."""
        if conn in self.links:
            self.links[conn].receivers[request.msg_id] = receiver

    def expect_no_more(self, conn: Connection, request: Request) -> None:
        """What may still come is late."""
        if conn in self.links:
            self.links[conn].receivers.pop(request.msg_id, None)

    def add_transaction(self, conn: Connection, *args: object) -> None:
        receiver = self.links[conn].receivers.get(conn.message_id)
        if receiver is not None:
            receiver(args)

    def add_object(self, conn: Connection, *args: object) -> None:
        receiver = self.links[conn].receivers.get(conn.message_id)
        if receiver is not None:
            receiver(args)

    def notify_features(self, conn: Connection, features: Sequence[bytes]) -> None:
        """What a storage that accepted us offers beyond protocol 5."""
        self.links[conn].features = tuple(features)


class SourceIdentification(Handler):
    """Our identification at a source."""

    def __init__(self, peers: PeerHandler, source: Node) -> None:
        super().__init__()
        self._peers = peers
        self._node = peers.node
        self._source = source

    def connected(self, conn: Connection) -> None:
        node = self._node
        conn.ask(
            RequestIdentification,
            NodeType.STORAGE,
            node.nid,
            wire_address(node.address),
            node.options.cluster.encode(),
            node.id_timestamp,
            {FEATURES: [FEATURE_CHECK]},
        )
        limit = node.options.limits.storage_timeout
        node.runtime.call_later(limit, lambda: self._timeout(conn))

    def _timeout(self, conn: Connection) -> None:
        if conn.handler is self:
            conn.close("no answer to the identification")

    def accept_identification(
        self,
        conn: Connection,
        node_type: NodeType,
        nid: int | None,
        your_nid: int | None,
    ) -> None:
        source = self._source
        if (
            node_type is not NodeType.STORAGE
            or nid != source.nid
            or your_nid != self._node.nid
        ):
            raise ProtocolError(f"{nid_str(source.nid)} was expected")
        self._node.runtime.connection_succeeded(conn.address)
        conn.set_node(source)
        source.connection = conn
        conn.handler = self._peers
        self._peers.connected_to(conn, source)

    def error(
        self, conn: Connection, packet: Packet[...] | None, code: int, text: str
    ) -> None:
        conn.close(text or str(code))

    def closed(self, conn: Connection) -> None:
        self._node.forget(conn)
        self._peers.not_connected(self._source, conn.reason)


def explain(code: int | None, text: str) -> str:
    """What an Error of a storage says."""
    known = {error.value: error.name for error in ErrorCode}
    name = "" if code is None else known.get(code, str(code))
    return f"{name} {text}".strip()


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
