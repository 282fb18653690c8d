"""Bugs to plant: each changes one function, as a patch of a few lines would.

A text that is not found any more means that the code has moved on: then adapt the bug.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

STORAGE = "neo.storage.transactions:Transactions"
MASTER = "neo.master.transactions:Transactions"
CLIENT = "neo.client.app:ClientApp"
COMMIT = "neo.client.transactions:Transaction"


@dataclass(frozen=True)
class Bug:
    """`old` becomes `new` in the source of a function, `module:[Class.]name`."""

    name: str
    place: str
    old: str
    new: str

    def _owner(self) -> tuple[Any, Any, str]:
        """Module, and the class or module that has the function, under a name."""
        path, _, qualname = self.place.partition(":")
        module = owner = import_module(path)
        *outer, name = qualname.split(".")
        for part in outer:
            owner = getattr(owner, part)
        return module, owner, name

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Live with the bug."""
        module, owner, name = self._owner()
        before = owner.__dict__[name]
        function = before.fget if isinstance(before, property) else before
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, f"{self.name}: {source.count(self.old)}"
        # Annotations are not evaluated, as in the module itself.
        code = "from __future__ import annotations\n" + source.replace(
            self.old, self.new
        )
        space: dict[str, Any] = {}
        exec(compile(code, f"<{self.name}>", "exec"), module.__dict__, space)
        places = [owner]
        if owner is module:  # others have imported it
            places = [
                other
                for key, other in sys.modules.items()
                if key.startswith("neo.") and getattr(other, name, None) is before
            ]
        for place in places:
            setattr(place, name, space[name])
        try:
            yield
        finally:
            for place in places:
                setattr(place, name, before)


