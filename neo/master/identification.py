"""Identification: who connects to the primary master (behaviour 1.2, protocol 5.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.handler import Handler, Refused, not_ready, refuse
from neo.lib.node import Node, address_from_wire, as_row, nid_str, nid_type
from neo.lib.protocol import (
    AGE,
    FEATURE_AWAITED,
    FEATURE_IMPORT,
    FEATURE_LEASE,
    FEATURES,
    SPARE,
    AcceptIdentification,
    CellState,
    ErrorCode,
    NodeState,
    NodeType,
    NotifyFeatures,
    NotifyNodeInformation,
    WireAddress,
)
from neo.lib.util import format_address

from . import policy
from .phase import Claim

if TYPE_CHECKING:
    from .app import Master


# How long a peer waits for an answer that would be a refusal now (seconds): less than
# it has patience for (Limits.master_timeout).
PARKED = 1.5
PARKED_MAX = 1000


class Parked(Handler):
    """A peer whose identification waits: nothing else is expected from it."""

    def __init__(self, identification: Identification) -> None:
        super().__init__()
        self.identification = identification

    def closed(self, conn: Connection) -> None:
        self.identification.parked.pop(conn, None)


class Identification(Handler):
    """A connection whose peer is not identified.

    When a primary dies, all come to another master before it knows that it will be
    primary, or before it is RUNNING. Who is sent away then must wait for a second until
    it may come again (`Throttle`): so it rather waits here.
    """

    def __init__(self, master: Master) -> None:
        super().__init__()
        self.master = master
        self.parked: dict[Connection, tuple[int, Claim]] = {}  # by id of the request
        self.parked_handler = Parked(self)

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
        master = self.master
        if cluster_name != master.cluster_name:
            name = cluster_name.decode(errors="backslashreplace")
            raise ProtocolError(
                f"cluster name {name!r} expected, the master at"
                f" {format_address(master.address)} serves {master.options.cluster!r}"
            )
        where = address_from_wire(address)
        if where == master.address:
            raise ProtocolError(f"address conflict: {format_address(where)} is mine")
        if nid is not None and nid_type(nid) is not node_type:
            nid = None  # it can only be a mistake
        claim = Claim(node_type, nid, where, id_timestamp, extra)
        if master.phase.soon_better(claim) and len(self.parked) < PARKED_MAX:
            self.parked[conn] = conn.message_id, claim
            conn.handler = self.parked_handler
            master.runtime.call_later(PARKED, lambda: self._answer(conn))
        else:
            master.phase.identify(conn, claim)

    def look_again(self) -> None:
        """Another phase: it can perhaps say more to who waits."""
        for conn, (_, claim) in list(self.parked.items()):
            if not self.master.phase.soon_better(claim):
                self._answer(conn)

    def _answer(self, conn: Connection) -> None:
        """Now or never."""
        if conn not in self.parked:
            return
        msg_id, claim = self.parked.pop(conn)
        conn.handler = self
        conn.message_id = msg_id
        try:
            self.master.phase.identify(conn, claim)
        except Refused as error:
            refuse(conn, msg_id, error)
        except ProtocolError as error:
            conn.error(msg_id, ErrorCode.PROTOCOL_ERROR, str(error))
            conn.abort(str(error))

    # --- the primary ------------------------------------------------------------------

    def identify(self, conn: Connection, claim: Claim) -> None:
        """Accept a peer or refuse it (Refused, ProtocolError)."""
        master = self.master
        self._replace_silent(claim)
        kind = claim.kind
        if kind is NodeType.STORAGE and claim.address is None:
            self._clone(conn, claim)
            return
        node = self._look_up(claim)
        if kind is NodeType.CLIENT:
            self._client(conn, claim, node)
        elif kind is NodeType.STORAGE:
            if master.primary.put_aside(node):
                # Always the same words: it asks each second, and logs what is new.
                raise not_ready(
                    "put aside for a minute or more: it did not get ready in time, or"
                    " clients can't reach it"
                )
            state = master.primary.storage_state(node)
            self._accept(conn, claim, node, state, master.primary.storage)
        elif kind is NodeType.ADMIN:
            self._accept(conn, claim, node, NodeState.RUNNING, master.admin_handler)
        elif claim.address is None:
            raise ProtocolError("a master has an address")
        elif master.primary.master_claims(conn, claim):
            self._accept(conn, claim, node, NodeState.RUNNING, master.master_handler)

    def _replace_silent(self, claim: Claim) -> None:
        """Drop a connection that is dead, but not known to be (behaviour 12.1 D5)."""
        master, kind = self.master, claim.kind
        node = master.nodes.by_address(claim.address)
        if node is None or node.connection is None:
            return
        silence = master.runtime.monotonic() - node.connection.last_received
        if (
            silence >= master.limits.ping_after
            and node.type is kind
            # Temporary ids may have changed since.
            and (kind is not NodeType.STORAGE or claim.nid in (None, node.nid))
        ):
            node.connection.close("replaced by a new connection of the same node")

    def _look_up(self, claim: Claim) -> Node | None:
        """The node that the peer is; None for a new one."""
        master = self.master
        nodes = master.nodes
        by_nid = nodes.by_nid(claim.nid)
        by_address = nodes.by_address(claim.address)
        if by_address is not None:
            if by_address.type is not claim.kind:
                raise ProtocolError(
                    f"address conflict: {by_address} is at this address"
                )
            if by_address.connection is not None:
                raise ProtocolError(f"already connected: {nid_str(by_address.nid)}")
            if by_nid in (None, by_address):
                return self._same_storage(claim, by_address)
            if claim.nid is not None and claim.nid < 0:
                return by_address
            raise ProtocolError(
                f"{nid_str(claim.nid)} is not at this address: {by_address} is"
            )
        if by_nid is None or by_nid is master.node:
            return None
        if by_nid.connection is None:
            if _is_spare(claim) and (
                by_nid.address is not None or by_nid.nid in master.pt.readable_nids()
            ):
                return None  # another storage got the nid meanwhile
            return by_nid
        if claim.nid is not None and claim.nid < 0:
            return None
        return self._permanent_twice(claim, by_nid)

    def _same_storage(self, claim: Claim, node: Node) -> Node | None:
        """A node that was known at this address, unless it has another database now.

        A storage whose database was erased must not be taken for the one with the data.
        """
        if (
            claim.kind is NodeType.STORAGE
            and claim.nid != node.nid
            and self.master.is_member(node.nid)
        ):
            self.master.log.warning(
                "%s: another database than that of %s is at its address",
                format_address(claim.address or ("", 0)),
                nid_str(node.nid),
            )
            self.master.nodes.set_address(node, None)
            self.master.tell_nodes([node])
            return None
        return node

    def _permanent_twice(self, claim: Claim, node: Node) -> Node | None:
        """Two storages have the same nid: of an empty one, it is only a wish.

        It happens when masters met after they had given nids, or when a storage that
        had no cell was forgotten.
        """
        empty = self.master.primary.empty_storages
        if claim.address in empty or _is_spare(claim):
            return None
        if node.address in empty or node.extra.get("spare"):
            nid = node.nid
            node.connection.close("its nid belongs to another storage")
            return self.master.nodes.by_nid(nid)  # it may be forgotten now
        raise ProtocolError(f"duplicated node id: {nid_str(node.nid)} is connected")

    def turn_spares_away(self) -> None:
        """A table is known, by which storages with the nids of some have data, or with
        those that were given to empty ones have cells.

        They come again, and get other nids.
        """
        master = self.master
        members, readable = master.pt.nids(), master.pt.readable_nids()
        for node in master.nodes.identified(NodeType.STORAGE):
            if (node.extra.get("spare") and node.nid in readable) or (
                node.extra.get("new") and node.nid in members
            ):
                node.connection.close("its nid belongs to another storage")
                if node in master.nodes:
                    master.nodes.set_address(node, None)
                    master.tell_nodes([node])

    # --- by type ----------------------------------------------------------------------

    def _client(self, conn: Connection, claim: Claim, node: Node | None) -> None:
        backup = claim.extra.get(b"backup")
        read_only = bool(claim.extra.get(b"read_only", backup is not None))
        if claim.address is not None:
            raise ProtocolError("a client has no address")
        handler = self.master.primary.client_handler(read_only)
        if node is not None and node.type is not NodeType.CLIENT:
            node = None
        self._accept(conn, claim, node, NodeState.RUNNING, handler)

    def _clone(self, conn: Connection, claim: Claim) -> None:
        """A copied database that wants a nid of its own (behaviour 2.9)."""
        master = self.master
        if not master.primary.may_clone():
            raise not_ready(f"the cluster is {master.phase.state}")
        partitions = claim.extra.get(b"new_nid")
        np = master.pt.np
        if (
            claim.nid is not None
            or not partitions
            or type(partitions) is not tuple
            or not all(type(p) is int and 0 <= p < np for p in partitions)
        ):
            raise ProtocolError("a storage has an address, or wants a new node id")
        node = self._register(claim, None, NodeState.DOWN)
        assert node.nid is not None
        nid = node.nid
        cells: list[policy.Cell] = [
            (partition, nid, CellState.OUT_OF_DATE)
            for partition in dict.fromkeys(partitions)
        ]
        master.change_table(cells)
        self._welcome(conn, node, master.primary.storage)

    # --- accepting --------------------------------------------------------------------

    def _accept(
        self,
        conn: Connection,
        claim: Claim,
        node: Node | None,
        state: NodeState,
        handler: Handler,
    ) -> None:
        self._welcome(conn, self._register(claim, node, state), handler)

    def _register(self, claim: Claim, node: Node | None, state: NodeState) -> Node:
        """Put the peer into the node table, and tell the others."""
        nodes = self.master.nodes
        kind, wanted, address, _, extra = claim
        if node is None:
            node = nodes.add(kind, nodes.free_nid(kind, address, wanted), address)
        else:
            if address is not None:
                nodes.set_address(node, address)
            if node.nid is None or wanted not in (None, node.nid):
                nodes.set_nid(node, nodes.free_nid(kind, node.address, wanted))
        node.extra = _extra(kind, extra)
        age = extra.get(AGE)
        if kind is NodeType.STORAGE and type(age) is float and age >= 0:
            node.extra["began"] = self.master.runtime.monotonic() - age
        if kind is NodeType.STORAGE and wanted is None and self.master.pt.ptid is None:
            node.extra["new"] = True  # until it gets a table
        node.state = state
        node.id_timestamp = self.master.timestamp()
        self.master.tell_nodes([node], but=node)
        return node

    def _welcome(self, conn: Connection, node: Node, handler: Handler) -> None:
        """Tell the peer that it is accepted, and what it must know."""
        master = self.master
        node.connection = conn
        conn.set_node(node)
        conn.handler = handler
        master.log.info("%s is accepted", node)
        conn.answer(AcceptIdentification, NodeType.MASTER, master.node.nid, node.nid)
        others = [n for n in master.nodes if n is not node]
        rows = master.told_about(node, others)
        # The peer first: nobody else tells it its own id timestamp.
        conn.notify(NotifyNodeInformation, master.timestamp(), [as_row(node), *rows])
        if "features" in node.extra:
            features = {
                NodeType.STORAGE: (FEATURE_LEASE,),
                NodeType.ADMIN: (FEATURE_AWAITED,),
                NodeType.CLIENT: (FEATURE_IMPORT,),
            }
            conn.notify(NotifyFeatures, features[node.type])
        master.primary.joined(node, conn)


def _is_spare(claim: Claim) -> bool:
    return claim.kind is NodeType.STORAGE and claim.extra.get(SPARE) is True


def _extra(kind: NodeType, extra: Mapping[bytes, Any]) -> dict[str, Any]:
    """What a peer says of itself, as far as it makes sense."""
    known: dict[str, Any] = {}
    path = extra.get(b"devpath")
    if kind is NodeType.STORAGE and type(path) is tuple:
        known["devpath"] = tuple(part for part in path if type(part) is bytes)
    if kind is NodeType.STORAGE and extra.get(SPARE) is True:
        known["spare"] = True  # until it gets cells
    if (
        kind in (NodeType.STORAGE, NodeType.ADMIN, NodeType.CLIENT)
        and type(extra.get(FEATURES)) is tuple
    ):
        known["features"] = extra[FEATURES]
    backup = extra.get(b"backup")
    if kind is NodeType.ADMIN and type(backup) is tuple:
        known["backup"] = backup
    if kind is NodeType.CLIENT and type(backup) is bytes:
        known["backup"] = backup
    return known
