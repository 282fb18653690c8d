"""Scenarios of behaviour.md 11, C and D: commits, arbitration, locks, conflicts.

Those of `test_transactions.py` that need an exact moment are there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from ZODB.POSException import ReadConflictError

from neo.lib.protocol import CellState
from neo.lib.pt import PartitionTable
from tests.history import decode
from tests.simulation.cluster import Shape
from tests.simulation.test_transactions import (
    REPLICATED,
    SPREAD,
    Commit,
    Scene,
    X,
    Y,
    Z,
)
from tests.simulation.workload import RESOLVABLE

R = RESOLVABLE


def store_on(commit: Commit, *oids: bytes) -> Callable[[], None]:
    """Step: append to more objects, from what is loaded now."""

    def step() -> None:
        for oid in oids:
            data, serial = commit.storage.load(oid)
            value = decode(data).append(commit.token).encode()
            commit.storage.store(oid, serial, value, "", commit.txn)

    return step


def at(scene: Scene, oid: bytes) -> str:
    """The storage that has an object, which has one copy."""
    primary = scene.cluster.primary
    assert primary is not None
    (nid,) = primary.pt.cells[primary.pt.partition_of(oid)]
    names = {scene.sim.app(name).nid: name for name in scene.cluster.storages}
    return names[nid]


# --- C: links -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [REPLICATED, SPREAD], ids=["replicated", "spread"])
def test_17_49_all_links_to_storages_close_before_a_commit(shape: Shape) -> None:
    """The client connects again; no node is given up."""
    scene = Scene(shape)
    for name in scene.cluster.storages:
        scene.sim.reset("c0", name)
    commit = scene.commit("t")
    assert commit.run(*commit.all(X, Y, Z)).outcome == "ok"
    assert scene.cluster.healthy
    assert scene.tokens_of(Y)[1:] == ["t"]
    scene.audit()


def test_50_link_that_was_used_breaks_and_returns() -> None:
    """The storage is out for this transaction, and used by the next ones."""
    scene = Scene(REPLICATED)
    commit = scene.commit("t")
    commit.run(commit.store(X))
    scene.sim.reset("c0", "s1")
    scene.sim.run(0.2)
    assert commit.run(store_on(commit, Y), commit.vote, commit.finish).outcome == "ok"
    scene.sim.run_until(lambda: scene.cluster.healthy, 5)
    again = scene.commit("u")
    assert again.run(*again.all(X)).outcome == "ok"
    assert scene.cluster.healthy
    scene.cluster.crash("s0")
    assert scene.tokens_of(X)[1:] == ["t", "u"]
    scene.cluster.restart("s0")
    scene.audit()


def test_51_link_breaks_when_the_vote_is_sent() -> None:
    """Without a copy: nothing is committed, the cluster does not care."""
    scene = Scene(SPREAD)
    storage = scene.cluster.storage("c1")
    last = scene.do(storage.lastTransaction, client="c1")
    commit = scene.commit("t")
    commit.run(commit.store(X, Y))
    scene.sim.clog("c0", at(scene, X))
    commit.start(commit.vote, commit.finish)
    scene.sim.run(0.1)
    scene.sim.reset("c0", at(scene, X))
    assert commit.wait(5) == "NEOStorageTransientError"
    assert scene.cluster.healthy
    scene.sim.heal()
    assert scene.tokens_of(X) == scene.tokens_of(Y) == ["init"]
    assert scene.do(storage.lastTransaction, client="c1") == last
    scene.audit()


def test_56_one_replica_reports_a_conflict_the_other_does_not_know() -> None:
    """It was disconnected for a commit, and has not seen that yet."""
    scene = Scene(REPLICATED)
    scene.sim.link("c1", "s1").refused = True
    scene.sim.reset("c1", "s1")
    scene.sim.run(0.1)
    for order in (("s0", "s1"), ("s1", "s0")):
        first = scene.commit(f"{order[0]} first {R}", "c0")
        first.run(first.store(Z), first.abort)  # connected to all
        base = scene.do(scene.cluster.storage().load, X)
        scene.sim.clog("m0", "s1")
        scene.sim.clog("m0", "c0")
        other = scene.commit(f"{order}", "c1")
        assert other.run(*other.all(X)).outcome == "ok"
        mine = scene.commit(f"{order} {R}", "c0")

        def store(mine: Commit = mine, base: Any = base) -> None:
            value = decode(base[0]).append(mine.token).encode()
            mine.storage.store(X, base[1], value, "", mine.txn)

        begin = [lambda mine=mine: mine.storage.tpc_begin(mine.txn)]
        for name in order:
            scene.sim.clog(name, "c0")
        scene.sim.unclog("m0", "c0")
        mine.start(*begin, store, mine.vote, mine.finish)
        for name in order:
            scene.sim.run(0.1)
            scene.sim.unclog(name, "c0")
        scene.sim.run(0.1)
        scene.sim.unclog("m0", "s1")
        assert mine.wait(20) == "ok", mine.text
        tokens = scene.tokens_of(X, "c1")
        assert tokens.count(mine.token) == tokens.count(other.token) == 1
        scene.sim.run_until(lambda: scene.cluster.healthy, 70)
    scene.sim.heal()
    scene.audit()


def outdated_cells(pt: PartitionTable) -> list[int]:
    """Partitions that have one."""
    return [p for p, _, state in pt if state is CellState.OUT_OF_DATE]


def outdated(scene: Scene) -> bytes:
    """Let s1 be out of date, and stay so as long as the link from s0 is clogged.

    Returns the base of X on which the next store of c0 conflicts.
    """
    base = scene.do(scene.cluster.storage().load, X)
    scene.cluster.crash("s1")
    other = scene.commit("other", "c1")
    assert other.run(*other.all(X)).outcome == "ok"
    scene.sim.clog("s0", "s1")
    scene.cluster.restart("s1")
    primary = scene.cluster.primary
    assert primary is not None
    scene.sim.run_until(lambda: len(primary.transactions.ready) == 2, 10)
    scene.sim.run(0.2)
    assert outdated_cells(primary.pt)
    serial: bytes = base[1]
    return serial


def conflicting(scene: Scene, serial: bytes) -> Commit:
    """A transaction that increments X from an old base."""
    commit = scene.commit(f"mine {R}")

    def store() -> None:
        commit.storage.sync()
        commit.storage.tpc_begin(commit.txn)
        data = commit.storage.loadSerial(X, serial)
        value = decode(data).append(commit.token).encode()
        commit.storage.store(X, serial, value, "", commit.txn)

    return commit.start(store, commit.vote, commit.finish)


def test_58_an_outdated_replica_answers_blind() -> None:
    """The conflict of the other one counts."""
    scene = Scene(REPLICATED)
    commit = conflicting(scene, outdated(scene))
    assert commit.wait(5) == "ok", commit.text
    assert scene.tokens_of(X) == ["init", "other", commit.token]
    scene.sim.unclog("s0", "s1")
    scene.audit()
    assert scene.tokens_of(X) == ["init", "other", commit.token]


@pytest.mark.parametrize("dies", [False, True], ids=["replicated", "source dies"])
def test_55_91_to_94_replication_ends_during_a_conflict(dies: bool) -> None:
    """After each event of a blind write and its resolution, s1 gets up to date.

    Then the other replica dies, or not: a correct commit or a refusal, and never an
    increment that is lost or counted twice.
    """
    after, outcomes = 0, set()
    while True:
        scene = Scene(REPLICATED, seed=f"blind {after}")
        commit = conflicting(scene, outdated(scene))
        for _ in range(after):
            scene.sim.step()
        over = commit.over
        scene.sim.unclog("s0", "s1")
        if dies:
            primary = scene.cluster.primary
            assert primary is not None
            scene.sim.run_until(lambda pt=primary.pt: not outdated_cells(pt), 10)
            scene.cluster.crash("s0")
            scene.sim.after(1, lambda scene=scene: scene.sim.restart("s0"))
        outcome = commit.wait(20)
        outcomes.add(outcome)
        scene.audit()
        tokens = scene.tokens_of(X)
        assert tokens[:2] == ["init", "other"], after
        assert tokens.count(commit.token) == (outcome == "ok"), (after, outcome)
        if over:
            break
        after += 9
    assert after > 30
    assert "ok" in outcomes


def test_60_abort_while_a_store_is_on_its_way() -> None:
    """It arrives after the store, and frees the object."""
    scene = Scene(Shape(clients=2))
    commit = scene.commit("t")
    scene.sim.clog("c0", "s0")
    commit.start(commit.store(X), commit.abort)
    scene.sim.run(0.5)
    scene.sim.unclog("c0", "s0")
    assert commit.wait(1) == "aborted"
    assert scene.commits("c1", X, within=1) < 0.5
    assert scene.tokens_of(X) == ["init", "by c1"]
    scene.audit()


def test_70_transaction_without_object() -> None:
    """It is in the iterator, without any oid."""
    scene = Scene(SPREAD)
    commit = scene.commit("nothing")
    storage = commit.storage
    commit.run(lambda: storage.tpc_begin(commit.txn), commit.vote, commit.finish)
    assert commit.outcome == "ok"

    def last() -> tuple[bytes, list[bytes]]:
        *_, transaction = storage.iterator()
        return transaction.tid, [record.oid for record in transaction]

    assert scene.do(last) == (commit.tid, [])
    scene.audit()


def test_76_oid_greater_than_the_last_one() -> None:
    """New oids are greater, also after a restart of all."""
    scene = Scene(SPREAD)
    commit = scene.commit("t")
    storage = commit.storage
    great = (10**9).to_bytes(8, "big")
    commit.run(
        lambda: storage.tpc_begin(commit.txn),
        lambda: storage.store(great, bytes(8), b"x", "", commit.txn),
        commit.vote,
        commit.finish,
    )
    assert commit.outcome == "ok"
    assert scene.do(scene.cluster.storage("c1").new_oid, client="c1") > great
    for name in scene.cluster.nodes:
        scene.cluster.crash(name)
    scene.cluster.restart()
    scene.sim.run_until(lambda: scene.cluster.healthy, 20)
    assert scene.do(scene.cluster.storage("c1").new_oid, client="c1") > great


def test_30_checked_object_of_another_storage() -> None:
    """The master dies when both have locked: committed, as all others."""
    scene = Scene(SPREAD)
    commit = scene.commit("t")

    def check() -> None:
        serial = commit.storage.load(Y)[1]
        commit.storage.checkCurrentSerialInTransaction(Y, serial, commit.txn)

    commit.run(commit.store(X), check, commit.vote)
    for name in scene.cluster.storages:
        scene.sim.clog(name, "m0")
    commit.start(commit.finish)
    scene.sim.run(0.2)
    scene.cluster.crash("m0")
    scene.sim.heal()
    scene.sim.run(1)
    scene.sim.restart("m0")
    assert commit.wait(20) == "ok"
    assert scene.tokens_of(X)[1:] == ["t"]
    scene.audit()


def test_75_checked_object_was_changed() -> None:
    """ReadConflictError, and the object can be changed again."""
    scene = Scene(SPREAD)
    commit = scene.commit("t")
    commit.run(commit.store(X))
    assert scene.commits("c1", Y, within=1) < 1
    errors: list[BaseException] = []

    def check() -> None:
        old = scene.tokens.attempts[0].tid
        try:
            commit.storage.checkCurrentSerialInTransaction(Y, old, commit.txn)
            commit.storage.tpc_vote(commit.txn)
        except ReadConflictError as e:
            errors.append(e)

    commit.run(check, commit.abort)
    assert len(errors) == 1
    assert scene.commits("c1", X, Y, within=1) < 1
    scene.audit()


def test_77_a_new_oid_is_stored_twice() -> None:
    """By two clients, the second one with a value as big as its cache."""
    scene = Scene(SPREAD, options={"cache_size": 2000})
    oid = (10**6).to_bytes(8, "big")
    outcomes = []
    for client in ("c0", "c1"):
        commit = scene.commit(client, client)
        commit.run(
            lambda c=commit: c.storage.tpc_begin(c.txn),
            lambda c=commit: c.storage.store(oid, bytes(8), b"x" * 2000, "", c.txn),
            commit.vote,
            commit.finish,
        )
        outcomes.append(commit.outcome)
    assert outcomes == ["ok", "ConflictError"]
    scene.audit()


# --- D: locks, deadlocks --------------------------------------------------------------


@pytest.mark.parametrize("first", ["c0", "c1"])
def test_84_85_86_each_client_locks_at_another_replica(first: str) -> None:
    """Then each asks the other replica: one gives its lock back, both commit."""
    scene = Scene(REPLICATED)
    commits = [scene.commit(f"{name} {R}", name) for name in ("c0", "c1")]
    scene.sim.clog("c0", "s1")
    scene.sim.clog("c1", "s0")
    for commit in commits:
        commit.start(*commit.all(X))
    scene.sim.run(0.3)
    other = "s1" if first == "c0" else "s0"
    scene.sim.unclog(first, other)
    scene.sim.run(0.3)
    scene.sim.heal()
    assert [commit.wait(3) for commit in commits] == ["ok", "ok"]
    tokens = scene.tokens_of(X, "c0")
    assert sorted(tokens) == sorted(["init", *(c.token for c in commits)])
    scene.audit()


@pytest.mark.parametrize("resolvable", [True, False])
def test_88_89_three_transactions_in_a_circle(resolvable: bool) -> None:
    """Those that can't resolve may lose, but never all, and nobody waits for ever."""
    scene = Scene(Shape(storages=3, partitions=3, clients=3))
    oids = [(X, Y), (Y, Z), (Z, X)]
    commits = []
    for i, pair in enumerate(oids):
        token = f"c{i} {R if resolvable or i < 2 else '-'}"
        commit = scene.commit(token, f"c{i}")
        commit.run(commit.store(pair[0]))
        commits.append((commit, pair))
    for commit, pair in commits:
        commit.start(store_on(commit, pair[1]), commit.vote, commit.finish)
    outcomes = [commit.wait(5) for commit, _ in commits]
    assert outcomes[:2] == ["ok", "ok"]
    assert outcomes[2] == "ok" or not resolvable
    for (commit, pair), outcome in zip(commits, outcomes, strict=True):
        for oid in pair:
            present = commit.token in scene.tokens_of(oid, "c0")
            assert present == (outcome == "ok")
    scene.audit()


