"""MariaDB and MySQL: connections that come back, reads, many loads in one query.

What the three connections of a node are for is told in mysql.py.

Source: storage-format.md 2.4, 3.3.
"""

from __future__ import annotations

import logging
import time  # noqa: TID251  # patience with a server that restarts
from collections.abc import Iterable, Sequence
from struct import Struct
from typing import ClassVar

from neo.lib.exception import BackendError, ConfigurationError
from neo.lib.util import p64, u64

from .interface import (
    Oid,
    Revision,
    StreamedRevision,
    Tid,
    Transaction,
    Value,
    Wanted,
)
from .mysql_driver import (
    ABSENT,
    LITERALS,
    NOT_PREPARED,
    Connection,
    Failed,
    Lost,
    backend_error,
    choose_driver,
    executing,
    filler,
    parse_location,
    preparing,
    render,
    translate,
)
from .reader import (
    ID_MAX,
    LOST_HASH,
    Layout,
    Row,
    SQLReader,
    clip,
    metadata,
    optional,
    revision,
)

log = logging.getLogger(__name__)

RETRIES = 2  # of a read, each after a reconnection
RECONNECT_S = 5.0  # patience with a server that restarts: less than that of peers
CHUNK = 1 << 23
CHUNKED = 0x80  # in `compression`: the value is in `bigdata`, and described here
_UNION = b" UNION ALL "
DESCRIPTOR = Struct(">II")  # id of the first chunk, length of the value

SESSION = (
    "SET SESSION wait_timeout=2147483,"
    " sql_mode='TRADITIONAL,NO_ENGINE_SUBSTITUTION',"
    " group_concat_max_len=4294967295"
)


class Server:
    """Opens connections to a database."""

    def __init__(self, database: str, adapter: str, engine: str) -> None:
        self.location = parse_location(database)
        self.name = self.location.database
        self._connect = choose_driver(adapter)
        self._settings = SESSION
        if engine == "RocksDB":
            self._settings += ", rocksdb_max_row_locks=1073741824"

    def connect(self, autocommit: bool) -> Connection:
        """Open a connection; raises Lost or Failed."""
        connection = self._connect(self.location)
        try:
            connection.run(f"{self._settings}, autocommit={autocommit:d}".encode())
        except BaseException:
            connection.close()
            raise
        return connection

    def first_connection(self, wait: float) -> Connection:
        """That of the writer; `wait`: seconds of patience, one attempt a second."""
        deadline = time.monotonic() + wait
        while True:
            try:
                return self.connect(False)
            except (Lost, Failed) as e:
                is_absent = isinstance(e, Lost) or e.code in ABSENT
                if not is_absent or time.monotonic() >= deadline:
                    raise ConfigurationError(
                        f"can not open database {self.name!r}: {e}"
                    ) from e
                log.warning("waiting for the server of %r: %s", self.name, str(e))
            time.sleep(1)

    def connect_again(self, autocommit: bool, why: object) -> Connection:
        """Replace a connection that died; raises BackendError."""
        log.warning("connection to database %r lost, reconnecting: %s", self.name, why)
        deadline = time.monotonic() + RECONNECT_S
        while True:
            try:
                return self.connect(autocommit)
            except (Lost, Failed) as e:
                if time.monotonic() >= deadline:
                    raise backend_error(e) from e
            time.sleep(0.1)


