"""Threads of one process that conflict on an object take turns.

Who lost a conflict that nobody could resolve tries again, and who won goes on: always
one step ahead of the others, with the object in the cache. Left alone, the same thread
wins tens of times in a row while the others load, compute and lose.

So a thread that lost gets a ticket for the object. When it begins again (`sync`), it
waits until the tickets before its own are used: it reads what they committed. A thread
without ticket waits before it stores the object, which it read too early anyway.
Nothing depends on who waits: all waits are short, and end when the one who is awaited
does not come back, or does something else.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neo.lib.runtime import ClientRuntime

# In seconds: to begin again after a conflict; to commit what was begun; to wait for
# others, in all.
COME_BACK = 0.05
TURN = 0.1
PATIENCE = 0.5


class Ticket:
    """The place of one thread in the queue of an object."""

    __slots__ = ("began", "oid", "until")

    def __init__(self, oid: bytes) -> None:
        self.oid = oid
        self.until = 0.0  # monotonic time: not to be waited for any longer
        self.began = False  # it is trying again


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

    def lost(self, oid: bytes) -> None:
        """The calling thread is told of a conflict."""
        thread = self._runtime.thread()
        ticket = self._tickets.get(thread)
        if ticket is None or ticket.oid != oid:
            self._drop(thread)
            ticket = self._tickets[thread] = Ticket(oid)
            self._queues.setdefault(oid, {})[thread] = ticket
        # Else it lost to another process: it keeps its place.
        ticket.until = self._runtime.monotonic() + COME_BACK
        ticket.began = False

    def synchronise(self) -> None:
        """The calling thread begins to read: let those before it commit."""
        if not self._tickets:
            return
        thread = self._runtime.thread()
        ticket = self._tickets.get(thread)
        if ticket is None:
            return
        if ticket.began:
            self._drop(thread)  # it did something else
            return
        ticket.began = True
        ticket.until = self._runtime.monotonic() + PATIENCE + TURN
        self._wait(ticket.oid, thread)
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

    def committed(self) -> None:
        """The calling thread committed."""
        if self._tickets:
            self._drop(self._runtime.thread())

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
