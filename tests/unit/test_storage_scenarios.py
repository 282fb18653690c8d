"""Scenarios of behaviour.md 11 that a storage node meets in the order of packets."""

from __future__ import annotations

from neo.lib.protocol import (
    AnswerUnfinishedTransactions,
    AskUnfinishedTransactions,
    CellState,
    NotifyPackCompleted,
    NotifyReplicationDone,
)

from .storage_harness import OUT, UP, Harness
from .test_storage_replication import OTHER, T2, TABLE, source, transfer


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
