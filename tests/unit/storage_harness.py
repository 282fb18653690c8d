"""A storage node between scripted peers, in one process: no socket, no thread.

`Harness` is a Runtime: time stands still but for `advance()`, jobs of `submit()` are
executed by `turn()` or held (`hold_jobs`; `hold_writer`: those of the writer). A `Peer`
speaks packets, encoded and decoded as on the wire.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from hashlib import sha1
from itertools import count
from random import Random  # noqa: TID251 - seeded
from typing import Any

from neo.lib.codec import Decoder, pack
from neo.lib.connection import Connection
from neo.lib.handler import Closing, Handler
from neo.lib.protocol import (
    BY_CODE,
    HANDSHAKE,
    MAX_TID,
    ZERO_HASH,
    ZERO_TID,
    AbortTransaction,
    AcceptIdentification,
    AskLockInformation,
    AskObject,
    AskRelockObject,
    AskStoreObject,
    AskStoreTransaction,
    AskVoteTransaction,
    CellState,
    ClusterState,
    NodeState,
    NodeType,
    NotifyClusterInformation,
    NotifyNodeInformation,
    NotifyPartitionChanges,
    NotifyUnlockInformation,
    Packet,
    RequestIdentification,
    SendPartitionTable,
    StartOperation,
)
from neo.lib.runtime import HeapTimer
from neo.lib.util import p64
from neo.storage.app import StorageNode, StorageOptions
from neo.storage.database.memory import MemoryBackend

MASTER = ("127.0.0.1", 10000)
NAME = "testing"
M1 = -0x10000000 + 1
UP, OUT = CellState.UP_TO_DATE, CellState.OUT_OF_DATE


class Log:
    """A logger that remembers what people must see."""

    tracing = False

    def __init__(self) -> None:
        self.lines: list[str] = []

    def _add(self, message: str, *args: object) -> None:
        self.lines.append(message % args)

    def debug(self, message: str, *args: object) -> None:
        message % args

    info = debug
    warning = error = critical = exception = _add

    def throttled(self, key: object, level: int, message: str, *args: object) -> None:
        self._add(message, *args)

    def set_node(self, cluster: str, nid: int | None) -> None:
        """Nothing to show."""

    def flush(self) -> None:
        self.lines.append("flush")


class Transport:
    """The bytes of one connection; the other end is a Peer."""

    def __init__(self) -> None:
        self.conn: Connection
        self.is_closed = False

    def flush_soon(self) -> None:
        """Peers take what they want."""

    def close(self) -> None:
        self.is_closed = True

    def finish(self) -> None:
        self.is_closed = True


class Harness:
    """A Runtime, and the node that runs on it.

    `eager`: what is unlocked is applied as soon as the writer is idle.
    """

    def __init__(
        self,
        backend: MemoryBackend | None = None,
        start: bool = True,
        eager: bool = False,
        **options: Any,
    ) -> None:
        self.log = Log()
        self.rng = Random(0)
        self.time = 1000.0
        self.timers: list[tuple[float, int, HeapTimer]] = []
        self.order = count()
        self.jobs: list[tuple[str, Callable[[], Any], Callable[[Any], object]]] = []
        self.hold_jobs = self.hold_writer = False
        self.status: int | None = None
        self.accept: Callable[[Connection], object] = lambda conn: None
        self.connections: list[Connection] = []  # opened by the node
        self.backend = backend or MemoryBackend()
        self.backend.has_cheap_commits = eager
        defaults: dict[str, Any] = {
            "cluster": NAME,
            "bind": ("127.0.0.1", 0),
            "masters": [MASTER],
            "host": "host",
        }
        self.node = StorageNode(
            self, self.backend, StorageOptions(**{**defaults, **options})
        )
        self.timestamp = 100.0
        if start:
            self.node.start()

    # --- Runtime ----------------------------------------------------------------------

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def call_later(self, delay: float, callback: Callable[[], object]) -> HeapTimer:
        timer = HeapTimer(callback)
        heapq.heappush(self.timers, (self.time + delay, next(self.order), timer))
        return timer

    def connect(self, address: Any, handler: Handler) -> Connection:
        transport = Transport()
        conn = Connection(self, transport, address, handler, incoming=False)
        transport.conn = conn
        self.connections.append(conn)
        return conn

    def connection_succeeded(self, address: Any) -> None:
        """Nothing is throttled here."""

    def listen(self, address: Any, accept: Callable[[Connection], object]) -> Any:
        self.accept = accept
        return address[0], 12345

    def unlisten(self) -> None:
        """Nobody tries."""

    def submit(
        self,
        queue: str,
        job: Callable[[], Any],
        done: Callable[[Any], object],
        *,
        inline: bool = False,
    ) -> None:
        self.jobs.append((queue, job, done))

    def buggify(self, name: str) -> bool:
        return False

    def stop(self, status: int = 0) -> None:
        self.status = status

    # --- events -----------------------------------------------------------------------

    def turn(self) -> None:
        """Handle all that is due, until nothing is left."""
        while True:
            if self.timers and self.timers[0][0] <= self.time:
                callback = heapq.heappop(self.timers)[2].callback
                if callback is not None:
                    callback()
            elif (index := self._next_job()) is not None:
                _, job, done = self.jobs.pop(index)
                try:
                    result = job()
                except Exception as error:  # noqa: BLE001 - as a Runtime does
                    result = error
                done(result)
            else:
                break
        if self.status is None:
            self.node.check()

    def _next_job(self) -> int | None:
        if self.hold_jobs:
            return None
        queues = [queue for queue, _, _ in self.jobs]
        for index, queue in enumerate(queues):
            if not (self.hold_writer and queue == "writer"):
                return index
        return None

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        end = self.time + seconds
        while self.timers and self.timers[0][0] <= end:
            self.time = max(self.time, self.timers[0][0])
            self.turn()
        self.time = end
        self.turn()

    # --- peers ------------------------------------------------------------------------

    def dial(self) -> Peer:
        """Somebody connects to the node."""
        transport = Transport()
        conn = Connection(self, transport, ("127.0.0.1", 1), Closing(), incoming=True)
        transport.conn = conn
        self.accept(conn)
        return Peer(self, conn)

    def answer_call(self) -> Peer:
        """Take the connection that the node is opening."""
        return Peer(self, self.connections.pop(0))

    def master(self, nid: int = 1) -> Peer:
        """Accept the node as primary master, in its initialisation."""
        peer = self.answer_call()
        _, msg_id, _ = peer.expect(RequestIdentification)
        peer.send(AcceptIdentification, NodeType.MASTER, M1, nid, msg_id=msg_id)
        self.turn()
        self.m = peer
        self.tell_nodes(
            (NodeType.STORAGE, (b"127.0.0.1", 12345), nid, NodeState.RUNNING, 1.5),
            (NodeType.MASTER, (b"127.0.0.1", 10000), M1, NodeState.RUNNING, None),
        )
        return peer

    def tell_nodes(self, *rows: Any) -> None:
        self.timestamp += 1
        self.m.send(NotifyNodeInformation, self.timestamp, rows)

    def operate(self, rows: Any = (((1, UP),), ((1, UP),)), nid: int = 1) -> Peer:
        """Bring the node to operation."""
        m = self.master(nid)
        m.send(NotifyClusterInformation, ClusterState.VERIFYING)
        m.send(SendPartitionTable, 1, 0, rows)
        m.send(StartOperation, False)
        m.expect(BY_CODE[0x3B])
        return m

    def change_table(self, ptid: int, *cells: Any) -> None:
        self.m.send(NotifyPartitionChanges, ptid, 0, cells)

    def client(self, number: int = 1, stamp: float = 2.5) -> Peer:
        """A client of the cluster, connected."""
        nid = -0x20000000 + number
        self.tell_nodes((NodeType.CLIENT, None, nid, NodeState.RUNNING, stamp))
        peer = self.dial()
        peer.send(
            RequestIdentification,
            NodeType.CLIENT,
            nid,
            None,
            NAME.encode(),
            stamp,
            {},
        )
        assert peer.receive(AcceptIdentification) == (NodeType.STORAGE, 1, nid)
        return peer


class Peer:
    """The other end of a connection of the node."""

    def __init__(self, harness: Harness, conn: Connection) -> None:
        self.harness = harness
        self.conn = conn
        self.decoder = Decoder(1 << 30)
        self.ids = count()
        conn.established()
        conn.receive(HANDSHAKE)
        assert self.conn.out[0] == HANDSHAKE
        del self.conn.out[0]
        self.queue: list[tuple[Packet[...], int, Any]] = []

    @property
    def is_closed(self) -> bool:
        """Whether the node closed the connection."""
        return self.conn.closed

    def send(self, packet: Packet[...], *args: Any, msg_id: int | None = None) -> int:
        """Send a packet, and let the node handle it; its id."""
        if msg_id is None:
            msg_id = next(self.ids)
        self.conn.receive(pack((msg_id, packet.code, args)))
        self.harness.turn()
        return msg_id

    def packets(self) -> list[tuple[Packet[...], int, Any]]:
        """What the node sent and was not looked at yet."""
        out, self.conn.out = self.conn.out, []
        self.conn.out_size = 0
        for msg_id, code, args, _ in self.decoder.feed(b"".join(out)):
            assert BY_CODE[code].valid(args), BY_CODE[code].explain(args)
            self.queue.append((BY_CODE[code], msg_id, args))
        result, self.queue = self.queue, []
        return result

    def expect(self, packet: Packet[...]) -> tuple[Packet[...], int, Any]:
        """The next packet, of this kind."""
        self.queue = self.packets()
        assert self.queue, f"{packet} expected, nothing came"
        first = self.queue.pop(0)
        assert first[0] is packet, f"{packet} expected: {first}"
        return first

    def receive(self, packet: Packet[...]) -> Any:
        """Arguments of the next packet, of this kind."""
        return self.expect(packet)[2]

    def ask(self, packet: Packet[...], *args: Any) -> Any:
        """Send a request and take its answer: its arguments, also those of an Error."""
        msg_id = self.send(packet, *args)
        found = [p for p in self.packets() if p[1] == msg_id and p[0].code & 0x8000]
        assert len(found) == 1, found
        return found[0][2]

    def lose(self) -> None:
        """The connection breaks."""
        self.conn.lost("reset")
        self.harness.turn()

    # --- transactions -----------------------------------------------------------------

    def store(
        self,
        ttid: bytes,
        oid: bytes,
        data: bytes | None,
        base: bytes = ZERO_TID,
        value_tid: bytes | None = None,
    ) -> int:
        checksum = ZERO_HASH if data is None else sha1(data).digest()
        args = (oid, base, 0, checksum, data or b"", value_tid, ttid)
        return self.send(AskStoreObject, *args)

    def relock(self, ttid: bytes, oid: bytes) -> int:
        return self.send(AskRelockObject, ttid, oid)

    def vote(self, ttid: bytes, *oids: bytes) -> int:
        args = (ttid, b"user", b"description", b"", oids, None)
        return self.send(AskStoreTransaction, *args)

    def vote_only(self, ttid: bytes) -> int:
        return self.send(AskVoteTransaction, ttid)

    def abort(self, ttid: bytes) -> None:
        self.send(AbortTransaction, ttid, ())

    def load(self, oid: bytes, at: Any = None, before: Any = None) -> Any:
        return self.ask(AskObject, oid, at, before)

    def lock(self, ttid: bytes, tid: bytes) -> int:
        """As the master."""
        return self.send(AskLockInformation, ttid, tid, False)

    def unlock(self, ttid: bytes) -> None:
        """As the master."""
        self.send(NotifyUnlockInformation, ttid)

    def commit(
        self,
        ttid: bytes,
        tid: bytes,
        objects: dict[bytes, bytes | None],
        base: dict[bytes, bytes] | None = None,
    ) -> None:
        """A whole transaction, as a client."""
        for oid, data in objects.items():
            self.store(ttid, oid, data, (base or {}).get(oid, ZERO_TID))
        self.vote(ttid, *objects)
        self.packets()
        m = self.harness.m
        m.lock(ttid, tid)
        m.unlock(ttid)
        m.packets()


def number(value: int) -> bytes:
    """An oid, or a small tid."""
    return p64(value)


LAST = MAX_TID
