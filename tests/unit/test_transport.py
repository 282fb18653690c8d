"""One socket and what is at its other end. Nothing sleeps, no loop runs."""

from __future__ import annotations

import errno
import os
import select  # noqa: TID251 - one socket
import socket  # noqa: TID251 - real sockets
from collections.abc import Iterator

import pytest

from neo.client.shell import ShellRuntime
from neo.lib.connection import Connection
from neo.lib.logger import Logger
from neo.lib.protocol import HANDSHAKE, ErrorCode
from neo.lib.transport import SocketTransport
from tests.fakes import FakeRuntime, Recorder

PATIENCE = 20.0


class Transport(SocketTransport):
    """A socket that nobody polls."""

    drained = 0
    refusals = 0

    def changed(self) -> None:
        """Nobody is interested."""

    def flush_soon(self) -> None:
        """Tests flush."""

    def drain(self) -> None:
        self.drained += 1

    def refused(self) -> None:
        self.refusals += 1


class Pair:
    """A transport, and the bare socket of its peer."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.peer = socket.create_connection(listener.getsockname(), PATIENCE)
            sock, address = listener.accept()
        self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.transport = Transport(sock, None)
        self.handler = Recorder()
        self.conn = Connection(
            FakeRuntime(), self.transport, address[:2], self.handler, incoming=True
        )
        self.transport.conn = self.conn
        self.transport.accepted()

    def received(self) -> bytes:
        """All that the peer gets until the end."""
        data = b""
        while found := self.peer.recv(1 << 16):
            data += found
        return data

    def wait(self) -> None:
        """Return when there is something to read."""
        sock = self.transport.sock
        sock.settimeout(PATIENCE)
        sock.recv(1, socket.MSG_PEEK)
        sock.setblocking(False)

    def read(self) -> None:
        """Let the transport read what the peer sent, at least one byte."""
        self.wait()
        self.transport.readable()


@pytest.fixture
def pair() -> Iterator[Pair]:
    found = Pair()
    yield found
    found.transport.close()
    found.peer.close()


def test_last_words(pair: Pair) -> None:
    """They arrive although what the peer said was not read."""
    pair.peer.sendall(HANDSHAKE + bytes(10_000))
    pair.wait()
    pair.conn.error(0, ErrorCode.PROTOCOL_ERROR, "go away")
    pair.conn.abort("over")
    pair.transport.flush()
    assert pair.received().endswith(b"go away")
    assert pair.transport.drained == 1
    # What the peer still says is dropped...
    pair.peer.sendall(bytes(10))
    pair.peer.close()
    while pair.transport.fd >= 0:  # ...until it closes.
        pair.read()
    assert pair.handler.closings == 1
    assert pair.handler.received == []


def test_abort_drops_input(pair: Pair) -> None:
    pair.conn.abort("over")
    pair.transport.flush()
    pair.transport.flush()
    assert pair.transport.drained == 1
    assert pair.received() == HANDSHAKE
    pair.peer.sendall(HANDSHAKE)
    pair.read()
    assert pair.transport.fd >= 0
    assert pair.conn._handshake == b""
    assert not pair.transport.wants_write


def test_peer_is_gone_before_the_end(pair: Pair) -> None:
    pair.transport.flush()
    assert pair.peer.recv(100) == HANDSHAKE
    # A reset: nothing can be sent any more.
    linger = b"\1\0\0\0\0\0\0\0"
    pair.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    pair.peer.close()
    pair.conn.abort("over")
    pair.transport.flush()
    assert pair.transport.fd == -1
    assert pair.transport.drained == 0
    assert pair.conn.reason == "over"


def test_close_is_immediate(pair: Pair) -> None:
    pair.conn.error(0, ErrorCode.DENIED, "never sent")
    pair.conn.close("now")
    assert pair.transport.fd == -1
    assert pair.received() == b""


def test_loss(pair: Pair) -> None:
    pair.transport.flush()
    assert pair.peer.recv(100) == HANDSHAKE
    pair.peer.close()
    pair.read()
    assert pair.conn.reason == "closed by the peer"
    assert pair.handler.closings == 1


def test_partial_sends(pair: Pair) -> None:
    """What the socket does not take is kept, in order."""
    data = bytes(range(256)) * (32 << 10)
    pair.conn._write(data)
    pair.transport.flush()
    assert pair.transport.wants_write
    received = b""
    while pair.transport.wants_write:
        received += pair.peer.recv(1 << 20)
        pair.transport.writable()
    assert pair.conn.out_size == 0
    pair.conn.abort()
    pair.transport.flush()
    assert received + pair.received() == HANDSHAKE + data


def test_cannot_connect() -> None:
    transport = Transport(socket.socket(), None)
    handler = Recorder()
    conn = Connection(
        FakeRuntime(), transport, ("127.0.0.1", 1), handler, incoming=False
    )
    transport.conn = conn
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        transport.connect(unused.getsockname(), None)
        select.select([], [transport.sock], [], PATIENCE)
        transport.writable()
    assert transport.fd == -1
    assert transport.refusals == 1
    assert conn.reason == os.strerror(errno.ECONNREFUSED)


@pytest.mark.parametrize("is_read", [False, True])
def test_last_words_of_a_client(is_read: bool) -> None:
    """As above; the background thread reads until the peer closes."""
    runtime = ShellRuntime(Logger(console=False))
    handler = Recorder()
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            with runtime:
                conn = runtime.connect(listener.getsockname(), handler)
                runtime.wait(lambda: handler.connections, (conn,), PATIENCE)
            peer, _ = listener.accept()
        with peer:
            peer.settimeout(PATIENCE)
            peer.sendall(HANDSHAKE)
            transport = conn.transport
            with runtime:
                runtime.wait(lambda: conn._handshake is None, (), PATIENCE)
                if is_read:
                    # Another thread waits for answers meanwhile.
                    transport.in_recv = True
                conn.error(0, ErrorCode.PROTOCOL_ERROR, "go away")
                conn.abort("over")
            data = b""
            while found := peer.recv(100):
                data += found
            assert data.endswith(b"go away")
            with runtime:
                assert (transport.fd < 0) == is_read
        with runtime:
            runtime.wait(lambda: not runtime.transports, (), PATIENCE)
            assert not runtime.transports
        if is_read:
            transport.sock.close()  # as its reader does
    finally:
        runtime.close()
