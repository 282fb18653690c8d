"""The storage that ZODB uses: its interfaces around the core (`app.py`).

Each method takes the lock of the Runtime, calls the core, and translates errors.
Compression, checksums and conflict resolution run without the lock, on the caller's own
values. Source: operations.md 11 to 13.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from os import getpid
from typing import Any

from BTrees.LLBTree import LLBTree
from ZODB import POSException, interfaces
from ZODB.BaseStorage import BaseStorage
from ZODB.ConflictResolution import ConflictResolvingStorage
from zope.interface import implementer

from neo.lib.compress import compress as compress_data
from neo.lib.compress import parse_option
from neo.lib.config import MasterList, check_tls, masters
from neo.lib.exception import ConfigurationError
from neo.lib.logger import Logger
from neo.lib.protocol import (
    MAX_TID,
    ZERO_OID,
    ZERO_TID,
)
from neo.lib.runtime import ClientRuntime
from neo.lib.tls import TLS
from neo.lib.util import Address, p64, tid_from_time, u64

from . import fork, shell, undo
from . import iterator as iteration
from .answers import Refusal
from .app import (
    CACHE_SIZE,
    OBJECT_SIZE_MAX,
    VOTE_TIMEOUT,
    ClientApp,
    ClientOptions,
)
from .exception import (
    NEOStorageDoesNotExistError,
    NEOStorageError,
    NEOStorageNotFoundError,
)
from .facade import AppFacade
from .first_phase import NO_DATA
from .importing import copy_transactions
from .metadata import Information, describe, encode_metadata
from .records import TransactionIterator
from .transactions import Transaction, begin

log = logging.getLogger(__name__)

_warned: set[str] = set()

Factory = Callable[[], ClientRuntime]


@implementer(
    interfaces.IStorage,
    interfaces.IStorageIteration,
    interfaces.IStorageUndoable,
    interfaces.IExternalGC,
    interfaces.ReadVerifyingStorage,
    interfaces.IStorageRestoreable,
    interfaces.IStorageCurrentRecordIteration,
    interfaces.IMultiCommitStorage,
    interfaces.IPrefetchStorage,
)
class Storage(BaseStorage, ConflictResolvingStorage, fork.Forkable):
    """A NEO cluster as a storage; any number of threads may use it.

    `master_nodes`: addresses separated by white space; `name`: of the cluster. Sizes
    are bytes. `connect_timeout`: seconds to wait for the cluster, None: for ever.
    `vote_timeout`: seconds that a storage may take to vote after another one did.
    `_runtime`: makes the Runtime (tests); `_app`: `app` of another storage, whose
    connections are shared. Nothing is connected before the first use.
    """

    def __init__(
        self,
        master_nodes: str,
        name: str,
        compress: Any = None,
        logfile: str | None = None,
        _app: Any = None,
        *,
        cache_size: int = CACHE_SIZE,
        read_only: bool = False,
        ignore_wrong_checksum: bool = False,
        dynamic_master_list: str | None = None,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        connect_timeout: float | None = None,
        max_object_size: int = OBJECT_SIZE_MAX,
        vote_timeout: float = VOTE_TIMEOUT,
        _runtime: Factory | None = None,
    ) -> None:
        BaseStorage.__init__(self, f"NEOStorage({name})")
        self._is_read_only = read_only
        self._level = parse_option(compress)
        self._logger: Logger | None = None
        self._tls: TLS | None = None
        self._db: Any = None
        # Open transactions by id() of ZODB's object, which is kept alive.
        self._transactions: dict[int, tuple[Any, Transaction]] = {}
        # What an import wrote: the base of the next revisions.
        self._imported: Any = LLBTree()
        self._upcoming: deque[bytes] = deque()
        self._count: tuple[bytes, int] | None = None
        self._shared = _app is not None
        self._sharers: weakref.WeakSet[Storage] = weakref.WeakSet()
        if _app is not None:
            origin = _app._storage
            origin._sharers.add(self)
            self._options: ClientOptions = origin._options
            self._share(origin)
            self.app = AppFacade(self)
            return
        tls = check_tls(ca, cert, key)
        self._tls = None if tls is None else TLS(*tls)
        self._factory = _runtime or self._make_runtime
        addresses: dict[Address, None] = dict.fromkeys(masters(master_nodes))
        save = None
        if dynamic_master_list:
            known = MasterList(dynamic_master_list, log.warning)
            addresses.update(dict.fromkeys(known.load()))
            save = known.save
        if not addresses:
            raise ConfigurationError("master_nodes is empty")
        if _runtime is None:
            self._logger = Logger(logfile)
            self._logger.set_node(name, None)
        self._options = ClientOptions(
            masters=tuple(addresses),
            cluster=name,
            read_only=read_only,
            cache_size=max(0, cache_size),
            ignore_wrong_checksum=ignore_wrong_checksum,
            connect_timeout=connect_timeout,
            object_size_max=max_object_size,
            vote_timeout=vote_timeout,
            tls=tls,
            save_masters=save,
        )
        self._new_core()
        self.app = AppFacade(self)
        if _runtime is None:
            fork.register(self)

    def _share(self, origin: Storage) -> None:
        """Use the connections of another storage."""
        self._pid: int = origin._pid
        self._core: ClientApp = origin._core
        self._own_runtime: Any = origin._own_runtime
        self._lock: Any = origin._lock

    def _make_runtime(self) -> ClientRuntime:
        assert self._logger is not None
        return shell.ShellRuntime(self._logger, self._tls, self._options.cluster)

    def _new_core(self) -> None:
        runtime = self._factory()
        self._core = ClientApp(runtime, self._options)
        if isinstance(runtime, shell.ShellRuntime):
            self._core.watch = runtime.watch
            runtime.on_broken = self._core.cache.clear
            self._own_runtime = runtime
        else:
            # One thread at a time runs in a simulation.
            self._own_runtime = _Unlocked(runtime)
        self._lock = self._own_runtime.lock
        self._pid = getpid()

    # --- fork -------------------------------------------------------------------------

    @property
    def _runtime(self) -> Any:
        if self._pid != getpid():
            fork.forked_untold()
        return self._own_runtime

    def before_fork(self) -> None:
        """See Forkable."""
        self._runtime.__enter__()

    def after_fork_parent(self) -> None:
        """See Forkable."""
        self._runtime.__exit__(None, None, None)

    def after_fork_child(self) -> None:
        """Forget the parent's connections; the first use makes new ones."""
        if self._core.closed:
            self._own_runtime.__exit__(None, None, None)
            self._pid = getpid()
            return
        self._begin_anew()

    def after_fork_untold(self) -> None:
        """See Forkable."""
        if self._pid == getpid():
            return
        self._own_runtime.new_lock()
        self._lock = self._own_runtime.lock
        if self._core.closed:
            self._pid = getpid()
        else:
            self._begin_anew()

    def _begin_anew(self) -> None:
        old = self._core
        self._own_runtime.abandon()
        assert self._logger is not None
        self._logger.after_fork()
        self._transactions = {}
        self._upcoming = deque()
        self._new_core()
        self._core.last_tid = old.last_tid
        self._core.db = self._db
        self._core.wait_for_pack = old.wait_for_pack
        # The first use compares last tids, as after any loss of the master.
        for sharer in self._sharers:
            sharer._transactions = {}
            sharer._upcoming = deque()
            sharer._share(self)

    # --- information ------------------------------------------------------------------

    @property
    def _tid(self) -> bytes:
        # ZODB's BlobStorage names files after it while a transaction is committed:
        # without an error, blobs would be lost.
        raise POSException.Unsupported(
            "NEO stores no blobs: the tid is not known before the end of the commit"
        )

    @_tid.setter
    def _tid(self, tid: bytes) -> None:
        """Forget what the constructor of BaseStorage sets."""

    @property
    def _cache(self) -> Any:
        return self._core.cache

    def __len__(self) -> int:
        """Number of objects. Costs a pass over the oids after each transaction."""
        with self._runtime:
            core = self._core
            core.connect()
            tid = core.last_tid
            assert tid is not None
            if self._count is None or self._count[0] != tid:
                self._count = tid, iteration.count(core)
            return self._count[1]

    def __bool__(self) -> bool:
        return True

    def getSize(self) -> int:
        """Bytes used by the databases of the storages."""
        with self._runtime:
            size = self._core.get_size()
        return 300 * len(self) if size is None else size

    def supportsUndo(self) -> bool:
        """See IStorageUndoable."""
        return True

    def lastTransaction(self) -> bytes:
        """Last tid known here; waits only for the very first connection."""
        tid = self._core.last_tid
        if tid is None:
            with self._runtime:
                self._core.connect()
                tid = self._core.last_tid
            assert tid is not None
        return tid

    def sync(self, force: bool = True) -> None:
        """Make visible all that is committed."""
        with self._runtime:
            self._core.turns.synchronise()
            self._core.sync()

    def registerDB(self, db: Any, limit: int | None = None) -> None:
        """See IStorage; the last one wins."""
        ConflictResolvingStorage.registerDB(self, db)
        with self._runtime:
            self._db = self._core.db = db

    def close(self) -> None:
        """Close the connections. lastTransaction() keeps answering."""
        if self._shared:
            return
        with self._runtime:
            if self._core.closed:
                return
            self._core.close()
        self._runtime.close()
        if self._logger is not None:
            self._logger.close()

    def cleanup(self) -> None:
        """Nothing to remove here: the data are those of the cluster."""

    # --- reading ----------------------------------------------------------------------

    def load(self, oid: bytes, version: str = "") -> tuple[bytes, bytes]:
        """Current data and serial."""
        try:
            with self._runtime:
                return self._core.reader.load(oid)[:2]
        except NEOStorageNotFoundError:
            raise POSException.POSKeyError(oid) from None

    def loadEx(self, oid: bytes, version: str = "") -> tuple[bytes, bytes, str]:
        """As load, with an empty version."""
        return (*self.load(oid), "")

    def getTid(self, oid: bytes) -> bytes:
        """Current serial."""
        return self.load(oid)[1]

    def loadBefore(
        self, oid: bytes, tid: bytes
    ) -> tuple[bytes, bytes, bytes | None] | None:
        """See IStorage."""
        if self._pid == getpid():
            # What is in the cache makes nobody send or wake up, for which the Runtime
            # would look when it is left.
            with self._lock:
                cached = self._core.reader.cached(oid, tid)
            if cached is not None:
                return cached
        try:
            with self._runtime:
                return self._core.reader.load(oid, tid)
        except NEOStorageDoesNotExistError:
            raise POSException.POSKeyError(oid) from None
        except NEOStorageNotFoundError:
            return None

    def loadSerial(self, oid: bytes, serial: bytes) -> bytes:
        """See IStorage."""
        try:
            with self._runtime:
                return self._core.reader.load(oid, at=serial)[0]
        except NEOStorageNotFoundError:
            raise POSException.POSKeyError(oid) from None

    def prefetch(self, oids: Iterable[bytes], tid: bytes) -> None:
        """See IPrefetchStorage: returns before the data are there."""
        oids = list(oids)  # may call us
        with self._runtime:
            self._core.reader.prefetch(oids, tid)

    def new_oid(self) -> bytes:
        """See IStorage."""
        self._check_writable()
        with self._runtime:
            return self._core.oids.new()

    def history(
        self,
        oid: bytes,
        size: int = 1,
        filter: Callable[[dict[str, Any]], object] | None = None,  # noqa: A002
    ) -> list[dict[str, Any]]:
        """See IStorage; `size` of an entry is the stored, compressed, length."""
        result: list[dict[str, Any]] = []
        first = 0
        while len(result) < size:
            last = first + (size if filter is None else max(size, iteration.CHUNK))
            try:
                with self._runtime:
                    rows = iteration.history(self._core, oid, first, last)
            except Refusal:
                if first:
                    break
                raise POSException.POSKeyError(oid) from None
            for tid, length, info in rows:
                if info is None:
                    continue
                entry = describe(info) | {"tid": tid, "version": "", "size": length}
                if filter is None or filter(entry):
                    result.append(entry)
            if len(rows) < last - first:
                break
            first = last
        return result[:size]

    def undoLog(
        self,
        first: int = 0,
        last: int = -20,
        filter: Callable[[dict[str, Any]], object] | None = None,  # noqa: A002
    ) -> list[dict[str, Any]]:
        """See IStorageUndoable; `id` is the tid."""
        if last < 0:
            last = first - last

        def entry(info: Information) -> dict[str, Any]:
            return describe(info) | {"id": info[0]}

        keep = None
        if filter is not None:
            accept = filter

            def keep(info: Information) -> object:
                extra = {"packed": info[4], "oids": info[5]}
                return accept(entry(info) | extra)

        with self._runtime:
            return iteration.undo_log(self._core, first, last, entry, keep)

    def iterator(
        self, start: bytes | None = None, stop: bytes | None = None
    ) -> TransactionIterator:
        """See IStorageIteration."""
        last = self.lastTransaction()
        self._core.check_open()
        return TransactionIterator(
            self, start or ZERO_TID, last if stop is None else min(stop, last)
        )

    def record_iternext(
        self,
        next: bytes | None = None,  # noqa: A002
    ) -> tuple[bytes, bytes, bytes, bytes | None]:
        """See IStorageCurrentRecordIteration."""
        upcoming = self._upcoming
        wanted = ZERO_OID if next is None else next
        while True:
            if len(upcoming) < 2 or upcoming[0] != wanted:
                upcoming.clear()
                with self._runtime:
                    for part in iteration.oids(self._core, None, wanted):
                        upcoming += part
                        if len(upcoming) > 1:
                            break
                    if not upcoming:
                        raise ValueError("no more record")
                    self._core.reader.prefetch(upcoming, MAX_TID)
            oid = upcoming.popleft()
            following = upcoming[0] if upcoming else None
            try:
                data, tid = self.load(oid)
            except POSException.POSKeyError:  # deleted meanwhile
                if following is None:
                    raise ValueError("no more record") from None
                wanted = following
                continue
            return oid, tid, data, following

    # --- transactions -----------------------------------------------------------------

    def _check_writable(self) -> None:
        if self._is_read_only:
            raise POSException.ReadOnlyError()

    def _transaction_of(self, transaction: Any) -> Transaction:
        try:
            return self._transactions[id(transaction)][1]
        except KeyError:
            self._core.check_open()
            raise POSException.StorageTransactionError(self, transaction) from None

    def tpc_transaction(self) -> Any:
        """The last transaction begun that is still open."""
        for transaction, _ in reversed(self._transactions.values()):
            return transaction
        return None

    def tpc_begin(
        self, transaction: Any, tid: bytes | None = None, status: str = " "
    ) -> None:
        """See IStorage. `tid` imposes the tid; several transactions may be open."""
        self._check_writable()
        if id(transaction) in self._transactions:
            raise POSException.StorageTransactionError(
                "Duplicate tpc_begin calls for same transaction"
            )
        metadata = encode_metadata(transaction)
        with self._runtime:
            txn = begin(self._core, *metadata, tid)
            self._transactions[id(transaction)] = transaction, txn

    def store(
        self, oid: bytes, serial: bytes, data: bytes, version: str, transaction: Any
    ) -> None:
        """See IMultiCommitStorage: conflicts surface at a later store, or at vote."""
        self._check_writable()
        assert not version, "versions are not supported"
        txn = self._transaction_of(transaction)
        record = NO_DATA if data is None else compress_data(data, self._level)
        with self._runtime.gathering:
            txn.store(oid, serial or ZERO_TID, data, record)
        if txn.conflicts or txn.locked:
            self._resolve(txn)

    def deleteObject(self, oid: bytes, serial: bytes, transaction: Any) -> None:
        """See IExternalGC."""
        self._check_writable()
        txn = self._transaction_of(transaction)
        with self._runtime.gathering:
            txn.store(oid, serial, None, NO_DATA, deleted=True)

    def checkCurrentSerialInTransaction(
        self, oid: bytes, serial: bytes, transaction: Any
    ) -> None:
        """See ReadVerifyingStorage: a conflict surfaces at vote."""
        self._check_writable()
        txn = self._transaction_of(transaction)
        with self._runtime.gathering:
            txn.check_current(oid, serial)

    def restore(
        self,
        oid: bytes,
        serial: bytes,
        data: bytes | None,
        version: str,
        prev_txn: bytes | None,
        transaction: Any,
    ) -> None:
        """See IStorageRestoreable. A pointer to former data is kept if it is right."""
        self._check_writable()
        assert not version, "versions are not supported"
        txn = self._transaction_of(transaction)
        record = NO_DATA if data is None else compress_data(data, self._level)
        number = u64(oid)
        base = self._imported.get(number) if number < 1 << 63 else None
        with self._runtime.gathering:
            data_serial = None
            if prev_txn is not None and data is not None:
                with contextlib.suppress(KeyError):
                    former, origin = self._core.reader.record(oid, prev_txn)
                    if former == data:
                        data_serial = origin or prev_txn
            txn.restore(
                oid, ZERO_TID if base is None else p64(base), record, data_serial
            )

    def _resolve(self, txn: Transaction) -> None:
        """Resolve the conflicts that are known."""
        while True:
            try:
                with self._runtime:
                    work = txn.next_conflict()
                if work is None:
                    return
                version, tid = work
                data = self.tryToResolveConflict(
                    version.oid, tid, version.origin, version.data
                )
            except POSException.ConflictError as error:
                if error.oid is not None:
                    with self._runtime:
                        self._core.turns.lost(error.oid, _committed(error))
                raise
            record = compress_data(data, self._level)
            with self._runtime:
                txn.store_resolved(version.oid, tid, data, record)

    def _wait_stores(self, txn: Transaction) -> None:
        while True:
            self._resolve(txn)
            with self._runtime:
                if txn.wait_stores():
                    return

    def tpc_vote(self, transaction: Any) -> list[bytes]:
        """See IMultiCommitStorage; the oids of resolved conflicts."""
        txn = self._transaction_of(transaction)
        while not txn.voted:
            if txn.conflicts or txn.locked:
                self._resolve(txn)
            with self._runtime:
                if not txn.vote_early() and txn.wait_stores():
                    txn.vote()
        return txn.resolved_oids()

    def tpc_finish(
        self, transaction: Any, f: Callable[[bytes], object] | None = None
    ) -> bytes:
        """See IMultiCommitStorage; `f(tid)` is called with the lock held."""
        txn = self._transaction_of(transaction)
        if not txn.voted:
            self.tpc_vote(transaction)
        try:
            with self._runtime:
                tid = txn.finish(f)
        except NEOStorageError as error:
            self._core.log.error("tpc_finish: %s", error)
            raise
        finally:
            del self._transactions[id(transaction)]
        if txn.restored:
            self._remember_imported(txn, tid)
        return tid

    def tpc_abort(self, transaction: Any) -> None:
        """See IStorage; nothing happens if the transaction is unknown."""
        found = self._transactions.pop(id(transaction), None)
        if found is not None:
            with self._runtime:
                found[1].abort()

    # --- undo -------------------------------------------------------------------------

    def undo(self, transaction_id: bytes, transaction: Any) -> tuple[None, list[bytes]]:
        """See IStorageUndoable; returns the oids. Conflicts may surface at vote."""
        self._check_writable()
        txn = self._transaction_of(transaction)
        tid = undo.tid_of(transaction_id)
        if txn.oids:
            self._wait_stores(txn)  # the storages must know what is undone already
        with self._runtime:
            plan = undo.plan(txn, tid)
        for oid, (current, former, is_current) in plan.items():
            with self._runtime:
                data = None if former is None else undo.data_of(txn, oid, former)
            data_serial = former
            if not is_current:
                data = self._resolve_undo(txn, oid, tid, current, data)
                data_serial = None
            elif data is None:
                data_serial = None
            record = NO_DATA if data is None else compress_data(data, self._level)
            with self._runtime.gathering:
                txn.store(oid, current, data, record, data_serial)
        self._resolve(txn)
        return None, list(plan)

    def _resolve_undo(
        self,
        txn: Transaction,
        oid: bytes,
        tid: bytes,
        current: bytes,
        data: bytes | None,
    ) -> bytes:
        with self._runtime:
            current_data = undo.data_of(txn, oid, current)
        if data is None or current_data is None:
            raise POSException.UndoError("no undo information for object", oid)
        try:
            resolved: bytes = self.tryToResolveConflict(
                oid, current, tid, data, current_data
            )
        except POSException.ConflictError:
            raise POSException.UndoError(
                "Some data were modified by a later transaction", oid
            ) from None
        return resolved

    # --- pack, import -----------------------------------------------------------------

    def pack(self, t: float, referencesf: Any = None, gc: bool | None = None) -> None:
        """Order a pack: storages remove old revisions in background. No garbage is
        collected: `gc` is there for the storages that wrap others and pass it.
        """
        self._check_writable()
        if referencesf is not None and "referencesf" not in _warned:
            _warned.add("referencesf")
            log.info("packing NEO collects no garbage: referencesf is ignored")
        self.app.pack(tid_from_time(t))

    def copyTransactionsFrom(self, source: Any, verbose: bool = False) -> None:
        """Import all transactions of another storage, with their tids."""
        copy_transactions(source, self, verbose=verbose)

    def _remember_imported(self, txn: Transaction, tid: bytes) -> None:
        """What an import is based on after this transaction."""
        imported, serial = self._imported, u64(tid)
        for oid in txn.oids:
            number = u64(oid)
            if number < 1 << 63:
                imported[number] = serial


class _Unlocked:
    """A simulated Runtime, which needs no lock."""

    def __init__(self, runtime: ClientRuntime) -> None:
        self.runtime = runtime
        self.gathering = self
        self.lock = self

    def __enter__(self) -> None:
        """Nothing to take."""

    def __exit__(self, *_: object) -> None:
        """Nothing to release."""

    def close(self) -> None:
        """The simulator closes what is left."""


def _committed(error: POSException.ConflictError) -> bytes | None:
    """Tid of the revision that was committed first."""
    return error.serials[0] if error.serials else None
