"""SQLite: connections, durability, exclusive use.

In WAL mode there are four connections to the file: clients' reads (on the event loop),
slices of long reads, the writer, and checkpoints. Readers see the last commit and wait
for nobody. The writer commits with `synchronous=FULL` (one fsync of the log) if the
commit promises something, else with NORMAL (none). The log is moved to the database by
`checkpoint()`, beside all else; only if it can't keep up does the writer do it itself.

In another mode, or where WAL doesn't work (no shared memory), the only connection
serves everyone, and reads wait while the writer has a transaction open.
"""

from __future__ import annotations

import errno
import logging
import os
import socket  # noqa: TID251  # an abstract socket as a lock, never connected
import sqlite3
import struct
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from threading import RLock  # noqa: TID251  # see _SharedReader
from typing import Any, NamedTuple
from urllib.parse import quote

from zc.lockfile import LockError, LockFile

from neo.lib.exception import BackendError, ConfigurationError, DatabaseLocked
from neo.lib.protocol import MAX_TID
from neo.lib.util import Pieces, u64

from . import schema
from .interface import Oid, Revision, StreamedRevision, Tid, Wanted
from .reader import ID_MAX, Layout, Row, SQLReader, revision
from .sql import SQLBackend

log = logging.getLogger(__name__)

BUSY_S = 10.0  # SQLite waits with a back-off before it says that a file is locked
CACHE_KIB = 32768  # page cache of a connection, unless the connection string says more
CHECKPOINT_PAGES = 1000  # of the log that make a checkpoint worth its while
LOG_PAGES_MAX = 16 * CHECKPOINT_PAGES  # beyond, the writer does it itself
COPY_SIZE = 1 << 20  # bytes
BIG = 1 << 16  # values that are not read by a query (bytes)
VALUE = f"IIF(LENGTH(value) > {BIG}, LENGTH(value), value)"
PIECE = 1 << 16  # of them, read at once (bytes)
MANY = 32  # objects that one query loads at most
WHOLE_LOADS = SQLReader.LOAD_LAST, SQLReader.LOAD_BEFORE, SQLReader.LOAD_AT
UNSAFE_JOURNALS = ("off", "memory")
TYPES = {
    "partition": "INTEGER",
    "nid": "INTEGER",
    "i64": "INTEGER",
    "u64": "INTEGER",
    "code": "INTEGER",
    "bool": "BOOLEAN",
    "text": "TEXT",
    "hash": "BLOB",
    "blob": "BLOB",
    "blob24": "BLOB",
}


# Greatest tid of an object below the one that is given.
_LAST_BEFORE = (
    "(SELECT MAX(m.tid) FROM obj AS m WHERE"
    " m.partition = w.partition AND m.oid = w.oid AND m.tid < w.tid)"
)


def _load_many(following: str, tid: str) -> str:
    """Rows (number, then as `LOAD_...`) for MANY times (partition, oid, tid)."""
    values = ", ".join(f"({number}, ?, ?, ?)" for number in range(MANY))
    return (
        f"WITH w(number, partition, oid, tid) AS (VALUES {values})"
        " SELECT number, o.tid, (SELECT MIN(n.tid) FROM obj AS n WHERE"
        f" n.partition = w.partition AND n.oid = w.oid AND n.tid {following} w.tid),"
        f" o.data_id, o.value_tid, compression, hash, {VALUE} FROM w CROSS JOIN obj"
        f" AS o ON o.partition = w.partition AND o.oid = w.oid AND o.tid = {tid}"
        " LEFT JOIN data ON data.id = o.data_id"
    )


class Location(NamedTuple):
    """A parsed connection string."""

    path: str
    pragmas: dict[str, str]  # cache_size, journal_mode, synchronous; in given order
    checksums: bool  # with the checksum VFS


