"""Bytes <-> packets: msgpack streams, decoded without trusting the peer's lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha1
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


# Bytes of a binary, still to come, that are worth to be put together apart.
_BIG = 32 << 10
_HEAD = 128  # within which the binary of such a message begins
_LONG = b"\xc6"  # before the length of a binary, of 4 bytes
_EMPTY = b"\xc4\0"  # a binary


def find_binary(head: bytes) -> tuple[int, int, int] | None:
    """(number of the argument, start, end) of what goes beyond `head` in its message.

    None if it is not a long binary, or not known yet.
    """
    reader = Unpacker(read_size=_HEAD, max_buffer_size=_HEAD)
    reader.feed(head[:_HEAD])
    at, number = 0, -1
    try:
        reader.read_array_header()
        reader.skip()
        reader.skip()
        reader.read_array_header()
        while True:
            at, number = reader.tell(), number + 1
            reader.skip()
    except OutOfData:
        pass
    except HOSTILE:
        return None
    start = at + len(_LONG) + 4
    if at and head[at : at + 1] == _LONG and len(head) >= start:
        return number, start, start + int.from_bytes(head[start - 4 : start], "big")
    return None


class _Big:
    """A message that is mostly one binary, which is copied once only, and hashed as it
    comes. The other arguments are decoded as if it were empty.
    """

    def __init__(self, head: bytes, number: int, size: int, reader: Unpacker) -> None:
        self._number = number  # of the argument
        self._missing = size
        self._sha = sha1()
        self._parts: list[bytes] = []
        self.hashed: tuple[bytes, bytes] | None = None  # value, SHA-1: once complete
        self._others = [head]  # what comes before and after it
        self._reader = reader
        self._fed = 0
        self._feed(head[: -len(_LONG) - 4] + _EMPTY)

    def _feed(self, data: bytes) -> None:
        self._reader.feed(data)
        self._fed += len(data)

    def add(self, data: bytes) -> tuple[Message, bytes] | None:
        """The message and what follows it, if `data` complete it; else None."""
        if self._missing:
            part = data[: self._missing]
            data = data[self._missing :]
            self._parts.append(part)
            self._sha.update(part)
            self._missing -= len(part)
            if self._missing:
                return None
        self._others.append(data)
        self._feed(data)
        try:
            message = self._reader.unpack()
        except OutOfData:
            return None
        msg_id, code, args, _ = _checked(message, None)
        value = b"".join(self._parts)
        args = (*args[: self._number], value, *args[self._number + 1 :])
        self.hashed = value, self._sha.digest()
        left = self._fed - self._reader.tell()
        return (msg_id, code, args, None), data[len(data) - left :]

    def all(self) -> bytes:
        """All that came."""
        head, *tail = self._others
        return b"".join((head, *self._parts, *tail))


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
        self._big: _Big | None = None  # the incomplete message
        # The last big binary that came in pieces, and its SHA-1.
        self.hashed: tuple[bytes, bytes] | None = None

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
        if self._big is not None:
            yield from self._assemble(self._big, data)
            return
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
            self._look_for_binary()

    def _look_for_binary(self) -> None:
        """Go another way for the incomplete message if it has a big one."""
        found = find_binary(self._chunks[0][self._start : self._start + _HEAD])
        if found is None:
            return
        number, start, end = found
        if end > self.limit:
            raise Malformed(f"message larger than {self.limit} bytes")
        if end - self.incomplete < _BIG:
            return
        data = b"".join(self._chunks)[self._start :]
        self._big = _Big(data[:start], number, end - start, self._new_fast())
        self._big.add(data[start:])
        self._chunks.clear()
        self._size, self._start = len(data), 0

    def _assemble(self, big: _Big, data: bytes) -> Iterator[Message]:
        """`_stream` for a message with a big binary."""
        self._size += len(data)
        try:
            complete = big.add(data)
        except HOSTILE as error:
            if isinstance(error, Malformed) or "exceeds max_" not in str(error):
                raise Malformed(f"{type(error).__name__}: {error}") from None
            self._big = self._fast = None
            self._chunks = [big.all()]
            yield from self._slow()
            return
        if complete is None:
            if self._size > self.limit:
                raise Malformed(f"message larger than {self.limit} bytes")
            return
        message, following = complete
        self.hashed = big.hashed
        self._big = None
        self._fast = self._new_fast()
        self._size = self._fed = 0
        self._alone = not following
        yield message
        if following:
            yield from self._stream(following)

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
