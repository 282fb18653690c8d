"""The storages that are compared, each with its servers.

What can't be started here (no MariaDB, no RelStorage) is left out, and the report says
why.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from neo.lib.exception import ConfigurationError
from tests.cluster.harness import Cluster, free_port, listening, until


class Peer:
    """A storage that any process can open, and the processes behind it."""

    def __init__(
        self, name: str, zconfig: str, pids: dict[str, list[int]], alone: bool = False
    ) -> None:
        self.name = name
        self.zconfig = zconfig
        self.pids = pids  # by role
        self.alone = alone  # for one process at a time

    def open(self) -> Any:
        """A new client, in this process."""
        from ZODB.config import storageFromString

        return storageFromString(self.zconfig)


Starting = Iterator[Peer]


@contextlib.contextmanager
def file_storage(name: str, folder: Path) -> Starting:
    """FileStorage in the process of the client."""
    yield Peer(name, f"<filestorage>\npath {folder}/data.fs\n</filestorage>", {}, True)


@contextlib.contextmanager
def zeo(name: str, folder: Path) -> Starting:
    """ZEO on FileStorage."""
    if importlib.util.find_spec("ZEO") is None:
        raise ConfigurationError("ZEO is not installed")
    port = free_port()
    argv = [
        "-m",
        "ZEO.runzeo",
        "-a",
        f"127.0.0.1:{port}",
        "-f",
        str(folder / "data.fs"),
    ]
    with (
        open(folder / "log", "wb") as log,
        subprocess.Popen([sys.executable, *argv], stdout=log, stderr=log) as process,
    ):
        try:
            until(lambda: listening(("127.0.0.1", port)), "ZEO")
            zconfig = f"<zeoclient>\nserver 127.0.0.1:{port}\n</zeoclient>"
            yield Peer(name, zconfig, {"server": [process.pid]})
        finally:
            process.terminate()


def relstorage(database: str) -> str:
    """Configuration of RelStorage."""
    if importlib.util.find_spec("relstorage") is None:
        raise ConfigurationError("RelStorage is not installed")
    return f"%import relstorage\n<relstorage>\n{database}\n</relstorage>"


@contextlib.contextmanager
def relstorage_sqlite(name: str, folder: Path) -> Starting:
    """RelStorage on SQLite, which does not sync each commit."""
    database = f"<sqlite3>\ndata-dir {folder}\n</sqlite3>"
    yield Peer(name, relstorage(database), {})


@contextlib.contextmanager
def mariadb(folder: Path) -> Iterator[Any]:
    """A server with the durability that it has by default."""
    from neo.scripts.mariadb import MariaDB

    server = MariaDB(str(folder / "mariadb"), ["--innodb-flush-log-at-trx-commit=1"])
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.stop(kill=True)
        server.close()


class RelStorageOnMariaDB(Peer):
    """RelStorage 4 knows MySQL, and takes MariaDB 10 for MySQL 10."""

    def open(self) -> Any:
        from relstorage.adapters.mysql.schema import (
            MySQLSchemaInstaller,
            MySQLVersionDetector,
        )

        # That of MySQL 5.7 is what MariaDB understands: no `FOR SHARE NOWAIT`, no alias
        # of what is inserted, no `@@transaction_isolation`.
        MySQLVersionDetector._fetch_version_from_server = lambda self, cursor: "5.7.19"
        # MySQL parses these and does nothing about them. MariaDB wants the column.
        MySQLSchemaInstaller.CREATE_OBJECT_STATE_TMPLS = tuple(
            sql.replace('REFERENCES "transaction"', "")
            for sql in MySQLSchemaInstaller.CREATE_OBJECT_STATE_TMPLS
        )
        return super().open()


@contextlib.contextmanager
def relstorage_mariadb(name: str, folder: Path) -> Starting:
    """RelStorage on MariaDB, durable."""
    relstorage("")
    with mariadb(folder) as server:
        server.add_database("relstorage")
        database = (
            f"<mysql>\ndb relstorage\nuser root\nunix_socket {server.socket}\n</mysql>"
        )
        pids = {"server": [server.process.pid]}
        yield RelStorageOnMariaDB(name, relstorage(database), pids)


@contextlib.contextmanager
def neo(
    name: str,
    folder: Path,
    storages: int = 1,
    replicas: int = 0,
    partitions: int = 12,
    database: Callable[[str], list[str] | None] = lambda node: None,
) -> Starting:
    """A NEO cluster: one master, storages on SQLite unless said."""
    with Cluster(
        folder,
        storages=storages,
        replicas=replicas,
        partitions=partitions,
        database=database,
    ) as cluster:
        pids: dict[str, list[int]] = {}
        for node, process in cluster.processes.items():
            assert process.pid is not None
            pids.setdefault(node.rstrip("0123456789"), []).append(process.pid)
        del pids["admin"]
        zconfig = (
            f"%import neo.client\n<NEOStorage>\nmaster_nodes {cluster.master_nodes}\n"
            f"name {cluster.name}\n</NEOStorage>"
        )
        yield Peer(name, zconfig, pids)


@contextlib.contextmanager
def neo_mariadb(name: str, folder: Path) -> Starting:
    """One NEO storage on MariaDB, durable."""
    with mariadb(folder) as server:
        url = server.add_database("neo")
        with neo(
            name,
            folder / "neo",
            database=lambda node: ["--adapter", "MySQL", "--database", url],
        ) as peer:
            peer.pids["storage"].append(server.process.pid)
            yield peer


PEERS: dict[str, Callable[[str, Path], contextlib.AbstractContextManager[Peer]]] = {
    "ZEO": zeo,
    "NEO": neo,
    "NEO, 2 storages, 1 replica": lambda *args: neo(*args, storages=2, replicas=1),
    "NEO, 4 storages": lambda *args: neo(*args, storages=4),
    "NEO on MariaDB": neo_mariadb,
    "FileStorage": file_storage,
    "RelStorage on SQLite": relstorage_sqlite,
    "RelStorage on MariaDB": relstorage_mariadb,
}
BASELINE = "ZEO"


@contextlib.contextmanager
def started(names: list[str]) -> Iterator[tuple[list[Peer], dict[str, str]]]:
    """The peers that could be started, and why the others could not."""
    absent: dict[str, str] = {}
    peers: list[Peer] = []
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        for number, name in enumerate(names):
            folder = base / str(number)
            folder.mkdir()
            try:
                peers.append(stack.enter_context(PEERS[name](name, folder)))
            except (ConfigurationError, ImportError, OSError) as error:
                absent[name] = str(error)
        yield peers, absent
