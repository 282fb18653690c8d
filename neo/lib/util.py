"""Identifiers, dates, addresses, values: small pure functions on them."""

from __future__ import annotations

import struct
from calendar import timegm
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from .exception import ConfigurationError

Address = tuple[str, int]

_U64 = struct.Struct(">Q")
u64_tuple = _U64.unpack
p64 = _U64.pack

MAX_PORT = 65535


def u64(value: bytes) -> int:
    """Integer of an 8-byte identifier."""
    number: int = u64_tuple(value)[0]
    return number


def add64(value: bytes, offset: int) -> bytes:
    """`value + offset`, as an 8-byte identifier."""
    return p64(u64(value) + offset)


# --- transaction ids --------------------------------------------------------

_FRACTIONS = 1 << 32  # the low half of a tid divides one minute


def tid_from_time(seconds: float) -> bytes:
    """Tid of a UNIX date. Source: protocol.md 3.5."""
    minute, second = divmod(seconds, 60)
    date = datetime.fromtimestamp(minute * 60, UTC)
    return _pack_tid(date, min(int(second * _FRACTIONS / 60), _FRACTIONS - 1))


def datetime_from_tid(tid: bytes) -> datetime:
    """UTC date of a tid."""
    high, low = divmod(u64(tid), _FRACTIONS)
    return _date_of(high) + timedelta(seconds=low * 60 / _FRACTIONS)


def time_from_tid(tid: bytes) -> float:
    """UNIX date of a tid."""
    high, low = divmod(u64(tid), _FRACTIONS)
    return timegm(_date_of(high).timetuple()) + low * 60 / _FRACTIONS


def add_tid(tid: bytes, offset: int) -> bytes:
    """`tid + offset`; what overflows the minute is carried into a valid next minute."""
    high, low = divmod(u64(tid), _FRACTIONS)
    carry, low = divmod(low + offset, _FRACTIONS)
    if not carry:
        return p64(high * _FRACTIONS + low)
    return _pack_tid(_date_of(high) + timedelta(minutes=carry), low)


def _pack_tid(date: datetime, low: int) -> bytes:
    days = ((date.year - 1900) * 12 + date.month - 1) * 31 + date.day - 1
    return p64(((days * 24 + date.hour) * 60 + date.minute) * _FRACTIONS + low)


def _date_of(high: int) -> datetime:
    """Date of the high half of a tid; impossible days count on into the next month."""
    high, minute = divmod(high, 60)
    high, hour = divmod(high, 24)
    high, day = divmod(high, 31)
    year, month = divmod(high, 12)
    first = datetime(min(1900 + year, 9998), month + 1, 1, hour, minute, tzinfo=UTC)
    return first + timedelta(days=day)


# --- values -------------------------------------------------------------------


class Pieces(NamedTuple):
    """A binary of `size` bytes (more than 2^16) that is read while it is sent."""

    size: int
    parts: Generator[bytes, None, None]


# --- addresses ----------------------------------------------------------------


def parse_address(text: str, default_port: int | None = None) -> Address:
    """(host, port) of `host:port`, `[ipv6]:port`, `host` or a bare IPv6; no look-up.

    Raises ConfigurationError if the port is missing without default, or invalid.
    """
    host, port = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ConfigurationError(f"invalid address {text!r}: expected [ipv6]:port")
        port = rest[1:]
    elif text.count(":") == 1:
        host, port = text.split(":")
    if not host or "," in host or "/" in host:
        raise ConfigurationError(
            f"invalid address {text!r}: expected host:port"
            " (lists are separated by spaces)"
        )
    if not port:
        if default_port is None:
            raise ConfigurationError(f"invalid address {text!r}: the port is missing")
        return host, default_port
    if not (port.isascii() and port.isdigit() and int(port) <= MAX_PORT):
        raise ConfigurationError(f"invalid address {text!r}: bad port {port!r}")
    return host, int(port)


def format_address(address: Address) -> str:
    """Inverse of `parse_address`."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
