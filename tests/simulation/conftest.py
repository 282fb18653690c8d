"""Options of simulations: which seeds run, and what is told of them."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# Of random runs; NEO_SEEDS is for all simulations, those of ZODB's suites too.
SEEDS = int(os.environ.get("NEO_RUNS") or os.environ.get("NEO_SEEDS") or 100)
KEPT = Path(__file__).with_name("seeds.txt")
# What all runs of this process reached: see `Simulation.sometimes`.
MARKS: Counter[str] = Counter()
# The same of xdist's workers.
WORKERS: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simulation")
    group.addoption("--seeds", type=int, default=SEEDS, help="how many random seeds")
    group.addoption("--seed", action="append", help="repeat this seed (repeatable)")
    group.addoption("--options", default="{}", help="change options of seeds: JSON")
    group.addoption("--trace-file", metavar="FILE", help="write all that happens")
    group.addoption(
        "--shrink", action="store_true", help="search for a smaller run that fails"
    )


def base_seed() -> str:
    """Commit and day: each run explores new ground, and can be repeated."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    day = datetime.datetime.now(datetime.UTC).date()
    return f"{commit}:{day}"


def drawn_seeds(config: pytest.Config) -> list[int]:
    """The seeds to run: those asked for, else some drawn from `base_seed()`."""
    # This file may be loaded too late for its options to exist.
    asked = config.getoption("--seed", None)
    if asked:
        return [int(seed) for seed in asked]
    base = base_seed()
    return [
        int.from_bytes(hashlib.sha256(f"{base}:{i}".encode()).digest()[:6], "big")
        for i in range(config.getoption("--seeds", SEEDS))
    ]


def kept_seeds() -> list[tuple[int, dict[str, Any], str]]:
    """(seed, options, what it was) of seeds.txt."""
    kept = []
    for line in KEPT.read_text().splitlines():
        text, _, comment = line.partition("#")
        if text.strip():
            seed, _, options = text.strip().partition(" ")
            kept.append((int(seed), json.loads(options or "{}"), comment.strip()))
    return kept


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "random_seed" in metafunc.fixturenames:
        metafunc.parametrize("random_seed", drawn_seeds(metafunc.config))
    if "kept_seed" in metafunc.fixturenames:
        kept = kept_seeds()
        ids = [str(seed) for seed, _, _ in kept]
        metafunc.parametrize("kept_seed", kept, ids=ids)


def pytest_report_header(config: pytest.Config) -> str:
    return f"simulation: {len(drawn_seeds(config))} seeds of {base_seed()}"


@pytest.fixture
def marks() -> Counter[str]:
    """Where to add the marks of a run."""
    return MARKS


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["marks"] = dict(MARKS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    WORKERS.update(getattr(node, "workeroutput", {}).get("marks", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found = MARKS + WORKERS
    if found:
        terminalreporter.section("simulation: states reached")
        for name, number in sorted(found.items()):
            terminalreporter.write_line(f"{number:8} {name}")
