"""neosimple: run a whole cluster on this machine, in the foreground.

Masters, storages and an admin node run as child processes; their databases and logs
are in one directory. Storages use SQLite or, with `--adapter MySQL`, a private MariaDB
server, one more child. Started again with the same directory, the cluster continues
with what it holds, on the same ports.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from urllib.parse import quote

import zc.lockfile

from neo.lib.config import ADMIN_PORT, MASTER_PORT, Parser
from neo.lib.epoll import EpollRuntime
from neo.lib.exception import ConfigurationError
from neo.lib.logger import Logger
from neo.lib.protocol import ClusterState, SetClusterState
from neo.lib.util import Address, format_address
from neo.scripts.mariadb import MariaDB
from neo.scripts.neoctl import CommandError, Tool

START_TIMEOUT = 60.0  # seconds to get RUNNING
STOP_TIMEOUT = 20.0  # seconds for a clean stop, before children are killed
PR_SET_PDEATHSIG = 1  # prctl(2)
STATE = "neosimple.json"


@dataclass
class Shape:
    """What a directory contains; kept in it."""

    name: str
    storages: int
    partitions: int
    replicas: int
    masters: list[Address]
    admin: Address
    version: int = field(default=1)
    adapter: str = field(default="SQLite")


def free_port(host: str, preferred: int) -> int:
    """`preferred` if it is free, else any port that is."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in (preferred, 0):
        with socket.socket(family) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((host, port))
            except OverflowError:
                continue  # no such port
            except OSError as error:
                problem = error.strerror or str(error)
                continue
            number: int = sock.getsockname()[1]
            return number
    raise ConfigurationError(f"cannot listen on {host}: {problem}")


def listening(address: Address) -> bool:
    """Whether somebody accepts connections there."""
    try:
        socket.create_connection(address, 1).close()
    except OSError:
        return False
    return True


def load_shape(directory: str, args: argparse.Namespace) -> Shape:
    """The shape of an existing directory, else a new one, saved in it.

    Raises ConfigurationError if the options contradict what is there.
    """
    path = os.path.join(directory, STATE)
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except FileNotFoundError:
        return new_shape(path, args)
    except ValueError as error:
        raise ConfigurationError(f"{path} is damaged: {error}") from None
    content["masters"] = [(host, port) for host, port in content["masters"]]
    content["admin"] = tuple(content["admin"])
    shape = Shape(**content)
    present = {
        "name": shape.name,
        "masters": len(shape.masters),
        "storages": shape.storages,
        "partitions": shape.partitions,
        "replicas": shape.replicas,
        "adapter": shape.adapter,
    }
    for option, value in present.items():
        wanted = getattr(args, option)
        if wanted is not None and wanted != value:
            raise ConfigurationError(
                f"{directory} holds a cluster with --{option} {value}, not {wanted}:"
                " use another directory"
            )
    return shape


def new_shape(path: str, args: argparse.Namespace) -> Shape:
    """Choose names and ports, and write them down."""
    storages = args.storages or 1
    replicas = args.replicas or 0
    if replicas >= storages:
        raise ConfigurationError(
            f"--replicas {replicas} needs at least --storages {replicas + 1}"
        )
    masters: list[Address] = []
    for i in range(args.masters or 1):
        port = free_port(args.bind, (args.port or MASTER_PORT) + i)
        masters.append((args.bind, port))
    if args.port and masters[0][1] != args.port:
        raise ConfigurationError(
            f"cannot listen on {args.bind}:{args.port}: Address already in use"
        )
    # Who chooses a port has several clusters: they would all want the default.
    admin_port = args.port + len(masters) if args.port else ADMIN_PORT
    shape = Shape(
        name=args.name or "main",
        storages=storages,
        partitions=args.partitions or 12,
        replicas=replicas,
        masters=masters,
        admin=(args.bind, free_port(args.bind, admin_port)),
        adapter=args.adapter or "SQLite",
    )
    temporary = f"{path}.new"
    with open(temporary, "w", encoding="utf-8") as f:
        json.dump(asdict(shape), f, indent=1)
    os.rename(temporary, path)
    return shape


