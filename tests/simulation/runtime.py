"""The Runtime of simulated nodes: everything that could differ between two runs of the
same seed is drawn here, from it.

One heap of events in virtual time. An event belongs to a process and is handled to its
end, as in one turn of the epoll loop: then output is sent, the node's `check()` and the
invariants run. Application threads are greenlets: they block in `wait()` alone, and are
resumed in an order drawn from the seed.

    sim = Simulation(seed)
    sim.start("master", lambda runtime: Master(runtime, options))
    sim.spawn("client", work, client)     # an application thread of that process
    sim.run_until(lambda: ..., within=10)

`Simulation.digest` covers every event with its time and bytes: equal digests, equal
runs. A failure names seed and time; with `trace=True` the same run tells all.
Source: testing.md 4.
"""

from __future__ import annotations

import heapq
import os
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from hashlib import blake2b
from itertools import count
from random import Random  # noqa: TID251 - seeded
from typing import Any, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from neo.lib.codec import Decoder
from neo.lib.connection import Connection
from neo.lib.exception import BackendError
from neo.lib.handler import Handler
from neo.lib.logger import format_message
from neo.lib.protocol import BY_CODE
from neo.lib.runtime import Throttle
from neo.lib.util import Address

from . import network
from .network import LINGER, RESET, Link, Listener, SimTransport

T = TypeVar("T")
Job = tuple[Callable[[], Any], Callable[[Any], object]]

EPOCH = 1_800_000_000.0  # the wall clock of a node without skew, at virtual time 0
HOST = "127.0.0.1"
CHECK_EVERY = 4  # events of a process: nodes' own checks
EVENTS_MAX = 500_000  # of a run: more means that nodes keep each other busy


class SimulationFailed(AssertionError):
    """Something that must never happen did; the text has what a replay needs."""


class SimLogger:
    """A Logger whose lines go to the trace of the simulation."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.tracing = process.sim.tracing

    def _log(self, level: str, message: str, args: tuple[object, ...]) -> None:
        self._process.sim.note(
            self._process.name, f"{level}: {format_message(message, args)}"
        )

    def debug(self, message: str, *args: object) -> None:
        if self.tracing:
            self._log("debug", message, args)

    def info(self, message: str, *args: object) -> None:
        if self.tracing:
            self._log("info", message, args)

    def warning(self, message: str, *args: object) -> None:
        self._log("WARNING", message, args)

    def error(self, message: str, *args: object) -> None:
        self._log("ERROR", message, args)

    def critical(self, message: str, *args: object) -> None:
        self._log("CRITICAL", message, args)

    def exception(self, message: str, *args: object) -> None:
        text = f"{format_message(message, args)}\n{traceback.format_exc()}"
        self._log("ERROR", text, ())

    def log(self, level: int, message: str, *args: object) -> None:
        if level >= 30 or self.tracing:
            self._log(str(level), message, args)

    def throttled(
        self, _key: Hashable, level: int, message: str, *args: object
    ) -> None:
        self.log(level, message, *args)

    def message(
        self, outgoing: bool, peer: object, msg_id: int, code: int, data: bytes
    ) -> None:
        ((*_, args, _),) = Decoder(len(data)).feed(data)
        self.packet(outgoing, peer, msg_id, code, args)

    def packet(
        self,
        outgoing: bool,
        peer: object,
        msg_id: int,
        code: int,
        args: tuple[Any, ...],
    ) -> None:
        packet = BY_CODE.get(code, code)
        self._process.sim.note(
            self._process.name,
            f"{'>' if outgoing else '<'} {peer} {msg_id:#06x} {packet}{args!r}"[:1000],
        )

    def set_node(self, cluster: str, nid: int | None) -> None: ...

    def flush(self) -> None: ...

    def reopen(self) -> None: ...

    def close(self) -> None: ...


class SimTimer:
    """See `neo.lib.runtime.Timer`."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None

    def fire(self) -> None:
        callback = self.callback
        if callback is not None:
            callback()


