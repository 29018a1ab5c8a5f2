"""Reads HTTP/1.1 requests as a server does (RFC 9112): bytes in; heads, bodies and their ends out. No socket, no clock.

Rules:
- A head is bounded before it is kept: `MAX_HEAD` bytes, `MAX_FIELDS` fields, `MAX_TARGET` bytes of target.
- A request must have only one reading. A head that another server might read differently is refused, not repaired. Examples:
  bare line ends, folded lines, a space before a colon, two lengths, a length beside a transfer coding, a coding other than
  exactly `chunked`.
- A target is a path in its normal form (RFC 3986 section 6.2.2), so that a filter before this server sees the same path.
- A request's fields are those of its head. Trailers are read to find the end of the message, then dropped (RFC 9110 section
  6.5.1: they must not be merged).
- After an error nothing more is read, because the start of the next request is unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote_to_bytes

from lacre.errors import InvalidMessage
from lacre.runtime.records import record

MAX_HEAD: Final = 64 * 1024  # bytes; a token of 16 KiB, its proof, and what proxies add stay well below
MAX_FIELDS: Final = 100  # clients and proxies send some twenty; each field costs more than its bytes
MAX_TARGET: Final = 8 * 1024  # bytes; RFC 9112 section 3 asks for 8000
_MAX_CHUNK_LINE: Final = 256  # bytes of a chunk's size and extensions; clients send no extensions
_MAX_EXTENSIONS: Final = 16 * 1024  # bytes of extensions in one body, which are read and ignored
_TINY: Final = 256  # bytes; a chunk below is tiny
_MAX_TINY: Final = 4096  # tiny chunks in one body; each costs as much as a large one
_MAX_TRAILERS: Final = 8 * 1024  # bytes; they are dropped

_TOKEN: Final = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # RFC 9110 section 5.6.2
_METHOD: Final = re.compile(rb"[A-Z][A-Z0-9_-]{0,31}")
_VERSION: Final = re.compile(rb"HTTP/[0-9]\.[0-9]")
# Octets allowed in a line of a head: all except controls, but tabs are allowed (RFC 9110 section 5.5).
_PLAIN: Final = bytes(octet for octet in range(256) if octet == 0x09 or (octet >= 0x20 and octet != 0x7F))
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding", b"host", b"expect", b"connection"})
_BLANK_LINES: Final = re.compile(rb"(?:\r\n)+")
_PATH: Final = re.compile(rb"/(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/]|%[0-9A-F]{2})*")
# visible, and no `#`; filters decide by path, so the query's meaning does not matter here
_QUERY: Final = re.compile(rb"[!\"$-~]*")
# A path with two readings: an empty or a dot segment, an octet that is encoded without need, or one that must be encoded.
_AMBIGUOUS: Final = re.compile(
    rb"//|/\.{1,2}(?:/|\Z)|%(?:[01][0-9A-F]|7F|2[DE]|3[0-9]|4[1-9A-F]|5[0-9A]|5[CF]|6[1-9A-F]|7[0-9A]|7E)"
)
# A name or an address, and a port (RFC 9110 section 7.2); proxies may send an empty one.
_HOST: Final = re.compile(rb"(?:\[[0-9A-Za-z:.%]{2,64}\]|[A-Za-z0-9\-._~!$&'()*+;=%]{0,255})(?::[0-9]{0,5})?")
_LENGTH: Final = re.compile(rb"[0-9]{1,16}")
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,8})((?:;[\t -~\x80-\xff]*)?)")


class UnreadableRequest(InvalidMessage):
    """A request that a server must not guess about. status: the answer's (RFC 9110 section 15.5); the connection then ends."""

    remedy = "Send a request as RFC 9112 describes it, with a path in its normal form."

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@record(frozen=True, slots=True)
class RequestHead:
    """A request's head. path, query: as sent, without the `?`; path in its normal form. fields: names in lower case.

    length: of the body in bytes; None if it is chunked. version: "1.0" or "1.1". keep_alive: whether another request may
    follow. expects: whether the client waits for a `100 Continue`.
    """

    method: str
    path: bytes
    query: bytes = field(repr=False)
    version: str
    fields: list[tuple[bytes, bytes]] = field(repr=False)
    length: int | None
    keep_alive: bool
    expects: bool


@record(frozen=True, slots=True)
class Body:
    """A piece of the body."""

    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """The body is whole. The next bytes are another request."""


Event = RequestHead | Body | RequestEnd
_END: Final = RequestEnd()


