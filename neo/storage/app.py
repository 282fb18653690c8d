"""A storage node: its life from start to exit.

    search the primary -> initialisation -> operation -> initialisation -> ...

`StorageNode` owns what survives the phases: database, writer, node table, partition
table, listening socket. The connection of the master decides: without it there is no
operation, and all other connections are closed. Each change of phase lets the writer
drain before anything else comes from a master. Source: behaviour 5.1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from neo.lib.bootstrap import Bootstrap, Identity
from neo.lib.config import Limits
from neo.lib.connection import Connection
from neo.lib.exception import ConfigurationError, ProtocolError
from neo.lib.node import (
    Node,
    NodeManager,
    as_row,
    format_nodes,
    format_partition_table,
    nid_str,
    nid_type,
    wire_address,
)
from neo.lib.protocol import (
    AGE,
    FEATURE_CHECK,
    FEATURE_LEASE,
    FEATURES,
    READABLE,
    SPARE,
    ZERO_TID,
    CellState,
    ErrorCode,
    NodeRow,
    NodeState,
    NodeType,
    NotifyPackCompleted,
)
from neo.lib.pt import PartitionTable
from neo.lib.runtime import Runtime
from neo.lib.util import Address, format_address

from .background import QUEUE as BACKGROUND_QUEUE
from .background import RATE
from .database.interface import Backend, Tid
from .identification import Identification
from .initialization import Initialization
from .operation import Operation
from .writer import QUEUE as WRITER_QUEUE
from .writer import Writer

# Rows that one slice of a repair looks at.
REPAIR_SLICE = 1000


def _host_name() -> str:
    return os.uname().nodename


@dataclass(frozen=True)
class StorageOptions:
    """Options of `neostorage`; see operations.md 2.6."""

    cluster: str
    bind: Address
    masters: Sequence[Address]
    advertise: Address | None = None
    nid: int | None = None
    new_nid: bool = False
    reset: bool = False
    disable_pack: bool = False
    disable_drop_partitions: bool = False
    max_refusals: int = 0
    replication_rate: float = RATE  # MB/s, when clients are active
    limits: Limits = field(default_factory=Limits)
    save_masters: Callable[[list[Address]], object] | None = None
    host: str = field(default_factory=_host_name)  # first level of the topology path


class StorageNode:
    """The application of a storage node. `backend` is open; the node closes it."""

    def __init__(
        self, runtime: Runtime, backend: Backend, options: StorageOptions
    ) -> None:
        self.runtime = runtime
        self._began = runtime.monotonic()
        self.log = runtime.log
        self.backend = backend
        self.options = options
        self.writer = Writer(runtime, backend, lambda: len(self.connections) <= 1)
        self.nodes = NodeManager(options.save_masters)
        self.pt = PartitionTable()
        self.nid = options.nid
        self.id_timestamp: float | None = None
        self.address = options.advertise or options.bind
        self.connections: dict[Connection, None] = {}  # but the master's
        self.master: Connection | None = None
        self.master_features: tuple[bytes, ...] = ()
        self.operation: Operation | None = None
        self.last_pack = ZERO_TID  # id of the last approved pack order known
        self.identification = Identification(self)
        self.bootstrap = Bootstrap(
            runtime,
            self.nodes,
            self._identity,
            self._accepted,
            self._refused,
            options.limits.master_timeout,
        )
        self._refusals = 0
        self._gives_up_nid = False
        self._expects_all_nodes = False
        self._repairing = False
        self._stopping = False

    # --- start and stop -----------------------------------------------------------

    def start(self) -> None:
        """Listen and search the master. OSError if the address can't be used.

        ConfigurationError if the database belongs to another cluster.
        """
        options = self.options
        if options.reset:
            self.backend.erase()
            self.backend.close()
            self.log.warning("the database is erased")
            self.runtime.stop(0)
            return
        settings = self.backend.settings()
        if settings.name is not None and settings.name != options.cluster:
            raise ConfigurationError(
                f"the database belongs to cluster {settings.name!r},"
                f" {options.cluster!r} was given"
            )
        if options.new_nid and settings.nid is None:
            raise ConfigurationError("new-nid: the database is not that of a node")
        if settings.nid is not None:
            self.nid = settings.nid
        self.log.set_node(options.cluster, self.nid)
        if not options.new_nid:
            bound = self.runtime.listen(options.bind, self.identification.accept)
            if options.advertise is None:
                self.address = options.bind[0], bound[1]
            elif not options.advertise[1]:
                self.address = options.advertise[0], bound[1]
        for address in options.masters:
            if self.nodes.by_address(address) is None:
                self.nodes.add(NodeType.MASTER, None, address)
        self.load_partition_table()
        self.bootstrap.start()

    def shutdown(self, status: int = 0, erase: bool = False) -> None:
        """Stop cleanly: what is committed is durable when the process ends."""
        if self._stopping:
            return
        self._stopping = True
        self.bootstrap.stop()
        self.runtime.unlisten()
        if self.master is not None:
            self.master.abort("shutdown")
        self._leave_operation()

        def closed(result: object) -> None:
            if isinstance(result, Exception):
                raise result
            self.runtime.stop(status)

        def finish() -> None:
            if erase:
                self.backend.erase()
            self.backend.close()

        # Nothing reads nor writes any more when the database is closed.
        self.writer.barrier(
            lambda: self.runtime.submit(
                BACKGROUND_QUEUE,
                lambda: None,
                lambda result: self.runtime.submit(WRITER_QUEUE, finish, closed),
            )
        )

    # --- joining the cluster ------------------------------------------------------

    def _identity(self) -> Identity:
        new_nid: tuple[int, ...] = ()
        if self.options.new_nid:
            new_nid = tuple(self.backend.own_cells())
        extra: dict[bytes, Any] = {
            b"devpath": (self.options.host.encode(), b"%d" % self.backend.device),
            b"new_nid": new_nid,
            FEATURES: [FEATURE_LEASE, FEATURE_CHECK],
            AGE: self.runtime.monotonic() - self._began,
        }
        # (What it knew of the table may have gone with a nid that was somebody else's.)
        if self.backend.settings().ptid is not None and self._is_spare():
            extra[SPARE] = True
        is_clone = self.options.new_nid
        return (
            NodeType.STORAGE,
            None if is_clone or self._gives_up_nid else self._noted_nid(),
            None if is_clone else wire_address(self.address),
            self.options.cluster.encode(),
            None,
            extra,
        )

    def _noted_nid(self) -> int | None:
        """The nid that it has for good."""
        return self.options.nid or self.backend.settings().nid

    def _is_spare(self) -> bool:
        """Has it nothing, as far as it knows? Then its nid is only a wish.

        A master forgets a storage without cells that leaves, and may give its nid to
        another one. Or a master that lost the election gave it. Source: behaviour 12.1
        D8.
        """
        return self.options.nid is None and not self.backend.own_cells()

    def _refused(self, code: int, text: str) -> None:
        """A master answered with an Error."""
        if code != ErrorCode.PROTOCOL_ERROR:
            return  # NOT_READY: later, maybe
        self._refusals += 1
        # Who has seen a table says that it is spare, and the master does what is right.
        # Else the nid may be in a table that was not written here yet, so it is given
        # up for one attempt out of two only.
        is_wish = self._is_spare() and self.backend.settings().ptid is None
        self._gives_up_nid = is_wish and not self._gives_up_nid
        limit = self.options.max_refusals
        if limit and self._refusals >= limit:
            self.log.error("refused %d times by the masters: %s", self._refusals, text)
            self.shutdown(1)

    def _accepted(self, conn: Connection, nid: int) -> None:
        if nid_type(nid) is not NodeType.STORAGE:
            raise ProtocolError(f"{nid} is no id of a storage node")
        self._refusals = 0
        self._gives_up_nid = False
        self.master = conn
        self.master_features = ()
        self._expects_all_nodes = True
        handler = Initialization(self)
        conn.handler = handler
        limits = self.options.limits
        conn.watch_silence(limits.ping_after, limits.silence_limit)
        settings = self.backend.settings()
        backend, name = self.backend, self.options.cluster
        # Only now, for the name may be a typing error (operations W6).
        if settings.name is None:
            self.writer.submit(lambda: backend.set_name(name))
        # Who has no cells notes its nid along with the next table: in the present one,
        # which the master may need as it is, it may be that of another storage, which
        # the master does not know yet.
        if settings.nid != nid and not self._is_spare():
            self.writer.submit(lambda: backend.set_nid(nid))
        self.nid = nid
        self.log.set_node(name, nid)
        self.log.info("%s of cluster %s, primary %s", nid_str(nid), name, conn)
        handler.hold(conn, self._joined)

    def _joined(self) -> None:
        if self.options.new_nid:
            self.log.warning("the new node id is %s", nid_str(self.nid))
            self.shutdown()
        else:
            self.load_partition_table()

    def load_partition_table(self) -> None:
        """Take the partition table of the database."""
        settings = self.backend.settings()
        rows: list[list[tuple[int, CellState]]] = []
        for partition, nid, state in self.backend.partition_table():
            while len(rows) <= partition:
                rows.append([])
            rows[partition].append((nid, state))
        ptid = settings.ptid if rows else None
        self.pt.load(ptid, settings.replicas, rows)

    def master_lost(self, conn: Connection) -> None:
        """The connection of the master is closed."""
        self.master = None
        if conn.node is not None:
            conn.node.connection = None
        self._leave_operation()
        if not self._stopping:
            self.log.warning("connection to the primary master lost: %s", conn.reason)
            self.writer.barrier(self._search)

    def _search(self) -> None:
        if not (self._stopping or self.bootstrap.searching or self.master):
            self.bootstrap.start()

    # --- phases -------------------------------------------------------------------

    def start_operation(self, conn: Connection) -> None:
        """The master says so, the partition table is complete."""
        self.log.info("operation starts")
        if self.backend.settings().backup_tid is not None:
            self.writer.submit(lambda: self.backend.set_backup_tid(None))
        self.operation = Operation(self)
        self.operation.enter(conn)
        self.identification.look_again()

    def stop_operation(self, conn: Connection) -> None:
        """StopOperation: what follows is meant for the initialisation phase."""
        self._leave_operation()
        handler = Initialization(self)
        conn.handler = handler
        handler.hold(conn, lambda: None)

    def _leave_operation(self) -> None:
        operation, self.operation = self.operation, None
        if operation is not None:
            self.log.info("operation stops")
            operation.leave()
        for conn in tuple(self.connections):
            conn.close("not operational any more")
        self.writer.flush()

    def forget(self, conn: Connection) -> None:
        """A connection of `connections` is closed."""
        self.connections.pop(conn, None)

    # --- nodes --------------------------------------------------------------------

    def update_nodes(self, timestamp: float, rows: Iterable[NodeRow]) -> None:
        """Apply NotifyNodeInformation."""
        full, self._expects_all_nodes = self._expects_all_nodes, False
        update = self.nodes.update(timestamp, rows, full=full, keep=self.pt.nids())
        for node, _, state in update.changes:
            if node.nid == self.nid and node.type is NodeType.STORAGE:
                self.id_timestamp = node.id_timestamp
                if state in (NodeState.DOWN, NodeState.UNKNOWN):
                    self._expelled(state)
                    return
            elif node.type is NodeType.MASTER:
                continue
            elif state is not NodeState.RUNNING:
                self._node_gone(node)
        for node in update.forgotten:
            if node.type is not NodeType.MASTER:
                self._node_gone(node)
        self.identification.look_again()

    def _node_gone(self, node: Node) -> None:
        if node.connection is not None:
            node.connection.close("gone, says the master")
        if node.type is NodeType.CLIENT and self.operation is not None:
            self.operation.transactions.abort_of_node(node, voted=True)

    def _expelled(self, state: NodeState) -> None:
        if state is NodeState.UNKNOWN:
            self.log.warning("dropped from the cluster: the database is erased")
        else:
            self.log.info("the master stops this node")
        self.shutdown(erase=state is NodeState.UNKNOWN)

    # --- what both phases need ----------------------------------------------------

    def own_state(self, partition: int) -> CellState | None:
        """State of the cell of this node in a partition."""
        assert self.nid is not None
        return self.pt.state(partition, self.nid)

    def is_readable(self, partition: int) -> bool:
        """Whether a partition, which may not exist, is readable here."""
        state = self.own_state(partition) if partition < self.pt.np else None
        return state is not None and state in READABLE

    def readable_partitions(self) -> list[int]:
        """Numbers of the partitions that are readable here."""
        return [p for p in range(self.pt.np) if self.is_readable(p)]

    def notify_pack_completed(self) -> None:
        """Tell the master up to which pack order all cells are packed. Source: 12.2."""
        cells = self.backend.own_cells()
        if cells and self.master is not None and not self.options.disable_pack:
            pack_id: Tid = min(cell.pack for cell in cells.values())
            self.master.notify(NotifyPackCompleted, pack_id)

    def repair(self, dry_run: bool) -> None:
        """Delete, or count, values that nothing refers to. Source: 13.3."""
        if self._repairing:
            return
        self._repairing = True
        found = 0

        def pruned(result: tuple[int, int | None]) -> None:
            nonlocal found
            found += result[0]
            if result[1] is None or self._stopping:
                self._repairing = False
                self.log.warning(
                    "repair: %d unreferenced values %s",
                    found,
                    "found" if dry_run else "deleted",
                )
            else:
                prune(result[1])

        def prune(min_id: int) -> None:
            self.writer.submit(
                lambda: self.backend.prune_orphans(min_id, REPAIR_SLICE, dry_run),
                pruned,
                durable=False,
            )

        prune(0)

    # --- debugging ----------------------------------------------------------------

    def dump(self) -> None:
        """Log the state of the node."""
        log = self.log.info
        log("%s of %s", nid_str(self.nid), self.options.cluster)
        log("nodes:\n%s", format_nodes(as_row(node) for node in self.nodes))
        states = {
            node.nid: node.state
            for node in self.nodes.of_type(NodeType.STORAGE)
            if node.nid is not None
        }
        pt = self.pt
        rows = pt.as_rows()
        log("%s", format_partition_table(pt.ptid or 0, pt.replicas, rows, states))
        if self.operation is None:
            where = self.bootstrap.trying
            log(
                "not operational%s",
                f", trying {format_address(where)}: {self.bootstrap.failure}"
                if where and self.master is None
                else "",
            )
        else:
            for line in self.operation.transactions.describe():
                log("%s", line)
            for line in self.operation.replication.describe():
                log("%s", line)

    def check(self) -> None:
        """Assert what must hold between two events."""
        self.nodes.check()
        self.pt.check()
        self.writer.check()
        self.identification.check()
        for conn in self.connections:
            assert not conn.closed, conn
        if self.operation is not None:
            assert self.master is not None
            assert not self.master.closed
            self.operation.check()
