"""What became of a transaction when the answer to its end is lost.

Source: behaviour.md 3.11.
"""

from __future__ import annotations

from neo.lib.protocol import MAX_TID, AskFinalTID, Ping

from .answers import Refusal
from .app import ClientApp
from .exception import (
    NEOStorageError,
    NEOStorageTransientError,
    NEOStorageUnknownOutcome,
)


def find(app: ClientApp, ttid: bytes, reason: str) -> bytes:
    """The tid of a transaction whose commit was asked for. However long it takes,
    unless there is a `connect_timeout`; `reason`: why there is no answer.

    Raises NEOStorageTransientError if it is aborted, NEOStorageUnknownOutcome.
    """
    monotonic = app.runtime.monotonic
    limit = app.options.connect_timeout
    deadline = None if limit is None else monotonic() + limit
    app.log.warning(
        "connection lost while transaction %s was being finished: %s",
        ttid.hex(),
        reason,
    )
    while True:
        try:
            app.connect()
            left = None if deadline is None else max(0.0, deadline - monotonic())
            tid = app.final_tid(ttid, left)
            if tid == MAX_TID:
                (tid,) = app.reader.read(ttid, AskFinalTID, ttid)
        except (LookupError, NEOStorageTransientError):
            if app.closed:
                raise NEOStorageUnknownOutcome(
                    f"closed before the outcome of {ttid.hex()} was known"
                ) from None
            if deadline is not None and monotonic() >= deadline:
                raise NEOStorageUnknownOutcome(
                    f"outcome of {ttid.hex()} not known within {limit:g} s"
                ) from None
            app.runtime.wait(lambda: app.closed, (), 0.1)
            continue
        except NEOStorageError as error:
            raise NEOStorageUnknownOutcome(
                f"outcome of transaction {ttid.hex()}: {error}"
            ) from error
        except Refusal as refusal:
            raise NEOStorageUnknownOutcome(
                f"outcome of transaction {ttid.hex()}: {refusal}"
            ) from refusal
        break
    if tid is None:
        raise NEOStorageTransientError(
            "connection to the primary master lost: the transaction is aborted"
        )
    # Was our resynchronisation before its commit? The invalidation (we are not its
    # author any more) precedes the Pong.
    try:
        while app.last_tid is None or app.last_tid < tid:
            if app.ask_master(Ping).value is not None:
                break
    except NEOStorageError:
        # Committed it is; what others committed before is not known.
        app.cache.clear_current()
        if app.db is not None:
            app.db.invalidateCache()
    return tid
