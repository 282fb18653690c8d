"""The storage that ZODB uses: its interfaces around the core (`app.py`).

Each method takes the lock of the Runtime, calls the core, and translates errors.
Compression, checksums and conflict resolution run without the lock, on the caller's own
values. Source: operations.md 11 to 13.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from os import getpid
from pickle import PicklingError, loads
from typing import Any

from BTrees.LLBTree import LLBTree
from persistent.TimeStamp import TimeStamp
from ZODB import POSException, interfaces
from ZODB._compat import dumps
from ZODB.BaseStorage import BaseStorage, DataRecord, TransactionRecord
from ZODB.ConflictResolution import ConflictResolvingStorage
from zope.interface import implementer

from neo.lib.compress import compress as compress_data
from neo.lib.compress import parse_option
from neo.lib.config import MasterList, check_tls, masters
from neo.lib.exception import ConfigurationError
from neo.lib.logger import Logger
from neo.lib.protocol import (
    FEATURE_IMPORT,
    MAX_TID,
    ZERO_OID,
    ZERO_TID,
    NodeType,
    WaitForPack,
)
from neo.lib.runtime import ClientRuntime
from neo.lib.tls import TLS
from neo.lib.util import Address, add64, p64, tid_from_time, u64

from . import iterator as iteration
from . import shell
from .app import (
    CACHE_SIZE,
    OBJECT_SIZE_MAX,
    VOTE_TIMEOUT,
    ClientApp,
    ClientOptions,
    Refusal,
    offers,
)
from .exception import (
    NEOStorageDoesNotExistError,
    NEOStorageError,
    NEOStorageNotFoundError,
)
from .metadata import Information
from .transactions import NO_DATA, Transaction, begin

log = logging.getLogger(__name__)

PACK_DESCRIPTION = b"IStorage.pack"
# Imported transactions that are being finished at once.
FLYING = 8
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
class Storage(BaseStorage, ConflictResolvingStorage, shell.Forkable):
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
            shell.register(self)

    def _share(self, origin: Storage) -> None:
        """Use the connections of another storage."""
        self._pid: int = origin._pid
        self._core: ClientApp = origin._core
        self._own_runtime: Any = origin._own_runtime

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
        self._pid = getpid()

    # --- fork -------------------------------------------------------------------------

    @property
    def _runtime(self) -> Any:
        if self._pid != getpid():
            shell.forked_untold()
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
                return self._core.load(oid)[:2]
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
        try:
            with self._runtime:
                return self._core.load(oid, tid)
        except NEOStorageDoesNotExistError:
            raise POSException.POSKeyError(oid) from None
        except NEOStorageNotFoundError:
            return None

    def loadSerial(self, oid: bytes, serial: bytes) -> bytes:
        """See IStorage."""
        try:
            with self._runtime:
                return self._core.load(oid, at=serial)[0]
        except NEOStorageNotFoundError:
            raise POSException.POSKeyError(oid) from None

    def prefetch(self, oids: Iterable[bytes], tid: bytes) -> None:
        """See IPrefetchStorage: returns before the data are there."""
        oids = list(oids)  # may call us
        with self._runtime:
            self._core.prefetch(oids, tid)

    def new_oid(self) -> bytes:
        """See IStorage."""
        self._check_writable()
        with self._runtime:
            return self._core.new_oid()

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
                entry = {
                    "time": TimeStamp(tid).timeTime(),
                    "user_name": info[1],
                    "description": info[2],
                    "tid": tid,
                    "version": "",
                    "size": length,
                }
                if filter is None or filter(entry):
                    result.append({**_extension(info[3]), **entry})
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

        def describe(info: Information) -> dict[str, Any]:
            return {
                **_extension(info[3]),
                "id": info[0],
                "time": TimeStamp(info[0]).timeTime(),
                "user_name": info[1],
                "description": info[2],
            }

        keep = None
        if filter is not None:
            accept = filter

            def keep(info: Information) -> object:
                extra = {"packed": info[4], "oids": info[5]}
                return accept({**describe(info), **extra})

        with self._runtime:
            return iteration.undo_log(self._core, first, last, describe, keep)

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
                    self._core.prefetch(upcoming, MAX_TID)
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
        metadata = _metadata(transaction)
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
                    former, origin = self._core.record(oid, prev_txn)
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
        tid = _undo_tid(transaction_id)
        if txn.oids:
            self._wait_stores(txn)  # the storages must know what is undone already
        with self._runtime:
            plan = txn.undo_plan(tid)
        for oid, (current, former, is_current) in plan.items():
            with self._runtime:
                data = None if former is None else txn.data_of(oid, former)
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
            current_data = txn.data_of(oid, current)
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
        flight = Flight(self)
        try:
            for transaction in source.iterator():
                if verbose:
                    log.info("%s", TimeStamp(transaction.tid))
                self.tpc_begin(transaction, transaction.tid, transaction.status)
                try:
                    for r in transaction:
                        flight.before_reading(r.data_txn)
                        self.restore(
                            r.oid, r.tid, r.data, r.version, r.data_txn, transaction
                        )
                    flight.before_voting(self._transaction_of(transaction))
                    self.tpc_vote(transaction)
                    flight.take_off(transaction)
                except BaseException:
                    self.tpc_abort(transaction)
                    raise
                flight.land(flight.size)
        except Exception:
            flight.land()
            raise
        except BaseException:
            # Interrupted: it matters more than what becomes of the last ones.
            with contextlib.suppress(POSException.POSError):
                flight.land()
            raise
        flight.land()

    def _remember_imported(self, txn: Transaction, tid: bytes) -> None:
        """What an import is based on after this transaction."""
        imported, serial = self._imported, u64(tid)
        for oid in txn.oids:
            number = u64(oid)
            if number < 1 << 63:
                imported[number] = serial


class Flight:
    """Imported transactions that are being finished.

    The next one is begun and stored meanwhile, so that syncs are shared and nobody
    waits for the others. They are finished in their order, also if something fails in
    the middle: what is committed at last is the beginning of the source, which
    another import continues.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._flying: deque[tuple[Any, Transaction]] = deque()

    def before_reading(self, tid: bytes | None) -> None:
        """A transaction is about to be read."""
        if tid is not None and any(txn.ttid == tid for _, txn in self._flying):
            self.land()

    def before_voting(self, txn: Transaction) -> None:
        """Who waits for objects of others votes in vain before they are unlocked."""
        if any(not txn.oids.keys().isdisjoint(other.oids) for _, other in self._flying):
            txn.tried_early_vote = True

    @property
    def size(self) -> int:
        """How many may fly while the next one begins."""
        master = self._storage._core.master
        return FLYING if master is not None and offers(master, FEATURE_IMPORT) else 0

    def take_off(self, transaction: Any) -> None:
        """Ask to finish what was voted."""
        storage = self._storage
        txn = storage._transaction_of(transaction)
        if self._flying and not txn.follows(self._flying[-1][1]):
            self.land()
        with storage._runtime:
            txn.ask_finish(None)
            self._flying.append((transaction, txn))
        storage._remember_imported(txn, transaction.tid)

    def land(self, left: int = 0) -> None:
        """Wait for all but so many, for all if there is an error, which is raised."""
        errors = []
        while len(self._flying) > left:
            transaction, txn = self._flying.popleft()
            try:
                with self._storage._runtime:
                    txn.finished()
            except Exception as error:  # noqa: BLE001 raised below
                errors.append(error)
                left = 0  # the others have to end, too
            finally:
                self._storage._transactions.pop(id(transaction), None)
        if errors:
            raise errors[0]


