"""What all writes in SQL need: statements, settings, and the life of values.

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

from abc import abstractmethod
from collections.abc import Iterable, Sequence

from neo.lib.exception import BackendError
from neo.lib.util import u64

from . import schema
from .interface import Oid, PackOrder, Settings, Value
from .reader import PAGE, Row, SQLReader, decode_config, parse_settings

DATA_ID_BITS = 48  # each partition has a range of data ids
DATA_ID_RANGE = 1 << DATA_ID_BITS
PARTITION_MASK = 0x7FFF  # of what a signed 64-bit data id has room for
MARK = "spill."  # prefix of the settings that mark spilled values


class SQLWriter(SQLReader):
    """Statements in the transaction of the writer, settings and values."""

    dedup: bool

    # Conflicts with existing rows are rare, and handled after.
    INSERT_IGNORE = "INSERT OR IGNORE"
    TABLES: tuple[schema.Table, ...] = schema.TABLES

    def _reset_memory(self) -> None:
        """Forget what is counted in memory."""
        self._references: dict[int, int] = {}  # data id -> uses that aren't committed
        self._spilled: dict[int, int] = {}  # data id -> uses
        self._marks: dict[int, int] = {}  # first data id of a range -> lowest spilled
        self._replicated = 0  # greatest tid of the records that replication brought
        self._next_data_id: dict[int, int] = {}  # by first data id of the partition

    # --- what a database brings -------------------------------------------------

    @abstractmethod
    def begin(self, durable: bool) -> None: ...

    @abstractmethod
    def commit(self) -> None: ...

    @abstractmethod
    def rollback(self) -> None: ...

    @abstractmethod
    def execute(self, sql: str, args: Sequence[object] = ()) -> None:
        """Execute in the transaction of the writer, at the latest at its commit."""

    @abstractmethod
    def execute_many(self, sql: str, rows: Iterable[Sequence[object]]) -> None:
        """Likewise, for each of `rows`: a database may send them together."""

    @abstractmethod
    def change(self, sql: str, args: Sequence[object] = ()) -> int:
        """Execute now; return the rows changed."""

    @abstractmethod
    def fetch(self, sql: str, args: Sequence[object] = ()) -> list[Row]:
        """All rows, as the transaction of the writer sees them."""

    @abstractmethod
    def table_names(self) -> list[str]:
        """Names of all tables but the database's own."""

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

    # --- settings -----------------------------------------------------------------

    def set_config(self, name: str, value: str | None) -> None:
        if value is None:
            self.execute("DELETE FROM config WHERE name = ?", (name,))
        else:
            self.execute("REPLACE INTO config VALUES (?, ?)", (name, value))

    def _settings(self) -> Settings:
        """As the transaction of the writer sees them."""
        return parse_settings(self._config())

    def _config(self) -> dict[str, str]:
        return decode_config(self.fetch(self.CONFIG))

    # --- rows of several tables -----------------------------------------------------

    def _pointed(self, partition: int, oid: int, tid: int) -> Row | None:
        """Row with the data id of an existing revision."""
        rows = self.fetch(self.HAS_REVISION, (partition, oid, tid))
        return rows[0] if rows else None

    UPDATE_OBJ = (
        "UPDATE obj SET data_id = ?, value_tid = ?"
        " WHERE partition = ? AND oid = ? AND tid = ?"
    )

    REPLACE_PACK = "REPLACE INTO pack VALUES (?, ?, ?, ?, ?)"

    def _insert_pack(self, tid: int, order: PackOrder) -> None:
        approved, partial, oids, pack_tid = order
        packed_oids = None if oids is None else b"".join(sorted(oids))
        self.execute(
            self.REPLACE_PACK, (tid, approved, partial, packed_oids, u64(pack_tid))
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

    LAST_DATA_IDS = (
        "SELECT MAX(id) FROM data WHERE id >= ? AND id <= ?",
        "SELECT MAX(data_id) FROM obj WHERE data_id >= ? AND data_id <= ?",
        "SELECT MAX(data_id) FROM tobj WHERE data_id >= ? AND data_id <= ?",
    )

    def _next_id(self, first: int) -> int:
        """Next data id of the partition whose first one is `first` (6.1)."""
        data_id = self._next_data_id.get(first)
        if data_id is None:
            bounds = first, first + DATA_ID_RANGE - 1
            # Rows of data may be lost: what refers to them must not get another value.
            used = [
                last
                for sql in self.LAST_DATA_IDS
                if (last := self.fetch(sql, bounds)[0][0]) is not None
            ]
            data_id = self._next_data_id[first] = max(used, default=first - 1) + 1
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
        if self.dedup:
            for data_id, other in self._find_equal(checksum, compression):
                check_equal(data_id, checksum, data, other)
                return int(data_id)
        data_id = self._new_data_id(partition)
        row = data_id, checksum, compression, data
        if self.dedup:
            self.execute(self.INSERT_DATA, row)
        else:
            rows.append(row)
        return data_id

    def _find_equal(self, checksum: bytes, compression: int) -> Sequence[Row]:
        """(id, value) of what is in `data` with this checksum."""
        return self.fetch(self.EQUAL_DATA, (checksum, compression))

    def _insert_value(self, partition: int, value: Value) -> int:
        rows: list[Row] = []
        data_id = self._store_value(partition, value, rows)
        for row in rows:
            self.execute(self.INSERT_DATA, row)
        return data_id

    def spill(self, oid: Oid, value: Value) -> int:
        data_id = self._insert_value(u64(oid) % self.layout.partitions, value)
        # With dedup, an equal value may have any id, and lose its other references.
        first = data_id - data_id % DATA_ID_RANGE
        if data_id < self._marks.get(first, data_id + 1):
            self._marks[first] = data_id
            self.set_config(f"{MARK}{first}", str(data_id))
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

    def _remove_spilled(self) -> None:
        for name, value in self._config().items():
            if not name.startswith(MARK):
                continue
            first = int(name.removeprefix(MARK))
            data_id: int | None = int(value)
            while data_id is not None:
                data_id = self._prune_orphans(
                    data_id, first + DATA_ID_RANGE - 1, PAGE, dry_run=False
                )[1]
            self.set_config(name, None)

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


def check_equal(data_id: int, checksum: bytes, data: bytes, other: bytes) -> None:
    """Raise BackendError if a value found by the checksum of `data` is another one."""
    if other != data:
        raise BackendError(
            f"data {data_id} has the checksum of another value: {checksum.hex()}"
        )


def _first_data_id(partition: int) -> int:
    """First data id of a partition: a matter of placement only (6.1)."""
    return (partition & PARTITION_MASK) << DATA_ID_BITS
