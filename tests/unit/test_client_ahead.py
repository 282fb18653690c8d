"""Transactions begun ahead of need."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from neo.client.ahead import PACE, UNUSED, Ahead
from neo.client.answers import Answer
from neo.lib.connection import Connection
from neo.lib.handler import Handler
from neo.lib.protocol import (
    AbortTransaction,
    AnswerBeginTransaction,
    AskBeginTransaction,
    ErrorCode,
)
from neo.lib.util import p64
from tests.fakes import FakeRuntime, established, feed, messages

TTID = p64(110)


class World:
    """A client that commits, and what its master gets."""

    def __init__(self) -> None:
        self.runtime = FakeRuntime()
        self.conn = established(Handler(), runtime=self.runtime)
        self.link = established(Handler(), runtime=self.runtime)
        self.news: list[str] = []  # what came on that connection, not read yet
        self.runtime.look = self._look  # type: ignore[attr-defined]
        self.app: Any = SimpleNamespace(
            runtime=self.runtime,
            exclusive=False,
            master=self.conn,
            links={1: self.link},
        )
        self.ahead = Ahead(self.app)

    def _look(self, connections: Iterable[Connection]) -> None:
        assert list(connections) == [self.link]
        if self.news:
            self.link.lost(self.news.pop())

    def commit(self) -> None:
        """A transaction is being finished; one may begin ahead."""
        self.ahead.ask(self.conn, Answer())

    def row(self) -> None:
        """One commit right after another."""
        self.ahead.finished()
        assert self.ahead.take() is None
        self.commit()

    def asked(self) -> list[tuple[int, int, tuple[Any, ...]]]:
        """What was sent since the last call."""
        return messages(self.conn)

    def answer(self) -> None:
        """The master begins what was asked for."""
        ((msg_id, code, args),) = self.asked()
        assert (code, args) == (AskBeginTransaction.code, (None,))
        feed(self.conn, msg_id, AnswerBeginTransaction, TTID)


@pytest.fixture
def world() -> World:
    return World()


def test_lone_commits_begin_nothing(world: World) -> None:
    world.commit()
    world.ahead.finished()
    world.runtime.advance(2 * PACE)
    assert world.ahead.take() is None
    world.commit()
    assert world.asked() == []


def test_row_of_commits(world: World) -> None:
    world.row()
    world.answer()
    world.commit()  # another thread's: one ahead is enough
    assert world.asked() == []
    answer = world.ahead.take()
    assert answer is not None
    assert answer.value == (TTID,)
    assert world.ahead.take() is None
    world.runtime.advance(10 * UNUSED)
    assert world.asked() == []


def test_begin_while_another_thread_finishes(world: World) -> None:
    """What is answered with the end of that is left to who needs it then."""
    world.row()
    assert world.ahead.take() is None
    world.answer()
    answer = world.ahead.take()
    assert answer is not None
    assert answer.value == (TTID,)


def test_late_begin_asks(world: World) -> None:
    """An idle client must hear the news before it stores."""
    world.row()
    world.answer()
    world.runtime.advance(2 * PACE)
    assert world.ahead.take() is None
    ((_, code, args),) = world.asked()
    assert (code, args) == (AbortTransaction.code, (TTID, ()))


def test_lost_storage(world: World) -> None:
    """It died since the last commit: nothing may be stored on a dead connection."""
    world.row()
    world.answer()
    world.news.append("killed")
    assert world.ahead.take() is None
    ((_, code, args),) = world.asked()
    assert (code, args) == (AbortTransaction.code, (TTID, ()))


def test_unused_is_aborted(world: World) -> None:
    world.row()
    world.answer()
    world.app.exclusive = True  # nothing may be sent now
    world.runtime.advance(10 * UNUSED)
    assert world.asked() == []
    world.app.exclusive = False
    world.runtime.advance(2 * UNUSED)
    ((_, code, args),) = world.asked()
    assert (code, args) == (AbortTransaction.code, (TTID, ()))
    assert world.ahead.take() is None
    world.row()  # the watch starts again
    world.answer()
    world.runtime.advance(2 * UNUSED)
    assert len(world.asked()) == 1


def test_refused_or_lost(world: World) -> None:
    world.row()
    ((msg_id, _, _),) = world.asked()
    world.conn.lost("test")
    assert msg_id >= 0
    assert world.ahead.take() is None  # a failure is not for the next transaction
    other = World()
    other.row()
    other.ahead.forget()
    assert other.ahead.take() is None
    refused = World()
    refused.row()
    answer = refused.ahead._answer
    assert answer is not None
    answer.fail(ErrorCode.NOT_READY, "")
    assert refused.ahead.take() is None
