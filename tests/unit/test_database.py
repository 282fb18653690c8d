"""The contract of database backends, run on each of them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from neo.lib.exception import BackendError
from neo.lib.protocol import INVALID_TID, MAX_TID, ZERO_HASH, ZERO_OID, ZERO_TID
from neo.lib.protocol import CellState as C
from neo.lib.util import p64, u64
from neo.storage.database import open_backend
from neo.storage.database.interface import (
    Backend,
    Metadata,
    OwnCell,
    PackOrder,
    Settings,
    Store,
    Transaction,
    Value,
    Wanted,
)
from neo.storage.database.memory import MemoryBackend
from neo.storage.database.reader import decode_config
from neo.storage.database.sqlite import SQLiteBackend
from tests import mariadb

NP = 4  # partitions
NID = 7
HUGE = p64(1 << 63)


class Life:
    """A database that can be opened again, after a crash or not."""

    def __init__(
        self, kind: str, path: Path, server: mariadb.Server | None = None
    ) -> None:
        self.kind = kind
        self.server = server  # of MariaDB
        self.path = path
        self.copies = 0
        self.options: dict[str, Any] = {}
        self.opened: list[Backend] = []
        self.databases: list[str] = []  # of the server

    def open(self, source: Any = None, **options: Any) -> Backend:
        """Open a new database, or an `image()`."""
        self.options = options
        backend: Backend
        if self.kind == "memory":
            backend = MemoryBackend(source, **options)
        elif self.server is not None:
            name = self.server.new_database()
            self.databases.append(name)
            self.server.restore(name, source or {})
            adapter, engine = mariadb.ADAPTERS[self.kind]
            url = self.server.url(name)
            backend = open_backend(adapter, url, engine=engine, **options)
        else:
            self.copies += 1
            path = self.path / f"{self.copies}.sqlite"
            for suffix, content in (source or {}).items():
                Path(f"{path}{suffix}").write_bytes(content)
            backend = SQLiteBackend(f"file:{path}{self.query}", **options)
        self.opened.append(backend)
        return backend

    @property
    def query(self) -> str:
        return "?journal_mode=delete" if self.kind == "journal" else ""

    def image(self, db: Backend) -> Any:
        """What the process leaves if it dies now."""
        if isinstance(db, MemoryBackend):
            return db.image()
        if self.server is not None:
            return self.server.image(db._server.name)
        path = db._location.path
        return {
            suffix: Path(path + suffix).read_bytes()
            for suffix in ("", "-wal", "-journal")
            if Path(path + suffix).exists()
        }

    def crash(self, db: Backend) -> Backend:
        image = self.image(db)
        db.close()
        return self.open(image, **self.options)

    def close(self) -> None:
        for db in self.opened:
            db.rollback()
            db.close()
        for name in self.databases:
            self.server.execute(f"DROP DATABASE {name}")


@pytest.fixture(params=["file", "journal", "memory", *mariadb.ADAPTERS])
def life(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Life]:
    server = None
    if request.param in mariadb.ADAPTERS:
        mariadb.require(request.param)
        server = request.getfixturevalue("mariadb")
    life = Life(request.param, tmp_path, server)
    yield life
    life.close()


@pytest.fixture
def db(life: Life) -> Backend:
    return new(life)


def new(life: Life, **options: Any) -> Backend:
    db = life.open(**options)
    start(db)
    return db


def start(db: Backend) -> None:
    db.begin(durable=True)
    db.set_name("test")
    db.set_nid(NID)
    cells = [(partition, NID, C.UP_TO_DATE) for partition in range(NP)]
    db.change_partition_table(1, 0, cells, reset=True)
    db.commit()


def write(db: Backend, *calls: tuple[Any, ...], durable: bool = False) -> Any:
    """Call writer methods `(name, *args)` in one SQL transaction; the last result."""
    db.begin(durable)
    for name, *args in calls:
        result = getattr(db, name)(*args)
    db.commit()
    return result


def val(text: str, compression: int = 0) -> Value:
    data = text.encode()
    return sha1(data).digest(), data, compression


def meta(*oids: int, pack: Any = None) -> Metadata:
    return Metadata(b"user", b"description", b"ext", [p64(o) for o in oids], pack)


def store(oid: int, value: Any, value_tid: int | None = None) -> Store:
    if isinstance(value, str):
        value = val(value)
    return Store(p64(oid), None if value_tid is None else p64(value_tid), value)


def add(
    db: Backend, tid: int, objects: dict[int, str | None], pack: Any = None
) -> None:
    """Commit a transaction, whose ttid is tid - NP."""
    t, ttid = p64(tid), p64(tid - NP)
    stores = [store(oid, value) for oid, value in objects.items()]
    write(
        db,
        ("vote", ttid, stores, meta(*objects, pack=pack)),
        ("lock", ttid, t, bool(pack)),
        ("unlock", ttid, t),
    )


def rows(db: Backend, sql: str) -> list[tuple[Any, ...]]:
    return db._query(sql)


def config(db: Backend) -> dict[str, str]:
    return decode_config(rows(db, "SELECT name, value FROM config"))


def data_rows(db: Backend) -> list[bytes]:
    return sorted(value for (value,) in rows(db, "SELECT value FROM data"))


def load(db: Backend, oid: int, **bound: int) -> Any:
    """(tid, data) of a revision."""
    revision = db.load(p64(oid), **{key: p64(tid) for key, tid in bound.items()})
    return revision and (u64(revision[0]), revision[4])


# --- opening, settings ----------------------------------------------------------


def test_new_database(life: Life) -> None:
    db = life.open()
    assert db.settings() == Settings(None, None, None, 0, None, None)
    assert config(db) == {"version": "4"}
    assert db.partition_table() == []
    assert db.own_cells() == {}
    assert db.last_ids([]) == (None, None, MAX_TID)
    assert db.load(ZERO_OID) is None
    assert not db.dedup
    # RocksDB does not count what it has in memory only.
    assert db.size() > 0 or life.kind == "RocksDB"
    again = life.crash(db)
    assert again.settings() == Settings(None, None, None, 0, None, None)


def test_settings(life: Life, db: Backend) -> None:
    write(db, ("set_backup_tid", p64(255)))
    assert db.settings() == Settings("test", NID, 1, 0, p64(255), None)
    db = life.crash(db)
    assert db.settings() == Settings("test", NID, 1, 0, p64(255), None)
    assert config(db)["backup_tid"] == "00000000000000ff"
    write(db, ("set_truncate_tid", p64(254)))
    assert db.settings() == Settings("test", NID, 1, 0, None, p64(254))
    write(db, ("set_backup_tid", p64(1)), ("set_backup_tid", None))
    assert db.settings().backup_tid is None


@pytest.mark.parametrize("replicas", [None, "None"])
def test_replicas_that_neoppod_did_not_store(db: Backend, replicas: Any) -> None:
    write(db, ("set_config", "replicas", replicas))
    assert db.settings().replicas == 0


def test_erase(life: Life) -> None:
    db = new(life, dedup=True)
    add(db, 100, {1: "a"})
    write(db, ("vote", p64(200), [store(2, "b")], meta(2)))
    write(db, ("spill", p64(3), val("c")))
    db.erase()
    assert db.settings() == Settings(None, None, None, 0, None, None)
    assert data_rows(db) == []
    assert db.locked_transactions() == {}
    assert db.dedup
    start(db)
    add(db, 100, {1: "a"})
    assert load(db, 1) == (100, b"a")
    db = life.crash(db)
    assert load(db, 1) == (100, b"a")
    reset = life.open(life.image(db), reset=True)
    assert reset.settings() == Settings(None, None, None, 0, None, None)
    assert not reset.dedup


# --- partition table ------------------------------------------------------------


def test_partition_table(life: Life, db: Backend) -> None:
    cells = [
        (0, 1, C.UP_TO_DATE),
        (0, NID, C.OUT_OF_DATE),
        (1, 1, C.OUT_OF_DATE),
        (1, NID, C.FEEDING),
        (2, NID, C.CORRUPTED),
    ]
    pack = p64(5)
    write(db, ("change_partition_table", 9, 2, cells, True, pack))
    for _ in range(2):
        assert db.partition_table() == cells
        assert db.settings()[2:4] == (9, 2)
        assert db.own_cells() == {
            0: OwnCell(C.OUT_OF_DATE, ZERO_TID, ZERO_TID),
            1: OwnCell(C.FEEDING, None, ZERO_TID),
            2: OwnCell(C.CORRUPTED, None, ZERO_TID),
        }
        db = life.crash(db)
    changes = [(0, NID, C.DISCARDED), (3, NID, C.OUT_OF_DATE), (4, 1, C.FEEDING)]
    write(db, ("change_partition_table", 10, 2, changes, False, pack))
    assert db.partition_table() == [*cells[:1], *cells[2:], *changes[1:]]
    assert db.own_cells()[3] == OwnCell(C.OUT_OF_DATE, ZERO_TID, pack)
    assert rows(db, "SELECT pack FROM pt WHERE nid = 1") == [(None,)] * 3


@pytest.mark.parametrize(
    ("before", "backup_tid", "progress"),
    [
        (C.UP_TO_DATE, None, 111),  # the greatest tid of the partition
        (C.FEEDING, None, 111),
        (C.UP_TO_DATE, 77, 77),
        (C.FEEDING, 0, 0),
        (C.CORRUPTED, None, 0),
        (C.CORRUPTED, 77, 0),
        (C.OUT_OF_DATE, 77, 0),
    ],
)
def test_progress_of_a_cell_that_gets_out_of_date(
    db: Backend, before: C, backup_tid: int | None, progress: int
) -> None:
    write(db, ("change_partition_table", 2, 0, [(3, NID, before)]))
    add(db, 107, {3: "a"})
    add(db, 111, {7: "a"})
    add(db, 116, {0: "another partition"})
    if backup_tid is not None:
        write(db, ("set_backup_tid", p64(backup_tid)))
    write(db, ("change_partition_table", 3, 0, [(3, NID, C.OUT_OF_DATE)]))
    assert db.own_cells()[3].tid == p64(progress)
    write(db, ("set_replicated", 3, p64(200)), ("set_packed", 3, p64(9)))
    assert db.own_cells()[3] == OwnCell(C.OUT_OF_DATE, p64(200), p64(9))
    # An incremental change, then a full table, keep it.
    for reset in (False, True):
        cells = [(p, NID, C.OUT_OF_DATE) for p in range(NP)]
        write(db, ("change_partition_table", 4, 0, cells, reset))
        assert db.own_cells()[3] == OwnCell(C.OUT_OF_DATE, p64(200), p64(9))
    write(db, ("change_partition_table", 5, 0, [(3, NID, C.UP_TO_DATE)]))
    write(db, ("set_replicated", 3, p64(300)))
    assert db.own_cells()[3] == OwnCell(C.UP_TO_DATE, None, p64(9))


def test_clone_takes_over_the_cells(db: Backend) -> None:
    cells = [(0, 1, C.UP_TO_DATE), (1, NID, C.OUT_OF_DATE), (2, NID, C.UP_TO_DATE)]
    write(db, ("change_partition_table", 2, 1, [*cells, (1, 9, C.FEEDING)], True))
    write(db, ("set_replicated", 1, p64(50)), ("set_packed", 2, p64(6)))
    write(db, ("set_nid", 9))
    assert db.settings().nid == 9
    assert db.own_cells() == {
        1: OwnCell(C.OUT_OF_DATE, p64(50), ZERO_TID),
        2: OwnCell(C.UP_TO_DATE, None, p64(6)),
    }
    assert [nid for _, nid, _ in db.partition_table()] == [1, 9, 9]


def test_discarded_cell_loses_unfinished_data(life: Life, db: Backend) -> None:
    add(db, 100, {1: "committed"})
    ttid = p64(104)
    stores = [store(1, "a"), store(2, "b"), store(5, None)]
    order = ([p64(1)], p64(50))
    write(db, ("vote", ttid, stores, meta(1, 2, 5)))
    write(db, ("vote", p64(105), [], meta(pack=order)))
    write(db, ("lock", ttid, p64(108), False))
    write(db, ("change_partition_table", 2, 0, [(1, NID, C.DISCARDED)]))
    assert data_rows(db) == [b"b", b"committed"]
    assert rows(db, "SELECT * FROM pack") == []
    write(db, ("unlock", ttid, p64(108)))
    assert load(db, 2) == (108, b"b")
    assert db.transaction(p64(108)) is not None
    assert load(db, 1) == (100, b"committed")
    write(db, ("abort", p64(105)))
    assert life.crash(db).locked_transactions() == {}


# --- objects --------------------------------------------------------------------


def test_load(db: Backend) -> None:
    add(db, 100, {1: "a"})
    add(db, 104, {1: None})
    add(db, 108, {1: "", 2: "b"})
    empty = sha1(b"").digest()
    oid = p64(1)
    first = (p64(100), p64(104), 0, sha1(b"a").digest(), b"a", None)
    second = (p64(104), p64(108), None, ZERO_HASH, b"", None)
    third = (p64(108), None, 0, empty, b"", None)
    for reader in db, db.background:
        assert reader.load(oid) == third
        assert reader.load(oid, before=p64(109)) == third
        assert reader.load(oid, before=MAX_TID) == third
        assert reader.load(oid, before=INVALID_TID) == third
        assert reader.load(oid, before=p64(108)) == second
        assert reader.load(oid, at=p64(104)) == second
        assert reader.load(oid, before=p64(104)) == first
        assert reader.load(oid, at=p64(100)) == first
        assert reader.load(oid, before=p64(100)) is None
        assert reader.load(oid, at=p64(101)) is None
        assert reader.last_tid_of(oid) == p64(108)
        assert reader.last_tid_of(p64(5)) is None
        assert reader.has_revision(oid, p64(104))
        assert not reader.has_revision(oid, p64(105))
        history = [(p64(108), 0), (p64(104), 0), (p64(100), 1)]
        assert reader.history(oid, 0, 9) == history
        assert reader.history(oid, 1, 2) == history[1:2]
        assert reader.history(oid, 0, 9, p64(107)) == history[1:]
        assert reader.count_oids(1, ZERO_OID, 5) == (1, None)


def test_load_many(db: Backend) -> None:
    """As one after the other."""
    for tid in range(100, 160, 4):
        add(db, tid, {n: f"{n} {tid}" for n in range(1, 40, tid % 7 + 1)})
    add(db, 200, {1: None, 3: None})
    wanted: list[Wanted] = [
        (p64(oid), None, before)
        for before in (None, p64(120), p64(0), p64(200), MAX_TID, INVALID_TID)
        for oid in range(45)
    ]
    for before in None, p64(120):
        wanted += [(p64(oid), p64(104), before) for oid in range(45)]
    wanted += [(HUGE, None, None), (HUGE, None, p64(1)), (p64(1), HUGE, None)]
    for reader in db, db.background:
        for some in (
            *(wanted, wanted[::-1], wanted[:45], wanted[45:90], wanted[::9], []),
            *(wanted[:1], wanted[90:135], wanted[270:315], wanted[270:300:3]),
            *(wanted[300:345], wanted[325:350]),
        ):
            expected = [reader.load(*one) for one in some]
            assert reader.load_many(some) == expected
    assert sum(one is not None for one in db.load_many(wanted)) > 100
    tids = [p64(tid) for tid in (*range(90, 170), 200)]
    for some in tids, tids[::-1], [HUGE, *tids[10:12]], []:
        assert db.transactions(some) == [db.transaction(tid) for tid in some]
    assert sum(one is not None for one in db.transactions(tids)) == 16
    oids = [p64(oid) for oid in range(45)]
    for some in oids, [*oids, HUGE, oids[1]], oids[:1], [HUGE], []:
        expected = {oid: db.last_tid_of(oid) for oid in some}
        assert db.last_tids_of(some) == expected


@pytest.mark.parametrize("huge", [HUGE, INVALID_TID])
def test_ids_that_a_column_can_not_hold(db: Backend, huge: bytes) -> None:
    add(db, 100, {1: "a", 2: "b"})
    oid = p64(1)
    assert db.load(huge) is None
    assert db.load(oid, at=huge) is None
    assert db.load(oid, before=huge) is not None
    assert db.last_tid_of(huge) is None
    assert not db.has_revision(huge, p64(100))
    assert not db.has_revision(oid, huge)
    assert db.history(huge, 0, 1) == []
    assert len(db.history(oid, 0, 1, huge)) == 1
    assert db.transaction(huge) is None
    assert db.final_tid(huge) is None
    assert db.undo_serials(huge, huge, [oid], {}) == {}
    assert db.undo_serials(p64(100), huge, [huge, oid], {}) == {
        oid: (p64(100), None, True)
    }
    assert db.tids(0, 9, [0], huge) == [p64(100)]
    assert db.tids_from(0, ZERO_TID, huge, 9) == [p64(100)]
    assert db.tids_from(0, huge, huge, 9) == []
    assert db.oids_from(1, 9, huge, huge) == ([], None)
    assert db.oids_from(1, 9, ZERO_OID, huge) == ([oid], None)
    assert db.pack_orders(huge, range(NP)) == []
    assert db.object_keys(1, 9, ZERO_TID, huge, huge) == [(p64(100), oid)]
    assert db.object_keys(1, 9, huge, huge, huge) == []
    assert db.check_tid_range(0, 9, huge, huge) == (0, ZERO_HASH, ZERO_TID)
    assert db.check_serial_range(0, 9, huge, huge, huge)[0] == 0
    assert db.fetch_transactions(0, 9, ZERO_TID, huge, [huge]).unknown == [huge]
    assert db.fetch_objects(0, 9, huge, huge, huge, {huge: [huge]}).unknown == {
        huge: [huge]
    }


def test_read_holds_nothing(db: Backend) -> None:
    """No cursor stays open: it would keep the log from being restarted."""
    add(db, 100, {1: "a"})
    add(db, 104, {1: "b"})
    for reader in db, db.background:
        reader.load(p64(1), before=p64(104))
        reader.history(p64(1), 0, 1)
        reader.tids(0, 1, range(NP))
    if isinstance(db, SQLiteBackend) and db._log_index is not None:
        sql = "PRAGMA wal_checkpoint(TRUNCATE)"
        assert db._connection.execute(sql).fetchone()[0] == 0


@pytest.mark.parametrize(
    "how",
    ["DELETE FROM data", "UPDATE data SET value = 'text'", "UPDATE data SET hash = 1"],
)
@pytest.mark.parametrize("dedup", [False, True])
def test_missing_data_is_damage_not_a_deletion(
    life: Life, how: str, dedup: bool
) -> None:
    """Nobody takes it for good; it can be restored, for all that share it."""
    db = new(life, dedup=dedup)
    add(db, 100, {1: "a"})
    write(db, ("add_object", p64(1), p64(104), None, p64(100)))
    good = db.load(p64(1), at=p64(100)), db.load(p64(1), at=p64(104))
    write(db, ("execute", how))
    for tid in (100, 104):
        damaged = db.load(p64(1), at=p64(tid))
        assert damaged is not None
        assert damaged[2] is not None  # there is a value
        assert sha1(damaged[4]).digest() != damaged[3] != ZERO_HASH
    assert good[1] is not None
    _, _, compression, checksum, data, _ = good[1]
    assert compression is not None
    value = checksum, data, compression
    write(db, ("restore_value", p64(1), p64(104), value))
    assert (db.load(p64(1), at=p64(100)), db.load(p64(1), at=p64(104))) == good
    write(db, ("restore_value", p64(5), p64(104), value))  # not here: nothing to do
    db.begin(True)
    assert db.prune_orphans(0, 9, True)[0] == 0
    db.commit()


def test_data_that_is_lost_is_not_replaced(life: Life) -> None:
    """What refers to it must not get the next value that is stored."""
    db = new(life)
    add(db, 100, {1: "a", 5: "b"})
    write(db, ("execute", "DELETE FROM data"))
    db = life.crash(db)
    add(db, 104, {9: "c"})
    for n in (1, 5):
        damaged = db.load(p64(n))
        assert damaged is not None
        assert sha1(damaged[4]).digest() != damaged[3]


def test_oids_from(db: Backend) -> None:
    add(db, 100, {1: "a", 5: "b", 9: "c", 2: "other"})
    add(db, 104, {5: None, 13: "d"})
    add(db, 108, {1: "e"})
    assert db.oids_from(1, 2, ZERO_OID, p64(108)) == ([p64(1)], p64(9))
    assert db.oids_from(1, 2, p64(9), p64(108)) == ([p64(9), p64(13)], p64(17))
    assert db.oids_from(1, 2, p64(17), p64(108)) == ([], None)
    assert db.oids_from(1, 4, p64(2), p64(103)) == ([p64(5), p64(9)], None)
    assert db.count_oids(1, ZERO_OID, 9) == (3, None)


# --- transactions ---------------------------------------------------------------


def test_life_of_a_transaction(life: Life, db: Backend) -> None:
    ttid, tid = p64(100), p64(104)
    stores = [store(1, "a"), store(2, val("b", 1)), store(3, None)]
    write(db, ("vote", ttid, stores, meta(1, 2, 3, 4)), durable=True)
    db = life.crash(db)
    assert db.locked_transactions() == {ttid: None}
    assert db.load(p64(1)) is None
    assert db.transaction(tid) is None
    assert db.final_tid(ttid) is None
    assert db.last_ids(range(NP)) == (None, None, MAX_TID)
    write(db, ("lock", ttid, tid, False), durable=True)
    db = life.crash(db)
    assert db.locked_transactions() == {ttid: tid}
    assert db.load(p64(1)) is None
    write(db, ("unlock", ttid, tid))
    for _ in range(2):
        assert db.locked_transactions() == {}
        assert db.final_tid(ttid) == tid
        assert db.load(p64(2)) == (tid, None, 1, *val("b")[:2], None)
        assert load(db, 3) == (104, b"")
        oids = [p64(oid) for oid in range(1, 5)]
        assert db.transaction(tid) == Transaction(
            b"user", b"description", b"ext", oids, False, ttid, None
        )
        assert db.last_ids(range(NP)) == (tid, p64(3), tid)
        assert db.last_ids([1, 2]) == (tid, p64(2), MAX_TID)
        assert db.last_ids([]) == (None, None, MAX_TID)
        assert db.last_tids_of_partition(0) == (tid, None)
        assert db.last_tids_of_partition(1) == (None, tid)
        db = life.crash(db)


def test_without_metadata(life: Life, db: Backend) -> None:
    """A node without the ttid's partition has the objects only."""
    ttid, tid = p64(100), p64(104)
    write(db, ("vote", ttid, [store(1, "a")], None), ("lock", ttid, tid, False))
    db = life.crash(db)
    assert db.locked_transactions() == {ttid: None}
    write(db, ("validate", ttid, tid))
    assert db.locked_transactions() == {}
    assert load(db, 1) == (104, b"a")
    assert db.transaction(tid) is None


