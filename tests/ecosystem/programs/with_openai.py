"""What programs do with `openai`, one thing after another by its name: `with_openai.py chat stream ...`. Prints JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai

from sealed import CHAT, EMBED, arguments, async_arguments

ASK: list[Any] = [{"role": "user", "content": "Name the colours of the rainbow."}]
GREEDY: dict[str, Any] = {"model": CHAT, "messages": ASK, "max_tokens": 12, "temperature": 0}
WEATHER: Any = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather in a city",
    "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 24}}, "required": ["city"],
        "additionalProperties": False,
    },
}}  # fmt: skip
MOOD: Any = {"type": "json_schema", "json_schema": {
    "name": "mood", "strict": True,
    "schema": {
        "type": "object", "properties": {"mood": {"type": "string", "enum": ["good", "bad"]}, "points": {"type": "integer"}},
        "required": ["mood", "points"], "additionalProperties": False,
    },
}}  # fmt: skip


def chat() -> dict[str, Any]:
    with openai.OpenAI(**arguments()) as client:
        completion = client.chat.completions.create(**GREEDY)
    assert completion.usage is not None and completion.usage.completion_tokens <= 12
    return {"text": completion.choices[0].message.content, "model": completion.model}


def stream() -> dict[str, Any]:
    with openai.OpenAI(**arguments()) as client:
        chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens <= 12
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    return {"text": "".join(pieces), "pieces": len(pieces)}


def helper() -> dict[str, Any]:
    """The streaming helper with its events."""
    with openai.OpenAI(**arguments()) as client, client.chat.completions.stream(**GREEDY) as events:
        return {"text": "".join(event.delta for event in events if event.type == "content.delta")}


def asynchronous() -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        async with openai.AsyncOpenAI(**async_arguments()) as client:
            whole, pieces = await asyncio.gather(client.chat.completions.create(**GREEDY), streamed(client))
        return {"text": whole.choices[0].message.content, "streamed": "".join(pieces)}

    async def streamed(client: openai.AsyncOpenAI) -> list[str]:
        chunks = await client.chat.completions.create(**GREEDY, stream=True)
        return [chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices]

    return asyncio.run(main())


def tools() -> dict[str, Any]:
    forced: Any = {"type": "function", "function": {"name": "get_weather"}}
    asked: list[Any] = [{"role": "user", "content": "What is the weather in Vienna?"}]
    options: dict[str, Any] = {**GREEDY, "tools": [WEATHER], "max_tokens": 64, "parallel_tool_calls": False}
    with openai.OpenAI(**arguments()) as client:
        completion = client.chat.completions.create(**{**options, "messages": asked, "tool_choice": forced})
        message = completion.choices[0].message
        [call] = message.tool_calls or []
        asked += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}]
        after = client.chat.completions.create(**{**options, "messages": asked, "tool_choice": "none"})
    said = after.choices[0].message.content
    return {"name": call.function.name, "arguments": json.loads(call.function.arguments), "then": said}


def schema() -> dict[str, Any]:
    asked: list[Any] = [{"role": "user", "content": "Rate this: a lovely day."}]
    options = {**GREEDY, "messages": asked, "response_format": MOOD, "max_tokens": 48}
    with openai.OpenAI(**arguments()) as client:
        return {"answer": json.loads(client.chat.completions.create(**options).choices[0].message.content or "")}


def embeddings() -> dict[str, Any]:
    texts = ["a cat sits on the mat", "a kitten is on the rug", "the stock market fell"]
    with openai.OpenAI(**arguments()) as client:
        found = client.embeddings.create(model=EMBED, input=texts)
    cat, kitten, market = (item.embedding for item in found.data)
    near, far = (sum(a * b for a, b in zip(cat, other, strict=True)) for other in (kitten, market))
    return {"length": len(cat), "near": near, "far": far}


def models() -> dict[str, Any]:
    with openai.OpenAI(**arguments()) as client:
        return {"models": sorted(model.id for model in client.models.list())}


def errors() -> dict[str, Any]:
    with openai.OpenAI(**arguments(), max_retries=0) as client:
        try:
            client.chat.completions.create(**{**GREEDY, "model": "gone"})
        except openai.NotFoundError as exc:
            return {"code": exc.code, "status": exc.status_code}
    raise AssertionError("a model that is not there answered")


if __name__ == "__main__":
    print(json.dumps({"openai": openai.__version__, **{name: globals()[name]() for name in sys.argv[1:]}}))
