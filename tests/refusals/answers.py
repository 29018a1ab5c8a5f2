"""Sealed answers that were bent on their way, and Binary HTTP that no encoder of ours writes.

The answers are of one request whose exported secret is published here, so both SDKs open the very same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from lacre.wire import varint
from lacre.wire.bhttp import Data, End, ResponseDecoder, ResponseEncoder, ResponseHead
from lacre.wire.header import Aead, Kdf, Kem, SealedHeader, Suite
from lacre.wire.ohttp import ResponseOpener
from lacre.wire.opening import ResponseSealer
from parts.bent import flipped, replaced, swapped, without
from refusals.form import IN_MESSAGES, Case, Said, packed, said, unpacked

HEADER: Final = SealedHeader(1, Suite(Kem.X25519, Kdf.HKDF_SHA256, Aead.AES_128_GCM), bytes(range(32)))
OTHER: Final = SealedHeader(1, HEADER.suite, bytes(range(1, 33)))
SECRET: Final = bytes(range(16))
NONCE: Final = bytes(range(100, 116))
EVENTS: Final = [b'data: {"a":1}\n\n', b'data: {"b":2}\n\n', b"data: [DONE]\n\n"]
TRAILERS: Final = [("lacre-receipt", "e30.e30.AA")]
MOST: Final = 2**62 - 1


def message() -> list[bytes]:
    """An answer as the records of a worker."""
    encoder = ResponseEncoder()
    head = encoder.head(200, [("content-type", "text/event-stream")])
    return [head, *map(encoder.data, EVENTS), encoder.end(TRAILERS)]


def sealed(records: Iterable[bytes], header: SealedHeader = HEADER, nonce: bytes = NONCE, last: bytes = b"") -> list[bytes]:
    """The nonce, each record with its length, and the final chunk."""
    sealer = ResponseSealer(header, SECRET, nonce)
    begun = sealer.seal(b"")
    assert begun == nonce
    return [begun, *map(sealer.seal, records), sealer.finish(last)]


def bent(change: Callable[[list[bytes]], list[bytes]]) -> list[bytes]:
    return change(sealed(message()))


def unframed(chunk: bytes) -> bytes:
    """A chunk without its length."""
    found = varint.decode(chunk, 0)
    assert found is not None
    return chunk[found[1] :]


def joined(one: bytes, other: bytes) -> bytes:
    """Two chunks as one."""
    body = unframed(one) + unframed(other)
    return varint.encode(len(body)) + body


def lengthened(chunk: bytes, size: int) -> bytes:
    """A chunk whose length is written in so many bytes."""
    body = unframed(chunk)
    mark = {2: 0x4000, 4: 0x8000_0000, 8: 0xC000_0000_0000_0000}[size]
    return (mark | len(body)).to_bytes(size, "big") + body


ANSWERS: Final[dict[str, list[bytes]]] = {
    "as it should be": sealed(message()),
    "byte by byte": [bytes([byte]) for byte in b"".join(sealed(message()))],
    "at once": [b"".join(sealed(message()))],
    "the last record in the final chunk": sealed(message()[:-1], last=message()[-1]),
    "all of it in the final chunk": sealed([], last=b"".join(message())),
    "two records swapped": bent(lambda pieces: swapped(pieces, 2, 3)),
    "a record twice": bent(lambda pieces: [*pieces[:3], *pieces[2:]]),
    "the first record left out": bent(lambda pieces: without(pieces, 1)),
    "a record left out": bent(lambda pieces: without(pieces, 2)),
    "the last record left out": bent(lambda pieces: without(pieces, -2)),
    "a bit of the nonce": bent(lambda pieces: [flipped(pieces[0], 0), *pieces[1:]]),
    "a bit of a record": bent(lambda pieces: replaced(pieces, 2, flipped(pieces[2], 5, 3))),
    "a bit of a record's tag": bent(lambda pieces: replaced(pieces, 2, flipped(pieces[2]))),
    "a bit of the final chunk": bent(lambda pieces: replaced(pieces, -1, flipped(pieces[-1]))),
    "a record made longer": bent(
        lambda pieces: replaced(pieces, 2, varint.encode(len(unframed(pieces[2])) + 1) + unframed(pieces[2]) + b"\0")
    ),
    "two records joined": bent(lambda pieces: [*pieces[:2], joined(pieces[2], pieces[3]), *pieces[4:]]),
    "a record of its own": bent(lambda pieces: [*pieces[:2], b"\x20" + bytes(32), *pieces[2:]]),
    "an empty record of one byte": bent(lambda pieces: [*pieces[:2], b"\x01\0", *pieces[2:]]),
    "an empty record with its tag": bent(lambda pieces: [*pieces[:2], b"\x10" + bytes(16), *pieces[2:]]),
    "ended between two records": bent(lambda pieces: pieces[:3]),
    "ended before its final chunk": bent(lambda pieces: pieces[:-1]),
    "ended inside a record": bent(lambda pieces: [*pieces[:2], pieces[2][:9]]),
    "ended inside the final chunk": bent(lambda pieces: [*pieces[:-1], pieces[-1][:9]]),
    "ended inside a length": bent(lambda pieces: [*pieces[:2], b"\x40"]),
    "an earlier record as the final one": bent(lambda pieces: [*pieces[:2], b"\0" + unframed(pieces[2])]),
    "the final chunk as one that others follow": bent(
        lambda pieces: [*pieces[:-1], varint.encode(len(pieces[-1]) - 1) + pieces[-1][1:], b"\0" + bytes(16)]
    ),
    "a byte after the end": bent(lambda pieces: [*pieces, b"\0"]),
    "a second answer after the end": bent(lambda pieces: [*pieces, *pieces[1:]]),
    "an empty body": [],
    "a nonce that is cut": bent(lambda pieces: [pieces[0][:15]]),
    "a nonce alone": bent(lambda pieces: pieces[:1]),
    "lengths in two bytes": bent(lambda pieces: [pieces[0], *(lengthened(each, 2) for each in pieces[1:-1]), pieces[-1]]),
    "lengths in four bytes": bent(lambda pieces: [pieces[0], *(lengthened(each, 4) for each in pieces[1:-1]), pieces[-1]]),
    "lengths in eight bytes": bent(lambda pieces: [pieces[0], *(lengthened(each, 8) for each in pieces[1:-1]), pieces[-1]]),
    "a length of zero in eight bytes": bent(lambda pieces: [*pieces[:-1], b"\xc0" + bytes(7) + pieces[-1][1:]]),
    "a record of 2^62 - 1 bytes": bent(lambda pieces: [*pieces[:2], b"\xff" * 8, *pieces[2:]]),
    "a record of 16 KiB and a byte": bent(lambda pieces: [*pieces[:2], varint.encode(16384 + 17)]),
    "a record of exactly 16 KiB, cut": bent(lambda pieces: [*pieces[:2], varint.encode(16384 + 16)]),
    "a final chunk of 16 KiB and a byte": bent(lambda pieces: [*pieces[:2], b"\0" + bytes(16384 + 17)]),
    "a final chunk without a tag": bent(lambda pieces: [*pieces[:-1], b"\0" + bytes(15)]),
    "an answer in the clear": [b'{"choices":[]}' * 9],
    "sealed for another request": sealed(message(), OTHER),
    "its nonce of another answer": bent(lambda pieces: [bytes(16), *pieces[1:]]),
    "zeros after the message": sealed([*message(), bytes(600)]),
    "something else after the message": sealed([*message(), b"\0\1"]),
    "a message that is cut, whole in its seal": sealed(message()[:-2]),
    "no message in the seal": sealed([]),
    "a request in the seal": sealed([b"\x00\x03GET"]),
}  # fmt: skip


def string(text: bytes) -> bytes:
    return varint.encode(len(text)) + text


def field(name: bytes, value: bytes) -> bytes:
    return string(name) + string(value)


def streamed(*fields: bytes, status: int = 200, content: bytes = b"", trailers: bytes = b"") -> bytes:
    """A response of indeterminate length."""
    return (
        b"\x03"
        + varint.encode(status)
        + b"".join(fields)
        + b"\0"
        + (string(content) if content else b"")
        + b"\0"
        + trailers
        + b"\0"
    )


def known(*fields: bytes, status: int = 200, content: bytes = b"", trailers: bytes = b"") -> bytes:
    """A response of known length."""
    return b"\x01" + varint.encode(status) + string(b"".join(fields)) + string(content) + string(trailers)


LONG: Final = b"a" * 256
BOTH: Final[dict[str, tuple[tuple[bytes, ...], dict[str, Any]]]] = {
    "a field": ((field(b"a", b"b"),), {}),
    "a field with an empty value": ((field(b"a", b""),), {}),
    "a name of 256 bytes": ((field(LONG, b""),), {}),
    "a name of 257 bytes": ((field(LONG + b"a", b""),), {}),
    "a value of 16384 bytes": ((field(b"a", b"b" * 16384),), {}),
    "a value of 16385 bytes": ((field(b"a", b"b" * 16385),), {}),
    "a section of 65536 bytes and more": (tuple(field(b"a%d" % n, b"b" * 16000) for n in range(5)), {}),
    "128 fields": ((field(b"a", b"b"),) * 128, {}),
    "129 fields": ((field(b"a", b"b"),) * 129, {}),
    "129 trailers": ((), {"trailers": field(b"a", b"b") * 129}),
    "trailers of 32768 bytes and more": ((), {"trailers": field(b"a", b"b" * 16000) * 3}),
    "a capital letter in a name": ((field(b"Aa", b"b"),), {}),
    "a pseudo-field": ((field(b":status", b"200"),), {}),
    "a space in a name": ((field(b"a a", b"b"),), {}),
    "a name beyond ASCII": ((field(b"\xe4", b"b"),), {}),
    "a line break in a value": ((field(b"a", b"b\r\nc: d"),), {}),
    "a NUL in a value": ((field(b"a", b"b\0c"),), {}),
    "a tab in a value": ((field(b"a", b"b\tc"),), {}),
    "a delete character in a value": ((field(b"a", b"b\x7fc"),), {}),
    "Latin-1 in a value": ((field(b"a", b"\xe4\x80"),), {}),
    "a space before a value": ((field(b"a", b" b"),), {}),
    "a tab after a value": ((field(b"a", b"b\t"),), {}),
    "a field of the connection": ((field(b"connection", b"close"),), {}),
    "a transfer coding": ((field(b"transfer-encoding", b"chunked"),), {}),
    "te: gzip": ((field(b"te", b"gzip"),), {}),
    "te: trailers": ((field(b"te", b"trailers"),), {}),
    "a field of the connection as a trailer": ((), {"trailers": field(b"upgrade", b"h2")}),
    "the right content-length": ((field(b"content-length", b"3"),), {"content": b"abc"}),
    "a content-length too short": ((field(b"content-length", b"2"),), {"content": b"abc"}),
    "a content-length too long": ((field(b"content-length", b"4"),), {"content": b"abc"}),
    "a content-length without content": ((field(b"content-length", b"4"),), {}),
    "a content-length twice": ((field(b"content-length", b"3"),) * 2, {"content": b"abc"}),
    "two content-lengths": ((field(b"content-length", b"3"), field(b"content-length", b"4")), {"content": b"abc"}),
    "a content-length with a sign": ((field(b"content-length", b"+3"),), {"content": b"abc"}),
    "a content-length with a zero before it": ((field(b"content-length", b"03"),), {"content": b"abc"}),
    "a content-length of 16 digits": ((field(b"content-length", b"0" * 15 + b"3"),), {"content": b"abc"}),
    "an empty content-length": ((field(b"content-length", b""),), {}),
    **{f"status {status}": ((), {"status": status}) for status in (0, 99, 101, 200, 204, 304, 599, 600, 999, MOST)},
}
EITHER: Final = {"streamed": streamed, "of known length": known}
MESSAGES: Final[dict[str, bytes]] = {
    **{f"{name}, {form}": make(*fields, **rest) for form, make in EITHER.items() for name, (fields, rest) in BOTH.items()},
    "an informational one before": b"\x03\x40\x66\0" + streamed()[1:],
    "16 informational ones": b"\x03" + b"\x40\x66\0" * 16 + streamed()[1:],
    "17 informational ones": b"\x03" + b"\x40\x66\0" * 17 + streamed()[1:],
    "100 switching protocols": b"\x03\x40\x65\0" + streamed()[1:],
    "an informational one alone": b"\x03\x40\x66\0",
    "nothing": b"",
    "a known-length request": b"\x00\x03GET\x05https\x00\x01/\0\0\0",
    "another framing": b"\x04",
    "a framing in eight bytes": b"\xc0" + bytes(6) + b"\x03" + streamed()[1:],
    "a status alone": b"\x03\x40\xc8",
    "a status alone, of known length": b"\x01\x40\xc8",
    "a status that is cut": b"\x03\x40",
    "fields that have no end": b"\x03\x40\xc8" + field(b"a", b"b"),
    "a field that is cut": b"\x03\x40\xc8\x05ab",
    "ended after its fields": b"\x03\x40\xc8\0",
    "ended inside its content": b"\x03\x40\xc8\0\x05abc",
    "ended between two pieces of content": b"\x03\x40\xc8\0\x03abc",
    "ended before its trailers": b"\x03\x40\xc8\0\x03abc\0",
    "ended inside its trailers": b"\x03\x40\xc8\0\x03abc\0\x01a",
    "of known length, ended after its fields": b"\x01\x40\xc8\0",
    "of known length, ended before its trailers": b"\x01\x40\xc8\0\x03abc",
    "of known length, ended inside its content": b"\x01\x40\xc8\0\x03ab",
    "a field that reaches past its section": b"\x01\x40\xc8\x03\x05ab\0\0",
    "a section that is cut": b"\x01\x40\xc8\x05\x01a",
    "content of 2^62 - 1 bytes": b"\x03\x40\xc8\0" + b"\xff" * 8,
    "content of 2^30 bytes and one": b"\x01\x40\xc8\0" + varint.encode(2**30 + 1),
    "zeros after it": streamed() + bytes(9),
    "zeros, and something else": streamed() + bytes(9) + b"\x01",
    "of known length, zeros after it": known() + bytes(9),
    "two messages": streamed() + streamed(),
}


def cases() -> dict[str, Any]:
    """The content of the file of sealed answers."""
    made: list[Case] = [{"name": name, "pieces": [packed(each) for each in pieces]} for name, pieces in ANSWERS.items()]
    return {
        "about": "Sealed answers to one request. docs/wire.md sections 7 and 8.",
        "enc": HEADER.enc.hex(), "aead": int(HEADER.suite.aead), "secret": SECRET.hex(),
        "cases": [case | {"said": check({}, case)} for case in made],
    }  # fmt: skip


def message_cases() -> dict[str, Any]:
    """The content of the file of messages."""
    made: list[Case] = [{"name": name, "message": packed(data)} for name, data in MESSAGES.items()]
    return {
        "about": "Responses in Binary HTTP. docs/wire.md section 9.",
        "cases": [case | {"said": check_message({}, case)} for case in made],
    }


def check(_content: Mapping[str, Any], case: Case) -> Said:
    """What the SDK says of a sealed answer of the file."""
    return said(lambda: _read(map(unpacked, case["pieces"])), IN_MESSAGES)


def _read(pieces: Iterable[bytes]) -> list[Any]:
    opener, decoder = ResponseOpener(HEADER, SECRET), ResponseDecoder()
    events = [event for piece in pieces for record in opener.feed(piece) for event in decoder.feed(record)]
    events += [event for record in opener.close() for event in decoder.feed(record)]
    return _told([*events, *decoder.close()])


def check_message(_content: Mapping[str, Any], case: Case) -> Said:
    """What the SDK says of a message of the file: at once, and the same byte by byte."""
    data = unpacked(case["message"])
    whole = said(lambda: _decoded([data]), IN_MESSAGES)
    assert whole == said(lambda: _decoded([bytes([byte]) for byte in data]), IN_MESSAGES)
    return whole


def _decoded(pieces: Iterable[bytes]) -> list[Any]:
    decoder = ResponseDecoder()
    events = [event for piece in pieces for event in decoder.feed(piece)]
    return _told([*events, *decoder.close()])


def _told(events: Iterable[object]) -> list[Any]:
    """Statuses, how many fields each head has, the content, and how many trailers there are."""
    told: list[Any] = []
    content = b""
    for event in events:
        if isinstance(event, ResponseHead):
            told += [event.status, len(event.headers)]
        elif isinstance(event, Data):
            content += event.content
        elif isinstance(event, End):
            told += [content.decode("latin-1"), len(event.trailers)]
    return told
