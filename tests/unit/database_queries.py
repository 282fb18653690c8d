"""Each statement of a database, for the tests of how it is executed."""

from __future__ import annotations

from neo.lib.protocol import MAX_TID, ZERO_OID, ZERO_TID
from neo.lib.util import p64
from neo.storage.database.interface import Store
from neo.storage.database.sql import SQLBackend


def execute_all(db: SQLBackend, last: int) -> None:
    """Read and write in each way, in one transaction that is left open. The database
    has transactions that made revisions of oid 0: the first one has tid 100, the last
    one `last`.
    """
    o, tid = ZERO_OID, p64(last)
    db.load(o)
    db.load(o, at=o)
    db.load(o, before=MAX_TID)
    db.last_tid_of(o)
    db.has_revision(o, o)
    db.history(o, 0, 9)
    db.undo_serials(p64(100), MAX_TID, [o], {})
    db.oids_from(0, 9, o, MAX_TID)
    db.transaction(p64(100))
    db.tids(0, 9, [0])
    db.tids_from(0, o, MAX_TID, 9)
    db.final_tid(p64(100))
    db.last_ids([0])
    db.object_keys(0, 9, ZERO_TID, MAX_TID, o)
    db.begin(durable=False)
    db.pack_partition(0, p64(101), o, 9)
    db.pack_partition(0, p64(101), o, 9, [o])
    db.add_object(o, p64(200), None, tid)
    db.delete_object(o, p64(200))
    db.vote(p64(202), [Store(o, tid, None)], None)
    db.lock(p64(202), p64(203), False)
    db.unlock(p64(202), p64(203))
    db.prune_orphans(0, 9, False)
    db.set_truncate_tid(p64(110))
    db.truncate(9)
