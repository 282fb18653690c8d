"""neolog: what it shows of log files (operations.md 9)."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import signal
import sqlite3
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.lib.logger import Logger
from neo.lib.protocol import (
    BY_CODE,
    AnswerRelockObject,
    AskFinishTransaction,
    AskObject,
    AskStoreObject,
    ClusterState,
    NodeState,
    NodeType,
)
from neo.scripts import logreader, neolog
from neo.scripts.logreader import decode

START = 1_795_361_950.354
M1, S1, C1 = -268435455, 1, -536870911
OID, TID, HASH = b"\0" * 7 + b"\1", b"\2" * 8, b"h" * 20
DATA = b"hello" * 9
NODES = [
    (NodeType.MASTER, (b"127.0.0.1", 27100), M1, NodeState.RUNNING, None),
    (NodeType.STORAGE, (b"127.0.0.1", 27111), S1, NodeState.PENDING, START),
]


class Log:
    """A log file being made; each entry is 1 s after the previous one."""

    def __init__(self, path: Path, nid: int | None = M1, start: float = START) -> None:
        self.path, self.now = str(path), start
        self.logger = Logger(self.path, clock=self.tick, console=False)
        self.logger.set_node("test", nid)

    def tick(self) -> float:
        self.now += 1
        return self.now

    def packet(
        self, code: int, *args: Any, peer: str = "S1 (127.0.0.1:54758)", msg_id: int = 0
    ) -> None:
        self.logger.packet(False, peer, msg_id, code, args)


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    neolog.time.tzset()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """A log with some of everything, written but still open."""
    log = Log(tmp_path / "m1.log", None)
    log.logger.info("starting")
    log.logger.set_node("test", M1)
    none = "None (127.0.0.1:54758)"
    args = NodeType.STORAGE, None, (b"127.0.0.1", 27111), b"test", None, {b"x": True}
    log.packet(1, *args, peer=none)
    log.logger.packet(True, none, 0, 6, (1.5, NODES))
    log.logger.debug("pt: S1 R %s\nsecond line", "UUUU")
    log.packet(0x8000, 6, b"bad t\xc3\xa9xt", msg_id=0x12345)
    client = "C1 ([::1]:40000)"
    log.packet(
        AskStoreObject.code,
        *(OID, TID, 1, HASH, zlib.compress(DATA), None, TID),
        peer=client,
    )
    log.packet(0x7FFF, 1, b"?")
    log.packet(0x802E, ClusterState.RUNNING)
    log.logger.error("oops")
    yield log
    log.logger.close()


Run = Callable[..., list[str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run neolog; return the lines that it prints."""

    def run(*argv: str, status: int = 0) -> list[str]:
        capsys.readouterr()
        assert neolog.main(argv) == status
        output = capsys.readouterr()
        assert (output.err == "") is (status == 0), output.err
        return (output.err if status else output.out).splitlines()

    return run


def test_lines(log: Log, run: Run) -> None:
    """As in the examples of the specification."""
    assert run(log.path) == [
        "2026-11-22 15:39:11.3540 INFO      m1         starting",
        "2026-11-22 15:39:12.3540 PACKET    M1         "
        "#0x0000 RequestIdentification          < None (127.0.0.1:54758)",
        "2026-11-22 15:39:13.3540 PACKET    M1         "
        "#0x0000 NotifyNodeInformation          > None (127.0.0.1:54758)",
        "2026-11-22 15:39:13.3540 PACKET    M1         "
        " ! M1 | MASTER  | 127.0.0.1:27100 | RUNNING | None",
        "2026-11-22 15:39:13.3540 PACKET    M1         "
        " ! S1 | STORAGE | 127.0.0.1:27111 | PENDING | 2026-11-22 15:39:10.354000",
        "2026-11-22 15:39:14.3540 DEBUG     M1         pt: S1 R UUUU",
        "2026-11-22 15:39:14.3540 DEBUG     M1         second line",
        "2026-11-22 15:39:15.3540 PACKET    M1         "
        "#0x12345 Error                          < S1 (127.0.0.1:54758)",
        "2026-11-22 15:39:15.3540 PACKET    M1          ! PROTOCOL_ERROR (bad téxt)",
        "2026-11-22 15:39:16.3540 PACKET    M1         "
        "#0x0000 AskStoreObject                 < C1 ([::1]:40000)",
        "2026-11-22 15:39:17.3540 PACKET    M1         "
        "#0x0000 UnknownPacket[32767]           < S1 (127.0.0.1:54758)",
        "2026-11-22 15:39:18.3540 PACKET    M1         "
        "#0x0000 AnswerClusterState             < S1 (127.0.0.1:54758)",
        "2026-11-22 15:39:19.3540 ERROR     M1         oops",
    ]


