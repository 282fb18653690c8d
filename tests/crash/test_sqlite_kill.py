"""A storage's database survives the death of its process at any statement.

A child process runs a script of SQL transactions and kills itself before its n-th
statement, for each n until the script ends alive. The database then opens, holds all
that was acknowledged and no half transaction, and the script goes on from there.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from neo.storage.database.memory import MemoryBackend
from neo.storage.database.sqlite import SQLiteBackend

from .script import SCRIPT, check, content, run, states

SAMPLES = Path(__file__).parents[1] / "samples"


class Deadly:
    """A cursor that ends the process before its n-th statement."""

    def __init__(self, cursor: Any, n: int) -> None:
        self.cursor = cursor
        self.left = n

    def __getattr__(self, name: str) -> Any:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(self.cursor, name)


class DeadlyBackend(SQLiteBackend):
    """Its process dies before the n-th statement of its opening."""

    n = 0

    def open_database(self, dedup: bool, reset: bool = False) -> None:
        """Create or migrate."""
        self._write = Deadly(self._write, self.n)  # type: ignore[assignment]
        super().open_database(dedup, reset)


def child(path: str, n: int, pipe: int) -> None:
    """Run the script, die before the n-th statement; tell the steps that are done."""
    db = SQLiteBackend(path)
    db._write = Deadly(db._write, n)  # type: ignore[assignment]
    for step in range(len(SCRIPT)):
        run(db, step)
        os.write(pipe, b".")


def survives(job: Callable[[], object]) -> bool:
    """Do something in a child process; whether it reached the end."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            job()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0


@pytest.mark.parametrize("query", ["", "?journal_mode=delete"])
def test_kill_at_each_statement(folder: Path, query: str) -> None:
    """See the module."""
    expected = states()
    n, alive = 0, False
    while not alive:
        n += 1
        path = f"file:{folder}/{n}{query}"
        reader, writer = os.pipe()
        alive = survives(partial(child, path, n, writer))
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            done = len(pipe.read())
        reopen(path, expected, done)
    assert n > 150
    assert done == len(SCRIPT)


@pytest.mark.parametrize("sample", [None, "a-dedup", "b-crash", "e-v0", "e-v3"])
def test_kill_at_each_statement_of_opening(folder: Path, sample: str | None) -> None:
    """Creation, clean-up after a crash, migration: all of it or nothing."""
    old = (SAMPLES / f"{sample}.sqlite").read_bytes() if sample else b""
    backend = MemoryBackend(old or None)
    expected = content(backend)
    backend.close()
    n, alive = 0, False
    while not alive:
        n += 1
        path = folder / str(n)
        path.write_bytes(old)
        DeadlyBackend.n = n
        alive = survives(partial(DeadlyBackend, str(path)))
        db = SQLiteBackend(str(path))
        assert db._query("PRAGMA integrity_check") == [("ok",)]
        assert content(db) == expected
        db.close()
    assert n > 20


def reopen(path: str, expected: list[Any], done: int) -> None:
    db = SQLiteBackend(path)
    # Killed between a commit and its acknowledgement, or before.
    step = check(db, expected, done, min(done + 1, len(SCRIPT)))
    for rest in range(step, len(SCRIPT)):
        run(db, rest)
    db.close()
    db = SQLiteBackend(path)
    assert content(db) == expected[-1]
    db.close()
