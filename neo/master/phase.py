"""What a master does at a time: one object, with its handlers and its data (D4).

          +--> Recovering --> Verifying --> Running --> Stopping --> end of the process
          |     ^  |    ^_________|___________|            ^
    Secondary   |  +---------------------------------------+ (from each of them)
          ^_____|  (election lost)

`advance()` decides whether it is time to leave; `Master.become()` checks the arrows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.handler import Handler, denied, not_ready
from neo.lib.node import Node
from neo.lib.protocol import (
    AnswerClusterState,
    AnswerLastIDs,
    AnswerLastTransaction,
    AnswerRecovery,
    ClusterState,
    NodeState,
    NodeType,
    Packet,
    Tid,
)
from neo.lib.util import Address

if TYPE_CHECKING:
    from .app import Master


NOT_RESILIENT = "too few hosts or disks, or too uneven: replicas may share one"


class Claim(NamedTuple):
    """What RequestIdentification says, of the right cluster."""

    kind: NodeType
    nid: int | None  # wanted
    address: Address | None
    id_timestamp: float | None
    extra: Mapping[bytes, Any]


class Identified(Handler):
    """What any identified node may ask the primary master."""

    def __init__(self, master: Master) -> None:
        super().__init__()
        self.master = master

    def ask_cluster_state(self, conn: Connection) -> None:
        conn.answer(AnswerClusterState, self.master.phase.state)

    def ask_recovery(self, conn: Connection) -> None:
        master = self.master
        conn.answer(AnswerRecovery, master.pt.ptid, None, master.truncate_tid)

    def ask_last_ids(self, conn: Connection) -> None:
        ids = self.master.transactions
        conn.answer(AnswerLastIDs, ids.last_tid, ids.last_oid, ids.first_tid)

    def ask_last_transaction(self, conn: Connection) -> None:
        conn.answer(AnswerLastTransaction, self.master.transactions.last_tid)

    def closed(self, conn: Connection) -> None:
        node = conn.node
        if node is not None and node.connection is conn:
            node.connection = None
            self.master.lost(node)


class Storage(Identified):
    """A storage in no particular phase.

    What it sent before it knew of the present phase is let pass: requests of a former
    phase are forgotten on both sides.
    """

    def notify_ready(self, conn: Connection) -> None:
        """Too late."""

    def ask_unfinished_transactions(
        self, conn: Connection, partitions: Sequence[int]
    ) -> None:
        """Too late."""

    def notify_replication_done(
        self, conn: Connection, partition: int, tid: Tid
    ) -> None:
        """Too late."""

    def notify_partition_corrupted(
        self, conn: Connection, partition: int, nids: Sequence[int]
    ) -> None:
        """Too late."""

    def notify_pack_completed(self, conn: Connection, pack_id: Tid) -> None:
        """Too late."""

    def ask_pack_orders(self, conn: Connection, pack_id: Tid) -> None:
        """Too late."""

    def error(
        self, conn: Connection, packet: Packet[...] | None, code: int, text: str
    ) -> None:
        """A storage that can't do its part is of no use: it must come back."""
        super().error(conn, packet, code, text)
        if packet is not None:
            raise ProtocolError(f"{packet.name} failed: {text}")


class Phase:
    """Base of all. `state` is None for a secondary."""

    state: ClusterState | None = None
    successors: frozenset[ClusterState | None] = frozenset()

    def __init__(self, master: Master) -> None:
        self.master = master

    def enter(self) -> None:
        """Start; `advance()` at the latest now may leave again."""

    def leave(self) -> None:
        """End."""

    def soon_better(self, claim: Claim) -> bool:
        """Is this peer served better by what follows this phase, if that is soon?"""
        return False

    def identify(self, conn: Connection, claim: Claim) -> None:
        """Somebody says who it is; raises Refused or ProtocolError."""
        raise not_ready("not ready")

    def accepted(self, conn: Connection, nid: int, your_nid: int) -> None:
        """Another master identified us, on a connection that we opened."""
        conn.close("no longer wanted")

    def describe(self) -> list[str]:
        """Lines for the log, for who wonders what the master is waiting for."""
        return []

    def check(self) -> None:
        """Assert what must hold in this phase."""


class PrimaryPhase(Phase):
    """A phase of the primary. `storage` handles all storages."""

    state: ClusterState
    storage: Handler
    keeps_lost = False  # are storages that leave expected back, whoever they are?

    def __init__(self, master: Master) -> None:
        super().__init__(master)
        self.empty_storages = {}

    def identify(self, conn: Connection, claim: Claim) -> None:
        self.master.identification.identify(conn, claim)

    def take_storages(self) -> None:
        """From now on the handler of this phase serves the storages.

        What they still owe to another one is dropped when it comes.
        """
        for node in self.master.nodes.identified(NodeType.STORAGE):
            node.connection.handler = self.storage

    # --- identification ---

    # Addresses of storages that are known to have an empty database.
    empty_storages: dict[Address | None, None]

    def client_handler(self, read_only: bool) -> Handler:
        """Handler of a new client. Raises Refused."""
        raise not_ready(f"the cluster is {self.state}")

    def storage_state(self, node: Node | None) -> NodeState:
        """State of a storage that identifies (None: unknown until now)."""
        if node is not None and self.master.is_member(node.nid):
            return NodeState.RUNNING
        return NodeState.PENDING

    def put_aside(self, node: Node | None) -> float:
        """Seconds for which a storage that identifies must stay away."""
        return 0.0

    def may_clone(self) -> bool:
        """Can a copied database get its node id now?"""
        return False

    def master_claims(self, conn: Connection, claim: Claim) -> bool:
        """Another master wants to be accepted; false if it won the election."""
        return True

    def joined(self, node: Node, conn: Connection) -> None:
        """A node is identified and knows the others."""

    # --- losses; `node.connection` is None already ---

    def storage_lost(self, node: Node) -> None:
        """It is down."""
        self.master.storage_down(node)

    def client_lost(self, node: Node) -> None:
        """Its transactions are gone with the operation."""

    def master_lost(self, node: Node) -> None:
        """A secondary left."""

    def dismissed_left(self) -> None:
        """The last of the nodes that were told to exit has done so."""

    # --- the partition table ---

    def table_changed(self) -> None:
        """Cells were assigned, or are less readable than before; storages are told."""

    # --- transactions ---

    def lock_awaited(self) -> None:
        """The finish queue was empty, and is no longer."""

    def transactions_ended(self) -> None:
        """One or more are over."""

    def advance(self) -> None:
        """Leave, if it is time."""

    def start(self) -> None:
        """`neoctl start`. Raises Refused."""
        raise denied("Can not switch to this state")

    @property
    def operational(self) -> bool:
        """Do storages serve?"""
        return False
