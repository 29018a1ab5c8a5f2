"""Binary HTTP messages (RFC 9292): what is inside the seal.

    known length          framing 0|1 ‖ control data ‖ headers ‖ content ‖ trailers, each after its length ‖ zeros
    indeterminate length  framing 2|3 ‖ control data ‖ headers ‖ 0 ‖ { varint(len) ‖ chunk }* ‖ 0 ‖ trailers ‖ 0 ‖ zeros

One incremental parser reads all four forms; for a whole message it is fed once. Rules:

- A length is checked as soon as it is read, before any of the bytes that it announces are kept.
- A message may end only where RFC 9292 allows it: after the control data, or after a whole section (section 3.8).
- After the message only zeros may follow.
- Encoders write the whole form, with every section, and refuse what the decoder would refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Final

from lacre import errors
from lacre.wire import varint
from lacre.wire.fields import (
    MAX_AUTHORITY,
    MAX_FIELDS,
    MAX_HEADER_SECTION,
    MAX_METHOD,
    MAX_NAME,
    MAX_PATH,
    MAX_SCHEME,
    MAX_TRAILER_SECTION,
    MAX_VALUE,
    Fields,
    check_control,
    check_field,
    content_length,
)

# Chunked OHTTP section 7.3: with AES-128-GCM and 2^20 messages, none should exceed 2^30 bytes.
MAX_CONTENT: Final = 2**30
# Early hints and progress are the only known uses. Without a limit, a peer could hold a connection forever with them.
MAX_INFORMATIONAL: Final = 16

# Chunks of a request's content: as many as its seal may have. They are parsed one by one, so millions of tiny ones would delay
# every other request of the worker. Responses are streamed in as many chunks as they have pieces.
MAX_REQUEST_PIECES: Final = 8192

_KNOWN_REQUEST, _KNOWN_RESPONSE, _REQUEST, _RESPONSE = range(4)

Wait = Generator[None, None, None]


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request. Field names are in lower case, values are Latin-1 text."""

    method: str
    scheme: str
    authority: str
    path: str
    headers: Fields = field(default=(), repr=False)
    content: bytes = field(default=b"", repr=False)
    trailers: Fields = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The status and headers of a response. Informational ones (1xx) come before the final one."""

    status: int
    headers: Fields = field(repr=False)
    informational: bool = False


@dataclass(frozen=True, slots=True)
class Data:
    """A piece of content. Its boundaries mean nothing: RFC 9292 lets chunks be split and joined."""

    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class End:
    """The message is whole."""

    trailers: Fields = field(default=(), repr=False)


Event = ResponseHead | Data | End


# Encoding


def encode_request(request: Request, *, padded_to: int | Callable[[int], int] | None = None) -> bytes:
    """Known-length form, filled with zeros to `padded_to` bytes; a callable computes that from the unpadded length.

    Raises UsageError if the request is invalid or longer.
    """
    head = varint.encode(_KNOWN_REQUEST) + _control(request)
    message = b"".join(
        (
            head,
            _prefixed(_lines(request.headers, MAX_HEADER_SECTION)),
            _prefixed(request.content),
            _prefixed(_lines(request.trailers, MAX_TRAILER_SECTION)),
        )
    )
    return _padded(message, padded_to)


def encode_request_indeterminate(request: Request, *, padded_to: int | Callable[[int], int] | None = None) -> bytes:
    """Indeterminate-length form, with the content as one chunk; otherwise like `encode_request`."""
    message = b"".join(
        (
            varint.encode(_REQUEST),
            _control(request),
            _lines(request.headers, MAX_HEADER_SECTION),
            b"\x00",
            _prefixed(request.content) if request.content else b"",
            b"\x00",
            _lines(request.trailers, MAX_TRAILER_SECTION),
            b"\x00",
        )
    )
    return _padded(message, padded_to)


def _control(request: Request) -> bytes:
    try:
        parts = [part.encode("ascii") for part in (request.method, request.scheme, request.authority, request.path)]
        check_control(*parts)
        announced = content_length((name.lower(), value) for name, value in request.headers)
    except UnicodeEncodeError:
        raise errors.UsageError("the method, scheme, authority and path are ASCII; escape other characters") from None
    except errors.ProtocolError as error:
        raise errors.UsageError(str(error)) from None
    if announced not in (None, len(request.content)):
        raise errors.UsageError("the Content-Length header is not the length of the content")
    if len(request.content) > MAX_CONTENT:
        raise errors.UsageError(f"the content has more than {MAX_CONTENT} bytes")
    return b"".join(_prefixed(part) for part in parts)


def _lines(fields: Iterable[tuple[str, str]], limit: int) -> bytes:
    encoded = bytearray()
    count = 0
    for count, (name, value) in enumerate(fields, 1):  # noqa: B007 - the last count is the number of fields
        try:
            raw_name, raw_value = name.lower().encode("ascii"), value.encode("latin-1")
            check_field(raw_name, raw_value)
        except UnicodeEncodeError:
            raise errors.UsageError("field names are ASCII and values Latin-1; encode other characters") from None
        except errors.ProtocolError as error:
            raise errors.UsageError(str(error)) from None
        encoded += _prefixed(raw_name)
        encoded += _prefixed(raw_value)
    if count > MAX_FIELDS or len(encoded) > limit:
        raise errors.UsageError(f"a section holds at most {MAX_FIELDS} fields and {limit} bytes; send fewer")
    return bytes(encoded)


def _prefixed(data: bytes) -> bytes:
    return varint.encode(len(data)) + data


def _padded(message: bytes, padded_to: int | Callable[[int], int] | None) -> bytes:
    if padded_to is None:
        return message
    length = padded_to if isinstance(padded_to, int) else padded_to(len(message))
    if len(message) > length:
        raise errors.UsageError("the message is longer than the length it is to be padded to")
    return message.ljust(length, b"\x00")


class ResponseEncoder:
    """Writes one response in indeterminate-length form, piece by piece: informational*, head, data*, end."""

    __slots__ = ("_informational", "_state", "_unsent")

    def __init__(self) -> None:
        self._unsent = varint.encode(_RESPONSE)
        self._informational = 0
        self._state = "head"

    def informational(self, status: int, headers: Iterable[tuple[str, str]] = ()) -> bytes:
        self._expect("head")
        self._informational += 1
        if not 100 <= status <= 199 or status == 101:
            raise errors.UsageError("an informational status is 100 to 199, and not 101")
        if self._informational > MAX_INFORMATIONAL:
            raise errors.UsageError(f"a response has at most {MAX_INFORMATIONAL} informational ones before it")
        return self._section(status, headers)

    def head(self, status: int, headers: Iterable[tuple[str, str]] = ()) -> bytes:
        self._expect("head")
        if not 200 <= status <= 599:
            raise errors.UsageError("a final status is 200 to 599")
        encoded = self._section(status, headers)
        self._state = "content"
        return encoded

    def data(self, piece: bytes) -> bytes:
        """One chunk. An empty piece makes no chunk: a zero length would end the content."""
        self._expect("content")
        return _prefixed(piece) if piece else b""

    def end(self, trailers: Iterable[tuple[str, str]] = ()) -> bytes:
        self._expect("content")
        encoded = b"\x00" + _lines(trailers, MAX_TRAILER_SECTION) + b"\x00"
        self._state = "end"
        return encoded

    def _section(self, status: int, headers: Iterable[tuple[str, str]]) -> bytes:
        encoded = self._unsent + varint.encode(status) + _lines(headers, MAX_HEADER_SECTION) + b"\x00"
        self._unsent = b""
        return encoded

    def _expect(self, state: str) -> None:
        if self._state == "end":
            raise errors.AlreadyUsedError("this response has ended; make a new encoder for the next one")
        if self._state != state:
            raise errors.UsageError("the parts of a response are: informational ones, one head, data, and the end")


# Decoding


def decode_request(data: bytes) -> Request:
    """A whole request of either form. Raises InvalidMessage, MessageTooLarge or TruncatedStream."""
    parser = _Parser(request=True)
    events = [*parser.feed(data), *parser.close()]
    method, scheme, authority, path, headers = parser.request_head
    content = b"".join(event.content for event in events if isinstance(event, Data))
    trailers = next((event.trailers for event in events if isinstance(event, End)), ())
    return Request(method, scheme, authority, path, headers, content, trailers)


class ResponseDecoder:
    """Reads one response of either form, as it arrives in pieces of any size."""

    __slots__ = ("_parser",)

    def __init__(self) -> None:
        self._parser = _Parser(request=False)

    def feed(self, data: bytes) -> list[Event]:
        """The events that `data` completes. Content is passed on as it arrives. Raises InvalidMessage or MessageTooLarge."""
        return self._parser.feed(data)

    def close(self) -> list[Event]:
        """The message has ended. RFC 9292 section 3.8 lets it omit empty sections at its end: this returns their events, the
        head or the end. Raises TruncatedStream if the message ends anywhere else.
        """
        return self._parser.close()


class _Parser:
    """A generator that yields to ask for bytes, and the buffer that it reads from."""

    __slots__ = ("_buffer", "_ended", "_events", "_position", "_request", "_run", "request_head")

    def __init__(self, *, request: bool) -> None:
        self._buffer = bytearray()
        self._position = 0
        self._ended = False
        self._events: list[Event] = []
        self._request = request
        self._run = self._message()
        self.request_head: tuple[str, str, str, str, Fields] = ("", "", "", "", ())

    def feed(self, data: bytes) -> list[Event]:
        if self._ended:
            raise errors.AlreadyUsedError("this message has ended or was invalid; make a new decoder for the next one")
        self._buffer += data
        return self._resume()

    def close(self) -> list[Event]:
        if self._ended:
            raise errors.AlreadyUsedError("this message has ended already, or was invalid")
        self._ended = True
        return self._resume()

    def _resume(self) -> list[Event]:
        try:
            next(self._run, None)
        except errors.ProtocolError:
            self._ended = True
            raise
        del self._buffer[: self._position]
        self._position = 0
        events, self._events = self._events, []
        return events

    # The message

    def _message(self) -> Wait:
        framing = yield from self._integer()
        known = framing in (_KNOWN_REQUEST, _KNOWN_RESPONSE)
        if framing not in ((_KNOWN_REQUEST, _REQUEST) if self._request else (_KNOWN_RESPONSE, _RESPONSE)):
            raise errors.InvalidMessage("the framing indicator is for another kind of message than expected")
        if self._request:
            headers = yield from self._request_start(known)
        else:
            headers = yield from self._response_start(known)
        announced = content_length(headers)
        received = yield from (self._known_content() if known else self._content())
        # A response to HEAD, or one whose status has no content, may announce a length that it does not carry.
        if announced not in (None, received) and (self._request or received):
            raise errors.InvalidMessage("the content's length differs from its Content-Length")
        trailers = yield from self._fields(known, MAX_TRAILER_SECTION)
        self._events.append(End(trailers))
        yield from self._padding()

    def _request_start(self, known: bool) -> Generator[None, None, Fields]:
        parts = []
        for limit in (MAX_METHOD, MAX_SCHEME, MAX_AUTHORITY, MAX_PATH):
            length = yield from self._integer()
            parts.append((yield from self._exactly(length, limit)))
        method, scheme, authority, path = parts
        check_control(method, scheme, authority, path)
        headers = yield from self._fields(known, MAX_HEADER_SECTION)
        self.request_head = (method.decode(), scheme.decode(), authority.decode(), path.decode(), headers)
        return headers

    def _response_start(self, known: bool) -> Generator[None, None, Fields]:
        for _ in range(MAX_INFORMATIONAL + 1):
            status = yield from self._integer()
            if not 100 <= status <= 599 or status == 101:
                raise errors.InvalidMessage("the status is not 100 to 599, or is 101")
            headers = yield from self._fields(known, MAX_HEADER_SECTION)
            self._events.append(ResponseHead(status, headers, informational=status < 200))
            if status >= 200:
                return headers
        raise errors.MessageTooLarge(f"the response has more than {MAX_INFORMATIONAL} informational ones before it")

    # Field sections

    def _fields(self, known: bool, limit: int) -> Generator[None, None, Fields]:
        if not (yield from self._more()):
            return ()
        if known:
            length = yield from self._integer()
            section = yield from self._exactly(length, limit)
            return _parse_lines(section)
        fields: list[tuple[str, str]] = []
        size = 0
        while name_length := (yield from self._integer()):
            name = yield from self._exactly(name_length, MAX_NAME)
            value_length = yield from self._integer()
            value = yield from self._exactly(value_length, MAX_VALUE)
            size += len(_prefixed(name)) + len(_prefixed(value))
            if size > limit or len(fields) == MAX_FIELDS:
                raise errors.MessageTooLarge(f"a section holds at most {MAX_FIELDS} fields and {limit} bytes")
            fields.append(check_field(name, value))
        return tuple(fields)

    # Content

    def _known_content(self) -> Generator[None, None, int]:
        if not (yield from self._more()):
            return 0
        length = yield from self._integer()
        yield from self._pass_on(length, 0)
        return length

    def _content(self) -> Generator[None, None, int]:
        received = pieces = 0
        if not (yield from self._more()):
            return 0
        while length := (yield from self._integer()):
            pieces += 1
            if self._request and pieces > MAX_REQUEST_PIECES:
                raise errors.MessageTooLarge("the content has too many chunks; send fuller ones")
            yield from self._pass_on(length, received)
            received += length
        return received

    def _pass_on(self, length: int, received: int) -> Wait:
        """Content is never kept: the bytes present become an event."""
        if received + length > MAX_CONTENT:
            raise errors.MessageTooLarge(f"the content has more than {MAX_CONTENT} bytes")
        while length:
            piece = self._take(min(length, len(self._buffer) - self._position))
            if piece:
                self._events.append(Data(piece))
                length -= len(piece)
            else:
                yield from self._wait()

    def _padding(self) -> Wait:
        while (yield from self._more()):
            padding = self._take(len(self._buffer) - self._position)
            if padding.count(0) != len(padding):
                raise errors.InvalidMessage("something other than zeros follows the message")

    # The buffer

    def _more(self) -> Generator[None, None, bool]:
        """Wait for a byte; False if the message has ended instead. Only used where it may end."""
        while self._position == len(self._buffer):
            if self._ended:
                return False
            yield
        return True

    def _wait(self) -> Wait:
        if self._ended:
            raise errors.TruncatedStream(
                "the message ended inside one of its parts, so the received part is not the whole message"
            )
        yield

    def _integer(self) -> Generator[None, None, int]:
        while (found := varint.decode(self._buffer, self._position)) is None:
            yield from self._wait()
        value, self._position = found
        return value

    def _exactly(self, length: int, limit: int) -> Generator[None, None, bytes]:
        if length > limit:
            raise errors.MessageTooLarge(f"a part of the message is longer than its limit of {limit} bytes")
        while len(self._buffer) - self._position < length:
            yield from self._wait()
        return self._take(length)

    def _take(self, length: int) -> bytes:
        start = self._position
        self._position += length
        with memoryview(self._buffer) as view:
            return bytes(view[start : self._position])


def _parse_lines(section: bytes) -> Fields:
    fields: list[tuple[str, str]] = []
    position = 0
    while position < len(section):
        if len(fields) == MAX_FIELDS:
            raise errors.MessageTooLarge(f"a section holds at most {MAX_FIELDS} fields")
        name, position = _parse_part(section, position, MAX_NAME)
        value, position = _parse_part(section, position, MAX_VALUE)
        fields.append(check_field(name, value))
    return tuple(fields)


def _parse_part(section: bytes, position: int, limit: int) -> tuple[bytes, int]:
    prefix = varint.decode(section, position)
    if prefix is not None and prefix[0] > limit:
        raise errors.MessageTooLarge(f"a part of a field is longer than its limit of {limit} bytes")
    if prefix is None or prefix[1] + prefix[0] > len(section):
        raise errors.InvalidMessage("a field line reaches past the end of its section")
    length, start = prefix
    return section[start : start + length], start + length
