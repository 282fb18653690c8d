"""Transactions under failure, step by step: who dies when, and what becomes of it.

`test_any_step` breaks something after each single event of a commit, whatever it is.
The tests after it are the rows of the table of failures (behaviour.md 3.12) and the
scenarios of behaviour.md 11 that need an exact moment.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError

from neo.client.exception import NEOStorageUnknownOutcome
from neo.client.Storage import Storage
from neo.lib.config import Limits
from neo.master.reputation import PERIOD
from tests.history import CONFLICT, FAIL, OK, READ, Value, decode
from tests.simulation.cluster import Cluster, Shape, transactions_of
from tests.simulation.conftest import base_seed
from tests.simulation.runtime import Simulation
from tests.simulation.workload import ALL, Tokens

STRIDE = 4
X, Y, Z = ALL[:3]  # in different partitions, if there are three


class Commit:
    """One transaction, whose steps run in an application thread of a client.

    `outcome`: "" as long as it is not known, "ok", or the class of the error.
    """

    def __init__(self, scene: Scene, token: str, client: str = "c0") -> None:
        self.scene = scene
        self.token = token
        self.client = client
        self.storage = scene.cluster.storage(client)
        self.txn = TransactionMetaData("", token)
        self.outcome = ""
        self.text = ""
        self.tid = b""
        self.process = scene.cluster.process(client)
        self.incarnation = self.process.incarnation

    def start(self, *steps: Callable[[], Any]) -> Commit:
        """Begin some steps; they go on when the simulation does."""
        self.scene.sim.spawn(self.client, self._run, steps)
        return self

    def run(self, *steps: Callable[[], Any]) -> Commit:
        """Do some steps."""
        self.scene.sim.call(self.client, self._run, steps)
        return self

    def _run(self, steps: tuple[Callable[[], Any], ...]) -> None:
        try:
            for step in steps:
                step()
        except (ConflictError, TransientError, NEOStorageUnknownOutcome) as error:
            self.outcome, self.text = type(error).__name__, str(error)
            self.storage.tpc_abort(self.txn)

    def store(self, *oids: bytes) -> Callable[[], None]:
        """Step: begin, and append the token to objects."""

        def step() -> None:
            storage = self.storage
            storage.sync()
            values = {oid: storage.load(oid) for oid in oids}
            storage.tpc_begin(self.txn)
            for oid, (data, serial) in values.items():
                value = decode(data).append(self.token).encode()
                storage.store(oid, serial, value, "", self.txn)

        return step

    def vote(self) -> None:
        """Step."""
        self.storage.tpc_vote(self.txn)

    def finish(self) -> None:
        """Step: the last one."""
        self.tid = self.storage.tpc_finish(self.txn)
        self.outcome = "ok"

    def abort(self) -> None:
        """Step: the last one, too."""
        self.storage.tpc_abort(self.txn)
        self.outcome = "aborted"

    def all(self, *oids: bytes) -> tuple[Callable[[], Any], ...]:
        """All steps."""
        return self.store(*oids), self.vote, self.finish

    @property
    def over(self) -> bool:
        """Whether it ended, if only because its client is dead."""
        process = self.process
        return bool(self.outcome) or not (
            process.alive and process.incarnation == self.incarnation
        )

    def wait(self, within: float = 60) -> str:
        """Wait for the end; the outcome."""
        self.scene.sim.run_until(lambda: self.over, within)
        return self.outcome


class Scene:
    """A running cluster with objects and no work but what a test starts."""

    def __init__(
        self,
        shape: Shape,
        seed: int | str = 0,
        limits: Limits | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.sim = Simulation(seed, latency=(0.0002, 0.002))
        self.cluster = Cluster(self.sim, shape, limits=limits)
        self.cluster.client_options = options or {}
        self.tokens = Tokens(self.sim)
        self.cluster.start()
        self.sim.run_until(lambda: self.cluster.healthy, 20)
        self.do(self.tokens.create, self.cluster.storage())

    def do(self, function: Callable[..., Any], *args: Any, client: str = "c0") -> Any:
        """Run a function in an application thread."""
        return self.cluster.call(function, *args, client=client)

    def commit(self, token: str, client: str = "c0") -> Commit:
        return Commit(self, token, client)

    def commits(self, client: str, *oids: bytes, within: float) -> float:
        """Let a client increment objects, as often as it takes; seconds it took."""
        start = self.sim.time
        thread = self.sim.spawn(client, self._commits, client, oids)
        self.sim.run_until(lambda: thread.dead, within)
        return self.sim.time - start

    def _commits(self, client: str, oids: tuple[bytes, ...]) -> None:
        for oid in oids:
            increment(self.cluster.storage(client), oid, f"by {client}")

    def tokens_of(self, oid: bytes, client: str = "c1") -> list[str]:
        """Who wrote an object."""

        def load() -> list[str]:
            storage = self.cluster.storage(client)
            storage.sync()
            return list(decode(storage.load(oid)[0]).tokens)

        tokens: list[str] = self.do(load, client=client)
        return tokens

    def audit(self) -> None:
        """Nothing is left, replicas are equal."""
        # A storage that clients could not reach twice is put aside for a minute.
        self.sim.run_until(lambda: self.cluster.healthy, 2 * PERIOD)
        self.sim.run(3)
        self.sim.run_until(lambda: self.cluster.healthy, 2 * PERIOD)
        by_partition: dict[str, Any] = {}
        for cell, content in self.cluster.replicas().items():
            partition = cell.split("/")[0]
            assert by_partition.setdefault(partition, content) == content, cell
        assert self.cluster.leftovers() == {}
        for name in self.cluster.storages:
            operation = self.sim.app(name).operation
            assert not operation.transactions.by_ttid, name
        primary = self.cluster.primary
        assert primary is not None
        assert not primary.transactions.in_progress


def increment(storage: Storage, oid: bytes, token: str) -> int:
    """Append to an object, as often as it takes; the number of attempts."""
    attempts = 0
    while True:
        attempts += 1
        txn = TransactionMetaData()
        try:
            storage.sync()
            data, serial = storage.load(oid)
            storage.tpc_begin(txn)
            storage.store(oid, serial, decode(data).append(token).encode(), "", txn)
            storage.tpc_vote(txn)
            storage.tpc_finish(txn)
            return attempts
        except (ConflictError, TransientError):
            storage.tpc_abort(txn)


# --- every step -----------------------------------------------------------------------

REPLICATED = Shape(storages=2, replicas=1, partitions=3, clients=2)
SPREAD = Shape(storages=3, partitions=3, clients=2)


def crash(name: str, power: bool = False) -> Callable[[Scene], None]:
    """Kill a node, which comes back after a second."""

    def fault(scene: Scene) -> None:
        scene.cluster.crash(name, power)
        if name not in scene.cluster.clients:
            scene.sim.after(1, lambda: scene.sim.restart(name))

    return fault


def reset(a: str, b: str) -> Callable[[Scene], None]:
    """Break the connections between two nodes."""
    return lambda scene: scene.sim.reset(a, b)  # type: ignore[return-value]


# What breaks: how, in which cluster; how long another client may have to wait then.
FAULTS: dict[str, tuple[Callable[[Scene], None], Shape, float]] = {
    "storage dies": (crash("s1"), REPLICATED, 1),
    "only storage of a partition dies": (crash("s1"), SPREAD, 5),
    "machine of a storage dies": (crash("s1", power=True), REPLICATED, 15),
    "client-storage link breaks": (reset("c0", "s1"), REPLICATED, 1),
    "only client-storage link breaks": (reset("c0", "s1"), SPREAD, 1),
    "client-master link breaks": (reset("c0", "m0"), REPLICATED, 1),
    "client dies": (crash("c0"), REPLICATED, 1),
    "storage-master link breaks": (reset("s1", "m0"), REPLICATED, 1),
    "only storage-master link breaks": (reset("s1", "m0"), SPREAD, 5),
    "master dies": (crash("m0"), REPLICATED, 5),
    "master dies, no replicas": (crash("m0"), SPREAD, 5),
}


@pytest.mark.parametrize("name", FAULTS)
def test_any_step(name: str) -> None:
    """A fault after each event of a commit: never lost, never half, never stuck.

    One event out of STRIDE: others tomorrow.
    """
    fault, shape, limit = FAULTS[name]
    outcomes: dict[str, int] = {}
    after = zlib.crc32(base_seed().encode()) % STRIDE
    while True:
        scene = Scene(shape, seed=f"{name} {after}")
        commit = scene.commit("t")
        commit.start(*commit.all(X, Y, Z))
        for _ in range(after):
            scene.sim.step()
        if commit.over:
            break
        fault(scene)
        scene.commits("c1", X, Y, Z, within=limit)
        outcome = commit.wait()
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        scene.audit()
        present = ["t" in scene.tokens_of(oid) for oid in (X, Y, Z)]
        assert present in ([True] * 3, [False] * 3), (after, outcome)
        if commit.outcome:
            assert present[0] == (outcome == "ok"), (after, outcome, commit.text)
        assert outcome != "NEOStorageUnknownOutcome", after
        for oid in (X, Y, Z):
            assert scene.tokens_of(oid).count("by c1") == 1
        after += STRIDE
    assert after > 50
    assert name == "client dies" or outcomes["ok"], outcomes


# --- locks ----------------------------------------------------------------------------


def test_threads_that_conflict_take_turns() -> None:
    """Nobody starves, although who wins is ready to win again before all others."""
    scene = Scene(Shape(clients=1))
    storage = scene.cluster.storage()
    attempts: list[int] = []
    threads = 8

    def work(number: int) -> None:
        for i in range(20):
            attempts.append(increment(storage, X, f"{number}:{i}"))  # noqa: PERF401

    for number in range(threads):
        scene.sim.spawn("c0", work, number)
    scene.sim.run_until(lambda: len(attempts) == threads * 20, 60)
    tokens = scene.tokens_of(X, "c0")
    assert len(set(tokens)) == len(tokens) == 1 + threads * 20
    assert max(attempts) <= 2 * threads
    assert sum(attempts) <= 4 * len(attempts)


# --- leases ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["stored", "voted"])
def test_client_that_stalls(steps: str) -> None:
    """Others wait for no longer than its lease, what it does late is refused."""
    scene = Scene(REPLICATED, limits=Limits(lease=5))
    commit = scene.commit("late")
    commit.run(commit.store(X, Y), *([commit.vote] if steps == "voted" else []))
    scene.sim.pause("c0")
    assert 4 < scene.commits("c1", X, Y, within=10) < 6
    scene.sim.run(20)
    scene.sim.resume("c0")
    scene.sim.run(1)
    commit.start(commit.vote, commit.finish) if steps == "stored" else commit.start(
        commit.finish
    )
    assert commit.wait() == "NEOStorageTransientError"
    assert "late" not in scene.tokens_of(X)
    again = scene.commit("again")
    assert again.run(*again.all(X, Y)).outcome == "ok"
    scene.audit()
    primary = scene.cluster.primary
    assert primary is not None
    assert len(primary.transactions.ready) == 2  # nobody was expelled


def test_client_that_stalls_once_finish_is_asked() -> None:
    """Its transaction is committed, and it learns so."""
    scene = Scene(REPLICATED, limits=Limits(lease=5))
    commit = scene.commit("t")
    commit.run(commit.store(X, Y), commit.vote).start(commit.finish)
    primary = scene.cluster.primary
    assert primary is not None
    scene.sim.run_until(lambda: primary.transactions.queue)
    scene.sim.pause("c0")
    assert scene.commits("c1", X, Y, within=10) < 1
    scene.sim.run(20)
    scene.sim.resume("c0")
    assert commit.wait() == "ok"
    assert scene.tokens_of(X)[1:] == ["t", "by c1"]
    scene.audit()


def test_lease_of_a_transaction_whose_failed_vote_waits() -> None:
    """Its client is told."""
    scene = Scene(
        Shape(storages=3, replicas=1, partitions=3, clients=3), limits=Limits(lease=5)
    )
    for client, storage in (("c0", "s2"), ("c1", "s1")):
        scene.sim.link(client, storage).refused = True
        scene.sim.reset(client, storage)
    scene.sim.run(0.1)
    first, second = scene.commit("first"), scene.commit("second", "c1")
    first.run(first.store(X, Y, Z), first.vote)
    second.start(second.store(*ALL[3:6]), second.vote, second.finish)
    scene.sim.run(1)
    assert second.outcome == ""
    primary = scene.cluster.primary
    assert primary is not None
    assert primary.transactions._votes
    assert scene.commits("c2", *ALL[3:6], within=10) < 8
    assert second.wait() == "NEOStorageTransientError"
    assert first.run(first.finish).outcome == "ok"
    scene.sim.heal()
    scene.audit()


# --- the outcome of a finish ----------------------------------------------------------


def locked_at(scene: Scene, name: str) -> bool:
    """Whether a storage has a transaction that is locked, not unlocked."""
    by_ttid = scene.sim.app(name).operation.transactions.by_ttid
    return any(t.tid is not None for t in by_ttid.values())


@pytest.mark.parametrize("others", [0, 3])
def test_master_link_breaks_before_all_have_locked(others: int) -> None:
    """Scenarios 63 and 66: the master answers AskFinalTID, with its id."""
    scene = Scene(SPREAD)
    commit = scene.commit("t")
    commit.run(commit.store(X, Y), commit.vote)
    scene.sim.clog("s0", "m0")
    commit.start(commit.finish)
    scene.sim.run(0.1)
    assert locked_at(scene, "s0")
    scene.sim.reset("c0", "m0")
    scene.sim.run(0.1)
    more = [scene.commit(f"more {i}") for i in range(others)]
    for i, other in enumerate(more):
        other.start(*other.all(ALL[3 + i]))
    scene.sim.run(1)
    assert commit.outcome == ""
    scene.sim.unclog("s0", "m0")
    assert commit.wait(1) == "ok"
    assert [other.wait(1) for other in more] == ["ok"] * others
    assert scene.tokens_of(X)[1:] == ["t"]
    scene.audit()


@pytest.mark.parametrize("applied", [False, True])
def test_master_link_breaks_after_the_commit(applied: bool) -> None:
    """Scenarios 64 and 65: a storage knows, from its memory or its database."""
    scene = Scene(SPREAD)
    commit = scene.commit("t")
    commit.run(commit.store(X, Y), commit.vote)
    scene.sim.clog("m0", "c0")
    if not applied:
        # The lock is asked, the unlock stays on its way.
        primary = scene.cluster.primary
        assert primary is not None
        commit.start(commit.finish)
        involved = [
            name
            for name in scene.cluster.storages
            if scene.sim.app(name).operation.transactions.by_ttid
        ]
        scene.sim.run_until(lambda: all(locked_at(scene, name) for name in involved))
        for name in scene.cluster.storages:
            scene.sim.clog("m0", name)
        scene.sim.run(0.2)
        assert not primary.transactions.queue
        assert all(locked_at(scene, name) for name in involved)
    else:
        commit.start(commit.finish)
        scene.sim.run(0.5)
        assert not any(locked_at(scene, name) for name in scene.cluster.storages)
    scene.sim.reset("c0", "m0")
    scene.sim.unclog("m0", "c0")
    if not applied:
        scene.sim.run(0.2)
        for name in scene.cluster.storages:
            scene.sim.unclog("m0", name)
    assert commit.wait(2) == "ok"
    assert scene.tokens_of(X)[1:] == ["t"]
    scene.audit()


def test_outcome_that_nobody_tells() -> None:
    """It is unknown after `connect_timeout`, which other transactions respect, too."""
    scene = Scene(SPREAD, options={"connect_timeout": 3.0})
    commit = scene.commit("t")
    commit.run(commit.store(X, Y), commit.vote)
    scene.sim.clog("s0", "m0")
    commit.start(commit.finish)
    scene.sim.run(0.1)
    scene.sim.reset("c0", "m0")
    scene.sim.run(1)
    other = scene.commit("u")
    other.start(*other.all(Z))
    scene.sim.run(1)
    assert (commit.outcome, other.outcome) == ("", "")
    assert commit.wait(1.5) == "NEOStorageUnknownOutcome"
    assert other.wait(2.5) == "NEOStorageTransientError"
    scene.sim.unclog("s0", "m0")
    scene.sim.run(0.1)
    again = scene.commit("v")
    assert again.run(*again.all(Z)).outcome == "ok"
    assert scene.tokens_of(X)[1:] == ["t"]
    scene.audit()


def test_abort_while_the_outcome_of_another_is_asked() -> None:
    """Nothing goes to the master meanwhile; then, the abort, which ends it there."""
    scene = Scene(SPREAD)
    commit, other = scene.commit("t"), scene.commit("u")
    commit.run(commit.store(X, Y), commit.vote)
    scene.sim.clog("s0", "m0")
    commit.start(commit.finish)
    scene.sim.run(0.1)
    scene.sim.reset("c0", "m0")
    core = scene.cluster.storage()._core
    scene.sim.run_until(lambda: core.ready)
    assert not core.exclusive
    other.run(other.store(Z))  # the other one looks again every 0.1 s
    scene.sim.run(0.2)
    assert core.exclusive
    primary = scene.cluster.primary
    assert primary is not None
    other.run(other.abort)
    scene.sim.run(0.2)
    assert len(primary.transactions.in_progress) == 2
    scene.sim.unclog("s0", "m0")
    assert commit.wait(1) == "ok"
    scene.sim.run(0.2)
    assert not primary.transactions.in_progress
    scene.audit()


def test_cluster_stops_between_lock_and_answer() -> None:
    """Scenario 67: after the recovery, the commit is successful; oids don't collide."""
    scene = Scene(SPREAD)
    commit = scene.commit("t")
    storage = scene.cluster.storage()
    new = scene.do(storage.new_oid)
    commit.run(
        commit.store(X, Y),
        lambda: storage.store(new, bytes(8), Value().encode(), "", commit.txn),
        commit.vote,
    )
    for name in scene.cluster.storages:
        scene.sim.clog(name, "m0")
    commit.start(commit.finish)
    scene.sim.run_until(lambda: locked_at(scene, "s0") and locked_at(scene, "s1"))
    scene.sim.run(0.1)
    scene.cluster.crash("m0")
    for name in scene.cluster.storages:
        scene.sim.unclog(name, "m0")
    scene.sim.run(1)
    scene.sim.restart("m0")
    assert commit.wait(20) == "ok"
    assert scene.tokens_of(X)[1:] == ["t"]
    mine = scene.do(storage.new_oid)
    other = scene.do(scene.cluster.storage("c1").new_oid, client="c1")
    assert len({new, mine, other}) == 3
    scene.audit()


