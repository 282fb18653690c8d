"""Reads of a client: which cell is asked, who is asked when it fails, and what enters
the cache.

Order which makes snapshots right (behaviour.md 9.4): a load is registered before its
bound is computed; an invalidation marks the cache and the registered loads, then tells
ZODB, then raises `last_tid` (ClientApp.invalidate); the end of a loaded revision is
computed when it enters the cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha1
from itertools import islice
from typing import TYPE_CHECKING, Any

from neo.lib.compress import decompress
from neo.lib.connection import Connection
from neo.lib.node import nid_str
from neo.lib.protocol import (
    FEATURE_CHECK,
    ZERO_HASH,
    ZERO_TID,
    AskObject,
    ErrorCode,
    NotifyDamaged,
    Packet,
    Ping,
)
from neo.lib.util import add64

from .answers import Answer, Refusal
from .exception import (
    NEOPrimaryMasterLost,
    NEOStorageCreationUndoneError,
    NEOStorageDoesNotExistError,
    NEOStorageError,
    NEOStorageNotFoundError,
    NEOStorageTransientError,
    NEOStorageWrongChecksum,
)
from .handlers import offers
from .objects import TOGETHER, Wanted, ask_objects

if TYPE_CHECKING:
    from .app import ClientApp

# A storage that failed is asked last for so long.
FAILURE_MEMORY = 600.0
# Reads that are sent before the first answer is awaited.
WINDOW = 128
# Between two rounds over the storages that have an object, when all failed.
READ_PAUSE = 0.05
# Data that are worth to be decompressed while other threads use the client (bytes).
BIG = 1 << 16
WRONG_CHECKSUM = "wrong checksum"


class Load:
    """A read in progress of one object, for itself and whoever wants the same."""

    __slots__ = ("conn", "invalidations", "session")

    def __init__(self, session: int) -> None:
        self.session = session
        self.invalidations: list[bytes] = []
        self.conn: Connection | None = None


class Prefetch(Load):
    """The read of an object that nobody waits for yet."""

    __slots__ = ("_flying", "_oid", "_reader")

    def __init__(self, reader: Reader, oid: bytes, flying: set[Prefetch]) -> None:
        super().__init__(reader.app.session)
        self._reader = reader
        self._oid = oid
        self._flying = flying
        flying.add(self)

    def set(
        self,
        oid: bytes,
        serial: bytes,
        following: bytes | None,
        compression: int | None,
        checksum: bytes,
        data: bytes,
        data_serial: bytes | None,
    ) -> None:
        """See `objects.Target`. What is damaged is left to a load, which says so."""
        if compression is not None and sha1(data).digest() == checksum:
            try:
                data = decompress(compression, data)
            except ValueError:
                pass
            else:
                self._reader.loaded(self, oid, serial, following, data)
        self.fail(None, "")

    def fail(self, code: int | None, text: str) -> None:
        """See `objects.Target`."""
        self._flying.discard(self)
        loads = self._reader.loads
        if loads.get(self._oid) is self:
            del loads[self._oid]


Request = tuple[bytes, Packet[...], tuple[Any, ...]]  # (oid or tid, packet, arguments)
Flying = tuple[Request, Answer, Connection | None]


def _ask_all(objects: dict[Connection, list[Wanted]]) -> None:
    for conn, wanted in objects.items():
        ask_objects(conn, wanted)
    objects.clear()


class Reader:
    """Reads for one client; the lock of the Runtime is held."""

    def __init__(self, app: ClientApp) -> None:
        self.app = app
        self.loads: dict[bytes, Load] = {}
        self._last_tid, self._bound = ZERO_TID, ZERO_TID  # the one after the other

    def _order(self, partition: int) -> Sequence[int]:
        """Cells to read, best first. Source: behaviour.md 9.3."""
        app = self.app
        nids = app.pt.readable[partition]
        if len(nids) < 2:
            return nids
        shuffled = list(nids)
        app.runtime.rng.shuffle(shuffled)
        failures = app.failures
        if failures:
            horizon = app.runtime.monotonic() - FAILURE_MEMORY
            shuffled.sort(key=lambda nid: max(failures.get(nid, horizon), horizon))
        return shuffled

    def _read_link(self, nid: int) -> Connection | None:
        app = self.app
        conn = app.links.get(nid)
        if conn is not None and conn.node is not None:
            return conn
        return app.open_links((nid,))[nid]

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
        app = self.app
        wait = app.runtime.wait
        give_up = 0.0
        while True:
            app.connect()
            session = app.session
            failures = rejected = 0
            refusal: Refusal | None = None
            while app.session == session and app.ready:
                partition = app.pt.partition_of(key)
                readable = self._order(partition)
                for nid in readable:
                    if nid in avoid:
                        failures += 1
                        continue
                    conn = self._read_link(nid)
                    if conn is None:
                        failures += 1
                        continue
                    if app.session != session:
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
                    if app.session != session:
                        break
                if app.session != session or not app.ready:
                    break
                if refusal is not None:
                    raise refusal
                now = app.runtime.monotonic()
                give_up = give_up or now + app.options.limits.storage_timeout
                # Each was asked twice: data may have been damaged on their way.
                if rejected > len(readable) or (
                    failures > len(readable) and now >= give_up
                ):
                    raise NEOStorageTransientError(
                        f"no storage available for partition {partition}: "
                        + ", ".join(
                            f"{nid_str(nid)} ({app.reasons.get(nid, 'not running')})"
                            for nid in readable
                        )
                    )
                if failures:
                    wait(lambda: app.closed, (), READ_PAUSE)
                app.ask_master(Ping)  # table changes that are on their way arrive

    def read_many(
        self, requests: Iterable[Request], window: int = WINDOW
    ) -> Iterator[tuple[Any, ...] | Refusal]:
        """Answers in the order of the requests, of which up to `window` are in flight.

        More are sent when half of them are answered, not one by one.
        """
        app = self.app
        source = iter(requests)
        flying: deque[Flying] = deque()
        app.connect()
        while True:
            if len(flying) <= window // 2:
                flying.extend(self._send(islice(source, window - len(flying))))
            if not flying:
                return
            (key, packet, args), answer, conn = flying.popleft()
            if conn is not None and not answer.done:
                app.runtime.wait(lambda a=answer: a.done, (conn,))  # type: ignore[misc]
            if answer.value is not None:
                yield answer.value
            elif answer.code is None or answer.code == ErrorCode.NON_READABLE_CELL:
                try:
                    yield self.read(key, packet, *args)
                except Refusal as refusal:
                    yield refusal
            else:
                yield Refusal(answer.code, answer.text)

    def _send(self, requests: Iterable[Request]) -> list[Flying]:
        app = self.app
        sent: list[Flying] = []
        objects: dict[Connection, list[Wanted]] = {}
        for request in requests:
            key, packet, args = request
            answer = Answer()
            conn = self._open_link(key) if app.ready else None
            if conn is None:
                answer.fail(None, "no connection")
            elif packet is AskObject:
                objects.setdefault(conn, []).append((*args, answer))
            else:
                conn.ask(packet, *args).then(answer.set, answer.fail)
            sent.append((request, answer, conn))
        _ask_all(objects)
        return sent

    # --- objects ----------------------------------------------------------------------

    def cached(
        self, oid: bytes, before: bytes
    ) -> tuple[bytes, bytes, bytes | None] | None:
        """What `load` returns, if it is in the cache; else None, without a reason."""
        app = self.app
        last_tid = app.last_tid
        if last_tid is None or app.closed:
            return None
        if before > last_tid:
            if self._last_tid is not last_tid:
                self._last_tid, self._bound = last_tid, add64(last_tid, 1)
            before = self._bound
        cache = app.cache
        entry = cache.load(oid, before)
        if entry is None:
            cache.loads -= 1  # `load` will count it
        elif (end := entry[2]) is not None and end > last_tid:
            return entry[0], entry[1], None
        return entry

    def load(
        self, oid: bytes, before: bytes | None = None, at: bytes | None = None
    ) -> tuple[bytes, bytes, bytes | None]:
        """(data, serial, next serial) of the revision made at `at`, else of the last
        one before `before`, else of the last one.

        Nothing newer than the last invalidation is seen, unless asked by `at`. Raises
        NEOStorageNotFoundError: NEOStorageDoesNotExistError if there is no revision at
        all, NEOStorageCreationUndoneError if it has no data.
        """
        app = self.app
        cache = app.cache
        truncations = app.truncations
        while True:
            app.check_open()
            if app.last_tid is None:
                app.connect()
            assert app.last_tid is not None
            bound = add64(app.last_tid, 1)
            if at is not None:
                entry = cache.load_exact(oid, at)
            else:
                if before is not None and before < bound:
                    bound = before
                entry = cache.load(oid, bound)
            if entry is not None:
                data, serial, end = entry
                if end is not None and end > app.last_tid:
                    end = None
                return data, serial, end
            if not app.ready:
                app.connect()
                if app.truncations != truncations:
                    raise NEOPrimaryMasterLost(oid=oid)
                continue
            other = self.loads.get(oid)
            if other is None:
                break
            conn = other.conn
            # With a timeout, if the other one may go on with another connection.
            app.runtime.wait(
                lambda o=other: self.loads.get(oid) is not o,  # type: ignore[misc]
                () if conn is None else (conn,),
                None if isinstance(other, Prefetch) else 60,
            )
        load = self.loads[oid] = Load(app.session)
        try:
            return self._load(load, oid, None if at is not None else bound, at)
        finally:
            if self.loads.get(oid) is load:
                del self.loads[oid]
            if app.truncations != truncations and at is None:
                raise NEOPrimaryMasterLost(oid=oid)

    def _load(
        self, load: Load, oid: bytes, bound: bytes | None, at: bytes | None
    ) -> tuple[bytes, bytes, bytes | None]:
        app = self.app
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
                    assert load.conn is not None
                    if load.conn.sha1_of(data) != checksum:
                        raise ValueError(WRONG_CHECKSUM)
                    job = partial(decompress, compression, data)
                    good.append(app.runtime.unlocked(job))
                return True
            except ValueError as error:
                text = str(error)
            app.log.error(
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
            if not app.options.ignore_wrong_checksum:
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
        end = self.loaded(load, oid, serial, end, data)
        if end is not None and app.last_tid is not None and end > app.last_tid:
            end = None
        return data, serial, end

    def loaded(
        self, load: Load, oid: bytes, serial: bytes, end: bytes | None, data: bytes
    ) -> bytes | None:
        """Let a revision enter the cache; return its end. Source: behaviour.md 9.4."""
        app = self.app
        if end is None:
            later = [tid for tid in load.invalidations if tid > serial]
            if later:
                end = min(later)
        if load.session == app.session and app.synchronised:
            app.cache.store(oid, data, serial, end)
        return end

    def prefetch(self, oids: Iterable[bytes], before: bytes) -> None:
        """Read objects into the cache; returns once all are asked."""
        app, loads = self.app, self.loads
        app.connect()
        assert app.last_tid is not None
        before = min(before, add64(app.last_tid, 1))
        flying: set[Prefetch] = set()
        asking: dict[Connection, list[Wanted]] = {}
        try:
            for oid in oids:
                if len(flying) >= WINDOW:
                    _ask_all(asking)
                    conns = {load.conn: None for load in flying if load.conn}
                    app.runtime.wait(lambda: len(flying) < WINDOW // 2, tuple(conns))
                if oid in loads or app.cache.load(oid, before) is not None:
                    continue
                if not app.ready:
                    return
                conn = self._open_link(oid)
                if conn is None:
                    continue
                load = loads[oid] = Prefetch(self, oid, flying)
                load.conn = conn
                wanted = asking.setdefault(conn, [])
                wanted.append((oid, None, before, load))
                if len(wanted) == TOGETHER:
                    ask_objects(conn, asking.pop(conn))
        finally:
            _ask_all(asking)

    def _open_link(self, key: bytes) -> Connection | None:
        """The connection, if there is one, to a readable cell of a partition."""
        app = self.app
        for nid in self._order(app.pt.partition_of(key)):
            conn = app.links.get(nid)
            if conn is not None and conn.node is not None:
                return conn
        return None

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
        """The part of the cache and of loads in progress."""
        app = self.app
        invalidate, loads = app.cache.invalidate, self.loads
        for oid in oids:
            invalidate(oid, tid)
            if oid in loads:
                loads[oid].invalidations.append(tid)

    def current_serial(self, oid: bytes) -> bytes | None:
        """Serial of the current revision, if it is in the cache."""
        app = self.app
        if not app.synchronised or app.last_tid is None:
            return None
        entry = app.cache.load(oid, add64(app.last_tid, 1))
        return None if entry is None or entry[2] is not None else entry[1]


def unpack(compression: int, checksum: bytes, data: bytes) -> bytes:
    """What was stored as `data`; ValueError if it is damaged."""
    if sha1(data).digest() != checksum:
        raise ValueError(WRONG_CHECKSUM)
    return decompress(compression, data)


def not_found(oid: bytes, refusal: Refusal) -> NEOStorageError:
    """What to raise for a refused AskObject."""
    if refusal.code == ErrorCode.OID_DOES_NOT_EXIST:
        return NEOStorageDoesNotExistError(oid)
    if refusal.code == ErrorCode.OID_NOT_FOUND:
        return NEOStorageNotFoundError(oid)
    return NEOStorageError(str(refusal))
