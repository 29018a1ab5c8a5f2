"""`openai-agents`: agents over the Responses API."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pydantic
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled

from asked import GREEDY, LONG, MODEL, MOOD, PIECES, PLAIN, SLOW, THINK, WEATHER, streamed, tell
from asked import weather as told

set_tracing_disabled(True)


class Mood(pydantic.BaseModel):
    mood: Literal["good", "bad"]
    points: int


@function_tool
def weather(city: str) -> str:
    """Tells the weather in a city."""
    return told(city)


def agent(**more: Any) -> Agent[Any]:
    model = OpenAIResponsesModel(model=MODEL, openai_client=openai.AsyncOpenAI(max_retries=0))
    return Agent(name="Sailor", instructions="You know the sea.", model=model, model_settings=ModelSettings(**GREEDY), **more)


async def answer(text: str, **more: Any) -> Any:
    return (await Runner.run(agent(**more), text)).final_output


async def chat() -> dict[str, Any]:
    return {"text": await answer(PLAIN)}


async def stream() -> dict[str, Any]:
    events = Runner.run_streamed(agent(), PLAIN).stream_events()
    return streamed([event.data.delta async for event in events if _is_text(event)])


def _is_text(event: Any) -> bool:
    return event.type == "raw_response_event" and event.data.type == "response.output_text.delta"


async def tools() -> dict[str, Any]:
    return {"text": await answer(WEATHER, tools=[weather])}


async def structured() -> Any:
    return (await answer(MOOD, output_type=Mood)).model_dump()


async def reasoning() -> dict[str, Any]:
    result = await Runner.run(agent(), THINK)
    thoughts = [item.raw_item for item in result.new_items if item.type == "reasoning_item"]
    return {"text": result.final_output, "thought": "".join(part.text for each in thoughts for part in each.content or [])}


async def cancellation() -> dict[str, Any]:
    run, taken = Runner.run_streamed(agent(), SLOW), 0
    async for event in run.stream_events():
        taken += _is_text(event)
        if taken == PIECES:
            run.cancel()
            break
    return {"pieces": taken}


async def long() -> dict[str, Any]:
    return {"text": await answer(LONG)}


if __name__ == "__main__":
    tell(chat, stream, tools, structured, reasoning, cancellation, long)
