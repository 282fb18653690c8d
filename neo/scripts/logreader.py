"""Read the log files of nodes: neo/lib/logger.py says how they are made.

A file may be read while its process writes it. Reading is made of short queries, so
that neither a slow terminal nor a pager keeps the process from writing. What a pass
reads is bounded by what was there when it began.

A log may come from a damaged disk or from a stranger: nothing of it is executed, and
what cannot be read becomes an entry that says so.

Source: operations.md 8.4 (format, also of older versions), 9, T3 W14.
"""

from __future__ import annotations

import bz2
import gzip
import heapq
import lzma
import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from logging import ERROR
from typing import IO, Any, NamedTuple
from urllib.parse import quote

from msgpack import unpackb

from neo.lib.exception import ConfigurationError
from neo.lib.protocol import BY_CODE, ENUMS, PROTOCOL_VERSION, Packet

BATCH = 1000  # rows read by one query
BUSY_TIMEOUT_S = 10.0
PROTOCOL_TEXT_MAX = 1 << 20

Key = tuple[float, int]  # (date, id): where an older table may hold a date twice
NodeRow = tuple[str | None, str | None, int | None]  # (name, cluster, nid)
UNKNOWN: NodeRow = (None, None, None)

# What must be escaped: a peer may have put it there to fool a terminal.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class Record(NamedTuple):
    """A line of text."""

    date: float
    file: LogFile
    node: NodeRow
    level: int
    pathname: str | None
    lineno: int | None
    message: str


class PacketRecord(NamedTuple):
    """A packet; `packet` is None if its code is unknown."""

    date: float
    file: LogFile
    node: NodeRow
    msg_id: int
    code: int
    peer: str  # > S1 (127.0.0.1:10000)
    packet: Packet[...] | None
    legacy: bool

    def arguments(self) -> tuple[Any, ...] | None:
        """Decode the body, which is read now; None if it was not kept.

        Raises ValueError if it cannot be decoded, sqlite3.Error if it cannot be read.
        """
        if self.legacy:
            raise ValueError("written by version 1.6.3 or older")
        body = self.file.body(self.date)
        return None if body is None else decode(body)


class Selection(NamedTuple):
    """What to read: dates, and which levels and codes (None: any; empty: none)."""

    start: float
    end: float
    level: int | None
    codes: tuple[int, ...] | None


def decode(body: bytes) -> tuple[Any, ...]:
    """Arguments of a packet. Raises ValueError."""
    try:
        args = unpackb(body, use_list=False, strict_map_key=False, ext_hook=_extension)
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever damaged bytes make msgpack raise
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if type(args) is not tuple:
        raise ValueError("not an array")
    return args


def _extension(code: int, data: bytes) -> object:
    return ENUMS.get((code, data)) or f"<extension {code}: {data.hex()}>"


# --- one file -------------------------------------------------------------------


