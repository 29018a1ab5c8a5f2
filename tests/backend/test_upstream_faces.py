"""The Responses and Messages APIs of another program on the host. It is a worker's own API here, over a scripted engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import pytest
from anthropic.types import Message
from openai.types.responses import Response

from lacre.asgi import App, Call, Scope, Send
from lacre_backend.api.app import create_app
from parts.behind import Answered, Respond, Server, answering, ask, serving
from parts.scripted_engine import ScriptedEngine
from parts.upstream import CHAT, JSON, forwarding, granted, settings, used

EVENTS = [("content-type", "text/event-stream")]
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
SAID: list[Any] = [{"role": "user", "content": "Hello"}]
ASKED: dict[str, dict[str, Any]] = {RESPONSES: {"input": SAID}, MESSAGES: {"messages": SAID}}
LIMIT = {RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}
BOTH = pytest.mark.parametrize("path", [RESPONSES, MESSAGES])


def served(app: App) -> Respond:
    async def respond(scope: Scope, body: bytes, send: Send) -> None:
        bodies = [body]

        async def receive() -> Any:
            if not bodies:
                await asyncio.Event().wait()  # the worker stays
            return {"type": "http.request", "body": bodies.pop()}

        asked = json.loads(body)
        assert asked.pop("model") == "/models/writer.gguf"
        bodies[:] = [json.dumps({**asked, "model": "scripted"}).encode()]
        await app({**scope, "extensions": {}}, receive, send)

    return respond


async def asked(path: str, respond: Respond, call: Call | None = None, **members: Any) -> tuple[Answered, Server, Call]:
    call = call or granted("chat", "writer", max_tokens=8)
    content = json.dumps({"model": "writer", **ASKED.get(path, {}), **members}).encode()
    async with serving(respond) as server:
        answered = await ask(forwarding(settings(server.url)), call, "POST", path, content, JSON)
        return answered, server, call


def told(answered: Answered) -> list[dict[str, Any]]:
    events = [piece.decode().split("\n", 1) for piece in answered.pieces if piece]
    documents: list[dict[str, Any]] = [json.loads(rest.removeprefix("data: ")) for _, rest in events]
    assert [name for name, _ in events] == [f"event: {document['type']}" for document in documents]
    return documents


@BOTH
async def test_an_answer_is_bounded_counted_and_named(path: str) -> None:
    with closing(ScriptedEngine(lambda _: "abcdefghijkl")) as engine:
        answered, server, call = await asked(path, served(create_app([engine])))
    assert answered.status == 200, answered.content
    sent = json.loads(server.bodies[0])
    assert sent[LIMIT[path]] == 8
    assert sent.get("store") == (False if path == RESPONSES else None)
    answer: Any = json.loads(answered.content)
    (Response if path == RESPONSES else Message).model_validate(answer)
    assert answer["model"] == "writer"
    prompt, _, completion = used(call)
    assert (prompt > 5, completion) == (True, 8)


@BOTH
async def test_a_stream_is_told_event_by_event_to_its_last_one(path: str) -> None:
    with closing(ScriptedEngine(lambda _: "abc")) as engine:
        answered, _, call = await asked(path, served(create_app([engine])), stream=True)
    events = told(answered)
    assert events[-1]["type"] == ("response.completed" if path == RESPONSES else "message_stop")
    named = [event[inner]["model"] for event in events for inner in ("response", "message") if inner in event]
    assert set(named) == {"writer"}
    prompt, _, completion = used(call)
    assert (prompt > 5, completion) == (True, 3)


def stream(*events: dict[str, Any]) -> Respond:
    return answering(200, EVENTS, *(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))


DELTAS: dict[str, dict[str, Any]] = {
    RESPONSES: {"type": "response.output_text.delta", "delta": "a"},
    MESSAGES: {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}},
}


def ends(path: str, used: int) -> list[dict[str, Any]]:
    usage = {"input_tokens": 7, "output_tokens": used}
    if path == RESPONSES:
        return [{"type": "response.completed", "response": {"usage": usage}}]
    return [
        {"type": "message_start", "message": {"usage": {**usage, "cache_read_input_tokens": 2, "output_tokens": 1}}},
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": used, "input_tokens": None}},
        {"type": "message_stop"},
    ]


@BOTH
@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([], "broke off"),  # it ends without an end
        ([{"type": "error", "error": {"message": "0x7f"}}], "broke off"),
        ([{"type": "response.completed"}, {"type": "message_stop"}], "does not say how many"),
        (["ends", 9], "more tokens than were granted"),
        (["deltas"] * 80, "more tokens than were granted"),
    ],
    ids=str,
)
async def test_a_stream_that_is_not_whole_or_not_counted_says_so(path: str, events: Sequence[Any], said: str) -> None:
    first = [DELTAS[path]]
    rest = ends(path, 9) if events[:1] == ["ends"] else [DELTAS[path] if event == "deltas" else event for event in events]
    answered, _, _ = await asked(path, stream(*first, *rest), stream=True)
    last = told_last(answered)
    assert said in last["error"]["message"]
    assert "0x7f" not in json.dumps(last)


def told_last(answered: Answered) -> dict[str, Any]:
    """The last event, which is an error in the API's own shape."""
    name, _, rest = answered.pieces[-1].decode().partition("\n") if answered.pieces[-1] else ("", "", "")
    assert name == "event: error"
    document: dict[str, Any] = json.loads(rest.removeprefix("data: "))
    assert document["error"]["message"]
    return document


