"""States worth testing, counted when they are reached (testing.md 4, `sometimes`).

The nodes know nothing of it: functions that are called in such a state are wrapped for
the time of a run. A sweep prints the sums; what stays at zero is not tested at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from .runtime import Simulation

# name of the state: functions, `module:Class.method`
STATES = {
    "a store waits for a lock": "neo.storage.transactions:Transactions._park",
    "deadlock avoided": "neo.storage.transactions:Transactions._notify_deadlock",
    "relock": "neo.storage.transactions:Transactions.relock",
    "values spilled": "neo.storage.transactions:Transactions._spill",
    "lease ended": "neo.storage.transactions:Transactions._end_lease",
    "stalled transaction dropped": "neo.master.transactions:Transactions.stalled",
    "voted partition dropped": "neo.storage.transactions:Transactions._drop_partitions",
    "read waits for a lock": "neo.storage.pending:Pending.wait",
    "failed vote": "neo.master.transactions:Transactions.failed_vote",
    "incomplete transaction": "neo.master.transactions:Transactions._incomplete",
    "node expelled": "neo.master.app:Master.expel",
    "outcome asked of the master": "neo.master.transactions:Transactions.final_tid",
    "outcome searched": "neo.client.outcome:find",
    "lock finished by verification": (
        "neo.storage.initialization:Initialization.validate_transaction"
    ),
    "verification asks for the final tid": (
        "neo.master.verification:Verifying._search"
    ),
    "operation left": "neo.master.app:Master.leave_operation",
    "secondary master": "neo.master.election:Secondary.enter",
    "replication starts": "neo.storage.replication:Replication._start",
    "replication interrupted": "neo.storage.replication:Replication.failed",
    "replicated": "neo.storage.replication:Replication._replicated",
    "replication deletes": "neo.storage.replication:delete_objects",
    "the table settles": "neo.master.settling:Settling.table_changed",
    "cell dropped": "neo.storage.database.maintenance:SQLMaintenance.drop_partition",
    "storage told to exit": "neo.storage.app:StorageNode._expelled",
}


@contextmanager
def marked(sim: Simulation) -> Iterator[None]:
    """Count what a simulation reaches."""
    undo: list[tuple[Any, str, Callable[..., Any]]] = []
    for state, place in STATES.items():
        path, _, qualname = place.partition(":")
        owner: Any = import_module(path)
        *outer, name = qualname.split(".")
        for part in outer:
            owner = getattr(owner, part)
        function = owner.__dict__[name]
        undo.append((owner, name, function))
        setattr(owner, name, _counting(sim, state, function))
    try:
        yield
    finally:
        for owner, name, function in reversed(undo):
            setattr(owner, name, function)


def _counting(
    sim: Simulation, state: str, function: Callable[..., Any]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        sim.sometimes(state)
        return function(*args, **kwargs)

    return call
