"""The commands."""

from __future__ import annotations

import sys
from types import TracebackType


def _report(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Ctrl-C while a command is still being imported is no bug to be shown."""
    if not issubclass(kind, KeyboardInterrupt):
        _report_others(kind, error, traceback)


_report_others, sys.excepthook = sys.excepthook, _report