def parse_location(text: str) -> Location:
    """Parse a connection string (2.3); raise ConfigurationError."""
    if not text.startswith("file:"):
        return Location(str(Path(text).expanduser()), {}, False)
    path, mark, query = text.removeprefix("file:").partition("?")
    options: dict[str, str] = {}
    for item in query.split("&") if mark else ():
        key, _, value = item.partition("=")
        known = key in ("cache_size", "journal_mode", "synchronous", "cksumvfs")
        if not known or key in options or not value.removeprefix("-").isalnum():
            raise ConfigurationError(f"invalid option {item!r} in database {text!r}")
        options[key] = value
    checksums = options.pop("cksumvfs", "0")
    if not path or checksums not in ("0", "1"):
        raise ConfigurationError(f"invalid database {text!r}")
    return Location(path, options, checksums == "1")


def decode_text(data: bytes) -> str | bytes:
    """What a column of text is: bytes where it is damaged, so that it can be read."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


class SQLiteReader(SQLReader):
    """Reads over a connection of its own."""

    path: str  # of the file, for messages

    def __init__(
        self, layout: Layout, connection: sqlite3.Connection, path: str
    ) -> None:
        self.layout = layout
        self.path = path
        self._use(connection)

    def _failure(self, e: sqlite3.Error) -> BackendError:
        """What to raise from an error: it names the file."""
        return BackendError(f"SQLite database {self.path}: {e}")

    def _check_busy(self, e: sqlite3.Error) -> None:
        """Return if another program locks the file: worth waiting; else raise."""
        if getattr(e, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY:
            raise self._failure(e) from e
        log.warning("another program locks the database %s, waiting", self.path)

    def _use(self, connection: sqlite3.Connection) -> None:
        self._read_connection = connection
        connection.text_factory = decode_text
        # A new cursor for each query costs more than a tenth of a load.
        self._read = connection.cursor().execute

    def _query(self, sql: str, args: Sequence[object] = ()) -> list[Row]:
        while True:
            try:
                return self._read(sql, args).fetchall()
            except sqlite3.Error as e:
                self._check_busy(e)

    # What is big is read apart, and its size here: queries copy each page of it several
    # times (1 MiB: 1.4 ms instead of 0.5).
    LOAD_LAST, LOAD_BEFORE, LOAD_AT = (
        load.replace(" value ", f" {VALUE} ", 1) for load in WHOLE_LOADS
    )

    def load(
        self, oid: Oid, at: Tid | None = None, before: Tid | None = None
    ) -> Revision | None:
        found = self.load_streamed(oid, at, before)
        if found is None:
            return None
        tid, next_tid, compression, checksum, data, value_tid = found
        if isinstance(data, Pieces):
            data = b"".join(data.parts)
        return tid, next_tid, compression, checksum, data, value_tid

    def load_streamed(
        self, oid: Oid, at: Tid | None = None, before: Tid | None = None
    ) -> StreamedRevision | None:
        query = self._load_query(oid, at, before)
        for _ in range(2):
            rows = query and self._query(*query)
            if not rows:
                return None
            row = rows[0]
            if type(row[6]) is not int:
                return revision(row)
            pieces = self._open_value(row[2])
            if pieces is not None:
                found = revision((*row[:6], b""))
                tid, next_tid, compression, checksum, _, value_tid = found
                return tid, next_tid, compression, checksum, pieces, value_tid
            # Deleted in between, unless it is damaged.
        return revision(row)

    # A query takes 6 us, of which Python's half and more: 32 objects at once, 2.7 each.
    LOAD_MANY_BEFORE = _load_many(">=", _LAST_BEFORE)
    LOAD_MANY_AT = _load_many(">", "w.tid")

    def load_many(self, wanted: Sequence[Wanted]) -> list[StreamedRevision | None]:
        found: list[StreamedRevision | None] = []
        for start in range(0, len(wanted), MANY):
            found += self._load_some(wanted[start : start + MANY])
        return found

    def _load_some(self, wanted: Sequence[Wanted]) -> list[StreamedRevision | None]:
        """At most MANY."""
        bounds = [at if before is None else before for _, at, before in wanted]
        count = sum(1 for _, _, before in wanted if before is None)
        if len(wanted) < MANY // 4 or None in bounds or 0 < count < len(wanted):
            return super().load_many(wanted)
        args: list[int] = []
        np = self.layout.partitions
        for (oid, _, _), bound in zip(wanted, bounds, strict=True):
            number, tid = u64(oid), u64(bound or MAX_TID)
            if number > ID_MAX or tid > ID_MAX:
                return super().load_many(wanted)
            args += number % np, number, tid
        args += [-1] * (3 * MANY - len(args))  # nothing
        found: list[StreamedRevision | None] = [None] * len(wanted)
        sql = self.LOAD_MANY_AT if count else self.LOAD_MANY_BEFORE
        for number, *row in self._query(sql, args):
            if type(row[6]) is int:  # it is big
                found[number] = self.load_streamed(*wanted[number])
            else:
                found[number] = revision(tuple(row))
        return found

    def _open_value(self, data_id: int) -> Pieces | None:
        """A value; None if there is none, or it is no blob."""
        while True:
            try:
                blob = self._read_connection.blobopen(
                    "data", "value", data_id, readonly=True
                )
            except sqlite3.Error as e:
                if getattr(e, "sqlite_errorcode", 0) == sqlite3.SQLITE_ERROR:
                    return None  # there is no more precise code
                self._check_busy(e)
            else:
                return Pieces(len(blob), self._pieces(blob))

    def _pieces(self, blob: sqlite3.Blob) -> Generator[bytes, None, None]:
        with blob:
            try:
                while piece := blob.read(PIECE):
                    yield piece
            except sqlite3.Error as e:
                raise self._failure(e) from e

    def size(self) -> int:
        (pages,), (free,), (size,) = (
            self._query(f"PRAGMA {name}")[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)


class _SharedReader(SQLiteReader):
    """Reads over the writer's connection, between its transactions."""

    LOAD_LAST, LOAD_BEFORE, LOAD_AT = WHOLE_LOADS

    def __init__(
        self, layout: Layout, connection: sqlite3.Connection, path: str, lock: RLock
    ) -> None:
        super().__init__(layout, connection, path)
        self._lock = lock

    def _query(self, sql: str, args: Sequence[object] = ()) -> list[Row]:
        with self._lock:
            return super()._query(sql, args)


