"""neomaster: run a master node."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from neo.lib.config import Settings
from neo.lib.epoll import EpollRuntime
from neo.lib.exception import ConfigurationError
from neo.scripts import daemon


def build(runtime: EpollRuntime, settings: Settings) -> daemon.Application:
    """Make the node."""
    from neo.master.app import Master, MasterOptions  # --help needs no node

    masters, save_masters = daemon.known_masters(settings, runtime.log)
    return Master(
        runtime,
        MasterOptions(
            cluster=settings.cluster,
            bind=settings.bind,
            advertise=settings.advertise,
            masters=masters,
            nid=settings.nid,
            partitions=settings.partitions,
            replicas=settings.replicas,
            autostart=settings.autostart,
            limits=settings.limits,
            save_masters=save_masters,
        ),
    )


def check(settings: Settings) -> None:
    """Refuse contradictions. Raises ConfigurationError."""
    if settings.upstream_cluster == settings.cluster:
        raise ConfigurationError(
            f"upstream-cluster must differ from cluster: both are {settings.cluster!r}"
        )
    if settings.upstream_cluster and not settings.upstream_masters:
        raise ConfigurationError("upstream-cluster needs upstream-masters")
    if settings.upstream_masters and not settings.upstream_cluster:
        raise ConfigurationError("upstream-masters needs upstream-cluster")
    if settings.upstream_cluster or settings.backup:
        raise ConfigurationError("backup clusters are not available in this version")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    return daemon.main(
        "neomaster",
        "Run a master node of a NEO cluster, in the foreground.",
        daemon.MASTER,
        build,
        argv,
        check_more=check,
    )


if __name__ == "__main__":
    sys.exit(main())
