"""The writer face in SQL, and what happens when a database is opened.

Life of a transaction (8.1): `vote` inserts its values in `data`, its records in `tobj`
(whose tid is the ttid) and its metadata in `ttrans`; `lock` writes the final tid there;
`unlock` moves the records to `obj` and the metadata to `trans`. The rows of `tobj` and
`ttrans` are what a crash leaves to be recovered.

A row of `data` lives as long as a row of `obj` refers to it, or something that is not
committed yet: `_references` counts those, rows of `tobj` and values spilled before
their vote. It is rebuilt from `tobj` when the database is opened; spilled values don't
outlive the process: before the first one of a partition, its data id is recorded in
`config`, as a mark that stays while there are any. At the next start, what is above
the mark and not referred to is removed. (neoppod ignores such a setting.)

Data ids are chosen here, in a range per partition (6.1), greater than all of it: they
are never used twice within one life of a node.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Sequence

from neo.lib.exception import BackendError, ConfigurationError
from neo.lib.protocol import READABLE, CellState
from neo.lib.util import p64, u64

from . import schema
from .interface import (
    Metadata,
    Oid,
    PackOrder,
    Settings,
    Store,
    Tid,
    Transaction,
    Value,
)
from .migration import migrate
from .reader import ID_MAX, PAGE, Layout, Row, SQLReader, clip, parse_settings

log = logging.getLogger(__name__)

DATA_ID_BITS = 48  # each partition has a range of data ids
DATA_ID_RANGE = 1 << DATA_ID_BITS
PARTITION_MASK = 0x7FFF  # of what a signed 64-bit data id has room for
MARK = "spill."  # prefix of the settings that mark spilled values
READABLE_TIDS = frozenset(-state.value for state in READABLE)  # in `pt.tid`


class SQLBackend(SQLReader):
    """See `interface.Backend`. Subclasses bring the connections."""

    dedup: bool

    # Conflicts with existing rows are rare, and handled after.
    INSERT_IGNORE = "INSERT OR IGNORE"

    def __init__(self) -> None:
        self.layout = Layout()

    def _reset_memory(self) -> None:
        self._references: dict[int, int] = {}  # data id -> uses that aren't committed
        self._voted: dict[int, list[int | None]] = {}  # ttid -> data id of each record
        self._with_pack: dict[int, None] = {}  # ttids of those with a pack order
        self._spilled: dict[int, int] = {}  # data id -> uses
        self._marks: dict[int, None] = {}  # first data ids of marked partitions
        self._next_data_id: dict[int, int] = {}  # by first data id of the partition

    # --- what a database brings -------------------------------------------------

    @abstractmethod
    def begin(self, durable: bool) -> None: ...

    @abstractmethod
    def commit(self) -> None: ...

    @abstractmethod
    def rollback(self) -> None: ...

    @abstractmethod
    def execute(self, sql: str, args: Sequence[object] = ()) -> int:
        """Execute in the transaction of the writer; return the rows changed."""

    @abstractmethod
    def execute_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None: ...

    @abstractmethod
    def fetch(self, sql: str, args: Sequence[object] = ()) -> list[Row]:
        """All rows, as the transaction of the writer sees them."""

    @abstractmethod
    def columns(self, table: str) -> list[str]:
        """Names of the columns of a table, empty if it doesn't exist."""

    @abstractmethod
    def create_table(self, table: schema.Table, name: str | None = None) -> None:
        """Create a table unless it exists, under another name if given."""

    @abstractmethod
    def create_indexes(self, table: schema.Table) -> None:
        """Create the indexes of a table that don't exist."""

    @abstractmethod
    def detect_dedup(self, create: bool) -> bool:
        """Whether `data` has the index that makes values unique; maybe `create` it."""

    # --- opening ------------------------------------------------------------------

    def open_database(self, dedup: bool, reset: bool = False) -> None:
        """Create or migrate the tables, and remove what a crash left.

        In one SQL transaction. `dedup`: for new tables; `reset`: drop the old ones.
        """
        self._dedup_wanted = dedup
        self._reset_memory()
        self.begin(durable=True)
        try:
            if reset:
                for table in schema.TABLES:
                    self.execute(f"DROP TABLE IF EXISTS {table.name}")
            self._open_tables()
            self._load_layout()
            self._load_unfinished()
            self._remove_stale_pack_orders()
            self._remove_spilled()
        except BaseException:
            self.rollback()
            raise
        self.commit()

    def _open_tables(self) -> None:
        new = not self.columns("data")
        config: dict[str, str] = {}
        if self.columns("config"):
            config.update(self.fetch("SELECT name, value FROM config"))
            new = new and not config
        elif not new:
            raise ConfigurationError("this is not a database of NEO: no table 'config'")
        version = int(config.get("version") or 0)
        if version > schema.VERSION:
            raise ConfigurationError(
                f"database format {version} can not be downgraded:"
                f" version {schema.VERSION} or older expected"
            )
        # The version comes with the tables: some without it would mean version 0.
        self.create_table(schema.CONFIG)
        if new:
            self.set_config("version", str(schema.VERSION))
        else:
            migrate(self, version)
        for table in schema.TABLES:
            self.create_table(table)
            self.create_indexes(table)
        self.dedup = self.detect_dedup(create=new and self._dedup_wanted)

    def _load_layout(self) -> None:
        self.layout.nid = self._settings().nid
        last = self.fetch("SELECT MAX(partition) FROM pt")[0][0]
        self.layout.partitions = 1 if last is None else last + 1

    def _load_unfinished(self) -> None:
        for ttid, data_id in self.fetch("SELECT tid, data_id FROM tobj"):
            self._voted.setdefault(ttid, []).append(data_id)
            if data_id is not None:
                self._refer(data_id)
        for (ttid,) in self.fetch("SELECT ttid FROM ttrans"):
            self._voted.setdefault(ttid, [])
        for (ttid,) in self.fetch(
            "SELECT ttid FROM ttrans JOIN pack ON pack.tid = ttid"
        ):
            self._with_pack[ttid] = None

    def _remove_stale_pack_orders(self) -> None:
        """Remove orders whose transaction neoppod aborted (19, item 1).

        The master would take them for orders that wait to be signed, for ever.
        """
        orders = self.fetch(
            "SELECT tid FROM pack WHERE"
            " NOT EXISTS (SELECT 1 FROM ttrans WHERE ttrans.ttid = pack.tid)"
        )
        for (tid,) in orders:
            self._delete_lost_pack_order(tid)

    def _delete_lost_pack_order(self, tid: int) -> None:
        args = (tid % self.layout.partitions, tid)
        if not self.fetch("SELECT 1 FROM trans WHERE partition = ? AND tid = ?", args):
            self.execute("DELETE FROM pack WHERE tid = ?", (tid,))

    def _remove_spilled(self) -> None:
        for name, value in self.fetch("SELECT name, value FROM config"):
            if not name.startswith(MARK):
                continue
            first = int(name.removeprefix(MARK))
            data_id: int | None = int(value)
            while data_id is not None:
                data_id = self._prune_orphans(
                    data_id, first + DATA_ID_RANGE - 1, PAGE, dry_run=False
                )[1]
            self.set_config(name, None)

    def erase(self) -> None:
        self.open_database(self._dedup_wanted, reset=True)

    # --- settings -----------------------------------------------------------------

    def set_config(self, name: str, value: str | None) -> None:
        if value is None:
            self.execute("DELETE FROM config WHERE name = ?", (name,))
        else:
            self.execute("REPLACE INTO config VALUES (?, ?)", (name, value))

    def _settings(self) -> Settings:
        """As the transaction of the writer sees them."""
        return parse_settings(dict(self.fetch("SELECT name, value FROM config")))

    def set_name(self, name: str) -> None:
        self.set_config("name", name)

    def set_nid(self, nid: int) -> None:
        if self.layout.nid not in (None, nid):
            self.execute("DELETE FROM pt WHERE nid = ?", (nid,))
            self.execute("UPDATE pt SET nid = ? WHERE nid = ?", (nid, self.layout.nid))
        self.set_config("nid", str(nid))
        self.layout.nid = nid

    def set_backup_tid(self, tid: Tid | None) -> None:
        self.set_config("backup_tid", None if tid is None else tid.hex())

    def set_truncate_tid(self, tid: Tid) -> None:
        self.set_config("backup_tid", None)
        self.set_config("truncate_tid", tid.hex())

    # --- partition table ------------------------------------------------------------

    def change_partition_table(
        self,
        ptid: int,
        replicas: int,
        cells: Iterable[tuple[int, int, CellState]],
        reset: bool = False,
        last_pack: Tid = bytes(8),
    ) -> None:
        tid_by_cell = {
            (partition, nid): tid
            for partition, nid, tid in self.fetch("SELECT partition, nid, tid FROM pt")
        }
        gone = dict.fromkeys(tid_by_cell) if reset else {}
        for partition, nid, state in cells:
            cell = partition, nid
            own = nid == self.layout.nid
            if (
                own
                and not reset
                and state in (CellState.DISCARDED, CellState.CORRUPTED)
            ):
                self._forget_partition(partition)
            if state is CellState.DISCARDED:
                gone[cell] = None
                continue
            gone.pop(cell, None)
            tid = -state.value
            if own and state is CellState.OUT_OF_DATE:
                tid = self._start_of_replication(partition, tid_by_cell.get(cell, 0))
            if cell in tid_by_cell:
                self.execute(
                    "UPDATE pt SET tid = ? WHERE partition = ? AND nid = ?",
                    (tid, partition, nid),
                )
            else:
                pack = None
                if own:
                    pack = 0 if state in READABLE else u64(last_pack)
                self.execute(
                    "INSERT INTO pt VALUES (?, ?, ?, ?)", (partition, nid, tid, pack)
                )
        self.execute_many("DELETE FROM pt WHERE partition = ? AND nid = ?", gone)
        self.set_config("ptid", str(ptid))
        self.set_config("replicas", str(replicas))
        last = self.fetch("SELECT MAX(partition) FROM pt")[0][0]
        self.layout.partitions = 1 if last is None else last + 1

    def _start_of_replication(self, partition: int, tid: int) -> int:
        """Progress of a cell that gets OUT_OF_DATE, from its `pt.tid` before (5.1)."""
        if tid >= 0:
            return tid
        if tid not in READABLE_TIDS:
            return 0
        backup_tid = self._settings().backup_tid
        if backup_tid is not None:
            return clip(backup_tid)
        return max(
            self.fetch(sql, (partition,))[0][0] or 0
            for sql in (self.LAST_TRANSACTION, self.LAST_OBJECT_TID)
        )

    def _forget_partition(self, partition: int) -> None:
        """Drop what unfinished transactions wrote to a partition (13.1)."""
        rows = self.fetch(
            "SELECT tid, data_id FROM tobj WHERE partition = ?", (partition,)
        )
        self.execute("DELETE FROM tobj WHERE partition = ?", (partition,))
        for ttid in {row[0]: None for row in rows}:
            left = self.fetch("SELECT data_id FROM tobj WHERE tid = ?", (ttid,))
            self._voted[ttid] = [data_id for (data_id,) in left]
        self._release(data_id for _, data_id in rows)
        for (ttid,) in self.fetch(
            "SELECT ttid FROM ttrans WHERE partition = ?", (partition,)
        ):
            self._forget_metadata(ttid)

    def _forget_metadata(self, ttid: int) -> None:
        self.execute("DELETE FROM ttrans WHERE ttid = ?", (ttid,))
        if self._with_pack.pop(ttid, ttid) is None:
            self._delete_lost_pack_order(ttid)

    def set_replicated(self, partition: int, tid: Tid) -> None:
        self.execute(
            "UPDATE pt SET tid = ? WHERE partition = ? AND nid = ? AND tid >= 0",
            (u64(tid), partition, self.layout.nid),
        )

    def set_packed(self, partition: int, pack_id: Tid) -> None:
        self.execute(
            "UPDATE pt SET pack = ? WHERE partition = ? AND nid = ?",
            (u64(pack_id), partition, self.layout.nid),
        )

    # --- data -----------------------------------------------------------------------

    def _refer(self, data_id: int) -> None:
        self._references[data_id] = self._references.get(data_id, 0) + 1

    def _unrefer(self, data_ids: Iterable[int | None]) -> list[int]:
        """Count down; return those that only committed records may refer to now."""
        free = []
        for data_id in data_ids:
            if data_id is None:
                continue
            count = self._references[data_id] - 1
            if count:
                self._references[data_id] = count
            else:
                del self._references[data_id]
                free.append(data_id)
        return free

    def _release(self, data_ids: Iterable[int | None]) -> None:
        self._prune(self._unrefer(data_ids))

    PRUNE = (
        "DELETE FROM data WHERE id = ?"
        " AND NOT EXISTS (SELECT 1 FROM obj WHERE obj.data_id = data.id)"
    )

    def _prune(self, data_ids: Iterable[int | None]) -> None:
        """Delete the values among them that nothing refers to any more."""
        self.execute_many(
            self.PRUNE,
            [
                (data_id,)
                for data_id in data_ids
                if data_id is not None and data_id not in self._references
            ],
        )

    def _next_id(self, first: int) -> int:
        """Next data id of the partition whose first one is `first` (6.1)."""
        data_id = self._next_data_id.get(first)
        if data_id is None:
            last = self.fetch(
                "SELECT MAX(id) FROM data WHERE id >= ? AND id <= ?",
                (first, first + DATA_ID_RANGE - 1),
            )[0][0]
            data_id = self._next_data_id[first] = first if last is None else last + 1
        return data_id

    def _new_data_id(self, partition: int) -> int:
        first = _first_data_id(partition)
        data_id = self._next_id(first)
        self._next_data_id[first] = data_id + 1
        return data_id

    INSERT_DATA = "INSERT INTO data VALUES (?, ?, ?, ?)"
    EQUAL_DATA = "SELECT id, value FROM data WHERE hash = ? AND compression = ?"

    def _store_value(self, partition: int, value: Value, rows: list[Row]) -> int:
        """Data id of a value; its row is put in `rows`, or inserted at once (dedup)."""
        checksum, data, compression = value
        if not self.dedup:
            data_id = self._new_data_id(partition)
            rows.append((data_id, checksum, compression, data))
            return data_id
        for data_id, other in self.fetch(self.EQUAL_DATA, (checksum, compression)):
            if other != data:
                raise BackendError(
                    f"data {data_id} has the checksum of another value:"
                    f" {checksum.hex()}"
                )
            return int(data_id)
        data_id = self._new_data_id(partition)
        self.execute(self.INSERT_DATA, (data_id, checksum, compression, data))
        return data_id

    def _insert_value(self, partition: int, value: Value) -> int:
        rows: list[Row] = []
        data_id = self._store_value(partition, value, rows)
        for row in rows:
            self.execute(self.INSERT_DATA, row)
        return data_id

    def spill(self, oid: Oid, value: Value) -> int:
        partition = u64(oid) % self.layout.partitions
        first = _first_data_id(partition)
        if first not in self._marks:
            self._marks[first] = None
            self.set_config(f"{MARK}{first}", str(self._next_id(first)))
        data_id = self._insert_value(partition, value)
        self._refer(data_id)
        self._spilled[data_id] = self._spilled.get(data_id, 0) + 1
        return data_id

    def _forget_spilled(self, data_id: int) -> None:
        """Note that a spilled value is voted or released: one use less."""
        count = self._spilled.pop(data_id) - 1
        if count:
            self._spilled[data_id] = count
        elif not self._spilled:
            for first in self._marks:
                self.set_config(f"{MARK}{first}", None)
            self._marks.clear()

    def release(self, data_ids: Iterable[int]) -> None:
        data_ids = list(data_ids)
        for data_id in data_ids:
            self._forget_spilled(data_id)
        self._release(data_ids)

    # --- transactions -----------------------------------------------------------------

    def vote(
        self, ttid: Tid, stores: Sequence[Store], metadata: Metadata | None
    ) -> None:
        number = u64(ttid)
        assert number not in self._voted, ttid
        partitions = self.layout.partitions
        values: list[Row] = []
        records = []
        data_ids: list[int | None] = []
        for oid, value_tid, value in stores:
            oid_number = u64(oid)
            partition = oid_number % partitions
            data_id = pointed = None
            if value_tid is not None:
                pointed = self._pointed(partition, oid_number, u64(value_tid))
            if isinstance(value, int):
                self._forget_spilled(value)
            if pointed is not None:
                (data_id,) = pointed
                if isinstance(value, int):
                    self._release([value])
                value = None
            if isinstance(value, int):
                data_id = value
            else:
                if value is not None:
                    data_id = self._store_value(partition, value, values)
                if data_id is not None:
                    self._refer(data_id)
            data_ids.append(data_id)
            records.append(
                (partition, oid_number, number, data_id, value_tid and u64(value_tid))
            )
        self.execute_many(self.INSERT_DATA, values)
        self.execute_many("INSERT INTO tobj VALUES (?, ?, ?, ?, ?)", records)
        self._voted[number] = data_ids
        if metadata is not None:
            self._vote_metadata(number, metadata)

    def _pointed(self, partition: int, oid: int, tid: int) -> Row | None:
        """Row with the data id of an existing revision."""
        rows = self.fetch(self.HAS_REVISION, (partition, oid, tid))
        return rows[0] if rows else None

    INSERT_TTRANS = "INSERT INTO ttrans VALUES (?, NULL, 0, ?, ?, ?, ?, ?)"
    REPLACE_PACK = "REPLACE INTO pack VALUES (?, ?, ?, ?, ?)"

    def _vote_metadata(self, ttid: int, metadata: Metadata) -> None:
        self.execute(
            self.INSERT_TTRANS,
            (
                ttid % self.layout.partitions,
                b"".join(metadata.oids),
                metadata.user,
                metadata.description,
                metadata.extension,
                ttid,
            ),
        )
        if metadata.pack:
            oids, pack_tid = metadata.pack
            self._insert_pack(ttid, PackOrder(None, oids is not None, oids, pack_tid))
            self._with_pack[ttid] = None

    def _insert_pack(self, tid: int, order: PackOrder) -> None:
        approved, partial, oids, pack_tid = order
        packed_oids = None if oids is None else b"".join(sorted(oids))
        self.execute(
            self.REPLACE_PACK, (tid, approved, partial, packed_oids, u64(pack_tid))
        )

    def lock(self, ttid: Tid, tid: Tid, pack: bool) -> None:
        number = u64(ttid)
        self.execute("UPDATE ttrans SET tid = ? WHERE ttid = ?", (u64(tid), number))
        if pack:
            self.execute("UPDATE pack SET approved = 1 WHERE tid = ?", (number,))

    UNLOCK_TRANS = (
        "REPLACE INTO trans"
        " SELECT partition, ?, packed, oids, user, description, ext, ttid"
        " FROM ttrans WHERE ttid = ?"
    )
    UNLOCK_OBJ = (
        " INTO obj SELECT partition, oid, ?, data_id, value_tid FROM tobj WHERE tid = ?"
    )
    UNLOCK_CONFLICTS = (
        "SELECT obj.partition, obj.oid, obj.tid, obj.data_id, tobj.data_id,"
        " tobj.value_tid FROM tobj JOIN obj ON obj.partition = tobj.partition"
        " AND obj.oid = tobj.oid AND obj.tid = ? WHERE tobj.tid = ?"
    )
    UPDATE_OBJ = (
        "UPDATE obj SET data_id = ?, value_tid = ?"
        " WHERE partition = ? AND oid = ? AND tid = ?"
    )

    def unlock(self, ttid: Tid, tid: Tid) -> None:
        old, new = u64(ttid), u64(tid)
        data_ids = self._voted.pop(old, None)
        if data_ids is None:
            return
        if self.execute(self.UNLOCK_TRANS, (new, old)):
            self.execute("DELETE FROM ttrans WHERE ttid = ?", (old,))
            if self._with_pack.pop(old, old) is None and old != new:
                self.execute("DELETE FROM pack WHERE tid = ?", (new,))
                self.execute("UPDATE pack SET tid = ? WHERE tid = ?", (new, old))
        if not data_ids:
            return
        # What replication brought is found again, or counted as replaced: the records
        # of the transaction are surely complete.
        replaced = []
        inserted = self.execute(self.INSERT_IGNORE + self.UNLOCK_OBJ, (new, old))
        if inserted != len(data_ids):
            for partition, oid, _, before, data_id, value_tid in self.fetch(
                self.UNLOCK_CONFLICTS, (new, old)
            ):
                if before != data_id:
                    replaced.append(before)
                self.execute(self.UPDATE_OBJ, (data_id, value_tid, partition, oid, new))
        self.execute("DELETE FROM tobj WHERE tid = ?", (old,))
        self._unrefer(data_ids)
        self._prune(replaced)

    def validate(self, ttid: Tid, tid: Tid) -> None:
        self.unlock(ttid, tid)  # which needs no lock within one SQL transaction

    def abort(self, ttid: Tid) -> None:
        number = u64(ttid)
        data_ids = self._voted.pop(number, None)
        if data_ids is not None:
            self._forget_metadata(number)
            self.execute("DELETE FROM tobj WHERE tid = ?", (number,))
            self._release(data_ids)

    def drop_unfinished(self) -> None:
        for ttid in list(self._voted):
            self.abort(p64(ttid))
        self.release(
            data_id
            for data_id, count in list(self._spilled.items())
            for _ in range(count)
        )

    # --- packing ------------------------------------------------------------------

    def sign_packs(
        self, approved: Iterable[Tid], rejected: Iterable[Tid]
    ) -> tuple[list[Tid], list[Tid]]:
        return self._sign_packs(approved, 1), self._sign_packs(rejected, 0)

    def _sign_packs(self, ids: Iterable[Tid], approved: int) -> list[Tid]:
        missing = []
        for pack_id in ids:
            # The count of changed rows doesn't tell: some databases don't count rows
            # that have the value already.
            args = (u64(pack_id),)
            if self.fetch("SELECT 1 FROM pack WHERE tid = ?", args):
                self.execute(
                    "UPDATE pack SET approved = ? WHERE tid = ?", (approved, *args)
                )
            else:
                missing.append(pack_id)
        return missing

    LAST_REVISION = (
        "SELECT oid, tid, 2, data_id FROM obj"
        " WHERE partition = ? AND oid = ? AND tid <= ? ORDER BY tid DESC LIMIT 1"
    )

    def pack_partition(
        self,
        partition: int,
        pack_tid: Tid,
        min_oid: Oid,
        length: int,
        oids: Sequence[Oid] | None = None,
    ) -> Oid | None:
        bound = clip(pack_tid)
        if oids is None:
            if u64(min_oid) > ID_MAX:
                return None
            rows = self.fetch(
                self.LAST_REVISIONS, (partition, u64(min_oid), bound, length, partition)
            )
            next_oid = self._next_oid([row[0] for row in rows], length)
        else:
            among = self._oids_of(partition, min_oid, oids)
            next_oid = p64(among[length]) if len(among) > length else None
            rows = []
            for oid in among[:length]:
                rows += self.fetch(self.LAST_REVISION, (partition, oid, bound))
        for oid, tid, revisions, data_id in rows:
            if data_id is None:
                self._delete_revisions(partition, oid, tid)
            elif revisions > 1:
                self._delete_revisions(partition, oid, tid - 1)
        return next_oid

    def _oids_of(self, partition: int, min_oid: Oid, oids: Sequence[Oid]) -> list[int]:
        return sorted(
            number
            for oid in dict.fromkeys(oids)
            if oid >= min_oid
            and (number := u64(oid)) % self.layout.partitions == partition
            and number <= ID_MAX
        )

    def _delete_revisions(self, partition: int, oid: int, last: int) -> None:
        where = "FROM obj WHERE partition = ? AND oid = ? AND tid <= ?"
        args = (partition, oid, last)
        rows = self.fetch(f"SELECT data_id {where}", args)
        self.execute(f"DELETE {where}", args)
        self._prune(dict.fromkeys(data_id for (data_id,) in rows))

    # --- replication ----------------------------------------------------------------

    REPLACE_TRANS = "REPLACE INTO trans VALUES (?, ?, ?, ?, ?, ?, ?, ?)"

    def add_transaction(self, tid: Tid, transaction: Transaction) -> None:
        number = u64(tid)
        user, description, extension, oids, packed, ttid, pack = transaction
        self.execute(
            self.REPLACE_TRANS,
            (
                number % self.layout.partitions,
                number,
                packed,
                b"".join(oids),
                user,
                description,
                extension,
                u64(ttid),
            ),
        )
        if pack is None:
            self.execute("DELETE FROM pack WHERE tid = ?", (number,))
        else:
            self._insert_pack(number, pack)

    INSERT_OBJ = " INTO obj VALUES (?, ?, ?, ?, ?)"

    def add_object(
        self, oid: Oid, tid: Tid, value: Value | None, value_tid: Tid | None
    ) -> None:
        oid_number, tid_number = u64(oid), u64(tid)
        partition = oid_number % self.layout.partitions
        key = partition, oid_number, tid_number
        pointed = value_tid and self._pointed(partition, oid_number, u64(value_tid))
        if pointed:
            (data_id,) = pointed
        else:
            data_id = value and self._insert_value(partition, value)
        pointer = value_tid and u64(value_tid)
        if self.execute(self.INSERT_IGNORE + self.INSERT_OBJ, (*key, data_id, pointer)):
            return
        before = self._pointed(*key)
        self.execute(self.UPDATE_OBJ, (data_id, pointer, *key))
        if before and before[0] != data_id:
            self._prune(before)
            log.warning(
                "record %s of %s was here already, replaced", oid.hex(), tid.hex()
            )

    def delete_transaction(self, tid: Tid) -> None:
        number = u64(tid)
        self.execute(
            "DELETE FROM trans WHERE partition = ? AND tid = ?",
            (number % self.layout.partitions, number),
        )
        self.execute("DELETE FROM pack WHERE tid = ?", (number,))

    def delete_object(self, oid: Oid, tid: Tid) -> None:
        number = u64(oid)
        key = number % self.layout.partitions, number, u64(tid)
        if pointed := self._pointed(*key):
            self._delete_objects([(*key, *pointed)])

    # --- removal, repair --------------------------------------------------------------

    def _delete_objects(self, rows: Sequence[Row]) -> None:
        """Delete records (partition, oid, tid, data id), and data only they used."""
        self.execute_many(
            "DELETE FROM obj WHERE partition = ? AND oid = ? AND tid = ?",
            [row[:3] for row in rows],
        )
        self._prune(dict.fromkeys(row[3] for row in rows))

    # From the end, so that what is left of an interrupted truncation is a past state.
    OBJECTS_DOWN = (
        "SELECT partition, oid, tid, data_id FROM obj WHERE partition = ? AND tid > ?"
        " ORDER BY tid DESC, oid DESC LIMIT ?"
    )
    TRANSACTIONS_DOWN = (
        "SELECT tid FROM trans WHERE partition = ? AND tid > ?"
        " ORDER BY tid DESC LIMIT ?"
    )

    def _delete_after(self, partition: int, tid: int, limit: int) -> bool:
        """Delete at most `limit` rows of each kind, from the end; True: call again."""
        rows = self.fetch(self.OBJECTS_DOWN, (partition, tid, limit))
        self._delete_objects(rows)
        if len(rows) == limit:
            return True
        tids = self.fetch(self.TRANSACTIONS_DOWN, (partition, tid, limit))
        self.execute_many(
            "DELETE FROM trans WHERE partition = ? AND tid = ?",
            [(partition, *row) for row in tids],
        )
        self.execute_many("DELETE FROM pack WHERE tid = ?", tids)
        return len(tids) == limit

    def truncate(self, limit: int) -> bool:
        truncate_tid = self._settings().truncate_tid
        if truncate_tid is None:
            return False
        tid = clip(truncate_tid)
        nid = self.layout.nid
        self.execute("UPDATE pt SET tid = ? WHERE nid = ? AND tid > ?", (tid, nid, tid))
        for (partition,) in self.fetch(
            "SELECT partition FROM pt WHERE nid = ? ORDER BY partition", (nid,)
        ):
            if self._delete_after(partition, tid, limit):
                return True
        self.set_config("truncate_tid", None)
        return False

    def drop_partition(self, partition: int, limit: int) -> bool:
        if self.fetch(
            "SELECT 1 FROM pt WHERE partition = ? AND nid = ?",
            (partition, self.layout.nid),
        ):
            return False
        return self._delete_after(partition, -1, limit)

    def prune_orphans(
        self, min_id: int, limit: int, dry_run: bool
    ) -> tuple[int, int | None]:
        return self._prune_orphans(min_id, ID_MAX, limit, dry_run)

    UNREFERRED = (
        "SELECT id, NOT EXISTS (SELECT 1 FROM obj WHERE obj.data_id = data.id)"
        " FROM data WHERE id >= ? AND id <= ? ORDER BY id LIMIT ?"
    )

    def _prune_orphans(
        self, min_id: int, max_id: int, limit: int, dry_run: bool
    ) -> tuple[int, int | None]:
        rows = self.fetch(self.UNREFERRED, (min_id, max_id, limit))
        orphans = [
            data_id
            for data_id, unreferred in rows
            if unreferred and data_id not in self._references
        ]
        if not dry_run:
            self._prune(orphans)
        return len(orphans), rows[-1][0] + 1 if len(rows) == limit else None


def _first_data_id(partition: int) -> int:
    """First data id of a partition: a matter of placement only (6.1)."""
    return (partition & PARTITION_MASK) << DATA_ID_BITS
