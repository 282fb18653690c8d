"""Whose fault decides the class (docs/architecture.rst, "Errors")."""

from __future__ import annotations


class NeoError(Exception):
    """Base of all that NEO raises on purpose."""


class ConfigurationError(NeoError):
    """The operator's: an option or a file is wrong. One line, for stderr."""


class ProtocolError(NeoError):
    """The peer's: answered with PROTOCOL_ERROR, then its connection is closed."""


class BackendError(NeoError):
    """The database's: the node stops, for it can't know what the database holds."""


class DatabaseLocked(BackendError):
    """Another process uses the database."""
