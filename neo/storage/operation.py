"""A storage node in operation: from StartOperation to StopOperation or the loss of the
master. What is volatile belongs to this phase, and is dropped with it.

Source: behaviour 5.1, 5.3 and 5.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.node import Node, address_from_wire
from neo.lib.protocol import (
    FEATURE_LEASE,
    MAX_TID,
    AnswerFinalTID,
    AskUnfinishedTransactions,
    CellState,
    NotifyReady,
    NotifyStalledTransaction,
    PackOrder,
    WireAddress,
)

from .background import Background, Chores, Pace
from .checking import Checks
from .client import ClientHandler, Together
from .database.interface import Tid
from .initialization import Cells, MasterHandler
from .locks import ABSENT, BLIND, COMPLETE, READABLE, VOTED
from .peers import PeerHandler
from .replication import Replication
from .transactions import Transactions

if TYPE_CHECKING:
    from .app import StorageNode

# Rows that one slice of a deletion removes: it delays the commits of clients.
DROP_SLICE = 500


class OperationHandler(MasterHandler):
    """What the master says during operation."""

    def __init__(self, operation: Operation) -> None:
        super().__init__(operation.node)
        self.operation = operation
        self.transactions = operation.transactions

    def stop_operation(self, conn: Connection) -> None:
        self.node.stop_operation(conn)

    def notify_partition_changes(
        self, conn: Connection, ptid: int, replicas: int, cells: Cells
    ) -> None:
        node = self.node
        own = [
            (partition, node.own_state(partition))
            for partition, nid, _ in cells
            if nid == node.nid and partition < node.pt.np
        ]
        super().notify_partition_changes(conn, ptid, replicas, cells)
        if own:
            self.operation.own_cells_changed(own)

    def ask_lock_information(
        self, conn: Connection, ttid: Tid, tid: Tid, pack: bool
    ) -> None:
        self.transactions.lock(conn, ttid, tid, pack)

    def notify_unlock_information(self, conn: Connection, ttid: Tid) -> None:
        self.transactions.unlock(ttid)

    def ask_final_tid(self, conn: Connection, ttid: Tid) -> None:
        transaction = self.transactions.by_ttid.get(ttid)
        tid = transaction.tid if transaction else self.backend.final_tid(ttid)
        conn.answer(AnswerFinalTID, tid)

    def notify_transaction_finished(
        self, conn: Connection, ttid: Tid, max_tid: Tid
    ) -> None:
        if max_tid > MAX_TID:
            raise ProtocolError(f"invalid tid {max_tid.hex()}")
        # Not locked here: this node was not there when it began.
        self.transactions.abort(ttid)
        self.operation.replication.finished(ttid, max_tid)

    def abort_transaction(
        self, conn: Connection, ttid: Tid, nids: Sequence[int]
    ) -> None:
        self.transactions.abort(ttid)
        self.operation.replication.finished(ttid, None)

    def notify_stalled_transaction(self, conn: Connection, ttid: Tid) -> None:
        self.transactions.refuse(ttid)
        self.operation.replication.finished(ttid, None)

    def check_partition(
        self,
        conn: Connection,
        partition: int,
        source: tuple[bytes, WireAddress | None],
        min_tid: Tid,
        max_tid: Tid,
    ) -> None:
        name, address = source
        if partition >= self.node.pt.np:
            raise ProtocolError(f"no partition {partition}")
        if name:
            conn.log.error("check with cluster %r: not available", name)
            return
        node = self.node.nodes.by_address(address_from_wire(address))
        self.operation.checks.check_partition(partition, node, min_tid, max_tid)

    def ask_check_cell(
        self,
        conn: Connection,
        partition: int,
        reference: int | None,
        min_tid: Tid,
        max_tid: Tid,
        repair: bool,
    ) -> None:
        if partition >= self.node.pt.np:
            raise ProtocolError(f"no partition {partition}")
        self.operation.checks.check_cell(
            conn.defer(), partition, reference, min_tid, max_tid, repair
        )

    def answer_pack_orders(self, conn: Connection, orders: Sequence[PackOrder]) -> None:
        """Not asked for: packing comes later."""


class Operation:
    """The phase in which clients are served.

    `access`: how each partition may be used, see `locks`.
    """

    def __init__(self, node: StorageNode) -> None:
        self.node = node
        self.runtime = node.runtime
        self.backend = node.backend
        self.writer = node.writer
        self.is_over = False
        self._alone: tuple[int | None, bool] = None, False  # for a version of the table
        self.access = [ABSENT] * node.pt.np
        self.background = Background(node.runtime, node.backend.background)
        self.pace = Pace(node.connections, node.options.replication_rate)
        self.chores = Chores(node.runtime)
        self.transactions = Transactions(
            node.runtime,
            node.backend,
            node.writer,
            self.access,
            node.options.limits.lease,
            self._report_stalled,
            self._transaction_ended,
            self._is_alone,
        )
        self.peer_handler = PeerHandler(self)
        self.replication = Replication(self)
        self.checks = Checks(self)
        together = self.backend.loads_together or self.runtime.buggify("loads together")
        self.client_handler = (Together if together else ClientHandler)(self)
        self.master_handler = OperationHandler(self)
        self._set_access(range(node.pt.np))

    def enter(self, conn: Connection) -> None:
        """Serve. The master's next packet comes when unfinished data are dropped."""
        conn.handler = self.master_handler
        conn.notify(NotifyReady)
        out_of_date = [p for p, access in enumerate(self.access) if access == BLIND]
        self.replication.add(out_of_date)
        self.writer.submit(self.backend.drop_unfinished)
        self.master_handler.hold(conn, lambda: None)
        self._drop(p for p, access in enumerate(self.access) if access == ABSENT)

    def leave(self) -> None:
        """Forget all that is volatile."""
        self.is_over = True
        self.background.is_over = True
        self.chores.is_over = True
        self.transactions.leave()
        self.replication.leave()
        self.checks.leave()

    def readable_partitions(self) -> list[int]:
        """Numbers of the partitions that clients may read here."""
        return [p for p, access in enumerate(self.access) if access == READABLE]

    def _report_stalled(self, ttid: Tid) -> bool:
        node = self.node
        if FEATURE_LEASE not in node.master_features or node.master is None:
            return False
        node.master.notify(NotifyStalledTransaction, ttid)
        return True

    def _transaction_ended(self, ttid: Tid) -> None:
        self.replication.try_finish()

    def client_lost(self, node: Node) -> None:
        """The connection of a client is lost: may what it voted still be finished?

        If the client aborted a transaction, what the master forwards of it may be here
        before the last packets of the lost connection, which make the transaction known
        again: nobody would ever end it. The master knows which ones are unfinished, and
        will say how they end.
        """
        transactions = self.transactions
        voted = [
            transaction
            for transaction in transactions.by_ttid.values()
            if transaction.node is node and transaction.state == VOTED
        ]

        def answered(max_tid: Tid, ttids: Sequence[Tid]) -> None:
            if self.is_over:
                return
            for transaction in voted:
                ttid = transaction.ttid
                if ttid not in ttids and transactions.by_ttid.get(ttid) is transaction:
                    transactions.abort(ttid)

        if voted:
            assert self.node.master is not None
            self.node.master.ask(AskUnfinishedTransactions, []).then(answered)

    # --- partition table ----------------------------------------------------------

    def _set_access(self, partitions: Iterable[int]) -> None:
        node = self.node
        for partition in partitions:
            state = node.own_state(partition)
            if node.is_readable(partition):
                access = READABLE
            elif state is CellState.OUT_OF_DATE:
                is_complete = partition in self.replication.complete
                access = COMPLETE if is_complete else BLIND
            else:
                access = ABSENT
            self.access[partition] = access

    def _is_alone(self) -> bool:
        """Whether all cells are here."""
        pt = self.node.pt
        ptid, alone = self._alone
        if ptid != pt.ptid:
            alone = pt.nids() == [self.node.nid]
            self._alone = pt.ptid, alone
        return alone

    def refresh_access(self, partitions: Sequence[int]) -> None:
        """The state of cells, or what is known of them, changed."""
        self._set_access(partitions)
        self.transactions.access_changed(partitions)

    def own_cells_changed(self, before: Sequence[tuple[int, CellState | None]]) -> None:
        """Cells of this node changed: (partition, former state). Source: 5.8."""
        added, gone = [], []
        is_updated = False
        for partition, former in before:
            state = self.node.own_state(partition)
            if state is not CellState.OUT_OF_DATE:
                self.replication.remove(partition)
                is_updated = is_updated or former is CellState.OUT_OF_DATE
            elif former is not CellState.OUT_OF_DATE:
                added.append(partition)
            if state is None or state is CellState.CORRUPTED:
                gone.append(partition)
        self.refresh_access([partition for partition, _ in before])
        self.replication.add(added)
        if is_updated:
            self.replication.advance()  # a session may have ended with its cell
        self._drop(p for p in gone if self.node.own_state(p) is None)
        if is_updated:
            self.writer.barrier(self._notify_pack_completed)

    def _notify_pack_completed(self) -> None:
        if not self.is_over:
            self.node.notify_pack_completed()

    def _drop(self, partitions: Iterable[int]) -> None:
        if not self.node.options.disable_drop_partitions:
            for partition in partitions:
                self.chores.add(partial(self._drop_slice, partition))

    def _drop_slice(self, partition: int, done: Callable[[bool], object]) -> None:
        if self.node.own_state(partition) is not None:
            done(False)  # assigned again
            return
        self.writer.submit(
            lambda: self.backend.drop_partition(partition, DROP_SLICE),
            done,
            durable=False,
        )

    def check(self) -> None:
        """Assert what must hold between two events."""
        self.transactions.check()
        self.replication.check()
        node = self.node
        assert len(self.access) == node.pt.np
        for partition, access in enumerate(self.access):
            state = node.own_state(partition)
            assert (access == READABLE) == node.is_readable(partition), partition
            assert (access in (BLIND, COMPLETE)) == (state is CellState.OUT_OF_DATE), (
                partition
            )
