"""`instructor`: answers as pydantic models, over `openai`."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
import pydantic

from asked import GREEDY, LONG, MODEL, MOOD, PIECES, PLAIN, SLOW, THINK, WEATHER, streamed, tell
from asked import weather as told

CLIENT = instructor.from_openai(openai.OpenAI(max_retries=0))


GIVEN: dict[str, Any] = {"model": MODEL, "max_retries": 0, **GREEDY}


class Mood(pydantic.BaseModel):
    mood: Literal["good", "bad"]
    points: int


class weather(pydantic.BaseModel):
    """Tells the weather in a city."""

    city: str


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def whole(text: str) -> str:
    completion = CLIENT.create(response_model=None, messages=said(text), **GIVEN)
    return completion.choices[0].message.content or ""


def chat() -> dict[str, Any]:
    return {"text": whole(PLAIN)}


def pieces(text: str) -> Any:
    return CLIENT.create(response_model=None, messages=said(text), stream=True, **GIVEN)


def stream() -> dict[str, Any]:
    found = [chunk.choices[0].delta.content for chunk in pieces(PLAIN) if chunk.choices]
    return streamed([piece for piece in found if piece])


def tools() -> dict[str, Any]:
    """Its one call is the answer."""
    called = CLIENT.create(response_model=weather, messages=said(WEATHER), **GIVEN)
    return {"text": f"It is {told(called.city)}."}


def structured() -> Any:
    return CLIENT.create(response_model=Mood, messages=said(MOOD), **GIVEN).model_dump()


def reasoning() -> dict[str, Any]:
    message = CLIENT.create(response_model=None, messages=said(THINK), **GIVEN).choices[0].message
    return {"text": message.content, "thought": message.model_extra["reasoning_content"]}


def cancellation() -> dict[str, Any]:
    taken = 0
    with pieces(SLOW) as chunks:
        for _ in chunks:
            taken += 1
            if taken == PIECES:
                break
    return {"pieces": taken}


def long() -> dict[str, Any]:
    return {"text": whole(LONG)}


if __name__ == "__main__":
    tell(chat, stream, tools, structured, reasoning, cancellation, long)
