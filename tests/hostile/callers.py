"""The application's side of an attack, the same for both clients of the SDK."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import lacre


class Caller(Protocol):
    async def chat(self, prompt: str, **params: Any) -> lacre.Reply: ...

    async def stream(self, prompt: str, **params: Any) -> str:
        """The text, once the stream has ended well."""


class AsyncCaller:
    def __init__(self, client: lacre.AsyncClient) -> None:
        self._client = client

    async def chat(self, prompt: str, **params: Any) -> lacre.Reply:
        return await self._client.chat(prompt, **params)

    async def stream(self, prompt: str, **params: Any) -> str:
        return "".join([piece async for piece in self._client.chat_stream(prompt, **params)])


class SyncCaller:
    def __init__(self, client: lacre.Client) -> None:
        self._client = client

    async def chat(self, prompt: str, **params: Any) -> lacre.Reply:
        return await asyncio.to_thread(self._client.chat, prompt, **params)

    async def stream(self, prompt: str, **params: Any) -> str:
        return await asyncio.to_thread(lambda: "".join(self._client.chat_stream(prompt, **params)))
