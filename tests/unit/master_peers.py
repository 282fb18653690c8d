"""Scripted peers of a real master, in the simulator: a storage, a client, an admin.

They record what they receive, and answer as the real ones do where a test doesn't say
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from neo.lib.connection import Connection, Reply
from neo.lib.handler import Handler
from neo.lib.node import wire_address
from neo.lib.protocol import (
    BY_CODE,
    MAX_TID,
    ZERO_TID,
    AnswerFinalTID,
    AnswerInformationLocked,
    AnswerLastIDs,
    AnswerLockedTransactions,
    AnswerPackOrders,
    AnswerPartitionTable,
    AnswerRecovery,
    CellState,
    ClusterState,
    NodeState,
    NodeType,
    NotifyPackCompleted,
    NotifyReady,
    Packet,
    RequestIdentification,
)
from neo.lib.util import Address
from neo.master.app import Master, MasterOptions
from tests.simulation.runtime import SimRuntime, Simulation

U, OUT, F, X = (
    CellState.UP_TO_DATE,
    CellState.OUT_OF_DATE,
    CellState.FEEDING,
    CellState.DISCARDED,
)


class Peer(Handler):
    """Connects, identifies, records."""

    kind: NodeType

    def __init__(
        self,
        runtime: SimRuntime,
        master: Address,
        *,
        nid: int | None = None,
        address: Address | None = None,
        name: bytes = b"test",
        timestamp: float | None = None,
        extra: dict[bytes, Any] | None = None,
        kind: NodeType | None = None,
    ) -> None:
        super().__init__()
        self.runtime = runtime
        self.master = master
        self.nid = nid
        self.claim = (
            kind or self.kind,
            nid,
            wire_address(address),
            name,
            timestamp,
            extra or {},
        )
        self.received: list[tuple[str, tuple[Any, ...]]] = []
        self.errors: list[tuple[int, str]] = []
        self.conn: Connection | None = None
        self.lost = 0
        self.table = {
            code: (packet, partial(self._receive, packet))
            for code, packet in BY_CODE.items()
        }

    def start(self) -> None:
        self.runtime.connect(self.master, self)

    def connected(self, conn: Connection) -> None:
        self.conn = conn
        conn.trust()
        conn.ask(RequestIdentification, *self.claim)

    def closed(self, conn: Connection) -> None:
        self.conn = None
        self.lost += 1

    def error(
        self, conn: Connection, packet: Packet[...] | None, code: int, text: str
    ) -> None:
        self.errors.append((code, text))

    def _receive(self, packet: Packet[...], conn: Connection, *args: Any) -> None:
        self.received.append((packet.name, args))
        method = getattr(self, packet.handler, None)
        if method is not None:
            method(conn, *args)

    # --- for tests ---

    @property
    def accepted(self) -> bool:
        return bool(self.of("AcceptIdentification"))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.received]

    def of(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of the packets of that name."""
        return [args for n, args in self.received if n == name]

    def accept_identification(
        self, conn: Connection, kind: NodeType, nid: int, mine: int
    ) -> None:
        self.nid = mine


@dataclass
class Disk:
    """What a storage remembers."""

    nid: int | None = None
    ptid: int | None = None
    replicas: int = 0
    rows: list[dict[int, CellState]] = field(default_factory=list)
    truncate: bytes | None = None
    temporary: dict[bytes, bytes | None] = field(default_factory=dict)
    committed: dict[bytes, bytes] = field(default_factory=dict)  # tid by ttid
    last_oid: bytes | None = None


