"""Random faults on a standard cluster: every 0.3 to 3 s one, of all kinds.

Rounds of a minute at most, each a new cluster with a seed of its own, which a failure
tells with all that was done; then the cluster is healed and audited. `make chaos
SECONDS=n` goes on for so long; NEO_CHAOS_SEED repeats the faults of one round, as far
as real processes can be repeated.
"""

from __future__ import annotations

import contextlib
import heapq
import io
import os
import random
import resource
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from neo.scripts import neolog

from .chaos import QUICK, World, report

SECONDS = float(os.environ.get("NEO_CHAOS", 12))
SEED = os.environ.get("NEO_CHAOS_SEED")
ROUND = 60.0


class Chaos:
    """Faults that are drawn from a seed, and what ends them."""

    def __init__(self, world: World, seed: int) -> None:
        assert world.network is not None
        self.world = world
        self.net = world.network
        self.rng = random.Random(seed)
        self.done: list[str] = []
        self.start = time.monotonic()
        self._later: list[tuple[float, int, Callable[[], object]]] = []
        self._order = count()
        self._busy: dict[str, None] = {}  # nodes and clients that are dead or paused
        self._faults: tuple[tuple[Callable[[], None], int], ...] = (
            (self.kill, 6),
            (self.pause, 3),
            (self.kill_all, 1),
            (self.fill_disk, 1),
            (self.reset, 6),
            (self.silence, 4),
            (self.cut, 1),
            (self.delay, 2),
            (self.damage, 2),
            (self.refuse, 2),
            (self.step_clock, 3),
            (self.tweak, 2),
        )

    def run(self, seconds: float) -> None:
        """Do harm for so long."""
        faults, weights = zip(*self._faults, strict=True)
        due = 0.0
        while (now := time.monotonic() - self.start) < seconds:
            while self._later and self._later[0][0] <= now:
                heapq.heappop(self._later)[2]()
            if now >= due:
                self.rng.choices(faults, weights)[0]()
                due = now + self.rng.uniform(0.3, 3)
            time.sleep(0.02)
        while self._later:
            heapq.heappop(self._later)[2]()

    def _note(self, text: str) -> None:
        self.done.append(f"{time.monotonic() - self.start:6.2f} {text}")

    def _after(self, delay: float, callback: Callable[[], object]) -> None:
        due = time.monotonic() - self.start + delay
        heapq.heappush(self._later, (due, next(self._order), callback))

    def _free(self) -> list[str]:
        names = [*self.world.ports, "admin", *self.world.workers]
        return [name for name in names if name not in self._busy]

    def _link(self) -> tuple[str, str]:
        target = self.rng.choice([*self.world.ports])
        sources = [*self.world.ports, "admin", *self.world.workers]
        return self.rng.choice([s for s in sources if s != target]), target

    # --- faults -----------------------------------------------------------------------

    def kill(self) -> None:
        """kill -9, and a restart."""
        if free := self._free():
            self._kill(self.rng.choice(free), self.rng.choice((0, 0, 1, 5)))

    def _kill(self, name: str, delay: float) -> None:
        self._note(f"kill {name} for {delay} s")
        self._busy[name] = None
        if name in self.world.workers:
            self.world.kill_client(name)
        else:
            self.world.kill(name)
        self._after(delay, lambda: self._start(name))

    def _start(self, name: str) -> None:
        if name.startswith("client"):
            self.world.start_client(name)
        else:
            self.world.start_node(name)
        del self._busy[name]

    def kill_all(self) -> None:
        """Power loss, as far as processes know."""
        delay = self.rng.choice((0, 2))
        for name in self._free():
            if not name.startswith("client"):
                self._kill(name, delay)

    def pause(self) -> None:
        """SIGSTOP, SIGCONT."""
        if free := self._free():
            name, delay = self.rng.choice(free), self.rng.choice((0.5, 2, 6))
            self._note(f"pause {name} for {delay} s")
            self._busy[name] = None
            self.world.pause(name)

            def resume() -> None:
                self.world.resume(name)
                del self._busy[name]

            self._after(delay, resume)

    def fill_disk(self) -> None:
        """A storage can't write any more; it must exit. Started again, it can."""
        storages = [n for n in self._free() if n.startswith("storage")]
        if not storages:
            return
        name = self.rng.choice(storages)
        self._note(f"full disk of {name}")
        self._busy[name] = None
        limit = (50_000, resource.RLIM_INFINITY)
        resource.prlimit(self.world.pid(name), resource.RLIMIT_FSIZE, limit)

        def restart() -> None:
            # It may have had nothing to write.
            self.world.kill(name)
            self._start(name)

        self._after(3, restart)

    def reset(self) -> None:
        """Reset a link, or some."""
        for _ in range(self.rng.choice((1, 1, 5))):
            a, b = self._link()
            self._note(f"reset {a} - {b}")
            self.net.reset(a, b)

    def silence(self) -> None:
        """Nothing passes on a link, in one direction or both."""
        a, b = self._link()
        ways = self.rng.choice((((a, b),), ((b, a),), ((a, b), (b, a))))
        delay = self.rng.choice((0.5, 2, 6))
        self._note(f"silence {ways} for {delay} s")
        self.net.silence(*ways)
        self._after(delay, lambda: self.net.speak(*ways))

    def cut(self) -> None:
        """Two groups of nodes don't hear each other."""
        nodes = [*self.world.ports, "admin", *self.world.workers]
        one = self.rng.sample(nodes, self.rng.randint(1, len(nodes) // 2))
        other = [name for name in nodes if name not in one]
        delay = self.rng.choice((1, 8))
        self._note(f"cut off {one} for {delay} s")
        ways = [(a, b) for a in one for b in other]
        ways += [(b, a) for a, b in ways]
        self.net.silence(*ways)
        self._after(delay, lambda: self.net.speak(*ways))

    def delay(self) -> None:
        """What passes on a link comes late."""
        a, b = self._link()
        seconds = self.rng.choice((0.01, 0.1, 1))
        self._note(f"delay {a} > {b}: {seconds} s")
        self.net.delay(a, b, seconds)
        self._after(5, lambda: self.net.delay(a, b, 0))

    def damage(self) -> None:
        """A packet is none any more: its first byte changes."""
        way = self.rng.choice((lambda a, b: (a, b), lambda a, b: (b, a)))(*self._link())
        self._note(f"damage {way}")
        self.net.damage(*way)

    def refuse(self) -> None:
        """A node can't connect to another one."""
        a, b = self._link()
        self._note(f"refuse {a} > {b}")
        self.net.refuse(a, b)
        self._after(self.rng.choice((1, 5)), lambda: self.net.allow(a, b))

    def step_clock(self) -> None:
        """Of a master."""
        name = self.rng.choice(self.world.master_names)
        offset = self.rng.choice((-86400, -5, -1, 1, 60))
        self._note(f"clock of {name}: {offset} s")
        self.world.set_clock(name, offset)

    def tweak(self) -> None:
        """An operator moves cells, and back the next time."""
        args = self.rng.choice(((), ("S1",), ("S2",)))
        status, out, err = self.world.neoctl("tweak", *args)
        self._note(f"tweak {args}: {status} {err or out[:20]!r}")


def one_round(directory: Path, seed: int, seconds: float) -> None:
    """A cluster, faults, an audit."""
    world = World(directory, network=True, limits=QUICK, think=0.02)
    chaos = None
    try:
        with world:
            before = world.descriptors()
            chaos = Chaos(world, seed)
            chaos.run(seconds)
            world.heal()
            world.balance()
            after = world.descriptors()
            counts = world.audit()
    except BaseException as error:
        done = "\n".join(chaos.done) if chaos else ""
        error.add_note(f"NEO_CHAOS_SEED={seed} in {directory}\n{done}")
        raise
    for name, number in after.items():
        assert number <= before[name] * 1.1 + 10, (name, before, after)
    for path in directory.glob("*.log"):
        with contextlib.redirect_stdout(io.StringIO()):
            assert neolog.main([str(path)]) == 0, path
    report(0, "random chaos", seed=seed, faults=len(chaos.done), **counts)


def test_random(tmp_path: Path) -> None:
    """Whatever happens, what was acknowledged is there, and the cluster gets well."""
    end = time.monotonic() + SECONDS
    number = 0
    while number == 0 or time.monotonic() < end - 5:
        seed = int(SEED) if SEED else random.SystemRandom().getrandbits(32)
        seconds = min(ROUND, max(5, end - time.monotonic()))
        one_round(tmp_path / str(number), seed, seconds)
        number += 1
        if SEED:
            break
