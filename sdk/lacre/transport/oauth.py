"""Where access tokens come from: a string, a callable, OAuth2 client credentials, or a person's saved login.

Rules:
- A token or a secret is never logged, shown, or part of an error.
- OAuth2: one token request at a time, and all waiting calls share its outcome. A token is replaced before it expires.
- A token that the gateway refuses is replaced once, if there is another.

This file decides and does no I/O. `token_sources_async` and its twin send its requests, over the client's connections.
"""

from __future__ import annotations

import base64
import inspect
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote, urlencode, urlsplit

import httpx2

from lacre.errors import InvalidMessage, SettingsError, Unauthenticated, Unavailable, UsageError
from lacre.jose import dpop
from lacre.jose.dpop import ProofKey
from lacre.runtime import arguments
from lacre.runtime.hosts import checked_host, is_loopback
from lacre.runtime.json_objects import object_in

EARLY: Final = 30.0  # seconds before its expiry that a token is replaced; the gateway checks it only at a request's start
EARLY_SHARE: Final = 0.2  # for a token with a shorter life, this share of its life
DEFAULT_LIFE: Final = 300.0  # seconds, if the server does not say (RFC 6749 section 5.1)
MAX_LIFE: Final = 365 * 86400.0  # seconds: a longer life is cut to this, because no clock holds a number of hundreds of digits
MAX_ANSWER: Final = 64 * 1024  # bytes read of a token server's answer; a JWT has some thousand
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 section 2.1
_NUMBER: Final = re.compile(r"[0-9]{1,20}(\.[0-9]{0,20})?")
_ERROR_CODE: Final = re.compile(r"[a-z_]{1,40}")  # of RFC 6749 section 5.2: no other text of the server is shown


@dataclass(frozen=True, slots=True)
class ClientCredentials:
    """A program's own OAuth2 identity (RFC 6749 section 4.4): `Client(url, token=ClientCredentials(...))`.

    token_url: the issuer's token endpoint, https, or http on loopback. scope, audience: sent if given. in_body: send id and
    secret in the form, for a server without HTTP Basic. Raises SettingsError.
    """

    token_url: str
    client_id: str
    client_secret: str = field(repr=False)
    scope: str | None = None
    audience: str | None = None
    in_body: bool = False

    def __post_init__(self) -> None:
        for name in ("token_url", "client_id", "client_secret"):
            arguments.text(getattr(self, name), name)
        for name in ("scope", "audience"):  # only None means absent
            if (value := getattr(self, name)) is not None:
                arguments.text(value, name)
        try:
            where = urlsplit(self.token_url)
            secure = where.scheme == "https" or (where.scheme == "http" and is_loopback(where.hostname or ""))
        except ValueError:
            secure = False
        if not secure or not where.hostname:
            raise SettingsError("token_url must be https:// (or http:// on loopback): a client secret goes there")
        if where.username is not None:
            raise SettingsError("take user and password out of token_url: they are client_id and client_secret")
        checked_host(where.hostname)

    def headers(self) -> dict[str, str]:
        form = {"content-type": "application/x-www-form-urlencoded", "accept": "application/json"}
        if self.in_body:
            return form
        pair = f"{quote(self.client_id, safe='')}:{quote(self.client_secret, safe='')}"
        return {**form, "authorization": "Basic " + base64.b64encode(pair.encode()).decode()}

    def form(self) -> bytes:
        own = {"client_id": self.client_id, "client_secret": self.client_secret} if self.in_body else {}
        asked = {"scope": self.scope, "audience": self.audience}
        fields = {
            "grant_type": "client_credentials",
            **own,
            **{name: value for name, value in asked.items() if value is not None},
        }
        return urlencode(fields).encode()


class RenewedToken:
    """A callable that renews its token, and is told which one the gateway refused."""

    def __call__(self, refused: str | None = None) -> str | Awaitable[str]:
        raise NotImplementedError


Token = str | Callable[[], str] | ClientCredentials
AsyncToken = str | Callable[[], str | Awaitable[str]] | ClientCredentials


