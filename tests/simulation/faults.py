"""Faults of a simulated run: drawn from the seed, each undone after a while."""

from __future__ import annotations

from collections.abc import Callable

from .cluster import Cluster

# Names of faults, as in options of a run.
KINDS = (
    "crash", "power", "crash-all", "client", "reset", "clog", "isolate", "partition",
    "pause", "clock", "slow-disk", "refuse",
)  # fmt: skip


class Faults:
    """Injects faults of some kinds every `every` seconds on average, until `stop()`.

    `on_client(name)`: a client was started again.
    """

    def __init__(
        self,
        cluster: Cluster,
        kinds: list[str],
        every: float,
        on_client: Callable[[str], object],
    ) -> None:
        self.cluster = cluster
        self.sim = cluster.sim
        self.rng = cluster.sim.rng("faults")
        self.kinds = kinds
        self.every = every
        self.on_client = on_client
        self.stopped = False
        self.count = 0
        self._plan()

    @classmethod
    def drawn(cls, cluster: Cluster, on_client: Callable[[str], object]) -> Faults:
        """About half of all kinds, and a rate."""
        rng = cluster.sim.rng("faults")
        kinds = [kind for kind in KINDS if rng.random() < 0.4] or ["crash"]
        return cls(cluster, kinds, rng.choice([0.1, 0.5, 1, 3, 6]), on_client)

    def _plan(self) -> None:
        self.sim.after(self.rng.expovariate(1 / self.every), self._next)

    def _next(self) -> None:
        if self.stopped:
            return
        kind = self.rng.choice(self.kinds)
        self.count += 1
        getattr(self, "_" + kind.replace("-", "_"))()
        self._plan()

    def _note(self, text: str) -> None:
        self.sim.note("FAULT", text)

    def _later(self, longest: float, undo: Callable[[], object]) -> None:
        """Undo a fault in a while: mostly soon, sometimes late."""
        self.sim.after(longest * self.rng.random() ** 3, undo)

    def _up(self, names: list[str]) -> list[str]:
        return [name for name in names if self.cluster.process(name).alive]

    # --- processes --------------------------------------------------------------------

    def _kill(self, name: str, power: bool) -> None:
        self._note(f"{'power loss' if power else 'kill'} of {name}")
        self.cluster.crash(name, power)
        self._later(10, lambda: self.restart(name))

    def restart(self, name: str) -> None:
        """Start a node again; a client goes on with its work."""
        if not self.cluster.process(name).alive:
            self.sim.restart(name)
            if name in self.cluster.clients:
                self.on_client(name)

    def _crash(self) -> None:
        if up := self._up(self.cluster.nodes):
            self._kill(self.rng.choice(up), False)

    def _power(self) -> None:
        if up := self._up(self.cluster.nodes):
            self._kill(self.rng.choice(up), True)

    def _crash_all(self) -> None:
        power = self.rng.random() < 0.5
        for name in self._up(self.cluster.nodes):
            self._kill(name, power)

    def _client(self) -> None:
        if up := self._up(self.cluster.clients):
            self._kill(self.rng.choice(up), self.rng.random() < 0.5)

    def _pause(self) -> None:
        if up := self._up([*self.cluster.nodes, *self.cluster.clients]):
            name = self.rng.choice(up)
            self._note(f"pause of {name}")
            process = self.cluster.process(name)
            process.pause()

            def resume() -> None:
                if process.alive and process.paused:
                    process.resume()

            self._later(30, resume)

    def _clock(self) -> None:
        process = self.cluster.process(self.rng.choice(self.cluster.masters))
        step = self.rng.choice([-86400, -60, -5, -1, -0.1, 0.1, 1, 60])
        self._note(f"clock of {process.name} steps by {step}")
        process.skew += step

    def _slow_disk(self) -> None:
        process = self.cluster.process(self.rng.choice(self.cluster.storages))
        self._note(f"slow disk of {process.name}")
        process.disk_latency = self.sim.disk_latency * self.rng.choice([10, 100, 1000])

        def undo() -> None:
            process.disk_latency = self.sim.disk_latency

        self._later(20, undo)

    # --- network ----------------------------------------------------------------------

    def _pair(self) -> tuple[str, str]:
        names = [*self.cluster.nodes, *self.cluster.clients]
        a, b = self.rng.sample(names, 2)
        return a, b

    def _reset(self) -> None:
        names = [*self.cluster.nodes, *self.cluster.clients]
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

    def _refuse(self) -> None:
        a, b = self._pair()
        self._note(f"refuse {a} > {b}")
        link = self.sim.link(a, b)
        link.refused = True

        def undo() -> None:
            link.refused = False

        self._later(20, undo)

    def _cut(self, side: list[str], other: list[str]) -> None:
        self._note(f"partition {side} / {other}")
        self.sim.partition(side, other)

        def undo() -> None:
            for a in side:
                for b in other:
                    self.sim.unclog(a, b)
                    self.sim.unclog(b, a)

        self._later(40, undo)

    def _isolate(self) -> None:
        names = [*self.cluster.nodes, *self.cluster.clients]
        name = self.rng.choice(names)
        self._cut([name], [n for n in names if n != name])

    def _partition(self) -> None:
        names = [*self.cluster.nodes, *self.cluster.clients]
        side = [name for name in names if self.rng.random() < 0.5]
        self._cut(side, [name for name in names if name not in side])

    # --- the end ----------------------------------------------------------------------

    def stop(self) -> None:
        """No new faults; all that is broken works again."""
        self.stopped = True
        self._note("heal")
        self.sim.heal()
        for process in self.sim.processes.values():
            process.disk_latency = self.sim.disk_latency
        for name in (*self.cluster.nodes, *self.cluster.clients):
            self.restart(name)
