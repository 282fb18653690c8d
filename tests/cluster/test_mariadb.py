"""Clusters on MariaDB: mixed with SQLite, servers that restart, commands."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import transaction
import ZODB
from persistent.mapping import PersistentMapping
from ZODB.POSException import StorageError

from neo.lib.protocol import MAX_TID, ZERO_OID, ZERO_TID
from neo.scripts import neostorage
from neo.storage.database import open_backend
from tests import mariadb

from .harness import Cluster, free_port, until


@pytest.fixture
def server() -> Iterator[mariadb.Server]:
    """A server that the test may kill."""
    mariadb.require()
    with mariadb.running() as server:
        yield server


def on_mariadb(server: mariadb.Server, *nodes: str) -> dict[str, list[str]]:
    """Arguments of these storages; the others are on SQLite."""
    return {
        node: ["--adapter", "MySQL", "--database", server.url(server.new_database())]
        for node in nodes
    }


def cells(cluster: Cluster) -> str:
    return cluster.neoctl("print", "pt")[1]


def test_mixed_replicas(server: mariadb.Server, tmp_path: Path) -> None:
    """The same on both, also what was written while one of them was away."""
    databases = on_mariadb(server, "storage2")
    cluster = Cluster(
        tmp_path, storages=2, partitions=3, replicas=1, database=databases.get
    )
    big = bytes(range(256)) * (17 << 12)  # 17 MiB
    with cluster:
        db = ZODB.DB(cluster.storage(compress=False), large_record_size=1 << 30)
        with db.transaction() as connection:
            connection.root()["big"] = PersistentMapping(value=big)
        cluster.kill("storage2")
        for n in range(20):
            with db.transaction("away") as connection:
                connection.root()[n] = PersistentMapping(value=big[: n << 14])
        with db.transaction() as connection:
            connection.root()["other"] = PersistentMapping(value=big[1:])
        db.undo(db.undoLog(0, 3)[0]["id"])
        transaction.commit()
        cluster.start_node("storage2")
        until(lambda: re.findall(" R ([A-Z.]+)$", cells(cluster), re.M) == ["UUU"] * 2)
        status, out, err = cluster.neoctl("check", "--wait")
        assert status == 0, (out, err, cells(cluster))
        cluster.kill("storage1")  # all is read from MariaDB
        with cluster.client() as other:
            again = ZODB.DB(other)
            with again.transaction() as connection:
                root = connection.root()
                assert root["big"]["value"] == big
                assert "other" not in root
                for n in range(20):
                    assert root[n]["value"] == big[: n << 14]
        db.close()
        cluster.start_node("storage1")
        until(lambda: cluster.neoctl("check", "--wait")[0] == 0)
        cluster.stop()
    lite = open_backend("SQLite", str(tmp_path / "storage1.sqlite"))
    maria = open_backend("MySQL", databases["storage2"][-1])
    for partition in range(3):
        span = (partition, 10000, ZERO_TID, MAX_TID)
        assert lite.check_tid_range(*span) == maria.check_tid_range(*span)
        keys = lite.object_keys(*span, ZERO_OID)
        assert maria.object_keys(*span, ZERO_OID) == keys
        for tid, oid in keys:
            assert lite.load(oid, at=tid) == maria.load(oid, at=tid)
    lite.close()
    maria.close()


def read(db: ZODB.DB) -> object:
    with db.transaction() as connection:
        connection.cacheMinimize()
        return connection.root()["x"]


def test_server_restarts_under_a_cluster(
    server: mariadb.Server, tmp_path: Path
) -> None:
    """Who commits may have to retry; who reads only waits. No storage exits."""
    databases = on_mariadb(server, "storage1")
    with Cluster(tmp_path, database=databases.get) as cluster:
        db = ZODB.DB(cluster.storage(cache_size=0))
        for attempt in range(4):
            with db.transaction() as connection:
                connection.root()["x"] = attempt
            time.sleep(1.1)  # the unlock is committed, too
            server.stop(kill=attempt % 2 == 0)
            with ThreadPoolExecutor(1) as executor:
                reading = executor.submit(read, db)
                # Not by another thread: the server ends with the one that starts it.
                server.start()
                assert reading.result() == attempt
        assert cluster.processes["storage1"].is_alive()
        db.close()
        cluster.stop()


def test_server_dies_for_good(server: mariadb.Server, tmp_path: Path) -> None:
    """The storage stops with one line, and starts when the server is there again."""
    databases = on_mariadb(server, "storage1")
    with Cluster(tmp_path, database=databases.get) as cluster:
        db = ZODB.DB(cluster.storage())
        with db.transaction() as connection:
            connection.root()["x"] = 1
        server.stop(kill=True)
        outcome: list[object] = []

        def commit() -> None:
            try:
                with db.transaction() as connection:
                    connection.root()["x"] = 2
            except StorageError as e:
                outcome.append(e)
            else:
                outcome.append(None)

        thread = threading.Thread(target=commit)
        thread.start()
        assert cluster.exited("storage1") == 1
        said = cluster.said("storage1")
        assert re.search(r"MySQL: .*\(\d+\)$", said.strip()), said
        assert "Traceback" not in said
        cluster.start_node("storage1", "--wait", "30")
        server.start()
        cluster.wait_state("RUNNING")
        thread.join(60)
        with db.transaction() as connection:
            assert connection.root()["x"] == (2 if outcome == [None] else 1)
        db.close()


def test_too_long_metadata(mariadb: mariadb.Server, tmp_path: Path) -> None:
    """Refused with the reason; shorter ones go on."""
    databases = on_mariadb(mariadb, "storage1")
    with Cluster(tmp_path, database=databases.get) as cluster:
        db = ZODB.DB(cluster.storage())
        for size, is_refused in (65535, False), (65536, True), (10, False):
            txn = transaction.TransactionManager()
            root = db.open(txn).root()
            root["size"] = size
            txn.get().note("d" * size)
            if is_refused:
                with pytest.raises(StorageError, match="longer than the 65535 bytes"):
                    txn.commit()
                txn.abort()
            else:
                txn.commit()
        db.close()


@pytest.mark.parametrize(
    "database", ["nobody:secret@x{}", "root:@missing{}", "x/nothing"]
)
def test_error_at_start(
    mariadb: mariadb.Server, capfd: pytest.CaptureFixture[str], database: str
) -> None:
    url = database.format(mariadb.socket)
    args = ["-c", "test", "-m", "127.0.0.1:1", "-b", "127.0.0.1:0", "-d", url]
    assert neostorage.main(args) == 1
    _, err = capfd.readouterr()
    assert re.fullmatch(r"neostorage: .*can not open database '\w+': .*\n", err)
    assert "secret" not in err


def test_readme(mariadb: mariadb.Server) -> None:
    """What README.rst says of databases and users suffices."""
    text = (Path(__file__).parents[2] / "README.rst").read_text()
    statements = re.findall(r"^    ((?:CREATE|GRANT) .*);$", text, re.M)
    assert len(statements) == 3
    for sql in statements:
        mariadb.execute(sql)
    (url,) = re.findall("``database: (neo:.*)/run/mysqld/mysqld.sock``", text)
    db = open_backend("MySQL", url + mariadb.socket)
    db.begin(durable=True)
    db.set_name("example")
    db.commit()
    assert db.settings().name == "example"
    db.close()


def test_neosimple(tmp_path: Path) -> None:
    """One command gives a cluster with a server of its own, and continues it."""
    mariadb.require()
    # Longer than a socket's path may be.
    directory = tmp_path / ("simple" * 20)
    port = free_port()
    pids = set()
    for attempt in range(2):
        process = subprocess.Popen(
            [
                sys.executable, "-m", "neo.scripts.neosimple", str(directory),
                "--storages", "2", "--port", str(port), "--name", "demo",
                *(() if attempt else ("--adapter", "MySQL")),
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            while "Ctrl-C" not in (line := process.stdout.readline()):
                assert line, process.communicate()
            pids.add((directory / "mariadb" / "data" / "mariadbd.pid").read_text())
            code = f"""
import ZODB, transaction
from neo.client.Storage import Storage
db = ZODB.DB(Storage(master_nodes="127.0.0.1:{port}", name="demo"))
root = db.open().root()
assert root.get("x") == {attempt or None}
root["x"] = {attempt + 1}
transaction.commit()
db.close()
"""
            subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
        finally:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert not (directory / "mariadb" / "data" / "mariadbd.pid").exists()
    assert len(pids) == 2
    command = [sys.executable, "-m", "neo.scripts.neosimple", str(directory)]
    done = subprocess.run(
        [*command, "--adapter", "SQLite"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "holds a cluster with --adapter MySQL" in done.stderr
