"""Overwrites a secret with zeros, so that it does not stay in freed memory.

Python's own means cannot change a library's `bytes`, because others may share them. Rule: only the first owner overwrites them.
It just got them from the operating system, a hash or a serializer, and passed them to nothing that keeps them.
"""

from __future__ import annotations

import ctypes

_SHARED = 1  # bytes: CPython shares one object for each value this short


def overwrite(secret: bytes | bytearray) -> None:
    """Zeros in its place."""
    if isinstance(secret, bytearray):
        secret[:] = bytes(len(secret))
    elif len(secret) > _SHARED:
        ctypes.memset(ctypes.c_char_p(secret), 0, len(secret))
