"""Scenarios of behaviour.md 11 that a storage node meets in the order of packets."""

from __future__ import annotations

from neo.lib.protocol import (
    AcceptIdentification,
    AnswerUnfinishedTransactions,
    AskUnfinishedTransactions,
    CellState,
    Error,
    ErrorCode,
    NodeState,
    NodeType,
    NotifyPackCompleted,
    NotifyReplicationDone,
)

from .storage_harness import OUT, UP, Harness
from .test_storage_node import C1, identify
from .test_storage_replication import OTHER, T2, TABLE, source, transfer


def test_12_13_an_id_that_was_given_to_another_client() -> None:
    """Who had it before is refused, who has it waits until the master has said so."""
    h = Harness()
    h.operate()
    client = NodeType.CLIENT, None, C1
    h.tell_nodes((*client, NodeState.RUNNING, h.timestamp))
    old = h.timestamp
    new = identify(h, C1, old + 10)
    assert not new.packets()
    h.tell_nodes((*client, NodeState.UNKNOWN, old))
    assert not new.packets()
    h.tell_nodes((*client, NodeState.RUNNING, old + 10))
    assert new.receive(AcceptIdentification) == (NodeType.STORAGE, 1, C1)
    late = identify(h, C1, old)
    assert late.receive(Error)[0] == ErrorCode.NOT_READY
    assert late.is_closed
    assert not new.is_closed


def test_125_table_changes_before_the_answer() -> None:
    """It is processed at once; the answer still counts for the cells that are left."""
    h = Harness()
    m = h.operate(TABLE)
    h.tell_nodes(OTHER)
    _, msg_id, _ = m.expect(AskUnfinishedTransactions)
    h.change_table(2, (1, 1, CellState.DISCARDED))
    assert h.node.pt.ptid == 2
    assert h.node.own_state(1) is None
    m.send(AnswerUnfinishedTransactions, T2, (), msg_id=msg_id)
    transfer(source(h))
    assert m.receive(NotifyReplicationDone) == (0, T2)


def test_124_cell_is_assigned_again_before_the_answer() -> None:
    """The answer that was asked for the former cell does not count."""
    h = Harness()
    m = h.operate(TABLE)
    h.tell_nodes(OTHER)
    _, msg_id, _ = m.expect(AskUnfinishedTransactions)
    h.change_table(2, (0, 1, CellState.DISCARDED))
    h.change_table(3, (0, 1, OUT))
    m.expect(NotifyPackCompleted)
    m.send(AnswerUnfinishedTransactions, T2, (), msg_id=msg_id)
    _, msg_id, args = m.expect(AskUnfinishedTransactions)
    assert args == ((0,),)
    m.send(AnswerUnfinishedTransactions, T2, (), msg_id=msg_id)
    transfer(source(h))
    assert m.receive(NotifyReplicationDone) == (0, T2)
    assert h.node.own_state(0) is OUT
    h.change_table(4, (0, 1, UP))
    assert h.node.own_state(0) is UP
