"""Election: which of several masters is the primary (behaviour 2.2, protocol 5.4).

There is no phase for it. Each master begins by playing primary, and as long as it is
in RECOVERING it looks for the others: the one with the smallest key (time at which it
took the role, address) wins. Who is accepted by another one, or receives a smaller key,
has lost and becomes its secondary. A primary that has left RECOVERING accepts all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.handler import Handler
from neo.lib.node import Node, address_from_wire, wire_address
from neo.lib.protocol import (
    ClusterState,
    NodeRow,
    NodeState,
    NodeType,
    NotPrimaryMaster,
    RequestIdentification,
    WireAddress,
)
from neo.lib.runtime import RECONNECTION_DELAY
from neo.lib.util import Address, format_address

from .phase import Claim, Phase

if TYPE_CHECKING:
    from .app import Master

Key = tuple[float, tuple[bytes, int]]


def election_key(time: float, address: Address) -> Key:
    """What is compared: the smallest wins."""
    host, port = address
    return time, (host.encode(), port)


class MasterLink(Handler):
    """A connection that we opened to another master, not identified yet.

    The time of our election key goes with the identification if we play primary.
    """

    def __init__(self, master: Master, time: float | None) -> None:
        super().__init__()
        self.master = master
        self.time = time

    def connect(self, address: Address) -> Connection:
        """Open such a connection; given up if the other machine is silent."""
        runtime = self.master.runtime
        conn = runtime.connect(address, self)

        def tick() -> None:
            if not (conn.is_established or conn.closed):
                conn.close("no connection in time")

        # The throttle may defer the attempt.
        limit = RECONNECTION_DELAY + self.master.limits.master_timeout
        runtime.call_later(limit, tick)
        return conn

    def connected(self, conn: Connection) -> None:
        master = self.master
        conn.trust()
        conn.ask(
            RequestIdentification,
            NodeType.MASTER,
            master.node.nid,
            wire_address(master.address),
            master.cluster_name,
            self.time,
            {},
        ).then(
            lambda *answer: self._answered(conn, *answer),
            lambda code, text: self._refused(conn, code, text),
        )
        master.runtime.call_later(
            master.limits.master_timeout, lambda: self._timeout(conn)
        )

    def _timeout(self, conn: Connection) -> None:
        if conn.node is None:
            conn.close("no answer to the identification")

    def _answered(
        self, conn: Connection, kind: NodeType, nid: int | None, your_nid: int | None
    ) -> None:
        if kind is not NodeType.MASTER or nid is None or your_nid is None:
            raise ProtocolError("a master was expected")
        self.master.runtime.connection_succeeded(conn.address)
        self.master.phase.accepted(conn, nid, your_nid)

    def _refused(self, conn: Connection, code: int | None, text: str) -> None:
        if code is not None:
            self.master.log.throttled(
                ("master", conn.address, code),
                30,
                "master %s refuses us: %s",
                format_address(conn.address),
                text,
            )
            conn.close(text)


class Candidate(MasterLink):
    """A master that we try while we play primary."""

    def __init__(self, election: Election) -> None:
        super().__init__(election.master, election.master.election_time)
        self.election = election

    def not_primary_master(
        self, conn: Connection, primary: int | None, masters: Sequence[WireAddress]
    ) -> None:
        named = _learn(self.master, primary, masters)
        self.election.learnt()
        # If it is connected here already, what the peer says is old.
        if named is not None and named.connection is None:
            self.election.lose(named)
        else:
            conn.close("it is not primary")

    def closed(self, conn: Connection) -> None:
        self.election.link_lost(conn)


def _learn(
    master: Master, primary: int | None, masters: Sequence[WireAddress]
) -> Node | None:
    """Remember the masters of a NotPrimaryMaster; node of the primary, if another."""
    addresses = [address_from_wire(address) for address in masters]
    nodes = [a and master.know_master(a) for a in addresses]
    if primary is None:
        return None
    if primary >= len(nodes):
        raise ProtocolError(f"no master number {primary}")
    return nodes[primary]


class Election:
    """The search of other masters, by a primary in RECOVERING."""

    def __init__(self, master: Master, found_dead: Callable[[], object]) -> None:
        self.master = master
        self._found_dead = found_dead
        self.links: dict[Node, Connection] = {}
        # Masters at whose address nobody listens: they don't run.
        self.dead: dict[Node, None] = {}
        self.active = False
        self.candidate = Candidate(self)

    def start(self) -> None:
        """Connect to all known masters, again and again."""
        self.active = True
        self.learnt()

    def stop(self) -> None:
        """The others may only be secondaries now."""
        self.active = False
        for conn in list(self.links.values()):
            conn.close("election over")
        self.links.clear()

    def learnt(self) -> None:
        """Connect to masters that we are not connected to."""
        for node in self.master.nodes.of_type(NodeType.MASTER):
            if not self.active:
                return
            self._try(node)

    def _try(self, node: Node) -> None:
        if (
            node is not self.master.node
            and node.connection is None
            and node.address is not None
            and node not in self.links
        ):
            self.links[node] = self.candidate.connect(node.address)

    def link_lost(self, conn: Connection) -> None:
        """A connection that we opened is no more."""
        for node, link in list(self.links.items()):
            if link is conn:
                del self.links[node]
                if conn.is_established or "refused" not in conn.reason:
                    self.dead.pop(node, None)
                elif node not in self.dead:
                    self.dead[node] = None
                    self._found_dead()
                if self.active:
                    self._try(node)

    def accepts(self, claim: Claim) -> bool:
        """Does a master that connects accept that we are primary? Else we aren't."""
        assert claim.address is not None
        if claim.id_timestamp is None:
            return True
        ours = election_key(self.master.election_time, self.master.address)
        return ours <= election_key(claim.id_timestamp, claim.address)

    def joined(self, node: Node) -> None:
        """A secondary is connected: no need for our own attempt."""
        conn = self.links.pop(node, None)
        if conn is not None:
            conn.close("connected in the other direction")

    def lose(self, winner: Node) -> None:
        """Another master is primary."""
        self.active = False
        conn = self.links.pop(winner, None)
        self.master.become(Secondary(self.master, winner, conn))


