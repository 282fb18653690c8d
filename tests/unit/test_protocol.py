"""The table of packets: names, codes, validators."""

from __future__ import annotations

import re

import pytest
from msgpack import ExtType, packb

from neo.lib.protocol import (
    BY_CODE,
    ENUMS,
    RESPONSE,
    AddTransaction,
    AnswerObjectUndoSerial,
    AnswerRelockObject,
    AskNewOIDs,
    AskObject,
    AskStoreObject,
    CellState,
    ClusterState,
    Error,
    NodeState,
    NodeType,
    NotifyNodeInformation,
    RequestIdentification,
    SendPartitionTable,
    Truncate,
    decode_extension,
    snake,
)

# What CamelCase hides, letter by letter: names whose words are not obvious.
ACRONYMS = {
    "AskCheckTIDRange": "ask_check_tid_range",
    "AnswerCheckTIDRange": "answer_check_tid_range",
    "AskTIDs": "ask_tids",
    "AnswerTIDs": "answer_tids",
    "AskTIDsFrom": "ask_tids_from",
    "AnswerTIDsFrom": "answer_tids_from",
    "AskOIDsFrom": "ask_oids_from",
    "AnswerOIDsFrom": "answer_oids_from",
    "AskNewOIDs": "ask_new_oids",
    "AnswerNewOIDs": "answer_new_oids",
    "AskLastIDs": "ask_last_ids",
    "AnswerLastIDs": "answer_last_ids",
    "AskFinalTID": "ask_final_tid",
    "AnswerFinalTID": "answer_final_tid",
}


@pytest.mark.parametrize("packet", BY_CODE.values(), ids=repr)
def test_handler_names(packet) -> None:
    """Words are those that CamelCase shows; acronyms are one word."""
    expected = ACRONYMS.get(packet.name)
    if expected is None:
        assert not re.search("[A-Z]{2}", packet.name), "add it to ACRONYMS"
        words = re.findall("[A-Z][a-z]+", packet.name)
        assert "".join(words) == packet.name
        expected = "_".join(words).lower()
    assert packet.handler == snake(packet.name) == expected


def test_names_are_unique() -> None:
    packets = BY_CODE.values()
    assert len({p.name for p in packets}) == len({p.handler for p in packets})
    assert len({p.name for p in packets}) == len(BY_CODE)


@pytest.mark.parametrize("packet", BY_CODE.values(), ids=repr)
def test_answers(packet) -> None:
    if packet.code & RESPONSE:
        assert packet.answer is None
    elif packet.answer not in (None, Error):
        assert packet.answer.code == packet.code | RESPONSE


def test_answers_belong_to_a_request() -> None:
    answers = {p.answer for p in BY_CODE.values() if p.answer}
    assert answers == {p for p in BY_CODE.values() if p.code & RESPONSE}


@pytest.mark.parametrize("packet", BY_CODE.values(), ids=repr)
def test_declarations_are_documented(packet) -> None:
    assert packet.doc.endswith((".", "?"))
    ends = packet.route.replace("->", " ").replace(",", " ").split()
    assert {"secondary", "primary", "backup", "upstream"}.issuperset(
        e for e in ends if len(e) > 3
    )


@pytest.mark.parametrize("member", ENUMS.values(), ids=lambda m: f"{type(m)}{m}")
def test_enumerations_on_the_wire(member) -> None:
    assert packb(member) == packb(ExtType(member.code, member.data))
    assert decode_extension(member.code, member.data) is member
    assert str(member) == member.name


@pytest.mark.parametrize(
    "extension",
    [(0, b"\5"), (2, b"\0"), (1, b""), (4, b"\0\0"), (-1, b"\0"), (127, b"x")],
)
def test_unknown_enumeration_values(extension) -> None:
    with pytest.raises(ValueError, match="unknown enumeration value"):
        decode_extension(*extension)


def test_values_of_enumerations() -> None:
    assert [m.name for m in ClusterState] == [
        "RECOVERING", "VERIFYING", "RUNNING", "STOPPING",
        "STARTING_BACKUP", "BACKINGUP", "STOPPING_BACKUP",
    ]  # fmt: skip
    assert [m.name for m in NodeType] == ["MASTER", "STORAGE", "CLIENT", "ADMIN"]
    assert [m.name for m in NodeState] == ["UNKNOWN", "DOWN", "RUNNING", "PENDING"]
    assert [m.name for m in CellState] == [
        "OUT_OF_DATE", "UP_TO_DATE", "FEEDING", "CORRUPTED", "DISCARDED",
    ]  # fmt: skip


