"""Writes one HTTP/1.1 answer as a server does (RFC 9112): a head and pieces in, bytes out. No socket, no clock.

Rules:
- An answer is a head, any number of chunks, and an end. Out of this order, `OutOfOrder` is raised: that is a fault of ours.
- If the head announces a length, the body has exactly this length. Otherwise it is chunked, and only a last chunk ends it.
- An HTTP/1.0 client knows no chunks (RFC 9112 section 6.1): the end of the connection ends its answer. So its connection must
  not end in order if the answer broke off.
- No field can begin another one: a control character in a head raises `UnsafeField` before anything of it is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Final

Fields = Iterable[tuple[bytes, bytes]]

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
# Octets allowed in a field: all except controls, but tabs are allowed (RFC 9110 section 5.5).
_PLAIN: Final = bytes(octet for octet in range(256) if octet == 0x09 or (octet >= 0x20 and octet != 0x7F))
_LAST: Final = b"0\r\n\r\n"


class OutOfOrder(RuntimeError):
    """A part of an answer in the wrong place, or more or fewer bytes than its head announced."""


class UnsafeField(RuntimeError):
    """A control character in a field, which could begin another field or another answer."""


class HttpAnswer:
    """One answer. keep_alive: whether another request may follow on the connection; it may be set to False until the head.

    begun, whole: whether its head and its end were written.
    """

    def __init__(self, version: str, *, keep_alive: bool) -> None:
        """version: of the request, "1.0" or "1.1"."""
        self.keep_alive = keep_alive and version == "1.1"
        self._chunks = version == "1.1"
        self._left: int | None = None  # bytes of the announced length still to come; None: no length was announced
        self.begun = self.whole = False

    def head(self, status: int, fields: Fields) -> bytes:
        """fields: names in lower case. `connection: close` among them ends the connection after the answer."""
        self._expect(begun=False)
        lines = [_STATUS_LINES[status]]
        length = None
        for name, value in fields:
            if name == b"content-length":
                length = int(value)
            elif name == b"connection":
                self.keep_alive = self.keep_alive and value != b"close"
                continue
            lines.append(b"%b: %b\r\n" % (name, value))
        if length is None and self._chunks:
            lines.append(b"transfer-encoding: chunked\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        head = b"".join(lines)
        if head.translate(None, _PLAIN) != b"\r\n" * len(lines):
            unsafe = [line.partition(b":")[0] for line in lines if line.translate(None, _PLAIN) != b"\r\n"]
            raise UnsafeField(f"a control character in the fields {unsafe}")
        self._left, self.begun = length, True
        return head

    def chunk(self, pieces: Sequence[bytes]) -> bytes:
        """The pieces as one chunk; nothing for no bytes, because an empty chunk would be the last."""
        self._expect(begun=True)
        return b"".join(self._framed(pieces))

    def end(self, pieces: Sequence[bytes] = ()) -> bytes:
        """The last pieces, and the end of the answer."""
        self._expect(begun=True)
        framed = self._framed(pieces)
        if self._left is None:
            if self._chunks:
                framed = [*framed, _LAST]
        elif self._left:
            raise OutOfOrder(f"{self._left} bytes of the announced length are missing")
        self.whole = True
        return b"".join(framed)

    def _framed(self, pieces: Sequence[bytes]) -> Sequence[bytes]:
        size = sum(map(len, pieces))
        if self._left is not None:
            if size > self._left:
                raise OutOfOrder(f"{size - self._left} bytes more than the announced length")
            self._left -= size
            return pieces
        return (b"%x\r\n" % size, *pieces, b"\r\n") if size and self._chunks else pieces

    def _expect(self, *, begun: bool) -> None:
        if self.whole or self.begun is not begun:
            at = "end" if self.whole else "body" if self.begun else "head"
            raise OutOfOrder(f"the answer is at its {at}, not at its {'body' if begun else 'head'}")