class Secondary(Phase):
    """Wait for the primary to fail, and redirect all to it meanwhile.

    `primary` is the master that we believe to be primary; we are its secondary once it
    has accepted us (`identified`).
    """

    state = None
    successors = frozenset({ClusterState.RECOVERING})

    def __init__(
        self, master: Master, primary: Node, conn: Connection | None = None
    ) -> None:
        super().__init__(master)
        self.primary = primary
        self.conn = conn
        self.identified = False
        self.failed: dict[Address | None, None] = {}
        self.searching = _Searching(self)
        self.following = _Following(self)

    def enter(self) -> None:
        master = self.master
        for node in master.nodes.identified():
            master.disconnect(node, "this master is secondary")
        for node in master.nodes:
            if node.type is not NodeType.MASTER:
                master.nodes.remove(node)
            elif node is not master.node:
                node.state = NodeState.DOWN
        master.clear_table()
        master.forget_operation()
        if self.conn is None or self.conn.closed:
            self._connect()
        else:  # it will be accepted, or was
            self.conn.handler = self.searching

    def _connect(self) -> None:
        assert self.primary.address is not None
        self.master.log.info(
            "trying master %s as primary", format_address(self.primary.address)
        )
        self.conn = self.searching.connect(self.primary.address)

    def switch(self, primary: Node) -> None:
        """Try another master as primary."""
        conn, self.conn = self.conn, None
        if conn is not None:
            conn.close("another master may be primary")
        self.primary = primary
        self._connect()

    def accepted(self, conn: Connection, nid: int, your_nid: int) -> None:
        """We are the secondary of a primary."""
        if conn is not self.conn:
            conn.close("another master is the primary")
            return
        master, nodes = self.master, self.master.nodes
        for node, new in (self.primary, nid), (master.node, your_nid):
            other = nodes.by_nid(new)
            if other is not None and other is not node:
                nodes.set_nid(other, None)
            nodes.set_nid(node, new)
        self.identified = True
        self.following.first = True
        self.failed.clear()
        master.was_running = False  # until it says so
        conn.set_node(self.primary)
        conn.handler = self.following
        conn.watch_silence(master.limits.ping_after, master.limits.silence_limit)
        master.log.set_node(master.options.cluster, your_nid)
        master.log.info("secondary of %s", self.primary)
        master.identification.look_again()

    def lost(self, conn: Connection) -> None:
        """Try the same master again if it was primary, then the others, once each."""
        if conn is not self.conn or self.master.stopped:
            return
        self.conn = None
        if self.identified:
            self.identified = False
            self.failed.clear()
            self._connect()
            return
        self.failed[self.primary.address] = None
        for node in self.master.nodes.of_type(NodeType.MASTER):
            if node is not self.master.node and node.address not in self.failed:
                self.switch(node)
                return
        self.master.log.info("no other master is primary: elections")
        for node in self.master.nodes:
            node.state = NodeState.DOWN
        self.master.node.state = NodeState.RUNNING
        self.master.node.id_timestamp = None
        self.master.play_primary()

    def soon_better(self, claim: Claim) -> bool:
        return not self.identified and claim.kind is not NodeType.MASTER

    def identify(self, conn: Connection, claim: Claim) -> None:
        """Whoever comes is sent to the primary."""
        nodes = self.master.nodes
        node = nodes.by_address(claim.address) if claim.address else None
        is_master = claim.kind is NodeType.MASTER and claim.address is not None
        electing = is_master and claim.id_timestamp is not None
        if electing and not self.identified and node is not self.primary:
            assert claim.address is not None
            candidate = self.master.know_master(claim.address)
            conn.close("it may be the primary")
            if candidate is not None:
                self.switch(candidate)
            return
        addresses = [
            n.address for n in nodes.of_type(NodeType.MASTER) if n.address is not None
        ]
        index = None
        if self.identified and node is not self.primary and self.primary.address:
            index = addresses.index(self.primary.address)
        masters = [a for address in addresses if (a := wire_address(address))]
        conn.notify(NotPrimaryMaster, index, masters)
        conn.abort("this master is secondary")

    def describe(self) -> list[str]:
        state = "secondary of" if self.identified else "trying as primary:"
        return [f"{state} {self.primary}"]


