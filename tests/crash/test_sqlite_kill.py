"""A storage's database survives the death of its process at any statement.

A child process runs a script of SQL transactions and kills itself before its n-th
statement, for each n until the script ends alive. The database then opens, holds all
that was acknowledged and no half transaction, and the script goes on from there.
"""

from __future__ import annotations

import os
import signal
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest

from neo.lib.protocol import ZERO_OID, CellState
from neo.lib.util import p64
from neo.storage.database.interface import Backend, Metadata, Store, Transaction
from neo.storage.database.memory import MemoryBackend
from neo.storage.database.sqlite import SQLiteBackend

NID = 7


def val(data: bytes) -> tuple[bytes, bytes, int]:
    return sha1(data).digest(), data, 0


def stores(**values: bytes | None) -> list[Store]:
    return [
        Store(p64(int(oid[1:])), None, data if data is None else val(data))
        for oid, data in values.items()
    ]


META = Metadata(b"user", b"", b"", [p64(1), p64(2)], (None, p64(50)))
TABLE = [(partition, NID, CellState.UP_TO_DATE) for partition in range(3)]
COPY = Transaction(b"", b"", b"", [p64(3)], False, p64(115), None)

#: (durable, calls of the writer face)
SCRIPT: list[tuple[bool, list[tuple[Any, ...]]]] = [
    (True, [("set_nid", NID), ("change_partition_table", 1, 0, TABLE, True)]),
    (True, [("vote", p64(99), stores(o1=b"a", o2=b"b"), META)]),
    (True, [("lock", p64(99), p64(102), True)]),
    (False, [("spill", p64(1), val(b"spilled"))]),
    (
        True,
        [
            ("unlock", p64(99), p64(102)),
            ("vote", p64(105), stores(o1=b"c" * 9999, o2=None), META),
            ("vote", p64(106), stores(o4=b"d"), None),
        ],
    ),
    (True, [("abort", p64(106)), ("lock", p64(105), p64(108), False)]),
    (False, [("unlock", p64(105), p64(108))]),
    (False, [("pack_partition", 1, p64(108), ZERO_OID, 9)]),
    (True, [("change_partition_table", 2, 0, [(0, NID, CellState.OUT_OF_DATE)])]),
    (
        False,
        [
            ("add_transaction", p64(117), COPY),
            ("add_object", p64(3), p64(117), val(b"e"), None),
            ("set_replicated", 0, p64(117)),
        ],
    ),
    (True, [("change_partition_table", 3, 0, [(1, NID, CellState.DISCARDED)])]),
    (False, [("drop_partition", 1, 1)]),
    (False, [("drop_partition", 1, 9)]),
    (True, [("set_truncate_tid", p64(103))]),
    (False, [("truncate", 1)]),
    (False, [("truncate", 9)]),
]


def run(db: Backend, step: int) -> None:
    durable, calls = SCRIPT[step]
    db.begin(durable)
    for name, *args in calls:
        getattr(db, name)(*args)
    db.commit()


def content(db: Any) -> list[Any]:
    """What is in the database, whatever the data ids."""
    with_data = "SELECT partition, oid, tid, value_tid, hash, value FROM {} AS o"
    with_data += " LEFT JOIN data ON data.id = data_id ORDER BY 1, 2, 3"
    tables = "config", "pt", "pack", "trans", "ttrans"
    queries = [with_data.format("obj"), with_data.format("tobj")]
    return [
        db._query(sql) for sql in [*(f"SELECT * FROM {t}" for t in tables), *queries]
    ]


def states() -> list[Any]:
    """Content after each number of steps, as the next start finds it."""
    db = MemoryBackend()
    result = []
    for step in range(len(SCRIPT) + 1):
        if step:
            run(db, step - 1)
        opened = MemoryBackend(db.image())
        result.append(content(opened))
        opened.close()
    db.close()
    return result


def child(path: str, n: int, pipe: int) -> None:
    """Run the script, die before the n-th statement; tell the steps that are done."""
    db = SQLiteBackend(path)
    count = 0
    cursor = db._write

    class Deadly:
        def __getattr__(self, name: str) -> Any:
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return getattr(cursor, name)

    db._write = Deadly()  # type: ignore[assignment]
    for step in range(len(SCRIPT)):
        run(db, step)
        os.write(pipe, b".")


@pytest.mark.parametrize("query", ["", "?journal_mode=delete"])
def test_kill_at_each_statement(tmp_path: Path, query: str) -> None:
    expected = states()
    n, alive = 0, False
    while not alive:
        n += 1
        path = f"file:{tmp_path}/{n}{query}"
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                child(path, n, writer)
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            done = len(pipe.read())
        alive = os.waitpid(pid, 0)[1] == 0
        check(path, expected, done)
    assert n > 70
    assert done == len(SCRIPT)


def check(path: str, expected: list[Any], done: int) -> None:
    db = SQLiteBackend(path)
    assert db._query("PRAGMA integrity_check") == [("ok",)]
    # Killed between a commit and its acknowledgement, or before.
    found = content(db)
    step = done if found == expected[done] else done + 1
    assert found == expected[step]
    db.begin(durable=False)
    assert db.prune_orphans(0, 1000, True) == (0, None)
    db.commit()
    for rest in range(step, len(SCRIPT)):
        run(db, rest)
    db.close()
    db = SQLiteBackend(path)
    assert content(db) == expected[-1]
    db.close()
