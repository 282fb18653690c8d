"""Conversations of neoppod's nodes, replayed to a storage node: same answers, to the
byte. What is sent once only may differ: RequestIdentification (host, port).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neo.lib.codec import Decoder, pack
from neo.lib.protocol import NodeState, NodeType, RequestIdentification
from neo.storage.database.interface import Transaction
from neo.storage.database.memory import MemoryBackend

from .storage_harness import Harness, Peer

VECTORS = Path(__file__).parent.parent / "vectors"


def conversation(name: str) -> list[dict[str, Any]]:
    """Packets of a recorded conversation, the handshake left out."""
    lines = (VECTORS / f"{name}.jsonl").read_text().splitlines()
    packets = [json.loads(line) for line in lines]
    return [p for p in packets if p["name"] != "Handshake"]


class Replay:
    """One connection: what the peer said is fed, what the storage said is compared."""

    def __init__(self, peer: Peer, packets: list[dict[str, Any]], me: str) -> None:
        self.peer = peer
        self.packets = packets
        self.me = me
        self.sent: list[str] = []

    def step(self) -> str:
        """Replay one packet; its name."""
        packet = self.packets.pop(0)
        data = bytes.fromhex(packet["hex"])
        if packet["dir"].startswith(self.me):
            self._compare(packet["name"], data)
        else:
            self.peer.conn.receive(data)
            self.peer.harness.turn()
        return str(packet["name"])

    def _compare(self, name: str, expected: bytes) -> None:
        for packet, msg_id, args in self.peer.packets():
            self.sent.append(packet.name)
            self.peer.queue.append((packet, msg_id, args))
        assert self.peer.queue, f"{name} expected, nothing came"
        packet, msg_id, args = self.peer.queue.pop(0)
        assert packet.name == name
        if packet is not RequestIdentification:
            assert pack((msg_id, packet.code, args)) == expected, (name, args)

    def until(self, name: str) -> None:
        """Replay up to a packet, included."""
        while self.step() != name:
            pass


def test_new_cluster_and_first_client() -> None:
    h = Harness(cluster="conv")
    master = Replay(
        h.answer_call(), conversation("conv-storage-master-new-cluster"), "storage>"
    )
    client_packets = conversation("conv-client-storage")
    master.until("NotifyReady")
    master.until("NotifyNodeInformation")
    client = Replay(h.dial(), client_packets, "storage>")
    while client.packets:
        if client.step() == "AnswerStoreTransaction":
            master.until("NotifyUnlockInformation")
    while master.packets:
        master.step()
    assert not client.peer.packets()
    assert not master.peer.packets()


def test_source_of_a_replication() -> None:
    """The database has what the conversation transfers; chunks are of 2 items."""
    backend = MemoryBackend()
    h = Harness(backend, cluster="conv")
    h.operate()
    packets = conversation("conv-storage-storage-replication")
    backend.begin(True)
    for packet in packets:
        if packet["name"] not in ("AddTransaction", "AddObject"):
            continue
        decoded = list(Decoder(1 << 20).feed(bytes.fromhex(packet["hex"])))
        _, _, args, _ = decoded[0]
        if packet["name"] == "AddTransaction":
            tid, user, description, extension, packed, ttid, oids, _ = args
            backend.add_transaction(
                tid,
                Transaction(user, description, extension, oids, packed, ttid, None),
            )
        else:
            oid, tid, compression, checksum, data, value_tid = args
            backend.add_object(oid, tid, (checksum, data, compression), value_tid)
    backend.commit()
    identification = bytes.fromhex(packets[0]["hex"])
    ((_, _, args, _),) = Decoder(1 << 20).feed(identification)
    h.tell_nodes((NodeType.STORAGE, args[2], 2, NodeState.RUNNING, args[4]))
    source = Replay(h.dial(), packets, "storage1>")
    while source.packets:
        source.step()
    assert not source.peer.packets()