def test_arguments(log: Log, run: Run) -> None:
    """Only records without packet failed with the reference (D4)."""
    lines = run("-a", "-d", "", "-n", "-", log.path)
    assert lines[-2].endswith("< S1 (127.0.0.1:54758)\t| (RUNNING,)")
    (store,) = [line for line in lines if "AskStoreObject" in line]
    compressed = zlib.compress(DATA)
    args = OID, TID, 1, HASH, compressed, None, TID
    assert store.partition("\t| ")[2] == repr(args)
    (store,) = run("-A", "-d", "", "--packet", "AskStoreObject", log.path)
    args = OID, TID, len(compressed), DATA, None, TID
    assert store.partition("\t| ")[2] == repr(args)


def test_decompression_of_what_is_not_compressed(tmp_path: Path, run: Run) -> None:
    log = Log(tmp_path / "log")
    log.packet(AskStoreObject.code, OID, TID, 0, HASH, DATA, None, TID)
    log.packet(AskStoreObject.code, OID, TID, 1, HASH, DATA, None, TID)
    log.packet(AnswerRelockObject.code, None)
    log.packet(AnswerRelockObject.code, (TID, TID, None))
    stored = 1, HASH, zlib.compress(DATA)
    log.packet(AnswerRelockObject.code, (TID, TID, stored))
    log.packet(AskStoreObject.code, OID)
    log.logger.close()
    for text, expected in zip(
        [line.partition("\t| ")[2] for line in run("-A", log.path)],
        [
            (OID, TID, 45, DATA, None, TID),
            (OID, TID, 45, "cannot decompress: ", None, TID),
            (None,),
            ((TID, TID, None),),
            ((TID, TID, (len(stored[2]), DATA)),),
            (OID,),
        ],
        strict=True,
    ):
        assert text.startswith(repr(expected).partition("decompress: ")[0])


def test_colours(log: Log, run: Run) -> None:
    lines = run("-c", "-d", "%H", "-n", "-", log.path)
    assert lines[0] == "\x1b[32m15.3540 starting\x1b[0m"
    assert lines[1].startswith("15.3540 #0x0000 RequestIdentification ")
    assert lines[-1] == "\x1b[31m15.3540 oops\x1b[0m"


def test_column_of_nodes(log: Log, run: Run) -> None:
    def columns(*argv: str) -> list[str]:
        lines = run("-d", "", "--level", "info", *argv, log.path)
        return [line.split()[1] for line in lines]

    assert columns() == ["m1", "M1"]
    assert columns("-C") == ["test/m1", "test/M1"]
    assert columns("-N") == ["m1", "m1"]
    assert columns("-n", "M1") == ["M1"]
    assert columns("-n", "M1", "--node", "m1") == ["m1", "M1"]
    assert columns("--nid", "M1") == ["M1"]
    assert columns("--nid", "S1") == []


def test_names_of_nodes(tmp_path: Path, run: Run) -> None:
    logger = Logger(str(tmp_path / "log"), name="one", console=False)
    logger.set_node("test", None)
    logger.warning("x")
    logger.close()
    (line,) = run(str(tmp_path / "log"))
    assert line.split()[3] == "one"


