"""A storage's database survives the death of its process at any statement.

A child process runs a script of SQL transactions and kills itself before its n-th
statement, for each n until the script ends alive. The database then opens, holds all
that was acknowledged and no half transaction, and the script goes on from there.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from neo.storage.database.sqlite import SQLiteBackend

from .script import SCRIPT, check, content, run, states


def child(path: str, n: int, pipe: int) -> None:
    """Run the script, die before the n-th statement; tell the steps that are done."""
    db = SQLiteBackend(path)
    count = 0
    cursor = db._write

    class Deadly:
        def __getattr__(self, name: str) -> Any:
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return getattr(cursor, name)

    db._write = Deadly()  # type: ignore[assignment]
    for step in range(len(SCRIPT)):
        run(db, step)
        os.write(pipe, b".")


@pytest.mark.parametrize("query", ["", "?journal_mode=delete"])
def test_kill_at_each_statement(tmp_path: Path, query: str) -> None:
    """See the module."""
    expected = states()
    n, alive = 0, False
    while not alive:
        n += 1
        path = f"file:{tmp_path}/{n}{query}"
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                child(path, n, writer)
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            done = len(pipe.read())
        alive = os.waitpid(pid, 0)[1] == 0
        reopen(path, expected, done)
    assert n > 150
    assert done == len(SCRIPT)


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