class _Searching(MasterLink):
    """The master that may be primary."""

    def __init__(self, phase: Secondary) -> None:
        super().__init__(phase.master, None)
        self.phase = phase

    def not_primary_master(
        self, conn: Connection, primary: int | None, masters: Sequence[WireAddress]
    ) -> None:
        named = _learn(self.master, primary, masters)
        phase = self.phase
        if (
            conn is phase.conn
            and named is not None
            and named.address not in phase.failed
        ):
            phase.failed[phase.primary.address] = None
            phase.switch(named)
        else:
            conn.close("it is not primary")

    def flush_log(self, conn: Connection) -> None:
        self.master.log.flush()

    def closed(self, conn: Connection) -> None:
        self.phase.lost(conn)


class _Following(Handler):
    """The primary that accepted us."""

    def __init__(self, phase: Secondary) -> None:
        super().__init__()
        self.phase = phase
        self.master = phase.master
        self.first = True

    def notify_node_information(
        self, conn: Connection, timestamp: float, nodes: Sequence[NodeRow]
    ) -> None:
        master = self.master
        known = [n.address for n in master.nodes if n.address is not None]
        update = master.nodes.update(timestamp, nodes, full=self.first)
        if self.first:
            # The primary may not know all masters that we were configured with.
            for address in known:
                if master.nodes.by_address(address) is None:
                    master.know_master(address)
            self.first = False
        for change in update.changes:
            if change.node is master.node and change.state is not NodeState.RUNNING:
                master.end("stopped by an administrator")
                return
        if master.node not in master.nodes or self.phase.primary not in master.nodes:
            raise ProtocolError("the list of masters lacks the primary or me")

    def flush_log(self, conn: Connection) -> None:
        self.master.log.flush()

    def notify_cluster_information(self, conn: Connection, state: ClusterState) -> None:
        self.master.log.info("the cluster is %s", state)
        if state is ClusterState.RUNNING:
            self.master.was_running = self.master.has_database = True
        if state is ClusterState.STOPPING:
            self.master.end("the cluster stops")

    def closed(self, conn: Connection) -> None:
        self.phase.lost(conn)
