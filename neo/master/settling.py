"""Which version of the partition table nobody can miss (testing.md P7 and P16).

A cell that becomes readable may replace the others of its partition only once they know
it, else one of them, back alone, would find nobody missing. So the operation goes on
after a loss only if each partition has a storage that was readable in the last settled
table (`carried`), and is resumed only with such ones (`Master.carriers`).

When a storage is lost, its cells get out of date and commits go on without it. Whoever
starts the cluster later must not take its data for complete. A new primary waits for
all storages that are readable in the newest table it finds, so a table that just one of
them has is enough to be safe. But when the old primary's machine died with a storage of
its own, that wait would have no end. It may start with the others if

- they have all partitions, and those that are absent can't have them all;
- what was committed without them is known to be so: if the operation went on after the
  newest table that is found, then with a later one (*later*); nobody here has it.

The second point follows if a commit is acknowledged only when the present table is on
the disks of all readable storages: then those of *later* are all absent, but the absent
ones can't hold all partitions. That is what we wait for here, before commits and before
cells become readable. A table that is so is *settled*.

AskPackOrders serves as question: storages, neoppod's too, answer it at any time, after
having written what came before; of orders after the last possible tid there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING

from neo.lib.node import Node
from neo.lib.protocol import MAX_TID, AskPackOrders

if TYPE_CHECKING:
    from .app import Master


class Settling:
    """`owing`: since when (monotonic) nodes have not confirmed the present table.

    `readable` are the readable cells, by partition, of the last table that settled.
    """

    def __init__(self, master: Master, settled: Callable[[], object]) -> None:
        self.master = master
        self._settled = settled
        self.reset()

    def reset(self) -> None:
        """Forget all: the operation is over."""
        self.owing: dict[Node, float] = {}
        self._wanted: dict[Node, int] = {}  # questions without answer
        self.readable: Sequence[Sequence[int]] = ()

    def carried(self, running: Container[int]) -> bool:
        """Has each partition one of these storages that was readable in the last table
        that settled?
        """
        return all(any(nid in running for nid in nids) for nids in self.readable)

    def assume(self) -> None:
        """The present table is the first one, and nobody is asked."""
        self.readable = list(self.master.pt.readable)

    def table_changed(self) -> None:
        """The present table must settle, with those that it makes late, too."""
        master = self.master
        now = master.runtime.monotonic()
        running = master.nodes.running()
        settled = {nid for nids in self.readable for nid in nids}
        for nid in sorted(settled.union(master.pt.readable_nids())):
            node = running.get(nid)
            if node is not None and node.connection is not None:
                self.owing.setdefault(node, now)
                self._wanted[node] = self._wanted.get(node, 0) + 1
                self._ask(node)
        self._look()

    def _ask(self, node: Node) -> None:
        conn = node.connection

        def answered(orders: Sequence[object]) -> None:
            if self._wanted.get(node) and node.connection is conn:
                self._wanted[node] -= 1
                if not self._wanted[node]:
                    self.storage_lost(node)

        conn.ask(AskPackOrders, MAX_TID).then(answered)

    def storage_lost(self, node: Node) -> None:
        """Nothing is expected any more from a storage: it has confirmed, or is lost."""
        self._wanted.pop(node, None)
        if self.owing.pop(node, None) is not None:
            self._look()

    def _look(self) -> None:
        if not self.owing:
            self.readable = list(self.master.pt.readable)
            self._settled()
