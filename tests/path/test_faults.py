"""Three hundred requests over a network that breaks: each ends whole, or in a typed error that says what to do."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import lacre
from lacre.trust.chain import ConnectionString
from lacre_backend.api.app import create_app
from parts.echo_engine import EchoEngine
from parts.faults import FaultyNetwork
from parts.stage import TINY, LiveStage

REQUESTS, CLIENTS = 300, 12
TIMEOUT = 2.0  # seconds of each step on the network
# Each of up to 4 x 3 tries may wait for its connection and its answer, and for its turn.
LONGEST = 12 * (2 * TIMEOUT + 1)
SAID = "seven seas and one moon"


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[LiveStage]:
    async with LiveStage.on_air(tmp_path, create_app([EchoEngine(name=TINY, delay=0.002)]), slots=32) as live:
        yield live


class Counting(httpx2.AsyncHTTPTransport):
    """Counts the sealed requests that leave. A connection each: a fault is one request's."""

    def __init__(self) -> None:
        super().__init__(limits=httpx2.Limits(max_keepalive_connections=0))
        self.sealed = 0

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.sealed += request.url.path == "/v1/sealed"
        return await super().handle_async_request(request)


class Caller:
    """A client that asks one thing after another, and keeps what came of it."""

    def __init__(self, url: str, token: str) -> None:
        self._wire = Counting()
        self._client = lacre.AsyncClient(url, token=token, timeout=TIMEOUT, memory=lacre.VersionMemory(), transport=self._wire)
        self.whole: list[lacre.Receipt] = []
        self.resumed = 0
        self.failed: list[lacre.LacreError] = []
        self.slowest = 0.0

    async def ask(self, number: int) -> None:
        before, began = self._wire.sealed, time.monotonic()
        try:
            async with asyncio.timeout(LONGEST):
                text, answer = await (self._stream() if number % 2 else self._reply())
        except lacre.LacreError as exc:
            assert exc.remedy and exc.verification is not None
            self.failed.append(exc)
        else:
            assert text == SAID
            assert answer.attempts == self._wire.sealed - before
            assert answer.usage.completion == len(SAID)
            self.whole.append(answer.receipt)
            self.resumed += isinstance(answer, lacre.AsyncChatStream) and bool(answer.parts)
        self.slowest = max(self.slowest, time.monotonic() - began)

    async def _stream(self) -> tuple[str, Any]:
        stream = self._client.chat_stream(SAID)
        return "".join([piece async for piece in stream]), stream

    async def _reply(self) -> tuple[str, Any]:
        reply = await self._client.chat(SAID)
        return reply.text, reply

    async def close(self) -> None:
        await self._client.aclose()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_network_that_breaks(live: LiveStage, record_property: Any) -> None:
    [gateway] = live.gateways
    async with FaultyNetwork(gateway.base_url, seed=11) as network:
        url = str(ConnectionString(network.base_url, live.site.root))
        callers = [Caller(url, live.site.token(f"caller-{number}")) for number in range(CLIENTS)]
        numbers = iter(range(REQUESTS))

        async def work(caller: Caller) -> None:
            for number in numbers:
                await caller.ask(number)

        await asyncio.gather(*map(work, callers))
        for caller in callers:
            await caller.close()
    whole = [receipt for caller in callers for receipt in caller.whole]
    failed = Counter(type(error).__name__ for caller in callers for error in caller.failed)
    report = {
        "whole": len(whole), "resumed": sum(caller.resumed for caller in callers), "failed": dict(failed),
        "slowest_s": round(max(caller.slowest for caller in callers), 1), "struck": network.struck,
    }  # fmt: skip
    record_property("faults", report)
    print(report)
    assert len(whole) + sum(failed.values()) == REQUESTS
    assert len(whole) > REQUESTS / 2
    assert all(network.struck[kind] for kind in ("delay", "stall", "cut", "reset", "half-close", "garbage"))
    assert len({receipt.enc for receipt in whole}) == len(whole)
    await asyncio.sleep(1)  # what was cancelled is settled after the answer
    check_log(live.entries())


def check_log(entries: list[dict[str, Any]]) -> None:
    """No sealed request was recorded twice, or has two outcomes: so none has two receipts."""
    intents = [entry["enc"] for entry in entries if entry["kind"] == "intent"]
    outcomes = [entry["request_id"] for entry in entries if entry["kind"] == "outcome"]
    assert len(intents) == len(set(intents)) > REQUESTS / 2
    assert len(outcomes) == len(set(outcomes))
