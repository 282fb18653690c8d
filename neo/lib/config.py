"""Options of the commands: declared once, merged from four places, checked, shown.

An `Option` is declared as text in, value out: its default, its value in the file and
its value on the command line pass through the same parser, so they can't mean different
things. Precedence: command line > the section of the process > [DEFAULT] > built-in
default. Mandatory options are looked for after the merge.
Source: operations.md 1.4, 2, 10.2.

Nothing here reads a file or resolves a name before `load()` is called.
"""

from __future__ import annotations

import argparse
import configparser
import difflib
import json
import math
import os
import re
import socket
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from typing import Any, NoReturn

from .exception import ConfigurationError
from .util import MAX_PORT, Address, format_address, parse_address

MASTER_PORT = 10000
ADMIN_PORT = 9999
COMMAND_LINE = "command line"
BUILT_IN = "default"


class UsageError(ConfigurationError):
    """What was typed is wrong or incomplete; exit status 2 instead of 1."""


# --- from text to values --------------------------------------------------------

Parse = Callable[[str], Any]


def text(value: str) -> str:
    """One line of text."""
    if any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise ConfigurationError(f"{value!r} contains control characters")
    return value


def path(value: str) -> str:
    """A file name; `~` and `~user` are expanded."""
    return os.path.expanduser(text(value))


_BOOLEANS = dict.fromkeys(("1", "yes", "true", "on"), True) | dict.fromkeys(
    ("0", "no", "false", "off"), False
)


def boolean(value: str) -> bool:
    """Usual spellings of yes and no, in any case."""
    try:
        return _BOOLEANS[value.lower()]
    except KeyError:
        raise ConfigurationError(f"{value!r} is neither yes nor no") from None


def integer(least: int, most: int | None = None) -> Parse:
    """Parser of an integer in `least <= value <= most`."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise ConfigurationError(f"{value!r} is not an integer") from None
        _check_range(number, least, most)
        return number

    return parse


def number(least: float, above: bool = False) -> Parse:
    """Parser of a finite number, `>= least`, or `> least` if `above`."""

    def parse(value: str) -> float:
        try:
            result = float(value)
        except ValueError:
            raise ConfigurationError(f"{value!r} is not a number") from None
        if not math.isfinite(result):
            raise ConfigurationError(f"{value!r} is not a finite number")
        if above and result <= least:
            raise ConfigurationError(
                f"{value} is out of range: more than {least:g} expected"
            )
        _check_range(result, least, None)
        return result

    return parse


def _check_range(value: float, least: float, most: float | None) -> None:
    if value < least:
        raise ConfigurationError(
            f"{value} is out of range: at least {least:g} expected"
        )
    if most is not None and value > most:
        raise ConfigurationError(f"{value} is out of range: at most {most:g} expected")


def wait_time(value: str) -> float:
    """Seconds; -1 stands for ever (math.inf)."""
    return math.inf if value.strip() in {"-1", "-1.0"} else float(number(0)(value))


def choice(*names: str) -> Parse:
    """Parser of one of `names`, written in any case, returned as declared."""
    by_folded = {name.casefold(): name for name in names}

    def parse(value: str) -> str:
        try:
            return by_folded[value.casefold()]
        except KeyError:
            expected = ", ".join(names)
            raise ConfigurationError(f"{value!r} is none of {expected}") from None

    return parse


def address(default_port: int | None) -> Parse:
    """Parser of one address, resolved at once; None: the port may not be omitted."""
    return lambda value: resolve(parse_address(text(value), default_port))


def masters(value: str) -> tuple[Address, ...]:
    """Parse a list of masters separated by white space; resolved, without doubles."""
    found: dict[Address, None] = {}
    for item in value.split():
        host, port = parse_address(item, MASTER_PORT)
        if not port:
            raise ConfigurationError(
                f"invalid address {item!r}: port 0 can't be reached"
            )
        found[resolve((host, port))] = None
    return tuple(found)


def resolve(where: Address) -> Address:
    """`where` with a numeric IPv4 or IPv6 host: the first answer of the system."""
    host, port = where
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise ConfigurationError(f"cannot resolve host {host!r}: {reason}") from None
    return str(answers[0][4][0]), port


# --- declaration ----------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option of a command, and the key of the same name in its section."""

    name: str  # as on the command line: "dynamic-master-list"
    help: str
    parse: Parse = text
    default: str | None = None  # as it would be written
    short: str = ""  # one letter
    metavar: str = ""
    hidden: tuple[str, ...] = ()  # former spellings, not shown by --help
    required: bool = False
    repeatable: bool = False  # the value is a tuple
    empty: bool = False  # may be the empty text
    secret: bool = False  # not shown; can be read from the file named by <name>-file
    own: bool = False  # two processes can't have the same: not for [DEFAULT]
    command_line_only: str = ""  # why it is refused in a file
    group: str = "options"

    @property
    def key(self) -> str:
        return _key(self.name)

    @property
    def flag(self) -> bool:
        return self.parse is boolean

    @property
    def spellings(self) -> list[str]:
        return [f"-{self.short}"] * bool(self.short) + [f"--{self.name}"]


