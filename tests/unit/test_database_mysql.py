"""What is peculiar to MariaDB and MySQL: connections, locks, packets, query plans."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest

from neo.lib.exception import BackendError, ConfigurationError, DatabaseLocked
from neo.lib.protocol import ZERO_OID, CellState
from neo.lib.util import p64
from neo.storage.database import mysql, mysql_driver, mysql_reader, open_backend
from neo.storage.database.interface import Metadata, Store, Transaction, Value
from neo.storage.database.mysql import CHUNKED_MIN, MySQLBackend
from neo.storage.database.mysql_driver import Location, Lost, parse_location, render
from neo.storage.database.mysql_reader import CHUNK
from neo.storage.database.reader import LOST_HASH, decode_config
from tests import mariadb
from tests.unit.database_queries import execute_all

SAMPLES = Path(__file__).parent.parent / "samples"
TABLES = [table.name for table in MySQLBackend.TABLES]


class Databases:
    """Databases of a test."""

    def __init__(self, server: mariadb.Server) -> None:
        self.server = server
        self.names: list[str] = []
        self.opened: list[MySQLBackend] = []

    def new(self) -> str:
        self.names.append(self.server.new_database())
        return self.names[-1]

    def open(
        self, name: str | None = None, adapter: str = "MySQL", **options: Any
    ) -> MySQLBackend:
        db = open_backend(adapter, self.server.url(name or self.new()), **options)
        assert isinstance(db, MySQLBackend)
        self.opened.append(db)
        return db

    def execute(self, name: str, *statements: str) -> None:
        with closing(self.server.connect(name)) as connection:
            for sql in statements:
                connection.run(sql.encode())

    def definitions(self, name: str) -> dict[str, str]:
        return {k: text for k, (text, _) in self.server.image(name).items()}


@pytest.fixture
def databases(mariadb: mariadb.Server) -> Iterator[Databases]:
    databases = Databases(mariadb)
    yield databases
    for db in databases.opened:
        db.rollback()
        db.close()
    for name in databases.names:
        mariadb.execute(f"DROP DATABASE {name}")


@pytest.fixture
def db(databases: Databases) -> MySQLBackend:
    db = databases.open()
    start(db)
    return db


def start(db: MySQLBackend) -> None:
    db.begin(durable=True)
    db.set_nid(1)
    db.change_partition_table(1, 0, [(0, 1, CellState.UP_TO_DATE)], reset=True)
    db.commit()


def val(data: bytes) -> Value:
    return sha1(data).digest(), data, 0


def add(
    db: MySQLBackend, tid: int, data: bytes = b"data", oid: bytes = ZERO_OID
) -> None:
    db.begin(durable=True)
    meta = Metadata(b"", b"", b"", [oid])
    db.vote(p64(tid), [Store(oid, None, val(data))], meta)
    db.lock(p64(tid), p64(tid), False)
    db.unlock(p64(tid), p64(tid))
    db.commit()


def run(db: MySQLBackend, name: str, *args: Any) -> Any:
    db.begin(durable=True)
    result = getattr(db, name)(*args)
    db.commit()
    return result


# --- connection strings, drivers --------------------------------------------------


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("neo", Location(None, None, "neo", None)),
        ("root@neo1", Location("root", None, "neo1", None)),
        ("u:p@neo1", Location("u", "p", "neo1", None)),
        ("u:p:q@x@db/run/s.sock", Location("u", "p:q@x", "db", "/run/s.sock")),
        ("u:@db./s", Location("u", "", "db", "./s")),
        ("a@b@db", Location("a@b", None, "db", None)),
        ("db~/s", Location(None, None, "db", str(Path("~/s").expanduser()))),
        ("u%40:\n@my db", Location("u%40", "\n", "my db", None)),
    ],
)
def test_connection_string(text: str, location: Location) -> None:
    assert parse_location(text) == location


@pytest.mark.parametrize("text", ["", "/run/s.sock", "u:secret@", "u:secret@/s"])
def test_invalid_connection_string(text: str) -> None:
    with pytest.raises(ConfigurationError, match="invalid database") as e:
        open_backend("MySQL", text)
    assert "secret" not in str(e.value)


def test_driver_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MySQLdb", None)
    with pytest.raises(ConfigurationError, match="MySQLdb needs mysqlclient, which is"):
        mysql_driver.choose_driver("MySQLdb")
    assert mysql_driver.choose_driver("MySQL") is mysql_driver.PyMySQLConnection
    monkeypatch.setitem(sys.modules, "pymysql", None)
    with pytest.raises(
        ConfigurationError, match="mysqlclient or PyMySQL, which is not"
    ):
        mysql_driver.choose_driver("MySQL")


def test_literals() -> None:
    assert (
        render("a ? partition % ?", (1, b"'\\")) == b"a 1 `partition` % _binary'''\\\\'"
    )
    assert render("?, ?, ?, ?", (None, True, -1, "é'")) == (
        "NULL, 1, -1, _binary'é'''".encode()
    )
    assert render("partitions") == b"partitions"


@pytest.mark.parametrize("adapter", ["MySQLdb", "PyMySQL"])
def test_values_as_they_were(databases: Databases, adapter: str) -> None:
    """All bytes, in any order, and all integers that a column can hold."""
    connection = mysql_driver.choose_driver(adapter)(
        parse_location(databases.server.url(databases.new()))
    )
    values = [bytes(range(256)), bytes(range(255, -1, -1)), b"", b"\\", b"\\'", b"a;b"]
    values += [bytes([a, b]) for a in b"\\'\0\n\xbf" for b in b"\\'\0\x5c\x27"]
    for value in values:
        assert connection.select(render("SELECT ?", (value,)))[0] == (value,)
    integers = 0, 1, -1, (1 << 63) - 1, (1 << 64) - 1
    for number in integers:
        assert connection.select(render("SELECT ?", (number,)))[0] == (number,)
    assert connection.run(b"SELECT 1; DO 2; SELECT 3 WHERE 0") in (
        [((1,),), 0, ()],
        [[(1,)], 0, []],
        [((1,),), 0, []],
    )
    with pytest.raises(mysql_driver.Failed) as e:
        connection.run(b"DO 1; SELECT 2; SELECT x; DO 4")
    assert len(e.value.results) == 2
    assert e.value.code == 1054
    assert connection.select(b"SELECT 5")[0] == (5,)
    connection.close()
    connection.close()


# --- opening ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["InnoDB", "PyMySQL"])
def test_server_that_is_not_there(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mariadb.require(kind)
    adapter = mariadb.ADAPTERS[kind][0]
    naps: list[float] = []
    monkeypatch.setattr(mysql_reader.time, "sleep", naps.append)
    monkeypatch.setattr(mysql_reader.time, "monotonic", lambda: len(naps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for wait, attempts in (0, 0), (3, 3):
            naps.clear()
            with pytest.raises(ConfigurationError, match="can not open database"):
                open_backend(adapter, f"root@neo{tmp_path}/s", wait=wait)
            assert naps == [1] * attempts
        gc.collect()  # PyMySQL leaves it to close its socket


def test_what_the_operator_can_correct(databases: Databases) -> None:
    socket = databases.server.socket
    for text, problem in (
        (f"root:@missing{socket}", "Unknown database"),
        (f"nobody:wrong@mysql{socket}", "Access denied"),
    ):
        for adapter in "MySQLdb", "PyMySQL":
            with pytest.raises(ConfigurationError, match=problem) as e:
                open_backend(adapter, text, wait=100)  # waiting does not help
            assert "wrong" not in str(e.value)
    with pytest.raises(ConfigurationError, match="unsupported engine 'MyISAM'"):
        databases.open(engine="MyISAM")
    for table in "data", "log":
        databases.execute(name := databases.new(), f"CREATE TABLE {table} (x INT)")
        with pytest.raises(ConfigurationError, match="not a database of NEO"):
            databases.open(name)


def test_small_packets_are_refused(databases: Databases) -> None:
    server = databases.server
    server.execute(f"SET GLOBAL max_allowed_packet = {32768 << 10}")
    try:
        with pytest.raises(ConfigurationError, match="at least 33555456 is needed"):
            databases.open()
    finally:
        server.execute("SET GLOBAL max_allowed_packet = 67108864")


def test_unsafe_settings_are_warned_about(
    databases: Databases, caplog: pytest.LogCaptureFixture
) -> None:
    server = databases.server
    databases.open()
    assert not caplog.records
    server.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 2")
    try:
        db = databases.open()
    finally:
        server.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "innodb_flush_log_at_trx_commit=2: commits may be lost" in caplog.text
    # The server may have crashed: what it acknowledged may be gone.
    kill(databases, db._connection)
    with pytest.raises(BackendError, match="may have lost commits"):
        db.begin(durable=True)


def test_other_node_is_refused(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mysql, "LOCK_S", 0)
    name = databases.new()
    db = databases.open(name)
    for adapter in "MySQLdb", "PyMySQL":
        with pytest.raises(DatabaseLocked, match=r"^database is locked$"):
            databases.open(name, adapter)
    code = (
        "import sys; from neo.storage.database import mysql, open_backend\n"
        "mysql.LOCK_S = 0\n"
        "try: open_backend('MySQL', sys.argv[1])\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )
    url = databases.server.url(name)
    command = [sys.executable, "-c", code, url]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "DatabaseLocked database is locked"
    other = databases.open()  # each database has its own lock
    start(other)
    db.close()
    db.close()
    monkeypatch.undo()
    again = databases.open(name)
    assert again.device == os.stat(databases.server.data).st_dev


# --- tables -----------------------------------------------------------------------


@pytest.mark.parametrize("dedup", [False, True])
def test_tables_are_those_of_the_format(databases: Databases, dedup: bool) -> None:
    """As neoppod made them, to the letter."""
    db = databases.open(dedup=dedup)
    assert db.dedup is dedup
    sample = SAMPLES / f"a-{'' if dedup else 'no'}dedup.mariadb.sql"
    theirs = {
        match[1]: match[0]
        for match in re.finditer(
            r"CREATE TABLE `(\w+)` \(.*?\n\) ENGINE=[^;]*", sample.read_text(), re.S
        )
    }
    ours = databases.definitions(databases.names[-1])
    assert sorted(ours) == sorted(theirs) == sorted(TABLES)
    for table, text in theirs.items():
        assert re.sub(r"AUTO_INCREMENT=\d+ ", "", text) == ours[table]


@pytest.mark.parametrize("dedup", [False, True])
def test_what_a_commit_adds_to_a_database_of_neoppod(
    databases: Databases, dedup: bool
) -> None:
    """The rows that neoppod would have added, and nothing else changes."""

    def image() -> dict[str, tuple[str, set[Any]]]:
        return {
            table: (re.sub(r"AUTO_INCREMENT=\d+ ", "", text), set(rows))
            for table, (text, rows) in databases.server.image(name).items()
        }

    name = databases.new()
    sample = SAMPLES / f"a-{'' if dedup else 'no'}dedup.mariadb.sql"
    databases.server.execute_file(name, sample)
    before = image()
    databases.open(name).close()
    assert image() == before
    ttid, tid = 285290500000000001, 285290500000000013  # of one partition
    undone = 285290378910551253  # of oid 9
    (old,) = [r[3] for r in before["obj"][1] if r[1:3] == (9, undone)]
    last = max(row[0] for row in before["data"][1] if row[0] >> 48 == 1)
    db = databases.open(name)
    stores = [
        Store(p64(1), None, val(b"new")),
        Store(p64(2), None, None),
        Store(p64(9), p64(undone), None),
    ]
    meta = Metadata(b"user", b"description", b"extension", [p64(n) for n in (1, 2, 9)])
    db.begin(durable=True)
    db.vote(p64(ttid), stores, meta)
    db.lock(p64(ttid), p64(tid), False)
    db.commit()
    voted = image()
    run(db, "unlock", p64(ttid), p64(tid))
    db.close()
    records = [(1, 1, last + 1, None), (2, 2, None, None), (9, 9, old, undone)]
    value = last + 1, sha1(b"new").digest(), 0, b"new"
    oids = bytes.fromhex("000000000000000100000000000000020000000000000009")
    texts = oids, b"user", b"description", b"extension", ttid
    expected = {table: (text, set(rows)) for table, (text, rows) in before.items()}
    expected["data"][1].add(value)
    expected["tobj"][1].update((p, o, ttid, d, v) for p, o, d, v in records)
    expected["ttrans"][1].add((ttid % 12, tid, 0, *texts))
    assert voted == expected
    expected["tobj"][1].clear()
    expected["ttrans"][1].clear()
    expected["obj"][1].update((p, o, tid, d, v) for p, o, d, v in records)
    expected["trans"][1].add((tid % 12, tid, 0, *texts))
    assert image() == expected


def test_column_families_of_rocksdb(databases: Databases) -> None:
    mariadb.require("RocksDB")
    databases.open(engine="RocksDB", dedup=True)
    found = {
        (table, key.strip("`")): comment
        for table, text in databases.definitions(databases.names[-1]).items()
        for key, comment in re.findall(
            r"(PRIMARY|`\w+`)(?: KEY)? \(.*\) COMMENT '(.*)'", text
        )
    }
    assert found == mysql.FAMILIES


def interrupt_reset(db: MySQLBackend, count: int) -> None:
    """Let it fail after so many tables."""
    push = db._push
    dropped = 0

    def push_or_fail(text: bytes) -> None:
        nonlocal dropped
        if text.startswith(b"DROP"):
            if dropped == count:
                db._flush()
                raise BackendError("the power fails")
            dropped += 1
        push(text)

    db._push = push_or_fail  # type: ignore[method-assign]


def test_reset_that_is_interrupted(databases: Databases) -> None:
    """A table at a time is dropped: whatever is left opens again, and is nobody's."""
    for count in range(len(TABLES)):
        name = databases.new()
        db = databases.open(name)
        start(db)
        add(db, 100)
        run(db, "set_config", "ptid", "7")
        interrupt_reset(db, count)
        with pytest.raises(BackendError, match="power fails"):
            db.erase()
        db.close()
        again = databases.open(name)
        assert bool(again.partition_table()) is (count == 0)
        again.erase()
        assert again.settings().ptid is None
        assert again._query("SELECT * FROM trans") == []
        again.close()


