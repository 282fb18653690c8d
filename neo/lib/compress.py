"""Compression and checksum of object data.

Done by who writes (client, importer) and who reads, never by storage nodes. The
checksum is the SHA-1 of the bytes as stored, after compression.
Source: storage-format 1.2, operations 11.1.
"""

from __future__ import annotations

import zlib
from contextlib import suppress
from hashlib import sha1
from typing import Any

from .exception import ConfigurationError

# Where it is installed, ISA-L makes and reads the same format: 2 to 6 times as fast,
# for -6 to +10 % of the size (docs/performance.md).
isal: Any = None
with suppress(ImportError):
    from isal import isal_zlib as isal
inflate: Any = isal or zlib
_ERRORS: tuple[type[Exception], ...] = (zlib.error, inflate.error)

RAW = 0
ZLIB = 1

# ISA-L's level 2 (0 to 3: 3 takes up to twice as long for 0 to 5 % less). With zlib, 6
# for what is small: at 64 KiB, 6 takes 2.5 to 6 times as long as 1 for 0 to 20 % less,
# at 8 KiB 1.2 to 2.5 times as long as 4 for 0 to 2 % less. The smallest data shrink by
# a few bytes, if at all (docs/performance.md).
DEFAULT_LEVEL = -1
_ISAL_LEVEL = 2
_TINY = 64  # bytes
_LEVEL_4 = 4 << 10  # from here on
_LEVEL_1 = 64 << 10

DECOMPRESSED_MAX = 256 << 20  # bytes
_RATIO_MAX = 1032  # deflate can't do better: a longer match than 258 takes 2 more bits

_PROBED = 64 << 10  # bigger data must show on samples that they shrink
_SAMPLE = 4 << 10

_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "1", "zlib"), DEFAULT_LEVEL),
    **dict.fromkeys(("false", "no", "off", "0"), None),
    **{f"zlib={level}": level for level in range(1, 10)},
}


def parse_option(option: object) -> int | None:
    """Level for `compress`, None for no compression, from the option of that name.

    True, None or "zlib": the default level; False: none; "zlib=1" to "zlib=9";
    (0, level or None). Raises ConfigurationError.
    """
    if option is None or option is True:
        return DEFAULT_LEVEL
    if option is False:
        return None
    if isinstance(option, str) and option.strip().lower() in _WORDS:
        return _WORDS[option.strip().lower()]
    if isinstance(option, tuple) and len(option) == 2 and option[0] == 0:
        level = option[1]
        if level is None:
            return DEFAULT_LEVEL
        if isinstance(level, int) and 1 <= level <= 9:
            return level
    raise ConfigurationError(
        f"invalid compress {option!r}: expected true, false, zlib or zlib=1 to zlib=9"
    )


def compress(data: bytes, level: int | None) -> tuple[int, bytes, bytes]:
    """(compression, checksum, data) to store: compressed only if that is shorter."""
    if level is not None and (len(data) < _PROBED or _shrinks(data)):
        if level == DEFAULT_LEVEL:
            if len(data) <= _TINY:
                return RAW, sha1(data).digest(), data
            packed = _deflate_default(data)
        else:
            packed = _deflate(data, level)
        if len(packed) < len(data):
            return ZLIB, sha1(packed).digest(), packed
    return RAW, sha1(data).digest(), data


def _deflate_default(data: bytes) -> bytes:
    """As DEFAULT_LEVEL wants."""
    if isal is not None:
        packed: bytes = isal.compress(data, _ISAL_LEVEL)
        return packed
    size = len(data)
    return _deflate(data, 6 if size < _LEVEL_4 else 4 if size < _LEVEL_1 else 1)


def _deflate(data: bytes, level: int) -> bytes:
    # zlib clears tables of 256 KiB before it starts, which takes 50 us: six times as
    # long as to compress 300 bytes. A window that is just large enough, with a small
    # hash table, gives the same result (measured: tests/unit/test_compress.py).
    size = len(data)
    window = min(max(9, size.bit_length()), zlib.MAX_WBITS)
    deflater = zlib.compressobj(level, zlib.DEFLATED, window, 5 if size < 4096 else 8)
    return deflater.compress(data) + deflater.flush()


def _shrinks(data: bytes) -> bool:
    """Is it likely that compression pays? Pictures and archives should not cost it."""
    last = len(data) - _SAMPLE
    sample = b"".join(data[at : at + _SAMPLE] for at in (0, last // 2, last))
    return len(_deflate_default(sample)) < len(sample)


def decompress(
    compression: int, data: bytes, size_max: int = DECOMPRESSED_MAX
) -> bytes:
    """Inverse of `compress`. Raises ValueError if invalid or beyond `size_max`."""
    if compression == RAW:
        return data
    if compression != ZLIB:
        raise ValueError(f"unknown compression {compression}")
    try:
        if len(data) * _RATIO_MAX <= size_max:
            result: bytes = inflate.decompress(data)
            return result
        inflater = inflate.decompressobj()
        result = inflater.decompress(data, size_max)
    except _ERRORS as e:
        raise ValueError(f"invalid compressed data: {e}") from None
    if inflater.eof:
        return result
    if len(result) < size_max:
        raise ValueError("invalid compressed data: truncated")
    raise ValueError(f"data exceed {size_max} bytes once decompressed")
