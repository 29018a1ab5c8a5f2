"""Clients of an app that is served with `lacre.asgi.Sealed`: no gateway between, and the app's key pinned here.

Rules:
- The request is sealed to a key whose pin the caller gave, or it does not leave. What the server publishes is a choice among
  those, and proves nothing by itself.
- What the application sends is inside, its headers and its token too: the app is the party that it trusts. Outside is nothing
  that tells one caller from another, but the address.
- There is no manifest here, no receipt and no audit proof.
"""

from __future__ import annotations

import email.utils
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import httpx2

from lacre import arguments, details
from lacre._version import __version__
from lacre.client import DEFAULT_LIMITS, DEFAULT_TIMEOUT, EventHooks, Verify
from lacre.credentials import checked, given
from lacre.errors import InvalidMessage, MessageTooLarge, SettingsError, UntrustedRoot
from lacre.facts import Facts
from lacre.inner import MAX_CONTENT, Plain
from lacre.jws import b64u, b64u_decode
from lacre.memory import VersionMemory
from lacre.padding import Shape, request_length
from lacre.problems import DATE, UNKNOWN_KEY, Problem
from lacre.sealing import AUTHORITY, MAX_PROBLEM, ORIGIN, Opening, Refusal, Sealing, check_sealed, problem_of, read_all
from lacre.steps import Read, Send, Steps, sent_bytes, sent_outer
from lacre.transport import AsyncSealedTransport, SealedTransport
from lacre.verification import Verification
from lacre.wire import bhttp
from lacre.wire.header import MEDIA_TYPE_REQUEST, MEDIA_TYPE_RESPONSE, KeyConfig, parse_key_list
from lacre.wire.ohttp import seal_request

BASE_URL: Final = ORIGIN
WELL_KNOWN: Final = "/.well-known/ohttp-gateway"  # RFC 9540 section 4
MAX_KEYS: Final = 64 * 1024  # bytes of a key list; a key has some 1300
# Of one connection, or of this machine: not the app's to know, or wrong inside another message.
_STAYS_OUT: Final = frozenset({
    "host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "keep-alive", "proxy-connection",
    "accept-encoding", "user-agent", "cookie",
})  # fmt: skip

Pins = str | Sequence[str]
Credential = str | Callable[[], str]