def test_validate_needs_no_lock(life: Life, db: Backend) -> None:
    """Locked elsewhere, only voted here."""
    ttid, tid = p64(100), p64(104)
    write(db, ("vote", ttid, [store(1, "a")], meta(1, pack=(None, p64(9)))))
    db = life.crash(db)
    write(db, ("validate", ttid, tid))
    assert load(db, 1) == (104, b"a")
    transaction = db.transaction(tid)
    assert transaction is not None
    assert transaction.pack == PackOrder(None, False, None, p64(9))
    write(db, ("validate", ttid, tid), ("unlock", ttid, tid), ("abort", ttid))
    assert load(db, 1) == (104, b"a")


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize("crash", [False, True])
def test_abort_frees_data(life: Life, dedup: bool, crash: bool) -> None:
    db = new(life, dedup=dedup)
    assert db.dedup is dedup
    add(db, 100, {1: "same"})
    stores = [store(1, "same"), store(2, "b"), store(3, "b"), store(4, None)]
    write(db, ("vote", p64(104), stores, meta(1, 2, 3, 4)))
    write(db, ("vote", p64(105), [store(5, "b")], None))
    count = (2, 5)[not dedup]
    assert len(data_rows(db)) == count
    if crash:
        db = life.crash(db)
        assert db.dedup is dedup
    write(db, ("abort", p64(104)))
    assert data_rows(db) == [b"b", b"same"]
    assert db.locked_transactions() == {p64(105): None}
    write(db, ("abort", p64(105)), ("abort", p64(105)))
    assert data_rows(db) == [b"same"]
    assert load(db, 1) == (100, b"same")


