"""The checker of histories: silent about a good one, each kind of damage is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.history import (
    CONFLICT,
    FAIL,
    OK,
    READ,
    UNKNOWN,
    Attempt,
    Value,
    check,
    decode,
    longest_gap,
    summary,
)

A, B = b"\0" * 7 + b"A", b"\0" * 7 + b"B"


def tid(n: int) -> bytes:
    return n.to_bytes(8, "big")


class World:
    """A good history that each test damages."""

    def __init__(self) -> None:
        x, y = Value(("init",)), Value(("init",))
        x1 = x.append("t1", -5)
        y1 = y.append("t1", +5)
        x2 = x1.append("t2")
        self.versions = {
            A: [(tid(1), x), (tid(2), x1), (tid(4), x2)],
            B: [(tid(1), y), (tid(2), y1)],
        }
        init = Attempt("init", 0, b"", 0, 1, {}, (A, B), (), OK, tid(1))
        self.t1 = Attempt(
            "t1", 2, tid(1), 3, 4, {A: tid(1), B: tid(1)}, (A, B), (), OK, tid(2)
        )
        self.t2 = Attempt(
            "t2", 5, tid(2), 5, 6, {A: tid(2), B: tid(2)}, (A,), (B,), OK, tid(4)
        )
        self.lost = Attempt(
            "t3", 5, tid(2), 5, 7, {A: tid(2)}, (A,), (), CONFLICT, phase="vote"
        )
        self.read = Attempt(
            "t4", 7, tid(4), None, 8, {A: tid(4), B: tid(2)}, outcome=READ, total=2000
        )
        self.pending = Attempt("t5", 7, tid(4), 7, None, {B: tid(2)}, (B,))
        self.attempts = [init, self.t1, self.t2, self.lost, self.read, self.pending]
        self.replicas = {"0/S1": {1: "x"}, "0/S2": {1: "x"}, "1/S1": {}}
        self.metadata = {tid(1): [A, B], tid(2): [A, B], tid(4): [A]}

    def check(self) -> list[str]:
        return check(self.attempts, self.versions, self.replicas, self.metadata)


def test_good() -> None:
    world = World()
    assert world.check() == []
    assert longest_gap(world.attempts, 0, 10) == 4
    assert summary(world.attempts) == {
        "conflict vote": 1, "ok begin": 3, "read begin": 1, "unknown begin": 1,
    }  # fmt: skip
    value = Value(("a", "b"), 7)
    assert decode(value.encode()) == value


def lost(w: World) -> None:
    w.versions[A].pop()


def half(w: World) -> None:
    w.versions[B].pop()


def twice(w: World) -> None:
    w.versions[B].append((tid(5), w.versions[B][-1][1].append("t2")))


def failed_but_present(w: World) -> None:
    w.t2.outcome, w.t2.tid = FAIL, None


def conflict_but_present(w: World) -> None:
    w.t1.outcome, w.t1.tid = CONFLICT, None


def lost_update(w: World) -> None:
    w.t2.reads[A] = tid(1)
    w.t2.at = tid(1)


def overwritten(w: World) -> None:
    w.versions[A][2] = tid(4), Value(("init", "t2"))


def checked_changed(w: World) -> None:
    w.versions[B].append((tid(3), w.versions[B][-1][1].append("t5")))


def stale_read(w: World) -> None:
    w.read.reads[A] = tid(2)


def future_read(w: World) -> None:
    w.lost.reads[A] = tid(4)


def wrong_total(w: World) -> None:
    assert w.read.total is not None
    w.read.total += 5


def late_sync(w: World) -> None:
    w.read.at = tid(2)
    w.read.reads[A] = tid(2)


def same_tid(w: World) -> None:
    w.t2.tid = tid(2)


def tid_in_the_past(w: World) -> None:
    w.t2.begin = 100
    w.attempts.append(Attempt("t6", 8, tid(4), 8, 9, {}, (), (), OK, tid(9)))


def unknown_author(w: World) -> None:
    w.versions[B].append((tid(7), w.versions[B][-1][1].append("ghost")))


def replicas_differ(w: World) -> None:
    w.replicas["0/S2"] = {1: "x", 2: "y"}


def no_metadata(w: World) -> None:
    del w.metadata[tid(2)]


def wrong_metadata(w: World) -> None:
    w.metadata[tid(2)] = [A]


def out_of_order(w: World) -> None:
    w.versions[A].insert(0, (tid(1), Value(("init",))))


@pytest.mark.parametrize(
    ("damage", "promise"),
    [
        (lost, "P7: t2 was acknowledged"),
        (half, "P1: t1 at 0000000000000002 wrote"),
        (twice, "P8: t2 is present at several tids"),
        (failed_but_present, "P9: t2 ended as fail"),
        (conflict_but_present, "P9: t1 ended as conflict"),
        (lost_update, "P5: t2 wrote"),
        (overwritten, "P5: .* follows"),
        (checked_changed, "P5: t2 checked"),
        (stale_read, "P4: t4 .* read"),
        (future_read, "P4: t3 .* read"),
        (wrong_total, "P4: t4 .* total of 2005"),
        (late_sync, "P6: t4 synchronised"),
        (same_tid, "P2: 0000000000000002 is both t1 and t2"),
        (tid_in_the_past, "P6: t2 got"),
        (unknown_author, "P1: token ghost"),
        (replicas_differ, "P12: 0/S1 and 0/S2 differ: 2: None != 'y'"),
        (no_metadata, "P12: no metadata"),
        (wrong_metadata, "P12: metadata of 0000000000000002"),
        (out_of_order, "P2: versions of"),
    ],
)
def test_damage(damage: Callable[[World], None], promise: str) -> None:
    world = World()
    damage(world)
    found = "\n".join(world.check())
    with pytest.raises(AssertionError, match=promise):
        raise AssertionError(found)


def test_resolved_conflict() -> None:
    """What was put on top of a version that the attempt did not read."""
    world = World()
    world.t2.at = world.t2.reads[A] = world.t2.reads[B] = tid(1)
    world.t2.start = 3
    world.t2.checked = ()
    world.t2.resolved = (A,)
    assert world.check() == []
    world.t2.reads[A] = tid(3)
    assert any("P5" in line for line in world.check())


def test_unknown_outcome_may_be_present_or_not() -> None:
    world = World()
    world.t2.outcome, world.t2.tid = UNKNOWN, None
    assert world.check() == []
    lost(world)
    world.read.reads[A], world.read.at = tid(2), tid(2)
    world.pending.at = tid(2)
    assert world.check() == []
