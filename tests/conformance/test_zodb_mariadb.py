"""ZODB's own suites, on storages whose databases are MariaDB's, or of both kinds."""

from __future__ import annotations

import pytest

from tests import mariadb
from tests.cluster.harness import Cluster

from . import suites
from .base import NEOTestCase

pytestmark = suites.WARNINGS


class OnMariaDB(NEOTestCase):
    """Clusters whose storages are on the server of the tests, `files` excepted."""

    files: tuple[str, ...] = ()
    adapter = "MySQL"
    engine = "InnoDB"

    @pytest.fixture(autouse=True)
    def server_of_tests(self, mariadb: mariadb.Server) -> None:
        self.server = mariadb

    def setUp(self) -> None:
        self.databases: dict[tuple[str, str], str] = {}
        super().setUp()

    def tearDown(self) -> None:
        try:
            super().tearDown()
        finally:
            for name in self.databases.values():
                self.server.execute(f"DROP DATABASE {name}")

    def new_cluster(self, name: str = "test") -> Cluster:
        def database(node: str) -> list[str] | None:
            if node in self.files:
                return None
            key = name, node
            if key not in self.databases:
                self.databases[key] = self.server.new_database()
            return [
                *("--adapter", self.adapter, "--engine", self.engine),
                *("--database", self.server.url(self.databases[key])),
            ]

        cluster = Cluster(
            name=name,
            storages=self.storages,
            replicas=self.replicas,
            database=database,
        )
        cluster.start()
        return cluster


class InnoDBTests(OnMariaDB, suites.NEOStorageTests):
    """On one storage."""

    __test__ = True


class MixedTests(OnMariaDB, suites.ZODBTests):
    """A database on NEO, on two replicas: one of them in a file of SQLite."""

    __test__ = True

    storages = 2
    replicas = 1
    files = ("storage1",)


class RocksDBTests(OnMariaDB, suites.ZODBTests):
    """A database on NEO, on RocksDB."""

    __test__ = True

    engine = "RocksDB"

    @pytest.fixture(autouse=True)
    def with_rocksdb(self) -> None:
        mariadb.require("RocksDB")


class PyMySQLTests(OnMariaDB, suites.ZODBTests):
    """A database on NEO, through the other driver."""

    __test__ = True

    adapter = "PyMySQL"
