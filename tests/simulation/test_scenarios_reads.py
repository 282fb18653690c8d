"""Scenarios of behaviour.md 11, E: reads, cache, invalidations."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from ZODB.POSException import POSKeyError
from ZODB.utils import u64

from neo.client.exception import NEOStorageWrongChecksum
from neo.lib.protocol import ZERO_TID, AddPendingNodes
from tests.history import decode
from tests.simulation.cluster import Shape
from tests.simulation.test_replicas import Tool, nid_of
from tests.simulation.test_transactions import (
    REPLICATED,
    SPREAD,
    Scene,
    X,
    Y,
    Z,
    locked_at,
)
from tests.simulation.workload import ALL


def in_thread(scene: Scene, client: str, function: Any, *args: Any) -> list[Any]:
    """Begin something in an application thread; a list that gets its result."""
    result: list[Any] = []
    scene.sim.spawn(client, lambda: result.append(function(*args)))
    return result


def test_101_102_reads_of_what_is_locked() -> None:
    """They wait for the unlock; an iteration misses nothing."""
    scene = Scene(SPREAD)
    first = scene.commit("first")
    first.run(first.store(X), first.vote).start(first.finish)
    names = scene.cluster.storages

    def all_locked() -> bool:
        having = [n for n in names if scene.sim.app(n).operation.transactions.by_ttid]
        return bool(having) and all(locked_at(scene, name) for name in having)

    scene.sim.run_until(all_locked)
    for name in names:
        scene.sim.clog("m0", name)  # the unlock is late
    assert first.wait(5) == "ok"
    storage = scene.cluster.storage("c1")
    reads = in_thread(scene, "c1", lambda: (storage.sync(), storage.load(X))[1])
    tids = in_thread(scene, "c1", lambda: [t.tid for t in storage.iterator()])
    scene.sim.run(1)
    assert not reads
    assert not tids
    scene.sim.heal()
    scene.sim.run_until(lambda: reads and tids, 5)
    assert reads[0][1] == first.tid
    assert tids[0] == [scene.tokens.attempts[0].tid, first.tid]
    scene.audit()


def test_103_late_invalidation() -> None:
    """The old value in the old snapshot, whatever the cache; the new one after."""
    scene = Scene(SPREAD)
    storage = scene.cluster.storage("c1")
    old = scene.do(storage.load, X, client="c1")
    scene.sim.clog("m0", "c1")
    assert scene.commits("c0", X, within=1) < 1
    storage._core.cache.clear()
    assert scene.do(storage.load, X, client="c1") == old
    synced = in_thread(scene, "c1", storage.sync)
    scene.sim.run(1)
    assert not synced
    assert scene.do(storage.load, X, client="c1") == old
    scene.sim.unclog("m0", "c1")
    scene.sim.run_until(lambda: synced, 2)
    data, serial = scene.do(storage.load, X, client="c1")
    assert serial > old[1]
    assert decode(data).tokens[-1] == "by c0"
    before = scene.do(storage.loadBefore, X, serial, client="c1")
    assert before == (*old, serial)


def test_104_105_invalidations_while_loading() -> None:
    """The answer is late: it is cached with the end that it has by now."""
    scene = Scene(REPLICATED)
    storage = scene.cluster.storage("c1")
    scene.do(storage.load, Y, client="c1")
    snapshot = storage.lastTransaction()
    for name in scene.cluster.storages:
        scene.sim.clog(name, "c1")
    loads = [in_thread(scene, "c1", storage.load, oid) for oid in (X, X, Z)]
    scene.sim.run(0.1)
    for _ in range(2):
        assert scene.commits("c0", X, within=1) < 1
    scene.sim.run(0.5)
    assert storage.lastTransaction() > snapshot
    scene.sim.heal()
    scene.sim.run_until(lambda: all(loads), 2)
    assert loads[0][0][1] <= snapshot
    at = u64(snapshot) + 1
    again = scene.do(storage.loadBefore, X, at.to_bytes(8, "big"), client="c1")
    assert again[:2] == loads[0][0]
    assert again[2] > snapshot
    data, _ = scene.do(storage.load, X, client="c1")
    assert decode(data).tokens[1:] == ("by c0", "by c0")


def test_107_load_while_the_same_client_commits() -> None:
    """Each load is of one state or the other, whatever comes first."""
    for late in (["s0"], ["s1"], ["s0", "s1"], []):
        scene = Scene(REPLICATED, seed=f"{late}")
        storage = scene.cluster.storage()
        commit = scene.commit("t")
        commit.run(commit.store(X), commit.vote)
        storage._core.cache.clear()
        for name in late:
            scene.sim.clog(name, "c0")
        loads = in_thread(scene, "c0", storage.load, X)
        commit.start(commit.finish)
        scene.sim.run(0.5)
        scene.sim.heal()
        assert commit.wait(5) == "ok"
        scene.sim.run_until(lambda loads=loads: loads, 5)
        end = scene.do(storage.loadBefore, X, commit.tid)[2]
        assert end == commit.tid
        assert scene.do(storage.load, X)[1] == commit.tid
        scene.audit()


def test_108_109_modified_while_disconnected() -> None:
    """The client sees it once it is connected again."""
    scene = Scene(REPLICATED)
    storage = scene.cluster.storage("c1")
    old = scene.do(storage.load, X, client="c1")
    scene.sim.link("c1", "m0").refused = True
    scene.sim.reset("c1", "m0")
    scene.sim.run(0.5)
    assert scene.commits("c0", X, within=1) < 1
    scene.sim.heal()
    scene.sim.run(3)
    scene.do(storage.sync, client="c1")
    data, serial = scene.do(storage.load, X, client="c1")
    assert serial > old[1]
    assert decode(data).tokens[-1] == "by c0"
    scene.audit()


def test_111_table_older_than_that_of_the_storage() -> None:
    """The cell has moved: the client asks for the new table, and reads there."""
    scene = Scene(Shape(spares=1, partitions=2, clients=2, admins=1))
    tool = Tool(scene)  # type: ignore[arg-type]
    cluster, storage = scene.cluster, scene.cluster.storage("c1")
    scene.do(storage.load, X, client="c1")
    scene.sim.clog("m0", "c1")
    cluster.start("s1")
    primary = cluster.primary
    assert primary is not None
    scene.sim.run_until(lambda: scene.sim.app("s1").nid is not None, 5)
    new = nid_of(scene, "s1")  # type: ignore[arg-type]
    tool.text(AddPendingNodes, [new])
    assert tool.tweak()
    scene.sim.run_until(lambda: list(primary.pt.cells[1]) == [new], 30)
    scene.sim.run(1)
    loads = [in_thread(scene, "c1", storage.load, oid) for oid in ALL]
    scene.sim.run(1)
    assert [bool(load) for load in loads] == [True, False] * (len(ALL) // 2)
    scene.sim.unclog("m0", "c1")
    scene.sim.run_until(lambda: all(loads), 5)
    assert all(decode(load[0][0]).tokens == ("init",) for load in loads)


def test_14_112_another_client_took_the_id() -> None:
    """Whoever lost it gets another one; its transaction fails cleanly."""
    scene = Scene(SPREAD)
    scene.cluster.crash("c1")
    scene.sim.run(1)
    core = scene.cluster.storage()._core
    nid = core.nid
    commit = scene.commit("t")
    commit.run(commit.store(X))
    scene.sim.link("c0", "m0").refused = True
    scene.sim.reset("c0", "m0")
    scene.sim.run(0.2)
    scene.sim.restart("c1")
    assert scene.commits("c1", X, Y, within=5) < 5
    assert scene.cluster.storage("c1")._core.nid == nid
    scene.sim.heal()
    commit.start(commit.vote, commit.finish)
    assert commit.wait(10) == "NEOStorageTransientError"
    assert scene.commits("c0", X, Y, within=5) < 5
    assert scene.cluster.storage()._core.nid != nid
    assert scene.tokens_of(X) == ["init", "by c1", "by c0"]
    scene.audit()


def test_113_all_replicas_are_damaged() -> None:
    """The error names the object; who asks for it gets the bytes as they are."""
    scene = Scene(REPLICATED)
    scene.sim.run(2)
    for name in scene.cluster.storages:
        backend = scene.sim.app(name).backend
        backend.begin(True)
        backend.execute("UPDATE data SET value = x'ff' || value")
        backend.commit()
    errors: list[tuple[Any, ...]] = []

    def load() -> None:
        try:
            storage.load(X)
        except NEOStorageWrongChecksum as e:
            errors.append(e.args)

    storage = scene.cluster.storage("c1")
    scene.do(load, client="c1")
    assert errors == [(X, scene.tokens.attempts[0].tid)]
    assert scene.cluster.healthy


def test_113_ignore_wrong_checksum() -> None:
    """What is stored is returned."""
    scene = Scene(REPLICATED, options={"ignore_wrong_checksum": True})
    scene.sim.run(2)
    for name in scene.cluster.storages:
        backend = scene.sim.app(name).backend
        backend.begin(True)
        backend.execute("UPDATE data SET value = x'ff'")
        backend.commit()
    assert scene.do(scene.cluster.storage("c1").load, X, client="c1")[0] == b"\xff"


@pytest.mark.parametrize("oid", [b"", b"abc", bytes(9), "text", None])
def test_114_oid_that_is_none(oid: Any) -> None:
    """An error in the client; the storages don't care."""
    scene = Scene(SPREAD)
    errors: list[BaseException] = []

    def load() -> None:
        try:
            scene.cluster.storage().load(oid)
        except (POSKeyError, TypeError, struct.error) as e:
            errors.append(e)

    scene.do(load)
    assert len(errors) == 1
    assert scene.cluster.healthy
    assert scene.commits("c0", X, within=1) < 1


def test_115_invalidations_before_the_end_of_the_initialisation() -> None:
    """Clients that connect while others commit all the time."""
    scene = Scene(REPLICATED)
    scene.tokens.think = 0.001
    scene.tokens.start("c0", scene.cluster.storage())
    for _ in range(20):
        scene.sim.reset("c1", "m0")
        scene.sim.run(0.05)
    scene.tokens.stopping = True
    scene.sim.run_until(lambda: not scene.tokens.running, 10)
    storage, other = scene.cluster.storage(), scene.cluster.storage("c1")
    scene.do(other.sync, client="c1")
    for oid in ALL:
        assert scene.do(storage.load, oid) == scene.do(other.load, oid, client="c1")
    assert storage.lastTransaction() == other.lastTransaction() > ZERO_TID
    scene.audit()
