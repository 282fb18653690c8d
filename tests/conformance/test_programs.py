"""Programs that use ZODB storages, and ZODB's own storages around NEO, unchanged."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZEO
import ZODB
from BTrees.Length import Length
from persistent.mapping import PersistentMapping
from ZEO.tests import forker
from ZODB.blob import Blob, BlobStorage
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError, POSError, Unsupported
from ZODB.tests.hexstorage import HexStorage

from neo.client import fork
from neo.client.Storage import Storage
from tests.cluster.harness import Cluster, until


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        cluster.start()
        yield cluster


def test_blobs_are_refused(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storing one fails; it is not lost."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a blob leaves its file
    db = ZODB.DB(BlobStorage(str(tmp_path / "blobs"), cluster.storage()))
    with pytest.raises(Unsupported), db.transaction() as connection:
        connection.root()["blob"] = Blob(b"content")
    with db.transaction() as connection:
        assert "blob" not in connection.root()
    db.close()


@pytest.mark.parametrize("number", [10**12, sys.maxsize])
def test_all_of_a_list(cluster: Cluster, number: int) -> None:
    """Who wants all asks for as many as there can't be."""
    storage = cluster.storage()
    db = ZODB.DB(storage)
    for value in range(3):
        with db.transaction() as connection:
            connection.root()["n"] = value
    oid = b"\0" * 8
    assert len(storage.history(oid, size=number)) == 4
    assert len(storage.history(oid, size=number, filter=lambda entry: True)) == 4
    assert len(db.undoLog(0, number)) == 4
    assert len(db.undoLog(0, number, lambda entry: True)) == 4
    db.close()


@pytest.mark.parametrize("wrap", ["hex", "changes"])
def test_wrapped(cluster: Cluster, wrap: str) -> None:
    """Commit, resolve, undo, iterate, pack through a storage around NEO."""
    if wrap == "hex":
        storage: Any = HexStorage(cluster.storage())
    else:
        storage = DemoStorage(base=MappingStorage(), changes=cluster.storage())
    db = ZODB.DB(storage)
    with db.transaction() as connection:
        connection.root()["n"] = Length()
    managers = transaction.TransactionManager(), transaction.TransactionManager()
    connections = [db.open(manager) for manager in managers]
    for connection in connections:
        connection.root()["n"].change(1)
    for manager in managers:
        manager.commit()
    for connection in connections:
        connection.close()
    if wrap == "hex":
        db.undo(db.undoInfo(0, 1)[0]["id"])
        transaction.commit()
    with db.transaction() as connection:
        assert connection.root()["n"]() == (1 if wrap == "hex" else 2)
    assert sum(1 for txn in storage.iterator() for _ in txn) > 3
    if wrap == "hex":  # DemoStorage fails by itself
        db.pack()
    db.close()


def test_demo(cluster: Cluster) -> None:
    """NEO, read-only, below changes in memory."""
    with cluster.client() as storage:
        db = ZODB.DB(storage)
        with db.transaction() as connection:
            connection.root()["x"] = PersistentMapping(a=1)
        last = db.lastTransaction()
    demo = ZODB.DB(DemoStorage(base=cluster.storage(read_only=True)))
    with demo.transaction() as connection:
        assert connection.root()["x"]["a"] == 1
        connection.root()["x"]["a"] = 2
        connection.root()["new"] = PersistentMapping()
    with demo.transaction() as connection:
        connection.cacheMinimize()
        assert connection.root()["x"]["a"] == 2
    demo.close()
    with cluster.client() as storage:
        assert storage.lastTransaction() == last


def test_zeo_server(cluster: Cluster, tmp_path: Path) -> None:
    """A ZEO server on NEO: its clients see what NEO's clients commit."""
    host, port = cluster.master_nodes.split()[0].rsplit(":", 1)
    section = f"""
        %import neo.client
        <NEOStorage 1>
            master_nodes {host}:{port}
            name {cluster.name}
        </NEOStorage>
        """
    address, stop = forker.start_zeo_server(section, path=str(tmp_path / "zeo"))
    try:
        db = ZEO.DB(address, wait_timeout=30)
        other = ZODB.DB(cluster.storage())
        connection = db.open()
        connection.root()["x"] = PersistentMapping(a=1)
        transaction.commit()
        with other.transaction() as elsewhere:
            elsewhere.root()["x"]["a"] = 2

        def seen(value: int) -> bool:
            connection.sync()
            return bool(connection.root()["x"]["a"] == value)

        until(lambda: seen(2))
        connection.root()["x"]["a"] = 3
        with other.transaction() as elsewhere:
            elsewhere.root()["x"]["a"] = 4
        with pytest.raises(ConflictError):
            transaction.commit()
        transaction.abort()
        until(lambda: seen(4))
        db.undo(db.undoInfo(0, 1)[0]["id"])
        transaction.commit()
        assert connection.root()["x"]["a"] == 2
        connection.close()
        other.close()
        db.close()
    finally:
        stop()


def test_file_and_back(cluster: Cluster, tmp_path: Path) -> None:
    """What zodbconvert does, with undo and metadata: the same bytes come back."""
    source = FileStorage(str(tmp_path / "Source.fs"), create=True)
    db = ZODB.DB(source)
    for i in range(5):
        with db.transaction(f"é {i}") as connection:
            transaction.get().setExtendedInfo("n", i)
            connection.root()["x"] = PersistentMapping(n=i)
    db.undo(db.undoInfo(0, 1)[0]["id"])
    transaction.commit()
    copy = FileStorage(str(tmp_path / "Copy.fs"), create=True)
    with cluster.client() as storage:
        storage.copyTransactionsFrom(source)
        copy.copyTransactionsFrom(storage)
    copy.close()
    db.close()
    content = (tmp_path / "Source.fs").read_bytes()
    assert (tmp_path / "Copy.fs").read_bytes() == content


@pytest.mark.parametrize("closed", [False, True])
def test_fork_untold(cluster: Cluster, closed: bool) -> None:
    """A process forked without hooks, as uWSGI's workers, has its own connections.

    Python's own hooks run: without them a thread that waits for the interpreter's lock
    would hang the child, whoever forks.
    """
    storage: Storage = cluster.storage()
    db = ZODB.DB(storage)
    with db.transaction() as connection:
        connection.root()["x"] = PersistentMapping()
    if closed:
        db.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fork, "_forkables", {})
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if closed:
                with pytest.raises(POSError):
                    storage.load(bytes(8))
            else:
                with db.transaction() as connection:
                    connection.root()["x"]["child"] = 1
                db.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    if not closed:
        storage.sync()
        with db.transaction() as connection:
            assert dict(connection.root()["x"]) == {"child": 1}
            connection.root()["x"]["parent"] = 1
        db.close()
