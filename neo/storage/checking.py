"""Checks: a cell compares itself with its replicas, and repairs itself.

The master asks each cell (AskCheckCell); one after the other, a `Check` walks through
the transactions and the records of its partition in the order of the tids, asks a
replica for digests of the same range (AskDigests), and so finds what is *missing* here,
what is here only (*extra*), what is *different*, and values that are *damaged*, which
their checksums tell. All up to a tid: what is committed meanwhile is another matter.

To repair is to fetch, from a replica that has it right, what is missing or damaged:
the requests of replication, one for each item. What is different, or is here only, can
only be judged if there is a reference: then it becomes as it is there. The cell remains
readable all the time.

A damaged value that a client got, or a storage that replicates, is repaired at once
(NotifyDamaged): without an operator.

neoppod compares keys only, on one node for all (CheckPartition); so do we, with those
of its storages. Source: behaviour 7, storage-format 15 and 19 (19 to 21).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from neo.lib.connection import Connection, Reply
from neo.lib.node import Node, nid_str
from neo.lib.protocol import (
    FEATURE_CHECK,
    MAX_TID,
    ZERO_OID,
    AnswerCheckCell,
    AskCheckSerialRange,
    AskCheckTIDRange,
    AskDigests,
    AskFetchObjects,
    AskFetchTransactions,
    ErrorCode,
    NotifyPartitionCorrupted,
    Packet,
    Ping,
)
from neo.lib.util import add64

from .background import QUEUE
from .database.interface import Oid, Reader, Tid
from .digests import Key, digests, is_damaged
from .peers import explain
from .replication import add_items, delete_objects, wrong_object, wrong_transaction

if TYPE_CHECKING:
    from .operation import Operation

CHUNK = 1000  # items that a replica is asked to describe at a time
SLICE = 100  # items that are read at a time
FETCHES = 50  # items that are asked for at a time
QUEUE_MAX = 100_000  # checks that wait
COUNT_MAX = 100_000  # wrong items of one kind that are told apart
RETRY_DELAY = 0.2  # seconds, while what is needed is in use
RETRIES = 50
CONNECT_TRIES = 5

T = TypeVar("T")

#: What a task waits for: starts it, and calls what it is given with the result.
Step = Callable[[Callable[[Any], object]], object]
Steps = Generator[Step, Any, T]


class Failed(Exception):
    """A replica can't be compared with: the text says why."""


class Report:
    """What is wrong with a cell. Items are (is it an object?, key)."""

    def __init__(self) -> None:
        self.found: dict[str, dict[tuple[bool, Key], None]] = {
            kind: {} for kind in ("missing", "extra", "different", "damaged")
        }
        self.repaired: dict[tuple[bool, Key], None] = {}
        self.problems: list[str] = []
        self.compared: dict[int, None] = {}  # nids of replicas
        self.differing: dict[int, None] = {}  # those that differ from here

    def add(self, kind: str, of_objects: bool, keys: Iterable[Key]) -> None:
        """Count items."""
        found = self.found[kind]
        for key in keys:
            if len(found) >= COUNT_MAX:
                break
            found[of_objects, key] = None

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """missing, extra, different, damaged, repaired."""
        missing, extra, different, damaged = map(len, self.found.values())
        return missing, extra, different, damaged, len(self.repaired)

    def __str__(self) -> str:
        names = (*self.found, "repaired")
        counts = zip(names, self.counts, strict=True)
        texts = [f"{count} {name}" for name, count in counts if count]
        return ", ".join([*texts, *self.problems]) or "nothing wrong"


class Order(NamedTuple):
    """What is to be checked; `done` gets the report, unless the operation ends."""

    partition: int
    reference: int | None  # nid
    min_tid: Tid
    max_tid: Tid
    repair: bool
    done: Callable[[Report], object]