class SQLiteBase(SQLBackend, SQLiteReader):
    """A backend over SQLite connections that a subclass opens.

    `shared`: there is only one connection, and `_lock` is held while it writes.
    """

    background: SQLiteReader
    device = 0
    loads_together = False
    has_cheap_commits = True
    metadata_max: int | None = None

    def __init__(self, connection: sqlite3.Connection, path: str) -> None:
        SQLBackend.__init__(self)
        self.path = path
        self._connection = connection
        connection.text_factory = decode_text
        self._write = connection.cursor()
        self._lock = RLock()
        self._writing = False
        self._synchronous: str | None = None  # None: never changed

    def _share(self) -> None:
        """Read through the connection of the writer."""
        self._use(self._connection)
        self.background = _SharedReader(
            self.layout, self._connection, self.path, self._lock
        )
        self._query = self.background._query  # type: ignore[method-assign]
        self.LOAD_LAST, self.LOAD_BEFORE, self.LOAD_AT = WHOLE_LOADS

    # --- SQL transactions -------------------------------------------------------

    def begin(self, durable: bool) -> None:
        assert not self._writing
        self._lock.acquire()
        try:
            level = "FULL" if durable else "NORMAL"
            if self._synchronous not in (None, level):
                self._synchronous = level
                self._retry(f"PRAGMA synchronous={level}")
            self._retry("BEGIN IMMEDIATE")
        except BaseException:
            self._lock.release()
            raise
        self._writing = True

    def commit(self) -> None:
        assert self._writing
        self._retry("COMMIT")
        self._writing = False
        self._lock.release()

    def rollback(self) -> None:
        if not self._writing:
            return
        try:
            self._connection.rollback()
        except sqlite3.Error as e:
            log.warning("rollback failed: %s", e)
        self._writing = False
        self._lock.release()

    def _retry(self, sql: str) -> None:
        """Execute, however long another program keeps the file locked."""
        while True:
            try:
                self._write.execute(sql).fetchall()
            except sqlite3.Error as e:
                self._check_busy(e)
            else:
                return

    def execute(self, sql: str, args: Sequence[object] = ()) -> None:
        self.change(sql, args)

    def change(self, sql: str, args: Sequence[object] = ()) -> int:
        assert self._writing
        try:
            return self._write.execute(sql, args).rowcount
        except sqlite3.Error as e:
            raise self._failure(e) from e

    def execute_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        assert self._writing
        try:
            self._write.executemany(sql, rows)
        except sqlite3.Error as e:
            raise self._failure(e) from e

    def fetch(self, sql: str, args: Sequence[object] = ()) -> list[Row]:
        assert self._writing
        try:
            return self._write.execute(sql, args).fetchall()
        except sqlite3.Error as e:
            raise self._failure(e) from e

    # --- schema -----------------------------------------------------------------

    def table_names(self) -> list[str]:
        query = (
            "SELECT name FROM sqlite_master WHERE type = 'table'"
            " AND name NOT LIKE 'sqlite~_%' ESCAPE '~' ORDER BY name"
        )
        return [name for (name,) in self.fetch(query)]

    def columns(self, table: str) -> list[str]:
        return [row[1] for row in self.fetch(f"PRAGMA table_info({table})")]

    def create_table(self, table: schema.Table, name: str | None = None) -> None:
        # An integer key is the rowid, any other one makes the table; `ttrans` has none.
        columns = []
        suffix = ""
        for column in table.columns:
            kind = TYPES[column.type]
            if (
                table.rowid_key
                and table.key == (column.name,)
                and table is not schema.TTRANS
            ):
                kind += " PRIMARY KEY"
            elif not column.null:
                kind += " NOT NULL"
            columns.append(f"{column.name} {kind}")
        if not table.rowid_key:
            columns.append(f"PRIMARY KEY ({', '.join(table.key)})")
            suffix = " WITHOUT ROWID"
        self.execute(
            f"CREATE TABLE IF NOT EXISTS {name or table.name}"
            f" ({', '.join(columns)}){suffix}"
        )

    def create_indexes(self, table: schema.Table) -> None:
        for number, columns in enumerate(table.indexes, 1):
            self._create_index("INDEX", table.name, number, columns)

    def _create_index(
        self, kind: str, table: str, number: int, columns: Sequence[str]
    ) -> None:
        self.execute(
            f"CREATE {kind} IF NOT EXISTS _{table}_i{number}"
            f" ON {table}({', '.join(columns)})"
        )

    def detect_dedup(self, create: bool) -> bool:
        if create:
            self._create_index("UNIQUE INDEX", "data", 1, schema.DEDUP_INDEX)
        return any(
            unique
            and tuple(row[2] for row in self.fetch(f"PRAGMA index_info({name})"))
            == schema.DEDUP_INDEX
            for _, name, unique, *_ in self.fetch("PRAGMA index_list(data)")
        )


