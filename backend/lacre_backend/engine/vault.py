"""Keeps copies of idle caches in this process's memory, sealed with a key of its own.

Rules:
- The key is drawn when the engine starts and never leaves the process. When the engine closes, it goes, and every copy with it.
- A copy opens only for the scope and the adapter that it was made for: both are authenticated with each of its pieces. The
  scheduler finds copies by them too; a fault there gives nobody another one's cache.
- The plain bytes are overwritten as soon as they are sealed or restored.
- Saving and restoring may fail for want of memory, or because llama.cpp refuses. Then the prompt is read again.
- Only the decode thread uses it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import llama_cpp as L
import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from lacre_backend.engine.plan import Restore, Save

PIECE: Final = 2**24  # bytes sealed at a time: far below AES-GCM's limit, and other threads get their turn in between
SPARE: Final = 2**28  # bytes of the machine's memory that stay free: a copy is never worth an engine
_LABEL: Final = b"lacre idle cache\0"
_TAG: Final = 16
_NONCE: Final = 12


Plain = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _SealedCopy:
    """size: of the plain bytes. nonce: of the first piece; the others follow it."""

    size: int
    nonce: int
    pieces: tuple[bytearray, ...]


@dataclass(slots=True)
class VaultCounts:
    """Since the engine started. bytes: that the copies take now. refused: copies not made; lost: copies that did not open."""

    saved: int = 0
    restored: int = 0
    refused: int = 0
    lost: int = 0
    bytes: int = 0


class CacheVault:
    """context: llama.cpp's. most: bytes of all copies. free: tells the bytes of memory that may still be taken."""

    def __init__(self, context: Any, most: int, free: Callable[[], int]) -> None:
        self._context = context
        self._memory = L.llama_get_memory(context)
        self._most = most
        self._free = free
        key = bytearray(os.urandom(32))
        self._key: AESGCM | None = AESGCM(key)
        key[:] = bytes(len(key))  # the cipher has its own
        self._nonce = 0
        self._copies: dict[int, _SealedCopy] = {}
        self.counts = VaultCounts()

    def save(self, step: Save) -> None:
        """Copies a slot's cells. If that fails, there is no copy."""
        size = int(L.llama_state_seq_get_size(self._context, step.slot))
        if self._key is None or self.counts.bytes + size > self._most or self._free() < 2 * size + SPARE:
            self.counts.refused += 1
            return
        try:
            plain = np.empty(size, dtype=np.uint8)
            try:
                if int(L.llama_state_seq_get_data(self._context, _pointer(plain), size, step.slot)) != size:
                    self.counts.refused += 1
                    return
                copy = self._sealed(self._key, plain, step)
            finally:
                plain.fill(0)
        except MemoryError:
            self.counts.refused += 1
            return
        self._copies[step.number] = copy
        self.counts.saved += 1
        self.counts.bytes += sum(map(len, copy.pieces))

    def restore(self, step: Restore) -> bool:
        """Fills the slot, which is empty, with all cells of a copy. False: it failed, and the slot may have some of them."""
        copy = self._copies.get(step.number)
        restored = self._key is not None and copy is not None and self._opened(self._key, copy, step)
        self.counts.restored += restored
        self.counts.lost += not restored
        return restored

    def discard(self, number: int) -> None:
        """Removes a copy, if there is one."""
        copy = self._copies.pop(number, None)
        if copy is not None:
            self.counts.bytes -= sum(map(len, copy.pieces))

    def close(self) -> None:
        """Drops the key and all copies."""
        self._key = None
        self._copies.clear()
        self.counts.bytes = 0

    def _sealed(self, key: AESGCM, plain: Plain, step: Save) -> _SealedCopy:
        nonce, context = self._nonce, _context(step)
        parts = range(0, len(plain), PIECE)
        self._nonce += len(parts)
        pieces = []
        for i, at in enumerate(parts):
            part = plain.data[at : at + PIECE]
            pieces.append(bytearray(len(part) + _TAG))
            key.encrypt_into(_bytes(nonce + i), part, context, pieces[-1])
        return _SealedCopy(len(plain), nonce, tuple(pieces))

    def _opened(self, key: AESGCM, copy: _SealedCopy, step: Restore) -> bool:
        if self._free() < copy.size + SPARE:
            return False
        try:
            plain = np.empty(copy.size, dtype=np.uint8)
        except MemoryError:
            return False
        try:
            for i, piece in enumerate(copy.pieces):
                at = i * PIECE
                key.decrypt_into(_bytes(copy.nonce + i), piece, _context(step), plain.data[at : at + len(piece) - _TAG])
            read = int(L.llama_state_seq_set_data(self._context, _pointer(plain), copy.size, step.slot))
        except InvalidTag:
            return False
        finally:
            plain.fill(0)
        first = int(L.llama_memory_seq_pos_min(self._memory, step.slot))
        last = int(L.llama_memory_seq_pos_max(self._memory, step.slot))
        return (read, first, last) == (copy.size, 0, step.length - 1)


def _context(step: Save | Restore) -> bytes:
    """What a copy is bound to: its scope, its adapter, its number and its length."""
    adapter = b"-" if step.adapter is None else b"+" + step.adapter.encode()
    digest = hashlib.sha256(_LABEL + len(step.scope).to_bytes(8, "big") + step.scope + adapter)
    return digest.digest() + step.number.to_bytes(8, "big") + step.length.to_bytes(8, "big")


def _bytes(number: int) -> bytes:
    """A nonce: each is used once with the key, which seals the pieces of one process."""
    return number.to_bytes(_NONCE, "big")


def _pointer(array: Plain) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
