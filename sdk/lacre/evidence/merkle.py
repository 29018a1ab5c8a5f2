"""The Merkle tree of RFC 6962 over SHA-256: hashing, growing, and making and verifying proofs.

Rules:
- No I/O. A *node* (level, index) is the hash of the complete subtree over the leaves [index · 2^level, (index + 1) · 2^level).
- Proofs are made from nodes that the caller looks up, and verified from their bytes alone.
- A proof says that these bytes are in a tree. The checkpoint's signature says whose tree it is (`lacre.evidence.checkpoints`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from lacre.errors import InvalidProof

HASH_BYTES: Final = 32
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()
# No real tree has more leaves. The bound limits the length of a proof, and of the header that carries it.
MAX_LEAVES: Final = 2**40
MAX_PATH: Final = 40  # hashes of an inclusion proof in the largest tree

Node = Callable[[int, int], bytes]
Path = tuple[bytes, ...]


def leaf_hash(entry: bytes) -> bytes:
    """RFC 6962 section 2.1: the prefix keeps a leaf from being taken for an inner node."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def subtree(begin: int, end: int, node: Node) -> bytes:
    """The hash of the leaves [begin, end), where `begin` is a split point of the tree as RFC 6962 section 2.1 splits it."""
    size = end - begin
    if size & (size - 1) == 0:
        return node(size.bit_length() - 1, begin // size)
    middle = begin + _split(size)
    return node_hash(subtree(begin, middle, node), subtree(middle, end, node))


def inclusion_proof(index: int, size: int, node: Node) -> Path:
    """PATH(index, D[size]) of RFC 6962 section 2.1.1: from the leaf's sibling up to the root's child."""
    if not 0 <= index < size:
        raise ValueError("no such leaf in a tree of this size")
    path: list[bytes] = []
    begin, end = 0, size
    while end - begin > 1:
        level = (end - begin - 1).bit_length() - 1  # as `_split`; the left side is complete
        middle = begin + (1 << level)
        if index < middle:
            path.append(subtree(middle, end, node))
            end = middle
        else:
            path.append(node(level, begin >> level))
            begin = middle
    return tuple(reversed(path))


def consistency_proof(old: int, new: int, node: Node) -> Path:
    """PROOF(old, D[new]) of RFC 6962 section 2.1.2; empty for a tree and itself, or the empty tree."""
    if not 0 <= old <= new:
        raise ValueError("the older tree must be the smaller one")
    if old in (0, new):
        return ()
    path: list[bytes] = []
    begin, end, whole = 0, new, True
    while old != end:
        middle = begin + _split(end - begin)
        if old <= middle:
            path.append(subtree(middle, end, node))
            end = middle
        else:
            path.append(subtree(begin, middle, node))
            begin, whole = middle, False
    if not whole:
        path.append(subtree(begin, end, node))
    return tuple(reversed(path))


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """RFC 9162 section 2.1.3.2. leaf: its hash. Raises InvalidProof."""
    if not 0 <= index < size <= MAX_LEAVES:
        raise InvalidProof("the inclusion proof is for a leaf outside the tree")
    place, last, node = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            raise InvalidProof("the inclusion proof is too long")
        if place & 1 or place == last:
            node = node_hash(sibling, node)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        place, last = place >> 1, last >> 1
    if last != 0 or node != root:
        raise InvalidProof("the inclusion proof does not lead from the entry to the root")


def verify_consistency(old: int, old_root: bytes, new: int, new_root: bytes, path: Sequence[bytes]) -> None:
    """Checks that the tree of `old` leaves is the beginning of the tree of `new` leaves (RFC 9162 section 2.1.4.2).

    Raises InvalidProof.
    """
    if not 0 <= old <= new <= MAX_LEAVES:
        raise InvalidProof("the consistency proof goes from a tree to a smaller one")
    if old in (0, new):
        if path or (old == new and old_root != new_root) or (old == 0 and old_root != EMPTY_ROOT):
            raise InvalidProof("two trees of the same size differ, or have a proof and need none")
        return
    place, last = old - 1, new - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    steps = iter(path)
    # If the older tree is a complete subtree, its root is the first node, and the proof omits it.
    first = old_root if old & (old - 1) == 0 else _next(steps)
    older = newer = first
    for sibling in steps:
        if last == 0:
            raise InvalidProof("the consistency proof is too long")
        if place & 1 or place == last:
            older, newer = node_hash(sibling, older), node_hash(sibling, newer)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            newer = node_hash(newer, sibling)
        place, last = place >> 1, last >> 1
    if last != 0 or older != old_root or newer != new_root:
        raise InvalidProof("the older tree is not the beginning of the newer one")


class Frontier:
    """A tree that only grows, stored as its maximal complete subtrees: enough to add leaves and compute the root.

    `grow` returns the nodes that each leaf completes, the leaf itself first.
    """

    def __init__(self, size: int = 0, nodes: Sequence[bytes] = ()) -> None:
        """nodes: the roots of the complete subtrees that `size` falls into, the largest first."""
        self.size = size
        self._nodes = list(nodes)

    def copy(self) -> Frontier:
        return Frontier(self.size, self._nodes)

    def grow(self, leaf: bytes) -> list[tuple[int, int, bytes]]:
        """Adds a leaf's hash; returns the nodes that it completes, as (level, index, hash)."""
        level, index, node = 0, self.size, leaf
        completed = [(level, index, node)]
        while index & 1:
            level, index, node = level + 1, index >> 1, node_hash(self._nodes.pop(), node)
            completed.append((level, index, node))
        self._nodes.append(node)
        self.size += 1
        return completed

    def nodes(self) -> Iterator[tuple[int, int, bytes]]:
        """The complete subtrees, the largest first, as (level, index, hash)."""
        levels = (level for level in range(self.size.bit_length() - 1, -1, -1) if self.size >> level & 1)
        for level, node in zip(levels, self._nodes, strict=True):
            yield level, (self.size >> level) - 1, node

    def root(self) -> bytes:
        if not self._nodes:
            return EMPTY_ROOT
        node = self._nodes[-1]
        for left in reversed(self._nodes[:-1]):
            node = node_hash(left, node)
        return node


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << (size - 1).bit_length() - 1


def _next(steps: Iterator[bytes]) -> bytes:
    try:
        return next(steps)
    except StopIteration:
        raise InvalidProof("the consistency proof is too short") from None
