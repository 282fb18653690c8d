"""What all tests share."""

from __future__ import annotations

import multiprocessing.util
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests import mariadb as mariadb_tests
from tests.mariadb import mariadb

__all__ = ["mariadb"]

# A slow or busy machine is no failure. Loaded in CI too, where Hypothesis would choose
# a profile that repeats the same examples: each run explores new ground, and prints
# what repeats a failure.
settings.register_profile(
    "neo",
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("neo")


# Of the processes that tests start. Now, because some suites replace the folder for
# temporary files during a test; here, because no such process imports this module: what
# it made would stay.
multiprocessing.util.get_temp_dir()  # type: ignore[attr-defined]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In the background of a shell; what the tests start must still obey Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Commands of daemons, called in this process, take its signals: give them back."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests were left out, and how to get them."""
    reasons = {
        reason
        for report in terminalreporter.stats.get("skipped", [])
        if mariadb_tests.HOW_TO in (reason := str(report.longrepr[2]))
    }
    for reason in sorted(reasons):
        reason = reason.removeprefix("Skipped: ")
        terminalreporter.write_line(f"LEFT OUT: {reason}", yellow=True)
