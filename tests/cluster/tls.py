"""Certificates for tests, made by the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path


def openssl(directory: Path, *args: str) -> None:
    subprocess.run(["openssl", *args], cwd=directory, check=True, capture_output=True)


def certificates(directory: Path) -> dict[str, str]:
    """Paths of a new authority, and of a certificate and its key."""
    directory.mkdir(parents=True, exist_ok=True)
    openssl(
        directory, "req", "-new", "-x509", "-nodes", "-keyout", "ca.key",
        "-out", "ca.crt", "-subj", "/CN=CA", "-days", "10",
        "-addext", "keyUsage=critical,digitalSignature,keyCertSign",
    )  # fmt: skip
    openssl(
        directory, "req", "-new", "-nodes", "-keyout", "node.key",
        "-subj", "/CN=node", "-out", "node.csr",
    )  # fmt: skip
    openssl(
        directory, "x509", "-req", "-in", "node.csr", "-CA", "ca.crt",
        "-CAkey", "ca.key", "-set_serial", "1", "-days", "10", "-out", "node.crt",
    )  # fmt: skip
    names = {"ca": "ca.crt", "cert": "node.crt", "key": "node.key"}
    return {option: str(directory / name) for option, name in names.items()}


def options(paths: dict[str, str]) -> tuple[str, ...]:
    """The same as arguments of a command."""
    return tuple(text for name in paths for text in (f"--{name}", paths[name]))