@BOTH
async def test_cached_tokens_are_counted_in_each_apis_own_way(path: str) -> None:
    respond = stream(DELTAS[path], *ends(path, 2))
    _, _, call = await asked(path, respond, stream=True)
    assert used(call) == ((7, 0, 2) if path == RESPONSES else (9, 2, 2))


@BOTH
@pytest.mark.parametrize(
    ("members", "status"),
    [({"n_predict": 4}, 400), ({"previous_response_id": "x"}, 400), ({"max_output_tokens": 9, "max_tokens": 9}, 403)],
)
async def test_what_the_grant_does_not_cover_goes_nowhere(path: str, members: dict[str, Any], status: int) -> None:
    members = {name: value for name, value in members.items() if status == 400 or name == LIMIT[path]}
    answered, server, call = await asked(path, stream(), **members)
    assert (answered.status, server.bodies, used(call)) == (status, [], (0, 0, 0))
    assert (json.loads(answered.content).get("type") == "error") == (path == MESSAGES)


# Media

INSIDE, OUTSIDE = "data:image/png;base64,iVBORw0KGgo=", "http://169.254.169.254/latest/meta-data"
PARTS: dict[str, list[Any]] = {
    CHAT: [
        {"type": "image_url", "image_url": {"url": ...}},
        {"type": "image_url", "image_url": ...},
        {"image_url": ...},
        {"type": "audio_url", "audio_url": {"url": ...}},
        {"type": "video_url", "video_url": {"url": ..., "detail": "low"}},
    ],
    RESPONSES: [{"type": "input_image", "image_url": ...}, {"type": "input_file", "file_url": ...}],
    MESSAGES: [
        {"type": "image", "source": {"type": "url", "url": ...}},
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image", "source": {"type": "url", "url": ...}}]},
    ],
}
EACH = [(path, part) for path, parts in PARTS.items() for part in parts]


def filled(value: Any, address: str) -> Any:
    if isinstance(value, dict):
        return {name: filled(each, address) for name, each in value.items()}
    return [filled(each, address) for each in value] if isinstance(value, list) else address if value is ... else value


@pytest.mark.parametrize("address", [OUTSIDE, "https://a/b.png", "file:///etc/passwd", "//a/b", "ftp://a", " data:x"])
@pytest.mark.parametrize(("path", "part"), EACH)
async def test_no_request_makes_the_other_program_dial_out(path: str, part: Any, address: str) -> None:
    content = [{"type": "text", "text": "Look"}, filled(part, address)]
    members = {"input" if path == RESPONSES else "messages": [{"role": "user", "content": content}]}
    answered, server, call = await asked(path, answering(200, JSON, b"{}"), **members)
    assert answered.status == 400 and not server.bodies and used(call) == (0, 0, 0)
    error = json.loads(answered.content)["error"]
    assert "Only data: URLs are forwarded" in error["message"] and address not in error["message"]


@pytest.mark.parametrize(("path", "part"), EACH)
async def test_media_in_the_body_reach_the_other_program(path: str, part: Any) -> None:
    members = {"input" if path == RESPONSES else "messages": [{"role": "user", "content": [filled(part, INSIDE)]}]}
    _, server, _ = await asked(path, answering(200, JSON, b"{}"), **members)
    assert json.loads(server.bodies[0]).items() >= members.items()


async def test_addresses_in_texts_and_calls_are_no_media() -> None:
    called = {"type": "tool_use", "id": "a", "name": "fetch", "input": {"image_url": OUTSIDE, "content": [{"url": OUTSIDE}]}}
    found = {"type": "search_result", "source": OUTSIDE, "title": "t", "content": [{"type": "text", "text": OUTSIDE}]}
    said = {"type": "text", "text": OUTSIDE, "citations": [{"type": "x", "url": OUTSIDE}]}
    turns = [{"role": "user", "content": [said, found]}, {"role": "assistant", "content": [called]}]
    _, server, _ = await asked(MESSAGES, answering(200, JSON, b"{}"), messages=turns)
    assert json.loads(server.bodies[0])["messages"] == turns
