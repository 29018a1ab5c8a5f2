"""Sealing and opening the chunks of a message, for requests and responses (chunked OHTTP section 6).

Rules:
- Only the last chunk is sealed with the AAD `final`, so cutting, extending or joining messages is noticed.
- The nonce counts the chunks, so omitting, repeating or swapping them is noticed.
- After an error nothing more opens: the bytes after a broken chunk are not a message.
"""

from __future__ import annotations

from io import BytesIO
from typing import Final

from lacre import errors
from lacre.wire import varint
from lacre.wire.framing import MAX_CHUNK, TAG, Deframer
from lacre.wire.hpke import SequencedAead

_FINAL: Final = b"final"
_FULL_PREFIX: Final = varint.encode(MAX_CHUNK + TAG)


def seal_chunks(aead: SequencedAead, plaintext: bytes, *, final: bool, prefix: bytes = b"") -> bytes:
    """`prefix`, then `plaintext` in as few chunks as hold it; with `final`, the last of them is the final chunk.

    Without `final`, an empty plaintext makes no chunk: only the final chunk may be empty.
    """
    source = memoryview(plaintext)
    size = len(source)
    # The final chunk may be full or empty; without `final`, an empty rest makes no chunk.
    full, rest = divmod(size, MAX_CHUNK)
    if final and full and not rest:
        full, rest = full - 1, MAX_CHUNK
    last_prefix = varint.encode(0) if final else varint.encode(rest + TAG) if rest else b""
    last = len(last_prefix) + rest + TAG if last_prefix else 0
    # Each chunk is encrypted into its place, and `getvalue` returns the buffer itself: nothing is copied.
    buffer = BytesIO(bytes(len(prefix) + full * (len(_FULL_PREFIX) + MAX_CHUNK + TAG) + last))
    with buffer.getbuffer() as out:
        out[: len(prefix)] = prefix
        position = len(prefix)
        for start in range(0, full * MAX_CHUNK, MAX_CHUNK):
            body = position + len(_FULL_PREFIX)
            out[position:body] = _FULL_PREFIX
            position = body + MAX_CHUNK + TAG
            aead.seal_into(source[start : start + MAX_CHUNK], b"", out[body:position])
        if last:
            body = position + len(last_prefix)
            out[position:body] = last_prefix
            aead.seal_into(source[full * MAX_CHUNK :], _FINAL if final else b"", out[body:])
    return buffer.getvalue()


class ChunkOpener:
    """Opens the chunks of a message that arrives in pieces of any size."""

    __slots__ = ("_aead", "_deframer")

    def __init__(self, aead: SequencedAead, max_chunks: int | None = None) -> None:
        self._aead: SequencedAead | None = aead
        self._deframer = Deframer(max_chunks)

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """The plaintexts of the chunks that `data` completes. None of it is the whole message until `close` returns."""
        aead = self._take()
        pieces = [aead.open(chunk) for chunk in self._deframer.feed(data)]
        self._aead = aead  # only here: after an error above, the opener stays closed
        return pieces

    def close(self) -> list[bytes]:
        """Opens the final chunk, after the body has ended. Raises TruncatedStream or OpenError if it is missing."""
        final = self._take().open(self._deframer.close(), _FINAL)
        return [final] if final else []

    def open_whole(self, data: bytes | memoryview) -> bytes:
        """The plaintext of a complete message: `feed` and `close` in one, without a buffer for each chunk."""
        aead = self._take()
        chunks: list[bytes | memoryview] = [*self._deframer.feed(data), self._deframer.close()]
        last = len(chunks) - 1
        buffer = BytesIO(bytes(sum(map(len, chunks)) - TAG * len(chunks)))
        with buffer.getbuffer() as out:
            position = 0
            for number, chunk in enumerate(chunks):
                end = position + len(chunk) - TAG
                aead.open_into(chunk, _FINAL if number == last else b"", out[position:end])
                position = end
        return buffer.getvalue()

    def _take(self) -> SequencedAead:
        if self._aead is None:
            raise errors.AlreadyUsedError("this message was closed or did not open; there is nothing more to read")
        aead, self._aead = self._aead, None
        return aead
