"""Clients of one version's SDK that ask without an end: `load.py URL CLIENTS`, with a token in `LACRE_TOKEN`.

It prints a line for each answer, and for each failure why; it ends at SIGTERM, after the answers under way.

- No answer is resumed, so a broken one is seen. A request may be sent once more: a worker that drains hands back work that has
  just reached it, which then certainly did not run.
- Each request has a connection of its own, as behind a balancer that keeps none open to its gateways: an idle one could be
  closed at the moment at which it is used.
"""

from __future__ import annotations

import asyncio
import signal
import sys

import httpx2

import lacre

PAUSE = 0.1  # seconds between the requests of one client
TOKENS = 6


async def ask(url: str, number: int, stop: asyncio.Event) -> None:
    wire = httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_keepalive_connections=0))
    async with lacre.AsyncClient(url, memory=lacre.VersionMemory(), transport=wire, retries=1, resume=0) as client:
        while not stop.is_set():
            number += 1
            try:
                if number % 2:
                    reply = await client.chat(f"Count to {number}.", max_tokens=TOKENS, temperature=0)
                    whole = "whole" if reply.attempts == 1 else "whole, sent twice"
                else:
                    stream = client.chat_stream("Tell me of a fox.", max_tokens=TOKENS)
                    whole = "whole" if [piece async for piece in stream] else "failed: an empty stream"
                print(whole, flush=True)
            except lacre.LacreError as exc:
                print(f"failed: {type(exc).__name__}: {exc}".replace("\n", " "), flush=True)
            await asyncio.sleep(PAUSE)


async def main(url: str, clients: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await asyncio.gather(*(ask(url, number, stop) for number in range(clients)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
