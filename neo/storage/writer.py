"""The writer: one group of jobs at a time writes to the database.

A job is a function that calls methods of the backend's writer face. Jobs are executed
in the order in which they were submitted, off the loop; those that wait while a group
is being committed make the next one, a single SQL transaction. Its commit is durable if
one of its jobs promises something. Answers are sent by the jobs' `done`, after the
commit: what is said is on disk.

A *lazy* job waits for another one to be committed with, at most `LAZY_DELAY`; where
a commit that is not durable costs nothing but time, it goes when the writer is idle.

An error in a group ends the node: what is counted in memory isn't rolled back. So what
can be refused is refused before. Source: architecture 6.4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from neo.lib.runtime import Runtime, Timer

from .database.interface import Backend

T = TypeVar("T")

QUEUE = "writer"
LAZY_DELAY = 1.0  # seconds

_Job = tuple[Callable[[], Any], Callable[[Any], object]]


def ignore(result: object) -> None:
    """A `done` that has nothing to do."""


class Writer:
    """Groups the writes of a node.

    `alone()`: nobody's reads would wait for a commit; see `Runtime.submit`, `inline`.
    """

    def __init__(
        self, runtime: Runtime, backend: Backend, alone: Callable[[], bool]
    ) -> None:
        self._runtime = runtime
        self._backend = backend
        self._alone = alone
        self._waiting: list[_Job] = []
        self._durable = False  # one of `_waiting` promises something
        self._running = False
        self._starting = False  # `_start` was scheduled
        self._urgent = False  # something in `_waiting` is not lazy
        self._timer: Timer | None = None
        self._checkpointing = False

    @property
    def idle(self) -> bool:
        """Whether all that was submitted is committed."""
        return not (self._waiting or self._running)

    def submit(
        self,
        job: Callable[[], T],
        done: Callable[[T], object] = ignore,
        *,
        durable: bool = True,
    ) -> None:
        """Execute `job` in the next group; then `done(result)` on the loop."""
        self._waiting.append((job, done))
        self._durable = self._durable or durable
        self.flush()

    def submit_lazily(
        self, job: Callable[[], T], done: Callable[[T], object] = ignore
    ) -> None:
        """As `submit`, for what promises nothing and may wait for a group."""
        self._waiting.append((job, done))
        if self._starting or self._urgent:
            return
        if self._backend.has_cheap_commits and not self._running:
            # Nothing else to do now: the next group will have less to write.
            self.flush()
        elif self._timer is None:
            self._timer = self._runtime.call_later(LAZY_DELAY, self.flush)

    def barrier(self, done: Callable[[], object]) -> None:
        """Call `done` when all that was submitted is committed: maybe at once."""
        if self.idle:
            done()
        else:
            self.submit(bool, lambda result: done(), durable=False)

    def flush(self) -> None:
        """Let what waits go, lazy or not."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._urgent = bool(self._waiting)
        if self._urgent and not (self._running or self._starting):
            # At the end of this turn: its other packets may have something to add.
            self._starting = True
            self._runtime.call_later(0, self._start)

    def _start(self) -> None:
        self._starting = self._urgent = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        jobs, self._waiting = self._waiting, []
        durable, self._durable = self._durable, False
        self._running = True
        self._runtime.submit(
            QUEUE,
            lambda: self._execute(jobs, durable),
            lambda results: self._committed(jobs, results),
            inline=self._alone(),
        )

    def _execute(self, jobs: list[_Job], durable: bool) -> list[Any]:
        backend = self._backend
        backend.begin(durable)
        try:
            results = [job() for job, _ in jobs]
            backend.commit()
        except BaseException:
            backend.rollback()
            raise
        return results

    def _committed(self, jobs: list[_Job], results: list[Any] | Exception) -> None:
        if isinstance(results, Exception):
            raise results
        self._running = False
        # Before the answers: the disk works while the loop sends them.
        if self._urgent or (self._waiting and self._backend.has_cheap_commits):
            self.flush()
        for (_, done), result in zip(jobs, results, strict=True):
            done(result)
        if self._backend.wants_checkpoint and not self._checkpointing:
            self._checkpointing = True
            self._runtime.submit("checkpoint", self._backend.checkpoint, self._moved)

    def _moved(self, result: Exception | None) -> None:
        self._checkpointing = False
        if isinstance(result, Exception):
            raise result

    def check(self) -> None:
        """Assert that what waits will be executed."""
        assert (
            not self._waiting
            or self._running
            or self._starting
            or self._timer is not None
        ), self._waiting
        assert not self._urgent or self._running or self._starting
        assert self._timer is None or self._waiting
