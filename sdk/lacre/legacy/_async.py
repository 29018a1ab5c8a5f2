"""The sealed client of httpx: passes each request to `lacre.AsyncClient`, and its answer back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Unpack

import httpx
import httpx2

from lacre import client as sealed
from lacre.evidence.verification import Verification
from lacre.exchange.call import ORIGIN
from lacre.legacy.messages import DEFAULT_TIMEOUT, EventHooks, mapped, of_request, request_of, response_of, timeout_of
from lacre.runtime import arguments
from lacre.runtime.forks import StaysInProcess
from lacre.transport import request_log
from lacre.transport.dial import NoCookies
from lacre.transport.options import AsyncOptions


class AsyncClient(StaysInProcess, httpx.AsyncClient):
    """An `httpx.AsyncClient` that seals every request: `openai.AsyncOpenAI(http_client=lacre.legacy.AsyncClient(), ...)`.

    url and options: as for `lacre.AsyncClient`; those of the connection to the gateway have httpx2's types. Requests, responses
    and hooks are httpx's; `response.extensions["lacre"]` is the same. Redirects are never followed.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        timeout: httpx.Timeout | float | None = DEFAULT_TIMEOUT,
        event_hooks: EventHooks | None = None,
        **options: Unpack[AsyncOptions],
    ) -> None:
        self._sealed = sealed.AsyncClient(url, **options)
        request_log.once("httpx")
        lasts, hooks = timeout_of(timeout), arguments.hooks(event_hooks)
        super().__init__(
            transport=AsyncTransport(self._sealed), base_url=ORIGIN, timeout=lasts, event_hooks=hooks, cookies=NoCookies()
        )

    def build_request(self, *args: Any, **options: Any) -> httpx.Request:
        """As `httpx.AsyncClient.build_request`. Raises UsageError if the arguments do not make a request."""
        with of_request():
            return super().build_request(*args, **options)

    async def send(
        self,
        request: httpx.Request,
        *,
        stream: bool = False,
        auth: Any = httpx.USE_CLIENT_DEFAULT,
        follow_redirects: Any = False,  # noqa: ARG002 - ignored
    ) -> httpx.Response:
        """As `httpx.AsyncClient.send`, but a redirect is an answer like any other."""
        arguments.sendable(request, httpx.Request, httpx.AsyncByteStream, closed=self.is_closed)
        auth = arguments.auth(auth, httpx.USE_CLIENT_DEFAULT, httpx.Auth, httpx.Request)
        return await super().send(request, stream=stream, auth=auth, follow_redirects=False)

    @property
    def verification(self) -> Verification:
        """As `lacre.AsyncClient.verification`."""
        return self._sealed.verification

    async def models(self) -> tuple[str, ...]:
        """The models that the pool serves, as the verified manifest names them."""
        with mapped():
            return await self._sealed.models()


class AsyncTransport(httpx.AsyncBaseTransport):
    """Sends httpx's requests through a sealed client. Closes it when closed."""

    def __init__(self, client: sealed.AsyncClient) -> None:
        self._client = client

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        with mapped():
            with arguments.of_content():
                content = await request.aread()
            answer = await self._client.send(request_of(request, content), stream=True)
        return response_of(answer, AsyncStream(answer))

    async def aclose(self) -> None:
        await self._client.aclose()


class AsyncStream(httpx.AsyncByteStream):
    """The body of an answer of httpx2, for httpx to read."""

    def __init__(self, answer: httpx2.Response) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        stream = self._answer.stream
        assert isinstance(stream, httpx2.AsyncByteStream)  # noqa: S101 - true of every answer of such a client
        with mapped():
            async for piece in stream:
                yield piece

    async def aclose(self) -> None:
        await self._answer.aclose()
