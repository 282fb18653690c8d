"""The mandatory scenarios of data and of operators, and of peers that are no peers.

See test_scenarios_nodes.py.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.utils import p64, u64

from neo.client.exception import NEOStorageError
from neo.lib.protocol import HANDSHAKE, AcceptIdentification, Error, NodeType
from tests.history import OK
from tests.simulation.workload import TokenStorage

from .chaos import (
    FINISHING,
    FULL,
    LIMITS,
    NOTICED,
    VOTED,
    World,
    report,
    times,
    within,
)
from .harness import free_port, until
from .peer import Peer, identification
from .test_robustness import STREAMS, ports


def test_24_older_copy(tmp_path: Path) -> None:
    """One replica comes back with an older copy of its database."""
    with World(tmp_path) as world:
        path, copy = world.path("storage1.sqlite"), world.path("older.sqlite")
        for name in list(world.processes):
            world.kill(name)
        shutil.copy(path, copy)
        for suffix in "-wal", "-shm":
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(path + suffix, copy + suffix)
        world.start()
        world.wait_healthy()
        world.progress(100)
        for name in list(world.processes):
            world.kill(name)
        for suffix in "", "-wal", "-shm":
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + suffix)
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(copy + suffix, path + suffix)
        world.start()
        world.progress(30)
        counts = world.audit()
    report(24, "older copy put back", **counts)


def test_25_lost_disk(tmp_path: Path) -> None:
    """A storage and its disk are lost; an empty one takes its place."""
    with World(tmp_path) as world:

        def done(*command: str) -> None:
            status, out, err = world.neoctl(*command)
            assert not status, (command, out, err)

        with world.measured() as m:
            world.kill("storage1")
            os.remove(world.path("storage1.sqlite"))
            world.gone.add("storage1")
            world.add_storage()
            until(lambda: "S4" in world.neoctl("print", "node")[1], "S4 is pending")
            done("add", "--wait", "10", "S4")
            done("tweak", "--wait", "60", "S1")
            assert copies(world, "S2", "S3", "S4") == 24, world.describe()
            done("drop", "S1")
        assert world.healthy, world.describe()
        world.audit()
    report(25, "lost disk", gap=m.gap)
    assert m.gap <= within(1)


@contextlib.contextmanager
def false_storage(world: World, name: bytes = b"test") -> Iterator[Peer]:
    """A storage that identifies, and then says nothing."""
    port = int(world.primary.removeprefix("master")) - 1
    with Peer(world.masters[port]) as peer:
        peer.sock.sendall(
            HANDSHAKE
            + identification(
                NodeType.STORAGE, address=(b"127.0.0.1", free_port()), name=name
            )
        )
        yield peer


def test_26_storage_never_ready(tmp_path: Path) -> None:
    """Storages are added that never get ready, are dead, are of another cluster."""
    with World(tmp_path, limits=LIMITS) as world:
        with world.measured() as m, false_storage(world) as peer:
            while (answer := peer.receive())[1] != AcceptIdentification.code:
                pass
            nid = f"S{answer[2][2]}"
            world.neoctl("add", nid)
            world.neoctl("tweak")
            time.sleep(20 if FULL else 8)
        world.neoctl("tweak", nid)
        world.neoctl("drop", nid)
        world.balance()
        with false_storage(world, b"other") as peer:
            assert peer.receive()[1] == Error.code
        status, _, err = world.neoctl("add", "S9")
        assert status
        assert "S9" in err
        world.wait_healthy()
        world.audit()
    report(26, "a storage that is never ready", gap=m.gap, **m.errors)
    assert m.gap <= NOTICED


class Killer(threading.Thread):
    """Kills and restarts random nodes, in a block."""

    def __init__(self, world: World, every: float = 0.7) -> None:
        super().__init__()
        self.world = world
        self.every = every
        self.over = threading.Event()
        self.kills: list[str] = []

    def run(self) -> None:
        world = self.world
        while not self.over.wait(world.rng.uniform(0, self.every)):
            name = world.rng.choice([*world.storage_names, *world.master_names])
            self.kills.append(name)
            world.kill(name)
            world.start_node(name)

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def test_27_kill_during_creation(tmp_path: Path) -> None:
    """Nodes are killed while the database is created."""
    for n in times(1, 10):
        world = World(tmp_path / str(n))
        try:
            world.start(wait=False)
            with Killer(world, 0.3):
                time.sleep(2)
            world.wait_state("RUNNING")
            world.load()
            world.audit()
        finally:
            world.close()


def again(world: World, *command: str, done: str | None = None) -> None:
    """Repeat a command until it succeeds, or is refused because it is done."""
    last: list[tuple[int, str, str]] = []

    def succeeds() -> bool:
        last[:] = [world.neoctl(*command)]
        status, _, err = last[0]
        return not status or (done is not None and done in err)

    try:
        until(succeeds, str(command))
    except AssertionError:
        raise AssertionError((command, last)) from None


def copies(world: World, *nids: str) -> int:
    """Number of cells that are up to date on these storages, -1 if some are not."""
    lines = world.neoctl("print", "pt")[1].splitlines()
    cells = [text.split() for text in lines if text[:2] in nids]
    if any(set(row) - {"U", "."} for _, _, row in cells):
        return -1
    return sum(row.count("U") for _, _, row in cells)


def test_27_kill_during_tweak(tmp_path: Path) -> None:
    """Nodes are killed while a storage is added, and while it is emptied."""
    with World(tmp_path) as world:
        for _ in times(1, 5):
            with Killer(world) as killer:
                name = world.add_storage()
                nid = f"S{name.removeprefix('storage')}"
                until(lambda nid=nid: nid in world.neoctl("print", "node")[1], nid)
                again(world, "add", nid)
                again(world, "tweak")
                time.sleep(3)
            world.balance()
            world.progress()
            with Killer(world) as killer:
                again(world, "tweak", nid)
                time.sleep(3)
            again(world, "tweak", nid)
            # Its cells stay until it is dropped.
            until(lambda: copies(world, "S1", "S2", "S3") == 24, "tweak")
            world.kill(name)
            again(world, "drop", nid, done="unknown node")  # if it had no cell any more
            world.gone.add(name)
            world.progress()
        counts = world.audit()
    report(27, "kills during add, tweak, drop", kills=len(killer.kills), **counts)


def test_27_kill_during_truncation(tmp_path: Path) -> None:
    """Nodes are killed while the database is truncated: done, or not done."""
    with World(tmp_path) as world:
        world.stop_clients()
        with world.client(kind=TokenStorage) as storage:
            storage.sync()
            tid = storage.lastTransaction()
        world.start_client("client1")
        world.progress(50)
        world.stop_clients()
        known = {a.tid for a in world.history.values() if a.outcome == OK}
        with Killer(world, 1):
            again(world, "truncate", "--yes", f"tid:{u64(tid)}")
            time.sleep(3)
        world.heal()
        world.wait_healthy(60)
        with world.client(kind=TokenStorage) as storage:
            storage.sync()
            last = storage.lastTransaction()
        if last != tid:
            assert last == max(known)  # type: ignore[type-var]
            again(world, "truncate", "--yes", "--wait", "20", f"tid:{u64(tid)}")
        world.history = {
            token: attempt
            for token, attempt in world.history.items()
            if attempt.at <= tid and (attempt.tid is None or attempt.tid <= tid)
        }
        world.start_client("client2")
        world.progress(10)
        world.audit()
    report(27, "kills during truncate", done=last == tid)


def test_29_malformed_input_under_load(tmp_path: Path) -> None:
    """Strangers send nonsense to all ports: the work goes on."""
    with World(tmp_path) as world:
        streams = list(STREAMS.values())
        addresses = list(ports(world).values())

        attacking, over = threading.Event(), threading.Event()

        def attack() -> None:
            for i, data in enumerate(itertools.cycle(streams)):
                if over.wait(0.02):
                    break
                attacking.wait()
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(addresses[i % len(addresses)], 10) as sock,
                ):
                    sock.sendall(data)

        def rate() -> float:
            before, start = world.read(), time.monotonic()
            time.sleep(1)
            return (world.read() - before) / (time.monotonic() - start)

        thread = threading.Thread(target=attack)
        thread.start()
        rates: dict[bool, list[float]] = {False: [], True: []}
        try:
            # In turn, because other work of the machine comes and goes.
            for i in times(6, 40):
                (attacking.set if i % 2 else attacking.clear)()
                rates[bool(i % 2)].append(rate())
        finally:
            over.set()
            attacking.set()
            thread.join()
        world.audit()
    usual, attacked = (statistics.median(rates[b]) for b in (False, True))
    report(29, "malformed input under load", usual=usual, attacked=attacked)
    assert attacked > usual / 2


REFUSED: dict[str, dict[str, Any]] = {
    "cluster name": {"name": b"other"},
    "id of a storage that is here": {"nid": 1},
}


def test_34_refused_peers(tmp_path: Path) -> None:
    """Peers that can't be right are told so at once."""
    with World(tmp_path, clients=1) as world:
        address = world.masters[int(world.primary.removeprefix("master")) - 1]
        for case, fields in REFUSED.items():
            start = time.monotonic()
            with Peer(address) as peer:
                fields = {"address": (b"127.0.0.1", free_port()), **fields}
                peer.sock.sendall(
                    HANDSHAKE + identification(NodeType.STORAGE, **fields)
                )
                _, code, args = peer.receive()
                assert code == Error.code, case
                assert args[1], case
            assert time.monotonic() - start < within(1)
        with socket.create_connection(address, 5) as sock:
            sock.sendall(HANDSHAKE[:-1] + b"\x09")
            received = b""
            while data := sock.recv(100):
                received += data
            assert received == HANDSHAKE
        assert "version" in world.said(world.primary)
        world.audit()


