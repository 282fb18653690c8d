"""A cluster whose nodes, clients and tools all use TLS."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
import ZODB

from neo.client.exception import NEOStorageError
from neo.client.Storage import Storage
from neo.lib.util import parse_address
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


@pytest.mark.parametrize("tls", [True, False], ids=["to TLS", "from TLS"])
def test_mixture(tmp_path: Path, paths: dict[str, str], tls: bool) -> None:
    """Plain text to a TLS port and the reverse: both sides say what is wrong."""
    with Cluster(tmp_path, options=options(paths) if tls else ()) as cluster:
        stranger = Cluster(tmp_path / "x", options=() if tls else options(paths))
        stranger.masters = cluster.masters
        stranger.start_node("storage2")
        try:
            for side, name in ((stranger, "storage2"), (cluster, "master1")):
                said = until(lambda s=side, n=name: s.said(n), f"message of {name}")
                assert "TLS" in said
                assert "Traceback" not in said
            credentials = {} if tls else paths
            with (
                stranger.client(connect_timeout=2, **credentials) as client,
                pytest.raises(NEOStorageError, match="TLS"),
            ):
                client.load(bytes(8))
            stranger.admin = cluster.admin
            status, _, err = stranger.neoctl("print", "cluster")
            assert status == 1
            assert "TLS" in err
        finally:
            stranger.close()
        assert cluster.state() == "RUNNING"


def test_stalled_handshakes(tmp_path: Path, paths: dict[str, str]) -> None:
    """Whoever starts a TLS handshake and says no more is closed after 10 s."""
    with Cluster(tmp_path, options=options(paths)) as cluster:
        line = cluster.neoctl("print", "node", "storage")[1]
        addresses = [*cluster.masters, cluster.admin]
        addresses.append(parse_address(line.split("|")[2].strip()))
        hello, output = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        with contextlib.suppress(ssl.SSLWantReadError):
            context.wrap_bio(hello, output).do_handshake()
        data = output.read()
        with contextlib.ExitStack() as stack:
            socks = []
            for address in addresses:
                for part in (data, data[: len(data) // 2], data[:3], b""):
                    sock = stack.enter_context(socket.create_connection(address, 30))
                    sock.sendall(part)
                    socks.append(sock)
            start = time.monotonic()
            for sock in socks:
                with contextlib.suppress(ConnectionError):
                    while sock.recv(65536):
                        pass
            assert time.monotonic() - start < 20  # normally 10
        assert cluster.state() == "RUNNING"
        with cluster.client(**paths) as client:
            client.new_oid()
