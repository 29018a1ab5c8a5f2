"""A web app that streams a sealed answer to the browser: FastAPI, server-sent events, and a page without a library.

    uvicorn --app-dir examples/web app:app

Between browser and app the text is in the clear. In production, run this app behind TLS, on a host that its users trust.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field

import lacre


class Question(BaseModel):
    text: str = Field(min_length=1, max_length=20_000)
    max_tokens: int = Field(default=300, ge=1, le=1000)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with lacre.AsyncClient() as client:  # one for all requests: it keeps connections, and the manifest
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("page.html"))


@app.post("/ask")
async def ask(question: Question, request: Request) -> StreamingResponse:
    client: lacre.AsyncClient = request.app.state.client
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(events(client, question), media_type="text/event-stream", headers=headers)


async def events(client: lacre.AsyncClient, question: Question) -> AsyncIterator[str]:
    """A browser that leaves cancels this, and with it the request, down to the worker."""
    async with client.chat_stream(question.text, max_tokens=question.max_tokens) as stream:
        try:
            async for piece in stream:
                yield event("piece", piece)
        except lacre.LacreError as error:
            yield event("failed", {"message": str(error), "remedy": error.remedy})
            return
        reply = await stream.reply()  # whole by now: it has its usage, its receipt and its proof
        yield event("done", {"tokens": reply.usage.completion, "model": reply.model})


def event(name: str, data: object) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