# --- migration --------------------------------------------------------------------

TO_V3 = [
    "ALTER TABLE pt DROP COLUMN pack",
    "DROP TABLE pack",
    "DROP TABLE todel",
    "UPDATE config SET value = '3' WHERE name = 'version'",
    "INSERT INTO config VALUES ('partitions', '12')",
]
TO_V0 = [
    *TO_V3,
    "CREATE TABLE old (rid INT UNSIGNED NOT NULL, nid INT NOT NULL,"
    " state TINYINT UNSIGNED NOT NULL, PRIMARY KEY (rid, nid))",
    "INSERT INTO old SELECT `partition`, nid, IF(tid = -1, 0, 4) FROM pt",
    "DROP TABLE pt",
    "ALTER TABLE old RENAME TO pt",
    "ALTER TABLE obj DROP PRIMARY KEY, DROP KEY tid,"
    " ADD PRIMARY KEY (`partition`, tid, oid),"
    " ADD KEY `partition` (`partition`, oid, tid)",
    "DELETE FROM config WHERE name = 'version'",
]


@pytest.mark.parametrize("statements", [TO_V3, TO_V0])
def test_migration(databases: Databases, statements: list[str]) -> None:
    name = databases.new()
    databases.server.execute_file(name, SAMPLES / "a-nodedup.mariadb.sql")
    before = databases.server.image(name)
    databases.execute(name, *statements)
    databases.open(name).close()
    after = databases.server.image(name)
    for table in TABLES:
        ours, theirs = after[table], before[table]
        assert sorted(ours[1], key=repr) == sorted(theirs[1], key=repr), table
        assert ours[0] == re.sub(r"AUTO_INCREMENT=\d+ ", "", theirs[0]), table


