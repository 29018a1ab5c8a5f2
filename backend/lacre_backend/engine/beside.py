"""What the decode thread computes beside the slots, in contexts of their own: tasks with a lens, and tasks with images."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from lacre_backend.engine.context import Compute
from lacre_backend.engine.delivery import Outbox
from lacre_backend.engine.image_turns import ImageTurns
from lacre_backend.engine.job import EngineJob
from lacre_backend.engine.lens import PIECE, Lenses, LensTask
from lacre_backend.engine.model import Model
from lacre_backend.engine.projector import Projector
from lacre_backend.engine.protocol import EngineError


class Beside:
    """Both kinds of one engine."""

    def __init__(
        self,
        model: Model,
        compute: Compute,
        adapters: Mapping[str, Any],
        outbox: Outbox,
        lock: threading.Condition,
        *,
        projector: Projector | None,
    ) -> None:
        """As `Lenses` and `ImageTurns`. projector: None: no task has images."""
        self._outbox = outbox
        self._lenses = Lenses(model, compute, adapters, outbox, lock)
        self._images = None if projector is None else ImageTurns(projector, adapters, outbox, lock)

    @property
    def busy(self) -> bool:
        return self._lenses.busy or (self._images is not None and self._images.busy)

    @property
    def ids(self) -> set[str]:
        """Of unfinished tasks."""
        return {*self._lenses.tasks, *(() if self._images is None else self._images.jobs)}

    def enter(self, lensed: Sequence[LensTask], jobs: Sequence[EngineJob]) -> None:
        """Called by any thread that holds the lock, with unused ids. jobs: those with images."""
        self._lenses.enter(lensed)
        if self._images is not None:
            self._images.enter(jobs)

    def cancel(self, task_id: str) -> None:
        """Called by any thread that holds the lock."""
        if lensed := self._lenses.tasks.get(task_id):
            lensed.cancelled = True
        elif self._images is not None and (job := self._images.jobs.get(task_id)):
            job.cancelled = True

    def step(self, share: int | None) -> None:
        """share: tokens that a prompt may have of a step while the slots are busy; None: they are not."""
        if self._lenses.busy:
            self._lenses.step(PIECE if share is None else share)
        if self._images is not None and self._images.busy:
            self._images.step(share)
        self._outbox.flush()

    def give_up(self, error: EngineError | None) -> None:
        """The thread ends. error: None: the engine was closed."""
        self._lenses.give_up(error)
        if self._images is not None:
            self._images.give_up(error)
