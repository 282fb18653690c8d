"""The admin node.

It follows the primary master (nodes, partition table, state of the cluster) and serves
control tools, which do not identify: what it knows itself is answered at once, commands
are relayed to the primary with an id of its own connection, the response goes back with
the original id. Source: behaviour.md 10, protocol.md 5.6.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from neo.lib.bootstrap import Bootstrap, Identity
from neo.lib.config import Limits
from neo.lib.connection import Connection, Reply
from neo.lib.exception import ProtocolError
from neo.lib.handler import Handler, denied, not_ready
from neo.lib.node import NodeManager, as_row, wire_address
from neo.lib.protocol import (
    FEATURE_AWAITED,
    FEATURES,
    AddPendingNodes,
    AnswerClusterState,
    AnswerMonitorInformation,
    AnswerNodeList,
    AnswerPartitionList,
    AnswerPrimary,
    AskAwaited,
    AskCheck,
    AskClusterState,
    AskLastIDs,
    AskLastTransaction,
    AskRecovery,
    CellState,
    CheckReplicas,
    ClusterState,
    Error,
    ErrorCode,
    FlushLog,
    NodeRow,
    NodeState,
    NodeType,
    Packet,
    Repair,
    Rows,
    SetClusterState,
    SetNodeState,
    SetNumReplicas,
    Truncate,
    TweakPartitionTable,
)
from neo.lib.pt import PartitionTable
from neo.lib.runtime import Runtime
from neo.lib.util import Address, datetime_from_tid

RELAYED: tuple[Packet[...], ...] = (
    AddPendingNodes,
    AskCheck,
    AskLastIDs,
    AskLastTransaction,
    AskRecovery,
    CheckReplicas,
    Repair,
    SetClusterState,
    SetNodeState,
    SetNumReplicas,
    Truncate,
    TweakPartitionTable,
)
OPERATIONAL = (ClusterState.RUNNING, ClusterState.BACKINGUP)
STOP_DELAY = 1.0  # seconds for tools to get the answer to their last command


@dataclass(frozen=True)
class AdminOptions:
    """Options of `neoadmin`."""

    cluster: str
    bind: Address
    masters: tuple[Address, ...]
    advertise: Address | None = None
    nid: int | None = None
    limits: Limits = field(default_factory=Limits)
    save_masters: Callable[[list[Address]], object] | None = None


class Admin:
    """The node: `start()`, then it lives until the cluster stops or `shutdown()`."""

    def __init__(self, runtime: Runtime, options: AdminOptions) -> None:
        self.runtime = runtime
        self.options = options
        self.log = runtime.log
        self.nid = options.nid
        self.nodes = NodeManager(options.save_masters)
        self.pt = PartitionTable()
        self.state: ClusterState | None = None
        self.master: Connection | None = None
        self.master_features: Sequence[bytes] = ()
        self.address = options.bind
        for address in options.masters:
            if self.nodes.by_address(address) is None:
                self.nodes.add(NodeType.MASTER, None, address)
        self._from_master = MasterHandler(self)
        self._from_tool = ToolHandler(self)
        self._bootstrap = Bootstrap(
            runtime,
            self.nodes,
            self._identity,
            self._accepted,
            timeout=options.limits.master_timeout,
        )

    # --- life -------------------------------------------------------------------------

    def start(self) -> None:
        """Listen and look for the primary. OSError if the address can't be used."""
        bound = self.runtime.listen(self.options.bind, self._accept)
        self.address = self.options.advertise or bound
        self.log.set_node(self.options.cluster, self.nid)
        self._bootstrap.start()

    def shutdown(self) -> None:
        """Stop."""
        self.runtime.stop()

    def dump(self) -> None:
        """Log what is known."""
        self.log.info("cluster %s: %s", self.options.cluster, self.state)
        for node in self.nodes:
            self.log.info("%r", node)
        self.log.info("partition table: %s", self.pt.as_rows())

    def check(self) -> None:
        """Assert what holds after every event."""
        self.nodes.check()
        self.pt.check()
        assert self.master is None or not self.master.closed

    # --- the primary ------------------------------------------------------------------

    def _identity(self) -> Identity:
        return (
            NodeType.ADMIN,
            self.nid,
            wire_address(self.address),
            self.options.cluster.encode(),
            None,
            {b"backup": (), FEATURES: (FEATURE_AWAITED,)},
        )

    def _accepted(self, conn: Connection, nid: int) -> None:
        conn.handler = self._from_master
        self.master = conn
        self.nid = nid
        self.log.set_node(self.options.cluster, nid)
        self._from_master.first = True
        self.master_features = ()
        limits = self.options.limits
        conn.watch_silence(limits.ping_after, limits.silence_limit)
        conn.ask(AskClusterState)

    def master_lost(self) -> None:
        """The primary is gone: nothing that it said is known any more."""
        stopping = self.state is ClusterState.STOPPING
        self.master = None
        self.state = None
        self.nid = self.options.nid
        self.pt.clear()
        for node in self.nodes.identified(NodeType.MASTER):
            node.connection = None
        if stopping:
            self.log.info("the cluster is stopped")
            self.runtime.call_later(STOP_DELAY, self.runtime.stop)
        else:
            self._bootstrap.start()

    # --- tools ------------------------------------------------------------------------

    def _accept(self, conn: Connection) -> None:
        conn.handler = self._from_tool

        def expire() -> None:
            if not conn.packets_received:
                conn.close("says nothing")

        self.runtime.call_later(self.options.limits.identification_timeout, expire)

    def summary(
        self, last_tid: bytes | None, awaited: Sequence[bytes] = ()
    ) -> tuple[bool, bool, str]:
        """(warning, problem, text) on the health of the cluster.

        One line more than neoppod's for each thing that the primary waits for. This is
        a warning as well: in particular, no storage must be stopped as long as others
        have not written that its replicas are up to date.

        Source: behaviour.md 10.2, operations.md 4.6.
        """
        cells: Counter[str] = Counter()
        down = set()
        running = self.nodes.running()
        for _, nid, state in self.pt:
            cells[state.name] += 1
            if nid not in running:
                down.add(nid)
        text = [str(self.state)]
        text += [f"{name}={count}" for name, count in sorted(cells.items())]
        if down:
            text.append(f"DOWN={len(down)}")
        if last_tid is not None:
            date = datetime_from_tid(last_tid).replace(tzinfo=None)
            text.append(f"ltid={last_tid.hex()} ({date})")
        problem = bool(down) or self.state not in OPERATIONAL
        warning = not problem and (
            bool(awaited) or any(name != CellState.UP_TO_DATE.name for name in cells)
        )
        lines = ["; ".join(text)]
        lines += [f"    {line.decode(errors='replace')}" for line in awaited]
        return warning, problem, "\n".join(lines)


