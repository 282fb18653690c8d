"""Who connects to a storage node: clients and storages that the master has named.

A peer that the master has announced is accepted. One whose id timestamp is later than
what the master told last is parked until it tells more; any other is refused. Source:
behaviour 1.4, protocol 5.3 and 6.6.

Unlike what these say, who comes a moment before StartOperation is parked too, while a
master is there to say it: a client that is refused reports this node as failed, and the
master would put a healthy one aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.handler import Handler, Refused, not_ready, refuse
from neo.lib.node import Node, nid_str
from neo.lib.protocol import (
    FEATURE_CHECK,
    FEATURE_EARLY_VOTE,
    FEATURE_OBJECTS,
    FEATURE_SIZE,
    FEATURES,
    AcceptIdentification,
    NodeType,
    NotifyFeatures,
    WireAddress,
)

from .background import fail

if TYPE_CHECKING:
    from .app import StorageNode

# Peers waiting for the master to announce them.
PARKED_MAX = 256


class Parked(Handler):
    """Nothing but Ping is expected until we have answered."""

    def __init__(self, identification: Identification) -> None:
        super().__init__()
        self._identification = identification

    def closed(self, conn: Connection) -> None:
        self._identification.closed(conn)


class Identification(Handler):
    """The peers that are not identified yet."""

    def __init__(self, node: StorageNode) -> None:
        super().__init__()
        self._node = node
        self._handler = Parked(self)
        # conn -> (id of the request, type, nid, id timestamp, extra)
        self._parked: dict[
            Connection,
            tuple[int, NodeType, int, float | None, Mapping[bytes, Any]],
        ] = {}

    def accept(self, conn: Connection) -> None:
        """Somebody connects."""
        conn.handler = self
        self._node.connections[conn] = None
        limit = self._node.options.limits.identification_timeout
        self._node.runtime.call_later(limit, lambda: self._timeout(conn))

    def _timeout(self, conn: Connection) -> None:
        if conn.handler is self:
            conn.close("no identification")

    def closed(self, conn: Connection) -> None:
        self._parked.pop(conn, None)
        self._node.forget(conn)

    def request_identification(
        self,
        conn: Connection,
        node_type: NodeType,
        nid: int | None,
        address: WireAddress | None,
        cluster_name: bytes,
        id_timestamp: float | None,
        extra: Mapping[bytes, Any],
    ) -> None:
        node = self._node
        if cluster_name != node.options.cluster.encode():
            raise ProtocolError(
                f"cluster name {cluster_name.decode(errors='replace')!r}:"
                f" this node belongs to {node.options.cluster!r}"
            )
        if node.operation is None and node.master is None:
            raise not_ready("not operational")
        if nid is None:
            if node_type is not NodeType.STORAGE:
                raise ProtocolError("a node id is needed: this is a storage, no master")
            if node.operation is None:
                raise not_ready("not operational")
            conn.handler = node.operation.peer_handler
            conn.trust()
            node.operation.peer_handler.accepted(conn, None)
            conn.answer(AcceptIdentification, NodeType.STORAGE, None, None)
            return
        if nid == node.nid:
            raise ProtocolError(f"{nid_str(nid)} is this node")
        if node_type not in (NodeType.CLIENT, NodeType.STORAGE):
            raise ProtocolError(f"{node_type} can't connect to a storage node")
        self._identify(conn, conn.message_id, node_type, nid, id_timestamp, extra)

    def _identify(
        self,
        conn: Connection,
        msg_id: int,
        node_type: NodeType,
        nid: int,
        id_timestamp: float | None,
        extra: Mapping[bytes, Any],
    ) -> None:
        nodes = self._node.nodes
        peer = nodes.by_nid(nid)
        is_operational = self._node.operation is not None
        if (
            is_operational
            and peer is not None
            and peer.type is node_type
            and id_timestamp is not None
            and peer.id_timestamp == id_timestamp
        ):
            self._accept(conn, msg_id, peer, extra)
        elif is_operational and (
            id_timestamp is None or id_timestamp <= nodes.timestamp
        ):
            raise not_ready(f"{nid_str(nid)} is unknown to the master")
        elif len(self._parked) >= PARKED_MAX:
            raise not_ready("too many nodes wait for the master")
        else:
            self._parked[conn] = msg_id, node_type, nid, id_timestamp, extra
            conn.handler = self._handler
            if not is_operational:
                limit = self._node.options.limits.identification_timeout
                self._node.runtime.call_later(limit, lambda: self._give_up(conn))

    def _give_up(self, conn: Connection) -> None:
        """A peer waited for long enough: it may find what it needs elsewhere."""
        if conn in self._parked and self._node.operation is None:
            msg_id = self._parked.pop(conn)[0]
            refuse(conn, msg_id, not_ready("not operational"))

    def _accept(
        self, conn: Connection, msg_id: int, peer: Node, extra: Mapping[bytes, Any]
    ) -> None:
        operation = self._node.operation
        assert operation is not None
        nid = peer.nid
        wanted = extra.get(FEATURES)
        if peer.type is NodeType.STORAGE:
            operation.peer_handler.make_room(peer)
        elif peer.connection is not None:
            # Its id is the same: it lost the other connection, and we'll notice later.
            peer.connection.close("replaced by a new connection")
        conn.set_node(peer)
        peer.connection = conn
        if peer.type is NodeType.STORAGE:
            conn.handler = operation.peer_handler
            features = wanted if isinstance(wanted, tuple) else ()
            operation.peer_handler.accepted(conn, peer, features)
        else:
            conn.handler = operation.client_handler
        args = (NodeType.STORAGE, self._node.nid, nid)
        conn.send(AcceptIdentification, msg_id, args)
        if isinstance(wanted, tuple):
            offered: tuple[bytes, ...] = (FEATURE_CHECK,)
            if peer.type is NodeType.CLIENT:
                peer.extra["features"] = wanted
                offered = (
                    FEATURE_SIZE,
                    FEATURE_EARLY_VOTE,
                    FEATURE_OBJECTS,
                    FEATURE_CHECK,
                )
            conn.notify(NotifyFeatures, offered)

    def look_again(self) -> None:
        """The master told more: look again at who waits."""
        if self._node.operation is None:
            return
        parked, self._parked = self._parked, {}
        for conn, (msg_id, *arguments) in parked.items():
            if conn.closed:
                continue
            conn.handler = self
            try:
                self._identify(conn, msg_id, *arguments)  # type: ignore[arg-type]
            except Refused as error:
                refuse(conn, msg_id, error)
            except ProtocolError as error:
                fail(conn, msg_id, str(error))

    def check(self) -> None:
        """Assert that who is parked is connected, and nothing but parked."""
        for conn in self._parked:
            assert not conn.closed
            assert conn.handler is self._handler
