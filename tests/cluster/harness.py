"""Clusters of real processes on 127.0.0.1, for tests.

Nodes are forked from a server process that has imported everything already, so that a
cluster starts in a fraction of a second; each runs the `main()` of its command.
"""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import multiprocessing
import os
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice, pairwise
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from neo.client.Storage import Storage
from neo.lib.epoll import EpollRuntime
from neo.lib.transport import SocketTransport
from neo.lib.util import Address, format_address
from neo.scripts import neoctl

PRELOAD = [
    "neo.scripts.neomaster",
    "neo.scripts.neostorage",
    "neo.scripts.neoadmin",
    "neo.master.app",
    "neo.storage.app",
    "neo.storage.database.mysql",
    "neo.storage.database.sqlite",
    "neo.admin.app",
]
PATIENCE = 30.0  # seconds for what normally takes a few milliseconds

context: ForkServerContext = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)


def until(
    condition: Callable[[], Any], what: str = "", timeout: float = PATIENCE
) -> Any:
    """Wait for `condition()` and return what it says."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, f"timeout: {what or condition}"
        time.sleep(0.01)
    return result


class Ports:
    """Ports that no other process picks while this one lives.

    The system gives those of its range to whoever connects or binds to any: such a port
    would not stay free until a node binds to it, or while the node restarts. So they
    are of a block outside of this range, which is locked by a socket with its number.
    """

    FIRST, BLOCK = 10240, 256

    def __init__(self) -> None:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            low, high = map(int, file.read().split())
        blocks = range(self.FIRST, 0x10000, self.BLOCK)
        quiet = [b for b in blocks if b + self.BLOCK <= low or b > high]
        self._lock = socket.socket(socket.AF_UNIX)
        for block in quiet or blocks:
            with contextlib.suppress(OSError):
                self._lock.bind(f"\0neo-test-ports-{block}")
                break
        else:
            raise AssertionError("too many tests at once")
        self._ports = cycle(range(block, min(block + self.BLOCK, 0x10000)))

    def next(self) -> int:
        """The next one that nobody listens on."""
        for port in islice(self._ports, self.BLOCK):
            with socket.socket() as sock, contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(("", port))
                return port
        raise AssertionError("no free port")


@functools.cache
def _ports() -> Ports:
    return Ports()


def free_port() -> int:
    """A port that nobody listens on, and nobody else will."""
    return _ports().next()


def listening(address: Address) -> bool:
    """Whether somebody accepts connections."""
    try:
        socket.create_connection(address, 1).close()
    except OSError:
        return False
    return True


def disturb(env: dict[str, str]) -> None:
    """Change the world of this process, which is of a test.

    NEO_TEST_VIA: the host to connect to instead of any other, with the same port.
    NEO_TEST_CLOCK: file with two doubles, seconds that the clock is ahead, and those
    that it gains per second; it may change at any time.
    """
    if host := env.get("NEO_TEST_VIA"):
        connect = SocketTransport.connect

        def connect_via(
            self: SocketTransport, address: Address, local: socket.socket | None
        ) -> None:
            if local is not None:
                local.close()
            connect(self, (host, address[1]), None)

        SocketTransport.connect = connect_via  # type: ignore[method-assign]
    if path := env.get("NEO_TEST_CLOCK"):
        with open(path, "rb") as file:
            clock = mmap.mmap(file.fileno(), 16, access=mmap.ACCESS_READ)

        def now(self: EpollRuntime) -> float:
            offset, drift = struct.unpack("dd", clock)
            return time.time() * (1 + drift) + offset  # type: ignore[no-any-return]

        EpollRuntime.now = now  # type: ignore[method-assign]


def _follow_parent() -> None:
    """Die with the process that runs the tests, however it ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _run(module: str, argv: list[str], stderr: str, env: dict[str, str]) -> None:
    """Body of a node's process."""
    os.environ.update(env)
    disturb(env)
    threading.Thread(target=_follow_parent, daemon=True).start()
    fd = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 2)
    os.close(fd)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main = __import__(module, fromlist=["main"]).main
    sys.exit(main(argv))


