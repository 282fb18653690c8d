"""What strangers send to the ports of a cluster, which goes on unimpressed."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import transaction
import ZODB
from ZODB.Connection import TransactionMetaData

from neo.client.exception import NEOStorageError
from neo.lib.protocol import (
    BY_CODE,
    HANDSHAKE,
    AskObject,
    CellState,
    NodeType,
    Packet,
    Ping,
)
from neo.lib.util import Address, parse_address

from .harness import Cluster, until
from .peer import Peer, identification, packet


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), storages=2) as cluster:
        yield cluster


def ports(cluster: Cluster) -> dict[str, Address]:
    """Address of each node that listens."""
    found = {}
    for line in cluster.neoctl("print", "node")[1].splitlines():
        nid, _, address, *_ = (field.strip() for field in line.split("|"))
        if address:
            found[nid] = parse_address(address)
    return found


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


VALUES: list[Any] = [
    None, True, -1, 1 << 63, 1.5, b"", b"x" * 1000, "text", (), ((),) * 3, {}, {1: 2},
    msgpack.ExtType(0, b"\x63"), msgpack.ExtType(99, b"x"), CellState.FEEDING,
]  # fmt: skip


def wrong_arguments(one: Packet[...]) -> list[tuple[Any, ...]]:
    """Arguments that this packet can't have."""
    cases: list[tuple[Any, ...]] = [(None,) * (one.arity + 1), (b"",) * one.arity]
    if one.arity:
        cases += [(), *((value,) * one.arity for value in VALUES)]
    return [args for args in cases if not one.valid(args)]


def streams() -> dict[str, bytes]:
    """What is sent, after nothing."""
    cases = {
        "nothing": b"",
        "zeros": bytes(1000),
        "noise": random.Random(1).randbytes(5000),
        "http": b"GET / HTTP/1.0\r\n\r\n",
        "tls": bytes.fromhex("16030100c8010000c40303") + bytes(200),
        "other version": HANDSHAKE[:-1] + b"\x06",
        "half a handshake": HANDSHAKE[:3],
        "invalid msgpack": HANDSHAKE + b"\xc1",
        "not an array": HANDSHAKE + b"\x01",
        "empty array": HANDSHAKE + b"\x90",
        "pair": HANDSHAKE + packet(0, 1, ())[:0] + b"\x92\x00\x02",
        "quadruple": HANDSHAKE + b"\x94\x00\x02\x90\xc0",
        "id nil": HANDSHAKE + packet(None, 2, ()),
        "id negative": HANDSHAKE + packet(-1, 2, ()),
        "id string": HANDSHAKE + packet("0", 2, ()),
        "id too big": HANDSHAKE + packet(1 << 32, 2, ()),
        "code nil": HANDSHAKE + packet(0, None, ()),
        "code unknown": HANDSHAKE + packet(0, 0x7777, ()),
        "code 0": HANDSHAKE + packet(0, 0, ()),
        "arguments nil": HANDSHAKE + packet(0, 2, None),
        "arguments map": HANDSHAKE + packet(0, 2, {}),
        "deep": HANDSHAKE + b"\x93\x00\x02" + nested(1000),
        "very deep": HANDSHAKE + b"\x93\x00\x02" + nested(60000),
        "array of 2**32-1": HANDSHAKE + b"\x93\x00\x02\xdd\xff\xff\xff\xff",
        "arrays of 2**32-1": HANDSHAKE + b"\x93\x00\x02" + b"\xdd\xff\xff\xff\xff" * 99,
        "map of 2**32-1": HANDSHAKE + b"\x93\x00\x02\xdf\xff\xff\xff\xff",
        "bin of 2**32-1": HANDSHAKE + b"\x93\x00\x02\x91\xc6\xff\xff\xff\xff",
        "ext of 2**32-1": HANDSHAKE + b"\x93\x00\x02\x91\xc9\xff\xff\xff\xff\x00",
        "unhashable key": HANDSHAKE + b"\x93\x00\x01\x91\x81\x81\x01\x02\x03",
        "bad utf-8": HANDSHAKE + b"\x93\x00\x02\x91\xa2\xff\xff",
        "1 MiB unidentified": HANDSHAKE + packet(0, 2, (bytes(1 << 20),)),
        "unsolicited error": HANDSHAKE + packet(0, 0x8000, (6, b"x")),
        "unsolicited answer": HANDSHAKE + packet(0, 0x8002, ()),
        "unknown error code": HANDSHAKE + packet(0, 0x8000, (999, b"x")),
        "backend not implemented": HANDSHAKE + packet(0, 0x8000, (9, b"")),
        "unknown role": HANDSHAKE + identification(msgpack.ExtType(4, b"\x09")),
        "role as integer": HANDSHAKE + identification(2),  # type: ignore[arg-type]
        "nid of no namespace": HANDSHAKE + identification(NodeType.CLIENT, -4096),
        "nid of another type": HANDSHAKE + identification(NodeType.CLIENT, -1),
        "nid 0": HANDSHAKE + identification(NodeType.STORAGE, 0),
        "nid too big": HANDSHAKE + identification(NodeType.STORAGE, 1 << 40),
        "name as text": HANDSHAKE + identification(NodeType.CLIENT, name="test"),
        "other name": HANDSHAKE + identification(NodeType.CLIENT, name=b"\xff"),
        "text keys": HANDSHAKE + identification(NodeType.CLIENT, extra={"a": 1}),
        "devpath of integers": HANDSHAKE
        + identification(
            NodeType.STORAGE, address=(b"127.0.0.1", 1), extra={b"devpath": (1, 2)}
        ),
        "devpath not an array": HANDSHAKE
        + identification(
            NodeType.STORAGE, address=(b"127.0.0.1", 1), extra={b"devpath": 7}
        ),
        "new_nid of nonsense": HANDSHAKE
        + identification(NodeType.STORAGE, extra={b"new_nid": (b"x", -1)}),
        "address of nonsense": HANDSHAKE
        + identification(NodeType.STORAGE, address=(b"\xff\xfe", 0)),
        "master, election in the future": HANDSHAKE
        + identification(
            NodeType.MASTER, address=(b"127.0.0.1", 2), id_timestamp=1e300
        ),
        "master, not a number": HANDSHAKE
        + identification(
            NodeType.MASTER, address=(b"127.0.0.1", 3), id_timestamp=float("nan")
        ),
    }
    for one in BY_CODE.values():
        for i, args in enumerate(wrong_arguments(one)):
            cases[f"{one.name} {i}"] = HANDSHAKE + packet(0, one.code, args)
    return cases


