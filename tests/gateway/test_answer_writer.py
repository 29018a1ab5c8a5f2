"""The bytes of one answer: what any reader of HTTP/1.1 makes of them, and what is never written."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre_gateway.http.answer_writer import HttpAnswer, OutOfOrder, UnsafeField

NAMES = st.from_regex(rb"x-[a-z][a-z0-9-]{0,10}", fullmatch=True)
VALUES = st.from_regex(rb"[!-~](?:[ -~]{0,20}[!-~])?", fullmatch=True)
PIECES = st.lists(st.lists(st.binary(max_size=40), max_size=3), max_size=5)


def read(written: bytes, *, closed: bool) -> tuple[int, dict[bytes, bytes], bytes, bool]:
    """Status, fields and body as h11 reads them, and whether another request may follow."""
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
    reader.send(h11.EndOfMessage())
    reader.receive_data(written)
    if closed:
        reader.receive_data(b"")
    head = reader.next_event()
    assert isinstance(head, h11.Response)
    body = b""
    while isinstance(event := reader.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    return head.status_code, dict(head.headers), body, reader.their_state is h11.DONE


@given(
    st.sampled_from([200, 400, 401, 503]), st.dictionaries(NAMES, VALUES, max_size=4), PIECES, st.booleans(),
    st.sampled_from(["1.0", "1.1"]), st.booleans(),
)  # fmt: skip
def test_read_as_written(
    status: int, fields: dict[bytes, bytes], pieces: list[list[bytes]], keep_alive: bool, version: str, announced: bool
) -> None:
    body = b"".join(piece for chunk in pieces for piece in chunk)
    given = [*fields.items(), *([(b"content-length", b"%d" % len(body))] if announced else [])]
    writer = HttpAnswer(version, keep_alive=keep_alive)
    written = writer.head(status, given) + b"".join(map(writer.chunk, pieces)) + writer.end()
    lives = keep_alive and version == "1.1"
    assert (writer.whole, writer.keep_alive) == (True, lives)
    got = read(written, closed=not lives)
    assert (got[0], got[2]) == (status, body) and {**got[1], **fields} == got[1]
    assert lives == (got[3] and b"connection" not in got[1])
    if version == "1.0":
        assert b"transfer-encoding" not in got[1]


def test_an_answer_without_its_end_is_never_whole() -> None:
    writer = HttpAnswer("1.1", keep_alive=True)
    written = writer.head(200, []) + writer.chunk([b"abc"])
    with pytest.raises(h11.RemoteProtocolError):
        read(written, closed=True)
    assert not writer.whole


def test_no_bytes_are_no_chunk() -> None:
    """An empty chunk would be the last one."""
    writer = HttpAnswer("1.1", keep_alive=True)
    writer.head(200, [])
    assert (writer.chunk([]), writer.chunk([b"", b""]), writer.end([b"a", b"", b"b"])) == (b"", b"", b"2\r\nab\r\n0\r\n\r\n")


def test_close_by_a_field() -> None:
    writer = HttpAnswer("1.1", keep_alive=True)
    head = writer.head(200, [(b"content-length", b"0"), (b"connection", b"close")])
    assert (writer.keep_alive, head.count(b"connection")) == (False, 1)


@pytest.mark.parametrize("octet", [b"\r\n", b"\n", b"\r", b"\x00", b"\x7f", b"\x1f"])
def test_no_field_begins_another(octet: bytes) -> None:
    for field in ((b"x", b"a" + octet + b"set-cookie: b"), (b"x" + octet, b"a")):
        writer = HttpAnswer("1.1", keep_alive=True)
        with pytest.raises(UnsafeField):
            writer.head(200, [(b"y", b"z"), field])
        assert not writer.begun


def test_out_of_order() -> None:
    writer = HttpAnswer("1.1", keep_alive=True)
    for early in (writer.chunk, writer.end):
        with pytest.raises(OutOfOrder):
            early([b"a"])
    writer.head(200, [(b"content-length", b"3")])
    with pytest.raises(OutOfOrder):
        writer.head(200, [])
    with pytest.raises(OutOfOrder):
        writer.chunk([b"abcd"])
    writer.chunk([b"ab"])
    with pytest.raises(OutOfOrder):
        writer.end()
    assert writer.end([b"c"]) == b"c"
    with pytest.raises(OutOfOrder):
        writer.end()
