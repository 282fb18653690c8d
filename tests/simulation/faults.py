"""Faults of a simulated run: drawn from the seed, each undone after a while.

Each fault has a number and draws from a generator of its own: a run without the n-th
one (`skip`) has the others unchanged, which is what makes a failing run shrink.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from random import Random  # noqa: TID251 - seeded

from neo.lib.protocol import (
    MAX_TID,
    ZERO_TID,
    AddPendingNodes,
    CheckReplicas,
    ClusterState,
    NodeState,
    NodeType,
    Repair,
    SetClusterState,
    SetNodeState,
    SetNumReplicas,
    Truncate,
    TweakPartitionTable,
)

from .cluster import Cluster
from .workload import Tokens

# Names of faults, as in options of a run: processes, network, disks, clocks, operators.
KINDS = (
    "crash", "power", "crash-all", "client", "pause", "stop",
    "reset", "clog", "silence", "isolate", "partition", "swizzle", "refuse", "damage",
    "slow-disk", "disk-full", "disk-error", "lost-disk", "old-disk",
    "clock", "drift",
    "tweak", "kill", "drop", "grow", "replicas", "check", "restart-cluster", "truncate",
)  # fmt: skip
LAST_COMMANDS = 70.0  # seconds after which no command of an operator is on its way
#: those that go through an admin node
COMMANDS = KINDS[KINDS.index("tweak") :]


class Faults:
    """Injects faults of some kinds every `every` seconds on average, until `stop()`.

    `longest`: scale of the time that faults last. `skip`: numbers of faults that don't
    happen. `on_client(name)`: a client was started again. `tokens`: the workload, to be
    told of truncations.
    """

    def __init__(
        self,
        cluster: Cluster,
        kinds: Collection[str],
        every: float,
        on_client: Callable[[str], object],
        longest: float = 1.0,
        skip: Collection[int] = (),
        tokens: Tokens | None = None,
    ) -> None:
        assert not set(kinds) - set(KINDS), kinds
        self.cluster = cluster
        self.sim = cluster.sim
        self.rng = cluster.sim.rng("faults")  # of the schedule
        self.kinds = sorted(kinds, key=KINDS.index)
        self.every = every
        self.on_client = on_client
        self.longest = longest
        self.skip = frozenset(skip)
        self.tokens = tokens
        self.stopped = False
        self.count = 0
        self.done: list[int] = []  # numbers of those that happened
        # Older contents of disks, by storage: of which nid.
        self._copies: dict[str, tuple[int | None, bytes | None]] = {}
        self._undo: dict[object, Callable[[], object]] = {}
        self._plan()

    def _plan(self) -> None:
        self.sim.after(self.rng.expovariate(1 / self.every), self._next)

    def _next(self) -> None:
        if self.stopped:
            return
        number = self.count
        self.count += 1
        schedule = self.rng
        if number not in self.skip:
            self.done.append(number)
            self.rng = Random(f"{self.sim.seed}:fault:{number}")
            kind = self.rng.choice(self.kinds)
            self.sim.sometimes(f"fault {kind}")
            getattr(self, "_" + kind.replace("-", "_"))()
            self.rng = schedule
        self._plan()

    def _note(self, text: str) -> None:
        self.sim.note("FAULT", f"{self.count - 1}: {text}")

    def _later(self, longest: float, undo: Callable[[], object]) -> None:
        """Undo a fault in a while, mostly soon, sometimes late; when all is healed at
        the latest.
        """
        key = object()

        def now() -> None:
            if self._undo.pop(key, None) is not None:
                undo()

        self._undo[key] = undo
        self.sim.after(longest * self.longest * self.rng.random() ** 3, now)

    def _up(self, names: list[str]) -> list[str]:
        return [name for name in names if self.cluster.process(name).alive]

    @property
    def _everybody(self) -> list[str]:
        return [*self.cluster.nodes, *self.cluster.clients]

    # --- processes --------------------------------------------------------------------

    def _kill_process(self, name: str, power: bool) -> None:
        self._note(f"{'power loss' if power else 'kill'} of {name}")
        self.cluster.crash(name, power)
        self._later(10, lambda: self.restart(name))

    def restart(self, name: str) -> None:
        """Start a node again; a client goes on with its work."""
        process = self.cluster.process(name)
        if not process.alive and process.factory is not None:
            self.sim.restart(name)
            if name in self.cluster.clients:
                self.on_client(name)

    def _crash(self) -> None:
        if up := self._up(self.cluster.nodes):
            self._kill_process(self.rng.choice(up), False)

    def _power(self) -> None:
        if up := self._up(self.cluster.nodes):
            self._kill_process(self.rng.choice(up), True)

    def _crash_all(self) -> None:
        power = self.rng.random() < 0.5
        for name in self._up(self.cluster.nodes):
            self._kill_process(name, power)

    def _client(self) -> None:
        if up := self._up(self.cluster.clients):
            self._kill_process(self.rng.choice(up), self.rng.random() < 0.5)

    def _pause(self) -> None:
        if up := self._up(self._everybody):
            name = self.rng.choice(up)
            self._note(f"pause of {name}")
            process = self.cluster.process(name)
            process.pause()

            def resume() -> None:
                if process.alive and process.paused:
                    process.resume()

            self._later(60, resume)

    def _stop(self) -> None:
        """A clean stop, as by SIGTERM."""
        up = [n for n in self._up(self.cluster.nodes) if self.sim.app(n) is not None]
        if up:
            name = self.rng.choice(up)
            self._note(f"stop of {name}")
            process = self.cluster.process(name)
            process.post("signal", process.app.shutdown)
            self._later(10, lambda: self.restart(name))

    # --- clocks -----------------------------------------------------------------------

    def _clock(self) -> None:
        process = self.cluster.process(self.rng.choice(self.cluster.masters))
        step = self.rng.choice([-86400, -60, -5, -1, -0.1, 0.1, 1, 60, 3600])
        self._note(f"clock of {process.name} steps by {step}")
        process.skew += step

    def _drift(self) -> None:
        process = self.cluster.process(self.rng.choice(self.cluster.masters))
        drift = self.rng.choice([-1, -0.5, -0.01, 0, 0.01, 1])
        self._note(f"clock of {process.name} drifts by {drift}")
        process.skew += self.sim.time * (process.drift - drift)
        process.drift = drift

    # --- disks ------------------------------------------------------------------------

    def _slow_disk(self) -> None:
        process = self.cluster.process(self.rng.choice(self.cluster.storages))
        self._note(f"slow disk of {process.name}")
        factor = self.rng.choice([10, 100, 1000])
        process.disk_latency = min(5.0, self.sim.disk_latency * factor)

        def undo() -> None:
            process.disk_latency = self.sim.disk_latency

        self._later(20, undo)

    def _disk_full(self) -> None:
        """Nothing can be written for a while."""
        name = self.rng.choice(self.cluster.storages)
        disk = self.cluster.disks[name]
        self._note(f"disk of {name} is full")

        def fail(durable: bool) -> None:
            raise OSError(28, "No space left on device")

        disk.fail = fail

        def undo() -> None:
            disk.fail = None
            self.restart(name)

        self._later(10, undo)

    def _disk_error(self) -> None:
        """One of the next commits fails, nobody knows how far it got."""
        name = self.rng.choice(self.cluster.storages)
        disk = self.cluster.disks[name]
        left = self.rng.choice([0, 1, 2, 5, 20])
        is_fsync = self.rng.random() < 0.5
        self._note(f"error {left} of disk {name}")

        def fail(durable: bool) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                disk.fail = None
                if is_fsync:
                    disk.uncertain = True
                else:
                    raise OSError(5, "Input/output error")

        disk.fail = fail

        def undo() -> None:
            disk.fail = None
            self.restart(name)

        self._later(10, undo)

    def _lost_disk(self) -> None:
        """A replica is lost, and replaced by an empty one.

        It dies, then is lost as soon as the others know that they go on without it:
        when another one fails at that very moment, two are lost.
        """
        cluster = self.cluster
        names = self._dispensable()
        if not names:
            return
        name = self.rng.choice(names)
        self._note(f"disk of {name} is going to be lost")

        def lose() -> None:
            self.sim.note("FAULT", f"disk of {name} is lost")
            self.sim.sometimes("a disk lost")
            cluster.lose(name)

        self._replace(name, lose)

    def _old_disk(self) -> None:
        """What a replica has on disk is replaced by what it had once."""
        cluster = self.cluster
        if self.tokens is not None and self.tokens.truncations:
            return  # what was truncated would come back
        names = self._dispensable()
        if not self._copies:
            for name in names:
                disk = cluster.disks[name]
                # A copy that could start alone is as good as the only one there is.
                if all(
                    {nid for p, nid in disk.readable() if p == partition} - {disk.nid}
                    for partition, nid in disk.readable()
                    if nid == disk.nid
                ):
                    self._copies[name] = disk.nid, disk.durable
            return
        name = self.rng.choice([*self._copies])
        nid, image = self._copies[name]
        if name not in names or cluster.disks[name].nid != nid:
            return
        self._note(f"an older copy is going to be put back on disk of {name}")

        def put_back() -> None:
            if cluster.disks[name].nid == nid and self._copies.pop(name, None):
                self.sim.note("FAULT", f"disk of {name} is an older copy")
                self.sim.sometimes("an older disk")
                cluster.disks[name].put(image)

        self._replace(name, put_back)

    def _dispensable(self) -> list[str]:
        """Storages of which all data are elsewhere, too."""
        cluster = self.cluster
        primary = cluster.primary
        if primary is None or not cluster.healthy or cluster.lost:
            return []
        return [
            name
            for name in cluster.storages
            if (app := self.sim.app(name)) is not None
            and app.nid in primary.pt.nids()
            and all(set(row) - {app.nid} for row in primary.pt.readable)
        ]

    def _replace(self, name: str, change: Callable[[], object]) -> None:
        """Kill a storage, and change its disk once the others go on without it."""
        cluster = self.cluster
        nid = self.sim.app(name).nid
        cluster.crash(name, self.rng.random() < 0.5)

        def look() -> None:
            if self.stopped or cluster.lost or cluster.process(name).alive:
                return
            if self._does_without(nid):
                change()
            else:
                self.sim.after(0.2, look)

        look()
        self._later(20, lambda: self.restart(name))

    def _does_without(self, nid: int) -> bool:
        """Whether all storages know, durably, that one has nothing of its own."""
        primary = self.cluster.primary
        if primary is None or not self.cluster.running:
            return False
        if any(nid in row for row in primary.pt.readable):
            return False
        readable = primary.pt.readable_nids()
        known = {disk.nid: disk.ptid for disk in self.cluster.disks.values()}
        return all((known[other] or 0) >= (primary.pt.ptid or 0) for other in readable)

    # --- network ----------------------------------------------------------------------

    def _pair(self) -> tuple[str, str]:
        a, b = self.rng.sample(self._everybody, 2)
        return a, b

    def _reset(self) -> None:
        names = self._everybody
        pairs = [
            (a, b)
            for i, a in enumerate(names)
            for b in names[:i]
            if any(
                t.peer is not None and t.peer.process.name == b
                for t in self.cluster.process(a).transports
            )
        ]
        if pairs:
            a, b = self.rng.choice(pairs)
            self._note(f"reset between {a} and {b}")
            self.sim.reset(a, b)

    def _clog(self) -> None:
        a, b = self._pair()
        self._note(f"clog {a} > {b}")
        self.sim.clog(a, b)
        self._later(30, lambda: self.sim.unclog(a, b))

    def _silence(self) -> None:
        """Both ways at once."""
        a, b = self._pair()
        self._cut([a], [b], 40)

    def _swizzle(self) -> None:
        """Clog some links one by one, release them in another order."""
        names = self._everybody
        links = [(a, b) for a in names for b in names if a != b]
        links = self.rng.sample(links, self.rng.randint(1, len(links)))
        self._note(f"swizzle-clog of {len(links)} links")
        for a, b in links:

            def clog(a: str = a, b: str = b) -> None:
                if not self.stopped:
                    self.sim.clog(a, b)
                    self._later(10, lambda: self.sim.unclog(a, b))

            self.sim.after(3 * self.rng.random(), clog)

    def _refuse(self) -> None:
        a, b = self._pair()
        self._note(f"refuse {a} > {b}")
        link = self.sim.link(a, b)
        link.refused = True

        def undo() -> None:
            link.refused = False

        self._later(20, undo)

    def _damage(self) -> None:
        a, b = self._pair()
        self._note(f"damage {a} > {b}")
        link = self.sim.link(a, b)
        link.damage = self.rng.choice([0.01, 0.1, 1])

        def undo() -> None:
            link.damage = 0

        self._later(20, undo)

    def _cut(self, side: list[str], other: list[str], longest: float = 40) -> None:
        """Partition, mostly in both directions."""
        ways = self.rng.choice(["both", "both", "out", "in"])
        self._note(f"partition {side} / {other}, {ways}")
        pairs = [(a, b) for a in side for b in other]
        links = pairs if ways in ("both", "out") else []
        if ways in ("both", "in"):
            links = links + [(b, a) for a, b in pairs]
        for src, dst in links:
            self.sim.clog(src, dst)

        def undo() -> None:
            for src, dst in links:
                self.sim.unclog(src, dst)

        self._later(longest, undo)

    def _isolate(self) -> None:
        names = self._everybody
        name = self.rng.choice(names)
        self._cut([name], [n for n in names if n != name])

    def _partition(self) -> None:
        names = self._everybody
        side = [name for name in names if self.rng.random() < 0.5]
        self._cut(side, [name for name in names if name not in side])

    # --- operators --------------------------------------------------------------------

    def _storage_nids(self, *states: NodeState) -> list[int]:
        """What the operator knows: nids of storages, as the primary has them."""
        primary = self.cluster.primary
        if primary is None:
            return []
        return [
            node.nid
            for node in primary.nodes.of_type(NodeType.STORAGE)
            if node.nid is not None and node.state in states
        ]

    def _tweak(self) -> None:
        leaving = self._storage_nids(NodeState.DOWN)
        running = self._storage_nids(NodeState.RUNNING)
        if running and self.rng.random() < 0.4:
            leaving.append(self.rng.choice(running))
        dry_run = self.rng.random() < 0.1
        self.cluster.command(TweakPartitionTable, dry_run, leaving)

    def _kill(self) -> None:
        if nids := self._storage_nids(NodeState.RUNNING):
            nid = self.rng.choice(nids)
            self.cluster.command(SetNodeState, nid, NodeState.DOWN)
            for name in self.cluster.nodes:
                self._later(10, lambda name=name: self.restart(name))

    def _drop(self) -> None:
        """Remove a storage for ever, if the cluster agrees."""
        if nids := self._storage_nids(NodeState.DOWN):
            self.cluster.command(SetNodeState, self.rng.choice(nids), NodeState.UNKNOWN)
        else:
            self._kill()

    def _grow(self) -> None:
        """Start another storage, or add those that are pending."""
        idle = [n for n in self.cluster.spares if self.sim.process(n).factory is None]
        if idle and self.rng.random() < 0.7:
            self._note(f"start of {idle[0]}")
            self.cluster.start(idle[0])
        pending = self._storage_nids(NodeState.PENDING)
        if pending:
            self.cluster.command(AddPendingNodes, pending)
            if self.rng.random() < 0.7:
                self.cluster.command(TweakPartitionTable, False, [])

    def _replicas(self) -> None:
        replicas = self.rng.randint(0, len(self.cluster.storages) - 1)
        self.cluster.command(SetNumReplicas, replicas)
        if self.rng.random() < 0.7:
            self._tweak()

    def _check(self) -> None:
        running = self._storage_nids(NodeState.RUNNING)
        partitions = dict.fromkeys(range(self.cluster.shape.partitions))
        if self.rng.random() < 0.5:
            self.cluster.command(CheckReplicas, partitions, ZERO_TID, MAX_TID)
        else:
            self.cluster.command(Repair, running, self.rng.random() < 0.5)

    def _restart_cluster(self) -> None:
        """Stop the whole cluster in order, then start it again."""
        self.cluster.command(SetClusterState, ClusterState.STOPPING)
        for name in self.cluster.nodes:
            self._later(20, lambda name=name: self.restart(name))

    def _truncate(self) -> None:
        """Forget the last transactions, once in a run."""
        tokens = self.tokens
        if tokens is None or tokens.truncations or not self.cluster.running:
            return
        tid = tokens.truncate(self.rng.choice([0, 1, 5, 20]))
        if tid is not None:
            self.cluster.truncating = True
            self.cluster.command(Truncate, tid)

    # --- the end ----------------------------------------------------------------------

    def stop(self) -> None:
        """No new faults; all that is broken works again."""
        self.stopped = True
        self.sim.note("FAULT", "heal")
        for undo in list(self._undo.values()):
            undo()
        self._undo.clear()
        self.sim.heal()
        for process in self.sim.processes.values():
            process.disk_latency = self.sim.disk_latency
        self._supervise(self.sim.time + LAST_COMMANDS)

    def _supervise(self, until: float) -> None:
        """Start who exits because of a fault or a command that were before the end."""
        for name in self._everybody:
            self.restart(name)
        if self.sim.time < until:
            self.sim.after(2, lambda: self._supervise(until))
