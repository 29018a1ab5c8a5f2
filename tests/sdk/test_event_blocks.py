"""Event streams, whatever ends their lines and wherever they are cut."""

from __future__ import annotations

import json

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lacre
from lacre import asgi
from lacre.exchange.event_blocks import EventBlocks, data_of, field
from lacre.exchange.resume_marks import Mark
from lacre.exchange.sse_join import Splice
from parts.bent import cut, without
from parts.relay import Relay, connect

WORDS = ["one ", "日本 ", "😀", ""]
ENDS = st.sampled_from([b"\n", b"\r", b"\r\n"])
BOM = b"\xef\xbb\xbf"


def chunk(word: str) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": word}}]}, ensure_ascii=False)


def lines(marked: bool) -> list[str]:
    """Of a stream with a comment, other fields, and data over several lines."""
    said = [": fill", ""]
    for number, word in enumerate(WORDS, 1):
        said += [f"id: {Mark(3, 0, number, [number])}"] if marked else ["event: message"]
        said += [f"data: {part}" for part in chunk(word).replace(', "delta"', ',\n"delta"').split("\n")] + [""]
    return [*said, "data: [DONE]", ""]


def ended(lines: list[str], ends: list[bytes]) -> bytes:
    """A blank line after a CR does not end by LF: both together would be one end."""
    stream = b""
    for line, end in zip(lines, ends, strict=False):
        stream += line.encode() + (b"\r" if not line and stream.endswith(b"\r") and end == b"\n" else end)
    return stream


@given(st.lists(ENDS, min_size=40, max_size=40), st.booleans(), st.booleans(), st.lists(st.integers(0, 2000)))
def test_the_text_is_the_same(ends: list[bytes], bom: bool, marked: bool, places: list[int]) -> None:
    stream = BOM * bom + ended(lines(marked), ends)
    splice = Splice(marked=marked)
    out = b"".join(map(splice.feed, cut(stream, places)))
    assert splice.text == "".join(WORDS)
    assert marked or out == stream
    assert splice.tokens == ([1, 2, 3, 4] if marked else [])


BYTES = st.lists(st.sampled_from([b"\r", b"\n", b"data: x", b":", BOM]), max_size=12).map(b"".join)


@given(BYTES, st.lists(st.integers(0, 99)))
def test_pieces_make_no_difference(stream: bytes, places: list[int]) -> None:
    whole, parts = EventBlocks(), EventBlocks()
    blocks = whole.feed(stream)
    pieces = [block for piece in cut(stream, places) for block in parts.feed(piece)]
    said = [field(block, b"data") for block in blocks if field(block, b"data")]
    assert [field(block, b"data") for block in pieces if field(block, b"data")] == said


def test_a_long_event_in_small_pieces_is_looked_at_once() -> None:
    """What was looked at is not copied for each piece: an event of 900 kB in pieces of one byte took minutes."""
    blocks = EventBlocks()
    pending = blocks.pending
    sent = b": a comment\r\n\r\ndata: " + b"y" * 20_000
    assert not any(any(blocks.feed(sent[at : at + 1])) for at in range(len(sent)))
    assert blocks.pending is pending and len(pending) == len(b"data: ") + 20_000
    assert blocks.feed(b"\r") == []
    assert list(map(data_of, blocks.feed(b"\n\ndata: z\n\n"))) == [b"y" * 20_000, b"z"]


def streaming(pieces: list[bytes]) -> asgi.App:
    async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        await receive()
        used = scope["extensions"][asgi.EXTENSION].usage
        used.prompt_tokens, used.completion_tokens, used.model_digest = 3, 4, "sha256:1"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_chat(end: str, bom: str, size: int) -> None:
    stream = (bom + end.join(lines(marked=False)) + end).encode()
    app = streaming([stream[at : at + size] for at in range(0, len(stream), size)])
    with connect(Relay(app)) as client:
        chat = client.chat_stream("Hello.")
        assert "".join(chat) == chat.text == "".join(WORDS)


def test_what_broke_off_keeps_its_text() -> None:
    app = streaming([f"data: {chunk(word)}\r\n\r\n".encode() for word in WORDS])
    relay = Relay(app, fault=httpx2.RemoteProtocolError("gone"), bend=without)
    with connect(relay) as client, pytest.raises(lacre.StreamBroken) as broken:
        list(client.chat_stream("Hello."))
    assert broken.value.text == "".join(WORDS)
