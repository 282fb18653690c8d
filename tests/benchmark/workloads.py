"""What is measured. Each workload runs in a process of its own, on any ZODB storage.

A workload is a function of a `Client`. It calls `client.ready()` when what precedes is
not to be measured, and returns its metrics, and by how many operations the CPU time of
the processes is to be divided. Names that end with `_per_s` are rates (more is better),
those with `_ms` or `_us` times (less is better). Workloads for several processes
return a `Share`.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import md5
from random import Random
from typing import Any, NamedTuple

import transaction
import ZODB
from BTrees.IOBTree import IOBTree
from BTrees.Length import Length
from persistent.mapping import PersistentMapping as Mapping
from persistent.TimeStamp import TimeStamp
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ConflictError

Metrics = dict[str, float]
SEED = 1
WORDS = [md5(str(i).encode()).hexdigest()[: 3 + i % 6] for i in range(512)]
MIB = 1 << 20
perf = time.perf_counter


class Sizes(NamedTuple):
    """How much each workload does; `cap` and `seconds` bound or give its duration."""

    cap: float = 1.0
    seconds: float = 0.7
    processes: tuple[int, ...] = (1, 4, 8)
    commits: int = 1000
    bulks: int = 4
    big: int = 4
    objects: int = 5000
    concurrent: int = 1200
    revisions: int = 20
    versioned: int = 100
    undos: int = 20
    imported: int = 200
    seen: int = 40


NORMAL = Sizes()
QUICK = Sizes(0.5, 0.4, (1, 4), 400, 2, 2, 2000, 600, 20, 40, 10, 100, 15)
TINY = Sizes(0.1, 0.1, (1, 2), 10, 1, 1, 120, 50, 3, 5, 2, 5, 2)


class Share(NamedTuple):
    """What one of several processes did."""

    start: float
    end: float
    latencies: list[float]
    retries: int = 0


class Client:
    """One process with a database open."""

    def __init__(
        self,
        open_storage: Callable[[], Any],
        sizes: Sizes,
        repetition: int,
        index: int,
        ready: Callable[[], object],
    ) -> None:
        self.open_storage = open_storage
        self.sizes = sizes
        self.random = Random(f"{SEED} {repetition} {index}")
        self.index = index
        self.ready = ready
        self.tm = transaction.TransactionManager()
        self.open()

    def open(self) -> None:
        # A cache of objects so big that its own cost is not measured.
        self.db = ZODB.DB(self.open_storage(), cache_size=100_000, pool_size=10)
        self.conn = self.db.open(self.tm)

    def close(self) -> None:
        self.tm.abort()
        self.conn.close()
        self.db.close()

    @property
    def box(self) -> Any:
        return self.conn.root()["benchmark"]

    def text(self, size: int) -> bytes:
        """Bytes that zlib shrinks to a half, as pickles."""
        words = self.random.choices(WORDS, k=size // 4 + 4)
        return " ".join(words).encode()[:size]

    def oids(self) -> list[bytes]:
        """Those of many objects, in a random order."""
        joined = self.box["many"]["oids"]
        oids = [joined[i : i + 8] for i in range(0, len(joined), 8)]
        self.random.shuffle(oids)
        return oids


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def until(number: int, cap: float) -> Iterator[int]:
    """At most so many numbers, for so many seconds, but one at least."""
    end = perf() + cap
    for i in range(number):
        yield i
        if perf() >= end:
            return


def timed(calls: Iterator[Callable[[], object]]) -> tuple[list[float], float]:
    """(duration of each call, of all)."""
    latencies = []
    start = perf()
    for call in calls:
        before = perf()
        call()
        latencies.append(perf() - before)
    return latencies, perf() - start


def setup(client: Client) -> tuple[Metrics, int]:
    """What the workloads find; once for each storage."""
    sizes, tm, conn = client.sizes, client.tm, client.conn
    client.ready()
    box = conn.root()["benchmark"] = Mapping()
    new = client.text
    box["single"] = Mapping((i, Mapping(v=new(250))) for i in range(100))
    box["own"] = Mapping(
        (i, Mapping((j, Mapping(v=new(250))) for j in range(10)))
        for i in range(max(sizes.processes))
    )
    box["length"] = Length()
    box["tree"] = IOBTree({i * 1000: "x" * 20 for i in range(2000)})
    box["seen"] = Mapping(v=0)
    tm.commit()
    oids = []
    for first in range(0, sizes.objects, 500):
        for _ in range(min(500, sizes.objects - first)):
            obj = Mapping(v=new(450))
            conn.add(obj)
            oids.append(obj._p_oid)
        tm.commit()
    box["many"] = Mapping(oids=b"".join(oids))
    versioned = [Mapping(v=new(250)) for _ in range(sizes.versioned)]
    box["versioned"] = Mapping(enumerate(versioned))
    tm.commit()
    for _ in range(sizes.revisions - 1):
        for obj in versioned:
            obj["v"] = new(250)
        tm.commit()
    return {}, 0


def commits(client: Client) -> tuple[Metrics, int]:
    """Commits of one object of 300 bytes."""
    sizes, commit = client.sizes, client.tm.commit
    objects = list(client.box["single"].values())
    payload = [client.text(250) for _ in range(sizes.commits)]
    for obj in objects[:10]:
        obj["v"] = client.text(250)
        commit()
    client.ready()
    latencies = []
    start = perf()
    for i in until(sizes.commits, sizes.cap):
        objects[i % 100]["v"] = payload[i]
        before = perf()
        commit()
        latencies.append(perf() - before)
    rate = len(latencies) / (perf() - start)
    return {
        "commits_per_s": rate,
        "p50_ms": percentile(latencies, 0.5) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
    }, len(latencies)


def bulk(client: Client) -> tuple[Metrics, int]:
    """Commits of 1000 objects of 500 bytes."""
    payload = [client.text(450) for _ in range(1000)]
    client.ready()
    spent = 0.0
    number = 0
    for i in until(client.sizes.bulks, client.sizes.cap):
        for value in payload:
            client.conn.add(Mapping(v=value + b"%d" % i))
        before = perf()
        client.tm.commit()
        spent += perf() - before
        number += 1000
        client.conn.cacheMinimize()
    return {"objects_per_s": number / spent}, number


def big(client: Client) -> tuple[Metrics, int]:
    """Objects of 1 MiB, random or compressible."""
    number = client.sizes.big
    values = {
        "random": [client.random.randbytes(MIB) for _ in range(number)],
        "text": [client.text(1 << 16) * 16 for _ in range(number)],
    }
    client.ready()
    metrics, oids = {}, {}
    for kind, contents in values.items():
        objects = [Mapping(v=value) for value in contents]
        for obj in objects:
            client.conn.add(obj)
        before = perf()
        client.tm.commit()
        metrics[f"write_{kind}_MB_per_s"] = number * MIB / 1e6 / (perf() - before)
        oids[kind] = [obj._p_oid for obj in objects]
    client.close()
    client.open()
    load = client.conn._storage.load
    for kind in values:
        _, spent = timed(lambda oid=oid: load(oid) for oid in oids[kind])  # type: ignore[misc]
        metrics[f"read_{kind}_MB_per_s"] = number * MIB / 1e6 / spent
    return metrics, 4 * number


def load_all(
    load: Callable[[bytes], Any], oids: list[bytes], cap: float
) -> list[float]:
    latencies = []
    end = perf() + cap
    for oid in oids:
        before = perf()
        load(oid)
        after = perf()
        latencies.append(after - before)
        if after > end:
            break
    return latencies


def loads(client: Client) -> tuple[Metrics, int]:
    """Objects that are in no cache, one by one."""
    oids = client.oids()
    client.ready()
    latencies = load_all(client.conn._storage.load, oids, 2 * client.sizes.cap)
    return {
        "objects_per_s": len(latencies) / sum(latencies),
        "p50_us": percentile(latencies, 0.5) * 1e6,
        "p99_us": percentile(latencies, 0.99) * 1e6,
    }, len(latencies)


def prefetched(client: Client) -> tuple[Metrics, int]:
    """The same, announced by a hundred, where the storage can do that."""
    oids = client.oids()
    storage = client.conn._storage
    client.ready()
    if not hasattr(storage, "prefetch"):
        return {}, 0
    start = perf()
    for first in range(0, len(oids), 100):
        storage.prefetch(oids[first : first + 100])
        for oid in oids[first : first + 100]:
            storage.load(oid)
    return {"objects_per_s": len(oids) / (perf() - start)}, len(oids)


def cached(client: Client) -> tuple[Metrics, int]:
    """Objects that are in the cache of the storage's client."""
    oids = client.oids()
    load = client.conn._storage.load
    load_all(load, oids, 60)
    client.ready()
    latencies = []
    for _ in range(4):
        client.random.shuffle(oids)
        latencies += load_all(load, oids, client.sizes.cap / 4)
    return {"objects_per_s": len(latencies) / sum(latencies)}, len(latencies)


