"""Transactions under failure, step by step: who dies when, and what becomes of it."""

from __future__ import annotations

from typing import Any

from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError

from neo.client.Storage import Storage
from tests.history import Value, decode
from tests.simulation.cluster import Cluster, Shape
from tests.simulation.runtime import Simulation
from tests.simulation.workload import ALL, Tokens

X, Y = ALL[:2]


class Scene:
    """A running cluster with objects, and transactions driven step by step.

    `do()` runs a step in an application thread of a client and waits for its end;
    `start()` only starts it.
    """

    def __init__(self, shape: Shape, seed: int | str = 0, **options: Any) -> None:
        self.sim = Simulation(seed)
        self.cluster = Cluster(self.sim, shape, **options)
        self.tokens = Tokens(self.sim)
        self.cluster.start()
        self.sim.run_until(lambda: self.cluster.healthy, 20)
        self.do(self.tokens.create, self.cluster.storage())

    def do(self, function: Any, *args: Any, client: str = "c0") -> Any:
        return self.cluster.call(function, *args, client=client)


def increment(storage: Storage, oid: bytes, token: str) -> int:
    """Append to an object, as often as it takes; the number of attempts."""
    attempts = 0
    while True:
        attempts += 1
        txn = TransactionMetaData()
        storage.sync()
        data, serial = storage.load(oid)
        storage.tpc_begin(txn)
        try:
            storage.store(oid, serial, decode(data).append(token).encode(), "", txn)
            storage.tpc_vote(txn)
            storage.tpc_finish(txn)
            return attempts
        except (ConflictError, TransientError):
            storage.tpc_abort(txn)


def test_threads_that_conflict_take_turns() -> None:
    """Nobody starves, although who wins is ready to win again before all others."""
    scene = Scene(Shape(clients=1))
    storage = scene.cluster.storage()
    attempts: list[int] = []
    threads = 8

    def work(number: int) -> None:
        for i in range(20):
            attempts.append(increment(storage, X, f"{number}:{i}"))

    for number in range(threads):
        scene.sim.spawn("c0", work, number)
    scene.sim.run_until(lambda: len(attempts) == threads * 20, 60)
    tokens = decode(scene.do(storage.load, X)[0]).tokens
    assert len(set(tokens)) == len(tokens) == 1 + threads * 20
    assert max(attempts) <= 2 * threads
    assert sum(attempts) <= 4 * len(attempts)
