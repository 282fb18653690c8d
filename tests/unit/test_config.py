"""Options, configuration file and the start-up of the daemons."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from neo.lib import config
from neo.lib.config import Limits, MasterList, Option, UsageError
from neo.lib.exception import ConfigurationError, DatabaseLocked
from neo.scripts import daemon, neoadmin, neomaster, neostorage

OPTIONS = (
    Option("cluster", "Name.", short="c", required=True),
    Option("masters", "Masters.", config.masters, default="", short="m", empty=True),
    Option("bind", "Address.", config.address(None), default="127.0.0.1:10000"),
    Option("logfile", "Log.", config.path, short="l", own=True),
    Option("disable-pack", "No pack.", config.boolean),
    Option("replicas", "Copies.", config.integer(0), default="0"),
    Option("wait", "Wait.", config.wait_time, default="0"),
    Option("adapter", "Database.", config.choice("MySQL", "SQLite"), default="MySQL"),
    Option("monitor-email", "Mail.", repeatable=True),
    Option("nid", "Id.", daemon.nid, hidden=("-u", "--uuid")),
    Option("password", "Secret.", secret=True),
    Option("reset", "Erase.", config.boolean, command_line_only="it erases"),
)


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/nemo")
    monkeypatch.setenv("COLUMNS", "80")


def write(content: str, name: str = "neo.conf") -> str:
    Path(name).write_text(content, encoding="utf-8")
    return name


def load(*argv: str, content: str | None = None, **kw: Any) -> config.Settings:
    if content is not None:
        argv = ("-f", write(content), *argv)
    return config.load("neotest", OPTIONS, argv, section="node", **kw)


# --- precedence ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "argv", "replicas", "origin"),
    [
        ("[node]\n", [], 0, "default"),
        ("[DEFAULT]\nreplicas=1\n[node]\n", [], 1, "neo.conf [DEFAULT]"),
        ("[DEFAULT]\nreplicas=1\n[node]\nreplicas=2", [], 2, "neo.conf [node]"),
        ("[node]\nreplicas=2", ["--replicas", "3"], 3, "command line"),
        ("[node]\nreplicas=2", ["--repl=3"], 3, "command line"),
        ("[DEFAULT]\nreplicas=1\n[other]\n", ["-s", "other"], 1, "neo.conf [DEFAULT]"),
    ],
)
def test_precedence(content: str, argv: list[str], replicas: int, origin: str) -> None:
    settings = load("-c", "x", *argv, content=content)
    assert settings.replicas == replicas
    assert settings.origins["replicas"] == origin
    assert settings.warnings == []


def test_repeatable_options_add_up() -> None:
    content = "[node]\ncluster: x\nmonitor_email:\n  a@b\n  c@d\n"
    settings = load("--monitor-email", "e@f", content=content)
    assert settings.monitor_email == ("a@b", "c@d", "e@f")
    assert settings.origins["monitor_email"] == "neo.conf [node] + command line"
    assert load("-c", "x").monitor_email == ()


@pytest.mark.parametrize("option", ["--nid", "-u", "--uuid"])
def test_former_spellings(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("-c", "x", option, "S3").nid == 3
    with pytest.raises(SystemExit):
        load("--help")
    assert "uuid" not in capsys.readouterr().out


# --- values -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("disable_pack = on", "disable_pack", True),
        ("disable-pack = TRUE", "disable_pack", True),
        ("Disable-Pack = no", "disable_pack", False),
        ("logfile = ~/x.log", "logfile", "/home/nemo/x.log"),
        ("wait = 1.5", "wait", 1.5),
        ("wait = -1", "wait", math.inf),
        ("adapter = sqlite", "adapter", "SQLite"),
        ("bind = [::1]:5", "bind", ("::1", 5)),
        ("masters = 10.0.0.1\n [::1]:7", "masters", (("10.0.0.1", 10000), ("::1", 7))),
        ("masters = 10.0.0.1 10.0.0.1:10000", "masters", (("10.0.0.1", 10000),)),
        ("masters =", "masters", ()),
        ("password = 50%", "password", "50%"),
        ("password = 50%%", "password", "50%"),
        ("password = %(no)s %(cluster)s", "password", "%(no)s test"),
        ("where = b\npassword = a%(WHERE)s%%(where)s", "password", "ab%(where)s"),
        ("nid = M1", "nid", -268435455),
        ("nid = -268435455", "nid", -268435455),
    ],
)
def test_value_in_file(line: str, key: str, value: object) -> None:
    settings = load(content=f"[node]\ncluster = test\n{line}\n")
    assert getattr(settings, key) == value
    assert settings.warnings == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("disable_pack = maybe", "disable_pack: 'maybe' is neither yes nor no"),
        ("replicas = x", "replicas: 'x' is not an integer"),
        ("replicas = -1", "replicas: -1 is out of range: at least 0 expected"),
        ("wait = nan", "wait: 'nan' is not a finite number"),
        ("wait = -2", "wait: -2.0 is out of range: at least 0"),
        ("adapter = Foo", "adapter: 'Foo' is none of MySQL, SQLite"),
        ("adapter =", "adapter: value is empty"),
        ("logfile =", "logfile: value is empty"),
        ("bind = 127.0.0.1", "bind: invalid address '127.0.0.1': the port is missing"),
        ("bind = 127.0.0.1:99999", "bind: invalid address '127.0.0.1:99999': bad port"),
        ("masters = a:1,b:2", "masters: invalid address 'a:1,b:2': "),
        ("masters = a:0", "masters: invalid address 'a:0': port 0 can't be reached"),
        ("nid = X1", "nid: invalid node id 'X1'"),
        ("nid = 0", "nid: 0 is out of range"),
        ("password = a\n b", "password: 'a\\nb' contains control characters"),
    ],
)
def test_wrong_value(line: str, message: str) -> None:
    """The message says where; status 1 for the file, 2 for the command line."""
    with pytest.raises(ConfigurationError) as e:
        load(content=f"[node]\ncluster = test\n{line}\n")
    assert str(e.value).startswith(f"neo.conf [node], {message}")
    assert "\n" not in str(e.value)
    assert not isinstance(e.value, UsageError)
    key, value = re.split(" = ?", line, maxsplit=1)
    if key != "disable_pack":
        option = f"--{key}={value}".replace("\n ", "\n")
        with pytest.raises(UsageError) as u:
            load("-c", "test", option)
        assert str(u.value).startswith(f"--{message}")


def test_unresolvable_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kw: object) -> None:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("neo.lib.config.socket.getaddrinfo", fail)
    with pytest.raises(ConfigurationError) as e:
        load(content="[node]\ncluster=x\nmasters=nowhere.invalid\n")
    assert str(e.value) == (
        "neo.conf [node], masters: cannot resolve host 'nowhere.invalid':"
        " Name or service not known"
    )


def test_addresses_are_resolved_once() -> None:
    settings = load("-c", "x", "--bind", "localhost:1")
    assert settings.bind in {("127.0.0.1", 1), ("::1", 1)}


# --- mistakes ------------------------------------------------------------------------

FATAL = ConfigurationError


@pytest.mark.parametrize(
    ("content", "argv", "error", "message"),
    [
        (None, [], UsageError, "cluster is missing: give -c/--cluster, or a conf"),
        ("[node]\n", [], UsageError, "or set cluster in section [node] of neo.conf"),
        ("[a]\n[b]\n", [], FATAL, "no section [node] to use (it has: [a], [b])"),
        ("", [], FATAL, "no section [node] to use (it has: none)"),
        ("[DEFAULT]\n", ["-s", "DEFAULT"], FATAL, "no section [DEFAULT] to use"),
        ("a = x\n", [], FATAL, "cannot read neo.conf: File contains no section"),
        ("[node]\na\n", [], FATAL, "cannot read neo.conf: Source contains parsing"),
        ("[node]\na-b=1\na_b=2\n", [], FATAL, "option 'a_b' in section 'node' al"),
        (
            "[node]\ncluster=x\nreset=no\n",
            [],
            FATAL,
            "neo.conf [node]: reset is not allowed in a file (it erases);"
            " use --reset once",
        ),
        (
            "[DEFAULT]\nreset=no\n[node]\ncluster=x\n",
            [],
            FATAL,
            "neo.conf [DEFAULT]: reset is not",
        ),
        ("[node]\ncluster=%(cluster)s", [], FATAL, "%(cluster)s refers to itself"),
        (None, ["-f", "none"], FATAL, "cannot read none: No such file or directory"),
        (None, ["-f", "."], FATAL, "cannot read .: Is a directory"),
        (None, ["--nope"], UsageError, "unrecognized arguments: --nope (try --help)"),
        (None, ["extra"], UsageError, "unrecognized arguments: extra (try --help)"),
        (None, ["-c"], UsageError, "argument -c/--cluster: expected one argument"),
        (None, ["--re", "1"], UsageError, "ambiguous option: --re could match"),
        (None, ["-c", ""], UsageError, "--cluster: value is empty"),
        (
            None,
            ["-c", "x", "--password", "a", "--password-file", "b"],
            UsageError,
            "give either password or password-file",
        ),
        (
            None,
            ["-c", "x", "--password-file", "b"],
            FATAL,
            "cannot read password-file b: No such file",
        ),
    ],
)
def test_mistake(
    content: str | None, argv: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(ConfigurationError) as e:
        load(*argv, content=content)
    assert type(e.value) is error
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_file_in_another_encoding() -> None:
    Path("neo.conf").write_bytes("[node]\ncluster = é\n".encode("latin1"))
    with pytest.raises(
        ConfigurationError, match=r"cannot read neo\.conf: not in UTF-8"
    ):
        load("-f", "neo.conf")


@pytest.mark.parametrize(
    ("content", "warning"),
    [
        (
            "[node]\ndisable_pak=on",
            "[node]: unknown key disable_pak is ignored, did you mean disable_pack?",
        ),
        ("[node]\nxyzzy=on", "[node]: unknown key xyzzy is ignored"),
        (
            "[DEFAULT]\nreplica=1\n[node]",
            "[DEFAULT]: unknown key replica is ignored, did you mean replicas?",
        ),
        ("[DEFAULT]\nautostart=1\n[node]", None),
        ("[DEFAULT]\nhost=a\n[node]\npassword=%(host)s", None),
        ("[node]\n[other]\nxyzzy=on", None),
        (
            "[DEFAULT]\nlogfile=a\n[node]\n[b]\n[c]\nlogfile=c",
            "[DEFAULT]: [node] shares logfile with [b]; set it in each section",
        ),
        ("[DEFAULT]\nlogfile=a\n[node]\nlogfile=b\n[b]", None),
        ("[DEFAULT]\nlogfile=a\n[node]\n", None),
    ],
)
def test_warning(content: str, warning: str | None) -> None:
    settings = load("-c", "x", content=content, known={"autostart"})
    assert settings.warnings == ([f"neo.conf {warning}"] if warning else [])


def test_section_without_file() -> None:
    warnings = load("-c", "x", "-s", "a").warnings
    assert warnings == ["--section has no effect without --file"]


# --- output ---------------------------------------------------------------------------


def test_describe() -> None:
    """What --check-config prints; secrets are not shown."""
    write("hunter2:secret@db\n", "secret")
    content = """[DEFAULT]
