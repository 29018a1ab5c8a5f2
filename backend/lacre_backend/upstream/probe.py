"""Whether the upstream is there: looked at all the time, so that a worker in front of one that is down takes no work.

Rules
- A connection that is accepted and closed again is enough, unless the settings name a path (`health`). Then that must answer
  with a status of 200 to 299: a server may listen before its models are loaded.
- Nothing of the answer is read but its status. No redirect is followed.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

import httpx2

from lacre_backend.node.readiness import Reason
from lacre_backend.upstream.origin import CONNECT
from lacre_backend.upstream.settings import Upstream

EVERY: Final = 2.0  # seconds between looks: what callers notice of an upstream that goes lasts no longer
_FAILURES: Final = (OSError, TimeoutError, httpx2.TransportError)


class Probe:
    """Looks at one upstream. every: seconds between looks."""

    def __init__(self, settings: Upstream, *, every: float = EVERY) -> None:
        self._origin = settings.origin
        self._health = settings.health
        self._every = every
        self._wrong: str | None = "was not looked at yet"
        self._transport = httpx2.AsyncHTTPTransport(verify=settings.origin.startswith("https:"), trust_env=False)

    def reason(self) -> Reason | None:
        """What the last look found."""
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