def test_dedup_shares_values_between_partitions(life: Life) -> None:
    db = new(life, dedup=True)
    add(db, 100, {1: "same", 2: "same"})
    add(db, 104, {3: "same", 4: "other"})
    assert data_rows(db) == [b"other", b"same"]
    with pytest.raises(BackendError, match="checksum of another value"):
        write(db, ("spill", p64(1), (sha1(b"same").digest(), b"different", 0)))


def test_data_ids_are_in_the_range_of_the_partition(life: Life, db: Backend) -> None:
    add(db, 100, {1: "a", 2: "b", 5: "c"})
    db = life.crash(db)
    add(db, 104, {1: "d", 6: "e"})
    ids = [row[0] for row in rows(db, "SELECT id FROM data ORDER BY value")]
    assert ids == [1 << 48, 2 << 48, (1 << 48) + 1, (1 << 48) + 2, (2 << 48) + 1]


def test_partition_beyond_the_range_of_data_ids(db: Backend) -> None:
    cells = [(40000, NID, C.UP_TO_DATE), (7232, NID, C.UP_TO_DATE)]
    write(db, ("change_partition_table", 2, 0, cells))
    write(db, ("vote", p64(100), [store(40000, "a"), store(7232, "b")], None))
    write(db, ("unlock", p64(100), p64(100)))
    assert load(db, 40000) == (100, b"a")
    assert load(db, 7232) == (100, b"b")


