"""neolog: show the log files of nodes, merged by date.

Source: operations.md 9, T3 W28.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import sqlite3
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from logging import CRITICAL, DEBUG, ERROR, INFO, WARNING, getLevelName
from types import UnionType
from typing import Annotated, Any, TextIO, Union, get_args, get_origin

from neo.lib.config import Parser, UsageError, version
from neo.lib.exception import ConfigurationError
from neo.lib.logger import format_date
from neo.lib.node import format_nodes, nid_str, parse_nid
from neo.lib.protocol import (
    BY_CODE,
    AnswerRelockObject,
    Error,
    ErrorCode,
    NotifyNodeInformation,
    Packet,
    WireEnum,
)
from neo.scripts.logreader import (
    CONTROL,
    LogFile,
    PacketRecord,
    Record,
    Selection,
    merge,
)

Entry = Record | PacketRecord

LEVELS = {
    "debug": DEBUG,
    "info": INFO,
    "warning": WARNING,
    "error": ERROR,
    "critical": CRITICAL,
}
COLORS = {DEBUG: "34", INFO: "32", WARNING: "33", ERROR: "31", CRITICAL: "1;31"}
STORED = ("compression", "checksum", "data")  # consecutive fields
DATA_MAX = 1 << 28  # of one decompressed object
NO_RECORD = 1 << 62  # greater than any level
# Fields without a length of their own that hold no text.
BINARY = ("data", "extension")

EPILOG = """\
Without --level, --packet and --peer, all is shown. --level alone selects records of
text, and packets too if it is DEBUG. --packet and --peer select packets, and hide the
other records unless --level is given too. Files compressed by gzip, bzip2, xz or zstd
are recognised by their extension. Dates are local, but those inside packets are UTC.
"""


# --- options --------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    new = Parser(
        "neolog",
        usage="neolog [options] FILE...",
        description="Show the records and packets of log files, merged by date.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    new.add_argument("--version", action="version", version=f"neolog {version()}")
    add = new.add_argument
    add("files", nargs="+", metavar="FILE", help="A log file, possibly compressed.")
    add("-a", "--all", action="store_true", help="Show the arguments of packets.")
    add(
        "-A",
        "--decompress",
        action="store_true",
        help="Show the arguments of packets, with the data of objects decompressed.",
    )
    add(
        "-f",
        "--follow",
        action="store_true",
        help="Go on with what is written later, also after a rotation; Ctrl-C ends.",
    )
    add(
        "-F",
        "--flush",
        type=_pid,
        action="append",
        default=[],
        metavar="PID",
        help="With --follow: ask this process to write its log, after each pass. "
        "Can be repeated.",
    )
    add(
        "-s",
        "--sleep-interval",
        type=_interval,
        default=1.0,
        metavar="SECONDS",
        help="With --follow: time between two passes. The default is 1.",
    )
    group = new.add_argument_group("what is shown of an entry")
    add = group.add_argument
    add(
        "-c",
        "--color",
        action="store_true",
        help="Tell the level by a colour instead of a column.",
    )
    add(
        "-d",
        "--date",
        default="%F %T",
        metavar="FORMAT",
        help="Format of dates, as of strftime. Empty: no date.",
    )
    names = group.add_mutually_exclusive_group()
    names.add_argument(
        "-C", "--cluster", action="store_true", help="Show a node as CLUSTER/NID."
    )
    names.add_argument(
        "-N",
        "--no-nid",
        action="store_true",
        help="Show the name of the file instead of the node id.",
    )
    add(
        "--json",
        action="store_true",
        help="Show each entry as a JSON object on a line of its own. Identifiers, "
        "checksums and data are in hexadecimal.",
    )
    group = new.add_argument_group("which entries are shown")
    add = group.add_argument
    add(
        "-n",
        "--node",
        action="append",
        default=[],
        metavar="NAME",
        help="Only those whose column of nodes is NAME. Can be repeated. "
        "A dash hides the column.",
    )
    add(
        "--nid",
        type=_nid,
        action="append",
        default=[],
        metavar="NID",
        help="Only those of this node id, such as S1. Can be repeated.",
    )
    add(
        "--from",
        type=_date,
        default=-float("inf"),
        dest="start",
        metavar="DATE",
        help="Not older than this date: seconds since 1970, or seconds before now if "
        "negative, or text such as '2026-11-22 15:44'.",
    )
    add(
        "--to",
        type=_date,
        default=float("inf"),
        dest="end",
        metavar="DATE",
        help="Not newer than this date.",
    )
    add(
        "--level",
        type=_level,
        metavar="LEVEL",
        help="Only records of this level or above: DEBUG, INFO, WARNING, ERROR, "
        "CRITICAL, or a number.",
    )
    add(
        "--packet",
        type=_codes,
        action="append",
        default=[],
        metavar="NAME",
        help="Only packets of this name or code; * stands for any characters. "
        "Can be repeated.",
    )
    add(
        "--peer",
        action="append",
        default=[],
        metavar="PEER",
        help="Only packets exchanged with this node id, host or address. "
        "Can be repeated.",
    )
    add(
        "--grep",
        type=_regex,
        metavar="REGEX",
        help="Only those whose text matches this regular expression.",
    )
    return new


def _pid(text: str) -> int:
    pid = int(text) if text.isascii() and text.isdigit() else 0
    if not pid:
        raise argparse.ArgumentTypeError(f"{text!r} is not a process id")
    return pid


def _interval(text: str) -> float:
    value = _number(text)
    if value is None or not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a positive number of seconds"
        )
    return value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _nid(text: str) -> int:
    try:
        return parse_nid(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _date(text: str) -> float:
    seconds = _number(text)
    if seconds is not None:
        return seconds if seconds >= 0 else time.time() + seconds
    try:
        return parse_date(text).timestamp()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a date") from None


def parse_date(text: str) -> datetime:
    """Date of a text in any usual form if dateutil is installed, else ISO 8601."""
    try:
        from dateutil.parser import parse
    except ImportError:
        return datetime.fromisoformat(text)
    return parse(text)


def _level(text: str) -> int:
    level = LEVELS.get(text.lower())
    if level is None:
        if not (text.isascii() and text.isdigit()):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a level: {', '.join(LEVELS).upper()} or a number"
            )
        level = min(int(text), NO_RECORD)
    return level


def _codes(text: str) -> tuple[int, ...]:
    try:
        return (min(max(int(text, 0), -1), NO_RECORD),)
    except ValueError:
        pattern = text.lower()
    codes = tuple(
        code
        for code, packet in BY_CODE.items()
        if fnmatchcase(packet.name.lower(), pattern)
    )
    if not codes:
        raise argparse.ArgumentTypeError(f"no packet is called {text!r}")
    return codes


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def selection(options: argparse.Namespace) -> Selection:
    """Which rows to read, as EPILOG says."""
    level, packets = options.level, bool(options.packet or options.peer)
    codes: tuple[int, ...] | None = None
    if options.packet:
        codes = tuple(sorted({code for codes in options.packet for code in codes}))
    elif level is not None and level > DEBUG and not packets:
        codes = ()
    if level is None and packets:
        level = NO_RECORD
    return Selection(options.start, options.end, level, codes)


# --- arguments of packets -------------------------------------------------------


def decompressed(packet: Packet[...] | None, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args` with (stored size, data) instead of (compression, checksum, data)."""
    if packet is None or not packet.valid(args):
        return args
    if packet is AnswerRelockObject and args[0] and args[0][2]:
        return ((*args[0][:2], _load(args[0][2])),)
    if STORED[0] not in packet.fields:
        return args
    i = list(packet.fields).index(STORED[0])
    return (*args[:i], *_load(args[i : i + 3]), *args[i + 3 :])


