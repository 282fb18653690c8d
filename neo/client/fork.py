"""Forks of the process: in the child, storages begin anew, with own connections."""

from __future__ import annotations

import os
import threading  # noqa: TID251 - of all storages of the process
import weakref
from itertools import count


class Forkable:
    """What must be told of forks of the process."""

    def before_fork(self) -> None:
        """In the parent: be consistent until one of the others is called."""

    def after_fork_parent(self) -> None:
        """Go on."""

    def after_fork_child(self) -> None:
        """Begin anew."""

    def after_fork_untold(self) -> None:
        """In the child: as `after_fork_child`, if neither that nor `before_fork` was
        called.
        """


_forkables: weakref.WeakValueDictionary[int, Forkable] = weakref.WeakValueDictionary()
_number = count()
_held: list[Forkable] = []
_untold = threading.Lock()


def _before() -> None:
    for _, forkable in sorted(_forkables.items()):
        forkable.before_fork()
        _held.append(forkable)


def _after_parent() -> None:
    while _held:
        _held.pop().after_fork_parent()


def _after_child() -> None:
    while _held:
        _held.pop().after_fork_child()


def forked_untold() -> None:
    """Begin anew in a child of a fork that Python did not make: uWSGI calls no hook,
    and its workers would share the connections of their parent.
    """
    with _untold:
        for _, forkable in sorted(_forkables.items()):
            forkable.after_fork_untold()


def register(forkable: Forkable) -> None:
    """Tell `forkable` of forks, as long as it lives."""
    number = next(_number)
    if number == 0:
        os.register_at_fork(
            before=_before,
            after_in_parent=_after_parent,
            after_in_child=_after_child,
        )
    _forkables[number] = forkable
