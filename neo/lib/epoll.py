"""The Runtime of daemons and commands: one thread, epoll, real time.

A turn of the loop: sockets that are ready, timers that are due, completions of jobs,
then whatever was queued for sending is sent, once per connection.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import queue
import random
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

from .connection import Connection
from .exception import BackendError
from .handler import Closing, Handler
from .logger import Logger
from .runtime import HeapTimer, T, Throttle
from .spin import Processors, Spin
from .tls import TLS
from .transport import (
    DRAIN,
    DRAINING_MAX,
    SocketTransport,
    listen_local,
    new_socket,
    peer_of,
    start_when_allowed,
)
from .util import Address

BACKLOG = 128
LINGER = 10.0  # seconds that an aborted connection has to take what is queued
# Descriptors may be exhausted: accept again after this many seconds.
ACCEPT_RETRY = 1.0
# Jobs that are shorter on average may run on the loop: a thread costs two wake-ups, 0.2
# ms of a commit of 1.5 ms.
INLINE_MAX = 1e-3


class EpollTransport(SocketTransport):
    """A socket registered in the loop."""

    def __init__(
        self, loop: EpollRuntime, sock: socket.socket, server_side: bool
    ) -> None:
        tls = None if loop.tls is None else loop.tls.wrap(server_side)
        super().__init__(sock, tls)
        self.loop = loop
        self._registered = 0
        self._event_fd = self.fd

    def changed(self) -> None:
        loop = self.loop
        if self.fd < 0:
            loop.draining.pop(self, None)
            if loop.handlers.pop(self._event_fd, None) is not None:
                loop.poller.unregister(self._event_fd)
                loop.accept_again()
            return
        events = select.EPOLLIN | (select.EPOLLOUT if self.wants_write else 0)
        if events == self._registered:
            return
        if self._registered:
            loop.poller.modify(self.fd, events)
        else:
            loop.poller.register(self.fd, events)
            loop.handlers[self.fd] = self.event
        self._registered = events

    def event(self, events: int) -> None:
        """The socket is ready."""
        if events & select.EPOLLOUT:
            self.writable()
        if events & ~select.EPOLLOUT and self.fd >= 0:
            self.readable()

    def flush_soon(self) -> None:
        self.loop.dirty.append(self)

    def refused(self) -> None:
        self.loop.throttle.refused(self.conn.address)

    def drain(self) -> None:
        loop = self.loop
        if len(loop.draining) < DRAINING_MAX:
            loop.draining[self] = None
            loop.call_later(DRAIN, self.close)
        else:
            self.close()

    def finish(self) -> None:
        super().finish()
        if self.fd >= 0:
            self.loop.call_later(LINGER, self.close)


class Worker(threading.Thread):
    """Runs the jobs of one queue, one after the other."""

    def __init__(self, loop: EpollRuntime, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.loop = loop
        self.jobs: queue.SimpleQueue[
            tuple[Callable[[], Any], Callable[[Any], object]] | None
        ] = queue.SimpleQueue()
        self.pending = 0  # jobs put and not yet completed; the loop's
        self.duration = 0.0  # moving average, in seconds
        self.start()

    def execute(self, job: Callable[[], Any]) -> Any:
        """Result of the job, or its exception."""
        start = time.perf_counter()
        try:
            return job()
        except Exception as error:  # noqa: BLE001  # `done` decides
            return error
        finally:
            self.duration += (time.perf_counter() - start - self.duration) / 8

    def run(self) -> None:
        while (item := self.jobs.get()) is not None:
            job, done = item
            self._complete(done, self.execute(job))
            del item, job, done

    def _complete(self, done: Callable[[Any], object], result: Any) -> None:
        def complete() -> None:
            self.pending -= 1
            done(result)

        self.loop.call_soon_threadsafe(complete)


class EpollRuntime:
    """See `Runtime`. `run()` returns the exit status when `stop()` was called."""

    def __init__(
        self, log: Logger, tls: TLS | None = None, tcp_only: bool = False
    ) -> None:
        self.log = log
        self.tls = tls
        self.tcp_only = tcp_only  # listen on no Unix socket
        self.rng = random.Random()
        self.poller = select.epoll()
        self._spin = Spin(Processors())
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.dirty: list[EpollTransport] = []
        self.draining: dict[EpollTransport, None] = {}
        self._timers: list[tuple[float, int, HeapTimer]] = []
        self._order = count()
        self.throttle = Throttle()
        self._workers: dict[str, Worker] = {}
        self._completed: deque[Callable[[], object]] = deque()
        self._monotonic = time.monotonic()
        self._clock_offset = float(os.environ.get("NEO_TEST_CLOCK_OFFSET", 0))
        self._listeners: list[tuple[socket.socket, Callable[[Connection], object]]] = []
        self._suspended: list[socket.socket] = []
        self._status: int | None = None
        self._deadline = 0.0
        self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._asleep = False
        self.poller.register(self._waker, select.EPOLLIN)
        self.handlers[self._waker] = self._awake

    # --- Runtime ----------------------------------------------------------------------

    def now(self) -> float:
        return time.time() + self._clock_offset

    def monotonic(self) -> float:
        return self._monotonic

    def call_later(self, delay: float, callback: Callable[[], object]) -> HeapTimer:
        timer = HeapTimer(callback)
        due = (time.monotonic() if delay else self._monotonic) + delay
        heapq.heappush(self._timers, (due, next(self._order), timer))
        return timer

    def buggify(self, name: str) -> bool:
        return False

    def connect(self, address: Address, handler: Handler) -> Connection:
        transport = EpollTransport(self, new_socket(address), server_side=False)
        conn = Connection(self, transport, address, handler, incoming=False)
        transport.conn = conn

        def start(local: socket.socket | None) -> None:
            if conn.closed:
                self.throttle.cancelled(address)
                if local is not None:
                    local.close()
            else:
                try:
                    transport.connect(address, local)
                except OSError as error:
                    transport.close()
                    conn.lost(str(error))
                else:
                    transport.changed()

        # Never from inside the caller: it hasn't got the connection yet.
        start_when_allowed(self, self.throttle, address, start)
        return conn

    def connection_succeeded(self, address: Address) -> None:
        self.throttle.succeeded(address, time.monotonic())

    def listen(
        self, address: Address, accept: Callable[[Connection], object]
    ) -> Address:
        sock = new_socket(address)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
            host, port = sock.getsockname()[:2]
            local = None if self.tcp_only else listen_local((host, port))
        except OSError:
            sock.close()
            raise
        self._listen(sock, accept)
        if local is not None:
            local.listen(BACKLOG)
            self._listen(local, accept)
        return host, port

    def _listen(
        self, sock: socket.socket, accept: Callable[[Connection], object]
    ) -> None:
        sock.setblocking(False)
        self._listeners.append((sock, accept))
        self.poller.register(sock, select.EPOLLIN)
        self.handlers[sock.fileno()] = lambda _: self._accept(sock, accept)

    def unlisten(self) -> None:
        # The Unix socket first: who gets the port must get its name, too.
        for sock, _ in reversed(self._listeners):
            del self.handlers[sock.fileno()]
            if sock not in self._suspended:
                self.poller.unregister(sock)
            sock.close()
        self._listeners.clear()
        self._suspended.clear()

    def submit(
        self,
        queue: str,
        job: Callable[[], T],
        done: Callable[[T | Exception], object],
        *,
        inline: bool = False,
    ) -> None:
        worker = self._workers.get(queue)
        if worker is None:
            worker = self._workers[queue] = Worker(self, queue)
        if inline and not worker.pending and worker.duration < INLINE_MAX:
            self.flush()  # peers need not wait for it
            result = worker.execute(job)
            self._completed.append(lambda: done(result))
        else:
            worker.pending += 1
            worker.jobs.put((job, done))

    def stop(self, status: int = 0) -> None:
        if self._status is None:
            self._status = status
            self._deadline = time.monotonic() + LINGER
            self.unlisten()

    # --- loop -------------------------------------------------------------------------

    def call_soon_threadsafe(self, callback: Callable[[], object]) -> None:
        """Call in the loop; from any thread or signal handler."""
        self._completed.append(callback)
        if self._asleep:
            os.eventfd_write(self._waker, 1)

    def _awake(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._waker)

    def run(self) -> int:
        """Turn until `stop()`; return its status, or 1 after an error that it logs."""
        try:
            while self._status is None or self._unfinished():
                self.turn()
        except BackendError as error:
            self.log.critical("database: %s", error)
            self._status = 1
        except Exception as error:
            self.log.exception("fatal error: %s", error)
            self._status = 1
        finally:
            self.close()
        assert self._status is not None
        return self._status

    def _unfinished(self) -> bool:
        return time.monotonic() < self._deadline and any(
            isinstance(owner := getattr(handler, "__self__", None), EpollTransport)
            and (owner.wants_write or owner.conn.out)
            for handler in self.handlers.values()
        )

    def turn(self, timeout: float | None = None) -> None:
        """Wait for events and handle them."""
        self.flush()
        timers = self._timers
        if timers:
            delay = max(0.0, timers[0][0] - time.monotonic())
            timeout = delay if timeout is None else min(timeout, delay)
        if self._status is not None:
            timeout = 0.05 if timeout is None else min(timeout, 0.05)
        self._asleep = True
        # Checked after the flag is up: who appends later will write to the descriptor.
        if self._completed:
            timeout = 0
        try:
            events = self.poller.poll(0) if timeout == 0 else self._sleep(timeout)
        finally:
            self._asleep = False
        self._monotonic = time.monotonic()
        handlers = self.handlers
        for fd, event in events:
            handler = handlers.get(fd)
            if handler is not None:  # else closed by an earlier event of this turn
                handler(event)
        # Those started from now on belong to the next turn, even if they are due.
        started = next(self._order)
        while timers and timers[0][0] <= self._monotonic and timers[0][1] < started:
            callback = heapq.heappop(timers)[2].callback
            if callback is not None:
                callback()
        completed = self._completed
        for _ in range(len(completed)):
            completed.popleft()()
        self.flush()

    def _sleep(self, timeout: float | None) -> list[tuple[int, int]]:
        events = self._spin.look(self.poller.poll)
        if not events:
            start = time.monotonic()
            events = self.poller.poll(-1 if timeout is None else timeout)
            self._spin.slept(time.monotonic() - start)
        return events

    def flush(self) -> None:
        """Send what was queued."""
        while self.dirty:
            dirty, self.dirty = self.dirty, []
            for transport in dirty:
                transport.flush()

    def close(self) -> None:
        """Close all; pending jobs are finished first."""
        for worker in self._workers.values():
            worker.jobs.put(None)
        for worker in self._workers.values():
            worker.join(LINGER)
        self.unlisten()
        for handler in list(self.handlers.values()):
            owner = getattr(handler, "__self__", None)
            if isinstance(owner, EpollTransport):
                owner.close()
        self.handlers.clear()
        if not self.poller.closed:
            os.close(self._waker)
            self.poller.close()

    # --- accepting -----------------------------------------------------------------

    def _accept(
        self, listener: socket.socket, accept: Callable[[Connection], object]
    ) -> None:
        while True:
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # Most often: too many open files. What is connected goes on.
                self.log.throttled("accept", 30, "cannot accept connections: %s", error)
                self.poller.unregister(listener)
                self._suspended.append(listener)
                self.call_later(ACCEPT_RETRY, self.accept_again)
                return
            transport = EpollTransport(self, sock, server_side=True)
            peer = peer_of(sock, address)
            conn = Connection(self, transport, peer, Closing(), incoming=True)
            transport.conn = conn
            accept(conn)
            if not conn.closed:
                transport.changed()
                transport.accepted()

    def accept_again(self) -> None:
        """A descriptor may be free again."""
        suspended, self._suspended = self._suspended, []
        for listener in suspended:
            if listener.fileno() >= 0:
                self.poller.register(listener, select.EPOLLIN)
