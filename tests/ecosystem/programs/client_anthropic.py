"""`anthropic`: the Messages API, which needs a `max_tokens`."""

from __future__ import annotations

import json
from typing import Any

import anthropic

from asked import GREEDY, LONG, MODEL, MOOD, PIECES, PLAIN, SLOW, THINK, WEATHER, streamed, tell, weather

CLIENT = anthropic.Anthropic(max_retries=0)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"name": "weather", "description": "Tells the weather in a city", "input_schema": CITY}
MOODS = {
    "type": "object",
    "properties": {"mood": {"type": "string", "enum": ["good", "bad"]}, "points": {"type": "integer"}},
    "required": ["mood", "points"],
    "additionalProperties": False,
}
GIVEN: dict[str, Any] = {"model": MODEL, "max_tokens": 512, "extra_body": GREEDY}


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def chat() -> dict[str, Any]:
    return {"text": text_of(CLIENT.messages.create(messages=said(PLAIN), **GIVEN))}


def stream() -> dict[str, Any]:
    with CLIENT.messages.stream(messages=said(PLAIN), **GIVEN) as events:
        return streamed(list(events.text_stream))


def tools() -> dict[str, Any]:
    messages = said(WEATHER)
    message = CLIENT.messages.create(messages=messages, tools=[TOOL], **GIVEN)
    [call] = [block for block in message.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": weather(**call.input)}
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    return {"text": text_of(CLIENT.messages.create(messages=messages, tools=[TOOL], **GIVEN))}


def structured() -> Any:
    form = {"format": {"type": "json_schema", "schema": MOODS}}
    return json.loads(text_of(CLIENT.messages.create(messages=said(MOOD), output_config=form, **GIVEN)))


def reasoning() -> dict[str, Any]:
    given = {**GIVEN, "max_tokens": 2048, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    message = CLIENT.messages.create(messages=said(THINK), **given)
    return {
        "text": text_of(message),
        "thought": "".join(block.thinking for block in message.content if block.type == "thinking"),
    }


def cancellation() -> dict[str, Any]:
    taken = 0
    with CLIENT.messages.stream(messages=said(SLOW), **GIVEN) as events:
        for _ in events.text_stream:
            taken += 1
            if taken == PIECES:
                break
    return {"pieces": taken}


def long() -> dict[str, Any]:
    return {"text": text_of(CLIENT.messages.create(messages=said(LONG), **{**GIVEN, "max_tokens": 2048}))}


if __name__ == "__main__":
    tell(chat, stream, tools, structured, reasoning, cancellation, long)
