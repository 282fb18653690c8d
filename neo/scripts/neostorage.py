"""neostorage: run a storage node."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from neo.lib.config import Settings
from neo.lib.epoll import EpollRuntime
from neo.lib.exception import ConfigurationError
from neo.scripts import daemon


def build(runtime: EpollRuntime, settings: Settings) -> daemon.Application:
    """Open the database and make the node."""
    from neo.storage.app import StorageNode, StorageOptions  # --help needs no node
    from neo.storage.database import open_backend

    masters, save_masters = daemon.known_masters(settings, runtime.log)
    backend = open_backend(
        settings.adapter,
        settings.database,
        engine=settings.engine,
        wait=settings.wait,
        dedup=settings.dedup,
    )
    return StorageNode(
        runtime,
        backend,
        StorageOptions(
            cluster=settings.cluster,
            bind=settings.bind,
            advertise=settings.advertise,
            masters=masters,
            nid=settings.nid,
            new_nid=settings.new_nid,
            reset=settings.reset,
            disable_pack=settings.disable_pack,
            disable_drop_partitions=settings.disable_drop_partitions,
            max_refusals=settings.max_refusals,
            replication_rate=settings.replication_rate,
            limits=settings.limits,
            save_masters=save_masters,
        ),
    )


def check(settings: Settings) -> None:
    """Refuse what can't be opened. Raises ConfigurationError."""
    if settings.adapter == "Importer":
        raise ConfigurationError(
            "adapter Importer is not available in this version: use neomigrate"
        )
    if settings.adapter == "SQLite":
        check_sqlite(settings)
    else:
        check_mysql(settings)
    if settings.new_nid and settings.reset:
        raise ConfigurationError("new-nid and reset exclude each other")


def check_sqlite(settings: Settings) -> None:
    """What SQLite does not know."""
    if settings.database == ":memory:":
        raise ConfigurationError(
            "database :memory: would lose everything at exit: give the path of a file"
        )
    if settings.engine:
        raise ConfigurationError(
            f"engine {settings.engine} is for MySQL, the adapter is {settings.adapter}"
        )


def check_mysql(settings: Settings) -> None:
    """The connection string and the driver."""
    from neo.storage.database.mysql_driver import choose_driver, parse_location

    try:
        parse_location(settings.database)
        choose_driver(settings.adapter)
    except ConfigurationError as e:
        # Who gave a file maybe wants SQLite, and did not know the default.
        where = settings.origins["adapter"]
        raise ConfigurationError(f"{e} (adapter {settings.adapter}: {where})") from e


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    return daemon.main(
        "neostorage",
        "Run a storage node of a NEO cluster, in the foreground.",
        daemon.STORAGE,
        build,
        argv,
        check_more=check,
    )


if __name__ == "__main__":
    sys.exit(main())
