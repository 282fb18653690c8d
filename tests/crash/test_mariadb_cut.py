"""A storage's database survives the loss of its connection, and its server, anywhere.

The script of a database's life is interrupted at its n-th packet, before it is sent or
after it was executed; for some n the server is killed as well. The database then opens,
holds all that was acknowledged and no half transaction, and the script goes on.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from neo.lib.exception import BackendError
from neo.storage.database import open_backend
from neo.storage.database.mysql import MySQLBackend
from neo.storage.database.mysql_driver import Lost
from neo.storage.database.reader import decode_config
from tests import mariadb
from tests.crash.script import SCRIPT, content, run, states


class Cut:
    """A connection that is lost at its n-th packet."""

    def __init__(self, connection: Any, n: int, is_executed: bool) -> None:
        self.connection = connection
        self.left = n
        self.is_executed = is_executed

    def run(self, packet: bytes) -> Any:
        self.left -= 1
        if self.left:
            return self.connection.run(packet)
        if self.is_executed:
            self.connection.run(packet)
        self.connection.close()
        raise Lost("cut")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


def open_database(url: str, engine: str = "InnoDB") -> MySQLBackend:
    db = open_backend("MySQL", url, engine=engine)
    assert isinstance(db, MySQLBackend)
    db._batch = 0  # each statement is sent alone, the last one with its COMMIT
    return db


def readable(found: list[Any]) -> list[Any]:
    """As SQLite has it: `config` is text there."""
    return [sorted(decode_config(found[0]).items()), *found[1:]]


def interrupted(db: MySQLBackend, n: int, is_executed: bool) -> int | None:
    """Run the script; the number of steps that were done when it was cut, if it was."""
    db._connection = Cut(db._connection, n, is_executed)
    for step in range(len(SCRIPT)):
        try:
            run(db, step)
        except BackendError:
            return step
    return None


def check(url: str, engine: str, expected: list[Any], done: int) -> None:
    """What was acknowledged is there, nothing is half, and the script goes on."""
    db = open_database(url, engine)
    found = readable(content(db))
    step = done if found != expected[done + 1] else done + 1
    # Interrupted between two tables? Without cells, the others are of nobody.
    if SCRIPT[done][1] != [("erase",)] or found[1]:
        assert found == expected[step], done
        db.begin(durable=False)
        assert db.prune_orphans(0, 1000, True) == (0, None)
        db.commit()
    for rest in range(step, len(SCRIPT)):
        run(db, rest)
    assert readable(content(db)) == expected[-1]
    db.close()


@contextmanager
def database(server: mariadb.Server) -> Iterator[str]:
    name = server.new_database()
    yield server.url(name)
    server.execute(f"DROP DATABASE {name}")


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    return [readable(state) for state in states()]


@pytest.mark.parametrize("is_executed", [False, True])
def test_cut_at_each_packet(
    mariadb: mariadb.Server, expected: list[Any], is_executed: bool
) -> None:
    n = 0
    while True:
        n += 1
        with database(mariadb) as url:
            db = open_database(url)
            done = interrupted(db, n, is_executed)
            db.close()
            if done is None:
                break
            check(url, "InnoDB", expected, done)
    assert n > 80


@pytest.mark.parametrize("engine", ["InnoDB", "RocksDB"])
def test_kill_the_server(expected: list[Any], engine: str) -> None:
    mariadb.require(engine)
    steps = set()
    with mariadb.running() as server:
        for n in range(5, 999, 29):
            name = server.new_database()
            url = server.url(name)
            db = open_database(url, engine)
            done = interrupted(db, n, n % 2 == 0)
            server.stop(kill=True)
            db.close()
            server.start()
            if done is None:
                break
            steps.add(done)
            check(url, engine, expected, done)
            server.execute(f"DROP DATABASE {name}")
    assert len(steps) >= 4


def test_server_restarts_under_a_database(expected: list[Any]) -> None:
    """Between two transactions it may come and go."""
    mariadb.require()
    with mariadb.running() as server:
        url = server.url(server.new_database())
        db = open_database(url)
        for step in range(len(SCRIPT)):
            if step % 10 == 3:
                server.stop(kill=step % 20 == 3)
                server.start()
                assert db.settings().nid is not None
                assert db.background.settings().nid is not None
            run(db, step)
        db.close()
        db = open_database(url)
        assert readable(content(db)) == expected[-1]
        db.close()


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A file system of this size; leaves the test out if it may not be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as e:
        pytest.skip(f"a full disk of MariaDB: {e}; as root, with the right to mount")
    if done.returncode:
        pytest.skip(
            f"a full disk of MariaDB: {done.stderr.strip()}; as root, with the right to"
            " mount"
        )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_full_disk(tmp_path: Path, expected: list[Any]) -> None:
    """The node stops with an error; what was acknowledged is there, and goes on."""
    mariadb.require()
    disk = tmp_path / "disk"
    with small_disk(disk, "200m"):
        server = mariadb.Server(str(disk / "server"), "--innodb-log-file-size=8M")
        try:
            server.create()
            server.start()
            name = server.new_database()
            url = server.url(name)
            db = open_database(url)
            for step in range(5):
                run(db, step)
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(1 << 16)):
                        pass
                except OSError:
                    pass
            value = bytes(range(256)) * 40000
            db.begin(durable=True)
            with pytest.raises(BackendError, match=r"full|Lost connection"):  # noqa: PT012  # which, varies
                for n in range(20):
                    db.spill(bytes(8), (b"%020d" % n, value, 0))
                db.commit()
            db.rollback()
            db.close()
            filler.unlink()
            if server.process is not None and server.process.poll() is not None:
                server.start()
            check(url, "InnoDB", expected, 5)
        finally:
            server.close()