def test_undo(life: Life, db: Backend) -> None:
    """A record made by undo has the data of the revision it points to, if any."""
    add(db, 100, {1: "a", 2: None})
    add(db, 104, {1: "b", 2: "c"})
    stores = [store(1, "ignored", 100), store(2, "ignored", 100), store(3, "d", 50)]
    write(db, ("vote", p64(108), stores, meta(1, 2, 3)))
    assert data_rows(db) == [b"a", b"b", b"c", b"d"]
    # Packing what it points to, now, must leave the data.
    write(db, ("pack_partition", 1, p64(107), ZERO_OID, 9))
    assert data_rows(db) == [b"a", b"b", b"c", b"d"]
    db = life.crash(db)
    write(db, ("validate", p64(108), p64(112)))
    assert db.load(p64(1)) == (p64(112), None, 0, *val("a")[:2], p64(100))
    assert db.load(p64(2)) == (p64(112), None, None, ZERO_HASH, b"", p64(100))
    assert db.load(p64(3)) == (p64(112), None, 0, *val("d")[:2], p64(50))


def test_undo_serials_see_the_running_transaction(db: Backend) -> None:
    add(db, 100, {1: "a"})
    add(db, 104, {1: "b"})
    add(db, 108, {1: "c"})
    oid = p64(1)

    def serials(undone: int, ltid: int, written: dict[bytes, bytes]) -> Any:
        return db.undo_serials(p64(undone), p64(ltid), [oid, p64(9)], written)

    assert serials(108, 109, {}) == {oid: (p64(108), p64(104), True)}
    assert serials(104, 109, {}) == {oid: (p64(108), p64(100), False)}
    assert serials(104, 108, {}) == {oid: (p64(104), p64(100), True)}
    assert serials(104, 109, {oid: p64(104)}) == {oid: (p64(104), p64(100), True)}
    assert serials(104, 109, {oid: p64(200)}) == {oid: (p64(200), p64(100), False)}
    assert serials(108, 108, {}) is None
    assert serials(101, 109, {}) == {}


