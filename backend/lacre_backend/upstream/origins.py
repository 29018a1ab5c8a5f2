"""All servers of the upstream, and which of them gets a request.

Rules:
- A request goes to the server with the fewest running requests. Among equals, to the one that was chosen longest ago.
- A server that is down, or was unreachable a moment ago, gets a request only if no other server takes it.
- If there was no connection, nothing was sent, so the next server gets the request. A request that was sent stays where it is,
  regardless of what happens there: the server may have acted on it. So does a stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from lacre_backend.upstream import refusals
from lacre_backend.upstream.credentials import FixedHeaders
from lacre_backend.upstream.origin import NotSent, Origin, UpstreamRequest, UpstreamResponse
from lacre_backend.upstream.settings import Upstream
from lacre_backend.upstream.state import OriginState


class Origins:
    """The servers of `settings`. Raises SettingsError if a credential cannot be read."""

    def __init__(self, settings: Upstream) -> None:
        self.fixed = FixedHeaders(settings.credentials)
        self._servers = [Origin(OriginState(url), settings, self.fixed) for url in settings.addresses]
        self._longest = settings.longest
        self._choices = 0

    @property
    def states(self) -> tuple[OriginState, ...]:
        return tuple(server.state for server in self._servers)

    @asynccontextmanager
    async def ask(self, request: UpstreamRequest) -> AsyncIterator[UpstreamResponse]:
        """Raises RequestRefused if no forwardable answer comes. Leaving the context ends the request at the upstream."""
        deadline = asyncio.get_running_loop().time() + self._longest
        left = list(self._servers)
        while left:
            server = self._choose(left)
            left.remove(server)
            async with AsyncExitStack() as stack:
                try:
                    answer = await stack.enter_async_context(server.ask(request, deadline))
                except NotSent:
                    continue
                yield answer
                return
        raise refusals.unavailable()

    def lines(self) -> list[str]:
        """One for each server, for the health file."""
        now = time.monotonic()
        return [state.line(now) for state in self.states]

    def _choose(self, servers: list[Origin]) -> Origin:
        now = time.monotonic()
        chosen = min(servers, key=lambda each: (not each.state.usable(now), each.state.running, each.state.chosen))
        self._choices += 1
        chosen.state.chosen = self._choices
        return chosen
