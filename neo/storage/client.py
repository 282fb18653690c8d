"""What clients ask of a storage node.

Loads are answered on the loop: one look-up for pending objects, one query; so are
short reads of other kinds. Longer ones go through the background reader.
Source: behaviour 3.3 to 3.10, storage-format 9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from struct import Struct
from typing import TYPE_CHECKING, Any

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.handler import Handler, Refused, refuse
from neo.lib.protocol import (
    INVALID_PARTITION,
    MAX_TID,
    ZERO_HASH,
    AnswerFinalTID,
    AnswerObject,
    AnswerObjectHistory,
    AnswerObjects,
    AnswerObjectUndoSerial,
    AnswerOIDsFrom,
    AnswerSize,
    AnswerTIDs,
    AnswerTIDsFrom,
    AnswerTransactionInformation,
    ErrorCode,
)
from neo.lib.util import Pieces, u64

from .background import Slices
from .database.interface import (
    Metadata,
    Oid,
    Reader,
    StreamedRevision,
    Tid,
    Value,
    Wanted,
)
from .database.interface import Transaction as TransactionRow
from .locks import READABLE, Transaction, Write

if TYPE_CHECKING:
    from .operation import Operation
    from .transactions import PackRequest

_u64 = Struct(">Q").unpack

# Rows read at a time.
SLICE = 1000
UNDO_SLICE = 100
# What is that short, is read on the loop.
SHORT = 100  # revisions of an object, transactions of a partition
SHORT_UNDO = 4  # oids
# Loads of one query, of those that come together.
LOADS = 100
# Objects that one query looks for, of those that are stored together.
STORES = 500
# Bytes of the objects of one packet, or little more.
OBJECTS_SIZE = 1 << 18
# Longest list that one request gets (its client asks for the rest).
PAGE_MAX = 1 << 16


def not_readable() -> Refused:
    """The client's partition table is not ours: it tries another node."""
    return Refused(ErrorCode.NON_READABLE_CELL)


def _answer(
    conn: Connection, msg_id: int, oid: Oid, revision: StreamedRevision
) -> None:
    send = conn.send if type(revision[4]) is bytes else conn.send_stream
    send(AnswerObject, msg_id, (oid, *revision))


