"""The master node: what lasts longer than a phase, and how the others are told.

Nothing is persistent here. The primary master owns the node table and the partition
table; each change is broadcast at once, in an order that all can rely on: nodes before
cells, except that cells leave before their node.
Source: behaviour 1.3, 2 and 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from neo.lib.config import Limits
from neo.lib.connection import Connection, encode_tail
from neo.lib.handler import Handler
from neo.lib.node import Node, NodeManager, as_row, format_nodes, nid_str
from neo.lib.protocol import (
    BY_CODE,
    READABLE,
    CellState,
    ClusterState,
    NodeRow,
    NodeState,
    NodeType,
    NotifyClusterInformation,
    NotifyNodeInformation,
    NotifyPartitionChanges,
    Packet,
    SendPartitionTable,
    StopOperation,
    Truncate,
)
from neo.lib.pt import PartitionTable
from neo.lib.runtime import Runtime
from neo.lib.util import Address, format_address

from . import policy
from .administration import Administration
from .identification import Identification
from .packs import PackOrders
from .phase import Identified, Phase, PrimaryPhase
from .recovery import Recovering
from .transactions import Transactions

# Who is told about whom (behaviour 1.3). Backup masters also hear of admins.
TOLD: dict[NodeType, tuple[NodeType, ...]] = {
    NodeType.ADMIN: (NodeType.MASTER, NodeType.STORAGE, NodeType.CLIENT),
    NodeType.STORAGE: (NodeType.MASTER, NodeType.STORAGE, NodeType.CLIENT),
    NodeType.CLIENT: (NodeType.MASTER, NodeType.STORAGE),
    NodeType.MASTER: (NodeType.MASTER,),
}

DEFAULT_LIMITS = Limits()

# How long a node may take to exit when told so (seconds).
DISMISSAL = 3.0

# Least difference of two timestamps (seconds).
TIMESTAMP_STEP = 0.001


@dataclass(frozen=True)
class MasterOptions:
    """Options of a master; see operations.md 2.5."""

    cluster: str
    bind: Address
    advertise: Address | None = None  # if it is not `bind`
    masters: Sequence[Address] = ()
    nid: int | None = None
    partitions: int = 100  # these two: of a database that is created
    replicas: int = 0
    autostart: int | None = None  # storages that make a new cluster start by itself
    limits: Limits = DEFAULT_LIMITS
    save_masters: Callable[[list[Address]], object] | None = None
    future_tids: bool = False  # accept imposed tids of any date


class Dismissed(Handler):
    """A node that was told to exit: whatever it still says doesn't matter.

    Closing at once could make it lose that order, if it sends something meanwhile.
    """

    def __init__(self, master: Master) -> None:
        super().__init__()
        self.master = master
        self.left: dict[Connection, None] = {}
        self.table = {
            code: (packet, lambda conn, *args: None) for code, packet in BY_CODE.items()
        }

    def error(
        self, conn: Connection, packet: Packet[...] | None, code: int, text: str
    ) -> None:
        """Nor does this."""

    def closed(self, conn: Connection) -> None:
        self.left.pop(conn, None)
        phase = self.master.phase
        if not self.left and isinstance(phase, PrimaryPhase):
            phase.dismissed_left()


class Master:
    """A master node."""

    def __init__(self, runtime: Runtime, options: MasterOptions) -> None:
        self.runtime = runtime
        self.options = options
        self.limits = options.limits
        self.log = runtime.log
        self.cluster_name = options.cluster.encode()
        self.nodes = NodeManager()
        self.pt = PartitionTable()
        self.address: Address = options.advertise or options.bind
        self._last_timestamp = 0.0
        self.node: Node
        self.phase = Phase(self)  # none yet
        self.stopped = False
        # When the primary role was taken, as compared in elections.
        self.election_time = 0.0
        # May the cluster start without all nodes that it had? `forced`: the word of an
        # administrator. Else it is because we lost operation, and nobody else can have
        # run the cluster since then: all other masters still follow us, on the
        # connections that they had. But then storages that missed a commit are not
        # enough, nor those that missed one before we started: they need at least this
        # version of the table.
        self.startup_allowed = False
        self.startup_forced = False
        self.followers: dict[Node, Connection] = {}
        self.committed_ptid = 0
        # And one of each of these groups, who were readable in the last table that
        # settled: others may be so in one that these have not seen. See settling.py.
        self.carriers: Sequence[Sequence[int]] = ()
        # Did the cluster run just before, under us or the primary that we followed?
        self.was_running = False
        self.known_ptid = 0  # the greatest of all: if there is one, a database exists
        # Was one ever seen? Then none is made on empty storages unless it is asked for.
        self.has_database = False
        # Tid after which a pending truncation removes all.
        self.truncate_tid: bytes | None = None
        # Storages that belong to the cluster: they have cells, or were added.
        self.members: dict[int, None] = {}
        # OUT_OF_DATE cells, as (partition, nid), that replicate for their present
        # assignment; and those that have finished, to be told at once in the next turn.
        self.updatable: dict[tuple[int, int], None] = {}
        self._replicated: dict[tuple[int, int], None] = {}  # (partition, nid)
        self.transactions = Transactions(self)
        self.packs = PackOrders(self)
        self.identification = Identification(self)
        self.admin_handler = Administration(self)
        self.master_handler: Handler = Identified(self)
        self.dismissed = Dismissed(self)
        # By `check()`: phase, ptid, last tid.
        self._checked: tuple[Phase, int, bytes] = self.phase, 0, b""

    # --- life -------------------------------------------------------------------------

    def start(self) -> None:
        """Listen, and play primary. OSError if the address can't be used."""
        options = self.options
        bound = self.runtime.listen(options.bind, self._accept)
        host, port = options.advertise or bound
        self.address = host, port or bound[1]
        nid = self.nodes.free_nid(NodeType.MASTER, None, options.nid)
        self.node = self.nodes.add(
            NodeType.MASTER, nid, self.address, NodeState.RUNNING
        )
        for address in options.masters:
            self.know_master(address)
        # From now on, so that what is read from a file is not written back.
        self.nodes.on_master_change = options.save_masters
        self.log.set_node(options.cluster, nid)
        self.log.info("listening on %s", format_address(self.address))
        self.play_primary()

    def play_primary(self) -> None:
        """Take the primary role, until an election says otherwise."""
        self.election_time = self.timestamp()
        self.startup_allowed = self.startup_forced = False
        self.followers = {}
        self.committed_ptid = self.known_ptid = 0
        self.carriers = ()
        self.truncate_tid = None
        self._enter(Recovering(self))

    def become(self, phase: Phase) -> None:
        """Leave the present phase for another one."""
        assert phase.state in self.phase.successors, (self.phase, phase)
        self.phase.leave()
        self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.log.info("%s", phase.state or type(phase).__name__)
        phase.enter()
        self.identification.look_again()

    def shutdown(self) -> None:
        """SIGTERM: the others elect another primary."""
        self.end("stopped by a signal")

    def end(self, reason: str, status: int = 0) -> None:
        """End of the process; what is queued is sent."""
        if self.stopped:
            return
        self.stopped = True
        self.log.info("exit: %s", reason)
        self.runtime.unlisten()
        for node in self.nodes.identified():
            self.disconnect(node, reason)
        self.runtime.stop(status)

    def _accept(self, conn: Connection) -> None:
        conn.handler = self.identification

        def tick() -> None:
            if not conn.closed and conn.handler is self.identification:
                conn.close("no identification")

        self.runtime.call_later(self.limits.identification_timeout, tick)

    # --- nodes ------------------------------------------------------------------------

    @property
    def primary(self) -> PrimaryPhase:
        """The present phase, known to be one of a primary."""
        assert isinstance(self.phase, PrimaryPhase), self.phase
        return self.phase

    def timestamp(self) -> float:
        """The time, always later than the time before (protocol 3.6)."""
        self._last_timestamp = max(
            self.runtime.now(), self._last_timestamp + TIMESTAMP_STEP
        )
        return self._last_timestamp

    def know_master(self, address: Address) -> Node | None:
        """The node of another master, made if it is new; None if it is not one."""
        node = self.nodes.by_address(address)
        if node is None:
            node = self.nodes.add(NodeType.MASTER, None, address)
        return node if node.type is NodeType.MASTER and node is not self.node else None

    def is_member(self, nid: int | None) -> bool:
        """Does this storage belong to the cluster?"""
        return nid in self.members

    def told_about(self, receiver: Node, nodes: Sequence[Node]) -> list[NodeRow]:
        """Those of the nodes that the receiver is told about, as it is told."""
        kinds = TOLD[receiver.type]
        name = receiver.extra.get("backup")
        return [
            as_row(node)
            for node in nodes
            if node.type in kinds
            or (
                node.type is NodeType.ADMIN
                and receiver.type is NodeType.CLIENT
                and name is not None
                and name in node.extra.get("backup", ())
            )
        ]

    def tell_nodes(self, nodes: Sequence[Node], but: Node | None = None) -> None:
        """Say to all (`but` one) that these nodes changed."""
        timestamp = self.timestamp()
        encoded: dict[NodeType, bytes | None] = {}
        for receiver in self.nodes.identified():
            if receiver is but:
                continue
            if receiver.extra.get("backup") and receiver.type is NodeType.CLIENT:
                rows = self.told_about(receiver, nodes)
                if rows:
                    receiver.connection.notify(NotifyNodeInformation, timestamp, rows)
                continue
            kind = receiver.type
            if kind not in encoded:
                rows = self.told_about(receiver, nodes)
                encoded[kind] = (
                    encode_tail(NotifyNodeInformation, timestamp, rows)
                    if rows
                    else None
                )
            tail = encoded[kind]
            if tail is not None:
                receiver.connection.notify_encoded(NotifyNodeInformation, tail)

    def tell_itself(self, node: Node, state: NodeState) -> None:
        """Say to a node what became of it: DOWN and UNKNOWN make it exit."""
        kind, address, nid, _, _ = as_row(node)
        node.connection.notify(
            NotifyNodeInformation, self.timestamp(), [(kind, address, nid, state, None)]
        )

    def dismiss(self, node: Node, state: NodeState) -> None:
        """Make a node exit; nothing else is told about it."""
        node.state = state
        if node.connection is None:
            return
        self.tell_itself(node, state)
        conn, node.connection = node.connection, None
        conn.handler = self.dismissed
        self.dismissed.left[conn] = None
        self.runtime.call_later(DISMISSAL, conn.close)

    def tell_state(self) -> None:
        """Say to all which phase begins."""
        state = self.primary.state
        tail = encode_tail(NotifyClusterInformation, state)
        for node in self.nodes.identified():
            if node not in self.transactions.backups:  # they don't expect it
                node.connection.notify_encoded(NotifyClusterInformation, tail)

    def disconnect(self, node: Node, reason: str) -> None:
        """Close a connection after what is queued, without handling its loss."""
        conn, node.connection = node.connection, None
        conn.handler = Handler()
        conn.abort(reason)

    def lost(self, node: Node) -> None:
        """An identified node is no longer connected."""
        if self.stopped or node not in self.nodes:
            return
        self.log.info("%s is lost", node)
        phase = self.primary
        if node.type is NodeType.STORAGE:
            phase.storage_lost(node)
        elif node.type is NodeType.MASTER:
            node.state = NodeState.DOWN
            self.tell_nodes([node])
            phase.master_lost(node)
        else:
            if node.type is NodeType.CLIENT:
                phase.client_lost(node)
            self.forget(node)

    def forget(self, node: Node) -> None:
        """The node is no more."""
        self.nodes.remove(node)
        node.state = NodeState.UNKNOWN
        self.tell_nodes([node])

    def storage_down(self, node: Node) -> None:
        """A storage is lost: a member is expected back."""
        if self.is_member(node.nid) or self.primary.keeps_lost:
            node.state = NodeState.DOWN
            self.tell_nodes([node])
        else:
            self.forget(node)

    def expel(self, nid: int, reason: str) -> None:
        """Disconnect a storage; it may come back."""
        node = self.nodes.by_nid(nid)
        if node is not None and node.connection is not None:
            self.log.warning("%s is disconnected: %s", nid_str(nid), reason)
            node.connection.close(reason)

    def watch(self, conn: Connection) -> None:
        """Disconnect a silent storage, whenever the cluster can run without it."""
        conn.watch_silence(
            self.limits.ping_after,
            self.limits.silence_limit,
            allowed=lambda: (
                conn.node is not None
                and isinstance(self.phase, PrimaryPhase)
                and self.phase.operational
                and self.operational_without((conn.node.nid or 0,))
            ),
        )

    # --- partition table --------------------------------------------------------------

    def operational(self) -> bool:
        """Is each partition readable on a RUNNING storage?"""
        return self._operational_on(self.nodes.running())

    def operational_without(self, nids: Container[int]) -> bool:
        """Would it be, without these storages?"""
        running = self.nodes.running()
        return self._operational_on({n: None for n in running if n not in nids})

    def _operational_on(self, nids: Container[int]) -> bool:
        return self.pt.operational(nids) and self.transactions.settling.carried(nids)

    def send_table(self, *kinds: NodeType) -> None:
        """Send the whole table to all nodes of these types."""
        pt = self.pt
        rows = pt.as_rows()
        tail = encode_tail(SendPartitionTable, pt.ptid, pt.replicas, rows)
        for node in self.nodes.identified(*kinds):
            node.connection.notify_encoded(SendPartitionTable, tail)

    def change_table(
        self,
        cells: Sequence[policy.Cell],
        replicas: int | None = None,
        kinds: Sequence[NodeType] = (
            NodeType.ADMIN,
            NodeType.STORAGE,
            NodeType.CLIENT,
        ),
    ) -> None:
        """Apply changes of cells, and tell them under the next ptid."""
        pt = self.pt
        if replicas is None:
            if not cells:
                return
            replicas = pt.replicas
        assert pt.ptid is not None
        ptid = pt.ptid + 1
        complete = self._complete()
        new = [
            (partition, nid)
            for partition, nid, _ in cells
            if pt.state(partition, nid) is None
        ]
        pt.update(ptid, replicas, cells)
        if new:
            self.transactions.cells_assigned(new)
        self.known_ptid = ptid
        for partition, nid, state in cells:
            # What is replicated for a former assignment doesn't count any more.
            self.updatable.pop((partition, nid), None)
            self._replicated.pop((partition, nid), None)
            if state is not CellState.DISCARDED:
                self.members[nid] = None
                if node := self.nodes.by_nid(nid):
                    node.extra.pop("spare", None)
        tail = encode_tail(NotifyPartitionChanges, ptid, replicas, cells)
        for node in self.nodes.identified(*kinds):
            node.connection.notify_encoded(NotifyPartitionChanges, tail)
        self.primary.table_changed()
        if complete and not self._complete():
            self.log.warning("partition table %d: some cells are out of date", ptid)

    def _complete(self) -> bool:
        return all(state in READABLE for _, _, state in self.pt)

    def outdate(self, lost: int | None = None) -> None:
        """Cells of nodes that are not RUNNING are late from now on."""
        running = self.nodes.running()
        # Also those that were complete, if nobody could be told of that yet.
        for cells in (self._replicated, self.updatable):
            for cell in [cell for cell in cells if cell[1] not in running]:
                del cells[cell]
        self.tell_replicated()
        if self.operational() or not self.pt.operational(running):
            self.change_table(policy.outdate(self.pt.rows, running, lost))
        # Else those who could go on have a table that the lost ones may not know. None
        # must get another one by which the lost ones are not needed.

    def replicated(self, partition: int, nid: int) -> None:
        """A cell says that it is complete; many do so at the same time."""
        if not self._replicated:
            self.runtime.call_later(0, self.tell_replicated)
        self._replicated[partition, nid] = None

    def tell_replicated(self) -> None:
        """Make up to date what has finished its replication.

        As long as the present table is not settled, nothing: called again then.
        """
        while self._replicated and not self.transactions.settling.owing:
            done, self._replicated = self._replicated, {}
            cells: list[policy.Cell] = []
            partitions: dict[int, None] = {}
            for partition, nid in done:
                if partition in partitions:  # after what the first one changes
                    self._replicated[partition, nid] = None
                # Else it was lost, or assigned anew, meanwhile.
                elif (partition, nid) in self.updatable and self.pt.state(
                    partition, nid
                ) is CellState.OUT_OF_DATE:
                    partitions[partition] = None
                    cells += policy.replicated(
                        self.pt.rows, self.pt.replicas, partition, nid
                    )
            self.change_table(cells)
            if cells:
                self.packs.update()

    def clear_table(self) -> None:
        """Forget the partition table: storages will tell."""
        empty: list[list[tuple[int, CellState]]] = [
            [] for _ in range(self.options.partitions)
        ]
        self.pt.load(None, self.options.replicas, empty)
        self.members.clear()
        self.updatable.clear()
        self._replicated.clear()

    # --- operation --------------------------------------------------------------------

    def forget_operation(self) -> None:
        """Nothing is in progress any more."""
        self.transactions.reset()
        self.packs.reset()

    def leave_operation(
        self, truncate: bytes | None = None, replaced: bool = False
    ) -> None:
        """Go back to recovery: a partition is not readable, or `truncate` is asked.

        Storages and clients are told, clients disconnected; transactions are left to
        the verification. It starts again by itself, except for a truncation.
        `replaced`: perhaps another master runs the cluster meanwhile.
        """
        if truncate is not None:
            reason = f"truncation to {truncate.hex()}"
        elif replaced:
            reason = "storages and a master are silent, it may be the primary now"
        else:
            reason = "storages are missing"
        self.log.warning("the cluster is not operational any more: %s", reason)
        # Pending until all have done it, whatever happens meanwhile.
        self.truncate_tid = truncate or self.truncate_tid
        self.startup_allowed = self.truncate_tid is None and not replaced
        self.startup_forced = False
        self.followers = {
            node: node.connection for node in self.nodes.identified(NodeType.MASTER)
        }
        self.carriers = self.transactions.settling.readable or self.carriers
        self.was_running = self.was_running or self.primary.operational
        changed = []
        for node in self.nodes.identified(NodeType.STORAGE):
            node.connection.notify(StopOperation)
            if truncate is not None:
                node.connection.notify(Truncate, truncate)
            if node.state is NodeState.RUNNING:
                node.state = NodeState.PENDING
                changed.append(node)
        for node in self.nodes.identified(NodeType.CLIENT):
            if node not in self.transactions.backups:
                node.connection.notify(StopOperation)
            self.disconnect(node, "the cluster is not operational any more")
            self.nodes.remove(node)
            node.state = NodeState.UNKNOWN
            changed.append(node)
        self.tell_nodes(changed)
        self.forget_operation()
        self.become(Recovering(self))

    # --- for people and tests ---------------------------------------------------------

    def dump(self) -> None:
        """Log the state of the node."""
        phase = self.phase
        self.log.info("state: %s", phase.state or type(phase).__name__)
        for line in format_nodes(map(as_row, self.nodes)).splitlines():
            self.log.info(" * %s", line)
        self.log.info(
            "partition table %s, %d partitions, %d replicas",
            self.pt.ptid,
            self.pt.np,
            self.pt.replicas,
        )
        for line in [*phase.describe(), *self.transactions.describe()]:
            self.log.info(" * %s", line)

    def check(self) -> None:
        """Assert what must hold between two events."""
        if self.stopped:
            return
        self.nodes.check()
        self.pt.check()
        for node in self.nodes.identified():
            assert not node.connection.closed, node
            assert node.connection.node is node, node
        self.transactions.check()
        self.phase.check()
        phase, ptid, tid = self._checked
        new = self.pt.ptid or 0, self.transactions.last_tid
        forgets = (ClusterState.VERIFYING, ClusterState.STOPPING)
        if phase is self.phase and phase.state not in forgets:
            assert new >= (ptid, tid) and new[1] >= tid, (ptid, tid, new)  # noqa: PT018
        self._checked = self.phase, *new