class _Unlocked:
    """A simulated Runtime, which needs no lock."""

    def __init__(self, runtime: ClientRuntime) -> None:
        self.runtime = runtime
        self.gathering = self

    def __enter__(self) -> None:
        """Nothing to take."""

    def __exit__(self, *_: object) -> None:
        """Nothing to release."""

    def close(self) -> None:
        """The simulator closes what is left."""


# --- iteration ------------------------------------------------------------------------


class TransactionIterator:
    """Transactions of start <= tid <= stop; records may be read at any later time."""

    def __init__(self, storage: Storage, start: bytes, stop: bytes) -> None:
        self._storage = storage
        self._start = start
        self._stop = stop
        self._read: deque[Record] = deque()
        self._ended = start > stop

    def __iter__(self) -> TransactionIterator:
        return self

    def __next__(self) -> Record:
        if not self._read and not self._ended:
            storage = self._storage
            with storage._runtime:
                part = iteration.transactions(storage._core, self._start, self._stop)
            records = iteration.Records(storage._core, part)
            for index, info in enumerate(part):
                self._read.append(Record(storage, info, records, index))
            if part:
                self._start = add64(part[-1][0], 1)
            else:
                self._ended = True
        if not self._read:
            raise StopIteration
        return self._read.popleft()

    next = __next__

    def close(self) -> None:
        """Read no more."""
        self._ended = True
        self._read.clear()


class Record(TransactionRecord):
    """A transaction, iterable: its records."""

    def __init__(
        self,
        storage: Storage,
        info: Information,
        records: iteration.Records,
        index: int,
    ) -> None:
        tid, user, description, extension, packed, _ = info
        super().__init__(tid, "p" if packed else " ", user, description, extension)
        self._storage = storage
        self._records = records
        self._index = index

    def __iter__(self) -> Iterator[DataRecord]:
        storage, tid = self._storage, self.tid
        slices = self._records.of(self._index)
        while True:
            with storage._runtime:
                rows = next(slices, None)
            if rows is None:
                return
            for oid, data, data_serial in rows:
                yield DataRecord(oid, tid, data, data_serial)