def test_corrupted_cell_of_an_old_version(databases: Databases) -> None:
    """1 - state underflows where state is unsigned."""
    name = databases.new()
    databases.server.execute_file(name, SAMPLES / "a-nodedup.mariadb.sql")
    databases.execute(name, *TO_V0, "UPDATE pt SET state = 4 WHERE rid = 0")
    db = databases.open(name)
    assert db.partition_table()[0][2] is CellState.CORRUPTED


def test_missing_tables_are_created(databases: Databases) -> None:
    """DDL is not transactional: an opening may stop anywhere after the version."""
    for count in range(1, len(TABLES)):
        name = databases.new()
        databases.open(name).close()
        databases.execute(name, *(f"DROP TABLE {table}" for table in TABLES[count:]))
        db = databases.open(name)
        start(db)
        add(db, 100)
        assert db.load(ZERO_OID) is not None
    name = databases.new()
    databases.execute(
        name, "CREATE TABLE config (name VARBINARY(255) PRIMARY KEY, value BLOB)"
    )
    assert databases.open(name).settings().nid is None


def test_deferred_deletion_is_done(databases: Databases) -> None:
    """What neoppod put in `todel`: only what nothing refers to is deleted."""
    name = databases.new()
    db = databases.open(name)
    start(db)
    add(db, 100, b"used")
    db.begin(durable=True)
    db.vote(p64(101), [Store(p64(1), None, val(b"voted"))], None)
    db.execute_many(
        "INSERT INTO data VALUES (?, ?, 0, ?)",
        [(1000 + n, b"", b"unused") for n in range(2500)],
    )
    db.execute("INSERT INTO todel SELECT id FROM data")
    db.execute("INSERT INTO todel VALUES (999999)")
    db.commit()
    db.close()
    db = databases.open(name)
    values = db._query("SELECT value FROM data")
    assert sorted(values) == [(b"used",), (b"voted",)]
    assert db._query("SELECT * FROM todel") == []


