"""What a chat answers, whole and streamed, sync and async: every choice, every call, and nothing that came is dropped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lacre
from lacre import asgi, problems
from lacre.asgi import EXTENSION
from lacre.chat.choices import Finished, Growing, ReasoningDelta, RefusalDelta, TextDelta, ToolCallDelta
from lacre.chat.stream import Deltas
from lacre.exchange.event_blocks import EventBlocks, data_of, field
from lacre.exchange.resume_marks import Mark
from lacre.exchange.sse_join import Splice
from parts.bent import cut, without
from parts.relay import Relay, connect, connect_async, refusing

SECRET = "what the model said"
CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": '{"zone":"CET"}'}},
]
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}


def logprob(token: str) -> dict[str, Any]:
    return {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}


def message(content: str | None, **members: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **members}


class Scripted:
    """An app that answers with these choices; as a stream, cut into deltas."""

    def __init__(self, *choices: dict[str, Any]) -> None:
        self.choices = [{"index": index, "finish_reason": "stop", **choice} for index, choice in enumerate(choices)]

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        streamed = json.loads((await receive())["body"]).get("stream")
        used = scope["extensions"][EXTENSION].usage
        used.prompt_tokens, used.cached_tokens, used.completion_tokens, used.model_digest = 7, 2, 3, "sha256:77"
        kind = b"text/event-stream" if streamed else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        for event in self.events() if streamed else ():
            body = f"data: {json.dumps({'id': 'c1', 'model': 'tiny', **event})}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        whole = json.dumps({"id": "c1", "model": "tiny", "choices": self.choices, "usage": USAGE}).encode()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n" if streamed else whole})

    def events(self) -> Iterator[dict[str, Any]]:
        for choice in self.choices:
            for delta, logprobs in deltas(choice):
                yield {"choices": [{"index": choice["index"], "delta": delta, "logprobs": logprobs, "finish_reason": None}]}
        for choice in self.choices:
            yield {"choices": [{"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}]}
        yield {"choices": [], "usage": USAGE}


def deltas(choice: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """A message, in pieces of a few characters, as workers send one."""
    said = choice["message"]
    yield {"role": "assistant", "content": "" if said.get("content") else None}, None
    listed = list((choice.get("logprobs") or {}).get("content", ()))
    for name in ("reasoning_content", "content", "refusal"):
        for piece in pieces(said.get(name) or ""):
            yield {name: piece}, {"content": [listed.pop(0)]} if listed else None
    for index, call in enumerate(said.get("tool_calls", ())):
        opened = {**call, "function": {"name": call["function"]["name"], "arguments": ""}}
        yield {"tool_calls": [{"index": index, **opened}]}, None
        for piece in pieces(call["function"]["arguments"]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}, None


def pieces(text: str) -> Iterator[str]:
    yield from (text[at : at + 5] for at in range(0, len(text), 5))


def both(app: Scripted, ask: Callable[[lacre.Client], Any], later: Callable[[lacre.AsyncClient], Any]) -> list[Any]:
    """What the sync client says, and what the async one does."""
    relay = Relay(app)
    with connect(relay) as client:
        said = ask(client)

    async def awaited() -> Any:
        async with connect_async(relay) as other:
            return await later(other)

    return [said, asyncio.run(awaited())]


def replies(app: Scripted, **params: Any) -> list[lacre.Reply]:
    """The same answer by all four ways."""
    ways: list[Callable[[Any], Any]] = [
        lambda client: client.chat("x", max_tokens=9, **params),
        lambda client: client.chat_stream("x", max_tokens=9, **params).reply(),
    ]
    return [reply for ask in ways for reply in both(app, ask, ask)]


ANSWERS: dict[str, list[dict[str, Any]]] = {
    "calls of functions": [{"message": message(None, tool_calls=CALLS), "finish_reason": "tool_calls"}],
    "text and calls": [{"message": message("I will look.", tool_calls=CALLS[:1])}],
    "every choice": [{"message": message(text)} for text in ("one one", "two", "three three")],
    "reasoning, refusal, logprobs": [
        {
            "message": message("five five", refusal="no", reasoning_content="hm, so"),
            "logprobs": {"content": [logprob("five "), logprob("five")]},
        }
    ],
}


@pytest.mark.parametrize("choices", ANSWERS.values(), ids=ANSWERS)
def test_nothing_is_dropped(choices: list[dict[str, Any]]) -> None:
    for reply in replies(Scripted(*choices), n=len(choices)):
        first = reply.choices[0]
        assert (reply.text, reply.refusal, reply.reasoning) == (first.text, first.refusal, first.reasoning)
        assert (reply.message, reply.tool_calls, reply.logprobs) == (first.message, first.tool_calls, first.logprobs)
        assert reply.finish_reason == choices[0].get("finish_reason", "stop")
        assert (reply.id, reply.model, reply.attempts) == ("c1", "tiny", 1)
        assert reply.usage == lacre.TokenUsage(prompt=7, completion=3, cached=2)
        for index, (read, sent) in enumerate(zip(reply.choices, choices, strict=True)):
            said, functions = sent["message"], [call["function"] for call in sent["message"].get("tool_calls", ())]
            assert (read.index, read.message) == (index, said)
            found = (read.text, read.refusal, read.reasoning)
            assert found == (said["content"] or "", said.get("refusal"), said.get("reasoning_content"))
            assert [call.id for call in read.tool_calls] == [call["id"] for call in CALLS[: len(functions)]]
            assert [(call.name, call.arguments) for call in read.tool_calls] == [tuple(each.values()) for each in functions]
            assert [call.parsed() for call in read.tool_calls] == [json.loads(each["arguments"]) for each in functions]
            logprobs = [(each.token, each.logprob, each.top) for each in read.logprobs or ()]
            assert logprobs == ([("five ", -0.5, ()), ("five", -0.5, ())] if "logprobs" in sent else [])


def test_members_without_a_name_here_are_put_together() -> None:
    growing = Growing(0)
    for delta in ({"audio": {"id": "a", "data": "xy"}}, {"audio": {"data": "z"}, "more": [1]}, {"more": [2], "flag": True}):
        growing.add({"delta": delta})
    assert growing.whole()["message"] == message(None, audio={"id": "a", "data": "xyz"}, more=[1, 2], flag=True)


@pytest.mark.parametrize(
    "call",
    [
        {"id": "c", "type": "custom", "custom": {"name": "sh", "input": "ls"}},
        {"id": "c", "type": "function", "function": {"name": "sh", "arguments": "ls"}},
    ],
)
def test_calls_that_say_no_index(call: dict[str, Any]) -> None:
    reader = Deltas()
    reader.feed(json.dumps({"choices": [{"delta": {"tool_calls": [call]}}]}))
    [read] = reader.choices[0].tool_calls
    assert (read.id, read.type, read.name, read.arguments) == ("c", call["type"], "sh", "ls")
    with pytest.raises(lacre.InvalidMessage, match="not a JSON object") as caught:
        read.parsed()
    assert "ls" not in str(caught.value)


async def events_of(client: lacre.AsyncClient) -> list[object]:
    async with client.chat_stream("x") as stream:
        return [event async for event in stream.events()]


class TestEvents:
    APP = Scripted({"message": message("hello", tool_calls=CALLS[:1])}, {"message": message("world")})

    def test_all_of_them_live(self) -> None:
        for events in both(self.APP, lambda client: list(client.chat_stream("x").events()), events_of):
            assert TextDelta(0, "hello") in events and TextDelta(1, "world") in events
            calls = [event for event in events if isinstance(event, ToolCallDelta)]
            assert (calls[0].id, calls[0].name, calls[0].index) == ("call_1", "weather", 0)
            assert "".join(call.arguments for call in calls) == '{"city":"Rome"}'
            assert [event for event in events if isinstance(event, Finished)] == [Finished(0, "stop"), Finished(1, "stop")]

    def test_the_pieces_are_the_first_choices_and_the_rest_is_kept(self) -> None:
        streams: list[Any] = []

        def pieces(client: lacre.Client) -> list[str]:
            streams.append(client.chat_stream("x", n=2))
            return list(streams[0])

        async def awaited(client: lacre.AsyncClient) -> list[str]:
            return [piece async for piece in client.chat_stream("x", n=2)]

        assert both(self.APP, pieces, awaited) == [["hello"], ["hello"]]
        [stream] = streams
        assert [choice.text for choice in stream.choices] == ["hello", "world"]
        assert (stream.message["tool_calls"], stream.tool_calls[0].name) == (CALLS[:1], "weather")
        assert list(stream) == []

    def test_other_kinds(self) -> None:
        app = Scripted({"message": {"role": "assistant", "reasoning_content": "hm", "refusal": "no"}})
        for events in both(app, lambda client: list(client.chat_stream("x").events()), events_of):
            assert events == [ReasoningDelta(0, "hm"), RefusalDelta(0, "no"), Finished(0, "stop")]


class TestLeft:
    APP = Scripted({"message": message("many pieces of text", tool_calls=CALLS)})

    def test_all_that_came_is_kept_and_nothing_raises(self) -> None:
        def leave(client: lacre.Client) -> Any:
            stream = client.chat_stream("x")
            known(stream)
            assert (stream.attempts, stream.facts, stream.verification, stream.receipts) == (0, None, None, ())
            for event in stream.events():
                known(stream)
                if isinstance(event, ToolCallDelta) and event.arguments:
                    break
            stream.close()
            with pytest.raises(lacre.UsageError, match="given up"):
                stream.reply()
            return stream

        async def later(client: lacre.AsyncClient) -> Any:
            stream = client.chat_stream("x")
            async for event in stream.events():
                if isinstance(event, ToolCallDelta) and event.arguments:
                    break
            await stream.aclose()
            with pytest.raises(lacre.UsageError, match="given up"):
                await stream.reply()
            return stream

        for stream in both(self.APP, leave, later):
            known(stream)
            assert stream.text == "many pieces of text"
            assert [(call.name, call.arguments) for call in stream.tool_calls] == [("weather", '{"cit')]
            assert (stream.usage, stream.receipt, stream.receipts, stream.parts) == (None, None, (), ())
            assert (stream.attempts, stream.recount(), stream.verification.receipt) == (1, None, None)
            assert stream.audit is stream.verification.audit is not None

    async def test_a_cancellation_stays_one(self) -> None:
        begun, streams = asyncio.Event(), list[Any]()

        async def read(client: lacre.AsyncClient) -> None:
            streams.append(client.chat_stream("x"))
            try:
                async for _ in streams[0]:
                    begun.set()
                    await asyncio.Event().wait()
            finally:
                known(streams[0])

        async with connect_async(Relay(self.APP)) as client:
            task = asyncio.create_task(read(client))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert streams[0].text == "many "

    def test_a_refusal_before_the_first_piece(self) -> None:
        with connect(Relay(self.APP, respond=refusing(problems.FORBIDDEN))) as client:
            stream = client.chat_stream("x")
            with pytest.raises(lacre.Forbidden):
                list(stream)
            with pytest.raises(lacre.UsageError, match="ended with an error"):
                stream.reply()
        known(stream)
        assert (stream.attempts, stream.usage) == (1, None)

    def test_two_readers(self) -> None:
        streams: list[lacre.ChatStream] = []

        def hook(_response: object) -> None:
            for use in (lambda: next(streams[0]), streams[0].close):
                with pytest.raises(lacre.UsageError, match="another thread"):
                    use()

        with connect(Relay(self.APP), event_hooks={"response": [hook]}) as client:
            streams.append(client.chat_stream("x"))
            assert streams[0].reply().text == "many pieces of text"


def known(stream: Any) -> None:
    """Nothing that a stream is asked raises, at any time."""
    for name in (
        "text", "tool_calls", "choices", "message", "id", "model", "finish_reason", "usage", "receipt", "receipts", "parts",
        "facts", "audit", "verification", "attempts",
    ):  # fmt: skip
        getattr(stream, name)
    stream.recount()
    assert SECRET not in repr(stream)


def test_no_repr_says_what_was_answered() -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": SECRET, "arguments": json.dumps({"x": SECRET})}}]
    said = message(SECRET, refusal=SECRET, reasoning_content=SECRET, tool_calls=calls)
    app = Scripted({"message": said, "logprobs": {"content": [logprob(SECRET)]}})
    shown: list[object] = []
    for reply in replies(app):
        assert reply.text == SECRET
        shown += [reply, reply.choices[0], reply.tool_calls[0], (reply.logprobs or (None,))[0]]
    with connect(Relay(app)) as client:
        stream = client.chat_stream(SECRET)
        shown += [stream, *stream.events(), stream.facts, client, client.verification]
    assert SECRET not in " ".join(map(repr, shown))


NAMES = st.sampled_from(
    ["content", "refusal", "reasoning", "reasoning_content", "tool_calls", "function", "custom", "arguments", "input", "name",
     "id", "type", "index", "role", "audio", "x", "logprobs", "bytes", "token", "logprob", "top_logprobs"]
)  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers(-2, 3) | st.integers() | st.floats() | st.text(max_size=3)
WORDS = LEAVES | st.sampled_from(["function", "custom"])
VALUES = st.recursive(WORDS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=3))
CALL = st.fixed_dictionaries({}, optional={"index": LEAVES, "id": LEAVES, "type": LEAVES, "function": VALUES, "custom": VALUES})
SAID = {
    "content": st.text(max_size=3) | VALUES,
    "tool_calls": st.lists(CALL | VALUES, max_size=2),
    "x": VALUES,
    "refusal": VALUES,
}
DELTA = st.fixed_dictionaries({}, optional=SAID)
LOGPROBS = st.fixed_dictionaries({"content": VALUES}) | VALUES
ABOUT = {"index": st.integers(0, 2) | LEAVES, "finish_reason": LEAVES, "logprobs": LOGPROBS}
CHOICE = st.fixed_dictionaries({"delta": DELTA | VALUES}, optional=ABOUT)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(CHOICE, max_size=2) | VALUES, max_size=4))
def test_whatever_a_worker_streams_is_kept_or_refused(chunks: list[Any]) -> None:
    """And what was kept can be read at any time."""
    reader, said, refused = Deltas(), dict[int, str](), False
    for choices in chunks:
        try:
            events = reader.feed(json.dumps({"choices": choices}))
        except lacre.InvalidMessage:
            refused = True
            break
        for event in events:
            if isinstance(event, TextDelta):
                said[event.choice] = said.get(event.choice, "") + event.text
    kept = {choice.index: choice.text for choice in reader.choices}
    assert refused or {index: text for index, text in kept.items() if text} == {i: text for i, text in said.items() if text}
    assert repr(reader.choices)
    json.dumps([choice.message for choice in reader.choices])


# Event streams, whatever ends their lines and wherever they are cut

SPOKEN = ["one ", "日本 ", "😀", ""]
ENDS = st.sampled_from([b"\n", b"\r", b"\r\n"])
BOM = b"\xef\xbb\xbf"


def chunk(word: str) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": word}}]}, ensure_ascii=False)


def lines(marked: bool) -> list[str]:
    """Of a stream with a comment, other fields, and data over several lines."""
    said = [": fill", ""]
    for number, word in enumerate(SPOKEN, 1):
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
    assert splice.said.text == "".join(SPOKEN)
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
        assert "".join(chat) == chat.text == "".join(SPOKEN)


def test_what_broke_off_keeps_its_text() -> None:
    app = streaming([f"data: {chunk(word)}\r\n\r\n".encode() for word in SPOKEN])
    relay = Relay(app, fault=httpx2.RemoteProtocolError("gone"), bend=without)
    with connect(relay) as client, pytest.raises(lacre.StreamBroken) as broken:
        list(client.chat_stream("Hello."))
    assert broken.value.text == "".join(SPOKEN)
