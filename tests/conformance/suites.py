"""ZODB's own suites, as they run on any kind of NEO cluster: see `NEOTestCase`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import ZODB
from BTrees.tests import testConflict
from ZEO.tests.InvalidationTests import InvalidationTests
from ZODB.FileStorage import FileStorage
from ZODB.tests import (
    BasicStorage,
    ConflictResolution,
    HistoryStorage,
    IteratorStorage,
    MTStorage,
    PackableStorage,
    PersistentStorage,
    ReadOnlyStorage,
    RecoveryStorage,
    RevisionStorage,
    Synchronization,
    TransactionalUndoStorage,
    testZODB,
)
from ZODB.tests.testMVCCMappingStorage import MVCCTests

from .base import NEOTestCase

WARNINGS = [
    # ZODB's suites leave files and iterators to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PACK = pytest.mark.xfail(reason="storages do not pack yet", strict=True)


class NEOStorageTests(
    NEOTestCase,
    BasicStorage.BasicStorage,
    ConflictResolution.ConflictResolvingStorage,
    ConflictResolution.ConflictResolvingTransUndoStorage,
    HistoryStorage.HistoryStorage,
    IteratorStorage.IteratorStorage,
    IteratorStorage.ExtendedIteratorStorage,
    MTStorage.MTStorage,
    MVCCTests,
    PackableStorage.PackableStorageWithOptionalGC,
    PackableStorage.PackableUndoStorage,
    PersistentStorage.PersistentStorage,
    ReadOnlyStorage.ReadOnlyStorage,
    RevisionStorage.RevisionStorage,
    Synchronization.SynchronizedStorage,
    TransactionalUndoStorage.TransactionalUndoStorage,
):
    """All that a storage can do."""

    use_extension_bytes = True


class RecoveryTests(NEOTestCase, RecoveryStorage.RecoveryStorage):
    """From one cluster to another."""

    def setUp(self) -> None:
        super().setUp()
        self.other = self.new_cluster("other")
        self._dst: Any = self.new_dest()

    def new_dest(self) -> Any:
        return self.other.storage()

    def tearDown(self) -> None:
        self._dst.close()
        try:
            super().tearDown()
        finally:
            self.other.close()


class LastRecords:
    """A FileStorage, less the records that a later one of the transaction replaces."""

    def __init__(self, storage: FileStorage) -> None:
        self.storage = storage

    def iterator(self) -> Iterator[Any]:
        for transaction in self.storage.iterator():
            records = {record.oid: record for record in transaction}
            yield Replaced(transaction, list(records.values()))


class Replaced:
    """A transaction with other records."""

    def __init__(self, transaction: Any, records: list[Any]) -> None:
        self._transaction = transaction
        self._records = records

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transaction, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._records)


class RecoveryFromFileTests(RecoveryTests):
    """From a FileStorage to a cluster."""

    def testRestoreWithMultipleUndoRedo(self) -> None:
        # Undoing several transactions in one makes FileStorage write several records
        # of an object; NEO has at most one record per transaction and object.
        def compare(storage1: Any, storage2: Any) -> None:
            RecoveryTests.compare(self, LastRecords(storage1), storage2)

        self.compare = compare
        super().testRestoreWithMultipleUndoRedo()

    def open(self, **options: Any) -> None:
        self._storage = FileStorage("Source.fs", create=True, **options)


class RecoveryToFileTests(NEOTestCase, RecoveryStorage.RecoveryStorage):
    """From a cluster to a FileStorage."""

    def setUp(self) -> None:
        super().setUp()
        self._dst = FileStorage("Dest.fs", create=True)

    def new_dest(self) -> Any:
        return FileStorage("Dest.fs")

    def tearDown(self) -> None:
        self._dst.close()
        super().tearDown()


class ZODBTests(NEOTestCase, testZODB.ZODBTests):
    """A database on NEO."""

    def setUp(self) -> None:
        NEOTestCase.setUp(self)
        self._db = ZODB.DB(self._storage)

    def tearDown(self) -> None:
        self._db.close()
        NEOTestCase.tearDown(self)


class BTreesConflictTests(NEOTestCase, testConflict.NastyConfictFunctionalTests):
    """BTrees' conflict resolution on a real storage."""

    def setUp(self) -> None:
        testConflict.NastyConfictFunctionalTests.setUp(self)
        NEOTestCase.setUp(self)

    def openDB(self) -> Any:
        self.storage = self._storage
        self.db = ZODB.DB(self._storage)
        return self.db

    def tearDown(self) -> None:
        testConflict.NastyConfictFunctionalTests.tearDown(self)
        NEOTestCase.tearDown(self)


class ZEOInvalidationTests(NEOTestCase, InvalidationTests):
    """Clients that modify one BTree concurrently."""

    MINTIME = 1

    def openClientStorage(self, *_: Any, **__: Any) -> Any:
        return self.cluster.storage()


for name in dir(ZEOInvalidationTests):
    if name.startswith("check"):
        test = getattr(ZEOInvalidationTests, name)
        setattr(ZEOInvalidationTests, f"test{name[5:]}", test)

# Where a test passes without anything being packed, it must go on doing so.
NEEDS_PACK = """
testPackJustOldRevisions
testPackAllRevisions
testPackAllRevisionsNoGC
testPackUndoLog
testPackUnlinkedFromRoot
testPackOnlyOneObject
testPackWithMultiDatabaseReferences
testTransactionalUndoAfterPackWithObjectUnlinkFromRoot
testTransactionalUndoAfterPack
testPackWithGCOnDestinationAfterRestore
"""


def needs_pack(test: Any) -> Any:
    """A test of its own to mark: suites that inherit the same one may pass."""

    @functools.wraps(test)
    def function(self: NEOTestCase) -> None:
        test(self)

    return PACK(function)


for suite in (NEOStorageTests, RecoveryTests, RecoveryFromFileTests):
    for name in NEEDS_PACK.split():
        if hasattr(suite, name):
            setattr(suite, name, needs_pack(getattr(suite, name)))
del suite, test

ALL = (
    NEOStorageTests,
    RecoveryTests,
    RecoveryFromFileTests,
    RecoveryToFileTests,
    ZODBTests,
    BTreesConflictTests,
    ZEOInvalidationTests,
)
