"""Turns of threads that conflict: against a clock that tests move."""

from __future__ import annotations

from collections.abc import Callable
from random import Random  # noqa: TID251 not random here
from typing import Any

import pytest

from neo.client import turns as module
from neo.client.turns import (
    COME_BACK,
    CONTENDED,
    PATIENCE,
    PAUSE,
    PAUSE_MAX,
    TURN,
    Turns,
)

X, Y = b"x" * 8, b"y" * 8
A, B = b"a" * 8, b"b" * 8  # tids


class Longest(Random):
    """Draws what it may at most."""

    def uniform(self, a: float, b: float) -> float:
        return b


class Runtime:
    """Whoever waits lets `meanwhile` happen, then time passes."""

    rng = Longest()

    def __init__(self) -> None:
        self.time = 0.0
        self.current = "a"
        self.meanwhile: list[Callable[[], object]] = []

    def monotonic(self) -> float:
        return self.time

    def thread(self) -> str:
        return self.current

    def wait(self, condition: Callable[[], object], _: Any, timeout: float) -> bool:
        waiting, deadline = self.current, self.time + timeout
        while not condition():
            if not self.meanwhile:
                self.time = deadline
            if self.time >= deadline:
                break
            self.meanwhile.pop(0)()
            self.current = waiting
        return bool(condition())

    def run(self, thread: str, action: Callable[..., Any], *args: Any) -> Any:
        """Do something as a thread."""
        self.current = thread
        return action(*args)


def make() -> tuple[Runtime, Turns]:
    runtime = Runtime()
    return runtime, Turns(runtime)  # type: ignore[arg-type]


def test_losers_commit_in_order() -> None:
    runtime, turns = make()
    for thread in "abc":
        runtime.run(thread, turns.lost, X, B)
    runtime.run("a", turns.synchronise)
    runtime.meanwhile.append(lambda: runtime.run("a", turns.committed, A, []))
    runtime.run("b", turns.synchronise)
    assert runtime.meanwhile == []  # it waited
    runtime.meanwhile.append(lambda: runtime.run("b", turns.committed, A, []))
    runtime.run("c", turns.synchronise)
    assert (runtime.time, runtime.meanwhile) == (0, [])
    runtime.run("c", turns.committed, A, [])
    assert turns._tickets == turns._queues == {}


def test_winner_waits() -> None:
    runtime, turns = make()
    assert not turns.store(X)
    runtime.run("b", turns.lost, X, B)
    assert not runtime.run("a", turns.store, Y)
    runtime.run("b", turns.synchronise)
    runtime.meanwhile.append(lambda: runtime.run("b", turns.committed, A, []))
    assert runtime.run("a", turns.store, X)
    assert runtime.time == 0


def test_who_does_not_come_back_is_not_awaited() -> None:
    runtime, turns = make()
    runtime.run("a", turns.lost, X, B)
    runtime.run("b", turns.lost, X, B)
    runtime.run("b", turns.synchronise)
    assert runtime.time == COME_BACK
    runtime.run("c", turns.store, X)
    assert runtime.time <= COME_BACK + TURN + 1e-6
    assert turns._tickets == turns._queues == {}


def test_who_does_something_else_loses_its_turn() -> None:
    runtime, turns = make()
    runtime.run("a", turns.lost, X, B)
    turns.synchronise()
    turns.synchronise()
    assert turns._queues == {}
    turns.lost(X, B)
    turns.lost(Y, B)
    assert list(turns._queues) == [Y]


def test_who_loses_again_keeps_its_place_but_not_for_ever() -> None:
    runtime, turns = make()
    runtime.run("a", turns.lost, X, B)
    runtime.run("b", turns.lost, X, B)

    def again() -> None:
        runtime.time += 0.04
        runtime.run("a", turns.synchronise)
        runtime.run("a", turns.lost, X, B)

    runtime.meanwhile = [again] * 100
    runtime.run("b", turns.store, X)
    assert list(turns._queues[X]) == ["a", "b"]
    runtime.run("b", turns.lost, X, B)
    runtime.meanwhile = [again] * 100
    runtime.run("b", turns.synchronise)
    assert PATIENCE <= runtime.time < PATIENCE + TURN


def test_without_synchronising() -> None:
    """As applications that begin no transaction explicitly."""
    runtime, turns = make()
    runtime.run("a", turns.lost, X, B)
    assert not turns.store(X)
    runtime.time += TURN / 2
    runtime.run("b", turns.store, X)
    assert runtime.time == TURN


def rows(runtime: Runtime, turns: Turns, count: int, conflict: bytes) -> list[float]:
    """Commit several times in a row after a conflict; the pauses that were made."""
    turns.lost(X, conflict)
    base, pauses = conflict, []
    for n in range(count):
        before = runtime.time
        turns.synchronise()
        pauses.append(runtime.time - before)
        turns.store(X)
        tid = n.to_bytes(8, "big")
        turns.finished(tid)
        turns.committed(tid, [(X, base), (Y, A)])
        base = tid
    return pauses


def test_pauses_for_other_processes() -> None:
    runtime, turns = make()
    pauses = rows(runtime, turns, 10, B)
    assert pauses[:4] == [0, 0, 2 * PAUSE, 3 * PAUSE]
    assert max(pauses) == pytest.approx(PAUSE_MAX)
    runtime.time += CONTENDED
    assert rows(runtime, turns, 1, (9).to_bytes(8, "big")) == [0]


def test_no_pause_if_the_conflict_is_with_ourselves() -> None:
    runtime, turns = make()
    turns.finished(B)
    assert rows(runtime, turns, 5, B) == [0] * 5


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONTENDED_MAX", 10)
    runtime, turns = make()
    for n in range(1000):
        runtime.time += 1
        turns.lost(n.to_bytes(8, "big"), B)
        turns.finished(n.to_bytes(8, "big"))
    assert len(turns._contended) <= 11
    assert len(turns._own) <= 100
