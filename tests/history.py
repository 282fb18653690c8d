"""Check what clients of a cluster saw against what the cluster holds in the end.

Loads return serials and commits return tids, so the order of versions is known and
each rule is a look-up: no search for an order that would explain the history.
Used by simulated and by real clusters. Source: testing.md 5, whose promises P1 to P9
the violations name.

An attempt is one transaction of the workload. Times are monotonic seconds of one clock:
`start` before its synchronisation, `begin` before tpc_begin, `end` once its outcome is
known. `at` is its snapshot: the last tid once synchronised.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

OK, CONFLICT, FAIL, UNKNOWN, READ = "ok", "conflict", "fail", "unknown", "read"
OUTCOMES = {OK, CONFLICT, FAIL, UNKNOWN, READ}
BALANCE = 1000  # what each object starts with
OBJECTS = 12


@dataclass
class Attempt:
    """See the module. `total`: sum of all balances, for reads of everything."""

    token: str
    start: float
    at: bytes = b""
    begin: float | None = None
    end: float | None = None  # None: it never ended
    reads: dict[bytes, bytes] = field(default_factory=dict)  # oid: serial
    written: tuple[bytes, ...] = ()
    checked: tuple[bytes, ...] = ()
    outcome: str = UNKNOWN
    tid: bytes | None = None
    phase: str = "begin"
    error: str = ""
    total: int | None = None
    resolved: tuple[bytes, ...] = ()  # of `written`: put on top of a later version


@dataclass(frozen=True)
class Value:
    """Content of an object: tokens of all transactions that appended to it."""

    tokens: tuple[str, ...] = ()
    balance: int = BALANCE

    def encode(self) -> bytes:
        """Bytes to store."""
        return json.dumps([self.tokens, self.balance]).encode()

    def append(self, token: str, amount: int = 0) -> Value:
        """The next value."""
        return Value((*self.tokens, token), self.balance + amount)


def decode(data: bytes) -> Value:
    """Inverse of `Value.encode`."""
    tokens, balance = json.loads(data)
    return Value(tuple(tokens), balance)


# oid -> versions by ascending tid
Versions = Mapping[bytes, Sequence[tuple[bytes, Value]]]


def check(
    attempts: Iterable[Attempt],
    versions: Versions,
    replicas: Mapping[str, Any] | None = None,
    transactions: Mapping[bytes, Iterable[bytes]] | None = None,
) -> list[str]:
    """What is wrong: one line for each violation.

    `replicas`: content of each replica of one partition or more, to be equal where the
    key before the last `/` is. `transactions`: tid -> oids, from the metadata.
    """
    history = list(attempts)
    wrong: list[str] = []
    found = _tokens(versions, wrong)
    _check_outcomes(history, found, versions, wrong)
    _check_snapshots(history, versions, wrong)
    _check_order(history, wrong)
    _check_bases(history, versions, wrong)
    known = {attempt.token for attempt in history}
    wrong += [
        f"P1: token {token} was written by nobody"
        for token in found
        if token not in known
    ]
    if replicas is not None:
        _check_replicas(replicas, wrong)
    if transactions is not None:
        _check_metadata(versions, transactions, wrong)
    return wrong


def _tokens(
    versions: Versions, wrong: list[str]
) -> dict[str, dict[bytes, list[bytes]]]:
    """token -> tid -> oids; each version adds one token to the previous one."""
    found: dict[str, dict[bytes, list[bytes]]] = {}
    for oid, revisions in versions.items():
        previous: Value | None = None
        last_tid = b""
        for tid, value in revisions:
            if tid <= last_tid:
                wrong.append(f"P2: versions of {oid.hex()} out of order at {tid.hex()}")
            last_tid = tid
            before = () if previous is None else previous.tokens
            if value.tokens[:-1] != before:
                wrong.append(
                    f"P5: {oid.hex()} at {tid.hex()}: {value.tokens} follows {before}"
                )
            for token in value.tokens[-1:]:
                found.setdefault(token, {}).setdefault(tid, []).append(oid)
            previous = value
    return found


def _check_outcomes(
    history: list[Attempt],
    found: dict[str, dict[bytes, list[bytes]]],
    versions: Versions,
    wrong: list[str],
) -> None:
    for attempt in history:
        token = attempt.token
        places = found.get(token, {})
        assert attempt.outcome in OUTCOMES, attempt
        if len(places) > 1:
            tids = ", ".join(sorted(tid.hex() for tid in places))
            wrong.append(f"P8: {token} is present at several tids: {tids}")
        for tid, oids in places.items():
            if sorted(oids) != sorted(attempt.written):
                wrong.append(
                    f"P1: {token} at {tid.hex()} wrote {_hex(oids)}"
                    f" instead of {_hex(attempt.written)}"
                )
        if attempt.outcome == OK:
            assert attempt.tid is not None
            if attempt.written and attempt.tid not in places:
                wrong.append(
                    f"P7: {token} was acknowledged at {attempt.tid.hex()}: lost"
                )
        elif attempt.outcome != UNKNOWN and places:
            wrong.append(f"P9: {token} ended as {attempt.outcome} and is present")


def _check_snapshots(
    history: list[Attempt], versions: Versions, wrong: list[str]
) -> None:
    expected = BALANCE * len(versions)
    tids = {oid: [tid for tid, _ in revisions] for oid, revisions in versions.items()}
    for attempt in history:
        for oid, serial in attempt.reads.items():
            known = tids.get(oid, [])
            n = bisect_right(known, attempt.at)
            right = known[n - 1] if n else b""
            if serial != right:
                wrong.append(
                    f"P4: {attempt.token} at {attempt.at.hex()} read {oid.hex()} of"
                    f" {serial.hex()} instead of {right.hex()}"
                )
        if attempt.total is not None and attempt.total != expected:
            wrong.append(
                f"P4: {attempt.token} at {attempt.at.hex()} read a total of"
                f" {attempt.total} instead of {expected}"
            )


def _check_order(history: list[Attempt], wrong: list[str]) -> None:
    done = sorted(
        (a.end, a.tid) for a in history if a.outcome == OK and a.tid and a.end
    )
    ends = [end for end, _ in done]
    greatest = b""
    last: list[bytes] = []  # greatest tid acknowledged so far
    for _, tid in done:
        greatest = max(greatest, tid)
        last.append(greatest)

    def acknowledged(time: float) -> bytes:
        n = bisect_right(ends, time)
        return last[n - 1] if n else b""

    seen: dict[bytes, str] = {}
    for attempt in history:
        if attempt.at and attempt.at < acknowledged(attempt.start):
            wrong.append(
                f"P6: {attempt.token} synchronised to {attempt.at.hex()}, after"
                f" {acknowledged(attempt.start).hex()} was acknowledged"
            )
        tid = attempt.tid
        if attempt.outcome != OK or tid is None:
            continue
        if tid in seen:
            wrong.append(f"P2: {tid.hex()} is both {seen[tid]} and {attempt.token}")
        seen[tid] = attempt.token
        if attempt.begin is not None and tid <= acknowledged(attempt.begin):
            wrong.append(
                f"P6: {attempt.token} got {tid.hex()}, begun after"
                f" {acknowledged(attempt.begin).hex()} was acknowledged"
            )
        if tid <= attempt.at:
            wrong.append(f"P3: {attempt.token} got {tid.hex()} <= its snapshot")


def _check_bases(history: list[Attempt], versions: Versions, wrong: list[str]) -> None:
    for attempt in history:
        tid = attempt.tid
        if attempt.outcome != OK or tid is None:
            continue
        for oid in (*attempt.written, *attempt.checked):
            known = [t for t, _ in versions.get(oid, ()) if t < tid]
            base = known[-1] if known else b""
            read = attempt.reads.get(oid, b"")
            if base < read if oid in attempt.resolved else base != read:
                what = "wrote" if oid in attempt.written else "checked"
                wrong.append(
                    f"P5: {attempt.token} {what} {oid.hex()} on {read.hex()},"
                    f" not on {base.hex()}"
                )


def _check_replicas(replicas: Mapping[str, Any], wrong: list[str]) -> None:
    first: dict[str, tuple[str, Any]] = {}
    for name, content in replicas.items():
        group = name.rpartition("/")[0]
        other, expected = first.setdefault(group, (name, content))
        if content != expected:
            wrong.append(
                f"P12: {other} and {name} differ: {_difference(expected, content)}"
            )


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in sorted({*a, *b}, key=repr) if a.get(k) != b.get(k)]
        return ", ".join(f"{k!r}: {a.get(k)!r} != {b.get(k)!r}" for k in keys[:3])
    return f"{a!r} != {b!r}"


def _check_metadata(
    versions: Versions, transactions: Mapping[bytes, Iterable[bytes]], wrong: list[str]
) -> None:
    written: dict[bytes, list[bytes]] = {}
    for oid, revisions in versions.items():
        for tid, _ in revisions:
            written.setdefault(tid, []).append(oid)
    for tid, oids in written.items():
        if tid not in transactions:
            wrong.append(f"P12: no metadata of {tid.hex()}")
        elif not set(oids) <= set(transactions[tid]):
            wrong.append(
                f"P12: metadata of {tid.hex()} name {_hex(transactions[tid])},"
                f" not {_hex(oids)}"
            )


def _hex(oids: Iterable[bytes]) -> str:
    return "{" + ", ".join(sorted(oid.hex() for oid in oids)) + "}"


def longest_gap(history: Iterable[Attempt], since: float, until: float) -> float:
    """Seconds without a commit."""
    ends = sorted(a.end for a in history if a.outcome == OK and a.end is not None)
    times = [since, *(end for end in ends if since <= end <= until), until]
    return max(b - a for a, b in pairwise(times))


def summary(history: Iterable[Attempt]) -> dict[str, int]:
    """Attempts by outcome and error."""
    counts: dict[str, int] = {}
    for attempt in history:
        key = f"{attempt.outcome} {attempt.phase} {attempt.error}".strip()
        counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items()))
