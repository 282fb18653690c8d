"""URIs of storages, for the zodburi package.

    neo://name@master1,master2,...?option=value&...
    neos://name@master1,...?ca=...&cert=...&key=...

Source: operations.md 11.3.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from neo.lib.exception import ConfigurationError

from .config import OPTIONS, parse

if TYPE_CHECKING:
    from .Storage import Storage

_REQUIRED = ("master_nodes", "name")


def resolve(uri: str) -> tuple[Callable[[], Storage], dict[str, str]]:
    """(factory of the storage, options of the database). ValueError if wrong."""
    try:
        parts = urlsplit(uri)
        if parts.scheme not in ("neo", "neos"):
            raise ConfigurationError("the scheme is neither neo nor neos")
        name, at, addresses = parts.netloc.rpartition("@")
        if not at or not name or not addresses:
            raise ConfigurationError("expected neo://name@master1,master2,...")
        if parts.path or parts.fragment:
            raise ConfigurationError("neither path nor fragment may be given")
        options = {
            "name": unquote(name),
            "master_nodes": " ".join(addresses.split(",")),
        }
        database: dict[str, str] = {}
        query = (
            parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)
            if parts.query
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
        if parts.scheme == "neos":
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
