"""`openai`: its chat API."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pydantic

from asked import EMBEDDER, GREEDY, LONG, MODEL, MOOD, PIECES, PLAIN, SLOW, TEXTS, THINK, WEATHER, streamed, tell, weather

CLIENT = openai.OpenAI(max_retries=0)
TOOL: Any = {"type": "function", "function": {
    "name": "weather", "description": "Tells the weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}}  # fmt: skip


GIVEN: dict[str, Any] = {"model": MODEL, **GREEDY}


class Mood(pydantic.BaseModel):
    mood: Literal["good", "bad"]
    points: int


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def answer(text: str) -> str:
    return CLIENT.chat.completions.create(messages=said(text), **GIVEN).choices[0].message.content or ""


def chat() -> dict[str, Any]:
    return {"text": answer(PLAIN)}


def stream() -> dict[str, Any]:
    chunks = CLIENT.chat.completions.create(messages=said(PLAIN), stream=True, **GIVEN)
    return streamed([chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content])


def tools() -> dict[str, Any]:
    messages = said(WEATHER)
    message = CLIENT.chat.completions.create(messages=messages, tools=[TOOL], **GIVEN).choices[0].message
    [call] = message.tool_calls or []
    result = weather(**json.loads(call.function.arguments))
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    after = CLIENT.chat.completions.create(messages=messages, tools=[TOOL], **GIVEN)
    return {"text": after.choices[0].message.content}


def structured() -> dict[str, Any]:
    completion = CLIENT.chat.completions.parse(messages=said(MOOD), response_format=Mood, **GIVEN)
    parsed = completion.choices[0].message.parsed
    return parsed.model_dump() if parsed else {}


def reasoning() -> dict[str, Any]:
    message = CLIENT.chat.completions.create(messages=said(THINK), **GIVEN).choices[0].message
    return {"text": message.content, "thought": (message.model_extra or {})["reasoning_content"]}


def embeddings() -> dict[str, Any]:
    found = CLIENT.embeddings.create(model=EMBEDDER, input=TEXTS).data
    return {"length": len(found[0].embedding), "many": len(found)}


def cancellation() -> dict[str, Any]:
    taken = 0
    with CLIENT.chat.completions.create(messages=said(SLOW), stream=True, **GIVEN) as chunks:
        for _ in chunks:
            taken += 1
            if taken == PIECES:
                break
    return {"pieces": taken}


def long() -> dict[str, Any]:
    return {"text": answer(LONG)}


if __name__ == "__main__":
    tell(chat, stream, tools, structured, reasoning, embeddings, cancellation, long)
