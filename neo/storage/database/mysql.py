"""MariaDB and MySQL: what the server must be told, writes, big values.

There are three connections: clients' reads (on the event loop), slices of long reads,
and the writer. Those that read are in autocommit mode: each query sees the last commit,
is one round trip, and waits for nobody. The writer collects statements whose result is
not needed, and sends them with the next one that is, or with the COMMIT, as one packet:
a round trip costs more than most statements. All commits are durable; the server has
no cheaper ones.

**A connection that dies** is opened again, and what a reader asked is asked again. The
writer looks whether its connection is alive before each SQL transaction, when nothing
is lost if it isn't. Later the transaction is lost: that's the end of the node, for
whether a COMMIT was executed is unknown.

The database is locked by name (`GET_LOCK`) on the writer's connection.

Source: storage-format.md 2.4, 3.3, 6.2.
"""

from __future__ import annotations

import logging
import os
import select  # noqa: TID251  # poll, never waiting
from collections.abc import Iterable, Sequence
from itertools import chain

from neo.lib.exception import BackendError, ConfigurationError, DatabaseLocked

from . import schema
from .interface import (
    Metadata,
    Store,
    Tid,
    Value,
)
from .mysql_driver import (
    LOCK_WAIT_TIMEOUT,
    Connection,
    Failed,
    Lost,
    Result,
    backend_error,
    render,
    translate,
)
from .mysql_reader import (
    CHUNK,
    CHUNKED,
    DESCRIPTOR,
    MySQLReader,
    Server,
    chunk_range,
    join_chunks,
)
from .reader import (
    PAGE,
    Row,
)
from .sql import SQLBackend
from .writer import check_equal

log = logging.getLogger(__name__)

ENGINES = "InnoDB", "RocksDB"
# A value of 16 MiB - 1 needs at most twice as much as a literal.
PACKET_MIN = 32769 << 10
# Statements are sent when so many bytes of them wait; a single one may be longer.
BATCH = 1 << 20
LOCK_S = 5  # patience with a node that is dead, but not for the server
EQUAL_AT_ONCE = 100  # values that are looked for by one query (dedup)
CHUNKED_MIN = 1 << 24  # what MEDIUMBLOB can't hold

TYPES = {
    "partition": "SMALLINT UNSIGNED",
    "nid": "INT",
    "i64": "BIGINT",
    "u64": "BIGINT UNSIGNED",
    "serial": "INT UNSIGNED",
    "code": "TINYINT UNSIGNED",
    "bool": "BOOLEAN",
    "text": "VARBINARY(255)",
    "hash": "BINARY(20)",
    "blob": "BLOB",
    "blob24": "MEDIUMBLOB",
}
NULLABLE = {("data", "compression")}  # as neoppod has it
INDEX_NAMES = {("partition", "tid", "oid"): "tid", ("data_id",): "data_id"}
# Column families of RocksDB, which keep apart what lives differently (3.3).
FAMILIES = {
    ("trans", "PRIMARY"): "cf_neo_append_meta",
    ("obj", "PRIMARY"): "rev:cf_neo_obj_pk",
    ("obj", "tid"): "cf_neo_append_meta",
    ("obj", "data_id"): "cf_neo_append_meta",
    ("data", "PRIMARY"): "cf_neo_append",
    ("bigdata", "PRIMARY"): "cf_neo_append",
    ("data", "hash"): "cf_neo_no_comp",
    ("ttrans", "PRIMARY"): "cf_neo_no_comp",
    ("tobj", "PRIMARY"): "cf_neo_no_comp",
    ("todel", "PRIMARY"): "cf_neo_no_comp",
}


