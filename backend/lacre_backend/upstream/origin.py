"""The HTTP server on this host that requests are forwarded to. `Origin.ask` is one exchange with it.

Rules:
- Nothing that identifies the caller is added. Only headers on a list are forwarded, plus two neutral ones of our own.
- Connection headers are not forwarded (RFC 9110 section 7.6.1): the fields named there, and those that `Connection` names.
- Redirects are neither followed nor forwarded: their target must not leave this host. No proxy is used.
- An answer must have no content coding: the decoded size of a compressed byte has no bound, and clients reject it.
- Each request has its own connection. On one host that costs nothing, and no connection is found closed.
- Exceptions of the HTTP library become refusals here and nowhere else. Only their type is logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Final

import httpx2
import structlog

from lacre_backend.upstream import refusals

CONNECT: Final = 5.0  # seconds; it is on this host
OF_A_CONNECTION: Final = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authentication-info", b"proxy-authorization",
        b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
# Headers that an upstream must not send to a client. A cookie identifies returning clients; the others describe a server that
# the client does not talk to.
_NOT_PASSED_ON: Final = frozenset({b"set-cookie", b"set-cookie2", b"alt-svc", b"strict-transport-security", b"server", b"via"})
_OURS: Final = b"lacre-"  # only the worker itself sets such headers
_PASSED_ON: Final = frozenset({b"content-type", b"accept"})

log = structlog.get_logger("lacre.upstream")

Headers = Sequence[tuple[bytes, bytes]]


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
    """The HTTP server that requests are forwarded to.

    - url: scheme, host and port.
    - passed_on: names of request headers in lower case, in addition to `content-type` and `accept`.
    - wait: seconds for the next byte. longest: seconds for a whole answer. largest: bytes of one.
    """

    def __init__(self, url: str, *, passed_on: Iterable[str] = (), wait: float, longest: float, largest: int) -> None:
        self._url = httpx2.URL(url)
        self._passed_on = _PASSED_ON | {name.encode() for name in passed_on}
        self._timeout = httpx2.Timeout(wait, connect=CONNECT).as_dict()
        self._longest = longest
        self._largest = largest
        # A transport instead of a client: a client has cookies, follows redirects and names itself.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        secure = self._url.scheme == "https"  # without TLS there is no certificate to verify, so none need be loaded
        self._transport = httpx2.AsyncHTTPTransport(verify=secure, trust_env=False, limits=limits)

    @asynccontextmanager
    async def ask(self, request: UpstreamRequest) -> AsyncIterator[UpstreamResponse]:
        """Raises RequestRefused if no forwardable answer comes. Leaving the context ends the request at the upstream."""
        deadline = asyncio.get_running_loop().time() + self._longest
        with _mapped():
            async with asyncio.timeout_at(deadline):
                response = await self._transport.handle_async_request(self._outgoing(request))
        try:
            _check(response)
            yield UpstreamResponse(
                response.status_code, list(_end_to_end(response.headers.raw)), self._pieces(response, deadline)
            )
        finally:
            await response.aclose()

    def _outgoing(self, request: UpstreamRequest) -> httpx2.Request:
        passed_on = [(name, value) for name, value in _end_to_end(request.headers) if name in self._passed_on]
        return httpx2.Request(
            request.method,
            self._url.copy_with(raw_path=request.target.encode("ascii")),
            headers=[*passed_on, (b"accept-encoding", b"identity")],
            content=request.content or None,
            extensions={"timeout": self._timeout},
        )

    async def _pieces(self, response: httpx2.Response, deadline: float) -> AsyncIterator[bytes]:
        size, pieces = 0, response.aiter_raw()
        with _mapped():
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
def _mapped() -> Iterator[None]:
    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as exc:
        log.warning("upstream.unavailable", kind=type(exc).__name__)
        raise refusals.unavailable() from None
    except (httpx2.TimeoutException, TimeoutError) as exc:
        log.warning("upstream.slow", kind=type(exc).__name__)
        raise refusals.timed_out() from None
    except httpx2.TransportError as exc:
        log.warning("upstream.broken", kind=type(exc).__name__)
        raise refusals.broken() from None


def _check(response: httpx2.Response) -> None:
    """Raises RequestRefused."""
    wrong = None
    if response.status_code < 200:
        wrong = "wants to switch to another protocol"
    elif 300 <= response.status_code < 400:
        wrong = "points to another address"
    elif response.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        wrong = "compresses its answer, although no compression was requested"
    if wrong is not None:
        log.warning("upstream.unusable", status=response.status_code)
        raise refusals.unusable(wrong)


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """The end-to-end fields, with names in lower case."""
    lowered = [(name.lower(), value) for name, value in headers]
    named = {part.strip().lower() for name, value in lowered if name == b"connection" for part in value.split(b",")}
    left_out = OF_A_CONNECTION | _NOT_PASSED_ON | named
    return ((name, value) for name, value in lowered if name not in left_out and not name.startswith(_OURS))
