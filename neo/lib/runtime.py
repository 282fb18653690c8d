"""What a node may know of the outside world: the Runtime, implemented by epoll
(`neo/lib/epoll.py`), the client's shell (`neo/client/shell.py`) and the simulator
(`tests/simulation/runtime.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from random import Random
from typing import TYPE_CHECKING, Protocol, TypeVar

from .util import Address

if TYPE_CHECKING:
    from .connection import Connection
    from .handler import Handler
    from .logger import Logger

T = TypeVar("T")

RECONNECTION_DELAY = 1.0


class Timer(Protocol):
    """A pending `call_later()`."""

    def cancel(self) -> None:
        """Forget the call; harmless if it was made already."""


class HeapTimer(Timer):
    """An entry of a runtime's heap; without callback once it is cancelled."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Runtime(Protocol):
    """All that a node may know of the outside world."""

    log: Logger
    rng: Random  # the only source of chance

    def now(self) -> float:
        """Seconds since the epoch, may jump; for tids and dates."""

    def monotonic(self) -> float:
        """Seconds, for all that lasts. Read once per turn of the loop."""

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        """Call once, `delay` seconds from now at the earliest; 0: in the next turn."""

    def connect(self, address: Address, handler: Handler) -> Connection:
        """Connect; `handler.connected(conn)` or `handler.closed(conn)` follows.

        An attempt that comes less than a second after a failed one to the same address
        is deferred (`Throttle`).
        """

    def connection_succeeded(self, address: Address) -> None:
        """The peer accepted us: after a loss, the next attempt need not wait.

        Once a second for one address: a peer that accepts and closes costs no loop.
        """

    def listen(
        self, address: Address, accept: Callable[[Connection], object]
    ) -> Address:
        """Listen and return the address bound (port 0 is replaced).

        `accept(conn)` must set `conn.handler`. OSError if it is impossible.
        """

    def unlisten(self) -> None:
        """Close the listening sockets."""

    def submit(
        self,
        queue: str,
        job: Callable[[], T],
        done: Callable[[T | Exception], object],
        *,
        inline: bool = False,
    ) -> None:
        """Run blocking `job` off the loop, in order per queue; `done` runs on it.

        `done(result)`; an exception of `job` is passed as the result.
        `inline`: the loop has nothing better to do than to wait for the job itself, if
        nothing else is in the queue and its jobs are short.
        """

    def buggify(self, name: str) -> bool:
        """Always false in production; often true, for a few names, when simulated."""

    def stop(self, status: int = 0) -> None:
        """End the node: output is flushed (for a few seconds at most), then all closed.

        `status` is the exit status of the process.
        """


class ClientRuntime(Runtime, Protocol):
    """The Runtime of a client, whose application blocks."""

    def thread(self) -> Hashable:
        """What tells the calling thread from others."""

    def unlocked(self, job: Callable[[], T]) -> T:
        """Do what takes long, and knows nothing of the client, without its lock."""

    def wait(
        self,
        condition: Callable[[], object],
        connections: Iterable[Connection] = (),
        timeout: float | None = None,
    ) -> bool:
        """Let the world go on until `condition()`; false if `timeout` (s) came first.

        `connections` are those on which answers are expected: the calling thread reads
        them itself where nobody else does. The lock of the client is released here and
        in `unlocked`, nowhere else.
        """

    def look(self, connections: Iterable[Connection]) -> None:
        """Handle what came on connections that nobody reads now, without waiting."""


class Throttle:
    """Spaces the attempts to connect to one address, after failures."""

    def __init__(self) -> None:
        self._not_before: dict[Address, float] = {}
        self._absent: dict[Address, None] = {}  # where nobody listened
        self._lifted: dict[Address, float] = {}  # when it was, last

    def delay(self, address: Address, monotonic: float) -> float:
        """Seconds to wait before the next attempt, which is noted as made then."""
        start = max(monotonic, self._not_before.get(address, 0.0))
        if len(self._not_before) > 1000:  # addresses long gone
            self._not_before = {
                a: t for a, t in self._not_before.items() if t > monotonic
            }
        self._not_before[address] = start + RECONNECTION_DELAY
        return start - monotonic

    def refused(self, address: Address) -> None:
        """Nobody listens there: who can look without being noticed may do so."""
        self._absent[address] = None

    def was_refused(self, address: Address) -> bool:
        """Whether the last attempt was; asked once."""
        return self._absent.pop(address, 0) is None

    def cancelled(self, address: Address) -> None:
        """An attempt that was deferred is not made: it must not defer the next one."""
        if address in self._not_before:
            self._not_before[address] -= RECONNECTION_DELAY

    def succeeded(self, address: Address, monotonic: float) -> None:
        """The peer accepted us: a loss may be followed by a new attempt at once.

        Unless this was so less than a second ago: the session proved nothing. An
        address gets two attempts a second at most.
        """
        last = self._lifted.get(address)
        if last is None or monotonic - last >= RECONNECTION_DELAY:
            if len(self._lifted) > 1000:
                self._lifted.clear()
            self._lifted[address] = monotonic
            self._not_before.pop(address, None)


class Transport(Protocol):
    """The bytes' side of a connection; `neo/lib/connection.py` is the packets' side."""

    def flush_soon(self) -> None:
        """The connection has output: send it at the end of this turn."""

    def flush(self) -> None:
        """Send what can be sent now. The connection may be lost by that."""

    def close(self) -> None:
        """Close at once."""

    def finish(self) -> None:
        """Read no more, send what is queued, then close."""
