"""The harness itself: that it measures, not what."""

from __future__ import annotations

from xml.dom.minidom import parseString

import pytest

from . import report
from .limits import limits
from .runner import Failed, execute, measure, medians, ratios
from .workloads import ALONE, TINY


def test_all_workloads_run() -> None:
    """On a storage in the process of the client, and on a cluster."""
    said: list[str] = []
    workloads = ["commit", "prefetch", "past", "copy", "committers", "visible"]
    raw, absent = measure(["FileStorage", "NEO"], workloads, TINY, 1, said.append)
    assert absent == {}
    assert said == ["repetition 1 of 1"]
    assert list(raw) == workloads
    table = medians(raw)
    assert set(table["commit commits_per_s"]) == {"FileStorage", "NEO"}
    assert set(table["visible seen_ms"]) == {"NEO"}
    assert table["committers cpu_storage_2_us"]["NEO"] > 0
    found = ratios(table, "FileStorage")
    assert all(value > 0 for row in found.values() for value in row.values())
    assert found["commit p50_ms"]["FileStorage"] == 1
    picture = parseString(report.svg(found, ["FileStorage", "NEO"], "a & b"))
    assert len(picture.getElementsByTagName("text")) > len(found)
    assert report.markdown(table, ["NEO"]).count("\n") == len(table) + 1


def test_failures_are_told() -> None:
    """A peer that can't be opened; a workload that fails."""

    class Broken:
        name = "broken"
        alone = True

        def __init__(self) -> None:
            self.pids: dict[str, list[int]] = {}

        def open(self) -> None:
            raise OSError("no such server")

    with pytest.raises(Failed, match="no such server"):
        execute(next(iter(ALONE)), Broken(), TINY, 0)  # type: ignore[arg-type]


def test_ratios_and_losses() -> None:
    """More is better, also where less is measured."""
    found = ratios({"a x_per_s": {"ZEO": 2, "NEO": 3}, "a y_ms": {"ZEO": 2, "NEO": 4}})
    assert found == {
        "a x_per_s": {"ZEO": 1, "NEO": 1.5},
        "a y_ms": {"ZEO": 1, "NEO": 0.5},
    }
    stored = {"a x_per_s": 1.9, "a y_ms": 0.7, "a z_ms": 1.0}
    assert report.losses(found, stored, "NEO", 0.25) == [
        "a y_ms: 0.5 of ZEO, it was 0.7",
        "a z_ms: not measured, it was 1",
    ]


def test_limits() -> None:
    """The machine's own figures."""
    assert all(0 < value < 1e6 for value in limits(number=3).values())
