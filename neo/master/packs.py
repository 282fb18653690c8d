"""Pack orders: which are known, signed and completed (behaviour 8.1 and 8.2).

An order is carried by a transaction, whose tid is its id. It is approved at commit
unless an older one is not signed yet. Each storage works by itself and tells up to
which order its cells are packed; what all have completed is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from neo.lib.connection import Connection, Reply
from neo.lib.exception import ProtocolError
from neo.lib.node import Node
from neo.lib.protocol import (
    ZERO_TID,
    AnswerPackOrders,
    AskPackOrders,
    NotifyPackSigned,
    Pack,
    PackOrder,
    WaitedForPack,
)

if TYPE_CHECKING:
    from .app import Master


class PackOrders:
    """What the primary master knows of packs; reset at each recovery."""

    def __init__(self, master: Master) -> None:
        self.master = master
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self.orders: dict[bytes, PackOrder] = {}  # not completed, by id, ascending
        self.completed = ZERO_TID  # by all storages with readable cells
        self.completed_by_nid: dict[int, bytes] = {}
        self._waiting: list[tuple[bytes, Reply]] = []

    # --- orders -----------------------------------------------------------------------

    def approves(self) -> bool:
        """Would an order that is committed now be approved?"""
        return all(order[1] is not None for order in self.orders.values())

    def committed(self, tid: bytes, pack: Pack, approved: bool) -> None:
        """A transaction that carries an order is committed."""
        oids, time = pack
        # Whatever was signed meanwhile: storages were told this flag.
        self.orders[tid] = (tid, approved or None, oids is not None, oids, time)
        if approved:
            ids = self.master.transactions
            for _, conn in ids.ready.values():
                conn.notify(NotifyPackSigned, (tid,), ())
            for conn in ids.backups.values():
                conn.notify(NotifyPackSigned, (tid,), ())

    def add(self, orders: Sequence[PackOrder]) -> None:
        """Learn orders from a storage (verification)."""
        for order in orders:
            if order[0] > self.completed:
                self.orders[order[0]] = _clean(order)
        self.orders = dict(sorted(self.orders.items()))

    def signed(self) -> tuple[list[bytes], list[bytes]]:
        """Ids approved, ids rejected."""
        approved = [order[0] for order in self.orders.values() if order[1]]
        rejected = [order[0] for order in self.orders.values() if order[1] is False]
        return approved, rejected

    def approved_after(self, tid: bytes) -> bool:
        """Is an approved order later than this?"""
        return any(order[1] and order[0] > tid for order in self.orders.values())

    # --- progress ---------------------------------------------------------------------

    def completed_by(self, node: Node, pack_id: bytes) -> None:
        """NotifyPackCompleted."""
        assert node.nid is not None
        self.completed_by_nid[node.nid] = pack_id
        self.update()

    def storage_lost(self, node: Node) -> None:
        """It is no longer waited for."""
        if node.nid is not None:
            self.completed_by_nid.pop(node.nid, None)
        self.update()

    def update(self) -> None:
        """Forget what is completed, and say so to who waits."""
        readable = self.master.pt.readable_nids()
        told = [
            self.completed_by_nid[n] for n in readable if n in self.completed_by_nid
        ]
        if told and min(told) > self.completed:
            self.completed = min(told)
        for pack_id in [i for i in self.orders if i <= self.completed]:
            del self.orders[pack_id]
        waiting, self._waiting = self._waiting, []
        for pack_id, reply in waiting:
            if pack_id not in self.orders:
                reply.answer(WaitedForPack)
            elif not reply.closed:
                self._waiting.append((pack_id, reply))

    def wait(self, conn: Connection, pack_id: bytes) -> None:
        """WaitForPack: answered at once if the order is unknown or completed."""
        if pack_id in self.orders:
            self._waiting.append((pack_id, conn.defer()))
        else:
            conn.answer(WaitedForPack)

    # --- questions --------------------------------------------------------------------

    def ask(self, conn: Connection, pack_id: bytes, first_approved: bool) -> None:
        """AskPackOrders: all orders from this id on, or the first one approved."""
        reply = conn.defer()
        if pack_id > self.completed or not self.completed_by_nid:
            self._answer(reply, pack_id, first_approved, self.orders)
        else:
            _Research(self, reply, pack_id, first_approved).start()

    def _answer(
        self,
        reply: Reply,
        pack_id: bytes,
        first_approved: bool,
        known: dict[bytes, PackOrder],
    ) -> None:
        orders = [known[i] for i in sorted(known) if i >= pack_id]
        if first_approved:
            orders = [order for order in orders if order[1]][:1]
        reply.answer(AnswerPackOrders, orders)


class _Research:
    """Ask few storages, that cover all partitions, for orders that were forgotten."""

    def __init__(
        self, packs: PackOrders, reply: Reply, pack_id: bytes, first_approved: bool
    ) -> None:
        self.packs = packs
        self.reply = reply
        self.pack_id = pack_id
        self.first_approved = first_approved
        self.phase = packs.master.phase
        self.found = dict(packs.orders)
        self.left = dict.fromkeys(range(packs.master.pt.np))  # partitions
        self.asked = 0

    def start(self) -> None:
        """Ask who covers what is left; at the end, answer."""
        master = self.packs.master
        for partition in list(self.left):
            if partition not in self.left:
                continue
            for nid in master.pt.readable[partition]:
                node = master.nodes.by_nid(nid)
                if node is not None and node.connection is not None:
                    self._ask(node)
                    break
            else:
                del self.left[partition]  # nobody to ask
        if not self.asked:
            self.packs._answer(
                self.reply, self.pack_id, self.first_approved, self.found
            )

    def _goes_on(self) -> bool:
        return self.packs.master.phase is self.phase and not self.reply.closed

    def _ask(self, node: Node) -> None:
        assert node.nid is not None
        mine = {
            p: None for p in self.left if node.nid in self.packs.master.pt.readable[p]
        }
        for partition in mine:
            del self.left[partition]
        self.asked += 1

        def done(orders: Sequence[PackOrder]) -> None:
            self.asked -= 1
            for order in orders:
                self.found[order[0]] = _clean(order)
            if not self.asked and self._goes_on():
                self.start()

        def failed(code: int | None, text: str) -> None:
            self.asked -= 1
            if self._goes_on():
                self.left.update(mine)
                self.start()

        assert node.connection is not None
        node.connection.ask(AskPackOrders, self.pack_id).then(done, failed)


def _clean(order: PackOrder) -> PackOrder:
    """The order with its oids as an array: upstream storages send one bin."""
    pack_id, approved, partial, oids, time = order
    if isinstance(oids, bytes):
        if len(oids) % 8:
            raise ProtocolError("invalid oids in a pack order")
        oids = tuple(oids[i : i + 8] for i in range(0, len(oids), 8))
    return pack_id, approved, partial, oids, time
