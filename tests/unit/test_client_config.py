"""Options of the client as text: ZConfig sections and URIs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ZConfig
from ZODB.config import storageFromString

from neo.client.config import byte_size, parse
from neo.client.zodburi import NEOStorageURIResolver
from neo.lib.exception import ConfigurationError

REQUIRED = {"master_nodes": "127.0.0.1:10000 [::1]:10001", "name": "test"}


def section(*lines: str) -> str:
    """A configuration for ZODB."""
    return "\n".join(["%import neo.client", "<NEOStorage>", *lines, "</NEOStorage>"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("12", 12), ("3KB", 3072), ("20mb", 20 << 20), ("1 GB", 1 << 30)],
)
def test_byte_size(text: str, expected: int) -> None:
    assert byte_size(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "x", "1.5MB", "MB"])
def test_byte_size_wrong(text: str) -> None:
    with pytest.raises(ConfigurationError):
        byte_size(text)


@pytest.mark.parametrize("dash", [True, False])
def test_both_spellings(dash: bool) -> None:
    """W29."""
    options = {
        **REQUIRED,
        "read_only": "1",
        "cache_size": "0",
        "ignore_wrong_checksum": "off",
        "connect_timeout": "2.5",
        "compress": "zlib=3",
        "max_object_size": "1MB",
        "vote_timeout": "30",
    }
    if dash:
        options = {key.replace("_", "-"): value for key, value in options.items()}
    assert parse(options) == {
        **REQUIRED,
        "read_only": True,
        "cache_size": 0,
        "ignore_wrong_checksum": False,
        "connect_timeout": 2.5,
        "compress": "zlib=3",
        "max_object_size": 1 << 20,
        "vote_timeout": 30,
    }


@pytest.mark.parametrize(
    "options",
    [
        {"name": "x"},
        {"master_nodes": "x"},
        {**REQUIRED, "name": ""},
        {**REQUIRED, "master_nodes": " "},
        {**REQUIRED, "name": "x\ny"},
        {**REQUIRED, "wait_for_pack": "1"},
        {**REQUIRED, "compress": "zlib=10"},
        {**REQUIRED, "compress": "lzma"},
        {**REQUIRED, "read-only": "maybe"},
        {**REQUIRED, "read-only": "1", "read_only": "1"},
        {**REQUIRED, "ca": __file__},
        {**REQUIRED, "ca": "/nonexistent"},
        {**REQUIRED, "logfile": "/nonexistent/x.log"},
    ],
)
def test_refused(options: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError):
        parse(options)


def test_zconfig(tmp_path: Path) -> None:
    storage = storageFromString(
        section(
            "master_nodes 127.0.0.1:1",
            "name test",
            "compress no",
            "READ-ONLY yes",
            "cache-size 1MB",
            f"logfile {tmp_path}/client.log",
        )
    )
    try:
        assert storage.getName() == "NEOStorage(test)"
        assert storage.isReadOnly()
        assert storage._cache.max_size == 1 << 20
    finally:
        storage.close()
    assert (tmp_path / "client.log").exists()


@pytest.mark.parametrize("line", ["wait_for_pack true", "compress 9", "cache-size -1"])
def test_zconfig_wrong(line: str) -> None:
    with pytest.raises(ZConfig.ConfigurationError):
        storageFromString(section("master_nodes 127.0.0.1:1", "name test", line))


def test_uri() -> None:
    """Debian's Python 3.11 has urlsplit refuse such addresses."""
    factory, database = NEOStorageURIResolver(
        "neo://a%40b@127.0.0.1:1,[::1]:2?read_only=1&cache-size=1KB&connection_cache_size=9"
    )
    assert database == {"connection_cache_size": "9"}
    storage: Any = factory()
    try:
        assert storage.app.name == "a@b"
        assert storage.isReadOnly()
        assert storage._cache.max_size == 1024
        assert [n.getAddress() for n in storage.app.nm.getMasterList()] == [
            ("127.0.0.1", 1),
            ("::1", 2),
        ]
    finally:
        storage.close()


@pytest.mark.parametrize(
    "uri",
    [
        "neo://127.0.0.1:1",
        "neo://@127.0.0.1:1",
        "neo://test@",
        "neo://test@127.0.0.1:1/path",
        "neo://test@127.0.0.1:1#fragment",
        "neo://test@127.0.0.1:1?name=other",
        "neo://test@127.0.0.1:1?master_nodes=other",
        "neo://test@127.0.0.1:1?read_only=maybe",
        "neo://test@127.0.0.1:1?logfile=x%0Acompress%20no",
        "neo://te%0Ast@127.0.0.1:1",
        "neos://test@127.0.0.1:1",
        "zeo://test@127.0.0.1:1",
    ],
)
def test_uri_wrong(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told when the URI is parsed; nothing can be injected (D19)."""
    for name in ("CA", "CERT", "KEY"):
        monkeypatch.delenv(f"NEO_{name}", raising=False)
    with pytest.raises(ValueError, match="invalid URI"):
        NEOStorageURIResolver(uri)


def test_uri_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEO_CA", __file__)
    monkeypatch.setenv("NEO_CERT", __file__)
    monkeypatch.delenv("NEO_KEY", raising=False)
    with pytest.raises(ValueError, match="'key' or the variable NEO_KEY"):
        NEOStorageURIResolver("neos://test@127.0.0.1:1")
    NEOStorageURIResolver(f"neos://test@127.0.0.1:1?key={__file__}")


def test_import_has_no_effect() -> None:
    """W31: no signal handler, no change of logging or of os.fork, in any thread."""
    program = """
import logging, os, signal, threading
before = os.fork, [signal.getsignal(s) for s in range(1, 65) if s not in (32, 33)]
def load():
    import neo.client, neo.client.Storage, neo.client.config, neo.client.zodburi
thread = threading.Thread(target=load)
thread.start()
thread.join()
assert before == (
    os.fork, [signal.getsignal(s) for s in range(1, 65) if s not in (32, 33)]
)
assert not logging.getLogger().handlers
assert threading.active_count() == 1
import neo.client.Storage
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
