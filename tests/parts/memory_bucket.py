"""A `Bucket` without a server. It keeps the contract of the one on NATS: tests/fabric/test_buckets.py holds both to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from lacre_fabric.nats.kv import Conflict, Entry


class MemoryBucket:
    """A `Bucket` inside one process."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.entries: dict[str, Entry] = {}
        self._clock = clock
        self._revision = 0

    async def read(self, key: str) -> Entry | None:
        await asyncio.sleep(0)
        return self.entries.get(key)

    async def scan(self, begin: str, most: int) -> tuple[dict[str, list[bytes]], bool]:
        await asyncio.sleep(0)
        found = {key: [entry.value, *entry.others] for key, entry in self.entries.items() if key.startswith(begin)}
        return dict(list(found.items())[:most]), len(found) < most

    async def write(self, key: str, value: bytes, revision: int) -> int:
        await asyncio.sleep(0)
        current = self.entries.get(key)
        if revision != (0 if current is None else current.revision):
            raise Conflict("the key was changed meanwhile")
        self._revision += 1
        self.entries[key] = Entry(value, self._revision, self._clock())
        return self._revision
