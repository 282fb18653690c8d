"""New oids, which the primary master gives in blocks. Source: behaviour.md 9.6."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from neo.lib.protocol import AskNewOIDs
from neo.lib.util import add64

if TYPE_CHECKING:
    from .app import ClientApp

OIDS_BLOCK = 100
OIDS_LOW = 25  # ask the next block when no more are left
RANGES_MAX = 100  # of oids that former primaries gave


class Oids:
    """Oids in stock, and which ones were given."""

    def __init__(self, app: ClientApp) -> None:
        self.app = app
        self._stock: deque[bytes] = deque()
        self._asked = False
        # Ranges, both ends included: of oids that this session's master gave, and
        # former ones.
        self._given: list[tuple[bytes, bytes]] = []
        self._former: list[tuple[bytes, bytes]] = []

    def master_lost(self) -> None:
        """What is in stock may be given to somebody else by the next primary."""
        self._stock.clear()
        self._asked = False
        self._former = (self._former + self._given)[-RANGES_MAX:]
        self._given.clear()

    def new(self) -> bytes:
        """An oid that nobody else gets."""
        app = self.app
        app.connect()
        while not self._stock:
            self._ask()
            self._wait(app.session)
            app.connect()
        oid = self._stock.popleft()
        if len(self._stock) == OIDS_LOW:
            self._ask()
        return oid

    def _wait(self, session: int) -> None:
        app = self.app
        app.runtime.wait(
            lambda: self._stock or not self._asked or app.session != session,
            () if app.master is None else (app.master,),
        )

    def _ask(self) -> None:
        app = self.app
        if self._asked or app.exclusive or app.master is None:
            if app.exclusive:
                app.usable_master()
            return
        self._asked = True

        def done(oids: Sequence[bytes]) -> None:
            self._asked = False
            given = self._given
            if given and oids and add64(given[-1][1], 1) == oids[0]:
                given[-1] = given[-1][0], oids[-1]
            elif oids:
                given.append((oids[0], oids[-1]))
            if self._former:
                oids = [oid for oid in oids if not self.is_former(oid)]
            self._stock.extend(oids)

        def failed(code: int | None, text: str) -> None:
            self._asked = False

        app.master.ask(AskNewOIDs, OIDS_BLOCK).then(done, failed)

    def is_former(self, oid: bytes) -> bool:
        """Whether a former primary gave this oid, which its successor gives again,
        maybe to somebody else: it knows those that are committed only.
        """
        return any(first <= oid <= last for first, last in self._former)
