"""Conversations over several workers with the real model: each turn finds the cache that the last one left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import lacre
from parts.stage.live import MODEL, LiveStage
from parts.stage.processes import busiest, worker_settings
from parts.stage.settings import POOL, own_issuer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CONVERSATIONS, WORKERS = 4, 3
# A few dozen tokens each, and different from the first word on: conversations share no beginning.
SETTING = (
    "You are guide number {0} of the museum in room {0}. Room {0} shows paintings, maps and clocks. Answer in one sentence."
)
ASKED = (
    "What does your room show to its visitors today?",
    "Which of these things is the oldest, and who made it?",
    "How did it come to the museum, and when was that?",
    "What do children like most about it when they see it?",
    "Where should I go after I have seen your room?",
    "Thank you. What should I not miss on my way out?",
)


@dataclass
class Talk:
    """A conversation, as its client has it. cached, prompts: tokens of each turn."""

    messages: list[dict[str, Any]]
    cached: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, number: int) -> Talk:
        return cls([{"role": "system", "content": SETTING.format(number)}])

    async def turn(self, client: lacre.AsyncClient) -> None:
        self.messages.append({"role": "user", "content": ASKED[len(self.cached)]})
        reply = await client.chat(self.messages, max_tokens=8, temperature=0)
        self.messages.append({"role": "assistant", "content": reply.text})
        self.cached.append(reply.receipt.cached_tokens)
        self.prompts.append(reply.receipt.prompt_tokens)

    def cold(self) -> list[int]:
        """The later turns that did not find all of the turn before."""
        turns = range(1, len(self.cached))
        return [turn for turn in turns if self.cached[turn] < self.prompts[turn - 1]]


@asynccontextmanager
async def museum(folder: Path) -> AsyncIterator[LiveStage]:
    nodes = [f"n{number + 1}" for number in range(WORKERS)]
    async with LiveStage(folder, {POOL: (MODEL,)}) as live:
        await live.start_fabric(nodes=nodes[1:])
        live.write_settings({"name": MODEL, "threads": 1, "context": 4096, "slots": CONVERSATIONS})
        for node in nodes:
            live.worker(worker_settings(live.site, node), node)
        await live.start_workers()
        live.gateway(own_issuer(live.site))
        await live.start_gateways()
        await live.heard()
        yield live


async def test_turns_find_their_cache_and_a_killed_worker_costs_one_cold_turn(tmp_path: Path) -> None:
    """Each later turn reuses all of the turn before. Another caller with the same conversation reuses nothing of it."""
    async with museum(tmp_path) as live:
        client, before = live.client(live.token("ann")), [worker.ticks for worker in live.workers]
        talks = [Talk.of(number) for number in range(CONVERSATIONS)]
        await client.chat("Hello.", max_tokens=1)
        await asyncio.sleep(1.5)  # the gateway hears all workers, and they know that their queue is empty
        for _ in range(3):
            for talk in talks:
                await talk.turn(client)
        cold = [turn for talk in talks for turn in talk.cold()]
        assert len(cold) <= 1  # of eight; by chance five. A worker that this machine keeps waiting may miss one
        for talk in talks[:2]:
            copy = Talk(talk.messages[:3], [0], [0])
            await copy.turn(live.client(live.token("bob")))
            assert copy.cached[1] == 0, "another caller found this conversation"

        killed = busiest(live.workers, before)
        killed.process.kill()
        killed.process.wait()
        await asyncio.sleep(0.5)  # NATS notices, and presence still names it
        for _ in range(3):
            for talk in talks:
                await talk.turn(client)
    cold_after = [len([turn for turn in talk.cold() if turn > 2]) for talk in talks]
    assert 0 < sum(cold_after) <= sum(turns > 0 for turns in cold_after) + 1
