"""One socket, TCP or local, in clear or with TLS, that feeds a Connection.

Who listens on a loopback address also listens on a Unix socket, whose abstract name is
made of that address: a wake-up through it takes half the time (docs/performance.md).
Who connects to a loopback address tries it first.

Whoever polls sockets (the epoll loop of daemons, the threads of a client) calls
`readable()` and `writable()`, and waits for what `wants_write` says. No method blocks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import time
from abc import abstractmethod
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Any

from .runtime import Runtime, Throttle, Transport
from .tls import ALERT, CLIENT_HELLO, TLSStream, explain
from .util import Address, format_address

if TYPE_CHECKING:
    from .connection import Connection

# Bytes on their way through a Unix socket, if the system allows it: fewer wake-ups.
LOCAL_BUFFER = 1 << 20
DRAIN = 2.0  # seconds that a peer has to close, once all was sent to it
LOOK = 0.05  # seconds between two looks whether somebody listens
DRAINING_MAX = 64  # connections of a process that wait for it
_UCRED = Struct("3i")  # pid, uid, gid of a peer
# With these, a peer whose machine vanished is noticed after about 90 s.
KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 60),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
)


# Who listens on all addresses does so on this one of the loopback interface.
_WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def local_name(address: Address) -> bytes | None:
    """Name of the Unix socket that stands for a loopback address, else None.

    No other address will do: who connects to another machine must not end up with what
    a stranger made on this one.
    """
    host, port = address
    if not (host.startswith("127.") or host == "::1"):
        return None
    return f"\0neo/{format_address((host, port))}".encode()


def listen_local(address: Address) -> socket.socket | None:
    """The Unix socket beside the listening address; OSError if it is taken."""
    host, port = address
    name = local_name((_WILDCARDS.get(host, host), port))
    if name is None:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(name)
    except OSError:
        sock.close()
        raise
    return sock


def connect_local(address: Address) -> socket.socket | None:
    """Connected to who listens on a loopback address of this machine, if it can be."""
    name = local_name(address)
    if name is None:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.connect(name)
    except OSError:  # not a node of ours, or busy: TCP tells
        sock.close()
        return None
    return sock


def start_when_allowed(
    runtime: Runtime,
    throttle: Throttle,
    address: Address,
    start: Callable[[socket.socket | None], object],
) -> None:
    """Call `start` when the throttle allows it; earlier with a Unix socket that appears
    where nobody listened: the cluster is being started.
    """
    now = time.monotonic()
    delay = throttle.delay(address, now)
    due = now + delay
    if not throttle.was_refused(address) or local_name(address) is None:
        runtime.call_later(delay, lambda: start(None))
        return

    def look() -> None:
        local = connect_local(address)
        left = due - time.monotonic()
        if local is not None or left <= 0:
            start(local)
        else:
            runtime.call_later(min(LOOK, left), look)

    runtime.call_later(min(LOOK, delay), look)


def peer_of(sock: socket.socket, address: Any) -> Address:
    """Address of who was accepted; with a Unix socket, its process id as port."""
    if sock.family != socket.AF_UNIX:
        host, port = address[:2]
        return host, port
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return "local", _UCRED.unpack(credentials)[0]


def configure(sock: socket.socket) -> None:
    """Options of every connected socket."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_BUFFER)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def new_socket(address: Address) -> socket.socket:
    """A socket of the address' family."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM)


class SocketTransport(Transport):
    """The socket of one connection.

    The owner implements `changed` (`wants_write` may have changed, or the socket is
    closed: `fd` is then -1), `flush_soon` and `drain`.

    Closing a socket that has unread input resets the connection: the peer may never see
    the last packets, which say why. So the end of the output is told first, and what
    still comes is read and dropped until the peer closes too.
    """

    conn: Connection

    def __init__(self, sock: socket.socket, tls: TLSStream | None) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.tls = tls
        self.connecting = False
        self.finishing = False
        self.draining = False  # all is sent, what comes is dropped
        # Bytes for the socket, as they go on the wire.
        self._unsent: bytes | memoryview = b""
        self._first = True

    @abstractmethod
    def changed(self) -> None:
        """See the class."""

    @abstractmethod
    def drain(self) -> None:
        """`draining` is set: call `close` in `DRAIN` seconds, or now."""

    @abstractmethod
    def refused(self) -> None:
        """Nobody listens at the address."""

    @property
    def wants_write(self) -> bool:
        """Whether to call `writable` when the socket is."""
        return self.connecting or bool(self._unsent)

    # --- connection -----------------------------------------------------------------

    def connect(self, address: Address, local: socket.socket | None) -> None:
        """Start connecting; the outcome comes to `writable`.

        `local`: connected already, through a Unix socket.
        """
        self.connecting = True
        local = local or connect_local(address)
        if local is not None:
            # Others know the number of our descriptor.
            os.dup2(local.fileno(), self.sock.detach(), inheritable=False)
            local.close()
            family, kind = socket.AF_UNIX, socket.SOCK_STREAM
            self.sock = type(self.sock)(family, kind, fileno=self.fd)
        configure(self.sock)
        if local is not None:
            return
        status = self.sock.connect_ex(address)
        if status not in (0, errno.EINPROGRESS):
            self._unreachable(status)

    def accepted(self) -> None:
        """The peer connected to us."""
        configure(self.sock)
        if self.tls is None:
            self.conn.established()

    def _connected(self) -> None:
        self.connecting = False
        status = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if status:
            self._unreachable(status)
        elif self.tls is None:
            self.conn.established()
        else:
            self._shake()

    def _unreachable(self, status: int) -> None:
        if status == errno.ECONNREFUSED:
            self.refused()
        self._fail(os.strerror(status))

    def _shake(self) -> bool:
        """Go on with the TLS handshake; true if it is over."""
        assert self.tls is not None
        try:
            ready = self.tls.handshake()
        except ssl.SSLError as error:
            # The alert tells the peer why.
            self._unsent = bytes(self._unsent) + self.tls.outgoing.read()
            self._push()
            text = f"TLS handshake failed: {explain(error)}"
            self.conn.log.throttled(
                ("tls", self.conn.address[0], text), 30, "%s: %s", self.conn, text
            )
            self._fail(text)
            return False
        self._unsent = bytes(self._unsent) + self.tls.outgoing.read()
        if not self._push() and self.fd < 0:
            return False
        if ready:
            self.conn.established()
        return ready

    # --- events -----------------------------------------------------------------------

    def readable(self) -> None:
        """Read once and feed the connection."""
        if self.connecting:
            self.writable()
            if self.connecting or self.fd < 0:
                return
        try:
            data = self.sock.recv(self.conn.read_size)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(os.strerror(error.errno or 0))
            return
        self.received(data)

    def received(self, data: bytes) -> None:
        """Feed the connection with what was read; b"": the peer closed."""
        if not data:
            self._fail("closed by the peer")
        elif self.finishing:
            pass  # aborted: nothing is processed any more
        elif self.tls is None:
            self.conn.receive(data)
        else:
            self._decrypt(data)

    def _decrypt(self, data: bytes) -> None:
        assert self.tls is not None
        if self._first:
            self._first = False
            if self.conn.incoming and data[0] != CLIENT_HELLO:
                text = "the peer does not speak TLS, and this node requires it"
                with contextlib.suppress(OSError):
                    self.sock.send(ALERT)  # from which a node of ours understands
                self.conn.log.throttled(
                    ("tls", self.conn.address[0]), 30, "%s: %s", self.conn, text
                )
                self._fail(text)
                return
        self.tls.incoming.write(data)
        if not self.tls.ready and not self._shake():
            return
        try:
            clear = self.tls.read()
        except ssl.SSLError as error:
            text = f"TLS error: {explain(error)}"
            self.conn.log.throttled(
                ("tls", self.conn.address[0], text), 30, "%s: %s", self.conn, text
            )
            self._fail(text)
            return
        if clear:
            self.conn.receive(clear)

    def writable(self) -> None:
        """Go on connecting or sending."""
        if self.connecting:
            self._connected()
        if self.fd >= 0 and not self.connecting:
            self.flush()

    def flush(self) -> None:
        """Send what the connection queued, as far as the socket takes it."""
        if self.fd < 0 or self.connecting:
            return
        conn = self.conn
        while self._unsent or (conn.out and (self.tls is None or self.tls.ready)):
            if not self._unsent:
                data = conn.take()
                conn.sent(len(data))
                if self.tls is not None:
                    self.tls.write(data)
                    data = self.tls.outgoing.read()
                self._unsent = data
            if not self._push():
                return
        if self.finishing and not self.draining:
            self._end_output()

    def _end_output(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
        else:
            self.draining = True
            self.drain()

    def _push(self) -> bool:
        """Send; true if nothing is left for later."""
        data = self._unsent
        try:
            size = self.sock.send(data) if data else 0
        except (BlockingIOError, InterruptedError):
            size = 0
        except (BrokenPipeError, ConnectionResetError):
            # The peer left. What it said before may not be read yet; its end follows.
            size = len(data)
        except OSError as error:
            self._fail(os.strerror(error.errno or 0))
            return False
        self._unsent = b"" if size == len(data) else memoryview(data)[size:]
        self.changed()
        return not self._unsent

    # --- end --------------------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        self.close()
        self.conn.lost(reason)

    def close(self) -> None:
        """Close the socket at once."""
        if self.fd >= 0:
            self.fd = -1
            self._unsent = b""
            self.changed()
            self.sock.close()

    def finish(self) -> None:
        """Send what is queued, then close."""
        self.finishing = True
        if self.connecting or not self.conn.is_established:
            self.close()
        else:
            self.flush_soon()