# --- arbitration ----------------------------------------------------------------------


def crossed() -> tuple[Scene, Commit, Commit]:
    """Scenario 52: each of two clients misses another storage, both write one object
    of the partition that these two have.
    """
    scene = Scene(Shape(storages=3, replicas=1, partitions=3, clients=3))
    primary = scene.cluster.primary
    assert primary is not None
    apps = {name: scene.sim.app(name) for name in scene.cluster.storages}
    nids = list(primary.pt.cells[0])
    first, second = (n for n, app in apps.items() if app.nid in nids)
    for client, storage in (("c0", second), ("c1", first)):
        scene.sim.link(client, storage).refused = True
        scene.sim.reset(client, storage)
    scene.sim.run(0.1)
    return scene, scene.commit("a"), scene.commit("b", "c1")


@pytest.mark.parametrize("end", ["finish", "abort"])
def test_crossed_failures(end: str) -> None:
    """Scenarios 52 and 54: never both; who votes second waits for the first's end."""
    scene, a, b = crossed()
    a.run(a.store(X), a.vote)
    b.start(*b.all(X))
    scene.sim.run(2)
    assert b.outcome == ""
    a.run(a.finish if end == "finish" else a.abort)
    assert b.wait(2) == ("NEOStorageTransientError" if end == "finish" else "ok"), (
        b.text
    )
    assert scene.tokens_of(X, "c2")[1:] == (["a"] if end == "finish" else ["b"])
    scene.sim.heal()
    scene.audit()
    assert scene.tokens_of(X, "c2")[1:] == (["a"] if end == "finish" else ["b"])


