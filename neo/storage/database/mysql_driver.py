"""MariaDB and MySQL: connection strings, drivers, and values as SQL text.

Statements are sent as texts with their values in them; several can travel in one
packet, and are answered by one list of results. A text with `?` marks is translated
once, and kept. Values are written here and not by the drivers: so it's the same bytes
for both.

Source: storage-format.md, 2.4.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

from neo.lib.exception import BackendError, ConfigurationError

from .reader import Row

#: rows of a SELECT, or the number of rows that a statement changed
Result = Sequence[Row] | int

# Codes of errors that mean that the connection is dead.
LOST = frozenset((1053, 1927, 2006, 2013, 2055, 4031))
# Those that mean that the server isn't there, maybe not yet.
ABSENT = LOST | {1040, 2002, 2003}
LOCK_WAIT_TIMEOUT = 1205
NOT_PREPARED = 1243
# Types of columns that are not bytes; others have the numbers 245 to 255.
INTEGERS = 0, 1, 2, 3, 8, 9, 246
SOCKETS = "/run/mysqld/mysqld.sock", "/var/lib/mysql/mysql.sock", "/tmp/mysql.sock"
MULTI_STATEMENTS = 1 << 16  # capability flag of the protocol


class Location(NamedTuple):
    """A parsed connection string."""

    user: str | None
    password: str | None
    database: str
    socket: str | None


_LOCATION = re.compile(r"(?:([^:]*)(?::(.*))?@)?([^~./@]+)([~./][^@]*)?", re.DOTALL)


def parse_location(text: str) -> Location:
    """Parse `[user[:password]@]database[socket]`; raise ConfigurationError."""
    match = _LOCATION.fullmatch(text)
    if match is None:
        # The text may contain a password.
        raise ConfigurationError(
            "invalid database: [user[:password]@]database[unix_socket] expected"
        )
    user, password, database, path = match.groups()
    if path is not None:
        path = os.path.expanduser(path)
    return Location(user or None, password, database, path)


# --- values -------------------------------------------------------------------------


def quote(data: bytes) -> bytes:
    """A literal of binary data, at most twice as long and some bytes."""
    return b"_binary'%b'" % data.replace(b"\\", b"\\\\").replace(b"'", b"''")


LITERALS: dict[type, Callable[[Any], bytes]] = {
    int: b"%d".__mod__,
    bool: b"%d".__mod__,
    bytes: quote,
    str: lambda text: quote(text.encode()),
    type(None): lambda _: b"NULL",
}


@lru_cache(1000)
def translate(sql: str) -> bytes:
    """Make a template for literals: `%` of what has `?` marks."""
    sql = sql.replace("%", "%%").replace("?", "%b")
    return re.sub(r"\bpartition\b", "`partition`", sql).encode()


_NUMBERED = re.compile(r"\?(\d+)")


@lru_cache(1000)
def filler(sql: str) -> Callable[[tuple[bytes, ...]], bytes]:
    """What puts literals where `sql` has `?`, or `?1`, `?2`... in any order."""
    order = [int(number) - 1 for number in _NUMBERED.findall(sql)]
    fill = translate(_NUMBERED.sub("?", sql)).__mod__
    if not order:
        return fill
    arrange = itemgetter(*order)
    return lambda literals: fill(arrange(literals))


def render(sql: str, args: Sequence[object] = ()) -> bytes:
    """The text of a statement."""
    return filler(sql)(tuple([LITERALS[type(arg)](arg) for arg in args]))


def preparing(name: str, sql: str) -> bytes:
    """The statement that prepares `sql`, which has neither quotes nor `%`."""
    text = translate(_NUMBERED.sub("?", sql)).replace(b"%b", b"?")
    return b"PREPARE %b FROM '%b'" % (name.encode(), text)


def executing(name: str, sql: str) -> str:
    """The statement that executes what was prepared, with the same numbered marks."""
    return f"EXECUTE {name} USING {', '.join(m[0] for m in _NUMBERED.finditer(sql))}"


# --- drivers ------------------------------------------------------------------------


class Lost(Exception):
    """The connection died. What it was asked last may have been done, or not."""


class Failed(Exception):
    """The server refused a statement; `results` are of those before it."""

    def __init__(self, code: int, text: str, results: list[Result]) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code
        self.results = results


class Connection(Protocol):
    """A connection of a driver."""

    def select(self, packet: bytes) -> Sequence[Row]:
        """The rows of one SELECT."""

    def run(self, packet: bytes) -> list[Result]:
        """Execute statements separated by `;`, the last one without."""

    def fileno(self) -> int: ...

    def close(self) -> None: ...


Connect = Callable[[Location], Connection]


def failure(error: Exception, results: list[Result]) -> Exception:
    """What to raise for the error of a driver."""
    code, text = (*error.args, "", "")[:2]
    if not isinstance(code, int) or code == 0 or code in LOST:
        return Lost(f"{text or code or type(error).__name__} ({code})")
    return Failed(code, str(text), results)


class MySQLdbConnection:
    """mysqlclient, without its cursors: they cost more than a load."""

    def __init__(self, location: Location) -> None:
        from MySQLdb import Error, _mysql

        self._error = Error
        options = {
            "user": location.user,
            "password": location.password,
            "database": location.database,
            "unix_socket": location.socket,
        }
        try:
            self._db = _mysql.connect(
                **{key: value for key, value in options.items() if value is not None},
                charset="utf8mb4",
                client_flag=MULTI_STATEMENTS,
                conv=dict.fromkeys(INTEGERS, int),
            )
        except Error as e:
            raise failure(e, []) from e
        self._query = self._db.query
        self._store = self._db.store_result

    def select(self, packet: bytes) -> Sequence[Row]:
        try:
            self._query(packet)
            rows: Sequence[Row] = self._store().fetch_row(0)
        except self._error as e:
            raise failure(e, []) from e
        return rows

    def run(self, packet: bytes) -> list[Result]:
        results: list[Result] = []
        db = self._db
        try:
            self._query(packet)
            while True:
                result = self._store()
                results.append(
                    db.affected_rows() if result is None else result.fetch_row(0)
                )
                if db.next_result() == -1:
                    return results
        except self._error as e:
            raise failure(e, results) from e

    def fileno(self) -> int:
        return int(self._db.fileno())

    def close(self) -> None:
        with contextlib.suppress(self._error):  # it may be dead
            self._db.close()


class PyMySQLConnection:
    """PyMySQL, without its cursors."""

    def __init__(self, location: Location) -> None:
        import pymysql

        self._errors = (pymysql.MySQLError, OSError)
        path = location.socket or next(filter(os.path.exists, SOCKETS), None)
        try:
            self._db = pymysql.connect(
                user=location.user,
                password=location.password or "",
                database=location.database,
                unix_socket=path,
                charset="utf8mb4",
                client_flag=MULTI_STATEMENTS,
                conv=dict.fromkeys(INTEGERS, int),
                autocommit=None,
                use_unicode=False,
            )
        except self._errors as e:
            raise failure(e, []) from e

    def select(self, packet: bytes) -> Sequence[Row]:
        try:
            self._db.query(packet)
        except self._errors as e:
            raise failure(e, []) from e
        rows: Sequence[Row] = self._db._result.rows
        return rows

    def run(self, packet: bytes) -> list[Result]:
        results: list[Result] = []
        db = self._db
        try:
            count = db.query(packet)
            while True:
                result = db._result
                is_select = result.description is not None
                results.append(result.rows if is_select else count)
                if not result.has_next:
                    return results
                count = db.next_result()
        except self._errors as e:
            raise failure(e, results) from e

    def fileno(self) -> int:
        return int(self._db._sock.fileno())

    def close(self) -> None:
        with contextlib.suppress(*self._errors):  # it may be dead
            self._db.close()


DRIVERS: dict[str, tuple[str, Connect]] = {
    "MySQLdb": ("MySQLdb", MySQLdbConnection),
    "PyMySQL": ("pymysql", PyMySQLConnection),
}


def choose_driver(adapter: str) -> Connect:
    """The driver of an adapter's name; `MySQL` takes the best that is installed."""
    names = [adapter]
    if adapter == "MySQL":
        names = sorted(DRIVERS, reverse=sys.implementation.name == "pypy")
    for name in names:
        module, connect = DRIVERS[name]
        try:
            import_module(module)
        except ImportError:
            continue
        return connect
    needs = {"MySQLdb": "mysqlclient"}.get(adapter, adapter)
    if adapter == "MySQL":
        needs = "mysqlclient or PyMySQL"
    raise ConfigurationError(f"adapter {adapter} needs {needs}, which is not installed")


def backend_error(error: Exception) -> BackendError:
    """What the node hears of an error."""
    return BackendError(f"MySQL: {error}")
