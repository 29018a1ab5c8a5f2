"""Which idle caches were copied out of their slots, and which of them a task can use.

Rules:
- Pure: numbers stand for the copies, whose bytes are in `vault.py`. Cells are counts.
- A copy is found by its own scope and adapter alone. Each pair of them has an index of its own.
- The index holds digests of the text (`tokens.py`), never its tokens. So a common beginning is a number of whole blocks.
- Adding and finding a copy cost as much among thousands of copies as among few: the index has each digest of each copy.
- A copy that a longer one begins with is removed. Beyond `most` cells the copies that were unused for longest are removed.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from lacre_backend.engine.tokens import BLOCK, Tokens

# Tokens of a cache that is worth copying: below it, computing them again takes about as long. At least one block
MIN_SAVED: Final = 2 * BLOCK

Owner = tuple[bytes, str | None]


@dataclass(frozen=True, slots=True)
class SavedCache:
    """A copy of `length` cells. owner: scope and adapter. digests: of its whole blocks."""

    number: int
    owner: Owner = field(repr=False)
    length: int
    digests: tuple[bytes, ...] = field(repr=False)


class _Index:
    """The copies of one owner. begins: those that begin with the text of a digest. ends: the one that ends with it."""

    __slots__ = ("begins", "ends")

    def __init__(self) -> None:
        self.begins: dict[bytes, dict[int, None]] = {}
        self.ends: dict[bytes, int] = {}


class SavedCaches:
    """The copies, from the one that was unused for longest on. most: cells of all."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._caches: OrderedDict[int, SavedCache] = OrderedDict()
        self._owners: dict[Owner, _Index] = {}
        self.cells = 0

    def __len__(self) -> int:
        return len(self._caches)

    def __contains__(self, number: int) -> bool:
        return number in self._caches

    def add(self, owner: Owner, tokens: Tokens, length: int) -> tuple[int | None, list[int]]:
        """The number of a new copy of these cells, and the numbers of copies to remove for it.

        None: it is too short or too large, or a copy has all of it.
        """
        digests = tokens.digests(length)
        if length < MIN_SAVED or length > self._most or not digests:
            return None, []
        index, removed = self._owners.get(owner), list[int]()
        if index is not None:
            if longer := index.begins.get(digests[-1]):
                self._caches.move_to_end(next(reversed(longer)))
                return None, []
            removed = [index.ends[digest] for digest in digests if digest in index.ends]
            for number in removed:
                self.take(number)
        self._count += 1
        self._put(SavedCache(self._count, owner, length, digests))
        return self._count, removed + self._shrink()

    def best(self, owner: Owner, tokens: Tokens, limit: int) -> tuple[SavedCache | None, int]:
        """The copy with the longest beginning in common, and how many tokens that is: at most `limit`, in whole blocks."""
        index, digests = self._owners.get(owner), tokens.digests(limit)
        if index is None or not digests or digests[0] not in index.begins:
            return None, 0
        known, unknown = 1, len(digests) + 1  # a copy that has one of a text's digests has all before it
        while unknown - known > 1:
            middle = (known + unknown) // 2
            known, unknown = (middle, unknown) if digests[middle - 1] in index.begins else (known, middle)
        return self._caches[next(reversed(index.begins[digests[known - 1]]))], known * BLOCK

    def take(self, number: int) -> SavedCache:
        """Removes a copy."""
        saved = self._caches.pop(number)
        self.cells -= saved.length
        index = self._owners[saved.owner]
        for digest in saved.digests:
            del index.begins[digest][number]
            if not index.begins[digest]:
                del index.begins[digest]
        if index.ends.get(saved.digests[-1]) == number:
            del index.ends[saved.digests[-1]]
        if not index.begins:
            del self._owners[saved.owner]
        return saved

    def put_back(self, saved: SavedCache) -> list[int]:
        """Adds a copy that was taken, as the one used last. Returns the numbers of copies to remove for it."""
        self._put(saved)
        return self._shrink()

    def forget(self, scope: bytes) -> list[int]:
        """Removes all copies of a scope. Returns their numbers."""
        numbers = [number for number, saved in self._caches.items() if saved.owner[0] == scope]
        for number in numbers:
            self.take(number)
        return numbers

    def _put(self, saved: SavedCache) -> None:
        self._caches[saved.number] = saved
        self.cells += saved.length
        index = self._owners.setdefault(saved.owner, _Index())
        for digest in saved.digests:
            index.begins.setdefault(digest, {})[saved.number] = None
        index.ends[saved.digests[-1]] = saved.number

    def _shrink(self) -> list[int]:
        """Removes the copies that were unused for longest, until the others fit. The newest always fits."""
        removed = []
        while self.cells > self._most:
            removed.append(next(iter(self._caches)))
            self.take(removed[-1])
        return removed