cluster: test
masters: 10.0.0.1:1 [::1]:2
[node]
password-file: secret
logfile: ~/x
"""
    settings = load("--disable-pack", "--check-config", content=content)
    assert settings.check_only
    assert settings.warnings == []
    lines = [" ".join(line.split()) for line in settings.describe().splitlines()]
    assert lines == [
        "cluster = test (neo.conf [DEFAULT])",
        "masters = 10.0.0.1:1 [::1]:2 (neo.conf [DEFAULT])",
        "bind = 127.0.0.1:10000 (default)",
        "logfile = /home/nemo/x (neo.conf [node])",
        "disable_pack = yes (command line)",
        "replicas = 0 (default)",
        "wait = 0 (default)",
        "adapter = MySQL (default)",
        "monitor_email = - (default)",
        "nid = - (default)",
        "password = hunter2:***@db (secret)",
        "reset = no (default)",
    ]


@pytest.mark.parametrize("main", [neomaster.main, neostorage.main, neoadmin.main])
def test_help_and_version(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for option, expected in ("--help", "--dynamic-master-list"), ("--version", "neo"):
        with pytest.raises(SystemExit) as e:
            main([option])
        assert not e.value.code
        assert expected in capsys.readouterr().out


# --- daemons -------------------------------------------------------------------------

C = ["-c", "test"]
S = [*C, "-d", "db", "-a", "SQLite"]


@pytest.mark.parametrize(
    ("main", "argv", "status", "message"),
    [
        (neomaster.main, [], 2, "cluster is missing: give -c/--cluster, or a "),
        (neomaster.main, [*C, "-r", "-1"], 2, "--replicas: -1 is out of range: at "),
        (neomaster.main, [*C, "-p", "0"], 2, "--partitions: 0 is out of range: at "),
        (neomaster.main, [*C, "-b", "::1"], 2, "--bind: invalid address '::1': the "),
        (neomaster.main, [*C, "--ca", "x"], 1, "TLS needs ca, cert and key together"),
        (neomaster.main, [*C, "-C", "test"], 1, "upstream-cluster must differ from "),
        (neomaster.main, [*C, "-C", "up"], 1, "upstream-cluster needs upstream-mas"),
        (neomaster.main, [*C, "-M", "::1"], 1, "upstream-masters needs upstream-cl"),
        (neomaster.main, [*C, "-B"], 1, "backup clusters are not available in this "),
        (neomaster.main, [*C, "-l", "/n/l"], 1, "cannot open log file /n/l: No such "),
        (
            neomaster.main,
            [*C, "--advertise", "0.0.0.0"],
            1,
            "advertise: other nodes can't connect to 0.0.0.0",
        ),
        (
            neomaster.main,
            [*C, "--ca", "/n/a", "--cert", "/n/b", "--key", "/n/c"],
            1,
            "TLS credentials (ca=/n/a, cert=/n/b, key=/n/c): ",
        ),
        (neostorage.main, C, 2, "database is missing: give -d/--database, or a conf"),
        (neostorage.main, [*C, "-d", "/x"], 1, "invalid database: [user[:password]@]"),
        (neostorage.main, [*C, "-d", "x", "-a", "Importer"], 1, "adapter Importer is"),
        (neostorage.main, [*S, "-e", "InnoDB"], 1, "engine InnoDB is for MySQL, the "),
        (neostorage.main, [*S, "--new-nid", "--reset"], 1, "new-nid and reset exclude"),
        (neostorage.main, [*S, "-m", ""], 2, "--masters: value is empty"),
        (neoadmin.main, [*C, "--monitor-maxlag", "x"], 2, "--monitor-maxlag: 'x' is "),
    ],
)
def test_start_up_error(
    main: Any,
    argv: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, the status of operations.md 10.2, no traceback."""
    prog = main.__module__.rpartition(".")[2]
    monkeypatch.setattr(daemon.signal, "signal", lambda *args: None)
    assert main(argv) == status
    out, err = capsys.readouterr()
    assert err.startswith(f"{prog}: {message}")
    assert err.count("\n") == 1
    assert out == ""


