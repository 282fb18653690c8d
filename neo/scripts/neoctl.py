"""neoctl: send a command to an admin node, and print its answer.

Exit status: 0 success, 1 refused or impossible (one line on stderr), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import re
import struct
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, ParamSpec

from neo.lib.config import (
    ADMIN_PORT,
    LOG_AND_TLS,
    Parser,
    add_options,
    address,
    check_tls,
)
from neo.lib.connection import Connection
from neo.lib.epoll import EpollRuntime
from neo.lib.exception import ConfigurationError, NeoError
from neo.lib.handler import Handler
from neo.lib.logger import Logger
from neo.lib.node import (
    format_date,
    format_nodes,
    format_partition_table,
    format_rows,
    nid_str,
    node_order,
    parse_nid,
)
from neo.lib.protocol import (
    READABLE,
    ZERO_TID,
    AddPendingNodes,
    AskCheck,
    AskClusterState,
    AskLastIDs,
    AskMonitorInformation,
    AskNodeList,
    AskPartitionList,
    AskPrimary,
    AskRecovery,
    CellState,
    CheckReplicas,
    ClusterState,
    ErrorCode,
    FlushLog,
    NodeRow,
    NodeState,
    NodeType,
    Packet,
    Ping,
    Repair,
    SetClusterState,
    SetNodeState,
    SetNumReplicas,
    Truncate,
    TweakPartitionTable,
)
from neo.lib.tls import TLS
from neo.lib.util import (
    Address,
    datetime_from_tid,
    format_address,
    p64,
    tid_from_time,
    u64,
)

P = ParamSpec("P")

DEFAULT_ADMIN = f"127.0.0.1:{ADMIN_PORT}"
PATIENCE = 10.0  # seconds, for the greeting of an admin: it comes at once
POLL_INTERVAL = 0.2  # seconds, while --wait looks at the cluster
RUNNING = (ClusterState.RUNNING, ClusterState.BACKINGUP)


class CommandError(NeoError):
    """The command failed: one line for stderr, exit status 1."""


class LostError(CommandError):
    """The connection to the admin is gone."""


class UnsupportedError(CommandError):
    """The admin, or the primary, does not know the request."""


class LateError(CommandError):
    """What was waited for did not happen in time."""


class NotReadyError(CommandError):
    """Later, maybe."""


# --- the connection ---------------------------------------------------------------


class Tool(Handler):
    """A connection to an admin node, for one request after the other."""

    def __init__(self, runtime: EpollRuntime, admin: Address) -> None:
        super().__init__()
        self.runtime = runtime
        self.admin = admin
        self.conn: Connection | None = None
        self.answered = False

    def _connection(self) -> Connection:
        if self.conn is None or self.conn.closed:
            self.runtime.connection_succeeded(self.admin)
            self.conn = conn = self.runtime.connect(self.admin, self)
            conn.trust()

            def give_up() -> None:
                if not conn.is_greeted:
                    conn.close("no answer")

            self.runtime.call_later(PATIENCE, give_up)
            while not (conn.is_greeted or conn.closed):
                self.runtime.turn()
        return self.conn

    def ask(self, packet: Packet[P], *args: P.args, **_: P.kwargs) -> Any:
        """Arguments of the answer; the text, for an acknowledgement.

        Raises CommandError: refused, or the admin can't be reached.
        """
        conn = self._connection()
        if conn.closed:
            hint = "is neoadmin running there? see --address"
            if conn.is_established and self.runtime.tls is None:
                hint += ", or --ca if it requires TLS"
            raise LostError(
                f"ERROR: not connected to admin {format_address(self.admin)}:"
                f" {conn.reason} ({hint})"
            )
        answers: list[tuple[int | None, Any]] = []
        conn.ask(packet, *args, **_).then(
            lambda *answer: answers.append((ErrorCode.ACK, answer)),
            lambda code, text: answers.append((code, text)),
        )
        while not answers:
            self.runtime.turn()
        code, answer = answers[0]
        if code == ErrorCode.ACK:
            self.answered = True
            return answer
        if code is None:
            raise LostError(f"ERROR: Connection closed: {answer}")
        if code == ErrorCode.PROTOCOL_ERROR and not self.answered:
            where = format_address(self.admin)
            raise CommandError(f"ERROR: {where} is probably no admin node: {answer}")
        if code == ErrorCode.PROTOCOL_ERROR:
            raise UnsupportedError(answer or "ERROR: not understood by the admin node")
        if code == ErrorCode.NOT_READY:
            raise NotReadyError(f"ERROR: {answer}")
        raise CommandError(answer or f"ERROR: {code}")

    def text(self, packet: Packet[P], *args: P.args, **_: P.kwargs) -> str:
        """Text of the acknowledgement."""
        return str(self.ask(packet, *args, **_)[0])

    def nodes(self, kind: NodeType | None = None) -> list[NodeRow]:
        """Rows of nodes."""
        rows: Sequence[NodeRow] = self.ask(AskNodeList, kind)[0]
        return [row for row in rows if kind is None or row[0] is kind]

    def state(self) -> ClusterState | None:
        """State of the cluster; None if it can't be known now."""
        try:
            state: ClusterState | None = self.ask(AskClusterState)[0]
        except CommandError:
            return None
        return state

    def wait(self, timeout: float, condition: Callable[[], bool], what: str) -> None:
        """Return once `condition()`. Raises CommandError after `timeout` seconds."""
        late: list[bool] = []
        timer = self.runtime.call_later(timeout, lambda: late.append(True))
        while not condition():
            if late:
                raise LateError(f"{what}: not after {timeout:g} s")
            tick: list[bool] = []
            self.runtime.call_later(POLL_INTERVAL, lambda t=tick: t.append(True))  # type: ignore[misc]
            while not tick:
                self.runtime.turn()
        timer.cancel()