def _load(stored: tuple[Any, ...]) -> tuple[Any, ...]:
    compression, _, data = stored
    size = len(data)
    if compression:
        try:
            data = zlib.decompressobj().decompress(data, DATA_MAX)
        except zlib.error as error:
            return size, f"cannot decompress: {error}"
    return size, data


def plain(value: Any, hint: Any, name: str) -> Any:
    """`value` for JSON: ids, checksums and data in hexadecimal, other bytes as text."""
    if isinstance(value, WireEnum):
        return value.name
    hint = _alternative(hint, value)
    if isinstance(value, bytes):
        if get_origin(hint) is Annotated or name in BINARY:
            return value.hex()
        return value.decode("utf-8", "backslashreplace")
    types = get_args(hint)
    if isinstance(value, tuple):
        hints = types
        if len(types) != len(value):  # a sequence
            hints = (types[:1] or (None,)) * len(value)
        return [plain(v, h, name) for v, h in zip(value, hints, strict=True)]
    if isinstance(value, dict):
        key_hint, value_hint = types if len(types) == 2 else (None, None)
        return {
            str(plain(k, key_hint, "")): plain(v, value_hint, "")
            for k, v in value.items()
        }
    return value


def _alternative(hint: Any, value: Any) -> Any:
    """The type of a union that `value` may have."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    container = isinstance(value, tuple | dict)
    for each in get_args(hint):
        origin = get_origin(each)
        if (origin is not None and origin is not Annotated) is container and (
            each is not type(None)
        ):
            return each
    return None


# --- lines ----------------------------------------------------------------------


class Printer:
    """Makes the text of entries, and tells which are wanted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.show_node = "-" not in options.node
        self.nodes = [name for name in options.node if name != "-"]
        self.bodies = options.all or options.decompress

    def text(self, entry: Entry) -> str | None:
        """What to print, line ends included; None if the entry is not wanted."""
        options = self.options
        column = self.node(entry)
        if self.nodes and column not in self.nodes:
            return None
        if options.nid and entry.node[2] not in options.nid:
            return None
        level, color = "PACKET", None
        if isinstance(entry, Record):
            level = getLevelName(entry.level)
            color = COLORS.get(entry.level) if options.color else None
            lines = entry.message.splitlines() or [""]
        elif options.peer and _peer_names(entry.peer).isdisjoint(options.peer):
            return None
        else:
            lines = self.packet(entry)
        if options.grep and not any(map(options.grep.search, lines)):
            return None
        if options.json:
            return json.dumps(self.json(entry, column)) + "\n"
        prefix = self.prefix(entry.date, level, column)
        start, end = (f"\x1b[{color}m", "\x1b[0m") if color else ("", "")
        return "".join(
            f"{start}{prefix}{CONTROL.sub(_escape, line)}{end}\n" for line in lines
        )

    def node(self, entry: Entry) -> str:
        """Content of the column of nodes."""
        name, cluster, nid = entry.node
        text = str(name or entry.file.name)
        if nid is not None and not self.options.no_nid:
            text = nid_str(nid)
        return f"{cluster}/{text}" if self.options.cluster and cluster else text

    def prefix(self, date: float, level: str, column: str) -> str:
        """What comes before each line."""
        style = self.options.date
        text = f"{format_date(date, style)} " if style else ""
        if not self.options.color:
            text += f"{level:9} "
        if self.show_node:
            text += f"{CONTROL.sub(_escape, column):10} "
        return text

    def packet(self, entry: PacketRecord) -> list[str]:
        """Lines that describe a packet."""
        packet = entry.packet
        name = packet.name if packet else f"UnknownPacket[{entry.code}]"
        line = f"#0x{entry.msg_id:04x} {name:30} {entry.peer}"
        if not self.bodies and packet not in (Error, NotifyNodeInformation):
            return [line]
        try:
            args = entry.arguments()
        except (ValueError, sqlite3.Error) as error:
            return [line, f" ! cannot decode the arguments: {error}"]
        if args is None:
            return [line]
        if self.options.decompress:
            args = decompressed(packet, args)
        if self.bodies:
            line += f"\t| {args!r}"
        return [line, *(f" ! {more}" for more in _content(packet, args))]

    def json(self, entry: Entry, column: str) -> dict[str, Any]:
        """An entry for programs."""
        _, cluster, nid = entry.node
        result: dict[str, Any] = {
            "date": entry.date,
            "level": "PACKET",
            "node": column,
            "cluster": cluster,
            "nid": None if nid is None else nid_str(nid),
        }
        if isinstance(entry, Record):
            result["level"] = getLevelName(entry.level)
            result["pathname"] = entry.pathname
            result["lineno"] = entry.lineno
            result["message"] = entry.message
            return result
        direction, peer, address = (*entry.peer.split(" ", 2), "", "")[:3]
        packet = entry.packet
        result["direction"] = "sent" if direction == ">" else "received"
        result["peer"] = None if peer == "None" else peer
        result["address"] = address.strip("()")
        result["msg_id"] = entry.msg_id
        result["code"] = entry.code
        result["packet"] = packet.name if packet else None
        if self.bodies or packet in (Error, NotifyNodeInformation):
            result |= self._json_arguments(entry)
        return result

    def _json_arguments(self, entry: PacketRecord) -> dict[str, Any]:
        try:
            args = entry.arguments()
        except (ValueError, sqlite3.Error) as error:
            return {"undecodable": str(error)}
        if args is None:
            return {"arguments": None}
        packet = entry.packet
        # Nothing is said about arguments that are not those of the packet.
        hints = packet.fields if packet and len(args) == packet.arity else {}
        if self.options.decompress:
            args = decompressed(packet, args)
            if STORED[0] in hints:
                hints = {
                    "size" if name == STORED[0] else name: hint
                    for name, hint in hints.items()
                    if name != STORED[1]
                }
        if len(hints) != len(args):
            return {"arguments": [plain(value, None, "") for value in args]}
        return {
            "arguments": {
                name: plain(value, hint, name)
                for (name, hint), value in zip(hints.items(), args, strict=True)
            }
        }


