"""How many cells of llama.cpp's cache each slot holds: counts, never lists of cells.

Rules
- A cell is shared by copying a beginning only, in a unified cache. So for two slots one number says it all: how many cells at
  their beginnings are the same. Cutting, growing and copying change these numbers and nothing else.
- What an operation costs depends on the number of slots, never on the number of cells.
"""

from __future__ import annotations

from collections.abc import Sequence


class Cells:
    """slots: how many there are. total: cells of all. unified: whether a copy shares its cells; otherwise it takes new ones."""

    __slots__ = ("_shared", "_total", "free", "held", "unified")

    def __init__(self, slots: int, total: int, *, unified: bool) -> None:
        self.free = self._total = total
        self.held = [0] * slots
        self.unified = unified
        self._shared = [[0] * slots for _ in range(slots)]  # by two slots: how many of their first cells are the same

    def grow(self, slot: int, n: int) -> None:
        """`n` new cells at the end of a slot. There must be so many free ones."""
        self.held[slot] += n
        self.free -= n

    def cut(self, slot: int, keep: int) -> None:
        """Let go of all but the first `keep` cells; those that no other slot holds become free."""
        shared = self._shared[slot]
        self.free += max(0, self.held[slot] - max(keep, *shared)) if self.unified else max(0, self.held[slot] - keep)
        self.held[slot] = min(self.held[slot], keep)
        if self.unified:
            for other in range(len(shared)):
                shared[other] = self._shared[other][slot] = min(shared[other], keep)

    def copy(self, source: int, target: int, keep: int) -> None:
        """The first `keep` cells of `source` into `target`, which holds none."""
        if not self.unified:
            self.grow(target, keep)
            return
        self.held[target] = keep
        for other, shared in enumerate(self._shared[source]):
            common = keep if other == source else min(keep, shared)
            if other != target:
                self._shared[target][other] = self._shared[other][target] = common

    def freeable(self, lengths: Sequence[int]) -> int:
        """How many cells would become free if each slot let go of all but the first so many."""
        return self._total - self.free - self._used(lengths)

    def _used(self, lengths: Sequence[int]) -> int:
        """Different cells in the beginnings of these lengths. What slots share are their beginnings: a slot's cells that no
        slot before it has are those behind the longest beginning that it shares with one of them.
        """
        if not self.unified:
            return sum(lengths)
        used = 0
        for slot, length in enumerate(lengths):
            if length:
                shared = max(map(min, self._shared[slot][:slot], lengths), default=0)
                used += max(0, length - shared)
        return used