def test_json(log: Log, run: Run) -> None:
    entries = [json.loads(line) for line in run("--json", log.path)]
    assert len(entries) == 9
    first, request, nodes, _, error, store, unknown, _, _ = entries
    assert first.pop("pathname").endswith("test_neolog.py")
    assert first.pop("lineno") > 0
    assert first == {
        "date": START + 1,
        "level": "INFO",
        "node": "m1",
        "cluster": "test",
        "nid": None,
        "message": "starting",
    }
    assert request == {
        "date": START + 2,
        "level": "PACKET",
        "node": "M1",
        "cluster": "test",
        "nid": "M1",
        "direction": "received",
        "peer": None,
        "address": "127.0.0.1:54758",
        "msg_id": 0,
        "code": 1,
        "packet": "RequestIdentification",
    }
    assert nodes["direction"] == "sent"
    assert nodes["arguments"]["nodes"][1] == [
        "STORAGE",
        ["127.0.0.1", 27111],
        1,
        "PENDING",
        START,
    ]
    assert error["arguments"] == {"code": 6, "message": "bad téxt"}
    assert store["peer"] == "C1"
    assert "arguments" not in store
    assert unknown["packet"] is None
    arguments = [
        json.loads(line).get("arguments") for line in run("--json", "-A", log.path)
    ]
    assert arguments[5] == {
        "oid": OID.hex(),
        "serial": TID.hex(),
        "size": len(zlib.compress(DATA)),
        "data": DATA.hex(),
        "data_serial": None,
        "ttid": TID.hex(),
    }
    assert arguments[6] == [1, "?"]
    assert arguments[7] == {"state": "RUNNING"}


def test_json_of_structures(tmp_path: Path, run: Run) -> None:
    log = Log(tmp_path / "log")
    log.packet(AskFinishTransaction.code, TID, [OID], [0], [], ([OID], TID))
    log.packet(AskFinishTransaction.code, TID, [], [], [], (None, TID))
    log.packet(0x800F, {TID: None})
    log.packet(0x8033, [(TID, None, True, [OID], TID), (TID, None, True, OID, TID)])
    log.packet(AskObject.code, OID)
    log.logger.close()
    found = [json.loads(line)["arguments"] for line in run("--json", "-a", log.path)]
    oid, tid = OID.hex(), TID.hex()
    assert [found[0]["oids"], found[0]["pack"]] == [[oid], [[oid], tid]]
    assert found[1]["pack"] == [None, tid]
    assert found[2] == {"transactions": {tid: None}}
    assert found[3]["orders"][0] == [tid, None, True, [oid], tid]
    assert len(found[4]) == 1  # the wrong number: no names


# --- filters --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ("", "1 2 3 4 5 6 7 8 9"),
        ("--level debug", "1 2 3 4 5 6 7 8 9"),
        ("--level INFO", "1 9"),
        ("--level 40", "9"),
        ("--level 99999999999999999999", ""),
        ("--packet askstoreobject", "6"),
        ("--packet 0x1c --packet 32767", "6 7"),
        ("--packet A*er*", "8"),
        ("--packet A* --level error", "6 8 9"),
        ("--packet 99999999999999999999", ""),
        ("--peer S1", "5 7 8"),
        ("--peer C1 --peer None", "2 3 6"),
        ("--peer ::1", "6"),
        ("--peer [::1]:40000", "6"),
        ("--peer 127.0.0.1", "2 3 5 7 8"),
        ("--peer S1 --packet Error", "5"),
        ("--peer C1 --level critical", "6"),
        ("--grep ^second", "4"),
        ("--grep R[A-Z]+G", "3"),
        ("--grep RUNNING -a", "3 8"),
        (f"--from {START + 7.5}", "8 9"),
        (f"--from {START + 8} --to {START + 8}", "8"),
        ("--to 2026-11-22T15:39:12.5", "1 2"),
        ("--from 2026-11-22T16:39:18.5+01:00", "9"),
        ("--from -3600 --to 1", ""),
    ],
)
def test_filters(log: Log, run: Run, options: str, seconds: str) -> None:
    lines = run("--json", *options.split(), log.path)
    found = [round(json.loads(line)["date"] - START) for line in lines]
    assert found == [int(second) for second in seconds.split()]


