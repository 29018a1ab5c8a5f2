"""What programs do with `langchain-openai`, by name. Prints JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from sealed import BASE_URL, CHAT, EMBED, AsyncClient, Client

CLIENTS: dict[str, Any] = {
    "http_client": Client(), "http_async_client": AsyncClient(), "base_url": BASE_URL, "api_key": "sealed",
}  # fmt: skip
ASK = "Name the colours of the rainbow."


def model(**options: Any) -> ChatOpenAI:
    return ChatOpenAI(model=CHAT, temperature=0, **{"max_tokens": 12, **options}, **CLIENTS)


def invoke() -> dict[str, Any]:
    answer = model().invoke([HumanMessage(ASK)])
    return {"text": answer.content, "tokens": answer.usage_metadata["output_tokens"]}


def astream() -> dict[str, Any]:
    async def main() -> list[str]:
        return [str(chunk.content) async for chunk in model().astream(ASK) if chunk.content]

    pieces = asyncio.run(main())
    return {"text": "".join(pieces), "pieces": len(pieces)}


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def binding() -> dict[str, Any]:
    asked = HumanMessage("What is 2 plus 3?")
    answer = model(max_tokens=64).bind_tools([add], tool_choice="add", parallel_tool_calls=False).invoke([asked])
    [call] = answer.tool_calls
    result = add.invoke(call["args"])
    said = ToolMessage(str(result), tool_call_id=call["id"])
    after = model().bind_tools([add], tool_choice="none").invoke([asked, answer, said])
    return {"name": call["name"], "arguments": call["args"], "then": after.content}


def embeddings() -> dict[str, Any]:
    vectors = OpenAIEmbeddings(model=EMBED, check_embedding_ctx_length=False, **CLIENTS).embed_documents(["a cat", "a kitten"])
    return {"length": len(vectors[0]), "many": len(vectors)}


if __name__ == "__main__":
    print(json.dumps({name: globals()[name]() for name in sys.argv[1:]}))
