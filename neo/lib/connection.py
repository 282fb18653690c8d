"""One peer as a state machine: bytes in, packets; ask, answer, notify, bytes out.

Life: created by a Runtime, `established()` once bytes can flow, `receive()` for what
arrives, `lost()` when the peer is gone. Node logic calls `close()` (at once) or
`abort()` (no more input, output flushed). `handler.closed()` follows exactly once,
whoever closes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import closing
from hashlib import sha1
from typing import TYPE_CHECKING, Any, ParamSpec

from .codec import NO_ID, Decoder, Malformed, Message, pack
from .exception import ProtocolError
from .handler import Closing, Handler, Refused, refuse
from .node import nid_str
from .protocol import (
    BY_CODE,
    HANDSHAKE,
    MAX_MESSAGE_ID,
    PROTOCOL_VERSION,
    RESPONSE,
    Error,
    ErrorCode,
    Packet,
    Ping,
)
from .util import Address, Pieces, format_address

if TYPE_CHECKING:
    from .logger import Logger
    from .node import Node
    from .runtime import Runtime, Transport

P = ParamSpec("P")

# Bytes that one peer may cost: before it is identified, and then.
INPUT_LIMIT_UNKNOWN = 1 << 16
LIMIT = 256 << 20
# Bytes of answers that are not held back until all that came along is answered: the
# peer can use them meanwhile.
EAGER = 4 << 10
# Bytes read at once; and in the middle of a big message.
CHUNK = 1 << 16
BIG_CHUNK = 1 << 18
# Bytes per second of a message that is worth waiting for.
SLOWEST = 1 << 16
# Between two looks for silence, at least (s): the rest of a wait may be no more than
# what was lost in its rounding, which never ends.
SOON = 0.01

_ERROR = Error.code
_CLOSING = Closing()


class Request:
    """A question that waits for its answer.

    Without callbacks, the answer goes to the method of the handler that asked; if that
    handler was replaced meanwhile (its phase is over), it is dropped.
    """

    __slots__ = ("done", "failed", "handler", "msg_id", "over", "packet")

    def __init__(self, packet: Packet[...], handler: Handler) -> None:
        self.packet = packet
        self.msg_id = -1  # of the packet; notifications that answer it carry it too
        self.handler = handler
        self.done: Callable[..., object] | None = None
        self.failed: Callable[[int | None, str], object] | None = None
        self.over = False

    def then(
        self,
        done: Callable[..., object],
        failed: Callable[[int | None, str], object] | None = None,
    ) -> Request:
        """Call `done(*arguments)` with the answer, or `failed(code, text)`.

        `code` is the error's, or None if the connection is gone: then `failed` is
        called, at once if that happened before. For a request that is answered by
        Error, ACK calls `done(text)`.
        """
        self.done, self.failed = done, failed
        if self.over and failed is not None:
            failed(None, "connection closed")
        return self


class Reply:
    """The right to answer one request later (`Connection.defer`)."""

    __slots__ = ("conn", "msg_id")

    def __init__(self, conn: Connection, msg_id: int) -> None:
        self.conn = conn
        self.msg_id = msg_id

    @property
    def closed(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.conn.closed

    def answer(self, packet: Packet[P], *args: P.args, **_: P.kwargs) -> None:
        """Send the answer."""
        self.conn.send(packet, self.msg_id, args)

    def error(self, code: ErrorCode, text: str = "") -> None:
        """Send an Error as answer."""
        self.conn.error(self.msg_id, code, text)

    def refuse(self, error: Refused) -> None:
        """Send what `error` stands for."""
        refuse(self.conn, self.msg_id, error)


class Connection:
    """One peer. `node` is who it is, once identified."""

    def __init__(
        self,
        runtime: Runtime,
        transport: Transport,
        address: Address,
        handler: Handler,
        incoming: bool,
    ) -> None:
        self.runtime = runtime
        self.log: Logger = runtime.log
        self.transport = transport
        self.address = address
        self.handler = handler
        self.incoming = incoming
        self.node: Node | None = None
        self.closed = False  # for node logic; output may still be flushed
        self.is_established = False
        self.packets_received = 0
        self.message_id = 0  # of the packet being handled
        self.out: list[bytes] = []
        self.out_size = 0
        self._waits = False  # `out` goes with the next packet, or at `flush_waiting`
        self.last_received = 0.0
        self.reason = ""  # why it was closed, for messages
        self._peer = f"None ({format_address(address)})"
        self._decoder = Decoder(INPUT_LIMIT_UNKNOWN)
        self._handshake = b""
        self._full = False  # the peer does not read
        self._next_id = 0
        self._pending: dict[int, Request] = {}
        self._paused: deque[Message] | None = None

    def __str__(self) -> str:
        return self._peer

    def __repr__(self) -> str:
        return f"<Connection {'from' if self.incoming else 'to'} {self._peer}>"

    # --- identity -----------------------------------------------------------------

    def set_node(self, node: Node | None) -> None:
        """Say who the peer is; it may then send more than a greeting."""
        self.node = node
        self._peer = (
            f"{nid_str(node.nid if node else None)} ({format_address(self.address)})"
        )
        self.trust()

    def trust(self) -> None:
        """Lift the limit on the size of what the peer sends."""
        self._decoder.limit = LIMIT

    @property
    def read_size(self) -> int:
        """How much to read at once (bytes)."""
        return CHUNK if self._decoder.incomplete < CHUNK // 2 else BIG_CHUNK

    @property
    def pending(self) -> int:
        """Number of answers owed by the peer."""
        return len(self._pending)

    # --- output -------------------------------------------------------------------

    def send(self, packet: Packet[...], msg_id: int, args: tuple[Any, ...]) -> None:
        """Queue a packet; dropped if the connection is closed."""
        if not self.closed:
            self._write(self._encode(packet, msg_id, args))

    def send_stream(
        self, packet: Packet[...], msg_id: int, args: tuple[Any, ...]
    ) -> None:
        """As `send`; one of `args` is `Pieces`: each is on its way before the next."""
        at = next(i for i, arg in enumerate(args) if type(arg) is Pieces)
        size, parts = args[at]
        with closing(parts):
            if self.closed:
                return
            head = b"".join(
                (
                    b"\x93",
                    pack(msg_id),
                    pack(packet.code),
                    bytes((0x90 | len(args),)),
                    *map(pack, args[:at]),
                    b"\xc6",
                    size.to_bytes(4, "big"),
                )
            )
            self._write(head)
            for part in parts:
                self._write(part)
                self.transport.flush()
                if self.closed:
                    return
        self._write(b"".join(map(pack, args[at + 1 :])))
        if self.log.tracing:
            # To put them together for the log would cost as much as to read them.
            self.log.message(True, self._peer, msg_id, packet.code, None)

    def _encode(self, packet: Packet[...], msg_id: int, args: tuple[Any, ...]) -> bytes:
        data: bytes = pack((msg_id, packet.code, args))
        if self.log.tracing:
            self.log.message(True, self._peer, msg_id, packet.code, data)
        return data

    def _write(self, data: bytes) -> None:
        if self._full:
            return
        if not self.out or self._waits:
            self._waits = False
            self.transport.flush_soon()
        self._queue(data)

    def _queue(self, data: bytes) -> None:
        self.out.append(data)
        self.out_size += len(data)
        if self.out_size > LIMIT:
            # Closed in the next turn: who sends, perhaps to many, must not lose one of
            # them in the middle. Nothing follows what is queued.
            self._full = True
            reason = f"the peer does not read: {self.out_size} bytes queued"
            self.runtime.call_later(0, lambda: self.close(reason))

    def _new_id(self) -> int:
        msg_id = self._next_id
        self._next_id = (msg_id + 1) & MAX_MESSAGE_ID
        return msg_id

    def ask(self, packet: Packet[P], *args: P.args, **_: P.kwargs) -> Request:
        """Send a request; see Request for where the answer goes."""
        request = Request(packet, self.handler)
        if self.closed:
            request.over = True
            return request
        request.msg_id = msg_id = self._next_id
        self._next_id = (msg_id + 1) & MAX_MESSAGE_ID
        self._pending[msg_id] = request
        self.send(packet, msg_id, args)
        return request

    def notify(self, packet: Packet[P], *args: P.args, **_: P.kwargs) -> None:
        """Send a notification."""
        if not self.closed:
            self.send(packet, self._new_id(), args)

    def notify_encoded(self, packet: Packet[...], tail: bytes) -> None:
        """As `notify`, with what `encode_tail` made: once for many peers."""
        if not self.closed:
            self._write(self._notification(packet, tail))

    def notify_later(self, packet: Packet[...], tail: bytes) -> None:
        """As `notify_encoded`, but sent with what follows, or by `flush_waiting`."""
        if not (self.closed or self._full):
            self._waits = self._waits or not self.out
            self._queue(self._notification(packet, tail))

    def answer_later(self, packet: Packet[P], *args: P.args, **_: P.kwargs) -> None:
        """As `answer`, but sent with what follows, or by `flush_waiting`."""
        if not (self.closed or self._full):
            self._waits = self._waits or not self.out
            self._queue(self._encode(packet, self.message_id, args))

    def flush_waiting(self) -> None:
        """Send what `notify_later` and `answer_later` left."""
        if self._waits:
            self._waits = False
            self.transport.flush_soon()

    def _notification(self, packet: Packet[...], tail: bytes) -> bytes:
        msg_id = self._new_id()
        data: bytes = b"\x93" + pack(msg_id) + tail
        if self.log.tracing:
            self.log.message(True, self._peer, msg_id, packet.code, data)
        return data

    def answer(self, packet: Packet[P], *args: P.args, **_: P.kwargs) -> None:
        """Answer the request being handled."""
        self.send(packet, self.message_id, args)

    def defer(self) -> Reply:
        """Take the right to answer the request being handled later."""
        return Reply(self, self.message_id)

    def error(self, msg_id: int, code: ErrorCode, text: str = "") -> None:
        """Send an Error as response to packet `msg_id` of the peer."""
        self.send(Error, msg_id, (int(code), text.encode()))

    def acknowledge(self, text: str = "") -> None:
        """Answer the request being handled with success."""
        self.error(self.message_id, ErrorCode.ACK, text)

    def take(self) -> bytes:
        """What must be sent now, for the transport."""
        out = self.out
        data = out[0] if len(out) == 1 else b"".join(out)
        self.out = []
        return data

    def sent(self, size: int) -> None:
        """`size` bytes left for the peer."""
        self.out_size -= size

    # --- life -----------------------------------------------------------------------

    def established(self) -> None:
        """Bytes can flow: greet, and let the one who connects go on."""
        self.is_established = True
        self.last_received = self.runtime.monotonic()
        self._write(HANDSHAKE)
        if not self.incoming:
            self.handler.connected(self)

    def close(self, reason: str = "closed here") -> None:
        """Close at once; queued output is dropped."""
        if not self.closed:
            self._end(reason)
            self.transport.close()

    def abort(self, reason: str = "closed here") -> None:
        """Process no more input, send what is queued, then close."""
        if not self.closed:
            self._end(reason)
            self.transport.finish()

    def lost(self, reason: str) -> None:
        """The peer closed, or couldn't be reached (the transport is closed already)."""
        if not self.closed:
            self._end(reason)

    def _end(self, reason: str) -> None:
        self.closed = True
        self.reason = reason
        self._paused = None
        handler, self.handler = self.handler, _CLOSING
        pending, self._pending = self._pending, {}
        self.log.debug("%s: connection closed: %s", self, reason)
        handler.closed(self)
        for request in pending.values():
            request.over = True
            if request.failed is not None:
                request.failed(None, reason)

    def watch_silence(
        self,
        ping_after: float,
        limit: float,
        *,
        only_if_owed: bool = False,
        allowed: Callable[[], bool] = lambda: True,
        unless: Callable[[], bool] = lambda: False,
    ) -> None:
        """Close the connection if the peer sends no byte for `limit` seconds.

        Nor if it sends only what nobody asked for: after a damaged byte, the rest of
        the stream may be one endless message for the decoder of either side, whatever
        passes in the other direction. So a request that stays the first one is followed
        by a Ping, whose answer must come.

        A Ping goes out after `ping_after`. `only_if_owed`: only while an answer is due.
        `allowed` is asked before closing; if not, again later. `unless`: while this is
        true, no Ping may be sent, and silence is normal. The time during which this
        process itself did not run (paused, or starved) does not count.
        """
        due = self.runtime.monotonic() + ping_after
        first: Request | None = None  # that waits for its answer
        pinged: tuple[float, int] | None = None  # when, bytes of a message before

        def pong() -> None:
            nonlocal pinged
            pinged = None

        def deafness(now: float, late: float) -> float:
            """Seconds for which the peer answered nothing, though it was asked."""
            nonlocal first, pinged
            request = next(iter(self._pending.values()), None)
            if request is not first or request is None or unless():
                first, pinged = request, None
                return 0.0
            size = self._decoder.incomplete
            if pinged is None:
                self.ask(Ping).then(pong)
            else:
                start, before = pinged[0] + late, pinged[1]
                if size - before <= SLOWEST * (now - start):
                    pinged = start, before
                    return ping_after + now - start
            pinged = now, size  # also if a large message takes its time
            return 0.0

        def tick() -> None:
            nonlocal due
            if self.closed:
                return
            now = self.runtime.monotonic()
            # What came meanwhile is perhaps not read yet.
            late = now - due
            self.last_received += late
            if (only_if_owed and not self._pending) or unless():
                self.last_received = now  # silence counts from here, if one gets due
            silence = now - self.last_received
            silent = max(silence, deafness(now, late))
            if silent >= limit and allowed():
                self.log.warning("%s: silent for %.0f s: closed", self, silent)
                self.close("silent")
                return
            if ping_after <= silence < limit:
                self.ask(Ping).then(lambda: None)
            delay = ping_after
            if ping_after <= silence < limit:
                delay = max(limit - silence, SOON)
            due = now + delay
            self.runtime.call_later(delay, tick)

        self.runtime.call_later(ping_after, tick)

    # --- input ----------------------------------------------------------------------

    def pause(self) -> None:
        """Keep what is received, undispatched and in order, until `resume`."""
        if self._paused is None and not self.closed:
            self._paused = deque()

    def resume(self) -> None:
        """Dispatch what was kept, and go on."""
        kept, self._paused = self._paused, None
        try:
            while kept and not self.closed:
                if self._paused is not None:
                    self._paused.extend(kept)
                    return
                self._dispatch(*kept.popleft())
        except Malformed as error:
            self._malformed(error)

    def sha1_of(self, data: bytes) -> bytes:
        """SHA-1 of what came in a packet: made already if that was big."""
        hashed = self._decoder.hashed
        if hashed is not None and hashed[0] is data:
            self._decoder.hashed = None
            return hashed[1]
        return sha1(data).digest()

    @property
    def is_greeted(self) -> bool:
        """Whether the peer has proved to speak this protocol."""
        return self._handshake is None

    def receive(self, data: bytes) -> None:
        """Handle bytes of the peer."""
        self.last_received = self.runtime.monotonic()
        if self._handshake is not None and not self.closed:
            data = self._greeting(data)
            if not data:
                return
        try:
            for message in self._decoder.feed(data):
                if self._paused is not None:
                    self._paused.append(message)
                else:
                    self._dispatch(*message)
                    if self.out_size > EAGER:
                        self.transport.flush()
        except Malformed as error:
            self._malformed(error)

    def _malformed(self, error: Malformed) -> None:
        if not self.closed:
            self.log.throttled(
                ("malformed", self.address[0]),
                30,
                "%s: closed, invalid data: %s",
                self,
                error,
            )
            self.close(f"invalid data: {error}")

    def _greeting(self, data: bytes) -> bytes:
        """Check the first bytes of the stream; return what follows them."""
        received = self._handshake + data
        if received[: len(HANDSHAKE)] == HANDSHAKE:
            self._handshake = None  # type: ignore[assignment]
            return received[len(HANDSHAKE) :]
        if HANDSHAKE.startswith(received):
            self._handshake = received
            return b""
        if received.startswith(HANDSHAKE[:-1]):
            text = (
                f"Protocol version mismatch: {PROTOCOL_VERSION} expected, "
                f"the peer speaks {received[len(HANDSHAKE) - 1]}"
            )
        elif received[0] == 0x16 or received.startswith(b"\x15\x03"):
            text = "the peer speaks TLS, and this node does not"
        else:
            text = f"the peer does not speak NEO: {received[:16]!r}"
        self.log.throttled(
            ("greeting", self.address[0], text[:20]), 30, "%s: closed: %s", self, text
        )
        self.close(text)
        return b""

    def _dispatch(
        self, msg_id: int, code: int, args: tuple[Any, ...], data: bytes | None
    ) -> None:
        packet = BY_CODE.get(code)
        if packet is None:
            raise Malformed(f"unknown packet code {code:#x}")
        if self.closed:
            return
        if self.log.tracing:
            if data is None:
                self.log.packet(False, self._peer, msg_id, code, args)
            else:
                self.log.message(False, self._peer, msg_id, code, data)
        self.packets_received += 1
        self.message_id = msg_id
        try:
            if not packet.valid(args):
                raise ProtocolError(packet.explain(args))
            if code & RESPONSE:
                self._response(packet, msg_id, args)
            else:
                entry = self.handler.table.get(code)
                if entry is None:
                    raise ProtocolError(
                        f"{packet.name} unexpected by {type(self.handler).__name__}"
                    )
                entry[1](self, *args)
        except Refused as error:
            refuse(self, msg_id, error)
        except ProtocolError as error:
            if not self.closed:
                self.log.throttled(
                    ("protocol", packet.name, self.address[0]),
                    30,
                    "%s: closed: %s",
                    self,
                    error,
                )
                if msg_id != NO_ID:
                    self.error(msg_id, ErrorCode.PROTOCOL_ERROR, str(error))
                self.abort(str(error))

    def _response(
        self, packet: Packet[...], msg_id: int, args: tuple[Any, ...]
    ) -> None:
        request = self._pending.get(msg_id)
        if packet.code == _ERROR:
            code, text = args[0], args[1].decode(errors="replace")
            if request is None:
                if msg_id == NO_ID:
                    self.log.throttled(
                        ("complaint", self.address[0]),
                        30,
                        "%s: did not expect an answer of ours: %s",
                        self,
                        text,
                    )
                self.handler.error(self, None, code, text)
                return
            del self._pending[msg_id]
            if request.packet.answer is Error and code == ErrorCode.ACK:
                if request.done is not None:
                    request.done(text)
            elif request.failed is not None:
                request.failed(code, text)
            elif request.handler is self.handler:
                self.handler.error(self, request.packet, code, text)
            return
        if request is None or request.packet.answer is not packet:
            raise ProtocolError(f"{packet.name} {msg_id} answers no request")
        del self._pending[msg_id]
        if request.done is not None:
            request.done(*args)
        elif request.handler is self.handler:
            entry = self.handler.table.get(packet.code)
            if entry is None:
                raise ProtocolError(f"{packet.name} unexpected")
            entry[1](self, *args)


def encode_tail(packet: Packet[P], *args: P.args, **_: P.kwargs) -> bytes:
    """Code and arguments of a notification, encoded once for `notify_encoded`."""
    return bytes(pack(packet.code) + pack(args))
