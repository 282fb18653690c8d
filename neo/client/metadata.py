"""Metadata of transactions that were read lately.

The objects whose histories are shown together were often modified together; what is
undone was in a log before. Metadata never change, and go away only when the database is
truncated: the client then synchronises anew, which clears this. Only whether a
transaction is packed changes, and nobody asks that here.
"""

from __future__ import annotations

from collections.abc import Sequence

# tid, user, description, extension, packed, oids
Information = tuple[bytes, bytes, bytes, bytes, bool, Sequence[bytes]]
# The same, without oids if they are many.
Known = tuple[bytes, bytes, bytes, bytes, bool, Sequence[bytes] | None]

ENTRIES = 1000
TEXT_MAX = 1000  # bytes: what is longer is not kept
OIDS_MAX = 50


class Informations:
    """The last ones that were read, by tid."""

    def __init__(self) -> None:
        self._by_tid: dict[bytes, Known] = {}

    def __len__(self) -> int:
        return len(self._by_tid)

    def get(self, tid: bytes) -> Known | None:
        """What is known of a transaction."""
        return self._by_tid.get(tid)

    def add(self, info: Information) -> None:
        """Keep what a storage answered; the oldest entry leaves."""
        if len(info[1]) + len(info[2]) + len(info[3]) > TEXT_MAX:
            return
        by_tid = self._by_tid
        by_tid[info[0]] = info if len(info[5]) <= OIDS_MAX else (*info[:5], None)
        if len(by_tid) > ENTRIES:
            del by_tid[next(iter(by_tid))]

    def clear(self) -> None:
        """The database may have another past now."""
        self._by_tid.clear()
