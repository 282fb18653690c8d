"""What the master asks of a storage node: in every phase, and before operation.

Packets of one connection are handled in order, and a phase that writes must be able to
read it again: the connection of the master is paused while the writer is busy on its
behalf. Source: behaviour 2.5, 5.1 and 5.3, storage-format 16 and 17.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.handler import Handler
from neo.lib.protocol import (
    MAX_TID,
    ZERO_TID,
    AnswerFinalTID,
    AnswerLastIDs,
    AnswerLastTids,
    AnswerLockedTransactions,
    AnswerPackOrders,
    AnswerPartitionTable,
    AnswerRecovery,
    CellState,
    ClusterState,
    NodeRow,
    NotifyPackCompleted,
    Rows,
)

from .database.interface import Tid

if TYPE_CHECKING:
    from .app import StorageNode

# Rows of each kind that one slice of a truncation deletes.
TRUNCATION_SLICE = 10_000

Cells = Sequence[tuple[int, int, CellState]]


class MasterHandler(Handler):
    """What the master says in every phase."""

    def __init__(self, node: StorageNode) -> None:
        super().__init__()
        self.node = node
        self.backend = node.backend
        self.writer = node.writer

    def closed(self, conn: Connection) -> None:
        self.node.master_lost(conn)

    def hold(self, conn: Connection, then: Callable[[], object]) -> None:
        """Call `then` when all is written; the master's next packet comes after."""
        conn.pause()

        def written() -> None:
            if conn is self.node.master:
                then()
                conn.resume()

        self.writer.barrier(written)

    def notify_features(self, conn: Connection, features: Sequence[bytes]) -> None:
        """What the master offers beyond protocol 5."""
        self.node.master_features = tuple(features)

    def stop_operation(self, conn: Connection) -> None:
        """Nothing to stop."""

    def notify_cluster_information(self, conn: Connection, state: ClusterState) -> None:
        conn.log.info("cluster state: %s", state)

    def notify_node_information(
        self, conn: Connection, timestamp: float, rows: Sequence[NodeRow]
    ) -> None:
        self.node.update_nodes(timestamp, rows)

    def notify_partition_changes(
        self, conn: Connection, ptid: int, replicas: int, cells: Cells
    ) -> None:
        node = self.node
        node.pt.update(ptid, replicas, cells, strict=True)
        last_pack = node.last_pack
        # Durable: this node must not come back with a cell that it lost.
        self.writer.submit(
            lambda: self.backend.change_partition_table(
                ptid, replicas, cells, last_pack=last_pack
            )
        )

    def notify_pack_signed(
        self, conn: Connection, approved: Sequence[Tid], rejected: Sequence[Tid]
    ) -> None:
        for pack_id in (*approved, *rejected):
            if pack_id > MAX_TID:
                raise ProtocolError(f"invalid id of a pack order {pack_id.hex()}")
        node = self.node
        node.last_pack = max([node.last_pack, *approved])
        if not node.options.disable_pack:
            self.writer.submit(lambda: self.backend.sign_packs(approved, rejected))
        elif approved:
            # Others needn't wait for what this node will never do (12.6).
            conn.notify(NotifyPackCompleted, node.last_pack)

    def ask_final_tid(self, conn: Connection, ttid: Tid) -> None:
        reply = conn.defer()
        self.hold(
            conn, lambda: reply.answer(AnswerFinalTID, self.backend.final_tid(ttid))
        )

    def ask_pack_orders(self, conn: Connection, pack_id: Tid) -> None:
        reply = conn.defer()

        def answer() -> None:
            orders = self.backend.pack_orders(pack_id, self.node.readable_partitions())
            reply.answer(
                AnswerPackOrders,
                [(tid, o.approved, o.partial, o.oids, o.pack_tid) for tid, o in orders],
            )

        self.hold(conn, answer)

    def notify_repair(self, conn: Connection, dry_run: bool) -> None:
        self.node.repair(dry_run)

    def notify_transaction_finished(
        self, conn: Connection, ttid: Tid, max_tid: Tid
    ) -> None:
        """Meant for a phase that is over."""

    def abort_transaction(
        self, conn: Connection, ttid: Tid, nids: Sequence[int]
    ) -> None:
        """Meant for a phase that is over."""

    def flush_log(self, conn: Connection) -> None:
        conn.log.flush()


