"""OAuth 2.0 for a person at a machine: the login server's description of itself, and the device grant (RFC 8628).

The person opens a page on any device, confirms a short code there and logs in. Meanwhile this machine asks the login server
again and again, until it says yes or no. `browser_grant` is for a machine with a browser.

Rules:
- A secret goes only to https addresses, or to loopback. The login server's own description names them.
- The description must name the issuer that the person gave (RFC 8414 section 3.3).
- Of a server's texts, only the page's address and the code are shown. No error shows others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard
from urllib.parse import urlsplit

import httpx2

from lacre.errors import InvalidMessage, SettingsError, Unauthenticated, Unavailable
from lacre.runtime.hosts import is_loopback
from lacre.runtime.json_objects import object_in
from lacre.transport.login import SavedLogin, fetched, post

GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"
WELL_KNOWN: Final = ("/.well-known/openid-configuration", "/.well-known/oauth-authorization-server")
INTERVAL: Final = 5.0  # seconds between two questions, if the server names none (RFC 8628 section 3.2)
SLOWER: Final = 5.0  # seconds more after each `slow_down` (section 3.5)
MAX_WAIT: Final = 1800.0  # seconds for a person to log in, even if the server allows more
MAX_CODE: Final = 64  # characters of the code that a person reads; RFC 8628 section 6.1 recommends 8
MAX_ADDRESS: Final = 2048  # characters of the page's address
_PENDING: Final = frozenset({"authorization_pending", "slow_down"})


@dataclass(frozen=True, slots=True)
class LoginServer:
    """issuer: its exact name. page_url, device_url: where a login begins, in a browser and without one. revoke_url: where it
    ends. None for what the server does not offer.
    """

    issuer: str
    token_url: str
    page_url: str | None
    device_url: str | None
    revoke_url: str | None

    @classmethod
    def discover(cls, http: httpx2.Client, issuer: str) -> LoginServer:
        """From the server's description of itself. Raises SettingsError, InvalidMessage and NetworkError."""
        if not is_safe(issuer):
            raise SettingsError("--issuer must be https:// (or http:// on loopback), as in the tokens' `iss`")
        for path in WELL_KNOWN:
            status, content = fetched(http, "GET", issuer.rstrip("/") + path)
            if status == 200:
                return cls._described(issuer, object_in(content) or {})
        raise SettingsError("the issuer has no description of itself under /.well-known: check --issuer")

    @classmethod
    def _described(cls, issuer: str, told: dict[str, Any]) -> LoginServer:
        if told.get("issuer") != issuer:
            raise SettingsError("the login server names another issuer: pass its exact name, with or without the last slash")
        token = told.get("token_endpoint")
        others = [told.get(f"{each}_endpoint") for each in ("authorization", "device_authorization", "revocation")]
        if not is_safe(token) or not all(each is None or is_safe(each) for each in others):
            raise InvalidMessage("the login server describes itself with addresses that are not https")
        return cls(issuer, str(token), *others)


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """page, code: what the person opens and confirms. whole_page: the page with the code in its address, or None. until: on the
    monotonic clock.
    """

    page: str
    code: str
    whole_page: str | None
    until: float
    interval: float
    secret: str = field(repr=False)

    @classmethod
    def ask(cls, http: httpx2.Client, server: LoginServer, client_id: str, scope: str | None) -> DeviceCode:
        """Raises SettingsError, Unauthenticated, Unavailable, InvalidMessage and NetworkError."""
        if server.device_url is None:
            raise SettingsError("the login server does not offer the device grant (RFC 8628): ask its operator to allow it")
        asked = {"client_id": client_id, **({} if scope is None else {"scope": scope})}
        began = time.monotonic()
        status, content = post(http, server.device_url, asked)
        told = object_in(content) or {}
        if status != 200:
            raise refused(status, "the login server did not begin a login: check --client-id and --scope")
        code, secret, page, whole = (
            told.get(name) for name in ("user_code", "device_code", "verification_uri", "verification_uri_complete")
        )
        shown = isinstance(code, str) and 0 < len(code) <= MAX_CODE and code.isascii() and code.isprintable()
        if not shown or not isinstance(secret, str) or not is_safe(page):
            raise InvalidMessage("the login server's answer does not follow RFC 8628: check --issuer")
        life, pause = told.get("expires_in"), told.get("interval")
        until = began + min(MAX_WAIT, life if _is_number(life) else MAX_WAIT)
        interval = max(1.0, float(pause)) if _is_number(pause) else INTERVAL
        return cls(str(page), str(code), str(whole) if is_safe(whole) else None, until, interval, secret)


def wait(
    http: httpx2.Client,
    server: LoginServer,
    client_id: str,
    asked: DeviceCode,
    *,
    scope: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> SavedLogin:
    """The login, once the person has confirmed it. Raises Unauthenticated, Unavailable, InvalidMessage and NetworkError."""
    form = {"grant_type": GRANT, "device_code": asked.secret, "client_id": client_id}
    interval = asked.interval
    while time.monotonic() + interval < asked.until:
        sleep(interval)
        status, content = post(http, server.token_url, form)
        told = object_in(content) or {}
        if status == 200:
            return saved(server, client_id, scope, told)
        error = str(told.get("error"))
        if error not in _PENDING:
            said = "you refused the login" if error == "access_denied" else "the login server ended the login"
            raise refused(status, f"{said}: run `lacre login` again")
        interval += SLOWER if error == "slow_down" else 0.0
    raise refused(400, "nobody confirmed the code in time: run `lacre login` again")


def saved(server: LoginServer, client_id: str, scope: str | None, told: Mapping[str, Any]) -> SavedLogin:
    """told: the server's answer with the tokens. Raises SettingsError."""
    refresh = told.get("refresh_token")
    if not isinstance(refresh, str) or not refresh:
        raise SettingsError("the login server gave no refresh token: add offline_access to --scope, or ask its operator")
    return SavedLogin(server.issuer, server.token_url, client_id, scope, refresh, server.revoke_url)


def is_safe(url: object) -> bool:
    """Whether this is an address that a secret may go to, and that a terminal may show."""
    if not isinstance(url, str) or len(url) > MAX_ADDRESS or not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        where = urlsplit(url)
        local = where.scheme == "http" and is_loopback(where.hostname or "")
    except ValueError:
        return False
    return bool(where.hostname) and (where.scheme == "https" or local)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_WAIT * 100


def refused(status: int, message: str) -> Unauthenticated | Unavailable:
    """An error of the login server, without its words."""
    kind = Unauthenticated if 400 <= status < 500 and status != 429 else Unavailable
    remedy = "Run `lacre login` again, or ask the login server's operator."
    return kind(message, status=status, problem="oauth2:login", remedy=remedy)
