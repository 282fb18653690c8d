"""Metadata of transactions: as ZODB and storages have them, and what was read lately.

The objects whose histories are shown together were often modified together; what is
undone was in a log before. Metadata never change, and go away only when the database is
truncated: the client then synchronises anew, which clears this. Only whether a
transaction is packed changes, and nobody asks that here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pickle import PicklingError, loads
from typing import Any

from persistent.TimeStamp import TimeStamp
from ZODB._compat import dumps

from .exception import NEOStorageError

# tid, user, description, extension, packed, oids
Information = tuple[bytes, bytes, bytes, bytes, bool, Sequence[bytes]]
# The same, without oids if they are many.
Known = tuple[bytes, bytes, bytes, bytes, bool, Sequence[bytes] | None]

ENTRIES = 1000
TEXT_MAX = 1000  # bytes: what is longer is not kept
OIDS_MAX = 50


class Informations:
    """The last ones that were read, by tid."""

    def __init__(self) -> None:
        self._by_tid: dict[bytes, Known] = {}

    def __len__(self) -> int:
        return len(self._by_tid)

    def get(self, tid: bytes) -> Known | None:
        """What is known of a transaction."""
        return self._by_tid.get(tid)

    def add(self, info: Information) -> None:
        """Keep what a storage answered; the oldest entry leaves."""
        if len(info[1]) + len(info[2]) + len(info[3]) > TEXT_MAX:
            return
        by_tid = self._by_tid
        by_tid[info[0]] = info if len(info[5]) <= OIDS_MAX else (*info[:5], None)
        if len(by_tid) > ENTRIES:
            del by_tid[next(iter(by_tid))]

    def clear(self) -> None:
        """The database may have another past now."""
        self._by_tid.clear()


def _bytes(text: Any) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode()


def encode_metadata(transaction: Any) -> tuple[bytes, bytes, bytes]:
    """User, description and extension of a transaction as they are stored."""
    extension = getattr(transaction, "extension_bytes", None)
    if extension is None:
        content = getattr(transaction, "extension", None)
        try:
            extension = dumps(content, 3) if content else b""
        except PicklingError as error:
            raise NEOStorageError(f"extension of the transaction: {error}") from error
    return _bytes(transaction.user), _bytes(transaction.description), extension


def describe(info: Known) -> dict[str, Any]:
    """What the entries of history() and undoLog() have in common."""
    return {
        **_decode_extension(info[3]),
        "time": TimeStamp(info[0]).timeTime(),
        "user_name": info[1],
        "description": info[2],
    }


def _decode_extension(data: bytes) -> dict[str, Any]:
    """Extension of a transaction; {} if it can't be read."""
    if not data:
        return {}
    try:
        content = loads(data)
    except Exception:  # noqa: BLE001 whatever an application has stored
        return {}
    return content if isinstance(content, dict) else {}
