"""Imports that are interrupted: what is committed is the beginning of the source.

Several transactions are finished at once, so that the next ones may be on a disk when
an earlier one is not.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from random import Random  # noqa: TID251 seeded
from typing import Any

import pytest
from ZODB.BaseStorage import DataRecord, TransactionRecord

from neo.client.exception import NEOStorageError
from neo.lib.util import add64, p64
from tests.simulation.cluster import Shape
from tests.simulation.conftest import base_seed
from tests.simulation.test_transactions import (
    FAULTS,
    REPLICATED,
    SPREAD,
    Scene,
    crash,
    reset,
)

NUMBER = 12  # transactions
STRIDE = 60  # events from one fault to the next
ALONE = Shape(partitions=3, clients=2)
TWO = Shape(storages=2, partitions=4, clients=2)


class Imported(TransactionRecord):
    """A transaction of a source."""

    def __init__(self, tid: bytes, contents: dict[bytes, bytes]) -> None:
        super().__init__(tid, " ", b"", b"", b"")
        self.contents = contents

    def __iter__(self) -> Iterator[DataRecord]:
        for oid, data in self.contents.items():
            yield DataRecord(oid, self.tid, data, None)


class Source:
    """Transactions that modify few objects, again and again."""

    def __init__(self, first: bytes, seed: object) -> None:
        rng = Random(str(seed))
        self.transactions = [
            Imported(
                add64(first, 1 + 7 * number),
                {
                    p64(1000 + i): b"%d in %d" % (i, number)
                    for i in rng.sample(range(12), rng.randint(1, 3))
                },
            )
            for number in range(NUMBER)
        ]

    def iterator(self) -> Iterator[Imported]:
        return iter(self.transactions)

    def contents(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        return [(txn.tid, txn.contents) for txn in self.transactions]


def all_machines_die(scene: Scene) -> None:
    """What no sync has made durable is lost."""
    cluster = scene.cluster
    for name in (*cluster.storages, "m0"):
        cluster.crash(name, power=True)
    scene.sim.after(1, cluster.restart)


CASES: dict[str, tuple[Callable[[Scene], None], Shape]] = {
    **{name: FAULTS[name][:2] for name in FAULTS if "other" not in name},
    "one storage and its master die": (all_machines_die, ALONE),
    "all machines die": (all_machines_die, REPLICATED),
    "all machines die, no replicas": (all_machines_die, TWO),
    "all machines die, three storages": (all_machines_die, SPREAD),
    "only storage dies": (crash("s0", power=True), ALONE),
    "client-master link breaks, one storage": (reset("c0", "m0"), ALONE),
}


class Interrupted:
    """A cluster in which an import is broken off after some events."""

    def __init__(self, name: str, after: int) -> None:
        fault, shape = CASES[name]
        self.scene = Scene(shape, seed=f"{name} {after}")
        self.cluster = self.scene.cluster
        self.first = self.do(lambda storage: storage.lastTransaction())
        self.source = Source(self.first, after)
        self.outcome = ""
        process = self.cluster.process("c0")
        self.scene.sim.spawn("c0", self._copy)
        for _ in range(after):
            self.scene.sim.step()
        self.in_time = not self.outcome
        if self.in_time:
            fault(self.scene)
            self.scene.sim.run_until(lambda: self.outcome or not process.alive, 60)
            self.scene.audit()

    def _copy(self) -> None:
        storage: Any = self.cluster.storage()
        try:
            storage.copyTransactionsFrom(self.source)
        except NEOStorageError as error:
            self.outcome = type(error).__name__
        else:
            self.outcome = "ok"

    def do(self, function: Callable[[Any], Any]) -> Any:
        """Let another client use its storage."""
        return self.cluster.call(
            lambda: function(self.cluster.storage("c1")), client="c1"
        )

    def contents(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """What was imported."""

        def read(storage: Any) -> Any:
            storage.sync()
            return [
                (txn.tid, {record.oid: record.data for record in txn})
                for txn in storage.iterator(add64(self.first, 1))
            ]

        found: list[tuple[bytes, dict[bytes, bytes]]] = self.do(read)
        return found


@pytest.mark.parametrize("name", CASES)
def test_any_step(name: str) -> None:
    """A fault anywhere; then another import continues it."""
    after = zlib.crc32(base_seed().encode()) % STRIDE
    while True:
        run = Interrupted(name, after)
        if not run.in_time:
            assert run.outcome == "ok"
            return
        expected, found = run.source.contents(), run.contents()
        assert found == expected[: len(found)], run.outcome
        assert run.outcome != "ok" or len(found) == NUMBER
        del run.source.transactions[: len(found)]
        run.do(lambda storage, run=run: storage.copyTransactionsFrom(run.source))  # type: ignore[misc]
        assert run.contents() == expected
        after += STRIDE
