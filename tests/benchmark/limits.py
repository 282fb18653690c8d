"""What the machine can do at best: what figures are to be read beside."""

from __future__ import annotations

import os
import socket
import sqlite3
import tempfile
import time
import zlib
from collections.abc import Callable
from hashlib import sha1
from statistics import median


def each(call: Callable[[], object], number: int) -> float:
    """Median duration, in microseconds."""
    durations = []
    for _ in range(number):
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return median(durations) * 1e6


def echo(cpus: tuple[int, int], number: int) -> float:
    """A request of 60 bytes and an answer of 400, over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        pid = os.fork()
        if not pid:
            try:
                os.sched_setaffinity(0, {cpus[1]})
                peer, _ = server.accept()
                while peer.recv(4096):
                    peer.sendall(bytes(400))
            finally:
                os._exit(0)
        mask = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {cpus[0]})
            with socket.create_connection(server.getsockname()) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

                def trip() -> None:
                    sock.sendall(bytes(60))
                    sock.recv(4096)

                return each(trip, number)
        finally:
            os.sched_setaffinity(0, mask)
            os.waitpid(pid, 0)


def sync(folder: str, number: int) -> float:
    """Append 4 KiB to a file and fsync."""
    fd = os.open(f"{folder}/file", os.O_CREAT | os.O_WRONLY)
    try:
        return each(lambda: os.write(fd, bytes(4096)) and os.fsync(fd), number)
    finally:
        os.close(fd)


def sqlite(folder: str, number: int) -> dict[str, float]:
    """One row: committed with a sync (WAL), and found by its key."""
    db = sqlite3.connect(f"{folder}/sqlite", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, v BLOB)")
    insert = "INSERT INTO t (v) VALUES (?)"
    result = {
        "SQLite commit, WAL, full sync": each(
            lambda: db.execute(insert, (bytes(300),)), number
        ),
        "SQLite look-up": each(
            lambda: db.execute("SELECT v FROM t WHERE k = ?", (7,)).fetchone(), number
        ),
    }
    db.close()
    return result


def limits(folder: str | None = None, number: int = 500) -> dict[str, float]:
    """Name -> median in microseconds."""
    cpus = sorted(os.sched_getaffinity(0))
    text = b"0123456789abcdef" * 19
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        result = {"echo over loopback, one CPU": echo((cpus[0], cpus[0]), number)}
        if len(cpus) > 1:
            result["echo over loopback, two CPUs"] = echo((cpus[0], cpus[1]), number)
        result["fsync of 4 KiB"] = sync(temporary, number)
        result |= sqlite(temporary, number)
    result["SHA-1 of 300 bytes"] = each(lambda: sha1(text).digest(), number)
    result["zlib of 300 bytes"] = each(lambda: zlib.compress(text), number)
    return result
