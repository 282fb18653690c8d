"""Records that are read ahead, and metadata that are remembered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from neo.client import iterator, metadata
from neo.client.answers import Refusal
from neo.client.exception import NEOStorageError
from neo.client.metadata import Information, Informations
from neo.lib.protocol import ErrorCode
from neo.lib.util import p64


class App:
    """Answers each request when it is its turn; `asked` has them in order.

    It is its own `reader`.
    """

    def __init__(self) -> None:
        self.reader = self
        self.asked: list[tuple[int, int]] = []
        self.refused: dict[int, int] = {}
        self.informations = Informations()

    def read_many(self, requests: Iterable[Any], window: int) -> Iterator[Any]:
        for _, _, (oid, tid, _) in requests:
            number = int.from_bytes(oid, "big")
            self.asked.append((int.from_bytes(tid, "big"), number))
            if number in self.refused:
                yield Refusal(self.refused[number], "")
            else:
                yield oid, tid, None, 0, b"", b"data", None

    def decode(self, answer: tuple[Any, ...]) -> tuple[bytes, bytes | None]:
        return answer[5], answer[6]


def info(tid: int, *oids: int, user: bytes = b"") -> Information:
    return p64(tid), user, b"", b"", False, [p64(oid) for oid in oids]


@pytest.fixture
def app() -> App:
    return App()


def oids_of(records: iterator.Records, index: int) -> list[int]:
    return [int.from_bytes(row[0], "big") for part in records.of(index) for row in part]


def test_one_stream_for_all(app: App) -> None:
    """In order, nothing is asked twice; an empty transaction is no obstacle."""
    records = iterator.Records(app, [info(1, 1, 2), info(2), info(3, 2)])  # type: ignore[arg-type]
    assert [oids_of(records, index) for index in range(3)] == [[1, 2], [], [2]]
    assert app.asked == [(1, 1), (1, 2), (3, 2)]


def test_out_of_order(app: App) -> None:
    """Records may be read in any order, again, and in part."""
    records = iterator.Records(app, [info(tid, tid) for tid in range(1, 5)])  # type: ignore[arg-type]
    next(records.of(1))
    assert [oids_of(records, i) for i in (3, 0, 0, 1, 2)] == [[4], [1], [1], [2], [3]]
    assert app.asked == [(2, 2), (4, 4), (1, 1), (1, 1), (2, 2), (3, 3)]


def test_two_at_once(app: App) -> None:
    """Two consumers don't take each other's records."""
    many = range(1, 2 * iterator.RECORDS)
    records = iterator.Records(app, [info(1, *many), info(2, *many)])  # type: ignore[arg-type]
    first, second = records.of(0), records.of(1)
    rows: tuple[list[Any], list[Any]] = [], []
    for one, other in zip(first, second, strict=True):
        rows[0].extend(one)
        rows[1].extend(other)
    assert rows[0] == rows[1]
    assert [int.from_bytes(row[0], "big") for row in rows[0]] == list(many)


def test_what_is_gone_is_left_out(app: App) -> None:
    """Other refusals are errors."""
    app.refused = {2: ErrorCode.OID_NOT_FOUND, 3: ErrorCode.OID_DOES_NOT_EXIST}
    records = iterator.Records(app, [info(1, 1, 2, 3, 4), info(2, 5)])  # type: ignore[arg-type]
    assert oids_of(records, 0) == [1, 4]
    app.refused[5] = ErrorCode.PROTOCOL_ERROR
    with pytest.raises(NEOStorageError):
        oids_of(records, 1)


def test_informations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is big is kept without its oids, or not at all; the oldest leaves."""
    monkeypatch.setattr(metadata, "ENTRIES", 2)
    known = Informations()
    small, big = info(1, 1), info(2, *range(metadata.OIDS_MAX + 1))
    known.add(small)
    known.add(big)
    known.add(info(3, user=b"u" * (metadata.TEXT_MAX + 1)))
    assert [known.get(p64(tid)) for tid in (1, 2, 3)] == [
        small,
        (*big[:5], None),
        None,
    ]
    known.add(info(4))
    assert (len(known), known.get(p64(1))) == (2, None)
    known.clear()
    assert not len(known)
