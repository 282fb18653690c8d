"""What clients may ask while the cluster is RUNNING or STOPPING (behaviour 2.10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from neo.lib.connection import Connection, Reply
from neo.lib.handler import Refused
from neo.lib.protocol import AnswerLastTransaction, ErrorCode, Oid, Pack, Pong, Tid

from .phase import Identified

if TYPE_CHECKING:
    from .app import Master
    from .authority import Authority

READ_ONLY = "the client said that it only reads"


class ReadOnlyClient(Identified):
    """A client that only reads: what writes is refused, the connection kept."""

    def __init__(self, master: Master, authority: Authority) -> None:
        super().__init__(master)
        self.authority = authority

    def ping(self, conn: Connection) -> None:
        """A client that synchronises has all invalidations when it gets the answer."""
        if self.authority.holds():
            conn.answer(Pong)
        else:
            self.authority.when_sure(conn, lambda reply: reply.answer(Pong))

    def ask_last_transaction(self, conn: Connection) -> None:
        def answer(reply: Reply) -> None:
            reply.answer(AnswerLastTransaction, self.master.transactions.last_tid)

        if self.authority.holds():
            answer(conn.defer())
        else:
            self.authority.when_sure(conn, answer)

    def ask_pack_orders(self, conn: Connection, pack_id: Tid) -> None:
        self.master.packs.ask(conn, pack_id, first_approved=False)

    def wait_for_pack(self, conn: Connection, tid: Tid) -> None:
        self.master.packs.wait(conn, tid)

    def ask_begin_transaction(self, conn: Connection, tid: Tid | None) -> None:
        raise Refused(ErrorCode.READ_ONLY_ACCESS, READ_ONLY)

    def ask_new_oids(self, conn: Connection, count: int) -> None:
        raise Refused(ErrorCode.READ_ONLY_ACCESS, READ_ONLY)

    def failed_vote(self, conn: Connection, ttid: Tid, nids: Sequence[int]) -> None:
        raise Refused(ErrorCode.READ_ONLY_ACCESS, READ_ONLY)

    def ask_finish_transaction(
        self,
        conn: Connection,
        ttid: Tid,
        oids: Sequence[Oid],
        deleted: Sequence[int],
        checked: Sequence[int],
        pack: Pack | None,
    ) -> None:
        raise Refused(ErrorCode.READ_ONLY_ACCESS, READ_ONLY)

    def ask_final_tid(self, conn: Connection, ttid: Tid) -> None:
        raise Refused(ErrorCode.READ_ONLY_ACCESS, READ_ONLY)

    def abort_transaction(
        self, conn: Connection, ttid: Tid, nids: Sequence[int]
    ) -> None:
        raise Refused(ErrorCode.READ_ONLY_ACCESS, READ_ONLY)


class Client(ReadOnlyClient):
    """A client that reads and writes."""

    def ask_begin_transaction(self, conn: Connection, tid: Tid | None) -> None:
        self.master.transactions.begin(conn, tid)

    def ask_new_oids(self, conn: Connection, count: int) -> None:
        self.master.transactions.new_oids(conn, count)

    def failed_vote(self, conn: Connection, ttid: Tid, nids: Sequence[int]) -> None:
        self.master.transactions.failed_vote(conn, ttid, nids)

    def ask_finish_transaction(
        self,
        conn: Connection,
        ttid: Tid,
        oids: Sequence[Oid],
        deleted: Sequence[int],
        checked: Sequence[int],
        pack: Pack | None,
    ) -> None:
        self.master.transactions.finish(conn, ttid, oids, deleted, checked, pack)

    def ask_final_tid(self, conn: Connection, ttid: Tid) -> None:
        self.master.transactions.final_tid(conn, ttid)

    def abort_transaction(
        self, conn: Connection, ttid: Tid, nids: Sequence[int]
    ) -> None:
        self.master.transactions.abort(conn, ttid, nids)
