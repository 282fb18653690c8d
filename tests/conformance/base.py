"""What ZODB's test suites need to run on a NEO cluster."""

from __future__ import annotations

import gc
from typing import Any, Protocol

import transaction
from ZODB.tests.StorageTestBase import StorageTestBase

from neo.client.Storage import Storage
from tests.cluster.harness import Cluster


class AnyCluster(Protocol):
    """A cluster that runs."""

    def storage(self, **options: Any) -> Storage:
        """A new client."""

    def close(self) -> None:
        """End it, and its clients."""


class NEOTestCase(StorageTestBase):
    """One empty cluster per test, `storages` storage nodes."""

    __test__ = False

    storages = 1
    replicas = 0

    def setUp(self) -> None:
        super().setUp()
        self.cluster = self.new_cluster()
        self.open()

    def tearDown(self) -> None:
        transaction.abort()
        try:
            super().tearDown()
        finally:
            self.cluster.close()

    @classmethod
    def tearDownClass(cls) -> None:
        super().tearDownClass()
        # What these suites leave open is to be found here, where it is no error.
        gc.collect()

    def new_cluster(self, name: str = "test") -> AnyCluster:
        """Processes, unless a subclass knows better."""
        cluster = Cluster(name=name, storages=self.storages, replicas=self.replicas)
        cluster.start()
        return cluster

    def open(self, **options: Any) -> None:
        self._storage = self.cluster.storage(**options)

    def _new_storage_client(self) -> Storage:
        return self.cluster.storage()
