"""Targets of what anybody may send to a port: HTTP requests, as our listeners read them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import h11

from fuzz.target import Script, Target
from lacre.runtime import http1
from parts.bent import cut

_EMPTY_LINES: Final = re.compile(rb"(?:\r\n)*")


@dataclass
class Message:
    """One request. whole: whether its end was reached."""

    head: http1.RequestHead
    content: bytes = b""
    whole: bool = False


def read(pieces: list[bytes]) -> tuple[list[Message], int | None]:
    """The requests, and the status of what cannot be read after them."""
    reader, messages = http1.RequestReader(encoded_slashes=True), list[Message]()
    try:
        for piece in pieces:
            reader.feed(piece)
            while (event := reader.next()) is not None:
                match event:
                    case http1.RequestHead():
                        messages.append(Message(event))
                    case http1.Body(content):
                        messages[-1].content += content
                    case http1.RequestEnd():
                        messages[-1].whole = True
    except http1.UnreadableRequest as exc:
        return messages, exc.status
    return messages, None


def parse(data: bytes) -> tuple[bytes, list[Message], int | None]:
    """The bytes of the connection, and what they hold: the same however they are cut."""
    script = Script(data)
    cuts = script.cuts()
    stream = script.rest()
    whole = read([stream])
    assert read(cut(stream, cuts)) == whole
    return stream, *whole


def holds(_data: bytes, parsed: tuple[bytes, list[Message], int | None]) -> None:
    """What was read has one reading: another implementation, which is more lenient, reads the same."""
    stream, messages, status = parsed
    assert status in (None, 400, 414, 417, 431, 501, 505)
    for message in messages:
        head = message.head
        assert len(head.fields) <= http1.MAX_FIELDS and len(head.path) + len(head.query) <= http1.MAX_TARGET
        assert sum(len(name) + len(value) for name, value in head.fields) <= http1.MAX_HEAD
        assert head.path.startswith(b"/") and b"//" not in head.path
        assert not any(byte in b"\r\n\x00" for name, value in head.fields for byte in name + value)
        assert head.length is None or not message.whole or head.length == len(message.content)
    if messages:
        same(stream[_EMPTY_LINES.match(stream).end() :], messages[0])  # type: ignore[union-attr]  # it matches anything


def fields(found: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """h11 writes one field's value anew."""
    return [(name, value.lower() if name == b"transfer-encoding" else value) for name, value in found]


def same(stream: bytes, message: Message) -> None:
    """h11 reads the first request as we do."""
    other, head = h11.Connection(h11.SERVER, max_incomplete_event_size=2 * http1.MAX_HEAD), message.head
    other.receive_data(stream)
    request = other.next_event()
    assert isinstance(request, h11.Request), request
    target = head.path + (b"?" + head.query if b"?" in request.target else b"")
    assert (request.method, request.target) == (head.method.encode(), target)
    assert request.http_version == head.version.encode()
    assert fields(request.headers) == fields(head.fields)
    if message.whole:  # else h11 may have refused it by now, and so may we
        content = b""
        while isinstance(event := other.next_event(), h11.Data):
            content += event.data
        assert isinstance(event, h11.EndOfMessage) and content == message.content


TARGETS: Final = (Target("request_head", parse, (), holds),)
