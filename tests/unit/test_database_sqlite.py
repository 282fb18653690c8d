"""What is peculiar to SQLite: files, locks, durability, query plans."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha1
from pathlib import Path
from random import Random  # noqa: TID251  # seeded
from typing import Any

import pytest

from neo.lib.exception import BackendError, ConfigurationError, DatabaseLocked
from neo.lib.protocol import ZERO_OID, CellState
from neo.lib.util import Pieces, p64
from neo.storage.database import open_backend, sqlite
from neo.storage.database.interface import Backend, Metadata, Store
from neo.storage.database.memory import MemoryBackend
from neo.storage.database.sqlite import Location, SQLiteBackend, parse_location
from tests.unit.database_queries import execute_all


def noise(size: int) -> bytes:
    return Random(size).randbytes(size)


def start(db: Backend) -> None:
    db.begin(durable=True)
    db.set_nid(1)
    db.change_partition_table(1, 0, [(0, 1, CellState.UP_TO_DATE)], reset=True)
    db.commit()


def add(db: Backend, tid: int, data: bytes = b"data", durable: bool = True) -> None:
    stores = [Store(ZERO_OID, None, (sha1(data).digest(), data, 0))]
    db.begin(durable)
    db.vote(p64(tid), stores, Metadata(b"", b"", b"", [ZERO_OID]))
    db.lock(p64(tid), p64(tid), False)
    db.unlock(p64(tid), p64(tid))
    db.commit()


# --- big values -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["wal", "delete"])
@pytest.mark.parametrize(
    "size", [sqlite.BIG - 1, sqlite.BIG, sqlite.BIG + 1, 5 * sqlite.PIECE, 1 << 20]
)
def test_big_value(tmp_path: Path, mode: str, size: int) -> None:
    db = open_backend("SQLite", f"file:{tmp_path}/db?journal_mode={mode}")
    start(db)
    data = noise(size)
    add(db, 5, data)
    value = 0, sha1(data).digest()
    assert db.load(ZERO_OID) == (p64(5), None, *value, data, None)
    assert db.background.load(ZERO_OID) == (p64(5), None, *value, data, None)
    streamed = db.load_many([(ZERO_OID, None, p64(6))] * 20)[3]
    assert streamed is not None
    found = streamed[4]
    if mode == "wal" and size > sqlite.BIG:
        assert isinstance(found, Pieces)
        assert found.size == size
        found = b"".join(found.parts)
    assert streamed[:4] == (p64(5), None, *value)
    assert found == data
    db.close()


@pytest.mark.parametrize("damage", ["12345", f"zeroblob({1 << 17})", "'text'"])
def test_big_value_that_is_damaged(tmp_path: Path, damage: str) -> None:
    """It is read, so that its checksum tells."""
    db = open_backend("SQLite", f"{tmp_path}/db")
    start(db)
    add(db, 5, noise(1 << 17))
    db.begin(False)
    db.execute(f"UPDATE data SET value = {damage}")  # type: ignore[attr-defined]
    db.commit()
    found = db.load(ZERO_OID)
    assert found is not None
    assert sha1(found[4]).digest() != found[3]
    db.close()


@pytest.mark.parametrize("tid", ["-9", "'text'"])
def test_damaged_partition_table(tmp_path: Path, tid: str) -> None:
    db = open_backend("SQLite", f"{tmp_path}/db")
    start(db)
    db.begin(False)
    db.execute(f"UPDATE pt SET tid = {tid}")  # type: ignore[attr-defined]
    db.commit()
    with pytest.raises(BackendError, match="partition table is damaged"):
        db.partition_table()
    with pytest.raises(BackendError, match="partition table is damaged"):
        db.own_cells()
    db.close()


# --- connection strings -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("db.sqlite", Location("db.sqlite", {}, False)),
        ("a?b%20c", Location("a?b%20c", {}, False)),
        ("~/db", Location(str(Path("~/db").expanduser()), {}, False)),
        ("file:~/a%20b", Location("~/a%20b", {}, False)),
        (
            "file:x?synchronous=OFF&cache_size=-9&journal_mode=wal",
            Location(
                "x",
                {"synchronous": "OFF", "cache_size": "-9", "journal_mode": "wal"},
                False,
            ),
        ),
        ("file:x?cksumvfs=1", Location("x", {}, True)),
        ("file:x?cksumvfs=0", Location("x", {}, False)),
    ],
)
def test_connection_string(text: str, location: Location) -> None:
    found = parse_location(text)
    assert found == location
    assert [*found.pragmas] == [*location.pragmas]


@pytest.mark.parametrize(
    "text",
    [
        "file:",
        "file:?synchronous=OFF",
        "file:x?",
        "file:x?synchronous",
        "file:x?synchronous=",
        "file:x?synchronous=1&synchronous=1",
        "file:x?page_size=512",
        "file:x?synchronous=1;DROP",
        "file:x?cksumvfs=2",
        "file:x?cache_size=1&",
    ],
)
def test_invalid_connection_string(text: str) -> None:
    with pytest.raises(ConfigurationError, match="invalid"):
        open_backend("SQLite", text)


def test_adapter(tmp_path: Path) -> None:
    db = open_backend("SQLite", str(tmp_path / "db"), dedup=True)
    assert db.dedup
    assert db.device == tmp_path.stat().st_dev
    db.close()
    with pytest.raises(ConfigurationError, match="not available"):
        open_backend("Oracle", "")


# --- opening and closing ----------------------------------------------------------


def test_clean_close_leaves_one_file(tmp_path: Path) -> None:
    db = SQLiteBackend(str(tmp_path / "db"))
    start(db)
    add(db, 100)
    assert {"db", "db-wal", "db-shm"} <= {p.name for p in tmp_path.iterdir()}
    db.close()
    db.close()
    assert {p.name for p in tmp_path.iterdir()} == {"db", "db.lock"}
    db = SQLiteBackend(str(tmp_path / "db"))
    assert db.load(ZERO_OID) is not None
    db.close()


def test_other_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "db"
    code = (
        "import sys; from neo.storage.database import open_backend\n"
        "try: open_backend('SQLite', sys.argv[1])\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )

    def other() -> str:
        command = [sys.executable, "-c", code, str(path)]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()

    db = SQLiteBackend(str(path))
    with pytest.raises(DatabaseLocked, match=r"^database is locked$"):
        SQLiteBackend(str(path))
    assert other() == "DatabaseLocked database is locked"
    start(db)  # the refusals released none of its locks
    assert other() == "DatabaseLocked database is locked"
    db.close()
    assert other() == ""


def test_lock_file_counts_alone(tmp_path: Path) -> None:
    """A hard link on another host has no abstract socket in common."""
    path = tmp_path / "db"
    lock = sqlite.LockFile(f"{path}.lock")
    with pytest.raises(DatabaseLocked):
        SQLiteBackend(str(path))
    lock.close()
    SQLiteBackend(str(path)).close()


def test_file_that_can_not_be_locked(tmp_path: Path) -> None:
    path = tmp_path / "db"
    Path(f"{path}.lock").mkdir()
    with pytest.raises(ConfigurationError, match="can not lock"):
        SQLiteBackend(str(path))


@pytest.mark.parametrize("content", [b"x" * 5000, b"not a database, but text" * 9])
def test_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "db"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="can not open"):
        SQLiteBackend(str(path))
    assert path.read_bytes() == content


@pytest.mark.parametrize("table", ["data", "log"])
def test_other_database_is_refused(tmp_path: Path, table: str) -> None:
    path = tmp_path / "db"
    connection = sqlite3.connect(path)
    connection.execute(f"CREATE TABLE {table} (x)")
    connection.commit()
    connection.close()
    with pytest.raises(ConfigurationError, match="not a database of NEO"):
        SQLiteBackend(str(path))


def test_path_that_can_not_be_opened(tmp_path: Path) -> None:
    for path in tmp_path, tmp_path / "missing" / "db":
        with pytest.raises(ConfigurationError, match=f"can not open '{path}'"):
            SQLiteBackend(str(path))


def test_tables_are_those_of_the_format() -> None:
    db = MemoryBackend(dedup=True)
    sql = dict(db._query("SELECT name, sql FROM sqlite_master ORDER BY rowid"))
    db.close()
    obj = "partition INTEGER NOT NULL, oid INTEGER NOT NULL, tid INTEGER NOT NULL,"
    obj += " data_id INTEGER, value_tid INTEGER, PRIMARY KEY "
    trans = "packed BOOLEAN NOT NULL, oids BLOB NOT NULL, user BLOB NOT NULL,"
    trans += " description BLOB NOT NULL, ext BLOB NOT NULL, ttid INTEGER NOT NULL"
    assert sql == {
        "config": "CREATE TABLE config (name TEXT NOT NULL, value TEXT,"
        " PRIMARY KEY (name)) WITHOUT ROWID",
        "pt": "CREATE TABLE pt (partition INTEGER NOT NULL, nid INTEGER NOT NULL,"
        " tid INTEGER NOT NULL, pack INTEGER, PRIMARY KEY (partition, nid))"
        " WITHOUT ROWID",
        "pack": "CREATE TABLE pack (tid INTEGER PRIMARY KEY, approved BOOLEAN,"
        " partial BOOLEAN NOT NULL, oids BLOB, pack_tid INTEGER)",
        "trans": "CREATE TABLE trans (partition INTEGER NOT NULL,"
        f" tid INTEGER NOT NULL, {trans}, PRIMARY KEY (partition, tid)) WITHOUT ROWID",
        "obj": f"CREATE TABLE obj ({obj}(partition, oid, tid)) WITHOUT ROWID",
        "_obj_i1": "CREATE INDEX _obj_i1 ON obj(partition, tid, oid)",
        "_obj_i2": "CREATE INDEX _obj_i2 ON obj(data_id)",
        "data": "CREATE TABLE data (id INTEGER PRIMARY KEY, hash BLOB NOT NULL,"
        " compression INTEGER NOT NULL, value BLOB NOT NULL)",
        "ttrans": "CREATE TABLE ttrans (partition INTEGER NOT NULL, tid INTEGER,"
        f" {trans})",
        "tobj": f"CREATE TABLE tobj ({obj}(tid, oid)) WITHOUT ROWID",
        "_data_i1": "CREATE UNIQUE INDEX _data_i1 ON data(hash, compression)",
    }


# --- durability -------------------------------------------------------------------


def synchronous(db: SQLiteBackend) -> int:
    return int(db._connection.execute("PRAGMA synchronous").fetchone()[0])


def test_durable_commits_are_synchronous(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    db = SQLiteBackend(str(tmp_path / "db"))
    start(db)
    for durable in (True, True, False, False, True):
        add(db, 100 + db._write.connection.total_changes, durable=durable)
        assert synchronous(db) == 1 + durable
    db.close()
    assert not caplog.records


@pytest.mark.parametrize(
    ("query", "level", "warning"),
    [
        ("synchronous=OFF", 0, "synchronous=OFF: commits may be lost"),
        ("synchronous=1", 1, "synchronous=1: commits may be lost"),
        ("synchronous=EXTRA", 3, None),
        ("synchronous=FULL&journal_mode=wal", 2, None),
        ("journal_mode=delete", 3, "journal mode 'delete' instead of 'wal'"),
        ("journal_mode=OFF", 3, "journal mode 'off': a crash may damage"),
        ("journal_mode=truncate&synchronous=0", 0, "reads wait for commits"),
        ("cache_size=100", 2, None),
    ],
)
def test_pragmas_are_obeyed(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    query: str,
    level: int,
    warning: str | None,
) -> None:
    db = SQLiteBackend(f"file:{tmp_path}/db?{query}")
    start(db)
    for tid in range(100, 103):
        add(db, tid, durable=True)
        assert synchronous(db) == level
    assert db.load(ZERO_OID) is not None
    if "cache" in query:
        for connection in db._connection, db._read_connection:
            assert connection.execute("PRAGMA cache_size").fetchone() == (100,)
    db.close()
    assert caplog.record_tuples or not warning
    assert all(level == logging.WARNING for _, level, _ in caplog.record_tuples)
    if warning:
        assert warning in caplog.text
    else:
        assert not caplog.records


def test_readers_do_not_wait_for_the_writer(tmp_path: Path) -> None:
    db = SQLiteBackend(str(tmp_path / "db"))
    start(db)
    add(db, 100)
    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as other:
        writer.submit(db.begin, True).result()
        stores = [Store(ZERO_OID, None, None)]
        writer.submit(db.vote, p64(101), stores, None).result()
        writer.submit(db.unlock, p64(101), p64(101)).result()
        assert db.last_tid_of(ZERO_OID) == p64(100)
        seen = other.submit(db.background.last_tid_of, ZERO_OID)
        assert seen.result() == p64(100)
        writer.submit(db.commit).result()
        assert db.last_tid_of(ZERO_OID) == p64(101)
        assert other.submit(db.background.load, ZERO_OID).result() == db.load(ZERO_OID)
        other.submit(db.checkpoint).result()
    db.close()


def test_readers_of_one_connection_wait(tmp_path: Path) -> None:
    db = SQLiteBackend(f"file:{tmp_path}/db?journal_mode=delete")
    start(db)
    add(db, 100)
    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as other:
        writer.submit(db.begin, True).result()
        writer.submit(db.vote, p64(101), [Store(ZERO_OID, None, None)], None).result()
        writer.submit(db.unlock, p64(101), p64(101)).result()
        waiting = other.submit(db.last_tid_of, ZERO_OID)
        writer.submit(db.commit).result()
        assert waiting.result() == p64(101)
    db.close()


def test_no_shared_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where WAL can't be used, SQLite keeps the journal mode it has."""
    connect = sqlite3.connect

    def without(path: str, **options: Any) -> sqlite3.Connection:
        uri = f"file:{path}?vfs=unix-none"  # which has no shared memory
        return connect(uri, **{**options, "uri": True})

    monkeypatch.setattr(sqlite.sqlite3, "connect", without)
    db = SQLiteBackend(str(tmp_path / "db"))
    assert "journal mode 'delete' instead of 'wal'" in caplog.text
    start(db)
    add(db, 100)
    assert db.background.load(ZERO_OID) == db.load(ZERO_OID) is not None
    assert not db.wants_checkpoint
    db.checkpoint()
    db.close()


