"""A response as the plaintexts of its records: where each begins and ends, and how it is padded.

Rules of the shape `pad`:
- No length depends on what a token says. The records of an event stream hold a whole number of units (`lacre.wire.padding`).
- They are padded with comment lines, which every reader of event streams ignores (WHATWG HTML section 9.2.6).
- No record is smaller than the largest before it, up to a limit. With logprobs an event is longer than a unit, and otherwise
  its token would decide how much longer.
- A comment never breaks a line: an unfinished line waits for its end. A line longer than a record leaves in whole units of its
  own.
- Any other body leaves in full records, and its total is padded to a bucket, with zeros after the message (RFC 9292 section
  3.8). Its end is sealed once, with the trailers, when the body is complete.
- The last piece of the body and the trailers share the last record. So a client that opened the end of the text has opened the
  final chunk.

This does not hide how many records there are, and when each leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from lacre.wire import bhttp, varint
from lacre.wire.framing import MAX_CHUNK
from lacre.wire.padding import UNIT, Shape, bucket, whole_units

Headers = Sequence[tuple[str, str]]

# The last record of a stream carries a receipt of some 500 bytes, whose digits must not decide between one unit and two.
END: Final = 2 * UNIT
# An event with 20 logprobs fits into a record of this size. The limit keeps one large event (a whole tool call) from making all
# later ones as large.
LARGEST_FLOOR: Final = 8 * UNIT

_WITHOUT_CONTENT: Final = (204, 205, 304)  # RFC 9110; 204 tells readers of event streams not to come back
EVENT_STREAM: Final = "text/event-stream"
_LINE_END: Final = b"\n"  # not a bare CR: an LF that follows would then end another line
_EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n")


class Records(Protocol):
    """Each method returns what to seal now, which may be nothing."""

    def head(self, status: int, headers: Headers) -> bytes: ...

    def data(self, piece: bytes) -> bytes: ...

    def end(self, piece: bytes, trailers: Headers) -> Iterator[bytes]:
        """piece: the last of the body. The last bytes returned belong into the final chunk."""


def records(shape: Shape) -> Records:
    """The way to write one response."""
    return _Padded() if shape == "pad" else _Bare()


class _Bare:
    """The shape `none`: pieces as they arrive."""

    def __init__(self) -> None:
        self._encoder = bhttp.ResponseEncoder()

    def head(self, status: int, headers: Headers) -> bytes:
        return self._encoder.head(status, headers)

    def data(self, piece: bytes) -> bytes:
        return self._encoder.data(piece)

    def end(self, piece: bytes, trailers: Headers) -> Iterator[bytes]:
        yield self._encoder.data(piece) + self._encoder.end(trailers)


class _Padded:
    """The shape `pad`: the head decides between the two ways."""

    def __init__(self) -> None:
        self._encoder = bhttp.ResponseEncoder()
        self._body: _Events | _Whole = _Whole(self._encoder)

    def head(self, status: int, headers: Headers) -> bytes:
        encoded = self._encoder.head(status, headers)
        if _may_be_filled(status, headers):
            self._body = _Events(self._encoder)
        return self._body.begin(encoded)

    def data(self, piece: bytes) -> bytes:
        return self._body.data(piece)

    def end(self, piece: bytes, trailers: Headers) -> Iterator[bytes]:
        return self._body.end(piece, trailers)


def _may_be_filled(status: int, headers: Headers) -> bool:
    """Whether there is a body, and it is an uncompressed event stream of unannounced length."""
    if status in _WITHOUT_CONTENT:
        return False
    values = dict(headers)
    media_type = values.get("content-type", "").partition(";")[0].strip().lower()
    return media_type == EVENT_STREAM and "content-length" not in values and "content-encoding" not in values


class _Events:
    """An event stream: a comment line pads each record."""

    def __init__(self, encoder: bhttp.ResponseEncoder) -> None:
        self._encoder = encoder
        self._sent = b"\n\n"  # the last bytes of the body; its beginning is like the end of an event
        self._line = b""  # an unfinished line
        self._floor = UNIT

    def begin(self, head: bytes) -> bytes:
        return head + self._filled(b"", len(head))

    def data(self, piece: bytes) -> bytes:
        text, newline, self._line = (self._line + piece).rpartition(_LINE_END)
        content = text + newline
        if len(self._line) >= MAX_CHUNK:
            content += self._line
            size = _content_of(len(content) // UNIT * UNIT)
            content, self._line = content[:size], content[size:]
        if not content:
            return b""
        encoded = self._filled(content)
        self._floor = min(max(self._floor, len(encoded)), LARGEST_FLOOR)
        return encoded

    def end(self, piece: bytes, trailers: Headers) -> Iterator[bytes]:
        encoded = self._encoder.data(self._line + piece) + self._encoder.end(trailers)
        # `[DONE]` and a receipt fit; an app that ends with more is treated like one that sends its answer as a whole.
        yield encoded.ljust(END if len(encoded) <= END else whole_units(bucket(len(encoded))), b"\0")

    def _filled(self, content: bytes, before: int = 0) -> bytes:
        """One BHTTP chunk with `content` and a comment; together with `before` bytes it makes whole units."""
        size = max(self._floor, whole_units(before + len(content)))
        while (filler := _filler(size - before, len(content), self._ending(content))) is None:
            size += UNIT
        self._sent = (self._sent + content + filler)[-4:]
        return self._encoder.data(content + filler)

    def _ending(self, content: bytes) -> bytes:
        """How a comment after `content` ends. Within an event, an empty line would end the event. Between events, it tells
        readers that look only for empty lines that the comment is over.
        """
        return b"\n\n" if (self._sent + content[-4:]).endswith(_EVENT_ENDS) else b"\n"


def _filler(size: int, length: int, ending: bytes) -> bytes | None:
    """The comment that grows a chunk of `length` bytes, with its prefix, to `size`; None if no comment fits."""
    missing = _content_of(size) - length
    if missing == 0 and length:
        return b""
    if missing <= len(ending) or len(varint.encode(length + missing)) + length + missing != size:
        return None
    return b":".ljust(missing - len(ending)) + ending


def _content_of(size: int) -> int:
    """The longest content of a BHTTP chunk of at most `size` bytes, with its prefix."""
    return max(size - prefix for prefix in (1, 2, 4) if len(varint.encode(max(size - prefix, 0))) <= prefix)


class _Whole:
    """Any other body: full records, and a bucket for all of it."""

    def __init__(self, encoder: bhttp.ResponseEncoder) -> None:
        self._encoder = encoder
        self._waiting = bytearray()
        self._length = 0  # bytes that have left

    def begin(self, head: bytes) -> bytes:
        return self._full_records(head)

    def data(self, piece: bytes) -> bytes:
        return self._full_records(self._encoder.data(piece))

    def end(self, piece: bytes, trailers: Headers) -> Iterator[bytes]:
        self._waiting += self._encoder.data(piece) + self._encoder.end(trailers)
        left = bucket(self._length + len(self._waiting)) - self._length
        for start in range(0, left, MAX_CHUNK):
            yield bytes(self._waiting[start : start + MAX_CHUNK]).ljust(min(MAX_CHUNK, left - start), b"\0")

    def _full_records(self, encoded: bytes) -> bytes:
        self._waiting += encoded
        size = len(self._waiting) // MAX_CHUNK * MAX_CHUNK
        full = bytes(self._waiting[:size])
        del self._waiting[:size]
        self._length += size
        return full
