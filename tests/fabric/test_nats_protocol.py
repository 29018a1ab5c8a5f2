"""What a server sends, taken apart: whatever a peer chose of it, the next message begins where it begins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre.errors import InvalidMessage
from lacre_fabric.nats import protocol
from lacre_fabric.nats.protocol import MAX_FIELDS, MAX_HEADERS, MAX_LINE, MAX_SIZE, NatsMessage, ProtocolReader, fields

# As nats-server lets them through: anything but a space, a tab and the end of a line.
SUBJECT = st.binary(min_size=1, max_size=30).map(lambda raw: raw.translate(None, b" \t\n")).filter(bool)
BLOCK = st.binary(max_size=40)
MESSAGES = st.builds(NatsMessage, st.integers(0, 10**9), SUBJECT, SUBJECT | st.just(b""), BLOCK, st.binary(max_size=40))


def on_the_wire(message: NatsMessage) -> bytes:
    """As nats-server writes it."""
    words = [message.subject, b"%d" % message.sid, *([message.reply] if message.reply else [])]
    name, size = b"MSG", len(message.payload)
    if message.headers:
        name, size = b"HMSG", size + len(message.headers)
        words.append(b"%d" % len(message.headers))
    return b" ".join([name, *words, b"%d" % size]) + b"\r\n" + message.headers + message.payload + b"\r\n"


@given(st.lists(MESSAGES, max_size=5), st.integers(1, 60))
def test_every_message_comes_as_it_was_sent(messages: list[NatsMessage], step: int) -> None:
    """However it is cut. A subject with a form feed or a lone carriage return names no other subscription."""
    sent = b"PING\r\n" + b"".join(map(on_the_wire, messages)) + b"PONG\r\n"
    reader = ProtocolReader()
    heard = [event for at in range(0, len(sent), step) for event in reader.feed(sent[at : at + step])]
    assert heard == [protocol.Control(b"PING", b""), *messages, protocol.Control(b"PONG", b"")]


def test_an_empty_reply_subject_is_none() -> None:
    """As nats-server writes its own advisories of JetStream: two spaces side by side."""
    sent = b"MSG $JS.EVENT.ADVISORY.API 1  2\r\n{}\r\nHMSG a 1  3 5\r\nabchi\r\n"
    assert list(ProtocolReader().feed(sent)) == [
        NatsMessage(1, b"$JS.EVENT.ADVISORY.API", b"", b"", b"{}"),
        NatsMessage(1, b"a", b"", b"abc", b"hi"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        *(b"MSG a " + rest + b"\r\n" for rest in (b"1", b"1 r x 5", b"x 5", b" 1 5", b"1 -5", b"1 \xd9\xa1", b"1 2\r\nabc")),
        *(b"MSG a 1 %d\r\n" % size for size in (MAX_SIZE + 1, 10**19 - 1)),
        *(b"HMSG a 1 7 5\r\n", b"HMSG a 1 5\r\n", b"msg a 1 5\r\n", b"\r\n", b"x" * MAX_LINE),
    ],
)
def test_what_the_protocol_does_not_have_is_said_to_be_that(line: bytes) -> None:
    with pytest.raises(protocol.BrokenProtocol):
        list(ProtocolReader().feed(line + b"hello\r\n"))


def test_a_message_too_long_is_dropped_as_it_arrives() -> None:
    reader, size = ProtocolReader(keep=100), 10_000
    heard: list[protocol.Event] = list(reader.feed(b"MSG a 7 %d\r\n" % size))
    for _ in range(10):
        heard += reader.feed(bytes(1000))
        assert len(reader._buffer) == 0
    heard += reader.feed(b"\r\nMSG b 8 2\r\nhi\r\n")
    assert heard == [protocol.Oversized(7, size), NatsMessage(8, b"b", b"", b"", b"hi")]


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda raw: b"NATS/1.0" + raw), st.booleans())
def test_no_header_raises_anything_but_its_own_error(block: bytes, status: bool) -> None:
    try:
        found = fields(block, status=status)
    except InvalidMessage:
        return
    assert all(name.isascii() for name in found)


def test_a_status_is_the_servers_alone() -> None:
    block = b"NATS/1.0 404 No Messages\r\nA: b\r\nStatus: 503\r\nDescription: x\r\n\r\n"
    assert fields(block, status=True) == {"Status": "404", "Description": "No Messages", "A": "b"}
    assert fields(block, status=False) == {"A": "b"}


@pytest.mark.parametrize("line", [b" \xff\xff\xff", b" 100 \xff\xff", b" 10", b" 1000", b"404", b" -10 x"])
def test_a_status_line_that_is_none_says_nothing(line: bytes) -> None:
    assert fields(b"NATS/1.0" + line + b"\r\nA: b\r\n\r\n", status=True) == {"A": "b"}


def test_headers_are_bounded() -> None:
    most = b"NATS/1.0\r\n" + b"".join(b"A%d: b\r\n" % number for number in range(MAX_FIELDS)) + b"\r\n"
    assert len(fields(most, status=False)) == MAX_FIELDS
    with pytest.raises(InvalidMessage, match="more than 64 headers"):
        fields(most[:-2] + b"B: c\r\n\r\n", status=False)
    with pytest.raises(InvalidMessage, match="bytes of headers"):
        fields(b"NATS/1.0\r\nA: " + b"b" * MAX_HEADERS, status=False)
    for block in (b"", b"\r\n", b"x", b"NATS/2.0\r\n\r\n"):
        with pytest.raises(InvalidMessage, match="begin with"):
            fields(block, status=False)
