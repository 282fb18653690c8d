"""A private MariaDB server: its own directory, a unix socket, no network.

For `neosimple` and for tests. Who can enter the directory can do everything with it.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence

from neo.lib.exception import ConfigurationError

START_TIMEOUT = 60.0  # seconds until connections are accepted
STOP_TIMEOUT = 60.0
PR_SET_PDEATHSIG = 1  # prctl(2)
SOCKET_PATH_MAX = 107  # bytes
# Not always in PATH.
PLACES = "/usr/sbin", "/usr/libexec", "/usr/local/sbin", "/usr/local/mysql/bin"


def find(*names: str) -> str | None:
    """Path of the first of these programs that is installed."""
    places = os.pathsep.join((os.environ.get("PATH", os.defpath), *PLACES))
    for name in names:
        if path := shutil.which(name, path=places):
            return path
    return None


class MariaDB:
    """A server and its databases, in `directory`; `options`: more of mariadbd's.

    Raises ConfigurationError if none is installed, or if it doesn't start.
    """

    def __init__(self, directory: str, options: Sequence[str] = ()) -> None:
        program = find("mariadbd", "mysqld")
        install = find("mariadb-install-db", "mysql_install_db")
        if program is None or install is None:
            raise ConfigurationError(
                "no MariaDB server is installed: install it (mariadb-server)"
            )
        self._program, self._install = program, install
        self.directory = directory
        self.data = os.path.join(directory, "data")
        self.log = os.path.join(directory, "log")
        self.socket = os.path.join(directory, "socket")
        self._temporary: str | None = None
        if len(os.fsencode(self.socket)) > SOCKET_PATH_MAX:
            self._temporary = tempfile.mkdtemp(prefix="mariadb-")
            self.socket = os.path.join(self._temporary, "socket")
        self._options = [
            "--no-defaults",
            f"--datadir={self.data}",
            # The server refuses to run as root unless it is told so.
            f"--user={pwd.getpwuid(os.geteuid()).pw_name}",
        ]
        self._more = [*options]
        self.process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        """Make the server's own tables, if they don't exist."""
        if os.path.isdir(self.data):
            return
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        os.chmod(self.directory, 0o700)
        # With another name until it is complete.
        new = f"{self.data}.new"
        shutil.rmtree(new, ignore_errors=True)
        innodb = [option for option in self._more if option.startswith("--innodb-")]
        options = [o.replace(self.data, new) for o in (*self._options, *innodb)]
        with open(self.log, "ab") as log:
            status = subprocess.run(
                [
                    self._install, *options, "--skip-test-db", "--skip-name-resolve",
                    "--auth-root-authentication-method=normal",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False,
            ).returncode  # fmt: skip
        if status:
            raise ConfigurationError(
                f"MariaDB can't be installed in {self.directory}: see {self.log}"
            )
        os.rename(new, self.data)

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        libc = ctypes.CDLL(None)

        def die_with_parent() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [
                    self._program, *self._options, f"--socket={self.socket}",
                    f"--pid-file={self.data}/mariadbd.pid", "--skip-networking",
                    "--max-allowed-packet=64M", *self._more,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise ConfigurationError(f"MariaDB doesn't start: see {self.log}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        if not os.path.exists(self.socket):
            return False
        try:
            self.execute("SELECT 1", database="mysql")
        except ConfigurationError:
            return False
        return True

    def execute(self, sql: str, database: str = "mysql") -> list[tuple[object, ...]]:
        """Execute one statement; the rows, if it is a SELECT."""
        from neo.storage.database import mysql_driver  # needs a driver

        connect = mysql_driver.choose_driver("MySQL")
        location = mysql_driver.Location("root", "", database, self.socket)
        try:
            connection = connect(location)
            try:
                (result,) = connection.run(sql.encode())
            finally:
                connection.close()
        except (mysql_driver.Lost, mysql_driver.Failed) as e:
            raise ConfigurationError(f"MariaDB: {e}") from e
        return [] if isinstance(result, int) else list(result)

    def add_database(self, name: str) -> str:
        """Create a database if it doesn't exist; its connection string."""
        self.execute(f"CREATE DATABASE IF NOT EXISTS `{name}`")
        return f"root:@{name}{self.socket}"

    def died(self) -> bool:
        """Whether the server ended by itself."""
        return self.process is not None and self.process.poll() is not None

    def stop(self, kill: bool = False) -> None:
        """End the server, at once or cleanly. Idempotent."""
        if self.process is not None:
            if kill:
                self.process.kill()
            else:
                self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def close(self) -> None:
        """`stop()`, and remove what is not in the directory."""
        self.stop()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
