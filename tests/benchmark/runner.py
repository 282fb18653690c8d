"""Runs workloads on peers in turn, so that the noise of the machine hits all alike."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from .peers import BASELINE, Peer, started
from .workloads import (
    ALONE,
    TOGETHER,
    Client,
    Metrics,
    Share,
    Sizes,
    percentile,
    setup,
    teller,
    watcher,
)

TIMEOUT = 120.0  # seconds that a workload may take
fork = multiprocessing.get_context("fork")

#: workload -> peer -> metrics of each repetition
Raw = dict[str, dict[str, list[Metrics]]]
#: "workload metric" -> peer -> value
Table = dict[str, dict[str, float]]


class Failed(Exception):
    """A workload can't be run on a peer; the text is its traceback."""


class Process:
    """A client in a process of its own."""

    def __init__(
        self,
        peer: Peer,
        function: Callable[[Client], Any],
        sizes: Sizes,
        repetition: int,
        index: int,
    ) -> None:
        self.conn, theirs = fork.Pipe()
        self.process = fork.Process(
            target=_run, args=(theirs, peer, function, sizes, repetition, index)
        )
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        """What it says: None when it is ready, then (result, CPU seconds)."""
        if not self.conn.poll(TIMEOUT):
            raise Failed("timeout")
        try:
            said = self.conn.recv()
        except EOFError:
            raise Failed("it died") from None
        if isinstance(said, str):
            raise Failed(said)
        return said

    def end(self) -> None:
        self.conn.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _run(
    conn: Connection,
    peer: Peer,
    function: Callable[[Client], Any],
    sizes: Sizes,
    repetition: int,
    index: int,
) -> None:
    began = 0.0

    def ready() -> None:
        nonlocal began
        conn.send(None)
        conn.recv()
        began = time.process_time()

    try:
        client = Client(peer.open, sizes, repetition, index, ready)
        result = function(client)
        conn.send((result, time.process_time() - began))
        conn.recv()  # the end of all
        client.close()
    except EOFError:
        pass  # nobody listens any more
    except BaseException:  # noqa: BLE001 told to the parent
        conn.send(traceback.format_exc())
    finally:
        sys.stdout.flush()
        os._exit(0)  # nothing of the parent's is to be cleaned up here


def cpu(pids: Sequence[int]) -> float:
    """Seconds of CPU that processes have used, with all their threads."""
    return sum(
        int(path.read_text().split()[0]) / 1e9
        for pid in pids
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat")
    )


def run(
    peer: Peer, functions: Sequence[Callable[[Client], Any]], sizes: Sizes, rep: int
) -> tuple[list[Any], dict[str, float]]:
    """Results of clients that start together, and CPU seconds by role."""
    processes: list[Process] = []
    try:
        for index, function in enumerate(functions):
            processes.append(Process(peer, function, sizes, rep, index))
        for process in processes:
            process.receive()
        before = {role: cpu(pids) for role, pids in peer.pids.items()}
        for process in processes:
            process.conn.send(None)
        said = [process.receive() for process in processes]
        spent = {role: cpu(pids) - before[role] for role, pids in peer.pids.items()}
        for process in processes:
            process.conn.send(None)
    finally:
        for process in processes:
            process.end()
    spent["client"] = sum(seconds for _, seconds in said)
    return [result for result, _ in said], spent


def per_operation(spent: dict[str, float], ops: int, suffix: str = "") -> Metrics:
    """Microseconds of CPU for each operation, by role."""
    return {
        f"cpu_{role}{suffix}_us": seconds / ops * 1e6
        for role, seconds in sorted(spent.items())
    }


def shares(shares: Sequence[Share], unit: str, suffix: str) -> tuple[Metrics, int]:
    """What several processes did together."""
    latencies = [latency for share in shares for latency in share.latencies]
    number = len(latencies)
    start = min(share.start for share in shares)
    metrics = {
        f"{unit}{suffix}": number / (max(share.end for share in shares) - start),
        f"p99{suffix}_ms": percentile(latencies, 0.99) * 1e3,
    }
    retries = sum(share.retries for share in shares)
    if retries:
        metrics[f"retries{suffix}"] = retries / number
    return metrics, number


def execute(name: str, peer: Peer, sizes: Sizes, rep: int) -> Metrics:
    """One run of a workload on a peer; {} if it is not for this one."""
    if name == "visible":
        if peer.alone:
            return {}
        (told, seen), _ = run(peer, (teller, watcher), sizes, rep)
        times = dict(seen)
        delays = [times[number] - at for number, at in told if number in times]
        return {"seen_ms": percentile(delays, 0.5) * 1e3}
    if name in ALONE:
        ((metrics, ops),), spent = run(peer, (ALONE[name],), sizes, rep)
        return {**metrics, **(per_operation(spent, ops) if ops else {})}
    function, unit, number = TOGETHER[name]
    result: Metrics = {}
    for processes in sizes.processes if number is None else (number,):
        if processes > 1 and peer.alone:
            continue
        suffix = "" if number is not None else f"_{processes}"
        done, spent = run(peer, (function,) * processes, sizes, rep)
        metrics, ops = shares(done, unit, suffix)
        result |= {**metrics, **per_operation(spent, ops, suffix)}
    return result


def measure(
    peers: list[str],
    workloads: Sequence[str],
    sizes: Sizes,
    repetitions: int,
    say: Callable[[str], object] = print,
) -> tuple[Raw, dict[str, str]]:
    """Everything, interleaved; and why some peers are missing."""
    raw: Raw = {}
    with started(peers) as (present, absent):
        for peer in list(present):
            try:
                run(peer, (setup,), sizes, 0)
            except Failed as error:
                absent[peer.name] = str(error).strip().rsplit("\n", 1)[-1]
                present.remove(peer)
        for name, why in absent.items():
            say(f"without {name}: {why}")
        for repetition in range(repetitions):
            for number, name in enumerate(workloads):
                first = (repetition + number) % len(present)
                for peer in present[first:] + present[:first]:
                    try:
                        metrics = execute(name, peer, sizes, repetition)
                    except Failed as error:
                        say(f"{name} fails on {peer.name}: {error}")
                        continue
                    if metrics:
                        raw.setdefault(name, {}).setdefault(peer.name, []).append(
                            metrics
                        )
            say(f"repetition {repetition + 1} of {repetitions}")
    return raw, absent


def medians(raw: Raw) -> Table:
    """The median of each metric."""
    table: Table = {}
    for workload, by_peer in raw.items():
        for peer, runs in by_peer.items():
            for metric in runs[0]:
                values = [metrics[metric] for metrics in runs if metric in metrics]
                row = table.setdefault(f"{workload} {metric}", {})
                row[peer] = median(values)
    return table


def ratios(table: Table, baseline: str = BASELINE) -> Table:
    """How many times better than the baseline: more is better, also for times."""
    result: Table = {}
    for metric, row in table.items():
        if baseline not in row or " cpu_" in metric or "retries" in metric:
            continue
        base = row[baseline]
        is_time = metric.endswith(("_ms", "_us"))
        result[metric] = {
            peer: (base / value if is_time else value / base)
            for peer, value in row.items()
            if value and base
        }
    return result