class Client(httpx2.Client):
    """An `httpx2.Client` of one sealed app: `client.post("/summaries", json=...)`, with its base URL set.

    url: where the app is served, `https://host[:port]` or `http://`. key: what is pinned (`Sealed.pins`), or several while the
    app changes its key. token: what names the caller to the app, a bearer token inside the seal; a callable is asked each time.
    shape, timeout, event_hooks, and verify, proxy, limits and transport of the connection: as for `lacre.Client`.
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
        transport: httpx2.BaseTransport | None = None,
        event_hooks: EventHooks | None = None,
    ) -> None:
        base_url, lasts = arguments.text(url, "url"), arguments.timeout(timeout)
        sealing = DirectSealing(_pins(key), _credential(token), shape)
        outer = httpx2.Client(
            base_url=base_url,
            headers=_OUTER,
            timeout=lasts,
            verify=arguments.verify(verify),
            proxy=arguments.proxy(proxy),
            limits=limits,
            transport=transport,
        )
        super().__init__(
            transport=SealedTransport(sealing, outer, ""), base_url=BASE_URL, timeout=lasts, event_hooks=event_hooks
        )


class AsyncClient(httpx2.AsyncClient):
    """The async twin of `Client`."""

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
        base_url, lasts = arguments.text(url, "url"), arguments.timeout(timeout)
        sealing = DirectSealing(_pins(key), _credential(token), shape)
        outer = httpx2.AsyncClient(
            base_url=base_url,
            headers=_OUTER,
            timeout=lasts,
            verify=arguments.verify(verify),
            proxy=arguments.proxy(proxy),
            limits=limits,
            transport=transport,
        )
        super().__init__(
            transport=AsyncSealedTransport(sealing, outer, ""), base_url=BASE_URL, timeout=lasts, event_hooks=event_hooks
        )


class DirectSealing(Sealing):
    """Seals to pinned keys. Of `Sealing` it keeps the clock's correction, and how an exchange is driven."""

    def __init__(self, pins: Sequence[bytes], token: Credential | None, shape: Shape) -> None:
        super().__init__(pins[0], VersionMemory(), shape=shape)
        self._pins = tuple(pins)
        self._token = token
        self._config: KeyConfig | None = None

    def _exchange(self, plain: Plain, endurance: float, lost: int) -> Steps[Opening | Refusal]:  # noqa: ARG002 - never again
        attempts = 0
        once: set[Problem] = set()  # what was mended already, and is not tried again
        while True:
            config = self._config or (yield from self._learn())
            send, opening = self._sealed(plain, config, attempts := attempts + 1)
            outer = sent_outer((yield send))
            if outer.status != 200:
                document = yield from read_all(MAX_PROBLEM)
                problem = problem_of(outer, document)
                if problem is not UNKNOWN_KEY or problem in once:
                    return Refusal(problem, outer.retry_after, opening.facts, details.read(document))
                once.add(problem)
                self._config = None
                continue
            check_sealed(outer)
            while not opening.ready:
                opening.feed(sent_bytes((yield Read())))
            if DATE in once or not self._correct_clock(opening):
                return opening
            once.add(DATE)

    def _learn(self) -> Steps[KeyConfig]:
        """The first pinned key that the server has. Raises UntrustedRoot, or what a bad list raises."""
        outer = sent_outer((yield Send("GET", WELL_KNOWN)))
        content = yield from read_all(MAX_KEYS)
        if outer.status != 200:
            raise problem_of(outer, content).exception(outer.retry_after, details.read(content))
        published = {hashlib.sha256(config.encode()).digest(): config for config in parse_key_list(content)}
        for pin in self._pins:
            if pin in published:
                self._config = published[pin]
                return published[pin]
        raise UntrustedRoot("the app has none of the pinned keys: ask who runs it, by a way that you trust, for its pin")

    def _sealed(self, plain: Plain, config: KeyConfig, attempt: int) -> tuple[Send, Opening]:
        if len(plain.content) > MAX_CONTENT:
            raise MessageTooLarge(f"a request body may hold {MAX_CONTENT} bytes; send a smaller one")
        padded_to = request_length if self._shape == "pad" else None
        body, header, opener = seal_request(config, bhttp.encode_request(self._inside(plain), padded_to=padded_to))
        headers = (("content-type", MEDIA_TYPE_REQUEST), ("incremental", "?1"), ("accept", MEDIA_TYPE_RESPONSE))
        pinned = b64u(hashlib.sha256(config.encode()).digest())
        facts = Facts(header.suite.kem.label, self._shape, len(body), attempt, Verification(pinned))
        return Send("POST", WELL_KNOWN, headers, body), Opening(opener, facts, lambda _trailers: None)

    def _inside(self, plain: Plain) -> bhttp.Request:
        date = email.utils.formatdate(self._clock() + self._clock_offset, usegmt=True)
        headers = [(name, value) for name, value in plain.headers if name not in _STAYS_OUT]
        if self._token is not None:
            token = self._token if isinstance(self._token, str) else given(self._token())
            headers = [(name, value) for name, value in headers if name != "authorization"]
            headers.append(("authorization", f"Bearer {checked(token)}"))
        own = (("date", date), ("lacre-shape", self._shape))
        return bhttp.Request(plain.method, "https", AUTHORITY, plain.path, (*headers, *own), plain.content)


_OUTER: Final[Mapping[str, str]] = {"user-agent": f"lacre/{__version__}", "accept": "*/*"}


def _credential(token: Credential | None) -> Credential | None:
    """None is none; an empty one is the caller's mistake. Raises UsageError."""
    if token is None or callable(token):
        return token
    return arguments.text(token, "token")


def _pins(key: Pins) -> list[bytes]:
    """Raises SettingsError, or UsageError for what is not a string."""
    keys = arguments.one_or_more(key, str, "key") if key else ()
    try:
        pins = [b64u_decode(each) for each in keys]
    except InvalidMessage as exc:
        raise SettingsError("key: a pin is base64url, as `Sealed.pins` has it") from exc
    if not pins or any(len(pin) != hashlib.sha256().digest_size for pin in pins):
        raise SettingsError("key: a pin has 32 bytes in base64url, as `Sealed.pins` has it")
    return pins