class MasterHandler(Handler):
    """The primary master."""

    def __init__(self, admin: Admin) -> None:
        super().__init__()
        self.admin = admin
        self.first = True

    def closed(self, conn: Connection) -> None:
        self.admin.master_lost()

    def notify_node_information(
        self, conn: Connection, timestamp: float, nodes: Sequence[NodeRow]
    ) -> None:
        admin = self.admin
        first, self.first = self.first, False
        keep = admin.pt.nids() if first else ()
        update = admin.nodes.update(timestamp, nodes, full=first, keep=keep)
        for node in update.forgotten:
            if node.connection is not None and node.connection is not conn:
                node.connection.close("unknown node")
        for change in update.changes:
            if change.node.nid == admin.nid and change.state in (
                NodeState.DOWN,
                NodeState.UNKNOWN,
            ):
                admin.log.info("told to stop")
                admin.runtime.stop()

    def send_partition_table(
        self, conn: Connection, ptid: int | None, replicas: int, rows: Rows
    ) -> None:
        self.admin.pt.load(ptid, replicas, rows)

    def notify_partition_changes(
        self,
        conn: Connection,
        ptid: int,
        replicas: int,
        cells: Sequence[tuple[int, int, CellState]],
    ) -> None:
        self.admin.pt.update(ptid, replicas, cells)

    def notify_features(self, conn: Connection, features: Sequence[bytes]) -> None:
        self.admin.master_features = features

    def notify_cluster_information(self, conn: Connection, state: ClusterState) -> None:
        self.admin.state = state

    def answer_cluster_state(
        self, conn: Connection, state: ClusterState | None
    ) -> None:
        self.admin.state = state

    def notify_upstream_admin(self, conn: Connection, address: object) -> None:
        """Only of use to a backup cluster that is monitored."""
        self.admin.log.info("upstream admin %s: not monitored", address)

    def flush_log(self, conn: Connection) -> None:
        self.admin.log.flush()


