"""A Runtime, transports and handlers for tests of one connection; recorded packets."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random  # noqa: TID251 - seeded
from typing import Any

from msgpack import ExtType

from neo.lib.codec import Decoder, pack
from neo.lib.connection import LIMIT, Connection
from neo.lib.handler import Handler
from neo.lib.logger import Logger
from neo.lib.protocol import BY_CODE, HANDSHAKE, Error, Packet, decode_extension
from neo.lib.runtime import HeapTimer

VECTORS = Path(__file__).parent / "vectors"


class FakeRuntime:
    """Clocks that move by `advance()`; connections are made by `connect()` below."""

    def __init__(self) -> None:
        self.log: Any = Logger(console=False)
        self.rng = Random(0)
        self.time = 1000.0
        self.connections: list[Connection] = []  # those that the node opened
        self.succeeded: list[Any] = []
        self._timers: list[tuple[float, int, HeapTimer]] = []
        self._order = count()

    def now(self) -> float:
        return 1.8e9 + self.time

    def monotonic(self) -> float:
        return self.time

    def call_later(self, delay: float, callback: Callable[[], object]) -> HeapTimer:
        timer = HeapTimer(callback)
        heapq.heappush(self._timers, (self.time + delay, next(self._order), timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Let time pass, timer by timer."""
        end = self.time + seconds
        while self._timers and self._timers[0][0] <= end:
            due, _, timer = heapq.heappop(self._timers)
            self.time = max(self.time, due)
            if timer.callback is not None:
                timer.callback()
        self.time = end

    def pause(self, seconds: float) -> None:
        """Let time pass while the process does not run; its timers come late."""
        self.time += seconds
        self.advance(0)

    def connect(self, address: Any, handler: Handler) -> Connection:
        conn = connection(handler, runtime=self, address=address, incoming=False)
        self.connections.append(conn)
        return conn

    def connection_succeeded(self, address: Any) -> None:
        self.succeeded.append(address)

    def buggify(self, _name: str) -> bool:
        return False


class FakeTransport:
    """Remembers what was asked."""

    def __init__(self) -> None:
        self.conn: Connection
        self.flushes = 0
        self.segments: list[bytes] = []  # sent before the end of a turn
        self.closed = False
        self.finished = False

    def flush_soon(self) -> None:
        self.flushes += 1

    def flush(self) -> None:
        data = self.conn.take()
        self.conn.sent(len(data))
        self.segments.append(data)

    def close(self) -> None:
        self.closed = True

    def finish(self) -> None:
        self.finished = True


class Recorder(Handler):
    """Foresees every packet but those of `refused`; remembers what came."""

    def __init__(self, *refused: Packet[...]) -> None:
        super().__init__()
        self.received: list[tuple[int, Packet[...], tuple[Any, ...]]] = []
        self.errors: list[tuple[Packet[...] | None, int, str]] = []
        self.closings = 0
        self.connections = 0
        for code, packet in BY_CODE.items():
            if packet not in (Error, *refused):
                self.table[code] = packet, self._receiver(packet)

    def _receiver(self, packet: Packet[...]) -> Callable[..., None]:
        return lambda conn, *args: self.received.append((conn.message_id, packet, args))

    def connected(self, conn: Connection) -> None:
        self.connections += 1

    def closed(self, conn: Connection) -> None:
        assert conn.closed
        self.closings += 1

    def error(
        self, conn: Connection, packet: Packet[...] | None, code: int, text: str
    ) -> None:
        self.errors.append((packet, code, text))


def connection(
    handler: Handler,
    *,
    runtime: FakeRuntime | None = None,
    address: Any = ("127.0.0.1", 10000),
    incoming: bool = True,
) -> Connection:
    """A connection that is not established yet."""
    transport = FakeTransport()
    runtime = runtime or FakeRuntime()
    conn = Connection(runtime, transport, address, handler, incoming)
    transport.conn = conn
    return conn


def established(handler: Handler, **options: Any) -> Connection:
    """A connection past the handshake, without output."""
    conn = connection(handler, **options)
    conn.established()
    conn.receive(HANDSHAKE)
    assert output(conn) == HANDSHAKE
    return conn


def output(conn: Connection) -> bytes:
    """Take what would be sent."""
    if not conn.out:
        return b""
    data = conn.take()
    conn.sent(len(data))
    return data


def messages(conn: Connection) -> list[tuple[int, int, tuple]]:
    """Take what would be sent, decoded."""
    return [message[:3] for message in Decoder(LIMIT).feed(output(conn))]


def feed(conn: Connection, msg_id: int, packet: Packet[...], *args: object) -> None:
    """Let the peer send a packet."""
    conn.receive(pack((msg_id, packet.code, args)))


# --- vectors ----------------------------------------------------------------------


def value(encoded: Any) -> Any:
    """Python value, as our decoder gives it, of an argument in a vector."""
    if isinstance(encoded, list):
        return tuple(map(value, encoded))
    if isinstance(encoded, dict):
        ((kind, content),) = encoded.items()
        if kind == "b":
            return bytes.fromhex(content)
        if kind == "ext":
            return decode_extension(content[0], bytes.fromhex(content[1]))
        return {value(k): value(v) for k, v in content}
    assert not isinstance(encoded, ExtType)
    return encoded


def packet_vectors() -> Iterator[dict[str, Any]]:
    """Lines of packets.jsonl, `args` as Python values and `hex` as bytes."""
    with open(VECTORS / "packets.jsonl") as lines:
        for line in lines:
            vector = json.loads(line)
            vector["args"] = value(vector["args"])
            vector["data"] = bytes.fromhex(vector["hex"])
            yield vector


CONVERSATIONS = sorted(path.stem for path in VECTORS.glob("conv-*.jsonl"))


def conversation(name: str) -> list[dict[str, Any]]:
    """Lines of a recorded conversation, `hex` as bytes."""
    with open(VECTORS / f"{name}.jsonl") as file:
        lines = [json.loads(line) for line in file]
    for line in lines:
        line["data"] = bytes.fromhex(line["hex"])
    return lines
