"""Transactions and their records as ZODB iterates them (IStorageIteration)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ZODB.BaseStorage import DataRecord, TransactionRecord

from neo.lib.util import add64

from . import iterator as iteration
from .metadata import Information

if TYPE_CHECKING:
    from .Storage import Storage


class TransactionIterator:
    """Transactions of start <= tid <= stop; records may be read at any later time."""

    def __init__(self, storage: Storage, start: bytes, stop: bytes) -> None:
        self._storage = storage
        self._start = start
        self._stop = stop
        self._read: deque[Record] = deque()
        self._ended = start > stop

    def __iter__(self) -> TransactionIterator:
        return self

    def __next__(self) -> Record:
        if not self._read and not self._ended:
            storage = self._storage
            with storage._runtime:
                part = iteration.transactions(storage._core, self._start, self._stop)
            records = iteration.Records(storage._core, part)
            for index, info in enumerate(part):
                self._read.append(Record(storage, info, records, index))
            if part:
                self._start = add64(part[-1][0], 1)
            else:
                self._ended = True
        if not self._read:
            raise StopIteration
        return self._read.popleft()

    next = __next__

    def close(self) -> None:
        """Read no more."""
        self._ended = True
        self._read.clear()


class Record(TransactionRecord):
    """A transaction, iterable: its records."""

    def __init__(
        self,
        storage: Storage,
        info: Information,
        records: iteration.Records,
        index: int,
    ) -> None:
        tid, user, description, extension, packed, _ = info
        super().__init__(tid, "p" if packed else " ", user, description, extension)
        self._storage = storage
        self._records = records
        self._index = index

    def __iter__(self) -> Iterator[DataRecord]:
        storage, tid = self._storage, self.tid
        slices = self._records.of(self._index)
        while True:
            with storage._runtime:
                rows = next(slices, None)
            if rows is None:
                return
            for oid, data, data_serial in rows:
                yield DataRecord(oid, tid, data, data_serial)
