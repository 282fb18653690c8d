"""A standard cluster that can be hurt, with a load that is measured and audited.

Two masters, three storages with one replica, an admin, three client processes. Nodes
are killed, paused, given wrong clocks (`tests/cluster/harness.py` installs that in
their processes), and their links broken (`proxy.py`). Clients write down what they do
(`tests/history.py`), so that it is known when one of them dies, too.

All times are CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import logging
import mmap
import os
import pickle
import signal
import sqlite3
import struct
import time
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from neo.lib.config import Limits
from neo.lib.connection import Connection
from neo.lib.protocol import READABLE, AskFinishTransaction
from neo.lib.util import format_address
from neo.storage.database.sqlite import SQLiteBackend
from tests.history import FAIL, OK, UNKNOWN, Attempt, longest_gap, summary
from tests.simulation.cluster import read_cell, transactions_of
from tests.simulation.workload import ALL, RESOLVABLE, Tokens, TokenStorage

from .harness import PATIENCE, Cluster, context, disturb, free_port, until
from .proxy import Network

THINK = 0.01  # seconds, mean pause of a client between two attempts
# With these, what is silent is noticed in 3 s instead of 10.
QUICK = {"ping_after": 1.0, "silence_limit": 3.0, "lock_timeout": 5.0, "lease": 5.0}
FULL = "NEO_CHAOS" in os.environ
LIMITS = None if FULL else QUICK
# Seconds until silence is noticed, with a little for the work that follows.
NOTICED = 16.0 if FULL else 7.0
# Steps of a commit at which a client can be stopped.
BEGUN, STORED, VOTED, FINISHING = "begun", "stored", "voted", "finishing"


def times(short: int, full: int) -> range:
    """How often, without and with `make chaos`."""
    return range(full if FULL else short)


def typical(values: Iterable[float]) -> float:
    """The median; of few values the least, for the machine is often busy."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if FULL else ordered[0]


def within(seconds: float) -> float:
    """A bound on a time: exact in `make chaos`. Other tests run at the same time as
    the short versions, which must not fail because the machine is busy.
    """
    return seconds if FULL else 5 * seconds + 5


class Clock:
    """What `Tokens` needs of a simulation, in real time."""

    def rng(self, name: str) -> Random:
        return Random(name)

    @property
    def time(self) -> float:
        return time.monotonic()

    def failure(self, text: str) -> AssertionError:
        return AssertionError(text)


# --- clients --------------------------------------------------------------------------


