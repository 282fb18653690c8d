"""Commands as an operator uses them, right and wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from neo.scripts import neolog

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
