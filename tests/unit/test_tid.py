"""Choice of tids: unique, in commit order, in the right partition, for any clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from neo.lib.protocol import ZERO_TID
from neo.lib.util import add_tid, datetime_from_tid, tid_from_time, u64
from neo.master.tid import clock_tid, final_tid, next_tid

# Around the end of months, where tids have gaps, and anywhere.
MONTH_ENDS = [951868799.999999, 1709251199.999999, 1798761599.999999, 1804291199.99999]
CLOCKS = st.one_of(
    st.floats(-1e9, 4e9),
    st.sampled_from(MONTH_ENDS).flatmap(
        lambda end: st.floats(-1e-6, 1e-6).map(lambda delta: end + delta)
    ),
)


@given(CLOCKS, CLOCKS, st.integers(1, 100))
def test_one_transaction(begun: float, finished: float, partitions: int) -> None:
    last = clock_tid(begun)
    ttid = next_tid(clock_tid(begun), last)
    assert ttid == add_tid(last, 1)
    tid = final_tid(clock_tid(finished), ttid, ttid, partitions)
    assert tid >= ttid
    assert u64(tid) % partitions == u64(ttid) % partitions
    datetime_from_tid(tid)


@given(
    st.integers(1, 100),
    st.lists(st.tuples(CLOCKS, st.one_of(st.none(), st.integers(0, 9))), max_size=60),
)
def test_many_transactions(
    partitions: int, events: list[tuple[float, int | None]]
) -> None:
    """Begin (None), or finish the n-th of those pending, while the clock jumps."""
    greatest = ZERO_TID
    pending: list[bytes] = []
    given_out: list[bytes] = []
    committed: list[bytes] = []
    for seconds, which in events:
        clock = clock_tid(seconds)
        if which is None or not pending:
            ttid = greatest = next_tid(clock, greatest)
            pending.append(ttid)
            given_out.append(ttid)
        else:
            ttid = pending.pop(which % len(pending))
            tid = final_tid(clock, greatest, ttid, partitions)
            assert tid >= ttid
            assert u64(tid) % partitions == u64(ttid) % partitions
            greatest = max(greatest, tid)
            committed.append(tid)
            if tid != ttid:
                given_out.append(tid)
    assert committed == sorted(set(committed))
    assert given_out == sorted(set(given_out))


def test_frozen_clock() -> None:
    """Consecutive tids, whatever the number of partitions."""
    clock = tid_from_time(1e9)
    last = clock
    for _ in range(5):
        ttid = next_tid(clock, last)
        tid = final_tid(clock, ttid, ttid, 12)
        assert tid == ttid == add_tid(last, 1)
        last = tid


def test_end_of_february() -> None:
    """The next minute is in March: the partition is kept over the gap."""
    last = tid_from_time(1709251199.9999999)
    ttid = add_tid(last, -5)
    tid = final_tid(ZERO_TID, add_tid(last, 1), ttid, 7)
    assert u64(tid) % 7 == u64(ttid) % 7
    assert str(datetime_from_tid(tid)).startswith("2024-03-01 00:00:00")
