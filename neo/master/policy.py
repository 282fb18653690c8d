"""What the primary master does to the partition table: decisions, as pure functions.

They take rows ([partition] of {nid: CellState}) and return the cells that change, as
NotifyPartitionChanges says them: (partition, nid, state), DISCARDED to remove one. The
caller applies and broadcasts them, under the next ptid.

Invariants: nothing here removes or outdates the last readable cell of a partition,
except `outdate` for nodes that are lost already; a second `tweak` changes nothing.

Source: behaviour 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from neo.lib.protocol import READABLE, CellState

Rows = Sequence[Mapping[int, CellState]]
Cell = tuple[int, int, CellState]
Path = Sequence[bytes]

FEEDING = CellState.FEEDING
OUT_OF_DATE = CellState.OUT_OF_DATE
UP_TO_DATE = CellState.UP_TO_DATE
DISCARDED = CellState.DISCARDED


# --- creation and tweak -----------------------------------------------------------

# Placements tried by one search. Without topology none is ever taken back. With it, the
# searches that succeed need a few hundred for 50 nodes; the others could take for ever.
SEARCH_MAX = 20_000


class Tweak(NamedTuple):
    """A new assignment."""

    cells: list[Cell]  # what changes
    resilient: bool  # False: paths are too uneven, replicas may share a device


def create(
    partitions: int, replicas: int, paths: Mapping[int, Path]
) -> tuple[list[dict[int, CellState]], bool]:
    """Rows of a new table over these nodes ({nid: devpath}), and `Tweak.resilient`."""
    rows: list[dict[int, CellState]] = [{} for _ in range(partitions)]
    cells, resilient = tweak(rows, replicas, paths)
    for partition, nid, _ in sorted(cells):
        rows[partition][nid] = UP_TO_DATE
    return rows, resilient


def tweak(rows: Rows, replicas: int, paths: Mapping[int, Path]) -> Tweak:
    """Spread the cells evenly over these nodes ({nid: devpath}; there must be one).

    Cells of other nodes are neither counted nor touched: leave out those to ignore.
    """
    assert paths, "no node to tweak"
    nids = sorted(paths)
    repeats = min(replicas + 1, len(nids))
    patterns = Counter(_deal(len(rows), repeats, len(nids)))
    holdings = [_holding(rows, nid) for nid in nids]
    levels = _levels([paths[nid] for nid in nids], repeats) if repeats > 1 else []
    found = None
    if levels:
        found = _assign(holdings, patterns, _Topology(levels))
    resilient = found is not None or levels == []
    if found is None:
        found = _assign(holdings, patterns, None)
        assert found is not None, (rows, replicas, paths)
    assignment = [(nids[node], pattern) for node, pattern in found]
    return Tweak(_move(rows, repeats, assignment), resilient)


class _Holding(NamedTuple):
    """Cells of a node, as bit masks of partitions."""

    readable: int
    other: int
    kept: int  # all but FEEDING


def _holding(rows: Rows, nid: int) -> _Holding:
    readable = other = kept = 0
    bit = 1
    for row in rows:
        state = row.get(nid)
        if state is not None:
            if state in READABLE:
                readable |= bit
            else:
                other |= bit
            if state is not FEEDING:
                kept |= bit
        bit <<= 1
    return _Holding(readable, other, kept)


def _deal(partitions: int, repeats: int, count: int) -> list[int]:
    """Patterns (bit masks of partitions) for `count` nodes, dealt slot by slot.

    Consecutive partitions go to different patterns, so that a transaction creating
    objects with consecutive oids spreads over all nodes. They come by decreasing size,
    then lexicographic: slot j of pattern i is in partition (i + j * count) // repeats,
    which grows with i.
    """
    patterns = [0] * count
    for slot in range(partitions * repeats):
        patterns[slot % count] |= 1 << slot // repeats
    return patterns


class _Level(NamedTuple):
    """What one depth of the paths allows, for one partition."""

    groups: list[Path]  # by node: the first components of its path
    limit: int  # cells in a group
    many: int  # groups that may hold as many as `limit`


def _levels(paths: Sequence[Path], repeats: int) -> list[_Level] | None:
    """Limits by depth, until there are enough groups for one replica each.

    [] if no node has a path, None if they are too uneven or too few.
    """
    if not any(paths):
        return []
    levels = []
    for depth in range(1, min(map(len, paths)) + 1):
        groups: list[Path] = [tuple(path[:depth]) for path in paths]
        sizes = Counter(groups)
        largest = max(sizes.values())
        if largest != min(sizes.values()) and largest * repeats > len(paths):
            return None
        least, more = divmod(repeats, len(sizes))
        levels.append(_Level(groups, least + bool(more), more or len(sizes)))
        if len(sizes) >= repeats:
            return levels
    return None


class _Topology:
    """Cells placed so far, by group; masks of partitions, for speed.

    `held[level][group][k]`: partitions of which the group has more than k cells.
    `many[level][k]`: partitions of which more than k groups have reached the limit.
    All are replaced, never changed: what `place` appends to `past` restores them.
    """

    def __init__(self, levels: list[_Level]) -> None:
        self.levels = levels
        self.held = [
            dict.fromkeys(level.groups, (0,) * level.limit) for level in levels
        ]
        self.many = [(0,) * level.many for level in levels]
        self.past: list[list[tuple[tuple[int, ...], tuple[int, ...]]]] = []

    def place(self, node: int, pattern: int) -> bool:
        """Give the pattern to the node, if the limits allow it."""
        new = []
        for level, groups, many in zip(self.levels, self.held, self.many, strict=True):
            held = groups[level.groups[node]]
            if held[-1] & pattern:
                return False
            full = pattern & held[-2] if len(held) > 1 else pattern
            if many[-1] & full:
                return False
            new.append((_count(held, pattern), _count(many, full)))
        self.past.append(self._set(node, new))
        return True

    def take_back(self, node: int) -> None:
        """Undo the last `place`, which was for this node."""
        self._set(node, self.past.pop())

    def _set(
        self, node: int, new: list[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        old = []
        for i, (held, many) in enumerate(new):
            group = self.levels[i].groups[node]
            old.append((self.held[i][group], self.many[i]))
            self.held[i][group] = held
            self.many[i] = many
        return old


def _count(counts: tuple[int, ...], pattern: int) -> tuple[int, ...]:
    """Add one to the counts (in unary, a mask for each) of these partitions."""
    below = [-1, *counts[:-1]]
    return tuple(c | b & pattern for c, b in zip(counts, below, strict=True))


def _assign(
    holdings: list[_Holding], patterns: Counter[int], topology: _Topology | None
) -> list[tuple[int, int]] | None:
    """Give one pattern to each node: (index of node, pattern), in order of processing.

    None if there is no way to respect the topology, or if it is too hard to find.
    The first two searches are those of behaviour 4.4. On a regular layout of several
    disks by host, the topology can make both lose themselves in a dead end; the other
    two take the hosts in turn, which suits the way patterns are dealt.
    """
    nodes = range(len(holdings))
    keep = [[p for p in patterns if not node.kept & ~p] for node in holdings]
    if all(keep):  # nothing to move
        found = _search(nodes, keep, patterns, topology)
        if found:
            return found
    moves = [  # (by node) {pattern: cost}
        {
            p: ((node.readable & ~p).bit_count(), (node.other & ~p).bit_count())
            for p in patterns
        }
        for node in holdings
    ]

    def spread(node: int) -> tuple[int, int, int]:
        readable, other = zip(*moves[node].values(), strict=True)
        return min(readable) - max(readable), min(other) - max(other), node

    candidates = [sorted(patterns, key=costs.__getitem__) for costs in moves]
    found = _search(sorted(nodes, key=spread), candidates, patterns, topology)
    if found or topology is None:
        return found
    turns = _in_turn(nodes, topology.levels)
    return _search(turns, candidates, patterns, topology) or _search(
        turns, [list(patterns)] * len(holdings), patterns, topology
    )


def _in_turn(nodes: Sequence[int], levels: Sequence[_Level]) -> list[int]:
    """Order nodes so that neighbours are as far away as possible in the topology."""
    if not levels:
        return list(nodes)
    groups: dict[Path, list[int]] = {}
    for node in nodes:
        groups.setdefault(levels[0].groups[node], []).append(node)
    turns = []
    for index, group in enumerate(groups.values()):
        for rank, node in enumerate(_in_turn(group, levels[1:])):
            turns.append(((2 * rank + 1) / len(group), index, node))
    return [node for _, _, node in sorted(turns)]


class _Matching:
    """One pattern for each node, whatever the topology: what is still possible.

    Of the patterns that are taken, `nodes[pattern]` are those that may yet be moved.
    With it, a search without topology never has to go back.
    """

    def __init__(self, candidates: list[list[int]], patterns: Counter[int]) -> None:
        self.candidates = candidates
        self.room = dict(patterns)
        self.nodes: dict[int, dict[int, None]] = {pattern: {} for pattern in patterns}
        self.pattern: dict[int, int] = {}

    def complete(self) -> bool:
        return all(
            any(self._insert(node, pattern) for pattern in candidates)
            for node, candidates in enumerate(self.candidates)
        )

    def fix(self, node: int, pattern: int) -> bool:
        """Give the pattern to the node, if all others can have one too."""
        old = self.pattern[node]
        if old != pattern:
            del self.nodes[old][node]
            self.room[old] += 1
            if not self._insert(node, pattern):
                self.room[old] -= 1
                self.nodes[old][node] = None
                return False
        del self.nodes[pattern][node]
        return True

    def free(self, node: int) -> None:
        self.nodes[self.pattern[node]][node] = None

    def _insert(self, node: int, pattern: int) -> bool:
        """Add a node, moving others along the shortest way to a free place."""
        origins: dict[int, tuple[int, int | None]] = {pattern: (node, None)}
        queue = [pattern]
        for target in queue:
            if self.room[target]:
                self.room[target] -= 1
                self._shift(target, origins)
                return True
            for mover in self.nodes[target]:
                for candidate in self.candidates[mover]:
                    if candidate not in origins:
                        origins[candidate] = mover, target
                        queue.append(candidate)
        return False

    def _shift(self, target: int, origins: dict[int, tuple[int, int | None]]) -> None:
        while True:
            mover, source = origins[target]
            self.nodes[target][mover] = None
            self.pattern[mover] = target
            if source is None:
                return
            del self.nodes[source][mover]
            target = source


def _search(
    order: Sequence[int],
    candidates: list[list[int]],
    patterns: Counter[int],
    topology: _Topology | None,
) -> list[tuple[int, int]] | None:
    """First solution, depth first: nodes in this order, candidates as they come."""
    matching = _Matching(candidates, patterns)
    if not matching.complete():
        return None
    found: list[tuple[int, int]] = []
    remaining = [iter(candidates[order[0]])]
    tries = 0
    while True:
        node = order[len(found)]
        for pattern in remaining[-1]:
            tries += 1
            if topology is not None and not topology.place(node, pattern):
                continue
            if matching.fix(node, pattern):
                found.append((node, pattern))
                break
            if topology is not None:
                topology.take_back(node)
        else:
            remaining.pop()
            if found:
                node, _ = found.pop()
                matching.free(node)
                if topology is not None:
                    topology.take_back(node)
            if not remaining or tries > SEARCH_MAX:
                break
            continue
        if len(found) == len(order):
            return found
        remaining.append(iter(candidates[order[len(found)]]))
    for node, _ in reversed(found):  # given up: leave the topology as it was
        if topology is not None:
            topology.take_back(node)
    return None


def _move(rows: Rows, repeats: int, assignment: list[tuple[int, int]]) -> list[Cell]:
    """Changes that lead to the assignment: (nid, pattern), in order of processing.

    A partition never has less readable cells than it had, or than `repeats`: those to
    remove feed the new ones until these are ready.
    """
    cells: list[Cell] = []
    missing = [repeats] * len(rows)
    leaving: list[Cell] = []
    for nid, pattern in assignment:
        for partition, row in enumerate(rows):
            state = row.get(nid)
            if not pattern >> partition & 1:
                if state is not None:
                    leaving.append((partition, nid, state))
                continue
            if state is None:
                cells.append((partition, nid, OUT_OF_DATE))
            elif state in READABLE:
                missing[partition] -= 1
                if state is FEEDING:
                    cells.append((partition, nid, UP_TO_DATE))
    for partition, nid, state in leaving:
        if state in READABLE and missing[partition] > 0:
            missing[partition] -= 1
            if state is not FEEDING:
                cells.append((partition, nid, FEEDING))
        else:
            cells.append((partition, nid, DISCARDED))
    return cells


# --- loss and return of cells -------------------------------------------------------


def outdate(rows: Rows, running: Container[int], lost: int | None) -> list[Cell]:
    """Cells that nodes which are not RUNNING can't keep readable.

    `lost`: the node just lost, if that is the reason; its cells stay where they are the
    only readable ones, so that the cluster can restart from it. Source: behaviour 4.5.
    """
    cells: list[Cell] = []
    for partition, row in enumerate(rows):
        readable = [nid for nid, state in row.items() if state in READABLE]
        alone = not any(nid in running for nid in readable)
        for nid in readable:
            if nid in running or (alone and nid == lost):
                continue
            # A feeding cell would be one too many in the end.
            state = DISCARDED if row[nid] is FEEDING else OUT_OF_DATE
            cells.append((partition, nid, state))
    return cells


def behind(
    rows: Rows, last_tids: Mapping[int, Mapping[int, tuple[bytes, bytes]]]
) -> tuple[dict[tuple[int, int], None], dict[tuple[int, int], None]]:
    """Readable cells, as (partition, nid), that are older than others; those that are
    neither older nor the same.

    `last_tids`: [partition][nid] of (last transaction, last record). When nothing is in
    progress, all readable cells have the same; the others were put back to an older
    copy. Those with the newest data remain.
    """
    old: dict[tuple[int, int], None] = {}
    strange: dict[tuple[int, int], None] = {}
    for partition, known in sorted(last_tids.items()):
        row = rows[partition] if partition < len(rows) else {}
        cells = {n: pair for n, pair in known.items() if row.get(n) in READABLE}
        newest = max(cells.values(), key=lambda pair: (max(pair), pair), default=None)
        for nid, pair in sorted(cells.items()):
            if newest is not None and pair != newest:
                is_old = pair[0] <= newest[0] and pair[1] <= newest[1]
                (old if is_old else strange)[partition, nid] = None
    return old, strange


def drop(rows: Rows, nids: Container[int], replicas: int = 0) -> list[Cell] | None:
    """Remove these nodes from the table; None if a partition would be lost.

    Feeding cells elsewhere stay for good, one for each cell that is removed, unless
    others are there or on their way (neoppod ends with too many cells). For a kill,
    only `is not None` counts: the cells are then outdated. Source: behaviour 4.6.
    """
    cells: list[Cell] = []
    for partition, row in enumerate(rows):
        gone = [nid for nid in row if nid in nids]
        if not gone:
            continue
        cells += [(partition, nid, DISCARDED) for nid in gone]
        rest = {nid: state for nid, state in row.items() if nid not in nids}
        feeding = sorted(nid for nid, state in rest.items() if state is FEEDING)
        if feeding:
            states = list(rest.values())
            coming = states.count(OUT_OF_DATE)
            missing = replicas + 1 - states.count(UP_TO_DATE) - coming
            count = max(0, min(missing, len(gone)))
            cells += [(partition, nid, UP_TO_DATE) for nid in feeding[:count]]
            if not coming:  # nobody to feed any more
                cells += [(partition, nid, DISCARDED) for nid in feeding[count:]]
        elif UP_TO_DATE not in rest.values() and any(
            row[nid] in READABLE for nid in gone
        ):
            return None
    return cells


def replicated(rows: Rows, replicas: int, partition: int, nid: int) -> list[Cell]:
    """The OUT_OF_DATE cell becomes UP_TO_DATE; feeding cells go as it replaces them.

    Those of nodes which have only feeding cells go first. Source: behaviour 4.7.
    """
    row = rows[partition]
    assert row[nid] is OUT_OF_DATE, (partition, nid, row)
    feeding = sorted(n for n, state in row.items() if state is FEEDING)
    if all(state in READABLE or n == nid for n, state in row.items()):
        excess = len(feeding)
    else:
        readable = 1 + sum(state in READABLE for state in row.values())
        excess = max(0, readable - replicas)
    if len(feeding) > excess > 0:
        leaving = _only_feeding(rows, feeding)
        feeding.sort(key=lambda n: n not in leaving)
    return [
        (partition, nid, UP_TO_DATE),
        *((partition, n, DISCARDED) for n in feeding[:excess]),
    ]


def _only_feeding(rows: Rows, nids: Sequence[int]) -> frozenset[int]:
    """Those of these nodes whose cells are all FEEDING."""
    others = {n for row in rows for n, state in row.items() if state is not FEEDING}
    return frozenset(nids) - others
