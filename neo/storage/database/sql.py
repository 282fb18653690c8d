"""The writer face in SQL, and what happens when a database is opened.

Life of a transaction (8.1): `vote` inserts its values in `data`, its records in `tobj`
(whose tid is the ttid) and its metadata in `ttrans`; `lock` writes the final tid there;
`unlock` moves the records to `obj` and the metadata to `trans`. The rows of `tobj` and
`ttrans` are what a crash leaves to be recovered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from neo.lib.exception import ConfigurationError
from neo.lib.protocol import READABLE, CellState
from neo.lib.util import p64, u64

from . import schema
from .interface import Metadata, PackOrder, Store, Tid
from .maintenance import SQLMaintenance
from .migration import migrate
from .reader import Layout, Row, clip

READABLE_TIDS = frozenset(-state.value for state in READABLE)  # in `pt.tid`


class SQLBackend(SQLMaintenance):
    """See `interface.Backend`. Subclasses bring the connections."""

    def __init__(self) -> None:
        self.layout = Layout()

    def _reset_memory(self) -> None:
        super()._reset_memory()
        self._voted: dict[int, list[int | None]] = {}  # ttid -> data id of each record
        self._recovered: frozenset[int] = frozenset()  # ttids that the opening found
        self._with_metadata: dict[int, None] = {}  # ttids of those with metadata
        self._with_pack: dict[int, None] = {}  # and with a pack order

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
                self.drop_tables()
            self._open_tables()
            self._load_layout()
            self._load_unfinished()
            self._remove_stale_pack_orders()
            self._remove_spilled()
            self.commit()
        except BaseException:
            self.rollback()
            raise

    def drop_tables(self) -> None:
        for table in self.TABLES:
            self.execute(f"DROP TABLE IF EXISTS {table.name}")

    def _open_tables(self) -> None:
        new = not self.columns("data")
        config: dict[str, str] = {}
        if self.columns("config"):
            config = self._config()
            new = new and not config
        else:
            # Log files are databases, too, as are those of other applications: a wrong
            # path or name must not make one this node's.
            ours = {table.name for table in self.TABLES}
            for name in self.table_names():
                if name not in ours:
                    raise ConfigurationError(
                        f"this is not a database of NEO: it has a table {name!r}"
                    )
            if not new:
                raise ConfigurationError(
                    "this is not a database of NEO: no table 'config'"
                )
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
        for table in self.TABLES:
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
            self._with_metadata[ttid] = None
        self._recovered = frozenset(self._voted)
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

    def erase(self) -> None:
        self.open_database(self._dedup_wanted, reset=True)

    # --- settings and partition table -------------------------------------------------

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
        if self._with_metadata.pop(ttid, ttid) is None:
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

    INSERT_TTRANS = "INSERT INTO ttrans VALUES (?, NULL, 0, ?, ?, ?, ?, ?)"

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
        self._with_metadata[ttid] = None
        if metadata.pack:
            oids, pack_tid = metadata.pack
            self._insert_pack(ttid, PackOrder(None, oids is not None, oids, pack_tid))
            self._with_pack[ttid] = None

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

    def unlock(self, ttid: Tid, tid: Tid) -> None:
        old, new = u64(ttid), u64(tid)
        data_ids = self._voted.pop(old, None)
        if data_ids is None:
            return
        if self._with_metadata.pop(old, old) is None:
            self.execute(self.UNLOCK_TRANS, (new, old))
            self.execute("DELETE FROM ttrans WHERE ttid = ?", (old,))
            if self._with_pack.pop(old, old) is None and old != new:
                self.execute("DELETE FROM pack WHERE tid = ?", (new,))
                self.execute("UPDATE pack SET tid = ? WHERE tid = ?", (new, old))
        if not data_ids:
            return
        replaced: list[int | None] = []
        if new > self._replicated and old not in self._recovered:
            # It is a new tid: nobody brought its records before. No need to count.
            self.execute("INSERT" + self.UNLOCK_OBJ, (new, old))
        elif self.change(self.INSERT_IGNORE + self.UNLOCK_OBJ, (new, old)) != len(
            data_ids
        ):
            replaced = self._replace_replicated(old, new)
        self.execute("DELETE FROM tobj WHERE tid = ?", (old,))
        self._unrefer(data_ids)
        self._prune(replaced)

    def _replace_replicated(self, old: int, new: int) -> list[int | None]:
        """Put the records of a transaction where replication brought others.

        Those of the transaction are surely complete. Returns the data ids that were
        replaced.
        """
        replaced = []
        for partition, oid, _, before, data_id, value_tid in self.fetch(
            self.UNLOCK_CONFLICTS, (new, old)
        ):
            if before != data_id:
                replaced.append(before)
            self.execute(self.UPDATE_OBJ, (data_id, value_tid, partition, oid, new))
        return replaced

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
