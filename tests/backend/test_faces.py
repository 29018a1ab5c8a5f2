"""The faces of one generation, as their vendors' own SDKs read them: `/v1/responses` and `/v1/messages`."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseStreamEvent
from pydantic import TypeAdapter

from backend.posting import Reply, post
from lacre.asgi import App
from lacre_backend.api.app import create_app
from lacre_backend.engine.protocol import EngineError
from parts.scripted_engine import ScriptedEngine

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
HERE = "http://app"
STREAMS = 200
_WORDS = ["Olá", " mar", "\n", " \u4e16\u754c", " <b>", " {", '"', " data: x", "\u2028", " 🦈"]
_ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"place": "Lisboa"},
    {"place": 'a "b" {c}\n', "n": [1, {"x": None}]},
    {"input": "*** x"},
]
_OWN = ("id", "call_id", "item_id", "created_at")
# What the API itself sends; the SDK adds events of its own.
_RAW = frozenset(
    {"message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop"}
)
RAIN = {"type": "text", "text": "rain"}
_PLACE = {"type": "object", "properties": {"place": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "Tells the weather", "parameters": _PLACE}


def call(name: str, arguments: dict[str, Any]) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def scripts(name: str) -> Iterator[tuple[str, int]]:
    """What models say: texts, calls, both, nothing; and after how many tokens the limit ends it."""
    source = random.Random(7)
    for _ in range(STREAMS):
        text = "".join(source.choices(_WORDS, k=source.randrange(5)))
        calls = [call(name, source.choice(_ARGUMENTS)) for _ in range(source.choice([0, 0, 1, 1, 2]))]
        said = "\n".join([*([text] if text else []), *calls])
        yield said, source.choice([4096, 4096, 1 + source.randrange(60)])


@asynccontextmanager
async def scripted(script: Callable[[str], str]) -> AsyncIterator[App]:
    with closing(ScriptedEngine(script)) as engine:
        yield create_app([engine])


def over(app: App) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app))


def documents(reply: Reply) -> list[tuple[str, Any]]:
    """The name and the document of each event."""
    assert reply.status == 200, reply.body
    events = [piece.decode().split("\n", 1) for _, piece in reply.pieces if piece]
    assert all(name.startswith("event: ") and rest.startswith("data: ") for name, rest in events)
    return [(name.removeprefix("event: "), json.loads(rest.removeprefix("data: "))) for name, rest in events]


def without_ids(value: Any) -> Any:
    """Ids and times differ from answer to answer."""
    if isinstance(value, dict):
        return {
            name: without_ids(each) for name, each in value.items() if name not in ("id", "call_id", "item_id", "created_at")
        }
    return [without_ids(each) for each in value] if isinstance(value, list) else value


# Responses

CALLED = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "rain"}


def responses_body(**members: Any) -> dict[str, Any]:
    return {"model": "scripted", "input": "Hi", "tools": [{"type": "function", **FUNCTION}], **members}


def check_items(events: Sequence[tuple[str, Any]]) -> None:
    """The grammar of events: numbered, each item and part opened once and closed once, the deltas adding up to the whole."""
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
    assert all(name == event["type"] for name, event in events)
    names = [name for name, _ in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] in ("response.completed", "response.incomplete")
    assert {"response.completed", "response.incomplete"} & set(names[:-1]) == set()
    output = events[-1][1]["response"]["output"]
    for i, item in enumerate(output):
        own = [(name, event) for name, event in events if event.get("output_index") == i]
        assert own[0][0] == "response.output_item.added"
        assert own[-1] == ("response.output_item.done", {**own[-1][1], "item": item})
        deltas = "".join(event["delta"] for name, event in own if name.endswith(".delta"))
        if item["type"] in ("message", "reasoning"):
            assert deltas == item["content"][0]["text"]
        else:
            assert deltas == item.get("arguments", item.get("input"))
        wholes = [event for name, event in own if name.endswith(("text.done", "arguments.done", "input.done"))]
        assert len(wholes) == 1


async def test_every_event_of_a_response_is_one_that_openai_reads() -> None:
    events_of: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    told = [""]
    async with scripted(lambda _: told[0]) as app:
        for said, limit in scripts("weather"):
            told[0], body = said, responses_body(max_output_tokens=limit)
            events = documents(await post(app, RESPONSES, {**body, "stream": True}))
            whole = (await post(app, RESPONSES, body)).json()
            for _, event in events:
                events_of.validate_python(event)
            check_items(events)
            Response.model_validate(whole)
            assert without_ids(events[-1][1]["response"]) == without_ids(whole)


async def test_openai_itself_gets_the_answer_and_the_call() -> None:
    said = "It rains.\n" + call("weather", {"place": "Porto"})
    async with scripted(lambda _: said) as app:
        client = openai.AsyncOpenAI(http_client=over(app), base_url=f"{HERE}/v1", api_key="none")
        asked: Any = responses_body(instructions="Be brief", store=False, metadata={"k": "v"})
        answer = await client.responses.create(**asked)
        async with client.responses.stream(**asked) as stream:
            async for _ in stream:
                pass
            streamed = await stream.get_final_response()
    for got in (answer, streamed):
        assert got.output_text == "It rains."
        assert (got.status, got.store, got.metadata, got.instructions) == ("completed", False, {"k": "v"}, "Be brief")
        [called] = [item for item in got.output if isinstance(item, ResponseFunctionToolCall)]
        assert (called.name, json.loads(called.arguments)) == ("weather", {"place": "Porto"})
        assert called.call_id.startswith("call_")
        assert got.usage is not None
        assert got.usage.output_tokens == len(said.encode())


async def test_custom_and_namespaced_tools_come_back_as_they_were_offered() -> None:
    said = call("apply_patch", {"input": "*** Begin\n+é"}) + "\n" + call("files__read", {"path": "a"})
    tools = [
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"}},
        {"type": "namespace", "name": "files", "description": "Files", "tools": [{"type": "function", "name": "read"}]},
    ]
    prompts: list[str] = []

    def script(prompt: str) -> str:
        prompts.append(prompt)
        return said

    async with scripted(script) as app:
        body = responses_body(tools=tools)
        whole = (await post(app, RESPONSES, body)).json()
        events = documents(await post(app, RESPONSES, {**body, "stream": True}))
        history = [{"role": "user", "content": "Hi"}, *whole["output"]]
        results = [
            {"type": "custom_tool_call_output", "call_id": whole["output"][0]["call_id"], "output": "done it"},
            {
                "type": "function_call_output",
                "call_id": whole["output"][1]["call_id"],
                "output": [{"type": "input_text", "text": "A!"}],
            },
        ]
        again = await post(app, RESPONSES, responses_body(tools=tools, input=[*history, *results]))
    patch, read = whole["output"]
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "apply_patch", "*** Begin\n+é")
    assert (read["type"], read["namespace"], read["name"], read["arguments"]) == (
        "function_call",
        "files",
        "read",
        '{"path": "a"}',
    )
    check_items(events)
    assert "start: X" in prompts[0]
    assert again.status == 200, again.body
    assert "files__read" in prompts[2]
    assert prompts[2].index("done it") < prompts[2].index("A!")


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "namespace", "name": "x", "tools": [{"type": "mcp"}]}]}, "tools[0].tools[0].type"),
        ({"tools": [{"type": "namespace", "name": "x", "tools": [{"type": "namespace"}]}]}, "tools[0].tools[0].type"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": None}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"type": ["message"], "role": "user"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 3}]}]}, "input[0].content[0].text"),
        ({"input": [{"role": "user", "content": [3]}]}, "input[0].content[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [CALLED]}, "input"),
        ({"input": [CALLED, {"role": "user", "content": "x"}, RESULT]}, "input"),
        ({"input": [CALLED, {**CALLED, "call_id": "d"}, RESULT, {"role": "assistant", "content": "x"}]}, "input"),
        ({"input": [RESULT]}, "input[0].call_id"),
        ({"input": [CALLED, RESULT, RESULT]}, "input[2].call_id"),
        ({"input": [{**CALLED, "namespace": "n" * 128}, RESULT]}, "input[0].name"),
        ({"input": [{**CALLED, "namespace": "a b"}, RESULT]}, "input[0].namespace"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata.k"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"temprature": 1}, "temprature"),
        ({"names": {}}, "names"),
        ({"told": {}}, "told"),
    ],
)
async def test_what_a_response_cannot_honour_is_refused_by_name(members: dict[str, Any], param: str) -> None:
    async with scripted(lambda _: "x") as app:
        error = (await post(app, RESPONSES, responses_body(**members))).error(400)
    assert error["param"] == param


async def test_logprobs_of_a_response() -> None:
    async with scripted(lambda _: "ab") as app:
        body = responses_body(tools=[], include=["message.output_text.logprobs"], top_logprobs=2)
        whole = (await post(app, RESPONSES, body)).json()
        events = documents(await post(app, RESPONSES, {**body, "stream": True}))
    [content] = whole["output"][0]["content"]
    assert [each["token"] for each in content["logprobs"]] == ["a", "b"]
    assert all(len(each["top_logprobs"]) == 2 for each in content["logprobs"])
    assert without_ids(events[-1][1]["response"]) == without_ids(whole)


# Messages


def messages_body(**members: Any) -> dict[str, Any]:
    tool = {"name": "weather", "description": "Tells the weather", "input_schema": _PLACE}
    return {
        "model": "scripted",
        "max_tokens": 4096,
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [tool],
        **members,
    }


def check_blocks(events: Sequence[tuple[str, Any]]) -> None:
    """The grammar of events: a message of blocks, each opened once and closed once, in order and never two at a time."""
    assert all(name == event["type"] for name, event in events)
    names = [name for name, _ in events]
    assert names[0] == "message_start"
    assert names[-2:] == ["message_delta", "message_stop"]
    opened = -1
    inside = False
    for name, event in events[1:-2]:
        if name == "content_block_start":
            opened += 1
            assert not inside
            inside = True
        assert event["index"] == opened
        assert inside
        if name == "content_block_stop":
            inside = False
    assert not inside


async def test_every_event_of_a_message_is_one_that_anthropic_reads() -> None:
    events_of: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    told = [""]
    async with scripted(lambda _: told[0]) as app:
        client = anthropic.AsyncAnthropic(http_client=over(app), base_url=HERE, api_key="none")
        for said, limit in scripts("weather"):
            told[0], body = said, messages_body(max_tokens=limit)
            whole = (await post(app, MESSAGES, body)).json()
            raw: list[tuple[str, Any]] = []
            async with client.messages.stream(**body) as stream:
                async for event in stream:
                    if event.type in _RAW:
                        document = event.model_dump(exclude_unset=True)
                        events_of.validate_python(document)
                        raw.append((event.type, document))
                streamed = await stream.get_final_message()
            check_blocks(raw)
            message = Message.model_validate(whole)
            assert streamed.stop_reason == message.stop_reason
            assert streamed.usage.output_tokens == message.usage.output_tokens == min(len(said.encode()), limit)
            kept = {"type", "text", "name", "input"}
            got = [block.model_dump(include=kept) for block in streamed.content]
            told_whole = [block.model_dump(include=kept) for block in message.content]
            assert got == ([] if told_whole == [{"type": "text", "text": ""}] else told_whole)


async def test_a_conversation_in_blocks_reaches_the_model_in_order() -> None:
    prompts: list[str] = []

    def script(prompt: str) -> str:
        prompts.append(prompt)
        return "Yes"

    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": "In Porto."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"place": "Porto"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "and so"},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "rain"}],
                    "is_error": True,
                },
            ],
        },
        {"role": "assistant", "content": "It "},
    ]
    system = [{"type": "text", "text": "Be kind", "cache_control": {"type": "ephemeral"}}]
    async with scripted(script) as app:
        reply = await post(app, MESSAGES, messages_body(system=system, messages=turns, metadata={"user_id": "u"}))
    assert reply.status == 200, reply.body
    [prompt] = prompts
    places = [
        prompt.index(text) for text in ("Be kind", "Weather?", "In Porto.", "I look.", '"Porto"', "Error: rain", "and so")
    ]
    assert places == sorted(places)
    assert prompt.endswith("It ")  # the answer goes on from there


async def test_a_stop_sequence_is_named() -> None:
    async with scripted(lambda _: "one STOP two") as app:
        body = messages_body(stop_sequences=["zzz", "STOP"], tools=[])
        whole = (await post(app, MESSAGES, body)).json()
        events = documents(await post(app, MESSAGES, {**body, "stream": True}))
    assert whole["content"] == [{"type": "text", "text": "one "}]
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "STOP")
    assert events[-2][1]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "STOP"}


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].source.type"),
        ({"messages": [{"role": "user", "content": [{"type": {"a": 1}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            "answers no tool_use",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {}}]},
                    {"role": "user", "content": "y"},
                ]
            },
            "has no tool_result",
        ),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "tool", "name": "other"}}, "other"),
        ({"container": "x"}, "container"),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"thinking": {"type": "loud"}}, "thinking.type"),
        ({"stop": ["x"]}, "stop"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "continue_final_message"),
    ],
)
async def test_what_a_message_cannot_honour_is_refused_by_name(members: dict[str, Any], said: str) -> None:
    async with scripted(lambda _: "x") as app:
        reply = await post(app, MESSAGES, messages_body(**members))
    assert reply.status == 400, reply.body
    told = json.loads(reply.body)
    assert told.keys() == {"type", "error"}
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    assert said in told["error"]["message"]


@pytest.mark.parametrize(
    ("choice", "said"),
    [({"type": "any"}, "weather"), ({"type": "tool", "name": "weather"}, "weather"), ({"type": "none"}, None)],
)
async def test_the_choice_of_tools(choice: dict[str, Any], said: str | None) -> None:
    """A model that is not told of tools writes what looks like a call as text."""
    written = call("weather", {"place": "Porto"})
    async with scripted(lambda _: written) as app:
        whole = (await post(app, MESSAGES, messages_body(tool_choice=choice))).json()
    [block] = whole["content"]
    assert block.get("name") == said
    assert whole["stop_reason"] == ("end_turn" if said is None else "tool_use")


# Both


@pytest.mark.parametrize(("path", "body"), [(RESPONSES, responses_body()), (MESSAGES, messages_body())])
async def test_an_engine_that_fails_midway_ends_the_stream_with_an_error(path: str, body: dict[str, Any]) -> None:
    class Failing(ScriptedEngine):
        def _answer(self, prompt: tuple[int, ...]) -> Iterator[int]:
            yield from b"some"
            self._jobs[next(iter(self._jobs))].stream.put(EngineError("gone"))
            yield from b" more"

    with closing(Failing(lambda _: "")) as engine:
        app = create_app([engine])
        events = documents(await post(app, path, {**body, "stream": True}))
        assert events[-1][0] == "error"
        assert events[-1][1]["error"]["message"]
        if path == RESPONSES:
            openai_client = openai.AsyncOpenAI(http_client=over(app), base_url=f"{HERE}/v1", api_key="none")
            with pytest.raises(openai.APIError):
                [_ async for _ in await openai_client.responses.create(stream=True, **body)]
        else:
            client = anthropic.AsyncAnthropic(http_client=over(app), base_url=HERE, api_key="none")
            with pytest.raises(anthropic.APIStatusError):
                [_ async for _ in await client.messages.create(stream=True, **body)]


async def test_tokens_are_counted_as_they_would_be_read() -> None:
    async with scripted(lambda _: "x") as app:
        counted = (await post(app, f"{RESPONSES}/input_tokens", responses_body())).json()
        read = (await post(app, RESPONSES, responses_body())).json()["usage"]["input_tokens"]
        assert counted == {"object": "response.input_tokens", "input_tokens": read}
        counted = (await post(app, f"{MESSAGES}/count_tokens", messages_body())).json()
        read = (await post(app, MESSAGES, messages_body())).json()["usage"]["input_tokens"]
        assert counted == {"input_tokens": read}
        missing = await post(app, f"{MESSAGES}/count_tokens", {"model": "scripted"})
        assert (missing.status, json.loads(missing.body)["type"]) == (400, "error")
