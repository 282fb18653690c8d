"""What the three daemons share: their options, how they start, and how they end.

A start-up error is one line on stderr and status 1 (2 for a mistake on the command
line); its traceback needs --debug. SIGTERM and SIGINT stop the node cleanly, the log is
written, the status is 0; a second signal kills at once. SIGHUP writes the log, for a
closed terminal is no reason to lose a node.
Source: operations.md 2, 10, T3 W2 and W24.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Protocol

from neo.lib.config import (
    ADMIN_PORT,
    LOG_AND_TLS,
    MASTER_PORT,
    MasterList,
    Option,
    Settings,
    UsageError,
    address,
    boolean,
    check_tls,
    choice,
    integer,
    limit_options,
    load,
    masters,
    number,
    path,
    wait_time,
)
from neo.lib.epoll import EpollRuntime
from neo.lib.exception import BackendError, ConfigurationError
from neo.lib.logger import Logger, install_signals
from neo.lib.node import parse_nid
from neo.lib.tls import TLS
from neo.lib.util import Address, format_address

_WILDCARDS = {"0.0.0.0", "::"}


def nid(value: str) -> int:
    """A node id: `S1`, or the integer itself, which is not 0."""
    try:
        result = int(value)
    except ValueError:
        return parse_nid(value)
    if not (result and -(1 << 31) <= result < 1 << 31):
        raise ConfigurationError(f"{value} is out of range")
    return result


# --- options -------------------------------------------------------------------


def _common(bind: str, bind_port: int | None, known_masters: Option) -> list[Option]:
    return [
        Option(
            "cluster",
            "Name of the cluster. Nodes of other clusters are refused.",
            short="c",
            metavar="NAME",
            required=True,
        ),
        known_masters,
        Option(
            "bind",
            "Address to listen on, also told to the other nodes.",
            address(bind_port),
            default=bind,
            short="b",
            metavar="ADDRESS",
        ),
        Option(
            "advertise",
            "Address told to the other nodes, if it is not the one of --bind.",
            address(0),
            metavar="ADDRESS",
        ),
        Option(
            "dynamic-master-list",
            "File where this process keeps the addresses of the masters it learns.",
            path,
            short="D",
            metavar="PATH",
            own=True,
        ),
        Option(
            "nid",
            "Propose this node id (for tests).",
            nid,
            short="i",
            metavar="NID",
            hidden=("-u", "--uuid"),
            own=True,
        ),
        *LOG_AND_TLS,
        Option(
            "tcp-only",
            "Accept connections on the address only, not also on the Unix socket that"
            " processes of the same machine prefer.",
            boolean,
        ),
        Option("debug", "Show the traceback of an error that ends the node.", boolean),
    ]


_MASTERS = Option(
    "masters",
    "Masters of the cluster: addresses separated by spaces.",
    masters,
    default=f"127.0.0.1:{MASTER_PORT}",
    short="m",
    metavar="ADDRESSES",
)

MASTER = (
    *_common(
        f"127.0.0.1:{MASTER_PORT}",
        None,
        Option(
            "masters",
            "Other masters of the cluster: addresses separated by spaces.",
            masters,
            default="",
            short="m",
            metavar="ADDRESSES",
            empty=True,
        ),
    ),
    Option(
        "replicas",
        "Copies of each object beyond the first; read when the database is created.",
        integer(0),
        default="0",
        short="r",
        metavar="N",
        group="creation",
    ),
    Option(
        "partitions",
        "Number of partitions, for ever; read when the database is created.",
        integer(1, 0xFFFFFFFF),
        default="100",
        short="p",
        metavar="N",
        group="creation",
    ),
    Option(
        "autostart",
        "Create the database by itself as soon as N storages are there.",
        integer(1),
        short="A",
        metavar="N",
        group="creation",
    ),
    Option(
        "upstream-cluster",
        "Name of the cluster to back up.",
        short="C",
        metavar="NAME",
        group="backup",
    ),
    Option(
        "upstream-masters",
        "Masters of the cluster to back up.",
        masters,
        short="M",
        metavar="ADDRESSES",
        group="backup",
    ),
    Option(
        "backup",
        "If the database is empty, back up from the first start on.",
        boolean,
        short="B",
        group="backup",
    ),
    *limit_options("M"),
)

STORAGE = (
    *_common("127.0.0.1", 0, _MASTERS),
    Option(
        "adapter",
        "Kind of database: SQLite, MySQL, MySQLdb, PyMySQL or Importer.",
        choice("Importer", "MySQL", "MySQLdb", "PyMySQL", "SQLite"),
        default="MySQL",
        short="a",
        metavar="NAME",
        group="database",
    ),
    Option(
        "database",
        "Where the database is: a file for SQLite, user:password@name for MySQL.",
        short="d",
        metavar="TEXT",
        required=True,
        secret=True,
        own=True,
        group="database",
    ),
    Option(
        "engine",
        "Engine of the MySQL tables: InnoDB or RocksDB.",
        choice("InnoDB", "RocksDB"),
        short="e",
        metavar="NAME",
        group="database",
    ),
    Option(
        "wait",
        "How long to wait for the database server; -1: for ever.",
        wait_time,
        default="0",
        short="w",
        metavar="SECONDS",
        group="database",
    ),
    Option(
        "dedup",
        "Store identical values once; read when the database is created.",
        boolean,
        group="database",
    ),
    Option("disable-pack", "Never process pack orders.", boolean, group="database"),
    Option(
        "disable-drop-partitions",
        "Never delete the rows of partitions that went to other storages.",
        boolean,
        group="database",
    ),
    Option(
        "replication-rate",
        "Megabytes per second that replications and checks get even while clients are"
        " active; else they take all that is idle.",
        number(0, above=True),
        default="4",
        metavar="MB",
        group="database",
    ),
    Option(
        "new-nid",
        "For a copied database: get a new node id from the running cluster, and exit.",
        boolean,
        command_line_only="it is for one start",
        group="database",
    ),
    Option(
        "reset",
        "Erase the database, create empty tables, and exit.",
        boolean,
        hidden=("-R",),
        command_line_only="it erases the database",
        group="database",
    ),
    Option(
        "max-refusals",
        "Exit with status 1 after the masters refused this node N times, for example"
        " because of the cluster name; 0: never.",
        integer(0),
        default="0",
        metavar="N",
        group="limits",
    ),
    *limit_options("S"),
)

ADMIN = (
    *_common(f"127.0.0.1:{ADMIN_PORT}", 0, _MASTERS),
    Option(
        "monitor-maxlag",
        "Warn of a backup that is more than so many seconds late.",
        number(0),
        default="0",
        metavar="SECONDS",
        group="monitoring",
    ),
    Option(
        "monitor-email",
        "Whom to write to; repeatable.",
        metavar="ADDRESS",
        repeatable=True,
        group="monitoring",
    ),
    Option(
        "monitor-backup",
        "Backup cluster to watch; repeatable.",
        metavar="NAME",
        repeatable=True,
        group="monitoring",
    ),
    Option(
        "smtp",
        "Mail server: host or host:port.",
        default="localhost",
        metavar="HOST",
        group="monitoring",
    ),
    Option("smtp-tls", "Speak TLS to the mail server.", boolean, group="monitoring"),
    Option(
        "smtp-auth",
        "Account on the mail server.",
        metavar="USER:PASSWORD",
        secret=True,
        group="monitoring",
    ),
    *limit_options("A"),
)

KNOWN = frozenset(option.key for option in (*MASTER, *STORAGE, *ADMIN))


def check(settings: Settings) -> None:
    """What no option can check alone; adds warnings. Raises ConfigurationError."""
    check_tls(settings.ca, settings.cert, settings.key)
    if settings.advertise is None:
        if settings.bind[0] in _WILDCARDS:
            settings.warnings.append(
                f"bind {format_address(settings.bind)} is told to the other nodes,"
                " which can't connect to it: set advertise"
            )
    elif settings.advertise[0] in _WILDCARDS:
        raise ConfigurationError(
            f"advertise: other nodes can't connect to {settings.advertise[0]}"
        )
    elif not settings.advertise[1]:
        settings.values["advertise"] = settings.advertise[0], settings.bind[1]


def known_masters(
    settings: Settings, log: Logger
) -> tuple[tuple[Address, ...], Callable[[list[Address]], object] | None]:
    """The masters to start with, and what to call when they change (or None)."""
    if settings.dynamic_master_list is None:
        return settings.masters, None
    file = MasterList(settings.dynamic_master_list, log.warning)
    return tuple(dict.fromkeys((*settings.masters, *file.load()))), file.save


# --- life of a process -----------------------------------------------------------


class Application(Protocol):
    """A node, as seen by the process that runs it."""

    def start(self) -> None:
        """Listen and connect. OSError if the address can't be used."""

    def shutdown(self) -> None:
        """Stop the node cleanly, then its runtime."""

    def dump(self) -> None:
        """Log the state of the node."""


