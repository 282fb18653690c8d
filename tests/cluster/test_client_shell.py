"""The client's shell on real sockets: threads, forks, interruptions, losses."""

from __future__ import annotations

import _thread
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from threading import Thread, Timer, active_count
from typing import Any

import pytest
import transaction
import ZODB
from BTrees.Length import Length
from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import (
    IExternalGC,
    IMultiCommitStorage,
    IPrefetchStorage,
    IStorage,
    IStorageCurrentRecordIteration,
    IStorageIteration,
    IStorageRestoreable,
    IStorageUndoable,
    ReadVerifyingStorage,
)
from ZODB.POSException import (
    POSKeyError,
    ReadOnlyError,
    StorageError,
    StorageTransactionError,
)
from ZODB.utils import p64
from zope.interface.verify import verifyObject

from neo.client.exception import NEOStorageError
from neo.client.Storage import Storage
from tests.cluster.harness import Cluster

LAST = p64((1 << 63) - 1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(storages=2, replicas=1) as running:
        yield running


_oids = count(1000)


def commit(storage: Any, *objects: tuple[bytes, bytes, bytes]) -> bytes:
    """Commit (oid, serial, data) rows."""
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    for oid, serial, data in objects:
        storage.store(oid, serial, data, "", txn)
    storage.tpc_vote(txn)
    tid: bytes = storage.tpc_finish(txn)
    return tid


def create(storage: Any, data: bytes = b"data") -> tuple[bytes, bytes]:
    """A new object: (oid, serial)."""
    oid = p64(next(_oids))
    return oid, commit(storage, (oid, bytes(8), data))


@pytest.mark.parametrize(
    "interface",
    [
        IStorage,
        IStorageIteration,
        IStorageUndoable,
        IExternalGC,
        ReadVerifyingStorage,
        IStorageRestoreable,
        IStorageCurrentRecordIteration,
        IMultiCommitStorage,
        IPrefetchStorage,
    ],
)
def test_interfaces(interface: Any) -> None:
    """Nothing is connected by making a storage."""
    storage = Storage("127.0.0.1:1", "unused")
    try:
        assert verifyObject(interface, storage)
        assert storage.getName() == storage.sortKey() == "NEOStorage(unused)"
        assert [n.getAddress() for n in storage.app.nm.getMasterList()] == [
            ("127.0.0.1", 1)
        ]
    finally:
        storage.close()


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError):
        Storage("127.0.0.1:1", "unused", wait_for_pack=True)  # type: ignore[call-arg]


def test_wrong_cluster(cluster: Cluster) -> None:
    """The refusal is an error at once, each time."""
    storage = Storage(cluster.master_nodes, "other")
    try:
        for _ in range(2):
            with pytest.raises(NEOStorageError, match="cluster"):
                storage.lastTransaction()
    finally:
        storage.close()


def test_connect_timeout() -> None:
    storage = Storage("127.0.0.1:1", "unused", connect_timeout=0.1)
    try:
        with pytest.raises(NEOStorageError, match=r"127\.0\.0\.1:1 .*refused"):
            storage.sync()
    finally:
        storage.close()


def test_close(cluster: Cluster) -> None:
    """After close(), lastTransaction() answers, the rest says that it is closed."""
    threads = active_count()
    storage = cluster.storage()
    oid, tid = create(storage)
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.close()
    storage.close()
    assert active_count() == threads
    assert storage.lastTransaction() == tid
    calls: list[Any] = [
        lambda: storage.load(oid),
        lambda: storage.loadBefore(oid, LAST),
        lambda: storage.loadSerial(oid, tid),
        lambda: storage.sync(),
        lambda: storage.new_oid(),
        lambda: storage.store(oid, tid, b"", "", txn),
        lambda: storage.tpc_begin(TransactionMetaData()),
        lambda: storage.iterator(),
        lambda: storage.undoLog(),
        lambda: storage.history(oid),
        lambda: len(storage),
        lambda: storage.getSize(),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="closed"):
            call()


