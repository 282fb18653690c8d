"""Nodes that die, disks that fill up: what was acknowledged stays, clients go on."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import transaction
import ZODB
from ZODB.Connection import TransactionMetaData
from ZODB.utils import p64

from neo.client.exception import NEOStorageTransientError
from tests.history import longest_gap
from tests.simulation.workload import Tokens, TokenStorage

from .chaos import Clock
from .harness import PATIENCE, Cluster, until


class Load:
    """Threads that commit and read, each with a client of its own, in a block."""

    def __init__(self, cluster: Cluster, threads: int = 3) -> None:
        self.cluster = cluster
        self.tokens = Tokens(Clock())  # type: ignore[arg-type]
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(i,)) for i in range(threads)
        ]

    def _work(self, number: int) -> None:
        try:
            with self.cluster.client(kind=TokenStorage) as storage:
                step = 0
                while not self._stop.is_set():
                    step += 1
                    self.tokens.step(storage, f"{number}:{step}", step % 10 == 9)
        except BaseException as error:  # noqa: BLE001  # told by the main thread
            self.errors.append(error)

    def __enter__(self) -> Load:
        with self.cluster.client(kind=TokenStorage) as storage:
            self.tokens.create(storage)
        self.began = time.monotonic()
        for thread in self._threads:
            thread.start()
        self.progress()
        return self

    def progress(self, count: int = 10) -> None:
        """Return after more commits."""
        target = self.tokens.committed + count
        until(lambda: self.errors or self.tokens.committed >= target, "commits")
        assert not self.errors

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        if kind is None:
            assert not self.errors
            assert not any(thread.is_alive() for thread in self._threads)

    def check(self) -> None:
        """Compare what was seen with what is there."""
        with self.cluster.client(kind=TokenStorage) as storage:
            self.tokens.check(storage)


@pytest.mark.parametrize(
    "victims",
    [("storage1",), ("master1",), ("master1", "storage1", "admin")],
    ids=["storage", "master", "all"],
)
def test_kill(tmp_path: Path, victims: tuple[str, ...]) -> None:
    """kill -9 under load, again and again: nothing acknowledged is lost."""
    with Cluster(tmp_path) as cluster:
        with Load(cluster) as load:
            for _ in range(3):
                for name in victims:
                    cluster.kill(name)
                for name in victims:
                    cluster.start_node(name)
                load.progress()
        load.check()
        # And on disk.
        for name in ("master1", "storage1", "admin"):
            cluster.kill(name)
        cluster.start()
        load.check()
        for name in cluster.processes:
            assert "Traceback" not in cluster.said(name)


def test_storage_with_replica(tmp_path: Path) -> None:
    """With a copy elsewhere, the loss of a storage is hardly noticed."""
    with Cluster(tmp_path, storages=2, replicas=1) as cluster:

        def healthy() -> bool:
            return cluster.neoctl("print", "summary", "--check")[0] == 0

        with Load(cluster) as load:
            for victim in ("storage1", "storage2", "storage1"):
                cluster.kill(victim)
                load.progress()
                cluster.start_node(victim)
                until(healthy, "replication")
            gap = longest_gap(load.tokens.attempts, load.began, time.monotonic())
        load.check()
        assert gap < 5, gap  # normally 0.3 s


def count(storage: Any, oid: bytes, serial: bytes, data: bytes) -> bytes:
    """Commit one revision; its tid."""
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    try:
        storage.store(oid, serial, data, "", txn)
        storage.tpc_vote(txn)
        tid: bytes = storage.tpc_finish(txn)
    finally:
        storage.tpc_abort(txn)  # nothing, if it is finished
    return tid


def test_same_client(tmp_path: Path) -> None:
    """A client outlives its storage and five masters, without an error when idle."""
    with Cluster(tmp_path) as cluster, cluster.client() as storage:
        tid = count(storage, p64(1), bytes(8), b"0")
        nodes = ["master1"] * 5 + ["storage1", "storage1", "master1"]
        for i, name in enumerate(nodes, 1):
            if i % 2:
                cluster.kill(name)
            else:
                assert cluster.terminate(name) == 0
            cluster.start_node(name)
            data, serial = storage.load(p64(1))
            assert (data, serial) == (b"%d" % (i - 1), tid)
            tid = count(storage, p64(1), tid, b"%d" % i)


@contextlib.contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    """A small file system; the test is skipped without the right to mount."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