class FakeRuntime:
    """Runs what was asked for, then ends."""

    def __init__(self, log: Any, tls: Any, tcp_only: bool) -> None:
        self.log = log
        self.tls = tls
        self.tcp_only = tcp_only
        self.soon: list[Any] = []
        self.before_run = lambda: None

    def call_soon_threadsafe(self, callback: Any) -> None:
        self.soon.append(callback)

    def run(self) -> int:
        self.before_run()
        for callback in self.soon:
            callback()
        return 0


class FakeNode:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.stopped = 0

    def start(self) -> None:
        if self.error:
            raise self.error

    def shutdown(self) -> None:
        self.stopped += 1

    def dump(self) -> None:
        pass


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Signal handlers installed by the daemon, not in this process."""
    installed: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", installed.__setitem__)
    monkeypatch.setattr(signal, "getsignal", installed.get)
    monkeypatch.setattr(daemon, "EpollRuntime", FakeRuntime)
    return installed


def run(build: Any, *argv: str) -> int:
    return daemon.main("neomaster", "Test.", daemon.MASTER, build, [*C, *argv])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(98, "Address already in use"),
            "cannot listen on 127.0.0.1:10000: Address already in use",
        ),
        (DatabaseLocked("database is locked"), "database is locked"),
        (ConfigurationError("two\n lines"), "two lines"),
    ],
)
def test_start_fails(
    error: Exception,
    line: str,
    handlers: dict[int, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(lambda *args: FakeNode(error)) == 1
    assert capsys.readouterr().err == f"neomaster: {line}\n"
    assert run(lambda *args: FakeNode(error), "--debug") == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith(f"\nneomaster: {line}\n")


def test_backends_reach_the_log(
    handlers: dict[int, Any],
) -> None:
    def build(runtime: FakeRuntime, settings: config.Settings) -> FakeNode:
        logging.getLogger("neo.storage.database.sqlite").warning("mode %s", "delete")
        return FakeNode()

    assert run(build, "-l", "log") == 0
    assert not logging.getLogger("neo").handlers
    db = sqlite3.connect("log")
    try:
        [row] = db.execute("SELECT msg FROM log WHERE msg LIKE 'mode%'").fetchall()
    finally:
        db.close()
    assert row == ("mode delete",)


def test_error_of_ours_keeps_its_traceback(
    handlers: dict[int, Any],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert run(lambda *args: FakeNode(AssertionError("oops"))) == 1
    assert "Traceback" in caplog.text
    assert capsys.readouterr().err == "neomaster: oops\n"


def test_signals(handlers: dict[int, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first asks for a clean stop, the second kills; SIGHUP flushes the log."""
    node = FakeNode()
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(daemon.os, "kill", lambda *args: killed.append(args))

    def build(runtime: FakeRuntime, settings: config.Settings) -> FakeNode:
        def before_run() -> None:
            handlers[signal.SIGHUP](signal.SIGHUP, None)
            handlers[signal.SIGINT](signal.SIGINT, None)
            assert runtime.soon == [runtime.log.flush, node.shutdown]
            assert not killed
            handlers[signal.SIGTERM](signal.SIGTERM, None)
            assert killed == [(os.getpid(), signal.SIGTERM)]
            assert handlers[signal.SIGTERM] is signal.SIG_DFL

        runtime.before_run = before_run
        return node

    assert run(build) == 0
    assert node.stopped


