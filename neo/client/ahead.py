"""Transactions begun ahead of need: one round trip less in a row of commits.

Who commits one transaction after the other asks for the ttid of the next in the packet
that finishes the previous one. The master can't tell it from a transaction that waits
for its first object, which costs others nothing but that a replica that catches up
waits for its end: it is aborted soon if nobody uses it at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo.lib.connection import Connection
from neo.lib.protocol import AbortTransaction, AskBeginTransaction

if TYPE_CHECKING:
    from .answers import Answer
    from .app import ClientApp

# Between the end of a commit and the next begin, for them to be in a row (seconds).
PACE = 0.02
# How long a transaction may wait for its use, and at most twice that (seconds).
UNUSED = 0.25


class Ahead:
    """At most one transaction that is begun, or about to be, and not used."""

    def __init__(self, app: ClientApp) -> None:
        self.app = app
        self._in_a_row = False
        self._finished_at = float("-inf")
        self._answer: Answer | None = None
        self._seen: Answer | None = None  # was there already at the last look
        self._watching = False

    def take(self) -> Answer | None:
        """What was asked for ahead, for a transaction that begins now."""
        app = self.app
        if self._answer is not None and not self._answer.done:
            return None  # it comes with the end of another thread's transaction
        now = app.runtime.monotonic()
        self._in_a_row = now - self._finished_at < PACE
        links_lost = False
        if self._in_a_row and self._answer is not None:
            links = list(app.links.values())
            app.runtime.look(links)
            links_lost = any(conn.closed for conn in links)
        answer, self._answer = self._answer, None
        if answer is not None and answer.done:
            if not self._in_a_row or links_lost:
                # Who did nothing for a while, or has lost a storage, asks, and so hears
                # the news.
                self._abort(answer)
                return None
            if answer.value is None:
                return None
        return answer

    def ask(self, master: Connection, answer: Answer) -> None:
        """A transaction is being finished: begin the next if commits are in a row."""
        if self._in_a_row and self._answer is None:
            self._answer = answer
            master.ask(AskBeginTransaction, None).then(answer.set, answer.fail)
            if not self._watching:
                self._watching = True
                self.app.runtime.call_later(UNUSED, self._look)

    def finished(self) -> None:
        """A transaction is committed."""
        self._finished_at = self.app.runtime.monotonic()

    def forget(self) -> None:
        """The master is lost, and what was asked for with it."""
        self._answer = None

    def drop(self) -> None:
        """Abort what was asked for: an import must be alone. Waits for the answer."""
        answer, app = self._answer, self.app
        self._answer = None
        if answer is None:
            return
        if not answer.done:
            assert app.master is not None
            app.runtime.wait(lambda: answer.done, (app.master,))
        if app.master is not None:
            self._abort(answer)

    def _look(self) -> None:
        """Abort what was not used since the last look."""
        answer, app = self._answer, self.app
        self._watching = answer is not None
        if answer is None:
            return
        if answer is self._seen and answer.done and not app.exclusive:
            self.forget()
            self._watching = False
            self._abort(answer)
            return
        self._seen = answer
        app.runtime.call_later(UNUSED, self._look)

    def _abort(self, answer: Answer) -> None:
        if answer.value is not None:
            assert self.app.master is not None
            self.app.master.notify(AbortTransaction, answer.value[0], [])


__all__ = ["Ahead"]
