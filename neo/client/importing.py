"""The import of another storage: its transactions are copied, with their tids."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Any

from persistent.TimeStamp import TimeStamp
from ZODB import POSException

from neo.lib.protocol import FEATURE_IMPORT

from .handlers import offers
from .transactions import Transaction

if TYPE_CHECKING:
    from .Storage import Storage

log = logging.getLogger(__name__)

# Imported transactions that are being finished at once.
FLYING = 8


def copy_transactions(source: Any, storage: Storage, *, verbose: bool) -> None:
    """Commit all transactions that `source` iterates, in their order.

    What is committed if something fails is the beginning of the source, which another
    import continues.
    """
    flight = Flight(storage)
    try:
        for transaction in source.iterator():
            if verbose:
                log.info("%s", TimeStamp(transaction.tid))
            storage.tpc_begin(transaction, transaction.tid, transaction.status)
            try:
                for r in transaction:
                    flight.before_reading(r.data_txn)
                    storage.restore(
                        r.oid, r.tid, r.data, r.version, r.data_txn, transaction
                    )
                flight.before_voting(storage._transaction_of(transaction))
                storage.tpc_vote(transaction)
                flight.take_off(transaction)
            except BaseException:
                storage.tpc_abort(transaction)
                raise
            flight.land(flight.size)
    except Exception:
        flight.land()
        raise
    except BaseException:
        # Interrupted: it matters more than what becomes of the last ones.
        with contextlib.suppress(POSException.POSError):
            flight.land()
        raise
    flight.land()


class Flight:
    """Imported transactions that are being finished.

    The next one is begun and stored meanwhile, so that syncs are shared and nobody
    waits for the others. They are finished in their order, also if something fails in
    the middle: what is committed at last is the beginning of the source, which
    another import continues.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._flying: deque[tuple[Any, Transaction]] = deque()

    def before_reading(self, tid: bytes | None) -> None:
        """A transaction is about to be read."""
        if tid is not None and any(txn.ttid == tid for _, txn in self._flying):
            self.land()

    def before_voting(self, txn: Transaction) -> None:
        """Who waits for objects of others votes in vain before they are unlocked."""
        if any(not txn.oids.keys().isdisjoint(other.oids) for _, other in self._flying):
            txn.tried_early_vote = True

    @property
    def size(self) -> int:
        """How many may fly while the next one begins."""
        master = self._storage._core.master
        return FLYING if master is not None and offers(master, FEATURE_IMPORT) else 0

    def take_off(self, transaction: Any) -> None:
        """Ask to finish what was voted."""
        storage = self._storage
        txn = storage._transaction_of(transaction)
        if self._flying and not txn.follows(self._flying[-1][1]):
            self.land()
        with storage._runtime:
            txn.ask_finish(None)
            self._flying.append((transaction, txn))
        storage._remember_imported(txn, transaction.tid)

    def land(self, left: int = 0) -> None:
        """Wait for all but so many, for all if there is an error, which is raised."""
        errors = []
        while len(self._flying) > left:
            transaction, txn = self._flying.popleft()
            try:
                with self._storage._runtime:
                    txn.finished()
            except Exception as error:  # noqa: BLE001 raised below
                errors.append(error)
                left = 0  # the others have to end, too
            finally:
                self._storage._transactions.pop(id(transaction), None)
        if errors:
            raise errors[0]