def test_89_same_oids_in_different_orders() -> None:
    """Everybody commits."""
    scene = Scene(Shape(storages=3, partitions=3, clients=3))
    orders = [(X, Y, Z), (Z, Y, X), (Y, Z, X)]
    commits = [scene.commit(f"c{i} {R}", f"c{i}") for i in range(3)]
    for commit, order in zip(commits, orders, strict=True):
        commit.start(*commit.all(*order))
    assert [commit.wait(5) for commit in commits] == ["ok"] * 3
    for oid in (X, Y, Z):
        assert len(scene.tokens_of(oid)) == 4
    scene.audit()


def test_95_three_increments() -> None:
    """One after the other: four revisions, each on the one before."""
    scene = Scene(Shape(storages=2, replicas=1, clients=3))
    commits = [scene.commit(f"c{i} {R}", f"c{i}") for i in range(3)]
    for commit in commits:
        commit.start(*commit.all(X))
    assert [commit.wait(5) for commit in commits] == ["ok"] * 3
    storage = scene.cluster.storage()

    def revisions() -> list[list[str]]:
        history = storage.history(X, 9)
        return [list(decode(storage.loadSerial(X, h["tid"])).tokens) for h in history]

    found: list[list[str]] = scene.do(revisions)
    assert len(found) == 4
    for newer, older in pairwise(found):
        assert newer[:-1] == older
    scene.audit()


