"""From older formats to the present one, a version at a time.

A database that runs DDL outside transactions may stop anywhere: each step can be
started again, and its version is stored after it. Source: storage-format.md, 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from neo.lib.exception import ConfigurationError

from . import schema

if TYPE_CHECKING:
    from .writer import SQLWriter


def migrate(db: SQLWriter, version: int) -> None:
    """Bring the tables of format `version` to `schema.VERSION`.

    Tables and indexes that are just missing are created by the caller.
    """
    for step in range(version + 1, schema.VERSION + 1):
        STEPS[step](db)
        db.set_config("version", str(step))


def _nullable_tid(db: SQLWriter) -> None:
    for table in "ttrans", "tobj":
        if db.columns(table) and db.fetch(f"SELECT 1 FROM {table} LIMIT 1"):
            raise ConfigurationError(
                "the database has unfinished transactions of an old version:"
                " start and stop the cluster with that version first"
            )
    db.execute("DROP TABLE IF EXISTS ttrans")


def _objects_by_oid(db: SQLWriter) -> None:
    rebuild(
        db,
        schema.OBJ,
        "SELECT partition, oid, tid, data_id, value_tid FROM obj"
        " ORDER BY partition, oid, tid",
    )


def _progress_in_partition_table(db: SQLWriter) -> None:
    if "tid" in db.columns("pt"):
        return  # restarted after the table was rebuilt, with the next step's layout
    rebuild(
        db,
        schema.PT,
        "SELECT rid, nid,"
        " CASE state WHEN 0 THEN -1 WHEN 2 THEN -2 WHEN 4 THEN -3 ELSE 0 END, NULL"
        " FROM pt",
    )


def _pack_in_partition_table(db: SQLWriter) -> None:
    db.set_config("partitions", None)
    if "pack" not in db.columns("pt"):
        rebuild(db, schema.PT, "SELECT partition, nid, tid, NULL FROM pt")
    db.create_table(schema.PT)
    # A database that never joined a cluster has no nid: no row is its own.
    db.execute(
        "UPDATE pt SET pack = 0 WHERE pack IS NULL"
        " AND nid = (SELECT value + 0 FROM config WHERE name = 'nid')"
    )


STEPS: dict[int, Callable[[SQLWriter], None]] = {
    1: _nullable_tid,
    2: _objects_by_oid,
    3: _progress_in_partition_table,
    4: _pack_in_partition_table,
}


def rebuild(db: SQLWriter, table: schema.Table, select: str) -> None:
    """Replace a table by a new one, filled with `select`."""
    new = f"new_{table.name}"
    if db.columns(table.name):
        db.execute(f"DROP TABLE IF EXISTS {new}")
        db.create_table(table, new)
        db.execute(f"INSERT INTO {new} {select}")
        db.execute(f"DROP TABLE {table.name}")
    if db.columns(new):
        db.execute(f"ALTER TABLE {new} RENAME TO {table.name}")
