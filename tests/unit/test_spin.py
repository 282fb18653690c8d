"""Adaptive spin: where a thread looks for a moment before it sleeps."""

from __future__ import annotations

import os
import time  # noqa: TID251
from collections.abc import Iterator

import pytest

from neo.lib import spin
from neo.lib.spin import DISTURBED, FEW, LONGEST, PAUSE, SHORT, Processors, Spin


class World:
    """Time passes with each look; events come after some of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.step = 2e-6
        self.comes_at = float("inf")
        self.looks = 0
        self.ready = 2
        self.yields = 0
        patch.setattr(time, "monotonic", lambda: self.now)
        patch.setattr(os, "cpu_count", lambda: 2)
        patch.setattr(os, "sched_yield", self._yield)
        patch.setattr(os, "pread", self._load)
        self.spin = Spin(Processors())

    def _yield(self) -> None:
        self.yields += 1

    def _load(self, *_: int) -> bytes:
        return b"0.52 0.58 0.59 %d/177 16501\n" % self.ready

    def poll(self, timeout: int) -> list[int]:
        assert timeout == 0
        self.looks += 1
        self.now += self.step
        return [7] if self.now >= self.comes_at else []

    def look(self, after: float | None = None) -> list[int]:
        """One wait; something comes so many seconds after its beginning."""
        self.looks = 0
        self.comes_at = self.now + after if after is not None else float("inf")
        return list(self.spin.look(self.poll))

    def sleep(self, seconds: float, times: int = 1) -> None:
        """Waits that end in time, if none of them needs a sleep."""
        for _ in range(times):
            assert self.look() == []
            assert self.looks == 0
            self.spin.slept(seconds)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with monkeypatch.context() as patch:
        yield World(patch)


def test_spins_after_short_sleeps(world: World) -> None:
    world.sleep(SHORT / 2, FEW[0])
    assert world.look(LONGEST / 2) == [7]
    assert world.looks > 10
    assert world.yields > 10
    assert world.look(0) == [7]
    assert world.looks == 1


def test_long_sleeps_count_against(world: World) -> None:
    world.sleep(SHORT * 2, 100)
    world.sleep(SHORT / 2, FEW[0] - 1)
    world.sleep(SHORT * 2, 1)
    world.sleep(SHORT / 2, 2)
    assert world.look(LONGEST / 2) == [7]


def test_spins_in_vain(world: World) -> None:
    """Each one doubles what is needed for the next one, up to a limit."""
    needed = FEW[0]
    for _ in range(12):
        world.sleep(SHORT / 2, needed)
        start = world.now
        assert world.look() == []
        assert LONGEST < world.now - start < 1.1 * LONGEST
        needed = min(2 * needed, FEW[1])
    world.sleep(SHORT / 2, FEW[1])
    for _ in range(10):  # it pays again
        assert world.look(LONGEST / 2) == [7]
    assert world.look() == []
    world.sleep(SHORT / 2, 2 * FEW[0])
    assert world.look(LONGEST / 2) == [7]


def test_no_spin_while_threads_wait_for_a_processor(world: World) -> None:
    world.sleep(SHORT / 2, FEW[0])
    world.ready = 3
    assert world.look(LONGEST / 2) == []
    assert world.looks == 1
    world.ready = 2
    assert world.look(LONGEST / 2) == [7]


def test_pause_when_another_thread_ran(world: World) -> None:
    world.sleep(SHORT / 2, FEW[0])
    pause = PAUSE[0]
    while pause < PAUSE[1]:
        world.step = 2 * DISTURBED
        assert world.look() == []
        world.step = 2e-6
        world.now += 0.9 * pause
        assert world.look(LONGEST / 2) == []
        assert world.looks == 1
        world.now += 0.2 * pause
        pause *= 2
    assert world.look(LONGEST / 2) == [7]


@pytest.mark.parametrize("count", [1, None])
def test_one_processor(count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spin.os, "cpu_count", lambda: count)
    assert Processors().are_short()


def test_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise FileNotFoundError

    monkeypatch.setattr(spin.os, "open", refuse)
    assert Processors().are_short()


def test_real_load() -> None:
    processors = Processors()
    assert processors.are_short() in (True, False)
    del processors