@pytest.mark.parametrize("early", [True, False])
def test_97_the_second_conflict_answers_the_first_store(early: bool) -> None:
    """It is resolved from the data that are held by then, not from the older ones.

    s0 reports A's commit, mine is merged and stored again; s1 gets the first store only
    when B has committed too.
    """
    scene = Scene(REPLICATED)
    serial = scene.do(scene.cluster.storage().load, X)[1]
    a, b = scene.commit("A", "c1"), scene.commit(f"B {R}", "c1")
    assert a.run(*a.all(X)).outcome == "ok"
    scene.sim.clog("c0", "s1")
    if early:
        b.run(b.store(X))
        scene.sim.run(0.1)
    mine = conflicting(scene, serial)
    scene.sim.run(0.2)
    scene.sim.clog("s0", "c0")
    b.start(*([b.vote, b.finish] if early else b.all(X)))
    scene.sim.run(0.2)
    scene.sim.unclog("c0", "s1")
    scene.sim.run(0.2)
    scene.sim.heal()
    assert [mine.wait(10), b.wait(10)] == ["ok", "ok"]
    tokens = scene.tokens_of(X)
    assert tokens[:2] == ["init", "A"]
    assert sorted(tokens[2:]) == sorted([b.token, mine.token])
    scene.audit()


