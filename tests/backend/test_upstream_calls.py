"""OpenAI's calls to another program on the host: bounded by the grant on their way there, counted on their way back."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

import pytest

from lacre.asgi import Call, Send
from lacre.wire import bhttp
from parts.behind import Answered, Respond, Server, answering, ask, opened, serving
from parts.upstream import CHAT, JSON, code, forwarding, granted, settings, used

EVENTS = [("content-type", "text/event-stream")]
USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9, "prompt_tokens_details": {"cached_tokens": 3}}
BEYOND = "BEYOND"  # in place of a number that readers of JSON make Infinity
SEVERAL = 'members = ["n"]'
MESSAGES = [{"role": "user", "content": "Hello."}]


def chat(**members: Any) -> bytes:
    return json.dumps({"model": "writer", "messages": MESSAGES, **members}).encode()


async def asked(
    respond: Respond, content: bytes, call: Call | None = None, path: str = CHAT, **more: str
) -> tuple[Answered, Server]:
    """What came of a call, and what the other program saw of it."""
    async with serving(respond) as server:
        app = forwarding(settings(server.url, **more))
        return await ask(app, call or granted("chat", "writer"), "POST", path, content, JSON), server


def whole(**members: Any) -> Respond:
    return answering(200, JSON, json.dumps({"model": "/models/writer.gguf", "usage": USAGE, "choices": [], **members}).encode())


@pytest.mark.parametrize(
    ("members", "sent"),
    [
        ({}, {"max_tokens": 8}),
        ({"n": 2}, {"n": 2, "max_tokens": 4}),
        ({"n": 3}, {"n": 3, "max_tokens": 2}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": None}, {"max_tokens": 8}),
        ({"max_completion_tokens": 5}, {"max_completion_tokens": 5, "max_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 3}),
        ({"temperature": 0, "seed": 7, "stream": False}, {"temperature": 0, "seed": 7, "stream": False, "max_tokens": 8}),
    ],
)
async def test_the_grant_s_ceiling_is_in_the_body(members: dict[str, Any], sent: dict[str, Any]) -> None:
    call = granted("chat", "writer")
    answered, server = await asked(whole(), chat(**members), call, of_chat=SEVERAL)
    assert json.loads(server.bodies[0]) == {"model": "/models/writer.gguf", "messages": MESSAGES, **sent}
    assert json.loads(answered.content)["model"] == "writer"
    assert used(call) == (7, 3, 2)


REFUSED: dict[tuple[int, str], list[dict[str, Any]]] = {
    (403, "grant_mismatch"): [
        {"max_tokens": 9}, {"max_completion_tokens": 3, "n": 3}, {"n": 9}, {"model": "encoder"},
        {"model": "/models/writer.gguf"},
    ],
    (400, "unknown_parameter"): [
        {"n_predict": 4},  # with which llama.cpp's server forgets max_tokens
        {"n_cmpl": 4}, {"best_of": 4},
    ],
    (400, "invalid_value"): [{"max_tokens": 0}, {"max_tokens": True}, {"max_tokens": 1.5}, {"n": "2"}],
    (400, "invalid_type"): [
        {"stream": "yes"}, {"stream": True, "stream_options": []}, {"model": 5}, {"model": None}, {"model": ["m"]},
    ],
    (400, "invalid_json"): [{"temperature": float("nan")}, {"temperature": BEYOND}],
}  # fmt: skip


@pytest.mark.parametrize(("told", "members"), [(told, members) for told, each in REFUSED.items() for members in each], ids=str)
async def test_what_the_grant_does_not_cover_goes_nowhere(told: tuple[int, str], members: dict[str, Any]) -> None:
    call = granted("chat", "writer")
    answered, server = await asked(whole(), chat(**members).replace(b'"BEYOND"', b"1e999"), call, of_chat=SEVERAL)
    assert code(answered) == told
    assert not server.bodies and used(call) == (0, 0, 0)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 10_000])
async def test_what_is_no_object_goes_nowhere(content: bytes) -> None:
    answered, server = await asked(whole(), content)
    assert (code(answered), server.bodies) == ((400, "invalid_json"), [])


TEXT = "/v1/completions"


def text(prompt: Any, **members: Any) -> bytes:
    return json.dumps({"model": "writer", "prompt": prompt, **members}).encode()


@pytest.mark.parametrize(("prompt", "each"), [(["a", "b"], 4), ([[1, 2], [3], [4], [5]], 2), ([1, 2, 3], 8), ("a", 8)])
async def test_each_of_several_prompts_is_bounded(prompt: Any, each: int) -> None:
    _, server = await asked(whole(), text(prompt), granted("complete", "writer"), TEXT, of_chat=SEVERAL)
    assert json.loads(server.bodies[0])["max_tokens"] == each
    answered, _ = await asked(whole(), text(prompt, max_tokens=each + 1), granted("complete", "writer"), TEXT, of_chat=SEVERAL)
    assert code(answered) == (403, "grant_mismatch")


async def test_an_upstream_explains_nothing_because_nobody_counts_it() -> None:
    answered, server = await asked(whole(), text("a"), granted("explain", "writer"), "/v1/explain")
    assert (code(answered), server.bodies) == ((404, "unknown_url"), [])


@pytest.mark.parametrize(("action", "path", "content"), [("chat", CHAT, chat(n=2)), ("complete", TEXT, text(["a", "b"]))])
async def test_several_choices_need_an_upstream_that_counts_them(action: str, path: str, content: bytes) -> None:
    answered, server = await asked(whole(), content, granted(action, "writer"), path)
    assert (code(answered), server.bodies) == ((400, "unsupported_parameter"), [])


async def test_the_operator_has_the_last_word() -> None:
    async with serving(whole()) as server:
        of_chat = 'members = ["top_k"]\nfixed = {cache_prompt = false, temperature = 0.5}\nsalt = "cache_salt"'
        app = forwarding(settings(server.url, of_chat=of_chat))
        salts = []
        for salt in ("5a17", "5a17", "5a18", None, None):
            headers = JSON if salt is None else [*JSON, ("lacre-cache-salt", salt)]
            content = chat(top_k=4, temperature=2)
            assert (await ask(app, granted("chat", "writer"), "POST", CHAT, content, headers)).status == 200
            sent = json.loads(server.bodies[-1])
            assert (sent["top_k"], sent["temperature"], sent["cache_prompt"]) == (4, 0.5, False)
            salts.append(sent["cache_salt"])
    assert salts[0] == salts[1] and len(set(salts)) == 4
    assert "5a17" not in salts[0]


@pytest.mark.parametrize(
    ("usage", "told"),
    [
        (None, (502, "upstream_unusable")),
        ({"prompt_tokens": 7}, None),
        ({"completion_tokens": 7}, (502, "upstream_unusable")),
        ({"prompt_tokens": -1}, (502, "upstream_unusable")),
        ({"prompt_tokens": 7, "completion_tokens": 9}, (502, "upstream_unusable")),
        ({"prompt_tokens": 101}, (403, "grant_mismatch")),
    ],
)
async def test_an_answer_is_counted_within_its_grant_or_not_passed_on(usage: Any, told: tuple[int, str] | None) -> None:
    call = granted("chat", "writer")
    answered, _ = await asked(whole(usage=usage), chat(), call)
    if told is None:
        assert answered.status == 200
    else:
        assert code(answered) == told and used(call) == (0, 0, 0)


@pytest.mark.parametrize(
    ("action", "path", "body", "usage", "counted"),
    [
        ("embed", "/v1/embeddings", {"input": ["a", "b"]}, {"prompt_tokens": 4, "total_tokens": 4}, (4, 0, 0)),
        ("rerank", "/v1/rerank", {"query": "q", "documents": ["a"]}, {"total_tokens": 6}, (6, 0, 0)),
    ],
)
async def test_what_makes_no_tokens(action: str, path: str, body: Any, usage: Any, counted: tuple[int, int, int]) -> None:
    call = granted(action, "writer", max_tokens=1)
    answered, server = await asked(whole(usage=usage), json.dumps({"model": "writer", **body}).encode(), call, path)
    assert answered.status == 200 and used(call) == counted
    assert json.loads(server.bodies[0]) == {"model": "/models/writer.gguf", **body}


@pytest.mark.parametrize("own", [{}, {"own_token_ids": True}])
async def test_ids_of_another_vocabulary_go_nowhere_unasked(own: dict[str, bool]) -> None:
    given = {"model": "writer", "input": [15339, 1917]}
    embeds = whole(usage={"prompt_tokens": 2, "total_tokens": 2})
    answered, server = await asked(embeds, json.dumps({**given, **own}).encode(), granted("embed", "writer"), "/v1/embeddings")
    if own:
        assert json.loads(server.bodies[0]) == {**given, "model": "/models/writer.gguf"}
    else:
        assert (code(answered), server.bodies) == ((400, "token_ids_refused"), [])


async def test_its_refusals_are_its_own() -> None:
    call = granted("chat", "writer")
    answered, _ = await asked(answering(400, JSON, b'{"error":{"message":"Too long.","code":400}}'), chat(), call)
    assert (answered.status, json.loads(answered.content)["error"]["message"]) == (400, "Too long.")
    assert used(call) == (0, 0, 0)


@pytest.mark.parametrize("length", [[], [("content-length", "3000")]])
async def test_no_answer_is_larger_than_the_worker_passes_on(length: list[tuple[str, str]]) -> None:
    respond = answering(200, JSON + length, b"{", b" " * 2998, b"}")
    answered, _ = await asked(respond, chat(), more="largest_answer = 2999")
    assert code(answered) == (502, "answer_too_large")


# Streams of them


def event(text: str | None = None, **members: Any) -> bytes:
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}}]
    return b"data: " + json.dumps({"model": "/models/writer.gguf", "choices": choices, **members}).encode() + b"\n\n"


SPENT = event(usage=USAGE)
DONE = b"data: [DONE]\n\n"


async def stream(call: Call, *pieces: bytes, tell_usage: bool = True) -> tuple[Answered, list[Any]]:
    options = {"stream_options": {"include_usage": True}} if tell_usage else {}
    answered, server = await asked(answering(200, EVENTS, *pieces), chat(stream=True, **options), call)
    assert json.loads(server.bodies[0])["stream_options"] == {"include_usage": True}
    assert all(piece.endswith(b"\n\n") for piece in answered.pieces), "an event, a record"
    return answered, [piece.removeprefix(b"data: ").strip() for piece in answered.pieces]


async def test_a_stream_is_told_event_by_event() -> None:
    call = granted("chat", "writer")
    answered, events = await stream(call, event("a"), b": still here\n\n", event("b"), SPENT, DONE)
    assert answered.headers["content-type"].startswith("text/event-stream")
    *told, done = events
    assert done == b"[DONE]" and used(call) == (7, 3, 2)
    assert [json.loads(each)["model"] for each in told] == ["writer"] * 3
    assert json.loads(told[-1])["usage"] == USAGE


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_however_its_bytes_come(size: int) -> None:
    sent = (event("a") + event("b") + SPENT + DONE).replace(b"\n", b"\r\n")
    _, events = await stream(granted("chat", "writer"), *(sent[at : at + size] for at in range(0, len(sent), size)))
    assert len(events) == 4 and events[-1] == b"[DONE]"


async def test_half_a_surrogate_pair_stays_an_escape() -> None:
    half = event("a").replace(b'"a"', b'"\\ud83d"')
    _, events = await stream(granted("chat", "writer"), half, SPENT, DONE)
    assert b'"\\ud83d"' in events[0] and events[-1] == b"[DONE]"


async def test_usage_that_nobody_asked_for_is_taken_out() -> None:
    call = granted("chat", "writer")
    _, events = await stream(call, event("a"), event("b", usage=USAGE), SPENT, DONE, tell_usage=False)
    assert len(events) == 3 and not any(b"usage" in each for each in events)
    assert used(call) == (7, 3, 2)


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ((event("a"), SPENT), "upstream_broken"),  # no [DONE]
        ((event("a"), DONE), "upstream_unusable"),  # never counted
        ((event("a"), b'data: {"error": {"message": "out of memory at 0x7f"}}\n\n', DONE), "upstream_broken"),
        ((event("a"), event(usage={**USAGE, "completion_tokens": 9}), DONE), "upstream_unusable"),
        ((event("a"), event(usage={**USAGE, "prompt_tokens": 101}), DONE), "grant_mismatch"),
        ((event("a"), b"data: {\n\n"), "upstream_unusable"),
        ((event("a"), b"data: " + b"a" * 2**20 + b"a"), "upstream_unusable"),
        ((*[event("a")] * 80, SPENT, DONE), "upstream_unusable"),
    ],
)
async def test_a_stream_that_is_not_whole_or_not_counted_says_so(pieces: tuple[bytes, ...], told: str) -> None:
    call = granted("chat", "writer")
    _, events = await stream(call, *pieces)
    assert json.loads(events[-1])["error"]["code"] == told
    assert b"[DONE]" not in events and b"0x7f" not in b"".join(events)
    assert call.usage.completion_tokens <= 8


async def test_until_it_is_counted_an_event_is_a_token() -> None:
    async def respond(_scope: Any, _body: bytes, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        role = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": None}}])
        for each in (role, event("a"), event("b")):
            await send({"type": "http.response.body", "body": each, "more_body": True})
        await asyncio.sleep(60)

    call, seen = granted("chat", "writer"), 0
    async with serving(respond) as server:
        async with aclosing(opened(forwarding(settings(server.url)), call, "POST", CHAT, chat(stream=True), JSON)) as events:
            async for each in events:
                seen += isinstance(each, bhttp.Data)
                if seen == 3:
                    break
        await asyncio.wait_for(server.left.wait(), 15)
    assert used(call) == (0, 0, 2)