@pytest.mark.parametrize("crash", [False, True])
def test_unlock_meets_what_replication_brought(
    life: Life, db: Backend, crash: bool
) -> None:
    ttid, tid = p64(100), p64(104)
    stores = [store(1, "new"), store(2, "b"), store(5, None), store(9, "c")]
    write(db, ("vote", ttid, stores, meta(1, 2, 5, 9)))
    write(
        db,
        ("add_object", p64(1), tid, val("old"), None),
        ("add_object", p64(2), tid, val("b"), None),
        ("add_object", p64(5), tid, None, None),
        ("add_transaction", tid, Transaction(b"", b"", b"", [], True, ttid, None)),
    )
    if crash:
        db = life.crash(db)
    write(db, ("lock", ttid, tid, False), ("unlock", ttid, tid))
    assert data_rows(db) == [b"b", b"c", b"new"]
    assert [load(db, oid) for oid in (1, 2, 5, 9)] == [
        (104, b"new"),
        (104, b"b"),
        (104, b""),
        (104, b"c"),
    ]
    transaction = db.transaction(tid)
    assert transaction is not None
    assert not transaction.packed


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=50)
@given(
    tids=st.sets(st.integers(1, 200)),
    first=st.integers(0, 20),
    length=st.integers(0, 200),
    partitions=st.sets(st.integers(0, NP - 1)),
    bound=st.integers(0, 210),
)
def test_lists_of_tids(
    tids: set[int], first: int, length: int, partitions: set[int], bound: int
) -> None:
    db = MemoryBackend()
    start(db)
    db.begin(durable=False)
    for tid in sorted(tids):
        t = Transaction(b"", b"", b"", [], False, p64(tid), None)
        db.add_transaction(p64(tid), t)
    db.commit()
    among = sorted(
        (t for t in tids if t % NP in partitions and t <= bound), reverse=True
    )
    expected = [p64(tid) for tid in among[first : first + length]]
    assert db.tids(first, first + length, partitions, p64(bound)) == expected
    for partition in partitions:
        found = db.tids_from(partition, p64(first), p64(bound), length)
        mine = [t for t in sorted(among) if t % NP == partition and t >= first]
        assert found == [p64(tid) for tid in mine[:length]]
    db.close()


# --- values written before the vote ----------------------------------------------


@pytest.mark.parametrize("dedup", [False, True])
def test_spilled_value_is_voted(life: Life, dedup: bool) -> None:
    db = new(life, dedup=dedup)
    a = write(db, ("spill", p64(1), val("a")))
    b = write(db, ("spill", p64(2), val("b")))
    c = write(db, ("spill", p64(3), val("a")))
    assert db.spilled(a) == db.background.spilled(c) == val("a")
    write(db, ("release", [c]))
    assert data_rows(db) == [b"a", b"b"]
    write(db, ("vote", p64(100), [store(1, a), store(2, b)], meta(1, 2)))
    assert not [name for name in config(db) if "spill" in name]
    db = life.crash(db)
    assert data_rows(db) == [b"a", b"b"]
    write(db, ("validate", p64(100), p64(104)))
    assert load(db, 1) == (104, b"a")
    db = life.crash(db)
    assert data_rows(db) == [b"a", b"b"]


@pytest.mark.parametrize("dedup", [False, True])
def test_crash_leaves_no_spilled_value(life: Life, dedup: bool) -> None:
    db = new(life, dedup=dedup)
    add(db, 100, {1: "committed"})
    write(db, ("spill", p64(1), val("committed")))
    write(db, ("spill", p64(1), val("a")))
    add(db, 104, {5: "a", 9: "later"})
    voted = write(db, ("spill", p64(2), val("voted")))
    write(db, ("spill", p64(2), val("b")))
    write(db, ("vote", p64(105), [store(2, voted)], None))
    db = life.crash(db)
    assert data_rows(db) == [b"a", b"committed", b"later", b"voted"]
    write(db, ("drop_unfinished",))
    assert data_rows(db) == [b"a", b"committed", b"later"]
    assert not [name for name in config(db) if "spill" in name]


def test_leaving_operation_drops_spilled_values(db: Backend) -> None:
    """Else they would stay, and look used to the repair (19, item 8)."""
    for _ in range(2):
        write(db, ("spill", p64(1), val("a")))
    write(db, ("drop_unfinished",))
    assert data_rows(db) == []
    assert not db._references


def test_spilled_value_of_an_undo_is_freed(db: Backend) -> None:
    add(db, 100, {1: "a"})
    spilled = write(db, ("spill", p64(1), val("unused")))
    write(db, ("vote", p64(104), [store(1, spilled, 100)], None))
    assert data_rows(db) == [b"a"]
    write(db, ("unlock", p64(104), p64(108)))
    assert load(db, 1) == (108, b"a")


# --- packing ----------------------------------------------------------------------


def orders(db: Backend) -> list[tuple[int, bool | None]]:
    found = db.pack_orders(ZERO_TID, range(NP))
    return [(u64(pack_id), order.approved) for pack_id, order in found]


def test_pack_orders(life: Life, db: Backend) -> None:
    partial = [p64(3), p64(1)]
    add(db, 100, {}, pack=(None, p64(90)))
    add(db, 105, {}, pack=(partial, p64(91)))
    write(db, ("vote", p64(106), [], meta(pack=(None, p64(92)))))
    db = life.crash(db)
    full_order = PackOrder(True, False, None, p64(90))
    partial_order = PackOrder(True, True, [p64(1), p64(3)], p64(91))
    expected = [(p64(100), full_order), (p64(105), partial_order)]
    assert db.pack_orders(ZERO_TID, range(NP)) == expected
    assert db.pack_orders(p64(101), range(NP)) == expected[1:]
    assert db.pack_orders(ZERO_TID, [0]) == expected[:1]
    assert db.pack_orders(ZERO_TID, []) == []
    transaction = db.transaction(p64(105))
    assert transaction is not None
    assert transaction.pack == partial_order
    # not approved at lock, signed later
    write(db, ("lock", p64(106), p64(110), False), ("unlock", p64(106), p64(110)))
    assert orders(db) == [(100, True), (105, True), (110, None)]
    signed = write(db, ("sign_packs", [p64(110), p64(114)], [p64(100), p64(7)]))
    assert signed == ([p64(114)], [p64(7)])
    assert orders(db) == [(100, False), (105, True), (110, True)]


def test_aborted_pack_order_vanishes(life: Life, db: Backend) -> None:
    """neoppod keeps it, and no later pack is ever signed (19, item 1)."""
    write(db, ("vote", p64(100), [], meta(pack=(None, p64(90)))))
    write(db, ("abort", p64(100)))
    assert rows(db, "SELECT * FROM pack") == []
    write(db, ("vote", p64(104), [], meta(pack=(None, p64(90)))))
    db = life.crash(db)
    write(db, ("drop_unfinished",))
    assert rows(db, "SELECT * FROM pack") == []
    add(db, 108, {}, pack=(None, p64(90)))
    write(db, ("execute", "INSERT INTO pack VALUES (99, NULL, 0, NULL, 1)"))
    assert orders(life.crash(db)) == [(108, True)]


