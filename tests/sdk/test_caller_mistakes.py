"""What a program gets wrong is its own mistake, told by name before anything leaves it; and the options of one call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import httpx2
import pytest

import lacre
import lacre.legacy
from lacre.chat.request import MAX_DEPTH, encode
from parts.chat_app import ChatApp
from parts.relay import AsyncWire, Relay, Wire, connect, connect_async

CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "hi"}
LOOP: list[Any] = []
LOOP.append(LOOP)
DEEP: Any = "x"
for _ in range(MAX_DEPTH + 1):
    DEEP = [DEEP]

MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no messages": (None, {}, "messages must be a string or a list of messages, not None"),
    "bytes": (b"hi", {}, "messages must be a string, not bytes: decode it"),
    "a number": (3, {}, "messages must be a string or a list"),
    "one message": (HELLO, {}, "messages must be .* put it in a list"),
    "a message that is none": ([HELLO, lacre], {}, r"messages\[1\]: one message is a mapping"),
    "a message that is a string": (["hi"], {}, r"messages\[0\]"),
    "pairs": ([[("role", "user")]], {}, r"messages\[0\]"),
    "content of bytes": ([{"role": "user", "content": b"hi"}], {}, r"messages\[0\].content: bytes has no form in JSON"),
    "a set": ([{"role": "user", "content": [{"x": {1}}]}], {}, r"messages\[0\].content\[0\].x: set"),
    "an object": ([HELLO], {"tools": [object()]}, r"tools\[0\]: object"),
    "a name that is no string": ([HELLO], {"logit_bias": {5: 1}}, "logit_bias: names must be strings in JSON, and one is int"),
    "not a number": ("hi", {"temperature": float("nan")}, "temperature: nan"),
    "infinity": ("hi", {"top_p": float("inf")}, "top_p: inf"),
    "half an emoji": ([{"role": "user", "content": "x\ud83d"}], {}, r"messages\[0\].content: character 1 is half"),
    "half an emoji alone": ("\ud83d", {}, r"messages\[0\].content: character 0"),
    "half an emoji in a name": ([HELLO], {"extra_body": {"\ud83d": 1}}, "the body: character 0"),
    "a loop": ([{"role": "user", "content": LOOP}], {}, "nested over 200 deep, or contains itself"),
    "too deep": ("hi", {"metadata": DEEP}, "nested over 200 deep"),
    "a number of thousands of digits": ("hi", {"seed": 10**5000}, "seed: a whole number of over 1024 bits"),
    "no model": ("hi", {"model": ""}, "model is empty"),
    "a model that is a number": ("hi", {"model": 5}, "model must be a string, not int"),
    "a model of bytes": ("hi", {"model": b"tiny"}, "model must be a string"),
    "a time limit in words": ("hi", {"timeout": "3"}, "timeout must be a number of seconds"),
    "a negative time limit": ("hi", {"timeout": -1}, "timeout must be a number of seconds"),
    "no number for a time limit": ("hi", {"timeout": float("nan")}, "timeout must be a number of seconds"),
    "headers in a list": ("hi", {"extra_headers": [("a", "b")]}, "extra_headers must be a mapping of strings"),
    "a header of bytes": ("hi", {"extra_headers": {"a": b"b"}}, "extra_headers must be a mapping of strings"),
    "a header of two lines": ("hi", {"extra_headers": {"a": "b\r\nc: d"}}, "extra_headers: a header's name has"),
    "a header beyond ASCII": ("hi", {"extra_headers": {"a": "\u00e9"}}, "extra_headers: a header's name has"),
    "a query of numbers": ("hi", {"extra_query": {"a": 1}}, "extra_query must be a mapping of strings"),
    "half an emoji in a query": ("hi", {"extra_query": {"a": "\ud83d"}}, "extra_query: character 0"),
    "a body that is a list": ("hi", {"extra_body": ["a"]}, "extra_body must be a mapping, not list"),
    "a stream that is a word": ("hi", {"stream": "yes"}, "stream: chat and chat_stream set this themselves"),
    "a stream in the body": ("hi", {"extra_body": {"stream": 1}}, "stream: chat and chat_stream set this themselves"),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "params", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_by_name_before_anything_is_sent(
    client: lacre.Client, relay: Relay, messages: Any, params: dict[str, Any], told: str
) -> None:
    other = connect_async(relay)
    for ask in (client.chat, client.chat_stream, other.chat_stream):  # at the call itself, not at the first piece
        with pytest.raises(lacre.UsageError, match=told) as caught:
            ask(messages, **params)
        assert type(caught.value) is lacre.UsageError
    with pytest.raises(lacre.UsageError, match=told):
        asyncio.run(other.chat(messages, **params))
    assert relay.requests == []


def test_the_other_method(client: lacre.Client, relay: Relay) -> None:
    with pytest.raises(lacre.UsageError, match="call chat_stream"):
        client.chat("hi", stream=True)
    with pytest.raises(lacre.UsageError, match="call chat for a whole answer"):
        client.chat_stream("hi", stream=False)
    assert relay.requests == []
    assert client.chat("hi", stream=False).text == client.chat_stream("hi", stream=True).reply().text


@pytest.mark.parametrize(
    "messages",
    [
        "hi", [HELLO], (HELLO,), iter([HELLO]), [MappingProxyType(HELLO)],
        [{**HELLO, "content": ({"type": "text", "text": "hi"},)}],
    ],
    ids=["text", "list", "tuple", "iterator", "another mapping", "a tuple inside"],
)  # fmt: skip
def test_what_is_taken(client: lacre.Client, app: ChatApp, messages: Any) -> None:
    client.chat(messages, model=None)
    [sent] = json.loads(app.bodies[0])["messages"]
    assert sent["role"] == "user"
    assert sent["content"] in ("hi", [{"type": "text", "text": "hi"}])


def test_what_is_written_is_what_was_given_then(client: lacre.Client, app: ChatApp) -> None:
    turns = [dict(HELLO)]
    stream = client.chat_stream(turns)
    turns[0]["content"] = "changed"
    turns.append(turns[0])
    list(stream)
    assert json.loads(app.bodies[0])["messages"] == [HELLO]


def test_a_reply_is_the_next_turns_message(client: lacre.Client, app: ChatApp) -> None:
    reply = client.chat([HELLO])
    client.chat([HELLO, reply.message, HELLO])
    assert json.loads(app.bodies[1])["messages"][1] == {"role": "assistant", "content": "one two three"}


@pytest.mark.parametrize("value", ["x", True, None, 0, -1.5, 2**64, [], {}, {"a": ["\u00e9\U0001f642", "\x00"]}])
def test_json_is_what_the_standard_library_writes(value: Any) -> None:
    assert json.loads(encode({"a": value})) == {"a": value}


class TestOptionsOfACall:
    def test_none_of_them_is_a_member_of_the_body(self, client: lacre.Client, app: ChatApp) -> None:
        options: dict[str, Any] = {"timeout": 9.0, "extra_headers": {"x-a": "b"}, "extra_query": {"c": "d"}}
        client.chat("hi", extra_body={"seed": 5}, **options)
        list(client.chat_stream("hi", extra_body={"seed": 5}, **options))
        for sent in map(json.loads, app.bodies):
            assert set(sent) - {"stream", "stream_options"} == {"messages", "model", "seed"}
        assert [scope["query_string"] for scope in app.scopes] == [b"c=d", b"c=d"]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_the_time_limit_is_this_calls(self, relay: Relay, stream: bool) -> None:
        limits: list[dict[str, Any]] = [{"timeout": limit} for limit in (3, None, httpx2.Timeout(5), ...)] + [{}]
        with connect(relay, timeout=7) as client:
            for limit in limits:
                ask = (lambda **limit: client.chat_stream("hi", **limit).reply()) if stream else partial(client.chat, "hi")
                await asyncio.to_thread(ask, **limit)
        async with connect_async(relay, timeout=7) as other:
            for limit in limits:
                await (other.chat_stream("hi", **limit).reply() if stream else other.chat("hi", **limit))
        assert [request.extensions["timeout"]["read"] for request in relay.sealed] == [3, None, 5, 7, 7] * 2

    def test_headers_that_say_who_asks_stay_out(self, client: lacre.Client, relay: Relay) -> None:
        client.chat("hi", extra_headers={"authorization": "Bearer other", "x-user": "ada", "content-type": "text/plain"})
        inner = dict(relay.opened[0].request.headers)
        assert inner["content-type"] == "application/json"
        assert not {"authorization", "x-user"} & set(inner)
        assert relay.requests[-1].headers["authorization"] == "Bearer t0ken"


class TestALimitOfARequest:
    """A socket with a limit of 0 seconds does not wait at all: the gateway would look unreachable."""

    @pytest.mark.parametrize("limit", [0, 0.0, -1, httpx2.Timeout(5, read=0), httpx2.Timeout(5, connect=0), 1e308, "9", True])
    def test_one_that_no_answer_can_keep(self, client: lacre.Client, relay: Relay, limit: Any) -> None:
        for ask in (partial(client.post, CHAT, json={"messages": [HELLO]}), partial(client.chat, "hi")):
            with pytest.raises(lacre.UsageError, match="timeout must be a number of seconds above 0"):
                ask(timeout=limit)
        assert not relay.requests

    @pytest.mark.parametrize("limit", [0.5, 5, None, httpx2.Timeout(5, pool=0)])
    def test_one_that_can_be_kept(self, client: lacre.Client, limit: Any) -> None:
        assert client.post(CHAT, json={"messages": [HELLO]}, timeout=limit).status_code == 200


@pytest.mark.parametrize("make", [lacre.Client, lacre.legacy.Client, lacre.AsyncClient, lacre.legacy.AsyncClient])
@pytest.mark.parametrize("use", [lambda client: client.models(), lambda client: client.get("/v1/models")])
async def test_a_closed_client(relay: Relay, make: Callable[..., Any], use: Callable[[Any], Any]) -> None:
    """Nothing was fetched before, so each use would connect."""
    later = "Async" in make.__name__
    client = make(relay.url, token="t", memory=lacre.VersionMemory(), transport=(AsyncWire if later else Wire)(relay))
    if later:
        await client.aclose()
    else:
        client.close()
    with pytest.raises(lacre.UsageError, match="this client is closed"):
        _ = await use(client) if later else use(client)
