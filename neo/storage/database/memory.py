"""A database in memory, for simulated nodes: SQLite's, with images for its disk."""

from __future__ import annotations

import sqlite3

from neo.lib.exception import BackendError

from .interface import CommitObserver
from .sqlite import SQLiteBase


class MemoryBackend(SQLiteBase):
    """See `interface.Backend`.

    image: what `image()` returned earlier, or the content of a database file.
    observer: hears of each commit, also of the one that opens the database.
    """

    def __init__(
        self,
        image: bytes | None = None,
        dedup: bool = False,
        reset: bool = False,
        observer: CommitObserver | None = None,
    ) -> None:
        connection = sqlite3.connect(
            ":memory:", isolation_level=None, check_same_thread=False
        )
        if image is not None:
            # Bytes 18 and 19 tell of WAL, which there isn't in memory.
            connection.deserialize(image[:18] + b"\1\1" + image[20:])
        super().__init__(connection, ":memory:")
        self._observer = observer
        self._durable = False
        self._share()
        try:
            self.open_database(dedup, reset)
        except BaseException:
            self.close()
            raise

    def image(self) -> bytes:
        """Everything that is committed. Costs a copy."""
        assert not self._writing
        return self._connection.serialize()

    def begin(self, durable: bool) -> None:
        super().begin(durable)
        self._durable = durable

    def commit(self) -> None:
        if self._observer is not None:
            try:
                self._observer.before_commit(self._durable)
            except OSError as e:
                raise BackendError(f"commit failed: {e}") from e
        super().commit()
        if self._observer is not None:
            self._observer.after_commit(self._durable)

    wants_checkpoint = False

    def checkpoint(self) -> None:
        """Nothing to do: there is no log."""

    def close(self) -> None:
        self._connection.close()
