"""The log: ring, file, console (operations.md 8)."""

from __future__ import annotations

import bz2
import contextlib
import logging
import os
import signal
import sqlite3
from collections.abc import Callable
from math import nextafter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgpack import unpackb

from neo.lib import logger as module
from neo.lib.codec import pack
from neo.lib.exception import ConfigurationError
from neo.lib.logger import OVERHEAD, Logger, install_signals
from neo.lib.protocol import BY_CODE, AskObject, ClusterState, NodeState

START = 1_000_000.25
OID, TID = b"\0" * 7 + b"\1", b"\2" * 8
PEER = "S1 (127.0.0.1:10000)"


class Clock:
    """A date that tests set."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Peer:
    """A peer whose text counts how often it is made."""

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self.count, self.act = 0, act

    def __str__(self) -> str:
        self.count += 1
        self.act()
        return PEER


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s1.log")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the console stderr, although pytest has handlers on the root logger."""
    monkeypatch.setattr(logging.getLogger("NEO"), "hasHandlers", lambda: False)


def rows(path: str, sql: str = "SELECT * FROM log ORDER BY date") -> list[Any]:
    db = sqlite3.connect(path)
    try:
        return db.execute(sql).fetchall()
    finally:
        db.close()


def messages(path: str) -> list[str]:
    return [message for (message,) in rows(path, "SELECT msg FROM log ORDER BY date")]


def ask_object(logger: Logger, peer: object = PEER) -> None:
    data = pack((7, AskObject.code, (OID, None, TID)))
    logger.message(True, peer, 7, AskObject.code, data)


# --- file ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "columns"),
    [
        (
            "log",
            "date REAL, node INTEGER, level INTEGER!, pathname TEXT, lineno INTEGER, "
            "msg TEXT",
        ),
        (
            "packet",
            "date REAL, node INTEGER, msg_id INTEGER!, code INTEGER!, peer TEXT!, "
            "body BLOB",
        ),
        ("node", "id INTEGER, name TEXT, cluster TEXT, nid INTEGER"),
        ("protocol", "date REAL, text BLOB!"),
    ],
)
def test_tables(path: str, table: str, columns: str) -> None:
    logger = Logger(path)
    found = rows(path, f"PRAGMA table_info({table})")
    # NOT NULL is implied for the key of a table without rowid.
    text = ", ".join(f"{c[1]} {c[2]}{'!' * (c[3] and not c[5])}" for c in found)
    assert text == columns
    assert [c[1] for c in found if c[5]] == [columns.split()[0]]
    logger.close()


def test_rows(path: str, clock: Clock) -> None:
    logger = Logger(path, clock=clock)
    logger.info("no name yet")
    logger.set_node("test", None)
    clock.now += 1
    logger.debug("half a name: %s", None)
    logger.set_node("test", -268435455)
    clock.now += 1
    ask_object(logger)
    args = ClusterState.RUNNING, [(1, NodeState.DOWN)]
    logger.packet(False, None, 8, 0x802E, args)
    logger.close()
    assert rows(path, "SELECT * FROM node") == [
        (0, None, "test", None),
        (1, None, "test", -268435455),
    ]
    found = rows(path)
    assert [(*row[:3], row[5]) for row in found] == [
        (START, None, 20, "no name yet"),
        (START + 1, 0, 10, "half a name: None"),
    ]
    assert found[0][3].endswith("test_logger.py")
    assert found[0][4] == test_rows.__code__.co_firstlineno + 2
    date = START + 2
    (sent, received) = rows(path, "SELECT * FROM packet ORDER BY date")
    assert sent[:5] == (date, 1, 7, 0x20, f"> {PEER}")
    assert sent[5] == b"\x93\xc4\x08" + OID + b"\xc0\xc4\x08" + TID
    assert received[:5] == (nextafter(date, 1e9), 1, 8, 0x802E, "< None")
    assert received[5] == bytes.fromhex("92d40102919201d40301")


