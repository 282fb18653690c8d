"""Streams that are cut anywhere, and streams that lie about their lengths."""

from __future__ import annotations

import tracemalloc
from hashlib import sha1
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgpack import ExtType, packb

from neo.lib.codec import NO_ID, Decoder, Malformed, find_binary, pack
from neo.lib.protocol import ENUMS, Error, ErrorCode, NodeType
from tests.fakes import packet_vectors

STREAM = [v["data"] for v in packet_vectors()]
LIMIT = 1 << 20

arguments = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=70)
    | st.sampled_from(list(ENUMS.values())),
    lambda children: (
        st.lists(children, max_size=5).map(tuple)
        | st.dictionaries(st.binary(max_size=8) | st.integers(0, 99), children)
    ),
    max_leaves=20,
)
messages = st.tuples(
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFFFF),
    st.lists(arguments, max_size=6).map(tuple),
)


def decoded(decoder: Decoder, data: bytes) -> list[tuple[int, int, tuple]]:
    """What `data` completes; the bytes of each, if they are told, are right."""
    found = []
    for *message, whole in decoder.feed(data):
        found.append(tuple(message))
        if whole is not None:
            assert list(Decoder(LIMIT).feed(whole)) == [(*message, whole)]
    return found


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in pairwise(bounds)]


@given(
    st.lists(st.sampled_from([0, 5, 70_000, 200_000]), min_size=1, max_size=6),
    st.lists(st.integers(0, 1 << 20), max_size=20),
)
def test_big_binaries_are_hashed_as_they_come(
    sizes: list[int], places: list[int]
) -> None:
    decoder = Decoder(LIMIT)
    values = [bytes((n,)) * size for n, size in enumerate(sizes)]
    sent = [(n, 0x20, (b"oid", None, value, 3)) for n, value in enumerate(values)]
    received = []
    for piece in cut(b"".join(map(pack, sent)), places):
        for msg_id, _, args, _ in decoder.feed(piece):
            received.append(msg_id)
            if decoder.hashed is not None and decoder.hashed[0] is args[2]:
                assert decoder.hashed[1] == sha1(values[msg_id]).digest()
    assert received == list(range(len(sizes)))


def test_hash_of_a_big_binary() -> None:
    """It is there if it came in pieces, and belongs to nothing else."""
    decoder = Decoder(LIMIT)
    value = b"v" * 200_000
    hashed = value, sha1(value).digest()
    data = pack((1, 0x20, (b"oid", value)))
    for piece in cut(data, [1 << 16, 1 << 17]):
        found = list(decoder.feed(piece))
    assert decoder.hashed == hashed
    assert decoder.hashed[0] is found[0][2][1]
    # The first of two.
    twice = 1, 0x20, (None, value, b"w" * 200_000)
    for piece in cut(pack(twice), [1 << 16]):
        found = list(decoder.feed(piece))
    assert found[0][:3] == twice
    assert decoder.hashed == hashed
    # What is decoded in another way has none.
    slow = 1, 0x20, (b"x" * 200_000, (None,) * 5000, 7)
    for piece in cut(pack(slow), [1 << 16, 199_000, 201_000]):
        found = list(decoder.feed(piece))
    assert found[0][:3] == slow
    assert decoder.hashed == hashed
    for piece in cut(pack((1, 0x20, (b"x" * 200_000,))), [60_000]):
        list(decoder.feed(piece))
    assert decoder.hashed == (b"x" * 200_000, sha1(b"x" * 200_000).digest())


