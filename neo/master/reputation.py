"""Storages that are connected, but of no use to the others: put aside for a while.

A storage that some client can't reach is disconnected when that client commits without
it. It returns at once, and the next commit of this client would disconnect it again:
all its cells would be replicated, for ever. So who is disconnected again, although it
answers us, must stay away for a minute. Likewise who does not get ready in time: nobody
can begin a transaction meanwhile. If that happens again, it stays away for longer.

A storage is never put aside if it is needed, nor for having died: then it comes back
when it is well. Source: behaviour 12.5, testing.md 9 (rows 16 and 26).
"""

from __future__ import annotations

PERIOD = 60.0  # seconds
LONGEST = 960.0


class Reputation:
    """By nid; times are monotonic."""

    def __init__(self) -> None:
        self._unreachable: dict[int, float] = {}  # when it was disconnected, last
        self._idle: dict[int, float] = {}  # how long it was put aside, last
        self._until: dict[int, float] = {}

    def unreachable(self, nid: int, now: float) -> None:
        """Clients can't reach it, but we can; it is being disconnected."""
        last = self._unreachable.get(nid)
        self._unreachable[nid] = now
        if last is not None and now < last + 2 * PERIOD:
            self._until[nid] = now + PERIOD

    def idle(self, nid: int, now: float) -> None:
        """It did not get ready; it is being disconnected."""
        duration = self._idle.get(nid, 0.0) * 2 or PERIOD
        self._idle[nid] = min(duration, LONGEST)
        self._until[nid] = now + self._idle[nid]

    def ready(self, nid: int) -> None:
        """It serves."""
        self._idle.pop(nid, None)

    def aside(self, nid: int | None, now: float) -> float:
        """Seconds for which it must stay away."""
        return 0.0 if nid is None else max(0.0, self._until.get(nid, 0.0) - now)
