"""The primary's partition table. Vectors: behaviour 4.4, 4.5, 4.6, 4.7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.lib.protocol import READABLE, CellState
from neo.master import policy
from neo.master.policy import Cell, Path

Table = list[dict[int, CellState]]

LETTERS = {
    "U": CellState.UP_TO_DATE,
    "O": CellState.OUT_OF_DATE,
    "F": CellState.FEEDING,
    "C": CellState.CORRUPTED,
}
NAMES = {state: letter for letter, state in LETTERS.items()}


def parse(text: str) -> Table:
    """`UU.|.UF` -> rows; node 1 is the first character of each partition."""
    return [
        {nid: LETTERS[c] for nid, c in enumerate(row, 1) if c != "."}
        for row in text.split("|")
    ]


def show(rows: Table, count: int) -> str:
    return "|".join(
        "".join(NAMES[row[n]] if n in row else "." for n in range(1, count + 1))
        for row in rows
    )


def repeated(text: str, partitions: int) -> str:
    rows = text.split("|")
    return "|".join(rows[p % len(rows)] for p in range(partitions))


def apply(rows: Table, cells: list[Cell]) -> None:
    assert len({cell[:2] for cell in cells}) == len(cells), cells
    for partition, nid, state in cells:
        if state is CellState.DISCARDED:
            del rows[partition][nid]
        else:
            assert rows[partition].get(nid) is not state, (partition, nid, state)
            rows[partition][nid] = state


def applied(rows: Table, cells: list[Cell]) -> Table:
    result = [dict(row) for row in rows]
    apply(result, cells)
    return result


def replicate(rows: Table, replicas: int) -> Table:
    """Finish all replications, partition by partition."""
    rows = [dict(row) for row in rows]
    for partition, row in enumerate(rows):
        for nid in sorted(row):
            if row.get(nid) is CellState.OUT_OF_DATE:
                apply(rows, policy.replicated(rows, replicas, partition, nid))
    return rows


def no_paths(count: int) -> dict[int, Path]:
    return dict.fromkeys(range(1, count + 1), ())


def devpaths(text: str) -> dict[int, Path]:
    """`a1 a2` -> {1: (a, 1), 2: (a, 2)}."""
    return {
        nid: tuple(c.encode() for c in path) for nid, path in enumerate(text.split(), 1)
    }


@pytest.mark.parametrize(
    ("partitions", "replicas", "count", "expected"),
    [
        (4, 0, 3, "U..|.U.|..U"),
        (7, 1, 3, "UU.|U.U|.UU"),
        (6, 1, 4, "UU..|..UU"),
        (8, 2, 5, "UUU..|U..UU|.UUU.|UU..U|..UUU"),
        (3, 1, 1, "U"),
    ],
)
def test_create(partitions: int, replicas: int, count: int, expected: str) -> None:
    rows, resilient = policy.create(partitions, replicas, no_paths(count))
    assert show(rows, count) == repeated(expected, partitions)
    assert resilient


@pytest.mark.parametrize(
    ("partitions", "paths", "expected", "resilient"),
    [
        (6, "a1 a2 b1 b2", "U.U.|.U.U", True),
        (6, "a a b", "UU.|U.U|.UU", False),
        (4, "a1 a1 a2 a2", "U.U.|.U.U", True),
    ],
)
def test_create_with_topology(
    partitions: int, paths: str, expected: str, resilient: bool
) -> None:
    nodes = devpaths(paths)
    rows, actual = policy.create(partitions, 1, nodes)
    assert show(rows, len(nodes)) == repeated(expected, partitions)
    assert actual is resilient


@pytest.mark.parametrize(
    ("partitions", "replicas", "before", "added", "during", "after"),
    [
        (6, 0, "U", 1, "U.|FO", "U.|.U"),
        (6, 1, "UU", 1, "UU.|UFO|FUO", "UU.|U.U|.UU"),
        (6, 1, "UU", 2, "UU..|FFOO", "UU..|..UU"),
        (
            8,
            1,
            "UU.|U.U|.UU",
            1,
            "UU..|F.UO|OUF.|FFOO|UOF.|.FUO|UU..|F.UO",
            "UU..|..UU",
        ),
        (5, 2, "UUU", 1, "UUU.|UUFO|UFUO|FUUO|UUU.", "UUU.|UU.U|U.UU|.UUU|UUU."),
        (6, 1, "U..|.U.|..U", 0, "U.O|OU.|.OU", "U.U|UU.|.UU"),
        (4, 1, "UUU.|UU.U|U.UU|.UUU", 0, "U.U.|.U.U", "U.U.|.U.U"),
    ],
)
def test_tweak(
    partitions: int, replicas: int, before: str, added: int, during: str, after: str
) -> None:
    rows = parse(repeated(before, partitions))
    count = len(before.split("|")[0])
    nodes = no_paths(count + added)
    rows = applied(rows, policy.tweak(rows, replicas, nodes).cells)
    assert show(rows, len(nodes)) == repeated(during, partitions)
    assert policy.tweak(rows, replicas, nodes).cells == []
    rows = replicate(rows, replicas)
    assert show(rows, len(nodes)) == repeated(after, partitions)
    assert policy.tweak(rows, replicas, nodes).cells == []


def test_tweak_ignoring_a_node() -> None:
    rows, _ = policy.create(6, 0, no_paths(3))
    rows = applied(rows, policy.tweak(rows, 0, {2: (), 3: ()}).cells)
    assert show(rows, 3) == "UO.|.FO|.OF|U.O|.U.|..U"
    rows = replicate(rows, 0)
    assert show(rows, 3) == "UU.|..U|.U.|U.U|.U.|..U"


@pytest.mark.parametrize(
    ("before", "running", "lost", "after"),
    [
        ("UU|U.|.U", {2}, 1, "OU|U.|.U"),  # alone in the second one: kept
        ("UU|UF|FU", {2}, 1, "OU|OF|.U"),
        ("UO|OU", {2}, None, "OO|OU"),
        ("U.|FO", {2}, 1, "U.|FO"),
        ("UU|UU", {1, 2}, None, "UU|UU"),
        ("UUU", {3}, None, "OOU"),
        ("CO", {2}, 1, "CO"),
    ],
)
def test_outdate(before: str, running: set[int], lost: int | None, after: str) -> None:
    rows = parse(before)
    rows = applied(rows, policy.outdate(rows, running, lost))
    assert show(rows, len(before.split("|")[0])) == after


@pytest.mark.parametrize(
    ("before", "dropped", "after"),
    [
        ("UU|UU", {1}, ".U|.U"),
        ("U.|.U", {1}, None),
        ("UO", {1}, None),
        ("UO", {2}, "U."),
        ("OFO", {1}, ".UO"),
        ("FO", {1}, None),
        ("FFOO", {3}, "UF.O"),
        ("FFOO", {3, 4}, "UU.."),
        ("FUO", {2}, "U.O"),
        ("UUU", {1, 2}, "..U"),
        ("UUU", {1, 2, 3}, None),
        ("UU|U.", {2}, "U.|U."),
        ("UFOO", {4}, "UFO."),  # two remain, with the one on its way
        ("UUFO", {4}, "UU.."),
    ],
)
def test_drop(before: str, dropped: set[int], after: str | None) -> None:
    rows = parse(before)
    cells = policy.drop(rows, dropped, 1)
    if after is None:
        assert cells is None
    else:
        assert cells is not None
        assert show(applied(rows, cells), len(before.split("|")[0])) == after


@pytest.mark.parametrize(
    ("replicas", "before", "partition", "nid", "after"),
    [
        (2, "UFFOO", 0, 4, "U..UO"),
        (2, "FFFOOO", 0, 4, "..FUOO"),
        (1, "FFO", 0, 3, "..U"),
        (2, "FFOO|.UUU", 0, 3, ".FUO|.UUU"),  # node 1 is about to leave
        (2, "FFOO|UU..", 0, 3, ".FUO|UU.."),
        (2, "FFOO|U...", 0, 3, "F.UO|U..."),
        (0, "O", 0, 1, "U"),
    ],
)
def test_replicated(
    replicas: int, before: str, partition: int, nid: int, after: str
) -> None:
    rows = parse(before)
    cells = policy.replicated(rows, replicas, partition, nid)
    assert cells[0] == (partition, nid, CellState.UP_TO_DATE)
    assert show(applied(rows, cells), len(before.split("|")[0])) == after


# --- invariants ---


def readable(row: Mapping[int, CellState], nodes: Sequence[int] | None = None) -> int:
    return sum(
        state in READABLE for nid, state in row.items() if nodes is None or nid in nodes
    )


COUNT = 6

cells = st.dictionaries(
    st.integers(1, COUNT), st.sampled_from([LETTERS[c] for c in "UUOFC"])
)
tables = st.lists(cells, min_size=1, max_size=13)
node_sets = st.sets(st.integers(1, COUNT), min_size=1)
paths = st.lists(
    st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=3).map(tuple),
    min_size=COUNT,
    max_size=COUNT,
)


@given(tables, st.integers(0, 3), node_sets, paths)
def test_tweak_keeps_data_and_settles(
    rows: Table, replicas: int, chosen: set[int], devices: list[Path]
) -> None:
    nodes = {nid: devices[nid - 1] for nid in sorted(chosen)}
    repeats = min(replicas + 1, len(nodes))
    tweaked = policy.tweak(rows, replicas, nodes)
    after = applied(rows, tweaked.cells)
    for row, new in zip(rows, after, strict=True):
        ignored = {nid: state for nid, state in row.items() if nid not in nodes}
        assert ignored.items() <= new.items()
        mine = sorted(nodes)
        assert readable(new, mine) >= min(repeats, readable(row, mine))
        wanted = [
            nid for nid in mine if nid in new and new[nid] is not CellState.FEEDING
        ]
        assert len(wanted) == repeats
    sizes = [
        sum(row.get(nid, CellState.FEEDING) is not CellState.FEEDING for row in after)
        for nid in nodes
    ]
    assert max(sizes) - min(sizes) <= 1
    again = policy.tweak(after, replicas, nodes)
    assert again.cells == []
    assert again.resilient == tweaked.resilient


@given(
    st.integers(1, 12),
    st.integers(0, 2),
    st.lists(st.tuples(node_sets, st.integers(0, 2)), min_size=1, max_size=4),
)
def test_cluster_lives_through_tweaks(
    partitions: int, replicas: int, steps: list[tuple[set[int], int]]
) -> None:
    """From creation on, tweaked and replicated tables have the wanted cells."""
    rows, _ = policy.create(partitions, replicas, no_paths(3))
    for chosen, new_replicas in steps:
        nodes: dict[int, Path] = dict.fromkeys(sorted(chosen.union(*rows)), ())
        rows = applied(rows, policy.tweak(rows, new_replicas, nodes).cells)
        for row in rows:
            assert readable(row)
        rows = replicate(rows, new_replicas)
        for row in rows:
            assert readable(row) == len(row) == min(new_replicas + 1, len(nodes))


@given(tables, st.sets(st.integers(1, COUNT)), st.integers(0, 2))
def test_drop_never_loses_a_partition(
    rows: Table, gone: set[int], replicas: int
) -> None:
    changes = policy.drop(rows, gone, replicas)
    if changes is None:
        assert any(
            readable(row) and not readable(row, sorted(set(row) - gone)) for row in rows
        )
        return
    for row, new in zip(rows, applied(rows, changes), strict=True):
        assert not gone & set(new)
        assert readable(new) or not readable(row)


@given(tables, st.sets(st.integers(1, COUNT)), st.integers(1, COUNT))
def test_outdate_leaves_readable_cells_of_running_nodes(
    rows: Table, running: set[int], lost: int
) -> None:
    running = running - {lost}
    for row, new in zip(
        rows, applied(rows, policy.outdate(rows, running, lost)), strict=True
    ):
        alive = readable(row, sorted(running))
        assert readable(new, sorted(running)) == alive
        if alive:
            assert readable(new) == alive
        elif row.get(lost) in READABLE:
            assert new[lost] is row[lost]


@given(tables, st.integers(0, 3), st.data())
def test_replicated_keeps_enough(
    rows: Table, replicas: int, data: st.DataObject
) -> None:
    outdated = [
        (partition, nid)
        for partition, row in enumerate(rows)
        for nid, state in row.items()
        if state is CellState.OUT_OF_DATE
    ]
    if not outdated:
        return
    partition, nid = data.draw(st.sampled_from(outdated))
    changes = policy.replicated(rows, replicas, partition, nid)
    before, after = rows[partition], applied(rows, changes)[partition]
    assert after[nid] is CellState.UP_TO_DATE
    removed = set(before) - set(after)
    assert all(before[n] is CellState.FEEDING for n in removed)
    if any(state not in READABLE for state in after.values()) and removed:
        assert readable(after) >= replicas


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize(("hosts", "disks"), [(10, 5), (25, 2), (5, 10), (50, 1)])
def test_replicas_are_on_different_hosts(hosts: int, disks: int, replicas: int) -> None:
    """Regular layouts are solved, also when a host is added to a big table."""

    def layout(hosts: int) -> dict[int, Path]:
        return {
            host * disks + disk + 1: (b"host%d" % host, b"disk%d" % disk)
            for host in range(hosts)
            for disk in range(disks)
        }

    rows, resilient = policy.create(1000, replicas, layout(hosts))
    assert resilient
    nodes = layout(hosts + 1)
    tweaked = policy.tweak(rows, replicas, nodes)
    assert tweaked.resilient
    for table in rows, replicate(applied(rows, tweaked.cells), replicas):
        for row in table:
            assert len({nodes[nid][0] for nid in row}) == len(row) == replicas + 1


def test_racks_then_hosts() -> None:
    """With less racks than replicas, they share the cells evenly; hosts differ."""
    nodes: dict[int, Path] = {
        nid: (b"rack%d" % (nid % 2), b"host%d" % (nid // 2 % 4)) for nid in range(1, 17)
    }
    rows, resilient = policy.create(96, 3, nodes)
    assert resilient
    for row in rows:
        racks = [nodes[nid][0] for nid in row]
        assert racks.count(b"rack0") == racks.count(b"rack1") == 2
        assert len({nodes[nid] for nid in row}) == 4


@given(st.integers(1, 30), st.integers(1, 3), st.integers(2, 9), st.data())
def test_topology_limits(
    partitions: int, replicas: int, count: int, data: st.DataObject
) -> None:
    """If it says that the table is resilient, no host has more cells than it must."""
    hosts = st.sampled_from([(b"a",), (b"b",), (b"c",), (b"d",)])
    nodes: dict[int, Path] = {nid: data.draw(hosts) for nid in range(1, count + 1)}
    rows, resilient = policy.create(partitions, replicas, nodes)
    if not resilient:
        return
    distinct = len(set(nodes.values()))
    for row in rows:
        held = [nodes[nid] for nid in row]
        assert max(map(held.count, held)) <= -(-len(row) // distinct)


def test_behind() -> None:
    """Of cells that must be the same, those that are older, or else."""
    up = CellState.UP_TO_DATE
    rows = [{1: up, 2: up, 3: CellState.OUT_OF_DATE}, {1: up, 2: up}, {1: up}]
    a, b, c = (bytes(7) + bytes([n]) for n in (1, 2, 3))
    same = {0: {1: (b, b), 2: (b, b), 3: (a, a)}, 1: {1: (a, a), 2: (a, a)}}
    assert policy.behind(rows, same) == ({}, {})
    assert policy.behind(rows, {0: {1: (b, b), 2: (a, b)}}) == ({(0, 2): None}, {})
    assert policy.behind(rows, {1: {1: (a, a), 2: (a, c)}}) == ({(1, 1): None}, {})
    # The second has something that the first lacks: not just a copy.
    assert policy.behind(rows, {1: {1: (c, a), 2: (a, b)}}) == ({}, {(1, 2): None})
    assert policy.behind(rows, {2: {1: (a, a)}, 7: {1: (a, a)}}) == ({}, {})
