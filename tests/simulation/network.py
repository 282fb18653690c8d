"""Virtual network: ordered streams of bytes between processes.

A connection is two pipes. What a process writes is cut into segments at random places;
each arrives after a delay, in order within its pipe; different pipes overtake each
other freely. A pipe holds a bounded number of bytes, like the buffers of two kernels:
beyond, the writer keeps its output.

Links, between two processes by name and directed, carry the faults: a clogged link
delivers nothing until it is released (bytes are late, not lost: TCP repeats them), a
refusing one accepts no new connection. A reset cuts the pipes of existing ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from neo.lib.connection import Connection
from neo.lib.handler import Closing, Handler
from neo.lib.util import Address

if TYPE_CHECKING:
    from .runtime import Process, SimRuntime, Simulation

GARBAGE = b"\xc1"  # means nothing in msgpack
CHUNK = 1 << 16  # bytes delivered at once
WINDOW = 1 << 18  # bytes of one direction that the kernels hold
LINGER = 10.0
KEEPALIVE = 90.0  # seconds after which the kernel notices a machine that vanished
# When a first packet that gets lost is repeated, as Linux does; then it is given up.
SYN_RETRIES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

RESET = "Connection reset by peer"
EOF = "closed by the peer"


class Link:
    """The way from one process to another."""

    def __init__(self, sim: Simulation) -> None:
        rng = sim.rng("network")
        low, high = sim.latency
        self._rng = rng
        self._mu = math.log(low) + rng.random() * math.log(high / low)
        self.clogged = False
        self.refused = False
        self.damage = 0.0  # probability that a packet arrives as garbage
        self.stalled: list[Callable[[], object]] = []  # what to do once released

    def delay(self) -> float:
        """Seconds that the next segment takes."""
        return math.exp(self._rng.gauss(self._mu, 0.5))


class Pipe:
    """One direction of a connection."""

    def __init__(self, sim: Simulation, src: SimTransport, dst: SimTransport) -> None:
        self.sim = sim
        self.src = src
        self.dst = dst
        self.link = sim.link(src.process.name, dst.process.name)
        self._incarnation = dst.process.incarnation
        # (time of arrival, bytes, or the reason why the stream ends here)
        self.queue: deque[tuple[float, bytes | str]] = deque()
        self.size = 0
        self.last = 0.0  # arrival of the last segment
        self.ended = False
        self._scheduled = False

    def write(self, data: bytes, is_start: bool) -> None:
        """Send bytes, cut at random. `is_start`: a packet begins here."""
        rng = self.sim.rng("network")
        self.size += len(data)
        if is_start and self.link.damage and rng.random() < self.link.damage:
            # No checksum protects a value in a packet, so what garbles it may pass
            # unnoticed: here it is the beginning, which can't be one of a packet.
            data = GARBAGE + data[len(GARBAGE) :]
        start = 0
        while start < len(data):
            left = len(data) - start
            size = rng.randint(1, left) if rng.random() < self.sim.cut else left
            size = min(size, CHUNK)
            self._put(data[start : start + size])
            start += size

    def end(self, reason: str) -> None:
        """Close the stream, after what was written."""
        if not self.ended:
            self.ended = True
            self._put(reason)

    def cut(self, reason: str) -> None:
        """Lose what is in flight, from a random segment on, then end the stream."""
        if self.ended and not self.queue:
            return
        for _ in range(self.sim.rng("network").randint(0, len(self.queue))):
            self.queue.pop()
        self.ended = False
        self.end(reason)

    def _put(self, segment: bytes | str) -> None:
        now = self.sim.time
        self.last = max(self.last, now + self.link.delay())
        self.queue.append((self.last, segment))
        self._schedule()

    def _schedule(self) -> None:
        if self.queue and not self._scheduled:
            self._scheduled = True
            self.sim.at(max(self.queue[0][0], self.sim.time), self._arrive)

    def _arrive(self) -> None:
        self._scheduled = False
        if self.link.clogged:
            self._scheduled = True
            self.link.stalled.append(self._arrive)
            return
        if not self.queue:
            return
        if self.queue[0][0] > self.sim.time:  # the head was cut meanwhile
            self._schedule()
            return
        segment = self.queue.popleft()[1]
        self._schedule()
        process = self.dst.process
        if process.alive and process.incarnation != self._incarnation:
            # The machine was restarted: it knows nothing of this connection.
            delay = self.link.delay()
            self.src.process.post_later(delay, "end", self.src.ended, RESET)
        elif isinstance(segment, str):
            process.post("end", self.dst.ended, segment)
        else:
            process.post("data", self._deliver, segment)

    def _deliver(self, segment: bytes) -> None:
        self.size -= len(segment)
        src = self.src
        if src.blocked and self.size < WINDOW:
            src.blocked = False
            src.process.post_later(self.link.delay(), "writable", src.flush)
        self.dst.received(segment)


class SimTransport:
    """The bytes' side of a connection, of one process."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.sim = process.sim
        self.conn: Connection
        self.peer: SimTransport | None = None
        self.out: Pipe | None = None
        self.open = True
        self.finishing = False
        self.blocked = False
        self._unsent = b""
        process.transports[self] = None

    # --- for Connection -----------------------------------------------------------

    def flush_soon(self) -> None:
        """Send at the end of this turn."""
        self.process.flush_soon(self)

    def close(self) -> None:
        """Close at once: what was sent may still arrive, or be lost."""
        if not self.open:
            return
        self.open = False
        self._unsent = b""
        self.process.transports.pop(self, None)
        if self.out is not None:
            # A peer whose data arrive on a closed socket gets a reset.
            if self.sim.rng("network").random() < 0.3:
                self.out.cut(RESET)
            else:
                self.out.end(EOF)

    def finish(self) -> None:
        """Send what is queued, then close."""
        self.finishing = True
        if self.out is None or not self.conn.is_established:
            self.close()
        else:
            self.flush_soon()
            self.process.post_later(LINGER, "linger", self.close)

    # --- for the process ------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether output waits for the peer."""
        return self.open and bool(self._unsent or self.conn.out)

    def flush(self) -> None:
        """Send what the connection queued, as far as the window allows."""
        out = self.out
        if not self.open or out is None:
            return
        while self._unsent or self.conn.out:
            is_start = not self._unsent
            if is_start:
                self._unsent = self.conn.take()
                self.conn.sent(len(self._unsent))
            room = WINDOW - out.size
            if room <= 0:
                self.blocked = True
                return
            data, self._unsent = self._unsent[:room], self._unsent[room:]
            out.write(data, is_start)
        if self.finishing:
            self.close()

    def received(self, data: bytes) -> None:
        """Bytes arrived."""
        if self.open and not self.finishing:
            self.conn.receive(data)

    def ended(self, reason: str) -> None:
        """The stream of the peer ends here."""
        if self.open:
            self.close()
            self.conn.lost(reason)

    def crashed(self, silent: bool) -> None:
        """The process died: no handler runs. `silent`: so did its machine."""
        if self.open:
            self.open = False
            if self.out is not None:
                if silent:
                    self.out.ended = True
                    if self.peer is not None:
                        peer, text = self.peer, "Connection timed out"
                        peer.process.post_later(KEEPALIVE, "end", peer.ended, text)
                elif self.sim.rng("network").random() < 0.5:
                    self.out.cut(RESET)
                else:
                    self.out.end(EOF)


