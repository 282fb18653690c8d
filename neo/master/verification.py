"""VERIFYING: finish the transactions that were being committed, learn the last ids.

A transaction that one readable node has locked was promised to be committed, or may
have been; one that a readable node has committed already is so. The others are dropped
by the storages when they start operation. Nodes without readable cell are not asked:
they may have locked what the others dropped. Source: behaviour 2.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.node import Node, nid_str
from neo.lib.protocol import (
    FEATURE_CHECK,
    MAX_TID,
    READABLE,
    ZERO_OID,
    ZERO_TID,
    AskFinalTID,
    AskLastIDs,
    AskLastTids,
    AskLockedTransactions,
    AskPackOrders,
    CellState,
    ClusterState,
    NodeType,
    Oid,
    Packet,
    PackOrder,
    SendPartitionTable,
    Tid,
    ValidateTransaction,
)
from neo.lib.util import add64

from . import policy
from .phase import Claim, PrimaryPhase, Storage
from .running import Running

if TYPE_CHECKING:
    from .app import Master


class Verifying(PrimaryPhase):
    """Ask the storages one thing after the other."""

    state = ClusterState.VERIFYING
    successors = frozenset(
        {ClusterState.RECOVERING, ClusterState.RUNNING, ClusterState.STOPPING}
    )

    def __init__(self, master: Master) -> None:
        super().__init__(master)
        self.storage = VerifyingStorage(self)
        self.asked: dict[Node, int] = {}  # answers that they owe
        # By ttid: who is asked for its final tid, and who can be asked next.
        self.searching: dict[bytes, list[Node]] = {}
        self.asking = "nothing"
        self._next: Callable[[], object] = self._find_final_tids
        self.tids: dict[bytes, bytes | None] = {}  # by ttid
        self.reported: dict[bytes, dict[Node, None]] = {}  # who has the ttid
        self.last_tid = ZERO_TID
        self.last_oid = ZERO_OID
        self.first_tid = MAX_TID
        # [partition][nid]: last tids of (transactions, records) of readable cells
        self.last_tids: dict[int, dict[int, tuple[bytes, bytes]]] = {}

    def enter(self) -> None:
        master = self.master
        master.forget_operation()
        self.take_storages()
        master.tell_state()
        master.send_table(NodeType.STORAGE)
        for node in master.nodes.identified(NodeType.STORAGE):
            node.extra.pop("new", None)
        self._ask_all(self._readable(), self._find_final_tids, AskLockedTransactions)

    def _readable(self) -> list[Node]:
        master = self.master
        running = master.nodes.running()
        nids = master.pt.readable_nids()
        return [running[nid] for nid in nids if nid in running]

    def _ask_all(
        self,
        nodes: Iterable[Node],
        then: Callable[[], object],
        packet: Packet[...],
        *args: Any,
    ) -> None:
        """Ask all the same, and go on with `then` after the last answer."""
        self.asking = packet.name
        self._next = then
        for node in nodes:
            self._ask(node, packet, *args)
        self._advance()

    def _ask(self, node: Node, packet: Packet[...], *args: Any) -> None:
        self.asked[node] = self.asked.get(node, 0) + 1
        node.connection.ask(packet, *args)

    def answered(self, node: Node) -> None:
        """One answer less to wait for."""
        self.asked[node] -= 1
        if not self.asked[node]:
            del self.asked[node]
        self._advance()

    def _advance(self) -> None:
        if not (self.asked or self.searching) and self.master.phase is self:
            self._next()

    # --- steps ------------------------------------------------------------------------

    def locked(self, node: Node, transactions: Mapping[bytes, bytes | None]) -> None:
        """What a storage has in its temporary tables."""
        for ttid, tid in transactions.items():
            self.reported.setdefault(ttid, {})[node] = None
            known = self.tids.get(ttid)
            if known is not None and tid not in (None, known):
                raise ProtocolError(
                    f"{ttid.hex()} is locked as {known.hex()} and {(tid or b'').hex()}"
                )
            self.tids[ttid] = known or tid

    def _find_final_tids(self) -> None:
        """Those that nobody has locked may be committed already where it is gone.

        Also on a cell that is late: it may have had the lock, and then a verification
        like this one that was interrupted.
        """
        self.asking = AskFinalTID.name
        self._next = self._validate
        pt, running = self.master.pt, self.master.nodes.running()
        for ttid in sorted(ttid for ttid, tid in self.tids.items() if tid is None):
            partition = pt.partition_of(ttid)
            nids = dict.fromkeys([*pt.readable[partition], *pt.rows[partition]])
            nodes = [running[nid] for nid in nids if nid in running]
            self.searching[ttid] = [n for n in nodes if n not in self.reported[ttid]]
        for ttid in tuple(self.searching):
            self._search(ttid)
        self._advance()

    def _search(self, ttid: bytes) -> None:
        """Ask the next node, one at a time."""
        nodes = self.searching[ttid]
        while nodes and nodes[0].connection is None:
            del nodes[0]
        if not nodes:
            del self.searching[ttid]
            return
        node = nodes[0]

        def found(tid: bytes | None) -> None:
            # It may have been lost or dismissed meanwhile.
            asked = self.searching.get(ttid)
            if self.master.phase is not self or not asked or asked[0] is not node:
                return
            if tid is None:
                del nodes[0]
                self._search(ttid)
            else:
                self.tids[ttid] = tid
                del self.searching[ttid]
            self._advance()

        def failed(code: int | None, text: str) -> None:
            if code is not None:
                found(None)

        node.connection.ask(AskFinalTID, ttid).then(found, failed)

    def _validate(self) -> None:
        """Commit; those without tid are dropped when the operation starts."""
        log = self.master.log
        for ttid, tid in sorted(self.tids.items()):
            if tid is None:
                log.info("transaction %s was not finished: dropped", ttid.hex())
                continue
            log.info("transaction %s is committed as %s", ttid.hex(), tid.hex())
            for node in self.reported[ttid]:
                if node.connection is not None:
                    node.connection.notify(ValidateTransaction, ttid, tid)
        # Answered after the validation; pending truncations are done before.
        self._ask_all(
            self.master.nodes.identified(NodeType.STORAGE), self._ids_known, AskLastIDs
        )

    def last_ids(
        self, last_tid: bytes | None, last_oid: bytes | None, first_tid: bytes
    ) -> None:
        """The ids of a storage."""
        if max(last_tid or ZERO_TID, last_oid or ZERO_OID) > MAX_TID:
            raise ProtocolError("ids out of range")
        self.last_tid = max(self.last_tid, last_tid or ZERO_TID)
        self.last_oid = max(self.last_oid, last_oid or ZERO_OID)
        self.first_tid = min(self.first_tid, first_tid)

    def _ids_known(self) -> None:
        master = self.master
        master.transactions.set_last_ids(
            self.last_tid,
            self.last_oid,
            self.first_tid,
            max(self.tids, default=ZERO_TID),
        )
        if master.truncate_tid is not None:
            master.log.warning("truncated to %s", master.truncate_tid.hex())
            master.truncate_tid = None
        master.packs.update()
        completed = master.packs.completed_by_nid
        first = add64(min(completed.values()), 1) if completed else ZERO_TID
        self._ask_all(self._readable(), self._ask_ages, AskPackOrders, first)

    def _ask_ages(self) -> None:
        """Is the data of all readable cells as recent? A disk may be an old copy."""
        self.asking = AskLastTids.name
        self._next = self._compare_ages
        pt = self.master.pt
        for node in self._readable():
            if FEATURE_CHECK in node.extra.get("features", ()):
                cells = pt.assigned(node.nid or 0).items()
                partitions = [p for p, state in cells if state in READABLE]
                self._ask(node, AskLastTids, partitions)
        self._advance()

    def _compare_ages(self) -> None:
        master = self.master
        behind, strange = policy.behind(master.pt.rows, self.last_tids)
        for partition, nid in (*behind, *strange):
            master.log.error(
                "partition %d: the data of %s is %s",
                partition,
                nid_str(nid),
                "old: it is replicated again"
                if (partition, nid) in behind
                else "not the same as that of others: run neoctl check",
            )
        # Nothing that such a cell says of its progress can be believed: CORRUPTED makes
        # the replication start at 0, without deleting what is there.
        for state in (CellState.CORRUPTED, CellState.OUT_OF_DATE):
            master.change_table([(partition, nid, state) for partition, nid in behind])
        self._done()

    def _done(self) -> None:
        self.master.become(Running(self.master))

    # --- who comes and goes -----------------------------------------------------------

    def soon_better(self, claim: Claim) -> bool:
        return claim.kind is NodeType.CLIENT

    def may_clone(self) -> bool:
        return True

    def joined(self, node: Node, conn: Connection) -> None:
        master = self.master
        if node.type is not NodeType.MASTER:
            pt = master.pt
            conn.notify(SendPartitionTable, pt.ptid, pt.replicas, pt.as_rows())
        if node.type is NodeType.STORAGE:
            master.watch(conn)

    def storage_lost(self, node: Node) -> None:
        master = self.master
        master.storage_down(node)
        self.asked.pop(node, None)
        if master.truncate_tid is not None or node.nid in master.pt.readable_nids():
            # Its cells are not to be outdated: it must truncate too, or it may alone
            # know the tid of a transaction that its client was told is committed.
            master.leave_operation()
            return
        master.packs.storage_lost(node)
        for ttid, nodes in tuple(self.searching.items()):
            if nodes[0] is node:
                del nodes[0]
                self._search(ttid)
        self._advance()

    def describe(self) -> list[str]:
        asked = [*self.asked, *(nodes[0] for nodes in self.searching.values())]
        names = ", ".join(nid_str(node.nid) for node in dict.fromkeys(asked))
        return [f"verification waits for answers to {self.asking} from {names}"]

    def check(self) -> None:
        for node, count in self.asked.items():
            assert node.connection is not None, node
            assert count > 0, node
        for nodes in self.searching.values():
            assert nodes[0].connection is not None, nodes
        assert self.master.operational()


class VerifyingStorage(Storage):
    """A storage in VERIFYING."""

    def __init__(self, phase: Verifying) -> None:
        super().__init__(phase.master)
        self.phase = phase

    def answer_locked_transactions(
        self, conn: Connection, transactions: Mapping[Tid, Tid | None]
    ) -> None:
        assert conn.node is not None
        self.phase.locked(conn.node, transactions)
        self.phase.answered(conn.node)

    def notify_pack_completed(self, conn: Connection, pack_id: Tid) -> None:
        assert conn.node is not None
        if conn.node.nid is not None:
            self.master.packs.completed_by_nid[conn.node.nid] = pack_id

    def answer_last_ids(
        self,
        conn: Connection,
        last_tid: Tid | None,
        last_oid: Oid | None,
        first_tid: Tid,
    ) -> None:
        assert conn.node is not None
        self.phase.last_ids(last_tid, last_oid, first_tid)
        self.phase.answered(conn.node)

    def answer_last_tids(
        self, conn: Connection, tids: Sequence[tuple[int, Tid, Tid]]
    ) -> None:
        assert conn.node is not None
        for partition, *pair in tids:
            cells = self.phase.last_tids.setdefault(partition, {})
            cells[conn.node.nid or 0] = pair[0], pair[1]
        self.phase.answered(conn.node)

    def answer_pack_orders(self, conn: Connection, orders: Sequence[PackOrder]) -> None:
        assert conn.node is not None
        self.master.packs.add(orders)
        self.phase.answered(conn.node)