class SimRuntime:
    """What one incarnation of a node knows of the world: a ClientRuntime.

    A process with several clients has one for each.
    """

    def __init__(self, process: Process, incarnation: int | str) -> None:
        self.process = process
        self.sim = process.sim
        self.log = SimLogger(process)
        self.throttle = Throttle()
        self.rng = Random(f"{self.sim.seed}:{process.name}:{incarnation}")

    def now(self) -> float:
        return self.process.now()

    def monotonic(self) -> float:
        return self.process.monotonic()

    def call_later(self, delay: float, callback: Callable[[], object]) -> SimTimer:
        timer = SimTimer(callback)
        self.process.start_timer(delay, timer)
        return timer

    def connect(self, address: Address, handler: Handler) -> Connection:
        return network.connect(self, address, handler)

    def connection_succeeded(self, address: Address) -> None:
        self.throttle.succeeded(address, self.monotonic())

    def listen(
        self, address: Address, accept: Callable[[Connection], object]
    ) -> Address:
        if not address[1]:
            address = address[0], self.sim.ephemeral_port()
        if address in self.sim.listeners:
            raise OSError(98, "Address already in use")
        self.sim.listeners[address] = Listener(self.process, accept)
        return address

    def unlisten(self) -> None:
        self.process.unlisten()

    def submit(
        self,
        queue: str,
        job: Callable[[], T],
        done: Callable[[T | Exception], object],
        *,
        inline: bool = False,
    ) -> None:
        self.process.submit(queue, job, done)

    def buggify(self, name: str) -> bool:
        return self.sim.buggify(name)

    def stop(self, status: int = 0) -> None:
        self.process.stop(status)

    def thread(self) -> greenlet:
        return getcurrent()

    def unlocked(self, job: Callable[[], T]) -> T:
        # Others may run meanwhile.
        self.process.sleep(self.sim.rng("order").random() * 1e-3)
        return job()

    def wait(
        self,
        condition: Callable[[], object],
        _connections: Iterable[Connection] = (),
        timeout: float | None = None,
    ) -> bool:
        return self.process.wait(condition, timeout)

    def look(self, connections: Iterable[Connection]) -> None:
        """Nothing: what comes is handled at once."""


class Waiter:
    """An application thread that waits."""

    def __init__(self, thread: greenlet, condition: Callable[[], object]) -> None:
        self.thread = thread
        self.condition = condition
        self.scheduled = False


