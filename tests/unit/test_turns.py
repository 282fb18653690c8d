"""Turns of threads that conflict: against a clock that tests move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neo.client.turns import COME_BACK, PATIENCE, TURN, Turns

X, Y = b"x" * 8, b"y" * 8


class Runtime:
    """Whoever waits lets `meanwhile` happen, then time passes."""

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
        runtime.run(thread, turns.lost, X)
    runtime.run("a", turns.synchronise)
    runtime.meanwhile.append(lambda: runtime.run("a", turns.committed))
    runtime.run("b", turns.synchronise)
    assert runtime.meanwhile == []  # it waited
    runtime.meanwhile.append(lambda: runtime.run("b", turns.committed))
    runtime.run("c", turns.synchronise)
    assert (runtime.time, runtime.meanwhile) == (0, [])
    runtime.run("c", turns.committed)
    assert turns._tickets == turns._queues == {}


def test_winner_waits() -> None:
    runtime, turns = make()
    assert not turns.store(X)
    runtime.run("b", turns.lost, X)
    assert not runtime.run("a", turns.store, Y)
    runtime.run("b", turns.synchronise)
    runtime.meanwhile.append(lambda: runtime.run("b", turns.committed))
    assert runtime.run("a", turns.store, X)
    assert runtime.time == 0


def test_who_does_not_come_back_is_not_awaited() -> None:
    runtime, turns = make()
    runtime.run("a", turns.lost, X)
    runtime.run("b", turns.lost, X)
    runtime.run("b", turns.synchronise)
    assert runtime.time == COME_BACK
    runtime.run("c", turns.store, X)
    assert runtime.time <= COME_BACK + TURN + 1e-6
    assert turns._tickets == turns._queues == {}


def test_who_does_something_else_loses_its_turn() -> None:
    runtime, turns = make()
    runtime.run("a", turns.lost, X)
    turns.synchronise()
    turns.synchronise()
    assert turns._queues == {}
    turns.lost(X)
    turns.lost(Y)
    assert list(turns._queues) == [Y]


def test_who_loses_again_keeps_its_place_but_not_for_ever() -> None:
    runtime, turns = make()
    runtime.run("a", turns.lost, X)
    runtime.run("b", turns.lost, X)

    def again() -> None:
        runtime.time += 0.04
        runtime.run("a", turns.synchronise)
        runtime.run("a", turns.lost, X)

    runtime.meanwhile = [again] * 100
    runtime.run("b", turns.store, X)
    assert list(turns._queues[X]) == ["a", "b"]
    runtime.run("b", turns.lost, X)
    runtime.meanwhile = [again] * 100
    runtime.run("b", turns.synchronise)
    assert PATIENCE <= runtime.time < PATIENCE + TURN


def test_without_synchronising() -> None:
    """As applications that begin no transaction explicitly."""
    runtime, turns = make()
    runtime.run("a", turns.lost, X)
    assert not turns.store(X)
    runtime.time += TURN / 2
    runtime.run("b", turns.store, X)
    assert runtime.time == TURN