class Initialization(MasterHandler):
    """Obeys the master until StartOperation."""

    def send_partition_table(
        self, conn: Connection, ptid: int | None, replicas: int, rows: Rows
    ) -> None:
        if ptid is None or not rows or not all(rows):
            raise ProtocolError(f"incomplete partition table {ptid}")
        pt, backend = self.node.pt, self.backend
        pt.load(ptid, replicas, rows)
        cells = list(pt)
        last_pack, nid = self.node.last_pack, self.node.nid
        assert nid is not None

        def write() -> None:
            backend.set_nid(nid)
            backend.change_partition_table(
                ptid, replicas, cells, reset=True, last_pack=last_pack
            )

        self.writer.submit(write)
        self.hold(conn, lambda: None)

    def ask_recovery(self, conn: Connection) -> None:
        reply = conn.defer()

        def answer() -> None:
            settings = self.backend.settings()
            reply.answer(
                AnswerRecovery,
                settings.ptid,
                settings.backup_tid,
                settings.truncate_tid,
            )

        self.hold(conn, answer)

    def ask_partition_table(self, conn: Connection) -> None:
        reply = conn.defer()

        def answer() -> None:
            self.node.load_partition_table()
            pt = self.node.pt
            reply.answer(AnswerPartitionTable, pt.ptid, pt.replicas, pt.as_rows())

        self.hold(conn, answer)

    def ask_locked_transactions(self, conn: Connection) -> None:
        reply = conn.defer()
        self.hold(
            conn,
            lambda: reply.answer(
                AnswerLockedTransactions, self.backend.locked_transactions()
            ),
        )

    def validate_transaction(self, conn: Connection, ttid: Tid, tid: Tid) -> None:
        if not ttid <= tid <= MAX_TID:
            raise ProtocolError(f"{ttid.hex()} can't become {tid.hex()}")
        self.writer.submit(lambda: self.backend.validate(ttid, tid))

    def truncate(self, conn: Connection, tid: Tid) -> None:
        """A notification here: never answered."""
        if tid > MAX_TID:
            raise ProtocolError(f"invalid tid {tid.hex()}")
        self.writer.submit(lambda: self.backend.set_truncate_tid(tid))

    def ask_last_ids(self, conn: Connection) -> None:
        reply = conn.defer()
        node, backend = self.node, self.backend

        def answer() -> None:
            node.notify_pack_completed()
            reply.answer(AnswerLastIDs, *backend.last_ids(node.readable_partitions()))

        self._truncate_first(conn, answer)

    def _truncate_first(self, conn: Connection, then: Callable[[], object]) -> None:
        """Call `then` when what is recorded is done; the next packet comes after."""
        conn.pause()
        backend = self.backend

        def truncated(more: bool) -> None:
            if more:
                # Durable: what follows may be based on it, and a group that has nothing
                # to write would not make the last one so.
                self.writer.submit(
                    lambda: backend.truncate(TRUNCATION_SLICE), truncated
                )
            elif conn is self.node.master:
                then()
                conn.resume()

        def ready() -> None:
            truncated(backend.settings().truncate_tid is not None)

        self.writer.barrier(ready)

    def ask_last_tids(self, conn: Connection, partitions: Sequence[int]) -> None:
        reply, backend = conn.defer(), self.backend

        def answer() -> None:
            rows = []
            for partition in partitions:
                tids = backend.last_tids_of_partition(partition)
                rows.append((partition, tids[0] or ZERO_TID, tids[1] or ZERO_TID))
            reply.answer(AnswerLastTids, rows)

        self.hold(conn, answer)

    def start_operation(self, conn: Connection, backup: bool) -> None:
        pt = self.node.pt
        if backup:
            raise ProtocolError("backup clusters are not supported by this version")
        if pt.ptid is None or not pt.filled():
            raise ProtocolError("StartOperation without partition table")
        # The others may have truncated, and gone on, while this node was away. If they
        # have not, nothing is lost: they hold what is deleted here.
        self._truncate_first(conn, lambda: self.node.start_operation(conn))
