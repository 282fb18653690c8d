"""A storage's database survives the loss of power at any moment, and a failing disk.

`disk.py` tells how what the disk holds then is found; the script is that of
`test_sqlite_kill.py`. With NEO_CRASH in the environment, more of it is done.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random  # noqa: TID251  # with a seed of its own
from typing import Any

import pytest

from neo.storage.database.memory import MemoryBackend
from neo.storage.database.sqlite import SQLiteBackend

from .disk import SYNC, WRITE, Call, Control, Disk, Image, calls, library
from .script import SCRIPT, check, content, run, states

# Each write and sync, instead of some.
EVERYTHING = bool(os.environ.get("NEO_CRASH"))
MODES = ["", "?journal_mode=delete"]
ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "tests" / "samples"


@pytest.fixture(scope="module")
def disk_library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """See `disk.c`."""
    return library(tmp_path_factory.mktemp("library"))


def victim(
    folder: Path, library: str, query: str, what: str, *args: int, record: bool = True
) -> tuple[list[Call], str]:
    """Run a method of a victim on a database; (what it did to the disk, its output)."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    control = folder / "control"
    control.write_bytes(bytes(Control()))
    env = {
        **os.environ,
        "LD_PRELOAD": library,
        "NEO_DISK_FOLDER": str(data),
        "NEO_DISK_CONTROL": str(control),
    }
    if record:
        env["NEO_DISK_RECORD"] = str(folder / "record")
    command = [sys.executable, "-m", "tests.crash.victim", what]
    command += [f"file:{data}/db{query}", str(data / "marks"), str(control)]
    done = subprocess.run(
        [*command, *map(str, args)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(calls(folder / "record", data)) if record else [], done.stdout


def moments(record: list[Call]) -> Iterator[tuple[Disk, int, int]]:
    """The disk before and after each call, with what was promised till then.

    Yields (disk, steps that are done for sure, steps that were done).
    """
    disk = Disk()
    sure = done = 0
    for call in record:
        if call.name == "marks":
            if call.op == WRITE:
                done = call.data[0]
                if done and SCRIPT[done - 1][0]:
                    sure = done
            continue
        disk.do(call)
        yield disk, sure, done


def put(image: Image, folder: Path) -> str:
    """Make the files; the database."""
    folder.mkdir()
    for name, data in image.items():
        (folder / name).write_bytes(data)
    return str(folder / "db")


@pytest.mark.parametrize("query", MODES)
def test_power_loss(folder: Path, disk_library: str, query: str) -> None:
    """After each write, sync, change of size or name: as the disk may be then."""
    record, _ = victim(folder, disk_library, query, "live")
    expected = states()
    rng = Random(len(record))
    seen: set[tuple[Any, ...]] = set()
    looked = 0
    for number, (disk, sure, done) in enumerate(moments(record)):
        images = disk.nothing_more(), disk.everything(), disk.something(rng)
        for kind, image in enumerate(images):
            key = sure, done, tuple(map(hash, sorted(image.items())))
            if key in seen:
                continue
            seen.add(key)
            looked += 1
            path = put(image, folder / f"{number}.{kind}")
            reopen(f"file:{path}{query}", expected, sure, done, looked % 5 == 0)
    assert looked > 300


def reopen(
    path: str, expected: list[Any], sure: int, done: int, to_the_end: bool
) -> None:
    """Check a database; go on with the script."""
    db = SQLiteBackend(path)
    step = check(db, expected, sure, min(done + 1, len(SCRIPT)))
    if to_the_end:
        for rest in range(step, len(SCRIPT)):
            run(db, rest)
        assert content(db) == expected[-1]
    db.close()


@pytest.mark.parametrize("query", MODES)
@pytest.mark.parametrize("sample", ["e-v0", "e-v3"])
def test_power_loss_in_migration(
    folder: Path, disk_library: str, query: str, sample: str
) -> None:
    """From an old format: all of it or nothing, and then it is done again."""
    old = (SAMPLES / f"{sample}.sqlite").read_bytes()
    (folder / "data").mkdir()
    (folder / "data" / "db").write_bytes(old)
    record, _ = victim(folder, disk_library, query, "open")
    backend = MemoryBackend(old)
    expected = content(backend)
    backend.close()
    disk = Disk()
    disk.add("db", old)
    rng = Random(len(record))
    for number, call in enumerate(record):
        if call.name == "marks":
            continue
        disk.do(call)
        for kind in range(3):
            images = disk.nothing_more, disk.everything, partial(disk.something, rng)
            path = put(images[kind](), folder / f"{number}.{kind}")
            db = SQLiteBackend(f"file:{path}{query}")
            assert db._query("PRAGMA integrity_check") == [("ok",)]
            assert content(db) == expected
            db.close()
    assert number > 5


@pytest.mark.parametrize("query", MODES)
def test_failed_sync(folder: Path, disk_library: str, query: str) -> None:
    """After a sync that failed, a restart doesn't trust what is in memory only.

    The system forgets that those pages are not on the disk, so no later sync writes
    them: whatever is promised after the restart must not depend on them.
    """
    stride = 3 if query and not EVERYTHING else 1
    record, said = victim(folder, disk_library, query, "relive", stride)
    expected = states()
    assert int(said) > 10
    for n in range(1, int(said) + 1, stride):
        disk = Disk()
        for call in record:
            if call.name == "." or call.name.partition("-")[0] == f"db{n}":
                disk.do(call)
        path = put(disk.nothing_more(), folder / str(n))
        last = len(SCRIPT)
        reopen(f"file:{path}{n}{query}", expected, last, last, False)


@pytest.mark.parametrize("query", MODES)
@pytest.mark.parametrize(
    ("kind", "error"),
    [(SYNC, errno.EIO), (WRITE, errno.EIO), (WRITE, errno.ENOSPC)],
    ids=["sync", "write", "full"],
)
@pytest.mark.parametrize("forever", [False, True], ids=["once", "forever"])
def test_errors(
    folder: Path, disk_library: str, query: str, kind: int, error: int, forever: bool
) -> None:
    """The n-th write or sync fails: one line that names the file, no false promise."""
    stride = (1 if kind == SYNC else 3) * (3 if query else 1)
    args = error, kind, int(forever), 1 if EVERYTHING else stride
    _, said = victim(folder, disk_library, query, "fail", *args, record=False)
    assert int(said) > 10