def commit(storage: TokenStorage, tid: bytes | None = None) -> bytes:
    """One revision of one object."""
    txn = TransactionMetaData()
    storage.tpc_begin(txn, tid)
    try:
        oid = storage.new_oid()
        storage.store(oid, bytes(8), b"x", "", txn)
        storage.tpc_vote(txn)
        done: bytes = storage.tpc_finish(txn)
        return done
    finally:
        storage.tpc_abort(txn)


def test_36_explicit_tids(tmp_path: Path) -> None:
    """Clients may choose a tid only if it is the next, and of about now."""
    with World(tmp_path, masters=1, clients=0) as world:
        with world.client(kind=TokenStorage) as storage:
            last = commit(storage)
            day = 24 * 60 << 32
            for tid in (bytes(8), last, p64(u64(last) + 2 * day), p64((1 << 63) - 1)):
                with pytest.raises(NEOStorageError):
                    raise AssertionError((tid, commit(storage, tid)))
            following = p64(u64(last) + 1)
            assert commit(storage, following) == following
            assert commit(storage) > following
        world.kill("master1")
        world.start_node("master1")
        with world.client(kind=TokenStorage) as storage:
            commit(storage)


def test_37_stopping(tmp_path: Path) -> None:
    """The cluster is stopped in any state: all nodes exit, and start again."""
    seconds = {}
    # One that is stopped after its vote holds locks which another one waits for.
    stopped = {FINISHING: ("client4", "client5"), VOTED: ("client4",)}
    with World(tmp_path) as world:
        for state in ("RUNNING", FINISHING, "RECOVERING", VOTED):
            clients = stopped.get(state, ())
            for name in clients:
                world.start_client(name, stop=(state, signal.SIGSTOP))
            if clients:
                text, count = f"stopped: {state}", len(clients)
                until(
                    lambda t=text, n=count: (
                        world.read() and world.messages.count(t) == n
                    ),
                    text,
                )
            elif state == "RECOVERING":
                for name in ("storage1", "storage2"):
                    world.kill(name)
                until(lambda: world.state() == "RECOVERING")
            start = time.monotonic()
            world.stop()
            seconds[state] = time.monotonic() - start
            world.restart()
            for name in clients:
                world.resume(name)
                world.stop_client(name)
            world.wait_healthy()
            world.progress()
        world.audit()
    report(37, "stop in each state", seconds=seconds)
    assert max(seconds.values()) <= within(10), seconds
