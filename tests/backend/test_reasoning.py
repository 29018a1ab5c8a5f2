"""Reasoning models behind the API: each face tells the reasoning apart, counts it, and hands the caller's wishes on."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from typing import Any, Final

import anthropic
import openai
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from backend.posting import post
from backend.test_faces import FUNCTION, HERE, MESSAGES, RESPONSES, call, check_items, documents, over, without_ids
from lacre.asgi import App
from lacre_backend.api.app import create_app
from parts.echo_engine import CHAT_TEMPLATE
from parts.scripted_engine import ScriptedEngine

CHAT: Final = "/v1/chat/completions"
FREE: Final = CHAT_TEMPLATE + "{# </think> #}"  # the model writes both marks
OPENED: Final = CHAT_TEMPLATE.replace("assistant\n{%", "assistant\n<think>\n{%") + "{# </think> #}"
WISHED: Final = CHAT_TEMPLATE.replace(
    "{% if add",
    "{% if reasoning_effort is defined %}[{{ reasoning_effort }}]{% endif %}"
    "{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
    "{% if style is defined %}[{{ style }}]{% endif %}{# </think> #}{% if add",
)
ASKED: Final = {"model": "scripted", "messages": [{"role": "user", "content": "Hi <think>"}]}
THOUGHT, TEXT = "I should\nsay so.", "It rains."
SAID: Final = f"<think>\n{THOUGHT}\n</think>\n\n{TEXT}"
N_THOUGHT: Final = len(SAID) - len(f"\n\n{TEXT}")  # tokens are bytes here


@asynccontextmanager
async def scripted(script: Callable[[str], str], template: str = FREE) -> AsyncIterator[App]:
    with closing(ScriptedEngine(script)) as engine:
        engine.model = dataclasses.replace(engine.model, chat_template=template)
        yield create_app([engine])


def chunks(reply: Any) -> list[Any]:
    return [json.loads(piece.removeprefix(b"data: ")) for _, piece in reply.pieces if piece.startswith(b"data: {")]


async def both(app: App, **members: Any) -> tuple[Any, list[Any]]:
    """The whole message, and the deltas of the same answer as a stream."""
    whole = (await post(app, CHAT, {**ASKED, **members})).json()
    told = chunks(await post(app, CHAT, {**ASKED, **members, "stream": True}))
    return whole, [chunk["choices"][0]["delta"] for chunk in told if chunk["choices"]]


def joined(deltas: list[Any], name: str) -> str:
    return "".join(delta.get(name) or "" for delta in deltas)


@pytest.mark.parametrize(
    ("template", "said", "thought", "text"),
    [
        (FREE, SAID, THOUGHT, TEXT),
        (OPENED, SAID.removeprefix("<think>\n"), THOUGHT, TEXT),
        (FREE, TEXT, "", TEXT),
        (FREE, f"<think>\n\n</think>\n\n{TEXT}", "", TEXT),
        (OPENED, THOUGHT, THOUGHT, ""),
        (CHAT_TEMPLATE, SAID, "", SAID),
    ],
)
async def test_a_chat_tells_the_reasoning_apart(template: str, said: str, thought: str, text: str) -> None:
    async with scripted(lambda _: said, template) as app:
        whole, deltas = await both(app)
    message = whole["choices"][0]["message"]
    assert (message.get("reasoning_content", ""), message.get("reasoning", ""), message["content"]) == (thought, thought, text)
    assert [joined(deltas, name) for name in ("reasoning_content", "reasoning", "content")] == [thought, thought, text]
    assert not any("content" in delta and "reasoning" in delta for delta in deltas)
    counted = whole["usage"].get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    reasons = template != CHAT_TEMPLATE and said != TEXT
    assert counted == reasons * (len(said) if "</think>" not in said else said.index("</think>") + len("</think>"))


async def test_openai_and_the_sdk_read_the_reasoning() -> None:
    async with scripted(lambda _: SAID) as app:
        client = openai.AsyncOpenAI(http_client=over(app), base_url=f"{HERE}/v1", api_key="none")
        asked: Any = {**ASKED, "reasoning_effort": "high", "logprobs": True}
        answer = await client.chat.completions.create(**asked)
    message: Any = answer.choices[0].message
    assert (message.reasoning_content, message.content) == (THOUGHT, TEXT)
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == N_THOUGHT
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and "".join(each.token for each in logprobs.content or ()) == f"\n\n{TEXT}"


def spoken() -> Iterator[tuple[str, int]]:
    """Reasoning, texts and calls, and after how many tokens the limit ends it."""
    source = random.Random(5)
    for _ in range(60):
        thought = "".join(source.choices(["Olá", " 🦈", "\n", "<", "</thin", " <tool_call>"], k=source.randrange(5)))
        text = "".join(source.choices(["Sim", " 世", "\n", "<think>"], k=source.randrange(3)))
        calls = [call("weather", {"place": "Porto"})] * source.choice([0, 0, 1, 2])
        yield f"<think>{thought}</think>" + "\n".join([text, *calls]), source.choice([4096, 4096, 1 + source.randrange(60)])


async def test_every_event_of_a_response_that_reasons_is_one_that_openai_reads() -> None:
    events_of: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    told = [""]
    seen = set()
    async with scripted(lambda _: told[0]) as app:
        for said, limit in spoken():
            told[0], body = said, {
                "model": "scripted", "input": "Hi", "reasoning": {"effort": "low", "summary": "auto"},
                "tools": [{"type": "function", **FUNCTION}], "max_output_tokens": limit,
            }  # fmt: skip
            events = documents(await post(app, RESPONSES, {**body, "stream": True}))
            whole = (await post(app, RESPONSES, body)).json()
            for name, event in events:
                events_of.validate_python(event)
                seen.add(name)
            check_items(events)
            Response.model_validate(whole)
            assert without_ids(events[-1][1]["response"]) == without_ids(whole)
            kinds = [item["type"] for item in whole["output"]]
            assert "reasoning" not in kinds[1:]
    assert {"response.reasoning_text.delta", "response.reasoning_text.done"} <= seen


async def test_every_event_of_a_message_that_reasons_is_one_that_anthropic_reads() -> None:
    events_of: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    told = [""]
    async with scripted(lambda _: told[0]) as app:
        client = anthropic.AsyncAnthropic(http_client=over(app), base_url=HERE, api_key="none")
        for said, limit in spoken():
            told[0] = said
            tool = {"name": "weather", "input_schema": {"type": "object"}}
            body: Any = {**ASKED, "max_tokens": limit, "tools": [tool], "thinking": {"type": "enabled", "budget_tokens": 2048}}
            for _, event in documents(await post(app, MESSAGES, {**body, "stream": True})):
                events_of.validate_python(event)
            whole = (await post(app, MESSAGES, body)).json()
            Message.model_validate(whole)
            async with client.messages.stream(**body) as stream:
                streamed = (await stream.get_final_message()).model_dump(exclude_none=True)
            assert shown(streamed["content"]) == shown(whole["content"])


def shown(blocks: list[Any]) -> list[Any]:
    """What clients see of the blocks. A stream has no empty text."""
    names = ("type", "text", "thinking", "signature", "name")
    return [{name: block[name] for name in names if name in block} for block in blocks if block.get("text") != ""]


@pytest.mark.parametrize(
    ("members", "shown"),
    [
        ({}, ""),
        ({"reasoning_effort": "low"}, "[low][True]"),
        ({"reasoning_effort": "max"}, "[high][True]"),
        ({"reasoning_effort": "minimal"}, "[low]"),
        ({"reasoning_effort": "none"}, "[False]"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "[False]"),
        ({"chat_template_kwargs": {"thinking": False, "style": "<|end|>"}}, "[<|end|>]"),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"reasoning_effort": "odd"}}, "[odd][True]"),
    ],
)
async def test_wishes_reach_the_templates_that_take_them(members: dict[str, Any], shown: str) -> None:
    prompts: list[str] = []

    def script(prompt: str) -> str:
        prompts.append(prompt)
        return TEXT

    async with scripted(script, WISHED) as app:
        reply = await post(app, CHAT, {**ASKED, **members})
        assert reply.status == 200, reply.body
        assert (await post(app, CHAT, {**ASKED, "reasoning_effort": "huge"})).status == 400
    assert prompts[0].endswith(f"{shown}assistant\n")  # what a caller writes is text: no control token


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "bos_token", "namespace", "sytle", "lacre_round"])
async def test_an_unknown_variable_is_refused_by_name(name: str) -> None:
    async with scripted(lambda _: TEXT, WISHED) as app:
        reply = await post(app, CHAT, {**ASKED, "chat_template_kwargs": {name: "x"}})
    assert reply.status == 400 and f"'{name}'" in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] == "chat_template_kwargs"


async def test_anthropics_wishes_reach_the_template() -> None:
    prompts: list[str] = []

    def script(prompt: str) -> str:
        prompts.append(prompt)
        return TEXT

    async with scripted(script, WISHED) as app:
        wishes: list[Any] = [
            {"thinking": {"type": "disabled"}}, {"output_config": {"effort": "xhigh"}}, {"thinking": {"type": "adaptive"}}
        ]  # fmt: skip
        for members in wishes:
            assert (await post(app, MESSAGES, {**ASKED, "max_tokens": 50, **members})).status == 200
        assert (await post(app, RESPONSES, {"model": "scripted", "input": "Hi", "reasoning": {"effort": "none"}})).status == 200
    assert [prompt.rpartition("\n")[0].rpartition("\n")[2] for prompt in prompts] == [
        "[False]assistant", "[high][True]assistant", "assistant", "[False]assistant",
    ]  # fmt: skip


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("template", [FREE, OPENED])
async def test_a_budget_ends_the_reasoning_and_the_answer_goes_on(template: str, n: int) -> None:
    said = ("<think>" if template == FREE else "") + "x" * 200
    async with scripted(lambda _: said, template) as app:
        whole, deltas = await both(app, max_reasoning_tokens=20, n=n, max_tokens=100)
        free, _ = await both(app, max_reasoning_tokens=500, max_tokens=300)
    thought = "x" * (20 - len(said.rstrip("x")))
    for choice in whole["choices"]:
        message = choice["message"]
        assert message["reasoning_content"] == thought
        assert message["content"] == "x" * (100 - 20 - len("\n</think>\n\n")) and choice["finish_reason"] == "length"
    if n == 1:
        assert (joined(deltas, "reasoning_content"), joined(deltas, "content")) == (thought, message["content"])
    assert whole["usage"]["completion_tokens"] == 100 * n
    assert free["choices"][0]["message"]["content"] == ""


async def test_the_limit_may_end_an_answer_in_its_cut() -> None:
    async with scripted(lambda _: "x" * 200, OPENED) as app:
        whole, _ = await both(app, max_reasoning_tokens=20, max_tokens=25)
    assert whole["choices"][0]["message"]["content"] == "" and whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] <= 25


async def test_a_stream_that_breaks_in_the_reasoning_is_resumed() -> None:
    async with scripted(lambda _: SAID) as app:
        digest = ScriptedEngine(lambda _: "").model.digest
        for place in (3, 20, N_THOUGHT, len(SAID) - 2):
            begun = {"digest": digest, "tokens": list(SAID.encode()[:place])}
            told = chunks(await post(app, CHAT, {**ASKED, "stream": True, "resume": begun}))
            deltas = [chunk["choices"][0]["delta"] for chunk in told if chunk["choices"]]
            thought, text = joined(deltas, "reasoning_content"), joined(deltas, "content")
            assert THOUGHT.endswith(thought) and TEXT.endswith(text)
            assert thought == ("" if place >= N_THOUGHT else THOUGHT[max(0, place - 8) :])
            assert text == TEXT[max(0, place - N_THOUGHT - 2) :]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_in_the_history_reaches_the_template(name: str) -> None:
    prompts: list[str] = []

    def script(prompt: str) -> str:
        prompts.append(prompt)
        return TEXT

    shows = FREE.replace("{{ message.content }}", "{{ message.content }}{{ message.reasoning_content }}")
    history = [*ASKED["messages"], {"role": "assistant", "content": "Yes", name: " because"}, *ASKED["messages"]]
    async with scripted(script, shows) as app:
        assert (await post(app, CHAT, {**ASKED, "messages": history})).status == 200
    assert "Yes because" in prompts[0]


HARMONY: Final = (
    CHAT_TEMPLATE.replace(
        "{{ message.content }}",
        "{% if message.role == 'assistant' %}<|channel|>final<|message|>{% endif %}{{ message.content }}",
    )
    + "{# <|channel|>analysis<|message|> #}"
)


async def test_harmony_in_all_three_apis() -> None:
    said = "<|channel|>analysis<|message|>I should.<|end|><|start|>assistant<|channel|>final<|message|>It rains."
    async with scripted(lambda _: said, HARMONY) as app:
        whole, deltas = await both(app, logprobs=True)
        response = (await post(app, RESPONSES, {"model": "scripted", "input": "Hi"})).json()
        message = (await post(app, MESSAGES, {**ASKED, "max_tokens": 500})).json()
    choice = whole["choices"][0]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("I should.", TEXT)
    assert (joined(deltas, "reasoning_content"), joined(deltas, "content")) == ("I should.", TEXT)
    assert "".join(each["token"] for each in choice["logprobs"]["content"]) == TEXT
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
