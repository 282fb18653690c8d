"""What README.rst and neo.conf.example say, done literally."""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from .harness import free_port, until

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.rst").read_text()
STEP_S = 60.0


def blocks(after: str) -> list[str]:
    """Literal blocks of README.rst that follow a text, without their indentation."""
    found = re.findall(
        r"::\n\n(( +)\S.*\n(?:(?:\2.*)?\n)*)", README[README.index(after) :]
    )
    return [textwrap.dedent(block).strip() + "\n" for block, _ in found]


def command(name: str, *args: str) -> list[str]:
    return [sys.executable, "-m", f"neo.scripts.{name}", *args]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that end with the test, whatever happens."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def neoctl(admin: str, *args: str) -> tuple[int, str]:
    """(status, what is said) of a command."""
    result = subprocess.run(
        command("neoctl", "-a", admin, *args),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=STEP_S,
        check=False,
    )
    return result.returncode, result.stdout


def test_stored_object(tmp_path: Path, start: list[subprocess.Popen[str]]) -> None:
    """The lines of Python that neosimple prints can be pasted; README has them too."""
    process = subprocess.Popen(
        command("neosimple", str(tmp_path / "data"), "--port", str(free_port())),
        stdout=subprocess.PIPE,
        text=True,
    )
    start.append(process)
    assert process.stdout is not None
    printed = []
    while "Ctrl-C" not in (line := process.stdout.readline()):
        assert line, process.wait()
        printed.append(line)
    code = "".join(printed[printed.index("  Python\n") + 1 :])
    code = code[: code.index("  Control")].strip() + "\n"
    example = blocks("From nothing to a stored object")[1]
    address = r"127\.0\.0\.1:\d+"
    assert re.sub(address, "", code) == re.sub(address, "", example)
    for last in ("", "print(root['hello'])\n"):
        pasted = code if not last else "".join(code.splitlines(True)[:4]) + last
        result = subprocess.run(
            [sys.executable, "-i", "-q"],
            input=pasted,
            capture_output=True,
            text=True,
            timeout=STEP_S,
            check=False,
        )
        assert "Error" not in result.stderr
        assert last == "" or result.stdout.strip() == "world"
    process.send_signal(signal.SIGINT)
    process.wait(STEP_S)
    assert process.returncode == 0


CLIENT = """\
import sys, ZODB
from neo.client.Storage import Storage
db = ZODB.DB(Storage(sys.argv[1], sys.argv[2], connect_timeout=50))
with db.transaction() as connection:
    root = connection.root()
    print(root.get("n"))
    root["n"] = int(sys.argv[3])
db.close()
"""


