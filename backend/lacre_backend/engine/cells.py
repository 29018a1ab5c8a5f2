"""Counts the cells of llama.cpp's cache that each slot holds. It keeps counts, never lists of cells.

Rules:
- Cells are shared only by copying a prefix, in a unified cache. So one number per pair of slots is enough: the number of equal
  cells at their beginnings. Cutting, growing and copying change only these numbers.
- An operation's cost depends on the number of slots, never on the number of cells.
"""

from __future__ import annotations

from collections.abc import Sequence


class Cells:
    """The cell counts of all slots. slots: their number. total: all cells. unified: whether a copy shares its cells; otherwise
    it takes new ones.
    """

    __slots__ = ("_shared", "_total", "free", "held", "unified")

    def __init__(self, slots: int, total: int, *, unified: bool) -> None:
        self.free = self._total = total
        self.held = [0] * slots
        self.unified = unified
        self._shared = [[0] * slots for _ in range(slots)]  # by pair of slots: how many of their first cells are the same

    def grow(self, slot: int, n: int) -> None:
        """Adds `n` new cells at the end of a slot. There must be as many free ones."""
        self.held[slot] += n
        self.free -= n

    def cut(self, slot: int, keep: int) -> None:
        """Releases all but the first `keep` cells. Those that no other slot holds become free."""
        shared = self._shared[slot]
        self.free += max(0, self.held[slot] - max(keep, *shared)) if self.unified else max(0, self.held[slot] - keep)
        self.held[slot] = min(self.held[slot], keep)
        if self.unified:
            for other in range(len(shared)):
                shared[other] = self._shared[other][slot] = min(shared[other], keep)

    def copy(self, source: int, target: int, keep: int) -> None:
        """Copies the first `keep` cells of `source` into `target`, which is empty."""
        if not self.unified:
            self.grow(target, keep)
            return
        self.held[target] = keep
        for other, shared in enumerate(self._shared[source]):
            common = keep if other == source else min(keep, shared)
            if other != target:
                self._shared[target][other] = self._shared[other][target] = common

    def freeable(self, lengths: Sequence[int]) -> int:
        """How many cells would become free if each slot kept only its first cells, as many as `lengths` says."""
        return self._total - self.free - self._used(lengths)

    def _used(self, lengths: Sequence[int]) -> int:
        """The number of distinct cells in the prefixes of these lengths. Slots share only prefixes. So a slot's new cells are
        those behind the longest prefix that it shares with an earlier slot.
        """
        if not self.unified:
            return sum(lengths)
        used = 0
        for slot, length in enumerate(lengths):
            if length:
                shared = max(map(min, self._shared[slot][:slot], lengths), default=0)
                used += max(0, length - shared)
        return used