class FakeStorage(Peer):
    """A storage node without data."""

    kind = NodeType.STORAGE

    def __init__(
        self, runtime: SimRuntime, master: Address, disk: Disk, **claim: Any
    ) -> None:
        claim.setdefault("nid", disk.nid)
        hold = claim.pop("hold", ())
        super().__init__(runtime, master, **claim)
        self.disk = disk
        self.hold: set[str] = set(hold)  # packets that are not served
        self.held: dict[str, list[tuple[Reply, tuple[Any, ...]]]] = {}
        self.state: ClusterState | None = None

    def _receive(self, packet: Packet[...], conn: Connection, *args: Any) -> None:
        if packet.name in self.hold:
            self.received.append((packet.name, args))
            self.held.setdefault(packet.name, []).append((conn.defer(), args))
        else:
            super()._receive(packet, conn, *args)

    def closed(self, conn: Connection) -> None:
        super().closed(conn)
        self.runtime.call_later(0.1, self.start)

    def accept_identification(
        self, conn: Connection, kind: NodeType, nid: int, mine: int
    ) -> None:
        self.disk.nid = self.nid = mine
        self.claim = (self.claim[0], mine, *self.claim[2:])

    def notify_node_information(
        self, conn: Connection, timestamp: float, nodes: Iterable[Any]
    ) -> None:
        for kind, _, nid, state, _ in nodes:
            if kind is NodeType.STORAGE and nid == self.nid:
                if state is NodeState.UNKNOWN:
                    self.disk.__init__()  # type: ignore[misc]
                if state in (NodeState.DOWN, NodeState.UNKNOWN):
                    self.runtime.stop()

    def ask_recovery(self, conn: Connection) -> None:
        conn.answer(AnswerRecovery, self.disk.ptid, None, self.disk.truncate)

    def ask_partition_table(self, conn: Connection) -> None:
        disk = self.disk
        rows = [list(row.items()) for row in disk.rows]
        conn.answer(AnswerPartitionTable, disk.ptid, disk.replicas, rows)

    def send_partition_table(
        self, conn: Connection, ptid: int, replicas: int, rows: Iterable[Any]
    ) -> None:
        self.disk.ptid, self.disk.replicas = ptid, replicas
        self.disk.rows = [dict(row) for row in rows]

    def notify_partition_changes(
        self, conn: Connection, ptid: int, replicas: int, cells: Iterable[Any]
    ) -> None:
        disk = self.disk
        assert disk.ptid is not None
        assert ptid == disk.ptid + 1, (ptid, disk.ptid)
        disk.ptid, disk.replicas = ptid, replicas
        for partition, nid, state in cells:
            if state is X:
                del disk.rows[partition][nid]
            else:
                disk.rows[partition][nid] = state

    def truncate(self, conn: Connection, tid: bytes) -> None:
        self.disk.truncate = tid

    def ask_locked_transactions(self, conn: Connection) -> None:
        conn.answer(AnswerLockedTransactions, self.disk.temporary)

    def ask_final_tid(self, conn: Connection, ttid: bytes) -> None:
        conn.answer(AnswerFinalTID, self.disk.committed.get(ttid))

    def validate_transaction(self, conn: Connection, ttid: bytes, tid: bytes) -> None:
        del self.disk.temporary[ttid]
        self.disk.committed[ttid] = tid

    def ask_last_ids(self, conn: Connection) -> None:
        disk = self.disk
        if disk.truncate is not None:
            disk.committed = {
                ttid: tid
                for ttid, tid in disk.committed.items()
                if tid <= disk.truncate
            }
            disk.truncate = None
        tids = list(disk.committed.values())
        conn.notify(NotifyPackCompleted, ZERO_TID)
        conn.answer(
            AnswerLastIDs,
            max(tids, default=None),
            disk.last_oid,
            min(tids, default=MAX_TID),
        )

    def ask_pack_orders(self, conn: Connection, pack_id: bytes) -> None:
        conn.answer(AnswerPackOrders, [])

    def start_operation(self, conn: Connection, backup: bool) -> None:
        self.disk.temporary.clear()
        conn.notify(NotifyReady)

    def ask_lock_information(
        self, conn: Connection, ttid: bytes, tid: bytes, pack: bool
    ) -> None:
        self.disk.temporary[ttid] = tid
        conn.answer(AnswerInformationLocked, ttid)

    def notify_unlock_information(self, conn: Connection, ttid: bytes) -> None:
        tid = self.disk.temporary.pop(ttid)
        assert tid is not None
        self.disk.committed[ttid] = tid

    def release(self, name: str) -> None:
        """Serve what was held."""
        self.hold.discard(name)
        packet = next(p for p in BY_CODE.values() if p.name == name)
        for reply, args in self.held.pop(name, []):
            if not reply.closed:
                reply.conn.message_id = reply.msg_id
                getattr(self, packet.handler)(reply.conn, *args)


class FakeClient(Peer):
    """A client; `ask` from tests."""

    kind = NodeType.CLIENT


class FakeAdmin(Peer):
    """An admin."""

    kind = NodeType.ADMIN


class Outcome:
    """What became of a request."""

    def __init__(self) -> None:
        self.answer: tuple[Any, ...] | None = None
        self.error: tuple[int | None, str] | None = None

    @property
    def over(self) -> bool:
        return self.answer is not None or self.error is not None


