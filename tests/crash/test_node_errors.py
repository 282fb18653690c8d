"""A storage node whose disk fails: it says so and stops, and starts again (row 21)."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.harness import Cluster, until
from tests.cluster.test_faults import Load

from .disk import SYNC, TRUNCATE, WRITE, Control, library

FAULTS = [  # which calls, error, n-th, forever
    ((SYNC,), errno.EIO, 1, False),
    ((SYNC,), errno.EIO, 2, True),
    ((WRITE, TRUNCATE), errno.EIO, 3, False),
    ((WRITE, TRUNCATE), errno.ENOSPC, 7, True),
]


class Process(subprocess.Popen[bytes]):
    """With the face of a process of the harness."""

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.poll() is None

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""
        self.wait(timeout)

    @property
    def exitcode(self) -> int | None:
        """Its status."""
        return self.poll()


class Failing(Cluster):
    """The disk of `storage1` does what `control` says."""

    def __init__(self, directory: Path, **options: Any) -> None:
        super().__init__(directory, **options)
        path = self.path("control")
        Path(path).write_bytes(bytes(Control()))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.control = Control.from_buffer(self._map)
        self._preloaded = {
            **os.environ,
            "LD_PRELOAD": library(directory),
            "NEO_DISK_FOLDER": self.path("storage1.sqlite"),
            "NEO_DISK_CONTROL": path,
        }

    def start_node(self, name: str, *more: str) -> Any:
        """Start one node."""
        if name != "storage1":
            return super().start_node(name, *more)
        argv = ["--cluster", self.name, "--masters", self.master_nodes]
        argv += ["--logfile", self.path(f"{name}.log"), "--bind", "127.0.0.1:0"]
        argv += ["--adapter", "SQLite", "--database", self.path(f"{name}.sqlite")]
        command = [sys.executable, "-m", "neo.scripts.neostorage", *argv, *more]
        with open(self.stderr(name), "ab") as stderr:
            process = Process(command, env=self._preloaded, stderr=stderr)
        self.processes[name] = process  # type: ignore[assignment]
        return process

    def healthy(self) -> bool:
        """Whether all cells are up to date."""
        return self.neoctl("print", "summary", "--check")[0] == 0


@pytest.mark.parametrize("storages", [1, 2])
def test_failing_disk(tmp_path: Path, storages: int) -> None:
    """One line that names the file; what was acknowledged is there after a restart."""
    options = {"storages": storages, "replicas": storages - 1, "partitions": 2}
    with Failing(tmp_path, **options) as cluster:
        with Load(cluster) as load:
            for ops, error, n, forever in FAULTS:
                before = len(cluster.said("storage1"))
                cluster.control.arm(n, error, *ops, forever=forever)
                assert cluster.exited("storage1") == 1
                said = cluster.said("storage1")[before:].splitlines()
                lines = [line for line in said if "WARNING" not in line]
                assert len(lines) == 1, said
                assert "CRITICAL" in lines[0]
                assert cluster.path("storage1.sqlite") in lines[0]
                if storages > 1:
                    load.progress()  # the others go on
                cluster.control.disarm()
                cluster.start_node("storage1")
                load.progress()
                until(cluster.healthy, "replication")
        load.check()
