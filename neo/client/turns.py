"""Threads of one process that conflict on an object take turns.

Who lost a conflict that nobody could resolve tries again, and who won goes on: always
one step ahead of the others, with the object in the cache. Left alone, the same thread
wins tens of times in a row while the others load, compute and lose.

So a thread that lost gets a ticket for the object. When it begins again (`sync`), it
waits until the tickets before its own are used: it reads what they committed. A thread
without ticket waits before it stores the object, which it read too early anyway.
Nothing depends on who waits: all waits are short, and end when the one who is awaited
does not come back, or does something else.

Other processes lose in the same way, unseen. So a process that lost such a conflict a
while ago, and has committed the object several times in a row since, pauses before it
reads the next time: the longer the row, the longer the pause, on average.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neo.lib.runtime import ClientRuntime

# In seconds: to begin again after a conflict; to commit what was begun; to wait for
# others, in all.
COME_BACK = 0.05
TURN = 0.1
PATIENCE = 0.5
# How long an object is contended after a conflict; of the pause, for each commit in a
# row, and at most.
CONTENDED = 1.0
PAUSE = 0.004
PAUSE_MAX = 0.02
# Objects remembered, before one looks which are contended no more.
CONTENDED_MAX = 1000
# Own commits that are recognised as such.
OWN_MAX = 100


class Ticket:
    """The place of one thread in the queue of an object."""

    __slots__ = ("began", "oid", "until")

    def __init__(self, oid: bytes) -> None:
        self.oid = oid
        self.until = 0.0  # monotonic time: not to be waited for any longer
        self.began = False  # it is trying again


class Contention:
    """What is remembered of an object on which this process had conflicts."""

    __slots__ = ("not_before", "row", "tid", "until")

    def __init__(self) -> None:
        self.until = 0.0  # when the last conflict with another process is long ago
        self.not_before = 0.0  # when this process may read it again
        self.tid = b""  # of its last commit here
        self.row = 0  # commits here without one elsewhere in between


class Turns:
    """The queues of all objects on which threads of this process conflict.

    A thread has one ticket at most. The caller holds the lock of the Runtime. No cycle
    of waiting lasts: who has a ticket waits before it begins only, who has none waits
    before its first store, and nobody waits for long.
    """

    def __init__(self, runtime: ClientRuntime) -> None:
        self._runtime = runtime
        self._tickets: dict[Hashable, Ticket] = {}
        self._queues: dict[bytes, dict[Hashable, Ticket]] = {}
        self._contended: dict[bytes, Contention] = {}
        self._pauses: dict[Hashable, Contention] = {}  # due when a thread begins
        self._own: dict[bytes, None] = {}  # tids of the last commits here

    def lost(self, oid: bytes, tid: bytes | None) -> None:
        """The calling thread is told of a conflict with the revision of `tid`."""
        thread = self._runtime.thread()
        ticket = self._tickets.get(thread)
        if ticket is None or ticket.oid != oid:
            self._drop(thread)
            ticket = self._tickets[thread] = Ticket(oid)
            self._queues.setdefault(oid, {})[thread] = ticket
        # Else it lost to another process: it keeps its place.
        now = self._runtime.monotonic()
        ticket.until = now + COME_BACK
        ticket.began = False
        contention = self._contended.get(oid)
        if contention is None:
            if len(self._contended) >= CONTENDED_MAX:
                self._forget(now)
            contention = self._contended[oid] = Contention()
        if tid not in self._own:
            contention.until = now + CONTENDED

    def synchronise(self) -> None:
        """The calling thread begins to read: let those before it commit."""
        if not self._contended:
            return
        thread = self._runtime.thread()
        contention = self._pauses.pop(thread, None)
        if contention is not None:
            self._pause(contention)
        ticket = self._tickets.get(thread)
        if ticket is None:
            return
        if ticket.began:
            self._drop(thread)  # it did something else
            return
        ticket.began = True
        ticket.until = self._runtime.monotonic() + PATIENCE + TURN
        self._wait(ticket.oid, thread)
        self._pause(self._contended[ticket.oid])
        ticket.until = self._runtime.monotonic() + TURN

    def store(self, oid: bytes) -> bool:
        """The calling thread is about to store its first object; true if it waited."""
        if oid not in self._queues:
            return False
        thread = self._runtime.thread()
        ticket = self._tickets.get(thread)
        if ticket is None:
            self._wait(oid, thread)
            return True
        if not ticket.began:  # it does not synchronise
            ticket.began = True
            ticket.until = self._runtime.monotonic() + TURN
        return False

    def committed(self, tid: bytes, bases: Iterable[tuple[bytes, bytes]]) -> None:
        """The calling thread committed: (oid, serial before) of the objects."""
        contended = self._contended
        if not contended:
            return
        thread = self._runtime.thread()
        self._drop(thread)
        now = self._runtime.monotonic()
        for oid, base in bases:
            contention = contended.get(oid)
            if contention is None:
                continue
            if now >= contention.until and oid not in self._queues:
                del contended[oid]
                continue
            contention.row = contention.row + 1 if base == contention.tid else 1
            contention.tid = tid
            if contention.row > 1 and now < contention.until:
                longest = min(PAUSE * contention.row, PAUSE_MAX)
                contention.not_before = now + self._runtime.rng.uniform(0, longest)
                self._pauses[thread] = contention

    def _forget(self, now: float) -> None:
        """Forget the objects that were contended."""
        self._contended = {
            oid: contention
            for oid, contention in self._contended.items()
            if now < contention.until or oid in self._queues
        }

    def finished(self, tid: bytes) -> None:
        """Some thread commits, and will say what."""
        self._own[tid] = None
        if len(self._own) > OWN_MAX:
            del self._own[next(iter(self._own))]

    def _pause(self, contention: Contention) -> None:
        left = contention.not_before - self._runtime.monotonic()
        if left > 0:
            self._runtime.wait(lambda: False, (), left)

    def _drop(self, thread: Hashable) -> None:
        ticket = self._tickets.pop(thread, None)
        if ticket is not None:
            queue = self._queues[ticket.oid]
            del queue[thread]
            if not queue:
                del self._queues[ticket.oid]

    def _first(self, oid: bytes) -> Hashable | None:
        return next(iter(self._queues.get(oid, ())), None)

    def _wait(self, oid: bytes, thread: Hashable) -> None:
        """Until it is the turn of a thread, or of nobody."""
        runtime = self._runtime
        deadline = runtime.monotonic() + PATIENCE
        while (first := self._first(oid)) not in (None, thread):
            now = runtime.monotonic()
            until = self._queues[oid][first].until
            if until <= now:
                self._drop(first)  # it is late: it loses its turn
            elif deadline <= now:
                return
            else:
                runtime.wait(
                    lambda f=first: self._first(oid) != f,  # type: ignore[misc]
                    (),
                    min(until, deadline) - now,
                )


__all__ = ["Turns"]
