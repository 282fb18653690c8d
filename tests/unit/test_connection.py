"""Rules of one connection: greeting, ids, answers, errors, life, limits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from neo.lib.codec import pack
from neo.lib.connection import EAGER, INPUT_LIMIT_UNKNOWN, Connection, encode_tail
from neo.lib.exception import ProtocolError
from neo.lib.handler import Closing, Handler, Refused, denied, not_ready
from neo.lib.node import NodeManager
from neo.lib.protocol import (
    HANDSHAKE,
    AnswerLastIDs,
    AnswerNewOIDs,
    AnswerObject,
    AskLastIDs,
    AskNewOIDs,
    AskObject,
    Error,
    ErrorCode,
    NodeType,
    NotifyReady,
    NotifyUnlockInformation,
    Ping,
    Pong,
    SetNumReplicas,
)
from neo.lib.util import Pieces
from tests.fakes import (
    FakeRuntime,
    FakeTransport,
    Recorder,
    connection,
    established,
    feed,
    messages,
    output,
)

TID = bytes(7) + b"\1"


def error(msg_id: int, code: ErrorCode, text: str = "") -> tuple:
    return msg_id, Error.code, (int(code), text.encode())


def transport(conn: Connection) -> FakeTransport:
    assert isinstance(conn.transport, FakeTransport)
    return conn.transport


# --- streams ------------------------------------------------------------------------


def test_stream_is_what_send_would_write() -> None:
    conn = established(Recorder())
    parts = [b"a" * 40_000, b"b" * 40_000, b"c"]
    closed = []

    def read() -> Iterator[bytes]:
        try:
            yield from parts
        finally:
            closed.append(True)

    args = TID, TID, None, 0, bytes(20), b"".join(parts), None
    conn.send_stream(
        AnswerObject, 300, (*args[:5], Pieces(len(args[5]), read()), args[6])
    )
    segments = transport(conn).segments
    assert len(segments) == len(parts)  # each on its own
    assert b"".join(segments) + output(conn) == pack((300, AnswerObject.code, args))
    assert closed == [True]
    conn.close()
    conn.send_stream(AnswerObject, 301, (*args[:5], Pieces(80_001, read()), args[6]))
    assert output(conn) == b""
    assert len(segments) == len(parts)


# --- greeting -----------------------------------------------------------------------


def test_greeting_is_sent_first_whatever_the_peer_says() -> None:
    handler = Recorder()
    conn = connection(handler, incoming=False)
    conn.established()
    assert handler.connections == 1
    conn.ask(Ping)
    assert output(conn) == HANDSHAKE + pack((0, Ping.code, ()))
    incoming = connection(handler)
    incoming.established()
    assert handler.connections == 1
    assert output(incoming) == HANDSHAKE


@pytest.mark.parametrize("cut", range(1, 6))
def test_greeting_in_pieces(cut: int) -> None:
    handler = Recorder()
    conn = connection(handler)
    conn.established()
    conn.receive(HANDSHAKE[:cut])
    assert not conn.closed
    conn.receive(HANDSHAKE[cut:] + pack((7, NotifyReady.code, ())))
    assert handler.received == [(7, NotifyReady, ())]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (HANDSHAKE[:5] + b"\6", "Protocol version mismatch: 5 expected, .* speaks 6"),
        (HANDSHAKE[:5] + b"\4" + b"rest", "version mismatch"),
        (b"GET / HTTP/1.1\r\n", "does not speak NEO: b'GET / HTTP/1.1"),
        (b"\x16\x03\x01\x02\x00", "speaks TLS"),
        (b"\x15\x03\x03\x00\x02", "speaks TLS"),
        (b"\x93", "does not speak NEO"),
        (HANDSHAKE[:3] + b"X", "does not speak NEO"),
    ],
)
def test_wrong_greeting_is_closed_without_an_answer(data: bytes, reason: str) -> None:
    handler = Recorder()
    conn = connection(handler)
    conn.established()
    output(conn)
    conn.receive(data)
    assert conn.closed
    assert transport(conn).closed
    assert handler.closings == 1
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(conn.reason)
    assert not output(conn)
    conn.receive(HANDSHAKE)  # too late
    assert handler.received == []


# --- ids and answers ------------------------------------------------------------------


def test_ids_are_consecutive_and_wrap() -> None:
    conn = established(Recorder())
    conn._next_id = 0xFFFFFFFE
    conn.ask(Ping)
    conn.notify(NotifyReady)
    conn.ask(Ping)
    conn.notify_encoded(
        NotifyUnlockInformation, encode_tail(NotifyUnlockInformation, TID)
    )
    assert messages(conn) == [
        (0xFFFFFFFE, Ping.code, ()),
        (0xFFFFFFFF, NotifyReady.code, ()),
        (0, Ping.code, ()),
        (1, NotifyUnlockInformation.code, (TID,)),
    ]


def test_answers_come_in_any_order() -> None:
    conn = established(Recorder())
    got: list[object] = []
    for i in range(3):
        conn.ask(AskNewOIDs, i + 1).then(lambda oids, i=i: got.append((i, len(oids))))
    assert conn.pending == 3
    for i in (2, 0, 1):
        feed(conn, i, AnswerNewOIDs, [TID] * (i + 1))
    assert got == [(2, 3), (0, 1), (1, 2)]
    assert conn.pending == 0


def test_answer_without_callback_goes_to_the_handler_that_asked() -> None:
    handler = Recorder()
    conn = established(handler)
    conn.ask(AskNewOIDs, 1)
    feed(conn, 0, AnswerNewOIDs, [TID])
    assert handler.received == [(0, AnswerNewOIDs, ((TID,),))]


def test_answer_to_a_phase_that_is_over_is_dropped() -> None:
    first, second = Recorder(), Recorder()
    conn = established(first)
    conn.ask(AskNewOIDs, 1)
    conn.ask(AskNewOIDs, 1)
    conn.handler = second
    feed(conn, 0, AnswerNewOIDs, [TID])
    feed(conn, 1, Error, int(ErrorCode.NOT_READY), b"")
    assert not conn.closed
    assert first.received == second.received == second.errors == []


def test_callback_outlives_the_phase() -> None:
    got: list[object] = []
    conn = established(Recorder())
    conn.ask(AskNewOIDs, 1).then(got.append)
    conn.handler = Recorder()
    feed(conn, 0, AnswerNewOIDs, [TID])
    assert got == [(TID,)]


@pytest.mark.parametrize("asked", [False, True])
def test_unexpected_answer_is_a_protocol_error(asked: bool) -> None:
    handler = Recorder()
    conn = established(handler)
    if asked:
        conn.ask(AskLastIDs)
    output(conn)
    feed(conn, 0, AnswerNewOIDs, [TID])
    ((msg_id, code, args),) = messages(conn)
    assert (msg_id, code, args[0]) == (0, Error.code, ErrorCode.PROTOCOL_ERROR)
    assert conn.closed
    assert transport(conn).finished
    assert not transport(conn).closed
    assert handler.closings == 1


def test_answer_given_twice() -> None:
    conn = established(Recorder())
    conn.ask(AskNewOIDs, 1)
    feed(conn, 0, AnswerNewOIDs, [TID])
    assert not conn.closed
    feed(conn, 0, AnswerNewOIDs, [TID])
    assert conn.closed


def test_answer_that_the_handler_does_not_know() -> None:
    conn = established(Handler())
    conn.ask(AskLastIDs)
    output(conn)
    feed(conn, 0, AnswerLastIDs, None, None, TID)
    assert messages(conn)[0][2][0] == ErrorCode.PROTOCOL_ERROR
    assert conn.closed


# --- errors ---------------------------------------------------------------------------


def test_error_goes_to_the_callback_else_to_the_handler() -> None:
    handler = Recorder()
    conn = established(handler)
    got: list[object] = []
    conn.ask(AskObject, TID, None, None).then(
        got.append, lambda code, text: got.append((code, text))
    )
    conn.ask(AskObject, TID, None, None).then(got.append)
    conn.ask(AskObject, TID, None, None)
    for i in range(3):
        feed(conn, i, Error, int(ErrorCode.OID_NOT_FOUND), b"some \xff text")
    assert got == [(3, "some \N{REPLACEMENT CHARACTER} text")]
    assert [(p, c) for p, c, _ in handler.errors] == [(AskObject, 3)] * 2


def test_acknowledgement_is_a_success() -> None:
    conn = established(Recorder())
    got: list[object] = []
    conn.ask(SetNumReplicas, 1).then(got.append, lambda code, text: got.append(code))
    conn.ask(SetNumReplicas, 1).then(got.append, lambda code, text: got.append(code))
    feed(conn, 0, Error, 0, b"done")
    feed(conn, 1, Error, int(ErrorCode.DENIED), b"no")
    assert got == ["done", 1]


def test_complaint_without_id() -> None:
    """Nobody knows what it is about: it is logged, and never answered."""
    handler = Recorder()
    conn = established(handler)
    conn.ask(AskLastIDs)
    output(conn)
    conn.receive(pack((None, Error.code, (int(ErrorCode.PROTOCOL_ERROR), b"why?"))))
    assert handler.errors == [(None, ErrorCode.PROTOCOL_ERROR, "why?")]
    assert conn.pending == 1
    assert not conn.closed
    conn.handler = Handler()
    conn.receive(pack((None, Error.code, (int(ErrorCode.NOT_READY), b"why?"))))
    assert conn.closed
    assert output(conn) == b""


def test_unsolicited_error() -> None:
    """ACK and PROTOCOL_ERROR are logged; anything else is a mistake of the peer."""
    conn = established(Handler())
    feed(conn, 5, Error, 0, b"")
    feed(conn, 5, Error, int(ErrorCode.PROTOCOL_ERROR), b"")
    assert not conn.closed
    feed(conn, 5, Error, int(ErrorCode.NOT_READY), b"")
    assert conn.closed
    assert messages(conn)[0][2][0] == ErrorCode.PROTOCOL_ERROR


class Refusing(Handler):
    """Raises what it was made with."""

    def __init__(self, exception: Exception) -> None:
        super().__init__()
        self.exception = exception

    def ask_new_oids(self, conn: Connection, count: int) -> None:
        raise self.exception


@pytest.mark.parametrize(
    ("exception", "code", "closed"),
    [
        (Refused(ErrorCode.OID_NOT_FOUND, "text"), ErrorCode.OID_NOT_FOUND, False),
        (denied("text"), ErrorCode.DENIED, False),
        (not_ready("text"), ErrorCode.NOT_READY, True),
        (ProtocolError("text"), ErrorCode.PROTOCOL_ERROR, True),
    ],
)
def test_refusals(exception: Exception, code: ErrorCode, closed: bool) -> None:
    conn = established(Refusing(exception))
    feed(conn, 9, AskNewOIDs, 1)
    assert messages(conn) == [error(9, code, "text")]
    assert conn.closed is closed
    assert transport(conn).finished is closed


def test_other_exceptions_end_the_node() -> None:
    conn = established(Refusing(KeyError("bug")))
    with pytest.raises(KeyError):
        feed(conn, 9, AskNewOIDs, 1)


def test_packet_that_the_handler_does_not_foresee() -> None:
    conn = established(Handler())
    feed(conn, 4, NotifyReady)
    ((msg_id, code, args),) = messages(conn)
    assert (msg_id, code, args[0]) == (4, Error.code, ErrorCode.PROTOCOL_ERROR)
    assert b"NotifyReady unexpected" in args[1]
    assert conn.closed


def test_invalid_arguments() -> None:
    conn = established(Recorder())
    feed(conn, 4, AskNewOIDs, -1)
    assert messages(conn)[0][2] == (
        ErrorCode.PROTOCOL_ERROR,
        b"AskNewOIDs: invalid count -1",
    )
    assert conn.closed


def test_many_answers_are_sent_in_pieces() -> None:
    """The peer works on the first ones while the others are made."""

    class Server(Handler):
        def ask_object(self, conn: Connection, oid: bytes, *_: bytes | None) -> None:
            answer = oid, TID, None, 0, bytes(20), bytes(EAGER // 4), None
            conn.answer(AnswerObject, *answer)

    conn = established(Server())
    requests = [pack((i, AskObject.code, (TID, None, TID))) for i in range(22)]
    conn.receive(b"".join(requests[:3]))
    assert transport(conn).segments == []
    conn.receive(b"".join(requests[3:]))
    sizes = [len(segment) for segment in transport(conn).segments]
    assert len(sizes) == 5
    assert min(sizes) > EAGER
    assert conn.out_size == len(output(conn)) > 0


def test_ping_is_answered() -> None:
    conn = established(Handler())
    feed(conn, 4, Ping)
    assert messages(conn) == [(4, Pong.code, ())]


# --- answering later ------------------------------------------------------------------


class Deferring(Handler):
    """Keeps the right to answer."""

    def __init__(self) -> None:
        super().__init__()
        self.replies: list = []

    def ask_new_oids(self, conn: Connection, count: int) -> None:
        self.replies.append(conn.defer())

    def set_num_replicas(self, conn: Connection, num_replicas: int) -> None:
        conn.acknowledge("done")


def test_deferred_replies_keep_their_id() -> None:
    handler = Deferring()
    conn = established(handler)
    for i in (5, 3, 5, 8):
        feed(conn, i, AskNewOIDs, 1)
    feed(conn, 6, SetNumReplicas, 1)
    a, b, c, d = handler.replies
    b.answer(AnswerNewOIDs, [])
    a.error(ErrorCode.DENIED, "no")
    c.refuse(Refused(ErrorCode.OID_NOT_FOUND))
    assert messages(conn) == [
        error(6, ErrorCode.ACK, "done"),
        (3, AnswerNewOIDs.code, ((),)),
        error(5, ErrorCode.DENIED, "no"),
        error(5, ErrorCode.OID_NOT_FOUND),
    ]
    assert not d.closed
    d.refuse(not_ready("later"))
    assert messages(conn) == [error(8, ErrorCode.NOT_READY, "later")]
    assert d.closed
    d.answer(AnswerNewOIDs, [])
    assert not output(conn)


# --- life -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "abort", "lost"])
def test_end(how: str) -> None:
    """The handler is told once, then each pending request fails; nothing is sent."""
    log: list[object] = []

    class Closed(Handler):
        def closed(self, conn: Connection) -> None:
            assert conn.closed
            assert isinstance(conn.handler, Closing)
            conn.close()
            log.append("closed")

    conn = established(Closed())
    for _ in range(2):
        conn.ask(Ping).then(log.append, lambda code, text: log.append((code, text)))
    conn.ask(AskNewOIDs, 1)
    output(conn)
    getattr(conn, how)("some reason")
    expected = ["closed", (None, "some reason"), (None, "some reason")]
    assert log == expected
    assert (transport(conn).closed, transport(conn).finished) == (
        how == "close",
        how == "abort",
    )
    for again in (conn.close, conn.abort, lambda: conn.lost("x")):
        again()
    conn.notify(NotifyReady)
    conn.notify_encoded(NotifyReady, encode_tail(NotifyReady))
    conn.answer(Pong)
    conn.ask(Ping).then(log.append, lambda code, text: log.append(code))
    feed(conn, 0, Ping)
    assert log == [*expected, None]
    assert not output(conn)
    assert conn.reason == "some reason"


def test_rest_of_a_segment_is_not_dispatched_after_the_end() -> None:
    class Once(Handler):
        count = 0

        def notify_ready(self, conn: Connection) -> None:
            self.count += 1
            conn.abort("enough")

    handler = Once()
    conn = established(handler)
    conn.receive(pack((0, NotifyReady.code, ())) * 3)
    assert handler.count == 1


def test_abort_keeps_output() -> None:
    conn = established(Recorder())
    conn.notify(NotifyReady)
    conn.abort()
    assert messages(conn) == [(0, NotifyReady.code, ())]


def test_one_flush_is_asked_for_all_output_of_a_turn() -> None:
    conn = established(Recorder())
    before = transport(conn).flushes
    for _ in range(10):
        conn.notify(NotifyReady)
    assert transport(conn).flushes == before + 1


def test_pause_and_resume() -> None:
    handler = Recorder()
    conn = established(handler)
    conn.pause()
    for i in range(3):
        feed(conn, i, NotifyReady)
    assert handler.received == []
    conn.resume()
    assert [m[0] for m in handler.received] == [0, 1, 2]
    feed(conn, 3, NotifyReady)
    assert len(handler.received) == 4


def test_pause_while_resuming() -> None:
    class Pausing(Handler):
        def __init__(self) -> None:
            super().__init__()
            self.ids: list[int] = []

        def notify_ready(self, conn: Connection) -> None:
            self.ids.append(conn.message_id)
            conn.pause()

    handler = Pausing()
    conn = established(handler)
    conn.receive(b"".join(pack((i, NotifyReady.code, ())) for i in range(4)))
    for n in range(1, 5):
        assert handler.ids == list(range(n))
        conn.resume()
    conn.pause()
    feed(conn, 9, NotifyReady)
    conn.close()
    conn.resume()
    assert handler.ids == list(range(4))


def test_malformed_input_while_paused() -> None:
    conn = established(Recorder())
    conn.pause()
    conn.receive(b"\xc1")
    assert conn.closed


# --- limits ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\x92\x00\x02",
        b"\x94\x00\x02\x90\x00",
        b"\x80",
        b"\xc0",
        b"\x93\xc0\x02\x90",
        b"\x93\xff\x02\x90",
        b"\x93\xcf\x00\x00\x00\x01\x00\x00\x00\x00\x02\x90",
        b"\x93\xa1x\x02\x90",
        b"\x93\x00\xc4\x01x\x90",
        b"\x93\x00\x02\xc0",
        b"\x93\x00\x02\x80",
        b"\x93\x00\x00\x90",  # code 0
        b"\x93\x00\xcd\x7f\xff\x90",  # unknown code
        b"\x93\x00\x02\x91\xc7\x01\x05\x00",  # extension without meaning
        b"\x93\x00\x2a\x91\xd4\x01\x63",  # unknown enumeration value
        b"\x93\x00\x01\x91\x81\x80\x00",  # unhashable key
        b"\x93\x00\x01\x91\xa2\xff\xfe",  # not UTF-8
        b"\x93\x00\x01" + b"\x91" * 3000,
    ],
)
def test_malformed_input_closes_without_an_answer(data: bytes) -> None:
    handler = Recorder()
    conn = established(handler)
    conn.receive(data)
    assert conn.closed, conn
    assert handler.closings == 1
    assert handler.received == []
    assert not output(conn)


def test_input_of_an_unknown_peer_is_bounded() -> None:
    conn = established(Recorder())
    conn.receive(b"\x93\x00\x1d\xc6\x0f\xff\xff\xff" + bytes(INPUT_LIMIT_UNKNOWN))
    assert conn.closed
    node = NodeManager().add(NodeType.CLIENT, None, None)
    conn = established(Recorder())
    conn.set_node(node)
    for _ in range(20):
        conn.receive(b"\x93\x00\x1d\xc6\x0f\xff\xff\xff" + bytes(INPUT_LIMIT_UNKNOWN))
        assert not conn.closed


def test_output_is_bounded() -> None:
    handler = Recorder()
    runtime = FakeRuntime()
    conn = established(handler, runtime=runtime)
    data = bytes(32 << 20)
    for _ in range(7):
        conn.answer(AnswerObject, TID, TID, None, 0, bytes(20), data, None)
    assert not conn.closed
    conn.answer(AnswerObject, TID, TID, None, 0, bytes(20), data, None)
    size = conn.out_size
    conn.answer(AnswerObject, TID, TID, None, 0, bytes(20), data, None)
    assert conn.out_size == size  # nothing more is kept
    assert not conn.closed  # not in the middle of what its owner does
    runtime.advance(0)
    assert conn.closed
    assert transport(conn).closed
    assert handler.closings == 1


# --- silence --------------------------------------------------------------------------


def watched(only_if_owed: bool = False) -> tuple[FakeRuntime, Connection]:
    runtime = FakeRuntime()
    conn = established(Handler(), runtime=runtime)
    conn.watch_silence(3, 10, only_if_owed=only_if_owed)
    return runtime, conn


def test_silent_peer_is_pinged_then_closed() -> None:
    runtime, conn = watched()
    runtime.advance(2.9)
    assert messages(conn) == []
    runtime.advance(4)
    assert [m[1] for m in messages(conn)] == [Ping.code]
    runtime.advance(4)
    assert conn.closed
    assert conn.reason == "silent"


def test_silence_that_is_nearly_long_enough() -> None:
    """By less than what a date can tell: it is not looked at again at the same time."""
    runtime = FakeRuntime()
    runtime.time = 9.0
    conn = established(Handler(), runtime=runtime)
    conn.watch_silence(3, 10)
    runtime.advance(3)
    conn.last_received = math.nextafter(9, 10)
    messages(conn)
    runtime.advance(7)  # 19 + (10 - (19 - last_received)) is 19
    assert len(messages(conn)) == 1
    runtime.advance(1)
    assert conn.closed


def test_time_in_which_the_process_did_not_run() -> None:
    """It was paused, so its peers were not silent: their bytes wait in the sockets."""
    runtime, conn = watched()
    runtime.pause(60)
    assert not conn.closed
    runtime.advance(3)
    assert [m[1] for m in messages(conn)] == [Ping.code]
    runtime.advance(7)
    assert conn.closed


def answer_pings(runtime: FakeRuntime, conn: Connection, seconds: int) -> None:
    """The peer does nothing else."""
    for _ in range(seconds):
        runtime.advance(1)
        for msg_id, code, _ in messages(conn):
            assert code == Ping.code
            feed(conn, msg_id, Pong)


def test_peer_that_speaks_is_kept() -> None:
    runtime, conn = watched()
    answer_pings(runtime, conn, 50)
    assert not conn.closed
    assert conn.pending == 0


@pytest.mark.parametrize("only_if_owed", [False, True])
def test_who_speaks_without_answering(only_if_owed: bool) -> None:
    """A damaged byte hides all that we say: what it tells everybody is no answer."""
    runtime, conn = watched(only_if_owed)
    conn.ask(AskNewOIDs, 1)
    for _ in range(15):
        if not conn.closed:
            feed(conn, 0, Ping)
            runtime.advance(1)
    assert conn.closed


def test_answer_that_takes_long() -> None:
    """It may, as long as a Ping is answered."""
    runtime, conn = watched()
    conn.ask(AskNewOIDs, 1)
    messages(conn)
    answer_pings(runtime, conn, 50)
    assert not conn.closed
    assert conn.pending == 1


@pytest.mark.parametrize("rate", [1000, 1 << 20])
def test_large_message(rate: int) -> None:
    """Nothing can be answered before its end."""
    runtime, conn = watched()
    conn.trust()
    conn.ask(AskNewOIDs, 1)
    conn.receive(b"\x93\x00\x01\x91\xc6\x0f\0\0\0")
    for _ in range(20):
        if not conn.closed:
            conn.receive(bytes(rate))
            runtime.advance(1)
    assert conn.closed == (rate == 1000)


def test_silence_of_who_owes_nothing() -> None:
    runtime, conn = watched(only_if_owed=True)
    runtime.advance(100)
    assert messages(conn) == []
    conn.ask(AskNewOIDs, 1)
    runtime.advance(20)
    assert conn.closed