ID = bytes(8)
ADDRESS = (b"::1", 65535)
ROW = (NodeType.STORAGE, ADDRESS, 1, NodeState.DOWN, None)
STORE = (ID, ID, 0, bytes(20), b"", None, ID)
REPLICATED = (ID, b"", b"", b"", False, ID, (), None)


@pytest.mark.parametrize(
    ("packet", "args"),
    [
        (Error, (0, b"")),
        (Error, (-1, b"any")),
        (AskObject, (ID, None, ID)),
        (AskNewOIDs, (0xFFFFFFFF,)),
        (AskStoreObject, STORE),
        (AddTransaction, REPLICATED),
        (AddTransaction, (*REPLICATED[:-1], (None, True, (ID,), ID))),
        (RequestIdentification, (NodeType.ADMIN, None, ADDRESS, b"c", 1.5, {b"x": ()})),
        (NotifyNodeInformation, (1.0, ())),
        (NotifyNodeInformation, (1.0, (ROW, ROW))),
        (SendPartitionTable, (None, 0, ())),
        (SendPartitionTable, (1, 0, ((), ((1, CellState.FEEDING),)))),
        (AnswerObjectUndoSerial, ({ID: (ID, None, True)},)),
        (AnswerRelockObject, (None,)),
        (AnswerRelockObject, ((ID, ID, None),)),
        (AnswerRelockObject, ((ID, ID, (1, bytes(20), b"x")),)),
    ],
)
def test_valid(packet, args) -> None:
    assert packet.valid(args)


@pytest.mark.parametrize(
    ("packet", "args", "name"),
    [
        (AskObject, (ID, None), "3 arguments expected, 2 received"),
        (AskObject, (ID, None, ID, ID), "3 arguments expected, 4 received"),
        (AskObject, (ID[:7], None, ID), "invalid oid"),
        (AskObject, (None, None, ID), "invalid oid"),
        (AskObject, ("x" * 8, None, ID), "invalid oid"),
        (AskObject, (bytearray(8), None, ID), "invalid oid"),
        (AskNewOIDs, (-1,), "invalid count"),
        (AskNewOIDs, (1 << 32,), "invalid count"),
        (AskNewOIDs, (True,), "invalid count"),
        (AskNewOIDs, (1.0,), "invalid count"),
        (AskStoreObject, (*STORE[:2], 2, *STORE[3:]), "invalid compression"),
        (AskStoreObject, (*STORE[:3], bytes(19), *STORE[4:]), "invalid checksum"),
        (AddTransaction, (*REPLICATED[:4], 0, *REPLICATED[5:]), "invalid packed"),
        (AddTransaction, (*REPLICATED[:-1], (None, True, ID)), "invalid pack"),
        (NotifyNodeInformation, (1, ()), "invalid timestamp"),
        (NotifyNodeInformation, (1.0, (ROW[:4],)), "invalid nodes"),
        (NotifyNodeInformation, (1.0, (ROW, (0, *ROW[1:]))), "invalid nodes"),
        (NotifyNodeInformation, (1.0, [ROW]), "invalid nodes"),
        (NotifyNodeInformation, (1.0, ((*ROW[:2], 1 << 31, *ROW[3:]),)), "nodes"),
        (NotifyNodeInformation, (1.0, ((*ROW[:3], NodeType.ADMIN, None),)), "nodes"),
        (SendPartitionTable, (0, 0, ()), "invalid ptid"),
        (SendPartitionTable, (1 << 63, 0, ()), "invalid ptid"),
        (SendPartitionTable, (1, 0, (((1, 0),),)), "invalid rows"),
        (AnswerObjectUndoSerial, ({ID: (ID, None, 1)},), "invalid result"),
        (AnswerObjectUndoSerial, ({1: (ID, None, True)},), "invalid result"),
        (AnswerObjectUndoSerial, (None,), "invalid result"),
        (AnswerRelockObject, ((ID, ID, (2, bytes(20), b"x")),), "invalid result"),
        (
            RequestIdentification,
            (NodeType.ADMIN, None, (b"h", 65536), b"c", None, {}),
            "invalid address",
        ),
        (
            RequestIdentification,
            (NodeType.ADMIN, None, ("h", 1), b"c", None, {}),
            "invalid address",
        ),
        (RequestIdentification, (2, None, None, b"c", None, {}), "invalid node_type"),
        (
            RequestIdentification,
            (NodeType.ADMIN, None, None, b"c", None, {"x": ()}),
            "invalid extra",
        ),
        (Truncate, ((),), "invalid tid"),
    ],
)
def test_invalid(packet, args, name) -> None:
    assert not packet.valid(args)
    assert name in packet.explain(args)
