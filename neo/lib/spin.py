"""Adaptive spin: to look for a moment before sleeping, where it pays.

To wake a thread that sleeps on another processor takes longer than to make most
answers: 130 us become 50 for a load, at the same cost in CPU. So whoever waits for
something that mostly comes at once polls before it sleeps:

- after waits that were short only. A spin in vain doubles the number of short waits
  that must come first;
- if no thread waits for a processor (`Processors.are_short`), else it would take the
  time of the one that it waits for;
- giving the processor away between two looks. If somebody took it, all sleep at once
  for a while: on a busy machine who always spins is a hog, which is scheduled late.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TypeVar

LONGEST = 200e-6  # of a spin (s): more than a request and the wake-up of its server
SHORT = 400e-6  # a sleep (s) which, without waking up, would not have been needed
FEW = 4, 1024  # short sleeps before a spin: at first, and after spins in vain
DISTURBED = 100e-6  # between two looks (s): another thread ran
PAUSE = 0.01, 1.0  # without spins then (s): at first, and if it goes on

T = TypeVar("T")


class Processors:
    """What tells whether threads wait for a processor: 2 us per question."""

    def __init__(self) -> None:
        self._count = os.cpu_count() or 1
        self._fd = -1
        if self._count > 1:
            with contextlib.suppress(OSError):  # not to be known: nobody spins
                self._fd = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)

    def are_short(self) -> bool:
        """Are more threads ready to run than there are processors, ours included?"""
        if self._fd < 0:
            return True
        # "0.20 0.18 0.12 1/80 11206": of 80 threads, 1 is ready.
        ready, _, _ = os.pread(self._fd, 64, 0).split()[3].partition(b"/")
        return int(ready) > self._count

    def __del__(self) -> None:
        # Not before, for a thread may be about to use it.
        if self._fd >= 0:
            os.close(self._fd)


class Spin:
    """What is known of the waits at one place."""

    def __init__(self, processors: Processors) -> None:
        self._processors = processors
        self._missing, self._few = FEW[0], FEW[0]  # short sleeps before a spin
        self._not_before = 0.0
        self._pause = PAUSE[0]

    def look(self, poll: Callable[[int], list[T]]) -> list[T]:
        """What `poll(0)` returns, as soon as it is true; nothing: sleep."""
        if self._missing > 0:
            return []
        if events := poll(0):
            return events
        last = start = time.monotonic()
        if start < self._not_before or self._processors.are_short():
            return []
        while True:
            events = poll(0)
            now = time.monotonic()
            if now - last > DISTURBED:
                self._not_before = now + self._pause
                self._pause = min(2 * self._pause, PAUSE[1])
                return events
            if events:
                self._few = max(FEW[0], self._few >> 1)
                self._pause = max(PAUSE[0], 0.9 * self._pause)
                return events
            if now - start > LONGEST:
                self._few = min(2 * self._few, FEW[1])
                self._missing = self._few
                return []
            last = now
            os.sched_yield()

    def slept(self, seconds: float) -> None:
        """How long it took, after a `look` in vain."""
        if seconds < SHORT:
            self._missing -= 1
        elif self._missing < self._few:
            self._missing += 1
