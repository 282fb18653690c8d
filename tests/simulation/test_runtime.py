"""The simulator itself: what it promises to nodes, and that a seed repeats a run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from neo.lib.connection import Connection
from neo.lib.exception import BackendError
from neo.lib.handler import Handler
from neo.lib.protocol import (
    AskNewOIDs,
    AskTransactionInformation,
    FlushLog,
    NotifyUnlockInformation,
)
from tests.simulation.runtime import SimRuntime, Simulation, SimulationFailed

ADDRESS = ("127.0.0.1", 10000)


class Server(Handler):
    """Answers new oids; remembers the rest."""

    def __init__(self, runtime: SimRuntime) -> None:
        super().__init__()
        self.runtime = runtime
        self.received: list[bytes] = []
        self.lost: list[str] = []
        self.conns: list[Connection] = []
        self.checked = 0

    def start(self) -> None:
        self.runtime.listen(ADDRESS, self.accept)

    def accept(self, conn: Connection) -> None:
        conn.handler = self
        conn.trust()
        self.conns.append(conn)

    def check(self) -> None:
        self.checked += 1

    def closed(self, conn: Connection) -> None:
        self.lost.append(conn.reason)

    def ask_new_oids(self, conn: Connection, count: int) -> None:
        from neo.lib.protocol import AnswerNewOIDs

        conn.answer(AnswerNewOIDs, [bytes(8)] * count)

    def notify_unlock_information(self, conn: Connection, ttid: bytes) -> None:
        self.received.append(ttid)

    def ask_transaction_information(self, conn: Connection, tid: bytes) -> None:
        """Never answered."""

    def flush_log(self, conn: Connection) -> None:
        raise RuntimeError("planted")


class Client(Handler):
    """Connects, and connects again."""

    def __init__(self, runtime: SimRuntime) -> None:
        super().__init__()
        self.runtime = runtime
        self.conn: Connection | None = None
        self.events: list[str] = []

    def start(self) -> None:
        self.runtime.connect(ADDRESS, self)

    def connected(self, conn: Connection) -> None:
        self.conn = conn
        conn.trust()
        self.events.append("connected")

    def closed(self, conn: Connection) -> None:
        self.conn = None
        self.events.append(conn.reason)
        self.runtime.connect(ADDRESS, self)

    def oids(self, count: int) -> int:
        """Wait for an answer, as applications do; how many oids came."""
        result: list[int] = []
        self.runtime.wait(lambda: self.conn)
        assert self.conn is not None
        self.conn.ask(AskNewOIDs, count).then(
            lambda oids: result.append(len(oids)),
            lambda code, text: result.append(-1),
        )
        self.runtime.wait(lambda: result)
        return result[0]


def world(seed: int | str = 0, **options: object) -> Simulation:
    sim = Simulation(seed, **options)
    sim.start("server", Server)
    sim.start("client", Client)
    return sim


def test_question_and_answer() -> None:
    sim = world()
    assert sim.call("client", sim.process("client").wait, lambda: True, None)
    sim.run_until(lambda: sim.app("client").conn, 5)
    assert sim.call("client", sim.app("client").oids, 3) == 3
    assert sim.app("server").checked
    assert 0 < sim.time < 1


@pytest.mark.parametrize("seed", range(10))
def test_streams_keep_their_order(seed: int) -> None:
    sim = world(seed, cut=0.9)
    sim.run_until(lambda: sim.app("client").conn, 5)
    expected = [i.to_bytes(8, "big") for i in range(500)]
    for ttid in expected:
        sim.app("client").conn.notify(NotifyUnlockInformation, ttid)
        if ttid[7] % 50 == 0:
            sim.run(0.001)
    sim.run_until(lambda: len(sim.app("server").received) == 500)
    assert sim.app("server").received == expected


def test_big_messages_pass_a_bounded_window() -> None:
    sim = world(cut=0.01)
    sim.run_until(lambda: sim.app("client").conn, 5)
    assert sim.call("client", sim.app("client").oids, 300_000) == 300_000


def test_never_reading_peer_bounds_the_window() -> None:
    sim = world()
    sim.run_until(lambda: sim.app("client").conn, 5)
    sim.pause("server")
    conn = sim.app("client").conn
    for _ in range(200):
        for _ in range(100):
            conn.notify(NotifyUnlockInformation, bytes(8))
        sim.run(0.01)
    transport = conn.transport
    assert transport.blocked
    sim.resume("server")
    sim.run_until(lambda: len(sim.app("server").received) == 20_000)


def test_refused_then_throttled() -> None:
    sim = Simulation()
    sim.start("client", Client)
    sim.run(10.5)
    assert set(sim.app("client").events) == {"Connection refused"}
    # One attempt a second, the answer's delay added.
    assert 9 <= len(sim.app("client").events) <= 11


def test_crash_is_seen_and_restart_found() -> None:
    sim = world()
    sim.run_until(lambda: sim.app("client").conn, 5)
    sim.crash("server")
    sim.run_until(lambda: not sim.app("client").conn, 1)
    assert sim.app("client").events[-1] in (
        "closed by the peer",
        "Connection reset by peer",
    )
    sim.run(5)
    sim.restart("server")
    sim.run_until(lambda: sim.app("client").conn, 3)
    assert sim.call("client", sim.app("client").oids, 1) == 1


def test_silent_crash() -> None:
    """Nobody is told; the machine that is back doesn't know the connection."""
    sim = world()
    sim.run_until(lambda: sim.app("client").conn, 5)
    sim.crash("server", silent=True)
    sim.run(80)
    conn = sim.app("client").conn
    assert conn
    sim.restart("server")
    sim.run(1)
    assert sim.app("client").conn is conn
    conn.notify(NotifyUnlockInformation, bytes(8))
    sim.run_until(lambda: conn.closed, 1)
    sim.run_until(lambda: sim.app("client").conn, 3)


