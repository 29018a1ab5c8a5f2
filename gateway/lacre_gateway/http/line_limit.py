"""Limits the log lines that callers without a valid token can cause, so that a flood neither fills a disk nor hides the rest.

Rules:
- The first lines of each address in a minute are written. The others are only counted, by problem and reason.
- At the minute's end the counts are written, so that every refusal has its reason in the log.
- Memory is bounded: problems and reasons are fixed words, and beyond `_MAX_KINDS` they count together.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from lacre.runtime.listening import network_of
from lacre_fabric.logs import Log

PER_ADDRESS: Final = 120  # lines a minute: twice the failed tokens after which an address has to wait
ALTOGETHER: Final = 6000  # lines a minute of all addresses: some 2 MB
_MAX_KINDS: Final = 256
_MINUTE: Final = 60  # seconds
_OTHER: Final = ("other", "")


class LineLimit:
    """Used on one event loop, by all listeners of a process. clock: seconds since the epoch."""

    def __init__(self, log: Log, clock: Callable[[], float] = time.time) -> None:
        self._log = log
        self._clock = clock
        self._window = 0
        self._lines: Counter[str] = Counter()
        self._written = 0
        self._silent: Counter[tuple[str, str]] = Counter()

    def allows(self, address: str, problem: str, reason: str) -> bool:
        """Whether this refusal of an unknown caller may have a line of its own. If not, it is counted."""
        window = int(self._clock() // _MINUTE)
        if window != self._window:
            self._window, self._written = window, 0
            self._lines.clear()
            self.close()
        network = network_of(address)
        if self._written < ALTOGETHER and self._lines[network] < PER_ADDRESS:
            self._written += 1
            self._lines[network] += 1
            return True
        kind = (problem, reason)
        self._silent[kind if kind in self._silent or len(self._silent) < _MAX_KINDS else _OTHER] += 1
        return False

    def close(self) -> None:
        """Writes the counts so far."""
        for (problem, reason), count in self._silent.items():
            self._log.info("requests refused without a line each", problem=problem, reason=reason, number=count)
        self._silent.clear()