Build = Callable[[EpollRuntime, Settings], Application]


def main(
    prog: str,
    description: str,
    options: Sequence[Option],
    build: Build,
    argv: Sequence[str] | None,
    *,
    check_more: Callable[[Settings], object] = lambda settings: None,
) -> int:
    """Run a node to its end; its exit status. `build` makes the node, not started."""
    try:
        settings = load(
            prog,
            options,
            argv,
            section=prog.removeprefix("neo"),
            description=description,
            known=KNOWN,
        )
        check(settings)
        check_more(settings)
    except ConfigurationError as e:
        return _fail(prog, e)
    if settings.check_only:
        for warning in settings.warnings:
            print(f"{prog}: warning: {warning}", file=sys.stderr)
        print(settings.describe())
        return 0
    try:
        log = Logger(settings.logfile)
        log.set_node(settings.cluster, None)
    except ConfigurationError as e:
        return _fail(prog, e)
    bridge = Bridge(log)
    logging.getLogger("neo").addHandler(bridge)
    try:
        for warning in settings.warnings:
            log.warning("%s", warning)
        return _run(settings, log, build)
    except (ConfigurationError, BackendError) as e:
        log.info("exit: %s", e)  # the console gets the line below
        return _fail(prog, e, settings.debug)
    except Exception as e:
        log.exception("internal error, please report")
        return _fail(prog, e)
    finally:
        logging.getLogger("neo").removeHandler(bridge)
        log.close()


