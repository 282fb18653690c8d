"""The commit of one transaction, as seen by its client: vote and finish.

    first phase -> voting -> voted -> finishing -> ended
         \\______________\\________\\______________> ended (abort)

Source: behaviour.md 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from neo.lib.connection import Connection, Request
from neo.lib.node import nid_str
from neo.lib.protocol import (
    FEATURE_EARLY_VOTE,
    ZERO_TID,
    AbortTransaction,
    AskFinishTransaction,
    AskStoreTransaction,
    AskVoteTransaction,
    ErrorCode,
    FailedVote,
    Pack,
)

from . import outcome
from .answers import Answer
from .app import ClientApp
from .exception import NEOStorageError, NEOStorageTransientError
from .first_phase import FirstPhase
from .handlers import offers

# How a commit ends: the answer, whom to tell the tid, what that raised.
Finishing = tuple[Answer, Callable[[bytes], object] | None, list[Exception]]


class Transaction(FirstPhase):
    """A transaction in progress; `begin()` makes it. For one thread at a time."""

    def __init__(
        self, app: ClientApp, user: bytes, description: bytes, extension: bytes
    ) -> None:
        super().__init__(app)
        self.metadata = (user, description, extension)
        self._finishing: Finishing = Answer(), None, []
        self.voted = False
        self.tried_early_vote = False
        self._early: Answer | None = None  # to a vote that was sent with the stores
        self.pack: Pack | None = None

    # --- vote -------------------------------------------------------------------------

    def ask_vote(self) -> bool:
        """Send the vote behind the stores, whose answers nobody waited for.

        One round trip less, if all of the transaction is on one storage and that
        offers it (`FEATURE_EARLY_VOTE`): it refuses if a store waits or conflicts.
        False: not here. Else `vote_early` must follow.
        """
        if self.tried_early_vote:
            return self._early is not None
        self.tried_early_vote = True
        self.check_session()
        app = self.app
        partition = app.pt.partition_of(self.ttid)
        cells = app.pt.cells[partition]
        self._connect(cells)
        if len(self.conns) != 1 or self.failed or self.relocking or self._has_work():
            return False
        ((nid, conn),) = self.conns.items()
        if list(cells) != [nid] or not offers(conn, FEATURE_EARLY_VOTE):
            return False
        self.check_session()
        self._early = answer = Answer()
        self._ask_store_transaction(conn).then(answer.set, answer.fail)
        return True

    @property
    def is_vote_due(self) -> bool:
        """Whether `ask_vote` can succeed, as all is stored."""
        return not (self.tried_early_vote or self.pending or self._has_work())

    @property
    def is_voted_early(self) -> bool:
        """Whether the answer to `ask_vote` is here."""
        return self._early is not None and self._early.done

    def vote_early(self) -> bool:
        """Vote without waiting for the stores' answers; false if it must be done later.

        See `ask_vote`, which may have been called before.
        """
        answer = self._early
        if answer is None:
            if not self.pending or not self.ask_vote():
                return False
            answer = self._early
            assert answer is not None
        self._early = None
        ((nid, conn),) = self.conns.items()
        runtime = self.app.runtime
        runtime.wait(lambda: answer.done, (conn,))
        if answer.code is not None and answer.code != ErrorCode.INCOMPLETE_TRANSACTION:
            self._refused(nid, answer.code, answer.text)
        elif answer.lost:
            self.node_failed(nid)
        self.check_session()
        if answer.value is None:
            return False
        # It answers stores before the vote, and accepts it if all are granted. What is
        # left is an answer to NotifyDeadlock, which came too late to matter.
        runtime.wait(lambda: not (self.pending or self.relocking), (conn,))
        self.check_session()
        self.voting = True
        if self.failed:
            self._arbitrate()
        self.voted = True
        return True

    def _ask_store_transaction(self, conn: Connection) -> Request:
        return conn.ask(
            AskStoreTransaction, self.ttid, *self.metadata, list(self.oids), self.pack
        )

    def vote(self) -> None:
        """Ask all storages involved to vote; all stores are answered before.

        Source: behaviour.md 3.7.
        """
        assert not self.pending
        assert not self.relocking
        assert not self._has_work()
        self.check_session()
        app = self.app
        partition = app.pt.partition_of(self.ttid)
        cells = app.pt.cells[partition]
        self._connect(cells, waiting=False)
        self.voting = True
        awaiting: dict[int, None] = {}
        voted: dict[int, None] = {}

        def done(nid: int) -> None:
            awaiting.pop(nid, None)
            voted[nid] = None

        def failed(nid: int, code: int | None, text: str) -> None:
            awaiting.pop(nid, None)
            self.node_failed(nid)
            if code is not None and self.error is None and not self.ended:
                self._refused(nid, code, text)

        # Not those that were only going to have the metadata, before a tweak: they
        # know nothing of the transaction.
        involved = dict.fromkeys(cells)
        for nids in self.written.values():
            involved.update(nids)
        conns = {
            nid: conn
            for nid, conn in self.conns.items()
            if nid in involved and nid not in self.failed
        }
        awaiting.update(dict.fromkeys(conns))
        for nid, conn in conns.items():
            request = (
                self._ask_store_transaction(conn)
                if nid in cells
                else conn.ask(AskVoteTransaction, self.ttid)
            )
            request.then(partial(done, nid), partial(failed, nid))
        self._wait_votes(awaiting, voted, tuple(conns.values()))
        self.check_session()
        self.written.setdefault(partition, {}).update(dict.fromkeys(cells))
        if self.failed or self.blind:
            self._check_locks()
        if self.failed:
            self._arbitrate()
        self.check_session()
        self.voted = True

    def _wait_votes(
        self,
        awaiting: dict[int, None],
        voted: dict[int, None],
        conns: Sequence[Connection],
    ) -> None:
        wait = self.app.runtime.wait
        limit = self.app.options.vote_timeout
        while awaiting:
            left = len(awaiting)
            # A storage alone may take as long as it wants.
            if not wait(
                lambda n=left: len(awaiting) < n,  # type: ignore[misc]
                conns,
                limit if len(conns) > 1 else None,
            ) and (voted):
                for nid in awaiting:
                    self.app.log.warning(
                        "storage %s does not vote: failed for a transaction",
                        nid_str(nid),
                    )
                    self.node_failed(nid)
                return

    def _check_locks(self) -> None:
        """Some cell of each partition must have compared what it was given.

        Without failures too: a readable cell may be dropped while a store waits there.
        """
        for partition, nids in self.written.items():
            blind = self.blind.get(partition, ())
            if all(nid in self.failed or nid in blind for nid in nids):
                raise NEOStorageTransientError(
                    f"partition {partition} is not fully write-locked"
                )

    def _arbitrate(self) -> None:
        """May the transaction be finished without the nodes that failed?"""
        app = self.app
        running = app.nm.running()
        failed = [nid for nid in self.failed if nid in running]
        if failed:
            self._ask(FailedVote, self.ttid, failed)

    def _ask(self, packet: Any, *args: Any) -> Answer:
        """Ask the master of this transaction; an error is raised."""
        app = self.app
        app.usable_master()
        self.check_session()
        assert app.master is not None
        answer = app.ask(app.master, packet, *args)
        if answer.code == ErrorCode.INCOMPLETE_TRANSACTION and answer.text:
            raise NEOStorageTransientError(answer.text)
        if answer.code == ErrorCode.INCOMPLETE_TRANSACTION:
            raise NEOStorageTransientError(
                f"storages {', '.join(map(nid_str, self.failed))} failed, the cluster "
                "can't do without them: the transaction is aborted"
            )
        if answer.code is not None and not answer.lost:
            raise NEOStorageError(answer.text)
        return answer

    # --- finish -----------------------------------------------------------------------

    def finish(self, callback: Callable[[bytes], object] | None) -> bytes:
        """Commit; the tid. `callback(tid)` is called between cache and last tid."""
        self.ask_finish(callback)
        return self.finished()

    def follows(self, other: Transaction) -> bool:
        """Whether this one can't be committed without `other`, asked to finish before.

        What a storage has locked is committed, whatever happens: so each storage that
        may lock this one must have locked the other before, which it does in the order
        of the requests, if it has the metadata of both.
        """
        pt = self.app.pt
        holders = [
            sorted(nids)
            for txn in (self, other)
            for nids in (txn.conns, pt.cells[pt.partition_of(txn.ttid)])
        ]
        return (
            all(nids == holders[0] for nids in holders)
            and not (self.failed or other.failed)
            and self.session == other.session
        )

    def ask_finish(self, callback: Callable[[bytes], object] | None) -> None:
        """Ask the master to commit; `finished` must follow."""
        assert self.voted
        app = self.app
        errors: list[Exception] = []

        def finished(ttid: bytes, tid: bytes) -> None:
            self._committed(tid, callback, errors)
            answer.set(tid)

        answer = Answer()
        self._finishing = answer, callback, errors
        try:
            app.usable_master()
            self.check_session()
            master = app.master
            assert master is not None
            partition_of = app.pt.partition_of
            oids: list[bytes] = []
            deleted: list[int] = []
            checked: dict[int, None] = {}
            for oid, version in self.oids.items():
                if version.checked:
                    checked[partition_of(oid)] = None
                elif version.deleted:
                    deleted.append(partition_of(oid))
                else:
                    oids.append(oid)
            master.ask(
                AskFinishTransaction,
                self.ttid,
                oids,
                deleted,
                sorted(checked),
                self.pack,
            ).then(finished, answer.fail)
            if not self.restored:
                app.ahead.ask(master, Answer())
        except BaseException:
            self._end()
            raise

    def finished(self) -> bytes:
        """Wait for the end of the commit; the tid."""
        app = self.app
        answer, callback, errors = self._finishing
        try:
            connections = () if app.master is None else (app.master,)
            app.runtime.wait(lambda: answer.done, connections)
            if answer.code == ErrorCode.INCOMPLETE_TRANSACTION:
                raise NEOStorageTransientError(answer.text or "storages failed")
            if answer.code is not None:
                raise NEOStorageError(answer.text)
            if answer.value is not None:
                tid: bytes = answer.value[0]
            else:
                tid = outcome.find(app, self.ttid, answer.text)
                self._committed(tid, callback, errors)
        finally:
            self._end()
        app.turns.committed(tid, ((oid, v.serial) for oid, v in self.oids.items()))
        if errors:
            raise errors[0]
        return tid

    def _committed(
        self,
        tid: bytes,
        callback: Callable[[bytes], object] | None,
        errors: list[Exception],
    ) -> None:
        """Cache, then ZODB, then last tid. Source: behaviour.md 9.4, rule 2."""
        app = self.app
        app.turns.finished(tid)
        last_tid = app.last_tid or ZERO_TID
        changed = [oid for oid, version in self.oids.items() if not version.checked]
        app.reader.invalidate(tid, changed)
        if tid > last_tid:
            store = app.cache.store
            for oid in changed:
                data = self.oids[oid].data
                if data is not None:
                    store(oid, data, tid, None)
        if callback is not None:
            try:
                callback(tid)
            except Exception as error:  # noqa: BLE001 too late to undo the commit
                errors.append(error)
        app.last_tid = max(last_tid, tid)
        app.ahead.finished()

    # --- end --------------------------------------------------------------------------

    def abort(self) -> None:
        """Drop the transaction everywhere. Source: behaviour.md 3.8."""
        if self.ended:
            return
        app = self.app
        if self._ttid is None:
            answer = self._await_begun()
            if answer.value is None:
                self._end()
                return
            self._set_begun(answer)
        for conn in self.conns.values():
            conn.notify(AbortTransaction, self.ttid, [])
        if app.session == self.session and app.master is not None:
            app.abort(self.ttid, sorted({*self.conns, *self.failed}))
        self._end()

    def _end(self) -> None:
        self.ended = True
        if self._ttid is not None:
            self.app.transactions.pop(self._ttid, None)
        for conn in self.conns.values():
            self.app.watch(conn, False)
        self.pending.clear()
        self.conflicts.clear()


def begin(
    app: ClientApp,
    user: bytes,
    description: bytes,
    extension: bytes,
    tid: bytes | None = None,
) -> Transaction:
    """Begin a transaction."""
    txn = Transaction(app, user, description, extension)
    txn.begin(tid)
    return txn
