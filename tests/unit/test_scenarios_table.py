"""`docs/scenarios.rst` names tests that exist, for all scenarios."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TABLE = (TESTS.parent / "docs" / "scenarios.rst").read_text(encoding="utf-8")


def test_tests_exist() -> None:
    """Each one, in the file where it is said to be."""
    references = re.findall(r"``(\w+/\w+\.py)(?:::(\w+))?``", TABLE)
    assert len(references) > 200
    missing = [
        (file, name)
        for file, name in references
        if not (TESTS / file).exists()
        or f"def {name}(" not in (TESTS / file).read_text(encoding="utf-8") + "def ("
    ]
    assert missing == []


def test_all_numbers_are_there() -> None:
    """Scenarios 1 to 141 and 171 to 180, crashes 1 to 28; each has a test or a why."""
    scenarios, crashes = TABLE.split("\nLimits and crashes of the storage format\n")
    for text, numbers in (
        (scenarios, [*range(1, 142), *range(171, 181)]),
        (crashes, [*range(1, 29)]),
    ):
        entries = re.findall(r"(?m)^(\d+)\. .+\n\n((?:   - .+\n)+)", text + "\n")
        assert [int(number) for number, _ in entries] == numbers