class Cluster:
    """The child processes."""

    def __init__(self, directory: str, shape: Shape) -> None:
        self.directory = directory
        self.shape = shape
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.server: MariaDB | None = None
        self.logs = os.path.join(directory, "log")
        os.makedirs(self.logs, exist_ok=True)

    def start(self) -> None:
        """Start the server of databases, if there is one, and all nodes."""
        shape = self.shape
        if shape.adapter != "SQLite":
            self.server = MariaDB(os.path.join(self.directory, "mariadb"))
            self.server.create()
            self.server.start()
        masters = " ".join(map(format_address, shape.masters))
        for i, address in enumerate(shape.masters, 1):
            self._spawn(
                f"master{i}", "neomaster", masters,
                "--bind", format_address(address),
                "--autostart", str(shape.storages),
                "--partitions", str(shape.partitions),
                "--replicas", str(shape.replicas),
            )  # fmt: skip
        # Who finds nobody would try again after a second only.
        for address in shape.masters:
            while not listening(address) and self.died() is None:
                time.sleep(0.01)
        for i in range(1, shape.storages + 1):
            self._spawn(
                f"storage{i}", "neostorage", masters,
                "--bind", format_address((shape.admin[0], 0)),
                "--adapter", shape.adapter, "--database", self._database(i),
            )  # fmt: skip
        self._spawn("admin", "neoadmin", masters, "--bind", format_address(shape.admin))

    def _database(self, number: int) -> str:
        if self.server is not None:
            return self.server.add_database(f"storage{number}")
        return os.path.join(self.directory, f"storage{number}.sqlite")

    def _spawn(self, name: str, command: str, masters: str, *args: str) -> None:
        libc = ctypes.CDLL(None)

        def die_with_parent() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

        self.children[name] = subprocess.Popen(
            [
                sys.executable, "-m", f"neo.scripts.{command}",
                "--cluster", self.shape.name, "--masters", masters,
                "--logfile", os.path.join(self.logs, f"{name}.log"), *args,
            ],
            stdin=subprocess.DEVNULL,
            # Ctrl-C is for us only: the children are stopped in order.
            start_new_session=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip

    def died(self) -> str | None:
        """What to say of a child that ended unasked."""
        for name, child in self.children.items():
            if child.poll() is not None:
                return f"{name} exited with status {child.returncode}"
        if self.server is not None and self.server.died():
            return f"MariaDB died: see {self.server.log}"
        return None

    def wait_running(self, tool: Tool) -> None:
        """Return when clients are served. Raises ConfigurationError."""
        deadline = time.monotonic() + START_TIMEOUT
        while tool.state() is not ClusterState.RUNNING:
            problem = self.died()
            if problem is None and time.monotonic() > deadline:
                problem = f"the cluster is not running after {START_TIMEOUT:g} s"
            if problem is not None:
                raise ConfigurationError(f"{problem}; logs are in {self.logs}")
            time.sleep(0.05)

    def stop(self, tool: Tool | None) -> None:
        """Stop gracefully; what does not stop in time is killed."""
        if tool is not None:
            with contextlib.suppress(CommandError):
                tool.ask(SetClusterState, ClusterState.STOPPING)
                self._wait(STOP_TIMEOUT)
        # Masters first: no change of the partition table may result from the stop.
        for name, child in self.children.items():
            if name.startswith("master") and child.poll() is None:
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(5)
        for child in self.children.values():
            if child.poll() is None:
                child.terminate()
        self._wait(5)
        for child in self.children.values():
            if child.poll() is None:
                child.kill()
                child.wait()
        if self.server is not None:
            self.server.close()

    def _wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for child in self.children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))


# The lines of Python are not indented: they can be pasted into an interpreter.
INSTRUCTIONS = """\
NEO cluster {name!r} is running: {count}, data in {directory}

  URI       {uri}

  zope.conf
    %import neo.client
    <zodb_db main>
      mount-point /
      <NEOStorage>
        master_nodes {masters}
        name {name}
      </NEOStorage>
    </zodb_db>

  Python

import transaction, ZODB
from neo.client.Storage import Storage
db = ZODB.DB(Storage(master_nodes="{masters}", name="{name}"))
root = db.open().root()
root["hello"] = "world"
transaction.commit()

  Control   neoctl -a {admin} print summary

Ctrl-C stops it."""