def test_signal_before_the_start(handlers: dict[int, Any]) -> None:
    def build(runtime: FakeRuntime, settings: config.Settings) -> FakeNode:
        handlers[signal.SIGHUP](signal.SIGHUP, None)
        handlers[signal.SIGTERM](signal.SIGTERM, None)
        raise AssertionError

    with pytest.raises(SystemExit) as e:
        run(build)
    assert e.value.code == 0


def test_ignored_signals_stay_ignored(handlers: dict[int, Any]) -> None:
    handlers[signal.SIGINT] = signal.SIG_IGN
    assert run(lambda *args: FakeNode()) == 0
    assert handlers[signal.SIGINT] is signal.SIG_IGN
    assert handlers[signal.SIGTERM] is not signal.SIG_IGN


def test_check_config(capsys: pytest.CaptureFixture[str]) -> None:
    write("[DEFAULT]\nreplica=1\n[storage1]\ndatabase=u:p@db\ncluster=test\n")
    argv = ["-f", "neo.conf", "-s", "storage1", "-a", "SQLite", "--check-config"]
    assert neostorage.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == (
        "neostorage: warning: neo.conf [DEFAULT]: unknown key replica is ignored,"
        " did you mean replicas?\n"
    )
    assert re.search(
        r"^database +=.* u:\*\*\*@db +\(neo.conf \[storage1\]\)$", out, re.M
    )
    assert list(Path().iterdir()) == [Path("neo.conf")]


