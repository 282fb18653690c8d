"""One TCP socket, in clear or with TLS, that feeds a Connection.

Whoever polls sockets (the epoll loop of daemons, the threads of a client) calls
`readable()` and `writable()`, and waits for what `wants_write` says. No method blocks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
from abc import abstractmethod
from typing import TYPE_CHECKING

from .runtime import Transport
from .tls import ALERT, CLIENT_HELLO, TLSStream, explain
from .util import Address

if TYPE_CHECKING:
    from .connection import Connection

CHUNK = 1 << 16  # bytes read at once
DRAIN = 2.0  # seconds that a peer has to close, once all was sent to it
DRAINING_MAX = 64  # connections of a process that wait for it
# With these, a peer whose machine vanished is noticed after about 90 s.
KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 60),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
)


def configure(sock: socket.socket) -> None:
    """Options of every connected socket."""
    sock.setblocking(False)
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

    @property
    def wants_write(self) -> bool:
        """Whether to call `writable` when the socket is."""
        return self.connecting or bool(self._unsent)

    # --- connection -----------------------------------------------------------------

    def connect(self, address: Address) -> None:
        """Start connecting; the outcome comes to `writable`."""
        configure(self.sock)
        self.connecting = True
        status = self.sock.connect_ex(address)
        if status not in (0, errno.EINPROGRESS):
            self._fail(os.strerror(status))

    def accepted(self) -> None:
        """The peer connected to us."""
        configure(self.sock)
        if self.tls is None:
            self.conn.established()

    def _connected(self) -> None:
        self.connecting = False
        status = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if status:
            self._fail(os.strerror(status))
        elif self.tls is None:
            self.conn.established()
        else:
            self._shake()

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
            data = self.sock.recv(CHUNK)
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
