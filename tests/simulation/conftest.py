"""Options of simulations: which seeds run."""

from __future__ import annotations

import datetime
import hashlib
import os
import subprocess
from pathlib import Path

import pytest

SEEDS = int(os.environ.get("NEO_SEEDS", 100))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simulation")
    group.addoption("--seeds", type=int, default=SEEDS, help="how many random seeds")
    group.addoption("--seed", action="append", help="repeat this seed (repeatable)")


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "random_seed" in metafunc.fixturenames:
        metafunc.parametrize("random_seed", drawn_seeds(metafunc.config))


def pytest_report_header(config: pytest.Config) -> str:
    return f"simulation: {len(drawn_seeds(config))} seeds of {base_seed()}"
