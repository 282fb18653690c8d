"""Reading what spans transactions or objects: iteration, undoLog, history, counting.

Requests are sent in windows, so that a slice costs about one round trip. Functions are
called with the lock of the Runtime; generators hold nothing between two items.

Source: behaviour.md 9.6, operations.md 12.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import merge
from itertools import islice
from typing import Any

from neo.lib.protocol import (
    INVALID_TID,
    ZERO_OID,
    AskObject,
    AskObjectHistory,
    AskOIDsFrom,
    AskTIDs,
    AskTIDsFrom,
    AskTransactionInformation,
    ErrorCode,
)
from neo.lib.util import add64, p64

from .answers import Refusal
from .app import ClientApp
from .exception import NEOStorageError
from .metadata import Information, Known

CHUNK = 100  # transactions
PAGE = 1000  # oids
COUNT_PAGE = 10000
# Objects that are asked at once: each may be big.
RECORDS = 64

# oid, data, data serial
RecordRow = tuple[bytes, bytes | None, bytes | None]


def _fail(refusal: Refusal) -> NEOStorageError:
    return NEOStorageError(str(refusal))


def transactions(app: ClientApp, start: bytes, stop: bytes) -> list[Information]:
    """The first transactions (CHUNK or more) of start <= tid <= stop; [] at the end."""
    app.connect()
    np = app.pt.np
    full = CHUNK if np == 1 else max(2, 2 * CHUNK // np)
    tids: list[bytes] = []
    horizon = stop
    for answer in app.reader.read_many(
        (p64(p), AskTIDsFrom, (start, stop, full, p)) for p in range(np)
    ):
        if isinstance(answer, Refusal):
            raise _fail(answer)
        part: Sequence[bytes] = answer[0]
        if len(part) == full:
            # What this partition has after is not known.
            horizon = min(horizon, part[-1])
        tids += part
    return information(app, sorted(tid for tid in tids if tid <= horizon))


def information(app: ClientApp, tids: Sequence[bytes]) -> list[Information]:
    """Metadata of transactions; those that vanish are left out."""
    found: list[Information] = []
    for answer in app.reader.read_many(
        (t, AskTransactionInformation, (t,)) for t in tids
    ):
        if not isinstance(answer, Refusal):
            found.append(answer)
            app.informations.add(answer)
        elif answer.code != ErrorCode.TID_NOT_FOUND:
            raise _fail(answer)
    return found


class Records:
    """What the transactions of a chunk wrote, read ahead in one stream of requests.

    Who wants the records of one transaction most often wants those of the next: round
    trips for each would cost more than all the rest. What was only checked, or is
    packed, is left out.
    """

    def __init__(self, app: ClientApp, infos: Sequence[Information]) -> None:
        self._app = app
        self._infos = infos
        self._answers: Iterator[tuple[Any, ...] | Refusal] = iter(())
        self._next: int | None = None  # which one these answers go on with
        self._stop = 0  # where they end
        self._streams = 0

    def of(self, index: int) -> Iterator[list[RecordRow]]:
        """Slices of the records of one transaction."""
        if self._next != index:
            # Who does not follow the order, gets no more than is asked.
            self._stop = index + 1 if self._streams else len(self._infos)
            self._streams += 1
            self._answers = self._app.reader.read_many(
                (
                    (oid, AskObject, (oid, info[0], None))
                    for info in islice(self._infos, index, self._stop)
                    for oid in info[5]
                ),
                RECORDS,
            )
        self._next = None
        answers = self._answers
        number = len(self._infos[index][5])
        while number > 0:
            rows: list[RecordRow] = []
            for answer in islice(answers, min(number, RECORDS)):
                if not isinstance(answer, Refusal):
                    rows.append((answer[0], *self._app.reader.decode(answer)))
                elif answer.code not in (
                    ErrorCode.OID_NOT_FOUND,
                    ErrorCode.OID_DOES_NOT_EXIST,
                ):
                    raise _fail(answer)
            number -= RECORDS
            yield rows
        if self._answers is answers and index + 1 < self._stop:
            self._next = index + 1


# --- undo log and history -------------------------------------------------------------


def last_tids(app: ClientApp, first: int, last: int) -> list[bytes]:
    """Tids [first, last) of all transactions, the newest first."""
    app.connect()
    pages = []
    for answer in app.reader.read_many(
        (p64(p), AskTIDs, (0, last, p)) for p in range(app.pt.np)
    ):
        if isinstance(answer, Refusal):
            raise _fail(answer)
        pages.append(answer[0])
    return list(islice(merge(*pages, reverse=True), first, last))


def undo_log(
    app: ClientApp,
    first: int,
    last: int,
    describe: Callable[[Information], Any],
    keep: Callable[[Information], object] | None,
) -> list[Any]:
    """Slice [first, last) of what `keep` accepts, the newest first, described."""
    if keep is None:
        if last <= first:
            return []
        return [describe(i) for i in information(app, last_tids(app, first, last))]
    result: list[Any] = []
    seen = position = 0
    page = max(last, CHUNK)
    while seen < last:
        tids = last_tids(app, position, position + page)
        for info in information(app, tids):
            if keep(info):
                if first <= seen < last:
                    result.append(describe(info))
                seen += 1
        if len(tids) < page:
            break
        position += page
    return result


def history(app: ClientApp, oid: bytes, first: int, last: int) -> list[Any]:
    """Slice of the revisions of an object: (serial, stored size, Information or None).

    Raises Refusal if there is no such object.
    """
    _, rows = app.reader.read(oid, AskObjectHistory, oid, first, last)
    get = app.informations.get
    found: dict[bytes, Known | None] = {tid: get(tid) for tid, _ in rows}
    unknown = [tid for tid, info in found.items() if info is None]
    found.update((info[0], info) for info in information(app, unknown))
    return [(tid, size, found[tid]) for tid, size in rows]


# --- objects --------------------------------------------------------------------------


def oids(
    app: ClientApp,
    tid: bytes | None = None,
    min_oid: bytes | None = None,
    max_oid: bytes | None = None,
) -> Iterator[list[bytes]]:
    """Ascending slices of the oids that have data as of `tid` (default: now), with
    min_oid <= oid <= max_oid.
    """
    app.connect()
    assert app.last_tid is not None
    tid = tid or app.last_tid
    np = app.pt.np
    # Where each partition goes on, None at its end; what was read and not yielded.
    next_by_partition: dict[int, bytes | None] = dict.fromkeys(
        range(np), min_oid or ZERO_OID
    )
    read: dict[int, list[bytes]] = {partition: [] for partition in range(np)}
    while True:
        missing = [
            (p, following)
            for p, following in next_by_partition.items()
            if following is not None and not read[p]
        ]
        answers = app.reader.read_many(
            (p64(p), AskOIDsFrom, (p, PAGE, following, tid)) for p, following in missing
        )
        for (partition, _), answer in zip(missing, answers, strict=True):
            if isinstance(answer, Refusal):
                raise _fail(answer)
            next_by_partition[partition] = answer[0]
            read[partition] = list(answer[1])
        # All that is below the last oid known of each unfinished partition is known.
        horizon = max_oid or INVALID_TID
        for partition, following in next_by_partition.items():
            if following is not None:
                part = read[partition]
                horizon = min(horizon, part[-1] if part else add64(following, -1))
        ready = [oid for part in read.values() for oid in part if oid <= horizon]
        read = {p: [o for o in part if o > horizon] for p, part in read.items()}
        if ready:
            yield sorted(ready)
        if horizon == (max_oid or INVALID_TID) or all(
            following is None for following in next_by_partition.values()
        ):
            return


def count(app: ClientApp) -> int:
    """Number of objects that have data now."""
    app.connect()
    assert app.last_tid is not None
    tid = app.last_tid
    following: dict[int, bytes] = dict.fromkeys(range(app.pt.np), ZERO_OID)
    number = 0
    while following:
        parts = list(following.items())
        answers = app.reader.read_many(
            (p64(p), AskOIDsFrom, (p, COUNT_PAGE, oid, tid)) for p, oid in parts
        )
        for (partition, _), answer in zip(parts, answers, strict=True):
            if isinstance(answer, Refusal):
                raise _fail(answer)
            number += len(answer[1])
            if answer[0] is None:
                del following[partition]
            else:
                following[partition] = answer[0]
    return number
