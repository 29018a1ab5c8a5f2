"""Checks continuously that the upstream is up, so that a worker whose upstream is down takes no work.

Rules:
- An accepted connection is enough, unless the settings name a path (`health`). Then that path must answer with a status of 200
  to 299: a server may listen before its models are loaded.
- A server that refuses a connection is down at once. Other failures must repeat (`health_failures`): a busy server may be late.
- One good check brings a server back. The worker can work while at least one of its servers is up.
- Only the status of the answer is read. No redirect is followed.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Final

import httpx2
import structlog

from lacre.runtime import tasks
from lacre.transport.fault_words import fault_in_words
from lacre_backend.node.readiness import Reason
from lacre_backend.upstream.origin import CONNECT
from lacre_backend.upstream.origins import Origins
from lacre_backend.upstream.settings import Upstream
from lacre_backend.upstream.state import OriginState

_NO_CONNECTION: Final = (ConnectionRefusedError, httpx2.ConnectError)
_FAILURES: Final = (OSError, TimeoutError, httpx2.TransportError)
_KIND: Final = "upstream"
_REMEDY: Final = "start it, or correct upstream.origin"

log = structlog.get_logger("lacre.upstream")


class Probe:
    """Checks the servers of one upstream, and reads its credentials again if they change."""

    def __init__(self, settings: Upstream, origins: Origins) -> None:
        self._origins = origins
        self._health = settings.health
        self._every = settings.health_every
        self._allowed = settings.health_failures
        secure = any(url.startswith("https:") for url in settings.addresses)
        self._transport = httpx2.AsyncHTTPTransport(verify=secure, trust_env=False)

    def reason(self) -> Reason | None:
        """Why no server can work, from the last checks and requests. None if one can."""
        faults = self.faults()
        if len(faults) < len(self._origins.states):
            return None
        return Reason(_KIND, "; ".join(fault.detail for fault in faults), _REMEDY)

    def faults(self) -> list[Reason]:
        """One for each server that is down."""
        now = time.monotonic()
        faults = [(state.url, state.fault(now)) for state in self._origins.states]
        return [Reason(_KIND, f"the upstream at {url} {fault}", _REMEDY) for url, fault in faults if fault is not None]

    def lines(self) -> list[str]:
        """Of the health file, after the first one."""
        return self._origins.lines()

    async def watch(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self._every)

    async def look(self) -> None:
        await asyncio.to_thread(self._origins.fixed.reload)
        await tasks.together(*(self._look_at(state) for state in self._origins.states))

    async def close(self) -> None:
        await self._transport.aclose()

    async def _look_at(self, state: OriginState) -> None:
        allowed, wrong = self._allowed, None
        try:
            async with asyncio.timeout(CONNECT):
                wrong = await (self._connect(state.url) if self._health is None else self._ask(state.url, self._health))
        except _FAILURES as exc:
            wrong = f"cannot be reached: {fault_in_words(exc)}"
            if isinstance(exc, _NO_CONNECTION):
                allowed = 1
        address = httpx2.URL(state.url)
        where = {"host": address.host, "port": address.port or 0}
        if wrong is None:
            if state.reached() is not None:
                log.info("upstream.up", **where)
        elif state.missed(wrong, allowed):
            log.warning("upstream.down", reason=wrong, **where)

    async def _connect(self, origin: str) -> None:
        url = httpx2.URL(origin)
        _, writer = await asyncio.open_connection(url.host, url.port or (443 if url.scheme == "https" else 80))
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async def _ask(self, origin: str, path: str) -> str | None:
        """What is wrong with the answer."""
        request = httpx2.Request(
            "GET",
            origin + path,
            headers=[*self._origins.fixed.headers, (b"connection", b"close")],
            extensions={"timeout": httpx2.Timeout(CONNECT).as_dict()},
        )
        response = await self._transport.handle_async_request(request)
        await response.aclose()
        status = response.status_code
        return None if 200 <= status < 300 else f"answers {path} with status {status}"
