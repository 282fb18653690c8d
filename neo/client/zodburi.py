"""URIs of storages, for the zodburi package.

    neo://name@master1,master2,...?option=value&...
    neos://name@master1,...?ca=...&cert=...&key=...

Source: operations.md 11.3.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote

from neo.lib.exception import ConfigurationError

from .config import OPTIONS, parse

if TYPE_CHECKING:
    from .Storage import Storage

_REQUIRED = ("master_nodes", "name")
# Scheme, cluster and masters, path, query, fragment. Recent Pythons' `urlsplit` refuses
# IPv6 addresses of several masters.
_URI = re.compile(r"([^:/?#]+)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(#.*)?", re.DOTALL)


def resolve(uri: str) -> tuple[Callable[[], Storage], dict[str, str]]:
    """(factory of the storage, options of the database). ValueError if wrong."""
    try:
        match = _URI.fullmatch(uri)
        if match is None or match[1] not in ("neo", "neos"):
            raise ConfigurationError("the scheme is neither neo nor neos")
        scheme, netloc, path, parameters, fragment = match.groups()
        name, at, addresses = netloc.rpartition("@")
        if not at or not name or not addresses:
            raise ConfigurationError("expected neo://name@master1,master2,...")
        if path or fragment:
            raise ConfigurationError("neither path nor fragment may be given")
        options = {
            "name": unquote(name),
            "master_nodes": " ".join(addresses.split(",")),
        }
        database: dict[str, str] = {}
        query = (
            parse_qsl(parameters, keep_blank_values=True, strict_parsing=True)
            if parameters
            else []
        )
        for key, value in query:
            option = key.replace("-", "_")
            if option in _REQUIRED:
                raise ConfigurationError(f"{key!r} can't be an option")
            if option not in OPTIONS:
                database[key] = value
            elif option in options:
                raise ConfigurationError(f"{key!r} is given twice")
            else:
                options[option] = value
        if scheme == "neos":
            _add_credentials(options)
        kw = parse(options)
    except (ConfigurationError, ValueError) as error:
        raise ValueError(f"invalid URI {uri!r}: {error}") from None

    def factory() -> Storage:
        from .Storage import Storage

        return Storage(**kw)

    return factory, database


def _add_credentials(options: dict[str, str]) -> None:
    for option in ("ca", "cert", "key"):
        variable = f"NEO_{option.upper()}"
        if option not in options:
            if not os.environ.get(variable):
                raise ConfigurationError(
                    f"neos needs the option {option!r} or the variable {variable}"
                )
            options[option] = os.environ[variable]


# The name in the entry point, which predates this module.
NEOStorageURIResolver = resolve