def reader(client: Client) -> Share:
    """Cold loads of several processes."""
    oids = client.oids()[: client.sizes.concurrent]
    client.ready()
    start = perf()
    latencies = load_all(client.conn._storage.load, oids, client.sizes.cap)
    return Share(start, perf(), latencies)


def committer(client: Client) -> Share:
    """Commits of several processes, each on objects of its own."""
    objects = list(client.box["own"][client.index].values())
    payload = [client.text(250) for _ in range(200)]
    commit = client.tm.commit
    objects[0]["v"] = payload[0]
    commit()
    client.ready()
    latencies = []
    start = after = perf()
    number = 0
    while after < start + client.sizes.seconds:
        objects[number % len(objects)]["v"] = payload[number % 200]
        number += 1
        before = perf()
        commit()
        after = perf()
        latencies.append(after - before)
    return Share(start, after, latencies)


def rival(client: Client) -> Share:
    """Commits of four processes, all on one counter and one tree."""
    length, tree, tm = client.box["length"], client.box["tree"], client.tm
    length()
    client.ready()
    latencies = []
    retries = 0
    start = after = perf()
    while after < start + client.sizes.seconds:
        before = perf()
        key = client.random.randrange(1 << 31)
        while perf() < start + 2 * client.sizes.seconds:
            try:
                tm.begin()
                tree[key] = "y" * 20
                length.change(1)
                tm.commit()
            except ConflictError:
                tm.abort()
                retries += 1
            else:
                latencies.append(perf() - before)
                break
        after = perf()
    return Share(start, after, latencies, retries)


