"""`langchain` with `langchain-openai`: an agent and its model."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from asked import EMBEDDER, GREEDY, LONG, MODEL, MOOD, PIECES, PLAIN, SLOW, TEXTS, THINK, WEATHER, streamed, tell
from asked import weather as told

LLM = ChatOpenAI(model=MODEL, max_retries=0, **GREEDY)


class Mood(pydantic.BaseModel):
    mood: Literal["good", "bad"]
    points: int


@tool
def weather(city: str) -> str:
    """Tells the weather in a city."""
    return told(city)


def asked(text: str) -> Any:
    return {"messages": [{"role": "user", "content": text}]}


def chat() -> dict[str, Any]:
    return {"text": LLM.invoke(PLAIN).content}


def stream() -> dict[str, Any]:
    return streamed([str(chunk.content) for chunk in LLM.stream(PLAIN) if chunk.content])


def tools() -> dict[str, Any]:
    agent = create_agent(LLM, tools=[weather], system_prompt="You know the sea.")
    return {"text": agent.invoke(asked(WEATHER))["messages"][-1].content}


def structured() -> Any:
    return LLM.with_structured_output(Mood).invoke(MOOD).model_dump()


def reasoning() -> dict[str, Any]:
    """Over the Responses API: of chats it shows no reasoning."""
    answer = ChatOpenAI(model=MODEL, max_retries=0, output_version="responses/v1", use_responses_api=True, **GREEDY).invoke(
        THINK
    )
    thoughts = [block for block in answer.content if isinstance(block, dict) and block["type"] == "reasoning"]
    return {"text": answer.text, "thought": "".join(part["text"] for each in thoughts for part in each["content"])}


def embeddings() -> dict[str, Any]:
    # Without this, it sends the ids of tokens of OpenAI's own models.
    found = OpenAIEmbeddings(model=EMBEDDER, check_embedding_ctx_length=False).embed_documents(TEXTS)
    return {"length": len(found[0]), "many": len(found)}


async def cancellation() -> dict[str, Any]:
    taken, chunks = 0, LLM.astream(SLOW)
    async for _ in chunks:
        taken += 1
        if taken == PIECES:
            break
    await chunks.aclose()
    return {"pieces": taken}


def long() -> dict[str, Any]:
    return {"text": LLM.invoke(LONG).content}


if __name__ == "__main__":
    tell(chat, stream, tools, structured, reasoning, embeddings, cancellation, long)
