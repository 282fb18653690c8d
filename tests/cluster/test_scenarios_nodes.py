"""The mandatory scenarios of processes: killed, paused, with wrong clocks, full disks.

`docs/reliability.md` has the table: number, fault, what is expected and what was
measured. Each test names its row. Under `make chaos` (NEO_CHAOS is set), durations and
repetitions are those of the table; else they are short, with quicker limits.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest

from tests.history import FAIL, OK

from .chaos import (
    BEGUN,
    FINISHING,
    FULL,
    LIMITS,
    NOTICED,
    STORED,
    VOTED,
    World,
    report,
    times,
    typical,
    within,
)
from .harness import until


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
    assert typical(gaps) <= within(0.3), gaps
    assert typical(delays) <= within(5), delays


def test_02_kill_storages_in_turn(tmp_path: Path) -> None:
    """kill -9 one storage after the other; then one that is catching up."""
    with World(tmp_path) as world:
        gaps = []
        for i in times(3, 10):
            victim = world.storage_names[i % 3]
            with world.measured() as m:
                world.kill(victim)
                world.progress(50)
                world.start_node(victim)
                world.wait_healthy()
            gaps.append(m.gap)
            assert not m.errors
        for _ in times(2, 4):
            with world.measured() as m:
                world.kill("storage1")
                world.progress(50)
                world.start_node("storage1")
                until(lambda: "| RUNNING" in line(world, "S1"), "S1 runs")
            gaps.append(m.gap)
        world.audit()
    report(2, "kill -9 storages in turn", gaps=gaps)
    assert typical(gaps) <= within(0.5), gaps


def line(world: World, nid: str) -> str:
    """Of `neoctl print node`."""
    lines = world.neoctl("print", "node")[1].splitlines()
    return next((text for text in lines if text.startswith(f"{nid} ")), "")


def test_03_kill_two_storages(tmp_path: Path) -> None:
    """kill -9 two of three storages: the cluster waits, and resumes with them."""
    with World(tmp_path) as world:
        delays = []
        for _ in times(1, 5):
            world.kill("storage1")
            world.kill("storage3")
            until(lambda: world.state() == "RECOVERING", "RECOVERING")
            time.sleep(3 if FULL else 1)
            start = time.monotonic()
            with world.measured() as m:
                world.start_node("storage1")
                world.start_node("storage3")
            delays.append(m.resumed(start))
            world.wait_healthy()
        world.audit()
    report(3, "kill -9 two of three storages", resumed=delays)
    assert typical(delays) <= within(2), delays


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
    assert typical(gaps) <= within(1.5), gaps


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
    assert typical(delays) <= within(2), delays


def test_06_kill_all(tmp_path: Path) -> None:
    """kill -9 all nodes at once."""
    with World(tmp_path) as world:
        delays = []
        for _ in times(3, 10):
            for name in list(world.processes):
                os.kill(world.pid(name), signal.SIGKILL)
            for name in list(world.processes):
                world.kill(name)
            start = time.monotonic()
            with world.measured() as m:
                world.start(wait=False)
            delays.append(m.resumed(start))
            world.wait_healthy()
        world.audit()
    report(6, "kill -9 all nodes", resumed=delays)
    assert typical(delays) <= within(2), delays


def test_07_kill_the_only_storage(tmp_path: Path) -> None:
    """kill -9 the only storage at random moments."""
    with World(tmp_path, masters=1, storages=1, replicas=0, think=0.002) as world:
        delays = []
        for _ in times(5, 50):
            world.kill("storage1")
            start = time.monotonic()
            with world.measured() as m:
                world.start_node("storage1")
            delays.append(m.resumed(start))
            time.sleep(world.rng.uniform(0, 0.1))
        world.audit()
    report(7, "kill -9 the only storage", resumed=delays)
    assert typical(delays) <= within(2), delays


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


LEASE = 5.0


def test_11_pause_client(tmp_path: Path) -> None:
    """A client stalls in a commit: others wait for the lease at most."""
    gaps = {}
    with World(tmp_path, limits={**(LIMITS or {}), "lease": LEASE}) as world:
        for name, step in ("client4", VOTED), ("client5", FINISHING):
            with world.measured() as m:
                world.start_client(name, stop=(step, signal.SIGSTOP))
                until(lambda step=step: world.read() and stopped(world, step), step)
                time.sleep(2 * LEASE if step == VOTED else 2)
            (token,) = (  # there may be conflicts before
                t
                for t, a in world.history.items()
                if t.startswith(f"{name}.") and a.end is None
            )
            world.resume(name)
            until(lambda t=token: world.read() and world.history[t].end, "the end")
            attempt = world.history[token]
            assert attempt.outcome == (OK if step == FINISHING else FAIL), attempt
            gaps[step] = m.gap
        counts = world.audit()
    report(11, "pause a client", gaps=gaps, **counts)
    assert gaps[VOTED] <= LEASE * 1.25 + 1, gaps
    assert gaps[FINISHING] <= within(1), gaps


def stopped(world: World, step: str) -> int:
    """How many clients stopped at this step."""
    return world.messages.count(f"stopped: {step}")


def test_12_kill_client(tmp_path: Path) -> None:
    """kill -9 a client in a commit: others go on at once."""
    with World(tmp_path) as world:
        gaps: dict[str, list[float]] = {}
        for step in [BEGUN, STORED, VOTED, FINISHING] * len(times(1, 10)):
            with world.measured() as m:
                process = world.start_client("client4", stop=(step, signal.SIGKILL))
                process.join(30)
                assert process.exitcode == -signal.SIGKILL
                world.kill_client("client4")
                time.sleep(0.5)
            gaps.setdefault(step, []).append(m.gap)
            assert not m.errors
        world.audit()
    report(12, "kill -9 clients", gaps=gaps)
    assert all(typical(values) <= within(1) for values in gaps.values()), gaps


CLOCKS = {
    "-1 s": (-1, 0),
    "-5 s": (-5, 0),
    "-1 day": (-86400, 0),
    "+1 h": (3600, 0),
    "frozen": (0, -1),
    "twice as fast": (0, 1),
}


def test_20_clocks(tmp_path: Path) -> None:
    """The clock of the primary steps; then a takeover by one whose clock is late."""
    with World(tmp_path) as world:
        gaps = {}
        primary = world.primary
        for name, (offset, drift) in CLOCKS.items():
            with world.measured() as m:
                world.set_clock(primary, offset, drift)
                time.sleep(5 if FULL else 0.7)
                world.set_clock(primary, 0)
                world.progress(20)
            gaps[name] = m.gap
        with world.measured() as m:
            for _ in times(20, 200):
                world.set_clock(primary, world.rng.gauss(0, 10))
                time.sleep(0.05)
        gaps["random walk"] = m.gap
        world.set_clock(primary, 7200)
        world.progress(10)
        with world.measured() as m:
            world.set_clock(world.secondary, -86400)
            world.kill(primary)
            time.sleep(2)
        gaps["takeover, -1 day"] = m.gap
        world.set_clock(primary, 0)
        assert "clock" in world.said(primary), world.said(primary)
        world.start_node(primary)
        for name in (world.secondary, world.primary):
            world.kill(name)
            world.set_clock(name, -5)
        with world.measured() as m:
            for name in world.master_names:
                world.start_node(name)
        gaps["restart, -5 s"] = m.gap
        world.audit()
    report(20, "clock of the primary", gaps=gaps)
    assert typical(gaps.values()) <= within(1), gaps


def limit_files(world: World, name: str, size: int) -> None:
    """Files of a storage can't grow beyond."""
    resource.prlimit(
        world.pid(name), resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)
    )


