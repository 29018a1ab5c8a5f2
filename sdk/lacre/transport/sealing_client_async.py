"""The common part of all sealed clients: requests are checked before they are sent, and redirects are never followed."""

from __future__ import annotations

from typing import Any

import httpx2

from lacre.exchange.call import ORIGIN
from lacre.runtime import arguments
from lacre.runtime.forks import StaysInProcess
from lacre.transport import request_log
from lacre.transport.dial import NoCookies
from lacre.transport.sealed_async import AsyncSealedTransport


class AsyncSealingClient(StaysInProcess, httpx2.AsyncClient):
    """An `httpx2.AsyncClient` whose requests go through `sealed`."""

    def __init__(self, sealed: AsyncSealedTransport, timeout: Any, event_hooks: Any) -> None:
        """timeout, event_hooks: as `arguments.timeout` and `arguments.hooks` return them."""
        request_log.once("httpx2")
        super().__init__(transport=sealed, base_url=ORIGIN, timeout=timeout, event_hooks=event_hooks, cookies=NoCookies())

    def build_request(self, *args: Any, **options: Any) -> httpx2.Request:
        """As `httpx2.AsyncClient.build_request`. Raises UsageError if the arguments do not make a request."""
        with arguments.of_request():
            return super().build_request(*args, **options)

    async def send(
        self,
        request: httpx2.Request,
        *,
        stream: bool = False,
        auth: Any = httpx2.USE_CLIENT_DEFAULT,
        follow_redirects: Any = False,  # noqa: ARG002 - ignored
    ) -> httpx2.Response:
        """As `httpx2.AsyncClient.send`, but a redirect is an answer like any other: it is never followed."""
        arguments.sendable(request, httpx2.Request, httpx2.AsyncByteStream, closed=self.is_closed)
        auth = arguments.auth(auth, httpx2.USE_CLIENT_DEFAULT, httpx2.Auth, httpx2.Request)
        return await super().send(request, stream=stream, auth=auth, follow_redirects=False)
