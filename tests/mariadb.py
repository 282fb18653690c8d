"""A private MariaDB server for the tests that want one, and databases in it.

It listens on a unix socket in a temporary directory, in memory if there is room: what
these tests want to know of durability, they learn by killing processes. Without server
or driver the tests are left out, and the end of the run says so, and why.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from neo.lib.exception import ConfigurationError
from neo.scripts.mariadb import MariaDB
from neo.storage.database import mysql_driver

#: (adapter, engine) that tests run on, by name
ADAPTERS = {
    "InnoDB": ("MySQLdb", "InnoDB"),
    "RocksDB": ("MySQLdb", "RocksDB"),
    "PyMySQL": ("PyMySQL", "InnoDB"),
}
HOW_TO = "'make test' as root installs it, or says what to install"
# Small and quick: nothing here is worth a cache.
OPTIONS = [
    "--innodb-buffer-pool-size=24M",
    "--innodb-log-file-size=32M",
    "--max-connections=200",
]
ROOM = 1 << 30  # bytes that must be free for the server to be in memory


class Server(MariaDB):
    """The server of the tests, with databases that have a number."""

    def __init__(self, directory: str, *options: str) -> None:
        self.has_rocksdb = bool(rocksdb())
        more = [f"--plugin-load-add={rocksdb()}"] if self.has_rocksdb else []
        super().__init__(directory, [*OPTIONS, *more, *options])
        self.numbers = count(1)

    def new_database(self) -> str:
        """Name of an empty database."""
        name = f"test{next(self.numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def url(self, name: str) -> str:
        """Its connection string."""
        return f"root:@{name}{self.socket}"

    def connect(self, name: str) -> mysql_driver.Connection:
        """A connection that is nobody's."""
        return mysql_driver.choose_driver("MySQL")(
            mysql_driver.parse_location(self.url(name))
        )

    def image(self, name: str) -> dict[str, tuple[str, list[Any]]]:
        """What is committed: for each table, its definition and its rows."""
        image = {}
        with contextlib.closing(self.connect(name)) as db:
            for (table,) in db.select(b"SHOW TABLES"):
                definition = db.select(b"SHOW CREATE TABLE " + table)[0][1].decode()
                content = db.select(b"SELECT * FROM " + table)
                image[table.decode()] = definition, list(content)
        return image

    def restore(self, name: str, image: dict[str, tuple[str, list[Any]]]) -> None:
        """Put an image in an empty database."""
        with contextlib.closing(self.connect(name)) as db:
            for table, (definition, content) in image.items():
                db.run(definition.encode())
                for row in content:
                    marks = ", ".join("?" * len(row))
                    sql = f"INSERT INTO {table} VALUES ({marks})"
                    db.run(mysql_driver.render(sql, row))

    def execute_file(self, name: str, path: Path) -> None:
        """Execute a dump in a database."""
        with contextlib.closing(self.connect(name)) as db:
            db.run(path.read_bytes().strip().removesuffix(b";"))


def rocksdb() -> str | None:
    """File name of the plugin, if it is installed."""
    for directory in ("/usr/lib/mysql/plugin", "/usr/lib64/mysql/plugin"):
        if os.path.exists(os.path.join(directory, "ha_rocksdb.so")):
            return "ha_rocksdb"
    return None


def scratch() -> str:
    """A new directory, in memory if there is room."""
    place = tempfile.gettempdir()
    with contextlib.suppress(OSError):
        if shutil.disk_usage("/dev/shm").free > ROOM and os.access("/dev/shm", os.W_OK):
            place = "/dev/shm"
    # What tests that were killed left there; their servers died with them.
    for path in Path(place).glob("neo-mariadb-*-*"):
        if not Path("/proc", path.name.split("-")[2]).exists():
            shutil.rmtree(path, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"neo-mariadb-{os.getpid()}-", dir=place)


@contextlib.contextmanager
def running(*options: str) -> Iterator[Server]:
    """A server of its own, removed at the end."""
    directory = scratch()
    try:
        server = Server(directory, *options)
        try:
            server.create()
            server.start()
            yield server
        finally:
            server.stop(kill=True)
            server.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@functools.cache
def why_missing(kind: str) -> str | None:
    """Why tests can't run on one of ADAPTERS; None if they can."""
    try:
        mysql_driver.choose_driver(ADAPTERS[kind][0])
        MariaDB("/nonexistent")
    except ConfigurationError as e:
        return str(e)
    if kind == "RocksDB" and rocksdb() is None:
        return "the server has no RocksDB: install it (mariadb-plugin-rocksdb)"
    return None


def require(kind: str = "InnoDB") -> None:
    """Leave out the test that calls this if it can't run, and say so at the end."""
    if reason := why_missing(kind):
        pytest.skip(f"all tests on {kind}: {reason}; {HOW_TO}")


@pytest.fixture(scope="session")
def mariadb() -> Iterator[Server]:
    """The server that the tests of this process share."""
    require()
    with running() as server:
        yield server
