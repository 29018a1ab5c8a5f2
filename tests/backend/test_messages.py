"""Messages that clients send back as they got them, and members of requests that have the wrong type."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from openai.types.chat.parsed_chat_completion import ParsedChatCompletion

from backend.posting import post
from lacre.asgi import App
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.messages import BOOKKEEPING
from lacre_backend.api.requests import parse_chat

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Weather in Oslo?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "5 C"}
CALLS: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
SAYS: dict[str, Any] = {"role": "assistant", "content": "Cold."}


def answer(message: dict[str, Any], kind: Any) -> Any:
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None, "message": message}
    return kind.model_validate({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})


def dumped(message: dict[str, Any], kind: Any = ChatCompletion, **options: Any) -> Any:
    return answer(message, kind).choices[0].message.model_dump(**options)


def parsed_call() -> dict[str, Any]:
    function = {**CALL["function"], "parsed_arguments": {"city": "Oslo"}}  # type: ignore[dict-item]
    return {**CALLS, "parsed": None, "tool_calls": [{**CALL, "index": 0, "function": function}]}


# What each client holds after an answer, as it puts it back into `messages`.
ECHOES: dict[str, dict[str, Any]] = {
    "openai": dumped(SAYS),
    "openai, a call": dumped(CALLS),
    "openai, unset left out": dumped(CALLS, exclude_unset=True),
    "openai, parsed": dumped({**SAYS, "parsed": {"mood": "cold"}}, ParsedChatCompletion[Any]),
    "openai, a parsed call": dumped(parsed_call(), ParsedChatCompletion[Any]),
    "openai, annotated": {**SAYS, "annotations": [{"type": "url_citation", "url_citation": {"url": "x"}}], "audio": None},
    "a stream, joined": {**CALLS, "tool_calls": [{**CALL, "index": 0}], "refusal": None, "function_call": None},
    "a stream without types": {**CALLS, "tool_calls": [{k: v for k, v in CALL.items() if k != "type"}]},
    "no calls": {**SAYS, "tool_calls": []},
    "LangChain": {**SAYS, "name": "helper", "additional_kwargs": {"refusal": None}, "response_metadata": {}, "id": "run-1"},
    "LiteLLM": {**SAYS, "tool_calls": None, "function_call": None, "provider_specific_fields": {"refusal": None},
                "reasoning_content": "It is winter.", "thinking_blocks": [], "images": []},
    "AI SDK": {**CALLS, "content": "", "providerOptions": {"x": {}},
               "tool_calls": [{**CALL, "extra_content": {"google": {"thought_signature": "x"}}}]},
    "vLLM": {**SAYS, "reasoning": "It is winter.", "reasoning_content": None, "stop_reason": None},
    "Azure": {**SAYS, "end_turn": True, "context": {"citations": []}, "content_filter_results": {}},
    "cached parts": {**SAYS, "content": [{"type": "text", "text": "Cold.", "cache_control": {"type": "ephemeral"}}]},
    "empty parts": {**CALLS, "content": []},
    "DeepSeek": {**CALLS, "reasoning_content": ""},
}  # fmt: skip


@pytest.mark.parametrize("name", ECHOES)
def test_a_clients_own_message_is_taken_back(name: str) -> None:
    message = ECHOES[name]
    called = bool(message.get("tool_calls"))
    messages = [USER, message, RESULT if called else USER]
    request = parse_chat(json.dumps({"model": "m", "messages": messages}).encode())
    written = request.messages[1].for_template()
    assert written["content"] == ("" if called else "Cold.")
    if called:
        [call] = written["tool_calls"]
        assert call == {**CALL, "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    assert written.keys() <= {"role", "content", "tool_calls", "name", "reasoning_content"}
    assert not written.keys() & BOOKKEEPING


async def test_a_refusal_is_what_its_message_says(app: App) -> None:
    for message in (
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ):
        request = parse_chat(json.dumps({"model": "m", "messages": [USER, message, USER]}).encode())
        assert request.messages[1].for_template()["content"] == "No."


@pytest.mark.parametrize(
    ("message", "member"),
    [
        ({**SAYS, "zzz": 1}, "zzz"),
        ({**SAYS, "tool_cals": [CALL]}, "tool_cals"),
        ({**SAYS, "audio": {"id": "a"}}, "audio"),
        ({**SAYS, "function_call": {"name": "f", "arguments": "{}"}}, "function_call"),
        ({**SAYS, "images": [{"url": "x"}]}, "images"),
        ({**SAYS, "refusal": 5}, "refusal"),
        ({**SAYS, "reasoning_content": {"a": 1}}, "reasoning_content"),
        ({**USER, "refusal": "No."}, "refusal"),
        ({**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content[0].type"),
        ({**USER, "content": [{"type": "text", "text": None}]}, "content[0].text"),
        ({**USER, "content": []}, "content"),
        ({**CALLS, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}, "tool_calls[0].function.arguments"),
        ({**CALLS, "tool_calls": [{**CALL, "id": None}]}, "tool_calls[0].id"),
        ({**CALLS, "tool_calls": {}}, "tool_calls"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_message_says_is_never_dropped(message: dict[str, Any], member: str) -> None:
    with pytest.raises(RequestRefused) as caught:
        parse_chat(json.dumps({"model": "m", "messages": [message]}).encode())
    assert caught.value.param == f"messages[0].{member}"


# Every member of every request, of a wrong type

GENERATES = {
    "max_tokens": "integer", "n": "integer", "stop": "array", "stream": "boolean", "stream_options": "object",
    "seed": "integer",
    "temperature": "number", "top_p": "number", "frequency_penalty": "number", "presence_penalty": "number",
    "logit_bias": "object", "top_k": "integer", "min_p": "number", "repeat_penalty": "number", "resume": "object",
    "user": "string",
}  # fmt: skip
MEMBERS: dict[str, dict[str, str | None]] = {
    CHAT: {
        **GENERATES, "model": "string", "messages": "array", "max_completion_tokens": "integer", "logprobs": "boolean",
        "top_logprobs": "integer", "response_format": "object", "tools": "array", "parallel_tool_calls": "boolean",
        "tool_choice": None, "continue_final_message": "boolean", "metadata": "object", "safety_identifier": "string",
        "prompt_cache_key": "string", "prompt_cache_retention": "string", "store": None, "modalities": None,
    },
    "/v1/completions": {**GENERATES, "model": "string", "prompt": "array", "logprobs": "integer"},
    "/v1/embeddings": {"model": "string", "input": "array", "dimensions": "integer", "encoding_format": None,
                       "own_token_ids": "boolean", "user": "string"},
    "/v1/tokenize": {"model": "string", "prompt": "string", "messages": "array", "tools": "array"},
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]}, "/v1/completions": {"prompt": "x"},
    "/v1/embeddings": {"input": "x"}, "/v1/tokenize": {"prompt": "x"},
}  # fmt: skip
OF_TYPE: dict[str, list[Any]] = {
    "integer": [5], "number": [5, 1.5], "string": ["x"], "boolean": [True], "array": [[]], "object": [{}],
}  # fmt: skip
# What may stand for an array; an integer is a number.
ALSO = {"array": "string", "number": "integer"}


@pytest.mark.parametrize(("path", "member"), [(path, member) for path, members in MEMBERS.items() for member in members])
async def test_a_member_of_a_wrong_type_is_named(app: App, path: str, member: str) -> None:
    kind = MEMBERS[path][member]
    right = {kind, ALSO.get(kind or "")} if member in ("stop", "prompt", "input") or kind == "number" else {kind}
    wrong = [
        value
        for each, values in OF_TYPE.items()
        if each not in right
        for value in values
        if value not in OF_TYPE.get(kind or "", [])
    ]
    for value in [each for each in wrong if not (kind is None and isinstance(each, str | bool | list))]:
        error = (await post(app, path, {"model": "echo", **NEEDED[path], member: value})).error(400)
        assert error["param"].partition("[")[0] == member, (value, error)
        assert kind is None or error["code"] == "invalid_type", (value, error)
        assert kind is None or f"expected a{'n' if kind[0] in 'aio' else ''} {kind}" in error["message"], error


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, '"temperature": 1e999, "messages": []'),
        (CHAT, '"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "f", '
               '"parameters": {"type": "object", "properties": {"a": {"enum": [1e999]}}}}}]'),
        (CHAT, '"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": '
               '{"name": "s", "schema": {"const": [-1e400]}}}'),
        ("/v1/embeddings", '"input": [1e999]'),
    ],
)  # fmt: skip
async def test_a_number_beyond_all_bounds_is_refused(app: App, path: str, body: str) -> None:
    """Readers of JSON make it Infinity, which no answer and no prompt may hold."""
    error = (await post(app, path, f'{{"model": "echo", {body}}}'.encode())).error(400)
    assert error["param"] in ("temperature", "tools", "response_format", "input")
