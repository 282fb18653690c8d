"""Digests of transactions and records, for replicas to be compared.

They are made slice by slice from what a `Reader` returns, so they are the same for all
databases, and values that don't have their checksums show.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha1

from neo.lib.protocol import ZERO_OID

from .database.interface import Oid, Reader, Tid, Transaction

SLICE_SIZE = 1 << 20  # bytes that are read at a time

Item = tuple[Tid, Oid, bytes]  # the digest is empty for what is damaged
Key = tuple[Tid, Oid]  # the oid of a transaction is ZERO_OID


def is_damaged(checksum: bytes, data: bytes, compression: int | None) -> bool:
    """Whether a value, as `Reader.load` returns it, is not what was stored."""
    if compression is None:
        return False
    return compression not in (0, 1) or sha1(data).digest() != checksum


def digest_objects(
    reader: Reader,
    partition: int,
    length: int,
    min_tid: Tid,
    min_oid: Oid,
    max_tid: Tid,
) -> tuple[list[Item], int, Key | None]:
    """(digests of records, bytes read, where to go on) from (`min_tid`, `min_oid`).

    At most `length` records, less if they are big.
    """
    keys = reader.object_keys(partition, length + 1, min_tid, max_tid, min_oid)
    result: list[Item] = []
    size = 0
    for tid, oid in keys:
        if len(result) == length or size > SLICE_SIZE:
            return result, size, (tid, oid)
        found = reader.load(oid, at=tid)
        if found is None:
            continue  # dropped meanwhile
        _, _, compression, checksum, data, value_tid = found
        size += 100 + len(data)
        digest = b""
        if not is_damaged(checksum, data, compression):
            parts = checksum, b"%d" % (-1 if compression is None else compression)
            digest = sha1(b"".join((*parts, value_tid or b""))).digest()[:8]
        result.append((tid, oid, digest))
    return result, size, None


def digest_transactions(
    reader: Reader, partition: int, length: int, min_tid: Tid, max_tid: Tid
) -> tuple[list[Item], int, Key | None]:
    """As `digest_objects`, for transactions. What packing changes is left out."""
    result: list[Item] = []
    size = 0
    for tid in reader.tids_from(partition, min_tid, max_tid, length + 1):
        if len(result) == length or size > SLICE_SIZE:
            return result, size, (tid, ZERO_OID)
        found = reader.transaction(tid)
        if found is not None:
            digest, count = _digest_transaction(found)
            size += 100 + count
            result.append((tid, ZERO_OID, digest))
    return result, size, None


def _digest_transaction(transaction: Transaction) -> tuple[bytes, int]:
    user, description, extension, oids, _, ttid, _ = transaction
    parts = [user, description, extension, ttid, *sorted(oids)]
    text = b"".join(b"%d:%b" % (len(part), part) for part in parts)
    return sha1(text).digest()[:8], len(text)


def digests(
    of_objects: bool,
    partition: int,
    length: int,
    min_tid: Tid,
    min_oid: Oid,
    max_tid: Tid,
) -> Callable[[Reader], tuple[list[Item], int, Key | None]]:
    """One slice of digests, as a function of the reader."""
    if of_objects:
        return lambda reader: digest_objects(
            reader, partition, length, min_tid, min_oid, max_tid
        )
    return lambda reader: digest_transactions(
        reader, partition, length, min_tid, max_tid
    )
