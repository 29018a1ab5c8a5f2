"""Conversations over a deployment of several workers with the real model, one thread each."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lacre
from parts.stage.live import MODEL, LiveStage
from parts.stage.processes import worker_settings
from parts.stage.settings import POOL, own_issuer


@dataclass
class Talk:
    """A conversation, as its client has it. cached, prompts: tokens of each turn. first: milliseconds to its first token."""

    messages: list[dict[str, Any]]
    cached: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, setting: str) -> Talk:
        return cls([{"role": "system", "content": setting}])

    async def turn(self, client: lacre.AsyncClient, asked: str, tokens: int = 8) -> None:
        self.messages.append({"role": "user", "content": asked})
        began = time.perf_counter()
        stream = client.chat_stream(self.messages, max_tokens=tokens, temperature=0)
        await anext(stream, None)
        self.first.append((time.perf_counter() - began) * 1e3)
        reply = await stream.reply()
        self.messages.append({"role": "assistant", "content": reply.text})
        self.cached.append(reply.receipt.cached_tokens)
        self.prompts.append(reply.receipt.prompt_tokens)


@asynccontextmanager
async def several_workers(folder: Path, workers: int, slots: int) -> AsyncIterator[LiveStage]:
    """A gateway, and so many workers that it has heard. slots: of each."""
    nodes = [f"n{number + 1}" for number in range(workers)]
    async with LiveStage(folder, {POOL: (MODEL,)}) as live:
        await live.start_fabric(nodes=nodes[1:])
        live.write_settings({"name": MODEL, "threads": 1, "context": 4096, "slots": slots})
        for node in nodes:
            live.worker(worker_settings(live.site, node), node)
        await live.start_workers()
        live.gateway(own_issuer(live.site))
        await live.start_gateways()
        await live.heard()
        yield live
