"""Distinguishes a broken engine from a busy one."""

from __future__ import annotations

import time
from typing import Final

from lacre_backend.engine.protocol import EngineError

# In a row until an engine counts as broken: for example, after a device falls off its bus every step fails
FAILED_STEPS: Final = 8
STUCK: Final = 300.0  # seconds of one step until an engine counts as stuck; the longest expected step takes about 60


class EngineHealth:
    """The engine's thread writes it; any thread may read it."""

    __slots__ = ("_began", "_failures")

    def __init__(self) -> None:
        self._began: float | None = None
        self._failures = 0

    def step(self) -> None:
        """A step begins."""
        self._began = time.monotonic()

    def rest(self) -> None:
        """The thread waits for work or is between two steps."""
        self._began = None

    def done(self) -> None:
        """A step succeeded."""
        self._failures = 0

    def failed(self, error: EngineError) -> None:
        """A step failed. Raises RuntimeError after too many failures in a row: only a new process helps."""
        self._failures += 1
        if self._failures >= FAILED_STEPS:
            raise RuntimeError("every step fails") from error

    @property
    def stuck(self) -> bool:
        began = self._began
        return began is not None and time.monotonic() - began > STUCK