# --- what other tools use -------------------------------------------------------------


class AppFacade:
    """`storage.app`. Source: operations.md 12.4."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.nm = _Nodes(storage)

    @property
    def _core(self) -> ClientApp:
        return self._storage._core

    @property
    def name(self) -> str:
        """Name of the cluster."""
        return self._core.options.cluster

    @property
    def ssl(self) -> TLS | None:
        """Not None if TLS is used."""
        return self._storage._tls

    @property
    def ssl_credentials(self) -> tuple[str, str, str] | None:
        """Paths: ca, cert, key."""
        return self._core.options.tls

    @property
    def last_tid(self) -> bytes | None:
        """Last tid known, None before the first connection."""
        return self._core.last_tid

    @property
    def wait_for_pack(self) -> bool:
        """Whether pack() returns once the pack is completed."""
        return self._core.wait_for_pack

    @wait_for_pack.setter
    def wait_for_pack(self, value: bool) -> None:
        self._core.wait_for_pack = value

    def oids(
        self,
        tid: bytes | None = None,
        min_oid: bytes | None = None,
        max_oid: bytes | None = None,
    ) -> Iterator[bytes]:
        """Ascending oids of the objects that have data as of `tid`."""
        runtime = self._storage._runtime
        slices = iteration.oids(self._core, tid, min_oid, max_oid)
        while True:
            with runtime:
                part = next(slices, None)
            if part is None:
                return
            yield from part

    def setPackOrder(
        self, transaction: Any, tid: bytes, oids: Iterable[bytes] | None = None
    ) -> None:
        """Attach a pack order to a transaction that is being committed."""
        txn = self._storage._transaction_of(transaction)
        txn.pack = None if oids is None else sorted(oids), tid

    def pack(self, tid: bytes, oids: Iterable[bytes] | None = None) -> None:
        """Commit a pack order; nothing happens if the database is empty."""
        from ZODB.Connection import TransactionMetaData

        storage = self._storage
        tid = min(tid, storage.lastTransaction())
        if tid == ZERO_TID:
            return
        transaction = TransactionMetaData(description=PACK_DESCRIPTION)
        storage.tpc_begin(transaction)
        try:
            self.setPackOrder(transaction, tid, oids)
            storage.tpc_vote(transaction)
            order = storage.tpc_finish(transaction)
        except BaseException:
            storage.tpc_abort(transaction)
            raise
        if self.wait_for_pack:
            with storage._runtime:
                self._core.ask_master(WaitForPack, order)
                self._core.cache.clear()


class _Nodes:
    """`storage.app.nm`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def getMasterList(self) -> list[_Master]:
        """The masters known."""
        with self._storage._runtime:
            nodes = self._storage._core.nm.of_type(NodeType.MASTER)
            return [_Master(n.address) for n in nodes if n.address is not None]


class _Master:
    def __init__(self, address: Address) -> None:
        self._address = address

    def getAddress(self) -> Address:
        """(host, port)."""
        return self._address


# --- translation ----------------------------------------------------------------------


def _bytes(text: Any) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode()


def _metadata(transaction: Any) -> tuple[bytes, bytes, bytes]:
    """User, description and extension of a transaction as they are stored."""
    extension = getattr(transaction, "extension_bytes", None)
    if extension is None:
        content = getattr(transaction, "extension", None)
        try:
            extension = dumps(content, 3) if content else b""
        except PicklingError as error:
            raise NEOStorageError(f"extension of the transaction: {error}") from error
    return _bytes(transaction.user), _bytes(transaction.description), extension


def _extension(data: bytes) -> dict[str, Any]:
    """Extension of a transaction; {} if it can't be read."""
    if not data:
        return {}
    try:
        content = loads(data)
    except Exception:  # noqa: BLE001 whatever an application has stored
        return {}
    return content if isinstance(content, dict) else {}


def _committed(error: POSException.ConflictError) -> bytes | None:
    """Tid of the revision that was committed first."""
    return error.serials[0] if error.serials else None


def _undo_tid(transaction_id: Any) -> bytes:
    """Tid of an undo id, which may be in base64 as FileStorage's are."""
    if isinstance(transaction_id, str):
        transaction_id = transaction_id.encode("latin-1")
    if len(transaction_id) != 8:
        with contextlib.suppress(ValueError):
            transaction_id = base64.decodebytes(transaction_id + b"\n")
    if len(transaction_id) != 8:
        raise POSException.UndoError("Invalid transaction id")
    return bytes(transaction_id)
