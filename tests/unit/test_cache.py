"""The client's cache. Source: behaviour 9.4 and 9.5; scenarios of its section 11."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from neo.client.cache import ClientCache
from neo.lib.util import p64

A, B, C = map(p64, (1, 2, 3))


def T(number: int) -> bytes:  # noqa: N802  # short for tid
    return p64(number)


def test_intervals() -> None:
    cache = ClientCache()
    assert cache.load(A) is None
    cache.store(A, b"2", T(2), T(4))
    assert cache.load(A) is None
    assert cache.load(A, T(2)) is None
    assert cache.load(A, T(3)) == cache.load(A, T(4)) == (b"2", T(2), T(4))
    assert cache.load(A, T(5)) is None
    cache.store(A, b"6", T(6), None)
    assert cache.load(A, T(5)) is None
    assert cache.load(A, T(6)) is None
    assert cache.load(A, T(7)) == cache.load(A) == (b"6", T(6), None)
    cache.store(A, b"4", T(4), T(6))
    assert cache.load(A, T(6)) == (b"4", T(4), T(6))
    assert cache.load(B) is None
    cache.check()


def test_exact_revision() -> None:
    cache = ClientCache()
    cache.store(A, b"2", T(2), None)
    assert cache.load_exact(A, T(2)) == (b"2", T(2), None)
    assert cache.load_exact(A, T(3)) is None
    assert cache.load_exact(A, T(1)) is None
    assert A in cache
    cache.invalidate(A, T(5))
    assert A not in cache
    assert cache.load_exact(A, T(2)) == (b"2", T(2), T(5))


def test_invalidation_while_loading() -> None:
    """104: the answer comes with the end that the invalidation gave it."""
    cache = ClientCache()
    cache.invalidate(A, T(3))
    cache.store(A, b"1", T(1), T(3))
    assert cache.load(A) is None
    assert cache.load(A, T(3)) == (b"1", T(1), T(3))


def test_two_invalidations() -> None:
    """105: the first one ends the revision; the second one is nothing to it."""
    cache = ClientCache()
    cache.store(A, b"1", T(1), None)
    cache.invalidate(A, T(3))
    cache.invalidate(A, T(5))
    assert cache.load(A, T(3)) == (b"1", T(1), T(3))
    assert cache.load(A, T(4)) is None
    cache.store(A, b"5", T(5), None)
    cache.invalidate(A, T(5))  # stale: late for what is known already
    assert cache.load(A) == (b"5", T(5), None)


def test_late_invalidation_of_history() -> None:
    """110: the storage knows the end of a revision before its invalidation comes."""
    cache = ClientCache(10)
    cache.store(A, b"1234567", T(1), None)
    cache.store(B, b"7654321", T(1), None)  # A is in history
    assert cache.load(A) is None
    cache.store(A, b"1234567", T(1), T(2))
    assert cache.load(A, T(2)) == (b"1234567", T(1), T(2))
    cache.invalidate(A, T(2))
    assert cache.load(A, T(2)) == (b"1234567", T(1), T(2))
    cache.check()


def test_revision_newer_than_the_last_invalidation() -> None:
    """Nobody says when the previous one ended: it is not to be served any more."""
    for next_tid in None, T(9):
        cache = ClientCache()
        cache.store(A, b"1", T(1), None)
        cache.store(A, b"5", T(5), next_tid)
        assert cache.load(A, T(4)) is None
        assert cache.load(A, T(6)) == (b"5", T(5), next_tid)
        cache.store(A, b"1", T(1), None)  # a stale answer
        assert cache.load(A, T(4)) is None
        cache.invalidate(A, T(5))
        cache.check()
        assert cache.size == 1


def test_history_and_levels() -> None:
    cache = ClientCache(10, life_time=1000)
    cache.store(A, b"aaaa", T(1), None)
    assert queues(cache) == [0, 1]
    cache.load(A)
    assert queues(cache) == [0, 0, 1]
    cache.load(A)
    cache.load(A)  # the 4th use
    assert queues(cache) == [0, 0, 0, 1]
    cache.store(B, b"bbbb", T(1), None)
    cache.store(C, b"cccc", T(1), None)  # evicts B, of the lowest level
    assert queues(cache) == [1, 1, 0, 1]
    assert B not in cache
    assert A in cache
    cache.store(B, b"bbbb", T(1), None)  # B comes back with its count: level 2
    assert queues(cache) == [1, 0, 1, 1]
    assert cache.size == 8
    assert repr(cache) == (
        "<ClientCache #loads=3 (100.0% hit) #oids=3 size=8 time=7"
        " queue_length=[1, 0, 1, 1]"
        " (life_time=1000 max_history_size=100000 max_size=10)>"
    )


def test_new_revision_inherits_the_count() -> None:
    cache = ClientCache()
    cache.store(A, b"1", T(1), None)
    cache.load(A)
    cache.load(A)
    cache.invalidate(A, T(2))
    cache.store(A, b"2", T(2), None)  # the 4th use; the previous one starts again
    assert queues(cache) == [0, 1, 0, 1]
    cache.invalidate(A, T(3))
    cache.store(A, b"3", T(3), None)
    assert queues(cache) == [0, 2, 0, 1]


def test_entries_fall_with_time() -> None:
    cache = ClientCache(life_time=3)
    cache.store(A, b"a", T(1), None)
    cache.load(A)  # expires at 1 + 3
    cache.store(B, b"b", T(1), None)
    assert queues(cache) == [0, 1, 1]
    for _ in range(3):
        cache.load(B)
    assert cache._time == 6
    assert queues(cache) == [0, 1, 0, 1]  # A fell at 5
    for _ in range(5):
        cache.load(B)
    assert A in cache  # and no further: there is room
    assert queues(cache) == [0, 1, 0, 0, 1]
    cache.check()


def test_history_is_bounded() -> None:
    """116: per-oid lists are never empty, sizes and counts are exact."""
    cache = ClientCache(100, max_history_size=10)
    for i in range(1, 200):
        oid = p64(i % 50)
        cache.invalidate(oid, T(i))
        cache.store(oid, bytes(i % 60), T(i), None)
        cache.load(p64(i * 7 % 50))
        cache.check()
        assert cache.size <= 100
    assert queues(cache)[0] == 10


@pytest.mark.parametrize("max_size", [0, -1])
def test_no_cache(max_size: int) -> None:
    cache = ClientCache(max_size)
    for data in b"", b"data":
        cache.store(A, data, T(1), None)
    assert cache.load(A) is None
    assert len(cache) == 0
    assert repr(cache).startswith("<ClientCache #loads=1 (0.0% hit) #oids=0 size=0")


def test_too_big() -> None:
    cache = ClientCache(4)
    cache.store(A, b"1234", T(1), None)
    assert cache.load(A) is None
    cache.store(A, b"123", T(1), None)
    assert cache.load(A) is not None
    cache.max_size = 3
    cache.store(B, b"", T(1), None)
    assert cache.size == 3
    cache.max_size = 2
    cache.store(B, b"1", T(2), None)
    assert cache.size <= 2


def test_clear() -> None:
    cache = ClientCache()
    cache.store(A, b"1", T(1), T(2))
    cache.store(A, b"2", T(2), None)
    cache.store(B, b"1", T(1), None)
    cache.clear_current()
    cache.check()
    assert cache.load(A) is None
    assert cache.load(B) is None
    assert cache.load(A, T(2)) == (b"1", T(1), T(2))
    cache.clear()
    cache.check()
    assert cache.load(A, T(2)) is None
    assert (len(cache), cache.size) == (0, 0)


def queues(cache: ClientCache) -> list[int]:
    return [len(queue) for queue in cache._queues]


# --- model ---


class Model:
    """Behaviour 9.5, word for word, on plain lists."""

    class Item:
        def __init__(self, oid: int, tid: int, end: int | None) -> None:
            self.oid, self.tid, self.end = oid, tid, end
            self.data: bytes | None = None
            self.counter = self.level = self.expire = 0

    def __init__(self, max_size: int, max_history_size: int, life_time: int) -> None:
        self.max_size, self.max_history_size = max_size, max_history_size
        self.life_time = life_time
        self.time = 0
        self.queues: list[list[Model.Item]] = [[] for _ in range(20)]

    def items(self, oid: int) -> list[Item]:
        found = [item for queue in self.queues for item in queue if item.oid == oid]
        return sorted(found, key=lambda item: item.tid)

    def move(self, item: Item, level: int) -> None:
        if item in self.queues[item.level]:
            self.queues[item.level].remove(item)
        item.level = level
        item.expire = self.time + self.life_time
        self.queues[level].append(item)

    def remove(self, item: Item) -> None:
        self.queues[item.level].remove(item)

    def to_history(self, item: Item) -> None:
        item.data = None
        if item.counter:
            self.move(item, 0)
            del self.queues[0][: -self.max_history_size or None]
        else:
            self.remove(item)

    def hit(self, item: Item) -> None:
        item.counter += 1
        self.move(item, item.counter.bit_length())
        self.time += 1
        for queue in self.queues[2:]:
            if queue and queue[0].expire < self.time:
                self.move(queue[0], queue[0].level - 1)
                break

    def load(self, oid: int, before: int) -> tuple[bytes, int, int | None] | None:
        items = [item for item in self.items(oid) if item.tid < before]
        if not items:
            return None
        item = items[-1]
        if item.data is None or (item.end is not None and item.end < before):
            return None
        self.hit(item)
        assert item.data is not None
        return item.data, item.tid, item.end

    def store(self, oid: int, data: bytes, tid: int, end: int | None) -> None:
        if len(data) >= self.max_size:
            return
        items = self.items(oid)
        for item in items:
            if item.tid == tid:
                item.end = item.end or end
                break
        else:
            item = self.Item(oid, tid, end)
            if end is None and items:
                previous = items[-1]
                item.counter = previous.counter
                if previous.level == 0:
                    self.remove(previous)
                elif previous.level == 1:
                    previous.counter = 0
                else:
                    previous.counter = 1
                    self.move(previous, 1)
        item.data = data
        self.hit(item)
        for queue in self.queues[1:]:
            while queue and self.size() > self.max_size:
                self.to_history(queue[0])

    def size(self) -> int:
        return sum(len(item.data or b"") for queue in self.queues for item in queue)

    def invalidate(self, oid: int, tid: int) -> None:
        for item in self.items(oid):
            item.end = item.end or tid

    def clear_current(self) -> None:
        for queue in self.queues:
            queue[:] = [item for item in queue if item.end is not None]


OIDS = st.integers(0, 4)


class CacheMachine(RuleBasedStateMachine):
    """A client: the cache does as the model, and serves nothing but the truth."""

    def __init__(self) -> None:
        super().__init__()
        limits = 40, 4, 6
        self.cache, self.model = ClientCache(*limits), Model(*limits)
        self.last_tid = 1
        # The truth: {oid: {tid: data}}.
        self.database: dict[int, dict[int, bytes]] = {
            oid: {1: b"%d" % oid} for oid in range(5)
        }

    def revision(self, oid: int, before: int) -> tuple[bytes, int, int | None] | None:
        revisions = self.database[oid]
        tid = max((tid for tid in revisions if tid < before), default=None)
        if tid is None:
            return None
        end = min((other for other in revisions if other > tid), default=None)
        return revisions[tid], tid, end

    def store(self, oid: int, data: bytes, tid: int, end: int | None) -> None:
        self.cache.store(p64(oid), data, p64(tid), end and p64(end))
        self.model.store(oid, data, tid, end)

    @rule(
        oids=st.sets(OIDS, min_size=1),
        size=st.integers(0, 15),
        own=st.booleans(),
        gap=st.integers(1, 2),
    )
    def commit(self, oids: set[int], size: int, own: bool, gap: int) -> None:
        self.last_tid += gap
        for oid in sorted(oids):
            data = b"%d %d" % (oid, self.last_tid) + bytes(size)
            self.database[oid][self.last_tid] = data
            self.cache.invalidate(p64(oid), p64(self.last_tid))
            self.model.invalidate(oid, self.last_tid)
            if own:
                self.store(oid, data, self.last_tid, None)

    @rule(oid=OIDS, age=st.integers(0, 5))
    def load(self, oid: int, age: int) -> None:
        before = max(1, self.last_tid + 1 - age)
        found = self.cache.load(p64(oid), p64(before))
        expected = self.model.load(oid, before)
        truth = self.revision(oid, before)
        assert found == (
            expected
            and (expected[0], p64(expected[1]), expected[2] and p64(expected[2]))
        )
        if expected:
            assert expected == truth
        elif truth:
            self.store(oid, *truth)

    @rule(oid=OIDS)
    def load_current(self, oid: int) -> None:
        found = self.cache.load(p64(oid))
        assert (found is None) == (self.model.load(oid, 1 << 63) is None)
        if found:
            tid = max(self.database[oid])
            assert found == (self.database[oid][tid], p64(tid), None)

    @rule(oid=OIDS, data=st.data())
    def load_exact(self, oid: int, data: st.DataObject) -> None:
        tid = data.draw(st.sampled_from(sorted(self.database[oid])))
        found = self.cache.load_exact(p64(oid), p64(tid))
        assert (found is None) == (self.model.load(oid, tid + 1) is None)
        if found:
            assert found[0] == self.database[oid][tid]

    @rule()
    def reconnect(self) -> None:
        self.cache.clear_current()
        self.model.clear_current()

    @invariant()
    def same(self) -> None:
        self.cache.check()
        assert self.cache.size <= self.cache.max_size
        while len(self.cache._queues) < len(self.model.queues):
            assert not self.model.queues.pop()
        for queue, items in zip(self.cache._queues, self.model.queues, strict=True):
            assert [(e.oid, e.tid, e.counter, e.data, e.next_tid) for e in queue] == [
                (p64(i.oid), p64(i.tid), i.counter, i.data, i.end and p64(i.end))
                for i in items
            ]
        self.model.queues += [[] for _ in range(20 - len(self.model.queues))]


TestModel = CacheMachine.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@given(
    st.lists(
        st.tuples(OIDS, st.integers(1, 9), st.integers(1, 9) | st.none(), OIDS),
        max_size=40,
    )
)
def test_nothing_breaks_it(steps: list[tuple[int, int, int | None, int]]) -> None:
    """Whatever a storage pretends, sizes and links stay right."""
    cache = ClientCache(20, max_history_size=3, life_time=4)
    for oid, tid, end, other in steps:
        cache.store(p64(oid), bytes(tid), p64(tid), end and p64(end))
        cache.load(p64(other))
        cache.invalidate(p64(other), p64(tid))
        cache.check()
        assert cache.size <= 20