@pytest.mark.parametrize(
    ("argv", "advertise", "warned"),
    [
        ([], None, False),
        (["-b", "0.0.0.0:1"], None, True),
        (["-b", "[::]:1"], None, True),
        (["-b", "0.0.0.0:1", "--advertise", "10.0.0.1"], ("10.0.0.1", 1), False),
        (["-b", "0.0.0.0:1", "--advertise", "10.0.0.1:2"], ("10.0.0.1", 2), False),
    ],
)
def test_advertise(
    argv: list[str], advertise: tuple[str, int] | None, warned: bool
) -> None:
    settings = config.load("neomaster", daemon.MASTER, [*C, *argv], section="master")
    daemon.check(settings)
    assert settings.advertise == advertise
    assert bool(settings.warnings) is warned


def test_known_masters(handlers: dict[int, Any]) -> None:
    write('[["10.0.0.2", 2], ["10.0.0.1", 1]]', "m")
    argv = [*C, "-m", "10.0.0.1:1 10.0.0.3:3", "-D", "m"]
    settings = config.load("neomaster", daemon.MASTER, argv, section="master")
    log = daemon.Logger(console=False)
    masters, save = daemon.known_masters(settings, log)
    assert masters == (("10.0.0.1", 1), ("10.0.0.3", 3), ("10.0.0.2", 2))
    assert save is not None
    save([("10.0.0.4", 4)])
    assert Path("m").read_text() == '[["10.0.0.4", 4]]'


