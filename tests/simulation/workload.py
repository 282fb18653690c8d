"""Applications of simulated clients: tokens and transfers between a few objects.

Each attempt appends its own token to what it writes, so the final content tells which
attempts are there, where, and in which order (`tests/history.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, POSKeyError
from ZODB.utils import p64, u64

from neo.client.exception import NEOStorageUnknownOutcome
from neo.client.Storage import Storage
from tests.history import (
    CONFLICT,
    FAIL,
    OBJECTS,
    OK,
    READ,
    UNKNOWN,
    Attempt,
    Value,
    check,
    decode,
)

from .runtime import Simulation

ALL = [p64(i) for i in range(OBJECTS)]
# What values begin with: in this workload, and ZODB's own.
TOKENS, PICKLE = b"[", b"\x80"
RESOLVABLE = "r"  # end of tokens
THINK = 0.02  # seconds, mean pause between two attempts


class TokenStorage(Storage):
    """A storage whose objects resolve conflicts, if the last token wants it."""

    def tryToResolveConflict(  # noqa: N802 - ZODB's name
        self,
        oid: bytes,
        committed: bytes,
        base: bytes,
        data: bytes,
        committed_data: bytes = b"",
    ) -> bytes:
        """Append to the committed version instead."""
        if data.startswith(PICKLE):
            return super().tryToResolveConflict(
                oid, committed, base, data, committed_data
            )
        if not data.startswith(TOKENS):
            raise ConflictError(oid=oid, serials=(committed, base), data=data)
        mine = decode(data)
        token = mine.tokens[-1]
        if not token.endswith(RESOLVABLE):
            raise ConflictError(oid=oid, serials=(committed, base), data=data)
        try:
            old = decode(self.loadSerial(oid, base))
            theirs = decode(committed_data or self.loadSerial(oid, committed))
        except POSKeyError:  # truncated meanwhile; ZODB takes any error for a conflict
            raise ConflictError(oid=oid, serials=(committed, base)) from None
        return theirs.append(token, mine.balance - old.balance).encode()


class Tokens:
    """The workload and what is known of its attempts."""

    def __init__(
        self,
        sim: Simulation,
        think: float = THINK,
        padding: int = 0,
        oids: list[bytes] = ALL,
    ) -> None:
        self.sim = sim
        self.oids = oids
        self.rng = sim.rng("workload")
        self.think = think
        self.padding = padding  # greatest size of what JSON ignores, bytes
        self.attempts: list[Attempt] = []
        self.running = 0  # threads that have not ended
        self.stopping = False
        self.committed = 0  # attempts that were acknowledged
        #: called with the oids and the tid of each commit
        self.acknowledged: Callable[[list[bytes], bytes], object] | None = None
        self.created: dict[bytes, str] = {}  # new objects: oid -> token
        # (when it was asked for, since when all is as usual, to which tid): one at most
        self.truncations: list[tuple[float, float, bytes]] = []
        self._number = 0

    # --- threads ----------------------------------------------------------------------

    def create(self, storage: Storage) -> None:
        """Make the objects, as soon as all storages are ready: the first attempt."""
        attempt = self._attempt("init")
        while attempt.outcome != OK:
            txn = TransactionMetaData()
            try:
                storage.tpc_begin(txn)
                for oid in self.oids:
                    storage.store(oid, bytes(8), Value(("init",)).encode(), "", txn)
                storage.tpc_vote(txn)
                attempt.tid = storage.tpc_finish(txn)
                attempt.outcome = OK
                self.committed += 1
            except TransientError:
                storage.tpc_abort(txn)
        attempt.written = tuple(self.oids)
        attempt.end = self.sim.time

    def start(self, name: str, storage: Storage, steps: int = 1_000_000) -> None:
        """Run one more thread in a client."""
        self._number += 1
        self.sim.spawn(name, self._work, name, storage, self._number, steps)

    def _work(self, name: str, storage: Storage, number: int, steps: int) -> None:
        process = self.sim.processes[name]
        self.running += 1
        try:
            for step in range(steps):
                if self.stopping:
                    break
                process.sleep(self.rng.expovariate(1 / self.think))
                token = f"{name}.{process.incarnation}:{number}:{step}"
                if self.rng.random() < 0.5:
                    token += RESOLVABLE
                self.step(
                    storage,
                    token,
                    everything=step % 10 == 9,
                )
        finally:
            self.running -= 1

    def _attempt(self, token: str) -> Attempt:
        attempt = Attempt(token, self.sim.time)
        self.attempts.append(attempt)
        return attempt

    # --- one attempt ------------------------------------------------------------------

    def step(self, storage: Storage, token: str, everything: bool = False) -> Attempt:
        """Read everything, or commit something."""
        attempt = self._attempt(token)
        try:
            storage.sync()
            attempt.at = storage.lastTransaction()
            if everything:
                values = [self._read(storage, attempt, oid) for oid in self.oids]
                attempt.total = sum(value.balance for value in values)
                attempt.outcome = READ
            else:
                self._commit(storage, attempt)
        except (TransientError, NEOStorageUnknownOutcome) as error:
            attempt.error = type(error).__name__
            if isinstance(error, NEOStorageUnknownOutcome):
                attempt.outcome = UNKNOWN
            elif isinstance(error, ConflictError):
                attempt.outcome = CONFLICT
            else:
                attempt.outcome = FAIL
        attempt.end = self.sim.time
        return attempt

    def _read(self, storage: Storage, attempt: Attempt, oid: bytes) -> Value:
        found = storage.loadBefore(oid, p64(u64(attempt.at) + 1))
        assert found is not None, (oid, attempt)
        data, serial, end = found
        assert serial <= attempt.at, attempt
        assert end is None or end > attempt.at, attempt
        attempt.reads[oid] = serial
        return decode(data)

    def _commit(self, storage: Storage, attempt: Attempt) -> None:
        rng = self.rng
        kind = rng.random()
        token = attempt.token
        checked = new = None
        if kind < 0.5:
            oids = rng.sample(self.oids, rng.randint(1, 3))
            amounts = [0] * len(oids)
        elif kind < 0.85:
            oids = rng.sample(self.oids, 2)
            amount = rng.randint(1, 100)
            amounts = [-amount, amount]
        else:
            *oids, checked = rng.sample(self.oids, 2)
            amounts = [0]
        if rng.random() < 0.1:
            new = storage.new_oid()
            if new in self.created:
                raise self.sim.failure(f"P11: {new.hex()} is given again")
        values = {
            oid: self._read(storage, attempt, oid).append(token, amount)
            for oid, amount in zip(oids, amounts, strict=True)
        }
        if checked is not None:
            self._read(storage, attempt, checked)
        txn = TransactionMetaData("user", token)
        attempt.begin = self.sim.time
        storage.tpc_begin(txn)
        try:
            attempt.phase = "store"
            for oid, value in values.items():
                storage.store(
                    oid, attempt.reads[oid], self._pad(value.encode()), "", txn
                )
            if new is not None:
                data = Value((token,), 0).encode()
                storage.store(new, bytes(8), data, "", txn)
            if checked is not None:
                attempt.checked = (checked,)
                storage.checkCurrentSerialInTransaction(
                    checked, attempt.reads[checked], txn
                )
            attempt.written = tuple(oids)
            changed = oids if new is None else [*oids, new]
            attempt.phase = "vote"
            attempt.resolved = tuple(storage.tpc_vote(txn))
            attempt.phase = "finish"
            attempt.tid = storage.tpc_finish(txn)
            attempt.outcome = OK
            self.committed += 1
            if new is not None and not self.truncating:
                self.created[new] = token
            if self.acknowledged is not None:
                self.acknowledged(changed, attempt.tid)
        finally:
            storage.tpc_abort(txn)

    def _pad(self, data: bytes) -> bytes:
        if not self.padding:
            return data
        # Of the biggest, only some.
        share = self.rng.random() ** (8 if self.padding < 1 << 20 else 40)
        return data + b" " * int(self.padding * share)

    # --- truncation -------------------------------------------------------------------

    def truncate(self, back: int) -> bytes | None:
        """What is after some commit is going to be lost: its tid, if there is one.

        `back`: how many commits are lost, at least. Whether and when that happens is
        not known, up to `truncated()`.
        """
        done = sorted(a.tid for a in self.attempts if a.outcome == OK and a.tid)
        if len(done) <= back + 1:  # the first one made the objects
            return None
        tid = done[-back - 1]
        self.truncations.append((self.sim.time, math.inf, tid))
        self.created.clear()
        return tid

    @property
    def truncating(self) -> bool:
        """Whether a truncation may go on."""
        return bool(self.truncations) and self.truncations[-1][1] == math.inf

    def truncated(self) -> None:
        """No truncation goes on any more."""
        now = self.sim.time
        self.truncations = [
            (sent, min(end, now), tid) for sent, end, tid in self.truncations
        ]

    def _forget_truncated(
        self, versions: dict[bytes, list[tuple[bytes, Value]]]
    ) -> None:
        """Expect nothing of what truncations may have removed, except that they remove
        all or nothing.
        """
        # By token: with a clock that jumped, a tid that was truncated is given again.
        present = {
            (tid, token)
            for revisions in versions.values()
            for tid, value in revisions
            for token in value.tokens
        }
        for sent, end, limit in self.truncations:
            later = [
                a for a in self.attempts if a.start < end and (a.tid or a.at) > limit
            ]
            found = {
                (a.tid, a.token) in present
                for a in later
                if a.outcome == OK and a.end is not None and a.end < sent and a.written
            }
            if len(found) > 1:
                raise self.sim.failure(f"P14: half truncated to {limit.hex()}")
            if found == {False}:
                self.sim.sometimes("truncated")
            for attempt in later:
                if attempt.outcome == OK:
                    attempt.outcome, attempt.tid = UNKNOWN, None
                attempt.reads, attempt.total, attempt.at = {}, None, b""

    # --- the end ----------------------------------------------------------------------

    def check(
        self, storage: Storage, replicas: Any = None, metadata: Any = None
    ) -> None:
        """Compare with what the cluster holds: run it in an application thread."""
        storage.sync()
        versions = {}
        tid_after = p64(u64(storage.lastTransaction()) + 1)
        for oid in self.oids:
            revisions = []
            tid = tid_after
            while True:
                try:
                    found = storage.loadBefore(oid, tid)
                except POSKeyError:
                    found = None
                if found is None:
                    break
                data, tid, _ = found
                revisions.append((tid, decode(data)))
            versions[oid] = revisions[::-1]
        for oid, token in self.created.items():
            found = storage.loadBefore(oid, tid_after)
            assert found is not None, (oid, token)
            assert decode(found[0]).tokens == (token,), (oid, token, found)
        self._forget_truncated(versions)
        wrong = check(self.attempts, versions, replicas, metadata)
        if wrong:
            raise self.sim.failure("\n".join(wrong))
