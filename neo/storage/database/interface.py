"""What a storage node asks of its database: one interface, one contract suite.

A backend is synchronous, never starts a thread, and has two faces:

- the **reader** face (`Reader`) sees only what is committed. `Backend` has it itself,
  for the clients' short reads, on the event loop; `Backend.background` is a second one,
  for slices of long reads (iteration, replication, check), which another thread may
  use at the same time.
- the **writer** face is used by jobs of the `writer` queue only, hence by one thread at
  a time. A job is a whole SQL transaction: `begin(durable)`, writer methods,
  `commit()`. An exception in between means `rollback()`, and the end of the node: what
  is counted in memory (references to data, data ids) is not rolled back.

A read never changes anything, and leaves no cursor open. A slice takes a `limit` or a
`length` of rows, so everything that grows with the data can be done in bounded steps;
where it stopped is either returned (reads) or found again in the database (writes).

Oids, tids and ttids are 8 bytes, as on the wire; partitions, nids and ptids integers.
Ids of 2**63 and more are not found, or clipped where they are bounds; the node refuses
them before they reach the writer face.

Any method may raise `BackendError`; the node then stops, for it can't know what the
database holds. Source: storage-format.md, whose sections are cited below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from neo.lib.protocol import CellState
from neo.lib.util import Pieces

Oid = bytes
Tid = bytes

#: (checksum, data, compression) of an object, as stored and as on the wire (1.2)
Value = tuple[bytes, bytes, int]

#: (tid, next tid or None, compression, checksum, data, value_tid or None); compression
#: is None, checksum ZERO_HASH and data b"" for a revision without data (9.1)
Revision = tuple[Tid, Tid | None, int | None, bytes, bytes, Tid | None]
StreamedRevision = tuple[Tid, Tid | None, int | None, bytes, bytes | Pieces, Tid | None]


class PackOrder(NamedTuple):
    """A pack order, without its id (12.1)."""

    approved: bool | None  # None: not signed yet
    partial: bool
    oids: Sequence[Oid] | None  # None: a full pack
    pack_tid: Tid


class Metadata(NamedTuple):
    """What a vote says of its transaction (AskStoreTransaction)."""

    user: bytes
    description: bytes
    extension: bytes
    oids: Sequence[Oid]
    pack: tuple[Sequence[Oid] | None, Tid] | None = None  # (oids or None, pack tid)


#: what to load: oid, at, before; see `Reader.load`
Wanted = tuple[Oid, Tid | None, Tid | None]


class Transaction(NamedTuple):
    """A committed transaction, without its tid (1.3, 9.2)."""

    user: bytes
    description: bytes
    extension: bytes
    oids: Sequence[Oid]
    packed: bool
    ttid: Tid
    pack: PackOrder | None


class Store(NamedTuple):
    """An object of a transaction that is voted.

    `value` is the value itself, the data id that `spill()` returned for it, or None if
    there is no data. When `value_tid` is given (undo) and that revision exists, its
    data is used instead of `value` (6.2): `value` is the fallback.
    """

    oid: Oid
    value_tid: Tid | None
    value: Value | int | None


class OwnCell(NamedTuple):
    """A cell of this node (5)."""

    state: CellState
    tid: Tid | None  # OUT_OF_DATE: complete up to this tid; else None
    pack: Tid  # id of the last pack order completed, ZERO_TID if none


class Settings(NamedTuple):
    """Committed settings (4)."""

    name: str | None
    nid: int | None
    ptid: int | None
    replicas: int
    backup_tid: Tid | None
    truncate_tid: Tid | None


class MissingTransactions(NamedTuple):
    """How the transactions of a chunk differ between two replicas (14.2)."""

    missing: list[Tid]  # to be sent, ascending
    next_tid: Tid | None  # where the next chunk starts, None after the last one
    unknown: list[Tid]  # to be deleted by the requester


class MissingObjects(NamedTuple):
    """How the object records of a chunk differ between two replicas (14.3)."""

    missing: list[tuple[Tid, Oid]]  # to be sent, ascending
    next_tid: Tid | None  # where the next chunk starts, None after the last one
    next_oid: Oid | None
    unknown: dict[Tid, list[Oid]]  # to be deleted by the requester


class Reader(Protocol):
    """Reads of what is committed."""

    # --- objects ------------------------------------------------------------

    def load(
        self, oid: Oid, at: Tid | None = None, before: Tid | None = None
    ) -> Revision | None:
        """Read the revision made at `at`, the last one before `before`, or the last.

        None if there is none: `last_tid_of` then tells whether `oid` has any revision.
        One indexed read, whatever the length of the history. Source: 9.1.
        """

    def load_streamed(
        self, oid: Oid, at: Tid | None = None, before: Tid | None = None
    ) -> StreamedRevision | None:
        """As `load`; what is big is read later, but before anything else is done."""

    def load_many(self, wanted: Sequence[Wanted]) -> list[StreamedRevision | None]:
        """As `load_streamed` for each, if possible with fewer queries."""

    def spilled(self, data_id: int) -> Value:
        """The value that `Backend.spill` returned this id for, once committed."""

    def last_tid_of(self, oid: Oid) -> Tid | None:
        """Greatest tid of the revisions of `oid`, also deletions; None: no revision."""

    def last_tids_of(self, oids: Sequence[Oid]) -> dict[Oid, Tid | None]:
        """As `last_tid_of` for each; one query if `Backend.loads_together`."""

    def has_revision(self, oid: Oid, tid: Tid) -> bool:
        """Whether `oid` has a revision made at `tid`, with data or not."""

    def history(
        self, oid: Oid, first: int, last: int, max_tid: Tid | None = None
    ) -> list[tuple[Tid, int]]:
        """(tid, bytes as stored) by decreasing tid, offsets `first <= n < last`.

        Limited to revisions of `max_tid` at most, if given. Source: 9.3.
        """

    def undo_serials(
        self,
        undone_tid: Tid,
        ltid: Tid,
        oids: Iterable[Oid],
        written: Mapping[Oid, Tid],
    ) -> dict[Oid, tuple[Tid, Tid | None, bool]] | None:
        """How to undo `undone_tid`: oid -> (current tid, undo tid or None, is current).

        `written` has the oids that the undoing transaction already wrote: its value_tid
        if it has one, else the ttid. Oids without revision at `undone_tid` are omitted.
        None: the whole request fails with OID_NOT_FOUND. Source: 10.
        """

    def oids_from(
        self, partition: int, length: int, min_oid: Oid, tid: Tid
    ) -> tuple[list[Oid], Oid | None]:
        """Oids >= `min_oid` with data at `tid`, `length` oids being considered.

        With the `min_oid` that continues, None at the end. Source: 9.5.
        """

    def count_oids(
        self, partition: int, min_oid: Oid, length: int
    ) -> tuple[int, Oid | None]:
        """Count oids whose last revision has data: a slice of `length` oids.

        With the `min_oid` that continues, None at the end.
        """

    # --- transactions -------------------------------------------------------

    def transaction(self, tid: Tid) -> Transaction | None:
        """Metadata of a committed transaction, with its pack order. Source: 9.2."""

    def transactions(self, tids: Sequence[Tid]) -> list[Transaction | None]:
        """As `transaction` for each; one query if `Backend.loads_together`."""

    def tids(
        self,
        first: int,
        last: int,
        partitions: Iterable[int],
        max_tid: Tid | None = None,
    ) -> list[Tid]:
        """Decreasing tids over `partitions`, offsets `first <= n < last`.

        Limited to tids of `max_tid` at most, if given. Source: 9.4.
        """

    def tids_from(
        self, partition: int, min_tid: Tid, max_tid: Tid, length: int
    ) -> list[Tid]:
        """At most `length` increasing tids with `min_tid <= tid <= max_tid`."""

    def final_tid(self, ttid: Tid) -> Tid | None:
        """Tid of the committed transaction that began as `ttid`. Source: 9.6."""

    def locked_transactions(self) -> dict[Tid, Tid | None]:
        """Voted transactions: ttid -> tid if locked here, increasing. Source: 8.3."""

    def last_ids(self, partitions: Iterable[int]) -> tuple[Tid | None, Oid | None, Tid]:
        """(last tid, last oid, first tid) over `partitions`: the readable ones.

        The first tid is MAX_TID if there is none. Source: 11.
        """

    def last_tids_of_partition(self, partition: int) -> tuple[Tid | None, Tid | None]:
        """Greatest tid of (transactions, objects): where a backup resumes (14.4)."""

    # --- settings and partition table -----------------------------------------

    def settings(self) -> Settings: ...

    def partition_table(self) -> list[tuple[int, int, CellState]]:
        """(partition, nid, state) of all cells of the cluster, by partition and nid."""

    def own_cells(self) -> dict[int, OwnCell]:
        """Cells of this node, by increasing partition."""

    # --- packing --------------------------------------------------------------

    def pack_orders(
        self, min_id: Tid, partitions: Iterable[int]
    ) -> list[tuple[Tid, PackOrder]]:
        """Orders `id >= min_id` of `partitions`, by increasing id. Source: 12.7."""

    # --- replication and check ------------------------------------------------

    def fetch_transactions(
        self,
        partition: int,
        length: int,
        min_tid: Tid,
        max_tid: Tid,
        known: Iterable[Tid],
    ) -> MissingTransactions:
        """Compare the first `length` transactions of a range with a requester's tids.

        Those of `known` that lie beyond the chunk are in no list (19, item 27).

        A requester bounds the list that it sends. If it has more than that, the last
        one sent being K, the source sends all that it has after K and before
        `next_tid`: whatever else the requester has there, it must delete by itself.
        """

    def object_keys(
        self, partition: int, length: int, min_tid: Tid, max_tid: Tid, min_oid: Oid
    ) -> list[tuple[Tid, Oid]]:
        """First `length` keys >= (`min_tid`, `min_oid`), with tid <= `max_tid`."""

    def fetch_objects(
        self,
        partition: int,
        length: int,
        min_tid: Tid,
        max_tid: Tid,
        min_oid: Oid,
        known: Mapping[Tid, Sequence[Oid]],
    ) -> MissingObjects:
        """Likewise for object records, from (`min_tid`, `min_oid`) by (tid, oid).

        With the same duty for a requester that has more keys than it sent.
        """

    def check_tid_range(
        self, partition: int, length: int, min_tid: Tid, max_tid: Tid
    ) -> tuple[int, bytes, Tid]:
        """(count, digest, last tid) of the first `length` transactions. Source: 15."""

    def check_serial_range(
        self, partition: int, length: int, min_tid: Tid, max_tid: Tid, min_oid: Oid
    ) -> tuple[int, bytes, Tid, bytes, Oid]:
        """(count, digest of tids, last tid, digest of oids, last oid). Source: 15."""

    # --- size -------------------------------------------------------------------

    def size(self) -> int:
        """Bytes used by the database, free space inside of it not counted. Cheap."""


class Backend(Reader, Protocol):
    """One node's database. Opening it creates or migrates it; see `open_backend`."""

    dedup: bool  # whether equal values are stored once
    loads_together: bool  # a query costs more than what it reads
    has_cheap_commits: bool  # a commit that is not durable waits for no disk
    metadata_max: int | None  # bytes of user, description or extension; None: any
    device: int  # st_dev of what holds the data, 0 if unknown: for `devpath` (2.6)

    @property
    def background(self) -> Reader:
        """Another reader, for slices of long reads; another thread may use it."""

    # --- life of the database ---------------------------------------------------

    def close(self) -> None:
        """Release everything; what is committed becomes durable. Idempotent."""

    def erase(self) -> None:
        """Drop all tables and create empty ones, in one SQL transaction of its own.

        For `--reset`, and when the master says that this node is UNKNOWN.
        """

    def checkpoint(self) -> None:
        """Move committed pages to where they belong; may run beside all else.

        To be submitted to a queue of its own when `wants_checkpoint`.
        """

    @property
    def wants_checkpoint(self) -> bool:
        """Whether a checkpoint is worth its while: to be looked at after a commit."""

    # --- SQL transactions -------------------------------------------------------

    def begin(self, durable: bool) -> None:
        """Start an SQL transaction; what follows is a method of the writer face.

        `durable`: its commit promises something. Else it is only visible afterwards,
        and survives the death of the process but maybe not of the machine; a later
        durable commit makes it durable too.
        """

    def commit(self) -> None:
        """Make it visible to readers, and durable if `begin` was told so."""

    def rollback(self) -> None:
        """Forget it; only `close()` may follow. Never raises."""

    # --- settings and partition table -----------------------------------------

    def set_name(self, name: str) -> None: ...

    def set_nid(self, nid: int) -> None:
        """Set the node id; rows of `pt` of the former one become its own (17.1)."""

    def set_backup_tid(self, tid: Tid | None) -> None: ...

    def set_truncate_tid(self, tid: Tid) -> None:
        """Record that all after `tid` must go, and leave backup mode (16)."""

    def change_partition_table(
        self,
        ptid: int,
        replicas: int,
        cells: Iterable[tuple[int, int, CellState]],
        reset: bool = False,
        last_pack: Tid = bytes(8),
    ) -> None:
        """Record changes of (partition, nid, state), or the full table if `reset`.

        Rules of 5.1. `last_pack`: id of the last approved pack order that is known,
        for new own cells that are not readable. Unless `reset`, what unfinished
        transactions wrote to own cells that get DISCARDED or CORRUPTED is dropped
        (13.1). Rows of partitions that are not assigned any more are left for
        `drop_partition`.
        """

    def set_replicated(self, partition: int, tid: Tid) -> None:
        """Record that an OUT_OF_DATE own cell is complete up to `tid` (5.2).

        Nothing if the cell isn't OUT_OF_DATE.
        """

    def set_packed(self, partition: int, pack_id: Tid) -> None:
        """Record the last pack order that an own cell completed, or lower it (12.5)."""

    # --- transactions -----------------------------------------------------------

    def spill(self, oid: Oid, value: Value) -> int:
        """Write a value before the vote and return its data id, for `Store.value`.

        Values that are neither voted nor released when the node dies are removed when
        the database is opened again.
        """

    def release(self, data_ids: Iterable[int]) -> None:
        """Free spilled values that will not be voted."""

    def vote(
        self, ttid: Tid, stores: Sequence[Store], metadata: Metadata | None
    ) -> None:
        """Record a transaction, to be committed as durable before it is answered (8.1).

        `metadata` is given on the nodes that have a cell of the ttid's partition. The
        caller votes once per ttid. Stores of one oid appear once.
        """

    def lock(self, ttid: Tid, tid: Tid, pack: bool) -> None:
        """Record the final tid, if the metadata is here; durable before it is answered.

        `pack`: its pack order is approved.
        """

    def unlock(self, ttid: Tid, tid: Tid) -> None:
        """Move the transaction to the committed ones; it need not be durable (8.2).

        Whatever part of it exists: what was dropped with its cell is not missed, and
        records that replication brought meanwhile are replaced.
        """

    def validate(self, ttid: Tid, tid: Tid) -> None:
        """Lock and unlock a recovered transaction; `approved` stays (19, item 3)."""

    def abort(self, ttid: Tid) -> None:
        """Forget a transaction that was voted, with its pack order; or nothing."""

    def drop_unfinished(self) -> None:
        """Forget all voted and spilled data, and pack orders without transaction."""

    # --- packing --------------------------------------------------------------

    def sign_packs(
        self, approved: Iterable[Tid], rejected: Iterable[Tid]
    ) -> tuple[list[Tid], list[Tid]]:
        """Sign orders; return the (approved, rejected) ids that are not here (12.1)."""

    def pack_partition(
        self,
        partition: int,
        pack_tid: Tid,
        min_oid: Oid,
        length: int,
        oids: Sequence[Oid] | None = None,
    ) -> Oid | None:
        """Delete old revisions of a slice of `length` oids >= `min_oid` (12.3).

        Only of those listed, for a partial pack: any order, any partition. Returns the
        `min_oid` that continues, None at the end.
        """

    # --- replication ------------------------------------------------------------

    def add_transaction(self, tid: Tid, transaction: Transaction) -> None:
        """Add a replicated transaction, with its pack order; replace an equal tid."""

    def add_object(
        self,
        oid: Oid,
        tid: Tid,
        value: Value | None,
        value_tid: Tid | None,
    ) -> None:
        """Add a replicated record; replace one with the same key (19, items 4 and 23).

        If `value_tid` is given and that revision exists, its data is used instead of
        `value`.
        """

    def restore_value(self, oid: Oid, tid: Tid, value: Value) -> bool:
        """Replace the damaged value of a record, also for those that share it.

        False, and nothing is changed, if that must wait: an unfinished transaction
        shares it, too.
        """

    def delete_transaction(self, tid: Tid) -> None:
        """Delete a transaction that the source doesn't have, with its pack order."""

    def delete_object(self, oid: Oid, tid: Tid) -> None:
        """Delete a record that the source doesn't have, and its data if unused."""

    # --- removal, repair ----------------------------------------------------------

    def truncate(self, limit: int) -> bool:
        """Execute a part of the truncation that is recorded; True: call again.

        At most `limit` rows of each kind; the last call removes `truncate_tid` (16).
        """

    def drop_partition(self, partition: int, limit: int) -> bool:
        """Delete at most `limit` rows of an unassigned partition; True: call again."""

    def prune_orphans(
        self, min_id: int, limit: int, dry_run: bool
    ) -> tuple[int, int | None]:
        """Delete, or count, data rows that nothing refers to, among `limit` rows.

        From data id `min_id`; returns (orphans, `min_id` that continues or None). What
        running transactions wrote is no orphan. Source: 13.3.
        """


class CommitObserver(Protocol):
    """What the simulator hears of the commits of a `MemoryBackend`."""

    def before_commit(self, durable: bool) -> None:
        """May raise OSError (ENOSPC, EIO...): the commit fails."""

    def after_commit(self, durable: bool) -> None:
        """The commit succeeded: `image()` is what the disk may (or must) hold now."""
