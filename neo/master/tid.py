"""Choice of transaction ids: pure functions (behaviour 2.11).

`last` is the greatest id that must stay behind: the last tid committed, those of the
transactions being finished, the ttids in progress and all that was handed out. So ids
increase whatever the clock does: it only pulls them forward.
"""

from __future__ import annotations

from neo.lib.util import add_tid, tid_from_time, u64


def clock_tid(seconds: float) -> bytes:
    """Tid of the clock; dates that have none count as 1970."""
    return tid_from_time(seconds if seconds > 0 else 0)


def next_tid(clock: bytes, last: bytes) -> bytes:
    """The tid of the clock, or the one after `last` if the clock is behind."""
    return clock if clock > last else add_tid(last, 1)


def final_tid(clock: bytes, last: bytes, ttid: bytes, partitions: int) -> bytes:
    """Tid of a transaction, in the partition of its ttid, where its metadata are.

    Greater than `last`, or the ttid itself if no id was given since.
    """
    if last == ttid and clock <= last:
        return ttid
    tid = next_tid(clock, last)
    remainder = u64(ttid) % partitions
    # Again if the addition went over the end of a month, where tids have a gap.
    while offset := (remainder - u64(tid)) % partitions:
        tid = add_tid(tid, offset)
    return tid
