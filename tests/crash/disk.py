"""What a disk holds after a loss of power, from a record of what was asked of it.

`disk.c` is preloaded in a process and records its calls. Here they are replayed on a
model of a disk that promises as little as possible: what was not synced is there, or
not, or a part of it in any order; a file that is new or gone too, until its folder is
synced.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random  # noqa: TID251  # with a seed of its own
from typing import NamedTuple

import pytest

CREATE, WRITE, TRUNCATE, SYNC, UNLINK, RENAME = range(1, 7)
PIECE = 4096  # what a disk writes whole
_HEAD = struct.Struct("=BBHIq")


def library(folder: Path) -> str:
    """Build the library; skips the test without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    path = folder / "disk.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", path, source, "-ldl", "-lpthread"],
        check=True,
    )
    return str(path)


class Control(ctypes.Structure):
    """`struct control` of the library."""

    _fields_ = (
        ("countdown", ctypes.c_int64),
        ("ops", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("forever", ctypes.c_int32),
        ("failed", ctypes.c_int32),
    )

    def arm(self, n: int, error: int, *ops: int, forever: bool = False) -> None:
        """Let the n-th of these calls fail, or all from then on."""
        self.countdown = 0
        self.ops = sum(1 << op for op in ops)
        self.error = error
        self.forever = forever
        self.failed = 0
        self.countdown = n

    def disarm(self) -> None:
        """Everything works again."""
        self.countdown = 0


class Call(NamedTuple):
    """One call that succeeded, or a SYNC that failed."""

    op: int
    error: int
    name: str  # of the file, in the folder
    data: bytes  # RENAME: the new name
    offset: int


def calls(record: Path, folder: Path) -> Iterator[Call]:
    """Read a record."""
    text = record.read_bytes()
    position = 0
    while position < len(text):
        op, error, path_size, size, offset = _HEAD.unpack_from(text, position)
        position += _HEAD.size
        path = os.fsdecode(text[position : position + path_size])
        position += path_size
        data = text[position : position + size]
        position += size
        if op == RENAME:
            data = os.path.relpath(os.fsdecode(data), folder).encode()
        yield Call(op, error, os.path.relpath(path, folder), data, offset)


class _File:
    def __init__(self) -> None:
        self.durable = bytearray()
        self.pending: list[Call] = []  # not synced yet


def _apply(content: bytearray, call: Call) -> None:
    if call.op == TRUNCATE:
        size = call.offset
        del content[size:]
    else:
        size = call.offset + len(call.data)
    content.extend(bytes(max(0, size - len(content))))
    if call.op == WRITE:
        content[call.offset : size] = call.data


def _pieces(call: Call) -> Iterator[Call]:
    """A write as a disk does it."""
    if call.op != WRITE:
        yield call
        return
    start = call.offset
    end = start + len(call.data)
    while start < end:
        stop = min(end, start - start % PIECE + PIECE)
        data = call.data[start - call.offset : stop - call.offset]
        yield call._replace(data=data, offset=start)
        start = stop


Image = dict[str, bytes]


class Disk:
    """A folder on a disk: what is there for sure, and what may be."""

    def __init__(self) -> None:
        self._names: dict[str, _File] = {}
        self._durable_names: dict[str, _File] = {}
        self._pending_names: list[Call] = []
        self._files: dict[str, _File] = {}  # by the name they had when created

    def add(self, name: str, data: bytes) -> None:
        """A file that has always been there."""
        file = self._files[name] = self._names[name] = self._durable_names[name] = (
            _File()
        )
        file.durable += data

    def do(self, call: Call) -> None:
        """The next call of the record."""
        if call.op in (CREATE, UNLINK, RENAME):
            self._pending_names.append(call)
            if call.op == CREATE:
                file = self._files[call.name] = _File()
            else:
                file = self._files[call.name]
            self._enter(self._names, call, file)
        elif call.name == ".":
            assert call.op == SYNC
            self._sync_names()
        elif call.op != SYNC:
            self._names[call.name].pending.append(call)
        else:
            file = self._names[call.name]
            if not call.error:
                for pending in file.pending:
                    _apply(file.durable, pending)
            # Even if it failed: the system takes the pages for clean, and the next sync
            # says that all is well.
            file.pending.clear()

    def _enter(self, names: dict[str, _File], call: Call, file: _File) -> None:
        if call.op == CREATE:
            names[call.name] = file
        else:
            names.pop(call.name, None)
            if call.op == RENAME:
                names[call.data.decode()] = file

    def _sync_names(self) -> None:
        self._durable_names = dict(self._names)
        self._pending_names.clear()

    def nothing_more(self) -> Image:
        """Only what was synced."""
        return {n: bytes(f.durable) for n, f in self._durable_names.items()}

    def everything(self) -> Image:
        """All that was written, whether synced or not."""
        image = {}
        for name, file in self._names.items():
            content = bytearray(file.durable)
            for call in file.pending:
                _apply(content, call)
            image[name] = bytes(content)
        return image

    def something(self, rng: Random) -> Image:
        """A random half of what was not synced, and the names of the first changes."""
        image = {}
        keep = rng.randint(0, len(self._pending_names))
        names = dict(self._durable_names)
        for call in self._pending_names[:keep]:
            self._enter(names, call, self._files[call.name])
        for name, file in names.items():
            content = bytearray(file.durable)
            for call in file.pending:
                for piece in _pieces(call):
                    if rng.random() < 0.5:
                        _apply(content, piece)
            image[name] = bytes(content)
        return image
