"""What every stage does: it ends what it put up, the last thing first, and has clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

import httpx2

import lacre
from lacre_backend.node.node import Node
from lacre_gateway.audit.reader import LogReader
from parts.wires import SyncWire


class Standing:
    """stack: what is to be ended."""

    def __init__(self) -> None:
        self.stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """What fails in the block is what the test reports: a fault of the cleanup after it is only noted there."""
        try:
            await self.close()
        except Exception as fault:
            if error is None:
                raise
            error.add_note(f"the cleanup failed too: {fault!r}")

    async def close(self) -> None:
        await self.stack.aclose()

    def run(self, node: Node) -> Callable[[], Any]:
        """Starts it. Returns what ends it, as `close` does otherwise."""
        task = asyncio.create_task(node.run())

        async def stop() -> None:
            await end(task)
            await node.drain(1)

        self.stack.push_async_callback(stop)
        return stop

    def client_of(self, url: str, token: str, wire: httpx2.AsyncBaseTransport | None, **options: Any) -> lacre.AsyncClient:
        """It neither asks again nor resumes, unless `options` say so: each failure is seen."""
        client = lacre.AsyncClient(url, **_settings(token, wire, options))
        self.stack.push_async_callback(client.aclose)
        return client

    def sync_client_of(self, url: str, token: str, wire: httpx2.AsyncBaseTransport, **options: Any) -> lacre.Client:
        """The sync one; use it from a thread."""
        client = lacre.Client(url, **_settings(token, SyncWire(wire, asyncio.get_running_loop()), options))
        self.stack.callback(client.close)
        return client


def _settings(token: str, wire: object, options: dict[str, Any]) -> dict[str, Any]:
    return {"token": token, "memory": lacre.VersionMemory(), "transport": wire, "retries": 0, "resume": 0, **options}


def entries(audit: Path, *kinds: str) -> list[dict[str, Any]]:
    """Of an audit log, as it is on the disk. kinds: all, if none is named."""
    found = map(json.loads, LogReader(audit).entries())
    return [entry for entry in found if not kinds or entry["kind"] in kinds]


async def end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