class Cluster:
    """Nodes `master1`..., `storage1`..., `admin`, in a directory of their own.

    `options`: more arguments for all daemons (TLS...). `database(node)`: arguments for
    the database of a storage, None for a file of SQLite. Usable as a context manager.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        name: str = "test",
        masters: int = 1,
        storages: int = 1,
        partitions: int = 12,
        replicas: int = 0,
        options: tuple[str, ...] = (),
        autostart: bool = True,
        database: Callable[[str], list[str] | None] = lambda node: None,
    ) -> None:
        self._temporary = None
        if directory is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="neo-test-")
            directory = self._temporary.name
        self.directory = str(directory)
        os.makedirs(self.directory, exist_ok=True)
        self.name = name
        self.masters: list[Address] = [
            ("127.0.0.1", free_port()) for _ in range(masters)
        ]
        self.admin: Address = ("127.0.0.1", free_port())
        self.storages = storages
        self.partitions = partitions
        self.replicas = replicas
        self.options = options
        self.autostart = autostart
        self.database = database
        self.env: dict[str, str] = {}
        self.processes: dict[str, ForkServerProcess] = {}
        self._clients: list[Storage] = []

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def master_nodes(self) -> str:
        """Addresses of the masters."""
        return " ".join(map(format_address, self.masters))

    def path(self, name: str) -> str:
        """A file of the cluster."""
        return os.path.join(self.directory, name)

    # --- processes ----------------------------------------------------------------

    def start_node(self, name: str, *more: str) -> ForkServerProcess:
        """Start one node."""
        kind = name.rstrip("0123456789")
        argv = ["--cluster", self.name, "--masters", self.master_nodes]
        argv += ["--logfile", self.path(f"{name}.log"), *self.options]
        if kind == "master":
            argv += ["--bind", format_address(self.masters[int(name[6:]) - 1])]
            argv += ["--partitions", str(self.partitions)]
            argv += ["--replicas", str(self.replicas)]
            if self.autostart:
                argv += ["--autostart", str(self.storages)]
        elif kind == "storage":
            file = ["--adapter", "SQLite", "--database", self.path(f"{name}.sqlite")]
            argv += ["--bind", "127.0.0.1:0", *(self.database(name) or file)]
        else:
            argv += ["--bind", format_address(self.admin)]
        process = context.Process(
            target=_run,
            args=(
                f"neo.scripts.neo{kind}",
                [*argv, *more],
                self.stderr(name),
                self.env,
            ),
            daemon=True,
        )
        process.start()
        self.processes[name] = process
        if kind == "master":
            address = self.masters[int(name[6:]) - 1]
            until(lambda: listening(address) or not process.is_alive(), name)
        return process

    def stderr(self, name: str) -> str:
        """File that gets what the node says on stderr."""
        return self.path(f"{name}.stderr")

    def said(self, name: str) -> str:
        """What a node said on stderr."""
        try:
            with open(self.stderr(name)) as f:
                return f.read()
        except FileNotFoundError:
            return ""

    def start(self, wait: bool = True) -> None:
        """Start all nodes; return when clients are served."""
        for i in range(1, len(self.masters) + 1):
            self.start_node(f"master{i}")
        for i in range(1, self.storages + 1):
            self.start_node(f"storage{i}")
        self.start_node("admin")
        if wait:
            self.wait_state("RUNNING")

    def wait_state(self, state: str) -> None:
        """Wait until the cluster is in this state."""
        until(lambda: self.state() == state, f"{state}, not {self.state()}")

    def state(self) -> str:
        """State of the cluster, as the admin knows it."""
        status, out, err = self.neoctl("print", "cluster")
        return out.strip() if not status else err.strip()

    def kill(self, name: str) -> None:
        """kill -9."""
        process = self.processes.pop(name)
        process.kill()
        process.join()

    def terminate(self, name: str) -> int:
        """SIGTERM; the exit status."""
        process = self.processes.pop(name)
        process.terminate()
        return self._joined(name, process)

    def exited(self, name: str) -> int:
        """Wait for the end of a node; its exit status."""
        return self._joined(name, self.processes.pop(name))

    def _joined(self, name: str, process: ForkServerProcess) -> int:
        process.join(PATIENCE)
        assert process.exitcode is not None, f"{name} does not stop"
        return process.exitcode

    def stop(self) -> None:
        """Graceful stop of all nodes, which must exit with status 0."""
        status, _, err = self.neoctl("set", "cluster", "stopping")
        assert not status, err
        for name in list(self.processes):
            assert self.exited(name) == 0, (name, self.said(name))

    def close(self) -> None:
        """End all, at once."""
        for client in self._clients:
            client.close()
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join()
        self.processes.clear()
        if self._temporary is not None:
            self._temporary.cleanup()

    # --- access -------------------------------------------------------------------

    def storage(self, kind: type[Storage] = Storage, **options: Any) -> Storage:
        """A client; closed with the cluster."""
        storage = kind(master_nodes=self.master_nodes, name=self.name, **options)
        self._clients.append(storage)
        return storage

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[Storage]:
        """A client, closed at the end of the block."""
        storage = self.storage(**options)
        try:
            yield storage
        finally:
            storage.close()
            self._clients.remove(storage)

    def neoctl(self, *args: str) -> tuple[int, str, str]:
        """(exit status, stdout, stderr) of a neoctl command."""
        out, err = io.StringIO(), io.StringIO()
        pairs = pairwise(self.options)
        tls = [
            t for pair in pairs if pair[0] in ("--ca", "--cert", "--key") for t in pair
        ]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = neoctl.main(["-a", format_address(self.admin), *tls, *args])
        return status, out.getvalue(), err.getvalue()
