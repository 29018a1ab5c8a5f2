"""QUIC's variable-length integers (RFC 9000 section 16), the only length encoding of the wire.

Encoding is always minimal. Decoding accepts longer forms: RFC 9000 allows them, and chunk lengths are not authenticated.
"""

from __future__ import annotations

from typing import Final

from lacre import errors

MAX: Final = (1 << 62) - 1


def encode(value: int) -> bytes:
    """1, 2, 4 or 8 bytes, whichever is the shortest that holds `value` (0 to 2^62-1)."""
    if 0 <= value < 1 << 6:
        return value.to_bytes(1, "big")
    if 0 <= value < 1 << 14:
        return (value | 0x4000).to_bytes(2, "big")
    if 0 <= value < 1 << 30:
        return (value | 0x8000_0000).to_bytes(4, "big")
    if 0 <= value <= MAX:
        return (value | 0xC000_0000_0000_0000).to_bytes(8, "big")
    raise errors.UsageError("a variable-length integer holds 0 to 2^62-1")


def decode(data: bytes | bytearray | memoryview, start: int) -> tuple[int, int] | None:
    """The integer at `start` and the offset after it; None when `data` ends inside it."""
    if start >= len(data):
        return None
    first = data[start]
    if first < 0x40:  # most lengths of a streamed answer are this short
        return first, start + 1
    end = start + (1 << (first >> 6))
    if end > len(data):
        return None
    value = int.from_bytes(data[start:end], "big")
    return value & ((1 << (8 * (end - start) - 2)) - 1), end
