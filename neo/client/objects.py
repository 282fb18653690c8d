"""Many objects asked in one packet, of storages that know how (feature `objects`).

A packet on its own costs either side more than to find an object and to pack it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.protocol import FEATURE_OBJECTS, AskObject, AskObjects, ErrorCode

from .handlers import offers

# Objects of one packet: the storage reads the next ones while the client looks at them.
TOGETHER = 32


class Target(Protocol):
    """What waits for one object."""

    def set(self, *args: Any) -> None:
        """The arguments of AnswerObject."""

    def fail(self, code: int | None, text: str) -> None:
        """An error came, or the connection is gone (None)."""


# oid, at, before: as for AskObject.
Wanted = tuple[bytes, bytes | None, bytes | None, Target]


def ask_objects(conn: Connection, wanted: Sequence[Wanted]) -> None:
    """Send requests for objects; each target is told of its own one."""
    if len(wanted) > 1 and offers(conn, FEATURE_OBJECTS):
        for start in range(0, len(wanted), TOGETHER):
            _ask_together(conn, wanted[start : start + TOGETHER])
    else:
        for one in wanted:
            _ask_alone(conn, *one)


def _ask_alone(
    conn: Connection, oid: bytes, at: bytes | None, before: bytes | None, target: Target
) -> None:
    conn.ask(AskObject, oid, at, before).then(target.set, target.fail)


def _ask_together(conn: Connection, wanted: Sequence[Wanted]) -> None:
    def done(rows: Sequence[tuple[Any, ...] | None], codes: Sequence[int]) -> None:
        if not 0 < len(rows) <= len(wanted) or rows.count(None) != len(codes):
            text = f"{len(rows)} objects, {len(codes)} reasons"
            failed(None, text)  # they are answered no more
            raise ProtocolError(text)
        refusals = iter(codes)
        for one, row in zip(wanted, rows, strict=False):
            if row is not None:
                one[3].set(one[0], *row)
            elif (code := next(refusals)) == ErrorCode.NOT_READY:
                _ask_alone(conn, *one)  # it takes longer
            else:
                one[3].fail(code, "")
        if len(rows) < len(wanted):
            ask_objects(conn, wanted[len(rows) :])

    def failed(code: int | None, text: str) -> None:
        for *_, target in wanted:
            target.fail(code, text)

    conn.ask(AskObjects, [one[:3] for one in wanted]).then(done, failed)
    conn.transport.flush()  # it begins at once


__all__ = ["TOGETHER", "Target", "Wanted", "ask_objects"]