def test_dates_before_now(log: Log, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neolog.time, "time", lambda: START + 10)
    assert len(run("--json", "--from", "-2.5", "--to=-1.5", log.path)) == 1


@pytest.mark.parametrize(
    "options",
    [
        "",
        "-x FILE",
        "-s 0 FILE",
        "-s nan FILE",
        "-F x -f FILE",
        "-F 1 FILE",
        "-C -N FILE",
        "--level high FILE",
        "--packet NoSuchPacket FILE",
        "--grep ( FILE",
        "--nid X1 FILE",
        "--from yesteryear FILE",
        "--nod M1 FILE",
    ],
)
def test_usage_errors(run: Run, options: str) -> None:
    (line,) = run(*options.split(), status=2)
    assert line.startswith("neolog: ")


def test_help(run: Run) -> None:
    text = " ".join(run("--help"))
    assert "usage: neolog [options] FILE..." in text
    assert run("--version")[0].startswith("neolog ")


# --- files -----------------------------------------------------------------------


def test_files_are_merged(tmp_path: Path, run: Run) -> None:
    for i in range(3):
        log = Log(tmp_path / f"s{i}.log", i + 1, START + i / 4)
        for _ in range(4):
            log.logger.info("text")
            log.packet(2)
        log.logger.close()
    lines = run(*(str(tmp_path / f"s{i}.log") for i in (2, 0, 1)))
    assert lines == sorted(lines)
    assert [line.split()[3] for line in lines] == ["S1", "S2", "S3"] * 8


