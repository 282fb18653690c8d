"""The client's cache of object revisions: a multi-queue cache.

Each revision that was used stands in the queue of a level that grows with the
logarithm of its number of uses; queues are in order of last use. What is not used for
`life_time` uses of the cache falls by one level, down to level 1, where it stays as
long as there is room. What is evicted, from the lowest level first, is remembered
without data (the *history*, level 0), so that it comes back with its count.

An entry is what the client knows to be true: this revision is valid from `tid` until
before `next_tid`, or still (None). Entries of an object are linked, newest first, and
their intervals don't overlap; only the newest can be current. The caller orders calls
as `behaviour` 9.4 says and holds the client's lock; data that must not be cached
(deleted objects) are not given.

Zhou, Philbin, Li: The Multi-Queue Replacement Algorithm for Second Level Buffer Caches.
Source: behaviour 9.4 and 9.5, operations 13.3.
"""

from __future__ import annotations

from collections import OrderedDict

from neo.lib.protocol import INVALID_TID

Revision = tuple[bytes, bytes, bytes | None]  # data, tid, next tid


class _Entry:
    __slots__ = (
        "counter",
        "data",
        "expire",
        "level",
        "newer",
        "next_tid",
        "oid",
        "older",
        "tid",
    )

    def __init__(self, oid: bytes, tid: bytes, next_tid: bytes | None) -> None:
        self.oid = oid
        self.tid = tid
        self.next_tid = next_tid
        self.data: bytes | None = None  # None at level 0
        self.counter = 0
        self.level = 0
        self.expire = 0
        self.older: _Entry | None = None
        self.newer: _Entry | None = None


