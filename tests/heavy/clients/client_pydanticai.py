"""`pydantic-ai`: agents over the chat API."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic_ai import Agent
from pydantic_ai.messages import ThinkingPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.settings import ModelSettings

from asked import GREEDY, LONG, MODEL, MOOD, PIECES, PLAIN, SLOW, THINK, WEATHER, streamed, tell, weather

LLM = OpenAIChatModel(MODEL, settings=ModelSettings(**GREEDY))


class Mood(pydantic.BaseModel):
    mood: Literal["good", "bad"]
    points: int


async def chat() -> dict[str, Any]:
    return {"text": (await Agent(LLM).run(PLAIN)).output}


async def stream() -> dict[str, Any]:
    async with Agent(LLM).run_stream(PLAIN) as result:
        return streamed([piece async for piece in result.stream_text(delta=True, debounce_by=None)])


async def tools() -> dict[str, Any]:
    return {"text": (await Agent(LLM, tools=[weather]).run(WEATHER)).output}


async def structured() -> Any:
    return (await Agent(LLM, output_type=Mood).run(MOOD)).output.model_dump()


async def reasoning() -> dict[str, Any]:
    result = await Agent(LLM).run(THINK)
    parts = [part for message in result.new_messages() for part in message.parts]
    return {"text": result.output, "thought": "".join(part.content for part in parts if isinstance(part, ThinkingPart))}


async def cancellation() -> dict[str, Any]:
    taken = 0
    async with Agent(LLM).run_stream(SLOW) as result:
        async for _ in result.stream_text(delta=True, debounce_by=None):
            taken += 1
            if taken == PIECES:
                await result.cancel()
                break
    return {"pieces": taken}


async def long() -> dict[str, Any]:
    return {"text": (await Agent(LLM).run(LONG)).output}


if __name__ == "__main__":
    tell(chat, stream, tools, structured, reasoning, cancellation, long)
