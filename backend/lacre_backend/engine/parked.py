"""Answers that are computed, except that their next token waits for its mask. Each is set aside, and the others continue.

Rules:
- Only the decode thread uses this. It is woken when a mask is ready.
"""

from __future__ import annotations

import threading
from typing import Final

from lacre_backend.engine.context import Logits
from lacre_backend.engine.job import EngineJob

LOOK: Final = 0.05  # seconds between deadline checks while all tasks wait for masks


class Parked:
    """The jobs that wait, by the task's id, each with a copy of the logits that its next token is chosen from."""

    def __init__(self, changed: threading.Condition) -> None:
        """changed: what the decode thread waits on."""
        self._changed = changed
        self._waiting: dict[str, tuple[EngineJob, Logits]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, task_id: object) -> bool:
        return task_id in self._waiting

    def put(self, job: EngineJob | None, logits: Logits) -> None:
        """None, and jobs without a grammar, wait for nothing."""
        if job is not None and job.sampler.constraint is not None:
            job.sampler.constraint.waiting = self._wake
            self._waiting[job.task.id] = job, logits.copy()

    def each(self) -> list[tuple[EngineJob, Logits]]:
        return list(self._waiting.values())

    def drop(self, task_id: str) -> None:
        """It waits no longer, if it did. Nothing of its answer is kept here."""
        self._waiting.pop(task_id, None)

    @property
    def all_late(self) -> bool:
        return all(not job.sampler.ready(0) for job, _ in self._waiting.values())

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()