def _content(packet: Packet[...] | None, args: tuple[Any, ...]) -> list[str]:
    """Extra lines of the packets whose content is always shown."""
    if packet not in (Error, NotifyNodeInformation):
        return []
    if packet is None or not packet.valid(args):
        return [repr(args)]
    if packet is NotifyNodeInformation:
        return format_nodes(args[1]).splitlines()
    code, message = args
    name = ErrorCode(code).name if code in ErrorCode.__members__.values() else code
    return f"{name} ({message.decode('utf-8', 'backslashreplace')})".splitlines()


def _peer_names(peer: str) -> set[str]:
    """How one may call the peer of `> S1 (127.0.0.1:10000)`."""
    name, _, address = peer[2:].partition(" ")
    address = address.strip("()")
    host = address.rpartition(":")[0]
    return {name, address, host, host.strip("[]")}


def _escape(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


# --- command --------------------------------------------------------------------


def follow(
    files: list[LogFile], options: argparse.Namespace, output: Callable[[], None]
) -> None:
    """Call `output` again and again, until Ctrl-C."""
    pids = list(options.flush)
    while True:
        # Before the pass, so that it reads all of a file which is going to be left.
        rotated = [file.rotated() for file in files]
        output()
        for i, file in enumerate(files):
            if rotated[i]:
                try:
                    files[i] = LogFile(file.path)
                except ConfigurationError:  # rotated again; the next pass will do
                    continue
                file.close()
        for pid in list(pids):
            try:
                os.kill(pid, signal.SIGRTMIN)
            except OSError as error:
                pids.remove(pid)
                print(f"neolog: process {pid}: {error.strerror}", file=sys.stderr)
        time.sleep(options.sleep_interval)


def run(options: argparse.Namespace, stream: TextIO) -> None:
    """Print what `options` select. Raises ConfigurationError, at the end if a part of a
    file can't be read.
    """
    files: list[LogFile] = []
    printer, what = Printer(options), selection(options)

    def output() -> None:
        for entry in merge(files, what):
            text = printer.text(entry)
            if text is not None:
                stream.write(text)
        stream.flush()

    try:
        files += map(LogFile, options.files)
        if options.follow:
            follow(files, options, output)
        else:
            output()
            if complaints := [text for file in files for text in file.complaints]:
                raise ConfigurationError("; ".join(complaints))
    finally:
        for file in files:
            file.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = parser().parse_args(argv)
        if options.flush and not options.follow:
            raise UsageError("--flush needs --follow (try --help)")
        run(options, sys.stdout)
    except ConfigurationError as error:
        print(f"neolog: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 0 if options and options.follow else 130
    except BrokenPipeError:
        # What is still buffered must not be written, and complained about, at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as done:  # --help, --version
        return int(done.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
