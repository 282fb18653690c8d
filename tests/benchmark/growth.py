"""How the cost of an operation grows: `make growth`.

One dimension at a time: objects, revisions of one object, partitions, storages, clients
that do nothing. What is told is CPU time, which the other work of a machine disturbs
least, beside the median duration; and the memory of each kind of node.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ZODB.Connection import TransactionMetaData

from .peers import Peer, neo
from .report import markdown
from .runner import Process, Table, cpu, per_operation, run
from .workloads import ALONE, TINY, Client, Metrics, setup

SIZES = TINY._replace(cap=1.0, commits=300)
BATCH = 2000  # objects in a transaction
STEP = 50_000  # objects made by one process
SAMPLE = 1500  # of all objects, those that are loaded


@contextmanager
def started(**options: Any) -> Iterator[Peer]:
    """A cluster with what the workloads need."""
    with (
        TemporaryDirectory(prefix="growth-") as folder,
        neo("NEO", Path(folder), **options) as peer,
    ):
        run(peer, (setup,), TINY, 0)
        yield peer


def memory(pids: list[int]) -> float:
    """Megabytes; what processes share counts in parts."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1000


def costs(peer: Peer) -> Metrics:
    """What a load and a commit cost now, and how big the nodes are."""
    result: Metrics = {}
    for name in "load", "commit":
        ((metrics, ops),), spent = run(peer, (ALONE[name],), SIZES, 0)
        unit = "p50_us" if name == "load" else "p50_ms"
        result[f"{name}, {unit[4:]}"] = metrics[unit]
        for cost, value in per_operation(spent, ops).items():
            role = cost.split("_")[1]
            if (name, role) != ("load", "master"):
                result[f"{name}, CPU of {role}, us"] = value
    for role, pids in peer.pids.items():
        result[f"memory of {role}, MB"] = memory(pids) / len(pids)
    return result


def fill(first: int, stop: int) -> Callable[[Client], tuple[Metrics, int]]:
    """A workload: so many objects of 100 bytes, some of which will be loaded."""

    def workload(client: Client) -> tuple[Metrics, int]:
        client.ready()
        storage = client.db.storage
        head = pickle.dumps(("persistent.mapping", "PersistentMapping"), 3)
        step = max(1, stop // SAMPLE)
        oids = [] if not first else client.oids()[: SAMPLE * first // stop]
        for start in range(first, stop, BATCH):
            meta = TransactionMetaData()
            storage.tpc_begin(meta)
            for number in range(start, start + BATCH):
                data = head + pickle.dumps({"data": {"v": b"%060d" % number}}, 3)
                oid = storage.new_oid()
                storage.store(oid, None, data, "", meta)
                if not number % step:
                    oids.append(oid)
            storage.tpc_vote(meta)
            storage.tpc_finish(meta)
        client.tm.begin()
        client.box["many"]["oids"] = b"".join(oids)
        client.tm.commit()
        return {}, 0

    return workload


def revise(number: int) -> Callable[[Client], tuple[Metrics, int]]:
    """A workload: so many more revisions of one object."""

    def workload(client: Client) -> tuple[Metrics, int]:
        obj = client.box["versioned"][0]
        client.ready()
        for _ in range(number):
            obj["v"] = client.text(250)
            client.tm.commit()
        return {}, 0

    return workload


def revisions(client: Client) -> tuple[Metrics, int]:
    """What reading an object with a history costs."""
    oid = client.box["versioned"][0]._p_oid
    storage = client.db.storage
    tids = [entry["tid"] for entry in storage.history(oid, size=20)]
    core = storage._core  # its cache is none of this
    client.ready()

    def median_us(call: Callable[[], Any]) -> float:
        durations = []
        for _ in range(300):
            core.cache.clear()
            before = time.perf_counter()
            call()
            durations.append(time.perf_counter() - before)
        return sorted(durations)[150] * 1e6

    return {
        "load, us": median_us(lambda: storage.load(oid)),
        "load of an old revision, us": median_us(
            lambda: storage.loadBefore(oid, tids[-2])
        ),
        "history of 20, us": median_us(lambda: storage.history(oid, size=20)),
    }, 900


def objects(numbers: list[int]) -> Iterator[tuple[str, Metrics]]:
    with started() as peer:
        present = 0
        for number in numbers:
            while present < number:
                stop = min(number, present + STEP)
                run(peer, (fill(present, stop),), SIZES, 0)
                present = stop
            yield f"{number:,} objects", costs(peer)


def histories(numbers: list[int]) -> Iterator[tuple[str, Metrics]]:
    with started() as peer:
        present = TINY.revisions
        for number in numbers:
            run(peer, (revise(number - present),), SIZES, 0)
            present = number
            ((metrics, ops),), spent = run(peer, (revisions,), SIZES, 0)
            del spent["client"], spent["master"]
            mean = {"CPU of storage, us": spent["storage"] / ops * 1e6}
            yield f"{number:,} revisions", {**metrics, **mean}


def partitions(numbers: list[int]) -> Iterator[tuple[str, Metrics]]:
    for number in numbers:
        with started(partitions=number) as peer:
            yield f"{number:,} partitions", costs(peer)


def storages(numbers: list[int]) -> Iterator[tuple[str, Metrics]]:
    for number in numbers:
        with started(storages=number) as peer:
            yield f"{number} storages", costs(peer)


def idle(client: Client) -> None:
    """One more client, which is there until the end."""
    client.ready()


def clients(numbers: list[int]) -> Iterator[tuple[str, Metrics]]:
    with started() as peer:
        present: list[Process] = []
        try:
            for number in numbers:
                while len(present) < number - 1:
                    present.append(Process(peer, idle, SIZES, 0, 0))
                    present[-1].receive()
                pids = [process.process.pid or 0 for process in present]
                before = cpu(pids)
                result = costs(peer)
                if pids:
                    spent = (cpu(pids) - before) / SIZES.commits / len(pids)
                    result["commit, CPU of each idle client, us"] = spent * 1e6
                yield f"{number} clients", result
        finally:
            for process in present:
                process.process.kill()
                process.end()


DIMENSIONS: dict[
    str, tuple[Callable[[list[int]], Iterator[tuple[str, Metrics]]], list[int]]
] = {
    "objects": (objects, [10_000, 100_000, 1_000_000, 10_000_000]),
    "revisions": (histories, [20, 100, 1000]),
    "partitions": (partitions, [12, 100, 1000]),
    "storages": (storages, [1, 2, 4, 8, 16]),
    "clients": (clients, [1, 10, 50, 200]),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.benchmark.growth", description=__doc__)
    parser.add_argument("dimensions", nargs="*", default=list(DIMENSIONS))
    parser.add_argument("--most", type=int, default=10**9, help="leave out bigger ones")
    args = parser.parse_args()
    for dimension in args.dimensions:
        function, numbers = DIMENSIONS[dimension]
        table: Table = {}
        columns = []
        for column, metrics in function([n for n in numbers if n <= args.most]):
            columns.append(column)
            for metric, value in metrics.items():
                table.setdefault(metric, {})[column] = value
        print(f"\nGrowth of the number of {dimension}\n")
        print(markdown(table, columns), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
