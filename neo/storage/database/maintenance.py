"""Writes that are not of clients' transactions: packing, replication, removal, repair.

What grows with the data is done in slices that the caller limits, each of them a whole:
the database itself tells where the next one starts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from neo.lib.util import p64, u64

from .interface import Oid, Tid, Transaction, Value
from .reader import ID_MAX, Row, clip
from .writer import SQLWriter

log = logging.getLogger(__name__)


class SQLMaintenance(SQLWriter):
    """See `interface.Backend`, from packing on."""

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
        args = (*key, data_id, pointer)
        self._replicated = max(self._replicated, tid_number)
        if self.change(self.INSERT_IGNORE + self.INSERT_OBJ, args):
            return
        before = self._pointed(*key)
        self.execute(self.UPDATE_OBJ, (data_id, pointer, *key))
        if before and before[0] != data_id:
            self._prune(before)
            log.warning(
                "record %s of %s was here already, replaced", oid.hex(), tid.hex()
            )

    SHARING = "SELECT partition, oid, tid FROM obj WHERE data_id = ?"
    SET_DATA = "UPDATE obj SET data_id = ? WHERE partition = ? AND oid = ? AND tid = ?"

    def restore_value(self, oid: Oid, tid: Tid, value: Value) -> bool:
        partition = u64(oid) % self.layout.partitions
        pointed = self._pointed(partition, u64(oid), u64(tid))
        if pointed is None or pointed[0] is None:
            return True
        (damaged,) = pointed
        if damaged in self._references:
            return False
        keys = self.fetch(self.SHARING, (damaged,))
        # First, for `dedup` would find it again.
        self.execute_many(self.SET_DATA, [(None, *key) for key in keys])
        self._prune([damaged])
        data_id = self._insert_value(partition, value)
        self.execute_many(self.SET_DATA, [(data_id, *key) for key in keys])
        return True

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
