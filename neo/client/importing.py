"""The import of another storage: its transactions are copied, with their tids.

    stored -> voted -> being finished -> committed

Several transactions are in each of these states, always in the order of the source: so
syncs are shared, and nobody waits for the others. What fails takes all that follow it
along; those before it are committed. What is committed at last is the beginning of the
source, which another import continues.

Two of those that are not voted never store the same object: each of them can be voted,
for what one of them waits for is the end of transactions that are voted.
"""

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
# Those before, that are stored and wait for their vote; each has fewer objects and
# bytes than this.
BOARDING = 4
SMALL = 100
SMALL_SIZE = 256 << 10

Entry = tuple[Any, Transaction]  # ZODB's and ours


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
            flight.board(transaction)
            for r in transaction:
                flight.before_storing(r.oid, r.data_txn)
                storage.restore(
                    r.oid, r.tid, r.data, r.version, r.data_txn, transaction
                )
            flight.stored()
            flight.land(FLYING)
        flight.vote_all()
    except BaseException as error:
        flight.cancel()
        if isinstance(error, Exception):
            flight.land()
        else:
            # Interrupted: it matters more than what becomes of the last ones.
            with contextlib.suppress(POSException.POSError):
                flight.land()
        raise
    flight.land()


class Flight:
    """Imported transactions that are in progress, in their order."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._boarding: deque[Entry] = deque()  # the last one may be being stored
        self._flying: deque[Entry] = deque()  # being finished

    def board(self, transaction: Any) -> None:
        """A transaction was begun."""
        txn = self._storage._transaction_of(transaction)
        self._boarding.append((transaction, txn))

    def before_storing(self, oid: bytes, base: bytes | None) -> None:
        """An object of the last transaction is about to be stored; `base`: tid of the
        transaction that its data are read from, if they are not new.
        """
        if base is not None and any(
            txn.ttid == base for _, txn in (*self._flying, *self._boarding)
        ):
            self._vote(1)
            self.land()
        elif any(oid in txn.oids for _, txn in tuple(self._boarding)[:-1]):
            self._vote(1)

    def stored(self) -> None:
        """All of the last transaction was stored."""
        storage = self._storage
        transaction, txn = self._boarding[-1]
        storage._remember_imported(txn, transaction.tid)
        # Who waits for objects of others votes in vain before they are unlocked.
        waits = any(
            not txn.oids.keys().isdisjoint(other.oids) for _, other in self._flying
        )
        with storage._runtime:
            if not waits:
                txn.ask_vote()
            storage._core.runtime.look(tuple(txn.conns.values()))
            for _, other in self._boarding:
                if other.is_vote_due:
                    other.ask_vote()
        large = len(txn.oids) > SMALL or txn.pending_size > SMALL_SIZE
        if large or not self._overlapping:
            self.vote_all()
            self.land(0 if not self._overlapping else FLYING)
        else:
            while self._boarding and self._boarding[0][1].is_voted_early:
                self._vote(len(self._boarding) - 1)
            self._vote(BOARDING)

    @property
    def _overlapping(self) -> bool:
        """Whether the master allows that one begins before the last one is over."""
        master = self._storage._core.master
        return master is not None and offers(master, FEATURE_IMPORT)

    def vote_all(self) -> None:
        """Vote what was stored, and ask to finish it."""
        self._vote(0)

    def _vote(self, left: int) -> None:
        """Vote all but the last `left` transactions, and ask to finish them."""
        storage = self._storage
        while len(self._boarding) > left:
            transaction, txn = self._boarding[0]
            # In vain, if it was not possible when all was stored.
            txn.tried_early_vote = True
            storage.tpc_vote(transaction)
            if self._flying and not txn.follows(self._flying[-1][1]):
                self.land()
            with storage._runtime:
                txn.ask_finish(None)
            self._flying.append(self._boarding.popleft())

    def land(self, left: int = 0) -> None:
        """Wait for the end of all but so many that are being finished; for that of all
        if there is an error, which is raised.
        """
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

    def cancel(self) -> None:
        """Abort what nobody asked to finish, the last one first."""
        storage = self._storage
        if self._boarding:
            storage._imported.clear()  # conflicts will tell
        while self._boarding:
            storage.tpc_abort(self._boarding.pop()[0])