class ToolHandler(Handler):
    """Control tools."""

    def __init__(self, admin: Admin) -> None:
        self.admin = admin
        for packet in RELAYED:
            setattr(self, packet.handler, self._relay(packet))
        super().__init__()

    def _primary(self) -> Connection:
        master = self.admin.master
        if master is None:
            raise not_ready("Not connected to a primary master.")
        return master

    def _relay(self, packet: Packet[...]) -> Callable[..., None]:
        """The method that relays a request to the primary, and its response back."""

        def relay(conn: Connection, *args: Any) -> None:
            reply = conn.defer()

            def done(*answer: Any) -> None:
                assert packet.answer is not None
                if packet.answer is Error:
                    reply.error(ErrorCode.ACK, answer[0])
                else:
                    reply.answer(packet.answer, *answer)

            def failed(code: int | None, text: str) -> None:
                if code is None:
                    code, text = ErrorCode.PROTOCOL_ERROR, "the primary master was lost"
                _fail(reply, code, text)

            conn.trust()
            self._primary().ask(packet, *args).then(done, failed)

        return relay

    # --- answered from what the admin knows ---

    def ask_primary(self, conn: Connection) -> None:
        node = self._primary().node
        assert node is not None
        assert node.nid is not None
        conn.answer(AnswerPrimary, node.nid)

    def ask_cluster_state(self, conn: Connection) -> None:
        self._primary()
        conn.answer(AnswerClusterState, self.admin.state)

    def ask_node_list(self, conn: Connection, node_type: NodeType | None) -> None:
        self._primary()
        rows = [
            as_row(node)
            for node in self.admin.nodes
            if node_type is None or node.type is node_type
        ]
        conn.answer(AnswerNodeList, rows)

    def ask_partition_list(
        self, conn: Connection, first: int, last: int, nid: int | None
    ) -> None:
        self._primary()
        pt = self.admin.pt
        if last > pt.np or (last and first >= last) or (first and first >= pt.np):
            raise denied(f"invalid range of partitions: there are {pt.np}")
        rows = pt.as_rows(first, last or None)
        if nid is not None:
            rows = [[cell for cell in row if cell[0] == nid] for row in rows]
        conn.answer(AnswerPartitionList, pt.ptid, pt.replicas, rows)

    def ask_monitor_information(self, conn: Connection) -> None:
        admin = self.admin
        master = self._primary()
        reply = conn.defer()

        def more(last_tid: bytes | None) -> None:
            if FEATURE_AWAITED in admin.master_features:
                master.ask(AskAwaited).then(
                    partial(tell, last_tid), lambda code, text: tell(last_tid, ())
                )
            else:
                tell(last_tid, ())

        def tell(last_tid: bytes | None, awaited: Sequence[bytes]) -> None:
            warning, problem, text = admin.summary(last_tid, awaited)
            reply.answer(
                AnswerMonitorInformation,
                [None] if warning else [],
                [None] if problem else [],
                text.encode(),
            )

        if admin.state in OPERATIONAL:
            master.ask(AskLastTransaction).then(more, lambda code, text: more(None))
        else:
            more(None)

    def flush_log(self, conn: Connection) -> None:
        self.admin.log.flush()
        if self.admin.master is not None:
            self.admin.master.notify(FlushLog)

    # --- admins of backup clusters ---

    def request_identification(
        self,
        conn: Connection,
        node_type: NodeType,
        nid: int | None,
        address: object,
        cluster_name: bytes,
        id_timestamp: float | None,
        extra: Mapping[bytes, Any],
    ) -> None:
        if node_type is not NodeType.ADMIN:
            raise ProtocolError("this is an admin node, no master")
        name = cluster_name.decode(errors="replace")
        raise ProtocolError(f"cluster {name!r} is not monitored by this admin")


def _fail(reply: Reply, code: int, text: str) -> None:
    """Pass an error of the primary on."""
    try:
        known = ErrorCode(code)
    except ValueError:
        known = ErrorCode.PROTOCOL_ERROR
    reply.error(known, text)
    if known is ErrorCode.PROTOCOL_ERROR:
        reply.conn.abort(text)
