"""Finds what a task can reuse: the cells of its own slot, of another one, or a copy (`saved.py`).

Rules:
- Pure. The scope and the adapter alone decide, and for the choices of one request their group.
- A copy is restored only if it has more than the live caches have. Restoring takes about as long as copying between slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lacre_backend.engine.placement import distances
from lacre_backend.engine.saved import MIN_SAVED, SavedCache, SavedCaches
from lacre_backend.engine.slots import CacheSlot, QueuedTask, cost

MIN_REUSE: Final = 16  # tokens; computing a shorter common prefix (every chat's first words) is faster than finding it
WORTH: Final = 16  # a whole copy is restored if this many times the common tokens are at least its length
MIN_COPY: Final = 128  # tokens; below it, copying between slots takes longer than computing. Choices copy any shared prefix


@dataclass(frozen=True, slots=True)
class FoundCells:
    """Where a task goes, and how many of its tokens are cached. source: the slot to copy from. saved: the copy to restore. None
    of both: `slot` has them.
    """

    slot: CacheSlot
    common: int = 0
    source: CacheSlot | None = None
    saved: SavedCache | None = None

    @property
    def kept(self) -> int:
        """Cells of the slot that the task uses."""
        return self.common if self.source is None and self.saved is None else 0


class Reuse:
    """slots, saved: the scheduler's. cuttable: as in `EngineLimits`. compared: prefixes, since the scheduler set it."""

    def __init__(self, slots: Sequence[CacheSlot], saved: SavedCaches, *, cuttable: bool) -> None:
        self._slots = slots
        self._saved = saved
        self._cuttable = cuttable
        self.compared = 0

    def best(self, task: QueuedTask) -> FoundCells:
        """The slot to use, with the longest cached beginning: its own, another slot's, or that of a copy."""
        idle = [slot for slot in self._slots if slot.idle]
        common = {slot.index: self._common(slot, task) for slot in self._slots}
        best = max(idle, key=lambda slot: (common[slot.index], slot.used))
        source = max(self._slots, key=lambda slot: common[slot.index])
        sibling = task.choices is not None and source.choices is task.choices  # then none of the prompt is computed again
        least, gain = (1, 0) if sibling else (MIN_REUSE, MIN_COPY)
        saved, length = (None, 0) if sibling else self._best_saved(task)
        more = length - MIN_SAVED if saved is not None else 0  # a live cache with more than so many tokens is as good
        if common[best.index] >= max(least, common[source.index] - gain, more):
            return FoundCells(best, common[best.index])
        far = distances([None if slot.idle else slot.adapter == task.adapter for slot in self._slots])
        fresh = min(idle, key=lambda slot: cost(slot, *far[slot.index]))
        if common[source.index] >= max(gain, 1, more) and source is not fresh:
            return FoundCells(fresh, common[source.index], source)
        return FoundCells(fresh, length, saved=saved)

    def _best_saved(self, task: QueuedTask) -> tuple[SavedCache | None, int]:
        """The copy with the longest beginning in common, if it is worth restoring."""
        if task.scope is None or not len(self._saved):
            return None, 0
        saved, length = self._saved.best((task.scope, task.adapter), task.tokens, len(task.tokens) - 1)
        worth = saved is not None and length >= max(MIN_SAVED, saved.length // WORTH)
        return (saved, length) if worth else (None, 0)

    def _common(self, slot: CacheSlot, task: QueuedTask) -> int:
        """The length of the common prefix. Without a sibling's logits it leaves at least the last token."""
        if slot.restored:  # by this plan, which may fail
            return 0
        if (ours := self.of_choices(slot, task)) > 0:
            return ours
        if slot.adapter != task.adapter:  # its cells hold what other weights computed
            return 0
        if task.scope is None or slot.scope != task.scope or not self._cuttable:
            return 0
        limit = min(len(task.tokens) - 1, slot.length)
        self.compared += limit > 0
        return task.tokens.common(slot.tokens, limit)

    def of_choices(self, slot: CacheSlot, task: QueuedTask) -> int:
        """How many tokens of its request's prompt a slot has for the task. A state that cannot be cut must end exactly
        there.
        """
        choices = task.choices
        if choices is None or slot.choices is not choices:
            return 0
        if not self._cuttable:
            return choices.length if slot.length == choices.length else 0
        return min(slot.length, choices.length)
