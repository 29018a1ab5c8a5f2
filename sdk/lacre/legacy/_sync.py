# Generated from _async.py by tools/unasync.py: do not edit.
"""The sealed client of httpx: passes each request to `lacre.Client`, and its answer back."""

from __future__ import annotations

from collections.abc import Iterator
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
from lacre.transport.options import Options


class Client(StaysInProcess, httpx.Client):
    """An `httpx.Client` that seals every request: `openai.OpenAI(http_client=lacre.legacy.Client(), ...)`.

    url and options: as for `lacre.Client`; those of the connection to the gateway have httpx2's types. Requests, responses
    and hooks are httpx's; `response.extensions["lacre"]` is the same. Redirects are never followed.
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
        lasts, hooks = timeout_of(timeout), arguments.hooks(event_hooks)
        super().__init__(
            transport=Transport(self._sealed), base_url=ORIGIN, timeout=lasts, event_hooks=hooks, cookies=NoCookies()
        )

    def build_request(self, *args: Any, **options: Any) -> httpx.Request:
        """As `httpx.Client.build_request`. Raises UsageError if the arguments do not make a request."""
        with of_request():
            return super().build_request(*args, **options)

    def send(
        self,
        request: httpx.Request,
        *,
        stream: bool = False,
        auth: Any = httpx.USE_CLIENT_DEFAULT,
        follow_redirects: Any = False,  # noqa: ARG002 - ignored
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
        with mapped():
            return self._sealed.models()


class Transport(httpx.BaseTransport):
    """Sends httpx's requests through a sealed client. Closes it when closed."""

    def __init__(self, client: sealed.Client) -> None:
        self._client = client

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        with mapped():
            with arguments.of_content():
                content = request.read()
            answer = self._client.send(request_of(request, content), stream=True)
        return response_of(answer, Stream(answer))

    def close(self) -> None:
        self._client.close()


class Stream(httpx.SyncByteStream):
    """The body of an answer of httpx2, for httpx to read."""

    def __init__(self, answer: httpx2.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        stream = self._answer.stream
        assert isinstance(stream, httpx2.SyncByteStream)  # noqa: S101 - true of every answer of such a client
        with mapped():
            yield from stream

    def close(self) -> None:
        self._answer.close()