class Process:
    """A node through its incarnations. `app` is None while it is down.

    `status`: exit status of the last incarnation that stopped by itself, None before.
    """

    def __init__(self, sim: Simulation, name: str) -> None:
        self.sim = sim
        self.name = name
        self.factory: Callable[[SimRuntime], Any] | None = None
        self.app: Any = None
        self.alive = False
        self.paused = False
        self.status: int | None = None
        self.incarnation = 0
        self.skew = 0.0  # seconds to add to the wall clock
        self.drift = 0.0  # seconds to add, per second
        self.disk_latency = sim.disk_latency  # mean, seconds
        self.runtime: SimRuntime
        self.transports: dict[SimTransport, None] = {}
        self.dirty: list[SimTransport] = []
        self.threads: dict[greenlet, None] = {}
        self.waiters: dict[greenlet, Waiter] = {}
        self.held: list[tuple[str, Callable[..., object], tuple[Any, ...]]] = []
        self._rank = 0.0
        self._turns = 0
        self._offset = 0.0
        self._stopping: int | None = None
        self._queues: dict[str, deque[Job]] = {}

    def __repr__(self) -> str:
        return f"<{self.name}.{self.incarnation}>"

    # --- clocks -----------------------------------------------------------------------

    def now(self) -> float:
        return EPOCH + self.sim.time * (1 + self.drift) + self.skew

    def monotonic(self) -> float:
        return self._offset + self.sim.time

    # --- life -------------------------------------------------------------------------

    def start(self, factory: Callable[[SimRuntime], Any] | None) -> None:
        assert not self.alive, f"{self.name} runs already"
        if factory is not None:
            self.factory = factory
        assert self.factory is not None
        rng = self.sim.rng("order")
        self.alive, self.paused = True, False
        self.incarnation += 1
        self._rank = rng.random()
        self._offset = rng.uniform(0, 1e6)
        self._stopping = self.status = None
        self._queues = {}
        self.runtime = SimRuntime(self, self.incarnation)
        if self.sim.current is None:
            self._handle(self.incarnation, "start", self._start, (self.factory,))
        else:
            self.post("start", self._start, self.factory)

    def _start(self, factory: Callable[[SimRuntime], Any]) -> None:
        self.app = factory(self.runtime)
        start = getattr(self.app, "start", None)
        if start is not None:
            start()

    def stop(self, status: int) -> None:
        if self._stopping is None:
            self._stopping = status
            self.unlisten()
            self.post_later(LINGER, "exit", self.exit)

    def exit(self) -> None:
        """End by itself: jobs are finished, connections closed."""
        status = 0 if self._stopping is None else self._stopping
        for jobs in self._queues.values():
            for job, _ in jobs:
                try:
                    job()
                except BackendError as error:
                    self.sim.note(self.name, f"database: {error}")
        self.sim.note(self.name, f"exit {status}")
        for transport in list(self.transports):
            transport.close()
        self._down()
        self.status = status

    def crash(self, silent: bool = False) -> None:
        """Die at once. `silent`: the peers are not told, as when the machine dies."""
        assert self.alive, f"{self.name} is down already"
        self.sim.note(self.name, "crash")
        for transport in list(self.transports):
            transport.crashed(silent)
        self._down()

    def _down(self) -> None:
        self.alive = False
        self.app = None
        self.unlisten()
        self.transports.clear()
        self.dirty.clear()
        self.held.clear()
        self._queues = {}
        self.waiters.clear()
        current = getcurrent()
        threads, self.threads = self.threads, {}
        for thread in threads:
            if thread is not current and not thread.dead:
                thread.parent = current  # where to come back to
                thread.throw(GreenletExit)

    def unlisten(self) -> None:
        listeners = self.sim.listeners
        for address in [a for a, x in listeners.items() if x.process is self]:
            del listeners[address]

    def pause(self) -> None:
        """Freeze, as SIGSTOP does."""
        self.paused = True

    def resume(self) -> None:
        """Handle at once what came while paused."""
        self.paused = False
        held, self.held = self.held, []
        for kind, callback, args in held:
            self.post(kind, callback, *args)

    # --- events -----------------------------------------------------------------------

    def post(self, kind: str, callback: Callable[..., object], *args: Any) -> None:
        """Handle an event now, after those of now."""
        self.post_later(0.0, kind, callback, *args)

    def post_later(
        self, delay: float, kind: str, callback: Callable[..., object], *args: Any
    ) -> None:
        """Handle an event in `delay` seconds, unless the incarnation is dead then."""
        sim = self.sim
        sim.at(
            sim.time + delay,
            lambda i=self.incarnation: self._handle(i, kind, callback, args),
            self._rank,
        )

    def start_timer(self, delay: float, timer: SimTimer) -> None:
        """As `post_later`; a cancelled timer is no event."""
        incarnation = self.incarnation

        def fire() -> None:
            if timer.callback is not None:
                self._handle(incarnation, "timer", timer.fire, ())

        self.sim.at(self.sim.time + delay, fire, self._rank)

    def _handle(
        self,
        incarnation: int,
        kind: str,
        callback: Callable[..., object],
        args: tuple[Any, ...],
    ) -> None:
        if not self.alive or incarnation != self.incarnation:
            return
        if self.paused:
            self.held.append((kind, callback, args))
            return
        sim = self.sim
        sim.event(self, kind, args)
        sim.current = self
        try:
            callback(*args)
            self._end_of_turn()
            for invariant in sim.invariants:
                invariant(self)
        except BackendError as error:
            sim.note(self.name, f"database: {error}")
            self._fatal()
        except SimulationFailed:
            raise
        except Exception as error:
            raise sim.failure(
                f"{self.name}: {type(error).__name__}: {error}"
            ) from error
        finally:
            sim.current = None

    def _fatal(self) -> None:
        for transport in list(self.transports):
            transport.crashed(False)
        self._down()
        self.status = 1

    def flush_soon(self, transport: SimTransport) -> None:
        self.dirty.append(transport)
        if self.sim.current is not self:
            self.post("flush", lambda: None)

    def _end_of_turn(self) -> None:
        while self.dirty:
            dirty, self.dirty = self.dirty, []
            for transport in dirty:
                transport.flush()
        if not self.alive:
            return
        if self._stopping is not None and not any(t.busy for t in self.transports):
            self.exit()
            return
        # What is wrong mostly stays so: a check after each event would find it sooner,
        # but cost as much as all the rest of the simulator.
        self._turns += 1
        if self._turns % CHECK_EVERY == 0 or self.sim.tracing:
            check = getattr(self.app, "check", None)
            if check is not None:
                check()
        for waiter in list(self.waiters.values()):
            if not waiter.scheduled and waiter.condition():
                waiter.scheduled = True
                delay = self.sim.rng("order").random() * 1e-4
                self.post_later(delay, "wake", self._wake, waiter)

    # --- jobs -------------------------------------------------------------------------

    def submit(
        self, queue: str, job: Callable[[], T], done: Callable[[T | Exception], object]
    ) -> None:
        jobs = self._queues.get(queue)
        if jobs is None:
            jobs = self._queues[queue] = deque()
        jobs.append((job, done))
        if len(jobs) == 1:
            self._schedule_job(queue)

    def _latency(self) -> float:
        return self.disk_latency * self.sim.rng("disk").expovariate(1)

    def _schedule_job(self, queue: str) -> None:
        sim = self.sim
        sim.at(
            sim.time + self._latency(),
            lambda i=self.incarnation: self._run_job(i, queue),
            self._rank,
        )

    def _run_job(self, incarnation: int, queue: str) -> None:
        # Outside of the turns of the loop: other events come before the completion.
        if not self.alive or incarnation != self.incarnation:
            return
        if self.paused:
            self.held.append(("job", self._schedule_job, (queue,)))
            return
        job, done = self._queues[queue][0]
        self.sim.event(self, "job", (queue,))
        try:
            result = job()
        except Exception as error:  # noqa: BLE001 - as Worker.run of the epoll loop
            result = error
        if not self.alive:  # its disk crashed it
            return
        self.post_later(self._latency(), "done", self._job_done, queue, done, result)

    def _job_done(
        self, queue: str, done: Callable[[Any], object], result: object
    ) -> None:
        jobs = self._queues[queue]
        jobs.popleft()
        if jobs:
            self._schedule_job(queue)
        done(result)

    # --- application threads ----------------------------------------------------------

    def spawn(self, function: Callable[..., object], *args: Any) -> greenlet:
        """Run an application thread, which dies with the process."""
        thread = greenlet(lambda: self._run_thread(function, args))
        self.threads[thread] = None
        self.post("spawn", self._switch, thread)
        return thread

    def _run_thread(
        self, function: Callable[..., object], args: tuple[Any, ...]
    ) -> None:
        try:
            function(*args)
        finally:
            self.threads.pop(getcurrent(), None)

    def _switch(self, thread: greenlet, *args: Any) -> None:
        if not thread.dead:
            thread.parent = getcurrent()
            thread.switch(*args)

    def _wake(self, waiter: Waiter) -> None:
        if self.waiters.get(waiter.thread) is not waiter:
            return
        waiter.scheduled = False
        if waiter.condition():  # another thread may have run meanwhile
            del self.waiters[waiter.thread]
            self._switch(waiter.thread, True)

    def _timeout(self, waiter: Waiter) -> None:
        if self.waiters.get(waiter.thread) is waiter:
            del self.waiters[waiter.thread]
            self._switch(waiter.thread, False)

    def wait(self, condition: Callable[[], object], timeout: float | None) -> bool:
        """See `ClientRuntime.wait`. The test itself may also wait, between events."""
        if not self.alive:
            raise GreenletExit
        if condition():
            return True
        thread = getcurrent()
        if thread not in self.threads:
            assert self.sim.current is None, "an event handler must not wait"
            return self.sim.run_until(condition, timeout or 1e6, fail=timeout is None)
        waiter = self.waiters[thread] = Waiter(thread, condition)
        if timeout is not None:
            self.post_later(timeout, "timeout", self._timeout, waiter)
        result: bool = thread.parent.switch()
        return result

    def sleep(self, seconds: float) -> None:
        """Let an application thread sleep."""
        self.wait(lambda: False, seconds)


