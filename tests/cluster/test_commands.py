"""Commands as an operator uses them, right and wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ZODB
from ZODB.FileStorage import FileStorage
from ZODB.POSException import StorageError

from neo.client.Storage import Storage
from neo.scripts import neoctl, neolog

from .harness import Cluster, free_port, until

COMMANDS = [
    "neomaster",
    "neostorage",
    "neoadmin",
    "neoctl",
    "neolog",
    "neomigrate",
    "neosimple",
]


def run(command: str, *args: str, timeout: float = 30) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a command that ends by itself."""
    result = subprocess.run(
        [sys.executable, "-m", f"neo.scripts.{command}", *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage:")


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_option(command: str) -> None:
    status, out, err = run(command, "--no-such-option")
    assert status == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err


def one_line(err: str) -> str:
    """The only line of an error message, no traceback."""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    return lines[0]


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        database = str(tmp_path / "db.sqlite")
        for command, *more in (
            ("neomaster",),
            ("neoadmin",),
            ("neostorage", "-a", "SQLite", "-d", database),
        ):
            status, _, err = run(command, "-c", "x", "-b", address, *more)
            assert status == 1
            assert one_line(err).endswith(
                f"cannot listen on {address}: Address already in use"
            )


def test_database_problems(tmp_path: Path) -> None:
    database = str(tmp_path / "missing" / "db.sqlite")
    status, _, err = run("neostorage", "-c", "x", "-a", "SQLite", "-d", database)
    assert status == 1
    assert database in one_line(err)
    garbage = tmp_path / "garbage.sqlite"
    garbage.write_bytes(b"this is no database" * 100)
    status, _, err = run("neostorage", "-c", "x", "-a", "SQLite", "-d", str(garbage))
    assert status == 1
    assert one_line(err)


def test_second_process_on_a_database(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        database = cluster.path("storage1.sqlite")
        status, _, err = run("neostorage", "-c", "test", "-a", "SQLite", "-d", database)
        assert status == 1
        assert "database is locked" in one_line(err)


def test_wrong_cluster_name(tmp_path: Path) -> None:
    """A typo binds no database to a wrong name, and is said."""
    with Cluster(tmp_path) as cluster:
        wrong = Cluster(tmp_path / "wrong", name="other")
        wrong.masters = cluster.masters
        wrong.start_node("storage1")
        until(lambda: "name" in wrong.said("storage1"), "warning")
        assert wrong.terminate("storage1") == 0
        wrong.name = cluster.name
        wrong.start_node("storage1")
        until(lambda: "PENDING" in cluster.neoctl("print", "node")[1], "pending")
        wrong.close()


def test_neoctl(tmp_path: Path) -> None:
    with Cluster(tmp_path, storages=2) as cluster:

        def ok(*args: str) -> str:
            status, out, err = cluster.neoctl(*args)
            assert (status, err) == (0, ""), (args, out, err)
            assert out
            return out

        def refused(*args: str) -> str:
            status, out, err = cluster.neoctl(*args)
            assert (status, out) == (1, ""), (args, out, err)
            return one_line(err)

        assert ok("print", "cluster") == "RUNNING\n"
        assert ok("print", "primary") == "M1\n"
        assert ok("print", "pt") == (
            "# ptid: 1, replicas: 0\n"
            "             10v\nS1 R U.U.U.U.U.U.\nS2 R .U.U.U.U.U.U\n"
        )
        assert ok("print", "pt", "1", "3") == (
            "# ptid: 1, replicas: 0\n001 | S2 - UP_TO_DATE |\n002 | S1 - UP_TO_DATE |\n"
        )
        nodes = ok("print", "node").splitlines()
        assert [line.split()[0] for line in nodes] == ["A1", "M1", "S1", "S2"]
        assert ok("print", "ids").splitlines()[2] == "last_ptid = 1"
        assert ok("print", "summary").startswith("# {}\nRUNNING; UP_TO_DATE=12; ltid=")
        assert json.loads(ok("--json", "print", "cluster")) == {"state": "RUNNING"}
        assert json.loads(ok("print", "ids", "--json"))["last_ptid"] == 1
        assert len(json.loads(ok("print", "node", "storage", "--json"))) == 2
        table = json.loads(ok("print", "pt", "--json"))
        assert table["partitions"][0] == {"S1": "UP_TO_DATE"}
        assert "12" in refused("print", "pt", "0", "99")
        assert ok("tweak") == "No change done.\n"
        ok("flush_log")
        assert refused("start") == "Can not switch to this state"
        assert refused("kill", "M1") == "can not kill primary master node"
        assert "S9" in refused("add", "S9")
        assert "only readable" in refused("kill", "S1")
        assert refused("drop", "S1")
        assert refused("set", "node", "S1", "pending")
        refused("set", "cluster", "running")
        for args in (
            ("print", "node", "foo"),
            ("print",),
            ("set", "cluster", "foo"),
            ("kill",),
            ("kill", "xyz"),
            ("truncate", "xxx"),
            ("foo",),
        ):
            status, _, err = cluster.neoctl(*args)
            assert status == 2, args
            assert len(err.strip().splitlines()) <= 1, err
        with cluster.client() as storage:
            storage.new_oid()
            assert "C1" in ok("print", "node", "client")
        assert ok("set", "cluster", "stopping", "--wait", "30") == "Cluster stopped\n"
        for name in list(cluster.processes):
            assert cluster.exited(name) == 0, cluster.said(name)
        assert "not connected" in refused("print", "cluster")


def test_add_and_drop(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.start_node("storage2")
        until(lambda: "PENDING" in cluster.neoctl("print", "node")[1], "pending")
        assert "pending: S2" in cluster.neoctl("print", "pt")[1]
        status, out, err = cluster.neoctl("drop", "S2")
        assert (status, err) == (0, ""), err
        assert cluster.exited("storage2") == 0
        cluster.start_node("storage2")
        until(lambda: "PENDING" in cluster.neoctl("print", "node")[1], "pending")
        status, out, err = cluster.neoctl("add", "all", "--wait")
        assert (status, err) == (0, ""), err
        assert out.startswith("Nodes added: S2")
        assert "S2 R ............" in cluster.neoctl("print", "pt")[1]
        status, out, err = cluster.neoctl("kill", "S2")
        assert (status, err) == (0, ""), err
        assert cluster.exited("storage2") == 0


def test_start_by_hand(tmp_path: Path) -> None:
    """Without --autostart an operator decides when the cluster is complete."""
    cluster = Cluster(tmp_path, autostart=False, storages=2)
    try:
        cluster.start(wait=False)
        cluster.wait_state("RECOVERING")
        until(lambda: cluster.neoctl("print", "node")[1].count("PENDING") == 2)

        def start() -> str:
            status, out, err = cluster.neoctl("start", "--wait")
            # A storage that identified may still be telling what it has.
            assert status == 0 or "is entering cluster" in err, err
            return out

        assert until(start) == "Cluster state changed: RUNNING\n"
    finally:
        cluster.close()


def test_signals(tmp_path: Path) -> None:
    """SIGTERM and SIGINT stop a node with status 0, its log written."""
    with Cluster(tmp_path) as cluster:
        cluster.storage().new_oid()
        for name in ("admin", "master1", "storage1"):
            process = cluster.processes[name]
            assert process.pid is not None
            signum = signal.SIGINT if name == "admin" else signal.SIGTERM
            os.kill(process.pid, signum)
            assert cluster.exited(name) == 0, cluster.said(name)
            assert "Traceback" not in cluster.said(name)


def test_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the nodes did can be read with neolog."""
    with Cluster(tmp_path) as cluster:
        with cluster.client() as storage:
            storage.new_oid()
        cluster.stop()
        names = ("master1", "storage1", "admin")
        assert (
            neolog.main(["-a", *(cluster.path(f"{name}.log") for name in names)]) == 0
        )
    out = capsys.readouterr().out
    assert re.search(r"PACKET +M1 +#0x\w+ RequestIdentification +< ", out)
    assert "AskNewOIDs" in out


def test_neosimple(tmp_path: Path) -> None:
    """One command gives a cluster; its directory is continued."""
    directory = str(tmp_path / "simple")
    port = free_port()
    oid = None
    for attempt in range(2):
        process = subprocess.Popen(
            [
                sys.executable, "-m", "neo.scripts.neosimple", directory,
                "--storages", "2", "--port", str(port), "--name", "demo",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            lines = []
            while "Ctrl-C" not in (line := process.stdout.readline()):
                assert line, process.communicate()
                lines.append(line)
            uri = next(line.split()[1] for line in lines if "URI" in line)
            assert uri == f"neo://demo@127.0.0.1:{port}"
            code = f"""
import ZODB, transaction
from neo.client.Storage import Storage
db = ZODB.DB(Storage(master_nodes="127.0.0.1:{port}", name="demo"))
root = db.open().root()
print(root.get("x"))
root["x"] = {attempt + 1}
transaction.commit()
db.close()
"""
            client = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
            )
            assert client.returncode == 0, client.stderr
            assert client.stdout.strip() == str(oid)
            oid = attempt + 1
        finally:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")


def test_later_features(tmp_path: Path) -> None:
    """What this version does not have is refused with a clear line."""
    with Cluster(tmp_path) as cluster:
        for args, expected in (
            (("set", "cluster", "starting_backup"), "not available"),
            (("set", "cluster", "stopping_backup"), "not available"),
            (("truncate", "tid:1"), "first transaction|does nothing"),
            (("kill", "S1"), "only readable"),
        ):
            status, out, err = cluster.neoctl(*args)
            assert (status, out) == (1, ""), args
            assert re.search(expected, one_line(err)), args
        # Or it works already.
        for args in (
            ("check",),
            ("check", ":"),
            ("prune_orphan", "1", "all"),
            ("set", "replicas", "1"),
            ("set", "replicas", "0"),
        ):
            status, out, err = cluster.neoctl(*args)
            assert status in (0, 1), (args, err)
            assert len((out + err).strip().splitlines()) == 1, (args, out, err)
        assert cluster.state() == "RUNNING"
        for process in cluster.processes.values():
            assert process.is_alive()


def test_wrong_port(tmp_path: Path) -> None:
    """A node of another kind is recognised by neoctl, a storage and a client."""
    with Cluster(tmp_path) as cluster:
        admin, cluster.admin = cluster.admin, cluster.masters[0]
        status, out, err = cluster.neoctl("print", "cluster")
        assert (status, out) == (1, "")
        assert "no admin node" in one_line(err)
        wrong = Cluster(tmp_path / "wrong")
        wrong.masters = [admin]
        wrong.start_node("storage1")
        until(lambda: "admin node" in wrong.said("storage1"), "warning")
        assert wrong.terminate("storage1") == 0
        with wrong.client() as storage, pytest.raises(StorageError, match="admin"):
            storage.lastTransaction()
        wrong.close()


def test_silent_admin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Something else listens there, which says nothing."""
    monkeypatch.setattr(neoctl, "PATIENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert neoctl.main(["-a", f"127.0.0.1:{port}", "print", "cluster"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "no answer" in one_line(err)


def test_interrupted_import() -> None:
    """Ctrl-C while a command is being imported: it dies, without a traceback."""
    program = "import neo.scripts; raise KeyboardInterrupt"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGINT
    assert (done.stdout, done.stderr) == ("", "")
    program = "import neo.scripts; raise ValueError('a bug')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "ValueError: a bug" in done.stderr


def records(path: Path, name: str) -> int:
    """How many packets of a kind a log file has."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert neolog.main([str(path)]) == 0
    return out.getvalue().count(f" {name} ")


def test_log_rotation(tmp_path: Path) -> None:
    """Rename, RTMIN+1: the rest goes to a new file, and nothing is lost."""
    with Cluster(tmp_path) as cluster:
        log, old = Path(cluster.path("master1.log")), tmp_path / "old.log"
        pid = cluster.processes["master1"].pid
        assert pid is not None
        with cluster.client() as storage:
            storage.new_oid()
        assert cluster.neoctl("flush_log")[0] == 0
        until(lambda: records(log, "AskNewOIDs"), "flush")
        log.rename(old)
        os.kill(pid, signal.SIGRTMIN + 1)
        until(log.exists, "new log file")
        with cluster.client() as storage:
            storage.new_oid()
        cluster.stop()
    assert [records(path, "AskNewOIDs") for path in (old, log)] == [1, 1]


def test_second_signal(tmp_path: Path) -> None:
    """A clean stop takes as long as the disk; who asks twice wants it now."""
    with Cluster(tmp_path) as cluster:
        process = cluster.processes["storage1"]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGCONT)
        status = cluster.exited("storage1")
        # Which one is seen first is the system's choice.
        assert status in (-signal.SIGTERM, -signal.SIGINT)
        cluster.start_node("storage1")
        with cluster.client() as storage:
            storage.new_oid()


def transactions(path: str, count: int, first: int = 0) -> None:
    """Commit to a FileStorage."""
    db = ZODB.DB(path)
    for i in range(first, first + count):
        with db.transaction(f"transaction {i}") as connection:
            connection.root()[f"key {i}"] = "x" * 1000
    db.close()


def content(storage: Any) -> list[Any]:
    """All transactions."""
    with contextlib.closing(storage.iterator()) as iterator:
        return [(t.tid, t.description, [(r.oid, r.data) for r in t]) for t in iterator]


def test_migration_resumed(tmp_path: Path) -> None:
    """Killed in the middle: the same command goes on. Nothing is copied twice."""
    path = str(tmp_path / "Data.fs")
    transactions(path, 300)
    with Cluster(tmp_path / "cluster") as cluster:
        args = ["-c", cluster.name, path, cluster.master_nodes]
        with cluster.client() as storage:
            process = subprocess.Popen(
                [sys.executable, "-m", "neo.scripts.neomigrate", *args],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )

            def copied() -> bool:
                storage.sync()
                return storage.lastTransaction() != bytes(8)

            try:
                until(copied, "first transaction")
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=30)
            finally:
                process.kill()
            assert process.returncode in (0, 130)
            assert "Traceback" not in err
            for _ in range(2):
                status, out, err = run("neomigrate", *args)
                assert (status, err) == (0, "")
                assert "Migration done" in out
                with contextlib.closing(FileStorage(path, read_only=True)) as source:
                    assert content(storage) == content(source)
            # The source grew: only the rest is copied.
            transactions(path, 3, first=300)
            status, out, err = run("neomigrate", *args)
            assert (status, err) == (0, "")
            assert "3 transactions" in out
            with contextlib.closing(FileStorage(path, read_only=True)) as source:
                assert content(storage) == content(source)


def test_migration_refused(tmp_path: Path) -> None:
    """A destination that is something else is left alone."""
    path, other = str(tmp_path / "Data.fs"), str(tmp_path / "other.fs")
    transactions(path, 2)
    transactions(other, 2)
    with Cluster(tmp_path / "cluster") as cluster:
        masters = cluster.master_nodes
        assert run("neomigrate", "-qc", cluster.name, path, masters)[0] == 0
        with cluster.client() as storage:
            before = content(storage)
            size = os.path.getsize(other)
            for args in ((other, masters), (masters, other)):
                status, out, err = run("neomigrate", "-qc", cluster.name, *args)
                assert (status, out) == (1, "")
                assert "is no copy of it" in one_line(err)
            assert content(storage) == before
            assert os.path.getsize(other) == size
            # A wrong name is an error, no endless wait.
            status, out, err = run("neomigrate", "-qc", "other", path, masters)
            assert status == 1
            assert "cluster name" in err.splitlines()[-1]


def test_neosimple_killed(tmp_path: Path) -> None:
    """kill -9 leaves no children; replicas and masters as wanted; data are kept."""
    command = [
        sys.executable, "-m", "neo.scripts.neosimple", str(tmp_path / "data"),
        "-m", "2", "-n", "3", "-r", "1", "--port", str(free_port()),
    ]  # fmt: skip
    for attempt in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            lines = []
            while "Ctrl-C" not in (line := process.stdout.readline()):
                assert line, process.wait()
                lines.append(line)
            text = "".join(lines)
            assert "2 masters, 3 storages, 1 replica" in text
            masters = re.search(r"master_nodes (.*)", text)
            assert masters
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            pids = [int(pid) for pid in children.read_text().split()]
            assert len(pids) == 6
            with contextlib.closing(Storage(masters[1], "main")) as storage:
                db = ZODB.DB(storage)
                with db.transaction() as connection:
                    root = connection.root()
                    assert root.get("attempt", -1) == attempt - 1
                    root["attempt"] = attempt
                db.close()
        finally:
            process.kill()
            process.communicate()
        until(lambda p=pids: not any(map(alive, p)), "end of the children")


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
