"""One run: a cluster of a drawn shape, a workload, faults; then heal and audit."""

from __future__ import annotations

from .cluster import Cluster, Shape, transactions_of
from .faults import Faults
from .runtime import Simulation
from .workload import Tokens

SAFETY = 30.0  # seconds with faults
COMMITS = 300  # that end the phase with faults
LIVENESS = 120.0  # seconds that everything may take to recover
QUIET = 5.0  # seconds after which nothing is left to do


class Run:
    """See the module. `execute()` raises SimulationFailed."""

    def __init__(
        self,
        seed: int | str,
        *,
        shape: Shape | None = None,
        kinds: list[str] | None = None,
        every: float = 1.0,
        trace: bool | None = None,
    ) -> None:
        sim = self.sim = Simulation(seed, trace=trace)
        rng = sim.rng("options")
        sim.cut = rng.choice([0, 0.1, 0.5])
        sim.latency = rng.choice([(0.0002, 0.002), (0.0002, 0.05), (0.02, 0.2)])
        sim.disk_latency = rng.choice([0.0001, 0.002, 0.02])
        self.cluster = Cluster(sim, shape or Shape.drawn(sim))
        self.kinds, self.every = kinds, every
        self.tokens = Tokens(sim, think=rng.choice([0.01, 0.1, 0.5]))
        self.faults: Faults | None = None
        sim.note(
            "OPTIONS",
            f"{self.cluster.shape}, latency {sim.latency}, disk {sim.disk_latency},"
            f" cut {sim.cut}, think {self.tokens.think}",
        )

    def start(self) -> None:
        """Create the cluster and its objects."""
        cluster = self.cluster
        cluster.start()
        self.sim.run_until(lambda: cluster.running, 60)
        cluster.call(self.tokens.create, cluster.storage())
        for name in cluster.clients:
            self.start_client(name)

    def start_client(self, name: str) -> None:
        """Start the threads of a client."""
        for _ in range(self.cluster.shape.threads):
            self.tokens.start(name, self.cluster.storage(name))

    def execute(self, seconds: float = SAFETY) -> None:
        """All phases."""
        self.start()
        if self.kinds is None:
            self.faults = Faults.drawn(self.cluster, self.start_client)
        else:
            self.faults = Faults(
                self.cluster, self.kinds, self.every, self.start_client
            )
        self.sim.note("OPTIONS", f"{self.faults.kinds} every {self.faults.every}")
        enough = self.tokens.committed + COMMITS
        self.sim.run_until(lambda: self.tokens.committed >= enough, seconds, fail=False)
        self.recover()
        self.audit()

    def recover(self) -> None:
        """Without faults, all goes on: promise P16."""
        assert self.faults is not None
        sim, cluster, tokens = self.sim, self.cluster, self.tokens
        self.faults.stop()
        sim.run_until(lambda: cluster.healthy, LIVENESS)
        expected = tokens.committed + 3 * len(cluster.clients)
        sim.run_until(lambda: tokens.committed >= expected, LIVENESS)
        tokens.stopping = True
        sim.run_until(lambda: not tokens.running, LIVENESS)
        sim.run(QUIET)
        # What was cut off silently may be noticed, and replaced, only now.
        sim.run_until(lambda: cluster.healthy, LIVENESS)

    def audit(self) -> None:
        """Compare all that was seen with all that is there."""
        cluster = self.cluster
        replicas = cluster.replicas()
        metadata = transactions_of(replicas)
        cluster.call(self.tokens.check, cluster.storage(), replicas, metadata)
        if leftovers := cluster.leftovers():
            raise self.sim.failure(f"left in temporary tables: {leftovers}")