def test_silence_ends_by_keepalive() -> None:
    sim = world()
    sim.run_until(lambda: sim.app("client").conn, 5)
    sim.crash("server", silent=True)
    sim.run(89)
    assert sim.app("client").conn
    sim.run(2)
    assert sim.app("client").events[1] == "Connection timed out"


def reset_loses_bytes(seed: int) -> bool:
    sim = world(seed)
    sim.run_until(lambda: sim.app("client").conn, 5)
    sim.app("client").conn.notify(NotifyUnlockInformation, bytes(8))
    sim.run(1e-9)
    assert sim.reset("client", "server") == 1
    sim.run_until(lambda: sim.app("server").lost, 2)
    sim.run_until(lambda: len(sim.app("client").events) >= 2, 2)
    return not sim.app("server").received


def test_reset_reaches_both_ends_and_may_lose_bytes() -> None:
    assert {reset_loses_bytes(seed) for seed in range(20)} == {False, True}


def test_clog_and_partition() -> None:
    sim = world()
    sim.run_until(lambda: sim.app("client").conn, 5)
    conn = sim.app("client").conn
    sim.partition(["client"], ["server"])
    conn.notify(NotifyUnlockInformation, bytes(8))
    sim.run(20)
    assert not conn.closed
    assert not sim.app("server").received
    sim.heal()
    sim.run_until(lambda: sim.app("server").received, 1)


def test_connecting_over_a_clogged_link() -> None:
    """Repeated like the first packet of TCP, given up after two minutes."""
    sim = Simulation()
    sim.start("server", Server)
    sim.clog("client", "server")
    sim.start("client", Client)
    sim.run(60)
    assert sim.app("client").events == []
    sim.unclog("client", "server")
    sim.run_until(lambda: sim.app("client").conn, 70)
    sim.crash("client")
    sim.clog("server", "client")
    sim.restart("client")
    sim.run(130)
    assert sim.app("client").events == ["Connection timed out"]


def test_timers_die_with_the_node() -> None:
    sim = Simulation()
    fired = []

    class Node:
        def __init__(self, runtime: SimRuntime) -> None:
            runtime.call_later(1, lambda: fired.append("kept"))
            runtime.call_later(1, lambda: fired.append("gone")).cancel()
            runtime.call_later(0, lambda: fired.append("soon"))

    sim.start("node", Node)
    sim.run(0.5)
    sim.crash("node")
    sim.restart("node")
    sim.run(0.9)
    assert fired == ["soon", "soon"]
    sim.run(0.2)
    assert fired == ["soon", "soon", "kept"]


def test_paused_node_catches_up() -> None:
    sim = world()
    sim.run_until(lambda: sim.app("client").conn, 5)
    sim.pause("server")
    conn = sim.app("client").conn
    conn.notify(NotifyUnlockInformation, bytes(8))
    sim.run(30)
    assert not sim.app("server").received
    sim.resume("server")
    sim.run_until(lambda: sim.app("server").received, 1)


def test_jobs_are_whole_and_in_order_per_queue() -> None:
    for seed in range(10):
        sim = Simulation(seed)
        ran: list[str] = []
        done: list[str] = []

        class Node:
            def __init__(self, runtime: SimRuntime, ran=ran, done=done) -> None:
                for i in range(20):
                    for queue in "ab":
                        name = f"{queue}{i:02}"
                        runtime.submit(
                            queue,
                            lambda name=name: ran.append(name) or name,
                            done.append,
                        )
                assert not ran

        sim.start("node", Node)
        sim.run(5)
        for names in (ran, done):
            assert len(names) == 40
            for queue in "ab":
                assert [n for n in names if n[0] == queue] == sorted(
                    n for n in names if n[0] == queue
                )


def test_error_of_a_job_is_its_result() -> None:
    results: list[object] = []

    class Node:
        def __init__(self, runtime: SimRuntime) -> None:
            runtime.submit("q", self.fail, results.append)

        def fail(self) -> None:
            raise BackendError("disk full")

    sim = Simulation()
    sim.start("node", Node)
    sim.run(1)
    assert [str(r) for r in results] == ["disk full"]