def test_pack_order_whose_tid_is_its_ttid(db: Backend) -> None:
    """Also over a stale row (19, item 13)."""
    write(db, ("execute", "INSERT INTO pack VALUES (100, NULL, 0, NULL, 1)"))
    ttid = p64(100)
    write(
        db,
        ("vote", ttid, [], meta(pack=(None, p64(90)))),
        ("lock", ttid, ttid, True),
        ("unlock", ttid, ttid),
    )
    assert orders(db) == [(100, True)]


# --- replication, truncation, removal ---------------------------------------------


def test_fetch(db: Backend) -> None:
    for tid in (100, 104, 108, 112):
        add(db, tid, {0: "a", 4: "b"})
    known = [p64(99), p64(100), p64(103), p64(105), p64(110)]
    found = db.fetch_transactions(0, 2, p64(100), MAX_TID, known)
    # What lies beyond the chunk is left for the next one.
    assert found == ([p64(104)], p64(108), [p64(99), p64(103), p64(105)])
    assert db.fetch_transactions(0, 2, p64(108), p64(111), known) == (
        [p64(108)],
        None,
        known,
    )
    keys = {p64(100): [p64(0), p64(8)], p64(104): [p64(4)], p64(108): [p64(0)]}
    missing = db.fetch_objects(0, 3, ZERO_TID, MAX_TID, ZERO_OID, keys)
    assert missing == (
        [(p64(100), p64(4)), (p64(104), p64(0))],
        p64(104),
        p64(4),
        {p64(100): [p64(8)]},
    )
    rest = db.fetch_objects(0, 5, p64(104), p64(108), p64(4), {p64(104): [p64(8)]})
    assert rest == (
        [(p64(104), p64(4)), (p64(108), p64(0)), (p64(108), p64(4))],
        None,
        None,
        {p64(104): [p64(8)]},
    )


RECORDS = st.dictionaries(
    st.tuples(st.integers(1, 6), st.integers(0, 5)),  # tid, oid, of partition 0
    st.one_of(st.none(), st.sampled_from(["a", "b"])),
)


def filled(records: dict[tuple[int, int], str | None]) -> MemoryBackend:
    db = MemoryBackend()
    start(db)
    db.begin(durable=False)
    for (tid, oid), value in records.items():
        t = Transaction(b"", b"", b"", [], False, p64(tid * NP), None)
        db.add_transaction(p64(tid * NP), t)
        db.add_object(p64(oid * NP), p64(tid * NP), value and val(value), None)
    db.commit()
    return db


@settings(deadline=None, max_examples=100)
@given(source=RECORDS, target=RECORDS, chunk=st.integers(1, 4))
def test_replication_converges(
    source: dict[tuple[int, int], str | None],
    target: dict[tuple[int, int], str | None],
    chunk: int,
) -> None:
    """Whatever each side has, the requester ends with the keys of the source."""
    ours, theirs = filled(source), filled(target)
    tid: bytes | None = ZERO_TID
    while tid is not None:
        known = theirs.tids_from(0, tid, MAX_TID, chunk)
        missing, tid, unknown = ours.fetch_transactions(0, chunk, tid, MAX_TID, known)
        if len(known) == chunk:  # what was not listed there, the source sends
            after = theirs.tids_from(0, p64(u64(known[-1]) + 1), MAX_TID, 999)
            unknown.extend(t for t in after if tid is None or t < tid)
        for t in unknown:
            write(theirs, ("delete_transaction", t))
        for t in missing:
            write(theirs, ("add_transaction", t, ours.transaction(t)))
    key: Any = (ZERO_TID, ZERO_OID)
    while key[0] is not None:
        keys: dict[bytes, list[bytes]] = {}
        known_keys = theirs.object_keys(0, chunk, key[0], MAX_TID, key[1])
        for t, oid in known_keys:
            keys.setdefault(t, []).append(oid)
        found = ours.fetch_objects(0, chunk, key[0], MAX_TID, key[1], keys)
        if len(known_keys) == chunk:
            t, oid = known_keys[-1]
            after_key = p64(u64(oid) + 1)
            for k in theirs.object_keys(0, 999, t, MAX_TID, after_key):
                if found.next_tid is None or k < found[1:3]:
                    found.unknown.setdefault(k[0], []).append(k[1])
        for t, oids in found.unknown.items():
            for oid in oids:
                write(theirs, ("delete_object", oid, t))
        for t, oid in found.missing:
            revision = ours.load(oid, at=t)
            assert revision is not None
            _, _, compression, checksum, data, _ = revision
            value = None if compression is None else (checksum, data, compression)
            write(theirs, ("add_object", oid, t, value, None))
        key = found[1:3]
    span = (0, 1000, ZERO_TID, MAX_TID)
    assert theirs.check_tid_range(*span) == ours.check_tid_range(*span)
    serials = ours.check_serial_range(*span, ZERO_OID)
    assert theirs.check_serial_range(*span, ZERO_OID) == serials
    assert serials[0] == len(source)
    assert write(theirs, ("prune_orphans", 0, 1000, True)) == (0, None)
    ours.close()
    theirs.close()


@settings(deadline=None, max_examples=100)
@given(
    records=RECORDS,
    bound=st.integers(0, 7),
    length=st.integers(1, 4),
    listed=st.one_of(st.none(), st.sets(st.integers(0, 7))),
)
def test_pack_keeps_what_it_must(
    records: dict[tuple[int, int], str | None],
    bound: int,
    length: int,
    listed: set[int] | None,
) -> None:
    """The rule of storage-format.md 12.3, said another way."""
    db = filled(records)
    oids = None if listed is None else [p64(oid * NP) for oid in listed] + [p64(1)]
    min_oid: bytes | None = ZERO_OID
    while min_oid is not None:
        args = (0, p64(bound * NP), min_oid, length, oids)
        min_oid = write(db, ("pack_partition", *args))
    kept = set()
    for tid, oid in records:
        current = max((t for t, o in records if o == oid and t <= bound), default=0)
        if (
            tid > current
            or (listed is not None and oid not in listed)
            or (tid == current and records[tid, oid] is not None)
        ):
            kept.add((p64(tid * NP), p64(oid * NP)))
    assert db.object_keys(0, 999, ZERO_TID, MAX_TID, ZERO_OID) == sorted(kept)
    assert write(db, ("prune_orphans", 0, 1000, True)) == (0, None)
    db.close()