def test_read_only(cluster: Cluster) -> None:
    with cluster.client() as writer:
        oid, tid = create(writer)
    with cluster.client(read_only=True) as storage:
        assert storage.isReadOnly()
        assert storage.load(oid) == (b"data", tid)
        calls: list[Any] = [
            storage.new_oid,
            lambda: storage.tpc_begin(TransactionMetaData()),
            lambda: storage.pack(0),
            lambda: storage.undo(tid, TransactionMetaData()),
        ]
        for call in calls:
            with pytest.raises(ReadOnlyError):
                call()


def test_order_of_calls(cluster: Cluster) -> None:
    with cluster.client() as storage:
        txn = TransactionMetaData()
        with pytest.raises(StorageTransactionError):
            storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        storage.tpc_begin(txn)
        with pytest.raises(StorageTransactionError):
            storage.tpc_begin(txn)
        storage.tpc_finish(txn)  # votes too
        with pytest.raises(StorageTransactionError):
            storage.tpc_finish(txn)


def test_load_family(cluster: Cluster) -> None:
    with cluster.client() as writer, cluster.client(cache_size=0) as storage:
        oid, first = create(writer, b"1")
        second = commit(writer, (oid, first, b"2"))
        for _ in range(2):
            storage.sync()
            assert storage.load(oid) == (b"2", second)
            assert storage.loadEx(oid) == (b"2", second, "")
            assert storage.getTid(oid) == second
            assert storage.loadSerial(oid, first) == b"1"
            assert storage.loadBefore(oid, second) == (b"1", first, second)
            assert storage.loadBefore(oid, LAST) == (b"2", second, None)
            assert storage.loadBefore(oid, first) is None
            with pytest.raises(POSKeyError):
                storage.loadSerial(oid, p64(1))
        for missing in (storage.load, storage.getTid, storage.history):
            with pytest.raises(POSKeyError):
                missing(p64(1 << 50))
        with pytest.raises(POSKeyError):
            storage.loadBefore(p64(1 << 50), LAST)
        txn = TransactionMetaData()
        writer.tpc_begin(txn)
        writer.deleteObject(oid, second, txn)
        writer.tpc_vote(txn)
        writer.tpc_finish(txn)
        storage.sync()
        with pytest.raises(POSKeyError):
            storage.load(oid)


def test_prefetch_and_records(cluster: Cluster) -> None:
    with cluster.client() as writer, cluster.client() as storage:
        objects = {p64(next(_oids)): b"%d" % i for i in range(300)}
        tid = commit(writer, *((o, bytes(8), d) for o, d in objects.items()))
        storage.sync()
        storage.prefetch(iter(objects), LAST)
        for oid, data in objects.items():
            assert storage.load(oid) == (data, tid)
        found = {}
        following = None
        while True:
            oid, _, data, following = storage.record_iternext(following)
            found[oid] = data
            if following is None:
                break
        assert found.items() >= objects.items()
        assert list(found) == sorted(found) == list(storage.app.oids())
        assert len(storage) == len(found)
        assert storage.getSize() > 0


def test_object_limit(cluster: Cluster) -> None:
    with cluster.client(max_object_size=1000, compress=False) as storage:
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        with pytest.raises(NEOStorageError, match="1001 bytes, the limit is 1000"):
            storage.store(p64(next(_oids)), bytes(8), b"x" * 1001, "", txn)
        storage.tpc_abort(txn)
        create(storage, b"x" * 1000)


@pytest.mark.parametrize("cache_size", [0, 1 << 20])
def test_big_transaction(cluster: Cluster, cache_size: int) -> None:
    """More data than the cache: throttled, not stuck."""
    with cluster.client(cache_size=cache_size, compress=False) as storage:
        oids = [p64(next(_oids)) for _ in range(40)]
        tid = commit(storage, *((o, bytes(8), o * 10000) for o in oids))
        assert storage.load(oids[-1]) == (oids[-1] * 10000, tid)


@contextmanager
def forked() -> Iterator[bool]:
    """Fork. True in the child, which must come to the end of the block, and ends there;
    false in the parent once it has.
    """
    pid = os.fork()
    if not pid:
        status = 1
        try:
            yield True
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    yield False