def _run(settings: Settings, log: Logger, build: Build) -> int:
    stop = Stop()
    paths = check_tls(settings.ca, settings.cert, settings.key)
    tls = TLS(*paths) if paths else None
    runtime = EpollRuntime(log, tls, settings.tcp_only)
    node = build(runtime, settings)
    install_signals(log, lambda: runtime.call_soon_threadsafe(node.dump))
    try:
        node.start()
    except OSError as e:
        bind = format_address(settings.bind)
        raise ConfigurationError(f"cannot listen on {bind}: {e.strerror}") from e
    stop.started(node, runtime)
    return runtime.run()


class Bridge(logging.Handler):
    """Brings to the log what modules without Runtime say (the backends)."""

    def __init__(self, log: Logger) -> None:
        super().__init__(logging.INFO)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        self.log.log(record.levelno, "%s", record.getMessage())


class Stop:
    """What SIGTERM, SIGINT and SIGHUP do. Made by the main thread."""

    def __init__(self) -> None:
        self.asked = False
        self.node: Application | None = None
        for signum, handler in (
            (signal.SIGTERM, self.stop),
            (signal.SIGINT, self.stop),
            (signal.SIGHUP, self.flush),
        ):
            # Ignored by who started us (nohup, a background job): it stays so.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, handler)

    def started(self, node: Application, runtime: EpollRuntime) -> None:
        """From now on there is something to stop; the loop does it, between events."""
        self.runtime = runtime
        self.node = node

    def stop(self, signum: int, frame: FrameType | None) -> None:
        if self.node is None:
            raise SystemExit(0)  # nothing to undo yet
        if self.asked:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.asked = True
        self.runtime.call_soon_threadsafe(self.node.shutdown)

    def flush(self, signum: int, frame: FrameType | None) -> None:
        if self.node is not None:
            self.runtime.call_soon_threadsafe(self.runtime.log.flush)


def _fail(prog: str, error: Exception, debug: bool = False) -> int:
    if debug:
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
