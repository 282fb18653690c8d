"""Disks of simulated storage nodes: what survives the death of a process, of a machine.

A node's database is in memory. An image of it is made only when it is needed: when the
node ends, and before what is not durable follows what is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from neo.lib.exception import BackendError
from neo.lib.util import u64
from neo.storage.database.memory import MemoryBackend
from neo.storage.database.sql import READABLE_TIDS

if TYPE_CHECKING:
    from .runtime import Simulation

KEPT = 0.25  # probability that a power loss can bring a given volatile commit back


class DiskBackend(MemoryBackend):
    """A database that tells its disk before it changes, and before it goes away."""

    def __init__(self, disk: Disk, image: bytes | None) -> None:
        self._disk = disk
        super().__init__(image, dedup=disk.dedup, observer=disk)

    def begin(self, durable: bool) -> None:
        self._disk.before_begin(durable)
        super().begin(durable)

    def close(self) -> None:
        self._disk.detach(self)
        super().close()


class Disk:
    """The database of one storage node, through the node's lives.

    fail: called before each commit, may raise OSError. uncertain: the next commit
    fails, as if its last fsync did: all or nothing of it is found later.
    """

    def __init__(self, sim: Simulation, dedup: bool = False) -> None:
        self.sim = sim
        self.dedup = dedup
        self.fail: Callable[[bool], object] | None = None
        self.uncertain = False
        self._backend: DiskBackend | None = None  # what is committed is there, if set
        self._latest: bytes | None = None
        # Since the last durable commit there were others, so this is the durable image.
        self._volatile = False
        self._durable: bytes | None = None
        self._candidate: bytes | None = None  # what a power loss may leave, too
        self._opened: tuple[bytes | None, sqlite3.Connection] | None = None

    def open(self) -> MemoryBackend:
        """The database, as the disk has it."""
        image = self.latest
        self.close()
        self.uncertain = False
        backend = DiskBackend(self, image)
        self._backend = backend
        self._volatile = False
        self._candidate = None
        return backend

    def close(self) -> None:
        """Nobody uses it any more: a node that died did not close it."""
        if self._backend is not None:
            self._backend.rollback()
            self._backend.close()

    def detach(self, backend: MemoryBackend) -> None:
        """The database is being closed."""
        if backend is self._backend:
            self._latest = backend.image()
            self._backend = None

    @property
    def latest(self) -> bytes | None:
        """Content after the death of the process."""
        if self._backend is None:
            return self._latest
        self._backend.rollback()  # its node died meanwhile, if there is something
        return self._backend.image()

    @property
    def durable(self) -> bytes | None:
        """Content after the death of the machine, of all possible ones the oldest."""
        return self._durable if self._volatile else self.latest

    # --- what the database does -------------------------------------------------------

    def before_begin(self, durable: bool) -> None:
        """Something is going to be written."""
        is_safe = durable and self.fail is None and not self.uncertain
        if self._backend is not None and not is_safe and not self._volatile:
            self._durable = self._backend.image()
            self._volatile = True

    def before_commit(self, durable: bool) -> None:
        """See CommitObserver."""
        if self.fail is not None:
            self.fail(durable)
        if self.uncertain and self.sim.rng("disk").random() < 0.5:
            raise OSError(5, "Input/output error")

    def after_commit(self, durable: bool) -> None:
        """See CommitObserver."""
        backend = self._backend
        if backend is None:  # it is being opened
            return
        if self.uncertain:
            self._candidate = backend.image()
            raise BackendError("commit failed: Input/output error")
        if durable:
            self._volatile = False
            self._candidate = None
        elif self.sim.rng("images").random() < KEPT:
            self._candidate = backend.image()

    # --- what happens to it -----------------------------------------------------------

    def power_loss(self) -> None:
        """Lose what is not durable, or not; nobody uses the database any more."""
        images = [self.durable, self.latest]
        if self._candidate is not None:
            images.append(self._candidate)
        self.put(images[self.sim.rng("disk").randrange(len(images))])

    def put(self, image: bytes | None) -> None:
        """Replace all that is there. None: by nothing."""
        self.close()
        self._latest = image
        self._volatile = False
        self._candidate = None

    def erase(self) -> None:
        """All is lost."""
        self.put(None)

    # --- a look at what is durable ----------------------------------------------------

    def select(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        """Rows that are there after the death of the machine, whatever happens."""
        backend = self._backend
        if backend is not None and not self._volatile:
            backend.rollback()
            return backend._connection.execute(sql, args).fetchall()
        image = self.durable
        if image is None:
            return []
        if self._opened is None or self._opened[0] is not image:
            if self._opened is not None:
                self._opened[1].close()
            self._opened = image, _connect(image)
        return self._opened[1].execute(sql, args).fetchall()

    def _setting(self, name: str) -> int | None:
        rows = self.select("SELECT value FROM config WHERE name=?", name)
        return int(rows[0][0]) if rows else None

    @property
    def nid(self) -> int | None:
        """Whose disk it is."""
        return self._setting("nid")

    @property
    def ptid(self) -> int | None:
        """Version of its partition table."""
        return self._setting("ptid")

    def readable(self) -> dict[tuple[int, int], None]:
        """Readable cells of its partition table: (partition, nid)."""
        rows = self.select("SELECT partition, nid, tid FROM pt ORDER BY partition, nid")
        return dict.fromkeys((p, nid) for p, nid, tid in rows if tid in READABLE_TIDS)

    def ttid_of(self, partition: int, tid: bytes) -> int | None:
        """Ttid of an acknowledged transaction, in the partition of its metadata.

        It may be only locked: then the next start finishes it.
        """
        done = "SELECT ttid FROM trans WHERE partition=? AND tid=?"
        locked = "SELECT ttid FROM ttrans WHERE tid=?"
        t = u64(tid)
        rows = self.select(done, partition, t) or self.select(locked, t)
        return rows[0][0] if rows else None

    def has_object(self, partition: int, oid: bytes, tid: bytes, ttid: int) -> bool:
        """Whether a version of an object is there, be it only voted."""
        row = "SELECT 1 FROM {} WHERE partition=? AND oid=? AND tid=?"
        return bool(
            self.select(row.format("obj"), partition, u64(oid), u64(tid))
            or self.select(row.format("tobj"), partition, u64(oid), ttid)
        )


def _connect(image: bytes) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    # As MemoryBackend does.
    connection.deserialize(image[:18] + b"\1\1" + image[20:])
    return connection
