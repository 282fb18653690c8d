"""RECOVERING: find the storages needed to start, and the newest partition table.

Source: behaviour 2.4. The election takes place meanwhile (election.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from neo.lib.connection import Connection
from neo.lib.exception import ProtocolError
from neo.lib.handler import denied
from neo.lib.node import Node, nid_str, nid_type
from neo.lib.protocol import (
    AskPartitionTable,
    AskRecovery,
    CellState,
    ClusterState,
    NodeState,
    NodeType,
    Ping,
    Ptid,
    Rows,
    SendPartitionTable,
    Tid,
    Truncate,
    UInt,
)
from neo.lib.util import format_address

from . import policy
from .election import Election, Secondary
from .phase import NOT_RESILIENT, Claim, PrimaryPhase, Storage
from .verification import Verifying

if TYPE_CHECKING:
    from .app import Master


# Tables that storages which are absent may have got after the newest one found. (Those
# that they got while commits waited for others to write them are not known here.)
UNKNOWN_TABLES = 1000
# By how much a master that may live makes the wait for storages longer.
SILENT_MASTER = 12.0
LOOK_AGAIN = 0.5  # seconds


class Answer(NamedTuple):
    """AnswerRecovery."""

    ptid: int | None
    backup_tid: bytes | None
    truncate_tid: bytes | None


class Recovering(PrimaryPhase):
    """Wait for the storage nodes needed to start, and learn the newest table."""

    state = ClusterState.RECOVERING
    successors = frozenset({ClusterState.VERIFYING, ClusterState.STOPPING, None})
    keeps_lost = True

    def __init__(self, master: Master) -> None:
        super().__init__(master)
        self.storage = RecoveringStorage(self)
        self.election = Election(master, self._master_found_dead)
        self.answers: dict[Node, Answer] = {}
        self.asked: dict[Node, None] = {}  # they owe us an answer
        self.best: int | None = None  # greatest ptid seen
        self.source: Node | None = None  # asked for its table
        self.spares: list[Node] = []  # they have the same one
        self.loaded = False
        self.backup_tid: bytes | None = None
        self.awaited = ""  # what for, as told to people
        # Masters that have not confirmed yet, since the last storage came, that they
        # follow us.
        self._unsure: dict[Connection, None] | None = None
        self._enough_since: float | None = None  # storages to go on without the others
        self._will_look = False
        self._loading = False

    def enter(self) -> None:
        master = self.master
        master.clear_table()
        self.take_storages()
        master.tell_state()
        master.send_table(NodeType.ADMIN)
        for node in master.nodes.identified(NodeType.STORAGE):
            self._ask(node)
        self.election.start()
        if master.phase is self:
            self.advance()

    def leave(self) -> None:
        self.election.stop()

    # --- other masters ----------------------------------------------------------------

    def accepted(self, conn: Connection, nid: int, your_nid: int) -> None:
        """Another master accepted us: it is the primary."""
        winner = self.master.know_master(conn.address)
        if winner is None:
            raise ProtocolError("unknown master")
        self.election.active = False
        self.election.links.pop(winner, None)
        secondary = Secondary(self.master, winner, conn)
        self.master.become(secondary)
        secondary.accepted(conn, nid, your_nid)

    def master_claims(self, conn: Connection, claim: Claim) -> bool:
        if self.election.accepts(claim):
            return True
        assert claim.address is not None
        winner = self.master.know_master(claim.address)
        conn.close("it is primary")
        if winner is not None:
            self.election.lose(winner)
        return False

    def master_lost(self, node: Node) -> None:
        if self.election.active:
            self.election.learnt()

    def _master_found_dead(self) -> None:
        if self.election.active:
            self.advance()

    # --- storages ---------------------------------------------------------------------

    def soon_better(self, claim: Claim) -> bool:
        return claim.kind is NodeType.CLIENT

    def storage_state(self, node: Node | None) -> NodeState:
        return NodeState.PENDING

    def joined(self, node: Node, conn: Connection) -> None:
        master = self.master
        if node.type is NodeType.MASTER:
            self.election.joined(node)
            if master.phase is self:
                self.advance()
        elif node.type is NodeType.ADMIN:
            pt = master.pt
            conn.notify(SendPartitionTable, pt.ptid, pt.replicas, pt.as_rows())
        elif node.type is NodeType.STORAGE:
            master.watch(conn)
            self._unsure = None
            self._ask(node)
            self.advance()

    def _ask(self, node: Node) -> None:
        self.asked[node] = None
        node.connection.ask(AskRecovery)

    def answered(self, node: Node, answer: Answer) -> None:
        """What a storage remembers."""
        self.asked.pop(node, None)
        self.answers[node] = answer
        if answer.ptid is None:
            self.empty_storages[node.address] = None
        elif self.best is None or answer.ptid > self.best:
            self.best = answer.ptid
            self.loaded = False
            self.spares.clear()
            self._ask_table(node)
        elif answer.ptid == self.best and not self.loaded:
            if self.source is None:
                self._ask_table(node)
            elif self.source is not node:
                self.spares.append(node)
        elif self.loaded:
            self._note_truncation(answer)
        self.advance()

    def _ask_table(self, node: Node) -> None:
        self.source = node
        self.asked[node] = None
        node.connection.ask(AskPartitionTable)

    def table(self, node: Node, ptid: int | None, replicas: int, rows: Rows) -> None:
        """The partition table of a storage."""
        self.asked.pop(node, None)
        if self.source is node:
            self.source = None
        if ptid is not None and ptid == self.best and not self.loaded:
            self._load(node, ptid, replicas, rows)
        self.advance()

    def _load(self, node: Node, ptid: int, replicas: int, rows: Rows) -> None:
        for row in rows:
            for nid, state in row:
                if nid_type(nid) is not NodeType.STORAGE or (
                    state is CellState.DISCARDED
                ):
                    raise ProtocolError(f"invalid cell {nid_str(nid)} {state}")
        if not rows:
            raise ProtocolError("empty partition table")
        master = self.master
        master.pt.load(ptid, replicas, rows)
        self.loaded = True
        answer = self.answers[node]
        self.backup_tid = answer.backup_tid
        master.known_ptid = max(master.known_ptid, ptid)
        master.has_database = True
        for other in self.answers.values():
            self._note_truncation(other)
        master.members = dict.fromkeys(master.pt.nids())
        new = [
            master.nodes.add(NodeType.STORAGE, nid)
            for nid in master.members
            if master.nodes.by_nid(nid) is None
        ]
        master.tell_nodes(new)
        master.send_table(NodeType.ADMIN)
        master.log.info(
            "partition table %d of %s: %d partitions, %d replicas",
            ptid,
            nid_str(node.nid),
            len(rows),
            replicas,
        )
        # All of them, before anything goes on.
        self._loading = True
        master.identification.turn_spares_away()
        self._loading = False

    def _note_truncation(self, answer: Answer) -> None:
        """A truncation is pending as long as one up-to-date node has to do it."""
        tid = answer.truncate_tid
        if tid is not None and answer.ptid == self.best:
            master = self.master
            master.truncate_tid = min(tid, master.truncate_tid or tid)

    def storage_lost(self, node: Node) -> None:
        self.master.storage_down(node)
        self.asked.pop(node, None)
        self.answers.pop(node, None)
        if node in self.spares:
            self.spares.remove(node)
        if node is self.source:
            self.source = None
            if self.spares:
                self._ask_table(self.spares.pop(0))
        self.advance()

    # --- leaving ----------------------------------------------------------------------

    def start(self) -> None:
        """`neoctl start`. Raises Refused."""
        storages = self.master.nodes.identified(NodeType.STORAGE)
        if not storages:
            raise denied("Cannot exit recovery without any storage node")
        for node in storages:
            if node in self.asked:
                raise denied(
                    f"Cannot exit recovery now: node {nid_str(node.nid)}"
                    " is entering cluster"
                )
        self.master.startup_allowed = self.master.startup_forced = True

    def advance(self) -> None:
        """Leave if nothing is awaited any more."""
        if self._loading:
            return
        needed = self._needed()
        if isinstance(needed, str):
            awaited = needed
        elif any(node in self.asked for node in needed):
            awaited = "answers of " + _names(n for n in needed if n in self.asked)
        elif self._truncate_first():
            awaited = "storages to note the truncation"
        else:
            self._leave(needed)
            return
        if awaited != self.awaited:
            self.awaited = awaited
            self.master.log.info("recovery waits for %s", awaited)

    def _needed(self) -> list[Node] | str:
        """The storages to start with, or what is missing."""
        master = self.master
        pending = {
            node.nid: node
            for node in master.nodes.identified(NodeType.STORAGE)
            if self._holds_its_data(node)
        }
        if self.backup_tid is not None:
            return (
                "nothing that could come: the database is a backup, which is not"
                " available in this version"
            )
        if self.loaded:
            return self._needed_by_table(pending)
        if self.best is not None:
            return f"a storage with partition table {self.best}"
        storages = master.nodes.identified(NodeType.STORAGE)
        autostart = master.options.autostart
        if master.known_ptid:
            return f"a storage with a partition table: {master.known_ptid} was the last"
        if storages and master.startup_forced:
            return storages
        if master.has_database:
            return (
                "a storage with a partition table: there was one; or an administrator"
                " to create a new cluster"
            )
        if autostart:
            if len(storages) >= autostart:
                return storages
            missing = autostart - len(storages)
            return f"{missing} storages to create a new cluster, or an administrator"
        return "storages, and an administrator to start the cluster"

    def _holds_its_data(self, node: Node) -> bool:
        """False for one whose database was erased: its cells must be late."""
        answer = self.answers.get(node)
        return (
            node in self.asked
            or answer is None
            or answer.ptid is not None
            or not self.master.is_member(node.nid)
        )

    def _needed_by_table(self, pending: Mapping[int | None, Node]) -> list[Node] | str:
        master, pt = self.master, self.master.pt
        for partition, nids in enumerate(pt.readable):
            if not any(nid in pending for nid in nids):
                return (
                    f"{' or '.join(map(self._describe, nids)) or 'nobody'}"
                    f", for partition {partition}"
                )
        readable = pt.readable_nids()
        wanted = pt.nids() if master.truncate_tid is not None else readable
        missing = [nid for nid in wanted if nid not in pending]
        newer = [
            nid
            for nids in master.carriers
            if not any(nid in pending for nid in nids)
            for nid in nids
        ]
        is_older = (pt.ptid or 0) < master.committed_ptid
        # Without who is missing, those that must truncate are not waited for either.
        asked = readable if missing else wanted
        those = [pending[nid] for nid in asked if nid in pending]
        if master.startup_forced:
            return those
        if not (newer or is_older) and (
            not missing
            or (master.startup_allowed and self._ran_alone())
            or (master.truncate_tid is None and self._waited_enough(pending))
        ):
            claimed = self._claimed(pending)
            if claimed:
                names = ", ".join(map(self._describe, claimed))
                return (
                    f"masters that are silent: they may still count on {names}, just"
                    " started"
                )
            return those
        missing = missing or list(dict.fromkeys(newer))
        if not missing:
            return (
                f"a storage with partition table {master.committed_ptid} or later"
                " (or for an administrator to start the cluster without)"
            )
        return (
            f"{', '.join(map(self._describe, missing))}, which may have newer data"
            " (or for an administrator to start the cluster without)"
        )

    def _others(self) -> list[Node]:
        master = self.master
        return [
            node
            for node in master.nodes.of_type(NodeType.MASTER)
            if node is not master.node
        ]

    def _ran_alone(self) -> bool:
        """Have all other masters followed us since we lost operation?

        What they say proves it for the time before. A storage that is here when they
        say so is missed by whoever runs the cluster later.
        """
        followers = self.master.followers
        for node in self._others():
            if node.connection is None or node.connection is not followers.get(node):
                return False
        if self._unsure is None:
            self._unsure = {node.connection: None for node in self._others()}
            for conn in self._unsure:
                conn.ask(Ping).then(partial(self._follows, self._unsure, conn))
        return not self._unsure

    def _follows(self, unsure: dict[Connection, None], conn: Connection) -> None:
        del unsure[conn]
        if unsure is self._unsure and self.master.phase is self:
            self.advance()

    def _waited_enough(self, pending: Mapping[int | None, Node]) -> bool:
        """May those that are here go on without the others, now? See settling.py.

        The others can't have gone on alone. Whoever stops the cluster as a whole wants
        to find it as it was: then there is no hurry, and we wait.
        """
        master = self.master
        enough = (
            master.was_running
            and not self.asked
            and any(all(nid in pending for nid in row) for row in master.pt.rows)
        )
        now = master.runtime.monotonic()
        if not enough:
            self._enough_since = None
            return False
        limit = master.limits.absence_limit
        if self._others_are_silent():
            limit *= SILENT_MASTER
        if self._enough_since is None:
            self._enough_since = now
        if now - self._enough_since >= limit:
            return True
        self._look_later()
        return False

    def _claimed(self, pending: Mapping[int | None, Node]) -> list[int]:
        """Storages of which another master may think that they still follow it.

        They promised it before their process was restarted, for the time that it takes
        them to take a silent master for dead. See authority.py.
        """
        master = self.master
        if not self._others_are_silent():
            return []
        now = master.runtime.monotonic()
        promised = now - master.limits.silence_limit
        for nids in master.pt.readable:
            here = [nid for nid in nids if nid in pending]
            if all(pending[nid].extra.get("began", -inf) > promised for nid in here):
                self._look_later()
                return here
        return []

    def _others_are_silent(self) -> bool:
        """Is there a master that neither follows us nor is known not to run?"""
        return any(
            node.connection is None and node not in self.election.dead
            for node in self._others()
        )

    def _look_later(self) -> None:
        if not self._will_look:
            self._will_look = True
            self.master.runtime.call_later(LOOK_AGAIN, self._look_again)

    def _look_again(self) -> None:
        self._will_look = False
        if self.master.phase is self:
            self.advance()

    def _describe(self, nid: int) -> str:
        node = self.master.nodes.by_nid(nid)
        if node is not None and node.address is not None:
            return f"{nid_str(nid)} ({format_address(node.address)})"
        return nid_str(nid)

    def _truncate_first(self) -> bool:
        """All must have noted on disk where they truncate, before anybody does."""
        tid = self.master.truncate_tid
        if tid is None or not self.loaded:
            return False
        waiting = False
        for node in self.master.nodes.identified(NodeType.STORAGE):
            answer = self.answers.get(node)
            if node in self.asked:
                waiting = True
            elif answer and (answer.truncate_tid is None or answer.truncate_tid > tid):
                node.connection.notify(Truncate, tid)
                self._ask(node)
                waiting = True
        return waiting

    def _leave(self, needed: list[Node]) -> None:
        master, nodes = self.master, self.master.nodes
        self.election.stop()
        changed = []
        if self.loaded:
            # What was acknowledged so far is in what this table calls readable, unless
            # an administrator gives it up.
            ptid = master.pt.ptid or 0
            if master.startup_forced:
                master.carriers = ()
            else:
                ptid = max(ptid, master.committed_ptid)
            master.committed_ptid = ptid
            joining = [
                node
                for node in nodes.identified(NodeType.STORAGE)
                if master.is_member(node.nid)
            ]
        else:
            joining = needed
        for node in joining:
            node.state = NodeState.RUNNING
            changed.append(node)
        for node in nodes.of_type(NodeType.MASTER):
            if node is not master.node and node.connection is None:
                if node.state is not NodeState.DOWN:
                    changed.append(node)
                node.state = NodeState.DOWN
        master.tell_nodes(changed)
        if self.loaded:
            running = {
                nid: None
                for nid, node in nodes.running().items()
                if self._holds_its_data(node)
            }
            self._leave_behind(running)
        else:
            self._create(needed)
        for node in nodes.of_type(NodeType.STORAGE):
            if node.connection is None and not master.is_member(node.nid):
                master.forget(node)  # it came, and left, during the recovery
        master.become(Verifying(master))

    def _leave_behind(self, running: Mapping[int, Node | None]) -> None:
        """Who is absent, or has lost its data, must not be taken for up to date."""
        master, pt = self.master, self.master.pt
        here = master.nodes.running()
        absent = [nid for nid in pt.nids() if nid not in here]
        assert pt.ptid is not None
        ptid = max(pt.ptid, master.known_ptid)
        if any(nid not in running for nid in pt.readable_nids()):
            ptid += UNKNOWN_TABLES
        if ptid != pt.ptid:
            # Never two tables with the same number.
            pt.load(ptid, pt.replicas, pt.as_rows())
            master.send_table(NodeType.ADMIN)
        cells = policy.outdate(pt.rows, running, None)
        if absent and master.truncate_tid is not None:
            # An administrator starts without them. Nothing will tell them later what to
            # delete, so their data are of no use: they must be added anew.
            dropped = policy.drop(pt.rows, absent, pt.replicas)
            if dropped is not None:
                cells = dropped
                for nid in absent:
                    master.members.pop(nid, None)
                    master.log.warning(
                        "%s is dropped: it is not there to truncate", nid_str(nid)
                    )
        if not cells and absent:
            # Whoever has this version has taken part in all that follows: a truncation
            # that an absent node has in mind is older.
            master.change_table([], pt.replicas, kinds=(NodeType.ADMIN,))
        else:
            master.change_table(cells, kinds=(NodeType.ADMIN,))

    def _create(self, storages: list[Node]) -> None:
        master = self.master
        paths = {
            node.nid: node.extra.get("devpath", ())
            for node in storages
            if node.nid is not None
        }
        options = master.options
        rows, resilient = policy.create(options.partitions, options.replicas, paths)
        if not resilient:
            master.log.warning(NOT_RESILIENT)
        master.known_ptid = 1
        master.pt.load(1, options.replicas, [list(row.items()) for row in rows])
        master.members = dict.fromkeys(master.pt.nids())
        master.send_table(NodeType.ADMIN)
        master.log.info("new database on %s", _names(storages))

    def describe(self) -> list[str]:
        return [f"recovery waits for {self.awaited}"]

    def check(self) -> None:
        for node in (*self.asked, *self.answers, *self.spares):
            assert node.connection is not None, node
        assert self.source is None or self.source in self.asked, self.source


def _names(nodes: Iterable[Node]) -> str:
    return ", ".join(nid_str(node.nid) for node in nodes)


class RecoveringStorage(Storage):
    """A storage in RECOVERING."""

    def __init__(self, phase: Recovering) -> None:
        super().__init__(phase.master)
        self.phase = phase

    def answer_recovery(
        self,
        conn: Connection,
        ptid: Ptid | None,
        backup_tid: Tid | None,
        truncate_tid: Tid | None,
    ) -> None:
        assert conn.node is not None
        self.phase.answered(conn.node, Answer(ptid, backup_tid, truncate_tid))

    def answer_partition_table(
        self, conn: Connection, ptid: Ptid | None, num_replicas: UInt, rows: Rows
    ) -> None:
        assert conn.node is not None
        self.phase.table(conn.node, ptid, num_replicas, rows)
