"""`storage.app`: what tools written for neoppod find there.

Source: operations.md 12.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ZODB.Connection import TransactionMetaData

from neo.lib.protocol import ZERO_TID, NodeType, WaitForPack
from neo.lib.tls import TLS
from neo.lib.util import Address

from . import iterator as iteration

if TYPE_CHECKING:
    from .app import ClientApp
    from .Storage import Storage

PACK_DESCRIPTION = b"IStorage.pack"


class AppFacade:
    """`storage.app`. Source: operations.md 12.4."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.nm = _Nodes(storage)

    @property
    def _core(self) -> ClientApp:
        return self._storage._core

    @property
    def name(self) -> str:
        """Name of the cluster."""
        return self._core.options.cluster

    @property
    def ssl(self) -> TLS | None:
        """Not None if TLS is used."""
        return self._storage._tls

    @property
    def ssl_credentials(self) -> tuple[str, str, str] | None:
        """Paths: ca, cert, key."""
        return self._core.options.tls

    @property
    def last_tid(self) -> bytes | None:
        """Last tid known, None before the first connection."""
        return self._core.last_tid

    @property
    def wait_for_pack(self) -> bool:
        """Whether pack() returns once the pack is completed."""
        return self._core.wait_for_pack

    @wait_for_pack.setter
    def wait_for_pack(self, value: bool) -> None:
        self._core.wait_for_pack = value

    def oids(
        self,
        tid: bytes | None = None,
        min_oid: bytes | None = None,
        max_oid: bytes | None = None,
    ) -> Iterator[bytes]:
        """Ascending oids of the objects that have data as of `tid`."""
        runtime = self._storage._runtime
        slices = iteration.oids(self._core, tid, min_oid, max_oid)
        while True:
            with runtime:
                part = next(slices, None)
            if part is None:
                return
            yield from part

    def setPackOrder(
        self, transaction: Any, tid: bytes, oids: Iterable[bytes] | None = None
    ) -> None:
        """Attach a pack order to a transaction that is being committed."""
        txn = self._storage._transaction_of(transaction)
        txn.pack = None if oids is None else sorted(oids), tid

    def pack(self, tid: bytes, oids: Iterable[bytes] | None = None) -> None:
        """Commit a pack order; nothing happens if the database is empty."""
        storage = self._storage
        tid = min(tid, storage.lastTransaction())
        if tid == ZERO_TID:
            return
        transaction = TransactionMetaData(description=PACK_DESCRIPTION)
        storage.tpc_begin(transaction)
        try:
            self.setPackOrder(transaction, tid, oids)
            storage.tpc_vote(transaction)
            order = storage.tpc_finish(transaction)
        except BaseException:
            storage.tpc_abort(transaction)
            raise
        if self.wait_for_pack:
            with storage._runtime:
                self._core.ask_master(WaitForPack, order)
                self._core.cache.clear()


class _Nodes:
    """`storage.app.nm`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def getMasterList(self) -> list[_Master]:
        """The masters known."""
        with self._storage._runtime:
            nodes = self._storage._core.nm.of_type(NodeType.MASTER)
            return [_Master(n.address) for n in nodes if n.address is not None]


class _Master:
    def __init__(self, address: Address) -> None:
        self._address = address

    def getAddress(self) -> Address:
        """(host, port)."""
        return self._address
