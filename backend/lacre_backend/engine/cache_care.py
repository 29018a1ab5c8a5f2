"""Removes caches some time after their last use, and overwrites cells that hold nothing any longer.

Rules:
- Only the decode thread uses it.
- The copies of idle caches (`vault.py`) go with their scope.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Final

from lacre_backend.engine.context import LlamaContext
from lacre_backend.engine.scheduler import Scheduler
from lacre_backend.engine.scope_ages import ScopeAges
from lacre_backend.engine.speculation import Speculation

_TIDY: Final = 5.0  # seconds without work before the cells' data is overwritten, which takes longer than a step


class CacheCare:
    """Of one engine."""

    def __init__(self, scheduler: Scheduler, context: LlamaContext, speculation: Speculation | None) -> None:
        self._scheduler = scheduler
        self._context = context
        self._speculation = speculation
        self._ages = ScopeAges()
        self.dirty = False  # whether old cells still have data

    def use(self, scope: bytes | None, now: float) -> None:
        if scope is not None:
            self._ages.use(scope, now)

    def look(self, now: float) -> None:
        """From time to time while there is work: forgets expired scopes."""
        if self._ages.due(now):
            self._forget(now)

    def patience(self) -> float | None:
        """How long to wait for work before tidying up."""
        if (expires := self._ages.expires) is not None:
            return expires - time.monotonic()
        return _TIDY if self.dirty else None

    def tidy(self) -> None:
        """While nothing runs: removes expired caches, and overwrites the data when nothing is left."""
        self._forget(time.monotonic())
        plan = self._scheduler.plan()
        self._context.execute(replace(plan, segments=(), after=()))
        if self._speculation is not None:
            self._speculation.wipe()
        if self.dirty and not self._scheduler.scopes:
            self._context.wipe()
            self.dirty = False

    def _forget(self, now: float) -> None:
        for scope in self._ages.expired(now):
            self._scheduler.forget(scope)