class World:
    """A master, or several, and scripted peers."""

    def __init__(self, seed: int = 0, masters: int = 1, **options: Any) -> None:
        self.sim = Simulation(seed)
        self.addresses = [("127.0.0.1", 10000 + i) for i in range(masters)]
        self.disks: dict[str, Disk] = {}
        options.setdefault("partitions", 2)
        self.options = options
        for i in range(masters):
            self.start_master(i)

    def start_master(self, i: int) -> None:
        options = MasterOptions(
            "test",
            self.addresses[i],
            masters=[a for a in self.addresses if a != self.addresses[i]],
            **self.options,
        )
        self.sim.start(f"M{i}", lambda runtime: Master(runtime, options))

    @property
    def master(self) -> Master:
        """The first master."""
        app = self.sim.app("M0")
        assert isinstance(app, Master)
        return app

    @property
    def state(self) -> ClusterState | None:
        return self.master.phase.state

    def start_storage(self, name: str, disk: Disk | None = None, **claim: Any) -> None:
        """Not connected yet; `storage(name)` is the node."""
        if disk is not None:
            self.disks[name] = disk
        mine = self.disks.setdefault(name, Disk())
        claim.setdefault("address", ("127.0.0.1", 20000 + int(name[1:])))
        to = claim.pop("to", self.addresses[0])
        self.sim.start(name, lambda runtime: FakeStorage(runtime, to, mine, **claim))

    def storage(self, name: str) -> FakeStorage:
        app = self.sim.app(name)
        assert isinstance(app, FakeStorage)
        return app

    def storages(self, *names: str, **claim: Any) -> None:
        """Start these, one after the other, and wait until they are connected."""
        for name in names:
            self.start_storage(name, **claim)
            self.until(lambda name=name: self.storage(name).accepted)

    def peer(self, name: str, cls: type[Peer], **claim: Any) -> Any:
        """Start a peer, and wait until it is accepted."""
        to = claim.pop("to", self.addresses[0])
        self.sim.start(name, lambda runtime: cls(runtime, to, **claim))
        self.until(lambda: self.sim.app(name).accepted)
        return self.sim.app(name)

    def client(self, name: str, **claim: Any) -> FakeClient:
        peer = self.peer(name, FakeClient, **claim)
        assert isinstance(peer, FakeClient)
        return peer

    def admin(self, **claim: Any) -> FakeAdmin:
        peer = self.peer("A", FakeAdmin, address=("127.0.0.1", 9999), **claim)
        assert isinstance(peer, FakeAdmin)
        return peer

    def until(self, condition: Callable[[], object], within: float = 30) -> None:
        self.sim.run_until(condition, within)

    def settle(self, seconds: float = 0.5) -> None:
        """Let everything arrive."""
        self.sim.run(seconds)

    def running(self) -> None:
        """Wait for an operation with all storages ready."""
        self.until(
            lambda: (
                self.state is ClusterState.RUNNING
                and not self.master.transactions.starting
            )
        )

    def ask(self, peer: Peer, packet: Packet[...], *args: Any) -> Outcome:
        """Send a request."""
        outcome = Outcome()
        assert peer.conn is not None

        def done(*answer: Any) -> None:
            outcome.answer = answer

        def failed(code: int | None, text: str) -> None:
            outcome.error = code, text

        peer.conn.ask(packet, *args).then(done, failed)
        peer.conn.transport.flush()  # type: ignore[attr-defined]
        return outcome

    def call(self, peer: Peer, packet: Packet[...], *args: Any) -> tuple[Any, ...]:
        """Send a request, return the answer."""
        outcome = self.ask(peer, packet, *args)
        self.until(lambda: outcome.over)
        assert outcome.answer is not None, outcome.error
        return outcome.answer

    def refused(self, peer: Peer, packet: Packet[...], *args: Any) -> tuple[int, str]:
        """Send a request, return the error."""
        outcome = self.ask(peer, packet, *args)
        self.until(lambda: outcome.over)
        assert outcome.error is not None, outcome.answer
        code, text = outcome.error
        assert code is not None, "connection lost"
        return code, text

    def tell(self, peer: Peer, packet: Packet[...], *args: Any) -> None:
        """Send a notification, and let its effects come."""
        assert peer.conn is not None
        peer.conn.notify(packet, *args)
        peer.conn.transport.flush()  # type: ignore[attr-defined]
        self.settle()

    @property
    def table(self) -> str:
        """Cells in order of nids: one string per partition."""
        pt = self.master.pt
        letters = {U: "U", OUT: "O", F: "F", None: "."}
        nids = pt.nids()
        return " ".join(
            "".join(letters[row.get(nid)] for nid in nids) for row in pt.rows
        )