def past(client: Client) -> tuple[Metrics, int]:
    """Old revisions, histories of 20, undo."""
    sizes, storage, tm = client.sizes, client.db.storage, client.tm
    oids = [obj._p_oid for obj in client.box["versioned"].values()]
    tids = sorted(entry["tid"] for entry in storage.history(oids[0], size=100))[1:]
    undone = [client.box["single"][i] for i in range(sizes.undos)]
    choice = client.random.choice
    work = [(choice(oids), choice(tids)) for _ in range(1000)]
    client.ready()
    old, spent = timed(
        lambda oid=work[i][0], tid=work[i][1]: storage.loadBefore(oid, tid)  # type: ignore[misc]
        for i in until(len(work), sizes.cap)
    )
    histories, spent_history = timed(
        lambda oid=oids[i]: storage.history(oid, size=20)  # type: ignore[misc]
        for i in until(len(oids), sizes.cap)
    )
    for obj in undone:
        obj["v"] = client.text(250)
        tm.commit()
    before = perf()
    ids = [entry["id"] for entry in client.db.undoLog(0, len(undone))]
    spent_log = perf() - before

    def undo(tid: bytes) -> None:
        client.db.undo(tid, tm.get())
        tm.commit()

    undos, spent_undo = timed(
        lambda tid=ids[i]: undo(tid)  # type: ignore[misc]
        for i in until(len(ids), sizes.cap)
    )
    return {
        "old_loads_per_s": len(old) / spent,
        "history20_per_s": len(histories) / spent_history,
        "undo_log_ms": spent_log * 1e3,
        "undo_per_s": len(undos) / spent_undo,
    }, len(old) + len(histories) + len(undos)


