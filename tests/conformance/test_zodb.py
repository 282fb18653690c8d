"""ZODB's own suites, on clusters of real processes with one and with three storages."""

from __future__ import annotations

from . import suites

pytestmark = suites.WARNINGS


class OneStorageTests(suites.NEOStorageTests):
    """On one storage node."""

    __test__ = True


class ThreeStoragesTests(suites.NEOStorageTests):
    """On three storage nodes."""

    __test__ = True

    storages = 3


class RecoveryTests(suites.RecoveryTests):
    """From one cluster to another."""

    __test__ = True


class RecoveryFromFileTests(suites.RecoveryFromFileTests):
    """From a FileStorage to a cluster."""

    __test__ = True


class RecoveryToFileTests(suites.RecoveryToFileTests):
    """From a cluster to a FileStorage."""

    __test__ = True


class ZODBTests(suites.ZODBTests):
    """A database on NEO."""

    __test__ = True


class BTreesConflictTests(suites.BTreesConflictTests):
    """BTrees' conflict resolution on a real storage."""

    __test__ = True


class ZEOInvalidationTests(suites.ZEOInvalidationTests):
    """Clients that modify one BTree concurrently."""

    __test__ = True