class RequestReader:
    """Reads one connection. `feed` takes bytes; `next` returns the events in them, then None.

    The caller must bound the bytes that it feeds between calls of `next`: `pending` says how many are kept. between: whether
    the next event is a head.
    """

    def __init__(self, *, encoded_slashes: bool = False) -> None:
        """encoded_slashes: whether a path may hold `%2F`; a model's name in one segment may."""
        self._encoded_slashes = encoded_slashes
        self._buffer = bytearray()
        self._scanned = 0  # how far the search for the end of a head got
        self._blank = 0  # bytes of empty lines before a head
        self._state = self._head
        self.between = True
        self._left = 0  # bytes still to come of the body, or of its chunk
        self._chunked = False
        self._extensions = self._tiny = self._trailers = 0

    @property
    def pending(self) -> int:
        """Bytes that were fed and not yet returned."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def clear(self) -> None:
        """Drops the bytes that were fed: nothing more will be read."""
        self._buffer = bytearray()

    def next(self) -> Event | None:
        """The next event; None if more bytes are needed. Raises UnreadableRequest."""
        return self._state()

    # A head (RFC 9112 sections 2.2, 3 and 5)

    def _head(self) -> Event | None:
        buffer = self._buffer
        self._skip_blank_lines()
        end = buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
        if end < 0:
            self._scanned = len(buffer)
            self._check_begun()
            return None
        if end > MAX_HEAD:
            raise UnreadableRequest(431, f"a head has at most {MAX_HEAD} bytes")
        raw = bytes(buffer[: end + 2])
        del buffer[: end + 4]
        self._scanned = self._blank = 0
        head = parse_head(raw, encoded_slashes=self._encoded_slashes)
        self._chunked = head.length is None
        self._left = head.length or 0
        self._extensions = self._tiny = self._trailers = 0
        self._state, self.between = self._chunk_size if self._chunked else self._content, False
        return head

    def _skip_blank_lines(self) -> None:
        """A server ignores empty lines before a request line (RFC 9112 section 2.2), up to the size of a head."""
        if found := _BLANK_LINES.match(self._buffer):
            self._blank += found.end()
            self._scanned = 0
            del self._buffer[: found.end()]

    def _check_begun(self) -> None:
        """Checks the beginning of a head before it is whole."""
        buffer = self._buffer
        if len(buffer) + self._blank > MAX_HEAD:
            no_line = len(buffer) > MAX_TARGET and buffer.find(b"\r\n", 0, MAX_TARGET + 64) < 0
            raise UnreadableRequest(414 if no_line else 431, f"a head has at most {MAX_HEAD} bytes")
        if buffer and not 0x41 <= buffer[0] <= 0x5A and buffer != b"\r":
            raise UnreadableRequest(400, "a request begins with its method, in capital letters")

    # A body (RFC 9112 sections 6 and 7.1)

    def _content(self) -> Event | None:
        if not self._left:
            self._state, self.between = self._head, True
            return _END
        return self._piece()

    def _piece(self) -> Body | None:
        size = min(self._left, len(self._buffer))
        if not size:
            return None
        content = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._left -= size
        return Body(content)

    def _chunk_size(self) -> Event | None:
        line = self._line(_MAX_CHUNK_LINE, "a chunk's size line")
        if line is None:
            return None
        found = _CHUNK.fullmatch(line)
        if found is None:
            raise UnreadableRequest(400, "a chunk begins with its size in hexadecimal digits")
        self._extensions += len(found[2])
        if self._extensions > _MAX_EXTENSIONS:
            raise UnreadableRequest(400, f"the chunks of a body have at most {_MAX_EXTENSIONS} bytes of extensions")
        self._left = int(found[1], 16)
        self._tiny += self._left < _TINY
        if self._tiny > _MAX_TINY:
            raise UnreadableRequest(400, f"a body has at most {_MAX_TINY} chunks of under {_TINY} bytes")
        self._state = self._chunk if self._left else self._trailer
        return self._state()

    def _chunk(self) -> Event | None:
        if self._left:
            return self._piece()
        if len(self._buffer) < 2:
            return None
        if self._buffer[:2] != b"\r\n":
            raise UnreadableRequest(400, "a chunk ends with CR LF")
        del self._buffer[:2]
        self._state = self._chunk_size
        return self._chunk_size()

    def _trailer(self) -> Event | None:
        """Reads trailers and drops them."""
        while (line := self._line(_MAX_TRAILERS - self._trailers, "the trailer section")) is not None:
            if not line:
                self._state, self.between = self._head, True
                return _END
            ((name, _value),) = _fields([line])
            if name in (b"content-length", b"transfer-encoding"):  # RFC 9110 section 6.5.1: the body has already ended
                raise UnreadableRequest(400, "a trailer must not give the body's length")
            self._trailers += len(line) + 2
        return None

    def _line(self, most: int, what: str) -> bytes | None:
        """The next line without its end; None if it is not complete. Raises UnreadableRequest for one of over `most` bytes."""
        end = self._buffer.find(b"\r\n", 0, most + 2)
        if end < 0:
            if len(self._buffer) > most + 1:
                raise UnreadableRequest(400, f"{what} is too long")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        if line.translate(None, _PLAIN):
            raise UnreadableRequest(400, f"{what} holds a control character")
        return line


def parse_head(raw: bytes, *, encoded_slashes: bool = False) -> RequestHead:
    """raw: request line and fields, each with its CR LF, without the empty line. Raises UnreadableRequest."""
    first, *lines = raw[:-2].split(b"\r\n")
    if len(lines) > MAX_FIELDS:
        raise UnreadableRequest(431, f"a head has at most {MAX_FIELDS} fields")
    if raw.translate(None, _PLAIN) != b"\r\n" * (len(lines) + 1):
        raise UnreadableRequest(400, "a head holds a control character, or a line end that is not CR LF")
    method, path, query, version = _request_line(first, encoded_slashes=encoded_slashes)
    fields = _fields(lines)
    framing: dict[bytes, list[bytes]] = {}
    for name, value in fields:
        if name in _FRAMING:
            framing.setdefault(name, []).append(value)
    _check_host(framing.get(b"host", []), version)
    return RequestHead(
        method=method,
        path=path,
        query=query,
        version=version,
        fields=fields,
        length=_length(framing, version),
        keep_alive=version == "1.1" and not any(_closes(value) for value in framing.get(b"connection", ())),
        expects=_expects(framing.get(b"expect", []), version),
    )


def _request_line(line: bytes, *, encoded_slashes: bool) -> tuple[str, bytes, bytes, str]:
    method, _, rest = line.partition(b" ")
    target, _, version = rest.partition(b" ")
    if _METHOD.fullmatch(method) is None:
        raise UnreadableRequest(400, "a request begins with its method, in capital letters")
    if len(target) > MAX_TARGET:
        raise UnreadableRequest(414, f"a target has at most {MAX_TARGET} bytes")
    if _VERSION.fullmatch(version) is None:
        raise UnreadableRequest(400, "a request line is a method, a target and a version, with one space between them")
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise UnreadableRequest(505, "this server supports only HTTP/1.1")
    path, _, query = target.partition(b"?")
    if b"%2F" in path and not encoded_slashes:
        raise UnreadableRequest(400, "a path here must not hold an encoded slash")
    _check_path(path)
    if _QUERY.fullmatch(query) is None:
        raise UnreadableRequest(400, "a query must have only visible ASCII characters")
    return method.decode(), path, query, version[5:].decode()


def _check_path(path: bytes) -> None:
    """Raises UnreadableRequest unless the path is absolute and in its normal form, with encoded octets in capital digits.

    A whole URL, an authority and `*` are refused: this server is not a proxy, and has no options of its own.
    """
    if _PATH.fullmatch(path) is None or _AMBIGUOUS.search(path.replace(b"%2F", b"/")):
        raise UnreadableRequest(400, "a target is an absolute path in its normal form: no doubled slash, no dots (RFC 3986)")
    if b"%" in path:
        try:
            unquote_to_bytes(path).decode()
        except UnicodeDecodeError as exc:
            raise UnreadableRequest(400, "a path must be UTF-8") from exc


def _fields(lines: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Each name in lower case, and its value without white space around it (RFC 9112 section 5)."""
    if not lines:
        return []
    names, colons, values = zip(*[line.partition(b":") for line in lines], strict=True)
    if b"" in names or b"" in colons or b"".join(names).translate(None, _TOKEN):
        raise UnreadableRequest(400, "a field is a name, a colon right after it, and a value, on one line")
    return [(name.lower(), value.strip(b" \t")) for name, value in zip(names, values, strict=True)]