def test_crash_loses_jobs() -> None:
    seen: list[str] = []

    class Node:
        def __init__(self, runtime: SimRuntime) -> None:
            runtime.submit("q", lambda: seen.append("ran"), seen.append)

    sim = Simulation()
    sim.start("node", Node)
    sim.crash("node")
    sim.run(1)
    assert seen == []


def test_backend_error_ends_the_node_only() -> None:
    class Node:
        def __init__(self, runtime: SimRuntime) -> None:
            runtime.call_later(1, self.fail)

        def fail(self) -> None:
            raise BackendError("disk full")

    sim = world()
    process = sim.start("node", Node)
    sim.run(5)
    assert (process.alive, process.status) == (False, 1)
    assert sim.app("client").conn


def test_other_errors_end_the_simulation() -> None:
    sim = world("some seed")
    sim.run_until(lambda: sim.app("client").conn, 5)
    sim.app("client").conn.notify(FlushLog)
    with pytest.raises(SimulationFailed, match="planted\nseed some seed"):
        sim.run(1)


def test_stop_flushes_output() -> None:
    sim = world()
    sim.run_until(lambda: sim.app("client").conn, 5)
    process = sim.processes["client"]
    sim.app("client").conn.notify(NotifyUnlockInformation, bytes(8))
    sim.app("client").runtime.stop(3)
    server = sim.app("server")
    sim.run_until(lambda: server.lost, 5)
    assert server.received or server.lost == ["Connection reset by peer"]
    assert (process.alive, process.status) == (False, 3)


def test_application_threads() -> None:
    sim = world()
    sim.run_until(lambda: sim.app("client").conn, 5)
    counts = []
    for i in range(1, 6):
        sim.spawn("client", lambda i=i: counts.append(sim.app("client").oids(i)))
    sim.run_until(lambda: len(counts) == 5, 5)
    assert sorted(counts) == [1, 2, 3, 4, 5]
    waits = sim.call("client", sim.app("client").runtime.wait, lambda: False, (), 2.0)
    assert waits is False
    started = sim.time
    sim.call("client", sim.process("client").sleep, 2.0)
    assert sim.time - started >= 2


def test_application_thread_dies_with_its_process() -> None:
    sim = world()
    sim.run_until(lambda: sim.app("client").conn, 5)
    seen = []

    def work() -> None:
        try:
            sim.app("client").conn.ask(AskTransactionInformation, bytes(8))
            sim.processes["client"].sleep(1e6)
        finally:
            seen.append("unwound")

    thread = sim.spawn("client", work)
    sim.run(1)
    sim.crash("client")
    assert seen == ["unwound"]
    assert thread.dead
    sim.restart("client")
    sim.run_until(lambda: sim.app("client").conn, 5)


def test_errors_of_application_threads_reach_the_test() -> None:
    sim = world()

    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        sim.call("client", fail)
    sim.spawn("client", fail)
    with pytest.raises(SimulationFailed, match="mine"):
        sim.run(1)


def test_clocks() -> None:
    sim = world()
    sim.run(1)
    process = sim.processes["client"]
    runtime = process.runtime
    before = runtime.now(), runtime.monotonic()
    process.skew -= 3600
    sim.run(10)
    assert runtime.now() == pytest.approx(before[0] - 3590)
    assert runtime.monotonic() == pytest.approx(before[1] + 10)
    process.drift = 0.5
    before_drift = runtime.now()
    sim.run(10)
    assert runtime.now() == pytest.approx(before_drift + 15)


def test_buggify_is_drawn_per_name() -> None:
    sim = Simulation(buggify=0.5)
    rates = [sum(sim.buggify(f"{n}") for _ in range(100)) for n in range(40)]
    assert 5 < sum(map(bool, rates)) < 35
    assert all(rate < 60 for rate in rates)
    assert not any(Simulation().buggify("x") for _ in range(100))


def script(seed: int) -> str:
    """A bit of everything; the digest."""
    sim = world(seed, cut=0.5, buggify=0.5)
    faults = sim.rng("faults")

    def work() -> None:
        for _ in range(20):
            sim.app("client").oids(faults.randint(1, 2000))

    for _ in range(3):
        sim.spawn("client", work)
    for _ in range(10):
        sim.run(faults.random())
        sim.reset("client", "server")
        if sim.processes["server"].alive and faults.random() < 0.5:
            sim.crash("server")
        elif not sim.processes["server"].alive:
            sim.restart("server")
    return sim.digest


def test_same_seed_same_digest() -> None:
    digests = [script(seed) for seed in range(5)]
    assert len(set(digests)) == 5
    assert [script(seed) for seed in range(5)] == digests
    for hash_seed in "12":
        output = subprocess.run(
            [
                sys.executable,
                "-c",
                "from tests.simulation.test_runtime import *;"
                "print(*map(script, range(5)))",
            ],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert output == digests
