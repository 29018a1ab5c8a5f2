"""The sealed client for programs that are still on `httpx`, `openai` 2.x among them: `pip install 'lacre[httpx]'`.

Rules:
- Nothing is sealed or decided here. A request becomes one of `httpx2`, `lacre.Client` seals it, and its answer comes back as
  `httpx`'s: one implementation, and this adapter.
- httpx's exceptions are made here and nowhere else; every other error is Lacre's own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Unpack

import httpx2

from lacre import client as sealed
from lacre import errors
from lacre.evidence.verification import Verification
from lacre.exchange.call import ORIGIN
from lacre.runtime import arguments
from lacre.runtime.forks import StaysInProcess
from lacre.transport import request_log
from lacre.transport import sealed as transport
from lacre.transport.dial import NoCookies
from lacre.transport.options import AsyncOptions, Options

try:
    import httpx
except ModuleNotFoundError as exc:
    raise ImportError("lacre.legacy is for programs on httpx: pip install 'lacre[httpx]'") from exc

DEFAULT_TIMEOUT: Final = httpx.Timeout(**sealed.DEFAULT_TIMEOUT.as_dict())

EventHooks = Mapping[str, list[Callable[..., Any]]]


class Unreachable(errors.Unreachable, httpx.NetworkError):  # type: ignore[misc]  # `request` is httpx2's or httpx's
    """The gateway could not be reached, or the connection broke before its answer. Both Lacre's and httpx's."""

    remedy = transport.Unreachable.remedy


class TimedOut(errors.TimedOut, httpx.TimeoutException):  # type: ignore[misc]  # as above
    """The gateway did not connect or answer in time. Both Lacre's and httpx's."""

    remedy = transport.TimedOut.remedy


class Client(StaysInProcess, httpx.Client):
    """An `httpx.Client` whose every request is sealed: `openai.OpenAI(http_client=lacre.legacy.Client(), ...)`.

    url and options: as for `lacre.Client`; those of the connection to the gateway are of httpx2's types. Requests, responses
    and hooks are httpx's; `response.extensions["lacre"]` is as there. Redirects are never followed.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        timeout: httpx.Timeout | float | None = DEFAULT_TIMEOUT,
        event_hooks: EventHooks | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._sealed = sealed.Client(url, **options)
        request_log.once("httpx")
        lasts, hooks = _timeout(timeout), arguments.hooks(event_hooks)
        super().__init__(
            transport=Transport(self._sealed), base_url=ORIGIN, timeout=lasts, event_hooks=hooks, cookies=NoCookies()
        )

    def build_request(self, *args: Any, **options: Any) -> httpx.Request:
        """As `httpx.Client.build_request`. Raises UsageError for what no request can be built of."""
        with _of_request():
            return super().build_request(*args, **options)

    def send(
        self,
        request: httpx.Request,
        *,
        stream: bool = False,
        auth: Any = httpx.USE_CLIENT_DEFAULT,
        follow_redirects: Any = False,  # noqa: ARG002 - whatever is asked for
    ) -> httpx.Response:
        """As `httpx.Client.send`, but a redirect is an answer like any other."""
        arguments.sendable(request, httpx.Request, httpx.SyncByteStream, closed=self.is_closed)
        auth = arguments.auth(auth, httpx.USE_CLIENT_DEFAULT, httpx.Auth, httpx.Request)
        return super().send(request, stream=stream, auth=auth, follow_redirects=False)

    @property
    def verification(self) -> Verification:
        """As `lacre.Client.verification`."""
        return self._sealed.verification

    def models(self) -> tuple[str, ...]:
        """The models that the pool serves, as the verified manifest names them."""
        with _mapped():
            return self._sealed.models()


