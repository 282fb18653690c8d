"""Databases of storage nodes.

`interface` says what a node may ask of one; `open_backend` chooses it.
"""

from __future__ import annotations

from neo.lib.exception import ConfigurationError

from .interface import Backend


def open_backend(
    adapter: str,
    database: str,
    *,
    engine: str | None = None,
    wait: float = 0,
    dedup: bool = False,
    reset: bool = False,
) -> Backend:
    """Open the database of a storage node; create or migrate it if needed.

    `database` is the adapter's connection string (storage-format.md 2.3, 2.4). `engine`
    of new tables and `wait`, seconds of patience with a server that isn't there, are
    for MySQL. `dedup`: equal values are stored once, if tables are new. `reset`: drop
    all first. Raises ConfigurationError for what the operator can correct,
    DatabaseLocked if another process uses the database, BackendError for all else.
    """
    if adapter == "SQLite":
        from .sqlite import SQLiteBackend  # other adapters do without

        return SQLiteBackend(database, dedup, reset)
    if adapter in ("MySQL", "MySQLdb", "PyMySQL"):
        from .mysql import MySQLBackend

        return MySQLBackend(database, adapter, engine, wait, dedup, reset)
    raise ConfigurationError(f"adapter {adapter!r} is not available")
