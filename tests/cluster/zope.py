"""A real Zope instance, made by `mkwsgiinstance` and driven over HTTP."""

from __future__ import annotations

import base64
import html
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable

from .harness import free_port, until

USER = "admin:secret"
DATABASE = "/Control_Panel/Database/main"
FILE_STORAGE = re.compile(r"(?s)<filestorage>.*?</filestorage>")


def command(name: str) -> str:
    """Path of a script of the environment that runs the tests."""
    return os.path.join(os.path.dirname(sys.executable), name)


class Zope:
    """An instance in `directory`; `storage` is its ZConfig section, None: Data.fs."""

    def __init__(self, directory: str, storage: str | None = None) -> None:
        self.directory = directory
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        subprocess.run(
            [command("mkwsgiinstance"), "-d", directory, "-u", USER],
            check=True,
            capture_output=True,
        )
        self._edit("etc/zope.ini", "port = 8080", f"port = {self.port}")
        if storage is not None:
            path = os.path.join(directory, "etc/zope.conf")
            with open(path) as f:
                text = FILE_STORAGE.sub(lambda _: storage, f.read())
            with open(path, "w") as f:
                f.write(f"%import neo.client\n{text}")

    def _edit(self, name: str, old: str, new: str) -> None:
        path = os.path.join(self.directory, name)
        with open(path) as f:
            text = f.read()
        assert old in text, (name, old)
        with open(path, "w") as f:
            f.write(text.replace(old, new))

    @property
    def data_fs(self) -> str:
        """File of the default storage."""
        return os.path.join(self.directory, "var/Data.fs")

    def start(self) -> None:
        """Start; return when it answers."""
        with open(os.path.join(self.directory, "output"), "ab") as output:
            self.process = subprocess.Popen(
                [command("runwsgi"), os.path.join(self.directory, "etc/zope.ini")],
                stdout=output,
                stderr=output,
            )
        until(self._answers, "Zope starts", timeout=120)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.output()
        try:
            self.get("/")
        except (OSError, urllib.error.HTTPError):
            return False
        return True

    def output(self) -> str:
        """What the process said."""
        with open(os.path.join(self.directory, "output")) as f:
            return f.read()[-5000:]

    def stop(self) -> None:
        """Stop, as an operator does."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
            self.process = None

    # --- HTTP ---------------------------------------------------------------------

    def request(self, path: str, data: bytes | None = None) -> str:
        """Body of the response to GET, or POST if `data` is given."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        credentials = base64.b64encode(USER.encode()).decode()
        request.add_header("Authorization", f"Basic {credentials}")
        with urllib.request.urlopen(request, timeout=60) as response:
            body: bytes = response.read()
        return body.decode()

    def get(self, path: str) -> str:
        """GET."""
        return self.request(path)

    def post(self, path: str, **fields: str) -> str:
        """POST a form."""
        return self.request(path, urllib.parse.urlencode(fields).encode())

    # --- content --------------------------------------------------------------------

    def add_folder(self, name: str) -> None:
        """Add a folder to the root."""
        self.post("/manage_addFolder", id=name, title=name)

    def add_document(self, folder: str, name: str, text: str) -> None:
        """Add a DTML method to a folder."""
        path = f"/{folder}/manage_addProduct/OFSP/manage_addDTMLMethod"
        self.post(path, id=name, title=name, file=text)

    def edit_document(self, path: str, text: str) -> None:
        """Replace the text of a document."""
        self.post(f"{path}/manage_edit", data=text, title=path)

    def undo(self, count: int = 1) -> None:
        """Undo the last transactions."""
        page = self.get(f"{DATABASE}/manage_UndoForm")
        found: Iterable[str] = re.findall(
            r'name="transaction_info:list"\s+value="([^"]*)"', page
        )
        values = [html.unescape(value) for value in found][:count]
        assert len(values) == count, page
        data = urllib.parse.urlencode(
            [("transaction_info:list", value) for value in values]
        )
        page = self.request(f"{DATABASE}/manage_undo_transactions", data.encode())
        assert "Error" not in page, page
