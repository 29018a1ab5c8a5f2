"""Puts zeros where a secret was, so that it does not linger in freed memory.

What a library hands out as `bytes` cannot be changed by Python's own means: others may share it. Rule: only its first owner
overwrites it, one who just got it from the operating system, a hash or a serializer and passed it to nobody that keeps it.
"""

from __future__ import annotations

import ctypes

_SHARED = 1  # bytes: CPython keeps one object for each value as short as this


def overwrite(secret: bytes | bytearray) -> None:
    """Zeros in its place."""
    if isinstance(secret, bytearray):
        secret[:] = bytes(len(secret))
    elif len(secret) > _SHARED:
        ctypes.memset(ctypes.c_char_p(secret), 0, len(secret))
