"""Malformed and hostile packets, made from the table of packets.

`Valid` packets have arguments of the declared types, of random values: most are refused
for another reason than their form. Source: testing.md 6.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from random import Random  # noqa: TID251 - seeded
from typing import Annotated, Any, Union, get_args, get_origin

from msgpack import ExtType, packb

from neo.lib.protocol import (
    BY_CODE,
    INVALID_PARTITION,
    MAX_TID,
    RESPONSE,
    Packet,
    WireEnum,
)

IDS = [
    bytes(8), bytes(7) + b"\1", bytes(7) + b"\5", MAX_TID, b"\xff" * 8,
    b"\x80" + bytes(7), b"\x04" + bytes(7),
]  # fmt: skip
NUMBERS = [0, 1, 2, 3, 10, 1000, 0x7FFFFFFF, 0x80000000, INVALID_PARTITION - 1,
           INVALID_PARTITION]  # fmt: skip
NIDS = [0, 1, 2, 77, -1, -4096, -0x0FFFFFFF, -0x1FFFFFFF, -0x2FFFFFFF, -0x80000000,
        0x7FFFFFFF]  # fmt: skip
WRONG = [None, -1, 1 << 32, (1 << 64) - 1, -(1 << 63), True, 0.5, float("nan"), "text",
         b"", b"x" * 7, b"x" * 9, [], [[]], [None], {}, {b"x": None}, [1] * 5000,
         ExtType(4, b"\2"), ExtType(0, b"\0")]  # fmt: skip
CLUSTER = b"simulated"


def example(hint: Any, rng: Random) -> Any:
    """A value of a declared type."""
    if hint is Any:
        return rng.choice([None, 1, b"x", ()])
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        check = hint.__metadata__[0].text
        if "len(v) == 8" in check:
            return rng.choice(IDS)
        if "len(v) == 20" in check:
            return rng.choice([bytes(20), b"\1" * 20])
        if "v == 0 or v == 1" in check:
            return rng.randint(0, 1)
        if "65536" in check:
            return rng.choice([0, 1, 65535])
        if "-2147483648" in check:
            return rng.choice(NIDS)
        return rng.choice(NUMBERS if "4294967296" in check else [1, 2, 3, 1 << 62])
    if origin in (Union, types.UnionType):
        return example(rng.choice(args), rng)
    if origin is Sequence:
        return [example(args[0], rng) for _ in range(rng.choice([0, 1, 1, 3]))]
    if origin is Mapping:
        size = rng.choice([0, 1, 2])
        return {example(args[0], rng): example(args[1], rng) for _ in range(size)}
    if origin is tuple:
        return [example(arg, rng) for arg in args]
    if hint is None or hint is type(None):
        return None
    if issubclass(hint, WireEnum):
        return rng.choice(list(hint))
    return {
        bytes: rng.choice([b"", b"x", CLUSTER, b"127.0.0.1", b"\xff"]),
        bool: rng.random() < 0.5,
        int: rng.choice([-1, 0, 3, 1 << 40]),
        float: rng.choice([0.0, 1.8e9, 4e9, -1.0]),
    }[hint]


def valid(packet: Packet, rng: Random) -> list[Any]:
    """Arguments of the declared types."""
    return [example(hint, rng) for hint in packet.fields.values()]


def message(code: int, args: Any, msg_id: Any = 0) -> bytes:
    """Bytes of a packet, of any form."""
    data: bytes = packb([msg_id, code, args])
    return data


def nested(code: int, depth: int) -> bytes:
    """One argument, an array in an array in an array..."""
    return (
        packb([0, code])[:1].replace(b"\x92", b"\x93")
        + packb(0)
        + packb(code)
        + (b"\x91" * depth + b"\xc0")
    )


def malformed(packet: Packet, rng: Random) -> Iterator[tuple[str, bytes]]:
    """(what is wrong, bytes) of all that the type of a packet forbids."""
    code = packet.code
    good = valid(packet, rng)
    if good:
        yield "no arguments", message(code, [])
    yield "one too many", message(code, [*good, None])
    yield "not an array", message(code, {})
    yield "nested", nested(code, 1000)
    yield "huge", message(code, [*good, bytes(60_000)])
    for i, hint in enumerate(packet.fields.values()):
        for value in WRONG:
            if not fits(packet, i, value):
                args = [*good[:i], value, *good[i + 1 :]]
                yield f"argument {i} ({hint}) is {value!r:.20}", message(code, args)


def fits(packet: Packet, i: int, value: Any) -> bool:
    """Whether the value has the type of the i-th argument."""
    from neo.lib.codec import Decoder

    good = valid(packet, Random(0))
    args = [*good[:i], value, *good[i + 1 :]]
    try:
        ((_, _, decoded, _),) = Decoder(1 << 20).feed(message(packet.code, args))
    except ValueError:
        return False
    return packet.valid(decoded)


def framing() -> Iterator[tuple[str, bytes]]:
    """What is no packet at all."""
    ping = 2
    for value in (None, 0, -1, "x", b"x", [], {}, [1], [1, 2], [1, 2, [], 3], 1.5,
                  ExtType(4, b"\2"), ExtType(99, b"")):  # fmt: skip
        yield f"{value!r} instead of a packet", packb(value)
    for msg_id in (None, -1, "1", 1 << 32, 1.0, True, []):
        yield f"id {msg_id!r}", message(ping, [], msg_id)
    for code in (None, -1, "1", 0, 0x49, 0x7FFF, 0xFFFF, 1 << 20, 1.0, True, []):
        yield f"code {code!r}", message(code, [])
    unknown = [c ^ RESPONSE for c in BY_CODE if c ^ RESPONSE not in BY_CODE]
    for code in unknown:
        yield f"code {code:#x}", message(code, [])
    for header in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"):
        for length in (0xFFFFFFFF, 0x7FFFFFFF, 1 << 24):
            data = header + length.to_bytes(4, "big")
            yield f"{header.hex()} of {length} bytes", data
            yield f"{header.hex()} of {length} in a packet", b"\x93\0\x20\x93" + data
    yield "invalid byte", b"\xc1"
    yield "invalid UTF-8", b"\x93\0\1\x91\xa2\xff\xfe"
    yield "unhashable key", b"\x93\0\1\x91\x81\x80\0"
    yield "unknown enumeration", message(0x2A, [ExtType(1, b"\x63")])
    yield "enumeration of two bytes", message(0x2A, [ExtType(1, b"\0\0")])
    yield "unknown extension", message(0x2A, [ExtType(77, b"\0")])
