"""Checks continuously that the upstream is up, so that a worker whose upstream is down takes no work.

Rules:
- An accepted connection is enough, unless the settings name a path (`health`). Then that path must answer with a status of 200
  to 299: a server may listen before its models are loaded.
- Only the status of the answer is read. No redirect is followed.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

import httpx2

from lacre_backend.node.readiness import Reason
from lacre_backend.upstream.origin import CONNECT
from lacre_backend.upstream.settings import Upstream

EVERY: Final = 2.0  # seconds between checks: callers notice a failed upstream for no longer than this
_FAILURES: Final = (OSError, TimeoutError, httpx2.TransportError)


class Probe:
    """Checks one upstream. every: seconds between checks."""

    def __init__(self, settings: Upstream, *, every: float = EVERY) -> None:
        self._origin = settings.origin
        self._health = settings.health
        self._every = every
        self._wrong: str | None = "was not checked yet"
        self._transport = httpx2.AsyncHTTPTransport(verify=settings.origin.startswith("https:"), trust_env=False)

    def reason(self) -> Reason | None:
        """The result of the last check."""
        if self._wrong is None:
            return None
        return Reason("upstream", f"the upstream at {self._origin} {self._wrong}", "start it, or correct upstream.origin")

    async def watch(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self._every)

    async def look(self) -> None:
        try:
            async with asyncio.timeout(CONNECT):
                await (self._connect() if self._health is None else self._ask(self._health))
        except _FAILURES as exc:
            self._wrong = f"does not answer ({type(exc).__name__})"

    async def close(self) -> None:
        await self._transport.aclose()

    async def _connect(self) -> None:
        url = httpx2.URL(self._origin)
        _, writer = await asyncio.open_connection(url.host, url.port or (443 if url.scheme == "https" else 80))
        self._wrong = None
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async def _ask(self, path: str) -> None:
        limits = {"timeout": httpx2.Timeout(CONNECT).as_dict()}
        response = await self._transport.handle_async_request(
            httpx2.Request("GET", self._origin + path, headers={"connection": "close"}, extensions=limits)
        )
        await response.aclose()
        status = response.status_code
        self._wrong = None if 200 <= status < 300 else f"answers {path} with status {status}"
