"""The Runtime of a client: the application's threads do the I/O, one lock orders them.

The lock is held by whoever runs code of the core: a call of the application, the
dispatch of packets, a timer. `wait()` releases it while it reads or sleeps.

Reader role. A connection has at most one reader, who dispatches all that comes, in
order, for the others too. `wait(condition, connections)` takes the roles that are free:

 1. a thread that waits for one answer of one connection blocks in recv() on its socket:
    a load costs one send and one recv, after some polling where answers come at once
    (neo/lib/spin.py);
 2. else it polls the sockets it reads and its own eventfd;
 3. whoever is about to release the lock evaluates the conditions of the others that
    sleep, and wakes those whose condition became true;
 4. on leaving, a role goes to a waiter of the connection (who is woken to take it),
    else to the background thread.

The background thread reads what nobody else does: at once the master's connection,
those being established, those to storages with an open transaction (20 ms apart: their
answers are not urgent, NotifyDeadlock is); once a second the idle ones, so that a load
needs no epoll call. It also runs the timers and sends what sockets did not take.

A socket is in blocking mode once connected, all but (1) passes MSG_DONTWAIT. Who closes
a connection that is being read by (1) shuts it down, which ends the recv(), and the
reader closes it: a descriptor that another thread is about to use is never reused.

An exception while packets are dispatched (KeyboardInterrupt, mainly) closes the
connections being read and empties the cache: neither half-read input nor a half-done
invalidation is resumed.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from neo.lib.connection import Connection
from neo.lib.handler import Handler
from neo.lib.logger import Logger
from neo.lib.protocol import NodeType
from neo.lib.runtime import HeapTimer, T, Throttle
from neo.lib.spin import Processors, Spin
from neo.lib.tls import TLS
from neo.lib.transport import DRAIN, SocketTransport, start_when_allowed
from neo.lib.util import Address

BATCH = 32 << 10  # bytes queued by objects stored one by one before they are sent
IDLE_CHECK = 1.0  # seconds between looks at connections that nobody reads
LAZY = 0.02  # between two reads, by the background thread, of a busy storage
MSG_DONTWAIT = socket.MSG_DONTWAIT


class ClientSocket(socket.socket):
    """A socket whose usual methods never block, whatever its mode."""

    def send(self, data: Any, flags: int = MSG_DONTWAIT) -> int:
        return super().send(data, flags)

    def recv(self, size: int, flags: int = MSG_DONTWAIT) -> bytes:
        return super().recv(size, flags)


class Waiter:
    """A thread in `wait()`."""

    __slots__ = ("asleep", "condition", "fd", "woken")

    def __init__(self) -> None:
        self.fd = -1
        self.condition: Callable[[], object] = bool
        self.asleep = False
        self.woken = False

    def wake(self) -> None:
        """Make it look again; the lock is held."""
        if self.asleep and not self.woken:
            self.woken = True
            os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Free the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class ShellTransport(SocketTransport):
    """A socket, read by threads in turn."""

    def __init__(self, runtime: ShellRuntime, sock: socket.socket) -> None:
        super().__init__(sock, None if runtime.tls is None else runtime.tls.wrap(False))
        self.runtime = runtime
        self.event_fd = self.fd
        self.started = False  # an attempt to connect may be deferred
        self.reader: Waiter | None = None
        self.waiters: list[Waiter] = []
        self.in_recv = False  # its reader blocks in recv()
        self.transactions = 0
        self.lazy_until = 0.0
        self.is_lazy = False  # in the list of those to be looked at then
        self.spin = Spin(runtime.processors)
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        self.poll = poller.poll
        self.registered = 0  # events in the epoll of the background thread

    def _connected(self) -> None:
        super()._connected()
        if self.fd >= 0:
            os.set_blocking(self.fd, True)

    @property
    def watched(self) -> bool:
        """Whether the background thread reads it at once."""
        node = self.conn.node
        return (
            self.draining
            or node is None
            or node.type is NodeType.MASTER
            or self.transactions > 0
        )

    def changed(self) -> None:
        if self.fd < 0 or not self.started:
            wanted = 0
        else:
            wanted = select.EPOLLOUT if self._unsent or self.connecting else 0
            if (
                self.reader is None
                and not self.lazy_until
                and not self.connecting
                and self.watched
            ):
                wanted |= select.EPOLLIN
        if wanted == self.registered:
            return
        epoll = self.runtime.epoll
        if not wanted:
            epoll.unregister(self.event_fd)
        elif self.registered:
            epoll.modify(self.event_fd, wanted)
        else:
            epoll.register(self.event_fd, wanted)
        self.registered = wanted

    def flush_soon(self) -> None:
        self.runtime.dirty.append(self)

    def refused(self) -> None:
        self.runtime.throttle.refused(self.conn.address)

    def drain(self) -> None:
        if self.in_recv:
            self.close()  # its reader must not wait
        else:
            self.lazy_until = 0.0
            self.changed()
            self.runtime.call_later(DRAIN, self.close)

    def close(self) -> None:
        if self.fd < 0:
            return
        self.runtime.transports.pop(self.event_fd, None)
        if not self.started:
            self.runtime.throttle.cancelled(self.conn.address)
        if self.in_recv:
            self.fd = -1
            self._unsent = b""
            self.changed()
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        else:
            super().close()


class Gathering:
    """As `with runtime:`, but packets stay queued up to BATCH: more are to follow.

    They go when somebody waits for an answer, at the latest.
    """

    def __init__(self, runtime: ShellRuntime) -> None:
        self._runtime = runtime

    def __enter__(self) -> None:
        self._runtime.lock.acquire()

    def __exit__(self, *error: object) -> None:
        send = False
        for transport in self._runtime.dirty:
            if transport.conn.out_size > BATCH:
                send = True
        self._runtime.release(send)


class ShellRuntime:
    """See `ClientRuntime` and the module. `with runtime:` holds the lock."""

    def __init__(self, log: Logger, tls: TLS | None = None, name: str = "") -> None:
        self.log = log
        self.tls = tls
        self.name = name
        self.rng = random.Random()
        self.dirty: list[ShellTransport] = []
        self.transports: dict[int, ShellTransport] = {}
        self.epoll = select.epoll()
        # What to do after an exception in the middle of a dispatch.
        self.on_broken: Callable[[], object] = lambda: None
        self.gathering = Gathering(self)
        self.lock = threading.RLock()
        self._dispatching = False
        self._waiters: list[Waiter] = []
        self._spare: list[Waiter] = []
        self._timers: list[tuple[float, int, HeapTimer]] = []
        self._order = count()
        self.throttle = Throttle()
        self.processors = Processors()
        self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.epoll.register(self._waker, select.EPOLLIN)
        self._thread: threading.Thread | None = None
        self._wakes_at = 0.0  # when the background thread looks at the timers
        self._idle_at = 0.0
        self._lazy: list[ShellTransport] = []
        self._stopped = False

    # --- lock -------------------------------------------------------------------------

    def acquire(self) -> None:
        """Take the lock."""
        self.lock.acquire()

    def release(self, send: bool = True) -> None:
        """Give it back, when what was queued is sent, or may be sent later."""
        try:
            if send and self.dirty:
                self._flush()
            if self._waiters:
                self._notify()
        finally:
            try:  # noqa: SIM105 - suppress() takes 0.3 us
                self.lock.release()
            except RuntimeError:
                pass  # KeyboardInterrupt came before it was taken again

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    # --- Runtime ----------------------------------------------------------------------

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def buggify(self, name: str) -> bool:
        return False

    def call_later(self, delay: float, callback: Callable[[], object]) -> HeapTimer:
        timer = HeapTimer(callback)
        due = time.monotonic() + delay
        heapq.heappush(self._timers, (due, next(self._order), timer))
        if due < self._wakes_at:
            self._wake_background()
        return timer

    def connect(self, address: Address, handler: Handler) -> Connection:
        assert not self._stopped
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        transport = ShellTransport(self, ClientSocket(family, socket.SOCK_STREAM))
        conn = Connection(self, transport, address, handler, incoming=False)
        transport.conn = conn
        self.transports[transport.fd] = transport

        def start(local: socket.socket | None) -> None:
            if conn.closed:
                if local is not None:
                    local.close()
            else:
                transport.started = True
                try:
                    transport.connect(address, local)
                except OSError as error:
                    transport.close()
                    conn.lost(str(error))
                else:
                    transport.changed()

        start_when_allowed(self, self.throttle, address, start)
        if self._thread is None:
            self._start()
        return conn

    def connection_succeeded(self, address: Address) -> None:
        self.throttle.succeeded(address, time.monotonic())

    def listen(
        self, address: Address, accept: Callable[[Connection], object]
    ) -> Address:
        raise OSError("a client does not listen")

    def unlisten(self) -> None:
        """Nothing listens."""

    def submit(
        self,
        queue: str,
        job: Callable[[], T],
        done: Callable[[T | Exception], object],
        *,
        inline: bool = False,
    ) -> None:
        """A client has no slow jobs: run it at once."""
        try:
            result: T | Exception = job()
        except Exception as error:  # noqa: BLE001 handed over
            result = error
        done(result)

    def stop(self, status: int = 0) -> None:
        self.close()

    def watch(self, conn: Connection, on: bool) -> None:
        """A transaction begins or ends to use this connection: see the module."""
        transport = conn.transport
        assert isinstance(transport, ShellTransport)
        transport.transactions += 1 if on else -1
        if transport.fd >= 0 and transport.reader is None:
            self._leave_to_background(transport)

    # --- waiting ----------------------------------------------------------------------

    def thread(self) -> int:
        return threading.get_ident()

    def unlocked(self, job: Callable[[], T]) -> T:
        self.__exit__(None, None, None)
        try:
            return job()
        finally:
            self.lock.acquire()

    def wait(
        self,
        condition: Callable[[], object],
        connections: Iterable[Connection] = (),
        timeout: float | None = None,
    ) -> bool:
        assert not self._dispatching, "a callback of the storage must not call it"
        if self.dirty:
            self._flush()
        if condition():
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        waiter = self._spare.pop() if self._spare else Waiter()
        waiter.condition = condition
        transports: list[ShellTransport] = [
            c.transport  # type: ignore[misc]
            for c in connections
            if not c.closed
        ]
        self._waiters.append(waiter)
        for transport in transports:
            transport.waiters.append(waiter)
        try:
            while True:
                reading = self._take_roles(waiter, transports)
                if len(self._waiters) > 1:
                    self._notify(waiter)
                if deadline is None and len(transports) == 1 and reading:
                    self._receive(reading[0])
                else:
                    self._poll(waiter, reading, deadline)
                if condition():
                    return True
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                if self.dirty:
                    self._flush()
                    if condition():
                        return True
        except BaseException:
            self._break(waiter, transports)
            raise
        finally:
            self._leave(waiter, transports)

    def look(self, connections: Iterable[Connection]) -> None:
        for conn in connections:
            transport = conn.transport
            assert isinstance(transport, ShellTransport)
            if transport.reader is None and transport.fd >= 0:
                self._read(transport)

    @staticmethod
    def _take_roles(
        waiter: Waiter, transports: list[ShellTransport]
    ) -> list[ShellTransport]:
        """Those that this thread reads."""
        reading = []
        for transport in transports:
            if transport.fd < 0 or not transport.conn.is_established:
                continue
            if transport.reader is None:
                transport.reader = waiter
                transport.lazy_until = 0.0
                if transport.registered:
                    transport.changed()
            if transport.reader is waiter:
                reading.append(transport)
        return reading

    def _receive(self, transport: ShellTransport) -> None:
        """Block until something comes; the lock is free meanwhile."""
        sock, size = transport.sock, transport.conn.read_size
        transport.in_recv = True
        data: bytes | None = b""
        # Threads of the application would take the interpreter from each other.
        alone = len(self._waiters) == 1
        lock: Any = self.lock
        # As threading.Condition does, all of the lock: DemoStorage has it already, or
        # KeyboardInterrupt prevented a release.
        state = lock._release_save()
        try:
            if alone and transport.spin.look(transport.poll):
                data = sock.recv(size, 0)
            else:
                start = time.monotonic()
                data = sock.recv(size, 0)
                transport.spin.slept(time.monotonic() - start)
        except BlockingIOError:  # the mode could not be changed in time
            data = None
        except OSError as error:
            reason = os.strerror(error.errno or 0)
        else:
            reason = ""
        finally:
            lock._acquire_restore(state)
            transport.in_recv = False
            if transport.fd < 0:
                sock.close()
        if transport.fd < 0 or data is None:
            return
        self._dispatching = True
        try:
            if data or not reason:
                transport.received(data)
            else:
                transport.close()
                transport.conn.lost(reason)
        finally:
            self._dispatching = False

    def _poll(
        self,
        waiter: Waiter,
        reading: list[ShellTransport],
        deadline: float | None,
    ) -> None:
        """Sleep until a connection can be read, or somebody wakes us."""
        if waiter.fd < 0:
            waiter.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        poller = select.poll()
        poller.register(waiter.fd, select.POLLIN)
        for transport in reading:
            poller.register(transport.fd, select.POLLIN)
        timeout = None
        if deadline is not None:
            timeout = max(0.0, deadline - time.monotonic()) * 1000 + 1
        waiter.asleep = True
        lock: Any = self.lock
        state = lock._release_save()  # as in _receive()
        try:
            events = poller.poll(timeout)
        finally:
            lock._acquire_restore(state)
            waiter.asleep = False
            if waiter.woken:
                waiter.woken = False
                os.eventfd_read(waiter.fd)
        ready = {fd for fd, _ in events}
        for transport in reading:
            if transport.fd in ready and transport.reader is waiter:
                self._read(transport)

    def _read(self, transport: ShellTransport) -> None:
        self._dispatching = True
        try:
            transport.readable()
        finally:
            self._dispatching = False

    def _notify(self, me: Waiter | None = None) -> None:
        """Wake those whose condition became true."""
        for waiter in self._waiters:
            if (
                waiter.asleep
                and waiter is not me
                and not waiter.woken
                and waiter.condition()
            ):
                waiter.wake()

    def _leave(self, waiter: Waiter, transports: list[ShellTransport]) -> None:
        self._waiters.remove(waiter)
        for transport in transports:
            transport.waiters.remove(waiter)
            if transport.reader is waiter:
                transport.reader = None
            if transport.fd < 0 or transport.reader is not None:
                continue
            if transport.waiters:
                transport.waiters[0].wake()
            else:
                self._leave_to_background(transport)
        waiter.condition = bool
        self._spare.append(waiter)

    def _leave_to_background(self, transport: ShellTransport) -> None:
        """Let the background thread read it, but in a while only.

        Most often the next request follows at once: a commit would register and
        unregister its connections 13 times.
        """
        if transport.watched and not transport.wants_write:
            transport.lazy_until = time.monotonic() + LAZY
            if not transport.is_lazy:
                transport.is_lazy = True
                self._lazy.append(transport)
            if self._wakes_at > transport.lazy_until + LAZY:
                self._wake_background()
        else:
            transport.changed()

    def _break(self, waiter: Waiter, transports: list[ShellTransport]) -> None:
        for transport in transports:
            if transport.reader is waiter:
                transport.conn.close("interrupted")
        self.on_broken()

    def _flush(self) -> None:
        while self.dirty:
            dirty, self.dirty = self.dirty, []
            for transport in dirty:
                transport.flush()

    # --- background thread ------------------------------------------------------------

    def _start(self) -> None:
        self._thread = threading.Thread(
            target=self._run, name=f"NEO client {self.name}", daemon=True
        )
        self._thread.start()

    def _wake_background(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._waker, 1)

    def _run(self) -> None:
        lock, epoll = self.lock, self.epoll
        events: list[tuple[int, int]] = []
        while True:
            with lock:
                if self._stopped:
                    break
                self._wakes_at = 0.0
                for fd, event in events:
                    self._guard(lambda f=fd, e=event: self._event(f, e))  # type: ignore[misc]
                now = time.monotonic()
                self._rearm(now)
                self._run_timers(now)
                if now >= self._idle_at:
                    self._idle_at = now + IDLE_CHECK
                    self._check_idle()
                self._guard(self._flush)
                if self._waiters:
                    self._guard(self._notify)
                wakes_at = self._idle_at
                if self._timers:
                    wakes_at = min(wakes_at, self._timers[0][0])
                for transport in self._lazy:
                    wakes_at = min(wakes_at, transport.lazy_until or wakes_at)
                self._wakes_at = wakes_at
            events = epoll.poll(max(0.0, wakes_at - time.monotonic()))
        self._release()

    def _guard(self, action: Callable[[], object]) -> None:
        """Run something of the core; an error must not end the thread."""
        self._dispatching = True
        try:
            action()
        except Exception as error:
            self.log.exception("error in the client: %s", error)
            # What was being handled can't be trusted: begin a new session.
            for transport in list(self.transports.values()):
                transport.conn.close("internal error")
            self.on_broken()
        finally:
            self._dispatching = False

    def _event(self, fd: int, event: int) -> None:
        if fd == self._waker:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
            return
        transport = self.transports.get(fd)
        if transport is None or transport.fd < 0:
            return
        if event & ~select.EPOLLIN and transport.wants_write:
            transport.writable()
        if event & ~select.EPOLLOUT and transport.reader is None and transport.fd >= 0:
            self._read_spare(transport)

    def _read_spare(self, transport: ShellTransport) -> None:
        """Read a connection that nobody reads."""
        if not transport.connecting:
            transport.readable()
        if transport.fd < 0:
            return
        node = transport.conn.node
        if node is not None and node.type is NodeType.STORAGE:
            transport.lazy_until = time.monotonic() + LAZY
            if not transport.is_lazy:
                transport.is_lazy = True
                self._lazy.append(transport)
        transport.changed()

    def _rearm(self, now: float) -> None:
        lazy, self._lazy = self._lazy, []
        for transport in lazy:
            if now < transport.lazy_until:
                self._lazy.append(transport)
            else:
                transport.is_lazy = False
                if transport.fd >= 0 and transport.lazy_until:
                    transport.lazy_until = 0.0
                    transport.changed()

    def _check_idle(self) -> None:
        for transport in list(self.transports.values()):
            if (
                transport.fd >= 0
                and transport.reader is None
                and not transport.connecting
                and not transport.registered
                and transport.conn.is_established
            ):
                self._guard(transport.readable)

    def _run_timers(self, now: float) -> None:
        timers = self._timers
        while timers and timers[0][0] <= now:
            callback = heapq.heappop(timers)[2].callback
            if callback is not None:
                self._guard(callback)

    # --- end --------------------------------------------------------------------------

    def close(self) -> None:
        """Close what is left; the background thread ends."""
        lock: Any = self.lock
        lock.acquire()
        try:
            self._stopped = True
            for transport in list(self.transports.values()):
                transport.close()
            for waiter in self._waiters:
                waiter.wake()
            thread = self._thread
            self._wake_background()
        finally:
            lock._release_save()  # as in _receive()
        if thread is None:
            self._release()
        elif thread is not threading.current_thread():
            thread.join(10)

    def _release(self) -> None:
        with self.lock:
            if not self.epoll.closed:
                self.epoll.close()
                os.close(self._waker)
            for waiter in self._spare:
                waiter.close()
            self._spare.clear()

    def new_lock(self) -> None:
        """After a fork that nobody was told of: no thread is left that holds it."""
        self.lock = threading.RLock()

    def abandon(self) -> None:
        """After a fork, in the child: close descriptors, tell nobody, touch
        nothing that the parent shares.
        """
        for transport in self.transports.values():
            transport.sock.close()
        for waiter in self._waiters:
            waiter.close()
        self._release()
