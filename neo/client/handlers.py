"""What the primary master and the storages may say to a client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.handler import Handler
from neo.lib.node import nid_str
from neo.lib.protocol import (
    FEATURE_CHECK,
    FEATURE_EARLY_VOTE,
    FEATURE_OBJECTS,
    FEATURE_SIZE,
    FEATURES,
    ClusterState,
    NodeRow,
    NodeState,
    NodeType,
    Packet,
    RequestIdentification,
    Rows,
    WireAddress,
)

from .answers import error_name

if TYPE_CHECKING:
    from .app import ClientApp


class MasterHandler(Handler):
    """What the primary master may say."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__()
        self.app = app
        self.first = True
        self.features: tuple[bytes, ...] = ()

    def closed(self, conn: Connection) -> None:
        """The session ends."""
        self.app.master_lost(conn)

    def notify_features(self, conn: Connection, features: Sequence[bytes]) -> None:
        """What it offers beyond protocol 5."""
        self.features = tuple(features)

    def notify_node_information(
        self, conn: Connection, timestamp: float, nodes: Sequence[NodeRow]
    ) -> None:
        """Nodes changed; the first time: all nodes."""
        app = self.app
        is_first, self.first = self.first, False
        update = app.nm.update(
            timestamp, nodes, full=is_first, keep=app.pt.nids() if is_first else ()
        )
        gone = [c.node for c in update.changes if c.state is not NodeState.RUNNING]
        for change in update.changes:
            # It failed before it was (again) part of the cluster. Who would still
            # leave it aside, would make the master expel it: for ever, if the cluster
            # is busy.
            if change.state is NodeState.RUNNING and change.node.nid is not None:
                app.unreachable.pop(change.node.nid, None)
                if not is_first and change.node.address is not None:
                    app.runtime.connection_succeeded(change.node.address)
        for node in (*gone, *update.forgotten):
            app.close_link(node)
        app.check_ready()

    def send_partition_table(
        self, conn: Connection, ptid: int | None, num_replicas: int, rows: Rows
    ) -> None:
        """The complete table."""
        self.app.pt.load(ptid, num_replicas, rows)
        self.app.check_ready()

    def notify_partition_changes(
        self, conn: Connection, ptid: int, num_replicas: int, cells: Sequence[Any]
    ) -> None:
        """Changes of the table."""
        self.app.pt.update(ptid, num_replicas, cells)
        self.app.check_ready()

    def notify_cluster_information(self, conn: Connection, state: ClusterState) -> None:
        """The phase changes; what matters to clients comes as StopOperation."""

    def stop_operation(self, conn: Connection) -> None:
        """The cluster is not operational any more."""
        conn.close("the cluster stops its operation")

    def not_primary_master(
        self, conn: Connection, primary: int | None, masters: Sequence[WireAddress]
    ) -> None:
        """It lost an election."""
        conn.close("not the primary master any more")

    def invalidate_objects(
        self, conn: Connection, tid: bytes, oids: Sequence[bytes]
    ) -> None:
        """Another client committed."""
        if self.app.synchronised:
            self.app.invalidate(tid, oids)

    def flush_log(self, conn: Connection) -> None:
        """An administrator wants to read all logs."""
        conn.log.flush()

    def error(
        self, conn: Connection, packet: Packet[...] | None, code: int, text: str
    ) -> None:
        """To a notification: AbortTransaction, which neoppod's masters may refuse."""
        conn.log.info("%s: error %s: %s", conn, error_name(code), text)


class StorageIdentification(Handler):
    """A connection to a storage node, until it is identified."""

    def __init__(self, app: ClientApp, nid: int) -> None:
        super().__init__()
        self.app = app
        self.nid = nid

    def connected(self, conn: Connection) -> None:
        """Say who we are."""
        app = self.app
        me = app.nm.by_nid(app.nid)
        conn.ask(
            RequestIdentification,
            NodeType.CLIENT,
            app.nid,
            None,
            app.options.cluster.encode(),
            None if me is None else me.id_timestamp,
            {
                FEATURES: [
                    FEATURE_SIZE,
                    FEATURE_EARLY_VOTE,
                    FEATURE_OBJECTS,
                    FEATURE_CHECK,
                ]
            },
        ).then(
            lambda *args: self._accepted(conn, *args),
            lambda code, text: (
                None if code is None else conn.close(f"{error_name(code)}: {text}")
            ),
        )

    def _accepted(
        self, conn: Connection, kind: NodeType, nid: int | None, your_nid: int | None
    ) -> None:
        app = self.app
        node = app.nm.by_nid(self.nid)
        if kind is not NodeType.STORAGE or nid != self.nid or your_nid != app.nid:
            raise ProtocolError(f"storage {nid_str(self.nid)} was expected")
        if node is None:
            conn.close("node forgotten meanwhile")
            return
        node.connection = conn
        conn.set_node(node)
        conn.handler = StorageHandler(app, self.nid)
        app.runtime.connection_succeeded(conn.address)
        app.unreachable.pop(self.nid, None)
        app.failures.pop(self.nid, None)
        limits = app.options.limits
        conn.watch_silence(limits.ping_after, limits.silence_limit, only_if_owed=True)

    def closed(self, conn: Connection) -> None:
        """It can't be reached, or refuses us."""
        app = self.app
        app.unreachable[self.nid] = app.runtime.monotonic()
        app.link_lost(self.nid, conn)


class StorageHandler(Handler):
    """What an identified storage node may say."""

    def __init__(self, app: ClientApp, nid: int) -> None:
        super().__init__()
        self.app = app
        self.nid = nid
        self.features: tuple[bytes, ...] = ()

    def closed(self, conn: Connection) -> None:
        """The link broke."""
        self.app.link_lost(self.nid, conn)

    def notify_features(self, conn: Connection, features: Sequence[bytes]) -> None:
        """What it offers beyond protocol 5."""
        self.features = tuple(features)

    def notify_deadlock(self, conn: Connection, ttid: bytes, oid: bytes) -> None:
        """An older transaction waits for a lock of ours."""
        txn = self.app.transactions.get(ttid)
        if txn is not None:
            txn.deadlock(conn, self.nid, oid)


def offers(conn: Connection, feature: bytes) -> bool:
    """Whether a storage or the master named a feature beyond protocol 5."""
    handler = conn.handler
    return (
        isinstance(handler, StorageHandler | MasterHandler)
        and feature in handler.features
    )