class ClientCache:
    """Revisions by oid. `max_size` counts bytes of data; 0: nothing is cached.

    `max_size` may be changed: the next insertion obeys it.
    """

    __slots__ = (
        "_hits",
        "_newest",
        "_next_expire",
        "_queues",
        "_size",
        "_time",
        "life_time",
        "loads",
        "max_history_size",
        "max_size",
    )

    def __init__(
        self,
        max_size: int = 20 << 20,
        max_history_size: int = 100_000,
        life_time: int = 10_000,
    ) -> None:
        self.max_size = max_size
        self.max_history_size = max_history_size
        self.life_time = life_time
        self.loads = self._hits = self._time = 0
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._newest: dict[bytes, _Entry] = {}
        # By level; the next to fall or to be evicted comes first.
        self._queues: list[OrderedDict[_Entry, None]] = [OrderedDict(), OrderedDict()]
        self._size = 0
        # No entry expires before: spares a look at all levels on each hit.
        self._next_expire = self._time + self.life_time

    def clear_current(self) -> None:
        """Forget what may have changed while invalidations were missed."""
        for entry in [e for e in self._newest.values() if e.next_tid is None]:
            self._remove(entry)

    # --- reading ---

    def load(self, oid: bytes, before: bytes | None = None) -> Revision | None:
        """Last revision older than `before` (None: the current one); None: a miss."""
        self.loads += 1
        if before is None:
            before = INVALID_TID
        entry = self._newest.get(oid)
        while entry is not None and entry.tid >= before:
            entry = entry.older
        if entry is None:
            return None
        next_tid = entry.next_tid
        if next_tid is not None and next_tid < before:
            return None
        data = entry.data
        if data is None:
            return None
        self._hits += 1
        self._use(entry)
        return data, entry.tid, next_tid

    def load_exact(self, oid: bytes, tid: bytes) -> Revision | None:
        """Revision made at `tid`, or None: a miss."""
        self.loads += 1
        entry = self._find(oid, tid)
        if entry is None or entry.data is None:
            return None
        self._hits += 1
        self._use(entry)
        return entry.data, tid, entry.next_tid

    def __contains__(self, oid: bytes) -> bool:
        """Is the current revision in the cache? This is no use of it."""
        entry = self._newest.get(oid)
        return entry is not None and entry.next_tid is None and entry.data is not None

    # --- writing ---

    def store(
        self, oid: bytes, data: bytes, tid: bytes, next_tid: bytes | None
    ) -> None:
        """Insert the revision that is valid from `tid` until before `next_tid`.

        Nothing happens if the data are not smaller than the cache, or if what is known
        already shows that the revision can't be current any more.
        """
        if len(data) >= self.max_size:
            return
        entry = self._find(oid, tid)
        if entry is None:
            newest = self._newest.get(oid)
            if next_tid is None and newest is not None and newest.tid > tid:
                return
            entry = _Entry(oid, tid, next_tid)
            if newest is not None and next_tid is None:
                self._inherit(entry, newest)
            elif newest is not None and newest.next_tid is None and newest.tid < tid:
                self._remove(newest)  # see _inherit
            self._link(entry)
        elif entry.next_tid is None:
            # The storage may know about the next revision before its invalidation.
            entry.next_tid = next_tid
        if entry.data is None:
            if entry.level == 0:
                self._queues[0].pop(entry, None)
                entry.level = 1
                self._queues[1][entry] = None
            self._size += len(data)
            entry.data = data
        self._use(entry)
        if self._size > self.max_size:
            self._evict()

    def invalidate(self, oid: bytes, tid: bytes) -> None:
        """There is a new revision since `tid`."""
        entry = self._newest.get(oid)
        if entry is not None and entry.next_tid is None and entry.tid < tid:
            entry.next_tid = tid

    # --- multi-queue ---

    def _use(self, entry: _Entry) -> None:
        """Count a use: to the tail of the level that its count is worth."""
        entry.counter += 1
        level = entry.counter.bit_length()
        queues = self._queues
        if level == entry.level:
            queues[level].move_to_end(entry)
        else:
            del queues[entry.level][entry]
            if level == len(queues):
                queues.append(OrderedDict())
            queues[level][entry] = None
            entry.level = level
        now = self._time
        entry.expire = now + self.life_time
        self._time = now = now + 1
        if now > self._next_expire:
            self._expire()

    def _expire(self) -> None:
        """Lower by one level the first entry that has expired, if any."""
        now = self._time
        fallen = False
        next_expire = now + self.life_time
        for level in range(2, len(self._queues)):
            queue = self._queues[level]
            if not queue:
                continue
            entry = next(iter(queue))
            if entry.expire < now and not fallen:
                fallen = True
                del queue[entry]
                self._enter(entry, level - 1)
                if not queue:
                    continue
                entry = next(iter(queue))
            next_expire = min(next_expire, entry.expire)
        self._next_expire = next_expire

    def _enter(self, entry: _Entry, level: int) -> None:
        entry.level = level
        entry.expire = self._time + self.life_time
        self._queues[level][entry] = None

    def _evict(self) -> None:
        for queue in self._queues[1:]:
            while queue:
                if self._size <= self.max_size:
                    return
                entry, _ = queue.popitem(last=False)
                self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        """Drop the data of an entry that stands in no queue any more."""
        assert entry.data is not None
        self._size -= len(entry.data)
        entry.data = None
        if not entry.counter:
            self._unlink(entry)
            return
        entry.level = 0
        history = self._queues[0]
        history[entry] = None
        if len(history) > self.max_history_size:
            oldest, _ = history.popitem(last=False)
            self._unlink(oldest)

    # --- revisions of an object ---

    def _find(self, oid: bytes, tid: bytes) -> _Entry | None:
        entry = self._newest.get(oid)
        while entry is not None and entry.tid > tid:
            entry = entry.older
        return entry if entry is not None and entry.tid == tid else None

    def _inherit(self, entry: _Entry, previous: _Entry) -> None:
        """Let a new current revision be as popular as the previous one."""
        entry.counter = previous.counter
        if previous.level == 0 or previous.next_tid is None:
            # In the second case, something was loaded before its invalidation came:
            # nobody said when the previous revision ended.
            self._remove(previous)
        elif previous.level == 1:
            previous.counter = 0
        else:
            previous.counter = 1
            del self._queues[previous.level][previous]
            self._enter(previous, 1)

    def _remove(self, entry: _Entry) -> None:
        del self._queues[entry.level][entry]
        if entry.data is not None:
            self._size -= len(entry.data)
        self._unlink(entry)

    def _link(self, entry: _Entry) -> None:
        newer, older = None, self._newest.get(entry.oid)
        while older is not None and older.tid > entry.tid:
            newer, older = older, older.older
        entry.newer, entry.older = newer, older
        if older is not None:
            older.newer = entry
        if newer is None:
            self._newest[entry.oid] = entry
        else:
            newer.older = entry

    def _unlink(self, entry: _Entry) -> None:
        newer, older = entry.newer, entry.older
        entry.newer = entry.older = None
        if older is not None:
            older.newer = newer
        if newer is not None:
            newer.older = older
        elif older is not None:
            self._newest[entry.oid] = older
        else:
            del self._newest[entry.oid]

    # --- information ---

    @property
    def size(self) -> int:
        """Bytes of data."""
        return self._size

    def __len__(self) -> int:
        """Number of revisions with data."""
        return sum(map(len, self._queues[1:]))

    def __repr__(self) -> str:
        hits = f" ({self._hits / self.loads:.1%} hit)" if self.loads else ""
        return (
            f"<{type(self).__name__} #loads={self.loads}{hits}"
            f" #oids={len(self._newest)} size={self._size} time={self._time}"
            f" queue_length={list(map(len, self._queues))}"
            f" (life_time={self.life_time} max_history_size={self.max_history_size}"
            f" max_size={self.max_size})>"
        )

    def check(self) -> None:
        """Assert that links, queues and sizes agree."""
        linked: set[_Entry] = set()
        for oid, entry in self._newest.items():
            newer: _Entry | None = None
            older: _Entry | None = entry
            while older is not None:
                assert older.oid == oid
                assert older.newer is newer
                if newer is not None:
                    assert older.tid < newer.tid, oid
                    assert older.next_tid is not None, oid
                linked.add(older)
                newer, older = older, older.older
        queued: set[_Entry] = set()
        for level, queue in enumerate(self._queues):
            for entry in queue:
                assert entry.level == level, (level, entry.level)
                assert (entry.data is None) == (level == 0), level
                assert level < 2 or entry.expire >= self._next_expire, level
            queued.update(queue)
        assert queued == linked
        size = sum(len(entry.data or b"") for entry in queued)
        assert size == self._size
        assert len(self._queues[0]) <= max(0, self.max_history_size)