class SQLiteBackend(SQLiteBase):
    """A database in a file."""

    def __init__(self, database: str, dedup: bool = False, reset: bool = False) -> None:
        location = parse_location(database)
        self._closers: list[Callable[[], object]] = []
        self._log_index: int | None = None
        self._log_is_nearly_moved = False
        try:
            self._open(location, dedup, reset)
        except BaseException:
            self.close()
            raise

    def _open(self, location: Location, dedup: bool, reset: bool) -> None:
        self._lock_file(location.path)
        if location.checksums:
            _prepare_checksums(location.path)
        self._location = location
        super().__init__(self._connect(), location.path)
        try:
            (mode,) = self._connection.execute(
                f"PRAGMA journal_mode={location.pragmas.get('journal_mode', 'wal')}"
            ).fetchone()
        except sqlite3.DatabaseError as e:
            raise ConfigurationError(f"can not open {location.path!r}: {e}") from e
        mode = mode.lower()
        try:
            self._choose_synchronous(mode)
            if mode == "wal":
                self._renew_log()
                self._connect_readers()
        except sqlite3.Error as e:
            raise self._failure(e) from e
        if mode != "wal":
            log.warning(
                "journal mode %r instead of 'wal': reads wait for commits", mode
            )
            if mode in UNSAFE_JOURNALS:
                log.warning("journal mode %r: a crash may damage the database", mode)
            self._share()
            self.has_cheap_commits = False
        self.open_database(dedup, reset)

    def _lock_file(self, path: str) -> None:
        """Create the file if needed, and make sure that nobody else uses it (2.5)."""
        try:
            # Closed before SQLite opens it: POSIX locks don't survive a close.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
            stat = Path(path).stat()
        except OSError as e:
            raise ConfigurationError(f"can not open {path!r}: {e.strerror}") from e
        self.device = stat.st_dev
        try:
            # The socket is for nodes of this host, neoppod's too; the lock file also
            # for other hosts, if the file system knows locks.
            if sys.platform == "linux":
                lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._closers.append(lock.close)
                lock.bind(f"\0neostorage:{stat.st_dev}:{stat.st_ino}")
            self._closers.append(LockFile(f"{path}.lock").close)
        except LockError as e:
            raise DatabaseLocked("database is locked") from e
        except OSError as e:
            if e.errno == errno.EADDRINUSE:
                raise DatabaseLocked("database is locked") from e
            raise ConfigurationError(f"can not lock {path!r}: {e.strerror}") from e

    def _connect(self) -> sqlite3.Connection:
        location = self._location
        path, uri = location.path, False
        if location.checksums:
            path, uri = f"file:{quote(path)}?vfs=cksmvfs", True
        try:
            connection = sqlite3.connect(
                path,
                timeout=BUSY_S,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=256,
                uri=uri,
            )
            self._closers.append(connection.close)
            # What is deleted needs no overwriting; some distributions do by default.
            connection.execute("PRAGMA secure_delete=0")
            connection.execute("PRAGMA wal_autocheckpoint=0")
            connection.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
            for name, value in location.pragmas.items():
                if name != "journal_mode":
                    connection.execute(f"PRAGMA {name}={value}")
            if location.checksums:
                row = connection.execute("PRAGMA checksum_verification").fetchone()
                if not row or not int(row[0]):
                    raise ConfigurationError("cksumvfs=1: checksums are not verified")
        except (sqlite3.Error, UnicodeDecodeError) as e:
            # UnicodeDecodeError: what SQLite quotes of a damaged schema.
            raise ConfigurationError(f"can not open {location.path!r}: {e}") from e
        return connection

    def _choose_synchronous(self, mode: str) -> None:
        if "synchronous" not in self._location.pragmas:
            # With another journal, NORMAL could damage the file; and a commit is done
            # when the journal is gone, which a loss of power undoes unless the folder
            # is synced: EXTRA.
            is_wal = mode == "wal"
            level = "FULL" if is_wal else "EXTRA"
            self._connection.execute(f"PRAGMA synchronous={level}")
            self._synchronous = level if is_wal else None
        elif self._connection.execute("PRAGMA synchronous").fetchone()[0] < 2:
            log.warning(
                "synchronous=%s: commits may be lost if the machine fails",
                self._location.pragmas["synchronous"],
            )

    def _renew_log(self) -> None:
        """Write again what a crash left in the log, before anything is promised.

        A part of it may be in memory only, for good: if the node died because a sync
        failed, the system takes the pages for clean, and no later sync writes them.
        The same bytes are written in the same place, so whoever reads sees no change.
        """
        self._retry("BEGIN IMMEDIATE")  # nobody else appends meanwhile
        try:
            with open(f"{self.path}-wal", "r+b", buffering=0) as file:
                while data := file.read(COPY_SIZE):
                    file.seek(-len(data), os.SEEK_CUR)
                    if file.write(data) != len(data):
                        raise OSError(errno.EIO, "short write")
                os.fsync(file.fileno())
        except OSError as e:
            raise BackendError(f"{self.path}-wal: {e.strerror}") from e
        finally:
            self._connection.execute("ROLLBACK")

    def _connect_readers(self) -> None:
        self._use(self._connect())
        self.background = SQLiteReader(self.layout, self._connect(), self.path)
        self._checkpointer = self._connect()
        # Before the first checkpoint is due, the index of the log exists. It stays
        # open as long as the connections: closing it would release their locks.
        self._connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        index = os.open(f"{self._location.path}-shm", os.O_RDONLY)
        self._log_index = index
        self._closers.insert(0, lambda: os.close(index))

    def _log_pages(self) -> int:
        """Pages of the log that no checkpoint moved yet.

        Only the index of the log says so ("WAL-Index Header" of SQLite's file format):
        mxFrame at 16, nBackfill at 96. The log's own size doesn't shrink.
        """
        if self._log_index is None:
            return 0
        header = os.pread(self._log_index, 100, 0)
        if len(header) < 100:
            return 0
        last, moved = struct.unpack_from("=I76xI", header, 16)
        return int(last - moved)

    @property
    def wants_checkpoint(self) -> bool:
        return self._log_pages() > CHECKPOINT_PAGES

    def checkpoint(self) -> None:
        if self._log_index is not None:
            self._move_log(self._checkpointer)
            self._log_is_nearly_moved = True

    def _move_log(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as e:
            raise self._failure(e) from e

    def begin(self, durable: bool) -> None:
        # A checkpoint beside a writer that never pauses doesn't reach the end. The
        # writer moves the rest, so that the log starts again: writing over it is synced
        # in half the time that appending to it takes (120 to 170 us, 245 to 370 us).
        if self._log_is_nearly_moved or self._log_pages() > LOG_PAGES_MAX:
            self._log_is_nearly_moved = False
            self._move_log(self._connection)
        super().begin(durable)

    def close(self) -> None:
        # Readers before the writer, which then checkpoints and removes the log; locks
        # last. (They were opened in the other order.)
        self._log_index = None
        while self._closers:
            try:
                self._closers.pop()()
            except sqlite3.Error as e:
                log.warning("closing the database: %s", e)


def _prepare_checksums(path: str) -> None:
    """Load the checksum VFS, and reserve room for checksums in a new file (2.3)."""
    loader: Any = sqlite3.connect(":memory:")
    try:
        loader.enable_load_extension(True)
        loader.load_extension("cksumvfs")
    except (AttributeError, sqlite3.Error) as e:
        raise ConfigurationError(f"cksumvfs=1: can not load the extension: {e}") from e
    finally:
        loader.close()
    if not Path(path).stat().st_size:
        Path(path).write_bytes(empty_file(reserved=8))


def empty_file(reserved: int) -> bytes:
    """Empty database whose pages keep `reserved` bytes at their end.

    Python gives no access to SQLite's own way to ask for it.
    """
    template = sqlite3.connect(":memory:")
    try:
        template.execute("PRAGMA user_version=0")
        template.execute("VACUUM")
        page = bytearray(template.serialize())
    finally:
        template.close()
    page[20] = reserved
    struct.pack_into(">H", page, 105, len(page) - reserved)  # where cells start
    return bytes(page)
