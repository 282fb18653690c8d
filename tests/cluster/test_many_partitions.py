"""A table of 5000 partitions (behaviour.md 11, scenario 178)."""

from __future__ import annotations

from pathlib import Path

from ZODB.Connection import TransactionMetaData
from ZODB.utils import p64

from .harness import Cluster


def test_178_many_partitions(tmp_path: Path) -> None:
    """It is created, exchanged, kept, and loaded again."""
    with Cluster(tmp_path, storages=2, replicas=1, partitions=5000) as cluster:
        oids = [p64(i) for i in range(1, 6000, 7)]
        with cluster.client() as storage:
            txn = TransactionMetaData()
            storage.tpc_begin(txn)
            for oid in oids:
                storage.store(oid, bytes(8), b"x" + oid, "", txn)
            storage.tpc_vote(txn)
            tid = storage.tpc_finish(txn)
        cluster.stop()
        cluster.start()
        with cluster.client() as storage:
            for oid in oids:
                assert storage.load(oid) == (b"x" + oid, tid)
