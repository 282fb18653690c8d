"""The first phase of a commit: objects are stored, conflicts resolved.

A version is what one store (or check) sends to all cells of a partition. It is
*pending* until each of them answered, then *stored*. A conflict is queued with the
greatest tid reported; the application's thread takes it (`next_conflict`), resolves it
without the lock, and stores the result: a new version, whose answers alone count then.
A node whose connection broke, or that could not be reached, has failed for the whole
transaction, also if it comes back.

Source: behaviour.md 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from hashlib import sha1
from typing import Any

from ZODB import POSException

from neo.lib.compress import decompress
from neo.lib.connection import Connection
from neo.lib.node import nid_str
from neo.lib.protocol import (
    MAX_TID,
    MAX_TRANSACTION_OIDS,
    ZERO_HASH,
    ZERO_TID,
    AskBeginTransaction,
    AskCheckCurrentSerial,
    AskRelockObject,
    AskStoreObject,
    ErrorCode,
    Packet,
    Ping,
)

from .answers import Answer
from .app import ClientApp
from .exception import NEOStorageError, NEOStorageTransientError, NEOUndoPackError

Record = tuple[int, bytes, bytes]  # compression, checksum, data as stored
NO_DATA: Record = (0, ZERO_HASH, b"")

# After so many conflicts on one object, take its lock before resolving.
ATTEMPTS = 3
# An invalidation that is later than that is asked for (seconds).
LATE = 1.0
# Unanswered bytes that are always accepted before a store waits.
THROTTLE_MIN = 1 << 20


class Version:
    """What is being stored, or was, for one object.

    `data`: uncompressed; None for a deletion, a check, or when it was dropped.
    `deleted`: by deleteObject, so that nobody is told. `serial`: the base that was
    sent; `origin`: the revision that the data derive from, another one only if this is
    a placeholder that takes the lock. `record`: kept for what is imported,
    where conflicts mean that the base was not known.
    """

    __slots__ = (
        "awaiting",
        "checked",
        "data",
        "data_serial",
        "deleted",
        "oid",
        "origin",
        "record",
        "serial",
        "size",
    )

    def __init__(
        self,
        oid: bytes,
        serial: bytes,
        data: bytes | None,
        size: int,
        data_serial: bytes | None = None,
        *,
        checked: bool = False,
    ) -> None:
        self.oid = oid
        self.serial = self.origin = serial
        self.data = data
        self.size = size
        self.data_serial = data_serial
        self.checked = checked
        self.deleted = False
        self.record: Record | None = None
        self.awaiting: dict[int, None] = {}


class FirstPhase:
    """A transaction from its begin to its vote. For one thread at a time."""

    def __init__(self, app: ClientApp) -> None:
        self.app = app
        self._ttid: bytes | None = None  # not known as long as begin is not answered
        self._begun = Answer()
        self.session = 0
        self.voting = self.ended = False
        self.restored = False
        self.error: Exception | None = None
        # All objects in the order of their first store or check.
        self.oids: dict[bytes, Version] = {}
        self.pending: dict[bytes, Version] = {}
        self.pending_size = 0
        self.cached_size = 0
        self.keep_data = False  # for undo, which may need what was stored
        self.conflicts: dict[bytes, bytes] = {}
        self.locked: dict[bytes, Version] = {}  # placeholders that got their lock
        self.resolved: dict[bytes, bytes] = {}  # oid: last tid resolved
        self.attempts: dict[bytes, int] = {}
        self.relocking = 0
        self.conns: dict[int, Connection] = {}
        self.failed: dict[int, None] = {}
        self.written: dict[int, dict[int, None]] = {}  # partition: nids
        self.blind: dict[int, dict[int, None]] = {}  # partition: nids without lock

    # --- begin ------------------------------------------------------------------------

    @property
    def ttid(self) -> bytes:
        """Temporary id; waits for the master's answer to begin, if need be."""
        if self._ttid is None:
            self._wait_begun()
            assert self._ttid is not None
        return self._ttid

    def begin(self, tid: bytes | None = None) -> None:
        """Ask for a ttid, any or the one that is imposed (import).

        The answer is waited for if one is imposed, which may be refused; else by who
        needs it: the application has an object to serialise meanwhile.
        """
        if tid is None:
            master = self.app.usable_master()
            self.session = self.app.session
            ahead = self.app.ahead.take()
            answer = self._begun = ahead or Answer()
            if ahead is None:
                master.ask(AskBeginTransaction, None).then(answer.set, answer.fail)
        else:
            self.app.ahead.drop()
            self._begin(tid)

    def _wait_begun(self) -> None:
        answer = self._await_begun()
        if answer.lost:
            self.app.check_open()
            self._begin(None)  # nothing was done yet under the former master
        else:
            self._set_begun(answer)

    def _await_begun(self) -> Answer:
        answer, app = self._begun, self.app
        if not answer.done:
            connections = () if app.master is None else (app.master,)
            app.runtime.wait(lambda: answer.done, connections)
        return answer

    def _set_begun(self, answer: Answer) -> None:
        if answer.code == ErrorCode.READ_ONLY_ACCESS:
            raise POSException.ReadOnlyError(answer.text)
        if answer.value is None:
            raise NEOStorageError(f"cannot begin a transaction: {answer.text}")
        self._ttid = ttid = answer.value[0]
        self.app.transactions[ttid] = self

    def _begin(self, tid: bytes | None) -> None:
        app = self.app
        while True:
            master = app.usable_master()
            assert app.last_tid is not None
            if tid is not None and not app.last_tid < tid < MAX_TID:
                raise NEOStorageError(
                    f"tid {tid.hex()} is not greater than the last one, "
                    f"{app.last_tid.hex()}"
                )
            self.session = app.session
            answer = app.ask(master, AskBeginTransaction, tid)
            if not answer.lost:
                break
        self._set_begun(answer)

    def check_session(self) -> None:
        """Raise if the master that knows this transaction is lost."""
        app = self.app
        if self._ttid is None:
            self._wait_begun()
        app.check_open()
        if app.session != self.session or app.master is None:
            raise NEOStorageTransientError(
                "connection to the primary master lost: the transaction is aborted"
            )
        if self.error is not None:
            raise self.error

    # --- stores -----------------------------------------------------------------------

    def store(
        self,
        oid: bytes,
        serial: bytes,
        data: bytes | None,
        record: Record,
        data_serial: bytes | None = None,
        *,
        deleted: bool = False,
    ) -> None:
        """Send data (None: deletion) to all cells. Answers come later."""
        size = self._size(oid, record)
        if serial == ZERO_TID and self.app.oids.is_former(oid):
            raise NEOStorageTransientError(
                f"oid {oid.hex()} was given by a former primary master: perhaps it is "
                "somebody else's now"
            )
        version = Version(oid, serial, data, size, data_serial)
        version.deleted = deleted
        if not self.oids and self.app.turns.store(oid):
            newer = self.app.reader.current_serial(oid)
            if newer is not None and newer > serial:
                # The conflict is certain: why wait for somebody to say so?
                self.oids[oid] = self.pending[oid] = version
                self.pending_size += size
                self.conflicts[oid] = newer
                return
        self._store(version, record)
        self._throttle()

    def restore(
        self,
        oid: bytes,
        serial: bytes,
        record: Record,
        data_serial: bytes | None = None,
    ) -> None:
        """Send a revision that is imported; `serial` is the base if it is known, else
        zero: a conflict then tells it.
        """
        version = Version(oid, serial, None, self._size(oid, record), data_serial)
        version.record = record
        self.restored = True
        self._store(version, record)
        self._throttle()

    def _size(self, oid: bytes, record: Record) -> int:
        size = len(record[2])
        limit = self.app.options.object_size_max
        if size > limit:
            raise NEOStorageError(
                f"object {oid.hex()} takes {size} bytes, the limit is {limit}"
            )
        return size

    def _store(self, version: Version, record: Record, *, waiting: bool = True) -> None:
        compression, checksum, data = record
        args = (
            version.oid,
            version.serial,
            compression,
            checksum,
            data,
            version.data_serial,
            self._ttid or self.ttid,
        )
        self._send(version, AskStoreObject, args, waiting=waiting)

    def check_current(self, oid: bytes, serial: bytes) -> None:
        """Lock an object that must still have this revision."""
        known = self.oids.get(oid)
        if known is not None:
            # What is stored is checked anyway; a second check is not allowed.
            if known.origin != serial and known.serial != serial:
                raise POSException.ReadConflictError(
                    oid=oid, serials=(known.serial, serial)
                )
            return
        version = Version(oid, serial, None, 0, checked=True)
        self._send(version, AskCheckCurrentSerial, (self.ttid, oid, serial))

    def _send(
        self,
        version: Version,
        packet: Packet[...],
        args: tuple[Any, ...],
        *,
        waiting: bool = True,
    ) -> None:
        """Ask all cells of a partition. Called for each object that is stored."""
        assert not self.voting, "stored after the vote"
        oid, oids = version.oid, self.oids
        is_new = oid not in oids
        if is_new and len(oids) >= MAX_TRANSACTION_OIDS:
            raise NEOStorageError(
                f"a transaction has at most {MAX_TRANSACTION_OIDS} objects"
            )
        self.check_session()
        pt = self.app.pt
        partition = pt.partition_of(oid)
        nids = pt.cells[partition]
        conns, failed, pending = self.conns, self.failed, self.pending
        for nid in nids:
            if nid not in conns and nid not in failed:
                self._connect(nids, waiting=waiting)
                self.check_session()
                break
        if oid in pending:
            self.pending_size -= pending[oid].size
        elif not is_new:
            self._uncache(oid)
        oids[oid] = pending[oid] = version
        self.pending_size += version.size
        written = self.written.get(partition)
        if written is None:
            written = self.written[partition] = {}
        if failed:
            nids = tuple(nid for nid in nids if nid not in failed)
        # All are awaited before the first can answer (at once, if it is closed).
        version.awaiting = dict.fromkeys(nids)
        for nid in nids:
            written[nid] = None
            conns[nid].ask(packet, *args).then(
                partial(self._answered, version, nid, partition),
                partial(self._failed, version, nid),
            )
        if not nids:
            raise NEOStorageTransientError(
                f"no storage available for partition {partition}"
            )

    def _connect(self, nids: Iterable[int], *, waiting: bool = True) -> None:
        """Connect to storages; those that can't be have failed."""
        new = [nid for nid in nids if nid not in self.conns and nid not in self.failed]
        app = self.app
        conns = app.open_links(new, quick=True) if waiting else app.opened_links(new)
        for nid, conn in conns.items():
            if conn is None:
                self.failed[nid] = None
            else:
                self.conns[nid] = conn
                self.app.watch(conn, True)

    def _throttle(self) -> None:
        """Bound the memory used by unanswered data."""
        limit = max(self.app.options.cache_size, THROTTLE_MIN)
        if self.pending_size >= limit:
            self.app.runtime.wait(
                lambda: (
                    self.pending_size < limit or self._has_work() or not self.pending
                ),
                tuple(self.conns.values()),
            )

    def _answered(
        self, version: Version, nid: int, partition: int, conflict: bytes | None
    ) -> None:
        if self.ended:
            return
        current = self.pending.get(version.oid) is version
        if conflict is None:
            if current:
                self._received(version, nid)
        elif conflict == ZERO_TID:
            # For a version that was replaced, the answer says nothing of the new one.
            if current:
                self.blind.setdefault(partition, {})[nid] = None
                self._received(version, nid)
        else:
            if current:
                version.awaiting.pop(nid, None)
            self._conflict(version.oid, conflict)

    def _received(self, version: Version, nid: int) -> None:
        version.awaiting.pop(nid, None)
        if not version.awaiting and version.oid not in self.conflicts:
            self._complete(version)

    def _complete(self, version: Version) -> None:
        del self.pending[version.oid]
        self.pending_size -= version.size
        version.record = None
        if version.origin != version.serial:
            self.locked[version.oid] = version
        elif version.data is not None:
            size = len(version.data)
            if self.keep_data or self.cached_size + size < self.app.options.cache_size:
                self.cached_size += size
            else:
                version.data = None

    def _uncache(self, oid: bytes) -> None:
        version = self.oids.get(oid)
        if version is not None and version.data is not None:
            self.cached_size -= len(version.data)

    def _failed(self, version: Version, nid: int, code: int | None, text: str) -> None:
        if self.ended:
            return
        if code is None:
            self.node_failed(nid)
        elif code == ErrorCode.UNDO_PACK_ERROR:
            self.error = NEOUndoPackError(text or "what is undone was packed")
        elif code == ErrorCode.READ_ONLY_ACCESS:
            self.error = POSException.ReadOnlyError(text)
        else:
            self._refused(nid, code, text)
        if self.pending.get(version.oid) is version:
            self._received(version, nid)

    def _refused(self, nid: int, code: int, text: str) -> None:
        """A storage does not want the transaction."""
        if code == ErrorCode.INCOMPLETE_TRANSACTION:
            self.error = NEOStorageTransientError(f"{nid_str(nid)} aborted it: {text}")
        elif code == ErrorCode.PROTOCOL_ERROR:
            # Something was damaged on the way: the connection is closed.
            self.error = NEOStorageTransientError(f"{nid_str(nid)} refused it: {text}")
        else:
            self.error = NEOStorageError(f"storage {nid_str(nid)}: {text}")

    def node_failed(self, nid: int) -> None:
        """Nothing is expected from this node any more in this transaction."""
        self.failed[nid] = None

    # --- conflicts --------------------------------------------------------------------

    def _conflict(self, oid: bytes, tid: bytes) -> None:
        """Queue a conflict, unless it was resolved already (with another replica)."""
        if tid <= self.resolved.get(oid, ZERO_TID):
            return
        if tid > self.conflicts.get(oid, ZERO_TID):
            self.conflicts[oid] = tid
            version = self.pending[oid]
            if version.record is not None:
                self._retry_import(version)

    def _retry_import(self, version: Version) -> None:
        """The base of an imported revision was only guessed: now it is known."""
        oid, record = version.oid, version.record
        assert record is not None
        serial = self.conflicts.pop(oid)
        if serial >= self.ttid:
            self.error = POSException.ConflictError(
                oid=oid, serials=(serial, version.serial)
            )
            return
        self.resolved[oid] = serial
        new = Version(oid, serial, None, version.size, version.data_serial)
        new.record = record
        try:
            self._store(new, record, waiting=False)
        except NEOStorageError as error:
            self.error = error

    def deadlock(self, conn: Connection, nid: int, oid: bytes) -> None:
        """A storage asks to give a lock back. Source: behaviour.md 3.5."""
        if self.voting or self.ended or self.conns.get(nid) is not conn:
            return
        self.relocking += 1
        conn.ask(AskRelockObject, self.ttid, oid).then(
            partial(self._relocked, oid), partial(self._relock_failed, nid)
        )

    def _relock_failed(self, nid: int, code: int | None, text: str) -> None:
        self.relocking -= 1
        self.node_failed(nid)
        if code is not None:
            self._refused(nid, code, text)

    def _relocked(
        self, oid: bytes, result: tuple[bytes, bytes, Record | None] | None
    ) -> None:
        self.relocking -= 1
        if result is None or self.ended:
            return
        serial, conflict, record = result
        if conflict <= self.resolved.get(oid, ZERO_TID):
            return
        version = self.pending.get(oid)
        if version is None:
            # It was complete: it goes back to being stored, awaiting no node.
            version = self.oids.get(oid)
            if version is None:
                return
            self._uncache(oid)
            self.locked.pop(oid, None)
            if record is not None and version.data is None:
                compression, checksum, data = record
                if sha1(data).digest() != checksum:
                    self.error = NEOStorageError(f"wrong checksum of {oid.hex()}")
                    return
                try:
                    version.data = decompress(compression, data)
                except ValueError as error:
                    self.error = NEOStorageError(f"{oid.hex()}: {error}")
                    return
            if version.origin == version.serial:
                version.origin = serial
            version.serial = serial
            self.pending[oid] = version
            self.pending_size += version.size
        self._conflict(oid, conflict)

    def _has_work(self) -> bool:
        """Is there anything for the application's thread?"""
        return bool(self.conflicts or self.locked) or self.error is not None

    def next_conflict(self) -> tuple[Version, bytes] | None:
        """A version to resolve against the revision made at the tid, if any waits.

        `store_resolved` must follow, or `abort`. Raises ConflictError if nothing can
        be resolved.
        """
        app = self.app
        while self.conflicts:
            oid = next(iter(self.conflicts))
            tid = self.conflicts[oid]
            if app.last_tid is None or app.last_tid < tid:
                self._await_invalidation(tid)
            self.check_session()
            tid = self.conflicts.pop(oid)
            version = self.pending[oid]
            if version.checked:
                raise POSException.ReadConflictError(
                    oid=oid, serials=(tid, version.serial)
                )
            if version.data is None and version.data_serial is not None:
                version.data = self.reload(oid, version.data_serial)
            if version.data is None or version.origin == ZERO_TID:
                raise POSException.ConflictError(
                    oid=oid, serials=(tid, version.origin), data=version.data
                )
            self.resolved[oid] = tid
            attempts = self.attempts[oid] = self.attempts.get(oid, 0) + 1
            if attempts <= ATTEMPTS:
                return version, tid
            # Others are faster each time: take the lock first, with whatever data
            # (behaviour.md 12.1, D9).
            new = Version(oid, tid, version.data, len(version.data))
            new.origin = version.origin
            data = version.data
            self._store(new, (0, sha1(data).digest(), data))
        if self.locked:
            version = self.locked.pop(next(iter(self.locked)))
            return version, version.serial
        return None

    def _await_invalidation(self, tid: bytes) -> None:
        """A storage shows a transaction, so its invalidation is on its way to here."""
        app = self.app
        connections = () if app.master is None else (app.master,)
        if not app.runtime.wait(
            lambda: (
                app.session != self.session
                or app.master is None
                or (app.last_tid is not None and app.last_tid >= tid)
            ),
            connections,
            LATE,
        ):
            app.ask_master(Ping)

    def reload(self, oid: bytes, serial: bytes) -> bytes | None:
        """Data of a committed revision; None if it has none, or is gone."""
        try:
            return self.app.reader.record(oid, serial)[0]
        except KeyError:
            return None

    def store_resolved(
        self, oid: bytes, tid: bytes, data: bytes, record: Record
    ) -> None:
        """Store what a conflict with the revision of `tid` was resolved to."""
        self._store(Version(oid, tid, data, len(record[2])), record)
        self._throttle()

    def wait_stores(self) -> bool:
        """Wait until all is answered; false if there is something to resolve before."""
        self.check_session()
        app = self.app
        # Those that will hold the metadata; so vote() needs not wait.
        self._connect(app.pt.cells[app.pt.partition_of(self.ttid)])
        app.runtime.wait(
            lambda: self._has_work() or not (self.pending or self.relocking),
            tuple(self.conns.values()),
        )
        self.check_session()
        return not self._has_work()

    def resolved_oids(self) -> list[bytes]:
        """Objects whose data are not what the application stored."""
        return [] if self.restored else list(self.resolved)