def client(masters: str, name: str, n: int) -> str:
    """Commit `n`; what was there before."""
    return subprocess.run(
        [sys.executable, "-c", CLIENT, masters, name, str(n)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=STEP_S,
        check=True,
    ).stdout.strip()


def test_three_machines(tmp_path: Path, start: list[subprocess.Popen[str]]) -> None:
    """The deployment of README.rst, on three addresses of this machine."""
    page = blocks("Three machines")
    original = page[0]
    ports = {port: str(free_port()) for port in ("10000", "20000", "9999")}
    nodes: dict[str, subprocess.Popen[str]] = {}

    def run(kind: str, machine: int) -> None:
        name = f"{kind}{machine}"
        path = tmp_path / str(machine) / "neo.conf"
        with open(tmp_path / f"{name}.err", "a") as stderr:
            process = subprocess.Popen(
                command(f"neo{kind}", "-f", str(path)), stderr=stderr, text=True
            )
        nodes[name] = process
        start.append(process)

    for machine in (1, 2, 3):
        text = re.sub(r"(?m)^bind: 10\.0\.0\.1", f"bind: 10.0.0.{machine}", original)
        text = text.replace("10.0.0.", "127.0.0.")
        for old, new in ports.items():
            text = re.sub(rf":{old}\b", f":{new}", text)
        directory = tmp_path / str(machine)
        directory.mkdir()
        text = re.sub(r"(?<= )/var/(log|lib)/neo", str(directory), text)
        (directory / "neo.conf").write_text(text)
    conf = configparser.ConfigParser(default_section="DEFAULT")
    conf.read(tmp_path / "1" / "neo.conf")
    admin, masters = conf["admin"]["bind"], conf["DEFAULT"]["masters"]
    name = conf["DEFAULT"]["cluster"]
    # In the least convenient order.
    run("admin", 1)
    for kind in ("storage", "master"):
        for machine in (3, 2, 1):
            run(kind, machine)

    def ctl(*args: str) -> str:
        return neoctl(admin, *args)[1]

    until(lambda: ctl("print", "node").count("PENDING") == 3, "storages", STEP_S)
    until(lambda: neoctl(admin, "start", "--wait", "30")[0] == 0, "start", STEP_S)
    until(
        # The last of them may still be joining.
        lambda: ctl("print", "node", "master").count("RUNNING") == 3,
        "masters",
        STEP_S,
    )
    assert client(masters, name, 1) == "None"

    def healthy() -> bool:
        """All that has data is there and up to date."""
        return neoctl(admin, "print", "summary", "--check")[0] == 0

    def machine_of_primary() -> int:
        primary = ctl("print", "primary").strip()
        line = re.search(rf"(?m)^{primary} .* 127\.0\.0\.(\d):", ctl("print", "node"))
        assert line, ctl("print", "node")
        return int(line[1])

    until(healthy, "healthy", STEP_S)
    # A machine without the primary fails: the others go on. Then the primary's: an
    # operator says that it does not run any more.
    n = 1
    for with_primary in (False, True):
        first = machine_of_primary()
        machine = first if with_primary else first % 3 + 1
        for kind in ("master", "storage"):
            process = nodes[f"{kind}{machine}"]
            process.kill()
            process.wait()
        if with_primary:
            until(lambda: "RECOVERING" in ctl("print", "cluster"), "RECOVERING", STEP_S)
            until(lambda: neoctl(admin, "start", "--wait", "30")[0] == 0, "", STEP_S)
        n += 1
        assert client(masters, name, n) == str(n - 1)
        for kind in ("master", "storage"):
            run(kind, machine)
        until(healthy, "healthy again", STEP_S)
    assert neoctl(admin, "set", "cluster", "STOPPING", "--wait", "30")[0] == 0
    for node, process in nodes.items():
        assert process.wait(STEP_S) == 0, node
    # From then on the cluster starts by itself.
    for kind in ("storage", "master"):
        for machine in (1, 2, 3):
            run(kind, machine)
    run("admin", 1)
    assert client(masters, name, 4) == str(n)


def test_example_configuration(
    tmp_path: Path, start: list[subprocess.Popen[str]]
) -> None:
    """neo.conf.example, but for its ports."""
    text = (ROOT / "neo.conf.example").read_text()
    ports = {port: str(free_port()) for port in ("10000", "20000", "20001", "9999")}
    for old, new in ports.items():
        text = re.sub(rf":{old}\b", f":{new}", text)
    path = tmp_path / "neo.conf"
    path.write_text(text)
    environment = {**os.environ, "HOME": str(tmp_path)}
    for name, *more in (
        ("neostorage", "-s", "storage1"),
        ("neostorage", "-s", "storage2"),
        ("neomaster",),
        ("neoadmin",),
    ):
        argv = command(name, "-f", str(path), *more)
        result = subprocess.run(
            [*argv, "--check-config"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=STEP_S,
            check=False,
        )
        assert (result.returncode, result.stderr) == (0, "")
        start.append(subprocess.Popen(argv, env=environment, text=True))
    admin = f"127.0.0.1:{ports['9999']}"
    until(lambda: neoctl(admin, "print", "node")[1].count("PENDING") == 2, "", STEP_S)
    until(lambda: neoctl(admin, "start", "--wait", "30")[0] == 0, "start", STEP_S)
    assert client(f"127.0.0.1:{ports['10000']}", "test", 1) == "None"
    assert (tmp_path / "neo1.sqlite").exists()
    with contextlib.suppress(ProcessLookupError):
        for process in start:
            process.terminate()
    for process in start:
        assert process.wait(STEP_S) == 0
