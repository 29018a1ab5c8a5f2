"""What programs do with `pydantic-ai`, by name. Prints JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Literal

from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from sealed import CHAT, async_arguments

ASK = "Name the colours of the rainbow."
BRIEF = ModelSettings(temperature=0, max_tokens=12)


class Mood(BaseModel):
    mood: Literal["good", "bad"]


def model() -> OpenAIChatModel:
    return OpenAIChatModel(CHAT, provider=OpenAIProvider(openai_client=AsyncOpenAI(**async_arguments())))


async def run() -> dict[str, Any]:
    answer = await Agent(model(), model_settings=BRIEF).run(ASK)
    return {"text": answer.output, "tokens": answer.usage.output_tokens}


async def stream() -> dict[str, Any]:
    async with Agent(model(), model_settings=BRIEF).run_stream(ASK) as answer:
        pieces = [piece async for piece in answer.stream_text(delta=True, debounce_by=None)]
    return {"text": "".join(pieces), "pieces": len(pieces)}


async def structured() -> dict[str, Any]:
    agent = Agent(model(), output_type=NativeOutput(Mood), model_settings=ModelSettings(temperature=0, max_tokens=48))
    return {"mood": (await agent.run("Rate this: a lovely day.")).output.mood}


if __name__ == "__main__":
    print(json.dumps({name: asyncio.run(globals()[name]()) for name in sys.argv[1:]}))
