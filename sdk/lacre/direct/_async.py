"""The client of an app that is served with `lacre.asgi.Sealed`."""

from __future__ import annotations

from types import NoneType

import httpx2

from lacre.client import DEFAULT_TIMEOUT, EventHooks
from lacre.direct.sealing import OUTER_HEADERS, Credential, DirectSealing, Pins, credential_of, pins_of, url_of
from lacre.runtime import arguments
from lacre.transport.dial import DEFAULT_LIMITS, Dial, Verify, async_outer
from lacre.transport.sealed_async import AsyncSealedTransport
from lacre.transport.sealing_client_async import AsyncSealingClient
from lacre.wire.padding import Shape


class AsyncClient(AsyncSealingClient):
    """An `httpx2.AsyncClient` of one sealed app: `await client.post("/summaries", json=...)`, with its base URL set.

    url: the app's address, `https://host[:port]` or `http://`. key: its pin (`Sealed.pins`), or several while the app changes
    its key. token: names the caller to the app, a bearer token inside the seal; a callable is called for each request. shape,
    timeout, event_hooks, and verify, proxy, limits and transport of the connection: as for `lacre.AsyncClient`.
    """

    def __init__(
        self,
        url: str,
        *,
        key: Pins,
        token: Credential | None = None,
        shape: Shape = "pad",
        timeout: httpx2.Timeout | float | None = DEFAULT_TIMEOUT,
        verify: Verify = True,
        proxy: httpx2.Proxy | httpx2.URL | str | None = None,
        limits: httpx2.Limits = DEFAULT_LIMITS,
        transport: httpx2.AsyncBaseTransport | None = None,
        event_hooks: EventHooks | None = None,
    ) -> None:
        base_url, lasts, hooks = url_of(url), arguments.timeout(timeout), arguments.hooks(event_hooks)
        checks, through = arguments.verify(verify), arguments.proxy(proxy)
        arguments.instance(transport, (httpx2.AsyncBaseTransport, NoneType), "transport")
        dial: Dial[httpx2.AsyncBaseTransport] = Dial(
            base_url, OUTER_HEADERS, lasts, checks, through, arguments.limits(limits), transport
        )
        sealing = DirectSealing(pins_of(key), credential_of(token), shape)
        sealed = AsyncSealedTransport(sealing, async_outer(dial), "")
        super().__init__(sealed, lasts, hooks)
