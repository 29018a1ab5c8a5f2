"""Parses the bytes that a NATS server sends to a client into events, and writes a client's messages. No I/O and no clock.

Rules:
- A message that is written is one message: no name, subject or value in it can begin another line.
- A peer chooses a message's subject, reply subject, headers and payload, so none of them is trusted. The server puts one space
  between the words of a control line and allows no space or tab in a subject. So lines are split at spaces only: otherwise a
  subject with a form feed could name another subscription.
- A length is checked before its buffer is allocated. A message longer than `keep` is dropped as it arrives.
- The caller drops unusable messages. Only a server that breaks the protocol itself raises `BrokenProtocol`.

Source: https://docs.nats.io/reference/reference-protocols/nats-protocol, and ADR-4 for headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from lacre.errors import InvalidMessage, ProtocolError, UsageError

MAX_LINE: Final = 64 * 1024  # bytes of a control line: INFO names every server of a cluster; other lines have at most 4 KiB
MAX_SIZE: Final = 64 * 2**20  # bytes of the largest message that a nats-server can be configured to accept
MAX_HEADERS: Final = 64 * 1024  # bytes of a message's headers: a grant takes about 600, JetStream's own less
MAX_FIELDS: Final = 64  # of one message: ours have 5, and JetStream adds as many
STATUS: Final = "Status"
DESCRIPTION: Final = "Description"

_CRLF: Final = b"\r\n"
_VERSION: Final = b"NATS/1.0"
# Groups: subject, subscription, optional reply subject, size of the headers, total size. A number fits into 64 bits. The
# server's own advisories have an empty reply subject, so two spaces follow each other.
_HMSG: Final = re.compile(rb"HMSG ([^ \n]+) ([0-9]{1,18}) (?:([^ \n]*) )?([0-9]{1,18}) ([0-9]{1,18})\r\n")
_MSG: Final = re.compile(rb"MSG ([^ \n]+) ([0-9]{1,18}) (?:([^ \n]*) )?()([0-9]{1,18})\r\n")
_FIELD_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}")  # RFC 9110 section 5.6.2
_STATUS_LINE: Final = re.compile(rb"NATS/1\.0 ([0-9]{3})(?: ([ -~]{0,255}))?")


class BrokenProtocol(ProtocolError):
    """The server broke the protocol, so the start of the next message is unknown."""


class NatsMessage(NamedTuple):
    """A message of a subscription. headers: as on the wire, empty if there are none. reply: empty if none."""

    sid: int
    subject: bytes
    reply: bytes
    headers: bytes
    payload: bytes


class Oversized(NamedTuple):
    """A message longer than `keep`. size: its bytes."""

    sid: int
    size: int


class Control(NamedTuple):
    """Any other line. name: PING, PONG, +OK, -ERR or INFO. text: the rest."""

    name: bytes
    text: bytes


Event = NatsMessage | Oversized | Control


class _Head(NamedTuple):
    sid: int
    subject: bytes
    reply: bytes
    headers: int
    size: int


class ProtocolReader:
    """Parses the server's bytes into events. keep: bytes of the longest message, with headers, that is returned whole."""

    def __init__(self, keep: int = MAX_SIZE) -> None:
        self._keep = keep
        self.reset()

    def reset(self) -> None:
        """Starts over for a new connection."""
        self._buffer = bytearray()
        self._head: _Head | None = None
        self._skip = 0

    def feed(self, data: bytes) -> Iterator[Event]:
        """Yields every complete event. Raises BrokenProtocol."""
        at = 0
        if not self._buffer and not self._skip and self._head is None:
            # Nearly every message is all in one piece, and is read without a copy of the rest.
            while (match := _HMSG.match(data, at) or _MSG.match(data, at)) is not None:
                subject, sid, reply, headers, size = match.groups(b"")
                begin = match.end()
                middle, end = begin + int(headers or 0), begin + int(size)
                if middle > end or end - begin > self._keep or data[end : end + len(_CRLF)] != _CRLF:
                    break  # `_next` finds out why
                yield NatsMessage(int(sid), subject, reply, data[begin:middle], data[middle:end])
                at = end + len(_CRLF)
        self._buffer += data[at:]
        while (event := self._next()) is not None:
            yield event

    def _next(self) -> Event | None:
        if self._skip and not self._dropped():
            return None
        return self._line() if self._head is None else self._body(self._head)

    def _dropped(self) -> bool:
        """Whether all of an oversized message has passed."""
        size = min(self._skip, len(self._buffer))
        del self._buffer[:size]
        self._skip -= size
        return self._skip == 0

    def _line(self) -> Event | None:
        match = _HMSG.match(self._buffer) or _MSG.match(self._buffer)
        if match is not None:  # nearly every line is one of these two
            # Read all groups before the buffer changes: the match refers to it.
            subject, number, reply, header_size, whole = match.groups(b"")
            sid, headers, size = int(number), int(header_size or 0), int(whole)
            del self._buffer[: match.end()]
            if size > MAX_SIZE or headers > size:
                raise BrokenProtocol("the NATS server sent a message of an impossible length")
            if size > self._keep:
                self._skip = size + len(_CRLF)
                return Oversized(sid, size)
            return self._body(_Head(sid, subject, reply, headers, size))
        end = self._buffer.find(_CRLF, 0, MAX_LINE)
        if end < 0:
            if len(self._buffer) >= MAX_LINE:
                raise BrokenProtocol("the NATS server sent a line that is too long")
            return None
        name, _, text = bytes(self._buffer[:end]).partition(b" ")
        del self._buffer[: end + len(_CRLF)]
        if name not in (b"PING", b"PONG", b"+OK", b"-ERR", b"INFO"):
            raise BrokenProtocol("the NATS server sent a line that is not part of the NATS protocol")
        return Control(name, text)

    def _body(self, head: _Head) -> NatsMessage | None:
        sid, subject, reply, headers, size = head
        buffer = self._buffer
        if len(buffer) < size + len(_CRLF):
            self._head = head
            return None
        if not buffer.startswith(_CRLF, size):
            raise BrokenProtocol("the NATS server sent a message whose length differs from the announced one")
        message = NatsMessage(sid, subject, reply, bytes(buffer[:headers]), bytes(buffer[headers:size]))
        del buffer[: size + len(_CRLF)]
        self._head = None
        return message


