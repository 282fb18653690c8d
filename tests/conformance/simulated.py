"""ZODB's suites in the simulator: each test, its threads and its clusters in one world.

A test runs in an application thread of a process, `app`, that holds all its storages.
What its threads are made of is replaced while it runs: `threading.Thread` starts
another application thread, locks let the others run while they wait, sleeping lets
virtual time pass. So every order of things comes from the seed, which is the name of
the test; a failure tells it. NEO_SEEDS: how many seeds for each test.

Threads change places where they wait, and sometimes where they take a lock: loops that
wait for nothing but another thread end. The client's own lock is not simulated,
so nothing may block in a callback that it holds this lock for.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import transaction
import ZODB.mvccadapter
import ZODB.tests.HistoryStorage
import ZODB.tests.util
import ZODB.utils
from greenlet import getcurrent, greenlet
from transaction import ThreadTransactionManager, TransactionManager

from neo.client.Storage import Storage
from neo.lib.util import format_address
from tests.simulation.cluster import CLUSTER, Cluster, Shape
from tests.simulation.runtime import Process, SimRuntime, Simulation

SEEDS = int(os.environ.get("NEO_SEEDS", 1))
CHECKED = 3  # clients looked at after each event
PREEMPT = 0.02  # probability that taking a lock lets the others run
SLICE = 0.001  # virtual seconds that they get
LIMIT = 3600.0  # virtual seconds that a test may last
QUIET = 5.0  # virtual seconds after which nothing is left to do

ExcInfo = tuple[type[BaseException], BaseException, types.TracebackType]


class Application:
    """The process of the test."""

    def __init__(self, runtime: SimRuntime) -> None:
        self._process = runtime.process
        self._storages: deque[Storage] = deque()
        self._number = 0

    def storage(self, *args: Any, **options: Any) -> Storage:
        """A new client, with a Runtime of its own as each has."""
        self._number += 1
        runtime = SimRuntime(self._process, f"client{self._number}")
        storage = Storage(*args, **options, _runtime=lambda: runtime)
        self._storages.append(storage)
        return storage

    def close(self) -> None:
        """Close all clients."""
        for storage in list(self._storages):
            storage.close()

    def check(self) -> None:
        """After every event. Some tests open dozens of clients: a few, in turn."""
        storages = self._storages
        for _ in range(min(CHECKED, len(storages))):
            storage = storages.popleft()
            storage._core.check()
            if not storage._core.closed:
                storages.append(storage)


class SimLock:
    """A lock of application threads."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._locked = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        process = self._process
        if (
            blocking
            and getcurrent() in process.threads
            and process.sim.rng("preempt").random() < PREEMPT
        ):
            process.sleep(SLICE)
        if self._locked and blocking:
            process.wait(lambda: not self._locked, None if timeout < 0 else timeout)
        if self._locked:
            return False
        self._locked = True
        return True

    def release(self) -> None:
        if not self._locked:
            raise RuntimeError("release unlocked lock")
        self._locked = False

    def locked(self) -> bool:
        return self._locked

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class SimRLock(SimLock):
    """A lock that its owner may take again; also what Condition needs."""

    def __init__(self, process: Process) -> None:
        super().__init__(process)
        self._owner: greenlet | None = None
        self._count = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not self._is_owned():
            if not super().acquire(blocking, timeout):
                return False
            self._owner = getcurrent()
        self._count += 1
        return True

    def release(self) -> None:
        if not self._is_owned():
            raise RuntimeError("cannot release un-acquired lock")
        self._count -= 1
        if not self._count:
            self._owner = None
            super().release()

    def _is_owned(self) -> bool:
        return self._owner is getcurrent()

    def _release_save(self) -> int:
        count, self._count = self._count, 1
        self.release()
        return count

    def _acquire_restore(self, count: int) -> None:
        self.acquire()
        self._count = count


