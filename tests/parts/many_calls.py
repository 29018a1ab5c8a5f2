"""Many calls from one client, measured in a process of its own, against a gateway and worker in another.

python -m parts.many_calls serve            prints a connection string, and serves until it is ended
python -m parts.many_calls ask URL CALLS CONCURRENCY      prints what it measured, as JSON
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

import lacre
from lacre.trust.chain import ConnectionString
from lacre_fabric.operate.nats_server import free_port
from parts.chat_app import ChatApp
from parts.live import Gateway
from parts.relay import Relay

WARM_UP = 1000  # calls, after which memory must not grow


def serve() -> None:
    app, port = ChatApp(), free_port()
    relay = Relay(app)
    kept = (relay.requests, relay.opened, app.scopes, app.bodies)
    gateway = Gateway(relay, after=lambda: [each.clear() for each in kept])  # or memory grows
    print(ConnectionString(f"http://127.0.0.1:{port}", ConnectionString.parse(relay.url).root), flush=True)
    uvicorn.run(gateway, port=port, lifespan="off", log_level="error", access_log=False, timeout_graceful_shutdown=1)


class Timed(httpx2.AsyncHTTPTransport):
    """Measures what a request takes on the network, gateway and worker included: the rest of a call is the SDK's."""

    def __init__(self) -> None:
        super().__init__(limits=httpx2.Limits(max_connections=100, max_keepalive_connections=100))
        self.seconds = 0.0

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        began = time.perf_counter()
        response = await super().handle_async_request(request)
        content = b"".join([piece async for piece in response.aiter_raw()])
        await response.aclose()
        self.seconds += time.perf_counter() - began
        return httpx2.Response(response.status_code, headers=response.headers, stream=httpx2.ByteStream(content))


async def overhead(url: str, calls: int = 300) -> float:
    """Milliseconds of one call that are the SDK's own, in the middle of so many, one after another."""
    wire, own = Timed(), []
    async with lacre.AsyncClient(url, token="t", memory=lacre.VersionMemory(), transport=wire) as client:
        for _ in range(calls):
            wire.seconds, began = 0.0, time.perf_counter()
            await client.chat("Name three seas.")
            own.append(time.perf_counter() - began - wire.seconds)
    return 1000 * statistics.median(own)


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sockets() -> int:
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += str(entry.readlink()).startswith("socket:")
        except FileNotFoundError:
            continue  # the one that lists the folder
    return found


async def ask(url: str, calls: int, concurrency: int) -> dict[str, Any]:
    before, latencies, after_warm_up = sockets(), [], 0
    done = iter(range(calls))
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with lacre.AsyncClient(url, token="t", memory=lacre.VersionMemory(), limits=limits) as client:

        async def work() -> None:
            nonlocal after_warm_up
            for number in done:
                began = time.perf_counter()
                assert (await client.chat("Name three seas.")).text == "one two three"
                latencies.append(time.perf_counter() - began)
                if number == WARM_UP:
                    after_warm_up = resident()

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        seconds = time.perf_counter() - began
        at_the_end = resident()
    await asyncio.sleep(0)
    return {
        "calls": len(latencies), "per_second": round(calls / seconds), "p50_ms": round(1000 * statistics.median(latencies), 2),
        "rss_after_1000_mb": round(after_warm_up / 2**20, 1), "rss_at_the_end_mb": round(at_the_end / 2**20, 1),
        "growth": round(at_the_end / after_warm_up - 1, 4), "tasks_left": len(asyncio.all_tasks()) - 1,
        "sockets_left": sockets() - before, "overhead_p50_ms": round(await overhead(url), 2),
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        print(json.dumps(asyncio.run(ask(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))))