def test_98_conflict_with_what_is_not_notified_yet() -> None:
    """The client asks the master first: it resolves with what it may read."""
    scene = Scene(REPLICATED)
    scene.sim.clog("m0", "c0")
    storage = scene.cluster.storage()
    serial = scene.do(storage.load, X)[1]
    scene.sim.unclog("m0", "c0")
    commit = scene.commit(f"mine {R}")
    commit.run(lambda: storage.tpc_begin(commit.txn))
    scene.sim.clog("m0", "c0")
    assert scene.commits("c1", X, within=1) < 1

    def store() -> None:
        value = decode(storage.loadSerial(X, serial)).append(commit.token).encode()
        storage.store(X, serial, value, "", commit.txn)

    commit.start(store, commit.vote, commit.finish)
    scene.sim.run(0.5)
    assert commit.outcome == ""
    scene.sim.unclog("m0", "c0")
    assert commit.wait(1) == "ok"
    assert scene.tokens_of(X) == ["init", "by c1", commit.token]
    scene.audit()


def test_87_deadlock_is_notified_after_the_vote_began() -> None:
    """Ignored: the transaction commits."""
    scene = Scene(REPLICATED)
    old, young = scene.commit(f"old {R}"), scene.commit(f"young {R}", "c1")
    old.run(lambda: old.storage.sync(), lambda: old.storage.tpc_begin(old.txn))
    young.run(young.store(X))
    scene.sim.run(0.2)
    for name in scene.cluster.storages:
        scene.sim.clog(name, "c1")  # NotifyDeadlock comes late
    old.start(store_on(old, X), old.vote, old.finish)
    scene.sim.run(0.2)
    young.start(young.vote, young.finish)
    scene.sim.run(0.2)
    scene.sim.heal()
    assert [young.wait(5), old.wait(5)] == ["ok", "ok"]
    assert sorted(scene.tokens_of(X)) == sorted(["init", old.token, young.token])
    scene.audit()


def test_99_100_the_holder_of_a_lock_dies() -> None:
    """Others proceed, oldest first; those of dead clients are forgotten."""
    scene = Scene(Shape(clients=4))
    holder = scene.commit("holder")
    holder.run(holder.store(X))
    waiters = [scene.commit(f"{n} {R}", f"c{n}") for n in (1, 2, 3)]
    for waiter in waiters:
        waiter.start(*waiter.all(X))
        scene.sim.run(0.2)
    scene.cluster.crash("c1")
    scene.sim.run(0.1)
    scene.cluster.crash("c0")
    assert [waiter.wait(3) for waiter in waiters[1:]] == ["ok", "ok"]
    assert scene.tokens_of(X, "c2") == ["init", waiters[1].token, waiters[2].token]
    scene.audit()
