"""`instructor`: answers as pydantic models, over `openai`."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
import pydantic

from asked import LONG, MODEL, MOOD, PIECES, PLAIN, SLOW, WEATHER, streamed, tell
from asked import weather as told

CLIENT = instructor.from_openai(openai.OpenAI(max_retries=0))


class Mood(pydantic.BaseModel):
    mood: Literal["good", "bad"]
    points: int


class weather(pydantic.BaseModel):
    """Tells the weather in a city."""

    city: str


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def whole(text: str) -> str:
    completion = CLIENT.create(response_model=None, model=MODEL, messages=said(text), max_retries=0)
    return completion.choices[0].message.content or ""


def chat() -> dict[str, Any]:
    return {"text": whole(PLAIN)}


def pieces(text: str) -> Any:
    return CLIENT.create(response_model=None, model=MODEL, messages=said(text), stream=True, max_retries=0)


def stream() -> dict[str, Any]:
    found = [chunk.choices[0].delta.content for chunk in pieces(PLAIN) if chunk.choices]
    return streamed([piece for piece in found if piece])


def tools() -> dict[str, Any]:
    """Its one call is the answer."""
    called = CLIENT.create(response_model=weather, model=MODEL, messages=said(WEATHER), max_retries=0)
    return {"text": f"It is {told(called.city)}."}


def structured() -> Any:
    return CLIENT.create(response_model=Mood, model=MODEL, messages=said(MOOD), max_retries=0).model_dump()


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
    tell(chat, stream, tools, structured, cancellation, long)
