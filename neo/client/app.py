"""Core of a client: the session with the primary master, connections to storages.

Knows no thread, socket or clock: it blocks in `runtime.wait()` alone. The caller holds
the lock of the Runtime (neo/client/shell.py) whenever it calls a method here, and
`wait()` releases it (so does `unlocked()`). Packets are handled under the same lock.

States of a client: searching (Bootstrap), synchronising (accepted, AskLastTransaction
sent), ready. `session` counts the masters' acceptances. Losing the master ends the
session: connections to storages are closed with it, because the master may give our nid
to somebody else, and nothing is read or written under the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from neo.lib.bootstrap import Bootstrap, Identity
from neo.lib.config import Limits
from neo.lib.connection import Connection
from neo.lib.node import Node, NodeManager, nid_str
from neo.lib.protocol import (
    FEATURE_IMPORT,
    FEATURE_SIZE,
    FEATURES,
    AbortTransaction,
    AskFinalTID,
    AskLastTransaction,
    AskSize,
    ErrorCode,
    NodeState,
    NodeType,
    Packet,
    Ping,
)
from neo.lib.pt import PartitionTable
from neo.lib.runtime import RECONNECTION_DELAY, ClientRuntime
from neo.lib.util import Address, format_address

from .ahead import Ahead
from .answers import Answer, Refusal
from .cache import ClientCache
from .exception import NEOStorageError, NEOStorageTransientError
from .handlers import MasterHandler, StorageIdentification, offers
from .metadata import Informations
from .oids import Oids
from .reader import Reader
from .turns import Turns

if TYPE_CHECKING:
    from .first_phase import FirstPhase

CACHE_SIZE = 20 << 20
OBJECT_SIZE_MAX = 60 << 20  # neoppod's storages exit above 64 MiB
# A storage that does not answer to the vote for so long, when others did, has failed.
VOTE_TIMEOUT = 15.0
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
        self.transactions: dict[bytes, FirstPhase] = {}  # by ttid
        # AskFinalTID waits at the master: nothing else may be sent there.
        self.exclusive = False
        self._aborts: list[tuple[bytes, Sequence[int]]] = []  # to be told then
        self.ahead = Ahead(self)
        self.turns = Turns(runtime)
        self.reader = Reader(self)
        self.oids = Oids(self)
        self._refusal: tuple[int, str] | None = None
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
        self.oids.master_lost()
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

    # --- objects ----------------------------------------------------------------------

    def invalidate(self, tid: bytes, oids: Iterable[bytes]) -> None:
        """Objects have a new revision. Source: behaviour.md 9.4, rule 1."""
        self.reader.invalidate(tid, oids)
        if self.db is not None:
            self.db.invalidate(tid, oids)
        self.last_tid = tid

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


def read_only_error(text: str) -> Exception:
    """ZODB's error for a write where none is possible."""
    from ZODB.POSException import ReadOnlyError

    return ReadOnlyError(text)  # type: ignore[no-any-return]
