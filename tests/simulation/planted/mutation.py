"""Does the simulator find bugs? Plant each, and run seeds until one fails.

    python -m tests.simulation.planted.mutation [--seeds 1000] [--jobs 2] [name...]

Each bug lives in a process of its own. Exit status 1 if one is not found.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from tests.simulation.planted.bugs import BUGS
from tests.simulation.scenario import Run


class Found(NamedTuple):
    """`seeds`: how many it took, None if the bug was not found; `how`: what failed."""

    seeds: int | None
    how: str


def search(number: int, first: int, seeds: int) -> Found:
    """Run seeds until the bug is found."""
    bug = BUGS[number]
    with bug.planted():
        for i in range(seeds):
            try:
                Run(first + i).execute()
            except Exception as error:  # noqa: BLE001 - that is what we look for
                return Found(i + 1, str(error).partition("\n")[0])
    return Found(None, "")


def say(line: str) -> None:
    """Tell progress."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(args)
    numbers = [
        i
        for i, bug in enumerate(BUGS)
        if not options.names or any(name in bug.name for name in options.names)
    ]
    counts: list[int] = []
    with ProcessPoolExecutor(options.jobs, max_tasks_per_child=1) as pool:
        runs = [
            (pool.submit(search, i, options.first, options.seeds), BUGS[i])
            for i in numbers
        ]
        for run, bug in runs:
            found = run.result()
            if found.seeds is not None:
                counts.append(found.seeds)
            seeds = "NOT" if found.seeds is None else str(found.seeds)
            say(f"{seeds:>5} {bug.name}: {found.how[:100]}")
    if counts:
        median, most = statistics.median(counts), max(counts)
        say(
            f"found {len(counts)} of {len(runs)}; seeds: median {median:g}, most {most}"
        )
    return len(counts) < len(runs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