def fields(block: bytes, *, status: bool) -> dict[str, str]:
    """A message's headers by name; the last one wins. A field that is not in HTTP's form is omitted.

    status: whether the first line may be the server's status. That is certain only in a message to an inbox without a reply
    subject. Otherwise any publisher can write the same line, and a field of the same name. Raises InvalidMessage.
    """
    if len(block) > MAX_HEADERS:
        raise InvalidMessage(f"a message with more than {MAX_HEADERS} bytes of headers")
    first, *lines = block.split(_CRLF, MAX_FIELDS + 2)
    if not first.startswith(_VERSION):
        raise InvalidMessage("headers that do not begin with NATS/1.0")
    if lines and _CRLF in lines[-1]:
        raise InvalidMessage(f"a message with more than {MAX_FIELDS} headers")
    found: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if colon and _FIELD_NAME.fullmatch(name):
            found[name.decode("ascii")] = value.strip().decode("utf-8", "replace")
    found.pop(STATUS, None)
    found.pop(DESCRIPTION, None)
    if status and (said := _STATUS_LINE.fullmatch(first)) is not None:
        found[STATUS] = said[1].decode("ascii")
        found[DESCRIPTION] = (said[2] or b"").decode("ascii")
    return found


def encode_publish(subject: str, payload: bytes, *, reply: str, headers: Mapping[str, str]) -> bytes:
    """A message with headers, as a client sends it. Raises UsageError for text that would be more than one word or line."""
    block = "".join(["NATS/1.0\r\n", *[f"{name}: {value}\r\n" for name, value in headers.items()], "\r\n"])
    if len(f"{subject} {reply}".split()) != 1 + bool(reply) or block.count("\n") + block.count("\r") != 2 * len(headers) + 4:
        raise UsageError("a subject or header for NATS has a space or a line end: pass one word, and one line")
    data = block.encode()
    return b"".join((f"HPUB {subject} {reply} {len(data)} {len(data) + len(payload)}\r\n".encode(), data, payload, _CRLF))
