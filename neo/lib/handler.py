"""Handlers: what one kind of peer may say in one state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .exception import NeoError, ProtocolError
from .protocol import BY_CODE, ErrorCode, Packet, Pong

if TYPE_CHECKING:
    from .connection import Connection


class Refused(NeoError):
    """A refusal within the rules: becomes an Error packet, the connection is kept.

    `close`: the connection is closed after the packet, as NOT_READY wants.
    """

    def __init__(self, code: ErrorCode, text: str = "", close: bool = False) -> None:
        super().__init__(text)
        self.code = code
        self.close = close


def not_ready(text: str) -> Refused:
    """Refusal of a peer that should come again later, or go elsewhere."""
    return Refused(ErrorCode.NOT_READY, text, close=True)


def denied(text: str) -> Refused:
    """Refusal of an administrator's command."""
    return Refused(ErrorCode.DENIED, text)


class Handler:
    """What one kind of peer may say in one state.

    A method named as a packet (`ask_object`) gets it as `(conn, *arguments)`; what
    has no method is refused: PROTOCOL_ERROR and the connection is closed. A method may
    raise Refused. An instance serves any number of connections. `node` of the packet's
    sender is `conn.node`.
    """

    # code -> method: subclasses define methods, this is derived once for an instance.
    table: dict[int, tuple[Packet[...], Callable[..., None]]]

    def __init__(self) -> None:
        self.table = {
            code: (packet, getattr(self, packet.handler))
            for code, packet in BY_CODE.items()
            if packet.name != "Error" and hasattr(self, packet.handler)
        }

    def connected(self, conn: Connection) -> None:
        """The connection that we opened is established."""

    def closed(self, conn: Connection) -> None:
        """The connection is no more, or couldn't be made (`conn.established`).

        Called once, whoever closes; requests still pending fail right after.
        """

    def error(
        self, conn: Connection, packet: Packet[...] | None, code: int, text: str
    ) -> None:
        """Error to request `packet` that has no callback, or to nothing (None)."""
        if code not in (ErrorCode.ACK, ErrorCode.PROTOCOL_ERROR):
            raise ProtocolError(f"unexpected error {code}: {text}")
        conn.log.info("%s: error %s: %s", conn, code, text)

    def ping(self, conn: Connection) -> None:
        """Ping is answered in every state."""
        conn.answer(Pong)


class Closing(Handler):
    """Nothing is expected any more."""

    def __init__(self) -> None:
        super().__init__()
        self.table = {}

    def error(
        self, conn: Connection, packet: Packet[...] | None, code: int, text: str
    ) -> None:
        """Whatever it is, it is too late."""


def refuse(conn: Connection, msg_id: int, error: Refused) -> None:
    """Answer a request with the Error that `error` stands for."""
    conn.log.debug("%s: refused: %s %s", conn, error.code.name, error)
    conn.error(msg_id, error.code, str(error))
    if error.close:
        conn.abort()
