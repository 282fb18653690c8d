"""Bytes recorded on real clusters: decoded, validated, and made again identically."""

from __future__ import annotations

import pytest

from neo.lib.codec import Decoder, pack
from neo.lib.connection import encode_tail
from neo.lib.protocol import BY_CODE, HANDSHAKE, RESPONSE, Error, WireEnum
from tests.fakes import (
    CONVERSATIONS,
    Recorder,
    conversation,
    established,
    output,
    packet_vectors,
)

PACKETS = list(packet_vectors())
IDS = [f"{i}-{v['name']}" for i, v in enumerate(PACKETS)]


def kind(code: int) -> str:
    packet = BY_CODE[code]
    if code & RESPONSE:
        return "answer"
    return "notification" if packet.answer is None else "request"


def same(a: object, b: object) -> bool:
    """Equality that tells 1 from True and 1.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple) and not isinstance(a, WireEnum):
        assert isinstance(b, tuple)
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        assert isinstance(b, dict)
        return same(tuple(a.items()), tuple(b.items()))
    return a == b


@pytest.mark.parametrize("vector", PACKETS, ids=IDS)
def test_packet(vector: dict) -> None:
    """The declared types fit; decoding and encoding are each other's inverse."""
    packet = BY_CODE[vector["code"]]
    assert packet.name == vector["name"]
    assert vector["kind"] in (kind(packet.code), "answer")
    ((msg_id, code, args, data),) = Decoder(1 << 20).feed(vector["data"])
    assert (msg_id, code) == (vector["id"], vector["code"])
    assert same(args, vector["args"])
    assert packet.valid(args), packet.explain(args)
    assert packet.explain(args).endswith("valid")
    assert pack((msg_id, code, args)) == vector["data"] == data
    assert b"\x93" + pack(msg_id) + encode_tail(packet, *args) == vector["data"]


@pytest.mark.parametrize("vector", PACKETS, ids=IDS)
def test_sent_by_a_connection(vector: dict) -> None:
    conn = established(Recorder())
    conn._next_id = vector["id"]
    packet, args = BY_CODE[vector["code"]], vector["args"]
    if vector["kind"] == "request":
        conn.ask(packet, *args)
    elif vector["kind"] == "notification":
        conn.notify(packet, *args)
    else:
        conn.message_id = vector["id"]
        conn.answer(packet, *args)
    assert output(conn) == vector["data"]


def test_every_packet_of_protocol_5_has_a_vector() -> None:
    ours = {p.name for p in BY_CODE.values() if p.code & 0x7FFF < 0x7000}
    assert ours == {vector["name"] for vector in PACKETS}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("size", [0, 1, 7])
def test_conversation(name: str, size: int) -> None:
    """Two connections that replay it send the same bytes and match all answers.

    `size`: of the pieces in which bytes arrive, 0 for whole packets.
    """
    lines = conversation(name)
    # Both greet at once; the recording has the greeting of the peer when it was read.
    ends = {
        end: established(Recorder(), incoming=bool(i))
        for i, end in enumerate(lines[0]["dir"].split(">"))
    }
    for conn in ends.values():
        conn.trust()
    for line in lines:
        src, dst = line["dir"].split(">")
        if line["name"] == "Handshake":
            assert line["data"] == HANDSHAKE
            continue
        conn, peer = ends[src], ends[dst]
        packet = BY_CODE[line["code"]]
        ((msg_id, _, args, _),) = Decoder(1 << 20).feed(line["data"])
        if line["kind"] == "request":
            request = conn.ask(packet, *args)
            if packet.answer is Error:  # an acknowledgement goes nowhere else
                errors = conn.handler.errors
                request.then(
                    lambda text, to=errors: to.append((None, 0, text)),
                    lambda code, text, to=errors: to.append((None, code, text)),
                )
        elif line["kind"] == "answer":
            conn.message_id = msg_id
            conn.answer(packet, *args)
        elif packet.name in ("AddTransaction", "AddObject"):
            conn.send(packet, msg_id, args)  # under the id of the request served
        else:
            conn.notify(packet, *args)
        assert output(conn) == line["data"]
        before = len(peer.handler.received), len(peer.handler.errors)
        step = size or len(line["data"])
        for start in range(0, len(line["data"]), step):
            peer.receive(line["data"][start : start + step])
        assert not peer.closed, peer.reason
        assert not output(peer)
        if packet.name == "Error":
            assert len(peer.handler.errors) == before[1] + 1
        else:
            assert len(peer.handler.received) == before[0] + 1
            assert peer.handler.received[-1] == (msg_id, packet, args)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_streams_of_a_conversation(name: str) -> None:
    """One direction is the concatenation of its packets, decoded at once."""
    lines = [line for line in conversation(name) if line["name"] != "Handshake"]
    for direction in {line["dir"]: None for line in lines}:
        mine = [line for line in lines if line["dir"] == direction]
        stream = b"".join(line["data"] for line in mine)
        messages = list(Decoder(1 << 20).feed(stream))
        assert [(m[0], m[1]) for m in messages] == [(x["id"], x["code"]) for x in mine]
        assert [m[3] for m in messages] == [line["data"] for line in mine]
