"""Peers that speak the protocol as a test wants it, packet by packet."""

from __future__ import annotations

import socket
from typing import Any

import msgpack

from neo.lib.protocol import (
    HANDSHAKE,
    AcceptIdentification,
    NodeType,
    NotifyNodeInformation,
    RequestIdentification,
)
from neo.lib.util import Address


def packet(msg_id: Any, code: Any, args: Any) -> bytes:
    data: bytes = msgpack.packb((msg_id, code, args))
    return data


def identification(kind: NodeType, nid: Any = None, **more: Any) -> bytes:
    fields = {
        "address": None,
        "name": b"test",
        "id_timestamp": None,
        "extra": {},
        **more,
    }
    return packet(0, RequestIdentification.code, (kind, nid, *fields.values()))


class Peer:
    """A client that speaks the protocol, as slowly or as rudely as a test wants."""

    def __init__(self, address: Address, master: Peer | None = None) -> None:
        self.sock = socket.create_connection(address, 30)
        self.nid: int | None = master and master.nid
        self.since: float | None = master and master.since
        self._unpacker = msgpack.Unpacker(max_buffer_size=1 << 30)
        self._greeted = b""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def hello(self) -> bytes:
        """Bytes of handshake and identification."""
        return HANDSHAKE + identification(
            NodeType.CLIENT, self.nid, id_timestamp=self.since
        )

    def receive(self) -> tuple[int, int, Any]:
        """The next packet. EOFError at the end."""
        while True:
            for message in self._unpacker:
                return tuple(message)  # type: ignore[return-value]
            if not (data := self.sock.recv(65536)):
                raise EOFError
            missing = len(HANDSHAKE) - len(self._greeted)
            self._greeted += data[:missing]
            self._unpacker.feed(data[missing:])

    def identified(self) -> Peer:
        """Return once accepted; by a master: and known to all."""
        by_storage = self.since is not None
        while True:
            _, code, args = self.receive()
            if code == AcceptIdentification.code:
                self.nid = args[2]
                if by_storage:
                    return self
            elif code == NotifyNodeInformation.code:
                for _, _, nid, _, since in args[1]:
                    if nid == self.nid and since is not None:
                        self.since = since
                        return self