class Filler(threading.Thread):
    """Commits until it is told to stop; `stored` is what was acknowledged."""

    def __init__(self, storage: Any) -> None:
        super().__init__()
        self.storage = storage
        self.stored: dict[bytes, bytes] = {}
        self.stop = threading.Event()

    def run(self) -> None:
        rng = Random(1)
        for i in range(1, 1000):
            oid, data = p64(i), rng.randbytes(100_000)
            try:
                count(self.storage, oid, bytes(8), data)
            except NEOStorageTransientError:
                continue
            self.stored[oid] = data
            if self.stop.is_set():
                break


@pytest.mark.parametrize("how", ["device", "limit"])
def test_full_disk(tmp_path: Path, how: str) -> None:
    """The storage stops with one line. Room and a restart are enough."""
    database = tmp_path / "disk" / "storage1.sqlite"
    with contextlib.ExitStack() as stack:
        if how == "device":
            stack.enter_context(tmpfs(database.parent, "8m"))
        else:
            database.parent.mkdir()
        cluster = Cluster(tmp_path)
        stack.callback(cluster.close)
        option = ("--database", str(database))
        cluster.start_node("master1")
        cluster.start_node("storage1", *option)
        cluster.start_node("admin")
        cluster.wait_state("RUNNING")
        if how == "limit":
            pid = cluster.processes["storage1"].pid
            assert pid is not None
            limit = (4 << 20, resource.RLIM_INFINITY)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
        client = stack.enter_context(cluster.client())
        filler = Filler(client)
        filler.start()
        assert cluster.exited("storage1") == 1
        assert len(filler.stored) > 5
        said = cluster.said("storage1")
        lines = [line for line in said.splitlines() if "WARNING" not in line]
        assert len(lines) == 1, said
        assert re.search("CRITICAL .*(full|disk)", lines[0]), said
        if how == "device":
            remount = ["mount", "-o", "remount,size=64m", str(database.parent)]
            subprocess.run(remount, check=True)
        cluster.start_node("storage1", *option)
        filler.stop.set()
        filler.join(PATIENCE)
        assert not filler.is_alive()
        for oid, data in filler.stored.items():
            assert client.load(oid)[0] == data
        count(client, p64(5000), bytes(8), b"more")


def test_full_disk_of_logs(tmp_path: Path) -> None:
    """A node whose log can't be written goes on."""
    with Cluster(tmp_path) as cluster, cluster.client() as storage:
        for process in cluster.processes.values():
            assert process.pid is not None
            size = os.path.getsize(cluster.path("master1.log"))
            if process is not cluster.processes["storage1"]:
                limit = (size, resource.RLIM_INFINITY)
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)
        tid = bytes(8)
        for i in range(20):
            tid = count(storage, p64(1), tid, b"%d" % i)
            assert cluster.neoctl("flush_log")[0] == 0
        assert all(process.is_alive() for process in cluster.processes.values())
        assert cluster.state() == "RUNNING"


def test_flush_logs(tmp_path: Path) -> None:
    """All nodes write their logs, and nobody takes that badly."""
    with Cluster(tmp_path, masters=2) as cluster:
        logfile = cluster.path("client.log")
        with cluster.client(logfile=logfile) as storage:
            tid = count(storage, p64(1), bytes(8), b"0")
            until(lambda: cluster.neoctl("print", "node")[1].count("RUNNING") == 5)
            lines = cluster.neoctl("print", "node")[1].splitlines()
            (client,) = (line for line in lines if "CLIENT" in line)
            sizes = {path: os.path.getsize(path) for path in tmp_path.glob("*.log")}
            assert len(sizes) == 5
            assert cluster.neoctl("flush_log")[0] == 0
            until(lambda: all(os.path.getsize(p) > n for p, n in sizes.items()), "logs")
            count(storage, p64(1), tid, b"1")
            assert client in cluster.neoctl("print", "node")[1]
        assert not any("FlushLog" in cluster.said(name) for name in cluster.processes)


