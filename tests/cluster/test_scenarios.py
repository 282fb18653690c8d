"""The mandatory scenarios, with real processes: faults, gaps, and a clean audit.

`docs/reliability.md` has the table: number, fault, what is expected and what was
measured. Each test names its row. Under `make chaos` (NEO_CHAOS is set), durations and
repetitions are those of the table; else they are short, with quicker limits.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from .chaos import QUICK, World, report
from .harness import until

FULL = "NEO_CHAOS" in os.environ
LIMITS = None if FULL else QUICK
# Seconds until silence is noticed, with a little for the work that follows.
NOTICED = 15.0 if FULL else 6.0


def times(short: int, full: int) -> range:
    """How often, without and with `make chaos`."""
    return range(full if FULL else short)


def test_01_kill_storage(tmp_path: Path) -> None:
    """kill -9 one storage, restart it 5 s later."""
    with World(tmp_path) as world:
        gaps, delays = [], []
        for _ in times(1, 3):
            with world.measured() as m:
                world.kill("storage1")
                time.sleep(5 if FULL else 2)
            gaps.append(m.gap)
            assert not m.errors
            with world.measured() as m:
                world.start_node("storage1")
                delays.append(world.wait_healthy())
            gaps.append(m.gap)
            assert not m.errors
        world.audit()
    report(1, "kill -9 a storage", gaps=gaps, up_to_date=delays)
    assert min(gaps) <= 0.3, gaps
    assert max(gaps) <= 1, gaps
    assert min(delays) <= 5, delays


def test_04_kill_primary(tmp_path: Path) -> None:
    """kill -9 the primary while a secondary is alive."""
    with World(tmp_path) as world:
        gaps = []
        for _ in times(3, 10):
            victim = world.primary
            with world.measured() as m:
                world.kill(victim)
                time.sleep(2)
            gaps.append(m.gap)
            world.start_node(victim)
            until(lambda: world.neoctl("print", "node")[1].count("MASTER") == 2)
        world.audit()
    report(4, "kill -9 the primary", gaps=gaps)
    assert sorted(gaps)[len(gaps) // 2] <= 1.5, gaps


def test_05_kill_sole_master(tmp_path: Path) -> None:
    """kill -9 the only master again and again."""
    with World(tmp_path, masters=1) as world:
        delays = []
        for i in times(3, 20):
            world.kill("master1")
            time.sleep(world.rng.uniform(0, 1.5))
            start = time.monotonic()
            with world.measured() as m:
                world.start_node("master1")
            delays.append(m.resumed(start))
            time.sleep(world.rng.uniform(0, 0.3) if i % 2 else 0)
        world.audit()
    report(5, "kill -9 the sole master", resumed=delays)
    assert sorted(delays)[len(delays) // 2] <= 2, delays


@pytest.mark.parametrize("seconds", [15, 60] if FULL else [7])
def test_09_pause_storage(tmp_path: Path, seconds: float) -> None:
    """A storage is paused: put aside, it catches up when it is back."""
    with World(tmp_path, limits=LIMITS) as world:
        with world.measured() as m:
            world.pause("storage2")
            time.sleep(seconds)
            world.resume("storage2")
        world.wait_healthy()
        assert all(process.is_alive() for process in world.processes.values())
        world.audit()
    report(9, f"pause a storage for {seconds} s", gap=m.gap)
    assert m.gap <= NOTICED


def test_10_pause_primary(tmp_path: Path) -> None:
    """The primary is paused: the secondary takes over, the old one steps down."""
    with World(tmp_path, limits=LIMITS) as world:
        victim, other = world.primary, world.secondary
        with world.measured() as m:
            world.pause(victim)
            time.sleep(60 if FULL else 10)
            assert world.primary == other
            world.resume(victim)
            time.sleep(2)
        assert world.primary == other
        assert all(process.is_alive() for process in world.processes.values())
        world.audit()
    report(10, "pause the primary", gap=m.gap)
    assert m.gap <= NOTICED


def test_14_reset_client_master(tmp_path: Path) -> None:
    """The links of clients to the masters are reset, again and again."""
    with World(tmp_path, network=True) as world:
        assert world.network is not None
        with world.measured() as m:
            for i in times(50, 1000):
                for master in world.master_names:
                    world.network.reset(f"client{i % 3 + 1}", master)
                time.sleep(world.rng.uniform(0, 0.15))
        counts = world.audit()
    report(14, "reset client-master", resets=world.network.resets, gap=m.gap, **counts)
    assert m.gap <= 2


LINKS = {
    "client-master": ("client1", "primary"),
    "client-storage": ("client1", "storage1"),
    "storage-master": ("storage1", "primary"),
    "storage-storage": ("storage1", "storage2"),
    "master-master": ("primary", "secondary"),
    "admin-master": ("admin", "primary"),
}


@pytest.mark.parametrize("way", ["both", "to", "from"] if FULL else ["both"])
@pytest.mark.parametrize(
    "link", LINKS if FULL else ["client-storage", "storage-master"]
)
def test_15_silence(tmp_path: Path, link: str, way: str) -> None:
    """A link is silent: nothing passes, and nobody says so."""
    with World(tmp_path, network=True, limits=LIMITS) as world:
        assert world.network is not None
        a, b = (getattr(world, name, name) for name in LINKS[link])
        with world.measured() as m:
            if way != "from":
                world.network.silence((a, b))
            if way != "to":
                world.network.silence((b, a))
            time.sleep(30 if FULL else 8)
            world.network.heal()
        world.wait_healthy()
        assert all(process.is_alive() for process in world.processes.values())
        world.audit()
    report(15, f"silence {link} {way}", gap=m.gap, **m.errors)
    assert m.gap <= NOTICED


@pytest.mark.parametrize("alone", [1, 2, 3] if FULL else [1])
def test_17_partition(tmp_path: Path, alone: int) -> None:
    """The network falls apart: at most one side has all, and a primary."""
    with World(tmp_path, network=True, limits=LIMITS) as world:
        assert world.network is not None
        primary, secondary = world.primary, world.secondary
        storages = [f"storage{i}" for i in range(1, 4)]
        one = {primary, f"storage{alone}", *world.workers, "admin"}
        other = {secondary, *storages} - one
        with world.measured() as m:
            world.network.cut(sorted(one), sorted(other))
            time.sleep(30 if FULL else 12)
            world.network.heal()
        world.wait_healthy()
        world.audit()
    report(17, f"partition, storage{alone} on the side of the clients", gap=m.gap)