STREAMS = streams()


def listeners(pid: int | None) -> str:
    """Ports a process listens on, each followed by a space."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(fd))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return "".join(
        f":{int(row[1].rpartition(':')[2], 16)} "
        for row in rows[1:]
        if row[3] == "0A" and f"socket:[{row[9]}]" in inodes
    )


def commit_and_read(cluster: Cluster) -> None:
    with cluster.client() as storage:
        db = ZODB.DB(storage)
        with db.transaction() as connection:
            root = connection.root()
            root["count"] = count = root.get("count", 0) + 1
        with db.transaction() as connection:
            assert connection.root()["count"] == count
        transaction.abort()
        db.close()


def test_malformed_input(cluster: Cluster) -> None:
    """Each is answered or closed; nobody dies, no traceback, the work goes on."""
    commit_and_read(cluster)
    pids = {name: p.pid for name, p in cluster.processes.items()}
    for address in ports(cluster).values():
        for case, data in STREAMS.items():
            with (
                contextlib.suppress(ConnectionError),
                socket.create_connection(address, 10) as sock,
            ):
                sock.sendall(data)
                with contextlib.suppress(OSError):  # closed by the node already
                    sock.shutdown(socket.SHUT_WR)
                received = b""
                while chunk := sock.recv(65536):
                    received += chunk
                # What answers at all greets first.
                assert HANDSHAKE.startswith(received[:6]), case
        commit_and_read(cluster)
    for name, process in cluster.processes.items():
        assert process.is_alive(), cluster.said(name)
        assert process.pid == pids[name]
        assert "Traceback" not in cluster.said(name)


def test_identified_client_misbehaves(cluster: Cluster) -> None:
    """Whoever is accepted and then sends nonsense loses its connection, no more."""
    commit_and_read(cluster)
    for one in BY_CODE.values():
        for args in wrong_arguments(one)[:4]:
            address = ports(cluster)["M1"]
            with socket.create_connection(address, 10) as sock:
                sock.sendall(HANDSHAKE + identification(NodeType.CLIENT))
                sock.sendall(packet(1, one.code, args))
                with contextlib.suppress(OSError):
                    while sock.recv(65536):
                        pass
    commit_and_read(cluster)
    assert all(process.is_alive() for process in cluster.processes.values())


def rss(pid: int | None) -> int:
    """Bytes of memory that a process uses."""
    with open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def test_many_silent_connections(cluster: Cluster) -> None:
    """They cost little, and go away."""
    address = ports(cluster)["M1"]
    pid = cluster.processes["master1"].pid
    before = rss(pid)
    with contextlib.ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection(address, 10))
            for _ in range(200)
        ]
        for sock in socks[::2]:
            sock.sendall(HANDSHAKE[:3])
        commit_and_read(cluster)
        assert rss(pid) - before < 32 << 20
        # Closed by the limit on the time to identify (10 s).
        for sock in socks:
            sock.settimeout(30)
            while sock.recv(100):
                pass
    commit_and_read(cluster)


def test_descriptors_exhausted(tmp_path: Path) -> None:
    """New peers are refused while there is no descriptor left; who is there works."""
    with Cluster(tmp_path) as cluster:
        with cluster.client() as storage:
            storage.new_oid()
            pid = cluster.processes["master1"].pid
            assert pid is not None
            used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 5, used + 5))
            with contextlib.ExitStack() as stack:
                for _ in range(50):
                    stack.enter_context(
                        socket.create_connection(cluster.masters[0], 10)
                    )
                for _ in range(300):
                    storage.new_oid()
            until(lambda: cluster.neoctl("print", "ids")[0] == 0)
        commit_and_read(cluster)
        assert "Traceback" not in cluster.said("master1")


def test_slow_sender(cluster: Cluster) -> None:
    """Byte by byte is welcome, but not for ever."""
    address = cluster.masters[0]
    with Peer(address) as peer, Peer(address) as endless:
        for byte in peer.hello():
            peer.sock.sendall(bytes((byte,)))
            time.sleep(0.005)
        peer.identified()
        commit_and_read(cluster)
        # Something arrives all the time, but no packet.
        endless.sock.sendall(HANDSHAKE + b"\x93\x00\x01\x91\xc5\xff\xff")
        endless.sock.settimeout(0.1)
        start = time.monotonic()
        with contextlib.suppress(ConnectionError, EOFError):
            while time.monotonic() < start + 30:
                endless.sock.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    endless.receive()
        assert time.monotonic() < start + 20  # normally 10


def test_never_reading_peer(cluster: Cluster) -> None:
    """What waits for it is bounded, and others don't wait for it."""
    data = random.Random(1).randbytes(1 << 20)
    oid = bytes.fromhex("00000000000ffff0")
    with cluster.client(compress=False) as storage:
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        storage.store(oid, bytes(8), data, "", txn)
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)
    address = next(
        address
        for nid, address in sorted(ports(cluster).items())
        if nid.startswith("S")
        and cluster.neoctl("print", "pt", "0", "1")[1].count(f"{nid} -")
    )
    name = next(
        name
        for name, process in cluster.processes.items()
        if name.startswith("storage") and f":{address[1]} " in listeners(process.pid)
    )
    pid = cluster.processes[name].pid
    before = rss(pid)
    greatest = 0
    with Peer(cluster.masters[0]) as peer:
        peer.sock.sendall(peer.hello())
        peer.identified()
        with Peer(address, peer) as reader:
            reader.sock.sendall(reader.hello())
            reader.identified()
            reader.sock.settimeout(1)
            with contextlib.suppress(OSError):
                for msg_id in range(1, 1000):
                    reader.sock.sendall(
                        packet(msg_id, AskObject.code, (oid, None, None))
                    )
                    greatest = max(greatest, rss(pid))
            until(lambda: closed(reader.sock), "closed")
            greatest = max(greatest, rss(pid))
            commit_and_read(cluster)
    assert greatest - before < 300 << 20
    assert cluster.processes[name].is_alive()