def test_checkpoint(tmp_path: Path) -> None:
    db = SQLiteBackend(str(tmp_path / "db"))
    start(db)
    add(db, 100, noise(1 << 20))
    assert not db.wants_checkpoint
    tid = 100
    while not db.wants_checkpoint:
        tid += 1
        add(db, tid, noise(1 << 20))
    assert 3 << 20 < (tmp_path / "db-wal").stat().st_size < 7 << 20
    db.checkpoint()
    assert not db.wants_checkpoint
    size = (tmp_path / "db-wal").stat().st_size
    for n in range(1, 4):
        add(db, tid + n, noise(1 << 20))
    assert (tmp_path / "db-wal").stat().st_size == size  # the log was restarted
    db.close()


def test_log_is_bounded_without_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "LOG_PAGES_MAX", 1000)
    db = SQLiteBackend(str(tmp_path / "db"))
    start(db)
    for tid in range(100, 130):
        add(db, tid, noise(1 << 20))
    assert (tmp_path / "db-wal").stat().st_size < 7 << 20
    db.close()


def test_another_program_locks_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A backup with the sqlite3 shell, say: wait, however long it takes."""
    monkeypatch.setattr(sqlite, "BUSY_S", 0.01)
    path = tmp_path / "db"
    db = SQLiteBackend(f"file:{path}?journal_mode=delete")
    start(db)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    with ThreadPoolExecutor(1) as writer:
        waiting = writer.submit(add, db, 100)
        while "another program locks" not in caplog.text:
            assert not waiting.done()
        other.execute("COMMIT")
        waiting.result()
        caplog.clear()
        other.execute("BEGIN EXCLUSIVE")
        read = writer.submit(db.load, ZERO_OID)
        while "another program locks" not in caplog.text:
            assert not read.done()
        other.execute("COMMIT")
        assert read.result() is not None
    other.close()
    db.close()


def test_full_disk_is_a_backend_error(tmp_path: Path) -> None:
    db = SQLiteBackend(str(tmp_path / "db"))
    start(db)
    add(db, 100)
    pages = db._connection.execute("PRAGMA page_count").fetchone()[0]
    db._connection.execute(f"PRAGMA max_page_count={pages}")
    db.begin(durable=True)
    with pytest.raises(BackendError, match="full"):
        db.spill(ZERO_OID, (b"", bytes(100000), 0))
    db.rollback()
    assert db.load(ZERO_OID) is not None
    db.close()
    db = SQLiteBackend(str(tmp_path / "db"))
    add(db, 101, bytes(100000))
    db.close()


def test_damaged_file_is_a_backend_error(tmp_path: Path) -> None:
    path = tmp_path / "db"
    db = SQLiteBackend(str(path))
    start(db)
    for tid in range(100, 200):
        add(db, tid, noise(5000), durable=False)
    db.close()
    size = path.stat().st_size
    with path.open("r+b") as f:
        f.seek(4096 * 20)
        f.write(noise(size - 4096 * 20))
    with pytest.raises(BackendError, match=r"SQLite database .*db: "):  # noqa: PT012  # where, varies
        db = SQLiteBackend(str(path))
        for tid in range(100, 200):
            db.load(ZERO_OID, at=p64(tid))
    db.close()


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_file_with_reserved_bytes(tmp_path: Path, page_size: int) -> None:
    """What the checksum VFS needs can be prepared without it."""
    path = tmp_path / "db"
    path.write_bytes(sqlite.empty_file(8))
    db = SQLiteBackend(str(path))
    start(db)
    for tid in range(100, 200):
        add(db, tid, noise(page_size), durable=False)
    assert db._query("PRAGMA integrity_check") == [("ok",)]
    db.close()
    assert path.read_bytes()[20] == 8


def test_checksum_extension_is_required(tmp_path: Path) -> None:
    loader = sqlite3.connect(":memory:")
    try:
        loader.enable_load_extension(True)
        loader.load_extension("cksumvfs")
    except (AttributeError, sqlite3.Error):
        with pytest.raises(ConfigurationError, match="can not load the extension"):
            SQLiteBackend(f"file:{tmp_path}/db?cksumvfs=1")
    else:
        db = SQLiteBackend(f"file:{tmp_path}/db?cksumvfs=1")
        start(db)
        add(db, 100)
        db.close()
    finally:
        loader.close()


def test_memory_image_of_a_file_in_wal_mode(tmp_path: Path) -> None:
    path = tmp_path / "db"
    db = SQLiteBackend(str(path))
    start(db)
    add(db, 100)
    db.close()
    memory = MemoryBackend(path.read_bytes())
    assert memory.load(ZERO_OID) is not None
    memory.close()


# --- speed ------------------------------------------------------------------------


def test_queries_follow_an_index() -> None:
    """No table that grows with the data is scanned, nothing of it is sorted."""
    db = MemoryBackend()
    start(db)
    queries: dict[str, None] = {}
    db._connection.set_trace_callback(lambda sql: queries.setdefault(sql))
    add(db, 100)
    execute_all(db, 100)
    db.commit()
    db._connection.set_trace_callback(None)
    checked = 0
    for sql in queries:
        if sql.split()[0] not in ("SELECT", "DELETE", "UPDATE", "INSERT", "REPLACE"):
            continue
        plan = [row[3] for row in db._query(f"EXPLAIN QUERY PLAN {sql}")]
        for step in plan:
            if "AS last" in sql and "ORDER BY" in step:
                continue  # the few rows of a slice, in order already
            assert "TEMP B-TREE" not in step, (sql, plan)
            scanned = step.partition("SCAN ")[2]
            assert scanned in ("", "config", "pt", "ttrans", "pack", "last"), (
                sql,
                plan,
            )
        checked += 1
    assert checked > 30
    db.close()


# --- migration --------------------------------------------------------------------

SAMPLES = Path(__file__).parent.parent / "samples"


def altered(sample: str, sql: str) -> bytes:
    """Content of a sample after some SQL."""
    connection = sqlite3.connect(":memory:")
    connection.deserialize((SAMPLES / f"{sample}.sqlite").read_bytes())
    connection.executescript(sql)
    image = connection.serialize()
    connection.close()
    return image


def test_migration_without_nid() -> None:
    """Created but never joined a cluster: neoppod fails (19, item 10)."""
    db = MemoryBackend(altered("e-v3", "DELETE FROM config WHERE name = 'nid'"))
    assert db.settings().nid is None
    assert {pack for (pack,) in db._query("SELECT pack FROM pt")} == {None}
    assert db._query("SELECT value FROM config WHERE name = 'version'") == [("4",)]
    db.close()


@pytest.mark.parametrize("table", ["ttrans", "tobj"])
def test_unfinished_transactions_of_an_old_version(table: str) -> None:
    source = {"ttrans": "trans", "tobj": "obj"}[table]
    sql = f"INSERT INTO {table} SELECT * FROM {source} LIMIT 1"
    with pytest.raises(ConfigurationError, match="unfinished transactions"):
        MemoryBackend(altered("e-v0", sql))


@pytest.mark.parametrize(
    "sql",
    [
        # stopped while obj was copied, before and after the old one was dropped
        "CREATE TABLE new_obj (x)",
        "ALTER TABLE obj RENAME TO new_obj",
        "DROP TABLE ttrans; UPDATE config SET value = '0' WHERE name = 'version'",
        "INSERT INTO config VALUES ('version', '1')",
        "CREATE TABLE new_pt AS SELECT partition, nid, tid, NULL AS pack FROM pt;"
        " DROP TABLE pt",
    ],
)
def test_interrupted_migration_goes_on(sql: str) -> None:
    """Where DDL is not transactional, a migration stops anywhere."""
    sample = "e-v3" if "new_pt" in sql else "e-v0"
    whole = MemoryBackend((SAMPLES / f"{sample}.sqlite").read_bytes())
    db = MemoryBackend(altered(sample, sql))
    for table in "config", "pt", "obj", "trans", "data":
        query = f"SELECT * FROM {table}"
        assert db._query(query) == whole._query(query), table
    names = "SELECT name FROM sqlite_master WHERE name LIKE 'new%'"
    assert db._query(names) == []
    whole.close()
    db.close()


def test_missing_tables_are_created() -> None:
    """With a version, as where DDL is not transactional."""
    db = MemoryBackend(altered("a-dedup", "DROP TABLE tobj; DROP INDEX _obj_i2"))
    new = MemoryBackend(dedup=True)
    names = "SELECT name FROM sqlite_master ORDER BY name"
    assert db._query(names) == [
        row for row in new._query(names) if "autoindex" not in row[0]
    ]
    new.close()
    db.close()