class LogFile:
    """One log file. ConfigurationError if there is none."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = os.path.splitext(os.path.basename(path))[0]
        try:
            status = os.stat(path)
            with open(path, "rb"):  # SQLite does not say why it fails
                pass
            self._temporary = decompress(path)
        except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"cannot read {path}: {reason}") from None
        self._identity = status.st_dev, status.st_ino
        self.modified = status.st_mtime
        plain = self._temporary.name if self._temporary else os.path.abspath(path)
        self._db = sqlite3.connect(
            f"file:{quote(plain)}?mode=ro",
            uri=True,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
        )
        self._db.text_factory = lambda text: text.decode("utf-8", "backslashreplace")
        self._tables: dict[str, Table] = {}
        self._nodes: dict[int, NodeRow] = {}
        self.complaints: dict[str, None] = {}  # what could not be read

    def close(self) -> None:
        """Release the file."""
        self._db.close()
        if self._temporary is not None:
            self._temporary.close()

    def rotated(self) -> bool:
        """Whether there is another file at this path now."""
        try:
            status = os.stat(self.path)
        except OSError:  # renamed, and not yet created again
            return False
        return (status.st_dev, status.st_ino) != self._identity

    def query(self, sql: str, args: Iterable[object] = ()) -> list[Any]:
        """All rows of a query."""
        return self._db.execute(sql, tuple(args)).fetchall()

    def read(self, selection: Selection) -> list[Iterator[Record | PacketRecord]]:
        """What was written since the previous call: an iterator per table, by date."""
        try:
            names = {name for (name,) in self.query("SELECT name FROM sqlite_master")}
            for name in ("log1", "log", "packet1", "packet"):
                if name in names and name not in self._tables:
                    self._tables[name] = Table(self, name)
        except sqlite3.Error as error:
            return [iter(self.complaint("", error, self.modified))]
        return [table.read(selection) for table in self._tables.values()]

    def complaint(self, table: str, error: object, date: float) -> list[Record]:
        """An entry that tells an error, the first time that it is met."""
        text = f"cannot read {table or self.path}: {error}"
        if text in self.complaints:
            return []
        self.complaints[text] = None
        return [Record(date, self, UNKNOWN, ERROR, None, None, text)]

    def node(self, row: int | None) -> NodeRow:
        """The node that a row of `node` describes."""
        if row is None:
            return UNKNOWN
        if row not in self._nodes:
            try:
                for key, name, cluster, nid in self.query("SELECT * FROM node"):
                    nid = nid if isinstance(nid, int) else None
                    self._nodes[key] = name, cluster, nid
            except (sqlite3.Error, ValueError):
                return UNKNOWN
        return self._nodes.get(row, UNKNOWN)

    def body(self, date: float) -> bytes | None:
        """Body of the packet of this date."""
        rows = self.query("SELECT body FROM packet WHERE date = ?", (date,))
        body = rows[0][0] if rows else None
        return body if isinstance(body, bytes) else None

    def speaks_our_protocol(self) -> bool:
        """Whether our table of packets can name those of this file.

        The text of packet definitions in the file is searched, never executed.
        """
        try:
            rows = self.query("SELECT text FROM protocol ORDER BY date DESC LIMIT 1")
            text = bz2.BZ2Decompressor().decompress(rows[0][0], PROTOCOL_TEXT_MAX)
        except (sqlite3.Error, OSError, ValueError, TypeError, IndexError, EOFError):
            return True  # nothing says otherwise
        found = re.search(rb"^PROTOCOL_VERSION *= *(\d+)", text, re.MULTILINE)
        return found is None or int(found[1]) == PROTOCOL_VERSION


class Table:
    """A table of records or packets, and how far it was read.

    Tables of 1.6.3 (`legacy`) hold the name of the node themselves, and packets of
    another protocol, whose codes and bodies our table cannot explain.
    """

    def __init__(self, file: LogFile, name: str) -> None:
        self.file = file
        self.name = name
        self.packets = name.startswith("packet")
        columns = {c[1] for c in file.query(f"PRAGMA table_info({name})")}
        self.legacy = "name" in columns
        self._id = "id" if "id" in columns else "0"
        node = "name" if self.legacy else "node"
        values = (
            "msg_id, code, peer" if self.packets else "level, pathname, lineno, msg"
        )
        self._select = f"SELECT date, {self._id}, {node}, {values} FROM {name}"
        self._last: Key | None = None

    def read(self, selection: Selection) -> Iterator[Record | PacketRecord]:
        """Yield what follows the last row that was read, and was there at the call."""
        wanted = (selection.codes,) if self.packets else (selection.level,)
        if wanted == ((),):
            return iter(())
        try:
            ((end,),) = self.file.query(
                f"SELECT max(date) FROM {self.name} WHERE date <= 9e999"  # a number
            )
        except sqlite3.Error as error:
            return iter(self._failed(error))
        if end is None:
            return iter(())
        return self._rows(selection, min(end, selection.end))

    def _failed(self, error: Exception) -> list[Record]:
        date = self._last[0] if self._last else self.file.modified
        return self.file.complaint(f"table {self.name}", error, date)

    def _rows(
        self, selection: Selection, end: float
    ) -> Iterator[Record | PacketRecord]:
        conditions, values = ["date <= ?"], [end]
        if self.packets:
            ours = not self.legacy and self.file.speaks_our_protocol()
            make: Callable[[Any, bool], Record | PacketRecord] = self._packet
            if selection.codes is not None:
                marks = ",".join("?" * len(selection.codes)) if ours else ""
                conditions.append(f"code IN ({marks})")
                values += selection.codes if ours else ()
        else:
            ours, make = not self.legacy, self._record
            if selection.level is not None:
                conditions.append("level >= ?")
                values.append(selection.level)
        order = "date" if self._id == "0" else "date, id"
        while True:
            if self._last is None:
                more, key = "date >= ?", [selection.start]
            elif self._id == "0":
                more, key = "date > ?", [self._last[0]]
            else:
                more, key = "(date, id) > (?, ?)", list(self._last)
            where = " AND ".join([more, *conditions])
            sql = f"{self._select} WHERE {where} ORDER BY {order} LIMIT {BATCH}"
            try:
                rows = self.file.query(sql, (*key, *values))
            except sqlite3.Error as error:
                yield from self._failed(error)
                return
            for row in rows:
                if isinstance(row[0], int | float):
                    self._last = row[0], row[1]
                    yield make(row, ours)
            if len(rows) < BATCH:
                return

    def _node(self, value: Any) -> NodeRow:
        return (str(value), None, None) if self.legacy else self.file.node(value)

    def _record(self, row: Any, _ours: bool) -> Record:
        date, _, node, level, pathname, lineno, message = row
        level = level if isinstance(level, int) else 0
        return Record(
            date, self.file, self._node(node), level, pathname, lineno, str(message)
        )

    def _packet(self, row: Any, ours: bool) -> PacketRecord:
        date, _, node, msg_id, code, peer = row
        packet = BY_CODE.get(code) if ours else None
        msg_id, code = (v if isinstance(v, int) else 0 for v in (msg_id, code))
        return PacketRecord(
            date,
            self.file,
            self._node(node),
            msg_id,
            code,
            str(peer),
            packet,
            self.legacy,
        )


def merge(
    files: Iterable[LogFile], selection: Selection
) -> Iterator[Record | PacketRecord]:
    """All that is new in `files`, by date."""
    tables = [table for file in files for table in file.read(selection)]
    return heapq.merge(*tables, key=lambda entry: entry.date)


# --- compressed files -----------------------------------------------------------


def decompress(path: str) -> IO[bytes] | None:
    """Decompress a whole file to a temporary one; None if it is not compressed.

    The extension tells: gz, bz2, xz or zst (by `zstdcat` if Python has no module).
    """
    openers: dict[str, Callable[[str], Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zst": _open_zst,
    }
    opener = openers.get(os.path.splitext(path)[1])
    if opener is None:
        return None
    temporary = tempfile.NamedTemporaryFile(prefix="neolog-")  # noqa: SIM115
    try:
        with opener(path) as stream:
            shutil.copyfileobj(stream, temporary, 1 << 20)
        temporary.flush()
    except BaseException:
        temporary.close()
        raise
    return temporary


def _open_zst(path: str) -> Any:
    for name in ("compression.zstd", "zstandard"):
        try:
            return import_module(name).open(path, "rb")
        except ImportError:
            continue
    output = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        subprocess.run(
            ["zstdcat", "--", path],
            stdout=output,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            check=True,
        )
    except FileNotFoundError:
        output.close()
        raise ValueError(
            "it needs the program zstdcat or the module zstandard"
        ) from None
    except subprocess.CalledProcessError as error:
        output.close()
        lines = error.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ValueError(lines[-1] if lines else "zstdcat failed") from None
    output.seek(0)
    return output
