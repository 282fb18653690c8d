"""Long work in slices: reads beside everything else, deletions between commits.

A long read is a generator. It yields functions that read through the backend's
background reader, off the loop, and gets their results; so it holds nothing while it
waits, and the reads of others take turns with it. A long deletion is a job of the
writer, repeated until there is nothing left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.handler import Refused, refuse
from neo.lib.protocol import ErrorCode, NodeType
from neo.lib.runtime import Runtime

from .database.interface import Reader

QUEUE = "background"
# Long reads in progress on behalf of one node: more are refused.
TASKS_MAX = 10_000
# A peer that has so many bytes to take gets more when it took some of them.
OUTPUT_MAX = 1 << 18
OUTPUT_RETRY = 0.005  # seconds

# Megabytes a second that long work gets although clients are active.
RATE = 4.0
PAUSE_MIN = 0.005  # seconds

#: Yields a function of the reader to get its result, or seconds to let others go first.
Slices = Generator[Callable[[Reader], Any] | float, Any, None]


class Pace:
    """Lets clients go before replications and checks, but not for ever.

    While they send requests, the long work of a node gets the speed that is guaranteed;
    else all that it can do.
    """

    def __init__(self, connections: Iterable[Connection], rate: float) -> None:
        """`connections` is looked at each time; `rate` in MB/s."""
        self._connections = connections
        self._rate = rate * 1e6
        self._count = 0
        self._debt = 0.0

    def pause(self, size: int) -> float:
        """Seconds to wait after having processed `size` bytes."""
        count = 0
        for conn in self._connections:
            if conn.node is not None and conn.node.type is NodeType.CLIENT:
                count += conn.packets_received
        before, self._count = self._count, count
        if count == before:
            self._debt = 0.0
            return 0.0
        self._debt += size / self._rate
        if self._debt < PAUSE_MIN:
            return 0.0
        result, self._debt = self._debt, 0.0
        return result


class Background:
    """Executes long reads for peers."""

    def __init__(self, runtime: Runtime, reader: Reader) -> None:
        self._runtime = runtime
        self._reader = reader
        self._count = 0
        self.is_over = False

    @staticmethod
    def run(reader: Reader, slices: Slices) -> None:
        """Execute a short read at once, through the loop's own connection.

        To hand it over would cost several times what it does. Errors are raised.
        """
        result: object = None
        try:
            while True:
                job = slices.send(result)
                assert callable(job), job
                result = job(reader)
        except StopIteration:
            return

    def start(self, conn: Connection, slices: Slices) -> None:
        """Execute a read that answers the request being handled on `conn`.

        The generator may raise Refused or ProtocolError; it ends with its connection.
        """
        if self._count >= TASKS_MAX:
            raise Refused(ErrorCode.NOT_READY, "too many long reads", close=True)
        self._count += 1
        self._step(conn, conn.message_id, slices, None)

    def _step(
        self, conn: Connection, msg_id: int, slices: Slices, result: object
    ) -> None:
        if isinstance(result, Exception):
            raise result
        if conn.closed or self.is_over:
            self._count -= 1
            slices.close()
            return
        try:
            job = slices.send(result)
        except StopIteration:
            self._count -= 1
            return
        except Refused as error:
            self._count -= 1
            refuse(conn, msg_id, error)
            return
        except ProtocolError as error:
            self._count -= 1
            fail(conn, msg_id, str(error))
            return
        if isinstance(job, float):
            self._runtime.call_later(
                job, lambda: self._step(conn, msg_id, slices, None)
            )
            return
        read, reader = job, self._reader
        self._runtime.submit(
            QUEUE,
            lambda: read(reader),
            lambda result: self._step(conn, msg_id, slices, result),
        )


def fail(conn: Connection, msg_id: int, text: str) -> None:
    """Answer a request that a peer must not make, out of its handler; disconnect."""
    conn.log.throttled(("protocol", text[:20]), 30, "%s: closed: %s", conn, text)
    conn.error(msg_id, ErrorCode.PROTOCOL_ERROR, text)
    conn.abort(text)


class Chores:
    """Deletions that nobody waits for, one after the other.

    A chore is a function that submits one slice of its work and calls what it is given
    with whether there is more.
    """

    PAUSE = 0.01  # seconds between two slices: clients' writes come first

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._chores: deque[Callable[[Callable[[bool], object]], object]] = deque()
        self._running = False
        self.is_over = False

    def add(self, chore: Callable[[Callable[[bool], object]], object]) -> None:
        """Add a chore to the queue."""
        self._chores.append(chore)
        if not self._running:
            self._running = True
            self._runtime.call_later(0, self._next)

    def _next(self) -> None:
        if self.is_over or not self._chores:
            self._running = False
            return
        self._chores[0](self._done)

    def _done(self, more: bool) -> None:
        if not more:
            self._chores.popleft()
        self._runtime.call_later(self.PAUSE if more else 0, self._next)