class Journal:
    """Attempts of one client process, in a file that survives it."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, record: Any) -> None:
        """Append a record: an attempt, or the text of an error."""
        data = pickle.dumps(record)
        os.write(self._fd, struct.pack("I", len(data)) + data)


def read_journal(path: str, offset: int) -> tuple[list[Any], int]:
    """Records from `offset` on, and where the next will be."""
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read()
    records, position = [], 0
    while position + 4 <= len(data):
        (size,) = struct.unpack_from("I", data, position)
        if position + 4 + size > len(data):
            break
        records.append(pickle.loads(data[position + 4 : position + 4 + size]))
        position += 4 + size
    return records, offset + position


class JournalStorage(TokenStorage):
    """Writes attempts down before their outcome may be decided; stops where told."""

    journal: Journal
    tokens: Tokens
    stop: tuple[str, int] | None = None  # (step of the first commit, signal)

    def _at(self, step: str) -> None:
        if self.stop is not None and self.stop[0] == step:
            number, self.stop = self.stop[1], None
            self.journal.write(f"stopped: {step}")
            os.kill(os.getpid(), number)

    def tpc_begin(self, transaction: Any, tid: Any = None, status: str = " ") -> None:
        """As the base class."""
        super().tpc_begin(transaction, tid, status)
        self._at(BEGUN)

    def tpc_vote(self, transaction: Any) -> Any:
        """As the base class."""
        self._at(STORED)
        self.journal.write(self.tokens.attempts[-1])
        result = super().tpc_vote(transaction)
        self._at(VOTED)
        return result


def _stop_when_finishing(storage: JournalStorage) -> None:
    """Stop the process when AskFinishTransaction is on its way."""
    ask = Connection.ask

    def asking(self: Connection, packet: Any, *args: Any) -> Any:
        request = ask(self, packet, *args)
        if packet is AskFinishTransaction:
            self.transport.flush()  # type: ignore[attr-defined]
            storage._at(FINISHING)
        return request

    Connection.ask = asking  # type: ignore[method-assign, assignment]


def run_client(options: dict[str, Any]) -> None:
    """Body of a client process: attempts, until SIGTERM."""
    disturb(options["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(filename=options["stderr"], level=logging.WARNING)
    # No threading.Event: a second signal while the first one sets it would wait for
    # its lock for ever.
    stopping: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.append(number)

    signal.signal(signal.SIGTERM, stop)
    Path(options["ready"]).touch()
    faulthandler.register(signal.SIGUSR1, open(options["stderr"], "a"))  # noqa: SIM115
    journal = Journal(options["journal"])
    try:
        _work(options, journal, stopping)
    except BaseException:
        journal.write(traceback.format_exc())
        raise


def _work(options: dict[str, Any], journal: Journal, stopping: list[int]) -> None:
    storage = JournalStorage(options["masters"], options["cluster"])
    object.__setattr__(storage._options, "limits", Limits(**options["limits"]))
    tokens = Tokens(Clock(), oids=options["oids"])  # type: ignore[arg-type]
    tokens.rng = Random(options["name"])
    storage.journal, storage.tokens = journal, tokens
    storage.stop = options["stop"]
    _stop_when_finishing(storage)
    for step in itertools.count():
        if stopping:
            break
        time.sleep(tokens.rng.expovariate(1 / options["think"]))
        token = f"{options['name']}:{step}"
        if tokens.rng.random() < 0.5:
            token += RESOLVABLE
        everything = storage.stop is None and step % 10 == 9
        journal.write(tokens.step(storage, token, everything))
        tokens.attempts.clear()
    storage.close()


# --- the cluster ----------------------------------------------------------------------


class World(Cluster):
    """See the module.

    `network`: all links pass through a proxy (`self.network`). `limits`: of all nodes
    and clients, by name. `oids`: the objects of the workload. Clients are `client1`...;
    they start with the cluster.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        masters: int = 2,
        storages: int = 3,
        partitions: int = 12,
        replicas: int = 1,
        clients: int = 3,
        network: bool = False,
        limits: dict[str, float] | None = None,
        think: float = THINK,
        oids: list[bytes] = ALL,
    ) -> None:
        super().__init__(
            directory,
            masters=masters,
            storages=storages,
            partitions=partitions,
            replicas=replicas,
        )
        self.clients = clients
        self.rng = Random(time.time_ns())  # for what may differ from run to run
        self.think = think
        self.oids = oids
        self.limits = limits or {}
        self.network = Network() if network else None
        self.ports = {f"master{i}": a[1] for i, a in enumerate(self.masters, 1)}
        self.ports.update((f"storage{i}", free_port()) for i in range(1, 1 + storages))
        self.workers: dict[str, ForkServerProcess] = {}
        self.history: dict[str, Attempt] = {}  # by token
        self.commits = 0
        self.messages: list[str] = []  # of clients: what is no attempt
        self._paused: set[str] = set()
        self._incarnations: dict[str, int] = {}
        self._journals: dict[str, int] = {}  # path: what is read of it
        self.gone: set[str] = set()  # storages that left for ever
        self._clocks: dict[str, mmap.mmap] = {}

    def __enter__(self) -> World:
        self.start()
        self.load()
        return self

    def load(self) -> None:
        """Start the clients."""
        self.create()
        for i in range(1, 1 + self.clients):
            self.start_client(f"client{i}")
        self.progress(5 * self.clients)

    def close(self) -> None:
        for name in list(self.workers):
            self.kill_client(name)
        super().close()
        if self.network is not None:
            self.network.close()

    # --- processes --------------------------------------------------------------------

    def _environment(self, name: str) -> dict[str, str]:
        """What `disturb` shall do in a process."""
        env = {}
        if self.network is not None:
            env["NEO_TEST_VIA"] = self.network.via(
                name, {k: v for k, v in self.ports.items() if k != name}
            )
        path = self.path(f"{name}.clock")
        if name not in self._clocks:
            Path(path).write_bytes(struct.pack("dd", 0, 0))
            with open(path, "r+b") as file:
                self._clocks[name] = mmap.mmap(file.fileno(), 16)
        env["NEO_TEST_CLOCK"] = path
        return env

    def start_node(self, name: str, *more: str) -> ForkServerProcess:
        """Start one node; options of `limits` that it knows."""
        kind = name.rstrip("0123456789")
        role = kind[0].upper()
        for key, value in self.limits.items():
            if role in Limits.__dataclass_fields__[key].metadata["roles"]:
                more = (f"--{key.replace('_', '-')}", f"{value:g}", *more)
        if kind == "storage":
            more = (
                *("--bind", f"127.0.0.1:{self.ports[name]}"),
                *("--nid", f"S{name.removeprefix('storage')}"),
                *more,
            )
        self.env = self._environment(name)
        return super().start_node(name, *more)

    def start_client(
        self, name: str, stop: tuple[str, int] | None = None, **options: Any
    ) -> ForkServerProcess:
        """Start a client process. `stop`: see JournalStorage."""
        self._incarnations[name] = incarnation = self._incarnations.get(name, 0) + 1
        label = f"{name}.{incarnation}"
        journal = self.path(f"{label}.journal")
        Path(journal).touch()
        self._journals[journal] = 0
        options = {
            "name": label,
            "masters": self.master_nodes,
            "cluster": self.name,
            "journal": journal,
            "ready": self._ready(name),
            "stderr": self.stderr(name),
            "env": self._environment(name),
            "limits": {
                k: v for k, v in self.limits.items() if k not in ("lock_timeout",)
            },
            "think": self.think,
            "oids": self.oids,
            "stop": stop,
            **options,
        }
        process = context.Process(target=run_client, args=(options,), daemon=True)
        process.start()
        self.workers[name] = process
        return process

    def add_storage(self) -> str:
        """Start one more; its name."""
        self.storages += 1
        name = f"storage{self.storages}"
        self.ports[name] = free_port()
        self.start_node(name)
        return name

    def kill_client(self, name: str) -> None:
        """kill -9."""
        process = self.workers.pop(name)
        process.kill()
        process.join()
        self._paused.discard(name)

    def kill(self, name: str) -> None:
        super().kill(name)
        self._paused.discard(name)

    def pid(self, name: str) -> int:
        """Of a node or a client."""
        pid = (self.processes.get(name) or self.workers[name]).pid
        assert pid is not None
        return pid

    def pause(self, name: str) -> None:
        """SIGSTOP."""
        os.kill(self.pid(name), signal.SIGSTOP)
        self._paused.add(name)

    def resume(self, name: str) -> None:
        """SIGCONT."""
        os.kill(self.pid(name), signal.SIGCONT)
        self._paused.discard(name)

    def set_clock(self, name: str, offset: float, drift: float = 0.0) -> None:
        """Step the clock of a node by `offset` seconds; it gains `drift` per second.

        A drift of -1 stops it.
        """
        now = time.time()
        self._clocks[name][:] = struct.pack("dd", offset - drift * now, drift)

    # --- state ------------------------------------------------------------------------

    @property
    def master_names(self) -> list[str]:
        """Of all masters."""
        return [f"master{i}" for i in range(1, 1 + len(self.masters))]

    @property
    def storage_names(self) -> list[str]:
        """Of all storages of the cluster."""
        names = [f"storage{i}" for i in range(1, 1 + self.storages)]
        return [name for name in names if name not in self.gone]

    @property
    def primary(self) -> str:
        """Name of the primary master, as the admin knows it: it must know."""
        nid = self.neoctl("print", "primary")[1].strip()
        for line in self.neoctl("print", "node")[1].splitlines():
            fields = [field.strip() for field in line.split("|")]
            if fields[0] == nid:
                for i, address in enumerate(self.masters, 1):
                    if format_address(address) == fields[2]:
                        return f"master{i}"
        raise AssertionError(f"no primary master: {nid}")

    @property
    def secondary(self) -> str:
        """The other master."""
        return "master2" if self.primary == "master1" else "master1"

    @property
    def healthy(self) -> bool:
        """Whether all nodes run and all cells are up to date."""
        status, out, _ = self.neoctl("print", "summary", "--check")
        return not status and f"UP_TO_DATE={self._cells}" in out

    @property
    def _cells(self) -> int:
        return self.partitions * (1 + self.replicas)

    def wait_healthy(self, timeout: float = 3 * PATIENCE) -> float:
        """Wait until `healthy`; how long it took.

        A storage that clients can't reach may have to stay away for a minute.
        """
        start = time.monotonic()
        while not self.healthy:
            if time.monotonic() > start + timeout:
                raise AssertionError(self.describe())
            time.sleep(0.01)
        return time.monotonic() - start

    def describe(self) -> str:
        """What people would look at; the logs are written, too."""
        self.neoctl("flush_log")
        texts = [self.neoctl("print", what)[1] for what in ("summary", "node", "pt")]
        texts += [f"{name}:\n{self.said(name)}" for name in (*self.ports, "admin")]
        return "\n".join(texts)

    # --- load -------------------------------------------------------------------------

    def create(self) -> None:
        """Make the objects."""
        tokens = Tokens(Clock(), oids=self.oids)  # type: ignore[arg-type]
        with self.client(kind=TokenStorage) as storage:
            tokens.create(storage)
        (attempt,) = tokens.attempts
        self.history[attempt.token] = attempt

    def read(self) -> int:
        """Read what clients wrote down; how many commits there are."""
        for path, offset in self._journals.items():
            records, self._journals[path] = read_journal(path, offset)
            for record in records:
                if isinstance(record, Attempt):
                    self.history[record.token] = record
                    self.commits += record.outcome == OK
                else:
                    self.messages.append(record)
        lost = [m for m in self.messages if not m.startswith("stopped: ")]
        assert not lost, "\n".join(lost)
        return self.commits

    def progress(self, count: int = 10, timeout: float = PATIENCE) -> None:
        """Return after more commits."""
        target = self.read() + count
        until(lambda: self.read() >= target, "commits", timeout)

    @contextlib.contextmanager
    def measured(self) -> Iterator[Measure]:
        """Measure the load during a block, until it goes on."""
        measure = Measure(self)
        yield measure
        measure.end()

    # --- the end ----------------------------------------------------------------------

    def heal(self) -> None:
        """End all faults; start what does not run."""
        if self.network is not None:
            self.network.heal()
        for name in sorted(self._paused):
            self.resume(name)
        for name in self._clocks:
            self.set_clock(name, 0)
        for name, process in self.processes.items():
            assert process.is_alive(), f"{name} is dead: {self.said(name)}"
        for name in (*self.master_names, *self.storage_names, "admin"):
            if name not in self.processes:
                self.start_node(name)

    def balance(self, *aside: str) -> None:
        """Tweak until the table is as it should be, as an operator does."""
        deadline = time.monotonic() + 3 * PATIENCE
        while True:
            again = time.monotonic() + PATIENCE / 3
            self.neoctl("tweak", *aside)
            while time.monotonic() < again:
                if self.healthy:
                    return
                time.sleep(0.05)
            assert time.monotonic() < deadline, self.describe()

    def _ready(self, name: str) -> str:
        """File that the client makes as soon as SIGTERM ends it well."""
        return self.path(f"{name}.{self._incarnations[name]}.ready")

    def stop_client(self, name: str) -> None:
        """SIGTERM; it must end well, which may take as long as a commit."""
        self._terminate(name)
        process = self.workers.pop(name)
        process.join(PATIENCE)
        self.read()
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGUSR1)  # where is it?
            time.sleep(0.5)
            process.kill()
            process.join()
        assert process.exitcode == 0, f"{name}: {self.said(name)}"

    def _terminate(self, name: str) -> None:
        process = self.workers[name]
        until(
            lambda: not process.is_alive() or Path(self._ready(name)).exists(),
            f"start of {name}",
        )
        process.terminate()

    def stop_clients(self) -> None:
        """SIGTERM to all."""
        for name in self.workers:
            self._terminate(name)
        for name in list(self.workers):
            self.stop_client(name)

    def audit(self, patience: float = 3 * PATIENCE) -> dict[str, int]:
        """Heal, restart, and compare all that was seen with all that is there.

        Return the attempts by outcome and error.
        """
        self.heal()
        self.wait_healthy(patience)
        self.progress(3 * len(self.workers), patience)
        self.stop_clients()
        assert self.cpu(0.3) < 0.1, "busy without a reason"
        self.stop()
        replicas = self.cells()
        for name in (*self.ports, "admin"):
            assert "Traceback" not in self.said(name), self.said(name)
        # What clients read after a restart is what is on disk.
        self.restart()
        tokens = Tokens(Clock(), oids=self.oids)  # type: ignore[arg-type]
        tokens.attempts = list(self.history.values())
        with self.client(kind=TokenStorage) as storage:
            tokens.check(storage, replicas, transactions_of(replicas))
        return summary(self.history.values())

    def restart(self) -> None:
        """Start all nodes that belong to the cluster."""
        for name in (*self.master_names, *self.storage_names, "admin"):
            self.start_node(name)
        self.wait_state("RUNNING")

    def cells(self) -> dict[str, dict[Any, Any]]:
        """Content of all readable cells, which must be complete. Nodes don't run."""
        result: dict[str, dict[Any, Any]] = {}
        for name in self.storage_names:
            path = self.path(f"{name}.sqlite")
            with contextlib.closing(sqlite3.connect(path)) as connection:
                (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
                assert verdict == "ok", verdict
            backend = SQLiteBackend(path)
            try:
                for partition, cell in backend.own_cells().items():
                    if cell.state in READABLE:
                        content = result[f"{partition}/{name}"] = {}
                        read_cell(backend, partition, content)
                assert not backend.locked_transactions()
                backend.begin(False)
                orphans = backend.prune_orphans(0, 1 << 30, True)[0]
                backend.commit()
                assert not orphans, f"{name}: {orphans} orphans"
            finally:
                backend.close()
        assert len(result) == self._cells, sorted(result)
        return result

    def cpu(self, seconds: float) -> float:
        """Seconds of CPU that the nodes use meanwhile."""

        def used() -> int:
            total = 0
            for process in self.processes.values():
                fields = Path(f"/proc/{process.pid}/stat").read_text().split()
                total += int(fields[13]) + int(fields[14])
            return total

        before = used()
        time.sleep(seconds)
        return (used() - before) / os.sysconf("SC_CLK_TCK")

    def descriptors(self) -> dict[str, int]:
        """How many each node has open."""
        return {
            name: len(os.listdir(f"/proc/{process.pid}/fd"))
            for name, process in self.processes.items()
        }


class Measure:
    """The load from its creation to `end()`: `gap` in seconds, `errors` by class."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.start = time.monotonic()
        self.gap = 0.0
        self.errors: dict[str, int] = {}

    def end(self, settle: int = 20) -> None:
        """Wait for so many more commits, then calculate."""
        world = self.world
        world.progress(settle, 3 * PATIENCE)
        now = time.monotonic()
        history = list(world.history.values())
        self.gap = longest_gap(history, self.start, now)
        failed = [
            a for a in history
            if a.outcome in (FAIL, UNKNOWN) and a.end and a.end >= self.start
        ]  # fmt: skip
        self.errors = summary(failed)

    def resumed(self, since: float) -> float:
        """Seconds from a moment until the next commit."""
        return min(
            a.end - since
            for a in self.world.history.values()
            if a.outcome == OK and a.end is not None and a.end >= since
        )


def report(row: int, text: str, **figures: Any) -> None:
    """Note what was measured, in the file $NEO_CHAOS_REPORT."""
    if path := os.environ.get("NEO_CHAOS_REPORT"):
        with open(path, "a") as file:
            json.dump({"row": row, "text": text, **figures}, file)
            file.write("\n")