def test_fork(cluster: Cluster) -> None:
    """The child reconnects at its first use; the parent does not notice."""
    with cluster.client() as storage:
        oid, tid = create(storage)
        open_at_fork = TransactionMetaData()
        storage.tpc_begin(open_at_fork)
        with forked() as in_child:
            if in_child:
                assert storage.lastTransaction() == tid
                with pytest.raises(StorageTransactionError):
                    storage.tpc_vote(open_at_fork)
                assert storage.load(oid) == (b"data", tid)
                commit(storage, (oid, tid, b"child"))
                storage.close()
        storage.sync()
        assert storage.load(oid)[0] == b"child"
        storage.store(p64(next(_oids)), bytes(8), b"parent", "", open_at_fork)
        storage.tpc_vote(open_at_fork)
        storage.tpc_finish(open_at_fork)


def test_fork_of_storages_that_share(cluster: Cluster) -> None:
    """They share the connections of the child there."""
    with cluster.client() as storage:
        oid, _ = create(storage)
        other = Storage("", "", _app=storage.app)
        assert other.load(oid)[0] == b"data"
        with forked() as in_child:
            if in_child:
                commit(other, (oid, other.load(oid)[1], b"child"))
                assert storage.load(oid)[0] == b"child"
                assert other._core is storage._core
                storage.close()
        other.sync()
        assert other.load(oid)[0] == b"child"
        other.close()
        assert storage.load(oid)[0] == b"child"


def test_interruption(cluster: Cluster) -> None:
    """KeyboardInterrupt in a wait: what is being read is closed, all goes on after."""
    with cluster.client() as storage, cluster.client() as other:
        oid, tid = create(storage)
        locker, waiter = TransactionMetaData(), TransactionMetaData()
        storage.tpc_begin(locker)
        storage.store(oid, tid, b"1", "", locker)
        storage.tpc_vote(locker)
        other.tpc_begin(waiter)
        other.store(oid, tid, b"2", "", waiter)
        # Not during the import of pytest's machinery: in the middle of the wait.
        timer = Timer(0.2, lambda: _thread.interrupt_main(signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            other.tpc_vote(waiter)
        timer.join()
        other.tpc_abort(waiter)
        storage.tpc_finish(locker)
        other.sync()
        assert other.load(oid)[0] == b"1"
        create(other)


def test_release_that_is_interrupted(cluster: Cluster) -> None:
    """KeyboardInterrupt can leave the lock taken: its thread goes on, and can close."""
    with cluster.client() as storage:
        create(storage)
        storage._runtime.lock.acquire()
        storage._core.master.close("lost")  # the background thread must connect again
        storage.sync()
        background = storage._runtime._thread
        storage.close()
        assert not background.is_alive()


def disturb(storage: Any) -> None:
    """Break a connection of a client."""
    with storage._runtime:
        core = storage._core
        conns = [c for c in (core.master, *core.links.values()) if c is not None]
        if conns:
            core.runtime.rng.choice(conns).transport.readable()
            core.runtime.rng.choice(conns).close("broken by the test")


@pytest.mark.parametrize("breaks", [0, 15])
def test_threads(cluster: Cluster, breaks: int) -> None:
    """No increment is lost or counted twice, whatever breaks; no thread hangs."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    done: list[int] = []
    unknown: list[Exception] = []
    try:
        with cluster.client() as storage:
            db = ZODB.DB(storage)
            name = f"counter{breaks}"
            with db.transaction() as connection:
                connection.root()[name] = Length()

            def work() -> None:
                manager = transaction.TransactionManager()
                connection = db.open(manager)
                for _ in range(10):
                    while True:
                        try:
                            manager.begin()
                            connection.root()[name].change(1)
                            manager.commit()
                        except TransientError:
                            manager.abort()
                        except Exception as error:  # noqa: BLE001 shown below
                            unknown.append(error)
                            manager.abort()
                            break
                        else:
                            done.append(1)
                            break
                connection.close()

            threads = [Thread(target=work) for _ in range(6)]
            for thread in threads:
                thread.start()
            for _ in range(breaks):
                threads[0].join(0.03)
                disturb(storage)
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
            assert not unknown
            connection = db.open()
            assert connection.root()[name]() == len(done) == 60
            connection.close()
    finally:
        sys.setswitchinterval(interval)