def test_more_rows_than_are_read_at_once(
    log: Log, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(log.path)
    for batch in 1, 2, 3:
        monkeypatch.setattr(logreader, "BATCH", batch)
        assert run(log.path) == expected


@pytest.mark.parametrize("extension", ["gz", "bz2", "xz", "zst"])
def test_compressed_files(log: Log, run: Run, extension: str, tmp_path: Path) -> None:
    path = str(tmp_path / f"m1.log.{extension}")
    if extension == "zst":
        if shutil.which("zstd") is None:
            pytest.skip("the program zstd is needed to make the file")
        os.spawnlp(os.P_WAIT, "zstd", "zstd", "-q", log.path)
    else:
        compress = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[extension]
        with open(log.path, "rb") as source, compress(path, "wb") as target:
            shutil.copyfileobj(source, target)
    assert [s[:34] for s in run(path)] == [s[:34] for s in run(log.path)]
    with open(path, "r+b") as stream:
        stream.truncate(40)
    (line,) = run(path, status=1)
    assert line.startswith(f"neolog: cannot read {path}: ")


def test_missing_file(tmp_path: Path, run: Run) -> None:
    path = str(tmp_path / "log")
    expected = [f"neolog: cannot read {path}: No such file or directory"]
    assert run(path, status=1) == expected
    assert run(path + ".gz", status=1)
    assert not os.path.exists(path)


def test_log_without_packet(tmp_path: Path, run: Run) -> None:
    """D4: the reference fails."""
    log = Log(tmp_path / "log")
    log.logger.warning("x")
    log.logger.close()
    assert len(run("-a", log.path)) == 1
    (tmp_path / "empty").touch()
    assert run(str(tmp_path / "empty")) == []


def test_nothing_in_a_log_is_executed(log: Log, run: Run, tmp_path: Path) -> None:
    """W14; but the version that the text tells decides who can name the packets."""
    log.logger.close()
    trap = tmp_path / "trap"
    text = f"open({str(trap)!r}, 'w')\nPROTOCOL_VERSION = 6\n"
    db = sqlite3.connect(log.path, isolation_level=None)
    db.execute("UPDATE protocol SET text = ?", (bz2.compress(text.encode()),))
    db.close()
    lines = run("-a", log.path)
    assert not trap.exists()
    assert not any("AskStoreObject" in line for line in lines)
    assert any("UnknownPacket[28] " in line and "hhhh" in line for line in lines)
    assert run("--packet", "AskStoreObject", log.path) == []


def test_older_files(tmp_path: Path, run: Run) -> None:
    path = str(tmp_path / "s1.log")
    db = sqlite3.connect(path)
    db.executescript(
        "CREATE TABLE log (id INTEGER PRIMARY KEY AUTOINCREMENT, date REAL NOT NULL,"
        " name TEXT, level INTEGER NOT NULL, pathname TEXT, lineno INTEGER, msg TEXT);"
        "CREATE TABLE packet (id INTEGER PRIMARY KEY AUTOINCREMENT, date REAL NOT NULL,"
        " name TEXT, msg_id INTEGER NOT NULL, code INTEGER NOT NULL,"
        " peer TEXT NOT NULL, body BLOB);"
    )
    for i in range(5):
        db.execute("INSERT INTO log VALUES (NULL, 5, 'S1', 20, '', 0, ?)", (i,))
        db.execute("INSERT INTO packet VALUES (NULL, 6, 'S1', 1, 2, '> M1 ()', 'x')")
    db.commit()
    db.close()
    before = run("-d", "", "-a", path)
    assert [line.split()[-1] for line in before[:5]] == ["0", "1", "2", "3", "4"]
    assert before[5].startswith("PACKET    S1         #0x0001 UnknownPacket[2] ")
    assert "cannot decode" in before[6]
    assert len(before) == 15
    log = Log(tmp_path / "s1.log")
    log.packet(2)
    log.logger.close()
    after = run("-d", "", "-a", path)
    assert after[:15] == before
    assert "Ping" in after[15]
    assert len(after) == 16


def test_damaged_table(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    log.logger.close()
    db = sqlite3.connect(log.path)
    (page,) = db.execute(
        "SELECT rootpage FROM sqlite_master WHERE name = 'packet'"
    ).fetchone()
    (size,) = db.execute("PRAGMA page_size").fetchone()
    db.close()
    with open(log.path, "r+b") as stream:
        stream.seek((page - 1) * size)
        stream.write(b"\xff" * size)
    assert neolog.main([log.path]) == 1
    lines, err = (text.splitlines() for text in capsys.readouterr())
    assert sum("cannot read table packet: database disk image" in s for s in lines) == 1
    assert sum("oops" in line for line in lines) == 1
    assert err == ["neolog: cannot read table packet: database disk image is malformed"]


def test_file_that_is_no_database(
    log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are printed, but the exit status tells."""
    other = tmp_path / "other"
    other.write_text("This is no database. " * 100)
    assert neolog.main([str(other), log.path]) == 1
    lines, err = (text.splitlines() for text in capsys.readouterr())
    assert len(lines) == 14
    assert f"cannot read {other}: file is not a database" in lines[-1]
    assert err == [f"neolog: cannot read {other}: file is not a database"]


def test_strange_values(log: Log, run: Run) -> None:
    log.logger.close()
    db = sqlite3.connect(log.path, isolation_level=None)
    for values in (
        "1e300, 'x', 'high', 3, 'y', x'ff00'",
        "-1e300, 99, 12, NULL, NULL, NULL",
        "'date', 0, 20, '', 0, CAST(x'41ff' AS TEXT)",
        "x'00', 0, 20, '', 0, ''",
        "7.5, 0, 20, '', 0, CAST(x'41ff1b' AS TEXT)",
    ):
        db.execute(f"INSERT INTO log VALUES ({values})")
    for values in (
        "8.5, 0, 'id', 'code', 5, 'body'",
        "9.5, 0, 1, 32768, '', x'92'",
        "10.5, 0, 1, 32768, '', x'05'",
        "11.5, 0, 1, 6, '', x'91d40909'",
        "12.5, 0, 1, 32768, '', x'9299a0'",
        "13.5, 0, 1, 28, '', x'97a0a0d40909a0a00101'",
    ):
        db.execute(f"INSERT INTO packet VALUES ({values})")
    db.execute("INSERT INTO node VALUES (5, x'00', 5, 'nid')")
    db.close()
    for options in ("-a",), ("-A", "-C"), ("--json", "-A"), ("--peer", "S1"), ("-c",):
        assert run(*options, log.path)
    lines = run(log.path)
    assert any(line.endswith(r"A\xff\x1b") for line in lines)
    assert len(lines) == 13 + 3 + 6 + 4


@given(st.binary(max_size=40))
def test_bodies_that_cannot_be_decoded(body: bytes) -> None:
    with suppress(ValueError):
        assert type(decode(body)) is tuple


@given(
    st.sampled_from(sorted(BY_CODE)),
    st.lists(st.none() | st.integers() | st.binary() | st.tuples(st.binary())).map(
        tuple
    ),
)
def test_arguments_of_wrong_types(code: int, args: tuple[Any, ...]) -> None:
    packet = BY_CODE[code]
    json.dumps([neolog.plain(v, h, "") for v in args for h in packet.fields.values()])
    neolog._content(packet, args)


def test_reader_does_not_lock(log: Log) -> None:
    """A pager may stop neolog anywhere: the node goes on writing."""
    file = logreader.LogFile(log.path)
    everything = logreader.Selection(-1e9, 1e18, None, None)
    entries = logreader.merge([file], everything)
    next(entries)
    log.logger.warning("written meanwhile")
    assert log.logger._size == 0
    assert len(list(entries)) == 8
    assert [entry.message for entry in logreader.merge([file], everything)] == [
        "written meanwhile"
    ]
    file.close()


# --- follow ------------------------------------------------------------------------


def follow(
    monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]
) -> list[float]:
    """Do `steps` one by one when neolog sleeps, then Ctrl-C."""
    todo, sleeps = iter(steps), []

    def sleep(delay: float) -> None:
        sleeps.append(delay)
        step = next(todo, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(neolog.time, "sleep", sleep)
    return sleeps


def test_follow(log: Log, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def more() -> None:
        log.logger.info("more")
        log.packet(2)
        log.logger.flush()

    sleeps = follow(monkeypatch, more, lambda: None, more)
    lines = run("-f", "-s", ".5", "-d", "", "--to", str(START + 1e6), log.path)
    assert len(lines) == 13 + 4
    assert [line.split()[0] for line in lines[13:]] == ["INFO", "PACKET"] * 2
    assert sleeps == [0.5] * 4


def test_follow_from_nothing(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").touch()
    logs: list[Log] = []
    follow(
        monkeypatch,
        lambda: logs.append(Log(tmp_path / "log")),
        lambda: logs[0].packet(2),
        lambda: logs[0].logger.warning("x"),
    )
    assert len(run("-f", str(tmp_path / "log"))) == 2
    logs[0].logger.close()


def test_follow_a_rotation(log: Log, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename() -> None:
        os.rename(log.path, log.path + ".1")

    def reopen() -> None:
        log.logger.warning("last of the old")
        log.logger.reopen()
        log.logger.warning("first of the new")

    follow(monkeypatch, rename, reopen, lambda: None)
    lines = run("-f", log.path)
    assert [line.partition(" of the ")[2] for line in lines[13:]] == ["old", "new"]


def test_follow_and_flush(
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = []

    def kill(pid: int, number: int) -> None:
        calls.append((pid, number))
        if pid == 8:
            raise ProcessLookupError(3, "No such process")
        log.logger.info("flushed")
        log.logger.flush()

    monkeypatch.setattr(neolog.os, "kill", kill)
    follow(monkeypatch, lambda: None)
    assert neolog.main(["-f", "-F", "7", "--flush", "8", log.path]) == 0
    number = signal.SIGRTMIN
    assert calls == [(7, number), (8, number), (7, number)]
    output = capsys.readouterr()
    assert output.err == "neolog: process 8: No such process\n"
    assert len(output.out.splitlines()) == 14


def test_ctrl_c(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(neolog, "merge", interrupt)
    assert neolog.main([log.path]) == 130


def test_closed_pipe(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert neolog.main([log.path]) == 1
