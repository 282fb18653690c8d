"""The log of a process or of a simulated node: a ring in memory, a file, a console.

With a file, every record of any level and every packet is appended to a ring that is
bounded in bytes. The ring goes to the file when something important happens: a record
of level WARNING or above, a signal, the packet FlushLog, the end of the process. So
what precedes a problem can be read, although disks stay idle in normal operation.
Without a file only WARNING and above are kept anywhere: on the console.

A logger never stops its node. A file that cannot be written at start is the operator's
mistake and refused; one that fails later is said once on the console and retried,
while the ring stays within its bound.

Threads: entries are appended without a lock. `deque.append` and `popleft` are atomic,
and CPython switches threads at calls and backward jumps only, hence not inside
`self._size += size`. One lock serialises the writers of the file. It is reentrant
because a signal handler may ask for a flush while its own thread is writing.

Source: operations.md 8 (principle, ring, file format, rotation, console).
"""

from __future__ import annotations

import bz2
import fcntl
import logging
import math
import os
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from functools import cache
from logging import CRITICAL, DEBUG, ERROR, INFO, WARNING
from types import NoneType
from typing import Any, NamedTuple, TextIO

from msgpack import Unpacker, packb

from .exception import ConfigurationError
from .protocol import (
    BY_CODE,
    PROTOCOL_VERSION,
    CellState,
    ClusterState,
    ErrorCode,
    NodeState,
    NodeType,
)

LIMIT = 1 << 24  # bytes
OVERHEAD = 1160  # bytes, measured: what an entry costs besides its text or body
HEADER_MAX = 23  # bytes of a message before its arguments
BUSY_TIMEOUT_S = 0.25  # a reader may delay a flush (hence the node) that long
RETRY_S = 1.0  # between two automatic attempts to write a file that fails
THROTTLE_S = 60.0
THROTTLE_KEYS_MAX = 1024

Node = tuple[str, int | None]  # (name of the cluster, nid)


class Record(NamedTuple):
    """A line of text in the ring; `args` is empty once the text is formatted."""

    date: float
    node: Node | None
    level: int
    pathname: str
    lineno: int
    message: str
    args: tuple[Any, ...]
    size: int


# A packet in the ring: (date, node, outgoing, peer, msg_id, code, body, size), the body
# being the bytes of the message, or its arguments by reference, or None if it is not
# kept. A plain tuple because making a NamedTuple is 6 times as slow.
PacketEntry = tuple[
    float, Node | None, bool, object, int, int, "tuple[Any, ...] | bytes | None", int
]