BUGS = (
    # --- what is durable when ---
    Bug(
        "a vote is answered before it is durable",
        f"{STORAGE}.vote",
        "stores, recorded), voted)",
        "stores, recorded), voted, durable=False)",
    ),
    Bug(
        "a lock is answered before it is durable",
        f"{STORAGE}.lock",
        "tid, pack), locked)",
        "tid, pack), locked, durable=False)",
    ),
    Bug(
        "replicated cells are announced before they are durable",
        "neo.storage.replication:Session._chunk_done",
        "durable=True",
        "durable=False",
    ),
    Bug(
        "the change of the partition table is not durable",
        "neo.storage.initialization:MasterHandler.notify_partition_changes",
        "last_pack=last_pack\n        )\n",
        "last_pack=last_pack\n        ), durable=False\n",
    ),
    # --- ids ---
    Bug(
        "tids come from the clock only",
        "neo.master.tid:next_tid",
        "clock if clock > last else add_tid(last, 1)",
        "clock",
    ),
    Bug(
        "the last oid is not recovered",
        "neo.master.verification:Verifying.last_ids",
        "last_oid or ZERO_OID)\n    self.first",
        "ZERO_OID)\n    self.first",
    ),
    Bug(
        "the last tid is not recovered",
        "neo.master.verification:Verifying.last_ids",
        "max(self.last_tid, last_tid or ZERO_TID)",
        "self.last_tid",
    ),
    # --- the order of things ---
    Bug(
        "a commit waits for one lock only",
        f"{MASTER}._unlock",
        "queue[0].waiting or",
        "len(queue[0].waiting) > 1 or",
    ),
    Bug(
        "commits overtake each other",
        f"{MASTER}.locked",
        "not transaction.waiting and self.queue[0] is transaction",
        "not transaction.waiting and not (self.queue.remove(transaction) or "
        "self.queue.appendleft(transaction))",
    ),
    Bug(
        "write locks are released at the vote",
        f"{STORAGE}.vote",
        "    transaction.state = VOTED\n",
        "    transaction.state = VOTED\n"
        "    for oid in tuple(transaction.locks):\n"
        "        self._release(transaction, oid)\n"
        "    self._serve()\n",
    ),
    Bug(
        "what is locked can be read no earlier, but conflicts do not see it",
        "neo.storage.pending:Pending.last_tid_of",
        "if transaction.state == UNLOCKED:",
        "if False:",
    ),
    Bug(
        "transactions begin while a storage starts",
        f"{MASTER}._awaits_storages",
        "return bool(self.starting) and any(",
        "return False and any(",
    ),
    Bug(
        "storages involved are those of the present table only",
        f"{MASTER}._took_part",
        "and ready[n][0] <= begun",
        "",
    ),
    # --- conflicts ---
    Bug(
        "conflicts with committed revisions are not seen",
        f"{STORAGE}._decide",
        "if current is None or current == demand.serial:",
        "if True:",
    ),
    Bug(
        "a check that fails is taken for good",
        "neo.storage.locks:decide_held",
        "        return WAIT\n    if oid in transaction.blind",
        "        return WAIT if demand.kind != CHECK else GRANTED\n"
        "    if oid in transaction.blind",
    ),
    Bug(
        "nobody is told of a deadlock",
        f"{STORAGE}._notify_deadlock",
        "if holder.node is not None and",
        "if False and",
    ),
    # --- failures of storages ---
    Bug(
        "storages where writes failed are left aside for once",
        f"{MASTER}.finish",
        'master.expel(nid, f"writes of {ttid.hex()} failed there")',
        "del holders[nid]",
    ),
    Bug(
        "commits wait for no table on the disks",
        "neo.master.settling:Settling.table_changed",
        "if node is not None and",
        "if False and",
    ),
    # --- recovery and verification ---
    Bug(
        "the partition table is any storage's",
        "neo.master.recovery:Recovering.answered",
        "answer.ptid > self.best",
        "answer.ptid < self.best",
    ),
    Bug(
        "verification forgets who reported a transaction",
        "neo.master.verification:Verifying.locked",
        "self.reported.setdefault(ttid, {})[node] = None",
        "self.reported.setdefault(ttid, {node: None})",
    ),
    Bug(
        "verification drops what was locked",
        "neo.master.verification:Verifying._validate",
        "if tid is None:",
        "if True:",
    ),
    Bug(
        "verification does not ask where the transaction is gone",
        "neo.master.verification:Verifying._find_final_tids",
        "if tid is None):",
        "if False):",
    ),
    Bug(
        "unfinished data are kept",
        "neo.storage.database.sql:SQLBackend.drop_unfinished",
        "list(self._voted)",
        "()",
    ),
    # --- replication ---
    Bug(
        "replication waits for no open transaction",
        f"{MASTER}.unfinished",
        "self.last_tid, list(self.in_progress)",
        "self.last_tid, []",
    ),
    Bug(
        "replication stops one chunk early",
        "neo.storage.replication:Session._chunk_done",
        "if position is None:",
        "if True:",
    ),
    Bug(
        "transactions stay on storages that lost all of their cells",
        f"{STORAGE}.access_changed",
        "transaction.state <= VOTED and self._is_empty(transaction)",
        "False",
    ),
    # --- clients ---
    Bug(
        "the last tid comes before the invalidation of the cache",
        f"{CLIENT}.invalidate",
        "self.reader.invalidate(tid, oids)",
        "self.runtime.call_later(0.01, lambda: self.reader.invalidate(tid, oids))",
    ),
    Bug(
        "the cache is kept over a reconnection",
        f"{CLIENT}._synchronise",
        "self.cache.clear_current()",
        "pass",
    ),
    Bug(
        "loads in progress hear of no invalidation",
        "neo.client.reader:Reader.invalidate",
        "if oid in loads:",
        "if False:",
    ),
    Bug(
        "a lost answer to finish is taken for an abort",
        "neo.client.outcome:find",
        "    monotonic = app.runtime.monotonic\n",
        "    raise NEOStorageTransientError('lost')\n",
    ),
    Bug(
        "the master takes what it has forgotten for aborted",
        f"{MASTER}.final_tid",
        "None if ttid > self.greatest else MAX_TID",
        "None",
    ),
    Bug(
        "a commit is not told to the other clients",
        f"{MASTER}._invalidate",
        "if node is author:",
        "if True:",
    ),
)
