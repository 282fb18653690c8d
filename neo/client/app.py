"""Core of a client: master session, connections to storages, reads.

Knows no thread, socket or clock: it blocks in `runtime.wait()` alone. The caller holds
the lock of the Runtime (neo/client/shell.py) whenever it calls a method here, and
`wait()` releases it (so does `unlocked()`). Packets are handled under the same lock.

States of a client: searching (Bootstrap), synchronising (accepted, AskLastTransaction
sent), ready. `session` counts the masters' acceptances. Losing the master ends the
session: connections to storages are closed with it, because the master may give our nid
to somebody else, and nothing is read or written under the old one.

Order which makes snapshots right (behaviour.md 9.4): a load is registered before its
bound is computed; an invalidation marks the cache and the registered loads, then tells
ZODB, then raises `last_tid`; the end of a loaded revision is computed when it enters
the cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha1
from itertools import islice
from typing import TYPE_CHECKING, Any

from neo.lib.bootstrap import Bootstrap, Identity
from neo.lib.compress import decompress
from neo.lib.config import Limits
from neo.lib.connection import Connection
from neo.lib.exception import NeoError, ProtocolError
from neo.lib.handler import Handler
from neo.lib.node import Node, NodeManager, nid_str
from neo.lib.protocol import (
    FEATURE_CHECK,
    FEATURE_EARLY_VOTE,
    FEATURE_IMPORT,
    FEATURE_SIZE,
    FEATURES,
    ZERO_HASH,
    AbortTransaction,
    AskFinalTID,
    AskLastTransaction,
    AskNewOIDs,
    AskObject,
    AskSize,
    ClusterState,
    ErrorCode,
    NodeRow,
    NodeState,
    NodeType,
    NotifyDamaged,
    Packet,
    Ping,
    RequestIdentification,
    Rows,
    WireAddress,
)
from neo.lib.pt import PartitionTable
from neo.lib.runtime import RECONNECTION_DELAY, ClientRuntime
from neo.lib.util import Address, add64, format_address

from .ahead import Ahead
from .cache import ClientCache
from .exception import (
    NEOPrimaryMasterLost,
    NEOStorageCreationUndoneError,
    NEOStorageDoesNotExistError,
    NEOStorageError,
    NEOStorageNotFoundError,
    NEOStorageTransientError,
    NEOStorageWrongChecksum,
)
from .metadata import Informations
from .turns import Turns

if TYPE_CHECKING:
    from .transactions import Transaction

CACHE_SIZE = 20 << 20
OBJECT_SIZE_MAX = 60 << 20  # neoppod's storages exit above 64 MiB
# A storage that does not answer to the vote for so long, when others did, has failed.
VOTE_TIMEOUT = 15.0
# A storage that failed is asked last for so long.
FAILURE_MEMORY = 600.0
OIDS_BLOCK = 100
RANGES_MAX = 100  # of oids that former primaries gave
OIDS_LOW = 25  # ask the next block when no more are left
# Reads that are sent before the first answer is awaited.
WINDOW = 128
# Between two rounds over the storages that have an object, when all failed.
READ_PAUSE = 0.05
# Data that are worth to be decompressed while other threads use the client (bytes).
BIG = 1 << 16
WARN_AFTER = 5.0
WARN_AGAIN = 60.0


@dataclass(frozen=True)
class ClientOptions:
    """What a client must know. Times are seconds, sizes bytes."""

    masters: tuple[Address, ...]
    cluster: str
    read_only: bool = False
    cache_size: int = CACHE_SIZE
    ignore_wrong_checksum: bool = False
    connect_timeout: float | None = None  # None: wait for ever
    object_size_max: int = OBJECT_SIZE_MAX
    vote_timeout: float = VOTE_TIMEOUT
    limits: Limits = field(default_factory=Limits)
    tls: tuple[str, str, str] | None = None  # paths: ca, cert, key
    save_masters: Callable[[list[Address]], object] | None = None


class Refusal(NeoError):
    """A storage or the master answered with an error; `code` is an ErrorCode."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{error_name(code)}: {text}" if text else error_name(code))
        self.code = code
        self.text = text


def error_name(code: int) -> str:
    """Name of an error code, or its number."""
    return ErrorCode(code).name if code in set(ErrorCode) else str(code)