# What can be kept by reference: neither changes later nor hides more bytes than were
# on the wire. Containers are serialised at once (a list of oids takes 6 times as much).
FLAT = frozenset({bytes, int, NoneType, bool, float, str}) | {
    CellState,
    ClusterState,
    ErrorCode,
    NodeState,
    NodeType,
}

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class Logger:
    """Log of one process or simulated node.

    `path`: the log file, None for no file; ConfigurationError if it cannot be written
    or is used by another logger. `name`: for processes that hold several nodes.
    `limit`: bytes of the ring. `max_packet`: packets of more bytes are kept without
    their body. `everything`: each entry is written at once. `console`: show WARNING
    and above.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        name: str = "",
        clock: Callable[[], float] = time.time,
        limit: int = LIMIT,
        max_packet: int | None = None,
        everything: bool = False,
        console: bool = True,
    ) -> None:
        self.name = name
        self._clock = clock
        self._limit = limit
        self._max_packet = limit if max_packet is None else min(max_packet, limit)
        self._everything = everything
        self._console = console
        self._node: Node | None = None
        self._ring: deque[Record | PacketEntry] = deque()
        self._size = 0  # of what is in the ring or being written
        self._lock = threading.RLock()
        self._writing = False
        self._requests: list[str] = []  # what a signal handler asked during a write
        self._failed_at: float | None = None
        self._hurry = everything  # each entry must look whether to flush
        self._throttled: dict[Hashable, tuple[float, int]] = {}
        self._file = LogFile(path, name, fast=everything) if path else None
        self.tracing = self._file is not None
        if self._file is not None and self._file.was_damaged:
            self.warning("the log was damaged: what it had is in %s.damaged", path)

    def set_node(self, cluster: str, nid: int | None) -> None:
        """Say who logs from now on; the nid is None as long as it is unknown."""
        self._node = cluster, nid

    # --- entries --------------------------------------------------------------

    def debug(self, message: str, *args: object) -> None:
        """Log a detail."""
        if self.tracing:
            self._log(DEBUG, message, args)

    def info(self, message: str, *args: object) -> None:
        """Log a normal event."""
        if self.tracing:
            self._log(INFO, message, args)

    def warning(self, message: str, *args: object) -> None:
        """Log what an operator should know; writes the ring."""
        self._log(WARNING, message, args)

    def error(self, message: str, *args: object) -> None:
        """Log what went wrong; writes the ring."""
        self._log(ERROR, message, args)

    def critical(self, message: str, *args: object) -> None:
        """Log what stops the node or the cluster; writes the ring."""
        self._log(CRITICAL, message, args)

    def exception(self, message: str, *args: object) -> None:
        """Log an error with the traceback of the exception being handled."""
        text = f"{format_message(message, args)}\n{traceback.format_exc().rstrip()}"
        self._log(ERROR, text, ())

    def log(self, level: int, message: str, *args: object) -> None:
        """Log at a level that is a variable."""
        self._log(level, message, args)

    def throttled(self, key: Hashable, level: int, message: str, *args: object) -> None:
        """Log the first message of a key, then at most one a minute, with a count."""
        now = self._clock()
        last, skipped = self._throttled.get(key, (-math.inf, 0))
        if last <= now < last + THROTTLE_S:
            self._throttled[key] = last, skipped + 1
            return
        # Move the key to the end, so that the one which is forgotten is the oldest.
        self._throttled.pop(key, None)
        if len(self._throttled) >= THROTTLE_KEYS_MAX:
            self._throttled.pop(next(iter(self._throttled)), None)
        self._throttled[key] = now, 0
        if skipped:
            message, args = format_message(message, args), ()
            message += f" ({skipped} more since {format_date(last)})"
        self._log(level, message, args)

    def _log(self, level: int, message: str, args: tuple[object, ...]) -> None:
        shown = self._console and level >= WARNING
        if not (self.tracing or shown):
            return
        if args and (shown or not FLAT.issuperset(map(type, args))):
            message, args = format_message(message, args), ()
        frame = sys._getframe(2)
        pathname, lineno = frame.f_code.co_filename, frame.f_lineno
        date = self._clock()
        if shown:
            show(self.name or "NEO", date, level, pathname, lineno, message)
        if self.tracing:
            size = OVERHEAD + _length(message) + sum(map(_length, args))
            pathname = pathname.removeprefix(PACKAGE)
            self._add(
                Record(date, self._node, level, pathname, lineno, message, args, size)
            )
            if level >= WARNING and not self._hurry:
                self.flush()

    def message(
        self, outgoing: bool, peer: object, msg_id: int, code: int, data: bytes | None
    ) -> None:
        """Keep a packet as it is on the wire; call it if `tracing` only.

        `data`: None if it is too big to be kept.
        `peer`: its text, made when the ring is written, is `S1 (127.0.0.1:10000)`.
        """
        size, body = 0, data
        if body is not None:
            size = len(body)
            if size > self._max_packet:
                size, body = 0, None
        size += OVERHEAD
        self._add((self._clock(), self._node, outgoing, peer, msg_id, code, body, size))

    def packet(
        self,
        outgoing: bool,
        peer: object,
        msg_id: int,
        code: int,
        args: tuple[Any, ...],
    ) -> None:
        """As `message`, where its bytes are not at hand."""
        body: tuple[Any, ...] | bytes | None = args
        if FLAT.issuperset(map(type, args)):
            size = sum(map(_length, args))
        else:
            body = pack((msg_id, code, args))
            size = len(body or b"")
        if size > self._max_packet:
            size, body = 0, None
        size += OVERHEAD
        self._add((self._clock(), self._node, outgoing, peer, msg_id, code, body, size))

    def _add(self, entry: Record | PacketEntry) -> None:
        self._ring.append(entry)
        self._size += entry[7]
        if self._size > self._limit:
            self._drop_oldest()
        if self._hurry:
            self._flush_soon(entry[0])

    def _drop_oldest(self) -> None:
        # A bit more than needed, so that a full ring does not come here for each entry.
        target = self._limit - self._limit // 64
        while self._size > target:
            try:
                entry = self._ring.popleft()
            except IndexError:  # the rest is being written
                break
            self._size -= entry[7]

    # --- file -----------------------------------------------------------------

    def flush(self) -> None:
        """Write the ring to the file."""
        self._request("flush")

    def reopen(self) -> None:
        """Close the file and open the same path again: it was renamed.

        What is still in memory goes to the new file.
        """
        self._request("reopen")

    def close(self) -> None:
        """Write the ring, then release the file."""
        with self._lock:
            self.flush()
            if self._file is not None:
                self._file.release()
            self._forget()

    def after_fork(self) -> None:
        """In the child: forget the file, which stays the parent's alone."""
        self._lock = threading.RLock()  # another thread of the parent may hold it
        if self._file is not None:
            self._file.abandon()
        self._forget()

    def _forget(self) -> None:
        self.tracing = self._writing = self._hurry = False
        self._file = self._failed_at = None
        self._ring.clear()
        self._requests.clear()
        self._size = 0

    def _flush_soon(self, now: float) -> None:
        failed_at = self._failed_at
        if failed_at is None or not failed_at <= now < failed_at + RETRY_S:
            self.flush()

    def _request(self, action: str) -> None:
        with self._lock:
            if self._file is None:
                return
            self._requests.append(action)
            if self._writing:  # we interrupted the writer, which sees the request
                return
            self._writing = True
            try:
                while self._requests:
                    if self._requests.pop(0) == "reopen":
                        self._reopen(self._file)
                    else:
                        self._write(self._file)
            finally:
                self._writing = False

    def _write(self, file: LogFile) -> None:
        entries: list[Record | PacketEntry] = []
        with suppress(IndexError):  # another thread drops the oldest
            count = len(self._ring)  # what is added meanwhile can wait
            while len(entries) < count:
                entries.append(self._ring.popleft())
        written = False
        try:
            file.write(entries)
            written = True
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
        finally:
            if written:
                self._size -= sum(entry[7] for entry in entries)
            else:
                self._ring.extendleft(reversed(entries))
        if written and self._failed_at is not None:
            self._failed_at, self._hurry = None, self._everything
            self._complain("the log file can be written again: %s", file.path)

    def _reopen(self, file: LogFile) -> None:
        file.close()
        try:
            file.open()
        except (sqlite3.Error, OSError) as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        first, self._failed_at = self._failed_at is None, self._clock()
        self._hurry = True  # the next entry after RETRY_S tries again
        if first and self._file is not None:
            self._complain(
                "cannot write the log file %s: %s; keeping the last %d KiB in memory",
                self._file.path,
                error,
                self._limit >> 10,
            )

    def _complain(self, message: str, *args: object) -> None:
        # To the console only: a record would ask for a flush again.
        if self._console:
            text, line = format_message(message, args), sys._getframe(1).f_lineno
            show(self.name or "NEO", self._clock(), WARNING, __file__, line, text)


