"""Identifiers, dates, addresses. Source: behaviour 0.1, operations 1.4."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from persistent.TimeStamp import TimeStamp

from neo.lib.exception import ConfigurationError
from neo.lib.util import (
    add64,
    add_tid,
    datetime_from_tid,
    format_address,
    p64,
    parse_address,
    tid_from_time,
    time_from_tid,
    u64,
)

seconds = st.floats(0, 4e9)


@given(st.integers(0, 2**64 - 1))
def test_identifiers(number: int) -> None:
    assert u64(p64(number)) == number
    assert len(p64(number)) == 8
    if number:
        assert add64(p64(number), -1) == p64(number - 1)


@given(seconds)
def test_tid_dates(date: float) -> None:
    """Within the resolution of a tid (14 ns) and of a float."""
    tid = tid_from_time(date)
    assert time_from_tid(tid) == pytest.approx(date, abs=1e-6)
    assert TimeStamp(tid).timeTime() == pytest.approx(date, abs=1e-6)
    assert datetime_from_tid(tid).timestamp() == pytest.approx(date, abs=2e-6)


@given(seconds, seconds)
def test_tids_are_in_order_of_dates(first: float, second: float) -> None:
    if first < second:
        assert tid_from_time(first) <= tid_from_time(second)


def test_known_tid() -> None:
    tid = bytes.fromhex("040d3088a9ea37a8")  # operations 4.3
    assert datetime_from_tid(tid) == datetime(
        2026, 11, 22, 15, 36, 39, 823807, tzinfo=UTC
    )
    assert datetime_from_tid(bytes(8)) == datetime(1900, 1, 1, tzinfo=UTC)


@given(st.binary(min_size=8, max_size=8))
def test_any_tid_has_a_date(tid: bytes) -> None:
    datetime_from_tid(tid)
    time_from_tid(tid)


def tid_of(*date: int, low: int = 0) -> bytes:
    tid = tid_from_time(datetime(*date, tzinfo=UTC).timestamp())  # type: ignore[misc,arg-type]
    return p64(u64(tid) & ~0xFFFFFFFF | low)


LAST = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2026, 1, 1, 0, 0), (2026, 1, 1, 0, 1)),
        ((2026, 1, 1, 23, 59), (2026, 1, 2, 0, 0)),
        ((2026, 1, 31, 23, 59), (2026, 2, 1, 0, 0)),
        ((2026, 2, 28, 23, 59), (2026, 3, 1, 0, 0)),  # there is no 30 February
        ((2024, 2, 28, 23, 59), (2024, 2, 29, 0, 0)),
        ((2026, 12, 31, 23, 59), (2027, 1, 1, 0, 0)),
    ],
)
def test_add_tid_carries_a_date(
    before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    tid = tid_of(*before, low=LAST)
    assert add_tid(tid, 1) == tid_of(*after)
    assert add_tid(tid, 5) == tid_of(*after, low=4)
    assert add_tid(tid_of(*before), 1) == tid_of(*before, low=1)
    assert add_tid(tid_of(*after), -1) == tid


@given(seconds, st.integers(1, 1 << 34))
def test_add_tid_increases(date: float, offset: int) -> None:
    tid = tid_from_time(date)
    assert add_tid(tid, offset) > tid
    later = time_from_tid(add_tid(tid, offset))
    assert later - date == pytest.approx(offset * 60 / 2**32, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("h:1", ("h", 1)),
        ("127.0.0.1:65535", ("127.0.0.1", 65535)),
        ("[::1]:80", ("::1", 80)),
        ("[::1]", ("::1", 9)),
        ("::1", ("::1", 9)),
        ("fe80::1:2", ("fe80::1:2", 9)),
        ("h", ("h", 9)),
        ("h:", ("h", 9)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text, 9) == address
    assert parse_address(format_address(address)) == address


@pytest.mark.parametrize(
    "text",
    ["", ":1", "h:x", "h:-1", "h:65536", "a:1,b:2", "a:1/b:2", "[::1", "[::1]x", "h:²"],
)
def test_invalid_addresses(text: str) -> None:
    with pytest.raises(ConfigurationError, match="invalid address"):
        parse_address(text, 9)


def test_missing_port() -> None:
    with pytest.raises(ConfigurationError, match="port is missing"):
        parse_address("host")
