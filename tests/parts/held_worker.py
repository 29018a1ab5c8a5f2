"""A worker in a process of its own, whose calls wait: a real node over NATS, and in place of a model chance, which uses tokens.

`python parts/held_worker.py SITE NATS_URL FREE SLOTS`. All calls but the first FREE are held until a line comes on stdin. Each
time that a number changes, it prints a line: how many calls run, how many were answered, and how many ran at once at most.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from typing import Any

from lacre.asgi import EXTENSION
from lacre_backend.keyring import KeyRing
from lacre_backend.node.node import Identity, Node
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.nats.manifest_feed import ManifestFeed
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate.site import NODE, Site

POOL, MODEL = "default", "tiny"
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
    site, app = Site.load(folder), App(free)
    keys, receipt_key = KeyRing(site.keys_folder(POOL)), read_ed25519(site.folder / "pools" / POOL / "receipt.pem")
    fabric = await NatsWorker.connect(url, site.credential(f"worker-{POOL}-{NODE}"), POOL, NODE, [MODEL], slots=slots)
    feed = ManifestFeed(fabric.connection.manifest, site.root)
    await feed.start()
    node = Node(fabric, app, Identity(POOL, lambda: keys.keys, receipt_key, lambda: feed.manifest))
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin, lambda: (sys.stdin.readline(), app.go.set(), loop.remove_reader(sys.stdin)))
    await node.run()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