# --- big values -------------------------------------------------------------------


@pytest.mark.parametrize("dedup", [False, True])
def test_big_values(databases: Databases, dedup: bool) -> None:
    name = databases.new()
    db = databases.open(name, dedup=dedup)
    start(db)
    # The longest one that is not cut, all of it escaped; the shortest that is; three.
    sizes = CHUNKED_MIN - 1, CHUNKED_MIN, 2 * CHUNK + 1
    values = [(b"'", b"\\", b"x")[n] * size for n, size in enumerate(sizes)]
    for n, value in enumerate(values):
        add(db, 100 + n, value, p64(n))
    meta = Metadata(b"", b"", b"", [p64(3)])
    db.begin(durable=True)
    data_id = db.spill(p64(3), val(values[2]))
    db.commit()
    assert db.spilled(data_id) == val(values[2])
    db.begin(durable=True)
    db.vote(p64(103), [Store(p64(3), None, data_id)], meta)
    db.unlock(p64(103), p64(103))
    db.add_object(p64(3), p64(104), val(b"last"), None)
    db.commit()
    for n, value in enumerate([*values, values[2]]):
        for reader in db, db.background:
            found = reader.load(p64(n), before=p64(104))
            assert found is not None
            assert found[2:5] == (0, sha1(value).digest(), value)
            wanted = [(p64(n), None, p64(104)), (p64(9), None, None)]
            assert reader.load_many(wanted) == [found, None]
        assert db.history(p64(n), 0, 9)[-1] == (p64(100 + n), len(value))
    rows = "SELECT compression, HEX(value) FROM data WHERE compression > 1 ORDER BY id"
    chunks = [int(first[:8], 16) for _, first in db._query(rows)]
    assert db._query(rows) == [
        (128, b"%08X%08X" % (first, size))
        for first, size in zip(chunks, [*sizes[1:], sizes[2]], strict=False)
    ]
    assert len(chunks) == 3 - dedup
    assert db._query("SELECT COUNT(*) FROM bigdata") == [(2 + 3 + 3 * (not dedup),)]
    assert run(db, "prune_orphans", 0, 100, True) == (0, None)
    # The chunks go with the last reference.
    db.close()
    db = databases.open(name)
    run(db, "pack_partition", 0, p64(104), ZERO_OID, 100)
    assert db._query("SELECT COUNT(*) FROM bigdata") == [(2 + 3,)]
    run(db, "delete_object", p64(2), p64(102))
    assert db._query("SELECT COUNT(*) FROM bigdata") == [(2,)]
    run(db, "execute", "DELETE FROM bigdata LIMIT 1")
    damaged = db.load(p64(1))
    assert damaged is not None
    assert damaged[3:5] == (LOST_HASH, b"")