def test_add_and_delete(db: Backend) -> None:
    order = PackOrder(None, True, [p64(2)], p64(90))
    transaction = Transaction(b"u", b"d", b"e", [p64(1)], True, p64(96), order)
    write(db, ("add_transaction", p64(100), transaction))
    assert db.transaction(p64(100)) == transaction
    assert orders(db) == [(100, None)]
    write(db, ("add_transaction", p64(100), transaction._replace(pack=None)))
    assert orders(db) == []
    write(db, ("add_transaction", p64(100), transaction))
    write(db, ("delete_transaction", p64(100)), ("delete_transaction", p64(100)))
    assert db.transaction(p64(100)) is None
    assert rows(db, "SELECT * FROM pack") == []

    oid = p64(1)
    write(
        db,
        ("add_object", oid, p64(100), val("a"), None),
        ("add_object", oid, p64(104), val("a"), p64(100)),
        ("add_object", oid, p64(108), val("b"), p64(50)),
        ("add_object", oid, p64(112), None, None),
    )
    assert data_rows(db) == [b"a", b"b"]
    assert [t and t[5] for t in (db.load(oid, at=p64(104)), db.load(oid))] == [
        p64(100),
        None,
    ]
    write(db, ("add_object", oid, p64(108), val("c"), None))
    assert load(db, 1, at=108) == (108, b"c")
    write(db, ("delete_object", oid, p64(108)), ("delete_object", oid, p64(108)))
    write(db, ("delete_object", oid, p64(100)))
    assert data_rows(db) == [b"a"]
    write(db, ("delete_object", oid, p64(104)), ("delete_object", oid, p64(112)))
    assert data_rows(db) == []


def test_check_vectors(db: Backend) -> None:
    """Digests of storage-format.md 15."""
    db.begin(durable=False)
    for tid in range(4):
        t = Transaction(b"", b"", b"", [], False, p64(tid), None)
        db.add_transaction(p64(tid), t)
    for oid in range(0, 16, NP):
        db.add_object(p64(oid), p64(1), val("a"), None)
    db.change_partition_table(2, 0, [(0, NID, C.UP_TO_DATE)], reset=True)
    db.commit()
    count, tids, last, _, last_oid = db.check_serial_range(
        0, 9, ZERO_TID, MAX_TID, ZERO_OID
    )
    assert (count, last, last_oid) == (4, p64(1), p64(12))
    assert tids.hex() == "1e9093698424b5370e19acd2d5fc20dcd56a32cd"
    db.begin(durable=False)
    db.execute("UPDATE trans SET partition = 0")
    db.execute("UPDATE obj SET oid = oid / 4")
    db.commit()
    count, digest, last = db.check_tid_range(0, 9, ZERO_TID, MAX_TID)
    assert (count, last) == (4, p64(3))
    assert digest.hex() == "e5b47bddeae2096220298df686737d939a27d736"
    found = db.check_serial_range(0, 9, ZERO_TID, MAX_TID, ZERO_OID)
    assert found[3] == digest
    assert db.check_tid_range(0, 2, p64(1), MAX_TID)[::2] == (2, p64(2))
    assert db.check_serial_range(0, 2, ZERO_TID, MAX_TID, p64(1))[4] == p64(1)


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_truncate(life: Life, db: Backend, limit: int) -> None:
    for tid in range(100, 120):
        pack = (None, p64(50)) if tid % 5 == 0 else None
        add(db, tid, {tid % 7: f"{tid}", tid % 3 + 20: f"also {tid}"}, pack)
    before = [db.transaction(p64(tid)) for tid in range(100, 120)]
    write(db, ("change_partition_table", 2, 0, [(2, NID, C.OUT_OF_DATE)]))
    write(db, ("set_truncate_tid", p64(109)))
    calls = 1
    while write(db, ("truncate", limit)):
        assert db.settings().truncate_tid == p64(109)
        calls += 1
        db = life.crash(db)
    assert calls > 1 or limit == 100
    assert not write(db, ("truncate", limit))
    assert db.settings().truncate_tid is None
    assert db.own_cells()[2].tid == p64(109)
    assert [db.transaction(p64(tid)) for tid in range(100, 110)] == before[:10]
    assert db.last_ids(range(NP))[0] == p64(109)
    assert [pack_id for pack_id, _ in orders(db)] == [100, 105]
    assert len(data_rows(db)) == 20
    assert write(db, ("prune_orphans", 0, 1000, True)) == (0, None)


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_drop_partition(life: Life, db: Backend, limit: int) -> None:
    for tid in range(100, 180, 5):
        add(db, tid, {1: f"{tid}", 2: f"{tid}"}, (None, p64(50)))
    assert not write(db, ("drop_partition", 1, limit))
    assert load(db, 1) is not None
    write(db, ("change_partition_table", 2, 0, [(1, NID, C.DISCARDED)]))
    calls = 1
    while write(db, ("drop_partition", 1, limit)):
        db = life.crash(db)
        calls += 1
    assert calls == {1: 21, 3: 7, 100: 1}[limit]
    assert rows(db, "SELECT * FROM obj WHERE partition = 1") == []
    assert rows(db, "SELECT * FROM trans WHERE partition = 1") == []
    assert len(orders(db)) == 12
    assert len(data_rows(db)) == 16


def test_prune_orphans(life: Life, db: Backend) -> None:
    add(db, 100, {1: "a"})
    write(db, ("vote", p64(104), [store(1, "b")], None))
    write(db, ("spill", p64(1), val("c")))
    orphan = "INSERT INTO data VALUES (?, x'00', 0, ?)"
    write(db, ("execute_many", orphan, [(5, b"d"), (6, b"e"), (1 << 50, b"f")]))
    found, min_id = 0, 0
    while min_id is not None:
        count, min_id = write(db, ("prune_orphans", min_id, 2, True))
        found += count
    assert found == 3
    assert write(db, ("prune_orphans", 6, 100, False)) == (2, None)
    assert write(db, ("prune_orphans", 0, 100, False)) == (1, None)
    assert data_rows(db) == [b"a", b"b", b"c"]


# --- SQL transactions ---------------------------------------------------------------


def test_rollback(life: Life, db: Backend) -> None:
    db.begin(durable=True)
    db.vote(p64(100), [store(1, "a")], meta(1))
    db.rollback()
    db.rollback()
    assert life.crash(db).locked_transactions() == {}


def test_uncommitted_is_not_seen(life: Life, db: Backend) -> None:
    if life.kind in ("journal", "memory"):
        pytest.skip("one connection: reads wait")
    db.begin(durable=True)
    db.vote(p64(100), [store(1, "a")], meta(1))
    db.unlock(p64(100), p64(104))
    for reader in db, db.background:
        assert reader.load(p64(1)) is None
    image = life.image(db)
    db.commit()
    for reader in db, db.background:
        assert reader.load(p64(1)) is not None
    assert life.open(image).load(p64(1)) is None


SCRIPT: list[tuple[Any, ...]] = [
    ("vote", p64(100), [store(1, "a"), store(2, "b")], meta(1, 2)),
    ("lock", p64(100), p64(104), False),
    ("unlock", p64(100), p64(104)),
    ("spill", p64(1), val("spilled")),
    ("vote", p64(108), [store(1, "c"), store(2, None)], meta(1, 2)),
    ("vote", p64(109), [store(3, "d")], meta(pack=(None, p64(104)))),
    ("abort", p64(109)),
    ("lock", p64(108), p64(112), False),
    ("change_partition_table", 2, 0, [(3, NID, C.OUT_OF_DATE)]),
    ("unlock", p64(108), p64(112)),
    ("add_object", p64(3), p64(112), val("e"), None),
    ("set_replicated", 3, p64(112)),
    ("pack_partition", 1, p64(112), ZERO_OID, 100),
    ("set_truncate_tid", p64(111)),
    ("truncate", 1),
    ("truncate", 100),
]