def _key(name: str) -> str:
    return name.lower().replace("-", "_")


def _limit(default: float, roles: str, text: str) -> float:
    result: float = field(default=default, metadata={"roles": roles, "help": text})
    return result


@dataclass(frozen=True)
class Limits:
    """How long a node is patient with others, in seconds. Source: architecture.md 6.6.

    Roles: M(aster), S(torage), A(dmin).
    """

    ping_after: float = _limit(
        3, "MSA", "Send a Ping to a peer that is silent for so long."
    )
    silence_limit: float = _limit(
        10, "MSA", "Take a peer that is silent for so long, despite the Ping, for dead."
    )
    identification_timeout: float = _limit(
        10,
        "MSA",
        "Close an accepted connection whose peer does not identify within this time.",
    )
    master_timeout: float = _limit(
        2,
        "MSA",
        "Try the next master if one does not answer to identification in this time.",
    )
    storage_timeout: float = _limit(
        15,
        "S",
        "Give up a storage that does not answer to identification within this time.",
    )
    lock_timeout: float = _limit(
        15,
        "M",
        "Take a storage for dead that does not lock a voted transaction, or does not "
        "get ready, within this time, if the cluster can run without it.",
    )
    absence_limit: float = _limit(
        5,
        "M",
        "After the loss of the primary, start without storages that are absent for so "
        "long, if the others have all data; 12 times as long if the primary may live.",
    )
    lease: float = _limit(
        60,
        "S",
        "Drop a transaction that others wait for when its client is idle for so long.",
    )

    def check(self) -> None:
        """Raise ConfigurationError if the limits contradict each other."""
        if self.ping_after >= self.silence_limit:
            raise ConfigurationError(
                f"ping-after ({self.ping_after:g} s) must be less than "
                f"silence-limit ({self.silence_limit:g} s)"
            )


def limit_options(role: str) -> tuple[Option, ...]:
    """The limits that `role` (M, S or A) enforces, as options."""
    return tuple(
        Option(
            limit.name.replace("_", "-"),
            limit.metadata["help"],
            number(0, above=True),
            default=f"{limit.default:g}",
            metavar="SECONDS",
            group="limits",
        )
        for limit in fields(Limits)
        if role in limit.metadata["roles"]
    )


LOG_AND_TLS = (
    Option(
        "logfile", "SQLite database to log into; neolog prints it.", path,
        short="l", metavar="PATH", own=True,
    ),
    Option(
        "ca", "Certificate authority for TLS (PEM).", path, metavar="PATH", group="TLS"
    ),
    Option(
        "cert", "Certificate of this node (PEM).", path, metavar="PATH", group="TLS"
    ),
    Option(
        "key", "Private key of this node (PEM).", path, metavar="PATH", group="TLS"
    ),
)  # fmt: skip


def check_tls(
    ca: str | None, cert: str | None, key: str | None
) -> tuple[str, str, str] | None:
    """The three paths, or None if no TLS is wanted. They go together."""
    if ca and cert and key:
        return ca, cert, key
    given = {"ca": ca, "cert": cert, "key": key}
    if not any(given.values()):
        return None
    missing = " and ".join(name for name, value in given.items() if not value)
    raise ConfigurationError(
        f"TLS needs ca, cert and key together: {missing} not given"
    )