class Checks:
    """The checks of a node in operation, one at a time, and urgent repairs."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.node = operation.node
        self.runtime = operation.runtime
        self.is_over = False
        self._backend = operation.backend
        self._orders: deque[Order] = deque()
        self._damaged: dict[tuple[Oid, Tid], None] = {}
        self._is_busy = False

    def leave(self) -> None:
        """The node leaves operation: nobody waits for an answer any more."""
        self.is_over = True
        self._orders.clear()
        self._damaged.clear()

    # --- what is to be done -----------------------------------------------------------

    def check_cell(
        self,
        reply: Reply,
        partition: int,
        reference: int | None,
        min_tid: Tid,
        max_tid: Tid,
        repair: bool,
    ) -> None:
        """AskCheckCell."""

        def done(report: Report) -> None:
            problems = [text.encode() for text in report.problems]
            reply.answer(AnswerCheckCell, *report.counts, problems)

        if not self._add(
            Order(partition, reference, min_tid, min(max_tid, MAX_TID), repair, done)
        ):
            reply.error(ErrorCode.NOT_READY, "too many checks")

    def check_partition(
        self, partition: int, source: Node | None, min_tid: Tid, max_tid: Tid
    ) -> None:
        """CheckPartition: the master wants to know who differs, only from `source`."""

        def done(report: Report) -> None:
            reference = None if source is None else source.nid
            nids = corrupted(report, self.node.nid, reference)
            if nids and self.node.master is not None:
                self.node.master.notify(NotifyPartitionCorrupted, partition, nids)

        self._add(Order(partition, None, min_tid, min(max_tid, MAX_TID), False, done))

    def _add(self, order: Order) -> bool:
        if len(self._orders) >= QUEUE_MAX:
            return False
        self._orders.append(order)
        self._soon()
        return True

    def damaged(self, oid: Oid, tid: Tid) -> None:
        """Somebody got a value that is not what was stored."""
        if len(self._damaged) < QUEUE_MAX and max(oid, tid) <= MAX_TID:
            self._damaged[oid, tid] = None
            self._soon()

    def _soon(self) -> None:
        if not self._is_busy:
            self._is_busy = True
            self.runtime.call_later(0, self._next)

    def _next(self) -> None:
        """Start the next task."""
        if self._damaged and not self.is_over:
            key = next(iter(self._damaged))
            self._run(self._restore(*key), lambda _: self._damaged.pop(key, None))
        elif self._orders and not self.is_over:
            order = self._orders.popleft()
            self._run(self._check(order), order.done)
        else:
            self._is_busy = False

    # --- tasks ------------------------------------------------------------------------

    def _run(self, steps: Steps[T], done: Callable[[T], object]) -> None:
        def advance(result: Any) -> None:
            if self.is_over:
                steps.close()
                return
            if isinstance(result, Exception) and not isinstance(result, Failed):
                raise result
            try:
                if isinstance(result, Failed):
                    step = steps.throw(result)
                else:
                    step = steps.send(result)
            except StopIteration as end:
                done(end.value)
                self.runtime.call_later(0, self._next)
                return
            step(advance)

        advance(None)

    def _read(self, read: Callable[[Reader], Any]) -> Step:
        reader = self._backend.background
        return lambda resume: self.runtime.submit(QUEUE, lambda: read(reader), resume)

    def _write(self, job: Callable[[], Any]) -> Step:
        return lambda resume: self.node.writer.submit(job, resume)

    def _sleep(self, seconds: float) -> Step:
        return lambda resume: self.runtime.call_later(seconds, lambda: resume(None))

    def _pause(self, size: int) -> Steps[None]:
        """Let clients go first."""
        seconds = self.operation.pace.pause(size)
        if seconds:
            yield self._sleep(seconds)

    def _connect(self, nid: int) -> Steps[Connection]:
        """A connection, which must be released. Raises Failed."""
        for _ in range(CONNECT_TRIES):
            try:
                conn: Connection = yield self._open(nid)
            except Failed as failure:
                last = failure
            else:
                return conn
            # It may be connecting to us at the same time.
            yield self._sleep(RETRY_DELAY)
        raise last

    def _open(self, nid: int) -> Step:
        node = self.node.nodes.running().get(nid)

        def step(resume: Callable[[Any], object]) -> None:
            def opened(conn: Connection | None, reason: str) -> None:
                if conn is not None and self.is_over:
                    self.operation.peer_handler.release(conn)
                resume(Failed(f"no connection: {reason}") if conn is None else conn)

            if node is None:
                resume(Failed("not running"))
            else:
                self.operation.peer_handler.open(node, opened)

        return step

    def _ask(self, conn: Connection, packet: Packet[...], *args: Any) -> Step:
        """Arguments of the answer. Raises Failed."""

        def step(resume: Callable[[Any], object]) -> None:
            conn.ask(packet, *args).then(
                lambda *answer: resume(answer),
                lambda code, text: resume(Failed(explain(code, text))),
            )

        return step

    def _fetch(
        self, conn: Connection, partition: int, of_objects: bool, keys: Sequence[Key]
    ) -> Step:
        """Those of a few items that the peer has, and that are right."""
        peers = self.operation.peer_handler
        found: dict[Key, tuple[Any, ...]] = {}
        wanted = dict.fromkeys(keys)

        def received(args: tuple[Any, ...]) -> None:
            key = (args[1], args[0]) if of_objects else (args[0], ZERO_OID)
            wrong = wrong_object(args) if of_objects else wrong_transaction(args)
            if key in wanted and not wrong:
                found[key] = args

        def step(resume: Callable[[Any], object]) -> None:
            left = len(keys)

            def ended(*args: object) -> None:
                nonlocal left
                left -= 1
                if not left:
                    resume(found)

            for tid, oid in keys:
                if of_objects:
                    request = conn.ask(AskFetchObjects, partition, 1, tid, tid, oid, {})
                else:
                    request = conn.ask(
                        AskFetchTransactions, partition, 1, tid, tid, [], False
                    )
                peers.expect(conn, request, received)

                def end(*args: object, request: Any = request) -> None:
                    peers.expect_no_more(conn, request)
                    ended()

                request.then(end, end)

        return step

    def _others(self, partition: int) -> list[int]:
        """Other nodes with a readable cell."""
        running = self.node.nodes.running()
        return [
            nid
            for nid in self.node.pt.readable[partition]
            if nid in running and nid != self.node.nid
        ]

    # --- one damaged value ------------------------------------------------------------

    def _restore(self, oid: Oid, tid: Tid) -> Steps[None]:
        """Get a value from a replica, if it is damaged indeed."""
        pt, log = self.node.pt, self.node.log
        partition = pt.partition_of(oid)
        found = yield self._read(lambda reader: reader.load(oid, at=tid))
        if found is None or not is_damaged(found[3], found[4], found[2]):
            return
        name = f"{oid.hex()} at {tid.hex()}"
        log.error("the value of %s is damaged here", name)
        repaired = yield from self._from_others(partition, [(tid, oid)])
        if repaired:
            log.warning("the value of %s is repaired", name)
        else:
            log.error("nobody has the value of %s", name)

    def _from_others(self, partition: int, keys: Sequence[Key]) -> Steps[list[Key]]:
        """Restore damaged values from any replica; those that are repaired."""
        left = dict.fromkeys(keys)
        for nid in self._others(partition):
            if not left:
                break
            try:
                conn = yield from self._connect(nid)
            except Failed:
                continue
            try:
                for key in (yield from self._repair(conn, partition, [], list(left))):
                    del left[key]
            finally:
                self.operation.peer_handler.release(conn)
        return [key for key in keys if key not in left]

    def _repair(
        self,
        conn: Connection,
        partition: int,
        wanted: Sequence[Key],
        damaged: Sequence[Key],
    ) -> Steps[list[Key]]:
        """Fetch records: those `wanted` are added or replaced, values restored."""
        repaired: list[Key] = []
        values = dict.fromkeys(damaged)
        keys = [*wanted, *damaged]
        for start in range(0, len(keys), FETCHES):
            found = yield self._fetch(
                conn, partition, True, keys[start : start + FETCHES]
            )
            items = [item for key, item in found.items() if key not in values]
            if items:
                yield self._write(lambda items=items: add_items(self._backend, items))  # type: ignore[misc]
            for (tid, oid), item in found.items():
                if (tid, oid) in values:
                    value = item[3], item[4], item[2]
                    yield from self._restore_value(oid, tid, value)
            repaired += found
        return repaired

    def _restore_value(
        self, oid: Oid, tid: Tid, value: tuple[bytes, bytes, int]
    ) -> Steps[None]:
        for _ in range(RETRIES):
            if (
                yield self._write(lambda: self._backend.restore_value(oid, tid, value))
            ):
                return
            yield self._sleep(RETRY_DELAY)

    # --- the check of a cell ----------------------------------------------------------

    def _check(self, order: Order) -> Steps[Report]:
        report = Report()
        partition, reference = order.partition, order.reference
        if not self._is_readable(partition):
            report.problems.append("not readable here")
            return report
        pending = self.operation.transactions.pending
        while pending.until(order.max_tid) is not None:
            self.node.writer.flush()
            yield self._sleep(RETRY_DELAY)
        nids = self._others(partition) if reference is None else [reference]
        for nid in nids:
            if nid == self.node.nid:
                continue
            before = report.counts
            try:
                conn = yield from self._connect(nid)
                try:
                    yield from self._compare(order, report, conn, nid)
                finally:
                    self.operation.peer_handler.release(conn)
                report.compared[nid] = None
            except Failed as failure:
                report.problems.append(f"{nid_str(nid)}: {failure}")
            if report.counts != before:
                report.differing[nid] = None
        if not report.compared and self._is_readable(partition):
            try:
                yield from self._compare(order, report, None, None)
            except Failed as failure:
                report.problems.append(str(failure))
        level = self.node.log.info
        if any(report.counts) or report.problems:
            level = self.node.log.error
        level("check of partition %d: %s", partition, report)
        return report

    def _is_readable(self, partition: int) -> bool:
        return self.node.is_readable(partition)

    def _compare(
        self, order: Order, report: Report, conn: Connection | None, nid: int | None
    ) -> Steps[None]:
        """With a replica; or (None) only look for damaged values."""
        if conn is not None and nid is not None:
            yield self._ask(conn, Ping)  # its features are known then
            link = self.operation.peer_handler.links.get(conn)
            if link is not None and FEATURE_CHECK not in link.features:
                yield from self._compare_keys(order, report, conn, nid)
                conn = None
        for of_objects in (False, True):
            position: Key | None = (order.min_tid, ZERO_OID)
            while position is not None:
                items: dict[Key, bytes] = {}
                end: Key | None = None
                if conn is not None:
                    answer = yield self._ask(
                        conn,
                        AskDigests,
                        order.partition,
                        of_objects,
                        CHUNK,
                        *position,
                        order.max_tid,
                    )
                    described, *following = answer
                    items = {(tid, oid): digest for tid, oid, digest in described}
                    end = _position(position, following)
                yield from self._compare_range(
                    order, report, conn, nid, of_objects, items, position, end
                )
                position = end

    def _compare_range(
        self,
        order: Order,
        report: Report,
        conn: Connection | None,
        nid: int | None,
        of_objects: bool,
        theirs: dict[Key, bytes],
        position: Key | None,
        end: Key | None,
    ) -> Steps[None]:
        """Items from `position` to before `end` (None: the last one)."""
        partition = order.partition
        damaged, extra, different = [], [], []
        while position is not None:
            tid, oid = position
            ours, size, position = yield self._read(
                digests(of_objects, partition, SLICE, tid, oid, order.max_tid)
            )
            if not self._is_readable(partition):
                raise Failed("no longer readable here")
            for tid, oid, digest in ours:
                key = tid, oid
                if end is not None and key >= end:
                    break
                other = theirs.pop(key, None)
                if not digest:
                    damaged.append(key)
                elif other is None:
                    extra.append(key)
                elif other and other != digest:
                    different.append(key)
            if end is not None and position is not None and position >= end:
                position = None
            yield from self._pause(size)
        report.add("damaged", of_objects, damaged)
        if conn is None:
            if order.repair and damaged:
                repaired = yield from self._from_others(partition, damaged)
                report.repaired.update(dict.fromkeys((True, key) for key in repaired))
            return
        missing = list(theirs)
        report.add("missing", of_objects, missing)
        report.add("different", of_objects, different)
        is_reference = nid == order.reference
        if is_reference:
            report.add("extra", of_objects, extra)
        elif extra and nid is not None:
            report.differing[nid] = None
        if not order.repair:
            return
        wanted = [*missing, *different] if is_reference else missing
        if of_objects:
            done = yield from self._repair(conn, partition, wanted, damaged)
        else:
            done = yield from self._repair_transactions(conn, partition, wanted)
        if is_reference and extra:
            yield self._write(lambda: self._delete(of_objects, extra))
            done += extra
        report.repaired.update(dict.fromkeys((of_objects, key) for key in done))

    def _repair_transactions(
        self, conn: Connection, partition: int, wanted: Sequence[Key]
    ) -> Steps[list[Key]]:
        repaired: list[Key] = []
        for start in range(0, len(wanted), FETCHES):
            some = wanted[start : start + FETCHES]
            found = yield self._fetch(conn, partition, False, some)
            items = list(found.values())
            yield self._write(lambda items=items: add_items(self._backend, items))  # type: ignore[misc]
            repaired += found
        return repaired

    def _delete(self, of_objects: bool, keys: Sequence[Key]) -> None:
        if of_objects:
            delete_objects(self._backend, keys)
        else:
            for tid, _ in keys:
                self._backend.delete_transaction(tid)

    def _compare_keys(
        self, order: Order, report: Report, conn: Connection, nid: int
    ) -> Steps[None]:
        """With a storage of neoppod, which describes a range as a whole."""
        partition, *_ = order
        for of_objects in (False, True):
            position = [order.min_tid, ZERO_OID]
            while True:
                if of_objects:
                    args: list[Any] = [CHUNK, position[0], order.max_tid, position[1]]
                    packet: Packet[...] = AskCheckSerialRange
                else:
                    args = [CHUNK, position[0], order.max_tid]
                    packet = AskCheckTIDRange
                answer = yield self._ask(conn, packet, partition, *args)
                ours = yield self._read(_range(of_objects, partition, args))
                if tuple(answer) != tuple(ours):
                    report.differing[nid] = None
                    raise Failed(
                        f"other {'records' if of_objects else 'transactions'} from tid"
                        f" {position[0].hex()} on"
                    )
                count, _, tid, *rest = ours
                yield from self._pause(100 * count)
                if count < CHUNK:
                    break
                if of_objects:
                    position = [tid, add64(rest[1], 1)]
                else:
                    position = [add64(tid, 1), ZERO_OID]


def _range(
    of_objects: bool, partition: int, args: Sequence[Any]
) -> Callable[[Reader], Any]:
    if of_objects:
        return lambda reader: reader.check_serial_range(partition, *args)
    return lambda reader: reader.check_tid_range(partition, *args)


def _position(before: Key, following: Sequence[Any]) -> Key | None:
    """Where to go on, as a replica says. Raises Failed."""
    tid, oid = following
    if tid is None:
        return None
    if oid is None or (tid, oid) <= before:
        raise Failed(f"invalid position {tid.hex()}")
    return tid, oid


def corrupted(report: Report, nid: int | None, source: int | None) -> list[int]:
    """Nodes to be reported: without reference, all if there is any difference.

    With one, those that differ from it: who is like this node, if this one differs.
    """
    if nid is None or not (report.differing or any(report.counts)):
        return []
    alike = [nid, *(n for n in report.compared if n not in report.differing)]
    if source is None:
        return sorted([*alike, *report.differing])
    if source in report.differing:
        others = [n for n in report.differing if n != source]
        return sorted([*alike, *others])
    return sorted(report.differing)
