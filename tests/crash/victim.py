"""A process whose calls to the disk are recorded, or fail: see `disk.c`.

Arguments: what to do, the database, a file that gets a byte after each step that is
done, and the file of the library's `struct control`.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from neo.lib.exception import BackendError, ConfigurationError
from neo.storage.database.sqlite import SQLiteBackend

from .disk import SYNC, TRUNCATE, UNLINK, WRITE, Control
from .script import SCRIPT, check, content, run, states

FAILED = 99  # status


class Victim:
    """See the module."""

    def __init__(self, database: str, marks: str, control: str) -> None:
        self.database = database
        self.marks = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        with open(control, "r+b") as file:
            self.map = mmap.mmap(file.fileno(), 0)
        self.control = Control.from_buffer(self.map)

    @property
    def path(self) -> str:
        """Of the database."""
        return self.database.removeprefix("file:").partition("?")[0]

    def live(self) -> None:
        """The whole script, with a clean end."""
        db = SQLiteBackend(self.database)
        self.mark(0)
        for step in range(len(SCRIPT)):
            run(db, step)
            self.mark(step + 1)
        db.close()

    def open(self) -> None:
        """Create or migrate, no more."""
        SQLiteBackend(self.database)
        os._exit(0)

    def mark(self, done: int) -> None:
        """Tell that a number of steps are done."""
        os.write(self.marks, bytes([done]))

    def fail(self, code: int, kind: int, forever: bool, stride: int) -> None:
        """The n-th call fails, for some n: never done, and fine once it works again."""
        expected = states()
        ops = (SYNC,) if kind == SYNC else (WRITE, TRUNCATE, UNLINK)
        n, failed = 1 - stride, True
        while failed:
            n += stride
            self.control.arm(n, code, *ops, forever=forever)
            done = self.try_all()
            failed = self.control.failed > 0
            self.control.disarm()
            db = SQLiteBackend(self.database)
            # What failed may be there: its outcome is unknown.
            step = check(db, expected, max(done, 0), min(done + 1, len(SCRIPT)))
            assert failed or step == len(SCRIPT)
            for rest in range(step, len(SCRIPT)):
                run(db, rest)
            assert content(db) == expected[-1]
            db.close()
            os.unlink(self.path)
        sys.stdout.write(f"{n}\n")

    def try_all(self, close: bool = True) -> int:
        """Run the script up to the first error; steps that are done, -1: not opened."""
        db: Any = None
        done = -1
        try:
            db = SQLiteBackend(self.database)
            done = 0
            for step in range(len(SCRIPT)):
                run(db, step)
                done = step + 1
        except (BackendError, ConfigurationError) as e:
            message = str(e)
            assert self.path in message, message
            assert "\n" not in message
            if db is not None:
                self.refuses(db)
        if not close:
            os._exit(done + 1)
        if db is not None:
            db.close()
        return done

    def refuses(self, db: SQLiteBackend) -> None:
        """As long as it lasts, nothing is ever done, however small."""
        while self.control.countdown:
            try:
                db.begin(durable=True)
                db.set_config("version", "4")
                db.commit()
            except BackendError:
                db.rollback()
                self.control.disarm()
            else:
                raise AssertionError("done, on a broken disk")

    def relive(self, stride: int) -> None:
        """For some n, the n-th sync fails once; the script goes on after a restart.

        Each in a database of its own, whose name ends with n; then power is lost.
        """
        database, n, failed = self.database, 1 - stride, True
        expected = states()
        while failed:
            n += stride
            self.database = database.replace("db", f"db{n}")
            self.control.arm(n, errno.EIO, SYNC)
            done = max(forked(lambda: self.try_all(close=False)) - 1, 0)
            failed = self.control.failed > 0
            self.control.disarm()
            rest = partial(self.go_on, expected, done, min(done + 1, len(SCRIPT)))
            assert forked(rest) == 0
        sys.stdout.write(f"{n}\n")

    def go_on(self, expected: list[Any], least: int, most: int) -> int:
        """The rest of the script, without a clean end."""
        db = SQLiteBackend(self.database)
        for step in range(check(db, expected, least, most), len(SCRIPT)):
            run(db, step)
        return 0


def forked(job: Callable[[], int]) -> int:
    """Do something in a process that ends without closing anything; its status."""
    pid = os.fork()
    if not pid:
        status = FAILED
        try:
            status = job()
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status != FAILED
    return status


if __name__ == "__main__":
    logging.disable()
    what, *paths = sys.argv[1:5]
    getattr(Victim(*paths), what)(*map(int, sys.argv[5:]))
