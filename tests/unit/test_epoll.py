"""The epoll Runtime and its transports, on real sockets of this machine.

Nothing sleeps: the loop turns until a condition holds.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket  # noqa: TID251 - real sockets
import threading  # noqa: TID251 - where jobs run
import time  # noqa: TID251 - a limit for tests that hang
from collections.abc import Callable, Iterator

import pytest

from neo.lib import runtime
from neo.lib.connection import Connection
from neo.lib.epoll import EpollRuntime, EpollTransport
from neo.lib.exception import BackendError
from neo.lib.handler import Handler
from neo.lib.logger import Logger
from neo.lib.protocol import (
    HANDSHAKE,
    AnswerNewOIDs,
    AnswerObject,
    AskNewOIDs,
    AskObject,
    NotifyReady,
    NotifyUnlockInformation,
)
from neo.lib.tls import TLS
from neo.lib.transport import LOOK, connect_local, local_name
from tests.cluster.harness import free_port

HOSTS = ["127.0.0.1", "::1"]
PATIENCE = 20.0


class Peer(Handler):
    """Both ends of these tests."""

    def __init__(self, loop: EpollRuntime) -> None:
        super().__init__()
        self.loop = loop
        self.conns: list[Connection] = []
        self.reasons: list[str] = []
        self.ready = 0
        self.ttids: list[bytes] = []
        self.data = b""

    def accept(self, conn: Connection) -> None:
        conn.handler = self
        conn.trust()
        self.conns.append(conn)

    def connected(self, conn: Connection) -> None:
        conn.trust()
        self.ready += 1

    def closed(self, conn: Connection) -> None:
        self.reasons.append(conn.reason)

    def ask_new_oids(self, conn: Connection, count: int) -> None:
        conn.answer(AnswerNewOIDs, [bytes(8)] * count)

    def ask_object(
        self, conn: Connection, oid: bytes, at: bytes | None, before: bytes | None
    ) -> None:
        conn.answer(AnswerObject, oid, oid, None, 0, bytes(20), self.data, None)

    def notify_unlock_information(self, conn: Connection, ttid: bytes) -> None:
        self.ttids.append(ttid)

    def notify_ready(self, conn: Connection) -> None:
        self.ready += 1


def turn_until(loop: EpollRuntime, condition: Callable[[], object]) -> None:
    """Turn the loop until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "hangs"
        loop.turn(0.05)


def make_loop(tls: TLS | None = None, tcp_only: bool = False) -> EpollRuntime:
    return EpollRuntime(Logger(console=False), tls, tcp_only)


@pytest.fixture(params=[False, True], ids=["local", "tcp"])
def loop(request: pytest.FixtureRequest) -> Iterator[EpollRuntime]:
    runtime = make_loop(tcp_only=request.param)
    yield runtime
    runtime.close()


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> str:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    try:
        with socket.socket(family) as sock:
            sock.bind((request.param, 0))
    except OSError:
        pytest.skip(f"no {request.param} here")
    return request.param


def pair(loop: EpollRuntime, host: str = "127.0.0.1") -> tuple[Peer, Peer, Connection]:
    """(server, client, connection of the client), connected."""
    server, client = Peer(loop), Peer(loop)
    address = loop.listen((host, 0), server.accept)
    conn = loop.connect(address, client)
    turn_until(loop, lambda: client.ready or client.reasons)
    assert client.reasons == []
    turn_until(loop, lambda: server.conns)
    # Both have read all: a socket closed before would be reset.
    turn_until(loop, lambda: conn._handshake is None)
    turn_until(loop, lambda: server.conns[0]._handshake is None)
    return server, client, conn


def plain(address: tuple[str, int]) -> socket.socket:
    """A peer that is no node of ours."""
    return socket.create_connection(address, timeout=PATIENCE)


def test_question_and_answer(loop: EpollRuntime, host: str) -> None:
    server, _, conn = pair(loop, host)
    got: list[int] = []
    conn.ask(AskNewOIDs, 5).then(lambda oids: got.append(len(oids)))
    turn_until(loop, lambda: got)
    assert got == [5]
    peer = server.conns[0].address
    if loop.tcp_only:
        assert conn.address[0] == peer[0] == host
        assert peer[1] not in (0, conn.address[1])
    else:
        assert peer == ("local", os.getpid())
        assert str(server.conns[0]) == f"None (local:{os.getpid()})"
    assert conn.address[1] != 0
    assert server.conns[0].incoming
    assert not conn.incoming


def test_connected_is_never_called_inside_connect(loop: EpollRuntime) -> None:
    client = Peer(loop)
    address = loop.listen(("127.0.0.1", 0), Peer(loop).accept)
    loop.connect(address, client)
    assert not client.ready
    turn_until(loop, lambda: client.ready)