class Simulation:
    """A world of processes: see the module.

    `latency`: bounds, in seconds, of the mean delay of a link, drawn for each.
    `cut`: probability that a segment is cut once more. `disk_latency`: mean of each
    half of a job, in seconds. `trace`: keep every packet and line of log.
    `buggify`: probability that a rare branch is taken often in this run.
    """

    def __init__(
        self,
        seed: int | str = 0,
        *,
        latency: tuple[float, float] = (0.0002, 0.02),
        cut: float = 0.1,
        disk_latency: float = 0.002,
        buggify: float = 0.0,
        trace: bool | None = None,
    ) -> None:
        self.seed = seed
        self.latency = latency
        self.cut = cut
        self.disk_latency = disk_latency
        self.tracing = bool(os.environ.get("SIM_TRACE")) if trace is None else trace
        self.time = 0.0
        self.events = 0
        self.processes: dict[str, Process] = {}
        self.listeners: dict[Address, Listener] = {}
        self.options = ""  # text for the report of a failure
        # After each event of a process.
        self.invariants: list[Callable[[Process], object]] = []
        self.slow_invariants: list[Callable[[], object]] = []  # each virtual second
        self.current: Process | None = None
        self.marks: dict[str, int] = {}
        self.lines: deque[tuple[float, str, object]] = deque(
            maxlen=None if self.tracing else 400
        )
        self._buggify = buggify
        self._buggified: dict[str, bool] = {}
        self._rngs: dict[str, Random] = {}
        self._heap: list[tuple[float, float, int, Callable[[], object]]] = []
        self._order = count()
        self._hash = blake2b(digest_size=16)
        self._links: dict[tuple[str, str], Link] = {}
        self._port = 40000
        self._next_slow = 1.0

    # --- chance -----------------------------------------------------------------------

    def rng(self, purpose: str) -> Random:
        """The generator of one purpose: what one draws doesn't move the others."""
        rng = self._rngs.get(purpose)
        if rng is None:
            rng = self._rngs[purpose] = Random(f"{self.seed}:{purpose}")
        return rng

    def buggify(self, name: str) -> bool:
        """Often true, for a few names."""
        rng = self.rng("buggify")
        enabled = self._buggified.get(name)
        if enabled is None:
            drawn = Random(f"{self.seed}:buggify:{name}").random()
            enabled = self._buggified[name] = drawn < self._buggify
        return enabled and rng.random() < 0.25

    def sometimes(self, name: str) -> None:
        """Count that a state worth testing was reached."""
        self.marks[name] = self.marks.get(name, 0) + 1

    # --- trace ------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """What identifies the run."""
        return self._hash.hexdigest()

    def event(self, process: Process, kind: str, args: tuple[Any, ...]) -> None:
        """Record an event of a process."""
        self.events += 1
        if self.events > EVENTS_MAX:
            raise self.failure("too many events")
        data = args[0] if args and isinstance(args[0], bytes) else None
        check = 0 if data is None else zlib.crc32(data)
        line = f"{self.time!r} {process.name} {kind} {check}\n"
        self._hash.update(line.encode())
        if data is None:
            self.lines.append((self.time, process.name, kind))
        elif not self.tracing:
            self.lines.append((self.time, process.name, data))

    def note(self, name: str, text: str) -> None:
        """Add a line to the trace."""
        self.lines.append((self.time, name, text))

    def report(self, last: int | None = 200) -> str:
        """The end of the trace."""
        lines = list(self.lines)
        if last is not None and not self.tracing:
            lines = lines[-last:]
        return "\n".join(
            f"{when:12.6f} {name:10} {describe(detail)}" for when, name, detail in lines
        )

    def failure(self, text: str) -> SimulationFailed:
        """An exception to raise: `text`, and what a replay needs."""
        return SimulationFailed(
            f"{text}\nseed {self.seed}, {self.time:.6f} s, {self.events} events,"
            f" digest {self.digest}\noptions {self.options}\n{self.report()}"
        )

    # --- scheduler --------------------------------------------------------------------

    def at(
        self, time: float, callback: Callable[[], object], rank: float = 0.0
    ) -> None:
        """Call at a virtual time. Those of equal time: by `rank`, then first come."""
        heapq.heappush(self._heap, (time, rank, next(self._order), callback))

    def after(self, delay: float, callback: Callable[[], object]) -> None:
        """Call in `delay` seconds: for schedules of faults."""
        self.at(self.time + delay, callback)

    def step(self) -> bool:
        """Handle one event; false if there is none."""
        if not self._heap:
            return False
        time, _, _, callback = heapq.heappop(self._heap)
        self.time = time
        callback()
        if time >= self._next_slow:
            self._next_slow = time + 1.0
            for invariant in self.slow_invariants:
                invariant()
        return True

    def run(self, seconds: float) -> None:
        """Let virtual time pass."""
        end = self.time + seconds
        while self._heap and self._heap[0][0] <= end:
            self.step()
        self.time = end

    def run_until(
        self, condition: Callable[[], object], within: float = 60.0, fail: bool = True
    ) -> bool:
        """Go on until `condition()`; if that takes too long, fail or return false."""
        end = self.time + within
        while not condition():
            if not self._heap or self._heap[0][0] > end:
                if fail:
                    raise self.failure(f"not reached within {within} s")
                self.time = end
                return False
            self.step()
        return True

    # --- processes --------------------------------------------------------------------

    def process(self, name: str) -> Process:
        """The process of that name, made on first use."""
        process = self.processes.get(name)
        if process is None:
            process = self.processes[name] = Process(self, name)
        return process

    def start(self, name: str, factory: Callable[[SimRuntime], Any]) -> Process:
        """Start a node: `factory(runtime)` makes it, `start()` is called if it has one.

        At once, or as the next event if called by an application thread.
        """
        process = self.process(name)
        process.start(factory)
        return process

    def crash(self, name: str, silent: bool = False) -> None:
        """Kill a node."""
        self.processes[name].crash(silent)

    def restart(self, name: str) -> Process:
        """Start a node that is down, by the same factory."""
        process = self.processes[name]
        process.start(None)
        return process

    def pause(self, name: str) -> None:
        """Freeze a node."""
        self.processes[name].pause()

    def resume(self, name: str) -> None:
        """Go on with a frozen node."""
        self.processes[name].resume()

    def app(self, name: str) -> Any:
        """The node itself, None while it is down."""
        return self.process(name).app

    def spawn(self, name: str, function: Callable[..., object], *args: Any) -> greenlet:
        """Run an application thread in a process."""
        return self.process(name).spawn(function, *args)

    def call(self, name: str, function: Callable[..., T], *args: Any) -> T:
        """Run a function in an application thread to its end; its result or error."""
        results: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(function(*args))
            except BaseException as error:  # noqa: BLE001 - raised to the caller
                errors.append(error)

        thread = self.spawn(name, work)
        self.run_until(lambda: thread.dead, 1000)
        if errors:
            raise errors[0]
        return results[0]

    # --- network ----------------------------------------------------------------------

    def ephemeral_port(self) -> int:
        """A port that nobody used."""
        self._port += 1
        return self._port

    def link(self, src: str, dst: str) -> Link:
        """The way from one process to another."""
        link = self._links.get((src, dst))
        if link is None:
            link = self._links[src, dst] = Link(self)
        return link

    def clog(self, src: str, dst: str) -> None:
        """Hold all that goes from one process to another."""
        self.link(src, dst).clogged = True

    def unclog(self, src: str, dst: str) -> None:
        """Release it."""
        link = self.link(src, dst)
        link.clogged = False
        stalled, link.stalled = link.stalled, []
        for arrive in stalled:
            self.after(link.delay(), arrive)

    def partition(self, *sides: Iterable[str]) -> None:
        """Cut the processes into sets that don't reach each other."""
        side_of = {name: i for i, side in enumerate(sides) for name in side}
        for src, i in side_of.items():
            for dst, j in side_of.items():
                if i != j:
                    self.clog(src, dst)

    def isolate(self, name: str) -> None:
        """Cut one process off."""
        self.partition([name], [n for n in self.processes if n != name])

    def reset(self, a: str, b: str) -> int:
        """Break the connections between two processes; how many there were."""
        transports = [
            transport
            for transport in self.process(a).transports
            if transport.peer is not None and transport.peer.process.name == b
        ]
        for transport in transports:
            assert transport.peer is not None
            for pipe in (transport.out, transport.peer.out):
                if pipe is not None:
                    pipe.cut(RESET)
        return len(transports)

    def heal(self) -> None:
        """Undo all that was done to links and clocks; wake who is paused."""
        for (src, dst), link in self._links.items():
            link.refused = False
            link.damage = 0.0
            if link.clogged:
                self.unclog(src, dst)
        for process in self.processes.values():
            if process.paused:
                process.resume()


def describe(detail: object) -> str:
    """Text of a line of the trace; bytes are shortened."""
    if isinstance(detail, bytes):
        return f"< {len(detail)} bytes {detail[:48].hex()}"
    return str(detail)