class Answer:
    """Outcome of a request: `value` (the arguments), or `code` and `text`.

    `code` is None if the connection was lost, or if the answer is good.
    """

    __slots__ = ("code", "done", "text", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: tuple[Any, ...] | None = None
        self.code: int | None = None
        self.text = ""

    def set(self, *args: Any) -> None:
        """The answer came."""
        self.value = args
        self.done = True

    def fail(self, code: int | None, text: str) -> None:
        """An error came, or the connection is gone."""
        self.code, self.text = code, text
        self.done = True

    @property
    def lost(self) -> bool:
        """Whether the connection broke before the answer."""
        return self.value is None and self.code is None


class Load:
    """A read in progress of one object, for itself and whoever wants the same."""

    __slots__ = ("conn", "invalidations", "session")

    def __init__(self, session: int) -> None:
        self.session = session
        self.invalidations: list[bytes] = []
        self.conn: Connection | None = None


Request = tuple[bytes, Packet[...], tuple[Any, ...]]  # (oid or tid, packet, arguments)


class Search(Bootstrap):
    """The search of the primary, which remembers why each master failed."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__(
            app.runtime, app.nm, app.identity, app.master_accepted, app.master_refused
        )
        self.reasons: dict[Address, str] = {}

    def closed(self, conn: Connection) -> None:
        """See Bootstrap."""
        if conn is self.conn:
            self.reasons[conn.address] = conn.reason
        super().closed(conn)

    def describe(self) -> str:
        """Addresses tried, with reasons."""
        reasons = dict(self.reasons)
        if self.trying is not None:
            reasons.setdefault(self.trying, "no answer yet")
        return ", ".join(
            f"{format_address(address)} ({reason})"
            for address, reason in reasons.items()
        )


class MasterHandler(Handler):
    """What the primary master may say."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__()
        self.app = app
        self.first = True
        self.features: tuple[bytes, ...] = ()

    def closed(self, conn: Connection) -> None:
        """The session ends."""
        self.app.master_lost(conn)

    def notify_features(self, conn: Connection, features: Sequence[bytes]) -> None:
        """What it offers beyond protocol 5."""
        self.features = tuple(features)

    def notify_node_information(
        self, conn: Connection, timestamp: float, nodes: Sequence[NodeRow]
    ) -> None:
        """Nodes changed; the first time: all nodes."""
        app = self.app
        is_first, self.first = self.first, False
        update = app.nm.update(
            timestamp, nodes, full=is_first, keep=app.pt.nids() if is_first else ()
        )
        gone = [c.node for c in update.changes if c.state is not NodeState.RUNNING]
        for change in update.changes:
            # It failed before it was (again) part of the cluster. Who would still
            # leave it aside, would make the master expel it: for ever, if the cluster
            # is busy.
            if change.state is NodeState.RUNNING and change.node.nid is not None:
                app.unreachable.pop(change.node.nid, None)
                if not is_first and change.node.address is not None:
                    app.runtime.connection_succeeded(change.node.address)
        for node in (*gone, *update.forgotten):
            app.close_link(node)
        app.check_ready()

    def send_partition_table(
        self, conn: Connection, ptid: int | None, num_replicas: int, rows: Rows
    ) -> None:
        """The complete table."""
        self.app.pt.load(ptid, num_replicas, rows)
        self.app.check_ready()

    def notify_partition_changes(
        self, conn: Connection, ptid: int, num_replicas: int, cells: Sequence[Any]
    ) -> None:
        """Changes of the table."""
        self.app.pt.update(ptid, num_replicas, cells)
        self.app.check_ready()

    def notify_cluster_information(self, conn: Connection, state: ClusterState) -> None:
        """The phase changes; what matters to clients comes as StopOperation."""

    def stop_operation(self, conn: Connection) -> None:
        """The cluster is not operational any more."""
        conn.close("the cluster stops its operation")

    def not_primary_master(
        self, conn: Connection, primary: int | None, masters: Sequence[WireAddress]
    ) -> None:
        """It lost an election."""
        conn.close("not the primary master any more")

    def invalidate_objects(
        self, conn: Connection, tid: bytes, oids: Sequence[bytes]
    ) -> None:
        """Another client committed."""
        if self.app.synchronised:
            self.app.invalidate(tid, oids)

    def flush_log(self, conn: Connection) -> None:
        """An administrator wants to read all logs."""
        conn.log.flush()

    def error(
        self, conn: Connection, packet: Packet[...] | None, code: int, text: str
    ) -> None:
        """To a notification: AbortTransaction, which neoppod's masters may refuse."""
        conn.log.info("%s: error %s: %s", conn, error_name(code), text)


class StorageIdentification(Handler):
    """A connection to a storage node, until it is identified."""

    def __init__(self, app: ClientApp, nid: int) -> None:
        super().__init__()
        self.app = app
        self.nid = nid

    def connected(self, conn: Connection) -> None:
        """Say who we are."""
        app = self.app
        me = app.nm.by_nid(app.nid)
        conn.ask(
            RequestIdentification,
            NodeType.CLIENT,
            app.nid,
            None,
            app.options.cluster.encode(),
            None if me is None else me.id_timestamp,
            {FEATURES: [FEATURE_SIZE, FEATURE_EARLY_VOTE, FEATURE_CHECK]},
        ).then(
            lambda *args: self._accepted(conn, *args),
            lambda code, text: (
                None if code is None else conn.close(f"{error_name(code)}: {text}")
            ),
        )

    def _accepted(
        self, conn: Connection, kind: NodeType, nid: int | None, your_nid: int | None
    ) -> None:
        app = self.app
        node = app.nm.by_nid(self.nid)
        if kind is not NodeType.STORAGE or nid != self.nid or your_nid != app.nid:
            raise ProtocolError(f"storage {nid_str(self.nid)} was expected")
        if node is None:
            conn.close("node forgotten meanwhile")
            return
        node.connection = conn
        conn.set_node(node)
        conn.handler = StorageHandler(app, self.nid)
        app.runtime.connection_succeeded(conn.address)
        app.unreachable.pop(self.nid, None)
        app.failures.pop(self.nid, None)
        limits = app.options.limits
        conn.watch_silence(limits.ping_after, limits.silence_limit, only_if_owed=True)

    def closed(self, conn: Connection) -> None:
        """It can't be reached, or refuses us."""
        app = self.app
        app.unreachable[self.nid] = app.runtime.monotonic()
        app.link_lost(self.nid, conn)


class StorageHandler(Handler):
    """What an identified storage node may say."""

    def __init__(self, app: ClientApp, nid: int) -> None:
        super().__init__()
        self.app = app
        self.nid = nid
        self.features: tuple[bytes, ...] = ()

    def closed(self, conn: Connection) -> None:
        """The link broke."""
        self.app.link_lost(self.nid, conn)

    def notify_features(self, conn: Connection, features: Sequence[bytes]) -> None:
        """What it offers beyond protocol 5."""
        self.features = tuple(features)

    def notify_deadlock(self, conn: Connection, ttid: bytes, oid: bytes) -> None:
        """An older transaction waits for a lock of ours."""
        txn = self.app.transactions.get(ttid)
        if txn is not None:
            txn.deadlock(conn, self.nid, oid)


def offers(conn: Connection, feature: bytes) -> bool:
    """Whether a storage or the master named a feature beyond protocol 5."""
    handler = conn.handler
    return (
        isinstance(handler, StorageHandler | MasterHandler)
        and feature in handler.features
    )


class ClientApp:
    """See the module. `db` is what ZODB registered: invalidate, invalidateCache."""

    # Told when a connection to a storage gets its first, loses its last transaction:
    # it may get unasked packets in between.
    watch: Callable[[Connection, bool], object] = staticmethod(lambda conn, on: None)
    # `pack()` returns when the pack is completed. Source: operations.md 12.3.
    wait_for_pack = False

    def __init__(self, runtime: ClientRuntime, options: ClientOptions) -> None:
        self.runtime = runtime
        self.log = runtime.log
        self.options = options
        self.nm = NodeManager(options.save_masters)
        for address in options.masters:
            self.nm.add(NodeType.MASTER, None, address)
        self.pt = PartitionTable()
        self.cache = ClientCache(options.cache_size)
        self.informations = Informations()
        self.db: Any = None
        self.nid: int | None = None
        self.last_tid: bytes | None = None
        self.master: Connection | None = None
        self.session = 0
        self.synchronised = False
        self.ready = False
        self.closed = False
        # The database went back in time so many times.
        self.truncations = 0
        self.links: dict[int, Connection] = {}
        # Monotonic times: of the last failed attempt to connect; of the last failure.
        self.unreachable: dict[int, float] = {}
        self.failures: dict[int, float] = {}
        self.reasons: dict[int, str] = {}  # of these failures, for messages
        self.loads: dict[bytes, Load] = {}
        self.transactions: dict[bytes, Transaction] = {}  # by ttid
        # AskFinalTID waits at the master: nothing else may be sent there.
        self.exclusive = False
        self._aborts: list[tuple[bytes, Sequence[int]]] = []  # to be told then
        self.ahead = Ahead(self)
        self.turns = Turns(runtime)
        self._oids: deque[bytes] = deque()
        # Ranges, both ends included: of oids that this session's master gave, and
        # former ones.
        self._given_oids: list[tuple[bytes, bytes]] = []
        self._former_oids: list[tuple[bytes, bytes]] = []
        self._oids_asked = False
        self._started = False
        self._refusal: tuple[int, str] | None = None
        self._count: tuple[bytes, int] | None = None
        self._search = Search(self)

    # --- master -----------------------------------------------------------------------

    def identity(self) -> Identity:
        """Arguments of RequestIdentification to a master."""
        extra: dict[bytes, Any] = {FEATURES: [FEATURE_IMPORT]}
        if self.options.read_only:
            extra[b"read_only"] = True
        cluster = self.options.cluster.encode()
        return NodeType.CLIENT, self.nid, None, cluster, None, extra

    def master_accepted(self, conn: Connection, nid: int) -> None:
        """A session begins."""
        self.nid = nid
        self.log.set_node(self.options.cluster, nid)
        self.session += 1
        self.master = conn
        conn.handler = MasterHandler(self)
        limits = self.options.limits
        conn.watch_silence(
            limits.ping_after, limits.silence_limit, unless=lambda: self.exclusive
        )
        conn.ask(AskLastTransaction).then(self._synchronise)

    def master_refused(self, code: int, text: str) -> None:
        """A master does not want us: now, or never."""
        if code in (ErrorCode.PROTOCOL_ERROR, ErrorCode.READ_ONLY_ACCESS):
            self._search.stop()
            self._refusal = code, text

    def _synchronise(self, tid: bytes) -> None:
        """Compare with what we knew. Source: behaviour.md 9.4, rule 3."""
        previous = self.last_tid
        self.informations.clear()
        if previous is not None and tid != previous:
            if tid < previous:
                self.truncations += 1
                self.cache.clear()
            else:
                self.cache.clear_current()
            if self.db is not None:
                self.db.invalidateCache()
        self.last_tid = tid
        self.synchronised = True
        self.check_ready()

    def check_ready(self) -> None:
        """The session can be used once the table is operational."""
        if (
            self.synchronised
            and not self.ready
            and self.pt.operational(running := self.nm.running())
        ):
            self.ready = True
            self._search.reasons.clear()
            for nid in self.pt.nids():
                if nid in running:
                    self._link(nid)

    def master_lost(self, conn: Connection) -> None:
        """The session ends; search the primary again, unasked."""
        node = conn.node
        if node is not None and node.connection is conn:
            node.connection = None
        if conn is not self.master:
            return
        self.master = None
        self.synchronised = self.ready = self.exclusive = False
        self.ahead.forget()
        self._aborts.clear()
        self._oids.clear()
        self._oids_asked = False
        self._former_oids = (self._former_oids + self._given_oids)[-RANGES_MAX:]
        self._given_oids.clear()
        for link in list(self.links.values()):
            link.close("the primary master is lost")
            # No failure of the storage: nothing to space.
            self.runtime.connection_succeeded(link.address)
        self.unreachable.clear()
        if not self.closed:
            self.log.info("%s lost: %s", conn, conn.reason)
            self._search.start()

    def check_open(self) -> None:
        """Raise NEOStorageError after `close()`."""
        if self.closed:
            raise NEOStorageError("the storage is closed")

    def connect(self) -> None:
        """Return once the cluster can be used.

        Raises NEOStorageError if it refuses us, or after `connect_timeout`,
        ReadOnlyError if only read-only clients are accepted.
        """
        if self.ready and not self.closed:
            return
        self.check_open()
        start = self.runtime.monotonic()
        limit = self.options.connect_timeout
        warn_at = WARN_AFTER
        while not self.ready:
            self.check_open()
            if self.master is None and not self._search.searching:
                self._refusal = None
                self._search.start()
            waited = self.runtime.monotonic() - start
            if limit is not None and waited >= limit:
                raise NEOStorageTransientError(
                    f"no connection to cluster {self.options.cluster!r} within "
                    f"{limit:g} s: {self._explain()}"
                )
            if waited >= warn_at:
                warn_at = waited + WARN_AGAIN
                self.log.throttled(
                    "unreachable",
                    30,
                    "cluster %r could not be reached for %.0f s: %s",
                    self.options.cluster,
                    waited,
                    self._explain(),
                )
            timeout = warn_at - waited
            if limit is not None:
                timeout = min(timeout, limit - waited)
            self.runtime.wait(
                lambda: self.ready or self.closed or self._refusal, (), timeout
            )
            if self._refusal is not None and not self.ready:
                self._raise_refusal()

    def _explain(self) -> str:
        if self.master is not None:
            return "the master answers, but not all partitions are available"
        return self._search.describe() or "no master is known"

    def _raise_refusal(self) -> None:
        assert self._refusal is not None
        code, text = self._refusal
        self._refusal = None
        if code == ErrorCode.READ_ONLY_ACCESS:
            raise read_only_error(text)
        raise NEOStorageError(f"protocol error: {text}")

    def usable_master(self) -> Connection:
        """The master's connection, when a request may be sent there."""
        self.connect()
        while self.exclusive:
            limit = self.options.connect_timeout
            if not self.runtime.wait(
                lambda: not self.exclusive or self.closed, (), limit
            ):
                raise NEOStorageTransientError(
                    f"the master does not tell within {limit:g} s what became of a "
                    "transaction"
                )
            self.connect()
        assert self.master is not None
        return self.master

    def ask_master(self, packet: Packet[...], *args: Any) -> Answer:
        """Ask the primary, and wait for the answer."""
        return self.ask(self.usable_master(), packet, *args)

    def ask(self, conn: Connection, packet: Packet[...], *args: Any) -> Answer:
        """Ask a node, and wait for the answer."""
        answer = Answer()
        conn.ask(packet, *args).then(answer.set, answer.fail)
        self.runtime.wait(lambda: answer.done, (conn,))
        return answer

    def sync(self) -> None:
        """All that was committed before is visible after."""
        self.check_open()
        while True:
            session = self.session
            self.connect()
            if self.session != session:
                return  # synchronised right now
            if self.ask_master(Ping).value is not None:
                return
            # Lost instead of answered: what was committed meanwhile is not known.

    def new_oid(self) -> bytes:
        """An oid that nobody else gets. Source: behaviour.md 9.6."""
        self.connect()
        while not self._oids:
            self._ask_oids()
            self._wait_oids(self.session)
            self.connect()
        oid = self._oids.popleft()
        if len(self._oids) == OIDS_LOW:
            self._ask_oids()
        return oid

    def _wait_oids(self, session: int) -> None:
        self.runtime.wait(
            lambda: self._oids or not self._oids_asked or self.session != session,
            () if self.master is None else (self.master,),
        )

    def _ask_oids(self) -> None:
        if self._oids_asked or self.exclusive or self.master is None:
            if self.exclusive:
                self.usable_master()
            return
        self._oids_asked = True

        def done(oids: Sequence[bytes]) -> None:
            self._oids_asked = False
            given = self._given_oids
            if given and oids and add64(given[-1][1], 1) == oids[0]:
                given[-1] = given[-1][0], oids[-1]
            elif oids:
                given.append((oids[0], oids[-1]))
            if self._former_oids:
                oids = [oid for oid in oids if not self.is_former(oid)]
            self._oids.extend(oids)

        def failed(code: int | None, text: str) -> None:
            self._oids_asked = False

        self.master.ask(AskNewOIDs, OIDS_BLOCK).then(done, failed)

    def is_former(self, oid: bytes) -> bool:
        """Whether a former primary gave this oid, which its successor gives again,
        maybe to somebody else: it knows those that are committed only.
        """
        return any(first <= oid <= last for first, last in self._former_oids)

    def final_tid(self, ttid: bytes, timeout: float | None) -> bytes | None:
        """What the master says of an unfinished transaction; Refusal or LookupError
        (the connection was lost again, or there is no answer in `timeout` seconds).
        """
        conn = self.usable_master()
        session = self.session
        self.exclusive = True
        answer = Answer()

        def over() -> None:
            # Even if nobody waits for the answer any more, it is on its way.
            if self.session == session and self.master is not None:
                self.exclusive = False
                self._send_aborts()

        def done(tid: bytes | None) -> None:
            answer.set(tid)
            over()

        def failed(code: int | None, text: str) -> None:
            answer.fail(code, text)
            over()

        conn.ask(AskFinalTID, ttid).then(done, failed)
        self.runtime.wait(lambda: answer.done, (conn,), timeout)
        if answer.value is None:
            if answer.code is None:
                raise LookupError(ttid)
            raise Refusal(answer.code, answer.text)
        tid: bytes | None = answer.value[0]
        return tid

    def abort(self, ttid: bytes, nids: Sequence[int]) -> None:
        """Tell the master, now or as soon as it may be told something."""
        self._aborts.append((ttid, nids))
        if not self.exclusive:
            self._send_aborts()

    def _send_aborts(self) -> None:
        aborts, self._aborts = self._aborts, []
        assert self.master is not None
        for ttid, nids in aborts:
            self.master.notify(AbortTransaction, ttid, nids)

    # --- storages ---------------------------------------------------------------------

    def _link(self, nid: int) -> Connection | None:
        """The connection to a storage, perhaps not established yet."""
        conn = self.links.get(nid)
        if conn is None:
            node = self.nm.by_nid(nid)
            if (
                node is None
                or node.state is not NodeState.RUNNING
                or node.address is None
                or self.closed
            ):
                return None
            conn = self.runtime.connect(node.address, StorageIdentification(self, nid))
            self.links[nid] = conn
            started = conn

            def timeout() -> None:
                if started.node is None:
                    started.close("no answer to the identification")

            self.runtime.call_later(self.options.limits.storage_timeout, timeout)
        return conn

    def link_lost(self, nid: int, conn: Connection) -> None:
        """A connection to a storage is no more."""
        if self.links.get(nid) is conn:
            del self.links[nid]
        node = conn.node
        if node is not None and node.connection is conn:
            node.connection = None
        if self.master is not None:
            self.failures[nid] = self.runtime.monotonic()
            self.reasons[nid] = conn.reason
            self.log.info("storage %s lost: %s", nid_str(nid), conn.reason)

    def close_link(self, node: Node) -> None:
        """The master says that a node is not running."""
        if node.type is NodeType.STORAGE and node.nid in self.links:
            self.links[node.nid].close("the master says that it is down")

    def open_links(
        self, nids: Iterable[int], *, quick: bool = False
    ) -> dict[int, Connection | None]:
        """Connections to storages, opened in parallel; None for those that failed.

        `quick`: what failed within the last second is not tried again.
        """
        nids = list(nids)
        now = self.runtime.monotonic()
        opening = []
        for nid in nids:
            if (
                quick
                and nid not in self.links
                and now - self.unreachable.get(nid, -RECONNECTION_DELAY)
                < RECONNECTION_DELAY
            ):
                continue
            conn = self._link(nid)
            if conn is not None and conn.node is None:
                opening.append(conn)
        if opening:
            self.runtime.wait(
                lambda: all(c.closed or c.node is not None for c in opening), opening
            )
        return self.opened_links(nids)

    def opened_links(self, nids: Iterable[int]) -> dict[int, Connection | None]:
        """Connections to storages that are established now, else None."""
        result: dict[int, Connection | None] = {}
        for nid in nids:
            conn = self.links.get(nid)
            result[nid] = None if conn is None or conn.node is None else conn
        return result

    def _order(self, partition: int) -> Sequence[int]:
        """Cells to read, best first. Source: behaviour.md 9.3."""
        nids = self.pt.readable[partition]
        if len(nids) < 2:
            return nids
        shuffled = list(nids)
        self.runtime.rng.shuffle(shuffled)
        failures = self.failures
        if failures:
            horizon = self.runtime.monotonic() - FAILURE_MEMORY
            shuffled.sort(key=lambda nid: max(failures.get(nid, horizon), horizon))
        return shuffled

    def _read_link(self, nid: int) -> Connection | None:
        conn = self.links.get(nid)
        if conn is not None and conn.node is not None:
            return conn
        return self.open_links((nid,))[nid]

    def read(
        self,
        key: bytes,
        packet: Packet[...],
        *args: Any,
        accept: Callable[[tuple[Any, ...]], bool] | None = None,
        avoid: Iterable[int] = (),
        load: Load | None = None,
    ) -> tuple[Any, ...]:
        """Ask a readable cell of the partition of `key` (an oid or tid), others if it
        fails or its answer is not accepted. Goes on after a loss of the master.

        Raises Refusal, NEOStorageTransientError if no storage is available.
        """
        wait = self.runtime.wait
        give_up = 0.0
        while True:
            self.connect()
            session = self.session
            failures = rejected = 0
            refusal: Refusal | None = None
            while self.session == session and self.ready:
                partition = self.pt.partition_of(key)
                readable = self._order(partition)
                for nid in readable:
                    if nid in avoid:
                        failures += 1
                        continue
                    conn = self._read_link(nid)
                    if conn is None:
                        failures += 1
                        continue
                    if self.session != session:
                        break
                    if load is not None:
                        load.conn = conn
                    answer = Answer()
                    conn.ask(packet, *args).then(answer.set, answer.fail)
                    wait(lambda a=answer: a.done, (conn,))  # type: ignore[misc]
                    value = answer.value
                    if value is not None:
                        if accept is None or accept(value):
                            return value
                        failures += 1
                        rejected += 1
                    elif answer.code is None:
                        failures += 1
                    elif answer.code != ErrorCode.NON_READABLE_CELL:
                        # Rows may be missing on one replica.
                        refusal = Refusal(answer.code, answer.text)
                        if load is None or len(readable) == 1:
                            raise refusal
                    if self.session != session:
                        break
                if self.session != session or not self.ready:
                    break
                if refusal is not None:
                    raise refusal
                now = self.runtime.monotonic()
                give_up = give_up or now + self.options.limits.storage_timeout
                if failures > len(readable) and (rejected or now >= give_up):
                    raise NEOStorageTransientError(
                        f"no storage available for partition {partition}: "
                        + ", ".join(
                            f"{nid_str(nid)} ({self.reasons.get(nid, 'not running')})"
                            for nid in readable
                        )
                    )
                if failures:
                    wait(lambda: self.closed, (), READ_PAUSE)
                self.ask_master(Ping)  # table changes that are on their way arrive

    def read_many(
        self, requests: Iterable[Request], window: int = WINDOW
    ) -> Iterator[tuple[Any, ...] | Refusal]:
        """Answers in the order of the requests, of which up to `window` are in flight.

        More are sent when half of them are answered, not one by one.
        """
        source = iter(requests)
        flying: deque[tuple[Request, Answer, Connection | None]] = deque()
        self.connect()
        while True:
            if len(flying) <= window // 2:
                for request in islice(source, window - len(flying)):
                    flying.append((request, *self._send_read(request)))
            if not flying:
                return
            (key, packet, args), answer, conn = flying.popleft()
            if conn is not None and not answer.done:
                self.runtime.wait(lambda a=answer: a.done, (conn,))  # type: ignore[misc]
            if answer.value is not None:
                yield answer.value
            elif answer.code is None or answer.code == ErrorCode.NON_READABLE_CELL:
                try:
                    yield self.read(key, packet, *args)
                except Refusal as refusal:
                    yield refusal
            else:
                yield Refusal(answer.code, answer.text)

    def _send_read(self, request: Request) -> tuple[Answer, Connection | None]:
        key, packet, args = request
        answer = Answer()
        conn = None
        if self.ready:
            for nid in self._order(self.pt.partition_of(key)):
                conn = self.links.get(nid)
                if conn is not None and conn.node is not None:
                    conn.ask(packet, *args).then(answer.set, answer.fail)
                    return answer, conn
        answer.fail(None, "no connection")
        return answer, None

    # --- objects ----------------------------------------------------------------------

    def load(
        self, oid: bytes, before: bytes | None = None, at: bytes | None = None
    ) -> tuple[bytes, bytes, bytes | None]:
        """(data, serial, next serial) of the revision made at `at`, else of the last
        one before `before`, else of the last one.

        Nothing newer than the last invalidation is seen, unless asked by `at`. Raises
        NEOStorageNotFoundError: NEOStorageDoesNotExistError if there is no revision at
        all, NEOStorageCreationUndoneError if it has no data.
        """
        cache = self.cache
        truncations = self.truncations
        while True:
            self.check_open()
            if self.last_tid is None:
                self.connect()
            assert self.last_tid is not None
            bound = add64(self.last_tid, 1)
            if at is not None:
                entry = cache.load_exact(oid, at)
            else:
                if before is not None and before < bound:
                    bound = before
                entry = cache.load(oid, bound)
            if entry is not None:
                data, serial, end = entry
                if end is not None and end > self.last_tid:
                    end = None
                return data, serial, end
            if not self.ready:
                self.connect()
                if self.truncations != truncations:
                    raise NEOPrimaryMasterLost(oid=oid)
                continue
            other = self.loads.get(oid)
            if other is None:
                break
            conn = other.conn
            # With a timeout, because the other one may go on with another connection.
            self.runtime.wait(
                lambda o=other: self.loads.get(oid) is not o,  # type: ignore[misc]
                () if conn is None else (conn,),
                60,
            )
        load = self.loads[oid] = Load(self.session)
        try:
            return self._load(load, oid, None if at is not None else bound, at)
        finally:
            if self.loads.get(oid) is load:
                del self.loads[oid]
            if self.truncations != truncations and at is None:
                raise NEOPrimaryMasterLost(oid=oid)

    def _load(
        self, load: Load, oid: bytes, bound: bytes | None, at: bytes | None
    ) -> tuple[bytes, bytes, bytes | None]:
        wrong: list[tuple[Any, ...]] = []
        good: list[bytes] = []

        def accept(answer: tuple[Any, ...]) -> bool:
            _, serial, _, compression, checksum, data, _ = answer
            if compression is None:
                return True
            try:
                if len(data) < BIG:
                    good.append(unpack(compression, checksum, data))
                else:
                    job = partial(unpack, compression, checksum, data)
                    good.append(self.runtime.unlocked(job))
                return True
            except ValueError as error:
                text = str(error)
            self.log.error(
                "oid %s, tid %s: %s at storage %s",
                oid.hex(),
                serial.hex(),
                text,
                load.conn,
            )
            wrong.append(answer)
            if load.conn is not None and offers(load.conn, FEATURE_CHECK):
                load.conn.notify(NotifyDamaged, oid, serial)  # so it is repaired
            return False

        try:
            answer = self.read(oid, AskObject, oid, at, bound, accept=accept, load=load)
        except Refusal as refusal:
            raise not_found(oid, refusal) from None
        except NEOStorageTransientError:
            if not wrong:
                raise
            answer = wrong[0]
            if not self.options.ignore_wrong_checksum:
                raise NEOStorageWrongChecksum(oid, answer[1]) from None
            try:
                data = decompress(answer[3], answer[5])
            except ValueError:
                data = b""
            return data, answer[1], answer[2]
        serial, end = answer[1], answer[2]
        if not good:
            raise NEOStorageCreationUndoneError(oid, serial)
        data = good[0]
        end = self._loaded(load, oid, serial, end, data)
        if end is not None and self.last_tid is not None and end > self.last_tid:
            end = None
        return data, serial, end

    def _loaded(
        self, load: Load, oid: bytes, serial: bytes, end: bytes | None, data: bytes
    ) -> bytes | None:
        """Let a revision enter the cache; return its end. Source: behaviour.md 9.4."""
        if end is None:
            later = [tid for tid in load.invalidations if tid > serial]
            if later:
                end = min(later)
        if load.session == self.session and self.synchronised:
            self.cache.store(oid, data, serial, end)
        return end

    def prefetch(self, oids: Iterable[bytes], before: bytes) -> None:
        """Read objects into the cache; returns once all are asked."""
        self.connect()
        assert self.last_tid is not None
        before = min(before, add64(self.last_tid, 1))
        flying: set[int] = set()
        conns: dict[Connection, None] = {}
        number = 0
        for oid in oids:
            if len(flying) >= WINDOW:
                self.runtime.wait(lambda: len(flying) < WINDOW // 2, tuple(conns))
            if oid in self.loads or self.cache.load(oid, before) is not None:
                continue
            if not self.ready:
                return
            answer, conn = self._prefetch(oid, before)
            if conn is None:
                continue
            number += 1
            flying.add(number)
            conns[conn] = None
            answer.append(lambda n=number: flying.discard(n))  # type: ignore[misc]

    def _prefetch(
        self, oid: bytes, before: bytes
    ) -> tuple[list[Callable[[], object]], Connection | None]:
        load = Load(self.session)
        ended: list[Callable[[], object]] = []
        for nid in self._order(self.pt.partition_of(oid)):
            conn = self.links.get(nid)
            if conn is not None and conn.node is not None:
                break
        else:
            return ended, None

        def end() -> None:
            if self.loads.get(oid) is load:
                del self.loads[oid]
            for callback in ended:
                callback()

        def done(*answer: Any) -> None:
            _, serial, following, compression, checksum, data, _ = answer
            if compression is not None and sha1(data).digest() == checksum:
                try:
                    data = decompress(compression, data)
                except ValueError:  # a load will say it
                    pass
                else:
                    self._loaded(load, oid, serial, following, data)
            end()

        self.loads[oid] = load
        load.conn = conn
        conn.ask(AskObject, oid, None, before).then(done, lambda code, text: end())
        return ended, conn

    def record(self, oid: bytes, at: bytes) -> tuple[bytes | None, bytes | None]:
        """(data, data serial) of a revision; KeyError if there is none."""
        try:
            value = self.read(oid, AskObject, oid, at, None)
        except Refusal as refusal:
            raise KeyError(oid, at) from not_found(oid, refusal)
        return self.decode(value)

    def decode(self, answer: tuple[Any, ...]) -> tuple[bytes | None, bytes | None]:
        """(data, data serial) of an AnswerObject; damaged data are read elsewhere."""
        oid, serial, _, compression, checksum, data, data_serial = answer
        if compression is None or (not data and checksum == ZERO_HASH):
            return None, data_serial
        if sha1(data).digest() == checksum:
            try:
                return decompress(compression, data), data_serial
            except ValueError:
                pass
        return self._load(Load(-1), oid, None, serial)[0], data_serial

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
        """Objects have a new revision. Source: behaviour.md 9.4, rule 1."""
        self.invalidate_cache(tid, oids)
        if self.db is not None:
            self.db.invalidate(tid, oids)
        self.last_tid = tid

    def invalidate_cache(self, tid: bytes, oids: Iterable[bytes]) -> None:
        """The part of the cache and of loads in progress."""
        invalidate, loads = self.cache.invalidate, self.loads
        for oid in oids:
            invalidate(oid, tid)
            if oid in loads:
                loads[oid].invalidations.append(tid)

    def current_serial(self, oid: bytes) -> bytes | None:
        """Serial of the current revision, if it is in the cache."""
        if not self.synchronised or self.last_tid is None:
            return None
        entry = self.cache.load(oid, add64(self.last_tid, 1))
        return None if entry is None or entry[2] is not None else entry[1]

    # --- figures ----------------------------------------------------------------------

    def get_size(self) -> int | None:
        """Bytes used by the databases of the storages; None if one can't tell."""
        self.connect()
        links = self.open_links(self.pt.nids())
        size = 0
        for conn in links.values():
            if conn is None:
                continue
            if not offers(conn, FEATURE_SIZE):
                return None
            answer = self.ask(conn, AskSize)
            if answer.value is None:
                return None
            size += answer.value[0]
        return size

    def readable_nids(self) -> list[int]:
        """Storages that have something to read."""
        return self.pt.readable_nids()

    # --- end --------------------------------------------------------------------------

    def close(self) -> None:
        """Close all connections. `last_tid` keeps its value."""
        if self.closed:
            return
        self.closed = True
        self._search.stop()
        if self.master is not None:
            self.master.close("the storage is closed")
        for conn in list(self.links.values()):
            conn.close("the storage is closed")
        self.ready = False
        self.cache.clear()

    def check(self) -> None:
        """Assert what must hold between two events (used by the simulator)."""
        if self.ready:
            assert self.master is not None
            assert self.synchronised
        assert self.master is None or not self.master.closed
        for nid, conn in self.links.items():
            assert not conn.closed, (nid, conn)
        self.nm.check()
        self.pt.check()


def unpack(compression: int, checksum: bytes, data: bytes) -> bytes:
    """What was stored as `data`; ValueError if it is damaged."""
    if sha1(data).digest() != checksum:
        raise ValueError("wrong checksum")
    return decompress(compression, data)


def not_found(oid: bytes, refusal: Refusal) -> NEOStorageError:
    """What to raise for a refused AskObject."""
    if refusal.code == ErrorCode.OID_DOES_NOT_EXIST:
        return NEOStorageDoesNotExistError(oid)
    if refusal.code == ErrorCode.OID_NOT_FOUND:
        return NEOStorageNotFoundError(oid)
    return NEOStorageError(str(refusal))


def read_only_error(text: str) -> Exception:
    """ZODB's error for a write where none is possible."""
    from ZODB.POSException import ReadOnlyError

    return ReadOnlyError(text)  # type: ignore[no-any-return]