def test_third_storage_dies_before_the_finish() -> None:
    """Scenario 53: refused; the cluster stays operational."""
    scene, a, _ = crossed()
    a.run(a.store(X), a.vote)
    primary = scene.cluster.primary
    assert primary is not None
    apps = {name: scene.sim.app(name) for name in scene.cluster.storages}
    nids = list(primary.pt.cells[0])
    (third,) = (name for name, app in apps.items() if app.nid not in nids)
    scene.cluster.crash(third)
    scene.sim.run(0.1)
    assert a.run(a.finish).outcome == "NEOStorageTransientError"
    assert scene.cluster.running
    assert scene.tokens_of(X, "c2") == ["init"]
    scene.sim.heal()
    scene.sim.restart(third)
    scene.audit()


# --- links that break again and again -------------------------------------------------


@pytest.mark.parametrize("pair", [("c0", "m0"), ("c0", "s0"), ("s0", "m0")])
def test_link_that_breaks_often(pair: tuple[str, str]) -> None:
    """Every client still works; whoever lost an answer to finish learns its outcome."""
    scene = Scene(REPLICATED, seed=f"{pair}")
    scene.tokens.think = 0.1
    sim, tokens = scene.sim, scene.tokens
    for name in scene.cluster.clients:
        tokens.start(name, scene.cluster.storage(name))
    rng = sim.rng("faults")
    resets = 0
    while resets < 20:
        sim.run(rng.expovariate(1 / 0.1))
        resets += bool(sim.reset(*pair))
    times = [a.end for a in tokens.attempts if a.outcome == OK and a.end is not None]
    assert max(b - a for a, b in pairwise(sorted(times))) < 1.5
    tokens.stopping = True
    sim.run_until(lambda: not tokens.running, 5)
    assert {a.outcome for a in tokens.attempts} <= {OK, CONFLICT, FAIL, READ}
    scene.audit()
    replicas = scene.cluster.replicas()
    scene.do(tokens.check, scene.cluster.storage(), replicas, transactions_of(replicas))
