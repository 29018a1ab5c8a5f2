"""The growing part of a log's tree: the rows of tiles that are not full, and entries that are not in a full bundle.

No I/O. A row may be longer than a tile: hashes wait here until the tiles are written again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from lacre.evidence import merkle
from lacre.evidence.merkle import Frontier
from lacre_gateway.audit import tiles


@dataclass(frozen=True, slots=True)
class Savepoint:
    """A state to go back to."""

    frontier: Frontier
    lengths: tuple[int, ...]
    entries: int


class Edge:
    """rows[level]: the hashes of that tile level from index first(level) on, which begins a tile. entries: likewise."""

    def __init__(self) -> None:
        self._frontier = Frontier()
        self._starts: list[int] = []
        self.rows: list[list[bytes]] = []
        self.entries: list[bytes] = []

    @classmethod
    def restore(cls, size: int, rows: Sequence[Sequence[bytes]], entries: Sequence[bytes]) -> Edge:
        """From the partial tiles of a tree of this size, one for each level; empty for a level without one."""
        edge = cls()
        edge.rows, edge.entries = [list(row) for row in rows], list(entries)
        edge._starts = [(size >> tiles.HEIGHT * level) // tiles.WIDTH * tiles.WIDTH for level in range(len(rows))]
        nodes = [
            merkle.subtree(begin, end, partial(_row_node, row))
            for row in reversed(edge.rows)
            for begin, end in _powers(len(row))
        ]
        edge._frontier = Frontier(size, nodes)
        return edge

    @property
    def size(self) -> int:
        return self._frontier.size

    def root(self) -> bytes:
        return self._frontier.root()

    def first(self, level: int | None) -> int:
        """The index of the first hash of a row, or of the first entry."""
        row = 0 if level is None else level
        return self._starts[row] if self._starts else 0

    def nodes(self) -> Iterator[tuple[int, int, bytes]]:
        return self._frontier.nodes()

    def append(self, entry: bytes) -> list[tuple[int, int, bytes]]:
        """Adds an entry; returns the nodes that it completes."""
        self.entries.append(entry)
        completed = self._frontier.grow(merkle.leaf_hash(entry))
        for height, _, node in completed:
            if height % tiles.HEIGHT == 0:
                level = height // tiles.HEIGHT
                if level == len(self.rows):
                    self.rows.append([])
                    self._starts.append(0)
                self.rows[level].append(node)
        return completed

    def mark(self) -> Savepoint:
        return Savepoint(self._frontier.copy(), tuple(map(len, self.rows)), len(self.entries))

    def reset(self, mark: Savepoint) -> None:
        """Drops everything added after the mark. Not across a `drop_full`."""
        self._frontier = mark.frontier.copy()
        del self.entries[mark.entries :]
        del self.rows[len(mark.lengths) :]
        del self._starts[len(mark.lengths) :]
        for row, length in zip(self.rows, mark.lengths, strict=True):
            del row[length:]

    def drop_full(self, size: int) -> None:
        """Drops the tiles and bundles that were full in a tree of this size: they are on disk."""
        for level, row in enumerate(self.rows):
            full = (size >> tiles.HEIGHT * level) // tiles.WIDTH * tiles.WIDTH - self._starts[level]
            del row[:full]
            if level == 0:
                del self.entries[:full]
            self._starts[level] += full

    def hash(self, level: int, index: int) -> bytes | None:
        """The hash at a place of a tile level, if a row here has it."""
        at = index - self.first(level)
        return self.rows[level][at] if level < len(self.rows) and 0 <= at < len(self.rows[level]) else None


def _row_node(row: Sequence[bytes], height: int, index: int) -> bytes:
    if height == 0:
        return row[index]
    return merkle.node_hash(_row_node(row, height - 1, 2 * index), _row_node(row, height - 1, 2 * index + 1))


def _powers(length: int) -> Iterator[tuple[int, int]]:
    """The maximal complete subtrees of a partial tile, the largest first, as [begin, end)."""
    begin = 0
    for bit in range(tiles.HEIGHT - 1, -1, -1):
        if length >> bit & 1:
            yield begin, begin + (1 << bit)
            begin += 1 << bit
