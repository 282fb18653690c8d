"""One run: a cluster of a drawn shape, a workload, faults; then heal and audit.

All that a run draws before it starts is in its `Options`, which a failure prints as
JSON: `--options` repeats the run with some of them changed, `shrink` searches for the
smallest ones that fail in the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any

from neo.client.app import CACHE_SIZE

from .cluster import Cluster, Shape, transactions_of
from .faults import COMMANDS, KINDS, Faults
from .marks import marked
from .objects import OTHERS, Objects
from .runtime import Simulation, SimulationFailed
from .undo import Undos
from .workload import ALL, Tokens

SAFETY = 30.0  # seconds with faults
LIVENESS = 300.0  # seconds that everything may take to recover: chunks may be tiny
CALM = 0.5  # seconds between two transactions of a thread, meanwhile
PEACE = 5.0  # the same while all wait for something else
QUIET = 5.0  # seconds after which nothing is left to do

# Faults after which a client may do nothing for long while others wait for it.
STALLS = {
    "pause", "clog", "silence", "isolate", "partition", "swizzle", "refuse", "damage",
    "slow-disk", "power", "crash-all", "lost-disk", "client",
}  # fmt: skip

# Constants of modules that a run may have small, so that what is rare with the usual
# values (several chunks, values that are spilled, full queues) is usual.
TUNABLES: dict[str, tuple[int | float, ...]] = {
    "neo.storage.replication:CHUNK": (2, 5, 50),
    "neo.storage.replication:PIECE": (2, 10),
    "neo.storage.replication:WAITING_SIZE": (0, 500),
    "neo.storage.replication:SESSIONS_MAX": (1, 12),
    "neo.storage.transactions:MEMORY_OF_TRANSACTION": (10, 200),
    "neo.storage.transactions:MEMORY": (100, 1000),
    "neo.storage.transactions:RESERVATION": (0.001, 0.02, 5.0),
    "neo.storage.pending:RECENT": (0, 3),
    "neo.storage.operation:DROP_SLICE": (1, 10),
    "neo.storage.initialization:TRUNCATION_SLICE": (1, 10),
    "neo.storage.peers:SLICE": (1,),
    "neo.storage.peers:CHUNK_SIZE": (1, 1000),
    "neo.storage.app:REPAIR_SLICE": (1, 10),
    "neo.storage.client:SLICE": (1, 5),
    "neo.storage.writer:LAZY_DELAY": (0, 10),
    "neo.master.transactions:ALIVE": (0.01,),
    "neo.master.transactions:MANY": (0, 1),
    "neo.master.transactions:TOGETHER": (0.2,),
    "neo.client.oids:OIDS_BLOCK": (1, 3),
    "neo.client.oids:OIDS_LOW": (0,),
}


@dataclass(frozen=True)
class Options:
    """What a run draws from its seed (swarm). See Simulation and Faults for most.

    `commits` end the phase with faults, or `seconds`; `think`: mean pause between two
    transactions of a thread; `skew`: bound of the differences between clocks;
    `padding`: greatest size of values, bytes; `cache_size`: of clients; `undo`,
    `objects`: with the other workloads, too.
    """

    shape: Shape = field(default_factory=Shape)
    kinds: tuple[str, ...] = KINDS
    every: float = 1.0
    longest: float = 1.0
    skip: tuple[int, ...] = ()
    commits: int = 100
    seconds: float = SAFETY
    think: float = 0.1
    latency: tuple[float, float] = (0.0002, 0.02)
    cut: float = 0.1
    disk_latency: float = 0.002
    buggify: float = 0.0
    skew: float = 0.0
    padding: int = 0
    objects: bool = False
    cache_size: int = CACHE_SIZE
    undo: bool = False
    tunables: dict[str, int | float] = field(default_factory=dict)

    @classmethod
    def drawn(cls, seed: int | str) -> Options:
        sim = Simulation(seed, trace=False)
        rng = sim.rng("options")
        shape = Shape.drawn(sim)
        share = rng.choice([0.1, 0.2, 0.5])
        # Each from a generator of its own: one more changes nothing in the others.
        kinds = tuple(
            kind for kind in KINDS if sim.rng(f"kind {kind}").random() < share
        )
        kinds = kinds or ("crash",)
        if set(kinds) & {*COMMANDS, "lost-disk"}:
            shape.admins = 1
        return cls(
            shape,
            kinds,
            every=rng.choice([0.2, 0.5, 1, 3, 6]),
            longest=rng.choice([0.1, 0.3, 1]),
            commits=rng.choice([30, 80, 150]),
            think=rng.choice([0.01, 0.1, 0.5]),
            latency=rng.choice([(0.0002, 0.002), (0.0002, 0.05), (0.02, 0.2)]),
            cut=rng.choice([0, 0.1, 0.5]),
            disk_latency=rng.choice([0.0001, 0.002, 0.01]),
            buggify=rng.choice([0, 0.5]),
            skew=rng.choice([0, 1, 3600]),
            padding=(
                10 << 20
                if sim.rng("big values").random() < 0.02
                else sim.rng("padding").choice([0, 0, 0, 1000, 20_000, 300_000])
            ),
            cache_size=sim.rng("cache").choice([0, 1000, *[CACHE_SIZE] * 6]),
            # (What was undone may be truncated.)
            undo=sim.rng("undo").random() < 0.3 and "truncate" not in kinds,
            objects=sim.rng("zodb").random() < 0.25 and "truncate" not in kinds,
            tunables={
                name: sim.rng(name).choice(values)
                for name, values in TUNABLES.items()
                if sim.rng(name).random() < 0.2
            },
        )

    def changed(self, values: dict[str, Any]) -> Options:
        """With some options of a JSON object; of the shape too."""
        values = {k: tuple(v) if type(v) is list else v for k, v in values.items()}
        shape = values.pop("shape", {})
        return replace(self, shape=replace(self.shape, **shape), **values)

    def __str__(self) -> str:
        return json.dumps(asdict(self))


@contextmanager
def tuned(tunables: dict[str, int | float]) -> Iterator[None]:
    """Have constants of modules at other values."""
    places = [
        (import_module(name.partition(":")[0]), name.partition(":")[2])
        for name in tunables
    ]
    before = [getattr(module, name) for module, name in places]
    try:
        for (module, name), value in zip(places, tunables.values(), strict=True):
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


class Run:
    """See the module. `execute()` raises SimulationFailed."""

    def __init__(
        self,
        seed: int | str,
        *,
        options: Options | None = None,
        shape: Shape | None = None,
        kinds: list[str] | None = None,
        every: float | None = None,
        trace: bool | None = None,
    ) -> None:
        if options is None:
            options = Options.drawn(seed)
        if shape is not None:
            options = replace(options, shape=shape)
        if kinds is not None:
            options = replace(options, kinds=tuple(kinds))
        if every is not None:
            options = replace(options, every=every, longest=1.0)
        self.options = options
        sim = self.sim = Simulation(
            seed,
            latency=options.latency,
            cut=options.cut,
            disk_latency=options.disk_latency,
            buggify=options.buggify,
            trace=trace,
        )
        sim.options = str(options)
        self.cluster = Cluster(sim, options.shape)
        self.cluster.client_options["cache_size"] = options.cache_size
        oids = OTHERS if options.objects else ALL
        self.tokens = Tokens(sim, options.think, options.padding, oids)
        self.undos = Undos(sim, options.think)
        self.objects = Objects(sim, options.think)
        self.tokens.acknowledged = self.cluster.acknowledge
        self.faults: Faults | None = None

    def start(self) -> None:
        """Create the cluster and its objects."""
        cluster, sim = self.cluster, self.sim
        rng = sim.rng("options")
        for name in (*cluster.nodes, *cluster.clients):
            skew = self.options.skew
            cluster.process(name).skew = rng.uniform(-skew, skew)
        cluster.start()
        sim.run_until(lambda: cluster.running, 60)
        # As documented: else who starts again with the spare ones makes a new cluster.
        cluster.autostart = 0
        cluster.call(self.tokens.create, cluster.storage())
        if self.options.undo:
            cluster.call(self.undos.create, cluster.storage())
        if self.options.objects:
            first = cluster.clients[0]
            cluster.call(self.objects.create, first, cluster.storage(first))
        for name in cluster.clients:
            self.start_client(name)

    def start_client(self, name: str) -> None:
        """Start the threads of a client."""
        for _ in range(self.cluster.shape.threads):
            self.tokens.start(name, self.cluster.storage(name))
        if self.options.undo:
            self.undos.start(name, self.cluster.storage(name))
        if self.options.objects:
            self.objects.start(name, self.cluster.storage(name))

    def execute(self, seconds: float | None = None) -> None:
        """All phases."""
        try:
            with tuned(self.options.tunables), marked(self.sim):
                self._execute(seconds)
        finally:
            self.cluster.close()

    @property
    def done(self) -> list[int]:
        """Numbers of the faults that happened."""
        return self.faults.done if self.faults is not None else []

    def _execute(self, seconds: float | None) -> None:
        options, tokens = self.options, self.tokens
        self.start()
        self.faults = Faults(
            self.cluster,
            options.kinds,
            options.every,
            self.start_client,
            options.longest,
            options.skip,
            tokens,
        )
        enough = tokens.committed + options.commits
        self.sim.run_until(
            lambda: tokens.committed >= enough, seconds or options.seconds, fail=False
        )
        self.recover()
        self.audit()

    def recover(self) -> None:
        """Without faults, all goes on: promise P16."""
        assert self.faults is not None
        sim, cluster, tokens = self.sim, self.cluster, self.tokens
        self.faults.stop()
        tokens.padding = 0
        # Minutes in which clients have nothing to find out cost as little as they can.
        is_long = bool(cluster.lost) or cluster.truncating
        self._pause(PEACE if is_long else max(tokens.think, CALM))
        if cluster.lost:
            # Nodes have found each other by then, if they can.
            sim.run(90)
            end = sim.time + LIVENESS
            while cluster.lost and sim.time < end:
                cluster.replace_lost()
                sim.run(3)
        sim.run_until(lambda: cluster.healthy, LIVENESS)
        if cluster.truncating:
            # No command is on its way any more, and all clients have heard.
            sim.run(70)
            sim.run_until(lambda: cluster.healthy, LIVENESS)
            cluster.truncating = False
            tokens.truncated()
        self._pause(max(self.options.think, CALM))
        expected = tokens.committed + 3 * len(cluster.clients)
        sim.run_until(lambda: tokens.committed >= expected, LIVENESS)
        workloads = tokens, self.undos, self.objects
        for workload in workloads:
            workload.stopping = True
        sim.run_until(lambda: not any(w.running for w in workloads), LIVENESS)
        sim.run(QUIET)
        # What was cut off silently may be noticed, and replaced, only now.
        sim.run_until(lambda: cluster.healthy, LIVENESS)

    def _pause(self, think: float) -> None:
        self.tokens.think = think
        # These write more than the slowest replication that is drawn copies.
        self.undos.think = self.objects.think = PEACE

    def audit(self) -> None:
        """Compare all that was seen with all that is there."""
        ended = self.sim.marks.get("lease ended", 0)
        if ended and not set(self.options.kinds) & STALLS:
            raise self.sim.failure(f"{ended} leases ended, of no client that stalls")
        for attempt in self.tokens.attempts:
            self.sim.sometimes(f"attempt {attempt.outcome} {attempt.error}".strip())
            if attempt.resolved:
                self.sim.sometimes("conflict resolved")
        cluster = self.cluster
        replicas = cluster.replicas()
        metadata = transactions_of(replicas)
        cluster.call(self.tokens.check, cluster.storage(), replicas, metadata)
        if self.options.undo:
            cluster.call(self.undos.check, cluster.storage())
        if self.options.objects:
            first = cluster.clients[0]
            cluster.call(self.objects.check, first, cluster.storage(first))
        if leftovers := cluster.leftovers():
            raise self.sim.failure(f"left in temporary tables: {leftovers}")


# --- smaller runs that fail -----------------------------------------------------------


def failure(seed: int | str, options: Options) -> tuple[str, Run] | None:
    """First line of what is wrong with a run, None if all is well."""
    run = Run(seed, options=options)
    try:
        run.execute()
    except SimulationFailed as error:
        return str(error).partition("\n")[0], run
    return None


def kind_of(text: str) -> str:
    """What failures of one reason have in common: their text without its numbers."""
    return re.sub("[0-9a-f]{16}|[0-9]+", "", text)[:40]


def shrink(
    seed: int | str, options: Options, report: Callable[[str], object], tries: int = 300
) -> Options:
    """The smallest options found that fail as those given do.

    Faults are removed by halves, quarters... down to single ones, then what makes the
    cluster big, in turn, until nothing more can be removed or after `tries` runs.
    """
    found = failure(seed, options)
    assert found is not None, "this run does not fail"
    text, run = found
    wanted = kind_of(text)
    report(text)

    def attempt(smaller: Options) -> bool:
        nonlocal tries, options, run
        if tries <= 0:
            return False
        tries -= 1
        found = failure(seed, smaller)
        if found is None or kind_of(found[0]) != wanted:
            return False
        options, run = smaller, found[1]
        report(f"{len(run.done)} faults: {options}")
        return True

    before = None
    while before != options and tries > 0:
        before = options
        size = len(run.done)
        while size:
            done = run.done
            for start in range(0, len(done), size):
                skip = {*options.skip, *done[start : start + size]}
                attempt(replace(options, skip=tuple(sorted(skip))))
            size //= 2
        for smaller in _smaller(options):
            if (changed := smaller(options)) != options:
                attempt(changed)
    return options


def _smaller(options: Options) -> Iterator[Callable[[Options], Options]]:
    """Ways to make a run smaller."""
    for name, value in asdict(options.shape).items():
        least = dict.fromkeys(
            ("masters", "storages", "partitions", "clients", "threads"), 1
        )
        if type(value) is int and value > least.get(name, 0):
            yield lambda o, n=name: _with_shape(o, n, getattr(o.shape, n) - 1)
        elif value is True:
            yield lambda o, n=name: _with_shape(o, n, False)
    yield lambda o: replace(o, commits=o.commits // 2)
    yield lambda o: replace(o, buggify=0.0)
    yield lambda o: replace(o, skew=0.0)
    yield lambda o: replace(o, padding=0)
    yield lambda o: replace(o, undo=False)
    yield lambda o: replace(o, objects=False)
    for tunable in options.tunables:
        yield lambda o, n=tunable: replace(
            o, tunables={k: v for k, v in o.tunables.items() if k != n}
        )
    yield lambda o: replace(o, cut=0.0)


def _with_shape(options: Options, name: str, value: object) -> Options:
    return replace(options, shape=replace(options.shape, **{name: value}))
