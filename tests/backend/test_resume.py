"""Marks in a stream, and an answer that goes on from them: over the API, with the echo and with the real model."""

from __future__ import annotations

import dataclasses
import json
from contextlib import closing
from typing import Any

import httpx2
import pytest

from backend.conftest import load_llama
from backend.generating import made, make_task
from lacre.exchange.resume_marks import Mark
from lacre_backend.api.app import create_app
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.protocol import Engine, Sampling, TaskRefused

MESSAGES = [{"role": "user", "content": "Sea: 日本 and 😀."}]
ASK = {"lacre-resume": "?1"}


def client(engine: Engine) -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app=create_app([engine]))
    return httpx2.AsyncClient(transport=transport, base_url="http://worker.test/v1")


Event = tuple[str | None, dict[str, Any]]


def events(response: httpx2.Response) -> list[Event]:
    """Mark and object of each event but `[DONE]`."""
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in response.text.split("\n\n")]
    return [(fields.get("id"), json.loads(fields["data"])) for fields in blocks if fields.get("data", "[DONE]") != "[DONE]"]


def text_of(found: list[Event]) -> str:
    return "".join(choice["delta"].get("content") or "" for _, chunk in found for choice in chunk["choices"])


async def ask(http: httpx2.AsyncClient, engine: Engine, headers: dict[str, str] = ASK, **fields: Any) -> httpx2.Response:
    body = {
        "model": engine.model.name, "messages": MESSAGES, "stream": True, "temperature": 0, "max_tokens": 20,
        "stream_options": {"include_usage": True}, **fields,
    }  # fmt: skip
    return await http.post("/chat/completions", json=body, headers=headers)


async def test_each_piece_of_text_has_a_mark(engine: Engine) -> None:
    async with client(engine) as http:
        response = await ask(http, engine)
    assert response.headers["lacre-model-digest"] == engine.model.digest
    got = events(response)
    marks = [Mark.parse(mark) for mark, _ in got if mark is not None]
    texts = [bool(chunk["choices"] and chunk["choices"][0]["delta"].get("content")) for _, chunk in got]
    marked = [mark is not None for mark, _ in got]
    last = len(marked) - marked[::-1].index(True)
    assert marked[:last] == texts[:last]  # after it, what was held back, and that it is over
    used = got[-1][1]["usage"]
    counted = 0
    for mark in marks:
        counted += len(mark.tokens)
        assert (mark.count, mark.prompt) == (counted, used["prompt_tokens"])
    assert counted <= used["completion_tokens"] <= 20
    assert any(len(mark.tokens) > 1 for mark in marks)  # of a code point in several tokens


@pytest.mark.parametrize(
    ("headers", "fields"), [({}, {}), (ASK, {"n": 2}), ({"lacre-resume": "1"}, {})], ids=["not asked", "n", "malformed"]
)
async def test_no_marks(echo: Engine, headers: dict[str, str], fields: dict[str, Any]) -> None:
    async with client(echo) as http:
        response = await ask(http, echo, headers, **fields)
    assert "lacre-model-digest" not in response.headers
    assert all(mark is None for mark, _ in events(response))


