"""The client's core against scripted nodes: one master, two storages, no thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha1
from random import Random  # noqa: TID251 seeded
from types import SimpleNamespace
from typing import Any

import pytest
from ZODB.POSException import ReadConflictError

from neo.client import first_phase, transactions
from neo.client.app import ClientApp, ClientOptions
from neo.client.exception import (
    NEOStorageDoesNotExistError,
    NEOStorageError,
    NEOStorageTransientError,
    NEOStorageWrongChecksum,
)
from neo.client.importing import Flight
from neo.client.reader import BIG
from neo.client.Storage import Storage
from neo.lib.codec import Decoder, pack
from neo.lib.connection import Connection
from neo.lib.logger import Logger
from neo.lib.protocol import (
    BY_CODE,
    HANDSHAKE,
    MAX_TID,
    RESPONSE,
    ZERO_TID,
    CellState,
    ErrorCode,
    NodeState,
    NodeType,
)
from neo.lib.util import Address, p64

MASTER = ("127.0.0.1", 1)
STORAGES = {1: ("127.0.0.1", 2), 2: ("127.0.0.1", 3)}
MASTER_NID, CLIENT_NID = -(1 << 28) + 1, -(2 << 28) + 1
OID = p64(5)
LAST = p64(100)


def here(address: Address) -> tuple[bytes, int]:
    """As on the wire."""
    return address[0].encode(), address[1]


class Transport:
    """Bytes go to a script, which answers with bytes."""

    def __init__(self, runtime: Fake, address: Address) -> None:
        self.runtime = runtime
        self.address = address
        self.conn: Connection
        self.decoder = Decoder(1 << 20)
        self.greeted = False
        self.next_id = 0

    def flush_soon(self) -> None:
        self.runtime.dirty.append(self)

    def close(self) -> None:
        """Nothing to free."""

    finish = close

    def flush(self) -> None:
        """Let the node see what was sent."""
        data = self.conn.take()
        self.conn.sent(len(data))
        if not self.greeted:
            self.greeted = True
            data = data[len(HANDSHAKE) :]
        for msg_id, code, args, _ in self.decoder.feed(data):
            self.runtime.requests.append((self, msg_id, BY_CODE[code].name, args))

    def say(self, name: str, *args: Any, msg_id: int | None = None) -> None:
        """Send a packet to the client."""
        packet = next(p for p in BY_CODE.values() if p.name == name)
        if not packet.code & RESPONSE or msg_id is None:
            msg_id, self.next_id = self.next_id, self.next_id + 1
        self.conn.receive(pack((msg_id, packet.code, args)))


class Timer:
    def cancel(self) -> None:
        """Timers of this world never fire."""


class Fake:
    """A ClientRuntime whose nodes are functions by the name of the packet."""

    def __init__(self) -> None:
        self.log = Logger(console=False)
        self.rng = Random(0)
        self.time = 0.0
        self.dirty: list[Transport] = []
        self.requests: deque[tuple[Transport, int, str, tuple[Any, ...]]] = deque()
        self.transports: dict[Address, Transport] = {}
        self.seen: list[tuple[int, str, tuple[Any, ...]]] = []
        self.last_tid = LAST
        self.timestamp = 0.0
        self.opening: deque[Transport] = deque()
        # (port, packet) -> args -> list of packets to say; else a default.
        self.script: dict[tuple[int, str], Callable[..., list[tuple[Any, ...]]]] = {}

    def now(self) -> float:
        return self.time

    monotonic = now

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        return Timer()

    def buggify(self, name: str) -> bool:
        return False

    def connection_succeeded(self, address: Address) -> None:
        """There is no throttle."""

    def connect(self, address: Address, handler: Any) -> Connection:
        transport = Transport(self, address)
        conn = Connection(self, transport, address, handler, incoming=False)  # type: ignore[arg-type]
        transport.conn = conn
        self.transports[address] = transport
        self.opening.append(transport)
        return conn

    def thread(self) -> int:
        return 0

    def unlocked(self, job: Callable[[], Any]) -> Any:
        return job()

    def look(self, connections: Iterable[Connection]) -> None:
        """Nothing comes but by `turn`."""

    def turn(self) -> bool:
        """Let one thing happen; false if nothing can."""
        if self.dirty:
            self.dirty.pop(0).flush()
        elif self.opening:
            transport = self.opening.popleft()
            if not transport.conn.closed:
                transport.conn.established()
                transport.conn.receive(HANDSHAKE)
        elif self.requests:
            transport, msg_id, name, args = self.requests.popleft()
            self.seen.append((transport.address[1], name, args))
            if transport.conn.closed:
                return True
            answer = self.script.get((transport.address[1], name))
            packets = (answer or getattr(self, name, lambda *_: []))(*args)
            for packet in packets:
                if packet == ("close",):
                    transport.conn.lost("closed by the test")
                    break
                transport.say(*packet, msg_id=msg_id)
        else:
            return False
        return True

    def wait(
        self,
        condition: Callable[[], object],
        connections: Iterable[Connection] = (),
        timeout: float | None = None,
    ) -> bool:
        while not condition():
            if not self.turn():
                assert timeout is not None, "nothing will happen any more"
                self.time += timeout
                return False
        return True

    # --- nodes ------------------------------------------------------------------------

    def RequestIdentification(self, *args: Any) -> list[tuple[Any, ...]]:  # noqa: N802
        if args[1] is None or args[4] is None:
            self.timestamp += 1
            nodes = [
                (NodeType.CLIENT, None, CLIENT_NID, NodeState.RUNNING, self.timestamp),
                (
                    NodeType.MASTER,
                    (b"127.0.0.1", 1),
                    MASTER_NID,
                    NodeState.RUNNING,
                    None,
                ),
                *(
                    (NodeType.STORAGE, here(a), nid, NodeState.RUNNING, 1.0)
                    for nid, a in STORAGES.items()
                ),
            ]
            row = [(nid, CellState.UP_TO_DATE) for nid in STORAGES]
            return [
                ("AcceptIdentification", NodeType.MASTER, MASTER_NID, CLIENT_NID),
                ("NotifyNodeInformation", self.timestamp, nodes),
                ("SendPartitionTable", 1, 1, [row, row]),
            ]
        nid = next(
            n for n, address in STORAGES.items() if address[1] == self.seen[-1][0]
        )
        return [("AcceptIdentification", NodeType.STORAGE, nid, CLIENT_NID)]

    def AskLastTransaction(self) -> list[tuple[Any, ...]]:  # noqa: N802
        return [("AnswerLastTransaction", self.last_tid)]

    def Ping(self) -> list[tuple[Any, ...]]:  # noqa: N802
        return [("Pong",)]

    def AskBeginTransaction(self, tid: Any) -> list[tuple[Any, ...]]:  # noqa: N802
        return [("AnswerBeginTransaction", p64(110))]

    def AskStoreObject(self, *_: Any) -> list[tuple[Any, ...]]:  # noqa: N802
        return [("AnswerStoreObject", None)]

    def AskCheckCurrentSerial(self, *_: Any) -> list[tuple[Any, ...]]:  # noqa: N802
        return [("AnswerCheckCurrentSerial", None)]

    def AskStoreTransaction(self, *_: Any) -> list[tuple[Any, ...]]:  # noqa: N802
        return [("AnswerStoreTransaction",)]

    def FailedVote(self, *_: Any) -> list[tuple[Any, ...]]:  # noqa: N802
        return [("Error", 0, b"")]

    def AskFinishTransaction(self, ttid: bytes, *_: Any) -> list[tuple[Any, ...]]:  # noqa: N802
        return [("AnswerTransactionFinished", ttid, p64(112))]


class DB:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def invalidate(self, tid: bytes, oids: Any) -> None:
        self.calls.append((tid, list(oids)))

    def invalidateCache(self) -> None:  # noqa: N802
        self.calls.append("all")


@pytest.fixture
def world() -> Fake:
    return Fake()


@pytest.fixture
def app(world: Fake) -> ClientApp:
    app = ClientApp(world, ClientOptions((MASTER,), "test"))  # type: ignore[arg-type]
    app.db = DB()
    return app


def data(serial: int, value: bytes, end: int | None = None) -> tuple[Any, ...]:
    """AnswerObject."""
    tid = p64(serial)
    following = None if end is None else p64(end)
    return "AnswerObject", OID, tid, following, 0, sha1(value).digest(), value, None


def both(world: Fake, name: str, answer: Callable[..., list[tuple[Any, ...]]]) -> None:
    for port in (2, 3):
        world.script[port, name] = answer


def test_load_is_bounded_and_cached(world: Fake, app: ClientApp) -> None:
    both(world, "AskObject", lambda *_: [data(90, b"x")])
    for _ in range(2):
        assert app.reader.load(OID) == (b"x", p64(90), None)
    asked = [args for _, name, args in world.seen if name == "AskObject"]
    assert asked == [(OID, None, p64(101))]


def test_invalidation_during_load(world: Fake, app: ClientApp) -> None:
    """Scenario 104: the entry ends where the invalidation says."""

    def answer(*_: Any) -> list[tuple[Any, ...]]:
        world.transports[MASTER].say("InvalidateObjects", p64(103), [OID])
        return [data(90, b"x")]

    both(world, "AskObject", answer)
    assert app.reader.load(OID) == (b"x", p64(90), p64(103))
    assert app.last_tid == p64(103)
    assert app.db.calls == [(p64(103), [OID])]
    assert app.cache.load(OID, p64(103)) == (b"x", p64(90), p64(103))
    assert app.cache.load(OID) is None


def test_events_while_big_data_are_unpacked(world: Fake, app: ClientApp) -> None:
    """Others use the client meanwhile: an invalidation, then a loss of the master."""
    value = b"x" * BIG
    both(world, "AskObject", lambda *_: [data(90, value)])

    def invalidated(job: Callable[[], Any]) -> Any:
        world.transports[MASTER].say("InvalidateObjects", p64(105), [OID])
        return job()

    world.unlocked = invalidated  # type: ignore[method-assign]
    assert app.reader.load(OID) == (value, p64(90), p64(105))
    assert app.cache.load(OID, p64(200)) is None
    assert app.cache.load(OID, p64(100)) is not None

    def lost(job: Callable[[], Any]) -> Any:
        world.transports[MASTER].conn.lost("closed by the test")
        return job()

    world.unlocked = lost  # type: ignore[method-assign]
    app.cache.clear()
    assert app.reader.load(OID, p64(101))[0] == value
    assert app.cache.load(OID, p64(100)) is None


def test_late_invalidation(world: Fake, app: ClientApp) -> None:
    """What is not notified yet does not end a revision, for the application."""
    both(world, "AskObject", lambda *_: [data(90, b"x", 103)])
    assert app.reader.load(OID, MAX_TID) == (b"x", p64(90), None)
    assert app.reader.load(OID, MAX_TID) == (b"x", p64(90), None)


@pytest.mark.parametrize(
    "failure",
    [
        ("Error", int(ErrorCode.NON_READABLE_CELL), b""),
        ("close",),
        ("AnswerObject", OID, p64(90), None, 0, bytes(20), b"bad", None),
    ],
)
def test_other_replica(world: Fake, app: ClientApp, failure: tuple[Any, ...]) -> None:
    world.script[2, "AskObject"] = lambda *_: [failure]
    world.script[3, "AskObject"] = lambda *_: [data(90, b"x")]
    for _ in range(10):
        app.cache.clear()
        assert app.reader.load(OID) == (b"x", p64(90), None)


def test_all_copies_damaged(world: Fake, app: ClientApp) -> None:
    bad = "AnswerObject", OID, p64(90), None, 0, bytes(20), b"bad", None
    both(world, "AskObject", lambda *_: [bad])
    with pytest.raises(NEOStorageWrongChecksum) as caught:
        app.reader.load(OID)
    assert caught.value.args == (OID, p64(90))


def test_data_damaged_on_their_way(world: Fake, app: ClientApp) -> None:
    """Asked again before they are said to be damaged, whatever failed before."""
    bad = "AnswerObject", OID, p64(90), None, 0, bytes(20), b"bad", None
    answers = [("close",)] * 3 + [bad, data(90, b"x")]
    both(world, "AskObject", lambda *_: [answers.pop(0)])
    assert app.reader.load(OID) == (b"x", p64(90), None)
    assert not answers


def test_missing(world: Fake, app: ClientApp) -> None:
    both(world, "AskObject", lambda *_: [("Error", 5, b"")])
    with pytest.raises(NEOStorageDoesNotExistError):
        app.reader.load(OID)
    assert not app.reader.loads


@pytest.mark.parametrize("last", [100, 105, 95])
def test_reconnection(world: Fake, app: ClientApp, last: int) -> None:
    """Scenarios 108, 109: the cache keeps what is still true."""
    both(world, "AskObject", lambda *_: [data(90, b"x", 95), data(95, b"y")][:1])
    app.reader.load(OID, p64(95))
    app.cache.store(OID, b"y", p64(95), None)
    world.last_tid = p64(last)
    world.transports[MASTER].conn.lost("test")
    assert not app.ready
    assert not app.links
    app.sync()
    assert app.session == 2
    assert app.last_tid == p64(last)
    assert (app.cache.load(OID) is not None) == (last == 100)
    assert (app.cache.load_exact(OID, p64(90)) is not None) == (last >= 100)
    assert app.db.calls == ([] if last == 100 else ["all"])


def begin(app: ClientApp) -> transactions.Transaction:
    return transactions.begin(app, b"user", b"description", b"")


def store(txn: transactions.Transaction, value: bytes = b"new") -> None:
    txn.store(OID, p64(90), value, (0, sha1(value).digest(), value))


def test_commit(world: Fake, app: ClientApp) -> None:
    txn = begin(app)
    store(txn)
    txn.check_current(p64(7), p64(80))
    assert txn.wait_stores()
    txn.vote()
    told: list[bytes] = []
    assert txn.finish(told.append) == p64(112)
    assert told == [p64(112)]
    assert app.last_tid == p64(112)
    assert app.cache.load(OID) == (b"new", p64(112), None)
    finish = [args for _, name, args in world.seen if name == "AskFinishTransaction"]
    assert finish == [(p64(110), (OID,), (), (1,), None)]
    assert not app.transactions


def test_conflict_is_reported_once(world: Fake, app: ClientApp) -> None:
    """Scenario 57: the other replica reports what is resolved already."""
    world.script[2, "AskStoreObject"] = lambda *a: [
        ("AnswerStoreObject", p64(95) if a[1] == p64(90) else None)
    ]
    world.script[3, "AskStoreObject"] = world.script[2, "AskStoreObject"]
    txn = begin(app)
    store(txn)
    assert not txn.wait_stores()
    work = txn.next_conflict()
    assert work is not None
    version, tid = work
    assert (version.origin, version.data, tid) == (p64(90), b"new", p64(95))
    txn.store_resolved(OID, tid, b"merged", (0, sha1(b"merged").digest(), b"merged"))
    assert txn.wait_stores()
    assert txn.resolved_oids() == [OID]


def test_oids_of_a_former_master(world: Fake, app: ClientApp) -> None:
    """Its successor may give them again: they are not used any more."""
    blocks = [range(1, 101), range(101, 201), range(51, 151), range(151, 251)]
    world.script[1, "AskNewOIDs"] = lambda *_: [
        ("AnswerNewOIDs", [p64(n) for n in blocks.pop(0)])
    ]
    oids = [app.oids.new() for _ in range(80)]
    assert oids == [p64(n) for n in range(1, 81)]
    txn = begin(app)
    txn.store(oids[0], ZERO_TID, b"", first_phase.NO_DATA)
    txn.abort()
    world.transports[MASTER].conn.lost("closed by the test")
    assert app.oids.new() == p64(201)
    txn = begin(app)
    with pytest.raises(NEOStorageTransientError, match="somebody else"):
        txn.store(oids[1], ZERO_TID, b"", first_phase.NO_DATA)
    txn.store(oids[1], p64(90), b"", first_phase.NO_DATA)  # committed long ago
    txn.store(p64(201), ZERO_TID, b"", first_phase.NO_DATA)
    txn.abort()


@pytest.mark.parametrize("is_late", [False, True])
def test_conflict_before_its_invalidation(
    world: Fake, app: ClientApp, is_late: bool
) -> None:
    """Scenario 98: it is awaited, and asked for if that takes too long."""
    both(world, "AskStoreObject", lambda *a: [("AnswerStoreObject", p64(105))])
    txn = begin(app)
    store(txn)
    assert not txn.wait_stores()

    def invalidate() -> None:
        world.transports[MASTER].say("InvalidateObjects", p64(105), [OID])

    turn = world.turn
    left = [] if is_late else [invalidate]
    world.turn = lambda: turn() or bool(left and (left.pop()() or True))  # type: ignore[method-assign, func-returns-value]
    if is_late:
        world.script[1, "Ping"] = lambda: [
            ("InvalidateObjects", p64(105), [OID]), ("Pong",)
        ]  # fmt: skip
    assert txn.next_conflict() is not None
    assert app.last_tid == p64(105)
    assert ((1, "Ping", ()) in world.seen) == is_late


def test_starvation_takes_the_lock(world: Fake, app: ClientApp) -> None:
    """D9: after some attempts, unresolved data take the lock first."""
    current = [90]

    def answer(*args: Any) -> list[tuple[Any, ...]]:
        base = int.from_bytes(args[1], "big")
        if base <= current[0] and current[0] < 94:
            current[0] = max(current[0], base) + 1
            return [("AnswerStoreObject", p64(current[0]))]
        return [("AnswerStoreObject", None)]

    both(world, "AskStoreObject", answer)
    txn = begin(app)
    store(txn)
    resolved = 0
    while True:
        while (work := txn.next_conflict()) is not None:
            tid = work[1]
            resolved += 1
            record = 0, sha1(b"m").digest(), b"m"
            txn.store_resolved(OID, tid, b"m", record)
        if txn.wait_stores():
            break
    assert resolved <= first_phase.ATTEMPTS + 1
    assert not txn.locked


def test_checked_object_changed(world: Fake, app: ClientApp) -> None:
    both(
        world,
        "AskCheckCurrentSerial",
        lambda *_: [("AnswerCheckCurrentSerial", p64(99))],
    )
    txn = begin(app)
    txn.check_current(OID, p64(90))
    assert not txn.wait_stores()
    with pytest.raises(ReadConflictError):
        txn.next_conflict()
    txn.abort()
    assert not app.transactions


def test_deadlock(world: Fake, app: ClientApp) -> None:
    """3.5: the data come back with the conflict, also if they were dropped here."""
    relock = p64(90), p64(95), (0, sha1(b"new").digest(), b"new")
    world.script[2, "AskRelockObject"] = lambda *_: [("AnswerRelockObject", relock)]
    txn = begin(app)
    store(txn)
    assert txn.wait_stores()
    txn.oids[OID].data = None
    world.transports[STORAGES[1]].say("NotifyDeadlock", p64(110), OID)
    assert txn.relocking == 1
    assert not txn.wait_stores()
    work = txn.next_conflict()
    assert work is not None
    assert (work[0].data, work[1]) == (b"new", p64(95))


@pytest.mark.parametrize("accepted", [True, False])
def test_failed_storage(world: Fake, app: ClientApp, accepted: bool) -> None:
    """3.7: the master decides whether a storage may be missing."""
    world.script[3, "AskStoreObject"] = lambda *_: [("close",)]
    if not accepted:
        world.script[1, "FailedVote"] = lambda *_: [("Error", 12, b"")]
    txn = begin(app)
    store(txn)
    assert txn.wait_stores()
    if accepted:
        txn.vote()
        assert txn.finish(None) == p64(112)
    else:
        with pytest.raises(NEOStorageTransientError):
            txn.vote()
    votes = [args for _, name, args in world.seen if name == "FailedVote"]
    assert votes == [(p64(110), (2,))]


def test_not_fully_locked(world: Fake, app: ClientApp) -> None:
    """Scenario 55: nobody checked the conflicts."""
    world.script[2, "AskStoreObject"] = lambda *_: [("AnswerStoreObject", ZERO_TID)]
    world.script[3, "AskStoreTransaction"] = lambda *_: [("close",)]
    txn = begin(app)
    store(txn)
    assert txn.wait_stores()
    with pytest.raises(NEOStorageTransientError, match="write-locked"):
        txn.vote()


def test_not_locked_at_all(world: Fake, app: ClientApp) -> None:
    """Nor if no storage failed: a cell may be dropped while a store waits there."""
    both(world, "AskStoreObject", lambda *_: [("AnswerStoreObject", ZERO_TID)])
    txn = begin(app)
    store(txn)
    assert txn.wait_stores()
    with pytest.raises(NEOStorageTransientError, match="write-locked"):
        txn.vote()


@pytest.mark.parametrize("final", ["master", "storage", "never"])
def test_lost_answer(world: Fake, app: ClientApp, final: str) -> None:
    """3.11: master, then storages, tell what happened."""
    world.script[1, "AskFinishTransaction"] = lambda *_: [("close",)]
    told = {"master": p64(112), "storage": MAX_TID, "never": None}[final]
    world.script[1, "AskFinalTID"] = lambda *_: [("AnswerFinalTID", told)]
    both(world, "AskFinalTID", lambda *_: [("AnswerFinalTID", p64(112))])
    txn = begin(app)
    store(txn)
    assert txn.wait_stores()
    txn.vote()
    world.last_tid = LAST if final == "never" else p64(112)
    if final == "never":
        with pytest.raises(NEOStorageTransientError):
            txn.finish(None)
        assert app.last_tid == LAST
    else:
        calls: list[bytes] = []
        assert txn.finish(calls.append) == p64(112)
        assert calls == [p64(112)]
        assert app.last_tid == p64(112)
    assert not app.exclusive


def test_master_lost_before_vote(world: Fake, app: ClientApp) -> None:
    """Scenario 59."""
    txn = begin(app)
    store(txn)
    world.transports[MASTER].conn.lost("test")
    with pytest.raises(NEOStorageTransientError, match="aborted"):
        txn.wait_stores()
    txn.abort()
    assert [name for _, name, _ in world.seen].count("AbortTransaction") == 0


def test_too_many_objects(
    world: Fake, app: ClientApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 78: refused before storages do, and for good."""
    monkeypatch.setattr(first_phase, "MAX_TRANSACTION_OIDS", 2)
    txn = begin(app)
    for oid in (1, 2, 2):
        txn.store(p64(oid), ZERO_TID, b"x", (0, sha1(b"x").digest(), b"x"))
    with pytest.raises(NEOStorageError, match="at most 2 objects"):
        txn.store(p64(3), ZERO_TID, b"x", (0, sha1(b"x").digest(), b"x"))
    txn.abort()


def test_interrupted_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is what the caller hears of, not what became of the last transactions."""

    def land(self: Flight, left: int = 0) -> None:
        raise NEOStorageError("connection lost")

    def iterator() -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Flight, "land", land)
    storage: Any = SimpleNamespace()
    with pytest.raises(KeyboardInterrupt):
        Storage.copyTransactionsFrom(storage, SimpleNamespace(iterator=iterator))
