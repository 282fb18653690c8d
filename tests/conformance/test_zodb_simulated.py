"""ZODB's own suites in the simulator, with one and with three storages."""

from __future__ import annotations

import unittest

from . import suites
from .simulated import Simulated

pytestmark = suites.WARNINGS

# It blocks in the callback of tpc_finish, which has the client's lock.
unsuitable = unittest.skip("the client's lock is not simulated")

for suite in suites.ALL:
    for storages in 1, 3:
        name = f"{suite.__name__}{storages}"
        content = {
            "__doc__": suite.__doc__,
            "__module__": __name__,
            "__test__": True,
            "storages": storages,
        }
        for test in ("test_tid_ordering_w_commit",):
            if hasattr(suite, test):
                content[test] = unsuitable(getattr(suite, test))
        globals()[name] = type(name, (Simulated, suite), content)
del suite
