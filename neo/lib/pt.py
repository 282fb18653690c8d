"""The partition table: which storage nodes hold which partitions.

The primary master owns it (`neo/master/policy.py` computes its changes); the other
nodes follow with `load` and `update`. Order of cells within a partition is the order of
arrival, the same on every run.

Source: behaviour 0.1 and 4.1, protocol 3.8.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from struct import Struct

from .exception import ProtocolError
from .protocol import READABLE, CellState, Rows

_u64 = Struct(">Q").unpack

# Received and written to: all but CORRUPTED, which is neither read nor written.
_WRITABLE = (CellState.OUT_OF_DATE, *READABLE)


class PartitionTable:
    """Cells by partition, with what the hot paths look up computed in advance.

    `rows`: [partition] of {nid: CellState}; `readable`, `cells`: [partition] of the
    nids that a read may ask, that a write must reach. `rows` changes through methods
    only. `np` is the number of partitions, 0 while there is no table (`ptid` is None).
    """

    __slots__ = ("_is_checked", "cells", "np", "ptid", "readable", "replicas", "rows")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """No table."""
        self.load(None, 0, ())

    def load(self, ptid: int | None, replicas: int, rows: Rows) -> None:
        """Replace all by what SendPartitionTable says."""
        self._is_checked = False  # since the last change
        self.ptid = ptid
        self.replicas = replicas
        self.rows: list[dict[int, CellState]] = [dict(row) for row in rows]
        self.np = len(self.rows)
        self.cells: list[tuple[int, ...]] = [()] * self.np
        self.readable: list[tuple[int, ...]] = [()] * self.np
        for partition in range(self.np):
            self._index(partition)

    def update(
        self,
        ptid: int,
        replicas: int,
        cells: Iterable[tuple[int, int, CellState]],
        *,
        strict: bool = False,
    ) -> None:
        """Apply NotifyPartitionChanges: (partition, nid, state), DISCARDED removes.

        Raises ProtocolError, and changes nothing, if there is no table, a partition
        does not exist, or `ptid` is not greater than the present one (`strict`, for
        storage nodes, which write each change to disk: not exactly the next one).
        """
        if self.ptid is None:
            raise ProtocolError("partition changes without partition table")
        if ptid != self.ptid + 1 if strict else ptid <= self.ptid:
            raise ProtocolError(f"partition table {self.ptid} can't become {ptid}")
        cells = tuple(cells)
        touched = sorted({partition for partition, _, _ in cells})
        if touched and not 0 <= touched[0] <= touched[-1] < self.np:
            raise ProtocolError(f"partition out of range 0..{self.np - 1}")
        self._is_checked = False
        self.ptid = ptid
        self.replicas = replicas
        for partition, nid, state in cells:
            if state is CellState.DISCARDED:
                self.rows[partition].pop(nid, None)
            else:
                self.rows[partition][nid] = state
        for partition in touched:
            self._index(partition)

    def _index(self, partition: int) -> None:
        items = self.rows[partition].items()
        self.cells[partition] = tuple(n for n, state in items if state in _WRITABLE)
        self.readable[partition] = tuple(n for n, state in items if state in READABLE)

    # --- queries ---

    def partition_of(self, identifier: bytes) -> int:
        """Partition of an oid or tid. There must be a table."""
        number: int = _u64(identifier)[0]
        return number % self.np

    def state(self, partition: int, nid: int) -> CellState | None:
        """State of a cell; None if the node has none there."""
        return self.rows[partition].get(nid)

    def filled(self) -> bool:
        """Has each partition a cell?"""
        return bool(self.rows) and all(self.rows)

    def operational(self, running: Container[int]) -> bool:
        """Has each partition a readable cell on one of these nodes?"""
        return bool(self.readable) and all(
            any(nid in running for nid in nids) for nids in self.readable
        )

    def nids(self) -> list[int]:
        """Nodes that have a cell, sorted."""
        return sorted({nid for row in self.rows for nid in row})

    def readable_nids(self) -> list[int]:
        """Nodes that have a readable cell, sorted."""
        return sorted({nid for nids in self.readable for nid in nids})

    def assigned(self, nid: int) -> dict[int, CellState]:
        """State of the cells of a node, by partition."""
        return {p: row[nid] for p, row in enumerate(self.rows) if nid in row}

    def __len__(self) -> int:
        return self.np

    def __iter__(self) -> Iterator[tuple[int, int, CellState]]:
        """All cells: (partition, nid, state)."""
        for partition, row in enumerate(self.rows):
            for nid, state in row.items():
                yield partition, nid, state

    def as_rows(
        self, first: int = 0, last: int | None = None
    ) -> list[list[tuple[int, CellState]]]:
        """Rows of partitions `first` <= p < `last`, for SendPartitionTable."""
        return [list(row.items()) for row in self.rows[first:last]]

    def check(self) -> None:
        """Assert that the indexes tell the truth: once after each change."""
        if self._is_checked:
            return
        self._is_checked = True
        for partition, row in enumerate(self.rows):
            assert all(type(state) is CellState for state in row.values()), row
            cells, readable = self.cells[partition], self.readable[partition]
            self._index(partition)
            assert cells == self.cells[partition], (partition, cells, row)
            assert readable == self.readable[partition], (partition, readable, row)