# --- command line ---------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line: it raises UsageError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (try --help)")


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Declare `options` as texts; what is not given leaves no attribute."""
    groups: dict[str, Any] = {"options": parser}
    for option in options:
        group = groups.get(option.group)
        if group is None:
            group = groups[option.group] = parser.add_argument_group(option.group)
        _add(group, option.spellings, option, _help(option))
        if option.hidden:
            _add(group, list(option.hidden), option, argparse.SUPPRESS)
        if option.secret:
            group.add_argument(
                f"--{option.name}-file",
                metavar="PATH",
                default=argparse.SUPPRESS,
                help=f"Read --{option.name} from the first line of this file.",
            )


def _add(group: Any, spellings: list[str], option: Option, shown: str) -> None:
    keywords: dict[str, Any] = {"dest": option.key, "help": shown}
    if option.flag:
        keywords.update(action="store_const", const="yes")
    else:
        keywords["metavar"] = option.metavar or option.name.upper()
        if option.repeatable:
            keywords["action"] = "append"
    group.add_argument(*spellings, default=argparse.SUPPRESS, **keywords)


def _help(option: Option) -> str:
    shown = option.help
    if option.default and not option.flag:
        shown += f" (default: {option.default})"
    if option.required:
        shown += " Mandatory, here or in the file."
    return shown.replace("%", "%%")


# --- configuration file ---------------------------------------------------------


class File:
    """The sections of a configuration file, as written.

    Values are not interpolated, so that a password may contain `%`. For files written
    for neoppod `%%` is read as `%`, and `%(key)s` as the value of a key that exists.
    """

    DEFAULT = "DEFAULT"

    def __init__(self, name: str) -> None:
        """Raise ConfigurationError if the file can't be read."""
        self.name = name
        # No default section for ConfigParser: it would hide what comes from [DEFAULT].
        parser = configparser.ConfigParser(interpolation=None, default_section="\0")
        parser.optionxform = _key  # type: ignore[assignment]
        try:
            with open(os.path.expanduser(name), encoding="utf-8-sig") as f:
                parser.read_file(f, name)
        except OSError as e:
            raise ConfigurationError(f"cannot read {name}: {e.strerror}") from None
        except UnicodeDecodeError as e:
            raise ConfigurationError(
                f"cannot read {name}: not in UTF-8 ({e})"
            ) from None
        except configparser.Error as e:
            message = " ".join(str(e).split())
            raise ConfigurationError(f"cannot read {name}: {message}") from None
        self.sections = {s: dict(parser[s]) for s in parser.sections()}
        self.default = self.sections.pop(self.DEFAULT, {})

    def use(self, section: str) -> None:
        """Choose the section of this process."""
        if section not in self.sections:
            names = ", ".join(f"[{s}]" for s in self.sections) or "none"
            raise ConfigurationError(
                f"{self.name} has no section [{section}] to use (it has: {names});"
                " choose one with --section"
            )
        self.section = section
        self.own = self.sections[section]

    def get(self, key: str) -> tuple[str, str] | None:
        """(text, origin) of a key, or None."""
        for section, values in (self.section, self.own), (self.DEFAULT, self.default):
            if key in values:
                return self.expand(values[key]), f"{self.name} [{section}]"
        return None

    def expand(self, value: str, depth: int = 10) -> str:
        """`value` with `%%` and `%(key)s` replaced."""

        def replace(found: re.Match[str]) -> str:
            if found[1] is None:
                return "%"
            key = _key(found[1])
            inner = self.own.get(key, self.default.get(key))
            if inner is None:
                return found[0]
            if not depth:
                raise ConfigurationError(f"{self.name}: %({key})s refers to itself")
            return self.expand(inner, depth - 1)

        return _PERCENT.sub(replace, value)

    def variables(self) -> set[str]:
        """Keys that some value of this process refers to."""
        values = [*self.own.values(), *self.default.values()]
        return {_key(m) for v in values for m in _PERCENT.findall(v) if m}


_PERCENT = re.compile(r"%%|%\(([^()\s]+)\)s")


# --- merge ----------------------------------------------------------------------


