"""A cluster whose nodes, clients and tools all use TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ZODB

from neo.client.exception import NEOStorageError
from neo.client.Storage import Storage
from neo.scripts import neoctl

from .harness import Cluster, until
from .tls import certificates, options


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return certificates(tmp_path_factory.mktemp("ca"))


def test_cluster(tmp_path: Path, paths: dict[str, str]) -> None:
    other = certificates(tmp_path / "other")
    with Cluster(tmp_path, storages=2, options=options(paths)) as cluster:
        db = ZODB.DB(cluster.storage(**paths))
        with db.transaction() as connection:
            connection.root()["big"] = "x" * 5_000_000
        db.close()
        with cluster.client(**paths) as storage:
            assert len(storage.load(bytes(8))[0]) > 10
        # No TLS, or another authority: said by both sides.
        address = f"127.0.0.1:{cluster.admin[1]}"
        assert neoctl.main(["-a", address, "print", "cluster"]) == 1
        more = ("print", "cluster")
        assert neoctl.main(["-a", address, *options(other), *more]) == 1
        said = until(lambda: cluster.said("admin"), "warning of the admin")
        assert "TLS" in said
        refused: list[dict[str, Any]] = [{}, other]
        for credentials in refused:
            storage = Storage(
                cluster.master_nodes, cluster.name, connect_timeout=2, **credentials
            )
            try:
                with pytest.raises(NEOStorageError):
                    storage.load(bytes(8))
            finally:
                storage.close()
        assert cluster.state() == "RUNNING"


def test_wrong_credentials(tmp_path: Path, paths: dict[str, str]) -> None:
    """A key that belongs to another certificate is an error at start."""
    other = certificates(tmp_path / "other")
    cluster = Cluster(tmp_path, options=options({**paths, "key": other["key"]}))
    cluster.start_node("admin")
    assert cluster.exited("admin") == 1
    assert "key" in cluster.said("admin")
    assert "Traceback" not in cluster.said("admin")
    cluster.close()
