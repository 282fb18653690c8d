"""Nodes of a cluster, as one of them knows them.

The primary master decides; it tells the others in NotifyNodeInformation, whose rows
`NodeManager.update` applies. What follows (connections to close, a process to stop) is
the caller's to decide, from the values returned.

Inside NEO an address is (str host, int port); on the wire the host is bytes.
Source: behaviour 1.2 and 1.3, protocol 3.3 and 3.7.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import count
from typing import Any, NamedTuple

from .exception import ConfigurationError, ProtocolError
from .protocol import (
    NAMESPACES,
    CellState,
    NodeRow,
    NodeState,
    NodeType,
    Rows,
    WireAddress,
)
from .util import Address, format_address

# --- node ids -------------------------------------------------------------------

_TYPES = {namespace >> 4: kind for kind, namespace in NAMESPACES.items()}
_BY_LETTER = {kind.name[0]: kind for kind in NAMESPACES}
_NUMBER = 0xFFFFFF  # the part of a nid that its text shows


def nid_type(nid: int) -> NodeType | None:
    """Type that a nid belongs to; None if it is in no namespace."""
    return _TYPES.get(nid >> 28) if nid else None


def nid_str(nid: int | None) -> str:
    """Text of a nid: `S1`, `M1`, `C3`, `A1`; `None` if there is none."""
    if nid is None:
        return "None"
    kind = nid_type(nid)
    return f"{kind.name[0]}{nid & _NUMBER}" if kind else f"?{nid}"


def parse_nid(text: str) -> int:
    """Inverse of `nid_str`. Raises ConfigurationError, also for `None`."""
    kind = _BY_LETTER.get(text[:1])
    number = text[1:]
    if kind is None or not (number.isascii() and number.isdigit()):
        raise ConfigurationError(
            f"invalid node id {text!r}: expected a letter and a number, such as S1"
        )
    if not 0 < int(number) <= _NUMBER:
        raise ConfigurationError(f"invalid node id {text!r}: number out of range")
    return (NAMESPACES[kind] << 24) + int(number)


# --- addresses on the wire --------------------------------------------------------


def wire_address(address: Address | None) -> WireAddress | None:
    """(str, int) -> (bytes, int)."""
    return address and (address[0].encode(), address[1])


def address_from_wire(address: WireAddress | None) -> Address | None:
    """(bytes, int) -> (str, int). Raises ProtocolError if the host is no text."""
    if address is None:
        return None
    host, port = address
    try:
        return host.decode(), port
    except UnicodeDecodeError:
        raise ProtocolError(f"invalid host {host!r}") from None


# --- nodes ------------------------------------------------------------------------


class Node:
    """One node. `nid` and `address` change through the manager, which indexes them.

    `connection` is the connection of the peer once it is identified, else None;
    `id_timestamp` the time (seconds since the epoch, to be kept to the bit) at which
    the primary accepted its identity; `extra` what it said of itself then.
    """

    __slots__ = (
        "address",
        "connection",
        "extra",
        "id_timestamp",
        "nid",
        "state",
        "type",
    )

    def __init__(
        self,
        kind: NodeType,
        nid: int | None = None,
        address: Address | None = None,
        state: NodeState = NodeState.DOWN,
        id_timestamp: float | None = None,
    ) -> None:
        self.type = kind
        self.nid = nid
        self.address = address
        self.state = state
        self.id_timestamp = id_timestamp
        self.connection: Any = None
        self.extra: dict[str, Any] = {}

    @property
    def identified(self) -> bool:
        """Is the peer connected and identified?"""
        return self.connection is not None

    def __repr__(self) -> str:
        address = self.address and format_address(self.address)
        return f"<{nid_str(self.nid)} {self.type} {address} {self.state}>"


def as_row(node: Node) -> NodeRow:
    """Description of a node for a packet. Source: protocol 3.7."""
    address = wire_address(node.address)
    return node.type, address, node.nid, node.state, node.id_timestamp


class Change(NamedTuple):
    """What one row said."""

    node: Node
    before: NodeState | None  # None: the node was not known
    state: NodeState  # UNKNOWN: the node is forgotten now


class Update(NamedTuple):
    """What a notification did."""

    changes: list[Change]  # one per row, in order
    forgotten: list[Node]  # no longer in the table: to be closed if connected


class NodeManager:
    """The nodes that a node knows, itself included; in order of arrival.

    `on_master_change` is called with the addresses of the masters when they change.
    """

    def __init__(
        self, on_master_change: Callable[[list[Address]], object] | None = None
    ) -> None:
        self._nodes: dict[Node, None] = {}
        self._by_nid: dict[int, Node] = {}
        self._by_address: dict[Address, Node] = {}
        self._masters: list[Address] = []
        self.on_master_change = on_master_change
        # Of the last notification: an identification with a later id timestamp must
        # wait for the next one (behaviour 1.4).
        self.timestamp = 0.0

    def __iter__(self) -> Iterator[Node]:
        return iter(tuple(self._nodes))

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node: Node) -> bool:
        return node in self._nodes

    def by_nid(self, nid: int | None) -> Node | None:
        return None if nid is None else self._by_nid.get(nid)

    def by_address(self, address: Address | None) -> Node | None:
        return None if address is None else self._by_address.get(address)

    def of_type(self, *kinds: NodeType) -> list[Node]:
        """Nodes of these types, in order of arrival."""
        return [node for node in self._nodes if node.type in kinds]

    def identified(self, *kinds: NodeType) -> list[Node]:
        """Those of `of_type` (no argument: of all) that are identified."""
        return [
            node
            for node in self._nodes
            if node.connection is not None and (not kinds or node.type in kinds)
        ]

    def running(self) -> dict[int, Node]:
        """RUNNING storage nodes by nid."""
        return {
            nid: node
            for nid, node in self._by_nid.items()
            if node.type is NodeType.STORAGE and node.state is NodeState.RUNNING
        }

    def add(
        self,
        kind: NodeType,
        nid: int | None = None,
        address: Address | None = None,
        state: NodeState = NodeState.DOWN,
        id_timestamp: float | None = None,
    ) -> Node:
        """A new node, whose nid and address are nobody else's."""
        node = Node(kind, None, None, state, id_timestamp)
        self._nodes[node] = None
        self.set_nid(node, nid)
        self._set_address(node, address)
        self._tell_masters()
        return node

    def remove(self, node: Node) -> None:
        self._remove(node)
        self._tell_masters()

    def set_nid(self, node: Node, nid: int | None) -> None:
        if node.nid == nid:
            return
        assert nid is None or nid not in self._by_nid, (node, self._by_nid.get(nid))
        if node.nid is not None:
            del self._by_nid[node.nid]
        node.nid = nid
        if nid is not None:
            self._by_nid[nid] = node

    def set_address(self, node: Node, address: Address | None) -> None:
        self._set_address(node, address)
        self._tell_masters()

    def free_nid(
        self, kind: NodeType, address: Address | None = None, wanted: int | None = None
    ) -> int:
        """Nid for a node of this type that identifies at the primary.

        The wanted one if it is of the type and nobody else's (a node at the same
        address is the same); else that of the node of the type known at this address,
        else the smallest free one. Source: behaviour 1.2 (4), protocol 3.3.
        """
        known = self.by_address(address)
        if (
            wanted is not None
            and nid_type(wanted) is kind
            and self._by_nid.get(wanted, known) is known
        ):
            return wanted
        if known and known.nid is not None and nid_type(known.nid) is kind:
            return known.nid
        first = (NAMESPACES[kind] << 24) + 1
        return next(nid for nid in count(first) if nid not in self._by_nid)

    def update(
        self,
        timestamp: float,
        rows: Iterable[NodeRow],
        *,
        full: bool = False,
        keep: Container[int] = (),
    ) -> Update:
        """Apply a NotifyNodeInformation.

        `full`: the first one after an identification, which lists all; others are
        forgotten, except storages whose nid is in `keep` (those with cells), which are
        DOWN until the master says more. Raises ProtocolError if the timestamp does not
        increase (the first of a connection, `full`, has none to compare with) or a row
        tells neither nid nor address.
        """
        if not full and timestamp <= self.timestamp:
            raise ProtocolError(
                f"node timestamp {timestamp!r} not after {self.timestamp!r}"
            )
        self.timestamp = timestamp
        changes: list[Change] = []
        forgotten: dict[Node, None] = {}
        for row in rows:
            self._apply(row, changes, forgotten)
        if full:
            told = {id(change.node) for change in changes}
            for node in self:
                if id(node) in told:
                    continue
                if node.type is NodeType.STORAGE and node.nid in keep:
                    node.state = NodeState.DOWN
                else:
                    self._remove(node)
                    forgotten[node] = None
        self._tell_masters()
        return Update(changes, list(forgotten))

    def _apply(
        self, row: NodeRow, changes: list[Change], forgotten: dict[Node, None]
    ) -> None:
        kind, wire, nid, state, id_timestamp = row
        address = address_from_wire(wire)
        if nid is None and address is None:
            raise ProtocolError("node without id and address")
        by_nid = self.by_nid(nid)
        node = self.by_address(address) or by_nid
        if by_nid is not None and by_nid is not node:
            # Only after a reconnection, when the nid was given to another node.
            self.set_nid(by_nid, None)
            if by_nid.address is None:
                self._remove(by_nid)
                forgotten[by_nid] = None
        before = node.state if node else None
        if state is NodeState.UNKNOWN:
            if node is None:
                node = Node(kind, nid, address)
            else:
                self._remove(node)
                forgotten[node] = None
        elif node is None:
            node = Node(kind)
            self._nodes[node] = None
        if node in self._nodes:
            node.type = kind
            node.id_timestamp = id_timestamp
            self.set_nid(node, nid)
            self._set_address(node, address)
        node.state = state
        changes.append(Change(node, before, state))

    def _set_address(self, node: Node, address: Address | None) -> None:
        if node.address == address:
            return
        assert address is None or address not in self._by_address, (node, address)
        if node.address is not None:
            del self._by_address[node.address]
        node.address = address
        if address is not None:
            self._by_address[address] = node

    def _remove(self, node: Node) -> None:
        """Forget a node; it keeps its own nid and address, for logs."""
        del self._nodes[node]
        if node.nid is not None:
            del self._by_nid[node.nid]
        if node.address is not None:
            del self._by_address[node.address]

    def _tell_masters(self) -> None:
        if self.on_master_change is None:
            return
        masters = [n.address for n in self.of_type(NodeType.MASTER) if n.address]
        if masters != self._masters:
            self._masters = masters
            self.on_master_change(list(masters))

    def check(self) -> None:
        """Assert that the indexes tell the truth."""
        by_nid = {node.nid: node for node in self._nodes if node.nid is not None}
        assert by_nid == self._by_nid, (by_nid, self._by_nid)
        by_address = {node.address: node for node in self._nodes if node.address}
        assert by_address == self._by_address, (by_address, self._by_address)


