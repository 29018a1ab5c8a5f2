"""Makes a client's connections to the gateway: new ones in each process, and without cookies."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.cookiejar import Cookie, CookieJar
from typing import Final, Generic, TypeVar

import httpx2

from lacre.runtime.forks import PerLoop, PerProcess
from lacre.transport.tls_settings import settings_checked

DEFAULT_LIMITS: Final = httpx2.Limits(max_connections=100, max_keepalive_connections=20)  # httpx2's own
Verify = ssl.SSLContext | str | bool
Transport = TypeVar("Transport", httpx2.BaseTransport, httpx2.AsyncBaseTransport)
Outside = TypeVar("Outside", httpx2.Client, httpx2.AsyncClient)


class NoCookies(CookieJar):
    """Keeps and sends nothing: a cookie would link requests with different tokens or salts."""

    def extract_cookies(self, response: object, request: object) -> None:
        """Ignores the peer's cookies."""

    def add_cookie_header(self, request: object) -> None:
        """Adds none."""

    def set_cookie(self, cookie: Cookie) -> None:
        """Drops it, like everything that says who asks."""


@dataclass(frozen=True, slots=True)
class Dial(Generic[Transport]):
    """The arguments of `httpx2.Client` for the connection to a gateway. transport: the caller's own, or None."""

    base_url: str
    headers: Mapping[str, str]
    timeout: httpx2.Timeout | float | None
    verify: Verify = True
    proxy: httpx2.Proxy | httpx2.URL | str | None = None
    limits: httpx2.Limits = field(default_factory=lambda: DEFAULT_LIMITS)
    transport: Transport | None = None


def outer(dial: Dial[httpx2.BaseTransport]) -> PerProcess[httpx2.Client]:
    """The client of each process. Raises SettingsError."""
    return PerProcess(partial(_client, httpx2.Client, dial), renewable=dial.transport is None)


def async_outer(dial: Dial[httpx2.AsyncBaseTransport]) -> PerLoop[httpx2.AsyncClient]:
    """The client of each event loop of each process. Raises SettingsError."""
    return PerLoop(partial(_client, httpx2.AsyncClient, dial), renewable=dial.transport is None)


def _client(kind: Callable[..., Outside], dial: Dial[Transport]) -> Outside:
    with settings_checked(dial.verify, dial.proxy):
        return kind(
            base_url=dial.base_url,
            headers=dial.headers,
            cookies=NoCookies(),
            timeout=dial.timeout,
            verify=dial.verify,
            proxy=dial.proxy,
            limits=dial.limits,
            transport=dial.transport,
        )
