"""The partition table as followed by all nodes. Source: behaviour 4.1, protocol 3.8."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.lib.exception import ProtocolError
from neo.lib.protocol import READABLE, CellState
from neo.lib.pt import PartitionTable
from neo.lib.util import p64

U, O, F, C = (  # noqa: E741
    CellState.UP_TO_DATE,
    CellState.OUT_OF_DATE,
    CellState.FEEDING,
    CellState.CORRUPTED,
)
D = CellState.DISCARDED


def table(*rows: dict[int, CellState], ptid: int = 5) -> PartitionTable:
    pt = PartitionTable()
    pt.load(ptid, 1, [list(row.items()) for row in rows])
    return pt


def test_no_table() -> None:
    pt = PartitionTable()
    assert (pt.ptid, pt.np, pt.replicas, pt.as_rows()) == (None, 0, 0, [])
    assert not pt.filled()
    assert not pt.operational({1})
    with pytest.raises(ProtocolError, match="without partition table"):
        pt.update(1, 0, [])
    pt.load(None, 0, [])  # what the primary sends while there is none
    assert pt.ptid is None


def test_cells() -> None:
    pt = table({2: U, 1: O}, {1: F, 3: C}, {})
    assert pt.cells == [(2, 1), (1,), ()]
    assert pt.readable == [(2,), (1,), ()]
    assert pt.state(0, 1) is O
    assert pt.state(2, 1) is None
    assert pt.assigned(1) == {0: O, 1: F}
    assert pt.nids() == [1, 2, 3]
    assert pt.readable_nids() == [1, 2]
    assert not pt.filled()
    assert len(pt) == 3
    assert list(pt) == [(0, 2, U), (0, 1, O), (1, 1, F), (1, 3, C)]
    assert pt.as_rows() == [[(2, U), (1, O)], [(1, F), (3, C)], []]
    assert pt.as_rows(1, 2) == [[(1, F), (3, C)]]
    pt.clear()
    assert (pt.ptid, pt.np, pt.cells) == (None, 0, [])


def test_operational() -> None:
    pt = table({1: U, 2: O}, {1: O, 2: F})
    assert pt.filled()
    assert pt.operational({1, 2})
    assert pt.operational({1: "a map", 2: "will do"})
    assert not pt.operational({1})
    assert not pt.operational(())


def test_update() -> None:
    pt = table({1: U}, {1: U, 2: O})
    pt.update(6, 2, [(1, 2, U), (1, 1, D), (0, 3, O), (0, 9, D)], strict=True)
    assert (pt.ptid, pt.replicas) == (6, 2)
    assert pt.as_rows() == [[(1, U), (3, O)], [(2, U)]]
    assert pt.readable == [(1,), (2,)]
    assert pt.cells == [(1, 3), (2,)]
    pt.update(9, 0, [])
    assert (pt.ptid, pt.replicas) == (9, 0)
    pt.check()


@pytest.mark.parametrize(
    ("ptid", "cells", "strict"),
    [
        (5, [], False),
        (4, [], False),
        (7, [], True),
        (5, [], True),
        (6, [(0, 1, D), (2, 1, U)], False),
        (6, [(0xFFFFFFFF, 1, U)], False),
        (6, [(-1, 1, U)], False),
    ],
)
def test_refused_update_changes_nothing(
    ptid: int, cells: list[tuple[int, int, CellState]], strict: bool
) -> None:
    pt = table({1: U}, {1: U, 2: O})
    with pytest.raises(ProtocolError):
        pt.update(ptid, 0, cells, strict=strict)
    assert (pt.ptid, pt.replicas) == (5, 1)
    assert pt.as_rows() == [[(1, U)], [(1, U), (2, O)]]
    pt.check()


@given(st.integers(1, 1000), st.integers(0, 2**64 - 1))
def test_partition_of(partitions: int, number: int) -> None:
    pt = table(*({} for _ in range(partitions)))
    assert pt.partition_of(p64(number)) == number % partitions


NIDS = st.integers(1, 4)


@given(
    st.lists(
        st.dictionaries(NIDS, st.sampled_from([U, O, F, C])), min_size=3, max_size=3
    ),
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), NIDS, st.sampled_from([U, O, F, C, D])))
    ),
)
def test_updates_are_as_good_as_a_new_table(
    rows: list[dict[int, CellState]],
    updates: list[list[tuple[int, int, CellState]]],
) -> None:
    pt = table(*rows)
    for ptid, cells in enumerate(updates, 6):
        pt.update(ptid, 1, cells, strict=True)
        pt.check()
        for partition, nid, state in cells:
            rows[partition][nid] = state
    assert pt.rows == [
        {nid: state for nid, state in row.items() if state is not D} for row in rows
    ]
    copy = table(*pt.rows)
    assert (copy.cells, copy.readable) == (pt.cells, pt.readable)
    for row, readable in zip(pt.rows, pt.readable, strict=True):
        assert [nid for nid in row if row[nid] in READABLE] == list(readable)