class MySQLReader(SQLReader):
    """Reads over a connection of its own."""

    def __init__(self, layout: Layout, server: Server) -> None:
        self.layout = layout
        self._open_reader(server)

    def _open_reader(self, server: Server) -> None:
        self._server = server
        try:
            self._use(server.connect(True))
            can_prepare = self._select(self.CAN_PREPARE)[0][0]
        except (Lost, Failed) as e:
            raise backend_error(e) from e
        if not can_prepare:
            self.LOAD_LAST, self.LOAD_BEFORE, self.LOAD_AT = self.LOADS.values()

    def _use(self, connection: Connection) -> None:
        self._read_connection = connection
        self._select = connection.select

    def _query(self, sql: str, args: Sequence[object] = ()) -> list[Row]:
        return self._ask(filler(sql)(tuple([LITERALS[type(arg)](arg) for arg in args])))

    def _ask(self, packet: bytes) -> list[Row]:
        try:
            return list(self._select(packet))
        except (Lost, Failed) as e:
            return self._query_again(packet, e)

    def _query_again(self, packet: bytes, error: Lost | Failed) -> list[Row]:
        """Ask again what was not answered, on a new connection or once prepared."""
        retries = RETRIES
        while True:
            try:
                if isinstance(error, Lost) and retries:
                    retries -= 1
                    self._read_connection.close()
                    self._use(self._server.connect_again(True, error))
                elif isinstance(error, Failed) and error.code == NOT_PREPARED:
                    self._prepare()
                else:
                    raise backend_error(error) from error
                return list(self._select(packet))
            except (Lost, Failed) as e:
                error = e

    def _prepare(self) -> None:
        statements = [preparing(name, sql) for name, sql in self.LOADS.items()]
        self._read_connection.run(b";".join(statements))

    def close_reader(self) -> None:
        self._read_connection.close()

    def size(self) -> int:
        return int(self._query(self.SIZE)[0][0])

    SIZE = (
        "SELECT COALESCE(SUM(data_length + index_length), 0)"
        " FROM information_schema.tables WHERE table_schema = DATABASE()"
    )

    # --- texts ------------------------------------------------------------------

    # The optimizer believes statistics that are old, and prefers `data_id` or a scan.
    _LOAD = (
        "SELECT o.tid, {next}, o.data_id, o.value_tid, compression, hash, value"
        " FROM obj AS o FORCE INDEX (PRIMARY) LEFT JOIN data ON data.id = o.data_id"
        " WHERE o.partition = ?1 AND o.oid = ?2 "
    )
    # Minima and maxima that depend on nothing are looked up while the query is planned,
    # and are constants in its plan: two thirds of the time of `SQLReader.LOAD_BEFORE`.
    _TID = (
        "(SELECT {which}(n.tid) FROM obj AS n FORCE INDEX (PRIMARY)"
        " WHERE n.partition = ?1 AND n.oid = ?2 AND n.tid {bound} ?3)"
    )
    LOADS: ClassVar = {
        "load_last": _LOAD.format(next="NULL") + "ORDER BY o.tid DESC LIMIT 1",
        "load_before": _LOAD.format(next=_TID.format(which="MIN", bound=">="))
        + f"AND o.tid = {_TID.format(which='MAX', bound='<')}",
        "load_at": _LOAD.format(next=_TID.format(which="MIN", bound=">"))
        + "AND o.tid = ?3",
    }
    # Each connection prepares them, at its first load: to parse them takes a third of
    # the server's time. MySQL wants variables where MariaDB takes values.
    LOAD_LAST, LOAD_BEFORE, LOAD_AT = (
        executing(name, sql) for name, sql in LOADS.items()
    )
    CAN_PREPARE = b"SELECT VERSION() LIKE '%MariaDB%' AND @@max_prepared_stmt_count > 0"
    LAST_REVISIONS = (
        "SELECT obj.oid, obj.tid, revisions, data_id FROM ("
        "SELECT oid AS last_oid, MAX(tid) AS last_tid, COUNT(*) AS revisions"
        " FROM obj FORCE INDEX (PRIMARY)"
        " WHERE partition = ? AND oid >= ? AND tid <= ?"
        " GROUP BY oid ORDER BY oid LIMIT ?"
        ") AS last STRAIGHT_JOIN obj FORCE INDEX (PRIMARY)"
        " ON obj.oid = last_oid AND obj.tid = last_tid"
        " WHERE partition = ? ORDER BY last_oid"
    )
    REVISIONS_UNTIL = SQLReader.REVISIONS_UNTIL.replace(
        "FROM obj", "FROM obj FORCE INDEX (PRIMARY)"
    )
    REVISIONS_AFTER = SQLReader.REVISIONS_AFTER.replace(
        "FROM obj", "FROM obj FORCE INDEX (PRIMARY)"
    )
    KEYS_AT = SQLReader.KEYS_AT.replace("FROM obj", "FROM obj FORCE INDEX (tid)")
    KEYS_AFTER = SQLReader.KEYS_AFTER.replace("FROM obj", "FROM obj FORCE INDEX (tid)")
    LAST_OBJECT_TID = SQLReader.LAST_OBJECT_TID.replace(
        "FROM obj", "FROM obj FORCE INDEX (tid)"
    )
    LAST_OID = SQLReader.LAST_OID.replace("FROM obj", "FROM obj FORCE INDEX (PRIMARY)")
    HISTORY = SQLReader.HISTORY.replace(
        "LENGTH(value)",
        f"IF(compression < {CHUNKED}, LENGTH(value),"
        " CAST(CONV(HEX(SUBSTRING(value, 5)), 16, 10) AS UNSIGNED))",
    ).replace("FROM obj", "FROM obj FORCE INDEX (PRIMARY)")

    # --- several loads -------------------------------------------------------------

    # Which revisions are wanted is known once the query is planned, as long as the
    # histories may be. To group by oid would read all of them.
    _WANTED = "SELECT ?4 AS i, ?1 AS p, ?2 AS oid, {tid} AS tid, {next} AS next_tid"
    _REVISIONS = (
        " FROM obj AS n FORCE INDEX (PRIMARY) WHERE n.partition = ?1 AND n.oid = ?2"
    )
    LAST_WANTED = _WANTED.format(tid="MAX(n.tid)", next="NULL") + _REVISIONS
    UNTIL_WANTED = _WANTED.format(
        tid=_TID.format(which="MAX", bound="<="),
        next=_TID.format(which="MIN", bound=">"),
    )
    AT_WANTED = (
        _WANTED.format(tid="?3", next="MIN(n.tid)") + _REVISIONS + " AND n.tid > ?3"
    )
    LOAD_MANY = (
        "SELECT i, o.tid, next_tid, o.data_id, o.value_tid, compression, hash, value"
        " FROM ({wanted}) AS w STRAIGHT_JOIN obj AS o FORCE INDEX (PRIMARY)"
        " ON (o.partition = p AND o.oid = w.oid AND o.tid = w.tid)"
        " LEFT JOIN data ON data.id = o.data_id"
    )

    def load_many(self, wanted: Sequence[Wanted]) -> list[StreamedRevision | None]:
        result: list[StreamedRevision | None] = [None] * len(wanted)
        queries = []
        bounded = {}
        for i, (oid, at, before) in enumerate(wanted):
            number = u64(oid)
            is_exact = before is None and at is not None
            if before is not None:
                bound = clip(before) - 1
            else:
                bound = ID_MAX if at is None else u64(at)
            if max(number, bound) <= ID_MAX:
                args = number % self.layout.partitions, number, bound, i
                if not is_exact:
                    bounded[i] = args
                query = self.AT_WANTED if is_exact else self.LAST_WANTED
                queries.append(render(query, args))
        rows = self._of_many(self.LOAD_MANY, queries)
        # Few ask for what is not the last revision any more.
        past = {i for i, tid, *_ in rows if i in bounded and tid > bounded[i][2]}
        if past:
            rows = [row for row in rows if row[0] not in past]
            queries = [render(self.UNTIL_WANTED, bounded[i]) for i in sorted(past)]
            rows += self._of_many(self.LOAD_MANY, queries)
        for i, *row in rows:
            found = revision(tuple(row))
            is_chunked = found[2] is not None and found[2] >= CHUNKED
            result[i] = self.load(*wanted[i]) if is_chunked else found
        return result

    def _of_many(self, sql: str, wanted: list[bytes]) -> list[Row]:
        """What a query finds for what is wanted: queries of one row each."""
        if not wanted:
            return []
        return self._ask(translate(sql).replace(b"{wanted}", _UNION.join(wanted)))

    TRANSACTIONS = (
        f"SELECT i, {SQLReader.METADATA} FROM ({{wanted}}) AS w"
        " STRAIGHT_JOIN trans FORCE INDEX (PRIMARY)"
        " ON (trans.partition = p AND trans.tid = w.tid)"
        " LEFT JOIN pack ON pack.tid = trans.tid"
    )

    def transactions(self, tids: Sequence[Tid]) -> list[Transaction | None]:
        result: list[Transaction | None] = [None] * len(tids)
        queries = [
            b"SELECT %d AS i, %d AS p, %d AS tid" % (i, n % self.layout.partitions, n)
            for i, n in enumerate(map(u64, tids))
            if n <= ID_MAX
        ]
        for i, *row in self._of_many(self.TRANSACTIONS, queries):
            result[i] = metadata(tuple(row))
        return result

    LAST_OF_MANY = (
        "SELECT ?2, MAX(tid) FROM obj FORCE INDEX (PRIMARY)"
        " WHERE partition = ?1 AND oid = ?2"
    )

    def last_tids_of(self, oids: Sequence[Oid]) -> dict[Oid, Tid | None]:
        result: dict[Oid, Tid | None] = dict.fromkeys(oids)
        numbers = [n for oid in result if (n := u64(oid)) <= ID_MAX]
        queries = [
            render(self.LAST_OF_MANY, (n % self.layout.partitions, n)) for n in numbers
        ]
        for number, tid in self._ask(_UNION.join(queries)) if queries else ():
            result[p64(number)] = optional(tid)
        return result

    # --- big values -------------------------------------------------------------

    CHUNKS = "SELECT value FROM bigdata WHERE id >= ? AND id < ? ORDER BY id"

    def load(
        self, oid: Oid, at: Tid | None = None, before: Tid | None = None
    ) -> Revision | None:
        revision = super().load(oid, at, before)
        while revision is not None and revision[2] and revision[2] >= CHUNKED:
            tid, next_tid, _, checksum, descriptor, value_tid = revision
            data = join_chunks(
                descriptor, self._query(self.CHUNKS, chunk_range(descriptor))
            )
            if data is not None:
                return tid, next_tid, revision[2] - CHUNKED, checksum, data, value_tid
            # Packed meanwhile? Then it isn't found again.
            again = super().load(oid, at, before)
            if again == revision:
                return tid, next_tid, 0, LOST_HASH, b"", value_tid
            revision = again
        return revision

    def spilled(self, data_id: int) -> Value:
        checksum, data, compression = super().spilled(data_id)
        if compression < CHUNKED:
            return checksum, data, compression
        whole = join_chunks(data, self._query(self.CHUNKS, chunk_range(data)))
        if whole is None:
            raise BackendError(f"chunks of data {data_id} are missing")
        return checksum, whole, compression - CHUNKED


def chunk_range(descriptor: bytes) -> tuple[int, int]:
    """Ids of the first chunk of a value, and after the last one."""
    first, length = DESCRIPTOR.unpack(descriptor)
    return first, first + (length + CHUNK - 1) // CHUNK


def join_chunks(descriptor: bytes, rows: Iterable[Row]) -> bytes | None:
    """A value that is described in `data`; None if some of it is missing."""
    data = b"".join([chunk for (chunk,) in rows])
    return data if len(data) == DESCRIPTOR.unpack(descriptor)[1] else None
