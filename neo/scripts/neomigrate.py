"""neomigrate: copy a FileStorage to a NEO cluster, or a NEO cluster to a FileStorage.

Transactions keep their tids, metadata and undo pointers. A destination that holds the
beginning of the source is continued, any other one is refused: an interrupted copy is
resumed by the same command, and nothing is ever copied twice.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from types import FrameType
from typing import Any

from neo.lib.config import LOG_AND_TLS, Parser, add_options, check_tls, masters
from neo.lib.exception import ConfigurationError
from neo.lib.protocol import ZERO_TID
from neo.lib.util import add64, datetime_from_tid, format_address, time_from_tid

PROGRESS_INTERVAL = 1.0  # seconds


class Interruption:
    """While in use, SIGINT stops the copy between two transactions.

    The second one ends the process at once: what is copied is the beginning of the
    source in any case.
    """

    def __init__(self) -> None:
        self.wanted = False

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGINT, self._signalled)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            os.write(2, b"\nneomigrate: killed; the same command resumes\n")
            os._exit(130)
        self.wanted = True
        os.write(2, b"\nneomigrate: stopping; ^C again to stop at once\n")

    def look(self) -> None:
        """Raise KeyboardInterrupt if the copy shall stop."""
        if self.wanted:
            raise KeyboardInterrupt


class Source:
    """What `copyTransactionsFrom` reads: the transactions that are still to be copied.

    Counts them, and says on stderr how far it is.
    """

    def __init__(
        self,
        storage: Any,
        start: bytes | None,
        quiet: bool,
        interruption: Interruption,
    ) -> None:
        self.storage = storage
        self.interruption = interruption
        self.start = start
        self.quiet = quiet
        self.transactions = 0
        self.bytes = 0
        self._began = self._shown = time.monotonic()

    def getName(self) -> str:  # noqa: N802  # ZODB's name
        """As a storage."""
        return str(self.storage.getName())

    def iterator(self) -> Iterator[Any]:
        """As a storage."""
        last = time_from_tid(self.storage.lastTransaction())
        first = None
        with closing(self.storage.iterator(self.start)) as transactions:
            for transaction in transactions:
                self.interruption.look()
                now = time_from_tid(transaction.tid)
                first = now if first is None else first
                yield Counted(transaction, self)
                self.transactions += 1
                self._show((now - first) / (last - first) if last > first else 1.0)

    def _show(self, part: float) -> None:
        now = time.monotonic()
        if self.quiet or now < self._shown + PROGRESS_INTERVAL:
            return
        self._shown = now
        spent = now - self._began
        left = timedelta(seconds=int(spent / part - spent)) if part else "?"
        print(
            f"\r{part:6.1%}  {self.transactions} transactions"
            f"  {self.transactions / spent:.0f}/s  {self.bytes / spent / 1e6:.1f} MB/s"
            f"  {left} left ",
            end="",
            file=sys.stderr,
            flush=True,
        )


class Counted:
    """A transaction whose records are counted as they are read."""

    def __init__(self, transaction: Any, source: Source) -> None:
        self._transaction = transaction
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transaction, name)

    def __iter__(self) -> Iterator[Any]:
        for record in self._transaction:
            self._source.bytes += len(record.data or b"")
            yield record


def fingerprint(transaction: Any) -> tuple[Any, ...]:
    """What two copies of a transaction have in common."""
    return (
        transaction.tid,
        transaction.user,
        transaction.description,
        sorted((record.oid, record.data) for record in transaction),
    )


def fingerprint_at(storage: Any, tid: bytes) -> tuple[Any, ...] | None:
    """Fingerprint of one transaction; None if there is no such."""
    with closing(storage.iterator(tid, tid)) as transactions:
        for transaction in transactions:
            return fingerprint(transaction)
    return None


def resume(source: Any, destination: Any) -> bytes | None:
    """Tid to copy from; None: the beginning.

    Raises ConfigurationError if the destination is no beginning of the source.
    """
    last = destination.lastTransaction()
    if last == ZERO_TID:
        return None
    ours = fingerprint_at(source, last)
    if ours is not None and ours == fingerprint_at(destination, last):
        return add64(last, 1)
    raise ConfigurationError(
        f"{destination.getName()} is not empty, and its last transaction {last.hex()}"
        f" ({datetime_from_tid(last):%F %T}) is not in {source.getName()}:"
        " it is no copy of it that could be continued"
    )


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "neomigrate",
        description="Copy a FileStorage to a NEO cluster or the other way round. One of"
        " SOURCE and DESTINATION is the path of the FileStorage, the other one the list"
        " of masters of the cluster (host:port, separated by spaces). If SOURCE is an"
        " existing file, it is copied to NEO. A copy that was interrupted is resumed"
        " by the same command.",
    )
    add = parser.add_argument
    add("-c", "--cluster", required=True, metavar="NAME", help="name of the cluster")
    add("-q", "--quiet", action="store_true", help="print errors only")
    add("source", metavar="SOURCE")
    add("destination", metavar="DESTINATION")
    add_options(parser, LOG_AND_TLS)
    return parser


def open_neo(args: argparse.Namespace, addresses: str, read_only: bool) -> Any:
    """The cluster. Raises ConfigurationError."""
    from neo.client.Storage import Storage

    names = ("ca", "cert", "key")
    paths = check_tls(*(getattr(args, name, None) for name in names))
    credentials: dict[str, Any] = dict(zip(names, paths, strict=True)) if paths else {}
    found = masters(addresses)
    return Storage(
        master_nodes=" ".join(map(format_address, found)),
        name=args.cluster,
        read_only=read_only,
        logfile=getattr(args, "logfile", None),
        **credentials,
    )


def open_file(path: str, read_only: bool) -> Any:
    """A FileStorage. Raises ConfigurationError."""
    from ZODB.FileStorage import FileStorage
    from ZODB.FileStorage.FileStorage import FileStorageFormatError

    try:
        return FileStorage(path, read_only=read_only)
    except FileStorageFormatError as error:
        raise ConfigurationError(f"{path} is no FileStorage") from error
    except Exception as error:  # it raises many kinds
        raise ConfigurationError(f"cannot open FileStorage {path}: {error}") from error


def open_both(args: argparse.Namespace) -> tuple[Any, Any]:
    """(source, destination). Raises ConfigurationError."""
    if os.path.exists(args.source):
        source = open_file(args.source, True)
        try:
            return source, open_neo(args, args.destination, False)
        except Exception:
            source.close()
            raise
    folder = os.path.dirname(os.path.abspath(args.destination))
    if not os.path.isdir(folder):
        raise ConfigurationError(f"no such folder: {folder}")
    try:
        masters(args.source)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{args.source!r} is neither an existing FileStorage nor a list of masters"
            f" ({error})"
        ) from None
    source = open_neo(args, args.source, True)
    try:
        source.lastTransaction()  # before a file is created
        return source, open_file(args.destination, False)
    except Exception:
        source.close()
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    from ZODB.POSException import POSError

    try:
        args = build_parser().parse_args(argv)
    except ConfigurationError as error:
        print(f"neomigrate: {error}", file=sys.stderr)
        return 2
    try:
        source, destination = open_both(args)
        with closing(source), closing(destination):
            start = resume(source, destination)
            if not args.quiet:
                verb = "Migrating" if start is None else "Resuming the migration"
                print(f"{verb} from {args.source} to {args.destination}")
            began = time.monotonic()
            is_quiet = args.quiet or not sys.stderr.isatty()
            with Interruption() as interruption:
                rest = Source(source, start, is_quiet, interruption)
                destination.copyTransactionsFrom(rest)
            if not args.quiet:
                print(
                    f"Migration done in {time.monotonic() - began:.5g}"
                    f" ({rest.transactions} transactions, {rest.bytes} bytes)"
                )
    except (ConfigurationError, POSError, OSError) as error:
        print(f"neomigrate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nneomigrate: interrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