def test_pathname_is_relative_to_the_package(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = Logger(path, console=False)
    logger.warning("from elsewhere")
    assert os.path.isdir(module.PACKAGE + "lib")
    monkeypatch.setattr(module, "PACKAGE", os.path.dirname(__file__) + os.sep)
    logger.warning("from the package")
    logger.close()
    assert [row[3] for row in rows(path)] == [__file__, "test_logger.py"]


def test_node_rows_are_reused(path: str) -> None:
    for nid in 1, 2, 1:
        logger = Logger(path, name="a")
        logger.set_node("test", nid)
        logger.warning("x")
        logger.close()
    assert rows(path, "SELECT * FROM node") == [
        (0, "a", "test", 1),
        (1, "a", "test", 2),
    ]
    assert [row[1] for row in rows(path)] == [0, 1, 0]


@given(
    entries=st.lists(
        st.tuples(st.booleans(), st.sampled_from([0, 1, -1, nextafter(1, 2) - 1])),
        max_size=30,
    )
)
def test_dates_are_unique(
    entries: list[tuple[bool, float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Nothing is lost whatever the clock does; order is kept unless it goes back."""
    path = str(tmp_path_factory.mktemp("log") / "log")
    for _ in range(2):  # the same dates again, by another process
        clock = Clock()
        logger = Logger(path, clock=clock)
        for i, (packet, step) in enumerate(entries):
            clock.now += step
            if packet:
                logger.packet(True, PEER, i, 2, ())
            else:
                logger.info("%d", i)
        logger.close()
    found = rows(
        path,
        "SELECT date, msg_id FROM packet UNION ALL"
        " SELECT date, CAST(msg AS INTEGER) FROM log ORDER BY date",
    )
    numbers = [number for _, number in found]
    assert sorted(numbers) == sorted(list(range(len(entries))) * 2)
    if all(step >= 0 for _, step in entries):
        seen: list[int] = []
        for number in numbers:
            if number not in seen:
                seen.append(number)
        assert seen == sorted(seen)


def test_protocol_text_is_self_contained(path: str) -> None:
    """What the reference's reader would execute defines just what it needs."""
    logger = Logger(path)
    logger.warning("no packet")
    assert rows(path, "SELECT * FROM protocol") == []
    ask_object(logger)
    logger.flush()
    ((date, text),) = rows(path, "SELECT * FROM protocol")
    assert date == 0
    assert len(text) < 2000
    scope: dict[str, Any] = {}
    exec(bz2.decompress(text), scope)
    for code, packet in BY_CODE.items():
        assert scope["Packets"][code].__name__ == packet.name
    nids = (None, "None"), (1, "S1"), (-268435455, "M1"), (-536870911, "C1")
    assert [str(scope["uuid_str"](nid)) for nid, _ in nids] == [s for _, s in nids]
    unpacker = scope["Unpacker"](strict_map_key=False, use_list=False)
    unpacker.feed(b"\x91\x01")
    assert next(unpacker) == (1,)
    logger.close()


def test_protocol_row_is_added_when_it_changes(path: str, clock: Clock) -> None:
    for text in (b"old", None, None):
        logger = Logger(path, clock=clock)
        ask_object(logger)
        logger.close()
        if text:
            db = sqlite3.connect(path, isolation_level=None)
            db.execute("UPDATE protocol SET text = ?", (text,))
            db.close()
    assert [row[0] for row in rows(path, "SELECT * FROM protocol")] == [0, START]


def test_older_tables_are_renamed(path: str) -> None:
    db = sqlite3.connect(path)
    db.executescript(
        "CREATE TABLE log (id INTEGER PRIMARY KEY AUTOINCREMENT, date REAL NOT NULL,"
        " name TEXT, level INTEGER NOT NULL, pathname TEXT, lineno INTEGER, msg TEXT);"
        "CREATE INDEX _log_i1 ON log(date);"
        "INSERT INTO log VALUES (1, 2.5, 'S1', 20, 'a.py', 3, 'old')"
    )
    db.close()
    for _ in range(2):
        logger = Logger(path)
        logger.warning("new")
        logger.close()
    assert messages(path) == ["new", "new"]
    assert [row[-1] for row in rows(path, "SELECT * FROM log1")] == ["old"]


def test_rotation(path: str) -> None:
    logger = Logger(path)
    logger.set_node("test", 1)
    ask_object(logger)
    logger.warning("old")
    logger.info("in memory")
    os.rename(path, path + ".1")
    logger.warning("still the old file")
    logger.info("in memory again")
    logger.reopen()
    logger.warning("new")
    assert messages(path + ".1") == ["old", "in memory", "still the old file"]
    assert messages(path) == ["in memory again", "new"]
    assert rows(path, "SELECT node FROM log") == [(0,), (0,)]
    os.rename(path, path + ".2")
    logger.reopen()
    # Without any packet, no need to know the protocol.
    tables = "SELECT name FROM sqlite_master ORDER BY name"
    assert rows(path + ".2", tables) == [("log",), ("node",), ("packet",)]
    assert ("protocol",) in rows(path + ".1", tables)
    logger.close()


# --- when it is written -------------------------------------------------------


def test_what_precedes_a_problem_is_written_with_it(path: str) -> None:
    logger = Logger(path)
    assert logger.tracing
    logger.debug("detail")
    ask_object(logger)
    assert messages(path) == []
    logger.warning("problem")
    assert messages(path) == ["detail", "problem"]
    assert len(rows(path, "SELECT * FROM packet")) == 1
    logger.info("later")
    logger.flush()
    assert messages(path)[2:] == ["later"]
    assert logger._size == 0
    logger.info("last")
    logger.close()
    logger.close()
    logger.warning("after")
    logger.flush()
    assert messages(path)[3:] == ["last"]


def test_everything_is_written_at_once(path: str) -> None:
    logger = Logger(path, everything=True)
    logger.debug("detail")
    assert messages(path) == ["detail"]
    ask_object(logger)
    assert len(rows(path, "SELECT * FROM packet")) == 1
    logger.close()


def test_flush_asked_while_writing(path: str) -> None:
    """A signal handler may flush, reopen or log while its thread is writing."""
    logger = Logger(path)

    def interrupt() -> None:
        logger.warning("from a handler")
        logger.reopen()

    ask_object(logger, Peer(interrupt))
    logger.warning("first")
    assert messages(path) == ["first", "from a handler"]
    assert logger._size == 0
    logger.close()


def test_text_is_made_late_and_once(path: str) -> None:
    logger, peer = Logger(path), Peer()
    for _ in range(3):
        ask_object(logger, peer)
    assert peer.count == 0
    logger.flush()
    assert peer.count == 1
    logger.close()
    without = Logger()
    assert not without.tracing
    without.info("%s", peer)
    without.flush()
    assert peer.count == 1


def test_what_may_change_is_copied_at_once(path: str) -> None:
    logger, oids, text = Logger(path), [OID], ["a"]
    logger.packet(True, PEER, 1, 0x16, (TID, oids))
    logger.info("%s", text)
    oids.append(TID)
    text.append("b")
    logger.close()
    assert messages(path) == ["['a']"]
    ((body,),) = rows(path, "SELECT body FROM packet")
    assert unpackb(body) == [TID, [OID]]


def test_mistakes_do_not_stop_the_node(path: str) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError

    logger = Logger(path, console=False)
    logger.info("%d", "text")
    logger.info("%s", Broken())
    logger.info("100%")
    logger.info("undecodable \udcff %s", "\udcfe")
    logger.packet(True, "peer \udcff", 1, 2, (object(),))
    logger.close()
    first, second, *others = messages(path)
    assert first.startswith("%d % (")
    assert "Broken object" in second
    assert others == ["100%", "undecodable \\udcff \\udcfe"]
    assert rows(path, "SELECT peer, body FROM packet") == [("> peer \\udcff", None)]


def test_exception(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    logger = Logger(path)
    try:
        raise KeyError(3)
    except KeyError:
        logger.exception("while %s", "testing")
    logger.close()
    (text,) = messages(path)
    lines = text.splitlines()
    assert lines[:2] == ["while testing", "Traceback (most recent call last):"]
    assert lines[-1] == "KeyError: 3"
    assert len(capsys.readouterr().err.splitlines()) == len(lines)


def test_throttled(path: str, clock: Clock) -> None:
    logger = Logger(path, clock=clock, console=False)
    for step in 0, 1, 58.5, 0.4, 0.2, 60, -1000:
        clock.now += step
        logger.throttled("a", logging.WARNING, "trouble %d", 1)
    logger.throttled("b", logging.WARNING, "other")
    logger.close()
    texts = [text for _, text in sorted((m != "other", m) for m in messages(path))]
    assert texts[0] == "other"
    assert len(texts) == 5
    counted = [text for text in texts if "(" in text]
    assert len(counted) == 1
    assert counted[0].startswith("trouble 1 (3 more since ")
    for i in range(2 * module.THROTTLE_KEYS_MAX):
        logger.throttled(i, logging.WARNING, "x")
    assert len(logger._throttled) == module.THROTTLE_KEYS_MAX


# --- bounds -------------------------------------------------------------------


def held(logger: Logger) -> int:
    return sum(entry[7] for entry in logger._ring)


@given(
    sizes=st.lists(st.integers(0, 30_000), max_size=60),
    limit=st.integers(5_000, 40_000),
    keep=st.none() | st.integers(0, 30_000),
)
def test_ring_is_bounded(
    sizes: list[int],
    limit: int,
    keep: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = str(tmp_path_factory.mktemp("log") / "log")
    logger = Logger(path, limit=limit, max_packet=keep)
    for i, size in enumerate(sizes):
        if i % 3:
            args = OID, TID, None, 0, b"", b"x" * size, None
            logger.packet(True, PEER, i, 0x8020, args)
        else:
            logger.info("%s%s", "é" * (size // 8), b"")
        assert logger._size == held(logger) <= limit
    count = len(logger._ring)
    # Only the oldest are dropped, and not many more than needed.
    assert count == len(sizes) or held(logger) + 32_000 > limit
    logger.close()
    assert (
        len(rows(path, "SELECT date FROM log UNION SELECT date FROM packet")) == count
    )


def test_big_packets_count_for_what_they_hold(path: str) -> None:
    """D21: the reference counts arguments instead of bytes."""
    logger = Logger(path)
    for _ in range(20):
        logger.message(True, PEER, 1, 0x1C, pack((1, 0x1C, (OID, bytes(1 << 20)))))
    assert len(logger._ring) == 15
    logger.close()


@pytest.mark.parametrize("args", [(OID, bytes(1 << 20)), ([OID], bytes(1 << 20))])
def test_packets_of_unknown_size(path: str, args: tuple[Any, ...]) -> None:
    for keep, count in (None, 15), (1 << 20, 20):
        logger = Logger(path, max_packet=keep)
        for _ in range(20):
            logger.packet(False, PEER, 1, 0x1C, args)
        assert len(logger._ring) == count
        logger.close()
    bodies = rows(path, "SELECT count(*), count(body) FROM packet")
    assert bodies == [(35, 15)]


def test_max_packet(path: str) -> None:
    logger = Logger(path, max_packet=100)
    for size in 100, 101:
        data = pack((1, AskObject.code, (bytes(size - 6),)))
        assert len(data) == size
        logger.message(True, PEER, 1, AskObject.code, data)
    assert held(logger) == 2 * OVERHEAD + 100
    logger.close()
    bodies = [body for (body,) in rows(path, "SELECT body FROM packet ORDER BY date")]
    assert bodies[0]
    assert bodies[1] is None


# --- failures -----------------------------------------------------------------


def test_file_in_use(path: str) -> None:
    logger = Logger(path)
    with pytest.raises(ConfigurationError, match=f"in use by process {os.getpid()}"):
        Logger(path)
    os.rename(path, path + ".1")  # rotation changes nothing to that
    with pytest.raises(ConfigurationError, match="in use"):
        Logger(path)
    logger.close()
    Logger(path).close()


def test_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("This is no database. " * 100)
    for name, reason in [
        ("missing/log", "No such file or directory"),
        ("text/log", "Not a directory"),
        ("text", "file is not a database"),
        (".", "unable to open database file"),
    ]:
        path = str(tmp_path / name)
        for _ in range(2):  # nothing stays locked
            with pytest.raises(ConfigurationError) as caught:
                Logger(path)
            assert str(caught.value) == f"cannot open log file {path}: {reason}"
    assert os.listdir(tmp_path) == ["text"]


def test_full_disk(path: str, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """testing.md 9, scenario 22: one line, and the node goes on."""
    logger = Logger(path, clock=clock, limit=100_000)
    logger.warning("good")
    assert logger._file
    assert logger._file._db
    logger._file._db.execute("PRAGMA max_page_count = 1")
    capsys.readouterr()
    logger.info("x" * 10_000)
    logger.flush()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot write the log file {path}: database or disk is full" in line
    assert messages(path) == ["good"]
    # It is opened again for the retry, so make that fail too.
    os.rename(path, path + ".1")
    os.mkdir(path)
    for _ in range(20):
        logger.info("x" * 10_000)
        logger.warning("bad")
        clock.now += 0.7
        assert logger._size == held(logger) <= 100_000
    assert "cannot write" not in capsys.readouterr().err
    os.rmdir(path)
    os.rename(path + ".1", path)
    clock.now += 1
    logger.debug("any entry makes it try again")
    assert messages(path)[-2:] == ["bad", "any entry makes it try again"]
    assert "can be written again" in capsys.readouterr().err
    assert logger._size == 0
    logger.info("as before: in memory")
    assert messages(path)[-1] == "any entry makes it try again"
    logger.close()


def test_reader_delays_nothing(
    path: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUSY_TIMEOUT_S", 0)
    logger = Logger(path, clock=clock, console=False)
    logger.warning("1")
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM log").fetchall()
    logger.warning("2")
    logger.warning("3")
    assert messages(path) == ["1"]
    # A process may start, or rotate, meanwhile.
    logger.reopen()
    reader.execute("COMMIT")
    clock.now += 0.5
    logger.warning("too early to try again")
    assert messages(path) == ["1"]
    logger.flush()
    assert messages(path)[1:] == ["2", "3", "too early to try again"]
    reader.close()
    logger.close()


def test_fork(path: str) -> None:
    logger = Logger(path, console=False)
    logger.info("parent")
    pid = os.fork()
    if not pid:
        status = 1
        try:
            logger.after_fork()
            logger.warning("child")
            logger.close()
            status = logger.tracing
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    with pytest.raises(ConfigurationError, match="in use"):
        Logger(path)
    logger.warning("parent again")
    logger.close()
    assert messages(path) == ["parent", "parent again"]


# --- console ------------------------------------------------------------------


def test_console(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    clock.now = 0.29309
    logger = Logger(clock=clock)
    logger.info("not shown")
    for level in ("warning", "error", "critical"):
        getattr(logger, level)("%s\nsecond", level)
    Logger(clock=clock, console=False).critical("not shown")
    named = Logger(clock=clock, name="M1")
    named.warning("named")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    date, rest = lines[0][:24], lines[0][24:]
    assert date.endswith(".2930")
    head, tail = rest.split("[")
    assert head == " WARNING   NEO        "
    assert tail.startswith("   test_logger:")
    assert tail.endswith("] warning")
    assert lines[1] == lines[0].replace("] warning", "] second")
    assert " CRITICAL  NEO        [" in lines[4]
    assert " WARNING   M1         [" in lines[6]


def test_application_with_its_own_logging(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = logging.getLogger("NEO")
    monkeypatch.undo()
    Logger().warning("for %s", "Zope")
    target.setLevel(logging.ERROR)
    Logger().warning("not wanted")
    target.setLevel(logging.NOTSET)
    (record,) = caplog.records
    assert (record.name, record.getMessage()) == ("NEO", "for Zope")
    assert record.filename == "test_logger.py"
    assert capsys.readouterr().err == ""


def test_console_that_is_closed(
    path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logger = Logger(path)
    with open(tmp_path / "stderr", "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
    logger.warning("closed")
    monkeypatch.setattr("sys.stderr", None)
    logger.warning("none")
    logger.close()
    assert messages(path) == ["closed", "none"]


# --- signals ------------------------------------------------------------------


def test_signals(path: str) -> None:
    numbers = range(signal.SIGRTMIN, signal.SIGRTMIN + 4)
    before = [signal.getsignal(number) for number in numbers]
    logger, dumps = Logger(path), []
    try:
        install_signals(logger, lambda: dumps.append(logger.info("state")))
        signal.raise_signal(numbers[2])
        assert dumps == [None]
        assert messages(path) == []
        signal.raise_signal(numbers[0])
        assert messages(path) == ["state"]
        os.rename(path, path + ".1")
        signal.raise_signal(numbers[1])
        assert os.path.exists(path)
        signal.raise_signal(numbers[3])
        install_signals(logger)
        signal.raise_signal(numbers[2])
        assert dumps == [None]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        logger.close()


def test_damaged_file(tmp_path: Path) -> None:
    """A kill in the middle of a write can damage it: the node starts all the same."""
    path = tmp_path / "node.log"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE x (y)")
    db.close()
    with open(path, "r+b") as file:
        file.seek(100)  # the root page of the schema
        file.write(b"\xff" * 200)
    before = path.read_bytes()
    log = Logger(str(path))
    log.warning("works")
    log.close()
    assert (tmp_path / "node.log.damaged").read_bytes() == before
    with contextlib.closing(sqlite3.connect(path)) as db:
        first, second = (text for (text,) in db.execute("SELECT msg FROM log"))
    assert first == f"the log was damaged: what it had is in {path}.damaged"
    assert second == "works"
