"""TLS: who gets in, what operators are told, and that bytes pass."""

from __future__ import annotations

import os
import shutil
import socket  # noqa: TID251 - real sockets
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from neo.lib.connection import Connection
from neo.lib.epoll import EpollRuntime
from neo.lib.exception import ConfigurationError
from neo.lib.protocol import HANDSHAKE, AskNewOIDs, AskObject, NotifyReady
from neo.lib.tls import ALERT, TLS
from tests.unit.test_epoll import PATIENCE, Peer, make_loop, plain, turn_until

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")


class Authority:
    """The commands of operations.md 7, and a revocation list."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = str(folder / "ca.crt")
        folder.mkdir()
        self.run(
            "req -new -x509 -nodes -keyout ca.key -out ca.crt -subj /CN=CA -days 2000"
            " -addext keyUsage=critical,digitalSignature,keyCertSign,cRLSign"
        )
        self.nodes = 0

    def run(self, command: str) -> None:
        subprocess.run(
            ["openssl", *command.split()],
            cwd=self.folder,
            check=True,
            capture_output=True,
        )

    def node(self, name: str) -> tuple[str, str, str]:
        """(ca, cert, key) of a new node."""
        self.nodes += 1
        self.run(f"req -new -nodes -keyout {name}.key -subj /CN={name} -out {name}.csr")
        self.run(
            f"x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key"
            f" -set_serial {self.nodes} -days 2000 -out {name}.crt"
        )
        return (
            self.ca,
            str(self.folder / f"{name}.crt"),
            str(self.folder / f"{name}.key"),
        )

    def revoke(self, name: str) -> str:
        """A file of the authority with a list that revokes a node."""
        (self.folder / "index.txt").write_text("")
        (self.folder / "crlnumber").write_text("01\n")
        (self.folder / "ca.cnf").write_text(
            "[ca]\ndefault_ca = d\n[d]\ndatabase = index.txt\ncrlnumber = crlnumber\n"
            "default_md = sha256\ndefault_crl_days = 2000\n"
        )
        ca = "ca -config ca.cnf -cert ca.crt -keyfile ca.key"
        self.run(f"{ca} -revoke {name}.crt")
        self.run(f"{ca} -gencrl -out ca.crl")
        path = self.folder / "ca+crl.pem"
        path.write_text(
            Path(self.ca).read_text() + (self.folder / "ca.crl").read_text()
        )
        return str(path)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture(scope="session")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "other")


@pytest.fixture(scope="session")
def files(authority: Authority) -> tuple[str, str, str]:
    return authority.node("node")


@pytest.fixture(scope="session")
def stranger(other_authority: Authority) -> tuple[str, str, str]:
    return other_authority.node("stranger")


Loops = Callable[..., EpollRuntime]


@pytest.fixture
def loops() -> Iterator[Loops]:
    made: list[EpollRuntime] = []

    def make(files: tuple[str, str, str] | None) -> EpollRuntime:
        made.append(make_loop(None if files is None else TLS(*files)))
        return made[-1]

    yield make
    for loop in made:
        loop.close()


def meet(
    server_loop: EpollRuntime, client_loop: EpollRuntime
) -> tuple[Peer, Peer, Connection]:
    """A connection between two runtimes, established or failed on both sides."""
    server, client = Peer(server_loop), Peer(client_loop)
    address = server_loop.listen(("127.0.0.1", 0), server.accept)
    conn = client_loop.connect(address, client)

    settle(
        server_loop,
        client_loop,
        lambda: (
            (server.reasons and client.reasons)
            or (client.ready and server.conns and server.conns[0].is_established)
        ),
    )
    return server, client, conn


def settle(a: EpollRuntime, b: EpollRuntime, condition: Callable[[], object]) -> None:
    """Turn two loops in one thread: the second one is where to wait."""
    turn_until(b, lambda: (a.turn(0), b.turn(0.001), condition())[2])


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("limited", ["client", "server"])
def test_versions(
    loops: Loops, files: tuple[str, str, str], version: ssl.TLSVersion, limited: str
) -> None:
    """TLS 1.3 is spoken if both can, 1.2 with the reference."""
    a, b = loops(files), loops(files)
    tls = b.tls if limited == "client" else a.tls
    context = tls._client if limited == "client" else tls._server
    context.minimum_version = context.maximum_version = version
    server, _, conn = meet(a, b)
    got: list[int] = []
    conn.ask(AskNewOIDs, 3).then(lambda oids: got.append(len(oids)))
    settle(a, b, lambda: got)
    assert got == [3]
    session = server.conns[0].transport.tls._session
    assert session.version() == {771: "TLSv1.2", 772: "TLSv1.3"}[version]
    assert session.compression() is None


def test_old_versions_are_refused(loops: Loops, files: tuple[str, str, str]) -> None:
    a = loops(files)
    assert a.tls._server.minimum_version == ssl.TLSVersion.TLSv1_2
    assert a.tls._client.minimum_version == ssl.TLSVersion.TLSv1_2


def test_big_message(loops: Loops, files: tuple[str, str, str]) -> None:
    a, b = loops(files), loops(files)
    server, client, conn = meet(a, b)
    server.data = os.urandom(1 << 16) * 320  # noqa: TID251 - 20 MiB
    got: list[bytes] = []
    conn.ask(AskObject, bytes(8), None, None).then(lambda *args: got.append(args[5]))
    settle(a, b, lambda: got or client.reasons)
    assert got == [server.data]


def test_abort_flushes(loops: Loops, files: tuple[str, str, str]) -> None:
    a, b = loops(files), loops(files)
    server, _, conn = meet(a, b)
    for _ in range(1000):
        conn.notify(NotifyReady)
    conn.abort()
    settle(a, b, lambda: server.reasons)
    assert server.ready == 1000


def test_peer_of_another_authority(
    loops: Loops, files: tuple[str, str, str], stranger: tuple[str, str, str]
) -> None:
    for pair in ((files, stranger), (stranger, files)):
        server, client, _ = meet(*map(loops, pair))
        assert server.ready == 0
        assert any(
            "not trusted" in reason for reason in server.reasons + client.reasons
        )


def test_client_that_trusts_anybody(
    loops: Loops,
    files: tuple[str, str, str],
    authority: Authority,
    stranger: tuple[str, str, str],
) -> None:
    """A certificate of another authority is refused by the server, not only by luck."""
    b = loops(stranger)
    b.tls._client.verify_mode = ssl.CERT_NONE
    a = loops(files)
    server, client = Peer(a), Peer(b)
    address = a.listen(("127.0.0.1", 0), server.accept)
    conn = b.connect(address, client)
    settle(a, b, lambda: server.reasons and client.reasons)
    assert "not trusted" in server.reasons[0]
    assert not server.conns[0].is_established
    assert conn.closed


def test_revoked(
    loops: Loops, authority: Authority, files: tuple[str, str, str]
) -> None:
    revoked = authority.node("revoked")
    ca = authority.revoke("revoked")
    a = loops((ca, *files[1:]))
    server, client, _ = meet(a, loops(files))
    assert client.ready == 1
    b = loops(revoked)
    bad = Peer(b)
    b.connect(server.loop._listeners[0][0].getsockname(), bad)
    settle(a, b, lambda: server.reasons and bad.reasons)
    assert "revoked" in server.reasons[0]


def test_tls_client_and_plain_server(loops: Loops, files: tuple[str, str, str]) -> None:
    a, b = loops(None), loops(files)
    server, client = Peer(a), Peer(b)
    b.connect(a.listen(("127.0.0.1", 0), server.accept), client)
    settle(a, b, lambda: server.reasons and client.reasons)
    assert server.reasons == ["the peer speaks TLS, and this node does not"]
    assert client.ready == 0


def test_plain_client_and_tls_server(loops: Loops, files: tuple[str, str, str]) -> None:
    a, b = loops(files), loops(None)
    server, client = Peer(a), Peer(b)
    b.connect(a.listen(("127.0.0.1", 0), server.accept), client)
    settle(a, b, lambda: server.reasons and client.reasons)
    assert server.reasons == ["the peer does not speak TLS, and this node requires it"]
    assert client.reasons == ["the peer speaks TLS, and this node does not"]
    with plain(a._listeners[0][0].getsockname()) as sock:
        sock.sendall(HANDSHAKE)
        turn_until(a, lambda: len(server.reasons) == 2)
        sock.settimeout(PATIENCE)
        with suppress(ConnectionResetError):
            assert sock.recv(100) == ALERT
            assert sock.recv(100) == b""


def test_noise_in_a_session(loops: Loops, files: tuple[str, str, str]) -> None:
    """Bytes that were damaged on the way end the connection."""
    a, b = loops(files), loops(files)
    server, _, conn = meet(a, b)
    transport = conn.transport
    socket.socket.send(transport.sock, b"\x17\x03\x03\x00\x20" + bytes(32))
    settle(a, b, lambda: server.reasons)
    assert server.reasons[0].startswith("TLS error")


def test_stalled_handshake_costs_nothing(
    loops: Loops, files: tuple[str, str, str]
) -> None:
    a = loops(files)
    server = Peer(a)
    address = a.listen(("127.0.0.1", 0), server.accept)
    with plain(address) as sock:
        sock.sendall(b"\x16\x03\x01")
        turn_until(a, lambda: server.conns)
        got: list[int] = []
        b = loops(files)
        conn = b.connect(address, Peer(b))
        conn_ready = conn.handler
        settle(a, b, lambda: conn_ready.ready)
        conn.ask(AskNewOIDs, 1).then(lambda oids: got.append(1))
        settle(a, b, lambda: got)
        assert not server.conns[0].is_established
        server.conns[0].close()


def test_self_test(
    files: tuple[str, str, str], stranger: tuple[str, str, str], tmp_path: Path
) -> None:
    """A mistake in the files is found at start, and named."""
    ca, cert, key = files
    for bad, message in [
        ((str(tmp_path / "none.crt"), cert, key), "No such file"),
        ((ca, cert, stranger[2]), "the key does not belong to the certificate"),
        ((ca, *stranger[1:]), "the certificate is not trusted"),
        ((key, cert, key), "the file of the authority has none"),
    ]:
        with pytest.raises(ConfigurationError, match=message) as info:
            TLS(*bad)
        assert bad[0] in str(info.value)