def closed(sock: socket.socket) -> bool:
    """Whether the peer closed, however much it sent before."""
    sock.settimeout(10)
    try:
        return not sock.recv(1 << 20)
    except ConnectionError:
        return True


def test_huge_message(cluster: Cluster) -> None:
    """Nobody takes 300 MiB, even of a peer that is known."""
    size = 300 << 20
    with Peer(cluster.masters[0]) as peer:
        peer.sock.sendall(peer.hello())
        peer.identified()
        pid = cluster.processes["master1"].pid
        before = greatest = rss(pid)
        sent = 0
        with contextlib.suppress(OSError):
            peer.sock.sendall(
                b"\x93\x01" + msgpack.packb(Ping.code) + b"\x91\xc6"
                + size.to_bytes(4, "big")
            )  # fmt: skip
            while sent < size:
                peer.sock.sendall(bytes(1 << 20))
                sent += 1 << 20
                greatest = max(greatest, rss(pid))
        assert sent < size
        assert greatest - before < 600 << 20
    commit_and_read(cluster)


def test_object_limit(cluster: Cluster) -> None:
    """60 MiB and no more, said before anything is sent."""
    limit = 60 << 20
    oid = bytes.fromhex("00000000000ffff1")
    data = random.Random(2).randbytes(limit + 1)
    with cluster.client(compress=False) as storage:
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        with pytest.raises(NEOStorageError, match=f"limit is {limit}"):
            storage.store(oid, bytes(8), data, "", txn)
        storage.store(oid, bytes(8), data[:limit], "", txn)
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)
    with cluster.client() as storage:
        assert storage.load(oid)[0] == data[:limit]
