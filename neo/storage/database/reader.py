"""Reads in SQL, the same for all databases.

Queries are class attributes next to the method that uses them, with `?` for parameters:
a database that wants another text (index hints, say) overrides the attribute.

The layout says which plan each query relies on: by oid, the primary key of `obj`
(partition, oid, tid); by tid, its index (partition, tid, oid). No query scans more than
what it returns, but for `final_tid` of a transaction that isn't there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha1
from heapq import merge
from itertools import islice
from typing import Any

from neo.lib.exception import BackendError
from neo.lib.protocol import MAX_TID, ZERO_HASH, CellState
from neo.lib.util import p64, u64, u64_tuple

from .interface import (
    MissingObjects,
    MissingTransactions,
    Oid,
    OwnCell,
    PackOrder,
    Revision,
    Settings,
    StreamedRevision,
    Tid,
    Transaction,
    Value,
    Wanted,
)

Row = tuple[Any, ...]

ID_MAX = u64(MAX_TID)  # what a signed column can hold
LOST_HASH = b"\xff" * 20  # "checksum" of a value that isn't there
PAGE = 1000  # rows that an internal loop reads at once
STATES: dict[int, CellState] = {state.value: state for state in CellState}


def cell_state(tid: int) -> CellState:
    """What column `tid` of `pt` says of a cell: its state, negative, or else a tid."""
    try:
        return STATES[max(0, -tid)]
    except (KeyError, TypeError):
        raise BackendError(f"the partition table is damaged: state {tid!r}") from None


def clip(ident: bytes) -> int:
    """Integer of an id that is an upper bound."""
    return min(u64(ident), ID_MAX)


def optional(ident: int | None) -> bytes | None:
    return None if ident is None else p64(ident)


def split_oids(oids: bytes) -> list[Oid]:
    return [oids[i : i + 8] for i in range(0, len(oids), 8)]


def metadata(row: Row) -> Transaction:
    """From a row of `TRANSACTION`."""
    user, description, extension, oids, packed, ttid, *pack = row
    return Transaction(
        _bytes(user),
        _bytes(description),
        _bytes(extension),
        split_oids(_bytes(oids)),
        bool(packed),
        p64(ttid),
        None if pack[1] is None else _pack_order(*pack),
    )


def revision(row: Row) -> Revision:
    """What a row of one of the `LOAD_...` means."""
    tid, next_tid, data_id, value_tid, compression, checksum, data = row
    if data_id is None:
        compression, checksum, data = None, ZERO_HASH, b""
    elif type(checksum) is not bytes or type(data) is not bytes:
        # Nobody takes it for good: as a value that is damaged, it can be restored.
        compression, checksum, data = 0, LOST_HASH, b""
    return (
        p64(tid),
        None if next_tid is None else p64(next_tid),
        compression,
        checksum,
        data,
        None if value_tid is None else p64(value_tid),
    )


def _bytes(value: object) -> bytes:
    """What should be bytes, but is a text if somebody changed it by hand."""
    return value if isinstance(value, bytes) else str(value).encode()


class Layout:
    """What all faces of a backend know of its partition table."""

    __slots__ = ("nid", "partitions")

    def __init__(self) -> None:
        self.nid: int | None = None
        self.partitions = 1  # until a partition table is known


class SQLReader(ABC):
    """See `interface.Reader`."""

    layout: Layout

    @abstractmethod
    def _query(self, sql: str, args: Sequence[object] = ()) -> list[Row]:
        """All rows of what is committed; no cursor stays open."""

    @abstractmethod
    def size(self) -> int: ...

    # --- objects ------------------------------------------------------------

    # `next` is read along: a second query would cost as much as all of this one.
    _LOAD = (
        "SELECT o.tid, {next}, o.data_id, o.value_tid, compression, hash, value"
        " FROM obj AS o LEFT JOIN data ON data.id = o.data_id"
        " WHERE o.partition = ? AND o.oid = ? {tid} ORDER BY o.tid DESC LIMIT 1"
    )
    _NEXT = (
        "(SELECT MIN(n.tid) FROM obj AS n"
        " WHERE n.partition = o.partition AND n.oid = o.oid AND n.tid > o.tid)"
    )
    LOAD_LAST = _LOAD.format(next="NULL", tid="")
    LOAD_BEFORE = _LOAD.format(next=_NEXT, tid="AND o.tid < ?")
    LOAD_AT = _LOAD.format(next=_NEXT, tid="AND o.tid = ?")

    def load(
        self, oid: Oid, at: Tid | None = None, before: Tid | None = None
    ) -> Revision | None:
        query = self._load_query(oid, at, before)
        rows = query and self._query(*query)
        return revision(rows[0]) if rows else None

    def load_streamed(
        self, oid: Oid, at: Tid | None = None, before: Tid | None = None
    ) -> StreamedRevision | None:
        return self.load(oid, at, before)

    def _load_query(
        self, oid: Oid, at: Tid | None, before: Tid | None
    ) -> tuple[str, tuple[int, ...]] | None:
        (number,) = u64_tuple(oid)
        if number > ID_MAX:
            return None
        partition = number % self.layout.partitions
        if before is not None:
            (bound,) = u64_tuple(before)
            if bound > ID_MAX:
                bound = ID_MAX
            return self.LOAD_BEFORE, (partition, number, bound)
        if at is not None:
            (bound,) = u64_tuple(at)
            if bound > ID_MAX:
                return None
            return self.LOAD_AT, (partition, number, bound)
        return self.LOAD_LAST, (partition, number)

    def load_many(self, wanted: Sequence[Wanted]) -> list[StreamedRevision | None]:
        return [self.load_streamed(oid, at, before) for oid, at, before in wanted]

    SPILLED = "SELECT hash, value, compression FROM data WHERE id = ?"

    def spilled(self, data_id: int) -> Value:
        rows = self._query(self.SPILLED, (data_id,))
        if not rows:
            raise BackendError(f"spilled data {data_id} is missing")
        checksum, data, compression = rows[0]
        return checksum, data, compression

    LAST_TID_OF = "SELECT MAX(tid) FROM obj WHERE partition = ? AND oid = ?"

    def last_tid_of(self, oid: Oid) -> Tid | None:
        (number,) = u64_tuple(oid)
        if number > ID_MAX:
            return None
        args = (number % self.layout.partitions, number)
        return optional(self._query(self.LAST_TID_OF, args)[0][0])

    def last_tids_of(self, oids: Sequence[Oid]) -> dict[Oid, Tid | None]:
        return {oid: self.last_tid_of(oid) for oid in oids}

    HAS_REVISION = "SELECT data_id FROM obj WHERE partition = ? AND oid = ? AND tid = ?"

    def has_revision(self, oid: Oid, tid: Tid) -> bool:
        number = u64(oid)
        if number > ID_MAX or u64(tid) > ID_MAX:
            return False
        args = (number % self.layout.partitions, number, u64(tid))
        return bool(self._query(self.HAS_REVISION, args))

    HISTORY = (
        "SELECT obj.tid, COALESCE(LENGTH(value), 0)"
        " FROM obj LEFT JOIN data ON data.id = obj.data_id"
        " WHERE obj.partition = ? AND obj.oid = ? AND obj.tid <= ?"
        " ORDER BY obj.tid DESC LIMIT ? OFFSET ?"
    )

    def history(
        self, oid: Oid, first: int, last: int, max_tid: Tid | None = None
    ) -> list[tuple[Tid, int]]:
        number = u64(oid)
        if number > ID_MAX:
            return []
        bound = clip(max_tid or MAX_TID)
        partition = number % self.layout.partitions
        args = (partition, number, bound, last - first, first)
        return [(p64(tid), size) for tid, size in self._query(self.HISTORY, args)]

    REVISIONS_UNTIL = (
        "SELECT tid FROM obj WHERE partition = ? AND oid = ? AND tid <= ?"
        " ORDER BY tid DESC LIMIT 2"
    )
    REVISIONS_AFTER = (
        "SELECT tid, value_tid FROM obj WHERE partition = ? AND oid = ? AND tid > ?"
        " ORDER BY tid"
    )

    def undo_serials(
        self,
        undone_tid: Tid,
        ltid: Tid,
        oids: Iterable[Oid],
        written: Mapping[Oid, Tid],
    ) -> dict[Oid, tuple[Tid, Tid | None, bool]] | None:
        undone = u64(undone_tid)
        if undone > ID_MAX:
            return {}
        result = {}
        for oid in oids:
            number = u64(oid)
            if number > ID_MAX:
                continue
            args = (number % self.layout.partitions, number, undone)
            until = [tid for (tid,) in self._query(self.REVISIONS_UNTIL, args)]
            if not until or until[0] != undone:
                continue
            previous = until[1] if len(until) > 1 else None
            after = self._query(self.REVISIONS_AFTER, args)
            if oid in written:
                current = u64(written[oid])
            elif below := [tid for tid, _ in after if tid < u64(ltid)]:
                current = below[-1]
            elif ltid <= undone_tid:
                return None
            else:
                current = undone
            result[oid] = _undo_serial(undone, previous, current, after)
        return result

    # The last revision of each oid; the inner query stops after LIMIT oids because it
    # follows the primary key.
    LAST_REVISIONS = (
        "SELECT oid, tid, revisions, data_id FROM obj JOIN ("
        "SELECT oid AS last_oid, MAX(tid) AS last_tid, COUNT(*) AS revisions FROM obj"
        " WHERE partition = ? AND oid >= ? AND tid <= ?"
        " GROUP BY oid ORDER BY oid LIMIT ?"
        ") AS last ON oid = last_oid AND tid = last_tid"
        " WHERE partition = ? ORDER BY oid"
    )

    def oids_from(
        self, partition: int, length: int, min_oid: Oid, tid: Tid
    ) -> tuple[list[Oid], Oid | None]:
        if u64(min_oid) > ID_MAX:
            return [], None
        args = (partition, u64(min_oid), clip(tid), length, partition)
        rows = self._query(self.LAST_REVISIONS, args)
        next_oid = self._next_oid([row[0] for row in rows], length)
        return [
            p64(oid) for oid, _, _, data_id in rows if data_id is not None
        ], next_oid

    def _next_oid(self, oids: Sequence[int], length: int) -> Oid | None:
        """Where the slice after `oids` starts, in the same partition."""
        if not oids or len(oids) < length:
            return None
        return p64(oids[-1] + self.layout.partitions)

    def count_oids(
        self, partition: int, min_oid: Oid, length: int
    ) -> tuple[int, Oid | None]:
        oids, next_oid = self.oids_from(partition, length, min_oid, MAX_TID)
        return len(oids), next_oid

    # --- transactions -------------------------------------------------------

    METADATA = (
        "user, description, ext, trans.oids, packed, ttid,"
        " approved, partial, pack.oids, pack_tid"
    )
    TRANSACTION = (
        f"SELECT {METADATA} FROM trans LEFT JOIN pack ON pack.tid = trans.tid"
        " WHERE trans.partition = ? AND trans.tid = ?"
    )

    def transaction(self, tid: Tid) -> Transaction | None:
        number = u64(tid)
        if number > ID_MAX:
            return None
        args = (number % self.layout.partitions, number)
        rows = self._query(self.TRANSACTION, args)
        return metadata(rows[0]) if rows else None

    def transactions(self, tids: Sequence[Tid]) -> list[Transaction | None]:
        return [self.transaction(tid) for tid in tids]

    TIDS_DOWN = (
        "SELECT tid FROM trans WHERE partition = ? AND tid <= ?"
        " ORDER BY tid DESC LIMIT ?"
    )

    def tids(
        self,
        first: int,
        last: int,
        partitions: Iterable[int],
        max_tid: Tid | None = None,
    ) -> list[Tid]:
        # A union sorted by the database would read all tids of all partitions.
        page = min(last, PAGE)
        bound = clip(max_tid or MAX_TID)
        by_partition = [self._tids_down(p, bound, page) for p in sorted(partitions)]
        return [
            p64(tid) for tid in islice(merge(*by_partition, reverse=True), first, last)
        ]

    def _tids_down(self, partition: int, bound: int, page: int) -> Iterator[int]:
        while rows := self._query(self.TIDS_DOWN, (partition, bound, page)):
            for (tid,) in rows:
                yield tid
            bound = tid - 1

    TIDS_FROM = (
        "SELECT tid FROM trans WHERE partition = ? AND tid >= ? AND tid <= ?"
        " ORDER BY tid LIMIT ?"
    )

    def tids_from(
        self, partition: int, min_tid: Tid, max_tid: Tid, length: int
    ) -> list[Tid]:
        if u64(min_tid) > ID_MAX:
            return []
        args = (partition, u64(min_tid), clip(max_tid), length)
        return [p64(tid) for (tid,) in self._query(self.TIDS_FROM, args)]

    FINAL_TID = (
        "SELECT tid FROM trans WHERE partition = ? AND tid >= ? AND ttid = ?"
        " ORDER BY tid LIMIT 1"
    )

    def final_tid(self, ttid: Tid) -> Tid | None:
        number = u64(ttid)
        if number > ID_MAX:
            return None
        args = (number % self.layout.partitions, number, number)
        rows = self._query(self.FINAL_TID, args)
        return p64(rows[0][0]) if rows else None

    def locked_transactions(self) -> dict[Tid, Tid | None]:
        tid_by_ttid: dict[int, int | None] = {
            ttid: None for (ttid,) in self._query("SELECT DISTINCT tid FROM tobj")
        }
        tid_by_ttid.update(self._query("SELECT ttid, tid FROM ttrans"))
        return {p64(ttid): optional(tid) for ttid, tid in sorted(tid_by_ttid.items())}

    LAST_TRANSACTION = "SELECT MAX(tid) FROM trans WHERE partition = ?"
    FIRST_TRANSACTION = "SELECT MIN(tid) FROM trans WHERE partition = ?"
    LAST_OBJECT_TID = "SELECT MAX(tid) FROM obj WHERE partition = ?"
    LAST_OID = "SELECT MAX(oid) FROM obj WHERE partition = ?"

    def last_ids(self, partitions: Iterable[int]) -> tuple[Tid | None, Oid | None, Tid]:
        last_tids, last_oids, first_tids = [], [], [ID_MAX]
        for partition in partitions:
            last_tids += self._some(self.LAST_TRANSACTION, partition)
            last_tids += self._some(self.LAST_OBJECT_TID, partition)
            last_oids += self._some(self.LAST_OID, partition)
            first_tids += self._some(self.FIRST_TRANSACTION, partition)
        return (
            optional(max(last_tids, default=None)),
            optional(max(last_oids, default=None)),
            p64(min(first_tids)),
        )

    def _some(self, sql: str, partition: int) -> list[int]:
        """Result of an aggregate, as a list that is empty for NULL."""
        value = self._query(sql, (partition,))[0][0]
        return [] if value is None else [value]

    def last_tids_of_partition(self, partition: int) -> tuple[Tid | None, Tid | None]:
        return (
            optional(self._query(self.LAST_TRANSACTION, (partition,))[0][0]),
            optional(self._query(self.LAST_OBJECT_TID, (partition,))[0][0]),
        )

    # --- settings and partition table -----------------------------------------

    CONFIG = "SELECT name, value FROM config"

    def settings(self) -> Settings:
        return parse_settings(decode_config(self._query(self.CONFIG)))

    def partition_table(self) -> list[tuple[int, int, CellState]]:
        rows = self._query("SELECT partition, nid, tid FROM pt ORDER BY partition, nid")
        return [(partition, nid, cell_state(tid)) for partition, nid, tid in rows]

    def own_cells(self) -> dict[int, OwnCell]:
        rows = self._query(
            "SELECT partition, tid, pack FROM pt WHERE nid = ? ORDER BY partition",
            (self.layout.nid,),
        )
        return {
            partition: OwnCell(
                cell_state(tid), p64(tid) if tid >= 0 else None, p64(pack or 0)
            )
            for partition, tid, pack in rows
        }

    # --- packing --------------------------------------------------------------

    # The row of an order that isn't committed yet has the ttid as id.
    PACK_ORDERS = (
        "SELECT tid, approved, partial, oids, pack_tid FROM pack WHERE tid >= ?"
        " AND NOT EXISTS (SELECT 1 FROM ttrans WHERE ttrans.ttid = pack.tid)"
        " ORDER BY tid"
    )

    def pack_orders(
        self, min_id: Tid, partitions: Iterable[int]
    ) -> list[tuple[Tid, PackOrder]]:
        if u64(min_id) > ID_MAX:
            return []
        among = frozenset(partitions)
        return [
            (p64(tid), _pack_order(*order))
            for tid, *order in self._query(self.PACK_ORDERS, (u64(min_id),))
            if tid % self.layout.partitions in among
        ]

    # --- replication and check ------------------------------------------------

    def fetch_transactions(
        self,
        partition: int,
        length: int,
        min_tid: Tid,
        max_tid: Tid,
        known: Iterable[Tid],
    ) -> MissingTransactions:
        tids = self.tids_from(partition, min_tid, max_tid, length + 1)
        next_tid = tids.pop() if len(tids) > length else None
        theirs = dict.fromkeys(known)
        ours = frozenset(tids)
        return MissingTransactions(
            [tid for tid in tids if tid not in theirs],
            next_tid,
            [
                tid
                for tid in theirs
                if tid not in ours and (next_tid is None or tid < next_tid)
            ],
        )

    # Two queries: with one condition on both columns, MariaDB would read again all of
    # a big transaction for each of its chunks.
    KEYS_AT = (
        "SELECT tid, oid FROM obj WHERE partition = ? AND tid = ? AND oid >= ?"
        " ORDER BY oid LIMIT ?"
    )
    KEYS_AFTER = (
        "SELECT tid, oid FROM obj WHERE partition = ? AND tid > ? AND tid <= ?"
        " ORDER BY tid, oid LIMIT ?"
    )

    def object_keys(
        self, partition: int, length: int, min_tid: Tid, max_tid: Tid, min_oid: Oid
    ) -> list[tuple[Tid, Oid]]:
        keys = self._keys(partition, length, u64(min_tid), clip(max_tid), u64(min_oid))
        return [(p64(tid), p64(oid)) for tid, oid in keys]

    def _keys(
        self, partition: int, length: int, min_tid: int, max_tid: int, min_oid: int
    ) -> list[Row]:
        if min_tid > max_tid:
            return []
        rows = []
        if min_oid <= ID_MAX:
            rows = self._query(self.KEYS_AT, (partition, min_tid, min_oid, length))
        if len(rows) < length:
            args = (partition, min_tid, max_tid, length - len(rows))
            rows += self._query(self.KEYS_AFTER, args)
        return rows

    def fetch_objects(
        self,
        partition: int,
        length: int,
        min_tid: Tid,
        max_tid: Tid,
        min_oid: Oid,
        known: Mapping[Tid, Sequence[Oid]],
    ) -> MissingObjects:
        keys = self.object_keys(partition, length + 1, min_tid, max_tid, min_oid)
        end = keys.pop() if len(keys) > length else None
        theirs = {(tid, oid): None for tid, oids in known.items() for oid in oids}
        ours = frozenset(keys)
        unknown: dict[Tid, list[Oid]] = {}
        for key in theirs:
            if key not in ours and (end is None or key < end):
                unknown.setdefault(key[0], []).append(key[1])
        return MissingObjects(
            [key for key in keys if key not in theirs],
            end and end[0],
            end and end[1],
            unknown,
        )

    def check_tid_range(
        self, partition: int, length: int, min_tid: Tid, max_tid: Tid
    ) -> tuple[int, bytes, Tid]:
        digest = _Digest()
        while page := self.tids_from(
            partition, min_tid, max_tid, min(length - digest.count, PAGE)
        ):
            digest.update([u64(tid) for tid in page])
            min_tid = p64(u64(page[-1]) + 1)
        return digest.count, digest.digest(), p64(digest.last)

    def check_serial_range(
        self, partition: int, length: int, min_tid: Tid, max_tid: Tid, min_oid: Oid
    ) -> tuple[int, bytes, Tid, bytes, Oid]:
        tids, oids = _Digest(), _Digest()
        tid, oid, bound = u64(min_tid), u64(min_oid), clip(max_tid)
        while page := self._keys(
            partition, min(length - tids.count, PAGE), tid, bound, oid
        ):
            tids.update([key[0] for key in page])
            oids.update([key[1] for key in page])
            tid, oid = page[-1][0], page[-1][1] + 1
        return (
            tids.count,
            tids.digest(),
            p64(tids.last),
            oids.digest(),
            p64(oids.last),
        )


class _Digest:
    """SHA-1 of the decimal texts of integers, joined with commas (15)."""

    def __init__(self) -> None:
        self.hash = sha1()
        self.count = 0
        self.last = 0

    def update(self, numbers: Sequence[int]) -> None:
        text = ",".join(map(str, numbers))
        self.hash.update((f",{text}" if self.count else text).encode())
        self.count += len(numbers)
        self.last = numbers[-1]

    def digest(self) -> bytes:
        return self.hash.digest() if self.count else ZERO_HASH


def _undo_serial(
    undone: int, previous: int | None, current: int, after: Iterable[Row]
) -> tuple[Tid, Tid | None, bool]:
    """Follow the chains of identical revisions made by undo (10, steps 4 and 5)."""
    is_current = current == undone
    same = undone
    for tid, value_tid in after:
        if value_tid is None:
            continue
        if value_tid == previous:
            previous = tid
        elif value_tid == same:
            if tid == current:
                is_current = True
            else:
                same = tid
    return p64(current), optional(previous), is_current


def _pack_order(
    approved: int | None, partial: int, oids: bytes | None, pack_tid: int
) -> PackOrder:
    return PackOrder(
        None if approved is None else bool(approved),
        bool(partial),
        None if oids is None else split_oids(oids),
        p64(pack_tid),
    )


def decode_config(rows: Iterable[Row]) -> dict[str, str]:
    """Rows of `config`; some databases have bytes there."""
    return {_text(name): _text(value) for name, value in rows}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def parse_settings(config: Mapping[str, str]) -> Settings:
    """Decode the rows of `config` (4)."""

    def integer(name: str) -> int | None:
        return int(config[name]) if name in config else None

    def tid(name: str) -> Tid | None:
        return bytes.fromhex(config[name]) if name in config else None

    replicas = config.get("replicas", "None")
    return Settings(
        config.get("name"),
        integer("nid"),
        integer("ptid"),
        0 if replicas == "None" else int(replicas),  # as neoppod once stored none
        tid("backup_tid"),
        tid("truncate_tid"),
    )
