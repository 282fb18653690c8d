"""Compression of object data. Source: storage-format 1.2."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from hashlib import sha1, shake_128

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.lib import compress as module
from neo.lib.compress import RAW, ZLIB, compress, decompress, parse_option
from neo.lib.exception import ConfigurationError

NOISE = shake_128(b"noise").digest(100_000)


@pytest.fixture(
    autouse=True,
    scope="module",
    params=["zlib"] if module.isal is None else ["zlib", "isal"],
)
def library(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both libraries, where the second one is installed."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "zlib":
            patch.setattr(module, "isal", None)
            patch.setattr(module, "inflate", zlib)
        yield request.param


@pytest.mark.parametrize(
    ("option", "level"),
    [
        (None, -1),
        (True, -1),
        (False, None),
        ("zlib", -1),
        ("true", -1),
        ("False", None),
        (" zlib=1 ", 1),
        ("zlib=9", 9),
        ((0, None), -1),
        ((0, 4), 4),
    ],
)
def test_option(option: object, level: int | None) -> None:
    assert parse_option(option) == level


@pytest.mark.parametrize(
    "option", ["", "zlib=0", "zlib=10", "bz2", (1, 1), (0, 10), (0,), 5, b"zlib"]
)
def test_invalid_option(option: object) -> None:
    with pytest.raises(ConfigurationError, match="expected true, false"):
        parse_option(option)


@given(st.binary(max_size=300), st.integers(0, 40), st.sampled_from([None, -1, 1, 9]))
def test_round_trip(chunk: bytes, times: int, level: int | None) -> None:
    data = chunk * times
    compression, checksum, stored = compress(data, level)
    assert checksum == sha1(stored).digest()
    assert decompress(compression, stored) == data
    if compression == ZLIB:
        assert len(stored) < len(data)
        assert zlib.decompress(stored) == data  # as neoppod does
    else:
        assert stored is data


@pytest.mark.parametrize("size", [0, 1, 2, 11, 255, 256, 257, 4095, 4096, 40_000])
def test_small_tables_compress_as_well(size: int) -> None:
    """A window and a hash table of the size of the data: cheaper, never worse."""
    data = (b"Some text, some more text, and numbers: %d." * 1000 % ((42,) * 1000))[
        :size
    ]
    _, _, stored = compress(data, 6)
    assert len(stored) <= min(len(data), len(zlib.compress(data)))


def test_only_if_strictly_shorter() -> None:
    for size in range(40):
        data = bytes(size)
        compression, _, stored = compress(data, -1)
        assert (compression == ZLIB) == (len(stored) < size)
        assert len(stored) <= size
    assert compress(NOISE[:5000], 9)[0] == RAW


@pytest.mark.parametrize(
    ("size", "level"), [(4095, 6), (4096, 4), (65535, 4), (65536, 1), (1 << 20, 1)]
)
def test_default_level(size: int, level: int, library: str) -> None:
    """Which depends on the size; a level that was asked for does not."""
    words = [sha1(b"%d" % i).hexdigest()[: 3 + i % 6].encode() for i in range(500)]
    data = b" ".join(words[i * i % 499] + words[i % 500] for i in range(size // 4))
    data = data[:size]
    if library == "zlib":
        assert compress(data, -1) == compress(data, level)
        assert len(compress(data, 9)[2]) <= len(compress(data, -1)[2])
    assert compress(data, -1) != compress(data, 9)
    assert len(compress(data, -1)[2]) <= 1.1 * len(compress(data, level)[2])
    assert decompress(*compress(data, -1)[::2]) == data


def test_tiny_data_are_not_worth_it() -> None:
    assert compress(bytes(64), -1)[0] == RAW
    assert compress(bytes(64), 6)[0] == ZLIB
    assert compress(bytes(65), -1)[0] == ZLIB


def test_empty_data() -> None:
    checksum = bytes.fromhex("da39a3ee5e6b4b0d3255bfef95601890afd80709")
    assert compress(b"", -1) == (RAW, checksum, b"")


def test_big_incompressible_data_are_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    deflate = module._deflate_default

    def spy(data: bytes) -> bytes:
        sizes.append(len(data))
        return deflate(data)

    monkeypatch.setattr(module, "_deflate_default", spy)
    assert compress(NOISE, -1)[0] == RAW
    assert sizes == [3 * 4096]
    text = NOISE[:10_000].hex().encode() * 8
    assert compress(text, -1)[0] == ZLIB
    assert sizes[1:] == [3 * 4096, len(text)]


def test_bombs_are_refused() -> None:
    bomb = zlib.compress(bytes(1 << 20))
    assert len(decompress(ZLIB, bomb)) == 1 << 20
    assert len(decompress(ZLIB, bomb, 1 << 20)) == 1 << 20
    with pytest.raises(ValueError, match="exceed 1048575 bytes"):
        decompress(ZLIB, bomb, (1 << 20) - 1)


@pytest.mark.parametrize("size_max", [1000, 1 << 28])
def test_invalid_data(size_max: int) -> None:
    stored = zlib.compress(b"data" * 20)
    for data in b"", b"garbage", stored[:-1], stored[:-1] + b"?":
        with pytest.raises(ValueError, match="invalid compressed data"):
            decompress(ZLIB, data, size_max)
    with pytest.raises(ValueError, match="unknown compression"):
        decompress(2, b"")
