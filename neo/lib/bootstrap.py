"""Joining a cluster: find the primary master and be identified by it.

The known masters are tried in turn, for ever; the throttle of the Runtime paces the
loop. A secondary answers NotPrimaryMaster, which names the primary if it knows it.
Source: behaviour.md 1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .connection import Connection
from .exception import ProtocolError
from .handler import Handler
from .node import NodeManager, address_from_wire
from .protocol import (
    ErrorCode,
    NodeType,
    Packet,
    RequestIdentification,
    WireAddress,
)
from .runtime import RECONNECTION_DELAY, Runtime
from .util import Address, format_address

# Arguments of RequestIdentification.
Identity = tuple[
    NodeType, int | None, WireAddress | None, bytes, float | None, Mapping[bytes, Any]
]

IDENTIFICATION_TIMEOUT = 2.0
# Nodes start in any order: nobody there is worth a warning after this long only.
PATIENCE = 5.0


class Bootstrap(Handler):
    """The search of the primary: `start()` until `accepted(conn, own nid)`.

    `accepted` must set the connection's handler before it returns; `conn.node` is the
    primary then. `refused(code, text)` is told each Error (PROTOCOL_ERROR,
    NOT_READY...), after which the search goes on unless `stop()` is called. A master
    that does not answer within `timeout` seconds is left for the next one.
    """

    def __init__(
        self,
        runtime: Runtime,
        nodes: NodeManager,
        identity: Callable[[], Identity],
        accepted: Callable[[Connection, int], object],
        refused: Callable[[int, str], object] = lambda code, text: None,
        timeout: float = IDENTIFICATION_TIMEOUT,
    ) -> None:
        super().__init__()
        self.runtime = runtime
        self.nodes = nodes
        self.identity = identity
        self.accepted = accepted
        self.refused = refused
        self.timeout = timeout
        self.conn: Connection | None = None
        self.searching = False
        # What the search is busy with, and why the last attempt failed: for messages.
        self.trying: Address | None = None
        self.failure = ""
        self._next: Address | None = None
        self._tried: list[Address] = []
        self._since = 0.0

    def start(self) -> None:
        """Search, beginning with the first known master."""
        assert not self.searching
        self.searching = True
        self._since = self.runtime.monotonic()
        self._tried.clear()
        self._try_next()

    def stop(self) -> None:
        """Give up."""
        self.searching = False
        if self.conn is not None:
            self.conn.close()

    def _try_next(self) -> None:
        address, self._next = self._next, None
        if address is None:
            masters = [n.address for n in self.nodes.of_type(NodeType.MASTER)]
            known = [a for a in masters if a is not None]
            left = [a for a in known if a not in self._tried]
            if not left:
                self._tried.clear()
                left = known
            address = left[0]
        if address not in self._tried:
            self._tried.append(address)
        self.trying = address
        conn = self.conn = self.runtime.connect(address, self)
        # The throttle may defer the attempt; then the other machine may be silent.
        limit = RECONNECTION_DELAY + self.timeout
        self.runtime.call_later(limit, lambda: self._unreachable(conn))

    # --- events -----------------------------------------------------------------------

    def connected(self, conn: Connection) -> None:
        conn.ask(RequestIdentification, *self.identity())
        conn.trust()
        self.runtime.call_later(self.timeout, lambda: self._expired(conn))

    def _unreachable(self, conn: Connection) -> None:
        if conn is self.conn and not conn.is_established:
            conn.close("no connection in time")

    def _expired(self, conn: Connection) -> None:
        if conn.handler is self:
            conn.close("no answer to the identification")

    def closed(self, conn: Connection) -> None:
        if conn is not self.conn:
            return
        self.conn = None
        if self.searching:
            if self._next is None:
                self.failure = self.failure or conn.reason
                waited = self.runtime.monotonic() - self._since
                if conn.is_established or waited >= PATIENCE:
                    self.runtime.log.throttled(
                        ("bootstrap", conn.address, conn.reason),
                        30,
                        "cannot join the cluster through master %s: %s",
                        format_address(conn.address),
                        conn.reason,
                    )
            self._try_next()

    def not_primary_master(
        self, conn: Connection, primary: int | None, masters: Sequence[WireAddress]
    ) -> None:
        """Redirection; the peer closes."""
        addresses = [address_from_wire(master) for master in masters]
        for address in addresses:
            if self.nodes.by_address(address) is None:
                self.nodes.add(NodeType.MASTER, None, address)
        if primary is not None:
            if primary >= len(addresses):
                raise ProtocolError(f"no master number {primary}")
            self._next = addresses[primary]
            # If that one is dead, this one may be the next primary, and soon.
            self.runtime.connection_succeeded(conn.address)
        conn.close("not the primary master")

    def accept_identification(
        self,
        conn: Connection,
        node_type: NodeType,
        nid: int | None,
        your_nid: int | None,
    ) -> None:
        """We belong to the cluster."""
        if node_type is not NodeType.MASTER or nid is None or your_nid is None:
            raise ProtocolError(
                f"a master was expected at {format_address(conn.address)}"
            )
        self.searching = False
        self.conn = None
        self.failure = ""
        self.runtime.connection_succeeded(conn.address)
        node = self.nodes.by_address(conn.address)
        if node is None or node.type is not NodeType.MASTER:
            raise ProtocolError(f"unknown master {conn.address}")
        other = self.nodes.by_nid(nid)
        if other is not None and other is not node:
            self.nodes.set_nid(other, None)
        self.nodes.set_nid(node, nid)
        node.connection = conn
        conn.set_node(node)
        self.accepted(conn, your_nid)

    def error(
        self, conn: Connection, packet: Packet[...] | None, code: int, text: str
    ) -> None:
        name = ErrorCode(code).name if code in set(ErrorCode) else str(code)
        self.failure = text or name
        conn.close(f"{name}: {text}")
        self.refused(code, text)
