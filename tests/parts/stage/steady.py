"""Clients that ask one question after another over HTTP, for tests that change a deployment meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import lacre
from parts.stage.live import LiveStage
from parts.waiting import until

CLIENTS = 3
PAUSE = 0.1  # seconds between a client's requests


@dataclass
class SteadyLoad:
    """failed: by the error's words. attempts: how often each answered request was sealed. options: of the clients.

    Each client asks one gateway. Half of the clients keep what they know; the others begin anew with each request.
    """

    live: LiveStage
    options: dict[str, Any] = field(default_factory=dict)
    done: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    @asynccontextmanager
    async def on(cls, live: LiveStage, clients: int = CLIENTS, **options: Any) -> AsyncIterator[SteadyLoad]:
        load = cls(live, options)
        asking = [asyncio.create_task(load._ask(number)) for number in range(clients)]
        try:
            await load.more()
            yield load
        finally:
            load.stop.set()
            await asyncio.gather(*asking)
        print(f"{load.done} requests, {load.failed.total()} failed, {load.attempts[2]} sealed twice")

    async def _ask(self, number: int) -> None:
        gateway = self.live.gateways[number % len(self.live.gateways)]
        while not self.stop.is_set():
            async with lacre.AsyncClient(
                gateway.url, token=self.live.token("alice"), memory=lacre.VersionMemory(), **self.options
            ) as client:
                while not self.stop.is_set():
                    await self._one(client)
                    if number % 2:
                        break

    async def _one(self, client: lacre.AsyncClient) -> None:
        try:
            reply = await client.chat("Name a sea.", max_tokens=4)
        except lacre.LacreError as exc:
            self.failed[f"{type(exc).__name__}: {exc}"] += 1
        else:
            self.done += bool(reply.text)
            self.attempts[reply.attempts] += 1
        await asyncio.sleep(PAUSE)

    async def more(self, count: int = 10) -> None:
        """Returns after so many further answers, or at a failure."""
        enough = self.done + count
        await until(lambda: self.done >= enough or self.failed, 60)