# --- connections that die ---------------------------------------------------------


def kill(databases: Databases, connection: Any) -> None:
    """Let the server close a connection."""
    (thread,) = connection.select(b"SELECT CONNECTION_ID()")[0]
    databases.server.execute(f"KILL {thread}")


@pytest.mark.parametrize("adapter", ["MySQLdb", "PyMySQL"])
def test_reader_connects_again(
    databases: Databases, adapter: str, caplog: pytest.LogCaptureFixture
) -> None:
    db = databases.open(adapter=adapter)
    start(db)
    add(db, 100)
    for reader in db, db.background:
        for _ in range(2):
            kill(databases, reader._read_connection)
            assert reader.load(ZERO_OID) is not None
    assert caplog.text.count("lost, reconnecting") == 4
    with pytest.raises(BackendError, match="syntax"):
        db._query("SELEC")


def test_reader_gives_up(
    db: MySQLBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(packet: bytes) -> Any:
        raise Lost("no luck")

    attempts = []
    connect = db._server.connect

    def connect_badly(autocommit: bool) -> Any:
        attempts.append(autocommit)
        connection = connect(autocommit)
        connection.select = fail  # type: ignore[method-assign]
        return connection

    monkeypatch.setattr(db._server, "connect", connect_badly)
    db._select = fail
    with pytest.raises(BackendError, match="no luck"):
        db.load(ZERO_OID)
    assert attempts == [True, True]

    def refuse(autocommit: bool) -> Any:
        attempts.append(autocommit)
        raise Lost("gone")

    naps: list[float] = []
    monkeypatch.setattr(mysql_reader.time, "sleep", naps.append)
    monkeypatch.setattr(mysql_reader.time, "monotonic", lambda: sum(naps))
    monkeypatch.setattr(db._server, "connect", refuse)
    with pytest.raises(BackendError, match="gone"):
        db.load(ZERO_OID)
    assert sum(naps) == pytest.approx(mysql_reader.RECONNECT_S, abs=0.2)


@pytest.mark.parametrize("adapter", ["MySQLdb", "PyMySQL"])
def test_writer_connects_again_between_transactions(
    databases: Databases, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = databases.open(name := databases.new(), adapter)
    start(db)
    kill(databases, db._connection)
    add(db, 100)
    assert db.load(ZERO_OID) is not None
    monkeypatch.setattr(mysql, "LOCK_S", 0)
    with pytest.raises(DatabaseLocked):  # it was locked again
        databases.open(name)
    other = databases.server.connect(name)
    kill(databases, db._connection)
    assert other.select(f"SELECT GET_LOCK('{name}.neostorage', 5)".encode())[0] == (1,)
    with pytest.raises(DatabaseLocked):  # by another node, in between
        db.begin(durable=True)
    other.close()


@pytest.mark.parametrize("adapter", ["MySQLdb", "PyMySQL"])
def test_writer_gives_up_within_a_transaction(
    databases: Databases, adapter: str
) -> None:
    db = databases.open(name := databases.new(), adapter)
    start(db)
    db.begin(durable=True)
    db.vote(p64(100), [Store(ZERO_OID, None, val(b"a"))], None)
    db._flush()
    kill(databases, db._connection)
    with pytest.raises(BackendError, match="MySQL: "):
        db.commit()
    db.rollback()
    db.close()
    db = databases.open(name)
    assert db.locked_transactions() == {}
    assert db._query("SELECT * FROM data") == []


def test_another_program_locks_rows(
    databases: Databases, caplog: pytest.LogCaptureFixture
) -> None:
    """A manual repair, say: wait, however long it takes. Nothing is done twice."""
    db = databases.open(name := databases.new())
    start(db)
    add(db, 100)
    assert db._connection is not None
    db._connection.run(b"SET innodb_lock_wait_timeout = 1")
    other = databases.server.connect(name)
    other.run(b"BEGIN; SELECT * FROM obj FOR UPDATE")
    with ThreadPoolExecutor(1) as writer:
        waiting = writer.submit(add, db, 104)
        while "another program locks rows" not in caplog.text:
            assert not waiting.done()
        other.run(b"ROLLBACK")
        waiting.result()
    other.close()
    assert db.history(ZERO_OID, 0, 9) == [(p64(104), 4), (p64(100), 4)]
    assert db._query("SELECT COUNT(*) FROM data") == [(2,)]
    assert db.locked_transactions() == {}


def test_too_long_for_a_column_is_an_error(db: MySQLBackend) -> None:
    """Nothing is cut in silence."""
    db.begin(durable=True)
    copy = Transaction(b"u" * 65536, b"", b"", [], False, p64(100), None)
    db.add_transaction(p64(100), copy)
    with pytest.raises(BackendError, match="Data too long for column 'user'"):
        db.commit()
    db.rollback()


# --- speed ------------------------------------------------------------------------


class Counting:
    """A connection that counts round trips."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.packets: list[bytes] = []

    def select(self, packet: bytes) -> Any:
        self.packets.append(packet)
        return self.connection.select(packet)

    def run(self, packet: bytes) -> Any:
        self.packets.append(packet)
        return self.connection.run(packet)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def take(self) -> int:
        count = len(self.packets)
        self.packets.clear()
        return count


def test_round_trips(db: MySQLBackend) -> None:
    """As many as docs/databases.rst says."""
    text = (Path(__file__).parents[2] / "docs" / "databases.rst").read_text()
    table = dict(re.findall(r"^(\w[^\n]*?)  +(\d+)(?:  .*)?$", text, re.M))
    db.load(ZERO_OID)  # which prepares the queries of this connection
    reader, writer = Counting(db._read_connection), Counting(db._connection)
    db._use(reader)
    db._connection = writer
    found: dict[str, int] = {}

    def objects(first: int, values: int = 100) -> list[Store]:
        return [Store(p64(first + n), None, val(b"%d" % n)) for n in range(values)]

    def group(name: str, *calls: tuple[Any, ...]) -> None:
        db.begin(durable=True)
        for method, *args in calls:
            getattr(db, method)(*args)
        db.commit()
        found[name] = writer.take()

    meta = Metadata(b"u", b"d", b"e", [p64(n) for n in range(100)])
    add(db, 50)  # which learns where data ids start
    writer.take()
    group("vote of 100 objects", ("vote", p64(100), objects(0), meta))
    group("lock", ("lock", p64(100), p64(104), False))
    group("unlock of 100 objects", ("unlock", p64(100), p64(104)))
    group(
        "vote of one object",
        ("vote", p64(108), objects(7, 1), meta),
    )
    group("abort", ("abort", p64(108)))
    votes = [("vote", p64(200 + n), objects(n, 1), meta) for n in range(10)]
    group("10 votes in a group", *votes)
    locks = [("lock", p64(200 + n), p64(300 + n), False) for n in range(10)]
    group("10 locks in a group", *locks)
    unlocks = [("unlock", p64(200 + n), p64(300 + n)) for n in range(10)]
    group("10 unlocks in a group", *unlocks)
    group("group that writes nothing")
    for name, args in (
        ("load of the last revision", {}),
        ("load with a bound", {"before": p64(104)}),
        ("load of a revision", {"at": p64(104)}),
    ):
        assert db.load(p64(1), **args) or args
        found[name] = reader.take()
    assert any(db.load_many([(p64(n), None, p64(999)) for n in range(100)]))
    found["100 loads that come together"] = reader.take()
    assert any(db.load_many([(p64(n), None, p64(300)) for n in range(100)]))
    found["100 loads of the past that come together"] = reader.take()
    assert any(db.load_many([(p64(n), p64(304), None) for n in range(100)]))
    found["100 revisions that an iteration reads"] = reader.take()
    assert any(db.transactions([p64(300 + n) for n in range(100)]))
    found["metadata of 100 transactions"] = reader.take()
    assert db.last_tid_of(p64(1)) is not None
    found["store"] = reader.take()
    assert all(db.last_tids_of([p64(n) for n in range(100)]).values())
    found["100 stores that come together"] = reader.take()
    assert found == {name: int(count) for name, count in table.items() if name in found}
    assert db._query("SELECT COUNT(*) FROM tobj") == [(0,)]


def test_dedup_looks_for_all_values_of_a_vote(databases: Databases) -> None:
    db = databases.open(databases.new(), dedup=True)
    start(db)
    add(db, 100, b"before")
    add(db, 104, b"\x00" * 9)
    writer = Counting(db._connection)
    db._connection = writer
    values = [b"before", *[b"%d" % (n // 2) for n in range(98)], b"before"]
    db.begin(durable=True)
    stores = [Store(p64(n), None, val(value)) for n, value in enumerate(values)]
    db.vote(p64(108), stores, Metadata(b"", b"", b"", []))
    db.commit()
    assert writer.take() == 2
    run(db, "unlock", p64(108), p64(108))
    assert [db.load(p64(n))[4] for n in range(100)] == values
    assert db._query("SELECT COUNT(*) FROM data") == [(2 + 49,)]
    run(db, "vote", p64(112), [Store(p64(0), None, val(b"48"))], None)
    run(db, "abort", p64(112))
    assert db._query("SELECT COUNT(*) FROM data") == [(2 + 49,)]


def test_values_are_sent_in_packets_of_limited_size(db: MySQLBackend) -> None:
    writer = Counting(db._connection)
    db._connection = writer
    values = [b"\\" * 100_000 + b"%d" % n for n in range(30)]
    stores = [Store(p64(n), None, val(value)) for n, value in enumerate(values)]
    run(db, "vote", p64(100), stores, None)
    run(db, "unlock", p64(100), p64(100))
    assert max(map(len, writer.packets)) < mysql.BATCH + 300_000
    for n, value in enumerate(values):
        revision = db.load(p64(n))
        assert revision is not None
        assert revision[4] == value


def test_queries_follow_an_index(databases: Databases) -> None:
    """With many rows, and statistics that are wrong: those of the empty tables."""
    db = databases.open()
    start(db)
    db.begin(durable=False)
    for tid in range(100, 130):
        stores = [Store(p64(oid), None, val(b"%d" % oid)) for oid in range(100)]
        db.vote(p64(tid), stores, Metadata(b"", b"", b"", []))
        db.unlock(p64(tid), p64(tid))
    db.commit()
    reader, writer = Counting(db._read_connection), Counting(db._connection)
    db._use(reader)
    db._connection = writer
    db._batch = 0  # a statement in each packet
    execute_all(db, 129)
    small = {"config", "pt", "pack", "ttrans", "tobj", "todel"}
    checked = 0
    for packet in [*map(executed, reader.packets), *writer.packets]:
        if packet.split()[0] not in (b"SELECT", b"DELETE", b"UPDATE", b"INSERT"):
            continue
        for row in db._read_connection.select(b"EXPLAIN " + packet):
            table, kind, extra = row[2], row[3], row[9] or b""
            if table is None or table.decode().strip("<>0123456789") == "derived":
                continue
            if table.decode() in small or kind is None or b"INTO" in packet[:20]:
                continue
            assert kind not in (b"ALL", b"index"), (packet[:300], row)
            assert b"filesort" not in extra or b"AS last" in packet, (packet[:300], row)
            checked += 1
    db.rollback()
    assert checked > 30


def test_many_loads_read_no_histories(databases: Databases) -> None:
    """However many revisions an object has, one is looked for."""
    db = databases.open(databases.new())
    start(db)
    add(db, 100)
    db.begin(durable=False)
    rows = [(0, 0, tid, 0, None) for tid in range(200, 20000)]
    db.execute_many("INSERT INTO obj VALUES (?, ?, ?, ?, ?)", rows)
    db.commit()

    def rows_read() -> int:
        status = db._query("SHOW SESSION STATUS LIKE 'Handler_read%'")
        return sum(int(count) for _, count in status)

    db.load(ZERO_OID)
    wanted = [(p64(n), None, p64(10000)) for n in range(30)]
    before = rows_read()
    base = rows_read() - before
    found = db.load_many(wanted)
    assert found[0] is not None
    assert found[0][:2] == (p64(9999), p64(10000))
    assert found[1:] == [None] * 29
    assert db.load(ZERO_OID, before=p64(10000)) == found[0]
    assert db.load(ZERO_OID, at=p64(9999)) == found[0]
    assert db.last_tids_of([p64(n) for n in range(30)])[ZERO_OID] == p64(19999)
    assert rows_read() - before < 500 + 2 * base


def executed(packet: bytes) -> bytes:
    """The query of which this is one, if it was prepared."""
    if not packet.startswith(b"EXECUTE"):
        return packet
    _, name, _, args = packet.split(maxsplit=3)
    marks = args.split(b", ")
    sql = mysql_driver.preparing("x", MySQLBackend.LOADS[name.decode()])
    *texts, last = sql.partition(b"FROM ")[2].strip(b"'").split(b"?")
    return b"".join(map(b"".join, zip(texts, marks, strict=True))) + last


def test_config_is_text(db: MySQLBackend) -> None:
    found = decode_config(db._query("SELECT name, value FROM config"))
    assert found == {"version": "4", "nid": "1", "ptid": "1", "replicas": "0"}
