"""What a chat answers, whole and streamed, sync and async: every choice, every call, and nothing that came is dropped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lacre
from lacre import problems
from lacre.asgi import EXTENSION
from lacre.chat.choices import Finished, Growing, ReasoningDelta, RefusalDelta, TextDelta, ToolCallDelta
from lacre.chat.stream import Deltas
from parts.relay import AsyncWire, Relay, Wire, served

SECRET = "what the model said"
CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": '{"zone":"CET"}'}},
]
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}


def logprob(token: str) -> dict[str, Any]:
    return {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}


class Scripted:
    """An app that answers with these choices; as a stream, cut into deltas."""

    def __init__(self, *choices: dict[str, Any]) -> None:
        self.choices = [{"index": index, "finish_reason": "stop", **choice} for index, choice in enumerate(choices)]
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.hold = False  # before the last event, for ever

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        asked = json.loads((await receive())["body"])
        self.bodies.append(asked)
        self.paths.append(f"{scope['path']}?{scope['query_string'].decode()}")
        used = scope["extensions"][EXTENSION].usage
        used.prompt_tokens, used.cached_tokens, used.completion_tokens, used.model_digest = 7, 2, 3, "sha256:77"
        kind = b"text/event-stream" if asked.get("stream") else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        if not asked.get("stream"):
            whole = {"id": "c1", "model": "tiny", "choices": self.choices, "usage": USAGE}
            return await send({"type": "http.response.body", "body": json.dumps(whole).encode()})
        for event in self.events():
            body = f"data: {json.dumps({'id': 'c1', 'model': 'tiny', **event})}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def events(self) -> Iterator[dict[str, Any]]:
        for choice in self.choices:
            for delta, logprobs in deltas(choice):
                yield {"choices": [{"index": choice["index"], "delta": delta, "logprobs": logprobs, "finish_reason": None}]}
        for choice in self.choices:
            yield {"choices": [{"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}]}
        yield {"choices": [], "usage": USAGE}


def deltas(choice: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """A message, in pieces of a few characters, as workers send one."""
    message = choice["message"]
    yield {"role": "assistant", "content": "" if message.get("content") else None}, None
    listed = list((choice.get("logprobs") or {}).get("content", ()))
    for name in ("reasoning_content", "content", "refusal"):
        for piece in pieces(message.get(name) or ""):
            yield {name: piece}, {"content": [listed.pop(0)]} if listed else None
    for index, call in enumerate(message.get("tool_calls", ())):
        opened = {**call, "function": {"name": call["function"]["name"], "arguments": ""}}
        yield {"tool_calls": [{"index": index, **opened}]}, None
        for piece in pieces(call["function"]["arguments"]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}, None


def pieces(text: str) -> Iterator[str]:
    yield from (text[at : at + 5] for at in range(0, len(text), 5))


Ask = Callable[..., lacre.Reply]


def both(app: Scripted, ask: Callable[[lacre.Client], Any], later: Callable[[lacre.AsyncClient], Any]) -> list[Any]:
    """What the sync client says, and what the async one does."""
    relay = Relay(app)
    with lacre.Client(relay.url, token="t", memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
        said = ask(client)

    async def awaited() -> Any:
        memory = lacre.VersionMemory()
        async with lacre.AsyncClient(relay.url, token="t", memory=memory, transport=AsyncWire(relay)) as other:
            return await later(other)

    return [said, asyncio.run(awaited())]


def replies(app: Scripted, **params: Any) -> list[lacre.Reply]:
    """The same answer by all four ways."""
    whole = both(app, lambda client: client.chat("x", **params), lambda client: client.chat("x", **params))
    streamed = both(
        app, lambda client: client.chat_stream("x", **params).reply(), lambda client: client.chat_stream("x", **params).reply()
    )
    return [*whole, *streamed]


def test_calls_of_functions() -> None:
    app = Scripted({"message": {"role": "assistant", "content": None, "tool_calls": CALLS}, "finish_reason": "tool_calls"})
    for reply in replies(app, tools=[], max_tokens=9):
        assert (reply.text, reply.finish_reason) == ("", "tool_calls")
        assert [(call.id, call.name, call.parsed()) for call in reply.tool_calls] == [
            ("call_1", "weather", {"city": "Rome"}),
            ("call_2", "time", {"zone": "CET"}),
        ]
        assert reply.message == {"role": "assistant", "content": None, "tool_calls": CALLS}
        assert reply.usage == lacre.TokenUsage(prompt=7, completion=3, cached=2)


def test_text_and_calls_together() -> None:
    app = Scripted({"message": {"role": "assistant", "content": "I will look.", "tool_calls": CALLS[:1]}})
    for reply in replies(app, max_tokens=9):
        assert (reply.text, len(reply.tool_calls)) == ("I will look.", 1)


def test_every_choice() -> None:
    app = Scripted(*({"message": {"role": "assistant", "content": text}} for text in ("one one", "two", "three three")))
    for reply in replies(app, n=3, max_tokens=9):
        assert [(choice.index, choice.text) for choice in reply.choices] == [(0, "one one"), (1, "two"), (2, "three three")]
        assert reply.text == "one one"


def test_reasoning_refusal_logprobs_and_what_has_no_name_here() -> None:
    message = {"role": "assistant", "content": "five five", "refusal": "no", "reasoning_content": "hm, so"}
    listed = [logprob("five "), logprob("five")]
    app = Scripted({"message": message, "logprobs": {"content": listed}})
    for reply in replies(app, logprobs=True, max_tokens=9):
        assert (reply.text, reply.refusal, reply.reasoning) == ("five five", "no", "hm, so")
        assert reply.logprobs is not None
        assert [(each.logprob, each.top) for each in reply.logprobs] == [(-0.5, ())] * 2
        assert reply.message["reasoning_content"] == "hm, so"


def test_members_without_a_name_here_are_put_together() -> None:
    growing = Growing(0)
    for delta in ({"audio": {"id": "a", "data": "xy"}}, {"audio": {"data": "z"}, "more": [1]}, {"more": [2], "flag": True}):
        growing.add({"delta": delta})
    assert growing.whole()["message"] == {
        "role": "assistant", "content": None, "audio": {"id": "a", "data": "xyz"}, "more": [1, 2], "flag": True,
    }  # fmt: skip


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


class TestEvents:
    def app(self) -> Scripted:
        first = {"message": {"role": "assistant", "content": "hello", "tool_calls": CALLS[:1]}}
        return Scripted(first, {"message": {"role": "assistant", "content": "world"}})

    def test_all_of_them_live(self) -> None:
        async def read(client: lacre.AsyncClient) -> list[object]:
            async with client.chat_stream("x", n=2) as stream:
                return [event async for event in stream.events()]

        for events in both(self.app(), lambda client: list(client.chat_stream("x", n=2).events()), read):
            assert TextDelta(0, "hello") in events
            assert TextDelta(1, "world") in events
            calls = [event for event in events if isinstance(event, ToolCallDelta)]
            assert (calls[0].id, calls[0].name, calls[0].index) == ("call_1", "weather", 0)
            assert "".join(call.arguments for call in calls) == '{"city":"Rome"}'
            assert [event for event in events if isinstance(event, Finished)] == [Finished(0, "stop"), Finished(1, "stop")]

    def test_the_pieces_are_the_first_choices_and_the_rest_is_kept(self) -> None:
        stream: Any = None

        def pieces(client: lacre.Client) -> list[str]:
            nonlocal stream
            stream = client.chat_stream("x", n=2)
            return list(stream)

        async def awaited(client: lacre.AsyncClient) -> list[str]:
            return [piece async for piece in client.chat_stream("x", n=2)]

        assert both(self.app(), pieces, awaited) == [["hello"], ["hello"]]
        assert [choice.text for choice in stream.choices] == ["hello", "world"]
        assert [call.name for call in stream.tool_calls] == ["weather"]
        assert stream.message["tool_calls"] == CALLS[:1]
        assert list(stream) == []

    def test_other_kinds(self) -> None:
        app = Scripted({"message": {"role": "assistant", "reasoning_content": "hm", "refusal": "no"}})
        [events, _] = both(
            app, lambda client: list(client.chat_stream("x").events()), lambda client: client.chat_stream("x").reply()
        )
        assert events == [ReasoningDelta(0, "hm"), RefusalDelta(0, "no"), Finished(0, "stop")]


class TestLeft:
    def app(self) -> Scripted:
        return Scripted({"message": {"role": "assistant", "content": "many pieces of text", "tool_calls": CALLS}})

    def test_all_that_came_is_kept_and_nothing_raises(self) -> None:
        def leave(client: lacre.Client) -> Any:
            stream = client.chat_stream("x")
            known(stream)
            for event in stream.events():
                known(stream)
                if isinstance(event, ToolCallDelta) and event.arguments:
                    break
            stream.close()
            return stream

        async def later(client: lacre.AsyncClient) -> Any:
            stream = client.chat_stream("x")
            async for event in stream.events():
                if isinstance(event, ToolCallDelta) and event.arguments:
                    break
            await stream.aclose()
            return stream

        for stream in both(self.app(), leave, later):
            known(stream)
            assert stream.text == "many pieces of text"
            assert [(call.name, call.arguments) for call in stream.tool_calls] == [("weather", '{"cit')]
            assert (stream.usage, stream.receipt, stream.attempts) == (None, None, 1)
            assert stream.verification.audit is not None
            assert stream.audit is not None

    async def test_a_cancellation_stays_one(self) -> None:
        relay = Relay(self.app())
        memory = lacre.VersionMemory()
        begun = asyncio.Event()
        stream: Any = None

        async def read(client: lacre.AsyncClient) -> None:
            nonlocal stream
            stream = client.chat_stream("x")
            try:
                async for _ in stream:
                    begun.set()
                    await asyncio.Event().wait()
            finally:
                known(stream)

        async with lacre.AsyncClient(relay.url, token="t", memory=memory, transport=AsyncWire(relay)) as client:
            task = asyncio.create_task(read(client))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert stream.text == "many "

    def test_a_refusal_before_the_first_piece(self) -> None:
        relay = Relay(self.app())
        with lacre.Client(relay.url, token="t", memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
            forbidden = served(403, problems.FORBIDDEN.body(), {"content-type": problems.MEDIA_TYPE})
            relay.respond = lambda request: forbidden if request.url.path == "/v1/sealed" else None
            stream = client.chat_stream("x")
            with pytest.raises(lacre.Forbidden):
                list(stream)
            with pytest.raises(lacre.UsageError, match="ended with an error"):
                stream.reply()
        known(stream)
        assert (stream.attempts, stream.usage) == (1, None)

    def test_two_readers(self) -> None:
        relay = Relay(self.app())
        with lacre.Client(relay.url, token="t", memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
            streams: list[lacre.ChatStream] = []

            def hook(_response: object) -> None:
                with pytest.raises(lacre.UsageError, match="another thread"):
                    next(streams[0])
                with pytest.raises(lacre.UsageError, match="another thread"):
                    streams[0].close()

            client.event_hooks = {"response": [hook]}
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
    message = {"role": "assistant", "content": SECRET, "refusal": SECRET, "reasoning_content": SECRET, "tool_calls": calls}
    app = Scripted({"message": message, "logprobs": {"content": [logprob(SECRET)]}})
    shown: list[object] = []
    for reply in replies(app, max_tokens=9):
        assert reply.text == SECRET
        shown += [reply, reply.choices[0], reply.tool_calls[0], (reply.logprobs or (None,))[0]]
    relay = Relay(app)
    with lacre.Client(relay.url, token="t", memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
        stream = client.chat_stream(SECRET)
        shown += [stream, *stream.events(), stream.facts, client, client.verification]
    assert SECRET not in " ".join(map(repr, shown))


def members_of(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(NAMES, inner, max_size=3)


NAMES = st.sampled_from(
    ["content", "refusal", "reasoning", "reasoning_content", "tool_calls", "function", "custom", "arguments", "input", "name",
     "id", "type", "index", "role", "audio", "x", "logprobs", "bytes", "token", "logprob", "top_logprobs"]
)  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers(-2, 3) | st.integers() | st.floats() | st.text(max_size=3)
WORDS = LEAVES | st.sampled_from(["function", "custom"])
VALUES = st.recursive(WORDS, lambda inner: st.lists(inner, max_size=2) | members_of(inner))
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
