"""LlamaIndex, with its adapters for servers that speak OpenAI's API."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from llama_index.core.base.llms.types import ThinkingBlock
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

from asked import (
    EMBEDDER,
    GREEDY,
    KEY,
    LONG,
    MODEL,
    MOOD,
    PIECES,
    PLAIN,
    SLOW,
    TEXTS,
    THINK,
    URL,
    WEATHER,
    streamed,
    tell,
    weather,
)

LLM = OpenAILike(
    model=MODEL,
    api_base=URL,
    api_key=KEY,
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=1 << 17,
    max_retries=0,
    **GREEDY,
)


class Mood(pydantic.BaseModel):
    """How you feel."""

    mood: Literal["good", "bad"]
    points: int


def said(text: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=text)]


def chat() -> dict[str, Any]:
    return {"text": LLM.chat(said(PLAIN)).message.content}


def stream() -> dict[str, Any]:
    return streamed([part.delta for part in LLM.stream_chat(said(PLAIN)) if part.delta])


def tools() -> dict[str, Any]:
    return {"text": str(LLM.predict_and_call([FunctionTool.from_defaults(weather)], user_msg=WEATHER).response)}


def structured() -> Any:
    return LLM.as_structured_llm(Mood).chat(said(MOOD)).raw.model_dump()


def reasoning() -> dict[str, Any]:
    message = LLM.chat(said(THINK)).message
    thoughts = [block.content or "" for block in message.blocks if isinstance(block, ThinkingBlock)]
    return {"text": message.content, "thought": "".join(thoughts)}


def embeddings() -> dict[str, Any]:
    found = OpenAILikeEmbedding(model_name=EMBEDDER, api_base=URL, api_key=KEY, max_retries=0).get_text_embedding_batch(TEXTS)
    return {"length": len(found[0]), "many": len(found)}


async def cancellation() -> dict[str, Any]:
    taken, parts = 0, await LLM.astream_chat(said(SLOW))
    async for _ in parts:
        taken += 1
        if taken == PIECES:
            break
    await parts.aclose()
    return {"pieces": taken}


def long() -> dict[str, Any]:
    return {"text": LLM.chat(said(LONG)).message.content}


if __name__ == "__main__":
    tell(chat, stream, tools, structured, reasoning, embeddings, cancellation, long)