def fill_disks(world: World, names: list[str]) -> tuple[float, float]:
    """Gap while these disks are full, and seconds from a restart to a commit."""
    with world.measured() as m:
        for name in names:
            limit_files(world, name, 100_000)
        for name in names:
            assert world.exited(name) == 1
            lines = world.said(name).splitlines()
            text = [text for text in lines if "CRITICAL" in text][-1]
            assert "disk" in text or "full" in text, text
        if len(names) == 3:
            until(lambda: world.state() == "RECOVERING")
        else:
            time.sleep(1)
        start = time.monotonic()
        for name in names:
            world.start_node(name)
    world.wait_healthy()
    return m.gap, m.resumed(start)


def test_21_full_disks(tmp_path: Path) -> None:
    """Disks of one storage, then of all, are full: they stop; a restart is enough."""
    with World(tmp_path) as world:
        gap, _ = fill_disks(world, ["storage1"])
        _, resumed = fill_disks(world, world.storage_names)
        for name in world.storage_names:
            lines = world.said(name).splitlines()
            count = sum("CRITICAL" in text for text in lines)
            assert count == (2 if name == "storage1" else 1), lines
        world.audit()
    report(21, "full disks", gap=gap, resumed=resumed)
    assert gap <= within(2)
    assert resumed <= within(5)
