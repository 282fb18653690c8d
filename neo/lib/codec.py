"""Bytes <-> packets: msgpack streams, decoded without trusting the peer's lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from msgpack import OutOfData, Packer, Unpacker, UnpackException, unpackb

from .protocol import Error, decode_extension, shorten

# Id, code, arguments; the bytes of all that, unless they came in pieces.
Message = tuple[int, int, tuple[Any, ...], bytes | None]

# Stands for nil, which an Error may have as id: neoppod complains so of a response that
# it did not expect, if it got nothing else before (protocol 6.3). Never sent.
NO_ID = -1
_ERROR = Error.code

# One for the process: packing runs no Python code, so nothing can interleave with it.
pack = Packer().pack

# The fast decoder allocates an array when it meets its header. What declares more
# elements than this is decoded once all its bytes are there instead.
_FAST_ELEMENTS = 4096
_ALONE_MAX = 64 << 10  # bytes that are tried as one message
# First size of a decoder's buffer, which grows as needed. By default, each connection
# would hold a megabyte.
_BUFFER = 16 << 10
_OPTIONS: dict[str, Any] = {
    "use_list": False,
    "raw": False,
    "strict_map_key": False,
    "ext_hook": decode_extension,
}

# What msgpack raises on a hostile stream: too deep, unhashable keys, bad UTF-8...
HOSTILE = (ValueError, TypeError, UnpackException, RecursionError, MemoryError)


class Malformed(ValueError):
    """The stream is no sequence of packets."""


class Decoder:
    """Cuts a stream of bytes into messages.

    Memory is bounded by `limit`, the bytes that may be kept of one incomplete message,
    whatever lengths its headers declare.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._fast: Unpacker | None = self._new_fast()
        self._chunks: list[bytes] = []  # since the start of the incomplete message
        self._size = 0
        self._start = 0  # of that message in its first chunk
        self._fed = 0  # bytes given to the fast decoder before the first chunk
        self._scanner: Unpacker | None = None
        self._scanned = 0
        self._alone = True  # the last bytes were exactly one message

    def _new_fast(self) -> Unpacker:
        return Unpacker(
            max_buffer_size=0x7FFFFFFF,
            read_size=_BUFFER,
            max_array_len=_FAST_ELEMENTS,
            max_map_len=_FAST_ELEMENTS,
            **_OPTIONS,
        )

    @property
    def incomplete(self) -> int:
        """Bytes received of a message that is not complete."""
        return self._size - self._start

    def feed(self, data: bytes) -> Iterable[Message]:
        """The messages that `data` completes; iterating may raise Malformed."""
        if self._alone and not self._size and len(data) <= _ALONE_MAX:
            # A conversation is one message at a time: a fifth of the time of a stream.
            try:
                return (_checked(unpackb(data, **_OPTIONS), data),)
            except HOSTILE:
                self._alone = False  # more than one, less than one, or worse
        return self._stream(data)

    def _stream(self, data: bytes) -> Iterator[Message]:
        self._chunks.append(data)
        self._size += len(data)
        if self._fast is None:
            yield from self._slow()
            return
        fast = self._fast
        fast.feed(data)
        before = self._size - len(data)
        number = 0
        try:
            while True:
                message = fast.unpack()
                start, self._start = self._start, fast.tell() - self._fed
                number += 1
                in_data = start >= before
                whole = data[start - before : self._start - before] if in_data else None
                yield _checked(message, whole)
        except OutOfData:
            pass
        except Malformed:
            raise
        except ValueError as error:
            if "exceeds max_" not in str(error):
                raise Malformed(str(error)) from None
            self._fast = None
            yield from self._slow()
            return
        except HOSTILE as error:
            raise Malformed(f"{type(error).__name__}: {error}") from None
        if self._start == self._size:
            self._alone = number == 1 and len(self._chunks) == 1
            self._fed += self._size
            self._chunks.clear()
            self._size = self._start = 0
        elif self._size - self._start > self.limit:
            raise Malformed(f"message larger than {self.limit} bytes")
        else:
            self._forget_decoded()

    def _forget_decoded(self) -> None:
        """Keep only chunks since the start of the incomplete message."""
        chunks, number, size = self._chunks, 0, 0
        while size + len(chunks[number]) <= self._start:
            size += len(chunks[number])
            number += 1
        del chunks[:number]
        self._fed += size
        self._start -= size
        self._size -= size

    def _slow(self) -> Iterator[Message]:
        """Find where messages end before any of their arrays is allocated."""
        if self._scanner is None:
            self._scanner = Unpacker(max_buffer_size=0x7FFFFFFF, read_size=_BUFFER)
            data = b"".join(self._chunks)[self._start :]
            self._chunks = [data]
            self._size = len(data)
            self._start = self._scanned = 0
        else:
            data = self._chunks[-1]
        self._scanner.feed(data)
        ends = []
        try:
            while True:
                self._scanner.skip()
                ends.append(self._scanner.tell() - self._scanned)
        except OutOfData:
            pass
        except HOSTILE as error:
            raise Malformed(f"{type(error).__name__}: {error}") from None
        if ends:
            data = b"".join(self._chunks)
            start = 0
            view = memoryview(data)
            for end in ends:
                try:
                    message = unpackb(view[start:end], **_OPTIONS)
                except HOSTILE as error:
                    raise Malformed(f"{type(error).__name__}: {error}") from None
                start = end
                yield _checked(message, None)
            self._scanned += start
            self._chunks = [data[start:]]
            self._size = len(data) - start
        if not self._size:
            self._chunks.clear()
            self._scanner = None
            self._fast = self._new_fast()
            self._fed = 0
        elif self._size > self.limit:
            raise Malformed(f"message larger than {self.limit} bytes")


def _checked(message: Any, data: bytes | None) -> Message:
    """A message of these bytes, if it is [id, code, arguments]."""
    if type(message) is tuple and len(message) == 3:
        msg_id, code, args = message
        if (
            type(msg_id) is int
            and type(code) is int
            and type(args) is tuple
            and 0 <= msg_id <= 0xFFFFFFFF
        ):
            return msg_id, code, args, data
        if msg_id is None and code == _ERROR and type(args) is tuple:
            return NO_ID, code, args, data
    raise Malformed(f"not a packet: {shorten(message)}")