def checked_source(value: AsyncToken | None) -> AsyncToken:
    """The value of `token=`; LACRE_TOKEN only if it is None. Raises UsageError or SettingsError."""
    if value is None or isinstance(value, str):
        return arguments.setting(value, "token", "LACRE_TOKEN")
    if callable(value) or isinstance(value, ClientCredentials):
        return value
    raise UsageError(f"token must be a string, a callable or lacre.ClientCredentials, not {arguments.kind_of(value)}")


def given(value: object) -> str:
    """The token that a callable returned. Raises UsageError, which shows nothing of it."""
    if isinstance(value, str) and value.strip():
        return value
    if inspect.iscoroutine(value):
        value.close()  # it will never be awaited
        raise UsageError("token: the callable is async, and this client is not: pass a plain function, or use AsyncClient")
    said = "an empty string" if isinstance(value, str) else arguments.kind_of(value)
    raise UsageError(f"token: the callable returned {said} instead of a token")


async def agiven(value: object) -> str:
    """The same for an async client's callable, which may have returned an awaitable."""
    return given(await value if inspect.isawaitable(value) else value)


@dataclass(frozen=True, slots=True)
class Issued:
    """A token, and when to replace it, on the monotonic clock."""

    token: str = field(repr=False)
    replace_at: float

    @classmethod
    def parse(cls, status: int, content: bytes, asked_at: float) -> Issued:
        """A token server's answer. asked_at: on the monotonic clock. Raises Unauthenticated, Unavailable or InvalidMessage."""
        members = object_in(content) or {}
        if status != 200:
            code = members.get("error")
            said = code if isinstance(code, str) and _ERROR_CODE.fullmatch(code) else f"status {status}"
            refused = Unauthenticated if 400 <= status < 500 and status != 429 else Unavailable
            raise refused(
                f"the token server gave no token ({said}): check client_id, client_secret and scope, or try again later",
                status=status,
                problem=f"oauth2:{said}",
                remedy="Check client_id, client_secret, scope and token_url with the token server's operator.",
            )
        token, life = members.get("access_token"), _life(members.get("expires_in"))
        if not isinstance(token, str) or life is None:
            raise InvalidMessage("the token server's answer does not follow RFC 6749: check token_url")
        return cls(checked(token), asked_at + life - min(EARLY, life * EARLY_SHARE))

    def fresh(self, refused: str | None) -> bool:
        """refused: a token that is known to be no longer accepted."""
        return self.token != refused and time.monotonic() < self.replace_at


NONE_YET: Final = Issued("", float("-inf"))


def token_request(
    outer: httpx2.Client | httpx2.AsyncClient, source: ClientCredentials, key: ProofKey | None, nonce: str | None
) -> httpx2.Request:
    """key: the token is to be bound to it (RFC 9449 section 5). nonce: the one that the server wants in a proof."""
    proof = {} if key is None else {dpop.HEADER: key.proof("POST", source.token_url, nonce=nonce)}
    return outer.build_request("POST", source.token_url, headers={**source.headers(), **proof}, content=source.form())


def wanted_nonce(response: httpx2.Response, content: bytes) -> str | None:
    """The nonce that a server wants in a proof, if it wants one (RFC 9449 section 8)."""
    return response.headers.get("dpop-nonce") if response.status_code == 400 and b'"use_dpop_nonce"' in content else None


def _life(told: object) -> float | None:
    """A token's life in seconds. Servers write it as a number or as a string of one (RFC 6749 section 5.1 has a number).

    None if it is neither, or negative.
    """
    if told is None:
        return DEFAULT_LIFE
    if isinstance(told, str) and _NUMBER.fullmatch(told):
        told = float(told)
    if isinstance(told, bool) or not isinstance(told, int | float) or not told >= 0:
        return None
    return min(told, MAX_LIFE)


def checked(token: str) -> str:
    """The token, if it is well-formed: a later error would print a malformed one. Raises SettingsError."""
    if not _TOKEN.fullmatch(token):
        raise SettingsError(
            "the access token holds a space, a line end or another invalid character: check LACRE_TOKEN or token=..."
        )
    return token