# --- parts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "missing"),
    [("k", "ca and cert"), ("ck", "cert"), ("ce", "key"), ("e", "ca and key")],
)
def test_tls_options_go_together(given: str, missing: str) -> None:
    ca, cert, key = ("x" if letter in given else None for letter in "cek")
    with pytest.raises(ConfigurationError, match=f"together: {missing} not given"):
        config.check_tls(ca, cert, key)


def test_tls_complete_or_absent() -> None:
    assert config.check_tls(None, None, None) is None
    assert config.check_tls("a", "b", "c") == ("a", "b", "c")


def test_limits() -> None:
    options = config.limit_options("S")
    settings = config.load("neotest", options, ["--lease", "5"], section="node")
    assert settings.limits == Limits(lease=5)
    for argv, message in (
        (["--ping-after", "10"], r"ping-after \(10 s\) must be less than"),
        (["--lease", "0"], r"--lease: 0 is out of range: more than 0 expected"),
        (["--lease", "inf"], "--lease: 'inf' is not a finite number"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            config.load("neotest", options, argv, section="node")


def test_each_limit_is_an_option_of_a_daemon() -> None:
    for name in vars(Limits()):
        assert name in daemon.KNOWN


# --- dynamic master list ------------------------------------------------------------


class Warnings(list[str]):
    def __call__(self, message: str, *args: object) -> None:
        self.append(message % args)


def test_master_list_life() -> None:
    warnings = Warnings()
    masters = MasterList("masters.json", warnings)
    assert masters.load() == ()
    masters.save([("10.0.0.1", 10000), ("::1", 2), ("10.0.0.1", 10000)])
    assert Path("masters.json").read_text() == '[["10.0.0.1", 10000], ["::1", 2]]'
    again = MasterList("masters.json", warnings)
    assert again.load() == (("10.0.0.1", 10000), ("::1", 2))
    again.save([("::1", 2)])
    assert Path("masters.json").read_text() == '[["::1", 2]]'
    assert [p.name for p in Path().iterdir()] == ["masters.json"]
    assert warnings == []


def test_master_list_failures(tmp_path: Path) -> None:
    """Fatal at start; later a warning, and the next change tries again."""
    warnings = Warnings()
    folder = tmp_path / "folder"
    name = str(folder / "masters.json")
    with pytest.raises(ConfigurationError, match=r"cannot create .*: No such file"):
        MasterList(name, warnings).load()
    folder.mkdir()
    masters = MasterList(name, warnings)
    masters.load()
    (folder / "masters.json").unlink()
    folder.rmdir()
    masters.save([("a", 1)])
    assert warnings == [
        f"cannot write dynamic master list {name}: No such file or directory"
    ]
    folder.mkdir()
    masters.save([("a", 1)])
    assert MasterList(name, warnings).load() == (("a", 1),)


@pytest.mark.parametrize(
    "content",
    ["", "{", "null", "{}", "[1]", '["a:1"]', '[["a"]]', '[["a", 0]]', '[["a", true]]',
     '[[1, 1]]', '[["a", 65536]]', "[" * 100000],
)  # fmt: skip
def test_damaged_master_list(content: str) -> None:
    write(content, "masters.json")
    with pytest.raises(ConfigurationError, match="cannot read dynamic master list"):
        MasterList("masters.json", Warnings()).load()


# --- what is shipped ----------------------------------------------------------------

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("commented", [False, True])
def test_example(commented: bool) -> None:
    """The example is valid, also once everything in it is switched on."""
    content = (ROOT / "neo.conf.example").read_text(encoding="utf-8")
    if commented:
        content = re.sub("^;", "", content, flags=re.M)
    write(content)
    for prog, options, sections in (
        ("neomaster", daemon.MASTER, ["master"]),
        ("neostorage", daemon.STORAGE, ["storage1", "storage2"]),
        ("neoadmin", daemon.ADMIN, ["admin"]),
    ):
        for section in sections:
            argv = ["-f", "neo.conf", "-s", section]
            settings = config.load(prog, options, argv, section="", known=daemon.KNOWN)
            daemon.check(settings)
            assert settings.warnings == []
            assert settings.cluster == "test"