class AsyncClient(StaysInProcess, httpx.AsyncClient):
    """The async twin of `Client`."""

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
        lasts, hooks = _timeout(timeout), arguments.hooks(event_hooks)
        super().__init__(
            transport=AsyncTransport(self._sealed), base_url=ORIGIN, timeout=lasts, event_hooks=hooks, cookies=NoCookies()
        )

    def build_request(self, *args: Any, **options: Any) -> httpx.Request:
        """As `httpx.AsyncClient.build_request`. Raises UsageError for what no request can be built of."""
        with _of_request():
            return super().build_request(*args, **options)

    async def send(
        self,
        request: httpx.Request,
        *,
        stream: bool = False,
        auth: Any = httpx.USE_CLIENT_DEFAULT,
        follow_redirects: Any = False,  # noqa: ARG002 - whatever is asked for
    ) -> httpx.Response:
        """As `httpx.AsyncClient.send`, but a redirect is an answer like any other."""
        arguments.sendable(request, httpx.Request, httpx.AsyncByteStream, closed=self.is_closed)
        auth = arguments.auth(auth, httpx.USE_CLIENT_DEFAULT, httpx.Auth, httpx.Request)
        return await super().send(request, stream=stream, auth=auth, follow_redirects=False)

    @property
    def verification(self) -> Verification:
        """As `lacre.Client.verification`."""
        return self._sealed.verification

    async def models(self) -> tuple[str, ...]:
        """The models that the pool serves, as the verified manifest names them."""
        with _mapped():
            return await self._sealed.models()


@contextmanager
def _of_request() -> Iterator[None]:
    with arguments.of_request():
        try:
            yield
        except httpx.InvalidURL as exc:
            raise httpx2.InvalidURL(str(exc)) from exc


def _timeout(value: object) -> Any:
    """`timeout=` of httpx. Raises UsageError."""
    return value if isinstance(value, httpx.Timeout) else arguments.timeout(value)


class Transport(httpx.BaseTransport):
    """Sends httpx's requests through a sealed client. Closes it when closed."""

    def __init__(self, client: sealed.Client) -> None:
        self._client = client

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        with _mapped():
            with arguments.of_content():
                content = request.read()
            answer = self._client.send(_request(request, content), stream=True)
        return _response(answer, _Stream(answer))

    def close(self) -> None:
        self._client.close()


class AsyncTransport(httpx.AsyncBaseTransport):
    """The async twin of `Transport`."""

    def __init__(self, client: sealed.AsyncClient) -> None:
        self._client = client

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        with _mapped():
            with arguments.of_content():
                content = await request.aread()
            answer = await self._client.send(_request(request, content), stream=True)
        return _response(answer, _AsyncStream(answer))

    async def aclose(self) -> None:
        await self._client.aclose()


class _Stream(httpx.SyncByteStream):
    """The body of an answer of httpx2, as httpx reads one."""

    def __init__(self, answer: httpx2.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        stream = self._answer.stream
        assert isinstance(stream, httpx2.SyncByteStream)  # noqa: S101 - of a sync client's answer it is
        with _mapped():
            yield from stream

    def close(self) -> None:
        self._answer.close()


class _AsyncStream(httpx.AsyncByteStream):
    """The async twin of `_Stream`."""

    def __init__(self, answer: httpx2.Response) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        stream = self._answer.stream
        assert isinstance(stream, httpx2.AsyncByteStream)  # noqa: S101 - of an async client's answer it is
        with _mapped():
            async for piece in stream:
                yield piece

    async def aclose(self) -> None:
        await self._answer.aclose()


def _request(request: httpx.Request, content: bytes) -> httpx2.Request:
    return httpx2.Request(
        request.method, str(request.url), headers=request.headers.raw, content=content, extensions=dict(request.extensions)
    )


def _response(answer: httpx2.Response, stream: httpx.SyncByteStream | httpx.AsyncByteStream) -> httpx.Response:
    return httpx.Response(answer.status_code, headers=answer.headers.raw, stream=stream, extensions=dict(answer.extensions))


@contextmanager
def _mapped() -> Iterator[None]:
    """What is httpx2's too becomes httpx's too; both remain Lacre's."""
    try:
        yield
    except transport.TimedOut as exc:
        raise _as(TimedOut, exc) from exc
    except transport.Unreachable as exc:
        raise _as(Unreachable, exc) from exc


def _as(kind: type[TimedOut] | type[Unreachable], exc: errors.LacreError) -> errors.LacreError:
    mapped = kind(str(exc))
    mapped.__dict__.update((name, value) for name, value in vars(exc).items() if name != "_request")  # which is httpx2's
    return mapped
