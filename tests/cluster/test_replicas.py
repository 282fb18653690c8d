"""Replicas on real processes: damaged and lost disks, checks, repairs, removal."""

from __future__ import annotations

import re
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.utils import p64

from .harness import Cluster, until
from .test_faults import Load

OBJECTS = 60


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, storages=2, replicas=1, partitions=4) as cluster:
        yield cluster


def commit(cluster: Cluster, rounds: int = 3) -> None:
    """Write all objects, some times each."""
    with cluster.client() as storage:
        for _ in range(rounds):
            txn = TransactionMetaData("user", "description")
            storage.tpc_begin(txn)
            for i in range(OBJECTS):
                try:
                    data, serial = storage.load(p64(i))
                except KeyError:
                    data, serial = b"", bytes(8)
                storage.store(p64(i), serial, data + b"%d " % i * 100, "", txn)
            storage.tpc_vote(txn)
            storage.tpc_finish(txn)


def content(cluster: Cluster) -> list[tuple[bytes, bytes]]:
    """All objects, as a new client sees them."""
    with cluster.client() as storage:
        return [storage.load(p64(i)) for i in range(OBJECTS)]


def execute(cluster: Cluster, name: str, *statements: str) -> list[int]:
    """Change the database of a storage that is down; how many rows, each."""
    with closing(sqlite3.connect(cluster.path(f"{name}.sqlite"))) as db:
        counts = [db.execute(statement).rowcount for statement in statements]
        db.commit()
    return counts


def rows(cluster: Cluster, name: str) -> list[object]:
    """What must be the same on all replicas."""
    with closing(sqlite3.connect(cluster.path(f"{name}.sqlite"))) as db:
        return [
            *db.execute("SELECT * FROM trans ORDER BY partition, tid"),
            *db.execute(
                "SELECT partition, oid, tid, value_tid, hash, compression, value FROM"
                " obj LEFT JOIN data ON id = data_id ORDER BY partition, oid, tid"
            ),
        ]


def healthy(cluster: Cluster) -> bool:
    return cluster.neoctl("print", "summary", "--check")[0] == 0


def test_damage(cluster: Cluster) -> None:
    """Row 23: read right; found, with exit status 1; repaired."""
    commit(cluster, 9)
    expected = content(cluster)
    cluster.stop()
    damaged, lost, objects, transactions = execute(
        cluster,
        "storage2",
        "UPDATE data SET value = x'00' || substr(value, 2) WHERE id % 3 = 0",
        "DELETE FROM data WHERE id % 7 = 1 AND id % 3",
        "DELETE FROM obj WHERE oid % 5 = 0"
        " AND tid != (SELECT MAX(tid) FROM obj AS o WHERE o.oid = obj.oid)",
        "DELETE FROM trans WHERE tid % 4 IN"
        " (SELECT tid % 4 FROM trans GROUP BY tid % 4 HAVING COUNT(*) > 1)"
        " AND tid NOT IN (SELECT MAX(tid) FROM trans GROUP BY tid % 4)",
    )
    assert min(damaged, lost, objects, transactions) > 1
    cluster.start()
    for _ in range(3):
        assert content(cluster) == expected
    status, out, err = cluster.neoctl("check")
    assert (status, err) == (1, "")
    found = re.findall(r"partition (\d), (S\d): (\d+) missing", out)
    assert sum(int(count) for _, _, count in found) == objects + transactions
    assert len({nid for _, nid, _ in found}) == 1
    assert " damaged" in out
    status, out, err = cluster.neoctl("check", "--repair", ":")
    assert (status, err) == (0, ""), out
    assert "in order now" in out
    assert content(cluster) == expected
    status, out, err = cluster.neoctl("check")
    assert (status, out) == (0, "8 cells of 4 partitions are in order\n")
    assert not cluster.neoctl("prune_orphan", "0", "all")[0]
    cluster.stop()
    assert rows(cluster, "storage1") == rows(cluster, "storage2")


