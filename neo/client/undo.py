"""What a client stores to undo a transaction. Source: behaviour.md 3.10."""

from __future__ import annotations

import base64
import contextlib
from typing import Any

from ZODB import POSException

from neo.lib.protocol import (
    AskObjectUndoSerial,
    AskTransactionInformation,
    ErrorCode,
)
from neo.lib.util import add64

from .answers import Refusal
from .exception import NEOStorageError, NEOStorageNotFoundError
from .first_phase import FirstPhase


def tid_of(transaction_id: Any) -> bytes:
    """Tid of an undo id, which may be in base64 as FileStorage's are."""
    if isinstance(transaction_id, str):
        transaction_id = transaction_id.encode("latin-1")
    if len(transaction_id) != 8:
        with contextlib.suppress(ValueError):
            transaction_id = base64.decodebytes(transaction_id + b"\n")
    if len(transaction_id) != 8:
        raise POSException.UndoError("Invalid transaction id")
    return bytes(transaction_id)


def plan(txn: FirstPhase, tid: bytes) -> dict[bytes, tuple[bytes, bytes | None, bool]]:
    """What to store to undo a transaction: oid -> (current serial, serial of the
    data to restore, whether current data are those of the undone transaction).

    Raises UndoError, NEOStorageNotFoundError.
    """
    txn.check_session()
    app = txn.app
    info = app.informations.get(tid)
    oids = None if info is None else info[5]
    if oids is None:
        try:
            oids = app.reader.read(tid, AskTransactionInformation, tid)[5]
        except Refusal as refusal:
            raise NEOStorageNotFoundError(
                f"transaction {tid.hex()}: {refusal}"
            ) from None
        txn.check_session()
    assert oids is not None
    txn.keep_data = True
    by_partition: dict[int, list[bytes]] = {}
    for oid in oids:
        by_partition.setdefault(app.pt.partition_of(oid), []).append(oid)
    assert app.last_tid is not None
    snapshot = add64(app.last_tid, 1)
    found: dict[bytes, tuple[bytes, bytes | None, bool]] = {}
    for part in by_partition.values():
        try:
            (result,) = app.reader.read(
                part[0],
                AskObjectUndoSerial,
                txn.ttid,
                snapshot,
                tid,
                part,
                avoid=txn.failed,
            )
        except Refusal as refusal:
            if refusal.code == ErrorCode.OID_NOT_FOUND:
                raise POSException.UndoError(
                    f"non-undoable transaction {tid.hex()}: it was packed"
                ) from None
            raise NEOStorageError(str(refusal)) from None
        found.update(result)
    txn.check_session()
    return {oid: found[oid] for oid in oids if oid in found}


def data_of(txn: FirstPhase, oid: bytes, serial: bytes) -> bytes | None:
    """Data of a revision, which may be the one that this transaction stored."""
    if serial == txn.ttid:
        version = txn.oids[oid]
        if version.data is None and version.data_serial is not None:
            return txn.reload(oid, version.data_serial)
        return version.data
    try:
        return txn.app.reader.load(oid, at=serial)[0]
    except NEOStorageNotFoundError:
        return None
