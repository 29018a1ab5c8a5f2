"""One HTTP server that requests are forwarded to. `Origin.ask` is one exchange with it.

Rules:
- Nothing that identifies the caller is added. Only headers on a list are forwarded, plus neutral ones and the worker's own
  credentials. The settings allow no header to be both.
- Redirects are neither followed nor forwarded: their target must not leave this host. No proxy is used.
- An answer must have no content coding: the decoded size of a compressed byte has no bound, and clients reject it.
- Each request has its own connection. On one host that costs nothing, and no connection is found closed.
- `NotSent` means that no byte of the request was sent. Only then may another server get it.
- Exceptions of the HTTP library become refusals here and nowhere else. Only their type is logged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Final

import httpx2
import structlog

from lacre.transport.fault_words import fault_in_words
from lacre_backend.upstream import refusals
from lacre_backend.upstream.credentials import FixedHeaders
from lacre_backend.upstream.fields import OF_THE_CONTENT, Headers, end_to_end
from lacre_backend.upstream.settings import Upstream
from lacre_backend.upstream.state import OriginState

CONNECT: Final = 5.0  # seconds; it is on this host

log = structlog.get_logger("lacre.upstream")


class NotSent(Exception):
    """There was no connection, so nothing was sent."""


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """A request to forward. target: the path with its query."""

    method: str
    target: str = field(repr=False)
    headers: Headers = field(repr=False)
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class UpstreamResponse:
    """The upstream's answer. pieces: of the body, as they arrive; iterating raises RequestRefused. headers: only those that may
    be forwarded.
    """

    status: int
    headers: Headers
    pieces: AsyncIterator[bytes]

    @property
    def media_type(self) -> bytes:
        return self.header(b"content-type").partition(b";")[0].strip().lower()

    @property
    def length(self) -> int | None:
        """The body's length, if the answer declares it."""
        declared = self.header(b"content-length")
        return int(declared) if declared.isdigit() else None

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.headers if key == name), b"")


class Origin:
    """One server. state: its counts go there. fixed: the worker's credentials there."""

    def __init__(self, state: OriginState, settings: Upstream, fixed: FixedHeaders) -> None:
        self.state = state
        self._url = httpx2.URL(state.url)
        self._fixed = fixed
        self._passed_on = {name.encode() for name in OF_THE_CONTENT.union(settings.headers)}
        self._timeout = httpx2.Timeout(settings.wait, connect=CONNECT).as_dict()
        self._largest = settings.largest_answer
        # A transport instead of a client: a client has cookies, follows redirects and names itself.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        secure = self._url.scheme == "https"  # without TLS there is no certificate to verify, so none need be loaded
        self._transport = httpx2.AsyncHTTPTransport(verify=secure, trust_env=False, limits=limits)

    @asynccontextmanager
    async def ask(self, request: UpstreamRequest, deadline: float) -> AsyncIterator[UpstreamResponse]:
        """deadline: of the whole answer, by the loop's clock. Leaving the context ends the request at the upstream.

        Raises NotSent, or RequestRefused if no forwardable answer comes.
        """
        self.state.tried += 1
        self.state.running += 1
        try:
            with self._mapped():
                async with asyncio.timeout_at(deadline):
                    response = await self._transport.handle_async_request(self._outgoing(request))
            try:
                self._check(response)
                headers = list(end_to_end(response.headers.raw))
                yield UpstreamResponse(response.status_code, headers, self._pieces(response, deadline))
            finally:
                await response.aclose()
        finally:
            self.state.running -= 1

    def _outgoing(self, request: UpstreamRequest) -> httpx2.Request:
        passed_on = [(name, value) for name, value in end_to_end(request.headers) if name in self._passed_on]
        return httpx2.Request(
            request.method,
            self._url.copy_with(raw_path=request.target.encode("ascii")),
            headers=[*passed_on, *self._fixed.headers, (b"accept-encoding", b"identity")],
            content=request.content or None,
            extensions={"timeout": self._timeout},
        )

    async def _pieces(self, response: httpx2.Response, deadline: float) -> AsyncIterator[bytes]:
        size, pieces = 0, response.aiter_raw()
        with self._mapped():
            while True:
                async with asyncio.timeout_at(deadline):
                    piece = await anext(pieces, None)
                if piece is None:
                    return
                size += len(piece)
                if size > self._largest:
                    raise refusals.too_large(self._largest)
                yield piece

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as exc:
            self.state.put_aside(time.monotonic())
            self._tell("upstream.unavailable", kind=type(exc).__name__, reason=fault_in_words(exc))
            raise NotSent from None
        except (httpx2.TimeoutException, TimeoutError) as exc:
            self.state.failed += 1
            self._tell("upstream.slow", kind=type(exc).__name__, reason=fault_in_words(exc))
            raise refusals.timed_out() from None
        except httpx2.TransportError as exc:
            self.state.failed += 1
            self._tell("upstream.broken", kind=type(exc).__name__, reason=fault_in_words(exc))
            raise refusals.broken() from None

    def _check(self, response: httpx2.Response) -> None:
        """Raises RequestRefused."""
        wrong = None
        if response.status_code < 200:
            wrong = "wants to switch to another protocol"
        elif 300 <= response.status_code < 400:
            wrong = "points to another address"
        elif response.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
            wrong = "compresses its answer, although no compression was requested"
        if wrong is not None:
            self.state.failed += 1
            self._tell("upstream.unusable", status=response.status_code)
            raise refusals.unusable(wrong)

    def _tell(self, event: str, **fields: str | int) -> None:
        log.warning(event, host=self._url.host, port=self._url.port or 0, **fields)
