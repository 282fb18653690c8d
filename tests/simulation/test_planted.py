"""The simulator's own tools: planted bugs, smaller runs, disks that fail."""

from __future__ import annotations

import pytest

from neo.lib.exception import BackendError
from tests.simulation.cluster import Cluster, Shape
from tests.simulation.conftest import kept_seeds
from tests.simulation.disk import Disk
from tests.simulation.planted.bugs import BUGS, Bug
from tests.simulation.planted.mutation import search
from tests.simulation.runtime import Simulation, SimulationFailed
from tests.simulation.scenario import Options, Run, failure, shrink
from tests.simulation.workload import Tokens

LOCK = next(b for b in BUGS if b.name == "a lock is answered before it is durable")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_can_be_planted(bug: Bug) -> None:
    """The code still has the lines; afterwards it is as before."""
    _, owner, name = bug._owner()
    before = owner.__dict__[name]
    with bug.planted():
        assert owner.__dict__[name] is not before
    assert owner.__dict__[name] is before


def test_bug_is_found_and_made_small() -> None:
    """By the durable images; without any fault, for none is needed."""
    found = search(BUGS.index(LOCK), 0, 10)
    assert found.seeds is not None
    assert found.how.startswith("P7: ")
    options = Options(Shape(storages=2, replicas=1, clients=1), kinds=("reset",))
    with LOCK.planted():
        small = shrink(0, options, lambda text: None, tries=12)
        assert failure(0, small) is not None
    assert small.commits < options.commits
    assert failure(0, small) is None


def test_options_are_told_and_can_be_given() -> None:
    run = Run(7)
    text = run.sim.failure("wrong").args[0]
    assert f"options {run.options}" in text
    changed = run.options.changed({"shape": {"masters": 9}, "kinds": ["crash"]})
    assert changed.shape.masters == 9
    assert changed.shape.storages == run.options.shape.storages
    assert changed.kinds == ("crash",)


def test_kept_seeds_have_options_that_exist() -> None:
    for seed, changes, comment in kept_seeds():
        assert Options.drawn(seed).changed(changes)
        assert comment, seed


def test_failed_fsync_leaves_all_or_nothing() -> None:
    found = set()
    sim = Simulation()
    for _ in range(20):
        disk = Disk(sim)
        backend = disk.open()
        disk.uncertain = True
        backend.begin(True)
        backend.set_name("cluster")
        with pytest.raises(BackendError):
            backend.commit()
        found.add(disk.open().settings().name)
    assert found == {None, "cluster"}


def test_what_a_disk_lacks_is_seen() -> None:
    """The check of acknowledged transactions, on a disk that went back in time."""
    sim = Simulation()
    cluster = Cluster(sim, Shape(storages=2, replicas=1))
    cluster.start()
    sim.run_until(lambda: cluster.healthy, 20)
    before = cluster.disks["s0"].durable
    tokens = Tokens(sim)
    cluster.call(tokens.create, cluster.storage())
    primary = cluster.primary
    assert primary is not None
    (tid,) = cluster.acknowledged
    cluster._check_disks(primary, tid, cluster.acknowledged[tid])
    sim.crash("s0")
    cluster.disks["s0"].put(before)
    with pytest.raises(SimulationFailed, match=r"P7.* on the disk of s0"):
        cluster._check_disks(primary, tid, cluster.acknowledged[tid])
