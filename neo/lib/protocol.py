"""The wire protocol: enumerations, constants and the one table of packets.

A packet is declared once, as the signature of its arguments; the code table, the
check of arity and types, the name of its handler method, its text in logs and its
documentation derive from the declaration. A message in flight is the tuple of its
arguments; what was decoded holds tuples (for arrays), dicts, bytes and enumerations.

Source: the specification of protocol 5; routes use C client, M master, S storage,
A admin, ctl the control tool.
"""

from __future__ import annotations

import itertools
import re
import types
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, IntEnum
from typing import (
    Annotated,
    Any,
    Generic,
    ParamSpec,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from msgpack import ExtType, packb

P = ParamSpec("P")

PROTOCOL_VERSION = 5
HANDSHAKE: bytes = packb(["NEO", PROTOCOL_VERSION])

# --- enumerations -------------------------------------------------------------


class WireEnum(ExtType, Enum):  # type: ignore[misc]  # msgpack has no annotations
    """An enumeration whose members msgpack encodes by itself: (extension, number).

    Members are extension values, so that no Python hook runs while a packet is made.
    """

    def __new__(cls, extension: int, number: int) -> WireEnum:
        self = ExtType.__new__(cls, extension, bytes((number,)))
        self._value_ = number
        return self  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return self._name_

    __str__ = __repr__
    __hash__ = object.__hash__  # members are singletons: no Python call for a dict key


class CellState(WireEnum):
    """State of a partition on a storage node."""

    OUT_OF_DATE = 0, 0
    UP_TO_DATE = 0, 1
    FEEDING = 0, 2
    CORRUPTED = 0, 3
    DISCARDED = 0, 4


class ClusterState(WireEnum):
    """Phase of the primary master, hence of the cluster."""

    RECOVERING = 1, 0
    VERIFYING = 1, 1
    RUNNING = 1, 2
    STOPPING = 1, 3
    STARTING_BACKUP = 1, 4
    BACKINGUP = 1, 5
    STOPPING_BACKUP = 1, 6


class NodeState(WireEnum):
    """State of a node as told by the primary master."""

    UNKNOWN = 3, 0
    DOWN = 3, 1
    RUNNING = 3, 2
    PENDING = 3, 3


class NodeType(WireEnum):
    """Role of a node."""

    MASTER = 4, 0
    STORAGE = 4, 1
    CLIENT = 4, 2
    ADMIN = 4, 3


class ErrorCode(IntEnum):
    """First argument of Error: a plain integer on the wire."""

    ACK = 0
    DENIED = 1
    NOT_READY = 2
    OID_NOT_FOUND = 3
    TID_NOT_FOUND = 4
    OID_DOES_NOT_EXIST = 5
    PROTOCOL_ERROR = 6
    REPLICATION_ERROR = 7
    CHECKING_ERROR = 8
    BACKEND_NOT_IMPLEMENTED = 9
    NON_READABLE_CELL = 10
    READ_ONLY_ACCESS = 11
    INCOMPLETE_TRANSACTION = 12
    UNDO_PACK_ERROR = 13


READABLE = (CellState.UP_TO_DATE, CellState.FEEDING)

ENUMS: dict[tuple[int, bytes], WireEnum] = {
    (member.code, member.data): member
    for enum in (CellState, ClusterState, NodeState, NodeType)
    for member in enum
}


def decode_extension(code: int, data: bytes) -> WireEnum:
    """Member of an enumeration; for msgpack's `ext_hook`. ValueError if unknown."""
    try:
        return ENUMS[code, data]
    except KeyError:
        raise ValueError(f"unknown enumeration value {code}/{data.hex()}") from None


# --- constants and types --------------------------------------------------------

ZERO_TID = ZERO_OID = bytes(8)
INVALID_TID = b"\xff" * 8
MAX_TID = b"\x7f" + b"\xff" * 7
ZERO_HASH = bytes(20)
INVALID_PARTITION = 0xFFFFFFFF
MAX_TRANSACTION_OIDS = (1 << 21) - 1

RESPONSE = 0x8000
MAX_MESSAGE_ID = 0xFFFFFFFF

# High byte of the node ids of a type.
NAMESPACES: dict[NodeType, int] = {
    NodeType.STORAGE: 0x00,
    NodeType.MASTER: -0x10,
    NodeType.CLIENT: -0x20,
    NodeType.ADMIN: -0x30,
}


class Check:
    """Annotation: `text` is the condition that value `v` must fulfil."""

    def __init__(self, text: str) -> None:
        self.text = text


Oid = Annotated[bytes, Check("len(v) == 8")]
Tid = Annotated[bytes, Check("len(v) == 8")]
Hash = Annotated[bytes, Check("len(v) == 20")]
UInt = Annotated[int, Check("0 <= v < 4294967296")]
# Of a page: whatever means "all" to somebody; the receiver has its own maximum.
Count = Annotated[int, Check("v >= 0")]
Nid = Annotated[int, Check("-2147483648 <= v < 2147483648")]
Ptid = Annotated[int, Check("0 < v < 9223372036854775808")]
Compression = Annotated[int, Check("v == 0 or v == 1")]
WireAddress = tuple[bytes, Annotated[int, Check("0 <= v < 65536")]]
NodeRow = tuple[NodeType, WireAddress | None, Nid | None, NodeState, float | None]
Rows = Sequence[Sequence[tuple[Nid, CellState]]]
Pack = tuple[Sequence[Oid] | None, Tid]
# `oids` of an order read back from an upstream database is one concatenated bin.
PackOrder = tuple[Tid, bool | None, bool, Sequence[Oid] | bytes | None, Tid]


class Packet(Generic[P]):
    """One kind of packet.

    `valid(args)` checks what was received; `handler` is the name of the method that
    gets it.
    """

    def __init__(
        self,
        code: int,
        route: str,
        answer: Packet[...] | None,
        declare: Callable[P, None],
    ) -> None:
        assert code not in BY_CODE, (hex(code), declare.__name__)
        self.code, self.route, self.answer = code, route, answer
        self.name = declare.__name__
        self.doc = declare.__doc__ or ""
        self.handler = snake(self.name)
        self.fields = get_type_hints(declare, include_extras=True)
        del self.fields["return"]
        self.arity = len(self.fields)
        self.valid = _validator(self.fields)
        BY_CODE[code] = self

    def __repr__(self) -> str:
        return self.name

    def explain(self, args: tuple[Any, ...]) -> str:
        """Say what is wrong with `args`, for an error message."""
        if len(args) != self.arity:
            return f"{self.name}: {self.arity} arguments expected, {len(args)} received"
        for (name, hint), value in zip(self.fields.items(), args, strict=True):
            if not _validator({name: hint})((value,)):
                return f"{self.name}: invalid {name} {shorten(value)}"
        return f"{self.name}: valid"


BY_CODE: dict[int, Packet[...]] = {}

SNAKE = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def snake(name: str) -> str:
    """AskCheckTIDRange -> ask_check_tid_range; AskTIDs -> ask_tids."""
    return SNAKE.sub(
        "_", name.replace("TIDs", "Tids").replace("OIDs", "Oids").replace("IDs", "Ids")
    ).lower()


def shorten(value: Any, depth: int = 3) -> str:
    """ASCII text of what a peer sent, bounded in size, cost and recursion."""
    if isinstance(value, bytes | str):
        return ascii(value[:40]) + ("..." if len(value) > 40 else "")
    if isinstance(value, tuple | dict) and not isinstance(value, WireEnum):
        if not depth:
            return "..."
        first = [shorten(item, depth - 1) for item in itertools.islice(value, 4)]
        return f"({', '.join(first)}{', ...' if len(value) > 4 else ''})"
    return ascii(value)[:80]


def packet(
    code: int,
    route: str,
    answer: Packet[...] | None = None,
) -> Callable[[Callable[P, None]], Packet[P]]:
    """Declare a packet as the signature of its arguments."""
    return lambda declare: Packet(code, route, answer, declare)


# --- validation -----------------------------------------------------------------


def _validator(fields: dict[str, Any]) -> Callable[[tuple[Any, ...]], bool]:
    """A function that checks a tuple of arguments, generated once from their types."""
    scope: dict[str, Any] = {}
    conditions = [f"len(a) == {len(fields)}"] + [
        text
        for i, hint in enumerate(fields.values())
        if (text := _condition(hint, f"a[{i}]", scope, 0)) != "True"
    ]
    source = f"lambda a: {' and '.join(conditions)}"
    validate: Callable[[tuple[Any, ...]], bool] = eval(source, scope)
    return validate


def _condition(hint: Any, value: str, scope: dict[str, Any], depth: int) -> str:
    """Python expression that is true if `value` has type `hint`."""
    if hint is Any:
        return "True"
    if hint is None or hint is type(None):
        return f"{value} is None"
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        check = re.sub(r"\bv\b", lambda _: value, hint.__metadata__[0].text)
        return f"({_condition(args[0], value, scope, depth)} and ({check}))"
    if origin in (Union, types.UnionType):
        # None first: the cheapest test, and often true.
        alternatives = sorted(args, key=lambda t: t is not type(None))
        texts = [_condition(t, value, scope, depth) for t in alternatives]
        return f"({' or '.join(texts)})"
    item = f"x{depth}"
    if origin is Sequence:
        inner = _condition(args[0], item, scope, depth + 1)
        return f"(type({value}) is tuple and all([{inner} for {item} in {value}]))"
    if origin is tuple:
        inners = [
            _condition(t, f"{value}[{i}]", scope, depth) for i, t in enumerate(args)
        ]
        size = f"type({value}) is tuple and len({value}) == {len(args)}"
        return f"({' and '.join([size, *(t for t in inners if t != 'True')])})"
    if origin is Mapping:
        key = _condition(args[0], item, scope, depth + 1)
        content = _condition(args[1], f"{item}v", scope, depth + 1)
        pairs = f"for {item}, {item}v in {value}.items()"
        return f"(type({value}) is dict and all([{key} and {content} {pairs}]))"
    scope[hint.__name__] = hint
    return f"type({value}) is {hint.__name__}"


# --- the table ------------------------------------------------------------------


@packet(0x8000, "any -> any")
def Error(code: int, message: bytes) -> None:
    """Response to any packet; ACK is the success of a request without own answer."""


@packet(0x8001, "M S A -> any")
def AcceptIdentification(
    node_type: NodeType, nid: Nid | None, your_nid: Nid | None
) -> None:
    """Accept the peer; `your_nid` is given by a master, confirmed by a storage."""


@packet(0x01, "any -> M S A", AcceptIdentification)
def RequestIdentification(
    node_type: NodeType,
    nid: Nid | None,
    address: WireAddress | None,
    cluster_name: bytes,
    id_timestamp: float | None,
    extra: Mapping[bytes, Any],
) -> None:
    """Say who connects: first packet of every connection but the control tool's."""


@packet(0x8002, "any -> any")
def Pong() -> None:
    """Answer to Ping."""


@packet(0x02, "any -> any", Pong)
def Ping() -> None:
    """Barrier: all packets sent earlier were processed when Pong comes."""


@packet(0x03, "S -> S")
def CloseClient() -> None:
    """The sender no longer uses the connection for its own requests."""


@packet(0x8004, "A -> ctl")
def AnswerPrimary(nid: Nid) -> None:
    """Primary master that the admin is connected to."""


@packet(0x04, "ctl -> A", AnswerPrimary)
def AskPrimary() -> None:
    """Ask which master is primary."""


@packet(0x05, "secondary M -> any")
def NotPrimaryMaster(primary: UInt | None, masters: Sequence[WireAddress]) -> None:
    """Redirect to the primary (an index in `masters`), then close."""


@packet(0x06, "M -> any")
def NotifyNodeInformation(timestamp: float, nodes: Sequence[NodeRow]) -> None:
    """Nodes that changed; the first one after an identification is complete."""


@packet(0x8007, "S -> M, M -> A -> ctl")
def AnswerRecovery(
    ptid: Ptid | None, backup_tid: Tid | None, truncate_tid: Tid | None
) -> None:
    """What a storage (or the cluster) remembers."""


@packet(0x07, "M -> S, ctl -> A -> M", AnswerRecovery)
def AskRecovery() -> None:
    """Ask for the version of the partition table, backup and truncation tids."""


@packet(0x8008, "S -> M, M -> A -> ctl")
def AnswerLastIDs(last_tid: Tid | None, last_oid: Oid | None, first_tid: Tid) -> None:
    """Greatest tid and oid, smallest tid, of readable partitions."""


@packet(0x08, "M -> S, ctl -> A -> M", AnswerLastIDs)
def AskLastIDs() -> None:
    """Ask the greatest ids; a storage executes a pending truncation before."""


@packet(0x8009, "S -> M")
def AnswerPartitionTable(ptid: Ptid | None, num_replicas: UInt, rows: Rows) -> None:
    """The partition table that a storage has on disk."""


@packet(0x09, "M -> S", AnswerPartitionTable)
def AskPartitionTable() -> None:
    """Ask a storage for its partition table."""


@packet(0x0A, "M -> A C S")
def SendPartitionTable(ptid: Ptid | None, num_replicas: UInt, rows: Rows) -> None:
    """The complete partition table: replaces what was known."""


@packet(0x0B, "M -> A C S")
def NotifyPartitionChanges(
    ptid: Ptid, num_replicas: UInt, cells: Sequence[tuple[UInt, Nid, CellState]]
) -> None:
    """Cells (partition, nid, state) that changed; DISCARDED removes one."""


@packet(0x0C, "M -> S")
def StartOperation(backup: bool) -> None:
    """Serve clients from now on (true: in backup mode)."""


@packet(0x0D, "M -> S C")
def StopOperation() -> None:
    """Stop serving; the master goes back to recovery."""


@packet(0x800E, "M -> S")
def AnswerUnfinishedTransactions(max_tid: Tid, ttids: Sequence[Tid]) -> None:
    """Last committed tid, and the transactions begun and not finished."""


@packet(0x0E, "S -> M", AnswerUnfinishedTransactions)
def AskUnfinishedTransactions(partitions: Sequence[UInt]) -> None:
    """Ask what to wait for, before replicating these partitions."""


@packet(0x800F, "S -> M")
def AnswerLockedTransactions(transactions: Mapping[Tid, Tid | None]) -> None:
    """Unfinished transactions: ttid -> tid if locked, None if voted only."""


@packet(0x0F, "M -> S", AnswerLockedTransactions)
def AskLockedTransactions() -> None:
    """Ask for the content of the temporary tables."""


@packet(0x8010, "M S -> C, S -> M")
def AnswerFinalTID(tid: Tid | None) -> None:
    """Final tid, None: not committed; MAX_TID (from a master): ask the storages."""


@packet(0x10, "C -> M S, M -> S", AnswerFinalTID)
def AskFinalTID(ttid: Tid) -> None:
    """Ask what became of a transaction."""


@packet(0x11, "M -> S")
def ValidateTransaction(ttid: Tid, tid: Tid) -> None:
    """Verification: commit a voted transaction."""


@packet(0x8012, "M -> C")
def AnswerBeginTransaction(ttid: Tid) -> None:
    """Temporary id of the transaction."""


@packet(0x12, "C -> M", AnswerBeginTransaction)
def AskBeginTransaction(tid: Tid | None) -> None:
    """Begin a transaction; `tid` imposes its id (import)."""


@packet(0x13, "C -> M", Error)
def FailedVote(ttid: Tid, nids: Sequence[Nid]) -> None:
    """Storages on which a write failed: may the transaction be finished?"""


@packet(0x8014, "M -> C")
def AnswerTransactionFinished(ttid: Tid, tid: Tid) -> None:
    """The transaction is committed."""


@packet(0x14, "C -> M", AnswerTransactionFinished)
def AskFinishTransaction(
    ttid: Tid,
    oids: Sequence[Oid],
    deleted: Sequence[UInt],
    checked: Sequence[UInt],
    pack: Pack | None,
) -> None:
    """Commit: modified oids, partitions of deleted and of checked oids."""


@packet(0x8015, "S -> M")
def AnswerInformationLocked(ttid: Tid) -> None:
    """The lock is durable."""


@packet(0x15, "M -> S", AnswerInformationLocked)
def AskLockInformation(ttid: Tid, tid: Tid, pack: bool) -> None:
    """Second phase: record the final tid."""


@packet(0x16, "M -> C")
def InvalidateObjects(tid: Tid, oids: Sequence[Oid]) -> None:
    """Another client committed these objects."""


@packet(0x17, "upstream M -> backup M")
def InvalidatePartitions(tid: Tid, partitions: Sequence[UInt]) -> None:
    """A transaction touched these partitions."""


@packet(0x18, "M -> S")
def NotifyUnlockInformation(ttid: Tid) -> None:
    """Third phase: make the transaction visible."""


@packet(0x8019, "M -> C")
def AnswerNewOIDs(oids: Sequence[Oid]) -> None:
    """Consecutive new oids."""


@packet(0x19, "C -> M", AnswerNewOIDs)
def AskNewOIDs(count: UInt) -> None:
    """Reserve oids (at least 1)."""


@packet(0x1A, "S -> C")
def NotifyDeadlock(ttid: Tid, oid: Oid) -> None:
    """An older transaction waits for this lock: give it back (AskRelockObject)."""


@packet(0x801B, "S -> C")
def AnswerRelockObject(
    result: tuple[Tid, Tid, tuple[Compression, Hash, bytes] | None] | None,
) -> None:
    """None: locked again; else base serial, conflicting tid, data of the store."""


@packet(0x1B, "C -> S", AnswerRelockObject)
def AskRelockObject(ttid: Tid, oid: Oid) -> None:
    """Release a write lock, then take it again."""


@packet(0x801C, "S -> C")
def AnswerStoreObject(conflict: Tid | None) -> None:
    """None: stored and locked; zero: without lock; else the conflicting tid."""


@packet(0x1C, "C -> S", AnswerStoreObject)
def AskStoreObject(
    oid: Oid,
    serial: Tid,
    compression: Compression,
    checksum: Hash,
    data: bytes,
    data_serial: Tid | None,
    ttid: Tid,
) -> None:
    """Store an object on top of revision `serial`."""


@packet(0x1D, "C -> S, C -> M -> S")
def AbortTransaction(ttid: Tid, nids: Sequence[Nid]) -> None:
    """Drop a transaction; `nids` (to the master): storages involved."""


@packet(0x801E, "S -> C")
def AnswerStoreTransaction() -> None:
    """Metadata and objects are durable."""


@packet(0x1E, "C -> S", AnswerStoreTransaction)
def AskStoreTransaction(
    ttid: Tid,
    user: bytes,
    description: bytes,
    extension: bytes,
    oids: Sequence[Oid],
    pack: Pack | None,
) -> None:
    """Vote, with the metadata: to cells of the ttid's partition."""


@packet(0x801F, "S -> C")
def AnswerVoteTransaction() -> None:
    """Objects are durable."""


@packet(0x1F, "C -> S", AnswerVoteTransaction)
def AskVoteTransaction(ttid: Tid) -> None:
    """Vote, without metadata: to the other storages involved."""


@packet(0x8020, "S -> C")
def AnswerObject(
    oid: Oid,
    serial: Tid,
    next_serial: Tid | None,
    compression: int | None,
    checksum: Hash,
    data: bytes,
    data_serial: Tid | None,
) -> None:
    """A revision; no data: compression None, zero checksum."""


@packet(0x20, "C -> S", AnswerObject)
def AskObject(
    oid: Oid,
    at: Tid | None,  # the revision made at this tid,
    before: Tid | None,  # or the last one made before it; neither: the last of all
) -> None:
    """Read one revision of an object."""


@packet(0x8021, "S -> C")
def AnswerTIDs(tids: Sequence[Tid]) -> None:
    """Descending tids."""


@packet(0x21, "C -> S", AnswerTIDs)
def AskTIDs(first: UInt, last: Count, partition: UInt) -> None:
    """Page [first, last) of descending tids; INVALID_PARTITION: all readable."""


@packet(0x8022, "S -> C")
def AnswerTransactionInformation(
    tid: Tid,
    user: bytes,
    description: bytes,
    extension: bytes,
    packed: bool,
    oids: Sequence[Oid],
) -> None:
    """Metadata of a transaction."""


@packet(0x22, "C -> S", AnswerTransactionInformation)
def AskTransactionInformation(tid: Tid) -> None:
    """Ask for the metadata of a transaction."""


@packet(0x8023, "S -> C")
def AnswerObjectHistory(oid: Oid, history: Sequence[tuple[Tid, UInt]]) -> None:
    """(serial, stored size), descending."""


@packet(0x23, "C -> S", AnswerObjectHistory)
def AskObjectHistory(oid: Oid, first: UInt, last: Count) -> None:
    """Page [first, last) of the revisions of an object."""


@packet(0x8024, "A -> ctl")
def AnswerPartitionList(ptid: Ptid | None, num_replicas: UInt, rows: Rows) -> None:
    """Rows of the partition table."""


@packet(0x24, "ctl -> A", AnswerPartitionList)
def AskPartitionList(min_offset: UInt, max_offset: UInt, nid: Nid | None) -> None:
    """Rows [min, max) of the partition table; max 0: to the end."""


@packet(0x8025, "A -> ctl")
def AnswerNodeList(nodes: Sequence[NodeRow]) -> None:
    """Nodes that the admin knows."""


@packet(0x25, "ctl -> A", AnswerNodeList)
def AskNodeList(node_type: NodeType | None) -> None:
    """List nodes, all or of one type."""


@packet(0x26, "ctl -> A -> M", Error)
def SetNodeState(nid: Nid, state: NodeState) -> None:
    """Kill (DOWN) or drop (UNKNOWN) a node."""


@packet(0x27, "ctl -> A -> M", Error)
def AddPendingNodes(nids: Sequence[Nid]) -> None:
    """Make pending storages members of the cluster."""


@packet(0x8028, "M -> A -> ctl")
def AnswerTweakPartitionTable(changed: bool, rows: Rows) -> None:
    """The resulting table."""


@packet(0x28, "ctl -> A -> M", AnswerTweakPartitionTable)
def TweakPartitionTable(dry_run: bool, nids: Sequence[Nid]) -> None:
    """Balance the table over the members, `nids` left untouched."""


@packet(0x29, "ctl -> A -> M", Error)
def SetNumReplicas(num_replicas: UInt) -> None:
    """Change the wanted number of replicas."""


@packet(0x2A, "ctl -> A -> M", Error)
def SetClusterState(state: ClusterState) -> None:
    """Request a phase."""


@packet(0x2B, "ctl -> A -> M", Error)
def Repair(nids: Sequence[Nid], dry_run: bool) -> None:
    """Delete unreferenced raw data of storages."""


@packet(0x2C, "M -> S")
def NotifyRepair(dry_run: bool) -> None:
    """Delete unreferenced raw data."""


@packet(0x2D, "M -> any")
def NotifyClusterInformation(state: ClusterState) -> None:
    """The cluster changes phase."""


@packet(0x802E, "M -> A, A -> ctl")
def AnswerClusterState(state: ClusterState | None) -> None:
    """Phase of the cluster, None if unknown."""


@packet(0x2E, "ctl -> A, A -> M", AnswerClusterState)
def AskClusterState() -> None:
    """Ask for the phase of the cluster."""


@packet(0x802F, "S -> C")
def AnswerObjectUndoSerial(
    result: Mapping[Oid, tuple[Tid, Tid | None, bool]],
) -> None:
    """oid -> (current serial, serial of the data to restore, is current)."""


@packet(0x2F, "C -> S", AnswerObjectUndoSerial)
def AskObjectUndoSerial(
    ttid: Tid, ltid: Tid, undone_tid: Tid, oids: Sequence[Oid]
) -> None:
    """Ask how to undo a transaction for oids of one partition."""


@packet(0x8030, "S -> C")
def AnswerTIDsFrom(tids: Sequence[Tid]) -> None:
    """Ascending tids."""


@packet(0x30, "C -> S", AnswerTIDsFrom)
def AskTIDsFrom(min_tid: Tid, max_tid: Tid, length: Count, partition: UInt) -> None:
    """At most `length` tids of [min, max] of a partition."""


@packet(0x8031, "S -> C")
def AnswerOIDsFrom(next_oid: Oid | None, oids: Sequence[Oid]) -> None:
    """Ascending oids that have data."""


@packet(0x31, "C -> S", AnswerOIDsFrom)
def AskOIDsFrom(partition: UInt, length: Count, min_oid: Oid, tid: Tid) -> None:
    """Oids of a partition as of `tid`, from `min_oid`."""


@packet(0x8032, "M -> C")
def WaitedForPack() -> None:
    """The pack is completed."""


@packet(0x32, "C -> M", WaitedForPack)
def WaitForPack(tid: Tid) -> None:
    """Wait until a pack is completed."""


@packet(0x8033, "M S -> any")
def AnswerPackOrders(orders: Sequence[PackOrder]) -> None:
    """(pack id, approved, partial, oids, pack tid), ascending."""


@packet(0x33, "M -> S, C S -> M", AnswerPackOrders)
def AskPackOrders(pack_id: Tid) -> None:
    """Pack orders whose id is at least `pack_id`."""


@packet(0x34, "M -> S")
def NotifyPackSigned(approved: Sequence[Tid], rejected: Sequence[Tid]) -> None:
    """Pack orders were signed."""


@packet(0x35, "S -> M")
def NotifyPackCompleted(pack_id: Tid) -> None:
    """All cells of the sender are packed up to this order."""


@packet(0x36, "ctl -> A -> M", Error)
def CheckReplicas(
    partitions: Mapping[UInt, Nid | None], min_tid: Tid, max_tid: Tid | None
) -> None:
    """Compare the replicas of partitions with a reference storage."""


@packet(0x37, "M -> S")
def CheckPartition(
    partition: UInt,
    source: tuple[bytes, WireAddress | None],
    min_tid: Tid,
    max_tid: Tid,
) -> None:
    """Compare the replicas of a partition."""


@packet(0x8038, "S -> S")
def AnswerCheckTIDRange(count: UInt, tid_checksum: Hash, max_tid: Tid) -> None:
    """Digest of the transactions of a range."""


@packet(0x38, "S -> S", AnswerCheckTIDRange)
def AskCheckTIDRange(partition: UInt, length: UInt, min_tid: Tid, max_tid: Tid) -> None:
    """Ask for a digest of transactions."""


@packet(0x8039, "S -> S")
def AnswerCheckSerialRange(
    count: UInt, tid_checksum: Hash, max_tid: Tid, oid_checksum: Hash, max_oid: Oid
) -> None:
    """Digests of the object records of a range."""


@packet(0x39, "S -> S", AnswerCheckSerialRange)
def AskCheckSerialRange(
    partition: UInt, length: UInt, min_tid: Tid, max_tid: Tid, min_oid: Oid
) -> None:
    """Ask for digests of object records."""


@packet(0x3A, "S -> M")
def NotifyPartitionCorrupted(partition: UInt, nids: Sequence[Nid]) -> None:
    """These replicas differ."""


@packet(0x3B, "S -> M")
def NotifyReady() -> None:
    """The storage accepts clients."""


@packet(0x803C, "M -> any")
def AnswerLastTransaction(tid: Tid) -> None:
    """Last committed tid."""


@packet(0x3C, "C A -> M, ctl -> A -> M", AnswerLastTransaction)
def AskLastTransaction() -> None:
    """Ask for the last committed tid."""


@packet(0x803D, "S -> C")
def AnswerCheckCurrentSerial(conflict: Tid | None) -> None:
    """As AnswerStoreObject."""


@packet(0x3D, "C -> S", AnswerCheckCurrentSerial)
def AskCheckCurrentSerial(ttid: Tid, oid: Oid, serial: Tid) -> None:
    """Lock an object that must not have changed since `serial`."""


@packet(0x3E, "M -> S")
def NotifyTransactionFinished(ttid: Tid, max_tid: Tid) -> None:
    """A transaction that a replicating storage waited for is committed."""


@packet(0x3F, "M -> S")
def Replicate(
    tid: Tid, cluster_name: bytes, sources: Mapping[UInt, WireAddress | None]
) -> None:
    """Replicate partitions up to `tid` (backup)."""


@packet(0x40, "S -> M")
def NotifyReplicationDone(partition: UInt, tid: Tid) -> None:
    """A cell is replicated up to `tid`."""


@packet(0x8041, "S -> S")
def AnswerFetchTransactions(
    next_tid: Tid | None, delete: Sequence[Tid], completed_pack: Tid | None
) -> None:
    """End of a chunk of AddTransaction."""


@packet(0x41, "S -> S", AnswerFetchTransactions)
def AskFetchTransactions(
    partition: UInt,
    length: UInt,
    min_tid: Tid,
    max_tid: Tid,
    tids: Sequence[Tid],
    ask_pack_info: bool,
) -> None:
    """Fetch transactions of a range, less those already there."""


@packet(0x8042, "S -> S")
def AnswerFetchObjects(
    next_tid: Tid | None, next_oid: Oid | None, delete: Mapping[Tid, Sequence[Oid]]
) -> None:
    """End of a chunk of AddObject."""


@packet(0x42, "S -> S", AnswerFetchObjects)
def AskFetchObjects(
    partition: UInt,
    length: UInt,
    min_tid: Tid,
    max_tid: Tid,
    min_oid: Oid,
    objects: Mapping[Tid, Sequence[Oid]],
) -> None:
    """Fetch object records of a range, less those already there."""


@packet(0x43, "S -> S")
def AddTransaction(
    tid: Tid,
    user: bytes,
    description: bytes,
    extension: bytes,
    packed: bool,
    ttid: Tid,
    oids: Sequence[Oid],
    pack: tuple[bool | None, bool, Sequence[Oid] | None, Tid] | None,
) -> None:
    """A replicated transaction; its id is that of the request being answered."""


@packet(0x44, "S -> S")
def AddObject(
    oid: Oid,
    serial: Tid,
    compression: Compression,
    checksum: Hash,
    data: bytes,
    data_serial: Tid | None,
) -> None:
    """A replicated object record; its id is that of the request being answered."""


@packet(0x45, "ctl -> A -> M, M -> S", Error)
def Truncate(tid: Tid) -> None:
    """Remove all after `tid`. A storage never answers."""


@packet(0x46, "ctl -> A -> M -> any")
def FlushLog() -> None:
    """Write the log that is in memory."""


@packet(0x8047, "A -> ctl")
def AnswerMonitorInformation(
    warning: Sequence[bytes | None], problem: Sequence[bytes | None], summary: bytes
) -> None:
    """Clusters in trouble (None: this one) and a text for people."""


@packet(0x47, "ctl -> A", AnswerMonitorInformation)
def AskMonitorInformation() -> None:
    """Ask for the health of the monitored clusters."""


@packet(0x48, "backup A -> upstream A")
def NotifyMonitorInformation(info: Mapping[bytes, Any]) -> None:
    """Health of a backup cluster: what changed."""


@packet(0x49, "backup M -> A")
def NotifyUpstreamAdmin(address: WireAddress) -> None:
    """Admin of the upstream cluster that monitors this one."""


# --- beyond protocol 5 ------------------------------------------------------------
#
# Used only between nodes that both named the feature: the one that connects in the key
# `features` of its `extra`, the one that accepts in NotifyFeatures.

FEATURES = b"features"
FEATURE_SIZE = b"size"
# AskStoreTransaction may follow the stores at once, if one storage has all of the
# transaction. It is refused with INCOMPLETE_TRANSACTION, without effect, as long as a
# store or a check waits, or is in conflict: the client then resolves, and votes again.
FEATURE_EARLY_VOTE = b"early-vote"
# Between a storage and its master: a transaction that others wait for too long is
# dropped by the master, which says so to all storages. What its client still asks is
# refused with INCOMPLETE_TRANSACTION.
FEATURE_LEASE = b"lease"

# Replicas are compared, also the data, and damaged values repaired: between storages,
# from a master to a storage, from a client to a storage.
FEATURE_CHECK = b"check"
# A client may begin to import a transaction while those it imported before are still in
# progress; they are finished in the order of their tids: between a client and its
# master.
FEATURE_IMPORT = b"import"
# Many objects are asked in one packet: between a client and a storage.
FEATURE_OBJECTS = b"objects"
# What the primary waits for, as told to people: from an admin to a master.
FEATURE_AWAITED = b"awaited"

# Key in the `extra` of a storage: as far as it knows, it has no cell. The nid that it
# wants is no proof of who it is: another storage may have got it.
SPARE = b"spare"
# Key in the `extra` of a storage: since how many seconds its process runs. The master
# that the former process followed may not have noticed that it ended.
AGE = b"age"


@packet(0x7000, "S -> C, M -> S, M -> A")
def NotifyFeatures(features: Sequence[bytes]) -> None:
    """What the sender offers beyond protocol 5; right after AcceptIdentification."""


@packet(0xF001, "S -> C")
def AnswerSize(size: Annotated[int, Check("v >= 0")]) -> None:
    """Bytes used by the database of the storage node."""


@packet(0x7001, "C -> S", AnswerSize)
def AskSize() -> None:
    """Ask for the size of the database (feature `size`)."""


@packet(0x7002, "S -> M, M -> S")
def NotifyStalledTransaction(ttid: Tid) -> None:
    """Others wait for a transaction whose client does nothing (feature `lease`)."""


@packet(0xF003, "S -> S")
def AnswerDigests(
    items: Sequence[tuple[Tid, Oid, bytes]], next_tid: Tid | None, next_oid: Oid | None
) -> None:
    """8 bytes for each, none for what is damaged; and where to go on."""


@packet(0x7003, "S -> S", AnswerDigests)
def AskDigests(
    partition: UInt,
    of_objects: bool,
    length: UInt,
    min_tid: Tid,
    min_oid: Oid,
    max_tid: Tid,
) -> None:
    """Ask for digests of transactions or object records of a range (`check`)."""


@packet(0xF004, "S -> M")
def AnswerCheckCell(
    missing: UInt,
    extra: UInt,
    different: UInt,
    damaged: UInt,
    repaired: UInt,
    problems: Sequence[bytes],
) -> None:
    """What is wrong with a cell, and why it could not be compared with others."""


@packet(0x7004, "M -> S", AnswerCheckCell)
def AskCheckCell(
    partition: UInt, reference: Nid | None, min_tid: Tid, max_tid: Tid, repair: bool
) -> None:
    """Compare a cell with the other readable ones, or with the reference (`check`)."""


@packet(0xF005, "M -> A -> ctl")
def AnswerCheck(
    cells: Sequence[tuple[UInt, Nid, UInt, UInt, UInt, UInt, UInt, Sequence[bytes]]],
) -> None:
    """Partition, node, and what AnswerCheckCell says, of each cell."""


@packet(0x7005, "ctl -> A -> M", AnswerCheck)
def AskCheck(
    partitions: Mapping[UInt, Nid | None],
    min_tid: Tid,
    max_tid: Tid | None,
    repair: bool,
) -> None:
    """Compare replicas, with a reference (node) or with each other, and tell."""


@packet(0x7006, "C -> S, S -> S")
def NotifyDamaged(oid: Oid, tid: Tid) -> None:
    """A value that the receiver sent doesn't have its checksum (feature `check`)."""


@packet(0xF007, "M -> A")
def AnswerAwaited(lines: Sequence[bytes]) -> None:
    """Sentences; none if all is well."""


@packet(0x7007, "A -> M", AnswerAwaited)
def AskAwaited() -> None:
    """Ask what the primary waits for, and why (feature `awaited`)."""


@packet(0xF008, "S -> M")
def AnswerLastTids(tids: Sequence[tuple[UInt, Tid, Tid]]) -> None:
    """Partition, last tid of its transactions, of its records; ZERO_TID: none."""


@packet(0x7008, "M -> S", AnswerLastTids)
def AskLastTids(partitions: Sequence[UInt]) -> None:
    """Ask how recent partitions are, before they are served (feature `check`)."""


@packet(0xF009, "S -> C")
def AnswerObjects(
    rows: Sequence[tuple[Tid, Tid | None, int | None, Hash, bytes, Tid | None] | None],
    codes: Sequence[UInt],
) -> None:
    """As AnswerObject for some; why, for each None (NOT_READY: ask it alone)."""


@packet(0x7009, "C -> S", AnswerObjects)
def AskObjects(wanted: Sequence[tuple[Oid, Tid | None, Tid | None]]) -> None:
    """As AskObject for each (feature `objects`)."""