# --- texts ----------------------------------------------------------------------


def pack(value: tuple[Any, ...]) -> bytes | None:
    """A packet, or its arguments as they are stored; None if it cannot be encoded."""
    try:
        data: bytes = packb(value, default=list)
    except (TypeError, ValueError, OverflowError):
        return None
    return data


def arguments(message: bytes) -> bytes:
    """The third part of [id, code, arguments], not decoded."""
    reader = Unpacker()
    reader.feed(message[:HEADER_MAX])
    reader.read_array_header()
    reader.skip()
    reader.skip()
    return message[reader.tell() :]


def format_message(message: str, args: tuple[object, ...]) -> str:
    """Text of a record; a mistake in it is shown rather than raised."""
    if not args:
        return message
    try:
        return message % args
    except Exception:  # noqa: BLE001 - calls any __str__: a log line must not stop a node
        return f"{message} % ({', '.join(object.__repr__(arg) for arg in args)})"


def format_date(date: float, style: str = "%F %T") -> str:
    """Local date with 4 decimals, truncated; the number itself if it is no date."""
    try:
        return f"{time.strftime(style, time.localtime(date))}.{int(date % 1 * 1e4):04}"
    except (OverflowError, ValueError, OSError):
        return repr(date)


def show(
    name: str, date: float, level: int, pathname: str, lineno: int, text: str
) -> None:
    """Show a record on the console, or to the application if it configured logging."""
    target = logging.getLogger("NEO")
    if target.hasHandlers():
        if target.isEnabledFor(level):
            target.handle(
                target.makeRecord(target.name, level, pathname, lineno, text, (), None)
            )
        return
    module = os.path.splitext(os.path.basename(pathname))[0]
    prefix = (
        f"{format_date(date)} {logging.getLevelName(level):9} {name:10} "
        f"[{module:>14}:{lineno:3}] "
    )
    _print(sys.stderr, "".join(f"{prefix}{line}\n" for line in text.splitlines()))


