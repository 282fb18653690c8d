"""Options of a storage as text: the ZConfig section, and the query of a URI.

Keys may be written with `-` or `_`. Source: operations.md 11.2 and 11.3.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from neo.lib.compress import parse_option
from neo.lib.config import boolean, check_tls, number, path, text
from neo.lib.exception import ConfigurationError

if TYPE_CHECKING:
    from .Storage import Storage

_UNITS = {"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}


def byte_size(value: str) -> int:
    """Bytes: an integer, perhaps followed by KB, MB or GB."""
    digits, factor = value.strip().lower(), 1
    if digits[-2:] in _UNITS:
        digits, factor = digits[:-2].strip(), _UNITS[digits[-2:]]
    if not (digits.isascii() and digits.isdigit()):
        raise ConfigurationError(f"{value!r} is not a size: expected 20MB, for example")
    return int(digits) * factor


def _compress(value: str) -> str:
    parse_option(text(value))
    return value.strip().lower()


def _file(value: str) -> str:
    name = path(value)
    if not os.path.isfile(name):
        raise ConfigurationError(f"{name!r} is not an existing file")
    return name


def _in_directory(value: str) -> str:
    name = path(value)
    directory = os.path.dirname(name)
    if directory and not os.path.isdir(directory):
        raise ConfigurationError(f"directory {directory!r} does not exist")
    return name


def _masters(value: str) -> str:
    text(value)
    if not value.split():
        raise ConfigurationError("no master is given")
    return value


OPTIONS: dict[str, Callable[[str], Any]] = {
    "ca": _file,
    "cache_size": byte_size,
    "cert": _file,
    "compress": _compress,
    "connect_timeout": number(0),
    "dynamic_master_list": _in_directory,
    "ignore_wrong_checksum": boolean,
    "key": _file,
    "logfile": _in_directory,
    "master_nodes": _masters,
    "max_object_size": byte_size,
    "name": text,
    "read_only": boolean,
    "vote_timeout": number(1),
}


def parse(options: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of Storage. Raises ConfigurationError."""
    result: dict[str, Any] = {}
    for key, value in options.items():
        name = key.replace("-", "_").lower()
        if name not in OPTIONS:
            raise ConfigurationError(f"{key!r} is not a known key name")
        if name in result:
            raise ConfigurationError(f"{key!r} is given twice")
        try:
            result[name] = OPTIONS[name](value)
        except ConfigurationError as error:
            raise ConfigurationError(f"{key}: {error}") from None
    for name in ("master_nodes", "name"):
        if not result.get(name):
            raise ConfigurationError(f"{name!r} is required")
    check_tls(result.get("ca"), result.get("cert"), result.get("key"))
    return result


class NeoStorage:
    """Section NEOStorage; ZODB calls `open()`."""

    def __init__(self, section: Any) -> None:
        self.config = section
        self.name = section.getSectionName()
        try:
            self.options = parse(section.options)
        except ConfigurationError as error:
            raise ValueError(str(error)) from None

    def open(self) -> Storage:
        """Make the storage."""
        from .Storage import Storage

        return Storage(**self.options)