PRELOADED = """
import os, sys, transaction, ZODB
from BTrees.Length import Length
from neo.client.Storage import Storage

db = ZODB.DB(Storage(sys.argv[1], sys.argv[2]))
with db.transaction() as connection:
    connection.root()["length"] = Length()
master = db.open(transaction.TransactionManager())
master.root()["length"]()

def work(times):
    connection = db.open()
    for _ in range(times):
        transaction.begin()
        connection.root()["length"].change(1)
        transaction.commit()
    connection.close()

workers = []
for _ in range(3):
    pid = os.fork()
    if not pid:
        work(20)
        # A worker that starts processes of its own.
        if child := os.fork():
            work(5)
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        work(5)
        db.close()
        sys.exit()
    workers.append(pid)
    work(5)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in workers)
work(5)
transaction.begin()
master.sync()
print(master.root()["length"]())
"""


def test_preloaded_application(tmp_path: Path) -> None:
    """As gunicorn with --preload: all processes go on with the storage they got."""
    with Cluster(tmp_path) as cluster:
        result = subprocess.run(
            [sys.executable, "-c", PRELOADED, cluster.master_nodes, cluster.name],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"{3 * 30 + 4 * 5}\n"


def test_paused_storage(tmp_path: Path) -> None:
    """The only storage does not answer for a while: work goes on when it does."""
    with Cluster(tmp_path) as cluster, Load(cluster) as load:
        pid = cluster.processes["storage1"].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(1)
        finally:
            os.kill(pid, signal.SIGCONT)
        load.progress()


def test_paused_replica(tmp_path: Path) -> None:
    """A storage that is silent is put aside; back, it notices and catches up."""
    limits = ("--ping-after", "1", "--silence-limit", "3")
    with Cluster(tmp_path, storages=2, replicas=1) as cluster:
        cluster.terminate("master1")
        cluster.start_node("master1", *limits)
        cluster.wait_state("RUNNING")
        with Load(cluster) as load:
            pid = cluster.processes["storage2"].pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            try:
                load.progress()
            finally:
                os.kill(pid, signal.SIGCONT)
            until(
                lambda: cluster.neoctl("print", "summary", "--check")[0] == 0,
                "replication",
            )
            load.progress()
        load.check()


def test_read_only(tmp_path: Path) -> None:
    """A read-only client sees what others commit, and commits nothing."""
    with Cluster(tmp_path) as cluster:
        db = ZODB.DB(cluster.storage())
        watching = ZODB.DB(cluster.storage(read_only=True))
        with db.transaction() as connection:
            connection.root()["x"] = 1
        watching.storage.sync()
        tm = transaction.TransactionManager()
        root = watching.open(tm).root()
        assert root["x"] == 1
        root["x"] = 2
        with pytest.raises(ZODB.POSException.ReadOnlyError):
            tm.commit()
        tm.abort()
        assert root["x"] == 1
        db.close()
        watching.close()


def test_dynamic_master_list(tmp_path: Path) -> None:
    """Each process learns all masters, and finds the cluster by them alone."""
    with Cluster(tmp_path, masters=2) as cluster:
        known, cluster.masters = cluster.masters, cluster.masters[:1]
        file = tmp_path / "masters.json"
        cluster.terminate("storage1")
        option = ("--dynamic-master-list", str(file))
        cluster.start_node("storage1", *option)
        cluster.wait_state("RUNNING")

        def complete(path: Path) -> bool:
            text = path.read_text() if path.exists() else ""
            return all(str(port) in text for _, port in known)

        until(lambda: complete(file), "masters")
        of_client = tmp_path / "client.json"
        with cluster.client(dynamic_master_list=str(of_client)) as storage:
            count(storage, p64(1), bytes(8), b"x")
            until(lambda: complete(of_client), "masters")
        # The only master that the command line names is gone.
        cluster.kill("master1")
        cluster.terminate("storage1")
        cluster.start_node("storage1", *option)
        with cluster.client(dynamic_master_list=str(of_client)) as storage:
            assert storage.load(p64(1))[0] == b"x"
        cluster.masters = known
