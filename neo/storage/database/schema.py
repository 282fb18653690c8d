"""The tables of format version 4, as data that each backend renders.

Column order matters: rows are inserted, and copied between `ttrans` and `trans`, `tobj`
and `obj`, by position. Source: storage-format.md, 3.
"""

from __future__ import annotations

from typing import NamedTuple

VERSION = 4


class Column(NamedTuple):
    name: str
    type: str  # "partition", "nid", "i64", "u64", "bool", "code", "hash", "blob"...
    null: bool = False


class Table(NamedTuple):
    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    indexes: tuple[tuple[str, ...], ...] = ()
    rowid_key: bool = False  # SQLite: its key is the rowid, or, for `ttrans`, nothing


def _columns(text: str) -> tuple[Column, ...]:
    """Columns of `name type` separated by commas; a `?` after the type allows NULL."""
    pairs = (item.split() for item in text.split(","))
    return tuple(Column(name, t.rstrip("?"), t.endswith("?")) for name, t in pairs)


_TRANS = (
    "partition partition, tid {tid}, packed bool, oids blob24,"
    " user blob, description blob, ext blob, ttid u64"
)
_OBJ = "partition partition, oid u64, tid u64, data_id u64?, value_tid u64?"

CONFIG = Table("config", _columns("name text, value text?"), ("name",))
PT = Table(
    "pt",
    _columns("partition partition, nid nid, tid i64, pack u64?"),
    ("partition", "nid"),
)
PACK = Table(
    "pack",
    _columns("tid u64, approved bool?, partial bool, oids blob24?, pack_tid u64?"),
    ("tid",),
    rowid_key=True,
)
TRANS = Table("trans", _columns(_TRANS.format(tid="u64")), ("partition", "tid"))
OBJ = Table(
    "obj",
    _columns(_OBJ),
    ("partition", "oid", "tid"),
    (("partition", "tid", "oid"), ("data_id",)),
)
DATA = Table(
    "data",
    _columns("id u64, hash hash, compression code, value blob24"),
    ("id",),
    rowid_key=True,
)
TTRANS = Table("ttrans", _columns(_TRANS.format(tid="u64?")), ("ttid",), rowid_key=True)
TOBJ = Table("tobj", _columns(_OBJ), ("tid", "oid"))

#: in order of creation
TABLES = (CONFIG, PT, PACK, TRANS, OBJ, DATA, TTRANS, TOBJ)

#: of databases with packets of limited size: chunks of big values (6.2)
BIGDATA = Table("bigdata", _columns("id serial, value blob24"), ("id",))
#: what neoppod still has to delete there (6.5)
TODEL = Table("todel", _columns("data_id u64"), ("data_id",))

#: what makes equal values of `data` be stored once; chosen when the table is created
DEDUP_INDEX = ("hash", "compression")