def test_refused_and_throttled(loop: EpollRuntime) -> None:
    """Two attempts to one address are a second apart; another address doesn't wait."""
    address = "127.0.0.1", free_port()
    client = Peer(loop)
    start = time.monotonic()
    loop.connect(address, client)
    turn_until(loop, lambda: client.reasons)
    assert client.reasons == [os.strerror(errno.ECONNREFUSED)]
    loop.connect(("127.0.0.1", free_port()), client)
    turn_until(loop, lambda: len(client.reasons) == 2)
    assert time.monotonic() - start < 0.9
    loop.connect(address, client)
    turn_until(loop, lambda: len(client.reasons) == 3)
    assert time.monotonic() - start >= 1


def test_who_listens_later_is_noticed(
    loop: EpollRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine, who was refused needs not wait for the throttle."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    first, second = Peer(loop), Peer(loop)
    loop.connect(address, first)
    turn_until(loop, lambda: first.reasons)
    monkeypatch.setattr(runtime, "RECONNECTION_DELAY", 1000)
    loop.throttle.delay(address, time.monotonic())  # an attempt
    conn = loop.connect(address, second)
    server = Peer(loop)
    loop.listen(address, server.accept)
    if loop.tcp_only:
        for _ in range(5):
            loop.turn(LOOK)
        assert not server.conns
        conn.close()
    else:
        turn_until(loop, lambda: second.ready)


def test_no_throttle_after_success(loop: EpollRuntime) -> None:
    _, client, conn = pair(loop)
    loop.connection_succeeded(conn.address)
    start = time.monotonic()
    conn.close()
    loop.connect(conn.address, client)
    turn_until(loop, lambda: client.ready == 2)
    assert time.monotonic() - start < 0.9


def test_closed_before_it_is_connected(loop: EpollRuntime) -> None:
    server, client = Peer(loop), Peer(loop)
    address = loop.listen(("127.0.0.1", 0), server.accept)
    for end in (Connection.close, Connection.abort):
        end(loop.connect(address, client))
    for _ in range(5):
        loop.turn(0.01)
    assert client.reasons == ["closed here"] * 2
    assert server.conns == []
    assert not any(
        isinstance(getattr(h, "__self__", None), EpollTransport)
        for h in loop.handlers.values()
    )


def test_invalid_address(loop: EpollRuntime) -> None:
    client = Peer(loop)
    loop.connect(("256.1.1.1", 1), client)
    turn_until(loop, lambda: client.reasons)


@pytest.mark.parametrize("end", ["close", "abort"])
def test_end_is_seen_by_the_peer(loop: EpollRuntime, end: str) -> None:
    server, client, conn = pair(loop)
    conn.notify(NotifyUnlockInformation, bytes(8))
    if end == "close":
        loop.flush()
    getattr(conn, end)("bye")
    turn_until(loop, lambda: server.reasons)
    assert server.reasons == ["closed by the peer"]
    assert client.reasons == ["bye"]
    assert server.ttids == [bytes(8)]


def test_abort_flushes_to_a_slow_peer(loop: EpollRuntime) -> None:
    """More than the kernel takes at once is sent before the socket is closed."""
    server = Peer(loop)
    address = loop.listen(("127.0.0.1", 0), server.accept)
    with plain(address) as sock:
        turn_until(loop, lambda: server.conns)
        conn = server.conns[0]
        data = bytes(20 << 20)
        conn.answer(AnswerObject, bytes(8), bytes(8), None, 0, bytes(20), data, None)
        conn.abort()
        size = 0
        sock.setblocking(False)

        def received() -> bool:
            nonlocal size
            try:
                chunk = sock.recv(1 << 20)
            except BlockingIOError:
                return False
            size += len(chunk)
            return not chunk

        turn_until(loop, received)
    assert size > 20 << 20


def test_abort_of_a_peer_that_never_reads(
    loop: EpollRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neo.lib.epoll.LINGER", 0.2)
    server = Peer(loop)
    address = loop.listen(("127.0.0.1", 0), server.accept)
    with plain(address):
        turn_until(loop, lambda: server.conns)
        conn = server.conns[0]
        data = bytes(20 << 20)
        conn.answer(AnswerObject, bytes(8), bytes(8), None, 0, bytes(20), data, None)
        conn.abort()
        transport = conn.transport
        assert isinstance(transport, EpollTransport)
        turn_until(loop, lambda: transport.fd < 0)


def test_peers_that_do_not_close(
    loop: EpollRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is over costs few descriptors, and not for long."""
    monkeypatch.setattr("neo.lib.epoll.DRAINING_MAX", 2)
    monkeypatch.setattr("neo.lib.epoll.DRAIN", 0.2)
    server = Peer(loop)
    address = loop.listen(("127.0.0.1", 0), server.accept)
    with plain(address) as a, plain(address) as b, plain(address) as c:
        turn_until(loop, lambda: len(server.conns) == 3)
        for conn in server.conns:
            conn.abort()
        loop.flush()
        fds = [conn.transport.fd for conn in server.conns]
        assert [fd < 0 for fd in fds] == [False, False, True]
        for sock in (a, b, c):
            assert sock.recv(100) == HANDSHAKE
            assert sock.recv(100) == b""
        a.close()
        turn_until(loop, lambda: server.conns[0].transport.fd < 0)
        turn_until(loop, lambda: server.conns[1].transport.fd < 0)
    assert not loop.draining


def test_slow_peer(loop: EpollRuntime) -> None:
    """One byte at a time."""
    server = Peer(loop)
    address = loop.listen(("127.0.0.1", 0), server.accept)
    stream = HANDSHAKE + b"\x93\x00\x18\x91\xc4\x08" + bytes(range(8))
    with plain(address) as sock:
        for i in range(len(stream)):
            sock.send(stream[i : i + 1])
            loop.turn(0.01)
        turn_until(loop, lambda: server.ttids)
        assert sock.recv(100) == HANDSHAKE
    assert server.ttids == [bytes(range(8))]


def test_big_message(loop: EpollRuntime) -> None:
    server, client, conn = pair(loop)
    server.data = os.urandom(1 << 16) * 320  # noqa: TID251 - 20 MiB
    got: list[bytes] = []
    conn.ask(AskObject, bytes(8), None, None).then(lambda *args: got.append(args[5]))
    turn_until(loop, lambda: got or client.reasons)
    assert got == [server.data]


def test_order_of_many_small_messages(loop: EpollRuntime) -> None:
    server, _, conn = pair(loop)
    expected = [i.to_bytes(8, "big") for i in range(20_000)]
    for ttid in expected:
        conn.notify(NotifyUnlockInformation, ttid)
    turn_until(loop, lambda: len(server.ttids) == len(expected))
    assert server.ttids == expected


def test_reset(loop: EpollRuntime) -> None:
    server = Peer(loop)
    address = loop.listen(("127.0.0.1", 0), server.accept)
    sock = plain(address)
    turn_until(loop, lambda: server.conns)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    turn_until(loop, lambda: server.reasons)
    assert server.reasons == [os.strerror(errno.ECONNRESET)]


def test_accept_may_close(loop: EpollRuntime) -> None:
    def accept(conn: Connection) -> None:
        conn.handler = Peer(loop)
        conn.close()

    address = loop.listen(("127.0.0.1", 0), accept)
    client = Peer(loop)
    loop.connect(address, client)
    turn_until(loop, lambda: client.reasons)


def test_listening_twice_on_one_address(loop: EpollRuntime, host: str) -> None:
    address = loop.listen((host, 0), Peer(loop).accept)
    assert address[0] == host
    with pytest.raises(OSError, match="in use"):
        loop.listen(address, Peer(loop).accept)


def test_listening_on_all_addresses(loop: EpollRuntime, host: str) -> None:
    server, client = Peer(loop), Peer(loop)
    wildcard = "::" if ":" in host else "0.0.0.0"
    _, port = loop.listen((wildcard, 0), server.accept)
    loop.connect((host, port), client)
    turn_until(loop, lambda: server.conns)
    assert (server.conns[0].address[0] == "local") is not loop.tcp_only


def test_unix_socket_that_is_taken() -> None:
    """What the local peers would find is not ours: so we don't listen at all."""
    loop = make_loop()
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(local_name(address))
        with pytest.raises(OSError, match="in use"):
            loop.listen(address, Peer(loop).accept)
        with pytest.raises(ConnectionRefusedError):
            plain(address)
    assert loop.listen(address, Peer(loop).accept) == address
    loop.close()


def test_only_a_loopback_address_has_a_unix_socket() -> None:
    for host in ("192.0.2.1", "2001:db8::1", "localhost", "127-0-0-1.example.com"):
        assert local_name((host, 10000)) is None


def test_unix_socket_whose_queue_is_full(loop: EpollRuntime) -> None:
    """TCP is used instead."""
    server, client = Peer(loop), Peer(loop)
    address = loop.listen(("127.0.0.1", 0), server.accept)
    waiting = []
    while not loop.tcp_only:
        sock = connect_local(address)
        if sock is None:
            break
        waiting.append(sock)
        assert len(waiting) < 10_000
    loop.connect(address, client)
    turn_until(loop, lambda: client.ready)
    for sock in waiting:
        sock.close()


def test_unlisten(loop: EpollRuntime) -> None:
    server, _, conn = pair(loop)
    loop.unlisten()
    with pytest.raises(ConnectionRefusedError):
        plain(conn.address)
    assert connect_local(conn.address) is None
    conn.notify(NotifyReady)
    turn_until(loop, lambda: server.ready)


def test_descriptors_exhausted(loop: EpollRuntime) -> None:
    """Who is connected goes on; new ones wait until some descriptor is free."""
    server, _, conn = pair(loop)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    extra: list[socket.socket] = [socket.socket() for _ in range(5)]
    for sock in extra:
        sock.setblocking(False)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        for sock in extra:
            sock.connect_ex(conn.address)
        for _ in range(5):
            loop.turn(0.01)
        assert len(server.conns) == 1
        got: list[object] = []
        conn.ask(AskNewOIDs, 1).then(got.append)
        turn_until(loop, lambda: got)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    turn_until(loop, lambda: len(server.conns) == 6)
    for sock in extra:
        sock.close()


# --- timers and jobs ------------------------------------------------------------------


def test_timers(loop: EpollRuntime) -> None:
    order: list[str] = []
    loop.call_later(0.02, lambda: order.append("b"))
    loop.call_later(0.01, lambda: order.append("a"))
    loop.call_later(0.015, lambda: order.append("cancelled")).cancel()
    loop.call_later(0, lambda: order.append("soon"))
    start = loop.monotonic()
    turn_until(loop, lambda: len(order) == 3)
    assert order == ["soon", "a", "b"]
    assert loop.monotonic() >= start + 0.02


def test_timer_of_zero_that_repeats_lets_others_run(loop: EpollRuntime) -> None:
    server, _, conn = pair(loop)

    def again() -> None:
        loop.call_later(0, again)

    again()
    conn.notify(NotifyReady)
    loop.turn()
    turn_until(loop, lambda: server.ready)


def test_jobs_run_elsewhere_in_order(loop: EpollRuntime) -> None:
    done: list[tuple[str, int]] = []
    threads = set()

    def job(queue: str, i: int) -> tuple[str, int]:
        threads.add(threading.current_thread().name)
        return queue, i

    for i in range(50):
        for queue in "ab":
            loop.submit(queue, lambda q=queue, i=i: job(q, i), done.append)
    turn_until(loop, lambda: len(done) == 100)
    assert threads == {"a", "b"}
    for queue in "ab":
        assert [i for q, i in done if q == queue] == list(range(50))


def test_error_of_a_job_is_its_result(loop: EpollRuntime) -> None:
    done: list[object] = []
    loop.submit("q", lambda: 1 // 0, done.append)
    turn_until(loop, lambda: done)
    assert isinstance(done[0], ZeroDivisionError)


def test_clocks(loop: EpollRuntime) -> None:
    assert abs(loop.now() - time.time()) < 5
    assert not loop.buggify("anything")


# --- the end --------------------------------------------------------------------------


def test_stop_flushes_and_gives_the_status() -> None:
    loop, other = make_loop(), make_loop()
    server = Peer(other)
    server.data = b""
    address = other.listen(("127.0.0.1", 0), server.accept)
    client = Peer(loop)
    conn = loop.connect(address, client)

    def leave() -> None:
        if not client.ready:
            loop.call_later(0.01, leave)
            return
        conn.notify(NotifyUnlockInformation, bytes(8))
        loop.stop(3)
        loop.stop(4)

    loop.call_later(0, leave)
    assert loop.run() == 3
    turn_until(other, lambda: server.reasons)
    assert server.ttids == [bytes(8)]
    assert server.reasons == ["closed by the peer"]
    other.close()
    loop.close()


@pytest.mark.parametrize("error", [BackendError("disk full"), KeyError("bug")])
def test_error_ends_the_loop(error: Exception) -> None:
    loop = make_loop()

    def fail() -> None:
        raise error

    loop.call_later(0, fail)
    assert loop.run() == 1


def test_jobs_are_finished_at_the_end() -> None:
    loop = make_loop()
    ran: list[int] = []
    loop.submit("q", lambda: ran.append(1), lambda _: None)
    loop.stop()
    assert loop.run() == 0
    assert ran == [1]


def test_call_from_a_signal_handler(loop: EpollRuntime) -> None:
    """What it wants is done even if the loop is about to sleep for ever."""
    called: list[int] = []
    previous = signal.signal(
        signal.SIGUSR1, lambda *_: loop.call_soon_threadsafe(lambda: called.append(1))
    )
    try:
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        turn_until(loop, lambda: called)
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, previous)