async def test_going_on_from_every_mark(engine: Engine) -> None:
    async with client(engine) as http:
        got = events(await ask(http, engine))
        tokens: list[int] = []
        used = got[-1][1]["usage"]
        for at, (mark, _) in enumerate(got):
            if mark is None:
                continue
            tokens += Mark.parse(mark).tokens
            rest = events(await ask(http, engine, resume={"digest": engine.model.digest, "tokens": tokens}))
            assert text_of([*got[: at + 1], *rest]) == text_of(got)
            again = rest[-1][1]["usage"]
            assert again["prompt_tokens"] == used["prompt_tokens"] + len(tokens)
            assert again["completion_tokens"] == used["completion_tokens"] - len(tokens)
            assert rest[-2][1]["choices"][0]["finish_reason"] == got[-2][1]["choices"][0]["finish_reason"]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"resume": {"digest": "sha256:00", "tokens": [65]}}, 409, "resume.digest"),
        ({"resume": {"digest": None, "tokens": [258]}}, 400, "resume.tokens"),
        ({"resume": {"digest": None, "tokens": [-1]}}, 400, "resume.tokens"),
        ({"resume": {"digest": None, "tokens": []}}, 400, "resume.tokens"),
        ({"resume": {"digest": None, "tokens": ["65"]}}, 400, "resume.tokens[0]"),
        ({"resume": {"digest": None, "tokens": [65] * 5000}}, 400, "messages"),
        ({"resume": {"digest": None, "tokens": [65]}, "n": 2}, 400, "resume"),
        ({"resume": {"digest": None, "tokens": [65], "answer": "x"}}, 400, "resume.answer"),
        ({"resume": {"digest": None, "tokens": [65], "answer": "0" * 24 + ".١"}}, 400, "resume.answer"),
    ],
)
async def test_refusals(echo: Engine, fields: dict[str, Any], status: int, param: str) -> None:
    if fields["resume"]["digest"] is None:
        fields = {**fields, "resume": {**fields["resume"], "digest": echo.model.digest}}
    async with client(echo) as http:
        response = await ask(http, echo, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


SCHEMA = {
    "type": "object", "required": ["name", "seas"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 12}, "seas": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}


async def test_a_json_schema_goes_on_where_it_was(llama: LlamaEngine) -> None:
    async with client(llama) as http:
        got = [event for event in events(await ask(http, llama, response_format=FORMAT, max_tokens=60)) if event[0]]
        for cut in range(1, len(got), 5):
            tokens = [token for mark, _ in got[:cut] for token in Mark.parse(str(mark)).tokens]
            resume = {"digest": llama.model.digest, "tokens": tokens}
            rest = events(await ask(http, llama, response_format=FORMAT, max_tokens=60, resume=resume))
            assert json.loads(text_of([*got[:cut], *rest])).keys() == {"name", "seas"}


TOOLS = [
    {"type": "function", "function": {"name": "sea", "strict": True, "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]


def calls_of(found: list[Event]) -> list[tuple[str, str]]:
    """Names and arguments of the calls, by their indexes."""
    calls: dict[int, list[str]] = {}
    for _, chunk in found:
        for each in (call for choice in chunk["choices"] for call in choice["delta"].get("tool_calls", ())):
            call = calls.setdefault(each["index"], [])
            assert ("id" in each) == (not call)
            call += [each["function"]["name"]] if "id" in each else [each["function"]["arguments"]]
    return [(name, "".join(pieces)) for _, (name, *pieces) in sorted(calls.items())]


async def test_calls_go_on_where_they_were(llama: LlamaEngine) -> None:
    """The grammar too: greedy, each rest is that of the whole answer, and every call is valid."""
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 80}
    async with client(llama) as http:
        got = events(await ask(http, llama, **asked))
        marked = [at for at, (mark, _) in enumerate(got) if mark is not None]
        whole = calls_of(got)
        assert len(whole) > 1 and json.loads(whole[0][1])
        for at in marked[3::15]:
            tokens = [token for mark, _ in got[: at + 1] if mark is not None for token in Mark.parse(mark).tokens]
            resume = {"digest": llama.model.digest, "tokens": tokens}
            rest = events(await ask(http, llama, **asked, resume=resume))
            assert calls_of([*got[: at + 1], *rest]) == whole


async def test_a_name_that_goes_back(echo: Engine) -> None:
    """With it the rest has the answer's id and no second beginning; without it, it begins as any answer does."""
    async with client(echo) as http:
        response = await ask(http, echo)
        name = response.headers["lacre-answer"]
        got = events(response)
        tokens = Mark.parse(next(mark for mark, _ in got if mark)).tokens
        for answer, firsts in ((name, 0), (None, 1)):
            named = {} if answer is None else {"answer": answer}
            resume = {"digest": echo.model.digest, "tokens": tokens, **named}
            rest = await ask(http, echo, resume=resume)
            chunks = [chunk for _, chunk in events(rest)]
            assert {chunk["id"] == got[0][1]["id"] for chunk in chunks} == {answer is not None}
            assert sum("role" in choice["delta"] for chunk in chunks for choice in chunk["choices"]) == firsts
            assert (rest.headers["lacre-answer"] == name) == (answer is not None)


async def test_a_beginning_that_the_grammar_refuses(llama: LlamaEngine) -> None:
    """Refused before anything runs."""
    begun = tuple(llama.tokenize("no JSON"))
    task = make_task(llama, sampling=Sampling(temperature=0, grammar='start: "{" /[a-z]+/ "}"'), endless=False, begun=begun)
    with pytest.raises(TaskRefused, check=lambda refused: refused.field == "begun"):
        llama.submit(task)
    assert llama.held[0] == 0


async def test_penalties_know_what_was_begun(llama: LlamaEngine) -> None:
    text, sampling = "one two one two one two", Sampling(temperature=0, repeat_penalty=1.6)
    ids = (await made(llama, text, 24, sampling=sampling)).ids
    rest = await made(llama, text, 12, sampling=sampling, begun=tuple(ids[:12]))
    forgetful = await made(llama, prompt=(*llama.tokenize(text), *ids[:12]), max_tokens=12, sampling=sampling)
    assert rest.ids == ids[12:] != forgetful.ids


async def test_reasoning_its_budget_and_a_call_go_on() -> None:
    """In a model that is made to think: a fixed mark ends the reasoning, and a grammar holds the call behind it."""
    with closing(load_llama()) as engine:
        opened = "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"
        template = f"{engine.model.chat_template}{opened}"
        engine._model.info = dataclasses.replace(engine._model.info, chat_template=template)
        asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 60, "max_reasoning_tokens": 12}
        async with client(engine) as http:
            got = events(await ask(http, engine, **asked))
            whole = thought_in(got), calls_of(got)
            assert whole[0] and whole[1][0][0] in ("sea", "now")
            details = got[-1][1]["usage"]["completion_tokens_details"]
            marked = [at for at, (mark, _) in enumerate(got) if mark is not None]
            for at in marked[2::9]:
                tokens = [token for mark, _ in got[: at + 1] if mark is not None for token in Mark.parse(mark).tokens]
                rest = events(await ask(http, engine, **asked, resume={"digest": engine.model.digest, "tokens": tokens}))
                joined = [*got[: at + 1], *rest]
                assert (thought_in(joined), calls_of(joined)) == whole
                assert rest[-1][1]["usage"]["completion_tokens_details"] == details


def thought_in(found: list[Event]) -> str:
    return "".join(choice["delta"].get("reasoning") or "" for _, chunk in found for choice in chunk["choices"])