def after(tid: bytes) -> bytes:
    """A tid for now, or just after another one."""
    now = time.time()
    gm = time.gmtime(now)
    stamp = TimeStamp(*gm[:5], gm[5] + now % 1)
    raw: bytes = stamp.raw()
    return raw if raw > tid else stamp.laterThan(TimeStamp(tid)).raw()  # type: ignore[no-any-return]


def copies(client: Client) -> tuple[Metrics, int]:
    """Import of transactions of 5 objects of 800 bytes; iteration."""
    number, storage = client.sizes.imported, client.db.storage
    oids = [storage.new_oid() for _ in range(max(5, number))]
    head = pickle.dumps(("persistent.mapping", "PersistentMapping"), 3)
    serials: dict[bytes, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = FileStorage(f"{folder}/source.fs")
        first = tid = after(storage.lastTransaction())
        for i in range(number):
            meta = TransactionMetaData("user", f"import {i}")
            tid = after(tid)
            source.tpc_begin(meta, tid, " ")
            for oid in client.random.sample(oids, 5):
                data = head + pickle.dumps({"data": {"v": client.text(800)}}, 3)
                source.store(oid, serials.get(oid, bytes(8)), data, "", meta)
                serials[oid] = tid
            source.tpc_vote(meta)
            source.tpc_finish(meta)
        client.ready()
        before = perf()
        storage.copyTransactionsFrom(source)
        spent = perf() - before
        source.close()
    before = perf()
    records = sum(1 for txn in storage.iterator(first) for record in txn if record.data)
    assert records == 5 * number, records
    return {
        "imported_per_s": number / spent,
        "iterated_per_s": number / (perf() - before),
    }, number


def boundary(client: Client) -> tuple[Metrics, int]:
    """Beginning a transaction, which sees all that is committed."""
    client.box.keys()
    client.ready()
    latencies, _ = timed(client.tm.begin for _ in until(1000, client.sizes.cap))
    return {"begin_us": percentile(latencies, 0.5) * 1e6}, len(latencies)


def teller(client: Client) -> list[tuple[int, float]]:
    """One of two processes: commits numbers, and when it began to."""
    obj = client.box["seen"]
    first = obj["v"] + 1
    client.ready()
    told = []
    for number in range(first, first + client.sizes.seen):
        time.sleep(0.01)
        obj["v"] = number
        told.append((number, time.monotonic()))
        client.tm.commit()
    return told


def watcher(client: Client) -> list[tuple[int, float]]:
    """The other one: the numbers, and when it saw them."""
    obj = client.box["seen"]
    last = obj["v"]
    stop = last + client.sizes.seen
    client.ready()
    seen = []
    end = perf() + 20
    while last < stop and perf() < end:
        time.sleep(0.0002)
        client.tm.begin()
        if obj["v"] != last:
            last = obj["v"]
            seen.append((last, time.monotonic()))
    return seen


#: By one process: name of the workload -> function.
ALONE: dict[str, Callable[[Client], tuple[Metrics, int]]] = {
    "commit": commits,
    "bulk": bulk,
    "big": big,
    "load": loads,
    "prefetch": prefetched,
    "cache": cached,
    "past": past,
    "copy": copies,
    "begin": boundary,
}
#: By several: (function, unit; how many: None for each of `Sizes.processes`).
TOGETHER: dict[str, tuple[Callable[[Client], Share], str, int | None]] = {
    "readers": (reader, "objects_per_s", None),
    "committers": (committer, "commits_per_s", None),
    "conflicts": (rival, "commits_per_s", 4),
}
NAMES = (*ALONE, *TOGETHER, "visible")