class ClientHandler(Handler):
    """Serves the clients of a node in operation."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation
        self.backend = operation.backend
        self.background = operation.background
        self.transactions = operation.transactions
        # Bound once, for the loads.
        self.access = operation.access
        self.np = len(operation.access)
        self.pending = operation.transactions.pending
        self.pending_by_oid = self.pending.by_oid
        self.load = operation.backend.load_streamed
        self.store = operation.transactions.store

    def closed(self, conn: Connection) -> None:
        self.operation.node.forget(conn)
        node = conn.node
        assert node is not None
        if node.connection is conn:
            node.connection = None
            if not self.operation.is_over:
                # What is voted may still be finished by the master.
                self.transactions.abort_of_node(node, voted=False)
                self.operation.client_lost(node)

    # --- loads --------------------------------------------------------------------

    def ask_object(
        self, conn: Connection, oid: Oid, at: Tid | None, before: Tid | None
    ) -> None:
        if self.access[_u64(oid)[0] % self.np] != READABLE:
            raise not_readable()
        if oid in self.pending_by_oid:
            self._load_pending(conn, conn.message_id, oid, at, before)
            return
        revision = self.load(oid, at, before)
        if revision is None:
            raise self._not_found(oid)
        _answer(conn, conn.message_id, oid, revision)

    def ask_objects(self, conn: Connection, wanted: Sequence[Wanted]) -> None:
        if not wanted:
            raise ProtocolError("no object is asked")
        wanted = wanted[:LOADS]
        applied = [
            one
            for one in wanted
            if self._is_readable(one[0]) and one[0] not in self.pending_by_oid
        ]
        found = iter(self.backend.load_many(applied))
        rows: list[Any] = []
        codes = []
        size = 0
        for one in wanted:
            oid = one[0]
            row: StreamedRevision | Transaction | None = None
            code = None
            if not self._is_readable(oid):
                code = ErrorCode.NON_READABLE_CELL
            elif oid in self.pending_by_oid:
                row = self.pending.load(*one)
            else:
                row = next(found)
            if isinstance(row, Transaction):
                row, code = None, ErrorCode.NOT_READY
            elif row is None:
                code = code or self._not_found(oid).code
            elif isinstance(row[4], Pieces):
                row[4].parts.close()
                row, code = None, ErrorCode.NOT_READY
            else:
                size += len(row[4])
            if code is not None:
                codes.append(code)
            rows.append(row)
            if size > OBJECTS_SIZE:
                break
        conn.answer(AnswerObjects, rows, codes)

    def _is_readable(self, oid: Oid) -> bool:
        return self.access[u64(oid) % self.np] == READABLE

    def _not_found(self, oid: Oid) -> Refused:
        known = oid in self.pending_by_oid or self.backend.last_tid_of(oid) is not None
        code = ErrorCode.OID_NOT_FOUND if known else ErrorCode.OID_DOES_NOT_EXIST
        return Refused(code, oid.hex())

    def _load_pending(
        self,
        conn: Connection,
        msg_id: int,
        oid: Oid,
        at: Tid | None,
        before: Tid | None,
    ) -> None:
        result = self.pending.load(oid, at, before)
        if isinstance(result, Transaction):
            self.pending.wait(
                conn, result, lambda: self._load_again(conn, msg_id, oid, at, before)
            )
        elif result is None:
            raise self._not_found(oid)
        else:
            conn.send(AnswerObject, msg_id, (oid, *result))

    def _load_again(
        self,
        conn: Connection,
        msg_id: int,
        oid: Oid,
        at: Tid | None,
        before: Tid | None,
    ) -> None:
        """`ask_object`, after a wait."""
        conn.message_id = msg_id
        try:
            self.ask_object(conn, oid, at, before)
        except Refused as error:
            refuse(conn, msg_id, error)

    # --- reads that take longer ---------------------------------------------------

    def _when_applied(
        self,
        conn: Connection,
        find: Callable[[], Transaction | None],
        read: Callable[[int], Slices],
        short: bool = False,
    ) -> None:
        """Start `read(msg_id)` when `find()` finds no transaction to wait for."""
        transaction = find()
        if transaction is None:
            if short:
                self.background.run(self.backend, read(conn.message_id))
            else:
                self.background.start(conn, read(conn.message_id))
            return
        msg_id = conn.message_id

        def again() -> None:
            conn.message_id = msg_id
            try:
                self._when_applied(conn, find, read, short)
            except Refused as error:
                refuse(conn, msg_id, error)

        self.pending.wait(conn, transaction, again)

    def _check_readable(self, partition: int) -> None:
        if partition >= self.np or self.access[partition] != READABLE:
            raise not_readable()

    def ask_object_history(
        self, conn: Connection, oid: Oid, first: int, last: int
    ) -> None:
        if first >= last:
            raise ProtocolError(f"no history from {first} to {last}")
        partition = _u64(oid)[0] % self.np
        self._check_readable(partition)

        def find() -> Transaction | None:
            users = self.pending_by_oid.get(oid)
            return users[-1] if users else None

        def read(msg_id: int) -> Slices:
            end = min(last, first + PAGE_MAX)
            history = yield lambda reader: reader.history(oid, first, end)
            self._check_readable(partition)
            if not history:
                raise Refused(ErrorCode.OID_NOT_FOUND, oid.hex())
            conn.send(AnswerObjectHistory, msg_id, (oid, history))

        self._when_applied(conn, find, read, last <= SHORT)

    def ask_transaction_information(self, conn: Connection, tid: Tid) -> None:
        partition = _u64(tid)[0] % self.np
        self._check_readable(partition)

        def read(msg_id: int) -> Slices:
            found = yield lambda reader: reader.transaction(tid)
            self._check_readable(partition)
            _inform(conn, msg_id, tid, found)

        self._when_applied(conn, lambda: self.pending.at(tid), read, short=True)

    def ask_tids(self, conn: Connection, first: int, last: int, partition: int) -> None:
        if first >= last:
            raise ProtocolError(f"no tids from {first} to {last}")
        if partition != INVALID_PARTITION:
            self._check_readable(partition)

        def read(msg_id: int) -> Slices:
            if partition == INVALID_PARTITION:
                partitions = self.operation.readable_partitions()
            else:
                partitions = [partition]
            end = min(last, first + PAGE_MAX)
            tids = yield lambda reader: reader.tids(first, end, partitions)
            for number in partitions:
                self._check_readable(number)
            conn.send(AnswerTIDs, msg_id, (tids,))

        short = last <= SHORT and partition != INVALID_PARTITION
        self._when_applied(conn, lambda: self.pending.until(MAX_TID), read, short)

    def ask_tids_from(
        self, conn: Connection, min_tid: Tid, max_tid: Tid, length: int, partition: int
    ) -> None:
        self._check_readable(partition)

        def read(msg_id: int) -> Slices:
            tids: list[Tid] = []
            left, start = min(length, PAGE_MAX), min_tid
            while left:
                size = min(left, SLICE)
                found = yield _reading_tids(partition, start, max_tid, size)
                self._check_readable(partition)
                tids += found
                left -= size
                if len(found) < size or not found:
                    break
                start = (int.from_bytes(found[-1], "big") + 1).to_bytes(8, "big")
            conn.send(AnswerTIDsFrom, msg_id, (tids,))

        short = length <= SHORT
        self._when_applied(conn, lambda: self.pending.until(max_tid), read, short)

    def ask_oids_from(
        self, conn: Connection, partition: int, length: int, min_oid: Oid, tid: Tid
    ) -> None:
        self._check_readable(partition)

        def read(msg_id: int) -> Slices:
            oids: list[Oid] = []
            left, start = min(length, PAGE_MAX), min_oid
            while left:
                size = min(left, SLICE)
                found, following = yield _reading_oids(partition, size, start, tid)
                self._check_readable(partition)
                oids += found
                left -= size
                start = following
                if start is None:
                    break
            conn.send(AnswerOIDsFrom, msg_id, (start, oids))

        self._when_applied(conn, lambda: self.pending.until(tid), read)

    def ask_final_tid(self, conn: Connection, ttid: Tid) -> None:
        transaction = self.transactions.by_ttid.get(ttid)
        if transaction is not None:
            conn.answer(AnswerFinalTID, transaction.tid)
            return
        self._check_readable(_u64(ttid)[0] % self.np)
        conn.answer(AnswerFinalTID, self.backend.final_tid(ttid))

    def ask_object_undo_serial(
        self,
        conn: Connection,
        ttid: Tid,
        ltid: Tid,
        undone_tid: Tid,
        oids: Sequence[Oid],
    ) -> None:
        partitions = {_u64(oid)[0] % self.np: None for oid in oids}
        for partition in partitions:
            self._check_readable(partition)

        def find() -> Transaction | None:
            for oid in oids:
                users = self.pending_by_oid.get(oid)
                if users:
                    return users[-1]
            return None

        def read(msg_id: int) -> Slices:
            result: Mapping[Oid, Any] = {}
            written = self.transactions.written(ttid)
            for start in range(0, len(oids), UNDO_SLICE):
                some = oids[start : start + UNDO_SLICE]
                found = yield _reading_undo(undone_tid, ltid, some, written)
                for partition in partitions:
                    self._check_readable(partition)
                if found is None:
                    raise Refused(ErrorCode.OID_NOT_FOUND, undone_tid.hex())
                result = {**result, **found}
            conn.send(AnswerObjectUndoSerial, msg_id, (result,))

        last_tid_of = self.backend.last_tid_of
        short = len(oids) <= SHORT_UNDO and all(
            # Nothing after it: no long chain to follow.
            last_tid_of(oid) == undone_tid
            for oid in oids
        )
        self._when_applied(conn, find, read, short)

    # --- writes -------------------------------------------------------------------

    def ask_store_object(
        self,
        conn: Connection,
        oid: Oid,
        serial: Tid,
        compression: int,
        checksum: bytes,
        data: bytes,
        data_serial: Tid | None,
        ttid: Tid,
    ) -> None:
        value: Value | None = None
        if data or checksum != ZERO_HASH:
            if conn.sha1_of(data) != checksum:
                raise ProtocolError(f"{oid.hex()}: the checksum of the data is wrong")
            value = checksum, data, compression
        if oid > MAX_TID or serial > MAX_TID:
            raise ProtocolError(f"invalid oid {oid.hex()} or serial {serial.hex()}")
        if data_serial is not None and data_serial > MAX_TID:
            raise ProtocolError(f"invalid data serial {data_serial.hex()}")
        write = Write(serial, value, data_serial)
        self.store(conn, ttid, oid, serial, write)

    def ask_check_current_serial(
        self, conn: Connection, ttid: Tid, oid: Oid, serial: Tid
    ) -> None:
        if oid > MAX_TID:
            raise ProtocolError(f"invalid oid {oid.hex()}")
        self.transactions.check_serial(conn, ttid, oid, serial)

    def ask_relock_object(self, conn: Connection, ttid: Tid, oid: Oid) -> None:
        self.transactions.relock(conn, ttid, oid)

    def ask_store_transaction(
        self,
        conn: Connection,
        ttid: Tid,
        user: bytes,
        description: bytes,
        extension: bytes,
        oids: Sequence[Oid],
        pack: PackRequest | None,
    ) -> None:
        metadata = Metadata(user, description, extension, oids, pack)
        self.transactions.vote(conn, ttid, metadata)

    def ask_vote_transaction(self, conn: Connection, ttid: Tid) -> None:
        self.transactions.vote(conn, ttid)

    def abort_transaction(
        self, conn: Connection, ttid: Tid, nids: Sequence[int]
    ) -> None:
        transaction = self.transactions.by_ttid.get(ttid)
        if transaction is None or transaction.node is conn.node:
            self.transactions.abort(ttid)

    # --- beyond protocol 5 --------------------------------------------------------

    def notify_damaged(self, conn: Connection, oid: Oid, tid: Tid) -> None:
        self.operation.checks.damaged(oid, tid)

    def ask_size(self, conn: Connection) -> None:
        conn.answer(AnswerSize, self.backend.size())


class Together(ClientHandler):
    """For a database where a query costs more than what it reads.

    Loads wait for the end of the turn of the loop: those of several clients, or of one
    that asks for many objects in advance, are one query. So do stores, which need to
    know the last revision of their objects; but not longer than for another packet
    about transactions.
    """

    def __init__(self, operation: Operation) -> None:
        super().__init__(operation)
        self.wanted: list[tuple[Connection, int, Oid, Tid | None, Tid | None]] = []
        self.store = self._store_later
        self.stores: list[tuple[Connection, int, Tid, Oid, Tid, Write]] = []
        self.asked: list[tuple[Connection, int, Tid]] = []  # metadata

    # --- stores -------------------------------------------------------------------

    def _store_later(
        self, conn: Connection, ttid: Tid, oid: Oid, serial: Tid, write: Write
    ) -> None:
        if not self.stores:
            self.operation.runtime.call_later(0, self._store_now)
        self.stores.append((conn, conn.message_id, ttid, oid, serial, write))

    def _store_now(self) -> None:
        stores, self.stores = self.stores, []
        if self.operation.is_over or not stores:
            return
        pending = self.pending
        for start in range(0, len(stores), STORES):
            some = stores[start : start + STORES]
            recent = pending.recent
            oids = [oid for _, _, _, oid, _, _ in some if oid not in recent]
            if len(oids) > 1:
                pending.applied = self.backend.last_tids_of(oids)
            for conn, msg_id, ttid, oid, serial, write in some:
                if conn.closed:
                    continue
                conn.message_id = msg_id
                try:
                    self.transactions.store(conn, ttid, oid, serial, write)
                except Refused as error:
                    refuse(conn, msg_id, error)
                except ProtocolError as error:
                    conn.error(msg_id, ErrorCode.PROTOCOL_ERROR, str(error))
                    conn.abort(str(error))
            pending.applied = {}

    def ask_check_current_serial(
        self, conn: Connection, ttid: Tid, oid: Oid, serial: Tid
    ) -> None:
        if self._is_next(conn):
            super().ask_check_current_serial(conn, ttid, oid, serial)

    def ask_relock_object(self, conn: Connection, ttid: Tid, oid: Oid) -> None:
        if self._is_next(conn):
            super().ask_relock_object(conn, ttid, oid)

    def ask_object_undo_serial(
        self,
        conn: Connection,
        ttid: Tid,
        ltid: Tid,
        undone_tid: Tid,
        oids: Sequence[Oid],
    ) -> None:
        if self._is_next(conn):
            super().ask_object_undo_serial(conn, ttid, ltid, undone_tid, oids)

    def ask_store_transaction(
        self,
        conn: Connection,
        ttid: Tid,
        user: bytes,
        description: bytes,
        extension: bytes,
        oids: Sequence[Oid],
        pack: PackRequest | None,
    ) -> None:
        if self._is_next(conn):
            super().ask_store_transaction(
                conn, ttid, user, description, extension, oids, pack
            )

    def ask_vote_transaction(self, conn: Connection, ttid: Tid) -> None:
        if self._is_next(conn):
            super().ask_vote_transaction(conn, ttid)

    def abort_transaction(
        self, conn: Connection, ttid: Tid, nids: Sequence[int]
    ) -> None:
        if self._is_next(conn):
            super().abort_transaction(conn, ttid, nids)

    def _is_next(self, conn: Connection) -> bool:
        """Do what came before this packet; false if that closed its connection."""
        msg_id = conn.message_id
        self._store_now()
        conn.message_id = msg_id
        return not conn.closed

    # --- loads --------------------------------------------------------------------

    def ask_object(
        self, conn: Connection, oid: Oid, at: Tid | None, before: Tid | None
    ) -> None:
        if not self.wanted:
            self.operation.runtime.call_later(0, self._load_wanted)
        self.wanted.append((conn, conn.message_id, oid, at, before))

    def _load_wanted(self) -> None:
        wanted = [one for one in self.wanted if not one[0].closed]
        self.wanted = []
        if self.operation.is_over:
            return
        if len(wanted) == 1:
            self._load_alone(*wanted[0])
            return
        for start in range(0, len(wanted), LOADS):
            together = []
            for one in wanted[start : start + LOADS]:
                oid = one[2]
                is_readable = self.access[_u64(oid)[0] % self.np] == READABLE
                if is_readable and oid not in self.pending_by_oid:
                    together.append(one)
                else:
                    self._load_alone(*one)
            found = self.backend.load_many([one[2:] for one in together])
            for (conn, msg_id, oid, _, _), revision in zip(
                together, found, strict=True
            ):
                if revision is None:
                    refuse(conn, msg_id, self._not_found(oid))
                else:
                    _answer(conn, msg_id, oid, revision)

    # --- metadata -----------------------------------------------------------------

    def ask_transaction_information(self, conn: Connection, tid: Tid) -> None:
        if not self.asked:
            self.operation.runtime.call_later(0, self._inform_asked)
        self.asked.append((conn, conn.message_id, tid))

    def _inform_asked(self) -> None:
        asked, self.asked = [one for one in self.asked if not one[0].closed], []
        if self.operation.is_over:
            return
        for start in range(0, len(asked), LOADS):
            some = asked[start : start + LOADS]
            found = self.backend.transactions([tid for _, _, tid in some])
            for (conn, msg_id, tid), row in zip(some, found, strict=True):
                try:
                    if row is not None and self.access[_u64(tid)[0] % self.np] == (
                        READABLE
                    ):
                        _inform(conn, msg_id, tid, row)
                    else:
                        conn.message_id = msg_id
                        super().ask_transaction_information(conn, tid)
                except Refused as error:
                    refuse(conn, msg_id, error)

    def _load_alone(
        self,
        conn: Connection,
        msg_id: int,
        oid: Oid,
        at: Tid | None,
        before: Tid | None,
    ) -> None:
        conn.message_id = msg_id
        try:
            super().ask_object(conn, oid, at, before)
        except Refused as error:
            refuse(conn, msg_id, error)


def _inform(
    conn: Connection, msg_id: int, tid: Tid, found: TransactionRow | None
) -> None:
    """Answer AskTransactionInformation; raises Refused."""
    if found is None:
        raise Refused(ErrorCode.TID_NOT_FOUND, tid.hex())
    conn.send(
        AnswerTransactionInformation,
        msg_id,
        (
            tid,
            found.user,
            found.description,
            found.extension,
            found.packed,
            found.oids,
        ),
    )


def _reading_tids(
    partition: int, start: Tid, max_tid: Tid, size: int
) -> Callable[[Reader], list[Tid]]:
    return lambda reader: reader.tids_from(partition, start, max_tid, size)


def _reading_oids(
    partition: int, size: int, start: Oid, tid: Tid
) -> Callable[[Reader], tuple[list[Oid], Oid | None]]:
    return lambda reader: reader.oids_from(partition, size, start, tid)


def _reading_undo(
    undone_tid: Tid, ltid: Tid, oids: Sequence[Oid], written: Mapping[Oid, Tid]
) -> Callable[[Reader], Mapping[Oid, Any] | None]:
    return lambda reader: reader.undo_serials(undone_tid, ltid, oids, written)
