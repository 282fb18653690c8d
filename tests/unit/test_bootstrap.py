"""The search of the primary master."""

from __future__ import annotations

import pytest

from neo.lib.bootstrap import IDENTIFICATION_TIMEOUT, Bootstrap
from neo.lib.codec import Decoder, pack
from neo.lib.connection import Connection
from neo.lib.node import NodeManager
from neo.lib.protocol import (
    HANDSHAKE,
    AcceptIdentification,
    Error,
    ErrorCode,
    NodeType,
    NotPrimaryMaster,
    Packet,
    RequestIdentification,
)
from neo.lib.util import Address
from tests.fakes import FakeRuntime, Recorder, output

MASTERS = [("127.0.0.1", 1), ("127.0.0.1", 2), ("127.0.0.1", 3)]
M1, OWN = -0x0FFFFFFF, 5
IDENTITY = (NodeType.STORAGE, None, (b"127.0.0.1", 9), b"test", None, {})


class World:
    """A node that searches, and the masters that it connects to."""

    def __init__(self, masters: list[Address]) -> None:
        self.runtime = FakeRuntime()
        self.nodes = NodeManager()
        for address in masters:
            self.nodes.add(NodeType.MASTER, None, address)
        self.accepted: list[tuple[Connection, int]] = []
        self.refusals: list[tuple[int, str]] = []
        self.bootstrap = Bootstrap(
            self.runtime,
            self.nodes,
            lambda: IDENTITY,
            self._accepted,
            lambda code, text: self.refusals.append((code, text)),
        )
        self.bootstrap.start()

    def _accepted(self, conn: Connection, nid: int) -> None:
        conn.handler = Recorder()
        self.accepted.append((conn, nid))

    @property
    def tried(self) -> list[int]:
        return [conn.address[1] for conn in self.runtime.connections]

    @property
    def conn(self) -> Connection:
        return self.runtime.connections[-1]

    def connect(self) -> Connection:
        """The attempt in progress succeeds."""
        conn = self.conn
        conn.established()
        conn.receive(HANDSHAKE)
        data = output(conn)
        ((msg_id, code, args, _),) = Decoder(1 << 16).feed(data[len(HANDSHAKE) :])
        assert (msg_id, code) == (0, RequestIdentification.code)
        assert args == IDENTITY
        return conn

    def say(self, packet: Packet, *args: object) -> None:
        self.conn.receive(pack((0, packet.code, args)))


def wire(address: Address) -> tuple[bytes, int]:
    return address[0].encode(), address[1]


def test_masters_are_tried_in_turn_for_ever() -> None:
    world = World(MASTERS)
    for _ in range(7):
        world.conn.lost("Connection refused")
    assert world.tried == [1, 2, 3, 1, 2, 3, 1, 2]
    assert world.bootstrap.trying == MASTERS[1]
    assert world.bootstrap.failure == "Connection refused"


def test_accepted() -> None:
    world = World(MASTERS)
    conn = world.connect()
    world.say(AcceptIdentification, NodeType.MASTER, M1, OWN)
    assert world.accepted == [(conn, OWN)]
    assert conn.node is world.nodes.by_nid(M1)
    assert conn.node is not None
    assert conn.node.connection is conn
    assert world.runtime.succeeded == [MASTERS[0]]
    assert not world.bootstrap.searching
    conn.lost("gone")
    assert world.tried == [1]
    world.bootstrap.start()
    assert world.tried == [1, 1]


def test_redirected() -> None:
    """To the primary at once; masters that nobody knew are remembered."""
    world = World(MASTERS[:1])
    world.connect()
    world.say(NotPrimaryMaster, 2, [wire(a) for a in MASTERS])
    assert world.tried == [1, 3]
    assert [n.address for n in world.nodes.of_type(NodeType.MASTER)] == MASTERS
    world.conn.lost("Connection refused")
    assert world.tried == [1, 3, 2]


def test_redirected_to_nobody() -> None:
    world = World(MASTERS[:2])
    world.connect()
    world.say(NotPrimaryMaster, None, [wire(a) for a in MASTERS[:2]])
    assert world.tried == [1, 2]


@pytest.mark.parametrize(
    ("packet", "args"),
    [
        (NotPrimaryMaster, (1, [wire(MASTERS[0])])),
        (AcceptIdentification, (NodeType.STORAGE, 3, OWN)),
        (AcceptIdentification, (NodeType.MASTER, None, OWN)),
        (AcceptIdentification, (NodeType.MASTER, M1, None)),
        (RequestIdentification, IDENTITY),
    ],
)
def test_nonsense(packet: Packet, args: tuple) -> None:
    """The next one is tried."""
    world = World(MASTERS)
    conn = world.connect()
    world.say(packet, *args)
    assert conn.closed
    assert world.accepted == []


def test_refused() -> None:
    world = World(MASTERS)
    conn = world.connect()
    world.say(Error, int(ErrorCode.PROTOCOL_ERROR), b"invalid cluster name")
    assert conn.closed
    assert world.refusals == [(ErrorCode.PROTOCOL_ERROR, "invalid cluster name")]
    assert world.tried == [1, 2]
    assert world.bootstrap.failure == "invalid cluster name"


def test_refused_by_a_code_that_nobody_knows() -> None:
    world = World(MASTERS)
    world.connect()
    world.say(Error, 99, b"")
    assert world.refusals == [(99, "")]


def test_silent_master() -> None:
    world = World(MASTERS)
    conn = world.connect()
    world.runtime.advance(IDENTIFICATION_TIMEOUT + 0.1)
    assert conn.closed
    assert world.tried == [1, 2]


def test_stop() -> None:
    world = World(MASTERS)
    conn = world.connect()
    world.bootstrap.stop()
    assert conn.closed
    assert world.tried == [1]


def test_nid_of_another_master_moves() -> None:
    """After an election, M1 may be at another address."""
    world = World(MASTERS)
    other = world.nodes.by_address(MASTERS[2])
    assert other is not None
    world.nodes.set_nid(other, M1)
    world.connect()
    world.say(AcceptIdentification, NodeType.MASTER, M1, OWN)
    assert other.nid is None
    node = world.nodes.by_nid(M1)
    assert node is not None
    assert node.address == MASTERS[0]