def _print(stream: TextIO | None, text: str) -> None:
    with suppress(OSError, ValueError):  # a closed console is no reason to stop
        if stream is not None:
            stream.write(text)
            stream.flush()


def _length(value: object) -> int:
    """Bytes that a value holds in memory, besides the overhead of an entry."""
    if isinstance(value, str):
        return len(value) if value.isascii() else 4 * len(value)
    return len(value) if isinstance(value, bytes) else 0


def _clean(text: str) -> str:
    """Make `text` storable: SQLite refuses lone surrogates (undecodable file names)."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


# --- the file -------------------------------------------------------------------

SCHEMA = {
    "log": """CREATE TABLE log (
        date REAL PRIMARY KEY,
        node INTEGER,
        level INTEGER NOT NULL,
        pathname TEXT,
        lineno INTEGER,
        msg TEXT
    ) WITHOUT ROWID""",
    "packet": """CREATE TABLE packet (
        date REAL PRIMARY KEY,
        node INTEGER,
        msg_id INTEGER NOT NULL,
        code INTEGER NOT NULL,
        peer TEXT NOT NULL,
        body BLOB
    ) WITHOUT ROWID""",
    "node": """CREATE TABLE node (
        id INTEGER PRIMARY KEY,
        name TEXT,
        cluster TEXT,
        nid INTEGER
    )""",
    "protocol": """CREATE TABLE protocol (
        date REAL PRIMARY KEY,
        text BLOB NOT NULL
    ) WITHOUT ROWID""",
}
INSERT_RECORD = "INSERT INTO log VALUES (?,?,?,?,?,?)"
INSERT_PACKET = "INSERT INTO packet VALUES (?,?,?,?,?,?)"

# Names only. Our reader never runs this; the reference's does, and needs these 3 names.
PROTOCOL_TEXT = """\
# Names of the packets of NEO.
PROTOCOL_VERSION = {version}
from msgpack import Unpacker
names = {names}
Packets = {{code: type(name, (), {{}}) for code, name in names.items()}}
def uuid_str(nid):
    letter = nid and {{0: 'S', -16: 'M', -32: 'C', -48: 'A'}}.get(nid >> 24)
    return letter and '%s%s' % (letter, nid & 0xffffff)
