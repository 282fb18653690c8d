"""neoadmin: run an admin node, which neoctl speaks to."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from neo.lib.config import Settings
from neo.lib.epoll import EpollRuntime
from neo.scripts import daemon


def build(runtime: EpollRuntime, settings: Settings) -> daemon.Application:
    """Make the node."""
    from neo.admin.app import Admin, AdminOptions  # --help needs no node

    masters, save_masters = daemon.known_masters(settings, runtime.log)
    return Admin(
        runtime,
        AdminOptions(
            cluster=settings.cluster,
            bind=settings.bind,
            advertise=settings.advertise,
            masters=masters,
            nid=settings.nid,
            limits=settings.limits,
            save_masters=save_masters,
        ),
    )


def check(settings: Settings) -> None:
    """Warn of options that have no effect yet."""
    if settings.monitor_email or settings.monitor_backup:
        settings.warnings.append("monitoring is not available in this version")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    return daemon.main(
        "neoadmin",
        "Run an admin node of a NEO cluster, in the foreground.",
        daemon.ADMIN,
        build,
        argv,
        check_more=check,
    )


if __name__ == "__main__":
    sys.exit(main())