@pytest.mark.parametrize("tail", [b"\xc1", b"\x91" * 2000, b"\xc0\xc0\x01"])
def test_what_follows_a_big_binary_is_malformed(tail: bytes) -> None:
    data = pack((1, 0x20, (b"v" * 200_000, None)))[:-1]
    decoder = Decoder(LIMIT)
    list(decoder.feed(data[:100_000]))
    with pytest.raises(Malformed):
        list(decoder.feed(data[100_000:] + tail))


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ((b"o" * 8, None, {1: (2, b"")}, b"v" * 70_000, 5), (3, 26, 70_026)),
        ((b"v" * 300,), None),  # short: its length takes 2 bytes
        ((b"u" * 200, b"v" * 70_000), None),  # begins too late
        (("t" * 70_000,), None),
        (([b"v" * 70_000],), None),  # no argument itself
        ((1, 2, 3), None),
    ],
)
def test_find_binary(args: tuple, found: tuple[int, int, int] | None) -> None:
    data = pack((7, 0x20, args))
    assert find_binary(data[:1000]) == found
    if found is not None:
        _, start, end = found
        assert data[start:end] == b"v" * 70_000
        assert find_binary(data[: start - 1]) is None
    assert find_binary(b"") is find_binary(b"\xc1" * 200) is None


@given(st.lists(messages, max_size=8), st.lists(st.integers(0, 1 << 20), max_size=20))
def test_any_fragmentation(sent: list[tuple], places: list[int]) -> None:
    decoder = Decoder(LIMIT)
    received = []
    for piece in cut(b"".join(map(pack, sent)), places):
        received += decoded(decoder, piece)
    assert received == sent
    assert decoder._size == 0


@given(st.lists(st.integers(0, 1 << 20), max_size=60))
def test_recorded_stream_in_any_fragmentation(places: list[int]) -> None:
    decoder = Decoder(LIMIT)
    received = []
    for piece in cut(b"".join(STREAM), places):
        received += decoded(decoder, piece)
    assert [pack(m) for m in received] == STREAM


@given(
    st.lists(st.integers(0, 1 << 20), max_size=30),
    st.lists(st.sampled_from([3, 4096, 4097, 5000, 20000]), max_size=6),
)
def test_big_arrays_and_maps(places: list[int], sizes: list[int]) -> None:
    """Those that are decoded the careful way, among others, are decoded alike."""
    sent = [
        (i, 1, (tuple(range(n)), {b"%d" % k: k for k in range(n)}))
        for i, n in enumerate(sizes)
    ]
    decoder = Decoder(LIMIT)
    received = []
    for piece in cut(b"".join(map(pack, sent)), places):
        received += decoded(decoder, piece)
    assert received == sent
    assert decoder._size == 0


def test_other_encodings_are_accepted() -> None:
    """What no encoder of ours makes, but the format allows."""
    long_form = b"\xdd\0\0\0\3\xcf" + bytes(7) + b"\5\xd1\0\2\xdc\0\1\xc6\0\0\0\1x"
    assert list(Decoder(LIMIT).feed(long_form)) == [(5, 2, (b"x",), long_form)]
    assert decoded(Decoder(LIMIT), b"\x93\0\1\x92\xca\0\0\0\0\xd4\4\2") == [
        (0, 1, (0.0, NodeType.CLIENT))
    ]


@pytest.mark.parametrize("header", [b"\xdd", b"\xdf", b"\xc6", b"\xc9", b"\xdb"])
@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF, 0x10000000, 5000])
@pytest.mark.parametrize("prefix", [b"", b"\x93\0\1", b"\x93\0\1\x91", b"\x93\0\1\x81"])
def test_declared_lengths_cost_nothing(
    header: bytes, length: int, prefix: bytes
) -> None:
    decoder = Decoder(1 << 16)
    data = prefix + header + length.to_bytes(4, "big") + b"\0"
    tracemalloc.start()
    try:
        list(decoder.feed(data))
    except Malformed:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 64 << 10


def test_what_a_connection_costs() -> None:
    """A cluster has thousands of idle connections."""
    tracemalloc.start()
    try:
        decoders = [Decoder(1 << 27) for _ in range(100)]
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < len(decoders) * (64 << 10)  # 40 KiB are the stack of msgpack


