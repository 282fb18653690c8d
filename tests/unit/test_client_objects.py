"""Many objects in one packet: who is told what, and what is asked again."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha1
from typing import Any

import pytest

from neo.client import objects
from neo.client.answers import Refusal
from neo.client.app import ClientApp
from neo.lib.protocol import MAX_TID, AskObject, ErrorCode
from neo.lib.util import p64
from tests.unit.test_client_core import STORAGES, Fake, app, world

__all__ = ["app", "world"]  # fixtures

VALUE = b"value"
ROW = p64(90), None, 0, sha1(VALUE).digest(), VALUE, None
OIDS = [p64(n) for n in range(1, 9)]


@pytest.fixture(autouse=True)
def features(world: Fake) -> None:
    """The storages know how."""

    def accept(*args: Any) -> list[tuple[Any, ...]]:
        packets = world.RequestIdentification(*args)
        return [*packets, ("NotifyFeatures", (b"objects",))]

    answer(world, "RequestIdentification", accept)
    answer(world, "AskObject", lambda oid, at, before: [("AnswerObject", oid, *ROW)])


@pytest.fixture
def one_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """All objects are asked of it."""
    monkeypatch.delitem(STORAGES, 2)


def answer(world: Fake, name: str, packets: Any) -> None:
    for _, port in STORAGES.values():
        world.script[port, name] = packets


def asked(world: Fake, name: str) -> list[Any]:
    return [args for _, asked, args in world.seen if asked == name]


def rows(found: Any) -> Any:
    return lambda wanted: [("AnswerObjects", *found(wanted))]


def read(app: ClientApp, oids: list[bytes]) -> Iterator[Any]:
    return app.reader.read_many((oid, AskObject, (oid, None, MAX_TID)) for oid in oids)


def connect(app: ClientApp) -> None:
    """Alone, objects are not asked together."""
    app.connect()
    app.open_links(tuple(STORAGES))


def test_one_packet_for_many(app: ClientApp, world: Fake) -> None:
    connect(app)
    answer(world, "AskObjects", rows(lambda wanted: ([ROW] * len(wanted), [])))
    oids = [p64(n) for n in range(1, 3 * objects.TOGETHER)]
    assert list(read(app, oids)) == [(oid, *ROW) for oid in oids]
    wanted = [one for (some,) in asked(world, "AskObjects") for one in some]
    assert sorted(wanted) == [(oid, None, MAX_TID) for oid in oids]
    assert asked(world, "AskObject") == []
    assert len(asked(world, "AskObjects")) <= 4


@pytest.mark.usefixtures("one_storage")
def test_what_is_left_is_asked_again(app: ClientApp, world: Fake) -> None:
    connect(app)
    answer(world, "AskObjects", rows(lambda wanted: ([ROW], [])))
    assert list(read(app, OIDS)) == [(oid, *ROW) for oid in OIDS]
    sizes = [len(some) for (some,) in asked(world, "AskObjects")]
    assert sizes == [8, 7, 6, 5, 4, 3, 2]
    assert len(asked(world, "AskObject")) == 1  # the last one


@pytest.mark.parametrize(
    ("code", "alone"),
    [
        (ErrorCode.NOT_READY, True),
        (ErrorCode.NON_READABLE_CELL, True),
        (ErrorCode.OID_NOT_FOUND, False),
    ],
)
@pytest.mark.usefixtures("one_storage")
def test_refused(app: ClientApp, world: Fake, code: ErrorCode, alone: bool) -> None:
    """Each on its own; what may be read elsewhere, or later, is."""

    def refuse_even(wanted: Any) -> Any:
        found = [ROW if oid[-1] % 2 else None for oid, _, _ in wanted]
        return found, [code] * found.count(None)

    connect(app)
    answer(world, "AskObjects", rows(refuse_even))
    for oid, found in zip(OIDS, read(app, OIDS), strict=True):
        if oid[-1] % 2 or alone:
            assert found == (oid, *ROW)
        else:
            assert isinstance(found, Refusal)
            assert found.code == code
    assert len(asked(world, "AskObject")) == (4 if alone else 0)


@pytest.mark.parametrize(
    "found", [([], []), ([None] * 9, [4] * 9), ([None], []), ([ROW], [4])]
)
def test_answer_that_can_not_be(app: ClientApp, world: Fake, found: Any) -> None:
    """The storage is left; the other one serves what was asked of it."""
    connect(app)
    answer(world, "AskObjects", rows(lambda wanted: found))
    assert list(read(app, OIDS)) == [(oid, *ROW) for oid in OIDS]
    assert len(asked(world, "AskObject")) == len(OIDS)


@pytest.mark.usefixtures("one_storage")
def test_prefetch(app: ClientApp, world: Fake) -> None:
    connect(app)
    damaged = *ROW[:4], b"other", None
    undone = p64(90), None, None, bytes(20), b"", None

    def found(wanted: Any) -> Any:
        by_oid = {OIDS[0]: damaged, OIDS[1]: None, OIDS[2]: undone}
        result = [by_oid.get(oid, ROW) for oid, _, _ in wanted]
        return result, [ErrorCode.OID_NOT_FOUND] * result.count(None)

    answer(world, "AskObjects", rows(found))
    app.reader.prefetch(OIDS, MAX_TID)
    assert set(app.reader.loads) == set(OIDS)
    assert app.reader.load(OIDS[3]) == (VALUE, p64(90), None)
    while world.turn():
        pass
    assert app.reader.loads == {}
    assert [app.cache.load(oid, MAX_TID) is not None for oid in OIDS] == (
        [False] * 3 + [True] * 5
    )
    assert asked(world, "AskObject") == []


def test_prefetch_from_a_storage_that_closes(app: ClientApp, world: Fake) -> None:
    connect(app)
    answer(world, "AskObjects", lambda wanted: [("close",)])
    app.reader.prefetch(OIDS, MAX_TID)
    assert app.reader.load(OIDS[3]) == (VALUE, p64(90), None)
    while world.turn():
        pass
    assert app.reader.loads == {}
