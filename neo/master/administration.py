"""Commands of administrators (behaviour 2.9, operations 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from neo.lib.connection import Connection
from neo.lib.handler import denied
from neo.lib.node import Node, nid_str, wire_address
from neo.lib.protocol import (
    READABLE,
    AnswerAwaited,
    AnswerTweakPartitionTable,
    CellState,
    CheckPartition,
    ClusterState,
    FlushLog,
    Nid,
    NodeState,
    NodeType,
    NotifyRepair,
    Tid,
    UInt,
)

from . import policy
from .checking import Checks
from .phase import NOT_RESILIENT, Identified
from .running import Running, Stopping

if TYPE_CHECKING:
    from .app import Master

BACKUP = (
    ClusterState.STARTING_BACKUP,
    ClusterState.BACKINGUP,
    ClusterState.STOPPING_BACKUP,
)


class Administration(Identified):
    """An admin node, which relays the commands of neoctl."""

    def __init__(self, master: Master) -> None:
        super().__init__(master)
        self.checks = Checks(master)

    # --- the cluster ------------------------------------------------------------------

    def set_cluster_state(self, conn: Connection, state: ClusterState) -> None:
        master = self.master
        if state is ClusterState.VERIFYING:
            master.primary.start()
            conn.acknowledge("Cluster state changed")
            master.primary.advance()
        elif state is ClusterState.STOPPING:
            if master.phase.state is state:
                raise denied("The cluster is already stopping")
            conn.acknowledge("Cluster state changed")
            master.become(Stopping(master, master.primary))
        elif state in BACKUP and state is not ClusterState.BACKINGUP:
            raise denied("backup clusters are not available in this version")
        else:
            raise denied("Invalid state requested")

    def truncate(self, conn: Connection, tid: Tid) -> None:
        master = self.master
        self._running("truncate")
        ids = master.transactions
        if tid >= ids.last_tid:
            raise denied("Truncating after last transaction does nothing")
        if tid < ids.first_tid:
            raise denied(
                "Truncating before first transaction is probably not what you"
                " intended to do"
            )
        if master.packs.approved_after(tid):
            raise denied("Can not truncate before an approved pack")
        conn.acknowledge()
        master.leave_operation(truncate=tid)

    def flush_log(self, conn: Connection) -> None:
        for node in self.master.nodes.identified():
            if node.connection is not conn:
                node.connection.notify(FlushLog)
        self.master.log.flush()

    def ask_awaited(self, conn: Connection) -> None:
        lines = [line.encode() for line in self.master.phase.describe()]
        conn.answer(AnswerAwaited, lines)

    # --- nodes ------------------------------------------------------------------------

    def set_node_state(self, conn: Connection, nid: Nid, state: NodeState) -> None:
        node = self.master.nodes.by_nid(nid)
        if node is None:
            raise denied("unknown node")
        if node.type is NodeType.MASTER and state is NodeState.DOWN:
            changed = self._kill_master(node)
        elif node.type is NodeType.STORAGE and state is NodeState.DOWN:
            changed = self._kill_storage(node)
        elif node.type is NodeType.STORAGE and state is NodeState.UNKNOWN:
            self._drop_storage(node)
            conn.acknowledge("node permanently removed")
            return
        else:
            raise denied(f"can not switch node to {state} state")
        conn.acknowledge(
            "state changed" if changed else f"node already in {state} state"
        )

    def _kill_master(self, node: Node) -> bool:
        if node is self.master.node:
            raise denied("can not kill primary master node")
        if node.connection is None:
            return False
        self.master.dismiss(node, NodeState.DOWN)
        self.master.tell_nodes([node])
        return True

    def _kill_storage(self, node: Node) -> bool:
        master = self.master
        phase = master.phase
        assert node.nid is not None
        if node.connection is None:
            return False
        if phase.state is ClusterState.STOPPING:
            raise denied("The cluster is stopping")
        if phase.state is ClusterState.RECOVERING:
            # Nobody serves: nothing can be lost.
            self.master.dismiss(node, NodeState.DOWN)
            master.primary.storage_lost(node)
            return True
        pt = master.pt
        self._check_copies([node.nid])
        if not pt.operational(
            {nid: None for nid in master.nodes.running() if nid != node.nid}
        ):
            raise denied(f"{nid_str(node.nid)} has the only readable copies")
        member = master.is_member(node.nid)
        self.master.dismiss(node, NodeState.DOWN)
        if isinstance(phase, Running):
            # The table first: nobody may think that the cells are still served.
            master.outdate()
            if member:
                master.tell_nodes([node])
            else:
                master.forget(node)
            phase.after_loss(node)
        else:
            master.primary.storage_lost(node)
        return True

    def _check_copies(self, nids: Sequence[int]) -> list[policy.Cell]:
        """Cells that change if these nodes are dropped. Raises Refused."""
        rows = self.master.pt.rows
        cells = policy.drop(rows, nids, self.master.pt.replicas)
        if cells is None:
            partition = next(
                p for p, row in enumerate(rows) if policy.drop([row], nids) is None
            )
            raise denied(
                "Refuse to drop nodes that contain the only readable copies of"
                f" partition {partition}"
            )
        return cells

    def _drop_storage(self, node: Node) -> None:
        master = self.master
        self._running("setNodeState")
        assert node.nid is not None
        if node.state is NodeState.RUNNING:
            raise denied("a running node must be stopped before removal")
        cells = self._check_copies([node.nid])
        master.tell_replicated()
        master.change_table(cells)
        master.members.pop(node.nid, None)
        self.master.dismiss(node, NodeState.UNKNOWN)
        master.forget(node)

    def add_pending_nodes(self, conn: Connection, nids: Sequence[Nid]) -> None:
        master = self.master
        phase = self._running("addPendingNodes")
        added = []
        for nid in dict.fromkeys(nids):
            node = master.nodes.by_nid(nid)
            if (
                node is not None
                and node.type is NodeType.STORAGE
                and node.state is NodeState.PENDING
                and node.connection is not None
            ):
                node.state = NodeState.RUNNING
                master.members[nid] = None
                phase.start_storage(node)
                added.append(node)
        if added:
            master.tell_nodes(added)
        names = ", ".join(nid_str(node.nid) for node in added)
        conn.acknowledge(f"Nodes added: {names}" if added else "No node added")

    def repair(self, conn: Connection, nids: Sequence[Nid], dry_run: bool) -> None:
        nodes = [self._storage(nid) for nid in dict.fromkeys(nids)]
        for node in nodes:
            if node.connection is None:
                raise denied(f"{nid_str(node.nid)} is not connected")
        for node in nodes:
            node.connection.notify(NotifyRepair, dry_run)
        conn.acknowledge()

    # --- the partition table ----------------------------------------------------------

    def tweak_partition_table(
        self, conn: Connection, dry_run: bool, nids: Sequence[Nid]
    ) -> None:
        master, pt = self.master, self.master.pt
        self._running("tweakPartitionTable")
        for nid in nids:
            self._storage(nid)
        paths = {}
        for node in master.nodes.of_type(NodeType.STORAGE):
            if node.nid is None or node.nid in nids or node.state is NodeState.PENDING:
                continue
            if node.state is not NodeState.RUNNING:
                raise denied("tweak: down nodes must be listed explicitly")
            if master.is_member(node.nid):
                paths[node.nid] = node.extra.get("devpath", ())
        if not paths:
            raise denied("Can't remove all nodes.")
        master.tell_replicated()
        cells, resilient = policy.tweak(pt.rows, pt.replicas, paths)
        if not resilient:
            master.log.warning(NOT_RESILIENT)
        if dry_run:
            rows = _after(pt.rows, cells)
        else:
            master.change_table(cells)
            rows = pt.as_rows()
        conn.answer(AnswerTweakPartitionTable, bool(cells), rows)

    def set_num_replicas(self, conn: Connection, num_replicas: UInt) -> None:
        self._running("setNumReplicas")
        self.master.tell_replicated()
        self.master.change_table([], replicas=num_replicas)
        conn.acknowledge()

    def check_replicas(
        self,
        conn: Connection,
        partitions: Mapping[UInt, Nid | None],
        min_tid: Tid,
        max_tid: Tid | None,
    ) -> None:
        bound = self._check_bounds(partitions, max_tid)
        if min_tid <= bound:
            self._check_replicas(partitions, min_tid, bound)
        conn.acknowledge()

    def ask_check(
        self,
        conn: Connection,
        partitions: Mapping[UInt, Nid | None],
        min_tid: Tid,
        max_tid: Tid | None,
        repair: bool,
    ) -> None:
        bound = self._check_bounds(partitions, max_tid)
        self.checks.start(conn.defer(), partitions, min_tid, bound, repair)

    def _check_bounds(
        self, partitions: Mapping[int, int | None], max_tid: bytes | None
    ) -> bytes:
        """The last tid to look at. Raises Refused."""
        pt = self.master.pt
        self._running("checkReplicas")
        for partition, source in partitions.items():
            if partition >= pt.np:
                raise denied(f"partition {partition} does not exist")
            if source is not None and (
                self._storage(source).state is not NodeState.RUNNING
                or pt.state(partition, source) not in READABLE
            ):
                raise denied(
                    f"{nid_str(source)} has no readable copy of partition {partition}"
                )
        last_tid = self.master.transactions.last_tid
        return last_tid if max_tid is None else min(max_tid, last_tid)

    def _check_replicas(
        self, partitions: Mapping[int, int | None], min_tid: bytes, max_tid: bytes
    ) -> None:
        master = self.master
        running = master.nodes.running()
        chosen: dict[int, None] = {}  # few nodes shall do the work
        for partition, source in sorted(partitions.items()):
            nids = [nid for nid in master.pt.readable[partition] if nid in running]
            if len(nids) < 2:
                continue
            nid = next((nid for nid in nids if nid in chosen), nids[0])
            chosen[nid] = None
            address = running[source].address if source in running else None
            running[nid].connection.notify(
                CheckPartition,
                partition,
                (b"", wire_address(address)),
                min_tid,
                max_tid,
            )

    # --- conditions -------------------------------------------------------------------

    def _running(self, name: str) -> Running:
        """The phase in which most commands are possible. Raises Refused."""
        phase = self.master.phase
        if not isinstance(phase, Running):
            raise denied(f"{name} RPC can not be used in {phase.state} state")
        return phase

    def _storage(self, nid: int) -> Node:
        node = self.master.nodes.by_nid(nid)
        if node is None or node.type is not NodeType.STORAGE:
            raise denied(f"invalid storage node {nid_str(nid)}")
        return node


def _after(
    rows: policy.Rows, cells: Sequence[policy.Cell]
) -> list[list[tuple[int, CellState]]]:
    """The table that these changes would make."""
    new = [dict(row) for row in rows]
    for partition, nid, state in cells:
        if state is CellState.DISCARDED:
            new[partition].pop(nid, None)
        else:
            new[partition][nid] = state
    return [list(row.items()) for row in new]
