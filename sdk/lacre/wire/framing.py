"""The outline of a chunked OHTTP body: where each sealed chunk begins and ends (chunked OHTTP sections 4 and 5).

    { varint(len) ‖ sealed chunk }*  varint(0) ‖ sealed final chunk, to the end of the body

This file never sees plaintext or a key. It splits bodies and opens nothing, so a relay may use it. Rules:

- A length is checked as soon as it is read; a chunk above the limit is refused before any of it is kept.
- A non-final chunk holds at least one byte of plaintext.
- The final chunk has no length of its own, so it is known only once the body has ended.
"""

from __future__ import annotations

from typing import Final

from lacre import errors
from lacre.wire import varint

# Every AEAD of the profile appends a tag of this many bytes (RFC 9180 section 7.3).
TAG: Final = 16
# Chunked OHTTP requires every receiver to support this size, so no sender needs to exceed it.
MAX_CHUNK: Final = 16384
MAX_SEALED_CHUNK: Final = MAX_CHUNK + TAG


class Deframer:
    """Splits a body that arrives in pieces into sealed chunks.

    max_chunks: how many chunks the body may have, including the final one; None: no limit.
    """

    __slots__ = ("_count", "_in_final", "_max_chunks", "_rest")

    def __init__(self, max_chunks: int | None = None) -> None:
        self._rest = b""
        self._in_final = False
        self._count = 1  # the final chunk
        self._max_chunks = max_chunks

    def feed(self, data: bytes | memoryview) -> list[memoryview]:
        """The non-final sealed chunks that `data` completes, as views into it."""
        view = memoryview(b"".join((self._rest, data)) if self._rest else data)
        chunks = []
        position = 0
        while not self._in_final and (prefix := varint.decode(view, position)) is not None:
            length, start = prefix
            if length == 0:
                self._in_final = True
                position = start
                break
            _check_length(length)
            end = start + length
            if end > len(view):
                break
            chunks.append(view[start:end])
            position = end
        self._count += len(chunks)
        if self._max_chunks is not None and self._count > self._max_chunks:
            raise errors.MessageTooLarge("the message has too many chunks; send fuller ones")
        if self._in_final and len(view) - position > MAX_SEALED_CHUNK:
            raise errors.MessageTooLarge(f"the final chunk holds more than {MAX_CHUNK} bytes")
        # At most one chunk and its length prefix: everything before it was cut off above.
        self._rest = bytes(view[position:])
        return chunks

    def close(self) -> bytes:
        """The sealed final chunk, after the body has ended. Only opening it shows whether it really is final."""
        if not self._in_final or len(self._rest) < TAG:
            raise errors.TruncatedStream("the body ended before its final chunk, so the received part is not the whole message")
        return self._rest


def _check_length(length: int) -> None:
    if length > MAX_SEALED_CHUNK:
        raise errors.MessageTooLarge(f"a chunk holds more than {MAX_CHUNK} bytes")
    if length <= TAG:
        raise errors.InvalidMessage("an empty chunk before the final one")