def test_different(cluster: Cluster) -> None:
    """Only the administrator knows who is right."""
    commit(cluster, 1)
    cluster.stop()
    execute(cluster, "storage1", "UPDATE trans SET user = x'00'")
    cluster.start()
    status, out, _ = cluster.neoctl("check", "--repair")
    assert status == 1
    assert "1 different" in out
    reference = "S1" if "S1" in out.splitlines()[0] else "S2"
    status, out, _ = cluster.neoctl("check", f":{reference}", "--repair")
    assert (status, out.splitlines()[-1].split()[-1]) == (0, "now"), out
    assert cluster.neoctl("check", f":{reference}")[0] == 0
    cluster.stop()
    assert rows(cluster, "storage1") == rows(cluster, "storage2")


def test_older_copy(cluster: Cluster) -> None:
    """Row 24: noticed before it serves, caught up."""
    commit(cluster, 1)
    cluster.stop()
    file = cluster.path("storage1.sqlite")
    shutil.copy(file, f"{file}.old")
    cluster.start()
    commit(cluster, 2)
    expected = content(cluster)
    cluster.stop()
    shutil.copy(f"{file}.old", file)
    cluster.start()
    assert content(cluster) == expected
    until(lambda: healthy(cluster), "replicated")
    assert cluster.neoctl("check")[0] == 0
    commit(cluster, 1)
    cluster.stop()
    assert rows(cluster, "storage1") == rows(cluster, "storage2")


def test_lost_disk(cluster: Cluster) -> None:
    """Row 25: replaced by an empty one: add, then remove the one that is lost."""
    with Load(cluster) as load:
        cluster.kill("storage2")
        for suffix in ("", "-wal", "-shm"):
            Path(cluster.path(f"storage2.sqlite{suffix}")).unlink(missing_ok=True)
        load.progress()
        cluster.start_node("storage2")
        until(lambda: "PENDING" in cluster.neoctl("print", "node")[1], "pending")
        _, out, _ = cluster.neoctl("print", "node", "storage")
        (lost,) = re.findall(r"(S\d) .* DOWN ", out)
        status, out, err = cluster.neoctl("add", "S3", "--wait", "20")
        assert not status, err
        status, out, err = cluster.neoctl("remove", lost, "--wait", "20")
        assert (status, out) == (0, f"removed: {lost}\n"), err
        assert lost not in cluster.neoctl("print", "pt")[1]
        load.progress()
    assert healthy(cluster)
    assert cluster.neoctl("check")[0] == 0
    load.check()


def test_remove(tmp_path: Path) -> None:
    """In one command, while clients work; what was done already is skipped."""
    with Cluster(tmp_path, storages=3, replicas=1) as cluster:
        with Load(cluster) as load:
            cluster.neoctl("tweak", "S1")
            status, out, err = cluster.neoctl("remove", "S1")
            assert (status, out) == (0, "removed: S1\n"), err
            names = [n for n in cluster.processes if n.startswith("storage")]
            until(
                lambda: not all(cluster.processes[n].is_alive() for n in names), "exit"
            )
            load.progress()
        assert healthy(cluster)
        status, out, err = cluster.neoctl("remove", "S2")
        assert status == 0, err
        assert not re.search(r"^S[12]", cluster.neoctl("print", "pt")[1], re.MULTILINE)
        status, out, err = cluster.neoctl("remove", "S3")
        assert (status, out) == (1, "")
        assert "Can't remove all nodes" in err
        assert cluster.neoctl("check")[0] == 0
        load.check()


def test_start_waits(tmp_path: Path) -> None:
    """For the primary, and for storages that are just entering."""
    cluster = Cluster(tmp_path, storages=2, autostart=False)
    try:
        cluster.start_node("master1")
        cluster.start_node("admin")
        status, _, err = cluster.neoctl("start", "--wait", "0.5")
        assert status == 1
        assert "not after 0.5 s: Cannot exit recovery without any storage" in err
        timer = threading.Timer(0.3, cluster.start_node, ("storage1",))
        timer.start()
        status, out, err = cluster.neoctl("start", "--wait", "20")
        assert (status, out) == (0, "Cluster state changed: RUNNING\n"), err
        timer.join()
        assert cluster.neoctl("start", "--wait")[0] == 0  # it is so
    finally:
        cluster.close()
