"""RUNNING and STOPPING: storages serve, transactions are committed.

Source: behaviour 2.6 to 2.8, 5.4 and 5.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.handler import Handler, not_ready
from neo.lib.node import Node, nid_str
from neo.lib.protocol import (
    CellState,
    ClusterState,
    NodeState,
    NodeType,
    NotifyClusterInformation,
    NotifyPackSigned,
    SendPartitionTable,
    StartOperation,
    Tid,
)

from .authority import Authority
from .clients import Client, ReadOnlyClient
from .phase import PrimaryPhase, Storage

if TYPE_CHECKING:
    from neo.lib.runtime import Timer

    from .app import Master

# How often to look again at a storage that owes something, but is indispensable (s).
WATCH_AGAIN = 1.0
# Commits that wait for longer (s) are worth telling.
PATIENCE = 2.0
# A cluster that stops waits for so long (s) until all clients asked to finish what they
# began, and until storages have locked that.
STOP_PATIENCE = 4.0
STOP_LIMIT = 6.0


class Running(PrimaryPhase):
    """The cluster serves."""

    state = ClusterState.RUNNING
    successors = frozenset({ClusterState.RECOVERING, ClusterState.STOPPING})

    def __init__(self, master: Master) -> None:
        super().__init__(master)
        self.storage: Handler = OperatingStorage(master)
        self.authority = Authority(master, self._goes_on, self._replaced)
        self.client: Handler = Client(master, self.authority)
        self.read_only: Handler = ReadOnlyClient(master, self.authority)
        self.watchdog: Timer | None = None

    def enter(self) -> None:
        master = self.master
        master.has_database = True
        self.take_storages()
        master.tell_state()
        self.authority.start()
        for node in master.nodes.identified(NodeType.STORAGE):
            if node.state is NodeState.RUNNING:
                self.start_storage(node)
        if len(master.nodes.of_type(NodeType.MASTER)) > 1:
            self.table_changed()
        else:
            # Nobody else can have changed it meanwhile.
            master.transactions.settling.assume()

    def leave(self) -> None:
        self.master.admin_handler.checks.abort("the cluster is not RUNNING any more")

    @property
    def operational(self) -> bool:
        return True

    def table_changed(self) -> None:
        self.master.transactions.settling.table_changed()
        self._watch_soon()

    def start_storage(self, node: Node) -> None:
        """Let a RUNNING storage serve; it will say when it is ready."""
        node.connection.notify(StartOperation, False)
        self.master.transactions.storage_starting(node)
        self._watch_soon()

    # --- who comes and goes -----------------------------------------------------------

    def client_handler(self, read_only: bool) -> Handler:
        return self.read_only if read_only else self.client

    def may_clone(self) -> bool:
        return True

    def put_aside(self, node: Node | None) -> float:
        if node is None or node.nid is None:
            return 0.0
        now = self.master.runtime.monotonic()
        return self.master.transactions.reputation.aside(node.nid, now)

    def joined(self, node: Node, conn: Connection) -> None:
        master = self.master
        pt = master.pt
        if node.type is NodeType.MASTER:
            conn.notify(NotifyClusterInformation, self.state)
            self.table_changed()
        else:
            conn.notify(SendPartitionTable, pt.ptid, pt.replicas, pt.as_rows())
        if node.type is NodeType.CLIENT:
            master.transactions.client_joined(node, conn, "backup" in node.extra)
        elif node.type is NodeType.STORAGE:
            master.watch(conn)
            if node.state is NodeState.RUNNING:
                self.start_storage(node)

    def storage_lost(self, node: Node) -> None:
        master = self.master
        master.storage_down(node)
        master.outdate(node.nid)
        self.after_loss(node)

    def after_loss(self, node: Node) -> None:
        """Go on without a storage, if that is possible."""
        master = self.master
        if master.operational():
            master.transactions.storage_lost(node)
            master.packs.storage_lost(node)
        else:
            master.leave_operation()

    def client_lost(self, node: Node) -> None:
        self.master.transactions.client_lost(node)

    def _replaced(self) -> None:
        """The storages that are needed, and a master, are silent since long."""
        if self.master.phase is self:
            self.master.leave_operation(replaced=True)
        else:
            self.master.end("the storages are silent")

    # --- storages that make the others wait -------------------------------------------

    def lock_awaited(self) -> None:
        self._watch_soon()

    def _watch_soon(self) -> None:
        if self.watchdog is None:
            limit = self.master.limits.lock_timeout
            self.watchdog = self.master.runtime.call_later(limit, self._watch)

    def _goes_on(self) -> bool:
        """Is this still the operation, perhaps about to stop?"""
        phase = self.master.phase
        return phase is self or (isinstance(phase, Stopping) and phase.running is self)

    def _watch(self) -> None:
        """Disconnect who is late, as long as the others can go on without."""
        master = self.master
        self.watchdog = None
        if not self._goes_on():
            return
        limit = master.limits.lock_timeout
        late, deadline = master.transactions.late(master.runtime.monotonic(), limit)
        again = False
        for nid in late:
            if master.operational_without((nid,)):
                if any(node.nid == nid for node in master.transactions.starting):
                    now = master.runtime.monotonic()
                    master.transactions.reputation.idle(nid, now)
                master.expel(nid, f"nothing done for {limit:g} s")
                if not self._goes_on():
                    return
            else:
                again = True
                master.log.throttled(
                    ("late", nid), 30, "%s is late, but indispensable", nid_str(nid)
                )
        if again:
            delay = WATCH_AGAIN
        elif deadline is not None:
            delay = max(0.0, deadline - master.runtime.monotonic())
        else:
            # A transaction that became the first to be late meanwhile arms it again.
            transactions = master.transactions
            if transactions.queue or transactions.starting:
                delay = limit
            else:
                return
        if self.watchdog is None:
            self.watchdog = master.runtime.call_later(delay, self._watch)

    def describe(self) -> list[str]:
        master = self.master
        now = master.runtime.monotonic()
        transactions = master.transactions
        lines = [
            f"{nid_str(node.nid)} is starting since {now - since:.0f} s"
            for node, since in transactions.starting.items()
        ]
        if transactions.settling.owing:
            names = ", ".join(nid_str(node.nid) for node in transactions.settling.owing)
            lines.append(f"commits wait for {names} to write the partition table")
        if transactions.queue and transactions.queue[0].since < now - PATIENCE:
            names = ", ".join(map(nid_str, transactions.queue[0].waiting))
            lines.append(f"commits wait for locks of {names}")
        if not self.authority.holds():
            lines.append("storages are silent: are they connected to another master?")
        lines += [
            f"{nid_str(node.nid)} is put aside for {seconds:.0f} s: it did not get"
            " ready in time, or clients can't reach it"
            for node in master.nodes.of_type(NodeType.STORAGE)
            if (seconds := self.put_aside(node)) and node.connection is None
        ]
        return lines

    def check(self) -> None:
        master = self.master
        assert master.operational(), master.pt.rows
        for nid in master.transactions.ready:
            node = master.nodes.by_nid(nid)
            assert node is not None, nid
            assert node.state is NodeState.RUNNING, node
        for client, conn in master.transactions.clients.items():
            assert client.connection is conn, client


class Stopping(PrimaryPhase):
    """Nothing begins any more; end when all transactions have."""

    state = ClusterState.STOPPING

    def __init__(self, master: Master, previous: PrimaryPhase) -> None:
        super().__init__(master)
        # What the operation left undone goes on.
        self.running = previous if isinstance(previous, Running) else None
        self.storage = self.running.storage if self.running else Storage(master)
        self.ending = False  # the storages were told to exit

    def enter(self) -> None:
        self.take_storages()
        self.master.transactions.stopping = True
        self.master.tell_state()
        # After the answer to the administrator, and not inside whatever asked for it.
        runtime, transactions = self.master.runtime, self.master.transactions
        runtime.call_later(0, self.transactions_ended)
        runtime.call_later(STOP_PATIENCE, transactions.abort_first_phases)
        runtime.call_later(STOP_LIMIT, lambda: self.transactions_ended(anyway=True))

    @property
    def operational(self) -> bool:
        return self.running is not None

    def table_changed(self) -> None:
        if self.running is not None:
            self.running.table_changed()

    def lock_awaited(self) -> None:
        if self.running is not None:
            self.running.lock_awaited()

    def transactions_ended(self, anyway: bool = False) -> None:
        """The next start verifies what a storage did not lock in time (`anyway`)."""
        master = self.master
        if self.ending or master.stopped:
            return
        if master.transactions.in_progress and not anyway:
            return
        self.ending = True
        # Nobody may ask for the last tid any more, which is forgotten.
        for client in master.nodes.identified(NodeType.CLIENT):
            master.disconnect(client, "the cluster stops")
            master.nodes.remove(client)
        master.forget_operation()
        master.transactions.stopping = True
        master.runtime.unlisten()
        for node in master.nodes.identified(NodeType.STORAGE):
            master.dismiss(node, NodeState.DOWN)
        self.dismissed_left()

    def dismissed_left(self) -> None:
        if self.ending and not self.master.dismissed.left:
            self.master.end("the cluster stops")

    def client_handler(self, read_only: bool) -> Handler:
        """Clients may come back to ask what became of their transactions."""
        if self.running is None or self.ending:
            raise not_ready("the cluster stops")
        return self.running.client_handler(read_only)

    def storage_state(self, node: Node | None) -> NodeState:
        return NodeState.DOWN  # which makes it exit, too

    def joined(self, node: Node, conn: Connection) -> None:
        if self.running is not None and node.type is NodeType.CLIENT:
            self.running.joined(node, conn)
        elif node.type in (NodeType.ADMIN, NodeType.MASTER):
            conn.notify(NotifyClusterInformation, self.state)

    def storage_lost(self, node: Node) -> None:
        master = self.master
        if self.running is None or node.state is NodeState.DOWN:
            return
        node.state = NodeState.DOWN
        master.tell_nodes([node])
        master.outdate(node.nid)
        if master.operational():
            master.transactions.storage_lost(node)
        else:
            # The next start will verify what was being committed.
            master.end("storages are missing")

    def client_lost(self, node: Node) -> None:
        self.master.transactions.client_lost(node)

    def describe(self) -> list[str]:
        count = len(self.master.transactions.in_progress)
        return [f"the end waits for {count} transactions"] if count else []


class OperatingStorage(Storage):
    """A storage in operation, or PENDING."""

    def notify_ready(self, conn: Connection) -> None:
        master = self.master
        node = conn.node
        if node is None or node not in master.transactions.starting:
            raise ProtocolError("not starting")
        approved, rejected = master.packs.signed()
        if approved or rejected:
            conn.notify(NotifyPackSigned, approved, rejected)
        master.log.info("%s is ready", node)
        master.transactions.storage_ready(node)

    def notify_stalled_transaction(self, conn: Connection, ttid: Tid) -> None:
        self.master.transactions.stalled(conn, ttid)

    def answer_information_locked(self, conn: Connection, ttid: Tid) -> None:
        self.master.transactions.locked(conn, ttid)

    def ask_unfinished_transactions(
        self, conn: Connection, partitions: Sequence[int]
    ) -> None:
        master, node = self.master, conn.node
        pt = master.pt
        assert node is not None
        assert node.nid is not None
        if max(partitions, default=0) >= pt.np:
            raise ProtocolError("partition out of range")
        for partition in partitions:
            if pt.state(partition, node.nid) is CellState.OUT_OF_DATE:
                master.updatable[partition, node.nid] = None
        master.transactions.unfinished(conn)

    def notify_replication_done(
        self, conn: Connection, partition: int, tid: Tid
    ) -> None:
        master, node = self.master, conn.node
        assert node is not None
        assert node.nid is not None
        if partition >= master.pt.np:
            raise ProtocolError("partition out of range")
        # Else it was assigned anew, or taken away, meanwhile.
        if (partition, node.nid) in master.updatable:
            master.replicated(partition, node.nid)

    def notify_partition_corrupted(
        self, conn: Connection, partition: int, nids: Sequence[int]
    ) -> None:
        self.master.log.error(
            "Partition %d corrupted in: %s",
            partition,
            ", ".join(nid_str(nid) for nid in sorted(nids)),
        )

    def notify_pack_completed(self, conn: Connection, pack_id: Tid) -> None:
        assert conn.node is not None
        self.master.packs.completed_by(conn.node, pack_id)

    def ask_pack_orders(self, conn: Connection, pack_id: Tid) -> None:
        self.master.packs.ask(conn, pack_id, first_approved=True)
