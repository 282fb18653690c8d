"""What nodes answer to a client: a value, a refusal, or nothing any more."""

from __future__ import annotations

from typing import Any

from neo.lib.exception import NeoError
from neo.lib.protocol import ErrorCode


class Refusal(NeoError):
    """A storage or the master answered with an error; `code` is an ErrorCode."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{error_name(code)}: {text}" if text else error_name(code))
        self.code = code
        self.text = text


def error_name(code: int) -> str:
    """Name of an error code, or its number."""
    return ErrorCode(code).name if code in set(ErrorCode) else str(code)


class Answer:
    """Outcome of a request: `value` (the arguments), or `code` and `text`.

    `code` is None if the connection was lost, or if the answer is good.
    """

    __slots__ = ("code", "done", "text", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: tuple[Any, ...] | None = None
        self.code: int | None = None
        self.text = ""

    def set(self, *args: Any) -> None:
        """The answer came."""
        self.value = args
        self.done = True

    def fail(self, code: int | None, text: str) -> None:
        """An error came, or the connection is gone."""
        self.code, self.text = code, text
        self.done = True

    @property
    def lost(self) -> bool:
        """Whether the connection broke before the answer."""
        return self.value is None and self.code is None
