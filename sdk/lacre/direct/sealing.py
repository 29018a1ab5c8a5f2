"""Seals to an app's pinned keys, and reads a direct client's arguments.

Rules:
- A request leaves only if it is sealed to a key whose pin the caller gave. The server's published list only chooses among
  those, and proves nothing by itself.
- Everything that the application sends is sealed, its headers and its token too, because it trusts the app. Outside, only the
  address tells one caller from another.
"""

from __future__ import annotations

import email.utils
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

from lacre._version import __version__
from lacre.errors import InvalidMessage, MessageTooLarge, SettingsError, UntrustedRoot
from lacre.evidence.exchange_info import Facts
from lacre.evidence.verification import Verification
from lacre.exchange.call import ORIGIN, CallState, Sealing
from lacre.exchange.request import MAX_CONTENT, Plain
from lacre.exchange.scope import Scope
from lacre.exchange.sealed_answer import MAX_PROBLEM, GatewayRefusal, Opening, check_sealed, problem_of, read_all
from lacre.exchange.steps import Read, Send, Steps, Together, sent_bytes, sent_outer
from lacre.jose.jws import b64u, b64u_decode
from lacre.problems import DATE, UNKNOWN_KEY, details
from lacre.runtime import arguments
from lacre.runtime.hosts import checked_host
from lacre.transport.oauth import checked, given
from lacre.trust.manifest_store import VersionMemory
from lacre.wire import bhttp
from lacre.wire.header import AUTHORITY, MEDIA_TYPE_REQUEST, MEDIA_TYPE_RESPONSE, WELL_KNOWN, KeyConfig, parse_key_list
from lacre.wire.ohttp import seal_request
from lacre.wire.padding import Shape, request_length

BASE_URL: Final = ORIGIN
MAX_KEYS: Final = 64 * 1024  # bytes of a key list; a key has some 1300
# Fields of one connection, or of this machine: private, or wrong inside another message.
_STAYS_OUT: Final = frozenset({
    "host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "keep-alive", "proxy-connection",
    "accept-encoding", "user-agent", "cookie",
})  # fmt: skip

Pins = str | Sequence[str]
Credential = str | Callable[[], str]


class DirectSealing(Sealing):
    """Seals to pinned keys. From `Sealing` it uses the clock correction and the way to drive an exchange."""

    def __init__(self, pins: Sequence[bytes], token: Credential | None, shape: Shape) -> None:
        super().__init__(pins[0], VersionMemory(), shape=shape)
        self._pins = tuple(pins)
        self._token = token
        self._config: KeyConfig | None = None

    def _exchange(self, call: CallState) -> Steps[Opening | GatewayRefusal]:
        while True:
            config = yield from self._known()
            send, opening = self._sealed(call, config)
            said = sent_outer((yield send))
            if said.status != 200:
                document = yield from read_all(MAX_PROBLEM)
                problem = problem_of(said, document)
                if problem is not UNKNOWN_KEY or problem in call.mended:
                    return GatewayRefusal(problem, said.retry_after, opening.facts, details.read(document))
                call.mended.add(problem)
                if self._config is config:  # no other call has fetched a newer one yet
                    self._config = None
                continue
            check_sealed(said)
            while not opening.ready:
                opening.feed(sent_bytes((yield Read())))
            if DATE in call.mended or not self._correct_clock(opening, call.scope):
                return opening
            call.mended.add(DATE)

    def _known(self) -> Steps[KeyConfig]:
        """The key to seal to; all calls that lack it share one fetch."""
        while (config := self._config) is None:
            yield Together(lambda: self._config is None, self._fetch_keys, 0.0)
        return config

    def _fetch_keys(self) -> Steps[None]:
        """The first pinned key that the server has. Raises UntrustedRoot, or what a bad list raises."""
        said = sent_outer((yield Send("GET", WELL_KNOWN)))
        content = yield from read_all(MAX_KEYS)
        if said.status != 200:
            raise problem_of(said, content).exception(said.retry_after, details.read(content))
        published = {hashlib.sha256(config.encode()).digest(): config for config in parse_key_list(content)}
        self._config = next((published[pin] for pin in self._pins if pin in published), None)
        if self._config is None:
            raise UntrustedRoot("the app has none of the pinned keys: ask its operator for the pin, over a trusted channel")

    def _sealed(self, call: CallState, config: KeyConfig) -> tuple[Send, Opening]:
        plain = call.plain
        if len(plain.content) > MAX_CONTENT:
            raise MessageTooLarge(f"a request body may hold {MAX_CONTENT} bytes; send a smaller one")
        padded_to = request_length if self._shape == "pad" else None
        body, header, opener = seal_request(config, bhttp.encode_request(self._inside(plain, call.scope), padded_to=padded_to))
        headers = (("content-type", MEDIA_TYPE_REQUEST), ("incremental", "?1"), ("accept", MEDIA_TYPE_RESPONSE))
        pinned = b64u(hashlib.sha256(config.encode()).digest())
        call.attempts += 1
        facts = call.facts = Facts(header.suite.kem.label, self._shape, len(body), call.attempts, Verification(pinned))
        return Send("POST", WELL_KNOWN, headers, body), Opening(opener, facts, lambda _head, _trailers: None)

    def _inside(self, plain: Plain, scope: Scope) -> bhttp.Request:
        date = email.utils.formatdate(self._clock() + scope.offset, usegmt=True)
        headers = [(name, value) for name, value in plain.headers if name not in _STAYS_OUT]
        if self._token is not None:
            token = self._token if isinstance(self._token, str) else given(self._token())
            headers = [(name, value) for name, value in headers if name != "authorization"]
            headers.append(("authorization", f"Bearer {checked(token)}"))
        own = (("date", date), ("lacre-shape", self._shape))
        return bhttp.Request(plain.method, "https", AUTHORITY, plain.path, (*headers, *own), plain.content)


OUTER_HEADERS: Final[Mapping[str, str]] = {"user-agent": f"lacre/{__version__}", "accept": "*/*"}


def credential_of(token: Credential | None) -> Credential | None:
    """None is absent; an empty one is the caller's mistake. Raises UsageError."""
    if token is None or callable(token):
        return token
    return arguments.text(token, "token")


def url_of(url: str) -> str:
    """Raises UsageError or SettingsError."""
    try:
        parts = urlsplit(arguments.text(url, "url"))
        usable = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise SettingsError("url must be the address of the app, such as https://app.example:8443")
    checked_host(parts.hostname or "")
    return url


def pins_of(key: Pins) -> list[bytes]:
    """Raises SettingsError, or UsageError if a pin is not a string."""
    keys = arguments.one_or_more(key, str, "key") if key else ()
    try:
        pins = [b64u_decode(each) for each in keys]
    except InvalidMessage as exc:
        raise SettingsError("key: a pin must be base64url, as in `Sealed.pins`") from exc
    if not pins or any(len(pin) != hashlib.sha256().digest_size for pin in pins):
        raise SettingsError("key: a pin must have 32 bytes in base64url, as in `Sealed.pins`")
    return pins
