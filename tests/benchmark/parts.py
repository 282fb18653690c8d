"""What a load and a commit are made of: each part alone, at its best.

The least of many short rounds, which other work of the machine can't disturb: the CPU
time of an operation is their sum and what caches forget between one and the next.
"""

from __future__ import annotations

import socket
import sys
import zlib
from collections.abc import Callable
from hashlib import sha1
from itertools import count
from random import Random
from tempfile import TemporaryDirectory
from timeit import repeat

from neo.client.cache import ClientCache
from neo.lib.codec import Decoder, pack
from neo.lib.protocol import AnswerObject, AskObject, CellState
from neo.lib.util import p64
from neo.storage.database import open_backend
from neo.storage.database.interface import Backend, Metadata, Store

from .limits import sync

OBJECTS = 5000
ROUNDS, CALLS = 60, 200


def least(call: Callable[[], object], calls: int = CALLS) -> float:
    """Microseconds."""
    return min(repeat(call, number=calls, repeat=ROUNDS)) / calls * 1e6


def database(folder: str) -> Backend:
    """A storage's, on disk, of one partition and OBJECTS objects."""
    backend = open_backend("SQLite", f"{folder}/db")
    backend.begin(True)
    backend.set_name("parts")
    backend.set_nid(1)
    backend.change_partition_table(1, 0, [(0, 1, CellState.UP_TO_DATE)], reset=True)
    backend.commit()
    return backend


def write(backend: Backend, tid: int, oids: range, data: bytes) -> None:
    """One transaction from vote to unlock: three commits, one of them durable."""
    ident = p64(tid)
    value = sha1(data).digest(), data, 1
    stores = [Store(p64(oid), None, value) for oid in oids]
    metadata = Metadata(b"", b"", b"", [p64(oid) for oid in oids])
    for durable, step in (
        (False, lambda: backend.vote(ident, stores, metadata)),
        (True, lambda: backend.lock(ident, ident, False)),
        (False, lambda: backend.unlock(ident, ident)),
    ):
        backend.begin(durable)
        step()
        backend.commit()


def parts() -> dict[str, float]:
    """Name -> microseconds."""
    data = b" ".join(b"%x" % Random(1).getrandbits(20) for _ in range(60))
    packed = zlib.compress(data)
    oid, tid = p64(7), p64(10)
    args = oid, tid, None, 1, sha1(packed).digest(), packed, None
    ask = pack((1, AskObject.code, (oid, None, tid)))
    answer = pack((1, AnswerObject.code, args))
    decoder, cache = Decoder(1 << 20), ClientCache(20 << 20)
    numbers = count()
    ids = [p64(number) for number in range(OBJECTS)]

    def store() -> None:
        cache.store(ids[next(numbers) % OBJECTS], data, tid, None)

    result = {
        "request: encode": least(lambda: pack((1, AskObject.code, (oid, None, tid)))),
        "request: decode": least(lambda: list(decoder.feed(ask))),
        "answer: encode": least(lambda: pack((1, AnswerObject.code, args))),
        "answer: decode": least(lambda: list(decoder.feed(answer))),
        "check of types": least(lambda: AnswerObject.valid(args)),
        "SHA-1": least(lambda: sha1(packed).digest()),
        "decompress": least(lambda: zlib.decompress(packed)),
        "compress": least(lambda: zlib.compress(data)),
        "client cache: store": least(store),
        "client cache: hit": least(lambda: cache.load(ids[7], p64(99))),
    }
    ours, theirs = socket.socketpair()
    with ours, theirs, TemporaryDirectory() as folder:

        def pass_on() -> None:
            ours.send(answer)
            theirs.recv(4096)

        result["send and recv, nobody to wake"] = least(pass_on)
        backend = database(folder)
        write(backend, 10, range(OBJECTS), data)
        load = backend.load
        result["SQLite: look-up"] = least(
            lambda: load(ids[next(numbers) % OBJECTS], None, tid)
        )
        tids = count(11)
        result["SQLite: vote, lock, unlock, with a sync"] = least(
            lambda: write(backend, next(tids), range(1), data), 10
        )
        backend.close()
        result["fsync"] = sync(folder, CALLS)
    return result


def main() -> int:
    for name, value in parts().items():
        print(f"| {name} | {value:.3g} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
