"""The node table. Source: behaviour 1.2 and 1.3, protocol 3.3 and 3.7."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.lib.exception import ConfigurationError, ProtocolError
from neo.lib.node import (
    Node,
    NodeManager,
    address_from_wire,
    as_row,
    format_nodes,
    format_partition_table,
    format_rows,
    nid_str,
    nid_type,
    parse_nid,
)
from neo.lib.protocol import CellState, NodeRow, NodeState, NodeType
from neo.lib.util import Address

M, S, C, A = NodeType.MASTER, NodeType.STORAGE, NodeType.CLIENT, NodeType.ADMIN
RUNNING, DOWN, UNKNOWN = NodeState.RUNNING, NodeState.DOWN, NodeState.UNKNOWN
PENDING = NodeState.PENDING
M1, C1, C2, A1 = -0x0FFFFFFF, -0x1FFFFFFF, -0x1FFFFFFE, -0x2FFFFFFF


def row(
    kind: NodeType,
    port: int | None,
    nid: int | None,
    state: NodeState = RUNNING,
    id_timestamp: float | None = None,
) -> NodeRow:
    return kind, port and (b"h", port), nid, state, id_timestamp


def rows(nodes: NodeManager) -> list[NodeRow]:
    nodes.check()
    return [as_row(node) for node in nodes]


# --- node ids ---


@pytest.mark.parametrize(
    ("nid", "kind", "text"),
    [
        (1, S, "S1"),
        (0x0FFFFFFF, S, "S16777215"),
        (M1, M, "M1"),
        (-268435455, M, "M1"),
        (-1, M, "M16777215"),
        (-536870911, C, "C1"),
        (-805306367, A, "A1"),
        (-805306365, A, "A3"),
    ],
)
def test_nids(nid: int, kind: NodeType, text: str) -> None:
    assert nid_type(nid) is kind
    assert nid_str(nid) == text


def test_nids_of_no_type() -> None:
    for nid in (0, 0x10000000, -0x40000000, -(2**31)):
        assert nid_type(nid) is None
    assert nid_str(None) == "None"
    assert nid_str(0x10000000) == "?268435456"


@given(st.sampled_from("SMCA"), st.integers(1, 0xFFFFFF))
def test_parse_nid(letter: str, number: int) -> None:
    text = f"{letter}{number}"
    assert nid_str(parse_nid(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "S", "s1", "S0", "S-1", "S+1", "1", "None", "X1", "S1 ", "S²", "S16777216"],
)
def test_invalid_nid(text: str) -> None:
    with pytest.raises(ConfigurationError, match="invalid node id"):
        parse_nid(text)


def test_free_nid() -> None:
    nodes = NodeManager()
    assert nodes.free_nid(S) == 1
    assert nodes.free_nid(M) == M1
    nodes.add(S, 1, ("h", 1))
    nodes.add(S, 3, ("h", 3))
    nodes.add(S, None, ("h", 4))
    assert nodes.free_nid(S) == 2
    assert nodes.free_nid(S, ("h", 3)) == 3  # the same node comes back
    assert nodes.free_nid(S, ("h", 4)) == 2
    assert nodes.free_nid(S, ("h", 9), 7) == 7
    assert nodes.free_nid(S, ("h", 9), 1) == 2  # somebody else's
    assert nodes.free_nid(S, ("h", 1), 1) == 1
    assert nodes.free_nid(S, None, 1) == 2
    assert nodes.free_nid(C, None, 5) == C1  # of another type
    assert nodes.free_nid(C, None, -4096) == C1
    assert nodes.free_nid(C, None, C2) == C2
    nodes.add(C, C1)
    assert nodes.free_nid(C, None, C1) == C2


# --- the table ---


def test_order_and_look_up() -> None:
    nodes = NodeManager()
    master = nodes.add(M, M1, ("h", 1), RUNNING)
    storage = nodes.add(S, 1, ("h", 2), RUNNING, 3.5)
    client = nodes.add(C, C1, None, RUNNING, 4.5)
    down = nodes.add(S, 2, ("h", 3))
    assert list(nodes) == [master, storage, client, down]
    assert nodes.of_type(S, C) == [storage, client, down]
    assert nodes.by_nid(1) is nodes.by_address(("h", 2)) is storage
    assert nodes.by_nid(None) is nodes.by_address(None) is nodes.by_nid(9) is None
    assert nodes.running() == {1: storage}
    assert nodes.identified() == []
    storage.connection = client.connection = object()
    assert nodes.identified() == [storage, client]
    assert nodes.identified(S) == [storage]
    assert storage.identified
    assert not master.identified
    nodes.set_nid(storage, 5)
    nodes.set_address(storage, ("h", 9))
    assert nodes.by_nid(5) is nodes.by_address(("h", 9)) is storage
    assert nodes.by_nid(1) is nodes.by_address(("h", 2)) is None
    nodes.remove(master)
    assert master not in nodes
    assert len(nodes) == 3
    nodes.check()
    assert as_row(storage) == (S, (b"h", 9), 5, RUNNING, 3.5)
    assert repr(storage) == "<S5 STORAGE h:9 RUNNING>"
    assert repr(client) == "<C1 CLIENT None RUNNING>"


def test_update() -> None:
    nodes = NodeManager()
    update = nodes.update(1.0, [row(M, 1, M1), row(S, 2, 1, PENDING, 0.1)], full=True)
    assert [change[1:] for change in update.changes] == [
        (None, RUNNING),
        (None, PENDING),
    ]
    storage = update.changes[1].node
    update = nodes.update(
        2.0, [row(C, None, C1, RUNNING, 1.9), row(S, 2, 1, RUNNING, 0.1)]
    )
    assert update.changes[1] == (storage, PENDING, RUNNING)
    client = update.changes[0].node
    assert client.id_timestamp == 1.9
    client.connection = object()
    update = nodes.update(3.0, [row(C, None, C1, UNKNOWN), row(C, None, C2, UNKNOWN)])
    assert update.forgotten == [client]
    assert client.connection is not None  # the caller's to close
    assert update.changes[0] == (client, RUNNING, UNKNOWN)
    assert update.changes[1][1:] == (None, UNKNOWN)
    assert rows(nodes) == [row(M, 1, M1), row(S, 2, 1, RUNNING, 0.1)]


def test_first_update_is_complete() -> None:
    nodes = NodeManager()
    for nid in 1, 2, 3:
        nodes.add(S, nid, ("h", nid), RUNNING)
    old_client = nodes.add(C, C1, None, RUNNING)
    nodes.add(M, None, ("h", 10))
    update = nodes.update(1.0, [row(M, 10, M1), row(S, 1, 1)], full=True, keep={2, C1})
    assert [nid_str(node.nid) for node in update.forgotten] == ["S3", "C1"]
    assert old_client not in nodes
    assert rows(nodes) == [
        row(S, 1, 1),
        row(S, 2, 2, DOWN),  # has cells: kept, but not vouched for
        row(M, 10, M1),
    ]


def test_address_matches_before_nid() -> None:
    nodes = NodeManager()
    first = nodes.add(M, M1, ("h", 1))
    second = nodes.add(M, M1 + 1, ("h", 2))
    nodes.update(1.0, [row(M, 2, M1), row(M, 1, None)], full=True)
    assert (first.nid, second.nid) == (None, M1)
    assert rows(nodes) == [row(M, 1, None), row(M, 2, M1)]


def test_nid_of_an_unreachable_node_is_taken() -> None:
    nodes = NodeManager()
    client = nodes.add(C, C1)
    other = nodes.add(C, None, ("h", 1))
    update = nodes.update(1.0, [row(C, 1, C1)], full=True)
    assert update.forgotten == [client]
    assert other.nid == C1
    nodes.check()


def test_address_of_a_known_nid_changes() -> None:
    nodes = NodeManager()
    storage = nodes.add(S, 1)
    nodes.update(1.0, [row(S, 7, 1)])
    assert storage.address == ("h", 7)
    nodes.update(2.0, [row(S, 8, 1)])
    assert nodes.by_address(("h", 8)) is storage
    nodes.check()


def test_invalid_updates() -> None:
    nodes = NodeManager()
    nodes.update(5.0, [], full=True)
    for timestamp in 5.0, 4.0:
        with pytest.raises(ProtocolError, match="timestamp"):
            nodes.update(timestamp, [])
    with pytest.raises(ProtocolError, match="without id and address"):
        nodes.update(6.0, [row(C, None, None)])
    with pytest.raises(ProtocolError, match="invalid host"):
        nodes.update(7.0, [(S, (b"\xff", 1), 1, RUNNING, None)])
    nodes.update(1.0, [], full=True)  # another connection, another clock
    assert nodes.timestamp == 1.0


def test_master_changes_are_told() -> None:
    told: list[list[Address]] = []
    nodes = NodeManager(told.append)
    first = nodes.add(M, None, ("h", 1))
    nodes.add(S, 1, ("h", 2))
    nodes.update(1.0, [row(M, 3, M1), row(M, 1, M1 + 1)])
    nodes.update(2.0, [row(M, 3, M1, DOWN)])
    nodes.set_address(first, ("h", 4))
    nodes.update(3.0, [row(M, 3, M1, UNKNOWN)])
    nodes.remove(first)
    assert [[port for _, port in masters] for masters in told] == [
        [1],
        [1, 3],
        [4, 3],
        [4],
        [],
    ]


kinds = st.sampled_from([M, S, C, A])
updates = st.lists(
    st.tuples(
        st.lists(
            st.tuples(
                kinds,
                st.integers(1, 4) | st.none(),
                st.integers(1, 5) | st.none(),
                st.sampled_from(list(NodeState)),
            ).filter(lambda r: (r[1], r[2]) != (None, None))
        ),
        st.booleans(),
    )
)


@given(updates)
def test_indexes_hold(
    updates: list[
        tuple[list[tuple[NodeType, int | None, int | None, NodeState]], bool]
    ],
) -> None:
    nodes = NodeManager()
    for timestamp, (told, full) in enumerate(updates, 1):
        before = list(nodes)
        update = nodes.update(float(timestamp), [row(*r) for r in told], full=full)
        nodes.check()
        assert len(update.changes) == len(told)
        assert not [node for node in update.forgotten if node in nodes]
        assert [n for n in before if n not in nodes and n not in update.forgotten] == []
        if full:
            assert set(nodes) <= {change.node for change in update.changes}


def test_wire_addresses() -> None:
    assert address_from_wire((b"::1", 5)) == ("::1", 5)
    assert address_from_wire(None) is None
    assert as_row(Node(M, None, ("::1", 5))) == (M, (b"::1", 5), None, DOWN, None)


# --- text ---


def test_format_nodes() -> None:
    """As in operations 3.1; sorted by nid, those without at the end."""
    assert format_nodes([]) == "Empty list!"
    text = format_nodes(
        [
            (A, (b"::1", 5), None, DOWN, None),
            (S, (b"127.0.0.1", 27112), 12, RUNNING, 1795361725.641891),
            (C, None, C1, RUNNING, float("inf")),
            (M, (b"127.0.0.1", 27100), M1, RUNNING, None),
        ]
    )
    assert text.splitlines() == [
        "C1   | CLIENT  |                 | RUNNING | inf",
        "M1   | MASTER  | 127.0.0.1:27100 | RUNNING | None",
        "S12  | STORAGE | 127.0.0.1:27112 | RUNNING | 2026-11-22 15:35:25.641891",
        "None | ADMIN   | [::1]:5         | DOWN    | None",
    ]


U, O, F = CellState.UP_TO_DATE, CellState.OUT_OF_DATE, CellState.FEEDING  # noqa: E741


def test_format_partition_table() -> None:
    """As in operations 4.4."""
    text = format_partition_table(
        38,
        1,
        [[(3, U), (2, O)]] * 24,
        {2: DOWN, 3: RUNNING, 4: PENDING, 10: RUNNING},
    )
    assert text.splitlines() == [
        "# ptid: 38, replicas: 1",
        "              10v       20v",
        "S2  D OOOOOOOOOOOOOOOOOOOOOOOO",
        "S3  R UUUUUUUUUUUUUUUUUUUUUUUU",
        "S10 R ........................",
    ]
    assert text.splitlines()[1].index("v") - len("S2  D ") == 10
    assert format_rows([[(1, U)], [(2, F)]], {1: RUNNING}) == "S1 R U.\nS2 U .F"
    assert format_partition_table(None, 0, [], {}) == "# ptid: None, replicas: 0"


def test_format_some_partitions() -> None:
    text = format_partition_table(1, 0, [[(2, U)], [(1, U), (3, O)]], {}, 1)
    assert text.splitlines() == [
        "# ptid: 1, replicas: 0",
        "001 | S2 - UP_TO_DATE |",
        "002 | S1 - UP_TO_DATE | S3 - OUT_OF_DATE |",
    ]