def test_crash_at_each_step(life: Life, db: Backend) -> None:
    """A step is done or not at all, and what a crash leaves is cleaned at the start."""

    def dump(db: Backend) -> Any:
        tables = "config", "pt", "pack", "trans", "obj", "data", "ttrans", "tobj"
        return {table: rows(db, f"SELECT * FROM {table}") for table in tables}

    for step in SCRIPT:
        before = dump(db)
        db.begin(durable=True)
        getattr(db, step[0])(*step[1:])
        if life.kind != "memory":
            during = life.open(life.image(db))
            assert strip(dump(during)) == strip(before), step
        db.commit()
        after = life.open(life.image(db))
        assert strip(dump(after)) == strip(dump(db)), step
        write(after, ("drop_unfinished",))
        assert write(after, ("prune_orphans", 0, 1000, True)) == (0, None)


def strip(content: Any) -> Any:
    """Without spilled values, which no restart sees again."""
    settings = decode_config(content["config"])
    content["config"] = {k: v for k, v in settings.items() if "spill" not in k}
    content["data"] = [row for row in content["data"] if row[3] != b"spilled"]
    return content


class Transactions(RuleBasedStateMachine):
    """Transactions in any order, with crashes: a dict knows what must be there."""

    dedup = False

    def __init__(self) -> None:
        super().__init__()
        self.db: MemoryBackend = MemoryBackend(dedup=self.dedup)
        start(self.db)
        self.clock = 1000
        self.running: dict[int, tuple[dict[int, str | None], int | None]] = {}
        self.spilled: list[int] = []
        self.committed: dict[tuple[int, int], str | None] = {}

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    values = st.one_of(st.none(), st.sampled_from(["", "a", "b", "c" * 5000]))

    @rule(objects=st.dictionaries(st.integers(0, 9), values), spill=st.booleans())
    def vote(self, objects: dict[int, str | None], spill: bool) -> None:
        ttid = self.tick()
        stores = []
        self.db.begin(durable=True)
        for oid, value in objects.items():
            if spill and value is not None:
                data_id = self.db.spill(p64(oid), val(value))
                stores.append(Store(p64(oid), None, data_id))
            else:
                stores.append(store(oid, value))
        self.db.vote(p64(ttid), stores, meta(*objects))
        self.db.commit()
        self.running[ttid] = objects, None

    @rule(oid=st.integers(0, 9), value=st.sampled_from(["a", "d"]))
    def spill(self, oid: int, value: str) -> None:
        self.spilled.append(write(self.db, ("spill", p64(oid), val(value))))

    @precondition(lambda self: self.spilled)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        data_id = data.draw(st.sampled_from(self.spilled))
        self.spilled.remove(data_id)
        write(self.db, ("release", [data_id]))

    def draw(self, data: st.DataObject, locked: bool) -> int | None:
        among = [t for t, (_, tid) in self.running.items() if (tid is None) != locked]
        return data.draw(st.sampled_from(among)) if among else None

    @rule(data=st.data())
    def lock(self, data: st.DataObject) -> None:
        ttid = self.draw(data, locked=False)
        if ttid is not None:
            tid = self.tick() * 100 + ttid % NP  # any tid of the same partition
            write(self.db, ("lock", p64(ttid), p64(tid), False))
            self.running[ttid] = self.running[ttid][0], tid

    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        ttid = self.draw(data, locked=True)
        if ttid is not None:
            objects, tid = self.running.pop(ttid)
            assert tid is not None
            write(self.db, ("unlock", p64(ttid), p64(tid)))
            self.committed.update({(oid, tid): v for oid, v in objects.items()})

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        ttid = self.draw(data, locked=False)
        if ttid is not None:
            write(self.db, ("abort", p64(ttid)))
            del self.running[ttid]

    @rule()
    def crash(self) -> None:
        self.db = MemoryBackend(self.db.image())
        self.spilled.clear()

    @invariant()
    def nothing_lost_nothing_left(self) -> None:
        db = self.db
        assert db.dedup is self.dedup
        assert db.locked_transactions() == {
            p64(ttid): tid and p64(tid) for ttid, (_, tid) in self.running.items()
        }
        found = {
            (u64(oid), u64(tid)): revision[4] if revision[2] is not None else None
            for partition in range(NP)
            for tid, oid in db.object_keys(partition, 999, ZERO_TID, MAX_TID, ZERO_OID)
            if (revision := db.load(oid, at=tid))
        }
        assert found == {
            key: None if value is None else value.encode()
            for key, value in self.committed.items()
        }
        used = {
            data_id
            for sql in ("SELECT data_id FROM obj", "SELECT data_id FROM tobj")
            for (data_id,) in rows(db, sql)
            if data_id is not None
        }
        assert {i for (i,) in rows(db, "SELECT id FROM data")} == used | {*self.spilled}

    def teardown(self) -> None:
        self.db.close()


def test_spilled_value_that_loses_its_other_reference() -> None:
    """Found by the machine below: the mark of spilled values was above this one."""
    db = MemoryBackend(dedup=True)
    start(db)
    write(db, ("vote", p64(1001), [store(0, "a")], meta(0)))
    write(db, ("spill", p64(0), val("a")))  # the same data row
    write(db, ("abort", p64(1001)))
    after = MemoryBackend(db.image())
    assert rows(after, "SELECT id FROM data") == []


class DedupTransactions(Transactions):
    dedup = True


for machine in Transactions, DedupTransactions:
    machine.TestCase.settings = settings(
        deadline=None, max_examples=30, stateful_step_count=30
    )
TestTransactions = Transactions.TestCase
TestDedupTransactions = DedupTransactions.TestCase


# --- memory -----------------------------------------------------------------------


class Disk:
    """Keeps what a machine that fails may leave: the last durable image."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.commits: list[bool] = []

    def before_commit(self, durable: bool) -> None:
        if self.error:
            raise self.error

    def after_commit(self, durable: bool) -> None:
        self.commits.append(durable)


def test_memory_observer() -> None:
    disk = Disk()
    db = MemoryBackend(observer=disk)
    start(db)
    write(db, ("vote", p64(100), [store(1, "a")], meta(1)), durable=True)
    write(db, ("unlock", p64(100), p64(104)))
    assert disk.commits == [True, True, True, False]
    image = db.image()
    disk.error = OSError(errno.ENOSPC, "No space left on device")
    db.begin(durable=True)
    db.vote(p64(108), [store(1, "b")], meta(1))
    with pytest.raises(BackendError, match="No space left"):
        db.commit()
    db.rollback()
    assert db.image() == image
    db.close()
