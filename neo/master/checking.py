"""Checks of replicas for administrators: each cell is asked, the answers are collected.

A storage of neoppod is asked to compare the keys of a partition; what it finds is in
the logs only. Source: behaviour 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from neo.lib.connection import Reply
from neo.lib.node import Node, nid_str, wire_address
from neo.lib.protocol import (
    FEATURE_CHECK,
    READABLE,
    AnswerCheck,
    AskCheckCell,
    CheckPartition,
    ErrorCode,
)

if TYPE_CHECKING:
    from .app import Master

# (partition, nid, missing, extra, different, damaged, repaired, problems)
CheckedCell = tuple[int, int, int, int, int, int, int, tuple[bytes, ...]]


class Check:
    """One request of an administrator, until all cells answered."""

    def __init__(self, checks: Checks, reply: Reply) -> None:
        self._checks = checks
        self._reply = reply
        self._cells: list[CheckedCell] = []
        self._left = 1  # until all are asked

    def ask(
        self,
        node: Node,
        partition: int,
        reference: int | None,
        min_tid: bytes,
        max_tid: bytes,
        repair: bool,
    ) -> None:
        """Let a storage check its cell."""
        nid = node.nid or 0
        self._left += 1

        def done(
            missing: int,
            extra: int,
            different: int,
            damaged: int,
            repaired: int,
            problems: tuple[bytes, ...],
        ) -> None:
            counts = missing, extra, different, damaged, repaired
            self._cells.append((partition, nid, *counts, problems))
            self.answered()

        def failed(code: int | None, text: str) -> None:
            self.problem(partition, nid, text or "failed")
            self.answered()

        node.connection.ask(
            AskCheckCell, partition, reference, min_tid, max_tid, repair
        ).then(done, failed)

    def problem(self, partition: int, nid: int, text: str) -> None:
        """A cell could not be checked."""
        self._cells.append((partition, nid, 0, 0, 0, 0, 0, (text.encode(),)))

    def answered(self) -> None:
        """One thing less to wait for."""
        self._left -= 1
        if not self._left:
            self._checks.running.pop(self, None)
            self._reply.answer(AnswerCheck, sorted(self._cells))

    def abort(self, text: str) -> None:
        """The operation ends: the answers that are due won't come."""
        self._reply.error(ErrorCode.NOT_READY, text)


class Checks:
    """The checks that administrators wait for."""

    def __init__(self, master: Master) -> None:
        self.master = master
        self.running: dict[Check, None] = {}

    def start(
        self,
        reply: Reply,
        partitions: Mapping[int, int | None],
        min_tid: bytes,
        max_tid: bytes,
        repair: bool,
    ) -> None:
        """Check all cells of partitions, with the reference (nid) if any.

        Those that are not readable now are told to be so.
        """
        check = Check(self, reply)
        self.running[check] = None
        for partition, reference in sorted(partitions.items()):
            self._ask(check, partition, reference, min_tid, max_tid, repair)
        check.answered()

    def _ask(
        self,
        check: Check,
        partition: int,
        reference: int | None,
        min_tid: bytes,
        max_tid: bytes,
        repair: bool,
    ) -> None:
        running = self.master.nodes.running()
        old = []
        for nid, state in self.master.pt.rows[partition].items():
            node = running.get(nid)
            if node is None or node.connection is None:
                check.problem(partition, nid, "not compared: it is not running")
            elif state not in READABLE:
                check.problem(partition, nid, f"not compared: {state}")
            elif FEATURE_CHECK in node.extra.get("features", ()):
                check.ask(node, partition, reference, min_tid, max_tid, repair)
            else:
                old.append(node)
        if old:
            source = None if reference is None else running[reference].address
            args = partition, (b"", wire_address(source)), min_tid, max_tid
            old[0].connection.notify(CheckPartition, *args)
            for node in old:
                text = f"{nid_str(node.nid)} is too old to tell: see the logs"
                check.problem(partition, node.nid or 0, text)

    def abort(self, text: str) -> None:
        """The storages leave operation."""
        running, self.running = self.running, {}
        for check in running:
            check.abort(text)
