"""Each handler method has the arguments of its packet."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

import neo
from neo.lib.handler import Handler
from neo.lib.protocol import BY_CODE, Error

PACKETS = {packet.handler: packet for packet in BY_CODE.values() if packet is not Error}


def subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def modules() -> Iterator[str]:
    for module in pkgutil.walk_packages(neo.__path__, "neo."):
        if not module.name.endswith("__main__"):
            yield module.name


@pytest.fixture(scope="session")
def handlers() -> list[type[Handler]]:
    for name in modules():
        importlib.import_module(name)
    return [
        cls
        for cls in dict.fromkeys([Handler, *subclasses(Handler)])
        if cls.__module__.startswith("neo.")
    ]


def test_signatures(handlers: list[type[Handler]]) -> None:
    """`(self, conn, *arguments)`, under the packet's names or `_` and nothing else."""
    wrong = []
    for cls in handlers:
        for name, method in vars(cls).items():
            packet = PACKETS.get(name)
            if packet is None:
                continue
            parameters = list(inspect.signature(method).parameters.values())
            if any(p.kind is p.VAR_POSITIONAL for p in parameters):
                continue  # relays what it does not read
            names = [p.name.strip("_") for p in parameters]
            fields = list(packet.fields)
            where = f"{cls.__module__}.{cls.__name__}.{name}"
            if names[:2] != ["self", "conn"] or any(
                p.kind is p.KEYWORD_ONLY for p in parameters
            ):
                wrong.append(f"{where}{tuple(names)}")
            elif len(names) - 2 != len(fields):
                wrong.append(f"{where}: {names[2:]} instead of {fields}")
    assert not wrong, "\n".join(wrong)


def test_every_public_method_is_a_packet_or_a_helper(
    handlers: list[type[Handler]],
) -> None:
    """A method that is named like a packet but isn't one would never be called."""
    prefixes = ("ask_", "answer_", "notify_")
    wrong = [
        f"{cls.__module__}.{cls.__name__}.{name}"
        for cls in handlers
        for name, method in vars(cls).items()
        if name.startswith(prefixes) and name not in PACKETS and callable(method)
    ]
    assert not wrong, "\n".join(wrong)
