"""Scenarios of behaviour.md 11, F: where a replication resumes."""

from __future__ import annotations

from typing import Any

import pytest
from ZODB.utils import u64

from neo.lib.protocol import CellState
from neo.storage import replication
from tests.simulation.cluster import Shape
from tests.simulation.test_transactions import REPLICATED, Scene, X, Y, Z

ONE = Shape(storages=2, replicas=1, partitions=1, clients=2)


@pytest.fixture
def begins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tids from which replications began, by time."""
    found: list[int] = []
    connected = replication.Session.connected

    def spy(self: replication.Session, conn: Any, reason: str) -> None:
        if conn is not None:
            found.append(u64(self._first))
        connected(self, conn, reason)

    monkeypatch.setattr(replication.Session, "connected", spy)
    return found


def progress(scene: Scene, name: str) -> int:
    """Up to where the only cell of a storage is complete."""
    cell = scene.sim.app(name).backend.own_cells()[0]
    assert cell.state is CellState.OUT_OF_DATE
    return u64(cell.tid)


def test_120_hole(begins: list[int]) -> None:
    """What was written after the hole does not hide it, and only it is filled."""
    scene = Scene(ONE)
    before = scene.commit("before")
    before.run(*before.all(X))
    scene.sim.run(2)
    scene.cluster.crash("s1")
    assert scene.commits("c0", X, Y, within=5) < 5
    scene.sim.clog("s0", "s1")
    scene.cluster.restart("s1")
    primary = scene.cluster.primary
    assert primary is not None
    scene.sim.run_until(lambda: len(primary.transactions.ready) == 2, 10)
    scene.sim.run(0.5)
    after = scene.commit("after")
    assert after.run(*after.all(Z)).outcome == "ok"
    scene.sim.run(2)
    assert scene.sim.app("s1").backend.last_tid_of(Z) == after.tid
    scene.cluster.crash("s1")
    scene.sim.heal()
    begins.clear()
    scene.cluster.restart("s1")
    scene.audit()
    assert begins[0] == u64(before.tid) + 1
    scene.cluster.crash("s0")
    assert scene.tokens_of(Y, "c0") == ["init", "by c0"]
    scene.cluster.restart("s0")
    scene.audit()


def test_121_stopped_in_the_phase_of_objects(
    begins: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It resumes at the last chunk that is here, and not from the start."""
    monkeypatch.setattr(replication, "CHUNK", 1)
    monkeypatch.setattr(replication, "PIECE", 1)
    scene = Scene(ONE)
    scene.cluster.crash("s1")
    for _ in range(10):
        assert scene.commits("c0", X, Y, within=5) < 5
    scene.cluster.restart("s1")
    scene.sim.run_until(lambda: begins, 10)
    start = begins[0]
    stops = 0
    while scene.sim.app("s1").backend.own_cells()[0].tid is not None and stops < 5:
        reached = progress(scene, "s1")
        scene.sim.run_until(
            lambda reached=reached: (
                scene.sim.app("s1").backend.own_cells()[0].tid is None
                or progress(scene, "s1") > max(reached, start)
            ),
            20,
        )
        if scene.sim.app("s1").backend.own_cells()[0].tid is None:
            break
        reached = progress(scene, "s1")
        begins.clear()
        scene.cluster.crash("s1")
        scene.cluster.restart("s1")
        scene.sim.run_until(lambda: begins, 20)
        assert begins[0] == reached + 1 > start
        stops += 1
    assert stops == 5
    scene.audit()


def test_119_commits_go_on() -> None:
    """However often there are some, the replica gets up to date."""
    scene = Scene(REPLICATED)
    scene.tokens.think = 0.001
    scene.cluster.crash("s1")
    for name in scene.cluster.clients:
        scene.tokens.start(name, scene.cluster.storage(name))
    scene.sim.run(2)
    committed = scene.tokens.committed
    scene.cluster.restart("s1")
    scene.sim.run_until(lambda: scene.cluster.healthy, 10)
    assert scene.tokens.committed > committed
    scene.tokens.stopping = True
    scene.sim.run_until(lambda: not scene.tokens.running, 10)
    scene.audit()