class Listener:
    """A listening socket."""

    def __init__(
        self, process: Process, accept: Callable[[Connection], object]
    ) -> None:
        self.process = process
        self.accept = accept


def connect(runtime: SimRuntime, address: Address, handler: Handler) -> Connection:
    """Start connecting: see `Runtime.connect`."""
    process, sim = runtime.process, runtime.sim
    transport = SimTransport(process)
    conn = Connection(runtime, transport, address, handler, incoming=False)
    transport.conn = conn

    def refuse(reason: str) -> None:
        if transport.open:
            transport.close()
            conn.lost(reason)

    def syn(retries: int) -> None:
        if not transport.open:
            return
        listener = sim.listeners.get(address)
        if listener is None:
            # Nobody has a name there, hence no link: the delay to oneself will do.
            delay = sim.link(process.name, process.name).delay()
            process.post_later(delay, "refused", refuse, "Connection refused")
            return
        there = sim.link(process.name, listener.process.name)
        back = sim.link(listener.process.name, process.name)
        if there.clogged or back.clogged:
            if retries == len(SYN_RETRIES):
                process.post("timeout", refuse, "Connection timed out")
            else:
                process.post_later(SYN_RETRIES[retries], "syn", syn, retries + 1)
            return
        sim.at(sim.time + there.delay(), arrive)

    def arrive() -> None:
        if not transport.open:
            return
        listener = sim.listeners.get(address)
        there = (
            None if listener is None else sim.link(process.name, listener.process.name)
        )
        if listener is None or there is None or there.refused:
            delay = sim.link(process.name, process.name).delay()
            process.post_later(delay, "refused", refuse, "Connection refused")
            return
        remote = SimTransport(listener.process)
        remote.conn = Connection(
            listener.process.runtime,
            remote,
            (address[0], sim.ephemeral_port()),
            Closing(),
            incoming=True,
        )
        transport.peer, remote.peer = remote, transport
        pipe = remote.out = Pipe(sim, remote, transport)
        transport.out = Pipe(sim, transport, remote)
        delay = pipe.link.delay()
        pipe.last = sim.time + delay
        listener.process.post("accept", accept, remote, listener)
        process.post_later(delay, "connected", established)

    def accept(remote: SimTransport, listener: Listener) -> None:
        if remote.open:
            listener.accept(remote.conn)
            if not remote.conn.closed:
                remote.conn.established()

    def established() -> None:
        if transport.open:
            conn.established()

    delay = runtime.throttle.delay(address, process.monotonic())
    process.post_later(delay, "syn", syn, 0)
    return conn
