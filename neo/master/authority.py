"""Is this master still the one that the storages follow?

A master that was paused or cut off doesn't know that it was replaced. It can commit
nothing any more, for the storages that would have to lock follow the other one. But a
client that synchronises with it would miss what was committed meanwhile, and it would
keep its clients from going elsewhere. So, as soon as there are other masters:

- A storage that answers a Ping follows us since we sent it, and for as long as it waits
  before it takes us for dead (`silence_limit`). Nobody else can operate as long as this
  is so for all the readable cells of one partition, for one of them would be needed.
- Without this proof, who synchronises waits for the next one.
- If it doesn't come, and a master that may have taken over is silent too, the operation
  is over here. If all other masters still follow us, a storage just hangs: that is
  waited for.

Source: testing.md 9 (rows 10 and 17), P3 and P6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING

from neo.lib.connection import Connection, Reply
from neo.lib.node import Node
from neo.lib.protocol import NodeType, Ping

if TYPE_CHECKING:
    from .app import Master

# Part of the silence limit during which an answer proves something: the storage's clock
# may be a bit faster than ours.
PROOF = 0.8
# After this part of it without proof, the operation is over.
PATIENCE = 1.5
# Who would wait longer for a proof comes again instead.
WAITING_MAX = 10_000


class Authority:
    """Of one operation; `start()` begins to watch, until `goes_on()` is false."""

    def __init__(
        self,
        master: Master,
        goes_on: Callable[[], bool],
        lost: Callable[[], object],
    ) -> None:
        self.master = master
        self.runtime = master.runtime
        self._goes_on = goes_on
        self._lost = lost
        limit = master.limits.silence_limit
        self._valid = PROOF * limit
        self._patience = PATIENCE * limit
        self._interval = min(master.limits.ping_after, limit / 4) / 2
        self._until = inf  # the proofs hold up to this time (monotonic)
        self._since = 0.0  # patience counts from here at the earliest
        self._due = 0.0
        # By the connection that gave it: when the question was sent.
        self._proofs: dict[Connection, float] = {}
        self._asked: dict[Connection, None] = {}
        self._waiting: list[tuple[Reply, Callable[[Reply], object]]] = []

    def start(self) -> None:
        """The operation begins: all follow us."""
        self._since = now = self.runtime.monotonic()
        for node in self._peers():
            self._proofs[node.connection] = now
        self._tick()

    def holds(self) -> bool:
        """Is it sure that nobody else commits?"""
        return self.runtime.monotonic() <= self._until

    def when_sure(self, conn: Connection, answer: Callable[[Reply], object]) -> None:
        """Answer the request being handled when `holds()` again; maybe never."""
        if len(self._waiting) < WAITING_MAX:
            self._waiting.append((conn.defer(), answer))
        else:
            conn.close("too many wait for a proof that this master is primary")

    def _others(self) -> list[Node]:
        master = self.master
        return [
            node
            for node in master.nodes.of_type(NodeType.MASTER)
            if node is not master.node
        ]

    def _peers(self) -> list[Node]:
        return self.master.nodes.identified(NodeType.STORAGE, NodeType.MASTER)

    # --- proofs -------------------------------------------------------------------

    def _tick(self) -> None:
        if not self._goes_on():
            return
        now = self.runtime.monotonic()
        if now > self._due + self._interval:
            self._since = now  # it was us who slept, nothing is known of the others
        self._due = now + self._interval
        self._proofs = {c: t for c, t in self._proofs.items() if not c.closed}
        self._update()
        if self._until != inf:
            for node in self._peers():
                self._ask(node.connection, now)
            if now > max(self._until - self._valid, self._since) + self._patience and (
                self._may_be_replaced(now)
            ):
                self._lost()
                return
        self.runtime.call_later(self._interval, self._tick)

    def _ask(self, conn: Connection, now: float) -> None:
        if conn in self._asked:
            return
        self._asked[conn] = None

        def answered() -> None:
            del self._asked[conn]
            self._proofs[conn] = now
            if self._goes_on() and not self.holds():
                self._update()

        def failed(code: int | None, text: str) -> None:
            del self._asked[conn]

        conn.ask(Ping).then(answered, failed)

    def _update(self) -> None:
        """Note until when the proofs hold."""
        if not self._others():
            self._until = inf
        else:
            sent = {}
            for node in self.master.nodes.identified(NodeType.STORAGE):
                if node.nid is not None:
                    sent[node.nid] = self._proofs.get(node.connection, -inf)
            # Who takes over knows the last table that settled.
            groups = dict.fromkeys(map(tuple, self._readable()))
            self._until = self._valid + max(
                min(sent.get(nid, -inf) for nid in nids) for nids in groups
            )
        if self._waiting and self.holds():
            waiting, self._waiting = self._waiting, []
            for reply, answer in waiting:
                if not reply.closed:
                    answer(reply)

    def _readable(self) -> Sequence[Sequence[int]]:
        master = self.master
        return master.transactions.settling.readable or master.pt.readable

    def _may_be_replaced(self, now: float) -> bool:
        """Is there a master that doesn't follow us for sure?"""
        return any(
            node.connection is None
            or self._proofs.get(node.connection, -inf) + self._patience < now
            for node in self._others()
        )