# --- text ---------------------------------------------------------------------------


def format_date(timestamp: float | None) -> str:
    """UTC date of an id timestamp, as shown to people."""
    if timestamp is None:
        return "None"
    try:
        return str(datetime.fromtimestamp(timestamp, UTC).replace(tzinfo=None))
    except (ValueError, OverflowError, OSError):  # a peer may send any float
        return repr(timestamp)


def node_order(row: NodeRow) -> tuple[bool, int, bytes, int]:
    _, address, nid, _, _ = row
    return nid is None, nid or 0, *(address or (b"", 0))


def format_nodes(rows: Iterable[NodeRow]) -> str:
    """Table of `print node`: one line per node. Source: operations 4.5."""
    table = []
    for kind, wire, nid, state, timestamp in sorted(rows, key=node_order):
        address = ""
        if wire is not None:
            host, port = wire
            address = format_address((host.decode("ascii", "backslashreplace"), port))
        table.append(
            (nid_str(nid), kind.name, address, state.name, format_date(timestamp))
        )
    if not table:
        return "Empty list!"
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    widths[-1] = 0  # nothing to align with
    return "\n".join(
        " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        for line in table
    )


_CELL_LETTERS = {state: state.name[0] for state in CellState}
_RULER_STEP = 10


def format_rows(rows: Rows, states: Mapping[int, NodeState]) -> str:
    """Compact display of the cells: one line per storage, after a ruler.

    `states` of the storages by nid; those RUNNING are shown without cell too. This
    alone is the output of `tweak`. Source: operations 4.4.
    """
    cells_by_nid: dict[int, list[str]] = {
        nid: ["."] * len(rows)
        for nid, state in states.items()
        if state is NodeState.RUNNING
    }
    for partition, row in enumerate(rows):
        for nid, cell in row:
            line = cells_by_nid.setdefault(nid, ["."] * len(rows))
            line[partition] = _CELL_LETTERS[cell]
    width = max((len(nid_str(nid)) for nid in cells_by_nid), default=0)
    lines = []
    if len(rows) > _RULER_STEP:
        marks = range(_RULER_STEP, len(rows), _RULER_STEP)
        ruler = "".join(f"{mark}v".rjust(_RULER_STEP) for mark in marks)
        lines.append(" " * (width + 4) + ruler)
    for nid, letters in sorted(cells_by_nid.items()):
        state = states.get(nid, NodeState.UNKNOWN)
        lines.append(f"{nid_str(nid):{width}} {state.name[0]} {''.join(letters)}")
    return "\n".join(lines)


def format_partition_table(
    ptid: int | None,
    replicas: int,
    rows: Sequence[Sequence[tuple[int, CellState]]],
    states: Mapping[int, NodeState],
    first: int | None = None,
) -> str:
    """Output of `print pt`. Source: operations 4.4.

    `first` None: the compact display. Else one line per partition, `rows` being those
    from partition `first` on.
    """
    lines = [f"# ptid: {ptid}, replicas: {replicas}"]
    if first is None:
        text = format_rows(rows, states)
        lines += [text] if text else []
    else:
        for partition, row in enumerate(rows, first):
            cells = "".join(f" {nid_str(nid)} - {cell} |" for nid, cell in row)
            lines.append(f"{partition:03} |{cells}")
    return "\n".join(lines)
