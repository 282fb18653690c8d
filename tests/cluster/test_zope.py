"""A Zope site on NEO, unchanged; and the migration of an existing one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage

from neo.scripts import neomigrate

from .harness import Cluster
from .zope import Zope

ZCONFIG = """\
<NEOStorage>
     master_nodes {masters}
     name {name}
   </NEOStorage>"""


def zconfig(cluster: Cluster) -> str:
    return ZCONFIG.format(masters=cluster.master_nodes, name=cluster.name)


def restart_manually(cluster: Cluster) -> None:
    """The masters first, then the rest."""
    for name in sorted(cluster.processes, key=lambda name: name[0] != "m"):
        assert cluster.terminate(name) == 0
    cluster.start()


def restart_gracefully(cluster: Cluster) -> None:
    cluster.stop()
    cluster.start()


def test_site(tmp_path: Path) -> None:
    """Content is added, edited, undone, and survives restarts of the cluster."""
    with Cluster(tmp_path / "cluster", storages=2) as cluster:
        zope = Zope(str(tmp_path / "zope"), zconfig(cluster))
        zope.start()
        try:
            zope.add_folder("news")
            zope.add_document("news", "today", "Hello, <b>world</b>")
            assert zope.get("/news/today") == "Hello, <b>world</b>"
            zope.edit_document("/news/today", "edited")
            assert zope.get("/news/today") == "edited"
            zope.undo()
            assert zope.get("/news/today") == "Hello, <b>world</b>"
            for restart in (restart_manually, restart_gracefully):
                restart(cluster)
                # The running site goes on as if nothing had happened.
                assert zope.get("/news/today") == "Hello, <b>world</b>"
                zope.add_document("news", restart.__name__, "added after a restart")
            zope.stop()
            zope.start()
            for restart in (restart_manually, restart_gracefully):
                text = zope.get(f"/news/{restart.__name__}")
                assert text == "added after a restart"
        finally:
            zope.stop()


def content(storage: Any) -> list[Any]:
    """All that a storage holds."""
    return [
        (
            transaction.tid,
            transaction.status,
            transaction.user,
            transaction.description,
            transaction.extension,
            # The order of records in a transaction means nothing.
            sorted((r.oid, r.tid, r.data, r.data_txn) for r in transaction),
        )
        for transaction in storage.iterator()
    ]


@pytest.mark.parametrize("storages", [1, 3])
def test_migration(tmp_path: Path, storages: int) -> None:
    """Data.fs of a site goes to NEO and back, transaction by transaction."""
    zope = Zope(str(tmp_path / "zope"))
    zope.start()
    try:
        zope.add_folder("news")
        for i in range(3):
            zope.add_document("news", f"n{i}", f"text {i}")
        zope.edit_document("/news/n1", "edited")
        zope.undo()
    finally:
        zope.stop()
    with Cluster(tmp_path / "cluster", storages=storages) as cluster:
        back = str(tmp_path / "back.fs")
        for _ in range(2):  # the second time there is nothing left to copy
            for source, destination in (
                (zope.data_fs, cluster.master_nodes),
                (cluster.master_nodes, back),
            ):
                assert not neomigrate.main(["-q", "-c", "test", source, destination])
        original = FileStorage(zope.data_fs, read_only=True)
        copy = FileStorage(back, read_only=True)
        try:
            expected = content(original)
            assert any(record[3] for item in expected for record in item[5])  # undo
            assert content(copy) == expected
            with cluster.client() as neo:
                assert content(neo) == expected
        finally:
            original.close()
            copy.close()
        # The site runs on the copy.
        site = Zope(str(tmp_path / "zope2"), zconfig(cluster))
        site.start()
        try:
            assert site.get("/news/n1") == "text 1"
        finally:
            site.stop()