"""

# By forked children, which must not close them.
_inherited: list[sqlite3.Connection] = []


@cache
def protocol_text() -> bytes:
    """Content of the table `protocol`: how to name the packets of a file."""
    names = {code: packet.name for code, packet in sorted(BY_CODE.items())}
    text = PROTOCOL_TEXT.format(version=PROTOCOL_VERSION, names=names)
    return bz2.compress(text.encode())


class LogFile:
    """The file of a logger, which no other logger may use at the same time.

    Methods raise sqlite3.Error or OSError; `write` then has written nothing, and the
    next one opens the file again.
    """

    def __init__(self, path: str, name: str, *, fast: bool) -> None:
        self.path = path
        self._name = name or None
        self._fast = fast
        self._db: sqlite3.Connection | None = None
        self.was_damaged = False
        lock = f"{os.path.realpath(path)}.lock"
        new = not os.path.exists(lock)
        try:
            self._lock = lock_file(lock)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"log file {path} is in use by {error}: each process needs its own"
            ) from None
        except OSError as error:
            raise ConfigurationError(
                f"cannot open log file {path}: {error.strerror}"
            ) from None
        try:
            self.open()
        except (sqlite3.Error, OSError) as error:
            if new:  # a wrong path: leave nothing next to somebody else's file
                os.unlink(lock)
            os.close(self._lock)
            raise ConfigurationError(f"cannot open log file {path}: {error}") from None

    def open(self) -> sqlite3.Connection:
        """Open the file, and create the tables that it lacks.

        There is no journal on disk (the file may be renamed at any time), so a kill in
        the middle of a write can damage it. That must not keep a node from working: the
        file becomes `.damaged`, whatever had this name, and a new one takes its place.
        """
        try:
            return self._open()
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0)
            if code & 0xFF != sqlite3.SQLITE_CORRUPT:
                raise
        path = os.path.realpath(self.path)
        os.replace(path, f"{path}.damaged")
        self.was_damaged = True
        return self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.path,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,  # one thread at a time: the lock of the logger
        )
        try:
            db.execute("PRAGMA journal_mode = MEMORY")
            if self._fast:
                db.execute("PRAGMA synchronous = OFF")
            # Fails at once on a file that cannot be written, but is compatible with
            # readers as long as there is nothing to create.
            db.execute("BEGIN IMMEDIATE")
            _upgrade(db)
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        self._rows: dict[Node, int] = {}
        self._knows_protocol = False
        # Dates that were used instead of those in [start, end].
        self._start = self._end = -math.inf
        self._db = db
        return db

    def write(self, entries: Iterable[Record | PacketEntry]) -> None:
        """Append entries, as one transaction."""
        db = self._db or self.open()
        peers: dict[int, str] = {}  # text by id(): connections live as long as entries
        try:
            # First wait for readers, then work: a busy file costs BUSY_TIMEOUT_S only.
            db.execute("BEGIN EXCLUSIVE")
            for entry in entries:
                if isinstance(entry, Record):
                    self._write_record(db, entry)
                else:
                    peer = peers.get(id(entry[3]))
                    if peer is None:
                        peer = peers[id(entry[3])] = _clean(str(entry[3]))
                    self._write_packet(db, entry, peer)
            db.execute("COMMIT")
        except BaseException:
            self._db = None
            db.close()  # rolls back
            raise

    def _write_record(self, db: sqlite3.Connection, record: Record) -> None:
        date, node, level, pathname, lineno, message, args, _ = record
        text = _clean(format_message(message, args))
        row = self._row(db, node), level, _clean(pathname), lineno, text
        self._insert(db, INSERT_RECORD, date, row)

    def _write_packet(
        self, db: sqlite3.Connection, entry: PacketEntry, peer: str
    ) -> None:
        date, node, outgoing, _, msg_id, code, body, _ = entry
        if not self._knows_protocol:
            self._write_protocol(db, date)
        if body is not None:
            body = pack(body) if isinstance(body, tuple) else arguments(body)
        sign = ">" if outgoing else "<"
        row = self._row(db, node), msg_id, code, f"{sign} {peer}", body
        self._insert(db, INSERT_PACKET, date, row)

    def _insert(
        self, db: sqlite3.Connection, sql: str, date: float, row: tuple[object, ...]
    ) -> None:
        """Insert `row` at `date`, or at the next double that is free.

        Many entries have the date of one turn of the loop. The last date used is shared
        by both tables, so that a reader which merges them finds the order of events.
        """
        if self._start <= date <= self._end:
            date = math.nextafter(self._end, math.inf)
        else:
            self._start = date
        while True:
            try:
                db.execute(sql, (date, *row))
                break
            except sqlite3.IntegrityError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
                    raise
                date = math.nextafter(date, math.inf)
        self._end = date

    def _row(self, db: sqlite3.Connection, node: Node | None) -> int | None:
        """Id of the row that describes a node, created if it is missing."""
        if node is None:
            return None
        row = self._rows.get(node)
        if row is None:
            found = db.execute(
                "SELECT id FROM node WHERE name IS ? AND cluster IS ? AND nid IS ?",
                (self._name, *node),
            ).fetchone()
            if found is None:
                found = db.execute(
                    "INSERT INTO node SELECT ifnull(max(id) + 1, 0), ?, ?, ? FROM node"
                    " RETURNING id",
                    (self._name, *node),
                ).fetchone()
            row = self._rows[node] = found[0]
        return row

    def _write_protocol(self, db: sqlite3.Connection, date: float) -> None:
        text = protocol_text()
        last = db.execute("SELECT text FROM protocol ORDER BY date DESC").fetchone()
        if last is None or last[0] != text:
            date = 0 if last is None else date
            db.execute("INSERT OR REPLACE INTO protocol VALUES (?,?)", (date, text))
        self._knows_protocol = True

    def close(self) -> None:
        """Leave the file, for good or to open the path again."""
        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):  # a reader, or whatever failed before
                if db.execute("SELECT 1 FROM packet LIMIT 1").fetchone() is None:
                    db.execute("DROP TABLE IF EXISTS protocol")  # of no use
            db.close()

    def release(self) -> None:
        """Close, and let other processes use the file."""
        self.close()
        os.close(self._lock)

    def abandon(self) -> None:
        """Forget the file in a forked child; the parent goes on with it.

        SQLite's connection is kept: closing it would roll back what the parent writes.
        Closing the descriptor of the lock leaves the lock, which the parent's holds.
        """
        if self._db is not None:
            _inherited.append(self._db)
            self._db = None
        os.close(self._lock)


def _upgrade(db: sqlite3.Connection) -> None:
    """Create missing tables; rename those of 1.6.3, which have a column `name`."""
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
    for table, sql in SCHEMA.items():
        if table in tables:
            columns = db.execute(f"PRAGMA table_info({table})").fetchall()
            if table not in ("log", "packet") or "name" not in {c[1] for c in columns}:
                continue
            db.execute(f"ALTER TABLE {table} RENAME TO {table}1")
        db.execute(sql)


def lock_file(path: str) -> int:
    """Take the lock on a side file and return its descriptor; closing it is enough.

    Raises BlockingIOError, which tells the process that has the lock, or OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"%d\n" % os.getpid())
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode("ascii", "replace").strip()
        os.close(descriptor)
        who = f"process {owner}" if owner else "another process"
        raise BlockingIOError(who) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


# --- signals --------------------------------------------------------------------


def install_signals(logger: Logger, dump: Callable[[], None] | None = None) -> None:
    """Obey RTMIN (flush), RTMIN+1 (reopen) and RTMIN+2 (`dump` the state to the log).

    For daemons, in their main thread. RTMIN+3, the reference's debugging hook, is
    ignored, because its default action would kill the process (operations.md T3 W15).
    """
    actions = logger.flush, logger.reopen, dump, None
    for number, action in enumerate(actions, signal.SIGRTMIN):
        _install(number, action)


def _install(number: int, action: Callable[[], None] | None) -> None:
    if action is None:
        signal.signal(number, signal.SIG_IGN)
    else:
        signal.signal(number, lambda _number, _frame: action())
