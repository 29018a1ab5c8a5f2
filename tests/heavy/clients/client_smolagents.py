"""`smolagents`: an agent that calls tools, and the model under it."""

from __future__ import annotations

from typing import Any

from smolagents import OpenAIServerModel, ToolCallingAgent, tool

from asked import GREEDY, KEY, LONG, MODEL, PIECES, PLAIN, SLOW, URL, WEATHER, streamed, tell
from asked import weather as told

LLM = OpenAIServerModel(model_id=MODEL, api_base=URL, api_key=KEY, **GREEDY)


@tool
def weather(city: str) -> str:
    """Tells the weather in a city.

    Args:
        city: The city's name.
    """
    return told(city)


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def chat() -> dict[str, Any]:
    return {"text": LLM.generate(said(PLAIN)).content}


def stream() -> dict[str, Any]:
    return streamed([delta.content for delta in LLM.generate_stream(said(PLAIN)) if delta.content])


def tools() -> dict[str, Any]:
    return {"text": ToolCallingAgent(tools=[weather], model=LLM, max_steps=3, verbosity_level=0).run(WEATHER)}


def cancellation() -> dict[str, Any]:
    taken, deltas = 0, LLM.generate_stream(said(SLOW))
    for _ in deltas:
        taken += 1
        if taken == PIECES:
            break
    deltas.close()
    return {"pieces": taken}


def long() -> dict[str, Any]:
    return {"text": LLM.generate(said(LONG)).content}


if __name__ == "__main__":
    tell(chat, stream, tools, cancellation, long)