# --- arguments ----------------------------------------------------------------------


def tid(text: str) -> bytes:
    """`tid:<integer>` or a UNIX time. Raises ArgumentTypeError."""
    try:
        if text.lower().startswith("tid:"):
            return p64(int(text[4:], 0))
        return tid_from_time(float(text))
    except (ValueError, OverflowError, OSError, struct.error):
        raise argparse.ArgumentTypeError(
            f"invalid TID {text!r}: expected tid:<integer> or a UNIX time"
        ) from None


def nid(text: str) -> int:
    """A node id such as S1."""
    try:
        return parse_nid(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """A number that is not negative."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 0")
    return int(text)


def upper(names: Sequence[str]) -> Callable[[str], str]:
    """One of these names, in any case."""

    def parse(text: str) -> str:
        if text.upper() in names:
            return text.upper()
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(n.lower() for n in names)}"
        )

    return parse


def partition(text: str) -> tuple[int | None, int | None] | bytes:
    """PARTITION:REFERENCE, both may be empty; or a TID."""
    number, colon, reference = text.partition(":")
    if number.lower() == "tid" or re.fullmatch(r"\d+\.\d*|\d{6,}", text):
        return tid(text)
    if not colon:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected PARTITION:REFERENCE, such as 0:S1, 0: or :"
        )
    return count(number) if number else None, nid(reference) if reference else None


# --- commands -----------------------------------------------------------------------


def date(value: bytes) -> str:
    """Decimal date of a tid, UTC."""
    return str(datetime_from_tid(value).replace(tzinfo=None))


def print_ids(tool: Tool, args: argparse.Namespace) -> Any:
    ptid, backup_tid, _ = tool.ask(AskRecovery)
    last_tid, last_oid, _ = tool.ask(AskLastIDs)
    last_tid, last_oid = last_tid or ZERO_TID, last_oid or ZERO_TID
    if args.json:
        return {
            "backup_tid": backup_tid and backup_tid.hex(),
            "last_oid": last_oid.hex(),
            "last_tid": last_tid.hex(),
            "last_ptid": ptid,
        }
    first = (
        f"last_oid = {u64(last_oid):#x}"
        if backup_tid is None
        else f"backup_tid = {u64(backup_tid):#x} ({date(backup_tid)})"
    )
    return (
        f"{first}\nlast_tid = {u64(last_tid):#x} ({date(last_tid)})\nlast_ptid = {ptid}"
    )


def print_pt(tool: Tool, args: argparse.Namespace) -> Any:
    if args.max and args.min >= args.max:
        raise CommandError(f"no partition from {args.min} to before {args.max}")
    ptid, replicas, rows = tool.ask(AskPartitionList, args.min, args.max, args.node)
    if args.node is not None:
        rows = [[cell for cell in row if cell[0] == args.node] for row in rows]
    if args.json:
        return {
            "ptid": ptid,
            "replicas": replicas,
            "first_partition": args.min,
            "partitions": [
                {nid_str(number): state.name for number, state in row} for row in rows
            ],
        }
    states = {row[2]: row[3] for row in tool.nodes(NodeType.STORAGE) if row[2]}
    if args.node is not None:
        states = {n: state for n, state in states.items() if n == args.node}
    first = args.min if args.min or args.max else None
    text = format_partition_table(ptid, replicas, rows, states, first)
    pending = [nid_str(n) for n, s in states.items() if s is NodeState.PENDING]
    if pending:
        text += f"\npending: {', '.join(pending)}"
    return text


def print_node(tool: Tool, args: argparse.Namespace) -> Any:
    kind = NodeType[args.type] if args.type else None
    rows = tool.nodes(kind)
    if args.json:
        return [
            {
                "nid": nid_str(row[2]) if row[2] else None,
                "type": row[0].name,
                "address": row[1] and format_address((row[1][0].decode(), row[1][1])),
                "state": row[3].name,
                "since": format_date(row[4]) if row[4] else None,
            }
            for row in sorted(rows, key=node_order)
        ]
    return format_nodes(rows)


def print_cluster(tool: Tool, args: argparse.Namespace) -> Any:
    state = tool.ask(AskClusterState)[0]
    return {"state": state and state.name} if args.json else str(state)


def print_primary(tool: Tool, args: argparse.Namespace) -> Any:
    number = nid_str(tool.ask(AskPrimary)[0])
    return {"primary": number} if args.json else number


def print_summary(tool: Tool, args: argparse.Namespace) -> Any:
    warning, problem, text = tool.ask(AskMonitorInformation)
    lists = {"warning": warning, "problem": problem}
    severity = {
        name: [item and item.decode() for item in items]
        for name, items in lists.items()
        if items
    }
    args.status = 0
    if args.check:
        args.status = 2 if problem else 1 if warning else 0
    if args.json:
        return {**severity, "summary": text.decode()}
    return f"# {json.dumps(severity)}\n{text.decode()}"


def set_cluster(tool: Tool, args: argparse.Namespace) -> Any:
    return change_state(tool, args, ClusterState[args.state])


def start(tool: Tool, args: argparse.Namespace) -> Any:
    return change_state(tool, args, ClusterState.VERIFYING)


def change_state(tool: Tool, args: argparse.Namespace, state: ClusterState) -> str:
    """Request a state, and with --wait return once it is reached."""
    if args.wait is None:
        return tool.text(SetClusterState, state) or "Cluster state changed"
    if state is ClusterState.STOPPING:
        tool.text(SetClusterState, state)
        tool.wait(args.wait, lambda: tool.state() is None, "stopped")
        return "Cluster stopped"
    if state is not ClusterState.VERIFYING:
        tool.text(SetClusterState, state)
        tool.wait(args.wait, lambda: tool.state() is state, "state reached")
    else:
        start_soon(tool, args.wait)
        tool.wait(args.wait, lambda: tool.state() in RUNNING, "state reached")
    return f"Cluster state changed: {tool.state()}"


def start_soon(tool: Tool, timeout: float) -> None:
    """Start the cluster, now or when the storages that just came are ready for it."""
    refusals = [""]

    def accepted() -> bool:
        if tool.state() in (*RUNNING, ClusterState.VERIFYING):
            return True
        try:
            tool.text(SetClusterState, ClusterState.VERIFYING)
        except NotReadyError as error:
            refusals.append(str(error))
        except CommandError as error:
            if not str(error).startswith("Cannot exit recovery"):
                raise
            refusals.append(str(error))
        else:
            return True
        return False

    try:
        tool.wait(timeout, accepted, "started")
    except CommandError as error:
        text = f"{error}: {refusals[-1]}" if refusals[-1] else str(error)
        raise CommandError(text) from None


def set_replicas(tool: Tool, args: argparse.Namespace) -> Any:
    text = tool.text(SetNumReplicas, args.replicas)
    return text or f"Number of replicas: {args.replicas}. Now run: neoctl tweak"


def set_node(tool: Tool, args: argparse.Namespace) -> Any:
    return tool.text(SetNodeState, args.nid, NodeState[args.state]) or "state changed"


def kill(tool: Tool, args: argparse.Namespace) -> Any:
    return tool.text(SetNodeState, args.nid, NodeState.DOWN) or "state changed"


def drop(tool: Tool, args: argparse.Namespace) -> Any:
    return tool.text(SetNodeState, args.nid, NodeState.UNKNOWN) or "state changed"


def storages(tool: Tool, args: argparse.Namespace) -> list[int]:
    """Storages named on the command line, all of them for `all`; they must exist."""
    known = [row[2] for row in tool.nodes(NodeType.STORAGE) if row[2] is not None]
    if args.nids == ["all"]:
        return known
    try:
        wanted = [parse_nid(text) for text in args.nids]
    except ConfigurationError as error:
        raise CommandError(str(error)) from None
    missing = [nid_str(number) for number in wanted if number not in known]
    if missing:
        raise CommandError(f"no such storage node: {', '.join(missing)}")
    return wanted


def add(tool: Tool, args: argparse.Namespace) -> Any:
    nids = storages(tool, args)
    states = {row[2]: row[3] for row in tool.nodes(NodeType.STORAGE)}
    text = tool.text(AddPendingNodes, nids) or "No node added"
    already = [n for n in nids if states.get(n) is not NodeState.PENDING]
    if args.nids != ["all"] and already:
        text += f" ({', '.join(map(nid_str, already))}: not pending)"
    if len(already) == len(nids):
        return text
    if args.wait is not None:
        tool.wait(
            args.wait,
            lambda: all(
                row[3] is NodeState.RUNNING
                for row in tool.nodes(NodeType.STORAGE)
                if row[2] in nids
            ),
            "nodes running",
        )
    return f"{text}. Now run: neoctl tweak"


def tweak(tool: Tool, args: argparse.Namespace) -> Any:
    nids = storages(tool, args) if args.nids else []
    changed, rows = tool.ask(TweakPartitionTable, args.dry_run, nids)
    if args.wait is not None and not args.dry_run:
        tool.wait(args.wait, lambda: balanced(tool, nids), "all cells up to date")
    if args.json:
        return {
            "changed": changed,
            "partitions": [{nid_str(n): s.name for n, s in row} for row in rows],
        }
    if not changed:
        return "No change done."
    states = {row[2]: row[3] for row in tool.nodes(NodeType.STORAGE) if row[2]}
    return format_rows(rows, states)


def balanced(tool: Tool, aside: Collection[int]) -> bool:
    """Whether no cell is being replicated or about to be dropped.

    A storage that is left aside because it is down keeps its cells, OUT_OF_DATE, until
    it is dropped.
    """
    rows = tool.ask(AskPartitionList, 0, 0, None)[2]
    return all(
        state is CellState.UP_TO_DATE
        or (nid in aside and state is CellState.OUT_OF_DATE)
        for row in rows
        for nid, state in row
    )


def check(tool: Tool, args: argparse.Namespace) -> Any:
    rows = tool.ask(AskPartitionList, 0, 0, None)[2]
    wanted: dict[int, int | None] = {}
    tids = [item for item in args.partitions if isinstance(item, bytes)]
    if len(tids) > 2:
        raise CommandError("at most two TIDs are expected: the first and the last")
    first = args.min or (tids[0] if tids else ZERO_TID)
    last = args.max or (tids[1] if len(tids) > 1 else None)
    pairs = [item for item in args.partitions if not isinstance(item, bytes)]
    for number, reference in pairs or [(None, None)]:
        numbers = range(len(rows)) if number is None else (number,)
        for one in numbers:
            if one >= len(rows):
                raise CommandError(
                    f"no partition {one}: there are {len(rows)}, counted from 0"
                )
            if reference is not None and not any(
                n == reference and state in READABLE for n, state in rows[one]
            ):
                raise CommandError(
                    f"{nid_str(reference)} has no readable copy of partition {one}"
                )
            wanted[one] = reference
    replicated(tool, REPLICATION_WAIT if args.wait is None else args.wait)
    cells: list[tuple[Any, ...]] = []
    order = list(wanted)
    for start in range(0, len(order), CHECKED_AT_ONCE):
        some = {n: wanted[n] for n in order[start : start + CHECKED_AT_ONCE]}
        try:
            cells += tool.ask(AskCheck, some, first, last, args.repair)[0]
        except (UnsupportedError, LostError):
            if start or args.repair:
                raise
            text = tool.text(CheckReplicas, wanted, first, last)
            return text or f"Check of {len(wanted)} partitions requested: see the logs"
    return checked(args, len(wanted), cells)


CHECKED_AT_ONCE = 8  # partitions
REPLICATION_WAIT = 30.0  # seconds


def replicated(tool: Tool, timeout: float) -> None:
    """Let running storages get what they lack, but not for ever."""

    def settled() -> bool:
        running = {
            row[2]
            for row in tool.nodes(NodeType.STORAGE)
            if row[3] is NodeState.RUNNING
        }
        rows = tool.ask(AskPartitionList, 0, 0, None)[2]
        return not any(
            state is CellState.OUT_OF_DATE and number in running
            for row in rows
            for number, state in row
        )

    with contextlib.suppress(LateError):  # the check will tell
        tool.wait(timeout, settled, "replicated")


KINDS = ("missing", "extra", "different", "damaged", "repaired")


def checked(
    args: argparse.Namespace, partitions: int, cells: Sequence[tuple[Any, ...]]
) -> Any:
    """Results of a check, of what is not in order. Sets the exit status."""
    result = []
    wrong = 0
    for number, n, *counts, problems in cells:
        left = sum(counts[:-1]) - counts[-1] > 0 or bool(problems)
        wrong += left
        if left or counts[-1]:
            row = {"partition": number, "nid": nid_str(n)}
            row |= dict(zip(KINDS, counts, strict=True))
            row["problems"] = [text.decode(errors="replace") for text in problems]
            result.append(row)
    args.status = 1 if wrong else 0
    if args.json:
        return {"partitions": partitions, "cells": len(cells), "wrong": result}
    lines = [
        f"partition {row['partition']}, {row['nid']}: "
        + ", ".join(
            [f"{row[kind]} {kind}" for kind in KINDS if row[kind]] + row["problems"]
        )
        for row in result
    ]
    if wrong:
        lines.append(f"{wrong} of {len(cells)} cells are not in order")
        if not args.repair:
            lines.append(
                "To repair: neoctl check --repair; PARTITION:REFERENCE tells who is"
                " right where they are different"
            )
    elif lines:
        lines.append(f"{len(cells)} cells of {partitions} partitions are in order now")
    else:
        lines.append(f"{len(cells)} cells of {partitions} partitions are in order")
    return "\n".join(lines)


def remove(tool: Tool, args: argparse.Namespace) -> Any:
    """Empty storages, stop them, and forget them. It can be repeated at any point."""
    nids = storages(tool, args)
    timeout = 3600.0 if args.wait is None else args.wait

    def replaced() -> bool:
        rows = tool.ask(AskPartitionList, 0, 0, None)[2]
        others = [[state for n, state in row if n not in nids] for row in rows]
        return all(row and all(state in READABLE for state in row) for row in others)

    rows = tool.ask(AskPartitionList, 0, 0, None)[2]
    if any(n in nids for row in rows for n, _ in row):
        tool.ask(TweakPartitionTable, False, nids)
        tool.wait(timeout, replaced, "all data on other storages")
    for number in nids:
        states = {row[2]: row[3] for row in tool.nodes(NodeType.STORAGE)}
        if states.get(number) is NodeState.RUNNING:
            tool.text(SetNodeState, number, NodeState.DOWN)
        tool.text(SetNodeState, number, NodeState.UNKNOWN)
    return f"removed: {', '.join(map(nid_str, nids))}"


def truncate(tool: Tool, args: argparse.Namespace) -> Any:
    last = tool.ask(AskLastIDs)[0] or ZERO_TID
    what = (
        f"all transactions after {args.tid.hex()} ({date(args.tid)}) up to {last.hex()}"
    )
    if args.dry_run:
        return f"Would remove {what}"
    if (
        sys.stdin.isatty()
        and not args.yes
        and input(f"Remove {what}? [y/N] ").lower() not in ("y", "yes")
    ):
        raise CommandError("nothing done")
    text = tool.text(Truncate, args.tid)
    if args.wait is not None:
        tool.wait(args.wait, lambda: tool.state() in RUNNING, "running again")
    return text or "Truncation requested"


def prune_orphan(tool: Tool, args: argparse.Namespace) -> Any:
    text = tool.text(Repair, storages(tool, args), args.dry_run == "1")
    return text or "Requested: see the logs of the storages"


def flush(tool: Tool, args: argparse.Namespace) -> Any:
    tool.ask(AskClusterState if args.strict else Ping)
    assert tool.conn is not None
    tool.conn.notify(FlushLog)
    tool.ask(Ping)  # a barrier: the admin has passed it on
    return "Logs are being written"


# --- command line -------------------------------------------------------------------

DESCRIPTION = """\
Send one command to an admin node of a NEO cluster and print its answer.
TIDs are written tid:<integer> (0x... too) or as a UNIX time.
"""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "neoctl",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-a", "--address", default=DEFAULT_ADMIN, metavar="HOST:PORT",
        help=f"admin node (default: {DEFAULT_ADMIN})",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    add_options(parser, LOG_AND_TLS)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", parser_class=Parser
    )

    def command(
        name: str,
        run: Callable[[Tool, argparse.Namespace], Any],
        text: str,
        *,
        wait: bool = False,
        parent: Any = commands,
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = parent.add_parser(
            name, help=text, description=text[:1].upper() + text[1:] + "."
        )
        sub.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON"
        )
        if wait:
            sub.add_argument(
                "--wait", type=float, nargs="?", const=3600.0, metavar="SECONDS",
                help="wait until it is done, at most SECONDS (default: an hour)",
            )  # fmt: skip
        sub.set_defaults(run=run, wait=None)
        return sub

    def group(name: str, text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=None, group=sub)
        return sub.add_subparsers(title="what", metavar="WHAT", parser_class=Parser)

    show = group("print", "show ids, pt, node, cluster, primary or summary")
    command("ids", print_ids, "show the last ids", parent=show)
    sub = command("pt", print_pt, "show the partition table", parent=show)
    sub.add_argument("min", type=count, nargs="?", default=0, help="first partition")
    sub.add_argument("max", type=count, nargs="?", default=0, help="end, exclusive")
    sub.add_argument("node", type=nid, nargs="?", help="only cells of this node")
    sub = command("node", print_node, "show the nodes", parent=show)
    sub.add_argument(
        "type", nargs="?", type=upper([kind.name for kind in NodeType]),
        help="master, storage, client or admin",
    )  # fmt: skip
    command("cluster", print_cluster, "show the state of the cluster", parent=show)
    command("primary", print_primary, "show the primary master", parent=show)
    sub = command("summary", print_summary, "show the health", parent=show)
    sub.add_argument(
        "--check", action="store_true",
        help="exit status: 0 all is well, 1 warning, 2 problem",
    )  # fmt: skip

    change = group("set", "change the state of the cluster or a node, or replicas")
    sub = command(
        "cluster", set_cluster, "request a state of the cluster", wait=True,
        parent=change,
    )  # fmt: skip
    sub.add_argument("state", type=upper([state.name for state in ClusterState]))
    sub = command("node", set_node, "change the state of a node", parent=change)
    sub.add_argument("nid", type=nid)
    sub.add_argument("state", type=upper([state.name for state in NodeState]))
    sub = command(
        "replicas", set_replicas, "change the number of replicas", parent=change
    )
    sub.add_argument("replicas", type=count)

    command("start", start, "start the cluster", wait=True)
    sub = command("add", add, "make pending storages members", wait=True)
    sub.add_argument("nids", nargs="+", metavar="all|NID")
    sub = command("tweak", tweak, "balance the partitions over storages", wait=True)
    sub.add_argument("-n", "--dry-run", action="store_true", help="only show it")
    sub.add_argument("nids", nargs="*", metavar="NID", help="storages to be left aside")
    sub = command("kill", kill, "stop a storage or a secondary master")
    sub.add_argument("nid", type=nid)
    sub = command("drop", drop, "remove a storage for ever")
    sub.add_argument("nid", type=nid)
    sub = command("remove", remove, "empty storages, then remove them", wait=True)
    sub.add_argument("nids", nargs="+", metavar="NID")
    sub = command(
        "check", check, "compare replicas; exit status 1 if they differ", wait=True
    )
    sub.add_argument(
        "partitions",
        nargs="*",
        type=partition,
        metavar="PARTITION:REFERENCE",
        help="such as 0:S1, 0: or : for all; then a first and a last TID, maybe",
    )
    sub.add_argument(
        "--repair",
        action="store_true",
        help="fetch what is missing or damaged from other replicas; with a REFERENCE,"
        " make them as it is",
    )
    sub.add_argument("--min", type=tid, help="first TID")
    sub.add_argument("--max", type=tid, help="last TID")
    sub = command(
        "truncate", truncate, "remove all transactions after a TID", wait=True
    )
    sub.add_argument("tid", type=tid)
    sub.add_argument("-n", "--dry-run", action="store_true", help="tell, do nothing")
    sub.add_argument("--yes", action="store_true", help="do not ask")
    sub = command("prune_orphan", prune_orphan, "delete unreferenced raw data")
    sub.add_argument("dry_run", choices=("0", "1"), help="1: only count")
    sub.add_argument("nids", nargs="+", metavar="all|NID")
    for name in ("flush_log", "flush"):
        sub = command(name, flush, "make all nodes write their logs")
        sub.add_argument(
            "--strict", action="store_true", help="fail if there is no primary master"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
        if getattr(args, "run", None) is None:
            getattr(args, "group", parser).print_help()
            return 2 if hasattr(args, "group") else 0
        admin = address(ADMIN_PORT)(args.address)
        paths = check_tls(
            *(getattr(args, name, None) for name in ("ca", "cert", "key"))
        )
        tls = TLS(*paths) if paths else None
        logfile = getattr(args, "logfile", None)
        log = Logger(logfile, name="neoctl", everything=True, console=False)
    except ConfigurationError as error:
        return fail(error, 2)
    runtime = EpollRuntime(log, tls)
    try:
        result = args.run(Tool(runtime, admin), args)
    except CommandError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return 130
    finally:
        runtime.close()
        log.close()
    if not args.quiet:
        try:
            if args.json and isinstance(result, str):
                result = {"message": result}
            print(json.dumps(result, indent=1) if args.json else result, flush=True)
        except BrokenPipeError:
            return silence()
    return getattr(args, "status", 0)


def silence() -> int:
    """The reader of our output left."""
    sys.stdout = open("/dev/null", "w")  # noqa: SIM115  # for the interpreter's end
    return 1


def fail(error: Exception, status: int) -> int:
    """Say what is wrong."""
    text = str(error).rstrip()
    found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", text)
    if found:
        near = difflib.get_close_matches(found[1], re.findall(r"'(.*?)'", found[2]), 1)
        text = f"invalid command: {found[1]}" + (
            f": did you mean {near[0]}?" if near else f": choose from {found[2]}"
        )
    print(text if status == 1 else f"neoctl: {text}", file=sys.stderr)
    return status


def run() -> NoReturn:
    """Entry point of `python -m neo.scripts.neoctl`."""
    sys.exit(main())


if __name__ == "__main__":
    run()
