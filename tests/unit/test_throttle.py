"""When an address may be connected to again."""

from __future__ import annotations

from neo.lib.runtime import Throttle

HERE, THERE = ("127.0.0.1", 1), ("127.0.0.1", 2)


def test_failures_are_spaced() -> None:
    throttle = Throttle()
    assert throttle.delay(HERE, 10) == 0
    assert throttle.delay(THERE, 10) == 0
    assert throttle.delay(HERE, 10.25) == 0.75
    assert throttle.delay(HERE, 10.25) == 1.75
    throttle.cancelled(HERE)
    assert throttle.delay(HERE, 12) == 0


def test_refusal_is_told_once() -> None:
    """It says nothing of the attempts that follow."""
    throttle = Throttle()
    throttle.refused(HERE)
    assert not throttle.was_refused(THERE)
    assert throttle.was_refused(HERE)
    assert not throttle.was_refused(HERE)


def test_loss_of_a_session() -> None:
    """However short it was, the first attempt that follows is made at once."""
    throttle = Throttle()
    assert throttle.delay(HERE, 10) == 0
    throttle.succeeded(HERE, 10.25)
    assert throttle.delay(HERE, 10.5) == 0
    assert throttle.delay(HERE, 10.5) == 1
    assert throttle.delay(HERE, 20) == 0
    throttle.succeeded(HERE, 20.25)
    assert throttle.delay(HERE, 20.5) == 0


def test_sessions_that_end_at_once() -> None:
    """Who accepts and closes is not connected to without a pause."""
    throttle = Throttle()
    now, attempts = 10.0, 0
    while now < 20:
        now += throttle.delay(HERE, now)
        now += 0.001
        throttle.succeeded(HERE, now)
        attempts += 1
    assert 10 <= attempts <= 21
