"""The life of a storage node's database, as a script of SQL transactions."""

from __future__ import annotations

from hashlib import sha1
from typing import Any

from neo.lib.protocol import ZERO_OID, CellState
from neo.lib.util import p64
from neo.storage.database.interface import (
    Backend,
    Metadata,
    PackOrder,
    Store,
    Transaction,
)
from neo.storage.database.memory import MemoryBackend

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
PACK = PackOrder(None, False, None, p64(50))
COPY = Transaction(b"", b"", b"", [p64(3)], False, p64(115), None)
COPY_OF_PACK = COPY._replace(ttid=p64(118), pack=PACK)

#: (durable, calls of the writer face); some methods stand alone
ALONE = "checkpoint", "erase"
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
    (False, [("checkpoint",)]),
    (True, [("abort", p64(106)), ("lock", p64(105), p64(108), False)]),
    (False, [("unlock", p64(105), p64(108))]),
    (True, [("sign_packs", [p64(108)], [])]),
    (
        False,
        [("pack_partition", 1, p64(108), ZERO_OID, 9), ("set_packed", 1, p64(108))],
    ),
    # A cell is replicated again, in chunks.
    (True, [("change_partition_table", 2, 0, [(0, NID, CellState.OUT_OF_DATE)])]),
    (False, [("add_transaction", p64(117), COPY), ("set_replicated", 0, p64(110))]),
    (
        False,
        [
            ("add_object", p64(3), p64(117), val(b"e"), None),
            ("add_object", p64(6), p64(117), val(b"e" * 5000), None),
            ("set_replicated", 0, p64(117)),
        ],
    ),
    (
        True,
        [
            ("add_transaction", p64(120), COPY_OF_PACK),
            ("add_object", p64(3), p64(120), None, p64(117)),
            ("delete_object", p64(6), p64(117)),
            ("set_replicated", 0, p64(120)),
        ],
    ),
    (False, [("delete_transaction", p64(117))]),
    (True, [("change_partition_table", 3, 0, [(0, NID, CellState.UP_TO_DATE)])]),
    (False, [("checkpoint",)]),
    # A cell goes while a transaction is in progress, and is dropped in slices.
    (True, [("vote", p64(123), stores(o1=b"f", o3=b"g" * 20000), META)]),
    (True, [("change_partition_table", 4, 0, [(1, NID, CellState.DISCARDED)])]),
    (False, [("drop_partition", 1, 1)]),
    (False, [("drop_partition", 1, 9)]),
    (True, [("lock", p64(123), p64(126), False)]),
    (True, [("validate", p64(123), p64(126))]),
    # Truncation, in slices; then a new table.
    (True, [("set_truncate_tid", p64(103))]),
    (False, [("truncate", 1)]),
    (False, [("truncate", 9)]),
    (False, [("truncate", 9)]),
    (True, [("change_partition_table", 5, 1, TABLE, True)]),
    (True, [("vote", p64(129), stores(o1=b"h"), None)]),
    (True, [("drop_unfinished",)]),
    (True, [("erase",)]),
]


def run(db: Backend, step: int) -> None:
    """Do one step."""
    durable, calls = SCRIPT[step]
    if calls[0][0] in ALONE:
        getattr(db, calls[0][0])()
        return
    db.begin(durable)
    try:
        for name, *args in calls:
            getattr(db, name)(*args)
        db.commit()
    except BaseException:
        db.rollback()
        raise


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


def check(db: Any, expected: list[Any], least: int, most: int) -> int:
    """Assert that a database is sound and has what was promised; the steps it has.

    least: steps that it has for sure; most: the greatest number that it may have.
    """
    assert db._query("PRAGMA integrity_check") == [("ok",)]
    found = content(db)
    done = [n for n in range(least, most + 1) if expected[n] == found]
    assert done, (least, most, found)
    db.begin(durable=False)
    assert db.prune_orphans(0, 1000, True) == (0, None)
    db.commit()
    return done[-1]