def instructions(directory: str, shape: Shape) -> str:
    """How to connect."""
    addresses = [format_address(address) for address in shape.masters]
    plural = "s" if shape.storages > 1 else ""
    return INSTRUCTIONS.format(
        name=shape.name,
        count=f"{len(addresses)} master{'s' if len(addresses) > 1 else ''},"
        f" {shape.storages} storage{plural}, {shape.replicas} replicas",
        directory=directory,
        uri=f"neo://{quote(shape.name, safe='')}@{','.join(addresses)}",
        masters=" ".join(addresses),
        admin=format_address(shape.admin),
    )


def positive(text: str) -> int:
    """A number of at least 1."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def port_number(text: str) -> int:
    """A number that a port can have."""
    if (port := positive(text)) > 0xFFFF:
        raise argparse.ArgumentTypeError(f"{text} is greater than {0xFFFF}")
    return port


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "neosimple",
        description="Run a NEO cluster on this machine, in the foreground.",
    )
    add = parser.add_argument
    add(
        "directory", nargs="?",
        help="where databases and logs are kept; it is created, or continued with"
        " what it holds (default: a temporary directory, removed at the end)",
    )  # fmt: skip
    add("--name", help="name of the cluster (default: main)")
    add("-m", "--masters", type=positive, metavar="M", help="masters (default: 1)")
    add("-n", "--storages", type=positive, metavar="N", help="storages (default: 1)")
    add("-r", "--replicas", type=int, metavar="R",
        help="copies of each object beyond the first (default: 0)")  # fmt: skip
    add("-p", "--partitions", type=positive, metavar="P",
        help="partitions (default: 12)")  # fmt: skip
    add("--bind", default="127.0.0.1", metavar="HOST",
        help="numeric address to listen on (default: 127.0.0.1)")  # fmt: skip
    add("--port", type=port_number, metavar="PORT",
        help=f"port of the first master; the others and the admin follow"
        f" (default: {MASTER_PORT}, {ADMIN_PORT} for the admin, if free)")  # fmt: skip
    add("--adapter", choices=("SQLite", "MySQL"),
        help="database of the storages (default: SQLite); MySQL: a private MariaDB"
        " server, which must be installed")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    try:
        args = build_parser().parse_args(argv)
        if args.replicas is not None and args.replicas < 0:
            raise ConfigurationError("--replicas can't be negative")
    except ConfigurationError as error:
        print(f"neosimple: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.ExitStack() as stack:
            if args.directory is None:
                directory = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="neosimple-")
                )
            else:
                directory = os.path.abspath(os.path.expanduser(args.directory))
                os.makedirs(directory, exist_ok=True)
            lock = zc.lockfile.LockFile(os.path.join(directory, "neosimple.lock"))
            stack.callback(lock.close)
            return run(directory, load_shape(directory, args))
    except zc.lockfile.LockError:
        problem = f"{directory} is used by another neosimple"
    except FileExistsError as error:
        problem = f"{error.filename} is a file: a directory is expected"
    except OSError as error:
        problem = f"cannot use {error.filename or directory}: {error.strerror}"
    except ConfigurationError as error:
        problem = str(error)
    except KeyboardInterrupt:
        return 0
    print(f"neosimple: {problem}", file=sys.stderr)
    return 1


def run(directory: str, shape: Shape) -> int:
    """Run the cluster until Ctrl-C, SIGTERM or the end of a child."""
    cluster = Cluster(directory, shape)
    log = Logger(None, console=False)
    runtime = EpollRuntime(log)
    tool = Tool(runtime, shape.admin)
    started = False
    try:
        cluster.start()
        cluster.wait_running(tool)
        started = True
        print(instructions(directory, shape), flush=True)
        while (problem := cluster.died()) is None:
            time.sleep(0.5)
        raise ConfigurationError(f"{problem}; logs are in {cluster.logs}")
    except KeyboardInterrupt:
        print("\nStopping...", flush=True)
        return 0
    finally:
        # A second Ctrl-C must not leave children behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cluster.stop(tool if started else None)
        runtime.close()
        log.close()


if __name__ == "__main__":
    sys.exit(main())
