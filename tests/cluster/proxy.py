"""A network that can be broken: a TCP proxy between the nodes of a cluster.

A link is one node's way to one port. The source decides that it is used: it connects to
its own loopback address (127.1.0.n, `via`) with the port of the destination, which
itself knows nothing (it listens on 127.0.0.1 and announces that). Each direction of a
pair of nodes can be silenced, delayed and damaged, whoever connected; connections can
be reset, and new ones refused. Silence keeps what is sent, as TCP would transmit it
again after: nothing comes before, not even the end of a connection.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

CHUNK = 1 << 16
HELD_MAX = 1 << 20  # bytes that wait in one direction before reading stops
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Pipe:
    """One direction of a connection: what `source` says to `target`."""

    def __init__(self, source: str, target: str) -> None:
        self.source = source
        self.target = target
        self.held: deque[tuple[float, bytes]] = deque()  # (due, bytes; b"": the end)
        self.size = 0
        self.ended = False  # the end was read
        self.over = False  # and passed on


class Pair:
    """A connection: two sockets, two pipes."""

    def __init__(
        self, source: str, target: str, client: socket.socket, server: socket.socket
    ) -> None:
        self.nodes = {source, target}
        self.socks = (client, server)
        self.pipes = (Pipe(source, target), Pipe(target, source))
        self.connecting = True


class Network(threading.Thread):
    """See the module. Methods may be called from any thread, and wait for the proxy."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="network")
        self._ports: dict[str, int] = {}
        self._hosts: dict[str, str] = {}
        self._numbers = count(1)
        self._listeners: dict[tuple[str, str], socket.socket] = {}
        self._pairs: dict[Pair, None] = {}
        self._silent: set[tuple[str, str]] = set()
        self._refused: set[tuple[str, str]] = set()
        self._delays: dict[tuple[str, str], float] = {}
        self._damages: dict[tuple[str, str], int] = {}
        self._selector = selectors.EpollSelector()
        self._registered: dict[socket.socket, int] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._waker, _READ)
        self._running = True
        self.resets = 0
        self.damaged = 0
        self.start()

    # --- control ----------------------------------------------------------------------

    def _call(self, function: Callable[[], Any]) -> Any:
        done = threading.Event()
        result: list[Any] = []

        def call() -> None:
            try:
                result.append(function())
            finally:
                done.set()

        self._calls.append(call)
        os.eventfd_write(self._waker, 1)
        assert done.wait(10), "the proxy hangs"
        return result[0]

    def via(self, source: str, ports: dict[str, int]) -> str:
        """The host that `source` uses to reach all `ports` (by name of node)."""

        def add() -> str:
            if source not in self._hosts:
                self._hosts[source] = f"127.1.0.{next(self._numbers)}"
            self._ports.update(ports)
            for target in ports:
                self._listen(source, target)
            return self._hosts[source]

        host: str = self._call(add)
        return host

    def close(self) -> None:
        """End, with all connections."""
        self._running = False
        os.eventfd_write(self._waker, 1)
        self.join()

    def reset(self, a: str, b: str) -> int:
        """Reset all connections between two nodes; how many there were."""
        count: int = self._call(lambda: self._reset({a, b}))
        return count

    def silence(self, *ways: tuple[str, str]) -> None:
        """Nothing passes from first to second of each way, until healed."""
        self._call(lambda: self._silent.update(ways))

    def speak(self, *ways: tuple[str, str]) -> None:
        """End of `silence`."""
        self._call(lambda: self._silent.difference_update(ways))

    def cut(self, one: Iterable[str], other: Iterable[str]) -> None:
        """Silence between two groups, in both directions."""
        others = tuple(other)
        pairs = [(a, b) for a in one for b in others]
        self.silence(*pairs, *((b, a) for a, b in pairs))

    def refuse(self, source: str, target: str) -> None:
        """`source` can't connect to `target`, and loses the connections it has."""

        def refuse() -> None:
            self._refused.add((source, target))
            listener = self._listeners.pop((source, target), None)
            if listener is not None:
                self._selector.unregister(listener)
                listener.close()
            self._reset({source, target})

        self._call(refuse)

    def allow(self, source: str, target: str) -> None:
        """End of `refuse`."""

        def allow() -> None:
            if (source, target) in self._refused:
                self._refused.remove((source, target))
                self._listen(source, target)

        self._call(allow)

    def delay(self, source: str, target: str, seconds: float) -> None:
        """What `source` says takes so long to reach `target`; 0: no time."""
        self._call(lambda: self._delays.update({(source, target): seconds}))

    def damage(self, source: str, target: str, after: int = 0) -> None:
        """Flip a bit of what `source` says to `target`, `after` bytes from now."""
        self._call(lambda: self._damages.update({(source, target): after}))

    def heal(self) -> None:
        """No more faults; what was held is sent."""

        def heal() -> None:
            self._silent.clear()
            self._delays.clear()
            self._damages.clear()
            for way in sorted(self._refused):
                self._listen(*way)
            self._refused.clear()

        self._call(heal)

    # --- the thread -------------------------------------------------------------------

    def run(self) -> None:
        """Body of the thread."""
        timeout: float | None = None
        while self._running:
            for key, events in self._selector.select(timeout):
                if key.data is not None:
                    key.data(events)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._waker)
            called = bool(self._calls)
            while self._calls:
                self._calls.popleft()()
            timeout = None
            now = time.monotonic()
            for pair in list(self._pairs):
                due = self._advance(pair, now) if called or self._has_held(pair) else 0
                if due:
                    timeout = due if timeout is None else min(timeout, due)
        for listener in self._listeners.values():
            listener.close()
        for pair in list(self._pairs):
            self._close(pair)
        self._selector.close()
        os.close(self._waker)

    @staticmethod
    def _has_held(pair: Pair) -> bool:
        return bool(pair.pipes[0].held or pair.pipes[1].held)

    def _listen(self, source: str, target: str) -> None:
        if (source, target) in self._listeners or source not in self._hosts:
            return
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self._hosts[source], self._ports[target]))
        sock.listen(128)
        sock.setblocking(False)
        self._listeners[source, target] = sock
        self._selector.register(
            sock, _READ, lambda _: self._accept(sock, source, target)
        )

    def _accept(self, listener: socket.socket, source: str, target: str) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            client, _ = listener.accept()
            server = socket.socket()
            for sock in client, server:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = Pair(source, target, client, server)
            self._pairs[pair] = None
            status = server.connect_ex(("127.0.0.1", self._ports[target]))
            if status in (0, errno.EINPROGRESS):
                self._advance(pair, time.monotonic())
            else:
                self._close(pair)

    def _event(self, pair: Pair, side: int, events: int) -> None:
        if pair not in self._pairs:
            return
        if side and pair.connecting and events & _WRITE:
            pair.connecting = False
            if pair.socks[1].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._close(pair)
                return
        if events & _READ:
            self._read(pair, side)
        if pair in self._pairs:
            self._advance(pair, time.monotonic())

    def _read(self, pair: Pair, side: int) -> None:
        pipe = pair.pipes[side]
        try:
            data = pair.socks[side].recv(CHUNK)
        except BlockingIOError:
            return
        except ConnectionError:
            self._close(pair)
            return
        way = pipe.source, pipe.target
        pipe.ended = not data
        if data and way in self._damages:
            data = self._damage(way, data)
        pipe.held.append((time.monotonic() + self._delays.get(way, 0), data))
        pipe.size += len(data)

    def _damage(self, way: tuple[str, str], data: bytes) -> bytes:
        after = self._damages[way]
        if after >= len(data):
            self._damages[way] = after - len(data)
            return data
        del self._damages[way]
        self.damaged += 1
        return data[:after] + bytes((data[after] ^ 0x10,)) + data[after + 1 :]

    def _advance(self, pair: Pair, now: float) -> float | None:
        """Pass on what may pass; in how many seconds more may, if that is known."""
        wanted = [0, 0]
        delay: float | None = None
        for side, pipe in enumerate(pair.pipes):
            if (pipe.source, pipe.target) in self._silent:
                continue
            if not pipe.ended and pipe.size < HELD_MAX:
                wanted[side] |= _READ
            if pair.connecting:
                wanted[1] |= _WRITE
                continue
            while pipe.held:
                due, data = pipe.held[0]
                if due > now:
                    delay = due - now if delay is None else min(delay, due - now)
                    break
                target = pair.socks[1 - side]
                try:
                    if data:
                        sent = target.send(data)
                    else:
                        target.shutdown(socket.SHUT_WR)
                        pipe.over = True
                        sent = 0
                except BlockingIOError:
                    wanted[1 - side] |= _WRITE
                    break
                except OSError:
                    self._close(pair)
                    return None
                pipe.size -= sent
                if sent == len(data):
                    pipe.held.popleft()
                else:
                    pipe.held[0] = due, data[sent:]
        if all(pipe.over for pipe in pair.pipes):
            self._close(pair)
            return None
        for side, sock in enumerate(pair.socks):
            self._want(pair, side, sock, wanted[side])
        return delay

    def _want(self, pair: Pair, side: int, sock: socket.socket, events: int) -> None:
        registered = self._registered.get(sock, 0)
        if events == registered:
            return
        if not events:
            self._selector.unregister(sock)
            del self._registered[sock]
            return

        def event(mask: int) -> None:
            self._event(pair, side, mask)

        if registered:
            self._selector.modify(sock, events, event)
        else:
            self._selector.register(sock, events, event)
        self._registered[sock] = events

    def _reset(self, nodes: set[str]) -> int:
        found = [pair for pair in self._pairs if pair.nodes == nodes]
        for pair in found:
            self._close(pair)
        self.resets += len(found)
        return len(found)

    def _close(self, pair: Pair) -> None:
        """Both ends see a reset."""
        del self._pairs[pair]
        for sock in pair.socks:
            if self._registered.pop(sock, 0):
                self._selector.unregister(sock)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()