class Settings:
    """The effective options of a process; attributes by key: `settings.cluster`."""

    def __init__(
        self,
        values: Mapping[str, Any],
        origins: Mapping[str, str],
        warnings: Sequence[str] = (),
        secrets: Collection[str] = (),
    ) -> None:
        self.values = dict(values)
        self.origins = dict(origins)
        self.warnings = list(warnings)
        self.secrets = frozenset(secrets)
        self.check_only = False  # --check-config

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["values"][key]
        except KeyError:
            raise AttributeError(key) from None

    @property
    def limits(self) -> Limits:
        """The limits of the command; those it has no option for have their default."""
        names = {limit.name for limit in fields(Limits)}
        return Limits(**{k: v for k, v in self.values.items() if k in names})

    def describe(self) -> str:
        """One line an option: key, value, origin."""
        rows = [
            (key, self._show(key, value), self.origins.get(key, BUILT_IN))
            for key, value in self.values.items()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(
            f"{key:<{widths[0]}} = {value:<{widths[1]}}  ({origin})"
            for key, value, origin in rows
        )

    def _show(self, key: str, value: Any) -> str:
        if value is None or value == ():
            return "-"
        if key in self.secrets:
            return _mask(str(value))
        return _format(value)


def _format(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case (str() as host, int() as port):
            return format_address((host, port))
        case tuple():
            return " ".join(map(_format, value))
        case float():
            return "-1" if math.isinf(value) else f"{value:g}"
    return str(value)


def _mask(value: str) -> str:
    """Hide the password of `user:password@database` or `user:password`."""
    credentials, at, rest = value.rpartition("@")
    user, colon, _password = (credentials if at else value).partition(":")
    if not colon or value.startswith(("file:", "/", "~", ".")):
        return value
    return f"{user}:***{at}{rest if at else ''}"


def load(
    prog: str,
    options: Sequence[Option],
    argv: Sequence[str] | None = None,
    *,
    section: str,
    description: str = "",
    known: Collection[str] = (),
) -> Settings:
    """Merge and parse the options of a command that may read a configuration file.

    `section` is the one used without --section; `known` are the keys other commands may
    find in [DEFAULT]. Raises UsageError (status 2) for what is missing or wrong on the
    command line, ConfigurationError (status 1) for the rest, SystemExit for --help.
    """
    arguments = _parse_arguments(prog, options, argv, section, description)
    warnings: list[str] = []
    file = None
    if arguments.file is not None:
        file = File(arguments.file)
        file.use(arguments.section or section)
        _refuse(file, options)
        warnings += _suspicious(file, options, known)
    elif arguments.section is not None:
        warnings.append("--section has no effect without --file")
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in options:
        values[option.key], origins[option.key] = _value(option, vars(arguments), file)
    secrets = [option.key for option in options if option.secret]
    settings = Settings(values, origins, warnings, secrets)
    settings.limits.check()
    settings.check_only = arguments.check_config
    return settings


def _parse_arguments(
    prog: str,
    options: Sequence[Option],
    argv: Sequence[str] | None,
    section: str,
    about: str,
) -> argparse.Namespace:
    parser = Parser(
        prog=prog,
        description=about,
        epilog="Options can be written in the file as `name = value`.",
    )
    parser.add_argument(
        "-f", "--file", metavar="PATH", help="Configuration file to read."
    )
    parser.add_argument(
        "-s", "--section", metavar="NAME", help=f"Section to read. (default: {section})"
    )
    parser.add_argument(
        "--check-config",
        action="store_true",
        help="Print the effective options and where they come from, then exit.",
    )
    parser.add_argument(
        "--version", action="store_true", help="Print the version, then exit."
    )
    add_options(parser, options)
    arguments = parser.parse_args(argv)
    if arguments.version:
        sys.stdout.write(f"{prog} {version()}\n")
        raise SystemExit(0)
    return arguments


def version() -> str:
    """Version of the installed package."""
    try:
        return metadata.version("neoppod")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _value(
    option: Option, given: Mapping[str, Any], file: File | None
) -> tuple[Any, str]:
    """(value, origin) of an option."""
    found = _find(option.key, given, file)
    if option.secret:
        found = _read_secret(option, found, _find(f"{option.key}_file", given, file))
    if found is None:
        if option.required:
            raise UsageError(_missing(option, file))
        found = option.default, BUILT_IN
    written, origin = found
    if option.repeatable:
        return _values(option, given, file)
    if written is None:
        return (False if option.flag else None), origin
    return _parse(option, written, origin), origin


def _find(
    key: str, given: Mapping[str, Any], file: File | None
) -> tuple[str | None, str] | None:
    if key in given:
        return given[key], COMMAND_LINE
    return file.get(key) if file else None


def _values(
    option: Option, given: Mapping[str, Any], file: File | None
) -> tuple[tuple[Any, ...], str]:
    """Values of the command line are added to those of the file (operations.md 2.2)."""
    result: list[Any] = []
    origins = []
    found = file.get(option.key) if file else None
    if found is not None:
        origins.append(found[1])
        lines = [line.strip() for line in found[0].splitlines()]
        result += [_parse(option, line, found[1]) for line in lines if line]
    if option.key in given:
        origins.append(COMMAND_LINE)
        result += [_parse(option, value, COMMAND_LINE) for value in given[option.key]]
    return tuple(result), " + ".join(origins) or BUILT_IN


def _parse(option: Option, written: str, origin: str) -> Any:
    try:
        if not written.strip() and not option.empty:
            raise ConfigurationError("value is empty")
        return option.parse(written)
    except ConfigurationError as e:
        if origin == COMMAND_LINE:
            raise UsageError(f"--{option.name}: {e}") from None
        raise ConfigurationError(f"{origin}, {option.key}: {e}") from None


def _read_secret(
    option: Option,
    direct: tuple[str | None, str] | None,
    indirect: tuple[str | None, str] | None,
) -> tuple[str | None, str] | None:
    if indirect is None:
        return direct
    if direct is not None:
        raise UsageError(f"give either {option.name} or {option.name}-file, not both")
    name = path(indirect[0] or "")
    try:
        with open(name, encoding="utf-8") as f:
            return f.readline().rstrip("\r\n"), name
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "not in UTF-8"
        raise ConfigurationError(
            f"cannot read {option.name}-file {name}: {reason}"
        ) from None


def _missing(option: Option, file: File | None) -> str:
    message = f"{option.key} is missing: give {'/'.join(option.spellings)}"
    if file is None:
        return f"{message}, or a configuration file with --file"
    return f"{message}, or set {option.key} in section [{file.section}] of {file.name}"


def _refuse(file: File, options: Sequence[Option]) -> None:
    """Refuse keys that would do harm at each start (operations.md T3 W32)."""
    for option in options:
        found = file.get(option.key)
        if option.command_line_only and found:
            raise ConfigurationError(
                f"{found[1]}: {option.key} is not allowed in a file"
                f" ({option.command_line_only}); use --{option.name} once"
            )


def _suspicious(
    file: File, options: Sequence[Option], known: Collection[str]
) -> list[str]:
    """Warnings on keys which probably don't do what was meant."""
    keys = {option.key: option for option in options}
    accepted = {*keys, *(f"{o.key}_file" for o in options if o.secret)}
    variables = file.variables()
    warnings = []
    for section, values, others in (
        (file.section, file.own, ()),
        (file.DEFAULT, file.default, known),
    ):
        for key in values:
            if key in accepted or key in variables or key in others:
                continue
            close = difflib.get_close_matches(key, sorted({*accepted, *others}), 1)
            hint = f", did you mean {close[0]}?" if close else ""
            warnings.append(
                f"{file.name} [{section}]: unknown key {key} is ignored{hint}"
            )
    for key, option in keys.items():
        if not option.own or key not in file.default or key in file.own:
            continue
        sharing = [
            s for s, v in file.sections.items() if key not in v and s != file.section
        ]
        if sharing:
            names = ", ".join(f"[{s}]" for s in sharing)
            warnings.append(
                f"{file.name} [{file.DEFAULT}]: [{file.section}] shares {key}"
                f" with {names}; set it in each section"
            )
    return warnings


# --- dynamic master list --------------------------------------------------------


class MasterList:
    """The masters a node knows, kept in a file of its own. Source: operations.md 2.8.

    JSON, a list of [host, port].
    """

    def __init__(self, name: str, warn: Callable[..., object]) -> None:
        """`warn(message, *args)` is told of failures after `load()`."""
        self.name = name
        self.warn = warn
        self.saved: tuple[Address, ...] = ()

    def load(self) -> tuple[Address, ...]:
        """Addresses of the file, which is created if it does not exist.

        Raises ConfigurationError.
        """
        try:
            with open(self.name, encoding="utf-8") as f:
                self.saved = _check_masters(json.load(f))
        except FileNotFoundError:
            self._create()
        except (OSError, ValueError, RecursionError) as e:
            reason = getattr(e, "strerror", None) or e
            raise ConfigurationError(
                f"cannot read dynamic master list {self.name}: {reason}"
            ) from None
        return self.saved

    def _create(self) -> None:
        try:
            self._write(())
        except OSError as e:
            raise ConfigurationError(
                f"cannot create dynamic master list {self.name}: {e.strerror}"
            ) from None

    def save(self, addresses: Iterable[Address]) -> None:
        """Replace the content of the file; never fails, see `warn`."""
        new = tuple(dict.fromkeys(addresses))
        if new == self.saved:
            return
        try:
            self._write(new)
        except OSError as e:
            self.warn("cannot write dynamic master list %s: %s", self.name, e.strerror)
        else:
            self.saved = new

    def _write(self, addresses: tuple[Address, ...]) -> None:
        temporary = f"{self.name}#neo#"
        with open(temporary, "w", encoding="utf-8") as f:
            json.dump(addresses, f)
            f.flush()
            os.fsync(f.fileno())
        os.rename(temporary, self.name)


def _check_masters(content: Any) -> tuple[Address, ...]:
    match content:
        case [*items] if all(
            isinstance(item, list)
            and len(item) == 2
            and isinstance(item[0], str)
            and type(item[1]) is int
            and 0 < item[1] <= MAX_PORT
            for item in items
        ):
            return tuple((host, port) for host, port in items)
    raise ValueError("a list of [host, port] is expected")