@pytest.mark.parametrize("piece", [10, 100, 4096, 65536])
def test_what_an_endless_message_costs(piece: int) -> None:
    """An array of the greatest length, whose elements come for ever."""
    limit = 1 << 17
    decoder = Decoder(limit)

    def feed() -> None:
        list(decoder.feed(b"\x93\0\1\xdd\xff\xff\xff\xff"))
        for _ in range(limit // piece + 2):
            list(decoder.feed(b"\xc0" * piece))

    tracemalloc.start()
    try:
        with pytest.raises(Malformed, match="larger than"):
            feed()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * limit


def test_nesting_is_bounded() -> None:
    with pytest.raises(Malformed):
        list(Decoder(LIMIT).feed(b"\x93\0\1" + b"\x91" * 100_000 + b"\x90"))
    with pytest.raises(Malformed):
        list(Decoder(LIMIT).feed(b"\x93\0\1" + b"\x81\0" * 100_000 + b"\x90"))


def test_nested_arrays_multiply_no_memory() -> None:
    """Each of many headers declares a lot: none is allocated before its bytes come."""
    decoder = Decoder(1 << 16)
    data = b"\x93\0\1" + b"\xdc\x0f\xff" * 500
    tracemalloc.start()
    try:
        list(decoder.feed(data))
    except Malformed:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 32 << 20


def test_limit_is_about_one_message() -> None:
    """Many small ones in one piece are no big one."""
    decoder = Decoder(1000)
    piece = b"".join(pack((i, 1, (bytes(90),))) for i in range(100))
    assert len(list(decoder.feed(piece))) == 100
    assert len(list(decoder.feed(pack((0, 1, (bytes(900),)))))) == 1
    assert list(decoder.feed(pack((0, 1, (bytes(980),)))[:-1])) == []
    decoder = Decoder(1000)
    with pytest.raises(Malformed, match="larger than 1000 bytes"):
        list(decoder.feed(pack((0, 1, (bytes(1100),)))[:-1]))


def test_what_was_decoded_is_forgotten() -> None:
    """Although the stream is never cut where a message ends."""
    stream = b"".join(pack((i, 1, (bytes(90),))) for i in range(1000))
    decoder = Decoder(LIMIT)
    count, whole = 0, 0
    for start in range(0, len(stream), 250):
        for *_, data in decoder.feed(stream[start : start + 250]):
            count += 1
            whole += data is not None
        assert sum(map(len, decoder._chunks)) <= 2 * 250
    assert (count, decoder.incomplete) == (1000, 0)
    assert 500 < whole < 700  # the others came in pieces


def test_complete_big_message_passes_a_raised_limit() -> None:
    decoder = Decoder(1 << 16)
    decoder.limit = 256 << 20
    message = (1, 2, (bytes(3 << 20),))
    data = pack(message)
    received = []
    for start in range(0, len(data), 65536):
        received += decoded(decoder, data[start : start + 65536])
    assert received == [message]


@given(st.binary(max_size=300))
def test_noise(data: bytes) -> None:
    """Messages, or Malformed, and nothing else."""
    decoder = Decoder(LIMIT)
    try:
        for msg_id, code, args, _ in decoder.feed(data):
            assert 0 <= msg_id <= 0xFFFFFFFF or code == Error.code
            assert isinstance(code, int)
            assert isinstance(args, tuple)
    except Malformed:
        pass


@pytest.mark.parametrize(
    "value",
    [None, 0, b"x", "x", [], {}, [1], [1, 2], [1, 2, [], 4], [None, 1, []],
     ["1", 1, []], [1, "1", []], [1, None, []], [1, 1, None], [1, 1, {}], [1, 1, b""],
     [-1, 1, []], [1 << 32, 1, []], [True, 1, []], [1, True, []], [1.0, 1, []],
     ExtType(4, b"\2"), ExtType(99, b"")],
)  # fmt: skip
def test_not_a_message(value: object) -> None:
    with pytest.raises(Malformed):
        list(Decoder(LIMIT).feed(packb(value)))


@pytest.mark.parametrize("big", [False, True])
def test_error_without_id(big: bool) -> None:
    """Of a peer that cannot tell which answer it did not expect."""
    args = (int(ErrorCode.PROTOCOL_ERROR), b"why?", *([(0,) * 5000] if big else []))
    data = packb([None, Error.code, args])
    assert list(Decoder(LIMIT).feed(data)) == [(NO_ID, Error.code, args, data)]
