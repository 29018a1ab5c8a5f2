"""A worker in a process of its own, whose calls wait: a real node over NATS, and in place of a model chance, which uses tokens.

`python -m parts.held_worker SITE NATS_URL FREE SLOTS`. All calls but the first FREE are held until a line comes on stdin. Each
time that a number changes, it prints a line: how many calls run, how many were answered, and how many ran at once at most.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from typing import Any

from lacre.asgi import EXTENSION
from lacre_fabric.operate.site import Site
from parts.stage.live import connected_node

MAX_PROMPT = 60  # tokens that a call says it had; less than any sealed request has bytes


class App:
    """free: calls that are not held."""

    def __init__(self, free: int) -> None:
        self._random = random.Random(7)
        self._free = free
        self._begun = self._running = self._most = self._answered = 0
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        call = scope["extensions"][EXTENSION]
        self._begun += 1
        self._count(1)
        try:
            call.usage.model_digest = "sha256:77"
            call.usage.prompt_tokens = self._random.randint(1, MAX_PROMPT)
            call.usage.cached_tokens = self._random.randint(0, call.usage.prompt_tokens)
            if self._begun > self._free:
                await self.go.wait()
            await asyncio.sleep(self._random.uniform(0.02, 0.2))
            call.usage.completion_tokens = self._random.randint(0, call.max_tokens)
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
            await send({"type": "http.response.body", "body": b"{}"})
            self._answered += 1
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self._running += change
        self._most = max(self._most, self._running)
        print(self._running, self._answered, self._most, flush=True)


async def main(folder: Path, url: str, free: int, slots: int) -> None:
    app, loop = App(free), asyncio.get_running_loop()
    loop.add_reader(sys.stdin, lambda: (sys.stdin.readline(), app.go.set(), loop.remove_reader(sys.stdin)))
    async with connected_node(Site.load(folder), url, app, slots=slots) as node:
        await node.run()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
