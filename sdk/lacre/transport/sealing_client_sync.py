# Generated from sealing_client_async.py by tools/unasync.py: do not edit.
"""The common part of all sealed clients: requests are checked before they are sent, and redirects are never followed."""

from __future__ import annotations

from typing import Any

import httpx2

from lacre.exchange.call import ORIGIN
from lacre.runtime import arguments
from lacre.runtime.forks import StaysInProcess
from lacre.transport import request_log
from lacre.transport.dial import NoCookies
from lacre.transport.sealed_sync import SealedTransport


class SealingClient(StaysInProcess, httpx2.Client):
    """An `httpx2.Client` whose requests go through `sealed`."""

    def __init__(self, sealed: SealedTransport, timeout: Any, event_hooks: Any) -> None:
        """timeout, event_hooks: as `arguments.timeout` and `arguments.hooks` return them."""
        request_log.once("httpx2")
        super().__init__(transport=sealed, base_url=ORIGIN, timeout=timeout, event_hooks=event_hooks, cookies=NoCookies())

    def build_request(self, *args: Any, **options: Any) -> httpx2.Request:
        """As `httpx2.Client.build_request`. Raises UsageError if the arguments do not make a request."""
        with arguments.of_request():
            return super().build_request(*args, **options)

    def send(
        self,
        request: httpx2.Request,
        *,
        stream: bool = False,
        auth: Any = httpx2.USE_CLIENT_DEFAULT,
        follow_redirects: Any = False,  # noqa: ARG002 - ignored
    ) -> httpx2.Response:
        """As `httpx2.Client.send`, but a redirect is an answer like any other: it is never followed."""
        arguments.sendable(request, httpx2.Request, httpx2.SyncByteStream, closed=self.is_closed)
        auth = arguments.auth(auth, httpx2.USE_CLIENT_DEFAULT, httpx2.Auth, httpx2.Request)
        return super().send(request, stream=stream, auth=auth, follow_redirects=False)