class MySQLBackend(SQLBackend, MySQLReader):
    """A database of a server."""

    background: MySQLReader
    loads_together = True
    has_cheap_commits = False
    metadata_max: int | None = 0xFFFF  # BLOB
    INSERT_IGNORE = "INSERT IGNORE"
    TABLES = (*schema.TABLES, schema.BIGDATA, schema.TODEL)

    def __init__(
        self,
        database: str,
        adapter: str = "MySQL",
        engine: str | None = None,
        wait: float = 0,
        dedup: bool = False,
        reset: bool = False,
    ) -> None:
        SQLBackend.__init__(self)
        self._engine = engine or ENGINES[0]
        if self._engine not in ENGINES:
            raise ConfigurationError(f"unsupported engine {self._engine!r}")
        self._connection: Connection | None = None
        self._readers: list[MySQLReader] = []
        self._statements: list[bytes] = []
        self._size = 0  # bytes of these
        self._sent = False  # something of the present transaction
        self._writing = False
        self._is_safe = True  # commits survive a crash
        self._has_chunks = False
        self._equal: dict[tuple[bytes, int], list[Row]] = {}  # to values of this vote
        server = Server(database, adapter, self._engine)
        try:
            self._connection = server.first_connection(wait)
            self._open(server, dedup, reset)
        except BaseException:
            self.close()
            raise

    def _open(self, server: Server, dedup: bool, reset: bool) -> None:
        self._server = server
        assert self._connection is not None
        self._take_lock(self._connection)
        self._check_server()
        self._open_reader(server)
        self._readers.append(self)
        self.background = MySQLReader(self.layout, server)
        self._readers.append(self.background)
        self.open_database(dedup, reset)
        self._delete_deferred()

    def _take_lock(self, connection: Connection) -> None:
        """Make sure that nobody else uses the database (2.5).

        A process that was killed has the lock until the server notices its end.
        """
        sql = "SELECT GET_LOCK(?, ?)"
        args = (f"{self._server.name}.neostorage", LOCK_S)
        if connection.select(render(sql, args))[0][0] != 1:
            raise DatabaseLocked("database is locked")

    def _check_server(self) -> None:
        assert self._connection is not None
        packet, flush, binlog, rolls_back, directory = self._connection.select(
            b"SELECT @@max_allowed_packet, @@innodb_flush_log_at_trx_commit,"
            b" @@log_bin AND @@sync_binlog <> 1, @@innodb_rollback_on_timeout,"
            b" @@datadir"
        )[0]
        if packet < PACKET_MIN:
            raise ConfigurationError(
                f"max_allowed_packet of the server is {packet}:"
                f" at least {PACKET_MIN} is needed"
            )
        self._batch = min(BATCH, packet // 2)
        self._waits_for_locks = not rolls_back
        support = self._connection.select(
            render(
                "SELECT support FROM information_schema.engines WHERE engine = ?",
                (self._engine,),
            )
        )
        if not support or support[0][0] not in (b"YES", b"DEFAULT"):
            raise ConfigurationError(f"the server has no engine {self._engine}")
        unsafe = []
        if flush not in (1, 3):
            unsafe.append(f"innodb_flush_log_at_trx_commit={flush}")
        if binlog:
            unsafe.append("sync_binlog is not 1")
        if self._engine == "RocksDB":
            sql = b"SELECT @@rocksdb_flush_log_at_trx_commit"
            if (flush := self._connection.select(sql)[0][0]) != 1:
                unsafe.append(f"rocksdb_flush_log_at_trx_commit={flush}")
        for setting in unsafe:
            log.warning("%s: commits may be lost if the server crashes", setting)
        self._is_safe = not unsafe
        try:
            self.device = os.stat(directory).st_dev
        except OSError:
            self.device = 0  # on another host, or not ours to see

    def close(self) -> None:
        while self._readers:
            self._readers.pop().close_reader()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    wants_checkpoint = False

    def checkpoint(self) -> None:
        """Nothing to do: it's the server's business."""

    # --- SQL transactions -------------------------------------------------------

    def begin(self, durable: bool) -> None:
        assert not self._writing
        connection = self._connection
        assert connection is not None
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        if poll.poll(0):  # the server says nothing unasked, but that it goes
            self._connect_again(connection)
        self._writing = True
        self._sent = False

    def _connect_again(self, connection: Connection) -> None:
        """Replace the writer's connection, when nothing depends on it."""
        connection.close()
        if not self._is_safe:
            raise BackendError(
                "MySQL: connection lost, and the server may have lost commits"
            )
        self._connection = self._server.connect_again(False, "closed by the server")
        try:
            self._take_lock(self._connection)
        except (Lost, Failed) as e:
            raise backend_error(e) from e

    def commit(self) -> None:
        assert self._writing
        if self._sent or self._statements:
            self._statements.append(b"COMMIT")
            self._flush()
        self._writing = False

    def rollback(self) -> None:
        if not self._writing:
            return
        self._statements, self._size = [], 0
        if self._sent and self._connection is not None:
            try:
                self._connection.run(b"ROLLBACK")
            except (Lost, Failed) as e:
                log.warning("rollback failed: %s", e)
        self._writing = False

    def _push(self, statement: bytes) -> None:
        assert self._writing
        if self._size + len(statement) > self._batch:
            self._flush()
        self._statements.append(statement)
        self._size += len(statement)

    def _flush(self) -> list[Result]:
        """Send what waits; return its results."""
        statements, self._statements, self._size = self._statements, [], 0
        results: list[Result] = []
        assert self._connection is not None
        while statements:
            self._sent = True
            try:
                results += self._connection.run(b";".join(statements))
                break
            except Lost as e:
                self._sent = False  # there is nothing to roll back any more
                raise backend_error(e) from e
            except Failed as e:
                if e.code != LOCK_WAIT_TIMEOUT or not self._waits_for_locks:
                    raise backend_error(e) from e
                log.warning("another program locks rows, waiting: %s", e)
                results += e.results
                del statements[: len(e.results)]
        return results

    def execute(self, sql: str, args: Sequence[object] = ()) -> None:
        self._push(render(sql, args))

    def execute_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        head, values, row = sql.partition(" VALUES ")
        if not values:
            for args in rows:
                self.execute(sql, args)
            return
        prefix = translate(head + values)
        texts: list[bytes] = []
        size = len(prefix)
        for args in rows:
            text = render(row, args)
            if texts and size + len(text) > self._batch:
                self._push(prefix + b",".join(texts))
                texts, size = [], len(prefix)
            texts.append(text)
            size += len(text) + 1
        if texts:
            self._push(prefix + b",".join(texts))

    def change(self, sql: str, args: Sequence[object] = ()) -> int:
        self._push(render(sql, args))
        count = self._flush()[-1]
        assert isinstance(count, int), sql
        return count

    def fetch(self, sql: str, args: Sequence[object] = ()) -> list[Row]:
        self._push(render(sql, args))
        rows = self._flush()[-1]
        assert not isinstance(rows, int), sql
        return list(rows)

    # --- schema -----------------------------------------------------------------

    TABLE_NAMES = (
        "SELECT table_name FROM information_schema.tables"
        " WHERE table_schema = DATABASE() ORDER BY table_name"
    )

    def table_names(self) -> list[str]:
        return [name.decode() for (name,) in self.fetch(self.TABLE_NAMES)]

    COLUMNS = (
        "SELECT column_name FROM information_schema.columns"
        " WHERE table_schema = DATABASE() AND table_name = ? ORDER BY ordinal_position"
    )

    def columns(self, table: str) -> list[str]:
        return [name.decode() for (name,) in self.fetch(self.COLUMNS, (table,))]

    def create_table(self, table: schema.Table, name: str | None = None) -> None:
        lines = []
        for column in table.columns:
            is_null = column.null or (table.name, column.name) in NULLABLE
            line = f"{column.name} {TYPES[column.type]} {'' if is_null else 'NOT '}NULL"
            if column.type == "serial":
                line += " AUTO_INCREMENT"
            lines.append(line)
        lines.append(self._key(table, "PRIMARY", "PRIMARY KEY", table.key))
        for columns in table.indexes:
            index = INDEX_NAMES[columns]
            lines.append(self._key(table, index, f"KEY {index}", columns))
        if table is schema.DATA and self._dedup_wanted:
            lines.append(
                self._key(table, "hash", "UNIQUE KEY hash", schema.DEDUP_INDEX)
            )
        self.execute(
            f"CREATE TABLE IF NOT EXISTS {name or table.name}"
            f" ({', '.join(lines)}) ENGINE={self._engine}"
        )

    def _key(
        self, table: schema.Table, name: str, kind: str, columns: Sequence[str]
    ) -> str:
        text = f"{kind} ({', '.join(columns)})"
        family = FAMILIES.get((table.name, name))
        if family and self._engine == "RocksDB":
            text += f" COMMENT '{family}'"
        return text

    def create_indexes(self, table: schema.Table) -> None:
        """Nothing to do: they are made with their table."""

    def drop_tables(self) -> None:
        # Each is gone at once. The settings go last: without them, other tables would
        # be of nobody; without `pt`, they count for nothing.
        order = [schema.PT, *(t for t in self.TABLES if t is not schema.PT)]
        order.remove(schema.CONFIG)
        for table in (*order, schema.CONFIG):
            self.execute(f"DROP TABLE IF EXISTS {table.name}")

    def detect_dedup(self, create: bool) -> bool:
        return bool(
            self.fetch(
                "SELECT 1 FROM information_schema.statistics"
                " WHERE table_schema = DATABASE() AND table_name = 'data'"
                " AND index_name = 'hash' LIMIT 1"
            )
        )

    # --- values -----------------------------------------------------------------

    def _load_unfinished(self) -> None:
        super()._load_unfinished()
        self._has_chunks = bool(self.fetch("SELECT 1 FROM bigdata LIMIT 1"))

    def vote(
        self, ttid: Tid, stores: Sequence[Store], metadata: Metadata | None
    ) -> None:
        if self.dedup:
            self._find_all_equal(stores)
        super().vote(ttid, stores, metadata)
        self._equal = {}

    ALL_EQUAL = "SELECT hash, compression, id, value FROM data WHERE "
    ONE_EQUAL = "hash = ? AND compression = ?"

    def _find_all_equal(self, stores: Sequence[Store]) -> None:
        self._equal = {(v[0], v[2]): [] for _, _, v in stores if isinstance(v, tuple)}
        keys = [*self._equal]
        for start in range(0, len(keys), EQUAL_AT_ONCE):
            some = keys[start : start + EQUAL_AT_ONCE]
            sql = self.ALL_EQUAL + " OR ".join([self.ONE_EQUAL] * len(some))
            for checksum, code, *row in self.fetch(sql, list(chain(*some))):
                self._equal[checksum, code].append(tuple(row))

    def _find_equal(self, checksum: bytes, compression: int) -> Sequence[Row]:
        found = self._equal.get((checksum, compression))
        return super()._find_equal(checksum, compression) if found is None else found

    def _store_value(self, partition: int, value: Value, rows: list[Row]) -> int:
        checksum, data, compression = value
        if len(data) < CHUNKED_MIN:
            data_id = super()._store_value(partition, value, rows)
            if (checksum, compression) in self._equal:
                self._equal[checksum, compression] = [(data_id, data)]
            return data_id
        code = compression | CHUNKED
        if self.dedup:
            for data_id, descriptor in self._find_equal(checksum, code):
                other = self.fetch(self.CHUNKS, chunk_range(descriptor))
                check_equal(
                    data_id, checksum, data, join_chunks(descriptor, other) or b""
                )
                return int(data_id)
        return super()._store_value(
            partition, (checksum, self._store_chunks(data), code), rows
        )

    INSERT_CHUNK = "INSERT INTO bigdata VALUES (?, ?)"

    def _store_chunks(self, data: bytes) -> bytes:
        """Insert a value in consecutive rows; return its descriptor."""
        self.execute(self.INSERT_CHUNK, (None, data[:CHUNK]))
        first = self.fetch("SELECT LAST_INSERT_ID()")[0][0]
        for n, start in enumerate(range(CHUNK, len(data), CHUNK), 1):
            self.execute(self.INSERT_CHUNK, (first + n, data[start : start + CHUNK]))
        self._has_chunks = True
        return DESCRIPTOR.pack(first, len(data))

    def _prune(self, data_ids: Iterable[int | None]) -> None:
        ids = [
            data_id
            for data_id in data_ids
            if data_id is not None and data_id not in self._references
        ]
        for start in range(0, len(ids), PAGE):
            among = ",".join(map(str, ids[start : start + PAGE]))
            unused = (
                f"FROM data WHERE id IN ({among})"
                " AND NOT EXISTS (SELECT 1 FROM obj WHERE obj.data_id = data.id)"
            )
            if self._has_chunks:
                self._push(
                    f"SELECT value {unused} AND compression >= {CHUNKED}".encode()
                )
                rows = self._flush()[-1]
                assert not isinstance(rows, int)
                for (descriptor,) in rows:
                    self.execute(
                        "DELETE FROM bigdata WHERE id >= ? AND id < ?",
                        chunk_range(descriptor),
                    )
            self._push(f"DELETE {unused}".encode())

    def _delete_deferred(self) -> None:
        """Delete what neoppod, which puts it off, had no time to delete (6.5)."""
        count = 0
        while True:
            self.begin(durable=False)
            try:
                ids = self.fetch(
                    "SELECT data_id FROM todel ORDER BY 1 LIMIT ?", (PAGE,)
                )
                if ids:
                    self._prune(data_id for (data_id,) in ids)
                    self.execute("DELETE FROM todel WHERE data_id <= ?", ids[-1])
            except BaseException:
                self.rollback()
                raise
            self.commit()
            count += len(ids)
            if len(ids) < PAGE:
                break
        if count:
            log.info("deferred deletion: %d values", count)