class World:
    """What a test sees of threads and time, and the clusters that it starts."""

    def __init__(self, seed: str) -> None:
        sim = self.sim = Simulation(seed)
        rng = sim.rng("options")
        sim.cut = rng.choice([0, 0.1, 0.5])
        sim.latency = rng.choice([(0.0002, 0.002), (0.0002, 0.02)])
        sim.disk_latency = rng.choice([0.0001, 0.002])
        self.process = sim.start("app", Application)
        self.clusters = 0
        self._last_time = 0.0

    def run(self, function: Callable[[], object]) -> None:
        """Run the test to its end, in an application thread."""
        thread = self.process.spawn(function)
        self.sim.run_until(lambda: thread.dead, LIMIT)

    def end(self) -> None:
        """No thread is left."""
        if self.process.alive:
            self.process.crash()

    # --- what is replaced -------------------------------------------------------------

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """For the time of a test. Other threads of Python see no difference."""

        def inside(ours: Any, original: Any) -> Any:
            """A function that does something else in application threads."""

            def function(*args: Any, **kw: Any) -> Any:
                known = getcurrent() in self.process.threads
                return (ours if known else original)(*args, **kw)

            return function

        def new_lock() -> SimLock:
            return SimLock(self.process)

        def new_rlock() -> SimRLock:
            return SimRLock(self.process)

        thread = threading.Thread
        now = inside(self.time, time.time)
        replaced: list[tuple[Any, dict[str, Any]]] = [
            (
                thread,
                {
                    "start": inside(self.start, thread.start),
                    "join": inside(self.join, thread.join),
                    "is_alive": inside(self.is_alive, thread.is_alive),
                },
            ),
            (
                threading,
                {
                    "Lock": inside(new_lock, threading.Lock),
                    "RLock": inside(new_rlock, threading.RLock),
                    "_allocate_lock": inside(new_lock, threading._allocate_lock),
                },
            ),
            (ZODB.mvccadapter, {"Lock": inside(new_lock, ZODB.mvccadapter.Lock)}),
            (
                ZODB.utils,
                {
                    "Lock": inside(new_lock, ZODB.utils.Lock),
                    "RLock": inside(new_rlock, ZODB.utils.RLock),
                },
            ),
            (time, {"time": now, "sleep": inside(self.process.sleep, time.sleep)}),
            (ZODB.tests.HistoryStorage, {"time": now}),
            # It replaces time.time, for some tests, by what never goes back.
            (ZODB.tests.util, {"_real_time": now, "_current_time": 0.0}),
        ]
        state = random.getstate()
        random.seed(self.sim.seed)
        with ExitStack() as stack:
            stack.callback(random.setstate, state)
            for module, functions in replaced:
                stack.enter_context(mock.patch.multiple(module, **functions))
            # Greenlets share the variables of their thread.
            stack.enter_context(
                mock.patch.object(
                    ThreadTransactionManager,
                    "manager",
                    property(_manager_of_thread, lambda _self, _manager: None),
                    create=True,
                )
            )
            yield

    def time(self) -> float:
        """Wall clock, which increases between two calls as a real one does."""
        self._last_time = max(self.process.now(), self._last_time + 1e-6)
        return self._last_time

    def start(self, thread: threading.Thread) -> None:
        """Thread.start"""
        thread.greenlet = self.process.spawn(thread.run)  # type: ignore[attr-defined]

    def join(self, thread: Any, timeout: float | None = None) -> None:
        """Thread.join"""
        self.process.wait(lambda: thread.greenlet.dead, timeout)

    def is_alive(self, thread: Any) -> bool:
        """Thread.is_alive"""
        return hasattr(thread, "greenlet") and not thread.greenlet.dead


def _manager_of_thread(_self: ThreadTransactionManager) -> TransactionManager:
    thread = getcurrent()
    if not hasattr(thread, "transaction_manager"):
        thread.transaction_manager = TransactionManager()
    manager: TransactionManager = thread.transaction_manager
    return manager


class SimCluster:
    """See AnyCluster."""

    def __init__(self, world: World, storages: int) -> None:
        self.world = world
        sim = world.sim
        rng = sim.rng("shape")
        shape = Shape(
            storages=storages,
            replicas=rng.randrange(storages),
            partitions=rng.choice([1, 2, 3, 5, 12]),
            clients=0,
            dedup=rng.random() < 0.3,
        )
        self.compress = rng.random() < 0.5
        sim.note("OPTIONS", f"{shape}, latency {sim.latency}, cut {sim.cut}")
        self.cluster = Cluster(sim, shape, world.clusters)
        world.clusters += 1
        self.cluster.start()
        world.process.wait(lambda: self.cluster.healthy, 60)

    def storage(self, **options: Any) -> Storage:
        """A new client in the process of the test."""
        cluster, app = self.cluster, self.world.process.app
        masters = " ".join(
            format_address(cluster.addresses[m]) for m in cluster.masters
        )
        options = {"compress": self.compress, **options}
        storage: Storage = app.storage(masters, CLUSTER, **options)
        return storage

    def close(self) -> None:
        """Nothing is left half done, and replicas are equal."""
        cluster = self.cluster
        self.world.process.app.close()
        self.world.process.sleep(QUIET)
        cells: dict[str, Any] = {}
        for name, content in cluster.replicas().items():
            partition = name.split("/")[0]
            assert cells.setdefault(partition, content) == content, name
        assert cluster.leftovers() == {}


class Outcome:
    """The result of a test, told with its seed."""

    def __init__(self, world: World, result: Any) -> None:
        self.world = world
        self.failed = False
        self._result = result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._result, name)

    def addError(self, test: Any, error: ExcInfo) -> None:
        self._explain(error)
        self._result.addError(test, error)

    def addFailure(self, test: Any, error: ExcInfo) -> None:
        self._explain(error)
        self._result.addFailure(test, error)

    def _explain(self, error: ExcInfo) -> None:
        sim = self.world.sim
        if not self.failed:
            error[1].add_note(
                f"seed {sim.seed!r}, {sim.time:.6f} s, {sim.events} events,"
                f" digest {sim.digest}\n{sim.report(50)}"
            )
        self.failed = True


class Simulated:
    """Mixed into a NEOTestCase: its tests run in the simulator."""

    storages: int
    id: Callable[[], str]

    def run(self, result: Any = None) -> Any:
        """Once for each seed, up to the first that fails."""
        name = ".".join(self.id().split(".")[-2:])
        for i in range(SEEDS):
            self.world = World(f"{name}:{i}" if i else name)
            outcome = Outcome(self.world, result)
            with self.world.replacing():
                try:
                    self.world.run(lambda o=outcome: super(Simulated, self).run(o))
                except Exception:  # noqa: BLE001 - of a node, or the time is over
                    outcome.addError(self, sys.exc_info())
                finally:
                    self.world.end()
                    transaction.abort()
            if outcome.failed:
                break
        return result

    def new_cluster(self, _name: str = "") -> SimCluster:
        """See NEOTestCase."""
        return SimCluster(self.world, self.storages)
