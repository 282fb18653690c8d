"""A damaged database: what is wrong is not returned as good, and nothing else breaks.

Bytes are flipped anywhere in the file, it is cut, rows and values are removed. Then
everything is read. Either the backend says that the file is damaged, and the node
stops; or what it reads has a wrong checksum, which clients and replicas refuse; or it
is right. Records (which revision has which value) have no checksum: a flipped bit in
one of them can only be seen by comparing with a replica, and is.
"""

from __future__ import annotations

import sqlite3
import struct
from hashlib import sha1
from pathlib import Path
from random import Random  # noqa: TID251  # with a seed of its own
from typing import Any

import pytest

from neo.lib.exception import BackendError, ConfigurationError
from neo.lib.protocol import MAX_TID, ZERO_OID, ZERO_TID
from neo.lib.util import p64
from neo.storage.database.sqlite import SQLiteBackend

from .script import META, NID, TABLE, stores

VALUES = [b"value %d " % i * (500 if i % 10 == 9 else 5) for i in range(40)]
FLIPS = 300
Read = dict[Any, Any]


@pytest.fixture
def good(folder: Path) -> bytes:
    """A database file with transactions, some of them unfinished."""
    path = folder / "good"
    db = SQLiteBackend(str(path))
    db.begin(durable=True)
    db.set_name("test")
    db.set_nid(NID)
    db.change_partition_table(1, 0, TABLE, True)
    for i, value in enumerate(VALUES):
        ttid = p64(3 * i + 99)
        values = [s._replace(oid=p64(i % 20)) for s in stores(o1=value)]
        db.vote(ttid, values, META._replace(oids=[p64(i % 20)]))
        if i < len(VALUES) - 2:
            db.lock(ttid, ttid, False)
            db.unlock(ttid, ttid)
    db.commit()
    db.close()
    return path.read_bytes()


def everything(db: Any) -> Read:
    """All that a node may ask of its database."""
    found: Read = {"settings": db.settings(), "table": db.partition_table()}
    found["cells"] = db.own_cells()
    found["locked"] = db.locked_transactions()
    found["last"] = db.last_ids(range(3))
    found["packs"] = db.pack_orders(ZERO_TID, range(3))
    for i in range(len(VALUES)):
        tid = p64(3 * i + 99)
        found["transaction", tid] = db.transaction(tid)
        found["load", p64(i), None] = db.load(p64(i))
        found["load", p64(i % 20), tid] = db.load(p64(i % 20), at=tid)
        found["history", i] = db.history(p64(i), 0, 9)
    for p in range(3):
        found["tids", p] = db.tids_from(p, ZERO_TID, MAX_TID, 99)
        found["keys", p] = db.object_keys(p, 99, ZERO_TID, MAX_TID, ZERO_OID)
        found["oids", p] = db.oids_from(p, 99, ZERO_OID, MAX_TID)
        db.check_tid_range(p, 99, ZERO_TID, MAX_TID)
        db.check_serial_range(p, 99, ZERO_TID, MAX_TID, ZERO_OID)
    return found


def wrong_checksum(revision: Any) -> bool:
    """Whether whoever gets it sees that it is damaged."""
    _, _, compression, checksum, data, _ = revision
    return compression is not None and sha1(data).digest() != checksum


def look(path: Path) -> Read | None:
    """Open and read; None: the node stops."""
    db = None
    error = None
    try:
        db = SQLiteBackend(str(path))
        return everything(db)
    except (BackendError, ConfigurationError) as e:
        error = str(e)
    finally:
        if db is not None:
            db.close()
    assert str(path) in error or "database" in error
    return None


def compared(found: Read) -> Read:
    """What a check compares with a replica."""
    return {
        key: value
        for key, value in found.items()
        if key[0] in ("keys", "tids", "transaction")
        or (key[0] == "load" and key[2] is not None)
    }


def judge(path: Path, truth: Read) -> str:
    """What becomes of a damaged file."""
    try:
        found = look(path)
    except (struct.error, ArithmeticError, TypeError):
        return "stops"  # a column isn't what it should be; any error ends the node
    if found is None:
        return "stops"
    if found == truth:
        return "right"
    loads = {k: v for k, v in found.items() if k[0] == "load" and v != truth[k]}
    if not all(v and wrong_checksum(v) for v in loads.values()):
        # As good as any to those who don't know better.
        assert compared(found) != compared(truth), loads
        return "compare"
    return "refused" if loads else "metadata"


def test_flipped_bits(folder: Path, good: bytes) -> None:
    """Anywhere in the file."""
    path = folder / "db"
    path.write_bytes(good)
    truth = look(path)
    assert truth is not None
    seed = Random().randrange(1 << 32)
    rng = Random(seed)
    verdicts: dict[str, int] = {}
    for _ in range(FLIPS):
        data = bytearray(good)
        position = rng.randrange(len(data))
        data[position] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            verdict = judge(path, truth)
        except Exception as e:
            raise AssertionError(f"seed {seed}, byte {position}") from e
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
    assert verdicts["refused"] > FLIPS / 10, verdicts
    assert verdicts.get("compare", 0) < FLIPS / 20, verdicts


def test_flipped_bits_of_values(folder: Path, good: bytes) -> None:
    """Never returned as good, whatever the value and the bit."""
    path = folder / "db"
    path.write_bytes(good)
    truth = look(path)
    assert truth is not None
    for i, value in enumerate(VALUES[:-2]):
        part = value[:500]
        wrong = bytearray(part)
        wrong[i % len(part)] ^= 1 << i % 8
        # Pages have remains of rows that were moved: all are damaged.
        assert part in good
        path.write_bytes(good.replace(part, wrong))
        assert judge(path, truth) == "refused", i


def test_cut_file(folder: Path, good: bytes) -> None:
    """The end is missing: the node stops, mostly at its start."""
    path = folder / "db"
    path.write_bytes(good)
    truth = look(path)
    assert truth is not None
    for size in range(len(good) - 1, 100, -4001):
        path.write_bytes(good[:size])
        verdict = judge(path, truth)
        assert verdict == "stops" or size > len(good) - 4096, size
        assert verdict in ("stops", "refused", "right")


@pytest.mark.parametrize(
    ("sql", "verdict"),
    [
        ("DELETE FROM data WHERE id IN (SELECT MAX(data_id) FROM obj)", "refused"),
        ("UPDATE data SET value = x'00' WHERE id % 7 = 1", "refused"),
        ("UPDATE data SET hash = x'00'", "refused"),
        ("UPDATE data SET compression = 1 - compression", "compare"),
        ("DELETE FROM obj WHERE tid % 5 = 0", "compare"),
        ("UPDATE obj SET data_id = NULL WHERE tid % 5 = 0", "compare"),
        ("DELETE FROM trans WHERE tid % 5 = 0", "metadata"),
    ],
)
def test_removed_and_changed_rows(
    folder: Path, good: bytes, sql: str, verdict: str
) -> None:
    """What SQLite itself takes for good."""
    path = folder / "db"
    path.write_bytes(good)
    truth = look(path)
    assert truth is not None
    connection = sqlite3.connect(path)
    assert connection.execute(sql).rowcount > 0
    connection.commit()
    connection.close()
    assert judge(path, truth) == verdict
