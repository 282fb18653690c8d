"""Databases written by neoppod open, and give exactly the content of their JSON.

`tests/samples/README.md` says how they were made and what the JSON means.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from neo.lib.exception import ConfigurationError
from neo.lib.protocol import MAX_TID, READABLE, ZERO_OID, ZERO_TID
from neo.lib.util import add64, p64
from neo.storage.database import open_backend, schema
from neo.storage.database.interface import Backend
from neo.storage.database.memory import MemoryBackend
from neo.storage.database.reader import decode_config
from neo.storage.database.sqlite import SQLiteBackend
from tests import mariadb

SAMPLES = Path(__file__).parent.parent / "samples"
CLUSTERS = [f"c{step}" for step in range(1, 5)]
ONE_NODE = [
    ("a-dedup", "a-dedup"),
    ("a-nodedup", "a-nodedup"),
    ("b-crash", "b-crash"),
    ("b-recovered", "b-recovered"),
    ("d0-before-pack", "d0-before-pack"),
    ("d1-full-pack", "d1-full-pack"),
    ("d2-partial-pack", "d2-partial-pack"),
    ("d3-unsigned-pack", "d3-unsigned-pack"),
    ("d4-pack-locked-crash", "d4-pack-locked-crash"),
    ("e-v0", "a-dedup"),
    ("e-v3", "a-nodedup"),
]
CASES = [pytest.param(name, content, None, id=name) for name, content in ONE_NODE] + [
    pytest.param(f"{name}-s{nid}", name, nid, id=f"{name}-s{nid}")
    for name in CLUSTERS
    for nid in (1, 2, 3)
]


@cache
def expected(name: str, nid: int | None = None) -> dict[str, Any]:
    content = json.loads((SAMPLES / f"{name}.json").read_text())
    return content if nid is None else content["nodes"][str(nid)]


def hexa(value: bytes | None) -> str | None:
    return None if value is None else value.hex()


@pytest.fixture(params=["file", "memory", "MariaDB"])
def open_sample(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    backends: list[Backend] = []
    server: mariadb.Server | None = None
    databases: list[str] = []
    if request.param == "MariaDB":
        mariadb.require()
        server = request.getfixturevalue("mariadb")

    def open_sample(name: str) -> Backend:
        source = SAMPLES / f"{name}.sqlite"
        backend: Backend
        if server is not None:
            database = server.new_database()
            databases.append(database)
            fill(server, database, name)
            backend = open_backend("MySQL", server.url(database))
        elif request.param == "memory":
            backend = MemoryBackend(source.read_bytes())
        else:
            path = tmp_path / source.name
            shutil.copyfile(source, path)
            backend = SQLiteBackend(str(path))
        backends.append(backend)
        return backend

    yield open_sample
    for backend in backends:
        backend.close()
    for database in databases:
        assert server is not None
        server.execute(f"DROP DATABASE {database}")


def fill(server: mariadb.Server, database: str, name: str) -> None:
    """Make a sample: from MariaDB's own, or with the rows of SQLite's."""
    # Older versions of MariaDB's tables: see test_database_mysql.py.
    name = {"e-v0": "a-dedup", "e-v3": "a-nodedup"}.get(name, name)
    sql = SAMPLES / f"{name}.mariadb.sql"
    if sql.exists():
        server.execute_file(database, sql)
        return
    source = sqlite3.connect(SAMPLES / f"{name}.sqlite")
    dedup = bool(source.execute("PRAGMA index_list(data)").fetchall())
    open_backend("MySQL", server.url(database), dedup=dedup).close()
    image = {
        table: (f"DELETE FROM {table}", source.execute(f"SELECT * FROM {table}"))
        for (table,) in source.execute("SELECT name FROM sqlite_master WHERE sql > ''")
        if not table.startswith("_")
    }
    server.restore(database, {t: (sql, [*rows]) for t, (sql, rows) in image.items()})
    source.close()


def rows(db: Backend, sql: str) -> list[tuple[Any, ...]]:
    return db._query(sql)


def content_of(db: Backend, like: dict[str, Any]) -> dict[str, Any]:
    """What the JSON of a sample has, with the keys of `like` that are content."""
    partitions = sorted({partition for partition, _, _ in db.partition_table()})
    own = db.own_cells()
    readable = [p for p, cell in own.items() if cell.state in READABLE]
    last_tid, last_oid, first_tid = db.last_ids(readable)
    content = {
        "config": decode_config(rows(db, "SELECT name, value FROM config")),
        "partitions": len(partitions),
        "partition_table_raw": [
            dict(zip(("partition", "nid", "tid", "pack"), row, strict=True))
            for row in rows(db, "SELECT * FROM pt ORDER BY partition, nid")
        ],
        "partition_table": [[p, nid, str(s)] for p, nid, s in db.partition_table()],
        "readable": readable,
        "first_tid": hexa(first_tid),
        "last_tid": hexa(last_tid),
        "last_oid": hexa(last_oid),
        "unfinished": {
            ttid.hex(): hexa(tid) for ttid, tid in db.locked_transactions().items()
        },
        "transactions": transactions(db, own),
        "object_revisions": revisions(db, own),
        "current_oids": current_oids(db, own),
        "history": {
            oid: [[tid.hex(), size] for tid, size in history]
            for oid in like["history"]
            if (history := db.history(bytes.fromhex(oid), 0, 1000))
        },
        "checksums": checksums(db, own),
    }
    if "undo_vectors" in like:
        content["undo_vectors"] = undo_vectors(db, like["undo_vectors"])
    if "pack_orders" in like:
        content["pack_orders"] = raw(db, "pack")
    return content


def raw(db: Backend, table: str) -> dict[str, Any]:
    (declared,) = (t for t in schema.TABLES if t.name == table)
    names = [column.name for column in declared.columns]
    return {
        "columns": names,
        "rows": [
            [f"x:{v.hex()}" if isinstance(v, bytes) else v for v in row]
            for row in rows(db, f"SELECT * FROM {table}")
        ],
    }


def transactions(db: Backend, own: dict[int, Any]) -> list[dict[str, Any]]:
    result = []
    for partition in own:
        for tid in db.tids_from(partition, ZERO_TID, MAX_TID, 1000):
            t = db.transaction(tid)
            assert t is not None
            assert db.final_tid(t.ttid) == tid
            result.append(
                {
                    "tid": tid.hex(),
                    "partition": partition,
                    "oids": [oid.hex() for oid in t.oids],
                    "user": t.user.hex(),
                    "description": t.description.hex(),
                    "ext": t.extension.hex(),
                    "packed": t.packed,
                    "ttid": t.ttid.hex(),
                    "pack": t.pack
                    and {
                        "approved": t.pack.approved,
                        "partial": t.pack.partial,
                        "oids": t.pack.oids and [oid.hex() for oid in t.pack.oids],
                        "pack_tid": t.pack.pack_tid.hex(),
                    },
                }
            )
    return sorted(result, key=lambda t: t["tid"])


def revisions(db: Backend, own: dict[int, Any]) -> list[dict[str, Any]]:
    result = []
    for partition in own:
        for tid, oid in db.object_keys(partition, 1000, ZERO_TID, MAX_TID, ZERO_OID):
            revision = db.load(oid, at=tid)
            assert revision is not None
            assert revision == db.load(oid, before=add64(tid, 1))
            if revision[1] is None:
                assert revision == db.load(oid)
            at, next_tid, compression, checksum, data, value_tid = revision
            assert at == tid
            none = compression is None
            result.append(
                {
                    "oid": oid.hex(),
                    "tid": tid.hex(),
                    "partition": partition,
                    "compression": compression,
                    "hash": None if none else checksum.hex(),
                    "data": None if none else data.hex(),
                    "value_tid": hexa(value_tid),
                    "next_tid": hexa(next_tid),
                }
            )
    return sorted(result, key=lambda r: (r["tid"], r["oid"]))


def current_oids(db: Backend, own: dict[int, Any]) -> dict[str, str | None]:
    result = {}
    for partition in own:
        min_oid: bytes | None = ZERO_OID
        while min_oid is not None:
            oids, min_oid = db.oids_from(partition, 2, min_oid, MAX_TID)
            result.update({oid.hex(): hexa(db.last_tid_of(oid)) for oid in oids})
    return result


def checksums(db: Backend, own: dict[int, Any]) -> list[dict[str, Any]]:
    result = []
    for partition in own:
        count, digest, last = db.check_tid_range(partition, 1000, ZERO_TID, MAX_TID)
        serials = db.check_serial_range(partition, 1000, ZERO_TID, MAX_TID, ZERO_OID)
        result.append(
            {
                "partition": partition,
                "tid_range": [count, digest.hex(), last.hex()],
                "serial_range": [serials[0], *(item.hex() for item in serials[1:])],
            }
        )
    return result


def undo_vectors(db: Backend, like: dict[str, Any]) -> dict[str, Any]:
    ltid = bytes.fromhex(like["ltid"])
    vectors = []
    for tid, oid, _ in like["vectors"]:
        number = bytes.fromhex(oid)
        serials = db.undo_serials(bytes.fromhex(tid), ltid, [number], {})
        assert serials is not None
        result = serials.get(number)
        vectors.append(
            [tid, oid, result and [result[0].hex(), hexa(result[1]), result[2]]]
        )
    return {"ltid": like["ltid"], "vectors": vectors}


def check(db: Backend, like: dict[str, Any]) -> None:
    found = content_of(db, like)
    for key, value in found.items():
        assert value == like[key], key


@pytest.mark.parametrize(("name", "content", "nid"), CASES)
def test_content(open_sample: Any, name: str, content: str, nid: int | None) -> None:
    check(open_sample(name), expected(content, nid))


@pytest.mark.parametrize("dedup", ["a-dedup", "b-crash", "e-v0"])
def test_dedup_is_recognized(open_sample: Any, dedup: str) -> None:
    assert open_sample(dedup).dedup
    assert not open_sample("a-nodedup").dedup


def finish(db: Backend) -> None:
    """Verification: validate what is locked, drop all else."""
    for ttid, tid in db.locked_transactions().items():
        if tid is not None:
            db.begin(durable=True)
            db.validate(ttid, tid)
            db.commit()
    db.begin(durable=True)
    db.drop_unfinished()
    db.commit()


def test_crash_is_recovered(open_sample: Any) -> None:
    """The locked transaction is committed, the voted one vanishes with its data."""
    db = open_sample("b-crash")
    references = expected("b-crash")["volatile_data_refcounts_by_hash"]
    hash_by_id = dict(rows(db, "SELECT id, hash FROM data"))
    assert {
        hash_by_id[data_id].hex(): count for data_id, count in db._references.items()
    } == references
    finish(db)
    assert not db._references
    check(db, expected("b-recovered"))
    recovered = open_sample("b-recovered")
    for table in "data", "obj", "trans", "tobj", "ttrans", "pack":
        sql = f"SELECT * FROM {table}"
        assert sorted(rows(db, sql)) == sorted(rows(recovered, sql)), table


def test_recovered_pack_order_stays_unsigned(open_sample: Any) -> None:
    """neoppod approves it, though an older one waits (19, item 3)."""
    like = expected("d4-pack-locked-crash")
    db = open_sample("d4-pack-locked-crash")
    orders = [pack_id.hex() for pack_id, _ in db.pack_orders(ZERO_TID, range(3))]
    assert like["ttrans"]  # the fourth row of `pack`: not committed yet
    assert len(orders) == len(like["pack_orders"]["rows"]) - 1
    finish(db)
    after = json.loads(json.dumps(like["after_recovery_by_reference"]))
    tid = after["last_tid"]
    (transaction,) = (t for t in after["transactions"] if t["tid"] == tid)
    assert transaction["pack"]["approved"] is True
    transaction["pack"]["approved"] = None
    after["pack_orders"]["rows"][-1][1] = None
    check(db, after)


def pack(db: Backend, order: list[Any], length: int) -> None:
    """Execute a raw row of `pack`, in slices."""
    oids = None
    if order[2]:
        packed = bytes.fromhex(order[3].removeprefix("x:"))
        oids = [packed[i : i + 8] for i in range(0, len(packed), 8)]
    for partition in range(3):
        min_oid: bytes | None = ZERO_OID
        while min_oid is not None:
            db.begin(durable=False)
            min_oid = db.pack_partition(partition, p64(order[4]), min_oid, length, oids)
            db.commit()
    assert not rows(
        db,
        "SELECT id FROM data WHERE id NOT IN"
        " (SELECT data_id FROM obj WHERE data_id IS NOT NULL)",
    )


@pytest.mark.parametrize("length", [1, 2, 100])
def test_full_pack(open_sample: Any, length: int) -> None:
    """Packing as neoppod did leaves what neoppod left."""
    db, like = open_sample("d0-before-pack"), expected("d1-full-pack")
    pack(db, like["pack_orders"]["rows"][-1], length)
    found = content_of(db, like)
    for key in "object_revisions", "history", "current_oids":
        assert found[key] == like[key], key


@pytest.mark.parametrize("length", [1, 2, 100])
def test_partial_pack(open_sample: Any, length: int) -> None:
    """A partial order removes old revisions of its oids only, and but once."""
    like = expected("d2-partial-pack")
    order = like["pack_orders"]["rows"][-1]
    db = open_sample("d2-partial-pack")
    pack(db, order, length)
    check(db, like)

    before = expected("d0-before-pack")
    db = open_sample("d0-before-pack")
    pack(db, order, length)
    oids = [order[3][2:][i : i + 16] for i in range(0, len(order[3]) - 2, 16)]
    assert all(len(before["history"][oid]) > 1 for oid in oids)
    for oid, history in before["history"].items():
        if oid in oids:
            # All is older than the order; what was deleted vanishes.
            history = [history[0]] if oid in before["current_oids"] else []
        found = [[t.hex(), s] for t, s in db.history(bytes.fromhex(oid), 0, 100)]
        assert found == history, oid


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_replication(open_sample: Any, chunk: int) -> None:
    """Node 3 of c3 gets what it lacks from the others, as in c4."""
    target = open_sample("c3-s3")
    sources = [open_sample("c4-s1"), open_sample("c4-s2")]
    own = list(target.own_cells())
    for partition in own:
        (source,) = (
            s
            for s in sources
            if partition in s.own_cells() and s.own_cells()[partition].state in READABLE
        )
        replicate(source, target, partition, chunk)
    like = expected("c4", 3)
    found = content_of(target, like)
    for key in "transactions", "object_revisions", "history", "checksums":
        assert found[key] == like[key], key


def replicate(source: Backend, target: Backend, partition: int, chunk: int) -> None:
    start: bytes | None = ZERO_TID
    while start is not None:
        known = target.tids_from(partition, start, MAX_TID, chunk)
        missing, start, unknown = source.fetch_transactions(
            partition, chunk, start, MAX_TID, known
        )
        target.begin(durable=False)
        for tid in unknown:
            target.delete_transaction(tid)
        for tid in missing:
            transaction = source.transaction(tid)
            assert transaction is not None
            target.add_transaction(tid, transaction)
        target.commit()
    tid_: bytes | None = ZERO_TID
    oid_: bytes | None = ZERO_OID
    while tid_ is not None and oid_ is not None:
        theirs: dict[bytes, list[bytes]] = {}
        for tid, oid in target.object_keys(partition, chunk, tid_, MAX_TID, oid_):
            theirs.setdefault(tid, []).append(oid)
        keys, tid_, oid_, extra = source.fetch_objects(
            partition, chunk, tid_, MAX_TID, oid_, theirs
        )
        target.begin(durable=False)
        for tid, oids in extra.items():
            for oid in oids:
                target.delete_object(oid, tid)
        for tid, oid in keys:
            revision = source.load(oid, at=tid)
            assert revision is not None
            _, _, compression, checksum, data, value_tid = revision
            value = None if compression is None else (checksum, data, compression)
            target.add_object(oid, tid, value, value_tid)
        target.commit()


def test_migrated_tables_are_those_of_a_new_database() -> None:
    new = MemoryBackend()
    for name in "e-v0", "e-v3":
        db = MemoryBackend((SAMPLES / f"{name}.sqlite").read_bytes())
        for table in "pt", "obj", "ttrans", "pack":
            sql = f"PRAGMA table_info({table})"
            assert rows(db, sql) == rows(new, sql)
        db.close()
    new.close()


def test_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite"
    shutil.copyfile(SAMPLES / "a-dedup.sqlite", path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE config SET value = '5' WHERE name = 'version'")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="format 5 can not be downgraded"):
        SQLiteBackend(f"file:{path}?journal_mode=delete")
    assert path.read_bytes() == before