def _check_host(hosts: list[bytes], version: str) -> None:
    """RFC 9112 section 3.2."""
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise UnreadableRequest(400, "a request must have one Host")
    if hosts and _HOST.fullmatch(hosts[0]) is None:
        raise UnreadableRequest(400, "a Host must be a name or an address, with or without a port")


def _length(framing: dict[bytes, list[bytes]], version: str) -> int | None:
    """The length of the body; None if it is chunked (RFC 9112 sections 6.1 to 6.3)."""
    lengths, codings = framing.get(b"content-length"), framing.get(b"transfer-encoding")
    if codings:
        if lengths or version == "1.0":
            raise UnreadableRequest(400, "a transfer coding with a Content-Length or with HTTP/1.0 has two readings")
        if [coding.lower() for coding in codings] != [b"chunked"]:
            raise UnreadableRequest(501, "chunked is the only transfer coding here")
        return None
    if not lengths:
        return 0
    if len(lengths) > 1 or _LENGTH.fullmatch(lengths[0]) is None:
        raise UnreadableRequest(400, "a Content-Length must be one number in decimal digits")
    return int(lengths[0])


def _closes(connection: bytes) -> bool:
    return b"close" in connection.lower() and b"close" in {token.strip() for token in connection.lower().split(b",")}


def _expects(expectations: list[bytes], version: str) -> bool:
    """RFC 9110 section 10.1.1: ignored for HTTP/1.0."""
    if not expectations or version == "1.0":
        return False
    if [each.lower() for each in expectations] != [b"100-continue"]:
        raise UnreadableRequest(417, "100-continue is the only supported expectation")
    return True
